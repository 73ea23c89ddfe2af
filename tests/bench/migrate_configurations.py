"""Bring configurations of older checkpoints, runs and records to today's names.

``python tests/bench/migrate_configurations.py FOLDER`` rewrites, below the folder, ``config.json``
and ``index.json`` of checkpoints, ``result.json`` of runs, ``training.json`` of trainings and
``<grid>.jsonl`` of records, with the hashes in them. What has today's names already stays.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffad_lite.core.config import config_hash, from_dict, to_dict
from diffad_lite.core.files import write_atomically, write_json
from diffad_lite.experiments.run import Run, fields_of
from diffad_lite.methods.base import METHODS

Values = dict[str, Any]
NETWORK = ("beta_schedule", "num_timesteps", "base_channels", "channel_mults", "blocks_per_level")
NETWORK += ("attention_levels", "unshuffle", "residual_resampling", "train")
RENAMED = {
    "glad": {"min_level": "min_noise_level", "fade_level": "fade_noise_level"},
    "mdps": {"mask_level": "mask_noise_level"},
    "grad": {"levels": "noise_levels", "twin_level": "twin_noise_level"},
}
SYNTHESIS = {"share": "anomaly_probability", "own": "self_augmentation"}
RUN_FIELDS = {*fields_of(Run("pca")), "training"}


def migrate(method: str, config: Values) -> Values:
    """Return the configuration of a method with today's fields.

    What was added since has its default, with which a method does what it did before; except for
    MDPS with ``mode="code"`` or ``score="softmax"``, which then computed something else.
    """
    changed: Values = {}
    for name, value in config.items():
        if name == "prior":  # a whole configuration of AnoDDPM, of which the denoiser is used
            changed["denoiser"] = {k: v for k, v in value.items() if k in NETWORK}
            if method in ("padim", "bank"):
                changed["noise_level"] = value["noise_level"]
        elif name == "residual_resampling":
            continue
        elif name == "synthesis":
            changed[name] = {SYNTHESIS.get(k, k): v for k, v in value.items()}
        elif method in ("anoddpm", "anoddpm_simplex") and name in NETWORK:
            changed.setdefault("denoiser", {})[name] = value
        else:
            changed[RENAMED.get(method, {}).get(name, name)] = value
    if "residual_resampling" in config:
        changed["denoiser"]["residual_resampling"] = config["residual_resampling"]
    return to_dict(from_dict(METHODS[method].Config, changed))


def migrate_record(record: Values) -> Values:
    """Return a record of a run with its configuration and hash brought up to date.

    Raises:
        ValueError: its hash was not that of its configuration.
    """
    fields = {name: record[name] for name in RUN_FIELDS if name in record}
    if not fields.get("training"):
        fields.pop("training", None)
    old, new = record["config"], migrate(record["method"], record["config"])
    if config_hash(fields | {"config": old}) != record["config_hash"]:
        raise ValueError(f"the hash of {record.get('name', fields)} is not that of its fields")
    return record | {"config": new, "config_hash": config_hash(fields | {"config": new})}


def migrate_entry(values: Values) -> Values:
    """Return the contents of a ``config.json`` or ``training.json`` brought up to date."""
    if not isinstance(values.get("config"), dict) or "method" not in values:
        return values  # of something else
    return values | {"config": migrate(values["method"], values["config"])}


def migrate_index(index: Values) -> Values:
    """Return an index of bundled checkpoints brought up to date; names end on the method."""
    return {
        name: entry | {"config": migrate(name.rsplit("-", 1)[-1], entry["config"])}
        for name, entry in index.items()
    }


FILES: dict[str, Callable[[Values], Values]] = {
    "config.json": migrate_entry,
    "training.json": migrate_entry,
    "result.json": migrate_record,
    "index.json": migrate_index,
}


def main(folder: Path) -> None:
    """Rewrite the files below ``folder`` that change."""
    for name, change in FILES.items():
        for path in sorted(folder.rglob(name)):
            values = json.loads(path.read_text(encoding="utf-8"))
            if (changed := change(values)) != values:
                write_json(path, changed)
                print(path)
    for path in sorted(folder.rglob("*.jsonl")):
        texts = path.read_text(encoding="utf-8").splitlines()
        lines = [json.loads(text) for text in texts]
        changed_lines = [migrate_record(line) if "config_hash" in line else line for line in lines]
        if changed_lines != lines:
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in changed_lines)
            write_atomically(path, lambda p, text=text: p.write_text(text, encoding="utf-8"))
            print(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
