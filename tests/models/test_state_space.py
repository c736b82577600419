import math
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from models import state_space
from models.state_space import StateSpace, selective_scan
from models.transformer import head_gain

NAMES = ("u", "dt", "A", "B", "C", "D", "h0")
METHODS = "loop", "parallel"


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
    """Run the recurrence of the paper, one step at a time."""
    y = []
    for t in range(len(u)):
        h = (dt[t, :, :, None] * A).exp() * h + (dt[t] * u[t])[:, :, None] * B[t, :, None]
        y.append((h @ C[t, :, :, None]).squeeze(-1) + D * u[t])
    return torch.stack(y), h


class Kernels(TorchDispatchMode):
    """Record the `count` of operations that would each launch a kernel, and the size of their `largest` output."""

    def __init__(self):
        super().__init__()
        self.count, self.largest = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.is_view and "empty" not in str(function):
            self.count += 1
            if torch.is_tensor(result):
                self.largest = max(self.largest, result.numel())
        return result


def kernels(T, method, chunk=None, **sizes):
    """Record the kernels of a forward and a backward pass of a scan."""
    inputs = scan_inputs(T, torch.float32, **sizes)
    with Kernels() as mode:
        y, _ = selective_scan(*inputs, chunk, method)
        y.sum().backward()
    return mode


@pytest.fixture
def use(monkeypatch):
    """Let models scan by a method that the test chooses, regardless of the device."""
    return lambda method: monkeypatch.setattr(state_space, "choose_method", lambda *_: method)


@pytest.fixture
def mamba_ssm(monkeypatch):
    """Replace mamba_ssm by a package that runs the documented scan as a loop and records its calls."""
    calls = []

    def selective_scan_fn(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False,
                          return_last_state=False):  # fmt: skip
        calls.append(u.shape)
        (batch, E, L), N = u.shape, A.shape[1]
        assert z is None and delta_bias is None and not delta_softplus and not return_last_state
        assert delta.shape == (batch, E, L) and A.shape == (E, N) and B.shape == C.shape == (batch, N, L)
        assert all(t.dtype == torch.float32 for t in (u, delta, A, B, C))
        assert all(t.stride(-1) == 1 or t.shape[-1] == 1 for t in (u, delta, A, B, C))
        h, y = u.new_zeros(batch, E, N), []
        for t in range(L):
            h = (delta[:, :, t, None] * A).exp() * h + (delta * u)[:, :, t, None] * B[:, None, :, t]
            y.append((h * C[:, None, :, t]).sum(-1))
        y = torch.stack(y, 2)
        return y if D is None else y + D[:, None] * u

    interface = SimpleNamespace(selective_scan_fn=selective_scan_fn, selective_scan_cuda=object())
    package = SimpleNamespace(selective_scan_interface=interface)
    for name, module in (("mamba_ssm", SimpleNamespace(ops=package)), ("mamba_ssm.ops", package)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "mamba_ssm.ops.selective_scan_interface", interface)
    state_space._mamba_ssm.cache_clear()
    yield SimpleNamespace(calls=calls, interface=interface)
    state_space._mamba_ssm.cache_clear()


def close(actual, wanted, tolerance=1e-5):
    return (actual - wanted).abs().max() <= tolerance * wanted.abs().max()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("T", [1, 2, 31, 32, 33, 100])
def test_scan_values_and_gradients_equal_the_fp64_loop(T, method):
    exact = scan_inputs(T)
    y, h = loop(*exact)
    weight_y, weight_h = torch.randn_like(y), torch.randn_like(h)
    wanted = torch.autograd.grad((y * weight_y).sum() + (h * weight_h).sum(), exact)
    for chunk in (1, 5, 32, T, None):
        inputs = scan_inputs(T, torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            y_, h_ = selective_scan(*inputs, chunk, method)
            loss = (y_ * weight_y.float()).sum() + (h_ * weight_h.float()).sum()
        assert y_.dtype == h_.dtype == torch.float32
        assert close(y_, y) and close(h_, h)
        for name, gradient, grad in zip(NAMES, torch.autograd.grad(loss, inputs), wanted, strict=True):
            assert close(gradient, grad), (name, chunk)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cut", [1, 32, 50])
def test_scan_in_two_pieces_equals_the_whole(cut, method):
    inputs, weights = scan_inputs(70), scan_inputs(70, seed=1)[0].detach()

    def run(pieces):
        u, dt, A, B, C, D, h = inputs
        y = []
        for part in pieces:
            y_part, h = selective_scan(u[part], dt[part], A, B[part], C[part], D, h, 32, method)
            y.append(y_part)
        y = torch.cat(y)
        return y, h, *torch.autograd.grad((y * weights).sum() + h.sin().sum(), inputs)

    for actual, wanted in zip(run([slice(cut), slice(cut, None)]), run([slice(None)]), strict=True):
        assert close(actual, wanted, 1e-10)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("T, chunk", [(3, 2), (7, 7)])
def test_scan_gradcheck(T, chunk, method):
    u, dt, *rest = scan_inputs(T, E=2, N=2)
    dt = (dt.detach() / 50 + 0.1).requires_grad_()
    assert torch.autograd.gradcheck(lambda *t: selective_scan(*t, chunk, method), (u, dt, *rest))


def test_on_a_gpu_the_scan_starts_few_kernels():
    """512 steps, forward and backward: 2,548 kernels in a loop, 141 in parallel."""
    loop, parallel = (kernels(512, method).count for method in METHODS)
    assert loop > 2000 and parallel < 150
    assert kernels(1024, "parallel").count - parallel < 12  # one more round of joining, there and back
    assert kernels(512, "parallel", chunk=64).count < 8 * 100  # as many per chunk


def test_the_memory_of_a_parallel_scan_does_not_grow_with_the_text(monkeypatch):
    monkeypatch.setattr(state_space, "PARALLEL", 2**13)
    sizes = dict(batch=2, E=64, N=4)  # 512 numbers a step: FEWEST steps at a time
    assert kernels(128, "parallel", **sizes).largest <= kernels(64, "parallel", **sizes).largest * 2
    assert kernels(256, "parallel", **sizes).largest == 256 * 2 * 64  # that is u: T states would be 4 times as many


def test_the_method_follows_from_the_device(mamba_ssm):
    cpu, cuda, mps = map(torch.device, ("cpu", "cuda", "mps"))
    for fresh in (False, True):
        assert state_space.choose_method(cpu, torch.float32, 16, fresh) == "loop"
        assert state_space.choose_method(mps, torch.float32, 16, fresh) == "parallel"
    assert state_space.choose_method(cuda, torch.float32, 16, True) == "fused"
    assert state_space.choose_method(cuda, torch.float32, 16, False) == "parallel"  # the state at the start is not zero
    assert state_space.choose_method(cuda, torch.float64, 16, True) == "parallel"
    assert state_space.choose_method(cuda, torch.float32, 257, True) == "parallel"
    mamba_ssm.interface.selective_scan_cuda = None  # installed without its CUDA part
    state_space._mamba_ssm.cache_clear()
    assert state_space.choose_method(cuda, torch.float32, 16, True) == "parallel"


def test_without_mamba_ssm_a_gpu_scans_in_parallel(monkeypatch):
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)
    state_space._mamba_ssm.cache_clear()
    assert state_space.choose_method(torch.device("cuda"), torch.float32, 16, True) == "parallel"
    state_space._mamba_ssm.cache_clear()


@pytest.mark.parametrize("method", ["parallel", "fused"])
@pytest.mark.parametrize("bf16", [False, True])
def test_a_model_is_the_same_by_every_method(method, bf16, use, mamba_ssm):
    x = tokens(2, 41)

    def run(name):
        use(name)
        model = build(n_layers=2)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss, _ = model(x[:, :-1], x[:, 1:])
        loss.backward()
        return loss, dict(model.named_parameters())

    (wanted, expected), (loss, parameters) = run("loop"), run(method)
    assert len(mamba_ssm.calls) == (2 if method == "fused" else 0)
    assert close(loss, wanted, 1e-2 if bf16 else 1e-5)
    for name, p in parameters.items():  # in bfloat16 a difference in the last bit may round to another number
        assert close(p.grad, expected[name].grad, 3e-2 if bf16 else 1e-4), name


STEPS = [(first, piece, "loop") for first in (1, 2, 7, 40) for piece in (1, 3, 33)]


@pytest.mark.parametrize("first, piece, method", [*STEPS, (1, 3, "parallel"), (7, 33, "parallel")])
def test_step_equals_the_full_forward(first, piece, method, use):
    use(method)
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


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bf16", [False, True])
def test_causality(bf16, method, use):
    use(method)
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
