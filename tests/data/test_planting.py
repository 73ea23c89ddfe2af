"""Planted defects: exact masks, determinism, severity, odd sizes, and who may import them."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffad_lite.data.planting import KINDS, plant_defect, plant_defects

ALL_KINDS = [kind for kinds in KINDS.values() for kind in kinds]
SHAPES = [(1, 64, 64), (3, 64, 64), (4, 64, 64), (1, 48, 40), (3, 16, 16), (1, 20, 1500)]


def make_cell(shape, seed=0):
    """A bright grainy field with a dark frame and three dark horizontal busbars."""
    height, width = shape[1:]
    rng = np.random.default_rng(seed)
    image = 170 + rng.normal(0, 5, shape)
    for fraction in (0.2, 0.5, 0.8):
        row = int(fraction * height)
        image[:, row : row + max(1, height // 40)] = 90
    frame = max(1, min(height, width) // 30)
    image[:, :frame] = image[:, -frame:] = 45
    image[:, :, :frame] = image[:, :, -frame:] = 45
    return image.clip(0, 255).astype(np.uint8)


def assert_exact(image, planted, mask):
    assert planted.dtype == np.uint8 and planted.shape == image.shape
    assert mask.dtype == bool and mask.shape == image.shape[1:]
    np.testing.assert_array_equal(mask, (planted != image).any(axis=0))
    assert mask.any()
    assert mask.mean() <= 0.6


def test_families_are_disjoint_and_hold_the_agreed_kinds():
    assert len(set(ALL_KINDS)) == len(ALL_KINDS) == 10
    assert set(KINDS) == {"cells", "lesions", "development"}
    assert KINDS["development"] == ("scratch", "stain")


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mask_is_exact(kind, shape):
    image = make_cell(shape)
    before = image.copy()
    for seed in range(3):
        for severity in (0.01, 0.3, 1, 2.0):
            planted, mask = plant_defect(image, kind, seed=seed, severity=severity)
            assert_exact(image, planted, mask)
            assert mask.sum() >= 4
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("value", [0, 5, 128, 255])
def test_mask_is_exact_on_a_constant_image(kind, value):
    image = np.full((3, 40, 48), value, np.uint8)
    for seed in range(5):
        assert_exact(image, *plant_defect(image, kind, seed=seed, severity=2))


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_same_seed_same_defect_and_other_seed_another(kind):
    image = make_cell((1, 64, 64))
    planted, mask = plant_defect(image, kind, seed=7)
    again, mask_again = plant_defect(image, kind, seed=7)
    np.testing.assert_array_equal(planted, again)
    np.testing.assert_array_equal(mask, mask_again)
    assert not np.array_equal(planted, plant_defect(image, kind, seed=8)[0])


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("side", [64, 150])
def test_change_grows_with_severity(kind, side):
    images = [make_cell((1, side, side), seed) for seed in range(24)]

    def mean_change(severity):
        planted = [plant_defect(x, kind, seed=i, severity=severity) for i, x in enumerate(images)]
        return np.mean(
            [np.abs(y[0] - x.astype(float)) for (y, x) in zip(planted, images, strict=True)]
        )

    changes = [mean_change(severity) for severity in (0.1, 0.3, 1, 2)]
    assert np.all(np.diff(changes) > 0), changes


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_severity_one_stands_out_of_the_grain(kind):
    image = make_cell((1, 150, 150))
    contrasts = []
    for seed in range(16):
        planted, mask = plant_defect(image, kind, seed=seed)
        contrasts.append(np.abs(planted.astype(float) - image)[:, mask].mean())
    assert np.median(contrasts) > 5  # the standard deviation of the grain


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_all_channels_share_the_geometry(kind):
    grey = make_cell((1, 64, 64))
    planted, mask = plant_defect(grey, kind, seed=3)
    for channels in (3, 4):
        coloured, coloured_mask = plant_defect(np.repeat(grey, channels, 0), kind, seed=3)
        np.testing.assert_array_equal(coloured, np.repeat(planted, channels, 0))
        np.testing.assert_array_equal(coloured_mask, mask)


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_black_background_is_left_alone(kind):
    image = np.zeros((1, 96, 96), np.uint8)
    image[:, 24:72, 24:72] = make_cell((1, 48, 48)) + 20
    background = image[0] == 0
    for seed in range(8):
        planted, mask = plant_defect(image, kind, seed=seed)
        assert (planted[0, background & mask] >= 8).all()  # drawn on, or not counted
        assert (mask & ~background).any()


def test_finger_dashes_run_across_the_busbars():
    image = make_cell((1, 150, 150))
    for turned in (image, image.swapaxes(1, 2)):
        heights, widths = [], []
        for seed in range(8):
            mask = plant_defect(turned, "finger", seed=seed)[1]
            heights.append(mask.sum(axis=0)[mask.any(axis=0)].mean())
            widths.append(mask.sum(axis=1)[mask.any(axis=1)].mean())
        assert (np.mean(heights) > np.mean(widths)) == (turned is image)


def test_mirror_turns_the_patch_and_scramble_keeps_its_grey_values():
    image = make_cell((1, 96, 96))
    planted, mask = plant_defect(image, "mirror", seed=0)
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    window = np.s_[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    assert mask[window[1:]].all()
    turned = image[window][:, ::-1, ::-1].astype(int)
    assert np.abs(planted[window] - turned).max() <= 1  # one grey value where nothing would change
    planted, mask = plant_defect(image, "scramble", seed=0)
    gap = np.sort(planted[0][mask].astype(int)) - np.sort(image[0][mask].astype(int))
    assert np.abs(gap).max() <= 1


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((1, 32, 32), np.float32), "uint8.*got float32"),
        ([[0]], "uint8.*got list"),
        (np.zeros((32, 32), np.uint8), r"\(C, H, W\).*got uint8 \(32, 32\).*channels first"),
        (np.zeros((32, 32, 3), np.uint8), r"got uint8 \(32, 32, 3\).*channels first"),
        (np.zeros((2, 32, 32), np.uint8), r"C = 1, 3 or 4.*got uint8 \(2, 32, 32\)"),
        (np.zeros((1, 15, 32), np.uint8), r">= 16, got uint8 \(1, 15, 32\).*larger"),
    ],
)
def test_bad_images_are_refused(image, message):
    with pytest.raises(ValueError, match=message):
        plant_defect(image, "spot", seed=0)


def test_bad_arguments_are_refused():
    image = make_cell((1, 32, 32))
    with pytest.raises(ValueError, match=r"unknown kind 'hole'.*crack.*stain"):
        plant_defect(image, "hole", seed=0)
    with pytest.raises(ValueError, match="unknown kind '_shade'"):
        plant_defect(image, "_shade", seed=0)
    for severity in (0, -1, 2.01, float("nan")):
        with pytest.raises(ValueError, match=rf"\(0, 2\], got {re.escape(str(severity))}"):
            plant_defect(image, "spot", seed=0, severity=severity)
    with pytest.raises(ValueError, match=r"unknown family 'cell'.*cells"):
        plant_defects([image], "cell", seed_names=["a"])
    with pytest.raises(ValueError, match="1 images, 2 seed_names"):
        plant_defects([image], "cells", seed_names=["a", "b"])


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(ALL_KINDS),
    channels=st.sampled_from([1, 3, 4]),
    height=st.integers(16, 80),
    width=st.integers(16, 80),
    seed=st.integers(0, 2**63),
    severity=st.floats(0.001, 2),
    content=st.sampled_from(["cell", "noise", "dark", "gradient"]),
)
def test_any_image_any_seed(kind, channels, height, width, seed, severity, content):
    shape = (channels, height, width)
    rng = np.random.default_rng(seed)
    image = {
        "cell": lambda: make_cell(shape, seed),
        "noise": lambda: rng.integers(0, 256, shape, dtype=np.uint8),
        "dark": lambda: rng.integers(0, 12, shape, dtype=np.uint8),
        "gradient": lambda: np.broadcast_to(np.linspace(0, 255, width), shape).astype(np.uint8),
    }[content]()
    assert_exact(image, *plant_defect(image, kind, seed=seed, severity=severity))


@pytest.mark.parametrize("family", KINDS)
def test_plant_defects_depends_on_names_and_kinds_and_not_on_order(family):
    period = len(KINDS[family])
    images = [make_cell((1, 40, 40), seed) for seed in range(2 * period)]
    names = [f"cell{i:04d}.png" for i in range(2 * period)]
    planted, masks, kinds = plant_defects(images, family, seed_names=names)
    assert kinds == list(KINDS[family]) * 2
    for image, defective, mask in zip(images, planted, masks, strict=True):
        assert_exact(image, defective, mask)
    # the second period first: every image keeps its kind
    order = [*range(period, 2 * period), *range(period)]
    again, masks_again, kinds_again = plant_defects(
        [images[i] for i in order], family, seed_names=[names[i] for i in order]
    )
    assert kinds_again == kinds
    for place, i in enumerate(order):
        np.testing.assert_array_equal(again[place], planted[i])
        np.testing.assert_array_equal(masks_again[place], masks[i])
    # a part of the set, and another name
    alone, _, _ = plant_defects(images[:1], family, seed_names=names[:1])
    np.testing.assert_array_equal(alone[0], planted[0])
    renamed, _, _ = plant_defects(images[:1], family, seed_names=["other.png"])
    assert not np.array_equal(renamed[0], planted[0])


def test_plant_defects_nothing():
    assert plant_defects([], "cells", seed_names=[]) == ([], [], [])
