"""YAML files and `key=value` overrides -> a checked `Config`."""

import copy
import dataclasses
import difflib
import functools
import io
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf, ValueNode
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from medvlp import trust
from medvlp.config import Config, EvaluationConfig, MethodConfig, TaskConfig
from medvlp.config import ConfigError as ConfigError  # the readers of files know it under this name
from medvlp.config_combinations import check_combinations, check_deepspeed, check_heard, forget_unheard
from medvlp.config_keys import (
    anchor_files,
    check_keys,
    expand_home,
    file_keys,
    forget_options,
    is_section,
    keep_texts,
    move_keys,
    moved_keys,
    one_line,
    section_at,
)
from medvlp.config_values import value_problem
from shards.strict_json import read_limited
from shards.strict_yaml import YAML_LIMIT, YamlError, check_yaml, parse_yaml, yaml_as_written

Schema = TypeVar("Schema")
#: Evaluation task -> its config class; None: `evaluation.tasks` is kept as it stands, unchecked.
Tasks = Mapping[str, type[TaskConfig]] | None


@dataclasses.dataclass(frozen=True)
class _Source:
    """Values as YAML types them and as they were written, what errors call the place they come from, and the
    run folder it lies in (None: the user's)."""

    name: str
    values: dict[str, Any]
    written: dict[str, Any]
    folder: Path | None = None


@dataclasses.dataclass(frozen=True)
class RunFile:
    """A YAML file that belongs to a run folder, wherever it lies."""

    path: Path
    run: Path


@dataclasses.dataclass(frozen=True)
class Layer:
    """Values that stand in no file; `name` is what errors call them."""

    name: str
    values: Mapping[str, Any]


#: What a config is read from.
File = Path | str | RunFile | Layer


def load(
    files: Sequence[File],
    overrides: Sequence[str],
    schemas: Mapping[str, type[MethodConfig]],
    unused: Collection[str] = (),
    tasks: Tasks = None,
) -> Config:
    """Merge YAML files left to right, then overrides, into a complete `Config`.

    Values of files in run folders that reach out of them need the user's word (`medvlp.trust`).

    Args:
        files: YAML files and layers of values; later ones win. A plain path is looked at for whether it lies
            in a run folder.
        overrides: `section.key=value` strings; the value is YAML.
        schemas: method name -> its config class (`medvlp.methods.registry.schemas()`).
        unused: keys of `medvlp.trust.GUARDS` that the caller makes no use of.
        tasks: `medvlp.evaluation.task.schemas()`; None for what reads a run's config and evaluates nothing.

    Raises:
        TrustError: a run folder names what only the user may.
        ConfigError: unreadable file, unknown key, wrong type, value out of range, missing value, or an
            impossible combination.
    """
    sources = _sources(files, overrides, tasks)
    merged = _merged(sources, schemas, tasks)
    config = cast(Config, _resolved(merged))
    _check_values(config)
    check_combinations(config)
    said = [(source.name, source.values if source.folder is None else {}) for source in sources]
    check_heard(config, said, len(files))
    if "deepspeed" not in unused:  # runs of earlier versions can still be read
        check_deepspeed(config)
    config.method.check(config)
    for settings in config.evaluation.tasks.values():
        if isinstance(settings, TaskConfig):
            settings.check(config)
    found = trust.unsaid(config, [(source.values, source.folder) for source in sources])
    trust.refuse([problem for problem in found if problem[0].key not in unused])
    return config


def merge(
    files: Sequence[File],
    overrides: Sequence[str],
    schemas: Mapping[str, type[MethodConfig]],
    tasks: Tasks = None,
) -> DictConfig:
    """As `load`, but values may still be missing (`???`); returns the OmegaConf tree in struct mode."""
    return _merged(_sources(files, overrides, tasks), schemas, tasks)


def given_keys(files: Sequence[File], overrides: Sequence[str], tasks: Tasks = None) -> dict[str, str]:
    """Every `section.key` that these say, with the file or override it stands in; errors as `load`."""
    return {
        f"{section}.{key}": source.name
        for source in _sources(files, overrides, tasks)
        for section, values in source.values.items()
        if isinstance(values, Mapping)
        for key in values
    }


def defaults(tasks: Tasks) -> Config:
    """The whole schema: a config with the default keys of every task."""
    return Config(
        evaluation=EvaluationConfig(tasks={name: schema() for name, schema in (tasks or {}).items()})
    )


def _sources(files: Sequence[File], overrides: Sequence[str], tasks: Tasks) -> list[_Source]:
    sources, own, naming = [], [], tuple(file_keys(defaults(tasks)))
    for given in files:
        if isinstance(given, Layer):
            sources.append(_Source(given.name, cast(dict[str, Any], trust.escaped(given.values)), {}))
            continue
        file = given.path if isinstance(given, RunFile) else Path(given)
        values, written = _read(file)  # first, for it refuses paths that no file has
        anchor_files(values, file.parent, naming)
        folder = given.run if isinstance(given, RunFile) else trust.run_folder_of(file)
        if folder is not None and (keys := trust.look_ups(values)):
            raise trust.TrustError(
                f"{file}: {', '.join(keys)} would be looked up (${{...}}), which is not done for files of a "
                "run folder: write the value, or remove the line"
            )
        sources.append(_Source(str(file), values, written, folder))
        own += [values] if folder is None else []
    typed = [_Source(f"override {text!r}", *_parse_override(text)) for text in overrides]
    forget_options(own, [source.values for source in typed])
    sources += typed
    forget_unheard([source.values for source in sources], len(files))
    for source in sources:
        for old, new in moved_keys(source.values) if source.folder is None else ():
            raise ConfigError(f"{source.name}: unknown key {old!r}: its name is {new}")
        move_keys(source.values)
        expand_home(source.values, naming)
        move_keys(source.written)
        stored = section_at(source.values, ("evaluation", "tasks")) if source.folder is not None else None
        if stored is not None and tasks is not None:
            # Of a task that was registered where the run was made, and is not here.
            for name in stored.keys() - tasks.keys():
                del stored[name]
    return sources


def _merged(
    sources: Sequence[_Source], schemas: Mapping[str, type[MethodConfig]], tasks: Tasks
) -> DictConfig:
    method = _method_name(sources, schemas)
    tree = _schema_tree((method, schemas[method]), *(tasks or {}).items())
    return _merge_sources(copy.deepcopy(tree), sources)


@functools.cache  # a copy takes a fifth of the time
def _schema_tree(method: tuple[str, type[MethodConfig]], *tasks: tuple[str, type[TaskConfig]]) -> DictConfig:
    name, schema = method
    tree = OmegaConf.structured(defaults(dict(tasks)))
    tree.method = OmegaConf.structured(schema(name=name))
    return cast(DictConfig, tree)


@functools.cache
def _structured(schema: type[Schema]) -> DictConfig:
    return cast(DictConfig, OmegaConf.structured(schema))


def load_schema(file: Path | str, schema: type[Schema]) -> Schema:
    """Read one YAML file into a dataclass that is no run's config, with the same checks and messages.

    Args:
        file: YAML file.
        schema: dataclass whose fields are made with `medvlp.config.key`.

    Raises:
        ConfigError: unreadable file, unknown key, wrong type, or a value out of range.
    """
    values, written = _plain_values(Path(file))
    values = trust.escaped(values)  # a job's shell reads `${NAME}`, not this program
    tree = copy.deepcopy(_structured(schema))  # type: ignore[arg-type]  # classes are hashable
    tree = _merge_sources(tree, [_Source(str(file), values, written)])
    loaded = cast(Schema, _resolved(tree))
    try:
        _check_values(loaded)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error
    return loaded


def _resolved(tree: DictConfig) -> Any:
    """The dataclasses of a tree with every `${other.key}` replaced by its value."""
    try:
        return OmegaConf.to_object(tree)
    except MissingMandatoryValue:
        absent = missing(tree)
        raise ConfigError(
            f"no value for {', '.join(absent)}: set it in a YAML file or as {absent[0]}=VALUE"
        ) from None
    except (OmegaConfBaseException, RecursionError) as error:
        key = getattr(error, "full_key", None) or "a value"
        raise ConfigError(f"{key}: {one_line(error)}") from None


def _check_values(config: Any) -> None:
    if problem := value_problem(config):
        raise ConfigError(problem)


def _merge_sources(tree: Any, sources: Sequence[_Source]) -> DictConfig:
    """The tree with all values in it; it is changed."""
    for source in sources:
        name, values = source.name, source.values
        check_keys(values, tree, name, prefix="")
        keep_texts(values, source.written, tree)
        try:
            _empty(values, tree)
            _merge(values, tree)
        except (OmegaConfBaseException, ValueError, TypeError, RecursionError) as error:
            key = getattr(error, "full_key", None) or "a section"
            raise ConfigError(f"{name}: {key}: {one_line(error)}") from None
    OmegaConf.set_struct(tree, True)
    return cast(DictConfig, tree)


def _merge(values: Mapping[str, Any], tree: DictConfig) -> None:
    """As `tree.merge_with(values)`, which makes a second tree of the values first and takes twice as long."""
    for key, value in values.items():
        node = tree._get_node(key)
        if is_section(node) and isinstance(value, Mapping):
            _merge(value, cast(DictConfig, node))
        elif isinstance(node, ValueNode) and not isinstance(value, Mapping | list):
            if value != MISSING:  # a template leaves what others have said
                OmegaConf.update(tree, key, value)
        else:
            tree.merge_with({key: value})


def _empty(values: Mapping[str, Any], tree: DictConfig) -> None:
    """Take away what a mapping of free keys holds (`image.options`) where a source says `{}`: merging never
    removes a key, and the options of one network are not those of another."""
    for key, value in values.items():
        node = tree._get_node(key)
        if is_section(node) and isinstance(value, Mapping):
            _empty(value, cast(DictConfig, node))
        elif isinstance(node, DictConfig) and value == {}:
            tree[key] = {}


def missing(tree: DictConfig) -> list[str]:
    """Keys that still need a value, sorted."""
    try:
        return sorted(OmegaConf.missing_keys(tree))
    except (OmegaConfBaseException, RecursionError) as error:
        raise ConfigError(f"{getattr(error, 'full_key', None) or 'a value'}: {one_line(error)}") from None


def to_yaml(config: Config | DictConfig) -> str:
    """The whole tree as YAML; reads back through `load`."""
    if isinstance(config, DictConfig):
        return str(OmegaConf.to_yaml(config))
    # Values are final: a text that happens to hold `${` is not to be looked up by the next reader.
    return str(OmegaConf.to_yaml(OmegaConf.create(trust.escaped(dataclasses.asdict(config)))))


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Values of a run's config file, and the same as written."""
    text = _text(file)
    try:
        values = OmegaConf.to_container(OmegaConf.load(io.StringIO(text)))
    except (OmegaConfBaseException, OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{file}: {one_line(error)}") from None
    return _mapping(values, file), yaml_as_written(text) or {}


def _plain_values(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Values of a YAML file in which nothing is looked up, and the same as written."""
    text = _text(file)
    try:
        values = parse_yaml(text)
    except YamlError as error:
        raise ConfigError(f"{file}: not valid YAML: {error}") from error
    return _mapping({} if values is None else values, file), yaml_as_written(text) or {}


def _mapping(values: Any, file: Path) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: a config file holds `section:` mappings, not a list")
    return cast(dict[str, Any], values)


def _text(file: Path) -> str:
    """The text of a YAML file that is safe to build values from."""
    try:
        text = read_limited(file, YAML_LIMIT).decode()
        check_yaml(text)
    except OSError as error:
        raise ConfigError(
            f"{file}: cannot be read ({error.strerror}); give the path of a YAML file"
        ) from error
    except YamlError as error:
        raise ConfigError(f"{file}: not valid YAML: {error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not valid YAML: not UTF-8") from error
    except ValueError as error:  # too large, a pipe, or a path with NUL
        where = repr(str(file)[:200])
        raise ConfigError(f"{where}: cannot be read ({error}); give the path of a YAML file") from error
    return text


def _parse_override(text: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Values of `section.key=value`, and the same as written."""
    key, separator, value = text.partition("=")
    if not separator or not all(re.fullmatch(r"[A-Za-z_][\w-]*", part) for part in key.split(".")):
        raise ConfigError(f"override {text[:200]!r}: write section.key=value")
    try:
        written = yaml_as_written(value)
        for part in reversed(key.split(".")):
            written = {part: written}
        return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.from_dotlist([text]))), written
    except (OmegaConfBaseException, yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"override {text[:200]!r}: {one_line(error)}") from None


def _method_name(sources: Sequence[_Source], schemas: Mapping[str, type[MethodConfig]]) -> str:
    """The method that the last source naming one chooses."""
    chosen, origin = MethodConfig().name, "the default"
    for source in sources:
        section, name = source.values.get("method"), source.name
        if isinstance(section, dict) and "name" in section:
            chosen, origin = section["name"], name
    if not isinstance(chosen, str) or chosen not in schemas:
        given = str(chosen)[:100]
        nearest = difflib.get_close_matches(given, schemas, n=1, cutoff=0.5)
        hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
        raise ConfigError(
            f"{origin}: method.name: no method {given!r}{hint}; there are {', '.join(sorted(schemas))}"
        )
    return chosen
