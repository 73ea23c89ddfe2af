"""MDPS: limits of the mask, guidance against finite differences, the Gaussian posterior, maps."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from diffad_lite.data.images import image_keys, undo_standardise
from diffad_lite.diffusion.gaussian import noise_generators, randn
from diffad_lite.methods.anoddpm import AnoDDPM, AnoDDPMConfig
from diffad_lite.methods.base import blur
from diffad_lite.methods.mdps import MDPS, MDPSConfig
from diffad_lite.spaces.features import LITE0
from diffad_lite.training.state import TrainConfig

SIZE = 16


def config(**changes) -> MDPSConfig:
    tiny = MDPSConfig.for_profile("ci", channels=1, image_size=SIZE)
    small = TrainConfig(steps=3, batch_size=4)
    denoiser = replace(
        tiny.denoiser, base_channels=8, channel_mults=(1, 2), attention_levels=(), train=small
    )
    return replace(tiny, **({"denoiser": denoiser, "input_size": 32} | changes))


def method(**changes) -> MDPS:
    """With weights at which the denoiser predicts something; an untrained one says zero."""
    made = MDPS(config(**changes))
    rng = torch.Generator().manual_seed(1)
    for parameter in made.network["denoiser"].parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=rng)
    made.network.eval()
    return made


def pictures(n: int, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return (0.5 * torch.randn(n, 1, SIZE, SIZE, generator=rng)).clamp(-0.9, 0.9)


def generators(n: int, seed: int = 0) -> list[torch.Generator]:
    return noise_generators([str(i) for i in range(n)], seed)


def ones(x: Tensor) -> Tensor:
    return torch.ones_like(x[:, :1])


# ------------------------------------------------------------------------- limits of the mask


@pytest.mark.parametrize("guidance", [0.0, 5.0])
def test_without_suspect_pixels_every_sample_is_the_picture(guidance):
    made, y = method(), pictures(3)
    for seed in range(3):
        found = made.sample(y, 0 * ones(y), 100, guidance, generators(3, seed))
        torch.testing.assert_close(found, y, atol=1e-5, rtol=0)
    assert made.difference(y, found).abs().max() < 1e-3


def test_without_suspect_pixels_the_code_returns_its_last_estimate():
    """Its state is replaced, its estimate is not: the sample is close to the picture only."""
    made, y = method(mode="code"), pictures(3)
    d, last = made.diffusion, made.diffusion.schedule.timesteps(100, made.config.steps)[-1]
    x_t = d.add_noise(y, last, randn(y, generators(3)))
    with torch.no_grad():
        noise_hat = made.network["denoiser"](x_t, torch.full((3,), last))
    expected = d.clean_estimate(x_t, last, noise_hat)
    found = made.sample(y, 0 * ones(y), 100, 0.0, generators(3))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("mode", ["paper", "code"])
def test_all_suspect_and_unguided_is_plain_sampling(mode):
    made, y = method(mode=mode), pictures(3)
    d, own = made.diffusion, generators(3)
    timesteps = d.schedule.timesteps(100, made.config.steps)
    x_t = d.add_noise(y, timesteps[0], randn(y, own))
    with torch.no_grad():
        *_, last = d.ddpm_sample(made.network["denoiser"], x_t, timesteps, own)
    assert torch.equal(made.sample(y, ones(y), 100, 0.0, generators(3)), last.x)


def test_the_paper_keeps_known_pixels_and_samples_the_others():
    made, y = method(), pictures(2)
    mask = ones(y)
    mask[..., : SIZE // 2] = 0
    found = made.sample(y, mask, 200, 0.0, generators(2))
    known = found[..., : SIZE // 2] - y[..., : SIZE // 2]
    assert known.abs().max() < 1e-5
    assert (found - y)[..., SIZE // 2 :].abs().mean() > 0.05


# ---------------------------------------------------------------------------------- guidance


class Counting(nn.Module):
    """Counts calls that record a gradient."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.calls, self.recorded = network, 0, 0

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        self.recorded += torch.is_grad_enabled()
        return self.network(x_t, t)


@pytest.mark.parametrize(("guidance", "recorded"), [(0.0, 0), (3.0, 3)])
def test_one_network_call_a_step_and_no_gradient_without_guidance(guidance, recorded):
    made, y = method(), pictures(2)
    spy = made.network["denoiser"] = Counting(made.network["denoiser"])
    made.sample(y, ones(y), 100, guidance, generators(2))
    assert (spy.calls, spy.recorded) == (3, recorded)


@pytest.mark.parametrize("mode", ["paper", "code"])
def test_guidance_is_the_gradient_of_the_norm(mode):
    """Against central differences, in float64."""
    made, t = method(mode=mode), 60
    made.network.double()
    y, x_t = pictures(2).double(), pictures(2, 7).double()
    d, denoiser = made.diffusion, made.network["denoiser"]
    plain = made.guided_noise(x_t, t, y, 0.0)
    sigma = (1 - d.schedule.alpha_bar(t, x_t)).sqrt()
    gradient = (made.guided_noise(x_t, t, y, 2.0) - plain) / (2.0 * sigma)

    def norm(x: Tensor) -> float:
        with torch.no_grad():
            x0_hat = d.predict_x0(x, t, denoiser(x, torch.full((2,), t)))
        squares = (y - x0_hat).square().flatten(1).sum(1)
        return float(squares.sqrt().sum())

    rng, step = torch.Generator().manual_seed(0), 1e-5
    for _ in range(5):
        direction = torch.randn(x_t.shape, generator=rng, dtype=torch.float64)
        slope = (norm(x_t + step * direction) - norm(x_t - step * direction)) / (2 * step)
        assert float((gradient * direction).sum()) == pytest.approx(slope, rel=1e-5)


class GaussianDenoiser(nn.Module):
    """Exact for pixels that are N(0, variance) each."""

    def __init__(self, diffusion, variance: float) -> None:
        super().__init__()
        self.diffusion, self.variance = diffusion, variance

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        abar = self.diffusion.schedule.alpha_bar(t, x_t)
        return x_t * (1 - abar).sqrt() / (abar * self.variance + 1 - abar)


def gaussian(variance: float, **changes) -> MDPS:
    made = method(**changes)
    made.network["denoiser"] = GaussianDenoiser(made.diffusion, variance)
    made.diffusion.clip = None
    return made


def test_no_guidance_where_nothing_is_to_be_corrected():
    made, y = gaussian(0.25), torch.zeros(2, 1, SIZE, SIZE)
    x_t = y.clone()  # whose clean estimate is y
    assert torch.equal(made.guided_noise(x_t, 50, y, 5.0), made.guided_noise(x_t, 50, y, 0.0))


@pytest.mark.parametrize(
    ("exact", "mean", "deviation"), [(True, 0.5, 0.3536), (False, 0.633, 0.324)]
)
def test_guidance_and_the_posterior_of_a_gaussian(exact, mean, deviation, monkeypatch):
    """x_0 ~ N(0, .25), y = 1 seen with variance .25: the posterior is N(.5, .3536^2).

    Guidance by the exact likelihood samples it; the usual one, which takes the clean estimate for
    certain, is drawn towards y.
    """
    made, variance, noise = gaussian(0.25), 0.25, 0.25
    d = made.diffusion

    def guided(self, x_t, t, y, w):
        abar = d.schedule.alpha_bar(t, x_t)
        total = abar * variance + 1 - abar
        gain = abar.sqrt() * variance / total
        spread = variance * (1 - abar) / total if exact else 0.0
        likelihood = gain * (y - gain * x_t) / (noise + spread)
        noise_hat = self.network["denoiser"](x_t, torch.full((len(x_t),), t))
        return noise_hat - (1 - abar).sqrt() * likelihood

    monkeypatch.setattr(MDPS, "guided_noise", guided)
    made.config = replace(made.config, steps=1000, noise_level=999, mask_noise_level=999)
    y = torch.ones(40_000, 1, 1, 1)
    found = made.sample(y, ones(y), 999, 1.0, torch.Generator().manual_seed(0))
    assert float(found.mean()) == pytest.approx(mean, rel=0.02)
    assert float(found.std()) == pytest.approx(deviation, rel=0.02)


def test_starting_from_the_noised_picture_is_an_observation_too():
    """Unguided: E[sample] = abar s^2 / (abar s^2 + 1 - abar) y."""
    made = gaussian(0.25)
    made.config = replace(made.config, steps=241, noise_level=240, mask_noise_level=240)
    y = torch.ones(40_000, 1, 1, 1)
    found = made.sample(y, ones(y), 240, 0.0, torch.Generator().manual_seed(0))
    abar = float(made.diffusion.schedule.alphas_cumprod[240])
    expected = abar * 0.25 / (abar * 0.25 + 1 - abar)
    assert float(found.mean()) == pytest.approx(expected, abs=0.01)


# --------------------------------------------------------------------------------- neighbours


@pytest.mark.parametrize("mode", ["paper", "code"])
def test_guided_samples_do_not_depend_on_the_other_images_of_a_batch(mode):
    made = method(mode=mode)
    made.network.double()
    y = pictures(3).double()
    mask = ones(y)
    mask[..., : SIZE // 2] = 0
    unlike = torch.cat([y[:2], 0.9 * torch.ones_like(y[:1])])
    a, b = (made.sample(x, mask, 100, 5.0, generators(3)) for x in (y, unlike))
    assert float((a - b)[:2].abs().max()) < 1e-10


@pytest.mark.parametrize("mode", ["paper", "code"])
def test_a_score_is_that_of_the_image_alone_in_either_mode(mode):
    """With this much guidance, a norm of the whole batch would change the scores."""
    made = method(mode=mode, guidance=30.0, mask_guidance=30.0)
    made.calibrate(pictures(8, 5))
    y = torch.cat([pictures(2), 0.9 * torch.ones(1, 1, SIZE, SIZE)])
    together = made.predict(y).image_score
    alone = torch.cat([made.predict(y[i : i + 1]).image_score for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------- maps, scores


def test_the_map_is_the_mean_of_the_samples_maps_and_spread_their_deviation():
    made, y = method(n_samples=3), pictures(2)
    with torch.no_grad():
        maps, reconstruction, extras = made._infer(y, generators(2))
        own = generators(2)
        mask = made.find_mask(y, own)
        samples, each = made.posterior(y, mask, own)
    assert samples.shape == (3, 2, 1, SIZE, SIZE)
    torch.testing.assert_close(maps, each.mean(0))
    torch.testing.assert_close(reconstruction, samples.mean(0))
    torch.testing.assert_close(extras["std"], samples.std(0, correction=0).mean(1))


def test_the_map_is_zero_for_equal_images_symmetric_and_can_be_of_features_alone():
    made, a, b = method(), pictures(2), pictures(2, 3)
    assert made.difference(a, a).abs().max() < 1e-4
    torch.testing.assert_close(made.difference(a, b), made.difference(b, a), atol=1e-5, rtol=0)
    made.config = replace(made.config, pixel_weight=0.0)
    torch.testing.assert_close(made.difference(a, b), made.distances(a, b)[0])


def test_a_higher_quantile_leaves_a_smaller_mask():
    areas = []
    for quantile in (0.5, 0.9, 0.99, 1.0):
        made = method(mask_quantile=quantile)
        made.calibrate(pictures(8, 5))
        with torch.no_grad():
            areas.append(float(made.find_mask(pictures(8, 5), generators(8)).mean()))
    assert areas == sorted(areas, reverse=True)
    assert areas[0] > 0.3
    assert areas[-1] < 0.05


def test_pixel_scale_and_mask_threshold_are_those_of_all_images():
    made, images = method(standardise=False).calibrate(pictures(20, 1)), pictures(20, 1)
    first = made.first_sample(images, noise_generators(image_keys(images), 0))
    features, pixels = made.distances(images, first)
    scale = features.flatten(1).amax(1).mean() / pixels.flatten(1).amax(1).mean()
    s = made.network["statistics"]
    assert float(s.pixel_scale) == pytest.approx(float(scale), rel=1e-5)
    maps = blur(features + made.config.pixel_weight * scale * pixels, made.config.mask_sigma)
    threshold = maps.flatten().quantile(made.config.mask_quantile)
    assert float(s.mask_threshold) == pytest.approx(float(threshold), rel=1e-5)


def test_an_extreme_image_does_not_hide_itself_in_the_pixel_scale():
    """Statistics that include it make its score smaller than those of the other images do."""
    images = pictures(20, 1)
    images[3] = images[3].sign()
    made = method(standardise=False, calibrate=False, mask="none").calibrate(images)
    assert made.calibration_scores_[3] > 1.01 * made.predict(images[3:4]).image_score.item()


def test_without_a_first_pass_every_pixel_is_suspect():
    made, y = method(mask="none"), pictures(2)
    assert made.find_mask(y, generators(2)).min() == 1


def test_softmax_scores():
    made = method(score="softmax", top_fraction=0.1)
    rng = torch.Generator().manual_seed(0)
    maps = torch.rand(3, 10, 10, generator=rng)
    y = pictures(3)
    constant = made._score(y, torch.full((1, 10, 10), 3.0))
    assert float(constant) == pytest.approx(0.1, abs=1e-6)
    scores = made._score(y, maps)
    torch.testing.assert_close(made._score(y, maps + 5), scores)
    assert ((scores > 0.1) & (scores <= 1)).all()


# ----------------------------------------------------------------------- fit, files, profiles


def anoddpm_config(c: MDPSConfig) -> AnoDDPMConfig:
    size = {"channels": c.channels, "image_size": c.image_size}
    return AnoDDPMConfig(**size, standardise=c.standardise, denoiser=c.denoiser)


def test_a_given_prior_is_taken_and_nothing_is_trained():
    c = config()
    prior = AnoDDPM(anoddpm_config(c)).fit(pictures(8), pictures(8, 1), seed=3, progress=False)
    made = MDPS(c, prior=prior).fit(pictures(8), pictures(8, 1), seed=0, progress=False)
    assert made.reports_ == {}
    for name, value in prior.network.state_dict().items():
        assert torch.equal(made.network["denoiser"].state_dict()[name], value)


def test_a_prior_of_another_training_is_refused():
    c = config()
    cosine = replace(c.denoiser, beta_schedule="cosine")
    for changes, name in (({"denoiser": cosine}, "denoiser"), ({"standardise": False}, "stand")):
        other = AnoDDPM(replace(anoddpm_config(c), **changes))
        with pytest.raises(ValueError, match=f"training differs .* in {name}.*; train the prior"):
            MDPS(c, prior=other)
    MDPS(c, prior=AnoDDPM(replace(anoddpm_config(c), noise_level=3, steps=1)))


def test_explain_shows_mask_and_samples():
    made = method(n_samples=2).calibrate(pictures(8, 1))
    y = pictures(3)
    parts, prediction = made.explain(y), made.predict(y)
    assert parts["samples"].shape == (2, 3, 1, SIZE, SIZE)
    found = undo_standardise(parts["samples"].mean(0), y)
    torch.testing.assert_close(found, prediction.reconstruction)
    torch.testing.assert_close(parts["mask"][:, 0], prediction.extras["mask"])


def test_lite_is_the_lite_anoddpm_and_features_that_need_no_download():
    shape = {"channels": 1, "image_size": 64, "dataset": "elpv"}
    c = MDPSConfig.for_profile("lite", **shape)
    assert c.standardise
    anoddpm = replace(AnoDDPMConfig.for_profile("lite", **shape), standardise=True)
    assert c.denoiser_training == anoddpm.denoiser_training
    assert c.backbone == LITE0


def test_the_paper_profile_is_the_official_network_and_table():
    shape = {"channels": 3, "image_size": 256}
    c = MDPSConfig.for_profile("paper", category="hazelnut", **shape)
    assert (c.mask_noise_level, c.noise_level, c.guidance, c.pixel_weight) == (250, 200, 0, 7)
    assert c.mask_guidance == pytest.approx(50 / 8**0.5)
    texture = MDPSConfig.for_profile("paper", category="carpet", **shape)
    assert (texture.mask, texture.noise_level) == ("none", 250)
    assert texture.mask_guidance == texture.guidance == pytest.approx(100 / 8**0.5)  # one pass
    grey = MDPSConfig.for_profile("paper", category="carpet", channels=1, image_size=256)
    assert grey.guidance == pytest.approx(100 / 24**0.5)  # the code expands it to three channels
    with pytest.raises(ValueError, match=r"MDPSConfig.stride must be at most 10, got 20"):
        replace(c, mask_noise_level=10)
    with torch.device("meta"):
        made = MDPS(c)
        x = torch.zeros(1, 3, 256, 256)
        assert made.network["denoiser"](x, torch.zeros(1)).shape == x.shape
    assert (c.mode, c.stride, c.steps, c.score_crop) == ("code", 20, None, 224 / 256)
    assert c.denoiser.train.total_steps(209) == 2000 * 26
    assert MDPSConfig.for_profile("paper", category="01", **shape).score_crop == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("noise_level", 1000),
        ("steps", 52),
        ("guidance", -1.0),
        ("n_samples", 0),
        ("mask_sigma", -1.0),
    ],
)
def test_settings_out_of_range_are_refused(field, value):
    with pytest.raises(ValueError, match=f"MDPSConfig.{field} must be"):
        replace(MDPSConfig(), **{field: value})
