"""MGCA's losses and their gradients against the published code's numbers."""

from __future__ import annotations

import pytest
import torch

from medvlp.methods.mgca.config import MGCAConfig
from medvlp.methods.mgca.losses import MGCAEmbeddings, MGCALosses, MGCATokens
from tests.golden_files import Golden, every

# float64 agrees to rounding; in float32 the published code itself errs by about 1e-5 (exp(x / 0.05)).
TOLERANCE = {
    "f64": {"rtol": 1e-7, "atol": 1e-9},
    "f32": {"rtol": 1e-4, "atol": 2e-5},
}
DTYPES = {"f64": torch.float64, "f32": torch.float32}


def build(golden: Golden, dtype: torch.dtype) -> tuple[MGCALosses, MGCAEmbeddings]:
    vit = golden.text("meta_encoder").startswith("vit")
    prototypes = golden("in_proto", dtype)
    config = MGCAConfig(
        embedding=prototypes.shape[1],
        prototypes=prototypes.shape[0],
        normalise_patch_context=not vit,
        padding_negatives=True,
        negatives="local",
    )
    objective = MGCALosses(config).to(dtype)
    with torch.no_grad():
        # Rows of length 1, so that the gradient with respect to the weight is the published one's tangent.
        objective.prototypes.weight.copy_(torch.nn.functional.normalize(prototypes, dim=1))
    leaves = {
        name: golden(name, dtype).requires_grad_() for name in ("in_img", "in_rep", "in_patch", "in_word")
    }
    attention = golden("in_vit_attn", dtype)[:, :, 0, 1:].mean(1) if vit else None
    embeddings = MGCAEmbeddings(
        image=leaves["in_img"],
        report=leaves["in_rep"],
        tokens=MGCATokens(
            patches=leaves["in_patch"],
            words=leaves["in_word"],
            word_valid=~golden("in_pad_mask"),
            word_attention=golden("in_attn", dtype),
            patch_attention=attention,
        ),
    )
    return objective, embeddings


@pytest.mark.parametrize("precision", ["f64", "f32"])
@every("mgca_losses_*.npz")
def test_values(golden: Golden, precision: str) -> None:
    objective, embeddings = build(golden, DTYPES[precision])
    terms = objective(embeddings).named
    expected = {
        "loss/instance": "loss_ita",
        "loss/word": "loss_word",
        "loss/patch": "loss_patch",
        "loss/prototype": "loss_proto",
        "loss": "total_111",
    }
    for name, published in expected.items():
        value = terms[name].detach().double()
        torch.testing.assert_close(
            value,
            golden(f"out_{precision}_{published}"),
            **TOLERANCE[precision],
            msg=lambda m, n=name: f"{n}: {m}",
        )
    for k in (1, 5):
        percent = 100 * terms[f"retrieval/top{k}"].double()
        torch.testing.assert_close(percent, golden(f"out_{precision}_acc{k}"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("precision", ["f64", "f32"])
@pytest.mark.parametrize(
    ("published", "terms", "inputs"),
    [
        ("ita", ["loss/instance"], {"img": "image", "rep": "report"}),
        ("word", ["loss/word"], {"patch": "patches", "word": "words"}),
        ("local", ["loss/word", "loss/patch"], {"patch": "patches", "word": "words"}),
        ("proto", ["loss/prototype"], {"img": "image", "rep": "report"}),
    ],
)
@every("mgca_losses_*.npz")
def test_gradients(
    golden: Golden, published: str, terms: list[str], inputs: dict[str, str], precision: str
) -> None:
    objective, embeddings = build(golden, DTYPES[precision])
    values = objective(embeddings).named
    sum(values[name] for name in terms).backward()
    leaves = embeddings.tokens._asdict() | embeddings._asdict()
    for short, field in inputs.items():
        torch.testing.assert_close(
            leaves[field].grad,
            golden(f"grad_{precision}_{published}_wrt_{short}"),
            **TOLERANCE[precision],
        )


@pytest.mark.parametrize("precision", ["f64", "f32"])
@every("mgca_losses_*.npz")
def test_prototype_weight_gradient(golden: Golden, precision: str) -> None:
    """Ours is with respect to the weight before normalisation: the published one without its radial part."""
    objective, embeddings = build(golden, DTYPES[precision])
    objective(embeddings).terms["loss/prototype"].backward()
    weight = objective.prototypes.weight
    published = golden(f"grad_{precision}_proto_wrt_protoW")
    radial = (published * weight).sum(1, keepdim=True) * weight
    torch.testing.assert_close(weight.grad, (published - radial).detach(), **TOLERANCE[precision])


@pytest.mark.parametrize("precision", ["f64", "f32"])
@every("mgca_losses_*.npz")
def test_prototype_scores_and_codes(golden: Golden, precision: str) -> None:
    objective, embeddings = build(golden, DTYPES[precision])
    for field, short in (("image", "img"), ("report", "rep")):
        unit = torch.nn.functional.normalize(getattr(embeddings, field), dim=1)
        scores = objective.prototypes(unit).detach()
        torch.testing.assert_close(
            scores, golden(f"out_{precision}_proto_logits_{short}"), **TOLERANCE[precision]
        )
        codes = objective._codes(scores)
        # Codes are float32 in the published code as well as in ours.
        torch.testing.assert_close(codes, golden(f"out_{precision}_code_{short}"), rtol=2e-5, atol=1e-6)
