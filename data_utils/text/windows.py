"""Domain folders of text (data_utils/documents.py) as packed windows of tokens.

B windows, T tokens per window. Each file is tokenized once, into <data_dir>/.cache. The split is by document, within
each domain.
"""

import functools
import hashlib
import json
import shlex
import tempfile
import time
import zipfile
from array import array
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import WeightedRandomSampler

from data_utils.documents import (
    MALFORMED,
    WHOLE,
    cut,
    find_domains,
    format_ignored,
    format_problems,
    read_documents,
    suffix_of,
)
from data_utils.errors import DataError, UsageError
from data_utils.files import write_atomic

PIECE_CHARACTERS = 1_000_000  # bounds the memory of the tokenizer
MOST_NAMED = 3  # files of a domain that are tokenized under their names
MAX_WINDOWS = 2**24  # the limit of torch.multinomial, which draws the order
SPLIT_KEY = b"42"  # of the text hashes, whose order decides the split


def _digest(path, text_field):
    """Return a hash of the content of a file, and of how it is read unless that is "text" of .jsonl."""
    try:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as e:
        raise DataError(f"{path}: {e.strerror}") from None
    suffix = suffix_of(path)
    if suffix in WHOLE:
        suffix, text_field = WHOLE[0], ""
    if (suffix, text_field) == (".jsonl", "text"):
        return digest
    return hashlib.sha256(f"{digest} {suffix} {text_field}".encode()).hexdigest()


def _writable(folders):
    """Return the first of the folders that can be written."""
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
            return folder
        except OSError as e:
            reason = e.strerror
    raise DataError(f"{folders[-1]}: the token cache can't be written: {reason}")


def _tokenize(path, tokenizer, base, dtype, skip_bad_lines, text_field="text"):
    """Write base.bin (tokens, eos after each document), then base.npz (everything else), each atomically."""
    offsets = array("q", [0])  # where each document ends in the tokens
    hashes = bytearray()
    problems = {}
    n_bytes = 0

    def pieces():
        """Yield (piece of a document, whether it is the last one)."""
        nonlocal n_bytes
        for text in read_documents(path, problems, skip_bad_lines, text_field):
            content = text.encode("utf-8")
            hashes.extend(hashlib.blake2b(content, digest_size=16, key=SPLIT_KEY).digest())
            n_bytes += len(content)
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
    # Without the path: the same content elsewhere uses the same cache.
    problems = {kind: [n, [e[len(str(path)) :] for e in examples]] for kind, (n, examples) in problems.items()}
    arrays = {
        "offsets": np.frombuffer(offsets, np.int64),
        "hashes": np.frombuffer(hashes, np.uint64).reshape(-1, 2),
        "bytes": np.int64(n_bytes),
        "problems": np.array(json.dumps(problems)),
    }
    write_atomic(f"{base}.npz", lambda file: np.savez(file, **arrays))


class _Part(NamedTuple):
    """The cached tokens of one file."""

    tokens: np.ndarray  # (N,), eos after each document
    offsets: np.ndarray  # (documents + 1,): 0, then the end of each document
    hashes: np.ndarray  # (documents, 2) of the texts
    n_bytes: int  # of the texts
    problems: dict  # as read_documents counts them


def _load(base, dtype):
    """Return the _Part in the cache; None if it is missing or incomplete."""
    try:
        with np.load(f"{base}.npz") as arrays:
            offsets, hashes = arrays["offsets"], arrays["hashes"]
            n_bytes = int(arrays["bytes"])
            problems = json.loads(str(arrays["problems"]))
        empty = offsets[-1] == 0  # memmap refuses an empty file
        tokens = np.zeros(0, dtype) if empty else np.memmap(f"{base}.bin", dtype, "r")
        return _Part(tokens, offsets, hashes, n_bytes, problems) if len(tokens) == offsets[-1] else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


class _Stream:
    """Slices of files, read as one sequence of tokens with an eos before it, so that every token is a target.

    slices: [(part, begins, ends)] of each file, in tokens.
    """

    def __init__(self, slices, window):
        self.parts = [part for part, _, _ in slices]
        self.source = np.repeat(np.arange(len(slices)), [len(begins) for _, begins, _ in slices])
        self.begins = np.concatenate([begins for _, begins, _ in slices])
        self.ends = np.concatenate([ends for _, _, ends in slices])
        self.starts = np.cumsum([0, *(self.ends - self.begins)])  # where each slice starts in the sequence
        self.tokens = int(self.starts[-1])
        self.windows = -(-self.tokens // window)

    def _pieces(self, start, n):
        """Yield (tokens yielded before, part, first, last) for the n tokens from `start` on, slice by slice."""
        done = 0
        piece = int(np.searchsorted(self.starts, start, side="right")) - 1
        while done < n and piece < len(self.begins):
            first = int(self.begins[piece]) + start + done - int(self.starts[piece])
            last = min(int(self.ends[piece]), first + n - done)
            yield done, self.parts[self.source[piece]], first, last
            done += last - first
            piece += 1

    def copy(self, start, out):
        """Fill `out` with the tokens from `start` on; return how many there were."""
        end = 0
        for done, part, first, last in self._pieces(start, len(out)):
            end = done + last - first
            out[done:end] = part.tokens[first:last]
        return end

    def documents(self, start, out):
        """Fill `out` with the text hash of each token's document."""
        for done, part, first, last in self._pieces(start, len(out)):
            document = np.searchsorted(part.offsets, np.arange(first, last), side="right") - 1
            out[done : done + last - first] = part.hashes[document, 0].astype(np.int64)


class DomainText:
    """Windows of the domain folders, numbered per split ("train", "val") over the domains in sorted order.

    domains: names to use, () for all; window: T; cache_dir: where the token cache goes if data_dir can't be written.
    text_field: field or column of the text in .jsonl, .csv and .parquet files.
    Rank 0 tokenizes, the other ranks wait. `hash` identifies the data: contents, domains and val_split.
    Raises UsageError for val_split or a domain that is a path, DataError for the content of the folders.
    """

    def __init__(
        self,
        data_dir,
        tokenizer,
        *,
        domains,
        val_split,
        window,
        cache_dir,
        skip_bad_lines=False,
        text_field="text",
        rank=0,
        say=print,
    ):
        if not 0 < val_split <= 0.5:
            raise UsageError(f"--val_split {val_split}: choose above 0 up to 0.5; without val there would be no best")
        if window < 1:
            raise UsageError(f"window of {window} tokens: choose 1 or more")
        say = say if rank == 0 else lambda *words: None
        self.tokenizer = tokenizer
        self.window = window
        self.val_split = val_split
        self.text_field = text_field
        self.dtype = np.uint16 if tokenizer.vocab_size <= 65536 else np.uint32
        self.domains = []
        self.streams = {"train": [], "val": []}  # one stream per domain
        self.rows = []  # (domain, documents, bytes)
        contents, problems = [], {}
        folders = [Path(data_dir, ".cache"), Path(cache_dir, ".cache")]
        for domain, files, named in self._chosen(data_dir, domains, say):
            digests = [_digest(path, text_field) for path in files]
            parts = []
            announce = functools.cache(say)  # a folder of many files gets one line
            for path, digest in zip(files, digests, strict=True):
                place = path if len(files) <= MOST_NAMED else f"the {len(files)} files of {Path(data_dir, domain)}"
                part = self._part(path, digest, folders, skip_bad_lines, rank, announce, place)
                _merge(problems, path, part.problems, skip_bad_lines)
                parts.append(part)
            n_documents = sum(len(part.hashes) for part in parts)
            if not n_documents:
                if named:
                    raise DataError(f"domain {domain} in {data_dir} holds no document")
                say(f"warning: domain {domain} holds no document: left out")
                continue
            train, val = self._split(domain, parts, say)
            self.domains.append(domain)
            self.streams["train"].append(train)
            self.streams["val"].append(val)
            self.rows.append((domain, n_documents, sum(part.n_bytes for part in parts)))
            contents.append([domain, *digests])
        if problems:
            say(format_problems(problems))
        if not self.domains:
            command = f"python prepare_data.py check --data_dir {shlex.quote(str(data_dir))}"
            raise DataError(f"no document in any domain of {data_dir}\ntry: {command}")
        self.hash = hashlib.sha256(json.dumps([val_split, contents]).encode("utf-8")).hexdigest()
        self.edges = {s: np.cumsum([0, *(stream.windows for stream in self.streams[s])]) for s in self.streams}
        if self.windows("train") > MAX_WINDOWS:
            raise DataError(
                f"{self.windows('train')} windows, the sampler takes at most {MAX_WINDOWS}: use a longer window"
            )

    def _chosen(self, data_dir, domains, say):
        """Return [(domain, files, whether the user named it)]."""
        chosen, ignored = find_domains(data_dir, domains)
        if ignored:
            say(format_ignored(ignored))
        return [(name, files, any(words.strip(",") for words in domains)) for name, files in chosen.items()]

    def _part(self, path, digest, folders, skip_bad_lines, rank, announce, place):
        """Return the _Part of one file from the cache; rank 0 writes the cache if needed and announces the place."""
        name = f"{digest}-{self.tokenizer.hash}"
        started = time.monotonic()
        while True:
            for folder in folders:
                part = _load(folder / name, self.dtype)
                if part is not None:
                    return part
            if rank == 0:
                announce(f"tokenizing {place} with {self.tokenizer.name}, once")
                base = _writable(folders) / name
                _tokenize(path, self.tokenizer, base, self.dtype, skip_bad_lines, self.text_field)
            elif time.monotonic() - started > 3600:
                raise DataError(f"{path}: rank 0 did not tokenize it within an hour")
            else:
                time.sleep(0.1)

    def _split(self, domain, parts, say):
        """Return the train and val streams: the first val_split of the distinct text hashes, in their order, is val."""
        distinct, place = np.unique(np.concatenate([part.hashes for part in parts]), axis=0, return_inverse=True)
        if len(distinct) == 1:
            return self._split_one(domain, next(part for part in parts if len(part.hashes)), say)
        is_val = place.reshape(-1) < max(1, round(self.val_split * len(distinct)))
        train, val = [], []
        for part in parts:
            n_documents = len(part.hashes)
            in_val, is_val = is_val[:n_documents], is_val[n_documents:]
            for slices, mask in ((train, ~in_val), (val, in_val)):
                edges = np.flatnonzero(np.diff(np.concatenate([[0], mask, [0]])))  # neighbours become one slice
                slices.append((part, part.offsets[edges[0::2]], part.offsets[edges[1::2]]))
        return _Stream(train, self.window), _Stream(val, self.window)

    def _split_one(self, domain, part, say):
        """Split a domain of one document: its end is val, one window between the two is left out."""
        n = int(part.offsets[1])
        start = n - max(1, int(self.val_split * n))
        if start - self.window < 1:
            needed = max(self.window + 2, int(np.ceil((self.window + 1) / (1 - self.val_split))))
            raise DataError(
                f"domain {domain}: one document of {n} tokens, needed for train and val: {needed}\n"
                "fix: more text in it, or the other domains under --domains"
            )
        say(f"warning: domain {domain} is one document: its end is val, {self.window} tokens before it are left out")
        edges = (0, start - self.window), (start, n)
        return [_Stream([(part, np.array([begin]), np.array([end]))], self.window) for begin, end in edges]

    def windows(self, split):
        """Return the number of windows of a split."""
        return int(self.edges[split][-1])

    def describe(self):
        """Return a table with documents, megabytes of text, train and val tokens of each domain."""
        lines = [f"{'domain':<16} {'documents':>10} {'MB':>8} {'train tokens':>13} {'val tokens':>11}"]
        for (domain, documents, size), train, val in zip(self.rows, *self.streams.values(), strict=True):
            lines.append(f"{domain:<16} {documents:>10} {size / 1e6:>8.2f} {train.tokens:>13} {val.tokens:>11}")
        return "\n".join(lines)

    def order(self, seed, epoch, n):
        """Draw n window numbers of "train" with replacement, each domain equally often -> (n,) int64."""
        state = np.random.SeedSequence((seed, epoch)).generate_state(2, np.uint32)
        generator = torch.Generator().manual_seed(int(state[0]) << 31 | int(state[1]) >> 1)
        counts = np.diff(self.edges["train"])
        weights = np.repeat(1.0 / (len(counts) * counts), counts)
        return np.array(list(WeightedRandomSampler(torch.from_numpy(weights), n, generator=generator)), np.int64)

    def domain(self, split, index):
        """Return the domain number of each window of `index` (B,) -> (B,) int64."""
        domain = np.searchsorted(self.edges[split], np.asarray(index), side="right") - 1
        return torch.from_numpy(domain.astype(np.int64))

    def _places(self, split, index):
        """Yield (stream, where the window begins, where reading begins) for each window."""
        for number, domain in zip(index, self.domain(split, index).tolist(), strict=True):
            stream = self.streams[split][domain]
            wanted = int(number - self.edges[split][domain]) * self.window
            yield stream, wanted, max(0, min(wanted, stream.tokens - self.window))  # the last window reads from earlier

    def documents(self, split, index):
        """Return (B, T) int64: a number of the text that each target of the windows `index` (B,) belongs to."""
        numbers = np.zeros((len(index), self.window), np.int64)
        for row, (stream, _, start) in zip(numbers, self._places(split, index), strict=True):
            stream.documents(start, row)
        return torch.from_numpy(numbers)

    def batch(self, split, index):
        """Return x, y (B, T) int64 of the windows `index` (B,).

        y is -100 at padding, and in val at targets that belong to an earlier window.
        """
        size = self.window
        index = np.asarray(index)
        rows = np.full((len(index), size + 1), self.tokenizer.eos, np.int64)
        y = np.full((len(index), size), -100, np.int64)
        for row, (stream, wanted, start) in enumerate(self._places(split, index)):
            before = 1 if start else 0
            end = 1 + stream.copy(start - before, rows[row, 1 - before :]) - before
            first = wanted - start if split == "val" else 0
            y[row, first : end - 1] = rows[row, 1 + first : end]
        return torch.from_numpy(rows[:, :-1].copy()), torch.from_numpy(y)


def _merge(problems, path, in_file, skip_bad_lines):
    """Add the problems of one file to `problems`.

    Raises DataError for a malformed line unless skip_bad_lines: the cache may have been written with that flag.
    """
    for kind, (count, examples) in in_file.items():
        if kind in MALFORMED and not skip_bad_lines:
            raise DataError(f"{path}{examples[0]}\ntry: --skip_bad_lines")
        entry = problems.setdefault(kind, [0, []])
        entry[0] += count
        entry[1] += [f"{path}{example}" for example in examples][: 5 - len(entry[1])]
