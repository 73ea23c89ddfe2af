"""Every paper configuration trains: one step of each stage, with all options, at a small size."""

from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from diffad_lite.core.config import flatten, to_dict
from diffad_lite.methods import base
from diffad_lite.methods.base import METHODS, category_settings, read_profiles
from diffad_lite.networks.unet import Attention
from diffad_lite.spaces.features import ImageNetFeatures

SIZE = 32
# What makes networks and trainings large, wherever it stands; every other setting stays published.
SMALL = {
    "base_channels": 8,
    "norm_groups": 4,
    "attention_heads": 1,
    "epochs": 1,
    "width": 8,
    "bits": 8,
    "codeword": 16,
    "steps": 1,
    "batch_size": 2,
    "n_patterns": 6,
    "input_size": 64,
    "n_clusters": 4,
    "texture_root": "textures",
}
STAGES = {
    "anoddpm": {"diffusion"},
    "anoddpm_simplex": {"diffusion"},
    "diffusionad": {"joint"},
    "glad": {"diffusion", "anomaly_oriented"},
    "mdps": {"diffusion"},
    "bernoulli": {"autoencoder", "flips"},
    "grad": {"patchdiff14", "patchdiff30", "patchdiff62", "pool", "warmup", "detector"},
}


# Numbers of weights of the public networks, at 256 pixels.
WEIGHTS = {
    ("anoddpm", 1, ""): 131_649_793,
    ("anoddpm_simplex", 1, ""): 131_649_793,
    ("diffusionad", 3, "denoiser"): 131_654_403,
    ("diffusionad", 3, "segmentation"): 28_373_569,
    ("mdps", 3, "denoiser"): 32_952_707,
    ("bernoulli", 4, "flips"): 36_034_432,
}


@pytest.mark.parametrize(("name", "channels", "part"), WEIGHTS)
def test_networks_have_exactly_the_published_weights(name, channels, part):
    config = METHODS[name].Config.for_profile("paper", channels=channels, image_size=256)
    with torch.device("meta"):
        network = METHODS[name](config).network
    network = network[part] if part else network
    assert sum(p.numel() for p in network.parameters()) == WEIGHTS[name, channels, part]
    groups = {m.num_groups for m in network.modules() if isinstance(m, torch.nn.GroupNorm)}
    assert groups <= {32}
    heads = {m.heads for m in network.modules() if isinstance(m, Attention)}
    assert heads <= {{"bernoulli": 1, "anoddpm": 2, "anoddpm_simplex": 2}.get(name, 4)}


@pytest.mark.parametrize("name", ["anoddpm", "diffusionad", "glad", "mdps", "bernoulli"])
def test_learning_rates_of_public_codes_are_constant(name):
    """AnoDDPM and GLAD clip gradients, at norm 1; the others do not."""
    values = flatten(to_dict(METHODS[name].Config.for_profile("paper", channels=3, image_size=256)))
    schedules = {k: v for k, v in values.items() if k.endswith("learning_rate_schedule")}
    for field, schedule in schedules.items():
        if (name, field) == ("diffusionad", "denoiser.train.learning_rate_schedule"):
            continue  # not used: both networks are trained together
        assert schedule == "constant", field
        stage = field.removesuffix("learning_rate_schedule")
        assert values[f"{stage}warmup_steps"] == 0, field
        assert values[f"{stage}grad_clip"] == (1.0 if name in ("anoddpm", "glad") else 0.0), field


COUNTS = {"glad": 15 + 6 + 12, "mdps": 15 + 3, "diffusionad": 6 + 10 + 9 + 12 + 6}


@pytest.mark.parametrize("path", sorted((Path(base.__file__).parent / "profiles").iterdir()))
def test_profiles_name_their_sources(path):
    text = path.read_text()
    assert text.startswith("# What the profiles change in ")
    above_paper = text.partition("\npaper:")[0].rpartition("\n\n")[2]
    assert above_paper.startswith("# ") or "\npaper:" not in text


@pytest.mark.parametrize("name", COUNTS)
def test_official_settings_are_complete_and_fit_the_configuration(name):
    table = read_profiles(name)
    assert set(table) >= {"ci", "paper", "default", "categories"}
    assert len(table["categories"]) == COUNTS[name]
    for category, settings in table["categories"].items():
        assert settings.keys() <= table["default"].keys(), category
        METHODS[name].Config.for_profile("paper", channels=3, image_size=256, category=category)
    assert category_settings(name, "nothing") == category_settings(name, None) == table["default"]


def test_categories_have_the_official_foreground():
    def foreground(category):
        return tuple(category_settings("diffusionad", category).values())

    for texture in ("carpet", "zipper", "Class10"):
        assert foreground(texture) == ("part", 0.0)
    assert foreground("bottle") == foreground("pcb4") == ("object", 0.5)
    assert foreground("mono") == foreground(None) == ("all", 0.5)
    assert category_settings("glad", "bottle")["foreground"] == "object"
    assert category_settings("glad", "cable")["foreground"] == "all"


def reduced(config):
    """The same configuration with few weights, few steps and few images."""
    changes = {}
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            changes[field.name] = reduced(value)
        elif field.name in SMALL and value:
            changes[field.name] = SMALL[field.name]
    return replace(config, **changes)


@pytest.mark.parametrize("category", ["bottle", "tile"])  # an object, and a texture
@pytest.mark.parametrize("name", STAGES)
def test_one_step_of_every_stage(name, category, tmp_path, monkeypatch):
    monkeypatch.setattr(ImageNetFeatures, "load_weights", lambda *_: None)  # a download
    monkeypatch.setenv("DIFFAD_DATA", str(tmp_path))
    (tmp_path / "checkpoints").mkdir()  # a data folder has one
    (tmp_path / "textures").mkdir()
    for i in range(3):
        Image.effect_noise((SIZE, SIZE), 50 + 20 * i).save(tmp_path / "textures" / f"{i}.png")
    published = METHODS[name].Config.for_profile(
        "paper", channels=3, image_size=SIZE, dataset="folder", category=category
    )
    method = METHODS[name](reduced(published))
    before = {k: v.clone() for k, v in method.network.state_dict().items()}
    images = torch.rand(6, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    options = {"seed": 0, "budget": None, "workdir": None, "progress": False}
    reports = method._fit(method.prepare(images), **options)
    assert set(reports) == STAGES[name]
    for stage, report in reports.items():
        assert report.losses.isfinite().all(), stage
        assert report.steps >= 1 or stage == "pool"
    after = method.network.state_dict()
    assert all(value.isfinite().all() for k, value in after.items() if "statistics" not in k)
    assert any(not torch.equal(after[k], before[k]) for k in before)
