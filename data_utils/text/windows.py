"""Domain folders of JSONL text as packed windows of tokens: <data_dir>/<domain>/*.jsonl, {"text": "..."} per line.

B windows, T tokens in a window. A file is tokenized once into <data_dir>/.cache; the split is by document and domain.
"""

import hashlib
import json
import tempfile
import time
import zipfile
from array import array
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import WeightedRandomSampler

from data_utils.documents import MALFORMED, cut, find_domains, format_problems, read_documents
from data_utils.errors import DataError, UsageError
from data_utils.files import write_atomic

PIECE_CHARACTERS = 1_000_000  # bounds what the tokenizer holds at once
MAX_WINDOWS = 2**24  # of torch.multinomial, which draws the order
SPLIT_KEY = b"42"  # of the text hashes, whose order is the split


def _digest(path):
    found = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(2**20):
                found.update(block)
    except OSError as e:
        raise DataError(f"{path}: {e.strerror}") from None
    return found.hexdigest()


def _writable(folders):
    """Return the first of the folders that takes files."""
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
            return folder
        except OSError as e:
            reason = e.strerror
    raise DataError(f"{folders[-1]}: no place for the token cache: {reason}")


def _tokenize(path, tokenizer, base, dtype, skip_bad_lines):
    """Write base.bin (tokens, eos after each document), then base.npz (what else is known): whole or absent."""
    offsets, hashes, problems, size = array("q", [0]), bytearray(), {}, [0]

    def pieces():
        for text in read_documents(path, problems, skip_bad_lines):
            content = text.encode("utf-8")
            hashes.extend(hashlib.blake2b(content, digest_size=16, key=SPLIT_KEY).digest())
            size[0] += len(content)
            *first, last = cut(text, PIECE_CHARACTERS)
            yield from ((piece, False) for piece in first)
            yield last, True

    def write(file):
        group, characters, position = [], 0, 0

        def flush():
            nonlocal position
            ids = []
            for row, (_, last) in zip(tokenizer.encode_batch([piece for piece, _ in group]), group, strict=True):
                ids += row
                if last:
                    ids.append(tokenizer.eos)
                    offsets.append(position + len(ids))
            position += len(ids)
            file.write(np.array(ids, dtype).tobytes())
            group.clear()

        for piece in pieces():
            group.append(piece)
            characters += len(piece[0])
            if characters >= 2 * PIECE_CHARACTERS:
                flush()
                characters = 0
        flush()

    write_atomic(f"{base}.bin", write)
    problems = {k: [n, [e[len(str(path)) :] for e in examples]] for k, (n, examples) in problems.items()}
    facts = dict(offsets=np.frombuffer(offsets, np.int64), hashes=np.frombuffer(hashes, np.uint64).reshape(-1, 2))
    facts |= dict(bytes=np.int64(size[0]), problems=np.array(json.dumps(problems)))
    write_atomic(f"{base}.npz", lambda file: np.savez(file, **facts))


def _load(base, dtype):
    """Return (tokens (N,), offsets (documents + 1,), hashes (documents, 2), bytes, problems), None if not whole."""
    try:
        with np.load(f"{base}.npz") as facts:
            offsets, hashes = facts["offsets"], facts["hashes"]
            n_bytes, problems = int(facts["bytes"]), json.loads(str(facts["problems"]))
        empty = offsets[-1] == 0  # which memmap refuses
        tokens = np.zeros(0, dtype) if empty else np.memmap(f"{base}.bin", dtype, "r")
        return (tokens, offsets, hashes, n_bytes, problems) if len(tokens) == offsets[-1] else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


class _Stream:
    """Slices [(part, begins, ends)] read as one sequence with an eos before it, so that every token is a target.

    A part is what `_load` returns for a file.
    """

    def __init__(self, slices, window):
        self.parts = [part for part, _, _ in slices]
        self.source = np.repeat(np.arange(len(slices)), [len(begins) for _, begins, _ in slices])
        self.begins = np.concatenate([begins for _, begins, _ in slices])
        self.ends = np.concatenate([ends for _, _, ends in slices])
        self.starts = np.cumsum([0, *(self.ends - self.begins)])  # of the slices, in the sequence
        self.tokens = int(self.starts[-1])
        self.windows = -(-self.tokens // window)

    def _pieces(self, start, n):
        """Yield (how many tokens came before, part, first, last) for the n tokens from `start` on, slice by slice."""
        done, piece = 0, int(np.searchsorted(self.starts, start, side="right")) - 1
        while done < n and piece < len(self.begins):
            first = int(self.begins[piece]) + start + done - int(self.starts[piece])
            last = min(int(self.ends[piece]), first + n - done)
            yield done, self.parts[self.source[piece]], first, last
            done, piece = done + last - first, piece + 1

    def copy(self, start, out):
        """Fill `out` with the tokens from `start` on; returns how many there were."""
        end = 0
        for done, part, first, last in self._pieces(start, len(out)):
            end = done + last - first
            out[done:end] = part[0][first:last]
        return end

    def documents(self, start, out):
        """Fill `out` with a number that stands for the text of each token's document."""
        for done, (_, offsets, hashes, *_), first, last in self._pieces(start, len(out)):
            which = np.searchsorted(offsets, np.arange(first, last), side="right") - 1
            out[done : done + last - first] = hashes[which, 0].astype(np.int64)


class DomainText:
    """Windows of the domain folders, numbered per split ("train", "val") over the domains in sorted order.

    `domains`: names in use, () for all; `window`: T; `cache_dir`: where the token cache goes when data_dir takes no
    files; rank 0 tokenizes, the others wait. `hash` names the data in use: contents, domains and val_split.
    Raises UsageError for val_split or a name that is a path, DataError for what the folders hold.
    """

    def __init__(
        self, data_dir, tokenizer, *, domains, val_split, window, cache_dir, skip_bad_lines=False, rank=0, say=print
    ):
        if not 0 < val_split <= 0.5:
            raise UsageError(f"--val_split {val_split}: choose above 0 up to 0.5; without val there would be no best")
        if window < 1:
            raise UsageError(f"window of {window} tokens: choose 1 or more")
        say = say if rank == 0 else lambda *words: None
        self.tokenizer, self.window, self.val_split = tokenizer, window, val_split
        self.dtype = np.uint16 if tokenizer.vocab_size <= 65536 else np.uint32
        self.domains, self.streams, self.rows, contents, problems = [], {"train": [], "val": []}, [], [], {}
        folders = [Path(data_dir, ".cache"), Path(cache_dir, ".cache")]
        for domain, files, named in self._chosen(data_dir, domains, say):
            digests = [_digest(path) for path in files]
            pairs = zip(files, digests, strict=True)
            parts = [self._tokens(path, digest, folders, skip_bad_lines, rank, say) for path, digest in pairs]
            for path, part in zip(files, parts, strict=True):
                _merge(problems, path, part[4], skip_bad_lines)
            if not sum(len(part[2]) for part in parts):
                if named:
                    raise DataError(f"domain {domain} in {data_dir} holds no document")
                say(f"warning: domain {domain} holds no document: left out")
                continue
            train, val = self._split(domain, parts, say)
            self.domains.append(domain)
            self.streams["train"].append(train)
            self.streams["val"].append(val)
            self.rows.append((domain, sum(len(p[2]) for p in parts), sum(p[3] for p in parts)))
            contents.append([domain, *digests])
        if problems:
            say(format_problems(problems))
        if not self.domains:
            raise DataError(f"no document in any domain of {data_dir}\ntry: python prepare_data.py check")
        self.hash = hashlib.sha256(json.dumps([val_split, contents]).encode("utf-8")).hexdigest()
        self.edges = {s: np.cumsum([0, *(stream.windows for stream in self.streams[s])]) for s in self.streams}
        if self.windows("train") > MAX_WINDOWS:
            raise DataError(f"{self.windows('train')} windows, the sampler takes {MAX_WINDOWS}: use a longer window")

    def _chosen(self, data_dir, domains, say):
        """Return [(domain, files, named by the user)]."""
        found = find_domains(data_dir, say)
        names = sorted({name for word in domains for name in word.split(",") if name})
        for name in names:
            if "/" in name or "\\" in name:
                raise UsageError(f"--domains {name}: a folder name of {data_dir}, not a path")
            if name not in found:
                raise DataError(f"no domain {name} in {data_dir}; there are: {', '.join(found)}")
        return [(name, found[name], bool(names)) for name in names or found]

    def _tokens(self, path, digest, folders, skip_bad_lines, rank, say):
        name, started = f"{digest}-{self.tokenizer.hash}", time.monotonic()
        while True:
            for folder in folders:
                if (found := _load(folder / name, self.dtype)) is not None:
                    return found
            if rank == 0:
                say(f"tokenizing {path} with {self.tokenizer.name}, once")
                _tokenize(path, self.tokenizer, _writable(folders) / name, self.dtype, skip_bad_lines)
            elif time.monotonic() - started > 3600:
                raise DataError(f"{path}: rank 0 did not tokenize it within an hour")
            else:
                time.sleep(0.1)

    def _split(self, domain, parts, say):
        """Return the train and val streams: the first share of the distinct text hashes, in their order, is val."""
        distinct, place = np.unique(np.concatenate([p[2] for p in parts]), axis=0, return_inverse=True)
        if len(distinct) == 1:
            part = next(p for p in parts if len(p[2]))
            n = int(part[1][1])
            start = n - max(1, int(self.val_split * n))
            if start - self.window < 1:
                needed = max(self.window + 2, int(np.ceil((self.window + 1) / (1 - self.val_split))))
                raise DataError(f"domain {domain}: one document of {n} tokens, needed for train and val: {needed}")
            say(f"warning: domain {domain} is one document: its end is val, {self.window} tokens between are left out")
            halves = ([0], [start - self.window]), ([start], [n])
            return [_Stream([(part, np.array(begin), np.array(end))], self.window) for begin, end in halves]
        is_val = place.reshape(-1) < max(1, round(self.val_split * len(distinct)))
        slices = [], []
        for part in parts:
            offsets = part[1]
            mine, is_val = is_val[: len(offsets) - 1], is_val[len(offsets) - 1 :]
            for side, mask in zip(slices, (~mine, mine), strict=True):
                edges = np.flatnonzero(np.diff(np.concatenate([[0], mask, [0]])))  # neighbours become one slice
                side.append((part, offsets[edges[0::2]], offsets[edges[1::2]]))
        return [_Stream(side, self.window) for side in slices]

    def windows(self, split):
        """Return the number of windows."""
        return int(self.edges[split][-1])

    def tokens(self, split):
        """Return the number of targets that count in one pass over all windows."""
        streams = self.streams[split]
        if split == "val":
            return sum(stream.tokens for stream in streams)
        return sum(max(s.windows - 1, 0) * self.window + min(s.tokens, self.window) for s in streams)

    def describe(self):
        """Return a table: documents, megabytes of text, tokens of train and val per domain."""
        lines = [f"{'domain':<16} {'documents':>10} {'MB':>8} {'train tokens':>13} {'val tokens':>11}"]
        for (domain, documents, size), train, val in zip(self.rows, *self.streams.values(), strict=True):
            lines.append(f"{domain:<16} {documents:>10} {size / 1e6:>8.2f} {train.tokens:>13} {val.tokens:>11}")
        return "\n".join(lines)

    def order(self, seed, epoch, n):
        """Return n window numbers of "train", (n,) int64, drawn with replacement, each domain equally often."""
        state = np.random.SeedSequence((seed, epoch)).generate_state(2, np.uint32)
        generator = torch.Generator().manual_seed(int(state[0]) << 31 | int(state[1]) >> 1)
        counts = np.diff(self.edges["train"])
        weights = np.repeat(1.0 / (len(counts) * counts), counts)
        return np.array(list(WeightedRandomSampler(torch.from_numpy(weights), n, generator=generator)), np.int64)

    def domain(self, split, index):
        """Return the domain number of each window of `index` (B,) -> (B,) int64."""
        found = np.searchsorted(self.edges[split], np.asarray(index), side="right") - 1
        return torch.from_numpy(found.astype(np.int64))

    def _places(self, split, index):
        """Yield (stream, where the window begins, where it is read from) for each window."""
        for number, domain in zip(index, self.domain(split, index).tolist(), strict=True):
            stream = self.streams[split][domain]
            wanted = int(number - self.edges[split][domain]) * self.window
            yield stream, wanted, max(0, min(wanted, stream.tokens - self.window))  # the last is shifted to be full

    def documents(self, split, index):
        """Return (B, T) int64: the document of each target of the windows `index` (B,), the same for the same text."""
        found = np.zeros((len(index), self.window), np.int64)
        for row, (stream, _, start) in zip(found, self._places(split, index), strict=True):
            stream.documents(start, row)
        return torch.from_numpy(found)

    def batch(self, split, index):
        """Return x, y (B, T) int64 of the windows `index` (B,); y is -100 where padded or, in val, counted before."""
        size, index = self.window, np.asarray(index)
        rows = np.full((len(index), size + 1), self.tokenizer.eos, np.int64)
        y = np.full((len(index), size), -100, np.int64)
        for row, (stream, wanted, start) in enumerate(self._places(split, index)):
            before = 1 if start else 0
            end = 1 + stream.copy(start - before, rows[row, 1 - before :]) - before
            first = wanted - start if split == "val" else 0
            y[row, first : end - 1] = rows[row, 1 + first : end]
        return torch.from_numpy(rows[:, :-1].copy()), torch.from_numpy(y)


def _merge(problems, path, found, skip_bad_lines):
    """Add what was found in one file; a malformed line of a cache made with skip_bad_lines still stops without it."""
    for kind, (count, examples) in found.items():
        if kind in MALFORMED and not skip_bad_lines:
            raise DataError(f"{path}{examples[0]}\ntry: mend the line, or --skip_bad_lines")
        entry = problems.setdefault(kind, [0, []])
        entry[0] += count
        entry[1] += [f"{path}{example}" for example in examples][: 5 - len(entry[1])]
