"""A diffusion language model over the embeddings of a trained transformer, with a causal mode that has a likelihood.

B batch, T time, C width, V vocabulary, K = training_steps, k the noise level of one token in 0..K, t the time of one
sequence in [0, 1], x the clean latent of a token, r_k the noise of level k, z = x + r_k eps, h hidden states.
DDPM (arXiv 2006.11239), DDIM (2010.02502), latents that are word embeddings: Diffusion-LM (2205.14217), cross-entropy
in place of the squared error: CDCD (2211.15089) and Plaid (2305.18619), a noise level per token: AR-Diffusion
(2305.09515); with a steep ramp it comes close to masked diffusion, MDLM (2406.07524).
"""

import itertools

import torch
import torch.nn as nn
import torch.nn.functional as F

from models.cross_entropy import by_chunk, linear_cross_entropy
from models.transformer import Block, RMSNorm, Rotary, initialize

CLEAN_WEIGHT = 0.05  # of a token at level 0 in the loss: its own latent gives it away
MIN_SHARE = 0.05  # of noisy tokens in a sequence: no token counts more than 20 times
ROUNDING_WEIGHT = 0.2  # of the token's cross-entropy beside a squared error whose latents no table can name
KEPT = 0.015, 0.995  # information about the token at levels K and 0 of the information schedule


def log_likelihood(z, r, table):
    """log N(z; table_v, r^2) without what is the same for every v: z (N, C), r (N), table (V, C) -> (N, V) in fp32."""
    with torch.autocast(z.device.type, enabled=False):
        return torch.addmm(-table.pow(2).sum(1) / 2, z.float(), table.T) / r.pow(2)[:, None]


def posterior_entropy(r, table, log_prior, draws=512):
    """Mean entropy in nats of a token given its noisy latent, its prior the unigram: r (R) -> (R), fixed draws."""
    even = (torch.arange(draws, device=table.device) + 0.5) / draws
    tokens = torch.searchsorted(log_prior.exp().cumsum(0), even).clamp_max(len(table) - 1)  # each as often as it comes
    eps = torch.randn(draws, table.shape[1], generator=torch.Generator().manual_seed(0)).to(table.device)
    found = []
    for level in r:
        likelihood = log_likelihood(table[tokens] + level * eps, level.expand(draws), table)
        log_p = (likelihood + log_prior).log_softmax(-1)  # (draws, V)
        found.append(-(log_p.exp() * log_p).sum(1).mean())
    return torch.stack(found)


def denoise(z, x_hat, r, r_after, noise):
    """One step to a lower level: DDIM (eq. 12) without noise, DDPM's posterior (eq. 6, 7) with noise ~ N(0, 1).

    z, x_hat, noise: (B, T, C), r, r_after: (B, T) -> z at r_after. noise None = DDIM, else ancestral.
    """
    keep, r_after = (r_after / r)[..., None], r_after[..., None]
    if noise is None:
        return x_hat + keep * (z - x_hat)
    return x_hat + keep**2 * (z - x_hat) + r_after * (1 - keep**2).clamp_min(0).sqrt() * noise


class Diffuser(nn.Module):
    """Denoise the frozen embeddings of all tokens together, each at a level of its own; or predict the next token.

    The transformer it starts from supplies latents, blocks and head (`start_from`); a saved state_dict has them all.
    A token's prediction is read one position to its left, as in a causal model, so that copied blocks keep their
    meaning. Its logits are head(h) + log N(z; table, r_k): what the context says plus what the noise left.
    """

    def __init__(self, *, vocab_size, d_model, max_seq_len, n_heads, dropout, rope_base, n_layers, ffn_mult,
                 encoder_layers, training_steps, inference_steps, objective, schedule, latent_layer, noise_scale, ramp,
                 next_weight, next_share):  # fmt: skip
        super().__init__()
        if latent_layer and objective != "mse":
            raise ValueError(f"latent_layer {latent_layer} has no table of token likelihoods: it needs objective mse")
        if latent_layer > encoder_layers:
            raise ValueError(f"latent_layer {latent_layer}, the transformer has {encoder_layers} layers")
        self.max_seq_len, self.inference_steps, self.latent_layer = max_seq_len, inference_steps, latent_layer
        self.objective, self.schedule, self.noise_scale, self.ramp = objective, schedule, noise_scale, ramp
        self.next_weight, self.next_share = next_weight, next_share
        sizes = dict(d_model=d_model, n_heads=n_heads, ffn_mult=ffn_mult)
        self.rotary = Rotary(d_model // n_heads, max_seq_len + 1, rope_base)  # + 1: the start
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.encoder = nn.ModuleList(Block(**sizes, dropout=0.0) for _ in range(latent_layer))
        self.start = nn.Parameter(torch.randn(2, 1, d_model))  # first position of the two modes: denoise, next
        self.inward = nn.Linear(2 * d_model, d_model, bias=False)  # of what is believed and of the noisy latent
        self.level = nn.Sequential(nn.Linear(32, d_model), nn.SiLU(), nn.Linear(d_model, d_model))
        self.blocks = nn.ModuleList(Block(**sizes, dropout=dropout) for _ in range(n_layers))
        self.norm = RMSNorm(d_model, gain=0.25)
        self.head = nn.Linear(d_model, vocab_size, bias=False)
        self.head_next = nn.Linear(d_model, d_model, bias=False)  # before the head, for the next mode
        if latent_layer:
            self.head_latent = nn.Linear(d_model, d_model)
        initialize(self, ("out", "down"), n_layers)
        nn.init.eye_(self.head_next.weight)
        with torch.no_grad():
            self.inward.weight.copy_(torch.eye(d_model, 2 * d_model))
            self.level[2].weight.zero_()
        self.embedding.requires_grad_(False)
        self.encoder.requires_grad_(False).eval()
        shapes = dict(mean=[d_model], std=[d_model], table=[vocab_size, d_model], log_prior=[vocab_size],
                      noise=[training_steps + 1])  # fmt: skip
        for name, shape in shapes.items():
            self.register_buffer(name, torch.ones(shape))

    @torch.no_grad()
    def start_from(self, transformer, ids):
        """Take latents, blocks and head from a trained Transformer; ids: (n,) training tokens, for the statistics.

        The blocks are spread evenly over the transformer's. Raises ValueError where a latent channel does not vary.
        """
        self.embedding.load_state_dict(transformer.embedding.state_dict())
        for block, source in zip(self.encoder, transformer.blocks, strict=False):
            block.load_state_dict(source.state_dict())
        spread = torch.linspace(0, len(transformer.blocks) - 1, len(self.blocks)).round().long()
        for block, i in zip(self.blocks, spread, strict=True):
            block.load_state_dict(transformer.blocks[i].state_dict())
        self.norm.load_state_dict(transformer.norm.state_dict())
        self.head.load_state_dict(transformer.embedding.state_dict())
        T = min(self.max_seq_len, len(ids))
        windows = ids[: len(ids) // T * T].view(-1, T)  # (n / T, T)
        self.mean.zero_()
        self.std.fill_(1.0)
        h = torch.cat([self.latents(w) for w in windows.split(64)]).flatten(0, 1)  # (n, C)
        self.mean.copy_(h.mean(0))
        self.std.copy_(h.std(0))
        x = (h - self.mean) / self.std
        if not bool(((x.var(0) - 1).abs() < 0.05).all()):
            raise ValueError("a channel of the latents does not vary: their variance is not 1")
        counts = torch.bincount(windows.flatten(), minlength=len(self.table)).float()
        self.log_prior.copy_(((counts + 0.5) / (counts + 0.5).sum()).log())
        if self.latent_layer:  # a token has many latents: their mean, 0 for one that never came
            self.table.zero_().index_add_(0, windows.flatten(), x).div_(counts.clamp_min(1)[:, None])
        else:
            self.table.copy_((self.embedding.weight - self.mean) / self.std)
        self.noise.copy_(self._noise_levels())

    def _noise_levels(self):
        """r of the levels 0..K: (K + 1).

        `information`: the entropy of a token, given its noisy latent, rises linearly with the level: steps are spent
        where something is learnt. `cosine` (Improved DDPM, arXiv 2102.09672, eq. 17) and `linear`: fixed shares.
        """
        u = torch.linspace(0, 1, len(self.noise), device=self.noise.device)
        if self.schedule == "information":
            grid = torch.logspace(-2, 1.2, 40, device=u.device) * len(self.mean) ** 0.5
            entropy = posterior_entropy(grid, self.table, self.log_prior).cummax(0).values
            share = entropy / -(self.log_prior.exp() * self.log_prior).sum()
            wanted = 1 - KEPT[1] + (KEPT[1] - KEPT[0]) * u
            i = torch.searchsorted(share, wanted).clamp(1, len(grid) - 1)
            between = (wanted - share[i - 1]) / (share[i] - share[i - 1]).clamp_min(1e-6)
            return grid[i - 1] * (grid[i] / grid[i - 1]) ** between.clamp(0, 1)
        kept = 1 - u if self.schedule == "linear" else (torch.pi / 2 * (u + 0.008) / 1.008).cos() ** 2
        kept = kept.clamp(1e-5, 0.9999)  # r stays finite, and above 0
        return (self.noise_scale or 0.37 * len(self.mean) ** 0.5) * (1 / kept - 1).sqrt()

    def train(self, mode=True):
        super().train(mode)
        self.encoder.eval()
        return self

    @torch.no_grad()
    def latents(self, ids, cache=(None,), start=0):
        """ids: (B, T) -> normalised latents x (B, T, C) in fp32; of the embedding, or after `latent_layer` blocks."""
        h = self.embedding(ids)
        for block, part in zip(self.encoder, itertools.cycle(cache)):
            h = block(h, self.rotary, cache=part, start=start)
        return (h.float() - self.mean) / self.std

    def _enter(self, believed, z, k, mode, first=True):
        """believed, z: (B, T, C), k: (B, T), mode 0 denoise, 1 next -> what enters the blocks (B, 1 + T, C).

        The 1 is the start, which comes before the first token only.
        """
        scaled = z / (1 + self.noise[k][..., None] ** 2).sqrt()
        octaves = 2.0 ** torch.arange(-1, 15, device=z.device)
        angle = torch.linspace(0, 1, len(self.noise), device=z.device)[:, None] * octaves
        level = self.level(torch.cat([angle.sin(), angle.cos()], -1))  # (K + 1, C)
        # F.embedding, not level[k]: on a CPU the backward of an index adds in whatever order threads come
        h = self.inward(torch.cat([believed, scaled], -1)) + F.embedding(k, level)
        if first:
            h = torch.cat([self.start[mode].expand(len(h), 1, -1), h], 1)
        return h * self.std + self.mean  # the scale that copied blocks are used to

    def _hidden(self, believed, z, k, mode):
        """Of what `_enter` takes, normed hidden states (B, 1 + T, C)."""
        if z.shape[1] > self.max_seq_len:
            raise ValueError(f"sequence of {z.shape[1]} tokens, the model was built for max_seq_len {self.max_seq_len}")
        h = self._enter(believed, z, k, mode)
        for block in self.blocks:
            h = block(h, self.rotary, causal=mode == 1)
        return self.norm(h)

    @property
    def output(self):
        """Weight of the head: (V, C)."""
        return self.head.weight

    def final(self, x):
        """x: (B, T) ids -> what the head reads in the next mode (B, T, C): causal, without noise."""
        clean = self.latents(x)
        return self.head_next(self._hidden(clean, clean, torch.zeros_like(x), 1)[:, 1:])

    def init_state(self, batch):
        """An empty cache for `advance`: position, and keys and values (layers, 2, B, H, max_seq_len + 1, D)."""
        (length, D), H = self.rotary.cos.shape, self.blocks[0].attention.n_heads
        return 0, self.mean.new_zeros(len(self.encoder) + len(self.blocks), 2, batch, H, length, D)

    @torch.no_grad()
    def advance(self, x, state):
        """x: (B, T) ids that follow `state` -> (what the head reads in the next mode at the last one (B, C), state).

        T > 1 only from an empty state.
        """
        start, cache = state
        clean = self.latents(x, cache, max(0, start - 1))
        h = self._enter(clean, clean, torch.zeros_like(x), 1, first=not start)
        after = start + h.shape[1]
        for block, part in zip(self.blocks, cache[len(self.encoder) :], strict=True):
            h = block(h, self.rotary, cache=part, start=start)
        return self.head_next(self.norm(h[:, -1])), (after, cache)

    def hidden_denoise(self, z, k):
        """z: (B, T, C) at the levels k (B, T) -> normed hidden states (B, T, C), one per token that is asked for."""

        def believe(z, r):  # mean of x given z, were the tokens independent
            return (log_likelihood(z, r, self.table) + self.log_prior).softmax(-1) @ self.table

        with torch.no_grad():
            believed = by_chunk(believe, z, self.noise[k])
        return self._hidden(believed, z, k, 0)[:, :-1]

    def _logits(self, h, z, r, temperature=1.0):
        """h, z: (N, C), r: (N) -> logits of the token (N, V). The temperature is for what the network adds."""
        logits = F.linear(h, self.head.weight).float() / temperature
        return logits if self.latent_layer else logits + log_likelihood(z, r, self.table)

    def _x_hat(self, h, z, r, temperature=1.0):
        """h, z: (N, C), r: (N) -> expected latent (N, C)."""
        if self.latent_layer:
            return self.head_latent(h).float()
        return (self._logits(h, z, r, temperature).softmax(-1) @ self.table).float()

    def _levels(self, t, rank):
        """Time t (B, 1) in [0, 1] and rank (B, T), a random order -> k (B, T): low ranks are denoised first.

        A token is between clean and gone during 1 / (1 + ramp) of the time; ramp 0: all tokens at one level.
        """
        u = (1 + self.ramp) * t - self.ramp * (1 - rank / max(1, rank.shape[1] - 1))
        return (u.clamp(0, 1) * (len(self.noise) - 1)).ceil().long()

    def _draw(self, shape, index):
        """Levels k (B, T) and noise (B, T, C): torch's generator in training, else one per window, seeded by index."""
        (B, T), C, device = shape, len(self.mean), self.noise.device
        if self.training:
            t = (torch.randperm(B, device=device) + torch.rand(1, device=device)) / B  # even over the batch
            rank, eps = torch.rand(B, T, device=device).argsort(1), torch.randn(B, T, C, device=device)
            return self._levels(t[:, None], rank), eps
        drawn = []
        for number in range(B) if index is None else index.tolist():
            g = torch.Generator().manual_seed(number)
            drawn.append([torch.rand(1, generator=g), torch.randperm(T, generator=g), torch.randn(T, C, generator=g)])
        t, rank, eps = (torch.stack(part).to(device) for part in zip(*drawn, strict=True))
        return self._levels(t, rank), eps

    def _weights(self, k):
        """k: (B, T) -> weight of each token in the loss (B, T).

        The noisy tokens of a sequence count T together, be they few or many, as in the bound of masked diffusion
        (MDLM, eq. 10): the fewer are left, the more each says about the text.
        """
        noisy = (k > 0).float()
        share = noisy.mean(1, keepdim=True).clamp_min(MIN_SHARE)
        return noisy / share + CLEAN_WEIGHT * (1 - noisy)

    def forward(self, x, y=None, index=None):
        """x: (B, T) ids -> logits of the next token (B, T, V); with targets y (B, T): (loss, report).

        The tokens of x are denoised where y >= 0; y itself is the target of the next mode, which in training sees
        the first `next_share` of the rows. index (B): window numbers that fix the noise of an evaluation.
        loss: sum of report["loss"]. The report holds detached (B, T) numbers per token, 0 where y < 0: `loss`, `nll`
        (next mode, nats), in evaluation or objective mse `mse` of x_hat, in evaluation `accuracy_0`, `_25`, `_50`:
        tokens read back with all of them at that percentage of K. Raises ValueError beyond max_seq_len.
        """
        if y is None:
            return F.linear(self.final(x), self.output)
        counted, clean = y >= 0, self.latents(x)
        k, eps = self._draw(x.shape, index)
        r = self.noise[k]
        z = clean + r[..., None] * eps
        h = self.hidden_denoise(z, k)
        weights = self._weights(k) * counted
        target, report = x.masked_fill(~counted, -100), {}
        if self.objective == "mse" or not self.training:
            error = (by_chunk(self._x_hat, h, z, r) - clean).pow(2).mean(-1)
            report["mse"] = error.detach() * counted
        if self.objective == "ce":
            zs, rs = z.flatten(0, 1), r.flatten()
            loss, nats = linear_cross_entropy(
                h, self.head.weight, target, weights, lambda part: log_likelihood(zs[part], rs[part], self.table)
            )
            report["loss"] = weights * nats
        else:
            loss = (weights * error).sum()
            report["loss"] = weights * report["mse"]
            if self.latent_layer:
                rounding, nats = linear_cross_entropy(h, self.head.weight, target, ROUNDING_WEIGHT * weights)
                loss, report["loss"] = loss + rounding, report["loss"] + ROUNDING_WEIGHT * weights * nats
        rows = max(1, round(self.next_share * len(x))) if self.training else len(x)
        weight = self.next_weight * len(x) / rows
        next_nats, nats = linear_cross_entropy(self.final(x[:rows]), self.output, y[:rows])
        report["nll"] = F.pad(nats, (0, 0, 0, len(x) - rows))  # (B, T)
        report["loss"] = report["loss"] + weight * report["nll"]
        if not self.training:
            for share in (0, 25, 50):
                k = torch.full_like(x, round(share / 100 * (len(self.noise) - 1)))
                z = clean + self.noise[k][..., None] * eps
                guess = by_chunk(lambda *a: self._logits(*a).argmax(-1), self.hidden_denoise(z, k), z, self.noise[k])
                report[f"accuracy_{share}"] = ((guess == x) & counted).float()
        return loss + weight * next_nats, report

    @torch.no_grad()
    def sample(self, n, length, steps, temperature, generator, sampler, prompt=None):
        """Denoise n sequences of `length` tokens in `steps` (0 = inference_steps) -> ids (n, length).

        sampler: "ancestral" takes a sampled token for x and adds noise, "ddim" takes the mean and adds none.
        temperature: of the network's logits, not of the likelihood. prompt: (1, P) ids that come first, held clean.
        generator: on the model's device.
        """
        device, steps = self.noise.device, steps or self.inference_steps
        if prompt is None:
            prompt = torch.empty(1, 0, dtype=torch.long, device=device)
        P, ancestral = prompt.shape[1], sampler == "ancestral"
        held = self.latents(prompt) if P else 0.0
        rank = torch.rand(n, length - P, generator=generator, device=device).argsort(1)
        z = self.noise[-1] * torch.randn(n, length, len(self.mean), generator=generator, device=device)
        z[:, :P] = held
        times = torch.linspace(1, 0, steps + 1, device=device)
        levels = [F.pad(self._levels(t.expand(n, 1), rank), (P, 0)) for t in times]  # (n, length) each

        def choose(h, z, r):
            logits = self._logits(h, z, r, temperature)
            if not ancestral:
                return logits.argmax(-1)
            return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]

        for k, after in zip(levels, levels[1:], strict=False):
            r, h = self.noise[k], self.hidden_denoise(z, k)
            ids = by_chunk(choose, h, z, r)
            if ancestral and not self.latent_layer:
                x_hat = self.table[ids]
            else:
                x_hat = by_chunk(lambda *a: self._x_hat(*a, temperature), h, z, r)
            noise = torch.randn(z.shape, generator=generator, device=device) if ancestral else None
            z = denoise(z, x_hat, r, self.noise[after], noise)
            z[:, :P] = held
        return torch.cat([prompt.expand(n, -1), ids[:, P:]], 1)
