# %% [markdown]
# # 09 · Explore
#
# **Every knob of the course in one place, turned on one and the same solar cell, with and without a defect. And then
# you plant a defect yourself, and see which method notices.**
#
# | At a glance | |
# | --- | --- |
# | Level | intermediate; it is the place to play |
# | Minutes (ci / lite / paper) | under 1 / 1 to 2 / hours on a GPU (it trains every model); 30 to explore |
# | Memory | about 2 GB |
# | Downloads | none |
# | Previous | [08](08_evaluation.ipynb) |
# | Next | [10](10_own_images.ipynb) |

# %% [markdown]
# ## You will be able to
#
# - ask a question of a slider before you move it, and read the answer off two numbers;
# - say for each method which knob trades what for what;
# - read maps of several methods on one scale that normal images fix;
# - choose a threshold by what mistakes cost;
# - find the limit of a detector by planting ever weaker defects, and say what that limit does not tell.
#
# ## Prerequisites
#
# [02](02_sampling_to_detection.ipynb): levels, maps, scores. The section of a method says more when you have read its
# notebook: [03](03_diffusionad.ipynb), [04](04_glad.ipynb), [05](05_mdps.ipynb), [06](06_bernoulli.ipynb),
# [07](07_grad.ipynb).

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
from dataclasses import replace
from functools import cache
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from IPython.display import Markdown

from diffad_lite import plots
from diffad_lite.data import READERS, image_keys, read_image, resize_image, to_float
from diffad_lite.diffusion import noise_generators, randn
from diffad_lite.evaluation import image_metrics
from diffad_lite.experiments import Run, bundled_checkpoint, pretrained_or_train
from diffad_lite.methods import (
    blur,
    get_method,
    parts_of_pool,
    pattern_weights,
    top_k_mean,
)
from diffad_lite.notebook import (
    PLACES,
    explore,
    explore_planting,
    plant_at,
    resolve_profile,
    show_grid,
)

profile = resolve_profile(profile)
plots.use_style()
quick = profile == "ci"
as_described = (dataset, category) == ("elpv", "mono")  # what the text speaks of
checked = as_described and not quick  # and whose numbers it speaks of
print("profile:", profile)

# %% [markdown]
# ## Pictures drawn beforehand
#
# A slider that runs a network at each tick is no fun on a laptop. So every explorer of this course draws *all* its
# pictures first, once, and a tick only swaps them. That is the whole trick:
#
# ```python
# frames = {value: render_png(draw(value)) for value in values}
# slider.observe(lambda change: setattr(picture, "value", frames[change.new]), "value")
# ```
#
# **Tab** goes to the next slider, the **arrow keys** move it. Without a front end (on the web, in print) each
# explorer shows a few of its pictures instead.
#
# A slider answers only what you ask it. So each explorer below has a line *Look for*, and a prediction to make before
# you move anything.

# %% tags=["context"]
source = dataset, category or None
known = ["anoddpm", "diffusionad", "glad", "mdps", "bernoulli"]
if retrain or bundled_checkpoint("grad", *source).is_dir():
    known.append("grad")
runs = {
    name: Run(name, *source, root or None, profile=profile, seed=seed) for name in known
}
whole = runs["anoddpm"].load_data()
data = whole.subset(16 if quick else 64)
labels = data.test_labels

# %% tags=["context"]
methods = {}
for name in known:
    options = {"retrain": retrain, "out_dir": out_dir}
    methods[name] = pretrained_or_train(runs[name], whole, **options)
shape = {key: whole.info[key] for key in ("channels", "image_size")}
baseline = get_method("pca")
baseline = baseline(baseline.Config.for_profile(profile, **shape, dataset=dataset))
methods["pca"] = baseline.fit(whole.train, whole.calibration, seed=seed)
size = whole.info["image_size"]

# %% [markdown]
# ## One cell, three times
#
# All explorers of this notebook look at one healthy test cell: as it is, with a planted crack, and with a planted
# dark area. The noise is the same for the three (its seed is made from the cell without a defect), so what differs
# between the rows is due to the defect alone. Defects are planted at the original size, and then the cell is made
# smaller, as all cells of the course are.

# %% tags=["context"]
files = READERS[dataset](category or None, Path(root) if root else None).images


def original(name):
    """A cell at its original size, uint8 (C, H, W)."""
    return (
        files[name] if isinstance(files[name], np.ndarray) else read_image(files[name])
    )


# %% tags=["context"]
healthy = [name for name, y in zip(data.test_ids, labels, strict=True) if y == 0]
plain = original(healthy[0])
planted = {
    "crack": plant_at(plain, "crack", place=PLACES["top right"], size=1.0)[0],
    "dark area": plant_at(plain, "inactive", place=PLACES["bottom left"], size=1.0)[0],
}
kinds = ["without", *planted]
large = [plain, *planted.values()]
three = to_float(np.stack([resize_image(x, size, "squash") for x in large]))
truth = (three[1:] - three[:1]).abs().amax(1) > 0.02  # pixels of the defects
keys = 3 * image_keys(three[:1])  # the same noise for all

# %%
fig, _ = plots.show_images([*three, *truth.float()[:, None] * 2 - 1], [*kinds, "", ""])
assert truth.flatten(1).any(1).all()

# %% [markdown]
# *Figure: the cell, the same with a crack, with a dark area; the pixels of each defect.*
#
# ### Two numbers for a picture
#
# A knob changes the map of the defect and the map of healthy places. One number without the other says nothing. We
# read both:
#
# $$\text{noise floor} = \text{mean of the largest 1 \% of the map of the cell \textit{without} a defect},
# \qquad
# \text{contrast} = \frac{\text{mean of the map over the defect's pixels}}{\text{noise floor}} .$$
#
# The noise floor is the score of the cell without a defect. A contrast above 1 says that the defect, on average,
# is brighter than the brightest places of the healthy cell. It stands above each map.
#
# One scale is shared by all pictures of an explorer, and normal images fix it: of 19 calibration cells we take the
# scores at the explorer's first setting. The largest of 19 has rank $\lceil (19 + 1) \cdot 0.95 \rceil = 19$, so it
# *is* the conformal threshold of [00](00_start_here.ipynb) for $q = 0.95$. It is the white line on the colour bar,
# and the scale ends a quarter above it. (Maps are raw here, not calibrated by position, for those statistics belong
# to one setting of the knobs.)


# %% tags=["context"]
def floor_and_contrast(maps):
    """Of maps (3, H, W): the noise floor, and a contrast for each defect."""
    floor = float(top_k_mean(maps[:1], 0.01)[0])
    return floor, [
        float(a[m].mean()) / floor for a, m in zip(maps[1:], truth, strict=True)
    ]


# %% tags=["context"]
def limit_of(method):
    """The largest score of 19 normal cells, from raw maps."""
    normal = whole.calibration[: 3 if quick else 19]
    return float(top_k_mean(method.predict(normal).anomaly_map, 0.01).max())


def as_picture(maps, white=1.0):
    """Maps (B, h, w) as grey images (B, 1, H, W); ``white`` is white."""
    grown = F.interpolate(maps[:, None].float(), (size, size))
    return (2 * grown / white - 1).clamp(-1, 1)


# %% tags=["context"]
def strip(columns, heads, maps, limit):
    """A row for each of the three cells: the columns, then the map."""
    floor, contrast = floor_and_contrast(maps)
    ends = [f"floor {floor:.2g}", *(f"contrast {value:.1f}" for value in contrast)]
    rows = [[*(column[i] for column in columns), maps[i]] for i in range(3)]
    titles = [[kinds[i], *heads, ends[i]] for i in range(3)]
    scale = {"scale": (0, 1.25 * limit), "threshold": limit}
    return show_grid(rows, titles, **scale, masks=[None, *truth])


# %% [markdown]
# ## Noise level and clean estimate
#
# **Look for** the level at which each defect is gone from the clean estimate $\hat x_0$, and for what is gone with
# it. (AnoDDPM, one step, one noise; [02](02_sampling_to_detection.ipynb).)
#
# **Predict**: which of the two defects needs more noise to disappear? And which of the two numbers, floor or
# contrast, keeps growing with $t$?

# %%
levels = (25, 100, 400) if quick else (5, 15, 25, 50, 100, 150, 200, 300, 400, 500)


@cache
def at_level(t):
    model = methods["anoddpm"].with_settings(noise_level=t, steps=1, n_noises=1)
    seen = model.explain(three, seed=seed, keys=keys)
    x_t, x0_hat = seen["trajectory"][0].x, seen["trajectory"][-1].x
    return x_t, x0_hat, seen["anomaly_map"]


limit = limit_of(methods["anoddpm"].with_settings(noise_level=25, n_noises=1))


def noise_frame(t):
    x_t, x0_hat, maps = at_level(t)
    return strip([three, x_t, x0_hat], [f"$x_t$, t = {t}", r"$\hat x_0$"], maps, limit)


# %%
low, high = (25, 400)
explore(noise_frame, static=[{"t": low}, {"t": high}], t=levels)

# %% [markdown]
# *Figure: in a live notebook, a slider for $t$. Printed: a low and a high level. Cell, noised cell, clean estimate,
# raw map; white outlines run just outside of the true defects; white line on the bar: the largest of 19 normal scores
# at $t = 25$.*

# %%
table = {t: floor_and_contrast(at_level(t)[2]) for t in levels}
print("   t   floor   contrast:" + "".join(f"{kind:>11}" for kind in planted))
for t, (floor, contrast) in table.items():
    print(
        f"{t:4d}{floor:8.2f}{'':12}" + "".join(f"{value:11.2f}" for value in contrast)
    )
best = [max(levels, key=lambda t: table[t][1][i]) for i in (0, 1)]
floors = [table[t][0] for t in levels]
Markdown(
    f"The crack stands out most at $t = {best[0]}$, the dark area at $t = {best[1]}$."
)

# %%
assert floors[-1] > 1.5 * floors[0], "more noise, more error on the healthy cell"
assert not checked or best[0] < best[1]

# %% [markdown]
# The floor grows without end. A thin crack is gone from $\hat x_0$ at little noise, and then more noise buys nothing
# but error: its contrast falls. The dark area needs far more noise, because it is broad, and what is broad survives;
# its contrast first rises. No level is right for both: the **dilemma** to which 03 to 06 are four answers.
#
# ## Steps and sampler
#
# **Look for** grain, and for details that the cell does not have. (AnoDDPM from $t = 200$. DDIM keeps the noise that
# it began with; DDPM draws fresh noise at each step; [01](01_ddpm_basics.ipynb).)
#
# **Predict**: with more steps, does the noise floor go down or up? With DDIM, with DDPM?

# %%
start, counts = 200, ((1, 5) if quick else (1, 2, 5, 10, 25))
model = methods["anoddpm"]


@torch.no_grad()
def walk(images, names, sampler, steps):
    """Reconstructions and raw maps of images (B, C, H, W), noise by their names."""
    diffusion, ts = model.diffusion, model.diffusion.schedule.timesteps(start, steps)
    x = model.prepare(images).to(model.device)
    x_t = diffusion.add_noise(x, start, randn(x, noise_generators(names, seed)))
    if sampler == "DDIM":
        *_, last = diffusion.ddim_sample(model.network, x_t, ts)
    else:
        own = noise_generators(names, seed + 1)
        *_, last = diffusion.ddpm_sample(model.network, x_t, ts, own)
    maps = blur((x - last.x).abs().mean(1), model.config.smooth_sigma)
    return last.x.cpu(), maps.cpu()


sampled = cache(lambda sampler, steps: walk(three, keys, sampler, steps))


# %%
limit_high = limit_of(model.with_settings(noise_level=start, steps=1, n_noises=1))


def sampler_frame(sampler, steps):
    x0_hat, maps = sampled(sampler, steps)
    return strip([three, x0_hat], [f"{sampler}, {steps}"], maps, limit_high)


settings = [{"sampler": name, "steps": counts[-1]} for name in ("DDIM", "DDPM")]
explore(sampler_frame, static=settings, sampler=["DDIM", "DDPM"], steps=counts)

# %% [markdown]
# *Figure: in a live notebook, sampler and number of steps. Printed: the most steps of DDIM, then of DDPM. Cell,
# reconstruction, raw map; white line: the largest of 19 normal scores with one step.*
#
# One cell is an anecdote. So the noise floor, once more, as the mean over normal calibration cells:

# %%
several = whole.calibration[: 3 if quick else 19]
several_keys, floor_of = image_keys(several), {}
for steps in (counts[0], counts[-1]):
    for name in ("DDIM", "DDPM"):
        maps = walk(several, several_keys, name, steps)[1]
        floor_of[name, steps] = float(top_k_mean(maps, 0.01).mean())
        print(f"{steps:2d} steps of {name}: mean floor {floor_of[name, steps]:.3f}")

# %%
assert torch.equal(sampled("DDIM", 1)[0], sampled("DDPM", 1)[0])
assert not checked or floor_of["DDPM", 25] > max(
    floor_of["DDIM", 25], floor_of["DDIM", 1]
)

# %% [markdown]
# With one step the samplers are the same: there is no next level to draw noise for. One step gives the *mean* of the
# normal cells that the state could have come from (as well as the network knows it), many steps give *one* of them.
# On average DDIM's steps hardly move the floor. DDPM's fresh noise makes details that are as likely as the cell's
# own, and are not the cell's own: the floor goes up. (What the slider shows on the one cell may differ. That is the
# trouble with sliders.)
#
# ## DiffusionAD: two scales and a weight
#
# **Look for** what changes in the map when the mix does. The segmentation network sees the cell *and* the mix, and
# its map is a probability ([03](03_diffusionad.ipynb)).
#
# With guidance of weight $w$ the small scale's estimate is mixed with the big one's, with the share $m = w\,(1 -
# \bar\alpha_t)$, $t$ being the small level. At $w = 0$ there is one scale, as in the method's first version.
#
# **Predict**: at which $w$ does the map begin to change? And what does the big level change, as long as $w$ is small?

# %%
judge, bigs = methods["diffusionad"], (100, 300) if quick else (50, 100, 200, 300)
weights = (0, 1, 100) if quick else (0, 1, 10, 30, 60, 100)
abar = judge.diffusion.schedule.alphas_cumprod
limit_judge = limit_of(judge.with_settings())


@cache
def guided(big, w):
    at = judge.with_settings(noise_level_big=big, guidance=float(w))
    seen = at.explain(three, seed=seed, keys=keys)
    pictures = [*seen["estimates"].x0_hat, seen["estimates"].guided]
    unit = judge.config.unit_range  # the paper profile's images lie in [0, 1]
    return [2 * x - 1 if unit else x for x in pictures], seen["anomaly_map"]


def guidance_frame(big, w):
    pictures, maps = guided(big, w)
    m = w * float(1 - abar[judge.config.noise_level])
    heads = [f"t = {judge.config.noise_level}", f"t = {big}", f"w = {w}, m = {m:.2f}"]
    return strip([three, *pictures], heads, maps, limit_judge)


# %%
settings = [{"big": bigs[-1], "w": w} for w in (1, 100)]
explore(guidance_frame, static=settings, big=bigs, w=weights)

# %% [markdown]
# *Figure: in a live notebook, the big level and the weight. Printed: the highest big level with $w = 1$, and with $w
# = 100$. Cell, estimates from the small and from the big level, their mix, map (a probability).*

# %%
moved = {}
for w in weights[1:]:
    moved[w] = float((guided(bigs[-1], w)[1] - guided(bigs[-1], 0)[1]).abs().max())
    print(
        f"w = {w:3d}: largest change of a pixel of the maps, from w = 0: {moved[w]:.2f}"
    )
assert moved[100] > moved[1]
m_of_one = 1 - float(abar[judge.config.noise_level])
assert not checked or abs(m_of_one - 0.01) < 0.002  # as the text says

# %% [markdown]
# At the published weight of 1 the two scales hardly differ from one, for at this small level $m$ is about a
# hundredth. (At the public code's level, 200, the share is larger.) With a large share the maps do change; whether
# for the better is measured in 03, on many cells, not seen here on one.
#
# ## GLAD: a level for each image
#
# **Look for** $t^*$, the level at which a cell was let go: from there on it is reconstructed freely. $t^*$ below the
# lowest watched level means that nothing drifted ([04](04_glad.ipynb)).
#
# **Predict**: what happens to the cell without a defect when $\delta$ is small? And how much does the starting
# level $T'$ matter when $\delta$ is large?

# %%
watcher, tops = methods["glad"], (50, 100) if quick else (50, 100, 200)
usual = float(watcher.network["statistics"].delta)
deltas = [
    float(f"{f * usual:.2g}") for f in ((0.25, 16) if quick else (0.25, 1, 4, 16))
]
limit_watcher = limit_of(watcher.with_settings())


@cache
def watched(top, delta):
    lowest = min(watcher.config.min_noise_level, top)
    at = watcher.with_settings(noise_level=top, min_noise_level=lowest, delta=delta)
    seen = at.predict(three, seed=seed, keys=keys)
    return seen.reconstruction, seen.extras["t_star"].int().tolist(), seen.anomaly_map


# %%
def drift_frame(top, delta):
    pictures, stars, maps = watched(top, delta)
    fig, shown = strip([three, pictures], [""], maps, limit_watcher)
    texts = fig.axes[0].texts
    for text, star in zip(texts[1::3], stars, strict=True):
        text.set_text(f"$t^*$ = {star}")
    return fig, shown


settings = [{"top": tops[-1], "delta": value} for value in (deltas[0], deltas[-1])]
explore(drift_frame, static=settings, top=tops, delta=deltas)

# %% [markdown]
# *Figure: in a live notebook, $T'$ ("top") and $\delta$. Printed: the highest $T'$ with the smallest and the largest
# $\delta$. Cell, reconstruction, raw map.*

# %%
for value in (deltas[0], deltas[-1]):
    _, stars, maps = watched(tops[-1], value)
    floor, contrast = floor_and_contrast(maps)
    rounded = [round(v, 1) for v in contrast]
    print(f"delta {value}: t* {stars}, floor {floor:.2f}, contrasts {rounded}")
freely, held = (watched(tops[-1], value)[1] for value in (deltas[0], deltas[-1]))
assert max(held) < min(freely) if checked else max(held) <= max(freely)

# %% [markdown]
# A small $\delta$ lets all three go from above, and the healthy cell pays with its floor. A large one lets nobody go:
# all come down on their own noised selves, and $T'$ hardly matters. In between, $\delta$ is a quantile of the drifts
# of normal cells, and only what drifts more is repaired from above.
#
# ## MDPS: mask, samples, guidance
#
# **Look for** the three knobs one at a time: the *mask threshold* says which pixels may change, $n$ how many samples
# are averaged, $w$ how strongly a sample is pulled to the cell ([05](05_mdps.ipynb)). From level 100, where the eye
# sees more than at the lite profile's.
#
# **Predict**: which of the three brings the defect back into the samples?

# %%
sampler, factors = methods["mdps"], (0.5, 2.0) if quick else (0.5, 1.0, 2.0)
ws, ns = (0, 60) if quick else (0, 10, 60), (1, 2) if quick else (1, 2, 4)
y = sampler.prepare(three).to(sampler.device)
free = sampler.with_settings(noise_level=100, mask_noise_level=100, n_samples=max(ns))
theta = float(sampler.network["statistics"].mask_threshold)


@cache
@torch.no_grad()
def first_pass():
    first = free.first_sample(y, noise_generators(keys, seed))
    return blur(free.difference(y, first), sampler.config.mask_sigma)


@cache
@torch.no_grad()
def posterior(factor, w):
    mask = (first_pass() > factor * theta)[:, None].to(y)
    at = free.with_settings(guidance=float(w))
    samples, maps = at.posterior(y, mask, noise_generators(keys, seed))
    return mask.cpu(), samples.cpu(), maps.cpu()


# %%
limit_sampler = limit_of(free.with_settings(n_samples=1, guidance=0.0))


def posterior_frame(threshold, n, w):
    mask, samples, maps = posterior(threshold, w)
    maps = blur(maps[:n].mean(0), sampler.config.smooth_sigma)
    heads = [f"mask, {threshold:g} x", f"n = {n}, w = {w}"]
    return strip(
        [y.cpu(), as_picture(mask[:, 0]), samples[:n].mean(0)],
        heads,
        maps,
        limit_sampler,
    )


# %%
settings = [{"threshold": factors[0], "n": ns[-1], "w": w} for w in (0, ws[-1])]
explore(posterior_frame, static=settings, threshold=factors, n=ns, w=ws)

# %% [markdown]
# *Figure: in a live notebook, the mask threshold (as a multiple of the calibrated one), $n$ and $w$. Printed: a low
# threshold with all samples, without and with strong guidance. Cell (standardised), mask (white: may change), mean of
# the samples, raw map.*

# %%
areas = [float(posterior(f, 0)[0].mean()) for f in factors]
print("share of pixels in the masks:", [round(a, 2) for a in areas])
on_dark = {
    w: float(posterior(factors[0], w)[2].mean(0)[2][truth[1]].mean())
    for w in (0, ws[-1])
}
print("map over the dark area, by w:", {w: round(v, 2) for w, v in on_dark.items()})
assert areas[0] > areas[-1]
assert not checked or on_dark[ws[-1]] < on_dark[0]

# %% [markdown]
# Guidance does: it pulls towards *all* of the picture, the defect included. The threshold decides how much of the
# healthy grain enters the map. And $n$ makes the mean smoother, which one hardly sees in a map that is blurred
# anyway.
#
# ## Masked Bernoulli diffusion: level, threshold, flips
#
# **Look for** the second column: how likely is a bit of each grid cell to have been flipped, says the network, on
# average over its bits? Then for what the mask makes of it ([06](06_bernoulli.ipynb)).
#
# **Predict**: fewer bits may change as $P$ grows, and at $P = 1$ none. What becomes of the contrasts?

# %%
coder = methods["bernoulli"]
explored = {"L": (100, 300) if quick else (50, 100, 200, 300)}
explored["P"] = (-1.0, 0.5, 1.0) if quick else (-1.0, 0.3, 0.5, 0.7, 0.9, 1.0)
limit_coder = limit_of(coder.with_settings(n_chains=1))


@cache
def chained(L, P):
    at = coder.with_settings(
        noise_level=L - 1, threshold=P, steps=5 if quick else 10, n_chains=1
    )
    seen = at.explain(three, seed=seed, keys=keys)
    flips, masks = seen["chain"][1].flip.mean(1), seen["chain"][-1].mask.mean(1)
    return flips.cpu(), masks.cpu(), seen["reconstruction"], seen["anomaly_map"]


def bits_frame(L, P):
    flips, masks, repaired, maps = chained(L, P)
    heads = [f"flips, L = {L}", f"mask, P = {P:g}", "repaired"]
    columns = [three, as_picture(flips, 0.5), as_picture(masks), repaired]
    return strip(columns, heads, maps, limit_coder)


# %%
settings = [{"L": explored["L"][-1], "P": P} for P in (0.5, 1.0)]
explore(bits_frame, static=settings, **explored)

# %% [markdown]
# *Figure: in a live notebook, two sliders. Printed: the highest $L$ with $P = 0.5$, and with no bit free ($P = 1$).
# Cell, mean probability of a flip at the first step (white: 0.5 and more), share of bits in the mask, repaired cell,
# raw map.*

# %%
kept = chained(explored["L"][-1], 1.0)
for P in explored["P"]:
    _, masks, _, maps = chained(explored["L"][-1], P)
    rounded = [round(v, 1) for v in floor_and_contrast(maps)[1]]
    print(f"P = {P:4}: {masks.mean():.0%} of the bits in the mask, contrasts {rounded}")
assert kept[1].sum() == 0, "at P = 1 nothing is suspected"
all_free = chained(explored["L"][-1], -1.0)
floors = [floor_and_contrast(end[3])[0] for end in (kept, all_free)]
assert not checked or floors[0] < floors[1], "what is free makes errors"

# %% [markdown]
# At $P = 1$ no bit may change, no diffusion happens, and yet both defects stand out: the *code* has lost much of
# them, since the autoencoder has seen healthy cells only. Freeing bits repairs more of the dark area, and more of
# what was healthy, so that the floor rises. Whether that pays is measured in 06.
#
# ## GRAD: receptive field and weights
#
# **Look for** what is wrong with the redrawn window *as a whole*, though every small piece of it looks right. GRAD
# uses such pictures as negatives for a detector; at test time there is no diffusion ([07](07_grad.ipynb)). The grey
# column is the weight that each location would have in training (middle grey: 1, white: 10, black: a tenth). Its
# third slider is the exponent that takes weight from patterns which normal cells have as well.
#
# **Predict**: how far beyond the window does the detector's map reach? And which places lose weight when the exponent
# grows?

# %%
with_grad = "grad" in methods
few = 8 if quick else 32
if with_grad:
    painter = methods["grad"]
    fields = {net.receptive_field: net for net in painter.patchdiffs.values()}
    begins, filters = (
        (200, 800) if quick else (100, 200, 400, 600, 800, 999),
        (0.0, 2.0),
    )
    seen = painter.prepare(whole.calibration[:few])
    some = replace(painter.config, n_patterns=few, steps=5 if quick else 20)
    brief = type(painter)(some)
    brief.network = painter.network
    pool = brief.draw_pool(seen, seed)
    weighting = copy.deepcopy(painter.network["weights"])
    weighting.fit(painter.network["detector"], *parts_of_pool(pool), seen, seed)
    usual_maps = painter.with_settings().predict(whole.calibration[:few]).anomaly_map
    low, top = float(usual_maps.median()), float(top_k_mean(usual_maps, 0.01).max())
else:
    print("GRAD's weights are not bundled: this section shows nothing")


# %%
window = torch.zeros_like(three[:, :1])
window[..., size // 4 : 3 * size // 4, size // 4 : 3 * size // 4] = 1


@cache
@torch.no_grad()
def negatives(field, t):
    """Normal cells with a redrawn window, clusters of locations, the detector's map."""
    x0 = painter.prepare(whole.calibration[:3]).to(painter.device)
    ts = painter.diffusion.schedule.timesteps(t, min(5 if quick else 20, t + 1))
    own = noise_generators(image_keys(x0.cpu()), seed)
    drawn = painter.redraw(fields[field], x0, window.to(x0), ts, randn(x0, own))
    logits = painter.network["detector"](drawn)[:, None]
    maps = F.interpolate(logits, (size, size), mode="bilinear")[:, 0].cpu()
    return x0.cpu(), drawn.cpu(), weighting.clusters(drawn), maps


# %%
def grad_frame(field, t, filter):
    x0, drawn, cluster, maps = negatives(field, t)
    rule = replace(painter.config.weights, filter_normal=filter)
    w, _ = pattern_weights(weighting.contrastive, weighting.normal, rule)
    weight = as_picture((w[cluster].log10().cpu() + 1) / 2)
    rows = [[x0[i], drawn[i], weight[i], maps[i]] for i in range(3)]
    heads = ["normal cell", f"{field} px, t = {t}", f"weight, {filter:g}", "detector"]
    scale = {"scale": (low, low + 1.25 * (top - low)), "threshold": top}
    return show_grid(
        rows, [heads] * 3, **scale, label="logit", masks=[window[0, 0]] * 3
    )


# %%
if with_grad:
    settings = [{"field": f, "t": begins[-1], "filter": filters[-1]} for f in fields]
    explore(grad_frame, static=settings, field=list(fields), t=begins, filter=filters)
    print("pixels that a logit sees:", painter.network["detector"].receptive_field)
    inside, outside = window[0, 0] == 1, window[0, 0] == 0
    for field in fields:
        maps = negatives(field, begins[-1])[3]
        a, b = (float(maps[:, where].mean()) for where in (inside, outside))
        print(f"field {field}: mean logit in the window {a:.1f}, outside {b:.1f}")
        assert not checked or a > b

# %% [markdown]
# *Figure: in a live notebook, the receptive field of the generator in pixels, the level that the window is redrawn
# from, and the exponent. Printed: the highest level with each receptive field. Normal cell, the same with a redrawn
# window, weights, the detector's logits (black: the median of normal places; white line: the largest score of some
# normal cells); outline: around the window.*
#
# Neither field is large enough to see where a wire came from, so wires lose their way in the window. From a low level
# hardly anything is changed at all. The map reaches beyond the window, because the detector has a receptive field,
# too (the first line of the list). And where the exponent is 2, places far from the window are black: what normal cells
# have as well counts least. The ring around the window, where the detector's field sees a piece of it, has more weight
# than the window itself, perhaps because its clusters are rarer. The weights here were found after the training, from a
# few drawn pictures: **the bundled detector was trained without them**, since on development defects they did harm.
# Architectures and the rule of the weights are this course's own; the method was re-implemented from its abstract.
#
# ## A threshold, and what it costs
#
# The scores are fixed now, and the *decision* is yours. A missed defect costs as much as so many false alarms, the
# **price** $c$; and where the detector is to work, a share $\pi$ of the cells is defective. For a threshold that
# misses a share $\mu$ of the defective cells and alarms on a share $\phi$ of the normal ones, a thousand cells cost
#
# $$1000\,\big(\pi\,c\,\mu + (1 - \pi)\,\phi\big) \quad \text{false alarms} .$$
#
# ($\pi$, $c$, $\mu$ and $\phi$ have this meaning in this notebook.) The test set is half defective; a factory is not.
# We take $\pi = 2\,\%$.
#
# **Look for** the threshold of lowest cost at each price.
#
# **Predict**: does it rise or fall when a missed defect gets dearer? And at which prices is the calibrated threshold
# a good choice, which knows nothing of prices?

# %%
defective = 0.02  # share of defective cells where the detector is to work


def cost_of(labels, scores, threshold, price, share=defective):
    """Of a thousand cells, in false alarms."""
    missed = np.mean(scores[labels == 1] <= threshold)
    false = np.mean(scores[labels == 0] > threshold)
    return 1000 * (share * price * missed + (1 - share) * false)


# %% tags=["context"]
scores = methods["anoddpm"].predict(data.test_images, seed=seed).image_score.numpy()
calibrated = methods["anoddpm"].threshold_
# %%
ladder = np.quantile(scores, np.linspace(0, 1, 5 if quick else 15))
ladder = sorted({float(f"{v:.3g}") for v in (*ladder, calibrated)})
prices = (10, 100) if quick else (1, 10, 30, 100)
costs = {c: [cost_of(labels, scores, t, c) for t in ladder] for c in prices}


# %%
def decision_frame(threshold, price):
    """Scores and threshold; decisions; cost at every threshold."""
    fig, axes = plt.subplots(1, 3, figsize=(10.5, 2.9), width_ratios=(4, 3, 4))
    bins = np.linspace(scores.min(), np.quantile(scores, 0.99), 25)
    for y, name, look in ((0, "normal", "stepfilled"), (1, "defective", "step")):
        style = {"histtype": look, "color": plots.COLOURS[y], "linewidth": 2}
        axes[0].hist(scores[labels == y].clip(max=bins[-1]), bins, label=name, **style)
    axes[0].set(xlabel="image score", ylabel="cells")
    axes[0].legend(fontsize=9)
    alarm = scores > threshold
    axes[1].imshow([[0, 1], [1, 0]], cmap="Oranges", vmin=0, vmax=3)  # mistakes: shaded
    for row in (0, 1):
        for column in (0, 1):
            count = ((labels == row) & (alarm == bool(column))).sum()
            axes[1].text(column, row, count, fontsize=18, ha="center", va="center")
    axes[1].set_xticks([0, 1], ["passed", "alarm"])
    axes[1].set_yticks([0, 1], ["normal", "defective"])
    cost = cost_of(labels, scores, threshold, price)
    axes[1].set_title(f"cost {cost:.0f}", fontsize=11)
    axes[2].plot(ladder, costs[price], "o-", color=plots.COLOURS[2], markersize=3)
    axes[2].plot(threshold, cost, "s", color="black", markersize=8)
    axes[2].set(xlabel="threshold", ylabel="cost of 1000 cells", title=f"price {price}")
    for ax in (axes[0], axes[2]):
        ax.axvline(threshold, color="black", linestyle="--", linewidth=1)
    return fig, {"cost": cost}


# %%
middle = min(ladder, key=lambda t: abs(t - calibrated))
settings = [{"threshold": middle, "price": prices[-1]}]
explore(decision_frame, static=settings, threshold=ladder, price=prices)

# %% [markdown]
# *Figure: in a live notebook, threshold and price. Printed: the threshold from calibration cells, at the highest
# price. Left: scores of the test cells of this notebook (AnoDDPM, default settings). Middle: decisions, mistakes
# shaded. Right: the cost of a thousand cells at each threshold; the square is yours.*

# %%
for price in prices:
    best_of = ladder[int(np.argmin(costs[price]))]
    mine = cost_of(labels, scores, middle, price)
    least = min(costs[price])
    print(
        f"price {price:3d}: least cost {least:5.0f}, at {best_of:5.2f} (oracle);",
        end=" ",
    )
    print(f"at the calibrated threshold {mine:.0f}")
    assert least <= mine + 1e-9
print(f"letting everything pass costs {1000 * defective:g} times the price")
found_by = image_metrics(labels, scores)
print(f"image AUROC, whatever the threshold: {found_by['image_auroc']:.3f}")

# %% [markdown]
# The dearer a missed defect, the lower the best threshold, and the more false alarms are worth it. At a low price one
# only has to avoid false alarms, and that is what the calibrated threshold does: it fixes their rate, whatever a miss
# costs. The least cost is an **oracle**: it was chosen on the labels of these very cells, and is too good to be true.
# And AUROC knows nothing of all this.
#
# ## Plant a defect
#
# Now a defect of your own, on a real cell: its kind, place, size and severity. All methods look at it, PCA included,
# with their default settings. A press of the button computes; hence the bar.
#
# Their scores have different units. To see them side by side, each method's scores and maps $s$ are put on one scale
# by a straight line, which its own *calibration* cells fix:
#
# $$u = \frac{s - \text{median of normal scores}}{\text{threshold} - \text{median of normal scores}} .$$
#
# So $u = 0$ is a usual normal score and $u > 1$ an alarm, for every method; no order and no decision changes.
#
# **Predict**: which method will see the weakest crack? Which one a mirrored patch, which is made of perfectly normal
# pieces? And will PCA do worse than they?

# %%
shown_as = {
    "pca": "PCA",
    "anoddpm": "AnoDDPM",
    "diffusionad": "DiffusionAD",
    "glad": "GLAD",
}
shown_as |= {"mdps": "MDPS", "bernoulli": "Bernoulli", "grad": "GRAD"}
bench = {text: methods[name] for name, text in shown_as.items() if name in methods}
cells = {f"cell {i + 1}": original(name) for i, name in enumerate(healthy[:4])}
some = ({"kind": "crack", "severity": 0.5}, {"kind": "inactive", "place": "top left"})
some = (*some, {"kind": "mirror", "size": 1.0})
explore_planting(cells, bench, static=some[:1] if quick else some)

# %% [markdown]
# *Figure: in a live notebook, five controls and a button. Printed: a weak crack, a dark area, a mirrored patch. Top
# row: the cell with the defect and each method's map; bottom row: the same without it, same noise. Above each map its
# score on the common scale; above 1 is an alarm (the white line on the bar). White outlines: the true defect.*
#
# Try: the weakest severity that still alarms, in the middle and at the rim. The same crack on another cell. A kind
# that one method sees and another does not. And a cell whose *bottom* row alarms already: about one in twenty will,
# since the threshold was chosen so.

# %% [markdown]
# ## Paper, public code, ours
#
# Where the knobs stand in the papers and in the public codes, as far as the notebooks of the methods found out; an
# empty field means that we do not know.
#
# | knob | paper | public code | here, lite profile |
# | --- | --- | --- | --- |
# | AnoDDPM: level, steps | | 200 for its measures, every level | 25, one step, mean of 4 noises |
# | DiffusionAD: levels, $w$ | 200 and 400 | 200 and 400, images in [0, 1]; $w = 1$ | 25 and 250; $w = 1$ |
# | GLAD: $T'$, lowest level | | 750 in 25 steps, 350 for most of MVTec AD | 100 in 10 steps, 30 |
# | GLAD: $\delta$ | | | quantile of the drifts of normal cells |
# | MDPS: level, $n$ | several samples | 150 to 250; 1 sample in every configuration shipped | 25; 4 samples |
# | MDPS: $w$ | of the squared norm, its own at each level | 50 to 200, of the batch's norm, or none | 1, of each image's norm |
# | MDPS: mask threshold | | from the range of the test set | 90 % quantile of normal pixels |
# | Bernoulli: $L$, $P$ | | README: 200, 0.5 | 100, 0.5 |
# | GRAD: receptive field, weights | its abstract speaks of local structure and of reweighting | none was found | 10 and 18 pixels; the rule is ours, off by default |
# | threshold of decisions | | | conformal, $q = 0.95$, from calibration cells |
#
# The explorers themselves are ours.

# %% [markdown]
# ## What did not work
#
# - **Contrast is no score.** It is one cell and two defects, and it looks at pixels that only a planted defect has. A
#   setting with the best contrast here need not rank real cells best; settings of the course were chosen on
#   development defects, never on these.
# - **Raw maps.** Statistics by position belong to one setting. To calibrate each frame of a slider would take as many
#   calibrations as frames, so the explorers of methods show raw maps; only the last panel has the calibrated ones.
# - **Fine sliders.** All combinations are drawn beforehand. Three knobs with ten values each are a thousand pictures;
#   hence the coarse steps.
# - **Size, place, and severity** are not independent of the kind: a defect is drawn in a window, the nearest to the
#   wanted place out of some draws. A dark area in a small window ends at its straight rim, as no real one does.
# - **A click at random** finds whatever one hopes to find. Exercise 09.3 does it properly.

# %% [markdown]
# ## Exercises

# %% [markdown] tags=["exercise"]
# ### Exercise 09.1 ★
#
# One scale for all methods. Write `to_units(values, normal_scores, threshold)`: the straight line that brings the
# median of the normal scores to 0 and the threshold to 1, for a NumPy array of scores or map values. And its inverse,
# `from_units(units, normal_scores, threshold)`.


# %% tags=["solution"]
def to_units(values, normal_scores, threshold):
    # BEGIN SOLUTION
    usual = np.median(normal_scores)
    return (values - usual) / (threshold - usual)
    # END SOLUTION


def from_units(units, normal_scores, threshold):
    # BEGIN SOLUTION
    usual = np.median(normal_scores)
    return usual + units * (threshold - usual)
    # END SOLUTION


# %% tags=["check"]
normal_scores = methods["anoddpm"].calibration_scores_
u = to_units(scores, normal_scores, calibrated)
assert np.isclose(to_units(np.median(normal_scores), normal_scores, calibrated), 0)
assert np.array_equal(u > 1, scores > calibrated), "a decision has changed"
assert np.array_equal(np.argsort(u), np.argsort(scores)), "an order has changed"
assert np.allclose(from_units(u, normal_scores, calibrated), scores, rtol=1e-4)
skewed = np.array([0.0, 1.0, 1.0, 10.0])
assert np.isclose(to_units(4.0, skewed, 7.0), 0.5), "the median, not the mean"
print(
    f"normal test cells above 1: {(u[labels == 0] > 1).sum()} of {(labels == 0).sum()}"
)

# %% [markdown] tags=["explain"]
# The line is increasing, so AUROC, decisions, and the order of pixels stay. It is fixed before the test images are
# seen, by normal images alone. Rescaling each map by its *own* minimum and maximum, which many published figures do,
# gives every picture a bright spot, a healthy one as well.

# %% [markdown] tags=["exercise"]
# ### Exercise 09.2 ★★
#
# Write `best_threshold(labels, scores, price, share)`: among the scores themselves, the threshold ("above it is an
# alarm") with the lowest cost by the formula above; among equals the lowest. Then say which *single* number, made of
# $c$ and $\pi$, decides where it lies.


# %% tags=["solution"]
def best_threshold(labels, scores, price, share):
    # BEGIN SOLUTION
    def cost(threshold):
        missed = np.mean(scores[labels == 1] <= threshold)
        false = np.mean(scores[labels == 0] > threshold)
        return round(share * price * missed + (1 - share) * false, 12)

    return min(np.unique(scores), key=cost)  # of equals, min takes the first
    # END SOLUTION


# %% tags=["check"]
made_labels = np.array([0, 0, 0, 1, 1, 1])
made_scores = np.array([1.0, 2.0, 4.0, 3.0, 5.0, 6.0])
assert best_threshold(made_labels, made_scores, 1.0, 0.5) == 2.0, "of equals the lowest"
assert best_threshold(made_labels, made_scores, 0.01, 0.5) == 4.0, (
    "false alarms are dear"
)
assert best_threshold(made_labels, made_scores, 100.0, 0.5) == 2.0, "misses are dear"
assert best_threshold(made_labels, -made_scores, 1.0, 0.1) == -1.0, (
    "let everything pass"
)
for price, share in (
    (1.0, 0.5),
    (9.0, 0.1),
    (99.0, 0.01),
):  # price * share / (1 - share) = 1
    t = best_threshold(labels, scores, price, share)
    assert t == best_threshold(labels, scores, 1.0, 0.5), "only that product matters"
    print(f"price {price:g}, share {share:g}: {t:.2f}")

# %% [markdown] tags=["explain"]
# Divide the cost by $1 - \pi$: what is left depends on $c\,\pi / (1 - \pi)$ only. A hundredth of the defects at a
# hundred times the price is the same problem. So *ask for the price and the share* before you ask for a threshold;
# and where nobody knows them, say which product your threshold stands for.

# %% [markdown] tags=["exercise"]
# ### Exercise 09.3 ★★
#
# How weak a defect is still found? Write `smallest_seen(alarms, severities)` for a bool array (cells, severities),
# severities increasing: the smallest severity such that **from it on**, at every severity, at least half of the cells
# alarm; `None` if there is none.


# %% tags=["solution"]
def smallest_seen(alarms, severities):
    # BEGIN SOLUTION
    enough = np.asarray(alarms).mean(axis=0) >= 0.5
    for i, severity in enumerate(severities):
        if enough[i:].all():
            return severity
    return None
    # END SOLUTION


# %% tags=["check"]
assert smallest_seen([[0, 1, 0, 1], [0, 1, 1, 1]], [1, 2, 3, 4]) == 2
assert smallest_seen([[1, 0, 1], [1, 0, 1]], [1, 2, 3]) == 3, "from it on, at every one"
assert smallest_seen([[1, 1, 0], [1, 0, 0]], [1, 2, 3]) is None
assert smallest_seen([[1], [0]], [5]) == 5, "at least half"


# %% tags=["check"]
def alarms_of(method, kind, severities, n):
    """For n healthy cells, a defect in the middle at each severity: alarm?"""
    rows = []
    for cell in map(original, healthy[:n]):
        where = {"place": (0.5, 0.5), "size": 0.7}
        sick = [plant_at(cell, kind, **where, severity=s)[0] for s in severities]
        images = to_float(
            np.stack([resize_image(x, size, "squash") for x in [cell, *sick]])
        )
        noise_of = image_keys(images[:1]) * len(images)
        found_scores = method.predict(images, keys=noise_of).image_score.numpy()
        rows.append(found_scores[1:] > method.threshold_)
    return np.array(rows)


severities = (0.5, 2.0) if quick else (0.25, 0.5, 1.0, 2.0)
for name in ("pca", "anoddpm", "diffusionad"):
    for kind in (
        ("crack", "inactive") if quick else ("crack", "inactive", "finger", "mirror")
    ):
        alarms = alarms_of(methods[name], kind, severities, 2 if quick else 8)
        print(f"{name:12} {kind:9}", smallest_seen(alarms, severities))

# %% [markdown] tags=["explain"]
# "From it on" guards against a lucky severity in the middle: a stronger defect is *larger* as well, falls on other
# pixels, and can be missed where a weaker one was found. A few cells with one defect each are a rough limit: with 8
# cells, "half" could be anything from about a sixth to five sixths. And the limit holds for planted defects, of this
# size, in this place. It is a comparison of knobs and kinds, not a promise about real cracks.

# %% [markdown] tags=["exercise"]
# ### Exercise 09.4 ★★★
#
# Which slider matters most? For a full grid of values, `table` with one axis for each slider, the *main effect* of a
# slider is the variance of the means along its axis (averaged over all the others), divided by the variance of the
# whole table. Write `main_effects(table)`; return one share for each axis. What is missing to 1 is **interaction**:
# what one slider does depends on where another one stands.


# %% tags=["solution"]
def main_effects(table):
    # BEGIN SOLUTION
    table = np.asarray(table, dtype=float)
    shares = []
    for axis in range(table.ndim):
        others = tuple(i for i in range(table.ndim) if i != axis)
        shares.append(table.mean(axis=others).var() / table.var())
    return shares
    # END SOLUTION


# %% tags=["check"]
a, b = np.arange(4.0)[:, None], np.array([0.0, 5.0, 1.0])[None]
assert np.allclose(sum(main_effects(a + b)), 1), "sums of single effects leave nothing"
assert np.allclose(main_effects(a + 0 * b), [1, 0])
assert np.allclose(main_effects((a - a.mean()) * (b - b.mean())), 0), "all interaction"
assert len(main_effects(np.random.default_rng(0).normal(size=(2, 3, 4)))) == 3

# %% tags=["check"]
grid_t, grid_n = ((25, 200), (1, 5)) if quick else ((25, 50, 100, 200), (1, 2, 5, 10))
for i, kind in enumerate(planted):
    contrasts = np.zeros((len(grid_t), len(grid_n)))
    for j, t in enumerate(grid_t):
        for k, n in enumerate(grid_n):
            at = methods["anoddpm"].with_settings(noise_level=t, steps=n, n_noises=1)
            maps = at.predict(three, seed=seed, keys=keys).anomaly_map
            contrasts[j, k] = floor_and_contrast(maps)[1][i]
    of_t, of_n = main_effects(contrasts)
    print(f"{kind:10} level {of_t:.0%}, steps {of_n:.0%}, both {1 - of_t - of_n:.0%}")
    assert math.isclose(of_t + of_n, min(of_t + of_n, 1), rel_tol=1e-6)

# %% [markdown] tags=["explain"]
# A slider with a small main effect can still matter, through interaction: guidance does nothing without a mask, a
# mask nothing without samples. That is why an explorer draws the *full* grid, and why changing one knob at a time can
# mislead. The shares depend on the values chosen for each slider, too: a knob that was moved little has little
# effect.

# %% [markdown]
# ## What we learned
#
# - Two numbers, the noise floor and the contrast, tell what a knob does; one alone flatters.
# - The level trades thin defects for broad ones; fresh noise at each step raises the floor; guidance and masks bring
#   back, or hold, what one wanted to remove.
# - One colour scale, fixed by normal images, makes maps of different methods comparable without touching an order.
# - A threshold belongs to a price and a share of defects, not to a metric.
# - Play finds questions. Answers need many cells, several seeds and an interval.
#
# ## References
#
# - AnoDDPM, DiffusionAD, GLAD, MDPS, masked Bernoulli diffusion, GRAD: see the references of their notebooks, 02 to
#   07.
# - R. A. Fisher's analysis of variance is the root of exercise 09.4; a textbook: D. C. Montgomery, *Design and
#   Analysis of Experiments*.
# - Cells: ELPV, S. Deitsch et al.: *Automatic classification of defective photovoltaic module cells in
#   electroluminescence images*, Solar Energy 185, 2019,
#   [doi 10.1016/j.solener.2019.02.067](https://doi.org/10.1016/j.solener.2019.02.067), CC BY-NC-SA 4.0.
