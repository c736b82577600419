"""Use of a trained autoencoder of events: reconstructed, encoded, decoded, scored and new events."""

import torch

from data_utils.checkpoint import warn
from data_utils.events import epoch_order, take, to_rows

AT_ONCE = 1024  # events in a batch
START = 4096  # events whose latents start a codebook


def start_codes(model, columns, cfg):
    """Start the codebook of a model from latents of training events; fewer of them than codes are warned of."""
    some = take(columns, epoch_order(cfg.seed, cfg.epochs, len(columns["ids"]))[:START])
    there = (columns["ids"] > 0).sum().item() if cfg.level == "token" else len(columns["ids"])
    if there < cfg.codebook_size:
        warn(f"{there} latents in training cannot use {cfg.codebook_size} codes; try: codebook_size={there} at most")
    model.start(some, cfg.vq_init, cfg.seed)


def keep_rates(model, model_args, saved, cfg):
    """Keep the codebook's rates of the `saved` model arguments: what follows from the steps is fixed at the start."""
    for name, own in dict(ema_decay="decay", revive="revive").items():
        if model.latent_space == "vq" and name in saved and not getattr(cfg, name):
            model_args[name] = saved[name]
            setattr(model.latent, own, saved[name])


def reconstructed(model, noises, columns, meta, cfg):
    """Events and what the model makes of them -> rows (N, 2 + 5T) before and after, in GeV.

    Types are those of the events. With `noises`, a NoiseSchedule, features come from noise by cfg.ddim_steps of DDIM.
    """
    steps, seed = getattr(cfg, "ddim_steps", 0), cfg.seed
    made = [decoded(model, noises, take(columns, slice(i, i + AT_ONCE)), steps, seed + i)
            for i in range(0, len(columns["ids"]), AT_ONCE)]  # fmt: skip
    x, globals = (torch.cat(part).cpu() for part in zip(*made, strict=True))
    ids = columns["ids"].cpu()
    return to_rows(columns["x"].cpu(), ids, columns["globals"].cpu(), meta), to_rows(x, ids, globals, meta)


@torch.no_grad()
def decoded(model, noises, batch, steps, seed):
    """Features (B, T, F) and globals (B, G) that the model makes of a batch (x, ids, globals)."""
    mask = batch["ids"] > 0
    z, _, _ = model.quantize(model.encode(batch["x"], batch["ids"], mask, batch["globals"]), mask)
    return from_latents(model, noises, z, batch["ids"], steps, seed)[:2]


@torch.no_grad()
def from_latents(model, noises, z, ids, steps, seed):
    """Latents z and ids (B, T) -> features (B, T, F), globals (B, G), type_logits (B, T, types) or None."""
    mask = ids > 0
    if not noises:
        found = model.decode(z, ids, mask)
        return found["x_hat"], found["rec_globals"], found["type_logits"]
    noise = torch.randn((*ids.shape, model.cont_dim), generator=torch.Generator().manual_seed(seed)).to(z.device)

    def predict(x_t, t):
        return model.decode(z, ids, mask, x_t, t)["x_hat"].float()

    found = model.decode(z, ids, mask, noise, torch.full_like(ids[:, 0], noises.steps))
    return noises.ddim(predict, noise, steps), found["rec_globals"], found["type_logits"]
