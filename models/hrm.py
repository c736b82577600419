"""An encoder reads a prompt, a recursive core reasons about it, and a causal decoder or a head per cell answers.

B batch, S prompt, T answer, C width, V vocabulary, D head dim. Hierarchical Reasoning Model (arXiv 2506.21734) with
deep supervision: a segment is one forward and backward pass, and the next segment starts from its detached states.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from models.cross_entropy import CHUNK, linear_cross_entropy
from models.transformer import Attention, RMSNorm, Rotary
from models.trm import Core, SelfAttention, attend, boxes, grid, rms

ROPE_BASE = 10000.0  # slowest rotary wavelength, in units of 2 pi tokens


class NoRotation(nn.Module):
    """The identity, in place of Rotary in models without rotary positions."""

    def forward(self, x, start=0):
        return x


class ReluSquared(nn.Module):
    """W_2 relu(W_1 x + b_1)^2 + b_2 (Primer, arXiv 2109.08668): (..., C) -> (..., C)."""

    def __init__(self, *, d_model):
        super().__init__()
        self.up, self.down = nn.Linear(d_model, 4 * d_model), nn.Linear(4 * d_model, d_model)

    def forward(self, x):
        return self.down(F.relu(self.up(x)).square())


class EncoderBlock(nn.Module):
    """Pre-norm bidirectional attention and MLP: (B, S, C) -> (B, S, C). bias as in `attend`."""

    def __init__(self, *, d_model, n_heads):
        super().__init__()
        self.attention_norm, self.ffn_norm = RMSNorm(d_model), RMSNorm(d_model)
        self.attention = SelfAttention(d_model=d_model, n_heads=n_heads)
        self.ffn = ReluSquared(d_model=d_model)

    def forward(self, h, rotary, bias):
        h = h + self.attention(self.attention_norm(h), rotary, bias)
        return h + self.ffn(self.ffn_norm(h))


class DecoderBlock(nn.Module):
    """Pre-norm causal self-attention, cross-attention to the memory, MLP: (B, T, C) -> (B, T, C)."""

    def __init__(self, *, d_model, n_heads):
        super().__init__()
        self.attention_norm, self.memory_norm, self.ffn_norm = (RMSNorm(d_model) for _ in range(3))
        self.attention = Attention(d_model=d_model, n_heads=n_heads)
        self.query = nn.Linear(d_model, d_model, bias=False)
        self.key_value = nn.Linear(d_model, 2 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)
        self.ffn = ReluSquared(d_model=d_model)

    def split_heads(self, x):
        """Split the last dimension into heads: (B, T, n C) -> (B, n heads, T, D)."""
        B, T, _ = x.shape
        return x.view(B, T, -1, self.query.in_features // self.attention.n_heads).transpose(1, 2)

    def keys(self, memory):
        """memory (B, S, C) -> keys and values (2, B, heads, S, D), computed once per prompt."""
        return torch.stack(self.split_heads(self.key_value(memory)).chunk(2, 1))

    def forward(self, h, rotary, keys, bias, cache=None, start=0):
        """bias: of the keys, as in `attend`; cache and start as in transformer.Attention."""
        h = h + self.attention(self.attention_norm(h), rotary, True, cache, start)
        q = self.split_heads(self.query(self.memory_norm(h)))
        h = h + self.out(attend(q, *keys.to(q.dtype), bias))
        return h + self.ffn(self.ffn_norm(h))


class HRM(nn.Module):
    """Encoder, core and decoder; with decoder_layers 0 a head fills in each cell of the prompt instead."""

    def __init__(self, *, vocab_size, d_model, max_seq_len, n_heads, encoder_layers, decoder_layers, core,
                 core_layers, share, h_cycles, l_steps, grad, ffn_dim, positions, relation_bias, halting,
                 halting_weight):  # fmt: skip
        """Arguments as in train_hrm.HrmConfig. core, h_cycles, l_steps, share and grad as in trm.Core.

        vocab_size: V. max_seq_len: longest prompt and longest answer. ffn_dim: inner width of the core, 0 = twice
        d_model. positions: `rope`, `ends` (embeddings of the distance to the first and to the last token of the
        prompt) or `grid` (embeddings of row, column and box). relation_bias: with trm.boxes. halting: a head learns
        whether all labels of a sample are right.
        forward: a batch of prompts (B, S) and labels (B, T) -> loss, report and states of the next segment.
        Raises ValueError for arguments that do not go together.
        """
        super().__init__()
        if halting and core != "recursive":
            raise ValueError(f"halting needs core recursive, found core {core}")
        if relation_bias and positions != "grid" or positions == "grid" and decoder_layers:
            raise ValueError(
                f"positions {positions}, decoder_layers {decoder_layers}: relation_bias needs positions grid, and "
                "positions grid needs decoder_layers 0"
            )
        self.max_seq_len, self.positions = max_seq_len, positions
        self.halting = halting
        self.halting_weight = halting_weight
        self.cells = not decoder_layers
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.rotary = Rotary(d_model // n_heads, max_seq_len, ROPE_BASE) if positions == "rope" else NoRotation()
        if positions == "ends":
            self.from_first, self.from_last = (nn.Embedding(max_seq_len, d_model) for _ in range(2))
            if decoder_layers:
                self.in_answer = nn.Embedding(max_seq_len, d_model)
        if positions == "grid":
            place = grid(max_seq_len)
            self.places = nn.Embedding(3 * (int(place.max()) + 1), d_model)
            offset = torch.arange(3)[:, None] * (int(place.max()) + 1)
            self.register_buffer("place", place + offset, persistent=False)  # (3, S)
        for table in self.modules():
            if isinstance(table, nn.Embedding):
                nn.init.normal_(table.weight, std=0.6 if positions == "grid" else 0.5)
        sizes = dict(d_model=d_model, n_heads=n_heads)
        self.encoder = nn.ModuleList(EncoderBlock(**sizes) for _ in range(encoder_layers))
        self.core = Core(
            **sizes, core=core, core_layers=core_layers, share=share, h_cycles=h_cycles, l_steps=l_steps, grad=grad,
            ffn_dim=ffn_dim or 2 * d_model, relation=boxes(max_seq_len, n_heads) if relation_bias else None,
            mixer="attention", norm="post", length=None, recompute=False,
        )  # fmt: skip
        self.remembers_prompt = decoder_layers > 0 and core != "none"
        self.decoder = nn.ModuleList(DecoderBlock(**sizes) for _ in range(decoder_layers))
        self.norm = RMSNorm(d_model) if decoder_layers else None
        self.head = nn.Linear(d_model, vocab_size, bias=False)
        nn.init.normal_(self.head.weight, std=0.3 * d_model**-0.5)  # the first loss is 0.045 nat above ln V
        if halting:
            self.halt = nn.Linear(d_model, 1)
            nn.init.zeros_(self.halt.weight)
            nn.init.constant_(self.halt.bias, -3.0)

    def encode(self, ids, mask=None):
        """Encode prompts: ids (B, S), mask (B, S), 0 = padding -> x (B, S, C), bias of the keys (B, 1, 1, S) or None.

        mask None: no padding. Raises ValueError for a prompt beyond max_seq_len.
        """
        B, S = ids.shape
        if S > self.max_seq_len:
            raise ValueError(f"prompt of {S} tokens, the model was built for max_seq_len {self.max_seq_len}")
        x = self.embedding(ids)
        bias = None
        if self.positions == "ends":
            place = torch.arange(S, device=ids.device)
            length = S if mask is None else mask.sum(1, keepdim=True)
            x = x + self.from_first(place) + self.from_last((length - 1 - place).clamp_min(0))
        if self.positions == "grid":
            x = x + self.places(self.place).sum(0)
        if mask is not None:
            bias = torch.zeros(mask.shape, device=x.device).masked_fill(mask == 0, -math.inf)[:, None, None]
        for block in self.encoder:
            x = block(x, self.rotary, bias)
        return (rms(x) if self.encoder else x), bias

    def start(self, x):
        """Return the states before the first segment: z_H, z_L, each (B, S, C). With a decoder z_H starts at x."""
        if not self.core.recursive:
            return x, x
        z_H, z_L = self.core.start(x)
        return (z_H if self.cells else x), z_L

    def confidence(self, z_H, mask=None):
        """Return the logit that all labels are right, from the mean of z_H (B, S, C) over the prompt: (B)."""
        mask = torch.ones_like(z_H[..., :1]) if mask is None else mask[..., None]
        return self.halt((z_H * mask).sum(1) / mask.sum(1))[:, 0].float()

    def answer(self, x, z_H, bias, decoder_input_ids):
        """Return the hidden states that the head reads: of the cells (B, S, C), or of the decoder (B, T, C)."""
        if self.cells:
            return z_H
        memory = self.memory(x, z_H)
        h = self.embedding(decoder_input_ids)
        if h.shape[1] > self.max_seq_len:
            raise ValueError(f"answer of {h.shape[1]} tokens, the model was built for max_seq_len {self.max_seq_len}")
        if self.positions == "ends":
            h = h + self.in_answer.weight[: h.shape[1]]
        for block in self.decoder:
            h = block(h, self.rotary, block.keys(memory), bias)
        return self.norm(h)

    def memory(self, x, z_H):
        """Return the memory that the decoder attends to, one vector per token of the prompt: (B, S, C)."""
        return x + z_H if self.remembers_prompt else z_H

    def guess(self, h):
        """Return the most likely id at each position: h (B, T, C) -> (B, T). CHUNK positions have logits at a time."""
        parts = h.flatten(0, 1).split(CHUNK)
        return torch.cat([F.linear(part, self.head.weight).argmax(-1) for part in parts]).view(h.shape[:2])

    def forward(self, batch, carry=None, targets=None):
        """Run one segment -> (loss, report, carry for the next segment of the same batch).

        batch: encoder_ids (B, S); labels (B, T), -100 = not counted; decoder_input_ids (B, T) for a decoder;
        encoder_mask (B, S) if there is padding, with at least one 1 per row.
        loss: sum of nats divided by `targets` (by default the number of labels), plus halting_weight times the binary
        cross-entropy of the halting head. The report is detached: nats (B, T), and with halting `right` (B), whether
        all labels of the sample are right, and `halt` (B), the logit of that.
        """
        mask, labels = batch.get("encoder_mask"), batch["labels"]
        x, bias = self.encode(batch["encoder_ids"], mask)
        z_H, z_L = self.core(x, *(carry or self.start(x)), self.rotary, bias)
        h = self.answer(x, z_H, bias, batch.get("decoder_input_ids"))
        total, nats = linear_cross_entropy(h, self.head.weight, labels)
        loss = total / (targets or (labels >= 0).sum())
        report = dict(nats=nats)
        if self.halting:
            logit = self.confidence(z_H, mask)
            right = ((self.guess(h.detach()) == labels) | (labels < 0)).all(1)
            loss = loss + self.halting_weight * F.binary_cross_entropy_with_logits(logit, right.float())
            report |= dict(right=right, halt=logit.detach())
        return loss, report, (z_H.detach(), z_L.detach())

    @torch.no_grad()
    def think(self, ids, mask, segments, threshold):
        """Reason for up to `segments` segments; a sample whose halting logit is above `threshold` leaves the batch.

        ids, mask: (B, S) -> x (B, S, C), bias of the keys, z_H (B, S, C), number of segments of each sample (B).
        """
        x, bias = self.encode(ids, mask)
        z_H, z_L = self.start(x)
        last = torch.empty_like(x)
        used = torch.zeros(len(x), dtype=torch.long, device=x.device)
        going = torch.arange(len(x), device=x.device)
        for _ in range(segments):
            z_H, z_L = self.core(x[going], z_H, z_L, self.rotary, bias if bias is None else bias[going])
            last[going], used[going] = z_H.to(x.dtype), used[going] + 1
            if self.halting and threshold < math.inf:
                stay = self.confidence(z_H, mask if mask is None else mask[going]) <= threshold
                going, z_H, z_L = going[stay], z_H[stay], z_L[stay]
                if not len(going):
                    break
        return x, bias, last, used

    @torch.no_grad()
    def trace(self, batch, segments):
        """Score a batch of `forward` after each of `segments` segments -> {name: (B, segments)}.

        nats: sum over the labels. hits: number of right labels; with a head per cell only blank cells (id 0) count.
        right: whether all labels are right. halt (with halting): the logit of that. A decoder reads the right answer
        so far, so `right` says whether greedy decoding gives the whole answer.
        """
        mask, labels = batch.get("encoder_mask"), batch["labels"]
        x, bias = self.encode(batch["encoder_ids"], mask)
        z_H, z_L = self.start(x)
        scores = {}
        scored = labels >= 0 if not self.cells else batch["encoder_ids"] == 0
        for _ in range(segments):
            z_H, z_L = self.core(x, z_H, z_L, self.rotary, bias)
            h = self.answer(x, z_H, bias, batch.get("decoder_input_ids"))
            hit = self.guess(h) == labels
            nats = linear_cross_entropy(h, self.head.weight, labels)[1].sum(1)
            after = dict(nats=nats, hits=(hit & scored).sum(1), right=(hit | (labels < 0)).all(1))
            if self.halting:
                after["halt"] = self.confidence(z_H, mask)
            for name, values in after.items():
                scores.setdefault(name, []).append(values)
        return {name: torch.stack(values, 1) for name, values in scores.items()}

    def solve(self, ids, segments, threshold=math.inf):
        """Fill in puzzles: ids (B, S) -> (answer of each cell (B, S), segments used (B))."""
        x, bias, z_H, used = self.think(ids, None, segments, threshold)
        return self.guess(self.answer(x, z_H, bias, None)), used

    def compiled(self):
        """Compile each stack of the core in place -> self; weights keep their names."""
        for stack in self.core.stacks:
            stack.compile()
        return self

    def frozen(self):
        """Prepare the model for answering; it can't be trained afterwards -> self.

        Weights of the decoder that are taller than wide are stored by columns. For one token at a time a CPU reads
        them two to three times as fast.
        """
        for part in [self.head, *self.decoder.modules()]:
            if isinstance(part, nn.Linear) and part.out_features > part.in_features:
                part.weight.data = part.weight.data.T.contiguous().T
        return self.requires_grad_(False).eval()

    def init_state(self, x, z_H, bias):
        """Return an empty cache for `step`: (position, cache of the answer, keys of the memory, their bias).

        The cache is (layers, 2, B, heads, max_seq_len, D), keys and values of the memory (layers, 2, B, heads, S, D).
        """
        memory = self.memory(x, z_H)
        keys = torch.stack([block.keys(memory) for block in self.decoder])
        layers, _, B, heads, _, D = keys.shape
        return 0, keys.new_zeros(layers, 2, B, heads, self.max_seq_len, D), keys, bias

    @torch.no_grad()
    def step(self, ids, state):
        """ids (B, T) that follow `state` -> (logits after the last id (B, V), new state).

        T > 1 only from an empty state. Raises ValueError beyond max_seq_len.
        """
        start, cache, keys, bias = state
        T = ids.shape[1]
        if start + T > self.max_seq_len:
            raise ValueError(f"{start} + {T} tokens do not fit max_seq_len {self.max_seq_len}")
        h = self.embedding(ids)
        if self.positions == "ends":
            h = h + self.in_answer.weight[start : start + T]
        for block, block_cache, memory in zip(self.decoder, cache, keys, strict=True):
            h = block(h, self.rotary, memory, bias, block_cache, start)
        return F.linear(self.norm(h[:, -1]), self.head.weight), (start + T, cache, keys, bias)

    @torch.no_grad()
    def generate(self, ids, mask, *, bos_id, eos_id, max_new_tokens, segments, threshold, choose):
        """Answer prompts: ids, mask (B, S) -> (B lists of ids without BOS and EOS, segments used (B)).

        choose: function of logits (B, V) -> ids (B, 1). An answer ends, and leaves the batch, at EOS; otherwise it ends
        after max_new_tokens or at max_seq_len.
        """
        x, bias, z_H, used = self.think(ids, mask, segments, threshold)
        state = self.init_state(x, z_H, bias)
        answers = [[] for _ in ids]
        going = torch.arange(len(ids), device=ids.device)
        token = torch.full_like(ids[:, :1], bos_id)
        for _ in range(min(max_new_tokens, self.max_seq_len)):
            logits, state = self.step(token, state)
            token = choose(logits)
            stay = token[:, 0] != eos_id
            if not stay.all():
                start, cache, keys, bias = state
                state = start, cache[:, :, stay], keys[:, :, stay], bias if bias is None else bias[stay]
                going, token = going[stay], token[stay]
            if not len(going):
                break
            for i, id_ in zip(going.tolist(), token[:, 0].tolist(), strict=True):
                answers[i].append(id_)
        return answers, used
