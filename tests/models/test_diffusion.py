"""Noise schedules, DDIM and the denoising network."""

import pytest
import torch

from models.diffusion import DenoisingNetwork, NoiseSchedule, sinusoid

KINDS = ["cosine", "linear"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [20, 1000])
def test_noise_grows_from_none_to_almost_all(kind, steps):
    a = NoiseSchedule(steps, kind).alpha_bar
    assert a.shape == (steps + 1,) and a.dtype == torch.float32
    assert a[0] == 1 and 0 < a[-1] < 3e-3 and (a.diff() < 0).all()


def test_linear_is_that_of_ddpm():
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    a = (1 - beta).cumprod(0)
    assert (NoiseSchedule(1000, "linear").alpha_bar[1:] - a).abs().max() < 1.1e-3  # lifted by LEAST_SIGNAL
    with pytest.raises(ValueError, match="cosine"):
        NoiseSchedule(10, "quadratic")


@pytest.mark.parametrize("kind", KINDS)
def test_noisy_features_have_unit_variance(kind):
    torch.manual_seed(0)
    schedule, B = NoiseSchedule(1000, kind), 11
    x, eps = torch.randn(2, B, 2000, 5)
    t = torch.linspace(0, 1000, B).long()
    noisy = schedule.add_noise(x, eps, t)
    assert ((noisy.var((1, 2)) - 1).abs() < 0.05).all()
    torch.testing.assert_close(noisy[0], x[0])
    signal, noise = schedule.parts(t)
    torch.testing.assert_close(signal**2 + noise**2, torch.ones(B, 1, 1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 20, 2000])
def test_ddim_with_the_true_v_is_exact(kind, count):
    torch.manual_seed(0)
    schedule, steps = NoiseSchedule(1000, kind), []
    x, eps = torch.randn(2, 3, 4, 5)

    def predict(x_t, t):
        torch.testing.assert_close(x_t, schedule.add_noise(x, eps, t), rtol=0, atol=1e-3)
        steps.append(t[0].item())
        signal, noise = schedule.parts(t)
        return signal * eps - noise * x

    x_hat = schedule.ddim(predict, schedule.add_noise(x, eps, torch.full((3,), 1000)), count)
    torch.testing.assert_close(x_hat, x, rtol=0, atol=1e-3)
    assert len(steps) == min(count, 1000) and steps[0] == 1000 and steps == sorted(steps, reverse=True)


def test_v_tells_clean_features_and_noise():
    torch.manual_seed(0)
    schedule, x = NoiseSchedule(1000, "cosine"), torch.randn(8, 4, 5)
    v, noisy = schedule.corrupt(x)
    signal, noise = schedule.parts(noisy["t"])
    torch.testing.assert_close(signal * noisy["x_t"] - noise * v, x, rtol=0, atol=1e-5)
    eps, mask = noise * noisy["x_t"] + signal * v, torch.rand(8, 4) < 0.8
    torch.testing.assert_close(schedule.add_noise(x, eps, noisy["t"]), noisy["x_t"], rtol=0, atol=1e-5)
    guess = torch.randn_like(v)
    eps_hat = noise * noisy["x_t"] + signal * guess
    quarters = schedule.by_quarter(guess, v, mask, noisy["t"]).values()
    assert sum(count for _, count in quarters) == 5 * mask.sum()
    torch.testing.assert_close(sum(total for total, _ in quarters), (eps_hat - eps)[mask].square().sum())


def test_a_sinusoid_tells_steps_apart():
    embedding = sinusoid(torch.arange(1001), 64)
    near = torch.cdist(embedding, embedding).fill_diagonal_(9).min()
    assert embedding.shape == (1001, 64) and near > 0.1


def test_network():
    torch.manual_seed(0)
    net = DenoisingNetwork(inputs=5, condition=3, width=8, layers=2, outputs=4)
    x, condition, mask = torch.randn(2, 6, 5), torch.randn(2, 6, 3), torch.arange(6) < torch.tensor([[6], [4]])
    t = torch.tensor([3, 800])
    assert not any(p.any() for p in net.modulate.parameters())
    for linear in net.modulate:
        torch.nn.init.normal_(linear.weight)
    heard = net(x, t, condition, mask)
    assert heard.shape == (2, 6, 4)
    for other in (net(x, t + 9, condition, mask), net(x, t, -condition, mask)):
        assert not torch.allclose(other, heard, atol=1e-3)
    order = torch.randperm(6)
    moved = net(x[:, order], t, condition[:, order], mask[:, order])
    torch.testing.assert_close(moved, heard[:, order], rtol=0, atol=1e-5)
    junk = torch.where(mask[..., None], x, torch.tensor(50.0))
    torch.testing.assert_close(net(junk, t, condition, mask)[mask], heard[mask], rtol=0, atol=0)


def test_it_learns_to_denoise():
    """The condition tells two points on a line apart."""
    torch.manual_seed(0)
    schedule = NoiseSchedule(100, "cosine")
    net = DenoisingNetwork(inputs=1, condition=1, width=16, layers=1, outputs=1)
    optimizer, mask = torch.optim.Adam(net.parameters(), 1e-2), torch.ones(64, 1, dtype=torch.bool)
    which = torch.arange(64).view(64, 1, 1) % 2 * 2.0 - 1
    for _ in range(150):
        v, noisy = schedule.corrupt(which)
        loss = (net(noisy["x_t"], noisy["t"], which, mask) - v).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    error = {}
    for name, condition in dict(right=which, wrong=-which).items():
        x_hat = schedule.ddim(lambda x, t, condition=condition: net(x, t, condition, mask), torch.randn(64, 1, 1), 10)
        error[name] = (x_hat - which).square().mean().item()
    assert error["right"] < 0.1 and error["wrong"] > 1
