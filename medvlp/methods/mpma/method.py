"""MPMA: multi-task paired masking with alignment (IEEE Transactions on Multimedia, 2023), our reconstruction.

The paper's abstract is all that is public. From it: image and report are masked as a pair and reconstructed
jointly; global and local alignment (GLA) gives the reconstruction semantic features; memory-augmented
cross-modal fusion (MA-CMF) brings the image into the report's reconstruction. Everything else, every number
included, is ours, filled from MAE, MRM (ICLR 2023), M3AE (MICCAI 2022) and MGCA.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from medvlp import distributed
from medvlp.config import Config
from medvlp.data.batch import Batch, Text
from medvlp.encoders.backbones import EncoderError
from medvlp.encoders.image import ImageFeatures
from medvlp.encoders.text import TextFeatures
from medvlp.losses.contrastive import are_accuracies_read
from medvlp.losses.parts import parts_of, sums_in_parts
from medvlp.methods.base import DividedMethod, Progress, StepOutput
from medvlp.methods.mpma.alignment import Aligned, GlobalLocalAlignment
from medvlp.methods.mpma.config import MPMAConfig
from medvlp.methods.mpma.decoder import ImageDecoder
from medvlp.methods.mpma.encoders import MaskedImageEncoder, MaskedTextEncoder
from medvlp.methods.mpma.fusion import MemoryFusion
from medvlp.methods.mpma.losses import (
    masked_patch_loss,
    masked_token_loss,
    patch_targets,
    right_tokens,
)
from medvlp.methods.mpma.masking import (
    PATCHES,
    WORDS,
    PatchMask,
    draw_patches,
    draw_words,
    is_word,
    most_scored,
    sample_noise,
    scored_positions,
    visible_patches,
)
from medvlp.methods.pair import build_encoders_of
from medvlp.methods.registry import register
from medvlp.prototypes.false_negatives import NOTHING_EXCLUDED
from medvlp.prototypes.table import PrototypeTable
from medvlp.prototypes.user import PrototypeUser


class PairMasks(NamedTuple):
    """What is hidden of a batch of pairs.

    Attributes:
        patches: visible and hidden patches of each image. words: [B, L] bool, hidden tokens of each report.
    """

    patches: PatchMask
    words: Tensor


class WholePair(NamedTuple):
    """Encodings of unmasked pairs in evaluation mode, without gradient."""

    image: ImageFeatures
    text: TextFeatures


class EncodedViews(NamedTuple):
    """Encodings of a batch by what is seen.

    Attributes:
        masked_image, masked_text: of what is visible, from which the rest is reconstructed.
        whole_image, whole_text: of everything, with separate masking.
        calibration: of everything, in steps in which the heads' running averages move.
    """

    masked_image: ImageFeatures | None = None
    masked_text: TextFeatures | None = None
    whole_image: ImageFeatures | None = None
    whole_text: TextFeatures | None = None
    calibration: WholePair | None = None

    @property
    def image(self) -> ImageFeatures | None:
        """What the alignment compares and the report's reconstruction reads."""
        return self.masked_image if self.whole_image is None else self.whole_image

    @property
    def text(self) -> TextFeatures | None:
        """What the alignment compares and the image's reconstruction reads."""
        return self.masked_text if self.whole_text is None else self.whole_text


class MPMA(DividedMethod, PrototypeUser):
    """One masked pair, encoded once, is reconstructed in both modalities and aligned.

    Masks are drawn anew at each step from (seed, step, sample), the same on every rank layout; in evaluation
    each sample has the same ones at any time.

    Args:
        config: keys of the method.
        image, text: the encoders.
        seed: of the masks.
        longest: tokens that a report has at most.

    Raises:
        EncoderError: widths and heads that do not fit, a word embedding that cannot be tied, or no patch that
            would be hidden.
    """

    def __init__(
        self, config: MPMAConfig, image: MaskedImageEncoder, text: MaskedTextEncoder, seed: int, longest: int
    ) -> None:
        super().__init__()
        self.config, self.seed, self.longest, self.step, self.steps = config, seed, longest, 0, 0
        self.image_encoder, self.text_encoder = image, text
        image.reads_patches = config.summary == "mean" or config.global_weight == 0
        self.decoder: ImageDecoder | None = None
        if config.image_weight:
            ratio, patches = config.image_mask_ratio, image.grid[0] * image.grid[1]
            if visible_patches(patches, ratio) == patches:
                raise EncoderError(f"method.image_mask_ratio={ratio} hides none of {patches} patches")
            self.decoder = ImageDecoder(
                image.local_width,
                image.grid,
                image.patch_side**2,
                config.decoder_width,
                config.decoder_layers,
                config.decoder_heads,
                text.width if config.decoder_reads_report else None,
            )
        self.fusion: MemoryFusion | None = None
        if config.report_weight:
            self.fusion = MemoryFusion(
                text.width,
                image.local_width,
                config.fusion_layers,
                config.fusion_heads,
                config.fusion_hidden,
                config.fusion_dropout,
                config.memory,
                config.memory_slots,
                config.memory_highest,
            )
            self.report_head = _report_head(text, config.tie_words)
            self.vocabulary: int = text.model.get_input_embeddings().num_embeddings
        self.alignment: GlobalLocalAlignment | None = None
        if config.global_weight or config.local_weight:
            self.alignment = GlobalLocalAlignment(config, image.width, image.local_width, text.width)

    @property
    def encoders(self) -> Sequence[nn.Module]:
        return self.image_encoder, self.text_encoder

    def encode(self, batch: Batch) -> EncodedViews:
        """What reconstruction and alignment start from; the masks are those of each sample at this step."""
        masks, paired = self.draw_masks(batch), self.config.masking == "paired"
        masked_image = masked_text = image = text = None
        if paired or self.decoder is not None:
            masked_image = self.image_encoder(batch.image, visible=masks.patches.visible)
        if paired or self.fusion is not None:
            masked_text = self.text_encoder(batch.text, hidden=masks.words)
        if not paired and (self.alignment is not None or self.fusion is not None):
            image = self.image_encoder(batch.image)
        if not paired and (
            self.alignment is not None or (self.decoder is not None and self.decoder.reads_report)
        ):
            text = self.text_encoder(batch.text)
        whole = self._whole_pair(batch) if self._calibrates_now else None
        return EncodedViews(masked_image, masked_text, image, text, whole)

    def losses(
        self, encodings: EncodedViews, batch: Batch, clusters: PrototypeTable | None = None
    ) -> StepOutput:
        """Losses of a batch: "loss/image", "loss/report", "loss/global", "loss/local".

        Terms of weight 0 are left out. Besides the losses: "report/accuracy", share of hidden tokens that
        are predicted (where it is read, see `accuracies_read`), and the alignment's metrics (see
        `GlobalLocalAlignment`, `exclude_false_negatives`).
        """
        config, views = self.config, encodings
        masks = self.draw_masks(batch)
        terms: dict[str, Tensor] = {}
        aligned = Aligned({}, {}, NOTHING_EXCLUDED)
        if self.decoder is not None:
            terms["loss/image"] = self._image_loss(self.decoder, batch, masks, views)
        if self.fusion is not None:
            terms |= self._report_loss(self.fusion, batch, masks, views)
        if self.alignment is not None:
            words = is_word(batch.text)
            if views.calibration is not None:
                self._calibrate(self.alignment, views.calibration, words)
            assert views.image is not None, "images are encoded for the alignment"
            assert views.text is not None, "reports are encoded for the alignment"
            seen = words & ~masks.words if config.masking == "paired" else words
            exclude = partial(self.exclude, batch, clusters, config)
            aligned = self.alignment(views.image, views.text.hidden, seen, exclude)
            terms |= aligned.terms
        weights = {
            "loss/image": config.image_weight,
            "loss/report": config.report_weight,
            "loss/global": config.global_weight,
            "loss/local": config.local_weight,
        }
        loss = torch.stack([weights[name] * terms[name] for name in weights if name in terms]).sum()
        return StepOutput(loss, terms, aligned.embeddings, aligned.exclusion)

    def draw_masks(self, batch: Batch) -> PairMasks:
        """The masks of a batch at the present step; in evaluation, whose losses are compared, at step 0."""
        rows, columns = self.image_encoder.grid
        length = batch.text.input_ids.shape[1]
        draw = partial(sample_noise, batch.sample, seed=self.seed, step=self.step if self.training else 0)
        return PairMasks(
            draw_patches(draw(rows * columns, stream=PATCHES), self.config.image_mask_ratio),
            draw_words(batch.text, draw(length, stream=WORDS), self.config.text_mask_ratio),
        )

    def on_progress(self, progress: Progress) -> None:
        """Every step has masks of its own."""
        self.step, self.steps = progress.step, progress.steps

    @property
    def service_user(self) -> PrototypeUser:
        return self

    def encode_image(self, image: Tensor) -> Tensor:
        return self._global_alignment().embed_image(self.image_encoder(image)).float()

    def encode_text(self, text: Text) -> Tensor:
        alignment = self._global_alignment()
        return alignment.embed_report(self.text_encoder(text).hidden, is_word(text)).float()

    @property
    def embeds_images(self) -> bool:
        return self.config.global_weight > 0

    @property
    def embeds_reports(self) -> bool:
        return self.config.global_weight > 0

    def embedding_width(self) -> int | None:
        """Embeddings of what the masks leave visible."""
        return self.config.embedding if self.config.global_weight > 0 else None

    def image_features(self, image: Tensor) -> Tensor:
        return self.image_encoder.summary(self.image_encoder(image))

    @property
    def grounds(self) -> bool:
        return self.alignment is not None and self.config.local_weight > 0

    def ground(self, image: Tensor, prompts: Text) -> Tensor:
        """Mean cosine of the prompts' words with every patch, in [-1, 1] (see `Method.ground`)."""
        if self.alignment is None or not self.grounds:
            raise NotImplementedError("method.local_weight=0: MPMA without local alignment does not ground")
        features: ImageFeatures = self.image_encoder(image)
        hidden = self.text_encoder(prompts).hidden
        maps = self.alignment.ground(features, hidden, is_word(prompts)).float()
        return maps.reshape(*maps.shape[:2], *features.grid)

    @property
    def fuses(self) -> bool:
        return self.fusion is not None

    def fused_features(self, image: Tensor, text: Text, image_of: Tensor) -> Tensor:
        """Fused [CLS], and those of `image_features` (see `Method.fused_features`)."""
        if self.fusion is None:
            raise NotImplementedError("method.report_weight=0: MPMA without reports to fuse")
        features: ImageFeatures = self.image_encoder(image)
        tokens = _tokens(features)[image_of]
        fused = self.fusion(self.text_encoder(text).hidden, tokens, text.attention_mask > 0)
        return torch.cat([fused[:, 0], self.image_encoder.summary(features)[image_of]], dim=1)

    @property
    def fills_words(self) -> bool:
        return self.fusion is not None

    def fill_words(self, image: Tensor, text: Text, hidden: Tensor) -> Tensor:
        """As in training, but from the whole image (see `Method.fill_words`)."""
        if self.fusion is None:
            raise NotImplementedError("method.report_weight=0: MPMA without reports to fill in")
        features: ImageFeatures = self.image_encoder(image)
        report = self.text_encoder(text, hidden=hidden).hidden
        fused = self.fusion(report, _tokens(features), text.attention_mask > 0)
        filled = text.input_ids.clone()
        # Logits over the vocabulary of the hidden places alone.
        filled[hidden] = self.report_head(fused[hidden]).argmax(dim=1)
        return filled

    def parameters_without_decay(self) -> set[str]:
        """The temperature's parameter."""
        return {name for name, _ in self.named_parameters() if name.startswith("alignment.temperature.")}

    @property
    def _calibrates_now(self) -> bool:
        done = self.step + 1  # a run shorter than that is calibrated too, at its end
        due = done % self.config.calibration_steps == 0 or done == self.steps
        return self.training and due and self.alignment is not None and self.alignment.calibrates

    @torch.no_grad()
    def _whole_pair(self, batch: Batch) -> WholePair:
        """Whole pairs, as evaluation sees them."""
        self.image_encoder.eval(), self.text_encoder.eval()
        pair = WholePair(self.image_encoder(batch.image), self.text_encoder(batch.text))
        self.image_encoder.train(), self.text_encoder.train()
        return pair

    @torch.no_grad()
    def _calibrate(self, alignment: GlobalLocalAlignment, pair: WholePair, words: Tensor) -> None:
        """Move the heads' running averages by a pass over whole pairs."""
        passes = -(-(self.step + 1) // self.config.calibration_steps)
        alignment.calibrate(pair.image, pair.text.hidden, words, passes)

    def _image_loss(
        self, decoder: ImageDecoder, batch: Batch, masks: PairMasks, views: EncodedViews
    ) -> Tensor:
        encoder = self.image_encoder
        gray = encoder.normalise(batch.image).mean(1, keepdim=True)
        targets = patch_targets(gray, encoder.patch_side, self.config.normalise_pixels)
        assert views.masked_image is not None, "masked images are encoded for the decoder"
        report: tuple[Any, ...] = ()
        if decoder.reads_report:
            assert views.text is not None, "reports are encoded for a decoder that reads them"
            mask = batch.text.attention_mask > 0
            mask[:, 0] = True
            report = (views.text.hidden, mask)
        predicted = decoder(_tokens(views.masked_image), masks.patches, *report)
        return masked_patch_loss(predicted, targets, masks.patches.hidden)

    def _report_loss(
        self, fusion: MemoryFusion, batch: Batch, masks: PairMasks, views: EncodedViews
    ) -> dict[str, Tensor]:
        assert views.masked_text is not None, "masked reports are encoded for the fusion"
        assert views.image is not None, "images are encoded for the fusion"
        text = batch.text
        fused = fusion(views.masked_text.hidden, _tokens(views.image), text.attention_mask > 0)
        places, scored = scored_positions(text, masks.words, self.config.text_mask_ratio)
        chosen, tokens = fused.flatten(0, 1).index_select(0, places), text.input_ids.flatten()[places]
        count = distributed.sum_over_ranks(scored.sum().float()) / distributed.world_size()

        read = are_accuracies_read()  # here: parts run again in the backward pass

        def part(chosen: Tensor, tokens: Tensor, scored: Tensor) -> tuple[Tensor, ...]:
            logits = self.report_head(chosen)
            loss = masked_token_loss(logits, tokens, scored, count)
            return (loss, right_tokens(logits.detach(), tokens, scored)) if read else (loss,)

        # As many on every rank, whatever its reports: with ZeRO-3 each part gathers the head's weights.
        most = most_scored(self.longest, self.config.text_mask_ratio) * self.vocabulary
        number = len(parts_of(len(fused), most, self.config.loss_memory))
        sums = sums_in_parts(part, (chosen, tokens, scored), number)
        terms = {"loss/report": sums[0]}
        return terms | ({"report/accuracy": sums[1] / scored.sum().clamp(min=1)} if read else {})

    def _global_alignment(self) -> GlobalLocalAlignment:
        if self.alignment is None or not self.config.global_weight:
            raise NotImplementedError("method.global_weight=0: MPMA without a shared embedding space")
        return self.alignment


def _tokens(image: ImageFeatures) -> Tensor:
    """[B, 1 + P, D] pooled feature and patches."""
    return torch.cat([image.pooled[:, None], image.local], dim=1)


def _report_head(text: MaskedTextEncoder, tied: bool) -> nn.Sequential:
    embedding: Any = text.model.get_input_embeddings()
    width = text.width
    last = nn.Linear(width, embedding.num_embeddings)
    if tied:
        if embedding.embedding_dim != width:
            raise EncoderError(
                f"method.tie_words=true: the text model embeds tokens at width {embedding.embedding_dim}, "
                f"its hidden states have {width}"
            )
        last.weight = embedding.weight
    return nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width), last)


@register("mpma", MPMAConfig)
def build(config: Config, vocab_size: int) -> MPMA:
    """MPMA as the config describes it (see `medvlp.methods.registry.build_method`).

    Raises:
        EncoderError: see `MPMA`, `MaskedImageEncoder` and `MaskedTextEncoder`.
    """
    method: MPMAConfig = config.method  # type: ignore[assignment]
    image, text = build_encoders_of(
        partial(MaskedImageEncoder, fixed_positions=method.fixed_positions),
        partial(MaskedTextEncoder, mask_token=method.mask_token),
        config,
        vocab_size,
    )
    return MPMA(method, image, text, config.train.seed, config.data.max_tokens)
