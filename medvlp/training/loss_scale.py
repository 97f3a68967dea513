"""The loss scale of fp16: DeepSpeed's, with what 0.19.8 gets wrong about it put right."""

import sys
from typing import Any

#: What the scalers remember (under the same names at every ZeRO stage).
_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class LossScale:
    """The scale of one optimiser, between and around its steps.

    DeepSpeed halves it at a gradient that is not finite. Different from DeepSpeed:

    - It doubles after a step and not inside it: there the gradient would be divided by the new scale, which
      makes it half of what it is.
    - A step refused for its loss (`restore`) leaves it as it was: the loss is not the scale's fault.
    - At its minimum it stays; `medvlp.training.bad_steps` counts the steps that fail there.

    Args:
        optimizer: DeepSpeed's, in fp16.
    """

    def __init__(self, optimizer: Any) -> None:
        names = ("loss_scale_config", "loss_scaler")
        self._scaler: Any = next(getattr(optimizer, name) for name in names if hasattr(optimizer, name))
        dynamic = getattr(self._scaler, "dynamic", getattr(self._scaler, "dynamic_loss_scale", False))
        self._window = int(self._scaler.scale_window) if dynamic else 0
        if dynamic:
            self._scaler.scale_window = sys.maxsize
        if hasattr(self._scaler, "raise_error_at_min_scale"):
            self._scaler.raise_error_at_min_scale = False
        self._before = self.state_dict()

    @property
    def value(self) -> float:
        """What the loss is multiplied by."""
        return float(self._scaler.cur_scale)

    @property
    def value_before(self) -> float:
        """What the loss of the last step was multiplied by."""
        return float(self._before["cur_scale"])

    @property
    def could_fall(self) -> bool:
        """Whether a smaller scale than that of the last step was left to try."""
        least = getattr(self._scaler, "min_scale", getattr(self._scaler, "min_loss_scale", None))
        return self._window > 0 and least is not None and self.value_before > least

    def begin(self) -> None:
        """Remember the state before the optimiser's step."""
        self._before = self.state_dict()

    def end(self, applied: bool) -> None:
        """Double after `loss_scale_window` steps without an overflow; `applied`: the step was made."""
        if not (applied and self._window):
            return
        steps = self._scaler.cur_iter - self._scaler.last_overflow_iter - 2
        if steps > 0 and steps % self._window == 0:
            self._scaler.cur_scale *= self._scaler.scale_factor
            if hasattr(self._scaler, "cur_hysteresis"):
                self._scaler.cur_hysteresis = self._scaler.delayed_shift

    def restore(self) -> None:
        """Be as before the last step."""
        self.load_state_dict(self._before)

    def state_dict(self) -> dict[str, Any]:
        """Plain values, the same on all ranks."""
        return {name: getattr(self._scaler, name) for name in _STATE if hasattr(self._scaler, name)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`; what another stage's scaler does not know is left out."""
        for name, value in state.items():
            if hasattr(self._scaler, name):
                setattr(self._scaler, name, value)
