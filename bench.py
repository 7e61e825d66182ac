"""Times our methods, other libraries' ViTs and the machine's own limits side by side.

    python bench.py                          # DeiT-Ti: five methods, MPVG folded, every installed peer
    python bench.py --quick                  # a first look at a small model, a minute or two on two CPU cores
    python bench.py --methods gap,mpvg,mpvg-folded --tables inference-compiled --json FILE

Each round times the machine's limits (a large copy, a matrix product), then all contestants of a table in random
order. A slowdown of the machine largely cancels in a round's ratios; the median over the rounds is reported.
"""
import ctypes
import itertools
import json
import math
import os
import platform
import random
import textwrap
import time
from importlib import metadata, util
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Literal

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # as in train.py
os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # silence the profiler
os.environ.setdefault("TORCHINDUCTOR_CUDAGRAPH_OR_ERROR", "1")  # raise instead of skipping CUDA graphs

import torch
import typer
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from mpvg import METHODS, MODELS, ViT, fold
from train import DEVICE, choose_device, default_precision, environment, flag, make_train_step, parameter_groups, refuse

TABLES = ("inference-eager", "inference-compiled", "training-eager", "training-compiled")
QUICK = dict(model="vit-nano", methods="default,gap,mpvg", peers="torchvision", tables=",".join(TABLES[:3]), rounds=10)
GRAPH_MODES = ("reduce-overhead", "max-autotune")  # with CUDA graphs, which have a memory pool of their own
PEERS = {"torchvision": "cls", "timm": "cls", "timm gap": "gap", "vit-pytorch": "cls", "vit-pytorch gap": "gap",
         "transformers": "cls"}  # name, whose first word is the package: pooling
PACKAGES = list(dict.fromkeys(name.split()[0] for name in PEERS))
PLAIN = dict(cls="default", gap="gap")  # pooling: the plain method, which the others are compared with


def build(name, sizes):
    """-> model, pooling. name: a method, METHOD-folded or one of PEERS. sizes: ViT's keywords."""
    if name in PEERS:
        return build_peer(name.split()[0], PEERS[name] == "gap", **sizes), PEERS[name]
    model = ViT(**{**sizes, **METHODS[name.removesuffix("-folded")]})
    return (fold(model) if name.endswith("-folded") else model), model.pool


def build_peer(package, gap, image_size, patch_size, num_classes, dim, depth, heads, mlp_ratio, qkv_bias, **_):
    mlp_dim = int(dim * mlp_ratio)
    if package == "torchvision":
        from torchvision.models import VisionTransformer
        return VisionTransformer(image_size, patch_size, depth, heads, dim, mlp_dim, num_classes=num_classes)
    if package == "timm":
        from timm.models import VisionTransformer
        pool = dict(global_pool="avg", class_token=False, fc_norm=False) if gap else {}  # fc_norm: norm after the mean
        return VisionTransformer(image_size, patch_size, num_classes=num_classes, embed_dim=dim, depth=depth,
                                 num_heads=heads, mlp_ratio=mlp_ratio, qkv_bias=qkv_bias, **pool)
    if package == "vit-pytorch":
        from vit_pytorch import ViT
        return ViT(image_size=image_size, patch_size=patch_size, num_classes=num_classes, dim=dim, depth=depth,
                   heads=heads, dim_head=dim // heads, mlp_dim=mlp_dim, pool="mean" if gap else "cls")
    from transformers import ViTConfig, ViTForImageClassification
    return ViTForImageClassification(ViTConfig(
        image_size=image_size, patch_size=patch_size, num_labels=num_classes, hidden_size=dim, qkv_bias=qkv_bias,
        num_hidden_layers=depth, num_attention_heads=heads, intermediate_size=mlp_dim, attn_implementation="sdpa"))


class Contestant:  # a model, or one of the machine's limits
    def __init__(self, name, call, pool="", work=0):
        self.name, self.call, self.pool = name, call, pool
        self.work = work                                             # of a limit: operations or bytes per call
        self.repeat = 1                                              # calls per timing
        self.seconds = []                                            # per call, round by round
        self.facts = {}                                              # memory and others

    def time(self, device):
        synchronize = torch.accelerator.synchronize if device.type != "cpu" else torch.cpu.synchronize
        synchronize(device)                                          # earlier work on the device is not timed
        start = time.perf_counter()
        for _ in range(self.repeat):
            self.call()
        synchronize(device)
        return (time.perf_counter() - start) / self.repeat

    def warm_up(self, device):
        seconds = min(self.time(device) for _ in range(2))           # the first may record a CUDA graph
        self.repeat = 1 + int(0.05 / seconds)                        # 50 ms or more per timing
        return median(self.time(device) for _ in range(5))


def make_limits(device, dtype):
    side, size = (2048, 2 ** 26) if device.type == "cpu" else (8192, 2 ** 27)
    a, b, c = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(3))
    x, y = (torch.ones(size, device=device, dtype=dtype) for _ in range(2))
    return (Contestant("copy", lambda: y.copy_(x), work=2 * size * x.itemsize),
            Contestant("matmul", lambda: torch.mm(a, b, out=c), work=2 * side ** 3))


def make_contestant(name, table, batches, setup):
    training, compiled = table.startswith("training"), table.endswith("compiled")
    torch.manual_seed(0)
    model, pool = build(name, setup.sizes)
    model = model.to(setup.device, torch.float32 if training else setup.dtype)
    model.train(training).requires_grad_(training)                   # inference keeps nothing for a backward pass
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.05, decay_pe=False), fused=True) if training else None

    def forward(images):
        if compiled and not torch.compiler.is_compiling():
            raise RuntimeError("torch.compile is switched off")
        output = model(images)
        return getattr(output, "logits", output)                     # transformers wraps them

    if compiled:
        # torch.compile keeps graphs by code object: each contestant gets its own, so none checks another's guards.
        forward.__code__ = forward.__code__.replace(co_name=name)
        forward = torch.compile(forward, fullgraph=True, dynamic=False, mode=setup.mode)
    step = make_train_step(forward, optimizer, 0.1, setup.precision) if training else lambda images, _: forward(images)
    batches = itertools.cycle(batches)                               # in turn, so that no cache holds them

    def call():
        torch.compiler.cudagraph_mark_step_begin()
        step(*next(batches))

    one = Contestant(name, call, pool)
    first_call, steady = one.time(setup.device), one.warm_up(setup.device)
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    memory, attention = look_inside(call, 3 * weights if training else weights, setup.device)  # AdamW has two moments
    one.facts = dict(memory_bytes=None if compiled and setup.mode in GRAPH_MODES else memory,
                     compile_seconds=first_call - steady if compiled else None, attention=attention)
    return one


def look_inside(call, held, device):
    """-> (held + peak bytes that a call allocates, name of torch's attention kernel), None where unknown."""
    cuda, prefix = device.type == "cuda", "aten::_scaled_dot_product_"
    if cuda:
        held -= torch.cuda.memory_allocated(device)                  # the peak below includes it
        torch.cuda.reset_peak_memory_stats(device)
    with torch.autograd.profiler.profile(profile_memory=True) as trace:
        call()
    changes = [e.nbytes() for e in trace.kineto_results.events() if e.name() == "[memory]"]
    peak = torch.cuda.max_memory_allocated(device) if cuda else max(itertools.accumulate(changes), default=0)
    kernels = [e.key.removeprefix(prefix) for e in trace.key_averages() if e.key.startswith(prefix)]
    kernel = next((kernel for kernel in kernels if "backward" not in kernel), None)
    return (held + peak if cuda or device.type == "cpu" else None), kernel


def explain(error):
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line + ": lower --batch" * ("out of memory" in str(error) or "allocate memory" in str(error))


def run_table(table, names, setup):
    training, device, side = table.startswith("training"), setup.device, setup.sizes["image_size"]
    count = max(2, min(64, 2 ** 25 // (setup.batch * 3 * side ** 2)))  # 2 to 64; above 2, at most 128 MiB in fp32
    dtype = torch.float32 if training else setup.dtype
    batches = [(torch.randn(setup.batch, 3, side, side, device=device, dtype=dtype),
                torch.randint(setup.sizes["num_classes"], (setup.batch,), device=device)) for _ in range(count)]
    names = [name for name in names if not (training and name.endswith("-folded"))]
    contestants, notes, limits = [], [], make_limits(device, setup.dtype)
    for name in tqdm(names, f"{table}: warming up", leave=False, disable=None):
        try:
            contestants.append(make_contestant(name, table, batches, setup))
        except Exception as error:                                   # other libraries and compilers raise anything
            problem = f"{name} failed: {explain(error)}"
            if name not in PEERS:
                raise SystemExit(f"error: {table}: {problem} (--tables can leave this table out)") from error
            notes.append(f"{problem} (left out)")
    for limit in limits:
        limit.warm_up(device)
    with torch.compiler.set_stance("fail_on_recompile"):             # compilation is never part of a timing
        for _ in tqdm(range(setup.rounds), f"{table}: timing", leave=False, disable=None):
            for limit in limits:
                limit.seconds.append(limit.time(device))
            order = random.sample(contestants, len(contestants))
            order[-1].time(device)                                   # not recorded: after a limit, caches are cold
            for one in order:
                one.seconds.append(one.time(device))
    return summarise(contestants, limits, notes, training, setup)


def speed(one, other):
    """-> [median, low, high] of the rounds' ratios: one's speed over the other's, with a 95 % interval."""
    ratios, n = sorted(b / a for a, b in zip(one.seconds, other.seconds)), len(one.seconds)
    tails = itertools.accumulate(math.comb(n, i) / 2 ** n for i in range(n))         # as for n tosses of a coin
    first = max(0, sum(tail <= 0.025 for tail in tails) - 1)         # with fewer than 9 rounds it spans all ratios
    return [median(ratios), ratios[first], ratios[-1 - first]]


def count_work(sizes, pool, training, batch, itemsize):
    """-> operations and bytes of a step of the plain method; a multiplication and an addition are two operations.

    Bytes, with all else fused into the matrix products: each weight and pixel once; per token and block what each
    product reads and writes, in units of D. Training: three times that, and AdamW's 4 reads and 3 writes per weight.
    """
    with torch.device("meta"), FlopCounterMode(display=False) as counter:  # there attention is matrix products
        model = ViT(**{**sizes, **METHODS[PLAIN[pool]]})
        images = torch.empty(batch, 3, sizes["image_size"], sizes["image_size"])
        model(images).sum().backward() if training else model(images)
    parameters, h = sum(p.numel() for p in model.parameters()), sizes["mlp_ratio"]
    x = 4 / itemsize if training else 1                              # the residual stream is float32 under autocast
    per_token = (x + 3) + (3 + 1) + (1 + 2 * x) + (x + h) + (h + 2 * x)  # qkv, attention, proj, fc1, fc2: in + out
    values = int(batch * model.pos_embed.numel() * sizes["depth"] * per_token)
    moved = (4 if training else itemsize) * (parameters + images.numel()) + itemsize * values
    return counter.get_total_flops(), (3 * moved + 7 * 4 * parameters) if training else moved


def summarise(contestants, limits, notes, training, setup):
    copy, matmul = limits
    rows = []
    for one in contestants:
        flops, moved = count_work(setup.sizes, one.pool, training, setup.batch, setup.dtype.itemsize)
        at_peak = [flops / matmul.work * t for t in matmul.seconds]  # a step's seconds at the limit, round by round
        at_roof = [max(p, moved / copy.work * t) for p, t in zip(at_peak, copy.seconds)]
        plain = next((other for other in contestants if other.name == PLAIN[one.pool]), None)
        best = min((other for other in contestants if other.pool == one.pool and other.name in PEERS),
                   key=lambda other: speed(one, other), default=None)    # the fastest
        step_seconds = median(plain.seconds) / speed(one, plain)[0] if plain else median(one.seconds)
        rows.append(dict(
            name=one.name, plain=plain and plain.name, speed_to_plain=plain and speed(one, plain),
            best_peer=best and best.name, speed_to_best_peer=best and speed(one, best),
            share_of_peak=median(limit / t for limit, t in zip(at_peak, one.seconds)),
            share_of_roofline=median(limit / t for limit, t in zip(at_roof, one.seconds)),
            images_per_second=setup.batch / step_seconds, flops_per_image=flops // setup.batch, bytes_per_step=moved,
            milliseconds=[1000 * t for t in (step_seconds, min(one.seconds), max(one.seconds))], seconds=one.seconds,
            **one.facts))
    return dict(matmul_flops=matmul.work / median(matmul.seconds), matmul_seconds=matmul.seconds,
                copy_bytes=copy.work / median(copy.seconds), copy_seconds=copy.seconds,
                attention=rows[0]["attention"] and "{attention} in {name}".format(**rows[0]), rows=rows, notes=notes)


def as_text(table, result):
    lines = [f"{table}: matrix product {result['matmul_flops'] / 1e9:,.0f} GFLOP/s, copy "
             f"{result['copy_bytes'] / 1e9:,.1f} GB/s, {result['attention'] or 'attention kernel unknown'}",
             f"{'':<17} {'x plain':<17} {'x best peer':<17} peak roof images/s {'ms (min-max)':<16}   MiB comp"]
    for row in result["rows"]:
        x_plain, x_best = ("{:.3f} {:.3f}-{:.3f}".format(*row[key]) if row[key] else "-"
                           for key in ("speed_to_plain", "speed_to_best_peer"))
        ms = "{} ({}-{})".format(*(f"{t:.{(t < 10) + (t < 100)}f}" for t in row["milliseconds"]))
        mib = "-" if row["memory_bytes"] is None else f"{row['memory_bytes'] / 2 ** 20:.0f}"
        comp = "-" if row["compile_seconds"] is None else f"{row['compile_seconds']:.0f}"
        lines.append(f"{row['name']:<17} {x_plain:<17} {x_best:<17} {row['share_of_peak']:>4.0%} "
                     f"{row['share_of_roofline']:>4.0%} {row['images_per_second']:>8.1f} {ms:<16} {mib:>5} {comp:>4}")
    return "\n".join(lines + [f"  {note}" for note in result["notes"]])


def verdict(results):
    parts = ["{:.3f} ({:.3f} to {:.3f}) in {}".format(*row["speed_to_plain"], table)
             for table, result in results.items() for row in result["rows"] if row["name"] == "mpvg" and row["plain"]]
    return f"mpvg's speed relative to gap's, median (95 % interval): {', '.join(parts) or 'not measured'}."


def choose(option, text, known):
    chosen = [*known] if text == "all" else list(dict.fromkeys(word.strip() for word in text.split(",")))
    for word in chosen:
        if word not in known:
            refuse(option, f"unknown {word!r}: choose from {', '.join(known)}")
    return chosen


def use_quick_defaults(ctx: typer.Context, quick: bool):
    if quick:
        ctx.default_map = QUICK


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
                  context_settings=dict(help_option_names=["-h", "--help"], max_content_width=100))


@app.command()
def bench(
    model: Literal[tuple(MODELS)] = flag("The model's size.", default="deit-tiny"),
    methods: str = flag(f"Comma-separated: {', '.join(METHODS)}; METHOD-folded: after fold(). all: all of these.",
                        default="default,gap,lape,pvg,mpvg,mpvg-folded"),
    peers: str = flag(f"Other libraries' models: all, none, or a list of {', '.join(PACKAGES)}.", default="all"),
    tables: str = flag(f"all, or a list of {', '.join(TABLES)}.", default="all"),
    quick: bool = flag(f"Other defaults: {', '.join(f'--{k} {v}' for k, v in QUICK.items())}.", "--quick",
                       default=False, is_eager=True, callback=use_quick_defaults),
    batch: int | None = flag("Images per step.", shown="128 for 32x32; else 256 (CPU: 16)", min=1, max=65536),
    dtype: Literal["bf16", "fp32"] | None = flag("bf16 trains in autocast; fp32 is TF32 on CUDA.",
                                                 shown="bf16 if CUDA has it, else fp32"),
    mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = flag(
        "torch.compile's mode.", default="default"),
    rounds: int = flag("Timings of each contestant.", default=20, min=6),
    device: str = DEVICE,
    json_file: Path | None = flag("Also write the tables to this file, with every timing.", "--json", dir_okay=False),
):
    """Times our methods, other libraries' ViTs and the machine's limits in turn. Dropout is off for every model.

    \b
    x plain      speed relative to default (class token) or gap (GAP)
    x best peer  speed relative to the fastest peer with the same pooling (--json names it)
                 both: median of the rounds' ratios, 95 % interval; another run may differ by more
    peak, roof   share of a large matrix product's speed; of the roofline, which also counts moved bytes
    images/s     the plain method's median times x plain, so that the two columns agree; likewise ms
    MiB          weights, AdamW's moments and the peak of what a step allocates
    comp         seconds of compilation, few if torch finds the graph in its disk cache
    """
    names = choose("methods", methods, [*METHODS, *(f"{name}-folded" for name in METHODS)])
    tables, packages = choose("tables", tables, TABLES), [] if peers == "none" else choose("peers", peers, PACKAGES)
    if any("training" in table for table in tables) and all(name.endswith("-folded") for name in names):
        refuse("methods", "folded models do not train: add a method")
    device = choose_device(device)
    dtype = dtype or default_precision(device)
    if mode in GRAPH_MODES and device.type != "cuda":
        refuse("mode", f"{mode} uses CUDA graphs, which {device} does not have")
    if device.type == "cpu" and platform.libc_ver()[0] == "glibc":   # page faults slow contestants down at random
        for option, value in ((-1, -1), (-4, 0)):                    # M_TRIM_THRESHOLD, M_MMAP_MAX: keep freed memory
            ctypes.CDLL(None).mallopt(option, value)
    if json_file:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.open("a").close()                                  # fails now rather than after the first table
    sizes = ViT.__init__.__kwdefaults__ | MODELS[model] | dict(attn_drop=0.0, drop_path=0.0)
    batch = batch or (128 if sizes["image_size"] == 32 else 16 if device.type == "cpu" else 256)
    setup = SimpleNamespace(sizes=sizes, device=device, batch=batch, mode=mode, rounds=rounds, precision=dtype,
                            dtype=torch.bfloat16 if dtype == "bf16" else torch.float32)
    installed = [package for package in packages if util.find_spec(package.replace("-", "_"))]
    pools = {METHODS[name.removesuffix("-folded")]["pool"] for name in names}
    names += [name for name, pool in PEERS.items() if name.split()[0] in installed and pool in pools]
    versions = {name: metadata.version(name) if name in installed else "not installed" for name in packages}
    header = environment(device) | versions | dict(model=model, batch=batch, dtype=dtype, mode=mode, rounds=rounds)
    text = ", ".join(f"{key} {value}" for key, value in header.items())
    print(textwrap.fill(text, 100, break_on_hyphens=False), flush=True)
    results = {}
    for table in tables:
        results[table] = run_table(table, names, setup)
        print(f"\n{as_text(table, results[table])}", flush=True)
        if json_file:
            json_file.write_text(json.dumps(dict(header=header, verdict=verdict(results), tables=results), indent=1))
    print("\n" + textwrap.fill(verdict(results), 100, break_on_hyphens=False))


def main():
    try:
        app()
    except (OSError, RuntimeError) as error:                         # lack of memory is a RuntimeError
        raise SystemExit(f"error: {explain(error)}") from error


if __name__ == "__main__":
    main()
