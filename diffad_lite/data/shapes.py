"""A synthetic scene: a disc with a hole at the centre of a striped tray, grey, 64x64.

Structural defects change the texture somewhere (dent, scratch, stain). Logical defects keep each
neighbourhood plausible and break the scene: the object is missing, doubled or misplaced.
"""

import numpy as np

SIZE = 64
KINDS = ("dent", "scratch", "stain", "missing", "second", "misplaced")


def draw_shape(kind: str, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw scene ``index`` of a kind, "good" or in ``KINDS``: uint8 (1, 64, 64), mask (64, 64)."""
    number = 0 if kind == "good" else 1 + KINDS.index(kind)
    rng = np.random.default_rng([number, index])
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float64)
    tray = 0.35 + 0.08 * np.sin(2 * np.pi * (y + rng.uniform(0, 8)) / 8)
    cy, cx = 32 + rng.uniform(-2, 2, 2)
    radius, shade = rng.uniform(10, 12), rng.uniform(0.75, 0.85)
    angle = rng.uniform(0, 2 * np.pi)

    def disc(cy: float, cx: float) -> np.ndarray:
        distance = np.hypot(y - cy, x - cx)
        return np.clip(radius - distance, 0, 1) * np.clip(distance - 3, 0, 1)  # the hole

    normal = tray + disc(cy, cx) * (shade - tray)
    scene = normal.copy()
    if kind in ("missing", "misplaced"):
        scene = tray.copy()
    if kind in ("second", "misplaced"):
        corner = rng.choice([13, 51], 2) + rng.uniform(-1, 1, 2)
        scene = scene + disc(*corner) * (shade - tray)
    py, px = cy + 0.8 * radius * np.sin(angle), cx + 0.8 * radius * np.cos(angle)
    if kind == "dent":
        scene = np.where(np.hypot(y - py, x - px) < rng.uniform(3, 5), tray, scene)
    if kind == "stain":
        spot = np.exp(-((y - py) ** 2 + (x - px) ** 2) / (2 * rng.uniform(2, 3.5) ** 2))
        scene = scene - 0.4 * spot
    if kind == "scratch":
        along = (y - py) * np.sin(angle + 1) + (x - px) * np.cos(angle + 1)
        across = (y - py) * np.cos(angle + 1) - (x - px) * np.sin(angle + 1)
        scene = scene + 0.35 * (np.abs(across) < 0.8) * (np.abs(along) < rng.uniform(6, 10))
    mask = np.abs(scene - normal) > 0.03
    noisy = scene + 0.02 * rng.standard_normal(scene.shape)
    return (noisy.clip(0, 1) * 255).round().astype(np.uint8)[None], mask
