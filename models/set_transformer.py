"""Encode a set of points as a few vectors that do not depend on the order, the padding or the scale of the points.

B sets, M points, N columns (D variables and y), S seeds or memory, T queries, H heads, C width, F features of a point.
Set Transformer (arXiv 1810.00825, eqs. 6 to 13) with pre-norm blocks; features of floats: NeSymReS (2106.06427).
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from models.transformer import EPS, RMSNorm

EXPONENT = 60  # columns whose largest magnitude lies within 2^-60 and 2^60 are not scaled
OCTAVES = 8  # frequencies of the sines and cosines, from pi / 4 on
BITS = 32  # features of a number, one per bit
NORMS = ("rms", "rms_set", "layer", "none")


def bring_into_range(data, mask):
    """Scale columns of points by powers of two where float32 would lose them -> (scaled, present, exponent).

    data: (B, M, N) of any float type, mask: (B, M) real points. scaled: (B, M, N) float32, 0 where not present.
    present: (B, M, N) bool, real and finite. exponent: (B, N) int32, scaled = data 2^exponent. A column whose largest
    magnitude lies outside [2^-60, 2^60] is scaled to a magnitude in [1, 2); all others have exponent 0.
    """
    present = data.isfinite() & mask[..., None]
    data = torch.where(present, data, 0)
    largest = data.abs().amax(1)  # (B, N)
    outside = (largest > 0) & ((largest < 2.0**-EXPONENT) | (largest > 2.0**EXPONENT))
    exponent = torch.where(outside, 1 - torch.frexp(largest).exponent, 0)
    half = exponent // 2  # in two steps, since 2^exponent can exceed the range of the type
    for part in (half, exponent - half):
        data = torch.ldexp(data, part[:, None])
    return data.float(), present, exponent


def ieee_bits(values):
    """Convert float32 values (...) to their IEEE-754 bits as -1 and 1, the sign first: (..., 32)."""
    places = torch.arange(BITS - 1, -1, -1, device=values.device, dtype=torch.int32)
    return (values.float().contiguous().view(torch.int32)[..., None] >> places & 1).float() * 2 - 1


def fourier(values):
    """Convert values (...) to features (..., 18): clipped value, logarithm, its sines and cosines at 8 octaves."""
    u = values.sign() * values.abs().log1p()
    angle = u[..., None] * (math.pi / 4 * 2.0 ** torch.arange(OCTAVES, device=values.device))
    return torch.cat([values.clamp(-4, 4)[..., None] / 2, u[..., None] / 2, angle.sin(), angle.cos()], -1)


def standardize(y, present):
    """Subtract the mean of each row of y (B, M) and divide by its standard deviation, over `present` values only.

    Other values become 0.
    """
    count = present.sum(1, keepdim=True).clamp_min(1)
    y = y / y.abs().amax(1, keepdim=True).clamp_min(torch.finfo(y.dtype).tiny)  # so that squares do not overflow
    y = (y - y.sum(1, keepdim=True) / count) * present
    return y / (y.square().sum(1, keepdim=True) / count).sqrt().clamp_min(1e-6)


class Norm(nn.Module):
    """Normalize x (B, S, C), 0 where padded -> (B, S, C), in float32.

    `rms` and `layer` normalize each vector, `rms_set` all valid elements of a set at once, `none` nothing. `rms_set`
    preserves how far apart the elements of a set lie, which `rms` and `layer` remove. count: number of valid elements
    (B, 1, 1), by default S.
    """

    def __init__(self, kind, dim):
        super().__init__()
        if kind not in NORMS:
            raise ValueError(f"norm {kind!r}: expected one of {', '.join(NORMS)}")
        self.kind = kind
        self.each = dict(rms=RMSNorm, rms_set=RMSNorm, layer=nn.LayerNorm, none=nn.Identity)[kind](dim)

    def forward(self, x, count=None):
        if self.kind != "rms_set":
            return self.each(x)
        x = x.float()
        square = x.square().sum((1, 2), keepdim=True) / (x.shape[2] * (x.shape[1] if count is None else count))
        return x * (square + EPS).rsqrt() * self.each.weight


class SetAttention(nn.Module):
    """Attention of queries x (B, T, C) to a set -> (B, T, C). Learned queries are not projected."""

    def __init__(self, *, dim, memory_dim, n_heads, learned_queries=False):
        super().__init__()
        self.n_heads = n_heads
        self.query = nn.Identity() if learned_queries else nn.Linear(dim, dim, bias=False)
        self.key_value = nn.Linear(memory_dim, 2 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def keys(self, memory, rotary=None):
        """Keys and values of a set (B, S, memory_dim): (B, H, S, D) each."""
        k, v = self.key_value(memory).unflatten(-1, (2 * self.n_heads, -1)).chunk(2, 2)
        return (k if rotary is None else rotary(k)).transpose(1, 2), v.transpose(1, 2)

    def forward(self, x, keys, mask=None, rotary=None, start=0):
        """x (B, T, C), keys of `keys` -> (B, T, C).

        mask: broadcasts to (B, H, T, S), False where a key is padding. rotary: rotates queries, at positions from
        `start` on. With the keys of a single set and T = 1, all B rows are queries to that set.
        """
        q = self.query(x).unflatten(-1, (self.n_heads, -1))  # (B, T, H, D)
        q = q if rotary is None else rotary(q, start)
        shared = len(keys[0]) < len(q)
        q = (q.transpose(0, 1) if shared else q).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, *keys, attn_mask=mask).transpose(1, 2)
        return self.out((y.transpose(0, 1) if shared else y).flatten(2))


class FFN(nn.Sequential):
    """Linear, exact GELU, Linear: (..., C) -> (..., C)."""

    def __init__(self, *, dim, hidden_dim):
        up, down = nn.Linear(dim, hidden_dim, bias=False), nn.Linear(hidden_dim, dim, bias=False)
        super().__init__(up, nn.GELU(), down)


class SetBlock(nn.Module):
    """Pre-norm attention and FFN, each added to x: x (B, T, C), memory (B, S, C) -> (B, T, C) (the paper's MAB).

    queries: `elements` of another set; `learned` queries, which are neither normalized nor projected; or `itself`,
    where x is also the memory (the paper's SAB).
    """

    def __init__(self, *, queries, dim, n_heads, ffn_hidden_dim, dropout, attn_norm, ffn_norm):
        super().__init__()
        learned = queries == "learned"
        self.norm = None if learned else Norm(attn_norm, dim)
        self.memory_norm = None if queries == "itself" else Norm(attn_norm, dim)
        self.attention = SetAttention(dim=dim, memory_dim=dim, n_heads=n_heads, learned_queries=learned)
        self.ffn_norm, self.ffn = Norm(ffn_norm, dim), FFN(dim=dim, hidden_dim=ffn_hidden_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, memory=None, real=None, memory_real=None):
        """real (B, T), memory_real (B, S): 1 for elements, 0 for padding; by default all 1. Padding stays 0."""
        count, memory_count = (None if r is None else r.sum(1).clamp_min(1)[:, None, None] for r in (real, memory_real))
        normed = x if self.norm is None else self.norm(x, count)
        keys = self.attention.keys(normed if memory is None else self.memory_norm(memory, memory_count))
        mask = None if memory_real is None else memory_real[:, None, None] > 0
        x = x + self._padded(self.dropout(self.attention(normed, keys, mask)), real)
        return x + self._padded(self.dropout(self.ffn(self.ffn_norm(x, count))), real)

    @staticmethod
    def _padded(x, real):
        return x if real is None else x * real[..., None]


class SetTransformer(nn.Module):
    """Encode points (B, M, N), y in the last column, as S vectors per set: (B, S, output_dim).

    Features -> MLP of each point -> ISABs (inducing points attend to the points, then the points to them) -> learned
    seeds attend to the points -> SABs -> norm -> Linear.
    """

    def __init__(self, *, n_columns, float_features, noise_scale, dim, n_heads, n_isab, n_sab, n_inducing_points,
                 n_seeds, ffn_hidden_dim, dropout, attn_norm, ffn_norm, output_norm, output_dim,
                 use_checkpointing):  # fmt: skip
        """n_columns: N. float_features: fourier or ieee. noise_scale: noise on ieee features in training.

        n_isab, n_sab: blocks of each kind. n_seeds: S. attn_norm, ffn_norm, output_norm: see Norm. use_checkpointing:
        recompute blocks in the backward pass.
        """
        super().__init__()
        self.n_columns = n_columns
        self.ieee = float_features == "ieee"
        self.noise_scale, self.use_checkpointing = noise_scale, use_checkpointing
        sizes = dict(dim=dim, n_heads=n_heads, ffn_hidden_dim=ffn_hidden_dim, dropout=dropout, attn_norm=attn_norm,
                     ffn_norm=ffn_norm)  # fmt: skip
        features = BITS * n_columns if self.ieee else (2 + 2 * OCTAVES) * (n_columns + 1)
        self.embedding = nn.Sequential(
            nn.Linear(features, dim), nn.GELU(), nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim)
        )
        self.inducing = nn.ParameterList(nn.Parameter(0.5 * torch.randn(n_inducing_points, dim)) for _ in range(n_isab))
        self.gather = nn.ModuleList(SetBlock(queries="learned", **sizes) for _ in range(n_isab))
        self.spread = nn.ModuleList(SetBlock(queries="elements", **sizes) for _ in range(n_isab))
        self.seeds = nn.Parameter(0.5 * torch.randn(n_seeds, dim))
        self.pool = SetBlock(queries="learned", **sizes)
        self.blocks = nn.ModuleList(SetBlock(queries="itself", **sizes) for _ in range(n_sab))
        self.norm = Norm(output_norm, dim)
        self.out = nn.Linear(dim, output_dim, bias=False)

    def features(self, data, mask):
        """data (B, M, N), mask (B, M) -> features (B, M, F), 0 for padded and non-finite entries.

        The points are scaled on their own device: they may be float64 on the CPU, which not every device supports.
        """
        values, present, _ = bring_into_range(data, mask)
        values, present = values.to(self.seeds.device), present.to(self.seeds.device)
        if self.ieee:
            features = ieee_bits(values)  # (B, M, N, 32)
            if self.training and self.noise_scale:
                features = features + self.noise_scale * torch.randn_like(features)
        else:
            y = standardize(values[..., -1], present[..., -1])
            values = torch.cat([values, y[..., None]], -1)
            present = torch.cat([present, present[..., -1:]], -1)
            features = fourier(values)  # (B, M, N + 1, 18)
        return (features * present[..., None]).flatten(2)

    def forward(self, data, mask):
        """data (B, M, N), mask (B, M) of real points -> (B, S, output_dim)."""
        x = self.embedding(self.features(data, mask))
        real = mask.to(x.device).float()
        x = x * real[..., None]
        for inducing, gather, spread in zip(self.inducing, self.gather, self.spread, strict=True):
            summary = self._run(gather, inducing.expand(len(x), -1, -1), x, None, real)
            x = self._run(spread, x, summary, real, None)
        x = self._run(self.pool, self.seeds.expand(len(x), -1, -1), x, None, real)
        for block in self.blocks:
            x = self._run(block, x)
        return self.out(self.norm(x))

    def _run(self, block, *inputs):
        if self.use_checkpointing and self.training:
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)
