"""Every method resumed in its hardest phase equals a run that never stopped, bit for bit.

PRIOR, which changes its phase and restarts its optimiser on the way, has tests/training/test_prior_resume.py.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed_pool import Pools
from tests.training.runs import Overrides, train
from tests.training.test_resume import comparable, killed_after, weights

pytestmark = pytest.mark.dist

#: After the only refresh; the table that masks the last two steps comes from the checkpoint.
MASKS = [
    "prototypes.false_negatives=mask", "prototypes.false_negatives_by=clusters", "prototypes.clusters=4",
    "prototypes.refresh_steps=5", "prototypes.bank_rows=64",
]  # fmt: skip
#: 80 studies make about 4 steps an epoch. Runs have 8 steps and lose what comes after the sixth.
METHODS = {
    # Prototypes are frozen for an epoch and move in the second.
    "mgca": ["method.prototypes=8", "method.embedding=16", "method.head_hidden=32", "zero.stage=2", *MASKS],
    # Its teacher, its hard matching, and what it draws when it drops patches.
    "place": [
        "method.embedding=16", "method.head_hidden=32", "method.queries=4", "method.query_layers=1",
        "method.decoder_width=32", "method.decoder_heads=2", "method.correlation_target=teacher",
        "method.teacher_momentum=0.5", "method.patch_drop=0.5", "zero.stage=3", "precision=bf16",
        *MASKS,
    ],
    # Masks, dropout of the fusion.
    "mpma": [
        "method.embedding=16", "method.head_hidden=32", "method.fusion_layers=1", "method.fusion_heads=2",
        "method.fusion_hidden=32", "method.memory_slots=4", "method.decoder_width=32",
        "method.decoder_layers=1", "method.decoder_heads=2", "zero.stage=2",
    ],
    # Drawn negatives, dropout, the text book.
    "medslip": [
        "method.width=16", "method.layers=1", "method.heads=2", "text.frozen=true", "zero.stage=1",
        "precision=bf16",
    ],
    # MGCA's prototypes after the freeze, noise of PRIOR's bank, PLACE's dropped patches.
    "combination": [
        "method.mgca.prototypes=8", "method.mgca.embedding=16", "method.mgca.head_hidden=32",
        "method.prior.stage=2", "method.prior.embedding=16", "method.prior.prototypes=8",
        "method.prior.global_weights=[0,0,0]", "method.prior.local_image_weights=[0,0,0]",
        "method.place.instance_weight=0", "method.place.observation_weight=0",
        "method.place.diversity_weight=0", "method.place.decoder_width=32", "method.place.decoder_heads=2",
        "method.place.embedding=16", "method.place.head_hidden=32", "method.place.patch_drop=0.5",
        "zero.stage=2",
    ],
}  # fmt: skip
#: What must have moved in the steps that are made twice.
MOVES = {
    "mgca": "alignment.objective.prototypes.weight",
    "place": "alignment.correlation.patches.teacher_weight",
    "combination": "alignment.parts.mgca.objective.prototypes.weight",
}


@pytest.mark.parametrize("name", METHODS)
def test_resuming_is_bit_identical(gloo_pool: Pools, overrides: Overrides, tmp_path: Path, name: str) -> None:
    def options(run: str) -> list[str]:
        tiny = [text for text in overrides(run=run) if not text.startswith("method.")]
        return [
            *tiny, f"method.name={name}", *METHODS[name],
            "train.steps=8", "checkpoint.every_steps=6", "checkpoint.keep_last=0", "optimizer.lr=1e-2",
        ]  # fmt: skip

    pool, whole, resumed = gloo_pool(2), tmp_path / "whole", tmp_path / "resumed"
    assert pool.run(train, options("whole")) == [0, 0]
    killed_after(whole, resumed, step=6)
    assert pool.run(train, options("resumed")) == [0, 0]
    assert weights(resumed, 8) == weights(whole, 8)
    assert comparable(resumed) == comparable(whole)
    before, after = (
        load_file(whole / "checkpoints" / f"step-{step:08d}" / "weights.safetensors") for step in (6, 8)
    )
    moved = [key for key in after if not torch.equal(before[key], after[key])]
    assert MOVES.get(name, "image_encoder") in " ".join(moved)
    masked = [line["prototypes/masked"] for line in comparable(whole) if "prototypes/masked" in line]
    assert (len(masked) == 3 and min(masked) > 0) == (MASKS[0] in METHODS[name])
