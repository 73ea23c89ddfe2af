"""The commands of ``diffad``: options, help and work of each, in one place.

``@command`` turns a function into a command: its name is that of the command, its docstring is the
help, its options are listed above it. Functions import torch only when they start to work.
"""

import argparse
import inspect
import json
import math
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffad_lite.experiments.run import Run

Work = Callable[[argparse.Namespace], int]
Option = tuple[str, dict[str, Any]]


@dataclass(frozen=True)
class Command:
    """A command of ``diffad``."""

    work: Work  # returns the exit code
    help: str  # one line for the list of commands, then the details
    example: str  # a call that works
    options: tuple[Option, ...]


COMMANDS: dict[str, Command] = {}  # by name, in the order of the help


def command(example: str, *options: Option, notes: str = "") -> Callable[[Work], Work]:
    """Register a function as a command; ``notes`` follow its docstring in the help."""

    def register(work: Work) -> Work:
        words = f"{inspect.getdoc(work)}\n\n{notes}".rstrip()
        COMMANDS[work.__name__] = Command(work, words, example, options)
        return work

    return register


def option(name: str, **keywords: Any) -> Option:
    """Describe an option by its name and the keywords of ``ArgumentParser.add_argument``."""
    return name, keywords


def say(message: object) -> None:
    """Print a message as one line on stderr, even if it contains line breaks."""
    print("diffad:", " ".join(str(message).splitlines()), file=sys.stderr)


REPEATED: dict[str, Any] = {"action": "append", "default": []}
SETTING: dict[str, Any] = {"metavar": "KEY=VALUE", **REPEATED}
JSON = "values are JSON; may be repeated"
FOLDER: dict[str, Any] = {"type": Path, "required": True}
DATASET = "name in the list of 'diffad datasets'"
DATA = (
    option(
        "--category", help="mono or poly (elpv), 0 to 9 (digits), a sub-folder of --root (others)"
    ),
    option("--root", help="folder of your images"),
    option("--image-size", type=int, help="side in pixels; without it 64, for paper 256"),
    option("--resize", default="squash", help="squash, or pad to keep the aspect ratio"),
)
PLANT = option(
    "--plant",
    help="plant defects with exact masks on the normal test images: cells, lesions; development "
    "or uncertain choose settings without the test set",
)
PROFILE = option("--profile", default="lite", help="ci, lite or paper")
RUN = (
    option("--dataset", default="elpv", help=DATASET),
    *DATA,
    PROFILE,
    option("--seed", type=int, default=0, help="random seed of the training"),
    option("--variant", default="default", help="name of the settings of --set in tables"),
    option("--out", help="folder of the run", **FOLDER),
    option(
        "--max-minutes",
        type=float,
        help="time limit of the training; thresholds may take as long again",
    ),
    option("--set", help=f"a field of the configuration, e.g. smooth_sigma=2; {JSON}", **SETTING),
    option("--quiet", action="store_true", help="no progress bars"),
)
LAYOUT = """A folder of your own (--dataset folder --root DIR) in MVTec layout:
  DIR/train/good             normal images; they may also lie in DIR itself
  DIR/test/good              more normal images (else some of train/good are held out)
  DIR/test/<defect>          anomalous images, one folder for each kind of defect
  DIR/ground_truth/<defect>  their masks: <stem>_mask.png, or <stem>.png, or a folder <stem>
  DIR/calibration/good       normal images for thresholds (else 20 % of train/good)
"normal" and "ok" mean "good", in any case of letters; sub-folders are read, too. A warning
names what was read in another way, or not at all.
With --category NAME all of this lies in DIR/NAME."""


def _settings(arguments: argparse.Namespace) -> dict[str, str]:
    """Return the settings of ``--set KEY=VALUE``, their values as text."""
    for setting in arguments.set:
        if "=" not in setting:
            fix = "write it like --set smooth_sigma=2"
            raise ValueError(f"--set must be KEY=VALUE, got {setting!r}; {fix}")
    return dict(setting.split("=", 1) for setting in arguments.set)


def _exit_code(failures: list[str]) -> int:
    """Print one line for each failure and return the exit code."""
    for line in failures:
        say(line)
    return 1 if failures else 0


def _run_from(arguments: argparse.Namespace) -> "Run":
    from diffad_lite.experiments.run import Run

    names = ("method", "dataset", "category", "root", "image_size", "resize", "profile")
    values = {name: getattr(arguments, name) for name in (*names, "seed", "variant")}
    plant = getattr(arguments, "plant", None)  # training has no such option
    return Run(**values, plant=plant, settings=_settings(arguments))


def _find_checkpoint(name: str, method: str | None, dataset: str, category: str | None) -> Path:
    """Return the folder that ``--checkpoint`` names: a path, that of a run, or ``bundled``."""
    from diffad_lite.data.datasets import bundled_checkpoints
    from diffad_lite.experiments.evaluate import bundled_checkpoint, find_checkpoint

    if name != "bundled":
        return find_checkpoint(name)
    if method is None:
        raise ValueError("--method is missing; 'diffad methods' lists them")
    folder = bundled_checkpoint(method, dataset, category)
    if not folder.is_dir():
        raise ValueError(
            f"no weights are bundled for {folder.name}, only for: "
            f"{', '.join(bundled_checkpoints())}; to train, leave --checkpoint out of 'evaluate'"
        )
    return folder


def _budget(arguments: argparse.Namespace) -> float | None:
    """Return the time budget of a training in seconds, None for no limit."""
    minutes = arguments.max_minutes
    if minutes is not None and not 0 < 60 * minutes < math.inf:
        raise ValueError(f"--max-minutes must be a number above 0, got {minutes}; or leave it out")
    return None if minutes is None else 60 * minutes


@command(
    "diffad evaluate --method pca --out runs/pca",
    option("--method", help="name in the list of 'diffad methods'; a --checkpoint folder has it"),
    *RUN,
    PLANT,
    option(
        "--checkpoint", help="load this folder, that of a run, or 'bundled', instead of training"
    ),
    option("--maps", action="store_true", help="also write all anomaly maps as TIFF"),
    notes=LAYOUT,
)
def evaluate(arguments: argparse.Namespace) -> int:
    """Train or load a method, score a test set, record it.

    Writes result.json (metrics with intervals, configuration, seeds, versions), scores.csv
    and figure.png into --out. The same call continues an interrupted run.
    """
    from diffad_lite.experiments.evaluate import evaluate
    from diffad_lite.methods.checkpoints import read_record

    method, checkpoint = arguments.method, None
    if arguments.checkpoint is not None:
        data = arguments.dataset, arguments.category
        checkpoint = _find_checkpoint(arguments.checkpoint, method, *data)
        arguments.method = method or read_record(checkpoint)["method"]
    elif method is None:
        raise ValueError("--method is missing; 'diffad methods' lists them")
    run = _run_from(arguments)
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


@command(
    "diffad score --checkpoint runs/pca --images new_images --out runs/new",
    option("--checkpoint", required=True, help="its folder, that of a run, or 'bundled'"),
    option("--method", help="of --checkpoint bundled: name in the list of 'diffad methods'"),
    option("--dataset", help="of --checkpoint bundled; without it elpv"),
    option("--category", help="of --checkpoint bundled; without it the data set's default"),
    option("--images", help="folder of the images", **FOLDER),
    option("--out", help="folder of the results", **FOLDER),
)
def score(arguments: argparse.Namespace) -> int:
    """Score a folder of images that have no labels.

    Writes scores.csv, anomaly maps as TIFF and a gallery into --out, in place of those of an
    earlier call. Unreadable images are named, and the exit code is 1.
    """
    from diffad_lite.data.images import list_images
    from diffad_lite.experiments.unlabelled import score_folder, survey
    from diffad_lite.methods.base import load_pretrained
    from diffad_lite.methods.checkpoints import read_record

    chosen = arguments.method, arguments.dataset, arguments.category
    if arguments.checkpoint != "bundled" and any(chosen):
        raise ValueError(
            "--method, --dataset and --category choose among bundled checkpoints; leave them out, "
            f"or use --checkpoint bundled, not {arguments.checkpoint}"
        )
    checkpoint = _find_checkpoint(arguments.checkpoint, chosen[0], chosen[1] or "elpv", chosen[2])
    method = load_pretrained(checkpoint)
    record = read_record(checkpoint)
    reading = {"resize": record.get("resize", "squash"), "bits": record.get("bits")}
    rows = score_folder(method, arguments.images, arguments.out, **reading)
    scored = {row["file"] for row in rows}
    paths = list_images(arguments.images)
    for warning in survey([p for p in paths if p.name in scored]).warnings(training=False):
        say(f"warning: {warning}")
    for row in rows[:10]:
        print(f"{row['image_score']:10.4g}  {'ALARM' if row['alarm'] else '':5}  {row['file']}")
    alarms = sum(row["alarm"] for row in rows)
    print(f"{alarms} of {len(rows)} images lie above the threshold {method.threshold_:.4g}")
    print(f"all scores: {arguments.out / 'scores.csv'}")
    return 0 if len(rows) == len(paths) else 1


@command(
    "diffad export --checkpoint runs/can --images mvtec_ad_2/can --out runs/submission",
    option("--checkpoint", required=True, help="its folder, or that of a run, of this object"),
    option("--images", help="folder of one object of MVTec AD 2, as unpacked", **FOLDER),
    option("--out", help="folder of the submission; each object adds its files", **FOLDER),
)
def export(arguments: argparse.Namespace) -> int:
    """Write the maps of MVTec AD 2's private sets for its benchmark server.

    Of test_private and test_private_mixed, at the size of the images: float16 TIFF files in
    anomaly_images, and PNG files of 0 and 255, thresholded by the calibration images, in
    anomaly_images_thresholded. The server wants all eight objects: train each on its own
    converted folder ('diffad convert'), and call this command for each.
    """
    from diffad_lite.experiments.evaluate import find_checkpoint
    from diffad_lite.experiments.submission import export_submission
    from diffad_lite.methods.base import load_pretrained
    from diffad_lite.methods.checkpoints import read_record

    checkpoint = find_checkpoint(arguments.checkpoint)
    method = load_pretrained(checkpoint)
    record = read_record(checkpoint)
    reading = {"resize": record.get("resize", "squash"), "bits": record.get("bits")}
    fractions = export_submission(method, arguments.images, arguments.out, **reading)
    for name, fraction in fractions.items():
        print(f"{name}: {fraction:.2%} of the pixels lie above the threshold")
    print(f"submission: {arguments.out}")
    return 0


@command(
    "diffad train --method anoddpm --max-minutes 8 --out runs/anoddpm",
    option("--method", required=True, help="name in the list of 'diffad methods'"),
    *RUN,
    option("--bundle", action="store_true", help="for maintainers: bundle the checkpoint"),
)
def train(arguments: argparse.Namespace) -> int:
    """Train a method and keep its checkpoint.

    The same call continues an interrupted training.
    """
    from diffad_lite.experiments.evaluate import bundle, check_files, train
    from diffad_lite.training import processes

    run = _run_from(arguments)
    check_files(run, arguments.out)
    data = run.load_data()
    progress = not arguments.quiet
    method = train(run, data, arguments.out, budget=_budget(arguments), progress=progress)
    if processes.rank() > 0:
        return 0
    for stage, report in method.reports_.items():
        print(f"{stage}: {report['steps']:.0f} steps in {report['seconds']:.0f} s")
    print(f"checkpoint: {arguments.out / 'checkpoint'}")
    if arguments.bundle:
        call = _bundling_call(run, data.info["category"], arguments)
        print(f"bundled: {bundle(run, data, method, command=call)}")
    return 0


def _bundling_call(run: "Run", category: str, arguments: argparse.Namespace) -> str:
    """Return the command that trains this bundled checkpoint, without the path of its images."""
    options = {"method": run.method, "dataset": run.dataset, "seed": run.seed}
    options |= {"category": category, "profile": run.profile, "image-size": run.image_size}
    options |= {"resize": run.resize, "root": None if run.root is None else "ROOT"}
    options |= {"max-minutes": arguments.max_minutes}
    words = [w for key, v in options.items() if v is not None for w in (f"--{key}", str(v))]
    words += [word for setting in arguments.set for word in ("--set", setting)]
    return shlex.join(["diffad", "train", *words, "--out", "runs/bundle", "--bundle"])


@command("diffad methods")
def methods(arguments: argparse.Namespace) -> int:
    """List the methods.

    Whether each trains a network or fits statistics, and for which data its weights are bundled.
    """
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


@command(
    "diffad datasets --dataset elpv --category mono --sheet sheet.png",
    option("--dataset", help=DATASET),
    *DATA,
    PLANT,
    option("--sheet", type=Path, help="write a contact sheet of the test set"),
    notes=LAYOUT,
)
def datasets(arguments: argparse.Namespace) -> int:
    """List data sets, or show what one holds.

    With --dataset: counts, remarks and, with --sheet, a contact sheet.
    """
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
        suffix = arguments.sheet.suffix[1:] or "png"
        write_atomically(arguments.sheet, lambda path: fig.savefig(path, format=suffix))
    return 0


@command(
    "diffad convert real_iad --root Real-IAD/realiad_1024 --category toy --out data/real_iad",
    option("name", help="mvtec_ad_2 or real_iad"),
    option("--root", help="folder with one folder for each category, as unpacked", **FOLDER),
    option("--category", help="one of them"),
    option("--out", help="folder for the converted category, a sub-folder of it", **FOLDER),
    option(
        "--splits",
        type=Path,
        metavar="DIR",
        help="of real_iad, the folder of the JSON files; without it realiad_jsons beside --root, "
        "the split over all views",
    ),
)
def convert(arguments: argparse.Namespace) -> int:
    """Convert a published data set to the layout of --dataset folder.

    Hard links take the place of copies, except on another disk. The published split is kept; masks
    lie in ground_truth, and subjects.csv names the object of each image of real_iad. The private
    sets of mvtec_ad_2 have no labels and are left out; 'diffad export' scores them.
    """
    from diffad_lite.data.converters import convert_dataset

    folder = convert_dataset(
        arguments.name,
        arguments.root,
        arguments.category,
        arguments.out,
        splits=arguments.splits,
    )
    print(f"converted: {folder}")
    print(f"to use it: --dataset folder --root {arguments.out} --category {folder.name}")
    return 0


@command(
    "diffad notebooks --profile ci --only 01 --set seed=3",
    PROFILE,
    option("--set", help=f"a parameter of the lessons, e.g. seed=3; {JSON}", **SETTING),
    option(
        "-p", help="--set in papermill's syntax", nargs=2, metavar=("NAME", "VALUE"), **REPEATED
    ),
    option(
        "--only", help="lessons whose names start so; may be repeated", metavar="NN", **REPEATED
    ),
    option("--folder", type=Path, help="folder of the lessons; without it notebooks"),
    option("--out", type=Path, default=Path("runs/notebooks"), help="folder of executed copies"),
    option(
        "--copy",
        type=Path,
        metavar="DIR",
        help="execute nothing: write the lessons that came with this package, with exercises and "
        "solutions, into DIR; no file is overwritten",
    ),
    option("--start-timeout", type=int, default=180, help="seconds in which a kernel must start"),
)
def notebooks(arguments: argparse.Namespace) -> int:
    """Execute the lessons into copies.

    The same call continues an interrupted series. A complete series is executed again, and so is
    one of which a lesson or the package has changed.
    """
    from diffad_lite.notebook.runner import run_notebooks

    if arguments.copy is not None:
        return _copy_lessons(arguments)
    parameters = {"profile": arguments.profile}
    for name, text in (_settings(arguments) | dict(arguments.p)).items():
        try:
            parameters[name] = json.loads(text)
        except (ValueError, RecursionError):
            parameters[name] = text
    folder = arguments.folder or Path("notebooks")
    failures = run_notebooks(
        folder,
        arguments.out,
        parameters=parameters,
        only=arguments.only,
        start_timeout=arguments.start_timeout,
    )
    return _exit_code(failures)


def _copy_lessons(arguments: argparse.Namespace) -> int:
    """Write the lessons into the folder ``--copy`` and say what to do with them."""
    from diffad_lite.core.files import course_dir
    from diffad_lite.notebook.runner import copy_notebooks

    for name, keywords in COMMANDS["notebooks"].options:
        value = getattr(arguments, name.lstrip("-").replace("-", "_"))
        if name not in ("--copy", "--folder", "--only") and value != keywords.get("default"):
            raise ValueError(f"{name} does nothing with --copy, which executes nothing; drop it")
    folder = arguments.folder or course_dir() / "notebooks"
    copies = copy_notebooks(folder, arguments.copy, arguments.only)
    print(f"{len(copies)} notebooks are in {arguments.copy}, 'jupyter lab' opens them")
    print("licence: code MIT, text CC BY 4.0, images of solar cells CC BY-NC-SA 4.0")
    return 0


@command(
    "diffad sweep data/grid.yaml --dry-run",
    option("grid", type=Path, help="YAML file, e.g. data/grid.yaml"),
    option("--out", type=Path, help="folder of the runs"),
    option(
        "--dry-run",
        action="store_true",
        help="list the runs without a record in --out, or else in the records of the course",
    ),
    option("--workers", type=int, help="number of parallel runs on this machine, by Dask"),
    option("--scheduler", help="address of a Dask scheduler, whose workers execute the runs"),
)
def sweep(arguments: argparse.Namespace) -> int:
    """Run a grid of a YAML file.

    Finished runs are skipped, interrupted ones continue; failures are listed at the end.
    """
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
        failures = sweep_on_dask(
            grid, arguments.out, scheduler=arguments.scheduler, workers=workers
        )
    return _exit_code(failures)


def _dry_run(grid: dict[str, Any], out: Path | None) -> int:
    """Print the runs of a grid without a record in ``out``, or in the records of the course."""
    from diffad_lite.core.files import data_dir
    from diffad_lite.evaluation.records import read_results
    from diffad_lite.experiments.grid import find_missing

    try:
        records = read_results(data_dir() / "results" if out is None else out)
    except FileNotFoundError:  # no run is finished
        records = []
    names, count = find_missing(grid, records)
    for name in names:
        print(f"to do: {name}")
    print(f"{count - len(names)} of {count} are done; {len(names) or 'nothing'} left to do")
    return 0


@command(
    "diffad doctor --profile paper --method glad",
    option("--profile", help="also check the files that methods need: ci, lite or paper"),
    option("--method", help="of this method only; may be repeated", **REPEATED),
)
def doctor(arguments: argparse.Namespace) -> int:
    """Check this installation.

    One line for each thing that a run needs, with the fix if it is missing. With --profile, also
    the weights and textures that training needs.
    """
    from diffad_lite.experiments.machine import check_methods, run_checks

    if arguments.method and arguments.profile is None:
        raise ValueError("--method says nothing without a profile; add --profile paper")
    checks = run_checks()
    if arguments.profile is not None:
        checks = chain(check_methods(arguments.profile, arguments.method), checks)
    ok = True
    for check in checks:
        print(check)
        ok &= check.ok
    return 0 if ok else 1


@command(
    "diffad report --runs runs/grid README.md data/README.md",
    option("--runs", type=Path, help="first copy the records of this folder of runs"),
    option("--results", type=Path, default=Path("data/results"), help="folder of the records"),
    option("documents", nargs="*", type=Path, help="Markdown files to refresh"),
)
def report(arguments: argparse.Namespace) -> int:
    """Render the tables of the course from records (for maintainers).

    Writes tables.md into --results and refreshes the marked tables of documents. With --runs, the
    record of each run goes to <grid>.jsonl, after the grid beside --results that names it, or
    after the folder of runs if no grid does.
    """
    from diffad_lite.evaluation.records import collect
    from diffad_lite.evaluation.tables import render
    from diffad_lite.experiments.grid import grids_by_scoring

    if arguments.runs is not None:
        grids, name = grids_by_scoring(arguments.results.parent), arguments.runs.resolve().name
        print(f"{collect(arguments.runs, arguments.results, name, grids)} records copied")
    for path in render(arguments.results, arguments.documents):
        print(f"rendered {path}")
    return 0
