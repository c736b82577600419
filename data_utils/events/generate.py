"""`generate.py events`: events that a run of train_ae.py gives back, encodes, decodes, scores or makes.

N events, T slots, D latent width. Rows (N, 2 + 5T) as in events.py.
"""

import csv
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

from data_utils.checkpoint import first_good, load_checkpoint
from data_utils.config import at_least
from data_utils.errors import DataError, UsageError
from data_utils.events.dataset import (
    HIGHEST_MEDIAN_PT,
    NUM_TYPES,
    SPLITS,
    clean,
    from_rows,
    objects,
    read_events,
    slots,
    split_rows,
    to_rows,
)
from data_utils.events.decay_chain import decay_chain
from data_utils.events.kinematics import kinematics
from data_utils.events.reconstruct import AT_ONCE, draw_latents, event_errors, finished, from_latents
from data_utils.files import begins, check_replaceable, make_room, write_atomic
from data_utils.hardware import open_device
from models.autoencoder import AutoEncoder
from models.diffusion import NoiseSchedule

LOOPS = "ae", "gan_ae", "diffusion_ae"  # of train_ae.py, those with events
QUANTILES = 0.05, 0.25, 0.5, 0.75, 0.95


@torch.no_grad()
def generate_events(cfg):
    """Answer one call of the command: cfg has the fields of generate.EventsConfig."""
    at_least(cfg, 0, "limit", "ddim_steps", "seed")
    at_least(cfg, 1, "events")
    ending = ".csv" if cfg.mode == "score" else ".npz"
    if cfg.out and Path(cfg.out).suffix != ending:
        raise UsageError(f"--out {cfg.out}: --mode {cfg.mode} writes {ending}\ntry: --out {Path(cfg.out).stem}{ending}")
    if cfg.mode == "decode" and not cfg.data:
        raise UsageError("--mode decode: no latents named\ntry: --data FILE.npz, which --mode encode writes")
    device = open_device(cfg.device)
    run = load_run(cfg.model, device)
    out = cfg.out or str(run.path.parent / f"{cfg.mode}{ending}")
    check_replaceable(out, cfg.fresh, made_here, inputs=[cfg.data, run.config.get("data", "")])
    run.steps = cfg.ddim_steps or run.config.get("ddim_steps", 0)
    made, said = MODES[cfg.mode](cfg, run)
    if cfg.mode == "score":
        _write_table(out, made)
    else:
        about = dict(mode=cfg.mode, model=str(run.path), run_id=run.run_id, epochs=run.epoch, seed=cfg.seed)
        about |= {name: run.config[name] for name in ("loop", "level", "latent_space")}
        about |= dict(features=run.meta["features"], units="GeV, radians") | said
        content = io.BytesIO()
        np.savez_compressed(content, meta=json.dumps(about), **made)
        make_room(out, made_here)
        write_atomic(out, lambda file: file.write(content.getvalue()))
    if "X" in made:
        means = {name: values.mean() for name, values in kinematics(made["X"]).items() if name in ("HT", "MET")}
        count = (made["X"][:, : slots(made["X"])] > 0).sum() / len(made["X"])
        print(f"{len(made['X'])} events; means: {count:.2f} objects, HT {means['HT']:.1f}, MET {means['MET']:.1f} GeV")
    print(out)
    return {}


def made_here(path):
    """Return whether a file says that this command made it: a table by its first line, events by their meta."""
    if begins(path, b"event,label,objects,"):
        return True
    try:
        with np.load(path, allow_pickle=False) as file:
            about = json.loads(str(file["meta"]))
            return {"mode", "model", "run_id"} <= about.keys()
    except Exception:  # of another program, or damaged
        return False


def load_run(run, device):
    """A run's folder, or a checkpoint -> all that its file holds as attributes, with path, model, in eval mode, noises.

    noises: the NoiseSchedule of diffusion_ae, else None. Raises UsageError for what is no run of train_ae.py with
    events, CheckpointError for a damaged file.
    """
    path = Path(run)
    if not run or not path.exists():
        newest = max(Path("outputs/runs").glob("run_*"), default="outputs/runs/run_...")
        found = f"{run}: no such run" if run else "no run named"
        raise UsageError(f"{found}\ntry: python generate.py events {newest} --mode sample")
    files = [path / "model.pt", path / "best_val.pt"] if path.is_dir() else [path]
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


def read_rows(cfg, run):
    """The events that cfg names -> rows (N, 2 + 5T), labels (N), their numbers in the file (N), their source.

    Without --data those of the run, as it split them and of its labels. Raises UsageError, DataError.
    """
    own, T = not cfg.data, run.meta["n_tokens"]
    asked = SimpleNamespace(**run.config) if own else cfg  # data, events, seed, energy_unit
    if asked.data == "decay_chain":
        rows, labels = decay_chain(asked.events, asked.seed)
        split = split_rows(len(rows), asked.seed)
    else:
        rows, labels, split = read_events(asked.data, seed=run.config["seed"])
        if asked.energy_unit == "MeV":
            rows[:, slots(rows)] /= 1000
            objects(rows)[..., :2] /= 1000
    if slots(rows) != T:
        raise DataError(f"{asked.data}: {rows.shape[1]} columns: expected {2 + 5 * T}, the {T} slots of {run.path}")
    wanted = np.full(len(rows), cfg.split == "all") | (split == dict(zip(SPLITS, range(3), strict=True)).get(cfg.split))
    wanted &= np.isin(labels, run.config["labels"]) | (not own)
    if not wanted.any():
        raise DataError(f"{asked.data}: no event in --split {cfg.split}")
    numbered = np.stack([labels, np.arange(len(rows))], 1)[wanted]
    rows, numbered, _, dropped = clean(rows[wanted], numbered, split[wanted], asked.data)
    if dropped:
        print(f"{asked.data}: dropped {', '.join(f'{n} {reason}' for reason, n in dropped.items())}", file=sys.stderr)
    middle = np.median(objects(rows)[..., 1][rows[:, :T] > 0])
    if middle > HIGHEST_MEDIAN_PT:
        raise DataError(f"{asked.data}: half of the pT are above {middle:.0f}: looks like MeV\ntry: --energy_unit MeV")
    rows, numbered = rows[: cfg.limit or None], numbered[: cfg.limit or None]
    return rows, *numbered.T, dict(data=str(asked.data), split=cfg.split)


def encoded(rows, run):
    """Yield (number of its first row, batch of x, ids, globals, z as the decoder reads it, indices or None)."""
    for i in range(0, len(rows), AT_ONCE):
        arrays = from_rows(rows[i : i + AT_ONCE], run.meta)
        x, ids, globals = (torch.from_numpy(array).to(run.device) for array in arrays)
        z, indices, _ = run.model.quantize(run.model.encode(x, ids, ids > 0, globals), ids > 0)
        yield i, dict(x=x, ids=ids, globals=globals), z, indices


def reconstruct(cfg, run):
    """Rows as the model gives them back."""
    rows, labels, index, source = read_rows(cfg, run)
    made = []
    for i, batch, z, _ in encoded(rows, run):
        x, globals, _ = from_latents(run.model, run.noises, z, batch["ids"], run.steps, cfg.seed + i)
        made.append(to_rows(x.cpu(), batch["ids"].cpu(), globals.cpu(), run.meta))
    said = source | _by(run) | dict(types="those of the events", index="number of each event in data")
    return dict(X=np.concatenate(made), y=labels, index=index), said


def encode(cfg, run):
    """`indices` of codes, (N, T) with -1 in empty slots or (N), or `latents` (N, T, D) or (N, D), and types."""
    rows, labels, index, source = read_rows(cfg, run)
    T, found = slots(rows), [z if indices is None else indices for _, _, z, indices in encoded(rows, run)]
    arrays = {_name(run): torch.cat(found).cpu().numpy(), "ids": rows[:, :T].astype(np.int8)}
    said = source | dict(globals="MET and its phi", index="number of each event in data")
    return arrays | dict(globals=rows[:, T : T + 2], y=labels, index=index), said


def decode(cfg, run):
    """Rows from a file of `encode`; or from indices alone, whose types are then drawn from the type head."""
    z, ids, guess, kept = read_latents(cfg.data, run)
    if _name(run) == "indices":
        z = F.embedding(z.clamp_min(0), run.model.latent.codes.cpu())
    rows = finished(run.model, run.noises, z, ids, guess, run.steps, cfg.seed, None, run.meta)
    types = "drawn from the type head" if guess else "those of the file"
    return dict(X=rows, y=np.full(len(rows), -1)) | kept, dict(data=cfg.data, types=types) | _by(run)


def score(cfg, run):
    """A row for each event; mean and quantiles to stdout."""
    rows, labels, index, _ = read_rows(cfg, run)
    parts = []
    for i, batch, z, _ in encoded(rows, run):
        made = from_latents(run.model, run.noises, z, batch["ids"], run.steps, cfg.seed + i)
        parts.append(event_errors(*made, batch, run.model.level))
    errors = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    n = (rows[:, : slots(rows)] > 0).sum(1)
    print(f"{'':12}{'mean':>10}" + "".join(f"{f'{q:.0%}':>10}" for q in QUANTILES))
    for name, values in errors.items():
        print(f"{name:12}" + "".join(f"{v:10.4g}" for v in (values.mean(), *np.quantile(values, QUANTILES))))
    over = (errors["rec_tokens"] * n).sum() / n.sum()
    print(f"{len(n)} events; rec_tokens over their {n.sum()} objects, as training counts it: {over:.4g}")
    return dict(event=index, label=labels, objects=n) | errors, {}


def sample(cfg, run):
    """New events; `sampled` in their meta says how they were made."""
    if not hasattr(run, "latents"):
        raise UsageError(f"{cfg.model}: no statistics of latents, which a run stores at its end in best_val.pt\n"
                         f"try: python train_ae.py resume={run.path.parent}")  # fmt: skip
    statistics, (T, _), N = run.latents, run.latents["types"].shape, cfg.events
    generator = torch.Generator().manual_seed(hash((cfg.seed, 1)))  # not that of the noise
    n = torch.multinomial(statistics["multiplicity"].double(), N, replacement=True, generator=generator)
    z = draw_latents(statistics, run.model, n, generator)
    types = statistics["types"] + 1e-9 * statistics["types"].sum(0)  # a slot that is only empty has those of all
    ids = torch.multinomial(types.double(), N, replacement=True, generator=generator).T * (torch.arange(T) < n[:, None])
    guess = run.model.types is not None
    rows = finished(run.model, run.noises, z, ids, guess, run.steps, cfg.seed, statistics, run.meta)
    codes, among = "codes" in statistics, "among train events of as many objects"
    said = dict(
        multiplicity="drawn from the histogram of the train events",
        latents=f"{'codes drawn by frequency' if codes else 'drawn from the Gaussian of mean and covariance'} {among}",
        types="drawn from the type head" if guess else "drawn by frequency in their slot",
        bounds="features cut to their range in the train events", order="falling pT",
    )  # fmt: skip
    return dict(X=rows, y=np.full(N, -1)), dict(sampled=said | _by(run), labels="y is -1: of no process")


MODES = dict(reconstruct=reconstruct, encode=encode, decode=decode, score=score, sample=sample)


def read_latents(path, run):
    """A file for `decode`, checked -> z or indices, ids (N, T), whether types are to be guessed, {y, index} if there.

    Raises DataError.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file}
    except Exception as e:  # truncation and flipped bits raise a dozen types
        reason = (str(e).splitlines() or [""])[0]
        raise DataError(f"{path} can't be read: {reason}\ntry: a file of --mode encode") from e
    name, token, T = _name(run), run.model.level == "token", run.meta["n_tokens"]
    if name not in arrays:
        raise DataError(f"{path}: no {name}, which {run.path} decodes: expected a file of --mode encode of this run\n"
                        f"keys there: {', '.join(arrays) or 'none'}")  # fmt: skip
    z, codes = arrays[name], name == "indices"
    shape = (T,) * token + (() if codes else (run.model_args["latent_dim"],))
    if z.shape[1:] != shape or not len(z) or z.dtype.kind not in ("iu" if codes else "f"):
        wanted = f"{'whole numbers' if codes else 'floats'} ({', '.join(['events', *map(str, shape)])})"
        raise DataError(f"{path}: {name} is {z.dtype} {z.shape}: expected {wanted}")
    if codes and not -token <= z.min() <= z.max() < run.model_args["codebook_size"]:
        last = run.model_args["codebook_size"] - 1
        raise DataError(f"{path}: indices {z.min()} to {z.max()}: expected 0 to {last}" + ", -1 if empty" * token)
    guess = "ids" not in arrays
    if guess and (not codes or not token or run.model.types is None):
        told = run.model.types is None
        why = "side_info, the decoder is told the types" if told else "they say which slots are empty"
        raise DataError(f"{path}: no ids (events, {T}): {why}\ntry: a file of --mode encode")
    ids = z >= 0 if guess else arrays["ids"]
    if ids.shape != (len(z), T) or not np.isin(ids, range(NUM_TYPES)).all() or not ids.any(1).all():
        raise DataError(f"{path}: ids is {ids.dtype} {ids.shape}: expected ({len(z)}, {T}), each 0 to "
                        f"{NUM_TYPES - 1}, in each event one above 0")  # fmt: skip
    if codes and token and ((z >= 0) != (ids > 0)).any():
        raise DataError(f"{path}: indices are -1 elsewhere than ids are 0: expected a code for each object")
    kept = {key: arrays[key] for key in ("y", "index") if key in arrays}
    z = torch.from_numpy(z.astype(np.int64 if codes else np.float32))
    return z, torch.from_numpy(ids.astype(np.int64)), guess, kept


def _name(run):
    return "indices" if run.model.latent_space == "vq" else "latents"


def _by(run):
    return dict(decoding=f"from noise in {run.steps} DDIM steps" if run.noises else "one pass of the decoder")


def _write_table(path, columns):
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    cells = [[f"{v:.8g}" if isinstance(v, float) else v for v in column.tolist()] for column in columns.values()]
    writer.writerows(zip(*cells, strict=True))
    make_room(path, made_here)
    write_atomic(path, lambda file: file.write(text.getvalue().encode()))
