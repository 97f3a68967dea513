"""The layers of one radiograph: set up from the body, changed by findings, then exposed."""

from __future__ import annotations

from dataclasses import dataclass, field

import cv2
import numpy as np
from numpy.typing import NDArray

from shards.sources.phantom.anatomy import RIBS, SIGNS, Anatomy
from shards.sources.phantom.canvas import Frame, Image, Points, as_float, ellipse, smooth
from shards.sources.phantom.seeds import Stream, generator

#: A broken rib or clavicle: (bone, side, position along it in [0, 1], outer offset in body units).
Break = tuple[str, str, float, float]


@dataclass
class Scene:
    """Layers on the canvas, each float32 [size, size].

    Attributes:
        frame, anatomy: pose and body.
        view: "PA" or "AP".
        air: air in the lungs, 0 (none) to about 1.4 (hyperinflated).
        markings: brightness of the lung vessels.
        density: brightness that findings add on top (lines, calcium, devices).
        lungs: outlines as drawn, by side, before any finding.
        breaks: broken bones, read when the bones are drawn.
    """

    frame: Frame
    anatomy: Anatomy
    view: str
    air: Image
    markings: Image
    density: Image
    lungs: dict[str, Image]
    breaks: list[Break] = field(default_factory=list)

    @classmethod
    def of(cls, frame: Frame, anatomy: Anatomy, view: str) -> Scene:
        """Lungs, heart and vessels of a healthy body."""
        lungs = {side: frame.fill(anatomy.lung_outline(side)) for side in SIGNS}
        heart = frame.blur(frame.fill(anatomy.heart_outline()), 0.012)
        air = frame.blur(lungs["left"] + lungs["right"], 0.008) * (1.0 - 0.88 * heart)
        markings = vessels(frame, anatomy)
        return cls(frame, anatomy, view, air, markings, np.zeros_like(air), lungs)

    def opacify(self, cover: Image, strength: float) -> None:
        """Replace air by tissue or fluid where `cover` (0 to 1) lies."""
        self.air *= 1.0 - np.clip(strength * cover, 0.0, 1.0)

    def inflate(self, cover: Image, amount: float, markings: float) -> None:
        """Add air inside the lungs where `cover` lies and keep a share of the vessel markings."""
        self.air += amount * cover * np.minimum(self.air, 1.0)
        self.markings *= 1.0 - (1.0 - markings) * cover


def vessels(frame: Frame, anatomy: Anatomy) -> Image:
    """Branching lung vessels from the hila outwards, thinner and fainter as they go."""
    rng = generator(anatomy.marking_seed, Stream.VESSELS)
    canvas = frame.blank()
    count, run = anatomy.vessels, np.linspace(0.0, 1.0, 7)
    trunks, twigs = [], []
    for side in SIGNS:
        ends = rng.uniform(0.08, 0.98, (count, 1))
        u = rng.uniform(0.45, 0.92, (count, 1)) * run
        v = 0.5 + (ends - 0.5) * run**0.8 + np.cumsum(rng.normal(0.0, 0.018, (count, 7)), axis=1)
        trunk = anatomy.lung(side, u, np.clip(v, 0.04, 0.99)).reshape(count, 7, 2)
        forks = trunk[np.arange(count), rng.integers(2, 5, count)]
        tips = forks + (trunk[:, -1] - forks) * rng.uniform(0.6, 1.0, (count, 1))
        middle = 0.5 * (forks + tips) + rng.normal(0.0, 0.02, (count, 2))
        trunks.append(trunk)
        twigs.append(np.stack([forks, middle, tips + rng.normal(0.0, 0.05, (count, 2))], axis=1))
        hilum = anatomy.lung(side, np.array([0.02, 0.13, 0.10]), np.array([0.40, 0.50, 0.62]))
        frame.stroke(canvas, smooth(hilum), 0.10, 0.75)
    for part, shade in enumerate((0.75, 0.5, 0.3)):
        pieces = np.concatenate(trunks)[:, 2 * part : 2 * part + 3]
        frame.strokes(canvas, list(pieces), 0.032 - 0.009 * part, shade)
    frame.strokes(canvas, list(np.concatenate(twigs)), 0.013, 0.4)
    return frame.blur(as_float(canvas), 0.007)


def _broken(line: Points, at: float, offset: float) -> tuple[Points, Points]:
    """Cut a centre line at `at`, leaving a gap, and displace its outer part sideways."""
    dense = np.column_stack(
        [np.interp(np.linspace(0, 1, 60), np.linspace(0, 1, len(line)), c) for c in line.T]
    )
    cut = int(np.clip(at * 60, 4, 56))
    direction = dense[min(cut + 2, 59)] - dense[cut - 2]
    direction /= np.linalg.norm(direction)
    normal = np.array([-direction[1], direction[0]])
    return dense[: cut - 1], dense[cut + 2 :] + offset * normal


def bones(scene: Scene) -> Image:
    """Brightness of ribs, clavicles and spine, with the breaks of `scene.breaks`."""
    frame, body = scene.frame, scene.anatomy
    inside, edge, front, spine = (frame.blank() for _ in range(4))
    broken = {(bone, side): (at, offset) for bone, side, at, offset in scene.breaks}
    ribs: list[Points] = []
    clavicles: list[Points] = []
    fronts: list[Points] = []
    for side in SIGNS:
        centres = {f"rib {number}": body.rib(side, number) for number in range(RIBS)}
        centres["clavicle"] = body.clavicle(side)
        for bone, line in centres.items():
            at, offset = broken.get((bone, side), (0.0, 0.0))
            parts = _broken(line, at, offset) if at else (line,)
            (clavicles if bone == "clavicle" else ribs).extend(parts)
        fronts += [body.rib(side, number, front=True) for number in range(1, 7)]
    for lines, width in ((ribs, body.rib_width), (clavicles, 0.055)):
        frame.strokes(edge, lines, width)
        frame.strokes(inside, lines, 0.55 * width)
    frame.strokes(front, fronts, 1.1 * body.rib_width, 0.8)
    heights = np.arange(-1.1, 1.1, 0.105)
    frame.strokes(spine, [np.array([[-body.spine, y], [body.spine, y]]) for y in heights], 0.075, 0.8)
    hard = as_float(edge) - 0.45 * as_float(inside)
    soft = 0.45 * frame.blur(as_float(front), 0.012) + 0.55 * frame.blur(as_float(spine), 0.015)
    return np.asarray(frame.blur(hard, 0.006) + soft, np.float32)


def torso(frame: Frame, body: Anatomy) -> Image:
    """Thickness of soft tissue, 0 outside the body to about 1."""
    side, top = body.half_width + body.fat, body.apex
    half = [[0.0, -1.6], [0.2, -1.6], [0.22, top - 0.28], [body.shoulder, top + 0.1], [1.25, 0.1], [1.2, 0.6]]
    half += [[side + 0.06, 0.25], [side, 0.8], [side + 0.03, 1.7], [0.0, 1.7]]
    right = np.array(half)
    outline = smooth(np.vstack([right, right[::-1] * [-1.0, 1.0]]), closed=True)
    whole = frame.blur(frame.fill(outline), 0.03)
    return np.asarray(0.62 * whole + 0.38 * frame.blur(whole, 0.22), np.float32)


def soft_shadows(frame: Frame, body: Anatomy, view: str, rng: np.random.Generator) -> Image:
    """Brightness of mediastinum, abdomen, breasts, shoulder blades, folds, less trachea and bowel gas."""
    column = np.array([[-0.15, -1.3], [0.15, -1.3], [0.17, 1.3], [-0.17, 1.3]])
    shade = 0.5 * frame.blur(frame.fill(column), 0.05)
    belly = np.array([[-1.2, body.angle - 0.05], [1.2, body.angle - 0.05], [1.2, 1.8], [-1.2, 1.8]])
    shade += 0.35 * frame.blur(frame.fill(belly), 0.15)
    trachea = np.array([[0.0, -1.3], [0.01, body.apex], [0.02, -0.22]])
    shade -= 0.45 * frame.blur(frame.line(trachea, 0.085), 0.012)
    breasts, blades = [], []
    for sign in SIGNS.values():
        centre = np.array([sign * rng.uniform(0.34, 0.48), rng.uniform(0.25, 0.5)])
        breasts.append(ellipse(centre, 0.26 + 0.12 * body.breast, 0.25 + 0.11 * body.breast))
        inner = body.half_width + (rng.uniform(-0.22, -0.05) if view == "AP" else rng.uniform(0.0, 0.15))
        blade = np.array([[inner, -0.5], [inner - 0.04, -0.1], [inner + 0.1, 0.2], [1.1, 0.0], [1.0, -0.6]])
        blades.append(smooth(blade * [sign, 1.0], closed=True))
    if body.breast > 0.0:
        shade += 0.45 * body.breast * frame.blur(frame.fill(*breasts), 0.035)
    shade += 0.22 * frame.blur(frame.fill(*blades), 0.012)
    if rng.random() < 0.6:
        bubble = np.array([rng.uniform(0.2, 0.5), body.angle + rng.uniform(-0.04, 0.10)])
        gas = ellipse(bubble, rng.uniform(0.08, 0.2), 0.07)
        below = 1.0 - frame.fill(body.lung_outline("left"))
        shade -= 0.6 * frame.blur(frame.fill(gas), 0.02) * below
    for _ in range(int(rng.integers(0, 3))):
        start = np.array([rng.uniform(-0.9, 0.9), rng.uniform(-0.3, 0.2)])
        fold = start + np.array([[0.0, 0.0], [rng.normal(0, 0.15), 0.4], [rng.normal(0, 0.25), 0.9]])
        shade += 0.10 * frame.blur(frame.line(smooth(fold), 0.2), 0.04)
    return np.asarray(shade, np.float32)


def clutter(frame: Frame, rng: np.random.Generator) -> Image:
    """Things on the patient that mean nothing: monitor electrodes with their wires, a side marker."""
    canvas = frame.blank()
    if rng.random() < 0.4:
        for _ in range(int(rng.integers(1, 4))):
            spot = np.array([rng.choice([-1.0, 1.0]) * rng.uniform(0.3, 0.8), rng.uniform(-0.6, 0.6)])
            away = np.array([spot[0] * rng.uniform(1.4, 2.2), spot[1] + rng.uniform(0.3, 0.9)])
            bend = 0.5 * (spot + away) + rng.normal(0.0, 0.08, 2)
            frame.stroke(canvas, smooth(np.vstack([spot, bend, away])), 0.014, 0.35)
            frame.stroke(canvas, ellipse(spot, 0.035, 0.035), 0.02, 0.6)
    if rng.random() < 0.6:
        corner = np.array([rng.choice([-0.9, 0.9]), rng.uniform(-0.95, -0.7)])
        letter = corner + np.array([[0.0, -0.06], [0.0, 0.06], [0.05, 0.06]])
        frame.stroke(canvas, letter, 0.025, 0.9)
    return as_float(canvas)


def expose(scene: Scene, rng: np.random.Generator, size: int) -> NDArray[np.uint8]:
    """Add everything up, scatter, expose, add quantum noise -> uint8 [size, size]."""
    frame, body = scene.frame, scene.anatomy
    thickness = torso(frame, body)
    light = 0.58 * thickness + 0.22 * soft_shadows(frame, body, scene.view, rng) * thickness
    visible = np.clip(scene.air, 0.0, 1.5)
    light += -0.44 * visible + 0.22 * scene.markings * visible
    light += rng.uniform(0.10, 0.15) * bones(scene) + scene.density
    light += 0.5 * clutter(frame, rng)
    light += 0.02 * frame.noise(rng, 0.25)
    light = 0.88 * light + 0.12 * frame.blur(np.asarray(light, np.float32), 0.25)
    ramp = np.linspace(-0.5, 0.5, frame.size, dtype=np.float32)
    light += rng.normal(0.0, 0.06) * ramp[None, :] + rng.normal(0.0, 0.06) * ramp[:, None]
    light = np.asarray(rng.uniform(0.85, 1.15) * light + rng.normal(0.04, 0.05), np.float32)
    light = cv2.resize(np.asarray(light, np.float32), (size, size), interpolation=cv2.INTER_AREA)
    light = np.clip(light, 0.0, 1.1) ** np.float32(rng.uniform(0.75, 1.35))
    dose = rng.uniform(0.006, 0.028)
    grain = rng.standard_normal((size, size), np.float32)
    light += dose * np.sqrt(np.clip(1.1 - light, 0.05, 1.1)) * grain
    return np.asarray(np.clip(light * 235.0, 0.0, 255.0) + 0.5, np.float32).astype(np.uint8)
