"""A memory of what solved samples were like and what was thought about them, read by samples that look alike.

B batch, N sequence, D width, C slots, E width of a key. Keys and values are data, not weights: gradients go to the
query, the temperature, the projection of what is read, and its gate.
"""

import math
from contextlib import contextmanager

import torch
import torch.nn as nn
import torch.nn.functional as F

from models.optim.adam_atan2 import gather_rows, moved

TEMPERATURE = 0.1  # of the cosines, at the start
GATE = -2.0  # added to the logit of the gate, which is nearly closed at the start
START = 0.01  # of the usual weights: the first entries come when a model begins to solve, and would throw it back


class Memory(nn.Module):
    """A ring of slots: the newest entry takes the place of the oldest. Empty, it does nothing."""

    def __init__(self, *, slots, key_dim, d_model, top_k):
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
        self.register_buffer("fill", torch.zeros((), dtype=torch.long))  # slots in use: the first so many
        self.register_buffer("cursor", torch.zeros((), dtype=torch.long))  # the slot that is written next
        self.filled = 0  # `fill` on the host; None: not known

    def _load_from_state_dict(self, *args):
        super()._load_from_state_dict(*args)
        self.filled = None

    def entries(self):
        """Number of slots in use, for which the host waits only after a load."""
        if self.filled is None:
            self.filled = int(self.fill)
        return self.filled

    def key(self, mean):
        """mean: (B, D) over the positions of x -> (B, E) of length 1; queries and keys alike."""
        with torch.autocast(mean.device.type, enabled=False):
            return F.normalize(self.query(mean.float()), dim=-1)

    def read(self, x, samples):
        """x: (B, N, D), samples: (B) int64, whose own entries are not read -> x plus the same for all its positions.

        Of the top_k entries with the largest cosines. x itself, bit for bit, where there is no entry to read.
        """
        fill = self.entries()
        if not fill:
            return x
        with torch.autocast(x.device.type, enabled=False):  # the nearest in bfloat16 are others
            mean = x.mean(1).float()
            cosine = self.key(mean) @ self.keys[:fill].clone().T  # which may be written to before the backward pass
            cosine = cosine.masked_fill(self.samples[:fill] == samples[:, None], -torch.inf)
            top, index = cosine.topk(min(self.top_k, fill))  # (B, k)
            found = top.isfinite()
            weights = (top.masked_fill(~found, -1e4) * self.log_scale.exp()).softmax(-1)
            read = self.value((weights[..., None] * self.values[index]).sum(1)) * found[:, :1]  # (B, D)
            gate = torch.sigmoid(self.gate(torch.cat([mean, read], -1)) + GATE)
        return x + (gate * read)[:, None].to(x.dtype)

    @torch.no_grad()
    def write(self, mean, values, samples, keep, rows=None):
        """mean: (B, D) of x, values: (B, D), samples: (B) int64, keep: (B) bool, what enters. In training mode only.

        All ranks write what all ranks have, in their order. rows: numbers of the samples of all ranks that enter, on
        the host, where these are known there; else it waits for `keep`.
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
        last = slice(max(0, new - slots), None)  # of one place written twice torch keeps no promised one
        for ours, given in ((self.keys, keys), (self.values, values), (self.samples, samples)):
            ours[place[last]] = given[last]
        self.cursor.add_(new).remainder_(slots)
        self.fill.add_(new).clamp_(max=slots)
        self.filled = min(filled + new, slots)

    @contextmanager
    def shuffled(self, generator):
        """Within it the entries have each other's values: what is left of the gain is not owed to what they hold."""
        kept, fill = self.values.clone(), self.entries()
        order = torch.randperm(fill, generator=generator, device=generator.device)
        self.values[:fill] = kept[order.to(kept.device)]
        try:
            yield
        finally:
            self.values.copy_(kept)


def resized(state, slots):
    """Return the buffers of a memory, {name: tensor}, for one with so many slots: the newest entries stay."""
    old, kept = len(state["keys"]), min(int(state["fill"]), slots)
    newest = (int(state["cursor"]) - kept + torch.arange(kept)) % old  # from the oldest that stays to the newest
    resized = {}
    for name, empty in dict(keys=0, values=0, samples=-1).items():
        resized[name] = state[name].new_full((slots, *state[name].shape[1:]), empty)
        resized[name][:kept] = state[name][newest]
    counts = dict(fill=kept, cursor=kept % slots)
    return resized | {name: torch.full_like(state[name], count) for name, count in counts.items()}
