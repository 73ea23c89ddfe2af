"""The doctor's lines about GPUs and about files that methods need."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffad_lite.cli.main import main
from diffad_lite.experiments.machine import check_methods, run_checks
from diffad_lite.training import processes


@pytest.mark.parametrize(
    ("available", "line"),
    [
        (True, "[OK] GPU: Apple's (mps) is not used, as it has no float64, which the noise"),
        (False, "[OK] GPU: none, CPU is used"),
    ],
)
def test_the_doctor_says_why_an_apple_gpu_is_not_used(available, line, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: available)
    assert processes.device() == torch.device("cpu")
    (said,) = (str(check) for check in run_checks() if "GPU" in check.what)
    assert said.startswith(line)


@pytest.fixture
def empty(tmp_path, monkeypatch) -> Path:
    """A machine without weights, textures and network; its folder of weights."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # refuses every connection
    monkeypatch.setenv("DIFFAD_DATA", str(tmp_path / "data"))
    (tmp_path / "data" / "checkpoints").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub" / "checkpoints"


def test_the_doctor_says_which_files_a_paper_needs(empty, capsys):
    assert main(["doctor", "--profile", "paper", "--method", "glad", "--method", "padim"]) == 1
    said = capsys.readouterr().out
    weights = f"(wide_resnet50_2-95faca4d.pth, 132 MB) are not in {empty}\n       fix: put the file"
    assert "[FAIL] glad, profile paper: no texture images in " in said
    assert said.count(f"the weights of wide_resnet50_2 {weights}") == 2
    assert "mdps" not in said
    assert main(["doctor", "--profile", "paper"]) == 1
    said = capsys.readouterr().out
    assert "[FAIL] mdps, profile paper: the weights of wide_resnet101_2 " in said
    assert "[OK] anoddpm, profile paper: all files are there" in said
    empty.mkdir(parents=True)
    (empty / "wide_resnet50_2-95faca4d.pth").touch()
    main(["doctor", "--profile", "paper", "--method", "padim"])
    assert "[OK] padim, profile paper: all files are there" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "glad"], "--method says nothing without a profile; add --profile paper"),
        (["--method", "glat", "--profile", "paper"], "unknown method 'glat'; did you mean 'glad'"),
        (["--profile", "big"], "unknown profile 'big'"),
    ],
)
def test_the_doctor_refuses_names_that_are_none(arguments, message, capsys):
    assert main(["doctor", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "evaluate"])
@pytest.mark.parametrize("method", ["padim", "diffusionad", "glad", "mdps"])
def test_missing_files_end_a_run_before_its_data_are_loaded(command, method, empty, capsys):
    (line,) = [c.what for c in check_methods("paper", [method])][:1]
    run = ["--method", method, "--profile", "paper", "--dataset", "folder", "--root", "gone"]
    assert main([command, *run, "--out", "out"]) == 2
    said = capsys.readouterr().err
    assert line.removeprefix(f"{method}, profile paper: ") in said
    assert said.count("\n") == 1
    assert not Path("out").exists()


def test_a_new_process_says_soon_that_files_are_missing(empty):
    """In processor time, since other programs may keep the machine busy."""
    resource = pytest.importorskip("resource")
    code = "import sys; from diffad_lite.cli.main import main; sys.exit(main(sys.argv[1:]))"
    run = ["train", "--method", "mdps", "--profile", "paper", "--out", "out"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run([sys.executable, "-c", code, *run], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (result.returncode, "the weights of wide_resnet101_2" in result.stderr) == (2, True)
    assert after.ru_utime - before.ru_utime < 10.0  # seconds; most of them import torch
