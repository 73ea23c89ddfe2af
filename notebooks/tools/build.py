"""Generate lesson, exercises and solutions from each master `src/NN_title.py`.

python notebooks/tools/build.py [NN ...]             write the notebooks; keep valid outputs
python notebooks/tools/build.py --execute [NN ...]   and execute lesson and solutions
python notebooks/tools/build.py --check [NN ...]     write nothing; list outdated notebooks
"""

import argparse
import hashlib
import json
import os
import re
from pathlib import Path
from unittest import mock

import jupytext
import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_markdown_cell, new_notebook

from diffad_lite.core.config import unknown_name
from diffad_lite.core.files import write_atomically

NOTEBOOKS, DEFAULT_PROFILE = Path(__file__).resolve().parents[1], "lite"
KINDS, EXECUTED = ("lesson", "exercises", "solutions"), ("lesson", "solutions")
# A role is a tag that decides where a cell goes. A cell has at most one; "context" fits both types.
CODE_ROLES, TEXT_ROLES = {"parameters", "setup", "solution", "check"}, {"exercise", "explain"}
ROLES = CODE_ROLES | TEXT_ROLES | {"context"}
OTHER_TAGS = {"nbval-check-output", "nbval-ignore-output", "nbval-skip"}  # and teaches:...
BLOCK = re.compile(r"^( *)# BEGIN SOLUTION\n(.*?)^ *# END SOLUTION(?:\n|$)", re.M | re.S)
STUB = 'raise NotImplementedError("your turn")'
PYTHON3 = {"display_name": "Python 3", "language": "python", "name": "python3"}
WIDGET = "application/vnd.jupyter.widget-view+json"
# A progress bar of tqdm: "train: 40%|##  | 2/5 [00:03<00:04, 1.5s/it]" or "12it [00:03, 4.0it/s]".
BAR = re.compile(r"[^\r\n]*?(?:\d%\|[^\r\n]*?|\d\w* )\[\d+:\d\d[^\r\n\]]*\]|\x1b\[A")
LINK = re.compile(  # "to" is a relative target in Markdown; code and formulas are skipped
    r"```.*?```|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]+\$"
    r"|(?P<before>\]\(|(?:src|href)=\"|^\[(?!\^)[^\]\n]+\]: )"
    r"(?P<to>(?![a-zA-Z][\w+.-]*:|#|/)[^)\s\"]+)",
    re.M | re.S,
)


def find_masters(folder: Path) -> dict[str, Path]:
    """Return number -> master `src/NN_title.py` of a folder of notebooks."""
    return {p.stem[:2]: p for p in sorted((folder / "src").resolve().glob("[0-9][0-9]_*.py"))}


def notebook_path(master: Path, kind: str) -> Path:
    """Return the path of a notebook: beside `src/`, or in the folder of its kind."""
    return master.parents[1] / ("" if kind == "lesson" else kind) / f"{master.stem}.ipynb"


def tags(cell: NotebookNode) -> list[str]:
    """Return the tags of a cell."""
    return list(cell.metadata.get("tags", []))


def role(cell: NotebookNode) -> str | None:
    """Return the tag that decides into which notebooks a cell goes."""
    return next((tag for tag in tags(cell) if tag in ROLES), None)


def read_master(master: Path) -> list[NotebookNode]:
    """Return the cells of a master; raise ValueError for invalid tags, cell types or markers."""
    cells = jupytext.reads(master.read_text(encoding="utf-8"), fmt="py:percent").cells
    if not cells or cells[0].cell_type != "markdown" or not cells[0].source.startswith("# "):
        raise ValueError(f"src/{master.name}: has no title; begin with a markdown cell '# Title'")
    for number, cell in enumerate(cells, 1):
        where, roles = f"src/{master.name}, cell {number}", ROLES & set(tags(cell))
        for tag in set(tags(cell)) - ROLES - OTHER_TAGS:
            if not tag.startswith("teaches:"):
                raise ValueError(f"{where}: {unknown_name('tag', tag, ROLES | OTHER_TAGS)}")
        if len(roles) > 1:
            raise ValueError(f"{where}: is tagged {' and '.join(sorted(roles))}; keep one of them")
        if roles & (TEXT_ROLES if cell.cell_type == "code" else CODE_ROLES):
            raise ValueError(f"{where}: is {cell.cell_type}; change its type or its tag {roles}")
        if roles == {"solution"}:
            fill(cell.source, stub=False, where=where)
    return cells


def fill(source: str, *, stub: bool, where: str = "") -> str:
    """Remove the markers, and with ``stub`` the code between them; raise ValueError if unpaired."""
    text, n_blocks = BLOCK.subn(rf"\1{STUB}\n" if stub else r"\2", source)
    if not n_blocks or "# BEGIN SOLUTION" in text or "# END SOLUTION" in text:
        raise ValueError(f"{where}: needs lines '# BEGIN SOLUTION', '# END SOLUTION', in turns")
    return text.rstrip()


def lesson_cells(cells: list[NotebookNode], stem: str) -> list[NotebookNode]:
    """Return all cells but solutions, checks and explanations; add a link after the exercises."""
    lesson = [cell for cell in cells if role(cell) not in ("solution", "check", "explain")]
    prompts = [i for i, cell in enumerate(lesson, 1) if role(cell) == "exercise"]
    exercises, solutions = (f"[{kind}/{stem}.ipynb]({kind}/{stem}.ipynb)" for kind in KINDS[1:])
    link = f"Solve these in {exercises}; the solutions are a click away, in {solutions}."
    if prompts:
        lesson.insert(prompts[-1], new_markdown_cell(link))
    return lesson


def exercise_cells(cells: list[NotebookNode], stem: str, *, solved: bool) -> list[NotebookNode]:
    """Return the exercises and their context: solved and explained, or as stubs."""
    title = cells[0].source.splitlines()[0].removeprefix("# ")
    heading = f"# {'Solutions' if solved else 'Exercises'}: {title}"
    exercises = [new_markdown_cell(f"{heading}\n\nThe lesson: [{title}](../{stem}.ipynb).")]
    for cell in cells:
        source = cell.source
        if role(cell) == "solution":
            source = fill(source, stub=not solved)
        elif cell.cell_type == "markdown":  # these notebooks are one folder deeper
            source = LINK.sub(
                lambda m: m[0] if not m["to"] else f"{m['before']}../{m['to']}", source
            )
        if role(cell) and (solved or role(cell) != "explain"):
            exercises.append(NotebookNode(cell, source=source))
    return exercises


def source_hash(cells: list[NotebookNode]) -> str:
    """Return 16 hex digits over types, sources and tags of the cells: outputs depend on these."""
    content = json.dumps([[c.cell_type, c.source, tags(c)] for c in cells])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def generate(master: Path) -> dict[str, NotebookNode]:
    """Return kind -> notebook of a master, with those outputs on disk that are still valid."""
    master_cells, notebooks = read_master(master), {}
    for kind in KINDS:
        if kind == "lesson":
            cells = lesson_cells(master_cells, master.stem)
        else:
            cells = exercise_cells(master_cells, master.stem, solved=kind == "solutions")
        for i, cell in enumerate(cells):
            cell_metadata = {"tags": tags(cell)} if tags(cell) else {}
            cells[i] = NotebookNode(cell, id=f"{kind}-{i:03d}", metadata=cell_metadata)
        origin = {"master": f"src/{master.name}", "sources": source_hash(cells)}
        metadata = {"diffad": origin, "kernelspec": PYTHON3, "language_info": {"name": "python"}}
        notebooks[kind] = new_notebook(cells=cells, metadata=metadata, nbformat_minor=5)
        if kind in EXECUTED:
            keep_outputs(notebooks[kind], notebook_path(master, kind))
    return notebooks


def keep_outputs(notebook: NotebookNode, path: Path) -> None:
    """Copy the outputs of the notebook at ``path``, if it exists and has the same sources."""
    try:
        stored = nbformat.read(path, as_version=4)
        if source_hash(stored.cells) != notebook.metadata.diffad.sources:
            return
    except (OSError, ValueError, AttributeError):  # missing, or no notebook
        return
    for cell, stored_cell in zip(notebook.cells, stored.cells, strict=True):
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = stored_cell.outputs, stored_cell.execution_count
    for key in {"executed", "profile"} & set(stored.metadata.get("diffad", {})):
        notebook.metadata.diffad[key] = stored.metadata.diffad[key]


def build(master: Path, *, check: bool = False) -> list[str]:
    """Write the notebooks of a master; with ``check``, only return a line per outdated one."""
    lines, fix = [], f"run: python notebooks/tools/build.py {master.stem[:2]}"
    for kind, notebook in generate(master).items():
        path, origin = notebook_path(master, kind), notebook.metadata.diffad
        if not check:
            write(path, notebook)
        elif not path.exists() or path.read_text("utf-8") != nbformat.writes(notebook) + "\n":
            lines.append(f"{os.path.relpath(path)}: missing, or not as its master makes it; {fix}")
        elif kind in EXECUTED and origin.get("executed") != origin.sources:
            lines.append(f"{os.path.relpath(path)}: not run from these sources; {fix} --execute")
    return lines


def write(path: Path, notebook: NotebookNode) -> None:
    """Write a notebook atomically."""
    text = nbformat.writes(notebook) + "\n"
    write_atomically(path, lambda p: p.write_text(text, encoding="utf-8"))
    print(f"wrote {os.path.relpath(path)}")


def execute(path: Path, profile: str) -> None:
    """Execute a built notebook and store its outputs; raise RuntimeError where a cell fails."""
    import papermill

    notebook = nbformat.read(path, as_version=4)  # papermill executes a copy
    options = {"parameters": {} if profile == DEFAULT_PROFILE else {"profile": profile}}
    options |= {"cwd": path.parent, "kernel_name": "python3", "progress_bar": False}
    # For the kernel: widgets print, and the caller's profile and figure backend have no effect.
    with mock.patch.dict(os.environ, DIFFAD_STATIC="1", DIFFAD_PROFILE="", MPLBACKEND=""):
        try:
            executed = papermill.execute_notebook(notebook, None, **options)
        except papermill.PapermillExecutionError as error:
            where = f"{os.path.relpath(path)}, the cell {error.source.splitlines()[0]!r} ..."
            fix = f"fix src/{path.stem}.py"
            raise RuntimeError(f"{where}: {error.ename}: {error.evalue}; {fix}") from None
    cells = [cell for cell in executed.cells if "injected-parameters" not in tags(cell)]
    pairs = zip(notebook.cells, cells, strict=True)
    code = [(cell, result) for cell, result in pairs if cell.cell_type == "code"]
    for count, (cell, result) in enumerate(code, 1):
        cell.execution_count = count if result.execution_count else None
        cell.outputs = clean_outputs(result.outputs, count)
    notebook.metadata.diffad.update(executed=source_hash(notebook.cells), profile=profile)
    write(path, notebook)


def clean_outputs(outputs: list[NotebookNode], count: int) -> list[NotebookNode]:
    """Remove progress bars and widget views; join consecutive texts of one stream."""
    kept: list[NotebookNode] = []
    for output in outputs:
        if output.output_type == "stream" and kept and kept[-1].get("name") == output.name:
            kept[-1].text += output.text
            continue
        if output.output_type == "execute_result":
            output.execution_count = count
        is_view = output.get("data", {}).pop(WIDGET, None) is not None
        if not (is_view and BAR.search(output.data.get("text/plain", ""))):
            kept.append(output)
    for output in (output for output in kept if output.get("name") == "stderr"):
        output.text = BAR.sub("", output.text)
    return [output for output in kept if output.get("name") != "stderr" or output.text.strip()]


def main(arguments: list[str] | None = None) -> int:
    """Run the command; print one problem per line, and return 1 if there are any."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("numbers", nargs="*", metavar="NN", help="only these; default all")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--execute", action="store_true", help="run lesson and solutions, too")
    action.add_argument("--check", action="store_true", help="write nothing; exit 1 if stale")
    parser.add_argument("--profile", default=DEFAULT_PROFILE, choices=("ci", "lite", "paper"))
    parser.add_argument("--notebooks", type=Path, default=NOTEBOOKS, help="default: %(default)s")
    options = parser.parse_args(arguments)
    folder, problems = options.notebooks.resolve(), []
    masters = find_masters(folder)
    for number in set(options.numbers) - set(masters):
        parser.error(str(unknown_name("notebook number", number, masters or ["none yet"])))
    for number in options.numbers or masters:
        try:
            problems += build(masters[number], check=options.check)
            for kind in EXECUTED if options.execute else ():
                execute(notebook_path(masters[number], kind), options.profile)
        except (ValueError, RuntimeError) as error:
            problems.append(str(error))
    generated = {notebook_path(master, kind) for master in masters.values() for kind in KINDS}
    existing = {path for kind in ("", *KINDS) for path in (folder / kind).glob("*.ipynb")}
    for path in sorted(existing - generated) if options.check else ():
        problems.append(f"{os.path.relpath(path)}: has no master in src/; add one or delete it")
    print(*problems, sep="\n", end="\n" if problems else "")
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
