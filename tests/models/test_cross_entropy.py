"""The chunked loss equals the plain one."""

import pytest
import torch
import torch.nn.functional as F

from models.cross_entropy import CHUNK, linear_cross_entropy


def draw(N, V, C=16):
    g = torch.Generator().manual_seed(N + V)
    hidden, weight = torch.randn(N, C, generator=g).requires_grad_(), torch.randn(V, C, generator=g).requires_grad_()
    return hidden, weight, torch.randint(-1, V, (N,), generator=g), torch.rand(N, generator=g)


@pytest.mark.parametrize("N, V", [(1, 7), (CHUNK, 50), (2 * CHUNK + 3, 300)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_equals_all_logits_at_once(N, V, with_bias):
    hidden, weight, targets, weights = draw(N, V)
    table = torch.randn(N, V, generator=torch.Generator().manual_seed(1))
    total, nats = linear_cross_entropy(hidden, weight, targets, weights, table.__getitem__ if with_bias else None)
    (total * 0.3).backward()
    gradients = [hidden.grad, weight.grad]
    hidden.grad = weight.grad = None
    logits = hidden @ weight.T + (table if with_bias else 0)
    naive = F.cross_entropy(logits, targets, ignore_index=-1, reduction="none")
    ((naive * weights).sum() * 0.3).backward()
    torch.testing.assert_close(nats, naive.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(total, (naive * weights).sum(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(gradients, [hidden.grad, weight.grad], rtol=1e-4, atol=1e-5)


def test_leading_shape_and_no_grad():
    hidden, weight, targets, _ = draw(12, 9)
    total, nats = linear_cross_entropy(hidden.view(3, 4, -1), weight, targets.view(3, 4))
    assert nats.shape == (3, 4) and not nats.requires_grad and total.requires_grad
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(hidden, weight, targets)[1], nats.flatten())


def test_bf16_autocast_is_close():
    hidden, weight, targets, _ = draw(300, 200)
    exact = linear_cross_entropy(hidden, weight, targets)[0]
    with torch.autocast("cpu", torch.bfloat16):
        rounded = linear_cross_entropy(hidden, weight, targets)[0]
    assert abs(rounded.item() / exact.item() - 1) < 1e-2
