"""The figures of the course; each function returns a figure and the data that it shows.

All figures have one style: grey images, one colour scale for all maps, units on every axis, and the
Okabe-Ito palette, which colour-blind readers and grey print can distinguish. Importing this module
does not change matplotlib; :func:`use_style` applies the style to all later figures.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from itertools import zip_longest
from typing import Any, ParamSpec

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar
from matplotlib.colors import Normalize
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
    """Apply the style of the course to all later figures of this process."""
    plt.rcParams.update(STYLE)


def styled(draw: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Decorate a function so that it draws in the style of the course, and restores the old one."""

    @wraps(draw)
    def draw_in_style(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        # Not rc_context: it would also restore what a back end sets at its first figure.
        before = {key: plt.rcParams[key] for key in STYLE}
        plt.rcParams.update(STYLE)
        try:
            return draw(*args, **kwargs)
        finally:
            plt.rcParams.update(before)

    return draw_in_style


def to_pixels(image: ArrayLike) -> np.ndarray:
    """Return an image (C, H, W) or (H, W) in [-1, 1] as imshow takes it, in [0, 1].

    Of four channels the first is shown.
    """
    pixels = (np.asarray(image, dtype=np.float64).clip(-1, 1) + 1) / 2
    if pixels.ndim == 3:
        pixels = pixels.transpose(1, 2, 0) if len(pixels) == 3 else pixels[0]
    return pixels


def draw_colour_bar(
    fig: Figure, maps: ScalarMappable, threshold: float | None = None, **options: Any
) -> Colorbar:
    """Draw the colour scale of anomaly maps; a white line marks a threshold inside of it."""
    bar = fig.colorbar(maps, **options)
    low, high = bar.ax.get_ylim()
    if threshold is not None and low < threshold < high:
        bar.ax.axhline(threshold, color="white", linewidth=2)
    return bar


def _draw_gallery(
    rows: Sequence[Any],
    titles: Iterable[str] = (),
    labels: Iterable[str] = (),
    *,
    columns: int,
    size: tuple[float, float],
) -> tuple[Figure, np.ndarray]:
    """Draw a grid of labelled images; return the figure and its axes (rows, columns).

    Args:
        rows: of images for :func:`to_pixels`; None and places behind a short row stay empty.
        titles: of the first images.
        labels: one for each row, left of its first image.
        columns: length of the longest row, or more.
        size: width and height of the figure in inches.
    """
    fig, axes = plt.subplots(len(rows), columns, figsize=size, squeeze=False)
    titles = iter(titles)
    for row_axes, row, label in zip_longest(axes, rows, labels, fillvalue=""):
        for ax, image in zip_longest(row_axes, row):
            if image is None:
                ax.axis("off")
                continue
            ax.imshow(to_pixels(image), "gray", Normalize(0, 1))
            ax.set(xticks=[], yticks=[])
            ax.set_title(next(titles, ""), fontsize=10)
            ax.set_ylabel(label, fontsize=10)
            label = ""
    return fig, axes


def _outline(ax: Axes, mask: np.ndarray | None, colour: str) -> None:
    """Outline a mask of any size on the image in ``ax``; None and an empty mask have no outline."""
    if mask is None or not mask.any():
        return
    shape = ax.images[0].get_size()
    # Pixel centres of the mask, and its edges, in the coordinates of the image; 0 outside.
    centres = [(np.arange(N) + 0.5) * n / N - 0.5 for n, N in zip(shape, mask.shape, strict=True)]
    y, x = (np.r_[-0.5, c, n - 0.5] for c, n in zip(centres, shape, strict=True))
    ax.contour(x, y, np.pad(mask, 1), [0.5], colors=colour, linewidths=1)


@styled
def show_images(
    images: Tensor | Sequence[ArrayLike],
    titles: Sequence[str] | None = None,
    *,
    columns: int = 8,
) -> Result:
    """Show a grid of images.

    Args:
        images: (N, C, H, W) in [-1, 1], or a sequence of such images.
        titles: one for each image.
        columns: at most.
    """
    columns = min(columns, len(images))
    rows = [images[i : i + columns] for i in range(0, len(images), columns)]
    size = (1.35 * columns, (1.6 if titles else 1.4) * len(rows))
    fig, _ = _draw_gallery(rows, titles or (), columns=columns, size=size)
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
    """Show a column for each image: image, reconstruction, anomaly map with the mask's outline.

    Args:
        images: (N, C, H, W) in [-1, 1].
        maps: anomaly maps (N, H, W); all share one colour scale.
        reconstructions: (N, C, H, W), or None for methods without any.
        masks: the ground truth, a bool array of any size for each image, or None.
        titles: one for each image.
        scale: lowest and highest value of the colour scale; default, that of these maps.
        threshold: marked on the colour bar.
        caption: a sentence under the figure.

    Returns:
        the figure, and ``{"maps", "scale"}``.
    """
    n = len(images)
    rows = {"image": images, "reconstruction": reconstructions, "anomaly map": images}
    rows = {label: row for label, row in rows.items() if row is not None}
    size = (1.35 * n + 1.1, 1.45 * len(rows) + 0.6)
    fig, axes = _draw_gallery([*rows.values()], titles or (), rows, columns=n, size=size)
    scale = scale or (float(maps.min()), float(maps.max()))
    for j, ax in enumerate(axes[-1]):
        drawn = ax.imshow(np.asarray(maps[j]), MAP_COLOURS, Normalize(*scale))  # over the image
        _outline(ax, None if masks is None else masks[j], "white")
    bar = {"shrink": 0.9, "label": "map value", "extend": "both"}
    draw_colour_bar(fig, drawn, threshold, ax=axes[-1], **bar)
    if caption:
        fig.supxlabel(caption, fontsize=10)
    return fig, {"maps": maps, "scale": scale}


@styled
def show_kinds(data: AnomalyData) -> Result:
    """Show a contact sheet of a test set: one row of eight pictures for each kind.

    Where masks are known, every anomalous image is shown twice: plain, and with its mask outlined.

    Returns:
        the figure, and ``{"ids"}``: kind -> the images shown.
    """
    columns, rows, shown = 8, [], {}
    for kind in sorted(set(data.defect_types), key=lambda kind: (kind != "good", kind)):
        copies = 2 if data.test_masks and kind != "good" else 1
        indices = [i for i, name in enumerate(data.defect_types) if name == kind]
        shown[kind] = indices[: columns // copies]
        rows.append([data.test_images[i] for i in shown[kind] for _ in range(copies)])
    size = (1.35 * columns, 1.4 * len(rows) + 0.3)
    fig, axes = _draw_gallery(rows, labels=shown, columns=columns, size=size)
    for row_axes, (kind, indices) in zip(axes, shown.items(), strict=True):
        if data.test_masks and kind != "good":
            for ax, i in zip(row_axes[1::2], indices, strict=False):
                _outline(ax, data.test_masks[i], COLOURS[4])
    return fig, {"ids": {kind: [data.test_ids[i] for i in shown[kind]] for kind in shown}}


@styled
def show_trajectory(steps: Sequence[Step]) -> Result:
    """Show a sampler's states of the first image, each above the clean image that it predicts.

    Args:
        steps: all steps of the sampler, of which at most eight are shown, evenly spaced.

    Returns:
        the figure, and ``{"t"}``: the timesteps shown.
    """
    shown = [steps[i] for i in np.unique(np.linspace(0, len(steps) - 1, 8).round().astype(int))]
    states = [step.x[0] for step in shown]
    estimates = [None if step.x0_hat is None else step.x0_hat[0] for step in shown]
    titles = ["clean" if step.t < 0 else f"t = {step.t}" for step in shown]
    size = (1.35 * len(shown), 3.1)
    labels = [r"state $x_t$", r"estimate $\hat x_0$"]
    fig, _ = _draw_gallery([states, estimates], titles, labels, columns=len(shown), size=size)
    return fig, {"t": [step.t for step in shown]}


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
    """Show named curves over a common axis.

    Args:
        x: (n,).
        curves: name -> values (n,).
        xlabel, ylabel: labels of the axes, with units.
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
    """Show histograms of normal and anomalous scores, with the threshold.

    Args:
        labels: (n,), 0 normal, 1 anomalous.
        scores: (n,).
        threshold: drawn as a line, or None.
        xlabel: name of the score.

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
    """Show values with their intervals, one row per name.

    Args:
        values: name -> value.
        intervals: name -> (low, high).
        xlabel: name of the value.
        start: left end of the axis, unless an interval starts below it.
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
