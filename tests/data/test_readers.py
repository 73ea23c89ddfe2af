"""Readers of published sets and of subjects, on tiny synthetic files; stacks of channels."""

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffad_lite.data import datasets
from diffad_lite.data.datasets import load_dataset
from diffad_lite.data.images import read_image

SIZE = 28


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


# -------------------------------------------------------------------------------------- MedMNIST


def medmnist(folder: Path, name: str = "pneumoniamnist", labels: int = 2, **changes) -> Path:
    """A file as MedMNIST's: 20, 20 and 10 images, labels in turn."""
    arrays = {}
    for i, (part, count) in enumerate({"train": 20, "val": 20, "test": 10}.items()):
        arrays[f"{part}_images"] = noise(count, SIZE, SIZE, seed=i)
        arrays[f"{part}_labels"] = np.arange(count, dtype=np.uint8)[:, None] % labels
    np.savez(folder / f"{name}.npz", **(arrays | changes))
    return folder


def test_medmnist_keeps_its_own_split(tmp_path):
    data = load_dataset("medmnist", root=medmnist(tmp_path), image_size=SIZE)
    assert (len(data.train), len(data.calibration)) == (10, 10)  # the normal ones alone
    assert data.test_labels.tolist() == [0, 1] * 5
    assert data.defect_types == ["good", "pneumonia"] * 5
    assert data.test_masks is None
    raw = np.load(tmp_path / "pneumoniamnist.npz")
    pixels = ((data.train[:, 0] + 1) * 127.5).round().numpy()
    assert np.array_equal(pixels, raw["train_images"][::2])


def test_octmnist_has_normal_eyes_last(tmp_path):
    root = medmnist(tmp_path, "octmnist_64", labels=4)
    data = load_dataset("medmnist", "octmnist_64", root=root, image_size=SIZE)
    assert len(data.train) == 5
    assert data.defect_types[:4] == ["cnv", "dme", "drusen", "good"]
    assert data.test_labels[:4].tolist() == [1, 1, 1, 0]


def test_medmnist_in_colour(tmp_path):
    rgb = {f"{part}_images": noise(20, SIZE, SIZE, 3) for part in ("train", "val")}
    root = medmnist(tmp_path, **rgb, test_images=noise(10, SIZE, SIZE, 3))
    assert load_dataset("medmnist", root=root, image_size=SIZE).info["channels"] == 3


def test_medmnist_without_its_file_says_where_to_get_it(tmp_path):
    with pytest.raises(ValueError, match=r"needs root=.*medmnist\.com.*nothing is downloaded"):
        load_dataset("medmnist")
    with pytest.raises(FileNotFoundError, match=r"no file .*octmnist\.npz; download it"):
        load_dataset("medmnist", "octmnist", root=tmp_path)
    with pytest.raises(ValueError, match="unknown medmnist category 'bloodmnist'"):
        load_dataset("medmnist", "bloodmnist", root=tmp_path)


@pytest.mark.parametrize("fault", ["truncated", "text", "lacks an array", "unknown label"])
def test_a_broken_medmnist_file_is_named(tmp_path, fault):
    path = medmnist(tmp_path) / "pneumoniamnist.npz"
    if fault == "truncated":
        path.write_bytes(path.read_bytes()[:-200])
    elif fault == "text":
        path.write_text("not an archive")
    elif fault == "unknown label":
        medmnist(tmp_path, labels=5)
    else:
        np.savez(path, train_images=noise(2, SIZE, SIZE))
    with pytest.raises(ValueError, match=r"pneumoniamnist\.npz is broken.*download it again"):
        load_dataset("medmnist", root=tmp_path)


# ------------------------------------------------------------------------ other published layouts


def png(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def half(size: int = 16) -> np.ndarray:
    """A mask of the left half, in the usual 0 and 255."""
    mask = np.zeros((size, size), dtype=np.uint8)
    mask[:, : size // 2] = 255
    return mask


def visa(root: Path) -> Path:
    rows = ["object,split,label,image,mask"]
    for i in range(40):
        image = f"candle/Data/Images/Normal/{i:04d}.JPG"
        png(root / image, noise(16, 16, 3, seed=i))
        rows.append(f"candle,{'train' if i < 30 else 'test'},normal,{image},")
    for i in range(5):
        image = f"candle/Data/Images/Anomaly/{i:03d}.JPG"
        mask = f"candle/Data/Masks/Anomaly/{i:03d}.png"
        png(root / image, noise(16, 16, 3, seed=100 + i))
        png(root / mask, half() // 255 * (1 + i))  # VisA numbers its kinds of defect
        rows.append(f"candle,test,anomaly,{image},{mask}")
    rows.append("pcb1,train,normal,pcb1/Data/Images/Normal/0000.JPG,")
    (root / "split_csv").mkdir()
    (root / "split_csv" / "1cls.csv").write_text("\n".join(rows))
    return root


def test_visa_is_split_by_its_own_table(tmp_path):
    data = load_dataset("visa", "candle", root=visa(tmp_path), image_size=16)
    assert len(data.train) + len(data.calibration) == 30
    assert data.defect_types == ["good"] * 10 + ["anomaly"] * 5
    assert [mask.mean() for mask in data.test_masks] == [0.0] * 10 + [0.5] * 5
    with pytest.raises(ValueError, match=r"unknown visa category 'pcb9'.*pcb1"):
        load_dataset("visa", "pcb9", root=tmp_path)


def test_a_visa_table_without_its_columns_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no table .*1cls\.csv"):
        load_dataset("visa", "candle", root=tmp_path)
    (tmp_path / "split_csv").mkdir()
    (tmp_path / "split_csv" / "1cls.csv").write_text("image,label\na,b")
    with pytest.raises(ValueError, match="lacks rows, or one of the columns"):
        load_dataset("visa", "candle", root=tmp_path)


@pytest.mark.parametrize("name", ["visa", "dagm"])
def test_a_missing_category_lists_the_choices(tmp_path, name):
    for category in ("nut", "bolt"):
        (tmp_path / category / "Train").mkdir(parents=True)
    (tmp_path / "split_csv").mkdir()
    rows = [f"{c},train,normal,{c}/0.png," for c in ("nut", "bolt")]
    table = "\n".join(["object,split,label,image,mask", *rows])
    (tmp_path / "split_csv" / "1cls.csv").write_text(table)
    with pytest.raises(ValueError, match=rf"{name} category.* is missing; .* bolt or nut"):
        load_dataset(name, root=tmp_path)


def test_digits_without_a_category_say_which_have_anomalies():
    assert (
        "choose a category from 0 to 9" in load_dataset("digits", image_size=8).info["remarks"][0]
    )
    assert load_dataset("digits", "3", image_size=8).info["remarks"] == ()


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("test,anomaly", "test,Defect", r"unknown label in line 42 of .*1cls\.csv 'defect'"),
        ("train,normal", "dev,normal", r"unknown split in line 2 of .*1cls\.csv 'dev'"),
        ("Normal/0001.JPG", "Normal/0000.JPG", "two images have the name train/0000"),
    ],
)
def test_odd_rows_of_a_visa_table_are_refused(tmp_path, before, after, message):
    table = visa(tmp_path) / "split_csv" / "1cls.csv"
    table.write_text(table.read_text().replace(before, after, 1))
    with pytest.raises(ValueError, match=message):
        load_dataset("visa", "candle", root=tmp_path)


def test_labels_of_visa_count_in_any_case(tmp_path):
    table = visa(tmp_path) / "split_csv" / "1cls.csv"
    table.write_text(table.read_text().replace("test,normal", "Test,Normal"))
    data = load_dataset("visa", "candle", root=tmp_path, image_size=16)
    assert data.defect_types == ["good"] * 10 + ["anomaly"] * 5


def test_masks_of_dagm_without_an_image_are_named(tmp_path):
    for part in ("Train", "Test"):
        for i in range(20):
            png(tmp_path / "Class1" / part / f"{i:04d}.PNG", noise(16, 16, seed=i))
        png(tmp_path / "Class1" / part / "Label" / "0001_LABEL.png", half())
    png(tmp_path / "Class1" / "Test" / "Label" / "0077_label.PNG", half())
    with pytest.warns(UserWarning, match=r"1 mask of no image, e\.g\. .*0077_label\.PNG"):
        data = load_dataset("dagm", "Class1", root=tmp_path, image_size=16)
    assert data.test_labels.sum() == 1


def test_dagm_leaves_defective_training_images_out(tmp_path):
    for part, count in {"Train": 30, "Test": 12}.items():
        folder = tmp_path / "Class1" / part
        for i in range(count):
            png(folder / f"{i:04d}.PNG", noise(16, 16, seed=i))
        for i in (1, 4):
            png(folder / "Label" / f"{i:04d}_label.PNG", half())
    data = load_dataset("dagm", "Class1", root=tmp_path, image_size=16)
    assert len(data.train) + len(data.calibration) == 28
    assert data.test_labels.sum() == 2
    assert sorted(data.test_ids)[:2] == ["defect/0001", "defect/0004"]
    assert [m.mean() for m, y in zip(data.test_masks, data.test_labels, strict=True) if y] == [
        0.5
    ] * 2
    with pytest.raises(ValueError, match=r"unknown dagm category in .*'Class2'.*Class1"):
        load_dataset("dagm", "Class2", root=tmp_path)


@pytest.mark.parametrize("name", ["visa", "dagm"])
def test_published_sets_need_their_folder(name, tmp_path):
    with pytest.raises(ValueError, match=f"'{name}' needs root="):
        load_dataset(name, "x")
    with pytest.raises(FileNotFoundError, match="does not exist; --root takes"):
        load_dataset(name, "x", root=tmp_path / "absent")


def test_btad_calls_normal_images_ok(tmp_path):
    for i in range(30):
        png(tmp_path / "01" / "train" / "ok" / f"{i:04d}.bmp", noise(16, 16, 3, seed=i))
    for i in range(4):
        png(tmp_path / "01" / "test" / "ok" / f"{i:04d}.bmp", noise(16, 16, 3, seed=50 + i))
        png(tmp_path / "01" / "test" / "ko" / f"{i:04d}.bmp", noise(16, 16, 3, seed=70 + i))
        png(tmp_path / "01" / "ground_truth" / "ko" / f"{i:04d}.bmp", half())
    data = load_dataset("folder", "01", root=tmp_path, image_size=16)
    assert data.test_labels.tolist() == [1] * 4 + [0] * 4
    assert data.defect_types == ["ko"] * 4 + ["good"] * 4
    assert [m.mean() for m in data.test_masks] == [0.5] * 4 + [0.0] * 4


def test_loco_has_a_folder_of_masks_for_each_image(tmp_path):
    base = tmp_path / "pushpins"
    for i in range(20):
        png(base / "train" / "good" / f"{i:03d}.png", noise(16, 16, 3, seed=i))
        png(base / "validation" / "good" / f"{i:03d}.png", noise(16, 16, 3, seed=100 + i))
    png(base / "test" / "good" / "000.png", noise(16, 16, 3, seed=200))
    for kind in ("logical_anomalies", "structural_anomalies"):
        png(base / "test" / kind / "000.png", noise(16, 16, 3, seed=201))
        for k, part in enumerate((half(), np.rot90(half()))):
            png(base / "ground_truth" / kind / "000" / f"{k:03d}.png", part // 255 * (3 + k))
    data = load_dataset("folder", "pushpins", root=tmp_path, image_size=16)
    assert len(data.calibration) == 20
    assert data.defect_types == ["good", "logical_anomalies", "structural_anomalies"]
    assert [mask.mean() for mask in data.test_masks] == [0.0, 0.75, 0.75]


# -------------------------------------------------------------------------------------- subjects


def folder_of_patients(root: Path, patients: int = 12, slices: int = 4) -> Path:
    """Normal slices of several patients, in one folder, with subjects.csv."""
    root.mkdir(parents=True, exist_ok=True)
    rows = []
    for patient in range(patients):
        for k in range(slices):
            name = f"{patient * slices + k:03d}.npy"
            np.save(root / name, noise(1, 16, 16, seed=patient * slices + k))
            rows.append((name, f"patient {patient}"))
    with (root / "subjects.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return root


@pytest.mark.parametrize("split_seed", range(5))
def test_no_subject_is_on_two_sides(tmp_path, split_seed):
    root = folder_of_patients(tmp_path / "scans")
    data = load_dataset("folder", root=root, image_size=16, split_seed=split_seed)
    whose = {}
    for patient in range(12):
        for k in range(4):
            image = noise(1, 16, 16, seed=patient * 4 + k)
            whose[image.tobytes()] = patient
    sides = []
    for part in (data.train, data.calibration, data.test_images):
        pixels = ((part + 1) * 127.5).round().numpy().astype(np.uint8)
        sides.append({whose[image.tobytes()] for image in pixels})
    assert sum(map(len, sides)) == len(set.union(*sides)) == 12
    assert 2 <= len(sides[1]) <= 4  # close to the requested fifth
    assert 2 <= len(sides[2]) <= 4


@pytest.mark.parametrize("split_seed", range(5))
def test_no_subject_is_in_two_development_halves(tmp_path, split_seed):
    root = folder_of_patients(tmp_path / "scans", patients=20, slices=3)
    options = {"root": root, "image_size": 16, "split_seed": split_seed}
    data = load_dataset("folder", plant="development", **options)
    whose = {noise(1, 16, 16, seed=i).tobytes(): i // 3 for i in range(60)}
    n_clean = len(data.test_images) // 2
    kept, clean = (
        {whose[image.tobytes()] for image in ((part + 1) * 127.5).round().numpy().astype(np.uint8)}
        for part in (data.calibration, data.test_images[:n_clean])
    )
    assert not kept & clean
    assert 4 <= len(kept) + len(clean) <= 6
    assert kept
    assert clean


def test_calibration_images_of_one_subject_cannot_be_halved():
    images, subjects = {"a": 0, "b": 1, "c": 2}, dict.fromkeys("abc", "x")
    with pytest.raises(ValueError, match="3 calibration images are of one subject"):
        datasets._halve(images, 0, subjects)
    kept, clean = datasets._halve(images, 0, subjects | {"c": "y"})
    assert {*kept, *clean} == {"a", "b", "c"}
    assert {"a", "b"} in (set(kept), set(clean))


def test_a_subject_in_training_and_test_is_an_error(tmp_path):
    rows = []
    for part, count in {"train": 20, "test": 4}.items():
        for i in range(count):
            path = tmp_path / part / "good" / f"{i:02d}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, noise(1, 16, 16, seed=i))
            rows.append(f"{part}/good/{path.name},eye {i}")
    (tmp_path / "subjects.csv").write_text("\n".join(rows))
    with pytest.raises(ValueError, match=r"4 subjects are in training .* and in the test as well"):
        load_dataset("folder", root=tmp_path, image_size=16)


@pytest.mark.parametrize(
    ("text", "message"),
    [("000.npy,a,b", "line 1 of .* is not"), ("000.npy,a", "the subject of 47 images, e.g. 001")],
)
def test_wrong_subjects_are_named(tmp_path, text, message):
    root = folder_of_patients(tmp_path / "scans")
    (root / "subjects.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_dataset("folder", root=root, image_size=16)


# ---------------------------------------------------------------------------------------- stacks


def test_stacks_of_four_channels_are_read(tmp_path):
    for i in range(30):
        np.save(tmp_path / f"{i:02d}.npy", noise(4, 40, 32, seed=i))
    data = load_dataset("folder", root=tmp_path, image_size=32, plant="lesions")
    assert data.info["channels"] == 4
    assert data.train.shape[1:] == (4, 32, 32)
    assert data.test_masks is not None
    assert data.test_masks[-1].shape == (40, 32)


@pytest.mark.parametrize(
    "array",
    [
        noise(5, 8, 8),
        noise(8, 8),
        np.zeros((4, 8, 8), dtype=np.float32),
        np.zeros((4, 0, 8), dtype=np.uint8),
        np.array([object()]),
    ],
    ids=["five channels", "no channels", "floats", "empty", "pickle"],
)
def test_other_arrays_are_refused(tmp_path, array):
    np.save(tmp_path / "scan.npy", array)
    with pytest.raises(ValueError, match=r"scan\.npy.*save uint8 \(C, H, W\)"):
        read_image(tmp_path / "scan.npy")
