"""Work of single processes: rows of text (`language`) or lines of ids (reading JSONL) -> a part.

A part is what one task adds to the files of a prepared folder: bytes of <split>.bin and <split>.jsonl, counts, and
the lengths of <split>.idx, (n, 2): ids of the encoder, labels; a third column for decoder inputs of their own.
Imports no torch: a process should start at once and stay small.
"""

import functools
import hashlib
import json
import re
from collections import Counter

import numpy as np

from data_utils.documents import cut
from data_utils.errors import DataError
from data_utils.reasoning import layouts, sources
from data_utils.tokenizer import load_tokenizer

PIECE_CHARACTERS = 1_000_000  # bounds the memory of the tokenizer
SPLITS = ("train", "val")
tokenizer_of = functools.cache(lambda path, digest: load_tokenizer(f"bpe:{path}"))  # one load per process and content


def id_type(vocab_size):
    """Return the numpy type of ids in binary files."""
    return np.uint16 if vocab_size <= 65536 else np.uint32


def pack(rows, dtype, form, bos_id, counts=()):
    """Return the part of {split: rows}; a row is (encoder ids, labels) or (encoder ids, labels, decoder inputs)."""
    part = dict(counts=Counter(counts))
    for split in SPLITS:
        side = rows.get(split, [])
        lengths = np.array([[len(ids) for ids in row] for row in side] or np.zeros((0, 2)), np.int64)
        part["counts"] |= {f"{split}_samples": len(side), f"{split}_tokens": int(lengths[:, :2].sum())}
        if form != "jsonl":
            flat = np.concatenate([ids for row in side for ids in row] or [np.zeros(0)])
            part |= {f"{split}.bin": flat.astype(dtype).tobytes(), f"{split}.idx": lengths}
        if form != "bin":
            part[f"{split}.jsonl"] = "".join(_line(bos_id, *row) for row in side).encode()
    return part


def _line(bos_id, encoder_ids, labels, decoder=()):
    labels = labels.tolist()
    inputs = decoder.tolist() if len(decoder) else [bos_id, *labels[:-1]]
    row = dict(encoder_ids=encoder_ids.tolist(), decoder_input_ids=inputs, labels=labels)
    return json.dumps(row, separators=(",", ":")) + "\n"


# ---- text ------------------------------------------------------------------------------------------------------------


def texts_of(row, text_field, counts):
    """Return [(prompt, answer), ...] of a row with questions or a conversation, else the text of the row.

    Returns None or [] if there is none, and counts the reason. Raises ValueError if it can't be read as text.
    """
    pairs = layouts.pairs_of(row, counts)
    if pairs is not None:
        return pairs
    present = [name for name in text_field if name in row]
    if not present:
        raise ValueError(f"no text: fields {', '.join(map(str, row)) or '(none)'}")
    name = next((name for name in present if not layouts.is_missing(row[name])), None)
    if name is None:
        counts["null_text"] += 1
        return None
    text = layouts.string_of(row[name], name)
    if not text.strip():
        counts["empty_rows"] += 1
        return None
    return text


def read_texts(task, counts, *, text_field, lang, collapse_whitespace, skip_bad_lines):
    """Yield the cleaned texts_of each row of a task, and count the rows that are dropped or changed in `counts`.

    Raises DataError("file:line: reason") at a bad row unless skip_bad_lines.
    """

    def clean(text):
        if collapse_whitespace:
            text = " ".join(text.split())
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            counts["surrogates_replaced"] += 1
            text = re.sub("[\ud800-\udfff]", "\ufffd", text)
        return text

    fine = False  # whether a row before was read
    for place, row in sources.rows(task, layouts.COLUMNS | {"language"} | set(text_field)):
        try:
            if isinstance(row, ValueError):
                raise row
            if lang and row.get("language") != lang:
                counts["other_language"] += 1
                continue
            texts = texts_of(row, text_field, counts)
        except ValueError as e:
            if not skip_bad_lines:
                advice = "try: --skip-bad-lines --fresh"
                if "UTF-8" in str(e):
                    e = f"{e}; iconv -f CP1252 -t UTF-8 converts a file from Windows"
                if str(e).startswith("no text") and not fine:
                    advice = layouts.advice(task[0], row)
                raise DataError(f"{sources.where(task, place)}: {e}\n{advice}") from None
            counts["bad_rows"] += 1
            counts[f"bad_rows, {str(e).partition(';')[0].partition(', expected')[0][:60]}"] += 1
            continue
        fine = True
        if isinstance(texts, str):
            yield clean(texts)
        elif texts:
            yield [(clean(prompt), clean(answer)) for prompt, answer in texts]


def encode_task(task, *, tokenizer, digest, max_seq_len, prefix_ratio, val_ratio, seed, batch, form, reading):
    """Return the part of one task; counts["lowest"] is the smallest --val_ratio that would hold out a document."""
    loaded = tokenizer_of(tokenizer, digest)
    options = dict(bos=np.array([loaded.bos_id]), eos=np.array([loaded.eos_id]), size=max_seq_len)
    counts = Counter()
    lowest = 1.0
    rows = dict(train=[], val=[])
    for group in _groups(read_texts(task, counts, **reading), batch):
        encoded = iter(_encode(loaded, [text for document in group for text in _flat(document)]))
        for document in group:
            texts = _flat(document)
            counts["documents"] += 1
            digest = hashlib.sha256("\n".join([str(seed), *texts]).encode()).digest()
            fraction = int.from_bytes(digest[:8]) / 2**64
            lowest = min(lowest, fraction)
            side = rows["val" if fraction < val_ratio else "train"]
            ids = [next(encoded) for _ in texts]
            counts["text_bytes"] += sum(len(text.encode("utf-8")) for text in texts)
            counts["text_tokens"] += sum(map(len, ids))
            if isinstance(document, str):
                side += _chunks(ids[0], prefix_ratio, **options)
            else:
                counts["pairs"] += len(document)
                side += [_pair(*pair, counts, **options) for pair in zip(ids[::2], ids[1::2], strict=True)]
    part = pack(rows, id_type(loaded.vocab_size), form, loaded.bos_id, counts)
    part["counts"]["lowest"] = lowest
    return part


def _flat(document):
    """Return the texts of a document: itself, or prompts and answers in turn."""
    return [document] if isinstance(document, str) else [text for pair in document for text in pair]


def _groups(documents, most):
    """Yield lists of at most `most` documents, fewer if they are long."""
    group, characters = [], 0
    for document in documents:
        group.append(document)
        characters += sum(map(len, _flat(document)))
        if len(group) == most or characters > PIECE_CHARACTERS:
            yield group
            group, characters = [], 0
    if group:
        yield group


def _encode(tokenizer, texts):
    """Return the ids of each text, (n,) arrays; long texts are encoded in pieces."""
    pieces = [list(cut(text, PIECE_CHARACTERS)) for text in texts]
    encoded = iter(tokenizer.encode_arrays([piece for text in pieces for piece in text]))
    return [np.concatenate([next(encoded) for _ in text]) for text in pieces]


def _chunks(ids, prefix_ratio, *, bos, eos, size):
    """Yield (bos and the first share, the rest) of each chunk of at most size - 2 ids; eos ends the document."""
    for start in range(0, len(ids), size - 2):
        chunk = ids[start : start + size - 2]
        middle = int(prefix_ratio * len(chunk))
        end = eos[: start + size - 2 >= len(ids)]
        yield np.concatenate([bos, chunk[:middle]]), np.concatenate([chunk[middle:], end])


def _pair(prompt, answer, counts, *, bos, eos, size):
    """Return (prompt ids, labels) of at most `size` ids each: a long prompt loses its beginning, an answer its end."""
    counts["prompts_cut"] += len(prompt) > size - 2
    counts["answers_cut"] += len(answer) > size - 1
    labels = np.concatenate([answer, eos])[:size]
    return np.concatenate([bos, prompt[max(0, len(prompt) - size + 2) :], eos]), labels


# ---- lines of ids ----------------------------------------------------------------------------------------------------

LIST = rb"\[(?!,|0[0-9])([0-9,]++)(?<!,)\]"
PLAIN = re.compile(rb'\{"encoder_ids": ?%b,"decoder_input_ids": ?%b,"labels": ?%b\}\r?\n?' % (LIST, LIST, LIST))
ODD = re.compile(rb",(?:,|0[0-9])")  # not JSON


def read_ids(task, *, vocab_size, bos_id, skip_bad_lines):
    """Return the part of a task of train.jsonl or val.jsonl, with decoder inputs if they are no shifted labels."""
    path = task[0]
    rows = []
    counts = Counter()

    def parse(line):
        return _plain_ids(line, vocab_size, bos_id) or sources.parse_line(line)

    for place, line in sources.rows(task, parse=parse):
        try:
            if isinstance(line, ValueError):
                raise line
            rows.append(line if isinstance(line, tuple) else _ids(line, vocab_size, bos_id))
        except ValueError as e:
            if not skip_bad_lines:
                raise DataError(f"{sources.where(task, place)}: {e}\ntry: --skip_bad_lines") from None
            counts["bad_rows"] += 1
    return pack({path.stem: rows}, id_type(vocab_size), "bin", bos_id, counts)


def _plain_ids(line, vocab_size, bos_id):
    """Return the same as _ids for a valid line in the format of `language` or json.dump, None for any other line.

    Several times faster than parsing JSON into Python's integers.
    """
    match = PLAIN.fullmatch(line) or PLAIN.fullmatch(line.replace(b", ", b","))
    if not match:
        return None
    encoder_ids, decoder, labels = match.groups()
    both = encoder_ids + b"," + labels
    shifted = labels.rpartition(b",")[0]
    standard = b"%d,%b" % (bos_id, shifted) if shifted else b"%d" % bos_id
    if decoder != standard or ODD.search(both):
        return None
    ids = np.fromstring(both, np.int64, sep=",")
    middle = encoder_ids.count(b",") + 1
    return (ids[:middle], ids[middle:], ids[:0]) if ids.max() < vocab_size else None


def _ids(line, vocab_size, bos_id):
    """Return (encoder ids, labels, decoder inputs or empty if standard) of a JSON object. Raises ValueError."""
    row = []
    for name, other in (("encoder_ids", "input_ids"), ("labels", "targets"), ("decoder_input_ids", "")):
        value = line.get(name, line.get(other, []))
        ids = np.asarray(value if isinstance(value, list) else [value])
        if len(ids) and (ids.dtype.kind not in "iu" or ids.ndim > 1):
            raise ValueError(f"{name}: expected integers in [0, {vocab_size})")
        if len(ids) and (ids.min() < 0 or ids.max() >= vocab_size):
            raise ValueError(f"{name}: id {ids[(ids < 0) | (ids >= vocab_size)][0]} is not in [0, {vocab_size})")
        if not len(ids) and name != "decoder_input_ids":
            raise ValueError(f"no {name if name in line or other not in line else other}")
        row.append(ids)
    encoder_ids, labels, decoder = row
    if len(decoder) and len(decoder) != len(labels):
        raise ValueError(f"{len(decoder)} decoder_input_ids, {len(labels)} labels")
    standard = len(decoder) and decoder[0] == bos_id and (decoder[1:] == labels[:-1]).all()
    return encoder_ids, labels, decoder[:0] if standard else decoder
