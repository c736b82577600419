"""Adam-atan2 and sign descent on rows against plain references."""

import copy
import math
import sys

import pytest
import torch
import torch.nn as nn

from data_utils.checkpoint import load_parts, to_plain
from data_utils.errors import UsageError
from models.optim.adam_atan2 import AdamAtan2, SignRows, advance, advance_compiled
from tests.helpers import ROOT, finish, launch

SETTINGS = dict(lr=1e-2, betas=(0.9, 0.95))
RANKS = """
import os, sys
import torch, torch.distributed as dist, torch.nn as nn
from models.optim.adam_atan2 import AdamAtan2, SignRows
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
torch.manual_seed(0)
table, layer = nn.Embedding(6, 3, sparse=True), nn.Linear(3, 2)
optimizers = AdamAtan2([dict(params=layer.parameters())], lr=1e-2, betas=(0.9, 0.95)), SignRows([table.weight], lr=1e-2)
for ids in torch.tensor([[0, 3, 3, 5], [1, 0, 3, 1]]):
    loss = layer(table(ids.chunk(2)[rank])).square().mean()
    loss.backward()
    optimizers[0].average_gradients(2)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
torch.save([table.weight.data, layer.weight.data.clone()], f"{folder}/{rank}.pt")
dist.barrier()
os._exit(0)
"""


def toy(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3), nn.Linear(3, 3))  # the last is never used


def groups(model, decay=0.1):
    named = list(model.named_parameters())
    return [
        dict(params=[(name, p) for name, p in named if p.ndim == 2], weight_decay=decay),
        dict(params=[(name, p) for name, p in named if p.ndim != 2]),
    ]


def train(model, optimizer, steps, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        loss = model[:3](torch.randn(4, 5, generator=generator)).square().sum() * scale
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def reference(params, gradients, decays, lr, betas):
    """Apply the formula number by number in double precision; gradients: a list of lists."""
    values = [p.detach().double().clone() for p in params]
    ms, vs = [torch.zeros_like(x) for x in values], [torch.zeros_like(x) for x in values]
    for t, step in enumerate(gradients, 1):
        for x, m, v, g, decay in zip(values, ms, vs, step, decays, strict=True):
            m.copy_(betas[0] * m + (1 - betas[0]) * g.double())
            v.copy_(betas[1] * v + (1 - betas[1]) * g.double() ** 2)
            u = 1.27 * torch.atan2(m / (1 - betas[0] ** t), (v / (1 - betas[1] ** t)).sqrt())
            x.copy_((1 - lr * decay) * x - lr * u)
    return values


def test_equals_the_formula_in_pieces(monkeypatch):
    monkeypatch.setattr("models.optim.adam_atan2.PIECE", dict(cpu=100))
    torch.manual_seed(0)
    params = [nn.Parameter(0.1 * torch.randn(shape)) for shape in ((7, 9), (130,), (), (4, 4))]
    gradients = [[torch.randn(p.shape) * 10.0 ** (2 - t) for p in params] for t in range(5)]
    decays = [0.1, 0.1, 0.0, 0.0]
    wanted = reference(params, gradients, decays, **SETTINGS)
    both = [dict(params=params[:2], weight_decay=0.1), dict(params=params[2:])]
    optimizer = AdamAtan2(both, **SETTINGS)
    for step in gradients:
        for p, g in zip(params, step, strict=True):
            p.grad += g
        optimizer.step()
        optimizer.zero_grad()
    for p, w in zip(params, wanted, strict=True):
        torch.testing.assert_close(p.detach().double(), w, rtol=0, atol=1e-7)


def test_the_arctangent_that_is_compiled_equals_that_of_torch():
    g, v = torch.randn(2, 10_000, generator=torch.Generator().manual_seed(0)) * 1e-3
    m, v = g * 10.0 ** torch.arange(10_000).remainder(9).sub(6), v.square()
    g[:100] = m[:100] = v[50:150] = 0  # a gradient of 0, with and without moments
    ours, theirs = ([torch.zeros_like(m), g, m.clone(), v.clone()] for _ in range(2))
    advance(*theirs, 0.9, 0.95, 0.7, 1.0, 1.0)
    advance_compiled(*ours, 0.9, 0.95, *torch.tensor([0.7, 1.0, 1.0]))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-7)  # an ulp of pi / 2 is 1.2e-7


def test_scale_of_the_loss_changes_nothing():
    models = [toy() for _ in range(2)]
    for model, scale in zip(models, (1.0, 1000.0), strict=True):
        train(model, AdamAtan2(groups(model), **SETTINGS), 5, scale)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_parameters_are_views_and_unused_ones_only_decay():
    model = toy()
    before = copy.deepcopy(model)
    optimizer = AdamAtan2(groups(model), **SETTINGS)
    for a, b in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(a, b) and not a.grad.any()
    train(model, optimizer, 3)
    assert torch.equal(model[3].bias, before[3].bias) and not torch.equal(model[2].bias, before[2].bias)
    torch.testing.assert_close(model[3].weight, before[3].weight * 0.999**3)
    stored = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert stored == {flat.values.untyped_storage().data_ptr() for flat in optimizer.flat}
    model.load_state_dict(before.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
    assert optimizer.flat[0].values.abs().sum() > 0


def test_clip_is_that_of_torch():
    model, other = toy(), toy()
    optimizer = AdamAtan2(groups(model), **SETTINGS)
    for net in (model, other):
        net[:3](torch.ones(4, 5)).square().sum().backward()
    assert optimizer.clip_(math.inf).item() == pytest.approx(optimizer.clip_(0.5).item(), rel=1e-6)
    nn.utils.clip_grad_norm_(other.parameters(), 0.5)
    for a, b in zip(model[:3].parameters(), other[:3].parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    assert optimizer.clip_(1.0).item() == pytest.approx(0.5, rel=1e-5)


def test_a_gradient_scaler_unscales_and_skips():
    model, plain = toy(), toy()
    optimizer, other = (AdamAtan2(groups(net), **SETTINGS) for net in (model, plain))
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    train(plain, other, 1)
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    scaler.scale(model[:3](x).square().sum()).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    scaler.scale(model[:3](x * math.inf).square().sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert optimizer.steps == 1 and scaler.get_scale() == 128.0


def test_a_resumed_run_goes_on_bit_for_bit():
    model = toy()
    optimizer = AdamAtan2(groups(model), **SETTINGS)
    assert not optimizer.state_dict()["state"]
    train(model, optimizer, 3)
    header = dict(tokenizer_hash="", model_args={})
    saved = to_plain(header | dict(model_state=model.state_dict(), optimizer_state=optimizer.state_dict()))
    train(model, optimizer, 3, seed=1)
    again = toy(1)
    other = AdamAtan2(groups(again, decay=0.1), **SETTINGS)
    train(again, other, 2)
    load_parts(dict(model_state=again, optimizer_state=other), saved, "file", header)
    train(again, other, 3, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_loading_checks_names_and_shapes():
    model = toy()
    optimizer = AdamAtan2(groups(model), **SETTINGS)
    train(model, optimizer, 1)
    saved = optimizer.state_dict()
    renamed = AdamAtan2([dict(params=[("x" + n, p) for n, p in g["params"]]) for g in groups(toy())], **SETTINGS)
    with pytest.raises(ValueError, match="names"):
        renamed.load_state_dict(saved)
    wider = groups(nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3), nn.Linear(3, 3)))
    with pytest.raises(ValueError, match="shapes"):
        AdamAtan2(wider, **SETTINGS).load_state_dict(saved)
    header = dict(tokenizer_hash="", model_args={})
    wider = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3), nn.Linear(3, 3))
    other = AdamAtan2(groups(wider), **SETTINGS)
    saved["state"][0]["m"] = torch.zeros(3, 3)
    with pytest.raises(UsageError):
        state = header | dict(model_state=model.state_dict(), optimizer_state=saved)
        load_parts(dict(model_state=wider, optimizer_state=other), state, "file", header)


def test_rows_of_the_batch_take_the_sign_of_their_summed_gradients():
    torch.manual_seed(0)
    table, weight = nn.Embedding(6, 3, sparse=True), torch.randn(4, 3)
    before, ids = table.weight.detach().clone(), torch.tensor([4, 1, 4, 2])
    optimizer = SignRows([table.weight], lr=0.1, weight_decay=0.5)
    (table(ids) * weight).sum().backward()
    optimizer.step()
    wanted = before.clone()
    for row in (1, 2, 4):
        wanted[row] = before[row] * 0.95 - 0.1 * weight[ids == row].sum(0).sign()
    torch.testing.assert_close(table.weight.detach(), wanted)
    optimizer.zero_grad()
    optimizer.step()  # no gradient: nothing moves
    torch.testing.assert_close(table.weight.detach(), wanted)


@pytest.mark.parametrize("wrong", [math.inf, -math.inf, math.nan])
def test_rules_that_overflow_skip_the_step_of_all_weights(wrong):
    table, layer = nn.Embedding(6, 3, sparse=True), nn.Linear(3, 2)
    optimizer = AdamAtan2([dict(params=layer.parameters())], **SETTINGS)
    rules, scaler = SignRows([table.weight], lr=1e-2), torch.amp.GradScaler("cpu", init_scale=2.0)
    before = layer.weight.detach().clone()
    for factor, skipped in ((wrong, True), (1.0, False)):
        scaler.scale(layer(table(torch.tensor([1, 4]))).sum()).backward()
        table.weight.grad._values()[1, 2] *= factor
        optimizer.average_gradients(1, rules.gradients())
        scaler.unscale_(optimizer)
        assert math.isfinite(optimizer.clip_(1.0)) != skipped
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(layer.weight, before) == skipped and scaler.get_scale() == 1.0
        optimizer.zero_grad()
        rules.zero_grad()


@pytest.mark.slow
def test_two_ranks_equal_one(tmp_path):
    for run in [launch([sys.executable, "-c", RANKS, str(rank), str(tmp_path)]) for rank in range(2)]:
        finish(run)
    torch.manual_seed(0)
    table, layer = nn.Embedding(6, 3, sparse=True), nn.Linear(3, 2)
    optimizers = AdamAtan2([dict(params=layer.parameters())], **SETTINGS), SignRows([table.weight], lr=1e-2)
    for ids in torch.tensor([[0, 3, 3, 5], [1, 0, 3, 1]]):
        layer(table(ids)).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for rank in range(2):
        weights = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for ours, wanted in zip(weights, (table.weight.data, layer.weight.data), strict=True):
            torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-6)


def test_nothing_that_only_compiling_needs_is_imported():
    code = """
import sys, torch
from models.optim.adam_atan2 import AdamAtan2, SignRows
p, table = torch.nn.Linear(2, 2).weight, torch.nn.Embedding(2, 2, sparse=True).weight
for optimizer in (AdamAtan2([p], lr=1e-2, betas=(0.9, 0.95)), SignRows([table], lr=1e-2)):
    p.square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    optimizer.load_state_dict(optimizer.state_dict())
assert "torch._dynamo" not in sys.modules
"""
    finish(launch([sys.executable, "-c", code], cwd=ROOT))
