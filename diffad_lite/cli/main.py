"""The command ``diffad``: its arguments, and how errors are said."""

import argparse
import errno
import sys
import warnings
from pathlib import Path
from typing import NoReturn

from diffad_lite.cli import commands

EPILOG = """examples:
  diffad doctor
  diffad evaluate --method pca --out runs/pca
  diffad evaluate --method anoddpm --dataset folder --root my_images --max-minutes 8 --out runs/mine
  diffad notebooks --only 01 --profile ci
"""
NO_MEMORY = ("allocate memory", "out of memory", "Storage size")  # as torch says it


def main(argv: list[str] | None = None) -> int:
    """Entry point; bad input is one line on stderr and exit code 2."""
    arguments = build_parser().parse_args(argv)
    warnings.showwarning = lambda message, *where: commands.say(f"warning: {message}")
    try:
        return arguments.command(arguments)
    except OSError as error:
        commands.say(_explain(error))
        return 2
    except (ValueError, FloatingPointError, ImportError) as error:
        commands.say(error)
        return 2
    except (MemoryError, RuntimeError) as error:
        words = str(error)[:200] or "no more is left"
        if isinstance(error, RuntimeError) and not any(mark in words for mark in NO_MEMORY):
            raise
        why = f"the memory does not suffice ({words})"
        commands.say(f"{why}; take a smaller --image-size or network")
        return 2
    except KeyboardInterrupt:
        commands.say("interrupted; the same command goes on from here")
        return 130


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
        commands.say(f"{message}; see '{self.prog} --help'")
        self.exit(2)


def build_parser() -> argparse.ArgumentParser:
    """All sub-commands and their options."""
    parser = _Parser(
        prog="diffad",
        description="Diffusion-based image anomaly detection.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    added = parser.add_subparsers(required=True, metavar="command")
    _add_runs(added)
    _add_series(added)
    return parser


PLANT_HELP = "defects: cells, lesions, development or uncertain"


def _add_runs(added: argparse._SubParsersAction) -> None:
    """What has to do with one run."""
    evaluate = added.add_parser("evaluate", help="train or load a method, score it, record it")
    _add_run(evaluate)
    evaluate.add_argument("--plant", help=PLANT_HELP)
    evaluate.add_argument(
        "--checkpoint", help="load this folder, or 'bundled', instead of training"
    )
    evaluate.add_argument("--maps", action="store_true", help="also write all maps as TIFF")
    evaluate.set_defaults(command=commands.evaluate)

    score = added.add_parser("score", help="score a folder of images that have no labels")
    score.add_argument("--checkpoint", type=Path, required=True, help="of a run, or bundled")
    score.add_argument("--images", type=Path, required=True, help="the folder that they lie in")
    score.add_argument("--out", type=Path, required=True)
    score.set_defaults(command=commands.score)

    train = added.add_parser("train", help="train a method and keep its checkpoint")
    _add_run(train)
    train.add_argument("--bundle", action="store_true", help="also store it in data/checkpoints")
    train.set_defaults(command=commands.train, plant=None)

    datasets = added.add_parser("datasets", help="list data sets, or show what one holds")
    _add_data(datasets, required=False)
    datasets.add_argument("--plant", help=PLANT_HELP)
    datasets.add_argument("--sheet", type=Path, help="write a contact sheet of the test set")
    datasets.set_defaults(command=commands.datasets)


def _add_series(added: argparse._SubParsersAction) -> None:
    """What has to do with many, and with the course."""
    sweep = added.add_parser("sweep", help="run a grid of a YAML file; can be interrupted")
    sweep.add_argument("grid", type=Path)
    sweep.add_argument("--out", type=Path, help="the folder of the runs")
    words = "say what is left to do, by the records in --out, or else those of the course"
    sweep.add_argument("--dry-run", action="store_true", help=words)
    sweep.add_argument("--workers", type=int, help="runs at a time on this machine, by Dask")
    sweep.add_argument("--scheduler", help="address of a Dask scheduler, whose workers do the runs")
    sweep.set_defaults(command=commands.sweep)

    report = added.add_parser("report", help="render tables from result files")
    report.add_argument("--runs", type=Path, help="first copy the records of these runs")
    words = "name of their file in --results; default: the name of the folder of runs"
    report.add_argument("--grid", help=words)
    report.add_argument("--results", type=Path, default=Path("data/results"))
    report.add_argument("documents", nargs="*", type=Path, help="Markdown files to refresh")
    report.set_defaults(command=commands.report)

    words = "execute the notebook series into copies; when interrupted, the same call goes on"
    more = ". A series that has come to its end is executed anew, and so is one that was changed."
    notebooks = added.add_parser("notebooks", help=words, description=words + more)
    notebooks.add_argument("--profile", default="lite", help="ci, lite or paper")
    notebooks.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    notebooks.add_argument("--only", action="append", default=[], metavar="NN")
    notebooks.add_argument("--folder", type=Path, default=Path("notebooks"))
    notebooks.add_argument("--out", type=Path, default=Path("runs/notebooks"))
    notebooks.set_defaults(command=commands.notebooks)

    doctor = added.add_parser("doctor", help="check this installation")
    doctor.set_defaults(command=commands.doctor)


def _add_data(parser: argparse.ArgumentParser, required: bool) -> None:
    default = "elpv" if required else None
    parser.add_argument(
        "--dataset", default=default, help="one of those that 'diffad datasets' lists"
    )
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


if __name__ == "__main__":
    sys.exit(main())
