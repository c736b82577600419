"""Autoencoders of events: an encoder, a latent space and a decoder, each of several kinds, in any combination.

B events, T slots, F features of a slot, G globals of an event, C width, D latent width. x (B, T, F) features, ids
(B, T) types with 0 for an empty slot, mask = ids != 0, globals (B, G). At level `token` each particle has a latent,
z (B, T, D); at level `event` each event has one, z (B, D).
Vector-quantized latents: arXiv 1711.00937; particles as tokens: OmniJet-alpha (2403.05618); decoders that denoise:
diffusion autoencoders (2111.15640).
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from models.codebook import Codebook
from models.diffusion import DenoisingNetwork, sinusoid
from models.messages import MessageNetwork, message_weights
from models.parts import DECODERS, ENCODERS, LATENT_SPACES, build_part, part

EMBEDDED = 8  # width of the embeddings of type and slot
READOUT = 128  # hidden width of the MLP after message layers
HEADS = 64, 32  # hidden widths of the heads of types and globals
NOISED = 32  # width of the embeddings of x_t and of t, which decoders other than `diffusion` read beside the latent
LAST_STEP = 1000  # t of a diffusion decoder that runs once, from x_T = 0
POOLED = 4.0  # divisor of sums over particles
ACTIVATIONS = dict(relu=nn.ReLU, gelu=nn.GELU, silu=nn.SiLU)
REPORTED = "type_accuracy", "revived", "accuracy"  # sums of loss_sums and regression_sums that are no losses


def mlp(widths, activation, dropout):
    """Build an MLP with Linears between `widths`, and activation and dropout after all but the last."""
    parts = []
    for inputs, outputs in zip(widths[:-1], widths[1:], strict=True):
        parts += [nn.Linear(inputs, outputs), ACTIVATIONS[activation](), nn.Dropout(dropout)]
    return nn.Sequential(*parts[:-2])


def append_noise(h, width, training):
    """Append `width` noise inputs to h (..., C): N(0, 1) in training, otherwise 0 -> (..., C + width)."""
    noise = h.new_zeros(*h.shape[:-1], width)
    return torch.cat([h, noise.normal_() if training else noise], -1)


def mean_over(h, mask):
    """Return the mean over particles: h (B, T, C), mask (B, T) -> (B, C), 0 without particles."""
    real = mask[..., None].to(h.dtype)
    return (h * real).sum(1) / real.sum(1).clamp_min(1)


def loss_sums(output, target, ids, globals, level):
    """Compare the output of an AutoEncoder with the targets -> {name: (sum, count)}, float32 scalars.

    Add sums and counts over batches and ranks before dividing them. target (B, T, F): x, or v for a denoiser.
    rec_tokens: squared error per feature of a particle. rec_globals: squared error per global. commit: per latent.
    rec_types: cross-entropy, and type_accuracy: of particles at level token, of all slots at level event; both are
    missing without a type head. revived: codes that were restarted in this batch. Other losses of the latent space have
    count 1.
    """
    mask = ids > 0
    counts = denominators(dict(x=target, ids=ids, globals=globals), level)
    error = (output["x_hat"].float() - target).masked_fill(~mask[..., None], 0)
    sums = dict(rec_tokens=error.square().sum(), rec_globals=(output["rec_globals"].float() - globals).square().sum())
    sums["commit"] = output["aux"]["commit"] * counts["commit"]
    if output["type_logits"] is not None:
        logits = output["type_logits"].float()
        scored = torch.ones_like(mask) if level == "event" else mask
        nats = F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").view_as(ids)
        sums["rec_types"] = (nats * scored).sum()
        sums["type_accuracy"] = ((logits.argmax(-1) == ids) & scored).sum().float()
    pairs = {name: (number, counts[name]) for name, number in sums.items()}
    return pairs | {name: (value, 1) for name, value in output["aux"].items() if name != "commit"}


def denominators(batch, level):
    """Return {name: count} that divides the sum of each loss over a batch (x, ids, globals; or x, y)."""
    if "ids" not in batch:
        return dict(miss=len(batch["y"]))
    particles = (batch["ids"] > 0).sum()
    events = len(batch["ids"])
    slots = particles if level == "token" else batch["ids"].numel()
    features = particles * batch["x"].shape[-1]
    return dict(
        rec_tokens=features,
        eps_loss=features,
        rec_globals=batch["globals"].numel(),
        rec_types=slots,
        type_accuracy=slots,
        commit=particles if level == "token" else events,
    )


class Slots(nn.Module):
    """Embeddings of the type and the place of each slot: ids (B, T) -> (B, T, width)."""

    def __init__(self, *, num_types, n_tokens):
        """num_types 0 or n_tokens 0 leaves out that embedding."""
        super().__init__()
        self.type_embedding = nn.Embedding(num_types, EMBEDDED) if num_types else None
        self.slot_embedding = nn.Embedding(n_tokens, EMBEDDED) if n_tokens else None
        self.width = EMBEDDED * ((num_types > 0) + (n_tokens > 0))

    def forward(self, ids):
        parts = [] if self.type_embedding is None else [self.type_embedding(ids)]
        if self.slot_embedding is not None:
            parts.append(self.slot_embedding.weight.expand(len(ids), -1, -1))
        return torch.cat(parts, -1)


# --- encoders: x, ids, mask, globals -> z -----------------------------------------------------
class MlpEncoder(nn.Module):
    """`mlp`: an MLP of each particle; at level event of all particles and globals."""

    noisy = False  # whether it has noise inputs

    def __init__(self, *, level, cont_dim, n_tokens, num_types, n_globals, latent_dim, hidden, activation, dropout,
                 noise_dim):  # fmt: skip
        super().__init__()
        self.level, self.noise_dim = level, noise_dim if self.noisy else 0
        self.slots = Slots(num_types=num_types, n_tokens=0)
        slot = cont_dim + self.slots.width
        inputs = slot if level == "token" else n_tokens * slot + n_globals
        self.net = mlp([inputs + self.noise_dim, *hidden, latent_dim], activation, dropout)

    def forward(self, x, ids, mask, globals):
        h = torch.cat([x, self.slots(ids)], -1)
        h = h if self.level == "token" else torch.cat([h.flatten(1), globals], -1)
        return self.net(append_noise(h, self.noise_dim, self.training))


class GanEncoder(MlpEncoder):
    """`gan`: the same with noise inputs; train_ae.py adds a critic of its latents."""

    noisy = True


class SetEncoder(nn.Module):
    """`gnn`: message layers, then an MLP per particle or of their pool."""

    denoising = False  # whether the denoising network replaces the message layers

    def __init__(self, *, level, cont_dim, n_tokens, num_types, n_globals, latent_dim, gnn_dim, gnn_layers, activation,
                 dropout):  # fmt: skip
        super().__init__()
        self.level = level
        self.slots = Slots(num_types=num_types, n_tokens=n_tokens)
        sizes = dict(inputs=cont_dim + self.slots.width, width=gnn_dim, layers=gnn_layers)
        if self.denoising:
            self.network = DenoisingNetwork(condition=0, outputs=gnn_dim, **sizes)
        else:
            self.network = MessageNetwork(**sizes)
        inputs = gnn_dim if level == "token" else 2 * gnn_dim + n_globals
        self.readout = mlp([inputs, READOUT, latent_dim], activation, dropout)

    def forward(self, x, ids, mask, globals):
        h = torch.cat([x, self.slots(ids)], -1)
        if self.denoising:
            h = self.network(h, torch.zeros_like(ids[:, 0]), None, mask)
        else:
            h = self.network(h, message_weights(mask))
        if self.level == "event":
            total = h.masked_fill(~mask[..., None], 0).sum(1) / POOLED
            h = torch.cat([mean_over(h, mask), total, globals], -1)
        return self.readout(h)


class DiffusionEncoder(SetEncoder):
    """`diffusion`: the denoising network at t = 0, then an MLP per particle or of their pool."""

    denoising = True


def build_encoder(kind, **settings):
    """Build the encoder `kind`, a module (x, ids, mask, globals) -> z; x must be 0 in empty slots."""
    return build_part(ENCODERS, kind, **settings)


# --- latent spaces: z, mask (None at level event) -> z_q, indices of codes or None, losses ------------
class Identity(nn.Module):
    """`none`: latents as they are."""

    def forward(self, z, mask):
        return z, None, {}


class LinearMap(nn.Linear):
    """`linear`: a learned linear map."""

    def __init__(self, *, latent_dim):
        super().__init__(latent_dim, latent_dim)

    def forward(self, z, mask):
        return super().forward(z), None, {}


def codebook(*, latent_dim, codebook_size, beta, ema_decay, revive):
    """Build `vq`, whose loss is the commitment."""
    return Codebook(size=codebook_size, dim=latent_dim, beta=beta, decay=ema_decay, revive=revive, eps=1e-5)


# --- decoders: h, mask, x_t, t -> features; h is the latent with other inputs of the decoder ------
# `flat`: at level event one row holds all slots, h (B, inputs), and no slot is told its place.
# `denoises`: it reads x_t and t by itself. AutoEncoder puts both into the h of other decoders.
class MlpDecoder(nn.Module):
    """`mlp`: an MLP of each row, h (..., inputs) -> (..., outputs)."""

    flat = True
    noisy = False  # whether it has noise inputs

    def __init__(self, *, inputs, outputs, hidden, activation, dropout, noise_dim):
        super().__init__()
        self.noise_dim = noise_dim if self.noisy else 0
        self.net = mlp([inputs + self.noise_dim, *hidden, outputs], activation, dropout)
        self.last = self.net[-1]  # also under this name in checkpoints

    def forward(self, h, mask, x_t, t):
        return self.net(append_noise(h, self.noise_dim, self.training))


class GanDecoder(MlpDecoder):
    """`gan`: the same with noise inputs."""

    noisy = True


class GraphDecoder(nn.Module):
    """`gnn`: message layers, then an MLP of each particle: h (B, T, inputs) -> (B, T, outputs)."""

    def __init__(self, *, inputs, outputs, gnn_dim, gnn_layers, activation, dropout):
        super().__init__()
        self.network = MessageNetwork(inputs=inputs, width=gnn_dim, layers=gnn_layers)
        self.readout = mlp([gnn_dim, READOUT, outputs], activation, dropout)
        self.last = self.readout[-1]  # also under this name in checkpoints

    def forward(self, h, mask, x_t, t):
        return self.readout(self.network(h, message_weights(mask)))


class DiffusionDecoder(nn.Module):
    """`diffusion`: the denoising network of x_t and t with condition h (B, T, inputs) -> (B, T, outputs), first 0.

    With x_t None it runs once, from x_T = 0 at the last step.
    """

    denoises = True

    def __init__(self, *, inputs, outputs, gnn_dim, gnn_layers):
        super().__init__()
        sizes = dict(inputs=outputs, outputs=outputs, width=gnn_dim, layers=gnn_layers)
        self.network = DenoisingNetwork(condition=inputs, **sizes)
        self.last = self.network.out
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, h, mask, x_t, t):
        if x_t is None:
            x_t = h.new_zeros(*mask.shape, self.last.out_features)
            t = torch.full_like(mask[:, 0], LAST_STEP, dtype=torch.long)
        return self.network(x_t, t, h, mask)


def build_decoder(kind, **settings):
    """Build the decoder `kind`, a module (h, mask, x_t, t) -> features."""
    return build_part(DECODERS, kind, **settings)


def check_shape(module, tensor, *shape):
    """Raise ValueError unless the output of a part has this shape: another one might broadcast."""
    if tensor.shape != shape:
        raise ValueError(f"{type(module).__name__} returned {tuple(tensor.shape)}: expected {shape}")


class AutoEncoder(nn.Module):
    """Encode events, quantize their latents, and decode features, types and globals."""

    def __init__(self, *, encoder, decoder, latent_space, level, cont_dim, n_tokens, num_types, n_globals, latent_dim,
                 hidden, gnn_dim, gnn_layers, activation, dropout, side_info, noise_dim, codebook_size, beta, ema_decay,
                 revive, denoise, **others):  # fmt: skip
        """Arguments as in train_ae.AeConfig.

        encoder, decoder, latent_space: words of models/parts.py. side_info: the decoder reads types and slots, and
        type_logits is None. denoise: the decoder also reads x_t and t, and x_hat is its v (see diffusion.py). At level
        event a decoder predicts all slots, and type_logits tell the empty ones; with denoise empty slots are left out.
        others: settings of parts that are not in this file.
        """
        super().__init__()
        self.level, self.latent_space, self.cont_dim, self.latent_dim = level, latent_space, cont_dim, latent_dim
        settings = dict(
            level=level, cont_dim=cont_dim, n_tokens=n_tokens, num_types=num_types, n_globals=n_globals,
            latent_dim=latent_dim, hidden=hidden, gnn_dim=gnn_dim, gnn_layers=gnn_layers, noise_dim=noise_dim,
            activation=activation, dropout=dropout, codebook_size=codebook_size, beta=beta, ema_decay=ema_decay,
            revive=revive, side_info=side_info, denoise=denoise, **others,
        )  # fmt: skip
        self.encoder = build_encoder(encoder, **settings)
        self.latent = build_part(LATENT_SPACES, latent_space, **settings)
        self.slots = Slots(num_types=num_types if side_info else 0, n_tokens=n_tokens)
        decoder_class = part(DECODERS, decoder)
        flat = getattr(decoder_class, "flat", False)
        self.flat_slots = level == "event" and flat  # one row holds all slots
        self.sees_slots = side_info or not flat
        rows = n_tokens if self.flat_slots else 1
        reads_noised = denoise and not getattr(decoder_class, "denoises", False)
        self.noised = nn.Linear(rows * cont_dim, NOISED) if reads_noised else None
        inputs = latent_dim
        if reads_noised:
            inputs += 2 * NOISED  # x_t and t
        if self.sees_slots:
            inputs += rows * self.slots.width
        self.decoder = build_decoder(decoder, inputs=inputs, outputs=rows * cont_dim, **settings)
        self.types = None if side_info else mlp([latent_dim + EMBEDDED, HEADS[0], num_types], activation, dropout)
        self.globals = mlp([latent_dim, HEADS[1], n_globals], activation, dropout)

    def last_weight(self):
        """Return the last matrix of weights before x_hat, where gan.adaptive_weight compares gradients."""
        return [weight for weight in self.decoder.parameters() if weight.ndim > 1][-1]

    @torch.no_grad()
    def start(self, batch, vq_init, seed):
        """Initialize the codes from the latents of a batch (x, ids, globals), by kmeans or at random.

        The same batch and seed give the same codes on every rank.
        """
        z = self.encode(batch["x"], batch["ids"], batch["ids"] > 0, batch["globals"])
        z = z[batch["ids"] > 0] if self.level == "token" else z
        self.latent.start(z, vq_init == "kmeans", torch.Generator().manual_seed(seed))

    def encode(self, x, ids, mask, globals):
        """Encode x, ids, mask, globals -> z_e (B, T, D), 0 in empty slots, or (B, D). x of empty slots is ignored."""
        z = self.encoder(x.masked_fill(~mask[..., None], 0), ids, mask, globals)
        check_shape(self.encoder, z, *(ids.shape if self.level == "token" else ids.shape[:1]), self.latent_dim)
        return z.masked_fill(~mask[..., None], 0) if self.level == "token" else z

    def quantize(self, z_e, mask):
        """Pass z_e through the latent space -> (z_q of the same shape, indices, losses with their means).

        indices: codes (B, T), -1 in empty slots, or (B); None unless vq. losses: {"commit": ...} and those of a latent
        space of your own. In training vq also returns `revived`.
        """
        token = self.level == "token"
        z_q, indices, losses = self.latent(z_e, mask if token else None)
        check_shape(self.latent, z_q, *z_e.shape)
        if indices is None:
            aux = dict(commit=z_q.new_zeros(())) | losses
            return z_q.masked_fill(~mask[..., None], 0) if token else z_q, None, aux
        aux = dict(commit=losses)
        if self.training:
            aux["revived"] = self.latent.revived
        return z_q, indices, aux

    def decode(self, z, ids, mask, x_t=None, t=None):
        """Decode latents z (B, T, D) or (B, D) -> dict(x_hat (B, T, F), type_logits (B, T, types), rec_globals (B, G)).

        x_t (B, T, F), t (B): only with `denoise`. At level event ids and mask matter only with side_info or x_t;
        otherwise only their shape is used.
        """
        event = self.level == "event"
        slots = self.slots(ids)
        z_slot = z[:, None].expand(-1, ids.shape[1], -1) if event else z
        rec_globals = self.globals(z if event else mean_over(z, mask))
        type_logits = None if self.types is None else self.types(torch.cat([z_slot, slots], -1))
        h = z if self.flat_slots else z_slot
        real = mask
        if x_t is not None:
            x_t = x_t.masked_fill(~mask[..., None], 0)
        elif event:
            real = torch.ones_like(mask)
        if self.noised is not None:
            time = sinusoid(t, NOISED)
            noised = self.noised(x_t.flatten(1) if self.flat_slots else x_t)
            h = torch.cat([h, noised, time if self.flat_slots else time[:, None].expand(-1, ids.shape[1], -1)], -1)
        if self.sees_slots:
            h = torch.cat([h, slots.flatten(1) if self.flat_slots else slots], -1)
        x_hat = self.decoder(h, real, x_t, t)
        if self.flat_slots:
            x_hat = x_hat.unflatten(-1, (ids.shape[1], -1))
        check_shape(self.decoder, x_hat, *ids.shape, self.cont_dim)
        return dict(x_hat=x_hat, type_logits=type_logits, rec_globals=rec_globals)

    def forward(self, x, ids, mask, globals, x_t=None, t=None):
        """x (B, T, F), ids, mask (B, T), globals (B, G) -> results of encode, quantize and decode in one dict.

        Its keys: z_e, z_q, indices, aux, x_hat, type_logits, rec_globals.
        """
        z_e = self.encode(x, ids, mask, globals)
        z_q, indices, aux = self.quantize(z_e, mask)
        return dict(z_e=z_e, z_q=z_q, indices=indices, aux=aux, **self.decode(z_q, ids, mask, x_t, t))


class Regressor(nn.Module):
    """The MLP that train_ae.py trains with loop test_mlp: x (B, cont_dim) -> (B)."""

    latent_space = "none"

    def __init__(self, *, cont_dim, hidden, activation, dropout):
        super().__init__()
        self.network = mlp([cont_dim, *hidden, 1], activation, dropout)

    def forward(self, x):
        return self.network(x).squeeze(-1)


def regression_sums(guess, y, task):
    """Compare guess (B) with y (B) -> {name: (sum, count)}.

    miss: squared error for task `regression`, otherwise the cross-entropy in nats of y in {0, 1}, with `accuracy`.
    """
    guess, y = guess.float(), y.float()
    if task == "regression":
        return dict(miss=((guess - y).square().sum(), len(y)))
    nats = F.binary_cross_entropy_with_logits(guess, y, reduction="sum")
    return dict(miss=(nats, len(y)), accuracy=(((guess > 0) == (y > 0)).sum(), len(y)))
