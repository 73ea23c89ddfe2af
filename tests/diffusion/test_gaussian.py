"""Gaussian diffusion against diffusers, against closed forms, and the properties of samplers."""

import itertools
import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffad_lite.diffusion.gaussian import GaussianDiffusion, randn
from diffad_lite.diffusion.schedules import NoiseSchedule

# Our name -> what diffusers calls the same schedule.
IN_DIFFUSERS = {
    "linear": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
}
SAMPLERS = ("ddpm", "ddim")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


def dummy_denoiser(x: Tensor, t: Tensor) -> Tensor:
    """Something that depends on each pixel, its neighbour and the timestep."""
    phase = t.to(x.dtype)[:, None, None, None] / 50
    return torch.tanh(x + 0.3 * x.roll(1, -1)) * torch.cos(phase) + 0.2 * torch.sin(phase)


def make(name: str = "linear", num_timesteps: int = 1000, clip: float | None = 1.0):
    return GaussianDiffusion(NoiseSchedule.named(name, num_timesteps), clip)


def sample(diffusion, sampler, denoiser, x, timesteps, seed=0):
    if sampler == "ddim":
        return list(diffusion.ddim_sample(denoiser, x, timesteps))
    return list(diffusion.ddpm_sample(denoiser, x, timesteps, generator(seed)))


# ------------------------------------------------------------------- (a) equal to diffusers

LOOPS = [(1000, 10), (200, 25), (50, 50)]
# The last abar of the cosine schedule is 2e-9: without clipping, float32 cannot hold the loop.
CASES = [("linear", True), ("linear", False), ("scaled_linear", False), ("cosine", True)]


def assert_states_close(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() <= 1e-5 * max(1.0, b.abs().max().item())


@pytest.mark.parametrize(("name", "clip"), CASES)
@pytest.mark.parametrize(("num_timesteps", "steps"), LOOPS)
def test_ddpm_loop_equals_diffusers(num_timesteps, steps, name, clip):
    scheduler = DDPMScheduler(
        num_train_timesteps=num_timesteps,
        variance_type="fixed_small",
        timestep_spacing="trailing",
        clip_sample=clip,
        **IN_DIFFUSERS[name],
    )
    scheduler.set_timesteps(steps)
    x = normal(2, 1, 4, 5, seed=1)
    theirs, clean, rng = [x], [], generator(7)
    for t in scheduler.timesteps:
        out = scheduler.step(dummy_denoiser(theirs[-1], t.expand(2)), t, theirs[-1], generator=rng)
        theirs.append(out.prev_sample)
        clean.append(out.pred_original_sample)
    diffusion = make(name, num_timesteps, 1.0 if clip else None)
    timesteps = diffusion.schedule.timesteps(steps=steps)
    ours = list(diffusion.ddpm_sample(dummy_denoiser, x, timesteps, generator(7)))
    assert_states_close([s.x for s in ours], theirs)
    assert_states_close([s.x0_hat for s in ours[1:]], clean)


@pytest.mark.parametrize(("name", "clip"), CASES)
@pytest.mark.parametrize(("num_timesteps", "steps"), LOOPS)
def test_ddim_loop_equals_diffusers(num_timesteps, steps, name, clip):
    scheduler = DDIMScheduler(
        num_train_timesteps=num_timesteps,
        timestep_spacing="trailing",
        clip_sample=clip,
        set_alpha_to_one=True,
        **IN_DIFFUSERS[name],
    )
    scheduler.set_timesteps(steps)
    x = normal(2, 1, 4, 5, seed=1)
    theirs, clean = [x], []
    for t in scheduler.timesteps:
        # The flag has the noise follow a clipped estimate, as in the samplers of OpenAI's code.
        out = scheduler.step(
            dummy_denoiser(theirs[-1], t.expand(2)),
            t,
            theirs[-1],
            eta=0.0,
            use_clipped_model_output=True,
        )
        theirs.append(out.prev_sample)
        clean.append(out.pred_original_sample)
    diffusion = make(name, num_timesteps, 1.0 if clip else None)
    timesteps = diffusion.schedule.timesteps(steps=steps)
    ours = list(diffusion.ddim_sample(dummy_denoiser, x, timesteps))
    assert_states_close([s.x for s in ours], theirs)
    assert_states_close([s.x0_hat for s in ours[1:]], clean)


# ---------------------------------------------------- (b, c) one pixel of Gaussian data, exact

# At these numbers of steps the samplers' own discretisation errs by 0.9 % of the variance.
MU, SIGMA = 1.5, 1.0


def exact_denoiser(schedule: NoiseSchedule):
    """The posterior mean of the noise for data N(MU, SIGMA^2)."""

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        abar = schedule.alpha_bar(int(t[0]), x)
        return (1 - abar).sqrt() * (x - abar.sqrt() * MU) / (abar * SIGMA**2 + 1 - abar)

    return denoiser


@pytest.mark.parametrize(("sampler", "steps"), [("ddpm", 1000), ("ddim", 500)])
def test_exact_score_samples_the_data_distribution(sampler, steps):
    diffusion = make(clip=None)
    timesteps = diffusion.schedule.timesteps(steps=steps)
    x_T = normal(100_000, 1, 1, 1, seed=3)
    denoiser = exact_denoiser(diffusion.schedule)
    last = sample(diffusion, sampler, denoiser, x_T, timesteps, seed=4)[-1].x
    assert last.mean().item() == pytest.approx(MU, rel=0.02)
    assert last.var().item() == pytest.approx(SIGMA**2, rel=0.02)


def test_ddim_round_trip_error_falls_with_the_number_of_steps():
    diffusion = make(clip=None)
    denoiser = exact_denoiser(diffusion.schedule)
    x0 = MU + SIGMA * normal(500, 1, 1, 1, seed=5)
    errors = []
    for steps in (10, 30, 100, 300):
        timesteps = diffusion.schedule.timesteps(steps=steps)
        *_, encoded = diffusion.ddim_encode(denoiser, x0, timesteps[::-1])
        assert encoded.t == 999
        *_, decoded = diffusion.ddim_sample(denoiser, encoded.x, timesteps)
        errors.append((decoded.x - x0).abs().mean().item())
    assert all(later < 0.6 * earlier for earlier, later in itertools.pairwise(errors))
    assert errors[-1] < 0.02


def test_ddim_encode_reaches_the_normal_distribution():
    diffusion = make(clip=None)
    x0 = MU + SIGMA * normal(20_000, 1, 1, 1, seed=6)
    timesteps = diffusion.schedule.timesteps()[::-1]
    *_, encoded = diffusion.ddim_encode(exact_denoiser(diffusion.schedule), x0, timesteps)
    assert encoded.x.mean().item() == pytest.approx(0, abs=0.03)
    assert encoded.x.var().item() == pytest.approx(1, rel=0.03)


# ---------------------------------------------------------------------- (d) the closed forms


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 999), min_size=1, max_size=4), st.integers(0, 2**31))
def test_noise_clean_image_and_state_determine_each_other(ts, seed):
    diffusion = make("scaled_linear")
    t = torch.tensor(ts)
    x0, eps = normal(2, len(ts), 3, 2, 4, seed=seed).double()
    x_t = diffusion.add_noise(x0, t, eps)
    torch.testing.assert_close(diffusion.predict_x0(x_t, t, eps), x0, rtol=0, atol=1e-9)
    torch.testing.assert_close(diffusion.predict_noise(x_t, t, x0), eps, rtol=0, atol=1e-9)
    for i, single in enumerate(ts):  # each image has its own timestep
        one = diffusion.add_noise(x0[i : i + 1], single, eps[i : i + 1])
        torch.testing.assert_close(x_t[i : i + 1], one, rtol=0, atol=0)


def test_added_noise_has_the_variance_of_the_schedule():
    diffusion = make()
    abar = diffusion.schedule.alphas_cumprod[400].item()
    x_t = diffusion.add_noise(torch.full((1, 1, 200, 200), 0.7), 400, normal(1, 1, 200, 200))
    assert x_t.mean().item() == pytest.approx(0.7 * math.sqrt(abar), abs=0.02)
    assert x_t.var().item() == pytest.approx(1 - abar, rel=0.02)


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_posterior_equals_conditioning_the_joint_gaussian(data):
    """q(x_s, x_t | x_0) walked step by step, then conditioned on x_t; s < t, any stride."""
    t = data.draw(st.integers(0, 99))
    s = data.draw(st.integers(-1, t - 1))
    diffusion = make("linear", 100)
    x0, x_t = 0.3, -0.8
    mean_s, var_s = x0, 0.0
    mean_t, var_t, covariance = None, None, None
    for step in range(t + 1):
        if step == s + 1:
            mean_t, var_t, covariance = mean_s, var_s, var_s
        beta = diffusion.schedule.betas[step].item()
        if step <= s:
            mean_s, var_s = math.sqrt(1 - beta) * mean_s, (1 - beta) * var_s + beta
        else:
            mean_t, var_t = math.sqrt(1 - beta) * mean_t, (1 - beta) * var_t + beta
            covariance *= math.sqrt(1 - beta)
    expected_mean = mean_s + covariance / var_t * (x_t - mean_t)
    expected_variance = var_s - covariance**2 / var_t
    like = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    mean, variance = diffusion.posterior(x_t * like, x0 * like, t, s)
    assert mean.item() == pytest.approx(expected_mean, abs=1e-10)
    assert variance.item() == pytest.approx(expected_variance, abs=1e-10)


def test_posterior_takes_one_timestep_for_each_image():
    diffusion = make("linear", 100)
    x_t, x0 = normal(2, 3, 1, 2, 2).double()
    t, s = torch.tensor([99, 40, 0]), torch.tensor([98, 10, -1])
    mean, variance = diffusion.posterior(x_t, x0, t, s)
    for i in range(3):
        one = diffusion.posterior(x_t[i : i + 1], x0[i : i + 1], int(t[i]), int(s[i]))
        torch.testing.assert_close(mean[i : i + 1], one[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(variance[i].squeeze(), one[1].squeeze(), rtol=0, atol=1e-12)


def test_loss_is_the_mean_squared_error_of_the_noise():
    diffusion = make()
    x0, eps = normal(2, 3, 1, 4, 4)
    t = torch.tensor([0, 500, 999])
    seen = []

    def half_right(x, t):
        seen.append((x, t))
        return eps / 2

    assert diffusion.loss(half_right, x0, t, eps).item() == pytest.approx(
        (eps**2).mean().item() / 4, rel=1e-6
    )
    torch.testing.assert_close(seen[0][0], diffusion.add_noise(x0, t, eps), rtol=0, atol=0)
    assert torch.equal(seen[0][1], t)


# ----------------------------------------------------------------------------- (e) the noise


def test_noise_of_an_image_does_not_depend_on_its_batch():
    image = torch.zeros(3, 2, 4, 4)
    together = randn(image, [generator(s) for s in (1, 2, 3)])
    alone = randn(image[:1], [generator(2)])
    swapped = randn(image[:2], [generator(3), generator(2)])
    assert torch.equal(together[1], alone[0])
    assert torch.equal(together[1], swapped[1])
    assert torch.equal(together[2], swapped[0])
    assert not torch.equal(together[0], together[1])
    assert together.std().item() == pytest.approx(1, abs=0.25)


def test_noise_has_the_type_of_the_images():
    like = torch.zeros(2, 1, 2, 2, dtype=torch.float64)
    for generators in (generator(), [generator(1), generator(2)]):
        noise = randn(like, generators)
        assert noise.dtype == torch.float64
        assert noise.shape == like.shape


@pytest.mark.parametrize("n", [0, 2, 4])
def test_wrong_number_of_generators_is_refused(n):
    with pytest.raises(ValueError, match=f"{n} generators for a batch of 3 images"):
        randn(torch.zeros(3, 1, 2, 2), [generator(s) for s in range(n)])


# ------------------------------------------------------------------- (f, g) samplers, clipping


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("timesteps", [[999, 500, 20], [3], list(range(9, -1, -1))], ids=str)
def test_samplers_yield_every_state_down_to_the_clean_image(sampler, timesteps):
    x = normal(2, 1, 3, 3)
    steps = sample(make(), sampler, dummy_denoiser, x, timesteps)
    assert [s.t for s in steps] == [*timesteps, -1]
    assert steps[0].x is x
    assert steps[0].x0_hat is None
    assert all(s.x.shape == x.shape == s.x0_hat.shape for s in steps[1:])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_denoiser_is_asked_once_for_each_timestep(sampler):
    asked = []

    def spy(x, t):
        assert t.dtype == torch.int64
        asked.append(t.tolist())
        return dummy_denoiser(x, t)

    sample(make(), sampler, spy, normal(2, 1, 3, 3), [700, 30, 4])
    assert asked == [[700, 700], [30, 30], [4, 4]]


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("clip", [1.0, 0.25])
def test_clean_estimates_keep_the_bound(sampler, clip):
    diffusion = make(clip=clip)
    timesteps = diffusion.schedule.timesteps(steps=20)
    steps = sample(diffusion, sampler, dummy_denoiser, 3 * normal(2, 1, 4, 4), timesteps)
    assert max(s.x0_hat.abs().max().item() for s in steps[1:]) == pytest.approx(clip)
    assert steps[-1].x.abs().max().item() <= clip + 1e-6


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_without_a_bound_nothing_is_clipped(sampler):
    diffusion = make(clip=None)
    x = 3 * normal(2, 1, 4, 4)
    steps = sample(diffusion, sampler, dummy_denoiser, x, [300, 100])
    eps = dummy_denoiser(x, torch.full((2,), 300))
    torch.testing.assert_close(steps[1].x0_hat, diffusion.predict_x0(x, 300, eps))
    assert steps[1].x0_hat.abs().max() > 1


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_sampling_repeats_exactly(sampler):
    timesteps = make().schedule.timesteps(steps=10)
    x = normal(2, 1, 4, 4)
    runs = [sample(make(), sampler, dummy_denoiser, x, timesteps, seed=8)[-1].x for _ in "ab"]
    assert torch.equal(*runs)


def test_ddpm_depends_on_its_generator_and_ddim_leaves_the_state_alone():
    x = normal(1, 1, 4, 4)
    before = x.clone()
    a, b = (sample(make(), "ddpm", dummy_denoiser, x, [900, 400, 50], s)[-1].x for s in (1, 2))
    assert not torch.equal(a, b)
    sample(make(), "ddim", dummy_denoiser, x, [900, 400, 50])
    assert torch.equal(x, before)


def test_ddpm_with_a_generator_for_each_image_does_not_depend_on_the_batch():
    x = normal(3, 1, 4, 4)
    timesteps = [900, 400, 50, 3]
    generators = [generator(s) for s in (1, 2, 3)]
    *_, together = make().ddpm_sample(dummy_denoiser, x, timesteps, generators)
    *_, alone = make().ddpm_sample(dummy_denoiser, x[1:2], timesteps, [generator(2)])
    torch.testing.assert_close(together.x[1:2], alone.x, rtol=0, atol=1e-6)


@pytest.mark.parametrize("clip", [1.0, None])
@pytest.mark.parametrize("t", [0, 100, 999])
def test_one_ddim_step_is_the_clean_estimate(t, clip):
    diffusion = make(clip=clip)
    x = normal(2, 1, 4, 4)
    eps = dummy_denoiser(x, torch.full((2,), t))
    *_, last = diffusion.ddim_sample(dummy_denoiser, x, [t])
    assert torch.equal(last.x, diffusion.clean_estimate(x, t, eps))
    assert torch.equal(last.x, last.x0_hat)


def test_ddim_step_backwards_undoes_the_step():
    """Where the noise does not change, the same formula run the other way is its inverse."""
    diffusion = make(clip=None)
    x, eps = normal(2, 1, 1, 4, 4).double()
    there, x0_hat = diffusion.ddim_step(x, 700, 200, eps)
    back, same = diffusion.ddim_step(there, 200, 700, eps)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-12)
    torch.testing.assert_close(same, x0_hat, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "clip",
    [
        None,
        1.0,
    ],
)
def test_ddim_step_from_the_clean_image_adds_the_predicted_noise(clip):
    x0, eps = 0.5 * normal(2, 1, 1, 4, 4).clamp(-1, 1)
    diffusion = make(clip=clip)
    encoded, _ = diffusion.ddim_step(x0, -1, 300, eps)
    torch.testing.assert_close(encoded, diffusion.add_noise(x0, 300, eps))


def test_ddim_encode_yields_every_state_and_evaluates_at_the_target_timestep():
    asked = []

    def spy(x, t):
        asked.append(t.tolist())
        return dummy_denoiser(x, t)

    x0 = normal(2, 1, 3, 3)
    steps = list(make().ddim_encode(spy, x0, [10, 200, 999]))
    assert [s.t for s in steps] == [-1, 10, 200, 999]
    assert steps[0].x is x0
    assert asked == [[10, 10], [200, 200], [999, 999]]
