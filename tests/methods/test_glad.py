"""GLAD: targets by kappa, fading, drift, adaptive steps, fusion, feature distances, profiles."""

import json
import math
import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from diffad_lite.core.config import override
from diffad_lite.data.images import image_keys, undo_standardise
from diffad_lite.data.synthetic_anomalies import SynthesisConfig
from diffad_lite.diffusion.gaussian import noise_generators, randn
from diffad_lite.methods.anoddpm import AnoDDPMConfig
from diffad_lite.methods.glad import GLAD, GLADConfig, drift_score, soft_object_mask
from diffad_lite.spaces.features import DENOISER
from diffad_lite.training.state import TrainConfig

SIZE = 16


def config(**changes) -> GLADConfig:
    tiny = GLADConfig.for_profile("ci", channels=1, image_size=SIZE)
    small = TrainConfig(steps=3, batch_size=4)
    denoiser = replace(
        tiny.denoiser, base_channels=8, channel_mults=(1, 2), attention_levels=(), train=small
    )
    return replace(tiny, **({"denoiser": denoiser, "train": small} | changes))


def method(**changes) -> GLAD:
    """With weights at which the denoiser predicts something; an untrained one says zero."""
    made = GLAD(config(**changes))
    rng = torch.Generator().manual_seed(1)
    for parameter in made.network["denoiser"].parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=rng)
    made.network.eval()
    return made


def pictures(n: int, seed: int = 0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return (0.5 * torch.randn(n, 1, SIZE, SIZE, generator=rng)).clamp(-1, 1)


def noises(n: int, seed: int = 0) -> torch.Tensor:
    return randn(pictures(n), noise_generators([str(i) for i in range(n)], seed))


# ------------------------------------------------------------------- anomaly-oriented training


class Spy(torch.nn.Module):
    """A denoiser that answers zero and remembers what it was asked."""

    def forward(self, x_t, t):
        self.x_t, self.t = x_t, t
        return torch.zeros_like(x_t, requires_grad=True)


def target_of(made: GLAD, normal: torch.Tensor, monkeypatch, seed: int = 0):
    """What the loss asks for: (x_t, t, target)."""
    seen, spy = {}, Spy()

    def mse(prediction, target):
        seen["target"] = target
        return ((prediction - target) ** 2).mean()

    monkeypatch.setattr("diffad_lite.methods.glad.F.mse_loss", mse)
    made.anomaly_oriented_loss(spy, normal, torch.Generator().manual_seed(seed))
    return spy.x_t, spy.t, seen["target"]


ALL = SynthesisConfig(anomaly_probability=1.0, finest=2, opacity=(0.0, 0.5))


@pytest.mark.parametrize("fade", ["linear", "matched"])
@pytest.mark.parametrize("kappa", [1, 0, -1])
def test_the_target_removes_keeps_or_doubles_the_anomaly(kappa, fade, monkeypatch):
    """With a perfect prediction the clean estimate is x, the faded anomaly, or twice of it."""
    made = method(kappa=kappa, fade=fade, synthesis=ALL)
    normal, drawn = pictures(6), {}
    make = made.synthesis.__class__.__call__

    def remember(self, images, generator):
        drawn["anomalous"] = make(self, images, generator)[0]
        return drawn["anomalous"], None, None

    monkeypatch.setattr(made.synthesis.__class__, "__call__", remember)
    x_t, t, target = target_of(made, normal, monkeypatch)
    faded = made.fade(t).float()[:, None, None, None]
    mixed = faded * drawn["anomalous"] + (1 - faded) * normal
    expected = {1: normal, 0: mixed, -1: 2 * mixed - normal}[kappa]
    found = made.diffusion.predict_x0(x_t, t, target)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)  # at t = T errors grow
    assert (mixed - normal).abs().max() > 0.01


def test_without_an_anomaly_the_target_is_the_noise(monkeypatch):
    made = method(synthesis=SynthesisConfig(anomaly_probability=0.0))
    normal = pictures(6)
    x_t, t, target = target_of(made, normal, monkeypatch)
    noise = made.diffusion.predict_noise(x_t, t, normal)
    torch.testing.assert_close(target, noise, atol=1e-4, rtol=1e-4)
    made.config = replace(made.config, kappa=0)  # the usual loss
    assert torch.equal(target, target_of(made, normal, monkeypatch)[2])


def test_fading_bounds_the_shift_of_the_target():
    """t / T times sqrt(SNR) is at most .2922 (linear betas) and .3608 (scaled linear)."""
    for schedule, bound in (("linear", 0.2922), ("scaled_linear", 0.3608)):
        c = config(fade="linear")
        made = GLAD(replace(c, denoiser=replace(c.denoiser, beta_schedule=schedule)))
        t = torch.arange(1000)
        shift = made.fade(t) * made.diffusion.schedule.snr.sqrt()
        assert float(shift.max()) == pytest.approx(bound, abs=1e-4)
        assert float(made.fade(t)[0]) == 0


def test_matched_fading_is_full_at_the_noise_level_and_falls_with_t():
    made = method(fade="matched", noise_level=100)
    fade = made.fade(torch.arange(1000))
    assert float(fade[100:].min()) == 1
    assert (fade[1:101] > fade[:100]).all()


# ---------------------------------------------------------------------------- adaptive steps


def test_an_infinite_delta_gives_plain_ddim_bit_for_bit():
    plain = method(adaptive=False)
    watched = method(delta=1e9, min_noise_level=0)
    x, noise = pictures(3), noises(3)
    a, b = plain.reconstruct(x, noise), watched.reconstruct(x, noise)
    assert torch.equal(a.x, b.x)
    timesteps = plain.diffusion.schedule.timesteps(plain.config.noise_level, plain.config.steps)
    x_t = plain.diffusion.add_noise(x, timesteps[0], noise)
    with torch.no_grad():
        *_, last = plain.diffusion.ddim_sample(plain.network["denoiser"], x_t, timesteps)
    assert torch.equal(a.x, last.x)
    assert (a.t_star == -1).all()


def test_estimates_differ_by_the_states_whatever_the_network_says():
    made = method()
    d, x, noise = made.diffusion, pictures(2).double(), noises(2).double()
    state, noise_hat = d.add_noise(pictures(2, 5).double(), 50, noise), noises(2, 9).double()
    x_input = d.add_noise(x, 50, noise)
    difference = d.predict_x0(x_input, 50, noise_hat) - d.predict_x0(state, 50, noise_hat)
    expected = (x_input - state) / d.schedule.alpha_bar(50, x).sqrt()
    torch.testing.assert_close(difference, expected, atol=1e-12, rtol=0)


def test_fusing_states_is_fusing_estimates():
    made = method()
    d, noise = made.diffusion, noises(2).double()
    a, b = (d.add_noise(pictures(2, s).double(), 60, noise) for s in (1, 2))
    m, noise_hat = torch.rand(2, 1, SIZE, SIZE).double(), noises(2, 9).double()
    fused = d.predict_x0(m * a + (1 - m) * b, 60, noise_hat)
    each = [d.predict_x0(x, 60, noise_hat) for x in (a, b)]
    torch.testing.assert_close(fused, m * each[0] + (1 - m) * each[1], atol=1e-12, rtol=0)


class Perfect(torch.nn.Module):
    """A denoiser that knows the noise."""

    def __init__(self, noise):
        super().__init__()
        self.noise = noise
        self.up = torch.nn.ModuleList()

    def forward(self, x_t, t):
        return self.noise[: len(x_t)]


def pixel_distance(self, a, b, noise, features, layers=None, **_):
    return (a - b).abs().mean(1)


def test_a_perfect_denoiser_never_drifts_and_gives_the_input_back(monkeypatch):
    monkeypatch.setattr(GLAD, "distance", pixel_distance)
    made = method(delta=1e-3, min_noise_level=40, noise_level=100, steps=10)
    x, noise = 0.5 * pictures(3), noises(3)
    made.network["denoiser"] = Perfect(noise)
    found = made.reconstruct(x, noise)
    torch.testing.assert_close(found.x, x, atol=1e-3, rtol=0)
    below = [t for t in found.timesteps if t < 40]
    assert found.t_star.tolist() == [below[0]] * 3  # reset at the first noise level below


class GaussianDenoiser(torch.nn.Module):
    """Exact for pixels that are N(0, 0.1^2) each."""

    def __init__(self, diffusion):
        super().__init__()
        self.diffusion, self.variance = diffusion, 0.01

    def forward(self, x_t, t):
        abar = self.diffusion.schedule.alpha_bar(t, x_t)
        return x_t * (1 - abar).sqrt() / (abar * self.variance + 1 - abar)


def offsets(made: GLAD, values: list[float]):
    """One picture for each offset from normal, all with the same noise."""
    rng = torch.Generator().manual_seed(0)
    normal = 0.1 * torch.randn(1, 1, SIZE, SIZE, generator=rng)
    images = torch.cat([normal + v for v in values])
    noise = torch.randn(1, 1, SIZE, SIZE, generator=rng).expand_as(images)
    made.network["denoiser"] = GaussianDenoiser(made.diffusion)
    made.diffusion.clip = None
    return images, noise


def test_larger_anomalies_are_let_go_earlier(monkeypatch):
    monkeypatch.setattr(GLAD, "distance", pixel_distance)
    values = [0.0, 0.25, 0.5, 1.0, 2.0]
    made = method(delta=0.3, min_noise_level=50, noise_level=500, steps=25, fusion="off")
    found = made.reconstruct(*offsets(made, values))
    t_star = found.t_star.tolist()
    assert t_star == sorted(t_star)
    assert t_star[0] < 50 <= t_star[-1]
    assert len(set(t_star)) >= 4
    higher = method(delta=0.6, min_noise_level=50, noise_level=500, steps=25, fusion="off")
    later = higher.reconstruct(*offsets(higher, values)).t_star
    assert (later <= found.t_star).all()


def test_drift_on_the_gaussian_is_linear_in_the_offset(monkeypatch):
    monkeypatch.setattr(GLAD, "distance", pixel_distance)
    made = method(delta=1e9, min_noise_level=0, noise_level=500, steps=25)
    found = made.reconstruct(*offsets(made, [0.0, 0.5, 1.0, 2.0]))
    for drift in found.drifts[5:]:
        mean = drift.mean((1, 2))
        assert float(mean[3] / mean[2]) == pytest.approx(2, rel=0.15)


class Constant(torch.nn.Module):
    """A denoiser that always says the same."""

    def __init__(self, noise_hat):
        super().__init__()
        self.noise_hat = torch.nn.Parameter(noise_hat)

    def forward(self, x_t, t):
        return self.noise_hat


def test_images_do_not_see_each_other(monkeypatch):
    """Decisions are discrete: tested in float64, each image alone and in a batch."""
    made = method(delta=0.02, min_noise_level=10)
    made.network.double()
    x, noise = pictures(5).double(), noises(5).double()
    together = made.reconstruct(x, noise)
    for i in range(5):
        alone = made.reconstruct(x[i : i + 1], noise[i : i + 1])
        torch.testing.assert_close(alone.x[0], together.x[i], atol=1e-8, rtol=0)
        assert alone.t_star[0] == together.t_star[i]


@pytest.mark.parametrize("fusion", ["off", "literal", "calibrated"])
def test_fusion_keeps_the_state_where_it_drifted(fusion):
    """Of three images: one is accepted, one is reset, one is undecided."""
    made = method(fusion=fusion)
    made.network["statistics"].spread.fill_(0.01)
    drift = torch.zeros(3, SIZE, SIZE)
    drift[0, :4, :4], drift[2] = 0.5, torch.nan
    accepted, reset = torch.tensor([True, False, False]), torch.tensor([False, True, False])
    keep = made.fusion_weights(drift, accepted, reset, torch.tensor(0.05))
    assert keep.shape == (3, 1, SIZE, SIZE)
    assert (keep[1] == 0).all()
    assert (keep[2] == 1).all()
    inside, outside = keep[0, 0, :4, :4], keep[0, 0, 8:, 8:]
    if fusion == "off":
        assert (keep[0] == 1).all()
    elif fusion == "literal":
        torch.testing.assert_close(inside, drift[0, :4, :4].sigmoid())
        assert 0.5 < float(inside.min()) < 0.75
        assert (outside == 0.5).all()  # never less than half
    else:
        assert float(inside.min()) > 0.99
        assert float(outside.max()) < 0.01


@pytest.mark.parametrize("fusion", ["off", "calibrated"])
def test_an_accepted_image_keeps_what_drifted_and_takes_the_rest_from_the_input(
    fusion, monkeypatch
):
    """A denoiser that predicts the drawn noise, but for a corner, where the state moves away."""
    monkeypatch.setattr(GLAD, "distance", pixel_distance)
    made = method(delta=0.05, min_noise_level=5, fusion=fusion, noise_level=100)
    made.network["statistics"].spread.fill_(0.01)
    x, noise = torch.zeros(1, 1, SIZE, SIZE), noises(1)
    wrong = noise.clone()
    wrong[..., :4, :4] -= 2.0
    made.network["denoiser"] = Constant(wrong)
    found = made.reconstruct(x, noise)
    step = found.timesteps.index(int(found.t_star[0]))
    assert 5 <= found.t_star[0] < 100
    noised = made.diffusion.add_noise(x, int(found.t_star[0]), noise)
    moved = (found.states[step] - noised).abs()
    assert float(moved[..., :4, :4].min()) > 0.01
    assert float(moved[..., 8:, 8:].max()) < 1e-5


def test_a_configured_delta_is_used_and_calibrates():
    """Statistics come from images that are watched to the end, whatever delta is."""
    learnt, given = (method(delta=delta).calibrate(pictures(8, 1)) for delta in (None, 1e-4))
    for name in ("delta", "spread", "pixel_scale"):
        assert getattr(given.network["statistics"], name) == getattr(
            learnt.network["statistics"], name
        )
    x, noise = pictures(4), noises(4)
    earlier, later = (made.reconstruct(x, noise).t_star for made in (given, learnt))
    assert (earlier >= later).all()
    assert (earlier > later).any()


# -------------------------------------------------------------------------------------- maps


def test_the_map_of_an_image_with_itself_is_zero():
    made = method()
    x, noise = pictures(2), noises(2)
    assert made.distance(x, x, noise, DENOISER).abs().max() < 1e-5


def test_the_score_of_a_drift_is_the_mean_of_its_largest():
    drift = torch.arange(400.0).view(1, 20, 20)
    assert float(drift_score(drift)) == 397.5  # the four largest
    assert math.isnan(float(drift_score(torch.full((1, 20, 20), torch.nan))))


# ------------------------------------------------------------------------ fit, files, profiles


def fit(**changes) -> GLAD:
    made = GLAD(config(**changes))
    return made.fit(pictures(12), pictures(20, 1), seed=0, progress=False)


def test_training_has_two_stages_of_which_one_can_be_left_out():
    assert list(fit().reports_) == ["diffusion", "anomaly_oriented"]
    assert list(fit(anomaly_oriented=False).reports_) == ["diffusion"]


def test_delta_is_taken_from_normal_images_and_saved(tmp_path):
    made = fit()
    delta = float(made.network["statistics"].delta)
    assert 0 < delta < 10
    made.save_pretrained(tmp_path / "model", dtype=torch.float16)
    loaded = GLAD.from_pretrained(tmp_path / "model")
    assert float(loaded.network["statistics"].delta) == delta
    t_star = made.predict(pictures(20, 1)).extras["t_star"]
    drifted = (t_star >= made.config.min_noise_level).float().mean()
    assert drifted <= 0.1  # of the images that set it, one in twenty


def test_nobody_looks_where_nothing_can_have_drifted():
    made = method(delta=1e9, min_noise_level=0)
    found = made.reconstruct(pictures(2), noises(2))
    watched = [not drift.isnan().any() for drift in found.drifts]
    assert watched == [False] + [True] * (len(watched) - 1)


def test_a_delta_needs_a_level_to_be_seen_at():
    made = method(noise_level=100, steps=2, min_noise_level=80)
    with pytest.raises(ValueError, match="2 steps from noise_level=100 visit no timestep"):
        made.calibrate(pictures(20, 1))
    method(noise_level=100, steps=2, min_noise_level=80, adaptive=False).calibrate(pictures(20, 1))


def test_few_images_warn_once_for_delta_and_once_for_the_threshold():
    """Not for the statistics of each fold; 20 images suffice, of which a fold has 16."""
    made = method()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made.calibrate(pictures(20, 1))
    with pytest.warns(UserWarning) as said:
        made.calibrate(pictures(10, 1))
    assert ["10 scores, q = 0.95" in str(warning.message) for warning in said] == [True, True]


def test_delta_spread_and_pixel_scale_are_those_of_all_images():
    made, images = method(standardise=False).calibrate(pictures(20, 1)), pictures(20, 1)
    noise = randn(images, noise_generators(image_keys(images), 0))
    path = made.reconstruct(images, noise, delta=math.inf)
    watched = [i for i, t in enumerate(path.timesteps) if 30 <= t < made.config.noise_level]
    largest = torch.stack([drift_score(path.drifts[i]) for i in watched]).amax(0)
    s = made.network["statistics"]
    assert float(s.delta) == pytest.approx(float(largest.max()), rel=1e-5)  # k = ceil(21 * .95)
    low, high = path.drifts[watched[-1]].quantile(torch.tensor([0.25, 0.75]))
    assert float(s.spread) == pytest.approx(float(high - low), rel=1e-4)
    features, pixels = (part.flatten(1).amax(1) for part in made.differences(images, path.x, noise))
    assert float(s.pixel_scale) == pytest.approx(float(features.mean() / pixels.mean()), rel=1e-5)


def test_an_extreme_image_does_not_hide_itself_in_delta_or_pixel_scale():
    """Statistics that include it make its score smaller than those of the other images do."""
    images = pictures(20, 1)
    images[3] = images[3].sign()
    made = method(standardise=False, calibrate=False, pixel_weight=10.0).calibrate(images)
    assert made.calibration_scores_[3] > 1.01 * made.predict(images[3:4]).image_score.item()


def test_explain_shows_the_path():
    made = method(standardise=True).calibrate(pictures(20, 1))
    x = pictures(3)
    path, prediction = made.explain(x)["path"], made.predict(x)
    assert len(path.timesteps) == len(path.drifts) == len(path.states) == made.config.steps
    torch.testing.assert_close(undo_standardise(path.x, x), prediction.reconstruction)
    assert torch.equal(path.t_star.float(), prediction.extras["t_star"])


def test_lite_begins_with_the_lite_anoddpm():
    shape = {"channels": 1, "image_size": 64, "dataset": "elpv"}
    c = GLADConfig.for_profile("lite", **shape)
    assert c.standardise
    anoddpm = replace(AnoDDPMConfig.for_profile("lite", **shape), standardise=True)
    assert c.denoiser_training == anoddpm.denoiser_training


def test_the_paper_profile_takes_the_settings_of_its_category():
    c = GLADConfig.for_profile("paper", channels=3, image_size=256, category="capsule")
    assert (c.noise_level, c.stride, c.min_noise_level, c.pixel_weight) == (600, 24, 350, 0)
    c = GLADConfig.for_profile("paper", channels=3, image_size=256, category="pcb1")
    assert (c.noise_level, c.stride, c.min_noise_level, c.pixel_weight) == (449, 30, 200, 1)
    assert (c.clip, c.steps, c.drift_layers) == (False, None, ("layer3",))
    assert c.drift_fraction == 10 / 64**2
    assert (c.synthesis.shuffle, c.synthesis.empty_corners) == ("tiles", True)
    assert c.train.learning_rate_schedule == "constant"
    assert c.denoiser.beta_schedule == "scaled_linear"
    assert (c.standardise, c.synthesis.foreground) == (False, "all")
    assert c.delta is None  # the table's deltas are distances of DINO's features
    with torch.device("meta"):
        made = GLAD(c)
        x = torch.zeros(1, 3, 256, 256)
        assert made.network["denoiser"](x, torch.zeros(1)).shape == x.shape


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("noise_level", 1000),
        ("steps", 0),
        ("min_noise_level", 101),
        ("radius", -1),
        ("stride", 0),
        ("pixel_weight", -1.0),
    ],
)
def test_settings_out_of_range_are_refused(field, value):
    with pytest.raises(ValueError, match=f"GLADConfig.{field} must be"):
        replace(GLADConfig(), **{field: value})


def test_steps_or_stride_are_given_and_layers_of_the_drift_exist():
    with pytest.raises(ValueError, match=r"GLADConfig must have steps or stride, got .*10.*20"):
        replace(GLADConfig(), stride=20)
    with pytest.raises(ValueError, match="GLADConfig must have steps or stride, got none"):
        replace(GLADConfig(), steps=None)
    with pytest.raises(ValueError, match=r"GLADConfig.stride must be at most 99, got 100"):
        replace(GLADConfig(), steps=None, stride=100)
    paper = GLADConfig.for_profile("paper", channels=3, image_size=64)
    assert (paper.steps, paper.stride) == (None, 30)
    fewer = override(paper, {"steps": "5"})  # takes the place of the other
    assert (fewer.steps, fewer.stride) == (5, None)
    with pytest.raises(ValueError, match="unknown layer in drift_layers 'layer3'"):
        replace(GLADConfig(), drift_layers=("layer3",))


def test_a_map_counts_on_the_object_alone():
    """A bright disc on a dark ground; the map of noise is zero far outside of it."""
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    disc = ((y - 32).hypot(x - 32) < 12).float()
    images = (1.6 * disc - 0.8)[None, None]
    everywhere, on_object = (
        method(map_foreground=where, smooth_sigma=1.0) for where in ("all", "object")
    )
    maps = torch.rand(1, 64, 64)
    a, b = (made._postprocess(images, maps)[0] for made in (everywhere, on_object))
    assert float(b[:8].abs().max()) == 0 and float(a[:8].min()) > 0
    inside = (y - 32).hypot(x - 32) < 12
    torch.testing.assert_close(a[inside], b[inside])
    rim = soft_object_mask(images, 1.0)[0, 32]  # a row: the disc has grown by four pixels
    expected = torch.zeros(64)
    expected[32 - 11 - 4 : 32 + 11 + 4 + 1] = 1
    weights = torch.exp(-(torch.arange(-3, 4.0) ** 2) / 2)
    smooth = F.conv1d(expected[None, None], (weights / weights.sum())[None, None], padding=3)
    torch.testing.assert_close(rim, smooth[0, 0])
    assert torch.equal(soft_object_mask(images, 0.0)[0], disc)


@pytest.mark.parametrize("text", ["inf", "Infinity"])
def test_an_infinite_delta_is_saved_loaded_and_set_by_name(text, tmp_path):
    made = method().calibrate(pictures(8)).with_settings(delta=math.inf)
    made.save_pretrained(tmp_path / "m")
    stored = json.loads((tmp_path / "m" / "config.json").read_text(), parse_constant=pytest.fail)
    assert stored["config"]["delta"] == "Infinity"  # JSON has no number for it
    loaded = GLAD.from_pretrained(tmp_path / "m")
    assert loaded.config == made.config == override(config(), {"delta": text})
    assert torch.equal(
        loaded.predict(pictures(3)).image_score, made.predict(pictures(3)).image_score
    )


@pytest.mark.parametrize("value", ["NaN", "-Infinity", "-1", "x"])
def test_a_delta_that_cannot_be_is_refused(value):
    with pytest.raises(
        ValueError, match=r"GLADConfig\.delta must be (at least 0|a valid number), "
    ):
        override(config(), {"delta": value})
