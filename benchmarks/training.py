"""The loop of the benchmarks that train models of their own: clip, AdamW, a rate for each step."""

import itertools
import math
import time

import torch


def grouped(model, decay, decayed):
    """Return the two parameter groups of AdamW; decayed(name, parameter) says which ones shrink."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [
        dict(params=[p for name, p in trained if decayed(name, p)], weight_decay=decay),
        dict(params=[p for name, p in trained if not decayed(name, p)], weight_decay=0.0),
    ]


def cosine(share, floor=0.1):
    """Return the factor of the learning rate after a share of the training: from 1 down to `floor`."""
    return (1 + floor) / 2 + (1 - floor) / 2 * math.cos(math.pi * min(1.0, max(0.0, share)))


def update(model, optimizer, loss):
    """Backward, clip to norm 1, step."""
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def fit(model, optimizer, loss_of, batches, factor, *, every=100, total=0):
    """Train until `batches` or `factor` end -> (steps, seconds).

    loss_of(batch) is a mean, factor(step), from step 0, that of the learning rate, or None to stop. Progress is
    printed at every `every`-th step.
    """
    rates, start = [group["lr"] for group in optimizer.param_groups], time.monotonic()
    for step in itertools.count():
        scale = factor(step)
        batch = next(batches, None) if scale is not None else None
        if batch is None:
            return step, time.monotonic() - start
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * scale
        loss = loss_of(batch)
        update(model, optimizer, loss)
        if (step + 1) % every == 0:
            print(f"  step {step + 1}{f'/{total}' if total else ''}, loss {loss.item():.3f}, "
                  f"{time.monotonic() - start:.0f} s", flush=True)  # fmt: skip
