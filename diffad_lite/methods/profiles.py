"""What every method is configured by, and the profiles that scale it."""

from dataclasses import dataclass
from typing import Self, get_args

from diffad_lite.config import Profile, unknown_name


@dataclass(frozen=True)
class MethodConfig:
    """What every method is configured by.

    Attributes:
        channels: of the images, 1, 3 or 4.
        image_size: side in pixels that the networks were designed for; other sizes also run.
        smooth_sigma: standard deviation, in pixels, of the Gaussian blur of the raw map; 0 = none.
        calibrate: whether maps are standardised by position (mean and deviation over normals).
        top_fraction: the image score is the mean of this fraction of the largest map values.
        quantile: of the calibration scores, where the threshold of "anomalous" is put.
    """

    channels: int = 1
    image_size: int = 64
    smooth_sigma: float = 1.0
    calibrate: bool = True
    top_fraction: float = 0.01
    quantile: float = 0.95

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
        if profile not in get_args(Profile):
            raise unknown_name("profile", profile, get_args(Profile))
        return cls(channels=channels, image_size=image_size)
