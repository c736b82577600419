"""NanoThink: latent attention reads the text, and a router says for each token how far to believe each frozen expert.

B batch, T time, C width, E experts, V vocabulary, N positions, w router weights, lambda the share of a memory.
Mixtures of experts by EM: Jordan and Jacobs (1994); balance loss: Switch Transformer (arXiv 2101.03961), eq. 4; z-loss:
ST-MoE (2202.08906), eq. 5; memory: kNN-LM (1911.00172), eq. 2 and 3.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from models.cross_entropy import by_chunk
from models.diffuser import Diffuser
from models.mla import Block
from models.state_space import StateSpace
from models.transformer import RMSNorm, Rotary, Transformer, initialize

FAMILIES = dict(transformer=Transformer, state_space=StateSpace, diffuser=Diffuser)
HIDDEN = 128  # of the router
FLOOR = 1e-3  # least weight of an expert at the start: none is beyond reach
RECALL, TAU = -3.0, 0.05  # start of the router's logit of lambda, and of the temperature of a memory's similarities
TINY = 1e-30  # no probability is less, so that its logarithm is finite


def static_mixture(nats, tolerance=1e-6):
    """EM for the weights of a fixed mixture: nats (N, E) of each expert -> weights (E), none below FLOOR."""
    p = (nats.min(1, keepdim=True).values - nats).cpu().double().exp()  # the likeliest expert has 1
    weights, last = torch.full_like(p[0], 1 / p.shape[1]), math.inf
    while True:
        joint = weights * p
        now = -joint.sum(1).log().mean().item()
        if last - now < tolerance:
            floored = weights.clamp_min(FLOOR)
            return (floored / floored.sum()).float()
        weights, last = (joint / joint.sum(1, keepdim=True)).mean(0), now


class NanoThink(nn.Module):
    """Mixture of the frozen experts' next-token distributions, corrected by a head of its own.

    p is proportional to (sum_e w_e p_e) exp(E P norm(f)), f = c + sum_e w_e A_e h_e: c the context that latent
    attention makes, h_e the hidden states of expert e, E the token embedding. P starts at 0 and w at the static
    mixture, so that the start is no worse than the best expert. The experts lie in the state_dict, never change, and
    stay in eval mode. `attach` a VectorStore for p <- (1 - lambda) p + lambda p_memory.
    """

    def __init__(self, *, vocab_size, d_model, max_seq_len, n_heads, dropout, rope_base, n_layers, ffn_mult,
                 kv_latent_dim, rope_dim, experts, entropy_reg, balance_reg, z_reg):  # fmt: skip
        """experts: {family: keyword arguments of that model}."""
        super().__init__()
        self.max_seq_len, self.store = max_seq_len, None
        self.entropy_reg, self.balance_reg, self.z_reg = entropy_reg, balance_reg, z_reg
        self.rotary = Rotary(rope_dim if kv_latent_dim else d_model // n_heads, max_seq_len, rope_base)
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.dropout = nn.Dropout(dropout)
        sizes = dict(d_model=d_model, n_heads=n_heads, ffn_mult=ffn_mult, dropout=dropout)
        latent = dict(kv_latent_dim=kv_latent_dim, rope_dim=rope_dim)
        self.blocks = nn.ModuleList(Block(**sizes, **latent) for _ in range(n_layers))
        self.context_norm, self.fused_norm = RMSNorm(d_model), RMSNorm(d_model)
        self.router_in = nn.Linear((1 + len(experts)) * d_model, HIDDEN)
        self.router_out = nn.Linear(HIDDEN, len(experts))
        self.router_recall = nn.Linear(HIDDEN, 1)  # logit of lambda
        self.log_tau = nn.Parameter(torch.tensor(math.log(TAU)))
        self.fuse = nn.ModuleList(nn.Linear(d_model, d_model, bias=False) for _ in experts)  # A_e
        self.correct = nn.Linear(d_model, d_model, bias=False)  # P
        initialize(self, ("out", "down"), n_layers)
        for linear in (self.router_out, self.router_recall, self.correct):
            nn.init.zeros_(linear.weight)
        nn.init.zeros_(self.router_in.bias)
        nn.init.constant_(self.router_recall.bias, RECALL)
        self.experts = nn.ModuleDict({name: FAMILIES[name](**args) for name, args in experts.items()})
        self.experts.requires_grad_(False).eval()
        self.register_buffer("static", torch.full((len(experts),), 1 / len(experts)))
        self.attach(None)

    def start_from(self, experts):
        """Take the weights of the trained `experts` {family: model}, and the transformer's embedding."""
        for name, model in experts.items():
            self.experts[name].load_state_dict(model.state_dict())
        self.embedding.load_state_dict(experts["transformer"].embedding.state_dict())

    @torch.no_grad()
    def set_static(self, nats):
        """Start the router at the static mixture that fits nats (N, E), those of each expert on training tokens."""
        self.static.copy_(static_mixture(nats))
        self.router_out.bias.copy_(self.static.log())

    def attach(self, store):
        """Answer with the help of a VectorStore from now on; None: without. Its two parts then train, or not."""
        self.store = store
        self.router_recall.requires_grad_(store is not None)
        self.log_tau.requires_grad_(store is not None)

    def train(self, mode=True):
        super().train(mode)
        self.experts.eval()
        return self

    @torch.no_grad()
    def keys(self, x):
        """x: (B, T) ids -> what the store knows a context by: the transformer's hidden states, length 1 (B, T, C)."""
        return F.normalize(self.experts["transformer"].final(x).float(), dim=-1)

    def _route(self, context, finals):
        """context (.., C) of the attention, finals [(.., C)] of the experts -> router logits (.., E), lambda's, g.

        g (.., C): what the head reads. The router is fp32.
        """
        with torch.autocast(context.device.type, enabled=False):
            normed = [F.rms_norm(h.float(), h.shape[-1:]) for h in finals]
            context = self.context_norm(context)
            hidden = F.gelu(self.router_in(torch.cat([context, *normed], -1)))
            logits, recall = self.router_out(hidden), self.router_recall(hidden)[..., 0]
        weights = logits.softmax(-1)
        parts = [w[..., None] * A(h) for w, A, h in zip(weights.unbind(-1), self.fuse, normed, strict=True)]
        return logits, recall, self.correct(self.fused_norm(context + sum(parts)))

    def _distributions(self, weights, g, *finals):
        """(N, E), (N, C), (N, C) of each expert -> log p before the memory (N, V), p_e of each expert [(N, V)]."""
        with torch.no_grad():
            heads = [expert.output for expert in self.experts.values()]
            each = [F.linear(h, head).float().softmax(-1) for h, head in zip(finals, heads, strict=True)]
        mixed = sum(w[:, None] * p for w, p in zip(weights.unbind(-1), each, strict=True))
        correction = F.linear(g, self.embedding.weight).float()
        return (mixed.clamp_min(TINY).log() + correction).log_softmax(-1), each

    def _nats(self, weights, g, y, *finals):
        """As `_distributions`, and targets y (N) -> nats of the model and of each expert: (N, 1 + E)."""
        log_p, each = self._distributions(weights, g, *finals)
        y = y.clamp_min(0)[:, None]
        experts = [p.gather(1, y).clamp_min(TINY).log() for p in each]
        return -torch.cat([log_p.gather(1, y), *experts], 1)

    def _remember(self, final, recall, documents=None):
        """final (.., C) of the transformer, recall (..) -> neighbours' tokens (.., k), their weights (.., k), lambda.

        lambda is 0 where there is no neighbour. documents: (..), whose own entries do not count.
        """
        documents = documents.flatten() if documents is not None else None
        found = self.store.search(F.normalize(final.detach().float(), dim=-1).flatten(0, -2), documents)
        similarity, tokens = (t.view(*recall.shape, -1) for t in found)
        bad = similarity == -torch.inf
        none = bad.all(-1)
        scaled = similarity.masked_fill(bad, 0.0) / self.log_tau.exp()  # 0: infinity would leave no gradient but nan
        share = scaled.masked_fill(bad & ~none[..., None], -torch.inf).softmax(-1)
        return tokens, share, recall.sigmoid() * ~none

    def forward(self, x, y=None, index=None, documents=None):
        """x: (B, T) ids -> log-probabilities (B, T, V); with targets y (B, T), -100 = not counted: (loss, report).

        documents: (B, T) of the targets, whose own entries in the store do not count. loss: sum of nats plus the
        router's regularisers times the tokens (means over this batch). The report holds detached (B, T) numbers per
        token, 0 where not counted: `loss` and `nll` in nats, those of each expert and of the `static` mixture,
        `weight_<expert>`, `entropy` of the weights, `lambda`. Raises ValueError beyond max_seq_len.
        """
        if x.shape[1] > self.max_seq_len:
            raise ValueError(f"sequence of {x.shape[1]} tokens, the model was built for max_seq_len {self.max_seq_len}")
        with torch.no_grad():
            finals = [expert.final(x) for expert in self.experts.values()]
        context = self.dropout(self.embedding(x))
        for block in self.blocks:
            context = block(context, self.rotary)
        logits, recall, g = self._route(context, finals)
        weights = logits.softmax(-1)  # (B, T, E)
        if self.store is not None:
            tokens, share, recalled = self._remember(finals[0], recall, documents)
        if y is None:
            log_p = by_chunk(lambda *part: self._distributions(*part)[0], weights, g, *finals)
            return log_p if self.store is None else self._mix(log_p, recalled, tokens, share)
        counted = y >= 0
        nats = by_chunk(self._nats, weights, g, y, *finals) * counted[..., None]  # (B, T, 1 + E)
        nll, each = nats[..., 0], nats[..., 1:].detach()
        if self.store is not None:
            p_memory = (share * (tokens == y[..., None])).sum(-1)
            nll = -((1 - recalled) * (-nll).exp() + recalled * p_memory).clamp_min(TINY).log() * counted
        n, E = counted.sum(), len(self.experts)
        w, z = weights[counted], logits[counted].logsumexp(-1)  # (n, E), (n)
        mean = w.mean(0)
        chosen = F.one_hot(w.argmax(-1), E).float().mean(0)
        regularisers = self.balance_reg * (E * (chosen * mean).sum() - 1) + self.z_reg * z.pow(2).mean()
        regularisers = regularisers + self.entropy_reg * (math.log(E) + (mean * mean.clamp_min(TINY).log()).sum())
        detached = weights.detach() * counted[..., None]
        report = dict(loss=nll.detach(), nll=nll.detach(), **dict(zip(self.experts, each.unbind(-1), strict=True)))
        report["static"] = -(self.static.log() - each).logsumexp(-1) * counted
        report |= {f"weight_{name}": part for name, part in zip(self.experts, detached.unbind(-1), strict=True)}
        report["entropy"] = -(detached * detached.clamp_min(TINY).log()).sum(-1)
        if self.store is not None:
            report["lambda"] = recalled.detach() * counted
        return nll.sum() + n * regularisers, report

    @staticmethod
    def _mix(log_p, recalled, tokens, share):
        """log((1 - lambda) p + lambda p_memory): (.., V), (..), (.., k), (.., k) -> (.., V)."""
        p = log_p.exp() * (1 - recalled[..., None])
        return p.scatter_add(-1, tokens, share * recalled[..., None]).clamp_min(TINY).log()

    def init_state(self, batch):
        """An empty state for `step`: (position, latent caches (layers, B, max_seq_len, R + P)), then the experts'."""
        cache = torch.stack([block.init_cache(batch, self.max_seq_len) for block in self.blocks])
        return [(0, cache), *(expert.init_state(batch) for expert in self.experts.values())]

    @torch.no_grad()
    def step(self, x, state):
        """x: (B, T) ids that follow `state` -> (log-probabilities after the last one (B, V), state).

        T > 1 only from an empty state. Raises ValueError when the window is full.
        """
        (start, cache), *states = state
        if start + x.shape[1] > self.max_seq_len:
            raise ValueError(f"{start} + {x.shape[1]} tokens do not fit max_seq_len {self.max_seq_len}")
        pairs = zip(self.experts.values(), states, strict=True)
        finals, states = zip(*(expert.advance(x, own) for expert, own in pairs), strict=True)
        context = self.embedding(x)
        for block, part in zip(self.blocks, cache, strict=True):
            context = block(context, self.rotary, cache=part, start=start)
        logits, recall, g = self._route(context[:, -1], finals)
        log_p, _ = self._distributions(logits.softmax(-1), g, *finals)
        if self.store is not None:
            tokens, share, recalled = self._remember(finals[0], recall)
            log_p = self._mix(log_p, recalled, tokens, share)
        return log_p, [(start + x.shape[1], cache), *states]
