"""The training loop: exact resume, refusals, budget, EMA, learning rate, flips."""

import math
import time
from collections.abc import Callable
from itertools import count, pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from diffad_lite.training import loop, state
from diffad_lite.training.loop import TrainReport, random_flips, supports_bf16, train_network
from diffad_lite.training.state import TrainConfig, learning_rate_factor

CONFIG = TrainConfig(steps=30, batch_size=4, learning_rate=1e-2, flip_axes=(-1, -2))


class Interruption(Exception):
    """Stands for Ctrl-C or a lost machine."""


def make_network(seed: int = 0, dropout: float = 0.3) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.SiLU(),
            nn.Dropout(dropout),  # draws from the global generator
            nn.Conv2d(4, 1, 3, padding=1),
        )


def make_images(n: int = 10, seed: int = 0) -> Tensor:
    return torch.rand(n, 1, 6, 6, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def denoising_loss(network: nn.Module, batch: Tensor, generator: torch.Generator) -> Tensor:
    noise = 0.1 * torch.randn(batch.shape, generator=generator)
    return (network(batch + noise).float() - batch).square().mean()


def breaking_at(step: int) -> Callable:
    """The loss, whose call number ``step`` (from 0) raises instead."""
    calls = count()

    def loss(network, batch, generator):
        if next(calls) == step:
            raise Interruption
        return denoising_loss(network, batch, generator)

    return loss


def train(network: nn.Module, loss=denoising_loss, **options) -> TrainReport:
    settings = {"images": make_images(), "config": CONFIG, "seed": 5, "progress": False} | options
    return train_network(network, loss, **settings)


def flat(network: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in network.parameters()])


@pytest.fixture
def save_always(monkeypatch):
    monkeypatch.setattr(loop, "SAVE_EVERY_SECONDS", -1.0)


# ------------------------------------------------------------------------------------ resume


@pytest.mark.parametrize("broken_at", [[1], [7], [20], [29], [3, 10, 11]], ids=str)
def test_interrupted_run_ends_exactly_as_the_unbroken_one(tmp_path, save_always, broken_at):
    unbroken = make_network()
    expected = train(unbroken)
    done = 0
    for step in broken_at:
        # Other initial weights: everything must come from the checkpoint after the first time.
        network = make_network(seed=step if done else 0)
        torch.manual_seed(step)  # nor may the process's own generator matter
        with pytest.raises(Interruption):
            train(network, breaking_at(step - done), workdir=tmp_path)
        done = step
    resumed = make_network(seed=99)
    report = train(resumed, workdir=tmp_path)
    assert torch.equal(flat(resumed), flat(unbroken))
    assert torch.equal(report.losses, expected.losses)
    assert report.steps == expected.steps == len(report.losses) == CONFIG.steps


def test_resumed_run_makes_only_the_steps_that_are_missing(tmp_path, save_always):
    with pytest.raises(Interruption):
        train(make_network(), breaking_at(12), workdir=tmp_path)
    with pytest.raises(Interruption):
        train(make_network(), breaking_at(30 - 12 - 1), workdir=tmp_path)  # its last step
    # One step is left: a second one would raise.
    assert len(train(make_network(), breaking_at(1), workdir=tmp_path).losses) == 30


def test_finished_stage_returns_at_once(tmp_path):
    network = make_network()
    first = train(network, workdir=tmp_path)
    again = make_network(seed=1)
    report = train(again, breaking_at(0), workdir=tmp_path)  # a single step would raise
    assert torch.equal(flat(again), flat(network))
    assert torch.equal(report.losses, first.losses)
    assert report.steps == first.steps
    assert report.seconds >= first.seconds > 0
    assert not again.training


def test_seconds_of_all_sessions_are_added(tmp_path, save_always, monkeypatch):
    clock = FakeClock(monkeypatch, step_time=1.0)
    with pytest.raises(Interruption):
        train(make_network(), clock.ticking(breaking_at(10)), workdir=tmp_path)
    clock.now += 1000  # the machine was off
    assert train(make_network(), clock.ticking(), workdir=tmp_path).seconds == pytest.approx(30)


def test_stages_of_one_folder_do_not_meet(tmp_path):
    train(make_network(), workdir=tmp_path, stage="one")
    report = train(make_network(), workdir=tmp_path, stage="two", seed=6)
    assert report.steps == CONFIG.steps
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["one.state.safetensors", "two.state.safetensors"]


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 6},
        {"config": TrainConfig(steps=31, batch_size=4, learning_rate=1e-2, flip_axes=(-1, -2))},
        {"images": make_images(seed=1)},
        {"network": nn.Conv2d(1, 1, 3, padding=1)},
    ],
    ids=lambda other: next(iter(other)),
)
def test_foreign_checkpoint_is_refused(tmp_path, other):
    train(make_network(), workdir=tmp_path)
    before = (tmp_path / "train.state.safetensors").read_bytes()
    message = r"train\.state\.safetensors belongs to a training with another configuration, seed"
    with pytest.raises(ValueError, match=message):
        train(**{"network": make_network(), "workdir": tmp_path} | other)
    assert (tmp_path / "train.state.safetensors").read_bytes() == before


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_truncated_checkpoint_is_refused_by_name(tmp_path, share):
    train(make_network(), workdir=tmp_path)
    path = tmp_path / "train.state.safetensors"
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match=r"train\.state\.safetensors is broken .* delete it"):
        train(make_network(), workdir=tmp_path)


@pytest.mark.parametrize("missing", ["network.0.bias", "ema.module.3.bias", "generator"])
def test_a_checkpoint_that_lacks_a_tensor_is_refused_by_name(tmp_path, missing):
    train(make_network(), workdir=tmp_path)
    path = tmp_path / "train.state.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys() if key != missing}  # noqa: SIM118
    save_file(tensors, path, metadata)
    with pytest.raises(
        ValueError, match=r"train\.state\.safetensors is incomplete or corrupted .* delete it"
    ):
        train(make_network(), workdir=tmp_path)


def test_no_temporary_files_remain(tmp_path, save_always):
    with pytest.raises(Interruption):
        train(make_network(), breaking_at(5), workdir=tmp_path / "new" / "folder")
    assert [p.name for p in (tmp_path / "new" / "folder").iterdir()] == ["train.state.safetensors"]
    train(make_network(), workdir=tmp_path / "new" / "folder")
    assert [p.name for p in (tmp_path / "new" / "folder").iterdir()] == ["train.state.safetensors"]


def test_a_failing_write_keeps_the_older_checkpoint(tmp_path, save_always, monkeypatch):
    with pytest.raises(Interruption):
        train(make_network(), breaking_at(5), workdir=tmp_path)
    path = tmp_path / "train.state.safetensors"
    before = path.read_bytes()

    def half_a_file(tensors: dict, target: Path, metadata: dict) -> None:
        Path(target).write_bytes(b"half")
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(state, "save_file", half_a_file)
        with pytest.raises(OSError, match="disk full"):
            train(make_network(), workdir=tmp_path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_nothing_is_written_without_a_folder(tmp_path, save_always, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(make_network())
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------ budget


class FakeClock:
    """A clock on which only the optimiser steps take time."""

    def __init__(self, monkeypatch, step_time: float) -> None:
        self.now, self.step_time = 0.0, step_time
        monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: self.now))

    def ticking(self, loss: Callable = denoising_loss) -> Callable:
        def timed(network, batch, generator):
            value = loss(network, batch, generator)
            self.now += self.step_time
            return value

        return timed


LONG = TrainConfig(steps=100_000, batch_size=2, learning_rate=1e-3)


def test_budget_lowers_the_steps_and_the_learning_rate_still_decays(monkeypatch):
    clock = FakeClock(monkeypatch, step_time=0.01)
    asked = []

    def spy(step, total, warmup, schedule):
        asked.append((step, total, learning_rate_factor(step, total, warmup, schedule)))
        return asked[-1][2]

    monkeypatch.setattr(state, "learning_rate_factor", spy)
    report = train(make_network(), clock.ticking(), config=LONG, budget=1.0)
    assert report.steps in (99, 100)
    assert report.seconds == pytest.approx(1.0, abs=0.02)
    assert [step for step, _, _ in asked] == list(range(report.steps))
    assert {total for _, total, _ in asked[20:]} == {report.steps}
    assert asked[-1][2] < 0.001


def test_budget_of_a_run_that_starts_slowly_counts_the_later_steps(monkeypatch):
    clock = FakeClock(monkeypatch, step_time=0.01)
    timed = clock.ticking()
    calls = count()

    def slow_start(network, batch, generator):
        clock.now += 0.5 if next(calls) == 0 else 0
        return timed(network, batch, generator)

    report = train(make_network(), slow_start, config=LONG, budget=1.0)
    assert report.steps in (49, 50)


@pytest.mark.parametrize(
    ("step_time", "budget", "steps"),
    [
        (0.01, -3.0, 1),  # an earlier stage took more than all of it
        (0.01, 0.0, 1),
        (0.01, 0.055, 5),
        (0.01, 0.195, 19),
        (100.0, 60.0, 1),  # a network of a paper on a CPU
        (100.0, 150.0, 1),
        (100.0, 250.0, 2),
        (100.0, 1999.0, 19),
        (100.0, 2550.0, 25),
    ],
)
def test_the_budget_holds_from_the_first_steps_on(tmp_path, monkeypatch, step_time, budget, steps):
    clock = FakeClock(monkeypatch, step_time)
    options = {"config": LONG, "budget": budget, "workdir": tmp_path}
    network, again = make_network(), make_network(seed=1)
    report = train(network, clock.ticking(), **options)
    assert report.steps == len(report.losses) == steps
    assert report.seconds == pytest.approx(steps * step_time)
    assert train(again, breaking_at(0), **options).steps == steps  # nothing is left to do
    assert torch.equal(flat(again), flat(network))


@pytest.mark.parametrize("broken_at", [1, 3])
def test_slow_steps_of_an_interrupted_run_count(tmp_path, save_always, monkeypatch, broken_at):
    clock = FakeClock(monkeypatch, step_time=100.0)
    options = {"config": LONG, "budget": 550.0, "workdir": tmp_path}
    with pytest.raises(Interruption):
        train(make_network(), clock.ticking(breaking_at(broken_at)), **options)
    report = train(make_network(), clock.ticking(), **options)
    assert (report.steps, report.seconds) == (5, pytest.approx(500.0))


def test_real_seconds_count(monkeypatch):
    def slow(network, batch, generator):
        time.sleep(0.1)
        return denoising_loss(network, batch, generator)

    started = time.monotonic()
    assert 2 <= train(make_network(), slow, config=LONG, budget=0.45).steps <= 4
    assert time.monotonic() - started < 2.0


def test_where_all_fits_a_budget_changes_nothing(monkeypatch):
    free, limited = make_network(), make_network()
    clock = FakeClock(monkeypatch, step_time=1.0)
    config = TrainConfig(steps=12, batch_size=4)
    train(free, clock.ticking(), config=config)
    assert train(limited, clock.ticking(), config=config, budget=12.5).steps == 12
    assert torch.equal(flat(limited), flat(free))


def test_a_budget_never_raises_the_steps(monkeypatch):
    clock = FakeClock(monkeypatch, step_time=0.01)
    assert train(make_network(), clock.ticking(), budget=1e6).steps == CONFIG.steps


@pytest.mark.parametrize(
    "broken_at",
    [
        5,
        25,
        16,
    ],
)
def test_budget_holds_for_an_interrupted_run(tmp_path, save_always, monkeypatch, broken_at):
    clock = FakeClock(monkeypatch, step_time=0.01)
    options = {"config": LONG, "budget": 1.0, "workdir": tmp_path}
    with pytest.raises(Interruption):
        train(make_network(), clock.ticking(breaking_at(broken_at)), **options)
    report = train(make_network(), clock.ticking(), **options)
    assert report.seconds == pytest.approx(1.0, abs=0.02)


# ------------------------------------------------------------- what is learned, what is refused


def test_loss_falls_on_an_easy_task():
    config = TrainConfig(steps=150, batch_size=8, learning_rate=1e-2)
    report = train(make_network(dropout=0.0), config=config)
    assert report.losses.shape == (150,)
    assert report.losses[-20:].mean() < 0.2 * report.losses[:5].mean()


def test_a_clip_of_zero_is_none(monkeypatch):
    big = TrainConfig(steps=3, batch_size=4, grad_clip=0.0)
    free = make_network(dropout=0.0)
    train(free, config=big)
    bounded = make_network(dropout=0.0)
    train(bounded, config=TrainConfig(steps=3, batch_size=4, grad_clip=1e9))
    assert torch.equal(flat(free), flat(bounded))
    assert not torch.equal(flat(free), flat(make_network(dropout=0.0)))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run(value):
    network, calls = make_network(), count()

    def loss(network, batch, generator):
        good = denoising_loss(network, batch, generator)
        return good * value if next(calls) == 3 else good

    with pytest.raises(FloatingPointError, match=f"the loss is {value} at step 3; lower the"):
        train(network, loss)
    assert torch.isfinite(flat(network)).all()


def test_nothing_outside_the_run_is_touched():
    images = make_images()
    before, state = images.clone(), torch.get_rng_state()
    network = make_network()
    train(network, images=images)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(images, before)
    assert not network.training


def test_equal_seeds_give_equal_networks_and_others_do_not():
    networks = [make_network() for _ in range(3)]
    for network, seed in zip(networks, (5, 5, 6), strict=True):
        train(network, seed=seed)
    assert torch.equal(flat(networks[0]), flat(networks[1]))
    assert not torch.equal(flat(networks[0]), flat(networks[2]))


def test_network_is_trained_in_place_and_holds_the_average_weights(monkeypatch):
    """The loop once more by hand: AdamW, clipping, learning rate, and AveragedModel."""
    monkeypatch.setattr(loop, "supports_bf16", lambda device: False)
    config = TrainConfig(
        steps=25,
        batch_size=4,
        learning_rate=1e-2,
        weight_decay=0.1,
        warmup_steps=2,
        ema_decay=0.8,
        grad_clip=0.05,
        flip_axes=(-1,),
    )
    images, learned = make_images(), make_network(dropout=0.0)
    report = train(learned, config=config, seed=3)

    raw = make_network(dropout=0.0)

    def ema(averaged: Tensor, current: Tensor, n: Tensor) -> Tensor:
        decay = min(0.8, (1 + n.item()) / (10 + n.item()))
        return decay * averaged + (1 - decay) * current

    average = AveragedModel(raw, avg_fn=ema)
    optimizer = torch.optim.AdamW(raw.parameters(), weight_decay=0.1)
    generator = torch.Generator().manual_seed(3)
    losses = []
    for step in range(25):
        batch = images[torch.randint(len(images), (4,), generator=generator)]
        batch = random_flips(batch, (-1,), generator)
        loss = denoising_loss(raw, batch, generator)
        optimizer.param_groups[0]["lr"] = 1e-2 * learning_rate_factor(step, 25, 2)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(raw.parameters(), 0.05)
        optimizer.step()
        average.update_parameters(raw)
        losses.append(loss.item())
    torch.testing.assert_close(flat(learned), flat(average.module), rtol=0, atol=1e-6)
    torch.testing.assert_close(report.losses, torch.tensor(losses), rtol=0, atol=1e-6)
    assert (flat(average.module) - flat(raw)).abs().max() > 1e-3  # the two can be told apart


# ------------------------------------------------------------------- learning rate and flips


def test_learning_rate_rises_linearly_and_falls_to_zero():
    factors = [learning_rate_factor(step, 200, 10) for step in range(200)]
    assert factors[:10] == pytest.approx([i / 10 for i in range(1, 11)])
    assert factors[10] == 1
    assert all(a > b > 0 for a, b in pairwise(factors[10:]))
    assert factors[10 + 95] == pytest.approx(0.5)  # half-way down
    assert factors[-1] < 1e-3
    assert learning_rate_factor(200, 200, 10) == pytest.approx(0)


def test_warm_up_takes_at_most_a_tenth():
    assert learning_rate_factor(1, 20, 1000) == 1
    assert learning_rate_factor(0, 20, 1000) == 0.5
    assert learning_rate_factor(0, 5, 1000) == 1  # no room for a warm-up
    assert learning_rate_factor(0, 1, 0) == 1


def test_a_constant_rate_stays_after_the_warm_up():
    factors = [learning_rate_factor(step, 200, 10, "constant") for step in range(300)]
    assert factors[:10] == pytest.approx([i / 10 for i in range(1, 11)])
    assert set(factors[10:]) == {1.0}


def test_steps_follow_the_images_where_epochs_are_given():
    config = TrainConfig(steps=None, epochs=3000, batch_size=16)
    assert [config.total_steps(n) for n in (320, 335, 336, 5)] == [60_000, 60_000, 63_000, 3000]
    assert TrainConfig(steps=7).total_steps(320) == 7
    with pytest.raises(
        ValueError, match=r"TrainConfig must have steps or epochs, got \{.*\}; set one"
    ):
        TrainConfig(epochs=3)
    with pytest.raises(ValueError, match="got none"):
        TrainConfig(steps=None)


def test_each_image_is_flipped_for_itself():
    images = make_images(300)
    flipped = random_flips(images, (-1,), torch.Generator().manual_seed(0))
    same = (flipped == images).flatten(1).all(1)
    mirrored = (flipped == images.flip(-1)).flatten(1).all(1)
    assert (same ^ mirrored).all()
    assert 110 < mirrored.sum().item() < 190


def test_flips_along_two_axes_are_independent():
    images = make_images(400)
    flipped = random_flips(images, (-1, -2), torch.Generator().manual_seed(0))
    variants = [images, images.flip(-1), images.flip(-2), images.flip(-1, -2)]
    counts = [int((flipped == v).flatten(1).all(1).sum()) for v in variants]
    assert sum(counts) == 400
    assert min(counts) > 65


def test_without_axes_nothing_is_flipped_or_drawn():
    images, generator = make_images(), torch.Generator().manual_seed(0)
    state = generator.get_state()
    assert torch.equal(random_flips(images, (), generator), images)
    assert torch.equal(generator.get_state(), state)


def test_builds_without_onednn_train_in_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not supports_bf16(torch.device("cpu"))
