"""Paths: their starts, and which one answers."""

import pytest
import torch

from models.planning import pick, put, select, share_winner, starts

T, B, K, L = 5, 40, 4, 2


def traces(seed):
    """Random answers of two symbols each, so that some agree, and logits, of which some are equal."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(2, (T, B, K, L), generator=g), torch.randint(-6, 3, (T, B, K), generator=g) / 2


def plain(answers, halt, rule, step, b):
    """Choose the path that answers one sample after a step."""
    logits = halt[step, b].tolist()
    best = logits.index(max(logits))
    if rule == "first_to_halt":
        since = [min([t for t in range(step + 1) if halt[t, b, k] > 0], default=T) for k in range(K)]
        return since.index(min(since)) if min(since) < T else best
    if rule == "vote":
        given = [tuple(row) for row in answers[step, b].tolist()]
        trust = [1 / (1 + 2.718281828459045**-x) for x in logits]
        votes = [(given.count(a), sum(t for t, other in zip(trust, given, strict=True) if other == a)) for a in given]
        return max(range(K), key=lambda k: (votes[k][0], round(votes[k][1], 5), -k))
    return best


@pytest.mark.parametrize("rule", ["score", "first_to_halt", "vote"])
def test_selection_equals_a_loop(rule):
    answers, halt = traces(0)
    path = select(answers, halt, rule)
    assert path.shape == (T, B)
    for step in range(T):
        for b in range(B):
            wanted = plain(answers, halt, rule, step, b)
            if rule == "vote":  # any path with the same answer is right
                assert torch.equal(answers[step, b, path[step, b]], answers[step, b, wanted]), (step, b)
            else:
                assert path[step, b] == wanted, (step, b)


@pytest.mark.parametrize("rule", ["score", "first_to_halt", "vote"])
def test_one_path_is_always_chosen(rule):
    answers, halt = traces(1)
    assert not select(answers[:, :, :1], halt[:, :, :1], rule).any()


def test_starts():
    torch.manual_seed(0)
    first = torch.randn(16)
    for paths in (1, 2, 16):
        rows = starts(first, paths)
        assert rows.shape == (paths, 16) and torch.equal(rows[0], first)
        torch.testing.assert_close(rows[1:].square().mean(1).sqrt(), torch.ones(paths - 1))
        crossed = rows @ rows.T
        crossed.fill_diagonal_(0)
        torch.testing.assert_close(crossed, torch.zeros(paths, paths), rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="17 paths in 16 dimensions"):
        starts(first, 17)


def test_picking_putting_sharing():
    values, path = torch.randn(3, K, 2, 5), torch.tensor([2, 0, 3])
    picked = pick(values, path)
    assert all(torch.equal(picked[b], values[b, k]) for b, k in enumerate(path.tolist()))
    new = torch.randn(3, 2, 5)
    other = put(values, path, new)
    for b in range(3):
        for k in range(K):
            assert torch.equal(other[b, k], new[b] if k == path[b] else values[b, k])
    shared = share_winner(values, path, torch.tensor([True, False, True]))
    for b in range(3):
        for k in range(K):
            assert torch.equal(shared[b, k], values[b, k] if b == 1 else picked[b])
