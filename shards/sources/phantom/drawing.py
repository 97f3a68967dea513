"""How each finding changes the scene. Every function draws one finding on one side and returns its region.

A region is float32 coverage in [0, 1] on the canvas; mask and box come from it. `strength` is the contrast:
about 0.7 to 1.1 for a certain finding and half of it for a hedged one.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from shards.sources.phantom.anatomy import ORDINALS, RIBS, SIGNS
from shards.sources.phantom.canvas import Image, as_float, blob, smooth
from shards.sources.phantom.findings import Finding
from shards.sources.phantom.scene import Scene
from shards.sources.phantom.seeds import Stream, generator

Draw = Callable[[Scene, Finding, str, float, np.random.Generator], Image]

ZONES = {"upper": (0.14, 0.34), "mid": (0.42, 0.60), "lower": (0.68, 0.88), "": (0.2, 0.8)}


def _place(finding: Finding, rng: np.random.Generator, low: float, high: float) -> tuple[float, float]:
    """A (u, v) in the finding's zone."""
    return rng.uniform(low, high), rng.uniform(*ZONES[finding.zone])


def effusion(scene: Scene, finding: Finding, side: str, strength: float, rng: np.random.Generator) -> Image:
    """Fluid at the base with a meniscus that climbs the chest wall; the angle is lost."""
    level = (0.90, 0.76, 0.56)[finding.severity - 1] + rng.uniform(-0.06, 0.06)
    climb = rng.uniform(0.16, 0.32)
    u = np.linspace(0.0, 1.0, 14)
    start = rng.uniform(0.0, 0.35) if finding.severity == 1 else 0.0
    top = level - climb * u**3 + max(0.0, start) * (1.0 - u) ** 2
    surface = scene.anatomy.lung(side, u, np.minimum(top, 1.02))
    wall = scene.anatomy.lung(side, 1.02, np.linspace(min(top[-1], 1.0), 1.03, 8))
    floor = scene.anatomy.lung(side, u[::-1], 1.03)
    region = scene.frame.fill(np.vstack([surface, wall, floor]))
    scene.opacify(scene.frame.blur(region, 0.012), 0.92 * strength)
    return region * (scene.lungs[side] > 0.1)


def pneumothorax(
    scene: Scene, finding: Finding, side: str, strength: float, rng: np.random.Generator
) -> Image:
    """Air between chest wall and lung: no markings outside a thin sharp pleural line."""
    depth = (0.14, 0.22, 0.36)[finding.severity - 1] + rng.uniform(-0.02, 0.03)
    end = rng.uniform(0.5, 0.9)
    v = np.linspace(0.0, end, 16)
    taper = np.clip((end - v) / end, 0.0, 1.0) ** 0.5
    wall = scene.anatomy.lung(side, 1.0, v)
    edge = scene.anatomy.lung(side, 1.0 - depth * taper, v + 0.10 * (1.0 - v) ** 3 * (1.0 + depth))
    tip = scene.anatomy.lung(side, np.linspace(0.25, 0.9, 5), 0.0)
    edge = np.vstack([scene.anatomy.lung(side, 0.12, 0.06), edge])
    region = scene.frame.fill(np.vstack([tip, wall, edge[::-1]])) * scene.lungs[side]
    scene.inflate(region, 0.35 * strength, 0.1)
    line = scene.frame.blank()
    scene.frame.stroke(line, smooth(edge), 0.018)
    scene.density += 0.20 * strength * as_float(line) * scene.lungs[side]
    return region


def consolidation(
    scene: Scene, finding: Finding, side: str, strength: float, rng: np.random.Generator
) -> Image:
    """A patchy white area with a ragged border and dark branching air bronchograms."""
    u, v = _place(finding, rng, 0.35, 0.65)
    centre = scene.anatomy.lung(side, u, v)[0]
    radius = (0.15, 0.18, 0.22)[finding.severity - 1] * rng.uniform(0.95, 1.15)
    region = scene.frame.fill(blob(rng, centre, radius, 0.16, rng.uniform(0.9, 1.2))) * scene.lungs[side]
    patches = 0.95 + 0.25 * scene.frame.noise(rng, 0.045)
    cover = np.clip(scene.frame.blur(region, 0.02) * patches, 0.0, 1.0)
    tubes = scene.frame.blank()
    for _ in range(3 + finding.severity):
        angle = rng.uniform(0.0, 2.0 * np.pi)
        step = radius * np.array([np.cos(angle), np.sin(angle)])
        branch = np.vstack(
            [centre - 0.1 * step, centre + 0.4 * step, centre + 0.9 * step + rng.normal(0, 0.03, 2)]
        )
        scene.frame.stroke(tubes, smooth(branch), 0.030)
    scene.opacify(cover * (1.0 - 0.85 * as_float(tubes)), strength)
    return region


def nodule(scene: Scene, finding: Finding, side: str, strength: float, rng: np.random.Generator) -> Image:
    """One small round opacity with a crisp border."""
    u, v = _place(finding, rng, 0.3, 0.8)
    radius = (0.054, 0.064, 0.075)[finding.severity - 1] * rng.uniform(0.95, 1.08)
    region = scene.frame.fill(blob(rng, scene.anatomy.lung(side, u, v)[0], radius, 0.03))
    scene.opacify(region, 0.9 * strength)
    scene.density += 0.12 * strength * region
    return region


def mass(scene: Scene, finding: Finding, side: str, strength: float, rng: np.random.Generator) -> Image:
    """A large homogeneous lobulated opacity with a crisp border and spicules."""
    u, v = _place(finding, rng, 0.3, 0.65)
    centre = scene.anatomy.lung(side, u, v)[0]
    radius = (0.12, 0.145, 0.18)[finding.severity - 1] * rng.uniform(0.95, 1.1)
    region = scene.frame.fill(blob(rng, centre, radius, 0.07))
    spicules = scene.frame.blank()
    for angle in rng.uniform(0.0, 2.0 * np.pi, int(rng.integers(5, 12))):
        ray = radius * np.array([np.cos(angle), np.sin(angle)])
        scene.frame.stroke(
            spicules, np.vstack([centre + 0.8 * ray, centre + rng.uniform(1.3, 1.7) * ray]), 0.014
        )
    scene.opacify(np.maximum(region, 0.6 * as_float(spicules)), 0.9 * strength)
    scene.density += 0.05 * strength * region
    return region


def edema(scene: Scene, finding: Finding, side: str, strength: float, rng: np.random.Generator) -> Image:
    """Perihilar haze, and stacks of short horizontal septal lines at the periphery."""
    level = finding.severity / 3.0
    centre = scene.anatomy.lung(side, 0.22, 0.52)[0]
    haze = scene.frame.fill(blob(rng, centre, 0.24 + 0.06 * level, 0.1, 1.15)) * scene.lungs[side]
    grainy = np.clip(0.85 + 0.35 * scene.frame.noise(rng, 0.06), 0.0, 1.4)
    scene.opacify(scene.frame.blur(haze, 0.07) * grainy, (0.3 + 0.25 * level) * strength)
    lines = scene.frame.blank()
    low = scene.frame.blank()
    for v in np.arange(rng.uniform(0.40, 0.55), 0.95, 0.055):
        outer = rng.uniform(0.93, 0.99)
        reach = rng.uniform(0.16, 0.30) * (0.8 + 0.4 * level)
        line = scene.anatomy.lung(side, np.array([outer - reach, outer]), np.array([v, v + 0.01]))
        scene.frame.stroke(lines, line, 0.017)
        scene.frame.stroke(low, line, 0.07)
    scene.density += (0.15 + 0.06 * level) * strength * as_float(lines) * scene.lungs[side]
    return np.asarray(np.maximum(haze, as_float(low)) * scene.lungs[side], np.float32)


def atelectasis(
    scene: Scene, finding: Finding, side: str, strength: float, rng: np.random.Generator
) -> Image:
    """One to three dense plate-like bands, nearly horizontal."""
    u, v = _place(finding, rng, 0.45, 0.6)
    centre = scene.anatomy.lung(side, u, v)[0]
    canvas = scene.frame.blank()
    tilt = rng.uniform(-0.4, 0.4)
    for number in range(finding.severity):
        half = rng.uniform(0.14, 0.21)
        run = np.linspace(-half, half, 7)
        bow = rng.uniform(-0.8, 0.8) * (run**2 - half**2)
        middle = centre + np.array([rng.normal(0.0, 0.02), 0.085 * (number - 0.5 * (finding.severity - 1))])
        scene.frame.stroke(
            canvas, middle + np.column_stack([run, tilt * run + bow]), rng.uniform(0.030, 0.045)
        )
    region = as_float(canvas) * scene.lungs[side]
    scene.opacify(region, 0.85 * strength)
    scene.density += 0.05 * strength * region
    return region


def emphysema(scene: Scene, finding: Finding, side: str, strength: float, rng: np.random.Generator) -> Image:
    """Dark lungs with few markings and thin-walled bullae (`render.diseased` flattens the diaphragm)."""
    scene.inflate(scene.lungs[side], 0.10 * strength, 0.55)
    walls, inside = scene.frame.blank(), np.zeros_like(scene.air)
    for _ in range(1 + finding.severity + int(rng.integers(0, 3))):
        centre = scene.anatomy.lung(side, rng.uniform(0.2, 0.8), rng.uniform(0.08, 0.62))[0]
        ring = blob(rng, centre, rng.uniform(0.06, 0.12), 0.04, rng.uniform(0.9, 1.1))
        inside = np.maximum(inside, scene.frame.fill(ring))
        scene.frame.stroke(walls, np.vstack([ring, ring[:1]]), 0.015)
    scene.inflate(inside, 0.25 * strength, 0.0)
    scene.density += 0.15 * strength * as_float(walls) * scene.lungs[side]
    return inside * scene.lungs[side]


def fractured_bones(finding: Finding) -> tuple[str, ...]:
    """The broken bones: one clavicle, or two to four ribs in a row ("rib 0" to "rib 8")."""
    rng = generator(finding.shape_seed, Stream.BONES)
    if finding.zone == "upper" and rng.random() < 0.4:
        return ("clavicle",)
    first = {"upper": 1, "mid": 2, "lower": 4}[finding.zone] + int(rng.integers(2))
    return tuple(f"rib {number}" for number in range(first, min(first + finding.severity + 1, RIBS)))


def bone_name(bone: str) -> str:
    """The anatomical name reports and entities use."""
    return bone if bone == "clavicle" else f"{ORDINALS[int(bone.split()[1])]} rib"


def fracture(scene: Scene, finding: Finding, side: str, strength: float, rng: np.random.Generator) -> Image:
    """Cortex broken through: a gap, a displaced outer fragment, dense impacted ends."""
    at = rng.uniform(0.38, 0.62)
    region = np.zeros_like(scene.air)
    ends = scene.frame.blank()
    for bone in fractured_bones(finding):
        where = float(np.clip(at + rng.normal(0.0, 0.03), 0.34, 0.68))
        offset = rng.choice([-1.0, 1.0]) * rng.uniform(0.055, 0.07) * (0.6 + 0.4 * strength)
        scene.breaks.append((bone, side, where, offset))
        body = scene.anatomy
        line = body.clavicle(side) if bone == "clavicle" else body.rib(side, int(bone.split()[1]))
        spot = np.array([np.interp(where, np.linspace(0, 1, len(line)), column) for column in line.T])
        region = np.maximum(region, scene.frame.fill(blob(rng, spot, 0.085, 0.0)))
        for shift in (-0.034, 0.034):
            end = spot + np.array([shift * SIGNS[side], (offset if shift > 0 else 0.0)])
            tick = np.array([[0.0, -0.040], [0.0, 0.040]])
            scene.frame.stroke(ends, end + tick, 0.026)
    scene.density += 0.26 * strength * as_float(ends)
    return region


def device(scene: Scene, finding: Finding, side: str, strength: float, rng: np.random.Generator) -> Image:
    """A catheter, pacemaker, endotracheal tube or chest tube: uniformly bright, smooth, with a dense tip."""
    body, frame, canvas = scene.anatomy, scene.frame, scene.frame.blank()
    sign = SIGNS.get(side, 1.0)
    cava = np.array([-0.09, -0.12 + rng.uniform(-0.05, 0.15)])
    if finding.kind == "central venous catheter":
        start = [[sign * 0.2, -1.3], [sign * 0.17, body.apex + 0.1]] if rng.random() < 0.5 else [
            [sign * 0.7, body.apex + 0.3], [sign * 0.4, body.apex + 0.17]]  # fmt: skip
        line = smooth(
            np.vstack([start, [[-0.02 + 0.05 * sign, body.apex + 0.3], [-0.09, -0.3]], cava]), rounds=3
        )
        frame.stroke(canvas, line, 0.024)
        frame.stroke(canvas, line[-2:], 0.04)
    elif finding.kind == "pacemaker":
        box = np.array([sign * rng.uniform(0.5, 0.62), body.apex + rng.uniform(0.22, 0.34)])
        lead = np.vstack(
            [box, [box[0] - 0.2 * sign, box[1] - 0.1], [-0.05, -0.4], cava, [0.05, 0.25], [0.26, 0.4]]
        )
        frame.stroke(canvas, smooth(lead, rounds=3), 0.022)
        can = np.asarray(frame.fill(blob(rng, box, 0.12, 0.0, 1.15)) * 255.0, np.uint8)
        np.maximum(canvas, can, out=canvas)
    elif finding.kind == "endotracheal tube":
        for x in (-0.03, 0.03):
            tube = np.array([[x, -1.4], [x + 0.01, -0.8], [x + 0.02, rng.uniform(-0.46, -0.36)]])
            frame.stroke(canvas, smooth(tube), 0.02)
    else:
        entry = body.lung(side, 1.25, rng.uniform(0.5, 0.7))[0]
        inner = body.lung(side, np.array([0.8, 0.55]), np.array([0.5, rng.uniform(0.15, 0.3)]))
        for shift in (0.0, 0.045):
            frame.stroke(canvas, smooth(np.vstack([entry, inner]) + np.array([0.0, shift]), rounds=3), 0.02)
    shadow = as_float(canvas)
    scene.density += rng.uniform(0.28, 0.42) * strength * shadow
    return shadow


def thickening(scene: Scene, finding: Finding, side: str, strength: float, rng: np.random.Generator) -> Image:
    """A wavy rind along the chest wall with a calcified inner edge."""
    middle = rng.uniform(*ZONES[finding.zone])
    half = (0.12, 0.16, 0.2)[finding.severity - 1]
    v = np.linspace(max(0.02, middle - half), min(0.97, middle + half), 18)
    bumps = (
        0.14 + 0.03 * finding.severity + 0.035 * np.sin(np.linspace(0, 6 * np.pi, 18) + rng.uniform(0, 6.3))
    )
    inner = 1.0 - bumps * np.sqrt(np.sin(np.linspace(0.15, np.pi - 0.15, 18)))
    wall = scene.anatomy.lung(side, 1.0, v)
    edge = scene.anatomy.lung(side, inner, v)
    region = scene.frame.fill(np.vstack([wall, edge[::-1]]))
    scene.opacify(region, 0.9 * strength)
    calcium = scene.frame.blank()
    for piece in range(0, 17, 3):
        scene.frame.stroke(calcium, edge[piece : piece + 3], 0.032)
    scene.density += 0.24 * strength * as_float(calcium)
    return region


def heart(scene: Scene, finding: Finding, side: str, strength: float, rng: np.random.Generator) -> Image:
    """The enlarged heart is part of the posed anatomy; this returns its region."""
    return scene.frame.fill(scene.anatomy.heart_outline())


DRAW: dict[str, Draw] = {
    "pleural effusion": effusion,
    "pneumothorax": pneumothorax,
    "cardiomegaly": heart,
    "consolidation": consolidation,
    "nodule": nodule,
    "mass": mass,
    "edema": edema,
    "atelectasis": atelectasis,
    "emphysema": emphysema,
    "fracture": fracture,
    "support device": device,
    "pleural thickening": thickening,
}
