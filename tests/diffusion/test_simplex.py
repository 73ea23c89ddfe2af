"""Simplex noise: moments, octaves, independence of images, determinism."""

import math

import pytest
import torch

from diffad_lite.diffusion.gaussian import noise_generators
from diffad_lite.diffusion.simplex import UNSKEW, VARIANCE, simplex_noise

SETTINGS = {"wavelength": 16, "octaves": 4, "persistence": 0.8}


def draw(n: int, size: int = 32, channels: int = 1, seed: int = 0, **changes) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    like = torch.zeros(n, channels, size, size)
    return simplex_noise(like, generator, **(SETTINGS | changes))


@pytest.mark.parametrize("octaves", [1, 2, 4])
@pytest.mark.parametrize("wavelength", [4, 10, 16])
def test_mean_zero_and_variance_one_everywhere(octaves, wavelength):
    noise = draw(2000, 16, octaves=octaves, wavelength=wavelength)
    # 2,000 independent fields: the standard errors of mean and variance are at most 0.023, 0.03
    assert noise.mean(0).abs().max() < 0.12
    assert (noise.var(0) - 1).abs().max() < 0.16
    assert abs(noise.mean()) < 0.03
    assert abs(noise.var() - 1) < 0.03


def test_variance_of_an_octave_is_its_integral():
    """Numerically, over the disc around one corner; a corner has sqrt(3) / 3 of the plane."""
    r = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000 * math.sqrt(0.5)
    radial = (0.5 - r**2) ** 8 * r**2 / 2 * 2 * math.pi * r
    area = 1 - 2 * UNSKEW
    assert pytest.approx(float(radial.mean() * math.sqrt(0.5) / area), rel=1e-6) == VARIANCE


def neighbour_correlation(noise: torch.Tensor) -> float:
    return float((noise[..., 1:] * noise[..., :-1]).mean() / noise.square().mean())


def test_it_is_smooth_and_octaves_make_it_rougher():
    values = [neighbour_correlation(draw(200, octaves=n)) for n in (1, 2, 3, 4)]
    assert values == sorted(values, reverse=True)
    assert values[0] > 0.94
    assert 0.5 < values[-1] < 0.9


def test_persistence_weighs_the_octaves():
    one = draw(3, octaves=1)
    torch.testing.assert_close(draw(3, octaves=2, persistence=1e-9), one, atol=1e-6, rtol=0)


def test_the_field_is_continuous():
    """Across the borders of triangles, too: on a fine grid neighbours are close."""
    noise = draw(20, 128, octaves=1, wavelength=64)
    assert (noise[..., 1:] - noise[..., :-1]).abs().max() < 0.25
    assert (noise[..., 1:, :] - noise[..., :-1, :]).abs().max() < 0.25


def test_rows_and_columns_are_alike():
    noise = draw(1000, 16, octaves=1)
    across = (noise[..., :, 4:] * noise[..., :, :-4]).mean()
    down = (noise[..., 4:, :] * noise[..., :-4, :]).mean()
    assert across == pytest.approx(float(down), abs=0.03)


def test_channels_and_images_are_independent():
    noise = draw(500, 16, channels=3).flatten(2)
    correlation = (noise[:, 0] * noise[:, 1]).mean(0)
    assert correlation.abs().mean() < 0.1
    assert not torch.equal(noise[0], noise[1])


def test_an_image_has_its_own_noise_whatever_its_batch():
    like = torch.zeros(3, 1, 20, 24)
    together = simplex_noise(like, noise_generators("abc", 0), **SETTINGS)
    for i, key in enumerate("abc"):
        alone = simplex_noise(like[:1], noise_generators(key, 0), **SETTINGS)
        assert torch.equal(alone[0], together[i])


def test_shape_dtype_and_seed():
    like = torch.zeros(2, 3, 5, 9, dtype=torch.float64)
    noise = simplex_noise(like, torch.Generator().manual_seed(1), **SETTINGS)
    assert noise.shape == like.shape
    assert noise.dtype == like.dtype
    again = simplex_noise(like, torch.Generator().manual_seed(1), **SETTINGS)
    assert torch.equal(noise, again)


def test_wrong_number_of_generators_is_refused():
    with pytest.raises(ValueError, match="2 generators for a batch of 3 images"):
        simplex_noise(torch.zeros(3, 1, 8, 8), noise_generators("ab", 0), **SETTINGS)
