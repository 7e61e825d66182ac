"""The specification of mpvg.py and train.py: `python -m pytest`. Nothing here asserts a timing."""
import argparse
import inspect
import itertools
import json
import math
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from typer.testing import CliRunner

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


# ----------------------------------------------------------------------------------------------------------- train.py

make_numbers = train.numbers


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Runs train.py's command on 200 training and 40 test images -> its result; runs go to tmp_path / "runs"."""
    monkeypatch.setattr(train, "numbers", lambda count, seed: make_numbers(200 if seed == 1 else 40, seed))

    def run(*flags):
        flags = [*map(str, flags)]
        flags += [] if "--runs" in flags else ["--runs", str(tmp_path / "runs")]
        return CliRunner().invoke(train.app, ["--data", "numbers", "--device", "cpu", *flags])
    return run


def run_folder(tmp_path):
    (folder,) = (tmp_path / "runs").iterdir()
    return folder, json.loads((folder / "config.json").read_text())


def test_numbers_are_balanced_and_repeatable():
    x, y = make_numbers(500, seed=1)
    assert x.shape == (500, 3, 32, 32) and x.dtype == torch.uint8 and y.bincount().tolist() == [5] * 100
    again, other = make_numbers(500, seed=1), make_numbers(500, seed=2)
    assert torch.equal(again[0], x) and torch.equal(again[1], y) and not torch.equal(other[0], x)
    bright = x.float().mean((1, 2, 3))
    assert bright.min() < 90 and bright.max() > 160                             # light on dark and dark on light


def test_a_run_leaves_its_record(command, tmp_path, monkeypatch):
    result = command("--epochs", 2, "--pe", "layerwise", "--pool", "gap", "--mpvg")
    assert result.exit_code == 0, result.output
    first, *_, last = result.output.strip().splitlines()
    assert "numbers" in first and "cpu" in first
    folder, config = run_folder(tmp_path)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert folder.name == "mpvg-vit-nano-numbers-seed0" and [line["epoch"] for line in log] == [1, 2]
    assert config["method"] == "mpvg" and config["torch"] == torch.__version__
    assert f"test accuracy {log[-1]['test_accuracy']:.2f} %" in last
    checkpoint = torch.load(folder / "last.pt", weights_only=True)
    assert checkpoint["config"] == config and checkpoint["epoch"] == 2
    model = load_weights(create("vit-nano", "mpvg"), folder / "last.pt")
    normalise = train.normaliser((0.5, 0.5, 0.5), (0.3, 0.3, 0.3), "cpu")
    accuracy = train.evaluate(model, normalise, *make_numbers(40, 2))
    assert accuracy == pytest.approx(log[-1]["test_accuracy"], abs=0.01)
    assert not list(folder.glob("*.tmp"))
    monkeypatch.chdir(tmp_path)                                                 # the README's way to load a run
    shown = dict(torch=torch, create=create, load_weights=load_weights)
    exec(readme_code()[1], shown)
    assert torch.equal(shown["model"].head.weight, model.head.weight)


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
], ids=str)
def test_flags_name_a_row(command, tmp_path, flags, method, overrides):
    result = command("--epochs", 1, *flags)
    assert result.exit_code == 0, result.output
    folder, config = run_folder(tmp_path)
    assert (config["method"], config["overrides"]) == (method, overrides)
    expected = create("vit-nano", method, **overrides).state_dict()
    assert torch.load(folder / "last.pt", weights_only=True)["model"].keys() == expected.keys()
    label = method + "".join(f"-{k}={v}" for k, v in overrides.items())
    assert folder.name == f"{label}-vit-nano-numbers-seed0" and f"method    {label}: " in result.output


def test_model_and_name_reach_the_run(command, tmp_path):
    result = command("--epochs", 1, "--batch-size", 100, "--model", "vit-lite", "--name", "lite")
    assert result.exit_code == 0, result.output
    checkpoint = torch.load(tmp_path / "runs" / "lite" / "last.pt", weights_only=True)
    load_weights(create("vit-lite", "mpvg"), checkpoint)


def plain_loop(recipe, model, train_set, test_set, seed):
    """What `train.py` must do, written out on its own. -> (model, losses, accuracies of the epochs)"""
    torch.manual_seed(seed)
    model = create(model, "mpvg")
    tables = {"pos_embed"} if not recipe["decay_pe"] else set()
    decays = {n: p.ndim >= 2 and n not in tables for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([
        dict(params=[p for n, p in model.named_parameters() if decays[n]], weight_decay=recipe["weight_decay"]),
        dict(params=[p for n, p in model.named_parameters() if not decays[n]], weight_decay=0)])
    (images, labels), size, losses, accuracies = train_set, recipe["batch_size"], [], []
    steps = len(images) // size
    mean, std = (torch.tensor(recipe[key]).view(3, 1, 1) for key in ("mean", "std"))
    for epoch in range(recipe["epochs"]):
        order, total = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed * 100_003 + epoch)), 0
        for i in range(steps):
            rows = order[i * size:(i + 1) * size]
            x = (images[rows] / 255 - mean) / std
            if recipe["flip"]:
                flips = torch.rand(size, 1, 1, 1) < 0.5
                x = torch.stack([image.flip(-1) if f else image for image, f in zip(x, flips)])
            t = epoch + i / steps
            warmup = min(recipe["warmup_epochs"], recipe["epochs"] / 10)
            for group in optimizer.param_groups:
                group["lr"] = (1e-6 + (recipe["lr"] - 1e-6) * t / warmup if t < warmup else recipe["min_lr"] +
                               (recipe["lr"] - recipe["min_lr"]) * (1 + math.cos(math.pi * t / recipe["epochs"])) / 2)
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
def test_a_run_is_the_plain_loop(command, monkeypatch, tmp_path, data, seed):
    train_set, test_set = make_numbers(200, 1), make_numbers(40, 2)
    monkeypatch.setattr(train, "cifar100", lambda root, train: train_set if train else test_set)
    changes = dict(epochs=3, batch_size=48, lr=0.004, weight_decay=0.2)
    recipe = dict(train.RECIPES[data], **changes)
    monkeypatch.setitem(train.RECIPES, data, dict(train.RECIPES[data], label_smoothing=0.3))
    recipe["label_smoothing"] = 0.3
    flags = [part for key, value in changes.items() for part in ("--" + key.replace("_", "-"), value)]
    result = command("--data", data, "--model", "vit-nano", "--seed", seed, *flags)
    assert result.exit_code == 0, result.output
    folder, config = run_folder(tmp_path)
    assert config["seed"] == seed and config["lr"] == 0.004 and config["model"] == "vit-nano"
    model, losses, accuracies = plain_loop(recipe, "vit-nano", train_set, test_set, seed)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in log] == pytest.approx(losses, rel=1e-4)
    assert [line["test_accuracy"] for line in log] == pytest.approx(accuracies, abs=0.01)
    for name, value in torch.load(folder / "last.pt", weights_only=True)["model"].items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=1e-3, atol=2e-4)


def test_default_data_depends_on_the_accelerator(monkeypatch, tmp_path):
    monkeypatch.setattr(train, "numbers", lambda count, seed: make_numbers(200, seed))
    monkeypatch.setattr(train, "accelerator", lambda: None)
    result = CliRunner().invoke(train.app, ["--epochs", "1", "--runs", str(tmp_path)])
    assert result.output.startswith("data      numbers (no accelerator found") and result.exit_code == 0
    seen = []
    monkeypatch.setattr(train, "accelerator", lambda: "cuda")
    monkeypatch.setattr(train, "cifar100", lambda root, train: seen.append(root) or make_numbers(400, 1))
    result = CliRunner().invoke(train.app, ["--epochs", "1", "--runs", str(tmp_path), "--device", "cpu",
                                            "--data-dir", "here", "--model", "vit-nano"])
    assert result.output.startswith("data      cifar100 (an accelerator found") and result.exit_code == 0
    assert seen == [Path("here")] * 2
    assert (tmp_path / "mpvg-vit-nano-cifar100-seed0").exists()


def test_cifar100_is_torchvisions(monkeypatch, tmp_path):
    class Fake:
        def __init__(self, root, train, download):
            self.data = torch.arange(2 * 32 * 32 * 3).remainder(251).to(torch.uint8).view(2, 32, 32, 3).numpy()
            self.targets = [3, 99] if train and download else [0, 0]
    monkeypatch.setattr(torchvision.datasets, "CIFAR100", Fake)
    x, y = train.cifar100(tmp_path, train=True)
    assert x.shape == (2, 3, 32, 32) and x.dtype == torch.uint8 and y.tolist() == [3, 99]
    assert x[1, 2, 5, 7] == Fake(tmp_path, True, True).data[1, 5, 7, 2]


@pytest.mark.parametrize("flags, says", [
    (["--data", "imagenet"], "cannot be trained by this version: use --data cifar100 or"),
    (["--method", "mpvg", "--pe", "none"], "leave out --pe, --pool and --mpvg, or --method"),
    (["--pool", "cls", "--mpvg"], "--mpvg needs a PE and --pool gap"),
    (["--pe", "none", "--mpvg"], "--mpvg needs a PE and --pool gap"),
    (["--method", "rope"], "unknown method 'rope': choose from default"),
    (["--model", "resnet"], "unknown model 'resnet': choose from vit-lite"),
    (["--model", "deit-tiny"], "use vit-lite or vit-nano"),
    (["--batch-size", "401"], "--batch-size 401 is more than the 200"),
    (["--device", "cuda:99"], "cuda"),
    (["--device", "abacus"], "unknown --device 'abacus': choose from auto, cpu"),
    (["--device", "meta"], "unknown --device 'meta'"),
    (["--method", ""], "unknown method ''"),
    (["--name", ""], "is not the name of one folder"),
    (["--name", "../up"], "is not the name of one folder"),
    (["--name", "."], "is not the name of one folder"),
    (["--name", ".."], "is not the name of one folder"),
    (["--name", "x" * 201], "is not the name of one folder"),
    (["--lr", "inf"], "must be finite"),
    (["--weight-decay", "inf"], "must be finite"),
    (["--runs", __file__], "choose another --runs"),
    (["--lr", "1e30", "--batch-size", "20"], "lower --lr"),
], ids=str)
def test_a_users_mistake_gets_one_line(command, flags, says):
    result = command(*flags)
    assert result.exit_code == 2 and says in result.stderr
    assert result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("flags", [["--epochs", "0"], ["--batch-size", "-3"], ["--lr", "-1"], ["--pe", "rope"],
                                   ["--weight-decay", "-1"], ["--seed", "-1"], ["--seed", str(2**32)], ["--lr", "nan"],
                                   ["--surplus"], ["--pool", "max"], ["--data", "mnist"]])
def test_nonsense_is_refused(command, flags):
    assert command(*flags).exit_code == 2


def test_cifar100_that_cannot_be_had(command, monkeypatch, tmp_path):
    def offline(*_, **__):
        raise OSError("no network")
    monkeypatch.setattr(torchvision.datasets, "CIFAR100", offline)
    result = command("--data", "cifar100", "--data-dir", tmp_path)
    assert result.exit_code == 2 and "could not be downloaded (no network)" in result.stderr
    assert not (tmp_path / "runs").exists()                                     # nothing half-begun


def test_a_run_is_not_overwritten_unless_asked(command, tmp_path):
    assert command("--epochs", 1).exit_code == 0
    folder, _ = run_folder(tmp_path)
    before = (folder / "last.pt").read_bytes()
    again = command("--epochs", 1, "--seed", 0)
    assert again.exit_code == 2 and "--overwrite" in again.stderr and (folder / "last.pt").read_bytes() == before
    (folder / "log.jsonl").write_text("old\n" * 9)
    assert command("--epochs", 1, "--overwrite", "--lr", "1e30", "--batch-size", 20).exit_code == 2   # a failing run
    assert (folder / "last.pt").read_bytes() == before                          # costs nothing that was saved
    assert command("--epochs", 2, "--overwrite").exit_code == 0
    assert torch.load(folder / "last.pt", weights_only=True)["epoch"] == 2
    assert len((folder / "log.jsonl").read_text().splitlines()) == 2


def test_normaliser():
    x = torch.tensor([0, 255, 51], dtype=torch.uint8).view(1, 3, 1, 1)
    y = train.normaliser((0.5, 0.5, 0.1), (0.25, 0.5, 0.1), "cpu")(x)
    torch.testing.assert_close(y.flatten(), torch.tensor([-2.0, 1.0, 1.0]))


def test_lr_at():
    recipe = dict(epochs=300, warmup_epochs=10, lr=6e-4, min_lr=1e-5)
    assert train.lr_at(0, **recipe) == 1e-6
    assert train.lr_at(5, **recipe) == pytest.approx((1e-6 + 6e-4) / 2)
    for epoch, value in ((10, 5.984e-4), (150, 3.05e-4), (299, 1.002e-5), (305, 1e-5)):
        assert train.lr_at(epoch, **recipe) == pytest.approx(value, rel=1e-3)
    for lr in (0, 1e-9, 1e-6):                                                  # never above the peak
        assert max(train.lr_at(t / 10, **{**recipe, "lr": lr}) for t in range(3100)) == pytest.approx(lr)


def test_recipes_are_the_published_ones():
    published = dict(batch_size=128, lr=6e-4, min_lr=1e-5, weight_decay=0.06, label_smoothing=0.1, decay_pe=True,
                     mean=[0.5071, 0.4867, 0.4408], std=[0.2675, 0.2565, 0.2761], model="vit-lite", flip=True)
    assert {key: train.RECIPES["cifar100"][key] for key in published} == published
    assert not train.RECIPES["numbers"]["flip"]                                 # a mirrored number is another one


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


def test_flip_is_per_image_and_only_for_cifar100(monkeypatch, tmp_path):
    seen = []
    real = create("vit-nano", "mpvg")
    data = torch.arange(32, dtype=torch.uint8).expand(64, 3, 32, 32).contiguous()     # a ramp from left to right
    monkeypatch.setattr(train, "cifar100", lambda root, train: (data, torch.zeros(64, dtype=torch.long)))
    real.register_forward_pre_hook(lambda m, x: seen.append(x[0]) if m.training else None)
    monkeypatch.setattr(train, "create", lambda *a, **k: real)
    result = CliRunner().invoke(train.app, ["--data", "cifar100", "--epochs", "1", "--batch-size", "64",
                                            "--device", "cpu", "--runs", str(tmp_path)])
    assert result.exit_code == 0, result.output
    flipped = seen[0][:, 0, 0, 0] > seen[0][:, 0, 0, -1]
    assert 10 < flipped.sum() < 54


def readme_code():
    return re.findall(r"```python\n(.*?)```", (Path(__file__).parent / "README.md").read_text(), re.S)


def test_the_examples_for_readers_run():
    shown = {}
    exec(readme_code()[0], shown)
    assert shown["logits"].shape == (2, 10) and shown["tokens"].shape == (2, 128, 192) and shown["fast"].folded
    lines = re.findall(r"^    ((?:import|from|model =|logits = model).*)", mpvg.__doc__, re.M)
    exec("\n".join(lines), shown)
    assert len(lines) == 4 and shown["logits"].shape == (8, 100)


def test_help_and_a_real_process():
    root = Path(__file__).parent
    shown = subprocess.run([sys.executable, "train.py", "--help"], cwd=root, capture_output=True, text=True)
    flags = ("--pe", "--pool", "--mpvg", "--method", "--model", "--data", "--data-dir", "--epochs", "--batch-size",
             "--lr", "--weight-decay", "--seed", "--device", "--name", "--runs", "--overwrite")
    assert shown.returncode == 0 and all(f"{flag} " in shown.stdout for flag in flags)
    wrong = subprocess.run([sys.executable, "train.py", "--data", "imagenet"], cwd=root, capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: ") and "Traceback" not in wrong.stderr
