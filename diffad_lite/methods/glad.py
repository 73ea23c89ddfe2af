"""GLAD (Yao et al. 2024): as many denoising steps as an image needs, without its anomaly.

Three parts. *Adaptive denoising steps* (global): start from a high noise level and measure how far
the trajectory drifts from the noised input. Drift means that an anomaly is being removed: when it
exceeds ``delta``, the image is accepted and DDIM continues. An image that never drifts restarts
from its noised input at a low noise level. *Anomaly-oriented
training* (local): the denoiser learns to predict the noise as seen from the normal image, so that
an anomaly counts as noise. *Spatial-adaptive fusion* (local): pixels without drift keep the input.
Read top to bottom: configuration, training, reconstruction, map.

After arXiv 2406.07487 and the official code (hyao1/GLAD). That code works in the latent space of
Stable Diffusion and compares features of DINO; this is GLAD in pixel space.
"""

import math
from dataclasses import field, replace
from typing import Annotated, Any, Literal, NamedTuple, Self, Unpack

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BeforeValidator, Field
from torch import Tensor, nn

from diffad_lite.core.config import (
    Count,
    NonNegative,
    Profile,
    Timestep,
    check_at_most,
    check_exactly_one,
    configuration,
    strict_integer,
    unknown_name,
)
from diffad_lite.core.numbers import top_count
from diffad_lite.data.synthetic_anomalies import Synthesis, SynthesisConfig, object_mask
from diffad_lite.diffusion.gaussian import randn
from diffad_lite.methods.base import (
    Buffers,
    Inferred,
    InputSize,
    Method,
    Networks,
    Quantile,
    TopFraction,
    Trace,
    blur,
    category_settings,
    inference,
)
from diffad_lite.methods.calibration import conformal_threshold
from diffad_lite.methods.denoiser import DENOISER_FRACTION, Denoiser, DenoisingConfig
from diffad_lite.spaces.features import (
    DENOISER,
    LITE0,
    LITE0_LAYERS,
    DenoiserFeatures,
    ImageNetFeatures,
    peak_ratio,
    perceptual_distance,
)
from diffad_lite.training.loop import FitOptions, TrainReport, remaining_budget, train_network
from diffad_lite.training.state import TrainConfig


def read_infinity(value: Any) -> Any:
    """Return infinity for its names in JSON and on the command line, else ``value``."""
    return math.inf if value in ("Infinity", "inf") else value


Delta = Annotated[float | None, Field(ge=0, allow_inf_nan=True), BeforeValidator(read_infinity)]


@configuration
class GLADConfig(DenoisingConfig):
    """Configuration of :class:`GLAD`; defaults are the lite profile at 64 pixels.

    Attributes:
        anomaly_oriented: whether a second training teaches the denoiser to remove synthetic
            anomalies.
        kappa: sign of the anomaly in the target: 1 removes it, 0 keeps it, -1 doubles it.
        fade: strength of the anomaly in training at timestep t: ``linear`` is t / T; ``matched``
            is the fraction of the anomaly left at t when DDIM starts at ``fade_noise_level``.
        fade_noise_level: timestep from which sampling is expected to start.
        synthesis: the anomalies of training.
        train: the second training.
        noise_level: start timestep, 0 .. T-1; T' in the code.
        steps: network evaluations from there to the clean image; or None where ``stride`` says it.
        stride: distance of the timesteps 1, 1 + stride, ... below ``noise_level``, the official
            code's grid; or None.
        clip: whether the clean estimates on the way are clipped to [-1, 1].
        adaptive: whether the number of steps is adaptive; else plain DDIM.
        min_noise_level: below this timestep an image without drift restarts from its noised input.
        delta: drift at which an image is accepted; None takes a quantile over normal images of
            their largest drift at timesteps from ``min_noise_level`` on. Infinity (``delta=inf``)
            accepts no image: each is denoised until it is reset.
        delta_quantile: quantile for an estimated delta.
        drift_layers: those of ``layers`` that the drift compares; None for all.
        drift_fraction: the drift of an image is the mean of this fraction of its largest values.
        fusion: weight of the denoised state in an accepted image, per pixel: 1 for ``off``,
            sigmoid(drift) for ``literal`` (at least half), and for ``calibrated``
            sigmoid((drift - delta) / spread). The rest comes from the noised input.
        drift_features: ``denoiser``, or a network as in PaDiM, for the drift.
        map_features: the same choices, for the anomaly map.
        layers: of an ImageNet network.
        input_size: side in pixels of the input of an ImageNet network.
        radius: largest distance of matching features, in feature cells; None for no limit.
        two_way: whether the map also has the distance of the reconstruction's features to the
            image's, which shows what is missing in the image.
        pixel_weight: weight of the pixel distance in the map; the feature distance has weight 1.
        map_foreground: region where the map counts, ``all`` or the ``object`` that differs from the
            image's border.
    """

    profiles = "glad"
    alternatives = ("steps", "stride")

    standardise: bool = True  # chosen on development defects, like the defaults below
    top_fraction: TopFraction = 0.03
    anomaly_oriented: bool = True
    kappa: Annotated[Literal[-1, 0, 1], BeforeValidator(strict_integer)] = 1
    fade: Literal["linear", "matched"] = "matched"
    fade_noise_level: Timestep = 100
    synthesis: SynthesisConfig = field(
        default_factory=lambda: SynthesisConfig(ridges=1 / 3, opacity=(0.0, 0.8))
    )
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(steps=1800, learning_rate=2e-4, ema_decay=0.995)
    )
    noise_level: Timestep = inference(100)
    steps: Count | None = inference(10)
    stride: Count | None = inference(None)
    clip: bool = inference(True)
    adaptive: bool = inference(True)
    min_noise_level: Timestep = inference(30)
    delta: Delta = inference(None)
    delta_quantile: Quantile = inference(0.95)
    drift_layers: tuple[str, ...] | None = inference(None)
    drift_fraction: TopFraction = inference(0.01)
    fusion: Literal["off", "literal", "calibrated"] = inference("calibrated")
    drift_features: str = DENOISER
    map_features: str = LITE0
    layers: tuple[str, ...] = LITE0_LAYERS
    input_size: InputSize = inference(224)
    radius: Annotated[int, Field(ge=0, le=64)] | None = inference(1)
    two_way: bool = inference(False)
    pixel_weight: NonNegative = inference(1.0)
    map_foreground: Literal["all", "object"] = inference("all")

    def __post_init__(self) -> None:
        """Validate fields against each other."""
        T = self.denoiser.num_timesteps
        check_at_most(self, noise_level=T - 1, fade_noise_level=T - 1)
        check_exactly_one(self)
        check_at_most(self, min_noise_level=self.noise_level)
        if self.steps is not None:
            check_at_most(self, steps=self.noise_level + 1)
        else:  # timesteps 1, 1 + stride, ... below the noise level
            check_at_most(self, stride=self.noise_level - 1)
        for layer in self.drift_layers or ():
            if layer not in self.layers:
                raise unknown_name("layer in drift_layers", layer, self.layers)

    @classmethod
    def for_profile(cls, profile: Profile, *, category: str | None = None, **shape: Any) -> Self:
        """As every method, with the category's foreground; ``paper`` has all of its settings.

        Blur and number of score pixels are published for maps of 512 or 256 pixels, by category.
        """
        base = super().for_profile(profile, category=category, **shape)
        official = category_settings("glad", category)
        synthesis = replace(base.synthesis, foreground=official.pop("foreground"))
        map_side = official.pop("map_side")
        changes = {}
        if profile == "paper":
            changes = official | {
                "smooth_sigma": MAP_SIGMA * base.image_size / map_side,
                "top_fraction": MAP_TOP / map_side**2,
            }
        return replace(base, synthesis=synthesis, **changes)


MAP_SIGMA, MAP_TOP = 6, 250  # of the official code's maps: blur in pixels, pixels of the score
FEATURE_NOISE_LEVEL = 25  # timestep at which the denoiser's features are taken


class Reconstruction(NamedTuple):
    """Path of a reconstruction.

    Attributes:
        x: the reconstruction (B, C, H, W).
        t_star: timestep at which each image was accepted or reset (B,); -1 for neither.
        timesteps: visited, decreasing.
        drifts: drift (B, H, W) at each timestep; NaN at the noise level itself, and for images
            already decided.
        states: state (B, C, H, W) at each timestep, after the decision.
    """

    x: Tensor
    t_star: Tensor
    timesteps: list[int]
    drifts: list[Tensor]
    states: list[Tensor]


class GLAD(Method):
    """Adaptive steps, anomaly-oriented training and spatially adaptive fusion, in pixel space.

    :meth:`explain` adds ``path``, the :class:`Reconstruction`.
    """

    name = "glad"
    title = "GLAD"
    Config = GLADConfig
    config: GLADConfig
    network: Networks

    def _build(self) -> Networks:
        c = self.config
        self.synthesis = Synthesis(c.synthesis)
        self.denoiser = Denoiser(c.denoiser, c.channels, clip=c.clip)
        self.diffusion = self.denoiser.diffusion
        networks: dict[str, nn.Module] = {"denoiser": self.denoiser.network}
        for name in sorted({c.drift_features, c.map_features} - {DENOISER}):
            networks[name] = ImageNetFeatures(name, c.layers, c.input_size)
        networks["statistics"] = Buffers(
            delta=torch.tensor(torch.inf), spread=torch.tensor(1.0), pixel_scale=torch.tensor(1.0)
        )
        return Networks(networks)

    # Training: first predict noise (Ho et al. 2020, algorithm 1), then treat anomalies as noise.

    def anomaly_oriented_loss(
        self, network: nn.Module, normal: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Return the mean squared error of predicting the noise plus the faded anomaly.

        Target: ``eps + kappa r_t (x~ - x)`` with ``r_t = sqrt(abar_t / (1 - abar_t))``, for the
        normal image x and the faded anomaly x~. With kappa = 1 that is the noise as seen from x.
        """
        c, d = self.config, self.diffusion
        anomalous, _, _ = self.synthesis(normal, generator)
        t = torch.randint(c.denoiser.num_timesteps, (len(normal),), generator=generator)
        offset = self.fade(t).to(normal)[:, None, None, None] * (anomalous - normal)
        noise, t = randn(normal, generator), t.to(normal.device)
        x_t = d.add_noise(normal + offset, t, noise)
        abar = d.schedule.alpha_bar(t, normal)
        target = noise + c.kappa * (abar / (1 - abar)).sqrt() * offset
        return F.mse_loss(network(x_t, t).float(), target)

    def fade(self, t: Tensor) -> Tensor:
        """Return the strength of the anomaly in training at timesteps (B,), in [0, 1]."""
        if self.config.fade == "linear":
            return t / self.config.denoiser.num_timesteps
        # DDIM with a perfect denoiser scales an anomaly by sqrt(SNR_start / SNR_t).
        ratio = self.diffusion.schedule.snr.sqrt()
        return (ratio[self.config.fade_noise_level] / ratio[t]).clamp(max=1)

    def _fit(self, train: Tensor, **options: Unpack[FitOptions]) -> dict[str, TrainReport]:
        c, budget = self.config, options["budget"]
        for network in self.network.values():
            if isinstance(network, ImageNetFeatures):
                network.load_weights()
        fraction = DENOISER_FRACTION if c.anomaly_oriented else 1.0
        options["budget"] = remaining_budget(budget, {}, fraction)
        reports = self.denoiser.fit(train, **options)
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

    # Inference: denoise until an image has drifted.

    def distance(
        self,
        a: Tensor,
        b: Tensor,
        noise: Tensor,
        features: str,
        layers: tuple[str, ...] | None = None,
        *,
        two_way: bool = False,
    ) -> Tensor:
        """Return the distance (B, H, W) between the features of two images (B, C, H, W).

        Args:
            a: images.
            b: images that they are compared with.
            noise: of the same shape, for features of the denoiser.
            features: name of the network, a key of ``self.network``.
            layers: of an ImageNet network; None for all of ``config.layers``.
            two_way: as in :func:`~diffad_lite.spaces.features.perceptual_distance`.
        """
        c, network = self.config, self.network[features]

        def extract(images: Tensor) -> list[Tensor]:
            if features == DENOISER:  # both images get the same noise
                of_denoiser = DenoiserFeatures(network, self.diffusion, FEATURE_NOISE_LEVEL)
                return of_denoiser(images, torch.cat([noise, noise]))
            maps = network(images)
            return [maps[c.layers.index(layer)] for layer in layers or c.layers]

        return perceptual_distance(extract, a, b, c.radius, two_way=two_way)

    def differences(self, images: Tensor, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return the feature part and the pixel part of the map; each (B, H, W)."""
        c = self.config
        features = self.distance(images, x, noise, c.map_features, two_way=c.two_way)
        return features, (images - x).abs().mean(1)

    @torch.no_grad()
    def reconstruct(
        self, images: Tensor, noise: Tensor, delta: float | None = None
    ) -> Reconstruction:
        """Denoise by DDIM, by as many adaptive steps as each image needs.

        At each noise level t, with one noise estimate for the state x_t and the noised input:

        1. *Drift*: the distance of the clean estimates of both (global adaptive steps).
        2. An image whose drift exceeds delta is **accepted**: t* = t. Its state keeps the pixels
           that drifted and takes the others from the noised input (spatially adaptive fusion).
        3. An image that has not drifted when t is below ``min_noise_level`` is **reset**: t* = t,
           and it continues from its noised input alone.
        4. One step of DDIM leads to the next noise level.

        Args:
            images: as the networks see them (B, C, H, W).
            noise: of the same shape.
            delta: drift at which an image is accepted; None takes ``config.delta``, and where that
                is None, too, the estimated one.
        """
        c, d = self.config, self.diffusion
        delta_ = self._delta(delta)
        timesteps, end = self.timesteps()
        x_t = d.add_noise(images, c.noise_level, noise)
        t_star = torch.full((len(images),), -1, device=images.device)
        drifts, states = [], []
        for t, t_next in zip(timesteps, [*timesteps[1:], end], strict=True):
            noise_hat = self.network["denoiser"](x_t, torch.full_like(t_star, t))
            drift, undecided = torch.full_like(images[:, 0], torch.nan), t_star < 0
            # At the noise level itself nothing can have drifted yet.
            if c.adaptive and t < c.noise_level and undecided.any():
                x_input = d.add_noise(images, t, noise)
                estimates = (d.clean_estimate(x, t, noise_hat) for x in (x_input, x_t))
                a, b = (x0_hat[undecided] for x0_hat in estimates)
                compared = c.drift_features, c.drift_layers
                drift[undecided] = self.distance(a, b, noise[undecided], *compared)
                accepted = undecided & (drift_score(drift, c.drift_fraction) > delta_)
                reset = undecided & ~accepted & (t < c.min_noise_level)
                keep = self.fusion_weights(drift, accepted, reset, delta_)
                # Equivalent to fusing the clean estimates, as noise_hat is the same.
                x_t = torch.where(keep < 1, keep * x_t + (1 - keep) * x_input, x_t)
                t_star = torch.where(accepted | reset, t, t_star)
            drifts.append(drift)
            states.append(x_t)
            x_t, _ = d.ddim_step(x_t, t, t_next, noise_hat)
        return Reconstruction(x_t, t_star, timesteps, drifts, states)

    def timesteps(self) -> tuple[list[int], int]:
        """Return the timesteps of the sampler and the one after them: -1, the clean image.

        The official code ends at timestep 0, whose noise cannot be seen.
        """
        c, schedule = self.config, self.diffusion.schedule
        if c.stride is None:
            return schedule.timesteps(c.noise_level, c.steps), -1
        return schedule.strided_timesteps(c.noise_level, c.stride, first=1), 0

    def _delta(self, delta: float | None) -> Tensor:
        """Return the given delta, else the configured, else the one estimated on normal images."""
        delta = self.config.delta if delta is None else delta
        estimated: Tensor = self.network["statistics"].delta
        return estimated if delta is None else torch.full_like(estimated, delta)

    def fusion_weights(
        self, drift: Tensor, accepted: Tensor, reset: Tensor, delta: Tensor
    ) -> Tensor:
        """Return the weight of the denoised state per pixel; the rest is the noised input.

        Args:
            drift: of the undecided images (B, H, W).
            accepted: images whose drift exceeds delta, bool (B,).
            reset: images that are reset below ``min_noise_level``, bool (B,).
            delta: drift at which an image is accepted, a scalar.

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
        self, images: Tensor, generators: list[torch.Generator], trace: Trace | None = None
    ) -> Inferred:
        noise = randn(images, generators)
        path = self.reconstruct(images, noise)
        if trace is not None:
            trace["path"] = path
        features, pixels = self.differences(images, path.x, noise)
        scale = self.network["statistics"].pixel_scale
        maps = features + self.config.pixel_weight * scale * pixels
        return maps, path.x, {"t_star": path.t_star.float()}

    def _postprocess(self, images: Tensor, maps: Tensor) -> Tensor:
        maps = super()._postprocess(images, maps)
        if self.config.map_foreground == "all":
            return maps
        return maps * soft_object_mask(images, self.config.smooth_sigma)

    # Calibration: delta, spread and pixel scale, from reconstructions that nothing has accepted.

    def _measure(self, images: Tensor) -> dict[str, Tensor]:
        images, generators = self.network_inputs(images, 0)
        noise = randn(images, generators)
        path = self.reconstruct(images, noise, delta=math.inf)  # no image is accepted
        features, pixels = self.differences(images, path.x, noise)
        drifts = self._watched_drifts(path) if self.config.adaptive else {}
        return {"features": features, "pixels": pixels} | drifts

    def _watched_drifts(self, path: Reconstruction) -> dict[str, Tensor]:
        """Return the largest drift score (B,) and the final drift (B, H, W) before a reset."""
        c = self.config
        watched = range(c.min_noise_level, c.noise_level)
        drifts = [
            drift.cpu()
            for t, drift in zip(path.timesteps, path.drifts, strict=True)
            if t in watched
        ]
        if not drifts:
            raise ValueError(
                f"{len(path.timesteps)} steps from noise_level={c.noise_level} visit no timestep "
                f"at or above min_noise_level={c.min_noise_level} where drift could be measured; "
                "use more steps, a lower min_noise_level, or adaptive=False"
            )
        scores = torch.stack([drift_score(drift, c.drift_fraction) for drift in drifts])
        return {"largest_drift": scores.amax(0), "final_drift": drifts[-1]}

    def _set_statistics(self, measured: dict[str, Tensor]) -> None:
        c, s = self.config, self.network["statistics"]
        if c.adaptive:
            largest = measured["largest_drift"].numpy()
            s.delta.fill_(conformal_threshold(largest, c.delta_quantile))
            low, high = np.quantile(measured["final_drift"].numpy(), [0.25, 0.75])
            s.spread.fill_(max(float(high - low), 1e-6))
        s.pixel_scale.fill_(peak_ratio(measured["features"], measured["pixels"]))


def drift_score(drift: Tensor, fraction: float = 0.01) -> Tensor:
    """Return the mean of the largest values (B,) of drifts (B, H, W); NaN for decided images."""
    k = top_count(fraction, drift[0].numel())
    return drift.flatten(1).topk(k).values.mean(1)


def soft_object_mask(images: Tensor, sigma: float) -> Tensor:
    """Return 1 on the object and around it, 0 elsewhere, with a soft rim, (B, H, W).

    The official code blurs the object, takes all that is above 0, and blurs again. A blur of
    ``sigma`` pixels reaches four times as far; so the object grows by a square.
    """
    reach = int(4 * sigma + 0.5)
    if reach == 0:
        return object_mask(images)[:, 0]
    return blur(F.max_pool2d(object_mask(images), 2 * reach + 1, 1, reach)[:, 0], sigma)
