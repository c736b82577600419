import itertools

import pytest
import torch
import torch.nn.functional as F

from models.diffuser import Diffuser, denoise, posterior_entropy
from models.transformer import Transformer

V, C, T = 50, 32, 24
SIZES = dict(vocab_size=V, d_model=C, max_seq_len=T, n_heads=2, dropout=0.0, rope_base=10000.0, ffn_mult=2)


def tokens(batch, length=T, seed=0):
    """Draw ids of unequal frequency, as in text."""
    drawn = torch.rand(batch, length, generator=torch.Generator().manual_seed(seed))
    return (drawn.pow(2) * V).long()


def build(seed=0, **changes):
    torch.manual_seed(seed)
    sizes = dict(n_layers=2, encoder_layers=3, training_steps=100, inference_steps=10, objective="ce", latent_layer=0)
    sizes |= dict(schedule="information", noise_scale=0.0, ramp=16.0, next_weight=0.2, next_share=0.2)
    model = Diffuser(**SIZES, **(sizes | changes))
    model.start_from(Transformer(**SIZES, n_layers=3), tokens(100).flatten())
    return model


def fit(model, x, y, steps, lr):
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95))
    for _ in range(steps):
        optimizer.zero_grad()
        loss, report = model(x, y)
        (loss / x.numel()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    return loss, report


def unigram(model):
    """Make the network predict only the unigram prior."""
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.weight[:, 0] = model.log_prior
    model.hidden_denoise = lambda z, k: F.one_hot(torch.zeros_like(k), C).float()
    return model.eval()


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("latent_layer", [0, 2])
def test_next_mode_is_causal(bf16, latent_layer):
    model = build(latent_layer=latent_layer, objective="mse").eval()
    for k in (1, 7, T - 1):
        x = tokens(2)
        other = x.clone()
        other[:, k:] = (x[:, k:] + 1) % V
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            moved = (model(x) - model(other)).float().abs()
        assert moved[:, :k].max() < (1e-2 if bf16 else 1e-5)
        assert moved[:, k:].max() > 1e-3


def test_next_mode_has_a_likelihood():
    model, x, y = build().eval(), tokens(3), tokens(3, seed=1)
    y[0, :5] = -100
    _, report = model(x, y)
    nats = F.cross_entropy(model(x).transpose(1, 2), y, reduction="none")  # 0 where -100
    assert (report["nll"] - nats).abs().max() < 1e-5
    assert all((numbers[0, :5] == 0).all() for numbers in report.values())
    with pytest.raises(ValueError, match="25.*24"):
        model(tokens(1, T + 1))


@pytest.mark.parametrize(
    "objective, schedule, latent_layer",
    [("ce", schedule, 0) for schedule in ("information", "cosine", "linear")]
    + list(itertools.product(["mse"], ["information", "cosine", "linear"], [0, 1])),
)
def test_every_parameter_learns_and_the_encoder_stays(objective, schedule, latent_layer):
    model = build(objective=objective, schedule=schedule, latent_layer=latent_layer)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad} | dict(model.named_buffers())
    frozen = {n: t.clone() for n, t in frozen.items()}
    loss, report = fit(model, tokens(4), tokens(4, seed=1), steps=2, lr=1e-3)
    assert torch.isfinite(loss) and (report["loss"].sum() - loss).abs() < 1e-3 * loss
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert torch.isfinite(p.grad).all() and p.grad.abs().sum() > 0, name
        else:
            assert p.grad is None
    after = model.state_dict()
    assert any(name.startswith("encoder") for name in frozen) == bool(latent_layer) and "embedding.weight" in frozen
    assert all(torch.equal(t, after[n]) for n, t in frozen.items() if n in after)
    assert not any(block.training for block in model.encoder)
    ids = model.eval().sample(2, T, 3, 1.0, torch.Generator().manual_seed(0), "ancestral")
    assert ids.shape == (2, T) and ids.min() >= 0 and ids.max() < V


def test_hidden_layers_need_the_squared_error():
    with pytest.raises(ValueError, match="latent_layer 1"):
        build(latent_layer=1)
    with pytest.raises(ValueError, match="latent_layer 4"):
        build(latent_layer=4, objective="mse")


def test_gradients_equal_those_of_the_whole_logits():
    """The chunked loss, against the formula over (B, T, V) in one piece."""
    model, x, y = build(next_share=1.0), tokens(4), tokens(4, seed=1)
    parameters = [p for p in model.parameters() if p.requires_grad]
    torch.manual_seed(3)
    gradients = torch.autograd.grad(model(x, y)[0], parameters)
    torch.manual_seed(3)
    k, eps = model._draw(x.shape, None)
    r = model.noise[k]
    z = model.latents(x) + r[..., None] * eps
    distance = (z[:, :, None] - model.table).pow(2).sum(-1)  # (B, T, V)
    logits = F.linear(model.hidden_denoise(z, k), model.head.weight) - distance / 2 / r[..., None] ** 2
    nats = F.cross_entropy(logits.transpose(1, 2), x, reduction="none")
    noisy = k > 0
    weights = torch.where(noisy, 1 / noisy.float().mean(1, keepdim=True).clamp_min(0.05), 0.05)
    next_nats = F.cross_entropy(model(x).transpose(1, 2), y, reduction="sum")
    wanted = torch.autograd.grad((weights * nats).sum() + 0.2 * next_nats, parameters)
    for a, b in zip(gradients, wanted, strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max()


def test_it_overfits_one_batch():
    model, x = build(), tokens(2).repeat(8, 1)  # two windows, each with the noise of eight
    y = x.roll(-1, 1)
    fit(model, x, y, steps=150, lr=5e-3)
    accuracy = model.eval()(x, y)[1]["accuracy_25"].mean()
    assert accuracy > 0.95, accuracy


def test_noise_levels_are_even_in_information():
    model = build()
    assert (model.noise[1:] > model.noise[:-1]).all()
    share = posterior_entropy(model.noise, model.table, model.log_prior)
    share = share / -(model.log_prior.exp() * model.log_prior).sum()
    assert (share - torch.linspace(0.005, 0.985, 101)).abs().max() < 0.01
    for schedule in ("cosine", "linear"):
        noise = build(schedule=schedule).noise
        assert (noise[1:] > noise[:-1]).all() and noise[0] > 0


@pytest.mark.parametrize("latent_layer", [0, 2])
def test_latents_have_unit_variance(latent_layer):
    model = build(latent_layer=latent_layer, objective="mse")
    x = model.latents(tokens(100))
    assert x.mean((0, 1)).abs().max() < 0.01 and (x.var((0, 1)) - 1).abs().max() < 0.05
    if not latent_layer:
        assert (x - model.table[tokens(100)]).abs().max() < 1e-5


def test_ddim_with_an_oracle_returns_the_latent():
    model = build()
    x = model.latents(tokens(2))
    r = torch.cat([model.noise.flip(0), torch.zeros(1)])[:, None, None].expand(-1, *x.shape[:2])
    z = r[0][..., None] * torch.randn(x.shape)
    for before, after in zip(r, r[1:], strict=False):
        z = denoise(z, x, before, after, None)
    assert (z - x).abs().max() < 1e-4


@pytest.mark.parametrize("sampler, ramp, steps", [("ancestral", 16.0, 10), ("ancestral", 0.0, 10), ("ddim", 0.0, 50)])
def test_samplers_reproduce_the_unigram_prior(sampler, ramp, steps):
    model = unigram(build(ramp=ramp))
    ids = model.sample(400, T, steps, 1.0, torch.Generator().manual_seed(0), sampler)
    share = torch.bincount(ids.flatten(), minlength=V) / ids.numel()
    assert (share - model.log_prior.exp()).abs().sum() / 2 < 0.05  # total variation; 0.02 is sampling noise


def test_the_order_of_tokens_matters_and_a_prompt_is_held():
    model = build().eval()
    z, k, flip = model.latents(tokens(2)), torch.full((2, T), 50), torch.arange(T - 1, -1, -1)
    h = model.hidden_denoise(z, k)
    assert (h - model.hidden_denoise(z[:, flip], k)[:, flip]).abs().max() > 1e-2
    prompt = tokens(1, 5)
    for sampler in ("ancestral", "ddim"):
        draw = [model.sample(3, T, 0, 0.8, torch.Generator().manual_seed(s), sampler, prompt) for s in (0, 0, 1)]
        assert torch.equal(draw[0], draw[1]) and not torch.equal(draw[0], draw[2])
        assert (draw[0][:, :5] == prompt).all()


def test_evaluation_repeats_bit_for_bit():
    model, x, y = build().eval(), tokens(6), tokens(6, seed=1)
    index = torch.tensor([5, 17, 3, 400, 0, 9])
    _, batched = model(x, y, index)
    torch.manual_seed(99)
    for size in (6, 4, 1):
        parts = [model(x[i : i + size], y[i : i + size], index[i : i + size])[1] for i in range(0, 6, size)]
        for name, numbers in batched.items():
            assert torch.equal(numbers, torch.cat([p[name] for p in parts])), (name, size)


def test_state_dict_restores_everything():
    model, other = build(latent_layer=1, objective="mse"), build(seed=1, latent_layer=1, objective="mse")
    other.load_state_dict(model.state_dict())
    x, y = tokens(2), tokens(2, seed=1)
    loaded, wanted = (m.eval()(x, y)[1] for m in (other, model))
    assert all(torch.equal(loaded[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("sampler", ["ancestral", "ddim"])
def test_temperature_0_takes_the_likeliest_tokens(sampler):
    model = build().eval()
    drawn = [
        model.sample(1, T, 8, temperature, torch.Generator().manual_seed(1), sampler)
        for temperature in (0.0, 1e-40, 1e-7)
    ]
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2])
    assert 0 <= drawn[0].min() and drawn[0].max() < V


def test_top_k_and_top_p_of_one_token_are_temperature_0_at_the_last_step():
    model = build().eval()
    sizes = dict(n=1, length=T, steps=1, temperature=1.0, sampler="ancestral")
    draws = [dict(), dict(top_k=1), dict(top_p=0.0), dict(temperature=0.0)]
    free, one, none, greedy = (
        model.sample(**(sizes | draw), generator=torch.Generator().manual_seed(1)) for draw in draws
    )
    assert torch.equal(one, greedy) and torch.equal(none, greedy) and not torch.equal(free, greedy)
