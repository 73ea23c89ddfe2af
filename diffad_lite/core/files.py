"""Files: written complete or not at all; JSON, YAML and CSV whose errors name the file."""

import csv
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

LARGEST_YAML = 100_000  # entries, those behind an alias as often as they are meant


def check_writable(folder: Path) -> None:
    """Check that files can be written below ``folder``, which need not exist; creates nothing.

    Raises:
        NotADirectoryError: it, or a part of its path, is a file.
        PermissionError: it, or the folder in which it would be made, cannot be written.
    """
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{there} is a file, not a folder; choose another output folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"{there} cannot be written; choose another output folder")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Errors of the operating system inside name ``path``, not a temporary file or nothing."""
    try:
        yield
    except FileNotFoundError:  # it names what was to be read
        raise
    except (OSError, SafetensorError) as error:
        stated = re.search(r"os error (\d+)", str(error))  # as safetensors words it
        number = int(stated[1]) if stated else getattr(error, "errno", None)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then rename it into place.

    A reader, or a process that is killed half-way, never leaves or meets half a file.

    Raises:
        OSError: the disk is full, or the place cannot be written; its ``filename`` is ``path``.
    """
    check_writable(path.parent)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{path.name}."
        handle, name = tempfile.mkstemp(prefix=prefix, suffix=path.suffix, dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            write(temporary)
            temporary.chmod(0o644)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, values: Any) -> None:
    """Write JSON atomically, indented, keys in the given order."""
    text = json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(path, lambda p: p.write_text(text, encoding="utf-8"))


def read_json(path: Path, what: str, fix: str = "") -> Any:
    """Read JSON; a missing or broken file raises an error that names ``what`` it should be.

    Args:
        path: of the file.
        what: it should be.
        fix: what a reader of the error can do.
    """
    fix = f"; {fix}" if fix else ""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"no {what} at {path}{fix}") from None
    except (ValueError, RecursionError) as error:  # also of too many digits, or no text
        raise ValueError(f"{path} is not a readable {what}: {error}{fix}") from None


def read_yaml(path: Path) -> Any:
    """Read YAML: plain values only.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML, or aliases that make it very large or endless.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        size = _entries(values, {})
    except OSError:
        raise
    except Exception as error:  # values of a wrong form escape PyYAML as they come
        words = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"{path} is not valid YAML: {words}; correct it there") from None
    if size > LARGEST_YAML:
        raise ValueError(f"{path} has {size} entries, most of them by aliases; write it plainly")
    return values


def _entries(value: Any, known: dict[int, float]) -> float:
    """How many values there are, all levels together; infinitely many where one holds itself."""
    if not isinstance(value, (dict, list, tuple, set)):
        return 1
    if id(value) not in known:
        known[id(value)] = math.inf  # until its parts are counted
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_entries(part, known) for part in parts)
    return known[id(value)]


def read_rows(path: Path) -> list[list[str]]:
    """Read a table of comma-separated values.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not text in UTF-8, or not a table.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            return list(csv.reader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is not a readable table: {error}; save it as UTF-8") from None


def write_rows(path: Path, rows: Iterable[Sequence[Any]]) -> None:
    """Write a table of comma-separated values, complete or not at all; the first row is its head.

    Raises:
        OSError: the disk is full, or the place cannot be written.
    """

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)

    write_atomically(path, write)
