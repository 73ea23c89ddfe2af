"""What each sub-command of ``diffad`` does; torch is imported only when work starts."""

import argparse
import json
import math
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffad_lite.experiments.run import Run


def say(what: object) -> None:
    """One line on stderr, whatever line breaks a library or a file name has put into it."""
    print("diffad:", " ".join(str(what).splitlines()), file=sys.stderr)


def _run_of(arguments: argparse.Namespace) -> "Run":
    from diffad_lite.experiments.run import Run

    settings = {}
    for assignment in arguments.set:
        key, separator, value = assignment.partition("=")
        if not separator:
            raise ValueError(f"--set takes KEY=VALUE, got {assignment!r}")
        settings[key] = value
    names = ("method", "dataset", "category", "root", "image_size", "resize", "plant", "profile")
    values = {name: getattr(arguments, name) for name in (*names, "seed", "variant")}
    return Run(**values, settings=settings)


def _budget(arguments: argparse.Namespace) -> float | None:
    minutes = arguments.max_minutes
    if minutes is not None and not 0 < 60 * minutes < math.inf:
        raise ValueError(f"--max-minutes takes a number above 0, got {minutes}; or leave it out")
    return None if minutes is None else 60 * minutes


def _method_of(checkpoint: str | None) -> str:
    """The method of a checkpoint's folder."""
    from diffad_lite.methods.checkpoints import read_record

    if checkpoint in (None, "bundled"):
        raise ValueError("--method is missing; 'diffad methods' lists them")
    return read_record(Path(checkpoint))["method"]


def evaluate(arguments: argparse.Namespace) -> int:
    """Train or load, score, record."""
    from diffad_lite.data.datasets import bundled_checkpoints
    from diffad_lite.experiments.evaluate import bundled_checkpoint, evaluate

    checkpoint = arguments.checkpoint
    if arguments.method is None:
        arguments.method = _method_of(checkpoint)
    run = _run_of(arguments)
    if checkpoint == "bundled":
        checkpoint = bundled_checkpoint(run.method, run.dataset, run.category)
        if not checkpoint.is_dir():
            raise ValueError(
                f"no weights are bundled for {checkpoint.name}, only for: "
                f"{', '.join(bundled_checkpoints())}; "
                "leave --checkpoint out to train"
            )
    result = evaluate(
        run,
        arguments.out,
        checkpoint=checkpoint,
        budget=_budget(arguments),
        save_maps=arguments.maps,
        progress=not arguments.quiet,
    )
    low, high = result["image_auroc_ci"]
    print(f"image AUROC {result['image_auroc']:.3f}, 95 % interval {low:.3f} to {high:.3f}")
    if result["aupro"] is not None:
        print(f"pixel AUROC {result['pixel_auroc']:.3f}, AUPRO {result['aupro']:.3f}")
    print(f"record: {arguments.out / 'result.json'}")
    return 0


def score(arguments: argparse.Namespace) -> int:
    """Score images that have no labels."""
    from diffad_lite.data.images import list_images
    from diffad_lite.experiments.unlabelled import score_folder, survey
    from diffad_lite.methods.base import load_pretrained
    from diffad_lite.methods.checkpoints import read_record

    method = load_pretrained(arguments.checkpoint)
    resize = read_record(arguments.checkpoint).get("resize", "squash")
    rows = score_folder(method, arguments.images, arguments.out, resize=resize)
    for warning in survey(list_images(arguments.images)).warnings(training=False):
        say(f"warning: {warning}")
    for row in rows[:10]:
        print(f"{row['image_score']:10.4g}  {'ALARM' if row['alarm'] else '':5}  {row['file']}")
    alarms = sum(row["alarm"] for row in rows)
    print(f"{alarms} of {len(rows)} images lie above the threshold {method.threshold_:.4g}")
    print(f"all scores: {arguments.out / 'scores.csv'}")
    return 0


def train(arguments: argparse.Namespace) -> int:
    """Train, and keep the checkpoint."""
    from diffad_lite.experiments.evaluate import bundle, train
    from diffad_lite.training import processes

    run = _run_of(arguments)
    data = run.load_data()
    progress = not arguments.quiet
    method = train(run, data, arguments.out, budget=_budget(arguments), progress=progress)
    if processes.rank() > 0:
        return 0
    for stage, report in method.reports_.items():
        print(f"{stage}: {report['steps']:.0f} steps in {report['seconds']:.0f} s")
    print(f"checkpoint: {arguments.out / 'checkpoint'}")
    if arguments.bundle:
        words = ["--method", run.method, "--dataset", run.dataset, "--seed", str(run.seed)]
        words += ["--category", data.info["category"], "--profile", run.profile]
        words += ["--image-size", str(run.image_size), "--resize", run.resize]
        words += [] if run.root is None else ["--root", "ROOT"]  # where it lies is not told
        if arguments.max_minutes is not None:
            words += ["--max-minutes", str(arguments.max_minutes)]
        words += [word for pair in arguments.set for word in ("--set", pair)]
        command = shlex.join(["diffad", "train", *words, "--out", "runs/bundle", "--bundle"])
        print(f"bundled: {bundle(run, data, method, command=command)}")
    return 0


def datasets(arguments: argparse.Namespace) -> int:
    """List data sets, or show what one holds."""
    from diffad_lite.data.datasets import load_dataset
    from diffad_lite.data.readers import READERS

    if arguments.dataset is None:
        for name, reader in READERS.items():
            print(f"{name:8} {(reader.__doc__ or '').splitlines()[0]}")
        return 0
    data = load_dataset(
        arguments.dataset,
        arguments.category,
        root=arguments.root,
        image_size=64 if arguments.image_size is None else arguments.image_size,
        resize=arguments.resize,
        plant=arguments.plant,
    )
    print(json.dumps(data.summary(), indent=2))
    if arguments.sheet is not None:
        from diffad_lite.core.files import write_atomically
        from diffad_lite.plots import show_kinds

        fig, _ = show_kinds(data)
        form = arguments.sheet.suffix[1:] or "png"
        write_atomically(arguments.sheet, lambda path: fig.savefig(path, format=form))
    return 0


def methods(arguments: argparse.Namespace) -> int:
    """List the methods."""
    from diffad_lite.data.datasets import bundled_checkpoints
    from diffad_lite.methods import METHODS

    try:
        folders = bundled_checkpoints()
    except FileNotFoundError:
        folders = []
    for name, method in METHODS.items():
        bundled = [f.removesuffix(f"-{name}") for f in folders if f.endswith(f"-{name}")]
        weights = f"bundled: {', '.join(bundled)}" if bundled else "-"
        kind = "trained" if method.trained else "fitted"
        print(f"{name:16} {kind:8} {weights:20} {(method.__doc__ or '').splitlines()[0]}")
    return 0


def sweep(arguments: argparse.Namespace) -> int:
    """Run a grid."""
    from diffad_lite.experiments.grid import read_grid, sweep

    grid = read_grid(arguments.grid)
    if arguments.dry_run:
        return _dry_run(grid, arguments.out)
    if arguments.out is None:
        raise ValueError("sweep needs --out, the folder of the runs; see 'diffad sweep --help'")
    if arguments.workers is None and arguments.scheduler is None:
        failures = sweep(grid, arguments.out)
    else:
        from diffad_lite.experiments.dask import sweep_on_dask

        workers = 1 if arguments.workers is None else arguments.workers
        more = {"scheduler": arguments.scheduler, "workers": workers}
        failures = sweep_on_dask(grid, arguments.out, **more)
    for line in failures:
        say(line)
    return 1 if failures else 0


def _dry_run(grid: dict[str, Any], out: Path | None) -> int:
    """Say what a sweep would do, by the records in ``out`` or those that come with the course."""
    from diffad_lite.data.datasets import data_dir
    from diffad_lite.evaluation.records import read_results
    from diffad_lite.experiments.grid import find_missing

    folder = data_dir() / "results" if out is None else out
    try:
        records = read_results(folder)
    except FileNotFoundError:  # nothing is finished yet
        records = []
    names, count = find_missing(grid, records)
    for name in names:
        print(f"to do: {name}")
    print(f"{count - len(names)} of {count} are done; {len(names) or 'nothing'} left to do")
    return 0


def report(arguments: argparse.Namespace) -> int:
    """Render tables."""
    from diffad_lite.evaluation.records import collect
    from diffad_lite.evaluation.tables import render
    from diffad_lite.experiments.grid import grids_by_scoring

    if arguments.runs is not None:
        grids, name = grids_by_scoring(arguments.results.parent), arguments.runs.resolve().name
        print(f"{collect(arguments.runs, arguments.results, name, grids)} records copied")
    for path in render(arguments.results, arguments.documents):
        print(f"rendered {path}")
    return 0


def notebooks(arguments: argparse.Namespace) -> int:
    """Execute the series."""
    from diffad_lite.notebook.runner import run_notebooks

    parameters = {"profile": arguments.profile}
    for name, text in arguments.p:
        try:
            parameters[name] = json.loads(text)
        except (ValueError, RecursionError):
            parameters[name] = text
    failures = run_notebooks(
        arguments.folder, arguments.out, parameters=parameters, only=arguments.only
    )
    for line in failures:
        say(line)
    return 1 if failures else 0


def doctor(arguments: argparse.Namespace) -> int:
    """Check this installation."""
    from diffad_lite.experiments.machine import run_checks

    ok = True
    for check in run_checks():
        print(check)
        ok &= check.ok
    return 0 if ok else 1
