"""A small Q-network beside the model that learns from rewards when to stop reasoning.

B batch, D width, t steps so far, T most steps, F = 36 features. Halting is rewarded with RIGHT or WRONG. Continuing is
rewarded with the gain in the share of right symbols, less a cost. Deep Q-learning with a slowly moving target network
(Mnih et al. 2015) that values the action chosen by the network itself (double DQN, arXiv 1509.06461).
"""

import copy

import torch
import torch.nn as nn
import torch.nn.functional as F

from models.optim.adam_atan2 import gather_rows, moved

HALT, CONTINUE = 0, 1  # the actions, and the columns of QNet's output
RIGHT, WRONG = 1.0, -0.5  # reward of halting when all is right, and otherwise
PROJECTED = 32  # random projections of the state
HIDDEN = 128  # hidden width
FEATURES = PROJECTED + 4  # F
LAST_EPSILON = 0.05  # final share of random actions
EPSILON_STEPS = 200_000  # steps until it is reached
LEARN_FROM = 1000  # transitions in the ring before learning starts
BLOCK = 65_536  # transitions that the ring allocates at a time


class QNet(nn.Module):
    """Values of both actions: features (B, F) -> (B, 2), in float32."""

    def __init__(self, *, d_model):
        super().__init__()
        self.register_buffer("projection", nn.init.orthogonal_(torch.empty(d_model, PROJECTED)))  # fixed
        self.layers = nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 2))

    @torch.no_grad()
    def features(self, z_mean, share, q, confidence, changed):
        """Build the features of a step (B, F) from z_mean (B, D) and share, q, confidence, changed: (B) each.

        z_mean: mean of the state over its positions. share: t / T. q: logit that the answer is right. confidence: mean
        probability of the answer's symbols. changed: share of the symbols that differ from the previous step.
        """
        with torch.autocast(z_mean.device.type, enabled=False):
            rest = torch.stack([share, q, confidence, changed], 1).float()
            return torch.cat([z_mean.float() @ self.projection, rest], 1)

    def forward(self, features):
        with torch.autocast(features.device.type, enabled=False):  # the cost of a step is below bfloat16's resolution
            return self.layers(features)


class Ring:
    """The newest `capacity` rows of `width` numbers in float16; memory is allocated block by block."""

    def __init__(self, capacity, width, device):
        self.capacity = capacity
        self.added = 0
        self.rows = torch.zeros(0, width, dtype=torch.float16, device=device)

    def __len__(self):
        return min(self.added, self.capacity)

    def add(self, rows):
        """Append rows (n, width) of any float type; they replace the oldest ones once the ring is full."""
        self._grow(min(self.added + len(rows), self.capacity))
        place = (self.added + torch.arange(len(rows), device=rows.device)) % self.capacity
        # with duplicate indices torch does not define which write wins
        last = slice(max(0, len(rows) - self.capacity), None)
        self.rows[place[last]] = rows[last].to(self.rows.dtype)
        self.added += len(rows)

    def sample(self, count, generator):
        """Draw `count` rows with replacement: (count, width) in float32."""
        index = torch.randint(len(self), (count,), generator=generator, device=generator.device)
        return self.rows[moved(index, self.rows.device)].float()

    def state_dict(self):
        return dict(rows=self.rows[: len(self)], added=self.added)

    def load_state_dict(self, state):
        """Load the rows of a ring of any capacity; a smaller ring keeps the newest ones.

        Raises ValueError for rows of another width, or more rows than were ever added.
        """
        rows, added = state["rows"], state["added"]
        if rows.ndim != 2 or rows.shape[1] != self.rows.shape[1] or len(rows) > added:
            raise ValueError(
                f"rows of shape {tuple(rows.shape)} after {added} additions: expected a ring of width "
                f"{self.rows.shape[1]}, and no more rows than additions"
            )
        if len(rows) != min(added, self.capacity):  # another capacity: sort the rows from the oldest on
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
    """Acts by `net` and holds what `net` learns from: a ring of transitions and the target network.

    A step of the batch is a dict: features (B, F), accuracy (B), the share of right symbols, right (B), whether all are
    right, last (B), whether t = T, and action (B) int64. Actions may come from any policy. Every rank stores the
    transitions of all ranks, so that with the same draws all learn the same.
    """

    def __init__(self, net, *, capacity, gamma, tau, epsilon, warmstart, step_cost):
        """net: QNet of the model. capacity: transitions in the ring. gamma: discount. tau: step of the target.

        epsilon: initial share of random actions. warmstart: steps that act by the labels. step_cost: of continuing.
        """
        self.net = net
        self.target = copy.deepcopy(net).requires_grad_(False)
        self.gamma, self.tau, self.epsilon, self.warmstart, self.step_cost = gamma, tau, epsilon, warmstart, step_cost
        self.ring = Ring(capacity, 2 * FEATURES + 4, net.projection.device)

    def epsilon_at(self, step):
        """Return the share of random actions at an optimizer step."""
        last = min(LAST_EPSILON, self.epsilon)
        return self.epsilon + (last - self.epsilon) * min(1.0, step / EPSILON_STEPS)

    @torch.no_grad()
    def act(self, features, right, last, step, draws):
        """Choose actions (B) int64 from features (B, F), right and last (B) bool.

        draws: (B, 2) uniform in [0, 1), on the host, for the random actions. For the first `warmstart` steps a sample
        halts when all is right. After that it takes the better action, or a random one with probability epsilon. The
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
        """Store one transition per sample, from the dict of a step (`before`) and of the next step (`now`)."""
        reward = torch.where(before["right"], RIGHT, WRONG)
        gain = now["accuracy"] - before["accuracy"] - self.step_cost
        columns = torch.stack([x.float() for x in (reward, gain, before["action"], now["last"])], 1)
        self.ring.add(gather_rows(torch.cat([before["features"], now["features"], columns], 1)))

    def loss(self, count, generator):
        """Return the Huber loss of both values on `count` transitions, a scalar; None before LEARN_FROM transitions.

        The value of halting is fitted at every state, since the labels give its reward; the value of continuing only
        where the action was to continue.
        """
        if len(self.ring) < LEARN_FROM:
            return None
        here, after, rest = self.ring.sample(count, generator).split([FEATURES, FEATURES, 4], 1)
        reward, gain, action, last = rest.unbind(1)
        with torch.no_grad():
            best = self.net(after).argmax(1).masked_fill(last.bool(), HALT)
            goal = gain + self.gamma * self.target(after).gather(1, best[:, None])[:, 0]
        values = self.net(here)
        continued = F.huber_loss(values[:, CONTINUE], goal, reduction="none") * (action == CONTINUE)
        return (F.huber_loss(values[:, HALT], reward, reduction="none") + continued).mean()

    @torch.no_grad()
    def follow(self):
        """Move the target network by `tau` towards the network; call it after each optimizer step."""
        torch._foreach_lerp_(list(self.target.parameters()), list(self.net.parameters()), self.tau)

    def restart(self):
        """Restart the target network from the network, after weights of another run were loaded."""
        self.target.load_state_dict(self.net.state_dict())

    def state_dict(self):
        return dict(target=self.target.state_dict(), ring=self.ring.state_dict())

    def load_state_dict(self, state):
        self.target.load_state_dict(state["target"])
        self.ring.load_state_dict(state["ring"])
