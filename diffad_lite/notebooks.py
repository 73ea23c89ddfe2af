"""Run the notebook series with papermill, into copies; and what a notebook's set-up cell calls."""

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from diffad_lite.config import Profile, unknown_name


def resolve_profile(profile: str) -> str:
    """The profile to use: the environment variable ``DIFFAD_PROFILE`` if set, else ``profile``.

    nbval cannot inject parameters into a notebook; the variable is its way to choose one.

    Raises:
        ValueError: unknown profile.
    """
    profile = os.environ.get("DIFFAD_PROFILE") or profile
    if profile not in get_args(Profile):
        raise unknown_name("profile", profile, get_args(Profile))
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

    Args:
        folder: of the notebooks.
        out: where the executed copies go.
        parameters: papermill's, for every notebook that has a parameter of that name.
        only: starts of the names to run, e.g. ``("01",)``.

    Returns:
        one line for each notebook that failed.
    """
    import papermill

    paths = find_notebooks(folder, only)
    known = {path: papermill.inspect_notebook(path) for path in paths}
    everywhere = {name for names in known.values() for name in names}
    for name in parameters:
        if name not in everywhere:
            raise unknown_name("parameter", name, everywhere)
    out.mkdir(parents=True, exist_ok=True)
    os.environ["DIFFAD_STATIC"] = "1"  # nobody is there to move a slider
    failures = []
    for path in paths:
        chosen = {name: value for name, value in parameters.items() if name in known[path]}
        print(f"{path.name} ...", flush=True)
        started = time.monotonic()
        try:
            papermill.execute_notebook(
                path, out / path.name, chosen, cwd=folder, progress_bar=True, log_output=False
            )
        except papermill.PapermillExecutionError as error:
            failures.append(f"{path.name}: {error.ename}: {error.evalue}")
            print(f"{path.name} failed: {error.ename}: {error.evalue}", flush=True)
            continue
        print(f"{path.name} took {time.monotonic() - started:.0f} s: {out / path.name}", flush=True)
    return failures
