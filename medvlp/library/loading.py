"""A model from a run folder, a checkpoint folder, or an export."""

import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from medvlp import config_files
from medvlp.config import Config
from medvlp.data.cache import open_reader
from medvlp.data.text import Tokenizer
from medvlp.evaluation import task as tasks
from medvlp.evaluation.heads.objective import SupervisedObjective
from medvlp.evaluation.supervised import Network, task_of
from medvlp.methods.base import Method
from medvlp.methods.registry import build_method, schemas
from medvlp.runs import saved_run
from medvlp.runs.identity import STORED_SIDE, WINDOW
from medvlp.runs.manifest import EXPORTED_HEADS
from medvlp.runs.run_folder import CONFIG
from medvlp.runs.saved_run import SavedRun
from medvlp.trust import KEYS
from shards.dicom_windows import Window
from shards.errors import MedvlpError

logger = logging.getLogger(__name__)

#: Of an export: folder -> where its weights stand in the method.
PARTS = {"image": "image_encoder.backbone.", "text": "text_encoder.model."}


class LoadError(MedvlpError):
    """An export cannot be loaded as a model; the message says what is missing."""

    exit_code = 4


@dataclass(frozen=True)
class Loaded:
    """A method in evaluation mode on the CPU, with what it was made from.

    Attributes:
        name: of the run. stored: side of the square images are stored in before the view is cut.
        window: of DICOM films; None: the run does not say which it has learned from.
        objective: of a run that has learned a downstream task, with its head; the method is its part.
        moved: that training has changed the method itself, not the head alone.
    """

    name: str
    config: Config
    tokenizer: Tokenizer
    method: Method
    stored: int
    window: Window | None
    objective: SupervisedObjective | None = None
    moved: bool = False


def read_model(place: Path) -> Loaded:
    """Load what `place` holds; checksums of a checkpoint are verified, no code is run.

    Args:
        place: run folder (its newest good checkpoint; of a downstream task the best one, and the dataset it
            learned from must be at its place), checkpoint folder, or folder of `medvlp export`.

    Raises:
        MedvlpError: it is none of them, is damaged, or names models beyond itself.
    """
    if (place / EXPORTED_HEADS).is_file():
        return _read_export(place)
    source = saved_run.locate(place)
    config = saved_run.load_config(source, [], reads_data=False)
    tokenizer = saved_run.load_tokenizer(source, config)
    objective, moved = None, False
    if config.task is None:
        method = saved_run.load_method(source, config, tokenizer)
    else:
        objective = _read_objective(place, source, tokenizer)
        method, moved = objective.method, _moves_method(objective)
    stored = saved_run.stored_side(source, config)
    window = saved_run.dicom_window(source)
    return Loaded(source.name(config), config, tokenizer, method, stored, window, objective, moved)


def _read_objective(place: Path, source: SavedRun, tokenizer: Tokenizer) -> SupervisedObjective:
    """The head of a downstream task on its network."""
    config = saved_run.load_config(source, [], tasks=tasks.schemas())
    config.run.dir = str(source.run)  # the folder may have been moved
    is_run = (place / CONFIG).is_file()
    network = Network.of(config) if is_run else Network(task_of(config), config, source)
    reader = open_reader(config.data)
    saved_run.check_data(network.saved, config, reader.index, False, logger.info)
    return network.objective(reader, tokenizer).eval()


def _moves_method(objective: SupervisedObjective) -> bool:
    """Whether teaching this head changes the method below it: its weights, or what its batch norms have seen.

    An encoder without trained weights may still follow the batches (`frozen_bn=train`).
    """
    objective.train()
    moved = any(parameter.requires_grad for parameter in objective.method.parameters()) or any(
        part.training and getattr(part, "running_mean", None) is not None
        for part in objective.method.modules()
    )
    objective.eval()
    return moved


def _read_export(folder: Path) -> Loaded:
    overrides = ["data.root=unknown"]
    own = config_files.RunFile(folder / CONFIG, folder)
    config = config_files.load([own], overrides, schemas(), KEYS)
    if not (folder / "text").is_dir():
        raise LoadError(
            f"{folder} has no text/, so it holds no tokenizer: load the run it was exported from instead"
        )
    tokenizer = Tokenizer.load(str(folder / "text"), ".")
    # Both encoders as they lie here; what they were made from at the start of training is not looked up.
    config.image.name, config.image.pretrained, config.image.weights = (
        f"local-dir:{folder / 'image'}",
        True,
        None,
    )
    config.image.options = {}
    config.text.name, config.text.layers, config.text.options = str(folder / "text"), None, {}
    method = build_method(config, tokenizer.vocab_size)
    method.prepare(tokenizer)
    weights = _weights(folder)
    expected = method.state_dict()
    extra = [
        name for name in weights if name not in expected and not name.endswith("token_type_embeddings.weight")
    ]
    missing = [name for name in expected if name not in weights]
    if extra or missing:
        what = f"{missing[0]} is missing" if missing else f"{extra[0]} is too much"
        raise LoadError(f"{folder} does not fit its {CONFIG}: {what}; export the run again")
    method.load_state_dict({name: weights[name] for name in expected}, strict=True)
    name = config.run.name or folder.resolve().name
    return Loaded(name, config, tokenizer, method.eval(), *_seen_by(folder))


def _seen_by(folder: Path) -> tuple[int, Window | None]:
    """What `saved_run.stored_side` and `dicom_window` said of the run."""
    try:
        with safe_open(folder / EXPORTED_HEADS, "pt") as file:
            header = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise LoadError(f"{folder} cannot be read as an export ({error}); export the run again") from error
    said, window = header.get(STORED_SIDE, ""), header.get(WINDOW)
    if window is not None and window not in get_args(Window):
        raise LoadError(f"{folder / EXPORTED_HEADS} names no way to show DICOM films: export the run again")
    if not re.fullmatch("[1-9][0-9]{0,3}", said):
        raise LoadError(
            f"{folder / EXPORTED_HEADS} does not say which part of an image the network sees (an export of "
            "an earlier version): export the run again"
        )
    return int(said), window


def _weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of an export under their names in the method."""
    try:
        weights = safetensors.torch.load_file(folder / EXPORTED_HEADS)
        for part, prefix in PARTS.items():
            found = safetensors.torch.load_file(folder / part / "model.safetensors")
            weights |= {f"{prefix}{name}": value for name, value in found.items()}
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise LoadError(f"{folder} cannot be read as an export ({error}); export the run again") from error
    return weights
