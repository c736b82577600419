"""A memory of solved samples: keys describe a sample, values its final state; similar samples read them.

B batch, N sequence, D width, C slots, E width of a key. Keys and values are data, not weights: gradients go to the
query, the temperature, the projection of the read values, and the gate.
"""

import math
from contextlib import contextmanager

import torch
import torch.nn as nn
import torch.nn.functional as F

from models.optim.adam_atan2 import gather_rows, moved

TEMPERATURE = 0.1  # initial temperature of the cosines
GATE = -2.0  # added to the logit of the gate, so that it is nearly closed at the start
# The first entries come when a model just begins to solve samples; reading them at full scale would set it back.
START = 0.01  # scale of the initial value weights


class Memory(nn.Module):
    """A ring of slots in which the newest entry replaces the oldest. An empty memory changes nothing."""

    def __init__(self, *, slots, key_dim, d_model, top_k):
        """slots: C. key_dim: E. d_model: D. top_k: entries that a sample reads."""
        super().__init__()
        self.top_k = top_k
        self.query = nn.Linear(d_model, key_dim, bias=False)
        self.value = nn.Linear(d_model, d_model, bias=False)
        nn.init.normal_(self.value.weight, std=START * d_model**-0.5)
        self.gate = nn.Linear(2 * d_model, 1, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(TEMPERATURE)))
        self.register_buffer("keys", torch.zeros(slots, key_dim))
        self.register_buffer("values", torch.zeros(slots, d_model))
        self.register_buffer("samples", torch.full((slots,), -1))
        self.register_buffer("fill", torch.zeros((), dtype=torch.long))  # number of slots in use, from slot 0 on
        self.register_buffer("cursor", torch.zeros((), dtype=torch.long))  # slot to write next
        self.filled = 0  # copy of `fill` on the host; None after a load

    def _load_from_state_dict(self, *args):
        super()._load_from_state_dict(*args)
        self.filled = None

    def entries(self):
        """Return the number of slots in use; only after a load must the host wait for the device."""
        if self.filled is None:
            self.filled = int(self.fill)
        return self.filled

    def key(self, mean):
        """Mean of x over its positions (B, D) -> key or query of length 1 (B, E)."""
        with torch.autocast(mean.device.type, enabled=False):
            return F.normalize(self.query(mean.float()), dim=-1)

    def read(self, x, samples):
        """Add the value that a sample reads to all its positions: x (B, N, D), samples (B) int64 -> (B, N, D).

        A sample reads the top_k entries with the largest cosines, never its own (same number in `samples`). Without
        any entry x is returned bit for bit.
        """
        fill = self.entries()
        if not fill:
            return x
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 would choose other entries
            mean = x.mean(1).float()
            cosine = self.key(mean) @ self.keys[:fill].clone().T  # a write may come before the backward pass
            cosine = cosine.masked_fill(self.samples[:fill] == samples[:, None], -torch.inf)
            top, index = cosine.topk(min(self.top_k, fill))  # (B, k)
            readable = top.isfinite()
            weights = (top.masked_fill(~readable, -1e4) * self.log_scale.exp()).softmax(-1)
            read = self.value((weights[..., None] * self.values[index]).sum(1)) * readable[:, :1]  # (B, D)
            gate = torch.sigmoid(self.gate(torch.cat([mean, read], -1)) + GATE)
        return x + (gate * read)[:, None].to(x.dtype)

    @torch.no_grad()
    def write(self, mean, values, samples, keep, rows=None):
        """Store the samples where `keep` is True; only in training mode.

        mean: (B, D) of x, values: (B, D), samples: (B) int64, keep: (B) bool. Every rank stores the samples of all
        ranks, in the order of ranks. rows: indices of the kept samples among those of all ranks, on the host; without
        them the host waits for `keep`.
        """
        if not self.training:
            return
        if rows is None:
            rows = gather_rows(keep.to(torch.uint8)).cpu().nonzero()[:, 0]
        if not len(rows):
            return
        filled, slots, new = self.entries(), len(self.keys), len(rows)
        rows = moved(rows, mean.device)
        keys, values, samples = (gather_rows(part)[rows] for part in (self.key(mean), values.float(), samples))
        place = (self.cursor + torch.arange(new, device=keys.device)) % slots
        last = slice(max(0, new - slots), None)  # with duplicate indices torch does not define which write wins
        for buffer, entries in ((self.keys, keys), (self.values, values), (self.samples, samples)):
            buffer[place[last]] = entries[last]
        self.cursor.add_(new).remainder_(slots)
        self.fill.add_(new).clamp_(max=slots)
        self.filled = min(filled + new, slots)

    @contextmanager
    def shuffled(self, generator):
        """Permute the values of the entries inside the `with`; a gain that remains does not come from their content."""
        original = self.values.clone()
        fill = self.entries()
        order = torch.randperm(fill, generator=generator, device=generator.device)
        self.values[:fill] = original[order.to(original.device)]
        try:
            yield
        finally:
            self.values.copy_(original)


def resize_memory(state, slots):
    """Return the buffers {name: tensor} of a memory with `slots` slots, which keeps the newest entries of `state`."""
    old_slots = len(state["keys"])
    fill = min(int(state["fill"]), slots)
    newest = (int(state["cursor"]) - fill + torch.arange(fill)) % old_slots  # the entries that stay, oldest first
    buffers = {}
    for name, empty in dict(keys=0, values=0, samples=-1).items():
        buffers[name] = state[name].new_full((slots, *state[name].shape[1:]), empty)
        buffers[name][:fill] = state[name][newest]
    counts = dict(fill=fill, cursor=fill % slots)
    return buffers | {name: torch.full_like(state[name], count) for name, count in counts.items()}
