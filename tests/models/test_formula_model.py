"""The formula model: which tokens it sees, its cache, its grammar, its files."""

import itertools
import math

import numpy as np
import pytest
import torch
import yaml

from data_utils.errors import DataError, UsageError
from data_utils.formulas.expressions import OPERATORS, SPECIAL, Alphabet, structure
from data_utils.formulas.generate import find
from data_utils.formulas.model_files import build_model, load_model, save_model
from generate import FormulaConfig
from models.formula_model import FlashANSRModel
from models.set_transformer import NORMS

SMALL = dict(
    encoder_max_n_variables=0, encoder_dim=32, encoder_n_heads=2, encoder_n_isab=1, encoder_n_sab=1,
    encoder_n_inducing_points=5, encoder_n_seeds=4, encoder_ffn_hidden_dim=48, encoder_dropout=0.0,
    encoder_attn_norm="rms_set", encoder_ffn_norm="rms_set", encoder_output_norm="rms_set", decoder_input_dim=24,
    decoder_model_dim=32, decoder_n_heads=2, decoder_n_layers=2, decoder_max_seq_len=32, decoder_ffn_hidden_dim=48,
    decoder_dropout=0.0, decoder_block_self_attn_norm="rms", decoder_block_cross_attn_norm="rms",
    decoder_block_ffn_norm="rms", decoder_cross_attn_kv_norm="rms", decoder_output_norm="rms",
    decoder_use_rope_self_attn=True, decoder_use_rope_cross_attn=False, float_features="fourier",
    pre_encoder_noise_scale=0.1, use_checkpointing=False,
)  # fmt: skip
WHOLE = Alphabet(list(OPERATORS), ["x1", "x2", "x3"])
TOY = Alphabet(["+", "neg", "sin"], ["x1", "x2"], "<pad> <bos> <eos> <constant> <expression> </expression> <prompt> "
               "</prompt> <complexity> </complexity> <float>".split())  # fmt: skip
PLAIN = dict(temperature=1.0, top_k=0, top_p=1.0)
DECODER_NORMS = [f"decoder_{n}_norm" for n in ("block_self_attn", "block_cross_attn", "block_ffn", "output")]


def build(alphabet=WHOLE, **changes):
    torch.manual_seed(0)
    return FlashANSRModel(alphabet, **SMALL | changes).eval()


def shaken(alphabet=WHOLE, **changes):
    """Move the model away from its initial weights, where every token is equally likely."""
    model = build(alphabet, **changes)
    for parameter in model.head.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def points(batch=1, variables=3, M=8, seed=0):
    data = torch.randn(batch, M, variables + 1, generator=torch.Generator().manual_seed(seed))
    return data, torch.ones(batch, M, dtype=torch.bool)


def sequence(formula, alphabet=WHOLE, prompt=()):
    return alphabet.encode(["<bos>", *prompt, "<expression>", *formula.split(), "</expression>", "<eos>"])


def batch_of(formulas, alphabet=WHOLE, prompts=None, numbers=None, seed=0):
    """A batch as the data set makes it, on random points; prompts: tokens of each, numbers: the one at <float>."""
    prompts = prompts or [[]] * len(formulas)
    rows = [sequence(f, alphabet, p) for f, p in zip(formulas, prompts, strict=True)]
    T = max(map(len, rows)) + 1
    ids = torch.tensor([row + [0] * (T - len(row)) for row in rows])
    num = torch.full((len(rows), T, 1), math.nan)
    for i, number in enumerate(numbers or []):
        num[i, ids[i] == alphabet.ids["<float>"]] = number
    prompt_mask = torch.zeros(ids.shape, dtype=torch.bool)
    for i, prompt in enumerate(prompts):
        prompt_mask[i, 1 : 1 + len(prompt)] = True
    data, mask = points(len(rows), len(alphabet.variables), seed=seed)
    return dict(input_ids=ids, labels=torch.where(ids == 0, -100, ids)[:, 1:], prompt_mask=prompt_mask, input_num=num,
                x_tensors=data[..., :-1], y_tensors=data[..., -1:], data_attn_mask=mask)  # fmt: skip


FORMULAS = ["+ * <constant> x1 sin x2", "x3", "exp / x1 + 1 pow2 x2", "- <constant> tanh * x1 x3"]
PROMPT = "<prompt> <complexity> <float> </complexity> <allowed_term> sin x1 </allowed_term> </prompt>".split()


def test_no_token_sees_a_later_one():
    model, ids = shaken(), torch.randint(1, 69, (2, 20), generator=torch.Generator().manual_seed(1))
    data, mask = points(2)
    with torch.no_grad():
        before = model(ids, data, mask)
        for k in (1, 7, 19):
            changed = ids.clone()
            changed[:, k:] = (changed[:, k:] + 7) % 69
            after = model(changed, data, mask)
            assert (after - before)[:, :k].abs().max() < 1e-5 < (after - before)[:, k:].abs().max()


@pytest.mark.parametrize("rope", [(True, False), (False, False), (True, True)])
@pytest.mark.parametrize("shared", [False, True])
@torch.no_grad()
def test_steps_equal_the_full_forward(rope, shared):
    model = shaken(decoder_use_rope_self_attn=rope[0], decoder_use_rope_cross_attn=rope[1])
    batch = batch_of([FORMULAS[0], FORMULAS[2], FORMULAS[3]], prompts=[PROMPT] * 3, numbers=[3.0, 7.0, -1e-3])
    data, mask = points(3)
    if shared:  # one set for all rows, as in sampling
        data, mask = data[:1].expand(3, -1, -1), mask[:1].expand(3, -1)
    ids, num = batch["input_ids"], batch["input_num"]
    full = model(ids, data, mask, num)
    encoded = model.encode(data[:1], mask[:1]) if shared else model.encode(data, mask)
    state = model.init_state(encoded, 3, ids.shape[1])
    if shared:
        logits, state = model.step(ids[:1, :1], state)  # all rows share the first token
        state, start = model._fork(state, torch.zeros(3, dtype=torch.long)), 1
        torch.testing.assert_close(logits, full[:1, 0], rtol=1e-5, atol=1e-5)
    else:
        start = 11
        logits, state = model.step(ids[:, :start], state, num[:, :start])
        torch.testing.assert_close(logits, full[:, start - 1], rtol=1e-5, atol=1e-5)
    for t in range(start, ids.shape[1]):
        logits, state = model.step(ids[:, t : t + 1], state, num[:, t : t + 1])
        real = ids[:, t] > 0
        torch.testing.assert_close(logits[real], full[real, t], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_rows_in_groups_of_like_length_equal_padded_ones(monkeypatch):
    monkeypatch.setattr("models.formula_model.CPU_ROWS", 3)
    model, batch = shaken(), batch_of(FORMULAS * 2, prompts=[PROMPT, [], [], [], [], PROMPT, [], []], numbers=range(8))
    data, mask = points(8)
    ids, num = batch["input_ids"], batch["input_num"]
    h, _ = model._read(ids, num, model.encode(data, mask).keys)
    expected = model.head(h) * (ids > 0)[..., None]
    torch.testing.assert_close(model(ids, data, mask, num) * (ids > 0)[..., None], expected, rtol=1e-5, atol=1e-5)


def plain_open_slots(tokens, alphabet):
    counts, open_slots = [], 0
    for token in tokens:
        arity = alphabet.arity[token]
        if alphabet.tokens[token] == "<expression>":
            open_slots = 1
        elif open_slots and arity >= 0:
            open_slots += int(arity) - 1
        counts.append(open_slots)
    return counts


def test_open_slots_equal_a_loop():
    model, batch = build(), batch_of(FORMULAS, prompts=[PROMPT, [], PROMPT, []])
    encoded = model.encode(*points(4))
    _, open_slots = model._read(batch["input_ids"], None, encoded.keys)
    assert open_slots.tolist() == [plain_open_slots(row, WHOLE) for row in batch["input_ids"].tolist()]


@torch.no_grad()
def test_numbers_are_read_at_float_alone():
    model, batch = shaken(), batch_of(FORMULAS, prompts=[PROMPT] * 4, numbers=[2.0, 5.0, 3.0, 4.0])
    data, mask = points(4)
    logits = model(batch["input_ids"], data, mask, batch["input_num"])
    changed = torch.where(batch["input_ids"][..., None] == WHOLE.ids["<float>"], batch["input_num"], 17.5)
    assert model(batch["input_ids"], data, mask, changed).equal(logits)
    assert not model(batch["input_ids"], data, mask, batch["input_num"] + 1).equal(logits)
    without = batch_of(FORMULAS)
    assert model(without["input_ids"], data, mask, without["input_num"] * 0 + 3).equal(
        model(without["input_ids"], data, mask)
    )


@torch.no_grad()
def test_columns_beyond_float32_are_scaled_and_missing_ones_are_empty():
    model, (data, mask) = shaken(encoder_max_n_variables=6), points(2)
    ids = torch.tensor([sequence(FORMULAS[0])] * 2)
    data[:, :, 0] *= 1.5 / data[:, :, 0].abs().amax(1, keepdim=True)
    logits = model(ids, data, mask)
    far = data.double()
    far[0, :, 0] *= 2.0**-200
    far[1, :, 0] *= 2.0**500
    torch.testing.assert_close(model(ids, far, mask), logits)
    wide = torch.cat([data[..., :3], torch.zeros(2, 8, 2), data[..., 3:]], -1)
    torch.testing.assert_close(model(ids, wide, mask), logits)
    assert model.encode(wide, mask).variables.tolist() == [[True] * 3] * 2
    narrow = model.encode(data[:1, :, 2:], mask[:1])
    assert narrow.variables.tolist() == [[True, False, False]]
    rows, _ = model.sample(narrow, 200, **PLAIN, max_len=12)
    assert (rows < WHOLE.ids["x2"]).all()
    with pytest.raises(ValueError, match="8 columns.*6"):
        model(ids, torch.zeros(2, 8, 8), mask)


@torch.no_grad()
def test_loss_counts_formula_and_end_only():
    model = shaken()
    batch = batch_of(FORMULAS, prompts=[PROMPT, [], [], PROMPT], numbers=[2.0, 5.0, 3.0, 4.0])
    total, report = model.loss(batch)
    data = torch.cat([batch["x_tensors"], batch["y_tensors"]], -1)
    log_p = model(batch["input_ids"], data, batch["data_attn_mask"], batch["input_num"]).log_softmax(-1)
    plain, count = 0.0, 0
    for i, row in enumerate(batch["input_ids"].tolist()):
        begin, end = row.index(WHOLE.ids["<expression>"]) + 1, row.index(WHOLE.ids["<eos>"]) + 1
        for t in range(begin, end):
            nats = -log_p[i, t - 1, row[t]]
            plain, count = plain + nats, count + 1
            torch.testing.assert_close(report["nll"][i, t - 1], nats)
            assert report["rank"][i, t - 1] == 1 + sum(log_p[i, t - 1] > -nats)
    torch.testing.assert_close(total, plain)
    assert report["counted"].sum() == count and not report["loss"][~report["counted"]].any()
    padded = model.loss(batch | dict(labels=batch["labels"].clamp_min(0)))[0]
    assert padded == total  # labels of 0 and below are padding


def test_first_loss_is_that_of_equally_likely_tokens():
    total, report = build(encoder_dim=128, decoder_model_dim=128).loss(batch_of(FORMULAS))
    assert abs(total / report["counted"].sum() - math.log(len(WHOLE.tokens))) < 0.1


@pytest.mark.parametrize("prompts", [False, True])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("features", ["fourier", "ieee"])
def test_every_parameter_has_a_gradient(norm, prompts, features):
    norms = {
        name: norm for name in SMALL if name.endswith("norm") and not (norm == "rms_set" and name in DECODER_NORMS)
    }
    model = build(**norms, float_features=features, encoder_dropout=0.1, decoder_dropout=0.1).train()
    batch = batch_of(FORMULAS, prompts=[PROMPT] * 4 if prompts else None, numbers=[1.0] * 4 * prompts)
    model.loss(batch)[0].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert prompts or name == "number.weight" or parameter.grad.any(), name


def test_checkpointing_changes_no_gradient():
    gradients = []
    for use_checkpointing in (False, True):
        model = build(use_checkpointing=use_checkpointing).train()
        model.loss(batch_of(FORMULAS))[0].backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_one_batch_overfits():
    model, batch = build().train(), batch_of(FORMULAS * 2, seed=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        total, report = model.loss(batch)
        loss = total / report["counted"].sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05


def test_samples_of_an_untrained_model_parse_and_fit():
    model, (data, mask) = build(), points()
    data[..., 1] = 0  # there is no x2
    encoded = model.encode(data, mask)
    for max_len, n in ((32, 3000), (9, 1000), (5, 1000)):
        rows, log_p = model.sample(encoded, n, **PLAIN, max_len=max_len)
        assert rows.dtype == torch.uint8 and len(rows) == n and rows.shape[1] <= max_len - 4
        arity = WHOLE.arity[rows.numpy()]
        structure(arity)  # raises if a row is not exactly one formula
        assert ((arity >= 0) == (rows.numpy() > 0)).all() and not (rows == WHOLE.ids["x2"]).any()
        assert (log_p < 0).all() and len({bytes(row) for row in rows.numpy()}) > (n / 4 if max_len > 5 else 7)


def every_formula(alphabet, length, leaves):
    """All prefix words of at most `length` tokens, by recursion."""
    if length < 1:
        return []
    words = [[leaf] for leaf in leaves]
    for name in alphabet.operators:
        parts = every_formula(alphabet, length - 1, leaves)
        for children in itertools.product(parts, repeat=OPERATORS[name].arity):
            word = [name, *itertools.chain(*children)]
            words += [word] * (len(word) <= length)
    return words


@torch.no_grad()
def plain_scores(model, encoded_of, formulas, length, prompt=(), number=None):
    """Log-probability of each formula within the grammar, token by token from the full forward."""
    alphabet, scores = model.alphabet, []
    for formula in formulas:
        ids = torch.tensor([sequence(" ".join(formula), alphabet, prompt)])
        num = torch.full((*ids.shape, 1), number or 0.0)
        logits, open_slots, score = model(ids, *encoded_of, num)[0], 1, 0.0
        for t, token in enumerate(formula):
            fits = [i for i, arity in enumerate(alphabet.arity) if 0 <= arity <= length - t - open_slots]
            log_p = logits[len(prompt) + 1 + t, fits].log_softmax(0)
            score += log_p[fits.index(alphabet.ids[token])].item()
            open_slots += int(alphabet.arity[alphabet.ids[token]]) - 1
        scores.append(score)
    return scores


TOY_PROMPT = "<prompt> <complexity> <float> </complexity> </prompt>".split()


@pytest.mark.parametrize("prompt", [[], TOY_PROMPT])
def test_beam_and_samples_equal_the_search_of_all_formulas(prompt):
    model, data = shaken(TOY), points(variables=2)
    formulas = every_formula(TOY, 4, ["x1", "x2", "<constant>"])
    assert len(formulas) == 3 + 6 + (12 + 9) + (24 + 18 + 36)
    scores = plain_scores(model, data, formulas, 4, prompt, 3.0)
    assert abs(sum(map(math.exp, scores)) - 1) < 1e-4  # the grammar is neither too wide nor too narrow
    best = sorted(range(len(formulas)), key=lambda i: -scores[i])
    options = dict(max_len=len(prompt) + 8, prompt=TOY.encode(prompt), numbers=[0.0, 0.0, 3.0, 0.0, 0.0][: len(prompt)])
    for width in (200, 108, 60):
        rows, log_p = model.beam(model.encode(*data), width, **options)
        order = best[:width]
        torch.testing.assert_close(log_p, torch.tensor([scores[i] for i in order]), rtol=1e-4, atol=1e-4)
        assert [TOY.decode(row) for row in rows[:20].numpy()] == [formulas[i] for i in order[:20]]

    generator = torch.Generator().manual_seed(0)
    rows, log_p = model.sample(model.encode(*data), 20000, **PLAIN, **options, generator=generator)
    place = {tuple(formula): i for i, formula in enumerate(formulas)}
    drawn = torch.tensor([place[tuple(TOY.decode(row))] for row in rows.numpy()])
    torch.testing.assert_close(log_p, torch.tensor(scores)[drawn], rtol=1e-4, atol=1e-4)
    p = torch.tensor(scores).exp()
    expected = 20000 * p
    chi_square = ((drawn.bincount(minlength=len(p)) - expected).square() / expected)[expected > 5].sum()
    freedom = (expected > 5).sum()
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5


def test_samples_repeat_with_their_generator_and_stay_in_the_likeliest_tokens():
    model = shaken(TOY)
    encoded = model.encode(*points(variables=2))

    def draw(n=300, seed=0, **changes):
        generator = torch.Generator().manual_seed(seed)
        rows, log_p = model.sample(encoded, n, **PLAIN | changes, max_len=12, generator=generator)
        return [tuple(TOY.decode(row)) for row in rows.numpy()], log_p

    def first(**changes):
        return {row[0] for row in draw(2000, **changes)[0]}

    assert draw()[0] == draw()[0] != draw(seed=1)[0]
    greedy, log_p = draw(top_k=1)
    assert len(set(greedy)) == 1 and set(draw(temperature=1e-3)[0]) == set(greedy) == set(draw(top_p=1e-6)[0])
    everything = plain_scores(model, points(variables=2), [list(greedy[0])], 8)
    torch.testing.assert_close(log_p[0].item(), everything[0], rtol=1e-4, atol=1e-4)
    ids = torch.tensor([TOY.encode(["<bos>", "<expression>"])])
    with torch.no_grad():
        likely = model(ids, *points(variables=2))[0, -1].masked_fill(torch.from_numpy(TOY.arity) < 0, -torch.inf)
    p, order = likely.softmax(0).sort(descending=True)
    assert first(top_k=3) == {TOY.tokens[i] for i in order[:3]}
    assert first(top_p=(p[0] + p[1] / 2).item()) == {TOY.tokens[i] for i in order[:2]}


@pytest.mark.slow
def test_a_toy_model_obeys_complexity():
    leaves, rng = ["x1", "x2", "<constant>"], np.random.default_rng(0)
    by_length = {k: [w for w in every_formula(TOY, 5, leaves) if len(w) == k] for k in range(1, 6)}
    model = build(TOY, encoder_n_isab=0).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for step in range(250):
        optimizer.param_groups[0]["lr"] = 4e-3 * (1 - step / 250)
        lengths = rng.integers(1, 6, 64)
        formulas = [" ".join(by_length[k][rng.integers(len(by_length[k]))]) for k in lengths]
        batch = batch_of(formulas, TOY, [TOY_PROMPT] * 64, lengths.tolist())
        total, report = model.loss(batch)
        optimizer.zero_grad()
        (total / report["counted"].sum()).backward()
        optimizer.step()
    encoded = model.eval().encode(*points(variables=2))
    for length in range(1, 6):
        options = dict(prompt=TOY.encode(TOY_PROMPT), numbers=[0.0, 0.0, length, 0.0, 0.0])
        rows, _ = model.sample(encoded, 100, **PLAIN, max_len=24, **options)
        assert ((rows > 0).sum(1) == length).float().mean() > 0.8


def test_what_was_saved_is_loaded(tmp_path):
    model = shaken(float_features="ieee")
    save_model(model, tmp_path / "run", simplify=True)
    again = load_model(tmp_path / "run")
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["model.yaml", "state_dict.pt", "tokenizer.yaml"]
    assert again.model_args == model.model_args and again.alphabet.tokens == WHOLE.tokens
    assert yaml.safe_load((tmp_path / "run" / "model.yaml").read_text())["simplify"] is True
    assert yaml.safe_load((tmp_path / "run" / "tokenizer.yaml").read_text()) == dict(
        special_tokens=SPECIAL, operators=list(OPERATORS), variables=["x1", "x2", "x3"]
    )
    weights = torch.load(tmp_path / "run" / "state_dict.pt", weights_only=True)
    assert all(weights[name].equal(tensor) for name, tensor in model.state_dict().items())
    ids = torch.tensor([sequence(FORMULAS[0])])
    assert again(ids, *points()).equal(model(ids, *points())) and not again.training


def test_folders_that_are_no_model_are_refused(tmp_path):
    with pytest.raises(UsageError, match="model.yaml, tokenizer.yaml, state_dict.pt"):
        load_model(tmp_path)
    model = build()
    save_model(model, tmp_path)
    config = yaml.safe_load((tmp_path / "model.yaml").read_text())

    def refused(error, match, name, content):
        good = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content)
        with pytest.raises(error, match=match):
            load_model(tmp_path)
        (tmp_path / name).write_bytes(good)

    less = {key: value for key, value in config.items() if key != "encoder_dim"}
    refused(UsageError, "model.yaml has no encoder_dim", "model.yaml", yaml.safe_dump(less).encode())
    refused(UsageError, "not of the model", "model.yaml", yaml.safe_dump(config | dict(encoder_dim=64)).encode())
    refused(UsageError, "tokenizer.yaml has no special_tokens", "tokenizer.yaml", b"operators: []\nvariables: [x1]\n")
    refused(DataError, "can't be read", "model.yaml", b"a: !!python/object/apply:os.system ['true']\n")
    refused(DataError, "found list", "tokenizer.yaml", b"- 1\n")
    weights = (tmp_path / "state_dict.pt").read_bytes()
    refused(DataError, "state_dict.pt can't be read", "state_dict.pt", weights[: len(weights) // 2])
    middle = len(weights) // 2
    flipped = weights[:middle] + bytes([weights[middle] ^ 1]) + weights[middle + 1 :]
    refused(DataError, "state_dict.pt can't be read", "state_dict.pt", flipped)
    torch.save([1, 2], tmp_path / "list.pt")
    refused(DataError, "found list", "state_dict.pt", (tmp_path / "list.pt").read_bytes())
    load_model(tmp_path)


def test_what_is_never_written_is_left_alone(tmp_path, monkeypatch):
    save_model(build(), tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("data_utils.formulas.model_files.torch.save", full_disk)
    with pytest.raises(DataError, match="state_dict.pt was not written.*No space"):
        save_model(shaken(), tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    "changes, match",
    [
        (dict(encoder_dim=33), "encoder_dim 33 with encoder_n_heads 2: expected a multiple"),
        (dict(decoder_model_dim=36, decoder_n_heads=4), "decoder_model_dim 36 with decoder_n_heads 4.* an even"),
        (dict(encoder_max_n_variables=3), "encoder_max_n_variables 3: 3 variables and y take 4"),
        (dict(encoder_n_seeds=0), "encoder_n_seeds 0: expected 1"),
        (dict(decoder_n_layers=-1), "decoder_n_layers -1: expected 1"),
        (dict(float_features="bits"), "bits: expected fourier or ieee"),
        (dict(decoder_output_norm="rms_set"), "decoder_output_norm rms_set"),
        (dict(encoder_attn_norm="batch"), "batch"),
    ],
)
def test_sizes_that_cannot_be_are_refused(changes, match):
    with pytest.raises(ValueError, match=match):
        build(**changes)
    if "decoder_model_dim" in changes:
        build(**changes, decoder_use_rope_self_attn=False)


def test_the_door_of_the_model_names_flags_and_files(tmp_path):
    with pytest.raises(UsageError, match="^--encoder_dim 33 with --encoder_n_heads 2: expected a multiple"):
        build_model(WHOLE, SMALL | dict(encoder_dim=33))
    save_model(build(), tmp_path)
    config = yaml.safe_load((tmp_path / "model.yaml").read_text())
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(config | dict(encoder_n_heads=5)))
    with pytest.raises(UsageError, match="model.yaml: encoder_dim 32 with encoder_n_heads 5"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "flags, words",
    [
        (dict(temperature=0.0), "--temperature 0.0: expected more than 0"),
        (dict(top_k=-1), "--top_k -1: expected 0"),
        (dict(top_p=2.0), "--top_p 2.0: expected more than 0, at most 1"),
        (dict(max_len=4), "--max_len 4: expected 5"),
    ],
)
def test_flags_that_nothing_can_be_drawn_with_are_named(tmp_path, flags, words):
    save_model(build(), tmp_path)
    points = tmp_path / "points.csv"
    points.write_text("x,y\n" + "".join(f"{x},{x * x}\n" for x in range(9)))
    with pytest.raises(UsageError, match=f"^{words}"):
        find(FormulaConfig(**dict(model=str(tmp_path), data=str(points), device="cpu", max_len=32) | flags))


def test_what_cannot_be_decoded_is_refused():
    model = build(TOY)
    encoded = model.encode(*points(variables=2))
    with pytest.raises(ValueError, match="max_len 33.* 5 .* 32"):
        model.sample(encoded, 4, **PLAIN, max_len=33)
    with pytest.raises(ValueError, match="max_len 9: expected 10"):
        model.beam(encoded, 4, max_len=9, prompt=TOY.encode(TOY_PROMPT))
    for changes in (dict(temperature=0.0), dict(top_p=0.0), dict(top_k=-1)):
        with pytest.raises(ValueError, match=next(iter(changes))):
            model.sample(encoded, 4, **PLAIN | changes, max_len=9)
    with pytest.raises(ValueError, match="40 tokens.*32"):
        model(torch.zeros(1, 40, dtype=torch.long), *points(variables=2))
    with pytest.raises(ValueError, match="<expression>"):
        build(Alphabet(["+"], ["x1"], ["<pad>", "<bos>", "<eos>", "<constant>", "</expression>"]))


def test_autocast_keeps_the_loss():
    model, batch = shaken().train(), batch_of(FORMULAS)
    exact = model.loss(batch)[0]
    with torch.autocast("cpu", torch.bfloat16):
        total, _ = model.loss(batch)
    total.backward()
    assert total.dtype == torch.float32 and abs(total / exact - 1) < 0.02
