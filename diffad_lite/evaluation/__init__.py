"""Metrics, records of runs, the tables rendered from them, and the claims they decide."""

from diffad_lite.evaluation.metrics import aupro, bootstrap_auroc, image_metrics, pixel_metrics
from diffad_lite.evaluation.records import read_results, read_scores

__all__ = [
    "aupro",
    "bootstrap_auroc",
    "image_metrics",
    "pixel_metrics",
    "read_results",
    "read_scores",
]
