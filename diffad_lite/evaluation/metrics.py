"""Metrics of images, pixels and reconstructions, and their intervals.

Scores are ranked raw, never squashed. A metric whose threshold is chosen on the labels that it is
scored with has ``oracle`` in its name. NaN and infinity have no rank: every function rejects them.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

from diffad_lite.core.numbers import check_finite

Images = Sequence[ArrayLike]  # one (H_i, W_i) array per image, or one (N, H, W) array
CONFIDENCE = 0.95  # of all intervals


def image_metrics(labels: ArrayLike, scores: ArrayLike) -> dict[str, float]:
    """Compute AUROC, average precision and the best F1 of image scores, by scikit-learn.

    `labels` (n,) are 0 normal, 1 anomalous; `scores` (n,) are finite, higher = more anomalous.
    Returns ``image_auroc``, ``image_ap`` and ``image_f1max_oracle`` (at the best threshold for
    these labels), in [0, 1]. Raises ValueError for unequal lengths, NaN or infinity, other labels,
    or only one class.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve  # slow to import

    labels, scores = _checked_images(labels, scores)
    fpr, tpr, _ = roc_curve(labels, scores, drop_intermediate=False)
    true, false = tpr * labels.sum(), fpr * (~labels).sum()
    return {
        "image_auroc": float(roc_auc_score(labels, scores)),
        "image_ap": float(average_precision_score(labels, scores)),
        "image_f1max_oracle": float((2 * true / (true + false + labels.sum())).max()),
    }


def f1_at_threshold(labels: ArrayLike, scores: ArrayLike, threshold: float) -> float:
    """Compute F1 in [0, 1] of the prediction ``score > threshold``; 0 if nothing is predicted.

    The threshold comes from normal images, never from these `labels` (n,). Raises ValueError as
    `image_metrics`, and for a NaN threshold.
    """
    from sklearn.metrics import f1_score

    labels, scores = _checked_images(labels, scores)
    _check_threshold(threshold)
    return float(f1_score(labels, scores > threshold, zero_division=0))


def false_alarm_rate(scores: ArrayLike, threshold: float) -> tuple[float, float, float]:
    """Compute the fraction of normal images with ``score > threshold``: (rate, low, high).

    `scores` (n,) are those of normal images that did not set the threshold. `low` and `high` are
    the exact 95 % interval of the rate, in [0, 1]; at zero false alarms, `high` is near 3.7 / n.
    Raises ValueError for no scores, another shape, NaN or infinity, or a NaN threshold. Source:
    Clopper and Pearson, Biometrika 1934; by SciPy.
    """
    from scipy.stats import binomtest  # slow to import

    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != 1 or not scores.size:
        raise ValueError(f"scores {scores.shape}: give shape (n,), one score per normal image")
    check_finite(scores, "scores")
    _check_threshold(threshold)
    alarms = binomtest(int((scores > threshold).sum()), scores.size)
    low, high = alarms.proportion_ci(CONFIDENCE, method="exact")
    return alarms.statistic, float(low), float(high)


def pixel_metrics(masks: Images, maps: Images) -> dict[str, float]:
    """Compute pixel AUROC, pixel AP, the best Dice and AUPRO from one ranking of all pixels.

    `masks` and `maps` hold one (H_i, W_i) array per image; sizes may differ. A mask is 0 on normal
    pixels, else anomalous; a map is finite, higher = more anomalous, ranked in its own dtype.
    Returns ``pixel_auroc`` and ``pixel_ap`` (as scikit-learn on the pooled pixels, with ties),
    ``dice_oracle`` (pooled, best threshold for these masks), ``aupro`` up to 0.3 and ``aupro_05``
    up to 0.05, each in [0, 1]. Raises ValueError as `aupro`.
    """
    false, true, overlap, n_normal = _rank_pixels(masks, maps)
    recall = np.diff(true, prepend=0) / true[-1]  # what each threshold adds
    curve = _region_curve(false, overlap, n_normal)
    return {
        "pixel_auroc": float(1 - recall @ false.mean(axis=1) / n_normal),
        "pixel_ap": float(recall @ (true / (true + false[:, 1]))),
        "dice_oracle": float((2 * true / (true + false[:, 1] + true[-1])).max()),
        "aupro": _area_below(*curve, 0.3),
        "aupro_05": _area_below(*curve, 0.05),
    }


def aupro(masks: Images, maps: Images, limit: float = 0.3) -> float:
    """Compute the exact area under the per-region-overlap curve up to a false-positive `limit`.

    Arguments as in `pixel_metrics`; `limit` in (0, 1]. Each distinct score is one point: x is the
    fraction of all normal pixels at or above it; y is the covered fraction of a region, averaged
    over the regions (8-connected) of all masks. Points are joined linearly and cut at x = `limit`.
    The area is divided by `limit`: in [0, 1], perfect = 1, unchanged by strictly increasing
    transforms. Raises ValueError for no anomalous region, no normal pixel, NaN or infinity, unequal
    numbers or shapes, or `limit` out of range. Source: Bergmann et al., IJCV 2021; but exact,
    without their grid of thresholds.
    """
    if not 0 < limit <= 1:
        raise ValueError(f"limit is {limit}: give a false-positive rate in (0, 1], usually 0.3")
    false, _, overlap, n_normal = _rank_pixels(masks, maps)
    return _area_below(*_region_curve(false, overlap, n_normal), limit)


def _region_curve(false: NDArray, overlap: NDArray, n_normal: int) -> tuple[NDArray, NDArray]:
    """Return the false-positive rates and mean overlaps of the points of the AUPRO curve."""
    x = np.concatenate([[0], false.ravel() / n_normal, [1]])
    return x, np.concatenate([[0, 0], np.repeat(overlap, 2)])  # starts at the last overlap


def _area_below(x: NDArray, y: NDArray, limit: float) -> float:
    """Return the area below a curve up to x = `limit`, divided by `limit`."""
    inside = x <= limit
    cut = np.interp(limit, x, y)
    x, y = np.append(x[inside], limit), np.append(y[inside], cut)
    return float(min(np.diff(x) @ (y[1:] + y[:-1]) / 2 / limit, 1.0))  # the last bit may round up


def aupimo(
    masks: Images, maps: Images, bounds: tuple[float, float] = (1e-5, 1e-4)
) -> NDArray[np.float64]:
    """Compute the area under the per-image-overlap curve of each anomalous image (n_anomalous,).

    `masks` and `maps` as in `pixel_metrics`; an image is normal if its mask is 0 everywhere. Each
    distinct score of the normal images is one threshold: x is the fraction of pixels at or above
    it, averaged over the normal images; y is the recall of the mask's pixels, per image. Points
    are joined linearly over log x and cut at the `bounds` of x, 0 < lower < upper <= 1; below the
    lowest x > 0, y is the recall above all normal pixels. The area is divided by
    log(upper / lower): in [0, 1], perfect = 1, unchanged by strictly increasing transforms.

    Raises ValueError for no normal or no anomalous image, NaN or infinity, unequal numbers or
    shapes, `bounds` out of range, or so few normal pixels that one of them exceeds the lower
    bound. Source: Bertoldo et al., "AUPIMO", BMVC 2024 (arXiv:2401.01984); but exact. The code of
    anomalib takes 300,000 evenly spaced thresholds, and starts and ends at the reached x nearest to
    each bound: few normal pixels reach few x, and its values then differ by a few hundredths.
    """
    lower, upper = bounds
    if not 0 < lower < upper <= 1:
        expected = "give false-positive rates 0 < lower < upper <= 1, usually (1e-5, 1e-4)"
        raise ValueError(f"bounds are {bounds}: {expected}")
    normal, anomalous = [], []
    for mask, scores in checked_pixels(masks, maps):
        if mask.any():
            anomalous.append(np.sort(scores[mask]))
        else:
            normal.append(scores.ravel())
    if not normal or not anomalous:
        counts = f"{len(anomalous)} anomalous and {len(normal)} normal images"
        raise ValueError(f"{counts}: give both kinds, or leave AUPIMO out (null)")
    thresholds, weights = _shared_thresholds(normal, lower, upper)
    areas = []
    for scores in anomalous:
        missed = [np.searchsorted(scores, thresholds, side) for side in ("right", "left")]
        areas.append(1 - (weights * missed).sum() / scores.size)
    return np.clip(areas, 0, 1)  # the last bit may round below 0


def resolves_aupimo(masks: Images, lower: float = 1e-5) -> bool:
    """Tell whether the normal images of `masks` have enough pixels for a false-positive rate."""
    sizes = [np.size(mask) for mask in masks if not np.any(mask)]
    return bool(sizes) and _smallest_rate(sizes) <= lower


def _smallest_rate(sizes: Sequence[int]) -> float:
    """Return the lowest false-positive rate above 0 that normal images of these sizes resolve."""
    return 1 / (len(sizes) * min(sizes))


def _shared_thresholds(
    normal: list[NDArray], lower: float, upper: float
) -> tuple[NDArray, NDArray[np.float64]]:
    """Return the thresholds of AUPIMO (K,) and the weight of each of the two recalls (2, K).

    The recalls are those above, and at or above, a threshold; all weights add up to 1. Only the
    highest scores of an image are sorted: those that a false-positive rate up to `upper` reaches.
    """
    sizes = [scores.size for scores in normal]
    n, size, smallest = len(sizes), min(sizes), _smallest_rate(sizes)
    if smallest > lower:
        got = f"{n} normal images, the smallest of {size} pixels, resolve a false-positive rate of"
        fix = f"give at least {math.ceil(1 / (lower * size) - 1e-9)} such images, or other bounds"
        raise ValueError(f"{got} {smallest:.1e}, but bounds start at {lower:.1e}: {fix}")
    values, rates = [], []
    for scores in normal:
        k = min(scores.size, int(upper * n * scores.size) + 1)
        highest, counts = np.unique(
            scores[scores >= np.partition(scores, -k)[-k]], return_counts=True
        )
        values.append(highest)
        rates.append(counts / (n * scores.size))
    thresholds, index = np.unique(np.concatenate(values), return_inverse=True)
    x = np.log(np.bincount(index, np.concatenate(rates))[::-1].cumsum())
    ends = np.clip(x, math.log(lower), math.log(upper))
    width = np.diff(ends, prepend=math.log(lower))
    at = np.zeros(len(x))  # joined linearly, the middle of the cut segment is its mean
    at[1:] = (ends[1:] - width[1:] / 2 - x[:-1]) / np.diff(x)
    used = width > 0
    weights = np.stack([1 - at, at])[:, used] * (width[used] / width.sum())
    return thresholds[::-1][used], weights


def pixel_f1_at_threshold(masks: Images, maps: Images, threshold: float) -> float:
    """Compute F1 in [0, 1] of the pixels with ``score > threshold``, pooled over all images.

    `masks` and `maps` as in `pixel_metrics`. The threshold comes from maps of normal images, never
    from these masks: ``dice_oracle`` is its upper bound. 0 if nothing is predicted. Raises
    ValueError for no anomalous pixel, NaN or infinity, unequal numbers or shapes, or a NaN
    threshold. Source: SegF1 of Heckler-Kram et al., "The MVTec AD 2 Dataset", arXiv:2503.21622.
    """
    _check_threshold(threshold, "pixel_threshold(calibration_maps)")
    true = predicted = anomalous = 0
    for mask, scores in checked_pixels(masks, maps):
        above = scores.astype(np.float64) > threshold  # not rounded to float32
        true += int(np.count_nonzero(above & mask))
        predicted += int(np.count_nonzero(above))
        anomalous += int(np.count_nonzero(mask))
    if not anomalous:
        raise ValueError(f"{len(masks)} masks hold 0 anomalous pixels: F1 needs at least one")
    return 2 * true / (predicted + anomalous)


def _rank_pixels(masks: Images, maps: Images) -> tuple[NDArray, NDArray, NDArray, int]:
    """Count pixels at the L thresholds, the distinct scores of anomalous pixels, highest first.

    Returns the normal pixels (above, at or above) each threshold (L, 2), the anomalous ones at or
    above it (L,), the mean overlap of regions (L,), and the number of normal pixels. Between two
    thresholds only normal pixels are added, so the curves are straight there: these points give
    the exact curves without an argsort of all pixels.
    """
    normal, anomalous, weights = [], [], []
    for mask, scores in checked_pixels(masks, maps):
        region = ndimage.label(mask, structure=np.ones((3, 3)))[0][mask]
        weights.append(1.0 / np.bincount(region)[region])  # a region's weights add up to 1
        normal.append(scores[~mask])
        anomalous.append(scores[mask])
    n_normal, n_anomalous = sum(map(len, normal)), sum(map(len, anomalous))
    check_kinds(masks, n_anomalous, n_normal)
    ranked = np.sort(np.concatenate(normal))
    thresholds, index = np.unique(np.concatenate(anomalous), return_inverse=True)
    below = np.stack([np.searchsorted(ranked, thresholds, s) for s in ("right", "left")], axis=1)
    overlap = np.bincount(index, np.concatenate(weights))[::-1].cumsum()
    true = np.bincount(index)[::-1].cumsum()
    return n_normal - below[::-1], true, overlap / overlap[-1], n_normal


def squared_errors(images: ArrayLike, reconstructions: ArrayLike) -> NDArray[np.float64]:
    """Compute the mean squared error of each reconstruction (N,).

    `images`, usually normal ones, and `reconstructions` are (N, C, H, W) or (N, H, W). Raises
    ValueError for other or unequal shapes, NaN or infinity.
    """
    pairs = _checked_batches(images=images, reconstructions=reconstructions)
    return np.array([np.mean((reconstruction - image) ** 2) for image, reconstruction in pairs])


def psnr(errors: ArrayLike, peak: float = 2.0) -> float:
    """Compute the peak signal-to-noise ratio of a set of images, in dB, from `squared_errors`.

    10 log10(peak^2 / mean error) for `errors` (N,) and the range `peak` of the values, 2 for -1..1:
    higher is closer to the images, infinity is exact. The errors are averaged, not the ratios of
    the images: one exact copy would make their mean infinite. Raises ValueError for another shape,
    errors below 0, NaN or infinity, or `peak` out of (0, infinity).
    """
    errors = np.asarray(errors, dtype=np.float64)
    check_finite(errors, "errors")
    if errors.ndim != 1 or not errors.size or errors.min() < 0:
        raise ValueError(f"errors {errors.shape}: give (N,) squared errors, N >= 1, from 0 up")
    if not 0 < peak < math.inf:
        raise ValueError(f"peak is {peak}: give the range of the values, 2 for images in -1..1")
    mean = errors.mean()
    return 10 * math.log10(peak**2 / mean) if mean > 0 else math.inf


def remaining_contrast(
    planted: ArrayLike, clean: ArrayLike, reconstructions: ArrayLike, masks: ArrayLike
) -> NDArray[np.float64]:
    """Compute the fraction of each planted defect that remains in the reconstruction (N,).

    `planted`, `clean` (the same images before planting) and `reconstructions` (of `planted`) are
    (N, C, H, W) or (N, H, W); `masks` (N, H, W) are 0 outside the defects. Inside a mask,
    reconstruction - clean is projected on planted - clean: 1 = the defect is unchanged, 0 = it is
    removed, below 0 = inverted, above 1 = amplified. Errors orthogonal to the defect do not count;
    `psnr` measures those. Other errors have either sign, so average over images, then compare
    absolute values. Raises ValueError for other or unequal shapes, NaN or infinity, or a defect
    that changes no pixel inside its mask.
    """
    inside = np.asarray(masks) != 0
    shape = np.shape(clean)
    if inside.ndim != 3 or inside.shape != (*shape[:1], *shape[-2:]):
        raise ValueError(f"masks {inside.shape}, clean {shape}: give one (H, W) mask per image")
    fractions = []
    batches = _checked_batches(planted=planted, clean=clean, reconstructions=reconstructions)
    for i, (image, twin, reconstruction) in enumerate(batches):
        defect = (image - twin)[..., inside[i]]
        remainder = (reconstruction - twin)[..., inside[i]]
        if not defect.any():
            where = f"planted[{i}] equals clean[{i}] inside masks[{i}]"
            raise ValueError(f"{where}: give the mask of a defect that changes the image")
        fractions.append((remainder * defect).sum() / (defect**2).sum())
    return np.array(fractions)


def bootstrap_auroc(
    labels: ArrayLike, scores: ArrayLike, *, n_boot: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Compute the 95 % percentile interval (low, high) of the image AUROC over resampled images.

    `labels` (n,); `scores` (n,) or (n_seeds, n). Every seed sees the same resampled images, and
    the AUROCs are averaged over seeds; the interval does not cover the spread of training, so list
    the seeds beside it. Images are resampled within each class. AUROC = 1 gives (1, 1): a bootstrap
    cannot invent harder images. Raises ValueError as `image_metrics`, and for `n_boot` < 1.
    Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993.
    """
    return _interval(_wins(labels, scores), n_boot, seed)


def paired_bootstrap_auroc(
    labels: ArrayLike,
    scores_a: ArrayLike,
    scores_b: ArrayLike,
    *,
    n_boot: int = 1000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Compute AUROC of a minus AUROC of b with its interval: (difference, low, high) in [-1, 1].

    Arguments, errors and source as in `bootstrap_auroc`. Both methods see the same resampled
    images; their numbers of seeds may differ. `verdict` judges the interval.
    """
    wins = _wins(labels, scores_a) - _wins(labels, scores_b)
    return float(wins.mean()), *_interval(wins, n_boot, seed)


def percentile_interval(draws: NDArray) -> tuple[float, float]:
    """Return the 95 % percentile interval (low, high) of bootstrap draws (n_boot,)."""
    low, high = np.quantile(draws, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]).tolist()
    return low, high


def _wins(labels: ArrayLike, scores: ArrayLike) -> NDArray[np.float64]:
    """Score each pair (n_defects, n_normal): defect above normal 1, tie 1/2; the mean is AUROC."""
    seeds = np.atleast_2d(np.asarray(scores)) if np.size(scores) else [scores]
    rows = [_checked_images(labels, row) for row in seeds]
    return 0.5 + 0.5 * sum(np.sign(row[d, None] - row[~d]) for d, row in rows) / len(rows)


def _interval(wins: NDArray, n_boot: int, seed: int) -> tuple[float, float]:
    rng = np.random.default_rng(seed)  # how often each image is drawn: defects, then normal ones
    n_boot = check_draws(n_boot)
    defects, normal = (rng.multinomial(n, np.full(n, 1 / n), size=n_boot) for n in wins.shape)
    return percentile_interval(((defects @ wins) * normal).sum(axis=1) / wins.size)


def check_draws(n_boot: int) -> int:
    """Return the number of resamplings; raise ValueError if it is below 1."""
    if n_boot < 1:
        raise ValueError(f"n_boot is {n_boot}: give at least 1 resampling")
    return n_boot


def verdict(low: float, high: float, minimum: float = 0.0, *, no_effect: float = 0.0) -> str:
    """Judge the claim "the effect is larger than `minimum`" by the interval [low, high].

    The first rule that applies decides:

    - "holds": low > minimum. Every value in the interval agrees with the claim.
    - "reversed": high < no_effect and high < minimum. The whole interval lies on the wrong side of
      no effect, which is 0 for a difference and 1 for a ratio, and no value agrees.
    - "does not hold": high <= minimum. No value agrees, also when there is no effect at all.
    - "inconclusive": the interval has values that agree and values that do not.

    A claim of non-inferiority has a `minimum` below `no_effect`. With a minimum of -0.02,
    [-0.01, -0.005] holds, [-0.05, -0.01] is inconclusive, and [-0.05, -0.03] is reversed. A person
    decides "not testable at this scale". Raises ValueError for NaN or low > high.
    """
    if not low <= high or math.isnan(minimum) or math.isnan(no_effect):
        limits = f"low {low}, high {high}, minimum {minimum}, no_effect {no_effect}"
        raise ValueError(f"{limits}: need low <= high and no NaN")
    if low > minimum:
        return "holds"
    if high < min(no_effect, minimum):
        return "reversed"
    return "does not hold" if high <= minimum else "inconclusive"


def _check_threshold(
    threshold: float, source: str = "conformal_threshold(calibration_scores)"
) -> None:
    if math.isnan(threshold):
        raise ValueError(f"threshold is nan: take one from {source}")


def check_kinds(masks: Images, n_anomalous: int, n_normal: int) -> None:
    """Raise ValueError unless `masks` have anomalous and normal pixels; their numbers are given."""
    if not n_normal or not n_anomalous:
        counts = f"{len(masks)} masks hold {n_anomalous} anomalous and {n_normal} normal pixels"
        raise ValueError(f"{counts}: give both kinds, or leave the pixel metrics out (null)")


def _checked_images(labels: ArrayLike, scores: ArrayLike) -> tuple[NDArray, NDArray]:
    labels, scores = np.asarray(labels), np.asarray(scores, dtype=np.float64)
    if labels.ndim != 1 or labels.shape != scores.shape:
        raise ValueError(f"labels {labels.shape}, scores {scores.shape}: give both for each image")
    check_finite(scores, "scores")
    classes = np.unique(labels).tolist()
    if classes != [0, 1]:
        raise ValueError(f"labels holds {classes[:5]}: give both 0 (normal) and 1 (anomalous)")
    return labels.astype(bool), scores


def checked_pixels(masks: Images, maps: Images) -> Iterator[tuple[NDArray, NDArray]]:
    """Yield mask (H, W), bool, and map (H, W) of each image; raise ValueError for broken ones."""
    if len(masks) != len(maps):
        raise ValueError(f"{len(masks)} masks, {len(maps)} maps: give one mask and map per image")
    for i in range(len(masks)):
        mask, scores = np.asarray(masks[i]) != 0, np.asarray(maps[i])
        if mask.ndim != 2 or mask.shape != scores.shape:
            sizes = f"masks[{i}] is {mask.shape}, maps[{i}] is {scores.shape}"
            raise ValueError(f"{sizes}: up-sample each map to its mask's original (H, W)")
        check_finite(scores, f"maps[{i}]")
        yield mask, scores


def _checked_batches(**batches: ArrayLike) -> Iterator[list[NDArray]]:
    arrays = {name: np.asarray(batch) for name, batch in batches.items()}
    shapes = {array.shape for array in arrays.values()}
    if len(shapes) > 1 or len(min(shapes)) not in (3, 4) or 0 in min(shapes):
        got = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
        raise ValueError(f"{got}: give equal shapes (N, C, H, W) or (N, H, W), N >= 1")
    for name, array in arrays.items():
        check_finite(array, name)
    for images in zip(*arrays.values(), strict=True):
        yield [image.astype(np.float64) for image in images]
