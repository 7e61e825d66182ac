"""How fast? The methods beside each other, beside other libraries' ViTs and beside the machine's limit, in one run.

    python bench.py                                      # DeiT-Ti: the paper's methods, every peer that is installed
    python bench.py --quick                              # a first look, under a minute on two CPU cores
    python bench.py --model vit-lite --tables training-eager,training-compiled
    python bench.py --methods gap,mpvg,mpvg-folded --tables inference-compiled --freeze --json FILE
    python bench.py --data DIR                           # image files: loading, a training step, and both together

The contestants of a table take turns, A B C A B C ..., and a ratio is the median of the rounds' ratios: a machine that
slows down slows all of them. Absolute figures belong to a machine and an hour.
"""
import itertools
import json
import math
import os
import re
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from inspect import signature
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Literal

import torch
import torch._inductor.config
import typer
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from tqdm import tqdm

from mpvg import METHODS, MODELS, ViT, create, fold
from train import (
    PIXELS,
    RECIPES,
    Folder,
    class_names,
    default_workers,
    environment,
    epoch_batches,
    epoch_order,
    fail,
    flag,
    given_flags,
    in_folder,
    make_folder,
    parameter_groups,
    save,
    step_functions,
    usable_device,
)

TABLES = ("inference-eager", "inference-compiled", "training-eager", "training-compiled")
CUDA_GRAPHS = ("reduce-overhead", "max-autotune")                    # the modes of torch.compile that use them
PLAIN = dict(cls="default", gap="gap")  # by pooling, the method without layer-wise PE: the cost of PE is measured on it


# ---------------------------------------------------------------- the contestants: our methods, other libraries' models

def torchvision_vit(c, pool):
    from torchvision.models import VisionTransformer
    return VisionTransformer(c["image_size"], c["patch_size"], c["depth"], c["heads"], c["dim"],
                             int(c["dim"] * c["mlp_ratio"]), num_classes=c["num_classes"])


def timm_vit(c, pool):
    from timm.models.vision_transformer import VisionTransformer
    gap = dict(global_pool="avg", class_token=False, fc_norm=False)  # with fc_norm: mean, then norm, another model
    return VisionTransformer(c["image_size"], c["patch_size"], num_classes=c["num_classes"], embed_dim=c["dim"],
                             depth=c["depth"], num_heads=c["heads"], mlp_ratio=c["mlp_ratio"], qkv_bias=c["qkv_bias"],
                             **gap if pool == "gap" else {})


def vit_pytorch_vit(c, pool):
    from vit_pytorch import ViT
    return ViT(image_size=c["image_size"], patch_size=c["patch_size"], num_classes=c["num_classes"], dim=c["dim"],
               depth=c["depth"], heads=c["heads"], dim_head=c["dim"] // c["heads"],
               mlp_dim=int(c["dim"] * c["mlp_ratio"]), pool="mean" if pool == "gap" else "cls")


def transformers_vit(c, pool):
    from transformers import ViTConfig, ViTForImageClassification

    class Logits(ViTForImageClassification):
        def forward(self, x):
            return super().forward(x).logits

    return Logits(ViTConfig(
        image_size=c["image_size"], patch_size=c["patch_size"], num_labels=c["num_classes"], hidden_size=c["dim"],
        num_hidden_layers=c["depth"], num_attention_heads=c["heads"], qkv_bias=c["qkv_bias"],
        intermediate_size=int(c["dim"] * c["mlp_ratio"]), attn_implementation="sdpa"))


PEERS = {  # package: its ViT at our sizes, its poolings
    "torchvision": (torchvision_vit, ["cls"]), "timm": (timm_vit, ["cls", "gap"]),
    "vit-pytorch": (vit_pytorch_vit, ["cls", "gap"]), "transformers": (transformers_vit, ["cls"]),
}


def is_peer(name):
    return name.split()[0] in PEERS


def installed(peer):
    """-> its version, or None."""
    try:
        return version(peer)
    except PackageNotFoundError:
        return None


def build(name, c):
    """-> model, pooling. Names: of METHODS, METHOD-folded, LIBRARY, "LIBRARY gap"."""
    if is_peer(name):
        library, _, pool = name.partition(" ")
        return PEERS[library][0](c, pool or "cls"), pool or "cls"
    method = METHODS[name.removesuffix("-folded")]
    model = ViT(**{**c, **method})
    return fold(model.eval()) if name.endswith("-folded") else model, method["pool"]


# ---------------------------------------------------------------------------------------- the limit, counted and timed

def count_flops(c, pool, training):
    """-> operations an image, a multiplication and an addition each one; of the plain method, and of its matrix
    products only: attention counts as the two that it is, also where a kernel computes one of them twice."""
    with torch.device("meta"), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        logits = ViT(**{**c, **METHODS[PLAIN[pool]]})(torch.empty(1, 3, c["image_size"], c["image_size"]))
        if training:
            logits.sum().backward()
    return counter.get_total_flops()


def count_bytes(c, pool, training, batch, itemsize):
    """-> about the bytes that a step of the plain method moves where all else is fused into the matrix products.

    Forward: weights and images are read once, in training as float32. Per token and block, qkv reads D values and
    writes 3 D; attention 3 D and D; its projection D and the stream, and D; fc1 D and h D; fc2 h D and the stream, and
    D: (14 + 2 h) D, where h is the MLP ratio. Training: three times that; AdamW reads p, g, m, v and writes p, m, v.
    """
    with torch.device("meta"):
        model = ViT(**{**c, **METHODS[PLAIN[pool]]})
    parameters, tokens = sum(p.numel() for p in model.parameters()), model.pos_embed.shape[1]
    activations = batch * tokens * c["depth"] * (14 + 2 * c["mlp_ratio"]) * c["dim"]
    once = (4 if training else itemsize) * (parameters + batch * 3 * c["image_size"] ** 2)
    forward = once + itemsize * activations
    return int(3 * forward + 28 * parameters if training else forward)


def limits(device, dtype):
    """-> a large matrix product, its operations, a large copy, its bytes read and written: what the machine can do."""
    side, size = (2048, 2 ** 26) if device.type == "cpu" else (8192, 2 ** 27)
    a, b, c = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(3))
    x, y = (torch.ones(size, device=device, dtype=dtype) for _ in range(2))
    return (Contestant("matmul", lambda: torch.mm(a, b, out=c)), 2 * side ** 3,
            Contestant("copy", lambda: y.copy_(x)), 2 * size * x.itemsize)


# -------------------------------------------------------------------------------------------------------------- timing

@dataclass
class Contestant:
    name: str
    call: Callable                                                   # its work, once
    pool: str = ""
    repeat: int = 1                                                  # calls a timing
    seconds: list = field(default_factory=list)                      # a call, round by round
    compile_seconds: float | None = None
    memory: int | None = None                                        # bytes, at the most
    attention: str | None = None                                     # its kernel
    notes: list = field(default_factory=list)                        # what torch.compile would not say aloud

    def time(self, device):
        """-> seconds a call."""
        synchronize = torch.accelerator.synchronize if device.type != "cpu" else lambda: None
        synchronize()                                                # what others have started is not its work
        start = time.perf_counter()
        for _ in range(self.repeat):
            self.call()
        synchronize()
        return (time.perf_counter() - start) / self.repeat

    def warm_up(self, device):
        """Calls until three timings in a row, each long enough for the clock, agree within 10 %, or 20 times.
        -> seconds a call."""
        self.repeat = math.ceil(0.05 / min(self.time(device), self.time(device)))
        seconds = [self.time(device) for _ in range(3)]
        while max(seconds[-3:]) > 1.1 * min(seconds[-3:]) and len(seconds) < 20:
            seconds.append(self.time(device))
        return seconds[-1]


def look_inside(call, held, device):
    """-> (memory, attention) of a call: bytes at the most, with the `held` bytes that live longer (None: torch does not
    tell for this device); the name of torch's attention kernel (None: another one, or within a CUDA graph)."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")                   # the profiler is chatty
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as trace:
        call()
    kernel, memory = "aten::_scaled_dot_product_", None
    names = [e.key.removeprefix(kernel) for e in trace.key_averages() if e.key.startswith(kernel)]
    if device.type == "cuda":
        memory = held + torch.cuda.max_memory_allocated() - before
    elif device.type == "cpu":
        changes = [e.nbytes() for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"]
        memory = held + max(itertools.accumulate(changes), default=0)
    return memory, min(names, default=None)


def compiler_events():
    """-> what torch.compile has done in this process so far."""
    return {"compiled graphs": counters["stats"]["unique_graphs"], "graph breaks": counters["graph_break"].total(),
            "skipped CUDA graphs": counters["inductor"]["cudagraph_skips"]}


def enter(name, c, table, batches, s):
    """-> Contestant, compiled and warm; `notes`: more than one graph, breaks, CUDA graphs skipped."""
    training, compiled = table.startswith("training"), table.endswith("compiled")
    torch.manual_seed(0)
    model, pool = build(name, c)
    model = model.to(s.device, torch.float32 if training else s.dtype).train(training)
    precision = "bf16" if training and s.dtype == torch.bfloat16 else "fp32"     # bf16: autocast over float32 weights
    loss, predict = step_functions(model, dict(precision=precision, label_smoothing=0.1, compile="off"), s.device)
    forward = loss if training else predict
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.05, False), fused=True) if training else None
    if compiled:
        # Graphs are kept by code object. With one of its own, no contestant is slowed down by the guards of others.
        forward.__code__ = forward.__code__.replace(co_name=re.sub(r"\W", "_", name))
        torch._inductor.config.freezing = s.freeze and not training
        forward = torch.compile(forward, fullgraph=not is_peer(name), dynamic=False, mode=s.mode)
    batches = itertools.cycle(batches)                               # in turn, so that no cache holds them

    def call():
        x, y = next(batches)
        torch.compiler.cudagraph_mark_step_begin()
        if training:
            forward(x, y).backward()
            optimizer.step()
            optimizer.zero_grad()
        else:
            with torch.no_grad():
                forward(x)

    one, before = Contestant(name, call, pool), compiler_events()
    first = one.time(s.device)
    steady = one.warm_up(s.device)
    one.compile_seconds = max(0.0, first - steady) if compiled else None
    happened = {what: count - before[what] for what, count in compiler_events().items()}
    if compiled:                                                     # one graph, and nothing else, is as it should be
        one.notes = [f"{count} {what}" for what, count in happened.items() if count != (what == "compiled graphs")]
    held = [*model.parameters(), *model.buffers()]
    if training:
        held += [v for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v)]
    one.memory, one.attention = look_inside(call, sum(tensor.nbytes for tensor in held), s.device)
    if compiled and s.mode in CUDA_GRAPHS:
        one.memory = None                                            # it lies in a pool of the graph's own
    return one


def run_table(table, names, c, s, bar):
    """-> plain values: "rows", a dict each, "notes", and the limit that was measured in the same rounds."""
    training, side = table.startswith("training"), c["image_size"]
    count = max(2, min(64, 2 ** 25 // (s.batch * 3 * side ** 2)))    # of batches: more than a cache holds
    batches = [(torch.randn(s.batch, 3, side, side, device=s.device, dtype=torch.float32 if training else s.dtype),
                torch.randint(c["num_classes"], (s.batch,), device=s.device)) for _ in range(count)]
    matmul, operations, copy, copied = limits(s.device, s.dtype)
    for limit in (copy, matmul):
        limit.warm_up(s.device)
    entered, notes = [], []
    for name in names:
        bar.update()
        if training and name.endswith("-folded"):
            continue
        bar.set_description(f"{table}: {name}")
        try:
            entered.append(enter(name, c, table, batches, s))
        except Exception as error:                                   # other libraries, and compilers, fail in any way
            reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            if is_peer(name):
                notes.append(f"{name} failed and is left out: {reason}")
            elif isinstance(error, TorchDynamoException):
                fail(f"{table}: {name} did not compile as one graph: {reason}")
            else:
                raise
    for _ in range(s.rounds):
        for limit in (copy, matmul):
            limit.seconds.append(limit.time(s.device))
        entered[-1].call()                                           # so that the first one, too, finds a rival's cache
        for one in entered:
            before = compiler_events()
            one.seconds.append(one.time(s.device))
            if compiler_events() != before:
                one.notes.append("compiled again while it was timed")
        bar.update()
    for one in entered:
        if one.notes and not is_peer(one.name):
            fail(f"{table}: torch.compile did not keep {one.name} in one piece: {', '.join(one.notes)}")
        notes += [f"{one.name}: {note}" for note in one.notes]

    def spread(values):
        return [median(values), min(values), max(values)]

    def speed(one, other):                                           # above 1: faster than the other
        return other and spread([b / a for a, b in zip(one.seconds, other.seconds)])

    counted = {pool: (s.batch * count_flops(c, pool, training),
                      count_bytes(c, pool, training, s.batch, s.dtype.itemsize)) for pool in {o.pool for o in entered}}
    rows = []
    for one in entered:
        flops, moved = counted[one.pool]
        plain = next((other for name in (PLAIN[one.pool], *PLAIN.values()) for other in entered if other.name == name),
                     None)
        best = min((other for other in entered if other.pool == one.pool and is_peer(other.name)),
                   key=lambda other: speed(one, other)[0], default=None)
        rows.append(dict(
            name=one.name, plain=plain and plain.name, best_peer=best and best.name,
            speed_to_plain=speed(one, plain), speed_to_best_peer=speed(one, best),
            share_of_peak=median(flops / operations * m / t for m, t in zip(matmul.seconds, one.seconds)),
            share_of_roofline=median(max(flops / operations * m, moved / copied * b) / t
                                     for m, b, t in zip(matmul.seconds, copy.seconds, one.seconds)),
            images_per_second=s.batch / median(one.seconds), milliseconds=[1000 * t for t in spread(one.seconds)],
            memory_bytes=one.memory, compile_seconds=one.compile_seconds, attention=one.attention,
            flops_per_image=flops // s.batch, bytes_per_step=moved, seconds=one.seconds))
    return dict(matmul_flops=operations / median(matmul.seconds), copy_bytes=copied / median(copy.seconds),
                attention=entered[0].attention, rows=rows, notes=notes)


# --------------------------------------------------------------------------------------------------------- image files

def usual_loader(folder, order, s):
    """What most training scripts have: Pillow decodes, crops and changes every crop by itself, in the workers.

    The same operations as ours but for mixing; RandAugment's are torchvision's, two, each applied half of the time.
    """
    bicubic = v2.InterpolationMode.BICUBIC
    change = v2.RandomApply([v2.RandAugment(1, interpolation=bicubic)], 0.5)
    folder.transform = v2.Compose([
        v2.RandomResizedCrop(224, interpolation=bicubic), v2.RandomHorizontalFlip(), change, change, v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True), v2.Normalize(*PIXELS["imagenet"]),
        v2.RandomErasing(0.25, value="random")])
    return DataLoader(folder, s.batch, sampler=order.flatten().tolist(), num_workers=s.workers,
                      persistent_workers=s.workers > 0, pin_memory=s.device.type == "cuda")


def run_data(root, model, s):
    """-> plain values: images/s of loading alone, of loading and augmenting, of a training step, and of all together.

    All pass over the same images of one small epoch, with the recipe's repeated augmentation, in turn.
    """
    config = RECIPES["imagenet"] | dict(data="imagenet", seed=0, batch_size=s.batch)
    classes, folder = len(class_names(root)), in_folder(ImageFolder, root, "train")
    steps = min(len(folder.samples) // s.batch, 12 if s.device.type == "cpu" else 8 * max(s.workers, 4))
    if not steps:
        fail(f"--data {root} has only {len(folder.samples)} images to train on: take a smaller --batch")
    rows = torch.randperm(len(folder.samples), generator=torch.Generator().manual_seed(0))[:steps * s.batch]
    folder.samples = [folder.samples[row] for row in rows]
    data = Folder(folder.samples, 224, s.device, s.workers, config["crop_scale"], config["bicubic"])
    order, seeds = epoch_order(config, len(data), 0)
    usual = usual_loader(folder, order, s)
    vit = create(model, "mpvg", num_classes=classes).to(s.device)
    loss, _ = step_functions(vit, dict(label_smoothing=0.1, compile="on" if s.device.type == "cuda" else "off",
                                       precision="bf16" if s.dtype == torch.bfloat16 else "fp32"), s.device)
    optimizer = torch.optim.AdamW(parameter_groups(vit, 0.05, False), fused=True)

    def loaded():
        return ((x[0], y[0]) for *_, x, y in data.pieces(order, seeds, 0, range(s.batch), s.batch))

    def augmented():
        return epoch_batches(config, data, 0, 0, classes, 1)

    prepared = [*itertools.islice(augmented(), 4)]

    def go(batches, training):
        for x, y in batches():
            x, y = x.to(s.device), y.to(s.device)
            if training:
                loss(x, y).backward()
                optimizer.step()
                optimizer.zero_grad()

    contestants = [Contestant(name, partial(go, *how)) for name, how in {
        "usual pipeline": (lambda: usual, False),
        "decode, crop": (loaded, False),
        "and augment": (augmented, False),
        "training step": (lambda: itertools.islice(itertools.cycle(prepared), steps), True),
        "all together": (augmented, True)}.items()]
    for one in tqdm(contestants, "warming up", leave=False, disable=None):
        one.call()
    for _, one in tqdm([*itertools.product(range(s.rounds), contestants)], "timing", leave=False, disable=None):
        one.seconds.append(one.time(s.device))
    images = steps * s.batch
    return dict(
        images=images, files=len(order.unique()), workers=s.workers,
        bytes_per_file=sum(Path(path).stat().st_size for path, _ in folder.samples) // len(folder.samples),
        rows=[dict(name=one.name, images_per_second=[images / f(one.seconds) for f in (median, max, min)],
                   speed_to_usual=[f([b / a for a, b in zip(one.seconds, contestants[0].seconds)])
                                   for f in (median, min, max)], seconds=one.seconds) for one in contestants])


def data_as_text(result):
    lines = ["data: {images:,} crops of {files:,} files, {kilobytes:.0f} kB each, {workers} workers".format(
        **result, kilobytes=result["bytes_per_file"] / 1000), f"{'':<15} {'images/s (min-max)':<25} x usual (min-max)"]
    for row in result["rows"]:
        speed = "{:,.1f} ({:,.1f}-{:,.1f})".format(*row["images_per_second"])
        lines.append(f"{row['name']:<15} {speed:<25} {{:.2f}} ({{:.2f}}-{{:.2f}})".format(*row["speed_to_usual"]))
    loading, step = (row["images_per_second"][0] for row in result["rows"] if row["name"] in
                     ("decode, crop", "training step"))
    core = loading / max(1, result["workers"])
    return "\n".join([*lines, f"one worker decodes and crops {core:,.0f} images/s; this step takes what "
                      f"{step / core:.2g} of them make"])


# -------------------------------------------------------------------------------------------------------- command line

def as_text(table, result):
    """A table for people: at most 100 columns."""
    def ratio(value):
        return "{:.3f} ({:.2f}-{:.2f})".format(*value) if value else "-"

    lines = [f"{table}: matrix product {result['matmul_flops'] / 1e9:,.0f} GFLOP/s, copy "
             f"{result['copy_bytes'] / 1e9:,.1f} GB/s, {result['attention'] or 'attention kernel unknown'}",
             f"{'':<15} {'x plain':<17} {'x best peer':<17} peak roof images/s {'ms (min-max)':<16}   MiB comp s"]
    for row in result["rows"]:
        ms = "{} ({}-{})".format(*(f"{t:.0f}" if t >= 100 else f"{t:.1f}" for t in row["milliseconds"]))
        memory = "-" if row["memory_bytes"] is None else f"{row['memory_bytes'] / 2 ** 20:.0f}"
        compiled = "-" if row["compile_seconds"] is None else f"{row['compile_seconds']:.0f}"
        lines.append(f"{row['name']:<15} {ratio(row['speed_to_plain']):<17} {ratio(row['speed_to_best_peer']):<17} "
                     f"{row['share_of_peak']:>4.0%} {row['share_of_roofline']:>4.0%} {row['images_per_second']:>8,.1f} "
                     f"{ms:<16} {memory:>5} {compiled:>6}")
    return "\n".join(lines + [f"  {note}" for note in result["notes"]])


def words(option, text, known):
    """-> the words of a list with commas; ends the program where one is not known."""
    chosen = list(dict.fromkeys(word.strip() for word in text.split(",")))
    for word in chosen:
        if word not in known:
            fail(f"unknown {option} {word!r}: choose from {', '.join(known)}")
    return chosen


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def bench(
    ctx: typer.Context,
    model: str | None = flag("What", f"One of {', '.join(MODELS)}.", of="deit-tiny"),
    methods: str | None = flag("What", "Of `python mpvg.py`; NAME-folded: after fold(), at inference.",
                               of="default,gap,lape,pvg,mpvg,mpvg-folded"),
    peers: str | None = flag("What", f"Other libraries' models: all, none, or of {', '.join(PEERS)}.", of="all"),
    tables: str | None = flag("What", f"Of {', '.join(TABLES)}.", of="all"),
    data: Path | None = flag("What", "Instead: images/s of reading DIR/train/CLASS/*.JPEG, of a training step "
                             "of --model, and of both together, beside torchvision's usual pipeline.", of="none"),
    quick: bool = flag("What", "vit-nano; default and mpvg; torchvision; 3 rounds; all tables but training-compiled. "
                       "Each can still be given.", "--quick", value=False),
    batch: int | None = flag("How", "Images a step.", of="128 of 32 x 32; else 256 with an accelerator, 16 without",
                             min=1),
    dtype: Literal["bf16", "fp32"] | None = flag("How", "bf16: of the weights at inference, autocast in training; "
                                                 "very slow on a CPU that has none.", of="bf16 with CUDA, else fp32"),
    mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = flag(
        "How", "Of torch.compile.", value="default"),
    freeze: bool = flag("How", "Weights become constants of compiled inference.", "--freeze", value=False),
    dropout: bool = flag("How", "Our models with the attention dropout and drop-path they are trained with; without "
                         "it, and in peers always, both are 0.", "--dropout", value=False),
    rounds: int | None = flag("How", "Timings of each contestant.", of="20; with --data 5", min=3),
    workers: int | None = flag("How", "With --data: processes that read.", of="the cores; on a CPU 0", min=0),
    device: str = flag("How", "auto, cpu, cuda, mps, ...", value="auto"),
    json_file: Path | None = flag("How", "Also write the tables there, with every timing.", "--json"),
):
    """Times our methods, other libraries' ViTs and the machine itself in turn: inference and training, eager, compiled.

    x plain: speed beside our plain method of the same pooling, default (class token) or gap; beside the other one where
    it is not among the methods. x best peer: beside the other library's model of that pooling that comes out best;
    above 1 is faster. peak: share of the speed of a large matrix product. roof: of the roofline, which knows what must
    be moved as well. MiB: memory at the most. comp s: seconds of the first call, few where torch has the graph in its
    cache on disk.
    """
    without = {"methods", "peers", "tables", "quick", "mode", "freeze", "dropout"} if data else {"workers"}
    if wrong := sorted(without & {*given_flags(ctx)}):
        fail(f"--{wrong[0]} is of no meaning {'with' if data else 'without'} --data: leave it out")
    model = ("vit-nano" if quick else "deit-tiny") if model is None else model
    if model not in MODELS:
        fail(f"unknown --model {model!r}: choose from {', '.join(MODELS)}")
    if methods is None:
        methods = "default,mpvg" if quick else "default,gap,lape,pvg,mpvg,mpvg-folded"
    names = words("--methods", methods, [*METHODS, *(f"{name}-folded" for name in METHODS)])
    tables = words("--tables", tables, TABLES) if tables is not None else TABLES[:3] if quick else TABLES
    peers = ("torchvision" if quick else "all") if peers is None else peers
    peers = list(PEERS) if peers == "all" else [] if peers == "none" else words("--peers", peers, PEERS)
    if any("training" in table for table in tables) and all(name.endswith("-folded") for name in names):
        fail("folded models are for inference: leave --tables training-... out, or give --methods one that trains")
    device = usable_device(device)
    if mode in CUDA_GRAPHS and device.type != "cuda":
        fail(f"--mode {mode} is CUDA graphs and the device is {device}: take default or max-autotune-no-cudagraphs")
    if json_file:
        make_folder(json_file.parent, "--json")
        if json_file.exists() and not json_file.is_file():
            fail(f"--json {json_file} is no file: name one")
    c = {name: p.default for name, p in signature(ViT).parameters.items()} | MODELS[model]
    if data and c["image_size"] != 224:
        fail(f"--data is read at 224x224, and {model} takes {c['image_size']}x{c['image_size']}: take a DeiT")
    if not dropout:
        c |= dict(attn_drop=0.0, drop_path=0.0)
    dtype = dtype or ("bf16" if device.type == "cuda" else "fp32")
    batch = batch or (128 if c["image_size"] == 32 else 16 if device.type == "cpu" else 256)
    if data and batch % 2:
        fail(f"--batch {batch} is odd: --data mixes images in pairs")
    s = SimpleNamespace(device=device, batch=batch, mode=mode, freeze=freeze,
                        rounds=rounds or (3 if quick else 5 if data else 20),
                        workers=default_workers(device) if workers is None else workers,
                        dtype=dict(bf16=torch.bfloat16, fp32=torch.float32)[dtype])
    if data:
        names, peers, tables = [], [], ["data"]
    versions = {peer: installed(peer) for peer in peers}
    missing = [peer for peer in peers if versions[peer] is None]
    pools = {METHODS[name.removesuffix("-folded")]["pool"] for name in names}
    names += [peer if pool == "cls" else f"{peer} gap" for peer in peers if peer not in missing
              for pool in PEERS[peer][1] if pool in pools]
    header = environment(device) | dict(model=model, batch=batch, dtype=dtype, mode=mode, freeze=freeze,
                                        dropout=dropout, rounds=s.rounds)
    header = {peer: versions[peer] for peer in peers if peer not in missing} | header
    if device.type == "cuda":
        header |= dict(cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version())
    typer.echo(textwrap.fill(", ".join(f"{key} {value}" for key, value in header.items()), 100))
    for peer in peers:
        if peer in missing:
            typer.echo(f"{peer} is not installed and left out")
        elif not pools.intersection(PEERS[peer][1]):
            typer.echo(f"{peer} is left out: it knows only {PEERS[peer][1][0]}, and no method here has that pooling")

    results = {}
    with tqdm(total=len(tables) * (len(names) + s.rounds), leave=False, disable=True if data else None) as bar:
        for table in tables:
            try:
                results[table] = run_data(data, model, s) if data else run_table(table, names, c, s, bar)
            except RuntimeError as error:                            # on a CPU, memory that is not there is only that
                if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
                    raise
                fail(f"{table}: out of memory: take a smaller --batch, fewer --methods or fewer --peers")
            except OSError as error:                                 # Pillow's; a worker's is in its last line
                fail(f"--data {data}: the usual pipeline does not get over a file ({str(error).splitlines()[-1]})")
            with bar.external_write_mode():
                typer.echo(f"\n{data_as_text(results[table]) if data else as_text(table, results[table])}")
            if json_file:
                save(json_file, json.dumps(dict(header=header, missing=missing, tables=results), indent=1) + "\n")


if __name__ == "__main__":
    app()
