"""MPVG: position embedding (PE) for Vision Transformers with global average pooling (GAP), in one file.

A ViT adds a learned PE to its tokens once, before block 0. LaPE instead hands the PE to the attention of every block,
through a LayerNorm of its own ("layer-wise"). That helps a model with a class token and hurts one with GAP. MPVG keeps
the layer-wise PE under GAP and repairs it: the initial PE, through one more LayerNorm, joins the last LayerNorm's
output.

    pos_0   = pos_embed                                   the PE as it is learned, (1, N, D)
    x_0     = patch_embed(image) + pos_0                  LaPE: without pos_0
    e_1     = LN'_1(pos_0),  e_l = LN'_l(e_{l-1})         LaPE: starts one block earlier, e_0 = LN'_0(pos_0)
    x'_l    = x_l + MSA(LN_l(x_l) + e_l)                  block 0: LN_0(x_0) alone, its input already holds pos_0
    x_{l+1} = x'_l + MLP(LN''_l(x'_l))                    e_l enters the attention, never the stream or the MLP
    y       = LN(x_L) + LN'(pos_0)                        the step that makes PVG into MPVG
    logits  = head(mean of y over the tokens)             methods with a class token: head(y of that token)

    import torch
    from mpvg import create
    model = create("vit-lite", "mpvg")                    # 32x32 images, 100 classes; MODELS and METHODS name the rest
    logits = model(torch.randn(8, 3, 32, 32))             # (8, 100)

Paper: Lee, Ham, Kim, "Maximizing the Position Embedding for Vision Transformers with Global Average Pooling", AAAI
2025, arXiv 2502.02919. LaPE: Yu et al., ICCV 2023, arXiv 2212.05262. `python mpvg.py` prints methods and model sizes.
"""
import argparse
import copy
import math
import os
from collections import OrderedDict
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

# What the paper compares. Everything that distinguishes a method is in its row; ViT's docstring explains the toggles.
METHODS = {
    "default":     dict(pe="absolute", pool="cls"),  # ViT, DeiT
    "gap":         dict(pe="absolute", pool="gap"),
    "lape":        dict(pe="layerwise", pool="cls", layer0=True, hierarchical=True, add_input=False),
    "lape-gap":    dict(pe="layerwise", pool="gap", layer0=True, hierarchical=True, add_input=False),  # Figure 1
    "pvg":         dict(pe="layerwise", pool="gap", layer0=False, hierarchical=True, add_input=True),
    "mpvg":        dict(pe="layerwise", pool="gap", layer0=False, hierarchical=True, add_input=True, last_pe=0),
    "gap-last-pe": dict(pe="absolute", pool="gap", last_pe=0),  # Figure 5b: the last PE without the layer-wise one
    # Controls, ours and not the paper's: what is left of MPVG's gain when the last offset knows nothing of position?
    "mpvg-shift":  dict(pe="layerwise", pool="gap", layer0=False, hierarchical=True, add_input=True, last_pe="shift"),
    "mpvg-free":   dict(pe="layerwise", pool="gap", layer0=False, hierarchical=True, add_input=True, last_pe="free"),
}

MODELS = {  # what a row leaves out is ViT's default: patch 16 of 224, depth 12, MLP ratio 4, 1000 classes
    "vit-lite":   dict(image_size=32, patch_size=4, num_classes=100, dim=256, depth=7, heads=4, mlp_ratio=2.0,
                       qkv_bias=False, norm_eps=1e-5, attn_drop=0.1, drop_path=0.1, block="renorm", init="vit-lite",
                       pe_std=0.2),
    "vit-nano":   dict(image_size=32, patch_size=8, num_classes=100, dim=128, depth=4, heads=4, mlp_ratio=2.0),  # CPUs
    "deit-tiny":  dict(dim=192, heads=3, drop_path=0.1),
    "deit-small": dict(dim=384, heads=6, drop_path=0.1),
    "deit-base":  dict(dim=768, heads=12, drop_path=0.1),
}


def drop_path(x, rate, training):
    """Stochastic depth: drops a branch (B, N, D) for each sample with probability `rate`, scales the rest to match."""
    if rate == 0 or not training:
        return x
    keep = x.new_empty(x.shape[0], 1, 1).bernoulli_(1 - rate)
    return x * (keep / (1 - rate))


class Attention(nn.Module):
    """Multi-head self-attention (MSA), (B, N, D) -> (B, N, D)."""

    def __init__(self, dim, heads, qkv_bias, attn_drop):
        super().__init__()
        self.heads, self.attn_drop = heads, attn_drop
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        B, N, D = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)              # each (B, heads, N, D / heads)
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop if self.training else 0.0)
        return self.proj(x.transpose(1, 2).reshape(B, N, D))


class Block(nn.Module):
    """One transformer block, (B, N, D) -> (B, N, D); `pe`, (1, N, D) or None, joins the input of the attention only."""

    def __init__(self, dim, heads, mlp_ratio, qkv_bias, norm_eps, attn_drop, drop_path, renorm, has_pe):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, norm_eps)                    # LN_l
        self.pe_norm = nn.LayerNorm(dim, norm_eps) if has_pe else None  # LN'_l, applied in ViT.delivered_pe
        self.attn = Attention(dim, heads, qkv_bias, attn_drop)
        self.norm2 = nn.LayerNorm(dim, norm_eps)                    # LN''_l
        hidden = int(dim * mlp_ratio)
        self.mlp = nn.Sequential(OrderedDict(fc1=nn.Linear(dim, hidden), gelu=nn.GELU(), fc2=nn.Linear(hidden, dim)))
        self.drop_path, self.renorm = drop_path, renorm

    def forward(self, x, pe=None):
        y = self.norm1(x) if pe is None else self.norm1(x) + pe
        x = x + drop_path(self.attn(y), self.drop_path, self.training)
        y = self.norm2(x)
        if self.renorm:  # ViT-Lite: the norm's output replaces the stream itself
            x = y
        return x + drop_path(self.mlp(y), self.drop_path, self.training)


def sincos_pos_embed(grid, dim):
    """Fixed 2-D sine-cosine table (1, h * w, dim); a quarter of the channels each for sin y, cos y, sin x, cos x."""
    omega = 10000.0 ** -(torch.arange(dim // 4) / (dim // 4))
    y, x = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    angles = [p.reshape(-1, 1) * omega for p in (y, x)]             # each (N, dim / 4)
    return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1)[None]


class ViT(nn.Module):
    """Vision Transformer with every position embedding that the MPVG paper compares. Without toggles: the plain ViT.

    Model:
        image_size: height and width in pixels, an int or (h, w); a multiple of patch_size.
        block: "prenorm", or "renorm": ViT-Lite's, whose second norm replaces the residual stream.
        init: "deit", or "vit-lite": Kaiming-normal patch convolution, class token from 0.
        attn_drop, drop_path: dropout of attention probabilities; stochastic depth of the last block (linear from 0).
        pe_init, pe_std: "learned" from a truncated normal of that standard deviation, or "sincos", fixed.

    Method (METHODS has the paper's combinations):
        pe: "absolute", PE added to the tokens once; "layerwise", delivered to the blocks' attention; "none".
        pool: "cls", class token; "gap", mean over tokens, after the last norm.
        last_pe: what joins the last norm's output (GAP only). None; 0: LN'(pos_0), MPVG; n >= 1: LN' of the PE that
            block n was given (Table 5); the controls "shift": one learned vector, "free": LN' of a second table.
        layer0, hierarchical, add_input: the structure of a layer-wise PE (Table 6): is it delivered to block 0 as well;
            is e_l made from e_{l-1} or always from pos_0; is pos_0 also added to the tokens before block 0.

    Raises ValueError for a combination that cannot be, with what to do instead.
    """

    def __init__(self, *, image_size=224, patch_size=16, in_channels=3, num_classes=1000, dim=192, depth=12, heads=3,
                 mlp_ratio=4.0, qkv_bias=True, norm_eps=1e-6, attn_drop=0.0, drop_path=0.0, block="prenorm",
                 init="deit", pe_init="learned", pe_std=0.02,
                 pe="absolute", pool="cls", last_pe=None, layer0=False, hierarchical=True, add_input=True):
        super().__init__()
        height, width = _check_options(image_size, patch_size, in_channels, num_classes, dim, depth, heads, attn_drop,
                                       drop_path, block, init, pe_init, pe, pool, last_pe, layer0, hierarchical,
                                       add_input)
        self.image_shape = (in_channels, height, width)
        self.grid = (height // patch_size, width // patch_size)
        self.pool, self.last_pe, self.hierarchical = pool, last_pe, hierarchical
        self.add_input = add_input and pe != "none"
        self.folded = False
        patches, tokens = math.prod(self.grid), math.prod(self.grid) + (pool == "cls")

        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(in_channels, dim, patch_size, stride=patch_size)))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if pool == "cls" else None
        if pe_init == "sincos" and pe != "none":  # the class token has no place on the grid: a row of zeros
            self.register_buffer("pos_embed", F.pad(sincos_pos_embed(self.grid, dim), (0, 0, tokens - patches, 0)))
        else:
            self.pos_embed = nn.Parameter(torch.zeros(1, tokens, dim)) if pe != "none" else None
        self.blocks = nn.ModuleList(
            Block(dim, heads, mlp_ratio, qkv_bias, norm_eps, attn_drop, drop_path * i / max(depth - 1, 1),
                  renorm=block == "renorm", has_pe=pe == "layerwise" and (i > 0 or layer0))
            for i in range(depth))
        self.norm = nn.LayerNorm(dim, norm_eps)
        self.pe_norm = nn.LayerNorm(dim, norm_eps) if last_pe not in (None, "shift") else None  # the last LN'
        self.last_shift = nn.Parameter(torch.zeros(dim)) if last_pe == "shift" else None
        self.last_pos_embed = nn.Parameter(torch.zeros(1, tokens, dim)) if last_pe == "free" else None
        self.head = nn.Linear(dim, num_classes)
        self._init_weights(init, pe_std)

    def _init_weights(self, init, pe_std):
        """Norms start at 1 and 0 (torch's default); the PE tables come last, so that all methods share the rest."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if init == "vit-lite":
            nn.init.kaiming_normal_(self.patch_embed.proj.weight)
        elif self.cls_token is not None:
            nn.init.trunc_normal_(self.cls_token, std=0.02)
        for table in (self.pos_embed, self.last_pos_embed):
            if isinstance(table, nn.Parameter):  # a sincos table is a buffer
                nn.init.trunc_normal_(table, std=pe_std)

    def delivered_pe(self):
        """-> (per_block, last): what each block's attention is given, a list of (1, N, D) or None, and what joins the
        last norm's output, (1, N, D), (D) for "shift", or None. The same for every image: no batch in it."""
        per_block, e = [], self.pos_embed
        for block in self.blocks:
            per_block.append(None if block.pe_norm is None else block.pe_norm(e))
            if self.hierarchical and per_block[-1] is not None:
                e = per_block[-1]
        if self.last_pe in (None, "shift"):
            return per_block, self.last_shift                       # one vector, (D), or None
        tables = [self.pos_embed, *per_block[1:]]                   # 0 is pos_0, also where block 0 is given an e_0
        return per_block, self.pe_norm(self.last_pos_embed if self.last_pe == "free" else tables[self.last_pe])

    def forward_features(self, images):
        """Images (B, C, H, W) -> tokens after the last norm and its PE, (B, N, D); with a class token it is row 0."""
        if images.shape[1:] != self.image_shape:
            raise ValueError(f"images {tuple(images.shape)} are not (B, {', '.join(map(str, self.image_shape))}): "
                             "give such a batch, or build a model of their image_size and load_weights() into it")
        per_block, last = self.delivered_pe()
        x = self.patch_embed(images).flatten(2).transpose(1, 2)     # (B, D, h, w) -> (B, N, D), row by row
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)  # (B, 1 + N, D)
        if self.add_input:
            x = x + self.pos_embed
        x = x.contiguous()  # without a class token it still lies as the convolution left it, which slows every block
        for block, pe in zip(self.blocks, per_block):
            x = block(x, pe)
        x = self.norm(x)
        return x if last is None else x + last

    def forward(self, images):
        """Images (B, C, H, W) -> logits (B, num_classes)."""
        x = self.forward_features(images)
        return self.head(x.mean(dim=1) if self.pool == "gap" else x[:, 0])

    def train(self, mode=True):
        if mode and self.folded:
            raise RuntimeError("a folded model is for inference only: train the model that it was folded from")
        return super().train(mode)


def _check_words(**options):
    for name, (value, *choices) in options.items():
        if value not in choices:
            raise ValueError(f"unknown {name} {value!r}: choose from {', '.join(choices)}")


def _check_options(image_size, patch_size, in_channels, num_classes, dim, depth, heads, attn_drop, drop_path, block,
                   init, pe_init, pe, pool, last_pe, layer0, hierarchical, add_input):
    """-> height and width of the images."""
    sides = image_size if isinstance(image_size, (tuple, list)) else (image_size, image_size)
    if len(sides) != 2:
        raise ValueError(f"image_size={image_size!r} is neither an int nor (height, width)")
    height, width = sides
    for name, value in dict(image_height=height, image_width=width, patch_size=patch_size, in_channels=in_channels,
                            num_classes=num_classes, dim=dim, depth=depth, heads=heads).items():
        if type(value) is not int or value < 1:
            raise ValueError(f"{name}={value!r} is not a positive whole number")
    _check_words(block=(block, "prenorm", "renorm"), init=(init, "deit", "vit-lite"), pool=(pool, "cls", "gap"),
                 pe=(pe, "absolute", "layerwise", "none"), pe_init=(pe_init, "learned", "sincos"))
    for impossible, message in (
        (height % patch_size or width % patch_size,
         f"image_size {height}x{width} is not divisible by patch_size {patch_size}: change one"),
        (dim % heads or (pe_init == "sincos" and dim % 4),
         f"dim {dim} is not divisible by heads {heads}, or by 4 for pe_init='sincos': change one"),
        (not (0 <= attn_drop < 1 and 0 <= drop_path < 1),
         f"attn_drop={attn_drop!r} and drop_path={drop_path!r} must be probabilities in [0, 1)"),
        (pe != "layerwise" and (layer0 or not hierarchical),
         f"layer0 and hierarchical shape the PE given to blocks, and pe={pe!r} gives none: use pe='layerwise', or "
         "layer0=False and hierarchical=True"),
        (pe == "absolute" and not add_input,
         "pe='absolute' with add_input=False leaves no PE at all: use pe='none' to say so"),
        (isinstance(last_pe, bool) or last_pe not in (None, "shift", "free", *range(depth)),
         f"unknown last_pe {last_pe!r}: choose from None, 0 (the initial PE), a block's number under {depth} (the PE "
         "that it was given), 'shift', 'free'"),
        (last_pe is not None and pool == "cls",
         "last_pe acts on the mean over tokens: use pool='gap', or last_pe=None with a class token"),
        (last_pe in range(depth) and pe == "none",
         f"last_pe={last_pe} is a PE and pe='none' has none: use pe='layerwise', or last_pe=None"),
        (last_pe in range(1, depth) and pe == "absolute",
         f"last_pe={last_pe} is the PE of a block and pe='absolute' gives none: use last_pe=0, or pe='layerwise'"),
    ):
        if impossible:
            raise ValueError(message)
    return height, width


def create(model, method, **overrides):
    """-> ViT of MODELS[model] with METHODS[method]; keywords override either. Raises ValueError for unknown names."""
    _check_words(model=(model, *MODELS), method=(method, *METHODS))
    return ViT(**{**MODELS[model], **METHODS[method], **overrides})


class _Stored(nn.Module):
    """Stands where a PE norm stood before fold(): gives that norm's output, (1, N, D), whatever its input."""

    def __init__(self, pe):
        super().__init__()
        self.register_buffer("pe", pe)

    def forward(self, _):
        return self.pe


@torch.no_grad()
def fold(model):
    """-> a copy for inference without a single PE norm and with the same logits, for every method.

    No PE depends on the image, so each block's is stored once. The last one adds the same vector to every mean over
    tokens, so it moves into the head's bias (the copy's forward_features() is without it). Raises ValueError for a
    model in training mode; the copy raises RuntimeError on .train().
    """
    if any(module.training for module in model.modules()):
        raise ValueError("fold() makes a copy for inference: call model.eval() first")
    folded = copy.deepcopy(model).requires_grad_(False)
    per_block, last = folded.delivered_pe()
    for block, pe in zip(folded.blocks, per_block):
        block.pe_norm = None if pe is None else _Stored(pe)
    if last is not None:
        folded.head.bias += folded.head.weight @ last.reshape(-1, last.shape[-1]).mean(dim=0)
        folded.last_pe = folded.pe_norm = folded.last_shift = folded.last_pos_embed = None
    if not folded.add_input:
        folded.pos_embed = None
    folded.folded = True
    return folded.eval()


def resize_pos_embed(pos_embed, old_grid, new_grid, prefix=0):
    """PE table (1, prefix + h * w, D) -> (1, prefix + h' * w', D), bicubic with antialiasing.

    old_grid, new_grid: (h, w) in patches. prefix: rows before the grid that stay as they are (1 for a class token).
    The same grid is the identity. Raises ValueError where old_grid is not the table's.
    """
    if pos_embed.shape[1] != prefix + math.prod(old_grid):
        raise ValueError(f"a PE of {pos_embed.shape[1]} rows is not {prefix} + {old_grid[0]}x{old_grid[1]}: "
                         "give old_grid, the (h, w) it was trained on")
    if tuple(old_grid) == tuple(new_grid):
        return pos_embed
    rows = pos_embed[:, prefix:].unflatten(1, tuple(old_grid)).permute(0, 3, 1, 2)  # (1, D, h, w)
    dtype = rows.dtype if rows.dtype == torch.float64 else torch.float32  # half precision would lose digits here
    rows = F.interpolate(rows.to(dtype), size=tuple(new_grid), mode="bicubic", antialias=True).to(pos_embed.dtype)
    return torch.cat([pos_embed[:, :prefix], rows.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def read_checkpoint(path):
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # plain values; DeiT and LaPE save one
            return torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError, PermissionError):  # their own messages are clear
        raise
    except Exception as error:  # a damaged file can fail in any way
        raise ValueError(f"{path} cannot be loaded safely: it is damaged or holds more than tensors and plain values; "
                         "where you trust it, re-save its state_dict() alone") from error


def _fit_pos_embed(table, new_grid, prefix, old_grid):
    """-> a checkpoint's PE table on the model's grid; as it is where only the caller can tell the grid it is of."""
    rows = table.shape[1] - prefix
    side = math.isqrt(max(rows, 0))
    if old_grid is None and rows == math.prod(new_grid) and side ** 2 == rows and new_grid != (side, side):
        raise ValueError(f"the file's PE may be of a {side}x{side} grid or of the model's {new_grid[0]}x{new_grid[1]}: "
                         "say which with old_grid=(h, w)")
    if old_grid is None and (rows == math.prod(new_grid) or side ** 2 != rows or side == 0):
        return table
    return resize_pos_embed(table, old_grid or (side, side), new_grid, prefix)


def load_weights(model, source, *, new_head=False, old_grid=None):
    """Loads a checkpoint's path, or a state dict, into the model and returns the model. DeiT's, timm's and LaPE's fit.

    A PE of another grid is resized, a fixed one too; old_grid, (h, w) in patches, names the file's grid where it is not
    square. new_head: keep the model's own head where the file's has another number of classes. Raises ValueError that
    names every missing, unexpected or misshapen key; the model is then unchanged.
    """
    state = read_checkpoint(source) if isinstance(source, (str, os.PathLike)) else source
    for key in ("model", "state_dict"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping):
        raise ValueError(f"a path or a state dict is needed, this is a {type(state).__name__}")
    state, own = dict(state), model.state_dict()
    plain = {name for name, value in state.items()
             if isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_meta}

    prefix = int("cls_token" in state)
    for name in {"pos_embed", "last_pos_embed"} & plain & own.keys():
        if state[name].ndim == 3 and prefix == (model.cls_token is not None):
            state[name] = _fit_pos_embed(state[name], model.grid, prefix, old_grid)
    if new_head and "head.weight" in plain and state["head.weight"].shape[:1] != own["head.weight"].shape[:1]:
        state.update({name: own[name] for name in ("head.weight", "head.bias")})
        plain |= {"head.weight", "head.bias"}

    problems = [f"missing {name}" for name in own if name not in state]
    for name, value in state.items():
        if name not in own:
            problems.append(f"unexpected {name}")
        elif name not in plain:
            problems.append(f"{name} is no plain tensor")
        elif value.shape != own[name].shape:
            problems.append(f"{name} is {tuple(value.shape)}, the model's {tuple(own[name].shape)}")
            if name == "head.weight":
                problems[-1] += " (new_head=True starts a new head)"
            elif name in ("pos_embed", "last_pos_embed"):
                problems[-1] += " (old_grid=(h, w) names the file's grid where it is not square)"
    if problems:
        raise ValueError(f"these weights do not fit (another model, another method, or folded?): {'; '.join(problems)}")
    model.load_state_dict(state)
    return model


PAPER_METHODS = ("default", "lape", "pvg", "mpvg")
PAPER_PARAMETERS = {  # millions, cut to three digits, as published; lape's of the first two are 0.001 off ours
    "vit-lite": (3.740, 3.744, 3.742, 3.743), "deit-tiny": (5.717, 5.721, 5.721, 5.721),
    "deit-small": (22.050, 22.059, 22.058, 22.059), "deit-base": (86.567, 86.586, 86.583, 86.584),
}


def main():
    toggles = ("pe", "pool", "last_pe", "layer0", "hierarchical", "add_input")
    print("method       " + "".join(f"{name:<13}" for name in toggles))
    for method, row in METHODS.items():
        print(f"{method:<13}" + "".join(f"{str(row.get(name, '-')):<13}" for name in toggles))
    print("(-: none, or of no meaning there)\n\nparameters (in brackets: the paper's, in millions, cut)")
    print("model        " + "".join(f"{method:<21}" for method in PAPER_METHODS))
    for name in MODELS:
        cells = ""
        for method, paper in zip(PAPER_METHODS, PAPER_PARAMETERS.get(name, (None,) * 4)):
            with torch.device("meta"):  # shapes without memory
                count = sum(p.numel() for p in create(name, method).parameters())
            cells += f"{f'{count:,} ({paper:.3f})' if paper else f'{count:,}':<21}"
        print(f"{name:<13}{cells}")


if __name__ == "__main__":
    main()
