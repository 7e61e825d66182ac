"""Train the Vision Transformers of mpvg.py on images: one run, a sweep over methods and seeds, the paper's figures.

    python train.py --pe layerwise --pool gap --mpvg              # the paper's method, as plain `python train.py`
    python train.py --method lape --data cifar100                 # another row of the paper, by its name
    torchrun --nproc_per_node 4 train.py --data imagenet --data-dir DIR
    python train.py sweep --methods default,lape,pvg,mpvg --seeds 3
    python train.py eval runs/NAME;  python train.py report runs/*/

A run is a function of its flags and seed; one that was killed goes on with --resume. The data set `numbers` is built
in: nothing to download, a few minutes on a CPU.
"""
import atexit
import copy
import ctypes
import functools
import hashlib
import inspect
import itertools
import json
import math
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
import typer
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import functional as v2
from tqdm import tqdm

from mpvg import METHODS, MODELS, ViT, create, fold, load_weights, read_checkpoint

# What a flag is where it is not given. cifar100: ViT-Lite's recipe, from Compact-Transformers' cifar100.yml; imagenet:
# DeiT's, from its main.py, whose lr is 5e-4 for every 512 images of a batch.
RECIPES = {
    "numbers": dict(model="vit-nano", image_size=32, epochs=6, batch_size=128, lr=2e-3, min_lr=1e-5, warmup_lr=1e-6,
                    warmup_epochs=0.6, cooldown_epochs=0, lr_per="step", weight_decay=0.05, decay_pe=False,
                    label_smoothing=0.0, repeats=1, crop_scale=1.0, bicubic=0.5, flip=0.0, ra_ops=0, ra_magnitude=9.0,
                    mixup=0.0, cutmix=0.0, erase=0.0, erase_first=False),
    "cifar100": dict(model="vit-lite", image_size=32, epochs=310, batch_size=128, lr=6e-4, min_lr=1e-5, warmup_lr=1e-6,
                     warmup_epochs=10.0, cooldown_epochs=10, lr_per="epoch", weight_decay=0.06, decay_pe=True,
                     label_smoothing=0.1, repeats=1, crop_scale=0.8, bicubic=0.5, flip=0.5, ra_ops=2, ra_magnitude=9.0,
                     mixup=0.8, cutmix=1.0, erase=0.25, erase_first=False),
    "imagenet": dict(model="deit-tiny", image_size=224, epochs=300, batch_size=1024, lr=1e-3, min_lr=1e-5,
                     warmup_lr=1e-6, warmup_epochs=5.0, cooldown_epochs=0, lr_per="epoch", weight_decay=0.05,
                     decay_pe=False, label_smoothing=0.1, repeats=3, crop_scale=0.08, bicubic=1.0, flip=0.5, ra_ops=2,
                     ra_magnitude=9.0, mixup=0.8, cutmix=1.0, erase=0.25, erase_first=True),
}
PIXELS = {"numbers": ((0.5, 0.5, 0.5), (0.3, 0.3, 0.3)),             # mean and std per channel, of values from 0 to 1
          "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
          "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))}
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


# Set by torchrun: this process's number, in all and on its machine, and how many there are. Alone: 0, 0 of 1.
RANK, LOCAL_RANK, PROCESSES = (int(os.environ.get(*v)) for v in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))


def say(text):
    """Prints, from the first process."""
    if RANK == 0:
        typer.echo(text)


def fail(message):
    """Ends the program with one line on stderr and exit code 2; torchrun then ends the other processes."""
    if LOCAL_RANK and not dist.is_initialized():
        time.sleep(10)                                               # a user's mistake: the first one says it, and once
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(2)


def add_up(numbers, how=dist.ReduceOp.SUM):
    """-> floats: each number, summed over the processes."""
    sums = torch.tensor(numbers, dtype=torch.float64)                # counts are exact; on the CPU: waits for no GPU
    if PROCESSES > 1:
        dist.all_reduce(sums, how)
    return sums.tolist()


def agree(number):
    """-> the greatest of the numbers that the processes call it with; waits for all of them."""
    return int(*add_up([number], dist.ReduceOp.MAX))


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


class Arrays:
    """Images in memory, uint8 (N, 3, H, W), and labels (N,), on the device where batches are made."""

    views, failures = 1, 0

    def __init__(self, images, labels, device="cpu"):
        self.images, self.labels = images.to(device), labels.to(device)

    def __len__(self):
        return len(self.labels)

    def pieces(self, order, seeds, first, columns, width):
        """See epoch_batches. Many steps at once, so that augmentation costs little beside them."""
        many = max(1, 8192 // order.shape[1])
        for step in range(first // many * many, len(order), many):
            rows = order[step:step + many, columns.start:columns.stop].to(self.images.device)
            yield step, columns, self.images[rows], self.labels[rows]

    def test_batches(self, size=500):
        """Yields this process's share: images (B, 1 view, 3, H, W), labels (B,)."""
        for x, y in zip(*(t[RANK::PROCESSES].split(size) for t in (self.images, self.labels))):
            yield x[:, None], y


class Crops(Dataset):
    """What a worker process makes of (indices of files, seed): a batch decoded, cropped and resized.

    -> images, uint8 (B, 3, S, S), or for testing, where crop_scale is None, (B, 2 views, 3, S, S); labels (B,);
    {path: reason} of files that cannot be decoded. Such a file's place is taken by the one behind it; in testing it has
    label -1. A crop depends on the seed and its place; a file that comes again after another one is decoded once.
    """

    def __init__(self, samples, size, crop_scale, bicubic):
        self.samples, self.size, self.crop_scale, self.bicubic = samples, size, crop_scale, bicubic

    def __getitem__(self, batch):
        (indices, seed), testing, unreadable = batch, self.crop_scale is None, {}

        @functools.lru_cache(2)
        def decode(index):
            for path, label in (self.samples[i % len(self.samples)] for i in range(index, index + 20)):
                try:
                    return v2.pil_to_tensor(Image.open(path).convert("RGB")), label      # uint8 (3, height, width)
                except Exception as error:                           # a damaged file can fail in any way
                    unreadable[path] = str(error) or type(error).__name__
                    if testing:
                        break
            return None, -1

        x = torch.zeros(len(indices), *[2] * testing, 3, self.size, self.size, dtype=torch.uint8)
        labels = torch.empty(len(indices), dtype=torch.long)
        with torch.random.fork_rng(devices=[]):
            for place, index in enumerate(indices):
                image, labels[place] = decode(index)
                if image is not None and testing:                    # DeiT's view; LaPE's, all of the short side
                    for view, ratio in enumerate((0.875, 1.0)):
                        whole = v2.resize(image, [int(self.size / ratio)], InterpolationMode.BICUBIC)
                        x[place, view] = v2.center_crop(whole, [self.size])
                elif image is not None:
                    torch.default_generator.manual_seed(seed + place)
                    box = RandomResizedCrop.get_params(image, [self.crop_scale, 1.0], [3 / 4, 4 / 3])
                    mode = InterpolationMode["BICUBIC" if torch.rand(()) < self.bicubic else "BILINEAR"]
                    x[place] = v2.resized_crop(image, *box, [self.size] * 2, mode)
        return x, labels, unreadable


def leave_signals(_):
    """In a worker: Ctrl-C and SIGTERM may reach all processes of a job and are the training process's to heed."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def end_workers():
    """At exit, also after an error: multiprocessing would send SIGTERM and wait."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)                # DataLoader's would call a dead worker an error
    for process in multiprocessing.active_children():
        if process.daemon:                                           # as workers are; others are not ours
            process.kill()


class Folder:
    """Image files (path, label), made into batches by worker processes; for testing where crop_scale is None.

    failures: how often a file could not be decoded so far.
    """

    views = 2

    def __init__(self, samples, size, device, workers, crop_scale=None, bicubic=1.0):
        self.samples, self.device, self.plan, self.named, self.failures = samples, device, [], set(), 0
        self.testing = crop_scale is None
        self.loader = DataLoader(Crops(samples, size, crop_scale, bicubic), sampler=self.plan, batch_size=None,
                                 num_workers=workers, persistent_workers=workers > 0 and not self.testing,
                                 pin_memory=device.type == "cuda", worker_init_fn=leave_signals,
                                 generator=torch.Generator())        # else it draws from that of dropout
        if workers:
            atexit.register(end_workers)

    def __len__(self):
        return len(self.samples)

    def load(self, plan):
        """Yields images and labels of every (indices, seed) of the plan."""
        self.plan[:] = plan
        for x, y, unreadable in self.loader:
            self.failures += len(unreadable)
            for path in unreadable:
                if path not in self.named and len(self.named) < 10:
                    how = "left out" if self.testing else "replaced by the next one"
                    tqdm.write(f"warning: {path} cannot be decoded and is {how} ({unreadable[path]})", sys.stderr)
                    if len(self.named) == 9:
                        tqdm.write("warning: others like it are only counted from here on", sys.stderr)
                self.named.add(path)
            if not self.testing and (y == -1).any():                 # none of 20 files in a row
                fail(f"{[*unreadable][-1]} and the files before it cannot be decoded: are they images, and is their "
                     "disk still there?")
            yield x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)

    def pieces(self, order, seeds, first, columns, width):
        """See epoch_batches."""
        parts = [(step, columns[start:start + width])
                 for step in range(first, len(order)) for start in range(0, len(columns), width)]
        plan = [(order[step, part.start:part.stop].tolist(), seeds[step] + 2 + part.start)  # 0 and 1 are taken there
                for step, part in parts]
        for (x, y), (step, part) in zip(self.load(plan), parts):
            yield step, part, x[None], y[None]

    def test_batches(self, size=125):
        """Yields this process's share: images (B, 2 views, 3, H, W), labels (B,), -1 where there is no image."""
        mine = range(RANK, len(self.samples), PROCESSES)
        yield from self.load([(list(mine[start:start + size]), 0) for start in range(0, len(mine), size)])


def class_names(root):
    """-> the classes of an ImageNet folder, which are those of its train/ and its val/."""
    train, val = (in_folder(torchvision.datasets.folder.find_classes, root, split)[0] for split in ("train", "val"))
    if train != val:
        only = [", ".join([*one[:3], "..."][:len(one)]) or "none"
                for one in (sorted({*train} - {*val}), sorted({*val} - {*train}))]
        fail(f"{root}: train/ and val/ have different classes (only in train/: {only[0]}; only in val/: "
             f"{only[1]}): sort val/'s images into folders of the same names")
    return train


def digest(classes):
    """-> a short word for the names of the classes, which a run keeps: labels mean nothing with others."""
    return hashlib.sha256("\n".join(classes).encode()).hexdigest()[:12]


def in_folder(function, root, split):
    """-> what a function of torchvision's makes of root/split; a folder that is none ends the program."""
    try:
        return function(root / split)
    except OSError as error:
        fail(f"{root} cannot be read as ImageNet, train/CLASS/*.JPEG and val/CLASS/*.JPEG "
             f"({str(error).splitlines()[0]}): give the folder that holds both")


def default_workers(device):
    """-> processes that decode files: the machine's cores, shared by its training processes; beside a CPU, which trains
    itself, none."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 0 if device.type == "cpu" else max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def load_data(config, root, device=torch.device("cpu"), workers=None, splits=("train", "test")):
    """-> {"train": data, "test": data}, Arrays or Folders; of the training images config["fraction"] of each class,
    chosen by seed. Batches are made on the device where it is CUDA, else on the CPU.
    """
    workers = default_workers(device) if workers is None else workers
    data, device = {}, device if device.type == "cuda" else torch.device("cpu")
    for split in splits:
        if config["data"] == "imagenet":
            folder = in_folder(torchvision.datasets.ImageFolder, root, "train" if split == "train" else "val")
            if len(folder.classes) != config["num_classes"]:
                fail(f"{folder.root} has {len(folder.classes)} classes, and the model {config['num_classes']}")
            if config.get("classes", digest(folder.classes)) != digest(folder.classes):
                fail(f"{folder.root} has other classes than those that the model was trained on")
            samples, labels = folder.samples, torch.tensor(folder.targets)
        elif config["data"] == "cifar100":
            images, labels = cifar100(root, train=split == "train")
        else:
            images, labels = numbers(30_000, seed=1) if split == "train" else numbers(4_000, seed=2)
        rows = torch.arange(len(labels))
        if split == "train" and config["fraction"] < 1:
            order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(config["seed"]))
            places = [order[labels[order] == label] for label in labels.unique()]
            rows = torch.cat([rows[:round(config["fraction"] * len(rows))] for rows in places])
        if config["data"] == "imagenet":
            samples = [samples[row] for row in rows.tolist()]
            crops = dict(crop_scale=config["crop_scale"], bicubic=config["bicubic"]) if split == "train" else {}
            data[split] = Folder(samples, config["image_size"], device, workers, **crops)
        else:
            data[split] = Arrays(images[rows], labels[rows], device)
    return data


# -------------------------------------------------------------------------------------------------------- augmentation
# Pillow's arithmetic for batches of uint8 images (B, 3, H, W), every image with parameters of its own, tensors (B,).

def rows_of(mask, device):
    """-> the numbers of the rows that are True, found where the mask is, on the CPU: no GPU is waited for."""
    return mask.nonzero()[:, 0].to(device, non_blocking=True)


def sample(x, grid, bicubic):
    """x at grid (B, H, W, 2), places (u, v) from -1 to 1, by bicubic or linear interpolation; the border goes on."""
    y = torch.empty(x.shape, device=x.device)
    for mask, mode in ((bicubic, "bicubic"), (~bicubic, "bilinear")):
        rows = rows_of(mask, x.device)
        y[rows] = F.grid_sample(x[rows].float(), grid[rows], mode, "border", align_corners=False)
    return y.clamp(0, 255)


def warp(x, bicubic, fill, a=1.0, b=0.0, c=0.0, d=0.0, e=1.0, f=0.0):
    """The output at (u, v), from -1 to 1, is the input at (a u + b v + c, d u + e v + f), or `fill` (3,) outside."""
    matrix = torch.stack([t if torch.is_tensor(t) else torch.full((len(x),), t, device=x.device)
                          for t in (a, b, c, d, e, f)], dim=1)
    grid = F.affine_grid(matrix.view(-1, 2, 3), x.shape, align_corners=False)
    inside = ((grid >= -1) & (grid < 1)).all(-1)[:, None]
    return torch.where(inside, sample(x, grid, bicubic), fill.view(3, 1, 1)).to(torch.uint8)


def resized_crop(x, box, bicubic):
    """The boxes (B, 4), top, left, height and width in pixels, enlarged to the whole image."""
    lines = []
    for axis, n in enumerate(x.shape[2:]):
        start, size = box[:, axis, None], box[:, axis + 2, None]
        place = (torch.arange(n, device=x.device) + 0.5) / n * size
        place = start + place.clamp(min=0.5).minimum(size - 0.5)     # past the box's border its last pixel goes on
        lines.append(place * 2 / n - 1)
    grid = torch.stack(torch.broadcast_tensors(lines[1][:, None], lines[0][..., None]), dim=-1)  # (B, H, W, 2)
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
    shape, bicubic = (count, recipe["ra_ops"]), recipe["bicubic"]
    return dict(
        crop=crop, crop_bicubic=torch.rand(count) < bicubic, flip=torch.rand(count) < recipe["flip"],
        operation=torch.where(torch.rand(shape) < 0.5, torch.randint(len(OPERATIONS), shape), -1),  # -1: not applied
        magnitude=(recipe["ra_magnitude"] + 0.5 * torch.randn(shape)).clamp(0, 10),
        sign=torch.where(torch.rand(shape) < 0.5, -1.0, 1.0), bicubic=torch.rand(shape) < bicubic,
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
    """uint8 (B, 3, H, W) -> the same: random resized crop, flip, RandAugment. `fill` (3,): colour of empty places.

    draws: of draw_images, on the CPU."""
    there = partial(torch.Tensor.to, device=x.device, non_blocking=True)
    if recipe["crop_scale"] < 1:
        x = resized_crop(x, there(draws["crop"]), draws["crop_bicubic"])
    if recipe["flip"] > 0:
        x = torch.where(there(draws["flip"]).view(-1, 1, 1, 1), x.flip(3), x)
    for operation, m, s, bicubic in zip(*(draws[key].T for key in ("operation", "magnitude", "sign", "bicubic"))):
        for number, apply in enumerate(OPERATIONS.values()):
            chosen = operation == number
            if chosen.any():
                rows, how = rows_of(chosen, x.device), partial(warp, bicubic=bicubic[chosen], fill=fill)
                x[rows] = apply(x[rows], there(m[chosen]), there(s[chosen]), how)
    return x


@functools.lru_cache
def pixels(data, device):
    """-> mean and std of PIXELS, (3, 1, 1) each; copied to a GPU once, as it waits for a copy."""
    return torch.tensor(PIXELS[data], device=device).view(2, 3, 1, 1).unbind()


def normalise(x, data):
    """uint8 or float images (B, 3, H, W), pixels from 0 to 255 -> floats by the data set's mean and deviation."""
    mean, std = pixels(data, x.device)
    return (x / 255).sub_(mean).div_(std)


def prepare(x, y, draws, keep, recipe, classes, seed, place=0):
    """Makes the batches of some steps, or of each a part that begins at `place`, with an even number of images.

    x: uint8 (S, B, 3, H, W); y: labels (S, B); draws: draw_images of the S * B; keep: draw_mixing of the S, or None.
    -> normalised images, and labels, or with mixing each label's share (S, B, classes). Image i is mixed with its
    neighbour i xor 1. ViT-Lite's recipe erases after mixing; DeiT's, erase_first, before, and mixes floats.
    """
    (S, B), shape, data = y.shape, x.shape[2:], recipe["data"]
    fill = (255 * pixels(data, x.device)[0]).round()
    keep = keep if keep is None else keep.to(x.device, non_blocking=True)[:, None, None]  # (S, 1, 1, H, W)

    def mix(x):
        if keep is None:
            return x
        x = x.view(S, B, *shape).to(keep.dtype)
        return torch.lerp(x.unflatten(1, (-1, 2)).flip(2).flatten(1, 2), x, keep).flatten(0, 1)

    def erase(x):
        """An image's noise is a window of its step's, 101 values after its neighbour's: drawn at once, and yet by its
        place in the whole batch. Noise of its own for each of 1,024 images of 224 x 224 would take 600 MB."""
        rows, size = rows_of(draws["erase"][:, 2] > 0, x.device), shape.numel()
        noise = torch.randn(S, size + 101 * recipe["batch_size"], device=x.device,
                            generator=torch.Generator(x.device).manual_seed(seed)).unfold(1, size, 101)
        noise = noise[rows // B, place + rows % B].view(-1, *shape)
        inside = box_mask(draws["erase"].to(x.device, non_blocking=True)[rows], *shape[1:])[:, None]
        x[rows] = torch.where(inside, noise, x[rows])
        return x

    x = augment(x.flatten(0, 1), draws, recipe, fill)                # (S * B, 3, H, W), as all that follows
    x = mix(erase(normalise(x, data))) if recipe["erase_first"] else erase(normalise(mix(x).round(), data))
    if keep is not None:
        share, y = keep.mean((2, 3, 4))[..., None], F.one_hot(y, classes).float()
        y = share * y + (1 - share) * y.unflatten(1, (-1, 2)).flip(2).flatten(1, 2)
    return x.view(S, B, *shape), y


def epoch_order(config, count, epoch):
    """-> (steps, batch size), which image is where in an epoch's batches; a seed for each of the steps."""
    size, repeats = config["batch_size"], config["repeats"]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config["seed"] * 100_003 + epoch)    # the CPU's, no other
        order, seeds = torch.randperm(count), torch.randint(2**62, (count // size,)).tolist()
    place = torch.arange(len(seeds) * size)
    return order[place // (2 * repeats) * 2 + place % 2].view(-1, size), seeds


def epoch_batches(config, data, epoch, first, classes, parts):
    """Yields images and labels as a training step takes them, from step `first` of an epoch on, prepared.

    Of a step's batch a process takes an equal share, in as many `parts` as it sums gradients over. What an image
    becomes depends on (seed, epoch, place in the whole batch), the way images are mixed on (seed, epoch, step): how a
    batch is shared out changes nothing. With `repeats`, two images take turns, a b a b a b, on places side by side, so
    that nothing is mixed with itself and one decoding serves all crops.
    """
    size, shape = config["batch_size"], (config["image_size"],) * 2
    order, seeds = epoch_order(config, len(data), epoch)
    share = size // PROCESSES
    mine = range(RANK * share, (RANK + 1) * share)
    mixing, recipe = config["mixup"] > 0 or config["cutmix"] > 0, config
    if isinstance(data, Folder):
        recipe = config | dict(crop_scale=1.0)                       # its workers have cropped
    # A piece: its first step, its columns of the batch, images (S, B, 3, H, W), labels (S, B).
    for step, columns, x, y in data.pieces(order, seeds, first, mine, share // parts):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seeds[step])
            draws = draw_images(len(x) * size, *shape, recipe)
            keep = draw_mixing(len(x), *shape, config) if mixing else None
        draws = {key: value.unflatten(0, (-1, size))[:, columns.start:columns.stop].flatten(0, 1)
                 for key, value in draws.items()}
        x, y = prepare(x, y, draws, keep, recipe, classes, seeds[step] + 1, columns.start)
        for i in range(max(0, first - step), len(x)):
            yield from zip(x[i].split(share // parts), y[i].split(share // parts))
        del x, y                                                     # before the next ones are made


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


class LossModule(nn.Module):
    """The loss of a training step as the module that DistributedDataParallel asks for."""

    def __init__(self, model, loss):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, x, y):
        return self.loss(x, y)


# What is measured of each view of a test image: at crop ratio 0.875 (where there is but one: as it is), and at 1.0.
VIEWS = {"test_accuracy": "test_loss", "full_crop_accuracy": "full_crop_loss"}


@torch.no_grad()
def evaluate(predict, test, data, device, stopped=()):
    """-> for each view accuracy in percent and mean cross entropy, by their names in VIEWS, over the images of all
    processes; None once one of them has something in `stopped`."""
    hits, losses, count, size = [0] * test.views, [0.0] * test.views, 0, 0
    for x, y in test.test_batches():
        if stopped:
            break
        size = max(size, len(x))                                     # all batches as large as the first: padded
        x, y = F.pad(x, (0, 0) * 4 + (0, size - len(x))).to(device), y.to(device)
        count = count + (y >= 0).sum()
        for view in range(test.views):
            logits = predict(normalise(x[:, view], data))[:len(y)]
            hits[view] += (logits.argmax(1) == y).sum()
            losses[view] += F.cross_entropy(logits, y, ignore_index=-1, reduction="sum")
    *sums, count, stops = add_up([*map(float, hits + losses), float(count), len(stopped)])
    if stops:
        return None
    if not count:
        fail("not one test image can be decoded")
    found = {}
    for view, (accuracy, loss) in zip(range(test.views), VIEWS.items()):
        found |= {accuracy: 100 * sums[view] / count, loss: sums[test.views + view] / count}
    return found


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


def train_run(config, model, split, folder, device, saved=None, parts=1):
    """Trains, and writes the folder at the end of every epoch; `saved`: the checkpoint of last.pt to go on from.

    parts: how many pieces a process takes its share of a batch in, summing their gradients.
    """
    data, epochs, size, cuda = split["train"], config["epochs"], config["batch_size"], device.type == "cuda"
    steps = len(data) // size                                        # an epoch's; the last, smaller batch is left out
    optimizer = torch.optim.AdamW(parameter_groups(model, config["weight_decay"], config["decay_pe"]), fused=True)
    schedule = {key: config[key] for key in ("epochs", "warmup_epochs", "cooldown_epochs", "lr", "min_lr", "warmup_lr")}
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
    if RANK:                                                         # its dropout is not the first process's
        torch.manual_seed((config["seed"] + epoch * steps + done) * 100_003 + RANK)
    loss_of, predict = step_functions(model, config, device)
    if PROCESSES > 1:
        loss_of = DistributedDataParallel(LossModule(model, loss_of))
    classes, mixing = model.head.out_features, config["mixup"] > 0 or config["cutmix"] > 0
    if config["compile"] != "off":                                   # before the clock starts
        many = size // (PROCESSES * parts)
        x = torch.zeros(many, *model.image_shape, device=device)
        y = torch.zeros((many, classes) if mixing else many, dtype=torch.float if mixing else torch.long, device=device)
        begin = time.perf_counter()
        with torch.random.fork_rng(devices=[device] if cuda else []):
            loss_of(x, y).backward()
        optimizer.zero_grad()
        say(f"compiled  in {time.perf_counter() - begin:.0f} s")
    start = time.perf_counter() - seconds

    def check():
        """By the first process: where one has no finite loss, the next weights of all are not finite."""
        wrong = (~losses[:done].isfinite()).nonzero()
        if RANK == 0 and (len(wrong) or not torch.stack([p.isfinite().all() for p in model.parameters()]).all()):
            at = wrong[0].item() + 1 if len(wrong) else done
            kept = f"last.pt is of epoch {log[-1]['epoch']}" if log else "nothing was saved yet"
            fail(f"the loss is not finite at step {at} of epoch {epoch + 1}: --overwrite with a lower --lr ({kept})")

    def write(first):
        check()
        if RANK == 0:
            contents = dict(model=model.state_dict(), config=config, epoch=epoch, best=best, log=log)
            if log and best["epoch"] == epoch and done == 0:
                save(folder / "best.pt", contents)
            save(folder / "last.pt", dict(
                contents, step=done, optimizer=optimizer.state_dict(), losses=losses[:done].cpu(),
                seconds=time.perf_counter() - start, rng=torch.get_rng_state(),
                device_rng=None if device.type == "cpu" else torch.get_device_module(device).get_rng_state()))
            if first:                                                # only now: here may be the run to overwrite
                for name in ["log.jsonl"] + ["best.pt"] * (not log):
                    (folder / name).unlink(missing_ok=True)
            save_record(folder, config, log)
        agree(0)                                                     # the others wait: if one left, torchrun ended all

    views = list(VIEWS)[:split["test"].views]
    say("\nepoch      loss   test %" + "  full crop" * (len(views) - 1) + "         lr   images/s   seconds")
    bar = tqdm(total=epochs * steps * size, initial=(epoch * steps + done) * size, unit="image", unit_scale=True,
               disable=True if RANK else None)                       # silent without a terminal
    with bar, stop_signals() as stopped:
        while epoch < epochs:
            epoch_done, epoch_start, stop = done, time.perf_counter(), 0
            failures = sum(part.failures for part in split.values())
            shown, losses[done:] = epoch_start, 0
            batches = epoch_batches(config, data, epoch, done, classes, parts) if done < steps else ()
            for number, (x, y) in enumerate(batches):
                last = number % parts == parts - 1
                with nullcontext() if last or PROCESSES == 1 else loss_of.no_sync():
                    if config["compile"] == "graphs":
                        torch.compiler.cudagraph_mark_step_begin()
                    loss = loss_of(x.to(device), y.to(device)) / parts
                    loss.backward()
                losses[done] += loss.detach()
                del x, y                                             # before the next ones are made
                if not last:
                    continue
                lr = lr_at(epoch if config["lr_per"] == "epoch" else epoch + done / steps, **schedule)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                optimizer.step()
                optimizer.zero_grad()
                done += 1
                bar.update(size)
                stop = agree(signal.Signals[stopped[0]] if stopped else 0)
                if stop:
                    break
                if time.perf_counter() > shown + 1:                  # reading a loss waits for the device: seldom
                    check()
                    bar.set_postfix(loss=f"{losses[done - 1].item():.3f}", lr=f"{lr:.2e}", refresh=False)
                    shown = time.perf_counter()
            del batches                                              # before the memory is needed elsewhere
            check()
            speed = (done - epoch_done) * size / (time.perf_counter() - epoch_start)
            if PROCESSES > 1:
                dist.all_reduce(losses)
                losses /= PROCESSES
            model.eval()
            result = None if stop else evaluate(predict, split["test"], config["data"], device, stopped)
            model.train()
            if result is None:
                stop = agree(signal.Signals[stopped[0]] if stopped else 0)
                write(first=not saved and not log)
                bar.close()
                say(f"stopped by {signal.Signals(stop).name} after step {done} of {steps} of epoch {epoch + 1}: saved; "
                    "the same command with --resume goes on")
                raise typer.Exit(128 + stop)
            epoch, done = epoch + 1, 0
            log.append(dict(epoch=epoch, loss=losses.mean().item(), **result, lr=optimizer.param_groups[0]["lr"],
                            processes=PROCESSES, images_per_second=speed, seconds=time.perf_counter() - start))
            if config["data"] == "imagenet":
                log[-1]["unreadable"] = int(*add_up([sum(part.failures for part in split.values()) - failures]))
            if result["test_accuracy"] > best["test_accuracy"]:
                best = dict(epoch=epoch, test_accuracy=result["test_accuracy"])
            write(first=not saved and len(log) == 1)
            tested = "".join(f" {result[view]:>{8 + 2 * (view != views[0])}.2f}" for view in views)
            if RANK == 0:
                bar.write("{epoch:>5} {loss:>9.4f}{tested} {lr:>10.2e} {images_per_second:>10,.0f} {seconds:>9.0f}"
                          .format(**log[-1], tested=tested))
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
    """-> torch.device of --device; auto is an accelerator where there is one; of several processes each has a GPU."""
    name = (accelerator() or "cpu") if name == "auto" else name
    if name.split(":")[0] not in ("cpu", "cuda", "mps", "xpu"):
        fail(f"unknown --device {name!r}: choose from auto, cpu, cuda, mps, xpu")
    if PROCESSES > 1 and name not in ("cpu", "cuda"):
        fail(f"--device {name} is for one process: take cuda or cpu with torchrun")
    name = f"cuda:{LOCAL_RANK}" if name == "cuda" and PROCESSES > 1 else name
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
    device, method = usable_device(flags["device"]).type, flags["method"]
    data, cuda = flags["data"] or ("numbers" if device == "cpu" else "cifar100"), device == "cuda"
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
    if data == "imagenet" and flags["lr"] is None:
        recipe["lr"] *= recipe["batch_size"] / RECIPES[data]["batch_size"]
    for key in ("warmup_epochs", "cooldown_epochs"):                 # short runs warm up and cool down shortly
        if flags[key] is None:
            recipe[key] = type(recipe[key])(min(recipe[key], recipe["epochs"] / 10))
    if data != "imagenet" and recipe["image_size"] != 32:
        fail(f"{data} has images of 32x32: --image-size is for --data imagenet")
    if data != "imagenet" and MODELS.get(recipe["model"], dict(image_size=32)).get("image_size") != 32:
        fail(f"{recipe['model']} takes images of 224x224, {data} has 32x32: use vit-lite or vit-nano")
    pair, parts = 1 + bool(recipe["mixup"] or recipe["cutmix"]), flags["accumulate"]
    if recipe["batch_size"] % (PROCESSES * parts * pair):
        fail(f"--batch-size {recipe['batch_size']} is not a multiple of {PROCESSES * parts * pair}: processes "
             f"({PROCESSES}) x --accumulate ({parts})" + " x 2, as images are mixed in pairs" * (pair - 1))
    if recipe["warmup_epochs"] + recipe["cooldown_epochs"] >= recipe["epochs"]:
        fail("--warmup-epochs and --cooldown-epochs leave nothing of --epochs {epochs}: lower them".format(**recipe))
    if flags["resume"] and flags["overwrite"]:
        fail("--resume goes on with a run and --overwrite replaces it: give one")
    if flags["compile"] == "graphs" and (not cuda or PROCESSES > 1):
        fail("--compile graphs needs CUDA and one process: use --compile on, or off")
    if flags["freeze"] and not flags["init"]:
        fail("--freeze trains the head alone: --init says which weights it keeps")
    config = dict(data=data, num_classes=100, method=method, overrides=overrides, seed=flags["seed"], **recipe)
    if data == "imagenet":
        classes = class_names(flags["data_dir"])
        config |= dict(num_classes=len(classes), classes=digest(classes))
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
    keys = "image_size", "num_classes", "drop_path", "attn_drop"     # the model's own where None, or an older run's
    changes = {key: config[key] for key in keys if config.get(key) is not None} | changes
    try:
        return create(config["model"], config["method"], **config["overrides"], **changes)
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
    return dict(device=str(device), device_name=name, threads=torch.get_num_threads(), processes=PROCESSES,
                torch=str(torch.__version__), torchvision=torchvision.__version__, python=platform.python_version(),
                git=git)


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


def found_run(folder, config, resume, overwrite):
    """-> the checkpoint to go on from, or None for a new run; a folder that is neither ends the program."""
    if resume and (folder / "last.pt").exists():
        saved = read(folder / "last.pt")
        changed = [f"{key} was {saved['config'].get(key)}, is {config[key]}" for key in config
                   if saved["config"].get(key) != config[key]]
        if changed:
            fail(f"{folder} was trained with other flags: {'; '.join(changed)} (give those, or another --name)")
        save_record(folder, saved["config"], saved["log"])           # a kill may have come before them
        return saved
    if folder.is_dir() and any(folder.iterdir()) and not (resume or overwrite):
        fail(f"{folder} exists: --resume goes on with it, --overwrite replaces it, --name chooses another")
    return None


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
        "Data", "numbers: built in, drawn in seconds. cifar100: downloaded where absent. imagenet: files of "
        "--data-dir.", of="numbers on a CPU, else cifar100"),
    data_dir: Path = flag("Data", "Where cifar100 is or goes; where train/CLASS/*.JPEG and val/CLASS/*.JPEG are.",
                          value=Path("data")),
    fraction: float = flag("Data", "Part of each class's training images to use.", value=1.0, min=0, max=1),
    image_size: int | None = flag("Data", "Pixels a side that imagenet's files are cropped to.", of="image_size",
                                  min=1),
    workers: int | None = flag("Data", "Processes that decode imagenet's files, for each training process.",
                               of="the cores, shared; on a CPU 0", min=0),
    repeats: int | None = flag("Data", "Repeated augmentation: crops of an image in an epoch, of fewer images.",
                               of="repeats", min=1),
    crop_scale: float | None = flag("Data", "Random crop: least area; 1: none.", of="crop_scale", min=0.01, max=1),
    bicubic: float | None = flag("Data", "Probability of bicubic interpolation, else it is linear.", of="bicubic",
                                 min=0, max=1),
    flip: float | None = flag("Data", "Probability of a horizontal flip.", of="flip", min=0, max=1),
    ra_ops: int | None = flag("Data", "RandAugment: operations an image (p 0.5 each).", of="ra_ops", min=0, max=15),
    ra_magnitude: float | None = flag("Data", "RandAugment: mean strength.", of="ra_magnitude", min=0, max=10),
    mixup: float | None = flag("Data", "Mixup's alpha; with CutMix, a step takes either.", of="mixup", min=0),
    cutmix: float | None = flag("Data", "CutMix's alpha.", of="cutmix", min=0),
    erase: float | None = flag("Data", "Probability of erasing a box.", of="erase", min=0, max=1),
    erase_first: bool | None = flag("Data", "Is a box erased before images are mixed?", of="erase_first"),
    epochs: int | None = flag("Recipe", "Passes over the training images, all in all.", of="epochs", min=1),
    batch_size: int | None = flag("Recipe", "Images a step, of all processes together.", of="batch_size", min=1),
    lr: float | None = flag("Recipe", "Peak learning rate of AdamW; imagenet's, unless given, in proportion to "
                            "--batch-size.", of="lr", min=0),
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
    accumulate: int = flag("Run", "Take a step's images in that many parts, where memory is short: the same result.",
                           value=1, min=1),
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
        if PROCESSES > 1:
            fail(f"{ctx.invoked_subcommand} takes one process: start it without torchrun")
        return
    config, device = configure(flags), usable_device(device)
    folder = run_folder(flags, config)
    say(f"data      {config['data']}" + ("" if data else " (as --data is not given)")
        + f", device {device}" + f" and {PROCESSES - 1} more" * (PROCESSES > 1))
    torch.manual_seed(seed)
    vit = build(config)
    toggles = METHODS[config["method"]] | config["overrides"]
    say(f"method    {label(config)}: " + ", ".join(f"{key}={value}" for key, value in toggles.items()))
    if PROCESSES > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        train_here(flags, config, vit, folder, device)
    except typer.Exit:                                               # a RuntimeError, too
        raise
    except torch.OutOfMemoryError:
        fail(f"{device} is out of memory: raise --accumulate, lower --batch-size, or --jobs of a sweep")
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        if "DataLoader worker" in reason:
            fail(f"a worker process has ended ({reason}): is memory, or shared memory, short? Lower --workers")
        if config["compile"] != "off" and isinstance(error, torch._dynamo.exc.BackendCompilerFailed):
            fail(f"torch.compile does not work here ({reason}): --compile off")  # no C++ compiler, or no Triton
        if PROCESSES == 1 or not isinstance(error, dist.DistError) and "gloo" not in str(error).lower():
            raise
        reason = reason.split("] ", 1)[-1].split(". ")[0]            # of gloo's, without its file and its advice
        fail(f"process {RANK} of {PROCESSES} has lost another one, which may have said why ({reason}); what was saved "
             "is whole, --resume goes on")
    if PROCESSES > 1:
        dist.destroy_process_group()


def train_here(flags, config, vit, folder, device):
    """One process's part of a run, from its flags to the last line."""
    box = [found_run(folder, config, flags["resume"], flags["overwrite"]) if RANK == 0 else None]
    if PROCESSES > 1:                                                # the first one's disk may be its own
        dist.broadcast_object_list(box, device=torch.device("cpu"))
    saved, init = box[0], flags["init"]
    if saved and saved["epoch"] == config["epochs"]:
        say(f"run       {folder} is finished: test accuracy {saved['log'][-1]['test_accuracy']:.2f} %")
        return
    if init and not saved:
        head, source = copy.deepcopy(vit.head), checkpoint_of(init)
        try:
            load_weights(vit, source, new_head=True)
            trained = read_checkpoint(source)
        except OSError as error:
            fail(f"--init {source} cannot be read ({error.strerror})")
        except ValueError as error:
            fail(f"--init: {error}")
        trained = trained.get("config")
        if isinstance(trained, dict) and any(trained.get(key) != config.get(key) for key in ("data", "classes")):
            vit.head = head                                          # other classes, even where they are as many
        kept = "its head, too" if (vit.head.weight != head.weight).any() else "with a new head"
        say(f"init      {source}, {kept}")
    vit.requires_grad_(not config["freeze"]).to(device).head.requires_grad_(True)
    split = None
    # One downloads, then one on every machine; files are there.
    for turn in [True] if config["data"] == "imagenet" else (RANK == 0, LOCAL_RANK == 0, True):
        if turn and not split:
            split = load_data(config, flags["data_dir"], device, flags["workers"])
        agree(0)                                                     # waits for the others
    count, size, parts = len(split["train"]), config["batch_size"], flags["accumulate"]
    if size > count:
        fail(f"--batch-size {size} is more than the {count} training images (--fraction {config['fraction']:g})")
    if saved and saved["config"].get("images", count) != count:
        fail(f"{folder} was trained on {saved['config']['images']} images, here are {count}: give its --data-dir, or "
             "another --name")
    config |= dict(images=count, environment=environment(device) | dict(accumulate=parts))
    if RANK == 0:
        make_folder(folder, "--runs")
        if not (folder / "last.pt").exists():                        # an --overwrite waits until it has something
            save_record(folder, config, [])

    decayed, free = ([p.numel() for p in group["params"]] for group in parameter_groups(vit, 0, config["decay_pe"]))
    frozen = [p.numel() for p in vit.parameters() if not p.requires_grad]
    say(f"model     {config['model']}, parameters (tensors): {sum(decayed):,} ({len(decayed)}) decayed, "
        f"{sum(free):,} ({len(free)}) not, {sum(frozen):,} ({len(frozen)}) frozen\n"
        f"images    {count:,} to train, {len(split['test']):,} to test\n"
        f"batch     {size} images = {PROCESSES} (processes) x {parts} (parts) x {size // PROCESSES // parts}; peak lr "
        f"{config['lr']:g}\nrun       {folder}"
        + (f", on from step {saved['step']} of epoch {saved['epoch'] + 1}" if saved else ""))
    log, best = train_run(config, vit, split, folder, device, saved, parts)
    full = f"; at a full crop {log[-1]['full_crop_accuracy']:.2f} %" if "full_crop_accuracy" in log[-1] else ""
    if unreadable := log[-1].get("unreadable"):
        say(f"\nin the last epoch {unreadable} times a file could not be decoded")
    say(f"\nweights in {folder / 'last.pt'}\ntest accuracy {log[-1]['test_accuracy']:.2f} % after the last of "
        f"{config['epochs']} epochs (best: {best['test_accuracy']:.2f} % after epoch {best['epoch']}){full}")


# --------------------------------------------------------------------------------------------------------------- sweep

T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


def interval(values):
    """-> half the width of the 95 % confidence interval of a mean (Student's t), of at least two values."""
    n = len(values)
    return (T95[n - 2] if n - 2 < len(T95) else 1.96 + 2.4 / (n - 1)) * stdev(values) / n ** 0.5


def setting(config):
    """-> what a table of runs is headed with: all that is not the recipe's, but for method and seed; is nothing?"""
    usual = dict(RECIPES[config["data"]], drop_path=None, attn_drop=None, fraction=1.0, freeze=False, init=None,
                 num_classes=1000 if config["data"] == "imagenet" else 100)
    unusual = [key for key in usual if config.get(key, usual[key]) != usual[key]]    # an older run lacks newer flags
    title = ["{model}, {data}, {epochs} epochs, {precision}".format(**config)]
    return ", ".join(title + [f"{key} {config[key]}" for key in unusual if key not in ("model", "epochs")]), not unusual


def finished_runs(folders):
    """-> folder: (configuration, log) of each folder that holds a finished run."""
    found = {}
    for folder in folders:
        if (folder / "config.json").exists() and (folder / "log.jsonl").exists():
            try:
                config = json.loads((folder / "config.json").read_text())
                log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
                setting(config)                                      # knows what a configuration holds
                if log and log[-1]["epoch"] == config["epochs"]:
                    found[folder] = config, log
            except (OSError, ValueError, KeyError, TypeError) as error:
                fail(f"{folder} is no run of this train.py ({error!r}): move it elsewhere")
    return found


def spread(values, digits=2):
    """-> text: the mean of the values, and where they are several their standard deviation."""
    return f"{mean(values):.{digits}f}" + (f" +- {stdev(values):.{digits}f}" if len(values) > 1 else "")


def as_table(title, head, lines):
    """-> text: a table in Markdown; lines: lists of cells, as head."""
    lines = [head, ["-" * len(cell) for cell in head], *lines]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return f"{title}\n\n" + "".join("| " + " | ".join(map(str.ljust, line, widths)) + " |\n" for line in lines) + "\n"


def in_order(rows, order=tuple(METHODS)):
    """-> the dict, its labels in the given order, others by name after them."""
    return dict(sorted(rows.items(), key=lambda row: ([*order, row[0]].index(row[0]), row[0])))


def results(runs, order=tuple(METHODS), base=None):
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
        rows, lines = in_order(rows, order), []
        first = base or next(iter(rows))
        full = all("full_crop_accuracy" in log[-1] for seeds in rows.values() for _, log in seeds.values())
        for name, seeds in rows.items():
            config, logs = next(iter(seeds.values()))[0], [log for _, log in seeds.values()]
            pairs = [seeds[seed][1][-1]["test_accuracy"] - log[-1]["test_accuracy"]
                     for seed, (_, log) in rows.get(first, {}).items() if seed in seeds and name != first]
            with torch.device("meta"):
                count = sum(p.numel() for p in build(config).parameters())
            published = paper[title].get(name)
            lines.append([
                name, str(len(logs)), spread([log[-1]["test_accuracy"] for log in logs]),
                (f"{mean(pairs):+.2f}" if pairs else "") + (f" +- {interval(pairs):.2f}" if len(pairs) > 1 else ""),
                f"{mean(max(line['test_accuracy'] for line in log) for log in logs):.2f}",
                *[f"{mean(log[-1]['full_crop_accuracy'] for log in logs):.2f}" for _ in range(full)],
                f"{mean(log[-1]['seconds'] for log in logs):.0f}", f"{count:,}",
                f"{published:.2f}" if published else ""])
        text += as_table(title, ["method", "n", "last epoch %", f"minus {first}", "best epoch %",
                                 *["full crop %"] * full, "seconds", "parameters", "paper %"], lines)
    return text + ("Test accuracy: mean +- standard deviation over n seeds. Difference: of pairs with the same seed, "
                   "+- half\nthe 95 % confidence interval. Best epoch: chosen by test accuracy. Seconds: of a run.\n")


def mechanism(runs):
    """(row's name, configuration, what report.json says of a run) of each -> text: for each setting two tables."""
    settings, text = {}, ""
    for name, config, found in runs:
        settings.setdefault(setting(config)[0], {}).setdefault(name, []).append(found)
    for title, rows in settings.items():
        norm, layers = [], []
        for name, founds in in_order(rows).items():
            norm.append([name, str(len(founds)), *(spread([found[key] for found in founds], digits) for key, digits in
                                                   dict(beta_variance=5, offset_variance=5, cosine=3).items())])
            layers.append([name])
            for layer in zip(*(found["correlation"] for found in founds)):
                values = [value for value in layer if value is not None]
                layers[-1].append(f"{mean(values):+.2f}" if values else "")
        text += as_table(f"{title}: last norm", ["method", "n", "beta variance", "offset variance", "cosine"], norm)
        text += as_table(f"{title}: correlation in blocks",
                         ["method", *map(str, range(len(layers[0]) - 2)), "last norm"], layers)
    return text + ("Of the last norm: variance of its bias beta and of the effective offset, beta + mean of LN'(pos_0);"
                   " cosine of\nan image's mean token before and after it: mean +- standard deviation over n runs."
                   " Correlation: of LN(x),\naveraged over images, with the PE that joins it, mean over the runs.\n")


@app.command(context_settings=dict(allow_extra_args=True, ignore_unknown_options=True))
def sweep(
    ctx: typer.Context,
    methods: str = flag("Sweep", f"Rows, with commas between: {', '.join(METHODS)}.", value="default,lape,pvg,mpvg"),
    set_: Literal[tuple(SETS)] | None = flag("Sweep", "Instead: the rows of a figure or table of the paper, or our "
                                             "controls.", "--set", of="none"),
    seeds: int = flag("Sweep", "Seeds 0 to N - 1 of each row.", value=3, min=1),
    jobs: int = flag("Sweep", "Runs side by side; each one's output goes to RUNS/NAME.txt.", value=1, min=1),
    base: str | None = flag("Sweep", "The row that the others' differences are to.", of="the first"),
    from_: Path | None = flag("Sweep", "Only print the table of that folder's finished runs; with what `report` has "
                              "measured of them, if that is in its report/.", "--from", of="none"),
):
    """Train every row with every seed, or go on where a sweep was stopped; print a table, write it to RUNS/sweep.md.

    Takes the flags of `python train.py`, too, for all of its runs, but for those that name one run.
    """
    if from_:
        if ctx.args or {*given_flags(ctx)} - {"from-", "base"}:
            fail("--from prints what is there: leave out the other flags, but for --base")
        runs, measured = finished_runs(sorted(from_.glob("*/"))), from_ / "report" / "report.json"
        if not runs:
            fail(f"{from_} holds no finished run (folders with a config.json and a whole log.jsonl)")
        if base not in (None, *(rows := dict.fromkeys(label(config) for config, _ in runs.values()))):
            fail(f"{from_} holds no finished run of --base {base}, but of {', '.join(rows)}")
        text = results(runs.values(), base=base)
        if measured.exists():
            try:
                found = json.loads(measured.read_text())
                known = {folder: run for folder, run in runs.items() if folder.name in found
                         and found[folder.name]["test_accuracy"] == run[1][-1]["test_accuracy"]}
                text += "\n" + mechanism((label(config), config, found[folder.name])
                                         for folder, (config, _) in known.items()) if known else ""
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                fail(f"{measured} is not what this train.py's report writes ({error!r}): make it anew")
            if missing := ", ".join(folder.name for folder in runs if folder not in known):
                text += f"\n{measured} is not of these runs as they are now: {missing}\n"
        typer.echo(text)
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
    labels = [label(config) for config, _ in planned.values()]
    if base not in (None, *labels):
        fail(f"--base {base} is none of this sweep's rows: {', '.join(dict.fromkeys(labels))}")
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
                    if jobs > 1 and not stopped:
                        bar.write(f"{'failed, see' if folder in broken else 'finished'} {folder}.txt")
            time.sleep(0.2)
    if stopped:
        typer.echo(f"stopped by {stopped[0]}: the same command goes on from there")
        raise typer.Exit(128 + signal.Signals[stopped[0]])
    done = finished_runs(folder for folder in planned if folder not in broken)
    if done:
        save(runs / "sweep.md", results(done.values(), labels, base or labels[0]))
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
    data_dir: Path = flag(None, "Where cifar100 is or goes; the folder with imagenet's val/.", value=Path("data")),
    device: str = flag(None, "auto, cpu, cuda, mps or xpu.", value="auto"),
):
    """Measure a run's test accuracy and loss again."""
    device = usable_device(device)
    model, saved = load_run(run, device, **(dict(image_size=image_size) if image_size else {}))
    model, config = fold(model) if fold_ else model, saved["config"]
    predict = step_functions(model, config | dict(compile="off"), device)[1]
    resize = partial(F.interpolate, size=model.image_shape[1:], mode="bicubic", antialias=True)
    test = load_data(config | dict(image_size=model.image_shape[1]), data_dir, device, splits=["test"])["test"]
    found = evaluate(lambda x: predict(x if x.shape[1:] == model.image_shape else resize(x)), test, config["data"],
                     device)
    full = " (at a full crop {full_crop_accuracy:.2f} %, {full_crop_loss:.4f})" if "full_crop_loss" in found else ""
    typer.echo(f"{label(config)}, {config['model']}, {config['data']}, seed {config['seed']}, epoch {saved['epoch']}: "
               f"test accuracy {found['test_accuracy']:.2f} %, loss {found['test_loss']:.4f}{full.format(**found)}, "
               f"{len(test):,} images")


@torch.no_grad()
def measure(model, batches):
    """What the paper draws of a trained model, from normalised images (B, 3, H, W) -> a dict.

    tokens, pe: of each block and the last norm, LN_l(x_l) averaged over images, and the PE that joins it, (N, D) or
    None; correlation: Pearson's, of all entries of those two (Figure 4); beta, gamma: the last norm's, (D); offset:
    beta + mean of LN'(pos_0) (README, fact 3); cosine: similarity of an image's mean token before and after the last
    norm, averaged over images (the paper's appendix).
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
    pe = [None if e is None else e.detach().expand(1, *tokens.shape[1:])[0].cpu() for e in (*per_block, last)]
    correlation = [None if e is None or e.min() == e.max() else  # nothing varies, nothing correlates
                   torch.corrcoef(torch.stack([t.flatten(), e.flatten()]))[0, 1].item() for t, e in zip(tokens, pe)]
    beta, gamma = model.norm.bias.detach().cpu(), model.norm.weight.detach().cpu()
    return dict(tokens=[*tokens], pe=pe, correlation=correlation, cosine=torch.cat(cosines).mean().item(), beta=beta,
                gamma=gamma, offset=beta if last is None else beta + pe[-1].mean(0))


def draw(out, runs):
    """Writes the figures; runs: name -> (configuration, log, what measure() found)."""
    from matplotlib.figure import Figure
    kinds = [*in_order(dict.fromkeys(label(config) for config, _, _ in runs.values()))]

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
        width = 4 * len(panels) + 1 + 0.085 * max(map(len, kinds))   # the legend takes what it needs
        figure, drawn = Figure(figsize=(width, 3.6), layout="constrained"), {}
        for ax, (title, across, up, points) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
            for config, log, found in runs.values():
                x, y = points(log, found)
                if {*y} != {None}:                                   # matplotlib leaves gaps where y is None
                    style = dict(marker=".", ms=4, lw=1, alpha=0.8, color=f"C{kinds.index(label(config))}")
                    drawn[label(config)], = ax.plot(x, y, **style)
            ax.set(title=title, xlabel=across, ylabel=up)
            ax.xaxis.get_major_locator().set_params(integer=True)
            ax.grid(alpha=0.3)
        drawn = in_order(drawn)
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
    out: Path = flag(None, "Folder for report.json and the figures.", value=Path("runs/report")),
    images: int = flag(None, "Test images to average over.", value=1000, min=1),
    data_dir: Path = flag(None, "Where cifar100 is or goes; the folder with imagenet's val/.", value=Path("data")),
    device: str = flag(None, "auto, cpu, cuda, mps or xpu.", value="auto"),
):
    """Measure and draw what the paper draws: curves, correlation of tokens and PE by layer, heatmaps, the last norm.

    The figures need matplotlib; the numbers, in OUT/report.json, do not.
    """
    device, runs, rows, tests = usable_device(device), {}, {}, {}
    trained = [path for path in run if not path.is_dir() or checkpoint_of(path).exists()] or run
    if left := [str(path) for path in run if path not in trained]:   # runs/*/ takes in an earlier report, too
        typer.echo(f"note: left out, without a last.pt: {', '.join(left)}", err=True)
    for path in trained:
        model, saved = load_run(path, device)
        data, whole = saved["config"]["data"], path.resolve()
        name = whole.name if path.is_dir() else f"{whole.parent.name}-{whole.stem}"
        row = label(saved["config"]) if path.is_dir() else name
        seed = setting(saved["config"])[0], row, saved["config"]["seed"]
        if name in runs or seed in rows.values():
            fail(f"two runs are called {name}, or are {row} with the same flags and seed: report them apart")
        key = data, saved["config"].get("image_size")
        if key not in tests:
            test = load_data(saved["config"], data_dir, device, splits=["test"])["test"].test_batches(100)
            tests[key] = torch.cat([x[y >= 0, 0] for x, y in itertools.islice(test, -(-images // 100))])[:images]
        found = measure(model, (normalise(x.to(device), data) for x in tests[key].split(100)))
        runs[name], rows[name] = (saved["config"], saved["log"], found), seed
    vectors = "beta", "gamma", "offset"
    summary = {name: dict(test_accuracy=log[-1]["test_accuracy"] if log else None)
               | {key: found[key] for key in ("correlation", "cosine")}
               | {f"{key}_variance": found[key].var().item() for key in vectors}
               | {key: found[key].tolist() for key in vectors}
               for name, (_, log, found) in runs.items()}
    make_folder(out, "--out")
    save(out / "report.json", json.dumps(summary) + "\n")
    typer.echo(mechanism((rows[name][1], config, summary[name]) for name, (config, _, _) in runs.items()))
    try:
        draw(out, runs)
    except ImportError as error:
        typer.echo(f"numbers in {out / 'report.json'}; the figures need matplotlib ({error}): pip install matplotlib")
    else:
        typer.echo(f"numbers and figures in {out}")


if __name__ == "__main__":
    app()
