"""NanoThink: latent attention reads the text, and for each token a router weighs the frozen experts.

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
from models.mla import LatentBlock
from models.state_space import StateSpace
from models.transformer import RMSNorm, Rotary, Transformer, initialize

FAMILIES = dict(transformer=Transformer, state_space=StateSpace, diffuser=Diffuser)
HIDDEN = 128  # hidden width of the router
FLOOR = 1e-3  # smallest initial weight of an expert, so that the router can still learn to use it
RECALL = -3.0  # initial logit of lambda
TAU = 0.05  # initial temperature of the similarities of a memory
TINY = 1e-30  # smallest probability, so that its logarithm is finite


def static_mixture(nats, tolerance=1e-6):
    """Fit the weights of a fixed mixture by EM: nats (N, E) of each expert -> weights (E), none below FLOOR.

    Stops when an iteration improves the mean nats by less than `tolerance`.
    """
    p = (nats.min(1, keepdim=True).values - nats).cpu().double().exp()  # relative to the likeliest expert
    weights = torch.full_like(p[0], 1 / p.shape[1])
    last = math.inf
    while True:
        joint = weights * p
        mean_nats = -joint.sum(1).log().mean().item()
        if last - mean_nats < tolerance:
            floored = weights.clamp_min(FLOOR)
            return (floored / floored.sum()).float()
        weights, last = (joint / joint.sum(1, keepdim=True)).mean(0), mean_nats


class NanoThink(nn.Module):
    """Mixture of the frozen experts' next-token distributions, corrected by the model's own head.

    p is proportional to (sum_e w_e p_e) exp(E P norm(f)) with f = c + sum_e w_e A_e h_e. Here c is the output of the
    latent attention, h_e the hidden state of expert e, and E the token embedding. P starts at 0 and w at the static
    mixture, so that at the start the model is no worse than the best expert. The experts are saved in the state_dict,
    never change, and stay in eval mode. With an attached VectorStore p becomes (1 - lambda) p + lambda p_memory.
    """

    def __init__(self, *, vocab_size, d_model, max_seq_len, n_heads, dropout, rope_base, n_layers, ffn_mult,
                 kv_latent_dim, rope_dim, experts, entropy_reg, balance_reg, z_reg):  # fmt: skip
        """Arguments as in train_mla.MLAConfig; vocab_size V and d_model C are those of the experts.

        experts: {family: keyword arguments of that model}. forward: ids (B, T) -> log-probabilities (B, T, V).
        """
        super().__init__()
        self.max_seq_len = max_seq_len
        self.store = None
        self.entropy_reg, self.balance_reg, self.z_reg = entropy_reg, balance_reg, z_reg
        self.rotary = Rotary(rope_dim if kv_latent_dim else d_model // n_heads, max_seq_len, rope_base)
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.dropout = nn.Dropout(dropout)
        sizes = dict(d_model=d_model, n_heads=n_heads, ffn_mult=ffn_mult, dropout=dropout)
        latent = dict(kv_latent_dim=kv_latent_dim, rope_dim=rope_dim)
        self.blocks = nn.ModuleList(LatentBlock(**sizes, **latent) for _ in range(n_layers))
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
        """Copy the weights of the trained `experts` {family: model}, and the transformer's embedding."""
        for name, model in experts.items():
            self.experts[name].load_state_dict(model.state_dict())
        self.embedding.load_state_dict(experts["transformer"].embedding.state_dict())

    @torch.no_grad()
    def set_static(self, nats):
        """Start the router at the static mixture that fits the experts' nats (N, E) on training tokens."""
        self.static.copy_(static_mixture(nats))
        self.router_out.bias.copy_(self.static.log())

    def attach(self, store):
        """Use a VectorStore from now on, or none. Its two parameters, logit and temperature, train only with one."""
        self.store = store
        self.router_recall.requires_grad_(store is not None)
        self.log_tau.requires_grad_(store is not None)

    def train(self, mode=True):
        super().train(mode)
        self.experts.eval()
        return self

    @torch.no_grad()
    def keys(self, x):
        """x: (B, T) ids -> keys of the contexts in the store (B, T, C): the transformer's hidden states, normalized."""
        return F.normalize(self.experts["transformer"].final(x).float(), dim=-1)

    def _route(self, context, finals):
        """Weigh the experts: context (.., C), finals [(.., C)] per expert -> (logits (.., E), logit of lambda (..), g).

        context is the output of the attention, g (.., C) the input of the head. The router runs in fp32.
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
        """weights (N, E), g (N, C), finals (N, C) per expert -> (log p before the memory (N, V), [p_e (N, V)])."""
        with torch.no_grad():
            heads = [expert.output for expert in self.experts.values()]
            each = [F.linear(h, head).float().softmax(-1) for h, head in zip(finals, heads, strict=True)]
        mixed = sum(w[:, None] * p for w, p in zip(weights.unbind(-1), each, strict=True))
        correction = F.linear(g, self.embedding.weight).float()
        return (mixed.clamp_min(TINY).log() + correction).log_softmax(-1), each

    def _nats(self, weights, g, y, *finals):
        """Inputs of `_distributions` and targets y (N) -> nats of the model and of each expert: (N, 1 + E)."""
        log_p, each = self._distributions(weights, g, *finals)
        y = y.clamp_min(0)[:, None]
        experts = [p.gather(1, y).clamp_min(TINY).log() for p in each]
        return -torch.cat([log_p.gather(1, y), *experts], 1)

    def _remember(self, final, recall, documents=None):
        """Search the store -> (neighbours' tokens (.., k), their weights (.., k), lambda (..), 0 without a neighbour).

        final (.., C): of the transformer. recall (..): logits of lambda. documents (..): entries of a query's own
        document do not count.
        """
        documents = documents.flatten() if documents is not None else None
        neighbours = self.store.search(F.normalize(final.detach().float(), dim=-1).flatten(0, -2), documents)
        similarity, tokens = (t.view(*recall.shape, -1) for t in neighbours)
        bad = similarity == -torch.inf
        none = bad.all(-1)
        scaled = similarity.masked_fill(bad, 0.0) / self.log_tau.exp()  # 0, since infinity would make the gradient nan
        share = scaled.masked_fill(bad & ~none[..., None], -torch.inf).softmax(-1)
        return tokens, share, recall.sigmoid() * ~none

    def forward(self, x, y=None, index=None, documents=None):
        """x: (B, T) ids -> log-probabilities (B, T, V). With targets y (B, T), -100 = not counted: (loss, report).

        documents: (B, T) document of each target; entries of the store from the same document do not count.
        loss: sum of nats plus the router's regularizers (means over this batch) times the number of tokens.
        The report holds detached (B, T) values per token, 0 where not counted: `loss` and `nll`, the nats of each
        expert and of the `static` mixture, `weight_<expert>`, `entropy` of the weights, and `lambda`.
        Raises ValueError beyond max_seq_len.
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
        n = counted.sum()
        E = len(self.experts)
        w, z = weights[counted], logits[counted].logsumexp(-1)  # (n, E), (n)
        mean = w.mean(0)
        chosen = F.one_hot(w.argmax(-1), E).float().mean(0)
        regularizers = self.balance_reg * (E * (chosen * mean).sum() - 1) + self.z_reg * z.pow(2).mean()
        regularizers = regularizers + self.entropy_reg * (math.log(E) + (mean * mean.clamp_min(TINY).log()).sum())
        detached = weights.detach() * counted[..., None]
        report = dict(loss=nll.detach(), nll=nll.detach(), **dict(zip(self.experts, each.unbind(-1), strict=True)))
        report["static"] = -(self.static.log() - each).logsumexp(-1) * counted
        report |= {f"weight_{name}": part for name, part in zip(self.experts, detached.unbind(-1), strict=True)}
        report["entropy"] = -(detached * detached.clamp_min(TINY).log()).sum(-1)
        if self.store is not None:
            report["lambda"] = recalled.detach() * counted
        return nll.sum() + n * regularizers, report

    @staticmethod
    def _mix(log_p, recalled, tokens, share):
        """Return log((1 - lambda) p + lambda p_memory) from (.., V), (..), (.., k), (.., k): (.., V)."""
        p = log_p.exp() * (1 - recalled[..., None])
        return p.scatter_add(-1, tokens, share * recalled[..., None]).clamp_min(TINY).log()

    def init_state(self, batch):
        """Return an empty state for `step`: [(position, latent caches), state of each expert, ...].

        The caches are (layers, B, max_seq_len, kv_latent_dim + rope_dim).
        """
        cache = torch.stack([block.init_cache(batch, self.max_seq_len) for block in self.blocks])
        return [(0, cache), *(expert.init_state(batch) for expert in self.experts.values())]

    @torch.no_grad()
    def step(self, x, state):
        """x: (B, T) ids that follow `state` -> (log-probabilities after the last id (B, V), new state).

        T > 1 only from an empty state. Raises ValueError when the window is full.
        """
        (start, cache), *states = state
        if start + x.shape[1] > self.max_seq_len:
            raise ValueError(f"{start} + {x.shape[1]} tokens do not fit max_seq_len {self.max_seq_len}")
        pairs = zip(self.experts.values(), states, strict=True)
        finals, states = zip(*(expert.advance(x, expert_state) for expert, expert_state in pairs), strict=True)
        context = self.embedding(x)
        for block, part in zip(self.blocks, cache, strict=True):
            context = block(context, self.rotary, cache=part, start=start)
        logits, recall, g = self._route(context[:, -1], finals)
        log_p, _ = self._distributions(logits.softmax(-1), g, *finals)
        if self.store is not None:
            tokens, share, recalled = self._remember(finals[0], recall)
            log_p = self._mix(log_p, recalled, tokens, share)
        return log_p, [(start + x.shape[1], cache), *states]
