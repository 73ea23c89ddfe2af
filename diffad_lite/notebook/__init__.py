"""Explorers with sliders for the lessons, and the runner that executes all lessons."""

from diffad_lite.notebook.explore import PLACES, explore, explore_planting, plant_at, show_grid
from diffad_lite.notebook.runner import resolve_profile, run_notebooks

__all__ = [
    "PLACES",
    "explore",
    "explore_planting",
    "plant_at",
    "resolve_profile",
    "run_notebooks",
    "show_grid",
]
