"""MPVG: position embedding (PE) for Vision Transformers with global average pooling (GAP), in one file.

A ViT adds a learned PE to its tokens once, before block 0. LaPE delivers it to the attention of every block instead,
through a LayerNorm of its own ("layer-wise"). The paper reports that this helps with a class token and hurts with GAP.
For GAP it keeps the PE at the input and delivers it from block 1 on (PVG), and adds the initial PE, through one more
LayerNorm, to the output of the last LayerNorm (MPVG).

    LN_l, LN''_l: block l's two norms; LN'_l: its norm for the PE; LN, LN': the last norm and the norm for its PE
    pos_0   = pos_embed                                   the PE as it is learned, (1, N, D)
    x_0     = patch_embed(image) + pos_0                  LaPE: without pos_0
    e_1     = LN'_1(pos_0),  e_l = LN'_l(e_{l-1})         LaPE: one block earlier, e_0 = LN'_0(pos_0)
    x'_l    = x_l + MSA(LN_l(x_l) + e_l)                  block 0: no e_0, x_0 already holds pos_0; LaPE: e_0
    x_{l+1} = x'_l + MLP(LN''_l(x'_l))                    ViT-Lite: LN''_l(x'_l) + MLP(LN''_l(x'_l))
    y       = LN(x_L) + LN'(pos_0)                        without LN'(pos_0) this is PVG
    logits  = head(mean of y over the tokens)             with a class token: head(its row of y)

    import torch
    from mpvg import create
    model = create("vit-lite", "mpvg")                    # see MODELS and METHODS
    logits = model(torch.randn(8, 3, 32, 32))             # (8, 100)

Paper: Lee, Ham, Kim, "Maximizing the Position Embedding for Vision Transformers with Global Average Pooling", AAAI
2025, arXiv 2502.02919. LaPE: Yu et al., ICCV 2023, arXiv 2212.05262. `python mpvg.py` prints methods and model sizes.
"""
import argparse
import copy
import math
import os
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

__version__ = "1.0.0"

# Everything that distinguishes a method is in its row; ViT's docstring explains the options. A PE of your own needs an
# option of ViT, which delivered_pe or pe_after_last_norm uses, and a row here.
METHODS = {
    "default":     dict(pe="absolute", pool="cls"),  # ViT, DeiT
    "gap":         dict(pe="absolute", pool="gap"),
    "lape":        dict(pe="layerwise", pool="cls", layer0=True, hierarchical=True, add_input=False),
    "lape-gap":    dict(pe="layerwise", pool="gap", layer0=True, hierarchical=True, add_input=False),  # Figure 1
    "pvg":         dict(pe="layerwise", pool="gap", layer0=False, hierarchical=True, add_input=True),
    "mpvg":        dict(pe="layerwise", pool="gap", layer0=False, hierarchical=True, add_input=True, last_pe=0),
    "gap-last-pe": dict(pe="absolute", pool="gap", last_pe=0),  # Figure 5b: the last PE without a layer-wise PE
    # Two controls of ours: how much of MPVG's gain remains if the last offset does not use pos_0?
    "mpvg-shift":  dict(pe="layerwise", pool="gap", layer0=False, hierarchical=True, add_input=True, last_pe="shift"),
    "mpvg-free":   dict(pe="layerwise", pool="gap", layer0=False, hierarchical=True, add_input=True, last_pe="free"),
}

MODELS = {  # other options keep ViT's defaults: 224x224 images, patches of 16, depth 12, MLP ratio 4, 1000 classes
    "vit-lite":   dict(image_size=32, patch_size=4, num_classes=100, dim=256, depth=7, heads=4, mlp_ratio=2.0,
                       qkv_bias=False, norm_eps=1e-5, attn_drop=0.1, drop_path=0.1, block_type="renorm",
                       init="vit-lite", pe_std=0.2),
    "vit-nano":   dict(image_size=32, patch_size=8, num_classes=100, dim=128, depth=4, heads=4, mlp_ratio=2.0),
    "deit-tiny":  dict(dim=192, heads=3, drop_path=0.1),
    "deit-small": dict(dim=384, heads=6, drop_path=0.1),
    "deit-base":  dict(dim=768, heads=12, drop_path=0.1),
}
MODELS["vit-lite-mini"] = MODELS["vit-lite"] | dict(dim=96)  # like vit-nano, for experiments on a CPU


def stochastic_depth(x, p, training):
    """Zeroes x, a branch's output (B, N, D), for each sample with probability p; divides the others by 1 - p."""
    if p > 0 and training:
        keep = x.new_empty(x.shape[0], 1, 1).bernoulli_(1 - p)
        x = x * (keep / (1 - p))
    return x


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
    """A transformer block, (B, N, D) -> (B, N, D). `e`, (1, N, D) or None, is added to the attention's input only."""

    def __init__(self, dim, heads, mlp_ratio, qkv_bias, norm_eps, attn_drop, drop_path, renorm, has_pe):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, norm_eps)                    # LN_l
        self.pe_norm = nn.LayerNorm(dim, norm_eps) if has_pe else None  # LN'_l, applied in ViT.delivered_pe
        self.attn = Attention(dim, heads, qkv_bias, attn_drop)
        self.norm2 = nn.LayerNorm(dim, norm_eps)                    # LN''_l
        hidden = int(dim * mlp_ratio)
        self.mlp = nn.Sequential(OrderedDict(fc1=nn.Linear(dim, hidden), gelu=nn.GELU(), fc2=nn.Linear(hidden, dim)))
        self.drop_path, self.renorm = drop_path, renorm

    def forward(self, x, e=None):
        y = self.norm1(x) if e is None else self.norm1(x) + e
        x = x + stochastic_depth(self.attn(y), self.drop_path, self.training)
        y = self.norm2(x)
        shortcut = y if self.renorm else x                          # ViT-Lite: the norm replaces the stream
        return shortcut + stochastic_depth(self.mlp(y), self.drop_path, self.training)


def sincos_pos_embed(grid, dim):
    """Fixed 2-D sine-cosine table (1, h * w, dim); a quarter of the channels each for sin y, cos y, sin x, cos x."""
    omega = 10000.0 ** -(torch.arange(dim // 4) / (dim // 4))
    y, x = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    angles = [position.reshape(-1, 1) * omega for position in (y, x)]  # each (N, dim / 4)
    return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1)[None]


class ViT(nn.Module):
    """Vision Transformer with every position embedding that the MPVG paper compares. By default it is a plain ViT.

    Model:
        image_size: height and width in pixels, an int or (h, w); a multiple of patch_size.
        block_type: "prenorm", or "renorm", ViT-Lite's block, whose second norm replaces the residual stream.
        init: "deit", or "vit-lite": Kaiming-normal patch convolution, class token starts at 0.
        attn_drop: dropout of attention probabilities.
        drop_path: stochastic depth, the last block's rate; it rises linearly from 0 in block 0.
        pe_init: "learned", or "sincos", a fixed sine-cosine table.
        pe_std: a learned PE starts from a normal of this standard deviation, cut at +-2 (so pe_std=1 gives 0.88).

    Method (METHODS has the paper's combinations):
        pe: "absolute", added to the tokens once; "layerwise", delivered to the blocks' attention (see layer0); "none".
        pool: "cls", class token; "gap", mean over the tokens after the last norm.
        last_pe: what is added to the last norm's output (GAP only). None: nothing. 0: LN'(pos_0), MPVG. n >= 1: LN' of
            the e_n that block n is given (Table 5). "shift": a learned vector. "free": LN' of a second learned table.
        layer0, hierarchical, add_input: a layer-wise PE's structure (Table 6): whether it is delivered to block 0 as
            well; whether e_l is made from e_{l-1} or always from pos_0; whether pos_0 is also added to the tokens.

    Raises ValueError for an invalid option or combination and says what to use instead.
    """

    def __init__(self, *, image_size=224, patch_size=16, in_channels=3, num_classes=1000, dim=192, depth=12, heads=3,
                 mlp_ratio=4.0, qkv_bias=True, norm_eps=1e-6, attn_drop=0.0, drop_path=0.0, block_type="prenorm",
                 init="deit", pe_init="learned", pe_std=0.02,
                 pe="absolute", pool="cls", last_pe=None, layer0=False, hierarchical=True, add_input=True):
        is_pair = isinstance(image_size, (tuple, list)) and len(image_size) == 2
        height, width = image_size if is_pair else (image_size, image_size)
        check_options(**locals())  # its **_ takes what is not an option, such as self
        super().__init__()
        self.image_shape = (in_channels, height, width)
        self.grid = (height // patch_size, width // patch_size)
        self.pool, self.last_pe, self.hierarchical = pool, last_pe, hierarchical
        self.add_input = add_input and pe != "none"
        tokens = math.prod(self.grid) + (pool == "cls")

        # Parameter names are those of DeiT and timm (hence patch_embed.proj), and LaPE's pe_norm.
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(in_channels, dim, patch_size, stride=patch_size)))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if pool == "cls" else None
        if pe_init == "sincos" and pe != "none":  # the class token has no place on the grid: a row of zeros
            self.register_buffer("pos_embed", F.pad(sincos_pos_embed(self.grid, dim), (0, 0, int(pool == "cls"), 0)))
        else:
            self.pos_embed = nn.Parameter(torch.zeros(1, tokens, dim)) if pe != "none" else None
        self.blocks = nn.ModuleList(
            Block(dim, heads, mlp_ratio, qkv_bias, norm_eps, attn_drop, drop_path * i / max(depth - 1, 1),
                  renorm=block_type == "renorm", has_pe=pe == "layerwise" and (i > 0 or layer0))
            for i in range(depth))
        self.norm = nn.LayerNorm(dim, norm_eps)                     # LN, the last norm
        self.pe_norm = nn.LayerNorm(dim, norm_eps) if last_pe not in (None, "shift") else None  # its LN'
        self.last_shift = nn.Parameter(torch.zeros(dim)) if last_pe == "shift" else None
        self.last_pos_embed = nn.Parameter(torch.zeros(1, tokens, dim)) if last_pe == "free" else None
        self.head = nn.Linear(dim, num_classes)
        self.init_weights(init, pe_std)

    def init_weights(self, init, pe_std):
        """Norms and DeiT's convolution keep torch's init. PE tables are drawn last: methods share the other weights."""
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
        """-> [e_0, ..., e_{L-1}]: what each block adds to its attention's input, (1, N, D), or None for nothing."""
        delivered, source = [], self.pos_embed
        for block in self.blocks:
            e = None if block.pe_norm is None else block.pe_norm(source)
            if self.hierarchical and e is not None:
                source = e
            delivered.append(e)
        return delivered

    def pe_after_last_norm(self, delivered):
        """-> what is added to the last norm's output, (1, N, D), for "shift" (1, 1, D), or None for nothing."""
        if self.last_pe is None:                                    # not `if self.last_pe`: MPVG's 0 is falsy
            return None
        if self.last_pe == 0:
            return self.pe_norm(self.pos_embed)                     # MPVG: LN'(pos_0)
        if self.last_pe == "shift":
            return self.last_shift[None, None]
        if self.last_pe == "free":
            return self.pe_norm(self.last_pos_embed)
        return self.pe_norm(delivered[self.last_pe])                # Table 5: LN'(e_n)

    def forward_features(self, images):
        """Images (B, C, H, W) -> tokens after the last norm and its PE, (B, N, D); a class token is row 0."""
        if images.shape[1:] != self.image_shape:
            raise ValueError(f"images are {tuple(images.shape)}, the model takes (B, *{self.image_shape}): "
                             "resize them or change image_size")
        delivered = self.delivered_pe()
        x = self.patch_embed(images).flatten(2).transpose(1, 2)     # (B, D, h, w) -> (B, N, D), row by row
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)  # from here on, N includes it
        if self.add_input:
            x = x + self.pos_embed
        x = x.to(self.norm.weight.dtype).contiguous()  # fp32 even under autocast; a transposed x would be slow
        for block, e in zip(self.blocks, delivered):
            x = block(x, e)
        y, last = self.norm(x), self.pe_after_last_norm(delivered)
        return y if last is None else y + last  # MPVG. Under GAP it adds the same vector to every image's mean

    def forward(self, images):
        """Images (B, C, H, W) -> logits (B, num_classes)."""
        y = self.forward_features(images)
        return self.head(y.mean(dim=1) if self.pool == "gap" else y[:, 0])


def check_word(name, value, choices):
    if value not in choices:
        raise ValueError(f"unknown {name} {value!r}: choose from {', '.join(map(str, choices))}")


def check_options(*, height, width, patch_size, in_channels, num_classes, dim, depth, heads, mlp_ratio, qkv_bias,
                  norm_eps, attn_drop, drop_path, block_type, init, pe_init, pe_std,
                  pe, pool, last_pe, layer0, hierarchical, add_input, **_):
    """Raises ValueError for invalid options. The model works without this check."""
    for name, value in dict(image_height=height, image_width=width, patch_size=patch_size, in_channels=in_channels,
                            num_classes=num_classes, dim=dim, depth=depth, heads=heads).items():
        if type(value) is not int or value < 1:
            raise ValueError(f"{name}={value!r} is not a positive whole number")
    for name, value in dict(mlp_ratio=mlp_ratio, norm_eps=norm_eps, pe_std=pe_std).items():
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise ValueError(f"{name}={value!r} is not a positive number")
    for name, value in dict(attn_drop=attn_drop, drop_path=drop_path).items():
        if type(value) not in (int, float) or not 0 <= value < 1:
            raise ValueError(f"{name}={value!r} is not in [0, 1)")
    for name, value in dict(qkv_bias=qkv_bias, layer0=layer0, hierarchical=hierarchical, add_input=add_input).items():
        if type(value) is not bool:
            raise ValueError(f"{name}={value!r} is neither True nor False")
    check_word("block_type", block_type, ("prenorm", "renorm"))
    check_word("init", init, ("deit", "vit-lite"))
    check_word("pe_init", pe_init, ("learned", "sincos"))
    check_word("pe", pe, ("absolute", "layerwise", "none"))
    check_word("pool", pool, ("cls", "gap"))
    if height % patch_size or width % patch_size:
        raise ValueError(f"image_size {height}x{width} is not divisible by patch_size {patch_size}: change one")
    if dim % heads or (pe_init == "sincos" and dim % 4):
        raise ValueError(f"dim {dim} is not divisible by heads {heads}, or by 4 for pe_init='sincos': change one")
    if pe != "layerwise" and (layer0 or not hierarchical or not add_input):
        raise ValueError(f"layer0, hierarchical and add_input need pe='layerwise': leave them out with pe={pe!r}")
    if not (type(last_pe) is int and 0 <= last_pe < depth) and last_pe not in (None, "shift", "free"):
        raise ValueError(f"unknown last_pe {last_pe!r}: choose from None, 0 to {depth - 1}, 'shift', 'free'")
    if last_pe is not None and pool == "cls":
        raise ValueError("last_pe needs pool='gap': use that, or last_pe=None with a class token")
    if type(last_pe) is int and (pe == "none" or pe == "absolute" and last_pe > 0):
        raise ValueError(f"last_pe={last_pe} names a PE that pe={pe!r} does not have: use pe='layerwise'")


def create(model, method, **overrides):
    """-> ViT of MODELS[model] with METHODS[method]; keywords override either. Raises ValueError for unknown names."""
    check_word("model", model, MODELS)
    check_word("method", method, METHODS)
    return ViT(**(MODELS[model] | METHODS[method] | overrides))


class StoredPE(nn.Module):
    """Takes the place of a PE norm in fold(): returns that norm's output, (1, N, D), whatever its input."""

    def __init__(self, e):
        super().__init__()
        self.register_buffer("e", e)

    def forward(self, _):
        return self.e


@torch.no_grad()
def fold(model):
    """-> a copy for inference, in eval mode: no PE norm is left, and the logits are the same, for every method.

    No PE depends on the image, so each e_l is stored once. The last PE adds the same vector to every mean over the
    tokens, so it moves into the head's bias; the head must be an nn.Linear. The copy's forward_features() lacks it.
    """
    folded = copy.deepcopy(model).requires_grad_(False)
    delivered = folded.delivered_pe()
    last = folded.pe_after_last_norm(delivered)
    for block, e in zip(folded.blocks, delivered):
        block.pe_norm = None if e is None else StoredPE(e)
    if last is not None:
        folded.head.bias += folded.head.weight @ last.mean(dim=(0, 1))
        folded.last_pe = folded.pe_norm = folded.last_shift = folded.last_pos_embed = None
    return folded.eval()


def resize_pos_embed(pos_embed, old_grid, new_grid, prefix=0):
    """PE table (1, prefix + h * w, D) -> (1, prefix + h' * w', D), bicubic with antialiasing.

    old_grid, new_grid: (h, w) in patches; if they are equal the table is unchanged. prefix: rows before the grid that
    stay as they are (1 for a class token). old_grid=None: new_grid or a square, whichever has the table's number of
    patches. Raises ValueError unless exactly one of them fits, or if old_grid does not.
    """
    patches = pos_embed.shape[1] - prefix
    side = math.isqrt(patches)
    grids = {tuple(new_grid), (side, side)} if old_grid is None else {tuple(old_grid)}
    fitting = [grid for grid in grids if math.prod(grid) == patches]
    if len(fitting) != 1:
        raise ValueError(f"a PE of {patches} patches (class tokens: {prefix}) fits {len(fitting)} of the grids "
                         f"{sorted(grids)}: load_weights needs old_grid, the (h, w) that it was trained on")
    if tuple(new_grid) in fitting:
        return pos_embed
    table = pos_embed[:, prefix:].unflatten(1, fitting[0]).permute(0, 3, 1, 2)  # (1, D, h, w)
    table = table.to(torch.promote_types(table.dtype, torch.float32))  # a CPU does not resize half precision
    table = F.interpolate(table, size=new_grid, mode="bicubic", antialias=True).to(pos_embed.dtype)
    return torch.cat([pos_embed[:, :prefix], table.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def read_checkpoint(path):
    """-> what torch.save wrote there, plain values and tensors; runs no code from it. Raises OSError, ValueError."""
    with open(path, "rb") as file, torch.serialization.safe_globals([argparse.Namespace]):  # DeiT and LaPE save one
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file can fail in any way
            raise ValueError(f"{path} cannot be loaded safely: it is damaged or holds more than tensors and plain "
                             "values; if you trust it, save its state_dict() again by itself") from error


def state_dict_of(checkpoint):
    """-> the state dict in what a training program has saved. Raises ValueError where there is none."""
    for key in ("model", "state_dict"):
        if isinstance(checkpoint, dict) and isinstance(checkpoint.get(key), dict):
            checkpoint = checkpoint[key]
    if not isinstance(checkpoint, dict) or not all(isinstance(value, torch.Tensor) for value in checkpoint.values()):
        raise ValueError("load_weights takes a path or a dict that holds only tensors, which may be the "
                         "'model' or 'state_dict' of a checkpoint")
    return checkpoint


def extend_plain(model, state):
    """-> a plain ViT's weights for a GAP model: missing PE norms at 0, no class token, no PE row for it."""
    if model.cls_token is not None or not model.add_input:
        raise ValueError("a plain ViT's weights fit models with pool='gap' and pos_0 at the input: gap, pvg, mpvg")
    has_pe_norms = any("pe_norm" in name for name in state)  # then a new norm would feed 0 to trained ones
    new = {name: torch.zeros_like(value) for name, value in model.state_dict().items()
           if name.startswith(("pe_norm", "last_shift")) or ("pe_norm" in name and not has_pe_norms)}
    state = new | state
    if state.pop("cls_token", None) is not None and "pos_embed" in state:
        state["pos_embed"] = state["pos_embed"][:, 1:]
    return state


def load_weights(model, source, *, new_head=False, old_grid=None, from_plain=False):
    """Loads a checkpoint, a path or a state dict (DeiT's, timm's and LaPE's fit), into the model and returns the model.

    A PE of another grid is resized; old_grid, its (h, w) in patches, is needed if not square (see resize_pos_embed).
    new_head: keep the model's head where the number of classes differs. from_plain: take weights of a plain ViT into
    gap, pvg or mpvg: their new PE norms start at weight = bias = 0, so that the model starts as `gap`; a class
    token and its PE row are dropped. Raises ValueError and loads nothing if names or shapes differ or no grid fits.
    """
    checkpoint = read_checkpoint(source) if isinstance(source, (str, os.PathLike)) else source
    state, own = dict(state_dict_of(checkpoint)), model.state_dict()
    if from_plain:
        state = extend_plain(model, state)
    if new_head and ("head.weight" not in state or len(state["head.weight"]) != len(own["head.weight"])):
        state |= {name: own[name] for name in ("head.weight", "head.bias")}
    misfits = [f"missing {name}" for name in own if name not in state]
    misfits += [f"unexpected {name}" for name in state if name not in own]
    if not misfits:
        for name in ("pos_embed", "last_pos_embed"):
            if name in own and state[name].ndim == 3:
                state[name] = resize_pos_embed(state[name], old_grid, model.grid, int(model.cls_token is not None))
        misfits = [f"{name} is {tuple(state[name].shape)}, the model's {tuple(value.shape)}"
                   for name, value in own.items() if state[name].shape != value.shape]
    if misfits:
        raise ValueError("these weights do not fit (another model or method, folded, or names with a prefix? "
                         f"see load_weights' new_head and from_plain): {'; '.join(misfits)}")
    model.load_state_dict(state)
    return model


def main():
    options = ("pe", "pool", "last_pe", "layer0", "hierarchical", "add_input")
    print("method       " + "".join(f"{name:<13}" for name in options))
    for method, row in METHODS.items():
        print(f"{method:<13}" + "".join(f"{str(row.get(name, '-')):<13}" for name in options))
    methods = ("default", "gap", "lape", "pvg", "mpvg")
    print("\nparameters    " + "".join(f"{method:<13}" for method in methods))
    for model in MODELS:
        with torch.device("meta"):  # shapes without memory
            counts = [sum(p.numel() for p in create(model, method).parameters()) for method in methods]
        print(f"{model:<14}" + "".join(f"{count:<13,}" for count in counts))


if __name__ == "__main__":
    main()
