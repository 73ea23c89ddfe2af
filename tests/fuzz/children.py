"""``diffad`` in child processes that a test interrupts or kills, and what they leave."""

import contextlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file

# Imports everything once. Each line of input is a call, made in a fork of the server, which prints
# the number of the child and later its exit code. The child writes down the first argument of each
# call of ``function``, and sends itself ``signal_name`` at call number ``count``.
SERVER = """
import importlib, json, os, signal, sys
import diffad_lite.experiments
from diffad_lite.cli.main import main
from diffad_lite.training import loop

def observe(function, count, signal_name, log):
    module, _, path = function.partition(":")
    owner = importlib.import_module(module)
    *inner, name = path.split(".")
    for part in inner:
        owner = getattr(owner, part)
    original, calls = getattr(owner, name), []

    def observed(*args, **kwargs):
        calls.append(args)
        with open(log, "a") as file:
            file.write(f"{args[0]}\\n")
        if len(calls) == count:
            os.kill(os.getpid(), getattr(signal, signal_name))
        return original(*args, **kwargs)

    setattr(owner, name, observed)

for line in sys.stdin:
    call = json.loads(line)
    child = os.fork()
    if not child:
        for stream, path in enumerate(call["streams"], 1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
        loop.SAVE_EVERY_SECONDS = call["save_every"]
        observe(*call["observe"])
        code = main(call["arguments"])
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
SHAPES = ("--dataset", "shapes", "--profile", "ci", "--image-size", "16", "--quiet")
N_STEPS = 12
DENOISER = (f"train.steps={N_STEPS}", "base_channels=8", "channel_mults=[1,2]")
SETTINGS = tuple(f"denoiser.{field}" for field in DENOISER)
ANODDPM = ["--method", "anoddpm", *SHAPES, "--set", "denoiser.attention_levels=[]"]
ANODDPM += [word for setting in SETTINGS for word in ("--set", setting)]
STATE = Path("state") / "diffusion.state.safetensors"
STEP = "diffad_lite.training.state:learning_rate_factor"  # called once in each training step


class Ended(NamedTuple):
    """A child that has ended: exit code, seconds, its streams, what was observed."""

    code: int
    seconds: float
    out: str
    err: str
    observed: list[str]


class Children:
    """Runs ``diffad`` in forks of the server, one at a time; ``folder`` gets streams and logs."""

    def __init__(self, server: subprocess.Popen, folder: Path) -> None:
        self.server, self.folder, self.n_calls = server, folder, 0

    def run(
        self,
        *arguments: object,
        function: str = STEP,
        count: int = 0,
        signal_name: str = "SIGKILL",
        save_every: float = 30,
        kill_after: float | None = None,
    ) -> Ended:
        """Run ``diffad`` and wait for its end.

        The child sends itself the signal at call number ``count`` of ``function`` (0 is never), or
        gets SIGKILL after ``kill_after`` seconds. It saves the training state every ``save_every``
        seconds, -1 after each step.
        """
        self.n_calls += 1
        paths = [str(self.folder / f"{self.n_calls}.{name}") for name in ("out", "err", "log")]
        Path(paths[2]).touch()
        call = {
            "arguments": [str(argument) for argument in arguments],
            "streams": paths[:2],
            "save_every": save_every,
            "observe": (function, count, signal_name, paths[2]),
        }
        self.server.stdin.write(json.dumps(call) + "\n")
        self.server.stdin.flush()
        child, started = int(self.server.stdout.readline()), time.monotonic()
        if kill_after is not None:
            time.sleep(kill_after)
            with contextlib.suppress(ProcessLookupError):  # it has ended before
                os.kill(child, signal.SIGKILL)
        code = int(self.server.stdout.readline())
        seconds = time.monotonic() - started
        out, err, log = (Path(path).read_text() if Path(path).exists() else "" for path in paths)
        return Ended(code, seconds, out, err, log.split())


def steps_saved(out: Path) -> int:
    """Return the step of the training state below ``out``; 0 without a state."""
    if not (out / STATE).exists():
        return 0
    with safe_open(out / STATE, framework="pt") as file:
        return json.loads(file.metadata()["numbers"])["step"]


def assert_same_model(out: Path, unbroken: Path) -> None:
    """Compare two run folders: the weights must be equal, bit for bit."""
    ours, theirs = (load_file(o / "checkpoint" / "model.safetensors") for o in (out, unbroken))
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
