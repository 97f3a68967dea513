"""Text backbones: any transformers text model behind one interface."""

import inspect
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medvlp.config import TextConfig
from medvlp.data.batch import Text
from medvlp.encoders.backbones import EncoderError
from medvlp.encoders.text_model import create_text_model


class TextFeatures(NamedTuple):
    """What a text backbone returns (a tuple: ZeRO-3's hooks look inside).

    Attributes:
        hidden: [B, L, D] hidden states of the last layer, in the type of the parameters.
        cls_attention: [B, L] float32 last-layer attention from the first token ([CLS]) to every token,
            mean over heads, before dropout, detached; 0 on padding. None when it was not asked for.
    """

    hidden: Tensor
    cls_attention: Tensor | None = None


class TextEncoder(nn.Module):
    """A transformers model as a backbone.

    Attributes:
        width: D. max_tokens: the longest text its positions reach, or None without a limit.
        has_attention: whether `forward(..., attention=True)` works (the model uses transformers'
            attention interface; nearly all do).

    Args:
        config: the `text` section.
        vocab_size: number of tokens of the tokenizer.

    Raises:
        EncoderError: the model cannot be built, does not fit the tokenizer or is no text encoder.
    """

    def __init__(self, config: TextConfig, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.model: Any = create_text_model(config, vocab_size)
        accepted = inspect.signature(self.model.forward).parameters
        if not config.positions and "position_ids" not in accepted:
            raise EncoderError(f"text.positions=false: {self._name()} takes no position ids")
        if config.frozen:
            self.model.requires_grad_(False)
        self.train(self.training)
        self.width, last_attention = self._probe()
        self.has_attention = last_attention is not None
        # In a tuple, because a module attribute would appear a second time in the state dict.
        self._last_attention = (last_attention,)
        self.max_tokens = self._position_limit()

    def forward(self, text: Text, attention: bool = False) -> TextFeatures:
        """Hidden states of tokenised texts.

        Args:
            text: the tokens; only `input_ids` and `attention_mask` are read. The first token always
                takes part, so that a text of nothing but padding gives finite features.
            attention: also return the last layer's attention from the first token. All layers keep fused
                attention; only this one row is computed besides.

        Raises:
            EncoderError: texts longer than the model's positions, or no attention to return.
        """
        return self._features(text, attention=attention)

    def check_length(self, text: Text) -> None:
        """Refuse texts longer than the model's positions (`EncoderError`)."""
        length = text.input_ids.shape[1]
        if self.max_tokens is not None and length > self.max_tokens:
            raise EncoderError(
                f"{self._name()} takes {self.max_tokens} tokens, not {length}: lower data.max_tokens"
            )

    def train(self, mode: bool = True) -> Self:
        """As `nn.Module.train`, but a frozen model stays in evaluation mode."""
        super().train(mode)
        if self.config.frozen:
            self.model.eval()
        return self

    def _features(self, text: Text, embedded: Tensor | None = None, attention: bool = False) -> TextFeatures:
        """Hidden states in groups of similar length; `embedded` [B, L, E] stands in for tokens' embeddings.

        What comes out at positions that a group left out is zero, as is their attention.
        """
        self.check_length(text)
        groups = text.groups(self.config.length_groups)
        width = text.input_ids.shape[1]
        if all(length == width for _, length in groups):
            return self._encode(text, embedded, attention)
        # Sorted on the device, cut by what the host knows: equal lengths may fall either way.
        order = text.attention_mask.sum(dim=1).argsort(stable=True)
        encoded: list[TextFeatures] = []
        start = 0
        for size, length in groups:
            chosen = order[start : start + size]
            start += size
            ids, mask, words, sentences = (
                value.index_select(0, chosen)[:, :length] for value in text.tensors().values()
            )
            part = None if embedded is None else embedded.index_select(0, chosen)[:, :length]
            encoded.append(self._encode(Text(ids, mask, words, sentences), part, attention))
        place = order.argsort()
        hidden = torch.cat([F.pad(part.hidden, (0, 0, 0, width - part.hidden.shape[1])) for part in encoded])
        rows_of = [part.cls_attention for part in encoded if part.cls_attention is not None]
        if not rows_of:
            return TextFeatures(hidden.index_select(0, place))
        attended = torch.cat([F.pad(part, (0, width - part.shape[1])) for part in rows_of])
        return TextFeatures(hidden.index_select(0, place), attended.index_select(0, place))

    def _encode(self, text: Text, embedded: Tensor | None, attention: bool) -> TextFeatures:
        """One pass through the model."""
        if not attention:
            return TextFeatures(self._hidden(text, embedded))
        last: Any = self._last_attention[0]
        if last is None:
            raise EncoderError(f"{self._name()} does not expose its attention")
        recorded: list[tuple[nn.Module, Tensor]] = []
        last.recorded = recorded
        try:
            hidden = self._hidden(text, embedded)
        finally:
            last.recorded = None
        return TextFeatures(hidden, recorded[-1][1].mean(1))

    def _hidden(self, text: Text, embedded: Tensor | None = None) -> Tensor:
        """[B, L, D] hidden states; `embedded` [B, L, E] stands in for the tokens' embeddings."""
        mask = text.attention_mask.clone()
        mask[:, 0] = 1
        inputs: dict[str, Any] = {"attention_mask": mask}
        if embedded is None:
            inputs["input_ids"] = text.input_ids
        else:
            inputs["inputs_embeds"] = embedded
        if not self.config.positions:
            inputs["position_ids"] = torch.zeros_like(text.input_ids)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.frozen):
            hidden: Tensor = self.model(**inputs).last_hidden_state
        return hidden

    @torch.no_grad()
    def _probe(self) -> tuple[int, nn.Module | None]:
        """Width and last attention module, from one text of two tokens."""
        recorded: list[tuple[nn.Module, Tensor]] = []
        modules: list[Any] = list(self.model.modules())
        for module in modules:
            module.recorded = recorded
        training = self.training
        self.eval()
        tokens = torch.zeros(1, 2, dtype=torch.long)
        try:
            hidden = self._hidden(Text(tokens, torch.ones_like(tokens), tokens, tokens))
        except (RuntimeError, ValueError, TypeError, AttributeError, KeyError) as error:
            raise EncoderError(f"{self._name()} is no text encoder with one token input: {error}") from error
        finally:
            self.train(training)
            for module in modules:
                del module.recorded
        if not isinstance(hidden, Tensor) or hidden.ndim != 3:
            raise EncoderError(f"{self._name()} returns no hidden state of each token")
        return hidden.shape[2], recorded[-1][0] if recorded else None

    def _position_limit(self) -> int | None:
        limit: int | None = getattr(self.model.config, "max_position_embeddings", None)
        if limit is None or not self.config.positions:
            return None
        for name, module in self.model.named_modules():
            # RoBERTa counts its positions from the padding index on.
            if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
                return limit - int(module.padding_idx) - 1
        return limit

    def _name(self) -> str:
        return (
            f"text.name={self.config.name}"
            if self.config.name
            else f"text.model_type={self.config.model_type}"
        )
