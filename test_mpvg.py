"""The specification of mpvg.py, train.py and bench.py: `python -m pytest`. Nothing here asserts a timing."""
import argparse
import io
import json
import math
import multiprocessing
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, fields, replace
from functools import cache, partial, reduce
from itertools import chain, combinations, product
from pathlib import Path
from random import Random
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageEnhance, ImageOps
from pytest import approx
from torch.testing import assert_close
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, RandomErasing, RandomResizedCrop, Resize

import bench
import mpvg
import train
from mpvg import METHODS, MODELS, ViT, create, fold, load_weights, resize_pos_embed

torch.set_num_threads(1)  # these models are too small to share
ROOT, CPU = Path(__file__).parent, torch.device("cpu")
make_numbers, load_numbers = train.numbers, train.DATASETS["numbers"].load
assert_same = partial(assert_close, rtol=1e-10, atol=1e-10)  # the same up to rounding, in float64
assert_identical = partial(assert_close, rtol=0, atol=0)  # bit for bit


@cache
def small_data(root, train):
    """In place of numbers and CIFAR-100, so that a run takes a second: 200 training and 40 test images."""
    return make_numbers(200, 1) if train else make_numbers(40, 2)


for _name in ("numbers", "cifar100"):  # every run in this process uses them
    train.DATASETS[_name] = replace(train.DATASETS[_name], load=small_data)


def argv(*arguments):
    """-> a command line's words: text is split as a shell splits it, a path is not."""
    words = []
    for argument in arguments:
        words += [str(argument)] if isinstance(argument, Path) else shlex.split(argument)
    return words


def run_cli(main, *arguments):
    """Runs a program's main() here -> its exit code and what it writes, .code, .out, .err."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["program", *argv(*arguments)])
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
    message = f"{code}\n" if isinstance(code, str) else ""  # Python prints it and exits with 1
    return SimpleNamespace(code=1 if message else code, out=out.getvalue(), err=err.getvalue() + message)


def ok(result):
    assert result.code == 0, result.err
    return result


def raises(says, kind=ValueError):
    return pytest.raises(kind, match=re.escape(says))


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def parameter_count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def read_json(path):
    return json.loads(path.read_text())


TINY = dict(image_size=(8, 12), patch_size=4, num_classes=5, dim=16, depth=3, heads=2, mlp_ratio=2.0,
            norm_eps=2e-6)  # neither ViT's default nor torch's


def randomise(model, std=0.3):
    """-> the model in float64, every parameter random, so that no term can hide behind a 0 or a 1."""
    model = model.double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return model


def tiny(method="mpvg", seed=0, **overrides):
    torch.manual_seed(seed)
    return randomise(ViT(**{**TINY, **METHODS.get(method, {}), **overrides}), std=0.5)


def images(batch=4, size=(8, 12), seed=1, dtype=torch.float64):
    return torch.randn(batch, 3, *size, generator=seeded(seed), dtype=dtype)


# ----------------------------------------------------------------------------------------- the equations, written out

def layer_norm(x, p, name):
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    return (x - mean) / (variance + TINY["norm_eps"]).sqrt() * p[name + ".weight"] + p[name + ".bias"]


def msa(x, p, name, heads):
    out = []
    q, k, v = (x @ p[name + ".qkv.weight"].T + p.get(name + ".qkv.bias", 0.0)).chunk(3, dim=-1)
    for qh, kh, vh in zip(*(t.chunk(heads, dim=-1) for t in (q, k, v))):
        out.append((qh @ kh.mT / qh.shape[-1] ** 0.5).softmax(-1) @ vh)
    return torch.cat(out, -1) @ p[name + ".proj.weight"].T + p[name + ".proj.bias"]


def mlp(x, p, name):
    hidden = x @ p[name + ".fc1.weight"].T + p[name + ".fc1.bias"]
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / 2 ** 0.5))
    return hidden @ p[name + ".fc2.weight"].T + p[name + ".fc2.bias"]


def equations(p, img, *, pe, pool, last_pe=None, layer0=False, hierarchical=True, add_input=True, block_type="prenorm",
              patch=4, depth=3, heads=2, **_):
    """-> tokens after the last norm and its PE; logits; of each block and the last norm (x, LN(x), its PE or None)."""
    pieces = img.unfold(2, patch, patch).unfold(3, patch, patch).permute(0, 2, 3, 1, 4, 5)  # (B, h, w, C, p, p)
    x = pieces.flatten(3).flatten(1, 2) @ p["patch_embed.proj.weight"].flatten(1).T + p["patch_embed.proj.bias"]
    if pool == "cls":
        x = torch.cat([p["cls_token"].expand(len(x), 1, -1), x], dim=1)
    pos_0 = p.get("pos_embed")
    if pe == "absolute" or (pe == "layerwise" and add_input):
        x = x + pos_0
    e, layers = {}, []
    for i in range(depth):
        y = layer_norm(x, p, f"blocks.{i}.norm1")
        if pe == "layerwise" and (i >= 1 or layer0):
            source = e[i - 1] if hierarchical and i - 1 in e else pos_0
            e[i] = layer_norm(source, p, f"blocks.{i}.pe_norm")
        layers.append((x, y, e.get(i)))
        x = x + msa(y + e.get(i, 0), p, f"blocks.{i}.attn", heads)
        y = layer_norm(x, p, f"blocks.{i}.norm2")
        x = (y if block_type == "renorm" else x) + mlp(y, p, f"blocks.{i}.mlp")
    y, last = layer_norm(x, p, "norm"), None
    if last_pe == "shift":
        last = p["last_shift"]
    elif last_pe == "free":
        last = layer_norm(p["last_pos_embed"], p, "pe_norm")
    elif last_pe is not None:
        last = layer_norm(pos_0 if last_pe == 0 else e[last_pe], p, "pe_norm")
    layers.append((x, y, last))
    y = y if last is None else y + last
    z = y[:, 0] if pool == "cls" else y.mean(1)
    return y, z @ p["head.weight"].T + p["head.bias"], layers


def every_toggle():
    yield from METHODS.values()
    ends = [("cls", None), ("gap", None), ("gap", "shift"), ("gap", "free")]
    for pe, (pool, last_pe) in product(("absolute", "none"), ends):
        yield dict(pe=pe, pool=pool, last_pe=last_pe)
    ends += [("gap", 0), ("gap", 1), ("gap", 2)]
    for layer0, hierarchical, add_input, (pool, last_pe) in product(*[(False, True)] * 3, ends):
        yield dict(pe="layerwise", layer0=layer0, hierarchical=hierarchical, add_input=add_input, pool=pool,
                   last_pe=last_pe)


@pytest.mark.parametrize("extra", [dict(), dict(block_type="renorm", qkv_bias=False), dict(pe_init="sincos")], ids=str)
def test_every_method_and_toggle_equals_the_equations(extra):
    """And every parameter gets a gradient: DistributedDataParallel refuses one that is not used."""
    x = images()
    for toggles in every_toggle():
        model = tiny(None, **toggles, **extra)
        y, expected, _ = equations(model.state_dict(), x, **toggles, **extra)
        logits = model(x)
        assert_same(model.forward_features(x), y, msg=str(toggles))
        assert_same(logits, expected, msg=str(toggles))
        F.cross_entropy(logits, torch.arange(4)).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad.abs().max() > 0, (toggles, name)


def test_the_residual_stream_is_fp32_under_autocast():
    """For every method: without pos_0 at the input nothing else would lift it from the convolution's bf16."""
    for toggles in every_toggle():
        model, seen = tiny(None, **toggles).float(), []
        for module in (*model.blocks, model.norm):
            module.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0].dtype))
        with torch.autocast("cpu", torch.bfloat16):
            model(images().float())
        assert seen == [torch.float32] * 4, toggles


def test_sincos_is_a_fixed_2d_table():
    model = ViT(**TINY, pe_init="sincos")
    assert "pos_embed" in model.state_dict() and "pos_embed" not in dict(model.named_parameters())
    assert model.pos_embed.shape == (1, 7, 16) and not model.pos_embed[0, 0].any()
    for i, (y, x) in enumerate(product(range(2), range(3))):
        row = [f(p / 10000 ** (k / 4)) for p in (y, x) for f in (math.sin, math.cos) for k in range(4)]
        assert_close(model.pos_embed[0, 1 + i], torch.tensor(row), rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------ parameters, presets, other libraries' ViTs

def test_presets_are_the_recipes():
    """What the parameter counts below do not fix."""
    deit = dict(heads=3, norm_eps=1e-6, attn_drop=0, drop_path=0.1, block_type="prenorm", init="deit",
                pe_init="learned", pe_std=0.02)
    lite = dict(deit, heads=4, norm_eps=1e-5, attn_drop=0.1, block_type="renorm", init="vit-lite", pe_std=0.2)
    presets = {"deit-tiny": deit, "deit-small": dict(deit, heads=6), "deit-base": dict(deit, heads=12),
               "vit-nano": dict(deit, heads=4, drop_path=0), "vit-lite": lite, "vit-lite-mini": lite}
    assert {name: {key: sizes(name)[key] for key in deit} for name in MODELS} == presets


PRINTED = """\
method       pe         pool  last_pe  layer0  hierarchical  add_input
default      absolute   cls   -        -       -             -
gap          absolute   gap   -        -       -             -
lape         layerwise  cls   -        True    True          False
lape-gap     layerwise  gap   -        True    True          False
pvg          layerwise  gap   -        False   True          True
mpvg         layerwise  gap   0        False   True          True
gap-last-pe  absolute   gap   0        -       -             -
mpvg-shift   layerwise  gap   shift    False   True          True
mpvg-free    layerwise  gap   free     False   True          True

parameters     default     gap         lape        pvg         mpvg
vit-lite       3,740,004   3,739,492   3,743,588   3,742,564   3,743,076
vit-nano       570,084     569,828     571,108     570,596     570,852
deit-tiny      5,717,416   5,717,032   5,722,024   5,721,256   5,721,640
deit-small     22,050,664  22,049,896  22,059,880  22,058,344  22,059,112
deit-base      86,567,656  86,566,120  86,586,088  86,583,016  86,584,552
vit-lite-mini  542,404     542,212     543,748     543,364     543,556
"""
PAPER_COUNTS = {  # in thousands, cut: default, lape, pvg, mpvg
    "vit-lite": [3740, 3744, 3742, 3743], "deit-tiny": [5717, 5721, 5721, 5721],
    "deit-small": [22050, 22059, 22058, 22059], "deit-base": [86567, 86586, 86583, 86584]}


def test_mpvg_alone_prints_the_papers_methods_and_parameter_counts(monkeypatch, capsys):
    """It needs only torch. Two of the paper's 16 counts differ in the last digit: results/fidelity.md."""
    for name in ("train", "bench", "numpy", "torchvision", "PIL", "typer"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not there
    runpy.run_path(str(ROOT / "mpvg.py"), run_name="__main__")
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows == [line.split() for line in PRINTED.splitlines()]
    differ = [(model, paper) for model, default, _, *others in rows[-6:]
              for own, paper in zip((default, *others), PAPER_COUNTS.get(model, ()))
              if int(own.replace(",", "")) // 1000 != paper]
    assert differ == [("vit-lite", 3744), ("deit-tiny", 5721)]  # both are lape's


def sizes(model, **overrides):
    return ViT.__init__.__kwdefaults__ | MODELS[model] | overrides


TORCHVISIONS = {  # what its ViT calls our parameters
    "class_token": "cls_token", "encoder.pos_embedding": "pos_embed", "conv_proj": "patch_embed.proj",
    "encoder.layers.encoder_layer_": "blocks.", "ln_1": "norm1", "ln_2": "norm2", "encoder.ln": "norm",
    "self_attention.in_proj_": "attn.qkv.", "self_attention.out_proj": "attn.proj",
    "mlp.0": "mlp.fc1", "mlp.3": "mlp.fc2", "heads.head": "head"}


@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize("name", bench.PEERS)
def test_other_libraries_vits_have_our_size_and_with_our_weights_our_logits(name, qkv_bias):
    pytest.importorskip(name.split()[0].replace("-", "_"))
    c = sizes("vit-nano", depth=2, qkv_bias=qkv_bias)
    peer, pool = bench.build(name, c)
    ours = ViT(**{**c, **METHODS[bench.PLAIN[pool]]})
    assert pool == ("gap" if " gap" in name else "cls")
    theirs, own = parameter_count(peer), parameter_count(ours)
    if "vit-pytorch" in name:  # never a bias in qkv; two norms more, around the patch embedding
        own += 2 * 3 * 8 * 8 + 2 * 128 - 2 * 3 * 128 * qkv_bias
    if name == "torchvision":  # always a bias in qkv
        own += 2 * 3 * 128 * (not qkv_bias)
    assert theirs == own
    x = images(2, (32, 32))
    logits = randomise(peer)(x)
    assert_same(peer.train()(x), logits)  # without dropout
    if "timm" in name or (name == "torchvision" and qkv_bias):  # the very same model
        state = peer.state_dict()
        for their_name, our_name in TORCHVISIONS.items():
            state = {key.replace(their_name, our_name): value for key, value in state.items()}
        load_weights(ours.double().eval(), state)
        assert_same(ours(x), logits)


# ------------------------------------------------------------------------------------- three facts, and permutations

def test_facts_1_and_2_every_pe_term_can_be_stored_the_last_one_in_the_heads_bias():
    for toggles in every_toggle():
        model, x = tiny(None, **toggles), images()
        logits, names, folded = model(x), [*model.state_dict()], fold(model.train())
        for net in (folded, fold(folded), model.eval()):
            assert_same(net(x), logits, msg=str(toggles))
        assert not folded.training and not any("pe_norm" in name or "last_" in name or p.requires_grad
                                               for name, p in folded.named_parameters())
        assert [*model.state_dict()] == names and all(p.requires_grad for p in model.parameters())  # as it was
        assert folded.half()(x.half()).dtype == torch.half


def test_fact_3_two_offsets_learn_the_same_as_one_at_twice_the_learning_rate():
    logits = []
    for method, twin in (("mpvg", "pe_norm.bias"), ("mpvg-free", "pe_norm.bias"), ("mpvg-shift", "last_shift"),
                         ("pvg", "norm.bias")):
        torch.manual_seed(0)
        model = ViT(**TINY, **METHODS[method]).double()
        beta, (decayed, others) = model.norm.bias, train.parameter_groups(model, 0.05, decay_pe=False)
        others["params"] = [p for p in others["params"] if p is not beta]
        offset = dict(params=[beta], lr=2e-2 if method == "pvg" else 1e-2, weight_decay=0)
        train_step = train.make_train_step(model, torch.optim.AdamW([decayed, others, offset], lr=1e-2))
        for seed in range(30):
            train_step(images(8, seed=seed), torch.arange(8) % 5)
        assert beta.abs().mean() > 0.01
        assert_close(beta, dict(model.named_parameters())[twin], rtol=0, atol=1e-12)
        logits.append(model.eval()(images()))
    assert_same(*logits[2:])  # mpvg-shift's and pvg's


def test_a_model_without_pe_ignores_the_order_of_patches():
    x = images(1).repeat(2, 1, 1, 1)
    shuffled = train.shuffle_patches(x, 4, seeded(0))
    assert not torch.equal(shuffled[0], shuffled[1])  # each image has an order of its own
    blind = tiny(None, pe="none", pool="gap")
    assert_same(blind(shuffled), blind(x))


# ------------------------------------------------------------------------------- training, compile, export, the rest

@pytest.mark.parametrize("method", ["default", "lape", "mpvg", "mpvg-shift", "mpvg-free"])
def test_compiled_equals_eager(method):
    """A graph break or a recompilation is an error. mpvg: Inductor without SIMD; others: the graph."""
    torch._dynamo.reset()
    model = tiny(method, depth=2).float().train()
    backend = "inductor" if method == "mpvg" else "aot_eager"
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=backend)

    def loss_and_gradients(net):
        loss = F.cross_entropy(net(images(dtype=torch.float32)), torch.arange(4))
        return [loss, *torch.autograd.grad(loss, [*model.parameters()])]

    plain = torch._inductor.config.patch({"cpp.simdlen": 1})  # without SIMD it compiles faster
    with torch._dynamo.config.patch(error_on_recompile=True), plain:
        eager, first, second = map(loss_and_gradients, (model, compiled, compiled))
    assert_close(first, eager, rtol=1e-3, atol=1e-4)
    assert_close(second, first, rtol=1e-5, atol=1e-5)


def test_export_for_any_batch_size():
    """Strict: as torch.compile with fullgraph=True, it refuses a graph break."""
    batch = torch.export.Dim("batch", min=1, max=64)
    for net in (tiny("lape"), fold(tiny("mpvg"))):  # a class token is expanded to the batch
        exported = torch.export.export(net, (images(2),), dynamic_shapes=({0: batch},), strict=True).module()
        assert_same(exported(images(5)), net(images(5)))


@pytest.mark.parametrize("silent", ["attn.proj", "mlp.fc2"])
def test_drop_path_drops_a_branch_of_some_images_and_scales_it_for_the_others(silent):
    model, x = tiny("mpvg", drop_path=0.25), torch.randn(1, 6, 16, dtype=torch.float64).repeat(4000, 1, 1)
    assert [block.drop_path for block in model.blocks] == approx([0, 0.125, 0.25])
    block = model.blocks[2]
    for parameter in block.get_submodule(silent).parameters():  # leaves the other branch alone
        torch.nn.init.zeros_(parameter)
    branch, found = block(x) - x, block.train()(x) - x
    dropped = (found == 0).all(dim=(1, 2))
    assert dropped.double().mean() == approx(0.25, abs=0.03)
    assert_close(found[~dropped], branch[~dropped] / 0.75)


def test_attention_dropout_in_training_zeroes_weights_and_scales_up_the_rest():
    attention, x = tiny("mpvg", attn_drop=0.25).blocks[0].attn, torch.randn(4000, 1, 16, dtype=torch.float64)
    attention.proj = torch.nn.Identity()
    kept, found = (attention.train(mode)(x).view(4000, 2, 8) for mode in (False, True))
    dropped = (found == 0).all(dim=2)  # of each head's only weight, which is 1 for a single token
    assert dropped.double().mean() == approx(0.25, abs=0.03)
    assert_close(found[~dropped], kept[~dropped] / 0.75)


def test_initialisation():
    torch.manual_seed(0)
    lite = create("vit-lite", "default").requires_grad_(False)
    deit = create("deit-tiny", "mpvg-free", depth=2, pe_std=0.3).requires_grad_(False)
    assert not lite.cls_token.any() and create("deit-tiny", "default", depth=1).cls_token.std() > 0.01
    for drawn, std in (
            (lite.pos_embed, 0.2), (deit.pos_embed, 0.3), (deit.last_pos_embed, 0.3),
            (lite.patch_embed.proj.weight, (2 / 48) ** 0.5), (deit.patch_embed.proj.weight, (1 / 3 / 768) ** 0.5)):
        assert drawn.std() == approx(std, rel=0.05)
    for model in (lite, deit):
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                assert parameter.std() == approx(0.02, rel=0.1), name
            elif ".bias" in name and "patch_embed" not in name:
                assert not parameter.any(), name
            elif "norm" in name:
                assert (parameter == 1).all(), name


def test_a_seed_gives_all_methods_the_same_weights():
    """So that a comparison can be paired by seed; class-token PE tables are larger, norms start alike."""
    states = []
    for method in METHODS:
        torch.manual_seed(3)
        states.append(create("vit-nano", method).state_dict())
    for state in states:
        for name in ("patch_embed.proj", "blocks.0.attn.qkv", "blocks.3.mlp.fc2", "head"):
            assert torch.equal(state[f"{name}.weight"], states[0][f"{name}.weight"])
    gap = [state["pos_embed"] for method, state in zip(METHODS, states) if METHODS[method]["pool"] == "gap"]
    assert all(torch.equal(table, gap[0]) for table in gap)


@pytest.mark.parametrize("options, says", [
    (dict(pool="cls", last_pe=0), "last_pe needs pool='gap': use that"),
    (dict(pool="gap", pe="none", last_pe=0), "last_pe=0 names a PE that pe='none' does not have"),
    (dict(pool="gap", pe="absolute", last_pe=1), "use pe='layerwise'"),
    (dict(pool="gap", pe="layerwise", last_pe=3), "choose from None, 0 to 2"),
    (dict(pool="gap", pe="layerwise", last_pe=-1), "unknown last_pe -1"),
    (dict(pe="absolute", layer0=True), "leave them out with pe='absolute'"),
    (dict(pe="layerwise", layer0=1), "layer0=1 is neither True nor False"),
    (dict(image_size=(8, 10)), "8x10 is not divisible"),
    (dict(image_size=(3, 8, 8)), "image_height=(3, 8, 8) is not a positive whole number"),
    (dict(dim=18, heads=4), "dim 18 is not divisible by heads 4"),
    (dict(dim=6, heads=2, pe_init="sincos"), "by 4 for pe_init='sincos'"),
    (dict(heads=True), "heads=True is not a positive"),
    (dict(norm_eps=math.nan), "norm_eps=nan is not a positive number"),
    (dict(pe_std=True), "pe_std=True is not a positive number"),
    (dict(drop_path=1.0), "drop_path=1.0 is not in [0, 1)"),
    (dict(pe="relative"), "unknown pe 'relative': choose from absolute, layerwise, none")])
def test_impossible_options_say_what_to_do(options, says):
    with raises(says):
        ViT(**{**TINY, **options})


def test_unknown_names_and_shapes():
    with raises("unknown model 'vit-huge': choose from vit-lite"):
        create("vit-huge", "mpvg")
    with raises("(4, 3, 8, 8), the model takes (B, *(3, 8, 12)): resize"):
        tiny()(images(size=(8, 8)))
    assert tiny(in_channels=2)(images()[:, :2]).shape == (4, 5)


# --------------------------------------------------------------------------------------- resizing and loading weights

def test_resize_pos_embed():
    """Pillow's bicubic resampling, to smaller and larger grids; rows before the grid stay."""
    table = torch.randn(1, 1 + 16, 6)
    assert resize_pos_embed(table, (4, 4), (4, 4), prefix=1) is table
    for old, new in (((4, 4), (2, 3)), ((2, 8), (3, 5)), ((2, 8), (5, 7)), ((2, 8), (4, 4)), ((8, 2), (3, 5))):
        mine = resize_pos_embed(table, old, new, prefix=1)
        image = Image.fromarray(table[0, 1:, 0].view(old).numpy()).resize(new[::-1], Image.Resampling.BICUBIC)
        assert torch.equal(mine[:, 0], table[:, 0])
        assert_close(mine[0, 1:, 0].view(new), torch.from_numpy(np.array(image)), rtol=1e-4, atol=1e-4)
    assert resize_pos_embed(table.bfloat16(), (4, 4), (2, 2), prefix=1).dtype == torch.bfloat16


def test_load_weights_from_files(tmp_path):
    source, path = tiny("mpvg"), tmp_path / "model.pt"
    state = source.state_dict()
    lape = {"model": state, "optimizer": torch.optim.AdamW(source.parameters()).state_dict(), "epoch": 299,
            "scaler": {"scale": 65536.0}, "args": argparse.Namespace(lr=5e-4)}  # what a file of LaPE's holds
    for contents in (state, {"model": state}, {"state_dict": state}, lape):
        torch.save(contents, path)
        target = tiny("mpvg", seed=5)
        assert load_weights(target, path) is target
        assert_close(target(images()), source(images()))
    torch.save([1, 2], path)
    for wrong in (path, None, source, {"model": source}, {"epoch": 3}, state | {"pos_embed": np.zeros((1, 6, 16))}):
        with raises("load_weights takes a path or a dict that holds only tensors"):
            load_weights(source, wrong)
    torch.save(state, path)
    whole = path.read_bytes()
    for size in (*range(0, len(whole), 499), len(whole) - 100):
        path.write_bytes(whole[:size])
        with raises("model.pt cannot be loaded safely: it is damaged"):
            load_weights(source, path)
    for nowhere in (tmp_path / "no.pt", tmp_path, path / "no.pt"):  # not called damaged
        with raises(str(nowhere), OSError):
            load_weights(source, nowhere)


def test_load_weights_runs_no_code(tmp_path):
    class Trap:
        def __reduce__(self):
            return pytest.fail, ("code in a checkpoint ran",)

    torch.save({"model": Trap()}, tmp_path / "trap.pt")
    with raises("cannot be loaded safely"):
        load_weights(tiny(), tmp_path / "trap.pt")


@pytest.mark.parametrize("method", ["default", "mpvg-free"])
@pytest.mark.parametrize("old, new, untold", [
    ((2, 2), (2, 3), ""), ((2, 3), (4, 4), "fits 0 of the grids [(2, 2), (4, 4)]"), ((2, 3), (3, 2), ""),
    ((4, 4), (2, 8), "fits 2 of the grids [(2, 8), (4, 4)]"), ((2, 8), (2, 8), "fits 2 of the grids")])
def test_load_weights_resizes_the_pe(method, old, new, untold):
    source = tiny(method, image_size=(4 * old[0], 4 * old[1])).state_dict()
    model = tiny(method, seed=5, image_size=(4 * new[0], 4 * new[1]))
    says = f"a PE of {math.prod(old)} patches (class tokens: {int(method == 'default')}) fits"
    with raises(f"{says} 0 of the grids [(3, 3)]: load_weights needs old_grid"):
        load_weights(model, source, old_grid=(3, 3))
    if untold:
        with raises(untold):
            load_weights(model, source)
    load_weights(model, source, old_grid=None if old == (2, 2) else old)  # a square needs no telling
    for name in {"pos_embed", "last_pos_embed"} & source.keys():
        expected = resize_pos_embed(source[name], old, new, prefix=int("cls_token" in source))
        assert torch.equal(model.state_dict()[name], expected)


@pytest.mark.parametrize("start, method", [
    *product(["default", "gap"], ["gap", "pvg", "mpvg", "mpvg-shift"]), ("pvg", "mpvg")])
def test_load_weights_starts_a_gap_model_from_a_plain_vits_weights(start, method):
    source, model = tiny(start).state_dict(), tiny(method, seed=5)
    assert load_weights(model, {"model": source}, from_plain=True) is model
    p = source | {"pos_embed": source["pos_embed"][:, -6:]}  # without the class token's row
    logits = equations(p, images(), pe=METHODS[start]["pe"], pool="gap")[1]
    assert_same(model(images()), logits)
    train_step = train.make_train_step(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    losses = [train_step(images(8, seed=seed), torch.arange(8) % 5) for seed in range(50)]
    assert torch.stack(losses).isfinite().all()  # the PE norms learn one after the other
    assert all((value != 0).all() for name, value in model.named_parameters() if name.endswith("pe_norm.weight"))
    larger = load_weights(tiny(method, image_size=16), source, from_plain=True, old_grid=(2, 3))
    assert torch.equal(larger.pos_embed, resize_pos_embed(p["pos_embed"], (2, 3), (4, 4)))


def test_load_weights_names_every_misfit_and_loads_nothing():
    state, plain = tiny("mpvg", seed=3).state_dict(), tiny("default", seed=3).state_dict()
    misshapen = state | {"pos_embed": torch.zeros(16), "norm.bias": torch.zeros(3)}
    other = {name: state[name] for name in state.keys() - {"norm.weight", "pos_embed"}} | {"y": torch.zeros(1)}
    no_gap = "a plain ViT's weights fit models with pool='gap' and pos_0 at the input: gap, pvg, mpvg"
    for model, source, from_plain, says in (
            (tiny(), other, False, "missing pos_embed; missing norm.weight; unexpected y"),
            (tiny("gap"), plain, False, "unexpected cls_token"),
            (tiny(), misshapen, False,
             "pos_embed is (16,), the model's (1, 6, 16); norm.bias is (3,), the model's (16,)"),
            (tiny(num_classes=9), state, False,
             "head.weight is (5, 16), the model's (9, 16); head.bias is (5,), the model's (9,)"),
            (tiny("gap"), tiny(None, pe="none").state_dict(), True, "missing pos_embed"),
            (tiny(layer0=True), tiny("pvg").state_dict(), True,
             "missing blocks.0.pe_norm.weight; missing blocks.0.pe_norm.bias"),
            (tiny("default"), plain, True, no_gap), (tiny("lape-gap"), plain, True, no_gap)):
        logits = model(images())
        with pytest.raises(ValueError, match=rf"(^|see load_weights' new_head and from_plain\): ){re.escape(says)}$"):
            load_weights(model, source, from_plain=from_plain)
        assert torch.equal(model(images()), logits)


# ------------------------------------------------------------------------------------------- train.py: augmentation

CIFAR = train.DATASETS["cifar100"].recipe
FILL = (129, 124, 112)  # cifar100's mean colour


def photos(count=60):
    """uint8 images that differ in kind: noise, slopes, flat and low-contrast ones, digits."""
    generator = seeded(0)
    x = make_numbers(count, 3)[0]
    x[::4] = torch.randint(0, 256, x[::4].shape, generator=generator, dtype=torch.uint8)
    x[1::8] = (torch.arange(32 * 32).view(32, 32) // 4).to(torch.uint8)
    x[5], x[13] = 7, torch.randint(100, 103, (3, 32, 32), generator=generator)
    return x


def normalised(x, data):
    dataset = train.DATASETS[data]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (dataset.mean, dataset.std))
    return (x / 255 - mean) / std


def pil(x):
    return Image.fromarray(x.permute(1, 2, 0).numpy())


def difference(mine, image):
    return (mine.int() - torch.from_numpy(np.array(image)).permute(2, 0, 1).int()).abs().float()


def pillow(name, image, m, how):
    """An operation of timm's rand-m9-mstd0.5-inc1 on one image; m: signed magnitude."""
    if name in ("AutoContrast", "Equalize", "Invert"):
        return getattr(ImageOps, name.lower())(image)
    if name in ("Color", "Contrast", "Brightness", "Sharpness"):
        return getattr(ImageEnhance, name)(image).enhance(max(0.1, 1 + 0.09 * m))
    if name == "Solarize":
        return ImageOps.solarize(image, 256 - int(25.6 * abs(m)))
    if name == "SolarizeAdd":
        return image.point([min(255, v + int(11 * abs(m))) if v < 128 else v for v in range(256)] * 3)
    if name == "Posterize":
        return image.point([v & -(1 << (4 + int(0.4 * abs(m)))) & 255 for v in range(256)] * 3)
    if name == "Rotate":
        return image.rotate(3 * m, how, fillcolor=FILL)
    matrix = {"ShearX": (1, 0.03 * m, 0, 0, 1, 0), "TranslateX": (1, 0, 0.045 * m * 32, 0, 1, 0),
              "ShearY": (1, 0, 0, 0.03 * m, 1, 0), "TranslateY": (1, 0, 0, 0, 1, 0.045 * m * 32)}[name]
    return image.transform(image.size, Image.Transform.AFFINE, matrix, how, fillcolor=FILL)


# How photos() are interpolated: the first half bilinear, the second bicubic.
BICUBIC = (torch.arange(60) >= 30).view(-1, 1, 1, 1)
RESAMPLING = [Image.Resampling.BILINEAR] * 30 + [Image.Resampling.BICUBIC] * 30


@pytest.mark.parametrize("name", train.OPERATIONS)
def test_an_operation_is_pillows(name):
    """To one of 255; where bicubic interpolation enters, on average: torch's has a = -0.75, Pillow's -1."""
    x, m = photos(), 20 * torch.rand(60, generator=seeded(1)) - 10
    m[:3] = torch.tensor([0.0, 10.0, -10.0])
    warp = partial(train.warp, bicubic=BICUBIC, fill=torch.tensor(FILL, dtype=torch.float))
    before = x.clone()
    mine = train.OPERATIONS[name](x, m.view(-1, 1, 1, 1), warp)
    assert torch.equal(x, before) and mine.dtype == torch.uint8 and mine.shape == x.shape
    theirs = [pillow(name, pil(image), *rest) for image, *rest in zip(x, m.tolist(), RESAMPLING)]
    differences = torch.stack([difference(a, b) for a, b in zip(mine, theirs)])
    geometric = name in ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")
    assert differences[:30 if geometric else 60].max() <= 1 and differences.mean() < 1.2


def test_crop_boxes_are_pillows():
    torch.manual_seed(2)
    x, box = photos(), train.draw_boxes(60, 32, (0.1, 1.0), 2.0, whole=True)
    theirs = [pil(image).crop((left, top, left + w, top + h)).resize((32, 32), how)
              for image, (top, left, h, w), how in zip(x, box.int().tolist(), RESAMPLING)]
    differences = torch.stack([difference(a, b) for a, b in zip(train.crop_boxes(x, box, BICUBIC), theirs)])
    assert differences[:30].max() <= 1 and differences[:30].mean() < 0.2
    assert differences[30:].mean((1, 2, 3)).max() < 6
    whole = torch.tensor([0.0, 0.0, 32.0, 32.0]).repeat(60, 1)
    assert torch.equal(train.crop_boxes(x, whole, BICUBIC), x)


def test_boxes_and_operations_are_distributed_as_published():
    """Boxes have torchvision's least and greatest values, means, deviations and correlations."""
    torch.manual_seed(0)
    draws, image = train.draw_augmentation(40_000, 32, CIFAR), torch.zeros(3, 32, 32)
    erased = draws["erase"][draws["erase"][:, 2] > 0]
    assert len(erased) / 40_000 == approx(0.25, abs=0.01)
    crop, erase = RandomResizedCrop.get_params, RandomErasing.get_params
    for mine, theirs in ((draws["crop"], [crop(image, [0.8, 1.0], [3 / 4, 4 / 3]) for _ in range(10_000)]),
                         (erased, [erase(image, [0.02, 1 / 3], [0.3, 1 / 0.3])[:4] for _ in range(10_000)])):
        theirs = torch.tensor(theirs).float()
        assert torch.equal(mine.amin(0), theirs.amin(0)) and torch.equal(mine.amax(0), theirs.amax(0))
        assert (mine[:, :2] + mine[:, 2:]).max() == 32
        assert ((mine.mean(0) - theirs.mean(0)) / theirs.std(0)).abs().max() < 0.05
        assert_close(mine.std(0), theirs.std(0), rtol=0.05, atol=0)
        assert_close(mine.T.corrcoef(), theirs.T.corrcoef(), rtol=0, atol=0.05)
    for name in ("flip", "crop_bicubic", "bicubic"):
        assert draws[name].float().mean() == approx(0.5, abs=0.02), name
    pairs = (draws["operation"] + 1) @ torch.tensor([16, 1])  # 0: not applied
    share = torch.tensor([0.5] + [0.5 / 15] * 15)
    expected = 40_000 * share.outer(share).flatten()  # with replacement, each by itself
    assert ((pairs.bincount(minlength=256) - expected).abs() < 5 * expected.sqrt()).all()
    strength, sign = draws["magnitude"].abs(), draws["magnitude"].sign()
    assert strength.mean() == approx(9, abs=0.02) and strength.max() == 10
    assert strength[strength < 10].std() == approx(0.471, abs=0.01)  # 0.5, cut at 10
    assert len(sign.unique(dim=0)) == 4 and sign.mean(0).tolist() == approx([0, 0], abs=0.02)


def test_mixing_is_distributed_as_published():
    torch.manual_seed(0)
    keep = train.draw_mixing(4000, 32, CIFAR)
    flat = keep.flatten(1)
    boxed = ((flat == 0) | (flat == 1)).all(1)
    assert keep.shape == (4000, 32, 32) and boxed.float().mean() == approx(0.5, abs=0.03)
    lam = flat[~boxed][:, 0]
    assert (flat[~boxed] == lam[:, None]).all()
    assert lam.mean() == approx(0.5, abs=0.02) and lam.std() == approx((0.25 / 2.6) ** 0.5, abs=0.02)
    for mask in keep[boxed][:50] == 0:  # one box, at most half outside
        assert mask.sum() == mask.any(1).sum() * mask.any(0).sum()
    share = (keep[boxed] == 0).float().mean((1, 2))  # clipped boxes: under 1 - lambda
    assert share.mean() == approx(0.3, abs=0.02) and share.max() > 0.8
    corners = (keep[boxed] == 0)[:, ::31, ::31].float().mean(0).flatten()
    assert corners.tolist() == approx([1 / 8] * 4, abs=0.03)
    boxes = train.draw_mixing(200, 32, replace(CIFAR, mixup=0.0))
    blends = train.draw_mixing(200, 32, replace(CIFAR, cutmix=0.0)).flatten(1)
    assert ((boxes == 0) | (boxes == 1)).all() and (blends == blends[:, :1]).all()


def test_augmentation_crops_flips_and_applies_one_operation_after_the_other():
    recipe = replace(CIFAR, erase=0.0)
    x, names = photos()[:40], [*train.OPERATIONS]
    torch.manual_seed(3)
    draws = train.draw_augmentation(40, 32, recipe)
    draws["operation"][:15] = torch.stack([torch.arange(15), torch.arange(15).roll(4)], dim=1)
    mine, _ = train.prepare(x.clone()[None], torch.zeros(1, 40).long(), draws, None, recipe, "cifar100", 9, seed=0)
    for i in range(40):
        image = train.crop_boxes(x[i:i + 1], draws["crop"][i:i + 1], draws["crop_bicubic"][i:i + 1])
        image = image.flip(3) if draws["flip"][i] else image
        for layer, number in enumerate(draws["operation"][i].tolist()):
            if number >= 0:
                m, bicubic = (draws[key][i, layer].view(1, 1, 1, 1) for key in ("magnitude", "bicubic"))
                affine = partial(train.warp, bicubic=bicubic, fill=torch.tensor(FILL, dtype=torch.float))
                image = train.OPERATIONS[names[number]](image, m, affine)
        assert torch.equal(mine[0, i], train.normalise(image, "cifar100")[0]), i


def test_prepare_mixes_then_erases():
    x, y = photos()[:12].view(2, 6, 3, 32, 32), torch.arange(12).view(2, 6)
    off = replace(CIFAR, crop_scale=1.0, flip=0.0, ra_ops=0, erase=0.0)
    draws = train.draw_augmentation(12, 32, off)
    prepare = partial(train.prepare, labels=y, dataset_name="cifar100", classes=20)
    plain, labels = prepare(x.clone(), draws=draws, keep=None, recipe=off, seed=0)
    assert_close(plain, normalised(x, "cifar100"))
    assert torch.equal(labels, y)

    keep = torch.full((2, 32, 32), 0.3125)  # exact in binary
    keep[1] = 1
    keep[1, 4:20, 8:16] = 0
    mixed, shares = prepare(x.clone(), draws=draws, keep=keep, recipe=off, seed=0)
    for step, i in product(range(2), range(6)):
        own, (a, b) = keep[step], (x[step, j].float() for j in (i, i ^ 1))  # the partner: the neighbour
        assert_close(mixed[step, i], normalised((own * a + (1 - own) * b).round(), "cifar100"))
        a, b = F.one_hot(y[step], 20)[[i, i ^ 1]]
        assert_close(shares[step, i], own.mean() * a + (1 - own.mean()) * b)  # as the box turned out

    erasing = replace(off, erase=1.0)
    draws = train.draw_augmentation(12, 32, erasing)
    erased, _ = prepare(x.clone(), draws=draws, keep=keep, recipe=erasing, seed=5)
    mask = train.box_mask(draws["erase"], 32).view(2, 6, 1, 32, 32).expand_as(erased)
    assert torch.equal(erased[~mask], mixed[~mask]) and 0.05 < mask.float().mean() < 0.33
    assert (erased[:, :, 0] != erased[:, :, 1])[mask[:, :, 0]].all()  # noise of its own in each channel
    assert erased[mask].mean() == approx(0, abs=0.05) and erased[mask].std() == approx(1, abs=0.05)
    noise = [image[box] for image, box in zip(erased.flatten(0, 1), mask.flatten(0, 1))]
    assert len({tuple(values[:5].tolist()) for values in noise}) == 12  # of its own for each image
    first = replace(erasing, erase_first=True)  # DeiT's order: floats are mixed
    alone, _ = prepare(x.clone(), draws=draws, keep=None, recipe=erasing, seed=5)
    mixed_after, _ = prepare(x.clone(), draws=draws, keep=keep, recipe=first, seed=5)
    partner = alone.unflatten(1, (3, 2)).flip(2).flatten(1, 2)
    assert_close(mixed_after, torch.lerp(partner, alone, keep[:, None, None]))


# ------------------------------------------------------------------------------------------ train.py: recipes, data

def test_recipes_are_the_published_ones():
    published = dict(
        epochs=310, batch_size=128, lr=6e-4, min_lr=1e-5, warmup_lr=1e-6, warmup_epochs=10, cooldown_epochs=10,
        lr_per="epoch", weight_decay=0.06, decay_pe=True, label_smoothing=0.1, repeats=1, crop_scale=0.8, bicubic=0.5,
        flip=0.5, ra_ops=2, ra_magnitude=9, mixup=0.8, cutmix=1.0, erase=0.25, erase_first=False)
    deit = published | dict(
        epochs=300, batch_size=1024, lr=5e-4 * 1024 / 512, warmup_epochs=5, cooldown_epochs=0, weight_decay=0.05,
        decay_pe=False, repeats=3, crop_scale=0.08, bicubic=1, erase_first=True)
    numbers, cifar100, imagenet = train.DATASETS.values()
    assert [asdict(cifar100.recipe), asdict(imagenet.recipe)] == [published, deit]
    assert (cifar100.mean, cifar100.std) == ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))
    assert (numbers.mean, numbers.std) == ((0.5,) * 3, (0.3,) * 3)
    assert (imagenet.mean, imagenet.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert (numbers.model, cifar100.model, imagenet.model) == ("vit-nano", "vit-lite", "deit-tiny")


def test_numbers_are_balanced_and_repeatable(monkeypatch):
    x, y = make_numbers(500, seed=1)
    assert x.shape == (500, 3, 32, 32) and x.dtype == torch.uint8 and y.bincount().tolist() == [5] * 100
    again, other = make_numbers(500, seed=1), make_numbers(500, seed=2)
    assert torch.equal(again[0], x) and torch.equal(again[1], y) and not torch.equal(other[0], x)
    bright = x.float().mean((1, 2, 3))
    assert bright.min() < 90 and bright.max() > 160  # light on dark and dark on light
    monkeypatch.setattr(train, "numbers", lambda count, seed: (count, seed))
    assert [load_numbers("", train) for train in (True, False)] == [(30_000, 1), (4_000, 2)]


def test_cifar100_is_torchvisions(tmp_path, monkeypatch):
    pixels = (np.arange(2 * 32 * 32 * 3) % 251).astype(np.uint8).reshape(2, 32, 32, 3)
    theirs = {(tmp_path, False): SimpleNamespace(data=pixels, targets=[3, 99])}
    monkeypatch.setattr(torchvision.datasets, "CIFAR100", lambda root, train, download: theirs[root, train])
    x, y = train.load_cifar100(tmp_path, train=False)
    assert x.shape == (2, 3, 32, 32) and x.dtype == torch.uint8 and y.tolist() == [3, 99]
    assert x[1, 2, 5, 7] == pixels[1, 5, 7, 2]
    monkeypatch.undo()
    monkeypatch.setattr(torchvision.datasets.CIFAR100, "url", "file:///nowhere/cifar.tar.gz")
    with pytest.raises(SystemExit, match="^error: CIFAR-100 is not in .* --data numbers needs no download$"):
        train.load_cifar100(tmp_path, train=True)


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """An ImageFolder of three classes; in train/b the fourth file is cut off and the fifth is empty."""
    root, pixels = tmp_path_factory.mktemp("my files"), iter(make_numbers(66, 4)[0])
    for split, count in (("train", 17), ("val", 5)):
        for name in "abc":
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                image = pil(next(pixels)).resize((80 - 9 * (i % 5), 50 + 7 * (i % 4)))
                image = image.convert({1: "CMYK", 2: "L"}.get(i, "RGB"))
                image.save(root / split / name / f"{i:02d}.JPEG", quality=95)
    cut, empty = (root / "train" / "b" / name for name in ("03.JPEG", "04.JPEG"))
    cut.write_bytes(cut.read_bytes()[:-1000])
    empty.write_bytes(b"")
    return root


ARRAYS = dict(data="cifar100", image_size=32, num_classes=100, seed=3, fraction=1.0)
FILES = dict(data="imagenet", image_size=32, num_classes=3, seed=3, fraction=1.0, crop_scale=0.08, bicubic=1.0)


def test_crops_are_pillows(files):
    data, bilinear = (train.load_split(FILES | dict(image_size=48, bicubic=share), "train", files, CPU)
                      for share in (1.0, 0.0))
    for index, seed in ((0, 77), (1, 78), (0, 79), (2, 5), (16, 6)):
        x, label, unreadable = data[index, seed]
        image = Image.open(data.samples[index][0]).convert("RGB")
        torch.manual_seed(seed)
        top, left, h, w = RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3])
        theirs = image.crop((left, top, left + w, top + h)).resize((48, 48), Image.Resampling.BICUBIC)
        error = difference(x, theirs)
        assert error.max() <= 2 and error.mean() < 0.5 and label == unreadable == 0
    assert not torch.equal(bilinear[0, 77][0], data[0, 77][0])
    plain = replace(train.DATASETS["numbers"].recipe, batch_size=6, repeats=3, crop_scale=0.08)
    x, _ = next(train.train_batches(data, plain, FILES, epoch=0))
    _, crops, _ = next(data.chunks(*train.epoch_order(plain, len(data), FILES["seed"], 0), slice(0, 6)))
    assert torch.equal(x, normalised(crops[0], "imagenet")) and len(x.unique(dim=0)) == 6  # cropped once, each anew
    for crop_ratio, short in ((0.875, 45), (1.0, 40)):  # DeiT cuts 40 / 0.875 to 45
        data = train.load_split(FILES | dict(image_size=40), "test", files, CPU, 0, crop_ratio)
        deit = Compose([Resize(short, InterpolationMode.BICUBIC), CenterCrop(40)])
        for index in (0, 2, 11):
            theirs = deit(Image.open(data.samples[index][0]).convert("RGB"))
            assert difference(data[index, 0][0], theirs).max() <= 2, (index, short)


@pytest.mark.parametrize("workers", [0, 2])
def test_what_cannot_be_decoded_is_named_counted_and_replaced(files, capfd, workers):
    training, test = (train.load_split(FILES, split, files, CPU, workers) for split in ("train", "test"))
    cut, empty, after = 17 + 3, 17 + 4, 17 + 5  # class b's follow the 17 files of a
    path = training.samples[cut][0]
    train.warn.cache_clear()
    (x, y), = training.read_batches([[(cut, 5), (0, 6), (empty, 7), (1, 8)]])
    instead = [training[index_and_seed][0] for index_and_seed in ((after, 5), (0, 6), (after, 7), (1, 8))]
    assert torch.equal(x, torch.stack(instead)) and y.tolist() == [1, 0, 1, 0] and training.unreadable == 3
    warnings = re.findall(r"warning: (.*) cannot be decoded and is skipped \((\w+ \w+ \w+ \w+)", capfd.readouterr().err)
    assert warnings == [(path, "image file is truncated"),
                        (training.samples[empty][0], "cannot identify image file")]  # each once
    training.samples = [(str(files / f"{i}.JPEG"), 0) for i in range(30)]  # as if the disk were gone
    with raises("and the 19 files before it cannot be decoded", OSError):
        training[0, 0]
    test.samples[7] = path, 1  # all test images count, or none
    with pytest.raises(OSError, match=r"test image .*/b/03.JPEG cannot be decoded \(image file is truncated"):
        list(test.test_batches())


def test_evaluate_pads_the_last_batch(files):
    data, shapes = train.load_split(FILES, "test", files, CPU), []
    model = create("vit-nano", "mpvg", num_classes=3, attn_drop=0.5).eval()
    (x, y), = data.test_batches()
    logits = model(train.normalise(x, "imagenet"))
    data.test_batches = partial(data.test_batches, batch_size=4)
    model.register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape))
    found = train.evaluate(model.train(), data, dict(precision="fp32", data="imagenet"), CPU)
    assert shapes == [(4, 3, 32, 32)] * 4 and len(y) == 15
    assert found["test_accuracy"] == approx(100 * (logits.argmax(1) == y).float().mean().item())
    assert found["test_loss"] == approx(F.cross_entropy(logits, y).item(), rel=1e-5)


@pytest.mark.parametrize("config", [FILES, ARRAYS], ids=["files", "arrays"])
def test_how_a_batch_is_shared_out_changes_nothing(files, config):
    """One process, two and three get the same images, bit for bit, without erasing's noise."""
    training, test = (train.load_split(config, split, files, CPU) for split in ("train", "test"))
    recipe = replace(train.DATASETS[config["data"]].recipe, batch_size=12, erase=0.0)
    batches = partial(train.train_batches, training, recipe, config, 2)
    state, whole = torch.get_rng_state(), [*batches()]
    assert len(whole) == len(training) // 12 > 3
    assert whole[0][0].shape == (12, 3, 32, 32) and whole[0][1].shape[0] == 12
    assert len({y.amax(1).min().item() for _, y in whole} - {1}) > 1  # each step draws its lambda
    assert torch.equal(torch.get_rng_state(), state)  # dropout's
    for world_size in (2, 3):
        shares = [batches(rank, world_size) for rank in range(world_size)]
        for (x, y), *parts in zip(whole, *shares, strict=True):
            assert torch.equal(torch.cat([part[0] for part in parts]), x)
            assert torch.equal(torch.cat([part[1] for part in parts]), y)

    def pixels(*shares):
        return sorted((x.numpy().tobytes(), int(y)) for share in shares for batch in share for x, y in zip(*batch))
    assert pixels(*(test.test_batches(rank, 3, 5) for rank in range(3))) == pixels(test.test_batches())


def test_each_process_and_epoch_erases_with_noise_of_its_own():
    recipe = replace(CIFAR, batch_size=12, erase=1.0, mixup=0.0, cutmix=0.0, ra_ops=0)
    data = train.ArrayData(torch.zeros(12, 3, 32, 32, dtype=torch.uint8), torch.arange(12))
    shares = [next(train.train_batches(data, recipe, ARRAYS, epoch, rank, 3))[0]
              for epoch in (1, 2) for rank in range(3)]
    _, (seed,) = train.epoch_order(recipe, 12, ARRAYS["seed"], epoch=2)  # crops and boxes are drawn with it
    shares.append(torch.randn(4, 3, 32, 32, generator=seeded(seed)))
    for a, b in combinations([set(share.flatten().tolist()) for share in shares], 2):
        assert len(a & b) < 10  # three of them are the blank image's


def test_repeated_augmentation_and_partners():
    for repeats, pattern in ((1, [0, 1, 2, 3, 4, 5]), (2, [0, 1, 0, 1, 2, 3]), (3, [0, 1, 0, 1, 0, 1])):
        recipe = replace(CIFAR, batch_size=22, repeats=repeats)
        order, seeds = train.epoch_order(recipe, 100, 0, 0)
        once, _ = train.epoch_order(replace(recipe, repeats=1), 100, 0, 0)
        places = order.flatten().tolist()
        assert order.shape == (4, 22) and len({*seeds, *train.epoch_order(recipe, 100, 0, 1)[1]}) == 8
        assert max(places.count(image) for image in places) == repeats
        assert all(a != b for a, b in zip(places[::2], places[1::2]))  # never mixed with itself
        assert places[:6] == once.flatten()[pattern].tolist()


def test_an_epoch_of_several_chunks_has_every_step():
    """Images so large that four steps are a chunk."""
    images = torch.zeros(1, dtype=torch.uint8).expand(11, 3, 1024, 1024)
    recipe = replace(train.DATASETS["numbers"].recipe, batch_size=2)
    config = ARRAYS | dict(image_size=1024)
    data, (order, seeds) = train.ArrayData(images, torch.arange(11)), train.epoch_order(recipe, 11, ARRAYS["seed"], 0)
    assert [labels.tolist() for _, labels in train.train_batches(data, recipe, config, 0)] == order.tolist()
    chunks = [(seed, len(labels)) for seed, _, labels in data.chunks(order, seeds, slice(0, 1))]
    assert chunks == [(seeds[0], 4), (seeds[4], 1)]  # for one process of two as for one alone


def test_fraction_is_balanced_and_chosen_by_seed(files, monkeypatch):
    load = Mock(return_value=(torch.arange(400), torch.arange(400) % 20))  # numbers for images: i is of class i % 20
    monkeypatch.setitem(train.DATASETS, "cifar100", replace(train.DATASETS["cifar100"], load=load))
    config = dict(data="cifar100", fraction=0.18, seed=0)
    assert len(train.load_split(config, "test", ".", CPU)) == 400
    first, again, other = (train.load_split(config | dict(seed=seed), "train", ".", CPU) for seed in (0, 0, 1))
    for data in (first, other):
        assert data.labels.bincount().tolist() == [4] * 20 and torch.equal(data.images % 20, data.labels)
    assert torch.equal(first.images, again.images) and not torch.equal(first.images, other.images)
    first, other = (train.load_split(FILES | dict(fraction=0.2, seed=seed), "train", files, CPU) for seed in (0, 1))
    assert [label for _, label in first.samples] == [0] * 3 + [1] * 3 + [2] * 3 and first.samples != other.samples


# --------------------------------------------------------------------------------------------------- train.py: runs

@pytest.fixture
def cli(tmp_path):
    """Runs `train.py` on small data; runs go to tmp_path."""
    return partial(run_cli, train.main, "--data numbers --device cpu --runs", tmp_path)


sweep = partial(run_cli, train.main, "sweep --data numbers --device cpu")
evaluation = partial(run_cli, train.main, "eval --device cpu")


def report(tmp_path, *folders_and_flags, draw=False):
    """`train.py report`; without draw as if matplotlib were not installed, which is faster."""
    with pytest.MonkeyPatch.context() as patch:
        if not draw:
            patch.setitem(sys.modules, "matplotlib.figure", None)
        return run_cli(train.main, "report --device cpu --out", tmp_path / "figures", *folders_and_flags)


def load(folder, name="last.pt"):
    return torch.load(folder / name, weights_only=True)


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def one_line(result, says):
    """A user's mistake: exit code and one line; click's own errors have two lines of usage before it."""
    lines = result.err.strip().splitlines()
    assert result.code in (1, 2) and "Traceback" not in result.err, (result.code, result.out, result.err)
    assert says in lines[-1] and (result.code == 2 or len(lines) == 1), result.err


MPVG, TRAINED = "mpvg-vit-nano-numbers-seed0", "mpvg-vit-nano-numbers-seed3"


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The folder of a finished run of three epochs on 200 numbers, and what it printed."""
    runs = tmp_path_factory.mktemp("trained")
    flags = "--device cpu --epochs 3 --lr 0.01 --batch-size 20 --pe layerwise --pool gap --mpvg --seed 3 --runs"
    result = ok(run_cli(train.main, flags, runs))
    return runs / TRAINED, result.out


def test_a_run_leaves_its_record(trained):
    folder, out = trained
    log, saved, config = log_of(folder), load(folder), read_json(folder / "config.json")
    best = max(log, key=lambda line: line["test_accuracy"])
    assert [line["epoch"] for line in log] == [1, 2, 3] and saved["log"] == log and saved["config"] == config
    assert config["method"] == "mpvg" and config["images"] == 200
    assert config["environment"]["torch"] == torch.__version__ and config["environment"]["device"] == "cpu"
    for words in ("mpvg: vit-nano with 570,852 parameters", "200 training images, 40 test images", f"writes {folder}",
                  "\nepoch     loss   test %         lr ",
                  "\n    3 {loss:>8.4f} {test_accuracy:>8.2f} {lr:>10.2e} ".format(**log[-1]),
                  f"test accuracy {log[-1]['test_accuracy']:.2f} % after the last epoch",
                  "(best: {test_accuracy:.2f} % after epoch {epoch})".format(**best),
                  f"next, tables and figures: python train.py report {folder}\n"):
        assert words in out
    assert sorted(path.name for path in folder.iterdir() if path.name != "mechanism.json") == [
        ".lock", "best.pt", "config.json", "last.pt", "log.jsonl"]


def plain_loop(recipe, method, data, seed):
    """What `train.py` must do without augmentation, written out on its own. -> model, losses, accuracies."""
    torch.manual_seed(seed)
    model, losses, accuracies = create("vit-nano", method), [], []
    tables = set() if recipe.decay_pe else {"pos_embed", "last_pos_embed", "cls_token"}
    optimizer = torch.optim.AdamW([
        dict(params=[p], weight_decay=recipe.weight_decay * (p.ndim >= 2 and name not in tables))
        for name, p in model.named_parameters()])
    (x, y), (test_x, test_y) = make_numbers(200, 1), make_numbers(40, 2)
    steps, cosine_epochs = len(x) // recipe.batch_size, recipe.epochs - recipe.cooldown_epochs
    for epoch in range(recipe.epochs):
        order, total = torch.randperm(len(x), generator=seeded(seed * 100_003 + epoch)), 0
        for step, rows in enumerate(order[:steps * recipe.batch_size].split(recipe.batch_size)):
            t = epoch + (step / steps if recipe.lr_per == "step" else 0)
            cosine = (1 + math.cos(math.pi * min(t / cosine_epochs, 1))) / 2
            lr = recipe.min_lr + (recipe.lr - recipe.min_lr) * cosine
            if t < recipe.warmup_epochs:
                lr = recipe.warmup_lr + (recipe.lr - recipe.warmup_lr) * t / recipe.warmup_epochs
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.zero_grad()
            logs = model(normalised(x[rows], data)).log_softmax(1)
            nll, smooth = -logs[torch.arange(len(rows)), y[rows]], recipe.label_smoothing
            loss = ((1 - smooth) * nll - smooth * logs.mean(1)).mean()
            loss.backward()
            optimizer.step()
            total += loss.item()
        losses.append(total / steps)
        hits = (model.eval()(normalised(test_x, data)).argmax(1) == test_y).float()
        accuracies.append(100 * hits.mean().item())
        model.train()
    return model, losses, accuracies


@pytest.mark.parametrize("data, method, lr_per, seed", [  # cifar100 also decays the PE
    ("numbers", "mpvg-free", "step", 0), ("numbers", "default", "epoch", 1), ("cifar100", "mpvg", "epoch", 5)])
def test_a_run_is_the_plain_loop(cli, tmp_path, data, method, lr_per, seed):
    changes = dict(epochs=3, batch_size=48, lr=0.004, lr_per=lr_per, min_lr=1e-3, warmup_lr=2e-3, warmup_epochs=0.6,
                   cooldown_epochs=1, weight_decay=2, label_smoothing=0.3, crop_scale=1, flip=0, ra_ops=0, mixup=0,
                   cutmix=0, erase=0)
    recipe = ",".join(f"{name}={value}" for name, value in changes.items())
    result = ok(cli(f"--data {data} --model vit-nano --method {method} --seed {seed} --recipe {recipe}"))
    assert "3 epochs of 4 steps of 48 images" in result.out
    folder, recipe = tmp_path / f"{method}-vit-nano-{data}-seed{seed}", train.DATASETS[data].recipe
    model, losses, accuracies = plain_loop(replace(recipe, **changes), method, data, seed)
    assert [line["loss"] for line in log_of(folder)] == approx(losses, rel=1e-5)
    assert [line["test_accuracy"] for line in log_of(folder)] == approx(accuracies, abs=0.01)
    assert_close(load(folder)["model"], dict(model.state_dict()), rtol=1e-3, atol=2e-4)
    assert log_of(folder)[-1]["lr"] == approx(1e-3)  # the cool-down's


def configure(*flags):
    """-> a run's configuration, without the run."""
    command = train.typer.main.get_command(train.app)
    return train.configure(command.make_context("train.py", argv(*flags)).params)


@pytest.mark.parametrize("flags, name", [
    ("--pool gap", "pvg-vit-nano-numbers-seed0"),
    ("--pe none --seed 7", "gap-pe=none-vit-nano-numbers-seed7"),
    ("--pe none --pool cls", "default-pe=none-vit-nano-numbers-seed0"),
    ("--method mpvg:last_pe=None", "mpvg-last_pe=None-vit-nano-numbers-seed0"),
    ("--method mpvg:layer0=true:hierarchical=false", "mpvg-layer0=True-hierarchical=False-vit-nano-numbers-seed0"),
    ("--method gap:pe_std=1.0 --data cifar100", "gap-pe_std=1-vit-lite-cifar100-seed0")])
def test_flags_give_a_method_and_a_name(flags, name):
    config = configure("--device cpu", flags)
    assert train.run_folder(dict(name=None, runs=Path("r")), config) == Path("r", name)


@pytest.mark.parametrize("flags, expected", [
    ("--data cifar100 --epochs 15", dict(warmup_epochs=1.5, cooldown_epochs=1, lr_per="step")),
    ("--data imagenet --epochs 20", dict(warmup_epochs=2, cooldown_epochs=0, lr_per="step")),
    ("--data imagenet --batch-size 512", dict(warmup_epochs=5, lr=5e-4, image_size=224))])
def test_a_short_run_warms_up_by_the_step_and_imagenets_lr_follows_the_batch(files, flags, expected):
    assert expected.items() <= configure("--device cpu --data-dir", files, flags).items()


def test_every_number_of_the_recipe_has_an_effect(cli, tmp_path):
    changes = dict(  # every field, and a value that makes another run
        epochs=2, batch_size=32, lr=1e-3, min_lr=3e-4, warmup_lr=1e-4, warmup_epochs=1.5, cooldown_epochs=1,
        lr_per="epoch", weight_decay=0.5, decay_pe=False, label_smoothing=0.3, repeats=3, crop_scale=0.5, bicubic=1.0,
        flip=0.0, ra_ops=1, ra_magnitude=5.0, mixup=0.2, cutmix=0.0, erase=0.9, erase_first=True)
    assert changes.keys() == {field.name for field in fields(train.Recipe)}

    def trained_with(**change):
        recipe = ",".join(f"{name}={value}" for name, value in (dict(epochs=3, batch_size=50) | change).items())
        ok(cli("--data cifar100 --model vit-nano --method mpvg:depth=2:dim=32:heads=2 --name run --overwrite",
               f"--recipe {recipe}"))
        saved = load(tmp_path / "run")
        return saved["config"], saved["model"]["blocks.1.mlp.fc1.weight"]

    standard, standard_weights = trained_with()
    for name, value in changes.items():
        config, weights = trained_with(**{name: value})
        assert config[name] == value != standard[name]
        changed = {key for key in config if config[key] != standard[key]}
        assert changed <= {name, "warmup_epochs"}  # the warm-up follows the epochs
        assert not torch.equal(weights, standard_weights), name


def test_cuda_gets_tf32_and_in_training_no_attention_of_cudnn(monkeypatch):
    """cuDNN's may round dropout: results/fidelity.md."""
    two_gpus = dict(is_available=True, current_accelerator=torch.device("cuda"), device_count=2)
    for name, value in two_gpus.items():
        monkeypatch.setattr(torch.accelerator, name, Mock(return_value=value))
    monkeypatch.setattr(torch, "set_float32_matmul_precision", precision := Mock())
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", cudnn := Mock())
    monkeypatch.setattr(train, "LOCAL_RANK", 1)  # torchrun's second process
    for name, index in (("cuda:0", 0), ("cuda", 1), ("auto", 1)):
        assert train.choose_device(name) == torch.device("cuda", index)
    assert precision.call_args.args == ("high",) and not cudnn.called
    monkeypatch.setattr(torch.cuda, "set_device", Mock())
    monkeypatch.setattr(train, "train_run", train_run := Mock())
    ok(run_cli(train.main, "--device cuda --precision fp32"))
    assert train_run.called and cudnn.call_args.args == (False,)


def test_defaults_follow_the_device(files, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda gpu: SimpleNamespace(major=7 + gpu.index))
    for device, *expected in (
            ("cpu", "numbers", "fp32", "off"), ("mps", "cifar100", "fp32", "off"),
            ("cuda:0", "cifar100", "fp32", "on"), ("cuda:1", "cifar100", "bf16", "on")):  # the first has no bf16
        monkeypatch.setattr(train, "choose_device", lambda _, device=device: torch.device(device))
        config = configure()
        assert [config[name] for name in ("data", "precision", "compile")] == expected
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # two training processes share this machine's cores
    for device, cores, workers in (("cpu", 8, 0), ("cuda", 8, 4), ("cuda", 80, 16)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: range(cores), raising=False)
        assert train.load_split(FILES, "test", files, torch.device(device)).workers == workers


def test_accumulate_splits_the_batch(cli, tmp_path, monkeypatch):
    sizes, forward = [], ViT.forward
    monkeypatch.setattr(ViT, "forward", lambda model, x: sizes.append(len(x)) or forward(model, x))
    ok(cli("--epochs 1 --batch-size 100 --accumulate 4"))
    assert sizes == [25] * 8 + [40] and load(tmp_path / MPVG)["config"]["environment"]["accumulate"] == 4


def test_compiled_training_and_bf16(cli, tmp_path, monkeypatch):
    """The same losses compiled, as one graph, and nearly the same in bf16; the plain module is saved."""
    compile_ = Mock(side_effect=partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(torch, "compile", compile_)
    for name, flags in dict(plain="", compiled="--compile on", half="--precision bf16").items():
        result = ok(cli("--epochs 2 --batch-size 50 --method mpvg:drop_path=0.2:depth=2:dim=32:heads=2",
                        f"--name {name}", flags))
        assert ("compiled in" in result.out) == (name == "compiled")
    assert [call.kwargs for call in compile_.call_args_list] == [dict(fullgraph=True, dynamic=False)]
    plain, compiled, half = (load(tmp_path / name) for name in ("plain", "compiled", "half"))
    assert_close(compiled["model"], plain["model"], rtol=1e-3, atol=1e-4)
    losses = [[line["loss"] for line in run["log"]] for run in (plain, half)]
    assert losses[0] != losses[1] and losses[1] == approx(losses[0], rel=2e-2)


def test_init_and_freeze(cli, trained, tmp_path):
    first, weights = trained[0], load(trained[0])["model"]
    result = ok(cli("--epochs 2 --lr 0 --name same --init", first))
    assert f"starts from {first}, with its head" in result.out
    assert_identical(load(tmp_path / "same")["model"], weights)
    assert len(load(tmp_path / "same", "best.pt")["log"]) == 1  # of equally good epochs the first
    ok(cli("--epochs 1 --freeze --name probe --init", first / "last.pt"))
    for name, value in load(tmp_path / "probe")["model"].items():
        assert torch.equal(value, weights[name]) == (not name.startswith("head")), name
    ten = weights | {"head.weight": weights["head.weight"][:10], "head.bias": weights["head.bias"][:10]}
    torch.save(ten, tmp_path / "ten.pt")  # other classes: a new head
    for init, data in ((tmp_path / "ten.pt", "numbers"), (first, "cifar100")):  # cifar100: as many, but others
        result = ok(cli(f"--data {data} --model vit-nano --epochs 1 --lr 0 --name {data} --init", init))
        assert "with a new head" in result.out
        moved = load(tmp_path / data)["model"]
        assert torch.equal(moved["pos_embed"], weights["pos_embed"])
        assert not torch.equal(moved["head.weight"], weights["head.weight"])


def test_init_from_a_plain_vits_weights(cli, tmp_path):
    """As load_weights' from_plain does it; what is dropped and what is new is named."""
    for method in ("default", "pvg"):
        ok(cli(f"--method {method} --epochs 1 --name {method}"))
    torch.save({"state_dict": load(tmp_path / "default")["model"]}, tmp_path / "file.pt")
    norms = "blocks.1.pe_norm", "blocks.2.pe_norm", "blocks.3.pe_norm", "pe_norm"
    new = ", ".join(f"{norm}.{part}" for norm in norms for part in ("weight", "bias"))
    for name, flags, says in (
            ("default/last.pt", "--method mpvg", f"without its class token, with new norms at 0 ({new}), "),
            ("pvg/last.pt", "--method mpvg", "with new norms at 0 (pe_norm.weight, pe_norm.bias), "),
            ("file.pt", "--method gap --freeze", "without its class token, ")):
        start, method = tmp_path / name, flags.split()[1]
        result = ok(cli("--epochs 1 --lr 0 --name tuned --overwrite", flags, "--init", start))
        assert f"starts from {start}, {says}with its head\n" in result.out
        expected = load_weights(create("vit-nano", method), start, from_plain=True).state_dict()
        assert_identical(load(tmp_path / "tuned")["model"], dict(expected))
        ok(report(tmp_path, tmp_path / "tuned"))
        found = read_json(tmp_path / "tuned" / "mechanism.json")
        assert found["correlation"][-1] is None and found["offset_before"] == []  # the last PE is 0; not from scratch
    one_line(cli("--freeze --name probe --init", tmp_path / "default"), "leave out --freeze")


def test_a_run_on_files(files, cli, tmp_path, monkeypatch):
    """Through workers; evaluated again at its size, at another and of the whole short side."""
    flags = "--data imagenet --model vit-nano --image-size 32 --batch-size 24 --epochs 2 --data-dir", files
    monkeypatch.setattr(train, "DataLoader", loader := Mock(side_effect=train.DataLoader))
    result = ok(cli(*flags, "--workers 2 --fraction 0.95"))
    assert {call.kwargs["num_workers"] for call in loader.call_args_list} == {2}
    assert "48 training images, 15 test images" in result.out
    folder = tmp_path / "mpvg-vit-nano-imagenet-seed0"
    assert result.out.endswith(f"train.py report {folder} --data-dir '{files}'\n")
    last = log_of(folder)[-1]
    assert last["unreadable"] >= 2 and load(folder)["config"]["num_classes"] == 3
    again = ok(evaluation(folder, "--data-dir", files)).out
    assert f"accuracy {last['test_accuracy']:.2f} %, loss {last['test_loss']:.4f}, 15 images" in again
    for other in ("--image-size 40", "--crop-ratio 1"):
        assert f"loss {last['test_loss']:.4f}" not in ok(evaluation(folder, other, "--data-dir", files)).out
    ok(report(tmp_path, folder, "--data-dir", files))
    assert read_json(folder / "mechanism.json")["cosine"] <= 1
    ok(cli(*flags, "--image-size 48 --name tuned --lr 0 --init", folder))
    assert load(tmp_path / "tuned")["model"]["pos_embed"].shape == (1, 36, 128)
    other = shutil.copytree(files, tmp_path / "other")
    (other / "val" / "a" / "03.JPEG").write_bytes(b"")
    assert "could not be measured (test image" in ok(report(tmp_path, folder, "--data-dir", other)).err
    shutil.rmtree(other / "val" / "c")
    one_line(evaluation(folder, "--data-dir", other), "val has 2 classes, the model 3: set --data-dir to")
    one_line(evaluation(folder, "--data-dir", tmp_path / "nowhere"), "val does not exist: set --data-dir to")


# -------------------------------------------------------------------------- train.py: runs that survive, processes

@pytest.mark.skipif(not hasattr(os, "fork") or torch.accelerator.is_available(),
                    reason="kills forked processes; with an accelerator, autograd does not work in a fork")
@pytest.mark.parametrize("data", ["cifar100", "imagenet"])
def test_killed_at_random_moments_and_resumed_it_is_the_same_run(cli, files, trained, tmp_path, data):
    flags = [f"--data {data} --model vit-nano --epochs 5 --batch-size 8 --method mpvg:drop_path=0.2:attn_drop=0.1",
             "--init", trained[0]]
    flags += ["--image-size 32 --workers 1 --data-dir", files] if data == "imagenet" else []
    ok(cli(*flags, "--name whole"))
    seconds, random, ends = log_of(tmp_path / "whole")[-1]["seconds"], Random(0), []
    flags += ["--name killed --resume"]
    while 0 not in ends:
        process = multiprocessing.get_context("fork").Process(target=lambda: os._exit(cli(*flags).code))
        process.start()  # a fork has the small data
        os.setpgid(process.pid, process.pid)  # to kill its workers with it
        process.join(seconds * random.uniform(0.05, 0.3) * 1.2 ** len(ends))  # longer and longer, so that it ends
        limit = time.monotonic() + 60
        while process.is_alive() and not (tmp_path / "killed" / ".lock").exists() and time.monotonic() < limit:
            time.sleep(0.01)
        if process.is_alive():
            if not ends:  # nobody else may train there
                one_line(cli(*flags), "another process is training in")
            os.killpg(process.pid, (signal.SIGKILL, signal.SIGINT)[len(ends) % 2])
        process.join(60)
        if process.is_alive():  # a fork can hang
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
        ends.append(process.exitcode)
        assert len(ends) < 40, ends
    assert -9 in ends and {*ends} <= {0, -9, 130, 1}, ends
    whole, killed = (load(tmp_path / name) for name in ("whole", "killed"))
    assert_identical([whole["model"], whole["optimizer"]], [killed["model"], killed["optimizer"]])
    clock = dict(seconds=0, images_per_second=0)
    assert [line | clock for line in whole["log"]] == [line | clock for line in killed["log"]]
    clocks = [line["seconds"] for line in killed["log"]]
    assert clocks == sorted(clocks) and not [*(tmp_path / "killed").glob("*.tmp")]


def test_resume_starts_finishes_and_refuses_other_flags(cli, tmp_path):
    flags, folder = "--epochs 1 --batch-size 50", tmp_path / MPVG
    ok(cli(flags, "--resume"))  # nothing was saved yet
    before, log = (folder / "last.pt").read_bytes(), log_of(folder)
    (folder / "log.jsonl").write_text("")  # as a kill may leave it: older
    again = ok(cli(flags, "--resume"))
    assert "resumes after epoch 1" in again.out and log_of(folder) == log
    one_line(cli(flags, f"--lr 0.5 --seed 1 --name {MPVG} --resume"),
             "was trained with other flags: seed was 0, is 1; lr was 0.002, is 0.5. Use the old ones, or another")
    one_line(cli(flags), "exists: --resume continues it, --overwrite replaces it, --name chooses another")
    one_line(cli(flags, "--resume --overwrite"), "choose one")
    assert (folder / "last.pt").read_bytes() == before
    (folder / "last.pt").unlink()
    one_line(cli(flags, "--resume"), "has a log but no last.pt to resume from")


def test_what_was_saved_stays_until_there_is_something_new(cli, tmp_path, monkeypatch):
    flags, folder = "--epochs 1 --batch-size 20", tmp_path / MPVG
    ok(cli(flags))
    (folder / "mechanism.json").write_text("{}")  # of these weights
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    one_line(cli(flags, "--overwrite --recipe weight_decay=1000000 --lr 1000000"),
             "error: the test loss is not finite, the run has diverged: try a lower --lr")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", Mock(side_effect=OSError(28, "No space left on device")))
        one_line(cli(flags, "--overwrite"), "best.pt cannot be written (No space left on device); earlier files")
        patch.setattr(train, "save_checkpoint", Mock(side_effect=KeyboardInterrupt))
        old = "; if not, repeat --overwrite: --resume would continue the older run"
        for more, advice in (("--overwrite", old), ("--name new", "")):
            result = cli(flags, more)
            assert result.code == 130 and result.out.endswith(
                f"\nstopped: --resume continues after the last finished epoch, if there is one{advice}\n")
        result = ok(report(tmp_path, folder))  # tables need no new file
        assert "mechanism.json cannot be written (No space" in result.err and "last epoch %" in result.out
        patch.setattr(train, "measure_run", Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory")))
        assert "could not be measured (CUDA out of memory)" in ok(report(tmp_path, folder)).err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    monkeypatch.setattr("fcntl.lockf", Mock(side_effect=OSError(37, "No locks available")))  # some network disks
    ok(cli("--epochs 2 --batch-size 50 --overwrite"))
    assert len(log_of(folder)) == 2 and not (folder / "mechanism.json").exists()


def test_a_checkpoint_that_is_not_ours_or_was_altered_is_one_line(cli, trained, tmp_path):
    folder = Path(shutil.copytree(trained[0], tmp_path / MPVG))
    path, saved = folder / "last.pt", load(folder)
    config = saved["config"]
    says = f"error: {path} cannot be used as a checkpoint of this train.py ("
    for contents in (saved["model"], saved | dict(config={key: config[key] for key in config if key != "flip"}),
                     saved | dict(config=config | dict(method="lape")), saved | dict(log=[]),
                     saved | dict(optimizer=saved["optimizer"] | dict(state={}))):
        torch.save(contents, path)
        one_line(evaluation(folder), says)
    path.write_bytes(path.read_bytes()[:5000])
    for result in (evaluation(folder), cli("--resume")):
        one_line(result, says)
    result = ok(report(tmp_path, folder))  # tables need no weights
    assert f"{folder} could not be measured ({says}" in result.err and "last epoch %" in result.out
    one_line(evaluation(tmp_path / "nowhere"), "nowhere cannot be read (No such file")


DRIVER = """
import os, signal, sys, torch
torch.set_default_dtype(torch.float64)
torch.Tensor.float = torch.Tensor.double
import train
def lr_at(*args, steps=[], lr_at=train.lr_at):  # process 1 kills itself in step 6, epoch 2
    steps.append(1)
    if (train.RANK, len(steps)) == (1, 6) and "--resume" not in sys.argv:
        os.kill(os.getpid(), signal.SIGKILL)
    return lr_at(*args)
train.lr_at = lr_at
os.makedirs(f"disk{train.RANK}", exist_ok=True)
os.chdir(f"disk{train.RANK}")  # as if each process had a machine of its own
train.main()
"""


def test_a_run_is_the_same_with_one_process_two_or_two_then_one(files, cli, tmp_path, monkeypatch, request):
    """One of torchrun's two processes is killed in epoch 2; then two go on and, from a copy, one alone."""
    request.addfinalizer(partial(torch.set_default_dtype, torch.float32))
    torch.set_default_dtype(torch.float64)  # all arithmetic, as in the driver
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    (tmp_path / "driver.py").write_text(DRIVER)
    flags = ("--data imagenet --model vit-nano --image-size 32 --batch-size 12 --epochs 3 --lr 0.004 --recipe erase=0",
             "--device cpu --data-dir", files, "--name")

    def torchrun(more=""):
        command = argv("-m torch.distributed.run --standalone --nproc_per_node 2 driver.py", *flags, "two", more)
        return subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=tmp_path,
                              env=dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT)))

    ok(cli(*flags, "one"))
    two = tmp_path / "disk0" / "runs" / "two"
    assert torchrun().returncode != 0 and len(log_of(two)) == 1
    shutil.copytree(two, tmp_path / "parts")
    ok(cli(*flags, "parts --resume --accumulate 2"))
    resumed = torchrun("--resume --accumulate 3")
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout.count("2 process(es)") == resumed.stdout.count("test accuracy") == 1  # said once
    assert not (tmp_path / "disk1" / "runs").exists()  # only the first process writes
    one = load(tmp_path / "one")
    for other, processes in ((load(two), [2, 2, 2]), (load(tmp_path / "parts"), [2, 1, 1])):
        assert [line["processes"] for line in other["log"]] == processes
        for a, b in zip(one["log"], other["log"], strict=True):
            for key in a.keys() - {"seconds", "images_per_second", "processes"}:
                assert a[key] == approx(b[key], abs=1e-10), key
        assert_same(one["model"], other["model"])


# -------------------------------------------------------------------------------------- train.py: users' mistakes

@pytest.mark.parametrize("command, says", [
    ("train --image-size 64", "--image-size: numbers has images of 32x32"),
    ("train --data-dir here", "--data-dir: numbers is built in: give --data"),
    ("train --accumulate 3", "--batch-size: 128 must be divisible by processes (1) x accumulate (3)"),
    ("train --recipe mixup=1 --batch-size 21", "and by processes x 2, as images are mixed in pairs"),
    ("train --method mpvg --pe none", "--method: it replaces --pe, --pool and --mpvg: leave those out"),
    ("train --pool cls --mpvg", "--mpvg: it needs a PE and --pool gap"),
    ("train --method mpvg:num_classes=7", "--method: 'num_classes=7' is not NAME=VALUE; NAME is one of add_input"),
    ("train --epochs 0", "Invalid value: epochs=0 must be between 1 and"),
    ("train --batch-size 401", "--batch-size: 401 is more than the 200 training images"),
    ("train --recipe warmup_epochs=6", "Invalid value: warmup_epochs and cooldown_epochs leave none of the 6 epochs"),
    ("train --recipe mixpu=1", "--recipe: 'mixpu=1' is not NAME=VALUE; NAME is one of epochs, batch_size, lr"),
    ("train --epochs 3 --recipe epochs=5", "--recipe: epochs is also given by its own flag: leave one out"),
    ("train --recipe mixup=1e-300", "Invalid value: mixup and cutmix are 0 or at least 0.01"),
    ("train --recipe batch_size=true", "Invalid value: batch_size=True is not of type int"),
    ("train --recipe erase=NaN", "Invalid value: erase=nan must be between 0 and 1"),
    ("train --recipe lr_per=year", "Invalid value: lr_per=year is neither epoch nor step"),
    ("train --device cuda:99", "--device: cuda:99 is not available on this machine"),
    ("train --device abacus", "--device: abacus is not one of auto, cpu, cuda"),
    ("train --name ../up", "--name: '../up' must be one folder name"),
    ("train --name ..", "--name: '..' must be one folder name"),
    (f"train --name {'ä' * 101}", "must be one folder name of at most 200 bytes"),
    ("train --compile graphs", "--compile: graphs needs CUDA and one process"),
    ("train --freeze", "--freeze: it needs --init, since it trains only the head"),
    ("train --init nowhere.pt", "error: --init nowhere.pt: "),
    ("train --runs file", "error: [Errno "),
    ("train sweep --epochs 3", "write the flags after sweep"),
    ("sweep --methods mpvg,rope", "unknown method 'rope'"),
    ("sweep --methods mpvg, lape", "unexpected extra argument"),
    ("sweep --overwrite", "--overwrite: sweep sets it"),
    ("bench --methods gap,mpgv", "--methods: unknown 'mpgv': choose from default"),
    ("bench --methods mpvg-folded", "--methods: folded models do not train"),
    ("bench --peers timn", "--peers: unknown 'timn': choose from torchvision"),
    ("bench --tables training", "--tables: unknown 'training'"),
    ("bench --mode reduce-overhead", "--mode: reduce-overhead uses CUDA graphs"),
    ("bench --json .", "--json"),
    (f"bench --json {'x' * 300}", "error: [Errno ")])
def test_a_users_mistake_gets_one_line(tmp_path, monkeypatch, command, says):
    """Before anything is trained, started, timed or printed."""
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    monkeypatch.setattr(train, "environment", Mock(return_value={}))  # it asks git
    for module, name in ((train, "fit"), (subprocess, "run"), (bench, "run_table")):
        monkeypatch.setattr(module, name, None)
    program, _, flags = command.partition(" ")
    main = dict(train=[train.main], sweep=[train.main, "sweep"], bench=[bench.main])[program]
    result = run_cli(*main, "--device cpu", flags)
    one_line(result, says)
    assert result.out == ""


@pytest.mark.parametrize("program, where, error, says", [
    (train, "train_run", "CUDA out of memory. Tried", "out of memory: in training raise --accumulate or lower"),
    (train, "train_run", "DefaultCPUAllocator: can't allocate memory: you", "out of memory: in training raise"),
    (train, "train_run", "DataLoader worker (pid 7) is killed by signal: Killed. ", "DataLoader worker (pid 7) is "
     "killed by signal: Killed: in training lower --workers"),
    (train, "train_run", "No working C++ compiler", "torch.compile needs a C++ compiler: install g++, or use"),
    (train, "train_run", "Failed to find C compiler. Please specify", "torch.compile needs a C++ compiler"),
    (bench, "make_limits", "can't allocate memory: 1 TB\nframe #0: c10", "can't allocate memory: 1 TB: lower --batch"),
    (bench, "make_contestant", "CUDA out of memory", "inference-eager: default failed: CUDA out of memory: lower")])
def test_lack_of_memory_or_of_a_compiler_is_one_line(monkeypatch, program, where, error, says):
    monkeypatch.setattr(program, where, Mock(side_effect=RuntimeError(error)))  # CUDA's is one, too
    one_line(run_cli(program.main, "--device cpu", "--quick" * (program is bench)), f"error: {says}")


@pytest.mark.parametrize("damage, says", [
    (lambda root: (root / "val" / "c").rename(root / "val" / "d"), "they have 3 and 3, in one of them only: c, d"),
    (lambda root: [shutil.rmtree(root / split / name) for split in ("train", "val") for name in "ab"],
     "need the same classes, two or more; they have 1 and 1, in one of them only: none"),
    (lambda root: [path.unlink() for path in (root / "val" / "c").iterdir()], "Found no valid file for the classes c"),
    (lambda root: (root / "val").rename(root / "test"), "does not hold images in train/CLASS/ and val/CLASS/")])
def test_a_folder_that_is_no_imagenet_is_refused(files, cli, tmp_path, damage, says):
    damage(root := shutil.copytree(files, tmp_path / "copy"))
    one_line(cli("--data imagenet --data-dir", root), says)


# ----------------------------------------------------------------------------- train.py: sweep, report, accelerators

def rows_of(text):
    """-> cells of each row of the tables in a text."""
    return [[" ".join(cell.split()).strip("*") for cell in line.strip("|").split("|")]
            for line in text.splitlines() if re.match(r"\| [^-]", line)]


def write_run(folder, accuracies, finished=True, **changes):
    """A run's folder as train.py leaves it, without weights."""
    folder.mkdir(parents=True)
    config = dict(data="cifar100", model="vit-lite", method="mpvg", overrides={}, seed=0, fraction=1.0, init=None,
                  freeze=False, precision="bf16", image_size=32, num_classes=100, environment={})
    config = config | asdict(train.DATASETS[changes.get("data", "cifar100")].recipe) | changes
    accuracies = [0.0] * (config["epochs"] - len(accuracies)) * finished + accuracies
    log = [dict(epoch=i + 1, test_accuracy=a, loss=1.0, seconds=10.0 * (i + 1)) for i, a in enumerate(accuracies)]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))


RESULTS = """\
| method           | n | last epoch %  | minus default      | best epoch % | seconds | parameters | paper % |
| default          | 3 | 71.00 +- 1.00 |                    | 80.00        | 3100    | 3,740,004  | 74.90   |
| lape             | 2 | 74.00 +- 0.00 | +4.00, +3.00 (n=2) | 74.00        | 3100    | 3,743,588  | 75.52   |
| mpvg             | 3 | 74.00 +- 1.32 | +3.00 +- 1.24      | 74.00        | 3100    | 3,743,076  | 76.87   |
| mpvg-layer0=True | 1 | 60.00         | -10.00 (n=1)       | 60.00        | 3100    | 3,743,588  |         |

| contrast       | n | difference    | level % | paper | model    | paper is |
| mpvg - default | 3 | +3.00 +- 2.56 | 98.75   | +1.97 | vit-lite | inside   |

| method | n | last epoch % | best epoch % | seconds | parameters |
| pvg    | 1 | 20.00        | 20.00        | 3100    | 3,742,564  |
"""


def test_the_table_of_finished_runs(tmp_path):
    """Half intervals: 0.5 / 3 ** 0.5 x t; t, two degrees of freedom, is 4.303 for 95 %, 8.860 for 98.75 %."""
    for seed, (first, second) in enumerate([(70.0, 73.0), (71.0, 73.5), (72.0, 75.5)]):
        write_run(tmp_path / f"a{seed}", [80.0, first], method="default", seed=seed)
        write_run(tmp_path / f"b{seed}", [1.0, second], seed=seed)
        if seed < 2:
            write_run(tmp_path / f"c{seed}", [1.0, 74.0], method="lape", seed=seed)
    write_run(tmp_path / "d", [50.0, 60.0], overrides={"layer0": True})
    write_run(tmp_path / "e", [50.0], finished=False, method="pvg", seed=1)
    write_run(tmp_path / "f", [10.0, 20.0], method="pvg", fraction=0.5, freeze=True)  # another setting
    (tmp_path / "other").mkdir()
    folders = sorted(path for path in tmp_path.glob("*/"))
    result = ok(report(tmp_path, *folders))
    for left_out in ("e", "other"):
        assert f"note: {tmp_path / left_out} is left out: it holds no finished run" in result.err
    # Its contrast has three seeds: the level is corrected for four claims, and there is no verdict.
    assert rows_of(result.out) == rows_of(RESULTS)
    assert max(map(len, result.out.splitlines())) <= 110
    result = ok(report(tmp_path, *folders, tmp_path / "figures", "--base mpvg"))
    assert "figures is left out" not in result.err  # RUNS/* holds the figures, too
    assert [row[3] for row in rows_of(result.out)[:5]] == [
        "minus mpvg", "-3.00 +- 1.24", "+1.00, +0.50 (n=2)", "", "-13.00 (n=1)"]
    one_line(report(tmp_path, folders[0], "--base pgv"), "none of these runs is of --base pgv: choose from default")
    one_line(report(tmp_path, tmp_path / "a0", tmp_path / "a0"), "have the same method, setting and seed: leave one")
    assert report(tmp_path, tmp_path / "other").code == 1


def test_student_t():
    """For values with standard error 1, half the interval is the quantile of t, here from tables."""
    for n, alpha, t in ((2, 0.05, 12.706), (5, 0.05, 2.776), (26, 0.05, 2.060), (101, 0.05, 1.984), (4, 0.0125, 5.392)):
        values = torch.linspace(-1, 1, n).double()
        values = (values / values.std() * n ** 0.5).tolist()
        assert train.t_test(values, alpha)[0] == approx(t, rel=5e-4)
        assert train.t_test([value + t for value in values])[1] == approx(alpha, rel=2e-3)
    assert train.t_test([1.0, 1.0, 1.0])[0] == 0 and train.t_test([-1.0, 0.0, 1.0])[1] == 1


CONTRASTS = """\
| contrast                            | n | difference    | level % | verdict      | paper | model      | paper is |
| (lape-gap - gap) - (lape - default) | 4 | -3.00 +- 1.96 | 95.00   | agrees       | -0.96 | deit-tiny  | outside  |
| lape - default                      | 4 | +2.00 +- 1.90 | 98.33   | agrees       | +0.58 | deit-small | inside   |
| lape-gap - gap                      | 4 | -1.00 +- 1.08 | 97.50   | inconclusive | -0.16 | deit-tiny  | inside   |
| mpvg - pvg                          | 4 | +0.22 +- 0.21 | 95.00   | inconclusive | +0.23 | deit-small | inside   |
| mpvg - default                      | 4 | +5.22 +- 3.21 | 98.75   | agrees       | +0.80 | deit-small | outside  |
| pvg - lape-gap                      | 4 | +6.00 +- 2.45 | 95.00   |              | +0.93 | deit-tiny  | outside  |
"""


def test_contrasts(tmp_path, monkeypatch):
    """Half intervals: t / 2 x deviation; t, three degrees of freedom, of 0.05 / 1, ... / 4: 3.18, 4.18, 4.86, 5.39."""
    # mpvg - pvg by itself would be conclusive, but Holm's procedure stops before it.
    shifts = {"default": [0, 0, 0, 0], "lape": [1.2, 2.2, 1.6, 3.0], "gap": [0, 0, 0, 0], "mpvg-free": [6],
              "lape-gap": [-0.4, -0.8, -1.2, -1.6], "pvg": [4, 5, 4.5, 6.5], "mpvg": [4.07, 5.17, 4.77, 6.87]}
    for method, accuracies in shifts.items():
        for seed, accuracy in enumerate(accuracies):
            write_run(tmp_path / f"{method}{seed}", [70.0 + seed + accuracy], method=method, seed=seed,
                      model="deit-small")
    folders = sorted(tmp_path.glob("*/"))
    assert rows_of(report(tmp_path, *folders).out)[-7:] == rows_of(CONTRASTS)
    for name, other in dict(numbers=dict(data="numbers"), tuned=dict(init="plain")).items():  # not in the paper
        for method, seed in product(("default", "lape"), range(3)):
            write_run(tmp_path / name / f"{method}{seed}", [50.0 + seed], method=method, seed=seed, **other)
        assert "Contrasts" not in report(tmp_path, *(tmp_path / name).glob("*")).out
    shown, figure = {}, pytest.importorskip("matplotlib.figure")
    monkeypatch.setattr(figure.Figure, "savefig", lambda figure, path: shown.update({path.stem: figure.axes[0]}))
    ok(report(tmp_path, *folders, draw=True))
    ax = shown["contrasts"]
    papers = [line.get_xdata()[0] for line in ax.lines if line.get_marker() == "D"]
    for row, label, bar, paper in zip(rows_of(CONTRASTS)[1:], ax.get_yticklabels(), ax.containers, papers, strict=True):
        low, high = bar[2][0].get_segments()[0][:, 0]
        interval = f"{(low + high) / 2:+.2f} +- {(high - low) / 2:.2f}"
        assert [label.get_text(), interval, f"{paper:+.2f}"] == [row[0], row[2], row[5]]


@pytest.mark.parametrize("method", ["default", "mpvg", "mpvg-shift"])
def test_measure_is_what_it_says(method):
    model, batches = tiny(method), [images(3, seed=1), images(2, seed=2)]
    (tokens, pe, found), p = train.measure(model, [(x, None) for x in batches]), model.state_dict()
    layers = equations(p, torch.cat(batches), **METHODS[method])[2]
    for i, (_, normed, e) in enumerate(layers):
        assert_close(tokens[i], normed.mean(0), rtol=1e-8, atol=1e-8)
        assert (pe[i] is None) == (found["correlation"][i] is None) == (e is None)
        if e is not None:
            r = np.corrcoef(normed.mean(0).flatten(), e.broadcast_to(1, *normed.shape[1:]).flatten())[0, 1]
            assert found["correlation"][i] == approx(r, abs=1e-6)
    stream, normed, last = layers[-1]
    before, after = stream.mean(1), normed.mean(1)
    cosine = (before * after).sum(1) / before.norm(dim=1) / after.norm(dim=1)
    assert found["cosine"] == approx(cosine.mean().item())
    offset = p["norm.bias"] + (0 if last is None else last.reshape(-1, 16).mean(0))
    assert found["offset"] == approx(offset.tolist())
    assert (found["beta"], found["gamma"]) == (p["norm.bias"].tolist(), p["norm.weight"].tolist())


@pytest.mark.parametrize("method", ["default", "pvg"])
def test_position_is_read_by_a_ridge_regression(method):
    model, x = tiny(method), images(24)
    labels = model(x).argmax(1)
    found = train.measure_position(model, [(x[:10], labels[:10]), (x[10:], labels[10:])])

    def read(tokens):
        tokens = tokens[:, -6:].detach().numpy()
        fit, test = tokens[::2].reshape(-1, 16), tokens[1::2].reshape(-1, 16)
        center, index = fit.mean(0), np.tile(np.arange(6), 12)
        fit, test, ridge = fit - center, test - center, 1e-3 * len(fit) * fit.var(0).mean() * np.eye(16)
        weights = np.linalg.solve(fit.T @ fit + ridge, fit.T @ (np.eye(6)[index] - 1 / 6))
        return 100 * ((test @ weights).argmax(1) == index).mean()

    inputs, normed, pe = zip(*equations(model.state_dict(), x, **METHODS[method])[2])
    assert found["stream"] == approx([read(tokens) for tokens in inputs[:-1]])
    assert found["normed"] == approx([read(tokens) for tokens in normed])
    assert found["attention"] == approx([None if e is None else read(y + e) for y, e in zip(normed, pe[:-1])])
    generator = seeded(0)
    right = [model(train.shuffle_patches(part, 4, generator)).argmax(1) for part in (x[:10], x[10:])]
    assert found["shuffled"] == approx(100 * (torch.cat(right) == labels).double().mean().item())
    assert found["ordered"] == 100


def test_eval_measures_again(trained, monkeypatch):
    folder, last = trained[0], log_of(trained[0])[-1]
    monkeypatch.setattr(train, "fold", folded := Mock(side_effect=fold))
    measured = f"accuracy {last['test_accuracy']:.2f} %, loss {last['test_loss']:.4f}, 40 images"
    where = f"numbers at 32x32, seed 3, epoch 3: test {measured}\n"
    assert evaluation(folder).out == f"mpvg, vit-nano, {where}"
    assert evaluation(folder, "--fold").out == f"mpvg, vit-nano, folded, {where}"
    best = max(log_of(folder), key=lambda line: line["test_accuracy"])  # the first of equals
    shown = evaluation(folder / "best.pt").out
    assert f"epoch {best['epoch']}: test" in shown and f"loss {best['test_loss']:.4f}" in shown
    larger = load_weights(create("vit-nano", "mpvg", image_size=48), folder / "last.pt").eval()
    x, y = make_numbers(40, 2)
    x = F.interpolate(train.normalise(x, "numbers"), size=(48, 48), mode="bicubic", antialias=True)
    loss = F.cross_entropy(larger(x), y).item()
    shown = evaluation(folder, "--image-size 48").out
    assert "numbers at 48x48, seed 3, epoch 3: test accuracy" in shown and f"loss {loss:.4f}, 40 images" in shown
    assert "folded, numbers at 48x48" in evaluation(folder, "--image-size 48 --fold").out
    assert folded.call_count == 2  # with --fold
    one_line(evaluation(folder, "--image-size 33"), "--image-size: image_size 33x33 is not divisible")


def test_report_measures_draws_and_needs_no_weights(trained, tmp_path):
    folder = tmp_path / MPVG
    shutil.copytree(trained[0], folder, ignore=shutil.ignore_patterns("mechanism.json"))
    result = ok(report(tmp_path, folder, draw=True))
    model = load_weights(create("vit-nano", "mpvg"), folder / "last.pt").eval()
    *_, expected = train.measure(model, [(train.normalise(make_numbers(40, 2)[0], "numbers"), None)])
    found = read_json(folder / "mechanism.json")
    assert found["correlation"] == approx(expected["correlation"], abs=1e-5) and found["correlation"][0] is None
    assert found["offset"] == approx(expected["offset"], abs=1e-5) and len(found["beta"]) == 128
    assert found["images"] == 40
    for name in ("beta", "offset"):
        assert found[f"{name}_variance"] == approx(np.var(found[name], ddof=1))
    torch.manual_seed(3)
    fresh = create("vit-nano", "mpvg")
    before = fresh.pe_after_last_norm(fresh.delivered_pe()).mean(1)[0].tolist()
    assert found["offset_before"] == approx(before, abs=1e-6)
    report(tmp_path, folder, "--images 15")
    assert read_json(folder / "mechanism.json")["images"] == 14  # at most 15: every third
    (folder / "last.pt").unlink()
    again = report(tmp_path, folder)
    assert "index read from x" in again.out and "the figures need matplotlib: pip install matplotlib" in again.out
    pytest.importorskip("matplotlib")
    assert f"figures in {tmp_path / 'figures'}" in result.out
    names = ["correlation.png", "curves.png", "last_norm.png", f"layers-{MPVG}.png", "position.png"]
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == names
    assert all(min(Image.open(path).size) > 300 for path in (tmp_path / "figures").iterdir())


def test_a_setting_is_all_but_method_and_seed(trained, tmp_path, monkeypatch):
    """What differs from the recipe is listed. Runs from runs of their own method and seed share a setting."""
    lite, variants = "vit-lite, cifar100, 310 epochs, bf16", [f"mpvg-last_pe={block}" for block in (2, 3, 4, 6)]
    settings = {
        lite: {}, f"{lite}, lr 0.01, image_size 64, num_classes 10, fraction 0.5, freeze True": dict(
            lr=0.01, image_size=64, num_classes=10, fraction=0.5, freeze=True),
        "vit-lite, cifar100, 20 epochs, bf16, lr_per epoch": dict(epochs=20, warmup_epochs=2.0, cooldown_epochs=2),
        f"{lite}, init b-METHOD-x-seedN": dict(init="a/b/{method}-x-seed{seed}"),
        f"{lite}, init b-x-mpvg-last_pe=2-x-seed0": dict(init="a/b/x-mpvg-last_pe=2-x-seed0"),
        f"{lite}, init b-mpvg-last_pe=2-x-seed10": dict(init="a/b/mpvg-last_pe=2-x-seed10")}
    for (i, changes), seed, method in product(enumerate(settings.values()), range(2), variants):
        init = changes.get("init", "").format(method=method, seed=seed) or None
        write_run(tmp_path / f"{i}{method}{seed}", [70.0 + seed], overrides={"last_pe": int(method[-1])}, seed=seed,
                  **changes | dict(init=init))
    folders, drawn = [*sorted(tmp_path.glob("[0-9]*")), trained[0]], {}
    result = ok(report(tmp_path, *folders))
    nano = "vit-nano, numbers, 3 epochs, fp32, batch_size 20, lr 0.01"
    assert [line for line in result.out.splitlines() if line.startswith("vit-")] == [nano, *settings]
    assert [row[:2] for row in rows_of(result.out) if "last_pe" in row[0]] == [[name, "2"] for name in variants] * 6
    figure = pytest.importorskip("matplotlib.figure")
    monkeypatch.setattr(figure.Figure, "savefig", lambda figure, path, **_: path.touch() or drawn.update({
        (path.parent.name, path.stem): figure}))
    written = re.findall("figures in .*/(.*)", ok(report(tmp_path, *folders, draw=True)).out)
    folders = {title: title.replace(", ", "-").replace(" ", "-") for title in (nano, *settings)}
    assert written == [*folders.values()]
    assert {key: [text.get_text() for legend in figure.legends for text in legend.get_texts()]
            for key, figure in drawn.items() if key[1][:6] in ("curves", "layers")} == {
        **{(folders[title], "curves"): variants for title in settings},
        (folders[nano], "curves"): ["mpvg"], (folders[nano], f"layers-{TRAINED}"): []}
    assert drawn[folders[lite], "curves"].axes[1].lines[0].get_ydata()[-1] == 70.5  # the mean of two seeds
    found, log = read_json(trained[0] / "mechanism.json"), log_of(trained[0])
    expected = dict(curves=[[None, *(line[key] for line in log)] for key in ("loss", "test_accuracy")],
                    correlation=[found["correlation"], [-0.37, -0.95]],
                    last_norm=[sorted(found[key]) for key in ("gamma", "beta", "offset", "offset_before")],
                    position=[found["stream"], found["normed"], found["attention"],
                              [found["ordered"], found["shuffled"]]])
    for name, lines in expected.items():
        shown = [line.get_ydata() for ax in drawn[folders[nano], name].axes for line in ax.lines]
        for line, values in zip(shown, lines, strict=True):
            np.testing.assert_array_equal(line, np.array(values, float))  # None: nan


def test_a_sweeps_seeds_and_jobs(tmp_path, monkeypatch):
    asked, threads, load, both = [], set(), Mock(), threading.Barrier(2)
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setitem(train.DATASETS, "cifar100", replace(train.DATASETS["cifar100"], load=load))

    def run(command, env, **_):
        asked.append(command[-3:-1])
        threads.add(env["OMP_NUM_THREADS"])
        both.wait(20)  # until two are under way
        return SimpleNamespace(returncode=1)

    monkeypatch.setattr(subprocess, "run", run)
    result = sweep("--methods 'gap, mpvg' --seeds 2 --jobs 2 --data cifar100 --data-dir here --runs", tmp_path)
    assert "4 of 4 runs failed" in result.err and threads == {"4"}  # two runs share the cores
    assert [str(call.args[0]) for call in load.call_args_list] == ["here"]  # downloaded once, before
    order = [[f"--method={method}", f"--seed={seed}"] for seed in (0, 1) for method in ("gap", "mpvg")]
    assert sorted(asked[:2]) == order[:2] and sorted(asked[2:]) == order[2:]  # whole seeds first


def test_a_real_sweep_side_by_side(files, tmp_path, monkeypatch):
    """Processes of their own, two at once; again, it skips finished runs; a run that fails is named."""
    flags = ("--methods gap,mpvg:layer0=true --seeds 1 --jobs 2 --epochs 1 --batch-size 12 --data imagenet",
             "--image-size 32 --model vit-nano --data-dir", files, "--runs", tmp_path)
    result = ok(sweep(*flags))
    table = (tmp_path / "sweep.md").read_text()
    names = ["gap-vit-nano-imagenet-seed0", "mpvg-layer0=True-vit-nano-imagenet-seed0"]
    assert table in result.out and [row[0] for row in rows_of(table)[1:]] == ["gap", "mpvg-layer0=True"]
    for name in names:
        assert load(tmp_path / name)["log"][-1]["epoch"] == 1 and f"finished {tmp_path / name}.txt" in result.out
        assert "51 training images, 15 test images" in (tmp_path / f"{name}.txt").read_text()
        (tmp_path / name / "last.pt").unlink()  # a log is enough
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1))
    (tmp_path / names[1] / "log.jsonl").write_text("")  # not finished
    one_line(sweep(*flags, "--precision bf16"), f"{names[0]} was trained with other flags: precision was fp32, is")
    result = sweep(*flags)
    assert result.code == 1 and f"error: 1 of 2 runs failed: {names[1]}" in result.err  # only this one started
    assert f"failed, see {tmp_path / names[1]}.txt" in result.out and "| gap" in (tmp_path / "sweep.md").read_text()
    assert "12 of 12 runs failed" in sweep("--runs", tmp_path).err  # by default four methods, three seeds
    monkeypatch.setattr(train, "WORLD_SIZE", 2)
    one_line(sweep(), "start it without torchrun")


def test_ctrl_c_ends_a_sweep(tmp_path, monkeypatch):
    def interrupt(*_, **__):
        time.sleep(0.1)  # the others are cancelled meanwhile
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "run", started := Mock(side_effect=interrupt))
    one_line(sweep("--runs", tmp_path), "stopped: run the same command to continue")
    assert started.call_count < 3  # of 12: no others were begun


def test_every_command_has_help():
    for command in ("", "sweep", "eval", "report"):
        assert "Options" in ok(run_cli(train.main, command, "--help")).out


@pytest.fixture
def accelerator():
    return torch.accelerator.current_accelerator(check_available=True) or pytest.skip("no accelerator")


def test_an_accelerator_computes_what_the_cpu_does(accelerator):
    model, x = randomise(create("vit-nano", "mpvg"), 0.1).float(), images(2, (32, 32), dtype=torch.float32)
    for net in (model, fold(model)):
        logits = net(x)
        assert_close(net.to(accelerator)(x.to(accelerator)).cpu(), logits, rtol=0, atol=0.01)
        net.cpu()
    for data in ("cifar100", "imagenet"):
        recipe = replace(train.DATASETS[data].recipe, batch_size=50, erase=0.0)  # erasing's noise differs
        config = ARRAYS | dict(data=data)
        epochs = [train.train_batches(train.ArrayData(*make_numbers(200, 1), device), recipe, config, 0)
                  for device in ("cpu", "cuda" if accelerator.type == "cuda" else "cpu")]
        for (x, targets), (y, others) in zip(*epochs, strict=True):
            assert_close(others.cpu(), targets)
            assert (x - y.cpu()).abs().mean() < 0.005  # a level of 255 is 0.014


@pytest.mark.parametrize("precision, rel", [("fp32", 1e-3), ("bf16", 1e-2)])
def test_on_an_accelerator_losses_are_the_same_compiled_as_a_graph_and_resumed(
        accelerator, cli, tmp_path, monkeypatch, precision, rel):
    def losses(name, *flags, code=0):
        result = cli(f"--data cifar100 --model vit-nano --epochs 3 --batch-size 40 --lr 0.01 --name {name}",
                     f"--precision {precision} --device {accelerator}", *flags)
        assert result.code == code, result.err
        return [line["loss"] for line in log_of(tmp_path / name)]

    def save_and_stop(*arguments, save=train.save_checkpoint):
        save(*arguments)
        raise KeyboardInterrupt

    torch._dynamo.reset()  # it compiles one function eight times, which is torch's limit
    modes = ("off", "on", "graphs") if accelerator.type == "cuda" else ("off",)
    plain = losses("plain")
    for mode in modes:
        assert losses(mode, f"--compile {mode}") == approx(plain, rel=rel)
        flags = f"--compile {mode} --method mpvg:attn_drop=0.5:drop_path=0.5"
        whole = losses(f"{mode}-whole", flags)
        with monkeypatch.context() as patch:
            patch.setattr(train, "save_checkpoint", save_and_stop)
            assert len(losses(f"{mode}-resumed", flags, code=130)) == 1
        assert losses(f"{mode}-resumed", flags, "--resume") == approx(whole, rel=rel / 10)
        assert whole != approx(plain, rel=1e-5)  # dropout was on


# ------------------------------------------------------------------------------------------------------------ bench.py

SMALL = dict(image_size=32, patch_size=16, num_classes=10, dim=16, depth=1, heads=2, mlp_ratio=2.0)


@pytest.fixture
def quick(monkeypatch):
    """A small model, and torch.compile without Inductor; the list holds the options of each call."""
    compile_, calls = torch.compile, []
    monkeypatch.setitem(MODELS, "vit-nano", SMALL)
    monkeypatch.setattr(torch, "compile", lambda function, *, mode, **options: (
        calls.append(options | dict(mode=mode)) or compile_(function, backend="eager", **options)))
    return calls


small_run = partial(run_cli, bench.main, "--quick --device cpu --peers none --rounds 6 --batch 4")


@pytest.mark.parametrize("model", ["vit-nano", "vit-lite"])
@pytest.mark.parametrize("pool", ["cls", "gap"])
def test_flops_and_bytes_are_those_of_the_closed_formulas(model, pool):
    c, batch = sizes(model), 8
    D, L, h, p, side, C = (c[key] for key in ("dim", "depth", "mlp_ratio", "patch_size", "image_size", "num_classes"))
    patches = (side // p) ** 2
    N = patches + (pool == "cls")
    embed = 2 * patches * 3 * p * p * D
    flops = embed + L * (2 * N * D * D * (3 + 1 + 2 * h) + 4 * N * N * D) + 2 * D * C
    P = parameter_count(create(model, bench.PLAIN[pool]))
    once = P + batch * 3 * side * side
    values = batch * N * L * D * ((1 + 3) + (3 + 1) + (2 + 1) + (1 + h) + (h + 2))
    assert bench.count_work(c, pool, False, batch, 2) == (batch * flops, 2 * (once + values))
    training, stream = 3 * flops - embed, 6 * batch * N * L * D  # images need no gradient; the stream is float32
    moved = 4 * once + 2 * (values + stream)
    assert bench.count_work(c, pool, True, batch, 2) == (batch * training, 3 * moved + 7 * 4 * P)


def timed(name, seconds, work=0):
    pool = bench.PEERS.get(name) or METHODS.get(name, {}).get("pool")
    one = bench.Contestant(name, None, pool, work)
    one.seconds, one.facts = seconds, dict(memory_bytes=2 ** 20, compile_seconds=None, attention=None)
    return one


def summary(seconds, training=False):
    limits = timed("copy", [1.0, 2.0, 4.0], 2 * 4 * 2 ** 26), timed("matmul", [0.01, 0.02, 0.04], 2 * 2048 ** 3)
    setup = SimpleNamespace(sizes=sizes("vit-nano"), batch=2, dtype=torch.float32)
    return bench.summarise([timed(*item) for item in seconds.items()], limits, [], training, setup)


def test_ratios_are_of_pairs_and_agree_with_images_per_second():
    """And the verdict is mpvg's ratio to gap in each table."""
    table = summary({"default": [0.1, 0.2, 0.4], "gap": [0.1, 0.3, 0.5], "mpvg": [0.2, 0.3, 0.2],
                     "torchvision": [0.2, 0.1, 0.8], "timm": [0.3, 0.4, 0.5], "timm gap": [0.1, 0.1, 0.1]})
    rows = {row["name"]: row for row in table["rows"]}
    assert list(rows) == ["default", "gap", "mpvg", "torchvision", "timm", "timm gap"]
    assert rows["mpvg"]["speed_to_plain"] == approx([1.0, 0.5, 2.5])  # beside gap
    assert rows["default"]["speed_to_plain"] == [1, 1, 1] and rows["timm"]["speed_to_plain"][0] == approx(0.5)
    assert rows["default"]["best_peer"] == "torchvision" and rows["mpvg"]["best_peer"] == "timm gap"
    assert rows["default"]["speed_to_best_peer"] == approx([2.0, 0.5, 2.0])
    for row in rows.values():
        plain = dict(default=2 / 0.2, gap=2 / 0.3)[row["plain"]]
        assert row["images_per_second"] == approx(plain * row["speed_to_plain"][0])
        assert row["milliseconds"] == approx(
            [2000 / row["images_per_second"], 1000 * min(row["seconds"]), 1000 * max(row["seconds"])])
    flops, moved = bench.count_work(sizes("vit-nano"), "gap", False, 2, 4)
    operations, copied = 2 * 2048 ** 3, 2 * 4 * 2 ** 26
    assert rows["gap"]["share_of_peak"] == approx(flops / operations * 0.04 / 0.5)
    assert rows["gap"]["share_of_roofline"] == approx(moved / copied * 4.0 / 0.5)  # this copy bounds more
    assert table["matmul_flops"] == approx(operations / 0.02) and table["copy_bytes"] == copied / 2.0
    text = bench.as_text("inference-eager", table)
    assert re.search(r"mpvg +1\.000 0\.500-2\.500 +0\.500 0\.333-0\.500 ", text)
    assert "300 (200-300)" in text and max(map(len, text.splitlines())) <= 100
    table["rows"][0]["milliseconds"] = [9.124, 8.9, 12.34]
    assert "9.12 (8.90-12.3)" in bench.as_text("inference-eager", table)
    other = summary(dict(gap=[0.9] * 3, mpvg=[1.0] * 3))
    assert bench.verdict({"inference-eager": table, "training-eager": other}) == (
        "mpvg's speed relative to gap's, median (95 % interval): 1.000 (0.500 to 2.500) in inference-eager, "
        "0.900 (0.900 to 0.900) in training-eager.")
    alone = summary(dict(lape=[0.1] * 3, mpvg=[0.2] * 3), training=True)  # a class token is another model
    assert "not measured" in bench.verdict({"training-eager": alone})
    for row in alone["rows"]:
        assert row["speed_to_plain"] is row["speed_to_best_peer"] is row["plain"] is row["best_peer"] is None
        assert row["images_per_second"] == approx(2 / row["seconds"][0])


def test_the_interval_of_a_median():
    """Two of the sorted ratios: of 20 the 6th and the 15th, between which the median lies in 95.9 % of cases."""
    random = seeded(0)
    for n, first, covers in ((20, 5, 0.959), (10, 1, 0.979), (6, 0, 0.969), (3, 0, 0.75)):
        seconds = torch.rand(2000, n, generator=random).double() + 0.5  # their median is 1
        found = [bench.speed(timed("a", [1.0] * n), timed("b", row)) for row in seconds.tolist()]
        ratios = seconds[0].sort().values
        assert found[0] == [ratios.quantile(0.5).item(), ratios[first].item(), ratios[-1 - first].item()]
        assert sum(low <= 1 <= high for _, low, high in found) / 2000 == approx(covers, abs=0.02)


def test_memory_is_what_is_held_and_what_a_call_allocates(quick):
    def call():
        first = torch.ones(2 ** 18)  # 1 MiB
        second = torch.ones(2 ** 19)
        del first, second
        torch.ones(2 ** 17)

    memory, attention = bench.look_inside(call, 1000, CPU)
    assert 3 * 2 ** 20 + 1000 <= memory < 3.2 * 2 ** 20 and attention is None
    batch = images(4, (32, 32), dtype=torch.float32), torch.arange(4)
    setup = SimpleNamespace(device=CPU, dtype=torch.float32, mode="reduce-overhead", sizes=sizes("vit-nano"))
    one = bench.make_contestant("gap", "inference-compiled", [batch], setup)
    assert quick[0]["mode"] == "reduce-overhead" and one.facts["memory_bytes"] is None  # CUDA graphs have a pool


@pytest.mark.parametrize("dtype, precision", [(torch.float32, "fp32"), (torch.bfloat16, "bf16")])
@pytest.mark.parametrize("table", ["inference-eager", "training-eager"])
def test_inference_has_weights_of_the_dtype_and_training_has_autocast_and_an_optimizer(
        monkeypatch, table, dtype, precision):
    model, training, seen = ViT(**SMALL, pool="gap"), table == "training-eager", []
    start = model.head.weight.detach().clone()
    model.register_forward_pre_hook(lambda _, x: seen.append(
        (x[0].data_ptr(), x[0].dtype, model.training, torch.is_autocast_enabled("cpu"))))
    monkeypatch.setattr(bench, "build", lambda *_: (model, "gap"))
    expected = torch.float32 if training else dtype
    batches = torch.randn(3, 4, 3, 32, 32, dtype=expected), torch.arange(12).view(3, 4) % 5
    setup = SimpleNamespace(device=CPU, dtype=dtype, precision=precision, sizes=None)
    one = bench.make_contestant("gap", table, [*zip(*batches)], setup)
    assert {call[1:] for call in seen} == {(expected, training, training and dtype == torch.bfloat16)}
    places = [call[0] for call in seen]
    assert len(set(places[:3])) == 3 and places[3:] == places[:-3]  # batches in turn
    assert model.head.weight.dtype == expected and model.head.weight.grad is None
    assert model.head.weight.requires_grad == training
    assert torch.equal(model.head.weight, start.to(expected)) != training
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: len(seen)))  # a clock that counts calls
    one.repeat = 5
    assert one.time(CPU) == 1  # per call


def test_a_peer_with_a_broken_graph_is_left_out_and_no_timing_contains_compilation(monkeypatch, quick):
    def broken(model, x, forward=torchvision.models.VisionTransformer.forward):
        torch._dynamo.graph_break()
        return forward(model, x)

    scale = [1]  # torch.compile takes it for a constant
    limit = bench.Contestant("limit", lambda: scale.__setitem__(0, 2), work=1)  # called after the models' warm-up
    monkeypatch.setattr(bench, "make_limits", lambda *_: (limit, limit))
    monkeypatch.setattr(torchvision.models.VisionTransformer, "forward", broken)
    flags = "--tables inference-compiled --methods default"
    done = ok(small_run(flags, "--peers torchvision"))
    assert re.search(r"torchvision failed: .*graph_break.* \(left out\)", done.out)
    assert [options["fullgraph"] for options in quick] == [True, True]
    scale[0], forward, warm_up = 1, ViT.forward, bench.Contestant.warm_up
    monkeypatch.setattr(ViT, "forward", lambda model, x: forward(model, x) * scale[0])
    one_line(small_run(flags), "error: Detected recompile")
    with torch.compiler.set_stance("force_eager"):
        one_line(small_run(flags), "inference-compiled: default failed: torch.compile is switched off")
    limit.call = lambda: None
    monkeypatch.setattr(bench.Contestant, "warm_up", lambda *args: scale.__setitem__(0, 3) or warm_up(*args))
    ok(small_run(flags))  # compiled again, but before the timings


def test_bench_flags_have_their_effect(monkeypatch):
    installed = dict(torchvision="1", timm="1")
    monkeypatch.setattr(bench, "util", SimpleNamespace(find_spec=installed.get))
    monkeypatch.setattr(bench, "metadata", SimpleNamespace(version=installed.get))
    empty = dict(rows=[], notes=[], attention=None, matmul_flops=1.0, copy_bytes=1.0)
    monkeypatch.setattr(bench, "run_table", run_table := Mock(return_value=empty))

    def settings(flags=""):
        """-> the tables and contestants that the command would time, and how."""
        run_table.reset_mock()
        ok(run_cli(bench.main, "--device cpu", flags))
        tables, (names, *_), (setup, *_) = zip(*(call.args for call in run_table.call_args_list))
        return SimpleNamespace(tables=[*tables], names=names, **vars(setup))

    default, quick = settings(), settings("--quick")
    assert default.names == ["default", "gap", "lape", "pvg", "mpvg", "mpvg-folded", "torchvision", "timm", "timm gap"]
    assert (default.batch, default.sizes) == (16, sizes("deit-tiny", attn_drop=0.0, drop_path=0.0))
    assert (default.tables, default.rounds, quick.tables) == ([*bench.TABLES], 20, [*bench.TABLES[:3]])
    assert (quick.names, quick.batch, quick.sizes["depth"]) == (["default", "gap", "mpvg", "torchvision"], 128, 4)
    other = settings("--quick --model vit-lite --methods mpvg --peers 'timm, torchvision' --batch 3 --dtype bf16 "
                     "--tables 'training-eager, inference-eager' --mode max-autotune-no-cudagraphs --rounds 7")
    assert other.tables == ["training-eager", "inference-eager"] and other.names == ["mpvg", "timm gap"]
    assert other.sizes == sizes("vit-lite", attn_drop=0.0, drop_path=0.0)
    assert (other.batch, other.dtype, other.mode, other.rounds) == (3, torch.bfloat16, "max-autotune-no-cudagraphs", 7)
    assert settings("--methods all --peers none").names == [*METHODS, *(f"{name}-folded" for name in METHODS)]
    for name, value in dict(choose_device=torch.device("cuda"), environment={}, default_precision="bf16").items():
        monkeypatch.setattr(bench, name, Mock(return_value=value))
    assert (settings().batch, settings().dtype) == (256, torch.bfloat16)


def test_bench_from_end_to_end(monkeypatch, quick, tmp_path, capfd):
    """One peer is not installed, one fails. JSON holds what is printed. Turns are in random order."""
    turns, timing = [], bench.Contestant.time

    def time_(one, device):
        turns.append(one.name)
        again = one.name in ("copy", "matmul") and turns.count(one.name) > 1  # large, so they take seconds
        return 0.1 if again else timing(one, device)

    monkeypatch.setattr(bench.Contestant, "time", time_)
    monkeypatch.setitem(sys.modules, "timm", None)  # as if it were not installed
    monkeypatch.setattr("torchvision.models.VisionTransformer", Mock(side_effect=RuntimeError("no such model\netc.")))
    names = ["default", "gap", "mpvg", "mpvg-folded"]
    assert bench.build("mpvg-folded", SMALL)[0].last_pe is None  # it is folded
    done = ok(small_run("--peers timm,torchvision --tables training-eager,inference-compiled",
                        f"--methods {','.join(names)} --mode max-autotune-no-cudagraphs --dtype bf16",
                        "--json", tmp_path / "new" / "x.json"))
    assert {options["mode"] for options in quick} == {"max-autotune-no-cudagraphs"}
    saved = read_json(tmp_path / "new" / "x.json")
    header, *tables, verdict = done.out.rstrip("\n").split("\n\n")
    assert header.replace("\n", " ") == ", ".join(f"{key} {value}" for key, value in saved["header"].items())
    assert saved["header"]["timm"] == "not installed" != saved["header"]["torchvision"]
    assert tables == [bench.as_text(*item) for item in saved["tables"].items()]
    assert verdict.replace("\n", " ") == saved["verdict"] and saved["verdict"].startswith("mpvg's speed relative to ")
    assert max(map(len, done.out.splitlines())) <= 100 and "USDT" not in capfd.readouterr().err  # torch's profiler
    for name, table in saved["tables"].items():
        training = name == "training-eager"  # folded models do not train
        assert [row["name"] for row in table["rows"]] == (names[:3] if training else names)
        assert table["notes"] == ["torchvision failed: no such model (left out)"]
        assert len(table["matmul_seconds"]) == len(table["copy_seconds"]) == 6
        assert (table["matmul_flops"], table["copy_bytes"]) == (2 * 2048 ** 3 / 0.1, 2 * 2 * 2 ** 26 / 0.1)
        for row in table["rows"]:
            assert len(row["seconds"]) == 6 and min(row["seconds"]) > 0 and row["memory_bytes"] > 2 * 10_000
            assert 0 < row["share_of_peak"] <= row["share_of_roofline"]
            assert (row["compile_seconds"] is None) == training
        assert "attention" in table["attention"]
        gap = table["rows"][1]
        assert (4 * gap["flops_per_image"], gap["bytes_per_step"]) == bench.count_work(
            sizes("vit-nano"), "gap", training, batch=4, itemsize=2)
    rounds = np.array(turns[-6 * 7:]).reshape(6, 7).tolist()  # of the last table
    for copy, matmul, unrecorded, *order in rounds:
        assert [copy, matmul, unrecorded, *sorted(order)] == ["copy", "matmul", order[-1], *names]
    assert len({*map(tuple, rounds)}) > 1


# ------------------------------------------------------------------------------------------------- README, results

README, GUIDE = ((ROOT / name).read_text() for name in ("README.md", "results/guide.md"))


def code(text, words, language="python"):
    """-> a document's one block of code that has these words."""
    block, = (block for block in re.findall(rf"```{language}\n(.*?)```", text, re.S) if words in block)
    return block


def execute(source):
    """-> the names that a program defines, as attributes."""
    exec(source, names := {})
    return SimpleNamespace(**names)


def test_the_readmes_method_is_the_model():
    shown = execute(code(README, "def mpvg("))
    model = tiny("mpvg")
    p = model.patch_embed(images()).flatten(2).transpose(1, 2)
    norms = [block.pe_norm for block in model.blocks[1:]]
    logits = shown.mpvg(p, model.pos_embed, model.blocks, norms, model.norm, model.pe_norm, model.head)
    assert torch.equal(logits, model(images()))


PLAIN = """
class Block(mpvg.Block):
    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))
class Plain(nn.Module):
    def __init__(self, dim, depth, heads):
        super().__init__()
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(3, dim, 4, 4)))
        self.pos_embed = nn.Parameter(torch.zeros(1, 6, dim))
        self.blocks = nn.ModuleList(Block(dim, heads, 2, True, 1e-5, 0.0, 0.0, False, False) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 5)
    def forward(self, images):
        x = self.patch_embed(images).flatten(2).transpose(1, 2) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(dim=1))
"""


def patched(text, diff):
    for part in diff.split("\n\n"):
        lines = [line for line in part.splitlines() if not line.startswith(" #")]
        old, new = ("\n".join(line[1:] for line in lines if line[0] in kept) for kept in (" -", " +"))
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def test_the_readmes_diff_turns_a_plain_vit_into_mpvg():
    text = patched(PLAIN, code(README, "# class Block", "diff"))
    for source, method in ((PLAIN, "gap"), (text, "mpvg")):
        exec(source, shown := vars(mpvg) | dict(mpvg=mpvg))
        model, mine = tiny(method, norm_eps=1e-5), shown["Plain"](16, 3, 2).double()
        for name, parameter in mine.named_parameters():
            name = re.sub(r"^pe_norms.(\d)", lambda found: f"blocks.{int(found[1]) + 1}.pe_norm", name)
            parameter.data = model.state_dict()[name.replace("last_pe_norm", "pe_norm")]
        assert sum(1 for _ in mine.parameters()) == len(model.state_dict())
        assert_same(mine(images()), model(images()))


def test_the_guides_diff_adds_a_method():
    exec(patched((ROOT / "mpvg.py").read_text(), code(GUIDE, "# METHODS", "diff")), own := dict(__name__="own"))
    plain, again = (own["create"]("vit-nano", name).eval() for name in ("mpvg", "mpvg-again"))
    again.load_state_dict(plain.state_dict())
    x, pos_0 = torch.randn(2, 3, 32, 32), plain.pos_embed
    e_1, e_2 = again.delivered_pe()[1:3]
    assert_same(e_1, plain.delivered_pe()[1])
    assert_same(e_2, again.blocks[2].pe_norm(e_1 + pos_0))
    assert_close(own["fold"](again)(x), again(x))


def test_the_python_of_readme_and_guide_runs(trained, tmp_path, monkeypatch, capsys):
    shown = execute(code(README, "from mpvg import create, fold"))
    assert shown.logits.shape == (2, 1000) and shown.tokens.shape == (2, 196, 192)
    assert_close(shown.exported.module()(shown.images), shown.logits)
    lines = re.findall(r"^    ((?:import|from|model =|logits = model).*)", mpvg.__doc__, re.M)
    assert len(lines) == 4 and execute("\n".join(lines)).logits.shape == (8, 100)
    monkeypatch.chdir(tmp_path)
    execute(code(GUIDE, '"pretrained.pth"'))
    assert capsys.readouterr().out == "tensor(0., grad_fn=<MaxBackward1>)\n"
    shutil.copytree(trained[0], tmp_path / "runs" / MPVG)
    shown = execute(code(GUIDE, "torch.load("))
    assert torch.equal(shown.model.head.weight, load(trained[0])["model"]["head.weight"])
    assert shown.predicted.shape == shown.labels.shape


def test_timm_subclass_equals_mpvg():
    pytest.importorskip("timm", exc_type=ImportError)
    shown = execute(code(GUIDE, "(VisionTransformer)"))
    assert shown.logits.shape == (2, 1000)
    theirs = randomise(shown.MPVG(img_size=32, embed_dim=192, depth=3, num_heads=3))
    ours, x = create("deit-tiny", "mpvg", image_size=32, depth=3).double().eval(), images(2, (32, 32))
    load_weights(ours, theirs.state_dict())
    assert_same(theirs(x), ours(x))


def test_detection_trains_the_position_embedding():
    shown = execute(code(GUIDE, "MaskRCNN"))
    vit, x = shown.vit, torch.randn(1, 3, 64, 64)
    assert len(shown.losses) == 5
    assert vit.pos_embed.grad.norm() > 0 and vit.blocks[1].pe_norm.weight.grad.norm() > 0
    assert shown.detector.eval()([torch.rand(3, 40, 70)])[0]["masks"].shape[2:] == (40, 70)
    last = vit.eval().forward_features(x) - fold(vit).forward_features(x)  # each place has its own row
    assert_close(last, vit.pe_norm(vit.pos_embed), rtol=0, atol=1e-4)


def test_segmentation_learns_the_ink():
    shown = execute(code(GUIDE, "pixel_shuffle").replace("range(200)", "range(60)"))
    assert shown.iou > 0.45 > 2 * shown.ink.float().mean()  # everything ink: 0.15


def test_swin_is_torchvisions_with_a_pe_in_each_stage():
    shown, x = execute(code(GUIDE, "SwinMPVG")), images(2, (64, 64))
    model, plain = randomise(shown.model), torchvision.models.swin_t(num_classes=10).double().eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    for i, e in enumerate(model.pos_embed):
        plain.features[2 * i].register_forward_hook(lambda _, __, y, e=e: y + e)
        for block, own in zip(plain.features[2 * i + 1], model.features[2 * i + 1]):
            e = own.pe_norm(e)
            block.norm1.register_forward_hook(lambda _, __, y, e=e: y + e)
    plain.norm.register_forward_hook(lambda _, __, y: y + model.pe_norm(model.pos_embed[3]))
    assert_same(model(x), plain(x))
    model(x).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())
    larger = shown.SwinMPVG(image_size=224, num_classes=10, **shown.swin_t)
    own, small, large = map(parameter_count, (plain, model, larger))
    assert f"{small - own:,} in all for 64-pixel images, {large - own:,} for 224" in GUIDE


def commands(text):
    """-> program, train or bench, and arguments of each command, after a ` or at the start of a line."""
    found = re.findall(r"(?:^ *|`)(?:python|torchrun) (?:[^`\n]* )?(train|bench)\.py([^`#\n]*)",
                       text.replace("\\\n", " "), re.M)
    return [(program, *arguments.split()) for program, arguments in found]


def test_the_commands_of_the_texts_are_accepted(files, tmp_path, monkeypatch):
    """Those of README, guide, train.py and bench.py, up to where the work begins."""
    monkeypatch.chdir(tmp_path)
    begin = Mock(side_effect=SystemExit)
    for module, name in ((train, "train_run"), (train, "load_checkpoint"), (train, "read_run"), (bench, "run_table"),
                         (train.subprocess, "run")):
        monkeypatch.setattr(module, name, begin)
    monkeypatch.setattr(bench, "environment", lambda device: {})  # it asks git
    given = [commands(text) for text in (README, GUIDE, train.__doc__, bench.__doc__)]
    for program, *arguments in chain(*given):
        begin.reset_mock()
        ok(run_cli(dict(train=train, bench=bench)[program].main,
                   *[files if word in ("DIR", "digits") else word for word in arguments]))
        assert begin.called, arguments
    assert sum(map(len, given)) > 40 and min(map(len, given)) > 2


def test_links_lead_to_files_and_headings_and_code_blocks_begin_a_line():
    texts = {path: re.sub("```.*?```", "", path.read_text(), flags=re.S)  # in code, # begins a comment
             for path in (ROOT / "README.md", *ROOT.glob("results/*.md"))}
    for document, text in texts.items():
        assert "```" not in text and not re.search("[^\\s>].*```", document.read_text()), document
        for name, anchor in re.findall(r"\]\(([^)#:]*)#?([^):]*)\)", text):
            path = Path(os.path.normpath(document.parent / name)) if name else document
            headings = re.findall("^#+ (.*)", texts.get(path, ""), re.M)
            anchors = [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings]
            assert path.exists() and (not anchor or anchor in anchors), (document, name, anchor)


def test_the_digits_are_a_folder_to_train_on(cli, tmp_path, monkeypatch):
    """The guide's code, for a tenth of its images, and its command, for one epoch."""
    here = train.environment(CPU)
    monkeypatch.chdir(tmp_path)
    assert train.environment(CPU) == here  # git describes the program's folder
    monkeypatch.setattr(train, "numbers", lambda count, seed: make_numbers(count // 10, seed))
    execute(code(GUIDE, 'Path("digits"'))
    assert Image.open(next(Path("digits/train").rglob("*.JPEG"))).size == (64, 48)
    flags, = (flags for _, *flags in commands(GUIDE) if "digits" in flags)
    ok(cli(*flags, "--epochs 1"))


def test_names_and_numbers_of_the_texts():
    for name in re.findall(r"`((?:ViT|Block|Attention)\.\w+)`", README):
        assert callable(reduce(getattr, name.split("."), mpvg))
    assert f"version = {{{mpvg.__version__}}}" in README
    methods = {row[0].strip("`"): row for row in rows_of(README) if len(row) == 6 and row[0].strip("`") in METHODS}
    for name, row in methods.items():
        config = configure("--device cpu", row[1].strip("`"))
        assert (config["method"], config["overrides"]) == (name, {})
        assert row[5] == f"{train.PAPER['deit-tiny, imagenet, 300 epochs'][name]:.2f}"
    assert len(methods) == 7
    tables = read_json(ROOT / "results/bench/deit-tiny-cpu.json")["tables"]
    shown = {row[0]: row[1:] for row in rows_of(README.partition("## Speed")[2])[1:]}
    measured = {name: [f"{row['speed_to_plain'][0]:.3f}" for table in tables.values() for row in table["rows"]
                       if row["name"] == name] for name in shown}
    measured["mpvg-folded"] += ["", ""]  # it does not train
    assert len(shown) == 10 and shown == measured
    assert configure("--device cpu").items() <= read_json(ROOT / f"results/numbers/{MPVG}/config.json").items()
    last = [log_of(ROOT / f"results/numbers/mpvg-vit-nano-numbers-seed{seed}")[-1] for seed in range(3)]
    reached = "{:.2f}, {:.2f} and {:.2f}".format(*(line["test_accuracy"] for line in last))
    assert f"seeds 0 to 2 reached {reached} % test accuracy" in " ".join(README.split())
    notes = [row[1:] for row in rows_of((ROOT / "results/bench-notes.md").read_text())]
    for path in ROOT.glob("results/bench/*.json"):
        tables = read_json(path)["tables"]
        assert all(bench.as_text(*item) in path.with_suffix(".txt").read_text() for item in tables.items()), path
        assert ["{:.3f} ({:.3f}-{:.3f})".format(*row["speed_to_plain"]) for table in tables.values()
                for row in table["rows"] if row["name"] == "mpvg"] in notes, path
    for model in ("deit", "vit", ""):  # over the rounds of several runs
        pooled = []
        for kind in ("inference", "training"):
            tables = [table["rows"] for path in sorted(ROOT.glob(f"results/bench/{model}*.json"))
                      for name, table in read_json(path)["tables"].items() if name.startswith(kind)]
            mpvg_, gap = (timed(name, [second for rows in tables for row in rows if row["name"] == name
                                       for second in row["seconds"]]) for name in ("mpvg", "gap"))
            pooled.append("{:.3f} ({:.3f}-{:.3f})".format(*bench.speed(mpvg_, gap)))
        assert [str(len(gap.seconds)), *pooled] in notes, model
        if not model:
            shown = "MPVG's median is {} at inference and {} in training".format(*pooled).replace("-", " to ")
            assert shown in " ".join(README.split())


def test_the_tables_of_runs_are_what_report_prints(tmp_path):
    def printed(name):
        folders = sorted(path.parent for path in (ROOT / "results" / name).glob("*/config.json"))
        return report(tmp_path, *folders, draw=name == "cifar100").out

    text, results = printed("cifar100"), (ROOT / "results/cifar100.md").read_text()
    assert "\n".join(text.splitlines()[:-1]).strip() in results  # the last line is about figures
    for document, title, source in (
            (README, "## Evidence", text), (GUIDE, "## Exercises", printed("numbers")),
            (results, "### Transfer", printed("cifar100-transfer"))):
        shown = rows_of(document.partition(title)[2].partition("\n## ")[0])
        assert shown and all(row in rows_of(source) for row in shown)
