"""Starts learned prototypes anew that hardly anything is near to (`prototypes.revive_below`)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from medvlp import distributed
from medvlp.config import PrototypesConfig
from medvlp.config_files import ConfigError
from medvlp.prototypes.sampling import mixed_seed
from medvlp.prototypes.usage import CountedPrototypes, revived_rows
from medvlp.training.callbacks import Callback, StepRecord
from medvlp.training.engine import Engine

#: Uses for each prototype, on average, before any is called unused: fewer are left out by chance.
_ENOUGH = 10


class PrototypeRevival(Callback):
    """Counts the use of every learned bank of a method and, every `refresh_steps` steps, revives rows.

    Uses are counted on the device and reduced over ranks only where rows are about to be revived. A bank
    with fewer than 10 uses for each prototype (frozen, or not yet part of the loss) is left alone and goes
    on counting.

    Args:
        engine: holds the weights.
        config: the `prototypes` section.
        seed: of the run; what is random follows from it, the bank and the step.
        log: takes the number of revived prototypes.

    Raises:
        ConfigError: the method has no learned prototypes.
    """

    name = "prototype_revival"

    def __init__(
        self, engine: Engine, config: PrototypesConfig, seed: int, log: Callable[[dict[str, float]], None]
    ) -> None:
        self.engine, self.config, self.seed, self.log = engine, config, seed, log
        self._banks = {
            name: part
            for name, part in engine.objective.named_modules()
            if isinstance(part, CountedPrototypes) and part.weight.requires_grad
        }
        if not self._banks:
            raise ConfigError(
                f"prototypes.revive_below={config.revive_below}: this method trains no prototypes as "
                "configured; set prototypes.revive_below=0"
            )
        self._usage: dict[str, Tensor] = {}
        for name, bank in self._banks.items():
            prototypes = getattr(bank.weight, "ds_shape", bank.weight.shape)[0]  # sharded at ZeRO-3
            bank.usage = torch.zeros(prototypes, device=engine.device)
            self._usage[name] = torch.zeros_like(bank.usage)

    def on_step(self, record: StepRecord) -> None:
        """Add the uses of a good step; revive when due."""
        for name, bank in self._banks.items():
            assert bank.usage is not None
            if record.applied:
                self._usage[name] += bank.usage
            bank.usage.zero_()
        if record.step % self.config.refresh_steps == 0:
            self.log({"prototypes/revived": float(self._revive(record.step))})

    def _revive(self, step: int) -> int:
        """Revive rows of all banks; how many. A collective."""
        revived = 0
        for number, (name, own) in enumerate(self._usage.items()):
            usage = distributed.sum_over_ranks(own).cpu()
            if usage.mean() < _ENOUGH:
                continue
            own.zero_()
            parameter = f"{name}.weight"
            rows, values = revived_rows(
                self.engine.whole_parameter(parameter),
                usage,
                self.config.revive_below,
                mixed_seed(self.seed, number, step),
            )
            if len(rows):
                self.engine.rewrite_rows(parameter, rows, values)
            revived += len(rows)
        return revived

    def state_dict(self) -> dict[str, Any]:
        """This rank's uses since the last revival."""
        return {name: usage.cpu() for name, usage in self._usage.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `state_dict`; a bank the state does not have (revival was off) starts counting at 0."""
        for name, usage in self._usage.items():
            if name in state:
                usage.copy_(state[name])

    def load_states(self, states: list[dict[str, Any]]) -> None:
        """Rank 0 goes on with what all ranks have counted."""
        if distributed.is_main():
            names = states[0].keys()
            self.load_state_dict({name: torch.stack([s[name] for s in states]).sum(0) for name in names})
