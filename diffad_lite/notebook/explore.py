"""Sliders over figures that are drawn in advance, with printed figures as fallback.

Moving a slider neither computes nor draws anything: the browser holds all figures and shows another
one. :func:`explore_planting`, which must compute, waits for a button. Without a live front end
(continuous integration, a printed page) the same calls print a few figures.
"""

import io
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ipywidgets
import matplotlib.pyplot as plt
import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from IPython import get_ipython
from IPython.display import Image, display
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from diffad_lite.data.images import image_keys, resize_image, to_float
from diffad_lite.data.planting import KINDS, plant_defect
from diffad_lite.methods.base import Method
from diffad_lite.plots import MAP_COLOURS, Result, draw_colour_bar, styled, to_pixels

MAX_FRAMES = 400
TILE = 128 / 90  # width of a picture in inches; at 90 dpi, 64 pixels are drawn as 128
PLACES = {"top left": (0.2, 0.2), "top right": (0.2, 0.8), "middle": (0.5, 0.5)}  # row, column
PLACES |= {"bottom left": (0.8, 0.2), "bottom right": (0.8, 0.8)}
SIZES = (0.3, 0.5, 0.7, 1.0)
SEVERITIES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
FIT = {"max_width": "100%", "align_self": "flex-start"}  # the figure's size, or the cell's width
DRAWS = 24  # random defects of which the nearest to the requested place is planted


def is_live() -> bool:
    """Return whether a person can move a slider.

    This needs a kernel, and neither ``CI`` nor ``DIFFAD_STATIC`` in the environment;
    ``diffad notebooks`` sets the latter.
    """
    unattended = os.environ.get("CI") or os.environ.get("DIFFAD_STATIC")
    return not unattended and getattr(get_ipython(), "kernel", None) is not None


def render_png(figure: Figure, data: Mapping[str, Any] | None = None) -> bytes:
    """Return a figure as PNG bytes, with few colours if ``data["grey"]``, and close it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90)
    plt.close(figure)
    if (data or {}).get("grey"):
        greys = np.repeat(np.r_[0:249:4, 255][:, None], 3, axis=1)  # Pillow compares 6 bits
        maps = plt.get_cmap(MAP_COLOURS)(np.linspace(0, 1, 192), bytes=True)[:, :3]
        palette = PIL.Image.new("P", (1, 1))
        palette.putpalette(np.concatenate([greys, maps]).astype(np.uint8).tobytes())
        image = PIL.Image.open(buffer).convert("RGB")
        image = image.quantize(palette=palette, dither=PIL.Image.Dither.NONE)
        image.save(buffer := io.BytesIO(), format="png")
    return buffer.getvalue()


def explore(
    render: Callable[..., Result], *, static: Sequence[Mapping[str, Any]] = (), **controls: Sequence
) -> None:
    """Show the figure ``render(**values)`` with one slider for each control.

    Args:
        render: returns (figure, data), as the functions of :mod:`diffad_lite.plots` do.
        static: settings printed without a front end; default, the middle value of each control.
        controls: name -> values of its slider; all combinations are drawn in advance.

    Raises:
        ValueError: no control, a control without values, or too many combinations.
    """
    if not controls or not all(len(values) for values in controls.values()):
        raise ValueError(
            f"explore needs at least one control, each with at least one value, got {controls}"
        )
    combinations = list(itertools.product(*controls.values()))
    if len(combinations) > MAX_FRAMES:
        raise ValueError(
            f"{len(combinations)} combinations are too many to draw in advance (at most "
            f"{MAX_FRAMES}); give fewer values for: {', '.join(controls)}"
        )
    if not is_live():
        middle = {name: values[len(values) // 2] for name, values in controls.items()}
        for values in static or [middle]:
            display(Image(render_png(*render(**values))))
        return
    bar = ipywidgets.IntProgress(max=len(combinations), description="drawing")
    display(box := ipywidgets.VBox([bar]))
    frames = {}
    for chosen in combinations:
        frames[chosen] = render_png(*render(**dict(zip(controls, chosen, strict=True))))
        bar.value += 1
    sliders = [_slider(name, values) for name, values in controls.items()]
    box.children = [*sliders, _stack(sliders, frames)]
    bar.close()


def _stack(sliders: Sequence, frames: Mapping[tuple, bytes], *values: Any) -> ipywidgets.Widget:
    """Stack all frames and show the one that the sliders choose.

    The link between them is in the browser, so that a busy kernel does not delay it.
    """
    if not sliders:
        return ipywidgets.Image(value=frames[values], format="png", layout=FIT)
    first, *others = sliders
    children = [_stack(others, frames, *values, value) for value in first.options]
    stack = ipywidgets.Stack(children, selected_index=first.index)
    ipywidgets.jslink((first, "index"), (stack, "selected_index"))
    return stack


def _slider(name: str, values: Sequence, start: Any = None) -> ipywidgets.Widget:
    """Return a slider over values, or a list for names; arrow keys move both."""
    start = values[len(values) // 2] if start is None else start
    kind = ipywidgets.Dropdown if isinstance(start, str) else ipywidgets.SelectionSlider
    return kind(options=list(values), value=start, description=name)


@styled
def show_grid(
    rows: Sequence[Sequence[ArrayLike]],
    titles: Sequence[Sequence[str]],
    *,
    scale: tuple[float, float] = (0.0, 1.0),
    threshold: float | None = None,
    label: str = "map value",
    masks: Sequence[np.ndarray | None] = (),
) -> Result:
    """Show rows of small pictures: images in grey, maps in colour with one scale.

    All pictures are drawn in one axes, because explorers draw hundreds of such figures.

    Args:
        rows: images (C, H, W) in [-1, 1] and maps (H, W), all of one size.
        titles: one for each picture, in the same form.
        scale: lowest and highest value of the colour scale.
        threshold: marked on the colour bar.
        label: of the colour bar.
        masks: for each row, a bool array of any size to outline on its maps, or None.

    Returns:
        the figure, and ``{"scale", "grey"}``: whether every image is grey.
    """
    H, W = np.shape(rows[0][0])[-2:]
    h, w = H + H // 6, W + max(1, W // 16)  # with the title, and the gap to the next picture
    grid = np.ones((len(rows) * h, len(rows[0]) * w, 3))
    outline = np.zeros(grid.shape[:2])
    colours = ScalarMappable(Normalize(*scale), MAP_COLOURS)
    inch, with_maps = TILE / W, any(np.ndim(x) == 2 for row in rows for x in row)
    size = inch * grid.shape[1] + 0.9 * with_maps, inch * grid.shape[0]
    fig = plt.figure(figsize=size, layout="none")
    ax = fig.add_axes((0, 0, inch * grid.shape[1] / size[0], 1))
    for i, row in enumerate(rows):
        for j, x in enumerate(row):
            tile = np.s_[(i + 1) * h - H : (i + 1) * h, j * w : j * w + W]
            if np.ndim(x) == 3:
                grid[tile] = np.atleast_3d(to_pixels(x))
            else:
                grid[tile] = colours.to_rgba(np.asarray(x))[..., :3]
                if masks and masks[i] is not None:
                    mask = torch.from_numpy(np.asarray(masks[i], np.float32))
                    mask = F.adaptive_max_pool2d(mask[None], (H, W))
                    outline[tile] = F.max_pool2d(mask, 5, 1, 2)[0]  # 2 pixels wider
            ax.text(j * w + W / 2, i * h + h - H - 2, titles[i][j], fontsize=9, ha="center")
    ax.imshow(grid)
    if outline.any():
        for colour, width in (("black", 1.6), ("white", 0.7)):  # visible on dark and bright maps
            ax.contour(outline, [0.5], colors=colour, linewidths=width)
    ax.axis("off")
    if with_maps:
        bar_axes = fig.add_axes((1 - 0.8 / size[0], 0.1, 0.12 / size[0], 0.7))
        bar = draw_colour_bar(fig, colours, threshold, cax=bar_axes, extend="max", label=label)
        bar.ax.tick_params(labelsize=9)
    return fig, {"scale": scale, "grey": all(np.shape(x)[0] != 3 for row in rows for x in row)}


def plant_at(
    image: np.ndarray, kind: str, *, place: Sequence[float], size: float, severity: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Plant a defect in a window of an image: of several random ones, the nearest to ``place``.

    Args:
        image: uint8 (C, H, W), at least 16 pixels a side.
        kind: see :data:`diffad_lite.data.planting.KINDS`.
        place: (row, column) as fractions of the image's height and width.
        size: side of the window as a fraction of the image; the defect's lengths scale with it.
        severity: in (0, 2].

    Returns:
        the image with the defect, and its mask, bool (H, W).

    Raises:
        ValueError: a fraction is out of range, or ``plant_defect`` refuses the defect.
    """
    if not (0 < size <= 1 and 0 <= min(place) <= max(place) <= 1):
        raise ValueError(f"place and size must be fractions in 0..1, got {place} and {size}")
    shape, centre = np.array(image.shape[-2:]), np.asarray(place)
    sides = (size * shape).round().astype(int).clip(min(16, *shape), shape)
    corner = (centre * shape - sides / 2).round().astype(int).clip(0, shape - sides)
    window = tuple(slice(a, a + n) for a, n in zip(corner, sides, strict=True))
    part = image[:, *window]
    defects = [plant_defect(part, kind, seed=s, severity=severity) for s in range(DRAWS)]
    target = centre * shape - corner
    distances = [np.hypot(*(np.argwhere(mask).mean(0) - target)) for _, mask in defects]
    planted, mask = image.copy(), np.zeros(tuple(shape), bool)
    planted[:, *window], mask[window] = defects[int(np.argmin(distances))]
    return planted, mask


def in_units(values: torch.Tensor, method: Method) -> torch.Tensor:
    """Rescale scores or map values: 0 is the median normal score, 1 is the threshold.

    The map is linear and increasing, fixed by calibration images: order and decisions stay.
    """
    assert method.calibration_scores_ is not None and method.threshold_ is not None  # fitted
    median = float(np.median(method.calibration_scores_))
    return (values - median) / max(method.threshold_ - median, 1e-12)


def show_planted(
    image: np.ndarray, methods: Mapping[str, Method], *, tick: Callable = str, **defect: Any
) -> Result:
    """Show the maps of several methods for a planted defect, above those for the clean image.

    Args:
        image: normal image, uint8 (C, H, W).
        methods: name -> fitted method, all for one image size.
        tick: called with the name of each method before it starts.
        defect: see :func:`plant_at`.

    Returns:
        the figure, and ``{"scores"}``: name -> (with the defect, without), see :func:`in_units`.
    """
    planted, mask = plant_at(image, **defect)
    side = next(iter(methods.values())).config.image_size
    pair = to_float(np.stack([resize_image(x, side, "squash") for x in (planted, image)]))
    keys = 2 * image_keys(pair[1:])  # the same noise for both images
    rows, titles, scores = [[x] for x in pair], [[defect["kind"]], ["without"]], {}
    for name, method in methods.items():
        tick(name)
        prediction = method.predict(pair, keys=keys)
        scores[name] = tuple(in_units(prediction.image_score, method).tolist())
        for i, score in enumerate(scores[name]):
            rows[i].append(in_units(prediction.anomaly_map[i], method))
            titles[i].append(f"{name} {score:.2f}")
    label, masks = "0: usual normal score; 1: threshold", [mask, None]
    fig, data = show_grid(rows, titles, scale=(0, 1.5), threshold=1, label=label, masks=masks)
    return fig, data | {"scores": scores}


def explore_planting(
    images: Mapping[str, np.ndarray],
    methods: Mapping[str, Method],
    *,
    kinds: Sequence[str] = KINDS["cells"],
    static: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Let a person choose an image and a defect, and show the maps of every method.

    Args:
        images: name -> normal image, uint8 (C, H, W), at its original size.
        methods: see :func:`show_planted`.
        kinds: of defects to choose from.
        static: changes to the first choice; each is printed if there is no front end.
    """
    choices: dict[str, Sequence] = {"image": list(images), "kind": kinds, "place": list(PLACES)}
    choices |= {"size": SIZES, "severity": SEVERITIES}
    first = {"image": choices["image"][0], "kind": kinds[0], "place": "middle"}
    first |= {"size": 0.7, "severity": 1.0}

    def render(tick: Callable = str, **chosen: Any) -> bytes:
        image, place = images[chosen.pop("image")], PLACES[chosen.pop("place")]
        return render_png(*show_planted(image, methods, tick=tick, place=place, **chosen))

    if not is_live():
        for changes in static or [{}]:
            display(Image(render(**{**first, **changes})))
        return
    widgets = {name: _slider(name, values, first[name]) for name, values in choices.items()}
    button = ipywidgets.Button(description="Plant and score", button_style="primary")
    bar, note = ipywidgets.IntProgress(max=len(methods)), ipywidgets.Label()
    picture = ipywidgets.Image(format="png", layout=FIT)

    def tick(name: str) -> None:
        note.value, bar.value = name, bar.value + 1

    def press(_: Any = None) -> None:
        button.disabled, bar.value = True, 0
        try:
            picture.value = render(tick, **{name: w.value for name, w in widgets.items()})
            note.value = "done"
        except Exception as error:  # a front end does not show the error of a callback
            note.value = f"{type(error).__name__}: {error}"
            raise
        finally:
            button.disabled = False

    button.on_click(press)
    press()
    display(ipywidgets.VBox([*widgets.values(), ipywidgets.HBox([button, bar, note]), picture]))
