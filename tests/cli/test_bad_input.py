"""Bad input to the command: one line with what, where and the fix; exit code 2; nothing left.

Here stands what a user of ``diffad`` sees. The same refusals, seen from Python, are tested where
each of them is made.
"""

import errno
import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from diffad_lite.cli.main import main
from diffad_lite.core import files
from diffad_lite.data import images
from diffad_lite.data.images import read_image
from diffad_lite.methods.base import METHODS

SIDE = 16
FOLDER = ("--dataset", "folder", "--image-size", str(SIDE), "--profile", "ci", "--quiet")
as_root = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read and write everything"
)


def picture(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(60, 200, shape or (SIDE, SIDE), dtype=np.uint8)


def save(path: Path, pixels: np.ndarray, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """24 + 20 + 3 normal images and 3 with a hole and its mask, in MVTec's layout."""
    base = tmp_path_factory.mktemp("made") / "plate"
    for part, count in (("train", 24), ("calibration", 20), ("test", 3)):
        for i in range(count):
            save(base / part / "good" / f"{i:02d}.png", picture(len(part) * 100 + i))
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[4:9, 4:9] = 255
    for i in range(3):
        holed = np.where(mask > 0, 0, picture(i))
        save(base / "test" / "hole" / f"{i}.png", holed)
        save(base / "ground_truth" / "hole" / f"{i}_mask.png", mask)
    return base


@pytest.fixture
def plate(made, tmp_path) -> Path:
    """A copy to break."""
    return shutil.copytree(made, tmp_path / "plate")


@pytest.fixture(scope="module")
def trained(made, tmp_path_factory) -> Path:
    """The folder of a finished run of pca on ``made``."""
    out = tmp_path_factory.mktemp("trained") / "run"
    arguments = ["evaluate", "--method", "pca", *FOLDER, "--root", str(made), "--out", str(out)]
    assert main(arguments) == 0
    return out


def files_in(folder: Path) -> dict[str, bytes]:
    """Name -> content of everything below a folder, hidden and temporary files as well."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes() if p.is_file() else b"").digest()
        for p in folder.rglob("*")
    }


@pytest.fixture
def refused(tmp_path, capsys, monkeypatch) -> Callable[..., str]:
    """Calls ``diffad``, which must say one line, exit with 2, and leave all files as they are."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> str:
        before = files_in(tmp_path)
        capsys.readouterr()
        try:
            code = main([str(a) for a in arguments])
        except SystemExit as stop:  # argparse's way
            code = stop.code
        said = capsys.readouterr().err
        assert code == 2, said
        assert said.startswith("diffad: ")
        assert said.count("\n") == 1, said
        assert said.endswith("\n")
        assert files_in(tmp_path) == before, "something was changed or left behind"
        return said

    return call


def evaluate(root: Path, *more: object, method: str = "pca", out: str = "out") -> list[object]:
    return ["evaluate", "--method", method, *FOLDER, "--root", root, "--out", out, *more]


# ------------------------------------------------------------------------------------- data


def png(width: int, height: int) -> bytes:
    """The beginning of a grey PNG that claims to be so large."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0"))


def cut(path: Path, share: float = 0.6) -> None:
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def only_defects(base: Path) -> None:
    for part in ("train", "calibration", "test/good"):
        shutil.rmtree(base / part)


def no_normals(base: Path) -> None:
    for path in (base / "train/good").iterdir():
        path.unlink()


def to_file(base: Path) -> None:
    shutil.rmtree(base)
    base.write_text("not a folder")


def emptied(base: Path) -> None:
    shutil.rmtree(base)
    base.mkdir()


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def broken_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("gone.png")


FIRST, HOLE, MASK = "train/good/00.png", "test/hole/1.png", "ground_truth/hole/1_mask.png"
REPAIR = "repair or remove it"
BAD_DATA = {
    "missing folder": (shutil.rmtree, "plate does not exist", "--root takes a folder"),
    "a file": (to_file, "plate is a file", "--root takes a folder"),
    "empty folder": (emptied, "plate has neither train/good", "put normal images there"),
    "no training folder": (only_defects, "plate has neither train/good", "put normal images"),
    "no normal images": (no_normals, "train/good holds no images", "put normal images there"),
    "text": (lambda b: (b / FIRST).write_text("hello"), f"{FIRST} as an image", REPAIR),
    "no bytes": (lambda b: (b / FIRST).write_bytes(b""), f"{FIRST} as an image", REPAIR),
    "truncated": (lambda b: cut(b / HOLE), f"{HOLE} as an image", REPAIR),
    "a directory": (lambda b: directory(b / FIRST), f"{FIRST} as an image (Is a", REPAIR),
    "broken link": (lambda b: broken_link(b / FIRST), f"no image at {{}}/{FIRST}", REPAIR),
    "too many pixels": (lambda b: (b / HOLE).write_bytes(png(20000, 20000)), HOLE, "exceeds"),
    "mask of another size": (
        lambda b: save(b / MASK, picture(0, 8, 9)),
        "the mask of hole/1 is 9x8 pixels, its image 16x16",
        MASK,
    ),
    "corrupt mask": (lambda b: (b / MASK).write_bytes(b"\x89PNG"), f"{MASK} as an image", REPAIR),
    "truncated mask": (lambda b: cut(b / MASK, 0.5), f"{MASK} as an image", REPAIR),
}


@pytest.mark.parametrize("fault", BAD_DATA)
def test_data_that_cannot_be_used(fault, plate, refused):
    damage, where, fix = BAD_DATA[fault]
    damage(plate)
    said = refused(*evaluate(plate))
    assert where.format(plate) in said
    assert str(plate) in said
    assert fix in said


def test_a_line_break_in_a_name_stays_in_one_line(plate, refused):
    (plate / "train" / "good" / "a\nb.png").write_text("no image")
    assert "a b.png as an image" in refused(*evaluate(plate))


@as_root
@pytest.mark.parametrize("name", [FIRST, "train/good"])
def test_what_may_not_be_read(name, plate, tmp_path, capsys):
    (plate / name).chmod(0)
    try:
        code = main([str(a) for a in evaluate(plate, out=tmp_path / "out")])
    finally:
        (plate / name).chmod(0o755)
    said = capsys.readouterr().err
    assert code == 2
    assert said.startswith(f"diffad: {plate / name}: permission denied; change its permissions")
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_image_that_may_not_be_read(plate, refused, monkeypatch):
    """The same for root, who may read everything."""

    def forbid(path, **options):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(images.Image, "open", forbid)
    monkeypatch.setattr(images, "_cache", images._Cache())
    said = refused(*evaluate(plate))
    assert f"{plate}/train/good/00.png: permission denied; change its permissions" in said


def test_planting_names_the_image_that_is_too_small(plate, refused):
    save(plate / "test" / "good" / "00.png", picture(0, 1, 1))
    said = refused(*evaluate(plate, "--plant", "lesions"))
    assert "good/00: " in said
    assert "use a larger image" in said


# --------------------------------------------------------------------------- data that works


def test_odd_images_are_read_without_a_word(tmp_path):
    colour, grey = picture(1, 6, 5, 3), picture(2, 6, 5)
    palette = Image.fromarray(colour).quantize(8)
    plain = np.asarray(palette.convert("RGB")).transpose(2, 0, 1)
    palette.save(tmp_path / "palette.png")
    palette.save(tmp_path / "transparent.png", transparency=bytes([0, 80, 255]))  # by entry
    palette.save(tmp_path / "keyed.png", transparency=1)
    save(tmp_path / "rgba.png", np.dstack([colour, grey]))
    save(tmp_path / "deep.png", grey.astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: to be shown a quarter turn clockwise
    save(tmp_path / "turned.jpg", grey, exif=exif, quality=100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("palette", "transparent", "keyed"):
            np.testing.assert_array_equal(read_image(tmp_path / f"{name}.png"), plain)
        np.testing.assert_array_equal(read_image(tmp_path / "rgba.png"), colour.transpose(2, 0, 1))
        np.testing.assert_array_equal(read_image(tmp_path / "deep.png"), grey[None])
        turned = read_image(tmp_path / "turned.jpg")
    assert turned.shape == (1, 5, 6)
    assert np.abs(turned[0].astype(int) - np.rot90(grey, -1)).max() <= 4  # JPEG's loss


@pytest.mark.parametrize("resize", ["squash", "pad"])
def test_extreme_sizes_and_a_missing_mask_are_scored(plate, resize, tmp_path, capsys):
    sizes = {"00": (1, 1), "01": (3000, 20), "02": (20, 3000)}
    for name, size in sizes.items():
        save(plate / "test" / "good" / f"{name}.png", picture(0, *size))
        save(plate / "test" / "hole" / f"{name}.png", picture(1, *size))
        mask = np.zeros(size, np.uint8)
        mask[:1, :7] = 255
        save(plate / "ground_truth" / "hole" / f"{name}_mask.png", mask)
    (plate / MASK).unlink()
    save(plate / "train" / "good" / "00.png", picture(3, 3000, 20, 4))  # and one in colour
    options = ("--resize", resize, "--maps")
    assert main([str(a) for a in evaluate(plate, *options, out=tmp_path / "out")]) == 0
    colour, transparent, unmasked, large = capsys.readouterr().err.splitlines()
    assert colour.startswith("diffad: warning: 1 of 53 images have 3 channels, e.g. train/00")
    assert "1 image with transparency, e.g. " in transparent
    assert "1 of 6 anomalous images have no mask, or an empty one (0), e.g. hole/1;" in unmasked
    assert "1 mask covering more than half of the image, e.g. hole/00 (100%)" in large
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert (result["n_test"], result["n_anomalous"]) == (9, 6)
    for metric in ("image_auroc", "pixel_auroc", "aupro"):
        assert 0 <= result[metric] <= 1
    for kind in ("good", "hole"):
        for name, (height, width) in sizes.items():
            maps = tmp_path / "out" / "maps" / "plate" / "test" / kind
            with Image.open(maps / f"{name}.tiff") as image:
                assert image.size == (width, height)


def test_without_any_mask_images_are_still_scored(plate, tmp_path, capsys):
    shutil.rmtree(plate / "ground_truth")
    assert main([str(a) for a in evaluate(plate, out=tmp_path / "out")]) == 0
    assert capsys.readouterr().err == ""
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert 0 <= result["image_auroc"] <= 1
    assert result["pixel_auroc"] is None


# ---------------------------------------------------------------------------------- tensors


def spoilt(change: Callable[[torch.Tensor], object]) -> torch.Tensor:
    tensor = torch.rand(8, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    change(tensor[5])
    return tensor


BAD_TENSORS = {
    "nan": (lambda: spoilt(lambda t: t[0, 3].fill_(torch.nan)), "image 5 contains NaN"),
    "double": (lambda: spoilt(lambda t: t).double(), "expected float32, got torch.float64"),
    "infinity": (lambda: spoilt(lambda t: t[0, 3].fill_(-torch.inf)), "image 5 contains NaN or in"),
    "range": (lambda: spoilt(lambda t: t.mul_(255)), "scale uint8 images by x / 127.5 - 1"),
    "channels": (lambda: torch.zeros(8, 3, SIDE, SIDE), "expected (N, 1, H, W), got (8, 3, 16"),
    "axes": (lambda: torch.zeros(8, SIDE, SIDE), "expected (N, 1, H, W), got (8, 16, 16)"),
}


@pytest.mark.parametrize("fault", BAD_TENSORS)
def test_tensors_are_refused_before_anything_changes(fault):
    make, message = BAD_TENSORS[fault]
    good, bad = spoilt(lambda t: None), make()
    cls = METHODS["mean_image"]
    method = cls(cls.Config(image_size=SIDE, quantile=0.5)).fit(good, good.flip(-1), seed=0)
    threshold, scores = method.threshold_, method.predict(good).image_score
    calls = {
        "train": lambda: method.fit(bad, good, seed=0),
        "calibration": lambda: method.fit(good, bad, seed=0),
        "calibration: ": lambda: method.calibrate(bad),
        "images": lambda: method.predict(bad),
    }
    for what, call in calls.items():
        with pytest.raises(ValueError) as caught:
            call()
        assert str(caught.value).startswith(what)
        assert message in str(caught.value)
    assert method.threshold_ == threshold
    assert torch.equal(method.predict(good).image_score, scores)


# ------------------------------------------------------------------------------ checkpoints


def edit(name: str, change: Callable[[dict], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        values = json.loads((folder / name).read_text())
        change(values)
        (folder / name).write_text(json.dumps(values))

    return apply


def edit_tensors(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return apply


def write(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


CONFIG, MODEL, ANEW = "config.json", "model.safetensors", "delete {} and train anew"
CHECKPOINT = "give the folder 'checkpoint' of a run"
BAD_CHECKPOINTS = {
    "gone": (shutil.rmtree, f"no checkpoint's config.json at {{}}/{CONFIG}", CHECKPOINT),
    "a file": (to_file, f"no checkpoint's config.json at {{}}/{CONFIG}", CHECKPOINT),
    "empty": (emptied, f"no checkpoint's config.json at {{}}/{CONFIG}", CHECKPOINT),
    "weights alone": (lambda f: (f / CONFIG).unlink(), f"at {{}}/{CONFIG}", CHECKPOINT),
    "configuration alone": (lambda f: (f / MODEL).unlink(), f"no weights at {{}}/{MODEL}", ANEW),
    "truncated": (lambda f: cut(f / MODEL), f"{{}}/{MODEL} is broken or truncated", ANEW),
    "no bytes": (lambda f: (f / MODEL).write_bytes(b""), f"{MODEL} is broken or trunc", ANEW),
    "weights a directory": (lambda f: directory(f / MODEL), f"{MODEL} is broken", ANEW),
    "half a tensor": (
        edit_tensors(lambda t: t.update({"network.mean": t["network.mean"][:9].clone()})),
        "{} does not fit its configuration: size mismatch for mean",
        ANEW,
    ),
    "missing tensor": (edit_tensors(lambda t: t.pop("network.mean")), "Missing key(s) in", ANEW),
    "half of the statistics": (edit_tensors(lambda t: t.pop("map_std")), "only one of", ANEW),
    "not json": (write(CONFIG, '{\n"a'), f"{{}}/{CONFIG} is not a readable checkpoint's", ANEW),
    "a list": (write(CONFIG, "[1]"), f"{{}}/{CONFIG} lacks 'method' or 'config'", ANEW),
    "a word": (write(CONFIG, '"pca"'), f"{CONFIG} lacks 'method' or 'config'", ANEW),
    "no method": (edit(CONFIG, lambda v: v.pop("method")), f"{CONFIG} lacks 'method'", ANEW),
    "no configuration": (edit(CONFIG, lambda v: v.pop("config")), f"{CONFIG} lacks", ANEW),
    "null for it": (edit(CONFIG, lambda v: v.update(config=None)), f"{CONFIG} lacks", ANEW),
    "wrong reports": (edit(CONFIG, lambda v: v.update(reports={"a": 1})), "has them wrong", ANEW),
    "wrong type": (
        edit(CONFIG, lambda v: v["config"].update(smooth_sigma="x")),
        f"{{}}/{CONFIG}: PCAConfig.smooth_sigma must be a valid number, got 'x'",
        ANEW,
    ),
    "unknown field": (
        edit(CONFIG, lambda v: v["config"].update(smoth=1)),
        f"{{}}/{CONFIG}: unknown PCAConfig field 'smoth'; known: ",
        ANEW,
    ),
    "another method": (
        edit(CONFIG, lambda v: v.update(method="mean_image")),
        "{} is a checkpoint of 'mean_image', not of 'pca'",
        "choose another one, or --method mean_image",
    ),
    "another seed": (edit(CONFIG, lambda v: v.update(seed=7)), "seed 7, not 0", "give the same"),
    "no fingerprint": (
        edit(CONFIG, lambda v: v.pop("fingerprint")),
        "{} was fitted on another split or data set (fingerprint None",
        "train on this data instead",
    ),
}


@pytest.mark.parametrize("fault", BAD_CHECKPOINTS)
def test_checkpoints_that_cannot_be_used(fault, made, trained, tmp_path, refused):
    damage, where, fix = BAD_CHECKPOINTS[fault]
    folder = shutil.copytree(trained / "checkpoint", tmp_path / "weights")
    damage(folder)
    said = refused(*evaluate(made, "--checkpoint", folder))
    assert where.format(folder) in said
    assert fix.format(folder) in said
    assert str(folder) in said


def test_a_checkpoint_of_other_data(plate, trained, refused):
    save(plate / "train" / "good" / "00.png", picture(999))
    said = refused(*evaluate(plate, "--checkpoint", trained / "checkpoint"))
    assert f"{trained}/checkpoint was fitted on another split or data set" in said
    assert "train on this data instead" in said


def test_a_folder_that_is_neither_a_checkpoint_nor_that_of_a_run(made, trained, refused):
    said = refused(*evaluate(made, "--checkpoint", trained.parent))
    assert f"no checkpoint's config.json at {trained.parent}/config.json; {CHECKPOINT}" in said


def test_weights_that_are_not_bundled(made, refused):
    said = refused(*evaluate(made, "--checkpoint", "bundled"))
    assert "no weights are bundled for folder-pca, only for: " in said
    assert "to train, leave --checkpoint out of 'evaluate'" in said


@pytest.mark.parametrize(
    ("name", "damage", "where", "fix"),
    [
        ("checkpoint", lambda f: (f / MODEL).unlink(), f"checkpoint/{MODEL}", "train anew"),
        ("checkpoint", write(CONFIG, "{"), f"checkpoint/{CONFIG} is not a read", "train anew"),
        ("checkpoint", write(CONFIG, "[]"), f"checkpoint/{CONFIG} lacks", "train anew"),
        ("state", write("training.json", "{"), "state/training.json is not a", "delete {}"),
        ("state", write("training.json", "[]"), "{} holds a training of another", "delete that"),
    ],
)
def test_a_broken_run_folder_is_not_gone_on_with(
    name, damage, where, fix, made, trained, tmp_path, refused
):
    folder = shutil.copytree(trained, tmp_path / "out") / name
    if name == "state":
        shutil.rmtree(tmp_path / "out" / "checkpoint")
    damage(folder)
    said = refused(*evaluate(made, out=tmp_path / "out"))
    assert where.format(folder) in said
    assert fix.format(folder) in said


NETWORK = ("base_channels=4", "channel_mults=[1]", "attention_levels=[]")
TINY = tuple(word for setting in NETWORK for word in ("--set", f"denoiser.{setting}"))


@pytest.mark.parametrize("size", [0, 1000])
def test_a_truncated_training_state(size, made, tmp_path, refused):
    train = ["train", "--method", "anoddpm", *FOLDER, *TINY, "--set", "denoiser.train.steps=2"]
    train += ["--root", str(made), "--out", str(tmp_path / "out")]
    assert main(train) == 0
    shutil.rmtree(tmp_path / "out" / "checkpoint")
    state = tmp_path / "out" / "state" / "diffusion.state.safetensors"
    state.write_bytes(state.read_bytes()[:size])
    said = refused(*train)
    assert f"{state} is broken" in said
    assert "delete it to start anew" in said
    state.unlink()
    assert main(train) == 0  # the advice helps


# ------------------------------------------------------------------------- names and numbers


@pytest.mark.parametrize(
    ("arguments", "what", "fix"),
    [
        (["--method", "pac"], "unknown method 'pac'", "did you mean 'pca'?"),
        (["--dataset", "foldr"], "unknown data set 'foldr'", "did you mean 'folder'?"),
        (["--category", "trian"], "unknown category in", "did you mean 'train'?"),
        (["--profile", "papr"], "Run.profile must be 'ci', 'lite' or 'paper'", "got 'papr'"),
        (["--plant", "lesion"], "unknown family of planted", "did you mean 'lesions'?"),
        (["--resize", "padd"], "Run.resize must be 'squash' or 'pad'", "got 'padd'"),
        (["--image-size", "0"], "image_size must be at least 8 pixels, got 0", "64 is usual"),
        (["--image-size", "-4"], "at least 8 pixels, got -4", "64 is usual"),
        (["--image-size", "1"], "at least 8 pixels, got 1", "64 is usual"),
        (["--image-size", "2"], "at least 8 pixels, got 2", "64 is usual"),
        (["--image-size", "big"], "argument --image-size: invalid int value: 'big'", "--help"),
        (["--max-minutes", "0"], "--max-minutes must be a number above 0, got 0", "leave it out"),
        (["--max-minutes", "-1"], "--max-minutes must be a number above 0", "leave it out"),
        (["--max-minutes", "nan"], "--max-minutes must be a number above 0", "leave it out"),
        (["--max-minutes", "inf"], "--max-minutes must be a number above 0", "leave it out"),
        (["--seed", "-1"], "seed must be at least 0, got -1", "at least 0"),
        (["--seed", str(2**64)], "seed must be less than 4294967296", "less than 4294967296"),
        (["--variant", "../raw"], "got '../raw'", "a name without slashes"),
        (["--plan", "x", "--sead", "3"], "unrecognized arguments: --sead 3", "--help"),
    ],
    ids=" ".join,
)
def test_names_and_numbers(arguments, what, fix, made, refused):
    said = refused(*evaluate(made, *arguments))
    assert what in said
    assert fix in said


def test_the_image_size_of_a_listing(refused):
    said = refused("datasets", "--dataset", "shapes", "--image-size", "0")
    assert "at least 8 pixels, got 0" in said


@pytest.mark.parametrize(
    ("assignment", "what", "fix"),
    [
        ("smoothsigma=1", "unknown field 'smoothsigma'", "did you mean 'smooth_sigma'?"),
        ("train.stepz=1", "unknown field 'train.stepz'", "did you mean 'denoiser.train.steps'?"),
        (
            "denoiser.trian.steps=1",
            "unknown field 'denoiser.trian.steps'",
            "'denoiser.train.steps'?",
        ),
        ("steps.more=1", "unknown field 'steps.more'", "known: calibrate"),
        ("denoiser=1", "denoiser is a group of fields", "set one of them: denoiser.beta_schedule"),
        ("steps", "got 'steps'", "--set must be KEY=VALUE"),
        ("=3", "unknown field ''", "known: "),
        ("noise_level=high", "AnoDDPMConfig.noise_level", "must be a valid integer, got 'high'"),
        ("noise_level=2.5", "AnoDDPMConfig.noise_level", "must be a valid integer, got 2.5"),
        ("noise_level=null", "AnoDDPMConfig.noise_level", "must be a valid integer, got None"),
        ("calibrate=1", "AnoDDPMConfig.calibrate", "must be a valid boolean, got 1"),
        (
            "denoiser.channel_mults=2",
            "AnoDDPMConfig.denoiser.channel_mults",
            "must be a list, got 2",
        ),
        ("denoiser.train.flip_axes=[1]", "train.flip_axes.0", "must be at most -1, got 1"),
        ("smooth_sigma=NaN", "AnoDDPMConfig.smooth_sigma", "must be a finite number, got nan"),
        ("denoiser.beta_schedule=square", "beta_schedule", "must be 'linear', 'cosine' or 'scaled"),
        ("denoiser.train.steps=0", "denoiser.train.steps", "must be at least 1, got 0"),
        ("denoiser.train.batch_size=-2", "train.batch_size", "must be at least 1, got -2"),
        ("denoiser.train.learning_rate=-1", "train.learning_rate", "must be at least 0, got -1"),
        ("denoiser.train.ema_decay=1.5", "train.ema_decay", "must be at most 1, got 1.5"),
        ("denoiser.base_channels=0", "base_channels", "must be at least 1, got 0"),
        ("denoiser.channel_mults=[]", "channel_mults", "must not be empty, got"),
        ("denoiser.unshuffle=0", "unshuffle", "must be at least 1, got 0"),
        ("quantile=2", "quantile", "must be at most 0.999, got 2"),
        ("top_fraction=0", "top_fraction", "must be at least 0.000001, got 0"),
        ("smooth_sigma=-1", "smooth_sigma", "must be at least 0, got -1"),
        ("n_noises=0", "AnoDDPMConfig.n_noises", "must be at least 1, got 0"),
        ("noise_level=1000", "AnoDDPMConfig.noise_level", "must be at most 999, got 1000"),
        ("steps=0", "AnoDDPMConfig.steps", "must be at least 1, got 0"),
    ],
)
def test_settings(assignment, what, fix, made, refused):
    said = refused(*evaluate(made, "--set", assignment, method="anoddpm"))
    assert what in said
    assert fix in said


@pytest.mark.parametrize(
    ("method", "assignment", "what"),
    [
        ("pca", "n_components=0", "PCAConfig.n_components must be at least 1, got 0"),
        ("anoddpm_simplex", "octaves=0", "AnoDDPMSimplexConfig.octaves must be at least 1, got 0"),
        ("padim", "grid=0", "PaDiMConfig.grid must be at least 1, got 0"),
        ("padim", "n_dims=0", "PaDiMConfig.n_dims must be at least 1, got 0"),
        ("padim", 'backbone="resnet81"', "unknown backbone 'resnet81'; did you mean 'resnet18'"),
        ("bank", "input_size=8", "BankConfig.input_size must be at least 32, got 8"),
        ("bank", "bank_size=0", "BankConfig.bank_size must be at least 1, got 0"),
        ("bank", 'layers=["99"]', "unknown block of efficientnet_lite0 '99'"),
    ],
)
def test_settings_of_other_methods(method, assignment, what, made, refused):
    assert what in refused(*evaluate(made, "--set", assignment, method=method))


# ---------------------------------------------------------------------------- output folders


@pytest.mark.parametrize("inside", ["", "deeper", "state"])
def test_an_output_folder_that_is_a_file(inside, made, tmp_path, refused):
    blocked = tmp_path / ("out/state" if inside == "state" else "file")
    blocked.parent.mkdir(exist_ok=True)
    blocked.write_text("keep me")
    out = blocked.parent if inside == "state" else blocked / inside
    said = refused(*evaluate(made, out=out))
    assert f"{blocked} is a file, not a folder; choose another output folder" in said
    assert blocked.read_text() == "keep me"


@pytest.mark.parametrize("command", ["train", "sweep", "notebooks", "datasets"])
def test_every_command_refuses_a_file_for_a_folder(command, made, tmp_path, refused):
    (tmp_path / "file").write_text("keep me")
    (tmp_path / "grid.yaml").write_text("{methods: [pca], data: [{dataset: shapes}]}")
    notebook(tmp_path / "lessons" / "01_a.ipynb", "x = 1")
    out = tmp_path / "file"
    arguments = {
        "train": ["train", "--method", "pca", *FOLDER, "--root", made, "--out", out],
        "sweep": ["sweep", tmp_path / "grid.yaml", "--out", out],
        "notebooks": ["notebooks", "--folder", tmp_path / "lessons", "--out", out],
        "datasets": ["datasets", *FOLDER[:4], "--root", made, "--sheet", out / "sheet.png"],
    }
    said = refused(*arguments[command])
    assert f"{out} is a file, not a folder; choose another output folder" in said


@as_root
def test_an_output_folder_that_cannot_be_written(made, tmp_path, refused):
    (tmp_path / "locked").mkdir(mode=0o555)
    said = refused(*evaluate(made, out=tmp_path / "locked" / "out"))
    assert f"{tmp_path}/locked cannot be written; choose another output folder" in said


def test_an_output_folder_that_the_system_refuses(made, tmp_path, refused, monkeypatch):
    """The same for root, who may write everything."""
    monkeypatch.setattr(files.os, "access", lambda path, mode: False)
    said = refused(*evaluate(made, out=tmp_path / "out"))
    assert f"{tmp_path} cannot be written; choose another output folder" in said


# ------------------------------------------------------------------ grids, reports, notebooks

GRID = "methods: [pca]\ndata: [{dataset: shapes, image_size: 16}]\nprofile: ci\n"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (b"methods: [pca", "is not valid YAML: while parsing"),
        (b"\xff\xfe\x00", "is not valid YAML: 'utf-8' codec"),
        (b"", "must be a mapping with the keys profile, methods"),
        (b"method: [pca]", "unknown key in {} 'method'; did you mean 'methods'?"),
        (b"methods: [pca]", "{} names no data; add them"),
        (GRID.replace("image_size", "size").encode(), "unknown key of data in {} 'size'"),
        (GRID.replace("[pca]", "pca").encode(), "{}: methods must be a list, got 'pca'"),
        (GRID.replace("16", "big").encode(), "{}: image_size must be a valid integer, got 'big'"),
        ((GRID + "seeds: 3").encode(), "{}: seeds must be a list, got 3"),
        ((GRID + "seeds: [a]").encode(), "{}: seeds.0 must be a valid integer, got 'a'"),
        ((GRID + "seeds: [-1]").encode(), "seed must be at least 0, got -1"),
        ((GRID + "plants: cells").encode(), "{}: plants must be a list, got 'cells'"),
        ((GRID + "variants: [raw]").encode(), "{}: variants must be a mapping, got ['raw']"),
        ((GRID + "variants: {raw: 3}").encode(), "{}: variants.raw must be a mapping, got 3"),
    ],
)
def test_grids(text, what, tmp_path, refused):
    path = tmp_path / "grid.yaml"
    path.write_bytes(text)
    assert what.format(path) in refused("sweep", path, "--out", "out")


def test_a_grid_that_is_not_there(tmp_path, refused):
    said = refused("sweep", tmp_path / "gone.yaml", "--out", "out")
    assert f"no grid at {tmp_path}/gone.yaml; see data/grid.yaml" in said
    said = refused("sweep", tmp_path, "--out", "out")
    assert f"{tmp_path}: is a directory; check this path" in said


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ("variants: {raw: {calibrat: false}}", "unknown field 'calibrat'; did you mean 'calibrat"),
        ("variants: {raw: {calibrate: no idea}}", "PCAConfig.calibrate must be a valid boolean"),
        ("plants: [null, cell]", "unknown family of planted defects 'cell'; did you mean 'cells'?"),
        ("settings: {smooth: 1}", "unknown field 'smooth'; did you mean 'smooth_sigma'?"),
        ("variants: {few: {n_components: 2}}", "n_components cannot be changed on a trained model"),
        ("plants: [uncertain]", "disc has no images of uncertain label"),
    ],
)
def test_a_grid_that_cannot_be_scored_does_not_train_first(more, what, tmp_path, capsys):
    (tmp_path / "grid.yaml").write_text(GRID + more)
    assert main(["sweep", str(tmp_path / "grid.yaml"), "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "pca/shapes-16px/s0: ValueError: " in said
    assert what in said
    assert [p.name for p in (tmp_path / "out").rglob("*") if p.is_file()] == ["error.txt"]


def test_reports_without_results(tmp_path, refused):
    fix = "run 'diffad evaluate' first"
    for arguments in (["--results", "gone"], ["--runs", "gone", "--results", "copies"]):
        said = refused("report", *arguments)
        assert "gone has no records (no <grid>.jsonl in it" in said
        assert fix in said
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "result.json").write_text('{"metho')
    said = refused("report", "--results", tmp_path / "run")
    assert f"{tmp_path}/run/result.json is not a readable result" in said
    for text in ("[]", "{}"):
        (tmp_path / "run" / "result.json").write_text(text)
        said = refused("report", "--results", tmp_path / "run")
        assert f"{tmp_path}/run/result.json is no record of a run; delete it" in said


def test_a_report_into_a_document_that_is_not_there(trained, tmp_path, refused):
    results = shutil.copytree(trained, tmp_path / "results")
    said = refused("report", "--results", results, tmp_path / "gone.md")
    assert f"{tmp_path}/gone.md: no such file or directory; check this path" in said


def notebook(path: Path, *cells: str) -> None:
    """A notebook with a parameter ``profile``."""
    tags = [{"tags": ["parameters"]}] + [{}] * len(cells)
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    content = {
        "nbformat": 4,
        "nbformat_minor": 4,
        "metadata": {"kernelspec": kernel},
        "cells": [
            {
                "cell_type": "code",
                "source": s,
                "metadata": m,
                "outputs": [],
                "execution_count": None,
            }
            for s, m in zip(('profile = "lite"', *cells), tags, strict=True)
        ],
    }
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("arguments", "what", "fix"),
    [
        (["--only", "99"], "unknown notebook '99'", "known: 01_a"),
        (["--set", "profil=ci"], "unknown parameter 'profil'", "did you mean 'profile'?"),
        (["-p", "profil", "ci"], "unknown parameter 'profil'", "did you mean 'profile'?"),
        (["--set", "profile"], "--set must be KEY=VALUE, got 'profile'", "write it like --set"),
        (["--profile", "light"], "unknown profile 'light'", "did you mean 'lite'?"),
        (["--folder", "gone"], "no notebooks in gone", "run this in the repository's root"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_notebooks(arguments, what, fix, tmp_path, refused):
    notebook(tmp_path / "lessons" / "01_a.ipynb", "x = 1")
    said = refused("notebooks", "--folder", "lessons", "--out", "out", *arguments)
    assert what in said
    assert fix in said


@pytest.mark.parametrize("text", ["{", "{}", "text"])
def test_a_broken_notebook_is_named(text, tmp_path, refused):
    notebook(tmp_path / "lessons" / "01_a.ipynb", "x = 1")
    (tmp_path / "lessons" / "02_b.ipynb").write_text(text)
    said = refused("notebooks", "--folder", tmp_path / "lessons", "--out", "out")
    assert f"{tmp_path}/lessons/02_b.ipynb is not a notebook" in said
    assert "restore or remove it" in said


# ------------------------------------------------------------------------- from start to end


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ([], "train/good/00.png as an image (image file is truncated); repair or remove it"),
        (["--seed", "one"], "argument --seed: invalid int value: 'one'; see 'diffad evaluate --he"),
    ],
)
def test_from_start_to_end(arguments, what, plate, tmp_path):
    cut(plate / "train" / "good" / "00.png")
    command = [sys.executable, "-m", "diffad_lite.cli", *map(str, evaluate(plate, *arguments))]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("diffad: ")
    assert what in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
