"""Invariants of latent attention."""

import pytest
import torch

from models.mla import LatentAttention, LatentBlock
from models.transformer import Rotary

C, H, R, P, T = 32, 4, 12, 6, 10


def make(kv_latent_dim=R):
    torch.manual_seed(0)
    block = LatentBlock(d_model=C, n_heads=H, ffn_mult=2, dropout=0.0, kv_latent_dim=kv_latent_dim, rope_dim=P)
    for parameter in block.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 1.0, 0.3)  # a gain that is not 1 must be applied once
    return block.eval(), Rotary(P if kv_latent_dim else C // H, T, 10000.0)


def naive(attention, x, rotary):
    """The equations of the docstring, one head and one position at a time."""
    B, T, _ = x.shape
    D = C // H
    latent, k_r = attention.down_kv(x).split([R, P], -1)
    latent = attention.norm(latent)
    k_r = rotary(k_r[:, :, None])[:, :, 0]
    q = attention.q(x).view(B, T, H, D + P)
    q_r = rotary(q[..., D:])
    k, v = attention.up_k(latent).view(B, T, H, D), attention.up_v(latent).view(B, T, H, D)
    y = torch.zeros(B, T, H, D)
    for h in range(H):
        for t in range(T):
            score = (k[:, : t + 1, h] @ q[:, t, h, :D, None] + k_r[:, : t + 1] @ q_r[:, t, h, :, None])[..., 0]
            share = (score / (D + P) ** 0.5).softmax(-1)
            y[:, t, h] = (share[..., None] * v[:, : t + 1, h]).sum(1)
    return attention.out(y.view(B, T, C))


def test_equals_the_equations():
    block, rotary = make()
    x = torch.randn(2, T, C)
    torch.testing.assert_close(block.attention(x, rotary), naive(block.attention, x, rotary), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kv_latent_dim", [0, R])
@pytest.mark.parametrize("prompt", [1, 4])
@torch.no_grad()
def test_absorbed_decoding_equals_the_full_forward(kv_latent_dim, prompt):
    block, rotary = make(kv_latent_dim)
    x = torch.randn(2, T, C)
    full, cache = block(x, rotary), block.init_cache(2, T)
    outputs = [block(x[:, :prompt], rotary, cache=cache)]
    outputs += [block(x[:, t : t + 1], rotary, cache=cache, start=t) for t in range(prompt, T)]
    torch.testing.assert_close(torch.cat(outputs, 1), full, rtol=0, atol=1e-5)


def test_cache_holds_what_it_should():
    """R + P numbers a token against 2 C: at the documented sizes 160 against 768."""
    assert make()[0].init_cache(1, T).numel() == T * (R + P)
    assert make(0)[0].init_cache(1, T).numel() == T * 2 * C
    full = LatentBlock(d_model=384, n_heads=6, ffn_mult=1, dropout=0.0, kv_latent_dim=128, rope_dim=32)
    assert full.init_cache(1, 1).nbytes == 4 * 160
    assert isinstance(full.attention, LatentAttention)
