"""The runs of a grid several at a time, on Dask: on this machine, or on any cluster.

What a run is, what is skipped, and where it goes on after an interruption is as in :mod:`.grid`;
only who runs it changes. A worker that dies is replaced, and its run goes on from its last state.
"""

import os
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffad_lite.core.files import check_writable
from diffad_lite.experiments.grid import Grid, attempt, folder_of, trainings
from diffad_lite.experiments.run import Run

PATIENCE = 10  # seconds that a scheduler has to answer


def sweep_on_dask(
    grid: Grid, out: str | Path, *, scheduler: str | None = None, workers: int = 1
) -> list[str]:
    """Run a grid on Dask; finished scorings are skipped, an interrupted training goes on.

    AnoDDPM's trainings come first: other methods take them over.

    Args:
        grid: see :mod:`.grid`.
        out: folder of the runs, which all workers must see under this name.
        scheduler: address of a running one, such as ``tcp://10.0.0.1:8786``, whose workers have
            this package; None starts workers on this machine.
        workers: how many; each takes its share of this machine's cores.

    Returns:
        one line for each failure; each also stands in ``error.txt`` of its folder.

    Raises:
        ImportError: Dask is not installed.
        OSError: no scheduler at that address, or ``out`` cannot be written.
        ValueError: a run that cannot be, or less than one worker.
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    out, failures = Path(out), []
    check_writable(out)
    jobs = defaultdict(list)
    for run, own in trainings(grid):
        jobs[folder_of(run, out)].append((own, run))  # what shares a training is one job
    first = [folder for folder, pairs in jobs.items() if pairs[0][1].method == "anoddpm"]
    threads = max(1, _cores() // workers) if scheduler is None else None
    with _client(scheduler, workers) as client:
        done = 0
        for wave in (first, [folder for folder in jobs if folder not in first]):
            for folder, lines in _completed(client, {f: jobs[f] for f in wave}, out, threads):
                done += 1
                state = "failed" if lines else "done"
                print(f"[{done}/{len(jobs)}] {folder.relative_to(out)}: {state}", flush=True)
                failures += lines
    return failures


def _completed(
    client: Any, jobs: dict[Path, list[tuple[Grid, Run]]], out: Path, threads: int | None
) -> Iterator[tuple[Path, list[str]]]:
    """Submit jobs; the folder of each as it ends, with its failures."""
    from distributed import as_completed

    folders = {}
    for folder, pairs in jobs.items():
        # What is run again may have failed before, hence not "pure".
        folders[client.submit(_work, pairs, out, Path.cwd(), threads, pure=False)] = folder
    for future in as_completed(folders):
        folder, error = folders[future], future.exception()
        # attempt() catches what a run raises; this is Dask's own, such as three dead workers.
        yield folder, [f"{folder}: {type(error).__name__}: {error}"] if error else future.result()


def _work(pairs: list[tuple[Grid, Run]], out: Path, cwd: Path, threads: int | None) -> list[str]:
    """Runs of one folder, in a worker; their failures."""
    import torch

    os.chdir(cwd)  # relative paths mean there what they mean here
    torch.set_num_threads(threads or _cores())  # Dask asks libraries for one
    return [line for own, run in pairs for line in attempt(own, run, out, progress=False)]


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _client(scheduler: str | None, workers: int) -> Iterator[Any]:
    """A client of the scheduler, or of a cluster on this machine that ends with it."""
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
