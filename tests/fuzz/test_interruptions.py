"""Ctrl-C, a killed process, a full disk: the same command continues, and no file is broken.

A child process sends itself a real signal at a chosen call of a chosen function, so that no test
waits or depends on timing. The command that continues runs in the process of the test.
"""

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from children import (
    ANODDPM,
    ENVIRONMENT,
    N_STEPS,
    SHAPES,
    STATE,
    STEP,
    assert_same_model,
    steps_saved,
)
from safetensors import SafetensorError
from test_bad_input import notebook

from diffad_lite.cli.main import main
from diffad_lite.core.interrupts import DeferredInterrupt
from diffad_lite.evaluation.records import read_scores
from diffad_lite.methods import checkpoints
from diffad_lite.training import loop, state

INTERRUPTED = "diffad: interrupted; call the same command again to continue\n"
TRAIN = ["train", *ANODDPM]

both_signals = pytest.mark.parametrize("signal_name", ["SIGINT", "SIGKILL"])
pytestmark = pytest.mark.slow


def run_python(*arguments: object) -> subprocess.CompletedProcess:
    words = [sys.executable, *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, check=False, env=ENVIRONMENT)


@pytest.fixture(scope="module", autouse=True)
def ctrl_c() -> Iterator[None]:
    """Let this process and its children receive Ctrl-C, which a background run would ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def interrupt(children) -> Callable[..., str]:
    """Run ``diffad`` until call ``count`` of a function sends the signal; return its stdout."""

    def run(function: str, count: int, signal_name: str, *arguments: object, **options) -> str:
        options |= {"function": function, "count": count, "signal_name": signal_name}
        ended = children.run(*arguments, **options)
        assert ended.code == (130 if signal_name == "SIGINT" else -signal.SIGKILL), ended.err
        assert ended.err == (INTERRUPTED if signal_name == "SIGINT" else "")
        return ended.out

    return run


def call(*arguments: object) -> None:
    assert main([str(a) for a in arguments]) == 0


def temporary_files(folder: Path) -> list[str]:
    """Return the names of hidden files: those of unfinished writes."""
    return [path.name for path in folder.rglob("*") if path.name.startswith(".")]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    """The run folder of an uninterrupted training."""
    out = tmp_path_factory.mktemp("unbroken")
    call(*TRAIN, "--out", out)
    return out


@pytest.fixture
def steps_made(monkeypatch) -> list[int]:
    """The training steps of this process, in their order."""
    steps, original = [], state.learning_rate_factor

    def record(step: int, *others: Any) -> float:
        steps.append(step)
        return original(step, *others)

    monkeypatch.setattr(state, "learning_rate_factor", record)
    return steps


# --------------------------------------------------------------------------------- training


@pytest.mark.parametrize(
    ("signal_name", "save_every", "saved"),
    [("SIGINT", 30, 8), ("SIGKILL", -1, 7)],  # after Ctrl-C step 8 is finished and saved
    ids=["Ctrl-C", "killed"],
)
def test_a_training_continues_where_it_stopped(
    signal_name, save_every, saved, tmp_path, unbroken, steps_made, interrupt
):
    out = tmp_path / "out"
    interrupt(STEP, 8, signal_name, *TRAIN, "--out", out, save_every=save_every)
    assert steps_saved(out) == saved
    assert not (out / "checkpoint").exists()
    if signal_name == "SIGINT":
        assert temporary_files(tmp_path) == []
    call(*TRAIN, "--out", out)
    assert steps_made == list(range(saved, N_STEPS))
    assert_same_model(out, unbroken)


@pytest.mark.parametrize("count", [2, 5], ids=["state", "checkpoint"])
def test_killed_before_a_file_gets_its_name(count, tmp_path, unbroken, steps_made, interrupt):
    """Files are renamed in this order: claim, state, weights, configuration, checkpoint."""
    out = tmp_path / "out"
    interrupt("pathlib:Path.replace", count, "SIGKILL", *TRAIN, "--out", out)
    assert not (out / "checkpoint").exists()
    assert (out / STATE).exists() == (count == 5)
    call(*TRAIN, "--out", out)
    assert steps_made == ([] if count == 5 else list(range(N_STEPS)))
    assert_same_model(out, unbroken)


def test_an_evaluation_continues_its_training(tmp_path, unbroken, steps_made, interrupt):
    command = ["evaluate", *TRAIN[1:], "--out", tmp_path / "out"]
    interrupt(STEP, 5, "SIGINT", *command)
    assert sorted(p.name for p in (tmp_path / "out").rglob("*") if p.is_file()) == [
        "diffusion.state.safetensors",
        "training.json",
    ]
    call(*command)
    assert steps_made == list(range(5, N_STEPS))
    assert_same_model(tmp_path / "out", unbroken)
    assert (tmp_path / "out" / "result.json").exists()


def test_the_first_ctrl_c_waits_and_the_second_does_not():
    before = signal.getsignal(signal.SIGINT)
    events = []
    with pytest.raises(KeyboardInterrupt), DeferredInterrupt() as interrupt:
        signal.raise_signal(signal.SIGINT)
        events.append(interrupt.asked)
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(KeyboardInterrupt), DeferredInterrupt():
        signal.raise_signal(signal.SIGINT)
        events.append("waits")
        signal.raise_signal(signal.SIGINT)
        events.append("never")
    assert events == [True, "waits"]
    with pytest.raises(ZeroDivisionError), DeferredInterrupt():  # an error has priority
        signal.raise_signal(signal.SIGINT)
        _ = 1 / 0
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_stays_ignored_where_it_was():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as under nohup
    try:
        with DeferredInterrupt() as interrupt:
            signal.raise_signal(signal.SIGINT)
        assert not interrupt.asked
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


# ------------------------------------------------------------------------ scoring and sweeps


EVALUATE = ["evaluate", "--method", "pca", *SHAPES]
GRID = "{profile: ci, methods: [mean_image, pca], data: [{dataset: shapes, image_size: 16}]}"


@pytest.fixture(scope="module")
def scored(tmp_path_factory) -> Path:
    """The run folder of an uninterrupted evaluation."""
    out = tmp_path_factory.mktemp("scored")
    call(*EVALUATE, "--out", out)
    return out


def assert_same_scores(out: Path, scored: Path) -> None:
    """Compare up to rounding: the child has one thread, this process may have more."""
    ours, theirs = (read_scores({"file": folder / "result.json"}) for folder in (out, scored))
    np.testing.assert_array_equal(ours[0], theirs[0])
    np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-4)
    assert (out / "figure.png").stat().st_size > 1000
    ours, theirs = (json.loads((folder / "result.json").read_text()) for folder in (out, scored))
    assert ours["config_hash"] == theirs["config_hash"]
    for name in ("image_auroc", "image_auroc_ci", "threshold", "aupro"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-3)


@pytest.mark.parametrize(
    ("signal_name", "function"),
    [("SIGINT", "measure_quality"), ("SIGKILL", "write_scores"), ("SIGKILL", "write_figure")],
)
def test_an_interrupted_scoring_leaves_no_result(
    signal_name, function, tmp_path, scored, capsys, interrupt
):
    out = tmp_path / "out"
    function = f"diffad_lite.experiments.evaluate:{function}"
    interrupt(function, 1, signal_name, *EVALUATE, "--out", out)
    assert not (out / "result.json").exists()
    assert temporary_files(tmp_path) == []
    assert main(["report", "--results", str(tmp_path)]) == 2
    assert "no <grid>.jsonl in it and no result.json below" in capsys.readouterr().err
    call(*EVALUATE, "--out", out)
    assert_same_scores(out, scored)


@both_signals
def test_a_sweep_does_not_repeat_finished_runs(signal_name, tmp_path, scored, capsys, interrupt):
    (tmp_path / "grid.yaml").write_text(GRID)
    out = tmp_path / "out"
    command = ["sweep", tmp_path / "grid.yaml", "--out", out]
    printed = interrupt("diffad_lite.experiments.grid:evaluate", 2, signal_name, *command)
    assert "failed" not in printed
    (finished,) = out.rglob("result.json")
    assert "mean_image" in finished.parts
    assert not list(out.rglob("error.txt"))
    before = finished.stat().st_mtime_ns
    call(*command)
    assert capsys.readouterr().out.count("done before") == 1
    assert finished.stat().st_mtime_ns == before
    assert_same_scores(out / "pca" / "shapes-16px" / "s0" / "default", scored)


# -------------------------------------------------------------------------------- notebooks


@pytest.fixture
def lessons(tmp_path) -> Callable[[str], list[str]]:
    """Two notebooks that log their runs; the second one interrupts ``diffad``, once."""
    log, flag = tmp_path / "log", tmp_path / "flag"
    folder = tmp_path / "lessons"

    def write(signal_name: str) -> list[str]:
        lines = [
            "import os, pathlib, signal, time",
            f"open({str(log)!r}, 'a').write('second ')",
            f"flag = pathlib.Path({str(flag)!r})",
            "if not flag.exists():",
            "    flag.touch()",
            f"    os.kill(os.getppid(), signal.{signal_name})",
            "    time.sleep(15)",
        ]
        notebook(folder / "01_first.ipynb", f"open({str(log)!r}, 'a').write('first ')")
        notebook(folder / "02_second.ipynb", "print('begun')", "\n".join(lines))
        return ["notebooks", "--folder", str(folder), "--out", str(tmp_path / "out")]

    return write


@both_signals
def test_finished_notebooks_are_not_repeated(signal_name, lessons, tmp_path, capfd):
    command, out, log = lessons(signal_name), tmp_path / "out", tmp_path / "log"
    done = run_python("-m", "diffad_lite.cli", *command)
    if signal_name == "SIGINT":
        assert done.returncode == 130
        assert done.stderr.endswith(INTERRUPTED)
        assert temporary_files(out) == [".unfinished.json"]
    else:
        assert done.returncode == -signal.SIGKILL
    assert sorted(p.name for p in out.glob("[!.]*")) == ["01_first.ipynb"]
    assert log.read_text().split() == ["first", "second"]
    call(*command)
    assert "01_first.ipynb: finished before the interruption" in capfd.readouterr().out
    assert log.read_text().split() == ["first", "second", "second"]
    assert sorted(p.name for p in out.iterdir()) == ["01_first.ipynb", "02_second.ipynb"]
    if signal_name == "SIGINT":  # the series has ended: executed again
        call(*command, "--only", "01")
        assert log.read_text().split() == ["first", "second", "second", "first"]


def test_a_changed_notebook_is_executed_again(lessons, tmp_path):
    command, out, log = lessons("SIGINT"), tmp_path / "out", tmp_path / "log"
    (tmp_path / "flag").touch()
    record = {"key": "of another call", "done": ["01_first.ipynb"]}
    out.mkdir()
    (out / "01_first.ipynb").write_text("executed as it was")
    (out / ".unfinished.json").write_text(json.dumps(record))
    call(*command, "--only", "01")
    assert log.read_text().split() == ["first"]
    assert temporary_files(out) == []


def test_a_failing_notebook_shows_its_error_and_the_next_runs(tmp_path, capfd):
    notebook(tmp_path / "lessons" / "01_bad.ipynb", "raise ValueError('two\\nlines')", "1")
    notebook(tmp_path / "lessons" / "02_good.ipynb", "print('reached')")
    out = tmp_path / "out"
    arguments = ["notebooks", "--folder", str(tmp_path / "lessons"), "--out", str(out)]
    assert main(arguments) == 1
    assert capfd.readouterr().err.endswith("diffad: 01_bad.ipynb: ValueError: two lines\n")
    assert "An Exception was encountered" in (out / "01_bad.ipynb").read_text()
    assert "reached" in (out / "02_good.ipynb").read_text()
    assert temporary_files(out) == []


# -------------------------------------------------------------------------------- full disk


FULL = "Error while serializing: I/O error: No space left on device (os error 28)"


def no_space(*args, **kwargs) -> None:
    """Raise the error of safetensors on a full disk."""
    raise SafetensorError(FULL)


def assert_disk_full(arguments: list[object], path: Path, capsys) -> None:
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == 2
    expected = "the disk is full; free some space and call the same command again"
    assert capsys.readouterr().err == f"diffad: {path}: {expected}\n"
    assert temporary_files(path.parent) == []


def test_a_full_disk_keeps_the_previous_training_state(tmp_path, unbroken, monkeypatch, capsys):
    out, command = tmp_path / "out", [*TRAIN, "--out", tmp_path / "out"]
    save_file = state.save_file
    with monkeypatch.context() as patch:
        patch.setattr(loop, "SAVE_EVERY_SECONDS", -1.0)
        saves = iter(range(4))
        patch.setattr(
            state, "save_file", lambda *a: save_file(*a) if next(saves) < 3 else no_space()
        )
        assert_disk_full(command, out / STATE, capsys)
    assert steps_saved(out) == 3
    call(*command)
    assert_same_model(out, unbroken)


def test_a_full_disk_leaves_no_half_checkpoint(tmp_path, unbroken, monkeypatch, capsys):
    out, command = tmp_path / "out", [*TRAIN, "--out", tmp_path / "out"]
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_file", no_space)
        assert_disk_full(command, out / "checkpoint" / "model.safetensors", capsys)
    assert sorted(p.name for p in out.iterdir()) == ["state"]
    call(*command)
    assert_same_model(out, unbroken)


@pytest.mark.parametrize("name", ["scores.csv", "result.json"])
def test_a_full_disk_leaves_no_half_result(name, tmp_path, monkeypatch, capsys):
    command = [*EVALUATE, "--out", tmp_path / "out"]
    touch = Path.touch

    def fail_for_name(path: Path, **options) -> None:
        if path.name.startswith(f".{name}."):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        touch(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "touch", fail_for_name)
        assert_disk_full(command, tmp_path / "out" / name, capsys)
    assert not (tmp_path / "out" / "result.json").exists()
    call(*command)


def test_a_full_disk_ends_a_sweep(tmp_path, monkeypatch, capsys):
    (tmp_path / "grid.yaml").write_text(GRID)
    monkeypatch.setattr(checkpoints, "save_file", no_space)
    out = tmp_path / "out"
    path = out / "mean_image" / "shapes-16px" / "s0" / "checkpoint" / "model.safetensors"
    assert_disk_full(["sweep", tmp_path / "grid.yaml", "--out", out], path, capsys)
    assert not list(out.rglob("error.txt"))
    assert not (out / "pca").exists()


def test_a_file_beyond_the_size_limit(tmp_path):
    """A limit on file sizes replaces a full disk, so that libraries get the real error."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
    code = limit + "import sys; from diffad_lite.cli.main import main; sys.exit(main(sys.argv[1:]))"
    done = run_python("-c", code, *TRAIN, "--out", tmp_path / "out")
    assert done.returncode == 2
    state = tmp_path / "out" / STATE
    assert done.stderr == f"diffad: {state}: file too large; check this path\n"
    assert not state.parent.exists()  # without a state, the folder is not claimed either
