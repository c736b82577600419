"""8-bit AdamW: what rounding costs, memory, exact resume."""

import io

import pytest
import torch

from models.optim.adamw8bit import BLOCK, SMALLEST, AdamW8bit, dequantize, quantize

SETTINGS = dict(lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)


def uniform(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def parameters():
    """Return a tensor of full blocks, one with a partial block, and one that stays fp32."""
    shapes = (BLOCK, 32), (SMALLEST + 5,), (40,)
    return [torch.nn.Parameter(normal(*shape, seed=i)) for i, shape in enumerate(shapes)]


def steps(tensors, optimizer, first, last):
    for step in range(first, last):
        for i, p in enumerate(tensors):
            p.grad = p.detach() + normal(*p.shape, seed=10 * step + i)
        optimizer.step()


@pytest.mark.parametrize("kind, top, degree", [("m", 127, 2), ("v", 255, 4)])
def test_round_trip_is_close_and_right_on_average(kind, top, degree):
    x = normal(20, BLOCK) ** 5
    x = x if kind == "m" else x.square()
    decoded = torch.stack([dequantize(*quantize(x, kind, uniform(20, BLOCK, seed=s)), kind) for s in range(400)])
    scale = x.abs().amax(1, keepdim=True)
    t = (x.abs() / scale) ** (1 / degree)
    gap = scale * ((t + 1 / top) ** degree - (t - 1 / top).clamp_min(0) ** degree)  # one code up to one code down
    assert ((decoded - x).abs() <= gap).all()
    large = t > 2 / top  # below, v is kept from 0
    assert ((decoded.mean(0) - x).abs() <= gap * 5 / 400**0.5)[large].all()
    assert (decoded.sign() * x.sign() >= 0).all() and (
        dequantize(*quantize(0 * x, kind, uniform(20, BLOCK)), kind) == 0
    ).all()


def test_v_never_falls_to_0():
    v = torch.logspace(-30, 0, BLOCK)[None]
    codes, scales = quantize(v, "v", torch.full_like(v, 0.999))
    assert (codes >= 1).all() and (dequantize(codes, scales, "v") > 0).all()


def test_a_v_that_decays_slowly_is_not_frozen():
    v = torch.ones(1, BLOCK)
    v[:, 1:] = 0.5
    for step in range(1000):
        v[:, 1:] *= 0.999
        v = dequantize(*quantize(v, "v", uniform(1, BLOCK, seed=step)), "v")
    assert abs(v[0, 1:].mean() / (0.5 * 0.999**1000) - 1) < 0.05


def test_it_follows_adamw():
    ours, theirs = parameters(), parameters()
    begin = [p.detach().clone() for p in ours]
    steps(ours, AdamW8bit(ours, **SETTINGS, seed=0), 0, 40)
    steps(theirs, torch.optim.AdamW(theirs, **SETTINGS), 0, 40)
    for a, b, c in zip(ours, theirs, begin, strict=True):
        assert (a - b).norm() < 0.05 * (b - c).norm()
    torch.testing.assert_close(ours[2], theirs[2])  # fp32


def test_state_is_small():
    p = torch.nn.Parameter(normal(512, 512))
    optimizer = AdamW8bit([p], **SETTINGS, seed=0)
    steps([p], optimizer, 0, 1)
    state = [t for t in optimizer.state[p].values() if torch.is_tensor(t)]
    assert sum(t.nbytes for t in state) <= 0.30 * 8 * p.numel()


def test_a_resumed_run_does_the_same():
    uninterrupted = parameters()
    steps(uninterrupted, AdamW8bit(uninterrupted, **SETTINGS, seed=3), 0, 6)
    first = parameters()
    optimizer, file = AdamW8bit(first, **SETTINGS, seed=3), io.BytesIO()
    steps(first, optimizer, 0, 3)
    torch.save(dict(weights=[p.detach() for p in first], optimizer=optimizer.state_dict()), file)
    file.seek(0)
    saved, second = torch.load(file, weights_only=True), parameters()
    for p, weight in zip(second, saved["weights"], strict=True):
        p.data.copy_(weight)
    optimizer = AdamW8bit(second, **SETTINGS, seed=3)
    optimizer.load_state_dict(saved["optimizer"])
    steps(second, optimizer, 3, 6)
    assert all(torch.equal(a, b) for a, b in zip(uninterrupted, second, strict=True))
    other = parameters()
    steps(other, AdamW8bit(other, **SETTINGS, seed=4), 0, 6)
    assert not torch.equal(other[0], uninterrupted[0]) and torch.equal(other[2], uninterrupted[2])
