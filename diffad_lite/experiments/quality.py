"""From predictions to numbers: the metrics of one run, and what each test image adds to them."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from diffad_lite.data.datasets import AnomalyData
from diffad_lite.data.images import Resize, pad_box
from diffad_lite.evaluation import metrics
from diffad_lite.evaluation.pseudo_values import pixel_pseudo_values
from diffad_lite.evaluation.records import MEASURES, PIXEL_METRICS, Measures
from diffad_lite.methods.base import Prediction

Pairs = Mapping[int, tuple[np.ndarray, np.ndarray]]


def measure_quality(
    data: AnomalyData, prediction: Prediction, threshold: float, pixel_threshold: float | None
) -> tuple[dict[str, Any], Measures]:
    """Compute all metrics of one run, and those of each test image.

    Args:
        data: the images that were scored.
        prediction: of all test images.
        threshold: of image scores, from normal images.
        pixel_threshold: of the values of maps, from normal images.

    Returns:
        fields of a record, None where there is nothing to measure: pixel metrics without masks,
        PSNR without a reconstruction; and :func:`measure_images`.
    """
    labels, scores = data.test_labels, prediction.image_score.numpy()
    kinds = np.array(data.defect_types)
    pairs: Pairs = {  # test image -> its mask and its map, both at original size
        i: (mask, map_at_original_size(data, prediction.anomaly_map, i))
        for i, mask in enumerate(data.test_masks or [])
        if mask is not None
    }
    measures = measure_images(data, prediction, pairs)
    per_defect = {}
    for kind in sorted(set(kinds[labels == 1])):
        of_kind = kinds == kind
        chosen = (labels == 0) | of_kind
        per_defect[kind] = {
            "n": int(of_kind.sum()),
            "image_auroc": metrics.image_metrics(labels[chosen], scores[chosen])["image_auroc"],
            **_pixel_quality(pairs, chosen),
            "aupimo": _mean(measures, "aupimo", of_kind),
            "remaining_contrast": _mean(measures, "remaining_contrast", of_kind),
        }
    everything = np.ones(len(labels), dtype=bool)
    false_alarms, *interval = metrics.false_alarm_rate(scores[labels == 0], threshold)
    quality = {
        **metrics.image_metrics(labels, scores),
        "image_auroc_ci": list(metrics.bootstrap_auroc(labels, scores)),
        "threshold": threshold,
        "f1_at_normal_threshold": metrics.f1_at_threshold(labels, scores, threshold),
        "false_alarms_at_normal_threshold": false_alarms,
        "false_alarms_ci": interval,
        **_pixel_quality(pairs, everything),
        "aupimo": _mean(measures, "aupimo", everything),
        "pixel_threshold": pixel_threshold,
        "pixel_f1_at_normal_threshold": _pixel_f1(pairs, pixel_threshold),
        "psnr_normal": _psnr(measures, labels == 0),
        "remaining_contrast": _mean(measures, "remaining_contrast", everything),
        "per_defect": per_defect,
    }
    return quality, measures


def measure_images(data: AnomalyData, prediction: Prediction, pairs: Pairs) -> Measures:
    """Compute ``MEASURES`` of each test image, NaN for none; those that no image has are left out.

    ``pairs`` has mask and map of the images whose mask is known, at original size.
    """
    n = len(data.test_labels)
    measures = {name: np.full(n, np.nan) for name in MEASURES}
    if prediction.reconstruction is not None:
        images, reconstructions = data.test_images.numpy(), prediction.reconstruction.numpy()
        measures["squared_error"] = metrics.squared_errors(images, reconstructions)
        if data.clean_images is not None:
            clean = data.clean_images.numpy()
            changed = (images != clean).any(axis=1)  # a small defect may vanish by resizing
            i = changed.any(axis=(1, 2))
            if i.any():
                measures["remaining_contrast"][i] = metrics.remaining_contrast(
                    images[i], clean[i], reconstructions[i], changed[i]
                )
    masks, maps = [mask for mask, _ in pairs.values()], [values for _, values in pairs.values()]
    anomalous = [i for i, (mask, _) in pairs.items() if mask.any()]
    if anomalous:
        for name, values in pixel_pseudo_values(masks, maps).items():
            measures[name][list(pairs)] = values
        if metrics.resolves_aupimo(masks):
            measures["aupimo"][anomalous] = metrics.aupimo(masks, maps)
    return {name: values for name, values in measures.items() if not np.isnan(values).all()}


def _pixel_quality(pairs: Pairs, chosen: np.ndarray) -> Mapping[str, float | None]:
    """Compute pixel metrics of chosen images (n,); None if they have no anomalous pixel."""
    masks = [mask for i, (mask, _) in pairs.items() if chosen[i]]
    maps = [anomaly_map for i, (_, anomaly_map) in pairs.items() if chosen[i]]
    if not any(mask.any() for mask in masks):
        return dict.fromkeys((*PIXEL_METRICS, "aupro_05"))
    return metrics.pixel_metrics(masks, maps)


def _pixel_f1(pairs: Pairs, threshold: float | None) -> float | None:
    if threshold is None or not any(mask.any() for mask, _ in pairs.values()):
        return None
    masks, maps = zip(*pairs.values(), strict=True)
    return metrics.pixel_f1_at_threshold(masks, maps, threshold)


def _psnr(measures: Measures, normal: np.ndarray) -> float | None:
    """Return the PSNR of normal images; None without reconstructions, or if they are exact."""
    if "squared_error" not in measures or not measures["squared_error"][normal].any():
        return None
    return metrics.psnr(measures["squared_error"][normal])


def _mean(measures: Measures, name: str, chosen: np.ndarray) -> float | None:
    """Return the mean of a measure over chosen images (n,) that have it; None without any."""
    values = measures[name][chosen] if name in measures else np.array([])
    values = values[~np.isnan(values)]
    return float(values.mean()) if values.size else None


def map_at_original_size(data: AnomalyData, maps: Tensor, i: int) -> np.ndarray:
    """Return the map of test image ``i``, of maps (N, H, W), at the size of its mask."""
    size, info = data.original_sizes[i], data.info
    return at_original_size(maps[i], size, info["resize"], info["image_size"])


def at_original_size(
    anomaly_map: Tensor, size: tuple[int, int], resize: Resize, image_size: int
) -> np.ndarray:
    """Resize a map (H, W) of a resized image, bilinearly, to its original (height, width)."""
    if resize == "pad":
        top, left, h, w = pad_box(*size, image_size)
        anomaly_map = anomaly_map[top : top + h, left : left + w]
    return F.interpolate(anomaly_map[None, None], size=size, mode="bilinear")[0, 0].numpy()
