"""Execute notebooks: kernels that do not start, notebooks that say little of themselves."""

import json
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from diffad_lite.cli.main import main
from diffad_lite.notebook.runner import run_notebooks

KERNELS = {
    "dies": [sys.executable, "-c", "raise SystemExit(3)"],
    "sleeps": [sys.executable, "-c", "import time; time.sleep(60)"],
    "gone": ["/nowhere/python", "-m", "ipykernel_launcher", "-f", "{connection_file}"],
}


@pytest.fixture
def lessons(tmp_path, monkeypatch) -> Path:
    """A folder for notebooks; kernels that do not start are installed, each under its name."""
    for name, argv in KERNELS.items():
        folder = tmp_path / "jupyter" / "kernels" / name
        folder.mkdir(parents=True)
        spec = {"argv": argv, "display_name": name, "language": "python"}
        (folder / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    (tmp_path / "lessons").mkdir()
    return tmp_path / "lessons"


def write(path: Path, *cells: str, parameters: str = "", kernel: str = "", language="python"):
    """Write a notebook, with a cell tagged ``parameters`` and a kernel if they are given."""
    notebook = new_notebook(cells=[new_code_cell(source) for source in cells])
    if parameters:
        tagged = new_code_cell(parameters, metadata={"tags": ["parameters"]})
        notebook.cells.insert(0, tagged)
    if kernel:
        notebook.metadata.kernelspec = {"name": kernel, "display_name": "K", "language": language}
    nbformat.write(notebook, path)


def printed(path: Path) -> str:
    """Return what the last cell of an executed notebook printed."""
    return nbformat.read(path, as_version=4).cells[-1].outputs[0].text


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        ("pyhton3", "unknown kernel 'pyhton3'; did you mean 'python3'? known: "),
        ("dies", "the kernel does not start (Kernel died before replying to kernel_info)"),
        ("sleeps", "the kernel did not answer in 1 s; give a longer --start-timeout"),
        ("gone", "the kernel does not start ([Errno 2] No such file or directory: '/nowhere/py"),
    ],
)
def test_a_kernel_that_does_not_start_is_one_line_and_the_next_lesson_runs(
    kernel, reason, lessons, tmp_path, capsys
):
    write(lessons / "01_bad.ipynb", "1", kernel=kernel)
    write(lessons / "02_good.ipynb", "print('reached')", kernel="dies")
    out = tmp_path / "out"
    out.mkdir()
    (out / "01_bad.ipynb").write_text("of an earlier call")
    words = ["notebooks", "--folder", lessons, "--out", out]
    assert main([*map(str, words), "--start-timeout", "1"]) == 1
    first, second = capsys.readouterr().err.splitlines()[-2:]
    assert first.startswith(f"diffad: 01_bad.ipynb: {reason}")
    assert second.startswith("diffad: 02_good.ipynb: the kernel does not start")
    assert list(out.iterdir()) == [], "an older copy would pass for that of this call"


def test_lessons_that_name_no_kernel_and_no_parameters_are_executed(lessons, tmp_path, capsys):
    write(lessons / "01_plain.ipynb", "print('plain')")
    write(lessons / "02_typed.ipynb", "print(profile, seed)", parameters="profile = ''\nseed = 0")
    bare = json.loads((lessons / "02_typed.ipynb").read_text())
    bare["metadata"] = {}
    (lessons / "02_typed.ipynb").write_text(json.dumps(bare))
    parameters = {"profile": "ci", "seed": 3}
    assert run_notebooks(lessons, tmp_path / "out", parameters=parameters) == []
    assert printed(tmp_path / "out" / "01_plain.ipynb") == "plain\n"
    assert printed(tmp_path / "out" / "02_typed.ipynb") == "ci 3\n"
    said = capsys.readouterr().out
    assert "01_plain.ipynb: no cell tagged 'parameters' has a profile; executed as it is" in said
    assert "02_typed.ipynb: no cell" not in said
    assert main(["notebooks", "--folder", str(lessons), "--only", "01", "--set", "seed=3"]) == 2
    assert "unknown parameter 'seed'" in capsys.readouterr().err


def test_parameters_are_what_the_tagged_cell_assigns(lessons, tmp_path, capfd):
    """Values with an equals sign, several lines, unions of types, magics: papermill sees none."""
    cell = [
        'formula: str = "a=b"  # x=y',
        "limit: int | None = None",
        "options = dict(",
        "    a=1, b=2)",
        "%precision 3",
    ]
    write(lessons / "01_a.ipynb", "print(formula, limit, options)", parameters="\n".join(cell))
    words = ["notebooks", "--folder", str(lessons), "--out", str(tmp_path / "out")]
    words += ["--set", "formula=c=d", "--set", "limit=4", "--set", 'options={"a": 5}']
    assert main(words) == 0
    assert printed(tmp_path / "out" / "01_a.ipynb") == "c=d 4 {'a': 5}\n"
    assert "nable to parse" not in capfd.readouterr().err
    write(lessons / "01_a.ipynb", "1", parameters="seed = = 3")
    assert main(words) == 2
    assert "01_a.ipynb: its cell of parameters is not Python" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--profile", "CI"], "unknown profile 'CI'; did you mean 'ci'?"),
        (["--start-timeout", "0"], "start_timeout must be at least 1 second, got 0"),
    ],
)
def test_bad_values_are_refused_before_a_kernel_starts(words, message, lessons, tmp_path, capsys):
    write(lessons / "01_a.ipynb", "1", parameters="profile = 'lite'", kernel="sleeps")
    out = tmp_path / "out"
    assert main(["notebooks", "--folder", str(lessons), "--out", str(out), *words]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()
