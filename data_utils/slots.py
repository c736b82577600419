"""The samples at hand of one task: each slot goes on with its own until it is done, then takes the next one.

B slots over all ranks, of which this one has n. Slot i draws its k-th sample from position i + k B of the task's stream
(shards.py), so that nothing depends on how often a run was stopped, or on how much data there was by then.
"""

import hashlib

import numpy as np
import torch

from data_utils.render import augmented_patches


def number(*parts):
    """A seed below 2^63 out of numbers and names."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()) >> 1


def drawn(pages, task, seeds):
    """Patches of pages (n, R, C) at random offsets, faces and contrasts, each out of its own seed: (n, P, pixels)."""
    made = [augmented_patches(page[None], task.cells, torch.Generator().manual_seed(seed))
            for page, seed in zip(pages, seeds, strict=True)]  # fmt: skip
    return torch.cat(made)


def batch_of(samples, name, task, augment, seed, index):
    """What a model of multimodal.py reads, of samples with these numbers: a dict of CPU tensors, and the task."""
    own = torch.as_tensor(index) + (number(name) >> 32 << 32)  # of another task it is another sample
    batch = samples | dict(task=name, index=own, explore=torch.full((len(index),), -1))
    if augment and task.kind == "text":
        batch["patches"] = drawn(samples["page"], task, [number(seed, name, int(i)) for i in index])
    return batch


class Slots:
    """`shortest` (n): steps before which a sample may not end, drawn anew for each: 2 to `limit` with a probability of
    `exploration`, else 1."""

    def __init__(self, data, name, task, *, slots, first, size, seed, augment, exploration, limit):
        self.data, self.name, self.task, self.size, self.seed = data, name, task, size, seed
        self.augment, self.exploration, self.limit = augment, exploration, limit
        self.own = np.arange(first, first + slots)
        self.draws, self.carry, self.batch = np.zeros(slots, np.int64), None, None

    def take(self, device):
        """Give the slots that halted their next samples -> the batch, on `device`."""
        done = np.ones(len(self.own), bool) if self.carry is None else self.carry["halted"].cpu().numpy()
        self.draws += done
        self._fill(np.arange(len(self.own)) if self.batch is None else done.nonzero()[0], device)
        return self.batch

    def _fill(self, rows, device):
        if not len(rows):
            return
        index = self.data.at(self.name, self.own[rows] + (self.draws[rows] - 1) * self.size)
        new = batch_of(self.data.samples(self.name, index), self.name, self.task, self.augment, self.seed, index)
        new["shortest"] = torch.tensor([self._shortest(row) for row in rows])
        if self.batch is None:
            self.batch = {key: part if key == "task" else part.to(device) for key, part in new.items()}
            return
        rows = torch.as_tensor(rows, device=device)
        for key, part in new.items():
            if key != "task":
                self.batch[key][rows] = part.to(device)

    def _shortest(self, row):
        draw = np.random.default_rng((self.seed, number(self.name), self.own[row], self.draws[row]))
        return int(draw.integers(2, self.limit + 1)) if self.limit > 1 and draw.random() < self.exploration else 1

    def state_dict(self):
        return dict(draws=torch.from_numpy(self.draws), carry=self.carry)

    def load_state_dict(self, state, device):
        """Take up where a run of as many slots stopped: the samples are read again, not stored."""
        self.draws = state["draws"].numpy().copy()
        self.carry = state["carry"] and {key: part.to(device) for key, part in state["carry"].items()}
