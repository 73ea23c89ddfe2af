"""One run: train or load a method, score a data set, and write a folder with the record.

A run folder holds ``state/`` (to resume training), ``checkpoint/``, ``scores.csv``,
``figure.png``, ``result.json``, and ``maps/`` on request. The result is written last, so its
presence means "done".
"""

import hashlib
import math
import shutil
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from diffad_lite.core.config import changed_fields, convert, from_dict, override, to_dict
from diffad_lite.core.files import (
    check_writable,
    data_dir,
    read_json,
    staged,
    write_atomically,
    write_json,
    write_rows,
)
from diffad_lite.data.datasets import AnomalyData
from diffad_lite.data.readers import LICENCES
from diffad_lite.data.source import DEFAULT_CATEGORIES
from diffad_lite.evaluation import metrics
from diffad_lite.evaluation.records import Measures, ScoreTable
from diffad_lite.experiments.machine import machine_record
from diffad_lite.experiments.quality import map_at_original_size, measure_quality
from diffad_lite.experiments.run import Run, fields_of, run_hash
from diffad_lite.methods.base import (
    FEWEST_CALIBRATION,
    Method,
    MethodConfig,
    Prediction,
    choose_images,
    get_method,
    load_pretrained,
)
from diffad_lite.methods.checkpoints import check_changeable, read_record
from diffad_lite.plots import show_detections
from diffad_lite.training import processes

SAMPLE = 16  # test images whose scores the index of bundled weights keeps

# ------------------------------------------------------------------------------ train or load


def train(
    run: Run, data: AnomalyData, out: Path, *, budget: float | None = None, progress: bool = True
) -> Method:
    """Train into ``out/state`` and ``out/checkpoint``; a second call resumes or loads.

    Several processes may call it at once, see :mod:`diffad_lite.training.processes`. ``budget`` (s)
    is that of :meth:`Method.fit`. A checkpoint that was trained in a limited time serves a call
    without ``budget``, with a warning. Raises ValueError if the checkpoint there is of another
    configuration, seed, data or ``budget``.
    """
    checkpoint, state = out / "checkpoint", out / "state"
    check_writable(state)
    config = run.configure(data)
    if (checkpoint / "config.json").exists():
        identity = {"method": run.method, **_provenance(run, data)}
        _check_same_training(checkpoint, identity, config, budget)
        return load_checkpoint(checkpoint, run, data)
    method = get_method(run.method)(config)
    method.fit(
        data.train, data.calibration, seed=run.seed, budget=budget, workdir=state, progress=progress
    )
    if processes.rank() == 0:
        assert method.calibration_scores_ is not None
        method.save_pretrained(
            checkpoint,
            **_provenance(run, data),
            budget=budget,
            n_calibration=len(method.calibration_scores_),  # fewer than there are in a short time
            n_calibration_available=len(data.calibration),
        )
    return method


def check_files(run: Run, out: Path) -> None:
    """Raise FileNotFoundError if ``run`` needs files that are missing; before data are loaded.

    A checkpoint in ``out`` needs none of them.
    """
    if (out / "checkpoint" / "config.json").exists():
        return
    info = {"channels": 3, "category": run.category, "flip_axes": ()}  # no file depends on it
    try:
        config = run.configure_for(info)
    except ValueError:  # what does not fit is refused with the data, which it may depend on
        return
    get_method(run.method).check_files(config)


def _check_same_training(
    checkpoint: Path, identity: Mapping[str, Any], config: MethodConfig, budget: float | None
) -> None:
    """Raise ValueError if a checkpoint comes from another training than the one asked for."""
    stored, fix = read_record(checkpoint), "delete that folder to train anew"
    same = {key: stored.get(key) for key in identity} == identity
    try:
        same = same and from_dict(type(config), stored["config"]) == config
    except ValueError as error:
        fix = f"delete {checkpoint} to train anew"
        raise ValueError(f"{checkpoint / 'config.json'}: {error}; {fix}") from None
    if not same:
        raise ValueError(
            f"{checkpoint} was trained with another configuration, seed or data; "
            f"choose another --out, or {fix}"
        )
    limit = stored.get("budget")
    if limit == budget:
        return
    trained = "without --max-minutes" if limit is None else f"with --max-minutes {limit / 60:g}"
    if budget is not None:
        raise ValueError(
            f"{checkpoint} was trained {trained}, not with --max-minutes {budget / 60:g}; leave it "
            f"out to use that training, choose another --out, or {fix}"
        )
    steps = sum(report["steps"] for report in stored.get("reports", {}).values())
    warnings.warn(
        f"{checkpoint} was trained {trained} ({steps:.0f} steps) and is used; {fix}", stacklevel=3
    )


def find_checkpoint(folder: str | Path) -> Path:
    """Return the folder of a checkpoint: ``folder`` itself, or ``checkpoint`` in that of a run."""
    folder = Path(folder)
    inside = folder / "checkpoint"
    is_run = not (folder / "config.json").exists() and (inside / "config.json").exists()
    return inside if is_run else folder


def load_checkpoint(folder: str | Path, run: Run, data: AnomalyData) -> Method:
    """Load a checkpoint for ``data``, which must be split as in training.

    Applies ``run.settings``; then calibrates again if the settings or the calibration images are
    not those of the checkpoint. Where a time budget allowed only some images, it takes no more of
    them and warns. ``folder`` may also be that of a run.

    Raises:
        ValueError: the checkpoint is of another method, seed or profile than ``run``, or was
            fitted on another split, so test images of ``data`` may have been training images.
    """
    folder = find_checkpoint(folder)
    stored = read_record(folder)
    provenance = _provenance(run, data)
    if stored.get("fingerprint") != provenance.pop("fingerprint"):
        raise ValueError(
            f"{folder} was fitted on another split or data set (fingerprint "
            f"{stored.get('fingerprint')}, this data has {data.info['fingerprint']}); its "
            "training images may be among these test images: train on this data instead"
        )
    for key, expected in provenance.items():
        if stored.get(key) != expected:
            raise ValueError(
                f"{folder} was trained with {key} {stored.get(key)!r}, not {expected!r}; "
                f"give the same {key}, or choose another checkpoint"
            )
    method = get_method(run.method).from_pretrained(folder)
    scores = method.calibration_scores_
    n_scored = 0 if scores is None else len(scores)
    config = override(method.config, run.settings)
    if changed := changed_fields(method.config, config):
        check_changeable(type(method), changed)
        method = method.with_settings(**{name: getattr(config, name) for name in changed})
    available = stored.get("n_calibration_available", n_scored)
    as_stored = available == len(data.calibration)
    side = data.calibration.shape[-1]
    calibrated = None not in (method.threshold_, method.pixel_threshold_)
    if not calibrated or not as_stored or side != method.config.image_size:
        limited = isinstance(available, int) and 0 < n_scored < available
        _calibrate_again(method, data, n_scored if limited else len(data.calibration))
    return method


def _calibrate_again(method: Method, data: AnomalyData, n: int) -> None:
    """Calibrate a loaded method on ``n`` images; warn where these are not all."""
    n = max(n, FEWEST_CALIBRATION) if method.config.calibrate else n
    images, available = data.calibration, len(data.calibration)
    if n < available:
        images = choose_images(images, n)
        warnings.warn(
            f"the checkpoint's calibration was limited by --max-minutes; {n} of {available} "
            "calibration images are scored again and give the threshold; to use all, train "
            "without --max-minutes",
            stacklevel=3,
        )
    method.calibrate(images)


def bundled_checkpoint(method: str, dataset: str, category: str | None) -> Path:
    """Return the folder of the lite weights for this data, which need not exist.

    Raises:
        FileNotFoundError: there is no data folder.
    """
    category = category or DEFAULT_CATEGORIES.get(dataset)
    return data_dir() / "checkpoints" / "-".join(filter(None, (dataset, category, method)))


def bundle(run: Run, data: AnomalyData, method: Method, *, command: str) -> Path:
    """Store a trained method in ``data/checkpoints`` in float16, with its entry in the index.

    Metrics in the index are those of the stored float16 weights on the test set. Its scores, of 16
    test images, show whether a later version still scores as this one does.
    """
    folder = bundled_checkpoint(run.method, run.dataset, data.info["category"])
    record = _provenance(run, data)
    method.save_pretrained(folder, dtype=torch.float16, **record)
    stored = load_pretrained(folder).calibrate(data.calibration)
    stored.save_pretrained(folder, dtype=torch.float16, **record)
    path = folder.parent / "index.json"
    index = read_json(path, "index of checkpoints") if path.exists() else {}
    index = convert(index, dict[str, Any], str(path))
    scores = stored.predict(data.test_images).image_score.numpy()
    sample = data.subset(SAMPLE).test_ids
    index[folder.name] = {
        "file": f"{folder.name}/model.safetensors",
        "sha256": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
        "command": command,
        **record,
        "config": to_dict(stored.config),
        "metrics": metrics.image_metrics(data.test_labels, scores),
        "scores": {n: float(s) for n, s in zip(data.test_ids, scores, strict=True) if n in sample},
        "reports": stored.reports_,
        "licence": LICENCES.get(run.dataset, "see the data set"),
    }
    write_json(path, dict(sorted(index.items())))
    return folder


def pretrained_or_train(
    run: Run, data: AnomalyData, *, retrain: bool = False, out_dir: str | Path = "runs/notebooks"
) -> Method:
    """Load the bundled weights in a notebook on ci or lite; train if there are none, or to retrain.

    Bundled weights are of seed 0, whatever ``run.seed`` is. Each run trains into its folder in
    ``out_dir``, and resumes there after an interruption. Without a data folder, a warning says so.
    """
    if not retrain and run.profile != "paper":
        try:
            folder = bundled_checkpoint(run.method, run.dataset, data.info["category"])
        except FileNotFoundError as error:
            warnings.warn(f"no bundled weights, so {run.method} trains: {error}", stacklevel=2)
        else:
            if folder.is_dir():
                return load_checkpoint(folder, replace(run, seed=0, profile="lite"), data)
    key = f"{run.method}-{data.info['name']}-{data.info['category']}-{run.profile}-s{run.seed}"
    return train(run, data, Path(out_dir) / key)


def _provenance(run: Run, data: AnomalyData) -> dict[str, Any]:
    """Return what a checkpoint records of its training besides its configuration."""
    info = {key: data.info[key] for key in ("fingerprint", "split_seed", "resize", "bits")}
    return {"seed": run.seed, "profile": run.profile, **info}


# -------------------------------------------------------------------------------------- score


def evaluate(
    run: Run,
    out: str | Path,
    *,
    checkpoint: str | Path | None = None,
    budget: float | None = None,
    save_maps: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Train or load, score the test set, write the run folder, and return its ``result.json``.

    Args:
        checkpoint: load this, or that of this run's folder, instead of training;
            ``run.settings`` may then change inference settings only.
        budget: of :meth:`Method.fit`, seconds.
        save_maps: write every anomaly map at its original size, in MVTec's layout (float32 TIFF).

    Raises:
        ValueError: the test set has one class only, several processes call it, ``budget`` is given
            with a ``checkpoint``, or loading or training fails.
    """
    if processes.count() > 1:
        raise ValueError(
            f"{processes.count()} processes can train, but one evaluates: call 'diffad train' by "
            "accelerate launch, then 'diffad evaluate' with the same --out as usual"
        )
    out = Path(out)
    check_writable(out)
    check_replaceable(
        out / "maps", lambda p: p.suffix == ".tiff" and "test" in p.relative_to(out).parts
    )
    if checkpoint is not None and budget is not None:
        raise ValueError(
            "nothing is trained with --checkpoint, so --max-minutes has no effect; leave one out"
        )
    if checkpoint is None:
        check_files(run, out)
    data = run.load_data()
    check_scorable(data)
    if checkpoint is None:
        method = train(run, data, out, budget=budget, progress=progress)
    else:
        checkpoint, method = find_checkpoint(checkpoint), load_checkpoint(checkpoint, run, data)
    assert method.threshold_ is not None  # trained or loaded, hence calibrated
    started = time.perf_counter()
    with method.count_evaluations() as evaluations:
        prediction = method.predict(data.test_images)
    seconds = time.perf_counter() - started
    n, thresholds = len(data.test_labels), (method.threshold_, method.pixel_threshold_)
    quality, measures = measure_quality(data, prediction, *thresholds)
    result = {
        **_identity(run, data, method, checkpoint),
        **quality,
        "train_seconds": sum(r["seconds"] for r in method.reports_.values()),
        "train_steps": sum(r["steps"] for r in method.reports_.values()),
        "ms_per_image": 1000 * seconds / n,
        "network_evaluations_per_image": evaluations[0] / n,
        "n_parameters": sum(p.numel() for p in method.network.parameters()),
        **machine_record(method.device),
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "result.json").unlink(missing_ok=True)  # its presence means that all else is written
    write_scores(out / "scores.csv", data, prediction, measures)
    write_figure(out / "figure.png", data, prediction, method)
    if save_maps:
        with staged(out) as stage:
            export_maps(data, prediction.anomaly_map, stage / "maps" / data.info["category"])
    else:  # those of an older result
        shutil.rmtree(out / "maps", ignore_errors=True)
    write_json(out / "result.json", result)
    return result


def check_scorable(data: AnomalyData) -> None:
    """Raise ValueError unless the test set has normal and anomalous images."""
    if len(set(data.test_labels.tolist())) < 2:
        remarks = "".join(f"; {remark}" for remark in data.info["remarks"])
        raise ValueError(
            "the test set has only one class, so there is nothing to measure; add "
            f"test/<defect> images, or use --plant cells to score planted defects{remarks}"
        )


def check_replaceable(maps: Path, is_map: Callable[[Path], bool]) -> None:
    """Check that a folder which new maps will replace holds nothing but maps, or does not exist.

    Raises:
        NotADirectoryError: it is a file.
        ValueError: it holds a file for which ``is_map`` is false, except for a hidden one.
    """
    check_writable(maps)
    for path in sorted(maps.rglob("*")):
        if path.is_file() and not path.name.startswith(".") and not is_map(path):
            raise ValueError(
                f"{path} is no map of an earlier call, and {maps} would be replaced; choose "
                "another output folder"
            )


def _identity(
    run: Run, data: AnomalyData, method: Method, checkpoint: str | Path | None
) -> dict[str, Any]:
    run = replace(run, category=data.info["category"])
    config = to_dict(method.config)
    assert method.calibration_scores_ is not None
    return fields_of(run) | {
        "split_seed": data.info["split_seed"],
        "data_fingerprint": data.info["fingerprint"],
        "config": config,
        "config_hash": run_hash(run, config),
        "checkpoint": None if checkpoint is None else Path(checkpoint).name,
        "n_train": len(data.train),
        "n_calibration": len(method.calibration_scores_),
        "n_test": len(data.test_labels),
        "n_anomalous": int(data.test_labels.sum()),
    }


# ------------------------------------------------------------------------------------- files


def export_maps(data: AnomalyData, maps: Tensor, folder: Path) -> None:
    """Write maps as ``<folder>/test/<defect>/<id>.tiff``, as MVTec's evaluation script reads."""
    for i, name in enumerate(data.test_ids):
        path = folder / "test" / data.defect_types[i] / f"{Path(name).name}.tiff"
        write_map(path, map_at_original_size(data, maps, i))


def write_map(path: Path, anomaly_map: np.ndarray) -> None:
    """Write a map as a float32 TIFF."""
    write_atomically(path, Image.fromarray(anomaly_map.astype(np.float32)).save)


def write_scores(path: Path, data: AnomalyData, prediction: Prediction, measures: Measures) -> None:
    """Write one row per test image: id, label, defect_type, image_score, and its measures.

    A measure that no image has gets no column; an image without it has an empty cell.
    """
    scores = [f"{score:.6g}" for score in prediction.image_score.tolist()]
    columns = [data.test_ids, data.test_labels, data.defect_types, scores]
    for values in measures.values():
        columns.append(["" if math.isnan(value) else f"{value:.6g}" for value in values])
    head = [*ScoreTable._fields, *measures]
    write_rows(path, [head, *zip(*columns, strict=True)])


def escape_dollars(name: str) -> str:
    """Escape a file or folder name for a figure, which would read $...$ as mathematics."""
    return name.replace("$", r"\$")


def write_figure(path: Path, data: AnomalyData, prediction: Prediction, method: Method) -> None:
    """Show two normal and six anomalous test images, the first of each kind of defect first."""
    order = np.argsort(data.test_ids, kind="stable")
    kinds = np.array(data.defect_types)[order]
    by_kind = {kind: order[kinds == kind] for kind in sorted(set(kinds))}
    anomalous = [images for kind, images in by_kind.items() if kind != "good"]
    in_turn = [images[i] for i in range(6) for images in anomalous if i < len(images)]
    chosen = [*by_kind["good"][:2], *in_turn[:6]]
    reconstructions, masks = prediction.reconstruction, data.test_masks
    normal_maps = prediction.anomaly_map[data.test_labels == 0]
    top = float(np.quantile(normal_maps.numpy(), 0.999))
    fig, _ = show_detections(
        data.test_images[chosen],
        prediction.anomaly_map[chosen],
        reconstructions=None if reconstructions is None else reconstructions[chosen],
        masks=[masks[i] for i in chosen] if masks else None,
        titles=[escape_dollars(data.defect_types[i]) for i in chosen],
        scale=(0.0, 2 * max(top, 1e-6)),
        caption=escape_dollars(
            f"{method.name} on {data.info['name']} {data.info['category']}; the colour scale "
            "ends at twice the 99.9 % quantile of normal pixels"
        ),
    )
    save_figure(path, fig)


def save_figure(path: Path, fig: Figure) -> None:
    """Write a figure, complete or not at all, and close it."""
    write_atomically(path, fig.savefig)
    plt.close(fig)
