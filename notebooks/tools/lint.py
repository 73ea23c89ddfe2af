"""Check the rules for notebooks. Each rule has an id, and a message that names the fix.

    python notebooks/tools/lint.py [FILE ...]        default: all lessons, exercises, solutions

N06 to N10, N16 and N19 apply to every notebook, N11 to executed ones, all others to lessons.
"""

import argparse
import ast
import importlib.util
import io
import re
import statistics
import tokenize
from collections.abc import Iterator
from itertools import pairwise
from operator import attrgetter
from pathlib import Path
from urllib.parse import unquote

import nbformat
from nbformat import NotebookNode

# Loaded by path: `build` is also the name of an installed package.
_spec = importlib.util.spec_from_file_location("_build", Path(__file__).with_name("build.py"))
build = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(build)

GLANCE = ["Level", "Minutes (ci / lite / paper)", "Memory", "Previous", "Next"]
SECTIONS = ["You will be able to", "Prerequisites", "Paper, public code, ours"]
SECTIONS += ["What did not work", "Exercises", "What we learned", "References"]
PROFILE = 'profile: str = "lite"  # ci | lite | paper'
PARAMETER = re.compile(r"\w+: \w[\w\[\], |]* = (.+?)  # \S.*")
PROMPT = re.compile(r"### Exercise (\d\d)\.(\d+)\b.*[★⭐]")
ABSOLUTE = re.compile(r"(?<![\w.)\]}])/(?:home|Users|root|tmp|work)\b|\bC:\\|\.\./shared")
SEEDS = {"torch.manual_seed", "np.random.seed", "numpy.random.seed"}
MAX_BYTES = 3_000_000
Problems = Iterator[tuple[str, str]]  # rule id, message


class Notebook:
    """A notebook whose cells are numbered from 1."""

    def __init__(self, path: Path) -> None:
        """Read the file; raise ValueError if it is no notebook."""
        self.path = path.resolve()
        parent = self.path.parent.name
        self.kind = parent if parent in build.KINDS else "lesson"
        self.root = self.path.parents[1 if self.kind == "lesson" else 2]
        self.node = nbformat.read(path, as_version=4)
        self.cells = list(enumerate(self.node.cells, 1))
        self.code = [(i, cell) for i, cell in self.cells if cell.cell_type == "code"]
        self.markdown = [(i, cell) for i, cell in self.cells if cell.cell_type == "markdown"]

    def tagged(self, tag: str) -> list[int]:
        """Return the numbers of the cells that have a tag."""
        return [i for i, cell in self.cells if tag in build.tags(cell)]

    def headings(self, level: str) -> list[tuple[int, str]]:
        """Return cell number and text of the headings that begin with ``level``, such as '##'."""
        prose = [(i, re.sub(r"(?ms)^```.*?^```", "", cell.source)) for i, cell in self.markdown]
        heading = re.compile(rf"(?m)^{level} (.+)")
        return [(i, text.strip()) for i, source in prose for text in heading.findall(source)]


def syntax(cell: NotebookNode) -> list[ast.AST]:
    """Return all nodes of the syntax tree of a cell; none if it is not plain Python."""
    try:
        return list(ast.walk(ast.parse(cell.source)))
    except SyntaxError:
        return []


def layout(nb: Notebook) -> Problems:
    """Check what has the same place in every lesson: title, table, sections, a prediction."""
    if (where := [i for i, _ in nb.headings("#")]) != [1]:
        yield "N01", f"'# ' headings in cells {where}; write exactly one, in the first cell"
    lines = [line for _, cell in nb.cells[:2] for line in cell.source.splitlines()]
    rows = [[part.strip(" *") for part in line.split("|")] for line in lines if line[:1] == "|"]
    given = [row[1] for row in rows if len(row) > 3 and row[2]]
    if missing := [name for name in GLANCE if name not in given]:
        yield "N02", f"the at-a-glance table in cell 1 or 2 lacks {missing}; add '| row | value |'"
    sections = [text for _, text in nb.headings("##") if text in SECTIONS]
    if sections != SECTIONS:
        yield "N03", f"has the sections {sections}; needs each once, in the order {SECTIONS}"
    predictions = [i for i, c in nb.markdown if re.search(r"(?m)^\*\*Predict\*\*", c.source)]
    if not predictions or not nb.code or predictions[0] > nb.code[-1][0]:
        yield "N18", "asks for no prediction; begin a line with '**Predict**' before some results"
    if not any(isinstance(node, ast.Assert) for _, cell in nb.code for node in syntax(cell)):
        yield "N20", "has no assert; add one that fails when the lesson's claim does not hold"


def exercises(nb: Notebook) -> Problems:
    """Check the prompts, and outside the lesson a solution and a check for each."""
    starts = nb.tagged("exercise")
    if not 3 <= len(starts) <= 5:
        yield "N19", f"has {len(starts)} exercises; write 3 to 5"
    for k, (i, end) in enumerate(pairwise([*starts, len(nb.cells) + 1]), 1):
        heading = PROMPT.match(nb.node.cells[i - 1].source)
        if not heading or heading.groups() != (nb.path.name[:2], str(k)):
            yield "N19", f"cell {i}: begin it '### Exercise {nb.path.name[:2]}.{k}' and stars (★)"
        for tag in () if nb.kind == "lesson" else ("solution", "check"):
            if not any(i < j < end for j in nb.tagged(tag)):
                yield "N19", f"cell {i}: no cell tagged {tag!r} before the next exercise; add one"


def parameters(nb: Notebook) -> Problems:
    """Check that parameters, set-up and seeds are where papermill and readers expect them."""
    if nb.tagged("parameters") != [i for i, _ in nb.code[:1]]:
        yield "N04", "tag one cell 'parameters': the first code cell"
    lines = [s for i, c in nb.code if i in nb.tagged("parameters") for s in c.source.splitlines()]
    for line in lines:
        try:
            ast.literal_eval(PARAMETER.fullmatch(line)[1])
        except (TypeError, ValueError, SyntaxError):
            yield "N04", f"write the parameter {line!r} as 'name: type = literal  # help'"
    if PROFILE not in lines:
        yield "N04", f"the parameters cell needs the line {PROFILE!r}"
    if nb.tagged("setup") != [i for i, _ in nb.code[1:2]]:
        yield "N05", "tag one cell 'setup': the second code cell"
    for i, cell in nb.code:
        teaches = [tag for tag in build.tags(cell) if tag.startswith("teaches:")]
        if "setup" in build.tags(cell):
            continue
        if not teaches and any(map(is_import, syntax(cell))):
            yield "N05", f"cell {i}: move the import to the set-up cell"
        calls = {ast.unparse(n.func) for n in syntax(cell) if isinstance(n, ast.Call)}
        for seed in calls & SEEDS:
            yield "N17", f"cell {i}: {seed} outside the set-up cell; use a torch.Generator"
        for tag in teaches:
            yield from taught_object(i, tag.removeprefix("teaches:"))


def taught_object(i: int, name: str) -> Problems:
    """Check that the object of a tag 'teaches:module:Qualified.name' exists in the package."""
    module, _, qualified = name.partition(":")
    try:
        attrgetter(qualified)(importlib.import_module(module))
    except (ImportError, AttributeError, ValueError) as error:
        yield "N15", f"cell {i}: teaches {name!r}: {error}; write teaches:module:Qualified.name"


def is_import(node: ast.AST) -> bool:
    """Tell whether a node is an import statement."""
    return isinstance(node, ast.Import | ast.ImportFrom)


def n_import_lines(cell: NotebookNode) -> int:
    """Return the number of lines of import statements; the limits do not count them."""
    nodes = filter(is_import, syntax(cell))
    return sum((node.end_lineno or node.lineno) - node.lineno + 1 for node in nodes)


def code_style(nb: Notebook) -> Problems:
    """Check that code cells are short, fit on a projector, and are plain Python."""
    lengths = {i: len(cell.source.splitlines()) - n_import_lines(cell) for i, cell in nb.code}
    for i, length in lengths.items():
        if length > 30:
            yield "N06", f"cell {i}: {length} lines; split it at 30, or move code to the package"
    if (median := statistics.median(lengths.values() or [0])) > 10:
        yield "N06", f"the median code cell has {median:g} lines; split long ones until it has 10"
    for i, cell in nb.code:
        for line in cell.source.splitlines():
            if len(line) > 88:
                yield "N07", f"cell {i}: {len(line)} characters, {line[:30]!r}...; break it at 88"
        if not syntax(cell):
            yield "N08", f"cell {i}: is not plain Python; write no lines that begin with % or !"
        elif number := line_with_semicolon(cell.source):
            yield "N08", f"cell {i}: drop the ';' that ends line {number}; end with plt.show()"


def line_with_semicolon(source: str) -> int | None:
    """Return the first line whose code ends with ';'. nbval shows the output that it would hide."""
    ends = (tokenize.NEWLINE, tokenize.COMMENT, tokenize.ENDMARKER)
    tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    lines = (a.start[0] for a, b in pairwise(tokens) if a.string == ";" and b.type in ends)
    return next(lines, None)


def portable(nb: Notebook) -> Problems:
    """Check for paths of the author's machine, stored widgets, and broken links."""
    for i, cell in nb.cells:
        for where, text in (("the source", cell.source), ("an output", output_text(cell))):
            if match := ABSOLUTE.search(text):
                yield "N09", f"cell {i}: {match[0]!r} in {where}; use a path relative to data_dir()"
    mimes = {mime for _, c in nb.code for o in c.outputs for mime in o.get("data", {})}
    if "widgets" in nb.node.metadata or build.WIDGET in mimes:
        yield "N10", "stores widgets; execute it with notebooks/tools/build.py"
    if nb.node.metadata.get("kernelspec", {}).get("name") != "python3":
        yield "N10", "the kernelspec is not python3; write it with notebooks/tools/build.py"
    for i, cell in nb.markdown:
        for link in filter(None, (match["to"] for match in build.LINK.finditer(cell.source))):
            file = (nb.path.parent / unquote(link.split("#")[0])).resolve()
            if not file.exists() or not file.is_relative_to(nb.root):
                yield "N16", f"cell {i}: the link {link!r} leads to no file here; correct it"


def output_text(cell: NotebookNode) -> str:
    """Return all text that a cell printed, raised or displays, in any format."""
    texts = []
    for output in cell.get("outputs", []):
        texts += [output.get("text", ""), *output.get("traceback", [])]
        texts += [text for mime, text in output.get("data", {}).items() if mime[:5] == "text/"]
    return "\n".join(texts)


def execution(nb: Notebook) -> Problems:
    """Check that cells were executed from top to bottom, without errors or warnings."""
    counts = [cell.execution_count for _, cell in nb.code]
    if counts != list(range(1, len(counts) + 1)):
        yield "N11", f"execution counts {counts}, not 1..n; run notebooks/tools/build.py --execute"
    for i, cell in nb.code:
        for output in cell.outputs:
            if output.output_type == "error" or output.get("name") == "stderr":
                text = (output.get("ename") or output.text).strip().splitlines()[0]
                yield "N11", f"cell {i}: {text[:60]!r}; make the cell run without error or warning"


def outputs(nb: Notebook) -> Problems:
    """Check outputs: text beside each figure, few printed lines, a small file."""
    text_cells = {i for i, cell in nb.markdown if cell.source.strip()}
    for i, cell in nb.code:
        figures = [output for output in cell.outputs if "image/png" in output.get("data", {})]
        if figures and not {i - 1, i + 1} & text_cells:
            yield "N12", f"cell {i}: a figure without words; add a markdown cell before or after it"
        printed = [o.get("text") or o.get("data", {}).get("text/plain", "") for o in cell.outputs]
        if (count := sum(len(part.splitlines()) for part in printed)) > 100:
            yield "N14", f"cell {i}: {count} lines of output; print at most 100"
    if (size := nb.path.stat().st_size) > MAX_BYTES:
        yield "N13", f"{size / 1e6:.1f} MB; keep it under 3 MB: fewer or smaller figures"


EVERYWHERE = [code_style, portable, exercises]
RULES = {"exercises": EVERYWHERE, "solutions": [*EVERYWHERE, execution]}
RULES["lesson"] = [*EVERYWHERE, layout, parameters, execution, outputs]


def lint(path: Path) -> list[str]:
    """Return a line 'path: id message' for each problem of a notebook."""
    try:
        nb = Notebook(path)
    except (ValueError, AttributeError) as error:
        return [f"{path}: N00 is not a notebook: {error}"]
    return [f"{path}: {name} {text}" for check in RULES[nb.kind] for name, text in check(nb)]


def main(arguments: list[str] | None = None) -> int:
    """Run the command; print one problem per line, and return 1 if there are any."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, help="default: all notebooks")
    parser.add_argument("--notebooks", type=Path, default=build.NOTEBOOKS)
    options = parser.parse_args(arguments)
    paths = [p for kind in ("", *build.KINDS) for p in (options.notebooks / kind).glob("*.ipynb")]
    problems = [line for path in options.files or sorted(paths) for line in lint(path)]
    print(*problems, sep="\n", end="\n" if problems else "")
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
