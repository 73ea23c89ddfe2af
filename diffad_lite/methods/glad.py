"""GLAD (Yao et al. 2024): as many denoising steps as an image needs, and a denoiser that removes.

Three parts. *Adaptive denoising steps* (global): start from a high level, watch how far the
trajectory drifts from the noised input, and stop removing where it has drifted by ``delta``; an
image that never drifts is taken back to its own noised self at a low level. *Anomaly-oriented
training* (local): the denoiser learns to predict the noise as seen from the normal image, so that
an anomaly counts as noise. *Spatial-adaptive fusion* (local): where nothing has drifted the input
is kept. Read top to bottom: configuration, training, reconstruction, map.

After arXiv 2406.07487 and the official code (hyao1/GLAD). That code works in the latent space of
Stable Diffusion with features of DINO, which is not here; this is GLAD in pixel space.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, Self, Unpack

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffad_lite.features import (
    DENOISER,
    DenoiserFeatures,
    ImageNetFeatures,
    peak_ratio,
    perceptual_distance,
)
from diffad_lite.gaussian import randn
from diffad_lite.methods.anoddpm import PRIOR_SHARE, prior_of
from diffad_lite.methods.base import BATCH_SIZE, Method
from diffad_lite.methods.glad_config import GLADConfig
from diffad_lite.methods.numerics import exact
from diffad_lite.methods.prediction import Buffers, Networks
from diffad_lite.metrics import conformal_threshold, top_count
from diffad_lite.synthesis import Synthesis
from diffad_lite.training import FitOptions, TrainReport, left, train_network

FEATURE_LEVEL = 25  # t at which the denoiser's own features are taken
TOP_DRIFT = 0.01  # the drift of an image is the mean of this fraction of its largest values


class Reconstruction(NamedTuple):
    """How images were reconstructed.

    Attributes:
        x: the reconstruction (B, C, H, W).
        t_star: level at which each image was let go (B,); -1 where it never was.
        timesteps: the levels.
        drifts: at each level but the first the drift (B, H, W) of the images still watched,
            else NaN.
        states: at each level the state (B, C, H, W), after the decision.
    """

    x: Tensor
    t_star: Tensor
    timesteps: list[int]
    drifts: list[Tensor]
    states: list[Tensor]


class GLAD(Method):
    """Adaptive steps, anomaly-oriented training and spatially adaptive fusion, in pixel space."""

    name = "glad"
    Config = GLADConfig
    config: GLADConfig
    network: Networks
    inference_fields = Method.inference_fields | {"noise_level", "steps", "adaptive", "min_level"}
    inference_fields |= {"delta", "delta_quantile", "fusion", "radius", "pixel_weight"}
    inference_fields |= {"input_size"}

    def _build(self) -> Networks:
        c = self.config
        self.synthesis = Synthesis(c.synthesis)
        self.prior = prior_of(c.prior)
        self.diffusion = self.prior.diffusion
        networks: dict[str, nn.Module] = {"denoiser": self.prior.network}
        for name in sorted({c.drift_features, c.map_features} - {DENOISER}):
            networks[name] = ImageNetFeatures(name, c.layers, c.input_size)
        networks["statistics"] = Buffers(
            delta=torch.tensor(torch.inf), spread=torch.tensor(1.0), pixel_scale=torch.tensor(1.0)
        )
        return Networks(networks)

    # Training: Ho et al. 2020, algorithm 1, and then the anomaly as a part of the noise.

    def anomaly_oriented_loss(
        self, network: nn.Module, normal: Tensor, generator: torch.Generator
    ) -> Tensor:
        """The noise that leads from a faded anomaly back to the normal image; a scalar.

        ``eps + kappa r_t (x~ - x)`` with ``r_t = sqrt(abar_t / (1 - abar_t))``, for the normal
        image x and the faded anomaly x~. With kappa = 1 that is the noise as seen from x.
        """
        c, d = self.config, self.diffusion
        anomalous, _, _ = self.synthesis(normal, generator)
        t = torch.randint(c.prior.num_timesteps, (len(normal),), generator=generator)
        offset = self.fade(t).to(normal)[:, None, None, None] * (anomalous - normal)
        noise, t = randn(normal, generator), t.to(normal.device)
        x_t = d.add_noise(normal + offset, t, noise)
        abar = d.schedule.level(t, normal)
        target = noise + c.kappa * (abar / (1 - abar)).sqrt() * offset
        return F.mse_loss(network(x_t, t).float(), target)

    def fade(self, t: Tensor) -> Tensor:
        """Strength of the anomaly in training at timesteps (B,), in [0, 1]."""
        if self.config.fade == "linear":
            return t / self.config.prior.num_timesteps
        # DDIM with a perfect denoiser shrinks what is not normal by the ratio of these.
        ratio = self.diffusion.schedule.snr.sqrt()
        return (ratio[self.config.fade_level] / ratio[t]).clamp(max=1)

    def _fit(self, train: Tensor, **options: Unpack[FitOptions]) -> dict[str, TrainReport]:
        c, budget = self.config, options["budget"]
        _ = self.synthesis.files  # missing textures are an error now, not after the first stage
        for network in self.network.values():
            if isinstance(network, ImageNetFeatures):
                network.load_weights()
        options["budget"] = left(budget, {}, PRIOR_SHARE if c.anomaly_oriented else 1.0)
        reports = self.prior._fit(train, **options)
        if c.anomaly_oriented:
            options["budget"] = left(budget, reports)
            reports["anomaly_oriented"] = train_network(
                self.network["denoiser"],
                self.anomaly_oriented_loss,
                train,
                c.train,
                stage="anomaly_oriented",
                **options,
            )
        return reports

    # Inference: denoise while nothing drifts.

    def distance(self, a: Tensor, b: Tensor, noise: Tensor, features: str) -> Tensor:
        """Distance of the features of two images (B, C, H, W), (B, H, W); see the features."""
        extract = self.network[features]
        if features == DENOISER:  # it sees both through the same noise
            extract = DenoiserFeatures(extract, self.diffusion, FEATURE_LEVEL)
            extract = partial(extract, noise=torch.cat([noise, noise]))
        return perceptual_distance(extract, a, b, self.config.radius)

    def differences(self, images: Tensor, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The parts of the map: of features, and of pixels; each (B, H, W)."""
        features = self.distance(images, x, noise, self.config.map_features)
        return features, (images - x).abs().mean(1)

    @torch.no_grad()
    def reconstruct(
        self, images: Tensor, noise: Tensor, delta: float | None = None
    ) -> Reconstruction:
        """DDIM from the noise level; each image is watched until it is let go.

        Args:
            images: as prepared (B, C, H, W).
            noise: likewise.
            delta: drift at which it is let go; default the configured, or else the learnt one.
        """
        c, d = self.config, self.diffusion
        delta = c.delta if delta is None else delta
        threshold = self.network["statistics"].delta
        threshold = threshold if delta is None else torch.full_like(threshold, delta)
        timesteps = d.schedule.timesteps(c.noise_level, c.steps)
        x_t = d.add_noise(images, timesteps[0], noise)
        t_star = torch.full((len(images),), -1, device=images.device)
        drifts, states = [], []
        for t, t_next in zip(timesteps, [*timesteps[1:], -1], strict=True):
            levels = torch.full((len(images),), t, device=images.device)
            noise_hat = self.network["denoiser"](x_t, levels)
            drift = torch.full_like(images[:, 0], torch.nan)
            # At the noise level nothing can have drifted yet.
            if c.adaptive and t < timesteps[0] and (t_star < 0).any():
                x_t, t_star, drift = self.watch(images, noise, x_t, noise_hat, t, t_star, threshold)
            drifts.append(drift)
            states.append(x_t)
            x_t, _ = d.ddim_step(x_t, t, t_next, noise_hat)
        return Reconstruction(x_t, t_star, timesteps, drifts, states)

    def watch(
        self,
        images: Tensor,
        noise: Tensor,
        x_t: Tensor,
        noise_hat: Tensor,
        t: int,
        t_star: Tensor,
        delta: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compare state and noised input, and let go of images that drifted, or came down.

        Both are noised by the same ``noise`` and seen through the same ``noise_hat``, so that
        they differ by ``(x_t_input - x_t) / sqrt(abar_t)`` before clipping, whatever the network
        says.

        Returns:
            the states, ``t_star`` and the drift (B, H, W), NaN where it was not measured.
        """
        c, d, s = self.config, self.diffusion, self.network["statistics"]
        watched = t_star < 0
        x_input = d.add_noise(images, t, noise)
        one, other = (d.clean_estimate(x, t, noise_hat)[watched] for x in (x_input, x_t))
        drift = torch.full_like(images[:, 0], torch.nan)
        drift[watched] = self.distance(one, other, noise[watched], c.drift_features)
        drifted = watched & (drift_score(drift) > delta)
        down = watched & ~drifted & (t < c.min_level)
        keep = torch.ones_like(images[:, :1])  # of the state; the rest is the noised input's
        if c.fusion != "off":
            beyond = drift if c.fusion == "literal" else (drift - delta) / s.spread
            keep[drifted] = beyond[drifted, None].sigmoid()
        keep[down] = 0
        # Fusing the states is fusing the clean estimates, as noise_hat is the same.
        x_t = torch.where(keep < 1, keep * x_t + (1 - keep) * x_input, x_t)
        return x_t, torch.where(drifted | down, t, t_star), drift

    def _infer(
        self, images: Tensor, generators: list[torch.Generator]
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        noise = randn(images, generators)
        found = self.reconstruct(images, noise)
        features, pixels = self.differences(images, found.x, noise)
        scale = self.network["statistics"].pixel_scale
        maps = features + self.config.pixel_weight * scale * pixels
        return maps, found.x, {"t_star": found.t_star.float()}

    @exact()
    def explain(
        self, images: Tensor, *, seed: int = 0, keys: Sequence[str] | None = None
    ) -> dict[str, Any]:
        """Also ``path``, the :class:`Reconstruction`, of images as prepared."""
        common = super().explain(images, seed=seed, keys=keys)  # checks the images, too
        prepared, generators = self.seen(images, seed, keys)
        found = self.reconstruct(prepared, randn(prepared, generators))
        drifts, states = ([x.cpu() for x in part] for part in (found.drifts, found.states))
        path = found._replace(
            x=found.x.cpu(), t_star=found.t_star.cpu(), drifts=drifts, states=states
        )
        return common | {"path": path}

    @exact()
    def calibrate(self, calibration: Tensor) -> Self:
        """Set delta, the spread of drifts and the scale of pixels, then what every method sets."""
        self._check_calibration(calibration)
        s = self.network["statistics"]
        drifts, parts = [], []
        for batch in calibration.split(BATCH_SIZE):
            images, generators = self.seen(batch, 0)
            noise = randn(images, generators)
            found = self.reconstruct(images, noise, delta=math.inf)  # each is watched to the end
            drifts.append(torch.stack(found.drifts).cpu())
            parts.append(self.differences(images, found.x, noise))
        if self.config.adaptive:
            self._learn_drifts(found.timesteps, torch.cat(drifts, dim=1))
        features, pixels = (torch.cat(part) for part in zip(*parts, strict=True))
        s.pixel_scale.fill_(peak_ratio(features, pixels))
        return super().calibrate(calibration)

    def _learn_drifts(self, timesteps: list[int], drifts: Tensor) -> None:
        """Set delta and spread from drifts (levels, N, H, W) of normal images at all levels."""
        c, s = self.config, self.network["statistics"]
        above = [i for i, t in enumerate(timesteps) if i > 0 and t >= c.min_level]
        if not above:
            raise ValueError(
                f"{c.steps} steps from noise_level={c.noise_level} visit no level at or above "
                f"min_level={c.min_level} where a drift could be seen; take more steps, a lower "
                "min_level, or adaptive=False"
            )
        scores = torch.stack([drift_score(drifts[i]) for i in above]).amax(0)
        s.delta.fill_(conformal_threshold(scores.numpy(), c.delta_quantile))
        low, high = np.quantile(drifts[above[-1]].numpy(), [0.25, 0.75])
        s.spread.fill_(max(float(high - low), 1e-6))


def drift_score(drift: Tensor) -> Tensor:
    """The mean of the largest values of drifts (B, H, W), NaN where they are NaN; (B,)."""
    k = top_count(TOP_DRIFT, drift[0].numel())
    return drift.flatten(1).topk(k).values.mean(1)
