"""Invariants of the HRM: no leaks, segments, cache, start, gradients."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from models.cross_entropy import linear_cross_entropy
from models.hrm import HRM

V, S, T = 40, 10, 6
SMALL = dict(vocab_size=V, d_model=32, max_seq_len=16, n_heads=4, encoder_layers=1, decoder_layers=2, core="recursive",
             core_layers=1, share=True, h_cycles=2, l_steps=2, grad="last_cycle", ffn_dim=0, positions="rope",
             relation_bias=False, halting=False, halting_weight=0.5)  # fmt: skip
CELLS = dict(vocab_size=5, encoder_layers=0, decoder_layers=0, positions="grid", relation_bias=True)
ANSWER = dict(bos_id=1, eos_id=2, max_new_tokens=20, choose=lambda logits: logits.argmax(-1, keepdim=True))


def build(**changes):
    torch.manual_seed(0)
    return HRM(**SMALL | changes)


def ids(*shape, seed=0, low=3, high=V):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def pairs(B=4, seed=0):
    """Prompts of 10, 9, 8, ... tokens and answers of 6, 5, 4, ... labels, padded with 0."""
    prompt, answer = ids(B, S, seed=seed), ids(B, T, seed=seed + 1)
    mask = (torch.arange(S) < S - torch.arange(B)[:, None] % 5).long()
    labels = answer.masked_fill(torch.arange(T) >= T - torch.arange(B)[:, None] % 4, -100)
    inputs = F.pad(answer[:, :-1], (1, 0), value=1) * (labels >= 0)
    return dict(encoder_ids=prompt * mask, encoder_mask=mask, decoder_input_ids=inputs, labels=labels)


def cells(B=4, seed=0):
    puzzle = ids(B, 16, seed=seed, low=0, high=5)
    return dict(encoder_ids=puzzle, labels=ids(B, 16, seed=seed + 1, low=1, high=5))


HEADS = dict(rope=({}, pairs), ends=(dict(positions="ends"), pairs), cells=(CELLS, cells))


def wake(model):
    """Move the model away from its initial weights, where the halting head gives all samples the same logit."""
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3) if p.ndim == 2 else None
    if model.halting:
        torch.nn.init.normal_(model.halt.weight)
        torch.nn.init.zeros_(model.halt.bias)
    return model.eval()


@torch.no_grad()
def evaluate(model, batch, segments, threshold=math.inf):
    """Answer a batch after `think` -> nats (B, T), guess (B, T), right (B), segments used (B)."""
    x, bias, z_H, used = model.think(batch["encoder_ids"], batch.get("encoder_mask"), segments, threshold)
    h, labels = model.answer(x, z_H, bias, batch.get("decoder_input_ids")), batch["labels"]
    guess, nats = model.guess(h), linear_cross_entropy(h, model.head.weight, labels)[1]
    return dict(nats=nats, guess=guess, right=((guess == labels) | (labels < 0)).all(1), used=used)


@pytest.mark.parametrize("core, grad", [*itertools.product(["recursive"], ["one_step", "last_cycle", "bptt"]),
                                        ("plain", "last_cycle"), ("none", "last_cycle")])  # fmt: skip
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("bf16", [False, True])
def test_every_parameter_learns(core, grad, head, bf16):
    changes, make = HEADS[head]
    for share, halting in itertools.product([True, False], [True, False] if core == "recursive" else [False]):
        settings = dict(core=core, grad=grad, share=share, halting=halting) | changes
        model, carry = build(**settings), None
        for _ in range(2):
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss, _, carry = model(make(), carry)
            loss.backward()
            for name, p in model.named_parameters():
                assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0, (settings, name)
        assert not any(z.requires_grad for z in carry)


@pytest.mark.parametrize("head, vocab, width", [("rope", 98, 256), ("ends", 8192, 64), ("cells", 10, 128)])
@pytest.mark.parametrize("core", ["recursive", "none"])
def test_first_loss_is_that_of_no_knowledge(head, vocab, width, core):
    changes, make = HEADS[head]
    model = build(**changes | dict(vocab_size=vocab, d_model=width, core=core))
    assert abs(model(make(64))[0] - math.log(vocab)) < 0.1


def test_decoder_is_causal_and_padding_is_unseen():
    model, batch = wake(build()), pairs()
    x, bias, z_H, _ = model.think(batch["encoder_ids"], batch["encoder_mask"], 2, math.inf)
    h = model.answer(x, z_H, bias, batch["decoder_input_ids"])
    for k in range(1, T):
        other = batch["decoder_input_ids"].clone()
        other[:, k:] = (other[:, k:] + 1) % V
        moved = (model.answer(x, z_H, bias, other) - h).abs()
        assert moved[:, :k].max() < 1e-6 and moved[:, k:].max() > 1e-3
    mask = batch["encoder_mask"]
    junk = torch.where(mask == 1, batch["encoder_ids"], ids(4, S, seed=7))
    x_, _, z_, _ = model.think(junk, mask, 2, math.inf)
    for a, b in ((x, x_), (z_H, z_)):
        torch.testing.assert_close(a * mask[..., None], b * mask[..., None], rtol=0, atol=1e-6)
    torch.testing.assert_close(model.answer(x_, z_, bias, batch["decoder_input_ids"]), h, rtol=0, atol=1e-6)


@pytest.mark.parametrize("head", HEADS)
def test_no_path_from_labels_to_the_prompt(head):
    changes, make = HEADS[head]
    model, batch = wake(build(halting=True, **changes)), make()
    other = batch | dict(labels=ids(*batch["labels"].shape, seed=5, high=5))
    if "decoder_input_ids" in batch:
        other["decoder_input_ids"] = ids(4, T, seed=6)
    (_, first, carry), (_, second, carry_) = model(batch), model(other)
    assert all(torch.equal(a, b) for a, b in zip(carry, carry_, strict=True))
    assert torch.equal(first["halt"], second["halt"])
    assert not torch.equal(first["nats"], second["nats"])


def test_the_loss_is_the_formula():
    model, batch = wake(build(halting=True)), pairs()
    loss, report, _ = model(batch)
    x, bias, z_H, _ = model.think(batch["encoder_ids"], batch["encoder_mask"], 1, math.inf)
    logits = F.linear(model.answer(x, z_H, bias, batch["decoder_input_ids"]), model.head.weight)
    labels, right = batch["labels"], []
    for row, wanted in zip(logits.argmax(-1), labels, strict=True):
        right.append(all(a == b for a, b in zip(row.tolist(), wanted.tolist(), strict=True) if b >= 0))
    nats = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    halting = F.binary_cross_entropy_with_logits(report["halt"], torch.tensor(right).float())
    torch.testing.assert_close(report["nats"], nats, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss, nats.sum() / (labels >= 0).sum() + 0.5 * halting)
    assert report["right"].tolist() == right
    torch.testing.assert_close(model(batch, targets=10)[0], nats.sum() / 10 + 0.5 * halting)


@pytest.mark.parametrize("head", HEADS)
def test_segments_go_on_and_halted_samples_leave(head):
    changes, make = HEADS[head]
    model, batch = wake(build(halting=True, **changes)), make(12)
    carry, halts, nats = None, [], []
    for _ in range(4):
        _, report, carry = model(batch, carry)
        halts.append(report["halt"])
        nats.append(report["nats"])
    halts, nats = torch.stack(halts), torch.stack(nats)  # (4, B), (4, B, T)
    for n in (1, 4):
        scores = evaluate(model, batch, n)
        torch.testing.assert_close(scores["nats"], nats[n - 1], rtol=1e-4, atol=1e-5)
        assert (scores["used"] == n).all()
    threshold = halts[:3].mean().item()
    first = [next((n for n in range(3) if halts[n, b] > threshold), 3) for b in range(12)]
    scores = evaluate(model, batch, 4, threshold)
    assert scores["used"].tolist() == [n + 1 for n in first] and 1 < len(set(first))
    torch.testing.assert_close(scores["nats"], nats[first, range(12)], rtol=1e-4, atol=1e-5)
    if head == "cells":
        answers, used = model.solve(batch["encoder_ids"], 4, threshold)
        assert torch.equal(answers, scores["guess"]) and torch.equal(used, scores["used"])


@pytest.mark.parametrize("head", ["rope", "ends"])
def test_steps_equal_the_full_forward(head):
    model, batch = wake(build(**HEADS[head][0])), pairs()
    x, bias, z_H, _ = model.think(batch["encoder_ids"], batch["encoder_mask"], 2, math.inf)
    tokens = ids(4, 16)
    full = F.linear(model.answer(x, z_H, bias, tokens), model.head.weight)
    model.frozen()  # other strides, the same numbers
    assert model.head.weight.stride() == (1, V)
    for prompt in (1, 5):
        logits, state = model.step(tokens[:, :prompt], model.init_state(x, z_H, bias))
        torch.testing.assert_close(logits, full[:, prompt - 1], rtol=0, atol=1e-5)
        for t in range(prompt, 16):
            logits, state = model.step(tokens[:, t : t + 1], state)
            torch.testing.assert_close(logits, full[:, t], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="16 .* 1 .*16"):
        model.step(tokens[:, :1], state)


@pytest.mark.parametrize("head", ["rope", "ends"])
def test_a_batch_is_answered_as_its_prompts_alone(head):
    model, batch = wake(build(halting=True, **HEADS[head][0])), pairs(12)
    model.head.weight.data[2] *= 3  # some answers end early
    prompts, mask = batch["encoder_ids"], batch["encoder_mask"]
    _, report, _ = model(batch)
    threshold = report["halt"].mean().item()
    answers, used = model.generate(prompts, mask, segments=4, threshold=threshold, **ANSWER)
    assert len({len(a) for a in answers}) > 1 and len(set(used.tolist())) > 1
    assert all(2 not in a and len(a) <= 16 for a in answers)
    for i, length in enumerate(mask.sum(1).tolist()):
        alone, one = model.generate(prompts[i : i + 1, :length], None, segments=4, threshold=threshold, **ANSWER)
        assert alone == [answers[i]] and one.tolist() == [used[i]]
        inputs = torch.tensor([[1, *answers[i]]])[:, :16]  # the decoder without a cache
        x, bias, z_H, _ = model.think(prompts[i : i + 1, :length], None, 4, threshold)
        guess = model.guess(model.answer(x, z_H, bias, inputs))[0].tolist()
        assert guess[: len(answers[i])] == answers[i] and guess[len(answers[i]) :] in ([], [2])


@pytest.mark.parametrize("head", HEADS)
def test_one_batch_is_learnt_by_heart(head):
    changes, make = HEADS[head]
    model, batch, step = build(**changes), make(), 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.95))
    while not evaluate(model, batch, 2)["right"].all():
        carry, step = None, step + 1
        for _ in range(2):
            loss, _, carry = model(batch, carry)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        assert step < 200


def test_parts_that_do_not_go_together_are_named():
    for changes, word in [
        (dict(halting=True, core="plain"), "plain"),
        (dict(relation_bias=True), "relation_bias"),
        (dict(positions="grid"), "decoder_layers 0"),
        (CELLS | dict(max_seq_len=15), "15 cells"),
    ]:
        with pytest.raises(ValueError, match=word):
            build(**changes)
    with pytest.raises(ValueError, match="17 .*16"):
        build()(pairs() | dict(encoder_ids=ids(4, 17), encoder_mask=None))
    with pytest.raises(ValueError, match="17 .*16"):
        build()(pairs() | dict(decoder_input_ids=ids(4, 17)))
