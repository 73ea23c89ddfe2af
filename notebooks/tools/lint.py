"""House rules of the notebooks: each has an id, and a message that says what to do.

    python notebooks/tools/lint.py [FILE ...]        default: all lessons, exercises, solutions

N06 to N10, N16 and N19 hold for every notebook, N11 for those that are run, others for lessons.
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
MAX_BYTES = 1_500_000
Problems = Iterator[tuple[str, str]]  # rule id, message


class Notebook:
    """A notebook as the rules see it; cells are numbered from 1."""

    def __init__(self, path: Path) -> None:
        """Read it; raises ValueError if it is no notebook."""
        self.path = path.resolve()
        parent = self.path.parent.name
        self.kind = parent if parent in build.KINDS else "lesson"
        self.root = self.path.parents[1 if self.kind == "lesson" else 2]
        self.node = nbformat.read(path, as_version=4)
        self.cells = list(enumerate(self.node.cells, 1))
        self.code = [(i, cell) for i, cell in self.cells if cell.cell_type == "code"]
        self.markdown = [(i, cell) for i, cell in self.cells if cell.cell_type == "markdown"]

    def tagged(self, tag: str) -> list[int]:
        """The numbers of the cells that have a tag."""
        return [i for i, cell in self.cells if tag in build.tags(cell)]

    def headings(self, level: str) -> list[tuple[int, str]]:
        """Cell number and text of the headings of a level, such as '##'."""
        prose = [(i, re.sub(r"(?ms)^```.*?^```", "", cell.source)) for i, cell in self.markdown]
        heading = re.compile(rf"(?m)^{level} (.+)")
        return [(i, text.strip()) for i, source in prose for text in heading.findall(source)]


def syntax(cell: NotebookNode) -> list[ast.AST]:
    """Every node of a cell's code; none if it is not plain Python."""
    try:
        return list(ast.walk(ast.parse(cell.source)))
    except SyntaxError:
        return []


def layout(nb: Notebook) -> Problems:
    """What a reader finds in the same place in every lesson."""
    if (where := [i for i, _ in nb.headings("#")]) != [1]:
        yield "N01", f"'# ' headings in cells {where}; write exactly one, in the first cell"
    lines = [line for _, cell in nb.cells[:2] for line in cell.source.splitlines()]
    rows = [[part.strip(" *") for part in line.split("|")] for line in lines if line[:1] == "|"]
    given = [row[1] for row in rows if len(row) > 3 and row[2]]
    if missing := [name for name in GLANCE if name not in given]:
        yield "N02", f"the at-a-glance table in cell 1 or 2 lacks {missing}; add '| row | value |'"
    if (found := [text for _, text in nb.headings("##") if text in SECTIONS]) != SECTIONS:
        yield "N03", f"has the sections {found}; needs each once, in the order {SECTIONS}"
    predictions = [i for i, c in nb.markdown if re.search(r"(?m)^\*\*Predict\*\*", c.source)]
    if not any(i < last for i in predictions for last, _ in nb.code[-1:]):
        yield "N18", "asks for no prediction; begin a line with '**Predict**' before some results"
    if not any(isinstance(node, ast.Assert) for _, cell in nb.code for node in syntax(cell)):
        yield "N20", "has no assert; add one that fails when the lesson's claim does not hold"


def exercises(nb: Notebook) -> Problems:
    """Prompts in the lesson; a solution and a check for each in the other two."""
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
    """Parameters, set-up and seeds: where papermill, and a reader, look for them."""
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
        if not teaches and any(isinstance(n, (ast.Import, ast.ImportFrom)) for n in syntax(cell)):
            yield "N05", f"cell {i}: move the import to the set-up cell"
        calls = {ast.unparse(n.func) for n in syntax(cell) if isinstance(n, ast.Call)}
        for seed in calls & SEEDS:
            yield "N17", f"cell {i}: {seed} outside the set-up cell; use a torch.Generator"
        for tag in teaches:
            yield from target(i, tag.removeprefix("teaches:"))


def target(i: int, name: str) -> Problems:
    """Whether a 'teaches:module:Qualified.name' exists in the package."""
    module, _, qualified = name.partition(":")
    try:
        found = importlib.import_module(module)
        for part in qualified.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        yield "N15", f"cell {i}: teaches {name!r}: {error}; write teaches:module:Qualified.name"


def imports(cell: NotebookNode) -> int:
    """Lines of import statements, which nobody reads as code."""
    found = [n for n in syntax(cell) if isinstance(n, ast.Import | ast.ImportFrom)]
    return sum((n.end_lineno or n.lineno) - n.lineno + 1 for n in found)


def code_style(nb: Notebook) -> Problems:
    """A cell is one thought, fits on a projector, and is plain Python."""
    lengths = {i: len(cell.source.splitlines()) - imports(cell) for i, cell in nb.code}
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
        elif number := semicolon(cell.source):
            yield "N08", f"cell {i}: drop the ';' that ends line {number}; end with plt.show()"


def semicolon(source: str) -> int | None:
    """The first line that ends in ';' as code, not as text. nbval shows what such a ';' hides."""
    ends = (tokenize.NEWLINE, tokenize.COMMENT, tokenize.ENDMARKER)
    tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    hits = (a.start[0] for a, b in pairwise(tokens) if a.string == ";" and b.type in ends)
    return next(hits, None)


def portable(nb: Notebook) -> Problems:
    """Nothing of the author's machine; links that lead somewhere."""
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
    """What a cell printed, raised or shows as text of whatever format."""
    texts = []
    for output in cell.get("outputs", []):
        texts += [output.get("text", ""), *output.get("traceback", [])]
        texts += [text for mime, text in output.get("data", {}).items() if mime[:5] == "text/"]
    return "\n".join(texts)


def execution(nb: Notebook) -> Problems:
    """Run from top to bottom, without complaints."""
    counts = [cell.execution_count for _, cell in nb.code]
    if counts != list(range(1, len(counts) + 1)):
        yield "N11", f"execution counts {counts}, not 1..n; run notebooks/tools/build.py --execute"
    for i, cell in nb.code:
        for output in cell.outputs:
            if output.output_type == "error" or output.get("name") == "stderr":
                text = (output.get("ename") or output.text).strip().splitlines()[0]
                yield "N11", f"cell {i}: {text[:60]!r}; make the cell run without error or warning"


def outputs(nb: Notebook) -> Problems:
    """Outputs that can be read: figures with words, little text, a small file."""
    text = {i for i, cell in nb.markdown if cell.source.strip()}
    for i, cell in nb.code:
        figures = [output for output in cell.outputs if "image/png" in output.get("data", {})]
        if figures and not {i - 1, i + 1} & text:
            yield "N12", f"cell {i}: a figure without words; add a markdown cell before or after it"
        printed = [o.get("text") or o.get("data", {}).get("text/plain", "") for o in cell.outputs]
        if (count := sum(len(part.splitlines()) for part in printed)) > 100:
            yield "N14", f"cell {i}: {count} lines of output; print at most 100"
    if (size := nb.path.stat().st_size) > MAX_BYTES:
        yield "N13", f"{size / 1e6:.1f} MB; keep it under 1.5 MB: fewer or smaller figures"


EVERYWHERE = [code_style, portable, exercises]
RULES = {"exercises": EVERYWHERE, "solutions": [*EVERYWHERE, execution]}
RULES["lesson"] = [*EVERYWHERE, layout, parameters, execution, outputs]


def lint(path: Path) -> list[str]:
    """A line 'path: id message' for each problem of a notebook."""
    try:
        nb = Notebook(path)
    except (ValueError, AttributeError) as error:
        return [f"{path}: N00 is not a notebook: {error}"]
    return [f"{path}: {name} {text}" for check in RULES[nb.kind] for name, text in check(nb)]


def main(arguments: list[str] | None = None) -> int:
    """Entry point; problems are printed one a line and give exit code 1."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, help="default: all notebooks")
    parser.add_argument("--notebooks", type=Path, default=build.NOTEBOOKS)
    options = parser.parse_args(arguments)
    everything = [p for k in ("", *build.KINDS) for p in (options.notebooks / k).glob("*.ipynb")]
    problems = [line for path in options.files or sorted(everything) for line in lint(path)]
    print(*problems, sep="\n", end="\n" if problems else "")
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
