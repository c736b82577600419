"""Points in, formulas out: a set encoder and a causal decoder that writes formulas in prefix order.

B batch, T tokens of a sequence <bos> [prompt] <expression> PREFIX </expression> <eos>, M points, D variables (also the
head dim of keys), V tokens of the alphabet, S encoder vectors per set, C width, H heads, R rows decoded side by side,
L length of PREFIX. Open slots are operands still to be written: 1 after <expression>; an operator of arity a adds
a - 1; at 0 the formula is complete.
NeSymReS (arXiv 2106.06427), Flash-ANSR (2602.08885); decoding within the grammar: DSR (1912.04871), section 3.1.
"""

import inspect
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from models.set_transformer import BITS, FFN, Norm, SetAttention, SetTransformer, ieee_bits
from models.transformer import Attention, Rotary

MARKS = "<bos> <expression> </expression> <eos>".split()  # in every sequence
ROPE_BASE = 10_000
CPU_ROWS = 32  # rows of like length that go through the decoder together on a CPU; fewer make its products inefficient


class Encoded(NamedTuple):
    """An encoded set of points."""

    keys: list  # (keys, values) for each decoder layer, (B, H, S, D) each
    variables: torch.Tensor  # (B, D) bool: variables that formulas may have


class State(NamedTuple):
    """State of `step` for R rows."""

    position: int  # number of tokens read
    cache: torch.Tensor  # their keys and values (layers, 2, R, H, T, D)
    open: torch.Tensor  # open slots (R,)
    keys: list  # of the points, as in Encoded


def _no_rotation(x, start=0):
    return x


class DecoderBlock(nn.Module):
    """Pre-norm causal self-attention, cross-attention to the points and FFN, each added: (B, T, C) -> (B, T, C)."""

    def __init__(self, *, dim, memory_dim, n_heads, ffn_hidden_dim, dropout, self_attn_norm, cross_attn_norm, ffn_norm):
        super().__init__()
        self.self_attn_norm, self.cross_attn_norm = Norm(self_attn_norm, dim), Norm(cross_attn_norm, dim)
        self.self_attention = Attention(d_model=dim, n_heads=n_heads)
        self.cross_attention = SetAttention(dim=dim, memory_dim=memory_dim, n_heads=n_heads)
        self.ffn_norm, self.ffn = Norm(ffn_norm, dim), FFN(dim=dim, hidden_dim=ffn_hidden_dim)
        self.dropout = nn.Dropout(dropout)

    def keys(self, memory, rotary):
        """memory (B, S, memory_dim) -> keys and values of the points (B, H, S, D) each, computed once per set."""
        return self.cross_attention.keys(memory, rotary)

    def forward(self, x, keys, rotary, cross_rotary, cache=None, start=0):
        x = x + self.dropout(self.self_attention(self.self_attn_norm(x), rotary, True, cache, start))
        x = x + self.dropout(self.cross_attention(self.cross_attn_norm(x), keys, None, cross_rotary, start))
        return x + self.dropout(self.ffn(self.ffn_norm(x)))


class FlashANSRModel(nn.Module):
    """Encoder of points and decoder of formulas over `alphabet`."""

    def __init__(
        self, alphabet, *, encoder_max_n_variables, encoder_dim, encoder_n_heads, encoder_n_isab, encoder_n_sab,
        encoder_n_inducing_points, encoder_n_seeds, encoder_ffn_hidden_dim, encoder_dropout, encoder_attn_norm,
        encoder_ffn_norm, encoder_output_norm, decoder_input_dim, decoder_model_dim, decoder_n_heads, decoder_n_layers,
        decoder_max_seq_len, decoder_ffn_hidden_dim, decoder_dropout, decoder_block_self_attn_norm,
        decoder_block_cross_attn_norm, decoder_block_ffn_norm, decoder_cross_attn_kv_norm, decoder_output_norm,
        decoder_use_rope_self_attn, decoder_use_rope_cross_attn, float_features, pre_encoder_noise_scale,
        use_checkpointing,
    ):  # fmt: skip
        """Arguments as in train_sr.ModelConfig; alphabet: tokens, ids, arity and variables of the formulas.

        encoder_max_n_variables: columns of the points with y, 0 = variables of the alphabet + 1. decoder_input_dim:
        width of the encoder's vectors. pre_encoder_noise_scale: noise on `ieee` features in training.
        forward: ids (B, T), points (B, M, D + 1) -> logits (B, T, V).
        Raises ValueError for sizes that do not fit together.
        """
        args = {name: value for name, value in locals().items() if name in ARGUMENTS}
        super().__init__()
        _check(alphabet, args)
        self.alphabet, self.model_args = alphabet, args
        self.max_seq_len, self.use_checkpointing = decoder_max_seq_len, use_checkpointing
        self.encoder = SetTransformer(
            n_columns=encoder_max_n_variables or len(alphabet.variables) + 1, float_features=float_features,
            noise_scale=pre_encoder_noise_scale, dim=encoder_dim, n_heads=encoder_n_heads, n_isab=encoder_n_isab,
            n_sab=encoder_n_sab, n_inducing_points=encoder_n_inducing_points, n_seeds=encoder_n_seeds,
            ffn_hidden_dim=encoder_ffn_hidden_dim, dropout=encoder_dropout, attn_norm=encoder_attn_norm,
            ffn_norm=encoder_ffn_norm, output_norm=encoder_output_norm, output_dim=decoder_input_dim,
            use_checkpointing=use_checkpointing,
        )  # fmt: skip
        self.memory_norm = Norm(decoder_cross_attn_kv_norm, decoder_input_dim)

        # decoder: embeddings of tokens, numbers and open slots, blocks, head
        V, C = len(alphabet.tokens), decoder_model_dim
        self.token = nn.Embedding(V, C)
        self.number = nn.Linear(BITS, C, bias=False)
        self.slots = nn.Embedding(decoder_max_seq_len + 1, C)
        rotary = Rotary(C // decoder_n_heads, max(decoder_max_seq_len, encoder_n_seeds), ROPE_BASE)
        self.rotary = rotary if decoder_use_rope_self_attn else _no_rotation
        self.cross_rotary = rotary if decoder_use_rope_cross_attn else None
        self.blocks = nn.ModuleList(
            DecoderBlock(
                dim=C, memory_dim=decoder_input_dim, n_heads=decoder_n_heads, ffn_hidden_dim=decoder_ffn_hidden_dim,
                dropout=decoder_dropout, self_attn_norm=decoder_block_self_attn_norm,
                cross_attn_norm=decoder_block_cross_attn_norm, ffn_norm=decoder_block_ffn_norm,
            ) for _ in range(decoder_n_layers)
        )  # fmt: skip
        self.norm = Norm(decoder_output_norm, C)
        self.head = nn.Sequential(nn.Linear(C, C), nn.GELU(), nn.Dropout(decoder_dropout), nn.Linear(C, V))

        # grammar
        arity = torch.from_numpy(alphabet.arity).long()
        self.register_buffer("arity", arity, persistent=False)
        opens = torch.where(arity >= 0, arity - 1, 0)
        opens[alphabet.ids["<expression>"]] = 1
        self.register_buffer("opens", opens, persistent=False)  # (V,) slots that a token adds
        self._initialize()

    @torch.no_grad()
    def _initialize(self):
        """Change torch's initial values: small writes to the decoder's residual stream, nearly equal logits."""
        for embedding in (self.token, self.slots):
            nn.init.normal_(embedding.weight, std=0.3)
        for block in self.blocks:
            for writer in (block.self_attention.out, block.cross_attention.out, block.ffn[2]):
                writer.weight *= (2 * len(self.blocks)) ** -0.5
        nn.init.normal_(self.head[3].weight, std=0.02)
        nn.init.zeros_(self.head[3].bias)

    def encode(self, data, mask, variables=None):
        """Encode points: data (B, M, D + 1), y last, mask (B, M) of real points -> Encoded.

        data may have fewer columns than the model. variables: (B, D) bool, those that formulas may have; by default
        those whose column is not all 0. Columns outside float32's range are scaled (see `bring_into_range`), and
        formulas then describe the scaled columns. data and mask may be on the CPU when the model is elsewhere;
        `variables` is then required, on the model's device.
        """
        missing = self.encoder.n_columns - data.shape[-1]
        if missing < 0:
            raise ValueError(f"points with {data.shape[-1]} columns, the model was built for {self.encoder.n_columns}")
        if missing:
            data = torch.cat([F.pad(data[..., :-1], (0, missing)), data[..., -1:]], -1)
        if variables is None:
            variables = ((data[..., : len(self.alphabet.variables)] != 0) & mask[..., None]).any(1)
        memory = self.memory_norm(self.encoder(data, mask))
        return Encoded([block.keys(memory, self.cross_rotary) for block in self.blocks], variables)

    def _check_length(self, length):
        if length > self.max_seq_len:
            raise ValueError(f"{length} tokens do not fit decoder_max_seq_len {self.max_seq_len}")

    def _read(self, ids, num, keys, before=None, cache=None, start=0):
        """ids (B, T), num (B, T, 1) or None -> hidden states (B, T, C), open slots after each token (B, T).

        keys: of the points. before: open slots (B,) before the first id, by default 0. cache, start: as in
        transformer.Attention.
        """
        self._check_length(start + ids.shape[1])
        ids, before = ids.long(), ids.new_zeros(len(ids)).long() if before is None else before
        inside = (ids == self.alphabet.ids["<expression>"]).cumsum(1) + before[:, None] > 0
        open_slots = before[:, None] + (self.opens[ids] * inside).cumsum(1)
        h = self.token(ids) + self.slots(open_slots.clamp(0, self.max_seq_len))
        if num is not None:  # only <float> has a number: the values of constants are fitted, not read
            is_float = (ids == self.alphabet.ids.get("<float>", -1))[..., None]
            h = h + self.number(ieee_bits(num[..., 0]) * is_float)
        for i, block in enumerate(self.blocks):
            inputs = h, keys[i], self.rotary, self.cross_rotary, None if cache is None else cache[i], start
            if self.use_checkpointing and self.training:
                h = checkpoint(block, *inputs, use_reentrant=False)
            else:
                h = block(*inputs)
        return self.norm(h), open_slots

    def forward(self, ids, data, mask, num=None):
        """ids (B, T), points data (B, M, D + 1), mask (B, M), num (B, T, 1) -> logits of the next token (B, T, V).

        num: numbers, read only at <float>. On a CPU padding would cost as much as tokens, so rows are processed in
        groups of like length, and logits after the end of a row are 0.
        Raises ValueError beyond decoder_max_seq_len or encoder_max_n_variables.
        """
        self._check_length(ids.shape[1])
        if not ids.is_cpu or torch.compiler.is_compiling():
            return self.head(self._read(ids, num, self.encode(data, mask).keys)[0])
        positions = torch.arange(1, ids.shape[1] + 1)
        lengths, order = (positions * (ids > 0)).amax(1).sort(stable=True)
        ids, data, mask, num = (None if t is None else t[order] for t in (ids, data, mask, num))
        keys = self.encode(data, mask).keys
        logits = []
        for first in range(0, len(ids), CPU_ROWS):
            rows = slice(first, first + CPU_ROWS)
            longest = max(1, int(lengths[rows][-1]))
            part = None if num is None else num[rows, :longest]
            h, _ = self._read(ids[rows, :longest], part, [(k[rows], v[rows]) for k, v in keys])
            logits.append(F.pad(self.head(h), (0, 0, 0, ids.shape[1] - longest)))
        return torch.cat(logits)[order.argsort()]

    def loss(self, batch, forward=None):
        """Return (sum of nats, report) of a batch over PREFIX, </expression> and <eos>.

        batch: input_ids (B, T), labels (B, T - 1), prompt_mask (B, T), input_num (B, T, 1), x_tensors (B, M, D),
        y_tensors (B, M, 1), data_attn_mask (B, M). forward: this model, compiled or wrapped. The report holds detached
        (B, T - 1) values: `loss` and `nll`, 0 where not `counted`, and `rank`, the label's rank among the tokens,
        1 = most likely.
        """
        data = torch.cat([batch["x_tensors"], batch["y_tensors"]], -1)
        ids, num, labels = batch["input_ids"][:, :-1], batch["input_num"][:, :-1], batch["labels"].long()
        logits = (self if forward is None else forward)(ids, data, batch["data_attn_mask"], num).float()
        counted = (labels > 0) & ~batch["prompt_mask"][:, 1:].bool() & (labels != self.alphabet.ids["<expression>"])
        labels = labels.clamp_min(0)
        nats = F.cross_entropy(logits.mT, labels, reduction="none") * counted
        with torch.no_grad():
            rank = 1 + (logits > logits.gather(-1, labels[..., None])).sum(-1)
        return nats.sum(), dict(loss=nats.detach(), nll=nats.detach(), rank=rank, counted=counted)

    def init_state(self, encoded, rows, length):
        """Return an empty state for `step`: `rows` sequences of up to `length` tokens, for one set or one set each."""
        D = encoded.keys[0][0].shape[-1]
        H = self.blocks[0].self_attention.n_heads
        cache = encoded.keys[0][0].new_empty(len(self.blocks), 2, rows, H, length, D)
        return State(0, cache, torch.zeros(rows, dtype=torch.long, device=cache.device), encoded.keys)

    @torch.no_grad()
    def step(self, ids, state, num=None):
        """ids (R, T) that follow `state` -> (logits after the last id (R, V), new state).

        T > 1 only from an empty state. If R is less than the rows of the state, only the first R rows continue.
        """
        R, T = ids.shape
        cache = state.cache[:, :, :R]
        h, open_slots = self._read(ids, num, state.keys, state.open[:R], cache, state.position)
        return self.head(h[:, -1]), State(state.position + T, state.cache, open_slots[:, -1], state.keys)

    def _fork(self, state, parents):
        """Return the state in which row i continues row parents[i]; only rows that change are copied."""
        changed = (parents != torch.arange(len(parents), device=parents.device)).nonzero()[:, 0]
        if len(changed):
            used = state.cache[..., : state.position, :]
            used[:, :, changed] = used[:, :, parents[changed]]
        return state._replace(open=state.open[parents])

    def room(self, max_len, prompt=()):
        """Return the greatest length of PREFIX in a sequence of `max_len` tokens; raise ValueError if none fits."""
        room = max_len - len(prompt) - len(MARKS)
        if max_len > self.max_seq_len or room < 1:
            raise ValueError(
                f"max_len {max_len}: expected {len(prompt) + len(MARKS) + 1} (a prompt of {len(prompt)} tokens, "
                f"{len(MARKS)} marks, a formula) to {self.max_seq_len} (decoder_max_seq_len)"
            )
        return room

    def _begin(self, encoded, rows, max_len, prompt, numbers):
        """Read <bos>, the prompt and <expression> -> (logits (1, V), state, greatest length of PREFIX)."""
        room = self.room(max_len, prompt)
        bos, expression = (self.alphabet.ids[mark] for mark in MARKS[:2])
        device = self.arity.device
        ids = torch.tensor([[bos, *prompt, expression]], device=device)
        num = torch.tensor([0.0, *(numbers or [0.0] * len(prompt)), 0.0], device=device)[None, :, None]
        return *self.step(ids, self.init_state(encoded, rows, max_len), num), room

    def _log_probabilities(self, logits, open_slots, remaining, variables):
        """Restrict logits (R, V) to tokens after which the formula can still be completed -> log-probabilities (R, V).

        remaining: tokens that the formula may still have, with this one. Every open slot (R,) needs at least one of
        them, so the arity can be at most remaining - open slots. variables: (D,) bool.
        """
        fits = (self.arity >= 0) & (self.arity <= (remaining - open_slots)[:, None])
        fits[:, len(self.arity) - len(self.alphabet.variables) :] &= variables
        return logits.float().masked_fill(~fits, -torch.inf).log_softmax(-1)

    @torch.no_grad()
    def sample(self, encoded, n, *, temperature, top_k, top_p, max_len, generator=None, prompt=(), numbers=()):
        """Sample n formulas for one encoded set -> PREFIX (n, L) uint8, log-probabilities (n,); both on the CPU.

        top_k 0 and top_p 1 allow all tokens. max_len: tokens of the whole sequence. prompt: ids between <bos> and
        <expression>, numbers: one per id. The log-probability is that of the model within the grammar at temperature 1.
        Rows with a common beginning are computed once, until they differ. Raises ValueError for impossible arguments.
        """
        if n < 1:
            raise ValueError(f"n {n}: expected 1 or more")
        check_sampling(temperature, top_k, top_p)
        logits, state, room = self._begin(encoded, n, max_len, prompt, numbers)
        V = len(self.arity)
        device = logits.device
        rows, total = torch.zeros(n, room, dtype=torch.uint8, device=device), torch.zeros(n, device=device)
        going = torch.arange(n, device=device)  # formulas that are not complete
        at = torch.zeros(n, dtype=torch.long, device=device)  # row of the state that each of them continues
        for t in range(room):
            log_p = self._log_probabilities(logits, state.open, room - t, encoded.variables[0])
            p = _sampling_probabilities(log_p, temperature, top_k, top_p)
            token = torch.multinomial(p[at], 1, generator=generator)[:, 0]
            rows[going, t] = token.to(torch.uint8)
            total[going] += log_p[at, token]
            ends = state.open[at] + self.opens[token] == 0
            going, at, token = going[~ends], at[~ends], token[~ends]
            if not len(going):
                break
            pairs, child = (at * V + token).unique(return_inverse=True)  # each prefix once
            place = _places(pairs // V)
            at, pairs = place[child], pairs[place.argsort()]
            logits, state = self.step(pairs[:, None] % V, self._fork(state, pairs // V))
        return rows[:, : t + 1].cpu(), total.cpu()

    @torch.no_grad()
    def beam(self, encoded, width, *, max_len, prompt=(), numbers=()):
        """Search for the likeliest formulas for one encoded set with a beam of `width` -> as `sample`, best first.

        Returns fewer rows than `width` if there are fewer formulas.
        """
        if width < 1:
            raise ValueError(f"width {width}: expected 1 or more")
        logits, state, room = self._begin(encoded, width, max_len, prompt, numbers)
        V = len(self.arity)
        device = logits.device
        rows, total = torch.zeros(1, room, dtype=torch.uint8, device=device), torch.zeros(1, device=device)
        ended, scores = rows[:0], total[:0]
        for t in range(room):
            log_p = self._log_probabilities(logits, state.open, room - t, encoded.variables[0])
            total, best = (total[:, None] + log_p).flatten().topk(min(width, log_p.numel()))
            parents, token = best // V, best % V
            rows = rows[parents]
            rows[:, t] = token.to(torch.uint8)
            ends = state.open[parents] + self.opens[token] == 0
            scores, order = torch.cat([scores, total[ends]]).sort(descending=True, stable=True)
            ended = torch.cat([ended, rows[ends]])[order][:width]
            scores = scores[:width]
            floor = scores[-1] if len(scores) == width else -torch.inf  # a longer formula is never likelier
            going = ~ends & (total > floor)
            if not going.any():
                break
            rows, total, token = rows[going], total[going], token[going]
            logits, state = self.step(token[:, None], self._fork(state, parents[going]))
        possible = scores.isfinite()
        return ended[possible, : t + 1].cpu(), scores[possible].cpu()


ARGUMENTS = [p.name for p in inspect.signature(FlashANSRModel).parameters.values() if p.kind is p.KEYWORD_ONLY]


def _check(alphabet, args):
    """Raise ValueError for arguments that no model can have."""
    absent = [token for token in (*MARKS, "<constant>") if token not in alphabet.ids]
    if absent:
        raise ValueError(f"the tokenizer has no {' '.join(absent)}: add it to special_tokens")
    for name, value in args.items():
        least = 1 if name.endswith(("dim", "heads", "seeds", "points", "layers", "seq_len")) else 0
        if not isinstance(value, str) and not value >= least:
            raise ValueError(f"{name} {value}: expected {least} or more")
    for part, dim in (("encoder", "encoder_dim"), ("decoder", "decoder_model_dim")):
        width, heads = args[dim], args[f"{part}_n_heads"]
        rotated = part == "decoder" and (args["decoder_use_rope_self_attn"] or args["decoder_use_rope_cross_attn"])
        if width % heads or rotated and width // heads % 2:
            kind = "an even multiple" if rotated else "a multiple"
            raise ValueError(f"{dim} {width} with {part}_n_heads {heads}: expected {kind} of the number of heads")
    columns, D = args["encoder_max_n_variables"], len(alphabet.variables)
    if 0 < columns <= D:
        raise ValueError(f"encoder_max_n_variables {columns}: {D} variables and y take {D + 1} columns (0 = as many)")
    if args["float_features"] not in ("fourier", "ieee"):
        raise ValueError(f"float_features {args['float_features']}: expected fourier or ieee")
    for name in ("block_self_attn_norm", "block_cross_attn_norm", "block_ffn_norm", "output_norm"):
        if args[f"decoder_{name}"] == "rms_set":
            raise ValueError(
                f"decoder_{name} rms_set: expected a norm per token, since one over all would reveal later tokens\n"
                "fix: rms"
            )


def check_sampling(temperature, top_k, top_p):
    """Raise ValueError, naming the argument, if no token can be sampled with these values."""
    if not temperature > 0:
        raise ValueError(f"temperature {temperature}: expected more than 0")
    if not top_k >= 0:
        raise ValueError(f"top_k {top_k}: expected 0 (off) or more")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p {top_p}: expected more than 0, at most 1")


def _sampling_probabilities(log_p, temperature, top_k, top_p):
    """Log-probabilities (R, V) -> weights (R, V) at `temperature`, 0 outside the top_k tokens and the top_p mass."""
    p = (log_p / temperature).softmax(-1)
    if top_k:
        p = p.masked_fill(p < p.topk(min(top_k, p.shape[-1])).values[:, -1:], 0)
    if top_p < 1:
        mass, order = (p / p.sum(-1, keepdim=True)).sort(descending=True)
        before = mass.cumsum(-1) - mass  # mass of likelier tokens
        p = p.masked_fill(torch.zeros_like(p, dtype=torch.bool).scatter(-1, order, before >= top_p), 0)
    return p


def _places(parents):
    """Assign R children to rows 0 ... R - 1, given the sorted rows of their parents; first children keep that row."""
    R, device = len(parents), parents.device
    first = torch.ones(R, dtype=torch.bool, device=device)
    first[1:] = parents[1:] != parents[:-1]
    stays = first & (parents < R)
    free = torch.ones(R, dtype=torch.bool, device=device)
    free[parents[stays]] = False
    places = parents.clone()
    places[~stays] = free.nonzero()[:, 0]
    return places
