"""Arithmetic: every sum on one side, 12 + 7 held out, answers right, the same rows for the same seed."""

import pytest

from data_utils.errors import UsageError
from data_utils.reasoning.arithmetic import build_synthetic_dataset


def questions(rows, tokenizer):
    """Return [(a, sign, b)] of rows, each checked against Python's own arithmetic."""
    triples = []
    for encoder_ids, inputs, labels in rows:
        text = tokenizer.decode(encoder_ids)
        a, sign, b = text.removeprefix("What is ").removesuffix("?").split()
        assert text == f"What is {a} {sign} {b}?" and encoder_ids == tokenizer.encode(text)
        answer = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign]
        assert [tokenizer.bos_id, *labels[:-1]] == inputs and labels[-1] == tokenizer.eos_id
        assert tokenizer.decode(labels) == str(answer)
        triples.append((int(a), sign, int(b)))
    return triples


@pytest.mark.parametrize("seed", [1, 2])
def test_all_sums_are_split_as_documented(seed):
    train, val, tokenizer = build_synthetic_dataset(seed=seed)
    trained, held_out = questions(train, tokenizer), questions(val, tokenizer)
    assert len({*trained, *held_out}) == len(trained) + len(held_out) == 10_000
    assert len([p for p in trained if min(p[0], p[2]) > 9]) == 6480 and len(trained) == 8000
    assert all(min(p[0], p[2]) > 9 for p in held_out[:1620]) and all(min(p[0], p[2]) < 10 for p in held_out[1620:])
    assert (12, "+", 7) in held_out
    assert build_synthetic_dataset(seed=seed)[0] == train != build_synthetic_dataset(seed=seed + 2)[0]


def test_draws_have_no_question_on_both_sides():
    train, val, tokenizer = build_synthetic_dataset(digits=4, operators="+-*", samples=4000)
    trained, held_out = questions(train, tokenizer), questions(val, tokenizer)
    assert not {*trained} & {*held_out} and len({*trained}) == len(trained)
    assert 0.15 < len(held_out) / len(trained + held_out) < 0.25
    assert {sign for _, sign, _ in trained} == set("+-*")
    assert {len(str(a)) for a, _, _ in trained} == {1, 2, 3, 4}
    more = build_synthetic_dataset(digits=4, operators="+-*", samples=5000)
    assert not {*questions(more[0], tokenizer)} & {*held_out}  # a draw keeps its side


@pytest.mark.parametrize("options", [dict(digits=0), dict(operators="/"), dict(operators=""), dict(val_ratio=1.0),
                                     dict(digits=3), dict(operators="+-")])  # fmt: skip
def test_impossible_settings_are_refused(options):
    with pytest.raises(UsageError, match="--digits"):
        build_synthetic_dataset(**options)
