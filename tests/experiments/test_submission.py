"""Files for the benchmark server of MVTec AD 2, from small synthetic private sets."""

import errno
import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from diffad_lite.cli.main import main
from diffad_lite.data.images import list_images
from diffad_lite.experiments.evaluate import train
from diffad_lite.experiments.quality import at_original_size
from diffad_lite.experiments.run import Run
from diffad_lite.experiments.submission import ENDINGS, N_IMAGES, export_submission
from diffad_lite.experiments.unlabelled import read_images
from diffad_lite.methods.base import Method

SIZE = (180, 240)  # height, width; a TIFF file of more than one strip
KINDS = {"anomaly_images": ".tiff", "anomaly_images_thresholded": ".png"}


def write(folder: Path, n: int, ending: str = "regular", seed: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(n):
        pixels = rng.normal(90, 8, SIZE).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03d}_{ending}.png")


def read_half(path: Path) -> np.ndarray:
    """Read a float16 TIFF (H, W) by its tags, as Pillow reads no such file."""
    content = path.read_bytes()
    tags = ImageFileDirectory_v2(content[:8])
    file = io.BytesIO(content)
    file.seek(tags.next)
    tags.load(file)
    assert content[:2] == b"II"  # little endian
    assert (tags[258], tags[339], tags[259]) == ((16,), (3,), 1)  # 16 bits, floats, uncompressed
    assert tags.get(277, 1) == 1  # one channel
    strips = zip(tags[273], tags[279], strict=True)
    pixels = b"".join(content[start : start + length] for start, length in strips)
    return np.frombuffer(pixels, "<f2").reshape(tags[257], tags[256])


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Method:
    root = tmp_path_factory.mktemp("images")
    write(root / "good", 20)
    run = Run("pca", "folder", "good", str(root), image_size=16, resize="pad")
    return train(run, run.load_data(), root / "run", progress=False)


@pytest.fixture
def method(trained, monkeypatch) -> Method:
    monkeypatch.setattr(trained, "pixel_threshold_", 0.05)
    return trained


@pytest.fixture
def can(tmp_path) -> Path:
    for seed, (name, ending) in enumerate(ENDINGS.items()):
        write(tmp_path / "mvtec_ad_2" / "can" / name, 3, ending, seed=10 + seed)
    return tmp_path / "mvtec_ad_2" / "can"


@pytest.fixture(autouse=True)
def small_sets(monkeypatch):
    monkeypatch.setitem(N_IMAGES, "can", 3)


def files_below(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_names_types_and_sizes_are_those_of_the_server(method, can, tmp_path, monkeypatch):
    maps = {}
    for name in ENDINGS:
        paths = list_images(can / name)
        low = method.predict(read_images(paths, 1, 16, "pad")).anomaly_map
        full = [at_original_size(m, SIZE, "pad", 16) for m in low]
        maps |= {(name, path.stem): m for path, m in zip(paths, full, strict=True)}
    threshold = float(np.median(np.stack(list(maps.values()))))
    monkeypatch.setattr(method, "pixel_threshold_", threshold)
    out = tmp_path / "out"
    fractions = export_submission(method, can, out, resize="pad")
    assert files_below(out) == sorted(
        f"{kind}/can/{name}/{i:03d}_{ending}{suffix}"
        for kind, suffix in KINDS.items()
        for name, ending in ENDINGS.items()
        for i in range(3)
    )
    for (name, stem), expected in maps.items():
        values = read_half(out / "anomaly_images" / "can" / name / f"{stem}.tiff")
        assert values.shape == SIZE
        assert np.array_equal(values, expected.astype(np.float16))
        image = Image.open(out / "anomaly_images_thresholded" / "can" / name / f"{stem}.png")
        assert image.mode == "L"
        assert np.array_equal(np.asarray(image), 255 * (expected > threshold))
    assert 0.3 < np.mean(list(fractions.values())) < 0.7
    assert set(fractions) == set(ENDINGS)


def test_values_beyond_float16_are_divided_by_one_constant(method, can, tmp_path, monkeypatch):
    predict = method.predict

    def large(images: torch.Tensor) -> object:
        prediction = predict(images)
        prediction.anomaly_map *= 1e7
        return prediction

    export_submission(method, can, tmp_path / "plain")
    monkeypatch.setattr(method, "predict", large)
    monkeypatch.setattr(method, "pixel_threshold_", method.pixel_threshold_ * 1e7)
    export_submission(method, can, tmp_path / "large")
    names = [name for name in files_below(tmp_path / "plain") if name.endswith(".tiff")]
    plain, scaled = (
        np.stack([read_half(tmp_path / folder / name) for name in names]).astype(float)
        for folder in ("plain", "large")
    )
    assert 0.9 < np.abs(scaled).max() / np.finfo(np.float16).max <= 1
    assert scaled == pytest.approx(plain * (scaled.max() / plain.max()), rel=2e-3, abs=10)
    for name in set(files_below(tmp_path / "plain")) - set(names):  # thresholded before
        expected = (tmp_path / "plain" / name).read_bytes()
        assert (tmp_path / "large" / name).read_bytes() == expected


def test_objects_add_to_a_submission_and_a_second_call_replaces(method, can, tmp_path, monkeypatch):
    monkeypatch.setitem(N_IMAGES, "vial", 3)
    vial = can.with_name("vial")
    can.rename(vial)
    export_submission(method, vial, tmp_path / "out")
    vial.rename(can)
    for seed in (1, 2):
        for name, ending in ENDINGS.items():
            write(can / name, 3, ending, seed=seed)
        export_submission(method, can, tmp_path / "out")
    export_submission(method, can, tmp_path / "fresh")
    assert len(files_below(tmp_path / "out")) == 24
    for name in files_below(tmp_path / "fresh"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "fresh" / name).read_bytes()


def test_the_command_reads_as_in_training(trained, can, tmp_path, capsys):
    trained.save_pretrained(tmp_path / "checkpoint", resize="pad", bits=None)
    command = ["export", "--checkpoint", tmp_path / "checkpoint", "--images", can, "--out"]
    assert main([*map(str, command), str(tmp_path / "out")]) == 0
    assert "test_private_mixed: " in capsys.readouterr().out
    export_submission(trained, can, tmp_path / "expected", resize="pad")
    for name in files_below(tmp_path / "expected"):
        expected = (tmp_path / "expected" / name).read_bytes()
        assert (tmp_path / "out" / name).read_bytes() == expected


def test_without_a_pixel_threshold_nothing_is_written(method, can, tmp_path, monkeypatch):
    monkeypatch.setattr(method, "pixel_threshold_", None)
    with pytest.raises(ValueError, match=r"no pixel threshold; call calibrate\(\)"):
        export_submission(method, can, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("no set", r"no folder .*test_private_mixed; give the folder of one object"),
        ("empty", r"test_private_mixed holds no images"),
        ("misnamed", r"7_mixed\.png is not named like 000_mixed\.png"),
        ("unreadable", r"cannot read .*001_mixed\.png"),
        ("colour", r"001_mixed\.png has 3 channels, and the model is for 1"),
        ("object", r"unknown object of MVTec AD 2.*'cna'; did you mean 'can'"),
    ],
)
def test_a_faulty_set_is_named_and_nothing_is_written(fault, message, method, can, tmp_path):
    folder = can / "test_private_mixed"
    if fault in ("no set", "empty"):
        for path in folder.iterdir():
            path.unlink()
    if fault == "no set":
        folder.rmdir()
    elif fault == "misnamed":
        (folder / "001_mixed.png").rename(folder / "7_mixed.png")
    elif fault == "unreadable":
        (folder / "001_mixed.png").write_text("no image")
    elif fault == "colour":
        Image.new("RGB", SIZE[::-1]).save(folder / "001_mixed.png")
    elif fault == "object":
        can = can.rename(can.with_name("cna"))
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        export_submission(method, can, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_incomplete_set_is_exported_with_a_warning(method, can, tmp_path):
    (can / "test_private" / "002_regular.png").unlink()
    with pytest.warns(UserWarning, match="test_private holds 2 images, and the server expects 3"):
        export_submission(method, can, tmp_path / "out")


def test_other_files_in_the_output_are_kept(method, can, tmp_path):
    note = tmp_path / "out" / "anomaly_images" / "can" / "test_private" / "note.txt"
    note.parent.mkdir(parents=True)
    note.write_text("keep me")
    with pytest.raises(ValueError, match=r"note\.txt is no map of an earlier call"):
        export_submission(method, can, tmp_path / "out")
    assert note.read_text() == "keep me"


def test_a_full_disk_leaves_the_older_submission(method, can, tmp_path, monkeypatch):
    out = tmp_path / "out"
    export_submission(method, can, out)
    before = {name: (out / name).read_bytes() for name in files_below(out)}
    write(can / "test_private", 3, seed=3)
    touch = Path.touch

    def full(path: Path, **options: bool) -> None:
        if path.name.startswith(".002_mixed.png."):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        touch(path, **options)

    monkeypatch.setattr(Path, "touch", full)
    with pytest.raises(OSError, match="No space left"):
        export_submission(method, can, out)
    assert {name: (out / name).read_bytes() for name in files_below(out)} == before
