"""MDPS (Wu et al. 2024): many normal images that agree with the picture where it is not suspect.

Detection as an inverse problem. The picture y is a normal image x_0 of which the pixels under a
mask m are spoiled by unknown noise (paper, eq. 7): ``y = (1 - m) x_0 + m (x_0 + noise)``. A first
pass finds the mask; then several samples of ``p(x_0 | y, m)`` are drawn by guided diffusion, and
their differences to y are averaged. Nothing is trained but AnoDDPM's denoiser. Read top to bottom:
one guided step, a posterior sample, two passes, map.

After arXiv 2404.17900 and the official code (KevinBHLin/MDPS), which differ: ``mode`` has both.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Self, Unpack

import numpy as np
import torch
from torch import Tensor

from diffad_lite.config import changed_fields
from diffad_lite.features import ImageNetFeatures, peak_ratio, perceptual_distance
from diffad_lite.gaussian import randn
from diffad_lite.methods.anoddpm import AnoDDPM, prior_of
from diffad_lite.methods.base import BATCH_SIZE, Method
from diffad_lite.methods.mdps_config import MDPSConfig
from diffad_lite.methods.numerics import blur, exact
from diffad_lite.methods.prediction import Buffers, Networks
from diffad_lite.metrics import top_count
from diffad_lite.training import FitOptions, TrainReport


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
    inference_fields = Method.inference_fields | {
        *("mode", "noise_level", "mask_level", "steps", "guidance", "mask_guidance", "n_samples"),
        *("mask", "mask_quantile", "mask_sigma", "input_size", "pixel_weight", "score"),
    }

    def __init__(self, config: MDPSConfig, prior: AnoDDPM | None = None) -> None:
        """With ``prior``, its weights are taken and nothing is trained.

        Raises:
            ValueError: it was trained in another way than ``config`` says.
        """
        if prior is not None and config.first_stage is not None:
            others = changed_fields(prior.config, config.first_stage) - AnoDDPM.inference_fields
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
        sigma = (1 - d.schedule.level(t, x_t)).sqrt()
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
        return self.sample(y, everywhere, c.mask_level, c.mask_guidance, generators)

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
        y, generators = self.seen(images, seed, keys)
        mask = self.find_mask(y, generators)
        samples, maps = self.posterior(y, mask, generators)
        return common | {"mask": mask.cpu(), "samples": samples.cpu(), "maps": maps.cpu()}

    @exact()
    def calibrate(self, calibration: Tensor) -> Self:
        """Set the scale of pixels and the mask's threshold, then what every method sets."""
        self._check_calibration(calibration)
        c, s, parts = self.config, self.network["statistics"], []
        for batch in calibration.split(BATCH_SIZE):
            y, generators = self.seen(batch, 0)
            parts.append(self.distances(y, self.first_sample(y, generators)))
        features, pixels = (torch.cat(part) for part in zip(*parts, strict=True))
        s.pixel_scale.fill_(peak_ratio(features, pixels))
        maps = blur(self.combined(features, pixels), c.mask_sigma)
        s.mask_threshold.fill_(float(np.quantile(maps.cpu().numpy(), c.mask_quantile)))
        return super().calibrate(calibration)
