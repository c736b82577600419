"""What the processes of `prepare_data.py language` and of reading JSONL do: rows of text or lines of ids -> a part.

A part is what one task adds to the files of a prepared folder: bytes of <split>.bin and <split>.jsonl, lengths (n, 2)
of <split>.idx (ids of the encoder, labels; a third column where decoder inputs of their own follow), and counts.
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
from data_utils.reasoning import sources
from data_utils.tokenizer import load_tokenizer

PIECE_CHARACTERS = 1_000_000  # bounds what the tokenizer holds at once
SPLITS = ("train", "val")
QUESTIONS = (("prompt", "response"), ("question", "answer"), ("instruction", "output"))
CONVERSATIONS = (("messages", "role", "content"), ("conversations", "from", "value"))
ASSISTANTS = ("assistant", "gpt", "model")
COLUMNS = {"input", "language", "messages", "conversations", *(name for pair in QUESTIONS for name in pair)}

tokenizer_of = functools.cache(lambda path, digest: load_tokenizer(f"bpe:{path}"))  # one load a process and content


def id_type(vocab_size):
    return np.uint16 if vocab_size <= 65536 else np.uint32


def pack(rows, dtype, form, bos_id, counts=()):
    """Return the part of rows {split: [(encoder ids, labels) or (encoder ids, labels, decoder inputs or empty)]}."""
    part = dict(counts=Counter(counts))
    for split in SPLITS:
        mine = rows.get(split, [])
        lengths = np.array([[len(ids) for ids in row] for row in mine] or np.zeros((0, 2)), np.int64)
        part["counts"] |= {f"{split}_samples": len(mine), f"{split}_tokens": int(lengths[:, :2].sum())}
        if form != "jsonl":
            flat = np.concatenate([ids for row in mine for ids in row] or [np.zeros(0)])
            part |= {f"{split}.bin": flat.astype(dtype).tobytes(), f"{split}.idx": lengths}
        if form != "bin":
            part[f"{split}.jsonl"] = "".join(_line(bos_id, *row) for row in mine).encode()
    return part


def _line(bos_id, encoder_ids, labels, decoder=()):
    labels = labels.tolist()
    inputs = decoder.tolist() if len(decoder) else [bos_id, *labels[:-1]]
    row = dict(encoder_ids=encoder_ids.tolist(), decoder_input_ids=inputs, labels=labels)
    return json.dumps(row, separators=(",", ":")) + "\n"


# ---- text ------------------------------------------------------------------------------------------------------------


def texts_of(row, text_field):
    """Return (prompt, answer) pairs of a row of questions or a conversation, or the text of another row.

    Raises ValueError when there is none, or it is no string.
    """
    for turns, role, content in CONVERSATIONS:
        if isinstance(row.get(turns), list):
            said = [(turn.get(role), _string(turn, content)) for turn in row[turns] if isinstance(turn, dict)]
            asked = [(i, text) for i, (who, text) in enumerate(said) if who in ASSISTANTS]
            return [("\n".join(text for _, text in said[:i]), answer) for i, answer in asked]
    for question, answer in QUESTIONS:
        if question in row and answer in row:
            more = [_string(row, "input")] if question == "instruction" and row.get("input") else []
            return [("\n".join([_string(row, question), *more]), _string(row, answer))]
    field = next((name for name in text_field if name in row), None)
    if field is None:
        raise ValueError(f"no text: fields {', '.join(map(str, row)) or '(none)'}; name one with --text-field")
    return _string(row, field)


def _string(row, name):
    if not isinstance(row.get(name), str):
        raise ValueError(f"{name} is {type(row.get(name)).__name__}, expected a string")
    return row[name]


def read_texts(task, counts, *, text_field, lang, collapse_whitespace, skip_bad_lines):
    """Yield texts_of each row of a task, cleaned as asked; what is dropped goes into counts.

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

    for place, row in sources.rows(task, COLUMNS | set(text_field)):
        try:
            if isinstance(row, ValueError):
                raise row
            if lang and row.get("language") != lang:
                counts["other_language"] += 1
                continue
            found = texts_of(row, text_field)
        except ValueError as e:
            if not skip_bad_lines:
                raise DataError(f"{sources.where(task, place)}: {e}\ntry: mend it, or --skip-bad-lines") from None
            counts["bad_rows"] += 1
            continue
        if not (found if isinstance(found, list) else found.strip()):
            counts["empty_rows"] += 1
        elif isinstance(found, str):
            yield clean(found)
        else:
            yield [(clean(prompt), clean(answer)) for prompt, answer in found]


def encode_task(task, *, tokenizer, digest, max_seq_len, prefix_ratio, val_ratio, seed, batch, form, reading):
    """Return the part of one task; counts["lowest"] is the smallest --val-ratio that would hold a document out."""
    loaded, counts, lowest = tokenizer_of(tokenizer, digest), Counter(), 1.0
    bos, eos = np.array([loaded.bos_id]), np.array([loaded.eos_id])
    options = dict(bos=bos, eos=eos, size=max_seq_len)
    rows = dict(train=[], val=[])
    for group in _groups(read_texts(task, counts, **reading), batch):
        flat = [text for document in group for text in _flat(document)]
        encoded = iter(_encode(loaded, flat))
        for document in group:
            texts = _flat(document)
            counts["documents"] += 1
            hashed = hashlib.sha256("\n".join([str(seed), *texts]).encode()).digest()
            fraction = int.from_bytes(hashed[:8]) / 2**64
            lowest = min(lowest, fraction)
            mine = rows["val" if fraction < val_ratio else "train"]
            ids = [next(encoded) for _ in texts]
            counts["text_bytes"] += sum(len(text.encode("utf-8")) for text in texts)
            counts["text_tokens"] += sum(map(len, ids))
            if isinstance(document, str):
                mine += _chunks(ids[0], prefix_ratio, **options)
                continue
            counts["pairs"] += len(document)
            mine += [_pair(*pair, counts, **options) for pair in zip(ids[::2], ids[1::2], strict=True)]
    part = pack(rows, id_type(loaded.vocab_size), form, loaded.bos_id, counts)
    part["counts"]["lowest"] = lowest
    return part


def _flat(document):
    return [document] if isinstance(document, str) else [text for pair in document for text in pair]


def _groups(documents, most):
    """Yield lists of at most `most` documents, shorter where they are long."""
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
    """Return the ids of each text, (n,) arrays; long texts in pieces."""
    pieces = [list(cut(text, PIECE_CHARACTERS)) for text in texts]
    found = iter(tokenizer.encode_arrays([piece for text in pieces for piece in text]))
    return [np.concatenate([next(found) for _ in text]) for text in pieces]


def _chunks(ids, prefix_ratio, *, bos, eos, size):
    """Yield (prompt, rest) of at most size - 2 ids each; only the last rest of a document ends with eos."""
    for start in range(0, len(ids), size - 2):
        chunk = ids[start : start + size - 2]
        middle = int(prefix_ratio * len(chunk))
        end = eos[: start + size - 2 >= len(ids)]
        yield np.concatenate([bos, chunk[:middle]]), np.concatenate([chunk[middle:], end])


def _pair(prompt, answer, counts, *, bos, eos, size):
    """A prompt that is too long loses its beginning, an answer its end."""
    counts["prompts_cut"] += len(prompt) > size - 2
    counts["answers_cut"] += len(answer) > size - 1
    labels = np.concatenate([answer, eos])[:size]
    return np.concatenate([bos, prompt[max(0, len(prompt) - size + 2) :], eos]), labels


# ---- lines of ids ----------------------------------------------------------------------------------------------------

LIST = rb"\[(?!,|0[0-9])([0-9,]++)(?<!,)\]"
PLAIN = re.compile(rb'\{"encoder_ids": ?%b,"decoder_input_ids": ?%b,"labels": ?%b\}\r?\n?' % (LIST, LIST, LIST))
ODD = re.compile(rb",(?:,|0[0-9])")  # no JSON


def read_ids(task, *, vocab_size, bos_id, skip_bad_lines):
    """Return the part of a task of train.jsonl or val.jsonl, decoder inputs kept where they are not BOS and labels."""
    path, rows, counts = task[0], [], Counter()

    def parse(line):
        return _plain_ids(line, vocab_size, bos_id) or sources.parse_line(line)

    for place, line in sources.rows(task, parse=parse):
        try:
            if isinstance(line, ValueError):
                raise line
            rows.append(line if isinstance(line, tuple) else _ids(line, vocab_size, bos_id))
        except ValueError as e:
            if not skip_bad_lines:
                raise DataError(f"{sources.where(task, place)}: {e}\ntry: mend the line, or --skip_bad_lines") from None
            counts["bad_rows"] += 1
    return pack({path.stem: rows}, id_type(vocab_size), "bin", bos_id, counts)


def _plain_ids(line, vocab_size, bos_id):
    """Return what _ids does, of a good line of bytes written as `language` or json.dump would; None of any other.

    Several times faster than by way of Python's integers.
    """
    found = PLAIN.fullmatch(line) or PLAIN.fullmatch(line.replace(b", ", b","))
    if not found:
        return None
    encoder_ids, decoder, labels = found.groups()
    both, shifted = encoder_ids + b"," + labels, labels.rpartition(b",")[0]
    if decoder != (b"%d,%b" % (bos_id, shifted) if shifted else b"%d" % bos_id) or ODD.search(both):
        return None
    ids, middle = np.fromstring(both, np.int64, sep=","), encoder_ids.count(b",") + 1
    return (ids[:middle], ids[middle:], ids[:0]) if ids.max() < vocab_size else None


def _ids(line, vocab_size, bos_id):
    row = []
    for name, other in (("encoder_ids", "input_ids"), ("labels", "targets"), ("decoder_input_ids", "")):
        found = line.get(name, line.get(other, []))
        ids = np.asarray(found if isinstance(found, list) else [found])
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
