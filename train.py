"""Train the Vision Transformers of mpvg.py: one run, or a sweep over methods and seeds; print tables, draw figures.

    python train.py --pe layerwise --pool gap --mpvg               # MPVG; plain `python train.py` does the same
    python train.py --data cifar100 --method lape                  # another method of the paper, by name
    torchrun --nproc_per_node 4 train.py --data imagenet --data-dir DIR
    python train.py sweep --methods default,lape,pvg,mpvg --seeds 3
    python train.py eval runs/NAME
    python train.py report runs/*/

From top to bottom: recipes, data, augmentation, batches, training (its loop is `fit`), checkpoints, command line,
sweep, tables, eval and report. `numbers` is a built-in data set: no download, and it trains in minutes on a CPU.
"""
import dataclasses
import io
import itertools
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache, partial
from pathlib import Path
from statistics import mean, stdev
from typing import Literal, NamedTuple

# OpenMP's threads busy-wait for each other, which is slow where other work shares the cores: shorten the wait.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # read when torch is first imported

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
import typer
from PIL import Image, ImageDraw, ImageFont
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import find_classes
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import functional as v2
from tqdm import tqdm

from mpvg import METHODS, MODELS, ViT, create, fold, load_weights, read_checkpoint, state_dict_of

# torchrun sets these.
RANK = int(os.environ.get("RANK", 0))              # number of this process
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))  # its number on its machine
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))  # how many processes there are


# ------------------------------------------------------------------------------------------------------------- recipes

@dataclasses.dataclass(frozen=True)
class Recipe:
    """A training recipe. `--recipe mixup=0,erase=0.1` replaces the values that it names."""
    epochs: int                      # of len(images) // batch_size steps; warm-up and cool-down included
    batch_size: int                  # images per step, over all processes
    lr: float                        # AdamW's peak learning rate
    weight_decay: float              # of matrices; biases and norms are not decayed
    decay_pe: bool                   # are PE tables and the class token decayed as well?
    min_lr: float = 1e-5             # where the cosine ends, and the cool-down's learning rate
    warmup_lr: float = 1e-6          # where the linear warm-up starts
    warmup_epochs: float = 0.0
    cooldown_epochs: int = 0         # the last epochs, at min_lr
    lr_per: str = "epoch"            # how often the learning rate changes: epoch or step
    label_smoothing: float = 0.0
    repeats: int = 1                 # repeated augmentation: crops per image; an epoch shows 1/repeats of the images
    crop_scale: float = 1.0          # least area of a random crop, as a share of the image; 1: arrays are not cropped
    bicubic: float = 0.5             # probability of bicubic interpolation; bilinear otherwise
    flip: float = 0.0                # probability of a horizontal flip
    ra_ops: int = 0                  # RandAugment's operations per image, each applied with probability 0.5
    ra_magnitude: float = 9.0        # their mean strength, from 0 to 10; its standard deviation is 0.5
    mixup: float = 0.0               # alpha of mixup's Beta distribution; with CutMix, each step takes one of the two
    cutmix: float = 0.0              # alpha of CutMix's Beta distribution
    erase: float = 0.0               # probability of random erasing
    erase_first: bool = False        # True: erase, then mix (DeiT); False: mix, then erase (ViT-Lite)

    def __post_init__(self):
        least = dict(epochs=1, batch_size=1, repeats=1, crop_scale=0.01)
        greatest = dict(label_smoothing=1, crop_scale=1, bicubic=1, flip=1, erase=1, ra_ops=15, ra_magnitude=10)
        for field in dataclasses.fields(self):
            value, low, high = getattr(self, field.name), least.get(field.name, 0), greatest.get(field.name, 1e6)
            kinds = (int, float) if field.type is float else (field.type,)
            if type(value) not in kinds:
                raise ValueError(f"{field.name}={value} is not of type {field.type.__name__}")
            if field.type is not str and not low <= value <= high:
                raise ValueError(f"{field.name}={value} must be between {low} and {high:g}")
        if 0 < self.mixup < 0.01 or 0 < self.cutmix < 0.01:
            raise ValueError("mixup and cutmix are 0 or at least 0.01")
        if self.lr_per not in ("epoch", "step"):
            raise ValueError(f"lr_per={self.lr_per} is neither epoch nor step")

    @property
    def mixes(self):
        return self.mixup > 0 or self.cutmix > 0


# ---------------------------------------------------------------------------------------------------------------- data

def numbers(count, seed):
    """-> uint8 images (count, 3, 32, 32) of the two-digit numbers 00 to 99 and labels (count,), repeatable by seed.

    Each is rotated by up to 9 degrees, scaled by 0.8 to 1.1 and shifted by up to 4 pixels, dark on light or light on
    dark, with noise. A model needs position to tell 12 from 21.
    """
    font = ImageFont.load_default(size=26)
    masks = torch.zeros(100, 1, 32, 32)
    for number in range(100):
        mask = Image.new("L", (32, 32))
        ImageDraw.Draw(mask).text((16, 16), f"{number:02d}", fill=255, font=font, anchor="mm")
        masks[number] = v2.pil_to_tensor(mask) / 255

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


def load_cifar100(root, train):
    try:
        data = torchvision.datasets.CIFAR100(root, train=train, download=True)
    except (OSError, RuntimeError) as error:
        raise SystemExit(f"error: CIFAR-100 is not in {root} and could not be downloaded ({error}): set --data-dir "
                         "to the folder that holds cifar-100-python; --data numbers needs no download") from None
    return torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(data.targets)


@dataclasses.dataclass(frozen=True)
class DataSpec:
    load: Callable | None            # (folder, train) -> uint8 images (N, 3, S, S), labels (N,); None: image files
    recipe: Recipe
    model: str                       # default preset, of mpvg.MODELS
    image_size: int                  # of arrays; for image files the default
    num_classes: int | None          # None: counted
    mean: tuple                      # of each channel, of values from 0 to 1
    std: tuple


# cifar100: ViT-Lite's recipe, Compact-Transformers' cifar100.yml. imagenet: DeiT's main.py, where lr is
# 5e-4 for every 512 images of a batch. To add a data set in memory, write a loader and a row.
DATASETS = {
    "numbers": DataSpec(
        lambda root, train: numbers(30_000, seed=1) if train else numbers(4_000, seed=2),
        model="vit-nano", image_size=32, num_classes=100, mean=(0.5, 0.5, 0.5), std=(0.3, 0.3, 0.3),
        recipe=Recipe(epochs=6, batch_size=128, lr=2e-3, warmup_epochs=0.6, lr_per="step", weight_decay=0.05,
                      decay_pe=False)),
    "cifar100": DataSpec(
        load_cifar100, model="vit-lite", image_size=32, num_classes=100,
        mean=(0.5071, 0.4867, 0.4408), std=(0.2675, 0.2565, 0.2761),
        recipe=Recipe(epochs=310, batch_size=128, lr=6e-4, warmup_epochs=10.0, cooldown_epochs=10, weight_decay=0.06,
                      decay_pe=True, label_smoothing=0.1, crop_scale=0.8, flip=0.5, ra_ops=2, mixup=0.8, cutmix=1.0,
                      erase=0.25)),
    "imagenet": DataSpec(
        None, model="deit-tiny", image_size=224, num_classes=None,
        mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225),
        recipe=Recipe(epochs=300, batch_size=1024, lr=1e-3, warmup_epochs=5.0, weight_decay=0.05, decay_pe=False,
                      label_smoothing=0.1, repeats=3, crop_scale=0.08, bicubic=1.0, flip=0.5, ra_ops=2, mixup=0.8,
                      cutmix=1.0, erase=0.25, erase_first=True)),
}


def to_device(tensor, device):
    """-> the tensor on the device; the host does not wait for a GPU."""
    if device.type == "cuda":
        return tensor.contiguous().pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class ArrayData:
    """Images in memory, uint8 (N, 3, H, W), and labels (N,), on the device where they are augmented."""

    def __init__(self, images, labels, device="cpu"):
        self.images, self.labels, self.unreadable = images.to(device), labels.to(device), 0

    def __len__(self):
        return len(self.labels)

    def chunks(self, order, seeds, columns):
        """Yields (the first step's seed, images (S, B, 3, H, W), labels (S, B)) of S steps, for one call of prepare().

        order: indices, (steps, batch size); seeds: one per step; columns: this process's part of each batch, a slice.
        """
        # About 8 M pixels of whole batches: the same chunks for any number of processes.
        steps = max(1, 2**23 // (order.shape[1] * self.images.shape[2] * self.images.shape[3]))
        for seed, rows in zip(seeds[::steps], order[:, columns].split(steps)):
            rows = to_device(rows, self.images.device)
            yield seed, self.images[rows], self.labels[rows]

    def test_batches(self, start=0, stride=1, batch_size=500):
        """Yields every `stride`-th image from `start` on: images (B, 3, H, W), labels (B,)."""
        images, labels = self.images[start::stride], self.labels[start::stride]
        yield from zip(images.split(batch_size), labels.split(batch_size))


@lru_cache(2)  # with repeated augmentation two images alternate
def decode(path):
    return v2.pil_to_tensor(Image.open(path).convert("RGB"))         # uint8 (3, height, width)


@cache  # once for each file and process; workers are new in each epoch
def warn(path, reason):
    tqdm.write(f"warning: {path} cannot be decoded and is skipped ({reason})", sys.stderr)


@dataclasses.dataclass
class FolderData(Dataset):
    """Image files that worker processes decode and crop."""
    samples: list                    # (path, label) of each image
    size: int                        # of the square crops
    device: torch.device             # where batches go
    workers: int
    crop_scale: float | None         # least area of a random crop; None for testing: the centre is cropped
    bicubic: float                   # probability of bicubic interpolation; bilinear otherwise
    crop_ratio: float                # for testing: the crop's side, as a share of the image's short side
    unreadable: int = 0              # how often a file could not be decoded in the last epoch

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index_and_seed):
        """-> uint8 image (3, size, size), label, how many files could not be decoded.

        A training image that cannot be decoded is replaced by the next one. A test image is not: raises OSError.
        """
        index, seed = index_and_seed
        for skipped in range(20):
            path, label = self.samples[(index + skipped) % len(self.samples)]
            try:
                image = decode(path)
            except Exception as error:                               # a damaged file can fail in any way
                reason = str(error) or type(error).__name__
                if self.crop_scale is None:
                    raise OSError(f"test image {path} cannot be decoded ({reason}): replace or delete it") from None
                warn(path, reason)
            else:
                return self.crop(image, seed), label, skipped
        raise OSError(f"{path} and the 19 files before it cannot be decoded: is the disk mounted?")

    def crop(self, image, seed):
        """uint8 image (3, height, width) -> (3, size, size). A random crop depends on its seed only."""
        if self.crop_scale is None:
            image = v2.resize(image, [int(self.size / self.crop_ratio)], InterpolationMode.BICUBIC)
            return v2.center_crop(image, [self.size])
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            box = RandomResizedCrop.get_params(image, [self.crop_scale, 1.0], [3 / 4, 4 / 3])
            mode = InterpolationMode["BICUBIC" if torch.rand(()) < self.bicubic else "BILINEAR"]
        return v2.resized_crop(image, *box, [self.size] * 2, mode)

    def read_batches(self, plan):
        """Yields uint8 images (B, 3, size, size) and labels (B,) for each list of (index, seed) in the plan."""
        # Forked workers share the list of samples. Python 3.14's default on Linux copies it to each, every epoch.
        context = "fork" if self.workers and sys.platform == "linux" else None
        loader = DataLoader(self, batch_sampler=plan, num_workers=self.workers, pin_memory=self.device.type == "cuda",
                            multiprocessing_context=context,
                            generator=torch.Generator())             # not the global one, which dropout uses
        self.unreadable = 0
        for images, labels, unreadable in loader:
            self.unreadable += int(unreadable.sum())
            yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)

    def chunks(self, order, seeds, columns):
        """See ArrayData.chunks. A chunk is one step."""
        # A crop's seed: its step's seed + 1 + its place in the whole batch, whichever process makes it.
        crop_seeds = torch.tensor(seeds)[:, None] + 1 + torch.arange(order.shape[1])
        plan = torch.stack([order, crop_seeds], dim=-1)[:, columns].tolist()
        for (images, labels), seed in zip(self.read_batches(plan), seeds):
            yield seed, images[None], labels[None]

    def test_batches(self, start=0, stride=1, batch_size=125):
        """See ArrayData.test_batches."""
        share = [(index, 0) for index in range(start, len(self.samples), stride)]
        yield from self.read_batches([share[i:i + batch_size] for i in range(0, len(share), batch_size)])


def count_classes(root):
    """-> the number of classes of a folder of image files, the same in its train/ and its val/."""
    try:
        train, val = (find_classes(root / split)[0] for split in ("train", "val"))
    except OSError:
        raise SystemExit(f"error: --data-dir {root} does not hold images in train/CLASS/ and val/CLASS/") from None
    if train != val or len(train) < 2:
        raise SystemExit(f"error: train/ and val/ of {root} need the same classes, two or more; they have {len(train)} "
                         f"and {len(val)}, in one of them only: {', '.join(sorted({*train} ^ {*val})[:3]) or 'none'}")
    return len(train)


def choose_rows(labels, fraction, seed):
    """-> the indices of this fraction of each class's images, drawn by seed; 1: of all images, in order."""
    if fraction == 1:
        return torch.arange(len(labels))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    by_class = [order[labels[order] == label] for label in labels.unique()]
    return torch.cat([members[:max(1, round(fraction * len(members)))] for members in by_class])


def load_split(config, split, root, device, workers=None, crop_ratio=0.875):
    """-> ArrayData or FolderData of "train" or "test". "train" has config["fraction"] of each class, chosen by seed."""
    dataset, train = DATASETS[config["data"]], split == "train"
    fraction = config["fraction"] if train else 1
    augment_on = device if device.type == "cuda" else torch.device("cpu")
    if dataset.load:
        images, labels = dataset.load(root, train)
        rows = choose_rows(labels, fraction, config["seed"])
        return ArrayData(images[rows], labels[rows], augment_on)
    path = root / ("train" if train else "val")
    if not path.is_dir():
        raise SystemExit(f"error: {path} does not exist: set --data-dir to the folder that holds train/ and val/")
    folder = ImageFolder(path)
    if len(folder.classes) != config["num_classes"]:
        raise SystemExit(f"error: {folder.root} has {len(folder.classes)} classes, the model "
                         f"{config['num_classes']}: set --data-dir to the folder it was trained on")
    rows = choose_rows(torch.tensor(folder.targets), fraction, config["seed"])
    if workers is None:                                              # 0 on a CPU, which is busy training
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = 0 if device.type == "cpu" else min(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))), 16)
    return FolderData([folder.samples[row] for row in rows.tolist()], config["image_size"], augment_on, workers,
                      config["crop_scale"] if train else None, config["bicubic"], crop_ratio)


# -------------------------------------------------------------------------------------------------------- augmentation
# Close to Pillow's arithmetic, for uint8 images (B, 3, H, W). Each image has its own parameters: magnitudes and
# choices are (B, 1, 1, 1), boxes (B, 4).

def interpolate(x, u, v, bicubic):
    """x at (u, v), places from -1 to 1 that broadcast to (B, 1, H, W). bicubic: False for bilinear."""
    u, v, _ = torch.broadcast_tensors(u, v, bicubic)                 # bicubic, (B, 1, 1, 1), gives B
    grid = torch.stack([u, v], dim=-1)[:, 0]                         # (B, H, W, 2)
    cubic, linear = (F.grid_sample(x.float(), grid, mode, "border", align_corners=False)
                     for mode in ("bicubic", "bilinear"))
    return torch.where(bicubic, cubic, linear).clamp(0, 255)


def warp(x, bicubic, fill, a=1.0, b=0.0, c=0.0, d=0.0, e=1.0, f=0.0):
    """The output at (u, v), from -1 to 1, is x at (au + bv + c, du + ev + f), or `fill` (3,) outside."""
    side = x.shape[3]
    u = (torch.arange(side, device=x.device) + 0.5) * 2 / side - 1
    v = u[:, None]
    u, v = a * u + b * v + c, d * u + e * v + f                      # affine_grid would use TF32
    inside = (u >= -1) & (u < 1) & (v >= -1) & (v < 1)
    return torch.where(inside, interpolate(x, u, v, bicubic), fill.view(3, 1, 1)).to(torch.uint8)


def crop_boxes(x, box, bicubic):
    """Each image's box (top, left, height, width, in pixels), enlarged to the whole image, which is square."""
    start, size = box.view(-1, 2, 2, 1).unbind(1)                    # (B, 2, 1) each, for rows and columns
    side = x.shape[3]
    place = (torch.arange(side, device=x.device) + 0.5) / side * size    # in the box, by row and column
    place = start + place.clamp(min=0.5).minimum(size - 0.5)         # the edge pixel is repeated
    v, u = (place * 2 / side - 1).unbind(1)                          # (B, side) each
    return interpolate(x, u[:, None, None], v[:, None, :, None], bicubic).round().to(torch.uint8)


def blend(base, x, m):
    """base + (1 + 0.09 m)(x - base): a smaller or a greater difference from `base`."""
    factor, base = (1 + 0.09 * m).clamp(min=0.1), base.float()       # m = -10 gives 0.09999996
    return (base + factor * (x - base)).clamp(0, 255).to(torch.uint8)


# RandAugment `rand-m9-mstd0.5-inc1` of timm. x: square images; m: the magnitude with a random sign, -10 to 10
# (some operations ignore the sign); affine: warp() with `bicubic` and `fill` given.
OPERATIONS = {
    "AutoContrast": lambda x, m, _: v2.autocontrast(x),
    "Equalize": lambda x, m, _: v2.equalize(x),
    "Invert": lambda x, m, _: 255 - x,
    "Rotate": lambda x, m, affine: affine(x, a=(t := (3 * m).deg2rad()).cos(), b=-t.sin(), d=t.sin(), e=t.cos()),
    "Posterize": lambda x, m, _: x & (-1 << (4 + (0.4 * m.abs()).int())).to(torch.uint8),
    "Solarize": lambda x, m, _: torch.where(x < 256 - (25.6 * m.abs()).int(), x, 255 - x),
    "SolarizeAdd": lambda x, m, _: (x + (x < 128) * (11 * m.abs()).int()).clamp(max=255).to(torch.uint8),
    "Color": lambda x, m, _: blend(v2.rgb_to_grayscale(x), x, m),
    "Contrast": lambda x, m, _: blend(v2.rgb_to_grayscale(x).float().mean((2, 3), keepdim=True).round(), x, m),
    "Brightness": lambda x, m, _: blend(torch.zeros_like(x), x, m),
    "Sharpness": lambda x, m, _: blend(v2.adjust_sharpness(x, 0), x, m),  # 0: smoothed
    "ShearX": lambda x, m, affine: affine(x, b=0.03 * m, c=0.03 * m),
    "ShearY": lambda x, m, affine: affine(x, d=0.03 * m, f=0.03 * m),
    "TranslateX": lambda x, m, affine: affine(x, c=0.09 * m),
    "TranslateY": lambda x, m, affine: affine(x, f=0.09 * m),
}


def draw_boxes(count, side, area, max_ratio, whole):
    """-> (count, 4) top, left, height, width: the first of ten random boxes that fits, or zeros.

    side: of the images; area: range of a box's share of the image, drawn uniformly; max_ratio: of its longer side to
    its shorter, drawn log-uniformly; whole: may a box be as high or as wide as the image?
    """
    u_area, u_ratio, *u_start = torch.rand(4, 10, count)
    pixels = side * side * (area[0] + (area[1] - area[0]) * u_area)
    ratio = max_ratio ** (2 * u_ratio - 1)
    size = torch.stack([pixels * ratio, pixels / ratio]).sqrt().round()  # heights and widths, (2, 10, count)
    start = ((side - size + 1) * torch.stack(u_start)).floor()       # tops and lefts
    fits = (size < side + whole).all(0)
    boxes = torch.cat([start, size]) * fits                          # (4, 10, count)
    first = fits.int().argmax(0)                                     # 0 where none fits: zeros
    return boxes[:, first, torch.arange(count)].T                    # (count, 4)


def box_mask(box, side):
    """Boxes (B, 4) -> (B, side, side), True inside."""
    start, size = box.view(-1, 2, 2, 1).unbind(1)                    # (B, 2, 1) each
    place = torch.arange(side, device=box.device)
    rows, columns = ((place >= start) & (place < start + size)).unbind(1)  # (B, side) each
    return rows[:, :, None] & columns[:, None]


def draw_augmentation(count, side, recipe):
    """-> what happens to each of `count` images, a dict of tensors on the CPU: the same for every device."""
    crop = draw_boxes(count, side, (recipe.crop_scale, 1.0), 4 / 3, whole=True)
    crop[crop[:, 2] == 0] = torch.tensor([0.0, 0.0, side, side])     # none of the ten fits: the whole image
    crop_bicubic, flip = torch.rand(count) < recipe.bicubic, torch.rand(count) < recipe.flip
    shape = count, recipe.ra_ops
    operation = torch.where(torch.rand(shape) < 0.5, torch.randint(len(OPERATIONS), shape), -1)  # -1: none
    magnitude = (recipe.ra_magnitude + 0.5 * torch.randn(shape)).clamp(0, 10)
    magnitude *= torch.where(torch.rand(shape) < 0.5, -1.0, 1.0)
    bicubic = torch.rand(shape) < recipe.bicubic
    erase = draw_boxes(count, side, (0.02, 1 / 3), 1 / 0.3, whole=False) * (torch.rand(count, 1) < recipe.erase)
    return dict(crop=crop, crop_bicubic=crop_bicubic, flip=flip, operation=operation, magnitude=magnitude,
                bicubic=bicubic, erase=erase)


def draw_mixing(steps, side, recipe):
    """-> (steps, side, side): how much of its own pixels an image keeps: mixup's lambda, or 0 in CutMix's box."""
    is_cutmix = torch.rand(steps, 1, 1) < (0.5 if recipe.mixup and recipe.cutmix else float(recipe.cutmix > 0))
    lam_cut, lam_mix = (torch.distributions.Beta(alpha, alpha).sample((steps, 1))
                        for alpha in (recipe.cutmix or 1.0, recipe.mixup or 1.0))    # where off, 1.0 and unused
    half = (side / 2 * (1 - lam_cut).sqrt()).floor()                 # a box of odd side loses a pixel, as in timm
    middle = (torch.rand(steps, 2) * side).floor()
    low, high = (middle - half).clamp(min=0), (middle + half).clamp(max=side)
    outside = ~box_mask(torch.cat([low, high - low], dim=1), side)
    return torch.where(is_cutmix, outside.float(), lam_mix[..., None])


def augment(x, draws, recipe, fill):
    """uint8 (B, 3, H, W) -> the same: crop, flip, RandAugment. `fill` (3,): colour of empty places."""
    def drawn(name):
        return to_device(draws[name], x.device)[..., None, None, None]

    if recipe.crop_scale < 1:
        x = crop_boxes(x, to_device(draws["crop"], x.device), drawn("crop_bicubic"))
    x = torch.where(drawn("flip"), x.flip(3), x)
    for turn, chosen in enumerate(draws["operation"].T):             # chosen (B,): indices of OPERATIONS, or -1
        m, bicubic = drawn("magnitude")[:, turn], drawn("bicubic")[:, turn]
        for number, operation in enumerate(OPERATIONS.values()):     # one call for all images that drew it
            rows = to_device((chosen == number).nonzero()[:, 0], x.device)
            if len(rows):
                x[rows] = operation(x[rows], m[rows], partial(warp, bicubic=bicubic[rows], fill=fill))
    return x


def normalise(x, dataset_name):
    """uint8 or float images (..., 3, H, W), pixels from 0 to 255 -> floats by the data set's mean and std."""
    dataset = DATASETS[dataset_name]
    mean, std = to_device(torch.tensor([dataset.mean, dataset.std]), x.device).view(2, 3, 1, 1)
    return (x / 255).sub_(mean).div_(std)


def erase_boxes(x, box, seed):
    """Random erasing, in place: normal noise in the boxes (N, 4) of N normalised images, x (..., 3, H, W)."""
    images, generator = x.view(-1, *x.shape[-3:]), torch.Generator(x.device).manual_seed(seed)
    rows = to_device(box[:, 2].nonzero()[:, 0], x.device)
    inside = box_mask(to_device(box, x.device)[rows], x.shape[-1])[:, None]
    noise = torch.randn(len(rows), *x.shape[-3:], device=x.device, generator=generator)
    images[rows] = torch.where(inside, noise, images[rows])
    return x


def mix(x, keep):
    """keep * x + (1 - keep) * neighbour; images 2k and 2k + 1 are neighbours. x: (S, B, ...), keep: (S, 1, ...)."""
    return torch.lerp(x.unflatten(1, (-1, 2)).flip(2).flatten(1, 2), x, keep)


def prepare(x, labels, draws, keep, recipe, dataset_name, classes, seed):
    """Augments, mixes, normalises and erases the batches of S steps: uint8 x (S, B, 3, H, W), labels (S, B).

    draws: draw_augmentation of S * B images; keep: draw_mixing of S steps, or None; seed: of erasing's noise.
    -> normalised images, and labels, or each class's share where images are mixed, (S, B, classes).
    """
    fill = to_device(255 * torch.tensor(DATASETS[dataset_name].mean), x.device).round()
    x = augment(x.flatten(0, 1), draws, recipe, fill).view_as(x)
    if keep is not None:
        keep = to_device(keep, x.device)[:, None, None]              # (S, 1, 1, H, W)
        lam = keep.mean((2, 3, 4))[..., None]                        # corrected for clipped boxes
        labels = mix(F.one_hot(labels, classes).float(), lam)
    if keep is not None and not recipe.erase_first:                  # ViT-Lite mixes pixels, then erases
        x = mix(x.float(), keep).round()
    x = erase_boxes(normalise(x, dataset_name), draws["erase"], seed)
    if keep is not None and recipe.erase_first:                      # DeiT erases, then mixes floats
        x = mix(x, keep)
    return x, labels


# ------------------------------------------------------------------------------------------------------------- batches

def epoch_order(recipe, count, seed, epoch):
    """-> the index of the image at each place of an epoch, (steps, batch_size), and a seed for each step.

    The last, smaller batch is left out. With repeats, two images alternate, a b a b a b, so that none is mixed
    with itself and one decoding serves all crops.
    """
    size, repeats = recipe.batch_size, recipe.repeats
    generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
    order = torch.randperm(count, generator=generator)
    seeds = torch.randint(2**62, (count // size,), generator=generator).tolist()
    place = torch.arange(len(seeds) * size)
    pair = place // (2 * repeats)                                    # of images; it fills 2 * repeats places
    return order[2 * pair + place % 2].view(-1, size), seeds


def train_batches(data, recipe, config, epoch, rank=0, world_size=1):
    """Yields each step's images (B, 3, H, W) and targets: this process's share, B = batch_size / world_size.

    The order is drawn from (seed, epoch). Augmentation and mixing are drawn for whole batches, from the seed of
    their chunk's first step; each process takes its columns. So neither resuming nor the number of processes
    changes them. Only the noise of random erasing is drawn by each process for itself.
    """
    size, side, classes = recipe.batch_size, config["image_size"], config["num_classes"]
    order, seeds = epoch_order(recipe, len(data), config["seed"], epoch)
    columns = slice(rank * size // world_size, (rank + 1) * size // world_size)
    if isinstance(data, FolderData):
        recipe = dataclasses.replace(recipe, crop_scale=1.0)         # the workers have already cropped
    for seed, images, labels in data.chunks(order, seeds, columns):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)                # torch.manual_seed would seed GPUs too
            draws = draw_augmentation(len(labels) * size, side, recipe)
            keep = draw_mixing(len(labels), side, recipe) if recipe.mixes else None
        draws = {name: draw.unflatten(0, (-1, size))[:, columns].flatten(0, 1) for name, draw in draws.items()}
        noise_seed = seed + 2**31 + rank                             # no crop's seed, even modulo 2**32, as on a CPU
        images, targets = prepare(images, labels, draws, keep, recipe, config["data"], classes, noise_seed)
        yield from zip(images, targets)


# ------------------------------------------------------------------------------------------------------------ training

def lr_at(epoch, recipe):
    """Learning rate after `epoch` epochs, which may be fractional: linear warm-up, cosine, cool-down at min_lr.

    As in timm the cosine starts at epoch 0, so that it is a little under lr when the warm-up ends.
    """
    start, end = min(recipe.warmup_lr, recipe.lr), min(recipe.min_lr, recipe.lr)     # lr is the peak, however small
    if epoch < recipe.warmup_epochs:
        return start + (recipe.lr - start) * epoch / recipe.warmup_epochs
    done = min(epoch / (recipe.epochs - recipe.cooldown_epochs), 1)
    return end + 0.5 * (recipe.lr - end) * (1 + math.cos(math.pi * done))


def parameter_groups(model, weight_decay, decay_pe):
    """Two groups for AdamW: matrices decay, biases and norms do not; PE tables and the class token only if asked."""
    groups = {True: [], False: []}
    for name, parameter in model.named_parameters():
        pe_or_cls = name.endswith(("pos_embed", "cls_token"))
        if parameter.requires_grad:
            groups[parameter.ndim > 1 and (decay_pe or not pe_or_cls)].append(parameter)
    return [dict(params=groups[True], weight_decay=weight_decay), dict(params=groups[False], weight_decay=0.0)]


def make_train_step(net, optimizer, label_smoothing=0.0, precision="fp32", accumulate=1):
    """-> train_step(images, targets) -> loss: forward, backward and a step of AdamW, in `accumulate` parts.

    net: the model: plain, compiled or wrapped in DistributedDataParallel. targets: labels (B,) or shares (B, classes).
    """
    def train_step(images, targets):
        losses = []
        for x, y in zip(images.chunk(accumulate), targets.chunk(accumulate), strict=True):
            with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16"):
                logits = net(x)
            loss = F.cross_entropy(logits.float(), y, label_smoothing=label_smoothing) / accumulate
            loss.backward()
            losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        return torch.stack(losses).sum()

    return train_step


def capture(train_step, optimizer, example):
    """-> train_step as one CUDA graph: batch and lr are copied to where it reads them, and one launch does the rest."""
    graph, lr = torch.cuda.CUDAGraph(), torch.zeros((), device=example[0].device)
    for group in optimizer.param_groups:
        group["lr"] = lr
    with torch.cuda.graph(graph):
        loss = train_step(*example)

    def replay(*batch):
        lr.fill_(optimizer.param_groups[0]["lr"])                    # fit has put a number there; the graph reads lr
        for static, tensor in zip(example, batch):
            static.copy_(tensor)
        graph.replay()
        return loss

    return replay


@torch.no_grad()
def evaluate(model, test_data, config, device):
    """-> dict of test accuracy, in percent, and mean loss, over all processes. Leaves the model in training mode."""
    hits, losses, size = 0.0, 0.0, None
    model.eval()
    for images, labels in test_data.test_batches(RANK, WORLD_SIZE):
        size = size or len(images)                                   # the last batch is padded: one shape to compile
        images = F.pad(images, (0, 0) * 3 + (0, size - len(images)))
        labels = F.pad(labels, (0, size - len(labels)), value=-1).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=config["precision"] == "bf16"):
            logits = model(normalise(images.to(device), config["data"]))
        hits += (logits.argmax(1) == labels).sum()
        losses += F.cross_entropy(logits.float(), labels, ignore_index=-1, reduction="sum")
    model.train()
    hits, losses = sum_over_processes(hits, losses)
    if not math.isfinite(losses):                                    # before anything is saved
        raise SystemExit("error: the test loss is not finite, the run has diverged: try a lower --lr")
    return dict(test_accuracy=100 * hits / len(test_data), test_loss=losses / len(test_data))


def set_up(config, recipe, model, test_data, device, accumulate, checkpoint):
    """-> net (the model, compiled if config says so), the optimizer (with the checkpoint's state), train_step."""
    net = model if config["compile"] == "off" else torch.compile(model, fullgraph=True, dynamic=False)
    parallel = DistributedDataParallel(net) if WORLD_SIZE > 1 else net
    graphs = config["compile"] == "graphs"
    optimizer = torch.optim.AdamW(parameter_groups(model, recipe.weight_decay, recipe.decay_pe), lr=0.0, fused=True,
                                  capturable=graphs)
    train_step = make_train_step(parallel, optimizer, recipe.label_smoothing, config["precision"], accumulate)
    if config["compile"] != "off":
        start = time.perf_counter()
        images = torch.zeros(recipe.batch_size // WORLD_SIZE, *model.image_shape)
        targets = torch.zeros(len(images), config["num_classes"]) if recipe.mixes else torch.zeros(len(images)).long()
        example = images.to(device), targets.to(device)
        evaluate(net, test_data, config, device)                     # compiles it; a failure here costs no epoch
        with torch.cuda.stream(torch.cuda.Stream() if graphs else None):  # capture() needs steps on a side stream first
            for _ in range(3):                                       # lr is 0: they leave the weights alone
                train_step(*example)
            for state in optimizer.state.values():                   # as if no step had been taken
                for value in state.values():
                    value.zero_()
        print_main(f"compiled in {time.perf_counter() - start:.0f} s, including one pass over the test images")
    if checkpoint:
        optimizer.load_state_dict(checkpoint["optimizer"])
    if graphs:
        train_step = capture(train_step, optimizer, example)
    return net, optimizer, train_step


def fit(config, recipe, model, data, folder, device, accumulate, checkpoint):
    """Trains, tests and saves epoch by epoch. checkpoint: to resume from. -> the log, a dict per epoch."""
    net, optimizer, train_step = set_up(config, recipe, model, data["test"], device, accumulate, checkpoint)
    log = checkpoint["log"] if checkpoint else []
    print_main("\nepoch     loss   test %         lr   images/s   epoch s   elapsed s")
    steps = len(data["train"]) // recipe.batch_size
    start = time.perf_counter() - (log[-1]["seconds"] if log else 0)  # a resumed run's clock goes on
    for epoch in range(len(log), recipe.epochs):
        torch.manual_seed((config["seed"] * 100_003 + epoch) * 1009 + RANK)      # seeds dropout, on a GPU too
        epoch_start, losses = time.perf_counter(), torch.zeros(steps, device=device)
        bar = tqdm(train_batches(data["train"], recipe, config, epoch, RANK, WORLD_SIZE), total=steps, leave=False,
                   desc=f"epoch {epoch + 1} of {recipe.epochs}", unit=" images", unit_scale=recipe.batch_size,
                   disable=True if RANK else None)                   # None: silent without a terminal
        for step, (images, targets) in enumerate(bar):
            lr = lr_at(epoch if recipe.lr_per == "epoch" else epoch + step / steps, recipe)
            for group in optimizer.param_groups:
                group["lr"] = lr
            losses[step] = train_step(images.to(device), targets.to(device))
            if step % 100 == 99:                                     # rarely: reading a loss waits for the GPU
                bar.set_postfix(loss=f"{losses[step].item():.3f}", refresh=False)
        loss = losses.mean().item()                                  # of this process; waits for the GPU
        speed = steps * recipe.batch_size / (time.perf_counter() - epoch_start)
        result = evaluate(net, data["test"], config, device)
        loss, unreadable = sum_over_processes(loss / WORLD_SIZE, data["train"].unreadable)
        log.append(dict(
            epoch=epoch + 1, loss=loss, **result, lr=lr, processes=WORLD_SIZE,
            images_per_second=speed, unreadable=int(unreadable), seconds=time.perf_counter() - start))
        if RANK == 0:
            save_checkpoint(folder, model, optimizer, config, log)
        print_main("{epoch:>5} {loss:>8.4f} {test_accuracy:>8.2f} {lr:>10.2e} {images_per_second:>10,.0f} {took:>9.0f} "
                   "{seconds:>11.0f}".format(**log[-1], took=time.perf_counter() - epoch_start))
    return log


def sum_over_processes(*values):
    """-> each value's sum, as floats; waits for all processes."""
    sums = torch.tensor([float(value) for value in values], dtype=torch.float64)
    if WORLD_SIZE > 1:
        dist.all_reduce(sums)                                        # on the CPU, through gloo
    return sums.tolist()


def print_main(text):
    if RANK == 0:
        typer.echo(text)


# --------------------------------------------------------------------------------------------------------- checkpoints

def save(path, contents):
    """Writes bytes whole or not at all: to a temporary file, flushed to the disk, then renamed."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(contents)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise SystemExit(f"error: {path} cannot be written ({error.strerror}); earlier files are intact") from None


def save_checkpoint(folder, model, optimizer, config, log):
    """Writes a run's folder. No random state is saved: train_batches and fit seed what an epoch draws."""
    file = io.BytesIO()
    torch.save(dict(model=model.state_dict(), optimizer=optimizer.state_dict(), config=config, log=log), file)
    if log[-1] is max(log, key=lambda line: line["test_accuracy"]):  # ties keep the first
        save(folder / "best.pt", file.getbuffer())
    save(folder / "last.pt", file.getbuffer())
    (folder / "mechanism.json").unlink(missing_ok=True)              # it describes older weights
    save_record(folder, config, log)


def save_record(folder, config, log):
    save(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())
    save(folder / "log.jsonl", "".join(json.dumps(line) + "\n" for line in log).encode())


def load_checkpoint(path):
    """-> the model with its weights, and the checkpoint. path: a run's folder, or a file."""
    path = path / "last.pt" if path.is_dir() else path
    try:
        checkpoint = read_checkpoint(path)
        setting(checkpoint["config"])                                # raises where a value is missing
        model = load_weights(build_model(checkpoint["config"]), checkpoint["model"])
        if not checkpoint["log"] or not checkpoint["optimizer"]["state"]:
            raise ValueError("it holds no finished epoch")
    except OSError as error:
        raise SystemExit(f"error: {path} cannot be read ({error.strerror})") from None
    except Exception as error:                                       # an altered file can be wrong in any way
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise SystemExit(f"error: {path} cannot be used as a checkpoint of this train.py ({reason})") from None
    return model, checkpoint


def open_run(folder, resume, overwrite):
    """Creates a run's folder and locks it against other processes, until the lock is closed or this process ends.

    -> the lock, and the checkpoint to resume from or None.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock, checkpoint = open(folder / ".lock", "w"), None
    try:
        import fcntl
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise SystemExit(f"error: another process is training in {folder}: wait, or choose another --name") from None
    except (ImportError, OSError):                                   # Windows and some network disks have no locks
        pass
    if resume and (folder / "last.pt").exists():
        checkpoint = load_checkpoint(folder)[1]
    elif resume and (folder / "log.jsonl").exists():
        raise SystemExit(f"error: {folder} has a log but no last.pt to resume from: --overwrite replaces it")
    elif any(folder.glob("[!.]*")) and not (resume or overwrite):
        raise SystemExit(f"error: {folder} exists: --resume continues it, --overwrite replaces it, --name chooses "
                         "another")
    return lock, checkpoint


# -------------------------------------------------------------------------------------------------------- command line

# (--pe, --pool, --mpvg) -> the equivalent --method
METHOD_OF_FLAGS = {
    ("absolute", "cls", False): "default", ("absolute", "gap", False): "gap", ("absolute", "gap", True): "gap-last-pe",
    ("layerwise", "cls", False): "lape", ("layerwise", "gap", False): "pvg", ("layerwise", "gap", True): "mpvg",
    ("none", "cls", False): "default:pe=none", ("none", "gap", False): "gap:pe=none",
}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
                  context_settings=dict(help_option_names=["-h", "--help"], max_content_width=100))


def flag(text, *names, default=None, shown=True, **limits):
    """An option. shown: what --help shows where the default is None."""
    return typer.Option(default, *names, help=text, show_default=shown, **limits)


DATA_DIR = flag("Folder that holds CIFAR-100, or image files in train/CLASS/ and val/CLASS/.", default=Path("data"))
DEVICE = flag("cpu, cuda, cuda:1 or mps; auto takes an accelerator if there is one.", default="auto")


def refuse(name, message):
    raise typer.BadParameter(message, param_hint=f"--{name}")


def parse_assignments(option, text, separator, names):
    """Text of an option, such as mixup=0,lr_per=step -> {"mixup": 0, "lr_per": "step"}. Refuses an unknown name."""
    values = {}
    for item in filter(None, (text or "").split(separator)):
        name, equals, word = item.strip().partition("=")
        if name not in names or not equals:
            refuse(option, f"{item!r} is not NAME=VALUE; NAME is one of {', '.join(names)}")
        word = {"True": "true", "False": "false", "None": "null"}.get(word, word)
        try:
            values[name] = json.loads(word)
        except ValueError:
            values[name] = word
    return values


def choose_device(name):
    """-> torch.device of --device; allows TF32. A sweep calls it, so it must not initialise CUDA."""
    accelerator = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    try:
        device = torch.device(accelerator if name == "auto" else name)
    except RuntimeError:
        refuse("device", f"{name} is not one of auto, cpu, cuda, cuda:1, mps")
    if device == torch.device("cuda"):
        device = torch.device("cuda", LOCAL_RANK)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")                   # TF32 where the precision is fp32
    if device.type != "cpu" and (device.type != accelerator or (device.index or 0) >= torch.accelerator.device_count()):
        refuse("device", f"{device} is not available on this machine: choose another, or start fewer processes")
    return device


def default_precision(device):
    """-> "bf16" where the GPU computes in it natively, else "fp32"."""
    native = device.type == "cuda" and torch.cuda.get_device_properties(device).major >= 8
    return "bf16" if native else "fp32"


def choose_method(flags):
    """-> a method's name, and the options of mpvg.ViT that override its own."""
    pe, pool, mpvg, text = (flags[name] for name in ("pe", "pool", "mpvg", "method"))
    if text is None:
        key = pe or "layerwise", pool or "gap", mpvg or not (pe or pool)
        text = METHOD_OF_FLAGS.get(key) or refuse("mpvg", "it needs a PE and --pool gap")
    elif pe or pool or mpvg:
        refuse("method", "it replaces --pe, --pool and --mpvg: leave those out")
    method, _, options = text.partition(":")
    names = ViT.__init__.__kwdefaults__.keys() - {"image_size", "in_channels", "num_classes"}  # the data sets these
    return method, parse_assignments("method", options, ":", sorted(names))


def recipe_for(data, **changes):
    """-> the data set's Recipe with these changes and what follows from epochs and batch_size. Raises ValueError."""
    usual, follow = DATASETS[data].recipe, {}
    recipe = dataclasses.replace(usual, **changes)                   # checks each value
    if recipe.epochs < 10 * usual.warmup_epochs:                     # a short run warms up by the step
        follow = dict(warmup_epochs=recipe.epochs / 10, cooldown_epochs=min(usual.cooldown_epochs, recipe.epochs // 10),
                      lr_per="step")
    if data == "imagenet":                                           # DeiT: 5e-4 for every 512 images of a batch
        follow["lr"] = usual.lr * recipe.batch_size / usual.batch_size
    recipe = dataclasses.replace(recipe, **follow | changes)
    if recipe.warmup_epochs + recipe.cooldown_epochs >= recipe.epochs:
        raise ValueError(f"warmup_epochs and cooldown_epochs leave none of the {recipe.epochs} epochs for the cosine")
    return recipe


def configure(flags):
    """Flags (None: not given) -> the run's configuration: the recipe's values and all else that decides its result."""
    device = choose_device(flags["device"])
    cuda = device.type == "cuda"
    data = flags["data"] or ("numbers" if device.type == "cpu" else "cifar100")
    dataset = DATASETS[data]
    if data == "numbers" and Path(flags["data_dir"]) != Path("data"):
        refuse("data-dir", "numbers is built in: give --data cifar100 or imagenet, or leave it out")
    method, overrides = choose_method(flags)
    changes = parse_assignments("recipe", flags["recipe"], ",", dataclasses.asdict(dataset.recipe))
    given = {name: flags[name] for name in ("epochs", "batch_size", "lr") if flags[name] is not None}
    if twice := given.keys() & changes.keys():
        refuse("recipe", f"{min(twice)} is also given by its own flag: leave one out")
    try:
        recipe = recipe_for(data, **changes | given)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    batch, accumulate = recipe.batch_size, flags["accumulate"]
    if batch % (WORLD_SIZE * accumulate) or recipe.mixes and batch % (WORLD_SIZE * 2):
        refuse("batch-size", f"{batch} must be divisible by processes ({WORLD_SIZE}) x accumulate ({accumulate})"
               + ", and by processes x 2, as images are mixed in pairs" * recipe.mixes)
    if dataset.load and flags["image_size"] not in (None, dataset.image_size):
        refuse("image-size", f"{data} has images of {dataset.image_size}x{dataset.image_size}")
    if flags["compile"] == "graphs" and (not cuda or WORLD_SIZE > 1):
        refuse("compile", "graphs needs CUDA and one process: use on, or off")
    if flags["freeze"] and not flags["init"]:
        refuse("freeze", "it needs --init, since it trains only the head")
    config = dict(
        data=data, model=flags["model"] or dataset.model, method=method, overrides=overrides, seed=flags["seed"],
        **dataclasses.asdict(recipe), image_size=flags["image_size"] or dataset.image_size,
        num_classes=dataset.num_classes or count_classes(Path(flags["data_dir"])), fraction=flags["fraction"],
        init=str(Path(flags["init"])) if flags["init"] else None, freeze=flags["freeze"],
        precision=flags["precision"] or default_precision(device),
        compile=flags["compile"] or ("on" if cuda else "off"))
    try:
        with torch.device("meta"):                                   # shapes without memory
            build_model(config)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return config


def build_model(config):
    """-> the configuration's model; with `freeze` only its head learns. Raises ValueError."""
    model = create(config["model"], config["method"], image_size=config["image_size"],
                   num_classes=config["num_classes"], **config["overrides"])
    model.requires_grad_(not config["freeze"]).head.requires_grad_(True)
    return model


def method_label(config):
    """-> the method's name and the options given after it: mpvg-layer0=True."""
    overrides = {name: f"{value:g}" if type(value) is float else value for name, value in config["overrides"].items()}
    return "-".join([config["method"], *(f"{name}={value}" for name, value in overrides.items())])


def run_folder(flags, config):
    name = flags["name"] or f"{method_label(config)}-{config['model']}-{config['data']}-seed{config['seed']}"
    if Path(name).name != name or name == ".." or len(os.fsencode(name)) > 200:
        refuse("name", f"{name!r} must be one folder name of at most 200 bytes; --runs sets its parent")
    return Path(flags["runs"]) / name                                # in a sweep, older versions of typer pass text


def environment(device):
    """-> where a run takes place, plain values; they may differ after --resume."""
    git = subprocess.run("git describe --always --dirty --abbrev=12", shell=True, cwd=Path(__file__).parent,
                         capture_output=True, text=True).stdout.strip()  # "" without git, or outside a repository
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return dict(device=str(device), device_name=name, threads=torch.get_num_threads(), processes=WORLD_SIZE, git=git,
                torch=str(torch.__version__), torchvision=torchvision.__version__, python=platform.python_version(),
                matmul_precision=torch.get_float32_matmul_precision())


@app.callback(invoke_without_command=True)
def train_command(
    ctx: typer.Context,
    pe: Literal["absolute", "layerwise", "none"] | None = flag(
        "Position embedding: added once, delivered to the blocks, or none.", shown="layerwise"),
    pool: Literal["cls", "gap"] | None = flag("Class token or global average pooling.", shown="gap"),
    mpvg: bool = flag("Add the initial PE to the last norm's output. On if --pe, --pool and --method are left out.",
                      "--mpvg", default=False),
    method: str | None = flag(f"A method by name instead: {', '.join(METHODS)}; with options of mpvg.ViT: "
                              "mpvg:layer0=true:pe_std=1."),
    model: str | None = flag(f"One of {', '.join(MODELS)}.", shown="the data set's"),
    data: Literal[tuple(DATASETS)] | None = flag(
        "numbers: built in. cifar100: downloaded where absent. imagenet: image files.",
        shown="numbers on a CPU, else cifar100"),
    data_dir: Path = DATA_DIR,
    fraction: float = flag("Share of each class's training images to use.", default=1.0, min=0.001, max=1),
    image_size: int | None = flag("Side in pixels that imagenet's files are cropped to.", min=1, shown="224"),
    workers: int | None = flag("Processes that decode files, for each training process.", min=0,
                               shown="its share of the cores, at most 16; 0 on a CPU"),
    epochs: int | None = flag("Number of epochs. A short run warms up for a tenth of them.",
                              shown="the recipe's"),
    batch_size: int | None = flag("Global batch size.", shown="the recipe's"),
    lr: float | None = flag("AdamW's peak learning rate.", shown="the recipe's"),
    recipe: str | None = flag("Other values of the recipe: mixup=0,erase=0.1. A wrong name lists them all."),
    init: Path | None = flag("Run or checkpoint to start from, of this or a plainer method. New data get a new head."),
    freeze: bool = flag("Train only the head.", "--freeze", default=False),
    seed: int = flag("Seed of weights, order, augmentation and --fraction.", default=0, min=0, max=2**32 - 1),
    device: str = DEVICE,
    precision: Literal["fp32", "bf16"] | None = flag(
        "bf16: autocast; fp32 uses TF32 on CUDA.", shown="bf16 if CUDA has it, else fp32"),
    compile: Literal["off", "on", "graphs"] | None = flag(
        "torch.compile; graphs: each step as one CUDA graph.", shown="on with CUDA"),
    accumulate: int = flag("Gradient accumulation: split each batch into this many parts.", default=1, min=1),
    name: str | None = flag("Name of the run's folder.", shown="METHOD-MODEL-DATA-seedN"),
    runs: Path = flag("Where run folders go.", default=Path("runs")),
    resume: bool = flag("Continue after the last finished epoch, if there is one.", "--resume", default=False),
    overwrite: bool = flag("Replace an existing run of that name.", "--overwrite", default=False),
):
    """Train a Vision Transformer with a position embedding of the MPVG paper, and test it after every epoch.

    Writes config.json, log.jsonl, last.pt and best.pt to RUNS/NAME. The commands below have a --help of their own.

    \b
    Examples:
      python train.py --pe layerwise --pool gap --mpvg
      python train.py --data cifar100 --method lape --epochs 20 --recipe mixup=0
    """
    flags = dict(locals())
    if ctx.invoked_subcommand:
        if WORLD_SIZE > 1 or any(ctx.get_parameter_source(key).name != "DEFAULT" for key in ctx.params):
            raise typer.BadParameter(f"write the flags after {ctx.invoked_subcommand}, and start it without torchrun")
        return
    if resume and overwrite:
        refuse("resume", "it continues a run and --overwrite replaces it: choose one")
    config, device = configure(flags), choose_device(device)
    folder = run_folder(flags, config)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.enable_cudnn_sdp(False)                  # cuDNN's attention may round dropout to sixteenths
    if WORLD_SIZE > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        train_run(flags, config, folder, device)
    except KeyboardInterrupt:
        print_main("\nstopped: --resume continues after the last finished epoch, if there is one"
                   + "; if not, repeat --overwrite: --resume would continue the older run" * overwrite)
        raise SystemExit(130) from None
    if WORLD_SIZE > 1:
        dist.destroy_process_group()


def refuse_other_flags(folder, old, config):
    changed = [f"{key} was {old.get(key)}, is {value}" for key, value in config.items() if old.get(key) != value]
    if changed:
        raise SystemExit(f"error: {folder} was trained with other flags: {'; '.join(changed)}. Use the old ones, or "
                         "another --runs")


def train_run(flags, config, folder, device):
    """Trains one run; each process calls it."""
    checkpoint = None
    if RANK == 0:
        _lock, checkpoint = open_run(folder, flags["resume"], flags["overwrite"])  # locked until this function returns
    if WORLD_SIZE > 1:                                               # the others may be on machines without the file
        shared = [checkpoint]
        dist.broadcast_object_list(shared, device=torch.device("cpu"))
        checkpoint = shared[0]
    my_turn = (RANK > 0) + (LOCAL_RANK > 0)                          # turns: one process, one per machine, the rest
    for turn in range(3):
        if turn == my_turn:
            data = {split: load_split(config, split, flags["data_dir"], device, flags["workers"])
                    for split in ("train", "test")}
        sum_over_processes(0)                                        # a barrier: the next turn starts when all are here
    config["images"] = len(data["train"])
    if checkpoint:
        refuse_other_flags(folder, checkpoint["config"], config)
    recipe = Recipe(**{field.name: config[field.name] for field in dataclasses.fields(Recipe)})
    if config["images"] < recipe.batch_size:
        refuse("batch-size", f"{recipe.batch_size} is more than the {config['images']} training images")
    config["environment"] = environment(device) | dict(accumulate=flags["accumulate"])

    torch.manual_seed(config["seed"])
    model = build_model(config)
    if checkpoint:
        load_weights(model, checkpoint)
    elif flags["init"]:
        initialise(model, flags["init"], config)
    model.to(device)
    count = sum(parameter.numel() for parameter in model.parameters())
    print_main(f"{method_label(config)}: {config['model']} with {count:,} parameters\n"
               f"{config['data']}: {config['images']:,} training images, {len(data['test']):,} test images, "
               f"{config['num_classes']} classes\n"
               f"{recipe.epochs} epochs of {config['images'] // recipe.batch_size} steps of {recipe.batch_size} images,"
               f" lr {recipe.lr:g}, {config['precision']}, {device}, {WORLD_SIZE} process(es)\nwrites {folder}"
               + (f"; resumes after epoch {len(checkpoint['log'])}" if checkpoint else ""))
    if checkpoint and RANK == 0:                                     # after a kill, they may be older than last.pt
        save_record(folder, checkpoint["config"], checkpoint["log"])
    log = fit(config, recipe, model, data, folder, device, flags["accumulate"], checkpoint)
    best = max(log, key=lambda line: line["test_accuracy"])
    command = ["report", str(folder)] + ["--data-dir", str(flags["data_dir"])] * (config["data"] != "numbers")
    print_main(f"\ntest accuracy {log[-1]['test_accuracy']:.2f} % after the last epoch (best: "
               f"{best['test_accuracy']:.2f} % after epoch {best['epoch']}); weights in {folder / 'last.pt'}\n"
               f"next, tables and figures: python train.py {shlex.join(command)}")


def initialise(model, path, config):
    """Loads another run's weights, or any that mpvg.load_weights takes; prints what is left out or new."""
    try:
        checkpoint = read_checkpoint(path / "last.pt" if path.is_dir() else path)
        state, trained = dict(state_dict_of(checkpoint)), checkpoint.get("config")
        if isinstance(trained, dict) and trained.get("data") != config["data"]:
            state.pop("head.weight", None)                           # other classes, even if as many
        new_head = len(state.get("head.weight", ())) != len(model.head.weight)
        new = [name for name in model.state_dict() if name not in state and not name.startswith("head")]
        from_plain = model.cls_token is None and ("cls_token" in state or bool(new))
        load_weights(model, state, new_head=True, from_plain=from_plain)
        if new and config["freeze"]:
            raise ValueError("its PE norms start at 0 and must be trained: leave out --freeze")
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: --init {path}: {error}") from None
    print_main(f"starts from {path}, " + "without its class token, " * (from_plain and "cls_token" in state)
               + (f"with new norms at 0 ({', '.join(new)}), " if new else "")
               + ("with a new head" if new_head else "with its head"))


# --------------------------------------------------------------------------------------------------------------- sweep

@app.command(context_settings=dict(allow_extra_args=True, ignore_unknown_options=True))
def sweep(
    ctx: typer.Context,
    methods: str = flag("Comma-separated methods, each as for --method; the table compares them with the first.",
                        default="default,lape,pvg,mpvg"),
    seeds: int = flag("Run each method with seeds 0 to N - 1.", default=3, min=1),
    jobs: int = flag("Number of runs at a time; with two or more, each prints to RUNS/NAME.txt.", default=1, min=1),
):
    """Train every method with every seed.

    Skips finished runs, even if the code or the images have changed since, and resumes stopped ones. Prints a table of
    these runs and saves it as RUNS/sweep.md. Takes all flags of `python train.py` except --method, --pe, --pool,
    --mpvg, --seed, --name, --resume and --overwrite.
    """
    trainer = typer.Typer()
    trainer.command()(train_command)
    # Reads all other flags as train_command would. ctx.args is copied, since make_context empties its list.
    common = typer.main.get_command(trainer).make_context("train.py", [*ctx.args])
    for key in ("method", "pe", "pool", "mpvg", "seed", "name", "resume", "overwrite"):
        if common.get_parameter_source(key).name != "DEFAULT":
            refuse(key, "sweep sets it for each run: leave it out")
    commands, precision = {}, common.params["precision"]             # commands: folder -> what trains its run
    # Seed by seed, so that a stopped sweep has whole seeds.
    for seed, method in itertools.product(range(seeds), methods.replace(" ", "").split(",")):
        flags = common.params | dict(method=method, seed=seed, precision=precision or "fp32")
        config = configure(flags)                                    # finds mistakes early
        if not precision:                                            # a placeholder: each run asks its GPU
            del config["precision"]
        folder = run_folder(flags, config)
        if run := read_run(folder):
            refuse_other_flags(folder, run.config, config)
        commands[folder] = [sys.executable, __file__, *ctx.args, f"--method={method}", f"--seed={seed}", "--resume"]
    if jobs > 1 and (load := DATASETS[config["data"]].load):
        load(common.params["data_dir"], False)                       # downloads once, not in each job
    runs_folder = Path(common.params["runs"])
    runs_folder.mkdir(parents=True, exist_ok=True)

    def train_one(folder):
        if run := read_run(folder):                                  # finished
            return run
        if jobs == 1:
            typer.echo(f"\n--- {folder.name}")
            code = subprocess.run(commands[folder]).returncode
        else:
            threads = str(max(1, torch.get_num_threads() // jobs))   # the runs share the cores
            with open(f"{folder}.txt", "a") as output:
                code = subprocess.run(commands[folder], stdout=output, stderr=output,
                                      env=os.environ | {"OMP_NUM_THREADS": threads}).returncode
            typer.echo(f"{'failed, see' if code else 'finished'} {folder}.txt")
        return None if code else read_run(folder)

    try:
        with ThreadPoolExecutor(jobs) as executor:
            results = dict(zip(commands, executor.map(train_one, commands)))
    except KeyboardInterrupt:                                        # the runs receive it as well
        raise SystemExit("stopped: run the same command to continue") from None
    if runs := [run for run in results.values() if run]:
        table = "".join(results_table(title, by_method) for title, by_method in by_setting(runs).items())
        save(runs_folder / "sweep.md", table.encode())
        typer.echo(f"\n{table}", nl=False)
    if failed := [folder.name for folder, run in results.items() if not run]:
        raise SystemExit(f"error: {len(failed)} of {len(commands)} runs failed: {', '.join(failed)}")


# -------------------------------------------------------------------------------------------------------------- tables

PAPER = {  # setting without precision -> top-1 %, one run each: Tables 1, 2, 5 and 6, Figures 1 and 5
    "vit-lite, cifar100, 310 epochs": {"default": 74.90, "lape": 75.52, "pvg": 76.67, "mpvg": 76.87},
    "deit-tiny, imagenet, 300 epochs": {
        "default": 72.14, "lape": 72.94, "gap": 72.40, "lape-gap": 72.24, "gap-last-pe": 72.14, "pvg": 73.17,
        "mpvg": 73.51, "mpvg-last_pe=11": 73.30, "mpvg-last_pe=8": 73.38, "mpvg-last_pe=5": 73.39,
        "mpvg-hierarchical=False": 73.31, "mpvg-layer0=True": 73.48, "mpvg-add_input=False": 73.28},
    "deit-small, imagenet, 300 epochs": {"default": 79.81, "lape": 80.39, "pvg": 80.38, "mpvg": 80.61},
    "deit-base, imagenet, 300 epochs": {"default": 81.85, "lape": 82.15, "pvg": 82.21, "mpvg": 82.42},
}
INTERACTION = "(lape-gap - gap) - (lape - default)"                  # the paper's first finding; tested at 5 %
CLAIMS = "lape - default", "lape-gap - gap", "mpvg - pvg", "mpvg - default"  # share 5 % (Holm); OTHERS: no verdict
OTHERS = ("pvg - lape-gap", "default-pe_std=1 - default", "gap-pe_std=1 - gap", "pvg - gap-pe_std=1",
          "mpvg-free - mpvg", "mpvg-shift - mpvg", "mpvg-pe_init=sincos - mpvg")


class Run(NamedTuple):
    """A finished run, read without its weights."""
    folder: Path
    label: str                       # of the method
    setting: str                     # everything else that affects the result, except the seed
    config: dict
    log: list                        # one dict per epoch
    mechanism: dict                  # the contents of mechanism.json, which report writes, or {}
    parameters: int


def read_run(folder):
    """-> Run, or None where the folder holds no finished one."""
    measured = folder / "mechanism.json"
    try:
        config = json.loads((folder / "config.json").read_text())
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        mechanism = json.loads(measured.read_text()) if measured.exists() else {}
        with torch.device("meta"):
            parameters = sum(parameter.numel() for parameter in build_model(config).parameters())
        run = Run(folder, method_label(config), setting(config), config, log, mechanism, parameters)
        return run if log[-1]["epoch"] == config["epochs"] else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # not a run's folder
        return None


def setting(config):
    """-> text: what affects a result, except method and seed. Most values only where they differ from the recipe."""
    dataset = DATASETS[config["data"]]
    recipe = recipe_for(config["data"], epochs=config["epochs"], batch_size=config["batch_size"])
    usual = dataclasses.asdict(recipe) | dict(
        batch_size=dataset.recipe.batch_size, image_size=dataset.image_size, num_classes=dataset.num_classes or 1000,
        fraction=1.0, init=None, freeze=False)
    if config["init"]:                                               # named without this run's method and seed
        start, end = f"{method_label(config)}-", f"-seed{config['seed']}"
        config = config | dict(init="-".join(
            f"METHOD-{part[len(start):-len(end)]}-seedN" if part.startswith(start) and part.endswith(end) else part
            for part in Path(config["init"]).parts[-2:]))
    differs = [f"{name} {config[name]}" for name, value in usual.items() if config[name] != value]
    return ", ".join(["{model}, {data}, {epochs} epochs, {precision}".format(**config), *differs])


def by_setting(runs):
    """-> {setting: {label: {seed: run}}}, all in the order of the runs."""
    settings = {}
    for run in runs:
        of_method = settings.setdefault(run.setting, {}).setdefault(run.label, {})
        other = of_method.setdefault(run.config["seed"], run)
        if other is not run:
            raise SystemExit(f"error: {run.folder} and {other.folder} have the same method, setting and seed: leave "
                             "one out")
    return settings


def t_test(values, alpha=0.05):
    """-> half the width of a mean's 1 - alpha interval, and the p-value of a zero mean (Student's t, two-sided)."""
    df, error = len(values) - 1, stdev(values) / len(values) ** 0.5
    # With t = sqrt(df) tan(angle), Student's density is proportional to cos(angle) ** (df - 1).
    angle = torch.linspace(0, math.pi / 2, 100_001, dtype=torch.float64)
    t, area = df ** 0.5 * angle[1:].tan(), torch.cumulative_trapezoid(angle.cos() ** (df - 1))
    p = 1 - area / area[-1]                                          # of each t: probability that |t| is larger
    below = p[t * error < abs(mean(values))]                         # of each t below the observed one
    return t[p <= alpha][0].item() * error, below[-1].item() if len(below) else 1.0


def mean_and_deviation(values, digits=2):
    return f"{mean(values):.{digits}f}" + (f" +- {stdev(values):.{digits}f}" if len(values) > 1 else "")


def as_table(title, head, rows, note):
    """-> text: a table in Markdown that can be read as it is, without its empty columns. rows: lists of cells."""
    columns = [(name, "-" * len(name), *cells) for name, *cells in zip(head, *rows) if any(cells)]
    widths = [max(map(len, column)) for column in columns]
    lines = "".join("| " + " | ".join(map(str.ljust, row, widths)) + " |\n" for row in zip(*columns))
    return f"{title}\n\n{lines}\n{note}\n" if rows else ""


RESULTS_NOTE = """\
Test accuracy: mean +- standard deviation over n seeds. Differences are paired by seed. One or two
are listed; for more, it is the mean +- half of a 95 % confidence interval, not corrected for the
number of methods. Best epoch: chosen by test accuracy. Seconds per run.
"""
CONTRASTS_NOTE = """\
Differences are paired by seed; +- is half of the confidence interval of that level. Verdicts are on
the sign, for the setting above only. They need four seeds; read them once, when all planned
seeds are done. The interaction, (lape-gap - gap) - (lape - default), is tested at 5 % by itself.
lape - default, lape-gap - gap, mpvg - pvg and mpvg - default share 5 % by Holm's procedure, even if
some of them are missing: once one is inconclusive, so are all with a larger p-value. The last column
says whether the paper's value, of one run per method, is inside our interval.
"""
MECHANISM_NOTE = """\
Last norm: variance of its bias beta and of the effective offset, beta + mean of LN'(pos_0);
cosine of an image's mean token before and after it. Correlations of LN(x), averaged over images,
with the PE that is added to it: block 0, 1, ..., last norm.
"""
POSITION_NOTE = """\
Test accuracy on some test images, and on the same images with their patches shuffled; share of
tokens whose patch index a linear map predicts from the stream x that enters block 0, 1, ..., and
from LN(x), block 0, 1, ..., last norm. Chance is 100 / N for N patches: 1.6 % for 64.
"""


def results_table(title, by_method, base=None):
    """-> text: one row per method of a setting, {label: {seed: run}}; the paper's values beside it."""
    rows, reference = [], base or next(iter(by_method))
    of_reference = by_method.get(reference, {})
    paper = PAPER.get(title.rpartition(", ")[0], {})                 # its keys leave out the precision
    for label, runs in by_method.items():
        logs = [run.log for run in runs.values()]
        differences = [run.log[-1]["test_accuracy"] - of_reference[seed].log[-1]["test_accuracy"]
                       for seed, run in runs.items() if label != reference and seed in of_reference]
        compared = ", ".join(f"{value:+.2f}" for value in differences)
        if len(differences) > 2:
            compared = f"{mean(differences):+.2f} +- {t_test(differences)[0]:.2f}"
        if 0 < len(differences) < max(len(runs), len(of_reference)):     # some seeds have no partner
            compared += f" (n={len(differences)})"
        rows.append([
            label, str(len(logs)), mean_and_deviation([log[-1]["test_accuracy"] for log in logs]), compared,
            f"{mean(max(line['test_accuracy'] for line in log) for log in logs):.2f}",
            f"{mean(log[-1]['seconds'] for log in logs):.0f}", f"{next(iter(runs.values())).parameters:,}",
            f"{paper[label]:.2f}" if label in paper else ""])
    head = ["method", "n", "last epoch %", f"minus {reference}", "best epoch %", "seconds", "parameters", "paper %"]
    return as_table(title, head, rows, RESULTS_NOTE)


def contrast_values(name, tables):
    """-> the contrast "a - b" or "(a - b) - (c - d)" in each table, {method: accuracy}, that has its methods."""
    signs = dict(zip(name.replace("(", "").replace(")", "").split(" - "), (1, -1, -1, 1)))
    return [sum(sign * table[method] for method, sign in signs.items())
            for table in tables if signs.keys() <= table.keys()]


def contrasts(by_method):
    """-> the contrasts of a setting, {label: {seed: run}}, that have at least three seeds; see CONTRASTS_NOTE.

    One dict each: name; values, percentage points, one per seed; alpha; half, half the width of the 1 - alpha interval;
    verdict; paper and paper_model, the paper's value and the model that it is of.
    """
    config = next(run.config for runs in by_method.values() for run in runs.values())
    if config["data"] not in ("cifar100", "imagenet") or config["init"]:  # the paper has no such runs
        return []
    tables = [{label: runs[seed].log[-1]["test_accuracy"] for label, runs in by_method.items() if seed in runs}
              for seed in sorted(set().union(*by_method.values()))]
    values = {name: contrast_values(name, tables) for name in (INTERACTION, *CLAIMS, *OTHERS)}
    values = {name: points for name, points in values.items() if len(points) > 2}
    p = {name: t_test(points)[1] for name, points in values.items()}
    claims = sorted((name for name in CLAIMS if name in values), key=p.get)
    # Holm: the smallest p-value of the claims times 4, the next times 3, and so on, and none below the one before.
    divisors = dict.fromkeys(values, 1) | {name: len(CLAIMS) - rank for rank, name in enumerate(claims)}
    adjusted = p | dict(zip(claims, itertools.accumulate((divisors[name] * p[name] for name in claims), max)))
    own_model_first = sorted(PAPER, key=lambda title: not title.startswith(f"{config['model']},"))
    rows = []
    for name, points in values.items():
        papers = ((value, title.partition(",")[0]) for title in own_model_first
                  for value in contrast_values(name, [PAPER[title]]))
        paper, paper_model = next(papers, (None, ""))
        alpha, verdict = 0.05 / divisors[name], ""
        if name not in OTHERS and len(points) >= 4:
            sign = "agrees" if mean(points) * paper > 0 else "disagrees"
            verdict = sign if adjusted[name] <= 0.05 else "inconclusive"
        rows.append(dict(name=name, values=points, alpha=alpha, half=t_test(points, alpha)[0], verdict=verdict,
                         paper=paper, paper_model=paper_model))
    return rows


def contrast_table(contrast_rows):
    """-> text: the rows of contrasts() beside the paper's values."""
    cells = []
    for row in contrast_rows:
        middle, paper = mean(row["values"]), ["", "", ""]
        if row["paper"] is not None:
            inside = abs(middle - row["paper"]) <= row["half"]
            paper = [f"{row['paper']:+.2f}", row["paper_model"], "inside" if inside else "outside"]
        cells.append([row["name"], str(len(row["values"])), f"{middle:+.2f} +- {row['half']:.2f}",
                      f"{100 - 100 * row['alpha']:.2f}", row["verdict"], *paper])
    head = ["contrast", "n", "difference", "level %", "verdict", "paper", "model", "paper is"]
    return as_table("Contrasts", head, cells, CONTRASTS_NOTE)


def mechanism_tables(by_method):
    """-> text: what report has measured in the models of a setting; every run has a mechanism."""
    def average(runs, key, digits):
        return mean_and_deviation([run.mechanism[key] for run in runs], digits)

    def by_layer(runs, key, style):
        layers = zip(*(run.mechanism[key] for run in runs))
        return " ".join("  -  " if None in layer else f"{mean(layer):{style}}" for layer in layers)

    norms, positions = [], []
    for label, by_seed in by_method.items():
        runs = [*by_seed.values()]
        norms.append([label, str(len(runs)), average(runs, "beta_variance", 5), average(runs, "offset_variance", 5),
                      average(runs, "cosine", 3), by_layer(runs, "correlation", "+.2f")])
        positions.append([label, average(runs, "ordered", 1), average(runs, "shuffled", 1),
                          by_layer(runs, "stream", "3.0f"), by_layer(runs, "normed", "3.0f")])
    head = ["method", "n", "beta variance", "offset variance", "cosine", "correlations"]
    text = as_table("Last norm and correlations", head, norms, MECHANISM_NOTE)
    head = ["method", "accuracy", "patches shuffled", "index read from x", "from LN(x)"]
    return text + as_table("Position, %", head, positions, POSITION_NOTE)


# ----------------------------------------------------------------------------------------------------- eval and report

@app.command("eval")
def evaluate_command(
    run: Path = typer.Argument(help="A run's folder (its last epoch), or a checkpoint such as best.pt."),
    image_size: int | None = flag("Resize the images to this many pixels, the PE to match.", min=1, shown="the run's"),
    crop_ratio: float = flag("Crop size / short side, for image files. LaPE uses 1.", default=0.875, min=0.1, max=1),
    fold_: bool = flag("Fold the PE norms into constants first (mpvg.fold).", "--fold", default=False),
    data_dir: Path = DATA_DIR,
    device: str = DEVICE,
):
    """Measure a run's test accuracy and loss again."""
    device = choose_device(device)
    checkpoint = load_checkpoint(run)[1]
    config = checkpoint["config"]
    size = image_size or config["image_size"]
    try:
        model = load_weights(build_model(config | dict(image_size=size)), checkpoint["model"])
    except ValueError as error:
        refuse("image-size", str(error))
    net = fold(model) if fold_ else model
    if DATASETS[config["data"]].load and image_size:                 # image files are cropped to this size
        net.register_forward_pre_hook(lambda _, args: F.interpolate(*args, size=size, mode="bicubic", antialias=True))
    data = load_split(config | dict(image_size=size), "test", data_dir, device, crop_ratio=crop_ratio)
    result = evaluate(net.to(device), data, config, device)
    typer.echo(f"{method_label(config)}, {config['model']}{', folded' if fold_ else ''}, {config['data']} at {size}x"
               f"{size}, seed {config['seed']}, epoch {len(checkpoint['log'])}: "
               f"test accuracy {result['test_accuracy']:.2f} %, loss {result['test_loss']:.4f}, "
               f"{len(data):,} images")


def watch_norms(model, images):
    """-> inputs and outputs, (B, N, D), of each block's first norm and of the last norm: x_l and LN_l(x_l)."""
    seen = []
    hooks = [norm.register_forward_hook(lambda norm, inputs, output: seen.append((*inputs, output)))
             for norm in (*(block.norm1 for block in model.blocks), model.norm)]
    model(images)
    for hook in hooks:
        hook.remove()
    return zip(*seen)


def last_norm_offset(model):
    """-> (D,): beta + mean of the last PE, if any: under GAP, what both add to every image's mean."""
    beta, last = model.norm.bias, model.pe_after_last_norm(model.delivered_pe())
    return beta if last is None else beta + last.mean((0, 1))


def shuffle_patches(images, size, generator):
    """-> images (B, 3, H, W) with the patches of each in a random order of its own."""
    patches = F.unfold(images, size, stride=size)                    # (B, 3 * size * size, N)
    order = torch.rand(len(images), patches.shape[2], generator=generator).argsort(1).to(images.device)
    return F.fold(patches.gather(2, order[:, None].expand_as(patches)), images.shape[2:], size, stride=size)


@torch.no_grad()
def measure(model, batches):
    """Measures what the paper plots of a trained model. batches: a list of normalised images (B, 3, H, W) and labels.

    -> tokens: LN_l(x_l) of each block and LN(x_L), averaged over images, (L + 1, N, D); pe: a list, what is added to
    each of them, (N, D) or None; and a dict of correlations, cosine and the last norm's vectors.
    """
    tokens, cosines = 0, []
    for images, _ in batches:
        inputs, outputs = watch_norms(model, images)
        tokens += torch.stack([output.sum(0) for output in outputs])
        cosines.append(F.cosine_similarity(inputs[-1].mean(1), outputs[-1].mean(1), dim=1))  # the paper's appendix
    tokens = (tokens / sum(map(len, cosines))).cpu()                 # (L + 1, N, D)
    delivered = model.delivered_pe()
    pe = [None if e is None else e.detach().expand(1, *tokens.shape[1:])[0].cpu()
          for e in (*delivered, model.pe_after_last_norm(delivered))]
    correlation = [None if e is None or e.min() == e.max() else      # undefined for a constant PE
                   np.corrcoef(t.flatten(), e.flatten())[0, 1].item() for t, e in zip(tokens, pe)]  # Figure 4
    beta, offset = model.norm.bias, last_norm_offset(model)
    return tokens, pe, dict(
        correlation=correlation, cosine=torch.cat(cosines).mean().item(), beta=beta.tolist(),
        gamma=model.norm.weight.tolist(), offset=offset.tolist(), beta_variance=beta.var().item(),
        offset_variance=offset.var().item())


def read_index(to_fit, to_test):
    """-> for each layer, the percentage of tokens whose index, 0 to N - 1, a linear map predicts from their features.

    to_fit, to_test: batches of features, (layers, B, N, D). The map is a ridge regression of the one-hot index on
    centred features, its strength 0.001 of their mean variance.
    """
    count, sums, moments = 0, 0, 0
    for x in to_fit:
        count, sums = count + x.shape[1], sums + x.sum(1)
        moments += x.flatten(1, 2).mT @ x.flatten(1, 2)
    means = sums / count                                             # of each index's tokens, (layers, N, D)
    centre = means.mean(1, keepdim=True)
    covariance = moments / (count * means.shape[1]) - centre.mT @ centre
    diagonal = covariance.diagonal(dim1=1, dim2=2)                   # the features' variances, a view
    diagonal += 1e-3 * diagonal.mean(1, keepdim=True)                # the ridge
    weights = torch.linalg.solve(covariance, (means - centre).mT)    # (layers, D, N), up to a factor
    correct = []
    for x in to_test:
        scores = (x - centre[:, None]) @ weights[:, None]            # (layers, B, N, N)
        correct.append(scores.argmax(3) == torch.arange(x.shape[2]))
    return (100 * torch.cat(correct, 1).double().mean((1, 2))).tolist()


@torch.no_grad()
def measure_position(model, batches):
    """Measures where a model holds position. batches: a list of normalised images (B, 3, H, W) and labels (B,).

    -> a dict, all in %. ordered, shuffled: accuracy on the images, and with each image's patches shuffled.
    The others: read_index of the patch tokens, fitted to every second image and tested on the others.
    stream: of x_l, the input of block 0, 1, ...; normed: of LN_l(x_l), the output of each block's first norm, and of
    LN(x_L); attention: of LN_l(x_l) + e_l, None where there is no e_l.
    """
    delivered, depth, patches = model.delivered_pe(), len(model.blocks), math.prod(model.grid)

    def features(images):                                            # (layers, B, N, D), without the class token
        inputs, outputs = watch_norms(model, images)
        attention = [y if e is None else y + e for y, e in zip(outputs, delivered)]
        return torch.stack([*inputs[:-1], *outputs, *attention])[:, :, -patches:].cpu().double()

    shares = read_index((features(images[::2]) for images, _ in batches),
                        (features(images[1::2]) for images, _ in batches))
    correct, generator = [], torch.Generator().manual_seed(0)
    for images, labels in batches:
        shuffled_images = shuffle_patches(images, model.patch_embed.proj.kernel_size, generator)
        correct.append(torch.stack([model(images), model(shuffled_images)]).argmax(2) == labels)
    ordered, shuffled = (100 * torch.cat(correct, 1).cpu().double().mean(1)).tolist()
    return dict(stream=shares[:depth], normed=shares[depth:-depth], ordered=ordered, shuffled=shuffled,
                attention=[None if e is None else share for share, e in zip(shares[-depth:], delivered)])


def measure_run(run, count, data_dir, device):
    """Measures a run on at most `count` test images, into run.mechanism and mechanism.json. -> tokens, pe, to plot."""
    model = load_checkpoint(run.folder)[0].to(device).eval()
    data = load_split(run.config, "test", data_dir, device)
    every = math.ceil(len(data) / count)                             # files are sorted by class
    batches = [(normalise(images.to(device), run.config["data"]), labels.to(device))
               for images, labels in data.test_batches(0, every, 50)]
    tokens, pe, values = measure(model, batches)
    torch.manual_seed(run.config["seed"])                            # the model before training
    before = [] if run.config["init"] else last_norm_offset(build_model(run.config)).tolist()
    values |= measure_position(model, batches) | dict(
        offset_before=before, images=sum(len(labels) for _, labels in batches))
    save(run.folder / "mechanism.json", (json.dumps(values) + "\n").encode())
    run.mechanism.update(values)
    return tokens, pe


SORTED = "dimension, sorted by value"
FIGURES = {  # name -> panels: x label, y label, values at x = 0, 1, ... (None: no point), values drawn dotted
    "curves": [("epoch", "training loss, cross entropy", lambda run: [None, *(line["loss"] for line in run.log)]),
               ("epoch", "test accuracy, %", lambda run: [None, *(line["test_accuracy"] for line in run.log)])],
    "correlation": [("block", "correlation of LN(x) and its PE", lambda run: run.mechanism["correlation"])],
    "last_norm": [
        (SORTED, "last norm's weight gamma", lambda run: sorted(run.mechanism["gamma"])),
        (SORTED, "last norm's bias beta", lambda run: sorted(run.mechanism["beta"])),
        (SORTED, "beta + mean of LN'(pos_0)\n(dotted: before training)",
         lambda run: sorted(run.mechanism["offset"]), lambda run: sorted(run.mechanism["offset_before"]))],
    "position": [
        ("block", "% of tokens whose patch index\nis read from the stream x", lambda run: run.mechanism["stream"]),
        ("block", "% of tokens whose patch index\nis read from LN(x) (dotted: with its PE)",
         lambda run: run.mechanism["normed"], lambda run: run.mechanism["attention"]),
        ("patches", "test accuracy, %", lambda run: [run.mechanism["ordered"], run.mechanism["shuffled"]])],
}


def plot_lines(path, panels, by_method):
    """Writes a figure of FIGURES: one line per method, the mean of its runs, with a band from minimum to maximum.

    A method has the same colour in all figures. With other options it is dashed, in three ways that repeat.
    """
    from matplotlib.figure import Figure
    figure = Figure(figsize=(5 * len(panels) + 2, 3.8), layout="constrained")
    for ax, (x, y, *lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        dashed = []
        for label, runs in by_method.items():
            color, dash = f"C{list(METHODS).index(next(iter(runs.values())).config['method'])}", "-"
            if "=" in label:
                dash = ("--", "-.", (0, (5, 1, 1, 1, 1, 1)))[dashed.count(color) % 3]
                dashed.append(color)
            for values_of, style in zip(lines, (dash, ":")):
                values = np.array([values_of(run) for run in runs.values()], float)  # None: nan
                middle = values.mean(0)
                ax.plot(middle, linestyle=style, marker="." if len(middle) < 20 else "", color=color,
                        label="" if style == ":" or np.isnan(middle).all() else label)
                ax.fill_between(range(len(middle)), values.min(0), values.max(0), color=color, alpha=0.2, lw=0)
        ax.grid(visible=True, alpha=0.3)
        ax.set(xlabel=x, ylabel=y)
        ax.xaxis.get_major_locator().set_params(integer=True)
        if x == "block":
            depth = max(len(run.mechanism["stream"]) for runs in by_method.values() for run in runs.values())
            ax.set_xticks(range(depth + 1), [*map(str, range(depth)), "last\nnorm"])
        if x == "patches":
            ax.set_xticks([0, 1], ["in order", "shuffled"])
        if path.stem == "correlation":                               # the paper's Figure 4: layers 4 and 11 of 0 to 11
            ax.plot([4 / 11 * (depth - 1), depth - 1], [-0.37, -0.95], "D", mfc="none", color="black")
            ax.set(ylim=(-1, 1), title="diamonds: the paper's DeiT-Ti,\nblocks 4 and 11 of 0 to 11")
    handles, names = ax.get_legend_handles_labels()
    if names:                                                        # none where no method has a layer-wise PE
        figure.legend(handles, names, loc="outside right upper", handlelength=4,
                      title="line: mean of runs\nband: min to max")
    figure.savefig(path)


def plot_contrasts(path, rows):
    """Writes a figure of contrasts: ours with interval and verdict, the paper's as a hollow mark."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(8, 1 + 0.32 * len(rows)), layout="constrained")
    ax = figure.subplots()
    for y, row in enumerate(rows):
        ax.errorbar(mean(row["values"]), y, xerr=row["half"], fmt="o", color="C0", capsize=3)
        ax.plot(math.nan if row["paper"] is None else row["paper"], y, "D", mfc="none", color="black")
        ax.text(1.02, y, row["verdict"], transform=ax.get_yaxis_transform(), va="center")
    ax.axvline(0, color="grey", lw=1)
    ax.grid(axis="x", alpha=0.3)
    ax.set(yticks=range(len(rows)), yticklabels=[row["name"] for row in rows], ylim=(len(rows) - 0.5, -0.5),
           xlabel="difference of test accuracy, percentage points (diamond: the paper)")
    figure.savefig(path)


def plot_layers(path, title, tokens, pe):
    """Writes a heatmap of the averaged tokens and of the PE of each layer, (N, D) each (Figures 2 and 8)."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(1.6 * len(pe) + 0.8, 4.4), layout="constrained")
    figure.suptitle(f"{title}: tokens (down) by dimensions (across); blank: no PE")
    pe = [torch.zeros_like(tokens[0]) if e is None else e for e in pe]
    for name, values, row in zip(("LN(x)", "PE"), (tokens, pe), figure.subplots(2, len(pe))):
        top = max(value.abs().quantile(0.99).item() for value in values) or 1
        for number, (ax, value) in enumerate(zip(row, values)):
            ax.set(xticks=[], yticks=[])
            ax.set_title(f"{name}, {f'block {number}' if number < len(pe) - 1 else 'last norm'}", size=9)
            image = ax.imshow(value.numpy(), "RdBu_r", aspect="auto", interpolation="nearest", vmin=-top, vmax=top)
        figure.colorbar(image, ax=row)
    figure.savefig(path, dpi=100)


@app.command()
def report(
    folders: list[Path] = typer.Argument(help="Folders of runs.", metavar="RUNS..."),
    out: Path = flag("Folder for the figures.", default=Path("runs/report")),
    base: str | None = flag("Method to compare the others with.", shown="the first in the order of METHODS"),
    images: int = flag("Measure on at most this many test images.", default=1000, min=2),
    data_dir: Path = DATA_DIR,
    device: str = DEVICE,
):
    """Print tables of finished runs and draw figures.

    Draws curves, contrasts, position and, as the paper does, correlations, heatmaps and the last norm. Runs that have
    weights are measured into their mechanism.json; for others, that file is used if it exists. Figures need matplotlib.
    """
    device, runs = choose_device(device), []
    for folder in folders:
        if run := read_run(folder):
            runs.append(run)
        elif folder != out:
            typer.echo(f"note: {folder} is left out: it holds no finished run", err=True)
    if not runs:
        raise SystemExit("error: none of these folders holds a finished run: name runs, such as runs/*/")
    if base not in (None, *(run.label for run in runs)):
        labels = ", ".join(sorted({run.label for run in runs}))
        raise SystemExit(f"error: none of these runs is of --base {base}: choose from {labels}")
    runs.sort(key=lambda run: ([*METHODS].index(run.config["method"]), run.label, run.config["seed"]))
    settings, heatmaps = by_setting(runs), {}
    for run in tqdm([run for run in runs if (run.folder / "last.pt").exists()], "measuring", leave=False, disable=None):
        try:
            tokens, pe = measure_run(run, images, data_dir, device)
            heatmaps.setdefault(run.setting, {}).setdefault(run.label, (run.folder.name, tokens, pe))  # one per method
        except (OSError, SystemExit, torch.OutOfMemoryError) as error:
            typer.echo(f"note: {run.folder} could not be measured ({last_line(error)})", err=True)
    measured = by_setting(run for run in runs if "stream" in run.mechanism)
    for title, by_method in settings.items():
        typer.echo(results_table(title, by_method, base) + contrast_table(contrasts(by_method))
                   + mechanism_tables(measured.get(title, {})), nl=False)
    try:
        for title, by_method in settings.items():
            folder = out / title.replace(", ", "-").replace(" ", "-") if len(settings) > 1 else out
            folder.mkdir(parents=True, exist_ok=True)
            if rows := contrasts(by_method):
                plot_contrasts(folder / "contrasts.png", rows)
            for name, panels in FIGURES.items():
                shown = by_method if name == "curves" else measured.get(title)
                if shown:
                    plot_lines(folder / f"{name}.png", panels, shown)
            for name, tokens, pe in heatmaps.get(title, {}).values():
                plot_layers(folder / f"layers-{name}.png", name, tokens, pe)
            typer.echo(f"figures in {folder}")
    except ImportError:
        typer.echo("the figures need matplotlib: pip install matplotlib")


def last_line(error):
    """-> an error's message; a DataLoader's worker puts its traceback before it."""
    return (str(error).strip() or repr(error)).splitlines()[-1].removeprefix("OSError: ")


def main():
    try:
        app()
    except RuntimeError as error:
        if "out of memory" in str(error) or "allocate memory" in str(error):         # CUDA's words, the CPU's
            raise SystemExit("error: out of memory: in training raise --accumulate or lower --batch-size, in a sweep "
                             "lower --jobs") from None
        if "DataLoader worker" in str(error):
            raise SystemExit(f"error: {str(error).rstrip('. ')}: in training lower --workers (0: none)") from None
        if "C++ compiler" in str(error) or "C compiler" in str(error):                # inductor's words, Triton's
            raise SystemExit("error: torch.compile needs a C++ compiler: install g++, or use --compile off") from None
        raise
    except OSError as error:                                         # a full disk, a folder without permission
        raise SystemExit(f"error: {last_line(error)}") from None


if __name__ == "__main__":
    main()
