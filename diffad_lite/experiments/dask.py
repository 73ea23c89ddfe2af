"""Several runs of a grid at a time, on Dask: on this machine, or on any cluster.

Runs, what is skipped and how a training resumes are as in :mod:`.grid`; only who runs it changes.
A worker that dies is replaced, and its run resumes from its last saved state.
"""

import os
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffad_lite.core.files import check_writable
from diffad_lite.experiments.grid import Grid, attempt, check_distinct, folder_of, trainings
from diffad_lite.experiments.run import Run

PATIENCE = 10  # seconds to wait for a scheduler's answer


def sweep_on_dask(
    grid: Grid, out: str | Path, *, scheduler: str | None = None, workers: int = 1
) -> list[str]:
    """Run a grid on Dask: skip finished scorings, resume an interrupted training.

    AnoDDPM's trainings come first, because other methods copy them.

    Args:
        grid: see :mod:`.grid`.
        out: folder of the runs, which all workers must see under this name.
        scheduler: address of a running scheduler, such as ``tcp://10.0.0.1:8786``, whose workers
            have this package; None starts workers on this machine.
        workers: number of workers on this machine, which divide its cores between them.

    Returns:
        one line for each failure; its traceback is in ``error.txt`` of the run's folder.

    Raises:
        ImportError: Dask is not installed.
        OSError: no scheduler at that address, or ``out`` cannot be written.
        ValueError: impossible fields of a run, two runs of one name, or fewer than one worker.
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    out, failures = Path(out), []
    check_writable(out)
    check_distinct(grid)
    jobs = defaultdict(list)
    for run, entry_grid in trainings(grid):
        jobs[folder_of(run, out)].append((entry_grid, run))  # a shared training is one job
    priors = {f: pairs for f, pairs in jobs.items() if pairs[0][1].method == "anoddpm"}
    others = {f: pairs for f, pairs in jobs.items() if f not in priors}
    threads = max(1, _cores() // workers) if scheduler is None else None
    with _client(scheduler, workers) as client:
        ended = (end for wave in (priors, others) for end in _completed(client, wave, out, threads))
        for i, (folder, lines) in enumerate(ended, 1):
            state = "failed" if lines else "done"
            print(f"[{i}/{len(jobs)}] {folder.relative_to(out)}: {state}", flush=True)
            failures += lines
    return failures


def _completed(
    client: Any, jobs: dict[Path, list[tuple[Grid, Run]]], out: Path, threads: int | None
) -> Iterator[tuple[Path, list[str]]]:
    """Submit jobs; yield the folder of each as it ends, with its failures."""
    from distributed import as_completed

    folders = {}
    for folder, pairs in jobs.items():
        # Not "pure": Dask would return the cached failure of an earlier call.
        folders[client.submit(_work, pairs, out, Path.cwd(), threads, pure=False)] = folder
    for future in as_completed(folders):
        folder, error = folders[future], future.exception()
        # attempt() catches the errors of a run; this one is Dask's, such as three dead workers.
        yield folder, [f"{folder}: {type(error).__name__}: {error}"] if error else future.result()


def _work(pairs: list[tuple[Grid, Run]], out: Path, cwd: Path, threads: int | None) -> list[str]:
    """Make the runs of one folder, in a worker; return their failures."""
    import torch

    os.chdir(cwd)  # so that relative paths mean the same in the worker
    torch.set_num_threads(threads or _cores())  # Dask limits libraries to one
    return [line for grid, run in pairs for line in attempt(grid, run, out, progress=False)]


def _cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _client(scheduler: str | None, workers: int) -> Iterator[Any]:
    """Yield a client of the scheduler, or of a new cluster here that ends with the client."""
    try:
        from distributed import Client, LocalCluster
    except ImportError:
        raise ImportError(
            "Dask is not installed; run pip install 'dask' 'distributed', or sweep without it"
        ) from None
    if scheduler is not None:
        try:
            client = Client(scheduler, timeout=PATIENCE)
        except (OSError, ValueError) as error:
            raise ConnectionError(
                f"no Dask scheduler at {scheduler} ({error}); start one with 'dask scheduler'"
            ) from None
        with client:
            yield client
        return
    with (
        tempfile.TemporaryDirectory() as scratch,
        LocalCluster(
            n_workers=workers,
            threads_per_worker=1,  # one run at a time; its threads are torch's
            dashboard_address=None,
            local_directory=scratch,
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client
