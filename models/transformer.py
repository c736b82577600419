"""A causal transformer language model: RMSNorm, rotary attention, SwiGLU, tied head.

B batch, T time, C width, H heads, D head dim, V vocabulary.
Attention Is All You Need (arXiv 1706.03762), RoPE (2104.09864), SwiGLU (2002.05202), RMSNorm (1910.07467).
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from models.cross_entropy import linear_cross_entropy

EPS = 1e-6  # added to the mean square


def normalize(x):
    """Divide x (..., C) by its root mean square -> (normalized x, the scale it was multiplied by (..., 1))."""
    square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square()  # squared length
    scale = square.div_(x.shape[-1]).add_(EPS).rsqrt_()
    return x * scale, scale


class _RMSNorm(torch.autograd.Function):
    """F.rms_norm with one backward. On a CPU torch's own is a chain of operations, each with its own backward."""

    @staticmethod
    def forward(ctx, x, weight):
        normed, scale = normalize(x)
        ctx.save_for_backward(normed, scale, weight)
        return normed * weight

    @staticmethod
    def backward(ctx, grad):
        normed, scale, weight = ctx.saved_tensors
        product = grad * normed
        along = (product @ weight).div_(-len(weight))[..., None]  # minus the mean of d_normed * normed
        return torch.addcmul(grad * weight, normed, along).mul_(scale), product.flatten(0, -2).sum(0)


class RMSNorm(nn.Module):
    """x / rms(x) * weight in fp32 (Zhang and Sennrich, eq. 4): (..., C) -> (..., C)."""

    def __init__(self, dim, gain=1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.full((dim,), gain))

    def forward(self, x):
        if x.is_cuda:
            return F.rms_norm(x.float(), self.weight.shape, self.weight, EPS)
        if not torch.is_grad_enabled():  # same numbers, and half the time for a single token
            return normalize(x.float())[0] * self.weight
        with torch.autocast(x.device.type, enabled=False):
            return _RMSNorm.apply(x.float(), self.weight)


def rotate(x, cos, sin):
    """Return x cos + (x with its halves exchanged) sin."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class _Rotate(torch.autograd.Function):
    """`rotate` with its own backward: the gradient of a rotation is the inverse rotation."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return rotate(x, cos, sin)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return rotate(grad, cos, -sin), None, None


class Rotary(nn.Module):
    """Rotate pairs of coordinates by an angle that grows with the position (RoPE, eq. 34)."""

    def __init__(self, dim, length, base):
        """dim: head dim D, even. length: number of positions. base: angle of pair i at position t is t base^(-2i/D)."""
        super().__init__()
        angle = torch.arange(length)[:, None] * base ** (-torch.arange(0, dim, 2) / dim)  # (T, D / 2)
        self.register_buffer("cos", torch.cat([angle.cos()] * 2, -1), persistent=False)  # (T, D)
        self.register_buffer("sin", torch.cat([-angle.sin(), angle.sin()], -1), persistent=False)

    def forward(self, x, start=0):
        """x: (B, T, H, D) at positions start, start + 1, ... -> the same, rotated."""
        cos, sin = (t[start : start + x.shape[1], None].to(x.dtype) for t in (self.cos, self.sin))
        return (_Rotate.apply if torch.is_grad_enabled() else rotate)(x, cos, sin)


class Attention(nn.Module):
    """Multi-head self-attention over rotated queries and keys: x (B, T, C) -> (B, T, C)."""

    def __init__(self, *, d_model, n_heads):
        super().__init__()
        self.n_heads = n_heads
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x, rotary, causal=True, cache=None, start=0):
        """`cache`: keys and values (2, B, H, max T, D) of the positions before `start`, extended in place."""
        B, T, C = x.shape
        qk, v = self.qkv(x).view(B, T, 3 * self.n_heads, -1).split([2 * self.n_heads, self.n_heads], 2)
        q, k, v = *rotary(qk, start).transpose(1, 2).chunk(2, 1), v.transpose(1, 2)  # (B, H, T, D) each
        if cache is not None:
            cache[0][:, :, start : start + T], cache[1][:, :, start : start + T] = k, v
            k, v = cache[0][:, :, : start + T], cache[1][:, :, : start + T]
            causal = T > 1  # a single new token attends to the whole cache
        y = F.scaled_dot_product_attention(q, k.to(q.dtype), v.to(q.dtype), is_causal=causal)
        return self.out(y.transpose(1, 2).reshape(B, T, C))


class SwiGLU(nn.Module):
    """W_down(silu(W_gate x) * W_up x) (Shazeer, eq. 6): (..., C) -> (..., C)."""

    def __init__(self, *, d_model, inner):
        super().__init__()
        self.gate_up = nn.Linear(d_model, 2 * inner, bias=False)
        self.down = nn.Linear(inner, d_model, bias=False)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


class TransformerBlock(nn.Module):
    """Pre-norm attention and SwiGLU, each added to the residual stream: (B, T, C) -> (B, T, C)."""

    def __init__(self, *, d_model, n_heads, ffn_mult, dropout):
        super().__init__()
        self.attention_norm, self.ffn_norm = RMSNorm(d_model), RMSNorm(d_model)
        self.attention = Attention(d_model=d_model, n_heads=n_heads)
        self.ffn = SwiGLU(d_model=d_model, inner=ffn_mult * d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, rotary, causal=True, cache=None, start=0):
        x = x + self.dropout(self.attention(self.attention_norm(x), rotary, causal, cache, start))
        return x + self.dropout(self.ffn(self.ffn_norm(x)))


def initialize(module, writers, n_layers):
    """Draw every matrix and embedding from N(0, 0.02), and `writers` from N(0, 0.02 / sqrt(2 n_layers)).

    writers: names of the Linears whose output is added to the residual stream.
    """
    for name, parameter in module.named_parameters():
        if parameter.ndim == 2:
            writes = name.endswith(tuple(f"{w}.weight" for w in writers))
            nn.init.normal_(parameter, std=0.02 / (2 * n_layers) ** 0.5 if writes else 0.02)


def head_gain(vocab_size, d_model):
    """Return the initial gain of the norm before a tied head.

    At the start the logit of the input token itself is 0.02 * d_model * gain, and the other logits are near 0. This is
    the largest gain up to 1 that costs at most 0.08 nat. A smaller gain learns more slowly: with 0.25 the loss was
    0.4 nat higher after 0.15 M tokens.
    """
    return min(1.0, max(0.1, math.log(0.08 * vocab_size) / (0.02 * d_model)))


class Transformer(nn.Module):
    """Decoder-only transformer whose head is its embedding."""

    def __init__(self, *, vocab_size, d_model, max_seq_len, n_heads, dropout, rope_base, n_layers, ffn_mult):
        """Arguments as in train_expert.TransformerConfig; vocab_size V is the tokenizer's.

        forward: ids (B, T) -> logits (B, T, V), with T <= max_seq_len.
        """
        super().__init__()
        self.max_seq_len = max_seq_len
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.dropout = nn.Dropout(dropout)
        self.rotary = Rotary(d_model // n_heads, max_seq_len, rope_base)
        self.blocks = nn.ModuleList(
            TransformerBlock(d_model=d_model, n_heads=n_heads, ffn_mult=ffn_mult, dropout=dropout)
            for _ in range(n_layers)
        )
        self.norm = RMSNorm(d_model, gain=head_gain(vocab_size, d_model))
        initialize(self, ("out", "down"), n_layers)

    def hidden(self, x, layer):
        """x: (B, T) ids -> residual stream after `layer` blocks (0 = the embedding), not normalized: (B, T, C)."""
        if x.shape[1] > self.max_seq_len:
            raise ValueError(f"sequence of {x.shape[1]} tokens, the model was built for max_seq_len {self.max_seq_len}")
        h = self.dropout(self.embedding(x))
        for block in self.blocks[:layer]:
            h = block(h, self.rotary)
        return h

    @property
    def output(self):
        """Weight of the head: (V, C)."""
        return self.embedding.weight

    def final(self, x):
        """x: (B, T) ids -> hidden states that the head reads: (B, T, C)."""
        return self.norm(self.hidden(x, len(self.blocks)))

    def forward(self, x, y=None, index=None):
        """x: (B, T) ids -> logits (B, T, V). With targets y (B, T), -100 = not counted: (sum of nats, report).

        The report holds detached (B, T) values per token: `loss`, which selects the best checkpoint, and `nll`.
        `index` is unused here; models whose evaluation draws noise need it. Raises ValueError beyond max_seq_len.
        """
        h = self.final(x)
        if y is None:
            return F.linear(h, self.output)
        loss, nats = linear_cross_entropy(h, self.output, y)
        return loss, dict(loss=nats, nll=nats)

    def init_state(self, batch):
        """Return an empty cache for `step`: position, and keys and values (layers, 2, B, H, max_seq_len, D)."""
        D, H = self.rotary.cos.shape[1], self.blocks[0].attention.n_heads
        shape = (len(self.blocks), 2, batch, H, self.max_seq_len, D)
        return 0, torch.zeros(shape, device=self.embedding.weight.device)

    def step(self, x, state):
        """x: (B, T) ids that follow `state` -> (logits after the last id (B, V), new state). See `advance`."""
        h, state = self.advance(x, state)
        return F.linear(h, self.output), state

    @torch.no_grad()
    def advance(self, x, state):
        """x: (B, T) ids that follow `state` -> (hidden state of the last id (B, C), new state).

        T > 1 only from an empty state. Raises ValueError when the window is full: start again from the end of the text.
        """
        start, cache = state
        if start + x.shape[1] > self.max_seq_len:
            raise ValueError(f"{start} + {x.shape[1]} tokens do not fit max_seq_len {self.max_seq_len}")
        h = self.embedding(x)
        for block, part in zip(self.blocks, cache, strict=True):
            h = block(h, self.rotary, cache=part, start=start)
        return self.norm(h[:, -1]), (start + x.shape[1], cache)
