"""When to stop thinking, learnt from what stopping and going on were worth: a small Q-network beside the model.

B batch, D width, t steps so far of at most T, F = 36 features. Rewards: to halt gives RIGHT or WRONG, to go on what the
share of right answers gains, less a cost. Deep Q-learning with a target network that follows (Mnih et al. 2015), which
the network's own choice is looked up in (double DQN, arXiv 1509.06461).
"""

import copy

import torch
import torch.nn as nn
import torch.nn.functional as F

from models.optim.adam_atan2 import gather_rows, moved

HALT, CONTINUE = 0, 1  # columns of what QNet returns, and the actions
RIGHT, WRONG = 1.0, -0.5  # reward of halting with everything right, and otherwise
PROJECTED, HIDDEN = 32, 128
FEATURES = PROJECTED + 4
LAST_EPSILON, EPSILON_STEPS = 0.05, 200_000  # where the share of random actions ends, and after how many steps
LEARN_FROM = 1000  # transitions
BLOCK = 65_536  # transitions by which the ring grows


class QNet(nn.Module):
    """Values of both actions: features (B, F) -> (B, 2), in float32."""

    def __init__(self, *, d_model):
        super().__init__()
        self.register_buffer("projection", nn.init.orthogonal_(torch.empty(d_model, PROJECTED)))  # fixed
        self.layers = nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 2))

    @torch.no_grad()
    def features(self, z_mean, share, q, confidence, changed):
        """z_mean (B, D) over the positions of a state; share t / T, q, confidence, changed: (B) each -> (B, F).

        q is the logit of being right; confidence the mean probability of the answer; changed the share of it that is
        not what it was a step ago.
        """
        with torch.autocast(z_mean.device.type, enabled=False):
            rest = torch.stack([share, q, confidence, changed], 1).float()
            return torch.cat([z_mean.float() @ self.projection, rest], 1)

    def forward(self, features):
        with torch.autocast(features.device.type, enabled=False):  # a step costs less than bfloat16 can tell
            return self.layers(features)


class Ring:
    """The newest `capacity` rows of `width` numbers in float16; memory is taken block by block."""

    def __init__(self, capacity, width, device):
        self.capacity, self.added = capacity, 0
        self.rows = torch.zeros(0, width, dtype=torch.float16, device=device)

    def __len__(self):
        return min(self.added, self.capacity)

    def add(self, rows):
        """rows: (n, width) of any float type."""
        self._grow(min(self.added + len(rows), self.capacity))
        place = (self.added + torch.arange(len(rows), device=rows.device)) % self.capacity
        last = slice(max(0, len(rows) - self.capacity), None)  # of one place written twice torch keeps no promised one
        self.rows[place[last]] = rows[last].to(self.rows.dtype)
        self.added += len(rows)

    def sample(self, count, generator):
        """`count` rows, each drawn anew from all: (count, width) in float32."""
        index = torch.randint(len(self), (count,), generator=generator, device=generator.device)
        return self.rows[moved(index, self.rows.device)].float()

    def state_dict(self):
        return dict(rows=self.rows[: len(self)], added=self.added)

    def load_state_dict(self, state):
        """Take over the rows of a ring of any capacity, the newest ones where this one is smaller.

        Raises ValueError for rows of another width, and for a count that can't be theirs.
        """
        rows, added = state["rows"], state["added"]
        if rows.ndim != 2 or rows.shape[1] != self.rows.shape[1] or len(rows) > added:
            raise ValueError(
                f"a ring {self.rows.shape[1]} wide got {added} rows, of which {tuple(rows.shape)} are left"
            )
        if len(rows) != min(added, self.capacity):  # another capacity: begin with the oldest row that is kept
            rows = rows.roll(-(added % len(rows)), 0)[-self.capacity :] if added > len(rows) else rows[-self.capacity :]
            added = len(rows)
        self.added = added
        self._grow(len(self))
        self.rows[: len(self)] = rows

    def _grow(self, needed):
        while len(self.rows) < needed:
            block = self.rows.new_zeros(min(BLOCK, self.capacity - len(self.rows)), self.rows.shape[1])
            self.rows = torch.cat([self.rows, block])


class HaltingAgent:
    """Acts by `net`, which is trained with the model, and keeps what `net` learns from: a ring and the target network.

    What a slot of the batch was like at a step is a dict: features (B, F), accuracy (B) its share of right answers,
    right (B) whether all are, last (B) whether t = T, action (B) int64. Actions may be anyone's. All ranks keep the
    transitions of all, so that with the same draws they learn the same.
    """

    def __init__(self, net, *, capacity, gamma, tau, epsilon, warmstart, step_cost):
        self.net, self.target = net, copy.deepcopy(net).requires_grad_(False)
        self.gamma, self.tau, self.epsilon, self.warmstart, self.step_cost = gamma, tau, epsilon, warmstart, step_cost
        self.ring = Ring(capacity, 2 * FEATURES + 4, net.projection.device)

    def epsilon_at(self, step):
        """Share of random actions at an optimizer step."""
        last = min(LAST_EPSILON, self.epsilon)
        return self.epsilon + (last - self.epsilon) * min(1.0, step / EPSILON_STEPS)

    @torch.no_grad()
    def act(self, features, right, last, step, draws):
        """features (B, F), right and last (B) bool, draws (B, 2) uniform in [0, 1), on the host -> actions (B) int64.

        For the first `warmstart` steps: halt when all is right; then the better action, or at times a random one. The
        last step always halts.
        """
        halt = right
        if step >= self.warmstart:
            halt = self.net(features).argmax(1) == HALT
            at_random, coin = draws[:, 0] < self.epsilon_at(step), draws[:, 1] < 0.5
            halt = torch.where(moved(at_random, halt.device), moved(coin, halt.device), halt)
        return torch.where(halt | last, HALT, CONTINUE)

    @torch.no_grad()
    def store(self, before, now):
        """Keep one transition a slot: how it was, what was done, and, where it went on, how it is a step later."""
        reward = torch.where(before["right"], RIGHT, WRONG)
        gain = now["accuracy"] - before["accuracy"] - self.step_cost
        columns = torch.stack([x.float() for x in (reward, gain, before["action"], now["last"])], 1)
        self.ring.add(gather_rows(torch.cat([before["features"], now["features"], columns], 1)))

    def loss(self, count, generator):
        """Huber loss of both values on `count` transitions, a scalar; None while there are fewer than LEARN_FROM.

        To halt is regressed at every state, since the labels tell what it is worth; to go on where that was done.
        """
        if len(self.ring) < LEARN_FROM:
            return None
        here, after, rest = self.ring.sample(count, generator).split([FEATURES, FEATURES, 4], 1)
        reward, gain, action, last = rest.unbind(1)
        with torch.no_grad():
            best = self.net(after).argmax(1).masked_fill(last.bool(), HALT)
            worth = gain + self.gamma * self.target(after).gather(1, best[:, None])[:, 0]
        values = self.net(here)
        went_on = F.huber_loss(values[:, CONTINUE], worth, reduction="none") * (action == CONTINUE)
        return (F.huber_loss(values[:, HALT], reward, reduction="none") + went_on).mean()

    @torch.no_grad()
    def follow(self):
        """The target network takes a step of `tau` towards the network: after each optimizer step."""
        torch._foreach_lerp_(list(self.target.parameters()), list(self.net.parameters()), self.tau)

    def state_dict(self):
        return dict(target=self.target.state_dict(), ring=self.ring.state_dict())

    def load_state_dict(self, state):
        self.target.load_state_dict(state["target"])
        self.ring.load_state_dict(state["ring"])
