"""DiffusionAD (Zhang et al. 2023): noise-to-norm in one step, and a network that compares.

Two networks learn together. The denoiser sees normal images and paints an image as it would be
without a defect, from a single evaluation at each of two noise levels. The segmentation network
sees image and reconstruction side by side and learns from synthetic anomalies which differences
matter. Read top to bottom: configuration, reconstruction, training, inference.

After arXiv 2303.08730 and the official code (HuiZhang0812/DiffusionAD); where the two differ the
code is followed. Levels differ from both: the code's images lie in [0, 1], these in [-1, 1], where
the same t hides half as much; nevertheless, at 64 pixels, lower levels serve better.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, Self, Unpack

import torch
from torch import Tensor, nn

from diffad_lite.core.config import Profile, check_ranges
from diffad_lite.data.synthetic_anomalies import Synthesis, SynthesisConfig
from diffad_lite.diffusion.gaussian import NoisePredictor, final_step, randn
from diffad_lite.methods.anoddpm import PRIOR_SHARE, AnoDDPMConfig, PriorConfig, prior_of
from diffad_lite.methods.base import Method, Networks, exact, inference, paper_settings
from diffad_lite.networks.segmentation import SegmentationConfig, SegmentationNet, segmentation_loss
from diffad_lite.training.loop import FitOptions, TrainReport, remaining_budget, train_network
from diffad_lite.training.state import TrainConfig

TRAINING_GUIDANCE = 1.0  # w


@dataclass(frozen=True)
class DiffusionADConfig(PriorConfig):
    """Configuration of :class:`DiffusionAD`; defaults are the lite profile at 64 pixels.

    Attributes:
        pretrain: train the denoiser alone first, as ``prior`` says.
        residual_resampling: of the denoiser, see :class:`~diffad_lite.networks.unet.UNet`.
        unit_range: diffuse images in [0, 1], as the official code does, not in [-1, 1].
        scales: 2, or 1 for the method's first version, which has no norm guidance.
        noise_level: t of the small scale at inference, 0 .. T-1.
        noise_level_big: t of the big scale.
        boundary: training draws the small t from 0 .. boundary-1,
        highest: and the big t from boundary .. highest-1.
        guidance: weight w of norm guidance at inference; 1 in training.
        steps: network evaluations of a scale; more than 1 is DDIM, for comparison only.
        reconstruction: what stands beside the image for the segmentation network: the
            ``guided`` reconstruction, or the ``input`` again, a control without diffusion.
        detach: keep the segmentation loss from training the denoiser.
        segmentation: sizes of the segmentation network.
        synthesis: the anomalies of training.
        train: how both networks are trained together.
        denoiser_rate: learning rate of the denoiser relative to the segmentation network's.
    """

    calibrate: bool = False  # chosen on development defects, as all that follows
    smooth_sigma: float = 0.0
    pretrain: bool = True
    residual_resampling: bool = False
    unit_range: bool = False
    scales: int = 2
    noise_level: int = inference(25)
    noise_level_big: int = inference(250)
    boundary: int = 200
    highest: int = 500
    guidance: float = inference(1.0)
    steps: int = inference(1)
    reconstruction: Literal["guided", "input"] = "guided"
    detach: bool = False
    segmentation: SegmentationConfig = field(default_factory=SegmentationConfig)
    synthesis: SynthesisConfig = field(default_factory=lambda: SynthesisConfig(ridges=1 / 3))
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=1400, batch_size=8, learning_rate=1e-3, ema_decay=0.995
        )
    )
    denoiser_rate: float = 1.0

    def __post_init__(self) -> None:
        """Validate field values."""
        super().__post_init__()
        T = self.prior.num_timesteps
        check_ranges(self, noise_level=(0, T - 1), noise_level_big=(0, T - 1))
        check_ranges(self, boundary=(1, T - 1), highest=(self.boundary + 1, T))
        check_ranges(self, scales=(1, 2), guidance=(0, math.inf), denoiser_rate=(0, math.inf))
        check_ranges(self, steps=(1, 1 + min(self.noise_level, self.noise_level_big)))

    @property
    def first_stage(self) -> AnoDDPMConfig | None:
        """The denoiser's training alone, where there is one and the denoiser is AnoDDPM's."""
        return super().first_stage if self.pretrains and not self.residual_resampling else None

    @property
    def pretrains(self) -> bool:
        """Whether there is a denoiser that is trained alone first."""
        return self.pretrain and self.reconstruction == "guided"

    @classmethod
    def for_profile(cls, profile: Profile, *, category: str | None = None, **shape: Any) -> Self:
        """``ci`` is a smoke test, ``lite`` the defaults; the sources of ``paper`` stand below."""
        base = super().for_profile(profile, category=category, **shape)
        prior = base.prior
        synthesis = replace(base.synthesis, **paper_settings("diffusionad", category))
        base = replace(base, synthesis=synthesis)
        if profile == "ci":
            return replace(base, segmentation=SegmentationConfig(8), train=prior.train)
        if profile == "lite":
            return replace(base, train=replace(base.train, flip_axes=prior.train.flip_axes))
        # Official code, args1.json, train.py, models/: 256 px, images in [0, 1], T = 1000, base
        # 128, (1, 1, 2, 2, 4, 4), two blocks, attention at 32, 16 and 8 px, no pre-training; Adam
        # 1e-4 (denoiser) and 1e-5 (segmentation), batch 16, 3000 epochs, which is about 60,000
        # steps for 320 images; no flips, clipping or averaging; masks and textures as below. Ours
        # differs: one decay of both learning rates, where the code's second one oscillates.
        return replace(
            base,
            prior=replace(prior, attention_levels=(3, 4, 5)),
            pretrain=False,
            residual_resampling=True,
            unit_range=True,
            noise_level=200,
            noise_level_big=400,
            boundary=300,
            highest=1000,
            segmentation=SegmentationConfig(64, (1, 2, 4, 8, 8, 8), batch_norm=True),
            synthesis=replace(synthesis, ridges=0.0, finest=5, texture_root="dtd"),
            train=TrainConfig(
                steps=60_000, learning_rate=1e-5, warmup_steps=0, ema_decay=0.0, grad_clip=0.0
            ),
            denoiser_rate=10.0,
            top_fraction=50 / 256**2,
        )


class Estimates(NamedTuple):
    """What one pass of the denoiser says of images; everything (B, C, H, W).

    Attributes:
        noised: the images at each scale, the small one first.
        noise_hat: the noise in each, estimated.
        x0_hat: the clean image that this implies: with details and what is left of defects at the
            small scale, blurred and more normal at the big one.
        guided: the small one led towards the big one; the reconstruction.
    """

    noised: list[Tensor]
    noise_hat: list[Tensor]
    x0_hat: list[Tensor]
    guided: Tensor


class DiffusionAD(Method):
    """One-step reconstruction from two noise levels, compared by a segmentation network."""

    name = "diffusionad"
    Config = DiffusionADConfig
    config: DiffusionADConfig
    network: Networks

    def _build(self) -> Networks:
        c = self.config
        self.synthesis = Synthesis(c.synthesis)
        networks: dict[str, nn.Module] = {}
        if c.reconstruction == "guided":
            self.prior = prior_of(c.prior, residual_resampling=c.residual_resampling)
            networks["denoiser"], self.diffusion = self.prior.network, self.prior.diffusion
        networks["segmentation"] = SegmentationNet(2 * c.channels, c.segmentation)
        return Networks(networks)

    # Reconstruction: one evaluation of the denoiser at each scale.

    def estimates(
        self,
        denoiser: NoisePredictor,
        images: Tensor,
        levels: Sequence[Tensor],
        noises: Sequence[Tensor],
        guidance: float,
    ) -> Estimates:
        """Noise images to one or two levels, each (B,), and estimate the clean image."""
        d = self.diffusion
        noised = [d.add_noise(images, t, noise) for t, noise in zip(levels, noises, strict=True)]
        both = denoiser(torch.cat(noised), torch.cat(list(levels))).float()
        noise_hat = list(both.chunk(len(levels)))  # both scales were one batch
        x0_hat = [d.clean_estimate(*args) for args in zip(noised, levels, noise_hat, strict=True)]
        guided = x0_hat[0]
        if len(levels) == 2:
            guided = self.norm_guidance(noised[0], levels[0], noise_hat[0], x0_hat[1], guidance)
        return Estimates(noised, noise_hat, x0_hat, guided)

    def norm_guidance(
        self, x_t: Tensor, t: Tensor, noise_hat: Tensor, norm: Tensor, w: float
    ) -> Tensor:
        """Lead the estimate from ``x_t`` towards the reference ``norm``.

        The noise is corrected by the gradient of -1/2 ||x_t - norm_t||^2, as in classifier
        guidance. Before clipping this is ``(1 - m) x0_hat + m norm`` with ``m = w (1 - abar_t)``.
        """
        sigma = (1 - self.diffusion.schedule.alpha_bar(t, x_t)).sqrt()
        norm_t = self.diffusion.add_noise(norm, t, noise_hat)  # with the estimated noise
        return self.diffusion.clean_estimate(x_t, t, noise_hat - w * sigma * (norm_t - x_t))

    def sampled_noise(self, x_t: Tensor, t: Tensor) -> Tensor:
        """The noise that ``steps`` steps of DDIM imply, in the place of one evaluation's."""
        noise_hat, n = [], self.config.scales
        for own, level in zip(x_t.chunk(n), t.chunk(n), strict=True):
            timesteps = self.diffusion.schedule.timesteps(int(level[0]), self.config.steps)
            clean = final_step(
                self.diffusion.ddim_sample(self.network["denoiser"], own, timesteps)
            ).x
            noise_hat.append(self.diffusion.predict_noise(own, level, clean))
        return torch.cat(noise_hat)

    # Training: the noise of normal images, the masks of all.

    def loss(self, networks: nn.ModuleDict, normal: Tensor, generator: torch.Generator) -> Tensor:
        """Loss of a batch: noise of the images left normal, and segmentation of all."""
        c = self.config
        images, masks, anomalous = self.synthesis(normal, generator)
        images = self._in_range(images)
        reconstruction, noise_loss = images, images.new_zeros(())
        if c.reconstruction == "guided":
            ranges = [(0, c.boundary), (c.boundary, c.highest)][: c.scales]
            levels = [torch.randint(*r, (len(images),), generator=generator) for r in ranges]
            levels = [t.to(images.device) for t in levels]
            noises = [randn(images, generator) for _ in ranges]
            found = self.estimates(networks["denoiser"], images, levels, noises, TRAINING_GUIDANCE)
            noise_loss = masked_noise_loss(found.noise_hat, noises, anomalous)
            # Not detached: the denoiser also learns to be compared with, on anomalous images too.
            reconstruction = found.guided.detach() if c.detach else found.guided
        logits = networks["segmentation"](torch.cat([images, reconstruction], 1)).float()
        return noise_loss + segmentation_loss(logits, masks)

    def _fit(self, train: Tensor, **options: Unpack[FitOptions]) -> dict[str, TrainReport]:
        c, budget = self.config, options["budget"]
        reports: dict[str, TrainReport] = {}
        _ = self.synthesis.files  # missing textures are an error now, not after the first stage
        if c.pretrains:
            options["budget"] = remaining_budget(budget, {}, PRIOR_SHARE)
            reports |= self.prior._fit(train, **options)
        options["budget"] = remaining_budget(budget, reports)
        rates = {"denoiser": c.denoiser_rate}
        reports["joint"] = train_network(
            self.network, self.loss, train, c.train, stage="joint", rates=rates, **options
        )
        return reports

    # Inference: noise, estimate, compare.

    def _infer(
        self, images: Tensor, generators: list[torch.Generator]
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        images = self._in_range(images)
        reconstruction = images
        if self.config.reconstruction == "guided":
            reconstruction = self.reconstruct(images, generators).guided
        both = torch.cat([images, reconstruction], 1)
        with torch.no_grad():
            maps = self.network["segmentation"](both).sigmoid()[:, 0]
        return maps, self._in_range(reconstruction, back=True), {}

    @torch.no_grad()
    def reconstruct(self, images: Tensor, generators: list[torch.Generator]) -> Estimates:
        """The estimates at the configured levels, for images in the denoiser's range."""
        c = self.config
        starts = [c.noise_level, c.noise_level_big][: c.scales]
        noises = [randn(images, generators) for _ in starts]
        levels = [torch.full((len(images),), t, device=images.device) for t in starts]
        denoiser = self.network["denoiser"] if c.steps == 1 else self.sampled_noise
        return self.estimates(denoiser, images, levels, noises, c.guidance)

    def _in_range(self, images: Tensor, back: bool = False) -> Tensor:
        """From [-1, 1] to the denoiser's range, or back."""
        if not self.config.unit_range:
            return images
        return 2 * images - 1 if back else (images + 1) / 2

    @exact()
    def explain(
        self, images: Tensor, *, seed: int = 0, keys: Sequence[str] | None = None
    ) -> dict[str, Any]:
        """Also ``estimates``, in the denoiser's range; None for the control without one."""
        common = super().explain(images, seed=seed, keys=keys)  # checks the images, too
        found = None
        if self.config.reconstruction == "guided":
            prepared, generators = self.network_inputs(images, seed, keys)
            found = self.reconstruct(self._in_range(prepared), generators)
            noised, noise_hat, x0_hat = ([x.cpu() for x in part] for part in found[:3])
            found = Estimates(noised, noise_hat, x0_hat, found.guided.cpu())
        return common | {"estimates": found}


def masked_noise_loss(
    noise_hat: Sequence[Tensor], noises: Sequence[Tensor], anomalous: Tensor
) -> Tensor:
    """Mean over the normal images of the squared errors, summed over scales; 0 without any."""
    pairs = zip(noise_hat, noises, strict=True)
    errors = sum((a - b).square().flatten(1).mean(1) for a, b in pairs)  # (B,)
    return (errors * ~anomalous).sum() / (~anomalous).sum().clamp_min(1)
