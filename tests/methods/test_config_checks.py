"""Keys that cannot stand together are refused when a config is read, before anything starts or is queued."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from launcher.main import app
from medvlp import config_files
from medvlp.config_files import ConfigError
from medvlp.methods.registry import schemas

MASKS = "prototypes.false_negatives=mask"
CLUSTERS = "prototypes.false_negatives_by=clusters"
STAGE_TWO = "method.stage=2"

#: Method, keys, and what the message names.
IMPOSSIBLE = [
    ("mgca", ["method.instance_weight=0", "method.token_weight=0", "method.prototype_weight=0"], "no loss"),
    (
        "mgca",
        ["method.prototype_source=clusters", "method.instance_weight=0", "method.token_weight=0"],
        "no loss before the first refresh",
    ),
    ("mgca", [MASKS, "method.instance_weight=0"], r"method\.instance_weight=0"),
    ("mgca", ["prototypes.anchors=[edema]"], "which nothing uses"),
    ("mgca", [MASKS, "prototypes.anchors=[edema]"], "which nothing uses"),
    (
        "mgca",
        [MASKS, CLUSTERS, "prototypes.clusters=1", "prototypes.anchors=[edema, mass]"],
        "need as many clusters; there are 1",
    ),
    (
        "place",
        ["method.instance_weight=0", "method.observation_weight=0", "method.correlation_weight=0"],
        "no loss",
    ),
    ("place", ["method.decoder_heads=5"], r"method\.decoder_width=768"),
    ("place", ["method.grounding=patch"], r"method\.token_weight"),
    ("place", ["method.observation_score=1", "method.observation_weight=0"], r"method\.observation_score"),
    ("place", [MASKS, "method.instance_weight=0"], r"method\.instance_weight"),
    ("prior", ["method.global_weights=[1, 1]"], r"method\.global_weights"),
    ("prior", ["method.decoder_heads=5"], r"method\.decoder_heads=5"),
    ("prior", ["method.pool_heads=5"], r"method\.pool_heads=5"),
    ("prior", ["method.stage=1", "prototypes.init=kmeans"], r"prototypes\.init=random"),
    ("prior", [MASKS, STAGE_TWO, "method.global_weights=[1, 0, 1]"], r"method\.global_weights"),
    (
        "prior",
        ["method.zero_shot=official", "method.local_text_weights=[0, 0, 0]"],
        r"method\.zero_shot=official.*method\.local_text_weights",
    ),
    ("mpma", [f"method.{part}_weight=0" for part in ("image", "report", "global", "local")], "all 0"),
    ("mpma", ["method.temperature=0.7"], r"method\.temperature=0\.7"),
    ("mpma", ["method.image_mask_ratio=0"], r"method\.image_mask_ratio=0.*method\.image_weight=0"),
    ("mpma", ["method.text_mask_ratio=0"], r"method\.text_mask_ratio=0.*method\.report_weight=0"),
    ("mpma", ["method.decoder_heads=5"], r"method\.decoder_heads=5"),
    ("mpma", [MASKS, "method.global_weight=0"], r"method\.global_weight"),
    ("medslip", [], r"text\.frozen=true"),
    ("medslip", ["text.frozen=true", "method.heads=3"], r"method\.heads=3"),
    (
        "medslip",
        ["text.frozen=true", *(f"method.{part}_weight=0" for part in ("existence", "prototype", "relation"))],
        "no loss",
    ),
    ("medslip", ["text.frozen=true", MASKS, CLUSTERS, "prototypes.anchors=[edema]"], "embeds no reports"),
    ("combination", ["method.mgca_weight=0"], r"method\.embeds_with=mgca"),
    (
        "combination",
        [f"method.mgca.{part}_weight=0" for part in ("instance", "token", "prototype")],
        r"method\.mgca\.instance_weight",
    ),
    ("combination", ["method.place.grounding=patch"], r"method\.place\.token_weight"),
    (
        "prior",
        ["prototypes.init=kmeans", "prototypes.init_samples=511", "optimizer.phases=[{epochs: 1, lr: 1e-3}]"],
        r"prototypes\.init_samples=511",
    ),
]


@pytest.mark.parametrize(("name", "keys", "named"), IMPOSSIBLE)
def test_impossible_keys_are_refused_when_they_are_read(name: str, keys: list[str], named: str) -> None:
    overrides = [f"method.name={name}", "data.root=/data", "run.dir=/run", *keys]
    with pytest.raises(ConfigError, match=named):
        config_files.load([], overrides, schemas())


@pytest.mark.parametrize("name", sorted(schemas()))
def test_the_defaults_of_every_method_are_possible(name: str) -> None:
    overrides = [f"method.name={name}", "data.root=/data", "run.dir=/run"]
    frozen = ["text.frozen=true"] if name == "medslip" else []
    assert config_files.load([], [*overrides, *frozen], schemas()).method.name == name


@pytest.mark.parametrize("command", [["config"], ["pretrain", "--nproc", "1"], ["submit", "--dry-run"]])
def test_nothing_starts_and_nothing_is_queued(command: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    keys = [
        "method.name=place",
        *(f"method.{x}_weight=0" for x in ("instance", "observation", "correlation")),
    ]
    more = ["--cluster", "configs/clusters/cpu.yaml"] if command[0] == "submit" else []
    result = CliRunner().invoke(
        app, [command[0], *keys, f"data.root={tmp_path}", f"run.dir={run}", *command[1:], *more]
    )
    assert isinstance(result.exception, ConfigError), result.output
    assert result.exception.exit_code == 2
    assert "no loss is left" in str(result.exception)
    assert not run.exists()


@pytest.mark.parametrize("wrong", ["optimizer.lr=-1", "zero.stage=5", "checkpoint.keep_best=valid/los"])
def test_a_config_without_places_is_checked_too(wrong: str) -> None:
    """Files of `configs/methods` name neither dataset nor run folder."""
    file = "configs/methods/mgca.yaml"
    printed = CliRunner().invoke(app, ["config", file])
    assert printed.exit_code == 0, printed.output
    assert "root: ???" in printed.output
    result = CliRunner().invoke(app, ["config", file, wrong])
    assert isinstance(result.exception, ConfigError), result.output
    assert wrong.split("=")[0] in str(result.exception)
