"""Fuzzing of the metrics: an answer in its range, or a ValueError that says what was wrong.

That the numbers are those of scikit-learn, and depend on ranks alone, stands in test_metrics.py.
"""

import warnings
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.typing import NDArray
from test_fuzz import count

from diffad_lite.evaluation.metrics import (
    aupro,
    bootstrap_auroc,
    f1_at_threshold,
    image_metrics,
    paired_bootstrap_auroc,
    pixel_metrics,
    verdict,
)
from diffad_lite.methods.calibration import MapCalibration, conformal_threshold, top_k_mean

TESTS = 6  # that share the inputs of this area


def inputs(test: int) -> Callable:
    """How many inputs a test of this file draws, always the same ones."""
    shares = np.diff(np.arange(TESTS + 1) * count("metrics") // TESTS)
    slow = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
    return settings(
        max_examples=max(1, int(shares[test])),
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=slow,
    )


KINDS = st.sampled_from(["f8", "f4", "f2", "i4", "u1", "i8", "?"])
shapes = array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=6)
wild = KINDS.flatmap(lambda kind: arrays(np.dtype(kind), shapes))  # with NaN and infinity
numbers = st.one_of(st.floats(), st.integers(-(10**9), 10**9), st.sampled_from([0.3, 0.5, 1e-300]))


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # too few scores for a quantile, and overflows
        yield


def answers(function: Callable, *arguments: object, **options: object) -> object:
    """What it returns, or None where it raises a ValueError with some words."""
    try:
        return function(*arguments, **options)
    except ValueError as error:
        assert len(str(error)) > 10
        return None


def flat(value: object) -> list[float]:
    values = value.values() if isinstance(value, dict) else np.ravel(value)
    return [float(v) for v in values]


def in_range(value: object, low: float, high: float) -> None:
    assert value is None or all(low <= v <= high for v in flat(value)), value


@inputs(0)
@given(wild, wild, wild, st.data(), numbers)
def test_any_scores(labels, scores, others, data, number):
    if data.draw(st.booleans()):  # of equal shapes, so that more come through
        labels = data.draw(arrays(np.int8, array_shapes(max_dims=2), elements=st.integers(0, 1)))
        scores, others = (data.draw(arrays(np.float16, labels.shape)) for _ in range(2))
    in_range(answers(image_metrics, labels, scores), 0, 1)
    in_range(answers(f1_at_threshold, labels, scores, number), 0, 1)
    in_range(answers(bootstrap_auroc, labels, scores, n_boot=9), 0, 1)
    in_range(answers(paired_bootstrap_auroc, labels, scores, others, n_boot=9), -1, 1)
    threshold = answers(conformal_threshold, scores, number)
    assert threshold is None or threshold in np.asarray(scores, dtype=np.float64)
    assert answers(verdict, number, float(others.sum()), 0.0) in (
        *("holds", "does not hold", "inconclusive"),
        None,
    )


@inputs(1)
@given(st.lists(wild, max_size=4), st.lists(wild, max_size=4), st.data(), numbers)
def test_any_masks_and_maps(masks, maps, data, number):
    if data.draw(st.booleans()):  # of equal shapes, so that more come through
        maps = [data.draw(arrays(np.float32, np.shape(mask))) for mask in masks]
    found = answers(pixel_metrics, masks, maps)
    in_range(found, 0, 1)
    in_range(answers(aupro, masks, maps, number), 0, 1)
    if found is not None:
        assert all(np.isfinite(one).all() for one in maps)


@inputs(2)
@given(wild, wild, numbers, st.integers(-2, 9))
def test_any_maps(maps, others, number, folds):
    scores = answers(top_k_mean, maps, number)
    if scores is not None:
        assert scores.shape == maps.shape[:1]
        assert np.isfinite(scores).all() or not np.isfinite(maps.sum(dtype=np.float64))
    fitted = answers(MapCalibration.fit, maps, shrink=number)
    if fitted is not None:
        assert fitted.mean.shape == fitted.std.shape == maps.shape[1:]
        z_maps = answers(fitted.apply, others)
        assert z_maps is None or z_maps.shape == others.shape
    z_maps = answers(MapCalibration.cross_fit, maps, folds)
    assert z_maps is None or z_maps.shape == maps.shape


@st.composite
def labelled(draw, rows: int = 1) -> tuple[NDArray, NDArray]:
    """Labels of both kinds and scores with ties."""
    n = draw(st.integers(2, 30))
    labels = draw(arrays(np.int64, n, elements=st.integers(0, 1)))
    labels[:2] = 0, 1
    return labels, draw(arrays(np.float64, (rows, n), elements=st.integers(-9, 9)))


INCREASING = (
    lambda x: x**3 + x,
    lambda x: np.exp(x / 3),
    np.arctan,
    lambda x: 1e6 * x - 17,
    lambda x: np.searchsorted(np.unique(x), x),
)
increasing = st.sampled_from(INCREASING)


@inputs(3)
@given(labelled(), increasing, st.randoms(use_true_random=False))
def test_image_metrics_see_ranks_and_no_order(data, rise, random):
    labels, (scores,) = data
    expected = image_metrics(labels, scores)
    order = np.array(random.sample(range(len(labels)), len(labels)))
    for found in (
        image_metrics(labels, rise(scores)),
        image_metrics(labels[order], scores[order]),
        image_metrics(labels.astype(bool), scores.astype(np.float32)),
        image_metrics(labels.tolist(), scores.tolist()),
    ):
        assert found == pytest.approx(expected, abs=1e-12)
    mirrored = image_metrics(labels, -scores)
    assert mirrored["image_auroc"] == pytest.approx(1 - expected["image_auroc"], abs=1e-12)
    twice = image_metrics(np.tile(labels, 2), np.tile(scores, 2))
    assert twice == pytest.approx(expected, abs=1e-12)
    low, high = bootstrap_auroc(labels, scores, n_boot=50)
    assert (low, high) == pytest.approx(bootstrap_auroc(labels, rise(scores), n_boot=50))
    assert low <= high


@inputs(4)
@given(st.data(), increasing, st.integers(1, 4))
def test_pixel_metrics_see_no_layout(data, rise, n):
    shape = data.draw(st.tuples(st.integers(1, 7), st.integers(1, 7)))
    masks = data.draw(arrays(np.uint8, (n, *shape), elements=st.sampled_from([0, 0, 1, 255])))
    maps = data.draw(arrays(np.float64, (n, *shape), elements=st.integers(-5, 5)))
    masks[0].flat[0], masks[-1].flat[-1] = 1, 0
    if masks.all() or not masks.any():
        return
    expected = pixel_metrics(masks, maps)
    for found in (
        pixel_metrics(list(masks), list(maps)),
        pixel_metrics(masks.astype(bool), rise(maps)),
        pixel_metrics(masks[::-1, ::-1], maps[::-1, ::-1]),
        pixel_metrics(masks.transpose(0, 2, 1), maps.transpose(0, 2, 1).astype(np.float32)),
    ):
        assert found == pytest.approx(expected, abs=1e-12)
    spoilt = maps.copy()
    spoilt.flat[data.draw(st.integers(0, maps.size - 1))] = data.draw(
        st.sampled_from([np.nan, np.inf, -np.inf])
    )
    with pytest.raises(ValueError, match=r"maps\[\d+\] has 1 NaN or infinite values"):
        pixel_metrics(masks, spoilt)


@inputs(5)
@given(st.data(), st.integers(4, 9), st.sampled_from([0.01, 0.1, 0.5, 1.0]))
def test_maps_are_treated_each_for_itself(data, n, fraction):
    shape = data.draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
    maps = data.draw(arrays(np.float32, (n, *shape), elements=st.integers(-9, 9)))
    scores = top_k_mean(maps, fraction)
    cut = data.draw(st.integers(1, n - 1))
    parts = [top_k_mean(part, fraction) for part in (maps[:cut], maps[cut:])]
    np.testing.assert_array_equal(np.concatenate(parts), scores)
    np.testing.assert_array_equal(top_k_mean(maps[:, ::-1], fraction), scores)
    assert (scores >= maps.mean(axis=(1, 2)) - 1e-6).all()
    assert (scores <= maps.max(axis=(1, 2))).all()
    assert conformal_threshold(scores, 0.5) == conformal_threshold(scores[::-1], 0.5)
    if (fitted := answers(MapCalibration.fit, maps)) is not None:
        whole = fitted.apply(maps)
        parts = [fitted.apply(part) for part in (maps[:cut], maps[cut:])]
        np.testing.assert_array_equal(np.concatenate(parts), whole)
        again = MapCalibration.fit(maps[::-1])
        np.testing.assert_allclose(again.std, fitted.std, rtol=1e-9)
