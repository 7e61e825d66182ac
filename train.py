"""Train the Vision Transformers of mpvg.py on images: one run, a sweep over methods and seeds, the paper's figures.

    python train.py --pe layerwise --pool gap --mpvg              # the paper's method, as plain `python train.py`
    python train.py --method lape --data cifar100                 # another row of the paper, by its name
    python train.py sweep --methods default,lape,pvg,mpvg --seeds 3
    python train.py eval runs/NAME;  python train.py report runs/*/

A run is a function of its flags and seed; one that was killed goes on with --resume. The data set `numbers` is built
in: nothing to download, a few minutes on a CPU.
"""
import copy
import ctypes
import inspect
import itertools
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Literal

import torch
import torch.nn.functional as F
import torchvision
import typer
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.v2 import functional as v2
from tqdm import tqdm

from mpvg import METHODS, MODELS, ViT, create, fold, load_weights, read_checkpoint

# What a flag is where it is not given. cifar100: ViT-Lite's recipe, from Compact-Transformers' cifar100.yml.
RECIPES = {
    "numbers": dict(model="vit-nano", epochs=6, batch_size=128, lr=2e-3, min_lr=1e-5, warmup_lr=1e-6, warmup_epochs=0.6,
                    cooldown_epochs=0, lr_per="step", weight_decay=0.05, decay_pe=False, label_smoothing=0.0,
                    crop_scale=1.0, flip=0.0, ra_ops=0, ra_magnitude=9.0, mixup=0.0, cutmix=0.0, erase=0.0),
    "cifar100": dict(model="vit-lite", epochs=310, batch_size=128, lr=6e-4, min_lr=1e-5, warmup_lr=1e-6,
                     warmup_epochs=10.0, cooldown_epochs=10, lr_per="epoch", weight_decay=0.06, decay_pe=True,
                     label_smoothing=0.1, crop_scale=0.8, flip=0.5, ra_ops=2, ra_magnitude=9.0, mixup=0.8, cutmix=1.0,
                     erase=0.25),
}
PIXELS = {"numbers": ((0.5, 0.5, 0.5), (0.3, 0.3, 0.3)),             # mean and std per channel, of values from 0 to 1
          "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))}
# Which row of METHODS the paper's three flags name: (--pe, --pool, --mpvg).
ROWS = {
    ("absolute", "cls", False): "default", ("absolute", "gap", False): "gap", ("absolute", "gap", True): "gap-last-pe",
    ("layerwise", "cls", False): "lape", ("layerwise", "gap", False): "pvg", ("layerwise", "gap", True): "mpvg",
    ("none", "cls", False): "default", ("none", "gap", False): "gap",
}
# The rows that belong together, each as flags; {a}, {b}, {c}: blocks at 1/2, 3/4 and the end of the depth.
SETS = {
    "fig1": ["default", "lape", "gap", "lape-gap", "mpvg"],          # layer-wise PE: class token against GAP
    "fig5": ["gap", "gap-last-pe", "pvg", "mpvg"],                   # the last PE without the layer-wise one
    "table5": ["pvg", "mpvg --last-pe {c}", "mpvg --last-pe {b}", "mpvg --last-pe {a}", "mpvg"],
    "table6": ["mpvg", "mpvg --no-hierarchical", "mpvg --layer0", "mpvg --no-add-input"],
    "controls": ["pvg", "mpvg", "mpvg-free", "mpvg-shift"],          # ours: is it position?
}
PAPER = {  # top-1 %, one run each: Tables 1, 2, 5 and 6, Figures 1 and 5
    ("vit-lite", "cifar100"): {"default": 74.90, "lape": 75.52, "pvg": 76.67, "mpvg": 76.87},
    ("deit-tiny", "imagenet"): {
        "default": 72.14, "lape": 72.94, "gap": 72.40, "lape-gap": 72.24, "gap-last-pe": 72.14, "pvg": 73.17,
        "mpvg": 73.51, "mpvg-last_pe=11": 73.30, "mpvg-last_pe=8": 73.38, "mpvg-last_pe=5": 73.39,
        "mpvg-hierarchical=False": 73.31, "mpvg-layer0=True": 73.48, "mpvg-add_input=False": 73.28},
    ("deit-small", "imagenet"): {"default": 79.81, "lape": 80.39, "pvg": 80.38, "mpvg": 80.61},
    ("deit-base", "imagenet"): {"default": 81.85, "lape": 82.15, "pvg": 82.21, "mpvg": 82.42},
}


def fail(message):
    """Ends the program with one line on stderr and exit code 2."""
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(2)


# ---------------------------------------------------------------------------------------------------------------- data

def numbers(count, seed):
    """-> uint8 images (count, 3, 32, 32) of the two-digit numbers 00 to 99 and labels (count,), the same for a seed.

    Turned by up to 9 degrees, scaled by 0.8 to 1.1, moved by up to 3.5 pixels, dark on light or light on dark, noisy.
    Telling 12 from 21 takes position, and so does putting a digit together from its pieces in several patches.
    """
    font = ImageFont.load_default(size=26)
    masks = torch.zeros(100, 1, 32, 32)
    for number in range(100):
        mask = Image.new("L", (32, 32))
        ImageDraw.Draw(mask).text((16, 16), f"{number:02d}", fill=255, font=font, anchor="mm")
        masks[number, 0] = torch.frombuffer(bytearray(mask.tobytes()), dtype=torch.uint8).view(32, 32) / 255

    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    labels = torch.randperm(count, generator=generator) % 100
    angle, scale = uniform(-0.16, 0.16), uniform(0.8, 1.1)
    shift_x, shift_y = uniform(-0.12, 0.12), uniform(-0.2, 0.2)      # of half the side
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale    # the inverse map: output place -> input place
    theta = torch.stack([cos, -sin, shift_x, sin, cos, shift_y], dim=1).view(count, 2, 3)
    grid = F.affine_grid(theta, (count, 1, 32, 32), align_corners=False)
    mask = F.grid_sample(masks[labels], grid, align_corners=False)   # (count, 1, 32, 32)
    dark, light = uniform(0.0, 0.4, 3, 1, 1), uniform(0.6, 1.0, 3, 1, 1)
    swap = uniform(0, 1, 1, 1, 1) < 0.5
    ink, paper = torch.where(swap, dark, light), torch.where(swap, light, dark)
    images = paper + (ink - paper) * mask + 0.18 * torch.randn(count, 3, 32, 32, generator=generator)
    return (images.clamp(0, 1) * 255).to(torch.uint8), labels


def cifar100(root, train):
    """-> uint8 images (N, 3, 32, 32) and labels (N,); downloads what is not in `root`."""
    try:
        data = torchvision.datasets.CIFAR100(root, train=train, download=True)
    except (OSError, RuntimeError) as error:
        fail(f"CIFAR-100 is not complete in {root} and could not be downloaded ({error}): put its folder "
             "cifar-100-python there, or train on --data numbers")
    return torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(data.targets)


def load_data(name, root, fraction=1.0, seed=0):
    """-> {"train": (images, labels), "test": ...}; of the training images `fraction` of each class, chosen by seed."""
    if name == "numbers":
        data = {"train": numbers(30_000, seed=1), "test": numbers(4_000, seed=2)}
    else:
        data = {split: cifar100(root, train=split == "train") for split in ("train", "test")}
    if fraction < 1:
        images, labels = data["train"]
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        places = [order[labels[order] == label] for label in labels.unique()]
        rows = torch.cat([rows[:round(fraction * len(rows))] for rows in places])
        data["train"] = images[rows], labels[rows]
    return data


# -------------------------------------------------------------------------------------------------------- augmentation
# Pillow's arithmetic for batches of uint8 images (B, 3, H, W), every image with parameters of its own, tensors (B,).

def sample(x, grid, bicubic):
    """x at grid (B, H, W, 2), places (u, v) from -1 to 1, by bicubic or linear interpolation; the border goes on."""
    y = torch.empty(x.shape, device=x.device)
    for rows, mode in ((bicubic, "bicubic"), (~bicubic, "bilinear")):
        y[rows] = F.grid_sample(x[rows].float(), grid[rows], mode, "border", align_corners=False)
    return y.clamp(0, 255)


def warp(x, bicubic, fill, a=1.0, b=0.0, c=0.0, d=0.0, e=1.0, f=0.0):
    """The output at (u, v), from -1 to 1, is the input at (a u + b v + c, d u + e v + f), or `fill` (3,) outside."""
    matrix = torch.stack([torch.as_tensor(t, device=x.device).expand(len(x)) for t in (a, b, c, d, e, f)], dim=1)
    grid = F.affine_grid(matrix.view(-1, 2, 3), x.shape, align_corners=False)
    inside = ((grid >= -1) & (grid < 1)).all(-1)[:, None]
    return torch.where(inside, sample(x, grid, bicubic), fill.view(3, 1, 1)).to(torch.uint8)


def resized_crop(x, box, bicubic, flip):
    """The boxes (B, 4), top, left, height and width in pixels, enlarged to the whole image, mirrored where `flip`."""
    lines = []
    for axis, n in enumerate(x.shape[2:]):
        start, size = box[:, axis, None], box[:, axis + 2, None]
        place = (torch.arange(n, device=x.device) + 0.5) / n * size
        place = start + place.clamp(min=0.5).minimum(size - 0.5)     # past the box's border its last pixel goes on
        lines.append(place * 2 / n - 1)
    v, u = lines[0], torch.where(flip[:, None], lines[1].flip(1), lines[1])
    grid = torch.stack(torch.broadcast_tensors(u[:, None], v[..., None]), dim=-1)        # (B, H, W, 2)
    return sample(x, grid, bicubic).round().to(torch.uint8)


def blend(base, x, m, s):
    """1 +- 0.09 m of x, the rest `base`."""
    factor, base = (1 + 0.09 * m * s).clamp(min=0.1).view(-1, 1, 1, 1), base.float()
    return (base + factor * (x - base)).clamp(0, 255).to(torch.uint8)


# RandAugment `rand-m9-mstd0.5-inc1` of timm: square images x, magnitude m from 0 to 10, sign s (B,), and how to warp.
OPERATIONS = {
    "AutoContrast": lambda x, m, s, warp: v2.autocontrast(x),
    "Equalize": lambda x, m, s, warp: v2.equalize(x),
    "Invert": lambda x, m, s, warp: 255 - x,
    "Rotate": lambda x, m, s, warp: warp(x, a=(t := (3 * m * s).deg2rad()).cos(), b=-t.sin(), d=t.sin(), e=t.cos()),
    "Posterize": lambda x, m, s, warp: x & (-1 << (4 + (0.4 * m).int())).view(-1, 1, 1, 1).to(torch.uint8),
    "Solarize": lambda x, m, s, warp: torch.where(x < 256 - (25.6 * m).int().view(-1, 1, 1, 1), x, 255 - x),
    "SolarizeAdd": lambda x, m, s, warp: torch.where(
        x < 128, x + (11 * m).int().view(-1, 1, 1, 1), x).clamp(max=255).to(torch.uint8),
    "Color": lambda x, m, s, warp: blend(v2.rgb_to_grayscale(x), x, m, s),
    "Contrast": lambda x, m, s, warp: blend(v2.rgb_to_grayscale(x).float().mean((2, 3), keepdim=True).round(), x, m, s),
    "Brightness": lambda x, m, s, warp: blend(torch.zeros_like(x), x, m, s),
    "Sharpness": lambda x, m, s, warp: blend(v2.adjust_sharpness(x, 0.0), x, m, s),
    "ShearX": lambda x, m, s, warp: warp(x, b=0.03 * m * s, c=0.03 * m * s),
    "ShearY": lambda x, m, s, warp: warp(x, d=0.03 * m * s, f=0.03 * m * s),
    "TranslateX": lambda x, m, s, warp: warp(x, c=0.09 * m * s),
    "TranslateY": lambda x, m, s, warp: warp(x, f=0.09 * m * s),
}


def draw_boxes(count, height, width, area, ratio, whole):
    """-> (count, 4) top, left, height, width: of ten boxes the first that fits, zeros where none does.

    area: least and greatest share of the image, uniform; ratio: the greatest of the sides, log-uniform both ways;
    whole: may a side be as long as the image's.
    """
    u = torch.rand(4, 10, count)
    size, ratio = height * width * (area[0] + (area[1] - area[0]) * u[0]), ratio ** (2 * u[1] - 1)
    h, w = (size * ratio).sqrt().round(), (size / ratio).sqrt().round()
    fits = (h < height + whole) & (w < width + whole)
    boxes = torch.stack([((height - h + 1) * u[2]).floor(), ((width - w + 1) * u[3]).floor(), h, w], dim=-1)
    return (boxes * fits[..., None])[fits.int().argmax(0), torch.arange(count)]


def box_mask(box, height, width):
    """Boxes (B, 4) -> (B, height, width), True inside."""
    v, u = torch.arange(height, device=box.device)[:, None], torch.arange(width, device=box.device)
    top, left, h, w = (t.view(-1, 1, 1) for t in box.unbind(1))
    return (v >= top) & (v < top + h) & (u >= left) & (u < left + w)


def draw_images(count, height, width, recipe):
    """-> what happens to each of `count` images, drawn on the CPU: the same whatever the device."""
    crop = draw_boxes(count, height, width, (recipe["crop_scale"], 1.0), 4 / 3, whole=True)
    crop[(crop[:, 2] == 0) | (recipe["crop_scale"] == 1)] = torch.tensor([0.0, 0.0, height, width])
    shape = count, recipe["ra_ops"]
    return dict(
        crop=crop, crop_bicubic=torch.rand(count) < 0.5, flip=torch.rand(count) < recipe["flip"],
        operation=torch.where(torch.rand(shape) < 0.5, torch.randint(len(OPERATIONS), shape), -1),  # -1: not applied
        magnitude=(recipe["ra_magnitude"] + 0.5 * torch.randn(shape)).clamp(0, 10),
        sign=torch.where(torch.rand(shape) < 0.5, -1.0, 1.0), bicubic=torch.rand(shape) < 0.5,
        erase=draw_boxes(count, height, width, (0.02, 1 / 3), 1 / 0.3, whole=False)
        * (torch.rand(count, 1) < recipe["erase"]))


def draw_mixing(steps, height, width, recipe):
    """-> (steps, height, width): how much of its own pixels an image keeps: mixup's lambda, or 0 in CutMix's box."""
    mixup, cutmix = recipe["mixup"], recipe["cutmix"]
    cut = torch.rand(steps) < (0.5 if mixup and cutmix else float(cutmix > 0))
    lam = torch.where(cut, *(torch.distributions.Beta(a or 1.0, a or 1.0).sample((steps,)) for a in (cutmix, mixup)))
    sides = torch.tensor([height, width])
    half = (sides * (1 - lam).sqrt()[:, None]).floor() // 2          # an odd side loses a pixel, as in that timm
    middle = (torch.rand(steps, 2) * sides).floor()
    low, high = (middle - half).clamp(min=0), torch.minimum(middle + half, sides)
    outside = ~box_mask(torch.cat([low, high - low], dim=1), height, width)
    return torch.where(cut.view(-1, 1, 1), outside.float(), lam.view(-1, 1, 1))


def augment(x, draws, recipe, fill):
    """uint8 (B, 3, H, W) -> the same: random resized crop, flip, RandAugment. `fill` (3,): colour of empty places."""
    if recipe["crop_scale"] < 1 or recipe["flip"] > 0:
        x = resized_crop(x, draws["crop"], draws["crop_bicubic"], draws["flip"])
    for operation, m, s, bicubic in zip(*(draws[key].T for key in ("operation", "magnitude", "sign", "bicubic"))):
        for number, apply in enumerate(OPERATIONS.values()):
            rows = (operation == number).nonzero()[:, 0]
            if len(rows):
                x[rows] = apply(x[rows], m[rows], s[rows], partial(warp, bicubic=bicubic[rows], fill=fill))
    return x


def normalise(x, data):
    """uint8 or float images (B, 3, H, W), pixels from 0 to 255 -> floats by the data set's mean and deviation."""
    return v2.normalize(x / 255, *PIXELS[data], inplace=True)


def prepare(x, y, draws, keep, recipe, classes, seed):
    """Makes the batches of several steps at once, so that augmentation costs little beside them.

    x: uint8 (S, B, 3, H, W); y: labels (S, B); draws: draw_images of the S * B; keep: draw_mixing of the S, or None.
    -> normalised images, and labels, or with mixing each label's share (S, B, classes). An image's partner is the one
    at its place in the flipped batch; erasing, by noise, comes last.
    """
    draws, shape = {name: value.to(x.device) for name, value in draws.items()}, x.shape
    fill = (255 * torch.tensor(PIXELS[recipe["data"]][0], device=x.device)).round()
    x = augment(x.flatten(0, 1), draws, recipe, fill).view(shape)
    if keep is not None:
        keep = keep.to(x.device)[:, None, None]                      # (S, 1, 1, H, W)
        x = torch.lerp(x.flip(1).float(), x.float(), keep).round()
        share, y = keep.mean((2, 3, 4))[..., None], F.one_hot(y, classes).float()
        y = share * y + (1 - share) * y.flip(1)
    x = normalise(x, recipe["data"]).flatten(0, 1)
    rows = (draws["erase"][:, 2] > 0).nonzero()[:, 0]
    noise = torch.randn(len(rows), *shape[2:], generator=torch.Generator(x.device).manual_seed(seed), device=x.device)
    x[rows] = torch.where(box_mask(draws["erase"][rows], *shape[3:])[:, None], noise, x[rows])
    return x.view(shape), y


# ------------------------------------------------------------------------------------------------------------ training

def lr_at(epoch, *, epochs, warmup_epochs, cooldown_epochs, lr, min_lr, warmup_lr):
    """Learning rate after `epoch` epochs, fractions too: linear warm-up, cosine to min_lr, cool-down at min_lr."""
    warmup_lr, min_lr = min(warmup_lr, lr), min(min_lr, lr)          # lr is the peak, however small
    if epoch < warmup_epochs:
        return warmup_lr + (lr - warmup_lr) * epoch / warmup_epochs
    return min_lr + 0.5 * (lr - min_lr) * (1 + math.cos(math.pi * min(epoch / (epochs - cooldown_epochs), 1)))


def parameter_groups(model, weight_decay, decay_pe):
    """Two groups for AdamW: matrices decay, biases and norms do not; PE tables and the class token only if asked."""
    groups = {True: [], False: []}
    for name, parameter in model.named_parameters():
        is_pe = name in ("pos_embed", "last_pos_embed", "cls_token")
        if parameter.requires_grad:
            groups[parameter.ndim > 1 and (decay_pe or not is_pe)].append(parameter)
    return [dict(params=groups[True], weight_decay=weight_decay), dict(params=groups[False], weight_decay=0.0)]


def step_functions(model, config, device):
    """-> loss(images, labels or their shares) of a training step, and predict(images) -> float logits."""
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=config["precision"] == "bf16")

    def loss(x, y):
        with autocast():
            logits = model(x)
        return F.cross_entropy(logits.float(), y, label_smoothing=config["label_smoothing"])

    def predict(x):
        with autocast():
            return model(x).float()

    if config["compile"] == "off":
        return loss, predict
    strictly = dict(fullgraph=True, dynamic=False)                   # a graph break is an error
    torch._inductor.config.triton.cudagraph_or_error = config["compile"] == "graphs"  # else they are skipped silently
    return (torch.compile(loss, **strictly, mode="reduce-overhead" if config["compile"] == "graphs" else None),
            torch.compile(predict, **strictly))


@torch.no_grad()
def evaluate(predict, images, labels, data, device, batch_size=500, stopped=()):
    """-> (accuracy in percent, mean cross entropy) over all images, or None once something is in `stopped`."""
    batch_size, hits, loss = min(batch_size, len(images)), 0, 0
    for x, y in zip(images.split(batch_size), labels.split(batch_size)):
        if stopped:
            return None
        x, y = F.pad(x, (0, 0) * 3 + (0, batch_size - len(x))).to(device), y.to(device)  # constant shapes
        logits = predict(normalise(x, data))[:len(y)]
        hits, loss = hits + (logits.argmax(1) == y).sum(), loss + F.cross_entropy(logits, y, reduction="sum")
    return 100 * hits.item() / len(labels), loss.item() / len(labels)


def save(path, contents):
    """Writes text or a checkpoint whole or not at all: to a temporary file, flushed, then renamed."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(contents.encode()) if isinstance(contents, str) else torch.save(contents, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:                         # torch.save turns a full disk into the latter
        temporary.unlink(missing_ok=True)
        fail(f"{path} cannot be written ({error}): free the disk or choose another --runs; what was there is whole")


def save_record(folder, config, log):
    save(folder / "config.json", json.dumps(config, indent=2) + "\n")
    save(folder / "log.jsonl", "".join(json.dumps(line) + "\n" for line in log))


def make_folder(path, option):
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"cannot write to {path} ({error}): choose another {option}")


@contextmanager
def stop_signals():
    """Collects Ctrl-C and SIGTERM in a list, so that the step in hand can end; a second Ctrl-C ends at once."""
    received = []

    def note(number, _):
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(signal.Signals(number).name)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train_run(config, model, split, folder, device, saved=None):
    """Trains, and writes the folder at the end of every epoch; `saved`: the checkpoint of last.pt to go on from."""
    images, labels = split["train"]
    epochs, size, cuda = config["epochs"], config["batch_size"], device.type == "cuda"
    steps = len(images) // size                                      # an epoch's; the last, smaller batch is left out
    optimizer = torch.optim.AdamW(parameter_groups(model, config["weight_decay"], config["decay_pe"]), fused=True)
    schedule = {key: config[key] for key in ("epochs", "warmup_epochs", "cooldown_epochs", "lr", "min_lr", "warmup_lr")}
    loss_of, predict = step_functions(model, config, device)
    classes, mixing = model.head.out_features, config["mixup"] > 0 or config["cutmix"] > 0
    if config["compile"] != "off":                                   # before the clock starts
        x = torch.zeros(size, *images.shape[1:], device=device)
        y = torch.zeros((size, classes) if mixing else size, dtype=torch.float if mixing else torch.long, device=device)
        begin = time.perf_counter()
        with torch.random.fork_rng(devices=[device] if cuda else []):
            loss_of(x, y).backward()
        optimizer.zero_grad()
        typer.echo(f"compiled  in {time.perf_counter() - begin:.0f} s")
    losses = torch.zeros(steps, device=device)
    log, best, epoch, done, seconds = [], dict(epoch=0, test_accuracy=-1.0), 0, 0, 0.0  # done: steps of this epoch
    if saved:
        load_weights(model, saved)
        optimizer.load_state_dict(saved["optimizer"])
        log, best, epoch, done, seconds = (saved[key] for key in ("log", "best", "epoch", "step", "seconds"))
        losses[:done] = saved["losses"].to(device)
        torch.set_rng_state(saved["rng"])
        if saved["device_rng"] is not None and device.type == saved["config"]["environment"]["device"].split(":")[0]:
            torch.get_device_module(device).set_rng_state(saved["device_rng"])
    start = time.perf_counter() - seconds

    def check():
        wrong = (~losses[:done].isfinite()).nonzero()
        if len(wrong) or not torch.stack([p.isfinite().all() for p in model.parameters()]).all():
            at = wrong[0].item() + 1 if len(wrong) else done
            kept = f"last.pt is of epoch {log[-1]['epoch']}" if log else "nothing was saved yet"
            fail(f"the loss is not finite at step {at} of epoch {epoch + 1}: --overwrite with a lower --lr ({kept})")

    def write(first):
        check()
        contents = dict(model=model.state_dict(), config=config, epoch=epoch, best=best, log=log)
        if log and best["epoch"] == epoch and done == 0:
            save(folder / "best.pt", contents)
        save(folder / "last.pt", dict(
            contents, step=done, optimizer=optimizer.state_dict(), losses=losses[:done].cpu(),
            seconds=time.perf_counter() - start, rng=torch.get_rng_state(),
            device_rng=None if device.type == "cpu" else torch.get_device_module(device).get_rng_state()))
        if first:                                                    # only now: here may be the run to overwrite
            for name in ["log.jsonl"] + ["best.pt"] * (not log):
                (folder / name).unlink(missing_ok=True)
        save_record(folder, config, log)

    typer.echo("\nepoch      loss   test %         lr   images/s   seconds")
    bar = tqdm(total=epochs * steps * size, initial=(epoch * steps + done) * size, unit="image", unit_scale=True,
               disable=None)                                         # silent without a terminal
    with bar, stop_signals() as stopped:
        while epoch < epochs:
            epoch_done, epoch_start = done, time.perf_counter()
            shown = epoch_start
            with torch.random.fork_rng(devices=[]):                  # all that is random about the epoch's images
                torch.default_generator.manual_seed(config["seed"] * 100_003 + epoch)  # the CPU's, no other
                order = torch.randperm(len(images))[:steps * size].view(steps, size)
                draws = draw_images(steps * size, *images.shape[2:], config)
                keep = draw_mixing(steps, *images.shape[2:], config) if mixing else None
                noise = torch.randint(2**62, (steps,)).tolist()
            chunk = steps if cuda else max(1, 2048 // size)          # steps whose batches are made at once
            while done < steps and not stopped:
                first = done // chunk * chunk
                part, rows = slice(first, first + chunk), slice(first * size, (first + chunk) * size)
                chosen = order[part].to(images.device)
                x, y = prepare(images[chosen], labels[chosen], {name: value[rows] for name, value in draws.items()},
                               keep[part] if mixing else None, config, classes, noise[first])
                for i in range(done - first, len(x)):
                    lr = lr_at(epoch if config["lr_per"] == "epoch" else epoch + done / steps, **schedule)
                    for group in optimizer.param_groups:
                        group["lr"] = lr
                    if config["compile"] == "graphs":
                        torch.compiler.cudagraph_mark_step_begin()
                    loss = loss_of(x[i].to(device), y[i].to(device))
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    losses[done] = loss.detach()
                    done += 1
                    bar.update(size)
                    if stopped:
                        break
                    if time.perf_counter() > shown + 1:              # reading a loss waits for the device: seldom
                        check()
                        bar.set_postfix(loss=f"{losses[done - 1].item():.3f}", lr=f"{lr:.2e}", refresh=False)
                        shown = time.perf_counter()
                del x, y                                             # before the next ones are made
            check()
            speed = (done - epoch_done) * size / (time.perf_counter() - epoch_start)
            model.eval()
            result = evaluate(predict, *split["test"], config["data"], device, stopped=stopped)
            model.train()
            if result is None:
                write(first=not saved and not log)
                bar.close()
                typer.echo(f"stopped by {stopped[0]} after step {done} of {steps} of epoch {epoch + 1}: saved; the "
                           "same command with --resume goes on")
                raise typer.Exit(128 + signal.Signals[stopped[0]])
            epoch, done = epoch + 1, 0
            log.append(dict(epoch=epoch, loss=losses.mean().item(), test_loss=result[1], test_accuracy=result[0],
                            lr=optimizer.param_groups[0]["lr"], images_per_second=speed,
                            seconds=time.perf_counter() - start))
            if result[0] > best["test_accuracy"]:
                best = dict(epoch=epoch, test_accuracy=result[0])
            write(first=not saved and len(log) == 1)
            bar.write("{epoch:>5} {loss:>9.4f} {test_accuracy:>8.2f} {lr:>10.2e} {images_per_second:>10,.0f} "
                      "{seconds:>9.0f}".format(**log[-1]))
    return log, best


# -------------------------------------------------------------------------------------------------------- command line

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def accelerator():
    """-> "cuda", "mps", ... or None where there is only a CPU."""
    return torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else None


def flag(panel, text, *names, value=None, of=None, **limits):
    """An option. `of`: what --help shows for a value of None: words, or an entry of RECIPES."""
    if of in RECIPES["numbers"]:
        of = ", ".join(f"{data} {recipe[of]}" for data, recipe in RECIPES.items())
    return typer.Option(value, *names, help=text, rich_help_panel=panel, show_default=of or True, **limits)


def keep_freed_memory():
    """Tells glibc's malloc to keep what is freed. By default it returns large blocks to the system, which hands them
    out again page by page: up to a quarter of a step or nothing, as the heap may lie (results/bench-notes.md)."""
    if platform.libc_ver()[0] == "glibc":
        libc, trim_threshold, mmap_max = ctypes.CDLL(None), -1, -4   # mallopt's numbers for them
        libc.mallopt(trim_threshold, -1)                             # never trim
        libc.mallopt(mmap_max, 0)                                    # no block is a mapping of its own


def usable_device(name):
    """-> torch.device of --device; auto is an accelerator where there is one."""
    name = (accelerator() or "cpu") if name == "auto" else name
    if name.split(":")[0] not in ("cpu", "cuda", "mps", "xpu"):
        fail(f"unknown --device {name!r}: choose from auto, cpu, cuda, mps, xpu")
    try:
        device = torch.zeros(1, device=name).device
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if device.type == "cpu":
            keep_freed_memory()
        return device
    except (RuntimeError, AssertionError) as error:                  # torch without CUDA asserts
        fail(f"--device {name} cannot be used here, try --device cpu ({str(error).splitlines()[0]})")


def configure(flags):
    """Flags (None: not given) -> the run's configuration, plain values that decide all but where it runs."""
    data, method, cuda = flags["data"], flags["method"], usable_device(flags["device"]).type == "cuda"
    data = data or ("cifar100" if accelerator() else "numbers")
    if data == "imagenet":
        fail("--data imagenet cannot be trained by this version: use --data cifar100 or --data numbers")
    row = pe, pool, mpvg = flags["pe"], flags["pool"], flags["mpvg"]
    if method is not None and any(row):
        fail("--method names a whole row: leave out --pe, --pool and --mpvg, or --method")
    if method is None:
        row = (pe or "layerwise", pool or "gap", mpvg or not any(row))
        method = ROWS.get(row) or fail(f"--mpvg needs a PE and --pool gap, not --pe {row[0]} --pool {row[1]}")
    elif method not in METHODS:
        fail(f"unknown method {method!r}: choose from {', '.join(METHODS)}")
    overrides = {key: flags[key] for key in ("last_pe", "layer0", "hierarchical", "add_input", "pe_init")}
    overrides |= dict(pe="none" if pe == "none" else None)
    overrides = {key: value for key, value in overrides.items() if value is not None}
    if "last_pe" in overrides:
        word = overrides["last_pe"]
        overrides["last_pe"] = None if word == "none" else int(word) if word.isdecimal() else word
    row = {name: p.default for name, p in inspect.signature(ViT).parameters.items()} | METHODS[method]
    overrides = {key: value for key, value in overrides.items() if repr(value) != repr(row[key])}

    recipe = RECIPES[data] | {key: flags[key] for key in RECIPES[data] if flags[key] is not None}
    for key in ("warmup_epochs", "cooldown_epochs"):                 # short runs warm up and cool down shortly
        if flags[key] is None:
            recipe[key] = type(recipe[key])(min(recipe[key], recipe["epochs"] / 10))
    if MODELS.get(recipe["model"], dict(image_size=32)).get("image_size") != 32:
        fail(f"{recipe['model']} takes images of 224x224, {data} has 32x32: use vit-lite or vit-nano")
    if recipe["warmup_epochs"] + recipe["cooldown_epochs"] >= recipe["epochs"]:
        fail("--warmup-epochs and --cooldown-epochs leave nothing of --epochs {epochs}: lower them".format(**recipe))
    if flags["resume"] and flags["overwrite"]:
        fail("--resume goes on with a run and --overwrite replaces it: give one")
    if flags["compile"] == "graphs" and not cuda:
        fail("--compile graphs needs CUDA: use --compile on, or off")
    if flags["freeze"] and not flags["init"]:
        fail("--freeze trains the head alone: --init says which weights it keeps")
    config = dict(data=data, method=method, overrides=overrides, seed=flags["seed"], **recipe)
    config |= {key: flags[key] for key in ("drop_path", "attn_drop", "fraction", "freeze")}
    config |= dict(init=str(flags["init"]) if flags["init"] else None,
                   precision=flags["precision"] or ("bf16" if cuda else "fp32"),
                   compile=flags["compile"] or ("on" if cuda else "off"))
    for key, value in config.items():
        if isinstance(value, float) and not math.isfinite(value):
            fail(f"--{key.replace('_', '-')} must be a finite number")
    return config


def label(config):
    return "-".join([config["method"], *(f"{key}={value}" for key, value in config["overrides"].items())])


def run_folder(flags, config):
    name = flags["name"]
    if name is None:
        name = f"{label(config)}-{config['model']}-{config['data']}-seed{config['seed']}"
    if Path(name).name != name or name in ("", "..") or len(name) > 200:
        fail(f"--name {name!r} is not the name of one folder: --runs says where it goes")
    return Path(flags["runs"]) / name


def build(config, **changes):
    """-> the configuration's model; a combination that cannot be ends the program."""
    noise = {key: config[key] for key in ("drop_path", "attn_drop") if config[key] is not None}
    try:
        return create(config["model"], config["method"], **config["overrides"], **noise, **changes)
    except ValueError as error:
        fail(error)


def environment(device):
    """Where a run runs: plain values, which --resume may change."""
    git = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        git = subprocess.run(git, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip() or None
    except OSError:                                                  # no git here
        git = None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return dict(device=str(device), device_name=name, threads=torch.get_num_threads(), torch=str(torch.__version__),
                torchvision=torchvision.__version__, python=platform.python_version(), git=git)


def given_flags(ctx):
    return [key.replace("_", "-") for key in ctx.params if ctx.get_parameter_source(key).name != "DEFAULT"]


def read(path):
    """-> what train_run has saved there, plain types and tensors."""
    try:
        saved = read_checkpoint(path)
    except OSError as error:
        fail(f"{path} cannot be read ({error.strerror})")
    except ValueError:
        fail(f"{path} is damaged, or no checkpoint: best.pt beside it may be whole, --overwrite trains again")
    keys = {"model", "config", "log"} | ({"step", "optimizer"} if path.name == "last.pt" else set())
    if not isinstance(saved, dict) or not keys <= saved.keys():
        fail(f"{path} is no checkpoint of this train.py; weights alone load with --init, or mpvg.load_weights")
    return saved


def checkpoint_of(path):
    return path / "last.pt" if path.is_dir() else path


@app.callback(invoke_without_command=True)
def train(
    ctx: typer.Context,
    pe: Literal["absolute", "layerwise", "none"] | None = flag(
        "Method", "Position embedding: added once, delivered to every block, or none.", of="layerwise"),
    pool: Literal["cls", "gap"] | None = flag("Method", "Class token or global average pooling.", of="gap"),
    mpvg: bool = flag("Method", "Add the initial PE, through its own LayerNorm, to the last norm's output. Without "
                      "--pe, --pool and --method this is on.", "--mpvg", value=False),
    method: str | None = flag("Method", f"A row by name, instead of --pe, --pool, --mpvg: {', '.join(METHODS)}."),
    last_pe: str | None = flag("Method", "What joins the last norm's output: none, 0 (the initial PE), a block's "
                               "number (its PE; Table 5), shift, free.", of="the row's"),
    layer0: bool | None = flag("Method", "Is block 0 given a PE, too? (Table 6)", of="the row's"),
    hierarchical: bool | None = flag("Method", "Is a block's PE made from the one before?", of="the row's"),
    add_input: bool | None = flag("Method", "Is the PE added to the tokens before block 0?", of="the row's"),
    pe_init: Literal["learned", "sincos"] | None = flag("Method", "sincos: a fixed table.", of="learned"),
    model: str | None = flag("Method", f"One of {', '.join(MODELS)}.", of="model"),
    data: Literal["numbers", "cifar100", "imagenet"] | None = flag(
        "Data", "numbers: built in, drawn in seconds. cifar100: downloaded where absent. imagenet: later.",
        of="cifar100 with an accelerator, numbers without"),
    data_dir: Path = flag("Data", "Where cifar100 is or goes.", value=Path("data")),
    fraction: float = flag("Data", "Part of each class's training images to use.", value=1.0, min=0, max=1),
    crop_scale: float | None = flag("Data", "Random crop: least area; 1: none.", of="crop_scale", min=0.01, max=1),
    flip: float | None = flag("Data", "Probability of a horizontal flip.", of="flip", min=0, max=1),
    ra_ops: int | None = flag("Data", "RandAugment: operations an image (p 0.5 each).", of="ra_ops", min=0, max=15),
    ra_magnitude: float | None = flag("Data", "RandAugment: mean strength.", of="ra_magnitude", min=0, max=10),
    mixup: float | None = flag("Data", "Mixup's alpha; with CutMix, a step takes either.", of="mixup", min=0),
    cutmix: float | None = flag("Data", "CutMix's alpha.", of="cutmix", min=0),
    erase: float | None = flag("Data", "Probability of erasing a box.", of="erase", min=0, max=1),
    epochs: int | None = flag("Recipe", "Passes over the training images, all in all.", of="epochs", min=1),
    batch_size: int | None = flag("Recipe", "Images a step.", of="batch_size", min=1),
    lr: float | None = flag("Recipe", "Peak learning rate of AdamW.", of="lr", min=0),
    min_lr: float | None = flag("Recipe", "Where the cosine ends.", of="min_lr", min=0),
    warmup_lr: float | None = flag("Recipe", "Where the warm-up begins.", of="warmup_lr", min=0),
    warmup_epochs: float | None = flag(
        "Recipe", "Linear warm-up; unless given, at most a tenth of --epochs.", of="warmup_epochs", min=0),
    cooldown_epochs: int | None = flag(
        "Recipe", "Last epochs, at --min-lr; unless given, at most a tenth of --epochs.", of="cooldown_epochs", min=0),
    lr_per: Literal["epoch", "step"] | None = flag("Recipe", "How often the learning rate changes.", of="lr_per"),
    weight_decay: float | None = flag("Recipe", "Of matrices, not of biases and norms.", of="weight_decay", min=0),
    decay_pe: bool | None = flag("Recipe", "Are PE and class token decayed, too?", of="decay_pe"),
    label_smoothing: float | None = flag("Recipe", "Part spread over all classes.", of="label_smoothing", min=0, max=1),
    drop_path: float | None = flag("Recipe", "Stochastic depth of the last block.", of="vit-nano 0, others 0.1"),
    attn_drop: float | None = flag("Recipe", "Dropout of attention probabilities.", of="vit-lite 0.1, others 0"),
    init: Path | None = flag("Recipe", "Checkpoint to start from; other classes: with a new head.", of="none"),
    freeze: bool = flag("Recipe", "Train the head alone.", "--freeze", value=False),
    seed: int = flag("Run", "Of weights, order, augmentation and --fraction.", value=0, min=0, max=2**32 - 1),
    device: str = flag("Run", "auto (an accelerator where there is one), cpu, cuda, mps or xpu.", value="auto"),
    precision: Literal["fp32", "bf16"] | None = flag("Run", "bf16: autocast.", of="bf16 with CUDA, else fp32"),
    compile: Literal["off", "on", "graphs"] | None = flag(
        "Run", "torch.compile; graphs: with CUDA graphs.", of="on with CUDA, else off"),
    name: str | None = flag("Run", "Folder of this run.", of="METHOD-MODEL-DATA-seedN"),
    runs: Path = flag("Run", "Where run folders go.", value=Path("runs")),
    resume: bool = flag("Run", "Go on with the run of that name, or start it.", "--resume", value=False),
    overwrite: bool = flag("Run", "Replace the run of that name, at its first save.", "--overwrite", value=False),
):
    """Train a Vision Transformer and print its test accuracy, of the last epoch and of the best.

    Writes runs/NAME/ every epoch: config.json, log.jsonl (a line an epoch), last.pt and best.pt (weights in "model").
    """
    flags = {key: value for key, value in locals().items() if key != "ctx"}
    if ctx.invoked_subcommand:
        if given := given_flags(ctx):
            fail(f"--{given[0]} stands before {ctx.invoked_subcommand}: a subcommand takes its flags after its name")
        return
    config, device = configure(flags), usable_device(device)
    folder, found = run_folder(flags, config), "an" if accelerator() else "no"
    typer.echo(f"data      {config['data']}" + ("" if data else f" ({found} accelerator found; --data chooses)")
               + f", device {device}")
    torch.manual_seed(seed)
    vit = build(config)
    toggles = METHODS[config["method"]] | config["overrides"]
    typer.echo(f"method    {label(config)}: " + ", ".join(f"{key}={value}" for key, value in toggles.items()))
    saved = None
    if resume and (folder / "last.pt").exists():
        saved = read(folder / "last.pt")
        changed = [f"{key} was {saved['config'].get(key)}, is {config[key]}" for key in config
                   if saved["config"].get(key) != config[key]]
        if changed:
            fail(f"{folder} was trained with other flags: {'; '.join(changed)} (give those, or another --name)")
        save_record(folder, saved["config"], saved["log"])           # a kill may have come before them
        if saved["epoch"] == config["epochs"]:
            typer.echo(f"run       {folder} is finished: test accuracy {saved['log'][-1]['test_accuracy']:.2f} %")
            return
    elif folder.is_dir() and any(folder.iterdir()) and not (resume or overwrite):
        fail(f"{folder} exists: --resume goes on with it, --overwrite replaces it, --name chooses another")
    elif init:
        head, source = copy.deepcopy(vit.head), checkpoint_of(init)
        try:
            load_weights(vit, source, new_head=True)
            trained = read_checkpoint(source)
        except OSError as error:
            fail(f"--init {source} cannot be read ({error.strerror})")
        except ValueError as error:
            fail(f"--init: {error}")
        if trained.get("config", config)["data"] != config["data"]:  # other classes, even where they are as many
            vit.head = head
        kept = "its head, too" if (vit.head.weight != head.weight).any() else "with a new head"
        typer.echo(f"init      {source}, {kept}")
    vit.requires_grad_(not freeze).to(device).head.requires_grad_(True)
    split = load_data(config["data"], data_dir, fraction, seed)
    if device.type == "cuda":                                        # elsewhere batches are made on the CPU
        split = {part: tuple(tensor.to(device) for tensor in tensors) for part, tensors in split.items()}
    count = len(split["train"][0])
    if config["batch_size"] > count:
        fail(f"--batch-size {config['batch_size']} is more than the {count} training images (--fraction {fraction:g})")
    config["environment"] = environment(device)
    make_folder(folder, "--runs")
    if not (folder / "last.pt").exists():                            # an --overwrite waits until it has something
        save_record(folder, config, [])

    decayed, free = ([p.numel() for p in group["params"]] for group in parameter_groups(vit, 0, config["decay_pe"]))
    frozen = [p.numel() for p in vit.parameters() if not p.requires_grad]
    typer.echo(f"model     {config['model']}, parameters (tensors): {sum(decayed):,} ({len(decayed)}) decayed, "
               f"{sum(free):,} ({len(free)}) not, {sum(frozen):,} ({len(frozen)}) frozen\n"
               f"images    {count:,} to train, {len(split['test'][0]):,} to test\nrun       {folder}"
               + (f", on from step {saved['step']} of epoch {saved['epoch'] + 1}" if saved else ""))
    try:
        log, best = train_run(config, vit, split, folder, device, saved)
    except torch.OutOfMemoryError:
        fail(f"{device} is out of memory: lower --batch-size, or --jobs of a sweep")
    typer.echo(f"\nweights in {folder / 'last.pt'}\ntest accuracy {log[-1]['test_accuracy']:.2f} % after the last of "
               f"{config['epochs']} epochs (best: {best['test_accuracy']:.2f} % after epoch {best['epoch']})")


# --------------------------------------------------------------------------------------------------------------- sweep

T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


def interval(values):
    """-> half the width of the 95 % confidence interval of a mean (Student's t), of at least two values."""
    n = len(values)
    return (T95[n - 2] if n - 2 < len(T95) else 1.96 + 2.4 / (n - 1)) * stdev(values) / n ** 0.5


def setting(config):
    """-> what a table of runs is headed with: all that is not the recipe's, but for method and seed; is nothing?"""
    usual = dict(RECIPES[config["data"]], drop_path=None, attn_drop=None, fraction=1.0, freeze=False, init=None)
    unusual = [key for key in usual if config[key] != usual[key]]
    title = ["{model}, {data}, {epochs} epochs, {precision}".format(**config)]
    return ", ".join(title + [f"{key} {config[key]}" for key in unusual if key not in ("model", "epochs")]), not unusual


def finished_runs(folders):
    """-> (configuration, log) of each folder that holds a finished run."""
    found = []
    for folder in folders:
        if (folder / "config.json").exists() and (folder / "log.jsonl").exists():
            try:
                config = json.loads((folder / "config.json").read_text())
                log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
                setting(config)                                      # knows what a configuration holds
                found += [(config, log)] if log and log[-1]["epoch"] == config["epochs"] else []
            except (OSError, ValueError, KeyError, TypeError) as error:
                fail(f"{folder} is no run of this train.py ({error!r}): move it elsewhere")
    return found


def results(runs, order, base=None):
    """Finished runs -> text: for each setting, that is all flags but method and seed, a table with a row a method.

    order: labels in the order of the rows; base: the row that differences are to, the first unless given.
    """
    settings, paper, text = {}, {}, ""
    for config, log in runs:
        title, whole = setting(config)
        rows = settings.setdefault(title, {})
        paper[title] = PAPER.get((config["model"], config["data"]), {}) if whole else {}
        if config["seed"] in rows.setdefault(label(config), {}):
            fail(f"two runs of {label(config)} have seed {config['seed']} and the same flags: move one away")
        rows[label(config)][config["seed"]] = config, log
    for title, rows in settings.items():
        rows = dict(sorted(rows.items(), key=lambda row: ([*order, row[0]].index(row[0]), row[0])))
        first = base or next(iter(rows))
        lines = [["method", "n", "last epoch %", f"minus {first}", "best epoch %", "seconds", "parameters", "paper %"]]
        lines.append(["-" * len(cell) for cell in lines[0]])
        for name, seeds in rows.items():
            config, logs = next(iter(seeds.values()))[0], [log for _, log in seeds.values()]
            values = [log[-1]["test_accuracy"] for log in logs]
            pairs = [seeds[seed][1][-1]["test_accuracy"] - log[-1]["test_accuracy"]
                     for seed, (_, log) in rows.get(first, {}).items() if seed in seeds and name != first]
            with torch.device("meta"):
                count = sum(p.numel() for p in build(config).parameters())
            published = paper[title].get(name)
            lines.append([
                name, str(len(values)), f"{mean(values):.2f}" + (f" +- {stdev(values):.2f}" if len(values) > 1 else ""),
                (f"{mean(pairs):+.2f}" if pairs else "") + (f" +- {interval(pairs):.2f}" if len(pairs) > 1 else ""),
                f"{mean(max(line['test_accuracy'] for line in log) for log in logs):.2f}",
                f"{mean(log[-1]['seconds'] for log in logs):.0f}", f"{count:,}",
                f"{published:.2f}" if published else ""])
        widths = [max(map(len, column)) for column in zip(*lines)]
        text += title + "\n\n"
        text += "".join("| " + " | ".join(map(str.ljust, line, widths)) + " |\n" for line in lines) + "\n"
    return text + ("Test accuracy: mean +- standard deviation over n seeds. Difference: of pairs with the same seed, "
                   "+- half\nthe 95 % confidence interval. Best epoch: chosen by test accuracy. Seconds: of a run.\n")


@app.command(context_settings=dict(allow_extra_args=True, ignore_unknown_options=True))
def sweep(
    ctx: typer.Context,
    methods: str = flag("Sweep", f"Rows, with commas between: {', '.join(METHODS)}.", value="default,lape,pvg,mpvg"),
    set_: Literal[tuple(SETS)] | None = flag("Sweep", "Instead: the rows of a figure or table of the paper, or our "
                                             "controls.", "--set", of="none"),
    seeds: int = flag("Sweep", "Seeds 0 to N - 1 of each row.", value=3, min=1),
    jobs: int = flag("Sweep", "Runs side by side; each one's output goes to RUNS/NAME.txt.", value=1, min=1),
    from_: Path | None = flag("Sweep", "Only print the table of that folder's finished runs.", "--from", of="none"),
):
    """Train every row with every seed, or go on where a sweep was stopped; print a table, write it to RUNS/sweep.md.

    Takes the flags of `python train.py`, too, for all of its runs, but for those that name one run.
    """
    if from_:
        if ctx.args or len(given_flags(ctx)) > 1:
            fail("--from prints what is there: leave out the other flags")
        runs = finished_runs(sorted(from_.glob("*/")))
        typer.echo(results(runs, [*METHODS]) if runs else fail(f"{from_} holds no finished run"))
        return
    if set_ and "methods" in given_flags(ctx):
        fail("--methods and --set both name rows: give one")

    trainer = typer.Typer()
    trainer.command()(train)

    def parse(*more):
        return typer.main.get_command(trainer).make_context("train.py", [*ctx.args, *more])

    for key in {"method", "pe", "pool", "mpvg", "seed", "name", "resume", "overwrite"} & {*given_flags(parse())}:
        fail(f"sweep sets --{key} itself: leave it out (--methods and --set name rows, --seeds counts seeds)")
    depth = MODELS.get(configure(parse().params)["model"], {}).get("depth", 12)
    planned, runs = {}, Path(parse().params["runs"])                 # folder -> (its configuration, its command)
    for row, seed in itertools.product(SETS[set_] if set_ else methods.split(","), range(seeds)):
        method, *toggles = row.format(a=depth // 2 - 1, b=depth * 3 // 4 - 1, c=depth - 1).split() or [""]
        row = [f"--method={method}", *toggles, "--seed", str(seed)]
        config = configure(parse(*row).params)
        build(config)                                                # a row that cannot be ends the sweep at once
        planned[run_folder(parse().params, config)] = config, [sys.executable, __file__, *ctx.args, *row, "--resume"]
    make_folder(runs, "--runs")
    env, waiting, running, broken = dict(os.environ), list(planned), {}, set()
    if jobs > 1:                                                     # threads of several runs would wait for each other
        env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    with stop_signals() as stopped, tqdm(total=len(planned), unit="run", disable=None if jobs > 1 else True) as bar:
        while running or (waiting and not stopped):
            while waiting and len(running) < jobs and not stopped:
                folder = waiting.pop(0)
                output = open(f"{folder}.txt", "a") if jobs > 1 else None
                if jobs == 1:
                    typer.echo(f"\n--- {folder.name}, run {len(planned) - len(waiting)} of {len(planned)}")
                running[folder] = subprocess.Popen(planned[folder][1], env=env, stdout=output, stderr=output)
            for folder, process in [*running.items()]:
                if stopped and process.poll() is None:
                    process.terminate()                              # it ends its step, saves and ends
                if process.poll() is not None:
                    del running[folder]
                    broken |= {folder} if process.returncode else set()
                    bar.update(not process.returncode)
            time.sleep(0.2)
    if stopped:
        typer.echo(f"stopped by {stopped[0]}: the same command goes on from there")
        raise typer.Exit(128 + signal.Signals[stopped[0]])
    done = {folder: run for folder in planned if folder not in broken for run in finished_runs([folder])}
    labels = [label(config) for config, _ in planned.values()]
    if done:
        save(runs / "sweep.md", results(done.values(), labels, labels[0]))
        typer.echo("\n" + (runs / "sweep.md").read_text())
    if failed := [folder.name for folder in planned if folder not in done]:
        fail(f"{len(failed)} of {len(planned)} runs failed and are not in the table: {', '.join(failed)}")


# ------------------------------------------------------------------------------------------------- evaluation, figures

def load_run(path, device, **changes):
    """-> the model a run has trained, and its checkpoint; path: the run's folder, or one of its checkpoints."""
    path = checkpoint_of(path)
    saved = read(path)
    if "step" in saved and saved["epoch"] < saved["config"]["epochs"]:
        typer.echo(f"note: {path} is of epoch {saved['epoch']} of {saved['config']['epochs']}: not finished", err=True)
    try:
        return load_weights(build(saved["config"], **changes), saved).to(device).eval(), saved
    except ValueError as error:
        fail(f"{path}: {error}")


@app.command("eval")
def evaluate_run(
    run: Path = typer.Argument(help="A run's folder (its last epoch), or one of its checkpoints."),
    image_size: int | None = flag(None, "Resize images and PE to that many pixels.", of="the model's", min=1),
    fold_: bool = flag(None, "Store every PE term first: no PE norm is left.", "--fold", value=False),
    data_dir: Path = flag(None, "Where cifar100 is or goes.", value=Path("data")),
    device: str = flag(None, "auto, cpu, cuda, mps or xpu.", value="auto"),
):
    """Measure a run's test accuracy and loss again."""
    device = usable_device(device)
    model, saved = load_run(run, device, **(dict(image_size=image_size) if image_size else {}))
    model, config = fold(model) if fold_ else model, saved["config"]
    predict = step_functions(model, config | dict(compile="off"), device)[1]
    resize = partial(F.interpolate, size=model.image_shape[1:], mode="bicubic", antialias=True)
    test = load_data(config["data"], data_dir)["test"]
    accuracy, loss = evaluate(lambda x: predict(resize(x) if image_size else x), *test, config["data"], device)
    typer.echo(f"{label(config)}, {config['model']}, {config['data']}, seed {config['seed']}, epoch {saved['epoch']}: "
               f"test accuracy {accuracy:.2f} %, loss {loss:.4f}, {len(test[0]):,} images")


@torch.no_grad()
def measure(model, batches):
    """What the paper draws of a trained model, from normalised images (B, 3, H, W) -> a dict.

    tokens, pe: of each block and the last norm, LN_l(x_l) averaged over images, and the PE that joins it, (N, D) or
    None; correlation: Pearson's, of all entries of those two (Figure 4); beta, gamma: the last norm's, (D); offset:
    beta + mean of LN'(pos_0) (README, fact 3); cosine: similarity of an image's mean token before and after the last
    norm, averaged over images (Figure 6).
    """
    seen, tokens, cosines = {}, 0, []

    def watch(number, _, inputs, output):
        seen[number] = inputs[0], output

    norms = [*(block.norm1 for block in model.blocks), model.norm]
    hooks = [norm.register_forward_hook(partial(watch, number)) for number, norm in enumerate(norms)]
    for x in batches:
        model(x)
        tokens = tokens + torch.stack([output.sum(0) for _, output in seen.values()])
        cosines.append(F.cosine_similarity(*(t.mean(1) for t in seen[len(norms) - 1]), dim=1))
    for hook in hooks:
        hook.remove()
    tokens = (tokens / sum(map(len, cosines))).cpu()                 # (L + 1, N, D)
    per_block, last = model.delivered_pe()
    pe = [None if e is None else e.expand(1, *tokens.shape[1:])[0].cpu() for e in (*per_block, last)]
    correlation = [None if e is None or e.min() == e.max() else  # nothing varies, nothing correlates
                   torch.corrcoef(torch.stack([t.flatten(), e.flatten()]))[0, 1].item() for t, e in zip(tokens, pe)]
    beta, gamma = model.norm.bias.detach().cpu(), model.norm.weight.detach().cpu()
    return dict(tokens=[*tokens], pe=pe, correlation=correlation, cosine=torch.cat(cosines).mean().item(), beta=beta,
                gamma=gamma, offset=beta if last is None else beta + pe[-1].mean(0))


def draw(out, runs):
    """Writes the figures; runs: name -> (configuration, log, what measure() found)."""
    from matplotlib.figure import Figure
    kinds = [*dict.fromkeys(label(config) for config, _, _ in runs.values())]

    def curve(key):
        return lambda log, found: ([line["epoch"] for line in log], [line[key] for line in log])

    def sort(key):
        return lambda log, found: (range(len(found[key])), found[key].sort().values.tolist())

    for file, panels in {                                            # a panel: title, x, y, points of a run's line
        "curves.png": [("training loss", "epoch", "cross entropy", curve("loss")),
                       ("test accuracy", "epoch", "%", curve("test_accuracy"))],
        "correlation.png": [("LN(x) and the PE that joins it", "block; after them the last norm", "correlation",
                             lambda _, found: [*zip(*enumerate(found["correlation"]))])],
        "last_norm.png": [("beta of the last norm", "dimension, sorted", "", sort("beta")),
                          ("its gamma", "dimension, sorted", "", sort("gamma")),
                          ("its effective offset", "dimension, sorted", "", sort("offset"))],
    }.items():
        figure, drawn = Figure(figsize=(4 * len(panels) + 2, 3.6), layout="constrained"), {}
        for ax, (title, across, up, points) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
            for config, log, found in runs.values():
                x, y = points(log, found)
                if {*y} != {None}:                                   # matplotlib leaves gaps where y is None
                    style = dict(marker=".", ms=4, lw=1, alpha=0.8, color=f"C{kinds.index(label(config))}")
                    drawn[label(config)], = ax.plot(x, y, **style)
            ax.set(title=title, xlabel=across, ylabel=up)
            ax.xaxis.get_major_locator().set_params(integer=True)
            ax.grid(alpha=0.3)
        figure.legend(drawn.values(), drawn, loc="outside right upper")
        figure.savefig(out / file, dpi=100)
    for name, (_, _, found) in runs.items():                         # Figures 2 and 8: (N, D), each in its own scale
        figure = Figure(figsize=(1.6 * len(found["pe"]), 4.4), layout="constrained")
        figure.suptitle(f"{name}: patches or tokens (down) by dimensions (across)")
        for row, key in zip(figure.subplots(2, len(found["pe"])), ("tokens", "pe")):
            for number, (ax, values) in enumerate(zip(row, found[key])):
                ax.set(xticks=[], yticks=[])
                ax.set_title(("LN(x), " if key == "tokens" else "PE, ")
                             + (f"block {number}" if number < len(row) - 1 else "last norm"), size=9)
                if values is None:
                    ax.text(0.5, 0.5, "none", ha="center", va="center")
                else:
                    top = values.abs().quantile(0.99).item()
                    ax.imshow(values.numpy(), "RdBu_r", aspect="auto", interpolation="nearest", vmin=-top, vmax=top)
        figure.savefig(out / f"layers-{name}.png", dpi=100)


@app.command()
def report(
    run: list[Path] = typer.Argument(help="Folders of runs, or checkpoints."),
    out: Path = flag(None, "Folder for report.json and the figures.", value=Path("report")),
    images: int = flag(None, "Test images to average over.", value=1000, min=1),
    data_dir: Path = flag(None, "Where cifar100 is or goes.", value=Path("data")),
    device: str = flag(None, "auto, cpu, cuda, mps or xpu.", value="auto"),
):
    """Measure and draw what the paper draws: curves, correlation of tokens and PE by layer, heatmaps, the last norm.

    The figures need matplotlib; the numbers, in OUT/report.json, do not.
    """
    device, runs, tests = usable_device(device), {}, {}
    for path in run:
        model, saved = load_run(path, device)
        data, whole = saved["config"]["data"], path.resolve()
        name = whole.name if path.is_dir() else f"{whole.parent.name}-{whole.stem}"
        if name in runs:
            fail(f"two runs are called {name}: report them apart")
        if data not in tests:
            tests[data] = load_data(data, data_dir)["test"][0][:images]
        found = measure(model, (normalise(x.to(device), data) for x in tests[data].split(100)))
        runs[name] = saved["config"], saved["log"], found
    vectors = "beta", "gamma", "offset"
    summary = {name: {key: found[key] for key in ("correlation", "cosine")}
               | {f"{key}_variance": found[key].var().item() for key in vectors}
               | {key: found[key].tolist() for key in vectors} for name, (_, _, found) in runs.items()}
    make_folder(out, "--out")
    save(out / "report.json", json.dumps(summary) + "\n")
    width = max(map(len, summary))
    typer.echo("at the last norm: variance of beta and of the effective offset, cosine of the mean token before and\n"
               "after; correlation of tokens and PE in blocks 0, 1, ... and at the last norm\n\n"
               f"{'run':<{width}}  beta    offset    cosine  correlation")
    for name, line in summary.items():
        figures = "{beta_variance:.5f} {offset_variance:.5f}   {cosine:.3f} ".format(**line)
        typer.echo(f"{name:<{width}}  {figures} "
                   + " ".join("    -" if value is None else f"{value:+.2f}" for value in line["correlation"]))
    try:
        draw(out, runs)
    except ImportError as error:
        typer.echo(f"numbers in {out / 'report.json'}; the figures need matplotlib ({error}): pip install matplotlib")
    else:
        typer.echo(f"numbers and figures in {out}")


if __name__ == "__main__":
    app()
