"""The data sets of train_hrm.py behind one interface: sums, Sudokus, mazes, prepared folders, or one random batch.

Each has meta (vocab_size, ...), hash, tokenizer, rows(split), order(seed, epoch), batch(split, index, number) -> dict
of (B, ...) tensors, and row_facts(split, index) -> the numbers per row that `halting.summarize` needs.
B rows, S ids of the encoder, T labels, N cells. A batch follows from its number, so a loader has no state to resume.
"""

import hashlib
import json
import shlex
import time
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from data_utils.errors import DataError, UsageError
from data_utils.files import unused
from data_utils.reasoning import sources
from data_utils.reasoning.arithmetic import build_synthetic_dataset
from data_utils.reasoning.folder import PUZZLES, Writer, read_index, read_meta, read_row, write_beside
from data_utils.reasoning.maze import turn_each
from data_utils.reasoning.puzzle_rows import form_of
from data_utils.reasoning.rows import SPLITS, id_type, pack, read_ids
from data_utils.reasoning.sudoku import augment, load_puzzles, make
from data_utils.tokenizer import SimpleTokenizer, load_tokenizer
from data_utils.workers import cores, in_order

HEARTBEAT = 200_000  # rows between two printed lines while JSONL is read
LEAK_ROWS = 1000  # rows searched for leaks, evenly spread: reading all would cost what the memory map saves
BUILT_IN = dict(size=9, givens=40, train=2000, val=1000)  # of --dataset sudoku


def open_dataset(dataset, *, max_seq_len, data_seed, reveal, say, **reading):
    """Return the data set "synthetic", "sudoku", or that of a prepared folder; **reading as in open_pairs."""
    if dataset == "synthetic":
        pairs = from_rows(*build_synthetic_dataset(seed=data_seed), max_seq_len=max_seq_len)
        pairs.short = len("What is 12 + 34?") + 2  # ids of a prompt with two operands of two digits
        return pairs
    meta = dict(kind="sudoku", vocab_size=10, size=9) if dataset == "sudoku" else read_meta(dataset)
    if meta["kind"] == "arc":
        raise UsageError(
            f"--dataset {dataset}: ARC tasks need the ids of their rules, which only pictures have\n"
            f"try: python train_multimodal.py --arch arc --puzzles {shlex.quote(str(dataset))}"
        )
    if meta["kind"] == "trm":
        dest = unused(dataset, "_prepared")
        raise UsageError(
            f"--dataset {dataset}: the layout of HRM and TRM\n"
            f"try: python prepare_data.py puzzles --source {shlex.quote(str(dataset))} --out {shlex.quote(str(dest))}"
        )
    if meta["kind"] not in PUZZLES:
        return open_pairs(dataset, max_seq_len=max_seq_len, say=say, **reading)
    form = form_of(meta)
    if max_seq_len != form.cells:
        raise UsageError(
            f"--max_seq_len {max_seq_len}: the puzzles have {form.cells} cells\ntry: --max_seq_len {form.cells}"
        )
    if dataset == "sudoku":
        say(f"making {BUILT_IN['train']} + {BUILT_IN['val']} puzzles")
        grids = make(**BUILT_IN, seed=data_seed, processes=cores())
    else:
        grids = load_puzzles(dataset, form.cells)
    return Puzzles(grids, meta, seed=data_seed, reveal=reveal)


def random_batch(n, length, vocab_size):
    """Return a batch of random ids: n rows of prompts and answers of `length`."""
    ids = torch.randint(vocab_size, (3, n, length))
    return dict(zip(("encoder_ids", "decoder_input_ids", "labels"), ids, strict=True))


# ---- Sudokus ---------------------------------------------------------------------------------------------------------


class Puzzles:
    """Sudokus or mazes {split: (puzzles, solutions)}, uint8 (n, N) each; each training batch is augmented anew."""

    tokenizer = SimpleNamespace(name="digits", hash="", json_text="")

    def __init__(self, grids, meta, *, seed, reveal):
        self.grids = grids
        self.meta = meta
        self.seed = seed
        self.reveal = reveal
        content = b"".join(np.ascontiguousarray(grid).tobytes() for split in grids.values() for grid in split)
        self.hash = hashlib.sha256(content).hexdigest()

    def rows(self, split):
        """Return the number of puzzles."""
        return len(self.grids[split][0])

    def order(self, seed, epoch):
        """Return the rows of "train" in the order of an epoch, (n,) int64."""
        return np.random.default_rng((seed, epoch)).permutation(self.rows("train"))

    def batch(self, split, index, number=None):
        """Return encoder_ids and labels (B, N) int64; those of training batch `number` are augmented."""
        puzzles, solutions = (grid[index] for grid in self.grids[split])
        if number is not None:
            rng = np.random.default_rng((self.seed, number))
            if self.meta["kind"] == "maze":
                puzzles, solutions = turn_each(puzzles, solutions, self.meta["rows"], self.meta["cols"], rng)
            else:
                puzzles, solutions = augment(puzzles, solutions, size=self.meta["size"], rng=rng, reveal=self.reveal)
        return dict(encoder_ids=torch.from_numpy(puzzles).long(), labels=torch.from_numpy(solutions).long())

    def example(self):
        """Return the first held-out puzzle as text."""
        puzzles = self.grids["val" if self.rows("val") else "train"][0]
        form = form_of(self.meta)
        return form.line(puzzles[0]).replace("0", ".")

    def write_beside(self, path, config):
        """Write config.yaml and meta.json for the checkpoint `path`."""
        write_beside(path, config, self.meta)

    def row_facts(self, split, index):
        """Return {labels, blanks}, (B,) each: the number of cells, and of blank ones."""
        puzzles = self.grids[split][0][index]
        blanks = torch.from_numpy(puzzles == 0).sum(1)  # of a maze: open cells, some of which the path takes
        return dict(labels=torch.full_like(blanks, puzzles.shape[1]), blanks=blanks)


# ---- prompts and answers ---------------------------------------------------------------------------------------------


def pad_batch(rows, *, pad_id, max_seq_len=0):
    """Pad rows (encoder_ids, decoder_input_ids, labels), cut on the right at max_seq_len, into a dict of int64.

    encoder_ids, encoder_mask (B, S); decoder_input_ids, labels, decoder_mask (B, T). Masks follow from the lengths, so
    a real id that equals pad_id is not masked. Labels are padded with -100.
    """
    cut = max_seq_len or None
    sides = [[np.asarray(ids, np.int64)[:cut] for ids in side] for side in zip(*rows, strict=True)]
    padded = [_pad(side, fill) for side, fill in zip(sides, (pad_id, pad_id, -100), strict=True)]
    masks = [_pad([np.ones(len(ids), np.int64) for ids in side], 0) for side in (sides[0], sides[2])]
    names = ("encoder_ids", "decoder_input_ids", "labels", "encoder_mask", "decoder_mask")
    return {name: torch.from_numpy(x) for name, x in zip(names, padded + masks, strict=True)}


def _pad(side, fill):
    out = np.full((len(side), max(map(len, side))), fill, np.int64)
    for row, ids in zip(out, side, strict=True):
        row[: len(ids)] = ids
    return out


def open_tokenizer(folder, meta):
    """Return the tokenizer of a prepared folder. Raises DataError if it is unreadable or larger than meta.json says."""
    path = Path(folder, meta["tokenizer_file"])
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        simple = isinstance(state, dict) and state.get("kind") == "characters"
        tokenizer = SimpleTokenizer.from_dict(state) if simple else load_tokenizer(f"bpe:{path}")
    except (OSError, ValueError, KeyError, RecursionError) as e:
        raise DataError(f"{path}: {e}") from e
    if tokenizer.vocab_size > meta["vocab_size"]:
        raise DataError(f"{path} has {tokenizer.vocab_size} ids, vocab_size of meta.json is {meta['vocab_size']}")
    return tokenizer


def open_splits(folder, *, workers=0, skip_bad_lines=False, cache_dir="", rank=0, say=print):
    """Return (meta, {split: (ids, index)}) of a prepared folder.

    JSONL is converted once, into <folder>/.cache or, if that can't be written, into cache_dir. Rank 0 converts, the
    other ranks wait. Raises DataError, with file:line for a bad line.
    """
    folder, meta = Path(folder), read_meta(folder)
    if meta["kind"] in (*PUZZLES, "trm"):
        raise UsageError(f"{folder} holds {'Sudokus' if meta['kind'] == 'sudoku' else 'puzzles'}, not pairs")
    if not (folder / "train.bin").is_file():
        files = [path for split in SPLITS if (path := folder / f"{split}.jsonl").is_file()]
        stamps = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in files}
        stamps |= {name: meta[name] for name in ("vocab_size", "bos_id")}
        places = [Path(place, ".cache") for place in (folder, cache_dir) if place]
        cache = _convert(files, stamps, meta, workers, skip_bad_lines, places, rank, say)
        meta |= {k: v for k, v in read_meta(cache).items() if k.endswith(("samples", "sha256"))}
        folder = cache
    return meta, {split: read_index(folder, split, meta) for split in SPLITS}


def _convert(files, stamps, meta, workers, skip_bad_lines, places, rank, say):
    """Return the folder with the binary form of the JSONL files; rank 0 writes it if needed."""
    started = time.monotonic()
    while True:
        for place in places:
            try:
                cached = read_meta(place)
                if cached["stamps"] == stamps and (skip_bad_lines or not cached["counts"].get("bad_rows")):
                    return place
            except (DataError, KeyError):
                continue
        if rank == 0:
            break
        if time.monotonic() - started > 3600:
            raise DataError(f"{files[0]}: rank 0 did not read it within an hour")
        time.sleep(0.1)
    place = next((p for p in places if _writable(p)), places[-1])
    specification = stamps | dict(skip_bad_lines=skip_bad_lines)
    try:
        writer = Writer(place, "bin", specification)
    except UsageError as e:
        if "in use" in str(e):
            raise
        writer = Writer(place, "bin", specification, fresh=True)  # the cache is of older files
    read = partial(read_ids, vocab_size=meta["vocab_size"], bos_id=meta["bos_id"], skip_bad_lines=skip_bad_lines)
    rows = printed = 0
    with writer:
        tasks = islice(sources.split_tasks(files), writer.task, None)
        for part in in_order(read, tasks, min(workers, cores())):
            writer.add(part)
            rows += sum(part["counts"][f"{split}_samples"] for split in SPLITS)
            if rows // HEARTBEAT > printed:
                printed = rows // HEARTBEAT
                say(f"{files[0].parent}: {rows} rows, {rows / (time.monotonic() - started):.0f} rows/s")
        bad = writer.counts.get("bad_rows", 0)
        if bad:
            say(f"{files[0].parent}: {bad} bad lines skipped")
        names = ("vocab_size", "pad_id", "bos_id", "eos_id", "max_seq_len", "kind")
        writer.finish({name: meta[name] for name in names} | dict(format="bin", stamps=stamps), columns=3)
    return place


def _writable(folder):
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
        return True
    except OSError:
        return False


def open_pairs(folder, *, max_seq_len=0, allow_leak=False, say=print, **reading):
    """Return the Pairs of a prepared folder; **reading as in open_splits."""
    meta, splits = open_splits(folder, say=say, **reading)
    return Pairs(splits, meta, open_tokenizer(folder, meta), max_seq_len=max_seq_len, allow_leak=allow_leak, say=say)


def from_rows(train, val, tokenizer, *, max_seq_len=0):
    """Return the Pairs of rows (encoder_ids, decoder_input_ids, labels) in memory; inputs follow from labels."""
    rows = {split: [tuple(map(np.array, row[::2])) for row in side] for split, side in (("train", train), ("val", val))}
    dtype = id_type(tokenizer.vocab_size)
    part = pack(rows, dtype, "bin", tokenizer.bos_id)
    splits = {}
    for split in SPLITS:
        places = np.cumsum(part[f"{split}.idx"]).reshape(-1, 2)
        splits[split] = np.frombuffer(part[f"{split}.bin"], dtype), places
    ids = {name: getattr(tokenizer, name) for name in ("vocab_size", "pad_id", "bos_id", "eos_id")}
    digest = hashlib.sha256(part["train.bin"] + part["val.bin"]).hexdigest()
    meta = ids | dict(kind="pairs", max_seq_len=0, data_sha256=digest)
    return Pairs(splits, meta | dict(part["counts"]), tokenizer, max_seq_len=max_seq_len)


def _leaks(encoder_ids, inputs):
    """Return whether the encoder sees the answer."""
    return np.array_equal(encoder_ids, inputs)


class Pairs:
    """Batches of {split: (ids, index)}. `hash` identifies the data; `leak`: the encoder sees the answers.

    It sees the answer of a row whose encoder ids equal the decoder inputs. If more than 1 % of the searched rows leak,
    leaking rows are cut in half, prefix -> continuation, unless allow_leak.
    """

    def __init__(self, splits, meta, tokenizer, *, max_seq_len=0, allow_leak=False, say=print):
        self.splits = splits
        self.meta = meta
        self.tokenizer = tokenizer
        self.max_seq_len = max_seq_len
        self.hash = meta.get("data_sha256") or hashlib.sha256(json.dumps(meta).encode()).hexdigest()
        self.cut_leaks = self.leak = False
        self.short = 0  # shorter prompts are scored apart; 0: none
        n = self.rows("train")
        if not n:
            raise DataError("no training row")
        sample = np.unique(np.linspace(0, n - 1, min(n, LEAK_ROWS), dtype=np.int64))
        share = sum(_leaks(*self._row("train", i)[:2]) for i in sample) / len(sample)
        if share > 0.01:
            self.leak, self.cut_leaks = allow_leak, not allow_leak
            action = "kept as --allow_leak says" if allow_leak else "cut in half, prefix -> continuation"
            say(f"warning: {share:.0%} of the rows show the encoder what the decoder must predict: {action}")
        longest = meta["max_seq_len"] or max_seq_len + 1  # if meta.json knows it, no row needs a look
        if 0 < max_seq_len < longest:
            long = sum(self._count_long(split) for split in SPLITS)
            if long:
                say(f"{long} rows are longer than --max_seq_len {max_seq_len}: cut on the right")

    def rows(self, split):
        """Return the number of rows."""
        return len(self.splits[split][1])

    def order(self, seed, epoch):
        """Return the rows of "train" in the order of an epoch, (n,) int64."""
        return np.random.default_rng((seed, epoch)).permutation(self.rows("train"))

    def row_facts(self, split, index):
        """Return {labels, bytes, short}, (B,) each: ids and UTF-8 bytes of the answer, whether the prompt is short."""
        batch = self.batch(split, index)
        real = batch["labels"] >= 0
        sizes = torch.from_numpy(self.tokenizer.token_bytes.astype(np.int64))
        facts = dict(labels=real.sum(1), bytes=(sizes[batch["labels"].clamp_min(0)] * real).sum(1))
        if self.short:
            facts["short"] = batch["encoder_mask"].sum(1) < self.short
        return facts

    def example(self):
        """Return the first held-out prompt as text: one line of at most 80 characters that fits the model."""
        ids, *_ = self._row("val" if self.rows("val") else "train", 0)
        specials = [self.meta[name] for name in ("pad_id", "bos_id", "eos_id")]
        ids = [i for i in ids.tolist() if i not in specials][: max(1, self.max_seq_len - 2) if self.max_seq_len else 80]
        return " ".join(self.tokenizer.decode(ids).split())[:80]

    def write_beside(self, path, config):
        """Write config.yaml, meta.json and tokenizer.json for the checkpoint `path`."""
        write_beside(path, config, self.meta, self.tokenizer)

    def batch(self, split, index, number=None):
        """Return the dict of pad_batch for the rows `index` (B,); the number of the batch changes nothing here."""
        ids, places = self.splits[split]
        index = np.asarray(index, np.int64)
        edges = np.asarray(places[index])  # (B, 2 or 3)
        begin = np.where(index > 0, np.asarray(places[np.maximum(index, 1) - 1, -1]), 0)
        has_inputs = edges[:, -1] > edges[:, 1]
        if self.cut_leaks or has_inputs.any():
            return self._padded_rows(split, index)
        encoder_ids, encoder_mask = self._gather(ids, begin, edges[:, 0], self.meta["pad_id"])
        labels, decoder_mask = self._gather(ids, edges[:, 0], edges[:, 1], self.meta["pad_id"])
        inputs = np.empty_like(labels)
        inputs[:, 0], inputs[:, 1:] = self.meta["bos_id"], labels[:, :-1]
        inputs[~decoder_mask] = self.meta["pad_id"]
        labels[~decoder_mask] = -100
        names = ("encoder_ids", "decoder_input_ids", "labels", "encoder_mask", "decoder_mask")
        values = (encoder_ids, inputs, labels, encoder_mask.astype(np.int64), decoder_mask.astype(np.int64))
        return {name: torch.from_numpy(x) for name, x in zip(names, values, strict=True)}

    def _gather(self, ids, begin, end, fill):
        """Return ids[begin : end] of each row padded with `fill` (B, L) int64, and where it has ids (B, L) bool."""
        lengths = end - begin
        if self.max_seq_len:
            lengths = np.minimum(lengths, self.max_seq_len)
        steps = np.arange(lengths.max())
        mask = steps < lengths[:, None]
        out = np.take(ids, begin[:, None] + steps, mode="clip").astype(np.int64)
        out[~mask] = fill
        return out, mask

    def _padded_rows(self, split, index):
        """Return the same as `batch`, row by row: for leaking rows and decoder inputs of their own."""
        rows = []
        for i in index.tolist():
            encoder_ids, inputs, labels = self._row(split, i)
            if self.cut_leaks and _leaks(encoder_ids, inputs) and len(labels) > 1:
                half = len(labels) // 2
                encoder_ids, labels = encoder_ids[:half], labels[half - 1 :]
                inputs = np.concatenate([[self.meta["bos_id"]], labels[:-1]])
            rows.append((encoder_ids, inputs, labels))
        return pad_batch(rows, pad_id=self.meta["pad_id"], max_seq_len=self.max_seq_len)

    def _row(self, split, i):
        """Return (encoder_ids, decoder_input_ids, labels) of row i."""
        encoder_ids, labels, inputs = read_row(*self.splits[split], i)
        if not len(inputs):
            inputs = np.concatenate([[self.meta["bos_id"]], labels[:-1]])
        return encoder_ids, inputs, labels

    def _count_long(self, split):
        """Return the number of rows longer than max_seq_len on either side."""
        places = self.splits[split][1]
        long = 0
        for start in range(0, len(places), 2**16):
            block = np.asarray(places[max(0, start - 1) : start + 2**16])
            begins = np.concatenate([[0] if not start else [], block[:, -1]])[:-1]
            block = block[1:] if start else block
            long += int((np.maximum(block[:, 0] - begins, block[:, 1] - block[:, 0]) > self.max_seq_len).sum())
        return long
