"""Configurations of version 0.1, as its checkpoints have them, fit today's fields."""

import json
from typing import Any

import pytest
from migrate_configurations import NETWORK, RENAMED, SYNTHESIS, main, migrate

from diffad_lite.core.config import config_hash, from_dict, to_dict
from diffad_lite.methods.base import METHODS

DENOISING = ("anoddpm", "anoddpm_simplex", "diffusionad", "glad", "mdps", "padim", "bank")


def as_before(method: str) -> dict[str, Any]:
    """Return today's lite configuration under the names of version 0.1."""
    config = METHODS[method].Config.for_profile("lite", channels=1, image_size=64)
    values = to_dict(config)
    for old, new in RENAMED.get(method, {}).items():
        values[old] = values.pop(new)
    if "synthesis" in values:
        for old, new in SYNTHESIS.items():
            values["synthesis"][old] = values["synthesis"].pop(new)
    if method in DENOISING:
        denoiser = values.pop("denoiser")
        resampling = denoiser.pop("residual_resampling")
        del denoiser["attention_heads"], denoiser["norm_groups"]  # added since
        if method in ("diffusionad", "mdps"):
            values["residual_resampling"] = resampling
        if method.startswith("anoddpm"):
            return values | denoiser
        level = values.pop("noise_level") if method in ("padim", "bank") else 25
        values["prior"] = denoiser | {"noise_level": level, "steps": 1, "channels": 1}
    return values


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_configuration_of_version_0_1_is_todays(method):
    cls = METHODS[method].Config
    today = cls.for_profile("lite", channels=1, image_size=64)
    before = as_before(method)
    if method in {*DENOISING, *RENAMED}:
        with pytest.raises(ValueError, match=r"unknown .* field"):
            from_dict(cls, before)
    assert migrate(method, before) == to_dict(today)
    assert migrate(method, to_dict(today)) == to_dict(today)  # what is current stays


def test_fields_that_were_added_have_their_defaults():
    values = to_dict(METHODS["glad"].Config())
    older = values | {"denoiser": dict(values["denoiser"])}
    del older["stride"], older["denoiser"]["norm_groups"]
    assert migrate("glad", older) == values


def test_files_below_a_folder_are_rewritten_and_foreign_ones_stay(tmp_path, capsys):
    before = as_before("anoddpm")
    assert not set(before) & {"denoiser"} and set(NETWORK) & set(before)
    checkpoint, foreign = tmp_path / "run" / "config.json", tmp_path / "other" / "config.json"
    for path, values in (
        (checkpoint, {"method": "anoddpm", "config": before}),
        (foreign, {"a": 1}),
    ):
        path.parent.mkdir()
        path.write_text(json.dumps(values))
    fields = {"method": "anoddpm", "dataset": "elpv", "seed": 0}
    record = fields | {"config": before, "config_hash": config_hash(fields | {"config": before})}
    records = tmp_path / "grid.jsonl"
    records.write_text(json.dumps(record) + "\n")
    main(tmp_path)
    assert capsys.readouterr().out.splitlines() == [str(checkpoint), str(records)]
    assert json.loads(foreign.read_text()) == {"a": 1}
    changed = json.loads(records.read_text())
    assert changed["config_hash"] == config_hash(fields | {"config": changed["config"]})
    assert changed["config"] == json.loads(checkpoint.read_text())["config"]
    main(tmp_path)
    assert capsys.readouterr().out == ""


def test_a_record_with_another_hash_is_refused(tmp_path):
    record = {"method": "pca", "config": {}, "config_hash": "0"}
    (tmp_path / "grid.jsonl").write_text(json.dumps(record) + "\n")
    with pytest.raises(ValueError, match="is not that of its fields"):
        main(tmp_path)
