"""Sliders over pictures that were made beforehand, with a printed fallback.

``explore`` renders nothing while a slider moves: it swaps images that were drawn once. Without a
live front end (continuous integration, a printed page) the same call shows a contact sheet.
"""

import io
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
from IPython import get_ipython
from IPython.display import Image, display
from matplotlib.figure import Figure

from diffad_lite.plots import Result

MAX_FRAMES = 400


def is_live() -> bool:
    """Whether a person can move a slider: a notebook kernel, and not an unattended run.

    Unattended runs are told by the environment variables ``CI`` and ``DIFFAD_STATIC``;
    ``diffad notebooks`` sets the latter.
    """
    unattended = os.environ.get("CI") or os.environ.get("DIFFAD_STATIC")
    return not unattended and getattr(get_ipython(), "kernel", None) is not None


def render_png(figure: Figure) -> bytes:
    """A figure as PNG bytes; the figure is closed."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90)
    plt.close(figure)
    return buffer.getvalue()


def explore(
    render: Callable[..., Result], *, static: Sequence[Mapping[str, Any]] = (), **controls: Sequence
) -> None:
    """Show ``render(**values)`` with one slider for each control.

    Args:
        render: returns (figure, data), as the functions of :mod:`diffad_lite.plots` do.
        static: settings shown one below the other where there is no front end; default, the
            middle of every control.
        controls: name -> the values its slider takes; all combinations are drawn beforehand.

    Raises:
        ValueError: no control, an empty one, or too many combinations.
    """
    if not controls or not all(len(values) for values in controls.values()):
        raise ValueError("explore needs at least one control, each with at least one value")
    combinations = list(itertools.product(*controls.values()))
    if len(combinations) > MAX_FRAMES:
        raise ValueError(
            f"{len(combinations)} combinations are too many to draw beforehand (at most "
            f"{MAX_FRAMES}); give fewer values for: {', '.join(controls)}"
        )
    if not is_live():
        middle = {name: values[len(values) // 2] for name, values in controls.items()}
        for values in static or [middle]:
            display(Image(render_png(render(**values)[0])))
        return
    frames = {c: render_png(render(**dict(zip(controls, c, strict=True)))[0]) for c in combinations}
    _show_sliders(frames, controls)


def _show_sliders(frames: Mapping[tuple, bytes], controls: Mapping[str, Sequence]) -> None:
    """The live form: sliders above one image widget."""
    import ipywidgets

    sliders = [
        ipywidgets.SelectionSlider(
            options=list(values), value=values[len(values) // 2], description=name
        )
        for name, values in controls.items()
    ]
    picture = ipywidgets.Image(format="png")

    def swap(change: Any = None) -> None:
        picture.value = frames[tuple(slider.value for slider in sliders)]

    for slider in sliders:
        slider.observe(swap, names="value")
    swap()
    display(ipywidgets.VBox([*sliders, picture]))
