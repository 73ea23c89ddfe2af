"""Data sets: counts, splits, folders of every kind, odd files, planted defects, fingerprints."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from diffad_lite.data import datasets, images, masks, readers, source
from diffad_lite.data.datasets import AnomalyData, load_dataset
from diffad_lite.data.images import (
    list_images,
    pad_box,
    read_image,
    resize_image,
    standardise,
    to_float,
    to_uint8,
    undo_standardise,
)
from diffad_lite.data.planting import KINDS
from diffad_lite.data.shapes import KINDS as SCENES
from diffad_lite.data.shapes import draw_shape

HEIGHT, WIDTH = 24, 20


def picture(seed: int, channels: int = 1, size: tuple[int, int] = (HEIGHT, WIDTH)) -> np.ndarray:
    """A smooth random image (H, W) or (H, W, 3); no two seeds give the same."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(60, 200, (4, 4, channels)).astype(np.uint8).squeeze()
    smooth = np.asarray(Image.fromarray(coarse).resize(size[::-1], Image.BICUBIC))
    return (smooth + rng.integers(0, 20, smooth.shape)).astype(np.uint8)


def save(path: Path, pixels: np.ndarray, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def mask_of(*box: slice, size: tuple[int, int] = (HEIGHT, WIDTH)) -> np.ndarray:
    mask = np.zeros(size, np.uint8)
    mask[box] = 255
    return mask


@pytest.fixture
def mvtec(tmp_path) -> Path:
    """20 training normals, 6 test normals, 4 + 3 defective ones; category ``nut``."""
    base = tmp_path / "data" / "nut"
    for i in range(20):
        save(base / f"train/good/{i:03d}.png", picture(i))
    for i in range(6):
        save(base / f"test/good/{i:03d}.png", picture(100 + i))
    for i in range(4):
        save(base / f"test/crack/{i:03d}.png", picture(200 + i))
        save(base / f"ground_truth/crack/{i:03d}_mask.png", mask_of(slice(i, i + 3), slice(2, 9)))
    for i in range(3):
        save(base / f"test/hole/{i:03d}.png", picture(300 + i))
        save(base / f"ground_truth/hole/{i:03d}.png", mask_of(slice(5, 7), slice(0, 2)))
    return base


def load(base: Path, **options) -> AnomalyData:
    return load_dataset("folder", base.name, root=base.parent, **{"image_size": 16} | options)


def pixel_keys(images: Tensor) -> list[bytes]:
    return [image.numpy().tobytes() for image in images]


def assert_consistent(data: AnomalyData) -> None:
    """What holds for every data set, whatever its source."""
    channels, size = data.info["channels"], data.info["image_size"]
    parts = (data.train, data.calibration, data.test_images, data.uncertain)
    for part in parts:
        assert part.dtype == torch.float32
        assert part.shape[1:] == (channels, size, size)
        assert not len(part) or (part.min() >= -1 and part.max() <= 1)
    n = len(data.test_images)
    assert data.test_labels.dtype == np.int64
    assert len(data.test_labels) == len(data.test_ids) == len(data.defect_types) == n
    assert len(data.original_sizes) == n
    assert len(set(data.test_ids)) == n
    assert data.test_labels.tolist() == [int(t != "good") for t in data.defect_types]
    if data.test_masks is not None:
        assert len(data.test_masks) == n
        for mask, label, shape in zip(
            data.test_masks, data.test_labels, data.original_sizes, strict=True
        ):
            assert mask is not None or label == 1
            if mask is not None:
                assert mask.dtype == bool
                assert mask.shape == tuple(shape)
                assert mask.any() == bool(label)


def assert_equal(a: AnomalyData, b: AnomalyData) -> None:
    for field in ("train", "calibration", "test_images", "uncertain"):
        assert torch.equal(getattr(a, field), getattr(b, field)), field
    assert np.array_equal(a.test_labels, b.test_labels)
    assert a.test_ids == b.test_ids
    assert a.defect_types == b.defect_types
    assert a.info == b.info


# ------------------------------------------------------------------------------------ elpv


@pytest.fixture(scope="module")
def elpv() -> AnomalyData:
    return load_dataset("elpv", "mono", image_size=16)


@pytest.fixture
def no_decoding(monkeypatch):
    """Images made of the path's own name, for tests where pixels do not matter."""

    def fake(path: Path, bits: int = 16) -> np.ndarray:
        seed = int.from_bytes(path.name.encode()[-12:], "big")
        return np.random.default_rng(seed).integers(0, 256, (1, 16, 16)).astype(np.uint8)

    monkeypatch.setattr(datasets, "read_image", fake)


def test_elpv_mono_has_the_published_counts(elpv):
    assert_consistent(elpv)
    assert len(elpv.train) == 352
    assert len(elpv.calibration) == 118
    assert (elpv.test_labels == 0).sum() == 118
    assert (elpv.test_labels == 1).sum() == 313
    assert set(elpv.defect_types) == {"good", "defective"}
    assert elpv.test_masks is None
    assert set(elpv.original_sizes) == {(300, 300)}
    assert elpv.info["channels"] == 1
    assert elpv.info["category"] == "mono"
    assert len(elpv.uncertain) == 173
    assert elpv.info["remarks"]


def test_elpv_poly_has_the_published_counts(no_decoding):
    data = load_dataset("elpv", "poly", image_size=16)
    assert_consistent(data)
    assert len(data.train) + len(data.calibration) + (data.test_labels == 0).sum() == 920
    assert (len(data.train), len(data.calibration)) == (552, 184)
    assert (data.test_labels == 1).sum() == 402
    assert len(data.uncertain) == 228  # 2624 images in all


def test_elpv_is_mono_by_default_and_refuses_other_categories(no_decoding):
    assert load_dataset("elpv", image_size=16).info["category"] == "mono"
    with pytest.raises(ValueError, match="unknown elpv category 'mnoo'; did you mean 'mono'"):
        load_dataset("elpv", "mnoo")


def test_elpv_without_its_package_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(readers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install elpv-dataset"):
        load_dataset("elpv")


def test_elpv_parts_are_disjoint(no_decoding):
    data = load_dataset("elpv", "mono", image_size=16)
    keys = [pixel_keys(p) for p in (data.train, data.calibration, data.test_images, data.uncertain)]
    together = [key for part in keys for key in part]
    assert len(together) == len(set(together)) == 588 + 313 + 173


# ---------------------------------------------------------------------------------- splits


def test_splits_are_deterministic_and_depend_on_the_seed(no_decoding):
    a, b = (load_dataset("elpv", "mono", image_size=16) for _ in "ab")
    reseeded = load_dataset("elpv", "mono", image_size=16, split_seed=1)
    assert_equal(a, b)
    assert set(pixel_keys(a.train)) != set(pixel_keys(reseeded.train))
    assert a.info["fingerprint"] != reseeded.info["fingerprint"]
    assert len(a.train) == len(reseeded.train)
    normals = [
        {*pixel_keys(d.train), *pixel_keys(d.calibration), *pixel_keys(d.test_images)}
        for d in (a, reseeded)
    ]
    assert normals[0] == normals[1]


@pytest.mark.parametrize("layout", ["mvtec", "loose"])
def test_splits_do_not_depend_on_the_order_of_files(mvtec, monkeypatch, layout):
    base = mvtec if layout == "mvtec" else mvtec / "train" / "good"
    data = load(base)
    monkeypatch.setattr(source, "list_images", lambda folder: list_images(folder)[::-1])
    reversed_order = load(base)
    assert torch.equal(data.train, reversed_order.train)
    assert torch.equal(data.calibration, reversed_order.calibration)
    assert sorted(data.test_ids) == sorted(reversed_order.test_ids)
    assert data.info == reversed_order.info


def test_split_of_a_name_does_not_depend_on_the_other_names():
    names = [f"good/{i}" for i in range(200)]
    full = datasets._rank(names, 0, {})
    part = datasets._rank(names[::2], 0, {})
    assert [n for n in full if n in set(part)] == part
    assert full != names


@pytest.mark.parametrize(("n", "message"), [(1, "1 normal images"), (10, "10 normal images")])
def test_too_few_images_are_refused(tmp_path, n, message):
    for i in range(n):
        save(tmp_path / f"{i}.png", picture(i))
    with pytest.raises(ValueError, match=f"{message} are too few: 8 are needed for calibration"):
        load(tmp_path)


# -------------------------------------------------------------------------- folders: layouts


def test_mvtec_layout_is_read_with_masks_at_original_size(mvtec):
    data = load(mvtec)
    assert_consistent(data)
    assert (len(data.train), len(data.calibration), len(data.test_images)) == (12, 8, 13)
    assert data.info["category"] == "nut"
    assert data.original_sizes == [(HEIGHT, WIDTH)] * 13
    masks = dict(zip(data.test_ids, data.test_masks, strict=True))
    expected = mask_of(slice(2, 5), slice(2, 9)) > 0
    np.testing.assert_array_equal(masks["crack/002"], expected)
    np.testing.assert_array_equal(masks["hole/001"], mask_of(slice(5, 7), slice(0, 2)) > 0)
    assert not masks["good/000"].any()
    assert set(data.defect_types) == {"good", "crack", "hole"}


def test_each_image_of_the_test_keeps_its_name(mvtec):
    data = load(mvtec)
    for i, name in enumerate(data.test_ids):
        image = read_image(mvtec / "test" / f"{name}.png")
        assert torch.equal(data.test_images[i], to_float(resize_image(image, 16, "squash")))
        assert data.defect_types[i] == name.split("/")[0]


def test_training_images_come_from_train_good_alone(mvtec):
    data = load(mvtec)
    allowed = {
        to_float(resize_image(read_image(p), 16, "squash")).numpy().tobytes()
        for p in (mvtec / "train" / "good").iterdir()
    }
    used = pixel_keys(data.train) + pixel_keys(data.calibration)
    assert len(used) == len(set(used)) == 20
    assert set(used) == allowed


def test_root_itself_may_be_the_category(mvtec):
    data = load_dataset("folder", root=str(mvtec), image_size=16)
    assert data.info["category"] == "nut"
    assert torch.equal(data.train, load(mvtec).train)


def test_without_a_test_folder_normals_are_held_out(mvtec):
    shutil.rmtree(mvtec / "test")
    shutil.rmtree(mvtec / "ground_truth")
    data = load(mvtec)
    assert_consistent(data)
    assert (len(data.train), len(data.calibration), len(data.test_images)) == (8, 8, 4)
    assert not data.test_labels.any()
    assert data.test_masks is None
    everything = pixel_keys(torch.cat([data.train, data.calibration, data.test_images]))
    assert len(set(everything)) == 20


def test_with_defects_but_no_good_test_images_normals_are_held_out(mvtec):
    shutil.rmtree(mvtec / "test" / "good")
    data = load(mvtec)
    assert_consistent(data)
    assert (data.test_labels == 0).sum() == 4
    assert (data.test_labels == 1).sum() == 7


@pytest.mark.parametrize("name", ["validation", "calibration"])
def test_a_folder_for_calibration_is_used(mvtec, name):
    for i in range(3):
        save(mvtec / name / "good" / f"{i:03d}.png", picture(400 + i))
    data = load(mvtec)
    assert_consistent(data)
    assert (len(data.train), len(data.calibration)) == (20, 3)
    expected = [resize_image(picture(400 + i)[None], 16, "squash") for i in range(3)]
    assert pixel_keys(data.calibration) == pixel_keys(to_float(np.stack(expected)))


def test_loose_folder_holds_normals(tmp_path):
    for i in range(30):
        save(tmp_path / "mine" / f"{i}.png", picture(i))
    data = load(tmp_path / "mine")
    assert_consistent(data)
    assert (len(data.train), len(data.calibration), len(data.test_images)) == (16, 8, 6)
    assert not data.test_labels.any()
    assert all(n.startswith("good/") for n in data.test_ids)


def test_hidden_files_and_other_files_are_passed_over(mvtec):
    expected = load(mvtec)
    for folder in ("train/good", "test/good", "test/crack"):
        (mvtec / folder / "._000.png").write_bytes(b"resource fork")
        (mvtec / folder / ".hidden.png").write_bytes(b"")
        (mvtec / folder / "Thumbs.db").write_bytes(b"x")
        (mvtec / folder / "notes.txt").write_text("x")
    (mvtec / "test" / "readme.txt").write_text("x")
    assert_equal(load(mvtec), expected)


def test_hidden_folders_are_no_defect_types(mvtec):
    save(mvtec / "test" / ".ipynb_checkpoints" / "000-checkpoint.png", picture(1))
    assert ".ipynb_checkpoints" not in load(mvtec).defect_types


def test_suffixes_count_in_any_case(mvtec):
    (mvtec / "test/good/000.png").rename(mvtec / "test/good/000.PNG")
    assert "good/000" in load(mvtec).test_ids


def test_grey_files_among_colour_ones_become_colour(mvtec):
    save(mvtec / "train/good/000.png", picture(0, channels=3))
    data = load(mvtec)
    assert_consistent(data)
    assert data.info["channels"] == 3
    everything = torch.cat([data.train, data.calibration])
    spread = (everything - everything.mean(1, keepdim=True)).abs().flatten(1).max(1).values
    assert (spread > 0.05).sum() == 1
    assert (spread < 1e-6).sum() == 19


def test_two_files_of_one_stem_are_two_images(mvtec):
    save(mvtec / "test/good/000.bmp", picture(500))
    save(mvtec / "train/good/003.bmp", picture(501))
    data = load(mvtec)
    assert_consistent(data)
    assert {"good/000.png", "good/000.bmp", "good/001"} <= set(data.test_ids)
    assert len(data.train) + len(data.calibration) == 21


# ----------------------------------------------------------------------------- folders: masks


def test_missing_mask_is_unknown(mvtec):
    (mvtec / "ground_truth/crack/001_mask.png").unlink()
    data = load(mvtec)
    assert_consistent(data)
    unknown = [n for n, m in zip(data.test_ids, data.test_masks, strict=True) if m is None]
    assert unknown == ["crack/001"]


def test_empty_mask_on_an_anomalous_image_is_unknown(mvtec):
    save(mvtec / "ground_truth/hole/002.png", mask_of(slice(0, 0)))
    data = load(mvtec)
    assert_consistent(data)
    unknown = [n for n, m in zip(data.test_ids, data.test_masks, strict=True) if m is None]
    assert unknown == ["hole/002"]


def test_without_any_mask_there_are_none(mvtec):
    shutil.rmtree(mvtec / "ground_truth")
    assert load(mvtec).test_masks is None


def test_mask_of_another_size_is_refused(mvtec):
    save(mvtec / "ground_truth/crack/003_mask.png", mask_of(slice(3), size=(12, 10)))
    message = "the mask of crack/003 is 10x12 pixels, its image 20x24; export masks at the size"
    with pytest.raises(ValueError, match=message):
        load(mvtec)


@pytest.mark.parametrize("mode", ["RGB", "1", "RGBA"])
def test_masks_in_other_pixel_formats_are_read(mvtec, mode):
    path = mvtec / "ground_truth/crack/000_mask.png"
    Image.open(path).convert(mode).save(path)
    data = load(mvtec)
    mask = data.test_masks[data.test_ids.index("crack/000")]
    np.testing.assert_array_equal(mask, mask_of(slice(0, 3), slice(2, 9)) > 0)


def test_masks_of_zeros_and_ones_are_not_lost(mvtec):
    path = mvtec / "ground_truth/crack/000_mask.png"
    save(path, (np.asarray(Image.open(path)) > 0).astype(np.uint8))
    data = load(mvtec)
    mask = data.test_masks[data.test_ids.index("crack/000")]
    np.testing.assert_array_equal(mask, mask_of(slice(0, 3), slice(2, 9)) > 0)


# -------------------------------------------------------------------------- folders: messages


def test_folder_needs_a_root():
    with pytest.raises(ValueError, match=r"data set 'folder' needs root="):
        load_dataset("folder")


def test_missing_root_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"the folder .*nowhere does not exist"):
        load_dataset("folder", root=tmp_path / "nowhere")


def test_missing_category_is_refused_with_the_nearest(mvtec):
    with pytest.raises(ValueError, match=r"unknown category in .* 'nuts'; did you mean 'nut'"):
        load_dataset("folder", "nuts", root=mvtec.parent)


def test_empty_training_folder_is_named(tmp_path):
    (tmp_path / "x" / "train" / "good").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"train.good holds no images \(png, jpg"):
        load(tmp_path / "x")


@pytest.mark.parametrize("inside", [[], ["photos", "readme.txt"]], ids=str)
def test_folder_without_images_is_refused_with_what_it_holds(tmp_path, inside):
    for name in inside:
        (tmp_path / name).touch()
    expected = ", ".join(inside) or "nothing"
    with pytest.raises(ValueError, match=rf"has neither train/good .* it holds: {expected}$"):
        load_dataset("folder", root=tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "elvp"}, "unknown data set 'elvp'; did you mean 'elpv'"),
        ({"plant": "cell"}, "unknown family of planted defects 'cell'; did you mean 'cells'"),
        ({"resize": "squish"}, "unknown resize 'squish'; did you mean 'squash'"),
        ({"image_size": 7}, "image_size must be at least 8 pixels, got 7"),
        ({"category": "cube"}, "unknown shapes category 'cube'; known: disc"),
        ({"name": "digits", "category": "10"}, "unknown digits category '10'"),
    ],
    ids=str,
)
def test_unknown_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_dataset(**{"name": "shapes"} | arguments)


# ------------------------------------------------------------------------------- odd files


def test_grey_and_colour_pixels_are_read_as_they_are(tmp_path):
    grey, colour = picture(0), picture(1, channels=3)
    np.testing.assert_array_equal(read_image(save(tmp_path / "g.png", grey)), grey[None])
    np.testing.assert_array_equal(
        read_image(save(tmp_path / "c.png", colour)), colour.transpose(2, 0, 1)
    )


def test_transparency_is_dropped(tmp_path):
    colour = picture(1, channels=3)
    rgba = np.concatenate([colour, np.full((HEIGHT, WIDTH, 1), 77, np.uint8)], axis=2)
    np.testing.assert_array_equal(
        read_image(save(tmp_path / "a.png", rgba)), colour.transpose(2, 0, 1)
    )
    grey = picture(2)
    Image.fromarray(np.dstack([grey, grey // 2]), "LA").save(tmp_path / "la.png")
    np.testing.assert_array_equal(read_image(tmp_path / "la.png"), grey[None])


def test_palette_images_become_colour(tmp_path):
    image = Image.fromarray(picture(1, channels=3)).quantize(8)
    image.save(tmp_path / "p.png")
    expected = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    np.testing.assert_array_equal(read_image(tmp_path / "p.png"), expected)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bit_grey_is_scaled_to_eight(tmp_path, suffix):
    expected = np.arange(256, dtype=np.uint8).reshape(16, 16)
    path = save(tmp_path / f"deep.{suffix}", expected.astype(np.uint16) * 257)
    np.testing.assert_array_equal(read_image(path), expected[None])


def test_one_bit_images_become_black_and_white(tmp_path):
    bits = picture(0) > 127
    Image.fromarray(bits).save(tmp_path / "bits.png")
    assert Image.open(tmp_path / "bits.png").mode == "1"
    np.testing.assert_array_equal(read_image(tmp_path / "bits.png"), bits[None] * 255)


@pytest.mark.parametrize(("orientation", "turns"), [(1, 0), (3, 2), (6, 3), (8, 1)])
def test_exif_rotation_is_applied(tmp_path, orientation, turns):
    pixels = picture(0)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / "turned.png", pixels, exif=exif)
    np.testing.assert_array_equal(read_image(path), np.rot90(pixels, turns)[None])


@pytest.mark.parametrize("resize", ["squash", "pad"])
@pytest.mark.parametrize("size", [(1, 1), (20, 3000), (3000, 20), (64, 64), (7, 90)], ids=str)
@pytest.mark.parametrize("channels", [1, 3])
def test_any_size_becomes_the_square(tmp_path, channels, size, resize):
    path = save(tmp_path / "x.png", picture(0, channels, size))
    image = read_image(path)
    assert image.shape == (channels, *size)
    small = resize_image(image, 32, resize)
    assert small.shape == (channels, 32, 32)
    assert small.dtype == np.uint8
    even = resize_image(np.full((channels, *size), 99, np.uint8), 32, resize)
    assert (even == 99).all()


def test_an_image_of_the_right_size_is_not_changed():
    image = picture(0, size=(32, 32))[None]
    for resize in ("squash", "pad"):
        np.testing.assert_array_equal(resize_image(image, 32, resize), image)


def test_pad_keeps_the_aspect_and_repeats_the_border():
    image = np.zeros((1, 20, 40), np.uint8)
    image[:, :, 20:] = 200
    padded = resize_image(image, 16, "pad")
    assert pad_box(20, 40, 16) == (4, 0, 8, 16)
    inner = np.asarray(Image.fromarray(image[0]).resize((16, 8), Image.LANCZOS))
    np.testing.assert_array_equal(padded[0, 4:12], inner)
    np.testing.assert_array_equal(padded[0, :4], np.broadcast_to(inner[0], (4, 16)))
    np.testing.assert_array_equal(padded[0, 12:], np.broadcast_to(inner[-1], (4, 16)))


def test_squash_uses_the_whole_square():
    image = np.zeros((1, 20, 40), np.uint8)
    image[:, 10:] = 200
    squashed = resize_image(image, 16, "squash")[0]
    assert (squashed[:6] < 20).all()
    assert (squashed[10:] > 180).all()


@settings(deadline=None)
@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(8, 256))
def test_pad_box_lies_inside_the_square_and_touches_two_sides(height, width, size):
    top, left, h, w = pad_box(height, width, size)
    assert min(top, left) >= 0
    assert top + h <= size
    assert left + w <= size
    assert max(h, w) == size
    assert min(h, w) >= 1
    assert abs(h - size * height / max(height, width)) <= 1
    assert abs(w - size * width / max(height, width)) <= 1


def test_text_named_png_is_refused_by_name(mvtec):
    (mvtec / "train/good/004.png").write_text("not an image at all")
    with pytest.raises(ValueError, match=r"cannot read .*train.good.004\.png as an image"):
        load(mvtec)


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.7])
@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "tif", "webp"])
def test_truncated_file_is_refused_by_name(tmp_path, suffix, fraction):
    path = save(tmp_path / f"cut.{suffix}", picture(0, channels=3))
    assert read_image(path).shape == (3, HEIGHT, WIDTH)
    path = path.rename(tmp_path / f"cut2.{suffix}")
    path.write_bytes(path.read_bytes()[: int(fraction * path.stat().st_size)])
    with pytest.raises(ValueError, match=rf"cannot read .*cut2\.{suffix} as an image .* repair"):
        read_image(path)


def test_missing_image_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.png"):
        read_image(tmp_path / "nothing.png")


def test_the_cache_of_images_is_bounded_in_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "CACHED_BYTES", 1600)
    monkeypatch.setattr(images, "_cache", images._Cache())
    for i in range(30):
        Image.fromarray(np.full((10, 10), i, np.uint8)).save(tmp_path / f"{i:02d}.png")
        assert images.read_image(tmp_path / f"{i:02d}.png").max() == i
        assert images._cache.size == sum(p.nbytes for p in images._cache.values()) <= 1600
    assert len(images._cache) == 16
    cached = images.read_image(tmp_path / "29.png")
    assert images.read_image(tmp_path / "29.png") is cached
    Image.fromarray(np.zeros((20, 20), np.uint8)).save(tmp_path / "large.png")
    assert images.read_image(tmp_path / "large.png").shape == (1, 20, 20)
    assert len(images._cache) == 16  # it is decoded anew each time


def test_pixels_from_the_cache_cannot_be_changed(tmp_path):
    image = read_image(save(tmp_path / "x.png", picture(0)))
    with pytest.raises(ValueError, match="read-only"):
        image[0, 0, 0] = 1


def test_float_images_are_refused_because_their_range_is_unknown(tmp_path):
    path = save(tmp_path / "f.tif", np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8))
    with pytest.raises(ValueError, match=r"f\.tif.*no agreed range"):
        read_image(path)


# -------------------------------------------------------------------------- shapes and digits


@pytest.fixture(scope="module")
def shapes() -> AnomalyData:
    return load_dataset("shapes")


def test_shapes_have_exact_masks(shapes):
    assert_consistent(shapes)
    assert (len(shapes.train), len(shapes.calibration)) == (180, 60)
    assert (shapes.test_labels == 0).sum() == 60
    assert (shapes.test_labels == 1).sum() == 6 * 15
    assert set(shapes.defect_types) == {"good", *SCENES}
    for mask, label in zip(shapes.test_masks, shapes.test_labels, strict=True):
        assert mask is not None
        assert mask.sum() >= 4 * label
        assert mask.mean() < 0.5


@pytest.mark.parametrize("kind", ["good", *SCENES])
def test_away_from_the_disc_all_that_shows_is_in_the_mask(kind):
    rows, columns = np.mgrid[:64, :64]
    away = np.hypot(rows - 32, columns - 32) > 18
    for i in range(15):
        image, mask = draw_shape(kind, i)
        tray = np.nanmedian(np.where(away & ~mask, image[0], np.nan), axis=1)
        deviation = np.abs(image[0] - tray[:, None])  # the tray is striped along its rows
        assert deviation[away & ~mask].max() < 35  # its noise has a deviation of 5
        if kind in ("second", "misplaced"):
            assert deviation[away & mask].mean() > 60
        if kind == "good":
            assert not mask.any()


def test_shapes_are_drawn_from_kind_and_index_alone():
    a, b, different = (draw_shape("dent", i) for i in (3, 3, 4))
    np.testing.assert_array_equal(a[0], b[0])
    np.testing.assert_array_equal(a[1], b[1])
    assert not np.array_equal(a[0], different[0])


def test_shapes_at_another_size_keep_their_masks():
    data = load_dataset("shapes", image_size=32)
    assert_consistent(data)
    assert set(data.original_sizes) == {(64, 64)}


@pytest.mark.parametrize("category", [None, "3"])
def test_digits_are_read(category):
    data = load_dataset("digits", category, image_size=8)
    assert_consistent(data)
    assert data.test_masks is None
    anomalous = [t for t in data.defect_types if t != "good"]
    if category is None:
        assert anomalous == []
        assert data.info["category"] == "all"
    else:
        others = [str(i) for i in range(10) if i != 3]
        assert sorted(anomalous) == sorted(20 * others)
    n = len(data.train) + len(data.calibration) + (data.test_labels == 0).sum()
    assert n == (1797 if category is None else 183)


# --------------------------------------------------------------------------- planted defects


@pytest.mark.parametrize("family", ["cells", "lesions"])
def test_planting_replaces_the_anomalous_test_images(mvtec, family):
    plain, data = load(mvtec), load(mvtec, plant=family)
    assert_consistent(data)
    assert len(data.test_images) == 2 * 6
    assert data.test_labels.tolist() == 6 * [0] + 6 * [1]
    assert set(data.defect_types[6:]) <= set(KINDS[family])
    assert data.original_sizes == [(HEIGHT, WIDTH)] * 12
    assert torch.equal(data.test_images[:6], plain.test_images[plain.test_labels == 0])
    assert all(mask is not None for mask in data.test_masks)
    assert (data.test_images[6:] - data.test_images[:6]).flatten(1).abs().max(1).values.min() > 0
    assert [n.split("/")[1] for n in data.test_ids] == 2 * [f"{i:03d}" for i in range(6)]
    for field in ("train", "calibration"):
        assert torch.equal(getattr(data, field), getattr(plain, field))
    assert data.info["fingerprint"] == plain.info["fingerprint"]
    assert data.info["plant"] == family


def test_planted_pixels_change_inside_the_mask_only(mvtec):
    data = load(mvtec, plant="cells", image_size=HEIGHT, resize="pad")
    top, left, h, w = pad_box(HEIGHT, WIDTH, HEIGHT)
    for i in range(6):
        difference = data.test_images[6 + i] != data.test_images[i]
        inner = difference.any(0)[top : top + h, left : left + w].numpy()
        np.testing.assert_array_equal(inner, data.test_masks[6 + i])


def test_uncertain_labels_stand_for_anomalies_beside_half_of_the_calibration_images():
    plain, data = load_dataset("elpv"), load_dataset("elpv", plant="uncertain")
    half = len(plain.calibration) // 2
    assert len(data.calibration) == half
    assert (data.test_labels == 0).sum() == len(plain.calibration) - half
    assert (data.test_labels == 1).sum() == len(plain.uncertain)
    assert set(data.defect_types) == {"good", "uncertain"}
    assert data.test_masks is None
    assert not set(data.test_ids) & set(plain.test_ids)  # the real test is not looked at
    assert_consistent(data)


def test_a_set_without_uncertain_labels_says_so(mvtec):
    with pytest.raises(ValueError, match="has no images of uncertain label"):
        load(mvtec, plant="uncertain")


def test_development_defects_lie_on_half_of_the_calibration_images(mvtec):
    plain, data = load(mvtec), load(mvtec, plant="development")
    assert_consistent(data)
    assert len(data.calibration) == 4
    assert data.test_labels.tolist() == 4 * [0] + 4 * [1]
    assert set(data.defect_types[4:]) <= set(KINDS["development"])
    kept, clean = pixel_keys(data.calibration), pixel_keys(data.test_images[:4])
    assert sorted(kept + clean) == sorted(pixel_keys(plain.calibration))
    assert torch.equal(data.train, plain.train)
    assert data.info["fingerprint"] == plain.info["fingerprint"]


@pytest.mark.parametrize(
    ("plant", "forbidden"),
    [("development", ("/test/", "/ground_truth/")), ("cells", ("/test/crack/", "/ground_truth/"))],
)
def test_planting_never_reads_the_real_defects(mvtec, monkeypatch, plant, forbidden):
    real, asked = read_image, []

    def spy(path: Path, *bits: int) -> np.ndarray:
        asked.append(path.as_posix())
        return real(path, *bits)

    monkeypatch.setattr(datasets, "read_image", spy)
    monkeypatch.setattr(masks, "read_values", lambda path: spy(path))
    load(mvtec, plant=plant)
    assert asked
    assert not [p for p in asked if any(f in p for f in forbidden)]
    load(mvtec)
    assert all(any(f in p for p in asked) for f in forbidden)  # the spy does see them


def test_planting_needs_normal_test_images(mvtec, monkeypatch):
    def only_defects(category, root):
        source = readers.read_folder(category, root)
        source.fractions = (0.2, 0.0)
        source.test = {n: t for n, t in source.test.items() if t.defect_type != "good"}
        return source

    monkeypatch.setitem(readers.READERS, "folder", only_defects)
    with pytest.raises(ValueError, match="plant= needs normal test images, and this data set has"):
        load(mvtec, plant="cells")


def test_severity_changes_the_defects_and_nothing_else(mvtec):
    mild, strong = (load(mvtec, plant="lesions", severity=s) for s in (0.3, 1.0))
    assert torch.equal(strong.test_images, load(mvtec, plant="lesions").test_images)
    assert torch.equal(mild.test_images[:6], strong.test_images[:6])
    change = [(d.test_images[6:] - d.test_images[:6]).abs().sum() for d in (mild, strong)]
    assert 0 < change[0] < change[1]
    assert mild.test_ids == strong.test_ids


# ------------------------------------------------------------------------------- fingerprints


def change_a_pixel(path: Path) -> None:
    pixels = np.array(Image.open(path))
    pixels[5, 5] ^= 1
    save(path, pixels)


@pytest.mark.parametrize("i", [0, 7, 19])
def test_fingerprint_changes_with_one_pixel_of_a_training_image(mvtec, i):
    before = load(mvtec).info["fingerprint"]
    change_a_pixel(mvtec / f"train/good/{i:03d}.png")
    assert load(mvtec).info["fingerprint"] != before


def test_fingerprint_changes_with_the_set_of_training_images(mvtec):
    before = load(mvtec).info["fingerprint"]
    (mvtec / "train/good/000.png").unlink()
    assert load(mvtec).info["fingerprint"] != before


def test_fingerprint_depends_neither_on_resizing_nor_on_the_test(mvtec):
    before = load(mvtec).info["fingerprint"]
    assert len(before) == 12
    assert load(mvtec, image_size=24, resize="pad").info["fingerprint"] == before
    change_a_pixel(mvtec / "test/good/000.png")
    (mvtec / "test/crack/000.png").unlink()
    assert load(mvtec).info["fingerprint"] == before
    copy = mvtec.parent / "elsewhere" / "nut"
    shutil.copytree(mvtec, copy)
    assert load(copy).info["fingerprint"] == before


# ------------------------------------------------------------------------- ranges and subsets


def test_float_and_uint8_are_inverses():
    every = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    tensor = to_float(every)
    assert tensor.dtype == torch.float32
    assert tensor.min() == -1
    assert tensor.max() == 1
    np.testing.assert_array_equal(to_uint8(tensor), every)


def test_uint8_clips_what_lies_outside():
    assert to_uint8(torch.tensor([-3.0, -1.0, 0.999, 1.7])).tolist() == [0, 0, 255, 255]


@pytest.mark.parametrize("n", [2, 10, 11, 10_000])
def test_subset_draws_from_both_classes_and_keeps_rows_together(shapes, n):
    small = shapes.subset(n)
    assert_consistent(small)
    assert (small.test_labels == 0).sum() == min(n // 2, 60)
    assert (small.test_labels == 1).sum() == min(n // 2, 90)
    for i, name in enumerate(small.test_ids):
        j = shapes.test_ids.index(name)
        assert torch.equal(small.test_images[i], shapes.test_images[j])
        assert small.defect_types[i] == shapes.defect_types[j]
        np.testing.assert_array_equal(small.test_masks[i], shapes.test_masks[j])
    assert torch.equal(small.train, shapes.train)


def test_subset_depends_on_its_seed(shapes):
    assert shapes.subset(10, seed=1).test_ids == shapes.subset(10, seed=1).test_ids
    assert shapes.subset(10, seed=1).test_ids != shapes.subset(10, seed=2).test_ids


def test_summary_counts_what_there_is(mvtec, elpv):
    (mvtec / "ground_truth/crack/001_mask.png").unlink()
    summary = load(mvtec).summary()
    assert json.loads(json.dumps(summary))["n_test_anomalous"] == {"crack": 4, "hole": 3}
    assert (summary["n_train"], summary["n_calibration"], summary["n_test_normal"]) == (12, 8, 6)
    assert summary["n_masks"] == 6
    assert summary["n_uncertain"] == 0
    assert summary["name"] == "folder"
    assert elpv.summary()["n_masks"] == 0
    assert elpv.summary()["n_uncertain"] == 173


def test_subset_works_without_masks(elpv):
    small = elpv.subset(8)
    assert small.test_masks is None
    assert_consistent(small)


def test_standardised_images_differ_in_neither_brightness_nor_contrast():
    rng = torch.Generator().manual_seed(0)
    images = 0.3 * torch.rand(4, 3, 16, 16, generator=rng)
    changed = 0.5 * images - 0.2
    standard = standardise(images)
    torch.testing.assert_close(standard, standardise(changed), rtol=0, atol=1e-5)
    torch.testing.assert_close(standard.mean((1, 2, 3)), torch.zeros(4), rtol=0, atol=1e-5)
    torch.testing.assert_close(standard.std((1, 2, 3)), torch.full((4,), 0.35), rtol=0, atol=1e-5)
    torch.testing.assert_close(undo_standardise(standard, images), images, rtol=0, atol=1e-6)


def test_standardising_keeps_the_range_and_empty_images():
    images = torch.full((2, 1, 16, 16), -0.5)
    assert torch.equal(standardise(images), torch.zeros(2, 1, 16, 16))
    images[:, :, 0, 0] = 1  # far from all others
    standard = standardise(images)
    assert (standard.min() >= -1) & (standard.max() == 1)
