"""A recursive core: a fast module L and a slow module H update their states at all positions again and again.

B batch, S positions, C width, D head dim, T queries, z_L and z_H states of the modules (B, S, C), x their input.
Hierarchical Reasoning Model (arXiv 2506.21734). The Tiny Recursive Model (2510.04871) adds one module for both roles,
gradients through the whole last cycle, and a mixer without attention.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from models.transformer import SwiGLU

EPS = 1e-5  # added to the mean square
MATMUL_KEYS = 200  # up to this many keys a CPU is faster without the fused attention, whose bf16 backward is slow
RELATION_SCALE = 5.0  # the relation bias is this times its parameter, so it learns this many times as fast
RELATION_START = 2.0  # initial logit for cells of the same row, column or box: 7 times the attention of other cells
# Initial logit for one neighbour: nine tenths of a head's attention among a hundred cells. Chosen on mazes:
# with this and loss softmax some are solved after 400 steps.
NEIGHBOUR_START = 7.0
# Scale of the initial weights of the MLP mixer. At full scale the recursion starts chaotically: on `sudoku9` the first
# gradient in bf16 has nothing in common with that in fp32.
ACROSS_START = 0.25


def rms(h):
    """Divide h by its root mean square, without a gain (Zhang and Sennrich, eq. 4): (..., C) -> (..., C)."""
    return F.rms_norm(h, h.shape[-1:], eps=EPS)


def attend(q, k, v, bias):
    """Return softmax(q k / sqrt(D) + bias) v: q (B, heads, T, D), k and v (B, heads, S, D) -> (B, T, heads D).

    bias: broadcasts to (B, heads, T, S), or None.
    """
    bias = None if bias is None else bias.to(q.dtype)
    if q.is_cuda or k.shape[2] > MATMUL_KEYS:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    else:
        logits = q * q.shape[-1] ** -0.5 @ k.mT
        y = (logits if bias is None else logits + bias).softmax(-1) @ v
    return y.transpose(1, 2).flatten(2)


def inner_width(width):
    """Return the inner width at which a SwiGLU has about as many parameters as an MLP of four times the width."""
    return -(-8 * width // 3 // 256) * 256


def grid(cells):
    """Return row, column and box of each cell of a square grid: (3, cells).

    Boxes are 2 x 2, 2 x 3, 3 x 3 for sides 4, 6, 9. Raises ValueError if `cells` is not a square.
    """
    side = math.isqrt(cells)
    if side**2 != cells:
        raise ValueError(f"{cells} cells are not a square grid")
    height = max(n for n in range(1, math.isqrt(side) + 1) if side % n == 0)
    row, column = torch.arange(cells) // side, torch.arange(cells) % side
    return torch.stack([row, column, row // height * height + column // (side // height)])


def boxes(cells, n_heads):
    """Classify pairs of cells of a square grid by whether they share a row, a column and a box.

    -> class of each pair (cells, cells), initial logits per head and class (n_heads, 8). Each of the first three heads
    starts with one of row, column and box.
    """
    place = grid(cells)
    same = (place[:, :, None] == place[:, None]).long()  # (3, cells, cells)
    start = torch.zeros(n_heads, 8)
    for head in range(min(3, n_heads)):
        start[head] = RELATION_START * (torch.arange(8) >> head & 1)
    return same[0] + 2 * same[1] + 4 * same[2], start


def offsets(rows, columns, n_heads):
    """Classify pairs of cells of a page by their offset, rows down and columns to the right.

    -> class of each pair (cells, cells), initial logits per head and class (n_heads, classes). Each of the first four
    heads starts with one of the four neighbours.
    """
    width = 2 * columns - 1  # number of offsets to the right
    row, column = torch.arange(rows * columns) // columns, torch.arange(rows * columns) % columns
    down, right = (place[None] - place[:, None] for place in (row, column))
    start = torch.zeros(n_heads, (2 * rows - 1) * width)
    zero = (rows - 1) * width + columns - 1  # class of offset (0, 0)
    for head, step in enumerate((1, -1, width, -width)[:n_heads]):
        start[head, zero + step] = NEIGHBOUR_START
    return (down + rows - 1) * width + right + columns - 1, start


class SelfAttention(nn.Module):
    """Attention in both directions over rotated queries and keys: (B, S, C) -> (B, S, C). bias as in `attend`."""

    def __init__(self, *, d_model, n_heads):
        super().__init__()
        self.n_heads = n_heads
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)

    def forward(self, h, rotary, bias):
        B, S, _ = h.shape
        qk, v = self.qkv(h).view(B, S, 3 * self.n_heads, -1).split([2 * self.n_heads, self.n_heads], 2)
        q, k = rotary(qk).transpose(1, 2).chunk(2, 1)  # (B, heads, S, D) each
        return self.out(attend(q, k, v.transpose(1, 2), bias))


class Across(nn.Module):
    """A SwiGLU over the positions, shared by all channels: (B, S, C) -> (B, S, C). S is fixed to `length`."""

    def __init__(self, *, length):
        super().__init__()
        self.mlp = SwiGLU(d_model=length, inner=inner_width(length))

    def forward(self, h, rotary, bias):
        return self.mlp(h.mT).mT


class CoreBlock(nn.Module):
    """Mixer over positions, then SwiGLU: (B, S, C) -> (B, S, C). mixer, norm as in Core."""

    def __init__(self, *, d_model, n_heads, ffn_dim, mixer, norm, length):
        super().__init__()
        self.pre = norm == "pre"
        attention = mixer == "attention"
        self.mixer = SelfAttention(d_model=d_model, n_heads=n_heads) if attention else Across(length=length)
        self.ffn = SwiGLU(d_model=d_model, inner=ffn_dim)
        for weight in self.parameters():  # outputs have the variance of inputs; nothing else scales the residuals
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
        if not attention:
            down = self.mixer.mlp.down
            nn.init.normal_(down.weight, std=ACROSS_START * down.in_features**-0.5)

    def forward(self, h, rotary, bias):
        if self.pre:
            h = h + self.mixer(rms(h), rotary, bias)
            return h + self.ffn(rms(h))
        h = rms(h + self.mixer(h, rotary, bias))
        return rms(h + self.ffn(h))


class Stack(nn.ModuleList):
    """A sequence of blocks: (B, S, C) -> (B, S, C) of root mean square 1."""

    def forward(self, h, rotary, biases):
        for block, bias in zip(self, biases, strict=True):
            h = block(h, rotary, bias)
        return rms(h) if block.pre else h


class Core(nn.Module):
    """Compute z_H and z_L after one segment of reasoning about x.

    core: `recursive` repeats h_cycles times: l_steps times z_L = f_L(z_L + z_H + x), then z_H = f_H(z_H + z_L). Each f
    is a stack of core_layers blocks; with `share` f_L is f_H. `plain` runs the same blocks once, z_H = f(x).
    `none` returns z_H = x.
    grad: `bptt` goes through all calls of a segment, `last_cycle` through the last of the h_cycles, `one_step` through
    the last call of L and of H.
    relation: result of `boxes` or `offsets`, a learned attention bias for each class of pairs, or None.
    mixer: `attention`, or `mlp_t`, an MLP over `length` positions (attention takes any number: length None).
    norm: `pre` normalizes the input of each sub-layer and a state at its end, `post` (as published) the sum after each.
    recompute: recompute activations in the backward pass instead of storing them.
    """

    def __init__(self, *, d_model, n_heads, core, core_layers, share, h_cycles, l_steps, grad, ffn_dim, relation,
                 mixer, norm, length, recompute):  # fmt: skip
        super().__init__()
        self.recursive = core == "recursive"
        self.calls = h_cycles * (l_steps + 1)
        self.l_steps = l_steps
        self.without_grad = self.calls - dict(bptt=self.calls, last_cycle=l_steps + 1, one_step=2)[grad]
        self.recompute = recompute
        sizes = dict(d_model=d_model, n_heads=n_heads, ffn_dim=ffn_dim, mixer=mixer, norm=norm, length=length)
        count = 0 if core == "none" else 1 if share else 2  # the first stack is f_L, the last f_H
        self.stacks = nn.ModuleList(Stack(CoreBlock(**sizes) for _ in range(core_layers)) for _ in range(count))
        if self.recursive:
            self.register_buffer("start_L", torch.randn(d_model))
            self.register_buffer("start_H", torch.randn(d_model))
        self.related = relation is not None and count > 0
        if self.related:
            classes, start = relation
            self.register_buffer("relation_class", classes, persistent=False)  # (S, S)
            start = (start / RELATION_SCALE).expand(count, core_layers, *start.shape)
            self.relation = nn.Parameter(start.clone())  # (stacks, layers, heads, classes)

    def start(self, x):
        """Return the fixed states before the first segment, for x (B, S, C): z_H, z_L, each (B, S, C)."""
        return self.start_H.to(x.dtype).expand_as(x), self.start_L.to(x.dtype).expand_as(x)

    def biases(self, bias):
        """bias of the keys (B, 1, 1, S) or None -> attention bias of each stack and layer, with the relation bias."""
        if not self.related:
            return [[bias] * len(blocks) for blocks in self.stacks]
        # gather, not relation[..., classes]: on a CPU the backward of indexing adds in an order that depends on threads
        classes = self.relation_class.expand(*self.relation.shape[:-1], -1, -1)  # (stacks, layers, heads, S, S)
        relation = RELATION_SCALE * self.relation.gather(-1, classes.flatten(-2)).view_as(classes)
        return relation if bias is None else relation[:, :, None] + bias

    def forward(self, x, z_H, z_L, rotary, bias, first=0, last=None):
        """x, z_H, z_L: (B, S, C), bias of the keys (B, 1, 1, S) or None -> z_H, z_L after one segment, (B, S, C) each.

        first, last: run only the slice [first:last] of the h_cycles. Gradients flow in the last cycles of a segment.
        """
        biases = self.biases(bias)

        def f(i, h):
            if self.recompute and torch.is_grad_enabled():
                return checkpoint(self.stacks[i], h, rotary, biases[i], use_reentrant=False)
            return self.stacks[i](h, rotary, biases[i])

        if not self.recursive:
            for i in range(len(self.stacks)):
                x = f(i, x)
            return x, z_L
        calls_per_cycle = self.l_steps + 1
        for call in range(self.calls)[first * calls_per_cycle : last and last * calls_per_cycle]:
            with torch.set_grad_enabled(torch.is_grad_enabled() and call >= self.without_grad):
                if (call + 1) % calls_per_cycle:
                    z_L = f(0, z_L + z_H + x)
                else:
                    z_H = f(-1, z_H + z_L)
        return z_H, z_L
