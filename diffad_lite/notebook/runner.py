"""Run the notebook series with papermill, into copies; and what a notebook's set-up cell calls."""

import hashlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffad_lite.core.config import check_profile, config_hash, convert, unknown_name
from diffad_lite.core.files import check_writable, read_json, write_atomically, write_json

UNFINISHED = ".unfinished.json"  # beside the executed copies, until all notebooks have run


def resolve_profile(profile: str) -> str:
    """The profile to use: the environment variable ``DIFFAD_PROFILE`` if set, else ``profile``.

    nbval cannot inject parameters into a notebook; the variable is its way to choose one.

    Raises:
        ValueError: unknown profile.
    """
    profile = os.environ.get("DIFFAD_PROFILE") or profile
    check_profile(profile)
    return profile


def find_notebooks(folder: Path, only: Sequence[str] = ()) -> list[Path]:
    """Lessons in ``folder``, in order; ``only`` keeps those whose names start so.

    Raises:
        FileNotFoundError: no notebooks there.
        ValueError: an entry of ``only`` matches none.
    """
    paths = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    if not paths:
        raise FileNotFoundError(f"no notebooks in {folder}; run this in the repository's root")
    for name in only:
        if not any(p.name.startswith(name) for p in paths):
            raise unknown_name("notebook", name, [p.stem for p in paths])
    return [p for p in paths if not only or p.name.startswith(tuple(only))]


def run_notebooks(
    folder: Path, out: Path, *, parameters: Mapping[str, Any], only: Sequence[str] = ()
) -> list[str]:
    """Execute notebooks into ``out``, leaving the originals as they are.

    A copy appears in ``out`` when its notebook has come to an end, be it by an error. After an
    interruption the same call goes on with what was not finished, unless a notebook, a parameter
    or the package has changed. A call that came to its end leaves nothing to go on with: the next
    one executes everything anew.

    Args:
        folder: of the notebooks.
        out: where the executed copies go.
        parameters: papermill's, for every notebook that has a parameter of that name.
        only: starts of the names to run, e.g. ``("01",)``.

    Returns:
        one line for each notebook that failed.

    Raises:
        FileNotFoundError: no notebooks.
        ValueError: a parameter that no notebook has, an unknown profile, a broken notebook.
        OSError: ``out`` cannot be written, or the disk is full.
    """
    paths = find_notebooks(folder, only)
    known = {path: _parameter_names(path) for path in paths}
    everywhere = {name for names in known.values() for name in names}
    for name in parameters:
        if name not in everywhere:
            raise unknown_name("parameter", name, everywhere)
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
        chosen = {name: value for name, value in parameters.items() if name in known[path]}
        with _unattended():
            failure = _execute(path, out / path.name, chosen)
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
    """Kernels started inside know that nobody is there to move a slider."""
    before = os.environ.get("DIFFAD_STATIC")
    os.environ["DIFFAD_STATIC"] = "1"
    try:
        yield
    finally:
        os.environ.pop("DIFFAD_STATIC")
        if before is not None:
            os.environ["DIFFAD_STATIC"] = before


def _execute(path: Path, target: Path, parameters: Mapping[str, Any]) -> str | None:
    """Execute one notebook; what failed, if anything did. ``target`` is never half executed."""
    import papermill
    from nbclient.exceptions import DeadKernelError

    failures = []

    def execute(temporary: Path) -> None:
        try:
            papermill.execute_notebook(
                path, temporary, parameters, cwd=path.parent, progress_bar=True, log_output=False
            )
        except papermill.PapermillExecutionError as error:  # the copy shows it
            failures.append(f"{error.ename}: {error.evalue}")

    for left in target.parent.glob(f".{target.name}.*"):
        left.unlink()  # of a call that was killed
    try:
        write_atomically(target, execute)
    except DeadKernelError as error:
        failures.append(f"{error}; perhaps the memory did not suffice")
    return failures[0] if failures else None


def _parameter_names(path: Path) -> list[str]:
    """What papermill may set in a notebook."""
    import nbformat
    import papermill

    try:
        return list(papermill.inspect_notebook(path))
    except (nbformat.reader.NotJSONError, nbformat.ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} is not a notebook ({reason}); restore or remove it") from None


def _series_key(paths: Sequence[Path], parameters: Mapping[str, Any]) -> str:
    """Identifies what is executed: notebooks, parameters, and the code of this package."""
    files = [*paths, *sorted(Path(__file__).parents[1].rglob("*.py"))]
    digests = {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
    return config_hash({"parameters": dict(parameters), "files": digests})


def _finished_before(record: Path, key: str) -> list[str]:
    """The notebooks that an interrupted call of this very series has finished."""
    if not record.exists():
        return []
    values = read_json(record, "record of an interrupted run", "delete it")
    if not isinstance(values, dict) or values.get("key") != key:
        return []
    return list(convert(values.get("done"), tuple[str, ...], f"{record}: done"))
