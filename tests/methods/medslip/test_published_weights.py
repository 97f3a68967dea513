"""Parts of MeDSLIP with weights by the golden files' rule, against the published code at its published size.

The rule makes every weight from its published key, see `weight`; the golden files hold outputs alone.
"""

from __future__ import annotations

import json
import zlib

import numpy as np
import torch
from torch import Tensor

from medvlp.config import ImageConfig
from medvlp.encoders.image import ImageEncoder
from medvlp.methods.medslip.config import MeDSLIPConfig
from medvlp.methods.medslip.losses import MeDSLIPLosses
from tests.golden_files import Golden, every

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
#: Module of timm's ResNet-50 -> its number in the published trunk.
TRUNK = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6}


def weight(golden: Golden, key: str, shape: tuple[int, ...]) -> Tensor:
    """The weight of a published key: n(0, 1) drawn from the key's checksum, scaled by its kind."""
    facts = json.loads(golden.file.with_suffix(".json").read_text())
    seed = (zlib.crc32(key.encode()) + facts["salt"]) % 2**32
    drawn = np.random.RandomState(seed).standard_normal(int(np.prod(shape, dtype=int))).reshape(shape)
    last = key.rsplit(".", 1)[-1]
    if last == "running_var":
        drawn = 1 + 0.1 * np.abs(drawn)
    elif len(shape) == 1:
        drawn = 0.1 * drawn + (last == "weight")
    else:
        drawn = drawn / np.sqrt(np.prod(shape[1:]))
    return torch.from_numpy(drawn.astype(np.float32))


@every("import_medslip*.npz")
def test_probability_of_the_published_heads(golden: Golden) -> None:
    objective = MeDSLIPLosses(MeDSLIPConfig(), 768).eval()
    with torch.no_grad():
        for name in ("weight", "bias"):
            value = getattr(objective.pathology_existence, name)
            value.copy_(weight(golden, f"classifier_pathology.{name}", tuple(value.shape)))
    features, rows = golden("out_features_pathology"), golden("index_pathology")
    logits = objective.pathology_existence(features)
    torch.testing.assert_close(logits, golden("out_existence_pathology")[:, rows], rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(
        objective.probability(features), golden("out_probability_pathology")[:, rows], rtol=0, atol=1e-5
    )


@every("import_medslip*.npz")
def test_feature_map_of_the_published_trunk_with_three_means(golden: Golden) -> None:
    torch.manual_seed(0)
    config = ImageConfig(name="resnet50", local_stage=3, mean=MEAN, std=STD)
    encoder = ImageEncoder(config, 224, ends_at_local=True).eval()
    state = {}
    for name, value in encoder.backbone.state_dict().items():
        module, _, rest = name.partition(".")
        if value.is_floating_point():
            state[name] = weight(golden, f"res_features.{TRUNK[module]}.{rest}", tuple(value.shape))
    encoder.backbone.load_state_dict(state, strict=False)
    features = encoder(golden("in_image_u8")[:, None])
    expected = golden("out_image_map").transpose(1, 2)
    torch.testing.assert_close(features.local[:, :2], expected, rtol=2e-5, atol=2e-5 * expected.max().item())
    pooled = golden("out_image_pooled")
    torch.testing.assert_close(features.pooled, pooled, rtol=2e-5, atol=2e-5 * pooled.max().item())
