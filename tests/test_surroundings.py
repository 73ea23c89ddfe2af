"""Results do not depend on folder, HOME, network or threads, and nothing else is written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from diffad_lite.experiments.evaluate import bundled_checkpoint

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow
# Runs the command; a write into the checkout, or a network access, ends it with an error.
GUARDED = """
import os, sys

root, *arguments = sys.argv[1:]
forbidden = {"socket.connect", "socket.getaddrinfo"}
writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT

def guard(event, details):
    if event in forbidden:
        raise RuntimeError(f"{event} {details}")
    if event == "open" and (details[2] or 0) & writing and not isinstance(details[0], int):
        if os.path.abspath(os.fsdecode(details[0])).startswith(root + os.sep):
            raise RuntimeError(f"writes {details[0]}")

sys.addaudithook(guard)
from diffad_lite.cli.main import main

sys.exit(main(arguments))
"""


def call(*arguments: str, cwd: Path, threads: int = 1) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k not in ("HOME", "MPLCONFIGDIR")}
    # Dask, in an earlier test, sets MKL_NUM_THREADS=1, and torch uses both variables.
    env |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    env |= {"PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", GUARDED, str(ROOT), *arguments]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


@pytest.fixture
def odd_folder(tmp_path: Path) -> Path:
    """A folder with spaces, quotes and non-ASCII letters in its name."""
    folder = tmp_path / "Prüfung 画像 'a b' $c"
    folder.mkdir()
    return folder


SHAPES = ("evaluate", "--method", "anoddpm", "--dataset", "shapes", "--image-size", "16")
SMALL = ("--profile", "ci", "--set", "denoiser.train.steps=5", "--maps")


def test_the_same_seed_gives_equal_files_in_any_folder(odd_folder):
    """Two runs from the start, without HOME and network; they write below ``--out`` only."""
    for out in ("eins ü", "zwei ü"):
        result = call(*SHAPES, *SMALL, "--out", out, cwd=odd_folder)
        assert result.returncode == 0, result.stderr[-2000:]
    first, second = (odd_folder / out for out in ("eins ü", "zwei ü"))
    names = {p.relative_to(first) for p in first.rglob("*") if p.suffix in (".csv", ".tiff")}
    assert len(names) > 30
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    weights = Path("checkpoint", "model.safetensors")
    assert (first / weights).read_bytes() == (second / weights).read_bytes()


@pytest.mark.timeout(900)
def test_another_number_of_threads_changes_rounding_only(odd_folder):
    if not bundled_checkpoint("grad", "elpv", "mono").is_dir():
        pytest.skip("no bundled weights: not a checkout")
    aurocs = []
    for threads in (1, 2):
        out = f"{threads} threads"
        command = ("evaluate", "--method", "anoddpm", "--checkpoint", "bundled")
        result = call(
            *command, "--set", "n_noises=1", "--out", out, cwd=odd_folder, threads=threads
        )
        assert result.returncode == 0, result.stderr[-2000:]
        record = json.loads((odd_folder / out / "result.json").read_text())
        assert record["threads"] == threads
        aurocs.append(record["image_auroc"])
    assert abs(aurocs[0] - aurocs[1]) < 1e-3
