"""Test-only defects with exact masks and a severity, planted on normal images.

Hyper-parameters may be chosen on the `development` kinds alone, and no method and no training code
may import this module.
"""

import hashlib
import itertools
from collections.abc import Iterable, Sequence

import numpy as np
from scipy import ndimage

KINDS: dict[str, tuple[str, ...]] = {
    "cells": ("crack", "inactive", "finger", "spot", "mirror"),  # as electroluminescence shows
    "lesions": ("blob", "scramble", "displace"),  # for any texture or organ
    "development": ("scratch", "stain"),  # built differently from the test kinds above
}

_EDGE = 0.1  # a soft edge belongs to the defect down to this weight
_BLACK = 8  # a pixel at most this bright before and after is background
_Planted = tuple[np.ndarray, np.ndarray]  # image (C, H, W), region of the defect (H, W) bool


def plant_defect(image: np.ndarray, kind: str, *, seed: int, severity: float = 1.0) -> _Planted:
    """Plant one defect on a normal image; the mask is True exactly where some channel changed.

    A pixel of the defect that drawing and rounding leave as it was moves by one grey level.
    Background that is black before and after (at most 8 of 255) does not count as defect.

    Args:
        image: uint8 (C, H, W), C = 1, 3 or 4, H and W at least 16; it is not modified.
        kind: a name out of `KINDS`.
        seed: integer >= 0; the same arguments give the same defect.
        severity: in (0, 2], for contrast and size; 1 is clearly visible, 0.3 is hard to see.

    Returns:
        The image with the defect, uint8 (C, H, W), and its mask, bool (H, W), never empty.

    Raises:
        ValueError: wrong dtype or shape, unknown kind, or severity out of range.
    """
    _check(image, kind, severity)
    clean = image.astype(np.float32)
    drawn, region = getattr(_Brush(clean, np.random.default_rng(seed), severity), kind)()
    drawn = drawn.clip(0, 255)
    seen = region & (np.maximum(clean, drawn).max(axis=0) > _BLACK)
    mask = seen if np.count_nonzero(seen) > 3 else region  # all black: no choice
    planted = np.where(mask, np.rint(drawn), clean)
    unchanged = mask & (planted == clean).all(axis=0)
    step = np.where((drawn > clean) | (clean == 0), 1, -1)
    return (planted + unchanged * step).astype(np.uint8), mask


def plant_on(
    images: Sequence[np.ndarray], family: str, *, seed_names: Sequence[str], severity: float = 1.0
) -> tuple[list[np.ndarray], list[np.ndarray], list[str]]:
    """Plant one defect on each image; image i gets kind i modulo the number of kinds.

    The seed is a hash of the image's name and kind: neither order nor other images matter to it.

    Args:
        images: normal images, each uint8 (C, H, W) as in `plant_defect`; sizes may differ.
        family: "cells", "lesions" or "development".
        seed_names: one name an image, for instance its file name.
        severity: in (0, 2], the same for all images.

    Returns:
        Images with a defect, uint8 (C, H, W); masks, bool (H, W); kinds: three lists, in order.

    Raises:
        ValueError: unknown family, lists of different length, or an input as in `plant_defect`.
    """
    if family not in KINDS:
        raise ValueError(f"plant_on: unknown family {family!r}; choose one of {sorted(KINDS)}")
    if (n := len(images)) != len(seed_names):
        raise ValueError(f"plant_on: {n} images, {len(seed_names)} seed_names; give one an image")
    kinds = list(itertools.islice(itertools.cycle(KINDS[family]), n))
    pairs = []
    for image, name, kind in zip(images, seed_names, kinds, strict=True):
        seed = int.from_bytes(hashlib.sha256(f"{name}\n{kind}".encode()).digest()[:8], "big")
        try:
            pairs.append(plant_defect(image, kind, seed=seed, severity=severity))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return [planted for planted, _ in pairs], [mask for _, mask in pairs], kinds


def _check(image: np.ndarray, kind: str, severity: float) -> None:
    shape: tuple[int, ...] = getattr(image, "shape", ())
    dtype = getattr(image, "dtype", type(image).__name__)
    if dtype != np.uint8 or len(shape) != 3 or shape[0] not in (1, 3, 4) or min(shape[1:]) < 16:
        fault = f"expected uint8 (C, H, W), C = 1, 3 or 4, H and W >= 16, got {dtype} {shape}; "
        fault += "convert it to 0..255, put the channels first, or take a larger image"
    elif kind not in itertools.chain(*KINDS.values()):
        fault = f"unknown kind {kind!r}; choose one of {KINDS}"
    elif not 0 < severity <= 2:
        fault = f"expected a severity in (0, 2], got {severity}; 1 is clearly visible"
    else:
        return
    raise ValueError(f"plant_defect: {fault}")


class _Brush:
    """Draws one defect on a float image; each kind is the method of its name."""

    def __init__(self, image: np.ndarray, rng: np.random.Generator, severity: float) -> None:
        self.image, self.rng, self.severity = image, rng, severity
        self.side = min(image.shape[1:])
        self.size = self.side * max(severity**0.5, 0.3)  # for lengths that grow with severity
        self.point = self._points(1)[0]  # (row, column) where most kinds lie
        self.bright = rng.random() > image[:, *self.point].mean() / 255  # else dark

    def _points(self, count: int) -> np.ndarray:
        """Sample (row, column) positions, (count, 2), off dark borders and backgrounds."""
        bright = self.image.mean(axis=0) >= 0.7 * self.image.mean()
        return self.rng.choice(np.argwhere(bright), count)

    def _plane(self, centre: Sequence[float]) -> np.ndarray:
        """Return each pixel's offset from a (row, column) as x + iy, complex (H, W)."""
        rows, columns = np.ogrid[: self.image.shape[1], : self.image.shape[2]]
        return columns - centre[1] + 1j * (rows - centre[0])

    def _corner(self, sizes: np.ndarray) -> np.ndarray:
        """Return the corner of that of 16 windows which a half turn changes most."""
        margin, shape = self.side // 12, np.array(self.image.shape[1:])  # keep off the frame
        corners = (self._points(16) - sizes // 2).clip(margin, shape - sizes - margin)
        patches = [self.image[:, *map(slice, corner, corner + sizes)] for corner in corners]
        return corners[np.argmax([np.abs(p - p[:, ::-1, ::-1]).sum() for p in patches])]

    def _across(self) -> np.ndarray:
        """Return the unit vector of the axis along which the image varies most: over busbars."""
        profiles = self.image.mean(axis=(0, 2)), self.image.mean(axis=(0, 1))
        return np.eye(2)[np.argmax([np.abs(np.diff(profile)).mean() for profile in profiles])]

    def _stroke(self, lines: Iterable[Iterable[np.ndarray]], width: float) -> np.ndarray:
        """Return the anti-aliased weight (H, W) of polylines (points, 2), at least 1 px wide."""
        weight, reach = np.zeros(self.image.shape[1:]), max(width, 1.0) / 2 + 0.5
        for start, end in itertools.chain(*map(itertools.pairwise, lines)):
            low = np.floor(np.minimum(start, end) - reach).clip(0).astype(int)
            high = np.ceil(np.maximum(start, end) + reach + 1).clip(0).astype(int)
            box = weight[low[0] : high[0], low[1] : high[1]]  # a view; empty off the image
            y, x = (np.indices(box.shape).T + low - start).T
            dy, dx = end - start
            t = ((y * dy + x * dx) / (dy**2 + dx**2)).clip(0, 1)  # nearest point of the segment
            np.maximum(box, (reach - np.hypot(y - t * dy, x - t * dx)).clip(0, 1), out=box)
        return weight

    def _shade(self, weight: np.ndarray, strength: float, bright: bool = False) -> _Planted:
        """Move each pixel by a share of its distance to white or black, 0.95 at most."""
        share = min(strength * self.severity, 0.95) * weight
        return self.image + share * (255 - self.image if bright else -self.image), weight > _EDGE

    def _move(self, here: tuple | np.ndarray, content: np.ndarray) -> _Planted:
        """Replace the pixels of an index (rows, columns) by content (C, ...)."""
        drawn, region = self.image.copy(), np.zeros(self.image.shape[1:], bool)
        drawn[:, *here], region[*here] = content, True
        return drawn, region

    def _walk(self, start: np.ndarray, heading: float, length: float) -> np.ndarray:
        """Return a jagged line of 16 steps, (17, 2): the heading walks randomly."""
        angles = heading + self.rng.normal(0, 0.06, 16).cumsum() + self.rng.normal(0, 0.15, 16)
        steps = length / 16 * np.stack([np.sin(angles), np.cos(angles)], axis=1)
        return start + np.concatenate([np.zeros((1, 2)), steps.cumsum(axis=0)])

    def crack(self) -> _Planted:
        """Draw a jagged line, mostly along a diagonal, with one to three branches."""
        rng, length = self.rng, self.size * self.rng.uniform(0.5, 0.9)
        heading = rng.choice([1, 3, 5, 7]) * np.pi / 4 + rng.normal(0, 0.2)
        lines = [self._walk(self.point, heading, length)]
        lines[0] += lines[0][0] - lines[0][8]  # the middle lies on the point
        for root in lines[0][rng.integers(2, 14, rng.integers(1, 4))]:
            turn = rng.choice([-1, 1]) * rng.uniform(0.5, 1.4)
            lines.append(self._walk(root, heading + turn, length * rng.uniform(0.2, 0.5)))
        return self._shade(self._stroke(lines, self.side / 300 * rng.uniform(1, 3)), 0.4)

    def inactive(self) -> _Planted:
        """Darken what lies beyond two jagged cuts, up to a share of the bright pixels."""
        share, angle, spread = self.rng.uniform([0.07, 0, 0], [0.2, 2 * np.pi, 1.1])
        shape = self.image.shape[1:]
        far, depth = sum(shape), np.full(shape, np.inf)
        knots = np.arange(-far, far, self.side / 12)
        for normal in (angle - spread, angle + spread):
            turned = self._plane(self.point) * np.exp(-1j * normal)
            jag = self.rng.normal(0, 0.02 * self.side, knots.size).cumsum()
            depth = np.minimum(depth, turned.real + np.interp(turned.imag, knots, jag))
        sample = depth[*self._points(1000).T]
        depth -= max(np.quantile(sample, 1 - share * self.size / self.side), np.median(depth))
        weight = (depth + 0.5).clip(0, 1) * (1 - 0.3 * (depth / self.side).clip(0, 1))
        return self._shade(weight, self.rng.uniform(0.5, 0.7))

    def finger(self) -> _Planted:
        """Draw two to five short dark dashes across the busbars."""
        points = self._points(int(self.rng.integers(2, 6)))
        halves = self.side * self.rng.uniform(0.05, 0.15, (len(points), 1)) * self._across()
        lines = np.stack([points - halves, points + halves], axis=1)
        return self._shade(self._stroke(lines, self.side / 300 * self.rng.uniform(2, 4)), 0.4)

    def spot(self) -> _Planted:
        """Draw a small round spot with a soft edge."""
        plane = self._plane(self.point) / max(2.0, self.size * self.rng.uniform(0.02, 0.05))
        return self._shade((1.5 - 1.5 * np.abs(plane)).clip(0, 1), 0.55, self.bright)

    def mirror(self) -> _Planted:
        """Turn a patch by 180 degrees, that is, mirror it in both axes."""
        sizes = (self.size * self.rng.uniform(0.2, 0.35, 2)).astype(int).clip(4)
        window = tuple(slice(c, c + n) for c, n in zip(self._corner(sizes), sizes, strict=True))
        return self._move(window, self.image[:, *window][:, ::-1, ::-1])

    def blob(self) -> _Planted:
        """Draw an ellipse that fades smoothly to its rim."""
        radii = (self.size * self.rng.uniform(0.07, 0.16, 2)).clip(2)
        turned = self._plane(self.point) * np.exp(1j * self.rng.uniform(0, np.pi))
        bump = (1 - (turned.real / radii[0]) ** 2 - (turned.imag / radii[1]) ** 2).clip(0) ** 2
        return self._shade(bump, 0.5, self.bright)

    def scramble(self) -> _Planted:
        """Permute square blocks inside a region of irregular outline."""
        radius = max(3.0, self.size * self.rng.uniform(0.1, 0.16))
        plane = self._plane(self._corner(np.full(2, int(2 * radius))) + radius)
        waves = np.angle(plane)[..., None] * [2, 3] + self.rng.uniform(0, 2 * np.pi, 2)
        inside = np.abs(plane) < radius * (1 + np.cos(waves) @ self.rng.uniform(0, 0.3, 2))
        side = max(1, int(radius / 8))  # of a block
        fits = inside[: 1 - side or None : side, : 1 - side or None : side]
        starts = self.rng.permutation(np.argwhere(fits) * side).T
        blocks = starts[..., None, None] + np.indices((side, side))[:, None]  # (2, n, side, side)
        return self._move(blocks, self.image[:, *np.roll(blocks, 1, axis=1)])

    def displace(self) -> _Planted:
        """Shift the middle of a disc across the image's lines, less and less towards its rim."""
        radius = max(3.0, self.side * self.rng.uniform(0.12, 0.2))
        plane = self._plane(self._corner(np.full(2, int(radius))) + radius / 2)
        bump = (1 - np.abs(plane / radius) ** 2).clip(0) ** 2
        here = np.nonzero(bump > _EDGE)
        shift = self.rng.choice([-1, 1]) * self._across() + self.rng.uniform(-0.4, 0.4, 2)
        there = here + 0.22 * radius * self.severity * shift[:, None] * bump[here]
        warped = [ndimage.map_coordinates(c, there, order=1, mode="nearest") for c in self.image]
        return self._move(here, np.stack(warped))

    def scratch(self) -> _Planted:
        """Add a constant along one straight line."""
        angle, half, width = self.rng.uniform([0, 0.15, 1.5], [np.pi, 0.4, 3])
        reach = self.side * half * np.array([np.sin(angle), np.cos(angle)])
        weight = self._stroke([[self.point - reach, self.point + reach]], self.side / 300 * width)
        return self.image + (50 if self.bright else -50) * self.severity * weight, weight > _EDGE

    def stain(self) -> _Planted:
        """Darken or brighten where smooth noise, fading from a centre, exceeds its median."""
        plane = self._plane(self.point) / max(4.0, self.size * self.rng.uniform(0.15, 0.25))
        disc, weight = np.abs(plane) < 1, np.zeros(plane.shape)
        places = 3.5 * np.stack([plane[disc].imag, plane[disc].real]) + 3.5
        noise = ndimage.map_coordinates(self.rng.normal(size=(8, 8)), places)
        field = 0.5 * noise - np.abs(plane[disc])
        weight[disc] = (3 * (field - np.median(field))).clip(0, 1)
        return self._shade(weight, 0.35, self.bright)
