"""DiffusionAD: exact noise, norm guidance and its closed form, losses, gradients, profiles."""

import copy
from dataclasses import replace

import pytest
import torch

from diffad_lite.data.synthetic_anomalies import SynthesisConfig
from diffad_lite.diffusion.gaussian import noise_generators
from diffad_lite.methods.anoddpm import AnoDDPM, AnoDDPMConfig
from diffad_lite.methods.diffusionad import DiffusionAD, DiffusionADConfig, masked_noise_loss
from diffad_lite.networks.segmentation import SegmentationConfig
from diffad_lite.training.loop import TrainReport
from diffad_lite.training.state import TrainConfig

SIZE = 16


def config(**changes) -> DiffusionADConfig:
    tiny = DiffusionADConfig.for_profile("ci", channels=1, image_size=SIZE)
    small = TrainConfig(steps=3, batch_size=4)
    denoiser = replace(
        tiny.denoiser, base_channels=8, channel_mults=(1, 2), attention_levels=(), train=small
    )
    segmentation = SegmentationConfig(4, (1, 2))
    parts = {"denoiser": denoiser, "segmentation": segmentation, "train": small}
    return replace(tiny, **(parts | changes))


def method(**changes) -> DiffusionAD:
    """With weights at which the denoiser predicts something; an untrained one says zero."""
    made = DiffusionAD(config(**changes))
    rng = torch.Generator().manual_seed(1)
    for parameter in made.network.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=rng)
    made.network.eval()
    return made


def pictures(n: int, seed: int = 0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return (0.5 * torch.randn(n, 1, SIZE, SIZE, generator=rng)).clamp(-1, 1)


def setting(n: int = 3, t_small: int = 200, t_big: int = 400, dtype=torch.float64):
    """Images, levels (small, big) and noises."""
    x = pictures(n).to(dtype)
    levels = [torch.full((n,), t) for t in (t_small, t_big)]
    rng = torch.Generator().manual_seed(3)
    return x, levels, [torch.randn(x.shape, generator=rng, dtype=dtype) for _ in levels]


class Exact:
    """A denoiser that knows the noise."""

    def __init__(self, noises):
        self.noises = torch.cat(list(noises))

    def __call__(self, x_t, t):
        return self.noises


def float32_exact(x, levels, noises, w):
    return method().estimates(Exact(noises), x.float(), levels, [n.float() for n in noises], w)


# ------------------------------------------------------------------------------- reconstruction


@pytest.mark.parametrize("w", [0.0, 1.0, 2.5])
def test_exact_noise_recovers_the_image_at_both_scales_for_any_guidance(w):
    x, levels, noises = setting()
    found = float32_exact(x, levels, noises, w)
    for estimate in (*found.x0_hat, found.guided):
        torch.testing.assert_close(estimate, x.float(), atol=2e-5, rtol=0)


@pytest.mark.parametrize("w", [0.0, 0.5, 1.0, 2.9, 4.0])
@pytest.mark.parametrize("t", [25, 200, 600])
def test_norm_guidance_is_a_convex_mix(w, t):
    """(1 - m) x0_hat + m norm with m = w (1 - abar_t), before clipping."""
    made = method()
    made.diffusion.clip = None
    x, (t_small, _), (noise, noise_hat) = setting(t_small=t)
    x_t = made.diffusion.add_noise(x, t_small, noise)
    norm = x.flip(0)
    guided = made.norm_guidance(x_t, t_small, noise_hat, norm, w)
    small = made.diffusion.predict_x0(x_t, t_small, noise_hat)
    m = w * (1 - made.diffusion.schedule.alphas_cumprod[t])
    torch.testing.assert_close(guided, (1 - m) * small + m * norm, atol=1e-12, rtol=1e-12)


def test_guidance_towards_itself_changes_nothing():
    made = method()
    made.diffusion.clip = None
    x, (t, _), (noise, noise_hat) = setting()
    x_t = made.diffusion.add_noise(x, t, noise)
    small = made.diffusion.predict_x0(x_t, t, noise_hat)
    for w in (0.5, 1.0, 3.0):
        guided = made.norm_guidance(x_t, t, noise_hat, small, w)
        torch.testing.assert_close(guided, small, atol=1e-12, rtol=1e-12)


def test_the_published_levels():
    """abar of the official code's two levels, and the share that the reference gets."""
    abar = method().diffusion.schedule.alphas_cumprod
    assert float(abar[200]) == pytest.approx(0.65635, abs=1e-4)
    assert float(abar[400]) == pytest.approx(0.19357, abs=1e-4)
    assert float(1 - abar[200]) == pytest.approx(0.344, abs=1e-3)


def test_both_scales_in_one_batch_are_as_one_after_the_other():
    made = method()
    x, levels, noises = setting(dtype=torch.float32)
    found = made.estimates(made.network["denoiser"], x, levels, noises, 1.0)
    for k in range(2):
        alone = made.estimates(made.network["denoiser"], x, [levels[k]], [noises[k]], 1.0)
        torch.testing.assert_close(found.x0_hat[k], alone.guided, atol=1e-5, rtol=1e-5)


def test_one_scale_is_the_small_estimate():
    one, two = method(scales=1), method()
    x = pictures(2)
    a = one.reconstruct(x, noise_generators(["a", "b"], 0))
    b = two.reconstruct(x, noise_generators(["a", "b"], 0))
    assert len(a.x0_hat) == 1
    assert torch.equal(a.guided, a.x0_hat[0])
    torch.testing.assert_close(a.guided, b.x0_hat[0])


def test_one_step_of_the_sampler_is_the_single_evaluation():
    made = method(steps=1)
    x, levels, noises = setting(dtype=torch.float32)
    args = x, levels, noises, 1.0
    direct = made.estimates(made.network["denoiser"], *args)
    sampled = made.estimates(made.sampled_noise, *args)
    for a, b in zip(direct.x0_hat, sampled.x0_hat, strict=True):  # which are clipped
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_more_steps_cost_more_evaluations_and_differ():
    images, results = pictures(2), {}
    for steps in (1, 5):
        made = method(steps=steps)
        with made.count_evaluations() as count:
            results[steps] = made.predict(images).reconstruction
        assert count[0] == len(images) * (2 * steps + 1)  # two scales, one segmentation
    assert (results[1] - results[5]).abs().max() > 1e-3


def test_the_range_of_the_official_code():
    """In [0, 1] the same t hides twice as much as in [-1, 1]; what comes out is in [-1, 1]."""
    wide, unit = method(), method(unit_range=True)
    x = pictures(2)
    assert torch.equal(wide._in_range(x), x)
    assert unit._in_range(x).min() >= 0
    torch.testing.assert_close(unit._in_range(unit._in_range(x), back=True), x)
    spread = [float(m._in_range(x).std()) for m in (wide, unit)]
    assert spread[0] == pytest.approx(2 * spread[1])
    reconstruction = unit.explain(x)
    torch.testing.assert_close(
        reconstruction["reconstruction"], 2 * reconstruction["estimates"].guided - 1
    )


# ------------------------------------------------------------------------------------- training


def gradients(made: DiffusionAD, images, seed: int = 0):
    made.network.zero_grad()
    made.loss(made.network, images, torch.Generator().manual_seed(seed)).backward()
    parts = {}
    for name, part in made.network.items():
        parts[name] = sum(
            float(p.grad.abs().sum()) for p in part.parameters() if p.grad is not None
        )
    return parts


ALL_ANOMALOUS = SynthesisConfig(anomaly_probability=1.0, finest=2)


def test_the_mask_loss_trains_the_denoiser_unless_detached():
    """On a batch of anomalies only, the noise loss is zero, and all gradient is the mask's."""
    joint = gradients(method(synthesis=ALL_ANOMALOUS), pictures(8))
    assert joint["denoiser"] > 0
    assert joint["segmentation"] > 0
    apart = gradients(method(synthesis=ALL_ANOMALOUS, detach=True), pictures(8))
    assert apart["denoiser"] == 0
    assert apart["segmentation"] > 0


def test_the_noise_loss_is_of_normal_images_only():
    rng = torch.Generator().manual_seed(0)
    noises = [torch.randn(4, 1, 8, 8, generator=rng) for _ in range(2)]
    noise_hat = [torch.randn(4, 1, 8, 8, generator=rng, requires_grad=True) for _ in range(2)]
    anomalous = torch.tensor([False, True, False, True])
    loss = masked_noise_loss(noise_hat, noises, anomalous)
    pairs = list(zip(noise_hat, noises, strict=True))
    expected = sum((a - b)[[0, 2]].square().mean() for a, b in pairs)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert noise_hat[0].grad[[1, 3]].abs().max() == 0
    changed = [torch.where(anomalous[:, None, None, None], 9.0, a) for a in noise_hat]
    torch.testing.assert_close(masked_noise_loss(changed, noises, anomalous), expected)


def test_a_batch_of_anomalies_only_is_no_nan():
    rng = torch.Generator().manual_seed(0)
    noises = [torch.randn(3, 1, 8, 8, generator=rng)]
    noise_hat = [torch.zeros(3, 1, 8, 8, requires_grad=True)]
    loss = masked_noise_loss(noise_hat, noises, torch.ones(3, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert noise_hat[0].grad.abs().max() == 0
    made = method(synthesis=ALL_ANOMALOUS)
    value = made.loss(made.network, pictures(2), torch.Generator().manual_seed(0))
    assert torch.isfinite(value)


def test_the_untrained_denoiser_has_unit_noise_loss_at_each_scale():
    made = DiffusionAD(config(synthesis=SynthesisConfig(anomaly_probability=0.0), detach=True))
    x = pictures(64)
    levels = [torch.randint(1000, (64,)) for _ in range(2)]
    rng = torch.Generator().manual_seed(0)
    noises = [torch.randn(x.shape, generator=rng) for _ in range(2)]
    found = made.estimates(made.network["denoiser"], x, levels, noises, 1.0)
    loss = masked_noise_loss(found.noise_hat, noises, torch.zeros(64, dtype=torch.bool))
    assert loss.item() == pytest.approx(2.0, rel=0.05)


def test_levels_of_training_stay_on_their_side_of_the_boundary():
    made, seen = method(boundary=30, highest=70), []

    def spy(x_t, t):
        seen.append(t.chunk(2))
        return torch.zeros_like(x_t)

    networks = {"denoiser": spy, "segmentation": made.network["segmentation"]}
    for seed in range(20):
        made.loss(networks, pictures(16), torch.Generator().manual_seed(seed))
    small, big = (torch.cat(part) for part in zip(*seen, strict=True))
    assert (int(small.min()), int(small.max())) == (0, 29)
    assert (int(big.min()), int(big.max())) == (30, 69)


def fit(folder=None, **changes) -> DiffusionAD:
    made = DiffusionAD(config(**changes))
    return made.fit(pictures(12), pictures(20, 1), seed=0, workdir=folder, progress=False)


def test_training_has_a_stage_of_the_denoiser_alone_and_one_of_both(tmp_path):
    made = fit(tmp_path)
    assert list(made.reports_) == ["diffusion", "joint"]
    assert [r["steps"] for r in made.reports_.values()] == [3, 3]
    assert list(fit(pretrain=False).reports_) == ["joint"]


def test_the_first_stage_is_anoddpms_training_itself(tmp_path):
    """The same weights to the bit, so that one training can serve both."""
    c = config()
    anoddpm = AnoDDPMConfig(image_size=c.image_size, denoiser=c.denoiser)
    assert c.denoiser_training == anoddpm.denoiser_training
    AnoDDPM(anoddpm).fit(
        pictures(12), pictures(20, 1), seed=0, workdir=tmp_path / "a", progress=False
    )
    fit(tmp_path / "b")
    name = "diffusion.state.safetensors"
    from safetensors.torch import load_file

    a, b = (load_file(tmp_path / part / name) for part in "ab")
    for key in a:
        if key.startswith("ema."):
            assert torch.equal(a[key], b[key]), key


def test_a_training_that_broke_in_the_second_stage_goes_on_from_there(tmp_path, monkeypatch):
    whole = fit(tmp_path / "whole")

    def broken(self, *args):
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(DiffusionAD, "loss", broken)
        with pytest.raises(RuntimeError, match="power cut"):
            fit(tmp_path / "broken")
    assert (tmp_path / "broken" / "diffusion.state.safetensors").exists()
    again = fit(tmp_path / "broken")
    for name, value in whole.network.state_dict().items():
        assert torch.equal(value, again.network.state_dict()[name]), name


def test_the_control_has_no_diffusion_at_all():
    made = fit(reconstruction="input")
    assert list(made.network) == ["segmentation"]
    assert made.config.denoiser_training is None
    images = pictures(2)
    prediction = made.predict(images)
    assert torch.equal(prediction.reconstruction, images)
    assert made.explain(images)["estimates"] is None


def test_a_time_budget_is_shared_by_the_stages(monkeypatch):
    """The denoiser alone gets its share, both together get what is left."""
    given = {}

    def quick(*args, stage, budget, **options):
        given[stage] = budget
        return TrainReport(3, 5.0, torch.zeros(3))

    for module in ("denoiser", "diffusionad"):
        monkeypatch.setattr(f"diffad_lite.methods.{module}.train_network", quick)
    DiffusionAD(config()).fit(pictures(12), pictures(20, 1), seed=0, budget=100.0, progress=False)
    assert given == {"diffusion": pytest.approx(70), "joint": pytest.approx(95)}


def test_the_learning_rates_of_the_parts_differ():
    still = fit(denoiser_rate=0.0, pretrain=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        start = still._build()
    trained = still.network
    for name, parameter in start["denoiser"].named_parameters():
        assert torch.equal(parameter, trained["denoiser"].get_parameter(name)), name
    moved = [
        not torch.equal(parameter, trained["segmentation"].get_parameter(name))
        for name, parameter in start["segmentation"].named_parameters()
    ]
    assert all(moved)


# ------------------------------------------------------------------------------------ inference


def test_the_map_is_a_probability():
    prediction = method().predict(pictures(3))
    assert prediction.anomaly_map.shape == (3, SIZE, SIZE)
    assert prediction.anomaly_map.min() >= 0
    assert prediction.anomaly_map.max() <= 1


def test_a_trained_model_loads_without_its_textures(tmp_path):
    made = method(synthesis=SynthesisConfig(texture_root=str(tmp_path / "gone")))
    made.save_pretrained(tmp_path / "model")
    loaded = DiffusionAD.from_pretrained(tmp_path / "model")
    x = pictures(2)
    assert torch.equal(loaded.predict(x).image_score, made.predict(x).image_score)
    with pytest.raises(FileNotFoundError, match="no texture images"):
        copy.copy(loaded).fit(x, pictures(20, 1), seed=0, progress=False)


# ------------------------------------------------------------------------------------- profiles


def test_the_paper_profile_has_the_published_sizes():
    c = DiffusionADConfig.for_profile("paper", channels=3, image_size=256, category="bottle")
    with torch.device("meta"):
        made = DiffusionAD(c)
        x, t = torch.zeros(1, 3, 256, 256), torch.zeros(1)
        assert made.network["denoiser"](x, t).shape == x.shape
        both = torch.zeros(1, 6, 256, 256)
        assert made.network["segmentation"](both).shape == (1, 1, 256, 256)
    assert (c.noise_level, c.noise_level_big, c.boundary, c.highest) == (200, 400, 300, 1000)
    assert c.unit_range
    assert c.denoiser_training is None  # trained together from the start
    assert (c.train.learning_rate, c.train.learning_rate * c.denoiser_rate) == (5e-6, 1e-4)
    assert c.train.learning_rate_schedule == "constant"
    assert c.train.total_steps(320) == 3000 * 20
    assert (c.synthesis.foreground, c.synthesis.self_augmentation) == ("object", 0.5)
    assert round(c.top_fraction * 256**2) == 50


def test_lite_begins_with_the_lite_anoddpm():
    c = DiffusionADConfig.for_profile("lite", channels=1, image_size=64, flip_axes=(-1, -2))
    shape = {"channels": 1, "image_size": 64, "flip_axes": (-1, -2)}
    assert c.denoiser_training == AnoDDPMConfig.for_profile("lite", **shape).denoiser_training
    assert c.train.flip_axes == (-1, -2)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("noise_level", 1000),
        ("noise_level_big", -1),
        ("boundary", 0),
        ("highest", 1001),
        ("boundary", 500),
        ("scales", 3),
        ("guidance", -1.0),
        ("steps", 27),
    ],
)
def test_settings_out_of_range_are_refused(field, value):
    with pytest.raises(ValueError, match=f"DiffusionADConfig.{field} must be"):
        replace(DiffusionADConfig(), **{field: value})
