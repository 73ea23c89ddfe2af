"""Copy the lessons; execute copies with papermill; choose the profile of a notebook."""

import hashlib
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from diffad_lite.core.config import check_profile, config_hash, convert, unknown_name
from diffad_lite.core.files import check_writable, read_json, write_atomically, write_json

UNFINISHED = ".unfinished.json"  # beside the executed copies, until all notebooks are executed


def resolve_profile(profile: str) -> str:
    """Return the environment variable ``DIFFAD_PROFILE`` if it is set, else ``profile``.

    The variable is for nbval, which cannot set the parameters of a notebook.

    Raises:
        ValueError: unknown profile.
    """
    profile = os.environ.get("DIFFAD_PROFILE") or profile
    check_profile(profile)
    return profile


def find_notebooks(folder: Path, only: Sequence[str] = ()) -> list[Path]:
    """Return the lessons in ``folder``, in order; ``only`` keeps those whose names start so.

    Raises:
        FileNotFoundError: ``folder`` has no notebooks.
        ValueError: an entry of ``only`` matches no notebook.
    """
    paths = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    if not paths:
        raise FileNotFoundError(
            f"no notebooks in {folder}; run this in the repository's root, or write the lessons "
            f"with 'diffad notebooks --copy {folder}' first"
        )
    for name in only:
        if not any(p.name.startswith(name) for p in paths):
            raise unknown_name("notebook", name, [p.stem for p in paths])
    return [p for p in paths if not only or p.name.startswith(tuple(only))]


def copy_notebooks(folder: Path, target: Path, only: Sequence[str] = ()) -> list[Path]:
    """Copy lessons with their exercises and solutions, as they are, and return the copies.

    Args:
        folder: of the lessons, with ``exercises/`` and ``solutions/``.
        target: folder of the copies; it may exist.
        only: first characters of the names to copy, e.g. ``("01",)``.

    Raises:
        FileNotFoundError: ``folder`` has no lessons.
        FileExistsError: ``target`` has a file of the same name; then nothing is copied.
        ValueError: an entry of ``only`` matches no lesson.
        OSError: ``target`` cannot be written, or the disk is full.
    """
    if not folder.is_dir():
        fix = "install diffad_lite from its wheel or its repository"
        raise FileNotFoundError(f"no lessons at {folder}; {fix}")
    names = [path.name for path in find_notebooks(folder, only)]
    check_writable(target)
    parts = [Path(kind, name) for kind in (".", "exercises", "solutions") for name in names]
    if existing := [part for part in parts if os.path.lexists(target / part)]:
        raise FileExistsError(
            f"{target} already has {len(existing)} of {len(parts)} notebooks, e.g. {existing[0]}; "
            "choose another folder: your work in them would be lost"
        )
    for part in parts:
        write_atomically(target / part, partial(shutil.copyfile, folder / part))
    return [target / part for part in parts]


def run_notebooks(
    folder: Path, out: Path, *, parameters: Mapping[str, Any], only: Sequence[str] = ()
) -> list[str]:
    """Execute copies of notebooks in ``out``; the originals do not change.

    A copy appears in ``out`` when its notebook has finished or failed. After an interruption, the
    same call continues with the unfinished notebooks, unless a notebook, a parameter or the package
    has changed. After a complete call, the next one executes all notebooks again.

    Args:
        folder: of the notebooks.
        out: folder of the executed copies.
        parameters: papermill's, for every notebook that has a parameter of that name.
        only: first characters of the names to run, e.g. ``("01",)``.

    Returns:
        one line for each notebook that failed.

    Raises:
        FileNotFoundError: ``folder`` has no notebooks.
        ValueError: a parameter that no notebook has, an unknown profile, a broken notebook.
        OSError: ``out`` cannot be written, or the disk is full.
    """
    paths = find_notebooks(folder, only)
    names_of = {path: _parameter_names(path) for path in paths}
    known = set().union(*names_of.values())
    for name in parameters:
        if name not in known:
            raise unknown_name("parameter", name, known)
    check_profile(parameters.get("profile", "lite"))
    check_writable(out)
    record, key, failures = out / UNFINISHED, _series_key(paths, parameters), []
    done = _finished_before(record, key)
    for path in paths:
        if path.name in done and (out / path.name).exists():
            print(f"{path.name}: finished before the interruption", flush=True)
            continue
        print(f"{path.name} ...", flush=True)
        started = time.monotonic()
        values = {name: value for name, value in parameters.items() if name in names_of[path]}
        with _unattended():
            failure = _execute(path, out / path.name, values)
        if failure:
            failures.append(f"{path.name}: {failure}")
            print(f"{path.name} failed: {failure}", flush=True)
            continue
        print(f"{path.name} took {time.monotonic() - started:.0f} s: {out / path.name}", flush=True)
        done.append(path.name)
        write_json(record, {"key": key, "done": done})
    record.unlink(missing_ok=True)
    return failures


@contextmanager
def _unattended() -> Iterator[None]:
    """Tell kernels that are started inside that nobody can move a slider."""
    before = os.environ.get("DIFFAD_STATIC")
    os.environ["DIFFAD_STATIC"] = "1"
    try:
        yield
    finally:
        del os.environ["DIFFAD_STATIC"]
        if before is not None:
            os.environ["DIFFAD_STATIC"] = before


def _execute(path: Path, target: Path, parameters: Mapping[str, Any]) -> str | None:
    """Execute a notebook and return its error, or None; ``target`` is written complete."""
    import papermill
    from nbclient.exceptions import DeadKernelError

    failures = []

    def execute(temporary: Path) -> None:
        try:
            papermill.execute_notebook(
                path, temporary, parameters, cwd=path.parent, progress_bar=True, log_output=False
            )
        except papermill.PapermillExecutionError as error:  # the copy shows the traceback
            failures.append(f"{error.ename}: {error.evalue}")

    for temporary in target.parent.glob(f".{target.name}.*"):
        temporary.unlink()  # of a call that was killed
    try:
        write_atomically(target, execute)
    except DeadKernelError as error:
        failures.append(f"{error}; perhaps out of memory: use a smaller profile")
    return failures[0] if failures else None


def _parameter_names(path: Path) -> list[str]:
    """Return the names of a notebook's parameters, which papermill can set."""
    import nbformat
    import papermill

    try:
        return list(papermill.inspect_notebook(path))
    except (nbformat.reader.NotJSONError, nbformat.ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} is not a notebook ({reason}); restore or remove it") from None


def _series_key(paths: Sequence[Path], parameters: Mapping[str, Any]) -> str:
    """Return a hash of what is executed: notebooks, parameters, and the code of this package."""
    files = [*paths, *sorted(Path(__file__).parents[1].rglob("*.py"))]
    digests = {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
    return config_hash({"parameters": dict(parameters), "files": digests})


def _finished_before(record: Path, key: str) -> list[str]:
    """Return the notebooks that an interrupted call with the same key has finished."""
    if not record.exists():
        return []
    values = read_json(record, "record of an interrupted run", "delete it")
    if not isinstance(values, dict) or values.get("key") != key:
        return []
    return list(convert(values.get("done"), tuple[str, ...], f"{record}: done"))
