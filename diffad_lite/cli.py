"""The command ``diffad``: parses arguments and calls; torch is imported only when work starts."""

import argparse
import errno
import json
import math
import shlex
import sys
import warnings
from pathlib import Path
from typing import NoReturn

EPILOG = """examples:
  diffad doctor
  diffad evaluate --method pca --out runs/pca
  diffad evaluate --method anoddpm --dataset folder --root my_images --max-minutes 8 --out runs/mine
  diffad notebooks --only 01 --profile ci
"""


def main(argv: list[str] | None = None) -> int:
    """Entry point; bad input is one line on stderr and exit code 2."""
    arguments = build_parser().parse_args(argv)
    warnings.showwarning = lambda message, *where: _say(f"warning: {message}")
    try:
        return arguments.command(arguments)
    except OSError as error:
        _say(_explain(error))
        return 2
    except (ValueError, FloatingPointError, ImportError) as error:
        _say(error)
        return 2
    except KeyboardInterrupt:
        _say("interrupted; the same command goes on from here")
        return 130


def _say(what: object) -> None:
    """One line on stderr, whatever line breaks a library or a file name has put into it."""
    print("diffad:", " ".join(str(what).splitlines()), file=sys.stderr)


def _explain(error: OSError) -> str:
    """What the operating system refused, where, and the fix; our own errors say it already."""
    if error.errno is None:
        return str(error)
    where = f"{error.filename}: " if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{where}the disk is full; free some space and call the same command again"
    if isinstance(error, PermissionError):
        return f"{where}permission denied; change its permissions, or choose another path"
    return f"{where}{(error.strerror or str(error)).lower()}; check this path"


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with the arguments in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"diffad: {message}; see '{self.prog} --help'\n")


def build_parser() -> argparse.ArgumentParser:
    """All sub-commands and their options."""
    parser = _Parser(
        prog="diffad",
        description="Diffusion-based image anomaly detection.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    evaluate = commands.add_parser("evaluate", help="train or load a method, score it, record it")
    _add_run(evaluate)
    evaluate.add_argument("--plant", help="planted defects: cells, lesions or development")
    evaluate.add_argument(
        "--checkpoint", help="load this folder, or 'bundled', instead of training"
    )
    evaluate.add_argument("--maps", action="store_true", help="also write all maps as TIFF")
    evaluate.set_defaults(command=_evaluate)

    train = commands.add_parser("train", help="train a method and keep its checkpoint")
    _add_run(train)
    train.add_argument("--bundle", action="store_true", help="also store it in data/checkpoints")
    train.set_defaults(command=_train, plant=None)

    datasets = commands.add_parser("datasets", help="list data sets, or show what one holds")
    _add_data(datasets, required=False)
    datasets.add_argument("--plant", help="planted defects: cells, lesions or development")
    datasets.add_argument("--sheet", type=Path, help="write a contact sheet of the test set")
    datasets.set_defaults(command=_datasets)

    sweep = commands.add_parser("sweep", help="run a grid of a YAML file; can be interrupted")
    sweep.add_argument("grid", type=Path)
    sweep.add_argument("--out", type=Path, required=True)
    sweep.add_argument("--workers", type=int, help="runs at a time on this machine, by Dask")
    sweep.add_argument("--scheduler", help="address of a Dask scheduler, whose workers do the runs")
    sweep.set_defaults(command=_sweep)

    report = commands.add_parser("report", help="render tables from result files")
    report.add_argument("--runs", type=Path, help="first copy the records of these runs")
    report.add_argument("--results", type=Path, default=Path("data/results"))
    report.add_argument("documents", nargs="*", type=Path, help="Markdown files to refresh")
    report.set_defaults(command=_report)

    speed = commands.add_parser("speed", help="time and memory of all methods, in one run")
    speed.add_argument("--out", type=Path, default=Path("data/results/speed.json"))
    speed.add_argument("--images", type=int, default=16, help="scored at once")
    speed.add_argument("--rounds", type=int, default=3)
    speed.set_defaults(command=_speed)

    words = "execute the notebook series into copies; when interrupted, the same call goes on"
    more = ". A series that has come to its end is executed anew, and so is one that was changed."
    notebooks = commands.add_parser("notebooks", help=words, description=words + more)
    notebooks.add_argument("--profile", default="lite", help="ci, lite or paper")
    notebooks.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    notebooks.add_argument("--only", action="append", default=[], metavar="NN")
    notebooks.add_argument("--folder", type=Path, default=Path("notebooks"))
    notebooks.add_argument("--out", type=Path, default=Path("runs/notebooks"))
    notebooks.set_defaults(command=_notebooks)

    doctor = commands.add_parser("doctor", help="check this installation")
    doctor.set_defaults(command=_doctor)
    return parser


def _add_data(parser: argparse.ArgumentParser, required: bool) -> None:
    default = "elpv" if required else None
    parser.add_argument("--dataset", default=default, help="elpv, folder, shapes or digits")
    parser.add_argument("--category", help="mono or poly (elpv), a sub-folder (folder)")
    parser.add_argument("--root", help="folder of your images")
    parser.add_argument("--image-size", type=int, help="side in pixels; 64, for paper 256")
    parser.add_argument("--resize", default="squash", help="squash, or pad to keep the aspect")


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--method", required=True, help="e.g. anoddpm, pca")
    _add_data(parser, required=True)
    parser.add_argument("--profile", default="lite", help="ci, lite or paper")
    parser.add_argument("--seed", type=int, default=0, help="of training")
    parser.add_argument("--variant", default="default", help="a name for --set in tables")
    parser.add_argument("--out", type=Path, required=True, help="the run folder")
    parser.add_argument("--max-minutes", type=float, help="of training")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="e.g. train.steps=100"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def _run_of(arguments: argparse.Namespace):
    from diffad_lite.experiments import Run

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
    if minutes is not None and not 0 < minutes < math.inf:
        raise ValueError(f"--max-minutes takes a number above 0, got {minutes}; or leave it out")
    return None if minutes is None else 60 * minutes


def _evaluate(arguments: argparse.Namespace) -> int:
    from diffad_lite.experiments import bundled_checkpoint, evaluate

    run = _run_of(arguments)
    checkpoint = arguments.checkpoint
    if checkpoint == "bundled":
        checkpoint = bundled_checkpoint(run.method, run.dataset, run.category)
        if not checkpoint.is_dir():
            there = ", ".join(sorted(p.name for p in checkpoint.parent.iterdir() if p.is_dir()))
            raise ValueError(
                f"no weights are bundled for {checkpoint.name}, only for: {there}; "
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


def _train(arguments: argparse.Namespace) -> int:
    from diffad_lite import processes
    from diffad_lite.experiments import bundle, train

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
        if arguments.max_minutes is not None:
            words += ["--max-minutes", str(arguments.max_minutes)]
        words += [word for pair in arguments.set for word in ("--set", pair)]
        command = shlex.join(["diffad", "train", *words, "--out", "runs/bundle", "--bundle"])
        print(f"bundled: {bundle(run, data, method, command=command)}")
    return 0


def _datasets(arguments: argparse.Namespace) -> int:
    from diffad_lite.datasets import load_dataset
    from diffad_lite.readers import READERS

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
        from diffad_lite.config import write_atomically
        from diffad_lite.plots import show_kinds

        fig, _ = show_kinds(data)
        form = arguments.sheet.suffix[1:] or "png"
        write_atomically(arguments.sheet, lambda path: fig.savefig(path, format=form))
    return 0


def _sweep(arguments: argparse.Namespace) -> int:
    from diffad_lite.sweep import read_grid, sweep

    grid = read_grid(arguments.grid)
    if arguments.workers is None and arguments.scheduler is None:
        failures = sweep(grid, arguments.out)
    else:
        from diffad_lite.cluster import sweep_on_dask

        more = {"scheduler": arguments.scheduler, "workers": arguments.workers or 1}
        failures = sweep_on_dask(grid, arguments.out, **more)
    for line in failures:
        _say(line)
    return 1 if failures else 0


def _report(arguments: argparse.Namespace) -> int:
    from diffad_lite.report import collect, render

    if arguments.runs is not None:
        print(f"{collect(arguments.runs, arguments.results)} records copied")
    for path in render(arguments.results, arguments.documents):
        print(f"rendered {path}")
    return 0


def _speed(arguments: argparse.Namespace) -> int:
    from diffad_lite.speed import measure_bundled

    more = {"n_images": arguments.images, "rounds": arguments.rounds}
    for name, found in measure_bundled(arguments.out, **more).items():
        each, alive = sorted(found["ms"])[len(found["ms"]) // 2], found["mb"]
        calls = found["evaluations"]
        print(f"{name:20} {each:8.1f} ms an image {alive:8.1f} MB {calls:6.0f} evaluations")
    print(f"record: {arguments.out}")
    return 0


def _notebooks(arguments: argparse.Namespace) -> int:
    from diffad_lite.notebooks import run_notebooks

    parameters = {"profile": arguments.profile}
    for name, text in arguments.p:
        try:
            parameters[name] = json.loads(text)
        except json.JSONDecodeError:
            parameters[name] = text
    failures = run_notebooks(
        arguments.folder, arguments.out, parameters=parameters, only=arguments.only
    )
    for line in failures:
        _say(line)
    return 1 if failures else 0


def _doctor(arguments: argparse.Namespace) -> int:
    from diffad_lite.doctor import checks

    ok = True
    for check in checks():
        print(check)
        ok &= check.ok
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
