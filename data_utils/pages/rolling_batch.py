"""The samples at hand of one task: each slot goes on with its own until it is done, then takes the next one.

B slots over all ranks, of which this one has n. Slot i draws its k-th sample from position i + k B of the task's stream
(shards.py), so that nothing depends on how often a run was stopped, or on how much data there was by then.
"""

import hashlib
import math

import numpy as np
import torch

from data_utils.pages.shards import Stopped
from models.glyphs import augmented_patches
from models.halting import CONTINUE, HALT
from models.optim.adam_atan2 import gather_rows, moved

START_PAGES = 256  # at most, whose capsules a codebook begins with
VECTORS = 8  # in them for each of its codes; with 24 it fits other pages 5 % better, for three times the seconds


def number(*parts):
    """A seed below 2^63 out of numbers and names."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()) >> 1


def drawn(pages, task, seeds):
    """Patches of pages (n, R, C) at random offsets, faces and contrasts, each out of its own seed: (n, P, pixels)."""
    made = [augmented_patches(page[None], task.cells, torch.Generator().manual_seed(seed))
            for page, seed in zip(pages, seeds, strict=True)]  # fmt: skip
    return torch.cat(made)


def batch_of(samples, name, task, augment, seed, index):
    """What a model of multimodal.py reads, of samples with these numbers: CPU tensors, and the task's name."""
    own = torch.as_tensor(index) + (number(name) >> 32 << 32)  # of another task it is another sample
    batch = samples | dict(task=name, index=own, explore=torch.full((len(index),), -1))
    if augment and task.kind == "text":
        batch["patches"] = drawn(samples["page"], task, [number(seed, name, int(i)) for i in index])
    return batch


class Slots:
    """The slots `own` (a slice) of a task. cfg: global_batch_size, seed, augment, halt_exploration. limit: T.

    batch["shortest"] (n): steps before which a sample may not end, 2 to T for a share halt_exploration of them, else 1.
    """

    def __init__(self, data, name, task, own, cfg, limit):
        self.data, self.name, self.task, self.limit = data, name, task, limit
        self.size, self.seed, self.augment = cfg.global_batch_size, cfg.seed, cfg.augment
        self.exploration, self.own = cfg.halt_exploration, np.arange(self.size)[own]
        slots = len(self.own)
        self.draws, self.carry, self.batch, self.before = np.zeros(slots, np.int64), None, None, None
        self.fetched = None, None  # the last carry["halted"] that the host has waited for, and what it is there

    def _halted(self):
        """carry["halted"] on the host, (n) bool."""
        tensor, there = self.fetched
        return there if tensor is self.carry["halted"] else self.carry["halted"].cpu().numpy()

    def take(self, device):
        """Give the slots that halted their next samples -> the batch, on `device`; None if stopped while they came."""
        done = np.ones(len(self.own), bool) if self.carry is None else self._halted()
        rows, draws = np.arange(len(self.own)) if self.batch is None else done.nonzero()[0], self.draws + done
        if len(rows):
            try:
                new = self._drawn(rows, draws)
            except Stopped:
                return None
            new = {key: part if key == "task" else moved(part, device) for key, part in new.items()}
            rows = moved(torch.as_tensor(rows), device)
            for key, part in new.items() if self.batch else ():
                if key != "task":
                    self.batch[key][rows] = part
            self.batch = self.batch or new
        self.draws = draws
        return self.batch

    def _drawn(self, rows, draws):
        index = self.data.at(self.name, self.own[rows] + (draws[rows] - 1) * self.size)
        new = batch_of(self.data.samples(self.name, index), self.name, self.task, self.augment, self.seed, index)
        seeds = ((self.seed, number(self.name), self.own[row], draws[row]) for row in rows)
        return new | dict(shortest=torch.tensor([self._shortest(np.random.default_rng(seed)) for seed in seeds]))

    def _shortest(self, rng):
        return int(rng.integers(2, self.limit + 1)) if self.limit > 1 and rng.random() < self.exploration else 1

    @torch.no_grad()
    def settle(self, model, agent, carry, outputs, *, step, draws, policy, min_accuracy, bad):
        """Decide which samples leave after a step: `carry` is what it left. All do if it was `bad`, not finite.

        policy: `q_halt` once the model thinks that the answer is right, `dqn` as `agent` acts with draws (n, 2),
        `fixed` when the steps are used up. The agent learns of every slot, the memory of samples that leave with so
        many right.
        """
        aux, q, last = outputs["aux"], outputs["q_halt"], carry["halted"]
        halted = last | (q > 0) & (carry["steps"] >= self.batch["shortest"]) if policy == "q_halt" else last
        if agent:
            share = carry["steps"] / self.limit
            seen = model.agent.features(aux["z_mean"], share, q, aux["confidence"], aux["changed"])
            if policy == "dqn":
                halted = agent.act(seen, aux["right"], last, step, draws) == HALT
            here = dict(features=seen, accuracy=aux["accuracy"], right=aux["right"], last=last)
            here["action"] = torch.where(halted, HALT, CONTINUE)
            if self.before and not bad:
                agent.store(self.before, here)
            self.before = None if bad else here
            agent.follow()
        self.carry = carry | dict(halted=halted | bool(bad))
        if bad:
            self.fetched = self.carry["halted"], np.ones(len(self.own), bool)
            return
        parts = [halted]
        if hasattr(model, "memory"):
            keep = halted & (aux["accuracy"] >= min_accuracy)
            parts.append(gather_rows(keep.to(torch.uint8)).bool())  # of all ranks
        there = torch.cat(parts).cpu().numpy()  # the one wait of the host in here
        self.fetched = self.carry["halted"], there[: len(self.own)]
        if hasattr(model, "memory"):
            rows = torch.from_numpy(np.flatnonzero(there[len(self.own) :]))
            model.memory.write(aux["x_mean"], aux["z_mean"], self.batch["index"], keep, rows)

    def state_dict(self):
        """What load_state_dict needs; `before` is what a halting agent knew a step ago, if there is one."""
        return dict(draws=torch.from_numpy(self.draws), carry=self.carry, before=self.before)

    def load_state_dict(self, state, device):
        """Take up where a run of as many slots stopped: the samples are read again, not stored."""
        self.draws = state["draws"].numpy().copy()
        for name in ("carry", "before"):
            parts = state[name]
            setattr(self, name, parts and {key: part.to(device) for key, part in parts.items()})


def load_slots(slots, ranks, model, device, same_data):
    """Give {task: Slots} what each of the `ranks` of a run saved, {task: state} -> the names of those that begin anew.

    Slots go over to any number of ranks. They begin anew where their number or the shape of their states has changed,
    behind all samples that were drawn; of other data with the first sample.
    """
    anew = []
    for name, slot in slots.items():
        parts = [rank[name] for rank in ranks if name in rank]
        if not parts:
            continue
        whole = {key: _joined([part[key] for part in parts]) for key in parts[0]}
        carry, shape = whole["carry"], (len(model.starts), model.length_of(model.tasks[name]), model.starts.shape[1])
        if same_data and len(whole["draws"]) == slot.size and (not carry or carry["z_H"].shape[1:] == shape):
            slot.load_state_dict({key: _rows(state, slot.own) for key, state in whole.items()}, device)
        else:
            anew.append(name)
            slot.draws[:] = math.ceil(int(whole["draws"].sum()) / slot.size) if same_data else 0
    return anew


def _joined(parts):
    """Join tensors, dicts of them, or Nones of several ranks into those of all their slots."""
    if parts[0] is None:
        return None
    if isinstance(parts[0], dict):
        return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    return torch.cat(parts)


def _rows(state, rows):
    """Return the rows of a tensor or of each tensor in a dict; None of None."""
    if isinstance(state, dict):
        return {key: part[rows] for key, part in state.items()}
    return state if state is None else state[rows]


def start_codes(model, data, sources, seed, device, autocast):
    """Begin the codebook of capsules with those of the first pages of the first task, as many as it needs."""
    name, source = next(iter(sources.items()))
    groups, _ = model.quantizer.shape
    enough = math.ceil(VECTORS * len(model.quantizer.codebook.codes) / (model.num_capsules * groups))
    index = data.at(name, np.arange(min(data.rows(name), START_PAGES, enough)))
    batch = batch_of(data.samples(name, index), name, source.task, model.augment, seed, index)
    batch = {key: part if key == "task" else part.to(device) for key, part in batch.items()}
    with autocast:
        model.start_codes(batch, torch.Generator().manual_seed(seed))
