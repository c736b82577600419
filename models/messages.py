"""Messages between all elements of a small set, without a list of edges.

B sets, T elements, C width. Message passing with a two-layer message network, "interaction network" (arXiv 1806.01261,
section 4.2). Its first Linear reads a pair, so it is the sum of one per receiver and one per sender, O(T) of them; its
last commutes with the mean over senders, so it comes after it. Only the relu between them sees T^2 pairs.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F


def message_weights(mask):
    """mask (B, T) -> (B, T, T): of what i hears, j's share is 1 / degree of i, itself included; 0 where either is not.

    mask: True where there is an element.
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
        """m alone: (B, T, C)."""
        pairs = F.relu_(self.receiver(x)[:, :, None] + self.sender(x)[:, None])  # (B, receiver, sender, C)
        heard = weight.to(pairs.dtype)[:, :, None] @ pairs  # (B, T, 1, C)
        return self.message(heard.squeeze(2))

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
