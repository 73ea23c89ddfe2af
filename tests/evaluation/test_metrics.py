"""Metrics against brute force, scikit-learn, and the properties that their docstrings promise."""

import json
import math
import warnings
from itertools import pairwise, product
from operator import ge, gt

import numpy as np
import pytest
from anomalib_reference import LIMITS, REFERENCE, digest, random_maps
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

from diffad_lite.evaluation.metrics import (
    aupimo,
    aupro,
    bootstrap_auroc,
    f1_at_threshold,
    false_alarm_rate,
    image_metrics,
    paired_bootstrap_auroc,
    pixel_f1_at_threshold,
    pixel_metrics,
    psnr,
    remaining_contrast,
    squared_errors,
    verdict,
)
from diffad_lite.methods.calibration import MapCalibration, conformal_threshold, top_k_mean

RNG = np.random.default_rng
relaxed = settings(deadline=None)  # a first call that imports or warms up is no failure


def brute_force_aupro(masks, maps, limit):
    """Follow the definition: one boolean prediction per threshold, one average per region."""
    regions = []
    for i, mask in enumerate(masks):
        labelled, n = ndimage.label(mask, np.ones((3, 3)))
        regions += [(i, labelled == r) for r in range(1, n + 1)]
    points = [(0.0, 0.0)]
    n_normal = sum((mask == 0).sum() for mask in masks)
    for threshold in sorted({v for scores in maps for v in scores.ravel().tolist()}, reverse=True):
        predictions = [scores >= threshold for scores in maps]
        false = sum((p & (m == 0)).sum() for p, m in zip(predictions, masks, strict=True))
        overlap = np.mean([predictions[i][region].mean() for i, region in regions])
        points.append((false / n_normal, overlap))
    area = 0.0
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 < limit and x1 > x0:
            end = min(x1, limit)
            y_end = y0 + (y1 - y0) * (end - x0) / (x1 - x0)
            area += (end - x0) * (y0 + y_end) / 2
    return area / limit


eight_by_eight = st.just((8, 8))


@st.composite
def pixel_data(draw, shapes=eight_by_eight):
    """Draw one to three images with both kinds of pixels; integer scores give many ties."""
    sizes = [draw(shapes) for _ in range(draw(st.integers(1, 3)))]
    masks = [draw(arrays(np.uint8, size, elements=st.integers(0, 1))) for size in sizes]
    top = draw(st.sampled_from([1, 4, 1000]))
    maps = [draw(arrays(np.int64, s, elements=st.integers(-top, top))) for s in sizes]
    masks[0].flat[0], masks[0].flat[-1] = 0, 1
    return masks, [scores.astype(np.float32) for scores in maps]


any_shape = st.tuples(st.integers(2, 9), st.integers(2, 9))
limits = st.sampled_from([0.05, 0.3, 0.5, 1.0])
labels_and_scores = st.integers(2, 30).flatmap(
    lambda n: st.tuples(
        arrays(np.int64, n, elements=st.integers(0, 1)).filter(lambda a: 0 < a.sum() < a.size),
        arrays(np.float64, n, elements=st.integers(-3, 3)),
    )
)


# --- image level ---------------------------------------------------------------------------


@relaxed
@given(labels_and_scores)
def test_image_metrics_equal_scikit_learn_and_a_loop_over_thresholds(data):
    labels, scores = data
    got = image_metrics(labels, scores)
    assert got["image_auroc"] == pytest.approx(roc_auc_score(labels, scores))
    assert got["image_ap"] == pytest.approx(average_precision_score(labels, scores))
    best = max(f1_score(labels, scores >= t) for t in np.unique(scores))
    assert got["image_f1max_oracle"] == pytest.approx(best)


def test_f1_at_threshold_is_strict_and_never_beats_the_oracle():
    labels, scores = [0, 0, 1, 1], [0.0, 1.0, 1.0, 2.0]
    assert f1_at_threshold(labels, scores, 1.0) == pytest.approx(2 / 3)  # 1.0 is not above 1.0
    assert f1_at_threshold(labels, scores, 5.0) == 0.0
    oracle = image_metrics(labels, scores)["image_f1max_oracle"]
    assert all(f1_at_threshold(labels, scores, t) <= oracle for t in (-1, 0, 0.5, 1, 1.5))


@pytest.mark.parametrize(
    ("labels", "scores", "message"),
    [
        ([0, 1, 1], [0.0, 1.0], r"labels \(3,\), scores \(2,\): give both for each image"),
        ([[0, 1]], [[0.0, 1.0]], r"labels \(1, 2\)"),
        ([0, 1, 1], [0.0, np.nan, 1.0], r"scores has 1 NaN or infinite values, the first at \[1\]"),
        ([0, 1, 1], [0.0, np.inf, 1.0], r"find the image whose prediction fails or overflows"),
        ([0, 0], [0.0, 1.0], r"labels holds \[0\]: give both 0 \(normal\) and 1 \(anomalous\)"),
        ([0, 1, 2], [0.0, 1.0, 2.0], r"labels holds \[0, 1, 2\]"),
    ],
)
def test_image_functions_refuse_what_has_no_answer(labels, scores, message):
    calls = (
        image_metrics,
        lambda a, b: f1_at_threshold(a, b, 0.5),
        lambda a, b: bootstrap_auroc(a, b, n_boot=2),
        lambda a, b: paired_bootstrap_auroc(a, b, b, n_boot=2),
    )
    for call in calls:
        if np.ndim(labels) == 2 and call in calls[2:]:
            continue  # scores (n_seeds, n) are allowed there
        with pytest.raises(ValueError, match=message):
            call(labels, scores)


def test_f1_refuses_a_threshold_of_nan():
    with pytest.raises(ValueError, match="threshold is nan: take one from conformal_threshold"):
        f1_at_threshold([0, 1], [0.0, 1.0], math.nan)


# --- pixel level ---------------------------------------------------------------------------


@relaxed
@given(pixel_data(), limits)
def test_aupro_equals_brute_force_with_ties(data, limit):
    masks, maps = data
    assert aupro(masks, maps, limit) == pytest.approx(brute_force_aupro(masks, maps, limit))


@relaxed
@given(pixel_data(any_shape))
def test_pixel_metrics_equal_scikit_learn_with_ties_and_unequal_sizes(data):
    masks, maps = data
    labels, scores = (np.concatenate([a.ravel() for a in arrays_]) for arrays_ in data)
    got = pixel_metrics(masks, maps)
    assert got["pixel_auroc"] == pytest.approx(roc_auc_score(labels, scores))
    assert got["pixel_ap"] == pytest.approx(average_precision_score(labels, scores))
    best_dice = max(f1_score(labels, scores >= t) for t in np.unique(scores))
    assert got["dice_oracle"] == pytest.approx(best_dice)
    assert got["aupro"] == aupro(masks, maps)
    assert got["aupro_05"] == aupro(masks, maps, 0.05)


@relaxed
@given(pixel_data(any_shape), limits)
def test_pixel_metrics_see_ranks_only(data, limit):
    masks, maps = data
    before = pixel_metrics(masks, maps) | {"any limit": aupro(masks, maps, limit)}
    assert all(0 <= value <= 1 for value in before.values())
    for increasing in (lambda a: 3 * a - 7, lambda a: a**3, lambda a: np.exp(a / 100)):
        transformed = [increasing(scores.astype(np.float64)) for scores in maps]
        after = pixel_metrics(masks, transformed) | {"any limit": aupro(masks, transformed, limit)}
        assert after == before  # to the last bit


@relaxed
@given(pixel_data(any_shape), st.randoms(use_true_random=False))
def test_pixel_metrics_do_not_depend_on_the_order_of_images(data, random):
    order = list(range(len(data[0])))
    random.shuffle(order)
    shuffled = ([array[i] for i in order] for array in data)
    assert pixel_metrics(*shuffled) == pytest.approx(pixel_metrics(*data), abs=1e-12)


def ring(size=32):
    y, x = np.mgrid[:size, :size] - size // 2
    return (np.hypot(y, x) < 10) & (np.hypot(y, x) > 6)


@relaxed
@given(pixel_data(any_shape), limits)
def test_a_perfect_map_scores_one_and_an_inverted_one_zero(data, limit):
    masks = [*data[0], ring()]  # the hole of the ring is normal, and not to be found
    assert aupro(masks, masks, limit) == 1.0
    assert pixel_metrics(masks, masks) == dict.fromkeys(pixel_metrics(masks, masks), 1.0)
    assert aupro(masks, [1.0 - mask for mask in masks], limit) == 0.0


def test_filling_the_hole_of_a_ring_is_paid_as_false_positives():
    mask = ring()
    filled = ndimage.binary_fill_holes(mask)
    hole = (filled.sum() - mask.sum()) / (~mask).sum()  # the first point is (hole, 1)
    assert aupro([mask], [filled.astype(float)]) == pytest.approx(1 - hole / 2 / 0.3)


def test_aupro_by_hand():
    # Regions of 1 and 2 pixels, diagonal neighbours are one region; 7 normal pixels.
    mask = np.array([[1, 0, 0, 0, 1], [0, 0, 0, 1, 0]])
    scores = np.array([[9.0, 8.0, 1.0, 1.0, 5.0], [1.0, 1.0, 1.0, 7.0, 6.0]])
    # (0, 1/2), (1/7, 1/2), (1/7, 3/4), (2/7, 3/4), (2/7, 1), (1, 1)
    area = (1 / 7) * 0.5 + (1 / 7) * 0.75 + (0.3 - 2 / 7) * 1
    assert aupro([mask], [scores]) == pytest.approx(area / 0.3)


def test_ties_across_the_limit_are_one_straight_segment():
    mask = np.array([[1, 0], [1, 0]])
    assert aupro([mask], [np.zeros((2, 2))]) == pytest.approx(0.15)  # y = x up to 0.3
    assert aupro([mask], [np.zeros((2, 2))], limit=1.0) == pytest.approx(0.5)


def test_reference_value_on_a_synthetic_set():
    """An independent re-statement: the curve as a step function of normal-pixel quantiles."""
    rng, size = RNG(3), 64
    y, x = np.mgrid[:size, :size]
    discs = [(16, 16, 9), (44, 40, 4), (20, 50, 2)]
    mask = np.zeros((size, size), int)
    scores = rng.normal(size=(size, size))
    for r, (cy, cx, radius) in enumerate(discs, start=1):
        mask[np.hypot(y - cy, x - cx) <= radius] = r
    scores[mask > 0] += rng.normal(1.5, 0.5, (mask > 0).sum())
    # No ties: with j normal pixels above the threshold, a region is covered by what beats the
    # (j + 1)-th normal pixel; the area under the steps is a mean over j, the last one cut.
    normal = np.sort(scores[mask == 0])[::-1]
    covered = np.mean([(scores[mask == r] > normal[:, None]).mean(1) for r in (1, 2, 3)], axis=0)
    width = np.clip(0.3 * normal.size - np.arange(normal.size), 0, 1)
    expected = (covered * width).sum() / (0.3 * normal.size)
    assert aupro([mask], [scores]) == pytest.approx(expected, abs=1e-12)
    assert 0.5 < expected < 0.95


def test_images_without_a_mask_count_as_normal_pixels():
    mask, scores = ring(), RNG(0).normal(size=(32, 32))
    quiet = aupro([mask, np.zeros((5, 7))], [scores, np.full((5, 7), -9.0)], limit=0.1)
    loud = aupro([mask, np.zeros((5, 7))], [scores, np.full((5, 7), 9.0)], limit=0.1)
    assert loud < aupro([mask], [scores], limit=0.1) < quiet


@pytest.mark.parametrize(
    ("masks", "maps", "message"),
    [
        ([np.zeros((4, 4))], [np.zeros((4, 4))], "1 masks hold 0 anomalous and 16 normal pixels"),
        ([np.ones((4, 4))], [np.zeros((4, 4))], "16 anomalous and 0 normal .* give both kinds"),
        ([], [], "0 masks hold 0 anomalous and 0 normal pixels"),
        ([np.eye(4)], [], "1 masks, 0 maps: give one mask and map per image"),
        (
            [np.eye(4), np.eye(4)],
            [np.eye(4), np.eye(2)],
            r"masks\[1\] is \(4, 4\), maps\[1\] is \(2, 2\): up-sample each map",
        ),
        ([np.ones((1, 4, 4))], [np.ones((1, 4, 4))], r"masks\[0\] is \(1, 4, 4\)"),
        (
            [np.eye(4)],
            [np.where(np.eye(4) > 0, np.nan, 0)],
            r"maps\[0\] has 4 NaN or infinite values, the first at \[0, 0\]",
        ),
    ],
)
def test_pixel_functions_refuse_what_has_no_answer(masks, maps, message):
    for call in (aupro, pixel_metrics):
        with pytest.raises(ValueError, match=message):
            call(masks, maps)


@pytest.mark.parametrize("limit", [0.0, -0.1, 1.1, math.nan])
def test_aupro_refuses_a_limit_out_of_range(limit):
    with pytest.raises(ValueError, match="give a false-positive rate in"):
        aupro([np.eye(2)], [np.eye(2)], limit)


def test_cpu_tensors_are_taken_as_they_are():
    torch = pytest.importorskip("torch")
    rng = RNG(0)
    masks, maps = rng.random((6, 8, 8)) < 0.2, rng.random((6, 8, 8), dtype=np.float32)
    labels, scores = np.arange(6) % 2, maps.max(axis=(1, 2))
    t_masks, t_maps, t_labels, t_scores = map(torch.from_numpy, (masks, maps, labels, scores))
    assert pixel_metrics(t_masks, t_maps) == pixel_metrics(masks, maps)
    assert image_metrics(t_labels, t_scores) == image_metrics(labels, scores)
    assert conformal_threshold(t_scores, 0.5) == conformal_threshold(scores, 0.5)
    assert bootstrap_auroc(t_labels, t_scores) == bootstrap_auroc(labels, scores)
    np.testing.assert_array_equal(top_k_mean(t_maps, 0.1), top_k_mean(maps, 0.1))
    np.testing.assert_array_equal(
        MapCalibration.cross_fit(t_maps, 3), MapCalibration.cross_fit(maps, 3)
    )


# --- AUPIMO ----------------------------------------------------------------------------------


def brute_force_aupimo(masks, maps, bounds):
    """Follow the definition: two boolean predictions per threshold, one curve per image."""
    images = list(zip(masks, maps, strict=True))
    normal = [scores for mask, scores in images if not mask.any()]
    lower, upper = (math.log(bound) for bound in bounds)
    areas = []
    for mask, scores in images:
        if not mask.any():
            continue
        area = 0.0
        for s in {value for array in normal for value in array.ravel().tolist()}:
            x0, x1 = (np.mean([f(array, s).mean() for array in normal]) for f in (gt, ge))
            y0, y1 = (f(scores[mask != 0], s).mean() for f in (gt, ge))
            if x0 == 0:  # from minus infinity, level
                x0, y1 = 1e-300, y0
            x0, x1 = math.log(x0), math.log(x1)
            start, end = (min(max(x, lower), upper) for x in (x0, x1))
            y_start, y_end = (y0 + (y1 - y0) * (x - x0) / (x1 - x0) for x in (start, end))
            area += (end - start) * (y_start + y_end) / 2
        areas.append(area / (upper - lower))
    return areas


@st.composite
def images_of_both_kinds(draw, shapes=eight_by_eight):
    """Draw one to three anomalous images, and one to three normal ones between them."""
    masks, maps = draw(pixel_data(shapes))
    for _ in range(draw(st.integers(1, 3))):
        normal = np.zeros(draw(shapes), np.uint8)
        place = draw(st.integers(0, len(masks)))
        scores = draw(arrays(np.int64, normal.shape, elements=st.integers(-5, 5)))
        masks.insert(place, normal)
        maps.insert(place, scores.astype(np.float32))
    return masks, maps


wide_bounds = st.sampled_from([(0.25, 0.5), (0.25, 1.0), (0.3, 0.31), (0.5, 0.9)])


@relaxed
@given(images_of_both_kinds(any_shape), wide_bounds)
def test_aupimo_equals_brute_force_with_ties_and_unequal_sizes(data, bounds):
    got = aupimo(*data, bounds)
    np.testing.assert_allclose(got, brute_force_aupimo(*data, bounds), atol=1e-9)
    assert got.shape == (sum(mask.any() for mask in data[0]),)
    assert ((got >= 0) & (got <= 1)).all()


@pytest.mark.parametrize("bounds", [(0.01, 0.1), (0.013, 0.17), (0.005, 1.0)])
def test_aupimo_equals_brute_force_on_larger_maps(bounds):
    rng = RNG(1)
    masks = rng.random((6, 16, 16)) < 0.1
    masks[::2] = False
    for decimals in (1, 2, 9):
        maps = np.round(rng.normal(size=masks.shape) + 1.5 * masks, decimals)
        got = aupimo(masks, maps, bounds)
        np.testing.assert_allclose(got, brute_force_aupimo(masks, maps, bounds), atol=1e-9)
        assert (got > 0).all()
        assert (got < 1).all()


@relaxed
@given(images_of_both_kinds(any_shape), wide_bounds)
def test_aupimo_sees_ranks_only_and_each_anomalous_image_alone(data, bounds):
    masks, maps = data
    before = aupimo(masks, maps, bounds)
    for increasing in (lambda a: 3 * a - 7, lambda a: a**3, lambda a: np.exp(a / 100)):
        transformed = [increasing(scores.astype(np.float64)) for scores in maps]
        np.testing.assert_array_equal(aupimo(masks, transformed, bounds), before)
    np.testing.assert_allclose(aupimo(masks[::-1], maps[::-1], bounds), before[::-1], atol=1e-12)
    kept = [i for i, mask in enumerate(masks) if not mask.any()]
    kept.append(next(i for i, mask in enumerate(masks) if mask.any()))
    alone = aupimo([masks[i] for i in kept], [maps[i] for i in kept], bounds)
    np.testing.assert_array_equal(alone, before[:1])


@relaxed
@given(images_of_both_kinds(any_shape), wide_bounds)
def test_aupimo_ignores_normal_pixels_of_anomalous_images(data, bounds):
    masks, maps = data
    loud = [np.where(m.any() & (m == 0), 9999, s) for m, s in zip(masks, maps, strict=True)]
    np.testing.assert_array_equal(aupimo(masks, loud, bounds), aupimo(masks, maps, bounds))


def test_aupimo_of_perfect_constant_and_inverted_maps():
    masks = np.zeros((12, 100, 100))
    masks[0, :20], masks[1, :3, :3] = 1, 1
    for perfect in (masks, masks + RNG(0).random(masks.shape)):
        np.testing.assert_array_equal(aupimo(masks, perfect), [1.0, 1.0])
    np.testing.assert_array_equal(aupimo(masks, np.ones(masks.shape)), [0.0, 0.0])
    np.testing.assert_array_equal(aupimo(masks, -masks), [0.0, 0.0])
    # All normal scores tie: recall without false positives is 0, and (1, 1) is the only point.
    np.testing.assert_array_equal(aupimo(masks, np.full(masks.shape, 5.0), (0.1, 1.0)), [0, 0])


def test_aupimo_by_hand():
    # 10 normal pixels; the defect's pixels beat all, all but one, and all but three of them.
    normal = np.arange(10.0).reshape(2, 5)
    mask, scores = np.array([[1, 1, 1, 0]]), np.array([[20.0, 8.5, 6.5, 0.0]])
    # recall 1/3 up to 1/10 of the normal pixels, 2/3 up to 3/10, then 1
    area = (math.log(3) * 2 / 3 + math.log(4 / 3)) / math.log(4)
    got = aupimo([np.zeros((2, 5)), mask], [normal, scores], (0.1, 0.4))
    np.testing.assert_allclose(got, [area])
    # A tie with one normal pixel is a line over log x: half of what its recall adds.
    tied = aupimo([np.zeros((2, 5)), mask], [normal, [[20.0, 8.0, 6.5, 0.0]]], (0.1, 0.2))
    np.testing.assert_allclose(tied, [0.5])


@pytest.mark.parametrize(
    ("n", "bounds", "message"),
    [
        (5, (1e-5, 1e-4), r"5 normal images, .* 4096 pixels, .* 4.9e-05, but bounds start at 1.0e"),
        (24, (1e-5, 1e-4), "24 normal images.*: give at least 25 such images, or other bounds"),
        (0, (1e-5, 1e-4), "1 anomalous and 0 normal images: give both kinds"),
        (25, (1e-4, 1e-5), r"bounds are \(0.0001, 1e-05\): give false-positive rates 0 < lower"),
        (25, (0.0, 0.5), "0 < lower < upper <= 1"),
        (25, (0.5, 1.5), "0 < lower < upper <= 1"),
        (25, (math.nan, 0.5), "0 < lower < upper <= 1"),
    ],
)
def test_aupimo_refuses_what_has_no_answer(n, bounds, message):
    masks = np.zeros((n + 1, 64, 64))
    masks[-1, 0, 0] = 1
    with pytest.raises(ValueError, match=message):
        aupimo(masks, masks, bounds)
    if n:
        with pytest.raises(ValueError, match=f"0 anomalous and {n} normal images"):
            aupimo(masks[:n], masks[:n], (0.1, 0.2))


def test_aupimo_takes_exactly_as_many_pixels_as_the_bounds_need():
    masks = np.zeros((11, 100, 100))
    masks[-1, 0, 0] = 1
    assert aupimo(masks, masks) == 1.0
    with pytest.raises(ValueError, match=r"9 normal images.* give at least 10 such images"):
        aupimo(masks[1:], masks[1:])


REFERENCES = json.loads(REFERENCE.read_text(encoding="utf-8"))["sets"]


@pytest.mark.parametrize("entry", REFERENCES, ids=lambda e: f"{e['seed']}-{e['ties']}")
def test_aupimo_and_aupro_equal_anomalib(entry):
    masks, maps, _ = random_maps(entry["seed"], entry["ties"], entry["defects"])
    assert digest(masks, maps) == entry["digest"], "NumPy draws other maps: make the file again"
    np.testing.assert_allclose(aupimo(masks, maps), entry["aupimo"], rtol=0, atol=1e-6)
    for limit in LIMITS:
        assert aupro(masks, maps, limit) == pytest.approx(entry[f"aupro_{limit}"], abs=1e-6)


def test_the_reference_holds_all_kinds_of_maps():
    assert len(REFERENCES) == 20
    assert {entry["ties"] for entry in REFERENCES} == {"none", "pairs", "few scores"}
    defects = {entry["defects"] for entry in REFERENCES}
    assert defects == {"random", "at most normal", "constant", "perfect"}
    areas = [area for entry in REFERENCES for area in entry["aupimo"]]
    assert sum(0.05 < area < 0.95 for area in areas) > 20


# --- at a threshold --------------------------------------------------------------------------


@relaxed
@given(pixel_data(any_shape), st.sampled_from([-2.0, 0.0, 0.5, 3.0, 2000.0]))
def test_pixel_f1_equals_scikit_learn_and_never_beats_the_oracle(data, threshold):
    labels, scores = (np.concatenate([a.ravel() for a in arrays_]) for arrays_ in data)
    got = pixel_f1_at_threshold(*data, threshold)
    assert got == pytest.approx(f1_score(labels, scores > threshold, zero_division=0))
    assert got <= pixel_metrics(*data)["dice_oracle"] + 1e-12


def test_pixel_f1_is_strict_and_does_not_round_the_threshold():
    mask, scores = np.array([[1, 0]]), np.array([[1.0, 0.0]], np.float32)
    assert pixel_f1_at_threshold([mask], [scores], 0.0) == 1.0
    assert pixel_f1_at_threshold([mask], [scores], 1.0) == 0.0
    assert pixel_f1_at_threshold([mask], [scores], 1 - 1e-12) == 1.0  # 1 in float32
    assert pixel_f1_at_threshold([mask], [scores], -math.inf) == pytest.approx(2 / 3)


def test_pixel_f1_refuses():
    with pytest.raises(ValueError, match="1 masks hold 0 anomalous pixels: F1 needs at least one"):
        pixel_f1_at_threshold([np.zeros((2, 2))], [np.zeros((2, 2))], 0.0)
    with pytest.raises(ValueError, match="threshold is nan"):
        pixel_f1_at_threshold([np.eye(2)], [np.eye(2)], math.nan)
    with pytest.raises(ValueError, match=r"masks\[0\] is \(2, 2\), maps\[0\] is \(3, 3\)"):
        pixel_f1_at_threshold([np.eye(2)], [np.eye(3)], 0.0)


@pytest.mark.parametrize(("alarms", "n"), [(0, 20), (1, 20), (7, 20), (20, 20), (3, 400)])
def test_false_alarm_rate_has_the_exact_interval(alarms, n):
    scores = RNG(n).permutation(np.arange(n) < alarms) + 1.0  # 2 is a false alarm, 1 is not
    rate, low, high = false_alarm_rate(scores, 1.0)
    assert rate == alarms / n

    def tail(p, counts):
        return sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in counts)

    # As many alarms or more have 2.5 % at the low end; as many or fewer at the high end.
    if alarms:
        assert tail(low, range(alarms, n + 1)) == pytest.approx(0.025, rel=1e-6)
    if alarms < n:
        assert tail(high, range(alarms + 1)) == pytest.approx(0.025, rel=1e-6)
    assert (low == 0) == (alarms == 0)
    assert (high == 1) == (alarms == n)


def test_false_alarm_rate_refuses():
    for scores, threshold, message in [
        ([], 0.0, r"scores \(0,\): give shape \(n,\), one score per normal image"),
        ([[1.0]], 0.0, r"scores \(1, 1\)"),
        ([1.0, math.inf], 0.0, "scores has 1 NaN or infinite values"),
        ([1.0], math.nan, "threshold is nan: take one from conformal_threshold"),
    ]:
        with pytest.raises(ValueError, match=message):
            false_alarm_rate(scores, threshold)


# --- reconstructions -------------------------------------------------------------------------

image_shapes = pytest.mark.parametrize("shape", [(3, 5, 6), (3, 2, 5, 6)])


@image_shapes
def test_squared_errors_equal_a_loop(shape):
    rng = RNG(0)
    images = rng.uniform(-1, 1, shape).astype(np.float32)
    reconstructions = images + rng.normal(scale=0.1, size=shape).astype(np.float32)
    got = squared_errors(images, reconstructions)
    for image, reconstruction, value in zip(images, reconstructions, got, strict=True):
        pixels = list(zip(image.ravel().tolist(), reconstruction.ravel().tolist(), strict=True))
        assert value == pytest.approx(sum((a - b) ** 2 for a, b in pixels) / len(pixels))
    np.testing.assert_allclose(squared_errors(reconstructions, images), got)
    np.testing.assert_array_equal(squared_errors(images[::-1], reconstructions[::-1]), got[::-1])


def test_psnr_by_hand():
    image = np.zeros((1, 4, 4))
    assert psnr(squared_errors(image, image + 2)) == 0.0  # wrong by the whole range
    assert psnr(squared_errors(image, image + 0.2)) == pytest.approx(20)
    assert psnr(squared_errors(image / 2, image / 2 + 0.1), peak=1) == pytest.approx(20)
    assert psnr(squared_errors(image, image)) == math.inf
    # An exact copy does not make the others exact: errors are averaged, not decibels.
    assert psnr([0.0, 0.08]) == pytest.approx(20)


def planted_images(shape):
    rng = RNG(2)
    clean = rng.uniform(-1, 1, shape)
    masks = rng.random((shape[0], *shape[-2:])) < 0.4
    inside = masks.reshape(shape[0], *[1] * (len(shape) - 3), *shape[-2:])
    return clean, clean + inside * rng.normal(size=shape), inside, masks


@image_shapes
def test_remaining_contrast_equals_a_loop(shape):
    clean, planted, _, masks = planted_images(shape)
    reconstructions = clean + RNG(3).normal(size=shape)
    got = remaining_contrast(planted, clean, reconstructions, masks)
    for i, value in enumerate(got):
        pixels = [p for p in np.ndindex(clean[i].shape) if masks[i][p[-2:]]]
        dot = sum((reconstructions[i] - clean[i])[p] * (planted[i] - clean[i])[p] for p in pixels)
        squares = sum((planted[i] - clean[i])[p] ** 2 for p in pixels)
        assert value == pytest.approx(dot / squares)


@image_shapes
def test_remaining_contrast_is_linear_and_looks_inside_the_mask_only(shape):
    clean, planted, inside, masks = planted_images(shape)
    for fraction in (-0.5, 0.0, 0.3, 1.0, 2.0):
        partly = clean + fraction * (planted - clean)
        elsewhere = partly + 7 * ~inside
        for reconstructions in (partly, elsewhere):
            got = remaining_contrast(planted, clean, reconstructions, masks)
            np.testing.assert_allclose(got, fraction, atol=1e-12)
    scaled = remaining_contrast(3 * planted - 1, 3 * clean - 1, 3 * partly - 1, masks)
    np.testing.assert_allclose(scaled, fraction)
    # A wrong reconstruction that has nothing of the defect counts nothing.
    defect = np.zeros((1, 2, 2))
    defect[0, 0] = 1, 1
    error = np.array([[[1.0, -1.0], [5.0, 5.0]]])
    assert remaining_contrast(defect, 0 * defect, error, defect) == 0.0


def test_measures_of_reconstructions_refuse():
    images, masks = np.zeros((2, 1, 4, 4)), np.ones((2, 4, 4))
    broken = images.copy()
    broken[1, 0, 2, 3] = np.nan
    for call, message in [
        (
            lambda: squared_errors(images, images[:1]),
            r"images \(2, 1, 4, 4\), reconstructions \(1, 1, 4, 4\)",
        ),
        (
            lambda: squared_errors(images[0, 0], images[0, 0]),
            r"give equal shapes \(N, C, H, W\) or",
        ),
        (lambda: squared_errors(images[:0], images[:0]), "N >= 1"),
        (lambda: squared_errors(images, broken), r"reconstructions has 1 NaN .* at \[1, 0, 2, 3\]"),
        (lambda: psnr([0.1], peak=0), "peak is 0: give the range of the values, 2 for"),
        (lambda: psnr([0.1], peak=math.nan), "peak is nan"),
        (lambda: psnr([]), r"errors \(0,\): give \(N,\) squared errors"),
        (lambda: psnr([0.1, -0.1]), "from 0 up"),
        (lambda: psnr([math.inf]), "errors has 1 NaN or infinite"),
        (
            lambda: remaining_contrast(images + 1, images, images, masks[:1]),
            r"masks \(1, 4, 4\), clean \(2, 1, 4, 4\): give one \(H, W\) mask per image",
        ),
        (lambda: remaining_contrast(images + 1, images, images, images), r"masks \(2, 1, 4, 4\)"),
        (lambda: remaining_contrast(images + 1, images, images[:1], masks), "planted .*, clean .*"),
        (lambda: remaining_contrast(broken, images, images, masks), "planted has 1 NaN"),
        (
            lambda: remaining_contrast(images, images, images, masks),
            r"planted\[0\] equals clean\[0\] inside masks\[0\]: give the mask of a defect that",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


# --- thresholds, intervals, verdicts ---------------------------------------------------------


@relaxed
@given(st.integers(1, 200), st.sampled_from([0.05, 0.07, 0.5, 0.8, 0.9, 0.95, 0.99]))
@example(99, 0.07)  # ceil(0.07 * 100) is 8 in floats
def test_conformal_threshold_has_the_exact_rank(n, q):
    hundredths = round(100 * q)
    k = -(-(n + 1) * hundredths // 100)  # integer ceiling
    smallest_n = -(-hundredths // (100 - hundredths))
    scores = RNG(n).permutation(np.arange(1, n + 1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert conformal_threshold(scores, q) == min(k, n)
    assert bool(caught) == (k > n) == (n < smallest_n)
    if caught:
        message = str(caught[0].message)
        assert f"{n} scores, q = {q}" in message
        assert f"give at least {smallest_n}, or lower q" in message


def test_conformal_threshold_keeps_its_promise_on_new_images():
    scores = RNG(0).exponential(size=(4000, 31))  # 30 for calibration, 1 new
    thresholds = [conformal_threshold(row[:30], 0.9) for row in scores]
    kept = np.mean(scores[:, 30] <= thresholds)
    assert kept == pytest.approx(28 / 31, abs=0.02)  # exactly k / (n + 1), here at least 0.9


@pytest.mark.parametrize(
    ("scores", "q", "message"),
    [
        ([], 0.95, r"scores \(0,\), q 0.95: need shape \(n,\) with n >= 1"),
        ([[1.0]], 0.95, r"scores \(1, 1\)"),
        ([1.0], 1.0, "q 1.0: .* 0 < q < 1"),
        ([1.0], 0.0, "0 < q < 1"),
        ([1.0, np.nan], 0.5, r"calibration_scores has 1 NaN .* at \[1\]"),
    ],
)
def test_conformal_threshold_refuses(scores, q, message):
    with pytest.raises(ValueError, match=message):
        conformal_threshold(scores, q)


def resampled_aurocs(labels, rows, n_boot, seed):
    """Compute AUROCs by scikit-learn on the same resamples: first defects, then normal images."""
    n_defects, n_normal = int(labels.sum()), int((1 - labels).sum())
    rng = RNG(seed)
    defects = rng.multinomial(n_defects, np.full(n_defects, 1 / n_defects), size=n_boot)
    normal = rng.multinomial(n_normal, np.full(n_normal, 1 / n_normal), size=n_boot)
    aurocs = []
    for b in range(n_boot):
        times = np.empty(labels.size, int)
        times[labels == 1], times[labels == 0] = defects[b], normal[b]
        images = np.repeat(np.arange(labels.size), times)
        aurocs.append([roc_auc_score(labels[images], row[images]) for row in rows])
    return np.mean(aurocs, axis=1)


def bootstrap_data():
    rng = RNG(5)
    labels = rng.permutation(np.arange(40) % 3 == 0).astype(int)
    scores_a = np.round(rng.normal(size=(3, 40)) + labels, 1)  # rounded: ties
    return labels, scores_a, np.round(scores_a[:2] + rng.normal(size=(2, 40)), 1)


def test_bootstraps_equal_a_scikit_learn_loop_over_the_same_resamples():
    labels, a, b = bootstrap_data()
    for rows in (a, a[:1]):
        expected = np.quantile(resampled_aurocs(labels, rows, 60, 7), [0.025, 0.975])
        got = bootstrap_auroc(labels, rows, n_boot=60, seed=7)
        assert got == pytest.approx(expected.tolist())
    differences = resampled_aurocs(labels, a, 60, 7) - resampled_aurocs(labels, b, 60, 7)
    got = paired_bootstrap_auroc(labels, a, b, n_boot=60, seed=7)
    mean = [np.mean([roc_auc_score(labels, row) for row in rows]) for rows in (a, b)]
    assert got[0] == pytest.approx(mean[0] - mean[1])
    assert got[1:] == pytest.approx(np.quantile(differences, [0.025, 0.975]).tolist())


def test_bootstrap_properties():
    labels, a, b = bootstrap_data()
    low, high = bootstrap_auroc(labels, a[0])
    assert 0 <= low < roc_auc_score(labels, a[0]) < high <= 1
    assert bootstrap_auroc(labels, a[0]) == bootstrap_auroc(labels, a[:1]) == (low, high)
    assert bootstrap_auroc(labels, a[0], seed=1) != (low, high)
    assert bootstrap_auroc(labels, labels) == (1.0, 1.0)
    assert paired_bootstrap_auroc(labels, a, a) == (0.0, 0.0, 0.0)
    forth, back = paired_bootstrap_auroc(labels, a, b), paired_bootstrap_auroc(labels, b, a)
    assert forth == pytest.approx((-back[0], -back[2], -back[1]))


def test_bootstraps_refuse_to_draw_nothing():
    for scores in ([[0.0, 1.0]], [[0.0, 1.0]] * 2):
        with pytest.raises(ValueError, match="n_boot is 0: give at least 1 resampling"):
            bootstrap_auroc([0, 1], scores, n_boot=0)
    with pytest.raises(ValueError, match="n_boot is 0: give at least 1 resampling"):
        paired_bootstrap_auroc([0, 1], [0.0, 1.0], [0.0, 1.0], n_boot=0)


@pytest.mark.parametrize(
    ("low", "high", "minimum", "expected"),
    [
        (0.01, 0.2, 0.0, "holds"),
        (0.0, 0.2, 0.0, "inconclusive"),
        (-0.1, 0.1, 0.0, "inconclusive"),
        (-0.2, -0.1, 0.0, "reversed"),
        (-0.2, 0.0, 0.0, "does not hold"),
        (0.0, 0.0, 0.0, "does not hold"),
        (0.01, 0.2, 0.05, "inconclusive"),
        (0.01, 0.02, 0.05, "does not hold"),
        (-0.2, -0.1, 0.05, "reversed"),
        (-0.01, -0.005, -0.02, "holds"),
        (-0.05, 0.01, -0.02, "inconclusive"),
        (-0.05, -0.01, -0.02, "inconclusive"),
        (-0.05, -0.03, -0.02, "reversed"),
    ],
)
def test_verdict(low, high, minimum, expected):
    assert verdict(low, high, minimum) == expected


@pytest.mark.parametrize("no_effect", [0, 1])
def test_verdicts_are_what_counting_the_values_of_the_interval_gives(no_effect):
    """On a grid of half units, with every value of each interval looked at."""
    grid = [i / 2 for i in range(-6, 9)]
    answers = set()
    for low, high, minimum in product(grid, grid, grid):
        values = [value for value in grid if low <= value <= high]
        if not values:
            continue
        if all(value > minimum for value in values):
            expected = "holds"
        elif all(value < no_effect and value < minimum for value in values):
            expected = "reversed"
        elif not any(value > minimum for value in values):
            expected = "does not hold"
        else:
            expected = "inconclusive"
        assert verdict(low, high, minimum, no_effect=no_effect) == expected
        answers.add(expected)
    assert len(answers) == 4


@pytest.mark.parametrize(
    "bad", [(1.0, 0.0), (math.nan, 1.0), (0.0, math.nan), (0.0, 1.0, math.nan)]
)
def test_verdict_refuses(bad):
    with pytest.raises(ValueError, match="need low <= high and no NaN"):
        verdict(*bad)


def test_verdict_refuses_no_effect_that_is_nan():
    with pytest.raises(ValueError, match="no_effect nan: need low <= high and no NaN"):
        verdict(0.0, 1.0, no_effect=math.nan)


# --- calibration of maps, scores from maps -------------------------------------------------


def normal_maps(n=12, shape=(5, 7), seed=0):
    rng = RNG(seed)
    return rng.normal(rng.normal(size=shape), rng.uniform(0.1, 2, shape), (n, *shape))


def test_calibration_follows_its_formula():
    maps = normal_maps()
    fitted = MapCalibration.fit(maps, shrink=4.0)
    variance = maps.var(axis=0, ddof=1)
    np.testing.assert_allclose(fitted.mean, maps.mean(axis=0))
    np.testing.assert_allclose(fitted.std**2, (11 * variance + 4 * variance.mean()) / 15)
    z = fitted.apply(maps[:3])
    assert z.dtype == np.float32
    np.testing.assert_allclose(z, (maps[:3] - fitted.mean) / fitted.std, rtol=1e-4, atol=1e-6)


def test_shrinkage_runs_from_own_to_pooled_spread_and_saves_dead_positions():
    maps = normal_maps()
    maps[:, 0, 0] = 1.0  # never varies
    variance = maps.var(axis=0, ddof=1)
    weak, strong = (MapCalibration.fit(maps, shrink=k).std ** 2 for k in (1e-9, 1e9))
    np.testing.assert_allclose(weak, variance, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(strong, variance.mean(), rtol=1e-6)
    assert np.isfinite(MapCalibration.fit(maps).apply(maps)).all()


@relaxed
@given(st.floats(0.1, 10), st.floats(-5, 5))
def test_z_maps_do_not_depend_on_the_unit_of_the_maps(scale, shift):
    maps = normal_maps()
    z = MapCalibration.fit(maps).apply(maps)
    moved = MapCalibration.fit(scale * maps + shift).apply(scale * maps + shift)
    np.testing.assert_allclose(moved, z, rtol=1e-4, atol=1e-5)


def test_an_image_is_standardised_for_itself():
    maps = normal_maps()
    fitted = MapCalibration.fit(maps)
    one_by_one = np.concatenate([fitted.apply(maps[i : i + 1]) for i in range(len(maps))])
    np.testing.assert_array_equal(fitted.apply(maps), one_by_one)


def test_cross_fit_uses_the_other_folds_only():
    maps = normal_maps()
    z = MapCalibration.cross_fit(maps, folds=5, shrink=3.0)
    for fold in range(5):
        inside = np.arange(12) % 5 == fold
        expected = MapCalibration.fit(maps[~inside], shrink=3.0).apply(maps[inside])
        np.testing.assert_array_equal(z[inside], expected)
    changed = maps.copy()
    changed[5] += 100  # fold 0
    z_changed = MapCalibration.cross_fit(changed, folds=5, shrink=3.0)
    np.testing.assert_array_equal(z_changed[[0, 10]], z[[0, 10]])
    fitted = MapCalibration.fit(maps).apply(maps)
    assert (MapCalibration.cross_fit(maps) ** 2).mean() > (fitted**2).mean()


def test_calibration_refuses():
    maps = normal_maps()
    fit, cross_fit = MapCalibration.fit, MapCalibration.cross_fit
    broken = maps.copy()
    broken[2, 1, 3] = np.nan
    cases = [
        (lambda: fit(maps[:1]), "1 maps, shrink 10.0: need at least 2 maps and shrink > 0"),
        (lambda: fit(maps, shrink=0.0), "12 maps, shrink 0.0"),
        (lambda: fit(maps, shrink=math.nan), "need at least 2 maps and shrink > 0"),
        (lambda: fit(maps[0]), r"maps has shape \(5, 7\): give \(N, H, W\)"),
        (lambda: fit(maps[:0]), r"maps has shape \(0, 5, 7\)"),
        (lambda: fit(broken), r"maps has 1 NaN or infinite values, the first at \[2, 1, 3\]"),
        (
            lambda: fit(np.ones((4, 3, 3))),
            "maps of 4 images are all equal, so they have no spread; give",
        ),
        (lambda: fit(maps).apply(broken), "maps has 1 NaN"),
        (
            lambda: fit(maps).apply(maps[:, 1:]),
            r"maps are \(4, 7\), the calibration is \(5, 7\): resize the images",
        ),
        (lambda: cross_fit(maps[:4]), "4 maps, 5 folds: give 2..N folds, 2 maps outside each"),
        (lambda: cross_fit(maps[:3], folds=2), "3 maps, 2 folds"),
        (lambda: cross_fit(maps, folds=1), "12 maps, 1 folds"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


@relaxed
@given(arrays(np.float64, (3, 4, 5), elements=st.integers(-9, 9)), st.sampled_from(range(1, 21)))
def test_top_k_mean_equals_a_full_sort(maps, k):
    expected = np.sort(maps.reshape(3, -1))[:, -k:].mean(axis=1)
    np.testing.assert_allclose(top_k_mean(maps, k / 20), expected, atol=1e-12)


def test_top_k_mean_rounds_up_the_decimal_as_written():
    maps = np.arange(100.0).reshape(1, 10, 10)
    assert top_k_mean(maps, 0.07) == 96.0  # 7 pixels; in floats 0.07 * 100 > 7
    assert top_k_mean(maps, 0.071) == 95.5
    assert top_k_mean(maps, 1e-9) == 99.0
    assert top_k_mean(maps, 1) == 49.5


@pytest.mark.parametrize("fraction", [0.0, 1.5, math.nan])
def test_top_k_mean_refuses(fraction):
    with pytest.raises(ValueError, match="give a fraction of the pixels in"):
        top_k_mean(np.ones((1, 2, 2)), fraction)
    with pytest.raises(ValueError, match=r"maps has shape \(2, 2\)"):
        top_k_mean(np.ones((2, 2)), 0.5)
    with pytest.raises(ValueError, match="maps has 1 NaN"):
        top_k_mean([[[np.nan, 1.0]]], 0.5)
