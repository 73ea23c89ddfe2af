"""Synthetic anomalies: masks, appearances, seeds, errors."""

import colorsys
import itertools
import math
import shlex

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image, ImageEnhance, ImageOps

from diffad_lite.cli import commands
from diffad_lite.cli.main import build_parser
from diffad_lite.data import synthetic_anomalies, textures
from diffad_lite.data.synthetic_anomalies import (
    Synthesis,
    SynthesisConfig,
    object_mask,
    perlin_noise,
)
from diffad_lite.data.textures import (
    augment,
    draw_textures,
    list_textures,
    shuffle_strips,
    shuffle_tiles,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(n: int, channels: int = 1, H: int = 32, W: int = 32) -> torch.Tensor:
    return 2 * torch.rand(n, channels, H, W, generator=generator(5)) - 1


def make(images, seed: int = 0, **config):
    return Synthesis(SynthesisConfig(**config))(images, generator(seed))


# ------------------------------------------------------------------------------------ where


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("size", [(32, 32), (20, 33)])
def test_images_are_untouched_outside_of_the_mask(channels, size):
    images = pictures(24, channels, *size)
    result, masks, anomalous = make(images, ridges=0.5)
    assert result.shape == images.shape
    assert masks.shape == (24, 1, *size)
    assert set(masks.unique().tolist()) == {0.0, 1.0}
    outside = (masks == 0).expand_as(images)
    assert torch.equal(result[outside], images[outside])
    assert torch.equal(anomalous, masks.flatten(1).any(1))
    assert result.abs().max() <= 1


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_share_of_anomalous_images(share):
    _, _, anomalous = make(pictures(1000, H=16, W=16), anomaly_probability=share, ridges=1 / 3)
    error = 3 * math.sqrt(share * (1 - share) / 1000)
    assert abs(anomalous.float().mean() - share) <= error


@pytest.mark.parametrize("side", [32, 64])
def test_blobs_cover_a_small_part(side):
    """The mean is about 5.5 %, nine tenths below a tenth, few empty draws; the same at any size."""
    noise = perlin_noise(3000, side, side, 5, generator())
    coverage = (noise > 0.5).float().mean((1, 2))
    assert 0.045 < coverage.mean() < 0.065
    assert coverage.quantile(0.9) < 0.1
    assert 0.02 < (coverage == 0).float().mean() < 0.08


@pytest.mark.parametrize(("empty_corners", "coverage"), [(False, 0.0545), (True, 0.0495)])
def test_coverage_with_and_without_corners(empty_corners, coverage):
    """The official codes cover 0.049 of the image; noise without empty corners covers 0.054."""
    synthesis = Synthesis(SynthesisConfig(finest=5, empty_corners=empty_corners))
    masks = synthesis.draw_shapes(5000, 32, 32, generator())
    assert masks.mean() == pytest.approx(coverage, abs=0.002)  # four standard errors
    corners = masks[..., ::31, ::31].mean()
    assert corners < 0.001 if empty_corners else corners > 0.045


def aligned_noise(a: int, b: int, theta: torch.Tensor, side: int) -> torch.Tensor:
    """Restate the official codes' noise on a square: b by a cells, gradients of angles theta."""
    x, y = torch.arange(side) * a / side, (torch.arange(side) * b / side)[:, None]
    weight_x, weight_y = (6 * t**5 - 15 * t**4 + 10 * t**3 for t in (x % 1, y % 1))
    noise = torch.zeros(side, side)
    for i, wx in ((0, 1 - weight_x), (1, weight_x)):
        for j, wy in ((0, 1 - weight_y), (1, weight_y)):
            angle = theta[x.long() + i, y.long() + j]
            noise += wx * wy * (angle.cos() * (x % 1 - i) + angle.sin() * (y % 1 - j))
    return math.sqrt(2) * noise


@pytest.mark.parametrize("size", [(64, 64), (48, 80)])
def test_empty_corners_are_those_of_an_aligned_picture_that_is_rotated(size):
    n, side = 20, 1024
    noise = perlin_noise(n, *size, 3, generator(), empty_corners=True)
    rng = generator()
    cells = (2 ** torch.randint(4, (n, 2), generator=rng)).tolist()
    angles = (180 * torch.rand(n, generator=rng) - 90).tolist()
    theta = 2 * math.pi * torch.rand(n, 18, 18, generator=rng)
    rows, columns = (((torch.arange(s) + 0.5) / s * side).long() for s in size)
    for picture, (a, b), angle, directions in zip(noise, cells, angles, theta, strict=True):
        rotated = TF.rotate(aligned_noise(a, b, directions, side)[None], angle)[0]
        expected = rotated[rows][:, columns]
        assert (picture - expected).abs().quantile(0.99) < 0.02
        assert ((picture == 0) == (expected == 0)).float().mean() > 0.99


def test_perlin_noise_is_bounded_centred_and_smooth():
    noise = perlin_noise(500, 32, 32, 2, generator())
    assert noise.abs().max() <= 1.01
    assert abs(noise.mean()) < 0.02
    assert (noise[..., 1:] - noise[..., :-1]).abs().max() < 0.5
    assert perlin_noise(2, 7, 19, 3, generator()).shape == (2, 7, 19)


def test_ridges_are_thin_and_blobs_are_not():
    def thickness(ridges):
        synthesis = Synthesis(SynthesisConfig(ridges=ridges, finest=2))
        masks = synthesis.draw_shapes(300, 64, 64, generator())
        inner = -torch.nn.functional.max_pool2d(-masks, 5, stride=1, padding=2)  # erosion
        return inner.sum() / masks.sum()

    assert thickness(1.0) < 0.1 < 0.3 < thickness(0.0)


def test_a_mask_that_stays_empty_leaves_a_normal_image(monkeypatch):
    nowhere = lambda self, images, generator: torch.zeros(len(images), 1, 32, 32)  # noqa: E731
    monkeypatch.setattr(Synthesis, "draw_foreground", nowhere)
    images = pictures(4)
    result, masks, anomalous = make(images, anomaly_probability=1.0)
    assert torch.equal(result, images)
    assert not masks.any()
    assert not anomalous.any()


def scenes(n: int) -> torch.Tensor:
    """A bright disc on a dark ground."""
    y, x = torch.meshgrid(torch.arange(40) - 20, torch.arange(40) - 20, indexing="ij")
    disc = (y**2 + x**2 < 144).float()
    grain = 0.05 * torch.randn(n, 1, 40, 40, generator=generator())
    return (1.4 * disc - 0.7 + grain).clamp(-1, 1)


def test_the_object_is_what_differs_from_the_border():
    images = scenes(3)
    disc = (images > 0).float()
    assert (object_mask(images) == disc).float().mean() > 0.99
    assert (object_mask(-images) == disc).float().mean() > 0.99  # dark on bright, too


@pytest.mark.parametrize("where", ["object", "part"])
def test_masks_stay_within_the_foreground(where):
    maker = Synthesis(SynthesisConfig(anomaly_probability=1.0, foreground=where))
    images = scenes(60)
    masks = maker.draw_masks(images, generator())
    if where == "object":
        assert not (masks * (1 - object_mask(images))).any()
    else:  # the foreground is drawn first after the choice of images
        rng = generator()
        torch.rand(60, generator=rng)
        allowed = maker.draw_foreground(images, rng)
        assert 0.3 < allowed.mean() < 0.7
        assert not (masks * (1 - allowed)).any()
    assert masks.flatten(1).any(1).float().mean() > 0.9


# ------------------------------------------------------------------------------------- what


def test_opacity_blends_image_and_appearance(monkeypatch):
    appearance = pictures(200).flip(0)
    monkeypatch.setattr(Synthesis, "draw_appearances", lambda self, images, generator: appearance)
    images = pictures(200)
    result, masks, anomalous = make(images, opacity=(0.3, 0.6))
    opacities = []
    for i in anomalous.nonzero()[:, 0].tolist():
        inside = masks[i] > 0
        n, a, x = (part[i][inside].double() for part in (images, appearance, result))
        far = (n - a).abs() > 0.1
        if far.any():
            weight = ((x - a) / (n - a))[far]
            assert weight.std(correction=0) < 1e-4  # one opacity per image
            opacities.append(float(weight.mean()))
    assert min(opacities) >= 0.3 - 1e-4
    assert max(opacities) <= 0.6 + 1e-4
    assert max(opacities) - min(opacities) > 0.2


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_textures_and_changes_keep_shape_and_range(channels):
    images = pictures(80, channels, 24, 40)
    samples = draw_textures(images, [], generator())
    assert samples.shape == images.shape
    assert samples.abs().max() <= 1
    assert samples.flatten(1).std(1).min() > 1e-3
    for image, table in itertools.product(samples, ("lite", "published")):
        changed = augment(image, generator(), table)
        assert changed.shape == image.shape
        assert changed.abs().max() <= 1


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("table", ["lite", "published"])
def test_every_operation_changes_something_and_stays_in_range(table, channels):
    image = (TF.gaussian_blur(pictures(1, channels, 24, 40), 5)[0, :, None] + 1) / 2
    operations = textures.AUGMENTATIONS[table]
    assert len(operations) == {"lite": 8, "published": 10}[table]
    for operation in operations:
        results = [operation(image, generator(seed)).clamp(0, 1) for seed in range(20)]
        for result in results:
            assert result.shape == image.shape
            assert result.dtype == image.dtype
            assert torch.isfinite(result).all()
        unchanged = sum(torch.equal(result, image) for result in results)
        colours = operation is textures.shift_colours and channels != 3
        assert unchanged == 20 if colours else unchanged < 18


def operation(k: int, image: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Apply one published operation to an image (C, H, W) in [0, 1]."""
    return textures.AUGMENTATIONS["published"][k](image[:, None], generator(seed))[:, 0]


def test_published_gamma_differs_per_channel_from_a_half_to_two():
    powers = [operation(0, torch.full((3, 2, 2), 0.5), seed)[:, 0, 0].log2() for seed in range(300)]
    powers = -torch.stack(powers)
    assert powers.min() == pytest.approx(0.5, abs=0.02)
    assert powers.max() == pytest.approx(2.0, abs=0.02)
    assert powers.mean() == pytest.approx(1.25, abs=0.05)  # uniform, not in its logarithm
    assert powers.std(1).min() > 1e-3


def test_published_brightness_is_a_factor_and_a_term():
    image = torch.tensor([0.2, 0.8]).view(1, 1, 2)
    dark, bright = torch.stack([operation(1, image, seed) for seed in range(500)]).flatten(1).T
    factors = (bright - dark) / 0.6
    terms = dark - 0.2 * factors
    for values, low, high in ((factors, 0.8, 1.2), (terms, -30 / 255, 30 / 255)):
        assert low - 1e-5 <= values.min() < low + 0.01
        assert high - 0.01 < values.max() <= high + 1e-5
    assert abs(torch.corrcoef(torch.stack([factors, terms]))[0, 1]) < 0.15


def test_published_colours_shift_on_the_circle():
    image = torch.tensor([0.8, 0.4, 0.4]).view(3, 1, 1)  # hue 0, saturation 0.5, value 0.8
    hues, saturations = [], []
    for seed in range(400):
        hue, saturation, value = colorsys.rgb_to_hsv(*operation(3, image, seed).flatten().tolist())
        assert value == pytest.approx(0.8, abs=1 / 255)
        hues.append((hue + 0.5) % 1 - 0.5)
        saturations.append(saturation - 0.5)
    for shifts in (hues, saturations):
        assert min(shifts) == pytest.approx(-50 / 255, abs=0.015)
        assert max(shifts) == pytest.approx(50 / 255, abs=0.015)


def test_published_solarize_inverts_half_of_the_images_above_a_threshold():
    image = torch.linspace(0, 1, 256).view(1, 1, 256)
    thresholds = []
    for seed in range(400):
        inverted = operation(4, image, seed) != image
        if inverted.any():
            thresholds.append(int(inverted.flatten().int().argmax()))
    assert 160 < len(thresholds) < 240
    assert 32 <= min(thresholds) < 36
    assert 124 < max(thresholds) <= 128


def test_published_operations_equal_those_of_pillow():
    """imgaug's ``pillike`` operations are Pillow's, with factors and cut-offs of its own."""
    grid = (TF.gaussian_blur(pictures(1, 3, 48, 40), 5)[0] * 2 + 1).clamp(0, 2) / 2
    grid = (255 * grid).round() / 255
    picture = TF.to_pil_image(grid)
    u = float(torch.rand((), generator=generator(3)))
    expected = {
        2: ImageEnhance.Sharpness(picture).enhance(2 * u),
        5: ImageOps.posterize(picture, 1 + int(8 * u)),
        6: ImageOps.invert(picture),
        7: ImageOps.autocontrast(picture, cutoff=int(21 * u)),
        8: ImageOps.equalize(picture),
        9: picture.rotate(90 * u - 45, Image.Resampling.BILINEAR),
    }
    for k, answer in expected.items():
        difference = (operation(k, grid, seed=3) - TF.pil_to_tensor(answer) / 255).abs()
        assert difference.flatten().quantile(0.9) < 0.005, k  # the rotated border is blended


def test_lite_operations_stay_as_they_were():
    """The bundled weights were trained with them: the same draws, the same values."""
    image = pictures(1, 3)[0]
    values = [float(augment(image, generator(seed)).double().sum()) for seed in range(4)]
    assert values == pytest.approx([172.06, -1276.84, -797.96, 1275.86], abs=0.05)
    assert torch.equal(augment(image, generator(), "lite"), augment(image, generator()))
    assert not torch.equal(augment(image, generator(), "published"), augment(image, generator()))


def test_strips_are_permuted_and_nothing_is_lost():
    image = pictures(1)[0]
    shuffled = shuffle_strips(image, generator())
    assert not torch.equal(shuffled, image)
    assert torch.equal(shuffled.flatten().sort().values, image.flatten().sort().values)
    line = torch.zeros(1, 32, 32)
    line[0, :, 5] = 1  # a column stays a column: rows and columns are permuted, not tiles
    assert sorted(shuffle_strips(line, generator()).sum(1)[0].tolist())[-2:] == [0, 32]


@pytest.mark.parametrize("size", [(32, 32), (64, 24), (35, 47), (7, 20)])
def test_tiles_are_permuted_and_pixels_beyond_the_grid_stay(size):
    image = torch.arange(3.0 * size[0] * size[1]).view(3, *size)
    shuffled = shuffle_tiles(image, generator())
    h, w = (s // 8 for s in size)

    def tiles(picture):
        cells = [picture[:, h * i : h * (i + 1), w * j : w * (j + 1)] for i, j in grid]
        return [tuple(cell.flatten().tolist()) for cell in cells]

    grid = [(i, j) for i in range(8) for j in range(8)]
    assert sorted(tiles(shuffled)) == sorted(tiles(image))
    moved = sum(a != b for a, b in zip(tiles(shuffled), tiles(image), strict=True))
    assert moved >= 55 or h == 0  # one tile stays on average; none fits into 7 rows
    assert torch.equal(shuffled[:, 8 * h :], image[:, 8 * h :])
    assert torch.equal(shuffled[:, :, 8 * w :], image[:, :, 8 * w :])


def test_self_augmentation_is_shuffled_as_the_setting_says(monkeypatch):
    monkeypatch.setattr(synthetic_anomalies, "augment", lambda image, *_: image)
    ramp = torch.arange(32.0).expand(20, 1, 32, 32) / 32  # every row is the same
    for shuffle, same_rows in (("strips", True), ("tiles", False)):
        config = SynthesisConfig(self_augmentation=1.0, shuffle=shuffle)
        appearances = Synthesis(config).draw_appearances(ramp, generator())
        assert not torch.equal(appearances, ramp)
        assert torch.equal(appearances, appearances[:, :, :1].expand_as(ramp)) == same_rows


def test_other_images_never_lend_to_themselves():
    images = torch.arange(6.0)[:, None, None, None].expand(6, 1, 8, 8)
    for seed in range(20):
        borrowed = textures.draw_from_batch(images, generator(seed))
        assert not (borrowed == images).any()
    alone = textures.draw_from_batch(images[:1], generator())
    assert torch.equal(alone, images[:1])


def test_textures_come_from_a_folder(tmp_path):
    for name, colour in (("a", 40), ("b", 200)):
        (tmp_path / name).mkdir()
        grid = np.full((30, 50, 3), colour, np.uint8)
        Image.fromarray(grid).save(tmp_path / name / "x.png")
    files = list_textures(tmp_path)
    assert [f.parent.name for f in files] == ["a", "b"]
    for channels in (1, 3, 4):
        result = draw_textures(pictures(20, channels), files, generator())
        values = {round(float(v)) for v in ((result + 1) * 127.5).unique()}
        assert values == {40, 200}


@pytest.fixture
def data_folder(tmp_path, monkeypatch):
    """A data folder, and a working directory beside it."""
    (tmp_path / "data" / "checkpoints").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("DIFFAD_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.mark.parametrize("place", ["dtd", "dtd/dtd"])  # unpacked in data/, or in data/dtd/
def test_textures_are_found_below_the_data_folder_whatever_the_level(data_folder, place):
    for file in ("images/banded/banded_0002.jpg", "images/woven/woven_0001.jpg"):
        path = data_folder / place / file
        path.parent.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(path)
    for file in ("labels/train1.txt", "imdb/imdb.mat"):
        path = data_folder / place / file
        path.parent.mkdir()
        path.write_text("no image")
    relative = list_textures("dtd")
    assert [f.name for f in relative] == ["banded_0002.jpg", "woven_0001.jpg"]
    assert list_textures(str(data_folder / "dtd")) == relative
    assert Synthesis(SynthesisConfig(texture_root="dtd")).files == relative


@pytest.mark.parametrize("kind", ["missing", "empty", "file"])
def test_a_folder_without_textures_is_named_with_the_download(data_folder, kind):
    root = data_folder / "dtd"
    if kind == "empty":
        root.mkdir()
    if kind == "file":
        root.write_text("x")
    message = rf"no texture images in {root}; .*625 MB, for research purposes: https://.*\.tar\.gz"
    for name in ("dtd", str(root)):
        with pytest.raises(FileNotFoundError, match=message):
            make(pictures(2), texture_root=name)


@pytest.mark.parametrize("method", ["diffusionad", "glad"])
def test_the_hint_of_the_message_works_as_printed(data_folder, method):
    run = ["train", "--method", method, "--profile", "paper", "--out", "runs"]
    info = {"channels": 3, "category": None, "flip_axes": []}
    paper = commands._run_from(build_parser().parse_args(run)).configure_for(info)
    with pytest.raises(FileNotFoundError) as raised:
        list_textures(paper.synthesis.texture_root)
    hint = str(raised.value).rpartition(": ")[2]
    arguments = build_parser().parse_args(run + shlex.split(hint))
    config = commands._run_from(arguments).configure_for(info)
    assert config.synthesis.texture_root == ""
    assert Synthesis(config.synthesis).files == []


# ---------------------------------------------------------------------------- seeds, planting


def test_the_same_seed_gives_the_same_anomalies():
    images = pictures(8)
    first, again, reseeded = (make(images, seed, ridges=0.5) for seed in (1, 1, 2))
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first[0], reseeded[0])


def test_global_randomness_is_not_touched():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    make(pictures(8), ridges=0.5)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("anomaly_probability", 1.5),
        ("ridges", -0.1),
        ("finest", 9),
        ("self_augmentation", 2.0),
        ("opacity", (0.8, 0.2)),
    ],
)
def test_settings_out_of_range_are_refused(field, value):
    with pytest.raises(ValueError, match=rf"SynthesisConfig.{field} must be"):
        SynthesisConfig(**{field: value})
