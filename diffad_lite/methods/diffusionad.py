"""DiffusionAD (Zhang et al. 2023): noise-to-norm in one step, and a network that compares.

Two networks learn together. The denoiser sees normal images and paints an image as it would be
without a defect, from a single evaluation at each of two noise levels. The segmentation network
sees image and reconstruction side by side and learns from synthetic anomalies which differences
matter. Read top to bottom: configuration, reconstruction, training, inference.

After arXiv 2303.08730 and the official code (HuiZhang0812/DiffusionAD); where the two differ the
code is followed. Levels differ from both: the code's images lie in [0, 1], these in [-1, 1], where
the same t hides half as much; nevertheless, at 64 pixels, lower levels serve better.
"""

from collections.abc import Sequence
from dataclasses import field, replace
from typing import Annotated, Any, Literal, NamedTuple, Self, Unpack

import torch
from pydantic import BeforeValidator
from torch import Tensor, nn

from diffad_lite.core.config import (
    Count,
    NonNegative,
    Profile,
    Timestep,
    check_at_most,
    configuration,
    strict_integer,
)
from diffad_lite.data.synthetic_anomalies import Synthesis, SynthesisConfig
from diffad_lite.diffusion.gaussian import NoisePredictor, final_step, randn
from diffad_lite.methods.base import (
    Inferred,
    Method,
    Networks,
    Trace,
    category_settings,
    inference,
)
from diffad_lite.methods.denoiser import DENOISER_FRACTION, Denoiser, DenoisingConfig
from diffad_lite.networks.segmentation import SegmentationConfig, SegmentationNet, segmentation_loss
from diffad_lite.training.loop import FitOptions, TrainReport, remaining_budget, train_network
from diffad_lite.training.state import TrainConfig

TRAINING_GUIDANCE = 1.0  # w


@configuration
class DiffusionADConfig(DenoisingConfig):
    """Configuration of :class:`DiffusionAD`; defaults are the lite profile at 64 pixels.

    Attributes:
        pretrain: train the denoiser alone first, as ``denoiser.train`` says.
        unit_range: diffuse images in [0, 1], as the official code does, not in [-1, 1].
        scales: 2, or 1 for the method's first version, which has no norm guidance.
        noise_level: timestep t of the small scale at inference, 0 .. T-1.
        noise_level_big: timestep of the big scale.
        boundary: training draws the small t from 0 .. boundary-1.
        highest: training draws the big t from boundary .. highest-1.
        guidance: weight w of norm guidance at inference; 1 in training.
        steps: network evaluations per scale; more than 1 is DDIM, for comparison only.
        reconstruction: second input of the segmentation network: the ``guided``
            reconstruction, or the ``input`` image again, a control without diffusion.
        detach: keep the segmentation loss from training the denoiser.
        segmentation: sizes of the segmentation network.
        synthesis: the anomalies of training.
        train: how both networks are trained together.
        denoiser_rate: learning rate of the denoiser relative to the segmentation network's.
    """

    profiles = "diffusionad"

    calibrate: bool = False  # chosen on development defects, as all that follows
    smooth_sigma: NonNegative = 0.0
    pretrain: bool = True
    unit_range: bool = False
    scales: Annotated[Literal[1, 2], BeforeValidator(strict_integer)] = 2
    noise_level: Timestep = inference(25)
    noise_level_big: Timestep = inference(250)
    boundary: Count = 200
    highest: Count = 500
    guidance: NonNegative = inference(1.0)
    steps: Count = inference(1)
    reconstruction: Literal["guided", "input"] = "guided"
    detach: bool = False
    segmentation: SegmentationConfig = field(default_factory=SegmentationConfig)
    synthesis: SynthesisConfig = field(default_factory=lambda: SynthesisConfig(ridges=1 / 3))
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=1400, batch_size=8, learning_rate=1e-3, ema_decay=0.995
        )
    )
    denoiser_rate: NonNegative = 1.0

    def __post_init__(self) -> None:
        """Validate fields against each other."""
        T = self.denoiser.num_timesteps
        check_at_most(self, noise_level=T - 1, noise_level_big=T - 1, highest=T)
        check_at_most(self, boundary=self.highest - 1)
        check_at_most(self, steps=1 + min(self.noise_level, self.noise_level_big))

    @property
    def denoiser_training(self) -> dict[str, Any] | None:
        """The denoiser's training alone, where there is one."""
        return super().denoiser_training if self.pretrains else None

    @property
    def pretrains(self) -> bool:
        """Whether the denoiser is trained alone first."""
        return self.pretrain and self.reconstruction == "guided"

    @classmethod
    def for_profile(cls, profile: Profile, *, category: str | None = None, **shape: Any) -> Self:
        """As every method; the region of synthetic anomalies is the official code's."""
        base = super().for_profile(profile, category=category, **shape)
        official = category_settings("diffusionad", category)
        return replace(base, synthesis=replace(base.synthesis, **official))


class Estimates(NamedTuple):
    """Estimates from one pass of the denoiser; all tensors are (B, C, H, W).

    Attributes:
        noised: the images at each scale, the small one first.
        noise_hat: the estimated noise at each scale.
        x0_hat: the clean image that this noise implies. The small scale keeps details and a part
            of the defect; the big scale is blurred and more normal.
        guided: the small scale's estimate guided towards the big one's; the reconstruction.
    """

    noised: list[Tensor]
    noise_hat: list[Tensor]
    x0_hat: list[Tensor]
    guided: Tensor


class DiffusionAD(Method):
    """One-step reconstruction from two noise levels, compared by a segmentation network.

    :meth:`explain` adds ``estimates``, the :class:`Estimates`; None for the control without one.
    """

    name = "diffusionad"
    title = "DiffusionAD"
    Config = DiffusionADConfig
    config: DiffusionADConfig
    network: Networks

    def _build(self) -> Networks:
        c = self.config
        self.synthesis = Synthesis(c.synthesis)
        networks: dict[str, nn.Module] = {}
        if c.reconstruction == "guided":
            self.denoiser = Denoiser(c.denoiser, c.channels)
            networks["denoiser"], self.diffusion = self.denoiser.network, self.denoiser.diffusion
        networks["segmentation"] = SegmentationNet(2 * c.channels, c.segmentation)
        return Networks(networks)

    # Reconstruction: one evaluation of the denoiser at each scale.

    def estimates(
        self,
        predictor: NoisePredictor,
        images: Tensor,
        timesteps: Sequence[Tensor],
        noises: Sequence[Tensor],
        guidance: float,
    ) -> Estimates:
        """Noise images to one or two timesteps, each (B,), and estimate the clean image."""
        d = self.diffusion
        noised = [d.add_noise(images, t, noise) for t, noise in zip(timesteps, noises, strict=True)]
        both = predictor(torch.cat(noised), torch.cat(list(timesteps))).float()
        noise_hat = list(both.chunk(len(timesteps)))  # both scales were one batch
        estimated = zip(noised, timesteps, noise_hat, strict=True)
        x0_hat = [d.clean_estimate(*arguments) for arguments in estimated]
        guided = x0_hat[0]
        if len(timesteps) == 2:
            guided = self.norm_guidance(noised[0], timesteps[0], noise_hat[0], x0_hat[1], guidance)
        return Estimates(noised, noise_hat, x0_hat, guided)

    def norm_guidance(
        self, x_t: Tensor, t: Tensor, noise_hat: Tensor, norm: Tensor, w: float
    ) -> Tensor:
        """Guide the estimate from ``x_t`` towards the reference ``norm``.

        The noise is corrected by the gradient of -1/2 ||x_t - norm_t||^2, as in classifier
        guidance. Before clipping this is ``(1 - m) x0_hat + m norm`` with ``m = w (1 - abar_t)``.
        """
        sigma = (1 - self.diffusion.schedule.alpha_bar(t, x_t)).sqrt()
        norm_t = self.diffusion.add_noise(norm, t, noise_hat)  # with the estimated noise
        return self.diffusion.clean_estimate(x_t, t, noise_hat - w * sigma * (norm_t - x_t))

    def sampled_noise(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the noise that ``steps`` steps of DDIM imply, instead of one evaluation's."""
        noise_hat, n, d = [], self.config.scales, self.diffusion
        for noised, start in zip(x_t.chunk(n), t.chunk(n), strict=True):
            timesteps = d.schedule.timesteps(int(start[0]), self.config.steps)
            clean = final_step(d.ddim_sample(self.network["denoiser"], noised, timesteps)).x
            noise_hat.append(d.predict_noise(noised, start, clean))
        return torch.cat(noise_hat)

    # Training: the noise of normal images, the masks of all.

    def loss(self, networks: nn.ModuleDict, normal: Tensor, generator: torch.Generator) -> Tensor:
        """Return the loss: noise of the normal images, plus segmentation of all images."""
        c = self.config
        images, masks, anomalous = self.synthesis(normal, generator)
        images = self._in_range(images)
        reconstruction, noise_loss = images, images.new_zeros(())
        if c.reconstruction == "guided":
            ranges = [(0, c.boundary), (c.boundary, c.highest)][: c.scales]
            timesteps = [torch.randint(*r, (len(images),), generator=generator) for r in ranges]
            timesteps = [t.to(images.device) for t in timesteps]
            noises = [randn(images, generator) for _ in ranges]
            estimates = self.estimates(
                networks["denoiser"], images, timesteps, noises, TRAINING_GUIDANCE
            )
            noise_loss = masked_noise_loss(estimates.noise_hat, noises, anomalous)
            # Not detached: the segmentation loss also trains the denoiser, on anomalous images too.
            reconstruction = estimates.guided.detach() if c.detach else estimates.guided
        logits = networks["segmentation"](torch.cat([images, reconstruction], 1)).float()
        return noise_loss + segmentation_loss(logits, masks)

    def _fit(self, train: Tensor, **options: Unpack[FitOptions]) -> dict[str, TrainReport]:
        c, budget = self.config, options["budget"]
        reports: dict[str, TrainReport] = {}
        if c.pretrains:
            options["budget"] = remaining_budget(budget, {}, DENOISER_FRACTION)
            reports |= self.denoiser.fit(train, **options)
        options["budget"] = remaining_budget(budget, reports)
        rates = {"denoiser": c.denoiser_rate}
        reports["joint"] = train_network(
            self.network, self.loss, train, c.train, stage="joint", rates=rates, **options
        )
        return reports

    # Inference: noise, estimate, compare.

    def _infer(
        self, images: Tensor, generators: list[torch.Generator], trace: Trace | None = None
    ) -> Inferred:
        images = self._in_range(images)
        reconstruction, estimates = images, None
        if self.config.reconstruction == "guided":
            estimates = self.reconstruct(images, generators)
            reconstruction = estimates.guided
        if trace is not None:
            trace["estimates"] = estimates
        both = torch.cat([images, reconstruction], 1)
        with torch.no_grad():
            maps = self.network["segmentation"](both).sigmoid()[:, 0]
        return maps, self._in_range(reconstruction, back=True), {}

    @torch.no_grad()
    def reconstruct(self, images: Tensor, generators: list[torch.Generator]) -> Estimates:
        """Return the estimates at the configured noise levels, for images in its range."""
        c = self.config
        noise_levels = [c.noise_level, c.noise_level_big][: c.scales]
        noises = [randn(images, generators) for _ in noise_levels]
        timesteps = [torch.full((len(images),), t, device=images.device) for t in noise_levels]
        predictor = self.network["denoiser"] if c.steps == 1 else self.sampled_noise
        return self.estimates(predictor, images, timesteps, noises, c.guidance)

    def _in_range(self, images: Tensor, back: bool = False) -> Tensor:
        """From [-1, 1] to the denoiser's range, or back."""
        if not self.config.unit_range:
            return images
        return 2 * images - 1 if back else (images + 1) / 2


def masked_noise_loss(
    noise_hat: Sequence[Tensor], noises: Sequence[Tensor], anomalous: Tensor
) -> Tensor:
    """Return the squared errors, summed over scales, as a mean over the normal images.

    It is 0 where all images are anomalous (bool (B,)).
    """
    pairs = zip(noise_hat, noises, strict=True)
    errors = sum((a - b).square().flatten(1).mean(1) for a, b in pairs)  # (B,)
    return (errors * ~anomalous).sum() / (~anomalous).sum().clamp_min(1)
