"""Bernoulli diffusion: closed forms against Monte Carlo and Bayes, the loss, the masked chain."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diffad_lite.diffusion.bernoulli import BernoulliDiffusion, sample_bits
from diffad_lite.diffusion.gaussian import noise_generators
from diffad_lite.diffusion.schedules import NoiseSchedule

SCHEDULE = NoiseSchedule.named("linear")
SYMMETRIC, ERASURE = (BernoulliDiffusion(SCHEDULE, p) for p in ("symmetric", "erasure"))


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def bits(*shape: int, seed: int = 0) -> Tensor:
    return (torch.rand(shape, generator=rng(seed)) < 0.5).double()


PAIRS = [torch.tensor(pair, dtype=torch.float64) for pair in itertools.product((0, 1), (0, 1))]


# ------------------------------------------------------------------------ the forward process


@pytest.mark.parametrize("name", ["linear", "cosine", "scaled_linear"])
def test_the_marginal_is_that_of_all_steps(name):
    """Each step replaces a bit by a fair coin with probability beta."""
    schedule = NoiseSchedule.named(name)
    for z0 in (0.0, 1.0):
        p, z = z0, torch.tensor([z0], dtype=torch.float64)
        for t, beta in enumerate(schedule.betas.tolist()):
            p = (1 - beta) * p + beta / 2
            if t % 111 == 0 or t == 999:
                found = BernoulliDiffusion(schedule).marginal(z, t)
                assert float(found) == pytest.approx(p, abs=1e-12)


@pytest.mark.parametrize("t", [0, 50, 200, 999])
@pytest.mark.parametrize("z0", [0.0, 1.0])
def test_bits_flip_as_often_from_both_values(z0, t):
    """Within four standard errors. The erasure process fails this for zeros: they stay."""
    n = 100_000
    z = torch.full((1, n), z0, dtype=torch.float64)
    expected = (1 - float(SCHEDULE.alphas_cumprod[t])) / 2
    rate = float((SYMMETRIC.add_noise(z, t, rng()) != z).double().mean())
    error = 4 * math.sqrt(expected * (1 - expected) / n) + 1e-12
    assert abs(rate - expected) < error
    erased = float((ERASURE.add_noise(z, t, rng()) != z).double().mean())
    if z0 == 0:
        assert erased == 0
    else:
        assert erased == pytest.approx(2 * expected, abs=2 * error)


def test_noise_composes_by_multiplying():
    """1 - 2 phi of all steps is the product of theirs."""
    phi = [(1 - float(SCHEDULE.alphas_cumprod[t])) / 2 for t in (200, 999)]
    steps = 1 - 2 * SCHEDULE.betas / 2
    assert 1 - 2 * phi[0] == pytest.approx(float(steps[:201].prod()), abs=1e-12)
    assert 1 - 2 * phi[1] == pytest.approx(float(steps.prod()), abs=1e-12)


def test_an_images_noise_does_not_depend_on_its_neighbours():
    z = bits(3, 4, 5, 5).float()
    together = SYMMETRIC.add_noise(z, 100, noise_generators(["a", "b", "c"], 0))
    alone = SYMMETRIC.add_noise(z[1:2], 100, noise_generators(["b"], 0))
    assert torch.equal(together[1:2], alone)


# --------------------------------------------------------------------------------- the way back


def by_bayes(z_t: float, z0: float, t: int, s: int) -> float:
    """P(z_s = 1 | z_t, z_0) from the kernels of two strides."""
    abar = [*SCHEDULE.alphas_cumprod.tolist(), 1.0]

    def kernel(b: float, a: float, signal: float) -> float:
        one = signal * a + (1 - signal) / 2
        return one if b == 1 else 1 - one

    joint = [kernel(z_t, z, abar[t] / abar[s]) * kernel(z, z0, abar[s]) for z in (0.0, 1.0)]
    return joint[1] / sum(joint)


def mixture_posterior(z_t: Tensor, z0_hat: Tensor, t: int, s: int) -> Tensor:
    """The posteriors of both clean bits, weighted by their probabilities, as in lesson 06."""
    if_zero, if_one = (SYMMETRIC.posterior(z_t, torch.full_like(z_t, z0), t, s) for z0 in (0, 1))
    return (1 - z0_hat) * if_zero + z0_hat * if_one


WAYS = {"posterior": SYMMETRIC.posterior, "mixture": mixture_posterior}


@pytest.mark.parametrize(("t", "s"), [(1, 0), (200, 199), (200, 150), (999, 500), (3, -1)])
def test_the_posterior_is_bayes_rule(t, s):
    for z_t, z0 in PAIRS:
        found = SYMMETRIC.posterior(z_t[None], z0[None], t, s)
        assert float(found) == pytest.approx(by_bayes(float(z_t), float(z0), t, s), abs=1e-12)
        mirrored = SYMMETRIC.posterior(1 - z_t[None], 1 - z0[None], t, s)
        assert float(found + mirrored) == pytest.approx(1, abs=1e-12)
        assert torch.equal(found, mixture_posterior(z_t[None], z0[None], t, s))


def test_posteriors_of_the_specification():
    """Numbers computed independently, for index t and the one before."""
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    assert float(SYMMETRIC.posterior(zero, one, 200, 199)) == pytest.approx(0.00985804, abs=1e-8)
    assert float(SYMMETRIC.posterior(one, one, 200, 199)) == pytest.approx(0.99957965, abs=1e-8)
    assert float(SYMMETRIC.posterior(zero, one / 2, 200, 199)) == pytest.approx(
        0.00204199, abs=1e-8
    )
    assert float(mixture_posterior(zero, one / 2, 199, 198)) == pytest.approx(0.0052, abs=1e-4)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("t", "s"), [(1, 0), (200, 199), (200, 150), (999, 3), (40, -1)])
def test_a_step_back_preserves_the_marginal(way, t, s):
    """Summed over both values of z_t, exactly."""
    step = WAYS[way]
    for z0 in (torch.zeros(1).double(), torch.ones(1).double()):
        p = SYMMETRIC.marginal(z0, t)
        zero, one = torch.zeros(1).double(), torch.ones(1).double()
        after = (1 - p) * step(zero, z0, t, s) + p * step(one, z0, t, s)
        assert float(after) == pytest.approx(float(SYMMETRIC.marginal(z0, s)), abs=1e-12)
        assert 0 <= float(step(one, z0, t, s)) <= 1


# ------------------------------------------------------------------------------------- the loss


def test_asking_for_flips_is_asking_for_bits():
    """The same loss, bit by bit: BCE(f, z_t ^ z_0) = BCE(|z_t - f|, z_0); logits (1 - 2 z_t) u."""
    z0, u = bits(2, 50), torch.randn(2, 50, generator=rng(1), dtype=torch.float64)
    z_t = SYMMETRIC.add_noise(z0, 300, rng(2))
    f, flipped = u.sigmoid(), (z_t != z0).double()
    of_flips = F.binary_cross_entropy(f, flipped, reduction="none")
    of_bits = F.binary_cross_entropy((z_t - f).abs(), z0, reduction="none")
    torch.testing.assert_close(of_flips, of_bits, atol=1e-10, rtol=0)
    torch.testing.assert_close(((1 - 2 * z_t) * u).sigmoid(), (z_t - f).abs(), atol=1e-10, rtol=0)


def test_a_predictor_that_knows_nothing_loses_one_bit():
    z0 = bits(4, 100).float()
    t = torch.tensor([0, 10, 500, 999])
    loss = SYMMETRIC.loss(lambda z, t: torch.zeros_like(z), z0, t, rng())
    assert float(loss) == pytest.approx(1)


def test_the_loss_counts_the_flips_that_were_made():
    """A sure "no flip" costs its logit for every flip."""
    z0 = torch.zeros(1, 200_000)
    loss = SYMMETRIC.loss(lambda z, t: torch.full_like(z, -20.0), z0, torch.tensor([200]), rng())
    phi = (1 - float(SCHEDULE.alphas_cumprod[200])) / 2
    assert float(loss) == pytest.approx(20 * phi / math.log(2), rel=0.02)


# ------------------------------------------------------------------------------ the masked chain


def oracle(z0: Tensor):
    """Knows the clean code."""
    return lambda z_t, t: 40 * (2 * (z_t != z0).to(z_t) - 1)


TIMESTEPS = SCHEDULE.timesteps(199, 50)


def run(predictor, z, threshold, seed=0, diffusion=SYMMETRIC, **options):
    generators = noise_generators([str(i) for i in range(len(z))], seed)
    return list(diffusion.masked_sample(predictor, z, TIMESTEPS, generators, threshold, **options))


@pytest.mark.parametrize("way", WAYS)
def test_an_oracle_gives_the_clean_code_back(way):
    z0, diffusion = bits(4, 500).float(), copy.copy(SYMMETRIC)
    diffusion.posterior = WAYS[way]
    steps = run(oracle(z0), z0, 0.5, diffusion=diffusion)
    assert torch.equal(steps[-1].z, z0)
    assert len(steps) == 51
    assert float((steps[0].z != z0).float().mean()) == pytest.approx(0.172, abs=0.02)
    assert float((steps[-2].z != z0).float().mean()) < 0.005  # before the last step
    assert float(steps[-1].mask.mean()) == pytest.approx(0.172, abs=0.03)  # what noise flipped


def test_flips_of_the_input_bit_are_not_suspected_because_of_noise():
    z0 = bits(4, 500).float()
    steps = run(oracle(z0), z0, 0.5, suspect="input")
    assert float(steps[-1].mask.sum()) == 0
    wrong = z0.clone()
    wrong[:, :50] = 1 - wrong[:, :50]  # an anomaly
    steps = run(oracle(z0), wrong, 0.5, suspect="input")
    assert torch.equal(steps[-1].mask, (wrong != z0).float())
    assert torch.equal(steps[-1].z, z0)


def test_a_threshold_of_one_gives_the_input_back_and_below_zero_forgets_it():
    noise = torch.randn(4, 500, generator=rng(5))

    def any_predictor(z_t, t):
        return noise

    z = bits(4, 500).float()
    assert torch.equal(run(any_predictor, z, 1.0)[-1].z, z)
    assert float(run(any_predictor, z, 1.0)[-1].mask.sum()) == 0
    free = run(any_predictor, z, -1.0)
    assert float(free[-1].mask.mean()) == 1
    d = SYMMETRIC
    same_start = d.add_noise(z, TIMESTEPS[0], noise_generators(list("0123"), 0))
    assert torch.equal(free[0].z, same_start)


def test_the_mask_only_grows_and_is_smaller_for_a_higher_threshold():
    def predictor(z_t, t):
        return torch.randn(z_t.shape, generator=rng(int(t[0])))

    z, areas = bits(2, 300).float(), []
    for threshold in (0.2, 0.5, 0.8, 0.95):
        steps = run(predictor, z, threshold)
        for before, after in itertools.pairwise(steps):
            assert (after.mask >= before.mask).all()
        areas.append(float(steps[1].mask.mean()))
    assert areas == sorted(areas, reverse=True)


def test_a_batch_is_its_images():
    z = bits(3, 80).float()

    def predictor(z_t, t):
        return 3 * (z_t - 0.4) + z_t.mean(1, keepdim=True)

    together = run(predictor, z, 0.5)[-1]
    for i in range(3):
        generators = noise_generators([str(i)], 0)
        own = z[i : i + 1]
        alone = list(SYMMETRIC.masked_sample(predictor, own, TIMESTEPS, generators, 0.5))[-1]
        assert torch.equal(alone.z, together.z[i : i + 1])
        assert torch.equal(alone.mask, together.mask[i : i + 1])


def test_the_missing_term_lets_wrong_ones_stand():
    """Sixteen equal bits are healthy, one is wrong, the predictor is Bayes-optimal.

    With the symmetric process the wrong bit is repaired whichever way it is wrong. With erasure a
    one is certain, so that a wrong one turns all others on.
    """
    n, timesteps = 1000, SCHEDULE.timesteps(199)
    phi = lambda t: (1 - SCHEDULE.alphas_cumprod[t[0]]) / 2  # noqa: E731

    def symmetric(z_t, t):
        ones = z_t.sum(1, keepdim=True)
        odds = (2 * ones - 16) * torch.log((1 - phi(t)) / phi(t))  # of "all are one"
        return torch.where(z_t == 1, -odds, odds)

    def erasure(z_t, t):
        abar = SCHEDULE.alphas_cumprod[t[0]]
        seen = z_t.amax(1, keepdim=True) > 0
        odds = torch.where(seen, 40.0, 16 * torch.log(1 - abar))  # of "all are one"
        return torch.where(z_t == 1, -40.0, odds.expand_as(z_t))

    def repaired(diffusion, predictor, healthy: float) -> tuple[float, float]:
        z = torch.full((n, 16), healthy, dtype=torch.float64)
        z[:, 0] = 1 - healthy
        chain = diffusion.masked_sample(predictor, z, timesteps, rng(), 0.5)
        *_, last = chain
        right = (last.z == healthy).double()
        return float(right[:, 0].mean()), float(right[:, 1:].mean())

    for healthy in (0.0, 1.0):
        wrong_bit, others = repaired(SYMMETRIC, symmetric, healthy)
        assert wrong_bit == pytest.approx(0.997, abs=0.01)
        assert others == pytest.approx(0.997, abs=0.01)
    assert repaired(ERASURE, erasure, 1.0)[0] > 0.99
    wrong_bit, others = repaired(ERASURE, erasure, 0.0)
    assert wrong_bit < 0.02
    assert others < 0.02


def test_sampled_bits_have_their_probability():
    p = torch.tensor([0.0, 0.1, 0.5, 1.0]).repeat(20_000, 1)
    found = sample_bits(p, rng())
    assert set(found.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(found.mean(0), p[0], atol=0.015, rtol=0)
