"""A grid of runs, one after the other, that can be interrupted and called again.

A grid is a YAML file (or the same as a dictionary)::

    profile: lite
    methods: [pca]
    seeds: [0, 1, 2]
    data:
      - {dataset: elpv, category: mono}
      - {dataset: folder, root: $MVTEC_ROOT, category: bottle, seeds: [0], plants: [null]}
    plants: [null, cells]            # scored with the same training
    variants:                        # inference settings, scored with the same training
      raw: {calibrate: false}
      default: {}
    trainings:                       # settings that are trained each for itself, as for ablations
      one-component: {n_components: 1}

An entry of ``data`` may replace ``methods``, ``seeds``, ``plants``, ``variants`` and ``trainings``
for itself, and may use environment variables in its ``root``. One training serves all plants and
variants of its (method, data, seed). A scoring is skipped if its ``result.json`` carries the hash
of the same run and configuration. A method that begins with AnoDDPM's training copies it from the
AnoDDPM of the same data and seed in the same folder; that training time counts as its own.
"""

import errno
import itertools
import json
import os
import shutil
import traceback
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from diffad_lite.core.config import (
    Profile,
    changed_fields,
    convert,
    from_dict,
    override,
    short_repr,
    unknown_name,
)
from diffad_lite.core.files import check_writable, read_json, read_yaml, write_atomically
from diffad_lite.data.datasets import check_arguments
from diffad_lite.data.readers import FLIP_AXES
from diffad_lite.experiments.evaluate import check_scorable, evaluate, train
from diffad_lite.experiments.run import Run, run_hash
from diffad_lite.methods import get_method
from diffad_lite.methods.anoddpm import AnoDDPMConfig
from diffad_lite.methods.base import MethodConfig
from diffad_lite.methods.checkpoints import check_changeable
from diffad_lite.methods.denoiser import STAGE, DenoisingConfig

Grid = Mapping[str, Any]
# Types of the values under each key.
DATA_TYPES = dict.fromkeys(("dataset", "category", "root", "resize"), str) | {"image_size": int}
SHARED_TYPES = {  # keys of a grid that an entry of its data may replace for itself
    "methods": tuple[str, ...],
    "seeds": tuple[int, ...],
    "plants": tuple[str | None, ...],
    "variants": dict[str, dict[str, Any] | None],
    "trainings": dict[str, dict[str, Any] | None],
}
GRID_TYPES = {"profile": str} | SHARED_TYPES | {"data": tuple[Any, ...], "settings": dict[str, Any]}


def read_grid(path: str | Path) -> dict[str, Any]:
    """Read and check a grid.

    Raises FileNotFoundError if there is no such file, ValueError if it is not YAML, has an unknown
    key or a value of another type, or names no methods or no data.
    """
    try:
        grid = read_yaml(Path(path))
    except FileNotFoundError:
        raise FileNotFoundError(f"no grid at {path}; see data/grid.yaml for one") from None
    if not isinstance(grid, dict):
        raise ValueError(f"{path} must be a mapping with the keys {', '.join(GRID_TYPES)}")
    _check_values(grid, GRID_TYPES, path, "key")
    for key in ("methods", "data"):
        if not grid.get(key):
            raise ValueError(f"{path} names no {key}; add them, as in data/grid.yaml")
    for entry in grid["data"]:
        if not isinstance(entry, dict) or "dataset" not in entry:
            example = f"{path}: each entry of data is like {{dataset: elpv}}"
            raise ValueError(f"{example}, got {short_repr(entry)}")
        _check_values(entry, DATA_TYPES | SHARED_TYPES, path, "key of data")
    return grid


def _check_values(values: Grid, types: Mapping[str, Any], path: str | Path, what: str) -> None:
    """Raise ValueError for an unknown key or a wrong type; no value (``seeds:``) is the default."""
    for key, value in values.items():
        if key not in types:
            raise unknown_name(f"{what} in {path}", str(key), types)
        if value is not None:
            convert(value, types[key], f"{path}: {key}")


def trainings(grid: Grid, *, expand_roots: bool = True) -> Iterator[tuple[Run, Grid]]:
    """Yield each run to train with its grid, in the order data, methods, trainings, seeds.

    Environment variables in ``root`` are replaced. ``expand_roots`` raises ValueError for one that
    is not set; where no image is read, it can be False.
    """
    profile: Profile = grid.get("profile") or "lite"
    for entry in grid["data"]:
        entry_grid = {**grid, **{key: entry[key] for key in SHARED_TYPES if entry.get(key)}}
        data = {key: entry[key] for key in DATA_TYPES if entry.get(key) is not None}
        if "root" in data:
            data["root"] = os.path.expandvars(data["root"])
            if expand_roots and "$" in data["root"]:
                raise ValueError(f"set the environment variable in the grid's root {data['root']}")
        named = entry_grid.get("trainings") or {"": {}}
        seeds = entry_grid.get("seeds") or [0]
        choices = itertools.product(entry_grid["methods"], named.items(), seeds)
        for method, (training, changes), seed in choices:
            settings = _as_json((grid.get("settings") or {}) | (changes or {}))
            options = {"seed": seed, "training": training, "settings": settings}
            yield Run(method=method, profile=profile, **options, **data), entry_grid


def scorings(grid: Grid, run: Run) -> Iterator[Run]:
    """Yield what one training is scored on: every plant with every variant."""
    variants = grid.get("variants") or {"default": {}}
    plants = grid.get("plants") or [None]
    for plant, (name, changes) in itertools.product(plants, variants.items()):
        yield replace(run, plant=plant, variant=name, settings=_as_json(changes or {}))


def _as_json(settings: Mapping[str, Any]) -> dict[str, str]:
    texts = {}
    for key, value in settings.items():
        try:
            texts[key] = json.dumps(value)
        except (TypeError, ValueError) as error:  # a date, a set, thousands of digits
            raise ValueError(f"setting {key} cannot be {short_repr(value)}: {error}") from None
    return texts


def named_scorings(grid: Grid) -> Iterator[tuple[str, Run, Run]]:
    """Yield each scoring of a grid as (its path below a folder of runs, its training, itself)."""
    for run, entry_grid in trainings(grid, expand_roots=False):
        for scoring in scorings(entry_grid, run):
            yield (folder_of(run, Path()) / scoring_name(scoring)).as_posix(), run, scoring


def scoring_name(scoring: Run) -> str:
    """Return the name of a scoring's folder in that of its training."""
    return "-".join(filter(None, (scoring.variant, scoring.plant)))


def folder_of(run: Run, out: Path) -> Path:
    """Return the folder of a training, ``out/<method>/<data>[/<training>]/s<seed>``.

    Without a category, the name of the root tells one folder of images from another.
    """
    size = None if run.image_size == 64 else f"{run.image_size}px"
    resize = None if run.resize == "squash" else run.resize
    category = run.category or (run.root and Path(run.root).resolve().name)
    data = "-".join(filter(None, (run.dataset, category, size, resize)))
    return out / run.method / data / run.training / f"s{run.seed}"


def check_distinct(grid: Grid) -> None:
    """Raise ValueError if two different runs of a grid would share a folder.

    Such are two roots with a category of the same name, or two variants of the same name.
    """
    runs: dict[str, Run] = {}
    for name, run, scoring in named_scorings(grid):
        for path, item in ((folder_of(run, Path()).as_posix(), run), (name, scoring)):
            known = runs.setdefault(path, item)
            if known == item:
                continue
            fields = [f for f, value in vars(item).items() if value != getattr(known, f)]
            a, b = ({f: getattr(r, f) for f in fields} for r in (known, item))
            raise ValueError(
                f"two runs of the grid would share the folder {path}: {short_repr(a)} and "
                f"{short_repr(b)}; give them different names, or make two grids with two --out"
            )


def sweep(grid: Grid, out: str | Path, *, progress: bool = True) -> list[str]:
    """Run a grid: skip finished scorings, resume an interrupted training.

    Returns one line for each failure; its traceback is in ``error.txt`` of the run's folder. Raises
    ValueError for impossible fields of a run, such as a negative seed, or for two runs of one name,
    and OSError if ``out`` cannot be written or the disk is full.
    """
    out, failures = Path(out), []
    check_writable(out)
    check_distinct(grid)
    runs = list(trainings(grid))
    for i, (run, entry_grid) in enumerate(runs, 1):
        print(f"[{i}/{len(runs)}] {folder_of(run, out).relative_to(out)}", flush=True)
        failures += attempt(entry_grid, run, out, progress=progress)
    return failures


def attempt(grid: Grid, run: Run, out: Path, *, progress: bool = True) -> list[str]:
    """Train and score one run; on failure write ``error.txt`` and return one line that names it.

    Raises OSError if the disk is full.
    """
    folder = folder_of(run, out)
    try:
        _run_one(grid, run, out, progress)
        (folder / "error.txt").unlink(missing_ok=True)
        return []
    except Exception as error:
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise  # the disk is full for the other runs as well
        text = traceback.format_exc()
        write_atomically(folder / "error.txt", lambda p: p.write_text(text, encoding="utf-8"))
        print(f"  failed: {error}", flush=True)
        return [f"{folder}: {type(error).__name__}: {error}"]


def _run_one(grid: Grid, run: Run, out: Path, progress: bool) -> None:
    """Train one run, unless that is done, and make the missing scorings."""
    folder, data = folder_of(run, out), run.load_data()
    config, planned = run.configure(data), list(scorings(grid, run))
    for scoring in planned:  # what cannot be scored fails before the training, not after it
        changed = changed_fields(config, override(config, scoring.settings))
        check_changeable(get_method(run.method), changed)
        check_arguments(run.dataset, scoring.plant, run.resize, run.side)
    if not (folder / "checkpoint").exists():
        for plant in dict.fromkeys(scoring.plant for scoring in planned):
            check_scorable(replace(run, plant=plant).load_data())
    copy_denoiser(run, config, out)
    trained = train(run, data, folder, progress=progress).config
    del data  # each scoring loads its own
    for scoring in planned:
        name = scoring_name(scoring)
        if is_done(scoring, folder / name / "result.json", trained):
            print(f"  {name}: done before", flush=True)
            continue
        result = evaluate(
            scoring, folder / name, checkpoint=folder / "checkpoint", progress=progress
        )
        print(f"  {name}: image AUROC {result['image_auroc']:.3f}", flush=True)


def copy_denoiser(run: Run, config: MethodConfig, out: Path) -> None:
    """Copy the last saved state of AnoDDPM's denoiser, if it trains in the same way.

    It must be of the same data and seed. Nothing is copied if the run trains no denoiser on normal
    images alone, or has begun already.
    """
    needed = config.denoiser_training if isinstance(config, DenoisingConfig) else None
    anoddpm = folder_of(replace(run, method="anoddpm", training=""), out)
    target = folder_of(run, out) / "state"
    if needed is None or target.exists():
        return
    for source in sorted(anoddpm.parent.glob(f"**/{anoddpm.name}/state/{STAGE}.state.safetensors")):
        record = source.parent / "training.json"
        if record.exists() and trained_denoiser(record, run.seed) == needed:
            write_atomically(target / source.name, partial(shutil.copyfile, source))
            return


def trained_denoiser(record: Path, seed: int) -> dict[str, Any] | None:
    """Return the ``denoiser_training`` of a ``training.json`` of AnoDDPM, else None."""
    training = read_json(record, "record of a training")
    try:
        if (training["method"], training["seed"], training["budget"]) == ("anoddpm", seed, None):
            return from_dict(AnoDDPMConfig, training["config"]).denoiser_training
    except (ValueError, KeyError, TypeError):  # of another version
        pass
    return None


def is_done(scoring: Run, path: Path, trained: MethodConfig) -> bool:
    """Tell whether ``path`` is the result of this very scoring; a broken file is not, and is named.

    ``trained`` is the configuration of the checkpoint, to which the scoring's settings apply.
    """
    if not path.exists():
        return False
    try:
        return _is_record_of(scoring, read_json(path, "result"), trained)
    except (ValueError, KeyError, TypeError) as error:
        print(f"  {path} is broken and is made again: {error}", flush=True)
        return False


def _is_record_of(scoring: Run, record: Mapping[str, Any], trained: MethodConfig) -> bool:
    """Compare fields and configuration; raise ValueError, KeyError or TypeError for no record."""
    config = override(trained, scoring.settings)
    run = replace(scoring, category=record["category"])
    same_run = record["config_hash"] == run_hash(run, record["config"])
    return same_run and from_dict(type(config), record["config"]) == config


def find_missing(grid: Grid, records: Iterable[Mapping[str, Any]]) -> tuple[list[str], int]:
    """Return the names of the scorings that a sweep would make, and the number of all scorings.

    Compares the grid with ``records``, as :func:`~diffad_lite.evaluation.records.read_results`
    returns them; reads no image and trains nothing. Raises ValueError for an unknown method,
    impossible fields of a run, or two runs of one name. A setting that no configuration has shows
    only in the sweep.
    """
    check_distinct(grid)
    by_name = {record["name"]: record for record in records}
    planned = list(named_scorings(grid))
    missing = []
    for name, run, scoring in planned:
        get_method(run.method)
        try:
            record = by_name[name]
            info = {"channels": record["config"]["channels"], "category": record["category"]}
            trained = run.configure_for(info | {"flip_axes": FLIP_AXES.get(run.dataset, ())})
            done = _is_record_of(scoring, record, trained)
        except (ValueError, KeyError, TypeError):  # no record, or one that a sweep makes again
            done = False
        if not done:
            missing.append(name)
    return missing, len(planned)


def grids_by_scoring(folder: Path) -> dict[str, str]:
    """Map each scoring of the grids in a folder to its grid, by name.

    A scoring that several grids share belongs to the first one. YAML files that are no grids are
    skipped.
    """
    grids: dict[str, str] = {}
    for path in sorted(folder.glob("*.yaml")):
        try:
            grid = read_grid(path)
        except ValueError:
            continue
        for name, _, _ in named_scorings(grid):
            grids.setdefault(name, path.stem)
    return grids
