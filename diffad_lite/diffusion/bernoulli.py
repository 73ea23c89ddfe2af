"""Bernoulli diffusion over bits: closed forms, posteriors, the masked sampler, the loss.

The forward process replaces a bit by a fair coin with probability ``beta_t``, so that after t + 1
steps it has flipped with probability ``(1 - abar_t) / 2``. A *flip predictor* is any callable
``flip_logits(z_t, t)`` -> logits of ``P(z_t differs from z_0)``, bit by bit; bits are floats 0 and
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
Posterior = Callable[[Tensor, Tensor, int, int], Tensor]
Process = Literal["symmetric", "erasure"]


class BitStep(NamedTuple):
    """One moment of a sampling chain.

    Attributes:
        t: the timestep that ``z`` now has (-1 = clean).
        z: the state, bits (B, ...).
        flip: probability that a bit of the state before is not its clean value, or None at first.
        z0_hat: probability that the clean bit is 1, or None at first.
        mask: 1 where a bit was ever suspected, else 0.
    """

    t: int
    z: Tensor
    flip: Tensor | None
    z0_hat: Tensor | None
    mask: Tensor


class BernoulliDiffusion:
    """Bernoulli diffusion over one noise schedule.

    Args:
        schedule: its ``abar_t`` is the probability that a bit has never been replaced.
        process: ``symmetric`` is the process of the papers; in ``erasure``, which the public codes
            of BerDiff and of masked Bernoulli diffusion compute (a term stands on a line of its
            own), ones fade and zeros stay. The posterior is the symmetric one in both, as there.
    """

    def __init__(self, schedule: NoiseSchedule, process: Process = "symmetric") -> None:
        self.schedule, self.process = schedule, process

    # The forward process.

    def marginal(self, z0: Tensor, t: int | Tensor) -> Tensor:
        """``P(z_t = 1 | z_0) = abar_t z_0 + (1 - abar_t) / 2``, for bits or probabilities z0."""
        abar = self.schedule.alpha_bar(t, z0)
        fair = (1 - abar) / 2 if self.process == "symmetric" else 0.0
        return abar * z0 + fair

    def add_noise(self, z0: Tensor, t: int | Tensor, generators: Generators) -> Tensor:
        """Draw ``z_t`` given ``z_0``."""
        return sample_bits(self.marginal(z0, t), generators)

    # The way back. All posteriors are P(z_s = 1 | z_t, z_0), from t to any s < t.

    def posterior(self, z_t: Tensor, z0: Tensor, t: int, s: int) -> Tensor:
        """Bayes' rule, per bit; a probability ``z0`` is put in the place of the bit.

        That is what the public codes do; it is exact for bits only.
        """
        abar_t, abar_s = self.schedule.alpha_bar(t, z_t), self.schedule.alpha_bar(s, z_t)
        alpha = abar_t / abar_s  # of the stride
        one = (alpha * z_t + (1 - alpha) / 2) * (abar_s * z0 + (1 - abar_s) / 2)
        zero = (alpha * (1 - z_t) + (1 - alpha) / 2) * (abar_s * (1 - z0) + (1 - abar_s) / 2)
        return one / (one + zero)

    def mixture_posterior(self, z_t: Tensor, z0: Tensor, t: int, s: int) -> Tensor:
        """The posterior for an uncertain ``z_0``: the two of a sure one, weighted."""
        sure = [self.posterior(z_t, torch.full_like(z_t, bit), t, s) for bit in (0.0, 1.0)]
        return (1 - z0) * sure[0] + z0 * sure[1]

    def strided(self, z_t: Tensor, z0: Tensor, t: int, s: int) -> Tensor:
        """P(bit = 1) of the step that keeps most of the state, as DDIM's does.

        ``z_s ~ k z_t + (abar_s - k abar_t) z_0 + rest / 2``, ``k = (1 - abar_s) / (1 - abar_t)``
        (Song et al. 2021, appendix A, for two classes): the marginal at ``s`` is exact, and as
        ``k + abar_s - k abar_t = 1`` there is no rest.

        Args:
            z_t: bits (B, ...).
            z0: clean bits, or P(clean bit = 1), likewise.
            t: timestep of ``z_t``, above ``s``.
            s: timestep to step to.
        """
        abar_t, abar_s = self.schedule.alpha_bar(t, z_t), self.schedule.alpha_bar(s, z_t)
        kept = (1 - abar_s) / (1 - abar_t)
        return kept * z_t + (abar_s - kept * abar_t) * z0

    # Training: which bits have flipped?

    def loss(
        self, predictor: FlipPredictor, z0: Tensor, t: Tensor, generators: Generators
    ) -> Tensor:
        """Cross entropy of the flips, in bits a bit; a scalar.

        It equals that of the clean bits; only what "no change" looks like differs.
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
        posterior: Posterior | None = None,
    ) -> Iterator[BitStep]:
        """Noise the code ``z`` to ``timesteps[0]`` and denoise it, yielding every state.

        A bit is suspected, from then on, once its predicted flip is more likely than
        ``threshold``. The others are told that their clean value is the bit of ``z``. The last
        step gives bits. A threshold below 0 suspects all (plain sampling), 1 none.

        Args:
            predictor: see the module.
            z: code of the image, bits (B, ...).
            timesteps: decreasing.
            generators: one, or one for each image.
            threshold: P.
            suspect: whether the flip is that of the noisy ``state``, as published, or of the
                ``input`` bit, so that noise alone raises no suspicion.
            posterior: of a step; default :meth:`posterior`.
        """
        posterior = posterior or self.posterior
        z_t, mask = self.add_noise(z, timesteps[0], generators), torch.zeros_like(z)
        yield BitStep(timesteps[0], z_t, None, None, mask)
        for t, s in zip(timesteps, [*timesteps[1:], -1], strict=True):
            levels = torch.full((len(z),), t, device=z.device)
            flip = predictor(z_t, levels).float().sigmoid()
            z0_hat = (z_t - flip).abs()
            suspicion = flip if suspect == "state" else (z0_hat - z).abs()
            mask = torch.maximum(mask, (suspicion > threshold).to(mask))
            clean = mask * z0_hat + (1 - mask) * z
            if s < 0:
                z_t = (clean > 0.5).to(z)
            else:
                z_t = sample_bits(posterior(z_t, clean, t, s), generators)
            yield BitStep(s, z_t, flip, z0_hat, mask)


def sample_bits(probability: Tensor, generators: Generators) -> Tensor:
    """Bits 0 or 1, of the type of ``probability`` (B, ...), which is P(1)."""
    drawn = draw(torch.rand, probability.shape, generators).to(probability)
    return (drawn < probability).to(probability)
