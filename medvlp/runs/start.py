"""Beginning a training with the weights of another run (`train.start`)."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import safetensors
from torch import Tensor, nn

from medvlp.config import Config
from medvlp.data.text import Tokenizer
from medvlp.methods.base import Method
from medvlp.runs import saved_run
from medvlp.runs.agreement import together
from medvlp.runs.errors import CheckpointError
from medvlp.runs.identity import IdentityError, RunIdentity, check_tokenizer
from medvlp.runs.saved_run import SavedRun

logger = logging.getLogger(__name__)

#: Where every method keeps the weights of its encoders.
ENCODERS = {"image encoder": "image_encoder.backbone.", "text encoder": "text_encoder.model."}

#: Of the origin of imported weights, what a run keeps that begins with them.
_TOLD = ("title", "file", "sha256", "licence")


@dataclass(frozen=True)
class Start:
    """The run whose weights a training begins with."""

    source: SavedRun

    @classmethod
    def of(cls, config: Config) -> Start | None:
        """What `train.start` names; None where it names nothing. All ranks call this together.

        Raises:
            RunFolderError, CheckpointError: it is no run or checkpoint folder, or is damaged.
        """
        return None if config.train.start is None else cls(saved_run.locate(Path(config.train.start)))

    @property
    def weights(self) -> str:
        """Checksum of the weights."""
        return self.source.weights

    @property
    def origin(self) -> dict[str, str]:
        """See `RunIdentity.start_origin`."""
        name = self.source.run.resolve().name
        if self.source.stored is None:
            return {"run": name}
        identity = self.source.stored[0]
        known = identity.origin or identity.start_origin
        return {key: known[key] for key in _TOLD if key in known} | {"run": name}

    def tokenizer(self, config: Config) -> Tokenizer:
        """The start's tokenizer, whose ids its text encoder knows.

        Raises:
            IdentityError: none is stored with it, or `data.tokenizer` names another one.
        """
        if self.source.stored is None:
            raise IdentityError(
                f"train.start={config.train.start} was made by a version that stored no tokenizer: resume it "
                "once with this one"
            )
        identity, tokenizer = self.source.stored
        check_tokenizer(tokenizer, identity, config.data.tokenizer, str(self.source.run))
        return tokenizer

    def weights_into(self, method: Method, config: Config) -> None:
        """Load all weights of the same method, or the encoders that a start of another method has.

        Raises:
            CheckpointError: names or shapes differ from those of this config; names the first.
        """
        name = saved_run.load_config(self.source, [], reads_data=False).method.name
        if name == config.method.name:
            self.source.checkpoint.weights_into(method)
            logger.info("all weights start from %s", self.source.checkpoint)
            return
        found = []
        for part, prefix in ENCODERS.items():
            weights = self._below(prefix)
            wanted = {key: value for key, value in method.state_dict().items() if key.startswith(prefix)}
            if not weights or not wanted:
                continue
            weights = _read_by(method.get_submodule(prefix.partition(".")[0]), prefix, weights, wanted.keys())
            for key in sorted(weights.keys() | wanted.keys()):
                shapes = [tuple(of[key].shape) if key in of else None for of in (weights, wanted)]
                if shapes[0] != shapes[1]:
                    raise CheckpointError(
                        f"train.start={config.train.start}: its {part} is another one: {key} is {shapes[0]} "
                        f"there and {shapes[1]} in this config; take over the sections image and text of its "
                        "config.yaml"
                    )
            method.load_state_dict(weights, strict=False)
            found.append(part)
        if not found:
            raise CheckpointError(
                f"train.start={config.train.start} is of the method {name}, and has no encoder that "
                f"{config.method.name} has"
            )
        logger.info("%s start from %s, the rest at random", " and ".join(found), self.source.checkpoint)

    def _below(self, prefix: str) -> dict[str, Tensor]:
        path = self.source.checkpoint.weights
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
                return {name: file.get_tensor(name) for name in names}
        except (OSError, safetensors.SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read ({error})") from error


def _read_by(
    encoder: nn.Module, prefix: str, weights: dict[str, Tensor], wanted: Collection[str]
) -> dict[str, Tensor]:
    """Weights without those of later stages and of a pool that an image encoder has removed.

    They come from a method that reads them, or from a whole backbone; this one reads patches only.
    """
    if not getattr(encoder, "reads_patches", False):
        return weights
    removed = prefix if getattr(encoder, "shortened", False) else f"{prefix}attn_pool."
    return {key: value for key, value in weights.items() if key in wanted or not key.startswith(removed)}


def begin_again(method: Method, config: Config, identity: RunIdentity | None) -> None:
    """Give a network built anew the weights that the run's training began with, where they were a run's.

    All ranks call this together.

    Raises:
        IdentityError: `train.start` names other weights today or none, or cannot be read.
    """
    try:
        start = Start.of(config)
    except CheckpointError as error:
        raise IdentityError(f"the network before training needs train.start ({error})") from error
    then = None if identity is None else identity.start.get("run")
    if then is not None and (start is None or then != start.weights):
        raise IdentityError(
            f"train.start={config.train.start or 'null'} does not hold the weights that the run was started "
            "from, so the network before training cannot stand beside it: give them with train.start=PATH"
        )
    if start is not None:
        together(partial(start.weights_into, method, config))
