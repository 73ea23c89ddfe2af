"""``make size``: print the lines of each room, with their limits."""

import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "diffad_lite"
CORE = ("diffusion", "networks", "evaluation/metrics.py")  # small enough to remember
LIMIT = 1700  # lines of the core
AIMS = {"methods": 3000, "the package": 8500}  # not reached yet


def n_lines(place: str = "") -> int:
    """Return the number of lines of a file, or of all files of a room."""
    path = PACKAGE / place
    files = [path] if path.is_file() else path.rglob("*.py")
    return sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)


def main() -> int:
    """Print the table; return 1 if the core is too large."""
    rooms = sorted(p.name for p in PACKAGE.iterdir() if (p / "__init__.py").exists())
    rows = [(room, n_lines(room)) for room in [*rooms, "plots.py"]]
    core = sum(map(n_lines, CORE))
    for name, count in [*rows, ("the package", n_lines())]:
        aim = f"aim {AIMS[name]:6,}" if name in AIMS else ""
        print(f"{name:36}{count:8,}  {aim}")
    print(f"{' + '.join(CORE):36}{core:8,}  limit {LIMIT:,}")
    return int(core > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
