"""Folders as people have them: other names, depths, masks and formats are read right, or named."""

import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from diffad_lite.data.datasets import AnomalyData, load_dataset
from diffad_lite.data.images import read_image

SIZE = 16
N_TRAIN, N_GOOD, N_CRACK = 20, 4, 6


def picture(seed: int, scale: int = 1, dtype: type = np.uint8) -> np.ndarray:
    values = np.random.default_rng(seed).integers(40, 200, (SIZE, SIZE)) * scale
    return values.astype(dtype)


def save(path: Path, pixels: np.ndarray, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def box(i: int = 0, value: int = 255, dtype: type = np.uint8) -> np.ndarray:
    """A mask of 8 x 4 pixels whose place depends on ``i``."""
    mask = np.zeros((SIZE, SIZE), dtype)
    mask[i : i + 8, 8:12] = value
    return mask


def build(
    base: Path,
    *,
    train: str = "train/good",
    good: str = "test/good",
    crack: str = "test/crack",
    masks: str = "ground_truth/crack/{:03d}_mask.png",
) -> Path:
    """Write a small data set in MVTec layout, or near it; return its folder."""
    for folder, n, first in ((train, N_TRAIN, 0), (good, N_GOOD, 100), (crack, N_CRACK, 200)):
        for i in range(n):
            save(base / folder / f"{i:03d}.png", picture(first + i))
    for i in range(N_CRACK if masks else 0):
        save(base / masks.format(i), box(i))
    return base


def load(base: Path, **options) -> tuple[AnomalyData, str]:
    """Load a folder; return the data and its notices, which must all be warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = load_dataset("folder", root=base, **{"image_size": SIZE} | options)
    assert [str(w.message) for w in caught] == data.info["notices"]
    assert data.summary()["notices"] == data.info["notices"]
    return data, "\n".join(data.info["notices"])


def mask_of(data: AnomalyData, name: str) -> np.ndarray | None:
    assert data.test_masks is not None
    return data.test_masks[data.test_ids.index(name)]


def assert_usual(data: AnomalyData) -> None:
    """All images of :func:`build` stand where they belong, with their masks."""
    assert len(data.train) + len(data.calibration) == N_TRAIN
    assert data.test_labels.tolist().count(0) == N_GOOD
    assert data.test_labels.tolist().count(1) == N_CRACK
    anomalous = [n for n, y in zip(data.test_ids, data.test_labels, strict=True) if y]
    for i, name in enumerate(sorted(anomalous)):
        np.testing.assert_array_equal(mask_of(data, name), box(i) > 0)


def test_the_usual_layout_has_no_notices(tmp_path):
    data, notices = load(build(tmp_path))
    assert_usual(data)
    assert notices == ""
    assert data.info["bits"] is None


# ------------------------------------------------------------------------- names of folders


@pytest.mark.parametrize("name", ["normal", "Good", "OK", "NORMAL"])
def test_other_names_of_the_normal_class(tmp_path, name):
    plain, _ = load(build(tmp_path / "plain"))
    data, notices = load(build(tmp_path / "x", train=f"train/{name}", good=f"test/{name}"))
    assert_usual(data)
    assert notices == f"images in train/{name}, test/{name} are taken as normal"
    assert data.info["fingerprint"] == plain.info["fingerprint"]
    assert data.test_ids == sorted(plain.test_ids, key=lambda n: name < "crack" and n[0] == "c")


def test_parts_and_mask_folders_in_capitals(tmp_path):
    names = {"train": "Train/good", "good": "Test/good", "crack": "Test/Crack"}
    data, notices = load(build(tmp_path, **names, masks="Ground_Truth/CRACK/{:03d}_mask.png"))
    assert_usual(data)
    assert notices == ""


def test_two_folders_of_normal_images_do_not_overwrite_each_other(tmp_path):
    build(tmp_path)
    for i in range(N_GOOD):
        save(tmp_path / "test" / "ok" / f"{i:03d}.png", picture(300 + i))
        save(tmp_path / "train" / "ok" / f"{i:03d}.png", picture(400 + i))
    data, notices = load(tmp_path)
    assert data.test_labels.tolist().count(0) == 2 * N_GOOD
    assert {"good/000", "good/ok-000"} <= set(data.test_ids)
    assert len(data.train) + len(data.calibration) == N_TRAIN + N_GOOD
    assert "images in train/ok, test/ok are taken as normal" in notices


def test_a_test_without_normal_images_says_which_are_held_out(tmp_path):
    data, notices = load(build(tmp_path, good="test/healthy"))
    assert set(data.defect_types) == {"good", "crack", "healthy"}
    assert "has no folder of normal images (good, normal, ok)" in notices
    assert "these folders count as defects: crack, healthy" in notices


# --------------------------------------------------------------------- sub-folders, categories


def test_deeper_images_are_read(tmp_path):
    names = {"train": "train/good/cam1", "good": "test/good/cam1", "crack": "test/crack/cam1"}
    data, notices = load(build(tmp_path, **names, masks="ground_truth/crack/cam1/{:03d}_mask.png"))
    assert_usual(data)
    assert "crack/cam1-000" in data.test_ids
    assert notices.startswith("30 images in deeper sub-folders, e.g. train/good/cam1/000.png")


def test_equal_names_in_two_deeper_folders_are_two_images(tmp_path):
    build(tmp_path)
    for i in range(N_GOOD):
        for k in (1, 2):
            save(tmp_path / f"test/good/cam{k}/{i:03d}.png", picture(500 + 10 * k + i))
    data, _ = load(tmp_path)
    assert data.test_labels.tolist().count(0) == 3 * N_GOOD
    planted, _ = load(tmp_path, plant="cells")
    assert planted.test_labels.tolist().count(1) == 3 * N_GOOD


def test_images_directly_in_train_are_normal(tmp_path):
    data, notices = load(build(tmp_path, train="train"))
    assert_usual(data)
    assert "20 images directly in" in notices
    assert "taken as normal" in notices


def test_images_directly_in_test_are_named(tmp_path):
    build(tmp_path)
    for i in range(3):
        save(tmp_path / "test" / f"x{i}.png", picture(i))
    save(tmp_path / "train" / "bad" / "y.png", picture(1))
    data, notices = load(tmp_path)
    assert_usual(data)
    assert "4 images not read" in notices
    assert "test/x0.png" in notices


def test_classes_below_a_camera_are_refused(tmp_path):
    build(tmp_path, good="test/cam1/good", crack="test/cam1/crack")
    with pytest.raises(ValueError, match=r"test.cam1 holds a folder of normal images \(good\)"):
        load(tmp_path)


def test_sub_folders_of_a_loose_folder_are_named(tmp_path):
    for i in range(30):
        save(tmp_path / f"{i:02d}.png", picture(i))
        save(tmp_path / "bad" / f"{i:02d}.png", picture(50 + i))
    data, notices = load(tmp_path)
    assert len(data.train) + len(data.calibration) + len(data.test_ids) == 30
    assert notices.startswith("30 images not read")
    assert "bad/00.png" in notices


def test_linked_folders_inside_are_named_and_not_followed(tmp_path):
    build(tmp_path / "x")
    (tmp_path / "x/train/good/all").symlink_to(tmp_path / "x")
    data, notices = load(tmp_path / "x")
    assert_usual(data)
    assert notices.startswith("1 linked folder not read, e.g. ")
    assert "train/good/all" in notices


def test_a_root_one_level_too_high_lists_the_categories(tmp_path):
    for name in ("bottle", "cable"):
        build(tmp_path / name)
    save(tmp_path / "preview.png", picture(0))
    with pytest.raises(ValueError, match="choose --category bottle or cable"):
        load(tmp_path)
    with pytest.raises(ValueError, match=f"choose --category {tmp_path.name}/bottle or "):
        load_dataset("folder", tmp_path.name, root=tmp_path.parent)


# --------------------------------------------------------------------------- where masks are


@pytest.mark.parametrize(
    "masks",
    [
        "ground_truth/crack/{:03d}_mask.PNG",
        "ground_truth/crack/{:03d}_mask.bmp",
        "ground_truth/crack/{:03d}_mask.tif",
        "ground_truth/crack/{:03d}.tiff",
        "ground_truth/crack/{:03d}_GT.png",
        "ground_truth/crack/{:03d}_MASK.png",
        "masks/crack/{:03d}.png",
        "Masks/Crack/{:03d}_mask.png",
        "ground_truth/crack/{:03d}/0.png",
    ],
)
def test_masks_of_many_names_are_used(tmp_path, masks):
    data, notices = load(build(tmp_path, masks=masks))
    assert_usual(data)
    assert notices == ""


@pytest.mark.parametrize(
    "masks",
    [
        "test/crack/{:03d}_mask.png",
        "test/crack/masks/{:03d}.png",
        "test/ground_truth/crack/{:03d}.png",
    ],
)
def test_masks_among_the_test_images_are_masks(tmp_path, masks):
    data, notices = load(build(tmp_path, masks=masks))
    assert_usual(data)
    assert notices.startswith("6 files among the test images, e.g. ")
    assert notices.endswith("taken as masks")


def test_masks_beside_normal_images_are_left_out(tmp_path):
    build(tmp_path / "a")
    for i in range(N_TRAIN):
        save(tmp_path / f"a/train/good/{i:03d}_mask.png", box(0, value=0))
    data, notices = load(tmp_path / "a")
    assert_usual(data)
    assert notices.startswith("20 masks not read, e.g. ")
    for i in range(30):
        save(tmp_path / f"b/{i:02d}.png", picture(i))
        save(tmp_path / f"b/{i:02d}_mask.png", box())
    data, notices = load(tmp_path / "b")
    assert len(data.train) + len(data.calibration) + len(data.test_ids) == 30
    assert notices.startswith("30 masks not read, e.g. ")


def test_files_of_one_name_are_images_and_said(tmp_path):
    build(tmp_path, masks="test/crack/{:03d}.bmp")
    data, notices = load(tmp_path)
    assert data.test_labels.tolist().count(1) == 2 * N_CRACK
    assert notices.startswith("6 names of several files, e.g. ")
    assert "move masks to ground_truth" in notices


def test_masks_directly_in_ground_truth_are_named(tmp_path):
    data, notices = load(build(tmp_path, masks="ground_truth/{:03d}_mask.png"))
    assert data.test_masks is None
    assert notices.startswith("6 masks of no test image, e.g. ")


def test_jpeg_masks_are_used_and_said(tmp_path):
    data, notices = load(build(tmp_path, masks="ground_truth/crack/{:03d}_mask.jpg"))
    assert_usual(data)
    assert "masks with blurred edges or lossy compression, e.g. " in notices
    assert notices.endswith("count as anomalous; save 0 and 255 as PNG")


def test_several_masks_of_one_image_are_united(tmp_path):
    build(tmp_path)
    save(tmp_path / "ground_truth/crack/000_mask_1.png", box(0).T)
    data, notices = load(tmp_path)
    np.testing.assert_array_equal(mask_of(data, "crack/000"), (box(0) | box(0).T) > 0)
    assert notices == ""


def test_a_mask_named_like_another_image_is_not_taken(tmp_path):
    build(tmp_path, masks="")
    for i, stem in enumerate(("a", "a_seg")):
        save(tmp_path / f"test/crack/sub{i}/{stem}.png", picture(i))
    (tmp_path / "test/crack/sub1/a_seg.png").rename(tmp_path / "test/crack/a_seg.png")
    (tmp_path / "test/crack/sub0/a.png").rename(tmp_path / "test/crack/b.png")
    save(tmp_path / "ground_truth/crack/a_seg.png", box(3))
    data, _ = load(tmp_path)
    np.testing.assert_array_equal(mask_of(data, "crack/a_seg"), box(3) > 0)


def test_masks_of_no_image_and_images_of_no_mask_are_named(tmp_path):
    build(tmp_path)
    folder = tmp_path / "ground_truth" / "crack"
    (folder / "003_mask.png").rename(folder / "mask-of-3.png")
    save(tmp_path / "ground_truth" / "hole" / "000_mask.png", box())
    data, notices = load(tmp_path)
    assert mask_of(data, "crack/003") is None
    assert "2 masks of no test image, e.g. " in notices
    assert "crack/mask-of-3.png" in notices
    assert "1 of 6 anomalous images have no mask, or an empty one (0), e.g. crack/003" in notices


def test_masks_of_normal_images_may_be_empty(tmp_path):
    build(tmp_path)
    for i in range(N_GOOD):
        save(tmp_path / f"ground_truth/good/{i:03d}_mask.png", box(0, value=0))
    assert load(tmp_path)[1] == ""
    save(tmp_path / "ground_truth/good/001_mask.png", box())
    data, notices = load(tmp_path)
    assert_usual(data)
    assert "1 normal test image with a mask that marks pixels, e.g. good/001" in notices


# ---------------------------------------------------------------------------- values of masks


@pytest.mark.parametrize("values", [(1, 255), (100, 200), (3, 7)])
def test_all_classes_of_a_mask_are_anomalous(tmp_path, values):
    build(tmp_path)
    mask = np.where(box(0) > 0, values[0], 0) + np.where(box(0).T > 0, values[1], 0)
    save(tmp_path / "ground_truth/crack/000_mask.png", mask.clip(0, 255).astype(np.uint8))
    data, notices = load(tmp_path)
    np.testing.assert_array_equal(mask_of(data, "crack/000"), (box(0) | box(0).T) > 0)
    assert "1 mask with several values" in notices
    assert "every value except 0 counts as anomalous" in notices


@pytest.mark.parametrize("value", [1, 255, 256, 65535])
def test_deep_masks_keep_their_ones(tmp_path, value):
    build(tmp_path)
    save(tmp_path / "ground_truth/crack/000_mask.png", box(0, value, np.uint16))
    data, notices = load(tmp_path)
    assert_usual(data)
    assert notices == ""


def test_floating_point_masks_of_zeros_and_ones(tmp_path):
    build(tmp_path, masks="ground_truth/crack/{:03d}_mask.tif")
    save(tmp_path / "ground_truth/crack/000_mask.tif", box(0, 1, np.float32))
    assert_usual(load(tmp_path)[0])


def test_blurred_masks_are_cut_at_half(tmp_path):
    build(tmp_path)
    blurred = (np.arange(SIZE * SIZE).reshape(SIZE, SIZE) % 256).astype(np.uint8)
    save(tmp_path / "ground_truth/crack/000_mask.png", blurred)
    data, notices = load(tmp_path)
    np.testing.assert_array_equal(mask_of(data, "crack/000"), blurred > 127)
    assert "1 mask with blurred edges or lossy compression" in notices


def test_faint_jpeg_masks_are_not_used(tmp_path):
    build(tmp_path)
    (tmp_path / "ground_truth/crack/000_mask.png").unlink()
    values = np.random.default_rng(0).integers(0, 9, (SIZE, SIZE)).astype(np.uint8)
    save(tmp_path / "ground_truth/crack/000_mask.jpg", values, quality=100)
    data, notices = load(tmp_path)
    assert mask_of(data, "crack/000") is None
    assert "1 mask not used" in notices
    assert "may be noise of the lossy compression" in notices


def test_inverted_masks_are_named(tmp_path):
    build(tmp_path)
    save(tmp_path / "ground_truth/crack/002_mask.png", 255 - box(2))
    data, notices = load(tmp_path)
    np.testing.assert_array_equal(mask_of(data, "crack/002"), box(2) == 0)
    assert "1 mask covering more than half of the image, e.g. crack/002 (88%)" in notices


# ------------------------------------------------------------------------- depth of the pixels


def deep_set(base: Path, scale: int, dtype: type = np.uint16, suffix: str = "png") -> Path:
    """Normal images whose values are 40 .. 199 times ``scale``."""
    for i in range(30):
        save(base / f"{i:02d}.{suffix}", picture(i, scale, dtype))
    return base


@pytest.mark.parametrize(("scale", "bits"), [(1, 8), (5, 10), (20, 12), (80, 14), (300, 16)])
@pytest.mark.parametrize(("dtype", "suffix"), [(np.uint16, "png"), (np.int32, "tif")])
def test_the_depth_is_decided_for_the_data_set(tmp_path, scale, bits, dtype, suffix):
    data, notices = load(deep_set(tmp_path, scale, dtype, suffix))
    assert data.info["bits"] == bits
    values = [picture(i, scale, np.uint16) / ((2**bits - 1) / 255) for i in range(30)]
    expected = sorted(v.round().astype(np.uint8).tobytes() for v in values)
    parts = (data.train, data.calibration, data.test_images)
    pixels = [((part + 1) * 127.5).round().numpy().astype(np.uint8) for part in parts]
    assert sorted(image.tobytes() for part in pixels for image in part) == expected
    said = f"read with {bits} bits, 0 .. {2**bits - 1}"
    assert (said in notices) == (bits < 16 or dtype is np.int32)


def test_the_depth_does_not_depend_on_the_test_and_clipping_is_said(tmp_path):
    for folder, scale, first, n in (("train/good", 20, 0, 20), ("test/crack", 30, 100, 4)):
        for i in range(n):
            save(tmp_path / folder / f"{i}.png", picture(first + i, scale, np.uint16))
    data, notices = load(tmp_path)
    assert data.info["bits"] == 12
    assert "4 images with values above 4095, e.g. " in notices


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (picture(0, 1, np.int32) - 100, r"the range of its values \(-\d+ .. \d+\) is not known"),
        (picture(0, 9999, np.int32), r"the range of its values"),
        (picture(0, 1, np.float32), "floating-point pixels have no agreed range"),
    ],
    ids=["negative", "32 bits", "float"],
)
def test_an_unknown_range_is_refused(tmp_path, values, message):
    deep_set(tmp_path, 20, np.int32, "tif")
    save(tmp_path / "07.tif", values)
    with pytest.raises(ValueError, match=rf"07\.tif: the file is fine, but {message}"):
        load(tmp_path)


def test_deep_images_among_others_are_refused_or_said(tmp_path):
    deep_set(tmp_path / "a", 20)
    save(tmp_path / "a" / "03.png", picture(3))
    with pytest.raises(ValueError, match=r"29 images of 16 bits, .* and 1 of 8 bits, .*03.png"):
        load(tmp_path / "a")
    deep_set(tmp_path / "b", 300)
    save(tmp_path / "b" / "03.png", picture(3))
    _, notices = load(tmp_path / "b")
    assert "29 images of more than 8 bits" in notices


def write_tiff(path: Path, pixels: np.ndarray, sample_format: int = 1) -> Path:
    """Write an uncompressed TIFF (H, W, C) of any number of channels and any kind of values."""
    H, W, C = pixels.shape
    tags = ImageFileDirectory_v2(b"II*\0\0\0\0\0")
    tags[256], tags[257], tags[259], tags[277], tags[278] = W, H, 1, C, H
    tags[258], tags[262] = (8 * pixels.itemsize,) * C, 1 if C < 3 else 2
    tags[339] = (sample_format,) * C
    tags[279] = pixels.nbytes
    if C > 3:
        tags[338] = (0,) * (C - 3)
    tags[273] = 0  # the pixels follow the tags; Pillow adds the offset
    path.write_bytes(b"II*\0\x08\0\0\0" + tags.tobytes(8) + pixels.tobytes())
    return path


def test_deep_colour_images_that_are_nearly_black_are_refused(tmp_path):
    for i in range(20):
        pixels = np.random.default_rng(i).integers(0, 4096, (SIZE, SIZE, 3))
        write_tiff(tmp_path / f"{i:02d}.tif", pixels.astype(np.uint16))
    with pytest.raises(ValueError, match=r"20 images with 16 bits per channel, .* above 4095 of"):
        load(tmp_path)


# --------------------------------------------------------------- pages, rotation, other formats


def test_files_of_several_pages_are_named(tmp_path):
    pages = [Image.fromarray(picture(i)) for i in range(3)]
    for i in range(20):
        save(tmp_path / f"{i:02d}.tif", picture(i))
    pages[0].save(tmp_path / "05.tif", save_all=True, append_images=pages[1:])
    pages[0].save(tmp_path / "06.webp", save_all=True, append_images=pages[1:], lossless=True)
    _, notices = load(tmp_path)
    assert "2 files with several pages or frames, e.g. " in notices
    assert "only the first is read" in notices


def test_rotation_of_an_image_with_a_mask_is_named(tmp_path):
    build(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 3
    save(tmp_path / "test/crack/001.png", picture(201), exif=exif)
    save(tmp_path / "test/good/001.png", picture(101), exif=exif)
    _, notices = load(tmp_path)
    assert "1 image with a mask and EXIF rotation, e.g. " in notices
    assert "crack/001.png" in notices


def test_transparency_that_is_dropped_is_named_and_an_opaque_channel_is_not(tmp_path):
    build(tmp_path)
    for name, alpha in (("crack/001", 128), ("good/001", 255)):
        channels = np.dstack([picture(201)] * 3 + [np.full_like(picture(201), alpha)])
        save(tmp_path / f"test/{name}.png", channels)
    _, notices = load(tmp_path)
    assert "1 image with transparency, e.g. " in notices
    assert "crack/001.png: that channel is dropped" in notices


def test_one_colour_image_among_grey_ones_is_named(tmp_path):
    build(tmp_path)
    save(tmp_path / "train/good/003.png", np.dstack([picture(3)] * 3))
    data, notices = load(tmp_path)
    assert data.info["channels"] == 3
    assert notices.startswith("1 of 30 images have 3 channels, e.g. train/003, and the others 1")


@pytest.mark.parametrize(
    ("pixels", "sample_format", "message"),
    [
        (np.zeros((8, 9, 1)), 3, "a TIFF of 1 channels, floating-point with 64 bits"),
        (np.zeros((8, 9, 5), np.uint8), 1, "a TIFF of 5 channels, unsigned with 8 bits"),
        (np.zeros((8, 9, 1), np.int8), 2, "a TIFF of 1 channels, signed with 8 bits"),
        (np.zeros((8, 9, 2), np.uint16), 1, "a TIFF of 2 channels, unsigned with 16 bits"),
    ],
    ids=["float64", "five channels", "signed", "two channels"],
)
def test_unsupported_tiffs_are_fine_but_not_supported(tmp_path, pixels, sample_format, message):
    path = write_tiff(tmp_path / "x.tif", pixels, sample_format)
    with pytest.raises(ValueError, match=rf"x\.tif: the file is fine, but {message}") as error:
        read_image(path)
    assert "convert it with tifffile" in str(error.value)
    assert "repair" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.dcm", bytes(128) + b"DICM", "DICOM is not supported; convert it with pydicom"),
        ("IM0001", bytes(128) + b"DICM", "DICOM is not supported; convert it with pydicom"),
        ("a.nii.gz", b"\x1f\x8b", "NIfTI is not supported; convert it with nibabel"),
        ("a.nii", b"", "NIfTI is not supported; convert it with nibabel"),
        ("a.gif", b"GIF89a", "GIF is not supported; convert it with Pillow"),
    ],
)
def test_other_formats_are_named_with_what_converts_them(tmp_path, name, content, message):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}: {message}"):
        load(tmp_path / "x")
    for i in range(20):
        save(tmp_path / "x" / f"{i:02d}.png", picture(i))
    _, notices = load(tmp_path / "x")
    assert "1 file of another format not read, e.g. " in notices
    assert message in notices
    renamed = tmp_path / "scan.png"
    renamed.write_bytes(content)
    if b"DICM" in content:
        with pytest.raises(ValueError, match=f"the file is fine, but {message}"):
            read_image(renamed)


# ----------------------------------------------------------------- packaged and published sets


@pytest.mark.parametrize("name", ["elpv", "shapes", "digits"])
def test_a_root_with_a_packaged_data_set_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=rf"{name}' is part of a package .*--dataset folder"):
        load_dataset(name, root=tmp_path)
