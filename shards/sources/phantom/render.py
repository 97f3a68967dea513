"""From a patient's anatomy and findings to pixels, masks and boxes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.typing import NDArray

from shards.sources.phantom.anatomy import Anatomy
from shards.sources.phantom.canvas import Frame, Image
from shards.sources.phantom.drawing import DRAW
from shards.sources.phantom.findings import FINDINGS, Finding
from shards.sources.phantom.scene import Scene, expose
from shards.sources.phantom.seeds import Stream, generator
from shards.study import Box

#: Small images are drawn on a canvas of at least this many pixels and reduced: thin lines keep their width.
MIN_CANVAS = 256
_INSIDE = 0.35  # coverage from which a pixel belongs to a region; below one half, so thin lines have pixels


@dataclass(frozen=True)
class Rendering:
    """One study as it is drawn.

    Attributes:
        image: uint8 [size, size].
        masks: finding -> uint8 [size, size], 0 or 1; all findings, zeros for those that are not drawn.
        boxes: in pixels, one per finding and side.
        anatomy: boxes of the lungs and the heart.
    """

    image: NDArray[np.uint8]
    masks: dict[str, NDArray[np.uint8]]
    boxes: list[Box]
    anatomy: list[Box]


def diseased(anatomy: Anatomy, findings: Sequence[Finding]) -> Anatomy:
    """The anatomy as cardiomegaly (wide heart) and emphysema (low flat diaphragm) shape it."""
    for finding in findings:
        rng = generator(finding.shape_seed, Stream.ANATOMY)
        if finding.name == "cardiomegaly":
            ratio = (0.56, 0.61, 0.67)[finding.severity - 1] + rng.uniform(-0.015, 0.02)
            anatomy = replace(anatomy, heart_ratio=ratio if finding.certain else rng.uniform(0.51, 0.54))
        elif finding.name == "emphysema":
            flat = 0.55 if finding.certain else 0.8
            anatomy = replace(
                anatomy,
                angle=anatomy.angle + 0.08 * (1.0 - flat),
                dome_left=anatomy.dome_left * flat,
                dome_right=anatomy.dome_right * flat,
            )
    return anatomy


def render(
    anatomy: Anatomy, findings: Sequence[Finding], view: str, size: int, seed: int, study: int
) -> Rendering:
    """Draw one study.

    Args:
        anatomy: the healthy patient.
        findings: what to draw; hedged ones are drawn at half strength.
        view: "PA" or "AP"; AP magnifies the heart and shows shoulder blades over the lungs.
        size: side of the image in pixels.
        seed, study: key of pose and exposure.
    """
    rng = generator(seed, Stream.POSE, study)
    canvas = size * -(-MIN_CANVAS // size)
    frame = Frame.posed(
        canvas,
        scale=rng.uniform(0.84, 1.06),
        angle=rng.normal(0.0, 0.055),
        shear=rng.normal(0.0, 0.03),
        shift=(rng.normal(0.0, 0.055), rng.normal(0.05, 0.06)),
    )
    if view == "AP":
        anatomy = replace(anatomy, heart_ratio=anatomy.heart_ratio + 0.02)
    scene = Scene.of(frame, diseased(anatomy, findings), view)
    regions: list[tuple[Finding, str, Image]] = []
    for finding in findings:
        for number, side in enumerate(finding.sides):
            shape = generator(finding.shape_seed, Stream.SHAPE, number)
            strength = shape.uniform(0.7, 1.1) * (1.0 if finding.certain else 0.5)
            regions.append((finding, side, DRAW[finding.name](scene, finding, side, strength, shape)))
    image = expose(scene, generator(seed, Stream.EXPOSURE, study), size)
    masks, boxes = annotate(regions, size)
    return Rendering(image, masks, boxes, anatomy_boxes(scene, size))


def annotate(
    regions: Sequence[tuple[Finding, str, Image]], size: int
) -> tuple[dict[str, NDArray[np.uint8]], list[Box]]:
    """Masks of all findings, whole where others lie over them, and the box of each region."""
    masks = {spec.name: np.zeros((size, size), np.uint8) for spec in FINDINGS}
    boxes = []
    for finding, side, region in regions:
        inside = _pixels(region, size)
        masks[finding.name] |= inside
        boxes.append(_box(finding.name, side, inside))
    return masks, boxes


def anatomy_boxes(scene: Scene, size: int) -> list[Box]:
    """Boxes of the lungs, as they are before any finding fills or moves them, and of the heart."""
    lungs = [_box(f"{side} lung", side, _pixels(lung, size)) for side, lung in scene.lungs.items()]
    heart = scene.frame.fill(scene.anatomy.heart_outline())
    return [*lungs, _box("heart", "", _pixels(heart, size))]


def _pixels(region: Image, size: int) -> NDArray[np.uint8]:
    cover = cv2.resize(region.astype(np.float32), (size, size), interpolation=cv2.INTER_AREA)
    inside = (cover >= min(_INSIDE, float(cover.max()))) & (cover > 0.0)
    return np.asarray(inside, dtype=np.uint8)


def _box(label: str, side: str, inside: NDArray[np.uint8]) -> Box:
    x, y, width, height = cv2.boundingRect(inside)
    return Box(label, float(x), float(y), float(width), float(height), side)
