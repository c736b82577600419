"""The published HRM and TRM against plain loops in fp64; batches, halting, arguments."""

import math

import pytest
import torch

from models.token_grid import TokenGrid

SIZES = dict(vocab_size=7, cells=6, puzzles=3, puzzle_dim=20, puzzle_places=2, d_model=16, n_heads=4, slow_layers=0,
             fast_layers=2, h_cycles=2, l_steps=3, inner=24, across=0, positions="rope", rope_base=100.0, eps=1e-5,
             halting="stop")  # fmt: skip
KINDS = dict(
    trm={},
    mlp_t=dict(across=10, positions="none"),
    hrm=dict(slow_layers=1, halting="compare"),
    learned=dict(positions="learned", puzzle_dim=0, puzzle_places=0),
)


def build(**changes):
    torch.manual_seed(0)
    model = TokenGrid(**SIZES | changes).double()
    for z in (model.start_H, model.start_L):
        torch.nn.init.normal_(z)
    return model


def plain_scaled(rows):
    return torch.stack([row / (row.pow(2).mean() + 1e-5) ** 0.5 for row in rows])


def plain_swiglu(part, row):
    gate, up = (part.gate_up.weight @ row).chunk(2)
    return part.down.weight @ (gate / (1 + (-gate).exp()) * up)


def plain_rotated(row, position):
    """Rotate the pairs (i, i + D / 2) of a head (D)."""
    D, new = len(row), row.clone()
    for i in range(D // 2):
        angle = position * 100.0 ** (-2 * i / D)
        a, b = row[i], row[i + D // 2]
        new[i] = a * math.cos(angle) - b * math.sin(angle)
        new[i + D // 2] = b * math.cos(angle) + a * math.sin(angle)
    return new


def plain_attention(mixer, h, rotate):
    S, C = h.shape
    D, mixed = C // mixer.n_heads, []
    q, k, v = (h @ mixer.qkv.weight.T).view(S, 3, mixer.n_heads, D).unbind(1)
    for t in range(S):
        heads = []
        for n in range(mixer.n_heads):
            logits = [rotate(q[t, n], t) @ rotate(k[s, n], s) / D**0.5 for s in range(S)]
            heads.append(torch.stack(logits).softmax(0) @ v[:, n])
        mixed.append(mixer.out.weight @ torch.cat(heads))
    return torch.stack(mixed)


def plain_logits(model, ids, number, segments):
    """Answer one puzzle (N,) -> logits (N, V), the two halting logits."""
    C = model.embedding.weight.shape[1]
    x = [model.embedding.weight[token] for token in ids]
    if model.puzzle_places:
        vector = torch.zeros(model.puzzle_places * C, dtype=torch.double)
        vector[: SIZES["puzzle_dim"]] = model.puzzles.weight[number]
        x = [*vector.view(-1, C), *x]
    if hasattr(model, "places"):
        x = [0.707106781 * (row + place) for row, place in zip(x, model.places.weight, strict=True)]
    x = C**0.5 * torch.stack([*x])
    rotate = (lambda row, t: row) if isinstance(model.rotary, torch.nn.Identity) else plain_rotated

    def f(blocks, h):
        for block in blocks:
            if block.across:  # a channel is a row, and scaled over its positions
                h = plain_scaled([row + plain_swiglu(block.mixer, row) for row in h.T]).T
            else:
                h = plain_scaled(h + plain_attention(block.mixer, h, rotate))
            h = plain_scaled([row + plain_swiglu(block.ffn, row) for row in h])
        return h

    z_H, z_L = model.start_H.expand_as(x), model.start_L.expand_as(x)
    for _ in range(segments * model.h_cycles):
        for _ in range(model.l_steps):
            z_L = f(model.fast, z_L + z_H + x)
        z_H = f(model.slow if len(model.slow) else model.fast, z_H + z_L)
    return z_H[model.puzzle_places :] @ model.head.weight.T, model.halt.weight @ z_H[0] + model.halt.bias


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_logits_equal_a_loop(kind):
    model = build(**KINDS[kind])
    ids, numbers = torch.randint(7, (2, 6)), torch.tensor([2, 1])
    logits, halt = model(ids, numbers, segments=2)
    for i in range(2):
        plain, (stop, go_on) = plain_logits(model, ids[i], numbers[i], 2)
        torch.testing.assert_close(logits[i], plain, rtol=0, atol=1e-6)  # the table of rotations is in fp32
        expected = stop - go_on if kind == "hrm" else stop
        torch.testing.assert_close(halt[i], expected.float(), rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_answers_halting_and_trace_agree():
    model = build().frozen()
    ids = torch.randint(7, (5, 6))
    answers, halt = model.trace(ids, 4)
    assert answers.shape == (5, 4, 6) and halt.shape == (5, 4)
    tokens, used = model.solve(ids, 3)
    assert (tokens == answers[:, 2]).all() and (used == 3).all()
    assert (model(ids, segments=3)[0].argmax(-1) == tokens).all()
    threshold = halt[:, :2].amax(1).median().item() - 1e-4
    tokens, used = model.solve(ids, 4, threshold)
    for i in range(5):
        above = (halt[i] > threshold).nonzero()
        last = above[0, 0].item() if len(above) else 3
        assert used[i] == last + 1 and (tokens[i] == answers[i, last]).all()
    assert 1 < len(used.unique())


@torch.no_grad()
def test_the_vector_of_a_puzzle_matters_and_none_is_number_0():
    model = build()
    ids = torch.randint(7, (1, 6)).expand(3, -1)
    logits, _ = model(ids, torch.arange(3))
    assert not torch.allclose(logits[0], logits[1])
    torch.testing.assert_close(model(ids[:1])[0][0], logits[0])


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="d_model 16 over n_heads 3"):
        build(n_heads=3)
    with pytest.raises(ValueError, match="puzzle_dim 40 in puzzle_places 2 of d_model 16"):
        build(puzzle_dim=40)
    with pytest.raises(ValueError, match="puzzle_dim 0"):
        build(puzzle_dim=0)
    with pytest.raises(ValueError, match="5 cells, the model was built for 6"):
        build()(torch.zeros(1, 5, dtype=torch.long))
