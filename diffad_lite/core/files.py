"""Write files completely or not at all; read JSON, YAML and CSV with errors that name the file.

Also: where the data and the lessons of the course are.
"""

import csv
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

LARGEST_YAML = 100_000  # entries; those behind an alias count once per use


def course_dir() -> Path:
    """Return the folder that holds ``data/`` and ``notebooks/`` of the course.

    In a checkout it is the repository, even if installed with ``pip install -e .``. A wheel has a
    copy of both inside the package.
    """
    package = Path(__file__).resolve().parents[1]
    installed = package / "course"
    return installed if installed.is_dir() else package.parent


def data_dir() -> Path:
    """Return the folder ``data/`` with the bundled checkpoints and results.

    It is the environment variable ``DIFFAD_DATA``, else the folder of the repository or of the
    installed wheel, so the working directory does not matter.

    Raises:
        FileNotFoundError: that folder does not exist, or has no ``checkpoints/``.
    """
    folder = Path(os.environ.get("DIFFAD_DATA") or course_dir() / "data")
    if not (folder / "checkpoints").is_dir():
        raise FileNotFoundError(
            f"no data folder at {folder}; install the wheel, or the repository with "
            "'pip install -e .', or set DIFFAD_DATA to the data/ folder of the repository"
        )
    return folder


def check_writable(folder: Path) -> None:
    """Check that files can be written below ``folder``, which need not exist; create nothing.

    Raises:
        NotADirectoryError: ``folder``, or a part of its path, is a file.
        PermissionError: ``folder``, or the nearest parent that exists, cannot be written.
    """
    parent = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not parent.is_dir():
        raise NotADirectoryError(f"{parent} is a file, not a folder; choose another output folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(f"{parent} cannot be written; choose another output folder")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Make errors of the operating system inside the block name ``path``.

    Otherwise they would name a temporary file, or no file.
    """
    try:
        yield
    except FileNotFoundError:  # it names the file to read
        raise
    except (OSError, SafetensorError) as error:
        match = re.search(r"os error (\d+)", str(error))  # in messages of safetensors
        number = int(match[1]) if match else getattr(error, "errno", None)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then rename it to ``path``.

    So ``path`` is always complete, even if the process is killed while it writes.

    Raises:
        OSError: the disk is full, or the folder cannot be written; its ``filename`` is ``path``.
    """
    check_writable(path.parent)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{path.suffix}")
        try:
            temporary.touch(exist_ok=False)
            mode = temporary.stat().st_mode  # as the umask allows
            write(temporary)
            temporary.chmod(mode)  # safetensors makes its files private
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder; after the block, move what is in it into ``folder``.

    Files and folders move in the order of their names; each replaces the old one of its name as a
    whole. If the block fails, ``folder`` keeps what it holds.

    Raises:
        OSError: the disk is full, or ``folder`` cannot be written; its ``filename`` is the final
            path.
    """
    check_writable(folder)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        stage = folder / f".new.{secrets.token_hex(4)}"
        stage.mkdir()
    try:
        yield stage
        for path in sorted(stage.iterdir()):
            _replace(folder / path.name, path)
    except OSError as error:
        if error.filename is not None:
            error.filename = str(error.filename).replace(str(stage), str(folder))
        raise
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _replace(target: Path, new: Path) -> None:
    """Move ``new`` to ``target``; a folder cannot replace another: move the old one aside."""
    aside = new.with_name(f"{new.name}.old")
    try:
        if new.is_dir() and target.exists():
            target.replace(aside)
        new.replace(target)
    finally:
        if aside.exists() and not target.exists():  # interrupted between the two
            aside.replace(target)


def write_json(path: Path, values: Any) -> None:
    """Write JSON atomically, indented, keys in the given order."""
    text = json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(path, lambda p: p.write_text(text, encoding="utf-8"))


def read_json(path: Path, what: str, fix: str = "") -> Any:
    """Read JSON.

    Args:
        path: of the file.
        what: name of the file's content in error messages.
        fix: end of error messages: how to fix the error.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not JSON.
    """
    fix = f"; {fix}" if fix else ""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"no {what} at {path}{fix}") from None
    except (ValueError, RecursionError) as error:  # also for too many digits, or not text
        raise ValueError(f"{path} is not a readable {what}: {error}{fix}") from None


def read_yaml(path: Path) -> Any:
    """Read YAML: plain values only.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML, or very large or infinite because of aliases.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        size = _entries(values, {})
    except OSError:
        raise
    except Exception as error:  # PyYAML raises errors of many types for malformed values
        words = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"{path} is not valid YAML: {words}; correct it there") from None
    if size > LARGEST_YAML:
        raise ValueError(f"{path} has {size} entries, most of them by aliases; write it plainly")
    return values


def _entries(value: Any, known: dict[int, float]) -> float:
    """Return the number of values, nested ones included; infinity if a value contains itself."""
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
        ValueError: not UTF-8 text, or not a table.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            return list(csv.reader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is not a readable table: {error}; save it as UTF-8") from None


def write_rows(path: Path, rows: Iterable[Sequence[Any]]) -> None:
    """Write a table of comma-separated values atomically; the first row is the header.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)

    write_atomically(path, write)
