"""A causal decoder of symbols over a memory, with a block that guesses one symbol further.

B batch, L answer, N memory, D width, V symbols. Multi-token prediction: DeepSeek-V3 (arXiv 2412.19437), section 2.2.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from models.hrm import ROPE_BASE, DecoderBlock
from models.transformer import Block, RMSNorm, Rotary
from models.trm import rms


class Decoder(nn.Module):
    """Symbols before -> the next one; the head is the table of symbols. mtp: with the block that looks further."""

    def __init__(self, *, symbols, begin, d_model, n_heads, layers, length, mtp):
        super().__init__()
        self.begin, sizes = begin, dict(d_model=d_model, n_heads=n_heads)
        self.embedding = nn.Embedding(symbols, d_model)
        nn.init.normal_(self.embedding.weight, std=d_model**-0.5)
        self.rotary = Rotary(d_model // n_heads, length, ROPE_BASE)
        self.blocks = nn.ModuleList(DecoderBlock(**sizes) for _ in range(layers))
        self.norm = RMSNorm(d_model)
        if mtp:
            self.merge = nn.Linear(2 * d_model, d_model, bias=False)
            self.further = Block(**sizes, ffn_mult=2, dropout=0.0)

    def embed(self, symbols):
        return self.embedding(symbols) * self.embedding.embedding_dim**0.5

    def forward(self, target, memory):
        """target (B, L), memory (B, N, D) -> hidden states (B, L, D); number i has seen the symbols before i."""
        h = self.embed(F.pad(target[:, :-1], (1, 0), value=self.begin))
        for block in self.blocks:
            h = block(h, self.rotary, block.keys(memory), None)
        return self.norm(h)

    def logits(self, h):
        """h (..., D) -> (..., V)."""
        return F.linear(h, self.embedding.weight)

    def ahead(self, h, target):
        """Hidden states h (B, L, D) and symbols target (B, L) -> (B, L - 1, D); number i guesses symbol i + 1.

        It sees what h_i has seen, and symbol i.
        """
        both = torch.cat([rms(h[:, :-1]), rms(self.embed(target[:, :-1]))], -1)
        return self.norm(self.further(self.merge(both), self.rotary))

    @torch.no_grad()
    def generate(self, memory, *, length, end, choose):
        """memory (B, N, D) -> symbols (B, length); after `end` only that. choose: logits (B, V) -> (B)."""
        symbols = torch.full((len(memory), length), end, device=memory.device)
        going = torch.ones(len(memory), dtype=torch.bool, device=memory.device)
        for i in range(length):
            chosen = choose(self.logits(self(symbols[:, : i + 1], memory)[:, i]))
            symbols[:, i] = torch.where(going, chosen, end)
            going &= chosen != end
            if not going.any():
                break
        return symbols
