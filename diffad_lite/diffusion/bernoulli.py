"""Bernoulli diffusion over bits: closed forms, the posterior, the masked sampler, the loss.

The forward process replaces a bit by a fair coin with probability ``beta_t``. After t + 1 steps it
has flipped with probability ``(1 - abar_t) / 2``. A *flip predictor* is any callable
``flip_logits(z_t, t)`` -> logits of ``P(z_t differs from z_0)``, bit by bit. Bits are floats 0 and
1, (B, ...). After BerDiff (Chen et al. 2023), Binary Latent Diffusion (Wang et al. 2023) and
masked Bernoulli diffusion (Wolleb et al. 2024, arXiv 2403.11667).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from diffad_lite.diffusion.gaussian import Generators, draw
from diffad_lite.diffusion.schedules import NoiseSchedule

FlipPredictor = Callable[[Tensor, Tensor], Tensor]
Process = Literal["symmetric", "erasure"]


class BitStep(NamedTuple):
    """One state of a sampling chain.

    Attributes:
        t: timestep of ``z`` (-1 = clean).
        z: the state, bits (B, ...).
        flip: P(bit of the previous state differs from its clean value); None for the first state.
        z0_hat: P(clean bit = 1); None for the first state.
        mask: 1 where a bit was suspected in any step so far, else 0.
    """

    t: int
    z: Tensor
    flip: Tensor | None
    z0_hat: Tensor | None
    mask: Tensor


class BernoulliDiffusion:
    """Bernoulli diffusion over one noise schedule.

    Args:
        schedule: its ``abar_t`` is the probability that a bit was never replaced.
        process: ``symmetric`` is the process of the papers. In ``erasure``, ones fade and zeros
            stay: the public codes of BerDiff and of masked Bernoulli diffusion compute this, since
            a term stands on a separate line. Both use the symmetric posterior, as those codes do.
    """

    def __init__(self, schedule: NoiseSchedule, process: Process = "symmetric") -> None:
        self.schedule, self.process = schedule, process

    # The forward process.

    def marginal(self, z0: Tensor, t: int | Tensor) -> Tensor:
        """Return ``P(z_t = 1 | z_0) = abar_t z_0 + (1 - abar_t) / 2``, also of probabilities z0."""
        abar = self.schedule.alpha_bar(t, z0)
        fair = (1 - abar) / 2 if self.process == "symmetric" else 0.0
        return abar * z0 + fair

    def add_noise(self, z0: Tensor, t: int | Tensor, generators: Generators) -> Tensor:
        """Draw ``z_t`` given ``z_0``."""
        return sample_bits(self.marginal(z0, t), generators)

    # The reverse process.

    def posterior(self, z_t: Tensor, z0: Tensor, t: int, s: int) -> Tensor:
        """Return ``P(z_s = 1 | z_t, z_0)`` for any s < t, by Bayes' rule, per bit.

        It is exact for bits ``z0``. A probability is inserted like a bit, as in the public codes.
        """
        abar_t, abar_s = self.schedule.alpha_bar(t, z_t), self.schedule.alpha_bar(s, z_t)
        alpha = abar_t / abar_s  # of all steps from s to t
        one = (alpha * z_t + (1 - alpha) / 2) * (abar_s * z0 + (1 - abar_s) / 2)
        zero = (alpha * (1 - z_t) + (1 - alpha) / 2) * (abar_s * (1 - z0) + (1 - abar_s) / 2)
        return one / (one + zero)

    # Training: which bits were flipped?

    def loss(
        self, predictor: FlipPredictor, z0: Tensor, t: Tensor, generators: Generators
    ) -> Tensor:
        """Return the cross entropy of the flips, in bits per bit; a scalar.

        It equals the cross entropy of the clean bits. They differ only for a network that always
        predicts 0: here it predicts "no change".
        """
        z_t = self.add_noise(z0, t, generators)
        flipped = (z_t != z0).to(z0)
        logits = predictor(z_t, t).float()
        return F.binary_cross_entropy_with_logits(logits, flipped) / math.log(2)

    # Sampling.

    def masked_sample(
        self,
        predictor: FlipPredictor,
        z: Tensor,
        timesteps: Sequence[int],
        generators: Generators,
        threshold: float,
        *,
        suspect: Literal["state", "input"] = "state",
    ) -> Iterator[BitStep]:
        """Add noise to the code ``z`` up to ``timesteps[0]`` and denoise it; yield every state.

        A bit is suspected from the step on in which its flip probability exceeds ``threshold``.
        For all other bits, the clean value is the bit of ``z``. The last step returns bits. A
        threshold below 0 suspects all bits (plain sampling), a threshold of 1 none.

        Args:
            predictor: see the module.
            z: code of the image, bits (B, ...).
            timesteps: decreasing.
            generators: one, or one for each image.
            threshold: P.
            suspect: compare the flip probability of the noisy ``state``, as published, or of the
                ``input`` bit, so that noise alone raises no suspicion.
        """
        z_t, mask = self.add_noise(z, timesteps[0], generators), torch.zeros_like(z)
        yield BitStep(timesteps[0], z_t, None, None, mask)
        for t, s in zip(timesteps, [*timesteps[1:], -1], strict=True):
            flip = predictor(z_t, torch.full((len(z),), t, device=z.device)).float().sigmoid()
            z0_hat = (z_t - flip).abs()
            suspicion = flip if suspect == "state" else (z0_hat - z).abs()
            mask = torch.maximum(mask, (suspicion > threshold).to(mask))
            clean = mask * z0_hat + (1 - mask) * z
            if s < 0:
                z_t = (clean > 0.5).to(z)
            else:
                z_t = sample_bits(self.posterior(z_t, clean, t, s), generators)
            yield BitStep(s, z_t, flip, z0_hat, mask)


def sample_bits(probability: Tensor, generators: Generators) -> Tensor:
    """Draw bits that are 1 with ``probability`` (B, ...), in its dtype."""
    drawn = draw(torch.rand, probability.shape, generators).to(probability)
    return (drawn < probability).to(probability)
