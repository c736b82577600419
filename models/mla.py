"""Multi-head latent attention: one small vector per token is cached instead of the keys and values of all heads.

B batch, T time, C width, H heads, D head dim, R latent dim, P rotary dim.
DeepSeek-V2 (arXiv 2405.04434), section 2.1.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from models.transformer import RMSNorm, TransformerBlock


class LatentAttention(nn.Module):
    """Causal attention whose keys and values come from a latent of R numbers per token: x (B, T, C) -> (B, T, C).

    c = norm(W_dkv x), k = W_uk c, v = W_uv c. Position enters through P rotated coordinates that all heads' keys share:
    score = (q_c . k + q_r . k_r) / sqrt(D + P)  (eq. 9 to 19, without the low-rank queries).
    """

    def __init__(self, *, d_model, n_heads, kv_latent_dim, rope_dim):
        super().__init__()
        self.n_heads, self.sizes = n_heads, (kv_latent_dim, rope_dim)
        self.q = nn.Linear(d_model, d_model + n_heads * rope_dim, bias=False)
        self.down_kv = nn.Linear(d_model, kv_latent_dim + rope_dim, bias=False)
        self.norm = RMSNorm(kv_latent_dim)
        self.up_k = nn.Linear(kv_latent_dim, d_model, bias=False)
        self.up_v = nn.Linear(kv_latent_dim, d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x, rotary, causal=True, cache=None, start=0):
        """`cache`: latent and rotated key (B, max T, R + P) of the positions before `start`, extended in place."""
        B, T, C = x.shape
        H, (R, P), D = self.n_heads, self.sizes, C // self.n_heads
        q_c, q_r = self.q(x).view(B, T, H, D + P).split([D, P], -1)
        q_r = rotary(q_r, start)
        latent, k_r = self.down_kv(x).split([R, P], -1)
        latent, k_r = self.norm(latent), rotary(k_r[:, :, None], start)  # (B, T, R), (B, T, 1, P)
        if cache is not None:
            cache[:, start : start + T] = torch.cat([latent, k_r[:, :, 0]], -1)
            if start:
                return self._absorbed(q_c, q_r, cache[:, : start + T])
        k = torch.cat([self.up_k(latent).view(B, T, H, D), k_r.expand(-1, -1, H, -1)], -1)  # (B, T, H, D + P)
        v = self.up_v(latent).view(B, T, H, D)
        q, k, v = (t.transpose(1, 2) for t in (torch.cat([q_c, q_r], -1), k.to(v.dtype), v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)  # by 1 / sqrt(D + P)
        return self.out(y.transpose(1, 2).reshape(B, T, C))

    def _absorbed(self, q_c, q_r, cache):
        """Attend from one new token, the last of `cache`.

        W_uk is applied to the query and W_uv to the result, so that keys and values are never built.
        """
        B, _, H, D = q_c.shape
        R, P = self.sizes
        latent, k_r = cache.split([R, P], -1)
        up_k, up_v = (m.weight.view(H, D, R) for m in (self.up_k, self.up_v))
        q = torch.einsum("bhd,hdr->bhr", q_c[:, 0], up_k)
        scores = (q @ latent.mT + q_r[:, 0] @ k_r.mT) * (D + P) ** -0.5  # (B, H, T)
        y = torch.einsum("bhr,hdr->bhd", scores.softmax(-1) @ latent, up_v)
        return self.out(y.reshape(B, 1, H * D))


class LatentBlock(TransformerBlock):
    """A transformer block with latent attention; kv_latent_dim 0 leaves it plain multi-head attention."""

    def __init__(self, *, kv_latent_dim, rope_dim, **sizes):
        super().__init__(**sizes)
        if kv_latent_dim:
            shape = dict(d_model=sizes["d_model"], n_heads=sizes["n_heads"])
            self.attention = LatentAttention(kv_latent_dim=kv_latent_dim, rope_dim=rope_dim, **shape)

    def init_cache(self, batch, length):
        """Return an empty cache for `length` positions: (B, length, R + P), or (2, B, H, length, D) if plain."""
        attention, new = self.attention, self.attention.out.weight.new_zeros
        if isinstance(attention, LatentAttention):
            return new(batch, length, sum(attention.sizes))
        return new(2, batch, attention.n_heads, length, len(attention.out.weight) // attention.n_heads)
