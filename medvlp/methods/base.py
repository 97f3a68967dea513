"""The interface every pre-training method keeps."""

import abc
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from medvlp.data.batch import Batch, Text
from medvlp.data.text import Tokenizer
from medvlp.prototypes.false_negatives import NOTHING_EXCLUDED, Exclusion
from medvlp.prototypes.table import PrototypeTable
from medvlp.prototypes.user import PrototypeUser


class Progress(NamedTuple):
    """Where training stands before an optimiser step.

    Attributes:
        epoch: of the step about to be made, from 0.
        step: finished steps.
        steps: steps of the whole run.
        phase: number of the optimiser phase (`optimizer.phases`) the step belongs to, from 0; always 0
            without phases.
    """

    epoch: int
    step: int
    steps: int
    phase: int = 0


class StepOutput(NamedTuple):
    """What a step returns (a tuple: ZeRO-3's hooks look inside).

    Attributes:
        loss: 0-d, differentiable. The value on each rank is the mean over that rank's rows; the mean over
            ranks equals the single-process value on the concatenated batch wherever the terms are global.
        terms: the terms of the loss and other metrics by name ("loss/instance", "retrieval/top1"), 0-d,
            detached or not. A batch of one sample may have fewer of them than larger ones.
        embeddings: modality ("image", "text") -> [B, D] detached unit-norm float32, for the prototype
            service; {} of methods that it does not serve.
        exclusion: which samples were no negatives of each other.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    embeddings: dict[str, Tensor] = {}  # noqa: RUF012 - nothing writes into it
    exclusion: Exclusion = NOTHING_EXCLUDED

    @property
    def named(self) -> dict[str, Tensor]:
        """ "loss" and the terms."""
        return {"loss": self.loss} | self.terms


def is_metric(term: str) -> bool:
    """Whether a term is no part of the loss: NaN then says that a batch has none, and enters no mean."""
    return "/" in term and "loss" not in term.split("/")


class Objective(nn.Module, abc.ABC):
    """What a run trains: a pre-training method, or the head of a downstream task on a method's encoders.

    It imports no DeepSpeed, no W&B and no files. Every random draw comes from torch's default generators,
    which the checkpoint restores.
    """

    @abc.abstractmethod
    def forward(self, batch: Batch, clusters: PrototypeTable | None = None) -> StepOutput:
        """Loss and terms of this rank's samples.

        Args:
            batch: the samples.
            clusters: those of the prototype service this step may use, the same on all ranks; None until
                there are some, and always for objectives without a `service_user`.
        """

    def on_progress(self, progress: Progress) -> None:
        """Called before every optimiser step."""

    @property
    def loss_variant(self) -> str:
        """Which of its losses the next step takes, where `on_progress` changes from one to another.

        The values of two variants are different quantities: nothing compares them
        (`medvlp.training.step_guard`).
        """
        return ""

    def parameters_without_decay(self) -> set[str]:
        """Names of parameters that never get weight decay, not even with `optimizer.decay_all`.

        A frozen parameter has zero gradients, so that Adam leaves it exactly unchanged unless it decays.
        """
        return set()

    def prepare(self, tokenizer: Tokenizer) -> None:
        """Called once after the build, on the device and before any weights are loaded or sharded.

        For methods that keep encoded texts as buffers. Buffers are saved, so a loaded state replaces them.
        """

    @property
    def prototype_users(self) -> Sequence[PrototypeUser]:
        """The parts whose learned prototypes the trainer starts."""
        return ()

    @property
    def service_user(self) -> PrototypeUser | None:
        """The part whose embeddings the prototype service may cluster; None: it has no use for clusters."""
        return None


class Method(Objective):
    """A pre-training objective with its encoders."""

    @abc.abstractmethod
    def encode_image(self, image: Tensor) -> Tensor:
        """[B, 1, H, W] uint8 images -> [B, D] unit-norm float32 embeddings in the shared space."""

    @abc.abstractmethod
    def encode_text(self, text: Text) -> Tensor:
        """Tokenised texts -> [B, D] unit-norm float32 embeddings in the shared space.

        Raises:
            NotImplementedError: the method embeds no reports (`embeds_reports` is false).
        """

    @abc.abstractmethod
    def image_features(self, image: Tensor) -> Tensor:
        """[B, 1, H, W] uint8 images -> [B, F] backbone features before any projection (linear probes)."""

    @property
    def embeds_images(self) -> bool:
        """Whether `encode_image` works: whether there is a loss that shapes what it gives."""
        return True

    @property
    def embeds_reports(self) -> bool:
        """Whether `encode_text` works; without it there is no retrieval of reports."""
        return True

    @property
    def scores_prompts(self) -> bool:
        """Whether `score` works; without it there is no zero-shot."""
        return self.embeds_images

    @property
    def has_image_features(self) -> bool:
        """Whether `image_features` works; without it there is no probe."""
        return True

    @property
    def scores_by_embedding(self) -> bool:
        """Whether `score` is the dot product of embeddings, so that each side is embedded once."""
        return True

    def score(self, image: Tensor, prompts: Text) -> Tensor:
        """[B, 1, H, W] images and N prompts -> [B, N] scores for zero-shot use (higher is more alike)."""
        return self.encode_image(image) @ self.encode_text(prompts).T

    @property
    def fuses(self) -> bool:
        """Whether `fused_features` works."""
        return False

    def fused_features(self, image: Tensor, text: Text, image_of: Tensor) -> Tensor:
        """Features of image and text together, for multi-modal tasks.

        Args:
            image: [B, 1, H, W] uint8. text: N tokenised texts. image_of: [N] int64, the image of each text.

        Returns:
            [N, T + D]: of the width of text and image encoder together.

        Raises:
            NotImplementedError: the method fuses nothing (`fuses` is false).
        """
        raise NotImplementedError(f"{type(self).__name__} does not fuse image and text")

    @property
    def fills_words(self) -> bool:
        """Whether `fill_words` works."""
        return False

    def fill_words(self, image: Tensor, text: Text, hidden: Tensor) -> Tensor:
        """Fill in hidden words of reports beside their images.

        Args:
            image: [B, 1, H, W] uint8. text: the B reports, whole. hidden: [B, L] bool, the tokens that the
                method may not see; neither [CLS], [SEP] nor padding.

        Returns:
            [B, L] int64: the most probable token at each hidden place, the report's own elsewhere.

        Raises:
            NotImplementedError: the method fills in no words (`fills_words` is false).
        """
        raise NotImplementedError(f"{type(self).__name__} does not fill in words")

    @property
    def grounds(self) -> bool:
        """Whether `ground` works."""
        return False

    def ground(self, image: Tensor, prompts: Text) -> Tensor:
        """Where in the images the prompts are seen.

        Args:
            image: [B, 1, H, W] uint8. prompts: N tokenised texts.

        Returns:
            [B, N, rows, columns] float32 maps on the encoder's grid, higher where a prompt is seen. Their
            range is the method's own: compare inside a map, not between methods.

        Raises:
            NotImplementedError: the method has no such map (`grounds` is false).
        """
        raise NotImplementedError(f"{type(self).__name__} does not ground text in images")


class DividedMethod(Method):
    """A method in two parts: encodings of single samples, and losses on the encodings of a whole batch.

    So divided, exact accumulation (`medvlp.training.accumulation`) can encode micro-batch by micro-batch and
    take the losses once.
    """

    @property
    @abc.abstractmethod
    def encoders(self) -> Sequence[nn.Module]:
        """The modules that `encode` runs. `losses` runs none of them with gradient."""

    @abc.abstractmethod
    def encode(self, batch: Batch) -> Any:
        """Encodings of a batch, each sample's independent of the others (batch norms in training apart).

        Returns:
            Nested named tuples of tensors with a row for each sample, of None, and of plain values that
            are equal for all batches of one step.
        """

    @abc.abstractmethod
    def losses(self, encodings: Any, batch: Batch, clusters: PrototypeTable | None = None) -> StepOutput:
        """As `forward`, from what `encode` made of the same batch. Moves no buffer of the encoders."""

    def forward(
        self,
        batch: Batch,
        clusters: PrototypeTable | None = None,
        encodings: Any = None,
        encode_only: bool = False,
    ) -> Any:
        """Loss and terms of this rank's samples (`StepOutput`), or one part of that.

        Args:
            batch, clusters: see `Objective.forward`.
            encodings: of the batch, if there are some already.
            encode_only: return what `encode` does. (Both parts go through here because ZeRO-3 counts passes
                by the calls of the whole module.)
        """
        if encode_only:
            return self.encode(batch)
        return self.losses(self.encode(batch) if encodings is None else encodings, batch, clusters)
