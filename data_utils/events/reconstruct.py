"""Reconstruct events with a trained autoencoder, decode latents, and draw new latents.

N events, B in a batch, T slots, F features, G globals, D latent width, K codes. Rows (N, 2 + 5 T) as in dataset.py.
"""

import numpy as np
import torch
import torch.nn.functional as F

from data_utils.events.dataset import COLUMNS, NUM_TYPES, columns_of, epoch_order, objects, slots, take, to_rows
from data_utils.events.kinematics import complete, standard_rows
from data_utils.files import warn
from models.autoencoder import AutoEncoder

AT_ONCE = 1024  # events in a batch
START = 4096  # events whose latents start a codebook


def start_codebook(model, columns, cfg):
    """Start the codebook of a model from latents of training events; warn if there are fewer latents than codes."""
    first = take(columns, epoch_order(cfg.seed, cfg.epochs, len(columns["ids"]))[:START])
    latents = (columns["ids"] > 0).sum().item() if cfg.level == "token" else len(columns["ids"])
    if latents < cfg.codebook_size:
        warn(f"{latents} training latents cannot use {cfg.codebook_size} codes; try: codebook_size={latents}")
    model.start(first, cfg.vq_init, cfg.seed)


def keep_rates(model, model_args, saved, cfg):
    """Keep the codebook's rates of the `saved` model arguments, which followed from the planned steps at the start."""
    if model.latent_space != "vq":
        return
    if "ema_decay" in saved and not cfg.codebook_decay:
        model_args["ema_decay"] = model.latent.decay = saved["ema_decay"]
    if "revive" in saved and not cfg.revive:
        model_args["revive"] = model.latent.revive = saved["revive"]


def reconstruct_rows(model, noises, columns, meta, cfg):
    """Return rows (N, 2 + 5 T) in GeV of events and of their reconstruction; None if no figure can draw them.

    Types are those of the events. With `noises`, a NoiseSchedule, features come from noise by cfg.ddim_steps of DDIM.
    """
    if not (cfg.make_plots and cfg.plot_recon and cfg.plot_detail == "full" and "ids" in columns):
        return None
    steps, parts = getattr(cfg, "ddim_steps", 0), []
    for i in range(0, len(columns["ids"]), AT_ONCE):
        batch = take(columns, slice(i, i + AT_ONCE))
        parts.append(reconstruct_batch(model, noises, batch, steps, cfg.seed + i))
    x, globals = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
    ids = columns["ids"].cpu()
    pairs = (columns["x"].cpu(), columns["globals"].cpu()), (x, globals)
    rows = [standard_rows(to_rows(x, ids, globals, meta), columns_of(meta)) for x, globals in pairs]
    return None if rows[0] is None else tuple(rows)


@torch.no_grad()
def reconstruct_batch(model, noises, batch, steps, seed):
    """Return features (B, T, F) and globals (B, G) that the model reconstructs of a batch (x, ids, globals)."""
    mask = batch["ids"] > 0
    z, _, _ = model.quantize(model.encode(batch["x"], batch["ids"], mask, batch["globals"]), mask)
    return from_latents(model, noises, z, batch["ids"], steps, seed)[:2]


@torch.no_grad()
def from_latents(model, noises, z, ids, steps, seed):
    """Decode latents z (B, T, D) or (B, D) with ids (B, T).

    Returns features (B, T, F), globals (B, G) and type_logits (B, T, types), None without a type head.
    """
    mask = ids > 0
    if not noises:
        output = model.decode(z, ids, mask)
        return output["x_hat"], output["rec_globals"], output["type_logits"]
    noise = torch.randn((*ids.shape, model.cont_dim), generator=torch.Generator().manual_seed(seed)).to(z.device)

    def predict(x_t, t):
        return model.decode(z, ids, mask, x_t, t)["x_hat"].float()

    output = model.decode(z, ids, mask, noise, torch.full_like(ids[:, 0], noises.steps))
    return noises.ddim(predict, noise, steps), output["rec_globals"], output["type_logits"]


# ---- statistics for new events ---------------------------------------------------------------------------------------


@torch.no_grad()
def latent_statistics(model, columns):
    """Return {"latents": statistics that `sample` draws from} of the train split; {} for a model without latents.

    columns: x, ids, globals. All statistics are on the CPU:
    multiplicity (T + 1)     events by their number n of objects
    types (T, NUM_TYPES)     objects by slot and type
    low, high (F)            range of the features
    codes (T + 1, K)         of vq: latents by n of their event and by code
    mean (D + 1) and covariance (D + 1, D + 1) of [z, n], otherwise; z as the decoder reads it
    """
    if not isinstance(model, AutoEncoder):
        return {}
    ids, training, token = columns["ids"], model.training, model.level == "token"
    N, T = ids.shape
    present = ids > 0
    n, valid = present.sum(1), columns["x"][present].cpu()
    types = F.one_hot(ids, NUM_TYPES).sum(0).cpu()
    types[:, 0] = 0
    statistics = dict(multiplicity=n.bincount(minlength=T + 1).cpu(), types=types)
    statistics |= dict(low=valid.amin(0), high=valid.amax(0))
    model.eval()
    codes = first = second = count = 0
    for i in range(0, N, AT_ONCE):
        batch, mask = take(columns, slice(i, i + AT_ONCE)), present[i : i + AT_ONCE]
        z, index, _ = model.quantize(model.encode(batch["x"], batch["ids"], mask, batch["globals"]), mask)
        size = n[i : i + AT_ONCE, None].expand_as(mask)[mask] if token else n[i : i + AT_ONCE]
        if index is not None:
            K = len(model.latent.codes)
            code = index[mask] if token else index
            codes = codes + (size * K + code).bincount(minlength=(T + 1) * K).view(T + 1, K).cpu()
            continue
        both = torch.cat([z[mask] if token else z, size[:, None]], 1).cpu().double()
        first = first + both.sum(0)
        second = second + both.T @ both
        count += len(both)
    model.train(training)
    if not count:
        return dict(latents=statistics | dict(codes=codes))
    mean = first / count
    return dict(latents=statistics | dict(mean=mean, covariance=second / count - mean[:, None] * mean))


def draw_latents(statistics, model, n, generator):
    """Draw independent latents for events of n (N,) objects: z (N, T, D) or (N, D), float32 on the CPU.

    Codes are drawn by their frequency, other latents from the Gaussian of mean and covariance; both among events of as
    many objects.
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
    """Return {name: (B,) numpy}, the losses event by event of the results of `from_latents` against their batch.

    batch: x, ids, globals. rec_tokens is a mean over objects and features. rec_types, with a type head, is a mean over
    objects at level token, over slots at level event.
    """
    mask = batch["ids"] > 0
    n = mask.sum(1)
    error = (x_hat.float() - batch["x"]).square().mean(-1).masked_fill(~mask, 0)
    losses = dict(rec_tokens=error.sum(1) / n, rec_globals=(rec_globals.float() - batch["globals"]).square().mean(1))
    if type_logits is not None:
        judged = torch.ones_like(mask) if level == "event" else mask
        nats = F.cross_entropy(type_logits.float().flatten(0, 1), batch["ids"].flatten(), reduction="none")
        losses["rec_types"] = (nats.view_as(mask) * judged).sum(1) / judged.sum(1)
    return {name: values.cpu().numpy() for name, values in losses.items()}


def decode_rows(model, noises, z, ids, guess, steps, seed, statistics, meta):
    """Decode latents z (N, T, D) or (N, D) with ids (N, T) into rows (N, 2 + 5 T).

    guess: ids only tell which slots are filled, and types are drawn from the type head. With `statistics`, those that
    `sample` draws from, features are clamped to the range of the train events, and objects sorted by falling pT.
    """
    device, parts = next(model.parameters()).device, []
    generator = torch.Generator().manual_seed(hash((seed, 2)))
    for i in range(0, len(ids), AT_ONCE):
        types = ids[i : i + AT_ONCE]
        latents = z[i : i + AT_ONCE].to(device)
        latents = latents.masked_fill(types.to(device)[..., None] == 0, 0) if z.ndim == 3 else latents
        x, globals, logits = from_latents(model, noises, latents, types.to(device), steps, seed + i)
        x, globals = x.cpu(), globals.cpu()
        if guess:
            p = logits[..., 1:].float().softmax(-1).cpu()  # without type 0, an empty slot
            drawn = torch.multinomial(p.flatten(0, 1), 1, generator=generator).view_as(types) + 1
            types = drawn * (types > 0)
        x = x.clamp(statistics["low"], statistics["high"]) if statistics else x
        parts.append(to_rows(x, types, globals, meta))
    rows = np.concatenate(parts)
    return sort_by_pt(rows, columns_of(meta)) if statistics else rows


def sort_by_pt(rows, columns=COLUMNS):
    """Sort the objects of each row by falling pT, with empty slots behind; without a pT those alone move."""
    T, rows = slots(rows, columns), rows.copy()
    particles = objects(rows, columns)
    values = complete(zip(columns, np.moveaxis(particles, 2, 0), strict=True))
    pt = values.get("pT", values.get("pT_rel", np.zeros(particles.shape[:2])))
    order = np.argsort(-np.where(rows[:, :T] > 0, pt, -1), 1, kind="stable")
    rows[:, :T] = np.take_along_axis(rows[:, :T], order, 1)
    particles[:] = np.take_along_axis(particles, order[..., None], 1)
    return rows
