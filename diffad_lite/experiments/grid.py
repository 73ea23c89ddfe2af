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

An entry of ``data`` may have its own ``methods``, ``seeds``, ``plants``, ``variants`` and
``trainings``, and environment variables in its ``root``. One training serves all plants and
variants of its (method, data, seed). A scoring is skipped when its ``result.json`` carries the hash
of the same run and configuration. Methods that begin with AnoDDPM's own training take it over from
the AnoDDPM of the same data and seed in the same folder; the time it took is counted as theirs.
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

from diffad_lite.core.config import Profile, convert, from_dict, override, short_repr, unknown_name
from diffad_lite.core.files import check_writable, read_json, read_yaml, write_atomically
from diffad_lite.data.datasets import check_arguments
from diffad_lite.data.readers import FLIP_AXES
from diffad_lite.experiments.evaluate import evaluate, train
from diffad_lite.experiments.run import Run, run_hash
from diffad_lite.methods import get_method
from diffad_lite.methods.anoddpm import AnoDDPMConfig
from diffad_lite.methods.base import MethodConfig
from diffad_lite.methods.denoiser import STAGE, DenoisingConfig

Grid = Mapping[str, Any]
DATA_KEYS = ("dataset", "category", "root", "image_size", "resize")
# What an entry of data may set in the place of the grid.
OWN_KEYS = ("methods", "seeds", "plants", "variants", "trainings")
KEYS = ("profile", *OWN_KEYS, "data", "settings")
# What stands under each key of a grid, or of an entry of its data.
FORMS = {
    "profile": str,
    "methods": tuple[str, ...],
    "seeds": tuple[int, ...],
    "data": tuple[Any, ...],
    "plants": tuple[str | None, ...],
    "variants": dict[str, dict[str, Any] | None],
    "trainings": dict[str, dict[str, Any] | None],
    "settings": dict[str, Any],
    "dataset": str,
    "category": str,
    "root": str,
    "image_size": int,
    "resize": str,
}


def read_grid(path: str | Path) -> dict[str, Any]:
    """Read and check a grid.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML, an unknown key, a value of another form, or no methods or data.
    """
    try:
        grid = read_yaml(Path(path))
    except FileNotFoundError:
        raise FileNotFoundError(f"no grid at {path}; see data/grid.yaml for one") from None
    if not isinstance(grid, dict):
        raise ValueError(f"{path} must be a mapping with the keys {', '.join(KEYS)}")
    for key in grid:
        if key not in KEYS:
            raise unknown_name(f"key in {path}", str(key), KEYS)
    for key in ("methods", "data"):
        if not grid.get(key):
            raise ValueError(f"{path} names no {key}; add them, as in data/grid.yaml")
    _check_forms(grid, path)
    for entry in grid["data"]:
        if not isinstance(entry, dict) or "dataset" not in entry:
            like = f"{path}: each entry of data is like {{dataset: elpv}}"
            raise ValueError(f"{like}, got {short_repr(entry)}")
        for key in entry:
            if key not in (*DATA_KEYS, *OWN_KEYS):
                raise unknown_name(f"key of data in {path}", str(key), (*DATA_KEYS, *OWN_KEYS))
        _check_forms(entry, path)
    return grid


def _check_forms(values: Grid, path: str | Path) -> None:
    """Raise ValueError for what is not of its form; nothing (``seeds:``) is the default."""
    for key, value in values.items():
        if value is not None:
            convert(value, FORMS[key], f"{path}: {key}")


def trainings(grid: Grid, *, expand_roots: bool = True) -> Iterator[tuple[Run, Grid]]:
    """The runs that are trained, in order: data, then methods, then seeds; each with its grid.

    Args:
        grid: see above.
        expand_roots: replace environment variables in folders of images; False where none is read.

    Raises:
        ValueError: a root names an environment variable that is not set.
    """
    profile: Profile = grid.get("profile") or "lite"
    for entry in grid["data"]:
        own = {**grid, **{key: entry[key] for key in OWN_KEYS if entry.get(key)}}
        data = {key: entry[key] for key in DATA_KEYS if entry.get(key) is not None}
        if "root" in data and expand_roots:
            data["root"] = os.path.expandvars(data["root"])
            if "$" in data["root"]:
                raise ValueError(f"set the environment variable in the grid's root {data['root']}")
        named = own.get("trainings") or {"": {}}
        choices = itertools.product(own["methods"], named.items(), own.get("seeds") or [0])
        for method, (training, changes), seed in choices:
            settings = _as_json((grid.get("settings") or {}) | (changes or {}))
            more = {"seed": seed, "training": training, "settings": settings}
            yield Run(method=method, profile=profile, **more, **data), own


def scorings(grid: Grid, run: Run) -> Iterator[Run]:
    """What one training is scored on: every plant with every variant."""
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
    """Each scoring of a grid: its place below a folder of runs, its training, and itself."""
    for run, own in trainings(grid, expand_roots=False):
        for scoring in scorings(own, run):
            yield (folder_of(run, Path()) / scoring_name(scoring)).as_posix(), run, scoring


def folder_of(run: Run, out: Path) -> Path:
    """``out/<method>/<data>[/<training>]/s<seed>``, of one training."""
    parts = [run.dataset, run.category]
    parts += [] if run.image_size == 64 else [f"{run.image_size}px"]
    parts += [] if run.resize == "squash" else [run.resize]
    data = "-".join(filter(None, parts))
    return out / run.method / data / run.training / f"s{run.seed}"


def sweep(grid: Grid, out: str | Path, *, progress: bool = True) -> list[str]:
    """Run a grid; finished scorings are skipped, an interrupted training goes on.

    Returns:
        one line for each failure; each also stands in ``error.txt`` of its folder.

    Raises:
        ValueError: a run that cannot be, such as a negative seed.
        OSError: ``out`` cannot be written, or the disk is full.
    """
    out, failures = Path(out), []
    check_writable(out)
    runs = list(trainings(grid))
    for i, (run, own) in enumerate(runs, 1):
        folder = folder_of(run, out)
        print(f"[{i}/{len(runs)}] {folder.relative_to(out)}", flush=True)
        failures += attempt(own, run, out, progress=progress)
    return failures


def attempt(grid: Grid, run: Run, out: Path, *, progress: bool = True) -> list[str]:
    """Make one run of a grid; a failure is noted in ``error.txt`` of its folder.

    Returns:
        a line for the failure, if there is one.

    Raises:
        OSError: the disk is full.
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


def share_denoiser(run: Run, config: MethodConfig, out: Path) -> None:
    """Copy the denoiser that AnoDDPM trained for the same data and seed in the same way.

    Nothing happens where there is none, where the run trains no denoiser on normal images alone,
    or where it has begun already.
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
    """Return the ``denoiser_training`` of a finished ``training.json`` of AnoDDPM, else None."""
    training = read_json(record, "record of a training")
    try:
        if (training["method"], training["seed"], training["budget"]) == ("anoddpm", seed, None):
            return from_dict(AnoDDPMConfig, training["config"]).denoiser_training
    except (ValueError, KeyError, TypeError):  # of another version
        pass
    return None


def _run_one(grid: Grid, run: Run, out: Path, progress: bool) -> None:
    """Train one run, unless that is done, and make the scorings that are missing."""
    folder, data = folder_of(run, out), run.load_data()
    planned = list(scorings(grid, run))
    for scoring in planned:  # a misspelt setting fails before the training, not after it
        override(run.configure(data), scoring.settings)
        check_arguments(run.dataset, scoring.plant, run.resize, run.side)
    share_denoiser(run, run.configure(data), out)
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


def is_done(run: Run, path: Path, trained: MethodConfig) -> bool:
    """Whether ``path`` is the result of this very run; a broken file is named and redone.

    ``trained`` is the configuration of the checkpoint, to which the run's settings apply.
    """
    if not path.exists():
        return False
    try:
        return is_record_of(run, read_json(path, "result"), trained)
    except (ValueError, KeyError, TypeError) as error:
        print(f"  {path} is broken and is made again: {error}", flush=True)
        return False


def is_record_of(run: Run, result: Mapping[str, Any], trained: MethodConfig) -> bool:
    """Whether a record is of this very run, scored with ``trained`` under the run's settings.

    Raises:
        ValueError, KeyError, TypeError: it is no record.
    """
    config = override(trained, run.settings)
    wanted = replace(run, category=result["category"])
    same_run = result["config_hash"] == run_hash(wanted, result["config"])
    return same_run and from_dict(type(config), result["config"]) == config


def missing(grid: Grid, records: Iterable[Mapping[str, Any]]) -> tuple[list[str], int]:
    """Compare a grid with records, without reading images or training anything.

    Args:
        grid: see above.
        records: as :func:`diffad_lite.evaluation.records.read_results` returns them.

    Returns:
        the scorings that no record is of, by their place in a folder of runs; and how many the
        grid has in all.

    Raises:
        ValueError: an unknown method, or fields that a run cannot have. Settings that a
            configuration does not have show only where there is a record, or in the sweep.
    """
    known, left, count = {record["name"]: record for record in records}, [], 0
    for name, run, scoring in named_scorings(grid):
        get_method(run.method)
        count += 1
        record = known.get(name)
        if record is None or not _is_current(scoring, record, run):
            left.append(name)
    return left, count


def _is_current(scoring: Run, record: Mapping[str, Any], run: Run) -> bool:
    """Whether a sweep would skip a scoring of a training, as :func:`is_done` does."""
    try:
        channels, category = record["config"]["channels"], record["category"]
        axes = FLIP_AXES.get(run.dataset, ())
        info = {"channels": channels, "category": category, "flip_axes": axes}
        return is_record_of(scoring, record, run.configure_for(info))
    except (ValueError, KeyError, TypeError):
        return False


def homes(folder: Path) -> dict[str, str]:
    """Return for each scoring of the grids in a folder, by its name, the name of its grid.

    What several grids share belongs to the first of them; YAML files that are no grids are passed
    over.
    """
    found: dict[str, str] = {}
    for path in sorted(folder.glob("*.yaml")):
        try:
            grid = read_grid(path)
        except ValueError:
            continue
        for name, _, _ in named_scorings(grid):
            found.setdefault(name, path.stem)
    return found


def scoring_name(scoring: Run) -> str:
    """Name of a scoring's folder in that of its training."""
    return "-".join(filter(None, (scoring.variant, scoring.plant)))
