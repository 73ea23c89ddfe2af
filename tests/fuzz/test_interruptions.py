"""Ctrl-C, a killed process and a full disk: the same call goes on, and nothing broken is left.

A child process sends itself a real signal when it calls a chosen function for the n-th time, so
that no test waits or races. What comes after the interruption runs in the test's own process.
"""

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from test_bad_input import notebook

from diffad_lite.cli.main import main
from diffad_lite.core import files
from diffad_lite.core.interrupts import DeferredInterrupt
from diffad_lite.evaluation.records import read_scores
from diffad_lite.methods import checkpoints
from diffad_lite.training import loop, state

# Imports everything once; each line of input is a call, made in a fork of its own.
SERVER = """
import importlib, json, os, signal, sys
import diffad_lite.experiments
from diffad_lite.cli.main import main
from diffad_lite.training import loop

def prepare(at, count, number, save_every):
    loop.SAVE_EVERY_SECONDS = save_every
    module, _, path = at.partition(":")
    owner = importlib.import_module(module)
    *inner, function = path.split(".")
    for part in inner:
        owner = getattr(owner, part)
    usual, calls = getattr(owner, function), []

    def counted(*args, **kwargs):
        calls.append(None)
        if len(calls) == count:
            os.kill(os.getpid(), getattr(signal, number))
        return usual(*args, **kwargs)

    setattr(owner, function, counted)

for line in sys.stdin:
    call = json.loads(line)
    child = os.fork()
    if not child:
        for stream, path in enumerate(call["streams"], 1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
        prepare(*call["interruption"])
        code = main(call["arguments"])
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
INTERRUPTED = "diffad: interrupted; call the same command again to continue\n"
SHAPES = ("--dataset", "shapes", "--profile", "ci", "--image-size", "16", "--quiet")
DENOISER = ("train.steps=12", "base_channels=8", "channel_mults=[1,2]", "attention_levels=[]")
SETTINGS = tuple(f"denoiser.{field}" for field in DENOISER)
TRAIN = ["train", "--method", "anoddpm", *SHAPES]
TRAIN += [word for setting in SETTINGS for word in ("--set", setting)]
STATE = Path("state") / "diffusion.state.safetensors"
STEP = "diffad_lite.training.state:learning_rate_factor"  # called once in each step

posix = pytest.mark.skipif(os.name == "nt", reason="signals are those of POSIX")
either = pytest.mark.parametrize("number", ["SIGINT", "SIGKILL"])
pytestmark = [posix, pytest.mark.slow]


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def run(*command: object) -> subprocess.CompletedProcess:
    """Python in a process of its own."""
    words = [sys.executable, *map(str, command)]
    return subprocess.run(words, capture_output=True, text=True, check=False, env=ENVIRONMENT)


@pytest.fixture(scope="module", autouse=True)
def heard() -> Iterator[None]:
    """Ctrl-C is heard, by child processes too, where a background run of the tests ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def server() -> Iterator[subprocess.Popen]:
    command = [sys.executable, "-c", SERVER]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=ENVIRONMENT, **pipes) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def interrupt(server, tmp_path_factory) -> Callable[..., str]:
    """``diffad`` in a child, which gets the signal when it calls ``at`` for the n-th time."""

    def call(at: str, count: int, number: str, *arguments: object, save_every: float = 30) -> str:
        streams = [tmp_path_factory.mktemp("streams") / name for name in ("out", "err")]
        values = {
            "interruption": (at, count, number, save_every),
            "arguments": [str(a) for a in arguments],
            "streams": [str(path) for path in streams],
        }
        server.stdin.write(json.dumps(values) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        out, said = (path.read_text() for path in streams)
        assert code == (130 if number == "SIGINT" else -signal.SIGKILL), said
        assert said == (INTERRUPTED if number == "SIGINT" else "")
        return out

    return call


def call(*arguments: object) -> None:
    assert main([str(a) for a in arguments]) == 0


def temporary_files(folder: Path) -> list[str]:
    """What an unfinished write leaves: hidden files."""
    return [p.name for p in folder.rglob("*") if p.name.startswith(".")]


def steps_saved(out: Path) -> int:
    with safe_open(out / STATE, framework="pt") as file:
        return json.loads(file.metadata()["numbers"])["step"]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    """The run folder of a training that nothing interrupted."""
    out = tmp_path_factory.mktemp("unbroken")
    call(*TRAIN, "--out", out)
    return out


@pytest.fixture
def steps_made(monkeypatch) -> list[int]:
    """The steps that this process makes."""
    made, usual = [], state.learning_rate_factor

    def spy(step: int, total: int, warmup: int) -> float:
        made.append(step)
        return usual(step, total, warmup)

    monkeypatch.setattr(state, "learning_rate_factor", spy)
    return made


def assert_same_model(out: Path, unbroken: Path) -> None:
    ours = load_file(out / "checkpoint" / "model.safetensors")
    theirs = load_file(unbroken / "checkpoint" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


# --------------------------------------------------------------------------------- training


@pytest.mark.parametrize(
    ("number", "save_every", "saved"),
    [("SIGINT", 30, 8), ("SIGKILL", -1, 7)],  # Ctrl-C finishes the eighth step and saves it
    ids=["Ctrl-C", "killed"],
)
def test_a_training_goes_on_where_it_stopped(
    number, save_every, saved, tmp_path, unbroken, steps_made, interrupt
):
    out = tmp_path / "out"
    interrupt(STEP, 8, number, *TRAIN, "--out", out, save_every=save_every)
    assert steps_saved(out) == saved
    assert not (out / "checkpoint").exists()
    if number == "SIGINT":
        assert temporary_files(tmp_path) == []
    call(*TRAIN, "--out", out)
    assert steps_made == list(range(saved, 12))
    assert_same_model(out, unbroken)


@pytest.mark.parametrize("count", [2, 4], ids=["state", "checkpoint"])
def test_killed_before_a_file_has_its_name(count, tmp_path, unbroken, steps_made, interrupt):
    """The renames are those of: the claim, the state, the configuration, the checkpoint."""
    out = tmp_path / "out"
    interrupt("pathlib:Path.replace", count, "SIGKILL", *TRAIN, "--out", out)
    assert not (out / "checkpoint").exists()
    assert (out / STATE).exists() == (count == 4)
    call(*TRAIN, "--out", out)
    assert steps_made == ([] if count == 4 else list(range(12)))
    assert_same_model(out, unbroken)


def test_an_evaluation_goes_on_with_its_training(tmp_path, unbroken, steps_made, interrupt):
    command = ["evaluate", *TRAIN[1:], "--out", tmp_path / "out"]
    interrupt(STEP, 5, "SIGINT", *command)
    assert sorted(p.name for p in (tmp_path / "out").rglob("*") if p.is_file()) == [
        "diffusion.state.safetensors",
        "training.json",
    ]
    call(*command)
    assert steps_made == list(range(5, 12))
    assert_same_model(tmp_path / "out", unbroken)
    assert (tmp_path / "out" / "result.json").exists()


def test_the_first_ctrl_c_waits_and_the_second_does_not():
    before = signal.getsignal(signal.SIGINT)
    reached = []
    with pytest.raises(KeyboardInterrupt), DeferredInterrupt() as interrupt:
        signal.raise_signal(signal.SIGINT)
        reached.append(interrupt.asked)
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(KeyboardInterrupt), DeferredInterrupt():
        signal.raise_signal(signal.SIGINT)
        reached.append("waits")
        signal.raise_signal(signal.SIGINT)
        reached.append("never")
    assert reached == [True, "waits"]
    with pytest.raises(ZeroDivisionError), DeferredInterrupt():  # an error comes first
        signal.raise_signal(signal.SIGINT)
        _ = 1 / 0
    assert signal.getsignal(signal.SIGINT) is before


def test_where_ctrl_c_is_ignored_it_stays_ignored():
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
    """The run folder of an evaluation that nothing interrupted."""
    out = tmp_path_factory.mktemp("scored")
    call(*EVALUATE, "--out", out)
    return out


def assert_same_scores(out: Path, scored: Path) -> None:
    """Equal but for rounding: the child has one thread, this process may have more."""
    ours, theirs = (read_scores({"file": folder / "result.json"}) for folder in (out, scored))
    np.testing.assert_array_equal(ours[0], theirs[0])
    np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-4)
    assert (out / "figure.png").stat().st_size > 1000
    ours, theirs = (json.loads((folder / "result.json").read_text()) for folder in (out, scored))
    assert ours["config_hash"] == theirs["config_hash"]
    for name in ("image_auroc", "image_auroc_ci", "threshold", "aupro"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-3)


@pytest.mark.parametrize(
    ("number", "at"),
    [("SIGINT", "measure_quality"), ("SIGKILL", "write_scores"), ("SIGKILL", "write_figure")],
)
def test_a_broken_scoring_is_no_result(number, at, tmp_path, scored, capsys, interrupt):
    out = tmp_path / "out"
    interrupt(f"diffad_lite.experiments.evaluate:{at}", 1, number, *EVALUATE, "--out", out)
    assert not (out / "result.json").exists()
    assert temporary_files(tmp_path) == []
    assert main(["report", "--results", str(tmp_path)]) == 2
    assert "no <grid>.jsonl in it and no result.json below" in capsys.readouterr().err
    call(*EVALUATE, "--out", out)
    assert_same_scores(out, scored)


@either
def test_a_sweep_does_not_repeat_what_is_finished(number, tmp_path, scored, capsys, interrupt):
    (tmp_path / "grid.yaml").write_text(GRID)
    out = tmp_path / "out"
    command = ["sweep", tmp_path / "grid.yaml", "--out", out]
    printed = interrupt("diffad_lite.experiments.grid:evaluate", 2, number, *command)
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
    """Two notebooks that write down when they run; the second interrupts ``diffad``, once."""
    log, flag = tmp_path / "log", tmp_path / "flag"
    folder = tmp_path / "lessons"

    def make(number: str) -> list[str]:
        lines = [
            "import os, pathlib, signal, time",
            f"open({str(log)!r}, 'a').write('second ')",
            f"flag = pathlib.Path({str(flag)!r})",
            "if not flag.exists():",
            "    flag.touch()",
            f"    os.kill(os.getppid(), signal.{number})",
            "    time.sleep(15)",
        ]
        notebook(folder / "01_first.ipynb", f"open({str(log)!r}, 'a').write('first ')")
        notebook(folder / "02_second.ipynb", "print('begun')", "\n".join(lines))
        return ["notebooks", "--folder", str(folder), "--out", str(tmp_path / "out")]

    return make


@either
def test_notebooks_go_on_with_those_that_are_not_finished(number, lessons, tmp_path, capfd):
    command, out, log = lessons(number), tmp_path / "out", tmp_path / "log"
    done = run("-m", "diffad_lite.cli", *command)
    if number == "SIGINT":
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
    if number == "SIGINT":  # all has come to its end: executed anew
        call(*command, "--only", "01")
        assert log.read_text().split() == ["first", "second", "second", "first"]


def test_a_changed_notebook_is_executed_again(lessons, tmp_path):
    command, out, log = lessons("SIGINT"), tmp_path / "out", tmp_path / "log"
    (tmp_path / "flag").touch()
    record = {"key": "that of another call", "done": ["01_first.ipynb"]}
    out.mkdir()
    (out / "01_first.ipynb").write_text("executed as it was")
    (out / ".unfinished.json").write_text(json.dumps(record))
    call(*command, "--only", "01")
    assert log.read_text().split() == ["first"]
    assert temporary_files(out) == []


def test_a_failing_notebook_shows_its_error_and_the_others_run(tmp_path, capfd):
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
    """What safetensors raises on a full disk."""
    raise SafetensorError(FULL)


def assert_full(arguments: list[object], path: Path, capsys) -> None:
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == 2
    said = capsys.readouterr().err
    expected = "the disk is full; free some space and call the same command again"
    assert said == f"diffad: {path}: {expected}\n"
    assert temporary_files(path.parent) == []


def test_a_full_disk_keeps_the_former_training_state(tmp_path, unbroken, monkeypatch, capsys):
    out, command = tmp_path / "out", [*TRAIN, "--out", tmp_path / "out"]
    usual = state.save_file
    with monkeypatch.context() as patch:
        patch.setattr(loop, "SAVE_EVERY_SECONDS", -1.0)
        saves = iter(range(4))
        wrapped = lambda *a: usual(*a) if next(saves) < 3 else no_space()  # noqa: E731
        patch.setattr(state, "save_file", wrapped)
        assert_full(command, out / STATE, capsys)
    assert steps_saved(out) == 3
    call(*command)
    assert_same_model(out, unbroken)


def test_a_full_disk_leaves_no_half_checkpoint(tmp_path, unbroken, monkeypatch, capsys):
    out, command = tmp_path / "out", [*TRAIN, "--out", tmp_path / "out"]
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_file", no_space)
        assert_full(command, out / "checkpoint" / "model.safetensors", capsys)
    assert sorted(p.name for p in out.iterdir()) == ["state"]
    call(*command)
    assert_same_model(out, unbroken)


@pytest.mark.parametrize("name", ["scores.csv", "result.json"])
def test_a_full_disk_leaves_no_half_result(name, tmp_path, monkeypatch, capsys):
    command = [*EVALUATE, "--out", tmp_path / "out"]
    usual = files.tempfile.mkstemp

    def full(prefix: str, **options) -> tuple[int, str]:
        if prefix == f".{name}.":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), prefix)
        return usual(prefix=prefix, **options)

    with monkeypatch.context() as patch:
        patch.setattr(files.tempfile, "mkstemp", full)
        assert_full(command, tmp_path / "out" / name, capsys)
    assert not (tmp_path / "out" / "result.json").exists()
    call(*command)


def test_a_full_disk_ends_a_sweep(tmp_path, monkeypatch, capsys):
    (tmp_path / "grid.yaml").write_text(GRID)
    monkeypatch.setattr(checkpoints, "save_file", no_space)
    out = tmp_path / "out"
    path = out / "mean_image" / "shapes-16px" / "s0" / "checkpoint" / "model.safetensors"
    assert_full(["sweep", tmp_path / "grid.yaml", "--out", out], path, capsys)
    assert not list(out.rglob("error.txt"))
    assert not (out / "pca").exists()


def test_files_that_the_system_cuts_short(tmp_path):
    """A limit on the size of files stands for a disk: libraries meet the real error."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
    code = limit + "import sys; from diffad_lite.cli.main import main; sys.exit(main(sys.argv[1:]))"
    done = run("-c", code, *TRAIN, "--out", tmp_path / "out")
    assert done.returncode == 2
    state = tmp_path / "out" / STATE
    assert done.stderr == f"diffad: {state}: file too large; check this path\n"
    assert [p.name for p in state.parent.iterdir()] == ["training.json"]
