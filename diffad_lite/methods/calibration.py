"""Calibrate raw maps, scores and the threshold on normal images that training did not see."""

import math
import warnings
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diffad_lite.core.numbers import check_finite, top_count

FOLDS = 5  # of the calibration images, for statistics that an image has no part in


def fold_numbers(n: int, folds: int = FOLDS) -> NDArray:
    """Return the fold (n,) of each of n images: image i is in fold i % `folds`."""
    return np.arange(n) % folds


@dataclass(frozen=True, eq=False)
class MapCalibration:
    """Position-wise mean and standard deviation, each (H, W), of the maps of normal images.

    The variance s^2 of n maps is shrunk towards its mean over positions: with k = `shrink`,
    s~^2 = ((n - 1) s^2 + k mean(s^2)) / (n - 1 + k): k counts pseudo-observations (Smyth 2004).
    """

    mean: NDArray[np.float64]
    std: NDArray[np.float64]

    @classmethod
    def fit(cls, maps: ArrayLike, *, shrink: float = 10.0) -> "MapCalibration":
        """Fit the statistics of `maps` (N, H, W) of normal images, N >= 2, finite; `shrink` > 0.

        Raises ValueError for anything else, and for maps that are all equal (no spread).
        """
        maps = _checked_maps(maps)
        n = len(maps)
        if n < 2 or not 0 < shrink < math.inf:
            raise ValueError(f"{n} maps, shrink {shrink}: need at least 2 maps and shrink > 0")
        variance = maps.var(axis=0, ddof=1, dtype=np.float64)
        if not variance.any():
            raise ValueError(
                f"the anomaly maps of {n} images are all equal, so they have no spread; give "
                "different images, or set calibrate=false"
            )
        shrunk = ((n - 1) * variance + shrink * variance.mean()) / (n - 1 + shrink)
        return cls(maps.mean(axis=0, dtype=np.float64), np.sqrt(shrunk))

    def apply(self, maps: ArrayLike) -> NDArray[np.float32]:
        """Return z-maps (N, H, W), (map - mean) / std per image; their range is unbounded.

        Raises ValueError for another shape or map size than was fitted, NaN or infinity.
        """
        maps = _checked_maps(maps)
        if maps.shape[1:] != self.mean.shape:
            sizes = f"maps are {maps.shape[1:]}, the calibration is {self.mean.shape}"
            raise ValueError(f"{sizes}: resize the images as in fitting, or fit at this size")
        return ((maps - self.mean) / self.std).astype(np.float32)

    @classmethod
    def cross_fit(cls, maps: ArrayLike, folds: int = FOLDS, *, shrink: float = 10.0) -> NDArray:
        """Return z-maps (N, H, W) of the calibration images, each by the other folds' maps.

        Thresholds come from these z-maps: statistics that include the map itself would make its z
        too small. ValueError as in `fit`, and for too many or few folds.
        """
        maps = _checked_maps(maps)
        n = len(maps)
        if not 2 <= folds <= n or n - math.ceil(n / folds) < 2:
            raise ValueError(f"{n} maps, {folds} folds: give 2..N folds, 2 maps outside each")
        fold, z_maps = fold_numbers(n, folds), np.empty(maps.shape, np.float32)
        for f in range(folds):
            z_maps[fold == f] = cls.fit(maps[fold != f], shrink=shrink).apply(maps[fold == f])
        return z_maps


def conformal_threshold(calibration_scores: ArrayLike, q: float = 0.95) -> float:
    """Return the threshold that a normal image's score exceeds with probability at most 1 - q.

    `calibration_scores` (n,) are finite scores of normal images that were not trained on; `q` in
    (0, 1). Returns the k-th smallest, k = ceil((n + 1) q). When k > n the set is too small for q:
    warns and returns the maximum. Raises ValueError for n = 0, another shape, NaN or infinity, `q`
    out of range. Source: Vovk et al., "Algorithmic Learning in a Random World", 2005.
    """
    scores = np.asarray(calibration_scores)
    n = scores.size
    if scores.ndim != 1 or not n or not 0 < q < 1:
        raise ValueError(f"scores {scores.shape}, q {q}: need shape (n,) with n >= 1 and 0 < q < 1")
    check_finite(scores, "calibration_scores")
    k = top_count(q, n + 1)
    if k > n:
        needed = f"give at least {math.ceil(1 / (1 - Fraction(str(q)))) - 1}, or lower q"
        warnings.warn(f"{n} scores, q = {q}: the maximum is used; {needed}", stacklevel=2)
    return float(np.sort(scores)[min(k, n) - 1])


def pixel_threshold(maps: ArrayLike) -> float:
    """Return the mean plus 3 standard deviations, in float64, of all pixels of `maps` (N, H, W).

    `maps` are of normal images, at the size of the network's images, padding included. This common
    rule gives outlines of anomalies and a segmentation's F1 score where no anomalous image is
    known. No guarantee comes with it: the fraction of normal pixels above it depends on their
    distribution. Raises ValueError for another shape, NaN or infinity.
    """
    maps = _checked_maps(maps)
    return float(maps.mean(dtype=np.float64) + 3 * maps.std(dtype=np.float64))


def top_k_mean(maps: ArrayLike, fraction: float) -> NDArray[np.float64]:
    """Return image scores (N,): mean of the largest ceil(fraction H W) values of `maps` (N, H, W).

    `fraction` in (0, 1]. Raises ValueError for another fraction or shape, NaN or infinity.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction is {fraction}: give a fraction of the pixels in (0, 1]")
    pixels = _checked_maps(maps).reshape(np.shape(maps)[0], -1)
    first = pixels.shape[1] - top_count(fraction, pixels.shape[1])
    return np.partition(pixels, first, axis=1)[:, first:].mean(axis=1, dtype=np.float64)


def _checked_maps(maps: ArrayLike) -> NDArray:
    maps = np.asarray(maps)
    if maps.ndim != 3 or not maps.size:
        raise ValueError(f"maps has shape {maps.shape}: give (N, H, W), none of them 0")
    check_finite(maps, "maps")
    return maps
