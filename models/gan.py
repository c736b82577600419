"""Networks that judge: are these particles real, is this latent drawn from N(0, I).

B events, T slots, F features, N latents, D latent width. Hinge losses and the adaptive weight: VQGAN (arXiv 2012.09841,
eq. 7), spectral norm (1802.05957), adversarial autoencoders (1511.05644).
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
RAMP = 0.1  # share of the steps over which a discriminator comes to count


@contextlib.contextmanager
def frozen(judge):
    """Within, no gradient reaches the weights of `judge`; what it judges still gets its own."""
    judge.requires_grad_(False)
    try:
        yield judge
    finally:
        judge.requires_grad_(True)


def hinge_discriminator(real, fake):
    """Loss of a discriminator from its scores (B) of real and of generated events: a scalar."""
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


def hinge_generator(fake):
    """Loss of the generator from the scores (B) of what it made: a scalar."""
    return -fake.mean()


def critic_loss(drawn, encoded):
    """Loss of a critic from its logits (N) of draws from N(0, I) and of latents: binary cross-entropy, a scalar."""
    return F.softplus(-drawn).mean() + F.softplus(encoded).mean()


def critic_pull(encoded):
    """Loss of the encoder from the logits (N) of its latents, non-saturating (arXiv 1406.2661, section 3): a scalar."""
    return F.softplus(-encoded).mean()


def gradient_norms(rec, adv, last_weight):
    """Norms of the gradients of two losses with respect to `last_weight`, averaged over ranks: (2), detached."""
    norms = [torch.autograd.grad(loss, last_weight, retain_graph=True)[0].float().norm() for loss in (rec, adv)]
    norms = torch.stack(norms).detach()
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(norms)
        norms /= dist.get_world_size()
    return norms


def adaptive_weight(rec, adv, last_weight, scale):
    """Weight of the loss `adv` at which it pulls at `last_weight` `scale` times as hard as `rec`: a detached scalar."""
    rec, adv = gradient_norms(rec, adv, last_weight)
    return scale * (rec / (adv + 1e-4)).clamp(0, 1e4)


class Discriminator(nn.Module):
    """How real an event looks: message layers over [x, type, slot], mean, globals -> a score; all spectrally normed.

    Features are judged, not types: real and generated events are given the same ones.
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
    """Is a latent drawn from N(0, I) or encoded: z (N, D) -> logit (N)."""

    def __init__(self, dim):
        super().__init__(nn.Linear(dim, CRITIC), nn.GELU(), nn.Linear(CRITIC, CRITIC), nn.GELU(), nn.Linear(CRITIC, 1))

    def forward(self, z):
        return super().forward(z).squeeze(-1)


class Judges(nn.Module):
    """Who judges an autoencoder while it trains: a discriminator of its events, a critic of the latents of encoder gan.

    They lower their own loss, and what the model pays for being found out: neither gradient reaches the other side.
    """

    def __init__(self, *, discriminator, encoder, level, cont_dim, n_tokens, num_types, n_globals, latent_dim, gnn_dim,
                 gnn_layers, adv_weight, adv_start, latent_adv_weight):  # fmt: skip
        super().__init__()
        self.level, self.adv_weight, self.adv_start, self.latent_adv_weight = (
            level, adv_weight, adv_start, latent_adv_weight)  # fmt: skip
        sizes = dict(cont_dim=cont_dim, n_tokens=n_tokens, num_types=num_types, n_globals=n_globals)
        judge = Discriminator(**sizes, width=gnn_dim, layers=gnn_layers) if discriminator else None
        self.discriminator, self.critic = judge, LatentCritic(latent_dim) if encoder == "gan" else None
        graphs.donated_buffer = False  # else a compiled model goes backward once, and adaptive_weight needs more

    def forward(self, batch, output, loss, last_weight, progress):
        """Judge the model's output on a batch (x, ids, globals) -> own loss, cost to the model, {name: (sum, count)}.

        loss: the model's, which the adaptive weight compares with. progress: share of the steps that are done; from
        adv_start on the discriminator counts, in full after a tenth of the steps.
        """
        own, cost, said, mask = 0.0, 0.0, {}, batch["ids"] > 0
        if self.critic:
            z = output["z_e"].float()
            z = z[mask] if self.level == "token" else z
            with frozen(self.critic):
                cost = self.latent_adv_weight * critic_pull(self.critic(z))
            own = critic_loss(self.critic(torch.randn_like(z)), self.critic(z.detach()))
            said = dict(latent_d_loss=(own.detach(), 1))
        if self.discriminator:
            about, made = (batch["ids"], mask, batch["globals"]), output["x_hat"]
            with frozen(self.discriminator):
                fooled = hinge_generator(self.discriminator(made, *about))
            real, fake = self.discriminator(batch["x"], *about), self.discriminator(made.detach(), *about)
            judged = hinge_discriminator(real, fake)
            ramp = min(1.0, max(0.0, progress - self.adv_start) / RAMP)
            weight = ramp * adaptive_weight(loss, fooled, last_weight, self.adv_weight) if ramp else real.new_zeros(())
            own, cost = own + judged, cost + weight * fooled
            rights = dict(d_acc_real=((real > 0).sum(), len(real)), d_acc_fake=((fake < 0).sum(), len(fake)))
            said |= dict(d_loss=(judged.detach(), 1), g_loss=(fooled.detach(), 1), adv_w=(weight, 1)) | rights
        return own, cost, said
