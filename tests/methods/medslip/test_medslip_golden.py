"""MeDSLIP against the published code's numbers: gate, decoder, losses, grounding maps, the whole model."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from medvlp.config import Config
from medvlp.methods.medslip.config import MeDSLIPConfig
from medvlp.methods.medslip.losses import MeDSLIPLosses, Negatives, Read
from medvlp.methods.medslip.method import MeDSLIP, build, fuse_anatomies, mean_attention
from medvlp.methods.medslip.modules import Decoded, QueryDecoder, TwoStreams
from medvlp.methods.medslip.terms import existence_labels
from tests.golden_files import Golden, every
from tests.methods.small_medslip import small_batch

PUBLISHED = {
    "gate": "linear", "negatives": "local", "relation_scale": "one", "prototype_normalise": False,
    "prototype_temperature": 1.0, "standardise_book": False, "initialisation": "normal",
    "shared_norm": True,
}  # fmt: skip
VALUES = {"rtol": 1e-5, "atol": 1e-6}
GRADIENTS = {"rtol": 1e-4, "atol": 1e-6}
TERMS = {
    "loss": "loss",
    "loss/existence_pathology": "loss_ce_pathology",
    "loss/existence_anatomy": "loss_ce_anatomy",
    "loss/prototype_pathology": "loss_cl_pathology",
    "loss/prototype_anatomy": "loss_cl_anatomy",
    "loss/relation": "loss_ap",
}


def negatives_of(golden: Golden) -> Negatives:
    """The published draws: entry 0 is the place of the positive."""
    return Negatives(golden("index_pathology")[..., 1:], golden("index_anatomy")[..., 1:])


def objective_of(golden: Golden) -> tuple[MeDSLIPLosses, Read]:
    books = golden("pathology_book"), golden("anatomy_book")
    objective = MeDSLIPLosses(MeDSLIPConfig(**PUBLISHED), books[0].shape[1]).eval()
    names = {"projection": "cl_fc", "existence": "classifier"}
    with torch.no_grad():
        for ours, published in names.items():
            for stream in ("pathology", "anatomy"):
                layer = getattr(objective, f"{stream}_{ours}")
                layer.weight.copy_(golden(f"{published}_{stream}_w"))
                layer.bias.copy_(golden(f"{published}_{stream}_b"))
    features = (golden(f"features_{stream}").transpose(0, 1) for stream in ("pathology", "anatomy"))
    return objective, Read(*(feature.contiguous().requires_grad_() for feature in features), *books)


@every("medslip_losses_*.npz")
def test_losses_and_their_gradients(golden: Golden) -> None:
    objective, read = objective_of(golden)
    matrix = golden("matrix").to(torch.int8)
    before = matrix.clone()
    terms = objective(read, matrix, negatives_of(golden)).named
    assert torch.equal(matrix, before)
    assert set(terms) == set(TERMS)
    for ours, published in TERMS.items():
        torch.testing.assert_close(terms[ours].detach(), golden(published), **VALUES)
        gradients = torch.autograd.grad(
            terms[ours], (read.pathology, read.anatomy), retain_graph=True, materialize_grads=True
        )
        for gradient, name in zip(gradients, ("fp", "fa"), strict=True):
            expected = golden(f"grad_{name}_{published}").transpose(0, 1)
            torch.testing.assert_close(gradient, expected, **GRADIENTS, msg=lambda m, n=ours: f"{n}: {m}")


@every("medslip_losses_*.npz")
def test_labels(golden: Golden) -> None:
    by_pathology, by_anatomy = existence_labels(golden("matrix").to(torch.int8))
    assert torch.equal(by_pathology.double(), golden("labels_pathology"))
    assert torch.equal(by_anatomy.double(), golden("labels_anatomy"))


@every("medslip_disentangle_*.npz")
def test_gate_and_streams(golden: Golden) -> None:
    features = golden("feat").requires_grad_()
    outputs = golden("out_pathology"), golden("out_anatomy")
    streams = TwoStreams(features.shape[1], outputs[0].shape[2], "linear")
    layers = {"mask_generator": streams.gate}
    for name in ("pathology", "anatomy"):
        layers |= {f"res_l{k}_{name}": getattr(streams, name)[2 * k - 2] for k in (1, 2)}
    for name, layer in layers.items():
        layer.load_state_dict({kind: golden(f"{name}__{kind}") for kind in ("weight", "bias")})
    found = streams(features.flatten(2).transpose(1, 2))
    for own, expected in zip(found, outputs, strict=True):
        torch.testing.assert_close(own.detach(), expected, **VALUES)
    cotangents = golden("cot_pathology"), golden("cot_anatomy")
    sum((own * cotangent).sum() for own, cotangent in zip(found, cotangents, strict=True)).backward()
    torch.testing.assert_close(features.grad, golden("grad_feat"), **GRADIENTS)


#: Published names of a decoder's parts (torch's TransformerDecoder) -> ours.
PARTS = {
    "linear1": "feed_forward.0", "linear2": "feed_forward.3", "norm1": "self_norm", "norm2": "query_norm",
    "norm3": "feed_norm", "self_attn": "self_attention", "multihead_attn": "cross_attention",
    "out_proj": "output",
}  # fmt: skip


def our_names(published: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a torch decoder under our names; the packed projections are taken apart."""
    weights = {}
    for name, value in published.items():
        ours = ".".join(PARTS.get(part, part) for part in name.split("."))
        packed = re.fullmatch(r"(.*)\.in_proj_(weight|bias)", ours)
        if packed is None:
            weights[ours] = value
            continue
        for part, chunk in zip(("query", "key", "value"), value.chunk(3), strict=True):
            weights[f"{packed[1]}.{part}.{packed[2]}"] = chunk
    return weights


@every("medslip_decoder_*.npz")
def test_query_decoder(golden: Golden) -> None:
    names = golden.names("w__")
    published = {name.removeprefix("w__").replace("__", "."): golden(name) for name in names}
    queries, tokens = (golden(name).transpose(0, 1).requires_grad_() for name in ("tgt", "memory"))
    width, maps = queries.shape[2], golden("attn")
    expansion = published["layers.0.linear1.weight"].shape[0] // width
    decoder = QueryDecoder(width, len(maps), int(golden("nhead")), expansion).eval()
    decoder.load_state_dict(our_names(published))
    decoded = decoder(queries, tokens, attention=True)
    torch.testing.assert_close(decoded.features.detach().transpose(0, 1), golden("out"), **VALUES)
    torch.testing.assert_close(decoded.attention.detach(), maps, **VALUES)
    (decoded.features.transpose(0, 1) * golden("cot")).sum().backward()
    for leaf, name in ((queries, "grad_tgt"), (tokens, "grad_memory")):
        torch.testing.assert_close(leaf.grad.transpose(0, 1), golden(name), **GRADIENTS)


@every("medslip_grounding_*.npz")
def test_grounding_maps(golden: Golden) -> None:
    query = int(golden("query"))
    pathology = mean_attention(Decoded(torch.empty(0), golden("attn_pathology")[:, :, query : query + 1]))
    anatomy = mean_attention(Decoded(torch.empty(0), golden("attn_anatomy")))
    for name in golden.names("use"):
        if name.endswith("_heat14"):
            maps = fuse_anatomies(pathology, anatomy) if name.startswith("use1") else pathology
            # The published script divides by the maximum over the batch.
            heat = maps[:, 0].unflatten(1, (14, 14)) / maps.max()
            torch.testing.assert_close(heat, golden(name), **VALUES)


def published_model() -> MeDSLIP:
    """The published model with a ResNet-18 trunk and one decoder layer, in evaluation mode."""
    config = Config()
    config.data.image_size = 64
    config.image.name, config.image.local_stage = "resnet18", 3
    config.text.options = {"num_hidden_layers": 1, "intermediate_size": 64}
    config.text.frozen = True
    config.method = MeDSLIPConfig(layers=1, **PUBLISHED)
    model = build(config, 50).eval()
    model.book.written = True
    return model


def formula_weights(golden: Golden) -> dict[str, Tensor]:
    """scale * sin(0.7 i + 0.37 k) for flat index i of the k-th parameter (see golden.md), our names."""
    weights = {}
    for k, line in enumerate(golden.text("param_spec")):
        name, shape, scale = line.split("|")
        size = tuple(int(side) for side in re.findall(r"\d+", shape))
        wave = torch.sin(0.7 * torch.arange(torch.Size(size).numel(), dtype=torch.float64) + 0.37 * k)
        value = 1 + 0.01 * wave if scale == "norm" else float(scale) * wave
        weights[name] = value.float().reshape(size)
    return weights


#: Children of the published trunk (a Sequential of torchvision's) -> timm's names.
TRUNK = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3"}


def whole_model_names(published: dict[str, Tensor]) -> dict[str, Tensor]:
    named = {}
    for name, value in published.items():
        head, _, rest = name.partition(".")
        if head == "res_features":
            child, _, rest = rest.partition(".")
            ours = f"image_encoder.backbone.{TRUNK[child]}.{rest}"
        elif head.startswith("decoder_"):
            (ours, value), *more = our_names({rest: value}).items()
            prefix = f"{head.removeprefix('decoder_')}_decoder."
            named |= {prefix + part: weight for part, weight in more}
            ours = prefix + ours
        elif layer := re.fullmatch(r"res_l([12])_(\w+)", head):
            ours = f"streams.{layer[2]}.{2 * int(layer[1]) - 2}.{rest}"
        elif layer := re.fullmatch(r"(cl_fc|classifier)_(\w+)", head):
            kind = {"cl_fc": "projection", "classifier": "existence"}[layer[1]]
            ours = f"objective.{layer[2]}_{kind}.{rest}"
        else:
            ours = {"mask_generator": "streams.gate", "pathology_embedding_layer": "queries"}[
                head
            ] + f".{rest}"
        # Both decoders have one norm, which goes by the name of the first one that holds it.
        named[ours.replace("anatomy_decoder.norm", "pathology_decoder.norm")] = value
    return named


@every("medslip_e2e_*.npz")
def test_the_whole_model(golden: Golden) -> None:
    model = published_model()
    weights = whole_model_names(formula_weights(golden))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert set(weights) == trained, "the published model has exactly our trained parameters"
    model.load_state_dict(weights, strict=False)
    model.book.anatomy.copy_(golden("anatomy_book"))
    model.book.pathology.copy_(golden("pathology_book"))
    batch = small_batch(golden("matrix").to(torch.int8))
    batch.image = golden("image").double()
    with torch.no_grad():
        streams = model.double()._image_streams(batch.image).streams
        terms = model.losses(model.encode(batch), batch, negatives=negatives_of(golden)).named
    # The formula's weights drive the trunk up to 1e8, where the published float32 is itself this far off.
    for own, name in zip(streams, ("enc_pathology", "enc_anatomy"), strict=True):
        expected = golden(name).double()
        torch.testing.assert_close(own, expected, rtol=0, atol=3e-5 * float(expected.abs().max()))
    for ours, published in TERMS.items():
        torch.testing.assert_close(terms[ours].float(), golden(published), rtol=3e-5, atol=0)
