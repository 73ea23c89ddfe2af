"""The notebook builder and the linter, on a made master. Four kernels start here: some seconds."""

import importlib.util
import json
import os
import shutil
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_output

TOOLS = Path(__file__).resolve().parents[2] / "notebooks" / "tools"


def load_tool(name):
    spec = importlib.util.spec_from_file_location(f"notebook_{name}", TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build, lint = load_tool("build"), load_tool("lint")

HEAD = """\
# %% [markdown]
# # A made lesson
#
# | Level | easy |
# | --- | --- |
# | Minutes (ci / lite / paper) | 1 / 1 / 1 |
# | Memory | 1 MB |
# | Previous | none |
# | Next | [the readme](../README.md) |

# %% [markdown]
# ## You will be able to
# ## Prerequisites

# %% tags=["parameters"]
profile: str = "lite"  # ci | lite | paper
seed: int = 0  # all randomness

# %% tags=["setup"]
import base64
import os
import sys
from pathlib import Path

from IPython.display import Image, display
from tqdm import tqdm
from tqdm.auto import tqdm as widget_bar

PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9"
    "awAAAABJRU5ErkJggg=="
)
env = {name: os.environ.get(name) for name in ("DIFFAD_STATIC", "DIFFAD_PROFILE")}
print(profile, *env.values(), os.environ["MPLBACKEND"], Path.cwd().name, sep="|")

# %% [markdown]
# **Predict** the colour.

# %%
display(Image(PIXEL))

# %% [markdown] tags=["context"]
# See [the readme](../README.md#top), [the web](https://example.org/a), [above](#level),
# `[code](x)`, $E[x](y)$ and <img src="figure.png">.

# %% tags=["context", "teaches:diffad_lite.core.config:config_hash"]
def double(x):
    return 2 * x


# %%
for _ in widget_bar(range(2)):
    pass
for _ in tqdm(range(2), desc="[train]"):
    pass
assert double(1) == 2
double(2)

# %% [markdown]
# ## Paper, public code, ours
# ## What did not work
"""

EXERCISE = """
# %% [markdown] tags=["exercise"]
# ### Exercise 00.{k} ★ Add {k}

# %% tags=["solution"]
def add_{k}(x):
    # BEGIN SOLUTION
    y = x + {k}
    return y
    # END SOLUTION


# %% tags=["check"]
assert add_{k}(1) == 1 + {k}

# %% [markdown] tags=["explain"]
# Addition of {k}.
"""

TAIL = """
# %% [markdown]
# ## What we learned
# ## References
"""

INLINE = "module://matplotlib_inline.backend_inline"
SECTION = "\n# %% [markdown]\n# ## Exercises\n"
MASTER = HEAD + SECTION + "".join(EXERCISE.format(k=k) for k in (1, 2, 3)) + TAIL
LESSON, EXERCISES, SOLUTIONS = "00_made.ipynb", "exercises/00_made.ipynb", "solutions/00_made.ipynb"


def make_folder(root, text=MASTER):
    """A repository with one master; returns the folder of notebooks."""
    folder = root / "notebooks"
    (folder / "src").mkdir(parents=True)
    (folder / "src" / "00_made.py").write_text(text, encoding="utf-8")
    (root / "README.md").write_text("made")
    (folder / "figure.png").write_bytes(b"")
    return folder


def run(folder, *arguments):
    return build.main(["--notebooks", str(folder), *arguments])


def check(folder, capsys, *arguments):
    """Exit code of --check, and its lines without what stands before the folder's name."""
    capsys.readouterr()
    code = run(folder, "--check", *arguments)
    return code, [line.split("notebooks/", 1)[1] for line in capsys.readouterr().out.splitlines()]


def edit_master(folder, old, new):
    master = folder / "src" / "00_made.py"
    text = master.read_text(encoding="utf-8")
    assert old in text
    master.write_text(text.replace(old, new), encoding="utf-8")


def read(path):
    return nbformat.read(path, as_version=4)


def sources(notebook):
    return [cell.source for cell in notebook.cells]


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path)


@pytest.fixture(scope="module")
def executed_once(tmp_path_factory):
    """The made series, built and executed with the default profile; two kernels start."""
    folder = make_folder(tmp_path_factory.mktemp("executed"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFAD_PROFILE", "ci")  # the caller's; it must not reach the kernel
        patch.setenv("MPLBACKEND", "Agg")
        assert run(folder, "--execute") == 0
        assert os.environ["DIFFAD_PROFILE"] == "ci" and "DIFFAD_STATIC" not in os.environ
    return folder


@pytest.fixture
def executed(executed_once, tmp_path):
    """A copy of it to spoil."""
    shutil.copytree(executed_once.parent, tmp_path / "copy")
    return tmp_path / "copy" / "notebooks"


# --- the builder: what goes where


def test_the_lesson_has_everything_but_solutions_checks_and_explanations(folder):
    assert run(folder) == 0
    cells = read(folder / LESSON).cells
    assert [c.metadata.get("tags", []) for c in cells] == [
        *([], [], ["parameters"], ["setup"], [], [], ["context"]),
        *(["context", "teaches:diffad_lite.core.config:config_hash"], [], [], []),
        *(["exercise"], ["exercise"], ["exercise"], [], []),
    ]
    assert [c.cell_type for c in cells[:5]] == ["markdown", "markdown", "code", "code", "markdown"]
    assert cells[14].source == (
        "Solve these in [exercises/00_made.ipynb](exercises/00_made.ipynb); the solutions are a "
        "click away, in [solutions/00_made.ipynb](solutions/00_made.ipynb)."
    )
    assert cells[15].source == "## What we learned\n## References"
    assert "SOLUTION" not in (folder / LESSON).read_text(encoding="utf-8")


def test_the_exercises_have_stubs_and_the_solutions_their_answers(folder):
    run(folder)
    exercises, solutions = read(folder / EXERCISES), read(folder / SOLUTIONS)
    assert exercises.cells[0].source == (
        "# Exercises: A made lesson\n\nThe lesson: [A made lesson](../00_made.ipynb)."
    )
    assert solutions.cells[0].source.startswith("# Solutions: A made lesson\n")
    body = ["parameters", "setup", "context", "context"]
    stub = ["exercise", "solution", "check"]
    assert [build.role(c) for c in exercises.cells] == [None, *body, *stub * 3]
    assert [build.role(c) for c in solutions.cells] == [None, *body, *[*stub, "explain"] * 3]
    assert exercises.cells[6].source == (
        'def add_1(x):\n    raise NotImplementedError("your turn")'
    )
    assert solutions.cells[6].source == "def add_1(x):\n    y = x + 1\n    return y"
    assert exercises.cells[7].source == solutions.cells[7].source == "assert add_1(1) == 1 + 1"
    assert solutions.cells[8].source == "Addition of 1."


def test_links_of_exercises_and_solutions_lead_one_folder_up(folder):
    run(folder)
    assert read(folder / EXERCISES).cells[3].source == (
        "See [the readme](../../README.md#top), [the web](https://example.org/a), "
        '[above](#level),\n`[code](x)`, $E[x](y)$ and <img src="../figure.png">.'
    )


def test_fill_handles_several_blocks_at_any_indentation():
    source = "# BEGIN SOLUTION\na = 1\n# END SOLUTION\nb = 2\nif b:\n" + (
        "    # BEGIN SOLUTION\n    c = [\n        3\n    ]\n    # END SOLUTION"
    )
    stub = 'raise NotImplementedError("your turn")'
    assert build.fill(source, stub=True) == f"{stub}\nb = 2\nif b:\n    {stub}"
    assert build.fill(source, stub=False) == "a = 1\nb = 2\nif b:\n    c = [\n        3\n    ]"


def test_files_are_nbformat_4_5_with_steady_ids_and_bytes(folder):
    run(folder)
    before = {name: (folder / name).read_bytes() for name in (LESSON, EXERCISES, SOLUTIONS)}
    for name, kind in ((LESSON, "lesson"), (EXERCISES, "exercises"), (SOLUTIONS, "solutions")):
        values = json.loads(before[name])
        assert (values["nbformat"], values["nbformat_minor"]) == (4, 5)
        assert [c["id"] for c in values["cells"]][:2] == [f"{kind}-000", f"{kind}-001"]
        assert values["metadata"]["kernelspec"]["name"] == "python3"
        cells = read(folder / name).cells
        assert values["metadata"]["diffad"] == {
            "master": "src/00_made.py",
            "sources": build.source_hash(cells),
        }
        text = json.dumps(values, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
        assert before[name].decode() == text
        nbformat.validate(values)
    assert "★" in before[LESSON].decode()
    run(folder)
    assert before == {name: (folder / name).read_bytes() for name in before}


def test_the_hash_sees_types_sources_and_tags_and_nothing_else():
    def digits(source="x", tags=("context",), make=new_code_cell, **more):
        return build.source_hash([make(source, metadata={"tags": list(tags)}, **more)])

    assert len(digits()) == 16 and int(digits(), 16)
    assert digits(id="a", execution_count=3) == digits(id="b")
    others = [digits("y"), digits(tags=()), digits(make=nbformat.v4.new_markdown_cell)]
    assert len({digits(), *others}) == 4


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("# # A made lesson", "# A made lesson", "has no title; begin with a markdown cell"),
        ('tags=["solution"]', 'tags=["solutoin"]', "unknown tag 'solutoin'; did you mean 'solu"),
        ('tags=["check"]', 'tags=["check", "setup"]', "tagged check and setup; keep one of them"),
        ('# %% [markdown] tags=["explain"]', '# %% tags=["explain"]', "is code; change its"),
        ('# %% tags=["check"]', '# %% [markdown] tags=["check"]', "is markdown; change its type"),
        ("    # END SOLUTION\n", "", "needs lines '# BEGIN SOLUTION', '# END SOLUTION'"),
        ("    # BEGIN SOLUTION\n", "", "needs lines '# BEGIN SOLUTION', '# END SOLUTION'"),
        ("    return y\n", "    # BEGIN SOLUTION\n", "needs lines '# BEGIN SOLUTION'"),
    ],
)
def test_a_malformed_master_is_named_with_the_fix(folder, capsys, old, new, message):
    edit_master(folder, old, new)
    for action in ([], ["--check"]):
        assert run(folder, *action) == 1
        line, *others = capsys.readouterr().out.splitlines()
        assert line.startswith("src/00_made.py") and message in line and not others
    assert not (folder / LESSON).exists()


def test_only_the_named_numbers_are_built(folder, capsys):
    master = folder / "src" / "00_made.py"
    shutil.copy(master, folder / "src" / "01_other.py")
    assert run(folder, "01") == 0
    assert (folder / "01_other.ipynb").exists() and not (folder / LESSON).exists()
    with pytest.raises(SystemExit):
        run(folder, "07")
    assert "unknown notebook number '07'; known: 00, 01" in capsys.readouterr().err


# --- --check and what stays of the outputs


def test_check_asks_for_notebooks_then_for_their_execution(folder, capsys):
    fix = "run: python notebooks/tools/build.py 00"
    missing = f"missing, or not as its master makes it; {fix}"
    code, lines = check(folder, capsys)
    assert code == 1
    assert lines == [f"{name}: {missing}" for name in (LESSON, EXERCISES, SOLUTIONS)]
    assert not (folder / LESSON).exists()
    run(folder)
    code, lines = check(folder, capsys)
    assert code == 1
    stale = f"not run from these sources; {fix} --execute"
    assert lines == [f"{LESSON}: {stale}", f"{SOLUTIONS}: {stale}"]


def test_check_passes_on_what_was_executed_and_a_rebuild_keeps_it(executed, capsys):
    assert check(executed, capsys) == (0, [])
    before = {name: (executed / name).read_bytes() for name in (LESSON, EXERCISES, SOLUTIONS)}
    run(executed)
    assert before == {name: (executed / name).read_bytes() for name in before}


def test_a_changed_source_drops_the_outputs_of_the_notebooks_it_stands_in(executed, capsys):
    edit_master(executed, "Addition of 1.", "A sum.")  # an explanation: the solutions' alone
    code, lines = check(executed, capsys)
    assert code == 1 and [line.split(":")[0] for line in lines] == [SOLUTIONS]
    before = (executed / LESSON).read_bytes()
    run(executed)
    assert (executed / LESSON).read_bytes() == before
    solutions = read(executed / SOLUTIONS)
    assert not any(c.get("outputs") or c.get("execution_count") for c in solutions.cells)
    assert "executed" not in solutions.metadata.diffad
    code, lines = check(executed, capsys)
    assert code == 1 and len(lines) == 1 and "solutions/00_made.ipynb: not run" in lines[0]


@pytest.mark.parametrize("name", [LESSON, EXERCISES, SOLUTIONS])
def test_check_sees_a_notebook_edited_or_saved_from_jupyter(executed, capsys, name):
    original = (executed / name).read_text(encoding="utf-8")
    spoilt = read(executed / name)
    spoilt.cells[-1].source += "\nedited"
    others = {"edited": spoilt, "saved": read(executed / name)}
    others["saved"].metadata["widgets"] = {}
    for notebook in others.values():
        nbformat.write(notebook, executed / name)
        code, lines = check(executed, capsys)
        assert code == 1 and len(lines) == 1 and lines[0].startswith(f"{name}: missing, or not")
    (executed / name).write_text("<<<<<<< a merge conflict")
    assert check(executed, capsys)[0] == 1
    (executed / name).write_text(original, encoding="utf-8")
    assert check(executed, capsys) == (0, [])


def test_outputs_of_exercises_are_never_kept(executed, capsys):
    before = (executed / EXERCISES).read_bytes()
    notebook = read(executed / EXERCISES)
    notebook.cells[1].update(execution_count=1, outputs=[stream("a student's\n")])
    nbformat.write(notebook, executed / EXERCISES)
    assert check(executed, capsys)[0] == 1
    run(executed)
    assert (executed / EXERCISES).read_bytes() == before


def test_check_sees_outputs_of_other_sources(executed, capsys):
    notebook = read(executed / LESSON)
    notebook.metadata.diffad.executed = "0" * 16
    nbformat.write(notebook, executed / LESSON)
    code, lines = check(executed, capsys)
    assert code == 1 and len(lines) == 1 and lines[0].startswith(f"{LESSON}: not run from these")


@pytest.mark.parametrize("name", ["07_lost.ipynb", "exercises/07_lost.ipynb"])
def test_check_sees_a_notebook_without_a_master(executed, capsys, name):
    shutil.copy(executed / LESSON, executed / name)
    code, lines = check(executed, capsys)
    assert code == 1 and lines == [f"{name}: has no master in src/; add one or delete it"]


# --- execution


def test_execution_stores_clean_outputs(executed):
    for name, kind in ((LESSON, "notebooks"), (SOLUTIONS, "solutions")):
        notebook = read(executed / name)
        about = notebook.metadata.diffad
        assert set(notebook.metadata) == {"diffad", "kernelspec", "language_info"}
        assert about.profile == "lite"
        assert about.executed == about.sources == build.source_hash(notebook.cells)
        code = [c for c in notebook.cells if c.cell_type == "code"]
        assert [c.execution_count for c in code] == list(range(1, len(code) + 1))
        assert all(set(c.metadata) <= {"tags"} for c in notebook.cells)
        assert [o.text for o in code[1].outputs] == [f"lite|1||{INLINE}|{kind}\n"]
    lesson = [c for c in read(executed / LESSON).cells if c.cell_type == "code"]
    assert "image/png" in lesson[2].outputs[0].data
    (result,) = lesson[4].outputs  # no bar is left: neither on stderr nor as a widget
    assert (result.data["text/plain"], result.execution_count) == ("4", 5)
    exercises = read(executed / EXERCISES)
    assert not any(c.get("outputs") or c.get("execution_count") for c in exercises.cells)
    assert "executed" not in exercises.metadata.diffad


def test_another_profile_is_injected_and_leaves_no_cell(executed):
    before = read(executed / SOLUTIONS)
    build.execute(executed / SOLUTIONS, "ci")
    after = read(executed / SOLUTIONS)
    assert sources(after) == sources(before)
    assert after.metadata.diffad == {**before.metadata.diffad, "profile": "ci"}
    code = [c for c in after.cells if c.cell_type == "code"]
    assert code[1].outputs[0].text.startswith("ci|1||")
    assert [c.execution_count for c in code] == list(range(1, len(code) + 1))


def test_a_failing_cell_is_named_and_nothing_is_written(tmp_path, capsys):
    cells = "# %% [markdown]\n# # A title\n\n# %%\n1\n\n# %%\nunknown = 1 / 0\n"
    folder = make_folder(tmp_path, cells)
    assert run(folder, "--execute") == 1
    line = capsys.readouterr().out.splitlines()[-1]
    assert "00_made.ipynb, the cell 'unknown = 1 / 0' ...: ZeroDivisionError" in line
    assert line.endswith("fix src/00_made.py")
    lesson = read(folder / LESSON)
    assert "executed" not in lesson.metadata.diffad and not lesson.cells[1].outputs


def stream(text, name="stderr"):
    return new_output("stream", name=name, text=text)


def test_progress_bars_go_and_warnings_stay():
    bar = "\r[train]:  40%|####      | 2/5 [00:03<00:04, 1.5s/it, loss=0.1]"
    counter = "\r12it [00:03,  4.0it/s]"
    assert build.clean_outputs([stream(bar), stream(counter + "\x1b[A\n")], 1) == []
    warning = "/a/b.py:3: UserWarning: beware\n"
    (kept,) = build.clean_outputs([stream(bar + bar), stream(warning), stream(bar + "\n")], 1)
    assert kept.text.strip() == warning.strip()
    printed = stream("100%|###| 5/5 [00:01<00:00]\n", "stdout")
    assert build.clean_outputs([printed], 1) == [printed]


def test_streams_join_and_widgets_lose_their_view():
    parts = [stream("a\n", "stdout"), stream("b\n", "stdout"), stream("c\n"), stream("d", "stdout")]
    assert [o.text for o in build.clean_outputs(parts, 1)] == ["a\nb\n", "c\n", "d"]
    result = new_output("execute_result", data={"text/plain": "1"}, execution_count=7)
    assert build.clean_outputs([result], 6)[0].execution_count == 6  # 7 with an injected cell
    view = {build.WIDGET: {"model_id": "0"}, "text/plain": "IntSlider(value=1)"}
    (kept,) = build.clean_outputs([new_output("display_data", data=view)], 1)
    assert kept.data == {"text/plain": "IntSlider(value=1)"}
    bar = {**view, "text/plain": "  0%|          | 0/3 [00:00<?, ?it/s]"}
    assert build.clean_outputs([new_output("display_data", data=bar)], 1) == []


# --- the linter: every rule has an example that breaks it, and it alone


def test_the_made_series_is_clean(executed, capsys):
    assert lint.main(["--notebooks", str(executed)]) == 0
    assert capsys.readouterr().out == ""


def bad(source="", **changes):
    """A change of the first plain code cell of the lesson: cell 6, the one with the figure."""

    def change(nb):
        nb.cells[5].update(source=source or nb.cells[5].source, **changes)

    return change


def swap(number, old, new):
    """A change of the text of one cell; cells are numbered from 1."""

    def change(nb):
        assert old in nb.cells[number - 1].source
        nb.cells[number - 1].source = nb.cells[number - 1].source.replace(old, new)

    return change


def printed(text, name="stdout"):
    return bad(outputs=[stream(text, name)])


def add_code(source):
    """A change that appends an executed cell, and text."""

    def change(nb):
        count = sum(c.cell_type == "code" for c in nb.cells) + 1
        nb.cells.append(new_code_cell(source, execution_count=count))

    return change


def long_median(nb):
    for i, cell in enumerate(nb.cells):
        if cell.cell_type == "code" and i > 3:
            cell.source += "\n" + "\n".join(["pass"] * 12)


def without_exercises(nb):
    nb.cells = [cell for cell in nb.cells if "exercise" not in build.tags(cell)]


def without_words(nb):
    nb.cells[4].cell_type, nb.cells[4].source = "raw", ""
    nb.cells[6].cell_type = "raw"
    nb.cells[1].source += "\n**Predict** earlier."


def heavy(nb):
    nb.cells[5].outputs[0].data["image/png"] = "A" * 3_000_000


PROMPT = "### Exercise 00.2 ★ Add 2"
WIDE = "wide = " + "1 + " * 21 + "1"
BAD = [
    ("N01", swap(2, "## You", "# Two\n## You"), "in cells [1, 2]; write exactly one, in the first"),
    ("N01", swap(1, "# A made", "## A made"), "'# ' headings in cells []"),
    ("N02", swap(1, "| Memory | 1 MB |\n", ""), "lacks ['Memory']; add '| row | value |'"),
    ("N02", swap(1, "| 1 MB |", "|  |"), "lacks ['Memory']"),
    ("N03", swap(2, "You will be able to", "Goals"), "each once, in the order ['You will be able"),
    ("N03", swap(16, "## What we learned\n## Ref", "## Ref"), "has the sections ['You will"),
    (
        "N04",
        swap(3, "seed: int = 0  # all randomness", "seed = 0"),
        "'seed = 0' as 'name: type = l",
    ),
    ("N04", swap(3, "= 0 ", "= 2 * 3 "), "as 'name: type = literal  # help'"),
    ("N04", swap(3, '"lite"', '"ci"'), 'needs the line \'profile: str = "lite"  # ci | lite | pa'),
    ("N04", lambda nb: nb.cells[2].pop("metadata"), "tag one cell 'parameters': the first code"),
    ("N05", add_code("import math"), "cell 17: move the import to the set-up cell"),
    ("N05", add_code("def f():\n    from math import pi"), "cell 17: move the import"),
    ("N05", lambda nb: nb.cells[5].metadata.update(tags=["setup"]), "the second code cell"),
    ("N06", add_code("\n".join(["pass"] * 31)), "cell 17: 31 lines; split it at 30"),
    ("N06", long_median, "the median code cell has 13 lines; split long ones"),
    ("N07", add_code(WIDE), f"cell 17: {len(WIDE)} characters, 'wide = 1 + "),
    ("N08", add_code("x = 1;"), "cell 17: drop the ';' that ends line 1; end with plt.show()"),
    ("N08", add_code("y = 1\nx = ';'; # ;"), "cell 17: drop the ';' that ends line 2"),
    ("N08", add_code("%matplotlib inline"), "cell 17: is not plain Python; write no lines that"),
    ("N08", add_code("x = 1\n!pip list"), "cell 17: is not plain Python"),
    ("N09", add_code("open('/home/me/x')"), "cell 17: '/home' in the source; use a path relative"),
    ("N09", printed("saved in /tmp/x"), "cell 6: '/tmp' in an output"),
    ("N09", printed("C:\\Users"), "cell 6: 'C:\\\\' in an output"),
    ("N09", swap(2, "## Prereq", "See ../shared.\n## Prereq"), "cell 2: '../shared' in the source"),
    ("N10", lambda nb: nb.metadata.update(widgets={}), "stores widgets; execute it with notebooks"),
    ("N10", lambda nb: nb.metadata.kernelspec.update(name="conda"), "kernelspec is not python3"),
    ("N11", bad(execution_count=None), "execution counts [1, 2, None, 4, 5], not 1..n; run"),
    ("N11", printed("x.py:1: UserWarning: w", "stderr"), "cell 6: 'x.py:1: UserWarning: w'; make"),
    ("N11", bad(outputs=[new_output("error", ename="Oh", traceback=[])]), "cell 6: 'Oh'; make the"),
    ("N12", without_words, "cell 6: a figure without words; add a markdown cell before or after"),
    ("N13", heavy, "3.0 MB; keep it under 3 MB: fewer or smaller figures"),
    ("N14", printed("x\n" * 101), "cell 6: 101 lines of output; print at most 100"),
    (
        "N15",
        bad(metadata={"tags": ["teaches:diffad_lite.core.config:gone"]}),
        "cell 6: teaches 'diffad",
    ),
    ("N15", bad(metadata={"tags": ["teaches:diffad_lite.gone:f"]}), "No module named 'diffad_lite"),
    ("N16", swap(7, "../README.md#top", "../GONE.md#top"), "link '../GONE.md#top' leads to no fi"),
    ("N16", swap(7, "../README.md", "../.."), "cell 7: the link '../..#top' leads to no file"),
    ("N17", add_code("torch.manual_seed(0)"), "cell 17: torch.manual_seed outside the set-up"),
    ("N17", add_code("np.random.seed(0)"), "cell 17: np.random.seed outside the set-up cell"),
    ("N18", swap(5, "**Predict**", "Think of"), "asks for no prediction; begin a line with '**Pre"),
    ("N19", without_exercises, "has 0 exercises; write 3 to 5"),
    ("N19", swap(13, PROMPT, "### Exercise 01.2 ★"), "cell 13: begin it '### Exercise 00.2' and"),
    ("N19", swap(13, "★ ", ""), "cell 13: begin it '### Exercise 00.2' and stars"),
    ("N20", swap(9, "assert double(1) == 2\n", ""), "has no assert; add one that fails when"),
]


def found(path):
    """Ids and lines of the problems of a notebook."""
    lines = lint.lint(path)
    return {line.removeprefix(f"{path}: ").split()[0] for line in lines}, "\n".join(lines)


@pytest.mark.parametrize(("rule", "change", "message"), BAD, ids=[b[0] for b in BAD])
def test_a_bad_lesson_breaks_one_rule(executed, rule, change, message):
    notebook = read(executed / LESSON)
    change(notebook)
    notebook.cells = [nbformat.from_dict({"metadata": {}, **cell}) for cell in notebook.cells]
    nbformat.write(notebook, executed / LESSON)
    rules, lines = found(executed / LESSON)
    assert rules == {rule}, lines
    assert message in lines


def test_every_rule_has_a_bad_example():
    assert {b[0] for b in BAD} == {f"N{i:02d}" for i in range(1, 21)}


@pytest.mark.parametrize(
    "source",
    [
        'x = (\n    "%d;"  # ;\n    % 3\n)\nprint(x)',
        'x = """\n%matplotlib\nimport a;\n"""',
        "g = torch.Generator().manual_seed(0)",
        "ratio = count/work  # n/home",
        "await something()",
        "a = 1; b = 2",
    ],
)
def test_the_linter_does_not_cry_wolf(executed, source):
    notebook = read(executed / LESSON)
    add_code(source)(notebook)
    nbformat.write(notebook, executed / LESSON)
    assert lint.lint(executed / LESSON) == []


@pytest.mark.parametrize("number", [5, 7])
def test_words_on_either_side_of_a_figure_will_do(executed, number):
    notebook = read(executed / LESSON)
    notebook.cells[number - 1].cell_type = "raw"
    notebook.cells[1].source += "\n**Predict** earlier."
    nbformat.write(notebook, executed / LESSON)
    assert lint.lint(executed / LESSON) == []


@pytest.mark.parametrize("name", [EXERCISES, SOLUTIONS])
@pytest.mark.parametrize("rule", ["N06", "N07", "N08", "N09", "N10", "N16"])
def test_starred_rules_hold_for_exercises_and_solutions(executed, name, rule):
    notebook = read(executed / name)
    change = {
        "N06": add_code("\n".join(["pass"] * 31)),
        "N07": add_code(WIDE),
        "N08": add_code("x = 1;"),
        "N09": add_code("'/work/me/x'"),
        "N10": lambda nb: nb.metadata.update(widgets={}),
        "N16": swap(1, "../00_made", "../00_gone"),
    }[rule]
    change(notebook)
    nbformat.write(notebook, executed / name)
    rules, lines = found(executed / name)
    assert rules == {rule}, lines


@pytest.mark.parametrize("name", [EXERCISES, SOLUTIONS])
@pytest.mark.parametrize("role", ["solution", "check"])
def test_every_exercise_needs_a_solution_and_a_check(executed, name, role):
    notebook = read(executed / name)
    next(c for c in notebook.cells if build.role(c) == role).metadata.tags = ["context"]
    nbformat.write(notebook, executed / name)
    rules, lines = found(executed / name)
    assert rules == {"N19"} and f"cell 6: no cell tagged {role!r} before the next" in lines


def test_solutions_but_not_exercises_must_be_executed(folder):
    run(folder)
    assert found(folder / SOLUTIONS)[0] == {"N11"}
    assert found(folder / EXERCISES)[0] == set()


def test_the_linter_takes_files_and_says_what_is_no_notebook(executed, capsys):
    assert lint.main([str(executed / EXERCISES)]) == 0
    (executed / EXERCISES).write_text("<<<<<<< a merge conflict")
    assert lint.main(["--notebooks", str(executed)]) == 1
    assert "00_made.ipynb: N00 is not a notebook: " in capsys.readouterr().out
