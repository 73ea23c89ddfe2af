"""Configuration of MDPS, and the official settings of each category."""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

from diffad_lite.config import Profile, check_ranges
from diffad_lite.features import LITE0
from diffad_lite.methods.anoddpm import AnoDDPMConfig, PriorConfig
from diffad_lite.training import TrainConfig


@dataclass(frozen=True)
class MDPSConfig(PriorConfig):
    """Configuration of :class:`MDPS`; defaults are the lite profile at 64 pixels.

    Attributes:
        residual_resampling: of the denoiser, see :class:`~diffad_lite.networks.UNet`.
        mode: how agreement is imposed: ``paper`` blends two noise estimates by the mask, so that
            pixels outside of it end as those of the picture; ``code`` replaces their state before
            each step, guides all pixels, and divides by one norm of the whole batch.
        noise_level: t that the picture is noised to in the second pass, 0 .. T-1.
        mask_level: likewise in the first pass, which finds the mask.
        steps: network evaluations of a pass, for one sample.
        guidance: w in the second pass, for an image's own norm; 0 needs no gradients.
        mask_guidance: w in the first pass.
        n_samples: posterior samples of the second pass, whose maps are averaged.
        mask: ``estimated`` in the first pass, or ``none``: every pixel is suspect, one pass.
        mask_quantile: of the first pass's values on normal pixels; above it a pixel is suspect.
        mask_sigma: blur of the first pass's map, in pixels.
        backbone: network for ImageNet whose features are compared.
        layers: of it.
        input_size: that it sees.
        pixel_weight: of the pixels' distance in the map, the features' having 1; eta in the code.
        score: ``mean`` of the largest values, as every method, or the paper's ``softmax`` over all
            pixels, of which the largest probabilities are summed.
    """

    standardise: bool = True  # chosen on development defects and uncertain cells, as what follows
    top_fraction: float = 0.03
    residual_resampling: bool = False
    mode: Literal["paper", "code"] = "paper"
    noise_level: int = 25
    mask_level: int = 25
    steps: int = 5
    guidance: float = 1.0
    mask_guidance: float = 1.0
    n_samples: int = 4
    mask: Literal["estimated", "none"] = "estimated"
    mask_quantile: float = 0.9
    mask_sigma: float = 1.0
    backbone: str = LITE0
    layers: tuple[str, ...] = ("2", "4", "7")
    input_size: int = 224
    pixel_weight: float = 7.0
    score: Literal["mean", "softmax"] = "mean"

    def __post_init__(self) -> None:
        """Raise ValueError for levels and counts that cannot be."""
        super().__post_init__()
        top = self.prior.num_timesteps - 1
        check_ranges(self, noise_level=(0, top), mask_level=(0, top), n_samples=(1, math.inf))
        check_ranges(self, steps=(1, 1 + min(self.noise_level, self.mask_level)))
        for name in ("guidance", "mask_guidance", "pixel_weight", "mask_sigma"):
            check_ranges(self, **{name: (0, math.inf)})
        check_ranges(self, mask_quantile=(0, 1), input_size=(32, math.inf))

    @property
    def first_stage(self) -> AnoDDPMConfig | None:
        """The denoiser's training, where the denoiser is AnoDDPM's."""
        return None if self.residual_resampling else super().first_stage

    @classmethod
    def for_profile(cls, profile: Profile, *, category: str | None = None, **shape: Any) -> Self:
        """``ci`` is a smoke test, ``lite`` the defaults; the sources of ``paper`` stand below."""
        base = super().for_profile(profile, category=category, **shape)
        if profile == "ci":
            return replace(base, steps=3, n_samples=2, input_size=64, layers=("2", "4"))
        if profile == "lite":
            return base
        # Official code, config/*.yaml, unet.py, train.py: 256 px, base 64, (1, 1, 2, 2, 4, 4),
        # two blocks, attention at 32, 16 and 8 px; Adam 3e-4, batch 8, 2000 epochs, no averaging
        # or flips; stride 20; one sample; the map blurred by 4 pixels. Ours differs: AdamW without
        # the code's weight decay of 0.05 in the gradient, gradients are clipped; as many steps in
        # the first pass as in the second, whatever its level; an image's own norm, for which w is
        # smaller by sqrt(8), the batch in the code; the mask's threshold from normal images.
        paper = PAPER_SETTINGS.get(category or "", PaperSetting())
        train = TrainConfig(
            steps=50_000, batch_size=8, learning_rate=3e-4, warmup_steps=0, ema_decay=0.0
        )
        own_norm = base.image_size / (256 * math.sqrt(8))
        return replace(
            base,
            standardise=False,
            prior=replace(base.prior, base_channels=64, attention_levels=(3, 4, 5), train=train),
            residual_resampling=True,
            noise_level=paper.noise_level,
            mask_level=paper.mask_level or paper.noise_level,
            mask="estimated" if paper.mask_level else "none",
            steps=max(1, paper.noise_level // 20),
            guidance=paper.guidance * own_norm,
            mask_guidance=paper.mask_guidance * own_norm,
            n_samples=1,
            mask_sigma=4.0,
            backbone="wide_resnet101_2",
            layers=("layer2", "layer3"),
            input_size=256,
            pixel_weight=paper.pixel_weight,
            score="softmax",
            calibrate=False,
            smooth_sigma=4.0,
            top_fraction=500 / 224**2,
        )


@dataclass(frozen=True)
class PaperSetting:
    """One row of the official configurations (KevinBHLin/MDPS, config/*.yaml).

    Attributes:
        pixel_weight: of the pixels' distance in the map, ``eta`` there.
        mask_guidance: w of the first pass, for the norm of a batch of 8 at 256 pixels.
        guidance: w of the second pass, likewise.
        mask_level: t of the first pass; 0 where there is none, as for textures.
        noise_level: t of the second pass.
    """

    pixel_weight: float = 7
    mask_guidance: float = 50
    guidance: float = 100
    mask_level: int = 200
    noise_level: int = 200


def _texture(noise_level: int = 200, pixel_weight: float = 7) -> PaperSetting:
    return PaperSetting(pixel_weight, 0, 100, 0, noise_level)


# The mask's threshold there is a fraction of the range of the test set's maps: not used here.
PAPER_SETTINGS = {
    # MVTec AD
    "carpet": _texture(250, 2),
    "grid": _texture(),
    "leather": _texture(),
    "wood": _texture(),
    "tile": _texture(150, 0),
    "bottle": PaperSetting(),
    "cable": PaperSetting(1, 50, 50, 250, 250),
    "capsule": PaperSetting(7, 100, 100, 200, 200),
    "hazelnut": PaperSetting(7, 50, 0, 250, 200),
    "metal_nut": PaperSetting(7, 50, 0, 250, 200),
    "pill": PaperSetting(7, 50, 100, 150, 200),
    "screw": PaperSetting(7, 50, 0, 200, 200),
    "toothbrush": PaperSetting(7, 50, 50, 250, 200),
    "transistor": PaperSetting(7, 50, 50, 200, 250),
    "zipper": PaperSetting(7, 0, 100, 200, 200),
    # BTAD
    "01": PaperSetting(7, 100, 150, 200, 250),
    "02": PaperSetting(7, 50, 200, 200, 250),
    "03": PaperSetting(7, 50, 50, 200, 250),
}
