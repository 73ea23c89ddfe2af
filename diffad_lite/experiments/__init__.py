"""Runs: one, a grid, a grid on Dask; your own unlabelled images; the machine."""

from diffad_lite.experiments.dask import sweep_on_dask
from diffad_lite.experiments.evaluate import (
    bundled_checkpoint,
    evaluate,
    load_checkpoint,
    pretrained_or_train,
    train,
)
from diffad_lite.experiments.grid import folder_of, read_grid, scorings, sweep, trainings
from diffad_lite.experiments.run import Run
from diffad_lite.experiments.unlabelled import find_shifts, read_images, score_folder, survey

__all__ = [
    "Run",
    "bundled_checkpoint",
    "evaluate",
    "find_shifts",
    "folder_of",
    "load_checkpoint",
    "pretrained_or_train",
    "read_grid",
    "read_images",
    "score_folder",
    "scorings",
    "survey",
    "sweep",
    "sweep_on_dask",
    "train",
    "trainings",
]
