"""Building transformers text models: from options, a folder or a hub name, changed as the config says."""

import inspect
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from medvlp.config import TextConfig
from medvlp.encoders.backbones import EncoderError, plain_options
from medvlp.hub import hub_reason, quiet_hub

#: Name under which our attention function is registered with transformers.
ATTENTION = "medvlp_sdpa"
#: Embedding rows beyond the tokenizer's tokens that are taken for padding to a round number.
PADDED_ROWS = 127


def _recording_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Fused attention; a module with a list in `recorded` also keeps its first query's probabilities.

    [B, heads, L] float32, detached, before dropout. Costs one row of the attention matrix.
    """
    recorded = getattr(module, "recorded", None)
    if recorded is not None:
        with torch.no_grad():
            scale = options.get("scaling") or query.shape[-1] ** -0.5
            keys = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
            scores = (query[:, :, :1].float() * scale) @ keys.float().transpose(-2, -1)
            if attention_mask is not None:
                row = attention_mask[:, :, :1]
                lowest = torch.finfo(scores.dtype).min
                scores = scores.masked_fill(~row, lowest) if row.dtype == torch.bool else scores + row
            recorded.append((module, scores.softmax(-1)[:, :, 0]))
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


def _mask(*arguments: Any, **options: Any) -> Tensor | None:
    """The boolean mask of fused attention, always made: asking whether it is needed waits for the GPU."""
    options["allow_is_bidirectional_skip"] = False
    return sdpa_mask(*arguments, **options)


AttentionInterface.register(ATTENTION, _recording_attention)
AttentionMaskInterface.register(ATTENTION, _mask)


class NoTokenTypes(nn.Module):
    """Stands in for a token-type embedding and adds nothing."""

    def forward(self, token_types: Tensor) -> Tensor:
        """Return a zero that broadcasts and takes the other summand's type."""
        return torch.zeros((), device=token_types.device)


def create_text_model(config: TextConfig, vocab_size: int) -> PreTrainedModel:
    """The transformers model of the `text` section, without pooling layer.

    Args:
        config: the `text` section.
        vocab_size: number of tokens of the tokenizer.

    Raises:
        EncoderError: unknown model, wrong options, or an embedding that does not fit the tokenizer.
    """
    where = f"text.name={config.name}" if config.name else f"text.model_type={config.model_type}"
    try:
        with quiet_hub():
            settings = _settings(config, vocab_size)
        model_class: Any = transformers.MODEL_MAPPING[type(settings)]
        # The few models without fused attention (DeBERTa) keep their own and expose no attention map.
        fused = getattr(model_class, "_supports_sdpa", False)
        options: dict[str, Any] = {"attn_implementation": ATTENTION if fused else "eager"}
        if "add_pooling_layer" in inspect.signature(model_class.__init__).parameters:
            options["add_pooling_layer"] = False
        if config.name is None:
            settings._attn_implementation = options.pop("attn_implementation")
            model: PreTrainedModel = model_class(settings, **options)
        else:
            with quiet_hub():
                model = model_class.from_pretrained(
                    config.name, config=settings, dtype=torch.float32, **options
                )
    except (ValueError, TypeError, KeyError, OSError, RuntimeError, AttributeError) as error:
        raise EncoderError(f"{where} cannot be built: {hub_reason(error)}") from error
    _check_vocabulary(model, vocab_size, where)
    if config.dropout is not None:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = config.dropout
    if not config.token_types:
        _remove_token_types(model)
    if config.gradient_checkpointing:
        try:
            model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[no-untyped-call]
        except ValueError as error:
            raise EncoderError(f"text.gradient_checkpointing=true: {where} does not support it") from error
    return model


def _settings(config: TextConfig, vocab_size: int) -> PreTrainedConfig:
    changes = plain_options(config.options)
    if config.name is None:
        settings = transformers.AutoConfig.for_model(config.model_type)
    else:
        settings = transformers.AutoConfig.from_pretrained(config.name, trust_remote_code=False)
    known = settings.to_dict()
    for name in changes:
        if name not in known and name not in settings.attribute_map:
            raise EncoderError(f"text.options.{name} is no config argument of {settings.model_type} models")
    if config.name is None:
        # Built anew, because some configs derive other values from these.
        settings = transformers.AutoConfig.for_model(
            config.model_type, **{"vocab_size": vocab_size, **changes}
        )
    else:
        for name, value in changes.items():
            setattr(settings, name, value)
    if config.layers is not None:
        if not 1 <= config.layers <= settings.num_hidden_layers:
            raise EncoderError(
                f"text.layers={config.layers} is outside 1..{settings.num_hidden_layers}, the model's layers"
            )
        settings.num_hidden_layers = config.layers
    if config.dropout is not None:
        for name, value in known.items():
            # `classifier_dropout` and the like may be None; attention functions read the number at call time.
            if "dropout" in name and isinstance(value, float | int) and not isinstance(value, bool):
                setattr(settings, name, config.dropout)
    return settings


def _check_vocabulary(model: PreTrainedModel, vocab_size: int, where: str) -> None:
    embeddings: Any = model.get_input_embeddings()
    rows = embeddings.num_embeddings
    if not vocab_size <= rows <= vocab_size + PADDED_ROWS:
        raise EncoderError(
            f"{where} embeds {rows} tokens but the tokenizer has {vocab_size}: "
            "set data.tokenizer to the tokenizer the text model was made with"
        )


def _remove_token_types(model: nn.Module) -> None:
    for module in list(model.modules()):
        if isinstance(getattr(module, "token_type_embeddings", None), nn.Embedding):
            module.token_type_embeddings = NoTokenTypes()
