"""The command ``diffad``: its arguments, and how errors are said."""

import argparse
import errno
import sys
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from diffad_lite import __version__
from diffad_lite.cli import commands

NUMERICAL = {"torch", "torchvision", "sklearn", "scipy", "numpy"}
NO_MEMORY = ("allocate memory", "out of memory", "Storage size")  # as torch says it


def main(argv: list[str] | None = None) -> int:
    """Entry point; bad input is one line on stderr and exit code 2."""
    arguments = build_parser().parse_args(argv)
    warnings.showwarning = lambda message, *where: commands.say(f"warning: {message}")
    try:
        return arguments.command(arguments)
    except Exception as error:
        if arguments.traceback:
            raise
        return _refuse(error)
    except KeyboardInterrupt:
        commands.say("interrupted; the same command goes on from here")
        return 130


def _refuse(error: Exception) -> int:
    """Say an error that the user can mend and return exit code 2; raise any other."""
    if isinstance(error, OSError):
        commands.say(_explain(error))
    elif isinstance(error, (ValueError, FloatingPointError, ImportError)) and not _inside(error):
        commands.say(error)
    elif isinstance(error, MemoryError) or any(mark in str(error) for mark in NO_MEMORY):
        words = str(error)[:200] or "no more is left"
        commands.say(f"out of memory ({words}); take a smaller --image-size or network")
    else:
        raise error
    return 2


def _inside(error: Exception) -> bool:
    """Whether an error arose inside of a numerical library: ours to mend, not the user's."""
    (*_, (frame, _)) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__", "").split(".")[0] in NUMERICAL


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


@dataclass(frozen=True)
class Command:
    """A sub-command of ``diffad``.

    Attributes:
        summary: one line for the list of commands.
        details: what more its help says.
        example: a call that works.
        maintainer: whether it is for those who keep the course, not for those who use it.
    """

    summary: str
    details: str
    example: str
    maintainer: bool = False


LAYOUT = """A folder of your own (--dataset folder --root DIR) in MVTec layout:
  DIR/train/good             normal images; a DIR that simply holds normal images will do, too
  DIR/test/good              more normal images (else some of train/good are held out)
  DIR/test/<defect>          anomalous images, one folder for each kind of defect
  DIR/ground_truth/<defect>  their masks: <stem>_mask.png, or <stem>.png, or a folder <stem>
  DIR/calibration/good       normal images for thresholds (else 20 % of train/good)
With --category NAME all of this lies in DIR/NAME."""

COMMANDS = {
    "evaluate": Command(
        "train or load a method, score a test set, record it",
        "Writes result.json (metrics with intervals, configuration, seeds, versions), scores.csv"
        f"\nand figure.png into --out. Called again, it goes on where it stopped.\n\n{LAYOUT}",
        "diffad evaluate --method pca --out runs/pca",
    ),
    "score": Command(
        "score a folder of images that have no labels",
        "Writes scores.csv, maps as TIFF and a gallery into --out.",
        "diffad score --checkpoint runs/pca/checkpoint --images new_images --out runs/new",
    ),
    "train": Command(
        "train a method and keep its checkpoint",
        "Called again with the same --out, it goes on where it stopped.",
        "diffad train --method anoddpm --max-minutes 8 --out runs/anoddpm",
    ),
    "methods": Command(
        "list the methods",
        "Whether each trains a network or fits statistics, and for which data its weights are"
        " bundled.",
        "diffad methods",
    ),
    "datasets": Command(
        "list data sets, or show what one holds",
        f"With --dataset, counts, remarks and, on request, a contact sheet.\n\n{LAYOUT}",
        "diffad datasets --dataset elpv --category mono --sheet sheet.png",
    ),
    "notebooks": Command(
        "execute the lessons into copies",
        "When interrupted, the same call goes on. A series that came to its end is executed anew,"
        "\nand so is one that was changed.",
        "diffad notebooks --profile ci --only 01 -p seed 3",
    ),
    "sweep": Command(
        "run a grid of a YAML file",
        "Finished runs are skipped, interrupted ones go on; what fails is listed at the end.",
        "diffad sweep data/grid.yaml --dry-run",
    ),
    "doctor": Command(
        "check this installation",
        "One line for each thing that a run needs, with the fix where something is missing.",
        "diffad doctor",
    ),
    "report": Command(
        "render the tables of the course from records",
        "Writes tables.md into --results and refreshes the marked tables of documents. With --runs,"
        "\nthe record of each run goes to <grid>.jsonl, after the grid beside --results that names"
        "\nit, or after the folder of runs where none does.",
        "diffad report --runs runs/grid README.md data/README.md",
        maintainer=True,
    ),
}


def build_parser() -> argparse.ArgumentParser:
    """All sub-commands and their options."""
    parser = _Parser(
        prog="diffad",
        description="Diffusion-based image anomaly detection.\n\n" + _list_commands(),
        epilog="'diffad COMMAND --help' says more, with an example.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"diffad_lite {__version__}")
    _add_traceback(parser, default=False)
    added = parser.add_subparsers(required=True, metavar="COMMAND", help="one of those above")
    fill = {
        "evaluate": _fill_evaluate,
        "score": _fill_score,
        "train": _fill_train,
        "methods": lambda parser: None,
        "datasets": _fill_datasets,
        "notebooks": _fill_notebooks,
        "sweep": _fill_sweep,
        "doctor": lambda parser: None,
        "report": _fill_report,
    }
    for name, command in COMMANDS.items():
        summary = command.summary[0].upper() + command.summary[1:]
        child = added.add_parser(
            name,
            description=f"{summary}.\n\n{command.details}",
            epilog=f"example:\n  {command.example}",
            formatter_class=_HelpFormatter,
        )
        fill[name](child)
        _add_traceback(child, default=argparse.SUPPRESS)  # before the command or behind it
        child.set_defaults(command=getattr(commands, name))
    return parser


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows defaults that say something, and leaves line breaks as they are."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if not action.default or action.default == argparse.SUPPRESS:
            return action.help
        return f"{action.help} (default: %(default)s)"


def _list_commands() -> str:
    groups = {"commands:": False, "for maintainers of the course:": True}
    lines = []
    for title, maintainer in groups.items():
        chosen = {n: c for n, c in COMMANDS.items() if c.maintainer == maintainer}
        lines += [title, *(f"  {name:10} {c.summary}" for name, c in chosen.items()), ""]
    return "\n".join(lines).rstrip()


def _add_traceback(parser: argparse.ArgumentParser, default: Any) -> None:
    words = "show where in the code an error arose"
    parser.add_argument("--traceback", action="store_true", default=default, help=words)


PLANT = "plant defects with exact masks on the normal test images: cells, lesions; development or"
PLANT += " uncertain choose settings without the test set"


def _fill_evaluate(parser: argparse.ArgumentParser) -> None:
    _add_run(parser, method_required=False)
    parser.add_argument("--plant", help=PLANT)
    parser.add_argument("--checkpoint", help="load this folder, or 'bundled', instead of training")
    parser.add_argument("--maps", action="store_true", help="also write all maps as TIFF")


def _fill_score(parser: argparse.ArgumentParser) -> None:
    words = "folder of a checkpoint, such as that of a run, or data/checkpoints/..."
    parser.add_argument("--checkpoint", type=Path, required=True, help=words)
    parser.add_argument("--images", type=Path, required=True, help="folder of the images")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")


def _fill_train(parser: argparse.ArgumentParser) -> None:
    _add_run(parser, method_required=True)
    words = "also store it in data/checkpoints (for maintainers)"
    parser.add_argument("--bundle", action="store_true", help=words)
    parser.set_defaults(plant=None)


def _fill_datasets(parser: argparse.ArgumentParser) -> None:
    _add_data(parser, dataset=None)
    parser.add_argument("--plant", help=PLANT)
    parser.add_argument("--sheet", type=Path, help="write a contact sheet of the test set")


def _fill_notebooks(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--profile", default="lite", help="ci, lite or paper")
    words = "set a parameter, as papermill's -p; may be repeated"
    add("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help=words)
    words = "only lessons whose names start so; may be repeated"
    add("--only", action="append", default=[], metavar="NN", help=words)
    add("--folder", type=Path, default=Path("notebooks"), help="of the lessons")
    add("--out", type=Path, default=Path("runs/notebooks"), help="folder of the executed copies")


def _fill_sweep(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("grid", type=Path, help="YAML file; data/grid.yaml is one")
    add("--out", type=Path, help="folder of the runs")
    words = "say what is left to do, by the records in --out, or else those of the course"
    add("--dry-run", action="store_true", help=words)
    add("--workers", type=int, help="runs at a time on this machine, by Dask")
    add("--scheduler", help="address of a Dask scheduler, whose workers make the runs")


def _fill_report(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--runs", type=Path, help="first copy the records of this folder of runs")
    add("--results", type=Path, default=Path("data/results"), help="folder of the records")
    add("documents", nargs="*", type=Path, help="Markdown files to refresh")


def _add_data(parser: argparse.ArgumentParser, dataset: str | None) -> None:
    add = parser.add_argument
    add("--dataset", default=dataset, help="one of those that 'diffad datasets' lists")
    add("--category", help="mono or poly (elpv), a sub-folder of --root (folder)")
    add("--root", help="folder of your images")
    add("--image-size", type=int, help="side in pixels; without it 64, for paper 256")
    add("--resize", default="squash", help="squash, or pad to keep the aspect")


def _add_run(parser: argparse.ArgumentParser, method_required: bool) -> None:
    add = parser.add_argument
    words = "" if method_required else "; not needed with a folder as --checkpoint"
    add("--method", required=method_required, help=f"as 'diffad methods' lists them{words}")
    _add_data(parser, dataset="elpv")
    add("--profile", default="lite", help="ci, lite or paper")
    add("--seed", type=int, default=0, help="of training")
    add("--variant", default="default", help="a name for --set in tables")
    add("--out", type=Path, required=True, help="folder of the run")
    add("--max-minutes", type=float, help="of training")
    words = (
        "a field of the configuration, dotted, and its value as JSON, e.g. train.steps=100; may be"
    )
    add("--set", action="append", default=[], metavar="KEY=VALUE", help=f"{words} repeated")
    add("--quiet", action="store_true", help="no progress bars")


if __name__ == "__main__":
    sys.exit(main())
