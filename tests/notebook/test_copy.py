"""``diffad notebooks --copy``: the lessons are written out; nothing is overwritten."""

from pathlib import Path

import pytest

from diffad_lite.cli.main import main
from diffad_lite.core.files import course_dir

LESSON = "01_ddpm_basics.ipynb"
KINDS = ("", "exercises/", "solutions/")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_copy_has_lessons_exercises_and_solutions_as_they_are(capsys):
    assert main(["notebooks", "--copy", "lessons"]) == 0
    said = capsys.readouterr().out
    copies = {str(p.relative_to("lessons")) for p in Path("lessons").rglob("*") if p.is_file()}
    originals = course_dir() / "notebooks"
    lessons = [p.name for p in originals.glob("[0-9]*.ipynb")]
    assert copies == {kind + name for kind in KINDS for name in lessons}
    for name in copies:
        assert Path("lessons", name).read_bytes() == (originals / name).read_bytes()
    assert f"{3 * len(lessons)} notebooks are in lessons" in said
    assert "CC BY-NC-SA 4.0" in said


def test_only_some_lessons_are_copied_into_a_folder_with_other_files():
    Path("lessons").mkdir()
    Path("lessons/notes.txt").write_text("mine")
    assert main(["notebooks", "--copy", "lessons", "--only", "01"]) == 0
    copies = {p.relative_to("lessons").as_posix() for p in Path("lessons").rglob("*.*")}
    assert copies == {"notes.txt", *(kind + LESSON for kind in KINDS)}


def test_nothing_is_overwritten_and_then_nothing_is_copied(capsys):
    mine = Path("lessons/exercises") / LESSON
    mine.parent.mkdir(parents=True)
    mine.write_text("my work")
    assert main(["notebooks", "--copy", "lessons"]) == 2
    said = capsys.readouterr().err
    assert f"lessons already has 1 of 36 notebooks, e.g. exercises/{LESSON}" in said
    assert "choose another folder" in said
    assert mine.read_text() == "my work"
    assert [p for p in Path("lessons").rglob("*") if p.is_file()] == [mine]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "seed=3"], "--set does nothing with --copy"),
        (["-p", "seed", "3"], "-p does nothing with --copy"),
        (["--profile", "ci"], "--profile does nothing with --copy"),
        (["--only", "99"], "unknown notebook '99'"),
        (["--folder", "gone"], "no lessons at gone"),
    ],
)
def test_what_does_not_fit_a_copy_is_refused(arguments, message, elsewhere, capsys):
    assert main(["notebooks", "--copy", "lessons", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list(elsewhere.iterdir())


def test_without_lessons_here_the_message_says_how_to_get_them(capsys):
    assert main(["notebooks"]) == 2
    assert "'diffad notebooks --copy notebooks' first" in capsys.readouterr().err
