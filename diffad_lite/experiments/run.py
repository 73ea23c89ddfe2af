"""One run: its fields, its data, its configuration, and their hash."""

from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Any

from pydantic import Field

from diffad_lite.core.config import (
    Profile,
    config_hash,
    configuration,
    override,
    short_repr,
    to_dict,
)
from diffad_lite.data.datasets import AnomalyData, load_dataset
from diffad_lite.data.images import Resize
from diffad_lite.data.source import check_inside
from diffad_lite.methods.base import MethodConfig, get_method

CI_TEST_IMAGES = 32


@configuration
class Run:
    """Fields of one run. Two runs with equal fields and code give the same numbers.

    Attributes:
        method: name in the registry.
        dataset: see :func:`~diffad_lite.data.datasets.load_dataset`, as the next five.
        category: None is the data set's default.
        root: folder of the images.
        image_size: side in pixels; None is 256 for the paper profile and 64 for the others.
        resize: ``squash`` or ``pad``.
        plant: family of planted defects, or None for the real test set.
        profile: ``ci``, ``lite`` or ``paper``.
        seed: of training.
        variant: a name for ``settings`` in tables.
        training: a name for settings that change the training, not only the scoring; empty for
            the profile's training.
        settings: configuration fields to override, dotted name -> JSON text.
    """

    method: str
    dataset: str = "elpv"
    category: str | None = None
    root: str | None = None
    image_size: int | None = None
    resize: Resize = "squash"
    plant: str | None = None
    profile: Profile = "lite"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0  # what scikit-learn takes
    variant: str = "default"
    training: str = ""
    settings: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Fill in the image size; raise ValueError for a seed, or for names that cannot be.

        Folders are called after them, and must not leave the folder of all runs.
        """
        object.__setattr__(self, "image_size", self.side)
        for name in ("method", "dataset", "resize", "variant", "training"):
            value = getattr(self, name)
            empty = not value and name != "training"
            if empty or value in (".", "..") or set(value) & set("/\\\0"):
                raise ValueError(f"{name} must be a name without slashes, got {short_repr(value)}")
        check_inside(self.category or "", "category")

    @property
    def side(self) -> int:
        """The images' side in pixels: ``image_size``, or the profile's default."""
        if self.image_size is None:
            return 256 if self.profile == "paper" else 64
        return self.image_size

    def load_data(self) -> AnomalyData:
        """Load the data of this run; the ci profile scores few images."""
        data = load_dataset(
            self.dataset,
            self.category,
            root=self.root,
            image_size=self.side,
            resize=self.resize,
            plant=self.plant,
        )
        return data.subset(CI_TEST_IMAGES) if self.profile == "ci" else data

    def configure(self, data: AnomalyData) -> MethodConfig:
        """Return the method's configuration: the profile's, with this run's settings."""
        return self.configure_for(data.info)

    def configure_for(self, info: Mapping[str, Any]) -> MethodConfig:
        """Do the same from the ``channels``, ``category`` and ``flip_axes`` of a data set alone."""
        known = {key: info[key] for key in ("channels", "category", "flip_axes")}
        config = get_method(self.method).Config.for_profile(
            self.profile, image_size=self.side, dataset=self.dataset, **known
        )
        return override(config, self.settings)


def run_hash(run: Run, config: Mapping[str, Any]) -> str:
    """Return a hash that identifies a run and its full configuration."""
    return config_hash(fields_of(run) | {"config": config})


def fields_of(run: Run) -> dict[str, Any]:
    """Return a run's fields, except paths and what the configuration already holds."""
    omitted = {"root", "settings"} | (set() if run.training else {"training"})
    return {k: v for k, v in to_dict(run).items() if k not in omitted}
