"""The site: pages name existing objects, contain every lesson and module, and it builds."""

import dataclasses
import importlib.util
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from diffad_lite.methods.base import get_method

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PACKAGE = ROOT / "diffad_lite"
LESSONS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
METHODS = ("diffusionad", "glad", "mdps", "bernoulli", "grad")
PAGES = sorted(DOCS.rglob("*.md"))


def toctrees(page: Path) -> set[Path]:
    """Return the files in the tables of contents of a page."""
    files = set()
    for block in re.findall(r"```\{toctree\}\n(.*?)```", page.read_text(), re.DOTALL):
        for line in block.splitlines():
            entry = re.sub(r"^.*<(.*)>$", r"\1", line.strip())
            if entry and not entry.startswith(":"):
                files |= {path.resolve() for path in page.parent.glob(f"{entry}.*")}
    return files


def rows(text: str) -> list[list[str]]:
    """Return the cells of all rows of Markdown tables, without headers."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    headers = {i for i, line in enumerate(lines) if i + 1 < len(lines) and "| --- " in lines[i + 1]}
    body = [line for i, line in enumerate(lines) if i not in headers and "| --- " not in line]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in body]


def section(text: str, title: str) -> str:
    return text.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def test_every_lesson_is_in_a_table_of_contents():
    assert len(LESSONS) == 12
    assert {path.resolve() for path in LESSONS} <= toctrees(DOCS / "index.md")


def test_every_page_is_in_a_table_of_contents():
    named = set.union(*map(toctrees, PAGES))
    assert {page.resolve() for page in PAGES} - {DOCS / "index.md"} <= named


def test_every_lesson_has_its_exercises_listed():
    listed = rows((DOCS / "exercises.md").read_text())
    for lesson, cells in zip(LESSONS, listed, strict=True):
        assert all(f"/{lesson.name})" in cell for cell in cells)


def test_every_public_module_is_in_the_reference():
    pages = "".join(path.read_text() for path in (DOCS / "api").glob("*.md"))
    named = re.findall(r"automodule:: (\S+)", pages)
    modules = []
    for path in PACKAGE.rglob("*.py"):
        if path.name == "__main__.py":  # importing it would run it
            continue
        parts = path.relative_to(ROOT).with_suffix("").parts
        modules.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    assert sorted(named) == sorted(modules)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_links_lead_to_files(page):
    text = page.read_text()
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    targets += re.findall(r"^\[\d\d\]: (\S+)$", text, re.MULTILINE)
    for target in targets:
        assert (page.parent / target.replace("\n", "")).exists(), target


@pytest.mark.parametrize("name", METHODS)
def test_switches_are_fields_of_the_configuration(name):
    table = rows(section((DOCS / "methods" / f"{name}.md").read_text(), "Switches"))
    assert len(table) >= 6
    for cells in table:
        fields = re.findall(r"`([^`]+)`", cells[0])
        assert fields, cells
        for field in fields:
            config = get_method(name).Config
            for part in field.split("."):
                assert part in {f.name for f in dataclasses.fields(config)}, field
                config = typing.get_type_hints(config)[part]


@pytest.mark.parametrize("name", METHODS)
def test_values_of_switches_are_those_of_the_field(name):
    table = rows(section((DOCS / "methods" / f"{name}.md").read_text(), "Switches"))
    hints = typing.get_type_hints(get_method(name).Config)
    for field, values, *_ in table:
        first = re.findall(r"`([^`]+)`", field)[0]
        if named := set(re.findall(r"`([^`]+)`", values)):
            assert named == set(typing.get_args(hints[first])), first


def test_method_pages_contain_no_typed_result():
    for page in (DOCS / "methods").glob("*.md"):
        assert not re.search(r"\b0\.\d{3}\b|AUROC (of )?\d", page.read_text()), page.name


def test_symbols_lead_to_a_lesson_and_to_code():
    text = (DOCS / "notation.md").read_text()
    symbols, _ = text.split("\n## One symbol")
    references = dict(re.findall(r"^\[(\d\d)\]: (\S+)$", text, re.MULTILINE))
    code = "\n".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    names = set(re.findall(r"[A-Za-z_]\w*", code))
    table = rows(symbols)
    assert len(table) > 90
    for symbol, _meaning, in_code, lesson in table:
        assert "$" in symbol
        assert (DOCS / references[lesson.strip("[]")]).exists(), symbol
        code_names = re.findall(r"`([^`]+)`", in_code)
        assert (in_code == "lesson only") == (not code_names), symbol
        assert set(code_names) <= names, symbol


def test_notation_covers_the_letters_of_the_lessons():
    text = (DOCS / "notation.md").read_text()
    known = set(re.findall(r"\\(?:var)?[A-Za-z]+", text))
    greek = r"\\(?:alpha|beta|delta|Delta|epsilon|eta|theta|kappa|lambda|mu|nu|pi|rho|sigma|Sigma|"
    greek += r"tau|varphi|varsigma)(?![a-zA-Z])"
    for source in sorted((ROOT / "notebooks" / "src").glob("0[1-8]*.py")):
        used = set(re.findall(greek, source.read_text()))
        assert used <= known, f"{source.name}: {used - known}"


BUILDERS = ("sphinx", "myst_nb", "sphinx_book_theme")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", str(DOCS)]
    command += ["-d", str(folder / "doctrees"), str(ROOT), str(folder / "site")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr[-4000:]
    return folder / "site"


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, BUILDERS)), reason="needs pip install -e '.[docs]'"
)
@pytest.mark.timeout(900)  # about a minute on an idle core
class TestBuild:
    def test_pages_exist_and_need_no_network(self, site):
        for lesson in LESSONS:
            page = (site / "notebooks" / f"{lesson.stem}.html").read_text()
            assert "<img" in page or "<table" in page
            remote = re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=\"(https?:[^\"]+)", page)
            local_mathjax = importlib.util.find_spec("jupyter_server_mathjax")
            assert local_mathjax is None or not remote, remote
            assert "jupyter-widgets" not in page
        assert "docs/index.html" in (site / "index.html").read_text()

    def test_tables_are_rendered(self, site):
        for name in METHODS:
            page = (site / "docs" / "methods" / f"{name}.html").read_text()
            assert page.count("<table") >= 5
            assert "results-table" not in page
        assert "holds" in (site / "docs" / "claims.html").read_text()

    def test_formulas_are_formulas(self, site):
        page = (site / "notebooks" / "04_glad.html").read_text()
        assert page.count('class="math') > 50
        assert not re.search(r"\$[^$<]*\\bar\\alpha[^$<]*\$", page)
