"""Runs: one, a grid, a grid on Dask; your own images; the machine."""

from diffad_lite.experiments.dask import sweep_on_dask
from diffad_lite.experiments.evaluate import (
    bundled_checkpoint,
    evaluate,
    load_checkpoint,
    pretrained_or_train,
    train,
)
from diffad_lite.experiments.folders import read_images, score_folder, shifts, survey
from diffad_lite.experiments.grid import folder_of, read_grid, scorings, sweep, trainings
from diffad_lite.experiments.run import Run

__all__ = [
    "Run",
    "bundled_checkpoint",
    "evaluate",
    "folder_of",
    "load_checkpoint",
    "pretrained_or_train",
    "read_grid",
    "read_images",
    "score_folder",
    "scorings",
    "shifts",
    "survey",
    "sweep",
    "sweep_on_dask",
    "train",
    "trainings",
]
