"""The command's help: every command and option explained, every example understood; listings."""

import argparse
import json
import shlex
from dataclasses import replace

import pytest

import diffad_lite
from diffad_lite.cli import commands
from diffad_lite.cli.commands import COMMANDS
from diffad_lite.cli.main import build_parser, main
from diffad_lite.methods import METHODS
from diffad_lite.notebook import runner


def children() -> dict[str, argparse.ArgumentParser]:
    (added,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return added.choices


def test_every_command_is_listed_once_those_of_maintainers_last(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line[:2] == "  "]
    places = [listed.index(name) for name in COMMANDS]
    assert places == sorted(places)
    assert list(COMMANDS)[-1] == "report"
    assert set(COMMANDS) == set(children())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_words_defaults_and_an_example(name, capsys):
    with pytest.raises(SystemExit):
        main([name, "--help"])
    said = capsys.readouterr().out
    assert COMMANDS[name].help in said
    assert f"example:\n  {COMMANDS[name].example}" in said
    for action in children()[name]._actions:
        assert action.help, f"{name} {action.option_strings} has no help"
        if action.default and action.default != argparse.SUPPRESS:
            assert f"(default: {action.default})" in " ".join(said.split())
    words = shlex.split(COMMANDS[name].example)
    assert words[:2] == ["diffad", name]
    parsed = build_parser().parse_args(words[1:])
    assert parsed.work is getattr(commands, name)


def test_evaluate_says_how_a_folder_lies(capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    said = capsys.readouterr().out
    for place in ("train/good", "test/<defect>", "ground_truth/<defect>", "<stem>_mask.png"):
        assert place in said


def test_the_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"diffad_lite {diffad_lite.__version__}\n"


def test_methods_are_listed_with_what_they_take(capsys):
    assert main(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(METHODS)
    of = {line.split()[0]: line for line in lines}
    assert "trained" in of["glad"] and "bundled: elpv-mono" in of["glad"]
    assert "fitted" in of["pca"] and "bundled" not in of["pca"]
    assert all(len(line.split(maxsplit=3)[3]) > 20 for line in lines)


def test_without_a_method_there_must_be_a_checkpoint(tmp_path, capsys):
    for more in ([], ["--checkpoint", "bundled"]):
        assert main(["evaluate", "--out", str(tmp_path / "o"), *more]) == 2
        assert "--method is missing; 'diffad methods' lists them" in capsys.readouterr().err


def test_the_method_of_a_checkpoint_need_not_be_named(tmp_path, capsys):
    run = ["--dataset", "shapes", "--profile", "ci", "--image-size", "16", "--quiet", "--out"]
    assert main(["train", "--method", "pca", *run, str(tmp_path / "run")]) == 0
    for folder in ("run", "run/checkpoint"):  # a run's folder is taken for its checkpoint
        checkpoint = ["--checkpoint", str(tmp_path / folder)]
        assert main(["evaluate", *run, str(tmp_path / "scored"), *checkpoint]) == 0
        assert "image AUROC" in capsys.readouterr().out
        assert json.loads((tmp_path / "scored" / "result.json").read_text())["checkpoint"] == (
            "checkpoint"
        )


@pytest.mark.parametrize(
    "words", [["--set", "seed=3", "--set", "name=a=b"], ["-p", "seed", "3", "-p", "name", "a=b"]]
)
def test_settings_of_notebooks_are_written_as_those_of_runs_or_as_papermills(words, monkeypatch):
    calls = []
    monkeypatch.setattr(runner, "run_notebooks", lambda *_, **options: calls.append(options) or [])
    assert main(["notebooks", "--profile", "ci", *words]) == 0
    assert calls[0]["parameters"] == {"profile": "ci", "seed": 3, "name": "a=b"}


@pytest.mark.parametrize("place", ["before", "behind"])
def test_a_traceback_on_request(place, capsys):
    words = ["score", "--checkpoint", "gone", "--images", "gone", "--out", "o"]
    assert main(words) == 2
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(FileNotFoundError):
        main(["--traceback", *words] if place == "before" else [*words, "--traceback"])


def test_an_error_inside_of_a_library_is_not_passed_off_as_the_users(monkeypatch):
    def broken(arguments):
        import torch

        torch.distributions.Normal(torch.zeros(1), -torch.ones(1))  # raises ValueError in torch

    def refused(arguments):
        raise ValueError("choose another")

    monkeypatch.setitem(COMMANDS, "doctor", replace(COMMANDS["doctor"], work=broken))
    with pytest.raises(ValueError, match="Normal"):
        main(["doctor"])
    monkeypatch.setitem(COMMANDS, "doctor", replace(COMMANDS["doctor"], work=refused))
    assert main(["doctor"]) == 2


def test_an_environment_called_torch_makes_no_error_a_librarys(monkeypatch):
    where = "/opt/envs/torch/lib/site-packages/diffad_lite/core/config.py"
    names = {"__name__": "diffad_lite.core.config"}
    exec(compile("def f(a): raise ValueError('choose another')", where, "exec"), names)
    monkeypatch.setitem(COMMANDS, "doctor", replace(COMMANDS["doctor"], work=names["f"]))
    assert main(["doctor"]) == 2
