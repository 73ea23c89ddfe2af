"""Helpers of the fuzz tests: inputs, sandbox, corruption of bytes.

The same rule holds for every area. The package either accepts an input, or refuses it with a
ValueError or an OSError whose message names the fault and its place. It never raises another
error, hangs, unpickles, starts a program, or writes outside the folder of the input.

300 inputs by default, ``DIFFAD_FUZZ=10000`` for more (``make fuzz``). An input depends on its area
and its number only, so that a short run has the first inputs of a long run.
"""

import os
import resource
import shutil
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import pytest

TOTAL = int(os.environ.get("DIFFAD_FUZZ", "300"))
INPUTS_OF_300 = {  # area -> its inputs in a run of 300
    "images": 45,
    "stacks": 15,
    "archives": 15,
    "tables": 15,
    "folders": 15,
    "metrics": 50,
    "weights": 30,
    "configurations": 25,
    "states": 15,
    "records": 25,
    "grids": 20,
    "arguments": 15,
    "trees": 15,
}
N_KILLS = min(100, TOTAL // 60)  # 5 for 300 inputs, 100 for 10,000
MAX_SECONDS = 60  # for one input, on a busy machine
MAX_EXTRA_MEMORY = 3 * 2**30  # bytes for one input, beyond what the process already uses
MAX_MESSAGE = 1000  # characters, without the path of the folder
T = TypeVar("T")


def n_inputs(area: str) -> int:
    """Return the number of inputs of an area; all areas together have ``TOTAL``."""
    ends = np.cumsum([0, *INPUTS_OF_300.values()]) * TOTAL // 300
    index = list(INPUTS_OF_300).index(area)
    return int(ends[index + 1] - ends[index])


class InputTimeout(BaseException):
    """An input took more than ``MAX_SECONDS``."""


class ForbiddenAction(BaseException):
    """An input made the package unpickle, start a program, or write outside its folder."""


sandbox: list[Path] = []  # the folder of the current input, if there is one
WRITE_EVENTS = {  # audit event -> index of its path, index of the folder descriptor it starts from
    "open": (0, None),
    "os.mkdir": (0, 2),
    "os.rename": (1, 3),
    "os.remove": (0, 1),
    "os.rmdir": (0, 1),
    "os.symlink": (1, 2),
    "os.link": (1, 3),
}
FORBIDDEN = {"pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "socket.connect"}


def audit(event: str, details: tuple) -> None:
    """Raise ForbiddenAction inside :func:`sandboxed`.

    An audit hook cannot be removed, so it does nothing outside the sandbox.
    """
    if not sandbox:
        return
    if event in FORBIDDEN:
        raise ForbiddenAction(f"{event} {details[:2]}")
    if event in WRITE_EVENTS:
        if event == "open" and not (details[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        path_index, descriptor_index = WRITE_EVENTS[event]
        target = details[path_index]
        if isinstance(target, int) or os.fspath(target) in (os.devnull, b"/dev/null"):
            return
        if descriptor_index is not None and details[descriptor_index] not in (-1, None):
            if not os.path.exists("/proc/self/fd"):  # shutil.rmtree works with descriptors
                return
            folder = os.readlink(f"/proc/self/fd/{details[descriptor_index]}")
            target = os.path.join(folder, os.fsdecode(target))
        path = Path(os.path.abspath(os.fsdecode(target)))
        if not path.is_relative_to(sandbox[0]):
            raise ForbiddenAction(f"{event} {path}")


@contextmanager
def sandboxed(folder: Path) -> Iterator[None]:
    """Limit time, memory and actions; writing is allowed below ``folder`` only."""

    def stop(number: int, frame: object) -> None:
        raise InputTimeout(f"not done after {MAX_SECONDS} s")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    previous_handler = signal.signal(signal.SIGUSR1, stop)
    main_thread = threading.main_thread().ident
    timer = threading.Timer(MAX_SECONDS, signal.pthread_kill, (main_thread, signal.SIGUSR1))
    timer.daemon = True
    timer.start()
    statm = Path("/proc/self/statm")
    if statm.exists():
        used = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MAX_EXTRA_MEMORY, hard))
    sandbox.append(folder)
    try:
        yield
    finally:
        sandbox.clear()
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        timer.cancel()
        signal.signal(signal.SIGUSR1, previous_handler)


class Case(NamedTuple):
    """One input.

    A refusal must contain one of ``expected_words``. It may also be one of ``other_errors``, beside
    ValueError and OSError.
    """

    description: str
    action: Callable[[], object]
    expected_words: tuple[object, ...]
    other_errors: tuple[type[Exception], ...] = ()


def check_inputs(
    area: str, tmp_path: Path, make_case: Callable[[np.random.Generator, Path], Case]
) -> None:
    """Try every input of an area, each in a new folder.

    Fails if an input breaks the rule, or if all of 15 or more inputs were accepted, or refused.
    """
    faults, n_accepted, n_refused = [], 0, 0
    seed, total = list(INPUTS_OF_300).index(area), n_inputs(area)
    for number in range(total):
        folder = tmp_path / f"{number}"
        folder.mkdir()
        case = make_case(np.random.default_rng([seed, number]), folder)
        label = f"{number} ({case.description})"
        try:
            with sandboxed(folder):
                case.action()
            n_accepted += 1
        except (ValueError, OSError, *case.other_errors) as error:
            n_refused += 1
            name = type(error).__name__
            message = f"{error} {getattr(error, 'filename', None) or ''}"
            if not any(str(word) in message for word in case.expected_words):
                faults.append(f"{label}: {name} names no place: {error}")
            if len(message.replace(str(folder), "")) > MAX_MESSAGE:
                faults.append(f"{label}: the message of {name} has {len(message)} characters")
        except (Exception, InputTimeout, ForbiddenAction) as error:
            faults.append(f"{label}: {type(error).__name__}: {error}"[:600])
        shutil.rmtree(folder, ignore_errors=True)
    print(f"{area}: {n_accepted} accepted, {n_refused} refused")
    if faults:
        lines = "\n".join(faults[:20])
        pytest.fail(f"{len(faults)} of {total} inputs of {area!r}:\n{lines}", pytrace=False)
    assert total < 15 or (n_accepted and n_refused), f"{n_accepted} accepted, {n_refused} refused"


def choose(rng: np.random.Generator, values: Iterable[T]) -> T:
    """Draw one of the values; unlike ``rng.choice`` it keeps their types."""
    values = list(values)
    return values[int(rng.integers(len(values)))]


def corrupt(rng: np.random.Generator, data: bytes) -> bytes:
    """Cut, flip, overwrite, repeat or delete bytes, more often near the beginning."""
    out = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        if not out:
            break
        at = int(len(out) * rng.random() ** choose(rng, (1, 3)))
        length = int(rng.integers(1, 17))
        ways = ("cut", "flip", "flip", "flip", "noise", "edge", "delete", "repeat", "nothing")
        match choose(rng, ways):
            case "cut":
                del out[at:]
            case "flip":
                out[at] ^= 1 << int(rng.integers(8))
            case "noise":
                out[at : at + length] = rng.bytes(length)
            case "edge":
                out[at : at + length] = choose(rng, (b"\0", b"\xff", b"\x7f", b"\x80")) * length
            case "delete":
                del out[at : at + length]
            case "repeat":
                out[at:at] = out[at : at + 8 * length]
    return bytes(out)


# Calls os.system when it is unpickled.
PICKLE = b"cos\nsystem\n(S'false'\ntR."
FILE_NAMES = (
    *("a b", "é ö ß", "画像", "Ω≈ç√∫", "🔥", "x$y_1$z", "$", "50%", "{0}", "%s%n", "'\"`", "-r"),
    *("--help", "tab\there", "line\nbreak", "a\\b", "e\u0301", "a\u202eb", "comma,semi;"),
    *("a" * 200, ".. ", "con", "[ab]*?"),
)
