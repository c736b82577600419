"""Muon against plain references."""

import copy

import torch

from models.optim.muon import Muon, orthogonalize


def stepped(optimizer, params, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()


def test_singular_values_become_about_one_and_directions_stay():
    torch.manual_seed(0)
    for shape in ((3, 8, 8), (2, 8, 32), (2, 32, 8)):
        x = torch.randn(shape)
        orthogonal = orthogonalize(x).float()
        values = torch.linalg.svdvals(orthogonal)
        assert values.min() > 0.5 and values.max() < 1.3
        left, _, right = torch.linalg.svd(x, full_matrices=False)
        nearest = left @ right
        cosine = (orthogonal * nearest).sum((1, 2)) / orthogonal.norm(dim=(1, 2)) / nearest.norm(dim=(1, 2))
        assert cosine.min() > 0.95


def test_groups_without_times_are_adamw():
    torch.manual_seed(0)
    ours = [torch.randn(4, 3), torch.randn(5)]
    theirs = copy.deepcopy(ours)
    settings = dict(lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    stepped(Muon(ours, **settings), ours, 7)
    stepped(torch.optim.AdamW(theirs, **settings), theirs, 7)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_matrices_of_a_shape_are_stepped_as_if_alone_and_state_goes_on():
    torch.manual_seed(0)
    settings = dict(lr=1e-3, betas=(0.9, 0.95), times=8.0)
    together = [torch.randn(16, 8), torch.randn(16, 8)]
    alone, moved = copy.deepcopy(together[:1]), copy.deepcopy(together)
    optimizer = Muon(together, **settings)
    stepped(optimizer, together, 1)
    stepped(Muon(alone, **settings), alone, 1)
    torch.testing.assert_close(together[0], alone[0], rtol=0, atol=1e-4)
    assert (together[0] - moved[0]).norm() > 0.9 * 8e-3 * 2**0.5 * 8**0.5 * 0.7  # eight singular values of about one
    again = Muon(moved := copy.deepcopy(together), **settings)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    stepped(optimizer, together, 3, seed=1)
    stepped(again, moved, 3, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(together, moved, strict=True))
