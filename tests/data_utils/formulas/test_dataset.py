"""The stream of samples: y = f(X) by a plain loop, noise on y only, the same batches whoever makes them."""

import dataclasses
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from data_utils.errors import DataError, UsageError
from data_utils.formulas import holdout, skeletons
from data_utils.formulas.dataset import DataConfig, FlashANSRDataset
from data_utils.formulas.expressions import OPERATORS, SPECIAL, Alphabet
from data_utils.formulas.samples import points, uniform
from data_utils.formulas.skeletons import PoolConfig, check_pool
from tests.helpers import ROOT, slow

NEVER = dict(operators=("log",), operator_weights="", constant_probability=0.0, max_operators=1)
NEVER |= dict(support_prior="interval(constant(-3),constant(-2))")  # where log has no values
SMALL = dict(max_operators=5, holdout_pools=(), n_support_prior="log_int(8,40)")


def dataset(pool=None, data=None, **settings):
    pool = PoolConfig(**(SMALL | (pool or {})))
    settings = dict(seed=0, split="train", batch_size=4) | settings
    alphabet = settings.pop("alphabet", None) or check_pool(pool)
    return FlashANSRDataset(alphabet, pool, DataConfig(**(data or {})), **settings)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@np.errstate(all="ignore")
def value(prefix, constants, x):
    """Values of a prefix token list on points x (M, D), float32, read from the right."""
    stack, numbers = [], list(constants)[: prefix.count("<constant>")]
    for token in reversed(prefix):
        if token == "<constant>":
            stack.append(np.full(len(x), numbers.pop(), np.float32))
        elif token in OPERATORS:
            operands = [stack.pop() for _ in range(OPERATORS[token].arity)]
            stack.append(OPERATORS[token].function(*operands, np.empty(len(x), np.float32)))
        elif token.startswith("x"):
            stack.append(x[:, int(token[1:]) - 1])
        else:
            stack.append(np.full(len(x), {"0": 0, "1": 1, "(-1)": -1, "np.pi": np.pi, "np.e": np.e}[token], np.float32))
    assert len(stack) == 1
    return stack[0]


def test_y_is_f_of_x_and_sequences_are_the_formula():
    d = dataset(batch_size=64)
    alphabet, constants = d.alphabet, []
    for index in range(8):
        b = d.batch(index)
        B, M, D = b["x_tensors"].shape
        T = b["input_ids"].shape[1]
        assert (B, D) == (64, 3) and M in d.sizes and T % 8 == 0 and b["data_attn_mask"].all()
        assert b["y_tensors"].shape == (B, M, 1) and b["labels"].shape == (B, T - 1) and b["input_num"].any() == 0
        assert b["x_tensors"].dtype == b["y_tensors"].dtype == torch.float32 and not b["prompt_mask"].any()
        for i in range(B):
            prefix = alphabet.decode(b["skeletons"][i].tolist())
            x, y = b["x_tensors"][i].numpy(), b["y_clean"][i, :, 0].numpy()
            np.testing.assert_allclose(y, value(prefix, b["constants"][i].tolist(), x), rtol=1e-6, atol=1e-30)
            assert np.isfinite(y).all() and np.abs(y).max() <= 1e4 and np.ptp(y) >= 1e-4 * np.abs(y).max()
            for j in range(D):
                assert (f"x{j + 1}" in prefix) == bool(x[:, j].any())
            sequence = ["<bos>", "<expression>", *prefix, "</expression>", "<eos>"]
            assert alphabet.decode(b["input_ids"][i].tolist()) == sequence
            labels, ids = b["labels"][i].tolist(), b["input_ids"][i].tolist()
            n = len(prefix)
            assert labels == [-100, *ids[2 : n + 4], *[-100] * (T - n - 4)]
            constants += b["constants"][i][: prefix.count("<constant>")].tolist()
    assert len({*constants}) > 0.7 * len(constants) and min(constants) < -20 and max(constants) > 20


def test_noise_is_on_y_only():
    level = dict(noise_probability=0.5, noise_level="0.1")
    noisy, clean = (dataset(data=data, batch_size=64) for data in (level, dict(noise_probability=0)))
    pairs = [(noisy.batch(index), clean.batch(index)) for index in range(4)]
    for a, b in pairs:
        assert torch.equal(b["y_tensors"], b["y_clean"]) and not torch.equal(a["y_tensors"], b["y_tensors"])
        assert all(torch.equal(a[name], b[name]) for name in a if name != "y_tensors")
    ratios = []
    for a, b in pairs:
        noise = (a["y_tensors"] - b["y_clean"]).double()
        ratios.append(noise.std(1) / b["y_clean"].double().std(1, correction=0))
    ratio = torch.cat(ratios)[:, 0]
    changed = ratio > 0
    assert 0.4 < changed.float().mean() < 0.6 and 0.09 < ratio[changed].mean() < 0.11


def test_batches_depend_on_seed_split_and_index_only():
    d = dataset()
    batches = [d.batch(i) for i in range(6)]
    again = dataset()
    assert all(same(again.batch(i), batches[i]) for i in (5, 0, 3))
    assert not any(same(a, b) for a, b in zip(batches, batches[1:], strict=False))
    assert not same(dataset(seed=1).batch(0), batches[0]) and not same(dataset(split="val").batch(0), batches[0])
    stream = [*dataset(accumulation=2).iterate(0, 3)]
    assert all(same(a, b) for a, b in zip(stream, batches, strict=True))
    ranks = [[*dataset(rank=rank, world=2).iterate(0, 3)] for rank in (0, 1)]
    assert all(same(ranks[i % 2][i // 2], batches[i]) for i in range(6))
    assert same(next(dataset(accumulation=2).iterate(2, 1)), batches[4])


def test_workers_make_the_same_stream():
    """Across chunks, from the middle, twice, and left before the end."""
    start, steps = 250, 12
    expected = [*dataset().iterate(start, steps)]
    for workers in (1, 2):
        with dataset(num_workers=workers) as d:
            batches = [*d.iterate(start, steps)]
            assert not d.workers and len(batches) == steps
            assert all(same(a, b) for a, b in zip(batches, expected, strict=True))
    with dataset(num_workers=1) as d:
        for batch in d.iterate(start + 3, 100):
            assert same(batch, expected[3])
            break
        processes = [process for process, _ in d.workers]
    d.shutdown()
    d.shutdown()
    assert not any(process.is_alive() for process in processes)


def test_a_new_process_makes_the_same_batch():
    code = (
        "import hashlib; from data_utils.formulas.dataset import *; from data_utils.formulas.skeletons import *;"
        "p = PoolConfig(max_operators=5, holdout_pools=(), n_support_prior='log_int(8,40)');"
        "b = FlashANSRDataset(check_pool(p), p, DataConfig(), seed=0, split='train', batch_size=4).arrays(7);"
        "print(hashlib.sha256(b''.join(b[k].tobytes() for k in sorted(b))).hexdigest())"
    )
    output = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    b = dataset().arrays(7)
    assert output.strip() == hashlib.sha256(b"".join(b[k].tobytes() for k in sorted(b))).hexdigest()


SCRIPT = """
import sys, time
from data_utils.formulas.skeletons import PoolConfig, check_pool
from data_utils.formulas.dataset import DataConfig, FlashANSRDataset
if __name__ == "__main__":
    p = PoolConfig(max_operators=3, holdout_pools=())
    d = FlashANSRDataset(check_pool(p), p, DataConfig(), seed=0, split="train", batch_size=2, num_workers=2)
    for batch in d.iterate(0, 10**6):
        print(*(process.pid for process, _ in d.workers), flush=True)
        if sys.argv[1] == "exception":
            raise ValueError("on purpose")
        if sys.argv[1] == "exit":
            sys.exit(0)
        time.sleep(60)
"""


@pytest.mark.parametrize("way", [slow("exit"), slow("exception"), "SIGTERM"])
def test_no_child_outlives_the_parent(way, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, tmp_path / "script.py", way]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env)
    children = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(children) == 2
    if way.startswith("SIG"):
        parent.send_signal(getattr(signal, way))
    parent.wait(10)
    end = time.monotonic() + 2
    while any(alive(pid) for pid in children) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in children)
    parent.stdout.close()


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_what_goes_wrong_in_a_worker_is_said():
    with dataset(num_workers=1) as d:
        stream = d.iterate(0, 100)
        next(stream)
        d.workers[0][0].kill()
        with pytest.raises(DataError, match="died with status -9"):
            for _ in stream:
                pass
        assert not d.workers
    with dataset(NEVER, num_workers=1, batch_size=2) as d, pytest.raises(DataError, match="usable"):
        next(d.iterate(0, 1))


def subtrees(prefix):
    terms = set()
    for i in range(len(prefix)):
        end, missing = i, 1
        while missing:
            missing += (OPERATORS[prefix[end]].arity if prefix[end] in OPERATORS else 0) - 1
            end += 1
        terms.add(" ".join(prefix[i:end]))
    return terms


def test_prompts():
    d = dataset(data=dict(prompt_probability=0.7), batch_size=96, max_seq_len=160)
    b = d.batch(0)
    prompted, counts = 0, Counter()
    for i in range(96):
        tokens = d.alphabet.decode(b["input_ids"][i].tolist())
        prefix = tokens[tokens.index("<expression>") + 1 : -2]
        assert b["labels"][i, : tokens.index("<expression>")].eq(-100).all()
        assert b["labels"][i, tokens.index("<expression>")] == d.alphabet.ids[prefix[0]]
        mask, numbers = b["prompt_mask"][i].tolist(), b["input_num"][i, :, 0].tolist()
        if "<prompt>" not in tokens:
            assert not any(mask) and not any(numbers)
            continue
        prompted += 1
        end = tokens.index("</prompt>")
        assert tokens[1] == "<prompt>" and tokens[end + 1] == "<expression>"
        assert mask == [0 < j <= end for j in range(len(mask))]
        place = tokens.index("<float>")
        assert numbers == [len(prefix) if j == place else 0 for j in range(len(numbers))]
        text, present = " ".join(tokens[2:end]), subtrees(prefix)
        terms = {}
        for name in ("allowed_term", "include_term", "exclude_term"):
            terms[name] = [part.partition(f" </{name}>")[0] for part in text.split(f"<{name}> ")[1:]]
        actual = present & {*terms["allowed_term"]}
        assert actual and {*terms["include_term"]} <= actual
        assert not {*terms["exclude_term"]} & (present | {*terms["allowed_term"]})
        assert all(len(term.split()) <= max(1, 0.45 * len(prefix)) for term in actual)
        for name, listed in terms.items():
            assert len({*listed}) == len(listed)
            counts[name] += len(listed)
        counts["decoys"] += len({*terms["allowed_term"]} - present)
    assert 50 < prompted < 86 and min(counts.values()) > 20 and len(counts) == 4
    short = dataset(data=dict(prompt_probability=1), batch_size=32, max_seq_len=40)
    assert short.batch(0)["input_ids"].shape[1] <= 40
    assert short.skipped["with a prompt longer than max_seq_len"] > 0


def test_padding_repeats_intervals_and_limits():
    d = dataset(data=dict(padding="random"), batch_size=32)
    assert (d.batch(0)["x_tensors"].std(1) > 0).all()
    b = dataset(data=dict(n_per_equation=4), batch_size=64).batch(0)
    assert len(torch.unique(b["skeletons"], dim=0)) < 32 and len(torch.unique(b["y_clean"][:, 0], dim=0)) > 55
    one = dict(independent_dimensions=False, support_prior="interval(uniform(-30,30),uniform(-30,30))", max_operators=7)
    x = dataset(one, dict(padding="zero"), batch_size=64).batch(0)["x_tensors"]
    two = (x != 0).any(1).sum(1) > 1
    low, high = (x[two].amin(1), x[two].amax(1))
    used = (x[two] != 0).any(1)
    centre = ((low + high) / 2)[used]
    assert two.sum() > 5 and torch.corrcoef(torch.stack([centre[:-1], centre[1:]]))[0, 1] > 0.2
    some = dict(allow_nan=True, operators=("log", "+"), support_prior="interval(constant(-3),constant(3))")
    b = dataset(some, batch_size=64).batch(0)
    assert b["y_clean"].isnan().any()
    assert dataset(dict(n_support_prior="512"), batch_size=2).batch(0)["x_tensors"].shape == (2, 512, 3)


def test_supports_give_the_points_they_say():
    rng = np.random.default_rng(0)
    supports = np.array([[2, 5, 0], [0.01, 1, 1], [0.01, 1, -1], [0.01, 1, 2], [-4, -4, 0]], float)
    x = points(rng, supports, 4000)
    assert x.dtype == np.float32 and (x[0] >= 2).all() and (x[0] <= 5).all() and abs(x[0].mean() - 3.5) < 0.05
    assert (x[1] > 0).all() and (x[2] < 0).all() and 0.45 < (x[3] > 0).mean() < 0.55 and (x[4] == -4).all()
    size = np.log10(np.abs(x[1:4]))
    assert size.min() > -2.001 and size.max() < 0.001 and np.abs(size.mean(1) + 1).max() < 0.05
    u = uniform(rng, (3, 5001))
    assert u.dtype == np.float32 and u.min() >= 0 and u.max() < 1 and abs(u.mean() - 0.5) < 0.01


def test_held_out_skeletons_never_come_and_saved_pools_do():
    pool = PoolConfig(**SMALL)
    alphabet = check_pool(pool)
    val = skeletons.draw_pool(200, alphabet, pool, None, seed=0, split=1)
    held = holdout.hold_out(pool, [alphabet.decode(row) for row in val.tokens])
    b = dataset(held=held, batch_size=128).batch(0)
    assert not held(b["skeletons"].numpy(), alphabet).any()
    b = dataset(saved=val, split="val", batch_size=64).batch(0)
    assert {bytes(row) for row in b["skeletons"].numpy()} <= {bytes(row) for row in val.tokens}


def test_what_a_user_gets_wrong():
    alphabet = Alphabet(OPERATORS, ["x1", "x2", "x3"], [token for token in SPECIAL if token != "<float>"])
    with pytest.raises(UsageError, match="<float>"):
        dataset(data=dict(prompt_probability=0.1), alphabet=alphabet)
    with pytest.raises(UsageError, match="lacks .*x3"):
        dataset(alphabet=Alphabet(OPERATORS, ["x1", "x2"]))
    for data, word in [(dict(noise_probability=2), "noise_probability"), (dict(noise_level="log(0,1)"), "column 1"),
                       (dict(n_per_equation=0), "n_per_equation"), (dict(term_length="x"), "column 1")]:  # fmt: skip
        with pytest.raises(UsageError, match=word):
            dataset(data=data)
    with pytest.raises(DataError, match="held out"):
        every = holdout.HoldOut([["x1"], ["sin", "x1"], ["sin", "sin", "x1"]])
        tiny = dict(
            operators=("sin",), operator_weights="", variables=("x1",), max_operators=2, constant_probability=0.0
        )
        dataset(tiny, held=every).batch(0)
    with pytest.raises(DataError, match="max_seq_len"):
        dataset(max_seq_len=4).batch(0)
    assert dataclasses.asdict(DataConfig())["padding"] == "zero"
