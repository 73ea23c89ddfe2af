"""Time and memory of methods in one run: rounds, peak memory, skipped methods."""

import json

import pytest
import torch
from speed import SETTINGS, TensorsAlive, measure, measure_bundled

from diffad_lite.data.datasets import load_dataset
from diffad_lite.evaluation.records import read_speeds
from diffad_lite.evaluation.tables import speed_table
from diffad_lite.experiments.run import Run
from diffad_lite.methods.base import get_method


@pytest.fixture(scope="module")
def fitted():
    run = Run("pca", "shapes", image_size=16, profile="ci")
    data = run.load_data()
    method = get_method("pca")(run.configure(data))
    return method.fit(data.train, data.calibration, seed=0, progress=False), data.test_images


def test_memory_counts_tensors_that_exist_at_the_same_time():
    with TensorsAlive() as alive:
        kept = torch.zeros(1000)  # 4000 bytes
        for _ in range(5):
            torch.zeros(2000)  # 8000, freed at once
        view = kept.view(10, 100)  # no new memory
    assert alive.peak == 12_000
    assert alive.now == 4000
    del kept, view
    assert alive.now == 0


def test_each_round_times_every_method(fitted):
    method, images = fitted
    measured = measure({"first": method, "second": method}, images[:4], rounds=3)
    assert list(measured) == ["first", "second"]
    for entry in measured.values():
        assert len(entry["ms"]) == 3
        assert min(entry["ms"]) > 0
        assert entry["mb"] > images[:4].nbytes / 2**20  # residuals
        assert entry["evaluations"] == 0
    with pytest.raises(ValueError, match="rounds must be at least 1"):
        measure({"first": method}, images, rounds=0)


def test_available_methods_are_measured_and_written(tmp_path, monkeypatch):
    chosen = {name: SETTINGS[name] for name in ("pca", "anoddpm", "diffusionad")}
    chosen["pca, no weights"] = ("bank", {})
    monkeypatch.setattr("speed.SETTINGS", chosen)
    out = tmp_path / "speed.json"
    measure_bundled(out, n_images=2, rounds=1)
    record = json.loads(out.read_text())
    assert list(record["settings"]) == ["pca", "anoddpm", "diffusionad"]
    assert record["settings"]["anoddpm"]["evaluations"] == 4
    assert record["n_images"] == 2
    assert {"threads", "device", "versions"} <= record.keys()
    assert len(load_dataset("elpv", "mono").test_images) > 2


def test_the_table_begins_with_the_fastest():
    slow = {"ms": [30.0, 20.0, 25.0], "mb": 12.34, "evaluations": 4, "parameters": 2_740_000}
    fast = {"ms": [0.2, 0.1, 0.4], "mb": 1.0, "evaluations": 0, "parameters": 0}
    rows = speed_table({"slow": slow, "fast": fast}).splitlines()[2:]
    assert rows == [
        "| fast | 0.2 [0.1, 0.4] | 0 | 1.0 | 0.00 M |",
        "| slow | 25.0 [20.0, 30.0] | 4 | 12.3 | 2.74 M |",
    ]


@pytest.mark.parametrize("setting", [3, {"ms": [1.0]}], ids=["a number", "no memory"])
def test_the_error_for_an_invalid_record_is_short(tmp_path, setting):
    (tmp_path / "speed.json").write_text(json.dumps({"settings": {"x" * 9999: setting}}))
    with pytest.raises(ValueError, match=r"speed.json: settings\.x{100} (must|lacks)") as error:
        read_speeds(tmp_path)
    assert len(str(error.value)) < 1000


def test_invalid_arguments_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="n_images must be at least 1, got 0"):
        measure_bundled(tmp_path / "speed.json", n_images=0)
    monkeypatch.setattr("speed.SETTINGS", {"bank": ("bank", {})})
    with pytest.raises(ValueError, match="no method to measure"):
        measure_bundled(tmp_path / "speed.json")
    assert not list(tmp_path.iterdir())
