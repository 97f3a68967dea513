"""What every method promises, run over the registry: a new method is tested here without a line more."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from medvlp.config import PhaseConfig
from medvlp.config_files import ConfigError
from medvlp.methods.base import Method, Progress, StepOutput
from tests.methods import small_mgca
from tests.methods.gradients import assert_equal_gradients, averaged_gradients
from tests.methods.small import REPORTS, built, names, reordered, small_batch, small_config

#: Batches in which something that losses divide by, or choose from, is not there.
BATCHES: dict[str, dict[str, Any]] = {
    "many": {},
    "no positives": {"mentioned": 0.0},
    "one sample": {"reports": [[3, 2]]},
    "one sentence": {"reports": [[4], [3]]},
    "one word": {"reports": [[1], [1], [1]]},
    "some padding": {"reports": [[2, 1], []]},
    "all padding": {"reports": [[], []], "mentioned": 0.0},
}


def step_of(method: Method, **batch: Any) -> StepOutput:
    """A step with seeded draws."""
    torch.manual_seed(1)
    output: StepOutput = method(small_batch(**batch))
    return output


@pytest.mark.parametrize("case", BATCHES)
@pytest.mark.parametrize("name", names())
def test_any_batch_gives_a_finite_step(name: str, case: str) -> None:
    method = built(small_config(name))
    output = step_of(method, **BATCHES[case])
    assert output.loss.shape == ()
    assert output.loss.dtype == torch.float32
    assert "loss" not in output.terms
    for term, value in output.named.items():
        assert value.shape == (), term
        assert value.isfinite() or term == "prototypes/mask_precision", term
    output.loss.backward()
    for parameter, value in method.named_parameters():
        assert value.grad is None or value.grad.isfinite().all(), parameter


@pytest.mark.parametrize("case", ["many", "some padding"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", names())
def test_half_precision_is_finite(name: str, dtype: torch.dtype, case: str) -> None:
    method = built(small_config(name)).to(dtype)
    output = step_of(method, **BATCHES[case])
    assert output.loss.dtype == torch.float32, "losses are computed in float32"
    assert all(value.isfinite() for value in output.named.values())
    output.loss.backward()
    if dtype == torch.bfloat16 or case == "many":
        # Batch norms of equal values multiply rounding by 300, which fp16 cannot always hold.
        assert all(p.grad.isfinite().all() for p in method.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", names())
def test_something_learns_and_everything_trained_is_used(name: str) -> None:
    method, batch = built(small_config(name)), small_batch()
    method.on_progress(Progress(1, 0, 15))
    optimizer = torch.optim.Adam((p for p in method.parameters() if p.requires_grad), lr=3e-3)
    losses = []
    for _ in range(15):
        torch.manual_seed(1)
        output = method(batch)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(output.loss.item())
    unused = [key for key, p in method.named_parameters() if p.requires_grad and p.grad is None]
    assert not unused
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", names())
def test_the_order_of_samples_does_not_matter(name: str) -> None:
    method, batch = built(small_config(name)).double(), small_batch()
    expected = method(batch).named
    found = method(reordered(batch, torch.randperm(len(REPORTS)))).named
    assert found.keys() == expected.keys()
    for term, value in expected.items():
        torch.testing.assert_close(found[term], value, msg=term)


@pytest.mark.parametrize("name", names())
def test_texts_in_groups_of_similar_length_give_the_same_step(name: str) -> None:
    """Whatever stands at positions of padding, no loss reads it."""
    batch = small_batch([[3, 2], [1], [4, 4, 2], [2, 2]])
    batch.text.lengths = tuple(batch.text.attention_mask.sum(1).tolist())
    assert len(set(batch.text.lengths)) > 2
    config = small_config(name)
    steps = []
    for config.text.length_groups in (1, 3):
        method = built(config).double()
        torch.manual_seed(1)
        output = method(batch)
        output.loss.backward()
        gradients = {key: p.grad for key, p in method.named_parameters() if p.grad is not None}
        steps.append((output.named, gradients))
    # MeDSLIP reads a book of texts that is written once, in float32.
    torch.testing.assert_close(steps[1], steps[0], rtol=1e-4, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("name", names())
def test_a_validation_measures_the_same_at_any_time(name: str) -> None:
    method, batch = built(small_config(name)).eval(), small_batch()
    measured = []
    for epoch, step in (0, 3), (1, 4), (9, 90):
        method.on_progress(Progress(epoch, step, 100))
        torch.manual_seed(0)
        measured.append({term: value.item() for term, value in method(batch).named.items()})
    assert measured == [measured[0]] * 3


@pytest.mark.parametrize("name", names())
def test_every_change_of_the_loss_is_told(name: str) -> None:
    config = small_config(name)
    if config.method.name in ("prior", "combination"):
        config.optimizer.phases = [PhaseConfig(1, 1e-3) for _ in range(3)]
    method = built(config)
    losses: dict[str, set[float]] = {}
    for epoch, phase in (0, 0), (1, 0), (2, 1), (9, 2):
        method.on_progress(Progress(epoch, 7, 100, phase))
        losses.setdefault(method.loss_variant, set()).add(step_of(method).loss.item())
    assert all(len(values) == 1 for values in losses.values()), losses
    assert len(set.union(*losses.values())) == len(losses)
    assert (len(losses) > 1) == (config.method.training_loss_changes(config) is not None)


@pytest.mark.parametrize("name", names())
def test_a_copy_and_a_loaded_state_give_the_same_step(name: str) -> None:
    method = built(small_config(name))
    before = {key: value.clone() for key, value in method.named_parameters()}
    expected = step_of(method)
    for key, value in method.named_parameters():
        assert torch.equal(value, before[key]), f"{key} is changed by a forward pass"
    for other in (copy.deepcopy(method), built(small_config(name))):
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.add_(1.0)
        other.load_state_dict(method.state_dict())
        torch.testing.assert_close(step_of(other).named, expected.named)


def weight_keys(name: str) -> list[str]:
    """Keys of a method that are the factor of a loss."""
    config = small_config(name).method
    return [item.name for item in dataclasses.fields(config) if item.name.endswith("_weight")]


@pytest.mark.parametrize(("name", "key"), [(name, key) for name in names() for key in weight_keys(name)])
def test_weights_add_up(name: str, key: str) -> None:
    """The loss is linear in each weight, and one of 0 leaves its term out."""
    whole = built(small_config(name, **{key: 1.0})).double()
    losses, terms = [], []
    for weight in (0.0, 1.0, 2.0, 3.0):
        config = small_config(name, **{key: weight})
        try:
            method = built(config).double()
        except ConfigError:
            pytest.skip(f"{name} needs {key}: without it the rest of the config is refused")
        own = method.state_dict()
        shared = {name: value for name, value in whole.state_dict().items() if name in own}
        method.load_state_dict(shared)
        output = step_of(method)
        losses.append(output.loss.item())
        terms.append(output.terms.keys())
    assert losses[1] != pytest.approx(losses[0], rel=1e-9)
    assert losses[3] - losses[2] == pytest.approx(losses[2] - losses[1], rel=1e-9)
    assert terms[0] < terms[1] == terms[3]


@pytest.mark.parametrize("name", names())
def test_embeddings_and_scores(name: str) -> None:
    method, batch = built(small_config(name)).eval(), small_batch()
    with torch.no_grad():
        image = method.encode_image(batch.image)
        scores = method.score(batch.image, batch.text)
        features = method.image_features(batch.image)
    assert image.dtype == torch.float32
    torch.testing.assert_close(image.norm(dim=1), torch.ones(len(REPORTS)))
    assert features.ndim == 2
    assert len(features) == len(REPORTS)
    assert scores.shape == (len(REPORTS), len(REPORTS))
    assert scores.isfinite().all()
    if not method.embeds_reports:
        with pytest.raises(NotImplementedError):
            method.encode_text(batch.text)
        return
    with torch.no_grad():
        text = method.encode_text(batch.text)
    torch.testing.assert_close(text.norm(dim=1), torch.ones(len(REPORTS)))
    if method.scores_by_embedding:
        torch.testing.assert_close(scores, image @ text.T)


#: Losses that shape embeddings, switched off; something else is still trained.
WITHOUT_EMBEDDINGS: dict[str, dict[str, Any]] = {
    "mgca": {"instance_weight": 0.0, "prototype_weight": 0.0},
    "mpma": {"global_weight": 0.0},
    "place": {"instance_weight": 0.0},
    "prior": {"global_weights": [0.0, 0.0, 0.0]},
}


@pytest.mark.parametrize("name", [*WITHOUT_EMBEDDINGS, "combination"])
def test_embeddings_that_no_loss_shapes_are_not_given(name: str) -> None:
    config = small_config(name, **WITHOUT_EMBEDDINGS.get(name, {}))
    if name == "combination":
        config.method.place = dataclasses.replace(config.method.place, instance_weight=0.0)
        config.method.embeds_with = "place"
    method, batch = built(config).eval(), small_batch()
    assert not any((method.embeds_images, method.embeds_reports, method.scores_prompts))
    asked = (
        (method.encode_image, (batch.image,)),
        (method.encode_text, (batch.text,)),
        (method.score, (batch.image, batch.text)),
    )
    with torch.no_grad():
        for function, given in asked:
            with pytest.raises(NotImplementedError):
                function(*given)
        assert method.image_features(batch.image).isfinite().all()


SIGLIP = {
    "name": "vit_base_patch16_siglip_224",
    "options": {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2},
}


@pytest.mark.parametrize("name", ["mgca", "place", "prior", "combination", "medslip"])
@pytest.mark.parametrize("image", [small_mgca.IMAGES["resnet"], SIGLIP], ids=["resnet", "attention pool"])
def test_the_backbone_ends_where_losses_end_to_read_it(name: str, image: dict[str, Any]) -> None:
    """The pooled feature of later stages would be untrained, and stand for images in every probe."""
    config = small_config(name, **({} if name == "prior" else WITHOUT_EMBEDDINGS.get(name, {})))
    if name == "combination":
        config.method.mgca_weight, config.method.embeds_with = 0.0, "prior"
        config.method.place = dataclasses.replace(config.method.place, instance_weight=0.0)
    config.image = dataclasses.replace(config.image, **image)
    method, batch = built(config), small_batch()
    method(batch).loss.backward()
    for parameter, value in method.image_encoder.named_parameters():
        assert value.grad is not None, f"{parameter} is not trained"
    method.eval()
    with torch.no_grad():
        local = method.image_encoder(batch.image).local
        torch.testing.assert_close(method.image_features(batch.image), local.mean(1))


@pytest.mark.parametrize("name", names())
def test_maps(name: str) -> None:
    method, batch = built(small_config(name)).eval(), small_batch()
    prompts = small_batch([[3], [2, 1]], seed=1).text
    if not method.grounds:
        with pytest.raises(NotImplementedError):
            method.ground(batch.image, prompts)
        return
    with torch.no_grad():
        maps = method.ground(batch.image, prompts)
    assert maps.shape[:2] == (len(REPORTS), 2)
    assert maps.ndim == 4
    assert maps.dtype == torch.float32
    assert maps.isfinite().all()
    with torch.no_grad():
        alone = method.ground(batch.image[:3], type(prompts)(*(v[:1] for v in prompts.tensors().values())))
    torch.testing.assert_close(alone[:, 0], maps[:3, 0], msg="a map depends on no other image or prompt")


@pytest.mark.parametrize("name", names())
def test_what_the_prototype_service_gets(name: str) -> None:
    method = built(small_config(name))
    found = step_of(method).embeddings
    user = method.service_user
    width = None if user is None else user.embedding_width()
    assert bool(found) == (width is not None)
    for modality, values in found.items():
        assert modality in ("image", "text")
        assert values.shape == (len(REPORTS), width)
        assert values.dtype == torch.float32
        assert not values.requires_grad
        torch.testing.assert_close(values.norm(dim=1), torch.ones(len(REPORTS)))


def gradients(ranks: int, name: str) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Terms and gradients averaged over ranks, in float64, of this rank's part of one batch."""
    method = built(small_config(name)).double()
    method.on_progress(Progress(1, 1, 2))
    return averaged_gradients(method, small_batch(), ranks)


@pytest.mark.dist
@pytest.mark.parametrize("name", names())
def test_the_gradient_on_two_ranks_is_the_single_process_one(gloo_pool: Any, name: str) -> None:
    terms, expected = gradients(1, name)
    results = gloo_pool(2).run(gradients, 2, name)
    assert np.mean([own["loss"] for own, _ in results]) == pytest.approx(terms["loss"], rel=1e-6)
    assert_equal_gradients(results, expected)


#: Losses that contrast the samples of a batch, by the last part of their names.
CONTRASTS = ("instance", "global", "generated", "observation")


def contrasts(output: StepOutput) -> dict[str, float]:
    return {k: v.item() for k, v in output.terms.items() if k.rpartition("loss/")[2] in CONTRASTS}


@pytest.mark.parametrize("name", names())
def test_images_of_one_study_are_no_negatives(name: str) -> None:
    """In every contrast over the batch: their report is the same. Published behaviour is an option."""
    method, batch = built(small_config(name)).double(), small_batch()
    alone = dataclasses.replace(batch, study=torch.arange(len(REPORTS)))
    shared = dataclasses.replace(batch, study=torch.tensor([0, 0, 2, 3, 3, 3, 6, 7]))
    before, apart, found = method(batch), method(alone), method(shared)
    torch.testing.assert_close(apart.named, before.named)
    if not contrasts(before):
        torch.testing.assert_close(found.named, before.named)
        return
    expected = shared.study[:, None] == shared.study[None]
    assert torch.equal(found.exclusion.pairs, expected & ~torch.eye(len(REPORTS), dtype=torch.bool))
    for term, value in contrasts(found).items():
        assert value < contrasts(before)[term] - 1e-6, f"{term}: fewer negatives"
    published = built(small_config(name, same_study="negatives")).double()
    torch.testing.assert_close(published(shared).named, before.named)


@pytest.mark.parametrize("name", names())
def test_one_study_alone_has_no_contrast_over_the_batch(name: str) -> None:
    method = built(small_config(name)).double()
    one = dataclasses.replace(small_batch([[3]] * 4), study=torch.zeros(4, dtype=torch.int64))
    for term, value in contrasts(method(one)).items():
        assert abs(value) < 1e-9, term


@pytest.mark.parametrize("summary", [{}, {"summary": "mean"}])
@pytest.mark.parametrize("name", names())
def test_features_are_what_is_trained(name: str, summary: dict[str, Any]) -> None:
    """`image_features` of a transformer is a part of its output that some loss reads."""
    config = small_config(name)
    for key, value in summary.items():
        if not hasattr(config.method, key):
            pytest.skip(f"{name} has no {key}")
        setattr(config.method, key, value)
    for key in ("image_weight", "report_weight"):  # reconstructions read every token, and shape no summary
        if hasattr(config.method, key):
            setattr(config.method, key, 0.0)
    method, batch = built(config), small_batch()
    seen: list[Any] = []
    hook = method.image_encoder.register_forward_hook(lambda module, inputs, output: seen.append(output))
    output = method(batch)
    hook.remove()
    gradients = torch.autograd.grad(output.loss, [seen[0].pooled, seen[0].local], allow_unused=True)
    trained = [gradient is not None and gradient.abs().sum().item() > 0 for gradient in gradients]
    method.eval()
    with torch.no_grad():
        features, whole = method.image_features(batch.image), method.image_encoder(batch.image)
    parts = [whole.pooled, whole.local.mean(1)]
    same = [part.shape == features.shape and torch.allclose(part, features) for part in parts]
    assert any(is_it and is_trained for is_it, is_trained in zip(same, trained, strict=True)), (same, trained)
