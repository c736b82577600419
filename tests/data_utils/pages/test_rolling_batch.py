"""Rolling batches: samples come and go, each slot by itself."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data_utils.pages import rolling_batch as module
from data_utils.pages.rolling_batch import RollingBatch, batch_of, load_rolling_batches, start_codebook
from data_utils.pages.shards import Stopped
from models import halting
from models.halting import CONTINUE, HALT, HaltingAgent
from tests.models.test_multimodal import AGENT, KNOWN, PLAIN, batch, build, one_thread  # noqa: F401

DEVICE, ROWS, LIMIT = torch.device("cpu"), 10, 4
AUTOCAST = torch.autocast("cpu", enabled=False)


class Stream:
    """Samples whose page shows their number; `requested` lists the requested numbers."""

    def __init__(self, name, stop_at=10**9):
        self.name, self.stop_at, self.requested = name, stop_at, []

    def rows(self, name):
        return ROWS

    def at(self, name, positions):
        assert name == self.name
        return (np.asarray(positions) * 7 + 3) % ROWS

    def samples(self, name, indices):
        if len(self.requested) >= self.stop_at:
            raise Stopped
        self.requested += np.asarray(indices).tolist()
        task, number = KNOWN[name], torch.as_tensor(indices)
        page = number.to(torch.uint8)[:, None, None].expand(-1, task.rows, task.cols).contiguous()
        target = number.to(torch.uint8)[:, None].expand(-1, task.length).contiguous()
        return dict(page=page, target=target, id=torch.zeros(len(number), dtype=torch.long))


def open_batch(stream, slots=slice(None), limit=LIMIT, **changes):
    settings = dict(global_batch_size=4, seed=1, augment=False, halt_exploration=0.0) | changes
    return RollingBatch(stream, stream.name, KNOWN[stream.name], slots, SimpleNamespace(**settings), limit)


def leave(rolling, halted):
    """Mark samples as halted."""
    rolling.carry = dict(halted=torch.tensor(halted), steps=torch.ones(len(halted)))


def shown(rolling):
    return rolling.take(DEVICE)["page"][:, 0, 0].tolist()


def test_a_slot_takes_its_own_positions():
    stream, draw = Stream("sudoku4"), np.random.default_rng(0)
    rolling, drawn = open_batch(stream, slice(1, 3)), np.zeros(2, int)
    expected = None
    for _ in range(12):
        halted = draw.random(2) < 0.5 if expected else np.ones(2, bool)
        leave(rolling, halted.tolist()) if expected else None
        expected = expected or [0, 0]
        for row in range(2):
            if halted[row]:
                expected[row] = stream.at("sudoku4", [1 + row + drawn[row] * 4])[0]
                drawn[row] += 1
        before = len(stream.requested)
        assert shown(rolling) == expected and len(stream.requested) - before == halted.sum()
        assert torch.equal(rolling.batch["target"][:, 0].long(), torch.tensor(expected))


def test_ranks_take_what_one_process_would():
    full, parts = open_batch(Stream("read")), [open_batch(Stream("read"), slice(f, f + 2)) for f in (0, 2)]
    for halted in ([True] * 4, [True, False, False, True], [False, True, True, True]):
        for rolling, rows in ((full, slice(0, 4)), (parts[0], slice(0, 2)), (parts[1], slice(2, 4))):
            leave(rolling, halted[rows])
        together = [part.take(DEVICE) for part in parts]
        for key, values in full.take(DEVICE).items():
            if key != "task":
                assert torch.equal(values, torch.cat([part[key] for part in together])), key


@pytest.mark.parametrize("augment", [False, True])
def test_a_resumed_slot_goes_on(augment):
    first = open_batch(Stream("read"), augment=augment, halt_exploration=0.5)
    halted = ([True] * 4, [True, False, False, True], [False, True, True, False], [False] * 4)
    for state in halted[:3]:
        leave(first, state)
        first.take(DEVICE)
    leave(first, halted[3])
    again = open_batch(Stream("read"), augment=augment, halt_exploration=0.5)
    again.load_state_dict(first.state_dict(), DEVICE)
    for state in (halted[3], halted[1], halted[0]):
        leave(first, state)
        leave(again, state)
        first_batch, again_batch = first.take(DEVICE), again.take(DEVICE)
        assert all(torch.equal(first_batch[key], again_batch[key]) for key in first_batch if key != "task")
        assert np.array_equal(first.draws, again.draws)


def model_like(paths=1, length=2, width=3):
    return SimpleNamespace(starts=torch.zeros(paths, width), tasks=KNOWN, length_of=lambda task: length)


def states_of(ranks, taken=3):
    """Return what each rank saves of 4 slots after some samples; the states of a slot hold its number."""
    saved = []
    for rank in range(ranks):
        n = 4 // ranks
        rolling = open_batch(Stream("read"), slice(rank * n, (rank + 1) * n))
        for _ in range(taken):
            leave(rolling, [True] * n) if rolling.batch else None
            rolling.take(DEVICE)
        z = torch.arange(rank * n, (rank + 1) * n)[:, None, None, None].expand(n, 1, 2, 3).float()
        halted = torch.arange(rank * n, (rank + 1) * n) % 2 == 0
        rolling.carry = dict(z_H=z, z_L=z, halted=halted, steps=torch.ones(n))
        saved.append(dict(read=rolling.state_dict()))
    return saved


@pytest.mark.parametrize("old, new", [(1, 2), (2, 1), (4, 2), (2, 2)])
def test_slots_go_over_to_any_number_of_ranks(old, new):
    saved, n = states_of(old), 4 // new
    for rank in range(new):
        slots = slice(rank * n, (rank + 1) * n)
        rolling = open_batch(Stream("read"), slots)
        assert not load_rolling_batches(dict(read=rolling), saved, model_like(), DEVICE, True)
        assert rolling.draws.tolist() == [3] * n
        assert rolling.carry["z_H"][:, 0, 0, 0].tolist() == list(range(4))[slots]
        taken, before = rolling.take(DEVICE), Stream("read").at("read", np.arange(4)[slots] + 8)
        after = Stream("read").at("read", np.arange(4)[slots] + 12)
        expected = np.where(np.arange(4)[slots] % 2 == 0, after, before)
        assert taken["page"][:, 0, 0].tolist() == expected.tolist()


@pytest.mark.parametrize("changed, shape, same_data, draws", [
    (dict(global_batch_size=2), {}, True, 6),
    (dict(global_batch_size=5), {}, True, 3),
    ({}, dict(paths=2), True, 3),
    ({}, dict(length=4), True, 3),
    ({}, {}, False, 0),
])  # fmt: skip
def test_changed_slots_start_behind_the_samples_that_were_taken(changed, shape, same_data, draws):
    rolling = open_batch(Stream("read"), **changed)
    anew = load_rolling_batches(dict(read=rolling), states_of(2), model_like(**shape), DEVICE, same_data)
    assert anew == ["read"]
    assert rolling.carry is None and set(rolling.draws.tolist()) == {draws}


def test_stopped_while_it_waits_it_is_as_before():
    rolling = open_batch(Stream("read", stop_at=4))
    rolling.take(DEVICE)
    leave(rolling, [True, False, True, False])
    before, draws = rolling.batch["page"].clone(), rolling.draws.copy()
    assert rolling.take(DEVICE) is None
    assert torch.equal(rolling.batch["page"], before) and np.array_equal(rolling.draws, draws)
    rolling.data.stop_at = 100
    other = open_batch(Stream("read"))
    other.take(DEVICE)
    leave(other, [True, False, True, False])
    assert shown(rolling) == shown(other)


def test_samples_of_other_tasks_are_others():
    index = np.arange(5)
    batches = [batch_of(dict(page=torch.zeros(5, 2, 3)), name, KNOWN[name], False, 0, index) for name in KNOWN]
    numbers = set(torch.cat([part["index"] for part in batches]).tolist())
    assert len(numbers) == 5 * len(KNOWN) and -1 not in numbers


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
        rolling = open_batch(Stream("read"), global_batch_size=400, halt_exploration=share)
        shortest = rolling.take(DEVICE)["shortest"].clone()
        shares.append((shortest > 1).float().mean().item())
        assert set(shortest.tolist()) <= {1, *range(2, LIMIT + 1)}
        leave(rolling, [True] * 400)
        assert torch.equal(rolling.take(DEVICE)["shortest"], shortest) == (share == 0)
    assert shares == [0.0, pytest.approx(0.5, abs=0.1), 1.0]
    assert open_batch(Stream("read"), halt_exploration=1.0, limit=1).take(DEVICE)["shortest"].tolist() == [1] * 4


# ---- after a step ----------------------------------------------------------------------------------------------------


def settle(
    rolling, model=None, agent=None, *, q=(1.0, -1.0, 1.0, 1.0), steps=(1, 1, 1, 4), right=(1, 0, 0, 1), **changes
):
    """One step with these results; steps at the limit are over."""
    steps = torch.tensor(steps)
    right, seen = torch.tensor(right).bool(), torch.zeros(4)
    carry = dict(steps=steps, halted=steps >= LIMIT)
    mean = torch.arange(4.0)[:, None].expand(4, 16)
    aux = dict(right=right, accuracy=right.float(), confidence=seen, changed=seen, x_mean=mean, z_mean=mean)
    options = dict(step=0, draws=torch.ones(4, 2), policy="q_halt", min_accuracy=0.9, bad=False) | changes
    model = model or SimpleNamespace(agent=agent and agent.net)
    rolling.settle(model, agent, carry, dict(aux=aux, q_halt=torch.tensor(q)), **options)
    return rolling.carry["halted"].tolist()


def taken(**changes):
    rolling = open_batch(Stream("read"), **changes)
    rolling.take(DEVICE)
    return rolling


def test_who_halts():
    rolling = taken()
    assert settle(rolling) == [True, False, True, True]
    assert settle(rolling, policy="fixed") == [False, False, False, True]
    rolling.batch["shortest"] = torch.tensor([2, 1, 1, 1])  # may not before
    assert settle(rolling) == [False, False, True, True]
    assert settle(rolling, steps=(2, 1, 1, 4)) == [True, False, True, True]
    assert settle(rolling, bad=True) == [True] * 4


@pytest.fixture
def agent(monkeypatch):
    monkeypatch.setattr(halting, "LEARN_FROM", 1)
    torch.manual_seed(0)
    return HaltingAgent(halting.QNet(d_model=16), **AGENT | dict(warmstart=5))


def test_the_agent_decides_and_learns_of_each_step_once(agent):
    rolling = taken()
    halted = settle(rolling, agent=agent, policy="dqn")
    assert halted == [True, False, False, True]  # the right ones, and the last
    assert len(agent.ring) == 0  # nothing is known about what came next
    settle(rolling, agent=agent, policy="dqn", right=(0, 1, 0, 0), steps=(1, 2, 2, 1))
    assert len(agent.ring) == 4
    rows = agent.ring.rows[:4].float()
    reward, gain, action, last = rows[:, -4:].T
    assert reward.tolist() == [1.0, -0.5, -0.5, 1.0] and action.tolist() == [HALT, CONTINUE, CONTINUE, HALT]
    torch.testing.assert_close(gain[1:3], torch.tensor([0.99, -0.01]), rtol=0, atol=1e-3)
    assert last.tolist() == [0, 0, 0, 0]
    settle(rolling, agent=agent, policy="dqn", bad=True)
    assert len(agent.ring) == 4 and rolling.before is None  # of a step that is not finite nothing is learnt
    settle(rolling, agent=agent, policy="dqn")
    assert len(agent.ring) == 4
    with torch.no_grad():
        agent.net.layers[-1].bias.copy_(torch.tensor([-9.0, 9.0]))
    assert settle(rolling, agent=agent, policy="dqn", step=5) == [False, False, False, True]
    assert settle(rolling, agent=agent, policy="dqn", step=5, draws=torch.zeros(4, 2)) == [True] * 4  # random
    before = agent.target.layers[0].weight.clone()
    with torch.no_grad():
        agent.net.layers[0].weight.add_(1)
    settle(rolling, agent=agent)
    torch.testing.assert_close(agent.target.layers[0].weight, before + 0.1 * (agent.net.layers[0].weight - before))


def test_only_solved_samples_that_leave_are_remembered():
    model = build(["read"], **PLAIN | dict(enable_memory=True))
    rolling = taken()
    solved = [int(rolling.batch["index"][row]) for row in (0, 3)]  # 1 is wrong, 2 leaves unsolved
    settle(rolling, model, min_accuracy=1.0)
    assert model.memory.samples[:2].tolist() == solved and int(model.memory.fill) == 2
    assert model.memory.values[:2, 0].tolist() == [0.0, 3.0]
    settle(rolling, model, bad=True)
    assert int(model.memory.fill) == 2
    model.eval()
    settle(rolling, model)
    assert int(model.memory.fill) == 2


def test_the_codebook_starts_from_the_first_pages(monkeypatch):
    monkeypatch.setattr(module, "VECTORS", 0.25)
    codebooks, stream = [], Stream("read")
    for _ in range(2):
        model = build(["read"], enable_mtp=False)
        start_codebook(model, stream, dict(read=SimpleNamespace(task=KNOWN["read"])), 0, DEVICE, AUTOCAST)
        codebooks.append([buffer.clone() for buffer in model.quantizer.codebook.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*codebooks, strict=True))
    pages = math.ceil(0.25 * len(model.quantizer.codebook.codes) / (model.num_capsules * model.quantizer.shape[0]))
    assert 1 < pages < ROWS and stream.requested == stream.at("read", np.arange(pages)).tolist() * 2
    samples = batch(model, "read")
    assert model(model.initial_carry(samples), samples)[1]["aux"]["vq_loss"].isfinite()
