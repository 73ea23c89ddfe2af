"""The wheel: what it holds, and that it works outside the repository, with and without weights."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LICENCES = "MIT AND CC-BY-4.0 AND CC-BY-NC-SA-4.0"
SMALL = ("--profile", "ci", "--quiet", "--out")
FAST = ("--set", "n_noises=1", "--quiet", "--out")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel, built without a network from a copy: a build in place would create build/."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    skip = shutil.ignore_patterns("__pycache__", ".*")
    for name in ("diffad_lite", "data", "notebooks", "LICENSES"):
        shutil.copytree(ROOT / name, source / name, ignore=skip)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder)]
    subprocess.run([*build, str(source)], check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


class Installed:
    """The wheel in an environment of its own, beside the libraries of this one."""

    def __init__(self, wheel: Path, folder: Path) -> None:
        self.cwd = folder / "elsewhere"
        self.cwd.mkdir(parents=True)
        environment = folder / "environment"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
        paths = {"base": str(environment), "platbase": str(environment)}
        self.bin = Path(sysconfig.get_path("scripts", "venv", paths))
        self.site = Path(sysconfig.get_path("purelib", "venv", paths))
        pip = [sys.executable, "-m", "pip", "--python", self.bin / "python", "install", "--quiet"]
        subprocess.run([*pip, "--no-index", "--no-deps", wheel], check=True)
        # A path only: the editable installation of the repository stays out.
        (self.site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def call(self, program: str, *arguments: str) -> subprocess.CompletedProcess:
        names = ("PYTHONPATH", "DIFFAD_DATA")
        env = {name: value for name, value in os.environ.items() if name not in names}
        command = [self.bin / program, *arguments]
        return subprocess.run(command, cwd=self.cwd, env=env, capture_output=True, text=True)

    def said(self, *arguments: str) -> str:
        result = self.call("diffad", *arguments)
        assert result.returncode == 0, result.stderr[-2000:]
        return result.stdout

    def refused(self, *arguments: str) -> str:
        result = self.call("diffad", *arguments)
        assert result.returncode == 2, result.stderr[-2000:]
        return result.stderr


def test_it_holds_the_course_with_the_texts_of_its_licences(wheel):
    assert wheel.stat().st_size < 100e6
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        info = next(name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = message_from_bytes(archive.read(info))
    course = {name.removeprefix("diffad_lite/course/") for name in names if "/course/" in name}
    listed = [p for p in (ROOT / "data").rglob("*") if p.is_file()]
    listed += [p for p in (ROOT / "notebooks").rglob("*.ipynb") if "checkpoint" not in p.name]
    assert course == {p.relative_to(ROOT).as_posix() for p in listed}
    assert metadata["License-Expression"] == LICENCES
    licences = ["LICENSE", "LICENSES/CC-BY-4.0.txt", "LICENSES/CC-BY-NC-SA-4.0.txt"]
    assert sorted(metadata.get_all("License-File")) == licences
    assert {info.replace("METADATA", f"licenses/{name}") for name in licences} <= names


@pytest.mark.timeout(900)
def test_it_works_outside_of_the_repository(wheel, tmp_path):
    installed = Installed(wheel, tmp_path)
    course = installed.site / "diffad_lite" / "course"
    code = "from diffad_lite.data import data_dir; print(data_dir())"
    assert installed.call("python", "-c", code).stdout.strip() == str(course / "data")
    assert installed.said("--version").startswith("diffad_lite ")
    assert "bundled: elpv-mono" in installed.said("methods")
    shapes = ("evaluate", "--method", "pca", "--dataset", "shapes", *SMALL)
    assert "image AUROC" in installed.said(*shapes, "shapes")
    bundled = ("evaluate", "--method", "anoddpm", "--checkpoint", "bundled", *FAST)
    assert "image AUROC 0.9" in installed.said(*bundled, "cells")
    copy = ("notebooks", "--copy", "lessons")
    assert "36 notebooks are in lessons" in installed.said(*copy)
    lesson = Path("solutions", "03_diffusionad.ipynb")
    written = (installed.cwd / "lessons" / lesson).read_bytes()
    assert written == (ROOT / "notebooks" / lesson).read_bytes()
    assert "already has 36 of 36 notebooks" in installed.refused(*copy)

    shutil.rmtree(course)  # without weights and lessons, training works, and the rest says why not
    assert "image AUROC" in installed.said(*shapes, "again")
    assert f"no data folder at {installed.site / 'data'}" in installed.refused(*bundled, "none")
    assert "install diffad_lite from its wheel" in installed.refused("notebooks", "--copy", "more")
