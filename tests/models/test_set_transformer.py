"""The point encoder against plain loops, and invariance to order and padding."""

import math
import struct

import pytest
import torch

from models.set_transformer import NORMS, Norm, SetTransformer, bring_into_range, fourier, ieee_bits, standardize
from models.transformer import EPS

SIZES = dict(n_columns=3, float_features="fourier", noise_scale=0.1, dim=16, n_heads=4, n_isab=1, n_sab=1,
             n_inducing_points=5, n_seeds=3, ffn_hidden_dim=24, dropout=0.0, attn_norm="rms_set", ffn_norm="rms_set",
             output_norm="rms_set", output_dim=10, use_checkpointing=False)  # fmt: skip


def build(**changes):
    torch.manual_seed(0)
    return SetTransformer(**SIZES | changes).eval()


def points(*shape, seed=0):
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def everything(data):
    return torch.ones(data.shape[:2], dtype=torch.bool)


def test_bits_are_those_of_ieee_754():
    values = torch.tensor([0.0, -0.0, 1.0, -2.5, 1e-40, 3.4e38, math.pi])
    for value, bits in zip(values.tolist(), ieee_bits(values), strict=True):
        word = "".join(f"{byte:08b}" for byte in struct.pack(">f", value))
        assert bits.tolist() == [1.0 if bit == "1" else -1.0 for bit in word]


def test_fourier_features_equal_a_loop():
    values = torch.tensor([0.0, 0.3, -7.0, 1e9, -(2.0**60)])
    for v, features in zip(values.tolist(), fourier(values), strict=True):
        u = math.copysign(math.log(1 + abs(v)), v)
        angles = [math.pi / 4 * 2**k * u for k in range(8)]
        plain = [min(4, max(-4, v)) / 2, u / 2, *map(math.sin, angles), *map(math.cos, angles)]
        torch.testing.assert_close(features, torch.tensor(plain), rtol=1e-4, atol=1e-3)  # angles of up to 4,000


@pytest.mark.parametrize("scale", [1e-18, 1.0, 1e18])
def test_standardised_equals_a_loop(scale):
    y, present = scale * points(3, 12), points(3, 12, seed=3) > 0
    present[2] = False
    scaled = standardize(y * present, present)
    for row in range(2):
        real = [v / scale for v, there in zip(y[row].tolist(), present[row], strict=True) if there]
        mean = sum(real) / len(real)
        deviation = (sum((v - mean) ** 2 for v in real) / len(real)) ** 0.5
        plain = torch.tensor([(v - mean) / deviation for v in real])
        torch.testing.assert_close(scaled[row][present[row]], plain, rtol=1e-4, atol=1e-4)
    assert (scaled[~present] == 0).all()
    assert (standardize(torch.full((1, 5), 7.0), everything(torch.zeros(1, 5))).abs() < 1e-6).all()


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_columns_are_brought_into_range_by_powers_of_two(kind):
    tiny, huge = (1e-42, 3e38) if kind == torch.float32 else (1e-310, 1e308)
    largest = [tiny, huge, 2.0**-60, 2.0**60, 2.0**-61, 1.1 * 2.0**60, 1.0, 0.0, 1e-30, 1e30]
    data = torch.stack([torch.tensor([v / 4, -v, 0.0, math.nan, math.inf, 1e20], dtype=kind) for v in largest], 1)[None]
    mask = torch.tensor([[True] * 5 + [False]])
    scaled, present, exponent = bring_into_range(data, mask)
    assert scaled.dtype == torch.float32 and present[0, :, 0].tolist() == [True] * 3 + [False] * 3
    assert not scaled[~present].any()
    for column, v in enumerate(data[0, 1].abs().tolist()):
        inside = v == 0 or 2.0**-60 <= v <= 2.0**60
        power = 0 if inside else 1 - math.frexp(v)[1]
        assert exponent[0, column] == power
        assert inside or 1 <= -scaled[0, 1, column] < 2
        plain = [torch.tensor(math.ldexp(float(x), power)).item() for x in data[0, :3, column]]
        torch.testing.assert_close(scaled[0, :3, column], torch.tensor(plain), rtol=1e-7, atol=0)


def plain_norm(norm, x):
    if norm.kind == "none":
        return x
    weight = norm.each.weight
    if norm.kind == "rms_set":
        return x / (x.pow(2).mean() + EPS) ** 0.5 * weight
    rows = []
    for row in x:
        row = row - row.mean() if norm.kind == "layer" else row
        eps = norm.each.eps if norm.kind == "layer" else EPS
        rows.append(row / (row.pow(2).mean() + eps) ** 0.5 * weight)
    return torch.stack(rows) + (norm.each.bias if norm.kind == "layer" else 0)


@pytest.mark.parametrize("kind", NORMS)
def test_norms_equal_a_loop_and_ignore_padding(kind):
    torch.manual_seed(0)
    norm, x = Norm(kind, 6), points(1, 4, 6)
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter)
    torch.testing.assert_close(norm(x)[0], plain_norm(norm, x[0]), rtol=1e-5, atol=1e-5)
    padded = torch.cat([x, torch.zeros(1, 3, 6)], 1)
    torch.testing.assert_close(norm(padded, torch.tensor([[[4]]]))[:, :4], norm(x))


def plain_attention(attention, x, memory):
    H, out = attention.n_heads, []
    q = attention.query(x).unflatten(-1, (H, -1))
    k, v = (part.unflatten(-1, (H, -1)) for part in (memory @ attention.key_value.weight.T).chunk(2, -1))
    for t in range(len(x)):
        heads = []
        for h in range(H):
            p = torch.stack([q[t, h] @ k[s, h] / q.shape[-1] ** 0.5 for s in range(len(memory))]).softmax(0)
            heads.append(sum(p[s] * v[s, h] for s in range(len(memory))))
        out.append(attention.out.weight @ torch.cat(heads))
    return torch.stack(out)


def plain_block(block, x, memory=None):
    normed = x if block.norm is None else plain_norm(block.norm, x)
    x = x + plain_attention(
        block.attention, normed, normed if memory is None else plain_norm(block.memory_norm, memory)
    )
    h = block.ffn[0].weight @ plain_norm(block.ffn_norm, x).T
    return x + (block.ffn[2].weight @ (h * 0.5 * (1 + torch.erf(h / 2**0.5)))).T


@pytest.mark.parametrize("norm", NORMS)
@torch.no_grad()
def test_encoder_equals_plain_blocks(norm):
    model, data = build(attn_norm=norm, ffn_norm=norm, output_norm=norm), points(2, 7, 3)
    for one, output in zip(data, model(data, everything(data)), strict=True):
        x = model.features(one[None], everything(one[None]))[0]
        for i, layer in enumerate(model.embedding[::2]):
            x = (torch.nn.functional.gelu(x) if i else x) @ layer.weight.T + layer.bias
        x = plain_block(model.spread[0], x, plain_block(model.gather[0], model.inducing[0], x))
        x = plain_block(model.blocks[0], plain_block(model.pool, model.seeds, x))
        torch.testing.assert_close(output, plain_norm(model.norm, x) @ model.out.weight.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("features", ["fourier", "ieee"])
@pytest.mark.parametrize("norm", NORMS)
@torch.no_grad()
def test_order_padding_and_junk_under_the_mask_change_nothing(features, norm):
    model, data = build(float_features=features, attn_norm=norm, ffn_norm=norm, output_norm=norm), points(2, 9, 3)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 6:] = False
    output = model(data, mask)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(model(data[:, order], mask[:, order]), output, rtol=1e-5, atol=1e-5)
    for junk in (math.nan, math.inf, 1e38, 0.0):
        changed = data.masked_fill(~mask[..., None], junk)
        longer = torch.cat([changed, torch.full((2, 4, 3), junk)], 1)
        padded = torch.cat([mask, torch.zeros(2, 4, dtype=torch.bool)], 1)
        torch.testing.assert_close(model(longer, padded), output, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(data[1:, :6], mask[1:, :6]), output[1:], rtol=1e-5, atol=1e-5)
    assert (model(2 * data, mask) - output).abs().max() > 1e-3


@pytest.mark.parametrize("features", ["fourier", "ieee"])
@torch.no_grad()
def test_non_finite_entries_have_no_features(features):
    model, data = build(float_features=features, n_columns=2).train(), points(1, 4, 2)
    data[0, 1, 0], data[0, 2, 1] = math.nan, -math.inf
    values = model.features(data, everything(data)).unflatten(-1, (-1, 32 if features == "ieee" else 18))
    gone = ~data.isfinite()[0] if features == "ieee" else ~data.isfinite()[0][:, [0, 1, 1]]
    assert values.isfinite().all() and (values[0].abs().sum(-1) == 0).equal(gone)


@torch.no_grad()
def test_only_ieee_features_are_noisy_and_only_in_training():
    data = points(50, 20, 3)
    for features in ("fourier", "ieee"):
        model = build(float_features=features)
        still = model.features(data, everything(data))
        moved = model.train().features(data, everything(data)) - still
        assert abs(moved.std() - (0.1 if features == "ieee" else 0)) < 1e-3


def test_checkpointing_changes_no_gradient():
    gradients = []
    for use_checkpointing in (False, True):
        model, data = build(use_checkpointing=use_checkpointing).train(), points(2, 6, 3)
        model(data, everything(data)).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_unknown_norms_are_refused():
    with pytest.raises(ValueError, match="batch.*rms, rms_set, layer, none"):
        build(attn_norm="batch")
