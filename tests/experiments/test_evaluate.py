"""Exported maps have the official layout and give the recorded metrics."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffad_lite.cli.main import main
from diffad_lite.core.files import read_json
from diffad_lite.data.readers import READERS
from diffad_lite.evaluation.metrics import pixel_metrics
from diffad_lite.evaluation.records import PIXEL_METRICS
from diffad_lite.experiments.evaluate import pretrained_or_train
from diffad_lite.experiments.run import Run


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Write the synthetic scene as a folder in MVTec layout, at another size than the methods'."""
    root = tmp_path_factory.mktemp("mvtec")
    source, rng = READERS["shapes"](None, None), np.random.default_rng(0)
    for name, pixels in source.normals.items():
        part = "test" if rng.random() < 0.2 else "train"
        save(root / "disc" / part / "good" / f"{Path(name).stem}.png", pixels[0])
    for name, (pixels, kind, mask) in source.test.items():
        save(root / "disc" / "test" / kind / f"{Path(name).stem}.png", pixels[0])
        path = root / "disc" / "ground_truth" / kind / f"{Path(name).stem}_mask.png"
        save(path, mask.astype(np.uint8) * 255)
    return root


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def test_without_a_data_folder_a_notebook_trains_and_says_why(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFAD_DATA", str(tmp_path / "gone"))
    run = Run("pca", "shapes", image_size=16)
    with pytest.warns(UserWarning, match="no bundled weights, so pca trains: no data folder at"):
        method = pretrained_or_train(run, run.load_data(), out_dir=tmp_path)
    assert method.threshold_ is not None


def test_exported_maps_give_the_recorded_metrics(tree, tmp_path):
    run = ["--method", "pca", "--dataset", "folder", "--root", tree, "--category", "disc"]
    command = ["evaluate", *run, "--image-size", 32, "--maps", "--out", tmp_path]
    assert main([str(word) for word in command]) == 0
    result = read_json(tmp_path / "result.json", "result")
    masks, maps = [], []
    for path in sorted((tmp_path / "maps" / "disc" / "test").rglob("*.tiff")):
        kind, image = path.parent.name, path.name.removesuffix(".tiff").removesuffix(".png")
        with Image.open(path) as file:
            maps.append(np.asarray(file))
        assert maps[-1].dtype == np.float32
        mask = tree / "disc" / "ground_truth" / kind / f"{image}_mask.png"
        masks.append(np.zeros(maps[-1].shape, bool))
        if mask.exists():
            with Image.open(mask) as file:
                masks[-1] = np.asarray(file) > 127
    assert len(maps) == result["n_test"]
    assert sum(mask.any() for mask in masks) == len(READERS["shapes"](None, None).test)
    again = pixel_metrics(masks, maps)
    for name in PIXEL_METRICS:
        assert again[name] == pytest.approx(result[name], abs=1e-6)
    data = Run("pca", "folder", "disc", str(tree), image_size=32).load_data()
    assert {m.shape for m in maps} == set(data.original_sizes)
