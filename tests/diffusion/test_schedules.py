"""Noise schedules: equality with diffusers, abar, and the timesteps of a sampler."""

import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from diffad_lite.diffusion.schedules import NoiseSchedule, make_betas

# Our name -> what diffusers calls the same schedule.
IN_DIFFUSERS = {
    "linear": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
}
NAMES = sorted(IN_DIFFUSERS)


@pytest.mark.parametrize("num_timesteps", [1000, 200, 10])
@pytest.mark.parametrize("name", NAMES)
def test_alphas_cumprod_equals_diffusers(name, num_timesteps):
    theirs = DDIMScheduler(num_train_timesteps=num_timesteps, **IN_DIFFUSERS[name])
    ours = NoiseSchedule.named(name, num_timesteps)
    assert ours.num_timesteps == num_timesteps
    torch.testing.assert_close(ours.betas.float(), theirs.betas.float(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        ours.alphas_cumprod.float(), theirs.alphas_cumprod, rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("num_timesteps", [1, 2, 1000])
@pytest.mark.parametrize("name", NAMES)
def test_alphas_cumprod_decreases_inside_the_open_unit_interval(name, num_timesteps):
    schedule = NoiseSchedule.named(name, num_timesteps)
    abar = schedule.alphas_cumprod
    assert abar.dtype == schedule.betas.dtype == torch.float64
    assert abar.shape == (num_timesteps,)
    assert ((abar > 0) & (abar < 1)).all()
    assert (abar.diff() < 0).all()
    assert ((schedule.betas > 0) & (schedule.betas <= 0.999)).all()


def test_snr_is_signal_over_noise_variance():
    schedule = NoiseSchedule(torch.tensor([0.2, 0.5], dtype=torch.float64))  # abar 0.8, 0.4
    torch.testing.assert_close(
        schedule.snr, torch.tensor([4.0, 2 / 3], dtype=torch.float64), rtol=1e-12, atol=0
    )


def test_alpha_bar_of_the_clean_image_is_one():
    schedule = NoiseSchedule.named("linear", 10)
    assert schedule.alpha_bar(-1, torch.zeros(2, 1, 3, 3)).item() == 1
    mixed = schedule.alpha_bar(torch.tensor([-1, 9, 0]), torch.zeros(3, 1, 3, 3))
    assert mixed.shape == (3, 1, 1, 1)
    expected = [1, schedule.alphas_cumprod[9].item(), schedule.alphas_cumprod[0].item()]
    assert mixed.flatten().tolist() == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_alpha_bar_has_the_type_of_what_it_multiplies(dtype):
    schedule = NoiseSchedule.named("cosine", 10)
    abar = schedule.alpha_bar(torch.tensor([3]), torch.zeros(1, 2, dtype=dtype))
    assert abar.dtype == dtype
    assert abar.shape == (1, 1)
    assert abar.item() == pytest.approx(schedule.alphas_cumprod[3].item(), rel=1e-7)


@pytest.mark.parametrize("t", [-2, 10, torch.tensor([0, 10]), torch.tensor([3, -2])], ids=str)
def test_alpha_bar_refuses_timesteps_out_of_range(t):
    with pytest.raises(ValueError, match=r"are not all in -1\.\.9"):
        NoiseSchedule.named("linear", 10).alpha_bar(t, torch.zeros(2, 1, 1, 1))


@pytest.mark.parametrize(
    ("num_timesteps", "steps"), [(1000, 10), (1000, 50), (200, 25), (1000, 7), (50, 40)]
)
def test_timesteps_equal_diffusers_trailing_spacing(num_timesteps, steps):
    scheduler = DDIMScheduler(num_train_timesteps=num_timesteps, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    ours = NoiseSchedule.named("linear", num_timesteps).timesteps(steps=steps)
    assert ours == scheduler.timesteps.tolist()


def test_all_timesteps_are_the_default_and_equal_diffusers():
    scheduler = DDIMScheduler(num_train_timesteps=1000, timestep_spacing="trailing")
    scheduler.set_timesteps(1000)
    schedule = NoiseSchedule.named("linear", 1000)
    assert schedule.timesteps() == schedule.timesteps(steps=1000) == scheduler.timesteps.tolist()
    assert schedule.timesteps()[0] == 999
    assert schedule.timesteps()[-1] == 0


@settings(deadline=None)
@given(st.data())
def test_timesteps_fall_evenly_from_the_start(data):
    num_timesteps = data.draw(st.integers(1, 2000))
    start = data.draw(st.integers(0, num_timesteps - 1))
    steps = data.draw(st.integers(1, start + 1))
    timesteps = NoiseSchedule(torch.full((num_timesteps,), 0.01)).timesteps(start, steps)
    assert len(timesteps) == steps
    assert timesteps[0] == start
    assert timesteps[-1] >= 0
    strides = [a - b for a, b in zip(timesteps, [*timesteps[1:], -1], strict=True)]
    assert min(strides) >= 1
    assert max(strides) - min(strides) <= 2
    assert all(isinstance(t, int) for t in timesteps)


def test_unknown_schedule_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown beta schedule 'sigmoid'; known: linear, cosine"):
        make_betas("sigmoid")


@pytest.mark.parametrize("num_timesteps", [0, -3])
def test_a_schedule_needs_a_step(num_timesteps):
    with pytest.raises(ValueError, match=f"num_timesteps must be at least 1, got {num_timesteps}"):
        make_betas("linear", num_timesteps)


@pytest.mark.parametrize(
    ("start", "steps", "message"),
    [
        (10, None, r"start must be in 0\.\.9, got 10"),
        (-1, None, r"start must be in 0\.\.9, got -1"),
        (None, 11, r"steps must be in 1\.\.10 from timestep 9, got 11"),
        (4, 6, r"steps must be in 1\.\.5 from timestep 4, got 6"),
        (4, 0, r"steps must be in 1\.\.5 from timestep 4, got 0"),
    ],
)
def test_timesteps_out_of_range_are_refused(start, steps, message):
    with pytest.raises(ValueError, match=message):
        NoiseSchedule.named("linear", 10).timesteps(start, steps)
