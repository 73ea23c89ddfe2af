"""One value per image behind a metric of all pixels, and their resampled means, for intervals."""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

from diffad_lite.core.numbers import check_finite
from diffad_lite.evaluation.metrics import Images, check_draws, check_kinds, checked_pixels

PSEUDO_VALUES = ("pixel_ap", "aupro", "dice_oracle")  # metrics with a value per image


def pixel_pseudo_values(masks: Images, maps: Images) -> dict[str, NDArray[np.float64]]:
    """Compute how much each image contributes to ``pixel_ap``, ``aupro`` and ``dice_oracle`` (N,).

    `masks` and `maps` as in `pixel_metrics`. The pseudo-value of image i is N m - (N - 1) m_i, with
    the metric m of all images and m_i without image i. These values are not in [0, 1]. With tens of
    anomalous images of similar size, their mean is near m, and the spread of this mean over
    resampled images (`resampled_means`) is near that of m. So a record keeps N numbers and not the
    maps. The metrics are computed at 1000 thresholds, quantiles of the anomalous pixels. All are
    NaN where one image has all anomalous or all normal pixels. Raises ValueError as
    `pixel_metrics`. Source: jackknife, Tukey 1958; Efron and Tibshirani, "An Introduction to the
    Bootstrap", 1993.
    """
    images = list(checked_pixels(masks, maps))
    per_image = np.array([[mask.sum(), (~mask).sum()] for mask, _ in images]).reshape(-1, 2)
    check_kinds(masks, *per_image.sum(axis=0))
    if 1 in np.count_nonzero(per_image, axis=0):
        return {name: np.full(len(images), np.nan) for name in PSEUDO_VALUES}
    anomalous = np.concatenate([scores[mask] for mask, scores in images])
    levels = np.quantile(anomalous, np.linspace(0, 1, 1001)[:-1], method="lower")
    thresholds = np.unique(levels)[::-1]

    def count(values: NDArray) -> NDArray:  # at or above each threshold
        return len(values) - np.searchsorted(np.sort(values), thresholds, "left")

    def overlap(mask: NDArray, scores: NDArray) -> NDArray:  # summed over the regions
        regions, n = ndimage.label(mask, structure=np.ones((3, 3)))
        parts = (scores[regions == k] for k in range(1, n + 1))
        return sum((count(part) / part.size for part in parts), np.zeros(len(thresholds)))

    true = np.array([count(scores[mask]) for mask, scores in images], dtype=np.float64)
    false = np.array([count(scores[~mask]) for mask, scores in images], dtype=np.float64)
    regions = np.array([overlap(mask, scores) for mask, scores in images])
    counts, n = (true, false, regions, per_image[:, 1:]), len(images)
    complete = _coarse_metrics(*(c.sum(axis=0, keepdims=True) for c in counts))
    without = _coarse_metrics(*(c.sum(axis=0) - c for c in counts))
    return {key: n * complete[key] - (n - 1) * without[key] for key in complete}


def _coarse_metrics(
    true: NDArray, false: NDArray, regions: NDArray, normal: NDArray, limit: float = 0.3
) -> dict[str, NDArray]:
    """Compute three metrics (K,) of K sets of images, from counts at L thresholds.

    Anomalous (K, L) and normal (K, L) pixels at or above each threshold, highest first, the summed
    overlap of the regions (K, L), and the number of normal pixels (K, 1). The lowest threshold
    covers all anomalous pixels.
    """
    recall, alarms = true / true[:, -1:], true + false
    precision = np.divide(true, alarms, out=np.zeros_like(true), where=alarms > 0)
    x, y = false / normal, regions / regions[:, -1:]
    x, y = (np.concatenate([np.zeros((len(v), 1)), v, np.ones((len(v), 1))], 1) for v in (x, y))
    width = np.diff(np.minimum(x, limit))
    steps = np.diff(x)
    slope = np.divide(np.diff(y), steps, out=np.zeros_like(steps), where=steps > 0)
    return {
        "pixel_ap": (np.diff(recall, prepend=0) * precision).sum(axis=1),
        "aupro": (width * (y[:, :-1] + slope * width / 2)).sum(axis=1) / limit,
        "dice_oracle": (2 * true / (alarms + true[:, -1:])).max(axis=1),
    }


def resampled_means(
    values: ArrayLike, groups: ArrayLike, *, n_boot: int = 1000, seed: int = 0
) -> NDArray[np.float64]:
    """Compute the mean of `values` over resampled images, for each seed (n_boot, n_seeds).

    `values` (n_seeds, n) or (n,), finite; `groups` (n,) tells which images are resampled among
    each other, usually their labels. Two calls with equal `groups` and `seed` resample the same
    images, so the difference of their results is paired. Raises ValueError for other shapes, NaN
    or infinity, or `n_boot` < 1.
    """
    values, groups = np.atleast_2d(np.asarray(values, dtype=np.float64)), np.asarray(groups)
    if values.ndim != 2 or not values.size or groups.shape != values.shape[1:]:
        raise ValueError(f"values {values.shape}, groups {groups.shape}: give both for each image")
    check_finite(values, "values")
    weights = np.zeros((check_draws(n_boot), values.shape[1]))
    rng = np.random.default_rng(seed)
    for group in np.unique(groups):
        of_group = groups == group
        n = np.count_nonzero(of_group)
        weights[:, of_group] = rng.multinomial(n, np.full(n, 1 / n), size=n_boot)
    return weights @ values.T / values.shape[1]
