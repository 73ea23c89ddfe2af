"""The project as a whole: packaging, environments, rendered tables, grids, paths."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from functools import partial
from hashlib import sha256
from pathlib import Path

import nbformat
import pytest
import yaml

from diffad_lite.core.files import course_dir
from diffad_lite.evaluation.records import read_results
from diffad_lite.evaluation.tables import render
from diffad_lite.experiments.grid import find_missing, named_scorings, read_grid

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "diffad_lite"


def test_conda_and_pip_name_the_same_packages():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pip = project["dependencies"] + project["optional-dependencies"]["test"]
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    names = {"pytorch": "torch", "python-build": "build"}
    from_conda = set()
    for entry in [e for e in conda if isinstance(e, str)] + conda[-1]["pip"]:
        if entry not in ("pip", "--editable .", f"python{project['requires-python']}"):
            name, version = entry.split(">=")
            from_conda.add(f"{names.get(name, name)}>={version}")
    assert from_conda == set(pip)


def test_a_wheel_has_every_room_and_the_course():
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    rooms = {".".join(p.parent.relative_to(ROOT).parts) for p in PACKAGE.rglob("__init__.py")}
    assert set(tools["packages"]) == rooms | set(tools["package-dir"])
    assert {ROOT / folder for folder in tools["package-dir"].values()} == {
        course_dir() / "data",
        course_dir() / "notebooks",
    }


def test_rendering_the_tables_changes_nothing(tmp_path):
    documents = [ROOT / "README.md", ROOT / "data" / "README.md"]
    copies = []
    for i, path in enumerate(documents):
        copies.append(tmp_path / f"{i}.md")
        copies[-1].write_text(path.read_text())
    stored = ROOT / "data" / "results" / "tables.md"
    before = stored.read_text()
    try:
        assert render(ROOT / "data" / "results", copies) == [], "run 'make tables' and commit"
    finally:
        stored.write_text(before)


def test_bundled_checkpoints_are_what_the_index_says():
    folder = ROOT / "data" / "checkpoints"
    index = json.loads((folder / "index.json").read_text())
    assert set(index) == {p.name for p in folder.iterdir() if p.is_dir()}
    for entry in index.values():
        assert sha256((folder / entry["file"]).read_bytes()).hexdigest() == entry["sha256"]
        assert entry["command"].startswith("diffad train")
    assert sum(p.stat().st_size for p in folder.rglob("*")) < 40e6


def test_the_committed_grids_are_valid_and_done():
    """43 scorings of ablations on planted defects are still missing, and nothing else."""
    grids = {"grid", "grid_folders", "ablations", "development"}
    assert {p.stem for p in (ROOT / "data").glob("*.yaml")} == {*grids, "claims"}
    records = read_results(ROOT / "data" / "results")
    for path in (ROOT / "data" / f"{name}.yaml" for name in grids):
        grid = read_grid(path)
        runs_to_do, n_runs = find_missing(grid, records)
        assert n_runs > 30
        if path.stem == "ablations":
            planted = {name for name, _, scoring in named_scorings(grid) if scoring.plant}
            assert len(planted & set(runs_to_do)) == 43, "run them, or correct this number"
            runs_to_do = [name for name in runs_to_do if name not in planted]
        assert runs_to_do == [], f"{path.name} has runs without a record"


def test_no_machine_paths_in_tracked_text():
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    forbidden = ["/" + word + "/" for word in ("work", "root", "home")] + [".." + "/shared"]
    allowed = ("notebooks/tools/", "tests/notebook/test_notebook_tools.py")
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.suffix in {".py", ".md", ".ipynb", ".toml", ".yml", ".yaml", ".json"}:
            text = path.read_text(errors="ignore")
            paths = [word for word in forbidden if word in text]
            assert not paths or name.startswith(allowed), f"{name} contains {paths}"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_all_cells_of_a_notebook_run_in_one_process(tmp_path):
    """As ``make test-notebooks`` calls nbval: each code cell uses variables of earlier ones."""
    for name in ("a", "b", "c"):
        cells = [nbformat.v4.new_code_cell(f"x = {name!r}\ncount = 0")]
        cells += [
            nbformat.v4.new_code_cell(f"count += 1\nassert count == {i}") for i in range(1, 9)
        ]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / f"{name}.ipynb")
    lessons = " ".join(str(path) for path in sorted(tmp_path.glob("*.ipynb")))
    make = ["make", "-n", "-o", ".venv/.installed-test", "test-notebooks", f"LESSONS={lessons}"]
    env = {
        k: v for k, v in os.environ.items() if not k.startswith("MAKE")
    }  # without the options of a calling make
    call = partial(subprocess.run, cwd=ROOT, env=env, capture_output=True, text=True)
    printed = call([*make, "--no-print-directory"], check=True).stdout
    assert "-n 2" in printed
    command = printed.replace(".venv/bin/python", sys.executable)
    result = call(command, shell=True)
    assert result.returncode == 0, result.stdout[-2000:]
    assert "27 passed" in result.stdout
