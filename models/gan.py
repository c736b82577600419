"""Adversarial networks: a discriminator of events, a critic of latents, and their losses.

B events, T slots, F features, G globals of an event, N latents, D latent width. Hinge losses and the adaptive weight:
VQGAN (arXiv 2012.09841, eq. 7), spectral norm (1802.05957), adversarial autoencoders (1511.05644).
"""

import contextlib

import torch
import torch._functorch.config as graphs
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.parametrizations import spectral_norm

from models.messages import MessageNetwork, message_weights

EMBEDDED = 8  # width of the embeddings of type and slot
CRITIC = 64  # width of the critic of latents
RAMP = 0.1  # share of the steps over which the weight of the discriminator rises to full


@contextlib.contextmanager
def frozen(judge):
    """Inside the `with` no gradient reaches the weights of `judge`; its inputs still get gradients."""
    judge.requires_grad_(False)
    try:
        yield judge
    finally:
        judge.requires_grad_(True)


def hinge_discriminator(real, fake):
    """Return the loss of a discriminator from its scores (B) of real and of generated events: a scalar."""
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


def hinge_generator(fake):
    """Return the loss of the generator from the scores (B) of its events: a scalar."""
    return -fake.mean()


def critic_loss(drawn, encoded):
    """Return the binary cross-entropy of a critic from its logits (N) of draws from N(0, I) and of latents."""
    return F.softplus(-drawn).mean() + F.softplus(encoded).mean()


def critic_pull(encoded):
    """Return the loss of the encoder from the critic's logits (N) of its latents: a scalar.

    This is the non-saturating loss (arXiv 1406.2661, section 3).
    """
    return F.softplus(-encoded).mean()


def gradient_norms(rec, adv, last_weight):
    """Return the norms of the gradients of two losses at `last_weight`, averaged over ranks: (2), detached."""
    norms = [torch.autograd.grad(loss, last_weight, retain_graph=True)[0].float().norm() for loss in (rec, adv)]
    norms = torch.stack(norms).detach()
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(norms)
        norms /= dist.get_world_size()
    return norms


def adaptive_weight(rec, adv, last_weight, scale):
    """Return the weight of loss `adv` that makes its gradient at `last_weight` `scale` times that of `rec`.

    A detached scalar, at most 1e4 times `scale`.
    """
    rec, adv = gradient_norms(rec, adv, last_weight)
    return scale * (rec / (adv + 1e-4)).clamp(0, 1e4)


class Discriminator(nn.Module):
    """Score how real an event looks: message layers over [x, type, slot], mean, globals, MLP; all spectrally normed.

    Only features are judged: real and generated events have the same types.
    """

    def __init__(self, *, cont_dim, n_tokens, num_types, n_globals, width, layers):
        super().__init__()
        self.type_embedding = nn.Embedding(num_types, EMBEDDED)
        self.slot_embedding = nn.Embedding(n_tokens, EMBEDDED)
        self.network = MessageNetwork(inputs=cont_dim + 2 * EMBEDDED, width=width, layers=layers)
        self.score = nn.Sequential(nn.Linear(width + n_globals, width), nn.GELU(), nn.Linear(width, 1))
        for module in [m for m in self.modules() if isinstance(m, nn.Linear)]:
            spectral_norm(module)

    def forward(self, x, ids, mask, globals):
        """x (B, T, F), ids (B, T), mask (B, T) bool, globals (B, G) -> (B)."""
        x = x.masked_fill(~mask[..., None], 0)
        slot = self.slot_embedding.weight.expand(len(ids), -1, -1)
        h = self.network(torch.cat([x, self.type_embedding(ids), slot], -1), message_weights(mask))
        real = mask[..., None].to(h.dtype)
        mean = (h * real).sum(1) / real.sum(1).clamp_min(1)
        return self.score(torch.cat([mean, globals], -1)).squeeze(-1)


class LatentCritic(nn.Sequential):
    """Tell draws from N(0, I) from encoded latents: z (N, D) -> logit (N)."""

    def __init__(self, dim):
        super().__init__(nn.Linear(dim, CRITIC), nn.GELU(), nn.Linear(CRITIC, CRITIC), nn.GELU(), nn.Linear(CRITIC, 1))

    def forward(self, z):
        return super().forward(z).squeeze(-1)


class Judges(nn.Module):
    """The adversaries of an autoencoder: a discriminator of its events, and a critic of the latents of encoder `gan`.

    They compute two losses, one for themselves and one for the model. Neither gradient reaches the other side.
    """

    def __init__(self, *, discriminator, encoder, level, cont_dim, n_tokens, num_types, n_globals, latent_dim, gnn_dim,
                 gnn_layers, adv_weight, adv_start, latent_adv_weight):  # fmt: skip
        """Arguments as in train_ae.AeConfig. forward: a batch and the model's output -> two losses and metrics."""
        super().__init__()
        self.level, self.adv_weight, self.adv_start = level, adv_weight, adv_start
        self.latent_adv_weight = latent_adv_weight
        sizes = dict(cont_dim=cont_dim, n_tokens=n_tokens, num_types=num_types, n_globals=n_globals)
        self.discriminator = Discriminator(**sizes, width=gnn_dim, layers=gnn_layers) if discriminator else None
        self.critic = LatentCritic(latent_dim) if encoder == "gan" else None
        graphs.donated_buffer = False  # a compiled model must go backward several times for adaptive_weight

    def forward(self, batch, output, loss, last_weight, progress):
        """Judge the output for a batch (x, ids, globals) -> (loss of the judges, loss for the model, metrics).

        output: of AutoEncoder. loss: the model's reconstruction loss, to which the adaptive weight compares. progress:
        share of the steps done. The weight of the discriminator rises from 0 at adv_start to its full value RAMP later.
        metrics: {name: (sum, count)}.
        """
        mask = batch["ids"] > 0
        judge_loss, model_loss, metrics = 0.0, 0.0, {}
        if self.critic:
            z = output["z_e"].float()
            z = z[mask] if self.level == "token" else z
            with frozen(self.critic):
                model_loss = self.latent_adv_weight * critic_pull(self.critic(z))
            judge_loss = critic_loss(self.critic(torch.randn_like(z)), self.critic(z.detach()))
            metrics = dict(latent_d_loss=(judge_loss.detach(), 1))
        if self.discriminator:
            x_hat = output["x_hat"]
            rest = (batch["ids"], mask, batch["globals"])
            with frozen(self.discriminator):
                g_loss = hinge_generator(self.discriminator(x_hat, *rest))
            real, fake = self.discriminator(batch["x"], *rest), self.discriminator(x_hat.detach(), *rest)
            d_loss = hinge_discriminator(real, fake)
            ramp = min(1.0, max(0.0, progress - self.adv_start) / RAMP)
            weight = ramp * adaptive_weight(loss, g_loss, last_weight, self.adv_weight) if ramp else real.new_zeros(())
            judge_loss = judge_loss + d_loss
            model_loss = model_loss + weight * g_loss
            metrics |= dict(d_loss=(d_loss.detach(), 1), g_loss=(g_loss.detach(), 1), adv_w=(weight, 1))
            metrics |= dict(d_acc_real=((real > 0).sum(), len(real)), d_acc_fake=((fake < 0).sum(), len(fake)))
        return judge_loss, model_loss, metrics
