"""Prompt and answer as ids: padded batches of a prepared folder (see prepared.py) or of rows made in memory.

B rows, S ids of the encoder, T labels; position = batch number, so that a resumed run needs no state of a loader.
"""

import hashlib
import json
import time
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from data_utils.errors import DataError, UsageError
from data_utils.reasoning import sources
from data_utils.reasoning.folder import Writer, read_index, read_meta, read_row, write_beside
from data_utils.reasoning.rows import SPLITS, id_type, pack, read_ids
from data_utils.tokenizer import SimpleTokenizer, load_tokenizer
from data_utils.workers import cores, in_order

HEARTBEAT = 200_000  # rows between two lines while JSONL is read
LEAK_ROWS = 1000  # looked at, evenly spread: reading all would cost what the memory map saves


def pad_batch(rows, *, pad_id, max_seq_len=0):
    """Return a dict of int64 of rows (encoder_ids, decoder_input_ids, labels), cut on the right at max_seq_len.

    encoder_ids, encoder_mask (B, S); decoder_input_ids, labels, decoder_mask (B, T). Masks are 1 where a row has ids,
    from its length: a real id that equals pad_id is not masked. Labels are padded with -100.
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
    """Return the tokenizer of a prepared folder; DataError when unreadable or with more ids than meta.json says."""
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
    """Return (meta, {split: (ids, index)}) of a prepared folder; JSONL is converted once into <folder>/.cache.

    Where that takes no files, into cache_dir. Rank 0 converts, the others wait. Raises DataError, with file:line.
    """
    folder, meta = Path(folder), read_meta(folder)
    if meta["kind"] == "sudoku":
        raise UsageError(f"{folder} holds Sudokus, not pairs")
    if not (folder / "train.bin").is_file():
        files = [path for split in SPLITS if (path := folder / f"{split}.jsonl").is_file()]
        stamps = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in files}
        stamps |= {name: meta[name] for name in ("vocab_size", "bos_id")}
        places = [Path(place, ".cache") for place in (folder, cache_dir) if place]
        cache = _convert(files, stamps, meta, workers, skip_bad_lines, places, rank, say)
        folder, meta = cache, meta | {k: v for k, v in read_meta(cache).items() if k.endswith(("samples", "sha256"))}
    return meta, {split: read_index(folder, split, meta) for split in SPLITS}


def _convert(files, stamps, meta, workers, skip_bad_lines, places, rank, say):
    """Return the folder that holds the binary form of the JSONL files."""
    started = time.monotonic()
    while True:
        for place in places:
            try:
                found = read_meta(place)
                if found["stamps"] == stamps and (skip_bad_lines or not found["counts"].get("bad_rows")):
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
        writer = Writer(place, "bin", specification, fresh=True)  # of older files
    read = partial(read_ids, vocab_size=meta["vocab_size"], bos_id=meta["bos_id"], skip_bad_lines=skip_bad_lines)
    rows = said = 0
    with writer:
        for part in in_order(read, islice(sources.split(files), writer.task, None), min(workers, cores())):
            writer.add(part)
            rows += sum(part["counts"][f"{split}_samples"] for split in SPLITS)
            if rows // HEARTBEAT > said:
                said = rows // HEARTBEAT
                say(f"{files[0].parent}: {rows} rows, {rows / (time.monotonic() - started):.0f} rows/s")
        bad = writer.counts.get("bad_rows", 0)
        if bad:
            say(f"{files[0].parent}: {bad} bad lines skipped")
        about = {name: meta[name] for name in ("vocab_size", "pad_id", "bos_id", "eos_id", "max_seq_len", "kind")}
        writer.finish(about | dict(format="bin", stamps=stamps), columns=3)
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
    """Return the Pairs of rows (encoder_ids, decoder_input_ids, labels) made in memory; decoder inputs made anew."""
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


def _leaks(encoder_ids, inputs, labels):
    return np.array_equal(encoder_ids, inputs)


class Pairs:
    """Batches of {split: (ids, index)}; `hash` names the data, `leak` is true where the encoder is shown the answer.

    Rows whose encoder ids are the decoder inputs show it: above 1 % of those looked at they are cut in half, prefix ->
    continuation, unless allow_leak.
    """

    def __init__(self, splits, meta, tokenizer, *, max_seq_len=0, allow_leak=False, say=print):
        self.splits, self.meta, self.tokenizer, self.max_seq_len = splits, meta, tokenizer, max_seq_len
        self.hash = meta.get("data_sha256") or hashlib.sha256(json.dumps(meta).encode()).hexdigest()
        self.cut_leaks = self.leak = False
        self.short = 0  # ids of a prompt below which it is scored apart; 0: none is
        n = self.rows("train")
        if not n:
            raise DataError("no training row")
        sample = np.unique(np.linspace(0, n - 1, min(n, LEAK_ROWS), dtype=np.int64))
        share = sum(_leaks(*self._row("train", i)) for i in sample) / len(sample)
        if share > 0.01:
            self.leak, self.cut_leaks = allow_leak, not allow_leak
            done = "kept as --allow_leak says" if allow_leak else "cut in half, prefix -> continuation"
            say(f"warning: {share:.0%} of the rows show the encoder what the decoder must predict: {done}")
        longest = meta["max_seq_len"] or max_seq_len + 1  # meta.json spares the look at every row
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

    def about(self, split, index):
        """Return {labels, bytes, short}, (B,) each: ids and UTF-8 bytes of the answer, whether it is a short sum."""
        batch = self.batch(split, index)
        real, sizes = batch["labels"] >= 0, torch.from_numpy(self.tokenizer.token_bytes.astype(np.int64))
        octets = (sizes[batch["labels"].clamp_min(0)] * real).sum(1)
        found = dict(labels=real.sum(1), bytes=octets)
        return found | dict(short=batch["encoder_mask"].sum(1) < self.short) if self.short else found

    def write_beside(self, path, config):
        """Write config.yaml, meta.json and tokenizer.json for the checkpoint `path`."""
        write_beside(path, config, self.meta, self.tokenizer)

    def batch(self, split, index, number=None):
        """Return the dict of pad_batch for the rows `index` (B,); `number`, that of the batch, changes nothing here."""
        ids, places = self.splits[split]
        index = np.asarray(index, np.int64)
        found = np.asarray(places[index])
        begin = np.where(index > 0, np.asarray(places[np.maximum(index, 1) - 1, -1]), 0)
        own = found[:, -1] > found[:, 1]
        if self.cut_leaks or own.any():
            return self._plain(split, index)
        encoder_ids, encoder_mask = self._gather(ids, begin, found[:, 0], self.meta["pad_id"])
        labels, decoder_mask = self._gather(ids, found[:, 0], found[:, 1], self.meta["pad_id"])
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
        lengths = np.minimum(lengths, self.max_seq_len) if self.max_seq_len else lengths
        steps = np.arange(lengths.max())
        mask = steps < lengths[:, None]
        out = np.take(ids, begin[:, None] + steps, mode="clip").astype(np.int64)
        out[~mask] = fill
        return out, mask

    def _plain(self, split, index):
        rows = []
        for i in index.tolist():
            encoder_ids, inputs, labels = self._row(split, i)
            if self.cut_leaks and _leaks(encoder_ids, inputs, labels) and len(labels) > 1:
                half = len(labels) // 2
                encoder_ids, labels = encoder_ids[:half], labels[half - 1 :]
                inputs = np.concatenate([[self.meta["bos_id"]], labels[:-1]])
            rows.append((encoder_ids, inputs, labels))
        return pad_batch(rows, pad_id=self.meta["pad_id"], max_seq_len=self.max_seq_len)

    def _row(self, split, i):
        encoder_ids, labels, own = read_row(*self.splits[split], i)
        return encoder_ids, own if len(own) else np.concatenate([[self.meta["bos_id"]], labels[:-1]]), labels

    def _count_long(self, split):
        places, long = self.splits[split][1], 0
        for start in range(0, len(places), 2**16):
            block = np.asarray(places[max(0, start - 1) : start + 2**16])
            begins = np.concatenate([[0] if not start else [], block[:, -1]])[:-1]
            block = block[1:] if start else block
            long += int((np.maximum(block[:, 0] - begins, block[:, 1] - block[:, 0]) > self.max_seq_len).sum())
        return long
