"""Samples that come and go, each slot on its own."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_multimodal import AGENT, KNOWN, PLAIN, batch, build, one_thread  # noqa: F401

from data_utils.pages import rolling_batch as slots_module
from data_utils.pages.rolling_batch import Slots, batch_of, load_slots, start_codes
from data_utils.pages.shards import Stopped
from models import halting
from models.halting import CONTINUE, HALT, HaltingAgent

DEVICE, ROWS, LIMIT = torch.device("cpu"), 10, 4
AUTOCAST = torch.autocast("cpu", enabled=False)


class Stream:
    """Samples whose page says their number; `asked` are the numbers that were asked for."""

    def __init__(self, name, stop_at=10**9):
        self.name, self.stop_at, self.asked = name, stop_at, []

    def rows(self, name):
        return ROWS

    def at(self, name, positions):
        assert name == self.name
        return (np.asarray(positions) * 7 + 3) % ROWS

    def samples(self, name, indices):
        if len(self.asked) >= self.stop_at:
            raise Stopped
        self.asked += np.asarray(indices).tolist()
        task, number = KNOWN[name], torch.as_tensor(indices)
        page = number.to(torch.uint8)[:, None, None].expand(-1, task.rows, task.cols).contiguous()
        target = number.to(torch.uint8)[:, None].expand(-1, task.length).contiguous()
        return dict(page=page, target=target, id=torch.zeros(len(number), dtype=torch.long))


def slots(stream, own=slice(None), limit=LIMIT, **changes):
    how = dict(global_batch_size=4, seed=1, augment=False, halt_exploration=0.0) | changes
    return Slots(stream, stream.name, KNOWN[stream.name], own, SimpleNamespace(**how), limit)


def leave(some, halted):
    """As if these samples had ended."""
    some.carry = dict(halted=torch.tensor(halted), steps=torch.ones(len(halted)))


def shown(some):
    return some.take(DEVICE)["page"][:, 0, 0].tolist()


def test_a_slot_takes_its_own_positions():
    stream, draw = Stream("sudoku4"), np.random.default_rng(0)
    some, drawn = slots(stream, slice(1, 3)), np.zeros(2, int)
    expected = None
    for _ in range(12):
        halted = draw.random(2) < 0.5 if expected else np.ones(2, bool)
        leave(some, halted.tolist()) if expected else None
        expected = expected or [0, 0]
        for row in range(2):
            if halted[row]:
                expected[row] = stream.at("sudoku4", [1 + row + drawn[row] * 4])[0]
                drawn[row] += 1
        before = len(stream.asked)
        assert shown(some) == expected and len(stream.asked) - before == halted.sum()
        assert torch.equal(some.batch["target"][:, 0].long(), torch.tensor(expected))


def test_ranks_take_what_one_process_would():
    whole, parts = slots(Stream("read")), [slots(Stream("read"), slice(f, f + 2)) for f in (0, 2)]
    for halted in ([True] * 4, [True, False, False, True], [False, True, True, True]):
        for some, own in ((whole, slice(0, 4)), (parts[0], slice(0, 2)), (parts[1], slice(2, 4))):
            leave(some, halted[own])
        together = [part.take(DEVICE) for part in parts]
        for key, values in whole.take(DEVICE).items():
            if key != "task":
                assert torch.equal(values, torch.cat([part[key] for part in together])), key


@pytest.mark.parametrize("augment", [False, True])
def test_a_resumed_slot_goes_on(augment):
    first = slots(Stream("read"), augment=augment, halt_exploration=0.5)
    halted = ([True] * 4, [True, False, False, True], [False, True, True, False], [False] * 4)
    for state in halted[:3]:
        leave(first, state)
        first.take(DEVICE)
    leave(first, halted[3])
    again = slots(Stream("read"), augment=augment, halt_exploration=0.5)
    again.load_state_dict(first.state_dict(), DEVICE)
    for state in (halted[3], halted[1], halted[0]):
        leave(first, state)
        leave(again, state)
        here, there = first.take(DEVICE), again.take(DEVICE)
        assert all(torch.equal(here[key], there[key]) for key in here if key != "task")
        assert np.array_equal(first.draws, again.draws)


def model_like(paths=1, length=2, width=3):
    return SimpleNamespace(starts=torch.zeros(paths, width), tasks=KNOWN, length_of=lambda task: length)


def states_of(ranks, taken=3):
    """What ranks of 4 slots save after some samples, each slot with its number in its states."""
    saved = []
    for rank in range(ranks):
        n = 4 // ranks
        some = slots(Stream("read"), slice(rank * n, (rank + 1) * n))
        for _ in range(taken):
            leave(some, [True] * n) if some.batch else None
            some.take(DEVICE)
        z = torch.arange(rank * n, (rank + 1) * n)[:, None, None, None].expand(n, 1, 2, 3).float()
        halted = torch.arange(rank * n, (rank + 1) * n) % 2 == 0
        some.carry = dict(z_H=z, z_L=z, halted=halted, steps=torch.ones(n))
        saved.append(dict(read=some.state_dict()))
    return saved


@pytest.mark.parametrize("old, new", [(1, 2), (2, 1), (4, 2), (2, 2)])
def test_slots_go_over_to_any_number_of_ranks(old, new):
    saved, n = states_of(old), 4 // new
    for rank in range(new):
        own = slice(rank * n, (rank + 1) * n)
        some = slots(Stream("read"), own)
        assert not load_slots(dict(read=some), saved, model_like(), DEVICE, True)
        assert some.draws.tolist() == [3] * n and some.carry["z_H"][:, 0, 0, 0].tolist() == list(range(4))[own]
        taken, before = some.take(DEVICE), Stream("read").at("read", np.arange(4)[own] + 8)
        after = Stream("read").at("read", np.arange(4)[own] + 12)
        expected = np.where(np.arange(4)[own] % 2 == 0, after, before)
        assert taken["page"][:, 0, 0].tolist() == expected.tolist()


@pytest.mark.parametrize("changed, shape, same_data, draws", [
    (dict(global_batch_size=2), {}, True, 6),
    (dict(global_batch_size=5), {}, True, 3),
    ({}, dict(paths=2), True, 3),
    ({}, dict(length=4), True, 3),
    ({}, {}, False, 0),
])  # fmt: skip
def test_slots_of_another_kind_begin_behind_what_was_drawn(changed, shape, same_data, draws):
    some = slots(Stream("read"), **changed)
    assert load_slots(dict(read=some), states_of(2), model_like(**shape), DEVICE, same_data) == ["read"]
    assert some.carry is None and set(some.draws.tolist()) == {draws}


def test_stopped_while_it_waits_it_is_as_before():
    some = slots(Stream("read", stop_at=4))
    some.take(DEVICE)
    leave(some, [True, False, True, False])
    before, draws = some.batch["page"].clone(), some.draws.copy()
    assert some.take(DEVICE) is None
    assert torch.equal(some.batch["page"], before) and np.array_equal(some.draws, draws)
    some.data.stop_at = 100
    other = slots(Stream("read"))
    other.take(DEVICE)
    leave(other, [True, False, True, False])
    assert shown(some) == shown(other)


def test_samples_of_other_tasks_are_others():
    index = np.arange(5)
    named = {name: batch_of(dict(page=torch.zeros(5, 2, 3)), name, KNOWN[name], False, 0, index)["index"]
             for name in KNOWN}  # fmt: skip
    assert len(set(torch.cat(list(named.values())).tolist())) == 5 * len(KNOWN)
    assert not {-1} & set(torch.cat(list(named.values())).tolist())


def test_the_same_sample_looks_the_same_and_others_do_not():
    pages = torch.full((3, 2, 3), 30, dtype=torch.uint8)
    one, two = (batch_of(dict(page=pages), "read", KNOWN["read"], True, 1, np.array(i)) for i in ([4, 5, 4], [5, 4, 6]))
    assert torch.equal(one["patches"][0], one["patches"][2]) and torch.equal(one["patches"][1], two["patches"][0])
    assert not torch.equal(one["patches"][0], one["patches"][1])
    assert "patches" not in batch_of(dict(page=pages), "arc", KNOWN["arc"], True, 1, np.arange(3))
    other = batch_of(dict(page=pages), "read", KNOWN["read"], True, 2, np.array([4, 5, 4]))
    assert not torch.equal(one["patches"], other["patches"])


def test_exploration():
    shares = []
    for share in (0.0, 0.5, 1.0):
        some = slots(Stream("read"), global_batch_size=400, halt_exploration=share)
        shortest = some.take(DEVICE)["shortest"].clone()
        shares.append((shortest > 1).float().mean().item())
        assert set(shortest.tolist()) <= {1, *range(2, LIMIT + 1)}
        leave(some, [True] * 400)
        assert torch.equal(some.take(DEVICE)["shortest"], shortest) == (share == 0)
    assert shares == [0.0, pytest.approx(0.5, abs=0.1), 1.0]
    assert slots(Stream("read"), halt_exploration=1.0, limit=1).take(DEVICE)["shortest"].tolist() == [1] * 4


# ---- after a step ----------------------------------------------------------------------------------------------------


def settle(some, model=None, agent=None, *, q=(1.0, -1.0, 1.0, 1.0), steps=(1, 1, 1, 4), right=(1, 0, 0, 1), **changes):
    """One step with these results; steps at the limit are over."""
    steps = torch.tensor(steps)
    right, seen = torch.tensor(right).bool(), torch.zeros(4)
    carry = dict(steps=steps, halted=steps >= LIMIT)
    mean = torch.arange(4.0)[:, None].expand(4, 16)
    aux = dict(right=right, accuracy=right.float(), confidence=seen, changed=seen, x_mean=mean, z_mean=mean)
    how = dict(step=0, draws=torch.ones(4, 2), policy="q_halt", min_accuracy=0.9, bad=False) | changes
    some.settle(model or SimpleNamespace(agent=agent and agent.net), agent, carry,
                dict(aux=aux, q_halt=torch.tensor(q)), **how)  # fmt: skip
    return some.carry["halted"].tolist()


def taken(**changes):
    some = slots(Stream("read"), **changes)
    some.take(DEVICE)
    return some


def test_who_halts():
    some = taken()
    assert settle(some) == [True, False, True, True]
    assert settle(some, policy="fixed") == [False, False, False, True]
    some.batch["shortest"] = torch.tensor([2, 1, 1, 1])  # may not before
    assert settle(some) == [False, False, True, True]
    assert settle(some, steps=(2, 1, 1, 4)) == [True, False, True, True]
    assert settle(some, bad=True) == [True] * 4


@pytest.fixture
def agent(monkeypatch):
    monkeypatch.setattr(halting, "LEARN_FROM", 1)
    torch.manual_seed(0)
    return HaltingAgent(halting.QNet(d_model=16), **AGENT | dict(warmstart=5))


def test_the_agent_decides_and_learns_of_each_step_once(agent):
    some = taken()
    assert settle(some, agent=agent, policy="dqn") == [True, False, False, True]  # the right ones, and the last
    assert len(agent.ring) == 0  # nothing is known about what came next
    settle(some, agent=agent, policy="dqn", right=(0, 1, 0, 0), steps=(1, 2, 2, 1))
    assert len(agent.ring) == 4
    rows = agent.ring.rows[:4].float()
    reward, gain, action, last = rows[:, -4:].T
    assert reward.tolist() == [1.0, -0.5, -0.5, 1.0] and action.tolist() == [HALT, CONTINUE, CONTINUE, HALT]
    torch.testing.assert_close(gain[1:3], torch.tensor([0.99, -0.01]), rtol=0, atol=1e-3)
    assert last.tolist() == [0, 0, 0, 0]
    settle(some, agent=agent, policy="dqn", bad=True)
    assert len(agent.ring) == 4 and some.before is None  # of a step that is not finite nothing is learnt
    settle(some, agent=agent, policy="dqn")
    assert len(agent.ring) == 4
    with torch.no_grad():
        agent.net.layers[-1].bias.copy_(torch.tensor([-9.0, 9.0]))
    assert settle(some, agent=agent, policy="dqn", step=5) == [False, False, False, True]
    assert settle(some, agent=agent, policy="dqn", step=5, draws=torch.zeros(4, 2)) == [True] * 4  # random
    before = agent.target.layers[0].weight.clone()
    with torch.no_grad():
        agent.net.layers[0].weight.add_(1)
    settle(some, agent=agent)
    torch.testing.assert_close(agent.target.layers[0].weight, before + 0.1 * (agent.net.layers[0].weight - before))


def test_only_solved_samples_that_leave_are_remembered():
    model = build(["read"], **PLAIN | dict(enable_memory=True))
    some = taken()
    kept = [int(some.batch["index"][row]) for row in (0, 3)]  # 1 is wrong, 2 leaves unsolved
    settle(some, model, min_accuracy=1.0)
    assert model.memory.samples[:2].tolist() == kept and int(model.memory.fill) == 2
    assert model.memory.values[:2, 0].tolist() == [0.0, 3.0]
    settle(some, model, bad=True)
    assert int(model.memory.fill) == 2
    model.eval()
    settle(some, model)
    assert int(model.memory.fill) == 2


def test_codes_begin_with_the_first_pages(monkeypatch):
    monkeypatch.setattr(slots_module, "VECTORS", 0.25)
    made, stream = [], Stream("read")
    for _ in range(2):
        model = build(["read"], enable_mtp=False)
        start_codes(model, stream, dict(read=SimpleNamespace(task=KNOWN["read"])), 0, DEVICE, AUTOCAST)
        made.append([buffer.clone() for buffer in model.quantizer.codebook.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))
    pages = math.ceil(0.25 * len(model.quantizer.codebook.codes) / (model.num_capsules * model.quantizer.shape[0]))
    assert 1 < pages < ROWS and stream.asked == stream.at("read", np.arange(pages)).tolist() * 2
    here = batch(model, "read")
    assert model(model.initial_carry(here), here)[1]["aux"]["vq_loss"].isfinite()
