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
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, NamedTuple, Self, Unpack

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffad_lite.core.config import Profile, check_ranges
from diffad_lite.core.numbers import top_count
from diffad_lite.data.synthetic_anomalies import Synthesis, SynthesisConfig
from diffad_lite.diffusion.gaussian import randn
from diffad_lite.methods.anoddpm import PRIOR_SHARE, PriorConfig, prior_of
from diffad_lite.methods.base import (
    BATCH_SIZE,
    Buffers,
    Method,
    Networks,
    exact,
    inference,
    paper_settings,
)
from diffad_lite.methods.calibration import conformal_threshold
from diffad_lite.spaces.features import (
    DENOISER,
    LITE0,
    DenoiserFeatures,
    ImageNetFeatures,
    peak_ratio,
    perceptual_distance,
)
from diffad_lite.training.loop import FitOptions, TrainReport, remaining_budget, train_network
from diffad_lite.training.state import TrainConfig


@dataclass(frozen=True)
class GLADConfig(PriorConfig):
    """Configuration of :class:`GLAD`; defaults are the lite profile at 64 pixels.

    Attributes:
        anomaly_oriented: whether a second training teaches it to remove synthetic anomalies.
        kappa: sign of the anomaly in the target: 1 removes it, 0 keeps it, -1 doubles it.
        fade: strength of the anomaly in training at t: ``linear`` t / T, or ``matched``, as much
            of it as sampling from ``fade_noise_level`` would have left.
        fade_noise_level: the noise level that is meant to be sampled from.
        synthesis: the anomalies of training.
        train: the second training.
        noise_level: t that images are noised to, 0 .. T-1; T' in the code.
        steps: network evaluations from there to the clean image.
        adaptive: whether the drift is watched; else plain DDIM.
        min_noise_level: below this t an image that has not drifted becomes its own noised input.
        delta: drift at which an image is accepted; None takes the ``delta_quantile`` of what
            normal images reach above ``min_noise_level``.
        delta_quantile: see there.
        fusion: which pixels keep the input then: ``off`` none, ``literal`` by the sigmoid of the
            drift (never less than half), ``calibrated`` by how far it is beyond ``delta``.
        drift_features: ``denoiser``, or a network as in PaDiM, for the drift.
        map_features: likewise, for the anomaly map.
        layers: of a network for ImageNet.
        input_size: that it sees.
        radius: cells that a match of features may lie away; None is anywhere.
        pixel_weight: of the pixels' distance in the map, the features' having 1.
    """

    standardise: bool = True  # chosen on development defects, as what follows
    top_fraction: float = 0.03
    anomaly_oriented: bool = True
    kappa: Literal[-1, 0, 1] = 1
    fade: Literal["linear", "matched"] = "matched"
    fade_noise_level: int = 100
    synthesis: SynthesisConfig = field(
        default_factory=lambda: SynthesisConfig(ridges=1 / 3, opacity=(0.0, 0.8))
    )
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(steps=1800, learning_rate=2e-4, ema_decay=0.995)
    )
    noise_level: int = inference(100)
    steps: int = inference(10)
    adaptive: bool = inference(True)
    min_noise_level: int = inference(30)
    delta: float | None = inference(None)
    delta_quantile: float = inference(0.95)
    fusion: Literal["off", "literal", "calibrated"] = inference("calibrated")
    drift_features: str = DENOISER
    map_features: str = LITE0
    layers: tuple[str, ...] = ("2", "4", "7")
    input_size: int = inference(224)
    radius: int | None = inference(1)
    pixel_weight: float = inference(1.0)

    def __post_init__(self) -> None:
        """Validate field values."""
        super().__post_init__()
        top = self.prior.num_timesteps - 1
        check_ranges(self, noise_level=(0, top), fade_noise_level=(0, top))
        check_ranges(self, steps=(1, self.noise_level + 1), min_noise_level=(0, self.noise_level))
        check_ranges(self, input_size=(32, math.inf), pixel_weight=(0, math.inf))
        check_ranges(self, delta_quantile=(0.001, 0.999))
        if self.radius is not None:
            check_ranges(self, radius=(0, 64))

    @classmethod
    def for_profile(cls, profile: Profile, *, category: str | None = None, **shape: Any) -> Self:
        """``ci`` is a smoke test, ``lite`` the defaults; the sources of ``paper`` stand below."""
        base = super().for_profile(profile, category=category, **shape)
        prior, synthesis = base.prior, base.synthesis
        paper = paper_settings("glad", category)
        synthesis = replace(synthesis, foreground=paper["foreground"])
        base = replace(base, synthesis=synthesis)
        if profile == "ci":
            return replace(base, train=prior.train, steps=4, map_features=DENOISER)
        if profile == "lite":
            return replace(base, train=replace(base.train, flip_axes=prior.train.flip_axes))
        # Official code, main.py, dataset/, *.sh: AdamW 5e-6, weight decay .01, batch 32, 4000 steps
        # each, fade t / T, masks and textures as below, opacity in 0..0.8; the map is blurred
        # by 6 pixels, the score is the mean of 250 of 512 x 512. Ours differs: that code tunes the
        # latent denoiser of Stable Diffusion and compares features of DINO, nearest anywhere; this
        # trains AnoDDPM's on pixels first, and compares features of a WideResNet, for which that
        # code's deltas do not hold, so that they are taken from normal images.
        return replace(
            base,
            standardise=False,
            prior=replace(prior, beta_schedule="scaled_linear"),
            fade="linear",
            synthesis=replace(synthesis, ridges=0.0, finest=5, threshold=0.3, texture_root="dtd"),
            train=TrainConfig(
                steps=4000,
                batch_size=32,
                learning_rate=5e-6,
                weight_decay=1e-2,
                warmup_steps=0,
                ema_decay=0.0,
            ),
            noise_level=paper["noise_level"],
            steps=paper["steps"],
            min_noise_level=paper["min_noise_level"],
            pixel_weight=paper["pixel_weight"],
            fusion="literal",
            drift_features="wide_resnet50_2",
            map_features="wide_resnet50_2",
            layers=("layer1", "layer2", "layer3"),
            input_size=256,
            radius=None,
            calibrate=False,
            smooth_sigma=6.0,
            top_fraction=250 / 512**2,
        )


FEATURE_NOISE_LEVEL = 25  # t at which the denoiser's own features are taken
TOP_DRIFT = 0.01  # the drift of an image is the mean of this fraction of its largest values


class Reconstruction(NamedTuple):
    """How images were reconstructed.

    Attributes:
        x: the reconstruction (B, C, H, W).
        t_star: timestep at which each image was accepted or reset (B,); -1 where it never was.
        timesteps: of the noise levels.
        drifts: at each but the first the drift (B, H, W) of the images still undecided, else NaN.
        states: at each the state (B, C, H, W), after the decision.
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
        abar = d.schedule.alpha_bar(t, normal)
        target = noise + c.kappa * (abar / (1 - abar)).sqrt() * offset
        return F.mse_loss(network(x_t, t).float(), target)

    def fade(self, t: Tensor) -> Tensor:
        """Strength of the anomaly in training at timesteps (B,), in [0, 1]."""
        if self.config.fade == "linear":
            return t / self.config.prior.num_timesteps
        # DDIM with a perfect denoiser shrinks what is not normal by the ratio of these.
        ratio = self.diffusion.schedule.snr.sqrt()
        return (ratio[self.config.fade_noise_level] / ratio[t]).clamp(max=1)

    def _fit(self, train: Tensor, **options: Unpack[FitOptions]) -> dict[str, TrainReport]:
        c, budget = self.config, options["budget"]
        _ = self.synthesis.files  # missing textures are an error now, not after the first stage
        for network in self.network.values():
            if isinstance(network, ImageNetFeatures):
                network.load_weights()
        options["budget"] = remaining_budget(budget, {}, PRIOR_SHARE if c.anomaly_oriented else 1.0)
        reports = self.prior._fit(train, **options)
        if c.anomaly_oriented:
            options["budget"] = remaining_budget(budget, reports)
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
            extract = DenoiserFeatures(extract, self.diffusion, FEATURE_NOISE_LEVEL)
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
        """DDIM from the noise level, by as many adaptive steps as each image needs.

        At each noise level t, with one noise estimate for the state x_t and the noised input:

        1. *Drift*: the distance of the clean estimates of both (global adaptive steps).
        2. An image whose drift exceeds delta is **accepted**: t* = t. Its state keeps what drifted
           and takes the rest from the noised input (spatially adaptive fusion).
        3. An image that has not drifted when t is below ``min_noise_level`` is **reset**: t* = t,
           and it continues from its noised input alone.
        4. One step of DDIM leads to the next noise level.

        Args:
            images: as prepared (B, C, H, W).
            noise: likewise.
            delta: drift at which an image is accepted; default the configured, or else the
                estimated one.
        """
        c, d = self.config, self.diffusion
        delta_ = self._delta(delta)
        timesteps = d.schedule.timesteps(c.noise_level, c.steps)
        x_t = d.add_noise(images, timesteps[0], noise)
        t_star = torch.full((len(images),), -1, device=images.device)
        drifts, states = [], []
        for t, t_next in zip(timesteps, [*timesteps[1:], -1], strict=True):
            noise_hat = self.network["denoiser"](x_t, torch.full_like(t_star, t))
            drift, undecided = torch.full_like(images[:, 0], torch.nan), t_star < 0
            # At the first noise level nothing can have drifted yet.
            if c.adaptive and t < timesteps[0] and undecided.any():
                x_input = d.add_noise(images, t, noise)
                estimates = (d.clean_estimate(x, t, noise_hat) for x in (x_input, x_t))
                a, b = (x0_hat[undecided] for x0_hat in estimates)
                drift[undecided] = self.distance(a, b, noise[undecided], c.drift_features)
                accepted = undecided & (drift_score(drift) > delta_)
                reset = undecided & ~accepted & (t < c.min_noise_level)
                keep = self.fusion_weights(drift, accepted, reset, delta_)
                # Fusing the states is fusing the clean estimates, as noise_hat is the same.
                x_t = torch.where(keep < 1, keep * x_t + (1 - keep) * x_input, x_t)
                t_star = torch.where(accepted | reset, t, t_star)
            drifts.append(drift)
            states.append(x_t)
            x_t, _ = d.ddim_step(x_t, t, t_next, noise_hat)
        return Reconstruction(x_t, t_star, timesteps, drifts, states)

    def _delta(self, delta: float | None) -> Tensor:
        """The given delta, else the configured, else the one estimated on normal images."""
        delta = self.config.delta if delta is None else delta
        estimated: Tensor = self.network["statistics"].delta
        return estimated if delta is None else torch.full_like(estimated, delta)

    def fusion_weights(
        self, drift: Tensor, accepted: Tensor, reset: Tensor, delta: Tensor
    ) -> Tensor:
        """Share of each pixel's state that is kept; the rest is the noised input's.

        Args:
            drift: of the undecided images (B, H, W).
            accepted: images that drifted, bool (B,).
            reset: images that came down without drifting, bool (B,).
            delta: of the decision, a scalar.

        Returns:
            (B, 1, H, W) in [0, 1]: 1 for images without a decision, 0 for those that are reset.
        """
        keep = torch.ones_like(drift[:, None])
        if self.config.fusion != "off":
            spread = self.network["statistics"].spread
            literal = self.config.fusion == "literal"
            beyond = drift if literal else (drift - delta) / spread
            keep[accepted] = beyond[accepted, None].sigmoid()
        keep[reset] = 0
        return keep

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
        prepared, generators = self.network_inputs(images, seed, keys)
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
            images, generators = self.network_inputs(batch, 0)
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
        above = [i for i, t in enumerate(timesteps) if i > 0 and t >= c.min_noise_level]
        if not above:
            raise ValueError(
                f"{c.steps} steps from noise_level={c.noise_level} visit no level at or above "
                f"min_noise_level={c.min_noise_level} where drift could be measured; use more "
                "steps, a lower min_noise_level, or adaptive=False"
            )
        scores = torch.stack([drift_score(drifts[i]) for i in above]).amax(0)
        s.delta.fill_(conformal_threshold(scores.numpy(), c.delta_quantile))
        low, high = np.quantile(drifts[above[-1]].numpy(), [0.25, 0.75])
        s.spread.fill_(max(float(high - low), 1e-6))


def drift_score(drift: Tensor) -> Tensor:
    """The mean of the largest values of drifts (B, H, W), NaN where they are NaN; (B,)."""
    k = top_count(TOP_DRIFT, drift[0].numel())
    return drift.flatten(1).topk(k).values.mean(1)
