"""From predictions to numbers and files: metrics of a run, score table, maps, figure."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from diffad_lite.config import write_atomically
from diffad_lite.datasets import AnomalyData
from diffad_lite.images import Resize, pad_box
from diffad_lite.methods import Method, Prediction
from diffad_lite.metrics import bootstrap_auroc, f1_at_threshold, image_metrics, pixel_metrics
from diffad_lite.plots import show_detections
from diffad_lite.source import write_rows

PIXEL_METRICS = ("pixel_auroc", "pixel_ap", "aupro", "dice_oracle")


def quality(data: AnomalyData, prediction: Prediction, threshold: float) -> dict[str, Any]:
    """All metrics of one run; pixel metrics are None where no mask is known."""
    labels, scores = data.test_labels, prediction.image_score.numpy()
    kinds, maps = np.array(data.defect_types), _maps_with_masks(data, prediction.anomaly_map)
    per_defect = {}
    for kind in sorted(set(kinds[labels == 1])):
        chosen = (labels == 0) | (kinds == kind)
        per_defect[kind] = {
            "n": int((kinds == kind).sum()),
            "image_auroc": image_metrics(labels[chosen], scores[chosen])["image_auroc"],
            **_pixel_quality(maps, chosen),
        }
    return {
        **image_metrics(labels, scores),
        "image_auroc_ci": list(bootstrap_auroc(labels, scores)),
        "threshold": threshold,
        "f1_at_normal_threshold": f1_at_threshold(labels, scores, threshold),
        "false_alarms_at_normal_threshold": float((scores[labels == 0] > threshold).mean()),
        **_pixel_quality(maps, np.ones(len(labels), dtype=bool)),
        "per_defect": per_defect,
    }


def _maps_with_masks(data: AnomalyData, maps: Tensor) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Test image -> its mask and its map at the mask's size, where a mask is known."""
    masks = {i: m for i, m in enumerate(data.test_masks or []) if m is not None}
    return {i: (mask, map_at_original_size(data, maps, i)) for i, mask in masks.items()}


def _pixel_quality(
    maps: dict[int, tuple[np.ndarray, np.ndarray]], chosen: np.ndarray
) -> dict[str, Any]:
    pairs = [pair for i, pair in maps.items() if chosen[i]]
    if not any(mask.any() for mask, _ in pairs):
        return dict.fromkeys(PIXEL_METRICS)
    return pixel_metrics([mask for mask, _ in pairs], [own for _, own in pairs])


def map_at_original_size(data: AnomalyData, maps: Tensor, i: int) -> np.ndarray:
    """The map of test image ``i`` (of (N, H, W)) at the size its mask has."""
    size, info = data.original_sizes[i], data.info
    return at_original_size(maps[i], size, info["resize"], info["image_size"])


def at_original_size(
    anomaly_map: Tensor, size: tuple[int, int], resize: Resize, image_size: int
) -> np.ndarray:
    """A map (H, W) of a resized image, bilinear, at the (height, width) that the image had."""
    if resize == "pad":
        top, left, h, w = pad_box(*size, image_size)
        anomaly_map = anomaly_map[top : top + h, left : left + w]
    return F.interpolate(anomaly_map[None, None], size=size, mode="bilinear")[0, 0].numpy()


def export_maps(data: AnomalyData, maps: Tensor, folder: Path) -> None:
    """Write maps as ``<folder>/test/<defect>/<id>.tiff``, as MVTec's evaluation script reads."""
    for i, name in enumerate(data.test_ids):
        pixels = map_at_original_size(data, maps, i).astype(np.float32)
        path = folder / "test" / data.defect_types[i] / f"{Path(name).name}.tiff"
        write_atomically(path, Image.fromarray(pixels).save)


def write_scores(path: Path, data: AnomalyData, prediction: Prediction) -> None:
    """One row a test image: id, label, defect_type, image_score."""
    scores = [f"{score:.6g}" for score in prediction.image_score.tolist()]
    rows = zip(data.test_ids, data.test_labels, data.defect_types, scores, strict=True)
    write_rows(path, [("id", "label", "defect_type", "image_score"), *rows])


def plain(name: str) -> str:
    """A name of a file or folder for a figure, which would read $...$ as mathematics."""
    return name.replace("$", r"\$")


def write_figure(path: Path, data: AnomalyData, prediction: Prediction, method: Method) -> None:
    """Two normal and six anomalous test images, the first of each kind of defect first."""
    order = np.argsort(data.test_ids, kind="stable")
    kinds = np.array(data.defect_types)[order]
    first = {kind: order[kinds == kind] for kind in sorted(set(kinds))}
    anomalous = [v for k, v in first.items() if k != "good"]
    turn = [v[i] for i in range(6) for v in anomalous if i < len(v)][:6]
    chosen = [*first["good"][:2], *turn]
    normal_maps = prediction.anomaly_map[data.test_labels == 0]
    top = float(np.quantile(normal_maps.numpy(), 0.999))
    fig, _ = show_detections(
        data.test_images[chosen],
        prediction.anomaly_map[chosen],
        reconstructions=None
        if prediction.reconstruction is None
        else prediction.reconstruction[chosen],
        masks=[data.test_masks[i] for i in chosen] if data.test_masks else None,
        titles=[plain(data.defect_types[i]) for i in chosen],
        scale=(0.0, 2 * max(top, 1e-6)),
        caption=plain(
            f"{method.name} on {data.info['name']} {data.info['category']}; the colour scale "
            "ends at twice the 99.9 % quantile of normal pixels"
        ),
    )
    write_atomically(path, fig.savefig)
    plt.close(fig)
