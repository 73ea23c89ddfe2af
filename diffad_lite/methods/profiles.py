"""What every method is configured by, and the profiles that scale it."""

import math
from dataclasses import dataclass
from typing import Self

from diffad_lite.config import Profile, check_profile, check_ranges


@dataclass(frozen=True)
class MethodConfig:
    """What every method is configured by.

    Attributes:
        channels: of the images, 1, 3 or 4.
        image_size: side in pixels that the networks were designed for; other sizes also run.
        standardise: bring each image to mean 0 and one deviation first; what an image's
            brightness and contrast could tell is then lost.
        smooth_sigma: standard deviation, in pixels, of the Gaussian blur of the raw map; 0 = none.
        calibrate: whether maps are standardised by position (mean and deviation over normals).
        top_fraction: the image score is the mean of this fraction of the largest map values.
        quantile: of the calibration scores, where the threshold of "anomalous" is put.
    """

    channels: int = 1
    image_size: int = 64
    standardise: bool = False
    smooth_sigma: float = 1.0
    calibrate: bool = True
    top_fraction: float = 0.01
    quantile: float = 0.95

    def __post_init__(self) -> None:
        """Raise ValueError for values that cannot be, before a training, not after it."""
        if self.channels not in (1, 3, 4):
            raise ValueError(f"expected images of 1, 3 or 4 channels, got {self.channels}")
        ranges = {"smooth_sigma": (0, math.inf), "top_fraction": (1e-6, 1)}
        check_ranges(self, **ranges, quantile=(0.001, 0.999), image_size=(1, math.inf))

    @property
    def first_stage(self) -> "MethodConfig | None":
        """Configuration of AnoDDPM, if its whole training is the first stage of this method's."""
        return None

    @classmethod
    def for_profile(
        cls,
        profile: Profile,
        *,
        channels: int,
        image_size: int,
        dataset: str | None = None,
        category: str | None = None,
    ) -> Self:
        """The configuration of a profile; here the same for all, methods that train refine it.

        Args:
            profile: ``ci``, ``lite`` or ``paper``.
            channels: of the images.
            image_size: side in pixels.
            dataset: whose settings to take, where a method has any.
            category: likewise.

        Raises:
            ValueError: unknown profile.
        """
        check_profile(profile)
        return cls(channels=channels, image_size=image_size)
