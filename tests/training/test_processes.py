"""One training by two processes, started by ``accelerate launch`` as a user starts it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffad_lite.cli.main import main
from diffad_lite.core.files import read_json
from diffad_lite.experiments.evaluate import evaluate
from diffad_lite.experiments.run import Run
from diffad_lite.training import processes
from diffad_lite.training.loop import train_network
from diffad_lite.training.state import TrainConfig, TrainingState

CONFIG = TrainConfig(steps=12, batch_size=4, learning_rate=1e-2)
LAUNCH = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
pytestmark = pytest.mark.slow
WORKER = Path(__file__).parent / "two_processes.py"


def make_network() -> torch.nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return torch.nn.Linear(3, 3)


def make_images() -> torch.Tensor:
    return torch.rand(20, 1, 2, 3, generator=torch.Generator().manual_seed(1)) * 2 - 1


def error_of(network, batch):
    return (network(batch) - batch.flip(-1)).square().mean()


def launch(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, *LAUNCH, "--main_process_port", "0", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


def by_rank(folder: Path) -> list[dict[str, torch.Tensor]]:
    """What each process left in the folder."""
    return [load_file(folder / f"{rank}.safetensors") for rank in (0, 1)]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Folder of a training by two processes."""
    folder = tmp_path_factory.mktemp("unbroken")
    done = launch(WORKER, folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_two_processes_train_as_one_on_the_batches_of_both(unbroken):
    first, second = by_rank(unbroken)
    assert first["batches"].shape == (12, 2, 1, 2, 3)  # half of a batch each
    assert not torch.equal(first["batches"], second["batches"])
    for name in ("weight", "bias", "losses"):
        assert torch.equal(first[name], second[name])

    alone = make_network()
    state = TrainingState(alone, make_images(), CONFIG, 5, "train", None, {})
    for both in zip(first["batches"], second["batches"], strict=True):
        state.take_step(error_of(alone, torch.cat(both)))
    average = state.ema.module
    assert torch.allclose(first["weight"], average.weight, atol=1e-6)
    assert torch.allclose(first["losses"].double(), torch.tensor(state.losses).double(), atol=1e-6)


def test_two_processes_go_on_exactly_where_they_were_broken_off(tmp_path, unbroken):
    broken = launch(WORKER, tmp_path, 7)
    assert broken.returncode != 0
    assert "broken off" in broken.stderr
    with pytest.raises(ValueError, match="written by 2 processes, not 1; start as many"):
        train_network(
            make_network(),
            lambda network, batch, generator: error_of(network, batch),
            make_images(),
            CONFIG,
            seed=5,
            workdir=tmp_path,
            progress=False,
        )
    done = launch(WORKER, tmp_path)
    assert done.returncode == 0, done.stderr
    for whole, resumed in zip(by_rank(unbroken), by_rank(tmp_path), strict=True):
        assert len(resumed["batches"]) == 5
        for key in ("weight", "bias", "losses"):
            assert torch.equal(whole[key], resumed[key])


def test_the_command_trains_by_two_processes_and_one_evaluates(tmp_path):
    run = ["--method", "anoddpm", "--dataset", "shapes", "--profile", "ci", "--image-size", 32]
    done = launch("-m", "diffad_lite.cli", "train", *run, "--quiet", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("checkpoint:") == 1  # one of them speaks
    assert main(["evaluate", *map(str, run), "--out", str(tmp_path)]) == 0
    result = read_json(tmp_path / "result.json", "result")
    assert result["train_steps"] == 20


def test_several_processes_do_not_evaluate(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes can train, but one evaluates"):
        evaluate(Run("pca"), tmp_path)


def test_an_indivisible_batch_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert processes.local_batch_size(9) == 3
    with pytest.raises(ValueError, match=r"a batch of 16 images is not divisible by 3 processes"):
        processes.local_batch_size(16)


def test_accelerate_that_is_missing_is_named(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ImportError, match="pip install accelerate"):
        processes.device()


def test_a_process_alone_does_not_import_accelerate():
    code = (
        "import sys, torch; from diffad_lite.training import processes as p\n"
        "p.device(), p.average([torch.ones(2)]), p.gather(3)\n"
        "assert 'accelerate' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


def test_an_interrupt_of_one_process_ends_them_all(monkeypatch):
    """Another one was asked: this one must not return a network that is half trained."""
    network, images = torch.nn.Conv2d(1, 1, 1), torch.zeros(4, 1, 8, 8)

    def gather(value):
        return [value, (True, False)] if isinstance(value, tuple) else [value]

    monkeypatch.setattr("diffad_lite.training.processes.gather", gather)
    with pytest.raises(KeyboardInterrupt):
        train_network(
            network,
            lambda network, x, generator: network(x).square().mean(),
            images,
            TrainConfig(steps=50, batch_size=2),
            seed=0,
            progress=False,
        )
