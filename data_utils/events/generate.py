"""`generate.py events`: reconstruct, encode, decode, score and sample events with a run of train_ae.py; `load`.

N events, T slots, D latent width. Rows (N, 2 + 5 T) as in dataset.py.
"""

import csv
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from data_utils.checkpoint import PRETRAINED, by_name, first_good, load_checkpoint
from data_utils.config import at_least
from data_utils.errors import DataError, UsageError
from data_utils.events.dataset import (
    NUM_TYPES,
    SPLITS,
    check_unit,
    drop_damaged,
    from_rows,
    open_rows,
    slots,
    to_rows,
)
from data_utils.events.kinematics import kinematics
from data_utils.events.reconstruct import AT_ONCE, decode_rows, draw_latents, event_errors, from_latents
from data_utils.files import begins, check_replaceable, make_room, write_atomic
from data_utils.hardware import open_device
from models.autoencoder import AutoEncoder
from models.diffusion import NoiseSchedule

LOOPS = "ae", "gan_ae", "diffusion_ae"  # the loops of train_ae.py that train on events
QUANTILES = 0.05, 0.25, 0.5, 0.75, 0.95


@torch.no_grad()
def generate_events(cfg):
    """Run the command once: cfg has the fields of generate.EventsConfig."""
    at_least(cfg, 0, "limit", "ddim_steps", "seed")
    at_least(cfg, 1, "events")
    ending = ".csv" if cfg.mode == "score" else ".npz"
    if cfg.out and Path(cfg.out).suffix != ending:
        raise UsageError(f"--out {cfg.out}: --mode {cfg.mode} writes {ending}\ntry: --out {Path(cfg.out).stem}{ending}")
    if cfg.mode == "decode" and not cfg.data:
        raise UsageError("--mode decode: no latents named\ntry: --data FILE.npz, which --mode encode writes")
    device = open_device(cfg.device)
    run = load_run(cfg.model, device)
    folder = Path() if run.path.parent == PRETRAINED else run.path.parent
    out = cfg.out or str(folder / f"{cfg.mode}{ending}")
    check_replaceable(out, cfg.fresh, is_output, inputs=[cfg.data, run.config.get("data", "")])
    run.steps = cfg.ddim_steps or run.config.get("ddim_steps", 0)
    arrays, notes = MODES[cfg.mode](cfg, run)
    if cfg.mode == "score":
        _write_table(out, arrays)
    else:
        meta = dict(mode=cfg.mode, model=str(run.path), run_id=run.run_id, epochs=run.epoch, seed=cfg.seed)
        meta |= {name: run.config[name] for name in ("loop", "level", "latent_space")}
        meta |= dict(features=run.meta["features"], units="GeV, radians") | notes
        content = io.BytesIO()
        np.savez_compressed(content, meta=json.dumps(meta), **arrays)
        make_room(out, is_output)
        write_atomic(out, lambda file: file.write(content.getvalue()))
    if "X" in arrays:
        rows = arrays["X"]
        count = (rows[:, : slots(rows)] > 0).sum() / len(rows)
        values = kinematics(rows)
        means = f"HT {values['HT'].mean():.1f}, MET {values['MET'].mean():.1f} GeV"
        print(f"{len(rows)} events; means: {count:.2f} objects, {means}")
    print(out)
    return {}


def is_output(path):
    """Say whether a file is an output of this command: a table by its first line, events by their meta."""
    if begins(path, b"event,label,objects,"):
        return True
    try:
        with np.load(path, allow_pickle=False) as file:
            return {"mode", "model", "run_id"} <= json.loads(str(file["meta"])).keys()
    except Exception:  # of another program, or damaged
        return False


def load_run(run, device):
    """Load the folder of a run, or a checkpoint: its contents as attributes, and path, model in eval mode, noises.

    noises: the NoiseSchedule of diffusion_ae, else None. Raises UsageError for a path that is no run of train_ae.py
    with events, CheckpointError for a damaged file.
    """
    path = Path(by_name(run))
    if not run or not path.exists():
        newest = max(Path("outputs/runs").glob("run_*"), default="outputs/runs/run_...")
        problem = f"{run}: no such run" if run else "no run named"
        raise UsageError(f"{problem}\ntry: python generate.py events {newest} --mode sample")
    names = ("model.pt", "best_val.pt", "last.pt")
    files = [path / name for name in names] if path.is_dir() else [path]
    kinds = [f"ae:{loop}" for loop in (*LOOPS, "test_mlp")]
    path, state = first_good(files, lambda file: load_checkpoint(file, kinds))
    if not state:
        raise UsageError(f"{run}: no model.pt there: expected the folder of a run of train_ae.py after an epoch")
    if state["kind"] == "ae:test_mlp":
        raise UsageError(f"{run}: a run of test_mlp, which has no events\nexpected one of loop {', '.join(LOOPS)}")
    model = AutoEncoder(**state["model_args"])
    model.load_state_dict(state["model_state"])
    schedule = {name: state["config"].get(name) for name in ("diffusion_steps", "noise_schedule")}
    noises = NoiseSchedule(**schedule).to(device) if state["model_args"]["denoise"] else None
    return SimpleNamespace(**state | dict(path=path, model=model.to(device).eval(), noises=noises, device=device))


def load(path, device="cpu"):
    """Load the run folder or a checkpoint of train_ae.py -> (EventModel, its meta: features, units, slots).

    Raises UsageError, CheckpointError.
    """
    run = load_run(path, open_device(device))
    run.steps = run.config.get("ddim_steps", 0)
    return EventModel(run), run.meta


class EventModel(nn.Module):
    """A trained autoencoder of events: model.encode(rows) -> arrays, model.decode(**arrays) -> rows.

    model.network is the AutoEncoder. Rows (N, 2 + 5 T) in GeV, as in dataset.py.
    """

    def __init__(self, run):
        """run: what load_run returns, with `steps` of diffusion."""
        super().__init__()
        self.network = run.model
        self.run = run

    @torch.no_grad()
    def encode(self, rows):
        """Return {`indices` of codes or `latents`, `ids` of the types (N, T)}, which `decode` reads."""
        parts = [z if indices is None else indices for _, _, z, indices in encode_rows(rows, self.run)]
        ids = rows[:, : slots(rows)].astype(np.int64)
        return {_name(self.run): torch.cat(parts).cpu().numpy(), "ids": ids}

    @torch.no_grad()
    def decode(self, *, ids, indices=None, latents=None, seed=0):
        """Return rows (N, 2 + 5 T) of codes or latents and types; seed: of the noise of diffusion_ae."""
        run = self.run
        if _name(run) == "indices":
            z = F.embedding(torch.as_tensor(indices).clamp_min(0), run.model.latent.codes.cpu())
        else:
            z = torch.as_tensor(latents)
        return decode_rows(run.model, run.noises, z, torch.as_tensor(ids), False, run.steps, seed, None, run.meta)


def select_events(cfg, run):
    """Return rows (N, 2 + 5 T) of the events that cfg names, labels (N), their numbers in the file (N), their source.

    Without --data they are the events of the run, in its splits and of its labels. Raises UsageError, DataError.
    """
    T = run.meta["n_tokens"]
    source = cfg if cfg.data else SimpleNamespace(**run.config)
    data = source.data
    seed = source.seed if data == "decay_chain" else run.config["seed"]
    rows, labels, split = open_rows(data, events=source.events, energy_unit=source.energy_unit, seed=seed)
    if slots(rows) != T:
        raise DataError(f"{data}: {rows.shape[1]} columns: expected {2 + 5 * T}, the {T} slots of {run.path}")
    wanted = np.ones(len(rows), bool) if cfg.split == "all" else split == SPLITS.index(cfg.split)
    if not cfg.data:
        wanted &= np.isin(labels, run.config["labels"])
    if not wanted.any():
        raise DataError(f"{data}: no event in --split {cfg.split}")
    numbered = np.stack([labels, np.arange(len(rows))], 1)[wanted]
    rows, numbered, _, dropped = drop_damaged(rows[wanted], numbered, split[wanted], data)
    if dropped:
        print(f"{data}: dropped {', '.join(f'{n} {reason}' for reason, n in dropped.items())}", file=sys.stderr)
    check_unit(rows, data)
    rows, numbered = rows[: cfg.limit or None], numbered[: cfg.limit or None]
    return rows, *numbered.T, dict(data=str(data), split=cfg.split)


def encode_rows(rows, run):
    """Yield (number of its first row, batch of x, ids, globals, z as the decoder reads it, indices or None)."""
    for i in range(0, len(rows), AT_ONCE):
        arrays = from_rows(rows[i : i + AT_ONCE], run.meta)
        x, ids, globals = (torch.from_numpy(array).to(run.device) for array in arrays)
        z, indices, _ = run.model.quantize(run.model.encode(x, ids, ids > 0, globals), ids > 0)
        yield i, dict(x=x, ids=ids, globals=globals), z, indices


# ---- modes: each returns ({name: array}, notes for the meta of the file) ---------------------------------------------


def reconstruct(cfg, run):
    """Return the rows as the model reconstructs them."""
    rows, labels, index, source = select_events(cfg, run)
    parts = []
    for i, batch, z, _ in encode_rows(rows, run):
        x, globals, _ = from_latents(run.model, run.noises, z, batch["ids"], run.steps, cfg.seed + i)
        parts.append(to_rows(x.cpu(), batch["ids"].cpu(), globals.cpu(), run.meta))
    notes = source | _decoding(run) | dict(types="those of the events", index="number of each event in data")
    return dict(X=np.concatenate(parts), y=labels, index=index), notes


def encode(cfg, run):
    """Return `indices` of codes (N, T) with -1 in empty slots or (N), or `latents` (N, T, D) or (N, D), and types."""
    rows, labels, index, source = select_events(cfg, run)
    T = slots(rows)
    parts = [z if indices is None else indices for _, _, z, indices in encode_rows(rows, run)]
    arrays = {_name(run): torch.cat(parts).cpu().numpy(), "ids": rows[:, :T].astype(np.int8)}
    notes = source | dict(globals="MET and its phi", index="number of each event in data")
    return arrays | dict(globals=rows[:, T : T + 2], y=labels, index=index), notes


def decode(cfg, run):
    """Return rows from a file of `encode`, or from indices alone, with types drawn from the type head."""
    z, ids, guess, labels = read_latents(cfg.data, run)
    if _name(run) == "indices":
        z = F.embedding(z.clamp_min(0), run.model.latent.codes.cpu())
    rows = decode_rows(run.model, run.noises, z, ids, guess, run.steps, cfg.seed, None, run.meta)
    types = "drawn from the type head" if guess else "those of the file"
    return dict(X=rows, y=np.full(len(rows), -1)) | labels, dict(data=cfg.data, types=types) | _decoding(run)


def score(cfg, run):
    """Return a row of errors per event; print their mean and quantiles."""
    rows, labels, index, _ = select_events(cfg, run)
    parts = []
    for i, batch, z, _ in encode_rows(rows, run):
        outputs = from_latents(run.model, run.noises, z, batch["ids"], run.steps, cfg.seed + i)
        parts.append(event_errors(*outputs, batch, run.model.level))
    errors = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    n = (rows[:, : slots(rows)] > 0).sum(1)
    print(f"{'':12}{'mean':>10}" + "".join(f"{f'{q:.0%}':>10}" for q in QUANTILES))
    for name, values in errors.items():
        print(f"{name:12}" + "".join(f"{v:10.4g}" for v in (values.mean(), *np.quantile(values, QUANTILES))))
    mean = (errors["rec_tokens"] * n).sum() / n.sum()
    print(f"{len(n)} events; rec_tokens over their {n.sum()} objects, as training counts it: {mean:.4g}")
    return dict(event=index, label=labels, objects=n) | errors, {}


def sample(cfg, run):
    """Return new events, with notes in `sampled` on how they were drawn."""
    if not hasattr(run, "latents"):
        raise UsageError(
            f"{cfg.model}: no statistics of latents, which a run stores at its end in best_val.pt\n"
            f"try: python train_ae.py resume={run.path.parent}"
        )
    statistics, N = run.latents, cfg.events
    T = len(statistics["types"])
    generator = torch.Generator().manual_seed(hash((cfg.seed, 1)))  # not the seed of the noise
    n = torch.multinomial(statistics["multiplicity"].double(), N, replacement=True, generator=generator)
    z = draw_latents(statistics, run.model, n, generator)
    types = statistics["types"] + 1e-9 * statistics["types"].sum(0)  # an always empty slot draws from all slots
    ids = torch.multinomial(types.double(), N, replacement=True, generator=generator).T * (torch.arange(T) < n[:, None])
    guess = run.model.types is not None
    rows = decode_rows(run.model, run.noises, z, ids, guess, run.steps, cfg.seed, statistics, run.meta)
    latents = "codes drawn by frequency" if "codes" in statistics else "drawn from the Gaussian of mean and covariance"
    notes = dict(
        multiplicity="drawn from the histogram of the train events",
        latents=f"{latents} among train events of as many objects",
        types="drawn from the type head" if guess else "drawn by frequency in their slot",
        bounds="features cut to their range in the train events",
        order="falling pT",
    )
    return dict(X=rows, y=np.full(N, -1)), dict(sampled=notes | _decoding(run), labels="y is -1: of no process")


MODES = dict(reconstruct=reconstruct, encode=encode, decode=decode, score=score, sample=sample)


def read_latents(path, run):
    """Read and check a file for `decode`.

    Returns z or indices, ids (N, T), whether to guess the types, and y and index as far as the file has them. Raises
    DataError.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file}
    except Exception as e:  # truncation and flipped bits raise a dozen types
        reason = (str(e).splitlines() or [""])[0]
        raise DataError(f"{path} can't be read: {reason}\ntry: a file of --mode encode") from e
    name, token, T = _name(run), run.model.level == "token", run.meta["n_tokens"]
    if name not in arrays:
        raise DataError(
            f"{path}: no {name}, which {run.path} decodes: expected a file of --mode encode of this run\n"
            f"keys there: {', '.join(arrays) or 'none'}"
        )
    z, codes = arrays[name], name == "indices"
    shape = [T] if token else []
    if not codes:
        shape.append(run.model_args["latent_dim"])
    if list(z.shape[1:]) != shape or not len(z) or z.dtype.kind not in ("iu" if codes else "f"):
        expected = f"{'whole numbers' if codes else 'floats'} ({', '.join(['events', *map(str, shape)])})"
        raise DataError(f"{path}: {name} is {z.dtype} {z.shape}: expected {expected}")
    lowest, last = -1 if token else 0, run.model_args["codebook_size"] - 1
    if codes and not lowest <= z.min() <= z.max() <= last:
        empty = ", -1 if empty" if token else ""
        raise DataError(f"{path}: indices {z.min()} to {z.max()}: expected 0 to {last}{empty}")
    guess = "ids" not in arrays
    if guess and (not codes or not token or run.model.types is None):
        reason = "they say which slots are empty"
        if run.model.types is None:
            reason = "with side_info the decoder needs the types"
        raise DataError(f"{path}: no ids (events, {T}): {reason}\ntry: a file of --mode encode")
    ids = z >= 0 if guess else arrays["ids"]
    if ids.shape != (len(z), T) or not np.isin(ids, range(NUM_TYPES)).all() or not ids.any(1).all():
        raise DataError(
            f"{path}: ids is {ids.dtype} {ids.shape}: expected ({len(z)}, {T}), each 0 to {NUM_TYPES - 1}, "
            "in each event one above 0"
        )
    if codes and token and ((z >= 0) != (ids > 0)).any():
        raise DataError(f"{path}: indices are -1 elsewhere than ids are 0: expected a code for each object")
    labels = {key: arrays[key] for key in ("y", "index") if key in arrays}
    z = torch.from_numpy(z.astype(np.int64 if codes else np.float32))
    return z, torch.from_numpy(ids.astype(np.int64)), guess, labels


def _name(run):
    """Return the name of the encoding in a file."""
    return "indices" if run.model.latent_space == "vq" else "latents"


def _decoding(run):
    return dict(decoding=f"from noise in {run.steps} DDIM steps" if run.noises else "one pass of the decoder")


def _write_table(path, columns):
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    cells = [[f"{v:.8g}" if isinstance(v, float) else v for v in column.tolist()] for column in columns.values()]
    writer.writerows(zip(*cells, strict=True))
    make_room(path, is_output)
    write_atomic(path, lambda file: file.write(text.getvalue().encode()))
