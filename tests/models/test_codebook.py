"""The codebook against one-hot references, its revival, and two ranks against one."""

import json
import sys

import pytest
import torch
import torch.nn.functional as F

from benchmarks.speed import autoencoder as autoencoder_speed
from models.codebook import Codebook, decay_for, least, lloyd, nearest, revive_for, usage_and_perplexity
from tests.helpers import finish, launch

SIZES = dict(size=128, dim=8, beta=0.25, decay=0.9, revive=0.0, eps=1e-5)
RANKS = """
import os, sys, torch, torch.distributed as dist
from models.codebook import Codebook
folder, rank = sys.argv[1], int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
states = []
for given in torch.load(f"{folder}/given.pt", weights_only=True):
    torch.manual_seed(rank)
    codebook = Codebook(**given["sizes"])
    codebook.load_state_dict(given["state"])
    for z, mask in given["batches"]:
        half = slice(rank * len(z) // 2, (rank + 1) * len(z) // 2)
        codebook(z[half], mask[half])
    states.append(codebook.state_dict())
torch.save(states, f"{folder}/{rank}.pt")
dist.barrier()
os._exit(0)
"""


def build(**changes):
    torch.manual_seed(0)
    return Codebook(**SIZES | changes)


def normal(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def plain_step(codebook, vectors):
    """One step of the averages with a one-hot matrix in fp64 -> codes, counts, sums."""
    codes, counts, sums = (b.double() for b in (codebook.codes, codebook.counts, codebook.sums))
    index = torch.cdist(vectors.double(), codes).argmin(1)
    hot, d = F.one_hot(index, len(codes)).double(), codebook.decay
    counts = d * counts + (1 - d) * hot.sum(0)
    sums = d * sums + (1 - d) * hot.T @ vectors.double()
    return (sums / counts.clamp_min(codebook.eps)[:, None]).float(), counts.float(), sums.float()


@pytest.mark.parametrize("N", [0, 1, 5, 2048, 5000])
@pytest.mark.parametrize("size", [128, 100, 1])
def test_indices_are_those_of_cdist(N, size):
    vectors, codes = normal(N, 8), 1.5 * normal(size, 8, seed=2)
    index = nearest(vectors, codes)
    distance = torch.cdist(vectors.double(), codes.double())
    assert index.shape == (N,) and index.dtype == torch.long
    chosen = distance.gather(1, index[:, None]).squeeze(1)
    assert (chosen**2 - distance.min(1).values ** 2).abs().sum() <= 1e-6 * max(1, N)
    assert (index == distance.argmin(1)).sum() >= N - 1


def test_least_is_the_first_of_equals():
    for size in (256, 100):
        scores = torch.randint(9, (300, size), generator=torch.Generator().manual_seed(0)).float()
        assert torch.equal(least(scores), scores.argmin(1))


@pytest.mark.parametrize("with_mask", [False, True])
def test_output_and_gradient(with_mask):
    codebook, mask = build().eval(), torch.rand(3, 7, generator=torch.Generator().manual_seed(0)) < 0.6
    z, pull = normal(3, 7, 8), normal(3, 7, 8, seed=3)
    leaf = z.masked_fill(~mask[..., None], float("nan")) if with_mask else z.clone()  # padding must not matter
    real = (mask if with_mask else torch.ones_like(mask))[..., None]
    out, index, commit = codebook(leaf.requires_grad_(), mask if with_mask else None)
    q = codebook.codes[torch.cdist(z, codebook.codes).argmin(-1)]
    torch.testing.assert_close(out, q * real, rtol=0, atol=0)
    assert torch.equal(index >= 0, real[..., 0]) and torch.equal(q[real[..., 0]], codebook.codes[index[index >= 0]])
    expected = 0.25 * ((z - q).square() * real).sum() / (real.sum() * 8)
    torch.testing.assert_close(commit, expected)
    (out * pull).sum().add(3 * commit).backward()
    expected = (pull + 3 * 0.25 * 2 * (z - q) / (real.sum() * 8)) * real
    torch.testing.assert_close(leaf.grad, expected)


def test_it_learns_nothing_in_evaluation_and_keeps_the_type():
    codebook = build(revive=0.1).eval()
    before = {name: b.clone() for name, b in codebook.state_dict().items()}
    out, index, _ = codebook(normal(4, 8).bfloat16())
    assert out.dtype == torch.bfloat16 and torch.equal(codebook.assign(normal(4, 8).bfloat16()), index)
    assert all(torch.equal(b, codebook.state_dict()[name]) for name, b in before.items())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(codebook(normal(500, 8))[1], nearest(normal(500, 8), codebook.codes))


def test_a_step_is_that_of_one_hot_matrices():
    codebook = build()
    for seed in range(3):
        z = normal(40, 5, 8, seed=seed)
        mask = torch.rand(40, 5, generator=torch.Generator().manual_seed(seed)) < 0.5
        codes, counts, sums = plain_step(codebook, z[mask])
        codebook(z, mask)
        torch.testing.assert_close(codebook.counts, counts, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(codebook.sums, sums, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(codebook.codes, codes, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("revive", [0.0, 0.15])
def test_batches_without_vectors_or_with_broken_ones_change_nothing(revive):
    codebook = build(revive=revive)
    before = {name: b.clone() for name, b in codebook.state_dict().items()}
    z = normal(2, 3, 8).requires_grad_()
    out, index, commit = codebook(z, torch.zeros(2, 3, dtype=torch.bool))
    (out.sum() + commit).backward()
    assert not out.any() and (index == -1).all() and commit == 0 and not z.grad.any()
    codebook(normal(0, 8))
    for broken in (float("nan"), float("inf")):
        vectors = normal(50, 8)
        vectors[7, 3] = broken
        codebook(vectors)
    assert all(torch.equal(b, codebook.state_dict()[name]) for name, b in before.items())


def test_equal_vectors():
    codebook = build(revive=0.15)
    z = normal(1, 8).expand(60, 8)
    for _ in range(50):
        out, index, commit = codebook(z)
    assert all(b.isfinite().all() for b in codebook.state_dict().values())
    assert (index == index[0]).all() and commit < 1e-3 and (out - z).abs().max() < 0.1


def test_revived_codes_are_used_next_step():
    codebook = build(decay=0.5, revive=0.15)
    codebook.codes += 100  # far from every vector: one code takes them all
    codebook.sums.copy_(codebook.codes)
    vectors = normal(256, 8)
    used, revived = [], []
    for _ in range(12):
        used.append(len(codebook(vectors)[1].unique()))
        revived.append(codebook.revived.item())
    first = next(i for i, n in enumerate(revived) if n)
    assert used[first] < 5 and revived[first] > 100 and used[first + 1] > 80 and used[-1] > 110
    assert codebook.counts.min() > 0
    assert torch.allclose(codebook.counts.mean(), torch.tensor(2.0), rtol=0.2)


def test_nothing_is_revived_at_first_however_large_the_batch():
    codebook = build(decay=0.99, revive=0.025)
    codebook(normal(12_800, 8))
    assert codebook.revived == 0


def test_start():
    vectors, g = normal(2000, 8), torch.Generator()
    codebook = build()
    error = {}
    for kmeans in (False, True):
        codebook.start(vectors, kmeans, g.manual_seed(0))
        assert torch.equal(codebook.sums, codebook.codes) and (codebook.counts == 1).all()
        error[kmeans] = codebook.eval()(vectors)[2].item()
        again = build()
        again.start(vectors, kmeans, g.manual_seed(0))
        assert torch.equal(again.codes, codebook.codes)
    assert error[True] < 0.85 * error[False]
    assert usage_and_perplexity(torch.bincount(codebook.assign(vectors), minlength=128))[0] > 0.98
    codebook.start(vectors[:5], True, g)  # fewer than codes
    assert codebook.codes.isfinite().all()
    torch.testing.assert_close(codebook(vectors[:5])[0], vectors[:5], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="no vectors"):
        codebook.start(vectors[:0], False, g)


def test_lloyd_is_k_means():
    """Of four distant clusters k-means finds each mean, though two codes start in one cluster and one far away."""
    centres = torch.tensor([[0.0, 0.0], [0.0, 50.0], [50.0, 0.0], [50.0, 50.0]])
    vectors = (centres[:, None] + normal(4, 100, 2)).flatten(0, 1)
    codes = torch.cat([vectors[[0, 100, 200]], torch.full((1, 2), 1e4)])
    means = lloyd(vectors, codes, torch.Generator().manual_seed(1))
    distance = torch.cdist(vectors.view(4, 100, 2).mean(1), means)
    assert distance.min(1).values.max() < 1e-3


def test_rules_and_usage():
    assert [decay_for(n) for n in (0, 200, 400, 100_000)] == [0.8, 0.8, 0.9, 0.99]
    assert [revive_for(n) for n in (0, 200, 300, 100_000)] == [0.15, 0.15, 0.1, 0.025]
    assert usage_and_perplexity(torch.tensor([5, 5, 0, 0])) == pytest.approx((0.5, 2.0))
    assert usage_and_perplexity(torch.zeros(4)) == (0.0, 1.0)


def test_two_ranks(tmp_path):
    """Two ranks with half of every batch each equal one with the full batch, and revive the same codes."""
    one, far = build(), build()
    far.codes += 100
    far.sums.copy_(far.codes)
    cases = [dict(sizes=SIZES, batches=[]), dict(sizes=SIZES | dict(decay=0.5, revive=0.15), batches=[])]
    for case, codebook in zip(cases, (one, far), strict=True):
        case["state"] = {name: b.clone() for name, b in codebook.state_dict().items()}
    used = torch.zeros(128, dtype=torch.long)
    for seed in range(6):
        z, mask = normal(60, 5, 8, seed=seed), normal(60, 5, seed=seed + 100) > 0
        mask[:30] &= seed != 5  # the first rank has no vector in the last batch
        for case in cases:
            case["batches"].append((z, mask))
        used += torch.bincount(one(z, mask)[1][mask], minlength=128)
    torch.save(cases, tmp_path / "given.pt")
    for process in [launch([sys.executable, "-c", RANKS, str(tmp_path), str(rank)]) for rank in range(2)]:
        finish(process)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for state in (first[0], second[0]):
        for name in ("codes", "counts", "sums"):
            torch.testing.assert_close(state[name], one.state_dict()[name], rtol=0, atol=1e-5)
        assert torch.equal(state["counts"] > 0.9**6 + 1e-6, used > 0)
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])
    assert (first[1]["codes"].abs().max(1).values < 50).sum() > 100  # where the vectors are


def test_speed_runs_at_toy_size(tmp_path):
    out = tmp_path / "figures.json"
    autoencoder_speed.main(["--quick", "--threads", str(torch.get_num_threads()), "--out", str(out)])
    results = json.loads(out.read_text())
    assert set(results) == set(autoencoder_speed.ROWS)
    assert all(f["ours"] > 0 and f["baseline"] for row in results.values() for f in row["figures"])
