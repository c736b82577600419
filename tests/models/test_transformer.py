"""Invariants of the transformer: causality, cache, start, gradients."""

import math

import pytest
import torch
import torch.nn.functional as F

from models.transformer import EPS, Transformer, _RMSNorm

SMALL = dict(vocab_size=61, d_model=32, max_seq_len=24, n_heads=4, dropout=0.0, rope_base=1e4, n_layers=2, ffn_mult=2)


def build(**changes):
    torch.manual_seed(0)
    model = Transformer(**SMALL | changes)
    for p in model.parameters():  # away from the tiny start, where everything is nearly linear
        torch.nn.init.normal_(p, std=0.3) if p.ndim == 2 else None
    return model.eval()


def ids(*shape, seed=0, vocab=61):
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("autocast, limit", [(False, 1e-5), (True, 1e-2)])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_no_token_sees_a_later_one(autocast, limit, mode):
    model = getattr(build(), mode)()
    x = ids(2, 20)
    for k in (1, 7, 19):
        changed = x.clone()
        changed[:, k:] = (changed[:, k:] + 1) % 61
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            moved = (model(x) - model(changed))[:, :k].abs().max()
        assert moved < limit


@pytest.mark.parametrize("prompt", [1, 5, 24])
def test_steps_equal_the_full_forward(prompt):
    model, x = build(), ids(2, 24)
    with torch.no_grad():
        full = model(x)
        logits, state = model.step(x[:, :prompt], model.init_state(2))
        torch.testing.assert_close(logits, full[:, prompt - 1], rtol=1e-4, atol=1e-4)
        for t in range(prompt, 24):
            logits, state = model.step(x[:, t : t + 1], state)
            torch.testing.assert_close(logits, full[:, t], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="24 .* 1 .*24"):
        model.step(x[:, :1], state)


def test_attention_equals_a_loop():
    model, x = build(n_layers=1), ids(1, 9)
    block, h = model.blocks[0], build(n_layers=1).hidden(ids(1, 9), 0)
    h = block.attention_norm(h)
    q, k, v = block.attention.qkv(h).view(1, 9, 12, 8).chunk(3, 2)
    q, k = model.rotary(q), model.rotary(k)
    out = torch.zeros(1, 9, 4, 8)
    for t in range(9):
        for head in range(4):
            scores = torch.stack([q[0, t, head] @ k[0, s, head] / 8**0.5 for s in range(t + 1)]).softmax(0)
            out[0, t, head] = sum(p * v[0, s, head] for s, p in enumerate(scores))
    expected = block.attention.out(out.flatten(2))
    torch.testing.assert_close(block.attention(h, model.rotary), expected, rtol=1e-5, atol=1e-5)
    assert x.shape == (1, 9)


def test_norm_and_its_gradients_equal_the_library():
    norm = build().norm.double()
    x = torch.randn(3, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    gradients = torch.autograd.grad(_RMSNorm.apply(x, norm.weight).sin().sum(), [x, norm.weight])
    plain = F.rms_norm(x, (32,), norm.weight, EPS)
    torch.testing.assert_close(gradients, torch.autograd.grad(plain.sin().sum(), [x, norm.weight]))
    trained = norm(x)
    with torch.no_grad():  # another path
        assert torch.equal(norm(x), trained)
    assert torch.autograd.gradcheck(build().rotary.double(), (x[:, :, :8].detach().unsqueeze(2).requires_grad_(),))


def test_rotary_depends_on_distance_alone():
    rotary, q, k = build().rotary, torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)
    scores = [(rotary(q, start + 3) * rotary(k, start)).sum() for start in (0, 5, 20)]
    torch.testing.assert_close(scores[0], scores[1])
    torch.testing.assert_close(scores[0], scores[2])
    torch.testing.assert_close(rotary(q, 11).norm(), q.norm())


@pytest.mark.parametrize("vocab", [259, 8192])
def test_first_loss_is_that_of_no_knowledge(vocab):
    torch.manual_seed(0)
    sizes = dict(vocab_size=vocab, d_model=384, n_heads=6, n_layers=6, ffn_mult=4, max_seq_len=64)
    model, x = Transformer(**SMALL | sizes), ids(4, 65, vocab=vocab)
    with torch.no_grad():
        loss = model(x[:, :-1], x[:, 1:])[0] / 256
        copy_loss = model(x[:, :-1], x[:, :-1])[0] / 256  # a tied head would know its own input
    assert abs(loss - math.log(vocab)) < 0.1 and copy_loss > loss - 2.5


def test_loss_is_the_cross_entropy_of_the_logits():
    model, x = build(), ids(2, 20)
    y = torch.where(ids(2, 20, seed=1) % 5 == 0, -100, x)
    loss, report = model(x, y)
    naive = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="none").view(2, 20)
    torch.testing.assert_close(loss, naive.sum())
    torch.testing.assert_close(report["nll"], naive.detach(), rtol=1e-5, atol=1e-5)


def test_every_parameter_learns_and_one_batch_is_learnt_by_heart():
    torch.manual_seed(0)
    model, x = Transformer(**SMALL | dict(dropout=0.1)), ids(4, 21)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95))
    for step in range(150):
        loss = model(x[:, :-1], x[:, 1:])[0] / 80
        loss.backward()
        if step == 1:
            assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
    assert model.eval()(x[:, :-1], x[:, 1:])[0] / 80 < 0.5


def test_too_long_a_sequence_names_both_lengths():
    with pytest.raises(ValueError, match="25 .*24"):
        build()(ids(1, 25))
