"""The specification of mpvg.py, train.py and bench.py: `python -m pytest`. Nothing here asserts a timing."""
import argparse
import inspect
import itertools
import json
import math
import multiprocessing
import os
import pickle
import platform
import re
import resource
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
import typer
from PIL import Image, ImageEnhance, ImageOps
from torch._dynamo.exc import TorchDynamoException
from typer.testing import CliRunner

import bench
import mpvg
import train
from mpvg import METHODS, MODELS, ViT, create, fold, load_weights, resize_pos_embed

torch.set_num_threads(1)  # these models are too small to share
TINY = dict(image_size=(8, 12), patch_size=4, num_classes=5, dim=16, depth=3, heads=2, mlp_ratio=2.0)


def tiny(method="mpvg", seed=0, **overrides):
    """A float64 model whose every parameter is random, so that no term can hide behind a 0 or a 1."""
    torch.manual_seed(seed)
    model = ViT(**{**TINY, **METHODS.get(method, {}), **overrides}).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def images(batch=4, size=(8, 12), seed=1, dtype=torch.float64):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ----------------------------------------------------------------------------------------- the equations, written out

def layer_norm(x, p, name, eps=1e-6):
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    return (x - mean) / (variance + eps).sqrt() * p[name + ".weight"] + p[name + ".bias"]


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


def equations(p, img, *, pe, pool, last_pe=None, layer0=False, hierarchical=True, add_input=True, block="prenorm",
              patch=4, depth=3, heads=2, **_):
    """PAPER.md's table and toggles, read off line by line. -> (tokens after the last norm and its PE, logits)."""
    pieces = img.unfold(2, patch, patch).unfold(3, patch, patch).permute(0, 2, 3, 1, 4, 5)   # (B, h, w, C, p, p)
    x = pieces.flatten(3).flatten(1, 2) @ p["patch_embed.proj.weight"].flatten(1).T + p["patch_embed.proj.bias"]
    if pool == "cls":
        x = torch.cat([p["cls_token"].expand(len(x), 1, -1), x], dim=1)
    pos_0 = p.get("pos_embed")
    if pe == "absolute" or (pe == "layerwise" and add_input):
        x = x + pos_0
    e = {}
    for i in range(depth):
        attention_input = layer_norm(x, p, f"blocks.{i}.norm1")
        if pe == "layerwise" and (i >= 1 or layer0):
            source = e[i - 1] if hierarchical and i - 1 in e else pos_0
            e[i] = layer_norm(source, p, f"blocks.{i}.pe_norm")
            attention_input = attention_input + e[i]
        x = x + msa(attention_input, p, f"blocks.{i}.attn", heads)
        if block == "renorm":
            x = layer_norm(x, p, f"blocks.{i}.norm2")
            x = x + mlp(x, p, f"blocks.{i}.mlp")
        else:
            x = x + mlp(layer_norm(x, p, f"blocks.{i}.norm2"), p, f"blocks.{i}.mlp")
    y = layer_norm(x, p, "norm")
    if last_pe == "shift":
        y = y + p["last_shift"]
    elif last_pe == "free":
        y = y + layer_norm(p["last_pos_embed"], p, "pe_norm")
    elif last_pe is not None:
        y = y + layer_norm(pos_0 if last_pe == 0 else e[last_pe], p, "pe_norm")
    z = y[:, 0] if pool == "cls" else y.mean(1)
    return y, z @ p["head.weight"].T + p["head.bias"]


def every_toggle():
    yield from METHODS.values()
    for layer0, hierarchical, add_input, last_pe in itertools.product(
            (False, True), (False, True), (False, True), (None, 0, 1, 2, "shift", "free")):
        structure = dict(pe="layerwise", layer0=layer0, hierarchical=hierarchical, add_input=add_input)
        yield dict(structure, pool="gap", last_pe=last_pe)
        if last_pe is None:
            yield dict(structure, pool="cls")
    for pool, pe in itertools.product(("cls", "gap"), ("absolute", "none")):
        yield dict(pe=pe, pool=pool)
    for last_pe in ("shift", "free"):
        yield dict(pe="none", pool="gap", last_pe=last_pe)
        yield dict(pe="absolute", pool="gap", last_pe=last_pe)


@pytest.mark.parametrize("extra", [dict(), dict(block="renorm", qkv_bias=False), dict(pe_init="sincos")], ids=str)
def test_every_method_and_toggle_equals_the_equations(extra):
    x = images()
    for toggles in every_toggle():
        model = tiny(None, **toggles, **extra)
        y, logits = equations(model.state_dict(), x, **toggles, **extra)
        torch.testing.assert_close(model.forward_features(x), y, rtol=1e-10, atol=1e-10, msg=str(toggles))
        torch.testing.assert_close(model(x), logits, rtol=1e-10, atol=1e-10, msg=str(toggles))


def test_toggles_are_different_models():
    """Same weights wherever the names agree, other logits for every row and toggle: none of them is without effect."""
    seen = {}
    for toggles in every_toggle():
        torch.manual_seed(0)
        model = ViT(**TINY, **toggles).double().eval()
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(sum(map(ord, name)))
            values = torch.randn(100, 16, dtype=torch.float64, generator=generator)  # cut: shared by both pool kinds
            with torch.no_grad():
                parameter.copy_(values.flatten()[:parameter.numel()].view_as(parameter)
                                if parameter.numel() <= 1600 else parameter)
        full = tuple(sorted({"last_pe": None, "layer0": False, "hierarchical": True, "add_input": True,
                             **toggles}.items(), key=str))
        seen[full] = tuple(round(v, 9) for v in model(images(1)).flatten().tolist())
    assert len(set(seen.values())) == len(seen)


def test_delivered_pe():
    per_block, last = tiny("mpvg").delivered_pe()
    assert [None if e is None else tuple(e.shape) for e in per_block] == [None, (1, 6, 16), (1, 6, 16)]
    assert last.shape == (1, 6, 16)
    per_block, last = tiny("lape").delivered_pe()
    assert [tuple(e.shape) for e in per_block] == [(1, 7, 16)] * 3 and last is None
    assert tiny("default").delivered_pe() == ([None] * 3, None)
    model = tiny("mpvg", hierarchical=False)
    p = model.state_dict()
    torch.testing.assert_close(model.delivered_pe()[0][2], layer_norm(p["pos_embed"], p, "blocks.2.pe_norm"))


def test_sincos_is_a_fixed_2d_table():
    model = ViT(**{**TINY, "pool": "cls", "pe_init": "sincos"})
    assert "pos_embed" in model.state_dict() and "pos_embed" not in dict(model.named_parameters())
    assert model.pos_embed.shape == (1, 7, 16) and not model.pos_embed[0, 0].any()
    for i, (y, x) in enumerate(itertools.product(range(2), range(3))):
        row = [f(p / 10000 ** (k / 4)) for p in (y, x) for f in (math.sin, math.cos) for k in range(4)]
        torch.testing.assert_close(model.pos_embed[0, 1 + i], torch.tensor(row), rtol=1e-5, atol=1e-6)


# --------------------------------------------------------------------------------------------------- parameter counts

COUNTS = {  # PAPER.md: by the formula, for default, lape, pvg, mpvg
    "deit-tiny": (5_717_416, 5_722_024, 5_721_256, 5_721_640),
    "deit-small": (22_050_664, 22_059_880, 22_058_344, 22_059_112),
    "deit-base": (86_567_656, 86_586_088, 86_583_016, 86_584_552),
    "vit-lite": (3_740_004, 3_743_588, 3_742_564, 3_743_076),
}


def count(model, method):
    with torch.device("meta"):
        return sum(p.numel() for p in create(model, method).parameters())


def test_parameter_counts_of_all_presets_and_methods():
    for model, expected in COUNTS.items():
        assert tuple(count(model, m) for m in mpvg.PAPER_METHODS) == expected
        for method, mine, published in zip(mpvg.PAPER_METHODS, expected, mpvg.PAPER_PARAMETERS[model]):
            misprint = {("deit-tiny", "lape"): -1, ("vit-lite", "lape"): 1}.get((model, method), 0)
            assert round(published * 1000) == mine // 1000 + misprint
    for name, c in MODELS.items():  # the other rows follow: a table row and a PE norm cost D and 2D
        D, N = c["dim"], (c.get("image_size", 224) // c.get("patch_size", 16)) ** 2
        gap, pvg = count(name, "default") - 2 * D, count(name, "pvg")
        assert count(name, "gap") == gap and pvg == gap + (c.get("depth", 12) - 1) * 2 * D
        assert count(name, "lape-gap") == gap + c.get("depth", 12) * 2 * D
        assert count(name, "gap-last-pe") == gap + 2 * D
        assert count(name, "mpvg") == pvg + 2 * D
        assert count(name, "mpvg-shift") == pvg + D
        assert count(name, "mpvg-free") == pvg + 2 * D + N * D


def test_methods_are_the_papers():
    """Every toggle of every row, unspoken ones included: pe, pool, last_pe, layer0, hierarchical, add_input."""
    rows = {
        "default": ("absolute", "cls", None, False, True, True),
        "gap": ("absolute", "gap", None, False, True, True),
        "lape": ("layerwise", "cls", None, True, True, False),
        "lape-gap": ("layerwise", "gap", None, True, True, False),
        "pvg": ("layerwise", "gap", None, False, True, True),
        "mpvg": ("layerwise", "gap", 0, False, True, True),
        "gap-last-pe": ("absolute", "gap", 0, False, True, True),
        "mpvg-shift": ("layerwise", "gap", "shift", False, True, True),
        "mpvg-free": ("layerwise", "gap", "free", False, True, True),
    }
    default = {name: p.default for name, p in inspect.signature(ViT).parameters.items()}
    toggles = ("pe", "pool", "last_pe", "layer0", "hierarchical", "add_input")
    assert {m: tuple({**default, **row}[t] for t in toggles) for m, row in METHODS.items()} == rows


def test_presets_are_the_recipes():
    deit = dict(image_size=224, patch_size=16, in_channels=3, num_classes=1000, depth=12, mlp_ratio=4, qkv_bias=True,
                norm_eps=1e-6, attn_drop=0, drop_path=0.1, block="prenorm", init="deit", pe_init="learned", pe_std=0.02)
    small = dict(deit, image_size=32, num_classes=100, mlp_ratio=2)
    presets = {
        "deit-tiny": dict(deit, dim=192, heads=3), "deit-small": dict(deit, dim=384, heads=6),
        "deit-base": dict(deit, dim=768, heads=12),
        "vit-nano": dict(small, patch_size=8, dim=128, depth=4, heads=4, drop_path=0),
        "vit-lite": dict(small, patch_size=4, dim=256, depth=7, heads=4, qkv_bias=False, norm_eps=1e-5, attn_drop=0.1,
                         block="renorm", init="vit-lite", pe_std=0.2),
    }
    default = {name: inspect.signature(ViT).parameters[name].default for name in (*deit, "dim", "heads")}
    assert {name: {**default, **row} for name, row in MODELS.items()} == presets


def test_python_mpvg_prints_methods_and_counts(capsys):
    mpvg.main()
    out = capsys.readouterr().out
    assert all(re.search(rf"^{name} ", out, re.M) for name in (*METHODS, *MODELS))
    assert "5,721,640 (5.721)" in out and "3,743,076 (3.743)" in out


# ------------------------------------------------------------------------------------------- other people's models

def test_equals_torchvision():
    theirs = torchvision.models.VisionTransformer(image_size=32, patch_size=8, num_layers=3, num_heads=4, hidden_dim=32,
                                                  mlp_dim=64, num_classes=7).double().eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    names = {"class_token": "cls_token", "encoder.pos_embedding": "pos_embed", "conv_proj": "patch_embed.proj",
             "encoder.layers.encoder_layer_": "blocks.", "ln_1": "norm1", "ln_2": "norm2", "encoder.ln": "norm",
             "self_attention.in_proj_": "attn.qkv.", "self_attention.out_proj": "attn.proj",
             "mlp.0": "mlp.fc1", "mlp.3": "mlp.fc2", "heads.head": "head"}
    state = {}
    for key, value in theirs.state_dict().items():
        for theirs_name, mine in names.items():
            key = key.replace(theirs_name, mine)
        state[key] = value
    model = create("vit-nano", "default", image_size=32, patch_size=8, dim=32, depth=3, heads=4, num_classes=7).double()
    model.load_state_dict(state, strict=True)
    x = images(2, (32, 32))
    torch.testing.assert_close(model.eval()(x), theirs(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", ["default", "gap"])
def test_equals_timm(method):
    timm = pytest.importorskip("timm")
    pooling = dict(class_token=False, global_pool="avg", fc_norm=False) if method == "gap" else {}
    theirs = timm.models.VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=4, mlp_ratio=2,
                                           num_classes=7, **pooling).double().eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model = create("vit-nano", method, dim=32, depth=3, heads=4, num_classes=7).double().eval()
    model.load_state_dict(theirs.state_dict(), strict=True)
    x = images(2, (32, 32))
    torch.testing.assert_close(model(x), theirs(x), rtol=1e-10, atol=1e-10)


# ------------------------------------------------------------------------------------- three facts, and permutations

@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_fact_1_every_pe_term_can_be_stored(dtype, tolerance):
    for toggles in every_toggle():
        model = tiny(None, **toggles).to(dtype)
        folded, x = fold(model), images(dtype=dtype)
        difference = (folded(x) - model(x)).abs().max() / model(x).abs().max()
        assert difference <= tolerance, toggles
        assert not any("pe_norm" in name for name, _ in folded.named_parameters())
        norms = sum(isinstance(m, torch.nn.LayerNorm) for m in folded.modules())
        assert norms == 2 * 3 + 1
        with pytest.raises(RuntimeError, match="inference only"):
            folded.train()
        assert not folded.eval().training
        with pytest.raises(ValueError, match="eval"):
            fold(model.train())
        model.eval().blocks[1].train()
        with pytest.raises(ValueError, match="eval"):
            fold(model)


def test_fold_leaves_the_model_alone():
    model = tiny("mpvg")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fold(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.pe_norm is not None and all(p.requires_grad for p in model.parameters())
    assert not any(p.requires_grad for p in fold(model).parameters())
    assert fold(tiny("lape")).pos_embed is None                                 # LaPE's tokens never see the table
    torch.testing.assert_close(fold(fold(model))(images()), model(images()))


def test_fact_2_the_last_pe_is_a_bias_of_the_head():
    model, plain = tiny("mpvg"), tiny("pvg", seed=1)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("pe_norm")})
    p, x = model.state_dict(), images()
    constant = p["head.weight"] @ layer_norm(p["pos_embed"], p, "pe_norm").mean(dim=(0, 1))
    torch.testing.assert_close(model(x), plain(x) + constant, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method, twin", [("mpvg", "pe_norm.bias"), ("mpvg-free", "pe_norm.bias"),
                                          ("mpvg-shift", "last_shift")])
def test_fact_3_the_two_offsets_learn_the_same(method, twin):
    torch.manual_seed(0)
    model = ViT(**TINY, **METHODS[method]).double()
    optimizer = torch.optim.AdamW(train.parameter_groups(model, 0.05, decay_pe=False), lr=1e-2)
    for step in range(30):
        F.cross_entropy(model(images(8, seed=step)), torch.arange(8) % 5).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model.norm.bias.abs().mean() > 0.01
    torch.testing.assert_close(model.norm.bias, dict(model.named_parameters())[twin], rtol=0, atol=1e-12)


def test_without_pe_patches_may_be_shuffled():
    x = images(2)
    patches = x.unfold(2, 4, 4).unfold(3, 4, 4).reshape(2, 3, 6, 4, 4)[:, :, [3, 5, 0, 4, 1, 2]]
    shuffled = patches.view(2, 3, 2, 3, 4, 4).transpose(3, 4).reshape(2, 3, 8, 12)
    blind = tiny(None, pe="none", pool="gap")
    torch.testing.assert_close(blind(shuffled), blind(x), rtol=1e-10, atol=1e-10)
    for method in METHODS:
        model = tiny(method)
        assert (model(shuffled) - model(x)).abs().max() > 1e-3, method


# ------------------------------------------------------------------------------- training, compile, export, the rest

@pytest.mark.parametrize("block", ["prenorm", "renorm"])
def test_every_parameter_gets_a_gradient(block):
    for toggles in every_toggle():
        torch.manual_seed(0)
        model = ViT(**TINY, **toggles, block=block)
        F.cross_entropy(model(images(dtype=torch.float32)), torch.arange(4)).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, (toggles, name)


@pytest.mark.parametrize("method", METHODS)
def test_compiled_equals_eager(method):
    """Strictly: a graph break or a recompilation is an error. Inductor for mpvg, the graph alone for the others."""
    torch._dynamo.reset()
    model = tiny(method).float().train()
    backend = "inductor" if method == "mpvg" else "aot_eager"
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=backend)
    x, y = images(dtype=torch.float32), torch.arange(4)
    grads = []
    with torch._dynamo.config.patch(error_on_recompile=True):
        for net in (model, compiled, compiled):
            model.zero_grad()
            loss = F.cross_entropy(net(x), y)
            loss.backward()
            grads.append([loss.detach()] + [p.grad.clone() for p in model.parameters()])
    for a, b, c in zip(*grads):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(c, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_export(method):
    model, x = tiny(method), images(2)
    for net in (model, fold(model)):
        batch = torch.export.Dim("batch", min=1, max=64)
        exported = torch.export.export(net, (x,), dynamic_shapes=({0: batch},), strict=True).module()
        torch.testing.assert_close(exported(images(5)), net(images(5)), rtol=1e-10, atol=1e-10)


def test_drop_path_is_per_sample_and_keeps_the_mean():
    torch.manual_seed(0)
    x = torch.ones(4000, 3, 2)
    y = mpvg.drop_path(x, 0.25, training=True)
    assert y.unique().tolist() == pytest.approx([0, 4 / 3])
    assert (y == y[:, :1, :1]).all() and abs(y.mean() - 1) < 0.05
    assert mpvg.drop_path(x, 0.25, training=False) is x and mpvg.drop_path(x, 0.0, training=True) is x
    model = ViT(**TINY, drop_path=0.3)
    assert [b.drop_path for b in model.blocks] == pytest.approx([0, 0.15, 0.3])


@pytest.mark.parametrize("silent", ["attn.proj", "mlp.fc2"])
def test_drop_path_drops_either_branch(silent):
    """With one branch zeroed and the other (all but) always dropped, a block in training is the identity."""
    block, x = tiny("mpvg", drop_path=0.9999).blocks[2], torch.randn(5, 6, 16, dtype=torch.float64)
    torch.nn.init.zeros_(block.get_submodule(silent).weight), torch.nn.init.zeros_(block.get_submodule(silent).bias)
    assert (block(x) - x).abs().max() > 0.1
    torch.manual_seed(0)
    assert torch.equal(block.train()(x), x)


@pytest.mark.parametrize("noise", [dict(attn_drop=0.5), dict(drop_path=0.5)], ids=str)
def test_dropout_acts_in_training_only(noise):
    model, x = tiny("mpvg", **noise), images()
    assert torch.equal(model(x), model(x))
    assert torch.equal(model(x), tiny("mpvg")(x))
    model.train()
    assert not torch.equal(model(x), model(x))


def test_initialisation():
    torch.manual_seed(0)
    lite = create("vit-lite", "default").requires_grad_(False)
    deit = create("deit-tiny", "mpvg-free", depth=2, pe_std=0.3).requires_grad_(False)
    assert not lite.cls_token.any() and create("deit-tiny", "default", depth=1).cls_token.std() > 0.01
    assert lite.pos_embed.std() == pytest.approx(0.2, rel=0.05)
    assert deit.pos_embed.std() == pytest.approx(0.3, rel=0.05)
    assert deit.last_pos_embed.std() == pytest.approx(0.3, rel=0.05)
    assert lite.patch_embed.proj.weight.std() == pytest.approx((2 / 48) ** 0.5, rel=0.05)
    assert deit.patch_embed.proj.weight.std() == pytest.approx((1 / 3 / 768) ** 0.5, rel=0.05)
    for model in (lite, deit):
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                assert parameter.std() == pytest.approx(0.02, rel=0.1), name
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
        for name in ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.3.mlp.fc2.weight", "head.weight"):
            assert torch.equal(state[name], states[0][name])
    gap = [state["pos_embed"] for method, state in zip(METHODS, states) if METHODS[method]["pool"] == "gap"]
    assert all(torch.equal(table, gap[0]) for table in gap)


def test_model_options_reach_the_model():
    model = ViT(image_size=(8, 20), patch_size=4, in_channels=2, num_classes=3, dim=8, depth=2, heads=2, mlp_ratio=3,
                qkv_bias=False, norm_eps=0.1, pool="gap", last_pe=0)
    assert model.grid == (2, 5) and model.pos_embed.shape == (1, 10, 8) and model.cls_token is None
    assert model.blocks[0].mlp.fc1.weight.shape == (24, 8) and model.blocks[0].attn.qkv.bias is None
    assert {m.eps for m in model.modules() if isinstance(m, torch.nn.LayerNorm)} == {0.1}
    assert model(torch.randn(1, 2, 8, 20)).shape == (1, 3)
    assert model.forward_features(torch.randn(1, 2, 8, 20)).shape == (1, 10, 8)
    assert create("vit-nano", "mpvg", pe_init="sincos", num_classes=7)(torch.randn(1, 3, 32, 32)).shape == (1, 7)


@pytest.mark.parametrize("options, says", [
    (dict(pool="cls", last_pe=0), "use pool='gap'"),
    (dict(pool="cls", last_pe="shift"), "use pool='gap'"),
    (dict(pool="gap", pe="none", last_pe=0), "pe='none' has none"),
    (dict(pool="gap", pe="none", last_pe=1), "pe='none' has none"),
    (dict(pool="gap", pe="absolute", last_pe=1), "use last_pe=0, or pe='layerwise'"),
    (dict(pool="gap", pe="layerwise", last_pe=3), "a block's number under 3"),
    (dict(pool="gap", pe="layerwise", last_pe=-1), "unknown last_pe -1"),
    (dict(pool="gap", pe="layerwise", last_pe=True), "unknown last_pe True"),
    (dict(pool="gap", pe="layerwise", last_pe="first"), "choose from None, 0 (the initial PE)"),
    (dict(pe="absolute", layer0=True), "use pe='layerwise'"),
    (dict(pe="none", hierarchical=False), "use pe='layerwise'"),
    (dict(pe="absolute", add_input=False), "use pe='none'"),
    (dict(image_size=30), "not divisible by patch_size 4"),
    (dict(image_size=(8, 10)), "8x10 is not divisible"),
    (dict(dim=18, heads=4), "dim 18 is not divisible by heads 4"),
    (dict(dim=6, heads=2, pe_init="sincos"), "by 4 for pe_init='sincos'"),
    (dict(depth=0), "depth=0 is not a positive"),
    (dict(patch_size=2.5), "patch_size=2.5 is not a positive"),
    (dict(image_size=32.0), "image_height=32.0 is not a positive"),
    (dict(image_size=(8, 12.0)), "image_width=12.0 is not a positive"),
    (dict(heads=True), "heads=True is not a positive"),
    (dict(image_size=(3, 8, 8)), "image_size=(3, 8, 8) is neither"),
    (dict(drop_path=1.0), "drop_path=1.0"),
    (dict(attn_drop=-0.1), "attn_drop=-0.1"),
    (dict(pe="relative"), "unknown pe 'relative': choose from absolute, layerwise, none"),
    (dict(pool="max"), "choose from cls, gap"),
    (dict(block="postnorm"), "choose from prenorm, renorm"),
    (dict(init="xavier"), "choose from deit, vit-lite"),
    (dict(pe_init="rope"), "choose from learned, sincos"),
], ids=str)
def test_impossible_combinations_say_what_to_do(options, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        ViT(**{**TINY, **options})


def test_unknown_names_and_shapes():
    with pytest.raises(ValueError, match="unknown model 'vit-huge': choose from vit-lite"):
        create("vit-huge", "mpvg")
    with pytest.raises(ValueError, match="unknown method 'rope': choose from default"):
        create("vit-nano", "rope")
    with pytest.raises(TypeError, match="dropout"):
        create("vit-nano", "mpvg", dropout=0.1)
    with pytest.raises(ValueError, match=re.escape("(4, 3, 8, 8) are not (B, 3, 8, 12)")):
        tiny()(images(size=(8, 8)))


# --------------------------------------------------------------------------------------- resizing and loading weights

def test_resize_pos_embed():
    table = torch.randn(1, 1 + 16, 6, dtype=torch.float64)
    assert resize_pos_embed(table, (4, 4), (4, 4), prefix=1) is table
    other = resize_pos_embed(table[:, 1:], (2, 8), (4, 4))
    assert other.shape == (1, 16, 6) and not torch.allclose(other, table[:, 1:])
    larger = resize_pos_embed(table, (2, 8), (5, 7), prefix=1)
    assert larger.shape == (1, 36, 6) and torch.equal(larger[:, 0], table[:, 0])

    flat = torch.ones(1, 6, 1).double() * 3
    torch.testing.assert_close(resize_pos_embed(flat, (2, 3), (7, 5)), torch.full((1, 35, 1), 3.0).double())
    swap = table[:, 1:].view(1, 2, 8, 6).transpose(1, 2).flatten(1, 2)          # axes are not mixed up
    a = resize_pos_embed(table[:, 1:], (2, 8), (3, 5)).view(1, 3, 5, 6)
    b = resize_pos_embed(swap, (8, 2), (5, 3)).view(1, 5, 3, 6)
    torch.testing.assert_close(a, b.transpose(1, 2))
    rows = torch.linspace(0, 1, 16).double().view(1, 16, 1, 1).expand(1, 16, 4, 1).flatten(1, 2)
    small = resize_pos_embed(rows, (16, 4), (8, 4)).view(8, 4)                  # a slope stays a slope, along rows only
    torch.testing.assert_close(small, small[:, :1].expand(8, 4))
    assert (small.diff(dim=0) > 0.05).all()
    image = Image.fromarray(table[0, 1:, 0].view(4, 4).float().numpy()).resize((3, 2), Image.Resampling.BICUBIC)
    mine = resize_pos_embed(table[:, 1:].float(), (4, 4), (2, 3))[0, :, 0].view(2, 3)
    torch.testing.assert_close(mine, torch.from_numpy(np.array(image)), rtol=1e-4, atol=1e-4)  # Pillow's, independent
    assert resize_pos_embed(table.bfloat16(), (4, 4), (2, 2), prefix=1).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="17 rows is not 0 [+] 4x4"):
        resize_pos_embed(table, (4, 4), (2, 2))


def test_load_weights_from_files(tmp_path):
    source, path = tiny("mpvg"), tmp_path / "model.pt"
    for contents in (source.state_dict(), {"model": source.state_dict(), "epoch": 3},
                     {"state_dict": source.state_dict()},
                     {"model": source.state_dict(), "args": argparse.Namespace(lr=0.1)}):
        torch.save(contents, path)
        target = tiny("mpvg", seed=5)
        assert load_weights(target, path) is target
        torch.testing.assert_close(target(images()), source(images()))
    with pytest.raises(FileNotFoundError):
        load_weights(source, tmp_path / "absent.pt")
    torch.save([1, 2], path)
    for wrong, kind in ((path, "list"), (None, "NoneType"), (source, "ViT")):
        with pytest.raises(ValueError, match=f"this is a {kind}$"):
            load_weights(source, wrong)
    torch.save(source.state_dict(), path)
    whole = path.read_bytes()
    for size in (0, 2000, len(whole) // 2, len(whole) - 100, *range(1, len(whole), 499)):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="model.pt cannot be loaded safely: it is damaged"):
            load_weights(source, path)


class Trap:
    def __reduce__(self):
        return print, ("code in a checkpoint ran",)


def test_load_weights_runs_no_code(tmp_path, capsys):
    torch.save({"model": Trap()}, tmp_path / "zip.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps({"model": Trap()}, protocol=2))
    for name in ("zip.pt", "raw.pt"):
        with pytest.raises(ValueError, match="cannot be loaded safely") as error:
            load_weights(tiny(), tmp_path / name)
        assert "\n" not in str(error.value)
    assert "code in a checkpoint ran" not in capsys.readouterr().out


def test_load_weights_names_every_misfit():
    model = tiny("mpvg")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = dict(before)
    del state["norm.weight"], state["pe_norm.bias"]
    state["surplus"] = torch.zeros(1)
    state["blocks.0.attn.proj.bias"] = torch.zeros(3)
    state["pos_embed"] = torch.ones_like(state["pos_embed"])
    with pytest.raises(ValueError) as error:
        load_weights(model, state)
    for part in ("missing norm.weight", "missing pe_norm.bias", "unexpected surplus",
                 "blocks.0.attn.proj.bias is (3,), the model's (16,)"):
        assert part in str(error.value)
    assert "new_head" not in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="pos_embed is.*unexpected cls_token|unexpected cls_token.*pos_embed is"):
        load_weights(tiny("gap"), tiny("default").state_dict())
    with pytest.raises(ValueError, match="unexpected dist_token") as error:     # DeiT's distilled table: 8 rows, not 7
        load_weights(tiny("default"), {**tiny("default").state_dict(), "dist_token": torch.zeros(1),
                                       "pos_embed": torch.zeros(1, 8, 16)})
    assert "pos_embed is (1, 8, 16), the model's (1, 7, 16) (old_grid" in str(error.value)


@pytest.mark.parametrize("value", [np.zeros((1, 6, 16)), 3, None, torch.zeros(1, 6, 16).to_sparse(),
                                   torch.zeros(1, 6, 16, device="meta"), torch.zeros(1, 0, 16), torch.zeros(16)],
                         ids=["array", "number", "None", "sparse", "meta", "empty", "vector"])
def test_load_weights_refuses_what_is_no_weight(value):
    model = tiny("mpvg")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="pos_embed is"):
        load_weights(model, {**tiny("mpvg", seed=3).state_dict(), "pos_embed": value})
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_load_weights_replaces_the_head_only_when_asked():
    source, target = tiny("mpvg"), tiny("mpvg", seed=5, num_classes=9)
    head = target.head.weight.clone()
    with pytest.raises(ValueError, match=r"head.weight is \(5, 16\).*new_head=True"):
        load_weights(target, source.state_dict())
    load_weights(target, source.state_dict(), new_head=True)
    assert torch.equal(target.head.weight, head) and torch.equal(target.norm.bias, source.norm.bias)
    same = load_weights(tiny("mpvg", seed=5), source.state_dict(), new_head=True)
    assert torch.equal(same.head.weight, source.head.weight)          # the same class count: nothing to replace


@pytest.mark.parametrize("method", ["default", "lape", "mpvg", "mpvg-free"])
def test_load_weights_resizes_the_pe(method):
    square, wide = tiny(method, image_size=8), tiny(method, seed=5)             # 2x2 and 2x3 patches
    load_weights(wide, square.state_dict())
    prefix = int("cls_token" in square.state_dict())
    for name in {"pos_embed", "last_pos_embed"} & square.state_dict().keys():
        expected = resize_pos_embed(square.state_dict()[name], (2, 2), (2, 3), prefix)
        assert torch.equal(wide.state_dict()[name], expected)
    larger = tiny(method, seed=6, image_size=16)                                # 2x3 -> 4x4: has to be told
    with pytest.raises(ValueError, match="old_grid"):
        load_weights(larger, wide.state_dict())
    with pytest.raises(ValueError, match="give old_grid"):
        load_weights(larger, wide.state_dict(), old_grid=(3, 3))
    load_weights(larger, wide.state_dict(), old_grid=(2, 3))
    assert torch.equal(larger.pos_embed, resize_pos_embed(wide.pos_embed, (2, 3), (4, 4), prefix))
    tall = tiny(method, seed=7, image_size=(12, 8))                             # 2x3 -> 3x2: as many rows
    load_weights(tall, wide.state_dict(), old_grid=(2, 3))
    assert torch.equal(tall.pos_embed, resize_pos_embed(wide.pos_embed, (2, 3), (3, 2), prefix))
    assert not torch.equal(tall.pos_embed, wide.pos_embed)
    long = tiny(method, seed=8, image_size=(8, 32))                             # 4x4 or its own 2x8? 16 rows both
    with pytest.raises(ValueError, match="4x4 grid or of the model's 2x8"):
        load_weights(long, larger.state_dict())
    load_weights(long, larger.state_dict(), old_grid=(4, 4))
    assert torch.equal(long.pos_embed, resize_pos_embed(larger.pos_embed, (4, 4), (2, 8), prefix))
    again = load_weights(tiny(method, seed=9, image_size=(8, 32)), long.state_dict(), old_grid=(2, 8))
    assert torch.equal(again.pos_embed, long.pos_embed)


# ------------------------------------------------------------------------------------------- train.py: augmentation

def photos(count=60):
    """uint8 images that an operation cannot treat alike: noise, slopes, flat and low-contrast ones, digits."""
    generator = torch.Generator().manual_seed(0)
    x = make_numbers(count, 3)[0]
    x[::4] = torch.randint(0, 256, x[::4].shape, generator=generator, dtype=torch.uint8)
    x[1::8] = (torch.arange(32 * 32).view(32, 32) // 4).to(torch.uint8)
    x[5], x[13] = 7, torch.randint(100, 103, (3, 32, 32), generator=generator)
    return x


def pil(x):
    return Image.fromarray(x.permute(1, 2, 0).numpy())


FILL = (129, 124, 112)


def enhanced(kind):
    return lambda image, m, s, how: kind(image).enhance(max(0.1, 1 + s * 0.09 * m))


def transformed(matrix):
    return lambda image, m, s, how: image.transform(
        image.size, Image.Transform.AFFINE, matrix(m * s), how, fillcolor=FILL)


PILLOW = {  # RECIPES of timm's rand-m9-mstd0.5-inc1, image by image
    "AutoContrast": lambda image, m, s, how: ImageOps.autocontrast(image),
    "Equalize": lambda image, m, s, how: ImageOps.equalize(image),
    "Invert": lambda image, m, s, how: ImageOps.invert(image),
    "Rotate": lambda image, m, s, how: image.rotate(30 * m / 10 * s, how, fillcolor=FILL),
    "Posterize": lambda image, m, s, how: image.point([v & -(1 << (4 + int(0.4 * m))) & 255 for v in range(256)] * 3),
    "Solarize": lambda image, m, s, how: ImageOps.solarize(image, 256 - int(25.6 * m)),
    "SolarizeAdd": lambda image, m, s, how: image.point(
        [min(255, v + int(11 * m)) if v < 128 else v for v in range(256)] * 3),
    "Color": enhanced(ImageEnhance.Color),
    "Contrast": enhanced(ImageEnhance.Contrast),
    "Brightness": enhanced(ImageEnhance.Brightness),
    "Sharpness": enhanced(ImageEnhance.Sharpness),
    "ShearX": transformed(lambda m: (1, 0.03 * m, 0, 0, 1, 0)),
    "ShearY": transformed(lambda m: (1, 0, 0, 0.03 * m, 1, 0)),
    "TranslateX": transformed(lambda m: (1, 0, 0.045 * m * 32, 0, 1, 0)),
    "TranslateY": transformed(lambda m: (1, 0, 0, 0, 1, 0.045 * m * 32)),
}


@pytest.mark.parametrize("name", train.OPERATIONS)
def test_an_operation_is_pillows(name):
    """To one of 255; where bicubic interpolation enters, on average: torch's has a = -0.75, Pillow's -1."""
    x = photos()
    generator = torch.Generator().manual_seed(1)
    m = 10 * torch.rand(len(x), generator=generator)
    m[::2] = (9 + 0.5 * torch.randn(len(m[::2]), generator=generator)).clamp(0, 10)
    m[:3] = torch.tensor([0.0, 10.0, 5.0])
    s = torch.where(torch.rand(len(x), generator=generator) < 0.5, -1.0, 1.0)
    bicubic = torch.rand(len(x), generator=generator) < 0.5
    warp = partial(train.warp, bicubic=bicubic, fill=torch.tensor(FILL, dtype=torch.float))
    before = x.clone()
    mine = train.OPERATIONS[name](x, m, s, warp)
    assert torch.equal(x, before) and mine.dtype == torch.uint8 and mine.shape == x.shape
    how = [Image.Resampling.BICUBIC if b else Image.Resampling.BILINEAR for b in bicubic]
    theirs = torch.stack([torch.from_numpy(np.array(PILLOW[name](pil(a), *b))).permute(2, 0, 1)
                          for a, b in zip(x, zip(m.tolist(), s.tolist(), how))])
    difference = (mine.int() - theirs.int()).abs().float()
    geometric = name in ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")
    assert (difference[~bicubic] if geometric else difference).max() <= 1
    assert difference.mean() < 1.2
    alone = train.OPERATIONS[name](x[7:8], m[7:8], s[7:8], partial(warp, bicubic=bicubic[7:8]))
    assert torch.equal(alone[0], mine[7])                                       # whatever shares the batch


def test_resized_crop_is_pillows():
    x = photos()
    u = torch.rand(4, len(x), generator=torch.Generator().manual_seed(2))
    height, width = (10 + 22 * u[0]).round(), (10 + 22 * u[1]).round()
    box = torch.stack([((33 - height) * u[2]).floor(), ((33 - width) * u[3]).floor(), height, width], dim=1)
    bicubic = torch.arange(len(x)) % 2 == 0
    mine = train.resized_crop(x, box, bicubic)
    for i, (top, left, h, w) in enumerate(box.int().tolist()):
        how = Image.Resampling.BICUBIC if bicubic[i] else Image.Resampling.BILINEAR
        theirs = pil(x[i]).crop((left, top, left + w, top + h)).resize((32, 32), how)
        difference = (mine[i].int() - torch.from_numpy(np.array(theirs)).permute(2, 0, 1).int()).abs().float()
        assert difference.mean() < 6 if bicubic[i] else difference.max() <= 1, (i, difference.mean(), difference.max())
    whole = torch.tensor([[0.0, 0.0, 32.0, 32.0]]).repeat(len(x), 1)
    assert torch.equal(train.resized_crop(x, whole, bicubic), x)


def test_flips_come_after_the_crop():
    x, off = photos()[:20], dict(RECIPE, ra_ops=0)
    draws = train.draw_images(20, 32, 32, off)
    flipped = train.augment(x.clone(), draws, off, torch.tensor(FILL))
    cropped = train.augment(x.clone(), draws, dict(off, flip=0.0), torch.tensor(FILL))
    for flip, with_it, without in zip(draws["flip"], flipped, cropped):
        assert torch.equal(with_it, without.flip(2) if flip else without)
    assert 0 < draws["flip"].sum() < 20


RECIPE = dict(train.RECIPES["cifar100"], data="cifar100")


def test_what_is_drawn_for_images():
    torch.manual_seed(0)
    draws = train.draw_images(40_000, 32, 32, RECIPE)
    top, left, height, width = draws["crop"].T
    whole = (height == 32) & (width == 32)
    area, ratio = (height * width / 1024)[~whole], (height / width)[~whole].log()
    assert 0.77 < area.min() and 0.7 < ratio.exp().min() and ratio.exp().max() < 1.43 and abs(ratio.mean()) < 0.01
    assert ratio.exp().max() > 1.25
    loose = (height < 30) & (width < 30)
    corners = torch.stack([top / (32 - height), left / (32 - width)])[:, loose]
    assert abs(torch.corrcoef(corners)[0, 1]) < 0.05                            # each drawn by itself
    assert (top >= 0).all() and (left >= 0).all() and (top + height <= 32).all() and (left + width <= 32).all()
    assert (top + height == 32).any() and (left + width == 32).any() and 0.005 < whole.float().mean() < 0.1
    for name in ("flip", "crop_bicubic", "bicubic"):
        assert draws[name].float().mean() == pytest.approx(0.5, abs=0.02), name
        assert (draws[name][1:] == draws[name][:-1]).float().mean() == pytest.approx(0.5, abs=0.02), name
    assert draws["operation"].shape == (40_000, 2)
    for column in draws["operation"].T:
        assert (column == -1).float().mean() == pytest.approx(0.5, abs=0.01)
        counts = column[column >= 0].bincount(minlength=15) / 20_000
        assert len(counts) == 15 and (counts - 1 / 15).abs().max() < 0.01
    pairs = draws["operation"] + 1
    assert (pairs[:, 0] * 16 + pairs[:, 1]).unique().numel() == 256              # with replacement, each by itself
    unclipped = draws["magnitude"][draws["magnitude"] < 10]
    assert draws["magnitude"].mean() == pytest.approx(9, abs=0.02) and unclipped.std() == pytest.approx(0.49, abs=0.02)
    assert draws["magnitude"].max() == 10 and draws["sign"].unique().tolist() == [-1, 1]
    assert draws["sign"].mean(0).tolist() == pytest.approx([0, 0], abs=0.02)
    erased = draws["erase"][draws["erase"][:, 2] > 0]
    assert len(erased) / 40_000 == pytest.approx(0.25, abs=0.01)
    area, ratio = erased[:, 2] * erased[:, 3] / 1024, (erased[:, 2] / erased[:, 3]).log()
    assert 0.01 < area.min() and area.max() < 0.36 and area.mean() == pytest.approx((0.02 + 1 / 3) / 2, abs=0.01)
    assert abs(ratio.mean()) < 0.02 and ratio.std() == pytest.approx(2 * math.log(1 / 0.3) / 12 ** 0.5, abs=0.05)
    assert (erased[:, :2] >= 0).all() and (erased[:, :2] + erased[:, 2:] <= 32).all() and erased[:, 2:].max() < 32
    torch.manual_seed(0)
    again = train.draw_images(40_000, 32, 32, RECIPE)
    assert all(torch.equal(draws[name], again[name]) for name in draws)


def test_what_is_drawn_for_mixing():
    torch.manual_seed(0)
    keep = train.draw_mixing(4000, 32, 32, RECIPE)
    flat = keep.flatten(1)
    boxed = ((flat == 0) | (flat == 1)).all(1)
    assert keep.shape == (4000, 32, 32) and boxed.float().mean() == pytest.approx(0.5, abs=0.03)
    lam = flat[~boxed][:, 0]
    assert (flat[~boxed] == lam[:, None]).all()
    assert lam.mean() == pytest.approx(0.5, abs=0.02) and lam.std() == pytest.approx((0.25 / 2.6) ** 0.5, abs=0.02)
    for mask in keep[boxed][:50] == 0:                                          # one box, at most half outside
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        assert mask.sum() == len(rows) * len(columns) == mask[:, mask.any(0)][mask.any(1)].numel()
    centre = (keep[boxed] == 0).float().mean(0)                                 # the middle is covered most
    assert centre.flip(0).sub(centre).abs().max() < 0.1 and centre.flip(1).sub(centre).abs().max() < 0.1
    share = (keep[boxed] == 0).float().mean((1, 2))                             # clipped boxes: under 1 - lambda
    assert 0.2 < share.mean() < 0.45 and share.max() > 0.8
    boxes = train.draw_mixing(200, 32, 32, dict(RECIPE, mixup=0.0))
    blends = train.draw_mixing(200, 32, 32, dict(RECIPE, cutmix=0.0)).flatten(1)
    assert ((boxes == 0) | (boxes == 1)).all() and (blends == blends[:, :1]).all()


def test_prepare_mixes_then_erases():
    x, y = photos()[:12].view(2, 6, 3, 32, 32), torch.arange(12).view(2, 6)
    off = dict(RECIPE, crop_scale=1.0, flip=0.0, ra_ops=0, erase=0.0)
    draws = train.draw_images(12, 32, 32, off)
    plain, labels = train.prepare(x.clone(), y, draws, None, off, 20, 0)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in train.PIXELS["cifar100"])
    torch.testing.assert_close(plain, (x / 255 - mean) / std)
    assert torch.equal(labels, y)

    keep = torch.full((2, 32, 32), 0.3125)                                      # exact in binary
    keep[1] = 1
    keep[1, 4:20, 8:16] = 0
    mixed, shares = train.prepare(x.clone(), y, draws, keep, off, 20, 0)
    for step, i in itertools.product(range(2), range(6)):
        a, b = x[step, i].float(), x[step, i ^ 1].float()                       # the partner: the neighbour
        expected = (0.3125 * a + 0.6875 * b).round() if step == 0 else a.clone()
        if step == 1:
            expected[:, 4:20, 8:16] = b[:, 4:20, 8:16]
        torch.testing.assert_close(mixed[step, i], (expected / 255 - mean) / std)
        own = 0.3125 if step == 0 else 1 - 128 / 1024                           # lambda as the box turned out
        target = torch.zeros(20)
        target[y[step, i]] += own
        target[y[step, i ^ 1]] += 1 - own
        torch.testing.assert_close(shares[step, i], target)

    draws = train.draw_images(12, 32, 32, dict(off, erase=1.0))
    erased, _ = train.prepare(x.clone(), y, draws, keep, off, 20, 5)
    mask = train.box_mask(draws["erase"], 32, 32).view(2, 6, 1, 32, 32).expand_as(erased)
    assert torch.equal(erased[~mask], mixed[~mask]) and 0.05 < mask.float().mean() < 0.33
    assert (erased[:, :, 0] != erased[:, :, 1])[mask[:, :, 0]].all()            # noise of its own in each channel
    assert erased[mask].mean() == pytest.approx(0, abs=0.05) and erased[mask].std() == pytest.approx(1, abs=0.05)
    again, _ = train.prepare(x.clone(), y, draws, keep, off, 20, 5)
    assert torch.equal(again, erased)
    noise = [image[box] for image, box in zip(erased.flatten(0, 1), mask.flatten(0, 1))]
    assert len({tuple(values[:5].tolist()) for values in noise}) == 12          # of its own for each image
    pairs = [(a[m & n], b[m & n]) for a, b, m, n in zip(erased[0, ::2], erased[0, 1::2], mask[0, ::2], mask[0, 1::2])]
    a, b = (torch.cat(values) for values in zip(*pairs))
    assert len(a) > 100 and abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 0.2

    first, _ = train.prepare(x.clone(), y, draws, keep, dict(off, erase_first=True), 20, 5)    # DeiT's order
    alone, _ = train.prepare(x.clone(), y, draws, None, off, 20, 5)             # erased, not mixed
    partner = alone.unflatten(1, (3, 2)).flip(2).flatten(1, 2)
    torch.testing.assert_close(first, torch.lerp(partner, alone, keep[:, None, None]))
    assert not torch.equal(first, erased)


def test_randaugment_applies_one_operation_after_the_other():
    x, names = photos()[:15], [*train.OPERATIONS]
    torch.manual_seed(3)
    off = dict(RECIPE, crop_scale=1.0, flip=0.0)
    draws = train.draw_images(15, 32, 32, off)
    draws["operation"] = torch.stack([torch.arange(15), torch.arange(15).roll(4)], dim=1)
    draws["operation"][3, 0] = draws["operation"][5, 1] = -1
    fill = torch.tensor(FILL, dtype=torch.float)
    mine = train.augment(x.clone(), draws, off, fill)
    for i, image in enumerate(x[:, None]):
        for layer, number in enumerate(draws["operation"][i].tolist()):
            if number >= 0:
                rows = (i, slice(layer, layer + 1))
                warp = partial(train.warp, bicubic=draws["bicubic"][rows], fill=fill)
                image = train.OPERATIONS[names[number]](image, draws["magnitude"][rows], draws["sign"][rows], warp)
        assert torch.equal(mine[i], image[0]), i


def test_empty_places_get_the_mean_colour():
    off = dict(RECIPE, crop_scale=1.0, flip=0.0, ra_ops=1, erase=0.0)
    draws = train.draw_images(4, 32, 32, off)
    draws["operation"][:] = [*train.OPERATIONS].index("TranslateX")
    draws["sign"][:] = 1
    x = torch.zeros(1, 4, 3, 32, 32, dtype=torch.uint8)
    y, _ = train.prepare(x, torch.zeros(1, 4).long(), draws, None, off, 9, 0)
    assert y[..., -10:].abs().max() < 0.01 and y[..., :10].max() < -1           # 0 is the mean


def test_augmentation_is_per_image_and_does_not_depend_on_the_chunk():
    x = photos()[:40]
    torch.manual_seed(4)
    draws = train.draw_images(40, 32, 32, dict(RECIPE, ra_ops=3))
    fill = torch.tensor(FILL, dtype=torch.float)
    whole = train.augment(x.clone(), draws, RECIPE, fill)
    parts = [train.augment(x[i:i + 7].clone(), {name: v[i:i + 7] for name, v in draws.items()}, RECIPE, fill)
             for i in range(0, 40, 7)]
    assert torch.equal(torch.cat(parts), whole)
    same = train.augment(x[:1].repeat(40, 1, 1, 1), draws, RECIPE, fill)
    assert len({image.numpy().tobytes() for image in same}) > 35                # one image, forty others


def test_augmentation_serves_other_sizes():
    x = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    y, _ = train.prepare(x[None], torch.zeros(1, 2, dtype=torch.long), train.draw_images(2, 224, 224, RECIPE),
                         train.draw_mixing(1, 224, 224, RECIPE), RECIPE, 10, 0)
    assert y.shape == (1, 2, 3, 224, 224) and y.isfinite().all()


# ----------------------------------------------------------------------------------------------------- train.py: runs

make_numbers = train.numbers


@pytest.fixture
def small(monkeypatch):
    """Both data sets in small: 200 training and 40 test images."""
    monkeypatch.setattr(train, "numbers", lambda count, seed: make_numbers(200 if seed == 1 else 40, seed))
    monkeypatch.setattr(train, "cifar100", lambda root, train: make_numbers(200 if train else 40, 1 if train else 2))


@pytest.fixture
def command(small, tmp_path):
    """Runs train.py's command on small data -> its result; runs go to tmp_path / "runs"."""
    def run(*flags, data="numbers"):
        flags = [*map(str, flags)]
        flags += [] if "--runs" in flags else ["--runs", str(tmp_path / "runs")]
        return CliRunner().invoke(train.app, ["--data", data, "--device", "cpu", *flags])
    return run


def run_folder(tmp_path):
    (folder,) = (tmp_path / "runs").iterdir()
    return folder, json.loads((folder / "config.json").read_text())


def checkpoint(folder, name="last.pt"):
    return torch.load(folder / name, weights_only=True)


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def one_line(result, says, code=2):
    assert result.exit_code == code and says in result.stderr, result.output
    assert result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 1


def test_numbers_are_balanced_and_repeatable():
    x, y = make_numbers(500, seed=1)
    assert x.shape == (500, 3, 32, 32) and x.dtype == torch.uint8 and y.bincount().tolist() == [5] * 100
    again, other = make_numbers(500, seed=1), make_numbers(500, seed=2)
    assert torch.equal(again[0], x) and torch.equal(again[1], y) and not torch.equal(other[0], x)
    bright = x.float().mean((1, 2, 3))
    assert bright.min() < 90 and bright.max() > 160                             # light on dark and dark on light


def test_a_run_leaves_its_record(command, tmp_path, monkeypatch):
    result = command("--epochs", 3, "--pe", "layerwise", "--pool", "gap", "--mpvg", "--lr", 0.02, "--drop-path", 0.5)
    assert result.exit_code == 0, result.output
    first, *_, last = result.output.strip().splitlines()
    assert "numbers" in first and "cpu" in first
    folder, config = run_folder(tmp_path)
    log = log_of(folder)
    assert folder.name == "mpvg-vit-nano-numbers-seed0" and [line["epoch"] for line in log] == [1, 2, 3]
    assert config["method"] == "mpvg" and config["environment"]["torch"] == torch.__version__
    assert config["environment"]["device"] == "cpu" and {"git", "python", "torchvision"} <= config["environment"].keys()
    assert last.startswith(f"test accuracy {log[-1]['test_accuracy']:.2f} % after the last of 3 epochs (best: ")
    saved = checkpoint(folder)
    assert saved["config"] == config and saved["epoch"] == 3 and saved["log"] == log
    best = max(log, key=lambda line: line["test_accuracy"])                     # the first of equals
    assert checkpoint(folder, "best.pt")["epoch"] == saved["best"]["epoch"] == best["epoch"]
    assert saved["best"]["test_accuracy"] == best["test_accuracy"]
    for name, epoch in (("last.pt", 3), ("best.pt", best["epoch"])):
        model = load_weights(create("vit-nano", "mpvg"), folder / name).eval()
        found = train.evaluate(model, train.Arrays(*make_numbers(40, 2)), "numbers", torch.device("cpu"))
        assert found["test_accuracy"] == pytest.approx(log[epoch - 1]["test_accuracy"], abs=0.01)
        assert found["test_loss"] == pytest.approx(log[epoch - 1]["test_loss"], rel=1e-4)
    assert sorted(path.name for path in folder.iterdir()) == ["best.pt", "config.json", "last.pt", "log.jsonl"]
    monkeypatch.chdir(tmp_path)                                                 # the README's way to load a run
    shown = dict(torch=torch, create=create, load_weights=load_weights)
    exec(readme_code("torch.load("), shown)
    assert torch.equal(shown["model"].head.weight, checkpoint(folder)["model"]["head.weight"])


def test_evaluate_pads_the_last_batch(monkeypatch):
    seen, model = [], create("vit-nano", "mpvg").eval()
    x, y = make_numbers(50, 2)

    def predict(images):
        seen.append(images.shape)
        return model(images)
    test = train.Arrays(x, y)
    monkeypatch.setattr(test, "test_batches", partial(test.test_batches, size=16))
    found = train.evaluate(predict, test, "numbers", torch.device("cpu"))
    assert seen == [(16, 3, 32, 32)] * 4
    logits = model((x / 255 - 0.5) / 0.3)
    assert found == dict(
        test_accuracy=pytest.approx((logits.argmax(1) == y).float().mean().item() * 100),
        test_loss=pytest.approx(F.cross_entropy(logits, y).item(), rel=1e-5))
    assert train.evaluate(predict, test, "numbers", torch.device("cpu"), stopped=["SIGTERM"]) is None


@pytest.mark.parametrize("flags, method, overrides", [
    ([], "mpvg", {}),
    (["--pe", "layerwise", "--pool", "gap", "--mpvg"], "mpvg", {}),
    (["--pe", "layerwise", "--pool", "gap"], "pvg", {}),
    (["--pe", "layerwise", "--pool", "cls"], "lape", {}),
    (["--pe", "absolute", "--pool", "cls"], "default", {}),
    (["--pe", "absolute", "--pool", "gap"], "gap", {}),
    (["--pe", "absolute", "--pool", "gap", "--mpvg"], "gap-last-pe", {}),
    (["--pe", "none"], "gap", {"pe": "none"}),
    (["--pe", "none", "--pool", "cls"], "default", {"pe": "none"}),
    (["--mpvg"], "mpvg", {}),
    (["--method", "mpvg-free"], "mpvg-free", {}),
    (["--method", "mpvg", "--last-pe", "2"], "mpvg", {"last_pe": 2}),
    (["--last-pe", "none"], "mpvg", {"last_pe": None}),
    (["--method", "pvg", "--last-pe", "shift"], "pvg", {"last_pe": "shift"}),
    (["--layer0", "--no-hierarchical"], "mpvg", {"layer0": True, "hierarchical": False}),
    (["--no-layer0", "--hierarchical", "--add-input", "--last-pe", "0", "--pe-init", "learned"], "mpvg", {}),
    (["--method", "lape", "--no-layer0", "--add-input"], "lape", {"layer0": False, "add_input": True}),
    (["--no-add-input", "--pe-init", "sincos"], "mpvg", {"add_input": False, "pe_init": "sincos"}),
    (["--model", "vit-lite"], "mpvg", {}),
], ids=str)
def test_flags_name_a_model(command, tmp_path, monkeypatch, flags, method, overrides):
    trained = []
    monkeypatch.setattr(train, "train_run", lambda config, model, *rest: trained.append(model) or 1 / 0)
    result = command(*flags)
    assert isinstance(result.exception, ZeroDivisionError), result.output
    folder, config = run_folder(tmp_path)
    assert (config["method"], config["overrides"]) == (method, overrides)
    expected = create(config["model"], method, **overrides)
    assert config["model"] == ("vit-lite" if "--model" in flags else "vit-nano")
    assert trained[0].state_dict().keys() == expected.state_dict().keys()
    assert dict(trained[0].named_parameters()).keys() == dict(expected.named_parameters()).keys()  # sincos has no PE
    for toggle in ("last_pe", "hierarchical", "add_input", "pool"):
        assert getattr(trained[0], toggle) == getattr(expected, toggle)
    label = method + "".join(f"-{k}={v}" for k, v in overrides.items())
    assert folder.name == f"{label}-{config['model']}-numbers-seed0" and f"method    {label}: " in result.output


CHANGES = {  # every flag of the recipe, and a value that is another run
    "epochs": 2, "batch_size": 32, "lr": 1e-3, "min_lr": 3e-4, "warmup_lr": 1e-4,
    "warmup_epochs": 1.5, "cooldown_epochs": 1, "lr_per": "step", "weight_decay": 0.5, "decay_pe": False,
    "label_smoothing": 0.3, "repeats": 3, "crop_scale": 0.5, "bicubic": 1.0, "flip": 0.0, "ra_ops": 1,
    "ra_magnitude": 5.0, "mixup": 0.2, "cutmix": 0.0, "erase": 0.9, "erase_first": True, "drop_path": 0.3,
    "attn_drop": 0.3, "fraction": 0.5, "seed": 1,
}


USUAL = ["--model", "vit-nano", "--epochs", "3", "--batch-size", "50"]


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    """The weights of a short run on 200 images with cifar100's recipe."""
    folder = tmp_path_factory.mktemp("usual")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "cifar100", lambda root, train: make_numbers(200 if train else 40, 1 if train else 2))
        flags = ["--data", "cifar100", "--device", "cpu", "--runs", str(folder), *USUAL]
        assert CliRunner().invoke(train.app, flags).exit_code == 0
    return checkpoint(folder / "mpvg-vit-nano-cifar100-seed0")


@pytest.mark.parametrize("name", CHANGES)
def test_every_number_of_the_recipe_is_a_flag_with_an_effect(command, usual, tmp_path, name):
    assert {*train.RECIPES["cifar100"]} - {"model", "image_size"} <= {*CHANGES}
    assert usual["config"][name] != CHANGES[name]
    value = CHANGES[name]
    flag = "--" + name.replace("_", "-")
    flag = [flag] if value is True else ["--no-decay-pe"] if value is False else [flag, value]
    result = command(*USUAL, *flag, data="cifar100")
    assert result.exit_code == 0, result.output
    folder, config = run_folder(tmp_path)
    assert config[name] == value
    changed = {key for key in config if config[key] != usual["config"][key]} - {"environment"}
    changed -= {"images"} if name == "fraction" else set()
    assert changed - {"warmup_epochs"} == {name} - {"warmup_epochs"}            # that follows a short --epochs
    weights = checkpoint(folder)["model"]["blocks.1.mlp.fc1.weight"]
    assert not torch.equal(weights, usual["model"]["blocks.1.mlp.fc1.weight"])


def plain_loop(recipe, model, train_set, test_set, seed, data):
    """What `train.py` must do without augmentation, written out on its own. -> (model, losses, accuracies)"""
    torch.manual_seed(seed)
    model = create(model, "mpvg")
    tables = {"pos_embed"} if not recipe["decay_pe"] else set()
    decays = {n: p.ndim >= 2 and n not in tables for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([
        dict(params=[p for n, p in model.named_parameters() if decays[n]], weight_decay=recipe["weight_decay"]),
        dict(params=[p for n, p in model.named_parameters() if not decays[n]], weight_decay=0)])
    (images, labels), size, losses, accuracies = train_set, recipe["batch_size"], [], []
    steps = len(images) // size
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in train.PIXELS[data])
    for epoch in range(recipe["epochs"]):
        order, total = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed * 100_003 + epoch)), 0
        for i in range(steps):
            rows = order[i * size:(i + 1) * size]
            x = (images[rows] / 255 - mean) / std
            t = epoch + (i / steps if recipe["lr_per"] == "step" else 0)
            warmup, length = recipe["warmup_epochs"], recipe["epochs"] - recipe["cooldown_epochs"]
            for group in optimizer.param_groups:
                group["lr"] = (1e-6 + (recipe["lr"] - 1e-6) * t / warmup if t < warmup else recipe["min_lr"] +
                               (recipe["lr"] - recipe["min_lr"]) * (1 + math.cos(math.pi * min(t / length, 1))) / 2)
            optimizer.zero_grad()
            logs = model(x).log_softmax(1)
            nll = -logs[torch.arange(size), labels[rows]]
            smooth = recipe["label_smoothing"]
            loss = ((1 - smooth) * nll - smooth * logs.mean(1)).mean()
            loss.backward()
            optimizer.step()
            total += loss.item()
        losses.append(total / steps)
        hits = (model.eval()((test_set[0] / 255 - mean) / std).argmax(1) == test_set[1]).float()
        accuracies.append(100 * hits.mean().item())
        model.train()
    return model, losses, accuracies


@pytest.mark.parametrize("data", ["numbers", "cifar100"])
@pytest.mark.parametrize("seed", [0, 5])
def test_a_run_is_the_plain_loop(command, tmp_path, data, seed):
    changes = dict(epochs=3, batch_size=48, lr=0.004, weight_decay=0.2, label_smoothing=0.3, warmup_epochs=0.6,
                   cooldown_epochs=1, crop_scale=1, flip=0, ra_ops=0, mixup=0, cutmix=0, erase=0)
    recipe = dict(train.RECIPES[data], **changes)
    flags = [part for key, value in changes.items() for part in ("--" + key.replace("_", "-"), value)]
    result = command("--model", "vit-nano", "--seed", seed, *flags, data=data)
    assert result.exit_code == 0, result.output
    folder, config = run_folder(tmp_path)
    assert config["seed"] == seed and config["lr"] == 0.004 and config["model"] == "vit-nano"
    model, losses, accuracies = plain_loop(recipe, "vit-nano", make_numbers(200, 1), make_numbers(40, 2), seed, data)
    assert [line["loss"] for line in log_of(folder)] == pytest.approx(losses, rel=1e-4)
    assert [line["test_accuracy"] for line in log_of(folder)] == pytest.approx(accuracies, abs=0.01)
    for name, value in checkpoint(folder)["model"].items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=1e-3, atol=2e-4)


def test_default_data_depends_on_the_device(monkeypatch, tmp_path, small):
    for accelerator, flags in ((lambda: None, []), (lambda: "cuda", ["--device", "cpu"])):
        monkeypatch.setattr(train, "accelerator", accelerator)
        result = CliRunner().invoke(train.app, ["--epochs", "1", "--runs", str(tmp_path / str(len(flags))), *flags])
        assert result.output.startswith("data      numbers (as --data is not given)") and result.exit_code == 0
    monkeypatch.setattr(train, "usable_device", torch.device)
    flags = dict.fromkeys(inspect.signature(train.train).parameters) | dict(seed=0, fraction=1.0, accumulate=1)
    assert [train.configure(flags | dict(device=device))["data"] for device in ("cpu", "cuda", "mps")] == [
        "numbers", "cifar100", "cifar100"]


@pytest.mark.filterwarnings("ignore:dynamo_pgo")
def test_no_compiler_is_one_line(command, monkeypatch, tmp_path):
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (None, "/nonexistent"))
    monkeypatch.setattr(torch._inductor.config, "force_disable_caches", True)
    torch._dynamo.reset()
    result = command("--epochs", 1, "--compile", "on", "--batch-size", 6)
    says = result.stderr.splitlines()[-1]                                       # above it may stand torch's own log
    assert result.exit_code == 2 and says.startswith("error: torch.compile does not work here ("), result.output
    assert says.endswith("--compile off") and "Traceback" not in result.stderr


def test_data_dir_reaches_training(monkeypatch, command, tmp_path):
    seen = []
    monkeypatch.setattr(train, "cifar100", lambda root, train: seen.append(root) or make_numbers(400, 1))
    result = command("--epochs", 1, "--data-dir", "here", "--model", "vit-nano", data="cifar100")
    assert result.exit_code == 0 and seen == [Path("here")] * 2


def test_cifar100_is_torchvisions(monkeypatch, tmp_path):
    class Fake:
        def __init__(self, root, train, download):
            self.data = torch.arange(2 * 32 * 32 * 3).remainder(251).to(torch.uint8).view(2, 32, 32, 3).numpy()
            self.targets = [3, 99] if train and download else [0, 0]
    monkeypatch.setattr(torchvision.datasets, "CIFAR100", Fake)
    x, y = train.cifar100(tmp_path, train=True)
    assert x.shape == (2, 3, 32, 32) and x.dtype == torch.uint8 and y.tolist() == [3, 99]
    assert x[1, 2, 5, 7] == Fake(tmp_path, True, True).data[1, 5, 7, 2]


def test_fraction_is_balanced_and_chosen_by_seed(monkeypatch):
    labels = torch.arange(400) % 20
    monkeypatch.setattr(train, "cifar100", lambda root, train: (torch.arange(400).view(400, 1), labels))
    config = dict(data="cifar100", fraction=0.15)
    chosen = [train.load_data(dict(config, seed=seed), ".")["train"] for seed in (0, 0, 1)]
    for data in chosen:
        assert data.labels.bincount().tolist() == [3] * 20 and torch.equal(labels[data.images[:, 0]], data.labels)
    assert torch.equal(chosen[0].images, chosen[1].images) and not torch.equal(chosen[0].images, chosen[2].images)
    assert len(train.load_data(dict(config, seed=0), ".")["test"]) == 400


def test_compile_and_precision_reach_the_step(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda function, **how: asked.append(how) or function)
    model, x, y = create("vit-nano", "mpvg"), torch.randn(4, 3, 32, 32), torch.arange(4)
    cpu = torch.device("cpu")
    config = dict(precision="fp32", compile="off", label_smoothing=0.1)
    loss, predict = train.step_functions(model, config, cpu)
    expected = F.cross_entropy(model(x), y, label_smoothing=0.1)
    assert not asked and torch.equal(loss(x, y), expected)
    torch.testing.assert_close(loss(x, F.one_hot(y, 100).float()), expected)    # shares of labels: the same
    for word, mode in (("on", None), ("graphs", "reduce-overhead")):
        train.step_functions(model, dict(config, compile=word), cpu)
        assert asked[-2:] == [dict(fullgraph=True, dynamic=False, mode=mode), dict(fullgraph=True, dynamic=False)]
        assert torch._inductor.config.triton.cudagraph_or_error == (word == "graphs")
    torch._inductor.config.triton.cudagraph_or_error = False
    half = train.step_functions(model, dict(config, precision="bf16"), cpu)
    assert half[1](x).dtype == torch.float32 and not torch.equal(half[1](x), predict(x))
    torch.testing.assert_close(half[0](x, y), expected, rtol=2e-2, atol=2e-2)


def test_run_flags_reach_the_run(command, monkeypatch, tmp_path):
    monkeypatch.setattr(train, "train_run", lambda *run: seen.append(run) or 1 / 0)
    for flags, expected in (([], ("fp32", "off")), (["--precision", "bf16", "--compile", "on"], ("bf16", "on"))):
        seen = []
        assert isinstance(command(*flags, "--overwrite").exception, ZeroDivisionError)
        config, _, _, folder, device, _, _ = seen[0]
        assert (config["precision"], config["compile"]) == expected
        assert folder == tmp_path / "runs" / "mpvg-vit-nano-numbers-seed0" and device.type == "cpu"


def test_compiled_training_is_the_same(command, tmp_path, monkeypatch):
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, mode=None, **how: real(f, backend="aot_eager", **how))
    for word in ("off", "on"):
        result = command("--epochs", 2, "--compile", word, "--name", word, "--drop-path", 0.2)
        assert result.exit_code == 0 and ("compiled  in" in result.output) == (word == "on"), result.output
    off, on = (checkpoint(tmp_path / "runs" / word) for word in ("off", "on"))
    assert on["model"].keys() == off["model"].keys()                            # the plain module is what is saved
    for name, value in on["model"].items():
        torch.testing.assert_close(value, off["model"][name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("flags, says", [
    (["--data", "imagenet", "--data-dir", "nowhere"], "error: nowhere cannot be read as ImageNet"),
    (["--image-size", "64"], "numbers has images of 32x32: --image-size is for --data imagenet"),
    (["--accumulate", "3"], "--batch-size 128 is not a multiple of 3: processes (1) x --accumulate (3)"),
    (["--mixup", "1", "--batch-size", "21"], "is not a multiple of 2: processes (1) x --accumulate (1) x 2, as images"),
    (["--method", "mpvg", "--pe", "none"], "leave out --pe, --pool and --mpvg, or --method"),
    (["--pool", "cls", "--mpvg"], "--mpvg needs a PE and --pool gap"),
    (["--pe", "none", "--mpvg"], "--mpvg needs a PE and --pool gap"),
    (["--method", "rope"], "unknown method 'rope': choose from default"),
    (["--last-pe", "4"], "a block's number under 4"),
    (["--last-pe", "first"], "unknown last_pe 'first'"),
    (["--method", "lape", "--last-pe", "0"], "use pool='gap'"),
    (["--method", "gap", "--layer0"], "use pe='layerwise'"),
    (["--model", "resnet"], "unknown model 'resnet': choose from vit-lite"),
    (["--model", "deit-tiny"], "use vit-lite or vit-nano"),
    (["--batch-size", "401"], "--batch-size 401 is more than the 200"),
    (["--fraction", "0"], "more than the 0 training images (--fraction 0)"),
    (["--warmup-epochs", "6"], "leave nothing of --epochs 6"),
    (["--cooldown-epochs", "6"], "leave nothing of --epochs 6"),
    (["--drop-path", "1"], "drop_path=1.0 must be"),
    (["--device", "cuda:99"], "cuda"),
    (["--device", "abacus"], "unknown --device 'abacus': choose from auto, cpu"),
    (["--device", "meta"], "unknown --device 'meta'"),
    (["--method", ""], "unknown method ''"),
    (["--name", ""], "is not the name of one folder"),
    (["--name", "../up"], "is not the name of one folder"),
    (["--name", "."], "is not the name of one folder"),
    (["--name", ".."], "is not the name of one folder"),
    (["--name", "x" * 201], "is not the name of one folder"),
    (["--lr", "inf"], "--lr must be a finite number"),
    (["--weight-decay", "inf"], "--weight-decay must be a finite number"),
    (["--resume", "--overwrite"], "give one"),
    (["--compile", "graphs"], "--compile graphs needs CUDA"),
    (["--freeze"], "--init says which weights it keeps"),
    (["--init", "nowhere.pt"], "--init nowhere.pt cannot be read (No such file"),
    (["--init", __file__], "cannot be loaded safely"),
    (["--runs", __file__], "choose another --runs"),
    (["--lr", "1e30", "--batch-size", "20"], "--overwrite with a lower --lr (nothing was saved yet)"),
], ids=str)
def test_a_users_mistake_gets_one_line(command, flags, says):
    one_line(command(*flags), says)


@pytest.mark.parametrize("flags", [["--epochs", "0"], ["--batch-size", "-3"], ["--lr", "-1"], ["--pe", "rope"],
                                   ["--weight-decay", "-1"], ["--seed", "-1"], ["--seed", str(2**32)], ["--lr", "nan"],
                                   ["--surplus"], ["--pool", "max"], ["--data", "mnist"], ["--mixup", "-1"],
                                   ["--erase", "2"], ["--ra-magnitude", "11"], ["--crop-scale", "0"],
                                   ["--fraction", "1.5"], ["--lr-per", "year"]], ids=str)
def test_nonsense_is_refused(command, flags):
    assert command(*flags).exit_code == 2


def test_cifar100_that_cannot_be_had(monkeypatch, tmp_path):
    def offline(*_, **__):
        raise OSError("no network")
    monkeypatch.setattr(torchvision.datasets, "CIFAR100", offline)
    result = CliRunner().invoke(train.app, ["--data", "cifar100", "--device", "cpu", "--data-dir", str(tmp_path),
                                            "--runs", str(tmp_path / "runs")])
    one_line(result, "could not be downloaded (no network)")
    assert not (tmp_path / "runs").exists()                                     # nothing half-begun


# ------------------------------------------------------------------------------------- train.py: runs that survive

def equal_runs(a, b):
    a, b = checkpoint(a), checkpoint(b)
    for key in ("model", "optimizer", "best", "epoch", "step"):
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=0)              # bit for bit
    assert torch.equal(a["rng"], b["rng"])
    lines = [[{k: v for k, v in line.items() if k not in ("seconds", "images_per_second")} for line in x["log"]]
             for x in (a, b)]
    assert lines[0] == lines[1]


def start(flags):
    """train.py's command in a process of its own, of the fixture's small data."""
    def main():
        code = CliRunner().invoke(train.app, flags).exit_code
        os._exit(code if code >= 0 else 1)
    process = multiprocessing.get_context("fork").Process(target=main)
    process.start()
    return process


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
def test_killed_at_random_moments_and_resumed_it_is_the_same_run(command, tmp_path):
    flags = ["--data", "cifar100", "--device", "cpu", "--model", "vit-nano", "--epochs", "6", "--batch-size", "8",
             "--drop-path", "0.2", "--runs", str(tmp_path / "runs"), "--name"]
    assert command(*flags[4:], "whole", data="cifar100").exit_code == 0
    seconds = log_of(tmp_path / "runs" / "whole")[-1]["seconds"]
    random = Random(0)
    ends = []
    for number in itertools.count():
        process = start([*flags, "killed", "--resume"])
        kind = (signal.SIGTERM, signal.SIGKILL, signal.SIGINT, signal.SIGKILL)[number % 4]
        time.sleep(0.2 + seconds * random.uniform(0.05, 0.35))
        if process.is_alive():
            os.kill(process.pid, kind)
        process.join()
        ends.append(process.exitcode)
        if process.exitcode == 0:
            break
        assert number < 60
    assert len(ends) > 2, ends
    equal_runs(tmp_path / "runs" / "whole", tmp_path / "runs" / "killed")
    assert len(log_of(tmp_path / "runs" / "killed")) == 6


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
def test_a_signal_finishes_the_step_saves_and_says_so(command, tmp_path, monkeypatch):
    """In the middle of an epoch; the run then goes on from that step."""
    steps = []
    real = train.lr_at
    monkeypatch.setattr(train, "lr_at", lambda *a, **k: steps.append(len(steps) == 29 and os.kill(
        os.getpid(), signal.SIGTERM)) or real(*a, **k))
    flags = ["--epochs", 3, "--batch-size", 10, "--drop-path", 0.1, "--name"]
    result = command(*flags, "stopped")
    assert result.exit_code == 143 and "stopped by SIGTERM after step 10 of 20 of epoch 2: saved" in result.output
    saved = checkpoint(tmp_path / "runs" / "stopped")
    assert (saved["epoch"], saved["step"], len(saved["losses"])) == (1, 10, 10)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL                   # the handler is gone with the run
    monkeypatch.setattr(train, "lr_at", real)
    result = command(*flags, "stopped", "--resume")
    assert result.exit_code == 0 and "on from step 10 of epoch 2" in result.output
    assert log_of(tmp_path / "runs" / "stopped")[1]["seconds"] > saved["seconds"]
    assert command(*flags, "whole").exit_code == 0
    equal_runs(tmp_path / "runs" / "whole", tmp_path / "runs" / "stopped")


def test_of_equal_accuracies_the_first_is_the_best(command, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "evaluate", lambda *_, **__: dict(test_accuracy=12.5, test_loss=1.0))
    assert command("--epochs", 3).exit_code == 0
    folder, _ = run_folder(tmp_path)
    assert checkpoint(folder)["best"] == dict(epoch=1, test_accuracy=12.5)
    assert checkpoint(folder, "best.pt")["epoch"] == 1


def test_stopped_in_evaluation_it_goes_on(command, tmp_path, monkeypatch):
    real = train.evaluate

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGINT)
        return real(*args)
    monkeypatch.setattr(train, "evaluate", interrupted)
    result = command("--epochs", 2, "--batch-size", 50, "--name", "stopped")
    assert result.exit_code == 130 and "stopped by SIGINT after step 4 of 4 of epoch 1" in result.output
    monkeypatch.setattr(train, "evaluate", real)
    assert command("--epochs", 2, "--batch-size", 50, "--name", "stopped", "--resume").exit_code == 0
    assert command("--epochs", 2, "--batch-size", 50, "--name", "whole").exit_code == 0
    equal_runs(tmp_path / "runs" / "whole", tmp_path / "runs" / "stopped")


def test_resume_starts_finishes_and_refuses_other_flags(command, tmp_path):
    result = command("--epochs", 1, "--resume")                                 # nothing was saved yet
    assert result.exit_code == 0, result.output
    folder, _ = run_folder(tmp_path)
    before = (folder / "last.pt").read_bytes()
    again = command("--epochs", 1, "--resume")
    accuracy = log_of(folder)[-1]["test_accuracy"]
    assert again.exit_code == 0 and f"is finished: test accuracy {accuracy:.2f} %" in again.output
    whole = (folder / "log.jsonl").read_text()
    (folder / "log.jsonl").unlink()                                             # as a kill between two files leaves it
    (folder / "config.json").write_text("{}")
    assert command("--epochs", 1, "--resume").exit_code == 0 and (folder / "log.jsonl").read_text() == whole
    assert run_folder(tmp_path)[1] == checkpoint(folder)["config"]
    other = command("--epochs", 2, "--lr", 0.5, "--resume")
    one_line(other, "epochs was 1, is 2; lr was 0.002, is 0.5")
    assert (folder / "last.pt").read_bytes() == before
    one_line(command("--epochs", 1), "exists: --resume goes on with it, --overwrite replaces it")
    (folder / "last.pt").write_bytes((folder / "best.pt").read_bytes())         # lacks what a run needs
    one_line(command("--epochs", 1, "--resume"), "is no checkpoint of this train.py")
    (folder / "last.pt").write_bytes(before[:5000])
    one_line(command("--epochs", 1, "--resume"), "is damaged, or no checkpoint: best.pt beside it may be whole")


def test_what_was_saved_stays_until_there_is_something_new(command, tmp_path, monkeypatch):
    assert command("--epochs", 1).exit_code == 0
    folder, _ = run_folder(tmp_path)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    one_line(command("--epochs", 1, "--overwrite", "--lr", "1e30", "--batch-size", 20), "not finite at step")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before

    def full(*_):
        raise RuntimeError("disk full")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        one_line(command("--epochs", 1, "--overwrite"), "cannot be written (disk full): free the disk")
    assert {path.name for path in folder.iterdir()} == {*before}
    assert (folder / "last.pt").read_bytes() == before["last.pt"]
    assert command("--epochs", 2, "--overwrite").exit_code == 0
    assert checkpoint(folder)["epoch"] == 2 and len(log_of(folder)) == 2
    (folder / "last.pt").unlink()                                               # a folder without weights: still a run
    one_line(command("--epochs", 2), "exists")


@pytest.mark.parametrize("place, step", [("loss", 3), ("weights", 4)])
def test_a_loss_that_is_not_finite_stops_the_run(command, tmp_path, monkeypatch, place, step):
    """In epoch 2, of four steps: a loss of nan at step 3; or nan weights after the last step's finite loss."""
    real, steps = train.lr_at, []

    def planted(*args, **kwargs):
        steps.append(0)
        return math.nan if len(steps) == (6 if place == "loss" else 8) else real(*args, **kwargs)
    monkeypatch.setattr(train, "lr_at", planted)
    one_line(command("--epochs", 3, "--batch-size", 50), f"not finite at step {step} of epoch 2: --overwrite")
    folder, _ = run_folder(tmp_path)
    assert checkpoint(folder)["epoch"] == 1 and len(log_of(folder)) == 1
    assert all(p.isfinite().all() for p in checkpoint(folder)["model"].values())


# ------------------------------------------------------------------------- train.py: recipe, fine-tuning, evaluation

def test_lr_at():
    recipe = dict(epochs=310, warmup_epochs=10, cooldown_epochs=10, lr=6e-4, min_lr=1e-5, warmup_lr=1e-6)
    assert {name: train.RECIPES["cifar100"][name] for name in recipe} == recipe
    assert train.lr_at(0, **recipe) == 1e-6
    assert train.lr_at(5, **recipe) == pytest.approx((1e-6 + 6e-4) / 2)
    for epoch, value in ((10, 5.984e-4), (150, 3.05e-4), (299, 1.002e-5), (300, 1e-5), (309, 1e-5)):
        assert train.lr_at(epoch, **recipe) == pytest.approx(value, rel=1e-3)
    for lr in (0, 1e-9, 1e-6):                                                  # never above the peak
        assert max(train.lr_at(t / 10, **{**recipe, "lr": lr}) for t in range(3100)) == pytest.approx(lr)


def test_the_recipe_steps_per_epoch(command, tmp_path):
    assert command("--epochs", 4, "--model", "vit-nano", data="cifar100").exit_code == 0
    folder, config = run_folder(tmp_path)
    schedule = {key: config[key] for key in inspect.signature(train.lr_at).parameters if key != "epoch"}
    assert [line["lr"] for line in log_of(folder)] == [train.lr_at(t, **schedule) for t in range(4)]
    assert (config["warmup_epochs"], config["cooldown_epochs"]) == (0.4, 0)     # a tenth of a short run


def test_recipes_are_the_published_ones():
    published = dict(model="vit-lite", image_size=32, epochs=310, batch_size=128, lr=6e-4, min_lr=1e-5, warmup_lr=1e-6,
                     warmup_epochs=10, cooldown_epochs=10, lr_per="epoch", weight_decay=0.06, decay_pe=True,
                     label_smoothing=0.1, repeats=1, crop_scale=0.8, bicubic=0.5, flip=0.5, ra_ops=2, ra_magnitude=9,
                     mixup=0.8, cutmix=1.0, erase=0.25, erase_first=False)
    assert train.RECIPES["cifar100"] == published
    deit = dict(published, model="deit-tiny", image_size=224, epochs=300, batch_size=1024, lr=5e-4 * 1024 / 512,
                warmup_epochs=5, cooldown_epochs=0, weight_decay=0.05, decay_pe=False, repeats=3, crop_scale=0.08,
                bicubic=1, erase_first=True)
    assert train.RECIPES["imagenet"] == deit
    assert train.PIXELS["cifar100"] == ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))
    assert train.PIXELS["imagenet"] == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    off = dict(crop_scale=1, flip=0, ra_ops=0, mixup=0, cutmix=0, erase=0)      # a mirrored number is another one
    assert {key: train.RECIPES["numbers"][key] for key in off} == off


@pytest.mark.parametrize("decay_pe", [False, True])
@pytest.mark.parametrize("method", ["default", "mpvg", "mpvg-free", "mpvg-shift"])
def test_every_parameter_is_in_one_group(method, decay_pe):
    model = create("vit-nano", method)
    decayed, free = train.parameter_groups(model, 0.3, decay_pe)
    assert decayed["weight_decay"] == 0.3 and free["weight_decay"] == 0
    ids = [id(p) for group in (decayed, free) for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())
    inside = {id(p) for p in decayed["params"]}
    for name, parameter in model.named_parameters():
        expected = decay_pe if name in ("pos_embed", "cls_token", "last_pos_embed") else parameter.ndim > 1
        assert (id(parameter) in inside) == expected, name


def test_counts_are_printed(command):
    result = command("--epochs", 1)
    decayed, free = train.parameter_groups(create("vit-nano", "mpvg"), 0, False)
    for group in (decayed["params"], free["params"]):
        assert f"{sum(p.numel() for p in group):,} ({len(group)})" in result.output


def test_init_and_freeze(command, tmp_path):
    assert command("--epochs", 1, "--name", "first").exit_code == 0
    first = checkpoint(tmp_path / "runs" / "first")["model"]
    result = command("--epochs", 1, "--lr", 0, "--init", tmp_path / "runs" / "first", "--name", "same")
    assert result.exit_code == 0 and "first/last.pt, its head, too" in result.output, result.output
    torch.testing.assert_close(checkpoint(tmp_path / "runs" / "same")["model"], first, rtol=0, atol=0)
    result = command("--epochs", 1, "--init", tmp_path / "runs" / "first" / "best.pt", "--freeze", "--name", "probe")
    assert result.exit_code == 0 and f"{sum(v.numel() for v in first.values()) - 12_900:,}" in result.output
    probe = checkpoint(tmp_path / "runs" / "probe")["model"]
    for name, value in probe.items():
        assert torch.equal(value, first[name]) == (not name.startswith("head")), name
    ten = {**first, "head.weight": first["head.weight"][:10], "head.bias": first["head.bias"][:10]}
    torch.save(ten, tmp_path / "ten.pt")                                        # other classes: a new head
    result = command("--epochs", 1, "--lr", 0, "--init", tmp_path / "ten.pt", "--name", "ten")
    assert result.exit_code == 0, result.output
    assert "ten.pt, with a new head" in result.output
    moved = checkpoint(tmp_path / "runs" / "ten")["model"]
    assert moved["head.weight"].shape == (100, 128) and torch.equal(moved["pos_embed"], first["pos_embed"])
    flags = ["--model", "vit-nano", "--epochs", 1, "--lr", 0, "--init", tmp_path / "runs" / "first"]
    result = command(*flags, "--name", "other", data="cifar100")                # 100 classes as well, but others
    assert result.exit_code == 0 and "with a new head" in result.output, result.output
    moved = checkpoint(tmp_path / "runs" / "other")["model"]
    assert not torch.equal(moved["head.weight"], first["head.weight"])
    assert torch.equal(moved["pos_embed"], first["pos_embed"])


def test_eval_measures_again(command, tmp_path, monkeypatch):
    assert command("--epochs", 3, "--lr", 0.01, "--batch-size", 20).exit_code == 0
    folder, _ = run_folder(tmp_path)
    lines = log_of(folder)

    def evaluation(*flags):
        result = CliRunner().invoke(train.app, ["eval", *map(str, flags)])
        assert result.exit_code == 0, result.output
        return result.output
    last = f"test accuracy {lines[-1]['test_accuracy']:.2f} %, loss {lines[-1]['test_loss']:.4f}, 40 images"
    assert all(last in evaluation(*flags) for flags in ([folder], [folder, "--fold"], [folder / "last.pt"]))
    cut = dict(checkpoint(folder), epoch=2)
    (tmp_path / "cut").mkdir()
    torch.save(cut, tmp_path / "cut" / "last.pt")
    assert "is of epoch 2 of 3: not finished" in evaluation(tmp_path / "cut")
    best = checkpoint(folder, "best.pt")["epoch"]
    assert f"epoch {best}: test accuracy {lines[best - 1]['test_accuracy']:.2f} %" in evaluation(folder / "best.pt")
    larger = load_weights(create("vit-nano", "mpvg", image_size=48), folder / "last.pt").eval()
    x, y = make_numbers(40, 2)
    x = F.interpolate(train.normalise(x, "numbers"), size=(48, 48), mode="bicubic", antialias=True)
    expected = F.cross_entropy(larger(x), y).item()
    assert f"loss {expected:.4f}, 40 images" in evaluation(folder, "--image-size", 48)
    folded = []
    with monkeypatch.context() as patch:
        patch.setattr(train, "fold", lambda model: folded.append(fold(model)) or folded[0])
        evaluation(folder, "--fold")
    assert folded[0].folded
    torch.save(create("vit-nano", "mpvg").state_dict(), tmp_path / "bare.pt")
    for flags, says in (([folder / "log.jsonl"], "log.jsonl is damaged, or no checkpoint"),
                        ([tmp_path / "nowhere"], "nowhere cannot be read (No such file"),
                        ([folder, "--image-size", 33], "not divisible by patch_size"), ([tmp_path], "last.pt"),
                        ([tmp_path / "bare.pt"], "is no checkpoint of this train.py")):
        one_line(CliRunner().invoke(train.app, ["eval", *map(str, flags)]), says)


# ------------------------------------------------------------------------------------------- train.py: sweep, report

def test_a_subcommand_takes_its_flags_after_its_name(small, tmp_path):
    for name in ("sweep", "eval", "report"):
        one_line(CliRunner().invoke(train.app, ["--epochs", "3", name]), f"--epochs stands before {name}")
        one_line(CliRunner().invoke(train.app, ["--mpvg", name, "--help"]), f"--mpvg stands before {name}")
        assert CliRunner().invoke(train.app, [name, "--help"]).exit_code == 0


def rows_of(text):
    """-> cells of each line of the tables in a text."""
    return [[" ".join(cell.split()).strip("*") for cell in line.strip("|").split("|")]
            for line in text.splitlines() if line.startswith("| ")]


def tables(output):
    """-> title: {a row's name: its other cells} of what train.py prints."""
    found = re.findall(r"^(\w.*)\n\n((?:\|.*\n)+)", output, re.M)
    assert len(dict(found)) == len(found)
    return {title: {row[0]: row[1:] for row in rows_of(rows)[2:]} for title, rows in found}


def sweep(*flags):
    return CliRunner().invoke(train.app, ["sweep", *map(str, flags)])


@pytest.fixture
def commands(monkeypatch):
    """Collects what a sweep would start, and says of each that it went well."""
    class Fake:
        returncode, started, running, most, env = 0, [], 0, 0, None

        def __init__(self, command, env, **_):
            Fake.started.append(command[2:])
            Fake.running, Fake.env = Fake.running + 1, env
            Fake.most, self.polls = max(Fake.most, Fake.running), 0

        def poll(self):
            self.polls += 1
            Fake.running -= self.polls == 4                             # it takes a while
            return 0 if self.polls >= 4 else None

        def terminate(self):
            Fake.started.append("terminated")
    monkeypatch.setattr(subprocess, "Popen", Fake)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    return Fake.started


def test_jobs_run_side_by_side_and_share_the_cores(commands, monkeypatch, tmp_path):
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for jobs, threads in ((1, None), (3, "4")):
        subprocess.Popen.most = 0
        sweep("--methods", "gap,mpvg", "--seeds", 2, "--jobs", jobs, "--data", "numbers", "--runs", tmp_path)
        assert subprocess.Popen.most == jobs and subprocess.Popen.env.get("OMP_NUM_THREADS") == threads
    assert (tmp_path / "gap-vit-nano-numbers-seed0.txt").exists()


def test_a_sweep_passes_sigterm_on(commands, monkeypatch, tmp_path):
    monkeypatch.setattr(time, "sleep", lambda seconds: os.kill(os.getpid(), signal.SIGTERM))
    result = sweep("--methods", "gap,mpvg", "--seeds", 2, "--data", "numbers", "--runs", tmp_path)
    assert result.exit_code == 143 and "stopped by SIGTERM: the same command goes on" in result.output
    assert commands[1:] and {*map(str, commands[1:])} == {"terminated"}         # no other run was begun


def test_sweep_plans_every_pair(commands, tmp_path):
    shared = ["--data", "numbers", "--lr", "0.01", "--runs", str(tmp_path / "runs")]
    one_line(sweep("--methods", "lape,mpvg", "--seeds", 2, *shared), "4 of 4 runs failed")  # none left a finished run
    assert commands == [[*shared, f"--method={method}", "--seed", seed, "--resume"]
                        for method in ("lape", "mpvg") for seed in ("0", "1")]


@pytest.mark.parametrize("name, model, labels", [
    ("fig1", "vit-lite", ["default", "lape", "gap", "lape-gap", "mpvg"]),
    ("fig5", "vit-lite", ["gap", "gap-last-pe", "pvg", "mpvg"]),
    ("table5", "vit-lite", ["pvg", "mpvg-last_pe=6", "mpvg-last_pe=4", "mpvg-last_pe=2", "mpvg"]),
    ("table5", "deit-tiny", ["pvg", "mpvg-last_pe=11", "mpvg-last_pe=8", "mpvg-last_pe=5", "mpvg"]),
    ("table6", "vit-nano", ["mpvg", "mpvg-hierarchical=False", "mpvg-layer0=True", "mpvg-add_input=False"]),
    ("controls", "vit-nano", ["pvg", "mpvg", "mpvg-free", "mpvg-shift"]),
])
def test_sets_are_the_papers(commands, monkeypatch, tmp_path, name, model, labels):
    seen = []
    monkeypatch.setattr(train, "results", lambda runs, order, base: seen.append(order) or base)
    monkeypatch.setattr(train, "finished_runs", dict.fromkeys)
    monkeypatch.setitem(MODELS, "deit-tiny", dict(MODELS["deit-tiny"], image_size=32))  # ImageNet comes later
    result = sweep("--set", name, "--seeds", 1, "--model", model, "--data", "cifar100", "--runs", tmp_path)
    assert result.exit_code == 0 and seen == [labels] and len(commands) == len(labels), result.output
    assert (tmp_path / "sweep.md").read_text() == labels[0]
    if model != "vit-nano":
        paper = train.PAPER[model, "imagenet" if model == "deit-tiny" else "cifar100"]
        assert (model == "vit-lite") or {*labels} <= {*paper}


def write_run(folder, accuracies, finished=True, **config):
    folder.mkdir(parents=True)
    recipe = train.RECIPES[config.get("data", "cifar100")]
    config = dict(dict(recipe, data="cifar100", method="mpvg", overrides={}, seed=0, drop_path=None, attn_drop=None,
                       fraction=1.0, freeze=False, init=None, precision="fp32", environment={}), **config)
    accuracies = [0.0] * (config["epochs"] - len(accuracies)) * finished + accuracies
    (folder / "config.json").write_text(json.dumps(config))
    log = [dict(epoch=i + 1, test_accuracy=a, loss=1.0, seconds=10.0 * (i + 1)) for i, a in enumerate(accuracies)]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))


def test_the_table_of_finished_runs(tmp_path):
    for seed, (first, second) in enumerate([(70.0, 73.0), (71.0, 73.5), (72.0, 75.5)]):
        write_run(tmp_path / f"a{seed}", [80.0, first], method="default", seed=seed)
        write_run(tmp_path / f"b{seed}", [1.0, second], seed=seed)
    write_run(tmp_path / "c", [1.0, 74.0], method="lape", seed=7)               # no pair: no difference
    write_run(tmp_path / "d", [50.0, 60.0], overrides={"layer0": True})
    write_run(tmp_path / "e", [50.0], finished=False, method="pvg", seed=1)
    write_run(tmp_path / "f", [10.0, 20.0], method="pvg", lr=0.1)               # another setting: another table
    (tmp_path / "other").mkdir()
    (tmp_path / "sweep.md").write_text("what a sweep leaves")
    result = sweep("--from", tmp_path)
    assert result.exit_code == 0, result.output
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in result.output.splitlines() if "|" in line]
    assert rows[0] == ["method", "n", "last epoch %", "minus default", "best epoch %", "seconds", "parameters",
                       "paper %"]
    assert rows[2] == ["default", "3", "71.00 +- 1.00", "", "80.00", "3100", "3,740,004", "74.90"]
    assert rows[3] == ["lape", "1", "74.00", "", "74.00", "3100", "3,743,588", "75.52"]
    half = 4.303 * np.std([3, 2.5, 3.5], ddof=1) / 3 ** 0.5
    assert rows[4] == ["mpvg", "3", "74.00 +- 1.32", f"+3.00 +- {half:.2f}", "74.00", "3100", "3,743,076", "76.87"]
    assert rows[5] == ["mpvg-layer0=True", "1", "60.00", "-10.00", "60.00", "3100", "3,743,588", ""]
    assert rows[8] == ["pvg", "1", "20.00", "", "20.00", "3100", "3,742,564", ""] and len(rows) == 9
    assert rows[6][3] == "minus pvg" and max(map(len, result.output.splitlines())) <= 110
    result_to = sweep("--from", tmp_path, "--base", "mpvg")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in result_to.output.splitlines() if "|" in line]
    assert [rows[0][3], *(row[3] for row in rows[2:6])] == ["minus mpvg", f"-3.00 +- {half:.2f}", "", "", "-13.00"]
    one_line(sweep("--from", tmp_path, "--base", "pgv"), "no finished run of --base pgv, but of default, mpvg, lape,")
    write_run(tmp_path / "again", [50.0, 60.0], overrides={"layer0": True})
    one_line(sweep("--from", tmp_path), "two runs of mpvg-layer0=True have seed 0 and the same flags")
    (tmp_path / "again" / "config.json").write_text('{"data": "cifar100", "epochs": 310}')
    one_line(sweep("--from", tmp_path), "again is no run of this train.py")
    titles = [line for line in result.output.splitlines() if line.startswith("vit-lite")]
    assert titles == ["vit-lite, cifar100, 310 epochs, fp32", "vit-lite, cifar100, 310 epochs, fp32, lr 0.1"]


def test_a_folders_table_is_joined_by_what_report_has_measured(tmp_path):
    """Averaged over the runs of a row, apart for each setting; only of the runs that are there, as they are."""
    measured = {}
    for name, config, beta, correlation in (
            ("a", dict(method="mpvg", seed=0), 0.1, [None, -0.5, 0.25]), ("c", dict(method="default"), 0.3, [None] * 3),
            ("b", dict(method="mpvg", seed=1), 0.2, [None, -0.7, 0.35]), ("d", dict(epochs=15), 0.4, [None, 0, None]),
            ("gone", dict(method="lape"), 0.5, [0.0] * 3), ("new", dict(method="pvg"), None, None),
            ("again", dict(method="lape"), 0.6, [0.0] * 3)):
        if name != "gone":
            write_run(tmp_path / name, [50.0], **config)
        if name != "new":
            measured[name] = dict(beta_variance=beta, offset_variance=2 * beta, cosine=3 * beta,
                                  correlation=correlation, test_accuracy=49.0 if name == "again" else 50.0)
    (tmp_path / "report").mkdir()
    assert "correlation" not in sweep("--from", tmp_path).output
    (tmp_path / "report" / "report.json").write_text(json.dumps(measured))
    output = sweep("--from", tmp_path).output
    assert output.splitlines()[-2].endswith("report.json is not of these runs as they are now: again, new")
    shown = tables(output)
    long, short = "vit-lite, cifar100, 310 epochs, fp32", "vit-lite, cifar100, 15 epochs, fp32"
    assert [*shown[long]] == ["default", "lape", "pvg", "mpvg"] and [*shown[short]] == ["mpvg"]
    assert shown[f"{long}: last norm"] == {
        "default": ["1", "0.30000", "0.60000", "0.900"],
        "mpvg": ["2", "0.15000 +- 0.07071", "0.30000 +- 0.14142", "0.450 +- 0.212"]}
    assert shown[f"{long}: correlation in blocks"] == {"default": [""] * 3, "mpvg": ["", "-0.60", "+0.30"]}
    assert shown[f"{short}: last norm"] == {"mpvg": ["1", "0.40000", "0.80000", "1.200"]}
    assert shown[f"{short}: correlation in blocks"] == {"mpvg": ["", "+0.00", ""]}
    assert "| method | 0 | 1 " in output
    for wrong in ("{", "5", '["a"]', '{"a": {}}', '{"a": {"test_accuracy": 50.0, "correlation": null}}'):
        (tmp_path / "report" / "report.json").write_text(wrong)
        one_line(sweep("--from", tmp_path), "report.json is not what this train.py's report writes")
    (tmp_path / "report" / "report.json").write_text("{}")
    assert "as they are now: a, again, b, c, d, new" in sweep("--from", tmp_path).output


def test_the_table_of_imagenet_shows_both_crops_and_the_papers_figures(tmp_path):
    for method, accuracy in (("default", 70.0), ("mpvg", 71.0)):
        write_run(tmp_path / method, [accuracy], method=method, data="imagenet", num_classes=1000)
        log = log_of(tmp_path / method)
        log[-1]["full_crop_accuracy"] = accuracy + 0.25
        (tmp_path / method / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in sweep("--from", tmp_path).output.splitlines()
            if "|" in line]
    assert rows[0][4:6] == ["best epoch %", "full crop %"] and [row[5] for row in rows[2:]] == ["70.25", "71.25"]
    assert [row[-2:] for row in rows[2:]] == [["5,717,416", "72.14"], ["5,721,640", "73.51"]]
    write_run(tmp_path / "ten", [50.0], data="imagenet", num_classes=10)        # not the paper's ImageNet
    rows = [line for line in sweep("--from", tmp_path).output.splitlines() if "num_classes 10" in line]
    assert rows == ["deit-tiny, imagenet, 300 epochs, fp32, num_classes 10"]


def test_student_t():
    """Half the interval of values whose standard error is 1: the t quantile itself; tables: 2.776, 2.060, 1.984."""
    for n, t in ((5, 2.776), (26, 2.060), (101, 1.984)):
        values = torch.linspace(-1, 1, n).double()
        values = (values / values.std() * n ** 0.5).tolist()
        assert train.interval(values) == pytest.approx(t, rel=2e-3)


@pytest.mark.parametrize("flags, says", [
    (["--from", "nowhere"], "nowhere holds no finished run"),
    (["--from", ".", "--seeds", "2"], "leave out the other flags"),
    (["--from", ".", "--epochs", "2"], "leave out the other flags"),
    (["--methods", "mpvg", "--set", "fig1"], "--methods and --set both"),
    (["--methods", "mpvg,rope"], "unknown method 'rope'"), (["--methods", "mpvg,"], "unknown method ''"),
    (["--model", "deit-tiny", "--data", "numbers"], "use vit-lite or vit-nano"),
    (["--seed", "1"], "sweep sets --seed itself"), (["--method", "mpvg"], "sweep sets --method itself"),
    (["--name", "x"], "sweep sets --name itself"), (["--overwrite"], "sweep sets --overwrite itself"),
    (["--lr", "inf"], "--lr must be a finite number"), (["--runs", __file__], "choose another --runs"),
    (["--methods", "lape,mpvg", "--last-pe", "0"], "use pool='gap'"),
    (["--methods", "lape,mpvg", "--base", "pvg"], "--base pvg is none of this sweep's rows: lape, mpvg"),
], ids=str)
def test_a_sweeps_mistake_ends_it_before_the_first_run(commands, flags, says):
    one_line(sweep("--device", "cpu", *flags) if "--from" not in flags else sweep(*flags), says)
    assert commands == []
    for wrong in (["--surplus", "1"], ["--set", "fig9"], ["lape"], ["--methods", "default,", "lape"], ["report"]):
        assert sweep(*wrong).exit_code == 2
    assert commands == []


def test_a_run_that_fails_is_named_and_the_first_row_stays_the_base(monkeypatch, commands, tmp_path):
    for method in ("lape", "mpvg"):
        name = f"{method}-vit-nano-numbers-seed0"                               # finished, but lape's exit code is 2
        write_run(tmp_path / name, [50.0], model="vit-nano", data="numbers", method=method)
    monkeypatch.setattr(subprocess.Popen, "returncode", property(lambda self: 2 if len(commands) == 1 else 0))
    result = sweep("--methods", "lape,mpvg", "--seeds", 1, "--data", "numbers", "--runs", tmp_path)
    assert result.exit_code == 2 and "1 of 2 runs failed and are not in the table: lape-vit-nano" in result.stderr
    table = (tmp_path / "sweep.md").read_text()
    assert "minus lape" in table and "| mpvg" in table and "| lape" not in table
    flags = ["--methods", "lape,mpvg", "--seeds", 1, "--data", "numbers", "--runs", tmp_path]
    assert sweep(*flags, "--base", "mpvg").exit_code == 0
    table = (tmp_path / "sweep.md").read_text()
    assert "minus mpvg" in table and "| lape" in table
    monkeypatch.setattr(subprocess.Popen, "returncode", 2)
    result = sweep(*flags, "--jobs", 2)
    assert result.exit_code == 2 and result.stdout.count("failed, see") == 2
    assert f"failed, see {tmp_path}/lape-vit-nano-numbers-seed0.txt" in result.stdout


def test_a_real_sweep_side_by_side(tmp_path):
    """Processes of their own, two at once."""
    flags = ["--methods", "gap,mpvg", "--seeds", "1", "--jobs", "2", "--data", "numbers", "--device", "cpu",
             "--fraction", "0.01", "--epochs", "1", "--runs", str(tmp_path)]
    result = subprocess.run([sys.executable, "train.py", "sweep", *flags], cwd=Path(__file__).parent,
                            capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    table = (tmp_path / "sweep.md").read_text()
    assert table in result.stdout and table in sweep("--from", tmp_path).output
    for method in ("gap", "mpvg"):
        name = f"{method}-vit-nano-numbers-seed0"
        assert f"| {method}" in table and checkpoint(tmp_path / name)["epoch"] == 1
        assert f"finished {tmp_path / name}.txt" in result.stdout
        assert "300 to train, 4,000 to test" in (tmp_path / f"{name}.txt").read_text()


@pytest.mark.parametrize("name", ["eval", "report"])
def test_data_dir_and_device_reach_eval_and_report(command, tmp_path, monkeypatch, name):
    assert command("--model", "vit-nano", "--epochs", 1, data="cifar100").exit_code == 0
    roots, (folder, _) = [], run_folder(tmp_path)
    monkeypatch.setattr(train, "cifar100", lambda root, train: roots.append(root) or make_numbers(40, 2))
    out = ["--out", str(tmp_path / "out")] if name == "report" else []
    result = CliRunner().invoke(train.app, [name, str(folder), "--data-dir", "here", "--device", "cpu", *out])
    assert result.exit_code == 0 and {*roots} == {Path("here")}, result.output
    one_line(CliRunner().invoke(train.app, [name, str(folder), "--device", "abacus"]), "unknown --device 'abacus'")


@pytest.mark.parametrize("method", ["default", "mpvg", "mpvg-shift"])
def test_measure_is_what_it_says(method):
    model = tiny(method)
    batches = [images(3, seed=1), images(2, seed=2)]
    found = train.measure(model, batches)
    p, x = model.state_dict(), torch.cat(batches)
    per_block, last = model.delivered_pe()
    stream, streams = model.patch_embed(x).flatten(2).transpose(1, 2), []
    if method == "default":
        stream = torch.cat([p["cls_token"].expand(5, 1, -1), stream], dim=1)
    stream = stream + p["pos_embed"]
    for block, e in zip(model.blocks, per_block):
        streams.append(layer_norm(stream, p, f"blocks.{len(streams)}.norm1"))
        stream = block(stream, e)
    streams.append(layer_norm(stream, p, "norm"))
    for i, (mine, e) in enumerate(zip(streams, [*per_block, last])):
        torch.testing.assert_close(found["tokens"][i], mine.mean(0), rtol=1e-8, atol=1e-8)
        assert (found["pe"][i] is None) == (found["correlation"][i] is None) == (e is None)
        if e is not None:
            e = e.detach().broadcast_to(1, *mine.shape[1:])[0]
            r = np.corrcoef(mine.mean(0).detach().flatten(), e.flatten())[0, 1]
            assert found["correlation"][i] == pytest.approx(r, abs=1e-6)
    before, after = stream.mean(1), streams[-1].mean(1)
    cosine = (before * after).sum(1) / before.norm(dim=1) / after.norm(dim=1)
    assert found["cosine"] == pytest.approx(cosine.mean().item())
    offset = p["norm.bias"] + (0 if last is None else last.detach().reshape(-1, 16).mean(0))
    torch.testing.assert_close(found["offset"], offset)
    assert torch.equal(found["beta"], p["norm.bias"]) and torch.equal(found["gamma"], p["norm.weight"])
    assert not model.norm._forward_hooks
    assert not any(t.requires_grad for t in [*found["tokens"], *(e for e in found["pe"] if e is not None)])


def test_report_writes_numbers_and_draws_them(command, tmp_path, monkeypatch):
    for method in ("default", "mpvg"):
        assert command("--epochs", 2, "--method", method).exit_code == 0
    folders = [str(folder) for folder in sorted((tmp_path / "runs").iterdir())]
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = CliRunner().invoke(train.app, ["report", *folders, "--out", str(tmp_path / "bare"), "--images", "10"])
    assert result.exit_code == 0 and "the figures need matplotlib" in result.output, result.output
    assert [path.name for path in (tmp_path / "bare").iterdir()] == ["report.json"]
    numbers = json.loads((tmp_path / "bare" / "report.json").read_text())
    assert [*numbers] == ["default-vit-nano-numbers-seed0", "mpvg-vit-nano-numbers-seed0"]
    found = numbers["mpvg-vit-nano-numbers-seed0"]
    norm, _ = tables(result.output).values()
    assert norm["mpvg"] == ["1"] + [f"{found[key]:.{digits}f}" for key, digits in (
        ("beta_variance", 5), ("offset_variance", 5), ("cosine", 3))]
    assert found["test_accuracy"] == log_of(Path(folders[1]))[-1]["test_accuracy"]
    model = load_weights(create("vit-nano", "mpvg"), Path(folders[1]) / "last.pt").eval()
    expected = train.measure(model, [train.normalise(make_numbers(40, 2)[0][:10], "numbers")])
    assert found["correlation"] == pytest.approx(expected["correlation"], abs=1e-5) and found["correlation"][0] is None
    assert found["offset"] == pytest.approx(expected["offset"].tolist(), abs=1e-5) and len(found["beta"]) == 128
    assert found["beta_variance"] == pytest.approx(np.var(found["beta"], ddof=1))
    both = [f"{folders[1]}/{name}" for name in ("last.pt", "best.pt")]         # not two seeds: a line each
    output = CliRunner().invoke(train.app, ["report", *both, "--out", str(tmp_path / "two"), "--images", "10"]).output
    norm, _ = tables(output).values()
    assert [*norm] == [f"mpvg-vit-nano-numbers-seed0-{name}" for name in ("best", "last")]
    monkeypatch.undo()
    one_line(CliRunner().invoke(train.app, ["report", folders[0], folders[0]]), "two runs are called default-")
    subprocess.run(["cp", "-r", folders[0], tmp_path / "copy"], check=True)     # nor is this another seed
    one_line(CliRunner().invoke(train.app, ["report", folders[0], str(tmp_path / "copy")]),
             "or are default with the same flags and seed: report them apart")
    one_line(CliRunner().invoke(train.app, ["report", str(tmp_path)]), "last.pt")
    one_line(CliRunner().invoke(train.app, ["report", str(tmp_path), str(tmp_path)]), "last.pt")
    monkeypatch.chdir(tmp_path)
    for _ in range(2):                                                          # its own folder is among runs/*/
        result = CliRunner().invoke(train.app, ["report", *map(str, Path().glob("runs/*")), "--images", "1"])
        assert result.exit_code == 0, result.output
        assert {*json.loads(Path("runs/report/report.json").read_text())} == {*numbers}
    assert result.stderr.startswith("note: left out, without a last.pt: runs/report\n")


def test_the_figures(command, tmp_path):
    pytest.importorskip("matplotlib")
    assert command("--epochs", 2, "--method", "mpvg-shift").exit_code == 0
    folder, _ = run_folder(tmp_path)
    result = CliRunner().invoke(train.app, ["report", str(folder), "--out", str(tmp_path / "out")])
    assert result.exit_code == 0 and "numbers and figures in" in result.output, result.output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "correlation.png", "curves.png", "last_norm.png", f"layers-{folder.name}.png", "report.json"]
    assert all(min(Image.open(path).size) > 300 for path in (tmp_path / "out").glob("*.png"))


# --------------------------------------------------------------------------------- train.py: image files, processes

def photo(height, width, seed):
    """float (height, width, 3): clouds of colour and noise."""
    generator = torch.Generator().manual_seed(seed)
    clouds = F.interpolate(torch.rand(1, 3, 5, 7, generator=generator), size=(height, width), mode="bicubic")
    noise = 0.05 * torch.randn(3, height, width, generator=generator)
    return (255 * (clouds[0] + noise)).clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An ImageFolder of three classes with 17 files each to train on and 5 to test: JPEGs of several sizes, one of them
    CMYK, one grey; in class b one is cut off and one empty, for training and testing."""
    root = tmp_path_factory.mktemp("files")
    for split, count in (("train", 17), ("val", 5)):
        for label, name in enumerate("abc"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                image = Image.fromarray(photo(50 + 7 * (i % 4), 80 - 9 * (i % 5), 100 * label + i))
                image = image.convert({1: "CMYK", 2: "L"}.get(i, "RGB"))
                image.save(root / split / name / f"{i:02d}.JPEG", quality=95)
        whole = (root / split / "b" / "03.JPEG").read_bytes()
        (root / split / "b" / "03.JPEG").write_bytes(whole[:len(whole) // 2])
        (root / split / "b" / "04.JPEG").write_bytes(b"")
    return root


def files(root, split="train"):
    return torchvision.datasets.ImageFolder(Path(root) / split).samples


FILES = ["--model", "vit-nano", "--image-size", "32", "--batch-size", "12", "--epochs", "3", "--lr", "0.004",
         "--lr-per", "step"]
SMALL = dict(train.RECIPES["imagenet"], data="imagenet", image_size=32, batch_size=12, seed=3, fraction=1.0,
             num_classes=3)


def test_workers_crop_as_pillow_does(folder):
    samples, indices = files(folder), [0, 1, 0, 1, 2, 16]
    x, y, unreadable = train.Crops(samples, 48, 0.08, 1.0)[indices, 77]
    assert x.shape == (6, 3, 48, 48) and x.dtype == torch.uint8 and y.tolist() == [0] * 6 and not unreadable
    for place, index in enumerate(indices):
        image = Image.open(samples[index][0]).convert("RGB")
        torch.manual_seed(77 + place)
        top, left, h, w = torchvision.transforms.RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3])
        theirs = image.crop((left, top, left + w, top + h)).resize((48, 48), Image.Resampling.BICUBIC)
        difference = (x[place].int() - torch.from_numpy(np.array(theirs)).permute(2, 0, 1).int()).abs()
        assert difference.max() <= 2 and difference.float().mean() < 0.5, (place, difference.max())
    assert not torch.equal(x[0], x[2])                                          # a crop of its own each time
    linear = train.Crops(samples, 48, 0.08, 0.0)[indices, 77][0]
    assert not torch.equal(linear, x)


def test_workers_show_two_views_of_a_test_image(folder):
    samples = files(folder, "val")
    x, y, _ = train.Crops(samples, 42, None, 1.0)[[0, 2, 11], 0]
    assert x.shape == (3, 2, 3, 42, 42) and y.tolist() == [0, 0, 2]
    for views, index in zip(x, (0, 2, 11)):
        for view, short in zip(views, (48, 42)):                                # crop ratio 0.875, and 1
            image = Image.open(samples[index][0]).convert("RGB")
            scale = short / min(image.size)
            width, height = (max(short, int(side * scale)) for side in image.size)
            left, top = round((width - 42) / 2), round((height - 42) / 2)
            theirs = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + 42, top + 42))
            difference = (view.int() - torch.from_numpy(np.array(theirs)).permute(2, 0, 1).int()).abs()
            assert difference.max() <= 2, (index, short)


def test_a_file_is_decoded_once_for_all_of_its_crops(folder, monkeypatch):
    opened, real = [], Image.open
    monkeypatch.setattr(Image, "open", lambda path: opened.append(path) or real(path))
    train.Crops(files(folder), 32, 0.08, 1.0)[[0, 1, 0, 1, 0, 1, 2, 5, 2, 5, 2, 5], 1]
    assert len(opened) == 4


def test_what_cannot_be_decoded_is_named_counted_and_replaced(folder, capsys):
    samples = files(folder)
    paths = [path for path, _ in samples]
    cut, empty = (next(i for i, path in enumerate(paths) if path.endswith(f"b/{name}")) for name in
                  ("03.JPEG", "04.JPEG"))
    data = train.Folder(samples, 32, torch.device("cpu"), 0, 0.08)
    for _ in range(2):
        x, y = next(data.load([([cut, 0, empty, 1], 5)]))
        instead = train.Crops(samples, 32, 0.08, 1.0)[[empty + 1, 0, empty + 1, 1], 5]
        assert torch.equal(x, instead[0]) and y.tolist() == [1, 0, 1, 0]
    warned = capsys.readouterr().err.splitlines()
    assert len(warned) == 2 and data.failures == 4                              # each named once, counted every time
    for line, index, reason in zip(warned, (cut, empty), ("image file is truncated", "cannot identify image")):
        assert line.startswith(f"warning: {paths[index]} cannot be decoded and is replaced by the next one ({reason}")

    test = train.Folder(files(folder, "val"), 32, torch.device("cpu"), 0)
    (x, y), = test.test_batches()
    assert y.tolist() == [0] * 5 + [1, 1, 1, -1, -1] + [2] * 5
    assert capsys.readouterr().err.count(" cannot be decoded and is left out (") == 2
    model, seen = create("vit-nano", "mpvg", num_classes=3).eval(), (y >= 0)
    found = train.evaluate(model, test, "imagenet", torch.device("cpu"))
    for view, prefix in enumerate(("test", "full_crop")):
        logits = model(train.normalise(x[seen, view], "imagenet"))
        assert found[f"{prefix}_accuracy"] == pytest.approx(100 * (logits.argmax(1) == y[seen]).float().mean().item())
        assert found[f"{prefix}_loss"] == pytest.approx(F.cross_entropy(logits, y[seen]).item(), rel=1e-5)


def test_a_disk_that_is_gone_ends_the_run(folder, command, monkeypatch):
    real = Image.open
    opened = []

    def vanish(path):
        opened.append(path)
        if len(opened) > 15:
            raise FileNotFoundError(2, "No such file or directory", path)
        return real(path)
    monkeypatch.setattr(Image, "open", vanish)
    result = command("--data-dir", folder, *FILES, data="imagenet")
    assert result.exit_code == 2 and "error: " in result.stderr, result.output
    assert result.stderr.splitlines()[-1].endswith("be decoded: are they images, and is their disk still there?")
    assert result.stderr.count("warning: ") == 11 and "warning: others like it are only counted" in result.stderr
    few = train.Folder(files(folder)[20:22], 32, torch.device("cpu"), 0, 0.08)   # fewer than 20, and all are damaged
    with pytest.raises(typer.Exit):
        next(few.load([([0, 1], 0)]))


@pytest.mark.parametrize("data", ["files", "arrays"])
def test_how_a_batch_is_shared_out_changes_nothing(folder, monkeypatch, data):
    """Batches of one process beside those of two, three, and of parts: the same images, bit for bit."""
    cpu = torch.device("cpu")
    if data == "files":
        config, source = dict(SMALL), train.Folder(files(folder), 32, cpu, 0, 0.08)
    else:
        config, source = dict(RECIPE, batch_size=12, seed=3), train.Arrays(*make_numbers(50, 1))

    def batches(rank, processes, parts, first=0):
        monkeypatch.setattr(train, "RANK", rank)
        monkeypatch.setattr(train, "PROCESSES", processes)
        return [*zip(*train.epoch_batches(config, source, 2, first, 100, parts))]
    whole_x, whole_y = (torch.stack(t) for t in batches(0, 1, 1))
    assert whole_x.shape == (4, 12, 3, 32, 32) and whole_y.shape == (4, 12, 100)
    for processes, parts in ((1, 3), (2, 1), (3, 2)):
        shares = [batches(rank, processes, parts) for rank in range(processes)]
        for whole, share in ((whole_x, 0), (whole_y, 1)):
            steps = [torch.stack(s[share]).view(4, 12 // processes, *whole.shape[2:]) for s in shares]
            assert torch.equal(torch.cat(steps, dim=1), whole), (processes, parts)
    assert torch.equal(torch.stack(batches(1, 2, 1, first=3)[0]), whole_x[3:, 6:])   # on from the last step
    assert not torch.equal(torch.stack([*zip(*train.epoch_batches(config, source, 3, 0, 100, 1))][0])[:, :6],
                           whole_x[:, :6])                                      # another epoch


def test_testing_is_shared_out_once(folder, monkeypatch):
    monkeypatch.setattr(train, "PROCESSES", 3)
    for source in (train.Arrays(*make_numbers(40, 2)), train.Folder(files(folder, "val"), 32, torch.device("cpu"), 0)):
        shares = []
        for rank in range(3):
            monkeypatch.setattr(train, "RANK", rank)
            shares += [image for x, _ in source.test_batches(5) for image in x]
        monkeypatch.setattr(train, "RANK", 0)
        monkeypatch.setattr(train, "PROCESSES", 1)
        whole = [image for x, _ in source.test_batches() for image in x]
        monkeypatch.setattr(train, "PROCESSES", 3)
        assert sorted(image.numpy().tobytes() for image in shares) == sorted(x.numpy().tobytes() for x in whole)


def test_repeated_augmentation_and_partners(folder):
    class Data(train.Arrays):                                                   # tells what it is asked for
        def pieces(self, order, *rest):
            self.order = order
            return super().pieces(order, *rest)
    for repeats in (1, 2, 3):
        data = Data(*make_numbers(100, 1))
        config = dict(RECIPE, batch_size=22, repeats=repeats, seed=0)
        assert len([*train.epoch_batches(config, data, 0, 0, 100, 1)]) == 4
        places, order = data.order.flatten().tolist(), torch.Generator().manual_seed(0)
        order = torch.randperm(100, generator=order).tolist()
        counts = torch.tensor(places).bincount(minlength=100)
        assert counts.max() == repeats and (counts > 0).sum() == -(-88 // (2 * repeats)) * 2 or repeats == 3
        assert {*places} == {*order[:len({*places})]}                           # the first of a permutation
        assert all(a != b for a, b in zip(places[::2], places[1::2]))           # never mixed with itself
        assert places[:6] == [order[i] for i in ([0, 1, 2, 3, 4, 5], [0, 1, 0, 1, 2, 3], [0, 1] * 3)[repeats - 1]]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_on_files_leaves_its_record(folder, command, tmp_path, monkeypatch, workers):
    started, real = [], train.DataLoader
    monkeypatch.setattr(train, "DataLoader", lambda *args, **how: started.append(how["num_workers"]) or real(
        *args, **how))
    flags = ["--data-dir", folder, *FILES, "--workers", workers, "--batch-size", 24, "--epochs", 2]
    result = command(*flags, data="imagenet")
    assert result.exit_code == 0, result.output
    assert "batch     24 images = 1 (processes) x 1 (parts) x 24; peak lr 0.004\n" in result.output
    assert result.stderr.count("warning: ") >= 2 and "51 to train, 15 to test" in result.output
    assert f"in the last epoch {log_of(run_folder(tmp_path)[0])[-1]['unreadable']} times a file could" in result.stdout
    run, config = run_folder(tmp_path)
    assert (config["num_classes"], config["image_size"]) == (3, 32) and started == [workers] * 2
    lines, saved = log_of(run), checkpoint(run)
    assert [line["epoch"] for line in lines] == [1, 2] and all(line["unreadable"] >= 2 for line in lines)
    assert result.stdout.strip().endswith(f"; at a full crop {lines[-1]['full_crop_accuracy']:.2f} %")
    model = load_weights(create("vit-nano", "mpvg", image_size=32, num_classes=3), saved).eval()
    test = train.Folder(files(folder, "val"), 32, torch.device("cpu"), 0)
    found = train.evaluate(model, test, "imagenet", torch.device("cpu"))
    assert {key: lines[-1][key] for key in found} == pytest.approx(found, rel=1e-4)
    again = CliRunner().invoke(train.app, ["eval", str(run), "--data-dir", str(folder), "--device", "cpu"])
    assert ("test accuracy {test_accuracy:.2f} %, loss {test_loss:.4f} (at a full crop {full_crop_accuracy:.2f} %, "
            "{full_crop_loss:.4f}), 15 images").format(**lines[-1]) in again.output
    larger = CliRunner().invoke(train.app, ["eval", str(run), "--data-dir", str(folder), "--image-size", "40",
                                            "--device", "cpu"])
    assert larger.exit_code == 0 and f"loss {lines[-1]['test_loss']:.4f}" not in larger.output
    report = ["report", str(run), "--data-dir", str(folder), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert CliRunner().invoke(train.app, report).exit_code == 0
    (x, y), = test.test_batches()
    expected = train.measure(model, [train.normalise(x[y >= 0, 0], "imagenet")])
    numbers = json.loads((tmp_path / "out" / "report.json").read_text())[run.name]
    assert numbers["cosine"] == pytest.approx(expected["cosine"], rel=1e-4)
    if not workers:                                                             # other size, other classes
        fine = [*flags, "--init", run, "--image-size", "48", "--name", "fine", "--lr", 0]
        result = command(*fine, data="imagenet")
        assert result.exit_code == 0 and "its head, too" in result.output, result.output
        model = load_weights(create("vit-nano", "mpvg", image_size=48, num_classes=3), saved)
        torch.testing.assert_close(checkpoint(tmp_path / "runs" / "fine")["model"], dict(model.state_dict()))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
def test_a_run_on_files_killed_and_resumed_is_the_same_run(folder, command, tmp_path, monkeypatch):
    flags = ["--data", "imagenet", "--device", "cpu", "--data-dir", str(folder), *FILES, "--workers", "1",
             "--drop-path", "0.2", "--runs", str(tmp_path / "runs"), "--name"]
    assert command(*flags[4:], "whole", data="imagenet").exit_code == 0
    real, ends = train.lr_at, []

    def planted(step, kind, seen, *args, **kwargs):
        seen.append(0)
        if len(seen) == step:
            os.kill(os.getpid(), kind)
        return real(*args, **kwargs)
    for step, kind in ((7, signal.SIGKILL), (2, signal.SIGTERM), (3, signal.SIGINT), (0, 0)):  # of 4 an epoch
        monkeypatch.setattr(train, "lr_at", partial(planted, step, kind, []))
        process = start([*flags, "killed", "--resume"])
        process.join()
        ends.append(process.exitcode)
    assert ends == [-9, 143, 130, 0]
    equal_runs(tmp_path / "runs" / "whole", tmp_path / "runs" / "killed")


@pytest.mark.parametrize("damage, says", [
    (lambda root: (root / "val" / "c").rename(root / "val" / "d"), "train/ and val/ have different classes (only in "
     "train/: c; only in val/: d): sort val/'s images"),
    (lambda root: [path.unlink() for path in (root / "train" / "a").iterdir()], "cannot be read as ImageNet, "
     "train/CLASS/*.JPEG and val/CLASS/*.JPEG (Found no valid file for the classes a."),
    (lambda root: [path.unlink() for path in (root / "val" / "c").iterdir()], "Found no valid file for the classes c"),
    (lambda root: (root / "val").rename(root / "test"), "val'): give the folder that holds both"),
])
def test_a_folder_that_is_no_imagenet_is_refused_before_the_first_step(folder, command, tmp_path, damage, says):
    subprocess.run(["cp", "-r", folder, tmp_path / "copy"], check=True)
    damage(tmp_path / "copy")
    one_line(command("--data-dir", tmp_path / "copy", *FILES, data="imagenet"), says)
    assert not (tmp_path / "runs").exists()


def test_flags_reach_the_workers(folder, monkeypatch):
    config = dict(SMALL, crop_scale=0.3, bicubic=0.25, image_size=40, fraction=0.5, classes=train.digest("abc"))
    data = train.load_data(config, folder)
    crops = data["train"].loader.dataset
    assert (crops.size, crops.crop_scale, crops.bicubic) == (40, 0.3, 0.25) and data["train"].loader.num_workers == 0
    assert torch.tensor([label for _, label in crops.samples]).bincount().tolist() == [8] * 3  # of 17
    assert data["test"].loader.dataset.crop_scale is None and len(data["test"]) == 15
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(24), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert [train.default_workers(torch.device(name)) for name in ("cpu", "cuda")] == [0, 6]


@pytest.mark.parametrize("error, says", [
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. \nmore"), "Killed. ): is memory, or shared"),
    (torch.OutOfMemoryError("all of it"), "cpu is out of memory: raise --accumulate"),
])
def test_what_ends_a_run_is_one_line(command, monkeypatch, error, says):
    def train_run(*_):
        raise error
    monkeypatch.setattr(train, "train_run", train_run)
    one_line(command(), says)


def test_without_a_test_image_nothing_is_measured(folder, capsys):
    test = train.Folder(files(folder, "val")[8:10], 32, torch.device("cpu"), 0)  # the damaged ones
    with pytest.raises(typer.Exit):
        train.evaluate(create("vit-nano", "mpvg"), test, "imagenet", torch.device("cpu"))
    assert capsys.readouterr().err.endswith("error: not one test image can be decoded\n")


def test_the_peak_lr_follows_the_batch(folder, command, tmp_path):
    flags = ["--model", "vit-nano", "--image-size", 32, "--epochs", 1, "--data-dir", folder, "--batch-size", 16]
    for more, lr in (([], 5e-4 * 16 / 512), (["--lr", 0.003], 0.003)):
        result = command(*flags, *more, "--overwrite", data="imagenet")
        assert result.exit_code == 0 and f"peak lr {lr:g}\n" in result.output
        assert run_folder(tmp_path)[1]["lr"] == lr


def test_a_run_is_of_its_classes_and_images(folder, command, tmp_path):
    flags = ["--data-dir", tmp_path / "copy", *FILES]
    subprocess.run(["cp", "-r", folder, tmp_path / "copy"], check=True)
    assert command(*flags, "--epochs", 1, data="imagenet").exit_code == 0
    run, _ = run_folder(tmp_path)
    saved = checkpoint(run)

    def evaluation():
        return CliRunner().invoke(train.app, ["eval", str(run), "--device", "cpu", "--data-dir",
                                              str(tmp_path / "copy")])
    for split in ("train", "val"):
        (tmp_path / "copy" / split / "c").rename(tmp_path / "copy" / split / "d")
    one_line(evaluation(), "val has other classes than those that the model was trained on")
    result = command(*flags, "--epochs", 1, "--lr", 0, "--init", run, "--name", "other", data="imagenet")
    assert result.exit_code == 0 and "last.pt, with a new head" in result.output
    one_line(command(*flags, "--epochs", 1, "--resume", data="imagenet"), "classes was ")
    for split in ("train", "val"):
        (tmp_path / "copy" / split / "d").rename(tmp_path / "copy" / split / "c")
    (tmp_path / "copy" / "train" / "c" / "00.JPEG").unlink()
    torch.save(dict(saved, epoch=0, step=1), run / "last.pt")                   # not finished
    result = command(*flags, "--epochs", 1, "--resume", data="imagenet")
    assert result.exit_code == 2 and "was trained on 51 images, here are 50: give its --data-dir" in result.stderr
    subprocess.run(["rm", "-r", tmp_path / "copy" / "val" / "c"], check=True)
    assert "val has 2 classes, and the model 3" in evaluation().stderr


DRIVER = """
import os, signal, sys, torch
sys.path.insert(0, sys.argv.pop(1))
torch.set_default_dtype(torch.float64)
torch.Tensor.float = torch.Tensor.double                             # all arithmetic in float64
import train
compile, lr_at, steps = torch.compile, train.lr_at, []
torch.compile = lambda f, mode=None, **how: compile(f, backend="aot_eager", **how)
rank, step, number = map(int, sys.argv.pop(1).split(","))            # a signal that a process sends itself, and when:
def planted(*args, **kwargs):                                        # at the n-th step,
    steps.append(1)
    if len(steps) == 1:
        os.write(1, f"dropout {train.RANK} {torch.initial_seed()}\\n".encode())      # in one piece
    if (train.RANK, len(steps)) == (rank, step):
        os.kill(os.getpid(), number)
    return lr_at(*args, **kwargs)
def evaluate(*args):                                                 # or (step -1) in the first evaluation
    if (train.RANK, -1) == (rank, step):
        os.kill(os.getpid(), number)
    return measure(*args)
class Counted(train.DistributedDataParallel):
    def no_sync(self):
        os.write(1, b"without reduction\\n")
        return super().no_sync()
measure, train.evaluate, train.lr_at, train.DistributedDataParallel = train.evaluate, evaluate, planted, Counted
os.makedirs(f"disk{train.RANK}", exist_ok=True)
os.chdir(f"disk{train.RANK}")                                        # as if each process had a machine of its own
train.app()
"""


@pytest.fixture(scope="module")
def launch(folder, tmp_path_factory):
    """Runs train.py in float64, in a process of its own or with torchrun in several; one such run is there, "one"."""
    root = tmp_path_factory.mktemp("launch")
    (root / "driver.py").write_text(DRIVER)

    def run(name, processes, *flags, plant="0,0,0"):
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] * (processes > 1)
        command = [sys.executable, *torchrun, str(root / "driver.py"), str(Path(__file__).parent), plant, "--data",
                   "imagenet", "--device", "cpu", "--data-dir", str(folder), *FILES, "--workers", "0", "--name", name,
                   *flags]
        return subprocess.run(command, capture_output=True, text=True, cwd=root,
                              env=dict(os.environ, OMP_NUM_THREADS="1"))
    run.runs = root / "disk0" / "runs"
    assert run("one", 1).returncode == 0
    yield run
    assert not (root / "disk1" / "runs").exists()                               # only the first process writes


def close_runs(*folders, tolerance=1e-10):
    """The same loss curve, metrics and weights."""
    first, *others = map(checkpoint, folders)
    assert len(first["log"]) == 3 and first["model"]["head.weight"].dtype == torch.float64
    for other in others:
        for a, b in zip(first["log"], other["log"], strict=True):
            for key in a.keys() - {"seconds", "images_per_second", "unreadable", "processes"}:
                assert a[key] == pytest.approx(b[key], abs=tolerance), key
        assert first["model"].keys() == other["model"].keys()
        torch.testing.assert_close(first["model"], other["model"], rtol=0, atol=tolerance)


def test_one_process_two_and_parts_are_the_same_run(launch):
    one, runs = launch.runs / "one", launch.runs
    assert launch("parts", 1, "--accumulate", "2").returncode == 0
    two = launch("two", 2)
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("batch     12 images = 2 (processes) x 1 (parts) x 6; peak lr 0.004\n") == 1
    assert two.stdout.count("\n    3 ") == 1 and two.stdout.count("test accuracy") == 1     # said once
    close_runs(one, runs / "parts", runs / "two")
    assert len([*one.iterdir()]) == len([*(runs / "two").iterdir()]) == 4
    assert len({*re.findall(r"^dropout \d (\d+)$", two.stdout, re.M)}) == 2     # each process has its own
    compiled = launch("compiled", 2, "--compile", "on", "--accumulate", "3")
    assert compiled.returncode == 0 and compiled.stdout.count("without reduction") == 2 * 3 * 4 * 2, compiled.stderr
    close_runs(one, runs / "compiled", tolerance=1e-5)                          # its .float() is not the driver's
    assert [line["processes"] for line in log_of(runs / "two")] == [2] * 3


def test_a_loss_that_is_not_finite_is_said_by_the_first_of_all(launch):
    result = launch("nan", 2, "--lr", "1e30")
    assert result.returncode != 0 and result.stderr.count("the loss is not finite at step") == 1, result.stderr


def test_a_process_that_dies_ends_the_job_and_others_go_on_from_there(launch):
    killed = launch("killed", 2, plant=f"1,7,{int(signal.SIGKILL)}")
    assert killed.returncode != 0 and 'File "' + str(Path(train.__file__)) not in killed.stderr
    lost = r"^error: process 0 of 2 has lost another one, .* --resume goes on$"
    assert len(re.findall(lost, killed.stderr, re.M)) == 1
    assert checkpoint(launch.runs / "killed")["epoch"] == 1
    stopped = launch("killed", 2, "--resume", plant=f"1,-1,{int(signal.SIGTERM)}")  # in evaluation
    assert stopped.returncode != 0 and "stopped by SIGTERM after step 4 of 4 of epoch 2: saved" in stopped.stdout
    stopped = launch("killed", 2, "--resume", plant=f"1,1,{int(signal.SIGTERM)}")   # one is told, both stop
    assert stopped.returncode != 0 and "stopped by SIGTERM after step 1 of 4 of epoch 3" in stopped.stdout
    finished = launch("killed", 1, "--resume")
    assert finished.returncode == 0 and "on from step 1 of epoch 3" in finished.stdout, finished.stderr
    close_runs(launch.runs / "one", launch.runs / "killed")


def test_several_processes_know_what_they_cannot_do(launch, monkeypatch, command):
    result = launch("odd", 2, "--batch-size", "14")
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode != 0 and len(lines) == 1, result.stderr             # said by the first alone
    assert "--batch-size 14 is not a multiple of 4: processes (2) x --accumulate (1) x 2, as images are" in lines[0]
    monkeypatch.setattr(train, "PROCESSES", 2)
    one_line(command("--device", "mps"), "--device mps is for one process: take cuda or cpu")
    for name in ("sweep", "report"):
        one_line(CliRunner().invoke(train.app, [name, "--methods", "mpvg"]), f"{name} takes one process")
    monkeypatch.setattr(train, "usable_device", lambda name: torch.device("cuda:0"))
    one_line(command("--compile", "graphs"), "--compile graphs needs CUDA and one process")


def test_one_process_downloads_before_the_others(monkeypatch, command, folder):
    """Turns: the first process, then the first of each machine, then all. Image files are there: no turns."""
    events = []
    monkeypatch.setattr(train, "PROCESSES", 2)
    monkeypatch.setattr(train.dist, "init_process_group", lambda *_: None)
    monkeypatch.setattr(train.dist, "broadcast_object_list", lambda *_, **__: None)
    monkeypatch.setattr(train, "agree", lambda number: events.append("barrier"))
    monkeypatch.setattr(train, "load_data", lambda *_: events.append("load") or dict(train=[], test=[]))
    for rank, local_rank, expected in ((0, 0, ["load", "barrier", "barrier", "barrier"]),
                                       (1, 1, ["barrier", "barrier", "load", "barrier"]),
                                       (2, 0, ["barrier", "load", "barrier", "barrier"])):
        events.clear()
        monkeypatch.setattr(train, "RANK", rank)
        monkeypatch.setattr(train, "LOCAL_RANK", local_rank)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        assert command("--overwrite").exit_code == 2 and events == expected     # no images: that is the error
        events.clear()
        flags = ["--data-dir", folder, *FILES, "--overwrite"]
        assert command(*flags, data="imagenet").exit_code == 2 and events == ["load", "barrier"]


def deit(dim=192):
    """A state dict with the names and shapes of DeiT's published deit_*_patch16_224 files."""
    shapes = {"cls_token": (1, 1, dim), "pos_embed": (1, 197, dim), "patch_embed.proj.weight": (dim, 3, 16, 16),
              "patch_embed.proj.bias": (dim,)}
    for i in range(12):
        block = {"norm1.weight": (dim,), "norm1.bias": (dim,), "attn.qkv.weight": (3 * dim, dim),
                 "attn.qkv.bias": (3 * dim,), "attn.proj.weight": (dim, dim), "attn.proj.bias": (dim,),
                 "norm2.weight": (dim,), "norm2.bias": (dim,), "mlp.fc1.weight": (4 * dim, dim),
                 "mlp.fc1.bias": (4 * dim,), "mlp.fc2.weight": (dim, 4 * dim), "mlp.fc2.bias": (dim,)}
        shapes |= {f"blocks.{i}.{part}": shape for part, shape in block.items()}
    shapes |= {"norm.weight": (dim,), "norm.bias": (dim,), "head.weight": (1000, dim), "head.bias": (1000,)}
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_the_published_files_of_deit_and_lape_load(tmp_path, folder, command):
    """Theirs are {"model": state dict}, LaPE's with what a training run needs beside it."""
    torch.save({"model": deit()}, tmp_path / "deit.pth")
    model = load_weights(create("deit-tiny", "default"), tmp_path / "deit.pth")
    torch.testing.assert_close(dict(model.state_dict()), deit(), rtol=0, atol=0)
    lape = deit() | {f"blocks.{i}.pe_norm.{part}": torch.randn(192) for i in range(12) for part in ("weight", "bias")}
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10)
    args = argparse.Namespace(lr=5e-4, data_path="here")
    torch.save({"model": lape, "optimizer": optimizer.state_dict(), "lr_scheduler": scheduler.state_dict(),
                "epoch": 299, "model_ema": lape, "scaler": {"scale": 65536.0}, "args": args}, tmp_path / "lape.pth")
    model = load_weights(create("deit-tiny", "lape"), tmp_path / "lape.pth")
    torch.testing.assert_close(dict(model.state_dict()), lape, rtol=0, atol=0)
    larger = load_weights(create("deit-tiny", "lape", image_size=384), tmp_path / "lape.pth")
    assert torch.equal(larger.pos_embed, resize_pos_embed(lape["pos_embed"], (14, 14), (24, 24), prefix=1))
    result = command("--data-dir", folder, "--model", "deit-tiny", "--method", "lape", "--init", tmp_path / "lape.pth",
                     "--image-size", 48, "--batch-size", 48, "--epochs", 1, "--lr", 0, data="imagenet")
    assert result.exit_code == 0 and "lape.pth, with a new head" in result.output, result.output
    tuned = checkpoint(run_folder(tmp_path)[0])["model"]
    assert torch.equal(tuned["pos_embed"], resize_pos_embed(lape["pos_embed"], (14, 14), (3, 3), prefix=1))
    assert torch.equal(tuned["blocks.11.pe_norm.weight"], lape["blocks.11.pe_norm.weight"])


# ------------------------------------------------------------------------------------------------------------ bench.py

def sizes(model):
    return {name: p.default for name, p in inspect.signature(ViT).parameters.items()} | MODELS[model]


@pytest.mark.parametrize("model", ["vit-nano", "vit-lite", "deit-tiny"])
@pytest.mark.parametrize("pool", ["cls", "gap"])
def test_flops_and_bytes_are_those_of_the_closed_formulas(model, pool):
    c = sizes(model)
    D, L, h, p, side, C = (c[key] for key in ("dim", "depth", "mlp_ratio", "patch_size", "image_size", "num_classes"))
    patches = (side // p) ** 2
    N = patches + (pool == "cls")
    embed = 2 * patches * 3 * p * p * D
    forward = embed + L * (2 * N * D * D * (3 + 1 + 2 * h) + 4 * N * N * D) + 2 * D * C
    assert bench.count_flops(c, pool, False) == forward
    assert bench.count_flops(c, pool, True) == 3 * forward - embed          # images need no gradient
    P = sum(parameter.numel() for parameter in ViT(**{**c, **METHODS[bench.PLAIN[pool]]}).parameters())
    once, tokens = P + 8 * 3 * side * side, 8 * N * L * D * ((1 + 3) + (3 + 1) + (2 + 1) + (1 + h) + (h + 2))
    assert bench.count_bytes(c, pool, False, 8, 2) == 2 * (once + tokens)
    assert bench.count_bytes(c, pool, True, 8, 2) == 3 * (4 * once + 2 * tokens) + 7 * 4 * P


@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize("name", ["torchvision", "timm", "timm gap", "vit-pytorch", "vit-pytorch gap", "transformers"])
def test_peers_are_models_of_the_same_size(name, qkv_bias):
    pytest.importorskip(name.split()[0].replace("-", "_"))
    c = sizes("vit-nano") | dict(depth=2, qkv_bias=qkv_bias)
    peer, pool = bench.build(name, c)
    ours = ViT(**{**c, **METHODS[bench.PLAIN[pool]]})
    assert pool == ("gap" if " gap" in name else "cls")
    assert peer(images(2, (32, 32), dtype=torch.float32)).shape == (2, 100)
    count, own = (sum(parameter.numel() for parameter in model.parameters()) for model in (peer, ours))
    if "vit-pytorch" in name:  # never a bias in qkv; two norms more, around the patch embedding
        own += 2 * 3 * 8 * 8 + 2 * 128 - 2 * 3 * 128 * qkv_bias
    if name == "torchvision":  # always one
        own += 2 * 3 * 128 * (not qkv_bias)
    assert count == own
    if "timm" in name:                                                          # the very same model
        x = images(2, (32, 32), dtype=torch.float32)
        load_weights(ours, peer.state_dict())
        torch.testing.assert_close(ours.eval()(x), peer.eval()(x), rtol=1e-4, atol=1e-5)
    if "vit-pytorch" not in name:
        _, kernel = bench.look_inside(lambda: peer.train()(images(2, (32, 32), dtype=torch.float32)), 0,
                                      torch.device("cpu"))
        assert "flash_attention" in kernel


def test_folded_is_built_folded_and_blocks_get_contiguous_tokens():
    c = sizes("vit-nano") | dict(depth=2)
    model, pool = bench.build("mpvg-folded", c)
    assert model.folded and pool == "gap" and not bench.build("mpvg", c)[0].folded
    seen = []
    for method in ("gap", "mpvg", "default", "lape-gap"):
        model = bench.build(method, c)[0]
        model.blocks[0].register_forward_pre_hook(lambda block, given: seen.append(given[0].is_contiguous()))
        model(images(2, (32, 32), dtype=torch.float32))
    assert seen == [True] * 4


@pytest.fixture
def scripted(monkeypatch):
    """run_table() with contestants that do nothing and take the seconds that are written here, round by round."""
    script = {"copy": [1.0, 2.0, 4.0], "matmul": [0.01, 0.02, 0.04]}
    order = []

    def enter(name, c, table, batches, s):
        pool = "gap" if name.split()[-1] in ("gap", "mpvg", "mpvg-folded") else "cls"
        assert len(batches) > 1 and {x.shape for x, _ in batches} == {(s.batch, 3, 32, 32)}
        return bench.Contestant(name, lambda: order.append(f"({name})"), pool, memory=2 ** 20)

    def time(one, device):
        order.append(one.name)
        return script[one.name][len(one.seconds)]

    monkeypatch.setattr(bench, "enter", enter)
    monkeypatch.setattr(bench.Contestant, "time", time)
    monkeypatch.setattr(bench.Contestant, "warm_up", lambda one, device: 1.0)
    s = argparse.Namespace(device=torch.device("cpu"), dtype=torch.float32, batch=2, rounds=3)
    return script, order, lambda table, names: bench.run_table(
        table, names, sizes("vit-nano"), s, argparse.Namespace(update=lambda: 0, set_description=lambda text: 0))


def test_contestants_take_turns_and_ratios_are_of_pairs(scripted):
    script, order, run_table = scripted
    script |= {"default": [0.1, 0.2, 0.4], "gap": [0.1, 0.3, 0.5], "mpvg": [0.2, 0.3, 0.2],
               "torchvision": [0.2, 0.1, 0.8], "timm": [0.3, 0.4, 0.5], "timm gap": [0.1, 0.1, 0.1]}
    names = ["default", "gap", "mpvg", "torchvision", "timm", "timm gap"]
    table = run_table("inference-eager", names)
    assert order == ["copy", "matmul", "(timm gap)", *names] * 3
    rows = {row["name"]: row for row in table["rows"]}
    assert list(rows) == names and rows["gap"]["seconds"] == script["gap"]
    assert rows["mpvg"]["speed_to_plain"] == pytest.approx([1.0, 0.5, 2.5])             # beside gap
    assert rows["default"]["speed_to_plain"] == [1, 1, 1] and rows["timm"]["speed_to_plain"][0] == pytest.approx(0.5)
    assert rows["default"]["best_peer"] == "torchvision" and rows["mpvg"]["best_peer"] == "timm gap"
    assert rows["default"]["plain"] == "default" and rows["mpvg"]["plain"] == "gap"
    assert rows["default"]["speed_to_best_peer"] == pytest.approx([2.0, 0.5, 2.0])
    assert rows["timm"]["images_per_second"] == pytest.approx(2 / 0.4)
    assert rows["timm"]["milliseconds"] == pytest.approx([400, 300, 500])
    flops, moved = rows["gap"]["flops_per_image"] * 2, rows["gap"]["bytes_per_step"]
    assert flops == 2 * bench.count_flops(sizes("vit-nano"), "gap", False)
    operations, copied = 2 * 2048 ** 3, 2 * 4 * 2 ** 26
    assert rows["gap"]["share_of_peak"] == pytest.approx(flops / operations * 0.04 / 0.5)
    assert rows["gap"]["share_of_roofline"] == pytest.approx(moved / copied * 4.0 / 0.5)    # this copy bounds more
    assert table["matmul_flops"] == pytest.approx(operations / 0.02) and table["copy_bytes"] == copied / 2.0

    text = bench.as_text("inference-eager", table)
    assert re.search(r"mpvg +1\.000 \(0\.50-2\.50\) +0\.500 \(0\.33-0\.50\)", text) and "400 (300-500)" in text
    assert max(map(len, text.splitlines())) <= 100


def test_tables_without_a_rival_leave_it_out_and_folded_models_do_not_train(scripted):
    script, _, run_table = scripted
    script |= {"lape": [0.1] * 3, "mpvg": [0.1] * 3, "mpvg-folded": [0.1] * 3}
    table = run_table("training-eager", ["lape", "mpvg", "mpvg-folded"])
    assert [row["name"] for row in table["rows"]] == ["lape", "mpvg"]
    script["gap"] = [0.2] * 3
    (lape, _) = run_table("training-eager", ["lape", "gap"])["rows"]
    assert lape["speed_to_plain"] == [2.0] * 3 and lape["plain"] == "gap"       # for want of default
    for row in table["rows"]:
        assert row["speed_to_plain"] is row["speed_to_best_peer"] is row["best_peer"] is None
    assert table["rows"][0]["flops_per_image"] == bench.count_flops(sizes("vit-nano"), "cls", True)


class Probe(torch.nn.Module):
    """Notes what reaches it; `surprise` is what its compilation meets."""

    def __init__(self, surprise):
        super().__init__()
        self.fc, self.calls, self.seen, self.surprise = torch.nn.Linear(3, 5), 0, [], surprise
        self.start = self.fc.weight.detach().clone()
        self.ballast = torch.nn.Parameter(torch.zeros(20_000))

    def forward(self, x):
        if self.surprise == "break":
            torch._dynamo.graph_break()
        if self.surprise == "again" and self.calls < 2:
            self.calls += 1                                                     # another constant: another graph
        if not torch.compiler.is_compiling():
            self.seen.append((x.dtype, x.data_ptr(), self.training, torch.is_autocast_enabled("cpu"),
                              torch.is_grad_enabled()))
        return self.fc(x.mean((2, 3))) + self.ballast.sum()


@pytest.fixture
def probe(monkeypatch):
    """bench.enter() with a Probe for the model, compiled (by a backend that is quick) -> (probe, contestant)."""
    plain, compiled = torch.compile, []

    def compile_(f, **options):
        compiled.append(options | dict(freezing=torch._inductor.config.freezing))
        return plain(f, backend="eager", fullgraph=options["fullgraph"], dynamic=options["dynamic"])

    def enter(table, dtype="float32", name="gap", surprise=None, freeze=False, mode="default"):
        model, training = Probe(surprise), table.startswith("training")
        monkeypatch.setattr(bench, "build", lambda *_: (model, "gap"))
        x = torch.randn(3, 4, 3, 2, 2, dtype=torch.float32 if training else getattr(torch, dtype))
        s = argparse.Namespace(device=torch.device("cpu"), dtype=getattr(torch, dtype), mode=mode,
                               freeze=freeze)
        return model, bench.enter(name, {}, table, list(zip(x, torch.arange(12).view(3, 4) % 5)), s)

    monkeypatch.setattr(torch, "compile", compile_)
    enter.options = compiled
    with torch._inductor.config.patch(freezing=False):
        yield enter


def test_inference_has_weights_of_the_dtype_and_training_autocast_and_an_optimizer(probe):
    for dtype in ("bfloat16", "float32"):
        model, one = probe("inference-eager", dtype)
        assert {seen[0] for seen in model.seen} == {model.fc.weight.dtype} == {getattr(torch, dtype)}
        assert not any(any(seen[2:]) for seen in model.seen)            # no training, autocast or gradients
        places = [seen[1] for seen in model.seen]
        assert len(set(places[:3])) == 3 and places[3:] == places[:-3]          # inputs in turn
        assert torch.equal(model.fc.weight, model.start.to(getattr(torch, dtype)))
        assert one.compile_seconds is None and one.notes == []
        bare = one.memory

        model, one = probe("training-eager", dtype)
        assert {seen[0] for seen in model.seen} == {model.fc.weight.dtype} == {torch.float32}
        assert {seen[2:] for seen in model.seen} == {(True, dtype == "bfloat16", True)}
        assert not torch.equal(model.fc.weight, model.start) and model.fc.weight.grad is None
        assert one.memory >= bare + 2 * 4 * 20_000                              # two moments for each parameter
    assert probe.options == []


def test_our_models_are_compiled_strictly_and_what_breaks_is_said(probe, monkeypatch):
    _, one = probe("training-compiled", freeze=True)
    assert one.notes == [] and one.compile_seconds >= 0
    assert probe.options.pop() == dict(fullgraph=True, dynamic=False, mode="default", freezing=False)
    _, one = probe("inference-compiled", freeze=True)
    assert one.notes == [] and probe.options.pop()["freezing"]
    _, one = probe("inference-compiled", mode="reduce-overhead")
    assert probe.options.pop()["mode"] == "reduce-overhead" and one.memory is None
    probe("inference-compiled", name="timm gap")
    assert probe.options.pop() == dict(fullgraph=False, dynamic=False, mode="default", freezing=False)
    with pytest.raises(TorchDynamoException):
        probe("inference-compiled", surprise="break")
    _, one = probe("inference-compiled", surprise="break", name="torchvision")
    assert any("graph breaks" in note for note in one.notes)
    _, one = probe("inference-compiled", surprise="again")
    assert one.notes == ["3 compiled graphs"]
    _, one = probe("inference-compiled")                                        # others' graphs are not its own
    assert one.notes == []
    monkeypatch.setattr(torch, "compile", lambda f, **options: f)
    _, one = probe("inference-compiled")
    assert one.notes == ["0 compiled graphs"]


def test_a_skipped_cuda_graph_is_noticed(probe, monkeypatch):
    quick = torch.compile

    def skips(f, **options):
        once, compiled = iter([1]), quick(f, **options)

        def call(*x):
            bench.counters["inductor"]["cudagraph_skips"] += next(once, 0)
            return compiled(*x)
        return call

    monkeypatch.setattr(torch, "compile", skips)
    _, one = probe("inference-compiled")
    assert one.notes == ["1 skipped CUDA graphs"]


def test_a_late_recompilation_is_an_error_for_ours_and_a_mark_for_a_peer(scripted, monkeypatch, capsys):
    script, _, run_table = scripted
    script |= {"gap": [0.1] * 3, "timm gap": [0.1] * 3}
    time = bench.Contestant.time

    def again(one, device):
        bench.counters["stats"]["unique_graphs"] += one.name == culprit and len(one.seconds) == 1
        return time(one, device)

    monkeypatch.setattr(bench.Contestant, "time", again)
    culprit = "timm gap"
    table = run_table("inference-compiled", ["gap", "timm gap"])
    assert table["notes"] == ["timm gap: compiled again while it was timed"]
    culprit = "gap"
    with pytest.raises(typer.Exit):
        run_table("inference-compiled", ["gap", "timm gap"])
    assert "did not keep gap in one piece: compiled again" in capsys.readouterr().err


def test_a_clock_starts_and_stops_with_nothing_in_flight_and_warming_up_waits_until_it_is_steady(monkeypatch):
    order, device = [], argparse.Namespace(type="cuda")
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: order.append("synchronize"))
    bench.Contestant("gap", lambda: order.append("call"), repeat=2).time(device)
    assert order == ["synchronize", "call", "call", "synchronize"]

    times = []
    monkeypatch.setattr(bench.Contestant, "time", lambda one, device: times.pop(0))
    one = bench.Contestant("gap", None)
    times += [0.02, 0.01, 5.0, 4.0, 3.0, 2.9, 2.8, 1.0]
    assert one.warm_up(device) == 2.8 and one.repeat == 5 and times == [1.0]
    times += [1.0] + [1.0, 2.0] * 20                                            # never steady
    assert one.warm_up(device) == 2.0 and one.repeat == 1 and len(times) == 20


def test_memory_is_what_is_held_and_what_a_call_allocates():
    def call():
        first = torch.ones(2 ** 18)                                             # 1 MiB
        second = torch.ones(2 ** 19)
        del first, second
        torch.ones(2 ** 17)

    memory, attention = bench.look_inside(call, 1000, torch.device("cpu"))
    assert 3 * 2 ** 20 + 1000 <= memory < 3.2 * 2 ** 20 and attention is None
    model = tiny()
    _, attention = bench.look_inside(lambda: model(images()), 0, torch.device("cpu"))
    assert "attention" in attention


@pytest.fixture
def timing(monkeypatch, tmp_path):
    """bench.py's command -> its result; the tables are not run but noted in `timing.seen`, if not `real`."""
    def run(*flags, real=False):
        if not real:
            monkeypatch.setattr(bench, "run_table", lambda table, names, c, s, bar: run.seen.append(
                argparse.Namespace(table=table, names=names, c=c, **vars(s))) or dict(
                    rows=[], notes=[], attention=None, matmul_flops=1.0, copy_bytes=1.0))
        return CliRunner().invoke(bench.app, ["--device", "cpu", *map(str, flags)])
    run.seen = []
    return run


def test_every_flag_of_bench_has_its_effect(timing, monkeypatch):
    monkeypatch.setattr(bench, "installed", lambda peer: None if peer == "vit-pytorch" else "1.0")

    def seen(*flags):
        timing.seen.clear()
        result = timing(*flags)
        assert result.exit_code == 0, result.output
        return timing.seen[0]

    plain = seen()
    assert [one.table for one in timing.seen] == list(bench.TABLES)
    assert plain.names == ["default", "gap", "lape", "pvg", "mpvg", "mpvg-folded", "torchvision", "timm", "timm gap",
                           "transformers"]
    assert plain.c == sizes("deit-tiny") | dict(attn_drop=0.0, drop_path=0.0)
    assert (plain.batch, plain.dtype, plain.mode, plain.rounds) == (16, torch.float32, "default", 20)
    assert plain.freeze is False and plain.device == torch.device("cpu")
    quick = seen("--quick")
    assert [one.table for one in timing.seen] == list(bench.TABLES[:3]) and quick.c["depth"] == 4 and quick.rounds == 3
    assert quick.names == ["default", "mpvg", "torchvision"]
    assert seen("--quick", "--methods", "gap,lape-folded").names == ["gap", "lape-folded", "torchvision"]
    assert seen("--quick", "--peers", "none").names == ["default", "mpvg"]
    assert seen("--methods", "mpvg", "--peers", "timm, torchvision").names == ["mpvg", "timm gap"]
    assert seen("--model", "vit-lite").c == sizes("vit-lite") | dict(attn_drop=0.0, drop_path=0.0) and plain.batch == 16
    assert seen("--model", "vit-lite").batch == 128 and seen("--batch", 3).batch == 3
    assert seen("--model", "vit-lite", "--dropout").c == sizes("vit-lite")
    assert seen("--dtype", "bf16").dtype == torch.bfloat16 and seen("--rounds", 4).rounds == 4
    assert seen("--freeze").freeze is True
    assert seen("--mode", "max-autotune-no-cudagraphs").mode == "max-autotune-no-cudagraphs"
    assert seen("--tables", "training-eager").table == "training-eager" and len(timing.seen) == 1
    assert timing("--device", "nowhere").exit_code == 2
    files = []
    monkeypatch.setattr(bench, "run_data", lambda root, model, s: files.append((root, model, vars(s))) or dict(rows=[]))
    monkeypatch.setattr(bench, "data_as_text", lambda result: "")
    for flags, expected in (([], ("deit-tiny", 16, 5, 0)), (["--model", "deit-small", "--batch", 4, "--rounds", 7,
                                                             "--workers", 3], ("deit-small", 4, 7, 3))):
        assert timing("--data", "d", *flags).exit_code == 0
        root, model, s = files.pop()
        assert root == Path("d") and (model, s["batch"], s["rounds"], s["workers"]) == expected


@pytest.mark.parametrize("flags, says", [
    (["--model", "vit"], "unknown --model 'vit': choose from vit-lite"),
    (["--methods", "gap,mpgv"], "unknown --methods 'mpgv': choose from default"),
    (["--peers", "timn"], "unknown --peers 'timn': choose from torchvision"),
    (["--tables", "training"], "unknown --tables 'training': choose from inference-eager"),
    (["--mode", "reduce-overhead"], "--mode reduce-overhead is CUDA graphs and the device is cpu: take"),
    (["--methods", "mpvg-folded"], "folded models are for inference: leave"),
    (["--json", "{file}/x.json"], "--json"),
    (["--json", "{folder}"], "is no file: name one"),
    (["--json", "{folder}/pipe"], "is no file: name one"),
    (["--json", ""], "is no file: name one"),
    (["--methods", ""], "unknown --methods ''"),
    (["--model", ""], "unknown --model ''"),
    (["--peers", ""], "unknown --peers ''"),
    (["--tables", ""], "unknown --tables ''"),
    (["--data", "nowhere"], "error: nowhere cannot be read as ImageNet, train/CLASS/*.JPEG"),
    (["--data", ".", "--methods", "mpvg"], "--methods is of no meaning with --data: leave it out"),
    (["--workers", "2"], "--workers is of no meaning without --data"),
    (["--data", ".", "--batch", "15"], "--batch 15 is odd: --data mixes images in pairs"),
    (["--data", ".", "--model", "vit-lite"], "--data is read at 224x224, and vit-lite takes 32x32: take a DeiT"),
])
def test_what_bench_cannot_do_ends_in_one_line_before_it_begins(timing, tmp_path, flags, says):
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    one_line(timing(*(flag.format(file=tmp_path / "file", folder=tmp_path) for flag in flags)), says)
    assert timing.seen == []


def test_a_missing_peer_is_named_and_left_out_and_a_failing_one_too(timing, monkeypatch, tmp_path):
    def version(peer):
        if peer == "timm":
            raise bench.PackageNotFoundError(peer)
        return "1.0"

    def broken(c, pool):
        raise RuntimeError("no such model\nand more")

    monkeypatch.setattr(bench, "version", version)
    monkeypatch.setitem(bench.PEERS, "transformers", (broken, ["cls"]))
    result = timing("--quick", "--peers", "timm,transformers", "--methods", "default", "--tables", "inference-eager",
                    "--json", tmp_path / "new" / "x.json", real=True)
    assert result.exit_code == 0 and "timm is not installed and left out" in result.output
    assert "transformers failed and is left out: no such model\n" in result.output
    saved = json.loads((tmp_path / "new" / "x.json").read_text())
    (row,) = saved["tables"]["inference-eager"]["rows"]
    assert saved["missing"] == ["timm"] and saved["header"]["transformers"] == "1.0" and row["name"] == "default"


def test_memory_that_is_not_there_is_said_and_what_was_measured_is_kept(timing, monkeypatch, tmp_path):
    for error in (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory: 1 TB")):
        def run_table(table, *_):
            if table == "training-eager":
                raise error  # noqa: B023
            return dict(rows=[], notes=[], attention=None, matmul_flops=1.0, copy_bytes=1.0)

        monkeypatch.setattr(bench, "run_table", run_table)
        one_line(timing("--json", tmp_path / "x.json", real=True), "training-eager: out of memory: take a smaller")
        assert list(json.loads((tmp_path / "x.json").read_text())["tables"]) == list(bench.TABLES[:2])


def test_a_graph_break_in_our_model_is_refused(timing, monkeypatch, tmp_path):
    forward = mpvg.Block.forward

    def planted(block, x, pe=None):
        torch._dynamo.graph_break()
        return forward(block, x, pe)

    monkeypatch.setattr(mpvg.Block, "forward", planted)
    for table in ("inference-compiled", "training-compiled"):
        result = timing("--quick", "--methods", "gap", "--peers", "none", "--tables", table,
                        "--json", tmp_path / "x.json", real=True)
        assert result.exit_code == 2 and f"error: {table}: gap did not compile as one graph: " in result.stderr
        assert not (tmp_path / "x.json").exists()


def test_quick_from_end_to_end_and_json_holds_what_is_printed(tmp_path):
    done = subprocess.run([sys.executable, "bench.py", "--quick", "--device", "cpu", "--json", tmp_path / "x.json"],
                          cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    saved = json.loads((tmp_path / "x.json").read_text())
    header, *tables = done.stdout.split("\n\n")
    assert header.replace("\n", " ") == ", ".join(f"{key} {value}" for key, value in saved["header"].items())
    assert "USDT" not in done.stderr                                            # the profiler is kept quiet
    assert saved["header"]["torch"] == torch.__version__ and saved["header"]["model"] == "vit-nano"
    assert [text.rstrip("\n") for text in tables] == [bench.as_text(*item) for item in saved["tables"].items()]
    assert max(map(len, done.stdout.splitlines())) <= 100
    assert list(saved["tables"]) == list(bench.TABLES[:3])
    for name, table in saved["tables"].items():
        assert [row["name"] for row in table["rows"]] == ["default", "mpvg", "torchvision"] and table["notes"] == []
        for row in table["rows"]:
            assert len(row["seconds"]) == 3 and min(row["seconds"]) > 0 and row["memory_bytes"] > 4 * 567_780
            assert 0 < row["share_of_peak"] <= row["share_of_roofline"]
            assert (row["compile_seconds"] is not None) == name.endswith("compiled")
        assert "attention" in table["attention"]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another malloc")
def test_freed_memory_is_kept_on_the_cpu():
    train.usable_device("cpu")
    for _ in range(8):
        torch.ones(2 ** 24)                                                     # 64 MiB, 16,384 pages of 4 KiB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones(2 ** 24)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 1000


@pytest.mark.parametrize("workers", [0, 2])
def test_reading_files_is_timed_beside_the_usual_pipeline(timing, folder, monkeypatch, tmp_path, workers):
    small = partial(create, depth=1, patch_size=56, dim=12, heads=1)
    monkeypatch.setattr(bench, "create", lambda *model, **options: small(*model, **options))
    passes, real = [], bench.epoch_batches
    monkeypatch.setattr(bench, "epoch_batches", lambda config, data, *rest: passes.append(data) or real(
        config, data, *rest))
    result = timing("--data", folder, "--batch", 8, "--rounds", 3, "--workers", workers, "--json", tmp_path / "x.json",
                    real=True)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "x.json").read_text())["tables"]["data"]
    assert (found["images"], found["workers"]) == (48, workers) and found["files"] in (16, 17, 18)   # 3 crops of each
    sizes = [os.stat(path).st_size for path, _ in passes[0].samples]
    assert found["bytes_per_file"] == sum(sizes) // 48 and len(passes) == 1 + 2 * (1 + 3)
    names = ["usual pipeline", "decode, crop", "and augment", "training step", "all together"]
    assert [row["name"] for row in found["rows"]] == names
    usual, speeds = found["rows"][0]["seconds"], {}
    for row in found["rows"]:
        assert len(row["seconds"]) == 3
        assert row["images_per_second"] == pytest.approx([48 / np.median(row["seconds"]), 48 / max(row["seconds"]),
                                                          48 / min(row["seconds"])])
        assert row["speed_to_usual"][0] == pytest.approx(np.median([a / b for a, b in zip(usual, row["seconds"])]))
        speeds[row["name"]] = row["images_per_second"][0]
        assert re.search(rf"^{row['name']:<15} {speeds[row['name']]:,.1f} ", result.output, re.M)
    core = speeds["decode, crop"] / max(1, workers)
    assert (f"one worker decodes and crops {core:,.0f} images/s; this step takes what "
            f"{speeds['training step'] / core:.2g} of them make") in result.output
    one_line(timing("--data", folder, "--batch", 64, real=True), "has only 51 images to train on: take a smaller")


def test_a_file_that_the_usual_pipeline_cannot_read_is_said(timing, monkeypatch):
    def run_data(*_):
        raise OSError("Caught in a worker\nUnidentifiedImageError: it is empty")
    monkeypatch.setattr(bench, "run_data", run_data)
    one_line(timing("--data", "d"), "--data d: the usual pipeline does not get over a file (UnidentifiedImageError: it")


def test_the_usual_pipeline_reads_what_ours_reads(folder):
    """The same files in the same order, as normalised floats."""
    source = torchvision.datasets.ImageFolder(folder / "train")
    source.samples = [source.samples[i] for i in (0, 6, 40, 2)]
    s = argparse.Namespace(batch=2, workers=0, device=torch.device("cpu"))
    order = torch.tensor([[0, 2], [3, 1]])
    batches = [*bench.usual_loader(source, order, s)]
    assert [y.tolist() for _, y in batches] == [[0, 2], [0, 0]]
    assert all(x.shape == (2, 3, 224, 224) and x.dtype == torch.float32 and x.min() < 0 for x, _ in batches)


def readme_section(title):
    return (Path(__file__).parent / "README.md").read_text().partition(f"## {title}")[2].partition("\n## ")[0]


def printed(folder, *flags):
    """-> what `train.py sweep --from` says of a folder of results/."""
    result = sweep("--from", Path(__file__).parent / "results" / folder, *flags)
    assert result.exit_code == 0, result.output
    return result.output


def test_the_readmes_figures_of_cifar100_are_what_one_command_prints():
    settings = {"vit-lite": "vit-lite, cifar100, 310 epochs, bf16", "vit-nano":
                "vit-nano, cifar100, 15 epochs, fp32, warmup_epochs 1.5, cooldown_epochs 1, lr_per step"}
    section = readme_section("What came of it") + readme_section("What the trained models show")
    paper = train.PAPER["vit-lite", "cifar100"]
    outputs = {None: printed("cifar100")}
    lite, nano = (tables(outputs[None]).get(title, {}) for title in settings.values())
    shown = {row[0]: row[1:] for row in rows_of(section) if len(row) == 7}
    assert len(nano) >= 6
    for name, row in nano.items():
        here = lite[name][1] if name in lite else "not measured yet"
        assert shown[name] == [f"{paper[name]:.2f}" if name in paper else "", here, row[1], row[2], row[0], row[4]]
    for table in ("last norm", "correlation in blocks"):
        for name, row in tables(outputs[None])[f"{settings['vit-nano']}: {table}"].items():
            assert f"| {' | '.join([name, *row])} |".replace("|  |", "| |").replace("|  |", "| |") in section

    known = {f"{value:.2f}" for value in paper.values()}
    known |= {*"0.2387 0.0193 0.2995 0.4597 0.37 0.95".split()}               # its appendix and Figure 4
    known |= {str(MODELS["vit-lite"]["pe_std"]), str(inspect.signature(ViT).parameters["pe_std"].default)}
    claims = re.findall(r"^\| `(\S+)` - `(\S+)`[^|]*\|(.*)\|(.*)\|(.*)\|", section, re.M)
    for name, base, published, *found in claims:
        theirs = paper if {name, base} <= {*paper} else train.PAPER["deit-tiny", "imagenet"]
        assert published.strip() == f"{theirs[name] - theirs[base]:+.2f}"
        known.add(published.strip(" +-"))
        for (model, title), said in zip(settings.items(), found):
            here = base.replace("last_pe=11", f"last_pe={MODELS[model].get('depth', 12) - 1}")  # the last block's
            if not {name, here} <= {*tables(outputs[None]).get(title, {})}:
                assert said.strip() == "not measured yet"
                continue
            outputs[here] = outputs.get(here) or printed("cifar100", "--base", here)
            difference = tables(outputs[here])[title][name][2]
            middle, half = [*map(float, difference.split(" +- ")), math.inf][:2]    # of one pair: no interval
            agrees = (middle > 0) == (theirs[name] > theirs[base])
            marks = ("not reproduced", "reproduced") if model == "vit-lite" else ("the opposite", "seen")
            assert said.strip() == f"{difference}: {'undecided' if abs(middle) <= half else marks[agrees]}"
    assert len(claims) >= 6
    in_words = re.findall(r"`(\S+)` - `(\S+)` (?:is )?\(?([+-]\S+ \+- \d+\.\d+)", " ".join(section.split()))
    for name, base, difference in in_words:
        outputs[base] = outputs.get(base) or printed("cifar100", "--base", base)
        assert difference == tables(outputs[base])[settings["vit-nano"]][name][2]
        known |= {*re.findall(r"\d+\.\d+", difference)}
    assert len(in_words) == 5
    figures = re.findall(r"(?<![\d.])\d+\.\d+(?!\d|\.\d)", section)            # no other figure, in words neither
    assert {*figures} - known <= {*re.findall(r"\d+\.\d+", "".join(outputs.values()))}
    root = Path(__file__).parent / "results" / "cifar100"
    measured = json.loads((root / "report" / "report.json").read_text())

    def least_and_greatest(row, key):
        values = [found[key] for name, found in measured.items() if name.startswith(f"{row}-vit-nano")]
        return min(values), max(values)
    for key, low, high in (("beta_variance", "mpvg", "pvg"), ("offset_variance", "pvg", "mpvg"),
                           ("cosine", "lape-layer0=False-add_input=True", "pvg")):       # seen where all seeds agree
        assert least_and_greatest(low, key)[1] < least_and_greatest(high, key)[0]
    for name, found in measured.items():                                        # what is said in words
        correlation = found["correlation"][1:4]
        assert correlation == [None] * 3 or correlation[2] < min(correlation[0], 0)
        if name.startswith("mpvg-shift"):
            assert found["offset"] == pytest.approx([2 * beta for beta in found["beta"]], abs=1e-6)
    for seed in range(3):                                                       # before training, by README about 1/16
        torch.manual_seed(seed)
        assert create("vit-nano", "mpvg").delivered_pe()[1].mean(1).var().item() == pytest.approx(1 / 16, rel=0.2)
    for folder in root.glob("*vit-nano*/"):
        here = json.loads((folder / "config.json").read_text())["environment"]
        words = f"torch {here['torch'].partition('+')[0]}, fp32, revision {here['git']}"
        assert words in " ".join(section.split())
        assert here["device"] == "cpu" and here["threads"] == 1


def test_the_readmes_other_figures_of_training_are_those_of_the_logs():
    section, rows = readme_section("Run it"), rows_of(printed("numbers"))
    assert all(row in rows for row in rows_of(section)) and len(rows_of(section)) == 7
    root, recipe = Path(__file__).parent / "results", readme_section("Run the paper's CIFAR-100 table")
    log, = (log_of(folder) for folder in (root / "vit-lite-300-steps").iterdir())
    assert "falls from {} over {} to {},".format(*(f"{line['loss']:.3f}" for line in log)) in " ".join(recipe.split())
    assert "from {} over {} to {} %".format(*(f"{line['test_accuracy']:.2f}" for line in log)) in " ".join(
        recipe.split())
    log, = (log_of(folder) for folder in (root / "digits").iterdir())
    files = " ".join(readme_section("Run the paper's ImageNet table").split())
    assert "{test_accuracy:.2f} % of its 400 test images in {seconds:.0f} seconds".format(**log[-1]) in files
    assert "at a full crop {full_crop_accuracy:.2f} %".format(**log[-1]) in files


def test_the_readmes_table_of_speed_is_the_measured_one():
    root = Path(__file__).parent
    tables = json.loads((root / "results/bench/deit-tiny-cpu.json").read_text())["tables"]
    section = readme_section("How fast is it?")
    shown = {cells[0].strip(" *"): [cell.strip() for cell in cells[1:]]
             for cells in (line.strip("|").split("|") for line in section.splitlines() if line.startswith("| "))}
    shown.pop("")                                                               # the head
    measured = {name: [f"{row['speed_to_plain'][0]:.3f}" for table in tables.values() for row in table["rows"]
                       if row["name"] == name] for name in shown}
    measured |= {"mpvg-folded": measured["mpvg-folded"] + ["", ""],             # it does not train
                 "gap, share of a matrix product": [
                     f"{row['share_of_peak']:.0%}" for table in tables.values() for row in table["rows"]
                     if row["name"] == "gap"]}
    assert len(shown) == 13 and shown == measured


def test_the_bootstrap_intervals_are_what_the_notes_program_prints(monkeypatch, capsys):
    monkeypatch.chdir(Path(__file__).parent)
    exec(re.findall("```python\n(.*?)```", Path("results/bench-notes.md").read_text(), re.S)[-1], {})
    *lines, last = capsys.readouterr().out.splitlines()
    (low, high), = ([float(value) for value in line.split()[-2:]] for line in lines if "0.984" in line)
    assert sum(float(line.split()[-1]) < 1 for line in lines) == 1 and len(lines) == 4
    section, (middle, most) = " ".join(readme_section("How fast is it?").split()), re.findall(r"\d\.\d", last)
    assert f"interval, {low:.3f} to {high:.3f}, excludes 1" in section
    assert f"half a 95 % bootstrap interval is {middle} points in the middle and {most} at most" in section


def test_the_readmes_table_of_reading_files_is_the_measured_one():
    root = Path(__file__).parent
    table = json.loads((root / "results/bench/files-cpu.json").read_text())["tables"]["data"]
    section = readme_section("Run the paper's ImageNet table")
    for row in table["rows"]:
        line, = re.findall(rf"^\| {row['name']}\b.*$", section, re.M)
        assert line.endswith(f" | {row['images_per_second'][0]:.1f} | {row['speed_to_usual'][0]:.2f} |")
    assert bench.data_as_text(table) in (root / "results/bench/files-cpu.txt").read_text()


# ------------------------------------------------------------------------------------------------- README, --help

def readme_code(words, language="python"):
    """-> the README's one block of code that has these words."""
    blocks = re.findall(rf"```{language}\n(.*?)```", (Path(__file__).parent / "README.md").read_text(), re.S)
    block, = (block for block in blocks if words in block)
    return block


def test_the_examples_for_readers_run():
    shown = {}
    exec(readme_code("model = ViT("), shown)
    assert shown["logits"].shape == (2, 10) and shown["tokens"].shape == (2, 128, 192) and shown["fast"].folded
    lines = re.findall(r"^    ((?:import|from|model =|logits = model).*)", mpvg.__doc__, re.M)
    exec("\n".join(lines), shown)
    assert len(lines) == 4 and shown["logits"].shape == (8, 100)


def test_the_readmes_digits_are_a_folder_to_train_on(command, tmp_path, monkeypatch):
    """Its code, for fewer images, and its command, for one epoch."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "numbers", lambda count, seed: make_numbers(count // 100, seed))
    exec(readme_code('Path("digits"'), {})
    assert [len(files("digits", split)) for split in ("train", "val")] == [30, 4]
    assert Image.open(files("digits")[0][0]).size == (64, 48)
    subprocess.run(["rm", "-r", "digits/val"], check=True)                      # so few numbers are not of all classes
    subprocess.run(["cp", "-r", "digits/train", "digits/val"], check=True)
    flags = readme_code("--data-dir digits", "bash").replace("\\\n", " ").split()[4:]
    result = command(*flags, "--epochs", 1, "--batch-size", 10, data="imagenet")
    assert result.exit_code == 0, result.output


def test_the_readmes_way_to_evaluate_published_weights(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": deit()}, "deit_tiny_patch16_224-a1311bcf.pth")
    torch.save({"model": create("deit-tiny", "lape").state_dict()}, "checkpoint.pth")
    real = train.load_data

    def three_classes(config, root, splits):
        assert (config["num_classes"], root) == (1000, Path("DIR"))
        return real(config | dict(num_classes=3), folder, splits=splits)
    monkeypatch.setattr(train, "load_data", three_classes)
    exec(readme_code("splits=["), {})
    assert re.fullmatch(r"\{'test_accuracy': .*, 'full_crop_loss': [\d.]+\}\n", capsys.readouterr().out)


def test_help_names_every_flag_and_every_number_of_the_recipes():
    root = Path(__file__).parent
    shown = subprocess.run([sys.executable, "train.py", "--help"], cwd=root, capture_output=True, text=True)
    flags = ["--" + name.replace("_", "-") for name in inspect.signature(train.train).parameters if name != "ctx"]
    assert shown.returncode == 0 and all(f"{flag} " in shown.stdout for flag in flags) and len(flags) > 40
    for recipe in train.RECIPES.values():
        assert all(str(value) in shown.stdout for value in recipe.values())
