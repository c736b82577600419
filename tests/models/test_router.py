"""Invariants of the mixture of frozen experts and its memory."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data_utils.text.experts import load_store, save_store
from models.router import FAMILIES, NanoThink, static_mixture
from models.vector_store import VectorStore

V, C, T, B = 40, 16, 12, 3
SHARED = dict(vocab_size=V, d_model=C, max_seq_len=T, dropout=0.1)
ATTENTION = dict(n_heads=2, rope_base=10000.0)
EXPERTS = dict(
    transformer=SHARED | ATTENTION | dict(n_layers=2, ffn_mult=2),
    state_space=SHARED | dict(n_layers=1, d_state=4, d_inner=32, d_conv=4, dt_rank=2),
    diffuser=SHARED | ATTENTION | dict(
        n_layers=1, ffn_mult=2, encoder_layers=2, training_steps=10, inference_steps=4, objective="ce", ramp=4.0,
        schedule="linear", latent_layer=0, noise_scale=0.0, next_weight=0.2, next_share=0.5),
)  # fmt: skip


def make(store=False, kv_latent_dim=8, dropout=0.0, settled=True):
    """Build a model over random experts; settled: with a trained-like router and correction."""
    torch.manual_seed(0)
    experts = {name: FAMILIES[name](**args) for name, args in EXPERTS.items()}
    for expert in experts.values():
        for parameter in expert.parameters():
            torch.nn.init.normal_(parameter, parameter.mean().item(), 0.2)
    experts["diffuser"].start_from(experts["transformer"], torch.randint(V, (600,)))
    model = NanoThink(
        **SHARED | ATTENTION | dict(dropout=dropout), n_layers=2, ffn_mult=2, kv_latent_dim=kv_latent_dim, rope_dim=4,
        experts=EXPERTS, entropy_reg=0.01, balance_reg=0.01, z_reg=0.001,
    )  # fmt: skip
    model.start_from(experts)
    if settled:
        for linear in (model.router_out, model.router_recall, model.correct):
            torch.nn.init.normal_(linear.weight, std=0.3)
    if store:
        model.attach(fill(model))
    return model


def fill(model, n=300, **sizes):
    store = VectorStore(C, **dict(top_k=8, max_vectors=1000) | sizes)
    x = torch.randint(V, (n // T, T))
    store.add(model.keys(x).flatten(0, 1), torch.randint(V, (x.numel(),)), torch.arange(x.numel()) // T)
    store.build()
    return store


def tokens():
    x = torch.randint(V, (B, T + 1), generator=torch.Generator().manual_seed(1))
    return x[:, :-1], x[:, 1:].clone()


def hash_of(module):
    return [(name, tensor.clone()) for name, tensor in module.state_dict().items()]


COMBINATIONS = list(itertools.product((0, 8), (False, True), (False, True), (False, True)))


@pytest.mark.parametrize("kv_latent_dim, store, training, bf16", COMBINATIONS)
@torch.no_grad()
def test_the_future_moves_nothing(kv_latent_dim, store, training, bf16):
    model = make(store, kv_latent_dim).train(training)
    (x, _), k = tokens(), 7
    other = x.clone()
    other[:, k:] = (x[:, k:] + 1) % V
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        a, b = model(x), model(other)
    assert (a[:, :k] - b[:, :k]).abs().max() < (1e-2 if bf16 else 1e-5)
    assert (a[:, k:] - b[:, k:]).abs().max() > 1e-2


@pytest.mark.parametrize("kv_latent_dim, store", list(itertools.product((0, 8), (False, True))))
@torch.no_grad()
def test_cached_equals_full(kv_latent_dim, store):
    model = make(store, kv_latent_dim).eval()
    x, _ = tokens()
    full = model(x)
    for prompt in (1, 5):
        logits, state = model.step(x[:, :prompt], model.init_state(B))
        torch.testing.assert_close(logits, full[:, prompt - 1], rtol=0, atol=1e-4)
        for t in range(prompt, T):
            logits, state = model.step(x[:, t : t + 1], state)
            torch.testing.assert_close(logits, full[:, t], rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="do not fit"):
        model.step(x[:, :1], state)
    with pytest.raises(ValueError, match="max_seq_len"):
        model(torch.zeros(1, T + 1, dtype=torch.long))


@pytest.mark.parametrize("store", [False, True])
@torch.no_grad()
def test_loss_is_that_of_the_distribution(store):
    """The chunked loss against a naive mixture; probabilities sum to 1."""
    model = make(store).eval()
    x, y = tokens()
    y[0, :4] = -100
    log_p = model(x)
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(B, T), rtol=0, atol=1e-5)
    _, report = model(x, y)
    expected = F.cross_entropy(log_p.flatten(0, 1), y.flatten(), reduction="none").view(B, T)
    torch.testing.assert_close(report["nll"], expected, rtol=0, atol=1e-5)
    for name, expert in model.experts.items():
        nats = F.cross_entropy(expert(x).flatten(0, 1), y.flatten(), reduction="none").view(B, T)
        torch.testing.assert_close(report[name], nats, rtol=0, atol=1e-5)
    weights = torch.stack([report[f"weight_{name}"] for name in FAMILIES], -1)
    torch.testing.assert_close(weights.sum(-1), (y >= 0).float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_one_hot_router_is_that_expert(name):
    model = make(settled=False).eval()
    model.router_out.bias.copy_(100.0 * F.one_hot(torch.tensor(list(FAMILIES).index(name)), 3))
    x, _ = tokens()
    torch.testing.assert_close(model(x), model.experts[name](x).log_softmax(-1), rtol=0, atol=1e-5)


def test_static_mixture_is_the_best_and_the_start():
    model = make(settled=False).eval()
    x, y = tokens()
    with torch.no_grad():
        _, report = model(x, y)
        nats = torch.stack([report[name].flatten() for name in FAMILIES], 1)
        model.set_static(nats)
        _, report = model(x, y)
    best = min(report[name].mean() for name in FAMILIES)
    assert report["nll"].mean() <= best + 0.003
    torch.testing.assert_close(report["nll"], report["static"], rtol=0, atol=1e-5)
    grid = [torch.tensor([a, b, 100 - a - b]) / 100 for a in range(101) for b in range(101 - a)]
    losses = [-(w.log() - nats).logsumexp(1).mean().item() for w in grid]
    assert report["nll"].mean() <= min(losses) + 1e-3
    assert static_mixture(torch.tensor([[1.0, 5.0, 9.0]] * 4)).min() >= 0.99e-3


@pytest.mark.parametrize("kv_latent_dim, store", list(itertools.product((0, 8), (False, True))))
def test_gradients_and_frozen_experts(kv_latent_dim, store):
    model = make(store, kv_latent_dim, dropout=0.1, settled=False).train()
    assert not any(expert.training for expert in model.experts.modules())
    before = hash_of(model.experts)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert ("log_tau" in trained) == store and not any(name.startswith("experts.") for name in trained)
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    x, y = tokens()
    for _ in range(2):
        optimizer.zero_grad()
        loss, _ = model(x, y, documents=torch.zeros_like(x))
        loss.backward()
        grads = {name: p.grad for name, p in trained.items()}
        optimizer.step()
    assert all(g is not None and g.isfinite().all() and g.abs().sum() > 0 for g in grads.values()), grads.keys()
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(before, hash_of(model.experts), strict=True))


def test_gradients_where_neighbours_are_few():
    """Gradients are finite with entries of the query's own document in the top k, and without any neighbour."""
    model = make().train()
    x, y = tokens()
    store = VectorStore(C, top_k=8, max_vectors=100)
    store.add(model.keys(x[:1, :3])[0], [1, 2, 3], [0, 0, 1])
    store.build()
    model.attach(store)
    documents = torch.arange(x.numel()).view(x.shape) % 3 % 2
    for document in (documents, torch.ones_like(documents)):
        model.zero_grad()
        loss, report = model(x, y, documents=document)
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
        assert report["lambda"].max() > 0


def test_overfits_one_batch():
    model = make(settled=False).train()
    x, y = tokens()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    for _ in range(150):
        optimizer.zero_grad()
        loss, report = model(x, y)
        loss.backward()
        optimizer.step()
    assert report["nll"].mean() < 0.5


# ---- store -----------------------------------------------------------------------------------------------------------


def unit(n, seed=0, dim=C):
    x = np.random.default_rng(seed).standard_normal((n, dim), dtype=np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_store_keeps_the_newest_and_takes_no_more():
    store, keys = VectorStore(C, top_k=4, max_vectors=100), unit(250)
    for part in np.array_split(np.arange(250), 7):
        store.add(keys[part], part, part)
    store.build()
    assert len(store) == 100
    similarity, tokens = store.search(torch.from_numpy(keys[150:]))
    assert tokens[:, 0].tolist() == list(range(150, 250))
    torch.testing.assert_close(similarity[:, 0], torch.ones(100), rtol=0, atol=1e-5)
    with pytest.raises(RuntimeError, match="built"):
        store.add(keys[:1], [0], [0])
    once = VectorStore(C, top_k=4, max_vectors=100)
    once.add(keys, np.arange(250), np.arange(250))  # more at once than the store can hold
    once.build()
    assert set(once.tokens) == set(range(150, 250))


def test_own_document_is_never_returned():
    store, keys = VectorStore(C, top_k=5, max_vectors=60), unit(60)
    store.add(keys, np.arange(60), np.arange(60) // 6)
    store.build()
    documents = torch.arange(60) // 6
    similarity, tokens = store.search(torch.from_numpy(keys), documents)
    assert not (tokens // 6 == documents[:, None]).any()
    for row, document in enumerate(documents.tolist()):  # the nearest others, in order
        cosine = keys @ keys[row]
        cosine[np.arange(60) // 6 == document] = -2
        assert tokens[row].tolist() == np.argsort(-cosine)[:5].tolist()


def test_store_file_is_the_same_store(tmp_path):
    store, keys = VectorStore(C, top_k=5, max_vectors=30_000), unit(30_000)
    store.add(keys, np.arange(30_000), np.arange(30_000))
    store.build()
    digest = save_store(tmp_path / "store.npz", store)
    again = load_store(tmp_path / "store.npz", digest)
    query = torch.from_numpy(unit(50, seed=1))
    for a, b in zip(store.search(query), again.search(query), strict=True):
        assert torch.equal(a, b)
    assert save_store(tmp_path / "second.npz", again) == digest
    with pytest.raises(RuntimeError):
        again.add(keys[:1], [0], [0])


def test_lists_find_what_a_full_search_finds():
    """Clustered keys, as hidden states are: recall@32 of 8 lists against all."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((500, 64), dtype=np.float32)
    keys = centres[rng.integers(0, 500, 25_000)] + 0.3 * rng.standard_normal((25_000, 64), dtype=np.float32)
    keys /= np.linalg.norm(keys, axis=1, keepdims=True)
    store = VectorStore(64, top_k=32, max_vectors=25_000)
    store.add(keys, np.arange(25_000), np.arange(25_000))
    store.build()
    query = keys[::500]
    _, tokens = store.search(torch.from_numpy(query))
    expected = np.argsort(-(query @ keys.T), 1)[:, :32]
    assert np.mean([len(set(a) & set(b)) / 32 for a, b in zip(tokens.tolist(), expected.tolist(), strict=True)]) >= 0.9


@torch.no_grad()
def test_empty_store_changes_nothing():
    model = make().eval()
    x, y = tokens()
    without = model(x)
    store = VectorStore(C, top_k=4, max_vectors=10)
    store.build()
    model.attach(store)
    torch.testing.assert_close(model(x), without, rtol=0, atol=1e-5)
    one = VectorStore(C, top_k=4, max_vectors=10)  # only the query's own document
    one.add(unit(3), [1, 2, 3], [7, 7, 7])
    one.build()
    model.attach(one)
    _, report = model(x, y, documents=torch.full_like(x, 7))
    assert report["lambda"].abs().sum() == 0


@torch.no_grad()
def test_memory_of_the_answer_helps():
    model = make(settled=False).eval()
    x, y = tokens()
    _, before = model(x, y)
    store = VectorStore(C, top_k=1, max_vectors=100)
    store.add(model.keys(x).flatten(0, 1), y.flatten(), np.arange(y.numel()))
    store.build()
    model.attach(store)
    _, after = model(x, y)
    share = 1 / (1 + math.exp(3))
    expected = -((1 - share) * (-before["nll"]).exp() + share).log()
    torch.testing.assert_close(after["nll"], expected, rtol=0, atol=1e-5)
