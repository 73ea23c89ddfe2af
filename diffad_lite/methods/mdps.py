"""MDPS (Wu et al. 2024): sample normal images that agree with the image outside of a mask.

Detection as an inverse problem. The image y is a normal image x_0 whose pixels under a mask m are
corrupted by unknown noise (paper, eq. 7): ``y = (1 - m) x_0 + m (x_0 + noise)``. A first pass
estimates the mask; then guided diffusion draws several samples of ``p(x_0 | y, m)``, and their
differences to y are averaged. Only the denoiser is trained. Read top to bottom: one guided step, a
posterior sample, two passes, map.

After arXiv 2404.17900 and the official code (KevinBHLin/MDPS). They differ: ``mode`` has both.
"""

import math
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, Literal, Self, Unpack

import numpy as np
import torch
from pydantic import BeforeValidator, Field
from torch import Tensor
from torchvision.transforms.v2.functional import center_crop

from diffad_lite.core.config import (
    Count,
    Fraction,
    NonNegative,
    Profile,
    Timestep,
    changed_values,
    check_at_most,
    check_exactly_one,
    configuration,
    strict_integer,
    to_dict,
)
from diffad_lite.core.numbers import top_count
from diffad_lite.diffusion.gaussian import randn
from diffad_lite.methods.anoddpm import AnoDDPM
from diffad_lite.methods.base import (
    Buffers,
    Inferred,
    InputSize,
    Method,
    Networks,
    TopFraction,
    Trace,
    blur,
    category_settings,
    inference,
)
from diffad_lite.methods.denoiser import Denoiser, DenoisingConfig
from diffad_lite.spaces.features import (
    LITE0,
    LITE0_LAYERS,
    ImageNetFeatures,
    peak_ratio,
    perceptual_distance,
)
from diffad_lite.training.loop import FitOptions, TrainReport


@configuration
class MDPSConfig(DenoisingConfig):
    """Configuration of :class:`MDPS`; defaults are the lite profile at 64 pixels.

    Attributes:
        mode: how samples are made to agree with the image outside of the mask: ``paper`` blends
            two noise estimates by the mask, so that pixels outside of it end as the image's;
            ``code`` replaces their state before each step, guides all pixels, and does not clip
            clean estimates to [-1, 1]. The official code divides by one norm of the whole batch;
            here each image has its own, so that its score does not depend on the batch.
        noise_level: start timestep of the second pass, 0 .. T-1.
        mask_noise_level: start timestep of the first pass, which estimates the mask.
        steps: network evaluations per pass and sample; or None where ``stride`` says it.
        stride: distance of the timesteps 0, stride, 2 stride, ... below the noise level of a pass,
            the official code's grid; or None.
        guidance: w in the second pass, for the norm of each image; 0 needs no gradients.
        mask_guidance: w in the first pass.
        n_samples: posterior samples of the second pass, whose maps are averaged.
        mask: ``estimated`` in the first pass, or ``none``: all pixels are masked, one pass.
        mask_quantile: of the first pass's map on normal images; larger values are masked.
        mask_sigma: standard deviation of the blur of the first pass's map, in pixels.
        backbone: ImageNet network whose features are compared.
        layers: of the backbone.
        input_size: side in pixels of the backbone's input.
        patch_size: odd side, in cells, of the squares over which features are averaged.
        pixel_weight: weight of the pixel distance in the map, eta in the code; the feature
            distance has weight 1.
        score: ``mean`` of the largest values, as in every method, or the official code's
            ``softmax`` over the pixels of half the map, whose largest probabilities are summed.
        score_crop: side of the centre, as a fraction of the map's, whose pixels the score takes.
    """

    profiles = "mdps"
    alternatives = ("steps", "stride")

    standardise: bool = True  # chosen on development defects and uncertain cells, as what follows
    top_fraction: TopFraction = 0.03
    mode: Literal["paper", "code"] = inference("paper")
    noise_level: Timestep = inference(25)
    mask_noise_level: Timestep = inference(25)
    steps: Count | None = inference(5)
    stride: Count | None = inference(None)
    guidance: NonNegative = inference(1.0)
    mask_guidance: NonNegative = inference(1.0)
    n_samples: Count = inference(4)
    mask: Literal["estimated", "none"] = inference("estimated")
    mask_quantile: Fraction = inference(0.9)
    mask_sigma: NonNegative = inference(1.0)
    backbone: str = LITE0
    layers: tuple[str, ...] = LITE0_LAYERS
    input_size: InputSize = inference(224)
    patch_size: Annotated[Literal[1, 3, 5], BeforeValidator(strict_integer)] = inference(1)
    pixel_weight: NonNegative = inference(7.0)
    score: Literal["mean", "softmax"] = inference("mean")
    score_crop: Annotated[float, Field(ge=0.1, le=1)] = inference(1.0)

    def __post_init__(self) -> None:
        """Validate fields against each other."""
        T = self.denoiser.num_timesteps
        check_at_most(self, noise_level=T - 1, mask_noise_level=T - 1)
        check_exactly_one(self)
        lowest = min(self.noise_level, self.mask_noise_level)
        if self.steps is not None:
            check_at_most(self, steps=1 + lowest)
        else:  # timesteps 0, stride, ... below each noise level
            check_at_most(self, stride=lowest)

    @classmethod
    def for_profile(cls, profile: Profile, *, category: str | None = None, **shape: Any) -> Self:
        """As every method; ``paper`` has the official settings of the category."""
        base = super().for_profile(profile, category=category, **shape)
        if profile != "paper":
            return base
        official = category_settings("mdps", category)
        # Norm of an image here / norm of a batch of 8 images with three channels in the code.
        norm_ratio = base.image_size / MAP_SIDE * math.sqrt(base.channels / 3 / 8)
        masked = bool(official["mask_noise_level"])  # else the only pass has the second one's w
        mask_guidance = official["mask_guidance" if masked else "guidance"]
        return replace(
            base,
            noise_level=official["noise_level"],
            mask_noise_level=official["mask_noise_level"] or official["noise_level"],
            mask="estimated" if masked else "none",
            guidance=official["guidance"] * norm_ratio,
            mask_guidance=mask_guidance * norm_ratio,
            pixel_weight=official["pixel_weight"],
            smooth_sigma=base.smooth_sigma * base.image_size / MAP_SIDE,
            mask_sigma=base.mask_sigma * base.image_size / MAP_SIDE,
            score_crop=official["score_side"] / MAP_SIDE,
            top_fraction=SCORE_PIXELS / official["score_side"] ** 2,
        )


MAP_SIDE, SCORE_PIXELS = 256, 500  # of the official code's maps: side, pixels of the score


class MDPS(Method):
    """Masked posterior sampling with a denoiser of normal images.

    :meth:`explain` adds ``mask`` (B, 1, H, W), ``samples`` (n, B, C, H, W), and the map of each
    sample, ``maps`` (n, B, H, W).

    Args:
        config: see :class:`MDPSConfig`.
        prior: a fitted AnoDDPM with the same denoiser; its weights are used, and :meth:`fit`
            trains nothing.

    Raises:
        ValueError: the prior was trained in another way than ``config`` says.
    """

    name = "mdps"
    title = "MDPS"
    Config = MDPSConfig
    config: MDPSConfig
    network: Networks

    def __init__(self, config: MDPSConfig, prior: AnoDDPM | None = None) -> None:
        if prior is not None:
            if prior.config.denoiser_training is None:
                raise ValueError(
                    f"the prior must be an AnoDDPM with Gaussian noise, got {prior.name}"
                )
            names = config.denoiser_training or {}
            given, needed = ({n: to_dict(c)[n] for n in names} for c in (prior.config, config))
            if differing := changed_values(given, needed):
                raise ValueError(
                    f"the prior's training differs from the configuration in "
                    f"{', '.join(sorted(differing))}; train the prior with the same values"
                )
        self.prior = prior
        super().__init__(config)

    def _build(self) -> Networks:
        c = self.config
        self.denoiser = Denoiser(c.denoiser, c.channels, clip=c.mode == "paper")
        if self.prior is not None:
            self.denoiser.network.load_state_dict(self.prior.network.state_dict())
        self.diffusion = self.denoiser.diffusion
        features = ImageNetFeatures(c.backbone, c.layers, c.input_size)
        statistics = Buffers(mask_threshold=torch.tensor(torch.inf), pixel_scale=torch.tensor(1.0))
        networks = {"denoiser": self.denoiser.network, "features": features}
        return Networks({**networks, "statistics": statistics})

    def _fit(self, train: Tensor, **options: Unpack[FitOptions]) -> dict[str, TrainReport]:
        self.network["features"].load_weights()
        return {} if self.prior is not None else self.denoiser.fit(train, **options)

    # One step, and one posterior sample.

    def guided_noise(self, x_t: Tensor, t: int, y: Tensor, w: float) -> Tensor:
        """Return the noise estimate, corrected towards images that agree with ``y``.

        ``eps + sigma_t w grad ||y - x0_hat(x_t)||``: diffusion posterior sampling (Chung et al.
        2023), the gradient through the network; (B, C, H, W). The norm is taken per image.
        """
        d = self.diffusion
        timesteps = torch.full((len(x_t),), t, device=x_t.device)
        if w == 0:
            with torch.no_grad():
                return self.network["denoiser"](x_t, timesteps)
        with torch.enable_grad():
            x_t = x_t.detach().requires_grad_()
            noise_hat = self.network["denoiser"](x_t, timesteps)
            squares = (y - d.predict_x0(x_t, t, noise_hat)).square().flatten(1).sum(1)
            # A norm has no gradient at zero, where nothing needs correcting: keep away from it.
            (gradient,) = torch.autograd.grad(squares.clamp_min(1e-20).sqrt().sum(), x_t)
        sigma = (1 - d.schedule.alpha_bar(t, x_t)).sqrt()
        return noise_hat.detach() + sigma * w * gradient

    def timesteps(self, start: int) -> list[int]:
        """Return the timesteps of a sample from ``start``, decreasing."""
        c, schedule = self.config, self.diffusion.schedule
        if c.stride is None:
            return schedule.timesteps(start, c.steps)
        return schedule.strided_timesteps(start, c.stride)

    @torch.no_grad()
    def sample(
        self, y: Tensor, mask: Tensor, start: int, w: float, generators: list[torch.Generator]
    ) -> Tensor:
        """Draw one posterior sample per image (B, C, H, W), from ``y`` noised to ``start``.

        ``mask`` (B, 1, H, W): 1 where the image may be anomalous. The steps are ancestral (eta 1).
        """
        c, d = self.config, self.diffusion
        timesteps = self.timesteps(start)
        noise = randn(y, generators)
        x_t = d.add_noise(y, start, noise)
        for t, t_next in zip(timesteps, [*timesteps[1:], -1], strict=True):
            if c.mode == "code":
                x_t = mask * x_t + (1 - mask) * d.add_noise(y, t, noise)
            noise_hat = self.guided_noise(x_t, t, y, w)
            if c.mode == "paper":  # eq. 10: outside of the mask x_0 is y
                noise_hat = mask * noise_hat + (1 - mask) * d.predict_noise(x_t, t, y)
            step_noise = randn(y, generators) if t_next >= 0 else torch.zeros_like(y)
            x_t, _ = d.ddpm_step(x_t, t, t_next, noise_hat, step_noise)
        return x_t

    # Two passes: estimate the mask, then sample inside it.

    def distances(self, y: Tensor, samples: Tensor) -> tuple[Tensor, Tensor]:
        """Return distances of features at the same position, and of pixels; (..., B, H, W)."""
        every, c = samples.flatten(0, -4), self.config
        if c.mode == "paper":
            every = every.clamp(-1, 1)
        features = perceptual_distance(
            self.network["features"], y, every, radius=0, patch_size=c.patch_size
        )
        pixels = (y - samples).abs().mean(-3)
        return features.view_as(pixels), pixels

    def difference(self, y: Tensor, samples: Tensor) -> Tensor:
        """Return the map (..., B, H, W) of images (B, C, H, W) and samples (..., B, C, H, W)."""
        return self.combined(*self.distances(y, samples))

    def combined(self, features: Tensor, pixels: Tensor) -> Tensor:
        """Return the map: the weighted sum of its two parts."""
        return features + self.config.pixel_weight * self.network["statistics"].pixel_scale * pixels

    def first_sample(self, y: Tensor, generators: list[torch.Generator]) -> Tensor:
        """Draw the sample that the mask is estimated from; all pixels are masked."""
        c, everywhere = self.config, torch.ones_like(y[:, :1])
        return self.sample(y, everywhere, c.mask_noise_level, c.mask_guidance, generators)

    def find_mask(self, y: Tensor, generators: list[torch.Generator]) -> Tensor:
        """Return the estimated mask (B, 1, H, W): 1 where the image may be anomalous, else 0."""
        if self.config.mask == "none":
            return torch.ones_like(y[:, :1])
        maps = blur(self.difference(y, self.first_sample(y, generators)), self.config.mask_sigma)
        return (maps > self.network["statistics"].mask_threshold)[:, None].to(y)

    def posterior(
        self, y: Tensor, mask: Tensor, generators: list[torch.Generator]
    ) -> tuple[Tensor, Tensor]:
        """Return posterior samples (n, B, C, H, W), and the map of each (n, B, H, W)."""
        c = self.config
        sample = partial(self.sample, y, mask, c.noise_level, c.guidance, generators)
        samples = torch.stack([sample() for _ in range(c.n_samples)])
        return samples, self.difference(y, samples)

    def _infer(
        self, images: Tensor, generators: list[torch.Generator], trace: Trace | None = None
    ) -> Inferred:
        mask = self.find_mask(images, generators)
        samples, maps = self.posterior(images, mask, generators)
        if trace is not None:
            trace |= {"mask": mask, "samples": samples, "maps": maps}
        uncertainty = samples.std(0, correction=0).mean(1)  # (B, H, W), which sampling alone gives
        return maps.mean(0), samples.mean(0), {"mask": mask[:, 0], "std": uncertainty}

    def _score(self, images: Tensor, maps: Tensor) -> Tensor:
        c = self.config
        H, W = (max(1, round(c.score_crop * side)) for side in maps.shape[-2:])
        maps = center_crop(maps, [H, W])
        if c.score == "mean":
            return super()._score(images, maps)
        k = top_count(c.top_fraction, H * W)
        return (maps / 2).flatten(1).softmax(1).topk(k).values.sum(1)

    # Calibration: pixel scale and the mask's threshold, from the first pass.

    def _measure(self, images: Tensor) -> dict[str, Tensor]:
        y, generators = self.network_inputs(images, 0)
        features, pixels = self.distances(y, self.first_sample(y, generators))
        return {"features": features, "pixels": pixels}

    def _set_statistics(self, measured: dict[str, Tensor]) -> None:
        c, s = self.config, self.network["statistics"]
        features, pixels = measured["features"], measured["pixels"]
        s.pixel_scale.fill_(peak_ratio(features, pixels))
        maps = blur(self.combined(features, pixels), c.mask_sigma)
        s.mask_threshold.fill_(float(np.quantile(maps.cpu().numpy(), c.mask_quantile)))
