"""Your own images without labels: the survey's warnings, shifts, scoring a folder."""

import csv
import errno
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffad_lite.cli.main import main
from diffad_lite.data.images import list_images
from diffad_lite.experiments.evaluate import bundled_checkpoint, evaluate, train
from diffad_lite.experiments.run import Run
from diffad_lite.experiments.unlabelled import find_shifts, read_images, score_folder, survey


def write(folder: Path, n: int, *, offset: int = 0, size=(20, 24), seed: int = 0) -> list[Path]:
    """Write smooth grey images with a little noise; ``size`` is (height, width)."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    ramp = np.linspace(60, 120, size[1])[None] + np.zeros((size[0], 1))
    for i in range(n):
        pixels = (ramp + offset + rng.normal(0, 4, size)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03d}.png")
    return list_images(folder)


def warnings_of(paths: list[Path]) -> str:
    return "\n".join(survey(paths).warnings())


def test_a_good_folder_has_no_warnings(tmp_path):
    result = survey(write(tmp_path, 60))
    assert result.warnings() == []
    assert len(result.names) == 60
    assert set(result.sizes) == {(20, 24)}
    assert result.looks["brightness"].mean() == pytest.approx(90, abs=2)


def test_each_fault_is_named_with_its_files(tmp_path):
    paths = write(tmp_path, 60)
    (tmp_path / "007.png").write_bytes((tmp_path / "003.png").read_bytes())
    (tmp_path / "008.png").write_text("no image")
    Image.new("L", (24, 20), 250).save(tmp_path / "009.png")
    Image.new("RGB", (24, 20), (90, 90, 90)).save(tmp_path / "010.png")
    warnings = warnings_of(paths)
    assert "1 files cannot be read: cannot read" in warnings
    assert "008.png" in warnings
    assert "such as 007.png of 003.png" in warnings
    assert "outliers in brightness, such as 009.png" in warnings
    assert "58 images are grey and 1 in colour" in warnings


def test_few_images_and_mixed_shapes_are_named(tmp_path):
    write(tmp_path, 10)
    Image.new("L", (60, 20), 90).save(tmp_path / "wide.png")
    warnings = warnings_of(list_images(tmp_path))
    assert "only 11 images; below 50 the model may memorise them" in warnings
    assert "width / height goes from 1.20 to 3.00" in warnings
    assert survey([]).warnings()[0].startswith("only 0 images")


def test_what_all_new_images_share_is_a_shift(tmp_path):
    normal, alike = survey(write(tmp_path / "a", 30)), survey(write(tmp_path / "b", 30, seed=1))
    brighter = survey(write(tmp_path / "c", 30, offset=40, seed=2))
    assert find_shifts(normal, alike) == []
    (shift,) = find_shifts(normal, brighter)
    assert shift.startswith("the new images are brighter than the normal ones in 100%")
    assert find_shifts(brighter, normal)[0].startswith("the new images are darker")
    assert find_shifts(normal, survey([])) == []


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    write(root / "good", 40)
    run = Run("pca", "folder", "good", str(root), image_size=16, resize="pad")
    return train(run, run.load_data(), root / "run", progress=False), root


def test_a_folder_without_labels_is_scored(trained, tmp_path, capsys):
    method, root = trained
    write(tmp_path / "new", 6, seed=5)
    bad = np.asarray(Image.open(tmp_path / "new" / "004.png")).copy()
    bad[5:12, 8:16] = 255
    Image.fromarray(bad).save(tmp_path / "new" / "004.png")
    command = ["--checkpoint", root / "run/checkpoint", "--images", tmp_path / "new"]
    assert main(["score", *map(str, command), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr()
    assert "ALARM  004.png" in printed.out
    assert "only" not in printed.err, "advice for training"
    with (tmp_path / "out" / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["file"] == "004.png"
    assert [float(r["image_score"]) for r in rows] == sorted(
        (float(r["image_score"]) for r in rows), reverse=True
    )
    for row in rows:
        above = float(row["image_score"]) > float(row["threshold"])
        assert row["alarm"] == str(int(above))
    pixels = np.asarray(Image.open(tmp_path / "out" / "maps" / "004.png.tiff"))
    assert pixels.shape == (20, 24)
    assert pixels.dtype == np.float32
    row, column = np.unravel_index(pixels.argmax(), pixels.shape)
    assert 3 <= row <= 14
    assert 6 <= column <= 18
    assert Image.open(tmp_path / "out" / "gallery.png").width > 100
    images = read_images(list_images(tmp_path / "new"), 1, 16, "pad")
    expected = method.predict(images).image_score.numpy()
    assert float(rows[0]["image_score"]) == pytest.approx(expected.max(), rel=1e-5)


def test_new_images_are_read_with_the_depth_of_the_training(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for i in range(40):
        pixels = rng.integers(2000, 3000, (20, 24)).astype(np.uint16)  # 12 bits
        folder = tmp_path / ("good" if i < 35 else "new")
        folder.mkdir(exist_ok=True)
        Image.fromarray(pixels if i < 35 else pixels // 4).save(folder / f"{i:02d}.png")
    run = Run("pca", "folder", "good", str(tmp_path), image_size=16)
    with pytest.warns(UserWarning, match="read with 12 bits"):
        method = train(run, run.load_data(), tmp_path / "run", progress=False)
    command = ["--checkpoint", tmp_path / "run/checkpoint", "--images", tmp_path / "new"]
    assert main(["score", *map(str, command), "--out", str(tmp_path / "out")]) == 0
    assert "read with 12 bits, 0 .. 4095" in capsys.readouterr().err
    with (tmp_path / "out" / "scores.csv").open() as file:
        scores = {row["file"]: float(row["image_score"]) for row in csv.DictReader(file)}
    images = read_images(list_images(tmp_path / "new"), 1, 16, "squash", bits=12)
    expected = method.predict(images).image_score.numpy()
    assert list(dict(sorted(scores.items())).values()) == pytest.approx(expected, rel=1e-4)
    with pytest.raises(ValueError, match="bits must be one of 8, 10, 12, 14, 16, got 'x'"):
        score_folder(method, tmp_path / "new", tmp_path / "out", bits="x")


def test_bad_folders_are_refused_and_leave_nothing(trained, tmp_path):
    method, _ = trained
    with pytest.raises(FileNotFoundError, match=r"no folder .*gone"):
        score_folder(method, tmp_path / "gone", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no images"):
        score_folder(method, tmp_path / "empty", tmp_path / "out")
    Image.new("RGB", (20, 20)).save(tmp_path / "empty" / "a.png")
    with pytest.raises(ValueError, match=r"a\.png has 3 channels, and the model is for 1"):
        score_folder(method, tmp_path / "empty", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_method_without_threshold_says_so(trained, tmp_path, monkeypatch):
    method, _ = trained
    write(tmp_path / "new", 2)
    monkeypatch.setattr(method, "threshold_", None)
    with pytest.raises(ValueError, match="no threshold yet"):
        score_folder(method, tmp_path / "new", tmp_path / "out")


def names_below(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_a_second_call_replaces_the_older_result_as_a_whole(trained, tmp_path):
    method, _ = trained
    write(tmp_path / "old", 4)
    write(tmp_path / "new", 2, seed=1)
    (tmp_path / "new" / "000.png").rename(tmp_path / "new" / "first.png")
    for name in ("old", "new"):
        score_folder(method, tmp_path / name, tmp_path / "out")
    maps = ["maps/001.png.tiff", "maps/first.png.tiff"]
    assert names_below(tmp_path / "out") == ["gallery.png", *maps, "scores.csv"]
    score_folder(method, tmp_path / "new", tmp_path / "fresh")
    for name in ("scores.csv", *maps):
        again, fresh = (tmp_path / out / name for out in ("out", "fresh"))
        assert again.read_bytes() == fresh.read_bytes()


@pytest.mark.parametrize("name", ["002.png.tiff", "gallery.png", "scores.csv"])
def test_a_full_disk_leaves_the_older_result_or_none(name, trained, tmp_path, monkeypatch, capsys):
    method, root = trained
    write(tmp_path / "old", 4)
    write(tmp_path / "new", 4, seed=1)
    out = tmp_path / "out"
    score_folder(method, tmp_path / "old", out)
    before = {p: (out / p).read_bytes() for p in names_below(out)}
    touch = Path.touch

    def full(path: Path, **options) -> None:
        if path.name.startswith(f".{name}."):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        touch(path, **options)

    monkeypatch.setattr(Path, "touch", full)
    command = ["score", "--checkpoint", root / "run/checkpoint", "--images", tmp_path / "new"]
    for target in (out, tmp_path / "none"):
        capsys.readouterr()
        assert main([*map(str, command), "--out", str(target)]) == 2
        path = target / "maps" / name if name.endswith(".tiff") else target / name
        assert f"diffad: {path}: the disk is full" in capsys.readouterr().err
    assert {p: (out / p).read_bytes() for p in names_below(out)} == before
    assert names_below(tmp_path / "none") == []


@pytest.mark.parametrize("inside", [".", "results"])
def test_results_do_not_go_among_the_images(inside, trained, tmp_path):
    method, _ = trained
    write(tmp_path / "new", 2)
    with pytest.raises(ValueError, match=r"lies in that of the images.*choose an output folder"):
        score_folder(method, tmp_path / "new", tmp_path / "new" / inside)
    assert names_below(tmp_path) == ["new/000.png", "new/001.png"]


def test_a_folder_called_maps_that_is_not_ours_is_kept(trained, tmp_path):
    method, root = trained
    write(tmp_path / "new", 2)
    (tmp_path / "maps").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "maps" / "world.tiff")
    with pytest.raises(ValueError, match=r"world\.tiff is no map of an earlier call"):
        score_folder(method, tmp_path / "new", tmp_path)
    assert (tmp_path / "maps" / "world.tiff").exists()
    run = Run("pca", "folder", "good", str(root), image_size=16, resize="pad", plant="cells")
    with pytest.raises(ValueError, match=r"world\.tiff is no map of an earlier call"):
        evaluate(run, tmp_path)
    evaluate(run, tmp_path / "run")
    with pytest.raises(ValueError, match=r"run holds an evaluated run, whose scores\.csv"):
        score_folder(method, tmp_path / "new", tmp_path / "run")


def test_images_in_sub_folders_are_named_and_not_scored(trained, tmp_path):
    method, _ = trained
    write(tmp_path / "new", 3)
    write(tmp_path / "new" / "camera", 2)
    with pytest.warns(UserWarning, match=r"2 images in sub-folders are not scored, e\.g\. .*000"):
        rows = score_folder(method, tmp_path / "new", tmp_path / "out")
    assert len(rows) == 3


def test_images_that_cannot_be_read_are_named_and_the_others_scored(trained, tmp_path, capsys):
    _, root = trained
    write(tmp_path / "new", 6, seed=5)
    command = ["score", "--checkpoint", root / "run/checkpoint", "--images", tmp_path / "new"]
    assert main([*map(str, command), "--out", str(tmp_path / "whole")]) == 0
    Image.new("RGB", (24, 20)).save(tmp_path / "new" / "002.png")
    (tmp_path / "new" / "004.png").write_text("no image")
    capsys.readouterr()
    assert main([*map(str, command), "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert "2 of 6 images are not scored: 002.png, 004.png; the first, because " in said
    assert "002.png has 3 channels, and the model is for 1" in said
    whole, rest = (
        list(csv.reader((tmp_path / out / "scores.csv").open())) for out in ("whole", "out")
    )
    assert rest == [row for row in whole if row[0] not in ("002.png", "004.png")]
    assert len(names_below(tmp_path / "out" / "maps")) == 4


def test_the_checkpoint_is_a_folder_that_of_a_run_or_bundled(trained, tmp_path, capsys):
    _, root = trained
    write(tmp_path / "new", 3)
    bundled = ["bundled", "--method", "anoddpm"]
    named = {
        "run": [str(root / "run")],
        "checkpoint": [str(root / "run" / "checkpoint")],
        "bundled": [*bundled, "--dataset", "elpv", "--category", "mono"],
        "default": bundled,
        "folder": [str(bundled_checkpoint("anoddpm", "elpv", "mono"))],
    }
    tables = {}
    for name, words in named.items():
        command = ["score", "--images", str(tmp_path / "new"), "--out", str(tmp_path / name)]
        assert main([*command, "--checkpoint", *words]) == 0
        tables[name] = (tmp_path / name / "scores.csv").read_text()
    assert tables["run"] == tables["checkpoint"]
    assert tables["bundled"] == tables["default"] == tables["folder"]
    capsys.readouterr()
    for words, message in (
        (["bundled"], "--method is missing; 'diffad methods' lists them"),
        (
            ["bundled", "--method", "pca"],
            "no weights are bundled for elpv-mono-pca, only for: elpv",
        ),
        ([str(root / "run"), "--category", "mono"], "choose among bundled checkpoints; leave them"),
    ):
        assert main([*command, "--checkpoint", *words]) == 2
        assert message in capsys.readouterr().err
