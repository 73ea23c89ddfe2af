# %% [markdown]
# # 10 · Your own images
#
# **A folder in, a report out: what to check before training, what a threshold promises, what would be found if
# there were defects, and what goes into a file that somebody else can read. The half is done before any network
# is trained.**
#
# | At a glance | |
# | --- | --- |
# | Level | beginner to intermediate |
# | Minutes (ci / lite / paper) | under 1 / 2 / hours on a GPU (it trains a model); 35 to read |
# | Memory | about 2 GB |
# | Downloads | none |
# | Previous | [09](09_explore.ipynb) |
# | Next | [11](11_scaling_up.ipynb) |

# %% [markdown]
# ## You will be able to
#
# - say which images a detector needs, how many, and at which size;
# - survey a folder, read its warnings, and name what no survey can see;
# - train with a limit of time, beside baselines that need seconds;
# - say what a threshold from $n$ normal images promises, and how far one draw of them may be off;
# - get a measured idea of what would be found when you have no defective image, and know what it is not;
# - tell a change of light from an outbreak of defects;
# - write scores and maps in forms that others read, and check them by reading them back.
#
# ## Prerequisites
#
# [00](00_start_here.ipynb): maps, scores, thresholds. [02](02_sampling_to_detection.ipynb): AnoDDPM, the baselines,
# calibration of maps, planted defects.

# %% tags=["parameters"]
profile: str = "lite"  # ci | lite | paper
root: str = ""  # folder of your normal images; "" makes one of solar cells
category: str = ""  # sub-folder of root; without root the kind of cells, mono or poly
new: str = ""  # folder of images to judge; "" takes more solar cells
plant: str = "cells"  # family of planted defects: cells | lesions
image_size: int = 64  # side in pixels that images are brought to
max_minutes: float = 0.5  # of training the diffusion model; more is better
seed: int = 0  # all randomness
out_dir: str = "runs/notebooks"  # where the report on a folder of your own goes

# %% tags=["setup"]
import csv
import io
import shutil
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import Image as Picture
from IPython.display import Markdown
from PIL import Image
from scipy import stats

from diffad_lite import plots
from diffad_lite.data import (
    data_dir,
    list_images,
    load_dataset,
    plant_defect,
    read_elpv,
    read_folder,
    read_image,
    resize_image,
    split,
    to_float,
)
from diffad_lite.evaluation import metrics, records, tables
from diffad_lite.experiments import (
    Run,
    evaluate,
    find_shifts,
    read_images,
    score_folder,
    survey,
    train,
)
from diffad_lite.methods import conformal_threshold, get_method
from diffad_lite.notebook import explore, resolve_profile

# %% tags=["context"]
profile = resolve_profile(profile)
plots.use_style()
quick = profile == "ci"
as_described = not root and not new and category in ("", "mono")  # what the text is of
checked = as_described and not quick and plant == "cells" and image_size == 64
print("profile:", profile)

# %% [markdown]
# ## Which images?
#
# The method of this course is the same for solar cells and for your product: learn normal images, measure how
# a new one differs. So it can only be as good as the normal images are. They should be
#
# - **normal**: a faulty picture among them is learnt as normal;
# - **taken alike**: same camera, distance, light, file format, and the same as later at work. Whatever differs
#   between the two is an anomaly to the model;
# - **aligned**, if possible: a part that lies anywhere needs more images, and some methods cannot use it at all
#   (`poly` in the tables of [README](../README.md));
# - **of everything that is normal**: each variant, each shift, each supplier. What is rare in training will be an
#   alarm;
# - **enough**: below 50 the package warns. How many are enough is a question that this notebook measures.
#
# Defective images are not needed for training. A few, kept aside, are worth a lot at the end.
#
# Two layouts are read: a folder that simply holds normal images, or MVTec's (`train/good`, `test/good`,
# `test/<defect>`, masks in `ground_truth/<defect>`); see [data/README.md](../data/README.md). If several images show
# one patient, part or wafer, say so in `subjects.csv`, or the same part stands on both sides of the split.
#
# You have no folder at hand? Here is one. It holds solar cells as files, as a colleague might send them, and six
# things are wrong with it. With `root`, the notebook takes your folder instead; the text then speaks of numbers
# that are not yours.

# %% tags=["context"]
temporary = tempfile.TemporaryDirectory()  # removed at the end
scratch = Path(temporary.name)
work = Path(out_dir) / "own_images" if root else scratch  # checkpoints and report
if root:
    base = Path(root, category)
    inside = base / "train" / "good"
    normal = inside if inside.is_dir() else base
else:
    base = normal = scratch / "normal"

# %% tags=["context"]
n_normal, n_new = (100, 12) if quick else (200, 30)
kind = category if category in ("mono", "poly") else "mono"
cells = read_elpv(kind, None)  # names and paths of the package's files
order = np.random.default_rng(0).permutation
good = list(order(sorted(cells.normals.values())))
bad = list(order(sorted(item.image for item in cells.test.values())))
named = {f"cell_{i:03d}.png": path for i, path in enumerate(good[:n_normal])}
named["cell_055.png"] = bad[-38]  # defective, and nobody noticed

# %% tags=["context"]
if not root:
    normal.mkdir()
    for name, path in named.items():
        shutil.copyfile(path, normal / name)
    third = (normal / "cell_003.png").read_bytes()
    (normal / "copy_of_003.png").write_bytes(third)
    (normal / "broken.png").write_bytes(third[: len(third) // 2])
    pixels = Image.open(normal / "cell_004.png")
    pixels.crop((0, 0, pixels.width, pixels.height // 2)).save(normal / "half.png")
    Image.new("L", pixels.size).save(normal / "black.png")
    Image.open(io.BytesIO(third)).save(normal / "again_003.jpg", quality=95)

# %% [markdown]
# The six: a file copied, a file that broke off in transfer, an image of another shape, a black frame, the same image
# saved once more as JPEG, and a defective cell that nobody noticed.
#
# **Predict**: which of them can a program find that has never seen a solar cell?

# %%
found = survey(list_images(normal))
print(f"{len(found.names)} images read, {len(found.broken)} not")
for name, values in {"sizes": found.sizes, "channels": found.channels}.items():
    counts = {value: values.count(value) for value in sorted(set(values))}
    print(f"{name}:", ", ".join(f"{v} ({n} times)" for v, n in counts.items()))
for warning in found.warnings():
    print("-", warning.replace(f"{normal}", normal.name))

# %% [markdown]
# Four of the six. The survey opens each file once, compares pixels for copies, and looks at three numbers of each
# image: mean grey (*brightness*), its deviation (*contrast*), and the mean step between neighbours (*sharpness*).
# An image stands out if it lies more than six deviations from the median (deviations estimated by the median
# distance, so that the outliers themselves do not widen them).

# %%
looks = found.looks
fig, axes = plt.subplots(1, 3, figsize=(9, 2.4), sharey=True)
units = {"brightness": "mean grey", "contrast": "deviation", "sharpness": "mean step"}
for ax, (look, values) in zip(axes, looks.items(), strict=True):
    ax.hist(values, 40, color=plots.COLOURS[0])
    ax.set(xlabel=f"{look}: {units[look]}, 0 to 255", ylabel="images", yscale="log")
    ax.label_outer()

# %% [markdown]
# *Figure: the three numbers of all images, counts on a logarithmic scale.* The black frame is the bar at zero.
#
# The JPEG is not found: its pixels are *nearly* those of its original (exercise 10.2 finds it). Nor is the defective
# cell: to the survey it is a cell like others. Only a model of cells can find that, and below one does. First we do
# what the warnings say. (In a folder of your own, nothing is removed.)

# %% tags=["context"]
if not root:
    for name in ("copy_of_003.png", "broken.png", "half.png", "black.png"):
        (normal / name).unlink()

# %%
left = survey(list_images(normal))
print(f"{len(left.names)} images, warnings: {left.warnings()}")
assert root or left.warnings() == []

# %% [markdown]
# ## At which size?
#
# Images are brought to a square of `image_size` pixels. A defect of $w$ pixels in an image of $W$ becomes $w\,s/W$
# pixels wide at the side $s$. Where that is below one pixel, its contrast is spread over the pixel, and about
#
# $$\text{contrast left} \;\approx\; \min\!\Big(1,\; \frac{w\,s}{W}\Big)$$
#
# of it remains. So ask for the narrowest defect that must be found, and choose $s$ such that it keeps a pixel.
#
# **Predict**: a crack is about two pixels wide in a cell of 300. What is left of its contrast at 64?

# %%
example = read_image(list_images(normal)[-1])  # (C, H, W), 0 to 255
thin, mask = plant_defect(example, "crack", seed=2)
sides = (256, 128, 64, 32)
pairs = {"whole": (thin, example)}
pairs |= {s: [resize_image(x, s, "squash") for x in (thin, example)] for s in sides}
contrast = {k: int(np.abs(a.astype(int) - b).max()) for k, (a, b) in pairs.items()}
titles = [f"{k}: {v} of 255" for k, v in contrast.items()]
fig, _ = plots.show_images([to_float(a) for a, _ in pairs.values()], titles)
assert not as_described or contrast[32] < contrast[64] < contrast[128]

# %% [markdown]
# *Figure: a cell with a planted crack, whole and at smaller sizes; above each, the largest change of a pixel by the
# crack, in grey levels.* (Resizing sharpens a little, so that a value can exceed that of the whole.) The eye still sees
# the crack at 64, since it is long. At 32 most of it is gone, and no method brings that back. A larger side costs:
# pixels grow with its square, and so does the time. For parts that are not square, `resize="pad"` keeps the aspect.
#
# ## The split
#
# Of a folder without layout, a fifth is held out for calibration and a fifth for a test. Where an image goes depends
# on its name alone, so that a new image moves few others.

# %% tags=["context"]
place = "folder", category if root else None


def run_of(name, **settings):
    """One run on this folder; settings are written as JSON."""
    return Run(
        name,
        *place,
        str(Path(root) if root else base),
        profile=profile,
        image_size=image_size,
        seed=seed,
        settings=settings,
    )


data = load_dataset(*place, root=run_of("pca").root, image_size=image_size)

# %%
summary = data.summary()
for name in ("n_train", "n_calibration", "n_test_normal", "n_test_anomalous"):
    print(f"{name:18}{summary[name]}")
parts = split(read_folder(place[1], Path(run_of("pca").root)), 0)
where = {}  # name -> part
for part, names in zip(("train", "calibration", "test"), parts, strict=True):
    where |= {Path(name).name: part for name in names}
for name in () if root else ("cell_003", "again_003", "cell_055"):
    print(f"{name:18}{where[name]}")
assert root or where["cell_055"] == "calibration"

# %% [markdown]
# The defective cell is among the *calibration* images; for the JPEG and its original it is chance whether they stand
# on one side. If they do not, a "new" image of the test is one that was trained on. For one pair among hundreds that
# is nothing; for a series of nearly equal frames of a video it is everything.
#
# ## Train: seconds first
#
# Before a network trains for minutes, ask what seconds give. *PCA* draws each image from the principal components of
# the others ([02](02_sampling_to_detection.ipynb)). And now a model can find what the survey could not: the images
# with the highest *calibration* scores are the least normal of the normal ones. Look at them, always.

# %%
first = train(run_of("pca"), data, scratch / "first look", progress=False)
names = [name for name, part in where.items() if part == "calibration"]
top = np.argsort(-first.calibration_scores_)[:6]
titles = [names[i] for i in top]
fig, _ = plots.show_images(data.calibration[top], titles)
assert not as_described or titles[0] == "cell_055"

# %% [markdown]
# *Figure: the six calibration images that PCA finds least normal, highest score first.* There is the defective cell.
#
# What to do with such images is a question for somebody who knows the product: remove a faulty one, keep a rare good
# one, and get more of the latter. Removing images *because* they score high would only lower the threshold, until
# everything is an alarm. Here the first has cracks and goes; the others are healthy and stay. (A faulty image in the
# *training* part is harder to see: PCA has learnt it. Another `split_seed` moves it.)

# %% tags=["context"]
if not root:
    (normal / "cell_055.png").unlink()
    data = load_dataset(*place, root=run_of("pca").root, image_size=image_size)

# %% [markdown]
# Now three baselines on the clean folder: PCA again; *brightness*, the control; *PaDiM*, which compares ImageNet
# features position by position. `train` writes a checkpoint that a second call only loads.

# %% tags=["context"]
fitted, seconds = {}, {}


def fit(label, run, budget=None):
    """Train, or load what was trained before, and note the time."""
    started = time.monotonic()
    folder = work / f"{label}-{image_size}px-s{seed}"
    fitted[label] = train(run, data, folder, budget=budget, progress=budget is not None)
    seconds[label] = time.monotonic() - started


fit("pca", run_of("pca"))
pca = fitted["pca"]

# %%
fit("brightness", run_of("brightness"))
fit("padim", run_of("padim"))
for name in fitted:
    print(f"{records.METHOD_NAMES[name]:22}{seconds[name]:6.1f} s")
print(f"threshold of PCA: {first.threshold_:.1f} before, {pca.threshold_:.1f} now")
assert not as_described or pca.threshold_ != first.threshold_

# %% [markdown]
# One faulty image among the calibration images moves the threshold, in two ways. It takes one of the few ranks above
# it, which raises the threshold; and it widens the map statistics where its defect lies, so that all other images
# score less there, which lowers it. Which of the two wins cannot be known beforehand, and both are wrong. The next
# section but one says why one image is enough.
#
# ## A diffusion model with a time limit
#
# AnoDDPM's lite profile makes 5,000 steps, which takes about ten minutes on two cores. With a budget, the first 20
# steps are timed, and the number of steps is lowered to what fits, so that the learning rate still decays to zero. We
# ask for standardised images (mean 0, one deviation each), for a reason that comes below.
#
# **Predict**: will half a minute of AnoDDPM rank defects better than a second of PCA?

# %%
diffusion_run = run_of("anoddpm", standardise="true")
budget = None if profile == "paper" else 60 * max_minutes
fit("anoddpm", diffusion_run, budget)
made = fitted["anoddpm"].reports_["diffusion"]
planned = diffusion_run.configure(data).denoiser.train.steps
print(f"{made['steps']:.0f} of {planned} steps in {made['seconds']:.0f} s")

# %% [markdown]
# A budget is a wish about *your* machine: on a slower one the same half minute holds fewer steps, and the scores are
# others. For numbers that must be repeated, fix the steps: `settings={"denoiser.train.steps": "400"}`, or `--set
# denoiser.train.steps=400`. The same as commands, each of which goes on where it was interrupted:
#
# ```console
# diffad evaluate --method pca --dataset folder --root my_images --plant cells --out runs/mine-pca
# diffad evaluate --method anoddpm --dataset folder --root my_images --plant cells --max-minutes 8 --out runs/mine
# diffad score --checkpoint runs/mine/checkpoint --images new_images --out runs/new
# ```
#
# ## What the threshold promises
#
# With the $n$ calibration scores sorted upwards, the threshold is the one of rank $k = \lceil (n+1)\,q \rceil$, $q =
# 0.95$. A new normal image exceeds it with probability at most $1 - q$ *on average over draws of the calibration
# images* ([00](00_start_here.ipynb)). But you have one draw. If scores are independent and have no ties, the rate of
# false alarms $R$ that your threshold will have for ever is itself random,
#
# $$R \;\sim\; \operatorname{Beta}(n + 1 - k,\; k) , \qquad \operatorname{E} R = \frac{n + 1 - k}{n + 1} \le 1 - q ,$$
#
# for on the scale of their distribution function scores are uniform, and the $k$-th smallest of $n$ uniform
# numbers is $\operatorname{Beta}(k, n + 1 - k)$.
#
# **Predict**: with 40 calibration images, within which limits does $R$ lie in nine of ten cases?

# %%
q = 0.95


def false_alarm_rate(n):
    """The rank k of n, and the distribution of the rate of false alarms."""
    k = min(int(np.ceil(round((n + 1) * q, 9))), n)  # the largest score, if n is small
    return k, stats.beta(n + 1 - k, k)


print("   n    k   mean    nine of ten cases")
for n in (5, 10, 20, 40, 120, 1000):
    k, rate = false_alarm_rate(n)
    low, high = rate.interval(0.9)
    print(f"{n:4d} {k:4d} {rate.mean():6.1%}    {low:.1%} to {high:.1%}")

# %%
rng, n = np.random.default_rng(seed), 40
k, rate = false_alarm_rate(n)
thresholds = np.sort(rng.random((20_000, n)), axis=1)[:, k - 1]  # of uniform scores
measured = 1 - thresholds
print(f"simulated mean {measured.mean():.3f}, exact {rate.mean():.3f}")
assert abs(measured.mean() - rate.mean()) < 0.002
assert abs(np.quantile(measured, 0.95) - rate.ppf(0.95)) < 0.005

# %%
x = np.linspace(0, 0.25, 500)
rates = {f"n = {n}": false_alarm_rate(n)[1].pdf(x) for n in (20, 40, 120, 1000)}
axes = {"xlabel": "rate of false alarms R", "ylabel": "density"}
fig, _ = plots.show_curves(x, rates, **axes)
line = fig.axes[0].axvline(1 - q, color="black", linewidth=1, linestyle=":")
low, high = false_alarm_rate(40)[1].interval(0.9)
assert low < 0.01 and high > 0.1  # as the text says

# %% [markdown]
# *Figure: how the rate of false alarms scatters over draws of $n$ calibration images; dotted: 5 %.* "Five per cent"
# from 40 images may be one per cent or ten. From less than 19 no rank reaches 95 %: the largest score is taken, the
# package warns, and the mean rate is $1/(n+1)$. It says so:

# %%
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    conformal_threshold(pca.calibration_scores_[:10], q)
print(said[0].message)

# %% [markdown]
# And one mistake, as the cell above? With $n = 40$ the rank is 39: one score may lie above the threshold. A faulty
# image takes that place, and the threshold is then the largest score of a healthy one (if map statistics stay as they
# are). A second faulty image would move it into the defects' own range. With $n = 20$ the first one does.
#
# The images that were held out for the test give the first check. A count of false alarms needs an interval, too
# (exact, of Clopper and Pearson):


# %%
def share(hits, total):
    """A count with its 95 % interval, as text."""
    low, high = stats.binomtest(int(hits), int(total)).proportion_ci(0.95)
    return f"{hits:3d} of {total:3d}   [{low:4.0%}, {high:4.0%}]"


def alarms_of(method, images):
    """Which images (B, C, H, W) lie above the method's threshold, (B,)."""
    return method.predict(images).image_score.numpy() > method.threshold_


# %%
held_out = data.test_images[data.test_labels == 0]
print("false alarms on images held out")
for name, method in fitted.items():
    alarms = alarms_of(method, held_out)
    print(f"{records.METHOD_NAMES[name]:26}{share(alarms.sum(), len(alarms))}")

# %% [markdown]
# ## What would be found? Planted defects
#
# Without a defective image nothing can be said about defects, but something about *made* ones. `plant="cells"` draws
# cracks, dark areas, interrupted lines, spots or turned patches into the held-out images; `plant="lesions"` blobs,
# scrambled and shifted regions, for any texture. Their *severity* moves contrast and size: 1 is plain to
# see, 0.3 is hard.
#
# **Predict**: which of the four finds most, and at which severity do all fail?

# %%
severities = (0.3, 1.0) if quick else (0.25, 0.5, 1.0, 2.0)
options = {"root": run_of("pca").root, "image_size": image_size, "plant": plant}
caught = {name: [] for name in fitted}
for severity in severities:
    planted = load_dataset(*place, severity=severity, **options)
    defects = planted.test_images[planted.test_labels == 1]
    for name, method in fitted.items():
        caught[name].append(alarms_of(method, defects).mean())

# %%
curves = {records.METHOD_NAMES[name]: values for name, values in caught.items()}
axes = {"xlabel": "severity of planted defects", "ylabel": "share above threshold"}
fig, _ = plots.show_curves(severities, curves, **axes, log="x", markers=True)
ax = fig.axes[0]
ax.set_xticks(severities, severities)
ax.minorticks_off()
label = ax.axhline(1 - q, color="black", linewidth=1, linestyle=":")
assert not checked or caught["padim"][-1] > 0.8 > caught["brightness"][-1]

# %% [markdown]
# *Figure: share of planted defects that lie above each method's threshold, by severity; dotted: the 5 % of false
# alarms that were meant. One defect an image, the same images at each severity.* Brightness sees nearly nothing of
# them. How far half a minute of AnoDDPM comes depends on how many steps it held on your machine (the list above). Read
# such a curve as *"a defect like this, of this strength, would be found so often"*, never as *"the detector finds so
# many per cent"*.
#
# ## Judge new images
#
# Now a folder arrives, without labels. (We know them, but do not tell.) `score_folder`, or `diffad score`, writes
# one row an image to `scores.csv`, a map of each at its original size, and a picture of the highest scores.

# %%
if new or root:
    fresh, truth = Path(new or normal), {}
else:
    fresh = scratch / "new"
    fresh.mkdir()
    mixed = [(p, 0) for p in good[n_normal : n_normal + n_new]]
    mixed += [(p, 1) for p in bad[:n_new]]
    mixed = [mixed[i] for i in order(len(mixed))]
    truth = {f"{i:03d}.png": label for i, (_, label) in enumerate(mixed)}
    for name, (path, _) in zip(truth, mixed, strict=True):
        shutil.copyfile(path, fresh / name)

# %%
judged = {}
for name, method in fitted.items():
    judged[name] = score_folder(method, fresh, work / "judged" / name)
alarms = {name: sum(row["alarm"] for row in rows) for name, rows in judged.items()}
written = work / "judged" / "padim"
files = sorted(p.relative_to(written).as_posix() for p in written.rglob("*.*"))
print(len(files), "files for each method, such as", *files[-2:])
for name, count in alarms.items():
    print(f"{records.METHOD_NAMES[name]:26}{count} alarms among {len(judged[name])}")

# %%
Picture(filename=str(written / "gallery.png"))

# %% [markdown]
# *Figure: `gallery.png` of PaDiM, the images with the highest scores; all maps share one scale, which ends above 99.9
# % of all pixels.* One scale for all is a choice with a consequence: a picture without anything looks dark. Were each
# map stretched to its own range, every image would seem to have a defect.
#
# Without labels the work would end here, with a person who looks at the alarms. We can ask how many were right:

# %%
if truth:
    print(f"{'':26}{'defective found':29}healthy, false alarm")
for name, rows in judged.items() if truth else ():
    hit = [[row["alarm"] for row in rows if truth[row["file"]] == k] for k in (1, 0)]
    cells_of = "     ".join(share(sum(h), len(h)) for h in hit)
    print(f"{records.METHOD_NAMES[name]:26}{cells_of}")

# %%
at_one = severities.index(1.0)
real = {}
for name, rows in judged.items() if truth else ():
    real[name] = np.mean([row["alarm"] for row in rows if truth[row["file"]]])
    print(f"{name:12} planted {caught[name][at_one]:4.0%}   real {real[name]:4.0%}")
if checked:
    assert caught["padim"][at_one] > caught["pca"][at_one] + 0.05  # a winner
    assert abs(real["padim"] - real["pca"]) < 0.2  # none
    assert real["brightness"] > caught["brightness"][at_one]

# %% [markdown]
# *Lists: what was found at each threshold, with exact 95 % intervals; then the same shares beside those of planted
# defects of severity 1.* Of the planted defects PaDiM finds more than PCA; on these real cells the two cannot be told
# apart, and even brightness, which planted defects call useless, finds some, since real defects take light away.
# Planted defects answer whether a pipeline works, how small is too small, and where a map lights up. **They do not
# rank methods for your defects.** For that, collect real ones: with a few dozen the intervals above begin to be of use.
#
# ## Another light
#
# A week later the exposure is shorter: the same *healthy* cells come in, with grey values at 60 %.
#
# **Predict**: how many alarms does each method raise now? Which looked at brightness, and which cannot?

# %%
healthy = [p for p in list_images(fresh) if not truth.get(p.name, 0)][:n_new]
dark = scratch / "dark"
dark.mkdir()
for path in healthy:
    pixels = (0.6 * read_image(path)).round().astype(np.uint8)
    picture = Image.fromarray(pixels.transpose(1, 2, 0).squeeze())  # grey has no axis
    picture.save(dark / f"{path.stem}.png")
said = find_shifts(left, survey(list_images(dark)))
print(*said, sep="\n")
assert not as_described or said

# %%
fit("mean_image", run_of("mean_image"))
fit("mean image, standardised", run_of("mean_image", standardise="true"))
print(f"{'alarms':28}{'as they were':16}darker")
for name, method in fitted.items():
    counts = []
    for paths in (healthy, list_images(dark)):
        images = read_images(paths, data.info["channels"], image_size, "squash")
        counts.append(alarms_of(method, images).sum())
    label = records.METHOD_NAMES.get(name, name)
    print(f"{label:28}{counts[0]:3d} of {len(healthy):<10d}{counts[1]:3d}")
    if checked and name in ("brightness", "mean image, standardised"):
        assert (counts[1] > 0.8 * len(healthy)) == (name == "brightness")

# %% [markdown]
# *List: warnings of `find_shifts`, then false alarms on the same healthy images before and after.* `find_shifts`
# compares the three numbers of the survey, and speaks when nearly all pairs of a normal and a new image are ordered
# alike. A defect touches some images; light touches all. Methods that standardise each image (PCA by default, AnoDDPM
# as trained here) hardly notice, nor does PaDiM, which does not standardise; the plain mean image does, and its
# standardised twin does not.
#
# The price: what only brightness tells is lost to a standardised method, and some real defects of solar cells are
# just that. If light can be kept constant, keep it, and do not standardise. If it cannot, standardise, and look for
# shifts each day. A gradient across the image, a new focus or a turned part is *not* undone by it.
#
# ## Files that others read
#
# `evaluate(..., save_maps=True)`, or `diffad evaluate --maps`, writes each map as a float32 TIFF of its image's size
# under `<category>/test/<defect>/<id>.tiff`, the layout that MVTec's evaluation script reads. Are the files worth
# what `result.json` says of them? Read them back and measure again.

# %%
target = work / "report" / "pca"
checkpoint = work / f"pca-{image_size}px-s{seed}" / "checkpoint"
planted_run = replace(run_of("pca"), plant=plant)
result = evaluate(planted_run, target, checkpoint=checkpoint, save_maps=True)
tiffs = sorted(target.rglob("*.tiff"))
print(f"{len(tiffs)} maps, such as {tiffs[0].relative_to(target).as_posix()}")
print("and", ", ".join(sorted(p.name for p in target.iterdir() if p.is_file())))

# %%
stored = planted_run.load_data()
folder = target / "maps" / stored.info["category"] / "test"
maps = [
    np.asarray(Image.open(folder / kind / f"{Path(name).name}.tiff"))
    for name, kind in zip(stored.test_ids, stored.defect_types, strict=True)
]
again = metrics.pixel_metrics(stored.test_masks, maps)
with (target / "scores.csv").open(newline="") as file:
    rows = list(csv.DictReader(file))
labels, scores = ([float(r[k]) for r in rows] for k in ("label", "image_score"))
again |= metrics.image_metrics(labels, scores)
for name, value in again.items():
    print(f"{name:20}{value:.6f}   recorded {result[name]:.6f}")
    assert abs(value - result[name]) < 1e-4

# %% [markdown]
# They are the same numbers. Three things make that so: maps are stored as floats, not as pictures of 256 grey levels;
# they have the size of the image, not of the network; and nothing is rescaled from image to image. (Scores in the
# list of a CSV have six digits, so that a tie may fall another way.)
#
# The report on all methods is rendered from their records, like every table of this course:

# %%
for name in ("brightness", "padim", "anoddpm"):
    settings = {"standardise": "true"} if name == "anoddpm" else {}
    run = replace(run_of(name, **settings), plant=plant)
    checkpoint = work / f"{name}-{image_size}px-s{seed}" / "checkpoint"
    evaluate(run, work / "report" / name, checkpoint=checkpoint)
results = records.read_results(work / "report")
Markdown(tables.image_table(results) + "\n\n" + tables.pixel_table(results))

# %% [markdown]
# *Tables: planted defects of severity 1, on the held-out images clean and once more with a defect each (the ci profile
# takes some of them).* "Calibrated" maps are in units of what is usual at a position. Do the methods differ, and by
# more than the choice of so few images explains? All saw the same ones, so the bootstrap draws them in pairs:

# %%
by_pca = records.select(results, method="pca")
for name in ("brightness", "padim", "anoddpm"):
    own = records.select(results, method=name)
    difference, low, high = records.difference_of(own, by_pca)
    label = f"{records.METHOD_NAMES[name]} minus PCA"
    print(f"{label:36}{difference:+.3f} [{low:+.3f}, {high:+.3f}]")

# %% [markdown]
# *List: difference of image AUROC on planted defects, with its 95 % interval. One that holds zero says that this test
# cannot tell.*
#
# ### Where to draw the line
#
# The threshold is a choice, and the quantile $q$ is its knob. From the calibration scores of PCA, and on the same
# planted defects:

# %%
fake = stored.test_images, stored.test_labels
scores_of = pca.predict(fake[0]).image_score.numpy()


def at_quantile(q):
    n = len(pca.calibration_scores_)
    level = np.sort(pca.calibration_scores_)[min(int(np.ceil((n + 1) * q)), n) - 1]
    fig, shown = plots.show_scores(fake[1], scores_of, threshold=level)
    missed = ((scores_of <= level) & (fake[1] == 1)).sum()
    false = ((scores_of > level) & (fake[1] == 0)).sum()
    fig.axes[0].set_title(f"q = {q}: missed {missed}, false alarms {false}")
    return fig, shown


explore(at_quantile, static=[{"q": 0.95}, {"q": 0.7}], q=[0.5, 0.7, 0.8, 0.9, 0.95])

# %% [markdown]
# *Figure: in a live notebook, a slider; printed, $q = 0.95$ and $q = 0.7$. Scores of the held-out images, clean and
# with planted defects.* What a missed defect costs and what a false alarm costs is for you to say. Choose $q$
# *before* you look at defects that you report on.
#
# ## How many images?
#
# The same test, with fewer images to learn from. (The calibration images stay the same, so that only learning
# changes.)
#
# **Predict**: which method needs more images, the one that learns pixels or the one with features from
# ImageNet?

# %%
steps = [n for n in (10, 40, 120) if n <= len(data.train)]
learners = ("mean_image", "pca", "padim")
learnt = {name: [] for name in learners}
for n in steps:
    for name in learners:
        config = fitted[name].config
        few = get_method(name)(config).fit(data.train[:n], data.calibration, seed=seed)
        few_scores = few.predict(fake[0]).image_score.numpy()
        learnt[name].append(metrics.image_metrics(fake[1], few_scores)["image_auroc"])

# %%
curves = {records.METHOD_NAMES[name]: values for name, values in learnt.items()}
axes = {"xlabel": "normal images in training", "ylabel": "image AUROC, planted"}
fig, _ = plots.show_curves(steps, curves, **axes, log="x", markers=True)
fig.axes[0].set_xticks(steps, steps)
fig.axes[0].minorticks_off()
gain = {name: values[-1] - values[0] for name, values in learnt.items()}
assert not checked or gain["pca"] > 0.04 > abs(gain["mean_image"])

# %% [markdown]
# *Figure: image AUROC on planted defects against the number of normal images that were learnt from; one draw each, so
# that small differences mean nothing.* PCA and PaDiM gain from more images. The mean image does not: what it lacks is
# not images. Make this curve with yours: if it still rises at its end, the cheapest improvement is a camera.
#
# ### With five images
#
# The package refuses, and says why:

# %%
five = scratch / "five"
five.mkdir()
for path in list_images(normal)[:5]:
    shutil.copyfile(path, five / path.name)
try:
    load_dataset("folder", root=five, image_size=image_size)
except ValueError as error:
    print(error)
else:
    raise AssertionError("five images were taken")

# %% [markdown]
# Five normal images are no training set, and less than a threshold. What can be done with them: look at the new
# images beside them; rank, without a threshold, by features from elsewhere (`padim` or `bank`, `fit` called as above,
# with at least five more images for calibration); and, best, take fifty more. A diffusion model of five images is
# those five images.
#
# ## What it costs
#
# Measured in this run, on this machine. One picture a second around the clock is 86,400 a day:

# %%
print(f"{'':26}{'training':>10}{'an image':>12}{'86,400 images':>16}")
for result in results:
    each = result["ms_per_image"]
    label = records.METHOD_NAMES[result["method"]]
    row = f"{result['train_seconds']:8.1f} s{each:9.1f} ms"
    print(f"{label:26}{row}{86_400 * each / 3.6e6:14.1f} h")
speeds = records.read_speeds(data_dir() / "results")  # of solar cells, in one run
for name in ("glad", "mdps") if speeds else ():
    times = np.median(speeds[name]["ms"]) / np.median(speeds["anoddpm"]["ms"])
    print(f"{records.METHOD_NAMES[name]}: {times:.0f} times AnoDDPM's time, on record")

# %% [markdown]
# *List: seconds in training loops, milliseconds to score an image (among few, so that start-up counts), and hours for
# a day's pictures; then two methods with many network evaluations an image ([04](04_glad.ipynb), [05](05_mdps.ipynb)),
# from the record of `make bench TOPICS=speed`.* Pixels cost with the square of the side.
#
# ## When not to use it
#
# - **The defect is known and there are many pictures of it.** Train a classifier or a segmentation network on them.
#   Learning from normal images alone is for what is rare or unknown.
# - **A rule says it better**: a length, a colour, a missing screw at a fixed place. Measure that.
# - **Normal is not stable**: each product differs, or wear is normal. Then difference from the training set is
#   no fault.
# - **The defect is below a pixel** at the size that you can afford, or outside the picture.
# - **Somebody is hurt by a miss.** An interval like those above, from your own defects, decides; a demonstration
#   does not. Nothing here is a medical device.
# - **PCA or PaDiM does as well.** Then take them: seconds to train, no noise to average, little to explain.

# %% [markdown]
# ## Paper, public code, ours
#
# | | papers and their public code | on a folder of your own |
# | --- | --- | --- |
# | test set | labelled, defects included | none; planted defects, later real ones |
# | measures | AUROC, AP, AUPRO; F1 at the best threshold, which test labels choose | a threshold from normal images; counts with intervals |
# | settings | often set for each category | the profile's; choose on planted development defects (`plant="development"`), if at all |
# | images | curated, aligned, one light | surveyed; `find_shifts` for every new batch |
# | AnoDDPM | 3,000 epochs of 100 images in its public configuration ([00](00_start_here.ipynb)) | minutes, with a budget |
# | maps of different images | scaled to each image's own range in some public codes ([06](06_bernoulli.ipynb)) | one scale |
# | export | MVTec's script reads `<category>/test/<defect>/<id>.tiff` | the same |

# %% [markdown]
# ## What did not work
#
# - **The survey on meaning**: it finds files that are odd, not parts that are. The defective cell passed, and so did
#   a copy saved as JPEG.
# - **A verdict on half a minute of diffusion**: it would be one on the machine. The list of differences above says what
#   it was worth here, on planted defects; on the real cells of this folder a second of PCA is hard to beat.
# - **Planted defects as a judge of methods**: they preferred ImageNet features, and the real cells did not. They were
#   also misleading when MDPS was set up ([data/README.md](../data/README.md) tells).
# - **Brightness as a friend**: real defects are darker here, so that even a mean grey value finds some, until the lamp
#   ages.
# - **Reproducing a budget**: seconds are not steps. A report from a budget cannot be repeated exactly elsewhere.

# %% [markdown]
# ## Exercises

# %% [markdown] tags=["exercise"]
# ### Exercise 10.1 ★
#
# Write `fewest(q)`: the smallest number $n$ of calibration images for which the rank $k = \lceil (n+1)\,q \rceil$
# exists, $k \le n$. (Beware of rounding: `0.95` is no exact number. `Fraction(str(q))` is, and `from fractions import
# Fraction` may stand in your cell; a loop that counts up will do, too.)


# %% tags=["solution"]
def fewest(q):
    # BEGIN SOLUTION
    n = 1
    while np.ceil(round((n + 1) * q, 9)) > n:
        n += 1
    return n
    # END SOLUTION


# %% tags=["check"]
assert [fewest(q) for q in (0.5, 0.9, 0.95, 0.99)] == [1, 9, 19, 99]
for q in (0.8, 0.95, 0.975):
    for n in (fewest(q) - 1, fewest(q)):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            conformal_threshold(np.arange(float(n)), q)
        assert bool(said) == (n < fewest(q)), (
            f"the package disagrees at n = {n}, q = {q}"
        )
print("right:", {q: fewest(q) for q in (0.9, 0.95, 0.99, 0.999)})

# %% [markdown] tags=["explain"]
# $\lceil (n+1)q \rceil \le n$ means $n \ge q/(1-q)$. One false alarm in a thousand needs 999 normal images that were
# not trained on, and then the largest of their scores is the threshold. A rare false alarm is expensive to promise.

# %% [markdown] tags=["exercise"]
# ### Exercise 10.2 ★★
#
# The survey finds copies by equal pixels. Write `near_copies(images, limit)`: the pairs `(i, j)`, $i < j$, of images
# (N, C, H, W) whose mean absolute difference is below `limit`, as a set. No image is a copy of itself.


# %% tags=["solution"]
def near_copies(images, limit):
    # BEGIN SOLUTION
    flat = images.flatten(1)
    distance = torch.cdist(flat, flat, p=1) / flat.shape[1]
    return {(i, j) for i, j in (distance < limit).nonzero().tolist() if i < j}
    # END SOLUTION


# %% tags=["check"]
cases = torch.zeros(4, 1, 2, 2)
cases[1], cases[2], cases[3, 0, 0, 0] = 0.5, 0.51, 0.04
assert near_copies(cases, 0.02) == {(0, 3), (1, 2)}, "the mean over all pixels"
assert near_copies(cases, 0.005) == set(), "below the limit, not at it"
paths = list_images(normal)
everything = read_images(paths, data.info["channels"], image_size, "squash")
pairs = near_copies(everything, 0.01)
print([(paths[i].name, paths[j].name) for i, j in sorted(pairs)])
assert not as_described or len(pairs) == 1

# %% [markdown] tags=["explain"]
# It compares all pairs at the small size, which forgives JPEG and a little noise, and costs $N^2$. For a hundred
# thousand images one would compare short codes of them instead. What the limit should be, the *smallest distances
# between images that you know to be different* say.

# %% [markdown] tags=["exercise"]
# ### Exercise 10.3 ★★
#
# Instead of a yes or no, give a **conformal p-value**: with $n$ calibration scores $s_i$, the p-value of a score $s$ is
#
# $$p = \frac{1 + \#\{i : s_i \ge s\}}{n + 1} .$$
#
# Write `p_value(scores, calibration)` for arrays of scores. Then $p \le 1 - q$ exactly when $s$ lies above the
# threshold (if its rank exists); the check tries it.


# %% tags=["solution"]
def p_value(scores, calibration):
    # BEGIN SOLUTION
    scores, calibration = np.asarray(scores), np.asarray(calibration)
    reached = (calibration[None, :] >= scores[:, None]).sum(1)
    return (1 + reached) / (len(calibration) + 1)
    # END SOLUTION


# %% tags=["check"]
assert np.allclose(p_value([0.5, 2.0, 9.0], [1.0, 2.0, 3.0]), [1.0, 0.75, 0.25])
calibration = pca.calibration_scores_
tested = pca.predict(data.test_images).image_score.numpy()
tested = np.concatenate([tested, calibration, calibration + 1e-3])
above = tested > conformal_threshold(calibration, 0.9)
assert ((p_value(tested, calibration) <= 0.1 + 1e-9) == above).all()
rng = np.random.default_rng(1)
p = np.concatenate([p_value(*np.split(rng.random(60), [20])) for _ in range(500)])
print({a: round(float((p <= a).mean()), 3) for a in (0.05, 0.1, 0.5)})
assert all((p <= a).mean() < a + 0.02 for a in (0.05, 0.1, 0.5)), (
    "too many small values"
)

# %% [markdown] tags=["explain"]
# A p-value needs no scale: 0.02 means the same for PCA and for PaDiM, which raw scores never do. It cannot be smaller
# than $1/(n+1)$, however bad the image. And it is no probability of a defect: that would need to know how often
# defects come.

# %% [markdown] tags=["exercise"]
# ### Exercise 10.4 ★★★
#
# From how many alarms on should somebody look at the line? If nothing has changed, each of $m$ new images is normal,
# and the number of alarms is binomial with the rate $R \sim \operatorname{Beta}(n+1-k, k)$, which is itself a matter of
# luck. Write `alarm_limit(m, n, k, chance)`: the smallest number $a$ such that $a$ *or more* alarms have a probability
# of at most `chance`; $m + 1$ if even $m$ alarms are more probable than that.


# %% tags=["solution"]
def alarm_limit(m, n, k, chance=0.01):
    # BEGIN SOLUTION
    alarms = np.arange(m + 2)
    or_more = stats.betabinom(m, n + 1 - k, k).sf(alarms - 1)  # sf: more than
    return int(alarms[or_more <= chance][0])
    # END SOLUTION


# %% tags=["check"]
assert alarm_limit(1, 40, 39, 0.05) == 1, "one image: an alarm has the chance 2 / 41"
assert alarm_limit(1, 40, 39, 0.01) == 2, "one image: no number is rare enough"
for m, n, k in ((40, 40, 39), (40, 120, 115), (200, 40, 39)):
    limit = alarm_limit(m, n, k, 0.01)
    each = stats.betabinom(m, n + 1 - k, k).pmf(np.arange(m + 1))
    or_more = each[::-1].cumsum()[::-1]  # from 0, from 1, ...
    assert or_more[limit] <= 0.01 < or_more[limit - 1], f"not {limit} of {m}, n = {n}"
    sure = stats.binom(m, 0.05).isf(0.01) + 1  # if the rate were 5 % for sure
    print(f"n = {n:3d}: {limit} of {m}; with a rate of 5 % for sure, {sure:.0f}")

# %% [markdown] tags=["explain"]
# A threshold from few images scatters, so that more alarms are needed before they mean something than a binomial with
# 5 % says; and the more new images share *one* threshold, the larger the difference. What has changed the count does
# not say: defects, or the light. Ask `find_shifts` first.

# %% [markdown]
# ## What we learned
#
# - Look at the folder before you train: copies, broken files, shapes, outliers. What is odd in *meaning* only a model
#   and a person find.
# - Choose the size by the narrowest defect.
# - A threshold from $n$ normal images promises a mean; one draw scatters, and its law is known.
# - Planted defects show that a pipeline works, and how small is too small. They do not choose the method.
# - A shift of light looks like a plague of defects to a method that sees brightness.
# - Export floats at the original size on one scale, and read them back.
# - Baselines first. They may be last, too.

# %% tags=["context"]
temporary.cleanup()

# %% [markdown]
# ## References
#
# - V. Vovk, A. Gammerman, G. Shafer: *Algorithmic Learning in a Random World*, Springer 2005 (conformal thresholds).
# - P. Bergmann et al.: *The MVTec Anomaly Detection Dataset: A Comprehensive Real-World Dataset for Unsupervised
#   Anomaly Detection*, International Journal of Computer Vision 129, 2021 (layout, AUPRO).
# - J. Wyatt et al.: *AnoDDPM: Anomaly Detection with Denoising Diffusion Probabilistic Models using Simplex Noise*,
#   CVPR Workshops 2022.
# - T. Defard et al.: *PaDiM: a Patch Distribution Modeling Framework for Anomaly Detection and Localization*, ICPR
#   Workshops 2021.
# - Cells: ELPV, S. Deitsch et al.: *Automatic classification of defective photovoltaic module cells in
#   electroluminescence images*, Solar Energy 185, 2019, [doi
#   10.1016/j.solener.2019.02.067](https://doi.org/10.1016/j.solener.2019.02.067), CC BY-NC-SA 4.0.
