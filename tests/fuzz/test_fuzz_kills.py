"""A process killed at any moment: what has its final name is whole, and the same call goes on.

Where exactly a process dies is chosen in test_interruptions.py; here chance chooses, again and
again: 5 times, or 100 with ``DIFFAD_FUZZ=10000``.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from test_fuzz import KILLS, TOTAL
from test_interruptions import ENVIRONMENT, SETTINGS, SHAPES, STATE

from diffad_lite.evaluation.records import read_results, read_scores
from diffad_lite.methods.base import load_pretrained

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.timeout(max(300, TOTAL)),
    pytest.mark.skipif(os.name == "nt", reason="signals are those of POSIX"),
]

# Imports everything once; a line of input is a call, made in a fork of its own, whose number it
# says first and whose end it says then. Each training step is saved and written down.
SERVER = """
import json, os, sys
import diffad_lite.experiments
from diffad_lite.cli.main import main
from diffad_lite.training import loop, state

loop.SAVE_EVERY_SECONDS = -1.0
usual = state.learning_rate_factor
for line in sys.stdin:
    call = json.loads(line)
    child = os.fork()
    if not child:
        def noted(step, total, warmup):
            with open(call["steps"], "a") as file:
                file.write(f"{step} ")
            return usual(step, total, warmup)

        state.learning_rate_factor = noted
        for stream in (1, 2):
            os.dup2(os.open(call["said"], os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        code = main(call["arguments"])
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
EVALUATE = ["evaluate", "--method", "anoddpm", *SHAPES, "--maps"]
EVALUATE += [word for setting in SETTINGS for word in ("--set", setting)]
CELLS = (
    "{profile: ci, data: [{dataset: shapes, image_size: 16}, {dataset: shapes, image_size: 24}, "
    "{dataset: shapes, image_size: 32}], methods: [mean_image]}"
)
CLOCKS = {"train_seconds", "ms_per_image", "peak_memory_mb"}


@pytest.fixture(scope="module")
def server() -> Iterator[subprocess.Popen]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", SERVER], env=ENVIRONMENT, **pipes) as process:
        yield process
        process.stdin.close()


class Calls:
    """``diffad`` in children of the server, in one folder after the other."""

    def __init__(self, server: subprocess.Popen, scratch: Path) -> None:
        self.server, self.scratch = server, scratch
        (scratch / "grid.yaml").write_text(CELLS)

    def words(self, kind: str, out: Path) -> list[str]:
        sweep = ["sweep", str(self.scratch / "grid.yaml")]
        return [*(EVALUATE if kind == "evaluate" else sweep), "--out", str(out)]

    def __call__(self, kind: str, out: Path, kill_after: float | None = None) -> tuple[int, float]:
        """Exit code and seconds; the child gets SIGKILL so many seconds after its start."""
        values = {"arguments": self.words(kind, out), "steps": str(self.scratch / "steps")}
        values["said"] = str(self.scratch / "said")
        for name in ("steps", "said"):
            (self.scratch / name).write_text("")
        self.server.stdin.write(json.dumps(values) + "\n")
        self.server.stdin.flush()
        child, started = int(self.server.stdout.readline()), time.monotonic()
        if kill_after is not None:
            time.sleep(kill_after)
            with contextlib.suppress(ProcessLookupError):  # it has come to its end before
                os.kill(child, signal.SIGKILL)
        code = int(self.server.stdout.readline())
        return code, time.monotonic() - started

    def steps(self) -> list[int]:
        return [int(word) for word in (self.scratch / "steps").read_text().split()]

    def said(self) -> str:
        return (self.scratch / "said").read_text()


@pytest.fixture(scope="module")
def calls(server, tmp_path_factory) -> Calls:
    return Calls(server, tmp_path_factory.mktemp("calls"))


@pytest.fixture(scope="module")
def unbroken(calls, tmp_path_factory) -> dict[str, tuple[Path, float]]:
    """Kind of call -> the folder of one that nobody interrupts, and how long it takes."""
    found = {}
    for kind in ("evaluate", "sweep"):
        out = tmp_path_factory.mktemp("unbroken") / kind
        code, seconds = calls(kind, out)
        assert code == 0, calls.said()
        found[kind] = out, seconds
    return found


def assert_whole(out: Path) -> None:
    """Every file that has its final name is complete; unfinished ones are hidden."""
    assert not list(out.rglob("error.txt"))
    for path in out.rglob("*"):
        if not path.is_file() or any(p.startswith(".") for p in path.relative_to(out).parts):
            continue
        if path.suffix == ".png" or path.suffix == ".tiff":
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
        if path.name == "result.json":  # it stands for all that is written before it
            (result,) = read_results(path.parent)
            assert len(read_scores({"file": path.parent / "result.json"})[0]) == result["n_test"]
            assert (path.parent / "figure.png").exists()


def steps_saved(out: Path) -> int:
    """Of the training that ``out`` holds; -1 where it is finished, 0 where none was saved."""
    if (out / "checkpoint").exists():
        return -1
    if not (out / STATE).exists():
        return 0
    with safe_open(out / STATE, framework="pt") as file:
        return json.loads(file.metadata()["numbers"])["step"]


def results_below(out: Path) -> dict[str, dict[str, Any]]:
    """Folder -> record without what a clock or a machine says."""
    found = {}
    for result in read_results(out):
        place = result.pop("file").parent.relative_to(out)
        found[str(place)] = {key: value for key, value in result.items() if key not in CLOCKS}
    return found


def assert_same(out: Path, unbroken: Path) -> None:
    ours, theirs = (
        sorted(f.relative_to(o) for f in o.rglob("*") if f.is_file() and visible(f, o))
        for o in (out, unbroken)
    )
    assert ours == theirs
    assert results_below(out) == results_below(unbroken)
    for path in ours:
        if path.suffix in (".csv", ".tiff"):
            assert (out / path).read_bytes() == (unbroken / path).read_bytes(), path
        if path.name == "model.safetensors":
            one, other = (load_file(o / path) for o in (out, unbroken))
            assert one.keys() == other.keys()
            assert all(torch.equal(one[name], other[name]) for name in one)


def visible(path: Path, out: Path) -> bool:
    return not any(part.startswith(".") for part in path.relative_to(out).parts)


@pytest.mark.parametrize("number", range(KILLS))
def test_killed_at_a_random_moment(number, tmp_path, calls, unbroken):
    rng = np.random.default_rng([99, number])
    kind = ("evaluate", "sweep")[number % 2]
    (whole, seconds), out = unbroken[kind], tmp_path / "out"
    for _ in range(int(rng.integers(1, 3))):  # once, or once more when it goes on
        code, _ = calls(kind, out, kill_after=float(rng.uniform(0, 1.05 * seconds)))
        assert code in (0, -signal.SIGKILL), calls.said()
        if out.exists():
            assert_whole(out)
    saved = steps_saved(out) if kind == "evaluate" and out.exists() else 0
    done = {p: p.stat().st_mtime_ns for p in out.rglob("result.json")}
    code, _ = calls(kind, out)
    assert code == 0, calls.said()
    assert_whole(out)
    assert_same(out, whole)
    if kind == "evaluate":  # no step is made twice
        assert calls.steps() == ([] if saved < 0 else list(range(saved, 12)))
    else:  # no cell is scored twice
        assert calls.said().count("done before") == len(done)
        assert all(path.stat().st_mtime_ns == before for path, before in done.items())
    shutil.rmtree(out)
