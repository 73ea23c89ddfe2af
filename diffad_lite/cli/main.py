"""The entry point of ``diffad``: its parser, its error messages and its exit codes.

Commands and their options are declared in ``commands.py``.
"""

import argparse
import errno
import sys
import traceback
import warnings
from typing import Any, NoReturn

from diffad_lite import __version__
from diffad_lite.cli.commands import COMMANDS, say

NUMERICAL = {"torch", "torchvision", "sklearn", "scipy", "numpy"}
NO_MEMORY = ("allocate memory", "out of memory", "Storage size")  # in messages of torch


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code; bad input is one line on stderr and code 2."""
    arguments = build_parser().parse_args(argv)
    warnings.showwarning = lambda message, *_: say(f"warning: {message}")
    try:
        return arguments.work(arguments)
    except Exception as error:
        if arguments.traceback:
            raise
        return _refuse(error)
    except KeyboardInterrupt:
        say("interrupted; call the same command again to continue")
        return 130


def _refuse(error: Exception) -> int:
    """Print an error that the user can fix and return exit code 2; raise any other error."""
    if isinstance(error, OSError):
        say(_explain(error))
    elif isinstance(error, (ValueError, FloatingPointError, ImportError)) and not _inside(error):
        say(error)
    elif isinstance(error, MemoryError) or any(mark in str(error) for mark in NO_MEMORY):
        reason = str(error)[:200] or "no more is available"
        say(f"out of memory ({reason}); use a smaller --image-size or network")
    else:
        raise error
    return 2


def _inside(error: Exception) -> bool:
    """Return whether an error arose inside a numerical library: a bug of ours, not bad input."""
    (*_, (frame, _)) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__", "").split(".")[0] in NUMERICAL


def _explain(error: OSError) -> str:
    """Return what the operating system refused, where, and the fix; our own errors say it."""
    if error.errno is None:
        return str(error)
    where = f"{error.filename}: " if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{where}the disk is full; free some space and call the same command again"
    if isinstance(error, PermissionError):
        return f"{where}permission denied; change its permissions, or choose another path"
    return f"{where}{(error.strerror or str(error)).lower()}; check this path"


class _Parser(argparse.ArgumentParser):
    """Prints one line about wrong arguments, without the usage."""

    def error(self, message: str) -> NoReturn:
        say(f"{message}; see '{self.prog} --help'")
        self.exit(2)


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows defaults, except for empty ones; keeps line breaks."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if not action.default or action.default == argparse.SUPPRESS:
            return action.help
        return f"{action.help} (default: %(default)s)"


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands in :mod:`diffad_lite.cli.commands`."""
    parser = _Parser(
        prog="diffad",
        description="Diffusion-based image anomaly detection.",
        epilog="'diffad COMMAND --help' says more, with an example.",
    )
    parser.add_argument("--version", action="version", version=f"diffad_lite {__version__}")
    _add_traceback(parser, default=False)
    children = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")
    for name, command in COMMANDS.items():
        child = children.add_parser(
            name,
            help=command.help.splitlines()[0].rstrip("."),
            description=command.help,
            epilog=f"example:\n  {command.example}",
            formatter_class=_HelpFormatter,
        )
        for option, keywords in command.options:
            child.add_argument(option, **keywords)
        _add_traceback(child, default=argparse.SUPPRESS)  # before the command or after it
        child.set_defaults(work=command.work)
    return parser


def _add_traceback(parser: argparse.ArgumentParser, default: Any) -> None:
    words = "show where in the code an error arose"
    parser.add_argument("--traceback", action="store_true", default=default, help=words)


if __name__ == "__main__":
    sys.exit(main())
