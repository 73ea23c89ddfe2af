"""A process killed at a random moment: named files are complete, the same command continues.

test_interruptions.py chooses the moments; here they are random: 5 kills, or 100 with
``DIFFAD_FUZZ=10000``.
"""

import json
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from children import ANODDPM, N_STEPS, Ended, assert_same_model, steps_saved
from fuzzing import N_KILLS, TOTAL
from PIL import Image
from safetensors.torch import load_file

from diffad_lite.evaluation.records import read_results, read_scores
from diffad_lite.methods.base import load_pretrained

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.timeout(max(300, TOTAL)),
]

GRID = (
    "{profile: ci, data: [{dataset: shapes, image_size: 16}, {dataset: shapes, image_size: 24}, "
    "{dataset: shapes, image_size: 32}], methods: [mean_image]}"
)
MEASURED = {"train_seconds", "ms_per_image", "peak_memory_mb"}  # differ from run to run


@pytest.fixture(scope="module")
def commands(children, tmp_path_factory) -> dict[str, Callable[..., Ended]]:
    """Name of a command -> its call, with ``--out`` as the argument; each step is saved."""
    grid = tmp_path_factory.mktemp("grid") / "grid.yaml"
    grid.write_text(GRID)
    words = {"evaluate": ["evaluate", *ANODDPM, "--maps"], "sweep": ["sweep", grid]}
    return {
        name: partial(children.run, *arguments, "--out", save_every=-1)
        for name, arguments in words.items()
    }


@pytest.fixture(scope="module")
def unbroken(commands, tmp_path_factory) -> dict[str, tuple[Path, float]]:
    """Name of a command -> the folder of an uninterrupted run, and its seconds."""
    runs = {}
    for name, command in commands.items():
        out = tmp_path_factory.mktemp("unbroken") / name
        ended = command(out)
        assert ended.code == 0, ended.err
        runs[name] = out, ended.seconds
    return runs


def visible_files(out: Path) -> list[Path]:
    """Return the files below ``out``, without hidden ones, which are unfinished."""
    files = {path: path.relative_to(out).parts for path in out.rglob("*") if path.is_file()}
    return [path for path, parts in files.items() if not any(p.startswith(".") for p in parts)]


def assert_complete(out: Path) -> None:
    """Check that every file with its final name is complete; unfinished files are hidden."""
    assert not list(out.rglob("error.txt"))
    for path in visible_files(out):
        if path.suffix in (".png", ".tiff"):
            with Image.open(path) as image:
                image.load()
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".csv":
            labels, scores = read_scores({"file": path.parent / "result.json"})
            assert len(labels) == len(scores) == 32
        else:
            assert path.suffix == ".safetensors", path
            load_file(path)
        if path.name == "config.json":
            load_pretrained(path.parent)
        if path.name == "result.json":  # it is written after all the others
            (result,) = read_results(path.parent)
            assert len(read_scores({"file": path.parent / "result.json"})[0]) == result["n_test"]
            assert (path.parent / "figure.png").exists()


def comparable_results(out: Path) -> dict[str, dict[str, Any]]:
    """Return folder -> record without measured times and memory."""
    records = {}
    for result in read_results(out):
        folder = str(result.pop("file").parent.relative_to(out))
        records[folder] = {key: value for key, value in result.items() if key not in MEASURED}
    return records


def assert_same_run(out: Path, unbroken: Path) -> None:
    """Compare names of files, records, scores and maps; not measured times."""
    ours, theirs = (
        sorted(file.relative_to(folder) for file in visible_files(folder))
        for folder in (out, unbroken)
    )
    assert ours == theirs
    assert comparable_results(out) == comparable_results(unbroken)
    for path in ours:
        if path.suffix in (".csv", ".tiff"):
            assert (out / path).read_bytes() == (unbroken / path).read_bytes(), path
        if path.name == "model.safetensors":
            folder = path.parent.parent  # of the run, which has the folder of its checkpoint
            assert_same_model(out / folder, unbroken / folder)


@pytest.mark.parametrize("number", range(N_KILLS))
def test_killed_at_a_random_moment(number, tmp_path, commands, unbroken):
    rng = np.random.default_rng([99, number])
    name = ("evaluate", "sweep")[number % 2]
    command, (expected, seconds), out = commands[name], unbroken[name], tmp_path / "out"
    for _ in range(int(rng.integers(1, 3))):  # one kill, or another one after it
        ended = command(out, kill_after=float(rng.uniform(0, 1.05 * seconds)))
        assert ended.code in (0, -signal.SIGKILL), ended.err
        if out.exists():
            assert_complete(out)
    first_step = N_STEPS if (out / "checkpoint").exists() else steps_saved(out)
    finished = {path: path.stat().st_mtime_ns for path in out.rglob("result.json")}
    ended = command(out)
    assert ended.code == 0, ended.err
    assert_complete(out)
    assert_same_run(out, expected)
    if name == "evaluate":  # no step is repeated
        assert [int(step) for step in ended.observed] == list(range(first_step, N_STEPS))
    else:  # no finished run is repeated
        assert ended.out.count("done before") == len(finished)
        assert all(path.stat().st_mtime_ns == time for path, time in finished.items())
    shutil.rmtree(out)
