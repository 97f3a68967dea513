"""The report decoder: patch tokens of an image -> words, by beam search.

Layers, cache and beam search are those of transformers (BART's layers, `generate`), randomly drawn. R2Gen's
shape (3 + 3 layers, width 512) without its relational memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import BartConfig, GenerationConfig, GenerationMixin
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput
from transformers.models.bart.modeling_bart import BartDecoder, BartEncoderLayer, BartPreTrainedModel


class PatchEncoder(nn.Module):
    """[B, P, W] patch tokens -> [B, P, D]: a projection, a learned place of each patch, and plain layers.

    Args:
        config: of the decoder. width: W. patches: P.
    """

    main_input_name = "patches"  # `generate` asks for it

    def __init__(self, config: Any, width: int, patches: int) -> None:
        super().__init__()
        self.project = nn.Linear(width, config.d_model)
        self.places = nn.Embedding(patches, config.d_model)
        self.norm = nn.LayerNorm(config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(BartEncoderLayer(config) for _ in range(config.encoder_layers))

    def forward(self, patches: Tensor) -> BaseModelOutput:
        """Encode the patches of B images."""
        places = self.places(torch.arange(patches.shape[1], device=patches.device))
        hidden = self.dropout(self.norm(self.project(patches) + places))
        for layer in self.layers:
            hidden = layer(hidden, None)
        return BaseModelOutput(last_hidden_state=hidden)


class ReportDecoder(BartPreTrainedModel, GenerationMixin):  # type: ignore[no-untyped-call]
    """An encoder-decoder as `generate` needs it; see the module.

    Args:
        patch_width: W of the patch tokens. patches: P, their number.
        vocabulary: number of words. pad, bos, eos: ids of three different words.
        max_words: longest report, with what ends it.
        width, layers, heads, hidden, dropout: of encoder and decoder each.
        beams: of the search.
    """

    main_input_name = "patches"

    def __init__(
        self,
        patch_width: int,
        patches: int,
        vocabulary: int,
        pad: int,
        bos: int,
        eos: int,
        max_words: int,
        width: int = 512,
        layers: int = 3,
        heads: int = 8,
        hidden: int = 512,
        dropout: float = 0.1,
        beams: int = 3,
    ) -> None:
        super().__init__(
            BartConfig(
                vocab_size=vocabulary,
                d_model=width,
                encoder_layers=layers,
                decoder_layers=layers,
                encoder_attention_heads=heads,
                decoder_attention_heads=heads,
                encoder_ffn_dim=hidden,
                decoder_ffn_dim=hidden,
                dropout=dropout,
                max_position_embeddings=max_words + 1,
                pad_token_id=pad,
                bos_token_id=bos,
                eos_token_id=eos,
                decoder_start_token_id=bos,
                forced_eos_token_id=None,
                tie_word_embeddings=False,
                # BART's 0.02 is made for width 1024: a narrow decoder drawn so hardly sees the image. R2Gen
                # draws by fan-in and fan-out, which for a square layer is this.
                init_std=width**-0.5,
                is_encoder_decoder=True,
            )
        )
        self.max_words, self.pad, self.eos = max_words, pad, eos
        self.encoder = PatchEncoder(self.config, patch_width, patches)
        self.decoder = BartDecoder(self.config)
        self.words = nn.Linear(width, vocabulary)
        # R2Gen's search: the score is the sum of log-probabilities (1.0, the default of `generate`, divides
        # it by the length), nothing is forbidden to repeat, and it goes on until no beam can win any more.
        self.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
            num_beams=beams,
            length_penalty=0.0 if beams > 1 else None,
            no_repeat_ngram_size=0,
            early_stopping=False,
            do_sample=False,
            max_new_tokens=max_words,
            suppress_tokens=[pad, bos],
            pad_token_id=pad,
            bos_token_id=bos,
            eos_token_id=eos,
            decoder_start_token_id=bos,
        )
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(
        self,
        patches: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        encoder_outputs: BaseModelOutput | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        **ignored: Any,
    ) -> Seq2SeqLMOutput:
        """Logits [B, T, vocabulary] of the word after each of `decoder_input_ids` [B, T].

        Args:
            patches: [B, P, W]; not needed with `encoder_outputs`.
            decoder_input_ids: words so far, `bos` first; with a cache only the newest ones.
            encoder_outputs: of the same images. past_key_values, use_cache: what `generate` keeps.
            ignored: masks that `generate` makes; all patches count, and padding only follows a report.
        """
        if encoder_outputs is None:
            encoder_outputs = self.encoder(patches)
        decoded = self.decoder(
            input_ids=decoder_input_ids,
            encoder_hidden_states=encoder_outputs.last_hidden_state,
            past_key_values=past_key_values,
            use_cache=bool(use_cache),
        )
        return Seq2SeqLMOutput(
            logits=self.words(decoded.last_hidden_state), past_key_values=decoded.past_key_values
        )

    def get_encoder(self, *args: Any, **kwargs: Any) -> PatchEncoder:
        """What makes `encoder_outputs`."""
        return self.encoder

    def write(self, patches: Tensor) -> Tensor:
        """[B, P, W] -> [B, max_words] int64: the most probable reports found, without `bos`, padded.

        Under ZeRO-3 all ranks go on until the last has finished: each pass gathers weights.
        """
        partitioned = any(hasattr(parameter, "ds_id") for parameter in self.parameters())
        encoded = self.encoder(patches)
        write = getattr(self, "generate")  # noqa: B009 - typed for models that are typed
        words: Tensor = write(encoder_outputs=encoded, synced_gpus=partitioned)[:, 1:]
        words = nn.functional.pad(words, (0, self.max_words - words.shape[1]), value=self.eos)
        # `generate` fills up with `eos` where `pad` is 0.
        ends = (words == self.eos).long()
        return words.masked_fill(ends.cumsum(dim=1) - ends > 0, self.pad)
