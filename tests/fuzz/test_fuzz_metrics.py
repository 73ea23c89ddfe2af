"""Fuzzing of the metrics: a value in its range, or a ValueError that explains the fault.

test_metrics.py compares the values with scikit-learn and tests that they depend on ranks only.
"""

import warnings
from collections.abc import Callable

import numpy as np
import pytest
from fuzzing import n_inputs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.typing import NDArray

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

N_TESTS = 6  # which share the inputs of this area


def fixed_inputs(test: int) -> Callable:
    """Return Hypothesis settings: the number of inputs of a test, the same ones in every run."""
    counts = np.diff(np.arange(N_TESTS + 1) * n_inputs("metrics") // N_TESTS)
    checks = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
    return settings(
        max_examples=max(1, int(counts[test])),
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=checks,
    )


dtypes = st.sampled_from(["f8", "f4", "f2", "i4", "u1", "i8", "?"])
shapes = array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=6)
any_array = dtypes.flatmap(lambda dtype: arrays(np.dtype(dtype), shapes))  # NaN and inf, too
numbers = st.one_of(st.floats(), st.integers(-(10**9), 10**9), st.sampled_from([0.3, 0.5, 1e-300]))


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few scores for a quantile; overflow
        yield


def result_of(function: Callable, *arguments: object, **options: object) -> object:
    """Return the result, or None where the function raises a ValueError with a message."""
    try:
        return function(*arguments, **options)
    except ValueError as error:
        assert len(str(error)) > 10
        return None


def assert_range(value: object, low: float, high: float) -> None:
    """Check one number, an array of numbers, or the values of a mapping; None passes."""
    values = value.values() if isinstance(value, dict) else np.ravel(value)
    assert value is None or all(low <= float(v) <= high for v in values), value


@fixed_inputs(0)
@given(any_array, any_array, any_array, st.data(), numbers)
def test_any_scores(labels, scores, others, data, number):
    if data.draw(st.booleans()):  # equal shapes, so that more inputs are valid
        labels = data.draw(arrays(np.int8, array_shapes(max_dims=2), elements=st.integers(0, 1)))
        scores, others = (data.draw(arrays(np.float16, labels.shape)) for _ in range(2))
    assert_range(result_of(image_metrics, labels, scores), 0, 1)
    assert_range(result_of(f1_at_threshold, labels, scores, number), 0, 1)
    assert_range(result_of(bootstrap_auroc, labels, scores, n_boot=9), 0, 1)
    assert_range(result_of(paired_bootstrap_auroc, labels, scores, others, n_boot=9), -1, 1)
    threshold = result_of(conformal_threshold, scores, number)
    assert threshold is None or threshold in np.asarray(scores, dtype=np.float64)
    assert result_of(verdict, number, float(others.sum()), 0.0) in (
        *("holds", "reversed", "does not hold", "inconclusive"),
        None,
    )


@fixed_inputs(1)
@given(st.lists(any_array, max_size=4), st.lists(any_array, max_size=4), st.data(), numbers)
def test_any_masks_and_maps(masks, maps, data, number):
    if data.draw(st.booleans()):  # equal shapes, so that more inputs are valid
        maps = [data.draw(arrays(np.float32, np.shape(mask))) for mask in masks]
    metrics = result_of(pixel_metrics, masks, maps)
    assert_range(metrics, 0, 1)
    assert_range(result_of(aupro, masks, maps, number), 0, 1)
    if metrics is not None:
        assert all(np.isfinite(anomaly_map).all() for anomaly_map in maps)


@fixed_inputs(2)
@given(any_array, any_array, numbers, st.integers(-2, 9))
def test_any_maps(maps, others, number, folds):
    scores = result_of(top_k_mean, maps, number)
    if scores is not None:
        assert scores.shape == maps.shape[:1]
        assert np.isfinite(scores).all() or not np.isfinite(maps.sum(dtype=np.float64))
    fitted = result_of(MapCalibration.fit, maps, shrink=number)
    if fitted is not None:
        assert fitted.mean.shape == fitted.std.shape == maps.shape[1:]
        z_maps = result_of(fitted.apply, others)
        assert z_maps is None or z_maps.shape == others.shape
    z_maps = result_of(MapCalibration.cross_fit, maps, folds)
    assert z_maps is None or z_maps.shape == maps.shape


@st.composite
def labels_and_scores(draw) -> tuple[NDArray, NDArray]:
    """Draw normal and anomalous labels, and scores with ties."""
    n = draw(st.integers(2, 30))
    labels = draw(arrays(np.int64, n, elements=st.integers(0, 1)))
    labels[:2] = 0, 1
    return labels, draw(arrays(np.float64, n, elements=st.integers(-9, 9)))


increasing = st.sampled_from(
    [
        lambda x: x**3 + x,
        lambda x: np.exp(x / 3),
        np.arctan,
        lambda x: 1e6 * x - 17,
        lambda x: np.searchsorted(np.unique(x), x),
    ]
)


@fixed_inputs(3)
@given(labels_and_scores(), increasing, st.randoms(use_true_random=False))
def test_image_metrics_depend_on_ranks_and_not_on_order(data, increase, random):
    labels, scores = data
    expected = image_metrics(labels, scores)
    order = np.array(random.sample(range(len(labels)), len(labels)))
    for metrics in (
        image_metrics(labels, increase(scores)),
        image_metrics(labels[order], scores[order]),
        image_metrics(labels.astype(bool), scores.astype(np.float32)),
        image_metrics(labels.tolist(), scores.tolist()),
    ):
        assert metrics == pytest.approx(expected, abs=1e-12)
    mirrored = image_metrics(labels, -scores)
    assert mirrored["image_auroc"] == pytest.approx(1 - expected["image_auroc"], abs=1e-12)
    twice = image_metrics(np.tile(labels, 2), np.tile(scores, 2))
    assert twice == pytest.approx(expected, abs=1e-12)
    low, high = bootstrap_auroc(labels, scores, n_boot=50)
    assert (low, high) == pytest.approx(bootstrap_auroc(labels, increase(scores), n_boot=50))
    assert low <= high


@fixed_inputs(4)
@given(st.data(), increasing, st.integers(1, 4))
def test_pixel_metrics_do_not_depend_on_layout(data, increase, n):
    shape = data.draw(st.tuples(st.integers(1, 7), st.integers(1, 7)))
    masks = data.draw(arrays(np.uint8, (n, *shape), elements=st.sampled_from([0, 0, 1, 255])))
    maps = data.draw(arrays(np.float64, (n, *shape), elements=st.integers(-5, 5)))
    masks[0].flat[0], masks[-1].flat[-1] = 1, 0
    if masks.all() or not masks.any():
        return
    expected = pixel_metrics(masks, maps)
    for metrics in (
        pixel_metrics(list(masks), list(maps)),
        pixel_metrics(masks.astype(bool), increase(maps)),
        pixel_metrics(masks[::-1, ::-1], maps[::-1, ::-1]),
        pixel_metrics(masks.transpose(0, 2, 1), maps.transpose(0, 2, 1).astype(np.float32)),
    ):
        assert metrics == pytest.approx(expected, abs=1e-12)
    invalid = maps.copy()
    invalid.flat[data.draw(st.integers(0, maps.size - 1))] = data.draw(
        st.sampled_from([np.nan, np.inf, -np.inf])
    )
    with pytest.raises(ValueError, match=r"maps\[\d+\] has 1 NaN or infinite values"):
        pixel_metrics(masks, invalid)


@fixed_inputs(5)
@given(st.data(), st.integers(4, 9), st.sampled_from([0.01, 0.1, 0.5, 1.0]))
def test_every_map_is_processed_on_its_own(data, n, fraction):
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
    if (fitted := result_of(MapCalibration.fit, maps)) is not None:
        whole = fitted.apply(maps)
        parts = [fitted.apply(part) for part in (maps[:cut], maps[cut:])]
        np.testing.assert_array_equal(np.concatenate(parts), whole)
        refitted = MapCalibration.fit(maps[::-1])
        np.testing.assert_allclose(refitted.std, fitted.std, rtol=1e-9)
