"""Rooms: imports follow one order without cycles; functions are short; imports are fast."""

import ast
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import diffad_lite

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "diffad_lite"
MODULES = sorted(PACKAGE.rglob("*.py"))
MASTERS = sorted((ROOT / "notebooks" / "src").glob("*.py"))
# A room imports rooms below it in this list only.
ROOMS = [
    "cli",
    "notebook",
    "experiments",
    "plots",
    "evaluation",
    "methods",
    "spaces",
    "training",
    "data",
    "networks",
    "diffusion",
    "core",
]
each_module = pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))


def name_of(path: Path) -> str:
    """Return ``data.images`` for a module, ``data`` for the ``__init__`` of a room."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def imported(path: Path) -> set[str]:
    """Return the modules of the package that a file imports, also in functions and for types."""
    package = ["diffad_lite", *path.relative_to(PACKAGE).parts[:-1]]
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{module}.{alias.name}" for alias in node.names}
    modules = set()
    for parts in (name.split(".")[1:] for name in names if name.split(".")[0] == "diffad_lite"):
        while parts:  # find the longest part of the name that is a file
            path = PACKAGE.joinpath(*parts)
            if path.with_suffix(".py").exists() or (path / "__init__.py").exists():
                modules.add(".".join(parts))
                break
            parts = parts[:-1]
    return modules


@cache
def graph() -> dict[str, set[str]]:
    """Return module -> modules that it imports."""
    return {name_of(path): imported(path) for path in MODULES if name_of(path) != "__init__"}


def dependencies(module: str) -> set[str]:
    """Return all modules that a module imports, directly or indirectly."""
    modules, queue = set(), [module]
    while queue:
        new = graph()[queue.pop()] - modules
        modules |= new
        queue += new
    return modules


def test_every_room_has_its_place():
    assert {name.split(".")[0] for name in graph()} == set(ROOMS)


@each_module
def test_imports_go_down(path):
    name = name_of(path)
    if name == "__init__":
        return  # it imports lazily, by name
    room = name.split(".")[0]
    for target in graph()[name]:
        target_room = target.split(".")[0]
        assert ROOMS.index(room) <= ROOMS.index(target_room), f"{name} imports {target} from above"
        is_room = target_room == room and "." not in target and path.name != "__main__.py"
        assert not is_room or target == "plots", f"{name} imports its own room; name the module"


def test_no_import_cycles():
    order = list(TopologicalSorter(graph()).static_order())  # raises CycleError
    assert set(order) == set(graph())


def test_every_form_of_import_is_found(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    (tmp_path / "data").mkdir()
    for name in ("planting", "images", "__init__"):
        (tmp_path / "data" / f"{name}.py").touch()
    path = tmp_path / "data" / "cheat.py"
    for statement in (
        "import diffad_lite.data.planting",
        "from diffad_lite.data import planting",
        "from diffad_lite.data.planting import KINDS",
        "from .planting import KINDS",
        "def f():\n    from . import planting as p",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .planting import KINDS",
    ):
        path.write_text(statement)
        assert imported(path) == {"data.planting"}, statement
    path.write_text("from diffad_lite.data import load_dataset, images\nimport numpy")
    assert imported(path) == {"data", "data.images"}


@pytest.mark.parametrize("room", ["methods", "spaces", "training", "networks", "diffusion"])
def test_training_never_imports_planted_defects(room):
    for module in graph():
        if module.split(".")[0] == room:
            assert "data.planting" not in dependencies(module), (
                f"{module}: planted defects are for tests"
            )
    for module in ("data.synthetic_anomalies", "data.textures"):
        assert "data.planting" not in dependencies(module)


@each_module
def test_functions_are_short(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            lines = node.end_lineno - node.lineno + 1
            docstring = ast.get_docstring(node) or ""
            assert lines - len(docstring.splitlines()) <= 60, f"{node.name} has {lines} lines"


def printed(code: str) -> str:
    """Return the output of a new process."""
    call = [sys.executable, "-c", code]
    return subprocess.run(call, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("module", ["diffad_lite", "diffad_lite.cli.main"])
def test_importing_it_imports_no_torch(module):
    heavy = "{'torch', 'numpy', 'matplotlib', 'sklearn', 'scipy'}"
    assert printed(f"import sys, {module}; print(sorted({heavy} & sys.modules.keys()))") == "[]"


def test_metrics_and_records_import_no_torch():
    code = "import sys, diffad_lite.evaluation; print('torch' in sys.modules)"
    assert printed(code) == "False"


def test_short_imports():
    for name in diffad_lite.__all__:
        assert getattr(diffad_lite, name) is not None
        assert name in dir(diffad_lite)
    from diffad_lite import metrics, plots

    assert metrics.__name__ == "diffad_lite.evaluation.metrics"
    assert plots.__name__ == "diffad_lite.plots"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        diffad_lite.nothing  # noqa: B018


def test_importing_plots_changes_nothing_of_matplotlib():
    code = (
        "import matplotlib; before = dict(matplotlib.rcParams); import diffad_lite.plots as p;"
        "changed = lambda: [k for k, v in before.items() if k != 'backend'"
        " and matplotlib.rcParams[k] != v];"
        "print(changed());"
        "f, _ = p.show_curves([0, 1], {'a': [0, 1]}, xlabel='x', ylabel='y');"
        "print(changed(), f.axes[0].spines['top'].get_visible(), f.get_layout_engine() is None);"
        "p.styled(lambda: matplotlib.interactive(True))(); print(matplotlib.is_interactive());"
        "matplotlib.interactive(False);"
        "p.use_style(); print(len(changed()) >= 5)"
    )
    assert printed(code).splitlines() == ["[]", "[] False False", "True", "True"]


@pytest.mark.parametrize("master", MASTERS, ids=lambda path: path.stem)
def test_lessons_import_from_rooms_alone(master):
    for node in ast.walk(ast.parse(master.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("diffad_"):
            continue
        room = sys.modules.get(node.module) or __import__(node.module, fromlist=["*"])
        assert node.module.count(".") <= 1, f"{node.module} lies deeper than one room"
        for alias in node.names:
            public = alias.name in room.__all__ if hasattr(room, "__all__") else False
            module = (PACKAGE / node.module.split(".")[-1] / f"{alias.name}.py").exists()
            assert public or module or alias.name == "__version__", f"{node.module}: {alias.name}"
