"""A diffusion language model over the embeddings of a trained transformer, with a causal mode that has a likelihood.

B batch, T time, C width, V vocabulary, N positions, K = training_steps, k noise level of a token in 0..K, t time of a
sequence in [0, 1], x clean latent of a token, r_k noise scale of level k, z = x + r_k eps noisy latent, h hidden state.
DDPM (arXiv 2006.11239), DDIM (2010.02502), word embeddings as latents: Diffusion-LM (2205.14217), cross-entropy instead
of squared error: CDCD (2211.15089) and Plaid (2305.18619), one noise level per token: AR-Diffusion (2305.09515). With
a steep ramp the model comes close to masked diffusion, MDLM (2406.07524).
"""

import itertools

import torch
import torch.nn as nn
import torch.nn.functional as F

from models.cross_entropy import by_chunk, linear_cross_entropy
from models.sampling import GREEDY, keep_likeliest
from models.transformer import RMSNorm, Rotary, TransformerBlock, initialize

CLEAN_WEIGHT = 0.05  # weight of a token at level 0 in the loss: its own latent already gives the token away
MIN_SHARE = 0.05  # least share of noisy tokens to divide by, so that no token counts more than 20 times
# With latent_layer > 0 no table maps latents to tokens. The head learns that from a cross-entropy of this weight,
# added to the squared error.
ROUNDING_WEIGHT = 0.2
KEPT = 0.015, 0.995  # information schedule: share of the information about the token left at levels K and 0


def log_likelihood(z, r, table):
    """Return log N(z; table_v, r^2) up to a term without v: z (N, C), r (N), table (V, C) -> (N, V) in fp32."""
    with torch.autocast(z.device.type, enabled=False):
        return torch.addmm(-table.pow(2).sum(1) / 2, z.float(), table.T) / r.pow(2)[:, None]


def posterior_entropy(r, table, log_prior, draws=512):
    """Estimate the mean entropy in nats of a token given its noisy latent: noise scales r (R) -> (R).

    table (V, C): latents of the tokens. log_prior (V): their unigram log-probabilities. The draws are fixed.
    """
    quantiles = (torch.arange(draws, device=table.device) + 0.5) / draws
    tokens = torch.searchsorted(log_prior.exp().cumsum(0), quantiles).clamp_max(len(table) - 1)  # follow the prior
    eps = torch.randn(draws, table.shape[1], generator=torch.Generator().manual_seed(0)).to(table.device)
    entropies = []
    for level in r:
        likelihood = log_likelihood(table[tokens] + level * eps, level.expand(draws), table)
        log_p = (likelihood + log_prior).log_softmax(-1)  # (draws, V)
        entropies.append(-(log_p.exp() * log_p).sum(1).mean())
    return torch.stack(entropies)


def denoise(z, x_hat, r, r_after, noise):
    """Take one step to a lower level: DDIM (eq. 12) if `noise` is None, else DDPM's posterior (eq. 6, 7).

    z, x_hat, noise ~ N(0, 1): (B, T, C), r, r_after: (B, T) noise scales -> z at r_after (B, T, C).
    """
    keep, r_after = (r_after / r)[..., None], r_after[..., None]
    if noise is None:
        return x_hat + keep * (z - x_hat)
    return x_hat + keep**2 * (z - x_hat) + r_after * (1 - keep**2).clamp_min(0).sqrt() * noise


class Diffuser(nn.Module):
    """Denoise the frozen embeddings of all tokens together, each at its own level, or predict the next token.

    A trained transformer supplies latents, blocks and head (`start_from`); a saved state_dict holds them all.
    The prediction of a token is read one position to its left, as in a causal model, so that copied blocks keep their
    meaning. Its logits are head(h) + log N(z; table, r_k): evidence from the context plus evidence from the noisy
    latent.
    """

    def __init__(self, *, vocab_size, d_model, max_seq_len, n_heads, dropout, rope_base, n_layers, ffn_mult,
                 encoder_layers, training_steps, inference_steps, objective, schedule, latent_layer, noise_scale, ramp,
                 next_weight, next_share):  # fmt: skip
        """Arguments as in train_expert.DiffuserConfig; all other sizes, with encoder_layers, are the transformer's.

        forward: ids (B, T) -> logits of the next token (B, T, V), with T <= max_seq_len.
        """
        super().__init__()
        if latent_layer and objective != "mse":
            raise ValueError(f"latent_layer {latent_layer} has no table of token likelihoods: it needs objective mse")
        if latent_layer > encoder_layers:
            raise ValueError(f"latent_layer {latent_layer}, the transformer has {encoder_layers} layers")
        self.max_seq_len, self.inference_steps, self.latent_layer = max_seq_len, inference_steps, latent_layer
        self.objective, self.schedule, self.noise_scale, self.ramp = objective, schedule, noise_scale, ramp
        self.next_weight, self.next_share = next_weight, next_share
        sizes = dict(d_model=d_model, n_heads=n_heads, ffn_mult=ffn_mult)
        self.rotary = Rotary(d_model // n_heads, max_seq_len + 1, rope_base)  # + 1 for the start position
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.encoder = nn.ModuleList(TransformerBlock(**sizes, dropout=0.0) for _ in range(latent_layer))
        self.start = nn.Parameter(torch.randn(2, 1, d_model))  # first position of the two modes: denoise, next
        self.inward = nn.Linear(2 * d_model, d_model, bias=False)  # reads the estimate of x and the noisy latent
        self.level = nn.Sequential(nn.Linear(32, d_model), nn.SiLU(), nn.Linear(d_model, d_model))
        self.blocks = nn.ModuleList(TransformerBlock(**sizes, dropout=dropout) for _ in range(n_layers))
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
        """Copy latents, blocks and head from a trained Transformer.

        ids: (n,) training tokens, from which mean, std and unigram prior are computed. The copied blocks are spread
        evenly over those of the transformer. Raises ValueError if a channel of the latents does not vary.
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
        if self.latent_layer:  # a token has many latents: use their mean, and 0 for a token that never occurs
            self.table.zero_().index_add_(0, windows.flatten(), x).div_(counts.clamp_min(1)[:, None])
        else:
            self.table.copy_((self.embedding.weight - self.mean) / self.std)
        self.noise.copy_(self._noise_levels())

    def _noise_levels(self):
        """Return the noise scale r of the levels 0..K: (K + 1).

        `information`: the entropy of a token given its noisy latent rises linearly with the level, so that every step
        resolves the same amount. `cosine` (Improved DDPM, arXiv 2102.09672, eq. 17) and `linear` are fixed curves.
        """
        u = torch.linspace(0, 1, len(self.noise), device=self.noise.device)
        if self.schedule == "information":
            grid = torch.logspace(-2, 1.2, 40, device=u.device) * len(self.mean) ** 0.5
            entropy = posterior_entropy(grid, self.table, self.log_prior).cummax(0).values
            share = entropy / -(self.log_prior.exp() * self.log_prior).sum()
            target = 1 - KEPT[1] + (KEPT[1] - KEPT[0]) * u
            i = torch.searchsorted(share, target).clamp(1, len(grid) - 1)
            between = (target - share[i - 1]) / (share[i] - share[i - 1]).clamp_min(1e-6)
            return grid[i - 1] * (grid[i] / grid[i - 1]) ** between.clamp(0, 1)
        alpha_bar = 1 - u if self.schedule == "linear" else (torch.pi / 2 * (u + 0.008) / 1.008).cos() ** 2
        alpha_bar = alpha_bar.clamp(1e-5, 0.9999)  # r stays finite, and above 0
        return (self.noise_scale or 0.37 * len(self.mean) ** 0.5) * (1 / alpha_bar - 1).sqrt()

    def train(self, mode=True):
        super().train(mode)
        self.encoder.eval()
        return self

    @torch.no_grad()
    def latents(self, ids, cache=(None,), start=0):
        """ids: (B, T) -> normalized latents x (B, T, C) in fp32: embeddings, or outputs of `latent_layer` blocks."""
        h = self.embedding(ids)
        for block, part in zip(self.encoder, itertools.cycle(cache)):
            h = block(h, self.rotary, cache=part, start=start)
        return (h.float() - self.mean) / self.std

    def _inputs(self, x_mean, z, k, mode, first=True):
        """x_mean, z: (B, T, C), k: (B, T), mode 0 denoise, 1 next -> inputs of the blocks (B, 1 + T, C).

        x_mean: estimate of x. The 1 is the start position; with first=False it is left out.
        """
        scaled = z / (1 + self.noise[k][..., None] ** 2).sqrt()
        octaves = 2.0 ** torch.arange(-1, 15, device=z.device)
        angle = torch.linspace(0, 1, len(self.noise), device=z.device)[:, None] * octaves
        level = self.level(torch.cat([angle.sin(), angle.cos()], -1))  # (K + 1, C)
        # F.embedding, not level[k]: on a CPU the backward of indexing adds in an order that depends on the threads
        h = self.inward(torch.cat([x_mean, scaled], -1)) + F.embedding(k, level)
        if first:
            h = torch.cat([self.start[mode].expand(len(h), 1, -1), h], 1)
        return h * self.std + self.mean  # the scale that the copied blocks were trained on

    def _hidden(self, x_mean, z, k, mode):
        """Arguments of `_inputs` -> normalized hidden states (B, 1 + T, C)."""
        if z.shape[1] > self.max_seq_len:
            raise ValueError(f"sequence of {z.shape[1]} tokens, the model was built for max_seq_len {self.max_seq_len}")
        h = self._inputs(x_mean, z, k, mode)
        for block in self.blocks:
            h = block(h, self.rotary, causal=mode == 1)
        return self.norm(h)

    @property
    def output(self):
        """Weight of the head: (V, C)."""
        return self.head.weight

    def final(self, x):
        """x: (B, T) ids -> hidden states that the head reads in next mode (B, T, C): causal, without noise."""
        clean = self.latents(x)
        return self.head_next(self._hidden(clean, clean, torch.zeros_like(x), 1)[:, 1:])

    def init_state(self, batch):
        """Return an empty cache for `advance`: position, and keys and values (layers, 2, B, H, max_seq_len + 1, D)."""
        length, D = self.rotary.cos.shape
        H = self.blocks[0].attention.n_heads
        return 0, self.mean.new_zeros(len(self.encoder) + len(self.blocks), 2, batch, H, length, D)

    @torch.no_grad()
    def advance(self, x, state):
        """x: (B, T) ids that follow `state` -> (hidden state of the last id in next mode (B, C), new state).

        T > 1 only from an empty state.
        """
        start, cache = state
        clean = self.latents(x, cache, max(0, start - 1))
        h = self._inputs(clean, clean, torch.zeros_like(x), 1, first=not start)
        after = start + h.shape[1]
        for block, part in zip(self.blocks, cache[len(self.encoder) :], strict=True):
            h = block(h, self.rotary, cache=part, start=start)
        return self.head_next(self.norm(h[:, -1])), (after, cache)

    def hidden_denoise(self, z, k):
        """z: (B, T, C) at the levels k (B, T) -> normalized hidden states (B, T, C); state i predicts token i."""

        def posterior_mean(z, r):  # mean of x given z, as if tokens were independent
            return (log_likelihood(z, r, self.table) + self.log_prior).softmax(-1) @ self.table

        with torch.no_grad():
            x_mean = by_chunk(posterior_mean, z, self.noise[k])
        return self._hidden(x_mean, z, k, 0)[:, :-1]

    def _logits(self, h, z, r, temperature=1.0):
        """h, z: (N, C), r: (N) -> logits of the token (N, V). temperature: of the network's logits only."""
        logits = F.linear(h, self.head.weight).float() / temperature
        return logits if self.latent_layer else logits + log_likelihood(z, r, self.table)

    def _x_hat(self, h, z, r, temperature=1.0):
        """h, z: (N, C), r: (N) -> expected latent (N, C)."""
        if self.latent_layer:
            return self.head_latent(h).float()
        return (self._logits(h, z, r, temperature).softmax(-1) @ self.table).float()

    def _levels(self, t, rank):
        """Times t (B, 1) in [0, 1] and random ranks (B, T) of the tokens -> levels k (B, T); low ranks first.

        Each token goes from level K to 0 within 1 / (1 + ramp) of the time. With ramp 0 all tokens share one level.
        """
        u = (1 + self.ramp) * t - self.ramp * (1 - rank / max(1, rank.shape[1] - 1))
        return (u.clamp(0, 1) * (len(self.noise) - 1)).ceil().long()

    def _draw(self, shape, index):
        """Draw levels k (B, T) and noise eps (B, T, C) for a batch of `shape` (B, T).

        Training uses torch's generator. An evaluation uses one generator per window, seeded by its number in `index`.
        """
        B, T = shape
        C = len(self.mean)
        device = self.noise.device
        if self.training:
            t = (torch.randperm(B, device=device) + torch.rand(1, device=device)) / B  # even over the batch
            rank, eps = torch.rand(B, T, device=device).argsort(1), torch.randn(B, T, C, device=device)
            return self._levels(t[:, None], rank), eps
        draws = []
        for number in range(B) if index is None else index.tolist():
            g = torch.Generator().manual_seed(number)
            draws.append([torch.rand(1, generator=g), torch.randperm(T, generator=g), torch.randn(T, C, generator=g)])
        t, rank, eps = (torch.stack(part).to(device) for part in zip(*draws, strict=True))
        return self._levels(t, rank), eps

    def _weights(self, k):
        """Levels k (B, T) -> weight of each token in the loss (B, T).

        The weights of the noisy tokens of a sequence sum to T, however many there are, as in the bound of masked
        diffusion (MDLM, eq. 10).
        """
        noisy = (k > 0).float()
        share = noisy.mean(1, keepdim=True).clamp_min(MIN_SHARE)
        return noisy / share + CLEAN_WEIGHT * (1 - noisy)

    def forward(self, x, y=None, index=None):
        """x: (B, T) ids -> logits of the next token (B, T, V). With targets y (B, T): (loss, report).

        The tokens of x are denoised where y >= 0. y is the target of the next mode, which in training sees only the
        first `next_share` of the rows. index (B): window numbers that fix the noise of an evaluation.
        loss: sum of report["loss"]. The report holds detached (B, T) values per token, 0 where y < 0: `loss`; `nll` of
        the next mode in nats; `mse` of x_hat (in evaluation or with objective mse); in evaluation `accuracy_0`, `_25`
        and `_50`, whether the token is recovered with all tokens at that percentage of K.
        Raises ValueError beyond max_seq_len.
        """
        if y is None:
            return F.linear(self.final(x), self.output)
        counted = y >= 0
        clean = self.latents(x)
        k, eps = self._draw(x.shape, index)
        r = self.noise[k]
        z = clean + r[..., None] * eps
        h = self.hidden_denoise(z, k)
        weights = self._weights(k) * counted
        target = x.masked_fill(~counted, -100)
        report = {}
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
                loss = loss + rounding
                report["loss"] = report["loss"] + ROUNDING_WEIGHT * weights * nats
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
    def sample(self, n, length, steps, temperature, generator, sampler, prompt=None, top_k=0, top_p=1.0):
        """Generate n sequences of `length` tokens in `steps` steps (0 = inference_steps) -> ids (n, length).

        sampler: "ancestral" uses a sampled token as x and adds noise, "ddim" uses the mean and adds none.
        temperature: of the network's logits, not of the likelihood; 0 takes the likeliest token of both.
        prompt: (1, P) first ids, kept clean. top_k, top_p: of sampled tokens, as in sampling.keep_likeliest.
        generator: on the model's device.
        """
        device = self.noise.device
        steps = steps or self.inference_steps
        if prompt is None:
            prompt = torch.empty(1, 0, dtype=torch.long, device=device)
        P = prompt.shape[1]
        ancestral = sampler == "ancestral"
        greedy = temperature < GREEDY
        temperature = 1.0 if greedy else temperature
        prompt_latents = self.latents(prompt) if P else 0.0
        rank = torch.rand(n, length - P, generator=generator, device=device).argsort(1)
        z = self.noise[-1] * torch.randn(n, length, len(self.mean), generator=generator, device=device)
        z[:, :P] = prompt_latents
        times = torch.linspace(1, 0, steps + 1, device=device)
        levels = [F.pad(self._levels(t.expand(n, 1), rank), (P, 0)) for t in times]  # (n, length) each

        def choose(h, z, r):
            logits = self._logits(h, z, r, temperature)
            if greedy or not ancestral:
                return logits.argmax(-1)
            logits = keep_likeliest(logits, top_k, top_p)
            return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]

        for k, after in zip(levels, levels[1:], strict=False):
            r = self.noise[k]
            h = self.hidden_denoise(z, k)
            ids = by_chunk(choose, h, z, r)
            if (greedy or ancestral) and not self.latent_layer:
                x_hat = self.table[ids]
            else:
                x_hat = by_chunk(lambda *a: self._x_hat(*a, temperature), h, z, r)
            noise = torch.randn(z.shape, generator=generator, device=device) if ancestral else None
            z = denoise(z, x_hat, r, self.noise[after], noise)
            z[:, :P] = prompt_latents
        return torch.cat([prompt.expand(n, -1), ids[:, P:]], 1)
