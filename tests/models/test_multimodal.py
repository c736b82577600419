"""The model of train_multimodal.py: gradients, paths, steps, each of its parts."""

from dataclasses import asdict
from itertools import product

import numpy as np
import pytest
import torch

from data_utils.pages.rolling_batch import batch_of
from data_utils.pages.tasks import Task, open_tasks
from models import halting
from models.glyphs import COLOUR, HOLE, PADDING, SYMBOLS
from models.halting import CONTINUE, HaltingAgent
from models.multimodal import LATE, Multimodal, Places, Quantizer, log_stablemax
from models.optim.adam_atan2 import AdamAtan2
from models.planning import all_paths, pick

KNOWN = dict(
    read=Task("read", "text", 2, 3, 6, causal=False, cells=2, ids=0),
    fill=Task("fill", "text", 2, 3, 5, causal=True, cells=2, ids=0),
    sudoku4=Task("sudoku4", "grid", 4, 4, 16, causal=False, cells=1, ids=0),
    maze=Task("maze", "grid", 3, 3, 9, causal=False, cells=1, ids=0),
    arc=Task("arc", "grid", 2, 3, 6, causal=False, cells=1, ids=5),
)
SIZES = dict(hidden_size=16, num_heads=2, H_cycles=2, L_cycles=1, L_layers=1, mixer="attention", norm="post",
             relation_bias=False, bottleneck="capsules", num_capsules=3, augment=False, supervision_steps=5,
             text_supervision_steps=4, loss="stablemax", paths=3, latent_planning_depth=2, use_vq_codebook=True,
             vq_size=64, vq_dim=4, vq_groups=2, vq_beta=0.25, enable_memory=True, memory_slots=8, memory_dim=4,
             memory_top_k=2, enable_mtp=True, decoder_layers=1, enable_dqn=True,
             enable_gradient_checkpointing=False)  # fmt: skip
PLAIN = dict(use_vq_codebook=False, enable_memory=False, enable_mtp=False, enable_dqn=False)  # and paths=1: nothing on
AGENT = dict(capacity=200, gamma=0.99, tau=0.1, epsilon=0.3, warmstart=0, step_cost=0.01)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(tasks=("read", "fill", "arc"), **changes):
    torch.manual_seed(0)
    return Multimodal(tasks={name: asdict(KNOWN[name]) for name in tasks}, **SIZES | changes)


def batch(model, name, count=3, seed=1):
    """Build random pages and answers; the last answer of a text is shorter."""
    task, g = KNOWN[name], torch.Generator().manual_seed(seed)
    low, high = (0, COLOUR) if task.kind == "text" else (COLOUR, HOLE)
    page = torch.randint(low, high, (count, task.rows, task.cols), generator=g, dtype=torch.uint8)
    target = torch.randint(low, high, (count, task.length), generator=g, dtype=torch.uint8)
    if task.kind == "text":
        target[-1, -2:] = PADDING
    ids = torch.randint(max(1, task.ids), (count,), generator=g)
    samples = dict(page=page, target=target, id=ids)
    return batch_of(samples, name, task, model.augment, seed, np.arange(count))


def total(aux):
    return sum(aux[name] for name in ("ce", "halt_loss", "vq_loss", "mtp_loss") if name in aux)


def fill_memory(model):
    """Add entries of samples that occur in no batch here."""
    g = torch.Generator().manual_seed(5)
    x, values = torch.randn(2, 5, model.starts.shape[1], generator=g)
    model.memory.write(x, values, torch.arange(-9, -4), torch.ones(5, dtype=torch.bool))


# ---- gradients -------------------------------------------------------------------------------------------------------


def without_gradient(model):
    """Return the names of parameters without a gradient after two steps of each task, as in train_multimodal.py."""
    agent = HaltingAgent(model.agent, **AGENT) if hasattr(model, "agent") else None
    for name in model.tasks:
        here, carry, before = batch(model, name), None, None
        for step in range(2):
            carry, outputs = model(carry or model.initial_carry(here), here)
            aux = outputs["aux"]
            loss = total(aux)
            if agent:
                features = agent.net.features(aux["z_mean"], carry["steps"] / 4, outputs["q_halt"], aux["confidence"],
                                           aux["changed"])  # fmt: skip
                now = dict(features=features, accuracy=aux["accuracy"], right=aux["right"], last=carry["halted"])
                now["action"] = torch.full((3,), CONTINUE)
                if before:
                    agent.store(before, now)
                    loss = loss + agent.loss(4, torch.Generator().manual_seed(step))
                before = now
            if hasattr(model, "memory"):
                model.memory.write(aux["x_mean"], aux["z_mean"], here["index"], torch.ones(3, dtype=torch.bool))
            loss.backward()
            assert loss.isfinite()
    norms = {n: 0.0 if p.grad is None else p.grad.norm().item() for n, p in model.named_parameters()}
    return [name for name, norm in norms.items() if not norm > 0]


BOTTLENECKS = [("capsules", False), ("capsules", True), ("patches", False), ("patches", True), ("tokens", False)]


@pytest.mark.parametrize("bottleneck, augment", BOTTLENECKS)
def test_every_parameter_gets_a_gradient(bottleneck, augment, monkeypatch):
    monkeypatch.setattr(halting, "LEARN_FROM", 1)
    for paths, vq, memory, mtp, dqn in product((1, 2), *[(False, True)] * 4):
        if not vq or bottleneck == "capsules":
            model = build(["fill", "arc"], bottleneck=bottleneck, augment=augment, paths=paths, use_vq_codebook=vq,
                          enable_memory=memory, enable_mtp=mtp, enable_dqn=dqn)  # fmt: skip
            assert without_gradient(model) == [], (paths, vq, memory, mtp, dqn)


CHOICES = [
    dict(mixer="mlp_t"), dict(mixer="mlp_t", bottleneck="capsules"), dict(mixer="mlp_t", bottleneck="tokens"),
    dict(relation_bias=True), dict(relation_bias=True, bottleneck="tokens"), dict(loss="softmax"),
    dict(mixer="mlp_t", tasks=["fill"]), dict(tasks=["arc"]), dict(norm="pre"), dict(norm="pre", bottleneck="capsules"),
    dict(tasks=["maze"], relation_bias=True), dict(tasks=["maze"], relation_bias=True, bottleneck="tokens"),
    dict(mixer="mlp_t", tasks=["read"]),
    SIZES | dict(augment=True, enable_dqn=False, tasks=["read", "fill", "sudoku4"]),
]  # fmt: skip


@pytest.mark.parametrize("choice", CHOICES, ids=range(len(CHOICES)))
def test_every_choice_is_built_and_stepped(choice):
    model = build(**dict(tasks=["sudoku4"], bottleneck="patches") | PLAIN | choice)
    assert without_gradient(model) == []


REFUSED = [
    (dict(mixer="mlp_t"), "mixer mlp_t .* tasks read fill arc\ntry: tasks=read"),
    (dict(bottleneck="patches"), "try: use_vq_codebook=false"),
    (dict(tasks=["read"]), "try: enable_mtp=false"),
    (dict(tasks=["sudoku4"], enable_mtp=False, relation_bias=True), "relation_bias needs a single grid task"),
    (dict(tasks=["read"], enable_mtp=False, bottleneck="tokens", use_vq_codebook=False, relation_bias=True), "grid"),
    (dict(paths=17), "17 paths in 16 dimensions"),
    (dict(num_heads=3), "hidden_size 16 over num_heads 3"),
    (dict(num_heads=16), "even"),
]


@pytest.mark.parametrize("changes, words", REFUSED, ids=[words for _, words in REFUSED])
def test_parts_that_do_not_go_together(changes, words):
    with pytest.raises(ValueError, match=words):
        build(**changes)


def test_places_are_those_of_the_largest_page():
    places = Places([(2, 5), (4, 1)], d_model=3, std=0.02)
    assert places.rows.shape == (4, 3) and places.columns.shape == (5, 3)
    vectors = places(2, 5)
    assert all(torch.equal(vectors[5 * i + j], places.rows[i] + places.columns[j]) for i in range(2) for j in range(5))


def test_parts_that_begin_without_a_gradient_are_named():
    names = {name.split(".")[0] for name, _ in build().named_parameters()}
    assert {name.rstrip(".") for name in LATE} < names


def test_recomputing_activations_changes_no_gradient():
    gradients = []
    for recompute in (False, True):
        model = build(enable_gradient_checkpointing=recompute)
        here = batch(model, "read")
        total(model(model.initial_carry(here), here)[1]["aux"]).backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None and not p.grad.is_sparse])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_stablemax():
    logits = torch.tensor([[-1.0, 0.0, 1.0, 2.0], [1.0, 1.0, 1.0, 1.0], [-30.0, -1.0, 0.0, 30.0]], requires_grad=True)
    s = torch.tensor([[1 / (1 - x) if x < 0 else x + 1 for x in row] for row in logits.tolist()])
    log_p = log_stablemax(logits)
    torch.testing.assert_close(log_p.exp(), s / s.sum(1, keepdim=True))
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = logits.detach().to(dtype).requires_grad_()
        log_stablemax(x)[:, 0].sum().backward()
        assert log_stablemax(x).isfinite().all() and x.grad.isfinite().all()
    exact = logits.detach().double().requires_grad_()
    assert torch.autograd.gradcheck(log_stablemax, [exact + 0.1])


def test_nats_are_of_what_is_scored():
    for loss in ("stablemax", "softmax"):
        model = build(loss=loss)
        for name in ("read", "fill"):
            task, target = KNOWN[name], batch(model, name)["target"]
            logits = torch.randn(3, task.length, SYMBOLS)
            log = logits.log_softmax(-1) if task.causal or loss == "softmax" else log_stablemax(logits)
            expected = [[0.0 if t == PADDING else -log[b, i, t].item() for i, t in enumerate(row)]
                        for b, row in enumerate(target.tolist())]  # fmt: skip
            torch.testing.assert_close(model.nats(name, logits, target), torch.tensor(expected))


def test_the_losses_are_means_over_symbols_then_samples():
    model = build().eval()
    here = batch(model, "fill")
    _, outputs = model(model.initial_carry(here), here)
    aux, scored = outputs["aux"], here["target"] != PADDING
    nats = model.nats("fill", outputs["logits"], here["target"])
    torch.testing.assert_close(aux["ce"], torch.stack([n[s].mean() for n, s in zip(nats, scored, strict=True)]).mean())
    hit = outputs["logits"].argmax(-1) == here["target"]
    expected = torch.stack([h[s].float().mean() for h, s in zip(hit, scored, strict=True)])
    torch.testing.assert_close(aux["accuracy"], expected)
    assert aux["right"].tolist() == [bool(h[s].all()) for h, s in zip(hit, scored, strict=True)]
    assert set(aux) >= {"ce", "halt_loss", "vq_loss", "mtp_loss", "acceptance", "codes", "confidence", "changed"}
    # unscored symbols can only change which path wins, and `explore` fixes that here
    here |= dict(explore=outputs["path"])
    here["target"][-1, -3:] = PADDING
    shorter = model(model.initial_carry(here), here)[1]["logits"]
    torch.testing.assert_close(shorter[:, :3], outputs["logits"][:, :3])


# ---- paths and steps -------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_one_path_is_the_plain_model():
    model = build(paths=1).eval()
    several = build(paths=3).eval()
    state = {name: value for name, value in model.state_dict().items() if name != "starts"}
    assert several.load_state_dict(state, strict=False).missing_keys == ["starts"]
    assert torch.equal(several.starts[0], model.core.start_L) and torch.equal(model.starts, several.starts[:1])
    for name in model.tasks:
        here = batch(model, name)
        x, _, _ = model.perceive(here)
        z_H, z_L = model.core.start(x)
        carry, limit = model.initial_carry(here), model.limit(name)
        trace = several.trace(here, steps=limit, paths=1)
        for step in range(limit):
            z_H, z_L = model.core(x, z_H, z_L, model.rotary, None)
            logits, _ = model.answer(name, x, z_H, here["target"])
            carry, outputs = model(carry, here)
            assert torch.equal(outputs["logits"], logits) and torch.equal(outputs["q_halt"], model.confidence(z_H))
            assert torch.equal(carry["z_H"][:, 0], z_H) and torch.equal(carry["z_L"][:, 0], z_L)
            assert torch.equal(trace["answers"][step, :, 0], logits.argmax(-1).to(torch.uint8))
            assert torch.equal(trace["halt"][step, :, 0], outputs["q_halt"]) and not outputs["path"].any()
        assert carry["halted"].all() and carry["steps"].tolist() == [limit] * 3


def test_the_winner_is_repeated_and_losers_teach_the_trunk_nothing():
    gradients = []
    for shift in (0.0, 3.0):
        model = build(tasks=["sudoku4"], **PLAIN)
        model.starts[1] += shift  # of a path that does not win
        here = batch(model, "sudoku4")
        here["explore"] = torch.tensor([0, 2, 0])
        x, _, _ = model.perceive(here)
        z_H, z_L, _ = model.fresh(model.initial_carry(here), x.dtype)
        before, after = all_paths(model.core, x, z_H, z_L, model.rotary)
        assert not any(z.requires_grad for z in (*before, *after))
        carry, outputs = model(model.initial_carry(here), here)
        for name, z in zip(("z_H", "z_L"), after, strict=True):
            torch.testing.assert_close(carry[name], z, rtol=0, atol=1e-5)
            assert not carry[name].requires_grad
        assert outputs["path"].tolist() == [0, 2, 0]
        total(outputs["aux"]).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name in gradients[0]:
        same = torch.equal(gradients[0][name], gradients[1][name])
        assert same == (name != "halt.weight"), name  # which learns from all paths


def test_the_cheapest_path_wins_and_is_followed():
    model = build(tasks=["sudoku4"], **PLAIN, latent_planning_depth=2)
    here = batch(model, "sudoku4", 6)
    x, _, _ = model.perceive(here)
    carry = model.initial_carry(here)
    for step in range(2):
        z_H, z_L, _ = model.fresh(carry, x.dtype)
        _, (after, _) = all_paths(model.core, x, z_H, z_L, model.rotary)
        costs = [model.nats("sudoku4", model.answer("sudoku4", x, after[:, k], here["target"])[0], here["target"])
                 for k in range(3)]  # fmt: skip
        best = torch.stack([cost.sum(1) for cost in costs], 1).argmin(1)
        carry, outputs = model(carry, here)
        assert torch.equal(outputs["path"], best)
        same = all(torch.equal(carry["z_H"][:, k], pick(carry["z_H"], best)) for k in range(3))
        assert same == (step == 1)  # after every second step all paths continue from it
        assert not torch.equal(carry["z_L"][:, 0], carry["z_L"][:, 1])


def test_a_trace_is_what_steps_make():
    model = build().train()
    fill_memory(model)
    model.eval()
    for name in model.tasks:
        here, steps = batch(model, name), model.limit(name)
        trace, carry = model.trace(here, steps=steps), model.initial_carry(here)
        for step in range(steps):
            path = trace["halt"][step].argmax(1)  # from which evaluation continues
            carry, outputs = model(carry, here | dict(explore=path))
            torch.testing.assert_close(outputs["q_halt"], pick(trace["halt"][step], path))
            assert torch.equal(carry["answer"], pick(trace["answers"][step], path))
            nats = model.nats(name, outputs["logits"], here["target"]).sum(1)
            torch.testing.assert_close(nats, pick(trace["nats"][step], path))
        assert carry["halted"].all()


def test_noise_and_more_paths():
    model = build(tasks=["sudoku4"], **PLAIN).eval()
    here = batch(model, "sudoku4")
    seeds = [torch.Generator().manual_seed(seed) for seed in (1, 1, 2)]
    first, again, other = (model.trace(here, steps=2, paths=5, noise=0.5, generator=g) for g in seeds)
    assert first["halt"].shape == (2, 3, 5) and torch.equal(first["answers"], again["answers"])
    assert not torch.equal(first["z_H"], other["z_H"])
    quiet = model.trace(here, steps=1, paths=5)["z_H"]
    torch.testing.assert_close(quiet[:, :2], quiet[:, 3:])  # starts are repeated
    assert not torch.allclose(first["z_H"][:, 0], first["z_H"][:, 3])


def test_a_new_sample_starts_anew():
    model = build(**PLAIN | dict(enable_mtp=True)).eval()
    here = batch(model, "read")
    carry, first = model(model.initial_carry(here), here)
    carry, second = model(carry, here)
    carry["halted"] = torch.tensor([True, False, True])
    carry, third = model(carry, here)
    torch.testing.assert_close(third["logits"][::2], first["logits"][::2])
    assert carry["steps"].tolist() == [1, 3, 1] and not torch.allclose(third["logits"][1], second["logits"][1])


@pytest.mark.parametrize("name", ["read", "fill", "arc"])
@torch.no_grad()
def test_a_permuted_batch_has_permuted_answers(name):
    model, order = build(), torch.tensor([2, 0, 1])
    fill_memory(model)
    model.eval()
    here = batch(model, name)
    other = {key: part if key == "task" else part[order] for key, part in here.items()}
    outputs, permuted = (model(model.initial_carry(b), b)[1] for b in (here, other))
    for key in ("logits", "q_halt", "path"):
        torch.testing.assert_close(permuted[key], outputs[key][order])


# ---- parts -----------------------------------------------------------------------------------------------------------


def test_through_codes_the_answer_teaches_the_encoder():
    model = build(tasks=["read"], enable_mtp=False)
    here = batch(model, "read")
    aux = model(model.initial_carry(here), here)[1]["aux"]
    aux["ce"].backward()
    parts = [*model.encoder.parameters(), *model.look.parameters(), model.capsule_tokens, model.quantizer.down.weight]
    assert all(p.grad is not None and p.grad.norm() > 0 for p in parts)
    assert aux["codes"].shape == (3, 3, 2) and model.quantizer.bits == 12


def test_codes_stay_bounded():
    torch.manual_seed(0)
    quantizer = Quantizer(d_model=8, size=16, dim=4, groups=2, beta=0.25)
    for _ in range(100):
        out, codes, commit = quantizer(5 * torch.randn(8, 3, 8), torch.arange(8) % 2 == 0)
    assert out.shape == (8, 3, 8) and commit.isfinite() and len(codes.unique()) > 8
    for name, value in quantizer.codebook.named_buffers():
        assert value.isfinite().all() and value.abs().max() < 1e3, name
    codes = torch.randn(50, 3, 8)
    torch.testing.assert_close(quantizer.vectors(codes).norm(dim=-1), torch.ones(50, 3, 2))


@torch.no_grad()
def test_only_codes_come_through_except_for_every_other_sample_in_training():
    model = build(tasks=["read"], enable_mtp=False, enable_memory=False)
    here = batch(model, "read", 4) | dict(index=torch.arange(4))
    for training in (True, False):
        model.train(training)
        codes = model.quantizer.codebook.codes.clone()
        x, _, aux = model.perceive(here)
        coded = model.quantizer.up(codes[aux["codes"]].flatten(-2)) + model.task["read"]
        same = torch.isclose(x[:, : coded.shape[1]], coded, atol=1e-5).all(-1).all(-1)
        assert same.tolist() == ([False, True] * 2 if training else [True] * 4)


def test_starting_codes_come_from_pages():
    model = build()
    before = [buffer.clone() for buffer in model.quantizer.codebook.buffers()]
    model.start_codes(batch(model, "read", 8), torch.Generator().manual_seed(0))
    after = list(model.quantizer.codebook.buffers())
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_memory_is_inert_until_something_was_solved():
    model = build(**PLAIN | dict(enable_memory=True), tasks=["read"])
    plain = build(**PLAIN, tasks=["read"])
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("memory.")})
    here = batch(model, "read")
    first, second = (m(m.initial_carry(here), here)[1]["logits"] for m in (model, plain))
    assert torch.equal(first, second)
    fill_memory(model)
    assert not torch.equal(model(model.initial_carry(here), here)[1]["logits"], second)


def test_answers_that_are_written():
    model = build().eval()
    here = batch(model, "fill")
    written, halt = model.write(here, steps=2, choose=lambda logits: logits.argmax(-1), end=108)
    assert written.shape == (3, 5) and halt.shape == (3,)
    again = model.trace(here | dict(target=written.to(torch.uint8)), steps=2)  # the decoder reads its own answer
    best = again["halt"][-1].argmax(1)
    torch.testing.assert_close(pick(again["halt"][-1], best), halt)
    answers = pick(again["answers"][-1], best)
    for row, other in zip(written.tolist(), answers.tolist(), strict=True):
        length = row.index(108) + 1 if 108 in row else 5
        assert row[:length] == other[:length] and set(row[length:]) <= {108}


# ---- learning --------------------------------------------------------------------------------------------------------


def sudokus(blanks, count):
    """Build samples of 4 x 4 puzzles, with one blank each if `blanks` is 1, otherwise as generated."""
    source = open_tasks(["sudoku4"], page_rows=2, page_cols=24, text_source="stories", stories="", code_dir="",
                        arc_set="agi1", arc_side=4)["sudoku4"]  # fmt: skip
    samples = [source.make(i, "train", 0) for i in range(count)]
    page, target = (torch.from_numpy(np.stack([getattr(s, name) for s in samples])) for name in ("page", "target"))
    if blanks == 1:
        page = target.clone()
        page[torch.arange(count), torch.arange(count) % 16] = HOLE
    return page.view(count, 4, 4), target


def words(count):
    """Build pages of random letters to read."""
    page = torch.randint(65, 91, (count, 2, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return page, page.flatten(1)


def learn(name, page, target, steps, **changes):
    """Train on the samples -> whether each answer is right after the last trained step and each of 16 more steps."""
    sizes = dict(paths=1, hidden_size=64, num_heads=4, H_cycles=1, loss="softmax", supervision_steps=4)
    model = build([name], **PLAIN | sizes | changes)
    samples = dict(page=page, target=target, id=torch.zeros(len(page), dtype=torch.long))
    here = batch_of(samples, name, KNOWN[name], False, 0, np.arange(len(page)))
    groups = [dict(params=list(model.named_parameters()), weight_decay=0.0)]
    optimizer, carry = AdamAtan2(groups, lr=3e-3, betas=(0.9, 0.95)), None
    for _ in range(steps):
        carry, outputs = model(carry or model.initial_carry(here), here)
        total(outputs["aux"]).backward()
        optimizer.clip_(1.0)
        optimizer.step()
        optimizer.zero_grad()
    answers = model.eval().trace(here, steps=model.limit(name) + 16)["answers"][:, :, 0]
    return (answers == target).all(2)[model.limit(name) - 1 :]


@pytest.mark.slow
def test_puzzles_are_learnt_and_stay_solved():
    pairs = [sudokus(6, 32), sudokus(1, 8)]
    page, target = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    solved = learn("sudoku4", page, target, 160, mixer="mlp_t", bottleneck="patches")
    assert solved[0].all() and solved[:, 32:].all()  # those with one blank for 16 steps more


@pytest.mark.slow
def test_words_are_learnt_through_capsules():
    solved = learn("read", *words(32), 150, text_supervision_steps=1, num_capsules=3)
    assert solved[0].float().mean() == 1
