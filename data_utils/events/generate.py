"""`generate.py events`: reconstruct, encode, decode, score and sample events with a run of train_ae.py; `load`.

N events, T slots, D latent width. Rows (N, 2 + 5 T) as in dataset.py.
"""

import csv
import io
import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from data_utils.checkpoint import PRETRAINED, by_name, first_good, kind_of, load_checkpoint
from data_utils.config import at_least
from data_utils.errors import DataError, UsageError
from data_utils.events.dataset import (
    COLUMNS,
    NUM_TYPES,
    SPLITS,
    add_slots,
    check_unit,
    columns_in,
    columns_of,
    drop_damaged,
    from_rows,
    open_rows,
    reader_for,
    slots,
    to_rows,
)
from data_utils.events.kinematics import kinematics, standard_rows
from data_utils.events.reconstruct import AT_ONCE, decode_rows, draw_latents, event_errors, from_latents
from data_utils.events.roc import compare
from data_utils.files import begins, check_replaceable, is_marked, make_room, unused, warn, write_atomic
from data_utils.hardware import open_device
from models.autoencoder import AutoEncoder, mean_over
from models.diffusion import NoiseSchedule

QUANTILES = 0.05, 0.25, 0.5, 0.75, 0.95


@torch.no_grad()
def generate_events(cfg):
    """Run the command once: cfg has the fields of generate.EventsConfig."""
    at_least(cfg, 0, "limit", "ddim_steps", "seed")
    at_least(cfg, 1, "events")
    if cfg.against and cfg.mode != "score":
        raise UsageError(f"--against {cfg.against}: of --mode score, not of {cfg.mode}\nfix: --mode score")
    ending = ".csv" if cfg.mode == "score" else ".npz"
    if cfg.out and Path(cfg.out).suffix != ending:
        advice = f"try: --out {shlex.quote(str(Path(cfg.out).with_suffix(ending)))}"
        raise UsageError(f"--out {cfg.out}: --mode {cfg.mode} writes {ending}\n{advice}")
    if cfg.mode == "decode" and not cfg.data:
        raise UsageError("--mode decode: no latents named\nfix: --data FILE.npz, which --mode encode writes")
    device = open_device(cfg.device)
    run = load_run(cfg.model, device)
    folder = Path() if run.path.parent == PRETRAINED else run.path.parent
    out = cfg.out or str(folder / f"{default_name(cfg)}{ending}")
    inputs = [cfg.data, cfg.against, run.config.get("data", "")]
    check_replaceable(out, cfg.fresh, is_output, inputs=inputs)
    more = beside(cfg, out)
    for path in more:
        check_replaceable(path, cfg.fresh, is_output, inputs=inputs, other=unused(out, "_new"))
    run.steps = cfg.ddim_steps or run.config.get("ddim_steps", 0)
    arrays, notes = MODES[cfg.mode](cfg, run)
    if cfg.mode == "score":
        _write_table(out, arrays)
    else:
        meta = dict(mode=cfg.mode, model=str(run.path), run_id=run.run_id, epochs=run.epoch, seed=cfg.seed)
        meta |= {name: run.config[name] for name in ("loop", "level", "latent_space")}
        meta |= dict(features=run.meta["features"], units="GeV, radians") | notes
        if "X" in arrays and columns_of(run.meta) != COLUMNS:
            arrays["features"] = np.array(columns_of(run.meta))
        content = io.BytesIO()
        np.savez_compressed(content, meta=json.dumps(meta), **arrays)
        make_room(out, is_output)
        write_atomic(out, lambda file: file.write(content.getvalue()))
    if "X" in arrays:
        rows, columns = arrays["X"], columns_of(run.meta)
        count = (rows[:, : slots(rows, columns)] > 0).sum() / len(rows)
        means = f"MET {rows[:, slots(rows, columns)].mean():.1f} GeV"
        standard = standard_rows(rows, columns)
        if standard is not None:
            means = f"HT {kinematics(standard)['HT'].mean():.1f}, {means}"
        print(f"{len(rows)} events; means: {count:.2f} objects, {means}")
    print(out)
    source = cfg.data or run.config["data"]
    if cfg.against:
        write_roc(arrays, source, cfg.against, *more)
    if cfg.mode == "encode":
        title = f"{'mean ' if run.model.level == 'token' else ''}latents of {Path(source).name}"
        _draw("plot_latents", mean_latents(arrays, run), arrays["y"], title, *more)
    return {}


def default_name(cfg):
    """Return the name of the output without its ending: the mode, and the data where they are named."""
    words = [cfg.mode]
    if cfg.mode != "sample":
        words += [Path(cfg.data).stem] if cfg.data else []
        words += ["against", Path(cfg.against).stem] if cfg.against else []
    return "_".join(words)


def beside(cfg, out):
    """Return the paths of the table and the figure that are written beside `out`."""
    stem = Path(out).with_suffix("")
    if cfg.against:
        return [Path(f"{stem}_roc.csv"), Path(f"{stem}_roc.png")]
    return [Path(f"{stem}_pca.png")] if cfg.mode == "encode" else []


def is_output(path):
    """Say whether a file is an output of this command: a table by its first line, events by their meta."""
    if begins(path, b"event,label,objects,", b"score,signal,events,") or is_marked(path):
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
        newest = max(Path("outputs/runs").glob("run_*"), default=None)
        problem = f"{run}: no such run" if run else "no run named"
        command = f"generate.py events {shlex.quote(str(newest))} --mode sample" if newest else "train_ae.py"
        raise UsageError(f"{problem}\ntry: python {command}")
    names = ("model.pt", "best_val.pt", "last.pt")
    files = [path / name for name in names] if path.is_dir() else [path]
    path, state = first_good(files, _load)
    if not state:
        raise UsageError(f"{run}: no model.pt there: expected the folder of a run of train_ae.py after an epoch")
    if state["kind"] == "ae:test_mlp":
        raise UsageError(f"{run}: a run of test_mlp, which has no events\nexpected one of ae, gan_ae, diffusion_ae")
    try:
        model = AutoEncoder(**state["model_args"])
    except ValueError as e:  # a part that is not in models/parts.py
        raise UsageError(f"{path}: {e}") from e
    model.load_state_dict(state["model_state"])
    schedule = {name: state["config"].get(name) for name in ("diffusion_steps", "noise_schedule")}
    noises = NoiseSchedule(**schedule).to(device) if state["model_args"]["denoise"] else None
    return SimpleNamespace(**state | dict(path=path, model=model.to(device).eval(), noises=noises, device=device))


def _load(file):
    """Load a checkpoint of any loop of train_ae.py."""
    kind = kind_of(file)
    return load_checkpoint(file, kind if kind.startswith("ae:") else "ae:ae")


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
        ids = rows[:, : slots(rows, columns_of(self.run.meta))].astype(np.int64)
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
    columns = columns_of(run.meta)
    if columns_in(data) != columns:
        names = " ".join(columns_in(data)), " ".join(columns)
        raise DataError(f"{data}: particles of {names[0]}: expected {names[1]}, as {run.path} reads them")
    if slots(rows, columns) > T:
        expected = 2 + (1 + len(columns)) * T
        remedy = reader_for(data, "--max_particles", str(T))
        raise DataError(
            f"{data}: {rows.shape[1]} columns: expected {expected}, the {T} slots of {run.path}\ntry: {remedy}"
        )
    rows = add_slots(rows, T, columns)
    wanted = np.ones(len(rows), bool) if cfg.split == "all" else split == SPLITS.index(cfg.split)
    if not cfg.data:
        wanted &= np.isin(labels, run.config["labels"])
    if not wanted.any():
        raise DataError(f"{data}: no event in --split {cfg.split}")
    numbered = np.stack([labels, np.arange(len(rows))], 1)[wanted]
    rows, numbered, _, dropped = drop_damaged(rows[wanted], numbered, split[wanted], data, columns)
    if dropped:
        print(f"{data}: dropped {', '.join(f'{n} {reason}' for reason, n in dropped.items())}", file=sys.stderr)
    check_unit(rows, data, columns)
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
    T = run.meta["n_tokens"]
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
    """Return a row of errors per event; print their mean and quantiles. With --against, rows say of which file."""
    columns = errors_of(cfg, run)
    if cfg.against in ("", cfg.data or run.config["data"]):
        return columns, {}
    other = errors_of(replace(cfg, data=cfg.against), run)
    counts = len(columns["event"]), len(other["event"])
    columns = {name: np.concatenate([columns[name], other[name]]) for name in columns}
    return columns | dict(data=np.repeat([cfg.data or run.config["data"], cfg.against], counts)), {}


def errors_of(cfg, run):
    """Return {column: (N,)} of the events of cfg: their numbers, labels, objects and errors; print a summary."""
    rows, labels, index, source = select_events(cfg, run)
    if cfg.against:
        print(f"{source['data']}:")
    parts = []
    for i, batch, z, _ in encode_rows(rows, run):
        outputs = from_latents(run.model, run.noises, z, batch["ids"], run.steps, cfg.seed + i)
        parts.append(event_errors(*outputs, batch, run.model.level))
    errors = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    n = (rows[:, : run.meta["n_tokens"]] > 0).sum(1)
    print(f"{'':12}{'mean':>10}" + "".join(f"{f'{q:.0%}':>10}" for q in QUANTILES))
    for name, values in errors.items():
        print(f"{name:12}" + "".join(f"{v:10.4g}" for v in (values.mean(), *np.quantile(values, QUANTILES))))
    mean = (errors["rec_tokens"] * n).sum() / n.sum()
    print(f"{len(n)} events; rec_tokens over their {n.sum()} objects, as training counts it: {mean:.4g}")
    return dict(event=index, label=labels, objects=n) | errors


def write_roc(columns, background, signal, table, picture):
    """Write and draw how well the errors of events tell the file `signal` and its labels from the file `background`.

    columns: {name: (N,)} of the events of both, with `data`. Of one and the same file each label is told from the
    others. A row of the table is a point of a curve. Raises DataError.
    """
    parts = [columns, columns]
    if signal != background:
        parts = [{name: v[columns["data"] == source] for name, v in columns.items()} for source in (background, signal)]
    curves = compare(*parts, Path(signal).stem)
    if not curves:
        raise DataError(f"--against {signal}: the same file, with one label alone\nfix: --against OTHER.npz")
    points = {name: [] for name in ("score", "signal", "events", "background_events", "auc")}
    points |= dict(threshold=[], background_share=[], signal_share=[])
    for row in curves:
        print(f"{row['score']:12}{row['signal']:24} area under the ROC curve {row['auc']:.4f}")
        curve = np.transpose(row["curve"])
        for values in curve:
            for name, value in zip(points, [*(row[n] for n in list(points)[:5]), *values], strict=True):
                points[name].append(value)
    _write_table(table, {name: np.array(values) for name, values in points.items()})
    print(table)
    _draw("plot_roc", curves, f"{signal} against {background}", picture)


def mean_latents(arrays, run):
    """Return latents (N, D) of the arrays of `encode`: of each event, or the mean over its objects."""
    z = torch.from_numpy(arrays[_name(run)])
    if _name(run) == "indices":
        z = F.embedding(z.clamp_min(0), run.model.latent.codes.cpu())
    if run.model.level == "event":
        return z.numpy()
    return mean_over(z, torch.from_numpy(arrays["ids"] > 0)).numpy()


def _draw(name, *arguments):
    """Draw a figure by the function `name` of figures.py; its path is the last argument. Warn without matplotlib."""
    try:
        from data_utils.events import figures
    except ImportError:
        warn("no figure: pip install matplotlib")
        return
    getattr(figures, name)(*arguments)
    print(arguments[-1])


def sample(cfg, run):
    """Return new events, with notes in `sampled` on how they were drawn."""
    if not hasattr(run, "latents"):
        command = ["python", "train_ae.py", f"resume={run.path.parent}"]
        command += ["max_steps=0"] if run.config.get("max_steps") else []
        raise UsageError(
            f"{cfg.model}: no statistics of latents, which a run stores at its end in best_val.pt\n"
            f"try: {shlex.join(command)}"
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
        raise DataError(f"{path} can't be read: {reason}\nfix: a file of --mode encode") from e
    name, token, T = _name(run), run.model.level == "token", run.meta["n_tokens"]
    made_by = json.loads(str(arrays["meta"])).get("run_id", "") if "meta" in arrays else ""
    if made_by and run.run_id and made_by != run.run_id:
        raise DataError(
            f"{path}: encoded by run {made_by}, not by {run.path}\nfix: a file of --mode encode of this run"
        )
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
        raise DataError(f"{path}: no ids (events, {T}): {reason}\nfix: a file of --mode encode")
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
