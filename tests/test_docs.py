"""README and docs: commands parse, links lead to files, examples run."""

import re
import shlex
from pathlib import Path

import pytest

from diffad_lite.cli.main import build_parser

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    """Return the fenced code blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    """Return the arguments of each call of ``diffad`` on a page, without comments."""
    lines = "".join(blocks(page, "console")).replace("\\\n", " ").splitlines()
    words = [
        shlex.split(re.sub("-m diffad_lite.cli", "diffad", line), comments=True) for line in lines
    ]
    calls = [line[line.index("diffad") + 1 :] for line in words if "diffad" in line]
    return [arguments for arguments in calls if arguments]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_parse(page):
    for arguments in commands(page):
        build_parser().parse_args(arguments)  # exits with an error for an unknown option


def test_there_are_commands_to_check():
    assert sum(len(commands(page)) for page in PAGES) >= 12


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_imports_of_python_examples_work(page):
    for block in blocks(page, "python"):
        lines = [line for line in block.splitlines() if "import" in line and "diffad" in line]
        exec("\n".join(lines), {})


def test_the_readme_has_an_example():
    assert len(blocks(ROOT / "README.md", "python")) == 1


def test_the_slurm_script_requests_its_resources(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (script,) = blocks(ROOT / "docs" / "scaling.md", "python")
    names: dict = {"__name__": "slurm"}
    exec(compile(script, "slurm.py", "exec"), names)
    try:
        job_script = names["cluster"].job_script()
    finally:
        names["cluster"].close()
    for line in ("-p gpu", "-A my-project", "--cpus-per-task=8", "-t 08:00:00", "--gres=gpu:1"):
        assert f"#SBATCH {line}" in job_script
    assert "--nthreads 1 " in job_script
