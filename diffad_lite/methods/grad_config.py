"""Configuration of :mod:`.grad`: the lite profile by default, smaller ones, and an assumed one."""

import math
from dataclasses import dataclass, field, replace
from typing import Any, Self

from diffad_lite.config import Profile, check_ranges
from diffad_lite.methods.grad_weights import WeightConfig
from diffad_lite.methods.profiles import MethodConfig
from diffad_lite.readers import FLIP_AXES
from diffad_lite.schedules import BetaSchedule
from diffad_lite.training import TrainConfig


@dataclass(frozen=True)
class GRADConfig(MethodConfig):
    """Configuration of GRAD; defaults are the lite profile at 64 pixels.

    Attributes:
        beta_schedule: of the forward process.
        num_timesteps: T.
        blocks: one PatchDiff an entry; its receptive field has ``unshuffle (2 blocks + 1)`` pixels.
        width: of the PatchDiffs.
        unshuffle: side of their cells.
        train_patchdiff: how each is trained.
        n_patterns: pictures in the pool, of all PatchDiffs together: normal images of which each
            PatchDiff has drawn a window anew.
        steps: network evaluations for each of them.
        windows: range of the sides of these windows, as fractions of the image's.
        levels: range of the noise levels that they begin at, as fractions of T.
        twin_level: t that normal images are noised to and denoised from by each PatchDiff, to
            stand among the normal ones: so its touch alone is not what the detector learns.
        extra: convolutions that widen the detector's receptive field, 22 + 8 extra pixels.
        train: the detector, weights being 1 in the first third.
        reweight: give patterns their weights after it; on development defects it does harm.
        weights: how.
    """

    # Chosen on development defects and uncertain cells, as are windows, twins and no weights:
    standardise: bool = True
    calibrate: bool = False
    beta_schedule: BetaSchedule = "linear"
    num_timesteps: int = 1000
    blocks: tuple[int, ...] = (2, 4)
    width: int = 48
    unshuffle: int = 2
    train_patchdiff: TrainConfig = field(
        default_factory=lambda: TrainConfig(steps=1500, learning_rate=2e-3, ema_decay=0.995)
    )
    n_patterns: int = 256
    steps: int = 40
    windows: tuple[float, ...] = (0.0625, 0.75)
    levels: tuple[float, ...] = (0.2, 1.0)
    twin_level: int = 30
    extra: int = 2
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=1500, batch_size=24, learning_rate=1e-3, ema_decay=0.995
        )
    )
    reweight: bool = False
    weights: WeightConfig = field(default_factory=WeightConfig)

    def __post_init__(self) -> None:
        """Raise ValueError for counts and ranges that cannot be."""
        super().__post_init__()
        check_ranges(self, num_timesteps=(1, math.inf), n_patterns=(1, math.inf))
        check_ranges(self, steps=(1, self.num_timesteps), extra=(0, 100))
        check_ranges(self, twin_level=(0, self.num_timesteps - 1))
        for name in ("windows", "levels"):
            ends = getattr(self, name)
            if len(ends) != 2 or not 0 < ends[0] <= ends[1] <= 1:
                raise ValueError(f"GRADConfig.{name} must be (low, high) within 0..1, got {ends}")
        if not self.blocks or min(self.blocks) < 1 or len(set(self.blocks)) < len(self.blocks):
            raise ValueError(
                f"GRADConfig.blocks are different numbers from 1 on, got {self.blocks}"
            )
        if self.image_size % math.lcm(4, self.unshuffle):
            raise ValueError(
                f"GRADConfig.image_size must be a multiple of {math.lcm(4, self.unshuffle)}, the "
                f"detector's and the PatchDiffs' cells, got {self.image_size}"
            )

    @classmethod
    def for_profile(cls, profile: Profile, *, dataset: str | None = None, **shape: Any) -> Self:
        """``ci`` is a smoke test, ``lite`` the defaults, ``paper`` is assumed field by field."""
        base = super().for_profile(profile, dataset=dataset, **shape)
        flips = FLIP_AXES.get(dataset or "", ())
        if profile == "ci":
            short = TrainConfig(steps=20, batch_size=8, flip_axes=flips)
            smoke: dict[str, Any] = {
                "blocks": (1, 2),
                "width": 16,
                "train_patchdiff": short,
                "train": short,
            }
            return replace(base, **smoke, n_patterns=16, steps=4, weights=WeightConfig(4))
        stages = {
            name: replace(getattr(base, name), flip_axes=flips)
            for name in ("train_patchdiff", "train")
        }
        if profile == "lite":
            return replace(base, **stages)
        # Assumed, all of it: the paper could not be read. 256 px; receptive fields of about 1/16,
        # 1/8 and 1/4 of the side; T = 1000, linear; the learning rate of SinDiffusion's public
        # code, a related model of patches; a pool and a number of clusters larger than ours.
        return replace(
            base,
            standardise=False,
            blocks=(3, 7, 15),
            width=96,
            train_patchdiff=TrainConfig(steps=50_000, learning_rate=5e-4, flip_axes=flips),
            n_patterns=1024,
            steps=50,
            extra=8,
            train=TrainConfig(20_000, 24, 5e-4, flip_axes=flips),
            reweight=True,
            weights=WeightConfig(128),
            smooth_sigma=4.0,
        )
