"""A causal decoder of symbols over a memory, with an optional block that predicts one symbol further ahead.

B batch, L answer, N memory, D width, V symbols. Multi-token prediction: DeepSeek-V3 (arXiv 2412.19437), section 2.2.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from models.hrm import ROPE_BASE, DecoderBlock
from models.transformer import RMSNorm, Rotary, TransformerBlock
from models.trm import rms


class Decoder(nn.Module):
    """Predict the next symbol from the symbols before it; the head is the embedding."""

    def __init__(self, *, symbols, begin, d_model, n_heads, layers, length, mtp):
        """symbols: V. begin: id of the first input. length: L. mtp: add the block for one symbol further ahead."""
        super().__init__()
        self.begin = begin
        sizes = dict(d_model=d_model, n_heads=n_heads)
        self.embedding = nn.Embedding(symbols, d_model)
        nn.init.normal_(self.embedding.weight, std=d_model**-0.5)
        self.rotary = Rotary(d_model // n_heads, length, ROPE_BASE)
        self.blocks = nn.ModuleList(DecoderBlock(**sizes) for _ in range(layers))
        self.norm = RMSNorm(d_model)
        if mtp:
            self.merge = nn.Linear(2 * d_model, d_model, bias=False)
            self.further = TransformerBlock(**sizes, ffn_mult=2, dropout=0.0)

    def embed(self, symbols):
        """symbols (...) -> (..., D), of variance 1 at the start."""
        return self.embedding(symbols) * self.embedding.embedding_dim**0.5

    def forward(self, target, memory):
        """target (B, L), memory (B, N, D) -> hidden states (B, L, D); state i has seen the symbols before i."""
        h = self.embed(F.pad(target[:, :-1], (1, 0), value=self.begin))
        for block in self.blocks:
            h = block(h, self.rotary, block.keys(memory), None)
        return self.norm(h)

    def logits(self, h):
        """h (..., D) -> (..., V)."""
        return F.linear(h, self.embedding.weight)

    def ahead(self, h, target):
        """Hidden states h (B, L, D), symbols target (B, L) -> (B, L - 1, D); state i predicts symbol i + 1.

        State i has seen symbol i and everything that h_i has seen.
        """
        both = torch.cat([rms(h[:, :-1]), rms(self.embed(target[:, :-1]))], -1)
        return self.norm(self.further(self.merge(both), self.rotary))

    @torch.no_grad()
    def generate(self, memory, *, length, end, choose):
        """memory (B, N, D) -> symbols (B, length), filled with `end` after the first `end`.

        choose: function of logits (B, V) -> symbols (B).
        """
        symbols = torch.full((len(memory), length), end, device=memory.device)
        going = torch.ones(len(memory), dtype=torch.bool, device=memory.device)  # answers without an `end` so far
        for i in range(length):
            chosen = choose(self.logits(self(symbols[:, : i + 1], memory)[:, i]))
            symbols[:, i] = torch.where(going, chosen, end)
            going &= chosen != end
            if not going.any():
                break
        return symbols
