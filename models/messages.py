"""Messages between all elements of a small set, without a list of edges.

B sets, T elements, C width. Message passing with a two-layer message network, "interaction network" (arXiv 1806.01261,
section 4.2). The first Linear reads a pair, so it is the sum of a Linear of the receiver and one of the sender: O(T)
products. The last Linear commutes with the mean over senders, so it is applied after the mean. Only the relu between
them sees T^2 pairs.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F


def message_weights(mask):
    """Return the weight of sender j in the mean of receiver i: mask (B, T), True for elements -> (B, T, T).

    It is 1 / (number of elements of the set), itself included, and 0 if i or j is no element.
    """
    pairs = (mask[:, :, None] & mask[:, None]).float()
    return pairs / pairs.sum(-1, keepdim=True).clamp_min(1)


class MessageLayer(nn.Module):
    """x + GELU(W [LN x, m]) with m_i = W2 sum_j w_ij relu(U x_i + V x_j + b).

    x (B, T, C), weight (B, T, T) as of `message_weights` -> (B, T, C).
    """

    def __init__(self, width):
        super().__init__()
        self.receiver = nn.Linear(width, width)  # U and b
        self.sender = nn.Linear(width, width, bias=False)  # V
        self.message = nn.Linear(width, width)  # W2
        self.norm = nn.LayerNorm(width)
        self.update = nn.Linear(2 * width, width)  # W

    def messages(self, x, weight):
        """Return the messages m alone: (B, T, C)."""
        pairs = F.relu_(self.receiver(x)[:, :, None] + self.sender(x)[:, None])  # (B, receiver, sender, C)
        mean = weight.to(pairs.dtype)[:, :, None] @ pairs  # (B, T, 1, C)
        return self.message(mean.squeeze(2))

    def forward(self, x, weight):
        return x + F.gelu(self.update(torch.cat([self.norm(x), self.messages(x, weight)], -1)))


class MessageNetwork(nn.Module):
    """Linear, GELU, message layers: x (B, T, inputs), weight (B, T, T) -> (B, T, width)."""

    def __init__(self, *, inputs, width, layers):
        super().__init__()
        self.inward = nn.Linear(inputs, width)
        self.layers = nn.ModuleList(MessageLayer(width) for _ in range(layers))

    def forward(self, x, weight):
        x = F.gelu(self.inward(x))
        for layer in self.layers:
            x = layer(x, weight)
        return x
