"""Masked Bernoulli diffusion as a method: edges of the threshold, codes, chains, profiles."""

from dataclasses import replace

import pytest
import torch

from diffad_lite.data.images import image_keys
from diffad_lite.diffusion.gaussian import final_step, noise_generators
from diffad_lite.methods.bernoulli import Bernoulli, BernoulliConfig
from diffad_lite.training.state import TrainConfig

SIZE = 16


def config(**changes) -> BernoulliConfig:
    tiny = BernoulliConfig.for_profile("ci", channels=1, image_size=SIZE)
    short = TrainConfig(steps=3, batch_size=4)
    return replace(tiny, **({"train": short, "train_autoencoder": short} | changes))


def method(**changes) -> Bernoulli:
    """With weights at which flips are predicted; an untrained network is undecided."""
    made = Bernoulli(config(**changes))
    rng = torch.Generator().manual_seed(1)
    for parameter in made.network["flips"].parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=rng)
    made.network.eval()
    return made


def pictures(n: int, seed: int = 0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return (0.5 * torch.randn(n, 1, SIZE, SIZE, generator=rng)).clamp(-1, 1)


def test_at_a_threshold_of_one_the_map_is_the_autoencoders_residual():
    made = method(threshold=1.0, n_chains=1, calibrate=False, smooth_sigma=0.0)
    x = pictures(3)
    parts, prediction = made.explain(x), made.predict(x)
    residual = (made.prepare(x) - parts["decoded"]).abs().mean(1)
    torch.testing.assert_close(prediction.anomaly_map, residual)
    assert torch.equal(parts["chain"][-1].z, parts["code"])
    assert prediction.extras["changed"].max() == 0


def test_below_zero_the_code_is_forgotten():
    """Two pictures with one noised code and one noise end in the same code."""
    made = method(threshold=-1.0)
    rng = torch.Generator().manual_seed(0)
    codes = (torch.rand(2, 8, 4, 4, generator=rng) < 0.5).float()
    z_t = (torch.rand(1, 8, 4, 4, generator=rng) < 0.5).float()
    made.diffusion.add_noise = lambda z, t, generators: z_t
    ends = [final_step(made.chain(z[None], noise_generators(["a"], 0))).z for z in codes]
    assert torch.equal(*ends)
    made.config = replace(made.config, threshold=0.5)
    ends = [final_step(made.chain(z[None], noise_generators(["a"], 0))).z for z in codes]
    assert not torch.equal(*ends)


def test_the_map_is_the_mean_over_chains():
    made = method(n_chains=3)
    x = pictures(2)
    with torch.no_grad():
        maps, reconstruction, extras = made._infer(x, noise_generators(["a", "b"], 0))
        generators, each = noise_generators(["a", "b"], 0), []
        for _ in range(3):
            z = (made.encode(x) > 0).float() * 0  # only to draw as many numbers
            z = torch.stack(
                [
                    (torch.rand(z.shape[1:], generator=g) < p).float()
                    for g, p in zip(generators, made.encode(x), strict=True)
                ]
            )
            decoded = made.decode(final_step(made.chain(z, generators)).z)
            each.append((x - decoded).abs().mean(1))
    torch.testing.assert_close(maps, torch.stack(each).mean(0))
    assert reconstruction.shape == x.shape
    assert extras["changed"].shape == (2, 4, 4)


def test_training_has_two_stages_and_learns():
    long = TrainConfig(steps=150, batch_size=8, learning_rate=3e-3)
    made = Bernoulli(config(train=long, train_autoencoder=long))
    train = 0.8 * torch.sign(pictures(16)[:, :, :1, :1]).expand(-1, -1, SIZE, SIZE)
    made.fit(train, train, seed=0, progress=False)
    assert list(made.reports_) == ["autoencoder", "flips"]
    decoded = made.explain(train[:4])["decoded"]
    assert (decoded - made.prepare(train[:4])).abs().mean() < 0.15
    codes = made.encode(made.prepare(train[:4]))
    loss = made.flip_loss(made.network["flips"], codes.round(), torch.Generator().manual_seed(0))
    assert float(loss) < 0.9  # bits a bit; 1 is knowing nothing


def test_bits_that_are_not_sure_cost_their_weight():
    """At P = 1/2 all of it, at 0 or 1 nothing."""
    x = pictures(2)
    for probability, cost in ((0.5, 0.3), (1.0, 0.0), (0.9, 0.3 * 0.36)):
        y = torch.full((2, 8, 4, 4), probability)
        perfect = lambda images, generator: (images, y)  # noqa: B023, E731
        loss = method(code_weight=0.3).autoencoder_loss(perfect, x, torch.Generator())
        assert float(loss) == pytest.approx(cost)


def test_flipped_images_are_encoded_too(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "diffad_lite.methods.bernoulli.train_network",
        lambda network, loss, images, c, **options: (
            seen.append((images.shape, c.flip_axes)) or _report()
        ),
    )
    short = TrainConfig(steps=3, batch_size=4, flip_axes=(-1, -2))
    made = Bernoulli(config(train=short, train_autoencoder=short))
    made.fit(pictures(6), pictures(20, 1), seed=0, progress=False)
    assert seen == [((6, 1, SIZE, SIZE), (-1, -2)), ((24, 8, 4, 4), ())]


def _report():
    from diffad_lite.training.loop import TrainReport

    return TrainReport(1, 0.0, torch.zeros(1))


def test_explain_shows_code_chain_and_decoded_code():
    made = method().calibrate(pictures(8, 1))
    x = pictures(3)
    parts = made.explain(x)
    assert parts["code"].shape == (3, 8, 4, 4)
    assert len(parts["chain"]) == made.config.steps + 1
    again = made.explain(x[1:2], keys=image_keys(x)[1:2])
    assert torch.equal(again["code"], parts["code"][1:2])
    assert torch.equal(again["chain"][-1].z, parts["chain"][-1].z[1:2])


def test_the_paper_profile_has_the_published_predictor():
    c = BernoulliConfig.for_profile("paper", channels=4, image_size=256)
    with torch.device("meta"):
        made = Bernoulli(c)
        z = torch.zeros(1, 128, 32, 32)
        assert made.network["flips"](z, torch.zeros(1)).shape == z.shape
    count = sum(p.numel() for p in made.network["flips"].parameters())
    assert count == pytest.approx(36.03e6, rel=0.01)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("noise_level", 1000),
        ("steps", 101),
        ("threshold", 1.5),
        ("n_chains", 0),
        ("edges", -1.0),
        ("code_weight", -1.0),
    ],
)
def test_settings_out_of_range_are_refused(field, value):
    with pytest.raises(ValueError, match=f"BernoulliConfig.{field} must be"):
        replace(BernoulliConfig(), **{field: value})


def test_images_without_whole_cells_are_refused():
    with pytest.raises(ValueError, match=r"image_size must be a multiple of 4, .* got 66"):
        BernoulliConfig(image_size=66)
