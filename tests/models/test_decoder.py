"""The decoder: which symbols each place sees, and that generation equals teacher forcing."""

import pytest
import torch

from models.decoder import Decoder

V, L, N, D, END = 13, 6, 4, 16, 11


def build(**changes):
    torch.manual_seed(0)
    return Decoder(**dict(symbols=V, begin=12, d_model=D, n_heads=2, layers=2, length=L, mtp=True) | changes)


def given(count=2, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(V - 2, (count, L), generator=g), torch.randn(count, N, D, generator=g)


def changed(function, target):
    """Return which places of `function(target)` change with which symbol: (L, places) bool."""
    before, rows = function(target), []
    for i in range(L):
        other = target.clone()
        other[:, i] = (other[:, i] + 1) % (V - 2)
        rows.append((function(other) != before).flatten(2).any(2).any(0))
    return torch.stack(rows)


@torch.no_grad()
def test_a_place_sees_the_symbols_before_it():
    decoder, (target, memory) = build(), given()
    reached = changed(lambda t: decoder.logits(decoder(t, memory)), target)
    i, place = torch.arange(L)[:, None], torch.arange(L)
    assert torch.equal(reached, i < place)


@torch.no_grad()
def test_the_further_guess_sees_one_symbol_more():
    decoder, (target, memory) = build(), given()
    reached = changed(lambda t: decoder.logits(decoder.ahead(decoder(t, memory), t)), target)
    i, place = torch.arange(L)[:, None], torch.arange(L - 1)  # place i predicts symbol i + 1
    assert torch.equal(reached, i <= place)


@torch.no_grad()
def test_the_merge_is_that_of_a_loop():
    decoder, (target, memory) = build(), given()
    h = decoder(target, memory)

    def unit(x):
        return x / (x.square().mean() + 1e-5) ** 0.5

    rows = []
    for b in range(2):
        both = [torch.cat([unit(h[b, i]), unit(decoder.embedding.weight[target[b, i]] * D**0.5)]) for i in range(L - 1)]
        rows.append(torch.stack([decoder.merge.weight @ x for x in both]))
    expected = decoder.norm(decoder.further(torch.stack(rows), decoder.rotary))
    torch.testing.assert_close(decoder.ahead(h, target), expected)


@torch.no_grad()
def test_all_of_the_memory_is_seen_in_any_order():
    decoder, (target, memory) = build(), given()
    h = decoder(target, memory)
    torch.testing.assert_close(decoder(target, memory[:, [2, 0, 3, 1]]), h)
    other = memory.clone()
    other[:, -1] += 1
    assert (decoder(target, other) != h).any(-1).all()
    torch.testing.assert_close(decoder(target[1:], memory[1:]), h[1:])


@pytest.mark.parametrize("seed", [1, 2, 3])
@torch.no_grad()
def test_writing_equals_being_taught(seed):
    decoder, (_, memory) = build(), given(5, seed)
    torch.nn.init.normal_(decoder.embedding.weight)  # so that some answers end early
    seen = []

    def choose(logits):
        seen.append(logits)
        return logits.argmax(-1)

    symbols = decoder.generate(memory, length=L, end=END, choose=choose)
    taught = decoder.logits(decoder(symbols, memory))
    for b, row in enumerate(symbols.tolist()):
        length = row.index(END) + 1 if END in row else L
        for i in range(length):
            torch.testing.assert_close(seen[i][b], taught[b, i])
            assert row[i] == taught[b, i].argmax()
        assert row[length:] == [END] * (L - length)


@torch.no_grad()
def test_after_the_end_there_is_nothing():
    decoder, (_, memory) = build(), given(3)
    turns = iter([[1, END, 2], [3, 4, END], [END, 5, 6], [7, 7, 7]])
    symbols = decoder.generate(memory, length=L, end=END, choose=lambda logits: torch.tensor(next(turns)))
    assert symbols.tolist() == [[1, 3] + [END] * 4, [END] * 6, [2] + [END] * 5]
    assert next(turns) == [7, 7, 7]  # it stopped once all had ended


def test_without_a_further_guess_there_is_no_such_block():
    names = {name.split(".")[0] for name, _ in build(mtp=False).named_parameters()}
    assert names == {"embedding", "blocks", "norm"}
    assert {name.split(".")[0] for name, _ in build().named_parameters()} == names | {"merge", "further"}
