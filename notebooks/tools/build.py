"""One master, three notebooks: make lesson, exercises and solutions from `src/NN_title.py`.

python notebooks/tools/build.py [NN ...]             write the notebooks; fresh outputs stay
python notebooks/tools/build.py --execute [NN ...]   and run the lesson and the solutions
python notebooks/tools/build.py --check [NN ...]     write nothing; say what is not up to date
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
# Roles, the tags that say where a cell goes: it has at most one. "context" may be either type.
CODE_ROLES, TEXT_ROLES = {"parameters", "setup", "solution", "check"}, {"exercise", "explain"}
ROLES = CODE_ROLES | TEXT_ROLES | {"context"}
OTHER_TAGS = {"nbval-check-output", "nbval-ignore-output", "nbval-skip"}  # and teaches:...
BLOCK = re.compile(r"^( *)# BEGIN SOLUTION\n(.*?)^ *# END SOLUTION(?:\n|$)", re.M | re.S)
STUB = 'raise NotImplementedError("your turn")'
PYTHON3 = {"display_name": "Python 3", "language": "python", "name": "python3"}
WIDGET = "application/vnd.jupyter.widget-view+json"
# As tqdm writes it: "train: 40%|##  | 2/5 [00:03<00:04, 1.5s/it]" or "12it [00:03, 4.0it/s]".
BAR = re.compile(r"[^\r\n]*?(?:\d%\|[^\r\n]*?|\d\w* )\[\d+:\d\d[^\r\n\]]*\]|\x1b\[A")
LINK = re.compile(  # "to" is a relative target in Markdown; code and formulas are stepped over
    r"```.*?```|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]+\$"
    r"|(?P<before>\]\(|(?:src|href)=\"|^\[(?!\^)[^\]\n]+\]: )"
    r"(?P<to>(?![a-zA-Z][\w+.-]*:|#|/)[^)\s\"]+)",
    re.M | re.S,
)


def find_masters(folder: Path) -> dict[str, Path]:
    """Number -> master `src/NN_title.py`, for a folder of notebooks."""
    return {p.stem[:2]: p for p in sorted((folder / "src").resolve().glob("[0-9][0-9]_*.py"))}


def notebook_path(master: Path, kind: str) -> Path:
    """Where the notebook of that kind lies: beside `src/`, or in the folder of its kind."""
    return master.parents[1] / ("" if kind == "lesson" else kind) / f"{master.stem}.ipynb"


def tags(cell: NotebookNode) -> list[str]:
    """The tags of a cell."""
    return list(cell.metadata.get("tags", []))


def role(cell: NotebookNode) -> str | None:
    """The tag that says into which notebooks a cell goes."""
    return next((tag for tag in tags(cell) if tag in ROLES), None)


def read_master(master: Path) -> list[NotebookNode]:
    """The cells of a master; ValueError where tags, cell types or markers are not as agreed."""
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
    """A solution without markers, as it is or with stubs; ValueError if they do not pair."""
    text, blocks = BLOCK.subn(rf"\1{STUB}\n" if stub else r"\2", source)
    if not blocks or "# BEGIN SOLUTION" in text or "# END SOLUTION" in text:
        raise ValueError(f"{where}: needs lines '# BEGIN SOLUTION', '# END SOLUTION', in turns")
    return text.rstrip()


def lesson_cells(cells: list[NotebookNode], stem: str) -> list[NotebookNode]:
    """The lesson: no solutions, checks or explanations; a link after the last prompt."""
    lesson = [cell for cell in cells if role(cell) not in ("solution", "check", "explain")]
    prompts = [i for i, cell in enumerate(lesson, 1) if role(cell) == "exercise"]
    exercises, solutions = (f"[{kind}/{stem}.ipynb]({kind}/{stem}.ipynb)" for kind in KINDS[1:])
    link = f"Solve these in {exercises}; the solutions are a click away, in {solutions}."
    for end in prompts[-1:]:
        lesson.insert(end, new_markdown_cell(link))
    return lesson


def exercise_cells(cells: list[NotebookNode], stem: str, *, solved: bool) -> list[NotebookNode]:
    """The exercises with what they need: solved and explained, or as stubs."""
    title = cells[0].source.splitlines()[0].removeprefix("# ")
    heading = f"# {'Solutions' if solved else 'Exercises'}: {title}"
    made = [new_markdown_cell(f"{heading}\n\nThe lesson: [{title}](../{stem}.ipynb).")]
    for cell in cells:
        source = cell.source
        if role(cell) == "solution":
            source = fill(source, stub=not solved)
        elif cell.cell_type == "markdown":  # these notebooks lie one folder deeper
            source = LINK.sub(
                lambda m: m[0] if not m["to"] else f"{m['before']}../{m['to']}", source
            )
        if role(cell) and (solved or role(cell) != "explain"):
            made.append(NotebookNode(cell, source=source))
    return made


def source_hash(cells: list[NotebookNode]) -> str:
    """Sixteen hex digits over types, sources and tags: what outputs depend on."""
    content = json.dumps([[c.cell_type, c.source, tags(c)] for c in cells])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def generate(master: Path) -> dict[str, NotebookNode]:
    """The three notebooks of a master, by kind, with the outputs on disk that are still fresh."""
    cells, notebooks = read_master(master), {}
    for kind in KINDS:
        if kind == "lesson":
            made = lesson_cells(cells, master.stem)
        else:
            made = exercise_cells(cells, master.stem, solved=kind == "solutions")
        for i, cell in enumerate(made):
            tagged = {"tags": tags(cell)} if tags(cell) else {}
            made[i] = NotebookNode(cell, id=f"{kind}-{i:03d}", metadata=tagged)
        about = {"master": f"src/{master.name}", "sources": source_hash(made)}
        metadata = {"diffad": about, "kernelspec": PYTHON3, "language_info": {"name": "python"}}
        notebooks[kind] = new_notebook(cells=made, metadata=metadata, nbformat_minor=5)
        if kind in EXECUTED:
            keep_outputs(notebooks[kind], notebook_path(master, kind))
    return notebooks


def keep_outputs(notebook: NotebookNode, path: Path) -> None:
    """Take the outputs of the notebook at ``path``, if there is one with the same sources."""
    try:
        old = nbformat.read(path, as_version=4)
        fresh = source_hash(old.cells) == notebook.metadata.diffad.sources
    except (OSError, ValueError, AttributeError):  # missing, or no notebook
        return
    for cell, before in zip(notebook.cells, old.cells, strict=True) if fresh else ():
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = before.outputs, before.execution_count
    for key in {"executed", "profile"} & set(old.metadata.get("diffad", {})) if fresh else ():
        notebook.metadata.diffad[key] = old.metadata.diffad[key]


def build(master: Path, *, check: bool = False) -> list[str]:
    """Write the notebooks of a master; with ``check``, return what is not up to date instead."""
    lines, fix = [], f"run: python notebooks/tools/build.py {master.stem[:2]}"
    for kind, notebook in generate(master).items():
        path, about = notebook_path(master, kind), notebook.metadata.diffad
        if not check:
            write(path, notebook)
        elif not path.exists() or path.read_text("utf-8") != nbformat.writes(notebook) + "\n":
            lines.append(f"{os.path.relpath(path)}: missing, or not as its master makes it; {fix}")
        elif kind in EXECUTED and about.get("executed") != about.sources:
            lines.append(f"{os.path.relpath(path)}: not run from these sources; {fix} --execute")
    return lines


def write(path: Path, notebook: NotebookNode) -> None:
    """Write a notebook, whole or not at all."""
    text = nbformat.writes(notebook) + "\n"
    write_atomically(path, lambda p: p.write_text(text, encoding="utf-8"))
    print(f"wrote {os.path.relpath(path)}")


def execute(path: Path, profile: str) -> None:
    """Run a built notebook; store its outputs, or raise RuntimeError and leave it as it was."""
    import papermill

    notebook = nbformat.read(path, as_version=4)  # papermill runs a copy of it
    options = {"parameters": {} if profile == DEFAULT_PROFILE else {"profile": profile}}
    options |= {"cwd": path.parent, "kernel_name": "python3", "progress_bar": False}
    # The kernel inherits this: widgets print; no profile or figure backend of the caller's.
    with mock.patch.dict(os.environ, DIFFAD_STATIC="1", DIFFAD_PROFILE="", MPLBACKEND=""):
        try:
            ran = papermill.execute_notebook(notebook, None, **options)
        except papermill.PapermillExecutionError as error:
            where = f"{os.path.relpath(path)}, the cell {error.source.splitlines()[0]!r} ..."
            what = f"{where}: {error.ename}: {error.evalue}; fix src/{path.stem}.py"
            raise RuntimeError(what) from None
    own = [cell for cell in ran.cells if "injected-parameters" not in tags(cell)]
    code = [p for p in zip(notebook.cells, own, strict=True) if p[0].cell_type == "code"]
    for count, (cell, done) in enumerate(code, 1):
        cell.execution_count = count if done.execution_count else None
        cell.outputs = clean_outputs(done.outputs, count)
    notebook.metadata.diffad.update(executed=source_hash(notebook.cells), profile=profile)
    write(path, notebook)


def clean_outputs(outputs: list[NotebookNode], count: int) -> list[NotebookNode]:
    """Outputs without progress bars and widget views, neighbouring streams joined."""
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
    """Entry point; problems are printed one a line and give exit code 1."""
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
    made = {notebook_path(master, kind) for master in masters.values() for kind in KINDS}
    found = {path for kind in ("", *KINDS) for path in (folder / kind).glob("*.ipynb")}
    for path in sorted(found - made) if options.check else ():
        problems.append(f"{os.path.relpath(path)}: has no master in src/; add one or delete it")
    print(*problems, sep="\n", end="\n" if problems else "")
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
