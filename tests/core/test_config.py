"""Configurations: JSON round trip, overrides, messages, fingerprints, atomic files."""

import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import save_file

from diffad_lite.core.config import (
    changed_fields,
    config_hash,
    from_dict,
    override,
    to_dict,
    unknown_name,
)
from diffad_lite.core.files import data_dir, read_json, staged, write_atomically, write_json
from diffad_lite.methods.anoddpm import AnoDDPMConfig
from diffad_lite.methods.base import METHODS
from diffad_lite.methods.baselines import BrightnessConfig
from diffad_lite.methods.denoiser import DenoiserConfig
from diffad_lite.training.state import TrainConfig

CONFIG = AnoDDPMConfig(
    channels=3,
    smooth_sigma=2.5,
    denoiser=DenoiserConfig(
        channel_mults=(1, 2),
        attention_levels=(),
        beta_schedule="cosine",
        train=TrainConfig(steps=7, flip_axes=(-1, -2)),
    ),
)

# ------------------------------------------------------------------------ dictionaries


def test_round_trip_through_json_text_keeps_nested_values_and_types():
    values = json.loads(json.dumps(to_dict(CONFIG)))
    back = from_dict(AnoDDPMConfig, values)
    assert back == CONFIG
    assert isinstance(back.denoiser, DenoiserConfig)
    assert isinstance(back.denoiser.train, TrainConfig)
    assert isinstance(back.denoiser.channel_mults, tuple)
    assert isinstance(back.denoiser.attention_levels, tuple)
    assert isinstance(back.denoiser.train.flip_axes, tuple)


def test_dictionary_holds_json_types_only():
    values = to_dict(CONFIG)
    assert values["denoiser"]["channel_mults"] == [1, 2]
    assert values["denoiser"]["train"]["flip_axes"] == [-1, -2]
    assert values["denoiser"]["train"]["steps"] == 7
    assert list(values)[:2] == ["channels", "image_size"]  # in the order of the fields


@pytest.mark.parametrize("profile", ["ci", "lite", "paper"])
@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_profile_of_every_method_survives_the_round_trip(name, profile):
    config = METHODS[name].Config.for_profile(
        profile, channels=1, image_size=64, dataset="elpv", category="mono"
    )
    assert from_dict(type(config), to_dict(config)) == config


def test_missing_keys_take_the_defaults_and_integers_fit_floats():
    config = from_dict(AnoDDPMConfig, {"smooth_sigma": 2, "denoiser": {"unshuffle": 3}})
    assert config == AnoDDPMConfig(smooth_sigma=2.0, denoiser=DenoiserConfig(unshuffle=3))
    assert isinstance(config.smooth_sigma, float)


def test_unknown_key_is_refused_with_the_nearest_one():
    message = "unknown AnoDDPMConfig field 'noise_levle'; did you mean 'noise_level'"
    with pytest.raises(ValueError, match=message):
        from_dict(AnoDDPMConfig, {"noise_levle": 3})
    with pytest.raises(ValueError, match="unknown TrainConfig field 'step'; did you mean 'steps'"):
        from_dict(AnoDDPMConfig, {"denoiser": {"train": {"step": 3}}})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": "many"}, r"AnoDDPMConfig\.steps must be a valid integer, got 'many'"),
        ({"steps": 2.0}, r"AnoDDPMConfig\.steps must be a valid integer, got 2\.0"),
        ({"steps": True}, r"AnoDDPMConfig\.steps must be a valid integer, got True"),
        ({"steps": None}, r"AnoDDPMConfig\.steps must be a valid integer, got None"),
        ({"smooth_sigma": "1"}, r"AnoDDPMConfig\.smooth_sigma must be a valid number, got '1'"),
        ({"smooth_sigma": True}, r"AnoDDPMConfig\.smooth_sigma must be a valid number, got True"),
        ({"calibrate": 1}, r"AnoDDPMConfig\.calibrate must be a valid boolean, got 1"),
        (
            {"denoiser": {"channel_mults": [1, "2"]}},
            r"denoiser\.channel_mults\.1 must be a valid integer, got '2'",
        ),
        ({"denoiser": {"beta_schedule": "line"}}, r"beta_schedule must be 'linear', .* got 'line'"),
        (
            {"denoiser": {"train": {"steps": []}}},
            r"denoiser\.train\.steps must be a valid integer, got \[\]",
        ),
    ],
    ids=str,
)
def test_a_value_of_another_type_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        from_dict(AnoDDPMConfig, values)


@pytest.mark.parametrize("value", [3, "abc", None])
def test_a_scalar_where_a_list_belongs_is_refused(value):
    with pytest.raises(ValueError, match=r"AnoDDPMConfig\.denoiser\.channel_mults"):
        from_dict(AnoDDPMConfig, {"denoiser": {"channel_mults": value}})


def test_a_scalar_where_a_nested_configuration_belongs_is_refused():
    with pytest.raises(ValueError, match=r"AnoDDPMConfig\.denoiser must be a mapping, got 5"):
        from_dict(AnoDDPMConfig, {"denoiser": 5})


# --------------------------------------------------------------------------- overrides


def test_override_replaces_only_what_is_named():
    changed = override(
        CONFIG,
        {
            "denoiser.train.steps": "100",
            "denoiser.train.learning_rate": "1e-4",
            "denoiser.train.flip_axes": "[-2]",
            "denoiser.beta_schedule": "linear",
            "calibrate": "false",
            "top_fraction": "1",
        },
    )
    train = replace(CONFIG.denoiser.train, steps=100, learning_rate=1e-4, flip_axes=(-2,))
    denoiser = replace(CONFIG.denoiser, beta_schedule="linear", train=train)
    assert changed == replace(CONFIG, calibrate=False, top_fraction=1.0, denoiser=denoiser)
    assert CONFIG.denoiser.train.steps == 7


def test_override_takes_quoted_and_bare_words_alike():
    for text in ("darker", '"darker"'):
        assert override(BrightnessConfig(), {"side": text}).side == "darker"


def test_override_with_nothing_changes_nothing():
    assert override(CONFIG, {}) == CONFIG


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("denoiser.train.step", r"denoiser\.train\.steps"),
        ("train.steps", r"denoiser\.train\.steps"),  # its place in an older version
        ("noise_levels", "noise_level"),
        ("denoiser.trian.steps", r"denoiser\.train\.steps"),
        ("steps.x", "steps"),
        ("denoiser.train.steps.x", r"denoiser\.train\.steps"),
    ],
)
def test_override_of_an_unknown_field_names_the_nearest(name, near):
    with pytest.raises(ValueError, match=f"unknown field '{name}'; did you mean '{near}'"):
        override(CONFIG, {name: "1"})


def test_override_of_a_whole_group_is_refused():
    with pytest.raises(
        ValueError, match=r"denoiser is a group of fields; set one of them: denoiser\.beta_schedule"
    ):
        override(CONFIG, {"denoiser": "{}"})


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "denoiser.train.steps",
            "ten",
            r"denoiser\.train\.steps must be a valid integer, got 'ten'",
        ),
        ("steps", "1.5", r"AnoDDPMConfig\.steps must be a valid integer, got 1\.5"),
        ("denoiser.beta_schedule", "sigmoid", "must be 'linear', 'cosine' or 'scaled_linear'"),
    ],
)
def test_override_by_a_value_that_does_not_fit_is_refused(name, text, message):
    with pytest.raises(ValueError, match=message):
        override(CONFIG, {name: text})


def test_unknown_name_lists_what_is_known_and_guesses_only_when_near():
    near = str(unknown_name("fruit", "aple", ["pear", "apple"]))
    assert near == "unknown fruit 'aple'; did you mean 'apple'? known: apple, pear"
    assert "did you mean 'ci'?" in str(unknown_name("profile", "CI", ["ci", "lite", "paper"]))
    far = str(unknown_name("fruit", "xyz", ["pear", "apple"]))
    assert far == "unknown fruit 'xyz'; known: apple, pear"


def test_changed_fields_are_dotted():
    train = replace(CONFIG.denoiser.train, steps=8, flip_axes=())
    other = replace(CONFIG, n_noises=9, denoiser=replace(CONFIG.denoiser, train=train))
    changed = {"n_noises", "denoiser.train.steps", "denoiser.train.flip_axes"}
    assert changed_fields(CONFIG, other) == changed
    assert changed_fields(CONFIG, replace(CONFIG)) == set()
    assert changed_fields(BrightnessConfig(), AnoDDPMConfig()) >= {"side", "denoiser.train.steps"}


# ---------------------------------------------------------------------------- hashes


def test_hash_depends_on_values_and_not_on_order():
    a = {"x": 1, "y": {"p": [1, 2], "q": "s"}}
    b = {"y": {"q": "s", "p": [1, 2]}, "x": 1}
    assert config_hash(a) == config_hash(b)
    assert len(config_hash(a)) == 12
    assert int(config_hash(a), 16) >= 0
    others = [
        {"x": 2, "y": {"p": [1, 2], "q": "s"}},
        {"x": 1, "y": {"p": [2, 1], "q": "s"}},
        {"x": 1, "p": [1, 2], "q": "s"},
    ]
    assert len({config_hash(v) for v in [a, *others]}) == 4


def test_hash_stays_the_same_between_versions():
    assert config_hash({"b": 1, "a": [1.5, "ä"]}) == config_hash({"a": [1.5, "ä"], "b": 1})
    assert config_hash({}) == "44136fa355b3"  # sha256 of "{}"


# ------------------------------------------------------------------------------ files


def test_atomic_write_creates_folders_and_leaves_only_the_file(tmp_path):
    path = tmp_path / "a" / "b" / "file.txt"
    write_atomically(path, lambda p: p.write_text("new"))
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_files_and_folders_obey_the_umask(umask, mode, tmp_path):
    before = os.umask(umask)
    try:
        write_atomically(tmp_path / "a" / "file.txt", lambda p: p.write_text("new"))
        with staged(tmp_path / "a") as stage:
            write_json(stage / "b" / "file.json", [])
        write_atomically(tmp_path / "c.safetensors", lambda p: save_file({}, p))
    finally:
        os.umask(before)
    modes = {
        p.relative_to(tmp_path).as_posix(): p.stat().st_mode & 0o777 for p in tmp_path.rglob("*")
    }
    folders = dict.fromkeys(["a", "a/b"], 0o777 & ~umask)
    assert modes == folders | dict.fromkeys(["a/file.txt", "a/b/file.json", "c.safetensors"], mode)


def test_a_staged_folder_replaces_what_has_its_names_and_nothing_else(tmp_path):
    write_json(tmp_path / "maps" / "old.json", 1)
    write_json(tmp_path / "table.json", 1)
    write_json(tmp_path / "other.json", 1)
    with staged(tmp_path) as stage:
        write_json(stage / "maps" / "new.json", 2)
        write_json(stage / "table.json", 2)
    values = {
        p.relative_to(tmp_path).as_posix(): read_json(p, "file") for p in tmp_path.rglob("*.json")
    }
    assert values == {"maps/new.json": 2, "table.json": 2, "other.json": 1}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["maps", "other.json", "table.json"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_staged_folder_that_fails_changes_nothing(error, tmp_path):
    write_json(tmp_path / "maps" / "old.json", 1)
    with pytest.raises(error, match="stop"), staged(tmp_path) as stage:
        write_json(stage / "maps" / "new.json", 2)
        raise error("stop")
    assert [p.name for p in tmp_path.rglob("*")] == ["maps", "old.json"]


def test_the_error_of_a_full_disk_names_the_final_path(tmp_path):
    with pytest.raises(OSError) as caught, staged(tmp_path / "out") as stage:
        raise OSError(errno.ENOSPC, "No space left on device", str(stage / "maps" / "a.tiff"))
    assert caught.value.filename == str(tmp_path / "out" / "maps" / "a.tiff")


def test_reader_meets_the_old_file_until_the_new_one_is_complete(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def write(temporary: Path) -> None:
        temporary.write_text("half")
        assert path.read_text() == "old"
        assert temporary.parent == path.parent
        assert temporary.suffix == path.suffix
        temporary.write_text("whole")

    write_atomically(path, write)
    assert path.read_text() == "whole"


@pytest.mark.parametrize("old", ["old", None])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_failed_write_leaves_nothing_behind(tmp_path, old, error):
    path = tmp_path / "file.txt"
    if old is not None:
        path.write_text(old)

    def write(temporary: Path) -> None:
        temporary.write_text("half")
        raise error("stop")

    with pytest.raises(error, match="stop"):
        write_atomically(path, write)
    assert [p.read_text() for p in tmp_path.iterdir()] == ([old] if old else [])


def test_json_file_is_readable_by_people_and_comes_back(tmp_path):
    path, values = tmp_path / "x.json", {"b": [1, 2.5, None], "a": "Größe"}
    write_json(path, values)
    text = path.read_text(encoding="utf-8")
    assert "Größe" in text
    assert text.endswith("}\n")
    assert text.index('"b"') < text.index('"a"')
    assert read_json(path, "record") == values


def test_json_refuses_nan_and_keeps_the_old_file(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"score": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"score": float("nan")})
    assert read_json(path, "record") == {"score": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_reading_a_missing_file_says_what_it_should_be(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no table of results at .*missing\.json"):
        read_json(tmp_path / "missing.json", "table of results")


@pytest.mark.parametrize("content", [b"", b'{"a": ', b"\xff\xfe\x00"])
def test_reading_a_broken_file_names_it(tmp_path, content):
    path = tmp_path / "broken.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"broken\.json is not a readable table of results"):
        read_json(path, "table of results")


def test_data_folder_is_named_by_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFAD_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"no data folder at .*set DIFFAD_DATA"):
        data_dir()
    (tmp_path / "checkpoints").mkdir()
    assert data_dir() == tmp_path
