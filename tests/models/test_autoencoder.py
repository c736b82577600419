"""Encoders, decoders and latent spaces in all combinations, messages, judges."""

import itertools
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from models.autoencoder import AutoEncoder, loss_sums
from models.gan import (
    Discriminator,
    LatentCritic,
    adaptive_weight,
    critic_loss,
    critic_pull,
    frozen,
    gradient_norms,
    hinge_discriminator,
    hinge_generator,
)
from models.messages import MessageLayer, message_weights
from models.parts import DECODERS, ENCODERS, LATENT_SPACES

KINDS = list(DECODERS)
B, T, FEATURES, TYPES, D = 4, 6, 5, 8, 4
SIZES = dict(encoder="mlp", decoder="mlp", latent_space="none", level="token", cont_dim=FEATURES, n_tokens=T,
             num_types=TYPES, n_globals=3, latent_dim=D, hidden=(12,), gnn_dim=16, gnn_layers=2, activation="gelu",
             dropout=0.0, side_info=False, noise_dim=3, codebook_size=16, beta=0.25, ema_decay=0.9, revive=0.1,
             denoise=False)  # fmt: skip


def build(**changes):
    torch.manual_seed(0)
    return AutoEncoder(**SIZES | changes)


def events(seed=0):
    """Four events, one of them without particles -> x, ids, mask, globals."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(T) < torch.tensor([3, T, 0, 1])[:, None]
    ids = torch.randint(1, TYPES, (B, T), generator=g) * mask
    x = torch.randn(B, T, FEATURES, generator=g).masked_fill(~mask[..., None], 0)
    return x, ids, mask, torch.randn(B, 3, generator=g)


def noised(denoise):
    return dict(x_t=torch.randn(B, T, FEATURES), t=torch.tensor([1, 5, 900, 1000])) if denoise else {}


def fill_zeros(model):
    """Initialize weights that start at zero, since those block gradients to earlier layers."""
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.3)
    return model


def loss_of(model, data, denoise):
    out = model(*data, **noised(denoise))
    x, ids, _, globals = data
    sums = loss_sums(out, x, ids, globals, model.level)
    return out, sum(sums[n][0] / sums[n][1] for n in sums if n not in ("type_accuracy", "revived"))


@pytest.mark.parametrize("level", ["token", "event"])
@pytest.mark.parametrize("denoise", [False, True], ids=["ae", "denoise"])
@pytest.mark.parametrize("latent_space", LATENT_SPACES)
def test_every_parameter_gets_a_finite_gradient(latent_space, denoise, level):
    data = events()
    for encoder, decoder, side_info in itertools.product(ENCODERS, DECODERS, [False, True]):
        name = f"{encoder} {decoder} side_info {side_info}"
        model = fill_zeros(build(encoder=encoder, decoder=decoder, latent_space=latent_space, denoise=denoise,
                                 level=level, side_info=side_info))  # fmt: skip
        out, loss = loss_of(model, data, denoise)
        loss.backward()
        assert out["x_hat"].shape == (B, T, FEATURES) and out["rec_globals"].shape == (B, 3), name
        assert out["z_e"].shape == out["z_q"].shape == ((B, T, D) if level == "token" else (B, D)), name
        assert side_info == (out["type_logits"] is None), name
        assert (out["indices"] is None) == (latent_space != "vq"), name
        for key, p in model.named_parameters():
            assert p.grad is not None and p.grad.isfinite().all(), f"{name}: {key}"
            once = decoder == "diffusion" and not denoise and key == "decoder.network.inward.weight"  # its x_T is 0
            assert p.grad.any() or once, f"{name}: {key} has no part in the loss"
        assert model.last_weight().shape[0] in (FEATURES, T * FEATURES)


@pytest.mark.parametrize("level", ["token", "event"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_empty_slots_do_not_matter(kind, level):
    x, ids, mask, globals = events()
    model = build(encoder=kind, decoder=kind, level=level, latent_space="vq", denoise=True).eval()
    junk = torch.where(mask[..., None], x, torch.tensor(float("nan")))
    z, z_junk = (model.encode(features, ids, mask, globals) for features in (x, junk))
    torch.testing.assert_close(z_junk, z, rtol=0, atol=0)
    if level == "token":
        assert not z[~mask].any()
    x_t, t = noised(True).values()
    clean, dirty = (model.decode(z, ids, mask, features, t) for features in (x_t, x_t.masked_fill(~mask[..., None], 9)))
    torch.testing.assert_close(clean["x_hat"][mask], dirty["x_hat"][mask], rtol=0, atol=0)
    out = dict(x_hat=clean["x_hat"], type_logits=clean["type_logits"], rec_globals=clean["rec_globals"])
    out["aux"] = dict(commit=torch.zeros(()))
    one, other = (loss_sums(out, features, ids, globals, level) for features in (x, junk))
    assert one == other


@torch.no_grad()
def test_at_level_event_only_the_shape_of_ids_is_read():
    x, ids, mask, globals = events()
    for decoder in KINDS:
        model = build(decoder=decoder, level="event").eval()
        z = model.encode(x, ids, mask, globals)
        seeing, blind = model.decode(z, ids, mask), model.decode(z, 0 * ids, mask & False)
        assert all(torch.equal(seeing[name], blind[name]) for name in seeing)


@torch.no_grad()
def test_noise_of_gan_is_only_there_in_training():
    data = events()
    for part in ("encoder", "decoder"):
        model = build(**{part: "gan"})
        assert not torch.equal(model(*data)["x_hat"], model(*data)["x_hat"])
        model.eval()
        assert torch.equal(model(*data)["x_hat"], model(*data)["x_hat"])


def test_sums_are_those_of_a_loop():
    data = x, ids, mask, globals = events()
    for level in ("token", "event"):
        out = build(level=level).eval()(*data)
        sums = {name: (float(a.detach()), float(b)) for name, (a, b) in loss_sums(out, x, ids, globals, level).items()}
        features = types = right = slots = 0
        for b, s in itertools.product(range(B), range(T)):
            features += (out["x_hat"][b, s] - x[b, s]).square().sum().item() if mask[b, s] else 0
            if mask[b, s] or level == "event":
                types -= out["type_logits"][b, s].log_softmax(0)[ids[b, s]].item()
                right += (out["type_logits"][b, s].argmax() == ids[b, s]).item()
                slots += 1
        assert sums["rec_tokens"] == pytest.approx((features, 10 * FEATURES), rel=1e-5)
        assert sums["rec_types"] == pytest.approx((types, slots), rel=1e-5)
        assert sums["type_accuracy"] == (right, slots)
        squared = (out["rec_globals"] - globals).square().sum().item()
        assert sums["rec_globals"] == pytest.approx((squared, 3 * B), rel=1e-5)


def test_under_autocast():
    for encoder, decoder in zip(KINDS, KINDS[::-1], strict=True):
        model = fill_zeros(build(encoder=encoder, decoder=decoder, latent_space="vq", denoise=True))
        with torch.autocast("cpu", torch.bfloat16):
            _, loss = loss_of(model, events(), True)
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        assert model.latent.codes.dtype == torch.float32


# --- parts of one's own -----------------------------------------------------------------------
class Cut(torch.nn.Module):
    """The first numbers of each row, as an encoder or a decoder."""

    def __init__(self, *, custom_param):
        super().__init__()
        self.width = custom_param

    def forward(self, h, *rest):
        return h[..., : self.width]


def test_a_part_of_another_name_or_shape_is_an_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "my_parts", SimpleNamespace(Cut=Cut))
    for name, table in dict(encoder=ENCODERS, decoder=DECODERS, latent_space=LATENT_SPACES).items():
        with pytest.raises(ValueError, match=f"no part 'my': expected one of {', '.join(table)}"):
            build(**{name: "my"})
        monkeypatch.setitem(table, "my", "my_parts.Cut")
        with pytest.raises(ValueError, match="my needs custom_param"):
            build(**{name: "my"})
    for name in ("encoder", "decoder"):
        with pytest.raises(ValueError, match=r"Cut returned \(4, 6, 2\): expected \(4, 6, [45]\)"):
            build(**{name: "my"}, custom_param=2)(*events())
    assert build(decoder="my", custom_param=FEATURES)(*events())["x_hat"].shape == (B, T, FEATURES)


# --- messages ---------------------------------------------------------------------------------
def plain_messages(layer, x, mask):
    """Compute m edge by edge, with the first Linear on pairs and the last on each edge."""
    weight = torch.cat([layer.receiver.weight, layer.sender.weight], 1)
    m = torch.zeros_like(x)
    for b in range(len(x)):
        present = mask[b].nonzero().flatten().tolist()
        for i in range(x.shape[1]):
            if i not in present:
                m[b, i] = layer.message.bias
            for j in present if i in present else ():
                pair = F.linear(torch.cat([x[b, i], x[b, j]]), weight, layer.receiver.bias).relu()
                m[b, i] += layer.message(pair) / len(present)
    return m


@torch.no_grad()
def test_messages_equal_an_edge_list():
    torch.manual_seed(0)
    x, _, mask, _ = events()
    layer = MessageLayer(FEATURES)
    m = plain_messages(layer, x, mask)
    torch.testing.assert_close(layer.messages(x, message_weights(mask)), m, rtol=0, atol=1e-6)
    wide = layer.update(torch.cat([layer.norm(x), m], -1))
    torch.testing.assert_close(layer(x, message_weights(mask)), x + F.gelu(wide), rtol=0, atol=1e-6)


@torch.no_grad()
def test_messages_do_not_depend_on_order():
    torch.manual_seed(0)
    x, _, mask, _ = events()
    layer, order = MessageLayer(FEATURES), torch.randperm(T)
    straight = layer(x, message_weights(mask))[:, order]
    torch.testing.assert_close(layer(x[:, order], message_weights(mask[:, order])), straight, rtol=0, atol=1e-5)


# --- judges -----------------------------------------------------------------------------------
def judge():
    torch.manual_seed(1)
    return Discriminator(cont_dim=FEATURES, n_tokens=T, num_types=TYPES, n_globals=3, width=8, layers=2)


def test_discriminator():
    x, ids, mask, globals = events()
    d = judge()
    score = d(x, ids, mask, globals)
    score.square().sum().backward()
    assert score.shape == (B,)
    assert all(p.grad.isfinite().all() and p.grad.any() for p in d.parameters())
    d.eval()
    junk = torch.where(mask[..., None], x, torch.tensor(float("nan")))
    assert torch.equal(d(junk, ids, mask, globals), d(x, ids, mask, globals))
    for _ in range(30):  # each forward in training improves the estimate of the largest singular value
        d.train()(x, ids, mask, globals)
    assert torch.linalg.matrix_norm(d.network.layers[0].update.weight, 2).item() == pytest.approx(1, abs=1e-2)


def test_hinge():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 1.0])
    assert hinge_discriminator(real, fake).item() == pytest.approx(((0 + 0.5 + 2) / 3 + (0 + 1 + 2) / 3) / 2)
    assert hinge_generator(fake).item() == pytest.approx(2 / 3)


@pytest.mark.parametrize("decoder", KINDS)
def test_the_generator_step_leaves_the_discriminator_alone(decoder):
    data = x, ids, mask, globals = events()
    model, d = build(decoder=decoder), judge()
    x_hat = model(*data)["x_hat"]
    rec = (x_hat - x)[mask].square().mean()
    with frozen(d):
        adv = hinge_generator(d(x_hat, ids, mask, globals))
    w = adaptive_weight(rec, adv, model.last_weight(), 0.8)
    norms = [torch.autograd.grad(loss, model.last_weight(), retain_graph=True)[0].norm() for loss in (rec, adv)]
    assert w.item() == pytest.approx(0.8 * (norms[0] / (norms[1] + 1e-4)).item(), rel=1e-5)
    assert gradient_norms(rec, adv, model.last_weight()).tolist() == pytest.approx([n.item() for n in norms])
    assert w.ndim == 0 and not w.requires_grad
    (rec + w * adv).backward()
    assert model.last_weight().grad.any()
    assert all(p.grad is None and p.requires_grad for p in d.parameters())
    hinge_discriminator(d(x, ids, mask, globals), d(x_hat.detach(), ids, mask, globals)).backward()
    assert all(p.grad is not None for p in d.parameters())


def test_adaptive_weight_is_bounded():
    weight = torch.ones(3, requires_grad=True)
    assert adaptive_weight(weight.sum() * 1e6, weight.sum() * 0, weight, 0.5).item() == 5000
    assert adaptive_weight(weight.sum() * 0, weight.sum(), weight, 0.5).item() == 0


def test_latent_critic():
    torch.manual_seed(0)
    critic, z, drawn = LatentCritic(D), torch.randn(7, D, requires_grad=True), torch.randn(9, D)
    logits = critic(z)
    expected = F.binary_cross_entropy_with_logits(logits, torch.zeros(7))
    expected = expected + F.binary_cross_entropy_with_logits(critic(drawn), torch.ones(9))
    torch.testing.assert_close(critic_loss(critic(drawn), logits), expected)
    torch.testing.assert_close(critic_pull(logits), F.binary_cross_entropy_with_logits(logits, torch.ones(7)))
    with frozen(critic):
        critic_pull(critic(z)).backward()
    assert z.grad.any() and all(p.grad is None for p in critic.parameters())
