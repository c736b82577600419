import math

import pytest
import torch
import torch.nn.functional as F

from models.state_space import StateSpace, selective_scan
from models.transformer import head_gain

NAMES = ("u", "dt", "A", "B", "C", "D", "h0")


def build(seed=0, **changes):
    torch.manual_seed(seed)
    sizes = dict(vocab_size=31, d_model=16, max_seq_len=48, n_layers=2, d_state=4, d_inner=32, d_conv=4, dt_rank=2)
    return StateSpace(**{**sizes, "dropout": 0.0, **changes})


def tokens(batch, length, vocab=31):
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(length))


def scan_inputs(T, dtype=torch.float64, batch=2, E=5, N=3, seed=0):
    """u, dt, A, B, C, D, h0 with dt log-uniform in [1e-4, 50]."""
    g = torch.Generator().manual_seed(seed)
    shapes = (T, batch, E), (T, batch, E), (E, N), (T, batch, N), (T, batch, N), (E,), (batch, E, N)
    u, dt, A, B, C, D, h0 = (torch.randn(s, generator=g, dtype=torch.float64) for s in shapes)
    dt = torch.rand(dt.shape, generator=g, dtype=torch.float64).mul(math.log(50 / 1e-4)).exp() * 1e-4
    return [t.float().to(dtype).requires_grad_() for t in (u, dt, -A.exp(), B, C, D, h0)]


def loop(u, dt, A, B, C, D, h):
    """The recurrence as it is written in the paper, one step at a time."""
    y = []
    for t in range(len(u)):
        h = (dt[t, :, :, None] * A).exp() * h + (dt[t] * u[t])[:, :, None] * B[t, :, None]
        y.append((h @ C[t, :, :, None]).squeeze(-1) + D * u[t])
    return torch.stack(y), h


def close(found, wanted, tolerance=1e-5):
    return (found - wanted).abs().max() <= tolerance * wanted.abs().max()


@pytest.mark.parametrize("T", [1, 31, 32, 33, 100])
def test_scan_values_and_gradients_equal_the_fp64_loop(T):
    exact = scan_inputs(T)
    y, h = loop(*exact)
    weight_y, weight_h = torch.randn_like(y), torch.randn_like(h)
    wanted = torch.autograd.grad((y * weight_y).sum() + (h * weight_h).sum(), exact)
    for chunk in (1, 32, T):
        inputs = scan_inputs(T, torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            y_, h_ = selective_scan(*inputs, chunk)
            loss = (y_ * weight_y.float()).sum() + (h_ * weight_h.float()).sum()
        assert y_.dtype == h_.dtype == torch.float32
        assert close(y_, y) and close(h_, h)
        for name, found, grad in zip(NAMES, torch.autograd.grad(loss, inputs), wanted, strict=True):
            assert close(found, grad), (name, chunk)


@pytest.mark.parametrize("cut", [1, 32, 50])
def test_scan_in_two_pieces_equals_the_whole(cut):
    inputs, weights = scan_inputs(70), scan_inputs(70, seed=1)[0].detach()

    def run(pieces):
        u, dt, A, B, C, D, h = inputs
        y = []
        for part in pieces:
            y_part, h = selective_scan(u[part], dt[part], A, B[part], C[part], D, h, 32)
            y.append(y_part)
        y = torch.cat(y)
        return y, h, *torch.autograd.grad((y * weights).sum() + h.sin().sum(), inputs)

    for found, wanted in zip(run([slice(cut), slice(cut, None)]), run([slice(None)]), strict=True):
        assert close(found, wanted, 1e-10)


def test_scan_gradcheck():
    u, dt, *rest = scan_inputs(3, E=2, N=2)
    dt = (dt.detach() / 50 + 0.1).requires_grad_()
    assert torch.autograd.gradcheck(lambda *t: selective_scan(*t, 2), (u, dt, *rest))


@pytest.mark.parametrize("first", [1, 2, 7, 40])
@pytest.mark.parametrize("piece", [1, 3, 33])
def test_step_equals_the_full_forward(first, piece):
    model, x = build(n_layers=3).eval(), tokens(2, 45)
    full = model(x)
    state, ends = model.init_state(2), [first]
    while ends[-1] < x.shape[1]:
        ends.append(min(ends[-1] + piece, x.shape[1]))
    for start, end in zip([0, *ends], ends, strict=False):
        logits, state = model.step(x[:, start:end], state)
        assert (logits - full[:, end - 1]).abs().max() < 1e-4
    assert [t.shape for t in state[0]] == [(2, 32, 3), (2, 32, 4)]


def test_step_has_no_limit_and_the_full_forward_has():
    model = build(max_seq_len=16).eval()
    x = tokens(1, 40)
    logits, state = model.step(x, model.init_state(1))
    assert logits.shape == (1, 31) and len(state) == 2
    with pytest.raises(ValueError, match="17.*16"):
        model(x[:, :17])


@pytest.mark.parametrize("bf16", [False, True])
def test_causality(bf16):
    model = build(n_layers=3).eval()
    for k in (1, 5, 31, 32, 33, 47):
        x = tokens(2, 48)
        other = x.clone()
        other[:, k:] = (x[:, k:] + 1) % 31
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            moved = (model(x) - model(other)).float().abs()
        assert moved[:, :k].max() < (1e-2 if bf16 else 1e-5)
        assert moved[:, k:].max() > (1e-2 if bf16 else 1e-5)


@pytest.mark.parametrize("vocab", [259, 8192])
def test_first_loss_is_ln_vocab(vocab):
    model = build(vocab_size=vocab, d_model=384, n_layers=6, d_state=16, d_inner=768, dt_rank=24)
    x = tokens(2, 33, vocab)
    loss, report = model(x[:, :-1], x[:, 1:])
    assert abs(loss.item() / 64 - math.log(vocab)) < 0.1
    assert report["loss"].shape == report["nll"].shape == (2, 32)
    logits = model(x[:, :-1])
    assert torch.allclose(loss, F.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten(), reduction="sum"), rtol=1e-4)


def test_overfits_one_batch():
    model, x = build(d_model=32, d_inner=64), tokens(4, 33)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        loss = model(x[:, :-1], x[:, 1:])[0] / 128
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.5


def test_every_parameter_learns():
    model, x = build(dropout=0.1), tokens(4, 33)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        model(x[:, :-1], x[:, 1:])[0].backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, name


def test_initialisation():
    model = build(d_model=64, d_inner=512, d_state=16, dt_rank=24)
    mamba = model.blocks[0].mamba
    assert torch.allclose(mamba.A_log.exp(), torch.arange(1.0, 17.0).expand(512, 16))
    dt = F.softplus(mamba.dt_proj.bias)
    assert 9e-4 < dt.min() < 2e-3 and 0.05 < dt.max() < 0.101
    assert 0.19 < mamba.dt_proj.weight.abs().max() <= 24**-0.5
    assert (
        abs(mamba.out_proj.weight.std().item() - 0.01) < 1e-3 and abs(mamba.in_proj.weight.std().item() - 0.02) < 1e-3
    )
    assert (
        model.norm.weight.eq(head_gain(31, 64)).all() and mamba.D.eq(1).all() and mamba.conv.weight.shape == (512, 1, 4)
    )
