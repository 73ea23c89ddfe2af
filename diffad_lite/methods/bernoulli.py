"""Masked Bernoulli diffusion (Wolleb et al. 2024): flip the bits that do not belong.

An autoencoder turns an image into bits. A Bernoulli diffusion model, trained on the codes of normal
images only, predicts which bits of a noised code are flipped. Bits whose flip probability exceeds a
threshold may change from then on; all others keep the image's value. The anomaly map is the
difference to the decoded result. Read top to bottom: configuration, two trainings, the masked
chain, map.

After arXiv 2403.11667 and the official code (JuliaWolleb/Anomaly_berdiff). That code's forward
process lacks a term (``process="erasure"``); the paper's is the default here.
"""

from collections.abc import Iterable, Iterator
from dataclasses import field, replace
from typing import Annotated, Literal, Unpack

import torch
from pydantic import Field
from torch import Tensor, nn

from diffad_lite.core.config import (
    Count,
    NonNegative,
    Size,
    Timestep,
    Widths,
    check_at_most,
    configuration,
)
from diffad_lite.diffusion.bernoulli import BernoulliDiffusion, BitStep, Process, sample_bits
from diffad_lite.diffusion.gaussian import final_step
from diffad_lite.diffusion.schedules import BetaSchedule, NoiseSchedule
from diffad_lite.methods.base import (
    Inferred,
    Method,
    MethodConfig,
    Networks,
    TopFraction,
    Trace,
    inference,
)
from diffad_lite.networks.autoencoder import AutoencoderConfig, BinaryAutoencoder
from diffad_lite.networks.unet import UNet
from diffad_lite.training.loop import FitOptions, TrainReport, remaining_budget, train_network
from diffad_lite.training.state import TrainConfig

AUTOENCODER_FRACTION = 0.5  # of a time budget


@configuration
class BernoulliConfig(MethodConfig):
    """Configuration of :class:`Bernoulli`; defaults are the lite profile at 64 pixels.

    Attributes:
        autoencoder: sizes of the autoencoder.
        edges: weight, in its loss, of the differences between neighbouring pixels.
        code_weight: likewise of ``4 y (1 - y)``, y = P(bit = 1): a bit that changes from draw to
            draw cannot be predicted. (The official code has another term, of weight 0.)
        train_autoencoder: training of the autoencoder.
        beta_schedule: of the forward process.
        num_timesteps: T.
        process: ``symmetric``, or the official code's ``erasure``.
        base_channels: of the network that predicts flips, as the next five, see
            :class:`~diffad_lite.networks.unet.UNet`.
        channel_mults: widths of the levels.
        blocks_per_level: residual blocks.
        attention_levels: levels with self-attention.
        attention_heads: of each; None: one for every 32 channels.
        norm_groups: of each GroupNorm; None: at most 32, of at least 4 channels each.
        train: training of the flip predictor.
        noise_level: start timestep, 0 .. T-1; L - 1 in the paper.
        steps: network evaluations from there to a clean code.
        threshold: P, of the flip probability; a bit above it may change. Below 0 all bits may
            change; at 1 none may, and the map is the residual of the autoencoder.
        suspect: whether the flip is that of the noisy ``state``, as published, or of the
            ``input`` bit.
        n_chains: chains whose maps are averaged.
    """

    profiles = "bernoulli"

    standardise: bool = True  # chosen on development defects and uncertain cells, as what follows
    top_fraction: TopFraction = 0.03
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    edges: NonNegative = 0.2
    code_weight: NonNegative = 0.01
    train_autoencoder: TrainConfig = field(
        default_factory=lambda: TrainConfig(steps=4000, learning_rate=1e-3)
    )
    beta_schedule: BetaSchedule = "linear"
    num_timesteps: Count = 1000
    process: Process = "symmetric"
    base_channels: Size = 32
    channel_mults: Widths = (1, 2)
    blocks_per_level: Size = 1
    attention_levels: tuple[int, ...] = (1,)
    attention_heads: Size | None = None
    norm_groups: Size | None = None
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(steps=8000, batch_size=32, learning_rate=5e-4)
    )
    noise_level: Timestep = inference(99)
    steps: Count = inference(10)
    threshold: Annotated[float, Field(ge=-1, le=1)] = inference(0.5)
    suspect: Literal["state", "input"] = inference("state")
    n_chains: Count = inference(4)

    def __post_init__(self) -> None:
        """Validate fields against each other."""
        check_at_most(self, noise_level=self.num_timesteps - 1)
        check_at_most(self, steps=self.noise_level + 1)
        factor = self.autoencoder.factor
        if self.image_size % factor:
            raise ValueError(
                f"{type(self).__qualname__}.image_size must be a multiple of {factor}, the side of "
                f"an autoencoder cell in pixels, got {self.image_size}"
            )


class Bernoulli(Method):
    """Diffusion of bits that keeps the bits without suspected flips.

    Network evaluations are those of the flip predictor; the autoencoder adds one to encode an
    image and one per chain to decode it. :meth:`explain` adds, of the first chain, ``code``
    (B, bits, h, w), ``chain``, a list of :class:`~diffad_lite.diffusion.bernoulli.BitStep`, and
    ``decoded`` (B, C, H, W), the image of the unchanged code.
    """

    name = "bernoulli"
    title = "masked Bernoulli"
    Config = BernoulliConfig
    config: BernoulliConfig
    network: Networks

    def _build(self) -> Networks:
        c = self.config
        schedule = NoiseSchedule.named(c.beta_schedule, c.num_timesteps)
        self.diffusion = BernoulliDiffusion(schedule, c.process)
        flips = UNet(
            c.autoencoder.bits,
            base_channels=c.base_channels,
            channel_mults=c.channel_mults,
            blocks_per_level=c.blocks_per_level,
            attention_levels=c.attention_levels,
            attention_heads=c.attention_heads,
            norm_groups=c.norm_groups,
        )
        autoencoder = BinaryAutoencoder(c.channels, c.autoencoder)
        return Networks({"autoencoder": autoencoder, "flips": flips})

    @property
    def sides(self) -> tuple[int, int]:
        """Return the smallest and the dividing side: cells of the autoencoder fill the image."""
        factor = self.config.autoencoder.factor
        return factor, factor

    # Training: first the bits, then which of them are flipped.

    def autoencoder_loss(self, network: nn.Module, x: Tensor, generator: torch.Generator) -> Tensor:
        """Return the absolute error of pixels and of their differences, plus the code term.

        A scalar; see ``edges`` and ``code_weight``.
        """
        decoded, y = network(x, generator)
        error, uncertainty = decoded.float() - x, (4 * y * (1 - y)).mean()
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        c = self.config
        return error.abs().mean() + c.edges * edges + c.code_weight * uncertainty

    def flip_loss(self, network: nn.Module, y: Tensor, generator: torch.Generator) -> Tensor:
        """Return the cross entropy of flips, in bits per bit; codes have P(bit = 1) = ``y``."""
        t = torch.randint(self.config.num_timesteps, (len(y),), generator=generator)
        return self.diffusion.loss(network, sample_bits(y, generator), t.to(y.device), generator)

    def _fit(self, train: Tensor, **options: Unpack[FitOptions]) -> dict[str, TrainReport]:
        c, budget = self.config, options["budget"]
        autoencoder: BinaryAutoencoder = self.network["autoencoder"]
        first = train_network(
            autoencoder,
            self.autoencoder_loss,
            train,
            c.train_autoencoder,
            stage="autoencoder",
            **(options | {"budget": remaining_budget(budget, {}, AUTOENCODER_FRACTION)}),
        )
        options["budget"] = remaining_budget(budget, {"autoencoder": first})
        # The code of a flipped image is not the flipped code: encode both.
        for axis in c.train.flip_axes:
            train = torch.cat([train, train.flip(axis)])
        codes = torch.cat([self.encode(batch.to(self.device)).cpu() for batch in train.split(32)])
        settings = replace(c.train, flip_axes=())
        second = train_network(
            self.network["flips"], self.flip_loss, codes, settings, stage="flips", **options
        )
        return {"autoencoder": first, "flips": second}

    # Inference: a masked chain of bits, decoded.

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Return P(bit = 1) of the codes (B, bits, h, w) of images as the networks see them."""
        return self.network["autoencoder"].bit_probability(images)

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Return the images (B, C, H, W) of codes, clipped to [-1, 1]."""
        return self.network["autoencoder"].decode(z).clamp(-1, 1)

    @torch.no_grad()
    def chain(self, z: Tensor, generators: list[torch.Generator]) -> Iterator[BitStep]:
        """Noise codes (B, bits, h, w) and repair them; yield every state, the clean one last."""
        c = self.config
        timesteps = self.diffusion.schedule.timesteps(c.noise_level, c.steps)
        yield from self.diffusion.masked_sample(
            self.network["flips"], z, timesteps, generators, c.threshold, suspect=c.suspect
        )

    def _infer(
        self, images: Tensor, generators: list[torch.Generator], trace: Trace | None = None
    ) -> Inferred:
        y, changed = self.encode(images), []
        residuals: list[Tensor] = []
        reconstructions: list[Tensor] = []
        for _ in range(self.config.n_chains):
            z = sample_bits(y, generators)
            steps: Iterable[BitStep] = self.chain(z, generators)
            if trace is not None and not residuals:
                trace |= {"code": z, "chain": list(steps), "decoded": self.decode(z)}
                steps = trace["chain"]
            repaired = final_step(steps).z
            reconstructions.append(self.decode(repaired))
            residuals.append((images - reconstructions[-1]).abs().mean(1))
            changed.append((repaired != z).float().mean(1))
        extras = {"changed": torch.stack(changed).mean(0)}  # fraction of bits, (B, h, w)
        return torch.stack(residuals).mean(0), torch.stack(reconstructions).mean(0), extras
