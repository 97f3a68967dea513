"""Image backbones: any timm model, transformer or convolutional, behind one interface."""

import sys
from collections.abc import Sequence
from types import MethodType
from typing import Any, NamedTuple, Self

import timm
import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from torch import Tensor, nn

from medvlp.config import ImageConfig
from medvlp.encoders.backbones import (
    EncoderError,
    at_size,
    plain_options,
    read_weights,
    unknown_model,
    wrong_option,
)
from medvlp.encoders.batch_norm import convert_batch_norms
from medvlp.hub import hub_reason, quiet_hub

#: Arguments of timm.create_model that are refused, and why.
_REFUSED = dict.fromkeys(
    ("cache_dir", "checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay"),
    "weights come from image.weights or image.pretrained, where they are looked at and recorded",
) | {"patch_drop_rate": "the patches that are left form no grid (MPMA hides them: method.image_mask_ratio)"}


class ImageFeatures(NamedTuple):
    """What an image backbone returns, in the type of its parameters (a tuple: ZeRO-3's hooks look inside).

    Attributes:
        pooled: [B, D] image feature (class token or pooled map), before any projection.
        local: [B, P, Dl] patch tokens after the final norm, or the pixels of a feature map, row-major.
        grid: (rows, columns) of the local features; P = rows * columns.
        attention: [B, heads, P] float32 last-block attention from the class token to the patches (softmax
            over all tokens, detached), or None when it was not asked for.
    """

    pooled: Tensor
    local: Tensor
    grid: tuple[int, int]
    attention: Tensor | None = None


class Level(NamedTuple):
    """One feature map of a backbone: its channels, and the pixels of the image a step in it goes."""

    width: int
    stride: int


class ImageEncoder(nn.Module):
    """A timm model as a backbone.

    Attributes:
        width: D of `ImageFeatures.pooled`; `local_width`: Dl; `grid`: (rows, columns) at `image_size`.
        shortened: whether stages of the architecture were removed (`ends_at_local`).
        reads_patches: set by a method whose losses read the local features and not the pooled one.
        has_attention: whether `forward(..., attention=True)` works (a class token and plain attention).
        levels: the feature maps that `pyramid` gives: after each stage of a backbone that has stages (the
            stem of a ResNet is the first), after each block of a vision transformer, all of one size.

    Args:
        config: the `image` section.
        image_size: side of the images in pixels, before `config.resize_to`.
        batch_norm: "global" (statistics over all ranks) or "local".
        ends_at_local: remove what comes after `config.local_stage`, for methods that read the local features
            only and so train nothing behind it; the pooled feature is then that of the same stage.

    Raises:
        EncoderError: unknown model, wrong options or weights, or an image size the model cannot take.
    """

    def __init__(
        self,
        config: ImageConfig,
        image_size: int,
        batch_norm: str = "global",
        ends_at_local: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.image_size = image_size
        backbone = _create_backbone(config, config.resize_to or image_size)
        _check_patch_size(backbone, config, config.resize_to or image_size)
        stages, stage = len(_stages(backbone)), config.local_stage
        if stage is not None and -stages <= stage < 0:
            stage += stages  # counted from the start, because the end moves when stages are removed
        self.shortened = ends_at_local and stage not in (None, stages - 1)
        if self.shortened:
            _end_at_stage(backbone, stage, config.name)
        if ends_at_local and getattr(backbone, "global_pool", None) == "map":
            backbone.reset_classifier(0, "avg")  # an attention pool comes after the local features, too
        self.reads_patches = False
        self._taken: set[tuple[int, ...]] = set()  # an error at a size that once passed has another reason
        # ZeRO-3 gathers a module's own weights (class token, positions) when the module itself is called, so
        # features, local map and pooling must happen in one call of the backbone.
        backbone.local_stage = stage
        backbone.forward = MethodType(_pooled_and_local, backbone)
        convert_batch_norms(backbone, synchronise=batch_norm == "global")
        self.backbone: Any = backbone
        self.has_attention = self._listen_to_last_attention()
        if config.frozen:
            self.backbone.requires_grad_(False)
        self.train(self.training)
        self.width, self.local_width, self.grid = self._probe()
        self.levels = self._levels()

    def forward(self, image: Tensor, attention: bool = False) -> ImageFeatures:
        """Features of a batch of images.

        Args:
            image: [B, 1, H, W] uint8 (scaled to [0, 1] and normalised here, on its device), or floating
                point and already normalised; a single channel is repeated to `in_channels`.
            attention: also return the last block's class-token attention. Every block keeps fused
                attention; the map is computed from the last block's queries and keys.

        Raises:
            EncoderError: the size does not fit the model, or there is no attention map to return.
        """
        if attention and not self.has_attention:
            raise EncoderError(f"image.name={self.config.name} has no class-token attention map")
        if not attention:
            return ImageFeatures(*self._features(self.prepare(image)))
        last: Any = self.backbone.blocks[-1].attn
        last.q_norm.kept, last.k_norm.kept = [], []
        try:
            pooled, local, grid = self._features(self.prepare(image))
            query, key = last.q_norm.kept[-1], last.k_norm.kept[-1]
        finally:
            last.q_norm.kept = last.k_norm.kept = None
        return ImageFeatures(pooled, local, grid, _class_attention(query, key, last.scale, local.shape[1]))

    @property
    def summarises_patches(self) -> bool:
        """Whether the mean of the patches stands for an image instead of a class token no loss reads."""
        return self.reads_patches and getattr(self.backbone, "global_pool", None) == "token"

    def summary(self, features: ImageFeatures) -> Tensor:
        """[B, F] the feature of whole images that is trained: the pooled one, or the mean of the patches."""
        return features.local.mean(1) if self.summarises_patches else features.pooled

    def pyramid(self, image: Tensor, levels: Sequence[int] | None = None) -> tuple[Tensor, ...]:
        """Feature maps of inner stages or blocks.

        A backbone that takes any size sees the image as it is, not at `config.resize_to`: its maps then lie
        on the image's own pixels, as the heads of segmentation and detection need it.

        Args:
            image: as for `forward`. levels: which of `levels`, ascending; default all.

        Returns:
            [B, width, H / stride, W / stride] (rounded up) of each level, without a final norm.

        Raises:
            EncoderError: the size does not fit the model.
        """
        any_size = not hasattr(self.backbone, "patch_embed")
        chosen = list(range(len(self.levels)) if levels is None else levels)
        return self.run_backbone(self.prepare(image, resize=not any_size), chosen)

    @property
    def has_stages(self) -> bool:
        """Whether the levels of the pyramid have different sizes."""
        return len({level.stride for level in self.levels}) > 1

    def prepare(self, image: Tensor, resize: bool = True) -> Tensor:
        """[B, 1, H, W] image -> normalised [B, in_channels, H', W'] in the parameters' type."""
        dtype = next(self.backbone.parameters()).dtype
        image = self.normalise(image, resize).to(dtype)
        if image.shape[1] == 1:
            image = image.expand(-1, self.config.in_channels, -1, -1)
        # Channels last runs convolutions 1.4 times as fast on a CPU and feeds tensor cores directly on a GPU.
        return image.contiguous(memory_format=torch.channels_last)

    def normalise(self, image: Tensor, resize: bool = True) -> Tensor:
        """[B, 1, H, W] image -> [B, 1, H', W'] in the config's scale and size; uint8 as float32.

        [B, in_channels, H', W'] where the config has a mean or a deviation for each channel. Without
        `resize` the size stays.
        """
        image = normalise_image(image, self.config.mean, self.config.std)
        if resize and self.config.resize_to is not None and image.shape[-1] != self.config.resize_to:
            size = (self.config.resize_to, self.config.resize_to)
            image = F.interpolate(image, size=size, mode="bilinear", align_corners=True)
        return image

    def train(self, mode: bool = True) -> Self:
        """As `nn.Module.train`, but a frozen backbone stays in evaluation mode."""
        super().train(mode)
        if self.config.frozen:
            self.backbone.eval()
        return self

    def run_backbone(self, image: Tensor, levels: list[int] | None = None) -> tuple[Tensor, ...]:
        """Prepared images -> pooled [B, D], and local tokens [B, P, Dl] or map [B, Dl, h, w]; with `levels`
        the feature maps after these instead."""
        size = tuple(image.shape[1:])
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.frozen):
            try:
                features: tuple[Tensor, ...] = self.backbone(image, levels)
            except (AssertionError, RuntimeError, IndexError) as error:
                if size in self._taken or isinstance(error, torch.OutOfMemoryError):
                    raise
                raise EncoderError(
                    f"image.name={self.config.name} cannot take images of {size} "
                    f"(data.image_size, image.resize_to, image.local_stage): {error}"
                ) from error
        self._taken.add(size)
        return features

    def _features(self, image: Tensor) -> tuple[Tensor, Tensor, tuple[int, int]]:
        pooled, local = self.run_backbone(image)
        if local.ndim == 3:
            return pooled, local, self._token_grid(image, local.shape[1])
        return pooled, local.flatten(2).transpose(1, 2), (local.shape[2], local.shape[3])

    def _token_grid(self, image: Tensor, patches: int) -> tuple[int, int]:
        patch_embed = getattr(self.backbone, "patch_embed", None)
        if patch_embed is not None and hasattr(patch_embed, "dynamic_feat_size"):
            rows, columns = patch_embed.dynamic_feat_size(tuple(image.shape[-2:]))
            if rows * columns == patches:
                return rows, columns
        side = round(patches**0.5)
        if side * side != patches:
            raise EncoderError(f"image.name={self.config.name}: {patches} patch tokens form no known grid")
        return side, side

    def _listen_to_last_attention(self) -> bool:
        """Hook the last block's query and key norms (identities in most models); false if there are none."""
        blocks = getattr(self.backbone, "blocks", None)
        last = (
            getattr(blocks[-1], "attn", None) if isinstance(blocks, nn.Sequential | nn.ModuleList) else None
        )
        class_token = getattr(self.backbone, "cls_token", None)
        if not isinstance(last, Attention) or class_token is None:
            return False

        last.q_norm.register_forward_hook(_keep_output)
        last.k_norm.register_forward_hook(_keep_output)
        return True

    def _levels(self) -> tuple[Level, ...]:
        levels = tuple(Level(item["num_chs"], item["reduction"]) for item in _stages(self.backbone))
        # The last stage that is left is the local one.
        return levels[: self.backbone.local_stage + 1] if self.shortened else levels

    @torch.no_grad()
    def _probe(self) -> tuple[int, int, tuple[int, int]]:
        """Widths and grid from one black image; also shows at build time that the size fits."""
        training = self.training
        self.eval()
        channels = self.config.in_channels
        features = self(torch.zeros(1, channels, self.image_size, self.image_size))
        self.train(training)
        if features.pooled.ndim != 2:
            raise EncoderError(f"image.name={self.config.name} gives no pooled feature")
        return features.pooled.shape[1], features.local.shape[2], features.grid


def normalise_image(image: Tensor, mean: float | list[float], std: float | list[float]) -> Tensor:
    """uint8 images scaled to [0, 1] and normalised, in float32; floating-point images as they are.

    With a mean or a deviation for each of C channels, [B, 1, H, W] images become [B, C, H, W].

    Not in the parameters' type: steps of 1/255 are lost in bfloat16.
    """
    if image.dtype != torch.uint8:
        return image
    center, scale = (_by_channel(value, image.device) for value in (mean, std))
    return (image.float() / 255.0 - center) / scale


def _by_channel(value: float | list[float], device: torch.device) -> Tensor:
    """[C, 1, 1] on the device, filled there: a copy from the host would wait for what the device is doing."""
    numbers = [value] if isinstance(value, float | int) else value
    filled = [torch.full((1, 1, 1), float(number), dtype=torch.float32, device=device) for number in numbers]
    return torch.cat(filled)


def _keep_output(module: nn.Module, inputs: Any, output: Tensor) -> None:
    """Forward hook: append the output to the list in `module.kept`, if there is one."""
    kept = getattr(module, "kept", None)
    if kept is not None:
        kept.append(output.detach())


@torch.no_grad()
def _class_attention(query: Tensor, key: Tensor, scale: float, patches: int) -> Tensor:
    """[B, heads, N, d] queries and keys -> [B, heads, P] attention from the class token to the patches."""
    scores = (query[:, :, :1].float() * scale) @ key.float().transpose(-2, -1)
    return scores.softmax(-1)[:, :, 0, -patches:]


def _pooled_and_local(model: Any, image: Tensor, levels: list[int] | None = None) -> tuple[Tensor, ...]:
    """Forward of a timm model -> pooled [B, D], and local tokens [B, P, Dl] or map [B, Dl, h, w]; with
    `levels` the maps [B, width, h, w] after these stages or blocks instead."""
    if levels is not None:
        maps = model.forward_intermediates(
            image, indices=levels, output_fmt="NCHW", intermediates_only=True, stop_early=True
        )
        return tuple(maps)
    if model.local_stage is not None:
        final, stages = model.forward_intermediates(
            image, indices=[model.local_stage], norm=True, output_fmt="NCHW"
        )
        local = stages[-1]
    else:
        final = local = model.forward_features(image)
        if final.ndim == 3:
            local = final[:, getattr(model, "num_prefix_tokens", 0) :]
        elif getattr(model, "output_fmt", "NCHW") == "NHWC":
            local = final.permute(0, 3, 1, 2)
    return model.forward_head(final, pre_logits=True), local


def _create_backbone(config: ImageConfig, size: int) -> Any:
    """The timm model without classifier, at the input size where it has one."""
    if not timm.is_model(config.name.split(".")[0]) and ":" not in config.name:
        raise EncoderError(unknown_model(config.name))
    options = {"num_classes": 0, "in_chans": config.in_channels, **plain_options(config.options)}
    if refused := sorted(_REFUSED.keys() & options.keys()):
        raise EncoderError(f"image.options.{refused[0]}: {_REFUSED[refused[0]]}")
    options["pretrained"] = config.pretrained
    weights = read_weights(config.weights) if config.weights is not None else None
    if weights is not None:
        # timm's loader then adapts input channels, position embeddings and drops the classifier.
        options["pretrained"] = True
        options["pretrained_cfg_overlay"] = {"state_dict": dict(weights), "custom_load": False}
    try:
        with quiet_hub():
            model = at_size(config.name, size, options)
    except (TypeError, ValueError, RuntimeError, AssertionError, OSError, KeyError) as error:
        where = f"image.weights={config.weights}" if config.weights else wrong_option(config, size)
        raise EncoderError(
            f"image.name={config.name} cannot be built ({where}): {hub_reason(error)}"
        ) from error
    if weights is not None:
        _check_complete(model, weights, config)
    if config.gradient_checkpointing:
        try:
            model.set_grad_checkpointing(True)
        except (AssertionError, AttributeError) as error:
            raise EncoderError(
                f"image.gradient_checkpointing=true: {config.name} does not support it"
            ) from error
    return model


def _check_patch_size(model: Any, config: ImageConfig, size: int) -> None:
    """Refuse images that whole patches do not cover: timm would leave out the last rows and columns."""
    patch_embed = getattr(model, "patch_embed", None)
    patch = getattr(patch_embed, "patch_size", None)
    if patch is None or getattr(patch_embed, "dynamic_img_pad", False):
        return
    side = patch[0] if isinstance(patch, tuple) else patch
    if size < side or size % side:
        raise EncoderError(
            f"image.name={config.name} cuts images into patches of {side} pixels, which do not divide "
            f"{size}: set data.image_size or image.resize_to to a multiple"
        )


def _stages(model: Any) -> list[dict[str, Any]]:
    """What timm says of each stage (of each block of a transformer); [] where it says nothing."""
    info = getattr(model, "feature_info", None)
    return info if isinstance(info, list) else list(getattr(info, "get_dicts", list)())


def _end_at_stage(model: Any, stage: int | None, name: str) -> None:
    """Remove the stages after `stage`, which would neither be used nor trained."""
    pool = getattr(getattr(model, "global_pool", None), "pool_type", None)
    try:
        model.prune_intermediate_layers([stage], prune_norm=False, prune_head=False)
        if pool is not None:  # convolutional models lose their pooling with the stages
            model.reset_classifier(0, pool)
    except (AttributeError, AssertionError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise EncoderError(
            f"image.name={name} cannot end at image.local_stage={stage}: {' '.join(str(error).split())}"
        ) from error


def _check_complete(model: nn.Module, weights: dict[str, Tensor], config: ImageConfig) -> None:
    """Refuse weights that left parameters at random (timm's loader says so only in its log)."""
    rename = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    given = set(rename(dict(weights), model) if rename else weights)
    missing = sorted(name for name, _ in model.named_parameters() if name not in given)
    if missing:
        shown = ", ".join(missing[:3])
        raise EncoderError(
            f"image.weights={config.weights} lacks {len(missing)} parameters of {config.name}: {shown}"
        )
