"""Train the Vision Transformers of mpvg.py on images.

    python train.py --pe layerwise --pool gap --mpvg              # the paper's method, as plain `python train.py`
    python train.py --method lape --data cifar100                 # another row of the paper, by its name

The data set `numbers` is built in: nothing to download, a few minutes on a CPU.
"""
import json
import math
import os
import platform
import time
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
import torchvision
import typer
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from mpvg import METHODS, MODELS, create

# What a flag is where it is not given. cifar100: ViT-Lite's numbers, without its augmentation and 310 epochs for now.
RECIPES = {
    "numbers": dict(model="vit-nano", epochs=6, batch_size=128, lr=2e-3, min_lr=1e-5, warmup_epochs=1,
                    weight_decay=0.05, label_smoothing=0.0, decay_pe=False, flip=False,
                    mean=[0.5, 0.5, 0.5], std=[0.3, 0.3, 0.3]),
    "cifar100": dict(model="vit-lite", epochs=30, batch_size=128, lr=6e-4, min_lr=1e-5, warmup_epochs=3,
                     weight_decay=0.06, label_smoothing=0.1, decay_pe=True, flip=True,
                     mean=[0.5071, 0.4867, 0.4408], std=[0.2675, 0.2565, 0.2761]),
}
# Which row of METHODS the paper's three flags name: (--pe, --pool, --mpvg).
ROWS = {
    ("absolute", "cls", False): "default", ("absolute", "gap", False): "gap", ("absolute", "gap", True): "gap-last-pe",
    ("layerwise", "cls", False): "lape", ("layerwise", "gap", False): "pvg", ("layerwise", "gap", True): "mpvg",
    ("none", "cls", False): "default", ("none", "gap", False): "gap",
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


def normaliser(mean, std, device):
    """-> a function from uint8 images (B, 3, H, W) to floats; mean and std per channel, of pixels from 0 to 1."""
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (mean, std))
    return lambda images: (images / 255 - mean) / std


def load_data(name, root, device):
    """-> {"train": (images, labels), "test": ...} on the device, images as uint8."""
    if name == "numbers":
        data = {"train": numbers(30_000, seed=1), "test": numbers(4_000, seed=2)}
    else:
        data = {split: cifar100(root, train=split == "train") for split in ("train", "test")}
    return {split: (images.to(device), labels.to(device)) for split, (images, labels) in data.items()}


# ------------------------------------------------------------------------------------------------------------ training

def lr_at(epoch, *, epochs, warmup_epochs, lr, min_lr, warmup_lr=1e-6):
    """Learning rate after `epoch` epochs, fractions too: linear warm-up, then a cosine that ends at min_lr."""
    warmup_lr, min_lr = min(warmup_lr, lr), min(min_lr, lr)          # lr is the peak, however small
    if epoch < warmup_epochs:
        return warmup_lr + (lr - warmup_lr) * epoch / warmup_epochs
    return min_lr + 0.5 * (lr - min_lr) * (1 + math.cos(math.pi * min(epoch / epochs, 1)))


def parameter_groups(model, weight_decay, decay_pe):
    """Two groups for AdamW: matrices decay, biases and norms do not; PE tables and the class token only if asked."""
    groups = {True: [], False: []}
    for name, parameter in model.named_parameters():
        is_pe = name in ("pos_embed", "last_pos_embed", "cls_token")
        groups[parameter.ndim > 1 and (decay_pe or not is_pe)].append(parameter)
    return [dict(params=groups[True], weight_decay=weight_decay), dict(params=groups[False], weight_decay=0.0)]


@torch.inference_mode()
def evaluate(model, normalise, images, labels, batch_size=500):
    """-> accuracy in percent over all images."""
    model.eval()
    hits = sum((model(normalise(x)).argmax(1) == y).sum()
               for x, y in zip(images.split(batch_size), labels.split(batch_size)))
    model.train()
    return 100 * hits.item() / len(labels)


def save(path, contents):
    """Writes a checkpoint whole or not at all: to a temporary file, flushed, then renamed."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        torch.save(contents, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def accelerator():
    """-> "cuda", "mps", ... or None where there is only a CPU."""
    return torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else None


def flag(panel, text, *names, default=None, **kwargs):
    """A command-line option. `default` is what --help shows for a default of None: words, or an entry of RECIPES."""
    if default in RECIPES["numbers"]:
        default = ", ".join(f"{data} {recipe[default]}" for data, recipe in RECIPES.items())
    return typer.Option(*names, help=text, rich_help_panel=panel, show_default=default or True, **kwargs)


@app.command()
def train(
    pe: Annotated[Literal["absolute", "layerwise", "none"] | None, flag(
        "Method", "Position embedding: added once, delivered to every block, or none.", default="layerwise")] = None,
    pool: Annotated[Literal["cls", "gap"] | None, flag(
        "Method", "Class token or global average pooling.", default="gap")] = None,
    mpvg: Annotated[bool, flag(
        "Method", "Add the initial PE, through its own LayerNorm, to the last norm's output. "
        "Without --pe, --pool and --method this is on.", "--mpvg")] = False,
    method: Annotated[str | None, flag(
        "Method", f"A row of the paper by name, instead of --pe, --pool, --mpvg: {', '.join(METHODS)}.")] = None,
    model: Annotated[str | None, flag("Method", f"One of {', '.join(MODELS)}.", default="model")] = None,
    data: Annotated[Literal["numbers", "cifar100", "imagenet"] | None, flag(
        "Data", "numbers: built in, drawn in seconds. cifar100: downloaded where absent. imagenet: later.",
        default="cifar100 with an accelerator, numbers without")] = None,
    data_dir: Annotated[Path, flag("Data", "Where cifar100 is or goes.")] = Path("data"),
    epochs: Annotated[int | None, flag(
        "Recipe", "Passes over the training images.", default="epochs", min=1)] = None,
    batch_size: Annotated[int | None, flag("Recipe", "Images a step.", default="batch_size", min=1)] = None,
    lr: Annotated[float | None, flag("Recipe", "Peak learning rate of AdamW.", default="lr", min=0)] = None,
    weight_decay: Annotated[float | None, flag(
        "Recipe", "Of matrices, with cifar100 also of PE and class token; never of biases and norms.",
        default="weight_decay", min=0)] = None,
    seed: Annotated[int, flag("Run", "Of weights and order.", min=0, max=2**32 - 1)] = 0,
    device: Annotated[str, flag("Run", "auto (an accelerator where there is one), cpu, cuda, mps or xpu.")] = "auto",
    name: Annotated[str | None, flag("Run", "Folder of this run.", default="METHOD-MODEL-DATA-seedN")] = None,
    runs: Annotated[Path, flag("Run", "Where run folders go.")] = Path("runs"),
    overwrite: Annotated[bool, flag("Run", "Replace a run of that name.", "--overwrite")] = False,
):
    """Train a Vision Transformer and print its test accuracy.

    Writes runs/NAME/: config.json, log.jsonl (a line an epoch) and last.pt (weights under "model").
    """
    # 1. From flags to a configuration.
    found = accelerator()
    device = (found or "cpu") if device == "auto" else device
    why = "" if data else f" ({'an' if found else 'no'} accelerator found; --data chooses)"
    data = data or ("cifar100" if found else "numbers")
    if data == "imagenet":
        fail("--data imagenet cannot be trained by this version: use --data cifar100 or --data numbers")
    if device.split(":")[0] not in ("cpu", "cuda", "mps", "xpu"):
        fail(f"unknown --device {device!r}: choose from auto, cpu, cuda, mps, xpu")
    if not math.isfinite((lr or 0) + (weight_decay or 0)):
        fail("--lr and --weight-decay must be finite numbers")
    if method is not None and (pe or pool or mpvg):
        fail("--method names a whole row: leave out --pe, --pool and --mpvg, or --method")
    if method is None:
        row = (pe or "layerwise", pool or "gap", mpvg or not (pe or pool))
        method = ROWS.get(row) or fail(f"--mpvg needs a PE and --pool gap, not --pe {row[0]} --pool {row[1]}")
    overrides = {"pe": "none"} if pe == "none" else {}
    recipe = dict(RECIPES[data], **{key: value for key, value in dict(
        model=model, epochs=epochs, batch_size=batch_size, lr=lr, weight_decay=weight_decay).items()
        if value is not None})
    recipe["warmup_epochs"] = min(recipe["warmup_epochs"], recipe["epochs"] / 10)  # short runs warm up shortly
    label = "-".join([method, *(f"{key}={value}" for key, value in overrides.items())])
    name = f"{label}-{recipe['model']}-{data}-seed{seed}" if name is None else name
    if Path(name).name != name or name in ("", "..") or len(name) > 200:
        fail(f"--name {name!r} is not the name of one folder: --runs says where it goes")
    config = dict(data=data, method=method, overrides=overrides, seed=seed, device=device, **recipe,
                  torch=str(torch.__version__), torchvision=torchvision.__version__, python=platform.python_version())

    # 2. Everything that a user can get wrong, before anything is written.
    typer.echo(f"data      {data}{why}, device {device}")
    torch.manual_seed(seed)
    try:
        vit = create(recipe["model"], method, **overrides)
    except ValueError as error:
        fail(error)
    try:
        vit.to(device)
    except (RuntimeError, AssertionError) as error:                  # torch without CUDA asserts
        fail(f"--device {device} cannot be used here, try --device cpu ({str(error).splitlines()[0]})")
    sides = {key: value for key, value in METHODS[method].items() if key not in overrides} | overrides
    typer.echo(f"method    {label}: " + ", ".join(f"{key}={value}" for key, value in sides.items()))
    if vit.image_shape != (3, 32, 32):
        fail(f"{recipe['model']} takes images {vit.image_shape}, {data} has (3, 32, 32): use vit-lite or vit-nano")
    folder = runs / name
    if (folder / "last.pt").exists() and not overwrite:
        fail(f"{folder} holds a run: choose another --name, or --overwrite it")
    split = load_data(data, data_dir, device)
    images, labels = split["train"]
    steps_per_epoch = len(images) // recipe["batch_size"]            # the last, smaller batch is left out
    if steps_per_epoch == 0:
        fail(f"--batch-size {recipe['batch_size']} is more than the {len(images)} training images")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        log = open(folder / "log.jsonl", "w", buffering=1)
    except OSError as error:
        fail(f"cannot write to {folder} ({error}): choose another --runs")

    groups = parameter_groups(vit, recipe["weight_decay"], recipe["decay_pe"])
    decayed, free = (sum(p.numel() for p in group["params"]) for group in groups)
    typer.echo(f"model     {recipe['model']}: {decayed + free:,} parameters, {decayed:,} of them decayed\n"
               f"images    {len(images):,} to train, {len(split['test'][0]):,} to test\n"
               f"run       {folder}\n\nepoch      loss   test %         lr   images/s   seconds")
    normalise = normaliser(recipe["mean"], recipe["std"], device)
    optimizer = torch.optim.AdamW(groups, lr=recipe["lr"], fused=True)
    schedule = {key: recipe[key] for key in ("epochs", "warmup_epochs", "lr", "min_lr")}

    # 3. Train.
    start, step = time.perf_counter(), 0
    total = recipe["epochs"] * steps_per_epoch * recipe["batch_size"]
    with log, tqdm(total=total, unit="image", unit_scale=True, disable=None) as bar:  # silent without a terminal
        for epoch in range(recipe["epochs"]):
            epoch_start, total_loss = time.perf_counter(), torch.zeros((), device=device)
            order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed * 100_003 + epoch))
            for batch in order.to(device).split(recipe["batch_size"])[:steps_per_epoch]:
                x, y = normalise(images[batch]), labels[batch]
                if recipe["flip"]:
                    x = torch.where(torch.rand(len(x), 1, 1, 1, device=device) < 0.5, x.flip(3), x)
                now = lr_at(step / steps_per_epoch, **schedule)
                for group in optimizer.param_groups:
                    group["lr"] = now
                loss = F.cross_entropy(vit(x), y, label_smoothing=recipe["label_smoothing"])
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                total_loss += loss.detach()
                step += 1
                bar.update(len(batch))
                if step % 10 == 0:
                    bar.set_postfix(loss=f"{loss.item():.3f}", lr=f"{now:.2e}", refresh=False)
            mean_loss = total_loss.item() / steps_per_epoch
            if not math.isfinite(mean_loss):
                fail(f"the loss became {mean_loss} in epoch {epoch + 1}: lower --lr ({folder} keeps what came before)")
            seconds = time.perf_counter() - epoch_start
            accuracy = evaluate(vit, normalise, *split["test"])
            speed = steps_per_epoch * recipe["batch_size"] / seconds
            log.write(json.dumps(dict(epoch=epoch + 1, loss=mean_loss, test_accuracy=accuracy, lr=now,
                                      images_per_second=speed, seconds=time.perf_counter() - start)) + "\n")
            save(folder / "last.pt", dict(model=vit.state_dict(), config=config, epoch=epoch + 1))
            bar.write(f"{epoch + 1:>5} {mean_loss:>9.4f} {accuracy:>8.2f} {now:>10.2e} {speed:>10,.0f} "
                      f"{time.perf_counter() - start:>9.0f}")
    typer.echo(f"\ntest accuracy {accuracy:.2f} % after the last of {recipe['epochs']} epochs "
               f"({label}, {recipe['model']}, {data}, seed {seed}); weights in {folder / 'last.pt'}")


if __name__ == "__main__":
    app()
