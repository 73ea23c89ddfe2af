"""Paper settings against short restatements of what the public codes compute."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diffad_lite.core.numbers import top_count
from diffad_lite.diffusion.gaussian import noise_generators, randn
from diffad_lite.diffusion.schedules import NoiseSchedule
from diffad_lite.methods.base import read_profiles
from diffad_lite.methods.glad import GLAD, GLADConfig
from diffad_lite.methods.mdps import MDPS, MDPSConfig
from diffad_lite.spaces.features import feature_distance, perceptual_distance
from diffad_lite.training.loop import train_network
from diffad_lite.training.state import TrainConfig

SIZE = 16
SMALL = {"base_channels": 8, "channel_mults": (1, 2), "attention_levels": ()}


def made(kind, **changes):
    """A method whose denoiser predicts something, in float64."""
    base = kind.Config.for_profile("ci", channels=1, image_size=SIZE)
    denoiser = type(base.denoiser)(**SMALL)
    method = kind(type(base)(**{"channels": 1, "image_size": SIZE, "denoiser": denoiser} | changes))
    rng = torch.Generator().manual_seed(1)
    for parameter in method.network["denoiser"].parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=rng)
    method.network.eval()
    method.network["denoiser"].double()
    return method


def pictures(n: int, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return (0.8 * torch.randn(n, 1, SIZE, SIZE, generator=rng)).clamp(-1, 1).double()


def generators(n: int) -> list[torch.Generator]:
    return noise_generators([str(i) for i in range(n)], 0)


def alpha_bars() -> list[float]:
    """abar_t of the linear schedule, written out."""
    bars, product = [], 1.0
    for i in range(1000):
        product *= 1 - (1e-4 + (0.02 - 1e-4) * i / 999)
        bars.append(product)
    return bars


def predict(method, x_t: Tensor, t: int) -> Tensor:
    with torch.no_grad():
        return method.network["denoiser"](x_t, torch.full((len(x_t),), t))


# -------------------------------------------------------------------------------- GLAD's sampler


def glad_sampler(method, z0, noise, start, steps, t_min, delta, drift, cells):
    """Adaptive steps and fusion for one image; returns its reconstruction and t*."""
    bars, stride = alpha_bars(), start // steps
    z = math.sqrt(bars[start]) * z0 + math.sqrt(1 - bars[start]) * noise
    decided = None
    for k in reversed(range(steps)):
        t = k * stride + 1
        a, s = math.sqrt(bars[t]), math.sqrt(1 - bars[t])
        eps = predict(method, z, t)
        clean = (z - s * eps) / a
        if decided is None:
            of_input = (a * z0 + s * noise - s * eps) / a
            distance = drift(of_input, clean)
            if distance.flatten().topk(cells).values.mean() > delta:
                m = 1 / (1 + torch.exp(-distance[:, None]))
                clean, decided = m * clean + (1 - m) * of_input, t
            elif t < t_min:
                clean, decided = of_input, t
        bar = bars[max(t - stride, 0)]  # the code's last step ends at the first timestep's noise
        z = math.sqrt(bar) * clean + math.sqrt(1 - bar) * eps
    return z, decided


@pytest.mark.parametrize("delta", [0.0, 0.3, 0.5, 1e9])
def test_glad_denoises_by_as_many_steps_as_the_code(delta, monkeypatch):
    def pixel_distance(self, a, b, *_, **__):
        return (a - b).abs().mean(1)

    monkeypatch.setattr(GLAD, "distance", pixel_distance)
    settings = {"noise_level": 500, "steps": None, "stride": 50, "min_noise_level": 200}
    settings |= {"clip": False, "fusion": "literal", "drift_fraction": 10 / SIZE**2}
    method = made(GLAD, delta=delta, **settings)
    z0, noise = pictures(3), randn(pictures(3), generators(3))
    path = method.reconstruct(z0, noise)
    assert path.timesteps == list(range(1, 500, 50))[::-1]
    for i in range(3):
        one = slice(i, i + 1)
        expected, decided = glad_sampler(
            method, z0[one], noise[one], 500, 10, 200, delta, lambda a, b: (a - b).abs().mean(1), 10
        )
        assert int(path.t_star[i]) == decided
        torch.testing.assert_close(path.x[one], expected, atol=1e-9, rtol=1e-9)


def test_clipping_changes_what_glad_reconstructs():
    settings = {"noise_level": 500, "steps": None, "stride": 50, "adaptive": False}
    a, b = (made(GLAD, clip=clip, **settings) for clip in (False, True))
    z0, noise = pictures(2), randn(pictures(2), generators(2))
    assert not torch.allclose(a.reconstruct(z0, noise).x, b.reconstruct(z0, noise).x, atol=1e-3)


# Start level and number of steps in the scripts of GLAD's code; 750 and 25 for the rest.
STARTS = {"capsule": (600, 25), "transistor": (850, 25), "bracket_white": (450, 25)}
STARTS |= dict.fromkeys(
    ("bracket_black", "bracket_brown", "connector", "metal_plate", "tubes"), (500, 25)
)
VISA = "candle capsules cashew chewinggum fryum macaroni1 macaroni2 pcb1 pcb2 pcb3 pcb4 pipe_fryum"
STARTS |= dict.fromkeys(VISA.split(), (450, 15))


@pytest.mark.parametrize("category", [*read_profiles("glad")["categories"], None])
def test_glads_timesteps_are_those_of_the_code(category):
    start, steps = STARTS.get(category, (750, 25))
    config = GLADConfig.for_profile("paper", channels=3, image_size=256, category=category)
    published = [k * (start // steps) + 1 for k in range(steps)][::-1]
    schedule = NoiseSchedule.named("linear")
    assert schedule.strided_timesteps(config.noise_level, config.stride, first=1) == published


@pytest.mark.parametrize(("category", "side"), [("bottle", 512), ("tubes", 512), ("candle", 256)])
def test_glad_blurs_and_scores_its_map_as_at_the_published_size(category, side):
    for size in (64, 256, 512):
        c = GLADConfig.for_profile("paper", channels=3, image_size=size, category=category)
        assert c.smooth_sigma / size == pytest.approx(6 / side)
        assert top_count(c.top_fraction, size**2) == math.ceil(250 * size**2 / side**2)


@pytest.mark.parametrize("category", ["transistor", "pcb1", "pcb4", "bottle", "pcb2"])
def test_a_missing_part_is_searched_in_both_directions(category):
    c = GLADConfig.for_profile("paper", channels=3, image_size=256, category=category)
    assert c.two_way == (category in ("transistor", "pcb1", "pcb4"))
    a, b = torch.randn(2, 6, 4, 4), torch.randn(2, 6, 4, 4)
    one, two = (
        perceptual_distance(lambda x: [x], a, b, None, two_way=two_way) for two_way in (False, True)
    )
    cosines = 1 - torch.einsum("bcp,bcq->bpq", *(F.normalize(x.flatten(2), dim=1) for x in (a, b)))
    torch.testing.assert_close(one.flatten(1), cosines.amin(2))
    torch.testing.assert_close((two - one).flatten(1), cosines.amin(1))


# ------------------------------------------------------------------------------- MDPS in the code


def mdps_sampler(method, y, mask, start, stride, w, draws):
    """Posterior sample of one image by the code's loop; ``draws`` are its noises in order."""
    bars, noise = alpha_bars(), draws()
    x = math.sqrt(bars[start]) * y + math.sqrt(1 - bars[start]) * noise
    grid = list(range(0, start, stride))
    for i in reversed(range(len(grid))):
        t, bar = grid[i], bars[grid[i]]
        bar_next = bars[grid[i - 1]] if i else 1.0
        x = mask * x + (1 - mask) * (math.sqrt(bar) * y + math.sqrt(1 - bar) * noise)
        x = x.detach().requires_grad_()
        eps = method.network["denoiser"](x, torch.tensor([t]))
        clean = (x - math.sqrt(1 - bar) * eps) / math.sqrt(bar)
        (gradient,) = torch.autograd.grad(torch.linalg.norm(clean - y), x)
        eps = (eps + math.sqrt(1 - bar) * w * gradient).detach()
        clean = (x.detach() - math.sqrt(1 - bar) * eps) / math.sqrt(bar)
        c = math.sqrt((1 - bar / bar_next) * (1 - bar_next) / (1 - bar))
        direction = math.sqrt(1 - bar_next - c**2) * eps
        fresh = draws() if i else 0.0
        x = math.sqrt(bar_next) * clean + direction + c * fresh
    return x.detach()


@pytest.mark.parametrize("start", [150, 200, 250])
def test_mdps_samples_as_the_code_does(start):
    method = made(MDPS, mode="code", steps=None, stride=20, input_size=32)
    y = pictures(1, 4)
    mask = torch.zeros(1, 1, SIZE, SIZE).double()
    mask[..., 3:9, 4:12] = 1
    found = method.sample(y, mask, start, 3.0, generators(1))
    (generator,) = generators(1)
    draws = lambda: torch.randn(1, SIZE, SIZE, generator=generator)[None].double()  # noqa: E731
    expected = mdps_sampler(method, y, mask, start, 20, 3.0, draws)
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)
    assert found.abs().max() > 1  # which clipping would have changed


def mdps_score(a: Tensor, side: int) -> float:
    """Sum of the 500 largest softmax values of half a map's centre, as at 256 pixels."""
    edge = (a.shape[-1] - side) // 2
    centre = (a / 2)[edge : edge + side, edge : edge + side].flatten()
    return float((centre - centre.logsumexp(0)).exp().topk(500).values.sum())


@pytest.mark.parametrize(("category", "side"), [("bottle", 224), ("tile", 224), ("02", 256)])
def test_mdps_scores_the_centre_of_half_the_map(category, side):
    config = MDPSConfig.for_profile("paper", channels=3, image_size=256, category=category)
    assert (config.stride, config.mode, config.patch_size) == (20, "code", 3)
    with torch.device("meta"):
        method = MDPS(config)
    maps = 5 * torch.rand(2, 256, 256, generator=torch.Generator().manual_seed(0))
    scores = method._score(maps, maps)
    expected = torch.tensor([mdps_score(a, side) for a in maps])
    torch.testing.assert_close(scores, expected, atol=1e-6, rtol=1e-5)
    constant = method._score(maps, torch.ones(1, 256, 256))
    assert float(constant) == pytest.approx(500 / side**2)


def test_halving_the_map_changes_which_image_ranks_higher():
    """One high peak against a broad, lower area."""
    config = MDPSConfig.for_profile("paper", channels=3, image_size=256, category="bottle")
    with torch.device("meta"):
        method = MDPS(config)
    maps = torch.zeros(2, 256, 256)
    maps[0, 100:102, 100:102] = 12.0
    maps[1, 100:120, 100:120] = 7.0
    halved = method._score(maps, maps)
    whole = method._score(maps, 2 * maps)
    assert (halved[0] < halved[1]) and (whole[0] > whole[1])


def test_features_are_averaged_over_three_by_three_cells():
    a, b = torch.randn(1, 5, 6, 6), torch.randn(1, 5, 6, 6)

    def averaged(x: Tensor) -> Tensor:
        padded, total = F.pad(x, (1, 1, 1, 1)), torch.zeros_like(x)
        for dy in range(3):
            for dx in range(3):
                total += padded[..., dy : dy + 6, dx : dx + 6] / 9
        return total

    found = perceptual_distance(lambda x: [x], a, b, 0, patch_size=3)
    torch.testing.assert_close(found, feature_distance(averaged(a), averaged(b), 0))


# --------------------------------------------------------------------------------------- training


def test_a_constant_rate_without_clipping_is_plain_adam():
    images = torch.rand(20, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    names = "learning_rate_schedule", "grad_clip", "ema_decay", "warmup_steps", "weight_decay"
    settings = dict(zip(names, ("constant", 0.0, 0.0, 0, 0.0), strict=True))
    config = TrainConfig(steps=None, epochs=3, batch_size=8, learning_rate=0.01, **settings)

    def loss(network, x, generator):
        return (network(x.flatten(1)) - 3 * x.flatten(1).mean(1, keepdim=True)).square().mean()

    networks = []
    for _ in range(2):
        torch.manual_seed(3)
        networks.append(torch.nn.Linear(16, 1))
    report = train_network(networks[0], loss, images, config, seed=5, progress=False)
    assert report.steps == 3 * (20 // 8)
    adam = torch.optim.Adam(networks[1].parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(5)
    for _ in range(report.steps):
        batch = images[torch.randint(20, (8,), generator=generator)]
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16()):
            value = loss(networks[1], batch, generator)
        adam.zero_grad()
        value.backward()
        adam.step()
    for a, b in zip(*(n.parameters() for n in networks), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def bf16() -> bool:
    from diffad_lite.training.loop import supports_bf16

    return supports_bf16(torch.device("cpu"))
