"""The recursive core against plain loops in fp64, and its gradients."""

import pytest
import torch

from models import trm
from models.transformer import Rotary
from models.trm import EPS, RELATION_SCALE, Core, CoreBlock, attend, boxes, grid, offsets

S, C, HEADS = 16, 16, 4
SIZES = dict(d_model=C, n_heads=HEADS, core="recursive", core_layers=2, share=True, h_cycles=2, l_steps=3, norm="post",
             grad="last_cycle", ffn_dim=24, relation=None, mixer="attention", length=None, recompute=False)  # fmt: skip


def still(x):
    return x


def build(**changes):
    torch.manual_seed(0)
    return Core(**SIZES | changes).double()


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def padding():
    """Return a bias of the keys; the second of two samples has 4 fewer keys."""
    bias = torch.zeros(2, 1, 1, S, dtype=torch.float64)
    bias[1, ..., -4:] = -torch.inf
    return bias


def plain_rms(h):
    return h / (h.pow(2).mean() + EPS) ** 0.5


def plain_block(block, h, relation, bias):
    """Run a block on one sample h (S, C), position by position; relation (heads, 8) or None, bias (S)."""
    place, D, new = grid(S).tolist(), C // HEADS, []
    before, after = (plain_rms, torch.clone) if block.pre else (torch.clone, plain_rms)
    seen = torch.stack([before(row) for row in h])
    q, k, v = (part.view(S, HEADS, D) for part in (seen @ block.mixer.qkv.weight.T).chunk(3, -1))
    for t in range(S):
        read = []
        for head in range(HEADS):
            logits = [q[t, head] @ k[s, head] / D**0.5 + bias[s] for s in range(S)]
            for s in range(S if relation is not None else 0):
                row, column, box = (p[t] == p[s] for p in place)
                logits[s] = logits[s] + RELATION_SCALE * relation[head, row + 2 * column + 4 * box]
            p = torch.stack(logits).exp()
            read.append(p @ v[:, head] / p.sum())
        x = after(h[t] + block.mixer.out.weight @ torch.cat(read))
        gate, up = (block.ffn.gate_up.weight @ before(x)).chunk(2)
        new.append(after(x + block.ffn.down.weight @ (gate * gate.sigmoid() * up)))
    return torch.stack(new)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("relation_bias", [True, False])
@pytest.mark.parametrize("norm", ["post", "pre"])
@torch.no_grad()
def test_core_equals_a_loop(share, relation_bias, norm):
    relation = boxes(S, HEADS) if relation_bias else None
    core = build(share=share, relation=relation, norm=norm, l_steps=2, core_layers=1)
    if relation_bias:
        torch.nn.init.normal_(core.relation)
    x, z_H, z_L = (normal(2, S, C, seed=s) for s in range(3))
    states = core(x, z_H, z_L, still, padding())
    for n in range(2):

        def f(i, h, n=n):
            for layer, block in enumerate(core.stacks[i]):
                h = plain_block(block, h, core.relation[i, layer] if relation_bias else None, padding()[n, 0, 0])
            return torch.stack([plain_rms(row) for row in h]) if norm == "pre" else h

        H, L = z_H[n], z_L[n]
        for _ in range(2):
            for _ in range(2):
                L = f(0, L + H + x[n])
            H = f(0 if share else 1, H + L)
        torch.testing.assert_close(states[0][n], H, rtol=0, atol=1e-10)
        torch.testing.assert_close(states[1][n], L, rtol=0, atol=1e-10)
    rounded = core.float()(*(t.float() for t in (x, z_H, z_L)), still, padding().float())
    torch.testing.assert_close(rounded[0].double(), states[0], rtol=0, atol=1e-5)


def test_fused_attention_is_the_same(monkeypatch):
    q, k, v = (normal(2, HEADS, S, 4, seed=s) for s in range(3))
    for bias in (None, padding(), normal(HEADS, S, S)):
        monkeypatch.setattr(trm, "MATMUL_KEYS", S)
        plain = attend(q, k, v, bias)
        monkeypatch.setattr(trm, "MATMUL_KEYS", S - 1)
        torch.testing.assert_close(attend(q, k, v, bias), plain)


def gradients(core, x):
    core.zero_grad()
    z_H, z_L = core(x, *core.start(x), still, None)
    (z_H * normal(2, S, C, seed=9)).sum().backward()
    return torch.cat([p.grad.flatten() for p in core.parameters()])


@pytest.mark.parametrize("share", [True, False])
def test_gradients_go_as_far_back_as_said(share):
    x = normal(2, S, C)
    grads = {(g, h): gradients(build(grad=g, h_cycles=h, share=share), x)
             for g in ("one_step", "last_cycle", "bptt") for h in (1, 2)}  # fmt: skip
    torch.testing.assert_close(grads["last_cycle", 1], grads["bptt", 1])
    assert not torch.allclose(grads["last_cycle", 2], grads["bptt", 2])
    assert not torch.allclose(grads["one_step", 1], grads["last_cycle", 1])
    core = build(h_cycles=1, share=share)
    with torch.no_grad():
        z_H, z_L = core(x, *core.start(x), still, None)
    again = build(share=share, h_cycles=1)
    again(x, z_H, z_L, still, None)[0].mul(normal(2, S, C, seed=9)).sum().backward()
    torch.testing.assert_close(torch.cat([p.grad.flatten() for p in again.parameters()]), grads["last_cycle", 2])


@pytest.mark.parametrize("grad, calls", [("one_step", 2), ("last_cycle", 4), ("bptt", 8)])
def test_early_calls_leave_no_graph(grad, calls, monkeypatch):
    with_graph = []
    forward = CoreBlock.forward
    monkeypatch.setattr(CoreBlock, "forward", lambda *a: with_graph.append(forward(*a).requires_grad) or forward(*a))
    core, x = build(grad=grad), normal(2, S, C)
    core(x, *core.start(x), still, None)
    layers = len(core.stacks[0])
    assert with_graph == [False] * (layers * (8 - calls)) + [True] * (layers * calls)
    with torch.no_grad():
        assert not core(x, *core.start(x), still, None)[0].requires_grad


def test_plain_applies_the_same_blocks_once_and_none_nothing():
    x = normal(2, S, C)
    for share in (True, False):
        core, recursive = build(core="plain", share=share), build(share=share)
        assert {n: p.shape for n, p in core.named_parameters()} == {n: p.shape for n, p in recursive.named_parameters()}
        h = x
        for block in [block for blocks in core.stacks for block in blocks]:
            h = block(h, still, None)
        torch.testing.assert_close(core(x, x, x, still, None)[0], h)
    none = build(core="none")
    assert not list(none.parameters()) and torch.equal(none(x, x, x, still, None)[0], x)


@pytest.mark.parametrize("positions", ["in x", "rope"])
def test_states_differ_between_positions(positions):
    core = build()
    rotary = Rotary(C // HEADS, S, 1e4).double() if positions == "rope" else still
    x = normal(1, S, C) if positions == "in x" else normal(1, 1, C).expand(1, S, C) + 0.1 * normal(1, S, C, seed=1)
    z_H, z_L = core(x, *core.start(x), rotary, None)
    for z in (z_H, z_L):
        distance = torch.cdist(z[0], z[0]) + torch.eye(S)
        assert distance.min() > 1e-2


@pytest.mark.parametrize("cells, box_shape", [(16, (2, 2)), (36, (2, 3)), (81, (3, 3))])
def test_units_of_a_grid(cells, box_shape):
    row, column, box = grid(cells).tolist()
    side = round(cells**0.5)
    for unit in (row, column, box):
        assert sorted(unit) == sorted(list(range(side)) * side)
    assert box == [r // box_shape[0] * box_shape[0] + c // box_shape[1] for r, c in zip(row, column, strict=True)]
    with pytest.raises(ValueError, match="80 cells"):
        grid(80)


def test_heads_begin_on_row_column_and_box():
    core = build(relation=boxes(S, HEADS)).float()
    place = grid(S)
    bias = core.biases(None)[0, 0]
    for head in range(3):
        same = place[head][:, None] == place[head]
        torch.testing.assert_close(bias[head], 2.0 * same)
    assert not bias[3].any()


def test_heads_begin_at_the_four_neighbours():
    classes, start = offsets(3, 5, 5)
    bias = start[:, classes]  # (heads, 15, 15)
    for head, (down, right) in enumerate([(0, 1), (0, -1), (1, 0), (-1, 0)]):
        for i in range(15):
            for j in range(15):
                there = (i // 5 + down, i % 5 + right) == (j // 5, j % 5)
                assert bias[head, i, j] == 7.0 * there
    assert not bias[4].any() and classes.unique().tolist() == list(range(45))


@torch.no_grad()
def test_mixing_by_an_mlp_equals_a_loop():
    core = build(mixer="mlp_t", length=S, core_layers=1, h_cycles=1, l_steps=1)
    x, z_H, z_L = (normal(1, S, C, seed=s) for s in range(3))
    states = core(x, z_H, z_L, still, None)
    block = core.stacks[0][0]

    def f(h):
        across = torch.stack([block.mixer.mlp(h[:, c]) for c in range(C)], 1)
        h = torch.stack([plain_rms(row) for row in h + across])
        return torch.stack([plain_rms(row) for row in h + block.ffn(h)])

    L = f(z_L[0] + z_H[0] + x[0])
    torch.testing.assert_close(states[1][0], L)
    torch.testing.assert_close(states[0][0], f(z_H[0] + L))


@pytest.mark.parametrize("mixer", ["attention", "mlp_t"])
def test_a_segment_in_two_parts(mixer):
    core = build(mixer=mixer, length=S, h_cycles=3)
    x, z_H, z_L = (normal(2, S, C, seed=s) for s in range(3))
    full = core(x, z_H, z_L, still, None)
    parts = core(x, *core(x, z_H, z_L, still, None, last=-1), still, None, first=-1)
    for a, b in zip(full, parts, strict=True):
        assert torch.equal(a, b)
    first, second = (torch.autograd.grad(h.square().sum(), list(core.parameters())) for h in (full[0], parts[0]))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_recomputing_changes_no_gradient():
    x, z_H, z_L = (normal(2, S, C, seed=s) for s in range(3))
    gradients = []
    for recompute in (False, True):
        core = build(recompute=recompute)
        gradients.append(torch.autograd.grad(core(x, z_H, z_L, still, None)[0].square().sum(), list(core.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("mixer", ["attention", "mlp_t"])
@torch.no_grad()
def test_recursion_does_not_begin_in_chaos(mixer, norm):
    core = build(mixer=mixer, norm=norm, length=S, h_cycles=3, l_steps=6, ffn_dim=4 * C)
    x, nudge = normal(2, S, C), 1e-6 * normal(2, S, C, seed=1)
    far = core(x + nudge, *core.start(x), still, None)[0] - core(x, *core.start(x), still, None)[0]
    assert far.norm() < 50 * nudge.norm()  # with ACROSS_START 1 it is thousands of times the nudge
