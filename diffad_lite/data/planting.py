"""Plant test-only defects of known mask and severity on normal images.

Hyper-parameters may be chosen on the `development` kinds only. Neither methods nor training code
may import this module.
"""

import hashlib
import itertools
from collections.abc import Iterable, Sequence

import numpy as np
from scipy import ndimage

KINDS: dict[str, tuple[str, ...]] = {
    "cells": ("crack", "inactive", "finger", "spot", "mirror"),  # as in electroluminescence
    "lesions": ("blob", "scramble", "displace"),  # for any texture or organ
    "development": ("scratch", "stain"),  # built differently from the test kinds above
}

_EDGE = 0.1  # pixels of a soft edge with a larger weight belong to the defect
_BLACK = 8  # pixels that are at most this bright before and after are background
_Planted = tuple[np.ndarray, np.ndarray]  # image (C, H, W), region of the defect (H, W) bool


def plant_defect(image: np.ndarray, kind: str, *, seed: int, severity: float = 1.0) -> _Planted:
    """Plant one defect on a normal image; the mask is True exactly where a channel has changed.

    A pixel of the defect whose value would not change, as drawn and rounded, moves by one grey
    value. Background that is black before and after (at most 8 of 255) is not part of the defect.

    Args:
        image: uint8 (C, H, W), C = 1, 3 or 4, H and W at least 16; it is not modified.
        kind: a name in `KINDS`.
        seed: integer >= 0; the same arguments give the same defect.
        severity: in (0, 2], for contrast and size; 1 is clearly visible, 0.3 is hard to see.

    Returns:
        The image with the defect, uint8 (C, H, W), and its mask, bool (H, W), never empty.

    Raises:
        ValueError: wrong dtype or shape, unknown kind, or severity out of range.
    """
    _check(image, kind, severity)
    clean = image.astype(np.float32)
    painted, region = getattr(_Brush(clean, np.random.default_rng(seed), severity), kind)()
    painted = painted.clip(0, 255)
    visible = region & (np.maximum(clean, painted).max(axis=0) > _BLACK)
    mask = visible if np.count_nonzero(visible) > 3 else region  # the image is black there
    planted = np.where(mask, np.rint(painted), clean)
    unchanged = mask & (planted == clean).all(axis=0)
    step = np.where((painted > clean) | (clean == 0), 1, -1)
    return (planted + unchanged * step).astype(np.uint8), mask


def plant_defects(
    images: Sequence[np.ndarray], family: str, *, seed_names: Sequence[str], severity: float = 1.0
) -> tuple[list[np.ndarray], list[np.ndarray], list[str]]:
    """Plant one defect on each image; image i gets kind i modulo the number of kinds.

    Each seed is a hash of the image's name and kind, independent of the order and other images.

    Args:
        images: normal images, each uint8 (C, H, W) as in `plant_defect`; sizes may differ.
        family: "cells", "lesions" or "development".
        seed_names: one name per image, for instance its file name.
        severity: in (0, 2], the same for all images.

    Returns:
        Three lists: images with a defect, uint8 (C, H, W); masks, bool (H, W); kinds.

    Raises:
        ValueError: unknown family, lists of different lengths, or an error of `plant_defect`.
    """
    if family not in KINDS:
        raise ValueError(f"plant_defects: unknown family {family!r}; choose one of {sorted(KINDS)}")
    if (n := len(images)) != (m := len(seed_names)):
        raise ValueError(f"plant_defects: {n} images, {m} seed_names; give one name per image")
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
        fault += "convert it to 0..255, put the channels first, or use a larger image"
    elif kind not in itertools.chain(*KINDS.values()):
        fault = f"unknown kind {kind!r}; choose one of {KINDS}"
    elif not 0 < severity <= 2:
        fault = f"expected a severity in (0, 2], got {severity}; 1 is clearly visible"
    else:
        return
    raise ValueError(f"plant_defect: {fault}")


class _Brush:
    """Draw one defect on a float image; each kind is the method of its name."""

    def __init__(self, image: np.ndarray, rng: np.random.Generator, severity: float) -> None:
        self.image, self.rng, self.severity = image, rng, severity
        self.side = min(image.shape[1:])
        self.size = self.side * max(severity**0.5, 0.3)  # for lengths that grow with severity
        self.point = self._sample_points(1)[0]  # (row, column), the centre of most kinds
        self.bright = rng.random() > image[:, *self.point].mean() / 255  # otherwise dark

    def _sample_points(self, count: int) -> np.ndarray:
        """Sample (row, column) positions, (count, 2), off dark borders and backgrounds."""
        bright = self.image.mean(axis=0) >= 0.7 * self.image.mean()
        return self.rng.choice(np.argwhere(bright), count)

    def _offsets(self, centre: Sequence[float]) -> np.ndarray:
        """Return each pixel's offset from a (row, column) as x + iy, complex (H, W)."""
        rows, columns = np.ogrid[: self.image.shape[1], : self.image.shape[2]]
        return columns - centre[1] + 1j * (rows - centre[0])

    def _choose_corner(self, sizes: np.ndarray) -> np.ndarray:
        """Return the corner of the window, of 16, that a rotation by 180 degrees changes most."""
        margin, shape = self.side // 12, np.array(self.image.shape[1:])  # keep off the frame
        corners = (self._sample_points(16) - sizes // 2).clip(margin, shape - sizes - margin)
        patches = [self.image[:, *map(slice, corner, corner + sizes)] for corner in corners]
        return corners[np.argmax([np.abs(p - p[:, ::-1, ::-1]).sum() for p in patches])]

    def _across_busbars(self) -> np.ndarray:
        """Return the unit vector of the axis along which the image varies most, across busbars."""
        profiles = self.image.mean(axis=(0, 2)), self.image.mean(axis=(0, 1))
        return np.eye(2)[np.argmax([np.abs(np.diff(profile)).mean() for profile in profiles])]

    def _draw_lines(self, lines: Iterable[Iterable[np.ndarray]], width: float) -> np.ndarray:
        """Return the anti-aliased weight (H, W) of polylines (points, 2), at least 1 px wide."""
        weight, reach = np.zeros(self.image.shape[1:]), max(width, 1.0) / 2 + 0.5
        for start, end in itertools.chain(*map(itertools.pairwise, lines)):
            low = np.floor(np.minimum(start, end) - reach).clip(0).astype(int)
            high = np.ceil(np.maximum(start, end) + reach + 1).clip(0).astype(int)
            box = weight[low[0] : high[0], low[1] : high[1]]  # a view; empty outside the image
            y, x = (np.indices(box.shape).T + low - start).T
            dy, dx = end - start
            t = ((y * dy + x * dx) / (dy**2 + dx**2)).clip(0, 1)  # nearest point of the segment
            np.maximum(box, (reach - np.hypot(y - t * dy, x - t * dx)).clip(0, 1), out=box)
        return weight

    def _shade(self, weight: np.ndarray, strength: float, bright: bool = False) -> _Planted:
        """Blend each pixel with white or black; the opacity is at most 0.95."""
        opacity = min(strength * self.severity, 0.95) * weight
        return self.image + opacity * (255 - self.image if bright else -self.image), weight > _EDGE

    def _replace(self, index: tuple | np.ndarray, content: np.ndarray) -> _Planted:
        """Replace the pixels of an index (rows, columns) by content (C, ...)."""
        painted, region = self.image.copy(), np.zeros(self.image.shape[1:], bool)
        painted[:, *index], region[*index] = content, True
        return painted, region

    def _walk(self, start: np.ndarray, heading: float, length: float) -> np.ndarray:
        """Return a jagged line of 16 steps, (17, 2); its heading is a random walk."""
        angles = heading + self.rng.normal(0, 0.06, 16).cumsum() + self.rng.normal(0, 0.15, 16)
        steps = length / 16 * np.stack([np.sin(angles), np.cos(angles)], axis=1)
        return start + np.concatenate([np.zeros((1, 2)), steps.cumsum(axis=0)])

    def crack(self) -> _Planted:
        """Draw a jagged line, mostly along a diagonal, with one to three branches."""
        rng, length = self.rng, self.size * self.rng.uniform(0.5, 0.9)
        heading = rng.choice([1, 3, 5, 7]) * np.pi / 4 + rng.normal(0, 0.2)
        lines = [self._walk(self.point, heading, length)]
        lines[0] += lines[0][0] - lines[0][8]  # centre it on the point
        for root in lines[0][rng.integers(2, 14, rng.integers(1, 4))]:
            turn = rng.choice([-1, 1]) * rng.uniform(0.5, 1.4)
            lines.append(self._walk(root, heading + turn, length * rng.uniform(0.2, 0.5)))
        return self._shade(self._draw_lines(lines, self.side / 300 * rng.uniform(1, 3)), 0.4)

    def inactive(self) -> _Planted:
        """Darken the area behind two jagged lines, up to a fraction of the bright pixels."""
        fraction, angle, spread = self.rng.uniform([0.07, 0, 0], [0.2, 2 * np.pi, 1.1])
        shape = self.image.shape[1:]
        reach, depth = sum(shape), np.full(shape, np.inf)
        knots = np.arange(-reach, reach, self.side / 12)
        for normal in (angle - spread, angle + spread):
            rotated = self._offsets(self.point) * np.exp(-1j * normal)
            jag = self.rng.normal(0, 0.02 * self.side, knots.size).cumsum()
            depth = np.minimum(depth, rotated.real + np.interp(rotated.imag, knots, jag))
        sample = depth[*self._sample_points(1000).T]
        depth -= max(np.quantile(sample, 1 - fraction * self.size / self.side), np.median(depth))
        weight = (depth + 0.5).clip(0, 1) * (1 - 0.3 * (depth / self.side).clip(0, 1))
        return self._shade(weight, self.rng.uniform(0.5, 0.7))

    def finger(self) -> _Planted:
        """Draw two to five short dark dashes across the busbars."""
        points = self._sample_points(int(self.rng.integers(2, 6)))
        halves = self.side * self.rng.uniform(0.05, 0.15, (len(points), 1)) * self._across_busbars()
        lines = np.stack([points - halves, points + halves], axis=1)
        return self._shade(self._draw_lines(lines, self.side / 300 * self.rng.uniform(2, 4)), 0.4)

    def spot(self) -> _Planted:
        """Draw a small round spot with a soft edge."""
        offset = self._offsets(self.point) / max(2.0, self.size * self.rng.uniform(0.02, 0.05))
        return self._shade((1.5 - 1.5 * np.abs(offset)).clip(0, 1), 0.55, self.bright)

    def mirror(self) -> _Planted:
        """Rotate a patch by 180 degrees, that is, mirror it in both axes."""
        sizes = (self.size * self.rng.uniform(0.2, 0.35, 2)).astype(int).clip(4)
        corner = self._choose_corner(sizes)
        window = tuple(map(slice, corner, corner + sizes))
        return self._replace(window, self.image[:, *window][:, ::-1, ::-1])

    def blob(self) -> _Planted:
        """Draw an ellipse that fades smoothly towards its rim."""
        radii = (self.size * self.rng.uniform(0.07, 0.16, 2)).clip(2)
        rotated = self._offsets(self.point) * np.exp(1j * self.rng.uniform(0, np.pi))
        bump = (1 - (rotated.real / radii[0]) ** 2 - (rotated.imag / radii[1]) ** 2).clip(0) ** 2
        return self._shade(bump, 0.5, self.bright)

    def scramble(self) -> _Planted:
        """Permute square blocks inside an irregular region."""
        radius = max(3.0, self.size * self.rng.uniform(0.1, 0.16))
        offset = self._offsets(self._choose_corner(np.full(2, int(2 * radius))) + radius)
        waves = np.angle(offset)[..., None] * [2, 3] + self.rng.uniform(0, 2 * np.pi, 2)
        inside = np.abs(offset) < radius * (1 + np.cos(waves) @ self.rng.uniform(0, 0.3, 2))
        side = max(1, int(radius / 8))  # of a block
        fits = inside[: 1 - side or None : side, : 1 - side or None : side]
        starts = self.rng.permutation(np.argwhere(fits) * side).T
        blocks = starts[..., None, None] + np.indices((side, side))[:, None]  # (2, n, side, side)
        return self._replace(blocks, self.image[:, *np.roll(blocks, 1, axis=1)])

    def displace(self) -> _Planted:
        """Shift the centre of a disc across the busbars; the shift fades towards the rim."""
        radius = max(3.0, self.side * self.rng.uniform(0.12, 0.2))
        offset = self._offsets(self._choose_corner(np.full(2, int(radius))) + radius / 2)
        bump = (1 - np.abs(offset / radius) ** 2).clip(0) ** 2
        target = np.nonzero(bump > _EDGE)
        shift = self.rng.choice([-1, 1]) * self._across_busbars() + self.rng.uniform(-0.4, 0.4, 2)
        source = target + 0.22 * radius * self.severity * shift[:, None] * bump[target]
        warped = [ndimage.map_coordinates(c, source, order=1, mode="nearest") for c in self.image]
        return self._replace(target, np.stack(warped))

    def scratch(self) -> _Planted:
        """Add a constant grey value along a straight line."""
        angle, half, width = self.rng.uniform([0, 0.15, 1.5], [np.pi, 0.4, 3])
        reach = self.side * half * np.array([np.sin(angle), np.cos(angle)])
        line = [self.point - reach, self.point + reach]
        weight = self._draw_lines([line], self.side / 300 * width)
        return self.image + (50 if self.bright else -50) * self.severity * weight, weight > _EDGE

    def stain(self) -> _Planted:
        """Darken or brighten where smooth noise, fading from a centre, exceeds its median."""
        offset = self._offsets(self.point) / max(4.0, self.size * self.rng.uniform(0.15, 0.25))
        disc, weight = np.abs(offset) < 1, np.zeros(offset.shape)
        places = 3.5 * np.stack([offset[disc].imag, offset[disc].real]) + 3.5
        noise = ndimage.map_coordinates(self.rng.normal(size=(8, 8)), places)
        field = 0.5 * noise - np.abs(offset[disc])
        weight[disc] = (3 * (field - np.median(field))).clip(0, 1)
        return self._shade(weight, 0.35, self.bright)
