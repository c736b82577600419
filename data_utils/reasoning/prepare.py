"""Prepared folders out of text, out of each other, out of the generators: the work of prepare_data.py's commands.

What reads rows back needs torch and is imported where it is used: `language` starts at once.
"""

import hashlib
import os
import time
from collections import Counter
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np

from data_utils.checkpoint import changed
from data_utils.config import at_least
from data_utils.errors import DataError, UsageError
from data_utils.files import lock_run, warn, write_atomic
from data_utils.reasoning import folder as prepared
from data_utils.reasoning import sources
from data_utils.reasoning import sudoku as puzzles
from data_utils.reasoning.folder import FILES, FINISHED, KNOWN, Writer, read_index, read_meta, read_row
from data_utils.reasoning.rows import SPLITS, encode_task, id_type, pack, read_texts
from data_utils.stop import Stop
from data_utils.tokenizer import CONTROL, load_tokenizer, train_bpe
from data_utils.workers import cores, in_order

BLOCK_BYTES = 4 * 2**20  # a task of merge
BLOCK_ROWS = 4096  # a task of convert and mix
LINE_SECONDS = 10


def run(writer, parts, added=None):
    """Add all parts -> number of the signal that stopped it, or 0. `added(task)` is called after each."""
    start = said = time.monotonic()
    with Stop() as stop:
        for part in parts:
            writer.add(part)
            if added:
                added(writer.task - 1)
            if time.monotonic() - said > LINE_SECONDS:
                said = time.monotonic()
                rows = sum(writer.counts.get(f"{split}_samples", 0) for split in SPLITS)
                print(f"{rows} rows, {said - start:.0f} s", flush=True)
            if stop:
                writer.record()
                print(f"stopped after task {writer.task}; the same command goes on")
                return stop.signal
    return 0


def summary(folder, started):
    meta = read_meta(folder)
    size = sum(p.stat().st_size for p in Path(folder).iterdir()) / 1e6
    rows = f"{meta['train_samples']} train rows, {meta['val_samples']} val rows"
    print(f"{folder}: {rows}, {size:.1f} MB, {time.monotonic() - started:.1f} s; dropped or changed: {meta['counts']}")
    return {}


# ---- language --------------------------------------------------------------------------------------------------------


def language(cfg):
    """Source files -> prepared folder; cfg: LanguageConfig of prepare_data.py."""
    started = time.monotonic()
    if not cfg.source or not cfg.dest:
        raise UsageError("--source FILES --dest FOLDER: both are needed")
    at_least(cfg, 4, "max_seq_len")
    at_least(cfg, 1, "tokenizer_batch_size")
    at_least(cfg, 0, "val_ratio", "prefix_ratio", "max_files", "tokenizer_num_threads")
    if cfg.val_ratio >= 1 or cfg.prefix_ratio >= 1:
        raise UsageError(f"--val_ratio {cfg.val_ratio} --prefix_ratio {cfg.prefix_ratio}: below 1")
    files = sources.find_files(cfg.source, cfg.max_files)
    prepared.check_apart(cfg.dest, "--dest", [cfg.source, *files])
    given = Path(cfg.tokenizer).read_bytes() if cfg.tokenizer and Path(cfg.tokenizer).is_file() else b""
    if cfg.tokenizer:
        print(f"--tokenizer {cfg.tokenizer}: {'--vocab_size is ignored' if given else 'no such file, training one'}")
    threads = min(cfg.tokenizer_num_threads or cores(), cores())
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    names = ("text_field", "lang", "collapse_whitespace", "skip_bad_lines")
    reading = {name: getattr(cfg, name) for name in names}
    options = ["max_seq_len", "val_ratio", "seed", "format", "prefix_ratio"]
    options += [] if given else ["vocab_size", "max_chars", "doc_cap"]
    specification = dict(command="language", sources=_stamp(files), tokenizer=hashlib.sha256(given).hexdigest())
    specification |= reading | {name: getattr(cfg, name) for name in options}
    dest = Path(cfg.dest)
    with Writer(dest, cfg.format, specification, fresh=cfg.fresh) as writer:
        tokenizer = _tokenizer(dest / "tokenizer.json", given, files, cfg, reading)
        function = partial(encode_task, tokenizer=dest / "tokenizer.json", digest=tokenizer.hash, form=cfg.format,
                           max_seq_len=cfg.max_seq_len, prefix_ratio=cfg.prefix_ratio, val_ratio=cfg.val_ratio,
                           seed=cfg.seed, batch=cfg.tokenizer_batch_size, reading=reading)  # fmt: skip
        signal = run(writer, in_order(function, islice(sources.split(files), writer.task, None), threads))
        if signal:
            return dict(stopped=signal)
        _check_rows(writer.counts, cfg, files)
        kind = "pairs" if writer.counts.get("pairs") else "text"
        root = Path(cfg.source)
        meta = dict(_about(tokenizer), kind=kind, format=cfg.format, max_seq_len=cfg.max_seq_len, seed=cfg.seed)
        meta["source_files"] = [path.name if path == root else path.relative_to(root).as_posix() for path in files]
        writer.finish(meta)
    return summary(dest, started)


def train_tokenizer(files, vocab_size, *, max_chars, doc_cap, reading):
    """Return the JSON text of a BPE; each file gives its share of max_chars (0: all), a document doc_cap at most."""

    def texts():
        left = max_chars or float("inf")
        for number, path in enumerate(files):
            share = end = left / (len(files) - number)
            documents = (d for task in sources.split([path]) for d in read_texts(task, Counter(), **reading))
            for document in documents:
                for text in [document] if isinstance(document, str) else sum(map(list, document), []):
                    text = text[: min(doc_cap or len(text), int(min(share, 2**62)))]
                    share -= len(text)
                    yield text
                if share <= 0:
                    break
            left -= end - share

    return train_bpe(texts(), vocab_size, CONTROL)


def _tokenizer(path, given, files, cfg, reading):
    """Return the tokenizer of the folder: as begun, as given, or trained."""
    if given and not path.exists():
        write_atomic(path, lambda file: file.write(given))
    elif not path.exists():
        if not 260 <= cfg.vocab_size:
            raise UsageError(f"--vocab_size {cfg.vocab_size}: 256 bytes and 4 control tokens are the least")
        options = dict(max_chars=cfg.max_chars, doc_cap=cfg.doc_cap, reading=reading)
        content = train_tokenizer(files, cfg.vocab_size, **options).encode("utf-8")
        write_atomic(path, lambda file: file.write(content))
    tokenizer = load_tokenizer(f"bpe:{path}")
    if not given and tokenizer.vocab_size < cfg.vocab_size:
        print(f"{path}: the text gives {tokenizer.vocab_size} ids, not {cfg.vocab_size}")
    return tokenizer


def _check_rows(counts, cfg, files):
    if not counts.get("train_samples") and not counts.get("val_samples"):
        _, row = next(((p, r) for task in sources.split(files) for p, r in sources.rows(task)), (0, {}))
        fields = ", ".join(row) if isinstance(row, dict) else row
        raise DataError(f"no text in {cfg.source}: {dict(counts)}; the first row has {fields}\ntry: --text-field NAME")
    if cfg.val_ratio and not counts.get("val_samples"):
        warn(f"no document is held out: --val_ratio {counts['lowest'] * 1.01:.3g} holds one out")
    print(f"{counts.get('text_bytes', 0) / max(1, counts.get('text_tokens', 0)):.2f} bytes per token")


def _stamp(files):
    """Return what changes when a source file does."""
    stamps = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    return hashlib.sha256(repr(stamps).encode("utf-8")).hexdigest()


def _about(tokenizer):
    ids = {name: getattr(tokenizer, name) for name in ("vocab_size", "pad_id", "bos_id", "eos_id")}
    return ids | dict(tokenizer_file="tokenizer.json", tokenizer_sha256=tokenizer.hash)


# ---- merge, convert --------------------------------------------------------------------------------------------------


def merge(cfg):
    """Chunks of a folder -> one prepared folder, or a mixture of folders; cfg: MergeConfig of prepare_data.py."""
    started = time.monotonic()
    if not cfg.output_dir or bool(cfg.batches) == bool(cfg.sources):
        raise UsageError("--output-dir FOLDER with --batches FOLDER, or with --sources FOLDER FOLDER ... --weights ...")
    if cfg.sources:
        return _mix(cfg, started)
    output = Path(cfg.output_dir)
    prepared.refuse_complete(output, cfg.fresh)  # else the chunks, already deleted, would be missed
    begun = None if cfg.fresh else prepared.read_progress(output)
    chunks = begun["plan"] if begun else None  # those already deleted are only known from there
    if not chunks:
        root = Path(cfg.batches)
        if not root.is_dir():
            raise DataError(f"no chunk in {cfg.batches}: no such folder")
        result = os.path.realpath(output)
        folders = sorted(p for p in root.iterdir() if p.is_dir() and os.path.realpath(p) != result)
        if not folders:
            raise DataError(f"no chunk in {cfg.batches}: expected one folder each, with meta.json")
        prepared.check_apart(output, "--output_dir", folders)
        chunks = [_chunk(folder) for folder in folders]
        _check_alike({c["folder"]: c["meta"] for c in chunks})
    first = chunks[0]["meta"]
    tasks = [(c["folder"], name, start) for c in chunks for name, size in c["sizes"].items()
             for start in range(0, size, BLOCK_BYTES)]  # fmt: skip
    last = {max(i for i, task in enumerate(tasks) if task[0] == c["folder"]): c for c in chunks}
    specification = dict(command="merge", chunks=[[Path(c["folder"]).name, c["sizes"]] for c in chunks])
    with Writer(output, first["format"], specification, fresh=cfg.fresh, plan=chunks) as writer:
        if not (output / "tokenizer.json").exists():
            content = Path(chunks[0]["folder"], first["tokenizer_file"]).read_bytes()
            write_atomic(output / "tokenizer.json", lambda file: file.write(content))

        def added(task):
            if task in last and not cfg.keep_chunks:
                writer.record()
                _remove(last[task], (output / "tokenizer.json").read_bytes())

        for task in (t for t in last if t < writer.task):  # a kill came between record and removal
            added(task)
        metas = {task: c["meta"] for task, c in last.items()}
        parts = (_copy(*tasks[i], metas.get(i)) for i in range(writer.task, len(tasks)))
        if signal := run(writer, parts, added):
            return dict(stopped=signal)
        writer.finish(_joined([c["meta"] for c in chunks]))
    return summary(output, started)


def _chunk(folder):
    """Return what merging needs to know of one chunk. Raises DataError when it is unfinished or cut short."""
    meta, sizes = read_meta(folder), {}
    if meta["kind"] == "sudoku":
        raise DataError(f"{folder} holds Sudokus: make more of them instead")
    for name in FILES[meta["format"]]:
        path = folder / FINISHED[name]
        if not path.is_file():
            raise DataError(f"{folder} is unfinished: no {path.name}")
        sizes[name] = path.stat().st_size
        if name.endswith(".jsonl") and sizes[name]:
            with open(path, "rb") as file:
                file.seek(-1, os.SEEK_END)
                if file.read() != b"\n":
                    raise DataError(f"{path} is cut short: its last line has no end")
        if name.endswith(".idx"):
            sizes[name] = read_index(folder, name[:-4], meta)[1].size * 8
    meta["tokenizer_sha256"] = meta.get("tokenizer_sha256") or _hash_of(folder / meta["tokenizer_file"])
    return dict(folder=str(folder), meta=meta, sizes=sizes)


def _hash_of(path):
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as e:
        raise DataError(f"{path}: {e.strerror}") from e


def _check_alike(metas):
    """Raise DataError, with both folders and both values, unless all were made with one tokenizer in one format."""
    names = ("tokenizer_sha256", "vocab_size", "pad_id", "bos_id", "eos_id", "format")
    (first, expected), *others = [(f, {name: meta.get(name) for name in names}) for f, meta in metas.items()]
    for folder, found in others:
        if found != expected:
            raise DataError(f"{first} and {folder} differ: {changed(expected, found)}")


def _copy(folder, name, start, meta):
    """Return a block of one file of a chunk as a part; `meta` with its last block, whose counts are then added."""
    part = dict(counts={})
    if meta:
        names = [f"{split}_{what}" for split in SPLITS for what in ("samples", "tokens")]
        part["counts"] = {key: meta.get(key, 0) for key in names} | meta["counts"]
    if name.endswith(".idx"):
        index = read_index(folder, name[:-4], read_meta(folder))[1]
        first, rows = start // 16, BLOCK_BYTES // 16
        before = index[first - 1, 1] if first else 0
        return part | {name: np.diff(index[first : first + rows].reshape(-1), prepend=before).reshape(-1, 2)}
    with open(Path(folder, name), "rb") as file:
        file.seek(start)
        return part | {name: file.read(BLOCK_BYTES)}


def _remove(chunk, tokenizer):
    """Delete the files of a chunk whose content was merged, and the folder unless it holds others."""
    folder, meta = Path(chunk["folder"]), chunk["meta"]
    if not folder.is_dir():
        return
    names = [FINISHED[name] for name in FILES[meta["format"]]]
    names += ["meta.json", "progress.json", ".prepare.lock"]
    copy = folder / meta["tokenizer_file"]
    if copy.is_file() and copy.read_bytes() == tokenizer:
        names.append(copy.name)
    for name in KNOWN:
        (folder / ".cache" / name).unlink(missing_ok=True)
    for name in names:
        (folder / name).unlink(missing_ok=True)
    for place in (folder / ".cache", folder):
        if place.is_dir() and any(place.iterdir()):
            warn(f"{place} stays: it holds other files")
        elif place.is_dir():
            place.rmdir()


def _joined(metas):
    """Return the meta.json of several folders, but for the counts."""
    meta = {k: v for k, v in metas[0].items() if not k.endswith(("_samples", "_tokens", "counts", "data_sha256"))}
    meta["kind"] = "text" if all(m["kind"] == "text" for m in metas) else "pairs"
    longest, files = max(m["max_seq_len"] for m in metas), [name for m in metas for name in m["source_files"]]
    return meta | dict(tokenizer_file="tokenizer.json", max_seq_len=longest, source_files=files)


def _mix(cfg, started):
    from data_utils.reasoning.dataset import open_splits

    prepared.check_apart(cfg.output_dir, "--output_dir", cfg.sources)
    opened = {folder: open_splits(folder) for folder in cfg.sources}
    if len(opened) < len(cfg.sources) or len(cfg.weights) != len(opened) or not all(w > 0 for w in cfg.weights):
        raise UsageError("--sources and --weights: different folders, and a weight above 0 for each")
    metas = [meta for meta, _ in opened.values()]
    _check_alike({folder: meta | dict(format="") for folder, (meta, _) in opened.items()})
    tasks, lists = [], {}
    for split, wanted in zip(SPLITS, (cfg.train_samples, cfg.val_samples), strict=True):
        sides = [splits[split] for _, splits in opened.values()]
        sizes = [len(index) for _, index in sides]
        lists[split] = sides, *mixture(cfg.weights, sizes, wanted or sum(sizes), cfg.seed)
        tasks += [(split, start) for start in range(0, len(lists[split][1]), BLOCK_ROWS)]
    specification = dict(command="mix", sources=[m.get("data_sha256", "") for m in metas], weights=cfg.weights,
                         train_samples=cfg.train_samples, val_samples=cfg.val_samples, seed=cfg.seed)  # fmt: skip

    def part(task):
        split, start = task
        sides, source, row = lists[split]
        chosen = zip(source[start : start + BLOCK_ROWS].tolist(), row[start : start + BLOCK_ROWS].tolist(), strict=True)
        rows = [read_row(*sides[i], j) for i, j in chosen]
        return _packed({split: rows}, metas[0], metas[0]["format"])

    return _rewrite(cfg, metas, specification, tasks, part, Path(cfg.sources[0]), started)


def mixture(weights, sizes, n, seed):
    """Return (source, row) of n rows: shares by largest remainder, each row from the source furthest behind its share.

    Rows of a source come in random order, again in another one when its share is larger than it is.
    """
    exact = np.array(weights) / sum(weights) * n
    quotas = np.floor(exact).astype(np.int64)
    quotas[np.argsort(quotas - exact, kind="stable")[: n - quotas.sum()]] += 1
    if any(quota and not size for quota, size in zip(quotas, sizes, strict=True)):
        raise DataError("a source of the mixture has no row in a split")
    due = np.concatenate([(np.arange(quota) + 0.5) / max(quota, 1) for quota in quotas])
    order = np.argsort(due, kind="stable")
    rows = []
    for i, (quota, size) in enumerate(zip(quotas, sizes, strict=True)):
        turns = [np.random.default_rng((seed, i, t)).permutation(size) for t in range(-(-quota // max(size, 1)))]
        rows.append(np.concatenate([*turns, np.zeros(0, np.int64)])[:quota])
    return np.repeat(np.arange(len(sizes)), quotas)[order], np.concatenate(rows).astype(np.int64)[order]


def convert(cfg):
    """A prepared folder in the other format, equal ids; cfg: ConvertConfig of prepare_data.py."""
    from data_utils.reasoning.dataset import open_splits

    started = time.monotonic()
    if not cfg.dataset or not cfg.output_dir:
        raise UsageError("--dataset FOLDER --output-dir FOLDER: both are needed")
    prepared.check_apart(cfg.output_dir, "--output_dir", [cfg.dataset])
    meta, splits = open_splits(cfg.dataset)
    tasks = [(split, start) for split in SPLITS for start in range(0, len(splits[split][1]), BLOCK_ROWS)]
    specification = dict(command="convert", source=meta.get("data_sha256", ""), format=cfg.format)

    def part(task):
        split, start = task
        ids, index = splits[split]
        rows = [read_row(ids, index, i) for i in range(start, min(start + BLOCK_ROWS, len(index)))]
        return _packed({split: rows}, meta, cfg.format)

    meta = meta | dict(format=cfg.format)
    return _rewrite(cfg, [meta], specification, tasks, part, Path(cfg.dataset), started)


def _packed(rows, meta, form):
    if form != "jsonl":
        if any(len(own) for side in rows.values() for _, _, own in side):
            raise DataError("decoder inputs other than BOS and the shifted labels: only --format jsonl holds them")
        rows = {split: [row[:2] for row in side] for split, side in rows.items()}
    return pack(rows, id_type(meta["vocab_size"]), form, meta["bos_id"])


def _rewrite(cfg, metas, specification, tasks, part, source, started):
    """Write the parts of all tasks with the tokenizer of folder `source`."""
    output, meta = Path(cfg.output_dir), _joined(metas)
    content = (source / metas[0]["tokenizer_file"]).read_bytes()
    with Writer(output, meta["format"], specification, fresh=cfg.fresh) as writer:
        write_atomic(output / "tokenizer.json", lambda file: file.write(content))
        if signal := run(writer, (part(task) for task in tasks[writer.task :])):
            return dict(stopped=signal)
        writer.finish(meta)
    return summary(output, started)


# ---- generators ------------------------------------------------------------------------------------------------------


def arithmetic(cfg):
    """Questions of arithmetic as a prepared folder; cfg: ArithmeticConfig of prepare_data.py."""
    from data_utils.reasoning.arithmetic import build_synthetic_dataset

    started = time.monotonic()
    names = ("digits", "operators", "val_ratio", "seed", "samples")
    options = {name: getattr(cfg, name) for name in names}
    train, val, tokenizer = build_synthetic_dataset(**options)
    rows = dict(train=train, val=val)
    rows = {split: [tuple(map(np.array, row[::2])) for row in side] for split, side in rows.items()}
    longest = max(len(ids) for side in rows.values() for row in side for ids in row)
    with Writer(cfg.out, "both", dict(command="arithmetic", **options), fresh=cfg.fresh) as writer:
        prepared.write_json(Path(cfg.out, "tokenizer.json"), tokenizer.to_dict())
        if not writer.task:
            writer.add(pack(rows, np.uint16, "both", tokenizer.bos_id))
        writer.finish(dict(_about(tokenizer), kind="pairs", format="both", max_seq_len=longest, seed=cfg.seed))
    return summary(cfg.out, started)


def sudoku(cfg):
    """Puzzles with one solution as a prepared folder; cfg: SudokuConfig of prepare_data.py."""
    started, out = time.monotonic(), Path(cfg.out)
    at_least(cfg, 1, "train", "val")
    options = {name: getattr(cfg, name) for name in ("size", "givens", "train", "val", "seed")}
    with lock_run(out, "prepare"):
        prepared.refuse_complete(out, cfg.fresh)
        prepared.clear(out, cfg.fresh, "--out")
        prepared.write_json(out / "progress.json", dict(specification=dict(command="sudoku", **options)))
        made = puzzles.make(**options, processes=min(cfg.num_threads or cores(), cores()))
        for split, grids in made.items():
            write_atomic(out / f"{split}.npy", lambda file, grids=grids: np.save(file, np.stack(grids, 1)))
        sizes = dict(train_samples=cfg.train, val_samples=cfg.val, max_seq_len=cfg.size**2, vocab_size=cfg.size + 1)
        digest = prepared.hash_of(out / name for name in prepared.SUDOKU)
        meta = dict(kind="sudoku", size=cfg.size, givens=cfg.givens, seed=cfg.seed, counts={}, data_sha256=digest)
        prepared.write_json(out / "meta.json", meta | sizes)
        (out / "progress.json").unlink()
    return summary(out, started)
