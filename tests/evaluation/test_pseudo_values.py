"""Values per image behind pixel metrics give the spread of a bootstrap over images."""

import math

import numpy as np
import pytest
from scipy import ndimage

from diffad_lite.evaluation.metrics import percentile_interval, pixel_metrics
from diffad_lite.evaluation.pseudo_values import pixel_pseudo_values, resampled_means

RNG = np.random.default_rng


def smooth_maps(n, size, seed=0):
    """Maps of n images, the second half of which has one or two defects, some of them faint."""
    rng = RNG(seed)
    masks = np.zeros((n, size, size), dtype=bool)
    maps = 4 * ndimage.gaussian_filter(rng.normal(size=masks.shape), (0, 2, 2))
    for i in range(n // 2, n):
        y, x = rng.integers(0, size // 2, 2)
        masks[i, y : y + size // 5, x : x + size // 7] = True
        masks[i, -3:, -3:] = i % 3 == 0
        maps[i][masks[i]] += rng.uniform(0, 3)
    return masks, maps


def test_pseudo_values_give_the_spread_of_a_bootstrap_over_images():
    masks, maps = smooth_maps(60, 32)
    labels, exact = masks.any(axis=(1, 2)), pixel_metrics(masks, maps)
    values, rng = pixel_pseudo_values(masks, maps), RNG(1)
    classes = [np.flatnonzero(labels == label) for label in (False, True)]
    drawn = [np.concatenate([rng.choice(c, len(c)) for c in classes]) for _ in range(400)]
    metrics = [pixel_metrics(masks[i], maps[i]) for i in drawn]
    assert values.keys() == {"pixel_ap", "aupro", "dice_oracle"}
    for name, of_images in values.items():
        assert of_images.mean() == pytest.approx(exact[name], abs=0.01)
        spread = np.std([metric[name] for metric in metrics])
        assert np.std(resampled_means(of_images, labels)) == pytest.approx(spread, rel=0.2), name


def test_pseudo_values_equal_leaving_out_one_image_at_a_time():
    masks, maps = smooth_maps(12, 24)  # fewer than 1000 anomalous pixels: every one is a threshold
    n, complete = len(masks), pixel_metrics(masks, maps)
    values = pixel_pseudo_values(masks, maps)
    for i in range(n):
        without = pixel_metrics(np.delete(masks, i, axis=0), np.delete(maps, i, axis=0))
        for name in ("pixel_ap", "dice_oracle"):
            expected = n * complete[name] - (n - 1) * without[name]
            assert values[name][i] == pytest.approx(expected), name
        expected = n * complete["aupro"] - (n - 1) * without["aupro"]
        assert values["aupro"][i] == pytest.approx(expected, abs=0.1)  # joined linearly


def test_pseudo_values_are_nan_where_one_image_has_everything():
    masks, maps = smooth_maps(6, 16)
    masks[:-1] = False
    assert all(
        np.isnan(v).all() and v.shape == (6,) for v in pixel_pseudo_values(masks, maps).values()
    )
    masks[:] = True
    masks[0, 0] = False
    assert np.isnan(pixel_pseudo_values(masks, maps)["aupro"]).all()


def test_resampled_means_resample_within_groups_and_alike():
    groups = np.array([0, 0, 0, 1, 1])
    constant = resampled_means([1.0, 1, 1, 5, 5], groups, n_boot=50)
    np.testing.assert_allclose(constant, 13 / 5)  # each group keeps its number of images
    values = RNG(0).normal(size=(2, 5))
    both = resampled_means(values, groups, n_boot=50)
    assert both.shape == (50, 2)
    np.testing.assert_allclose(both[:, 1:], resampled_means(values[1], groups, n_boot=50))
    many = resampled_means(np.arange(2000.0) % 2, np.zeros(2000))
    low, high = percentile_interval(many[:, 0])
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(0.25 / 2000), rel=0.1)
    for arguments, message in [
        (([[1.0]], [0, 0]), r"values \(1, 1\), groups \(2,\)"),
        (([math.nan], [0]), "values has 1 NaN"),
    ]:
        with pytest.raises(ValueError, match=message):
            resampled_means(*arguments)
    with pytest.raises(ValueError, match="n_boot is 0"):
        resampled_means([1.0], [0], n_boot=0)
