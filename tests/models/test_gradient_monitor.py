"""Reports on gradients against plain loops."""

import pytest
import torch
import torch.nn as nn

from models.optim.adam_atan2 import AdamAtan2
from models.optim.gradient_monitor import Monitor, warnings


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(6, 4, sparse=True)
        self.body = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False))
        self.scale = nn.Parameter(torch.ones(4))
        self.unused = nn.Linear(4, 2)
        self.frozen = nn.Linear(4, 2).requires_grad_(False)

    def forward(self, ids, scale):
        return (self.body(self.table(ids)) * (self.scale if scale else 1)).square().sum()


def build():
    torch.manual_seed(0)
    model = Toy()
    dense = [p for name, p in model.named_parameters() if p.requires_grad and not name.startswith("table")]
    return model, AdamAtan2([dict(params=dense)], lr=1e-2, betas=(0.9, 0.95))


def test_parameters_that_never_had_a_gradient_are_named():
    model, optimizer = build()
    monitor = Monitor(model)
    assert len(monitor.never_trained()) == 7
    for scale, count in ((False, 3), (True, 2), (False, 2)):
        optimizer.zero_grad()
        model(torch.tensor([1, 2]), scale).backward()
        monitor.note()
        assert len(monitor.never_trained()) == count
    assert monitor.never_trained() == ["unused.weight", "unused.bias"]


def test_a_report_is_that_of_a_loop():
    model, optimizer = build()
    monitor = Monitor(model)
    model(torch.tensor([1, 2, 2]), True).backward()
    model.body[1].weight.grad[:3] = 1e-9
    monitor.begin()
    gradients = [p.grad.clone() for p in model.body.parameters()]
    weights = [p.detach().clone() for p in model.body.parameters()]
    optimizer.clip_(0.1)
    optimizer.step()
    report = monitor.end()
    assert set(report) == {"table", "body", "scale"}

    def norm(tensors):
        return torch.cat([t.flatten() for t in tensors]).double().norm().item()

    updates = [p.detach() - w for p, w in zip(model.body.parameters(), weights, strict=True)]
    assert report["body"]["norm"] == pytest.approx(norm(gradients), rel=1e-5)
    assert report["body"]["ratio"] == pytest.approx(norm(updates) / norm(weights), rel=1e-4)
    assert report["body"]["dead"] == pytest.approx(12 / 36)
    assert report["table"]["ratio"] == 0  # nothing stepped it
    assert report["table"]["norm"] == pytest.approx(model.table.weight.grad.to_dense().norm().item(), rel=1e-5)


def test_warnings_name_the_group():
    good = dict(norm=1.0, ratio=1e-3, dead=0.1)
    report = dict(a=good, b=good | dict(norm=1e-6), c=good | dict(norm=200.0), d=good | dict(dead=0.6))
    assert [line.split(":")[0] for line in warnings(report)] == ["b", "c", "d"]
