# %% [markdown]
# # 06 · Masked Bernoulli diffusion
#
# **Write a picture as bits, flip some of them by chance, and let a network that has seen healthy codes only say which
# bits are wrong. Bits that it suspects may change, all others are held. What does the mask buy, and what is already
# done when the picture has become bits?**
#
# | At a glance | |
# | --- | --- |
# | Level | advanced |
# | Minutes (ci / lite / paper) | under 1 / 1 to 2 / hours on a GPU (it trains the model); 40 to read |
# | Memory | about 2 GB |
# | Downloads | none |
# | Previous | [05](05_mdps.ipynb) |
# | Next | [07](07_grad.ipynb) |

# %% [markdown]
# ## You will be able to
#
# - turn a picture into bits and back, and say what the gradient through a coin is worth;
# - write Bernoulli noise in closed form, and test it by Monte Carlo from both bit values;
# - find the posterior of a bit by Bayes' rule, and see what it costs to put a probability in the place of a bit;
# - show what one missing term in a noising process does to a detector;
# - follow the masked chain, and say what its level and its threshold trade;
# - separate what the diffusion contributes from what the autoencoder does alone.
#
# ## Prerequisites
#
# [01](01_ddpm_basics.ipynb): forward process, posterior, clean estimate.
# [02](02_sampling_to_detection.ipynb): what is left of a planted defect; the noise level's dilemma.
# [05](05_mdps.ipynb): a mask of what is suspect, and what it did not buy.

# %% tags=["parameters"]
profile: str = "lite"  # ci | lite | paper
dataset: str = "elpv"  # data set; "folder" reads your own
category: str = "mono"  # its category
root: str = ""  # folder of images, for dataset "folder"
seed: int = 0  # all randomness
retrain: bool = False  # train anew instead of loading bundled weights
out_dir: str = "runs/notebooks"  # where a training goes

# %% tags=["setup"]
import copy
import math
import time
import weakref

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from IPython.display import Markdown
from torch.utils._python_dispatch import TorchDispatchMode

from diffad_lite import plots
from diffad_lite.data import data_dir, image_keys, load_dataset
from diffad_lite.diffusion import BernoulliDiffusion, noise_generators, sample_bits
from diffad_lite.evaluation import metrics, records, tables
from diffad_lite.experiments import Run, pretrained_or_train
from diffad_lite.methods import AnoDDPM, AnoDDPMConfig
from diffad_lite.networks import straight_through
from diffad_lite.notebook import explore, resolve_profile

profile = resolve_profile(profile)
plots.use_style()
quick = profile == "ci"
as_described = (dataset, category) == ("elpv", "mono")  # what the text speaks of
checked = as_described and not quick  # and whose numbers it speaks of
print("profile:", profile)

# %% [markdown]
# ## Noise for bits
#
# Gaussian noise moves a grey value a little. A bit has no "a little": it is right or wrong. Masked Bernoulli diffusion
# (Wolleb et al. 2024, "Binary Noise for Binary Tasks") uses that for detection:
#
# 1. an **autoencoder** writes the picture as a grid of bits, the *code* $z$;
# 2. the code is noised: some bits flip by chance;
# 3. a network that was trained on codes of healthy pictures says for each bit how likely it is to be **wrong**;
# 4. bits that it suspects go into a **mask** and may change; for all others the clean value is given, the bit of
#    the picture at hand;
# 5. after some steps the repaired code is decoded, and the map is the difference to the picture.
#
# Since most bits are held, most of the picture should stay as it is. This notebook takes that idea apart.
#
# (This notebook's own letters: $z$, bits; $y = \Pr(\text{bit} = 1)$, what the encoder says; $\mathcal B(y)$, the draw
# of a bit that is 1 with probability $y$; $e_n$, a codeword; $\varphi_t$, the probability of a flip by time $t$;
# $\oplus$, "differs from"; $f$, the network's probability of a flip; $h$, entropy in bits; $L$, the number of noise
# levels gone through, and $P$, the threshold of suspicion, as in the public code. Probabilities are written $\Pr$.
# The mask $m$ is 1 where the model's bit is taken.)

# %% tags=["context"]
source = dataset, category or None
run = Run("bernoulli", *source, root or None, profile=profile, seed=seed)
whole = run.load_data()
data = whole.subset(8 if quick else 48)
labels = data.test_labels
method = pretrained_or_train(run, whole, retrain=retrain, out_dir=out_dir)
device, c, diffusion = method.device, method.config, method.diffusion
autoencoder, flips = method.network["autoencoder"], method.network["flips"]
schedule, side = diffusion.schedule, c.image_size // c.autoencoder.factor

# %% tags=["context"]
print(f"{len(labels)} test images, {labels.sum()} of them anomalous")
print(f"code: {c.autoencoder.bits} bits for each of {side} x {side} cells of the grid")
print(f"L = {c.noise_level + 1} (t = {c.noise_level}), P = {c.threshold}")
print(f"{c.n_chains} chains of {c.steps} steps")

# %% [markdown]
# As in notebooks 04 and 05 the networks see standardised cells, and planted cells are standardised as their healthy
# twins are. ("Cell" is a solar cell here, and a square of the bit grid is called a *grid cell*.)

# %% tags=["context"]
size = run.image_size
options = {"root": run.root, "image_size": size}
planted = load_dataset(*source, **options, plant="cells")
normals = len(planted.test_labels) // 2  # normal cells first, then the planted ones
pairs = min(5 if quick else 15, normals)
healthy = planted.test_images[:pairs]  # as they are read
sick = planted.test_images[normals : normals + pairs]
kinds = np.array(planted.defect_types[normals : normals + pairs])
keys = image_keys(healthy)  # seeds of the noise
index = {kind: int(np.flatnonzero(kinds == kind)[0]) for kind in dict.fromkeys(kinds)}
crack, inactive, last = index["crack"], index["inactive"], list(index.values())[-1]


# %% tags=["context"]
clean = method.prepare(healthy).to(device)
defect = method.prepare(sick, like=healthy).to(device)
change = defect - clean
truth = (change.abs().amax(1, keepdim=True) > 0.02).float()


# %% tags=["context"]
def rng(seed):
    return torch.Generator().manual_seed(seed)


# %% tags=["context"]
@torch.no_grad()
def drawn(images, *, keys=keys, seed=seed, **changes):
    """One chain for each of images (B, C, H, W): the code, and every step."""
    own = noise_generators(keys, seed)
    z = sample_bits(method.encode(images), own)
    return z, list(method.with_settings(**changes).chain(z, own))


def auroc(labels, scores):
    return metrics.image_metrics(labels, np.asarray(scores))["image_auroc"]


# %% tags=["context"]
def as_picture(maps, white=1.0):
    """Maps (B, H, W) as images (B, C, H, W); 0 is black, ``white`` is white."""
    grey = (2 * maps / white - 1)[:, None].clamp(-1, 1)
    return grey.expand(-1, c.channels, -1, -1).cpu()


# %% [markdown]
# A first look at all the parts, on three planted cells and a healthy twin. (From $t = 199$, that is $L = 200$,
# instead of the lite profile's lower level, where the eye sees little.)
#
# **Predict**: how different is the decoded code, before anything is repaired, from the cell?

# %%
four = torch.stack([defect[crack], defect[inactive], defect[last], clean[last]])
four_keys = [keys[i] for i in (crack, inactive, last, last)]
names = [*kinds[[crack, inactive, last]], "its twin"]
high = {"noise_level": 199, "steps": 10 if quick else 20}
z, steps = drawn(four, keys=four_keys, **high)
decoded, repaired = method.decode(z), method.decode(steps[-1].z)
noised = method.decode(steps[0].z)
changed = (steps[-1].z != z).float().mean(1)
residual = (four - repaired).abs().mean(1)

# %%
columns = [four.cpu(), decoded.cpu(), noised.cpu(), repaired.cpu()]
columns += [as_picture(changed, 0.5), as_picture(residual, 0.5 * float(residual.max()))]
heads = ["decoded", "noised", "repaired", "bits changed", "map"]
titles = [text for name in names for text in (name, *heads)]
rows = [image for row in zip(*columns, strict=True) for image in row]
fig, _ = plots.show_images(rows, titles, columns=6)
apart = (four - decoded).abs().mean((1, 2, 3))
print("cell - decoded code, mean:", [round(v, 3) for v in apart.tolist()])
assert not checked or apart[1] > 1.5 * apart[3]

# %% [markdown]
# *Figure: cell (standardised); its code, decoded as it is; the noised code, decoded; the repaired one; the share of
# bits that were changed in each grid cell (white: half and more); the map (one scale). List: how far the second
# column is from the first.* Look at the second column. Nothing has been noised or repaired there, and most of the
# crack is gone: the code was learnt on healthy cells. (Of the mirrored patch a smear is left, and there many bits
# change.)
#
# ## Bits and pictures
#
# ### A grid of bits
#
# The encoder $E$ gives each grid cell a probability for each of its bits, and the bits are drawn. A grid cell's vector
# is the sum of the learned codewords $e_n$ of the bits that are 1, and the decoder $D$ makes the picture:
#
# $$y = \operatorname{sigmoid}(E(x)) , \qquad z \sim \mathcal B(y) , \qquad
# \hat x = D\Big(\sum_n z_n\,e_n\Big) .$$

# %%
with torch.no_grad():
    sums = torch.einsum("bnhw,dn->bdhw", z, autoencoder.codewords.weight[:, :, 0, 0])
    torch.testing.assert_close(autoencoder.codewords(z), sums, rtol=1e-4, atol=1e-4)
pixels, bits = 8 * four[0].numel(), z[0].numel()
print(f"{pixels} bits of pixels, {bits} bits of code: {pixels / bits:.0f} to 1")
planes = as_picture(z[0])
titles = ["crack", *(f"bit {n + 1}" for n in range(len(planes))), "decoded"]
rows = [four[0].cpu(), *planes, decoded[0].cpu()]
fig, _ = plots.show_images(rows, titles, columns=5)

# %% [markdown]
# *Figure: a cell, the bits of its code (white: 1), and what they decode to.* Single bits follow wires and rims, and
# none of them shows the crack. (The paper profile, as the public code, has 128 bits for each 8 x 8 pixels; for grey
# pictures that is 4 to 1.)
#
# ### A gradient through a coin
#
# How is an encoder trained when its output is drawn? A coin has no derivative. The *straight-through* trick uses the
# bit on the way forward, and on the way back pretends that it was $y$:
#
# $$z_{\rm st} = y + \operatorname{stop\,gradient}(z - y) , \qquad \frac{\partial z_{\rm st}}{\partial y} = 1 .$$
#
# Is that the right gradient? For one bit and a loss $\ell(z)$ the expected loss is $y\,\ell(1) + (1-y)\,\ell(0)$, with
# the derivative $\ell(1) - \ell(0)$. The trick gives $y\,\ell'(1) + (1-y)\,\ell'(0)$ on average instead.
#
# **Predict** for $\ell(z) = (z - 0.3)^2$: to which $y$ does the true gradient lead, and to which the trick?

# %%
aim, coins = 0.3, 20_000
print("   y   true gradient   straight-through   (mean of coins)")
for p in (0.1, 0.3, 0.5, 0.9):
    prob = torch.full((1, coins), p, requires_grad=True)
    loss = (straight_through(prob, rng(seed)) - aim).square().mean()
    (gradient,) = torch.autograd.grad(loss, prob)
    true, trick = (1 - aim) ** 2 - aim**2, 2 * p - 2 * aim
    print(f"{p:4}{true:16.2f}{trick:19.2f}{gradient.sum():18.2f}")
    assert abs(gradient.sum() - trick) < 0.05

# %% [markdown]
# The true gradient always pushes $y$ down, to 0: the loss is smaller with a bit that is surely 0. The trick stops at
# $y = 0.3$, where the *mean* of the bit is right and every single draw is wrong. It is exact for linear losses (here
# at $y = 0.5$ only), and otherwise it can **leave bits undecided**. That matters, because a bit that is drawn anew each
# time the picture is encoded is noise, and no model can predict it. So training adds a penalty for undecided bits,
# `code_weight` times the mean of $4\,y\,(1-y)$. (The public code has a term of that kind with weight 0; see the table
# at the end.)

# %%
normal = method.prepare(data.calibration[: 8 if quick else 40]).to(device)
normal_keys = image_keys(normal.cpu())
y = method.encode(normal)
z = sample_bits(y, noise_generators(normal_keys, seed))


def entropy(p):
    """h(p) in bits, elementwise."""
    p = p.double().clamp(1e-12, 1 - 1e-12)
    return -(p * p.log2() + (1 - p) * (1 - p).log2())


# %%
usage = y.mean((0, 2, 3))  # of each bit, over pictures and grid cells
never = ((usage < 0.01) | (usage > 0.99)).float().mean().item()
unsure = entropy(y).mean().item()
between = ((y > 0.1) & (y < 0.9)).float().mean().item()
print(f"entropy of a bit given its picture: {unsure:.2f} (a fair coin: 1)")
print(f"P(1) between 0.1 and 0.9: {between:.0%} of all")
print(f"nearly always 0, or nearly always 1: {never:.0%} of all")
fig, ax = plt.subplots(figsize=(6.2, 2.6))
ax.hist(y.flatten().cpu(), 40, color=plots.COLOURS[0])
ax.set(xlabel="probability that a bit is 1", ylabel="bits", yscale="log")
plt.show()
assert not checked or (unsure < 0.25 and never == 0)

# %% [markdown]
# *Figure: what the encoder says of the bits of healthy calibration cells (logarithmic scale).* Most bits are sure,
# and every bit is used: each is 1 in some places and 0 in others. (In development, codes learnt without the penalty
# were less sure, at nearly the same error of the picture; no record of those runs was kept.)
#
# ### What one bit changes
#
# **Predict**: flip one of the bits of a grid cell of 4 x 4 pixels. How far does the picture change?

# %%
here = side // 2, side // 3  # a grid cell
code = z[:1].expand(c.autoencoder.bits, -1, -1, -1).clone()
for n in range(c.autoencoder.bits):
    code[n, n, *here] = 1 - code[n, n, *here]  # row n: bit n flipped
effect = (method.decode(code) - method.decode(z[:1])).abs().mean(1)
print("largest change of a pixel:", [round(v, 2) for v in effect.amax((1, 2)).tolist()])

# %%
factor, around = c.autoencoder.factor, {}
for reach in (0, 1, 3):  # grid cells to each side
    window = [slice(factor * max(0, i - reach), factor * (i + reach + 1)) for i in here]
    inside = effect[:, window[0], window[1]].sum((1, 2)) / effect.sum((1, 2))
    around[reach] = inside.mean().item()
    wide = factor * (2 * reach + 1)
    print(f"within {wide:2d} x {wide:2d} pixels: {around[reach]:.0%} of the change")

# %%
titles = ["cell", "decoded", *(f"bit {n + 1}" for n in range(len(effect)))]
shown = [normal[0].cpu(), method.decode(z[:1])[0].cpu()]
shown += list(as_picture(effect, float(effect.max())))
fig, _ = plots.show_images(shown, titles, columns=5)
assert not checked or (around[0] < 0.3 and around[3] > 2 * around[0])

# %% [markdown]
# *Figure: a healthy cell, its decoded code, and the change of the picture for each bit of one grid cell (one
# scale).* A bit is a statement about a neighbourhood, and one among many: alone it changes hardly anything, and most
# of its change lies *outside* of its own 4 x 4 pixels, along the wire here. The decoder weighs it against the bits
# around. So a mask of bits is a mask of pixels only roughly, and nothing finer than a neighbourhood of grid cells
# can be held or freed.
#
# ### What the code does to a defect
#
# How much of a planted defect does the code keep? As in 02, the decoded twin with the same noise is subtracted. With
# $x'$ for the defective cell, $x$ for its healthy twin, and $\hat x'$, $\hat x$ for their decoded codes,
#
# $$\text{share left} = \frac{\langle \hat x' - \hat x,\; x' - x\rangle}{\|x' - x\|^2} .$$


# %% tags=["context"]
def share_left(pictures, twins):
    """What decoded pictures (pairs, C, H, W) keep of each defect; numpy (pairs,)."""
    kept = ((pictures - twins) * change).flatten(1).sum(1)
    return (kept / change.square().flatten(1).sum(1)).cpu().numpy()


def interval(values):
    """Mean of values (n,) and its 95 % bootstrap interval, as text."""
    draws = np.random.default_rng(seed).integers(len(values), size=(1000, len(values)))
    low, high = np.quantile(values[draws].mean(1), (0.025, 0.975))
    return f"{values.mean():.2f} [{low:.2f}, {high:.2f}]"


# %%
coded = [method.decode(drawn(x)[0]) for x in (clean, defect)]
kept = share_left(coded[1], coded[0])
error = (coded[0] - clean).abs().mean().item()
print(f"decoded code, no diffusion: error of healthy twins {error:.3f}")
for kind in index:
    print(f"{kind:10} left {kept[kinds == kind].mean():.2f}")
print(f"all        left {interval(kept)}")
assert not checked or (kept.mean() < 0.5 and kept[kinds == "crack"].mean() < 0.25)

# %%
picked = list(index.values())
stacked = torch.stack([defect[picked], coded[1][picked], coded[0][picked]], dim=1)
heads = ["decoded", "twin, decoded"]
titles = [text for kind in index for text in (kind, *heads)]
fig, _ = plots.show_images(stacked.flatten(0, 1).cpu(), titles, columns=6)

# %% [markdown]
# *Figure: planted defects, and what their codes decode to, beside the decoded code of the healthy twin. List: means
# by kind, and over all with a 95 % interval.* **The autoencoder is a detector by itself.** Of thin cracks little is
# left, of large dark areas about a half, and no diffusion has taken place. A code that cannot express a defect has
# already removed it, and what the diffusion adds has to be measured *against the autoencoder's own residual*. That
# control comes for free: a threshold of $P = 1$.

# %% [markdown]
# ## The forward process
#
# In each step a bit is replaced by a fair coin with probability $\beta_t$. Half of these coins show what was there
# before, so that it flips with probability $\beta_t / 2$. After all steps up to $t$ it has never been replaced with
# probability $\bar\alpha_t$ (the same product as for Gaussian noise), and otherwise it is a fair coin:
#
# $$\Pr(z_t = 1 \mid z_0) = \bar\alpha_t\,z_0 + \tfrac12 (1 - \bar\alpha_t) , \qquad
# z_t = z_0 \oplus n , \quad \Pr(n = 1) = \varphi_t = \tfrac12 (1 - \bar\alpha_t) .$$
#
# So $\varphi_t$ says all about a noise level: it goes from 0 to one half, where a bit knows nothing of what it was.
#
# A formula for a noising process has to be **tested by drawing**, and *from both values of the bit*. Remember that
# for later.
#
# **Predict** the share of flipped bits at $t = 199$ with the linear schedule of 01 (where
# $\bar\alpha_{199} = 0.66$).


# %% tags=["context"]
phi = (1 - schedule.alphas_cumprod) / 2  # (T,), probability of a flip


# %%
def flip_rates(process, t, n=100_000):
    """Shares of n bits that ``add_noise`` has flipped by t, from 0 and from 1."""
    rates, generator = [], rng(seed)
    for z0 in (0.0, 1.0):
        start = torch.full((1, n), z0)
        z_t = BernoulliDiffusion(schedule, process).add_noise(start, t, generator)
        rates.append((z_t != start).float().mean().item())
    return rates


# %%
def stepwise(z0, t):
    """P(z_t = 1 | z_0) by iterating the steps."""
    p = z0
    for beta in schedule.betas[: t + 1].tolist():
        p = (1 - beta) * p + beta / 2
    return p


# %%
print("   t   phi_t   by steps   drawn from 0   drawn from 1")
for t in (50, 99, 199, 500, 999):
    found, exact = flip_rates("symmetric", t), float(phi[t])
    steps = stepwise(0.0, t), 1 - stepwise(1.0, t)
    np.testing.assert_allclose(steps, exact, rtol=0, atol=1e-12)
    error = 5 * math.sqrt(exact * (1 - exact) / 100_000)  # five standard errors
    assert max(abs(rate - exact) for rate in found) < error
    row = f"{t:4d}{exact:8.4f}{steps[0]:11.4f}"
    print(row + f"{found[0]:15.4f}{found[1]:15.4f}")

# %% [markdown]
# *List: the closed form, the single steps, and shares of drawn bits.* All agree, from both values. **Predict**: up to
# which share of flipped bits does the decoded picture look like a cell?

# %%
levels = (0, 50, 99, 199, 300, 999)
noisy = [diffusion.add_noise(z, t, rng(1)) if t else z for t in levels]
pictures = [method.decode(bits) for bits in noisy]
worse = [(picture - normal).abs().mean().item() for picture in pictures]
titles = [f"{phi[t]:.1%} flipped" if t else "none flipped" for t in levels]
fig, _ = plots.show_images(torch.stack([p[0] for p in pictures]).cpu(), titles)
for t, value in zip(levels, worse, strict=True):
    print(f"t = {t:3d}: mean error of the decoded picture {value:.3f}")
assert not checked or worse[3] < 4 * worse[0] < worse[-1]

# %% [markdown]
# *Figure: a healthy code, and after $t = 50, 99, 199, 300$ and $999$, decoded; list: the error over several cells.* The
# pictures stay cells for long, and even fair coins decode to something with a rim and pieces of wires. That is unlike
# Gaussian noise on pixels: a wrong code does not look noisy.
#
# ## The way back
#
# ### Bayes' rule for a bit
#
# For a step from $t$ to an earlier $s$ let $\alpha = \bar\alpha_t / \bar\alpha_s$, the probability that a bit has not
# been replaced in between. With $q_1 = \Pr(z_t \mid z_s = 1)\,\Pr(z_s = 1 \mid z_0)$, and $q_0$ likewise for $z_s = 0$,
#
# $$\Pr(z_s = 1 \mid z_t, z_0) = \frac{q_1}{q_1 + q_0} , \qquad \begin{aligned}
# q_1 &= \big[\alpha\,z_t + \tfrac{1-\alpha}{2}\big]\,\big[\bar\alpha_s\,z_0 + \tfrac{1-\bar\alpha_s}{2}\big] \\
# q_0 &= \big[\alpha\,(1-z_t) + \tfrac{1-\alpha}{2}\big]\,\big[\bar\alpha_s\,(1-z_0) + \tfrac{1-\bar\alpha_s}{2}\big]
# \end{aligned}$$


# %% tags=["teaches:diffad_lite.diffusion.bernoulli:BernoulliDiffusion.posterior"]
def posterior(diffusion, z_t, z0, t, s):
    """P(z_s = 1) for bits z_t, and a bit or a probability z0."""
    abar_t, abar_s = (diffusion.schedule.alpha_bar(i, z_t) for i in (t, s))

    def kernel(a, z):
        return a * z + (1 - a) / 2

    one = kernel(abar_t / abar_s, z_t) * kernel(abar_s, z0)
    zero = kernel(abar_t / abar_s, 1 - z_t) * kernel(abar_s, 1 - z0)
    return one / (one + zero)


# %% [markdown]
# A check by counting: noise a million bits to $s$ and on to $t$, and see, among those that came from a given $z_0$ and
# arrived at a given $z_t$, how many were 1 at $s$. The last column is what `posterior` says.

# %%
t, s, many = 300, 200, 1_000_000
stride = schedule.alphas_cumprod[t] / schedule.alphas_cumprod[s]
generator = rng(seed)
z0 = (torch.rand(many, generator=generator) < 0.5).double()
z_s = sample_bits(diffusion.marginal(z0, s), generator)
z_t = sample_bits(stride * z_s + (1 - stride) / 2, generator)
print("z_t  z_0   counted   Bayes")
for bit_t in (0.0, 1.0):
    for bit_0 in (0.0, 1.0):
        chosen = z_s[(z_t == bit_t) & (z0 == bit_0)]
        pair = torch.tensor([bit_t, bit_0]).double()
        bayes = posterior(diffusion, pair[:1], pair[1:], t, s).item()
        print(f"{bit_t:3.0f}{bit_0:5.0f}{chosen.mean():10.4f}{bayes:8.4f}")
        error = math.sqrt(bayes * (1 - bayes) / len(chosen))
        assert abs(chosen.mean() - bayes) < 5 * error

# %% [markdown]
# ### A probability in the place of a bit
#
# In a chain $z_0$ is not known. There is a probability $\hat z_0$ that it is 1. The public codes **plug it in**:
# they put $\hat z_0$ where the formula has $z_0$. But what follows from the rules of probability is the **mixture**
# of the two posteriors for sure bits:
#
# $$\Pr(z_s = 1 \mid z_t) = (1 - \hat z_0)\,\Pr(z_s = 1 \mid z_t, z_0 = 0) + \hat z_0\,\Pr(z_s = 1 \mid z_t, z_0 = 1) .$$
#
# They agree where $\hat z_0$ is 0 or 1. To see what the difference is worth, take a single bit that is 1 in one of ten
# pictures, $\Pr(z_0 = 1) = 0.1$. The best predictor is known (Bayes), and the chain over two values can be
# followed *exactly*, without drawing. The right answer at the end is 0.1.
#
# **Predict**: what do 1000 steps of the plug-in make of it?


# %% tags=["context"]
def end_of_chain(way_back, ts, prior=0.1):
    """P(z_0 = 1) after a chain with the best predictor, exactly."""
    bits = torch.tensor([0.0, 1.0], dtype=torch.float64)
    prior = torch.tensor(prior, dtype=torch.float64)
    one = diffusion.marginal(prior, ts[0])  # the right start
    for t, s in zip(ts, [*ts[1:], -1], strict=True):
        if_one = bits * (1 - phi[t]) + (1 - bits) * phi[t]  # P(z_t | z_0 = 1)
        z0_hat = prior * if_one / (prior * if_one + (1 - prior) * (1 - if_one))
        after = way_back(bits, z0_hat, t, s)
        one = (1 - one) * after[0] + one * after[1]
    return one.item()


# %%
def mixture_posterior(z_t, z0_hat, t, s):
    """P(z_s = 1 | z_t) where z_0 is 1 with probability z0_hat."""
    if_zero = diffusion.posterior(z_t, torch.zeros_like(z_t), t, s)
    if_one = diffusion.posterior(z_t, torch.ones_like(z_t), t, s)
    return (1 - z0_hat) * if_zero + z0_hat * if_one


# %%
ways = {"plug-in": diffusion.posterior, "mixture": mixture_posterior}
print("from t  steps   plug-in   mixture   (right: 0.1000)")
for start, count in ((999, 1000), (999, 50), (199, 200), (99, 10)):
    ts = schedule.timesteps(start, count)
    ends = {name: end_of_chain(way, ts) for name, way in ways.items()}
    print(f"{start:6d}{count:7d}" + "".join(f"{end:10.4f}" for end in ends.values()))
    assert abs(ends["mixture"] - 0.1) < 1e-9 and ends["plug-in"] > 0.12
    assert count < 1000 or abs(ends["plug-in"] - 0.25) < 0.005

# %% [markdown]
# The mixture is exact, for any number of steps. **The plug-in is not a sampler of the model's own belief**: a bit
# that should be 1 in 10 % of the pictures ends as 1 in about 25 % (1000 steps). The reason: $\hat z_0$ was made from
# $z_t$, and the formula then weighs $z_t$ once more, as if it were new evidence. So the state clings to what it is,
# also where that is noise, and an unsure bit ends too near to one half. For bits that the network is sure of it makes
# no difference, nor for those that are held in the masked chain below: their clean value is given. Only free bits are
# touched. (On development sets both ways ranked alike, so the default is the plug-in, as in the public codes.)
#
# ## What the network learns
#
# ### Flips
#
# The network sees $z_t$ and $t$, and predicts for each bit the probability $f$ that it **has flipped**,
# $z_t \oplus z_0 = 1$. From this follows the clean bit, with $\operatorname{logit} p = \log \frac{p}{1-p}$:
#
# $$\hat z_0 = (1 - z_t)\,f + z_t\,(1 - f) = |z_t - f| , \qquad
# \operatorname{logit} \hat z_0 = (1 - 2 z_t)\,\operatorname{logit} f .$$
#
# The loss is the cross entropy of $f$ and the flip in bits, averaged over bits and timesteps. Why not predict $z_0$
# at once? **Predict**: how do the two losses compare, bit by bit?

# %%
t = 199
z_t = diffusion.add_noise(z, t, rng(2))
with torch.no_grad():
    u = flips(z_t, torch.full((len(z),), t, device=device)).float()  # logits of f
of_flips = F.binary_cross_entropy_with_logits(u, (z_t != z).float(), reduction="none")
of_bits = F.binary_cross_entropy_with_logits((1 - 2 * z_t) * u, z, reduction="none")
torch.testing.assert_close(of_flips, of_bits)
torch.testing.assert_close((z_t - u.sigmoid()).abs(), ((1 - 2 * z_t) * u).sigmoid())
print(f"largest difference of the two losses: {(of_flips - of_bits).abs().max():.1e}")

# %% [markdown]
# They are identical. (Both say how probable the true bit is.) Only what an idle network means differs: "always
# answer 0" is *no change* for flips, and *all bits are 0* for clean bits. That is the role that predicting
# $\epsilon$ has for Gaussian noise.
#
# ### How much has been learnt?
#
# At low levels nearly nothing flips, and a network that knows nothing has a small loss, too: it answers $\varphi_t$
# everywhere and pays its entropy $h(\varphi_t)$, with $h(p) = -p \log_2 p - (1-p) \log_2 (1-p)$. So the loss is read
# relative to $h(\varphi_t)$: 1 means that nothing has been learnt.
#
# There is also a floor. A bit that was drawn with probability $y$ cannot be told by anyone, not even by someone who
# knows the picture and so $y$. What is left to be guessed is the entropy of $z_0$ given $z_t$ and $y$:
#
# $$h(z_0) + h(z_t \mid z_0) - h(z_t) = h(y) + h(\varphi_t) - h\big(y\,(1-\varphi_t) + (1-y)\,\varphi_t\big) .$$
#
# For $y = \frac12$ that is $h(\varphi_t)$ itself, and there is nothing to learn at all. That is why the code should
# be sure.
#
# **Predict**: at which level is most learnt?

# %%
asked = (10, 25, 50, 100, 150, 200, 300, 500, 750)
losses, floors = [], []
for t in asked:
    with torch.no_grad():
        times = torch.full((len(z),), t, device=device)
        losses.append(diffusion.loss(flips, z, times, rng(3)).item())
    mixed = y * (1 - phi[t]) + (1 - y) * phi[t]
    floors.append((entropy(y) + entropy(phi[t]) - entropy(mixed)).mean().item())
nothing = [entropy(phi[t]).item() for t in asked]
ratios = {"network": np.divide(losses, nothing), "floor": np.divide(floors, nothing)}

# %%
axes = {"xlabel": "timestep t", "ylabel": r"loss / $h(\varphi_t)$"}
fig, _ = plots.show_curves(asked, ratios, **axes, markers=True)
fig.axes[0].set_ylim(0, 1.05)
for t in (10, 100, 200, 500):
    k = asked.index(t)
    row = ", ".join(f"{name} {values[k]:.2f}" for name, values in ratios.items())
    print(f"t = {t:3d}: loss {losses[k]:.3f} bits, relative {row}")
if checked:
    assert (ratios["floor"] < ratios["network"]).all()
    assert ratios["network"].min() < 1 / 3 and ratios["floor"].min() < 0.2
    assert np.argmin(ratios["network"]) in range(2, 6)

# %% [markdown]
# *Figure and list: the loss on healthy calibration cells, relative to a network that knows nothing; and the floor,
# what the bits' own indecision leaves.* At middle levels the loss is less than a third of that of a network that
# knows nothing; the floor lies far below. Healthy codes have structure, and a wrong bit contradicts its
# neighbours. At the lowest levels a large part of the few flips looks like the bits' own indecision; at high levels
# the neighbours are noise themselves. (In development, with 32 bits for each 8 x 8 pixels and no penalty for undecided
# bits, little was learnt.)
#
# ## A missing term
#
# ### Zeros that stay
#
# In the public code of masked Bernoulli diffusion, as in that of BerDiff from which the function comes, the marginal
# is written over two lines. The first ends with $\bar\alpha_t\,z_0$; the second begins with a plus sign, $+ (1 -
# \bar\alpha_t)/2$, and no brackets join them. For Python the first line is complete, and the second is an expression
# of its own that is computed and dropped. What is left is
#
# $$\Pr(z_t = 1 \mid z_0) = \bar\alpha_t\,z_0 .$$
#
# Ones are erased, and zeros stay. The posterior in the same file is the symmetric one, so that the two processes do
# not match. Nothing crashes. (An issue at BerDiff asks about it, and had no answer when it was read. Whether published
# numbers were made so, we do not know.) In the package it is `process="erasure"`. Now the test from above:

# %%
print("   t   phi_t   erasure: from 0   from 1")
for t in (50, 199, 999):
    found = flip_rates("erasure", t)
    print(f"{t:4d}{phi[t]:8.4f}{found[0]:18.4f}{found[1]:9.4f}")
    assert found[0] == 0 and abs(found[1] - 2 * float(phi[t])) < 0.01
dark = BernoulliDiffusion(schedule, "erasure").add_noise(z[:1], 999, rng(4))
print(f"ones at t = 999: {dark.mean():.3f} (symmetric: 0.5)")

# %% [markdown]
# From zeros nothing ever flips, from ones twice as much as should. With as many zeros as ones the rate of all bits is
# right. **Only the test from both values shows it.**
#
# ### Sixteen bits
#
# What does it do to detection? Take a world where it can be worked out: a code has 16 bits, in healthy pictures all 0
# or all 1, equally often. In the test code one bit is wrong. The best predictors are known.
#
# *Symmetric*: with $k$ ones among the 16 noisy bits, the log odds of "all are 1" are $(2k - 16) \log \frac{1 -
# \varphi_t}{\varphi_t}$. *Erasure*: a single 1 proves "all are 1", since zeros never turn; if none is left, the log
# odds are $16 \log (1 - \bar\alpha_t)$.
#
# The chain is the masked one (next section), with $L = 200$ steps and $P = \frac12$. **Predict** for each process:
# is a wrong 0 among ones repaired? A wrong 1 among zeros?


# %%
def symmetric_flips(z_t, t):
    """Logits of a flip by the best predictor, symmetric process."""
    flip = phi[int(t[0])]
    odds = (2 * z_t.sum(1, keepdim=True) - 16) * torch.log((1 - flip) / flip)
    return torch.where(z_t == 1, -odds, odds)


def erasure_flips(z_t, t):
    """Likewise, where zeros never turn."""
    none_left = 16 * torch.log(1 - schedule.alphas_cumprod[int(t[0])])
    odds = torch.where(z_t.amax(1, keepdim=True) > 0, 40.0, none_left)  # 40: certain
    return torch.where(z_t == 1, -40.0, odds.expand_as(z_t))


# %%
def toy(process, predictor, healthy_bit, n=1000):
    """Shares of runs in which the wrong bit is repaired, and of other bits kept."""
    bits = torch.full((n, 16), healthy_bit, dtype=torch.float64)
    bits[:, 0] = 1 - healthy_bit
    chain = BernoulliDiffusion(schedule, process).masked_sample(
        predictor, bits, schedule.timesteps(199), rng(seed), 0.5
    )
    *_, last = chain
    right = (last.z == healthy_bit).double()
    return right[:, 0].mean().item(), right[:, 1:].mean().item()


# %%
best = {"symmetric": symmetric_flips, "erasure": erasure_flips}
toys = {}
print("process     wrong bit         repaired   other bits kept")
for process, predictor in best.items():
    for name, value in {"a 0 among ones": 1.0, "a 1 among zeros": 0.0}.items():
        fixed, others = toys[process, value] = toy(process, predictor, value)
        print(f"{process:12}{name:16}{fixed:10.1%}{others:18.1%}")
assert min(*toys["symmetric", 0.0], *toys["symmetric", 1.0]) > 0.98
assert toys["erasure", 1.0][0] > 0.98 and max(toys["erasure", 0.0]) < 0.03

# %% [markdown]
# *List: 1000 runs each.* The symmetric process repairs both. With erasure, **a wrong 0 is repaired and a wrong 1 is
# not**; a one counts as certain, since noise never makes ones, and the fifteen correct zeros are turned on to agree
# with it. Such a model can switch bits on, and never off, and which defects are repaired depends on an arbitrary
# matter: whether they happen to be written as ones or as zeros. (A trained network need not be as extreme; none was
# trained so here.) From here on the process is the symmetric one.

# %% [markdown]
# ## The masked chain
#
# Now all the parts are there. The chain begins with the code $z$ of the picture at hand, noised to $t = L - 1$. In
# each step the network says how likely each bit of the *state* is to be wrong. Above $P$ a bit is suspected, from
# then on ($m$ never goes back to 0). The step is given clean values $\tilde z_0$: for suspected bits what the model
# thinks, for all others the bit of the picture ($[\cdot]$ is 1 where true, else 0):
#
# $$m \leftarrow \max\big(m,\; [f > P]\big) , \qquad \tilde z_0 = m\,\hat z_0 + (1 - m)\,z , \qquad
# z_s \sim \mathcal B\big(\Pr(z_s = 1 \mid z_t, \tilde z_0)\big) .$$
#
# The last step gives bits: $z_{-1} = [\tilde z_0 > \frac12]$. (That is ours. In the public code the last step
# ignores the mask and gives probabilities.)


# %% tags=["teaches:diffad_lite.diffusion.bernoulli:BernoulliDiffusion.masked_sample"]
from diffad_lite.diffusion import BitStep, sample_bits


def masked_sample(diffusion, predictor, z, timesteps, generators, P):
    """Noise the code z (B, bits, h, w) and repair it; yields every state."""
    z_t, m = diffusion.add_noise(z, timesteps[0], generators), torch.zeros_like(z)
    yield BitStep(timesteps[0], z_t, None, None, m)
    for t, s in zip(timesteps, [*timesteps[1:], -1], strict=True):
        f = predictor(z_t, torch.full((len(z),), t, device=z.device)).sigmoid()
        z0_hat = (z_t - f).abs()
        m = torch.maximum(m, (f > P).to(m))
        clean = m * z0_hat + (1 - m) * z
        if s < 0:
            z_t = (clean > 0.5).to(z)
        else:
            z_t = sample_bits(diffusion.posterior(z_t, clean, t, s), generators)
        yield BitStep(s, z_t, f, z0_hat, m)


# %% [markdown]
# Two limits. **Predict**: what comes out at $P = 1$? And what at $P < 0$, and does the picture matter then?

# %%
end = {P: drawn(clean, threshold=P)[1][-1].z for P in (1.0, 0.5, -1.0)}
own = drawn(clean, threshold=1.0)[0]  # the codes: same noise, same bits
free = {P: (bits != own).float().mean().item() for P, bits in end.items()}
for P, share in free.items():
    print(f"P = {P:4}: {share:.1%} of the bits end otherwise than they began")
assert torch.equal(end[1.0], own) and (not as_described or free[0.5] > 0)
assert not checked or free[0.5] < free[-1.0]

# %%
z_t = diffusion.add_noise(own, 99, rng(5))
fixed = copy.copy(diffusion)
fixed.add_noise = lambda z, t, generators: z_t  # two codes, one noised state
for P in (-1.0, 0.5):
    ends = []
    for bits in (own, own.roll(1, 0)):  # each cell's own code, and another cell's
        draws = noise_generators(keys, seed)
        with torch.no_grad():
            args = flips, bits, schedule.timesteps(99, 5), draws, P
            ends.append(list(masked_sample(fixed, *args))[-1].z)
    print(f"P = {P:4}: the same end from two codes: {torch.equal(*ends)}")
    assert not as_described or torch.equal(*ends) == (P < 0)

# %% [markdown]
# At $P = 1$ nothing is suspected, the code comes back, and the map is the residual of the **autoencoder alone**.
# Below 0 every bit is free: the picture enters through the noised start only (second list: two codes, one noised
# state), as when AnoDDPM's chain starts from noised pixels. The method lies between.
#
# ### Step by step
#
# **Predict**: how many of the bits end in the mask, for a defective cell and for its twin?

# %%
z, steps = drawn(four, keys=four_keys, **high)
shown = [0, len(steps) // 4, len(steps) // 2, 3 * len(steps) // 4, len(steps) - 1]
rows, titles = [], []
for k in shown:
    step = steps[k]
    maps = [(step.z != z).float(), step.mask]
    maps.insert(1, torch.zeros_like(z) if step.flip is None else step.flip)
    rows += [method.decode(step.z)[2].cpu()]
    rows += [as_picture(part.mean(1), 0.5)[2] for part in maps]
    titles += [f"t = {step.t}", "differs from z", "flip f", "mask m"]
fig, _ = plots.show_images(rows, titles, columns=4)

# %%
print("   t   differs from z   mean f   in the mask   (defect, then twin)")
for k in shown:
    step = steps[k]
    row = f"{step.t:4d}"
    for i in (2, 3):
        f = 0 if step.flip is None else step.flip[i].mean().item()
        differs = (step.z[i] != z[i]).float().mean().item()
        row += f"{differs:13.1%}{f:10.1%}{step.mask[i].mean().item():12.1%}"
    print(row)
floor = phi[high["noise_level"]].item()
print(f"flipped by the noise at the start: {floor:.1%}")
assert not checked or 0.5 * floor < steps[-1].mask[3].mean() < 1.6 * floor

# %% [markdown]
# *Figure and list: the chain of the cell with a mirrored patch, from $t = 199$: the decoded state; in each grid cell
# the share of bits that differ from the code, the mean predicted flip (black at the start, where nothing has been
# asked yet), the share in the mask (white: half and more).* The mask is filled in the first steps, in the normal cell
# as in the defective one, with about as many bits as the noise has flipped. For $f$ asks whether a bit differs from the
# clean one, and the noise makes it differ. **The mask is a list of bits that noise has hit and the network has noticed,
# plus bits that are wrong in the picture.** It is denser around the defect, but by its size it is no anomaly map.
#
# The other question would be whether the bit of the *picture* is wrong, $|\hat z_0 - z| > P$ (ours,
# `suspect="input"`).
#
# **Predict** the size of that mask for healthy cells, at $L = 200$.

# %%
print("share of bits in the mask at the end, changed at the end (L = 200)")
for suspect in ("state", "input"):
    row = f"{suspect:6}"
    for name, images in {"healthy": clean, "defective": defect}.items():
        bits, chain = drawn(images, suspect=suspect, **high)
        area = chain[-1].mask.mean().item()
        differs = (chain[-1].z != bits).float().mean().item()
        row += f"   {name} {area:.1%}, {differs:.1%}"
        if checked and name == "healthy":
            assert (area > 0.1) == (suspect == "state")
    print(row)

# %%
with torch.no_grad():
    y_clean = method.encode(clean)
bits, chain = drawn(clean, suspect="input", **high)
given = torch.where(bits == 1, y_clean, 1 - y_clean)  # the bit's probability
suspected = chain[-1].mask == 1
sorts = suspected, ~suspected
shares = [(given[sort] < 0.9).float().mean().item() for sort in sorts]
print(f"healthy bits that the encoder gave less than 90 %: {shares[0]:.0%} of those")
print(f"in the mask of the input, {shares[1]:.0%} of the others")
assert not checked or shares[0] > 3 * shares[1]

# %% [markdown]
# That mask is about half as large, and most of what is in it is changed in the end. It is not empty for healthy cells:
# many of its bits are those that the encoder itself was not sure of, the last list says. Defective cells have a little
# more of it.
#
# ## Where would the model flip?
#
# The flip probability of the picture's own bits, $|\hat z_0 - z|$, averaged over the bits of a grid cell and over a
# few noises, is a map that needs a few looks, no chain and no decoder. It shows what the *diffusion* knows, without
# what the autoencoder has done.
#
# **Predict**: at which level does it show the dark area best, at $t = 50$, $100$ or $200$?


# %% tags=["context"]
@torch.no_grad()
def flip_maps(images, t, *, keys=keys, looks=4, seed=seed):
    """Mean over bits of |z0_hat - z|, (B, h, w), from noise level t."""
    own = noise_generators(keys, seed)
    y, total = method.encode(images), 0
    for _ in range(looks):
        z = sample_bits(y, own)
        z_t = diffusion.add_noise(z, t, own)
        f = flips(z_t, torch.full((len(z),), t, device=device)).sigmoid()
        total = total + ((z_t - f).abs() - z).abs().mean(1) / looks
    return total


# %%
looked = (50, 100, 200)
maps = {t: [flip_maps(x, t) for x in (defect, clean)] for t in looked}
on_grid = F.adaptive_max_pool2d(truth, side)[:, 0] > 0  # grid cells with a defect
print("mean flip probability of defective grid cells, minus that of the twin's")
print("kind      " + "".join(f"   t = {t:3d}" for t in looked))
for kind in index:
    where = on_grid & torch.from_numpy(kinds == kind).to(device)[:, None, None]
    raised = [(maps[t][0] - maps[t][1])[where].mean().item() for t in looked]
    print(f"{kind:10}" + "".join(f"{v:+10.3f}" for v in raised))
    assert not checked or 0 < raised[0] < raised[2]
usual = "".join(f"{maps[t][1].mean():10.3f}" for t in looked)
print(f"twins, all{usual}")

# %%
white = 0.7 * max(float(pair[0].max()) for pair in maps.values())
rows, titles = [], []
for i, which in ((crack, 0), (inactive, 0), (last, 0), (last, 1)):
    rows.append((defect, clean)[which][i].cpu())
    rows += [as_picture(maps[t][which][i : i + 1], white)[0] for t in looked]
    titles += ["its twin" if which else kinds[i], *(f"t = {t}" for t in looked)]
fig, _ = plots.show_images(rows, titles)

# %% [markdown]
# *Figure: flip probabilities of three planted cells and of the last one's twin, one scale (white: 0.7 of the largest
# value and more); list: how much more the bits of a defective grid cell are doubted than those of the same place in
# the twin; last line: the twins' mean.* **The network does doubt defects**, at high levels most, mirrored patches
# before all: normal parts in a place where they do not belong. A crack is doubted in a few grid cells, though hardly
# anything of it is left in the picture. The large dark area, which is what the eye sees first, is doubted at a corner
# and hardly inside. (In this picture. Over all planted cells of this notebook, at $t = 200$, the list has more doubt
# for inactive areas than for cracks and fingers.) And at high levels everything is doubted more, in healthy cells, too.
#
# ## Level and threshold
#
# Two knobs remain: $L$, how far the code is noised, and $P$, how sure the network must be. They are not chosen on the
# test set. Here are development defects (scratches and stains, planted into calibration cells, weaker than those
# above).
#
# **Predict**: if $P$ falls, in which direction move the share left of a defect, and the error on healthy cells?

# %%
development = load_dataset(*source, **options, plant="development", severity=0.4)
half = len(development.test_labels) // 2
count = min(6 if quick else 24, half)
twins = development.test_images[:count]
weak = development.test_images[half : half + count]
dev_keys = image_keys(twins)
dev_clean = method.prepare(twins).to(device)
dev_sick = method.prepare(weak, like=twins).to(device)
dev_change = dev_sick - dev_clean
dev_labels, dev_scores = np.repeat([0, 1], count), {}


# %%
def in_plane(L, P):
    """Share left, error of healthy cells, AUROC of raw maps: one chain, ten steps."""
    at = {"noise_level": L - 1, "threshold": P, "steps": 1 if P == 1 else 10}
    ends = [drawn(x, keys=dev_keys, **at)[1][-1].z for x in (dev_clean, dev_sick)]
    twin, pictures = (method.decode(bits) for bits in ends)
    kept = ((pictures - twin) * dev_change).flatten(1).sum(1)
    left = (kept / dev_change.square().flatten(1).sum(1)).mean().item()
    maps = torch.cat([dev_clean - twin, dev_sick - pictures]).abs().mean(1)
    dev_scores[L, P] = method._score(twins, maps.cpu()).numpy()
    error = (twin - dev_clean).abs().mean().item()
    return left, error, auroc(dev_labels, dev_scores[L, P])


# %%
Ls = (100, 300) if quick else (50, 100, 200, 300)
Ps = (-1.0, 0.5, 1.0) if quick else (-1.0, 0.5, 0.7, 0.9, 1.0)
alone = in_plane(100, 1.0)  # no L in it
plane = np.array([[alone if P == 1 else in_plane(L, P) for P in Ps] for L in Ls])

# %%
left, wrong, ranked = np.moveaxis(plane, 2, 0)
control = dev_scores[100, 1.0]
low, high_ = metrics.bootstrap_auroc(dev_labels, control)
print(f"autoencoder alone (P = 1): image AUROC {alone[2]:.3f} [{low:.3f}, {high_:.3f}]")
rows = {L_P: (dev_labels, control, row) for L_P, row in dev_scores.items()}
lost = {L_P: metrics.paired_bootstrap_auroc(*row) for L_P, row in rows.items()}
for L, P in ((100, 0.5), (300, 0.5), (300, -1.0)):
    words = "{:+.3f} [{:+.3f}, {:+.3f}]".format(*lost[L, P])
    print(f"it ranks better than L = {L}, P = {P:4}, by {words}")
better = sum(high_ < 0 for _, _, high_ in lost.values())
print(f"settings that rank better than it, by their intervals: {better}")
if checked:
    assert (left[-1, 0] < left[:, -1]).all() and (wrong[-1, 0] > wrong[:, -1]).all()
    assert (np.diff(wrong[:, 0]) > 0).all()  # without a mask, error grows with L
    assert better == 0 and ranked[-1, 0] < ranked[-1, 1] < alone[2]
    assert all(lost[at][1] < 0 for at in ((100, 0.5), (300, 0.5), (300, -1.0)))

# %%
heads = ("share left", "error, healthy cells", "image AUROC, raw maps")
fig, axes = plt.subplots(1, 3, figsize=(10.5, 3.1))
for ax, values, head in zip(axes, np.moveaxis(plane, 2, 0), heads, strict=True):
    ax.imshow(values, cmap="cividis", aspect="auto")
    middle = (values.min() + values.max()) / 2
    for (i, j), v in np.ndenumerate(values):
        colour = "white" if v < middle else "black"
        style = {"ha": "center", "va": "center", "color": colour, "fontsize": 9}
        ax.text(j, i, f"{v:.3f}", **style)
    ax.set(title=head, xlabel="P", ylabel="L")
    ax.set_xticks(range(len(Ps)), ["< 0" if P < 0 else f"{P:g}" for P in Ps])
    ax.set_yticks(range(len(Ls)), Ls)
plt.show()

# %% [markdown]
# *Figure: the plane of $L$ and $P$ on weak development defects, one chain each; the left column is plain sampling,
# the right column the autoencoder alone, where $L$ does not matter; colours run from the smallest (dark) to the largest
# (light) value of each panel. List: paired 95 % intervals over these cells.* It
# is the dilemma of 02 once more, with two knobs: what removes more of a defect makes more errors on healthy cells.
# The mask takes back both. AUROC falls at high levels, without a mask most, though on these few cells even those
# intervals hold zero. No setting ranks better than the autoencoder alone by its interval.
#
# ## Masked against unmasked, on real cells
#
# The paper claims that the mask helps. Take real test cells, one set of weights, and change the threshold: $P = 0.5$;
# $P < 0$, every bit free; $P = 1$, no bit free. One more row is ours: the mixture instead of the plug-in, every bit
# free, where it can matter most.
#
# **Predict** the order.

# %%
mixed = copy.copy(diffusion)
mixed.posterior = mixture_posterior
compared = {
    "masked": method.with_settings(),
    "unmasked, P < 0": method.with_settings(threshold=-1.0),
    "autoencoder, P = 1": method.with_settings(threshold=1.0, steps=1),
}
compared["unmasked, mixture"] = method.with_settings(threshold=-1.0)
compared["unmasked, mixture"].diffusion = mixed
compared["masked, calibrated"] = method
found = {name: m.predict(data.test_images, seed=0) for name, m in compared.items()}
scores = {name: p.image_score.numpy() for name, p in found.items()}

# %%
print("raw maps, 95 % intervals        AUROC   lost against 'masked'     bits changed")
for name, row in scores.items():
    more = metrics.paired_bootstrap_auroc(labels, scores["masked"], row)
    text = "" if name == "masked" else "{:+.3f} [{:+.3f}, {:+.3f}]".format(*more)
    assert not checked or more[1] <= 0 <= more[2]  # none can be told from it
    bits = found[name].extras["changed"].mean()
    print(f"{name:28}{auroc(labels, row):9.3f}   {text:26}{bits:8.1%}")
changed = found["masked"].extras["changed"].mean((1, 2)).numpy()
sorts = [changed[labels == label].mean() for label in (0, 1)]
print(f"masked, bits changed: normal {sorts[0]:.2%}, defective {sorts[1]:.2%}")
assert not checked or 0.01 < sorts[0] < sorts[1] < 0.02

# %% [markdown]
# *List: image AUROC on the real cells of this notebook, what is lost against the masked chain with a paired interval
# (positive: the masked chain ranks better), and the share of bits that a chain changes. The last row has maps that
# are calibrated by position, as is the default.* (A look, not a choice: these few cells happen to be easier than
# most, and all intervals hold zero. The whole test set follows.) What they do show is how little happens: the masked
# chain changes one to two bits in a hundred, in defective cells only a few more than in normal ones. So the decoded
# picture is nearly that of the autoencoder.

# %% [markdown]
# ## What is it worth?
#
# ### The edges of the threshold
#
# The whole test set, the same weights; `autoencoder` is $P = 1$, `unmasked` is $P < 0$.
#
# **Predict**: which of the two loses more?

# %%
results = records.read_results(data_dir() / "results")
mono = records.select(results, dataset="elpv", category="mono")
of_bernoulli = records.select(mono, method="bernoulli")
rendered = tables.tables(of_bernoulli) if of_bernoulli else {}
waiting = "*The rows of this table are not in `data/results` yet.*"
Markdown(rendered.get("elpv-mono-bernoulli-ablation", waiting))


# %%
def runs_of(name, training="", variant="default", plant=None):
    wanted = {"variant": variant, "image_size": 64, "plant": plant}
    return records.select(mono, method=name, training=training, **wanted)


def difference(a, b):
    """Two groups of runs: the difference, its verdict, and what they say in words."""
    if not (a and b):
        return "no rows yet", "-", "has not been compared with"
    mean, low, high = records.difference_of(a, b)
    said = "ranks better than" if low > 0 else "ranks worse than"
    said = said if low > 0 or high < 0 else "cannot be told from"
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]", metrics.verdict(low, high), said


# %%
full, edges = runs_of("bernoulli"), {"autoencoder": "diffusion", "unmasked": "mask"}
told = []
for name, part in edges.items():
    number, _, said = difference(full, runs_of("bernoulli", variant=name))
    told.append(f"- What the {part} adds: `full` *{said}* `{name}` ({number}).")
Markdown("\n".join(told))

# %% [markdown]
# *Table: real mono cells, rendered from `data/results`; "lost by it" is the image AUROC of `full` minus that of the
# row, with a paired 95 % interval over images, and the verdict on "`full` ranks better" (*reversed*: it ranks better
# without; *inconclusive*: these cells cannot tell). List: the same in words; "cannot be told from" means
# that the interval holds zero.* Only if `full` beats `autoencoder`, the diffusion is worth its price for ranking; only
# if it beats `unmasked`, the mask is.
#
# ### Against the others
#
# **Predict**: does it rank real cells better than AnoDDPM?

# %%
others = ("pca", "padim", "anoddpm", "glad", "mdps")
groups = {records.method_names()[name]: runs_of(name) for name in others}
groups["AnoDDPM, standardised"] = runs_of("anoddpm", "standardised")
lines = ["| Bernoulli - other | image AUROC [95 %] | Bernoulli ranks better |"]
lines.append("| --- " * 3 + "|")
sorts = {}
for name, group in groups.items():
    number, verdict, said = difference(full, group)
    lines.append(f"| {name} | {number} | {verdict} |")
    sorts.setdefault(said, []).append(name)
told = [f"*{said}* {' / '.join(found)}" for said, found in sorts.items()]
note = f"By these intervals masked Bernoulli {'; '.join(told)}."

# %%
shown = [r for name in (*others, "bernoulli") for r in runs_of(name)]
shown += runs_of("bernoulli", variant="raw")
Markdown("\n\n".join([tables.image_table(shown), "\n".join(lines), note]))

# %%
shown = [r for name in (*others, "bernoulli") for r in runs_of(name, plant="cells")]
Markdown(tables.pixel_table(shown))

# %% [markdown]
# *Tables: real mono cells, whole test set, default settings (and Bernoulli's raw maps); paired differences and
# verdicts, with a sentence made of them; planted cell defects with pixel measures, AUPRO by kind.* "AnoDDPM,
# standardised" has the same cells, brought to one brightness and contrast in the same way. PCA is the other comparison
# to keep in mind: it, too, writes a cell in few numbers and shows what they cannot express, and is fitted in seconds.
#
# ## What it costs
#
# The paper's second claim is about time and memory: the chain runs on a small grid of bits, not on pixels. Here both
# run one after the other with as many steps: masked Bernoulli with one chain of 10, and AnoDDPM's lite network with
# 10 steps (untrained: weights do not change the time). The memory is that of all tensors alive at once, counted at
# each operation.
#
# **Predict**: where is the peak of the memory: encoder, chain or decoder?


# %%
class Alive(TorchDispatchMode):
    """The most bytes of tensors alive at once, of those that are made inside."""

    now = peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        known = {x.untyped_storage()._cdata for x in args if torch.is_tensor(x)}
        for x in made if isinstance(made, (tuple, list)) else [made]:
            if torch.is_tensor(x) and (part := x.untyped_storage())._cdata not in known:
                self.add(part.nbytes())
                weakref.finalize(part, self.add, -part.nbytes())
        return made

    def add(self, count):
        self.now += count
        self.peak = max(self.peak, self.now)


# %%
shape = {"channels": c.channels, "image_size": size}
pixel_model = AnoDDPM(AnoDDPMConfig.for_profile("lite", **shape))
pixel_model.network.to(device).eval()
pixel_model = pixel_model.with_settings(steps=10, n_noises=1, calibrate=False)
bit_model = method.with_settings(steps=10, noise_level=99, n_chains=1)

# %%
sixteen = data.test_images[:16]
x = method.prepare(sixteen).to(device)
bits, t = method.encode(x).round(), torch.full((len(x),), 50, device=device)
parts = {
    "AnoDDPM, whole": lambda: pixel_model.predict(sixteen),
    "AnoDDPM, a step": lambda: pixel_model.network(x, t),
    "Bernoulli, whole": lambda: bit_model.predict(sixteen),
    "Bernoulli, a step": lambda: flips(bits, t),
    "Bernoulli, encode": lambda: method.encode(x),
    "Bernoulli, decode": lambda: method.decode(bits),
}


# %%
@torch.no_grad()
def cost(part, repeats=2 if quick else 4):
    """Shortest of some times (s), and megabytes of tensors alive at once."""
    with Alive() as alive:
        part()
    took = []
    for _ in range(repeats):
        begun = time.perf_counter()
        part()
        if device.type == "cuda":
            torch.cuda.synchronize()
        took.append(time.perf_counter() - begun)
    return min(took), alive.peak / 2**20


# %%
costs = {name: cost(part) for name, part in parts.items()}
for name, (took, alive) in costs.items():
    each = 1000 * took / len(x)
    print(f"{name:18} {each:7.1f} ms an image   {alive:6.1f} MB for {len(x)}")
for what in ("whole", "a step"):
    pixels, bits_ = (costs[f"{who}, {what}"] for who in ("AnoDDPM", "Bernoulli"))
    ratios = [a / b for a, b in zip(pixels, bits_, strict=True)]
    print("AnoDDPM / Bernoulli, {}: time {:.1f}, memory {:.1f}".format(what, *ratios))
floats, ones = 8 * x.element_size() * x[0].numel(), bits[0].numel()
print(f"state of the chain, one image: {floats} bits of pixels, or {ones} of code")
assert not checked or min(costs, key=lambda k: costs[k][1]) == "Bernoulli, a step"
if checked:  # as the text says
    for name, n in {"anoddpm": 4, "bernoulli": 40}.items():
        assert records.mean(runs_of(name), "network_evaluations_per_image") == n

# %% [markdown]
# *List: the shortest of some times, and the peak of memory.* A *step* on the grid is several times cheaper, in time
# and in memory. In the whole detector the gain is smaller: encoder and decoder work on pixels, they take as long as a
# few steps together, and **the peak of the memory is theirs, not the chain's**. (The two networks were chosen for their
# methods, so that a ratio compares settings, not principles. And AnoDDPM's own lite setting is four one-step
# estimates, that is 4 calls for an image; ours has 40, and encodes once and decodes four times.) Training is paid
# twice, once for the autoencoder, once for the flips.
#
# ## Move a slider
#
# The two knobs, on two planted cells.

# %%
explored = {"L": (100, 300) if quick else (50, 100, 200, 300)}
explored["P"] = (-1.0, 0.5, 1.0) if quick else (-1.0, 0.3, 0.5, 0.7, 0.9, 1.0)
two = [crack, last]
pair, pair_keys = defect[two], [keys[i] for i in two]
ends = {}
for L in explored["L"]:
    for P in explored["P"]:
        settings = {"noise_level": L - 1, "threshold": P, "steps": 10}
        bits, steps = drawn(pair, keys=pair_keys, **settings)
        ends[L, P] = (steps[-1].mask.mean(1), method.decode(steps[-1].z))
white = 0.5 * max(float((pair - x).abs().max()) for _, x in ends.values())


# %%
def frame(L, P):
    m, repaired = ends[L, P]
    grown = F.interpolate(as_picture(m), (size, size))  # grid cells as squares
    residual = as_picture((pair - repaired).abs().mean(1), white)
    columns = [pair.cpu(), grown, repaired.cpu(), residual]
    images = torch.stack(columns, 1).flatten(0, 1)
    heads = ("in the mask", f"L = {L}, P = {P:g}", "map")
    titles = [t for i in two for t in (kinds[i], *heads)]
    return plots.show_images(images, titles)


# %%
start = {"L": explored["L"][-1], "P": 0.5}
changes = {}, {"P": -1.0}, {"P": 1.0}, {"L": explored["L"][0]}
static = [start | change for change in changes]
explore(frame, static=static, **explored)

# %% [markdown]
# *Figure: in a live notebook, two sliders. Printed: $L = 300$ and $P = 0.5$; the same without a mask ($P = -1$) and
# with no bit free ($P = 1$); and the lowest level. Cell, share of bits in the mask, repaired picture, map (one
# scale).* The map of the crack hardly depends on the knobs: the code has removed it. Of the other defect the code keeps
# a part. That is repaired from a high level, and is back with no bit free, or from the lowest level.

# %% [markdown]
# ## Paper, public code, ours
#
# The public code is [github.com/JuliaWolleb/Anomaly_berdiff](https://github.com/JuliaWolleb/Anomaly_berdiff), read
# at `cf2342c`; it has no licence file, and nothing of it was copied. Of the paper we had the abstract, the first
# page and the overview figure. **Its tables could not be read, so no published number is printed here**, and where
# the first column is empty we do not know.
#
# | | Wolleb et al. | public code | here, lite profile |
# | --- | --- | --- | --- |
# | noise | ends in fair coins (figure) | ones are erased, zeros stay; the posterior is the symmetric one | symmetric; `process="erasure"` |
# | code | bits, by an autoencoder | 128 bits for each 8 x 8 pixels, at 256 | 8 bits for each 4 x 4 pixels, at 64 |
# | its loss | | mean absolute error; a perceptual term with weight 0; a discriminator from step 30,001, in a branch that fails outside of distributed training | mean absolute error of pixels and of differences between neighbours |
# | undecided bits | | a term with weight 0; it takes the sigmoid of what is a probability already, and would push every bit to 1 | mean of $4y(1-y)$, weight 0.01 |
# | flips | learnt on the codes of healthy pictures | U-Net of 36 M parameters; weights without averaging by default; two updates with each batch | small U-Net, averaged weights; one update |
# | target | | flips, cross entropy in bits | the same |
# | $L$, $P$ | | README: 200, 0.5; elsewhere 100, 0.6, and 300, 0.8 | 100, 0.5, chosen on development cells |
# | steps | | every level | 10 |
# | a step | | posterior, the probability plugged in | the same |
# | start | | noised one level above the first step | at the first step's level |
# | mask | from the probabilities of flips | $f$ of the noisy state, cumulative; of the first picture of a batch | of each picture |
# | last step | | ignores the mask; probabilities are decoded | masked; bits |
# | chains | | 1 | 4, averaged |
# | map | | squared differences; for the measures scaled by each picture's own range | absolute differences, blurred, calibrated by position; score: mean of the largest 3 % |
# | images | | brain MRI (BraTS), retinal OCT; each scaled to [0, 1] by its own range | standardised solar cells |

# %% [markdown]
# ## What did not work
#
# "In development" below means: on development defects, planted into calibration cells, and on cells of uncertain label
# ([data/README.md](../data/README.md) has both), never on test cells.
#
# - **Beating the autoencoder.** In development the masked chain ranked no better than the residual of its own
#   autoencoder ($P = 1$), which needs no diffusion at all. What the whole test set says stands in the list under the
#   ablation table.
# - **Flips as a score.** They do mark defects (the maps above). Alone they ranked planted development defects worse
#   than the residual, and uncertain cells about as well; added to it they brought nothing.
# - **More bits.** With 16 bits a grid cell the autoencoder writes more, defects as well, and in development its
#   residual ranked worse. (Those cells were not standardised, so that this comparison is not clean.)
# - **Bits without a penalty** stayed undecided, and the flips of such bits cannot be learnt.
# - **High levels** repair more, and make more errors on healthy cells, with the mask as without.
# - **The mask as an anomaly map**: it is mostly a list of what noise has hit.
# - **The right posterior.** The plug-in is biased, yet in development plug-in, mixture and the step of exercise 06.2
#   ranked alike.
# - **Squared differences**, as in the public code, ranked worse than absolute ones after calibration by position.

# %% [markdown]
# ## Exercises

# %% [markdown] tags=["exercise"]
# ### Exercise 06.1 ★
#
# A code is noised, and what comes out is noised once more, with new coins. The first noise flips a bit with
# probability `phi_a`, the second one with `phi_b`. Write `flips_after_two(phi_a, phi_b)`: the probability that the bit
# is another one in the end than it was at the beginning. When is that one half?


# %% tags=["solution"]
def flips_after_two(phi_a, phi_b):
    # BEGIN SOLUTION
    return phi_a * (1 - phi_b) + (1 - phi_a) * phi_b
    # END SOLUTION


# %% tags=["check"]
assert flips_after_two(1.0, 1.0) == 0, "a bit that is flipped twice is as it was"
many, generator = 200_000, rng(11)
for t_a, t_b in ((99, 199), (199, 199), (50, 500)):
    a, b = float(phi[t_a]), float(phi[t_b])
    found = flips_after_two(a, b)
    assert 0 <= found <= 1, "a probability"
    error = 5 * math.sqrt(0.25 / many)  # five standard errors, or more
    for bit in (0.0, 1.0):
        start = torch.full((1, many), bit)
        once = diffusion.add_noise(start, t_a, generator)
        twice = diffusion.add_noise(once, t_b, generator)
        rate = (twice != start).float().mean().item()
        text = f"drawn from {bit:.0f}: {rate:.4f}, yours {found:.4f}"
        assert abs(rate - found) < error, text
    print(f"{a:.1%}, then {b:.1%}: {found:.1%} differ")

# %% [markdown] tags=["explain"]
# A bit differs if exactly one of the two noises has flipped it; for equal ones that is $2\varphi(1-\varphi)$. The sum
# $\varphi_a + \varphi_b$ would count what is flipped back. Written with $\varphi = \frac12(1-\bar\alpha)$ it is a
# product, $1 - 2\varphi = (1-2\varphi_a)(1-2\varphi_b)$, as $\bar\alpha_t$ is. So the result is one half as soon as one
# of the two is: what a fair coin has decided no second noise brings back. ($\varphi_t$ is what a level *means* for
# bits. Levels of two schedules should be compared by it, not by $t$.)

# %% [markdown] tags=["exercise"]
# ### Exercise 06.2 ★★
#
# A step like DDIM's, which keeps most of the state: $\Pr(z_s = 1 \mid z_t, z_0) = a\,z_t + b\,z_0$. Find $a$ and $b$
# such that the marginal stays right: if $\Pr(z_t = 1) = \bar\alpha_t z_0 + \frac12 (1 - \bar\alpha_t)$, then $z_s$
# has $\bar\alpha_s z_0 + \frac12 (1 - \bar\alpha_s)$. Write `kept_step(z_t, z0, t, s)`.


# %% tags=["solution"]
def kept_step(z_t, z0, t, s):
    # BEGIN SOLUTION
    abar_t, abar_s = schedule.alpha_bar(t, z_t), schedule.alpha_bar(s, z_t)
    a = (1 - abar_s) / (1 - abar_t)  # so that the constants agree
    return a * z_t + (abar_s - a * abar_t) * z0
    # END SOLUTION


# %% tags=["check"]
two_values = torch.tensor([0.0, 1.0], dtype=torch.float64)
for t, s in ((199, 150), (99, 89), (500, 10), (9, -1)):
    steps = [kept_step(two_values, z0.expand(2), t, s) for z0 in two_values]
    (none, a), (b, both) = steps  # z_0 = 0, then z_0 = 1; each for z_t = 0, 1
    assert abs(none) < 1e-12 and abs(a + b - both) < 1e-12, "not a z_t + b z_0"
    for z0, step in zip(two_values, steps, strict=True):
        one = diffusion.marginal(z0, t)
        after = (1 - one) * step[0] + one * step[1]
        assert torch.isclose(after, diffusion.marginal(z0, s)), f"wrong from {t} to {s}"
right = end_of_chain(kept_step, schedule.timesteps(999, 50))
print(f"the bit that is 1 in one of ten: {right:.4f}")
assert abs(right - 0.1) < 1e-9

# %% [markdown] tags=["explain"]
# Two conditions, for the factor of $z_0$ and for the constant: $b = \bar\alpha_s - a\,\bar\alpha_t$ and $a\,(1 -
# \bar\alpha_t) = 1 - \bar\alpha_s$. This step is *linear* in $z_0$: putting a probability in the place of the bit is
# the mixture. So the plug-in is no approximation here, and the single bit comes out right. (The public code of
# BerDiff has this step.)

# %% [markdown] tags=["exercise"]
# ### Exercise 06.3 ★★
#
# If noise erases, what is the right way back? Write `erasure_posterior(z_t, z0, t, s)`: the probability that $z_s =
# 1$ for **bits** $z_t$ and $z_0$, where $\Pr(z_t = 1 \mid z_0) = \bar\alpha_t z_0$ and a one survives the steps from
# $s$ to $t$ with probability $\bar\alpha_t / \bar\alpha_s$. (For the impossible pair $z_0 = 0$, $z_t = 1$ any value
# will do.)


# %% tags=["solution"]
def erasure_posterior(z_t, z0, t, s):
    # BEGIN SOLUTION
    abar_t, abar_s = schedule.alpha_bar(t, z_t), schedule.alpha_bar(s, z_t)
    erased_later = (abar_s - abar_t) / (1 - abar_t)
    return z0 * (z_t + (1 - z_t) * erased_later)
    # END SOLUTION


# %% tags=["check"]
for t, s in ((199, 150), (199, 198), (999, 10), (50, -1)):
    abar_t, abar_s = (schedule.alpha_bar(i, torch.zeros(1).double()) for i in (t, s))
    alpha, zeros, ones = abar_t / abar_s, *torch.tensor([[0.0], [1.0]]).double()
    zero_left = erasure_posterior(zeros, ones, t, s)
    assert erasure_posterior(ones, ones, t, s) == 1, "a one was never erased"
    bayes = abar_s * (1 - alpha) / (abar_s * (1 - alpha) + 1 - abar_s)
    assert torch.isclose(zero_left, bayes), f"wrong from {t} to {s}"
    assert erasure_posterior(zeros, zeros, t, s) == 0, "a zero is never turned on"
    symmetric = diffusion.posterior(zeros, ones, t, s)
    both = f"{zero_left.item():.4f}, symmetric {symmetric.item():.4f}"
    print(f"{t:3d} to {s:3d}: z_0 = 1, z_t = 0: {both}")

# %% [markdown] tags=["explain"]
# With $z_0 = 1$ and $z_t = 0$ the bit was erased before $s$, with probability $1 - \bar\alpha_s$, or between, with
# $\bar\alpha_s - \bar\alpha_t$. So an erasing process is a sound model with *this* posterior. (Masked language models
# erase, too, but into a symbol of its own, so that what was erased can be told from what was 0.) It cannot question
# a 1, since in training every 1 is right. The public code's way back is another process's.

# %% [markdown] tags=["exercise"]
# ### Exercise 06.4 ★★★
#
# A score without a decoder. The network gives a probability to each bit of the picture's own code; the *surprise* of
# a grid cell is minus the binary logarithm of the probability of its bits, as if they were independent. Write
# `surprise(u, z_t, z)` for logits $u$ of flips, the noisy and the clean code, all (B, bits, h, w); return (B, h, w),
# in bits. Logits can be large: do not take the logarithm of a rounded zero.


# %% tags=["solution"]
def surprise(u, z_t, z):
    # BEGIN SOLUTION
    flipped = (z_t != z).to(u)
    nats = F.binary_cross_entropy_with_logits(u, flipped, reduction="none")
    return nats.sum(1) / math.log(2)
    # END SOLUTION


# %% tags=["check"]
# three coins, one sure flip
made = torch.tensor([0.0, 0.0, 0.0, 200.0]).view(1, 4, 1, 1)
right = torch.tensor([0.0, 1.0, 0.0, 1.0]).view(1, 4, 1, 1)
noisy = torch.tensor([1.0, 1.0, 0.0, 0.0]).view(1, 4, 1, 1)
assert surprise(made, noisy, right).shape == (1, 1, 1), "one value for each grid cell"
for state, bits in ((noisy, 3), (right, 3 + 200 / math.log(2))):
    found = surprise(made, state, right).item()
    assert math.isclose(found, bits, rel_tol=1e-5), f"{found}, not {bits:.1f} bits"


# %% tags=["check"]
@torch.no_grad()
def surprises(images, t, looks=4):
    """Largest surprise of each image, a mean over the largest tenth of grid cells."""
    x, own = method.prepare(images).to(device), noise_generators(image_keys(images), 0)
    probability, total = method.encode(x), 0
    for _ in range(looks):
        z = sample_bits(probability, own)
        z_t = diffusion.add_noise(z, t, own)
        u = flips(z_t, torch.full((len(x),), t, device=device))
        total = total + surprise(u, z_t, z).flatten(1) / looks
    return total.topk(math.ceil(0.1 * total.shape[1])).values.mean(1).cpu()


# %% tags=["check"]
for t in (50, 100, 200):
    row = surprises(data.test_images, t)
    ranked = auroc(labels, row)
    print(f"t = {t:3d}: image AUROC {ranked:.3f}, mean {row.mean():.1f} bits")

# %% [markdown] tags=["explain"]
# It is the loss of the flips, summed over the bits of a grid cell. It needs one encoding and a few looks, no chain
# and no decoder, and asks the prior alone: *is this code written as healthy codes are?* What the encoder has dropped
# it cannot see. (The cells are the few of this notebook: a look, no comparison.)

# %% [markdown]
# ## What we learned
#
# - A noising process is tested by drawing, from both values of a bit. One term is missing in two public codes; with the
#   best predictor such a model can switch bits on, and never off.
# - Predicting flips and predicting bits is the same loss. What can be learnt is bounded by how decided the bits are.
# - A probability in the place of a bit is no mixture: 1000 steps of the plug-in posterior moved 10 % to 25 %.
# - The mask holds what nobody suspects, and collects what noise has hit. $P$ leads from plain sampling to the
#   autoencoder alone.
# - A code that was learnt on healthy pictures removes defects before any diffusion. The autoencoder's own residual
#   is the control that a latent method has to beat.
# - The prior doubts normal parts in the wrong place most.
# - Steps on bits are cheap; encoder and decoder set the peak of the memory.
#
# ## References
#
# - J. Wolleb et al.: *Binary Noise for Binary Tasks: Masked Bernoulli Diffusion for Unsupervised Anomaly Detection*,
#   MICCAI 2024, [arXiv 2403.11667](https://arxiv.org/abs/2403.11667).
# - BerDiff, Chen et al.: Bernoulli diffusion for the segmentation of medical images, MICCAI 2023; public code
#   [github.com/takimailto/BerDiff](https://github.com/takimailto/BerDiff), read at `d0978f1`.
# - Z. Wang et al.: *Binary Latent Diffusion*, CVPR 2023; public code
#   [github.com/ZeWang95/BinaryLatentDiffusion](https://github.com/ZeWang95/BinaryLatentDiffusion), read at
#   `1ae5702`.
# - J. Wyatt et al.: *AnoDDPM: Anomaly Detection with Denoising Diffusion Probabilistic Models using Simplex Noise*,
#   CVPR Workshops 2022.
# - Cells: ELPV, S. Deitsch et al.: *Automatic classification of defective photovoltaic module cells in
#   electroluminescence images*, Solar Energy 185, 2019, [doi
#   10.1016/j.solener.2019.02.067](https://doi.org/10.1016/j.solener.2019.02.067), CC BY-NC-SA 4.0.
