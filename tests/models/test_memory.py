"""The memory against a plain loop, its ring, its control."""

import math
import sys

import pytest
import torch
import torch.nn.functional as F

from models.memory import Memory, resize_memory
from tests.helpers import finish, launch

SIZES = dict(slots=10, key_dim=5, d_model=8, top_k=3)
RANKS = """
import os, sys, torch, torch.distributed as dist
from models.memory import Memory
folder, rank = sys.argv[1], int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
given = torch.load(f"{folder}/given.pt", weights_only=True)
memory = Memory(**given["sizes"])
memory.load_state_dict(given["state"])
for batch in given["batches"]:
    memory.write(*(part.chunk(2)[rank] for part in batch))
torch.save(memory.state_dict(), f"{folder}/{rank}.pt")
dist.barrier()
os._exit(0)
"""


def build(**changes):
    torch.manual_seed(0)
    return Memory(**SIZES | changes)


def batch(count=6, seed=1, first=0):
    g = torch.Generator().manual_seed(seed)
    mean, values = torch.randn(2, count, 8, generator=g)
    return mean, values, torch.arange(first, first + count), torch.ones(count, dtype=torch.bool)


@torch.no_grad()
def plain_read(memory, x, samples):
    out = x.clone()
    for b in range(len(x)):
        mean, scored = x[b].mean(0), []
        query = F.normalize(memory.query.weight @ mean, dim=0)
        for slot in range(int(memory.fill)):
            if memory.samples[slot] != samples[b]:
                scored.append((float(query @ memory.keys[slot]), slot))
        top = sorted(scored, reverse=True)[: memory.top_k]
        if top:
            weights = torch.softmax(torch.tensor([s for s, _ in top]) * memory.log_scale.exp(), 0)
            read = memory.value.weight @ sum(w * memory.values[slot] for w, (_, slot) in zip(weights, top, strict=True))
            gate = torch.sigmoid(memory.gate.weight[0] @ torch.cat([mean, read]) - 2)
            out[b] = x[b] + gate * read
    return out


def test_reading_is_that_of_a_loop_and_an_empty_memory_does_nothing():
    memory, x, samples = build(), torch.randn(4, 6, 8), torch.tensor([0, 3, 9, 9])
    assert memory.read(x, samples) is x
    for entries in (1, 2, 6, 5):  # with fewer entries than top_k, and around the ring
        memory.write(*batch(entries, seed=entries))
        torch.testing.assert_close(memory.read(x, samples), plain_read(memory, x, samples))


def test_own_entries_are_not_read():
    memory, x = build(), torch.randn(2, 6, 8)
    mean, values, _, keep = batch(4)
    memory.write(mean, values, torch.full((4,), 7), keep)
    assert torch.equal(memory.read(x, torch.tensor([7, 7])), x)
    out = memory.read(x, torch.tensor([7, 8]))
    assert torch.equal(out[0], x[0]) and not torch.equal(out[1], x[1])
    memory.read(x.requires_grad_(), torch.tensor([7, 7])).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in memory.parameters())


def test_gradients_reach_all_parameters():
    memory, x = build(), torch.randn(4, 6, 8, requires_grad=True)
    memory.write(*batch())
    loss = memory.read(x, torch.arange(20, 24)).square().sum()
    memory.write(*batch(seed=2))  # of samples that leave in the same step
    loss.backward()
    assert all(p.grad.norm() > 0 for p in memory.parameters()) and x.grad.isfinite().all()


def test_a_permuted_batch_has_permuted_answers():
    memory, x, samples = build(), torch.randn(6, 3, 8), torch.arange(6)
    memory.write(*batch())
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    torch.testing.assert_close(memory.read(x, samples)[order], memory.read(x[order], samples[order]))


def test_the_ring_keeps_the_newest_and_evaluation_writes_nothing():
    memory, wanted = build(), []
    for step, count in enumerate((4, 4, 5, 23, 2)):
        mean, values, samples, _ = batch(count, seed=step, first=100 * step)
        keep = torch.arange(count) % 3 != 1
        memory.eval().write(mean, values, samples, keep)
        assert set(memory.samples.tolist()) - {-1} == set(wanted[-10:])
        memory.train().write(mean, values, samples, keep)
        wanted += samples[keep].tolist()
        assert set(memory.samples.tolist()) - {-1} == set(wanted[-10:])
        assert int(memory.fill) == min(10, len(wanted)) and int(memory.cursor) == len(wanted) % 10
        newest = (int(memory.cursor) - 1) % 10
        assert int(memory.samples[newest]) == wanted[-1]
        row = samples.tolist().index(wanted[-1])
        torch.testing.assert_close(memory.values[newest], values[row])
        torch.testing.assert_close(memory.keys[newest], memory.key(mean[row : row + 1])[0].detach())


@pytest.mark.parametrize("count", [3, 10, 17])
@pytest.mark.parametrize("slots", [2, 4, 10, 25])
def test_a_memory_of_another_size_takes_over_the_newest_entries(slots, count):
    old, new = build(), build(slots=slots)
    for step in range(count):
        mean, values, _, keep = batch(1, seed=step)
        old.write(mean, values, torch.tensor([step]), keep | True)
    buffers = resize_memory(dict(old.named_buffers()), slots)
    new.load_state_dict(old.state_dict() | buffers)
    for step in range(count, 30):
        fill = min(slots, step - max(0, count - 10))
        assert set(new.samples.tolist()) - {-1} == set(range(step - fill, step))
        assert int(new.fill) == fill and new.keys[:fill].any(1).all() and not new.keys[fill:].any()
        mean, values, _, keep = batch(1, seed=step)
        new.write(mean, values, torch.tensor([step]), keep | True)


def test_shuffled_values_come_back():
    memory, x, samples = build(), torch.randn(4, 6, 8), torch.arange(20, 24)
    memory.write(*batch())
    before, plain = memory.values.clone(), memory.read(x, samples)
    with memory.shuffled(torch.Generator().manual_seed(0)):
        assert not torch.equal(memory.read(x, samples), plain)
        for column in range(8):
            assert sorted(memory.values[:, column].tolist()) == sorted(before[:, column].tolist())
        assert not memory.values[6:].any()
    assert torch.equal(memory.values, before)


def test_it_reads_in_the_type_of_the_network():
    memory, x = build(), torch.randn(4, 6, 8)
    memory.write(*batch())
    wanted = memory.read(x, torch.arange(20, 24))
    with torch.autocast("cpu", torch.bfloat16):
        out = memory.read(x.bfloat16(), torch.arange(20, 24))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), wanted, rtol=0, atol=0.1)


def test_two_ranks_write_what_one_would(tmp_path):
    memory, batches = build(), [batch(6, seed=s, first=10 * s) for s in range(3)]
    batches[1][3][::2] = False
    torch.save(dict(sizes=SIZES, state=memory.state_dict(), batches=batches), tmp_path / "given.pt")
    for run in [launch([sys.executable, "-c", RANKS, str(tmp_path), str(rank)]) for rank in range(2)]:
        finish(run)
    for part in batches:
        memory.write(*part)
    for rank in range(2):
        for name, buffer in torch.load(tmp_path / f"{rank}.pt", weights_only=True).items():
            torch.testing.assert_close(buffer, memory.state_dict()[name])


def test_temperature_starts_as_said():
    assert math.exp(-build().log_scale.item()) == pytest.approx(0.1)
