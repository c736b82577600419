"""Q-learning of when to stop: columns, ring, target, a game with a known best policy."""

import pytest
import torch

from data_utils.checkpoint import to_plain
from models import halting
from models.halting import CONTINUE, FEATURES, HALT, HaltingAgent, QNet, Ring

SETTINGS = dict(capacity=100, gamma=0.9, tau=0.1, epsilon=0.3, warmstart=10, step_cost=0.01)


def build(**changes):
    torch.manual_seed(0)
    return HaltingAgent(QNet(d_model=40), **SETTINGS | changes)


def slots(count, seed, **fixed):
    g = torch.Generator().manual_seed(seed)
    step = dict(features=torch.randn(count, FEATURES, generator=g), accuracy=torch.rand(count, generator=g))
    for name in ("right", "last"):
        step[name] = torch.rand(count, generator=g) < 0.4
    return step | dict(action=torch.randint(2, (count,), generator=g)) | fixed


def test_features():
    net, parts = build().net, torch.randn(4, 3).unbind()
    z = torch.randn(3, 40)
    features = net.features(z, *parts)
    assert features.shape == (3, FEATURES)
    torch.testing.assert_close(features[:, 32:], torch.stack(parts, 1))
    torch.testing.assert_close(net.projection.T @ net.projection, torch.eye(32), rtol=0, atol=1e-5)
    narrow = QNet(d_model=8).projection
    torch.testing.assert_close(narrow @ narrow.T, torch.eye(8), rtol=0, atol=1e-5)


def test_the_oracle_acts_first_then_the_better_column():
    agent, now = build(epsilon=0.0), slots(64, 1)
    draws = torch.rand(64, 2)
    never, right = torch.zeros(64, dtype=torch.bool), now["right"]
    assert ((agent.act(now["features"], right, never, 9, draws) == HALT) == right).all()
    with torch.no_grad():  # halting is always worth more
        agent.net.layers[2].weight.zero_()
        agent.net.layers[2].bias.copy_(torch.tensor([1.0, 0.0]))
    assert (agent.act(now["features"], right, never, 10, draws) == HALT).all()
    with torch.no_grad():
        agent.net.layers[2].bias.neg_()
    action = agent.act(now["features"], right, now["last"], 10, draws)
    assert ((action == HALT) == now["last"]).all()
    agent.epsilon = 1.0
    random = agent.act(now["features"], right, never, 10, draws)
    assert ((random == HALT) == (draws[:, 1] < 0.5)).all()


def test_epsilon_falls_once_a_step():
    agent = build()
    assert agent.epsilon_at(0) == 0.3 and agent.epsilon_at(100_000) == pytest.approx(0.175)
    assert agent.epsilon_at(200_000) == agent.epsilon_at(10**6) == pytest.approx(0.05)


def test_what_is_stored_is_what_was_done():
    agent, before, now = build(), slots(8, 1), slots(8, 2)
    agent.store(before, now)
    assert len(agent.ring) == 8
    here, after, rest = agent.ring.rows[:8].float().split([FEATURES, FEATURES, 4], 1)
    torch.testing.assert_close(here, before["features"].half().float())
    torch.testing.assert_close(after, now["features"].half().float())
    assert torch.equal(rest[:, 2].long(), before["action"]) and torch.equal(rest[:, 3].bool(), now["last"])
    assert rest[:, 0].tolist() == [1.0 if r else -0.5 for r in before["right"]]
    gain = now["accuracy"] - before["accuracy"] - 0.01
    torch.testing.assert_close(rest[:, 1], gain, rtol=0, atol=1e-3)


def test_the_loss_is_that_of_a_loop(monkeypatch):
    monkeypatch.setattr(halting, "LEARN_FROM", 32)
    agent = build()
    agent.store(slots(31, 1), slots(31, 2))
    assert agent.loss(16, torch.Generator()) is None
    agent.store(slots(20, 3), slots(20, 4))
    with torch.no_grad():
        for p in agent.target.parameters():
            p.add_(0.1 * torch.randn_like(p))
    loss = agent.loss(16, torch.Generator().manual_seed(5))
    total = 0.0
    for row in agent.ring.sample(16, torch.Generator().manual_seed(5)):
        here, after, (reward, gain, action, last) = row[:FEATURES], row[FEATURES:-4], row[-4:]
        total += torch.nn.functional.huber_loss(agent.net(here)[HALT], reward)
        if action == CONTINUE:
            best = HALT if last else int(agent.net(after).argmax())
            total += torch.nn.functional.huber_loss(agent.net(here)[CONTINUE], gain + 0.9 * agent.target(after)[best])
    torch.testing.assert_close(loss, total / 16)
    loss.backward()
    assert all(p.grad.norm() > 0 for p in agent.net.parameters())
    assert all(p.grad is None for p in agent.target.parameters())


def test_the_target_lags():
    agent = build()
    old = [p.clone() for p in agent.target.parameters()]
    with torch.no_grad():
        for p in agent.net.parameters():
            p.add_(1)
    assert all(torch.equal(a, b) for a, b in zip(old, agent.target.parameters(), strict=True))
    agent.follow()
    for a, b in zip(old, agent.target.parameters(), strict=True):
        torch.testing.assert_close(b, a + 0.1)


def test_the_ring_wraps_and_grows_by_blocks(monkeypatch):
    monkeypatch.setattr(halting, "BLOCK", 8)
    ring, held = Ring(21, 3, "cpu"), []
    for count in (3, 6, 9, 5, 30, 1):
        held += list(range(len(held), len(held) + count))
        ring.add(torch.tensor(held[-count:])[:, None].expand(count, 3))
        assert sorted(ring.rows[: len(ring), 0].tolist()) == held[-21:]
        assert len(ring.rows) == min(-(-len(ring) // 8) * 8, 21)
    drawn = ring.sample(500, torch.Generator().manual_seed(0))
    assert set(drawn[:, 0].tolist()) == set(held[-21:])


def test_half_a_million_transitions_take_80_mb():
    assert Ring(500_000, 2 * FEATURES + 4, "cpu").rows.shape[1] * 2 * 500_000 <= 80e6


def test_state_goes_on_bit_for_bit(monkeypatch):
    monkeypatch.setattr(halting, "LEARN_FROM", 10)
    agent, other = build(capacity=50), build(capacity=50)
    for seed in range(4):
        agent.store(slots(20, seed), slots(20, seed + 10))
    agent.follow()
    saved = to_plain(agent.state_dict())
    other.load_state_dict(saved)
    for each in (agent, other):
        each.store(slots(20, 7), slots(20, 8))
    losses = [each.loss(32, torch.Generator().manual_seed(0)) for each in (agent, other)]
    assert torch.equal(*losses) and torch.equal(agent.ring.rows, other.ring.rows)
    narrow = dict(rows=saved["ring"]["rows"][:, 1:], added=saved["ring"]["added"])
    with pytest.raises(ValueError, match="ring"):
        build(capacity=50).load_state_dict(saved | dict(ring=narrow))


@pytest.mark.parametrize("added", [3, 7, 12])
@pytest.mark.parametrize("capacity", [2, 5, 7, 20])
def test_a_ring_of_another_capacity_takes_over_the_newest_rows(capacity, added):
    old, new, rows = Ring(7, 2, "cpu"), Ring(capacity, 2, "cpu"), torch.arange(16.0)[:, None].expand(16, 2)
    for row in rows[:added]:
        old.add(row[None])
    new.load_state_dict(old.state_dict())
    for newest in range(added, 16):
        count = min(capacity, newest - max(0, added - 7))
        assert sorted(new.rows[: len(new), 0].tolist()) == list(range(newest - count, newest))
        new.add(rows[newest][None])


def test_it_learns_when_to_stop(monkeypatch):
    """The features tell at which step an answer becomes right: the learned policy continues until then and stops."""
    monkeypatch.setattr(halting, "LEARN_FROM", 100)
    agent, g, T = build(capacity=5000, gamma=0.99, tau=0.05), torch.Generator().manual_seed(0), 6
    optimizer = torch.optim.Adam(agent.net.parameters(), lr=3e-3)
    due = torch.randint(1, T + 3, (400,), generator=g)  # some later than T

    def at(t, action):
        right = due <= t
        signals = torch.stack([right, due > T], 1).float()
        features = torch.cat([signals, torch.full((400, 1), t / T), torch.zeros(400, FEATURES - 3)], 1)
        last = torch.full((400,), t == T)
        return dict(features=features, accuracy=right.float(), right=right, last=last, action=action)

    for t in range(1, T):
        agent.store(at(t, torch.full((400,), CONTINUE)), at(t + 1, torch.full((400,), HALT)))
    for _ in range(300):
        optimizer.zero_grad()
        agent.loss(256, g).backward()
        optimizer.step()
        agent.follow()
    with torch.no_grad():
        values = torch.stack([agent.net(at(t, None)["features"]) for t in range(1, T + 1)], 1)
    right = torch.stack([due <= t for t in range(1, T + 1)], 1)
    learned, oracle = (
        (halt[:, :-1].cumsum(1) == 0).sum(1) for halt in (values[..., HALT] > values[..., CONTINUE], right)
    )
    assert torch.equal(right.gather(1, learned[:, None]), right.gather(1, oracle[:, None]))
    assert learned.sum() < oracle.sum()  # it stops at once where no step is right
