"""The published HRM and TRM: a token of each cell in, a token of each cell out, with the numbers of the official code.

B batch, N cells, P places of the puzzle's vector, S = P + N positions, C width, V tokens. Hierarchical Reasoning Model
(arXiv 2506.21734, section 2) and Tiny Recursive Model (2510.04871, pseudocode of figure 3). models/trm.py is the same
recursion for training here. It differs in its positions, in its relation bias and in the norm of mlp_t.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from models.transformer import SwiGLU


def scaled(h, eps):
    """Divide h by its root mean square over the last dimension: (..., C) -> (..., C)."""
    return h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)


class Rotary(nn.Module):
    """Rotate pairs of coordinates by an angle that grows with the position: (B, S, heads, D) -> the same.

    transformer.Rotary is faster. This one rounds as the official code does: the recursion amplifies a last bit up to
    a thousand times.
    """

    def __init__(self, dim, length, base):
        super().__init__()
        angle = torch.outer(torch.arange(length).float(), 1.0 / base ** (torch.arange(0, dim, 2) / dim))  # (S, D / 2)
        self.register_buffer("cos", torch.cat([angle.cos()] * 2, -1)[:, None], persistent=False)
        self.register_buffer("sin", torch.cat([-angle.sin(), angle.sin()], -1)[:, None], persistent=False)

    def forward(self, x):
        return x * self.cos + x.roll(x.shape[-1] // 2, -1) * self.sin


class SelfAttention(nn.Module):
    """Attention in both directions over rotated queries and keys: (B, S, C) -> (B, S, C)."""

    def __init__(self, *, d_model, n_heads):
        super().__init__()
        self.n_heads = n_heads
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)

    def forward(self, h, rotary):
        B, S, C = h.shape
        qk, v = self.qkv(h).view(B, S, 3 * self.n_heads, -1).split([2 * self.n_heads, self.n_heads], 2)
        q, k = rotary(qk).transpose(1, 2).chunk(2, 1)  # (B, heads, S, D) each
        return self.out(F.scaled_dot_product_attention(q, k, v.transpose(1, 2)).transpose(1, 2).reshape(B, S, C))


class Block(nn.Module):
    """Mixer over positions, then SwiGLU; each sum is scaled to a mean square of 1: (B, S, C) -> (B, S, C).

    across: inner width of an MLP over the positions in place of attention, 0 = attention. The official code scales the
    sum after that MLP over the positions, one channel at a time; all other sums are scaled over the channels.
    """

    def __init__(self, *, d_model, n_heads, inner, across, length, eps):
        super().__init__()
        self.across, self.eps = across > 0, eps
        self.mixer = SwiGLU(d_model=length, inner=across) if across else SelfAttention(d_model=d_model, n_heads=n_heads)
        self.ffn = SwiGLU(d_model=d_model, inner=inner)

    def forward(self, h, rotary):
        if self.across:
            h = scaled(h.mT + self.mixer(h.mT), self.eps).mT
        else:
            h = scaled(h + self.mixer(h, rotary), self.eps)
        return scaled(h + self.ffn(h), self.eps)


class TokenGrid(nn.Module):
    """Fills in all cells of a puzzle, segment by segment; weights come from a published checkpoint."""

    cells = True  # as in hrm.HRM: one answer per cell

    def __init__(self, *, vocab_size, cells, puzzles, puzzle_dim, puzzle_places, d_model, n_heads, slow_layers,
                 fast_layers, h_cycles, l_steps, inner, across, positions, rope_base, eps, halting):  # fmt: skip
        """vocab_size: V. cells: N. puzzles, puzzle_dim: rows and width of the table of puzzles; width 0 = no table.

        puzzle_places: P. slow_layers: blocks of f_H, 0 = f_H is f_L (TRM). inner: inner width of SwiGLU, across: as in
        Block. positions: `rope`, `learned` or `none`. halting: `stop` reads the logit of stopping, `compare` its
        difference from the logit of going on.
        Raises ValueError for sizes that do not go together.
        """
        super().__init__()
        if d_model % (2 * n_heads):
            raise ValueError(f"d_model {d_model} over n_heads {n_heads}: the head dim must be whole and even")
        if puzzle_dim > puzzle_places * d_model or bool(puzzle_dim) != bool(puzzle_places):
            raise ValueError(f"puzzle_dim {puzzle_dim} in puzzle_places {puzzle_places} of d_model {d_model}")
        length = puzzle_places + cells
        self.max_seq_len, self.puzzle_places = cells, puzzle_places
        self.h_cycles, self.l_steps, self.halting = h_cycles, l_steps, halting
        self.embedding = nn.Embedding(vocab_size, d_model)
        if puzzle_dim:
            self.puzzles = nn.Embedding(puzzles, puzzle_dim)
        if positions == "learned":
            self.places = nn.Embedding(length, d_model)
        self.rotary = Rotary(d_model // n_heads, length, rope_base) if positions == "rope" else nn.Identity()
        sizes = dict(d_model=d_model, n_heads=n_heads, inner=inner, across=across, length=length, eps=eps)
        self.fast = nn.ModuleList(Block(**sizes) for _ in range(fast_layers))
        self.slow = nn.ModuleList(Block(**sizes) for _ in range(slow_layers))
        self.register_buffer("start_H", torch.zeros(d_model))
        self.register_buffer("start_L", torch.zeros(d_model))
        self.head = nn.Linear(d_model, vocab_size, bias=False)
        self.halt = nn.Linear(d_model, 2)

    def encode(self, ids, puzzle=None):
        """Embed puzzles: ids (B, N), numbers of the puzzles (B) in the table or None for number 0 -> x (B, S, C).

        Raises ValueError for another number of cells.
        """
        B, N = ids.shape
        if N != self.max_seq_len:
            raise ValueError(f"a grid of {N} cells, the model was built for {self.max_seq_len}")
        x = self.embedding(ids)
        C = x.shape[-1]
        if self.puzzle_places:
            vector = self.puzzles(ids.new_zeros(B) if puzzle is None else puzzle)
            vector = F.pad(vector, (0, self.puzzle_places * C - vector.shape[-1]))
            x = torch.cat([vector.view(B, self.puzzle_places, C), x], 1)
        if hasattr(self, "places"):
            x = 0.707106781 * (x + self.places.weight)
        return math.sqrt(C) * x

    def start(self, x):
        """Return the states before the first segment: z_H, z_L, each (B, S, C)."""
        return self.start_H.expand_as(x), self.start_L.expand_as(x)

    def segment(self, x, z_H, z_L):
        """Run one segment of reasoning about x -> z_H, z_L, all (B, S, C).

        h_cycles times: l_steps times z_L = f_L(z_L + z_H + x), then z_H = f_H(z_H + z_L).
        """

        def f(blocks, h):
            for block in blocks:
                h = block(h, self.rotary)
            return h

        for _ in range(self.h_cycles):
            for _ in range(self.l_steps):
                z_L = f(self.fast, z_L + (z_H + x))  # in the order of the official code, hence with its rounding
            z_H = f(self.slow or self.fast, z_H + z_L)
        return z_H, z_L

    def confidence(self, z_H):
        """Return the logit that the answer is right, from the first position: z_H (B, S, C) -> (B)."""
        stop, go_on = self.halt(z_H[:, 0]).float().unbind(-1)
        return stop - go_on if self.halting == "compare" else stop

    def answer(self, x, z_H, bias=None, decoder_input_ids=None):
        """Return what the head reads, the cells of z_H: (B, S, C) -> (B, N, C)."""
        return z_H[:, self.puzzle_places :]

    def guess(self, h):
        """Return the most likely token of each cell: (B, N, C) -> (B, N)."""
        return self.head(h).argmax(-1)

    def forward(self, ids, puzzle=None, segments=1):
        """Return logits of the cells (B, N, V) and of halting (B) after so many segments, as `encode` reads puzzles."""
        x = self.encode(ids, puzzle)
        z_H, z_L = self.start(x)
        for _ in range(segments):
            z_H, z_L = self.segment(x, z_H, z_L)
        return self.head(self.answer(x, z_H)), self.confidence(z_H)

    @torch.no_grad()
    def think(self, ids, mask, segments, threshold, puzzle=None):
        """Reason for up to `segments` segments; a puzzle whose halting logit is above `threshold` leaves the batch.

        ids (B, N); mask is unused -> x (B, S, C), None, z_H (B, S, C), number of segments of each puzzle (B).
        """
        x = self.encode(ids, puzzle)
        z_H, z_L = self.start(x)
        last = torch.empty_like(x)
        used = torch.zeros(len(x), dtype=torch.long, device=x.device)
        going = torch.arange(len(x), device=x.device)
        for _ in range(segments):
            z_H, z_L = self.segment(x[going], z_H, z_L)
            last[going], used[going] = z_H, used[going] + 1
            if threshold < math.inf:
                stay = self.confidence(z_H) <= threshold
                going, z_H, z_L = going[stay], z_H[stay], z_L[stay]
                if not len(going):
                    break
        return x, None, last, used

    @torch.no_grad()
    def trace(self, ids, segments, puzzle=None):
        """Answer after each of T segments: ids (B, N) -> tokens (B, T, N), halting logits (B, T)."""
        x = self.encode(ids, puzzle)
        z_H, z_L = self.start(x)
        answers, halt = [], []
        for _ in range(segments):
            z_H, z_L = self.segment(x, z_H, z_L)
            answers.append(self.guess(self.answer(x, z_H)))
            halt.append(self.confidence(z_H))
        return torch.stack(answers, 1), torch.stack(halt, 1)

    def solve(self, ids, segments, threshold=math.inf, puzzle=None):
        """Fill in puzzles: ids (B, N) -> (token of each cell (B, N), segments used (B))."""
        x, _, z_H, used = self.think(ids, None, segments, threshold, puzzle)
        return self.guess(self.answer(x, z_H)), used

    def frozen(self):
        """Prepare the model for answering -> self."""
        return self.requires_grad_(False).eval()
