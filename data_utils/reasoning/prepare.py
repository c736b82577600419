"""The commands of prepare_data.py that write prepared folders: from text, from other folders, from generators.

open_splits needs torch and is imported where it is used, so that `language` starts at once.
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
from data_utils.reasoning import layouts, sources
from data_utils.reasoning import sudoku as puzzles
from data_utils.reasoning.folder import FILES, FINISHED, KNOWN, Writer, read_index, read_meta, read_row
from data_utils.reasoning.rows import SPLITS, encode_task, id_type, pack, read_texts
from data_utils.stop import Stop
from data_utils.tokenizer import CONTROL, load_tokenizer, train_bpe
from data_utils.workers import cores, in_order

BLOCK_BYTES = 4 * 2**20  # bytes per task of merge
BLOCK_ROWS = 4096  # rows per task of convert and mix
LINE_SECONDS = 10  # between two printed lines


def run(writer, parts, added=None):
    """Add all parts; return the signal that stopped it, or 0. added(task) is called after each."""
    start = printed = time.monotonic()
    with Stop() as stop:
        for part in parts:
            writer.add(part)
            if added:
                added(writer.task - 1)
            if time.monotonic() - printed > LINE_SECONDS:
                printed = time.monotonic()
                rows = sum(writer.counts.get(f"{split}_samples", 0) for split in SPLITS)
                print(f"{rows} rows, {printed - start:.0f} s", flush=True)
            if stop:
                writer.record()
                print(f"stopped after task {writer.task}; the same command goes on")
                return stop.signal
    return 0


def summary(folder, started):
    """Print rows, size and time of a finished folder."""
    meta = read_meta(folder)
    megabytes = sum(path.stat().st_size for path in Path(folder).iterdir()) / 1e6
    rows = f"{meta['train_samples']} train rows, {meta['val_samples']} val rows"
    seconds = time.monotonic() - started
    print(f"{folder}: {rows}, {megabytes:.1f} MB, {seconds:.1f} s; dropped or changed: {meta['counts']}")
    return {}


# ---- language --------------------------------------------------------------------------------------------------------


def language(cfg):
    """Write a prepared folder from source files; cfg: LanguageConfig of prepare_data.py."""
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
    given = b""  # content of an existing tokenizer
    if cfg.tokenizer and Path(cfg.tokenizer).is_file():
        load_tokenizer(f"bpe:{cfg.tokenizer}")  # an error names this file, not its copy
        given = Path(cfg.tokenizer).read_bytes()
        print(f"--tokenizer {cfg.tokenizer}: --vocab_size is ignored")
    elif cfg.tokenizer:
        print(f"--tokenizer {cfg.tokenizer}: no such file, training one")
    threads = min(cfg.tokenizer_num_threads or cores(), cores())
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    names = ("text_field", "lang", "collapse_whitespace", "skip_bad_lines")
    reading = {name: getattr(cfg, name) for name in names}
    options = ["max_seq_len", "val_ratio", "seed", "format", "prefix_ratio"]
    if not given:
        options += ["vocab_size", "max_chars", "doc_cap"]
    specification = dict(command="language", sources=_stamp(files), tokenizer=hashlib.sha256(given).hexdigest())
    specification |= reading | {name: getattr(cfg, name) for name in options}
    dest = Path(cfg.dest)
    with Writer(dest, cfg.format, specification, fresh=cfg.fresh) as writer:
        tokenizer = _tokenizer(dest / "tokenizer.json", given, files, cfg, reading)
        function = partial(
            encode_task,
            tokenizer=dest / "tokenizer.json",
            digest=tokenizer.hash,
            form=cfg.format,
            max_seq_len=cfg.max_seq_len,
            prefix_ratio=cfg.prefix_ratio,
            val_ratio=cfg.val_ratio,
            seed=cfg.seed,
            batch=cfg.tokenizer_batch_size,
            reading=reading,
        )
        tasks = islice(sources.split_tasks(files), writer.task, None)
        signal = run(writer, in_order(function, tasks, threads))
        if signal:
            return dict(stopped=signal)
        _check_rows(writer.counts, cfg, files)
        _name_unused(files)
        kind = "pairs" if writer.counts.get("pairs") else "text"
        root = Path(cfg.source)
        meta = _tokenizer_meta(tokenizer)
        meta |= dict(kind=kind, format=cfg.format, max_seq_len=cfg.max_seq_len, seed=cfg.seed)
        meta["source_files"] = [path.name if path == root else path.relative_to(root).as_posix() for path in files]
        writer.finish(meta)
    return summary(dest, started)


def train_tokenizer(files, vocab_size, *, max_chars, doc_cap, reading):
    """Train a BPE and return its JSON text.

    The files share max_chars characters equally (0: all), of which a document gives at most doc_cap.
    """

    def texts():
        budget = max_chars or float("inf")
        for number, path in enumerate(files):
            file_budget = budget / (len(files) - number)  # files that were shorter leave theirs to the others
            remaining = file_budget
            documents = (d for task in sources.split_tasks([path]) for d in read_texts(task, Counter(), **reading))
            for document in documents:
                for text in [document] if isinstance(document, str) else sum(map(list, document), []):
                    text = text[: min(doc_cap or len(text), int(min(remaining, 2**62)))]
                    remaining -= len(text)
                    yield text
                if remaining <= 0:
                    break
            budget -= file_budget - remaining

    return train_bpe(texts(), vocab_size, CONTROL)


def _tokenizer(path, given, files, cfg, reading):
    """Return the tokenizer of the folder: its own if the command continues, else the given one, else a trained one."""
    if given and not path.exists():
        write_atomic(path, lambda file: file.write(given))
    elif not path.exists():
        if cfg.vocab_size < 260:
            raise UsageError(f"--vocab_size {cfg.vocab_size}: 256 bytes and 4 control tokens are the least")
        options = dict(max_chars=cfg.max_chars, doc_cap=cfg.doc_cap, reading=reading)
        content = train_tokenizer(files, cfg.vocab_size, **options).encode("utf-8")
        write_atomic(path, lambda file: file.write(content))
    tokenizer = load_tokenizer(f"bpe:{path}")
    if not given and tokenizer.vocab_size < cfg.vocab_size:
        letters = "so each word is one token; for tasks on letters or digits: --vocab_size 260"
        print(f"{path}: the text gives {tokenizer.vocab_size} ids, not {cfg.vocab_size}, {letters}")
    return tokenizer


def _check_rows(counts, cfg, files):
    """Raise DataError if there are no rows, warn if none is held out, print the bytes per token."""
    if not counts.get("train_samples") and not counts.get("val_samples"):
        first = _first_row(files)
        if not first and not counts.get("documents"):
            raise DataError(f"{cfg.source}: no rows\nfix: a file with text")
        fields = ", ".join(first) if isinstance(first, dict) else first
        advice = layouts.advice(cfg.source, first) if isinstance(first, dict) else "fix: rows with text"
        raise DataError(f"no text in {cfg.source}: {dict(counts)}; the first row has {fields}\n{advice}")
    if cfg.val_ratio and not counts.get("val_samples"):
        warn(f"no document is held out: --val_ratio {counts['lowest'] * 1.01:.3g} holds one out")
    bytes_per_token = counts.get("text_bytes", 0) / max(1, counts.get("text_tokens", 0))
    print(f"{bytes_per_token:.2f} bytes per token")


def _first_row(files):
    return next((row for task in sources.split_tasks(files) for _, row in sources.rows(task)), {})


def _name_unused(files):
    """Print the fields that are not read, if the first row holds questions or a conversation."""
    first = _first_row(files)
    if isinstance(first, dict) and layouts.has_layout(first):
        unused = [str(name) for name in first if str(name).lower() not in layouts.COLUMNS | {"language"}]
        if unused:
            print(f"fields of the first row that are not used: {', '.join(unused)}")


def _stamp(files):
    """Return a hash that changes when a source file does."""
    stamps = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    return hashlib.sha256(repr(stamps).encode("utf-8")).hexdigest()


def _tokenizer_meta(tokenizer):
    """Return the entries of meta.json about the tokenizer."""
    ids = {name: getattr(tokenizer, name) for name in ("vocab_size", "pad_id", "bos_id", "eos_id")}
    return ids | dict(tokenizer_file="tokenizer.json", tokenizer_sha256=tokenizer.hash)


# ---- merge, convert --------------------------------------------------------------------------------------------------


def merge(cfg):
    """Join the chunks of a folder into one prepared folder, or mix several folders; cfg: MergeConfig."""
    started = time.monotonic()
    if not cfg.output_dir or bool(cfg.batches) == bool(cfg.sources):
        raise UsageError("--output-dir FOLDER with --batches FOLDER, or with --sources FOLDER FOLDER ... --weights ...")
    if cfg.sources:
        return _mix(cfg, started)
    output = Path(cfg.output_dir)
    prepared.refuse_complete(output, cfg.fresh)  # before the chunks are missed: they may be deleted already
    begun = None if cfg.fresh else prepared.read_progress(output)
    chunks = begun["plan"] if begun else None  # also lists chunks that are deleted already
    if not chunks:
        chunks = _chunks(cfg.batches, output)
    first = chunks[0]["meta"]
    tasks = []  # (folder, name of a file, first byte)
    last = {}  # last task of a chunk: the chunk
    for chunk in chunks:
        for name, size in chunk["sizes"].items():
            tasks += [(chunk["folder"], name, start) for start in range(0, size, BLOCK_BYTES)]
        last[len(tasks) - 1] = chunk
    specification = dict(command="merge", chunks=[[Path(c["folder"]).name, c["sizes"]] for c in chunks])
    with Writer(output, first["format"], specification, fresh=cfg.fresh, plan=chunks) as writer:
        if not (output / "tokenizer.json").exists():
            content = Path(chunks[0]["folder"], first["tokenizer_file"]).read_bytes()
            write_atomic(output / "tokenizer.json", lambda file: file.write(content))

        def added(task):
            if task in last and not cfg.keep_chunks:
                writer.record()
                _remove(last[task], (output / "tokenizer.json").read_bytes())

        for task in last:  # a kill may have come between record and removal
            if task < writer.task:
                added(task)
        metas = {task: chunk["meta"] for task, chunk in last.items()}
        parts = (_copy(*tasks[i], metas.get(i)) for i in range(writer.task, len(tasks)))
        signal = run(writer, parts, added)
        if signal:
            return dict(stopped=signal)
        writer.finish(_joined([chunk["meta"] for chunk in chunks]))
    return summary(output, started)


def _chunks(batches, output):
    """Return the _chunk of each folder in `batches` but `output`. Raises DataError unless they can be joined."""
    root = Path(batches)
    if not root.is_dir():
        raise DataError(f"no chunk in {batches}: no such folder")
    result = os.path.realpath(output)
    folders = sorted(path for path in root.iterdir() if path.is_dir() and os.path.realpath(path) != result)
    folders = [path for path in folders if not path.name.startswith(".")]  # such as the .cache of a prepared folder
    if not folders and (root / "meta.json").exists():
        raise DataError(f"{batches} is itself a prepared folder, expected a folder of them\nfix: the folder around it")
    if not folders:
        raise DataError(f"no chunk in {batches}: expected one folder each, with meta.json")
    prepared.check_apart(output, "--output_dir", folders)
    chunks = [_chunk(folder) for folder in folders]
    _check_alike({chunk["folder"]: chunk["meta"] for chunk in chunks})
    return chunks


def _chunk(folder):
    """Return folder, meta, file sizes and the names of our own files of one chunk.

    Raises DataError if it is unfinished or truncated.
    """
    meta = read_meta(folder)
    sizes = {}
    if meta["kind"] in (*prepared.PUZZLES, "trm"):
        raise DataError(f"{folder} holds puzzles: make more of them instead")
    for name in FILES[meta["format"]]:
        path = folder / FINISHED[name]
        if not path.is_file():
            raise DataError(f"{folder} is unfinished: no {path.name}")
        sizes[name] = path.stat().st_size
        if name.endswith(".jsonl") and sizes[name]:
            with open(path, "rb") as file:
                file.seek(-1, os.SEEK_END)
                if file.read() != b"\n":
                    raise DataError(f"{path} is truncated: its last line has no end")
        if name.endswith(".idx"):
            sizes[name] = read_index(folder, name[:-4], meta)[1].size * 8
    if not any(sizes.values()):
        raise DataError(f"{folder} has no rows")
    meta["tokenizer_sha256"] = meta.get("tokenizer_sha256") or _hash_of(folder / meta["tokenizer_file"])
    return dict(folder=str(folder), meta=meta, sizes=sizes, written_here=sorted(prepared.written_here(folder)))


def _hash_of(path):
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as e:
        raise DataError(f"{path}: {e.strerror}") from e


def _check_alike(metas):
    """Raise DataError, naming the folders and values, unless all have the same tokenizer and format."""
    names = ("tokenizer_sha256", "vocab_size", "pad_id", "bos_id", "eos_id", "format")
    (first, expected), *others = [(f, {name: meta.get(name) for name in names}) for f, meta in metas.items()]
    for folder, values in others:
        if values != expected:
            remedy = "one tokenizer for all: prepare_data.py language --tokenizer FOLDER/tokenizer.json"
            if values["tokenizer_sha256"] == expected["tokenizer_sha256"]:
                remedy = "one format for all"
            raise DataError(f"{first} and {folder} differ: {changed(expected, values)}\nfix: {remedy}")


def _copy(folder, name, start, meta):
    """Return a block of a file of a chunk as a part; the last block of a chunk adds the counts of its `meta`."""
    part = dict(counts={})
    if meta:
        names = [f"{split}_{unit}" for split in SPLITS for unit in ("samples", "tokens")]
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
    """Delete the merged files of a chunk, and its folder unless it holds other files.

    A chunk stays if its meta.json does not prove that prepare_data.py wrote it.
    """
    folder, meta = Path(chunk["folder"]), chunk["meta"]
    if not folder.is_dir():
        return
    if "meta.json" not in chunk.get("written_here", ["meta.json"]):  # absent in an older plan
        warn(f"{folder} stays: it was not written by prepare_data.py")
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
    """Return the joined meta.json of several folders, without the counts."""
    meta = {k: v for k, v in metas[0].items() if not k.endswith(("_samples", "_tokens", "counts", "data_sha256"))}
    meta["kind"] = "text" if all(m["kind"] == "text" for m in metas) else "pairs"
    meta["max_seq_len"] = max(m["max_seq_len"] for m in metas)
    meta["source_files"] = [name for m in metas for name in m["source_files"]]
    return meta | dict(tokenizer_file="tokenizer.json")


def _mix(cfg, started):
    """Write a mixture of the folders --sources by --weights."""
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
    hashes = [meta.get("data_sha256", "") for meta in metas]
    specification = dict(command="mix", sources=hashes, weights=cfg.weights, seed=cfg.seed)
    specification |= dict(train_samples=cfg.train_samples, val_samples=cfg.val_samples)

    def part(task):
        split, start = task
        sides, source, row = lists[split]
        block = slice(start, start + BLOCK_ROWS)
        rows = [read_row(*sides[i], j) for i, j in zip(source[block].tolist(), row[block].tolist(), strict=True)]
        return _packed({split: rows}, metas[0], metas[0]["format"])

    return _rewrite(cfg, metas, specification, tasks, part, Path(cfg.sources[0]), started)


def mixture(weights, sizes, n, seed):
    """Return (source, row) of the n rows of a mixture, (n,) int64 each.

    The shares are rounded by largest remainder, and each row comes from the source furthest behind its share. The rows
    of a source come in random order; when all are used, they come again in another order.
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
    """Write a prepared folder in the other format, with equal ids; cfg: ConvertConfig of prepare_data.py."""
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
    """Return the part of rows (encoder ids, labels, decoder inputs). Raises DataError for inputs in a binary form."""
    if form != "jsonl":
        if any(len(inputs) for side in rows.values() for _, _, inputs in side):
            raise DataError("decoder inputs other than BOS and the shifted labels: only --format jsonl holds them")
        rows = {split: [row[:2] for row in side] for split, side in rows.items()}
    return pack(rows, id_type(meta["vocab_size"]), form, meta["bos_id"])


def _rewrite(cfg, metas, specification, tasks, part, source, started):
    """Write part(task) of all tasks, and the tokenizer of the folder `source`."""
    output = Path(cfg.output_dir)
    meta = _joined(metas)
    content = (source / metas[0]["tokenizer_file"]).read_bytes()
    with Writer(output, meta["format"], specification, fresh=cfg.fresh) as writer:
        write_atomic(output / "tokenizer.json", lambda file: file.write(content))
        signal = run(writer, (part(task) for task in tasks[writer.task :]))
        if signal:
            return dict(stopped=signal)
        writer.finish(meta)
    return summary(output, started)


# ---- generators ------------------------------------------------------------------------------------------------------


def arithmetic(cfg):
    """Write arithmetic questions as a prepared folder; cfg: ArithmeticConfig of prepare_data.py."""
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
        writer.finish(dict(_tokenizer_meta(tokenizer), kind="pairs", format="both", max_seq_len=longest, seed=cfg.seed))
    return summary(cfg.out, started)


def sudoku(cfg):
    """Write Sudoku puzzles with one solution as a prepared folder; cfg: SudokuConfig of prepare_data.py."""
    started = time.monotonic()
    out = Path(cfg.out)
    at_least(cfg, 1, "train", "val")
    options = {name: getattr(cfg, name) for name in ("size", "givens", "train", "val", "seed")}
    with lock_run(out, "prepare"):
        prepared.refuse_complete(out, cfg.fresh)
        prepared.clear(out, cfg.fresh, "--out")
        splits = puzzles.make(**options, processes=min(cfg.num_threads or cores(), cores()))
        reached = np.concatenate([np.count_nonzero(grids, axis=1) for grids, _ in splits.values()])
        print(f"givens: {reached.min()} to {reached.max()}, {reached.mean():.1f} on average")
        if reached.max() > cfg.givens > 0:
            share = (reached > cfg.givens).mean()
            warn(f"--givens {cfg.givens}: {share:.0%} of the puzzles keep more, as fewer would leave other solutions")
        prepared.write_json(out / "progress.json", dict(specification=dict(command="sudoku", **options)))
        for split, grids in splits.items():
            write_atomic(out / f"{split}.npy", lambda file, grids=grids: np.save(file, np.stack(grids, 1)))
        sizes = dict(train_samples=cfg.train, val_samples=cfg.val, max_seq_len=cfg.size**2, vocab_size=cfg.size + 1)
        digest = prepared.hash_of(out / name for name in prepared.SUDOKU)
        meta = dict(kind="sudoku", size=cfg.size, givens=cfg.givens, seed=cfg.seed, counts={}, data_sha256=digest)
        prepared.write_json(out / "meta.json", meta | sizes)
        (out / "progress.json").unlink()
    return summary(out, started)
