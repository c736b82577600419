"""Cross-entropy directly from hidden states, without building the (B T, V) logits of a large vocabulary.

N positions, C width, V vocabulary.
"""

import torch
from torch.utils.checkpoint import checkpoint

CHUNK = 512  # positions whose logits exist at a time


class _LinearCrossEntropy(torch.autograd.Function):
    """Compute the gradient in the forward, while the logits of a chunk exist; the backward only scales it."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, weights, bias, dtype, train):
        nats = torch.empty(targets.shape, dtype=torch.float32, device=hidden.device)  # (N,)
        d_hidden = torch.empty_like(hidden) if train else None
        d_weight = torch.zeros_like(weight) if train else None
        table = weight.detach().to(dtype)
        size = min(CHUNK, len(targets))
        logits = torch.empty(size, len(table), dtype=dtype, device=hidden.device)  # reused: fresh pages are slow
        log_p = logits if dtype == torch.float32 else torch.empty_like(logits, dtype=torch.float32)
        for start in range(0, len(targets), CHUNK):
            part = slice(start, start + CHUNK)
            h, y = hidden[part].to(dtype), targets[part]
            real = y >= 0
            rows = torch.arange(len(y), device=y.device)
            y = y.clamp_min(0)
            torch.mm(h, table.T, out=logits[: len(y)])
            p = log_p[: len(y)].copy_(logits[: len(y)])
            if bias is not None:
                p += bias(part)
            torch.log_softmax(p, -1, out=p)
            nats[part] = -p[rows, y] * real
            if train:
                p.exp_()[rows, y] -= 1
                p = logits[: len(y)].copy_(p.mul_((weights[part] * real)[:, None]))
                d_hidden[part] = p @ table
                d_weight += p.T @ h
        ctx.grads = d_hidden, d_weight
        ctx.mark_non_differentiable(nats)
        return (nats * weights).sum(), nats

    @staticmethod
    def backward(ctx, grad, _):
        d_hidden, d_weight = ctx.grads
        del ctx.grads  # they are scaled in place, so that a second backward must fail
        return d_hidden.mul_(grad), d_weight.mul_(grad), None, None, None, None, None


def linear_cross_entropy(hidden, weight, targets, weights=None, bias=None):
    """Return (sum of weights * nats, nats) of softmax(hidden @ weight.T), CHUNK positions at a time.

    hidden: (..., C), weight: (V, C), targets: (...) ids, negative = not counted, weights: (...), 1 by default.
    bias: function of a slice of the flattened positions -> (chunk, V), a constant added to their logits.
    nats: (...), detached, 0 where not counted. Matrix products use the autocast type, the softmax fp32.
    """
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    shape = targets.shape
    targets = targets.reshape(-1)
    weights = torch.ones(targets.shape, device=hidden.device) if weights is None else weights.reshape(-1).float()
    with torch.autocast(kind, enabled=False):
        total, nats = _LinearCrossEntropy.apply(
            hidden.reshape(-1, hidden.shape[-1]), weight, targets, weights, bias, dtype, torch.is_grad_enabled()
        )
    return total, nats.view(shape)


def by_chunk(function, *tensors):
    """Apply a function of positions (N, ...) -> (N, ...) to (B, T, ...) tensors, CHUNK positions at a time.

    For functions with an intermediate result of (N, V): the backward recomputes each chunk instead of storing it.
    """
    parts = zip(*(t.flatten(0, 1).split(CHUNK) for t in tensors), strict=True)
    if torch.is_grad_enabled():
        outputs = [checkpoint(function, *part, use_reentrant=False) for part in parts]
    else:
        outputs = [function(*part) for part in parts]
    return torch.cat(outputs).unflatten(0, tensors[0].shape[:2])
