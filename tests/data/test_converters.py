"""Converters of MVTec AD 2 and Real-IAD, on small synthetic trees in the published layouts."""

import json
import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffad_lite.cli.main import main
from diffad_lite.data import converters
from diffad_lite.data.converters import convert_dataset
from diffad_lite.data.datasets import AnomalyData, load_dataset

SIDE = 16
LIGHTS = ("regular", "overexposed", "underexposed", "shift_1", "shift_2", "shift_3")


def save(path: Path, seed: int, shape: tuple[int, ...] = (SIDE, SIDE, 3)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def save_mask(path: Path, rows: int, side: int = SIDE) -> None:
    mask = np.zeros((side, side), dtype=np.uint8)
    mask[:rows] = 255
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask).save(path)


def files_below(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def load(out: Path, category: str) -> AnomalyData:
    """Load a converted category, which must need no warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load_dataset("folder", category, root=out, image_size=SIDE)


# ------------------------------------------------------------------------------------ MVTec AD 2


@pytest.fixture
def mvtec(tmp_path) -> Path:
    """12 images for training, 9 for validation; of six lights each 1 good and 1 bad; private."""
    root = tmp_path / "mvtec_ad_2"
    can, test = root / "can", root / "can" / "test_public"
    for i in range(12):
        save(can / "train" / "good" / f"{i:03d}_regular.png", i)
    for i in range(9):
        save(can / "validation" / "good" / f"{i:03d}_regular.png", 100 + i)
    for i, light in enumerate(LIGHTS):
        save(test / "good" / f"000_{light}.png", 200 + i)
        save(test / "bad" / f"000_{light}.png", 300 + i)
        save_mask(test / "ground_truth" / "bad" / f"000_{light}_mask.png", 1 + i)
    for folder, ending in (("test_private", "regular"), ("test_private_mixed", "mixed")):
        save(can / folder / f"000_{ending}.png", 400)
    (root / "vial" / "test_public").mkdir(parents=True)
    return root


def test_mvtec_ad_2_keeps_its_parts_and_masks(mvtec, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["convert", "mvtec_ad_2", "--root", mvtec, "--category", "can", "--out", out]
    assert main([str(word) for word in command]) == 0
    assert f"--dataset folder --root {out} --category can" in capsys.readouterr().out
    data = load(out, "can")
    assert (len(data.train), len(data.calibration)) == (12, 9)
    assert data.test_ids == [f"{kind}/000_{x}" for kind in ("bad", "good") for x in sorted(LIGHTS)]
    assert data.test_labels.tolist() == [1] * 6 + [0] * 6
    rows = {f"bad/000_{light}": (1 + i) / SIDE for i, light in enumerate(LIGHTS)}
    masks = dict(zip(data.test_ids, data.test_masks, strict=True))
    assert {name: mask.mean() for name, mask in masks.items() if mask.any()} == rows
    assert not any("private" in name for name in files_below(out))


def test_converted_files_need_no_space_and_are_copied_where_links_fail(
    mvtec, tmp_path, monkeypatch
):
    linked = convert_dataset("mvtec_ad_2", mvtec, "can", tmp_path / "linked")
    original = mvtec / "can" / "train" / "good" / "000_regular.png"
    assert (linked / "train" / "good" / "000_regular.png").samefile(original)

    def refuse(*paths: object) -> None:
        raise OSError("another disk")

    monkeypatch.setattr(converters.os, "link", refuse)
    copied = convert_dataset("mvtec_ad_2", mvtec, "can", tmp_path / "copied")
    copy = copied / "train" / "good" / "000_regular.png"
    assert not copy.samefile(original)
    assert copy.read_bytes() == original.read_bytes()
    assert files_below(copied) == files_below(linked)


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("test_public/ground_truth/bad/000_shift_1_mask.png", r"1 of 39 .*shift_1_mask\.png; unp"),
        ("validation", r"no images in .*validation/good; unpack the whole archive again"),
        ("test_public", r"unknown mvtec_ad_2 category in .* 'can'; .*known: vial"),
    ],
)
def test_an_incomplete_mvtec_ad_2_is_named_and_leaves_nothing(mvtec, tmp_path, gone, message):
    path = mvtec / "can" / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        convert_dataset("mvtec_ad_2", mvtec, "can", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_mask_of_another_size_is_named_when_it_is_loaded(mvtec, tmp_path):
    name = "000_regular_mask.png"
    save_mask(mvtec / "can" / "test_public" / "ground_truth" / "bad" / name, 1, side=8)
    convert_dataset("mvtec_ad_2", mvtec, "can", tmp_path / "out")
    with pytest.raises(ValueError, match="mask of bad/000_regular is 8x8 pixels, its image 16x16"):
        load_dataset("folder", "can", root=tmp_path / "out", image_size=SIDE)


def test_an_existing_output_is_kept(mvtec, tmp_path):
    convert_dataset("mvtec_ad_2", mvtec, "can", tmp_path / "out")
    before = files_below(tmp_path)
    with pytest.raises(ValueError, match=r"out/can exists already; remove it"):
        convert_dataset("mvtec_ad_2", mvtec, "can", tmp_path / "out")
    with pytest.raises(ValueError, match=r"mvtec_ad_2/can exists already"):  # not into itself
        convert_dataset("mvtec_ad_2", mvtec, "can", mvtec)
    assert files_below(tmp_path) == before


def test_an_error_on_the_way_leaves_nothing(mvtec, tmp_path, monkeypatch):
    def fail_late(path: Path, place: Path) -> None:
        if place.parent.name == "bad":
            raise OSError(28, os.strerror(28), str(place))
        shutil.copyfile(path, place)

    monkeypatch.setattr(converters, "_link", fail_late)
    with pytest.raises(OSError, match="No space left") as caught:
        convert_dataset("mvtec_ad_2", mvtec, "can", tmp_path / "out")
    assert str(caught.value.filename).startswith(f"{tmp_path}/out/can/")
    assert list((tmp_path / "out").iterdir()) == []


# -------------------------------------------------------------------------------------- Real-IAD


@pytest.fixture
def real_iad(tmp_path) -> Path:
    """Objects of five views: 20 for training, 2 normal and 2 defective ones for the test."""
    root = tmp_path / "Real-IAD"
    toy = root / "realiad_1024" / "toy"
    train, test = [], []
    for i in range(24):
        kind = "OK" if i < 22 else ("AK", "HS")[i - 22]
        folder = f"OK/S{i:04d}" if kind == "OK" else f"NG/{kind}/S{i:04d}"
        for view in range(1, 6):
            name = f"{folder}/toy_{i:04d}_{'NG_' * (kind != 'OK')}{kind}_C{view}_2023.jpg"
            save(toy / name, 10 * i + view)
            is_visible = kind != "OK" and view < 4  # views that do not show the defect are normal
            mask = name.replace(".jpg", ".png") if is_visible else None
            if mask is not None:
                save_mask(toy / mask, view)
            entry = {"category": "toy", "anomaly_class": kind if is_visible else "OK"}
            (train if i < 20 else test).append(entry | {"image_path": name, "mask_path": mask})
    meta = {"normal_class": "OK", "prefix": "toy/"}
    write_split(root / "realiad_jsons" / "realiad_jsons", meta, train, test)
    single = [[e for e in part if "_C1_" in e["image_path"]] for part in (train, test)]
    write_split(root / "realiad_jsons" / "realiad_jsons_sv", meta, *single)
    return root


def write_split(folder: Path, meta: object, train: object, test: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "toy.json").write_text(json.dumps({"meta": meta, "train": train, "test": test}))


def convert_toy(root: Path, out: Path, **options: object) -> Path:
    return convert_dataset("real_iad", root / "realiad_1024", "toy", out, **options)


def test_real_iad_keeps_its_split_and_the_views_of_an_object_together(real_iad, tmp_path):
    folder = convert_toy(real_iad, tmp_path / "out")
    data = load(tmp_path / "out", "toy")
    assert len(data.train) + len(data.calibration) == 100
    assert len(data.train) % 5 == len(data.calibration) % 5 == 0, "an object is divided"
    assert data.calibration.shape[0] == 20
    counts = {kind: data.defect_types.count(kind) for kind in ("good", "AK", "HS")}
    assert counts == {"good": 14, "AK": 3, "HS": 3}
    for name, mask in zip(data.test_ids, data.test_masks, strict=True):
        view = int(name.split("_C")[1][0])
        assert mask.mean() == (0 if name.startswith("good/") else view / SIDE)
    rows = (folder / "subjects.csv").read_text().splitlines()
    assert len(rows) == 120
    assert "train/good/toy_0003_OK_C5_2023.jpg,OK/S0003" in rows


def test_the_split_over_single_views_is_chosen_by_its_folder(real_iad, tmp_path):
    splits = real_iad / "realiad_jsons" / "realiad_jsons_sv"
    command = ["convert", "real_iad", "--root", real_iad / "realiad_1024", "--category", "toy"]
    command += ["--out", tmp_path / "out", "--splits", splits]
    assert main([str(word) for word in command]) == 0
    data = load(tmp_path / "out", "toy")
    assert (len(data.train) + len(data.calibration), len(data.test_ids)) == (20, 4)


def test_json_files_directly_in_realiad_jsons_are_read(real_iad, tmp_path):
    inner = real_iad / "realiad_jsons" / "realiad_jsons"
    (inner / "toy.json").rename(inner.parent / "toy.json")
    inner.rmdir()
    assert convert_toy(real_iad, tmp_path / "out").is_dir()


def edit_split(root: Path, *keys: str | int, value: object) -> None:
    """Replace one value of the split; ``keys`` lead to it."""
    path = root / "realiad_jsons" / "realiad_jsons" / "toy.json"
    values = target = json.loads(path.read_text())
    for key in keys[:-1]:
        target = target[key]
    target[keys[-1]] = value
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("test", 0, "image_path"), "../../secret.jpg", r"test\[0\] must lie inside its folder"),
        (("test", 10, "mask_path"), "/etc/secret.png", r"test\[10\] must lie inside its folder"),
        (("meta", "prefix"), "../other/", "prefix in .* must lie inside its folder"),
        (("test", 10, "anomaly_class"), "../up", r"cannot name a folder of defects, got '\.\./up'"),
        (("test", 10, "anomaly_class"), "good", "cannot name a folder of defects, got 'good'"),
        (("test", 10, "anomaly_class"), "AK ", "cannot name a folder of defects, got 'AK '"),
        (("test", 0, "image_path"), "OK/S0020/.hidden.jpg", "must name an image file"),
        (("test", 0, "image_path"), "OK/S0020/toy.gif", "must name an image file"),
        (("test", 10, "anomaly_class"), None, "must have anomaly_class and image_path"),
        (("test", 10), 7, r"test\.10 must be"),
        (("meta",), None, "meta must be"),
        (("meta", "normal_class"), None, "normal_class must be"),
        (("train", 0, "anomaly_class"), "AK", r"train\[0\] is anomalous .*noisy split"),
        (("test", 1, "image_path"), "OK/S0020/toy_0020_OK_C1_2023.jpg", "two images have the na"),
        (("test", 0, "image_path"), "OK/S0020/gone.jpg", r"1 of 126 .*gone\.jpg; unpack"),
        (("test", 10, "mask_path"), "NG/gone.png", r"1 of 126 .*gone\.png; unpack"),
    ],
)
def test_a_broken_split_is_named_and_leaves_nothing(real_iad, tmp_path, keys, value, message):
    edit_split(real_iad, *keys, value=value)
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        convert_toy(real_iad, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_image_in_both_parts_is_refused(real_iad, tmp_path):
    split = json.loads((real_iad / "realiad_jsons" / "realiad_jsons" / "toy.json").read_text())
    edit_split(real_iad, "test", 0, "image_path", value=split["train"][0]["image_path"])
    with pytest.raises(ValueError, match="twice; an image must be in one part, once"):
        convert_toy(real_iad, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_names_that_differ_in_capitals_only_are_refused(real_iad, tmp_path):
    edit_split(real_iad, "test", 10, "anomaly_class", value="ak")
    path = real_iad / "realiad_jsons" / "realiad_jsons" / "toy.json"
    entries = [e for e in json.loads(path.read_text())["test"] if e["anomaly_class"] == "AK"]
    twin = Path(entries[0]["image_path"])
    other = twin.parent / "other" / twin.name
    save(real_iad / "realiad_1024" / "toy" / other, seed=99)
    edit_split(real_iad, "test", 10, "image_path", value=other.as_posix())
    with pytest.raises(ValueError, match="differ in capitals only; rename one of them"):
        convert_toy(real_iad, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_link_is_never_written_through(tmp_path):
    for name in ("a.png", "b.png"):
        save(tmp_path / name, seed=ord(name[0]))
    before = (tmp_path / "a.png").read_bytes()
    converters._link(tmp_path / "a.png", tmp_path / "place.png")
    with pytest.raises(FileExistsError):
        converters._link(tmp_path / "b.png", tmp_path / "place.png")
    assert (tmp_path / "a.png").read_bytes() == before


def test_views_of_an_object_on_both_sides_are_said_and_the_split_is_kept(real_iad, tmp_path):
    folder = real_iad / "realiad_jsons" / "realiad_jsons"
    values = json.loads((folder / "toy.json").read_text())
    moved = values["test"].pop(0)
    write_split(folder, values["meta"], [*values["train"], moved], values["test"])
    with pytest.warns(UserWarning, match=r"1 object with views in train and in test, e\.g\. OK/S0"):
        convert_toy(real_iad, tmp_path / "out")
    data = load(tmp_path / "out", "toy")
    assert len(data.train) + len(data.calibration) == 101


def test_a_defect_without_a_mask_counts_for_image_metrics(real_iad, tmp_path):
    edit_split(real_iad, "test", 10, "mask_path", value=None)
    convert_toy(real_iad, tmp_path / "out")
    with pytest.warns(UserWarning, match="1 of 6 anomalous images have no mask"):
        load_dataset("folder", "toy", root=tmp_path / "out", image_size=SIDE)


def test_what_is_missing_is_named(real_iad, mvtec, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"unknown real_iad category in .*did you mean 'toy"):
        convert_dataset("real_iad", real_iad / "realiad_1024", "tyo", out)
    with pytest.raises(ValueError, match=r"real_iad category in .* missing; choose --category t"):
        convert_dataset("real_iad", real_iad / "realiad_1024", None, out)
    with pytest.raises(FileNotFoundError, match=r"no folder .*gone with the split; .*--splits DIR"):
        convert_toy(real_iad, out, splits=tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match=r"the folder .* does not exist; --root takes"):
        convert_toy(tmp_path / "gone", out)
    with pytest.raises(ValueError, match="unknown data set to convert 'visa'"):
        convert_dataset("visa", mvtec, "can", out)
    with pytest.raises(ValueError, match="mvtec_ad_2 has none; leave them out"):
        convert_dataset("mvtec_ad_2", mvtec, "can", out, splits=mvtec)
    shutil.rmtree(real_iad / "realiad_jsons")
    with pytest.raises(FileNotFoundError, match="unpack realiad_jsons beside realiad_1024"):
        convert_toy(real_iad, out)
    assert not out.exists()
