"""A small method for tests of the trainer: an InfoNCE dual encoder over real timm blocks, no batch norm."""

from __future__ import annotations

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medvlp import distributed
from medvlp.data.batch import Batch, Text
from medvlp.methods.base import Method, Progress, StepOutput
from medvlp.prototypes.table import PrototypeTable

VOCABULARY = 50


class TinyMethod(Method):
    """A two-block ViT of 32 px beside a bag of tokens; `dropout` draws from torch's default generator."""

    mean: Tensor

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.image_encoder = timm.create_model(
            "vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=32, num_heads=2, num_classes=0,
            in_chans=1, proj_drop_rate=dropout,
        )  # fmt: skip
        self.text_encoder = nn.Sequential(
            nn.Embedding(VOCABULARY, 32), nn.Linear(32, 32), nn.Dropout(dropout)
        )
        self.head = nn.Linear(32, 16)
        self.log_scale = nn.Parameter(torch.full((1,), 2.0))
        self.register_buffer("mean", torch.zeros(16))
        self.progress: list[tuple[int, int]] = []

    def image_features(self, image: Tensor) -> Tensor:
        scaled = (image.float() / 127.5 - 1).to(self.head.weight.dtype)
        features: Tensor = self.image_encoder(scaled)
        return features

    def encode_image(self, image: Tensor) -> Tensor:
        return F.normalize(self.head(self.image_features(image)).float(), dim=-1)

    def encode_text(self, text: Text) -> Tensor:
        return F.normalize(self.head(self.text_encoder(text.input_ids).mean(1)).float(), dim=-1)

    def forward(self, batch: Batch, clusters: PrototypeTable | None = None) -> StepOutput:
        image, text = self.encode_image(batch.image), self.encode_text(batch.text)
        with torch.no_grad():
            mean = distributed.sum_over_ranks(image.mean(0)) / distributed.world_size()
            self.mean.lerp_(mean.to(self.mean.dtype), 0.1)
        everyone = distributed.gather_with_gradient(text)
        scores = image @ everyone.T * self.log_scale.float().exp()
        target = torch.arange(len(image), device=image.device) + distributed.rank() * len(image)
        loss = F.cross_entropy(scores, target)
        return StepOutput(loss, {"image_to_text": loss.detach()})

    def on_progress(self, progress: Progress) -> None:
        self.progress.append((progress.epoch, progress.step))


def random_batch(seed: int, rows: int, rank: int = 0, world_size: int = 1) -> Batch:
    """Rows of one rank of a seeded global batch of `rows` samples."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (rows, 1, 32, 32), generator=generator, dtype=torch.uint8)
    ids = torch.randint(0, VOCABULARY, (rows, 8), generator=generator)
    share = slice(rank * rows // world_size, (rank + 1) * rows // world_size)
    ones = torch.ones_like(ids)
    text = Text(ids[share], ones[share], ones[share], ones[share])
    keys = [f"{seed:04}-{row:04}" for row in range(rows)][share]
    return Batch(image[share], text, torch.arange(rows)[share], torch.zeros(rows, 3)[share], keys)
