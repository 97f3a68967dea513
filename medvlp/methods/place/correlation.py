"""Patch tokens conditioned on a report, and a slowly moving projection of patch features."""

from collections.abc import Callable
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medvlp.encoders.decoder import DecoderLayer
from medvlp.encoders.positions import sincos_positions


class ConditionedTokens(NamedTuple):
    """Patches after the report was read (a tuple: ZeRO-3's hooks look inside).

    Attributes:
        conditioned: [B, P, output], not normalised.
        taught: [B, P, width] patch features through the teacher, without gradient; None without one.
        control: [B, P, output] as `conditioned`, without gradient, from the reports of other samples and with
            the same dropped patches; None where none were named.
    """

    conditioned: Tensor
    taught: Tensor | None = None
    control: Tensor | None = None


class ConditionedPatches(nn.Module):
    """Patches attend to the words of their report; a head maps each to the space where they are compared.

    PLACE's cross-modal correlation exploration "predicts patch-level covariance conditioned on reports" (the
    abstract's words); the layers are our reconstruction.

    Args:
        patch_width, word_width: of the inputs; width: inside; output: of the result.
        layers: cross-attention layers, each with a feed-forward part; heads: of each.
        drop: share of the patches (drawn for each image from torch's default generator, in training only)
            whose token is replaced by a learned one with its position before the first layer, so that
            their correlations must come from the report. The image encoder sees the whole image.
        teacher_momentum: keep a moving average of the projection of the patches with this momentum; None:
            there is no teacher.
    """

    def __init__(
        self,
        patch_width: int,
        word_width: int,
        width: int,
        output: int,
        layers: int,
        heads: int,
        drop: float = 0.0,
        teacher_momentum: float | None = None,
    ) -> None:
        super().__init__()
        self.drop = drop
        self.mask_token = nn.Parameter(torch.zeros(width)) if drop > 0 else None
        self.word_norm = nn.LayerNorm(word_width)
        self.layers = nn.ModuleList(
            DecoderLayer(width, word_width, heads, self_attention=False) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, output))
        self.patches: nn.Linear = (
            nn.Linear(patch_width, width)
            if teacher_momentum is None
            else TaughtProjection(patch_width, width, teacher_momentum)
        )

    def new_step(self) -> None:
        """An optimiser step begins: the next call in training moves the teacher once."""
        if isinstance(self.patches, TaughtProjection):
            self.patches.due = True

    def forward(
        self,
        patches: Tensor,
        grid: tuple[int, int],
        words: Tensor,
        valid: Tensor,
        others: Tensor | None = None,
    ) -> ConditionedTokens:
        """Conditioned patches.

        Args:
            patches: [B, P, patch_width]. grid: (rows, columns), P = rows * columns.
            words: [B, L, word_width] hidden states of the tokens; valid: [B, L] bool, tokens that are no
                padding. The first always takes part, so that a report of nothing but padding stays finite.
            others: [B] int64, row of the report that each sample's patches read in the control.
        """
        tokens = self.patches(patches)
        taught = self.patches.teach(patches) if isinstance(self.patches, TaughtProjection) else None
        if self.mask_token is not None and self.training:
            dropped = torch.rand(tokens.shape[:2], device=tokens.device) < self.drop
            positions = sincos_positions(grid, tokens.shape[2], tokens.device)
            token = self.mask_token + positions.to(tokens.dtype)
            tokens = torch.where(dropped[:, :, None], token, tokens)
        memory = self.word_norm(words)
        valid = valid | (torch.arange(valid.shape[1], device=valid.device) == 0)
        control = None
        if others is not None:
            with torch.no_grad():
                control = self._condition(tokens, memory[others], valid[others])
        return ConditionedTokens(self._condition(tokens, memory, valid), taught, control)

    def _condition(self, tokens: Tensor, memory: Tensor, valid: Tensor) -> Tensor:
        for layer in self.layers:
            tokens, _ = layer(tokens, memory, valid)
        conditioned: Tensor = self.head(self.norm(tokens))
        return conditioned


class TaughtProjection(nn.Linear):
    """A linear layer that also keeps an exponential moving average of its weight: a teacher.

    The average is a buffer that the layer itself moves, from its own weight and inside its own call: there
    the weight is whole under every ZeRO stage, equal on all ranks, and what a resumed run has too. It stays
    float32 when the module becomes half precision (0.996 times a bfloat16 number plus a small change is
    mostly the same number).

    Attributes:
        due: whether the next call in training moves the average (set once for each optimiser step, so that
            accumulation moves it once).

    Args:
        width, output: of the layer. momentum: share of the average that stays at each step.
    """

    teacher_weight: Tensor

    def __init__(self, width: int, output: int, momentum: float) -> None:
        super().__init__(width, output)
        self.momentum = momentum
        self.due = False
        self.register_buffer("teacher_weight", self.weight.detach().clone())

    def forward(self, input: Tensor) -> Tensor:
        if self.due and self.training:
            self.due = False
            with torch.no_grad():
                self.teacher_weight.lerp_(self.weight.to(self.teacher_weight.dtype), 1 - self.momentum)
        return super().forward(input)

    @torch.no_grad()
    def teach(self, input: Tensor) -> Tensor:
        """[..., width] -> [..., output] through the average (without bias), without gradient."""
        return F.linear(input.to(self.teacher_weight.dtype), self.teacher_weight)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kept = self.teacher_weight
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.teacher_weight.dtype in (torch.float16, torch.bfloat16):
            self.teacher_weight = kept.to(self.teacher_weight.device).float()
        return self
