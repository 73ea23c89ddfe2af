"""Sweeps on Dask: the same results as a plain sweep, failures listed, killed workers replaced."""

import os
import signal
import sys
import threading
import time

import pytest
import torch
from distributed import Client, LocalCluster

from diffad_lite.evaluation.records import read_results
from diffad_lite.evaluation.tables import tables
from diffad_lite.experiments import dask
from diffad_lite.experiments.dask import sweep_on_dask
from diffad_lite.experiments.grid import sweep

pytestmark = pytest.mark.slow
GRID = {
    "profile": "ci",
    "methods": ["pca", "nothing"],
    "seeds": [0, 1],
    "data": [{"dataset": "shapes", "image_size": 16}],
    # Two entries that share a training must not make it at the same time.
    "variants": {"raw": {"calibrate": False}},
}
GRID["data"].append(GRID["data"][0] | {"methods": ["pca"], "variants": {"default": {}}})


@pytest.fixture
def local(tmp_path):
    """Yield a cluster of one worker that tests may kill; restore the number of threads after it."""
    threads = torch.get_num_threads()
    with LocalCluster(
        n_workers=1,
        threads_per_worker=1,
        dashboard_address=None,
        local_directory=tmp_path / "dask",
    ) as made:
        yield made
    torch.set_num_threads(threads)


def test_a_sweep_on_dask_makes_what_a_sweep_makes(tmp_path, capsys):
    failures = sweep_on_dask(GRID, tmp_path / "dask", workers=2)
    printed = capsys.readouterr().out
    assert printed.count(": done") == 2
    assert printed.count(": failed") == 2
    assert len(failures) == 2
    assert all("unknown method 'nothing'" in line for line in failures)
    assert "Traceback" in (tmp_path / "dask/nothing/shapes-16px/s0/error.txt").read_text()
    assert len(sweep(GRID, tmp_path / "alone")) == 2
    assert len(read_results(tmp_path / "dask")) == 4
    names = ("overview", "shapes-disc-pixels")
    made, alone = (tables(read_results(tmp_path / name)) for name in ("dask", "alone"))
    assert [made[name] for name in names] == [alone[name] for name in names]


SLOW = {"train.steps": 200, "base_channels": 8, "attention_levels": []}


def test_a_run_goes_on_when_its_worker_dies(tmp_path, local):
    grid = {
        "profile": "ci",
        "methods": ["anoddpm"],
        "data": [{"dataset": "shapes", "image_size": 16}],
        "settings": {f"denoiser.{name}": value for name, value in SLOW.items()},
    }
    folder = tmp_path / "runs/anoddpm/shapes-16px/s0"
    killed = []

    def kill() -> None:
        with Client(local) as client:
            while not (folder / "state").exists():
                time.sleep(0.05)
            (pid,) = client.run(os.getpid).values()
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    assert sweep_on_dask(grid, tmp_path / "runs", scheduler=local.scheduler_address) == []
    killer.join()
    assert killed
    (result,) = read_results(tmp_path / "runs")
    assert result["train_steps"] == 200
    torch.set_num_threads(result["threads"])  # on which the last digits depend
    assert sweep(grid, tmp_path / "alone") == []
    (alone,) = read_results(tmp_path / "alone")
    assert result["image_auroc"] == pytest.approx(alone["image_auroc"], abs=1e-3)


def test_what_cannot_be_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(dask, "PATIENCE", 0.5)
    with pytest.raises(ConnectionError, match=r"no Dask scheduler at tcp:\S+:9 .*; start one"):
        sweep_on_dask(GRID, tmp_path, scheduler="tcp://127.0.0.1:9")
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        sweep_on_dask(GRID, tmp_path, workers=0)
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ImportError, match="Dask is not installed; run pip install"):
        sweep_on_dask(GRID, tmp_path)
