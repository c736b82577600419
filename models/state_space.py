"""A selective state-space language model: RMSNorm, Mamba block, tied head; a state of fixed size instead of a cache.

B batch, T time, C width, E inner width, N state size, V vocabulary. In the recurrence A, B, C, D are its parameters.
Mamba (arXiv 2312.00752). Internally all tensors are time-major (T, B, ...), so that steps and shifts are contiguous.
On CUDA the optional package mamba_ssm does the scan where it is installed (pip install mamba-ssm).
"""

import functools
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from models.cross_entropy import linear_cross_entropy
from models.transformer import RMSNorm, head_gain, initialize

CHUNK = 32  # steps whose states exist at a time: few enough to stay in the processor's cache
PARALLEL = 2**22  # elements of all states at a time on a GPU: far more work than one kernel launch costs
FEWEST = 16  # steps at a time on a GPU, even if their states are larger than that
FUSED_STATES = 256  # largest N that mamba_ssm supports


def _replay(u, dt, rate, B, h, decay, states):
    """Fill decay_t = 2^(dt_t rate) and states_t = decay_t states_{t-1} + dt_t u_t B_t, and return the last state.

    h: the state before the first step. The base is 2 because torch's vectorized exp2 takes a third of the time of exp,
    and far less where exp underflows.
    """
    torch.mul(dt[:, :, None], rate, out=decay).exp2_()
    torch.mul((dt * u)[:, :, None], B[..., None], out=states)
    for decay_t, state in zip(decay, states, strict=True):
        h = state.addcmul_(decay_t, h)
    return h


def _dot(rows, matrices):
    """Multiply one row by one matrix per step and sequence: (T, B, I), (T, B, I, J) -> (T, B, J)."""
    return torch.bmm(rows.flatten(0, 1)[:, None], matrices.flatten(0, 1)).view(*rows.shape[:2], -1)


class _SelectiveScan(torch.autograd.Function):
    """The scan as a loop over steps. The forward saves the state before each chunk, the backward replays the chunk.

    States are (B, N, E), so that operations vectorize over E.
    """

    @staticmethod
    def forward(ctx, u, dt, A, B, C, h0, chunk):
        T, (batch, N, E) = len(u), h0.shape
        rate = A / math.log(2)
        y = torch.empty_like(u)
        h = h0
        entering = h0.new_empty(-(-T // chunk), batch, N, E)
        decay, states = (h0.new_empty(min(chunk, T), batch, N, E) for _ in range(2))
        for i, start in enumerate(range(0, T, chunk)):
            part, k = slice(start, start + chunk), min(chunk, T - start)
            entering[i] = h
            h = _replay(u[part], dt[part], rate, B[part], entering[i], decay[:k], states[:k])
            y[part] = _dot(C[part], states[:k])
        ctx.save_for_backward(u, dt, A, B, C, entering)
        ctx.chunk = chunk
        return y, h.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_y, carry):
        u, dt, A, B, C, entering = ctx.saved_tensors
        T = len(u)
        rate = A / math.log(2)
        d_y = d_y.contiguous()
        d_u, d_dt, d_A, d_B, d_C = (torch.empty_like(t) for t in (u, dt, A, B, C))  # gradients of the inputs
        d_A.zero_()
        size = min(ctx.chunk, T)
        decay, grads = (A.new_empty(size, *entering.shape[1:]) for _ in range(2))
        states = A.new_empty(size + 1, *entering.shape[1:])
        for i, start in reversed(list(enumerate(range(0, T, ctx.chunk)))):
            part, k = slice(start, start + ctx.chunk), min(ctx.chunk, T - start)
            u_, dt_, B_, d_y_, a, g, before = u[part], dt[part], B[part], d_y[part], decay[:k], grads[:k], states[:k]
            states[0] = entering[i]
            _replay(u_, dt_, rate, B_, states[0], a, states[1 : k + 1])
            torch.mul(d_y_[:, :, None], C[part][..., None], out=g)
            for decay_t, grad in zip(reversed(a.unbind()), reversed(g.unbind()), strict=True):
                carry = decay_t.mul_(grad.add_(carry))  # gradient of h_t, then of h_{t-1} in the memory of decay_t
            carry = carry.clone()  # the next chunk overwrites the buffer
            d_C[part] = _dot(d_y_, states[1 : k + 1].mT)
            d_B[part] = _dot(dt_ * u_, g.mT)
            d_product = _dot(B_, g)  # gradient of dt u
            a.mul_(before)  # gradient of dt A
            d_u[part] = d_product * dt_
            d_dt[part] = torch.mul(a, A, out=g).sum(2).addcmul_(d_product, u_)
            d_A += a.mul_(dt_[:, :, None]).sum((0, 1))
        return d_u, d_dt, d_A, d_B, d_C, carry, None


def _scan(decay, states, reverse=False):
    """Compute states_t += decay_t states_{t-1} in place (in reverse: decay_t states_{t+1}) in about 3 log2(T) kernels.

    First blocks of 1, 2, 4, ... steps are joined, then the end of each block updates the middle of the next one (Brent
    and Kung 1982). Nothing overflows, since all factors are products of decays up to 1. `decay` is overwritten.
    """
    T = len(states)

    def blocks(first, size):
        """Return views of every second block of `size` steps, from block `first` on.

        For decay and states each: the last step of these blocks, and the last step before each block.
        """
        ends = range(first * size - 1, T, 2 * size)
        last, before = ends.start, ends.start - size
        if reverse and ends:
            last = T - 1 - ends[-1]
            before = last + size
        return [[x[start :: 2 * size][: len(ends)] for start in (last, before)] for x in (decay, states)]

    sizes = [2**i for i in range(T.bit_length() - 1)]  # 2 size <= T
    for size in sizes:
        (factor, factor_before), (state, state_before) = blocks(2, size)
        state.addcmul_(factor, state_before)
        factor.mul_(factor_before)
    for size in reversed(sizes):
        (factor, _), (state, state_before) = blocks(3, size)
        state.addcmul_(factor, state_before)


class _ParallelScan(torch.autograd.Function):
    """The same scan in few kernels over many steps each, for devices where launching a kernel is expensive.

    Sums of products do not use matrix products, which a GPU may round to TF32.
    """

    @staticmethod
    def forward(ctx, u, dt, A, B, C, h0, chunk):
        T, rate = len(u), A / math.log(2)
        y = torch.empty_like(u)
        h = h0
        entering = h0.new_empty(-(-T // chunk), *h0.shape)
        for i, start in enumerate(range(0, T, chunk)):
            part = slice(start, start + chunk)
            entering[i] = h
            decay, states = _ParallelScan.replay(u[part], dt[part], rate, B[part], h)
            _scan(decay, states)
            h = states[-1].clone()
            y[part] = states.mul_(C[part][..., None]).sum(2)
        ctx.save_for_backward(u, dt, A, B, C, entering)
        ctx.chunk = chunk
        return y, h

    @staticmethod
    def replay(u, dt, rate, B, h):
        """Return the decays of a chunk and the input of each step to the state; the first includes the state h."""
        decay = (dt[:, :, None] * rate).exp2_()
        states = (dt * u)[:, :, None] * B[..., None]
        states[0].addcmul_(decay[0], h)
        return decay, states

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_y, carry):
        u, dt, A, B, C, entering = ctx.saved_tensors
        rate = A / math.log(2)
        d_u, d_dt, d_A, d_B, d_C = (torch.empty_like(t) for t in (u, dt, A, B, C))
        d_A.zero_()
        for i, start in reversed(list(enumerate(range(0, len(u), ctx.chunk)))):
            part = slice(start, start + ctx.chunk)
            u_, dt_, B_, C_, d_y_ = (t[part] for t in (u, dt, B, C, d_y))
            decay, states = _ParallelScan.replay(u_, dt_, rate, B_, entering[i])
            _scan(decay.clone(), states)
            d_C[part] = (states * d_y_[:, :, None]).sum(-1)
            grads = d_y_[:, :, None] * C_[..., None]
            grads[-1] += carry
            _scan(decay.roll(-1, 0), grads, reverse=True)  # the last decay has no effect
            carry = decay[0] * grads[0]
            d_B[part] = (grads * (dt_ * u_)[:, :, None]).sum(-1)
            d_product = (grads * B_[..., None]).sum(2)  # gradient of dt u
            d_exponent = decay.mul_(grads)  # gradient of dt A, once multiplied by the state before each step
            d_exponent[1:].mul_(states[:-1])
            d_exponent[0].mul_(entering[i])
            d_u[part] = d_product * dt_
            d_dt[part] = torch.mul(d_exponent, A, out=grads).sum(2).addcmul_(d_product, u_)
            d_A += d_exponent.mul_(dt_[:, :, None]).sum((0, 1))
        return d_u, d_dt, d_A, d_B, d_C, carry, None


@functools.cache
def _mamba_ssm():
    """Return the fused scan of the optional package mamba_ssm, or None if it or its CUDA part is not installed."""
    try:
        from mamba_ssm.ops import selective_scan_interface as interface
    except ImportError:
        return None
    built = getattr(interface, "selective_scan_cuda", None)  # newer versions install without it
    return interface.selective_scan_fn if built else None


def choose_method(device, dtype, N, fresh):
    """Choose how to scan: `loop` on a CPU, `fused` on CUDA where mamba_ssm supports the case, else `parallel`.

    fresh: the state starts at zero and is not returned; mamba_ssm supports only this case.
    """
    if device.type == "cpu":
        return "loop"
    fits = device.type == "cuda" and fresh and dtype == torch.float32 and N <= FUSED_STATES
    return "fused" if fits and _mamba_ssm() else "parallel"


@torch.compiler.disable  # a compiler would unroll every step
def selective_scan(u, dt, A, B, C, D, h0, chunk=None, method=None):
    """Run h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t, y_t = C_t h_t + D u_t (Mamba, eq. 2a and algorithm 2).

    u, dt: (T, B, E) with T >= 1, A: (E, N), B, C: (T, B, N), D: (E), h0: (B, E, N). h0 None: zeros, and h_last is None.
    method: `loop`, `parallel` or `fused`; by default `choose_method` decides.
    chunk: steps at a time; by default CHUNK in a loop, and in parallel as many as PARALLEL allows.
    -> (y (T, B, E), h_last (B, E, N)), at least fp32 even under autocast. All seven tensors get first-order gradients.
    Memory beyond inputs and outputs: T / chunk + a few times chunk states.
    """
    with torch.autocast(u.device.type, enabled=False):
        dtype = torch.promote_types(dt.dtype, torch.float32)
        u, dt, A, B, C, D = (t.to(dtype) for t in (u, dt, A, B, C, D))
        fresh = h0 is None
        N = A.shape[1]
        h = u.new_zeros(*u.shape[1:], N) if fresh else h0.to(dtype)
        method = method or choose_method(u.device, dtype, N, fresh)
        if len(u) == 1:  # generation: the bookkeeping of a chunk would take longer than the step
            h = (dt[0, :, :, None] * A).exp() * h + (dt * u)[0, :, :, None] * B[0, :, None]
            y = (h @ C[0, :, :, None])[None, :, :, 0]
        elif method == "fused":
            y = _mamba_ssm()(*(t.permute(1, 2, 0).contiguous() for t in (u, dt)), A.contiguous(),
                             *(t.permute(1, 2, 0).contiguous() for t in (B, C))).permute(2, 0, 1)  # fmt: skip
        else:
            scan = _SelectiveScan if method == "loop" else _ParallelScan
            chunk = chunk or (CHUNK if method == "loop" else max(FEWEST, PARALLEL // h.numel()))
            y, h = scan.apply(*(t.contiguous() for t in (u, dt, A.T, B, C, h.mT)), chunk)
            h = h.mT
        return torch.addcmul(y, u, D), None if fresh else h


class Mamba(nn.Module):
    """Short causal convolution, selective scan, gate (Mamba, figure 3): (T, B, C) -> (T, B, C)."""

    def __init__(self, *, d_model, d_state, d_inner, d_conv, dt_rank):
        super().__init__()
        self.sizes = dt_rank, d_state, d_state
        self.in_proj = nn.Linear(d_model, 2 * d_inner, bias=False)
        self.conv = nn.Conv1d(d_inner, d_inner, d_conv, groups=d_inner)  # holds the weights: (E, 1, d_conv)
        self.x_proj = nn.Linear(d_inner, sum(self.sizes), bias=False)
        self.dt_proj = nn.Linear(dt_rank, d_inner)
        self.A_log = nn.Parameter(torch.empty(d_inner, d_state))
        self.D = nn.Parameter(torch.ones(d_inner))
        self.out_proj = nn.Linear(d_inner, d_model, bias=False)
        self.initialize()

    @torch.no_grad()
    def initialize(self):
        """Set A = -1..-N in every channel, and the bias so that dt is log-uniform in [1e-3, 0.1] (section 3.6)."""
        self.A_log.copy_(torch.arange(1, self.A_log.shape[1] + 1).log())
        bound = self.dt_proj.in_features**-0.5
        self.dt_proj.weight.uniform_(-bound, bound)
        dt = torch.empty_like(self.dt_proj.bias).uniform_(math.log(1e-3), math.log(0.1)).exp_().clamp_min_(1e-4)
        self.dt_proj.bias.copy_(dt + (-torch.expm1(-dt)).log())  # inverse of softplus

    def forward(self, x, tail, h):
        """x: (T, B, C), tail: (B, E, d_conv - 1) last inputs, h: (B, E, N) state -> (y (T, B, C), new tail, new h).

        h None: the state starts at zero, and none is returned.
        """
        T = len(x)
        u, z = self.in_proj(x).chunk(2, -1)  # (T, B, E) each
        padded = torch.cat([tail.permute(2, 0, 1), u])  # (d_conv - 1 + T, B, E)
        u = self.conv.bias
        for i, weight in enumerate(self.conv.weight[:, 0].unbind(1)):  # conv1d needs (B, E, T): two copies, 3x the time
            u = torch.addcmul(u, padded[i : i + T], weight)
        u = F.silu(u)
        dt, B, C = self.x_proj(u).split(self.sizes, -1)
        dt = F.softplus(F.linear(dt, self.dt_proj.weight).float() + self.dt_proj.bias)  # bf16 would round the bias
        y, h = selective_scan(u, dt, -self.A_log.exp(), B, C, self.D, h)
        return self.out_proj(y * F.silu(z)), padded[T:].permute(1, 2, 0), h


class MambaBlock(nn.Module):
    """Pre-norm Mamba added to the residual stream; x, tail and h as in Mamba."""

    def __init__(self, *, dropout, **sizes):
        super().__init__()
        self.norm, self.mamba, self.dropout = RMSNorm(sizes["d_model"]), Mamba(**sizes), nn.Dropout(dropout)

    def forward(self, x, tail, h):
        y, tail, h = self.mamba(self.norm(x), tail, h)
        return x + self.dropout(y), tail, h


class StateSpace(nn.Module):
    """Decoder-only stack of Mamba blocks whose head is its embedding."""

    def __init__(self, *, vocab_size, d_model, max_seq_len, n_layers, d_state, d_inner, d_conv, dt_rank, dropout):
        """Arguments as in train_expert.StateSpaceConfig; vocab_size V is the tokenizer's.

        forward: ids (B, T) -> logits (B, T, V), with T <= max_seq_len. `step` has no such limit.
        """
        super().__init__()
        self.max_seq_len = max_seq_len
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.dropout = nn.Dropout(dropout)
        sizes = dict(d_model=d_model, d_state=d_state, d_inner=d_inner, d_conv=d_conv, dt_rank=dt_rank)
        self.blocks = nn.ModuleList(MambaBlock(dropout=dropout, **sizes) for _ in range(n_layers))
        self.norm = RMSNorm(d_model, gain=head_gain(vocab_size, d_model))
        initialize(self, ("out_proj",), n_layers)
        for block in self.blocks:
            block.mamba.initialize()  # again: A_log and dt_proj are matrices, but need other initial values

    def _run(self, x, state):
        """x: (B, T) ids -> (residual stream (T, B, C) after as many blocks as `state` has, their new state)."""
        h = self.dropout(self.embedding(x.T))
        after = []
        for block, (tail, hidden) in zip(self.blocks[: len(state)], state, strict=True):
            h, *new = block(h, tail, hidden)
            after.append(new)
        return h, after

    def hidden(self, x, layer):
        """x: (B, T) ids -> residual stream after `layer` blocks (0 = the embedding), not normalized: (B, T, C)."""
        if x.shape[1] > self.max_seq_len:
            raise ValueError(f"sequence of {x.shape[1]} tokens, the model was built for max_seq_len {self.max_seq_len}")
        state = [(tail, None) for tail, _ in self.init_state(len(x))[:layer]]
        return self._run(x, state)[0].transpose(0, 1)

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
        """Return the state before the first token: per layer a conv tail (B, E, d_conv - 1) and h (B, E, N), zeros."""
        new = self.embedding.weight.new_zeros
        mambas = [block.mamba for block in self.blocks]
        return [(new(batch, len(m.D), m.conv.kernel_size[0] - 1), new(batch, *m.A_log.shape)) for m in mambas]

    def step(self, x, state):
        """x: (B, T) ids that follow `state` -> (logits after the last id (B, V), new state): O(1) per token."""
        h, state = self.advance(x, state)
        return F.linear(h, self.output), state

    def advance(self, x, state):
        """x: (B, T) ids that follow `state` -> (hidden state of the last id (B, C), new state)."""
        h, state = self._run(x, state)
        return self.norm(h[-1]), state
