"""Where and how often it runs does not matter: places, threads, no HOME, no network, no writing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from diffad_lite.experiments.evaluate import bundled_checkpoint

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow
# Calls the command; whatever writes into the checkout, or asks the network, ends it.
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
    # Dask, in an earlier test, leaves MKL_NUM_THREADS=1 behind, and torch heeds both.
    env |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    env |= {"PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", GUARDED, str(ROOT), *arguments]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder whose name no shell likes."""
    folder = tmp_path / "Prüfung 画像 'a b' $c"
    folder.mkdir()
    return folder


SHAPES = ("evaluate", "--method", "anoddpm", "--dataset", "shapes", "--image-size", "16")
SMALL = ("--profile", "ci", "--set", "denoiser.train.steps=5", "--maps")


def test_the_same_seed_gives_the_same_bits_anywhere(place):
    """Twice, each from the start; without HOME and network, writing nothing beside ``--out``."""
    for out in ("eins ü", "zwei ü"):
        done = call(*SHAPES, *SMALL, "--out", out, cwd=place)
        assert done.returncode == 0, done.stderr[-2000:]
    one, other = (place / out for out in ("eins ü", "zwei ü"))
    names = {p.relative_to(one) for p in one.rglob("*") if p.suffix in (".csv", ".tiff")}
    assert len(names) > 30
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    weights = Path("checkpoint", "model.safetensors")
    assert (one / weights).read_bytes() == (other / weights).read_bytes()


@pytest.mark.timeout(900)
def test_another_number_of_threads_changes_last_digits_only(place):
    if not bundled_checkpoint("grad", "elpv", "mono").is_dir():
        pytest.skip("no bundled weights: this is no checkout")
    found = []
    for threads in (1, 2):
        out = f"{threads} threads"
        command = ("evaluate", "--method", "anoddpm", "--checkpoint", "bundled")
        done = call(*command, "--set", "n_noises=1", "--out", out, cwd=place, threads=threads)
        assert done.returncode == 0, done.stderr[-2000:]
        result = json.loads((place / out / "result.json").read_text())
        assert result["threads"] == threads
        found.append(result["image_auroc"])
    assert abs(found[0] - found[1]) < 1e-3
