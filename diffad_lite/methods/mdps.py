"""MDPS (Wu et al. 2024): many normal images that agree with the picture where it is not suspect.

Detection as an inverse problem. The picture y is a normal image x_0 of which the pixels under a
mask m are spoiled by unknown noise (paper, eq. 7): ``y = (1 - m) x_0 + m (x_0 + noise)``. A first
pass finds the mask; then several samples of ``p(x_0 | y, m)`` are drawn by guided diffusion, and
their differences to y are averaged. Nothing is trained but AnoDDPM's denoiser. Read top to bottom:
one guided step, a posterior sample, two passes, map.

After arXiv 2404.17900 and the official code (KevinBHLin/MDPS), which differ: ``mode`` has both.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, Self, Unpack

import numpy as np
import torch
from torch import Tensor

from diffad_lite.core.config import Profile, changed_fields, check_ranges
from diffad_lite.core.numbers import top_count
from diffad_lite.diffusion.gaussian import randn
from diffad_lite.methods.anoddpm import AnoDDPM, AnoDDPMConfig, PriorConfig, prior_of
from diffad_lite.methods.base import (
    BATCH_SIZE,
    Buffers,
    Method,
    Networks,
    blur,
    exact,
    inference,
    paper_settings,
)
from diffad_lite.spaces.features import LITE0, ImageNetFeatures, peak_ratio, perceptual_distance
from diffad_lite.training.loop import FitOptions, TrainReport
from diffad_lite.training.state import TrainConfig


@dataclass(frozen=True)
class MDPSConfig(PriorConfig):
    """Configuration of :class:`MDPS`; defaults are the lite profile at 64 pixels.

    Attributes:
        residual_resampling: of the denoiser, see :class:`~diffad_lite.networks.unet.UNet`.
        mode: how agreement is imposed: ``paper`` blends two noise estimates by the mask, so that
            pixels outside of it end as those of the picture; ``code`` replaces their state before
            each step, guides all pixels, and divides by one norm of the whole batch.
        noise_level: t that the picture is noised to in the second pass, 0 .. T-1.
        mask_noise_level: likewise in the first pass, which finds the mask.
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
    mode: Literal["paper", "code"] = inference("paper")
    noise_level: int = inference(25)
    mask_noise_level: int = inference(25)
    steps: int = inference(5)
    guidance: float = inference(1.0)
    mask_guidance: float = inference(1.0)
    n_samples: int = inference(4)
    mask: Literal["estimated", "none"] = inference("estimated")
    mask_quantile: float = inference(0.9)
    mask_sigma: float = inference(1.0)
    backbone: str = LITE0
    layers: tuple[str, ...] = ("2", "4", "7")
    input_size: int = inference(224)
    pixel_weight: float = inference(7.0)
    score: Literal["mean", "softmax"] = inference("mean")

    def __post_init__(self) -> None:
        """Validate field values."""
        super().__post_init__()
        top = self.prior.num_timesteps - 1
        check_ranges(self, noise_level=(0, top), mask_noise_level=(0, top), n_samples=(1, math.inf))
        check_ranges(self, steps=(1, 1 + min(self.noise_level, self.mask_noise_level)))
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
        paper = paper_settings("mdps", category)
        train = TrainConfig(
            steps=50_000, batch_size=8, learning_rate=3e-4, warmup_steps=0, ema_decay=0.0
        )
        own_norm = base.image_size / (256 * math.sqrt(8))
        return replace(
            base,
            standardise=False,
            prior=replace(base.prior, base_channels=64, attention_levels=(3, 4, 5), train=train),
            residual_resampling=True,
            noise_level=paper["noise_level"],
            mask_noise_level=paper["mask_noise_level"] or paper["noise_level"],
            mask="estimated" if paper["mask_noise_level"] else "none",
            steps=max(1, paper["noise_level"] // 20),
            guidance=paper["guidance"] * own_norm,
            mask_guidance=paper["mask_guidance"] * own_norm,
            n_samples=1,
            mask_sigma=4.0,
            backbone="wide_resnet101_2",
            layers=("layer2", "layer3"),
            input_size=256,
            pixel_weight=paper["pixel_weight"],
            score="softmax",
            calibrate=False,
            smooth_sigma=4.0,
            top_fraction=500 / 224**2,
        )


class MDPS(Method):
    """Masked posterior sampling with a denoiser of normal images.

    Args:
        config: see :class:`MDPSConfig`.
        prior: a fitted AnoDDPM of the same configuration as ``config.prior``, whose denoiser is
            taken as it is; then :meth:`fit` trains nothing.
    """

    name = "mdps"
    Config = MDPSConfig
    config: MDPSConfig
    network: Networks

    def __init__(self, config: MDPSConfig, prior: AnoDDPM | None = None) -> None:
        """With ``prior``, its weights are taken and nothing is trained.

        Raises:
            ValueError: it was trained in another way than ``config`` says.
        """
        if prior is not None and config.first_stage is not None:
            others = (
                changed_fields(prior.config, config.first_stage) - AnoDDPMConfig.inference_fields()
            )
            if others:
                raise ValueError(f"the prior given differs in {', '.join(sorted(others))}")
        self.given = prior
        super().__init__(config)

    def _build(self) -> Networks:
        c = self.config
        self.prior = prior_of(c.prior, residual_resampling=c.residual_resampling)
        if self.given is not None:
            self.prior.network.load_state_dict(self.given.network.state_dict())
        self.diffusion = self.prior.diffusion
        features = ImageNetFeatures(c.backbone, c.layers, c.input_size)
        statistics = Buffers(mask_threshold=torch.tensor(torch.inf), pixel_scale=torch.tensor(1.0))
        networks = {"denoiser": self.prior.network, "features": features, "statistics": statistics}
        return Networks(networks)

    def _fit(self, train: Tensor, **options: Unpack[FitOptions]) -> dict[str, TrainReport]:
        self.network["features"].load_weights()
        return {} if self.given is not None else self.prior._fit(train, **options)

    # One step, and one posterior sample.

    def guided_noise(self, x_t: Tensor, t: int, y: Tensor, w: float) -> Tensor:
        """The noise estimate, corrected towards pictures that agree with ``y``; (B, C, H, W).

        ``eps + sigma_t w grad ||y - x0_hat(x_t)||``: diffusion posterior sampling (Chung et al.
        2023), the gradient through the network. The norm is each image's own; in ``code`` mode
        that of the whole batch.
        """
        d = self.diffusion
        levels = torch.full((len(x_t),), t, device=x_t.device)
        if w == 0:
            with torch.no_grad():
                return self.network["denoiser"](x_t, levels)
        with torch.enable_grad():
            x_t = x_t.detach().requires_grad_()
            noise_hat = self.network["denoiser"](x_t, levels)
            squares = (y - d.predict_x0(x_t, t, noise_hat)).square().flatten(1).sum(1)
            if self.config.mode == "code":
                squares = squares.sum()
            # The gradient of a norm at zero is not defined; there is nothing to correct there.
            (gradient,) = torch.autograd.grad(squares.clamp_min(1e-20).sqrt().sum(), x_t)
        sigma = (1 - d.schedule.alpha_bar(t, x_t)).sqrt()
        return noise_hat.detach() + sigma * w * gradient

    @torch.no_grad()
    def sample(
        self, y: Tensor, mask: Tensor, start: int, w: float, generators: list[torch.Generator]
    ) -> Tensor:
        """One posterior sample for each image (B, C, H, W), from ``y`` noised to ``start``.

        ``mask`` (B, 1, H, W): 1 where the picture is suspect. The steps are ancestral (eta = 1).
        Unlike the official code's, clean estimates are clipped to [-1, 1].
        """
        d = self.diffusion
        timesteps = d.schedule.timesteps(start, self.config.steps)
        noise = randn(y, generators)
        x_t = d.add_noise(y, timesteps[0], noise)
        for t, t_next in zip(timesteps, [*timesteps[1:], -1], strict=True):
            if self.config.mode == "code":
                x_t = mask * x_t + (1 - mask) * d.add_noise(y, t, noise)
            noise_hat = self.guided_noise(x_t, t, y, w)
            if self.config.mode == "paper":  # eq. 10: outside of the mask x_0 is y
                noise_hat = mask * noise_hat + (1 - mask) * d.predict_noise(x_t, t, y)
            fresh = randn(y, generators) if t_next >= 0 else torch.zeros_like(y)
            x_t, _ = d.ddpm_step(x_t, t, t_next, noise_hat, fresh)
        return x_t

    # Two passes: find the mask, then sample under it.

    def distances(self, y: Tensor, samples: Tensor) -> tuple[Tensor, Tensor]:
        """Of features at the same place, and of pixels; each (..., B, H, W) as the samples."""
        every = samples.flatten(0, -4).clamp(-1, 1)
        features = perceptual_distance(self.network["features"], y, every, radius=0)
        pixels = (y - samples).abs().mean(-3)
        return features.view_as(pixels), pixels

    def difference(self, y: Tensor, samples: Tensor) -> Tensor:
        """The map (..., B, H, W) of pictures (B, C, H, W) and samples (..., B, C, H, W)."""
        return self.combined(*self.distances(y, samples))

    def combined(self, features: Tensor, pixels: Tensor) -> Tensor:
        """The map of its two parts."""
        return features + self.config.pixel_weight * self.network["statistics"].pixel_scale * pixels

    def first_sample(self, y: Tensor, generators: list[torch.Generator]) -> Tensor:
        """What the mask is found from: one sample, every pixel being suspect."""
        c, everywhere = self.config, torch.ones_like(y[:, :1])
        return self.sample(y, everywhere, c.mask_noise_level, c.mask_guidance, generators)

    def find_mask(self, y: Tensor, generators: list[torch.Generator]) -> Tensor:
        """Suspect pixels, 1, else 0, (B, 1, H, W)."""
        if self.config.mask == "none":
            return torch.ones_like(y[:, :1])
        maps = blur(self.difference(y, self.first_sample(y, generators)), self.config.mask_sigma)
        return (maps > self.network["statistics"].mask_threshold)[:, None].to(y)

    def posterior(
        self, y: Tensor, mask: Tensor, generators: list[torch.Generator]
    ) -> tuple[Tensor, Tensor]:
        """Posterior samples (n, B, C, H, W), and the map of each (n, B, H, W)."""
        c = self.config
        sample = partial(self.sample, y, mask, c.noise_level, c.guidance, generators)
        samples = torch.stack([sample() for _ in range(c.n_samples)])
        return samples, self.difference(y, samples)

    def _infer(
        self, images: Tensor, generators: list[torch.Generator]
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        mask = self.find_mask(images, generators)
        samples, maps = self.posterior(images, mask, generators)
        spread = samples.std(0, correction=0).mean(1)  # (B, H, W), the pay-off of sampling
        return maps.mean(0), samples.mean(0), {"mask": mask[:, 0], "std": spread}

    def _score(self, images: Tensor, maps: Tensor) -> Tensor:
        if self.config.score == "mean":
            return super()._score(images, maps)
        k = top_count(self.config.top_fraction, maps[0].numel())
        return maps.flatten(1).softmax(1).topk(k).values.sum(1)

    @exact()
    def explain(
        self, images: Tensor, *, seed: int = 0, keys: Sequence[str] | None = None
    ) -> dict[str, Any]:
        """Also ``mask`` (B, 1, H, W), ``samples`` (n, B, C, H, W) and ``maps`` (n, B, H, W)."""
        common = super().explain(images, seed=seed, keys=keys)  # checks the images, too
        y, generators = self.network_inputs(images, seed, keys)
        mask = self.find_mask(y, generators)
        samples, maps = self.posterior(y, mask, generators)
        return common | {"mask": mask.cpu(), "samples": samples.cpu(), "maps": maps.cpu()}

    @exact()
    def calibrate(self, calibration: Tensor) -> Self:
        """Set the scale of pixels and the mask's threshold, then what every method sets."""
        self._check_calibration(calibration)
        c, s, parts = self.config, self.network["statistics"], []
        for batch in calibration.split(BATCH_SIZE):
            y, generators = self.network_inputs(batch, 0)
            parts.append(self.distances(y, self.first_sample(y, generators)))
        features, pixels = (torch.cat(part) for part in zip(*parts, strict=True))
        s.pixel_scale.fill_(peak_ratio(features, pixels))
        maps = blur(self.combined(features, pixels), c.mask_sigma)
        s.mask_threshold.fill_(float(np.quantile(maps.cpu().numpy(), c.mask_quantile)))
        return super().calibrate(calibration)
