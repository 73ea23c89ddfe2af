"""The figures of the course. Each function returns the figure and a dictionary of what it shows.

One style: grey images, one colour scale for all maps of a figure, the Okabe-Ito palette (told
apart by colour-blind readers and in grey print), units on every axis. Importing this module changes
nothing of matplotlib; :func:`use_style` gives one's own figures the same style.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, ParamSpec

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike
from torch import Tensor

from diffad_lite.data.datasets import AnomalyData
from diffad_lite.diffusion.gaussian import Step
from diffad_lite.evaluation.metrics import image_metrics

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", "-.", ":")
MAP_COLOURS = "magma"
STYLE: Any = {
    "figure.dpi": 100,
    "figure.constrained_layout.use": True,
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "legend.frameon": False,
    "image.interpolation": "nearest",
}

Result = tuple[Figure, dict[str, Any]]
Arguments = ParamSpec("Arguments")


def use_style() -> None:
    """Draw all later figures of this process in the style of the course."""
    plt.rcParams.update(STYLE)


def styled(draw: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Decorate a function that draws a figure: the style holds inside of it, and nowhere else."""

    @wraps(draw)
    def draw_in_style(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        # Not rc_context: it would take back what a back end sets at its first figure, too.
        before = {key: plt.rcParams[key] for key in STYLE}
        plt.rcParams.update(STYLE)
        try:
            return draw(*args, **kwargs)
        finally:
            plt.rcParams.update(before)

    return draw_in_style


def _picture(image: ArrayLike) -> np.ndarray:
    """(C, H, W) or (H, W) in [-1, 1] -> what imshow takes, in [0, 1]; 4 channels show the first."""
    pixels = (np.asarray(image, dtype=np.float64).clip(-1, 1) + 1) / 2
    if pixels.ndim == 3:
        pixels = pixels.transpose(1, 2, 0) if pixels.shape[0] == 3 else pixels[0]
    return pixels


def _draw(ax: Axes, image: ArrayLike, title: str = "") -> None:
    ax.imshow(_picture(image), cmap="gray", vmin=0, vmax=1)
    ax.set_title(title, fontsize=10)
    ax.set_xticks([])
    ax.set_yticks([])


def _outline(ax: Axes, mask: np.ndarray | None, shape: Sequence[int], colour: str = "") -> None:
    """The rim of a mask over a picture of another size (h, w); nothing where no mask is known."""
    if mask is None or not mask.any():
        return
    # Pixel centres of the mask, and its edges, in the picture's coordinates; 0 outside.
    centres = [(np.arange(N) + 0.5) * n / N - 0.5 for n, N in zip(shape, mask.shape, strict=True)]
    y, x = (np.r_[-0.5, c, n - 0.5] for c, n in zip(centres, shape, strict=True))
    ax.contour(x, y, np.pad(mask, 1), [0.5], colors=colour or COLOURS[4], linewidths=1)


def _caption(fig: Figure, caption: str) -> None:
    if caption:
        fig.supxlabel(caption, fontsize=10)


@styled
def show_images(
    images: Tensor | Sequence[ArrayLike],
    titles: Sequence[str] | None = None,
    *,
    columns: int = 8,
    caption: str = "",
) -> Result:
    """A grid of images.

    Args:
        images: (N, C, H, W) in [-1, 1], or a sequence of such images.
        titles: one for each image.
        columns: at most.
        caption: a sentence under the figure.
    """
    n = len(images)
    columns = min(columns, n)
    rows = -(-n // columns)
    size = (1.35 * columns, (1.6 if titles else 1.4) * rows + (0.3 if caption else 0))
    fig, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    for i, ax in enumerate(axes.flat):
        if i < n:
            _draw(ax, images[i], titles[i] if titles else "")
        else:
            ax.axis("off")
    _caption(fig, caption)
    return fig, {"images": images}


@styled
def show_detections(
    images: Tensor,
    maps: Tensor,
    *,
    reconstructions: Tensor | None = None,
    masks: Sequence[np.ndarray | None] | None = None,
    titles: Sequence[str] | None = None,
    scale: tuple[float, float] | None = None,
    threshold: float | None = None,
    caption: str = "",
) -> Result:
    """One column an image: image, reconstruction, anomaly map, and the true mask as an outline.

    Args:
        images: (N, C, H, W) in [-1, 1].
        maps: anomaly maps (N, H, W); all share one colour scale.
        reconstructions: (N, C, H, W), or None for methods without any.
        masks: a bool array for each image, at any size, or None.
        titles: one for each image.
        scale: lowest and highest value of the colour scale; default, that of these maps.
        threshold: marked on the colour bar.
        caption: a sentence under the figure.

    Returns:
        the figure, and ``{"maps", "scale"}``.
    """
    n = len(images)
    rows = ["image", "reconstruction", "anomaly map"]
    if reconstructions is None:
        rows.remove("reconstruction")
    low, high = scale or (float(maps.min()), float(maps.max()))
    size = (1.35 * n + 1.1, 1.45 * len(rows) + 0.6)
    fig, axes = plt.subplots(len(rows), n, figsize=size, squeeze=False)
    for j in range(n):
        _draw(axes[0, j], images[j], titles[j] if titles else "")
        if reconstructions is not None:
            _draw(axes[1, j], reconstructions[j])
        _draw(axes[-1, j], np.zeros(maps.shape[1:]))
        shown = axes[-1, j].imshow(np.asarray(maps[j]), cmap=MAP_COLOURS, vmin=low, vmax=high)
        if masks is not None:
            _outline(axes[-1, j], masks[j], maps.shape[1:], "white")
    for i, name in enumerate(rows):
        axes[i, 0].set_ylabel(name, fontsize=10)
    bar = fig.colorbar(shown, ax=axes[-1, :], shrink=0.9, label="map value", extend="both")
    if threshold is not None and low < threshold < high:
        bar.ax.axhline(threshold, color="white", linewidth=2)
    _caption(fig, caption)
    return fig, {"maps": maps, "scale": (low, high)}


@styled
def show_kinds(data: AnomalyData, *, columns: int = 8, caption: str = "") -> Result:
    """A contact sheet of a test set: one row for each kind.

    Where masks are known, every anomalous image stands twice, plain and with its mask outlined.

    Args:
        data: any data set.
        columns: images of each kind.
        caption: a sentence under the figure.
    """
    kinds = sorted(set(data.defect_types), key=lambda kind: (kind != "good", kind))
    size = (1.35 * columns, 1.4 * len(kinds) + 0.3)
    fig, axes = plt.subplots(len(kinds), columns, figsize=size, squeeze=False)
    shown = {}
    for row, kind in zip(axes, kinds, strict=True):
        index = [i for i, found in enumerate(data.defect_types) if found == kind]
        masks = None if kind == "good" else data.test_masks
        shown[kind] = [data.test_ids[i] for i in index[: columns // (2 if masks else 1)]]
        for column, ax in enumerate(row):
            which = column // 2 if masks else column
            if which >= len(index):
                ax.axis("off")
                continue
            _draw(ax, data.test_images[index[which]])
            if masks and column % 2:
                _outline(ax, masks[index[which]], data.test_images.shape[-2:])
        row[0].set_ylabel(kind, fontsize=10)
    _caption(fig, caption)
    return fig, {"ids": shown}


@styled
def show_trajectory(steps: Sequence[Step], *, index: int = 0, count: int = 8) -> Result:
    """The states of a sampler for one image, and below each the clean image it predicts.

    Args:
        steps: what a sampler yielded.
        index: which image of the batch.
        count: how many states, spread evenly.
    """
    keep = np.unique(np.linspace(0, len(steps) - 1, min(count, len(steps))).round().astype(int))
    fig, axes = plt.subplots(2, len(keep), figsize=(1.35 * len(keep), 3.1), squeeze=False)
    for column, i in enumerate(keep):
        step = steps[i]
        label = "clean" if step.t < 0 else f"t = {step.t}"
        _draw(axes[0, column], step.x[index], label)
        if step.x0_hat is None:
            axes[1, column].axis("off")
        else:
            _draw(axes[1, column], step.x0_hat[index])
    axes[0, 0].set_ylabel(r"state $x_t$", fontsize=10)
    if len(keep) > 1:
        axes[1, 1].set_ylabel(r"estimate $\hat x_0$", fontsize=10)
    return fig, {"t": [steps[i].t for i in keep]}


@styled
def show_curves(
    x: ArrayLike,
    curves: Mapping[str, ArrayLike],
    *,
    xlabel: str,
    ylabel: str,
    title: str = "",
    log: str = "",
    markers: bool = False,
) -> Result:
    """Named curves over a common axis.

    Args:
        x: (n,).
        curves: name -> values (n,).
        xlabel: with its unit.
        ylabel: with its unit.
        title: of the figure.
        log: ``"x"``, ``"y"`` or ``"xy"`` for logarithmic axes.
        markers: mark the measured points.
    """
    fig, ax = plt.subplots(figsize=(6.2, 3.6))
    for i, (name, values) in enumerate(curves.items()):
        colour, line = COLOURS[i % len(COLOURS)], LINES[i % len(LINES)]
        marker = "os^Dv"[i % 5] if markers else None
        ax.plot(x, values, line, color=colour, label=name, linewidth=1.8, marker=marker)
    if "x" in log:
        ax.set_xscale("log")
    if "y" in log:
        ax.set_yscale("log")
    ax.set(xlabel=xlabel, ylabel=ylabel, title=title)
    if len(curves) > 1:
        ax.legend()
    return fig, {"x": x, **curves}


@styled
def show_scores(
    labels: ArrayLike,
    scores: ArrayLike,
    *,
    threshold: float | None = None,
    xlabel: str = "image score",
) -> Result:
    """Histograms of normal and anomalous scores, with the threshold.

    Args:
        labels: (n,), 0 normal, 1 anomalous.
        scores: (n,).
        threshold: drawn as a line.
        xlabel: what the score is.

    Returns:
        the figure, and the image metrics in the title.
    """
    labels, scores = np.asarray(labels), np.asarray(scores)
    metrics = image_metrics(labels, scores)
    bins = np.linspace(scores.min(), np.quantile(scores, 0.99), 31)
    fig, ax = plt.subplots(figsize=(6.2, 3.2))
    for label, name in enumerate(("normal", "anomalous")):
        values = scores[labels == label].clip(max=bins[-1])
        ax.hist(values, bins.tolist(), color=COLOURS[label], alpha=0.6 if label == 0 else 1,
                histtype="stepfilled" if label == 0 else "step", linewidth=2,
                label=f"{name} (n = {len(values)})")  # fmt: skip
    if threshold is not None:
        ax.axvline(threshold, color="black", linestyle="--", label="threshold")
    ax.set(xlabel=xlabel, ylabel="images", title=f"image AUROC {metrics['image_auroc']:.3f}")
    ax.legend()
    return fig, metrics


@styled
def show_bars(
    values: Mapping[str, float],
    intervals: Mapping[str, tuple[float, float]],
    *,
    xlabel: str,
    start: float = 0.5,
) -> Result:
    """Horizontal points with intervals, one row a name.

    Args:
        values: name -> value.
        intervals: name -> (low, high).
        xlabel: what the value is.
        start: left end of the axis, which gives way to lower intervals.
    """
    start = min(start, *(low - 0.02 for low, _ in intervals.values()))
    fig, ax = plt.subplots(figsize=(6.2, 0.45 * len(values) + 1.1))
    for row, (name, value) in enumerate(values.items()):
        low, high = intervals[name]
        ax.plot([low, high], [row, row], color=COLOURS[0], linewidth=2)
        ax.plot(value, row, "o", color=COLOURS[1])
        ax.text(1.01, row, f"{value:.3f}", va="center", transform=ax.get_yaxis_transform())
    ax.set_yticks(range(len(values)), list(values))
    ax.set_xlim(start, 1.0)
    ax.set(xlabel=xlabel)
    ax.invert_yaxis()
    return fig, {name: (values[name], *intervals[name]) for name in values}
