"""Arithmetic questions with their answers: "What is 12 + 7?" -> "19"."""

import hashlib

import numpy as np

from data_utils.errors import UsageError
from data_utils.tokenizer import SimpleTokenizer

SIGNS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}


def build_synthetic_dataset(*, digits=2, operators="+", val_ratio=0.2, seed=1, samples=0):
    """Return (train rows, validation rows, their tokenizer); a row is (encoder_ids, decoder_input_ids, labels).

    Sums of up to two digits are complete: all pairs. Of those with two two-digit operands a share val_ratio is held
    out, and of those with a one-digit operand too; the latter come last, 12 + 7 among them. Other questions are
    `samples` draws without repeats, held out by a hash of the question. Raises UsageError.
    """
    if digits < 1 or not operators or set(operators) - set(SIGNS) or not 0 < val_ratio < 1:
        raise UsageError(
            f"--digits {digits} --operators {operators} --val_ratio {val_ratio}: expected 1 or more, of +-*, 0 to 1"
        )
    if digits <= 2 and operators == "+" and not samples:
        train, val = _all_sums(10**digits, val_ratio, np.random.default_rng(seed))
    elif samples > 0:
        train, val = _draws(digits, operators, val_ratio, seed, samples)
    else:
        raise UsageError(f"--digits {digits} --operators {operators}: too many for all of them\ntry: --samples 10000")
    tokenizer = SimpleTokenizer()
    return [_row(tokenizer, *pair) for pair in train], [_row(tokenizer, *pair) for pair in val], tokenizer


def _all_sums(end, val_ratio, rng):
    """Return train and validation questions [(a, "+", b)] of all sums of two numbers below `end`."""
    a, b = (x.reshape(-1) for x in np.mgrid[:end, :end])
    train, val = [], []
    for mask in ((a > 9) & (b > 9), (a < 10) | (b < 10)):
        group = [(x, "+", y) for x, y in zip(a[mask].tolist(), b[mask].tolist(), strict=True)]
        group = [group[i] for i in rng.permutation(len(group))]
        held_out = round(val_ratio * len(group))
        if (12, "+", 7) in group[held_out:]:  # the guide asks this question of a trained model
            place = group.index((12, "+", 7))
            group[0], group[place] = group[place], group[0]
        val += group[:held_out]
        train += group[held_out:]
    return train, val


def _draws(digits, operators, val_ratio, seed, samples):
    """Return train and validation questions [(a, sign, b)] of random draws."""
    rng = np.random.default_rng(seed)
    ends = 10 ** rng.integers(1, digits + 1, (samples, 2))  # every length equally often
    a, b = (rng.random((samples, 2)) * ends).astype(np.int64).T.tolist()
    signs = [operators[i] for i in rng.integers(0, len(operators), samples)]
    train, val = [], []
    for pair in dict.fromkeys(zip(a, signs, b, strict=True)):
        digest = hashlib.sha256("{} {} {} {}".format(seed, *pair).encode()).digest()
        side = val if int.from_bytes(digest[:8]) < val_ratio * 2**64 else train
        side.append(pair)
    return train, val


def _row(tokenizer, a, sign, b):
    answer = tokenizer.encode(str(SIGNS[sign](a, b)))
    return tokenizer.encode(f"What is {a} {sign} {b}?"), answer[:-1], answer[1:]
