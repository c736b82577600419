"""What a trained autoencoder of events makes of events and of latents, and what new latents are drawn from.

N events, B of them at once, T slots, F features, D latent width, K codes. Rows (N, 2 + 5T) as in events.py.
"""

import numpy as np
import torch
import torch.nn.functional as F

from data_utils.events.dataset import NUM_TYPES, epoch_order, objects, slots, take, to_rows
from data_utils.files import warn
from models.autoencoder import AutoEncoder

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
    if model.latent_space != "vq":
        return
    if "ema_decay" in saved and not cfg.codebook_decay:
        model_args["ema_decay"] = model.latent.decay = saved["ema_decay"]
    if "revive" in saved and not cfg.revive:
        model_args["revive"] = model.latent.revive = saved["revive"]


def reconstructed(model, noises, columns, meta, cfg):
    """Events and what the model makes of them -> rows (N, 2 + 5T) before and after, in GeV; None if nothing draws them.

    Types are those of the events. With `noises`, a NoiseSchedule, features come from noise by cfg.ddim_steps of DDIM.
    """
    if not (cfg.make_plots and cfg.plot_recon and cfg.plot_detail == "full" and "ids" in columns):
        return None
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


# ---- what new events are drawn from ----------------------------------------------------------------------------------


@torch.no_grad()
def latent_statistics(model, columns):
    """Columns x, ids, globals of the train split -> {"latents": what `sample` draws from}; {} for a model without any.

    multiplicity (T + 1): events by number n of objects. types (T, NUM_TYPES): objects by slot. low, high (F): range of
    the features. Of vq codes (T + 1, K): latents by n of their event and code; else mean (D + 1) and covariance
    (D + 1, D + 1) of [z, n], z as the decoder reads it. All of it on the CPU.
    """
    if not isinstance(model, AutoEncoder):
        return {}
    ids, training, token = columns["ids"], model.training, model.level == "token"
    (N, T), mask = ids.shape, ids > 0
    n, valid = mask.sum(1), columns["x"][mask].cpu()
    types = F.one_hot(ids, NUM_TYPES).sum(0).cpu()
    types[:, 0] = 0
    found = dict(multiplicity=n.bincount(minlength=T + 1).cpu(), types=types, low=valid.amin(0), high=valid.amax(0))
    model.eval()
    first, count, second = 0, 0, 0
    for i in range(0, N, AT_ONCE):
        batch, there = take(columns, slice(i, i + AT_ONCE)), mask[i : i + AT_ONCE]
        z, index, _ = model.quantize(model.encode(batch["x"], batch["ids"], there, batch["globals"]), there)
        size = n[i : i + AT_ONCE, None].expand_as(there)[there] if token else n[i : i + AT_ONCE]
        if index is not None:
            K = len(model.latent.codes)
            code = index[there] if token else index
            first = first + (size * K + code).bincount(minlength=(T + 1) * K).view(T + 1, K).cpu()
            continue
        both = torch.cat([z[there] if token else z, size[:, None]], 1).cpu().double()
        first, second, count = first + both.sum(0), second + both.T @ both, count + len(both)
    model.train(training)
    if count:
        mean = first / count
        return dict(latents=found | dict(mean=mean, covariance=second / count - mean[:, None] * mean))
    return dict(latents=found | dict(codes=first))


def draw_latents(statistics, model, n, generator):
    """Latents for events of n (N) objects, independent of each other -> z (N, T, D) or (N, D), float32 on the CPU.

    Codes by their frequency, else of the Gaussian of mean and covariance: both among events of as many objects.
    """
    count = len(statistics["types"]) if model.level == "token" else 1
    if "codes" in statistics:
        index = torch.multinomial(statistics["codes"][n].double(), count, replacement=True, generator=generator)
        z = F.embedding(index, model.latent.codes.cpu())
        return z if model.level == "token" else z[:, 0]
    mean, covariance = statistics["mean"], statistics["covariance"]
    slope = covariance[:-1, -1] / covariance[-1, -1].clamp_min(1e-9)  # of z by n
    values, vectors = torch.linalg.eigh(covariance[:-1, :-1] - slope[:, None] * covariance[-1, :-1])
    factor = vectors * values.clamp_min(0).sqrt()
    noise = torch.randn(len(n), count, len(slope), generator=generator, dtype=torch.float64)
    z = (mean[:-1] + (n[:, None, None] - mean[-1]) * slope + noise @ factor.T).float()
    return z if model.level == "token" else z[:, 0]


def event_errors(x_hat, rec_globals, type_logits, batch, level):
    """What `from_latents` gave, against a batch (x, ids, globals) -> {name: (B,) numpy}, the losses event by event.

    rec_tokens: mean over features of the objects; rec_globals; rec_types, with a type head: mean over objects at level
    token, over slots at level event.
    """
    mask = batch["ids"] > 0
    n = mask.sum(1)
    error = (x_hat.float() - batch["x"]).square().mean(-1).masked_fill(~mask, 0)
    found = dict(rec_tokens=error.sum(1) / n, rec_globals=(rec_globals.float() - batch["globals"]).square().mean(1))
    if type_logits is not None:
        judged = torch.ones_like(mask) if level == "event" else mask
        nats = F.cross_entropy(type_logits.float().flatten(0, 1), batch["ids"].flatten(), reduction="none")
        found["rec_types"] = (nats.view_as(mask) * judged).sum(1) / judged.sum(1)
    return {name: values.cpu().numpy() for name, values in found.items()}


def finished(model, noises, z, ids, guess, steps, seed, statistics, meta):
    """Latents z and ids (N, T) -> rows (N, 2 + 5T).

    guess: ids only say which slots are filled, and types are drawn from the type head. statistics: of `sample`: then
    features are cut to the range of the train events, and objects sorted by falling pT.
    """
    device, made = next(model.parameters()).device, []
    generator = torch.Generator().manual_seed(hash((seed, 2)))
    for i in range(0, len(ids), AT_ONCE):
        some, latents = ids[i : i + AT_ONCE], z[i : i + AT_ONCE].to(device)
        latents = latents.masked_fill(some.to(device)[..., None] == 0, 0) if z.ndim == 3 else latents
        x, globals, logits = from_latents(model, noises, latents, some.to(device), steps, seed + i)
        x, globals = x.cpu(), globals.cpu()
        if guess:
            p = logits[..., 1:].float().softmax(-1).cpu()  # the first is that of an empty slot
            drawn = torch.multinomial(p.flatten(0, 1), 1, generator=generator).view_as(some) + 1
            some = drawn * (some > 0)
        x = x.clamp(statistics["low"], statistics["high"]) if statistics else x
        made.append(to_rows(x, some, globals, meta))
    rows = np.concatenate(made)
    return by_pt(rows) if statistics else rows


def by_pt(rows):
    """Sort the objects of each row by falling pT, empty slots behind."""
    T, rows = slots(rows), rows.copy()
    pt = np.where(rows[:, :T] > 0, objects(rows)[..., 1], -1)
    order = np.argsort(-pt, 1, kind="stable")
    rows[:, :T] = np.take_along_axis(rows[:, :T], order, 1)
    objects(rows)[:] = np.take_along_axis(objects(rows), order[..., None], 1)
    return rows
