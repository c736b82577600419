"""The batch of one task, whose slots change samples one by one: a slot keeps its sample until that halts.

B slots over all ranks, n of them on this rank. Slot i takes its k-th sample from position i + k B of the task's stream
(shards.py). So samples depend neither on how often a run was stopped, nor on how much data there was at the time.
"""

import hashlib
import math

import numpy as np
import torch

from data_utils.pages.shards import Stopped
from models.glyphs import augmented_patches
from models.halting import CONTINUE, HALT
from models.optim.adam_atan2 import gather_rows, moved

START_PAGES = 256  # largest number of pages whose capsules start a codebook
VECTORS = 8  # capsule vectors per code at the start; 24 fit other pages 5 % better, in three times the seconds


def seed_of(*parts):
    """Return a seed below 2^63 for numbers and names."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()) >> 1


def draw_patches(pages, task, seeds):
    """Draw patches (n, P, pixels) of pages (n, R, C): random offset, face and contrast, by one seed per page."""
    patches = []
    for page, seed in zip(pages, seeds, strict=True):
        patches.append(augmented_patches(page[None], task.cells, torch.Generator().manual_seed(seed)))
    return torch.cat(patches)


def batch_of(samples, name, task, augment, seed, index):
    """Return the batch for a model of multimodal.py: CPU tensors, and the task's name.

    samples: page (n, R, C), target (n, L), id (n,). index: (n,) their numbers, which seed the augmentation.
    """
    unique = torch.as_tensor(index) + (seed_of(name) >> 32 << 32)  # differs from the same number in other tasks
    batch = samples | dict(task=name, index=unique, explore=torch.full((len(index),), -1))
    if augment and task.kind == "text":
        batch["patches"] = draw_patches(samples["page"], task, [seed_of(seed, name, int(i)) for i in index])
    return batch


def to_device(batch, device):
    """Return the batch with its tensors on `device`."""
    return {key: part if key == "task" else moved(part, device) for key, part in batch.items()}


class RollingBatch:
    """The `slots` (a slice of B) of a task on this rank. limit: the largest number of steps T of a sample.

    data: Shards. cfg: global_batch_size, seed, augment, halt_exploration. batch["shortest"] (n,) is the smallest number
    of steps of a sample: 2 to T for a share halt_exploration of them, else 1.
    """

    def __init__(self, data, name, task, slots, cfg, limit):
        self.data, self.name, self.task, self.limit = data, name, task, limit
        self.size, self.seed, self.augment = cfg.global_batch_size, cfg.seed, cfg.augment
        self.exploration = cfg.halt_exploration
        self.slots = np.arange(self.size)[slots]
        self.draws = np.zeros(len(self.slots), np.int64)  # samples taken so far
        self.carry = self.batch = self.before = None
        self.fetched = None, None  # the last carry["halted"] that was copied to the host, and the copy

    def _halted(self):
        """Return carry["halted"] on the host, (n,) bool."""
        tensor, copy = self.fetched
        return copy if tensor is self.carry["halted"] else self.carry["halted"].cpu().numpy()

    def take(self, device):
        """Give each halted slot its next sample; return the batch on `device`, or None if stopped while waiting."""
        done = np.ones(len(self.slots), bool) if self.carry is None else self._halted()
        rows = np.arange(len(self.slots)) if self.batch is None else done.nonzero()[0]
        draws = self.draws + done
        if len(rows):
            try:
                new = to_device(self._next_samples(rows, draws), device)
            except Stopped:
                return None
            if self.batch is None:
                self.batch = new
            else:
                rows = moved(torch.as_tensor(rows), device)
                for key in new:
                    if key != "task":
                        self.batch[key][rows] = new[key]
        self.draws = draws
        return self.batch

    def _next_samples(self, rows, draws):
        index = self.data.at(self.name, self.slots[rows] + (draws[rows] - 1) * self.size)
        batch = batch_of(self.data.samples(self.name, index), self.name, self.task, self.augment, self.seed, index)
        seeds = ((self.seed, seed_of(self.name), self.slots[row], draws[row]) for row in rows)
        return batch | dict(shortest=torch.tensor([self._shortest(np.random.default_rng(seed)) for seed in seeds]))

    def _shortest(self, rng):
        if self.limit > 1 and rng.random() < self.exploration:
            return int(rng.integers(2, self.limit + 1))
        return 1

    @torch.no_grad()
    def settle(self, model, agent, carry, outputs, *, step, draws, policy, min_accuracy, bad):
        """Decide which samples halt after a step; carry and outputs are those of the step.

        policy: `q_halt` halts once the model believes that its answer is right. `dqn` halts as `agent` acts with draws
        (n, 2). `fixed` halts after the last step. bad: the step was not finite, and all samples halt. The agent learns
        from every slot, the memory from samples that halt with an accuracy of at least min_accuracy.
        """
        n = len(self.slots)
        aux, q, last = outputs["aux"], outputs["q_halt"], carry["halted"]
        halted = last | (q > 0) & (carry["steps"] >= self.batch["shortest"]) if policy == "q_halt" else last
        if agent:
            share = carry["steps"] / self.limit
            features = model.agent.features(aux["z_mean"], share, q, aux["confidence"], aux["changed"])
            if policy == "dqn":
                halted = agent.act(features, aux["right"], last, step, draws) == HALT
            after = dict(features=features, accuracy=aux["accuracy"], right=aux["right"], last=last)
            after["action"] = torch.where(halted, HALT, CONTINUE)
            if self.before and not bad:
                agent.store(self.before, after)
            self.before = None if bad else after
            agent.follow()
        self.carry = carry | dict(halted=halted | bool(bad))
        if bad:
            self.fetched = self.carry["halted"], np.ones(n, bool)
            return
        parts = [halted]
        if hasattr(model, "memory"):
            remember = halted & (aux["accuracy"] >= min_accuracy)
            parts.append(gather_rows(remember.to(torch.uint8)).bool())  # of all ranks
        flags = torch.cat(parts).cpu().numpy()  # the only wait of the host in this method
        self.fetched = self.carry["halted"], flags[:n]
        if hasattr(model, "memory"):
            rows = torch.from_numpy(np.flatnonzero(flags[n:]))
            model.memory.write(aux["x_mean"], aux["z_mean"], self.batch["index"], remember, rows)

    def state_dict(self):
        """Return the state for load_state_dict; `before` is the halting agent's last observation, if there is one."""
        return dict(draws=torch.from_numpy(self.draws), carry=self.carry, before=self.before)

    def load_state_dict(self, state, device):
        """Continue where a run with as many slots stopped; samples are read again, not stored."""
        self.draws = state["draws"].numpy().copy()
        for name in ("carry", "before"):
            parts = state[name]
            setattr(self, name, parts and {key: part.to(device) for key, part in parts.items()})


def load_rolling_batches(batches, saved, model, device, same_data):
    """Load the states {task: state} that each rank of a run `saved` into {task: RollingBatch}.

    The number of ranks may differ. Returns the names of tasks that start anew: with other data at the first sample;
    after a change of the number of slots or of the shape of states, behind all samples that were taken.
    """
    anew = []
    for name, batch in batches.items():
        parts = [rank[name] for rank in saved if name in rank]
        if not parts:
            continue
        state = {key: _join([part[key] for part in parts]) for key in parts[0]}
        carry = state["carry"]
        shape = (len(model.starts), model.length_of(model.tasks[name]), model.starts.shape[1])
        if same_data and len(state["draws"]) == batch.size and (not carry or carry["z_H"].shape[1:] == shape):
            batch.load_state_dict({key: _select(part, batch.slots) for key, part in state.items()}, device)
        else:
            anew.append(name)
            batch.draws[:] = math.ceil(int(state["draws"].sum()) / batch.size) if same_data else 0
    return anew


def _join(parts):
    """Concatenate the tensors, dicts of tensors, or Nones of several ranks."""
    if parts[0] is None:
        return None
    if isinstance(parts[0], dict):
        return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    return torch.cat(parts)


def _select(state, rows):
    """Return the rows of a tensor or of each tensor in a dict; None of None."""
    if isinstance(state, dict):
        return {key: part[rows] for key, part in state.items()}
    return state if state is None else state[rows]


def start_codebook(model, data, sources, seed, device, autocast):
    """Start the codebook of capsules from those of the first pages of the first task, as many as it needs."""
    name, source = next(iter(sources.items()))
    groups, _ = model.quantizer.shape
    pages = math.ceil(VECTORS * len(model.quantizer.codebook.codes) / (model.num_capsules * groups))
    index = data.at(name, np.arange(min(data.rows(name), START_PAGES, pages)))
    batch = batch_of(data.samples(name, index), name, source.task, model.augment, seed, index)
    with autocast:
        model.start_codes(to_device(batch, device), torch.Generator().manual_seed(seed))
