"""generate.py events: reconstruct, encode, decode, score, sample."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import train_ae
from data_utils.checkpoint import load_checkpoint, save_checkpoint
from data_utils.errors import DataError, UsageError
from data_utils.events.dataset import add_slots, drop_damaged, load_events, objects, read_events
from data_utils.events.decay_chain import decay_chain
from data_utils.events.facts import read_events as facts
from data_utils.events.generate import generate_events
from data_utils.events.reconstruct import draw_latents, event_errors, latent_statistics, sort_by_pt
from generate import EventsConfig, parse
from models.autoencoder import AutoEncoder, loss_sums
from tests.helpers import finish, start

SMALL = dict(events=300, epochs=1, batch_size=64, hidden=(16,), gnn_dim=8, gnn_layers=1, latent_dim=4, codebook_size=16,
             make_plots=False, device="cpu", warmup=0.0)  # fmt: skip
RUNS = dict(
    vq=(train_ae.AeConfig, {}),
    side_info=(train_ae.AeConfig, dict(latent_space="linear", side_info=True, encoder="gnn", decoder="gan")),
    event=(train_ae.GanAeConfig, dict(latent_space="none", level="event", decoder="gnn")),
    event_vq=(train_ae.AeConfig, dict(level="event", encoder="gan", labels=(0, 2))),
    diffusion=(train_ae.DiffusionAeConfig, dict(ddim_steps=3)),
    noised=(train_ae.DiffusionAeConfig, dict(ddim_steps=3, decoder="mlp", latent_space="vq", level="token")),
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{name: folder} of small runs, trained when they are asked for."""
    root = tmp_path_factory.mktemp("runs")

    class Runs(dict):
        def __missing__(self, name):
            cls, more = RUNS[name]
            self[name] = root / name
            train_ae.main(cls(**SMALL | more, out=str(self[name])))
            return self[name]

    return Runs()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """90 events that no run has seen, as a file."""
    path = tmp_path_factory.mktemp("file") / "events.npz"
    rows, labels = decay_chain(90, 7)
    np.savez(path, X=rows, y=labels)
    return path


def use(run, mode, out, **more):
    """What the command writes, as arrays with `meta` read; rows of texts of a csv."""
    generate_events(EventsConfig(**dict(model=str(run), mode=mode, out=str(out), device="cpu") | more))
    if str(out).endswith(".csv"):
        with open(out, newline="") as table:
            return list(csv.DictReader(table))
    with np.load(out, allow_pickle=False) as arrays:
        content = dict(arrays)
    return content | dict(meta=json.loads(str(content["meta"])))


# ---- there and back --------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:overflow")  # energies of a model that denoises after one epoch
@pytest.mark.parametrize("name", RUNS)
def test_encode_and_decode_are_reconstruct(runs, file, tmp_path, name):
    rebuilt = use(runs[name], "reconstruct", tmp_path / "a.npz", data=str(file))
    code = use(runs[name], "encode", tmp_path / "b.npz", data=str(file))
    back = use(runs[name], "decode", tmp_path / "c.npz", data=str(tmp_path / "b.npz"))
    rows, labels, _ = read_events(file, seed=42)
    assert rebuilt["X"].shape == (90, 92) and np.array_equal(rebuilt["X"], back["X"])
    assert np.array_equal(rebuilt["y"], labels) and np.array_equal(back["y"], labels)
    assert np.array_equal(rebuilt["X"][:, :18], rows[:, :18]) and np.array_equal(code["globals"], rows[:, 18:20])
    token, vq = RUNS[name][1].get("level", "event" if "diff" in name else "token") == "token", "vq" in name
    vq |= name == "noised"
    z = code["indices" if vq else "latents"]
    assert z.shape == (90, *[18] * token, *[4] * (not vq)) and z.dtype == (np.int64 if vq else np.float32)
    if vq and token:
        assert np.array_equal(z >= 0, rows[:, :18] > 0) and z.max() < 16
    assert rebuilt["meta"]["mode"] == "reconstruct" and rebuilt["meta"]["data"] == str(file)


def test_reconstruct_is_the_model_on_normalised_events(runs, file, tmp_path):
    rebuilt = use(runs["vq"], "reconstruct", tmp_path / "a.npz", data=str(file), limit=20)
    state = load_checkpoint(runs["vq"] / "model.pt", "ae:ae")
    model = AutoEncoder(**state["model_args"]).eval()
    model.load_state_dict(state["model_state"])
    row, stats = read_events(file, seed=0)[0][3].astype(np.float64), state["meta"]["stats"]
    n = (row[:18] > 0).sum()
    E, pt, eta, phi = row[20:].reshape(18, 4)[:n].T
    x = (np.stack([np.log(E), np.log(pt), eta, np.sin(phi), np.cos(phi)], 1) - stats["mean"]) / stats["std"]
    met = np.array([np.log1p(row[18]), np.sin(row[19]), np.cos(row[19])])
    met = (met - stats["globals_mean"]) / stats["globals_std"]
    ids = torch.tensor(row[None, :18]).long()
    x = torch.cat([torch.tensor(x), torch.zeros(18 - n, 5)])[None].float()
    with torch.no_grad():
        x_hat = model(x, ids, ids > 0, torch.tensor(met)[None].float())["x_hat"][0, :n].double().numpy()
    back = x_hat * stats["std"] + stats["mean"]
    features = objects(rebuilt["X"])[3, :n]
    assert np.allclose(features[:, 1], np.exp(back[:, 1]), rtol=1e-4) and np.allclose(
        features[:, 2], back[:, 2], atol=1e-4
    )
    assert (
        np.allclose(np.cos(features[:, 3] - np.arctan2(back[:, 3], back[:, 4])), 1, atol=1e-6)
        and len(rebuilt["X"]) == 20
    )


def test_the_run_s_own_events_and_splits(runs, tmp_path):
    encoded = use(runs["event_vq"], "encode", tmp_path / "a.npz")
    labels = decay_chain(300, 42)[1]
    assert set(encoded["y"]) == {0, 2} and np.array_equal(labels[encoded["index"]], encoded["y"])
    parts = [use(runs["event_vq"], "encode", tmp_path / "b.npz", split=split) for split in ("train", "val", "test")]
    assert sorted(np.concatenate([part["index"] for part in parts])) == sorted(encoded["index"])
    chosen = dict(features=("E", "pT", "eta", "phi"), phi="sincos", energy_unit="GeV", labels=(0, 2), limit=0)
    data, _ = load_events("decay_chain", events=300, seed=42, **chosen)
    assert np.array_equal(data["test"]["ids"].numpy(), parts[2]["ids"])
    fresh = use(runs["vq"], "encode", tmp_path / "c.npz", data="decay_chain", events=25, seed=3)
    assert np.array_equal(fresh["ids"], decay_chain(25, 3)[0][:, :18])


# ---- scores ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vq", "side_info", "event"])
def test_scores_are_the_test_s_losses_event_by_event(runs, tmp_path, name, capsys):
    rows = use(runs[name], "score", tmp_path / "a.csv", split="test")
    tested = next(event["metrics"] for event in facts(runs[name]) if event["moment"] == "on_test_end")
    errors, objects = (np.array([float(row[key]) for row in rows]) for key in ("rec_tokens", "objects"))
    mean = (errors * objects).sum() / objects.sum()
    assert abs(mean - tested["rec_tokens"]) < 1e-5 * mean and f"{mean:.4g}" in capsys.readouterr().out
    assert abs(np.mean([float(row["rec_globals"]) for row in rows]) - tested["rec_globals"]) < 1e-5
    assert ("rec_types" in rows[0]) == (name != "side_info")
    if name == "event":
        assert abs(np.mean([float(row["rec_types"]) for row in rows]) - tested["rec_types"]) < 1e-5


def test_scores_of_diffusion_are_its_ddim_mse(runs, tmp_path):
    rows = use(runs["diffusion"], "score", tmp_path / "a.csv", split="test", seed=42)
    tested = next(event["metrics"] for event in facts(runs["diffusion"]) if event["moment"] == "on_test_end")
    errors, objects = (np.array([float(row[key]) for row in rows]) for key in ("rec_tokens", "objects"))
    assert abs((errors * objects).sum() / objects.sum() / tested["ddim_mse"] - 1) < 1e-4


def test_scores_against_another_file(runs, file, tmp_path, capsys, full_pictures):
    metrics = pytest.importorskip("sklearn.metrics")
    rows, labels = decay_chain(60, 9)
    objects(rows)[..., 2] *= 1.5  # odd events
    objects(rows)[..., 0] *= 3
    np.savez(tmp_path / "odd.npz", X=rows, y=labels % 2)
    both = use(runs["vq"], "score", tmp_path / "a.csv", data=str(file), against=str(tmp_path / "odd.npz"))
    alone = use(runs["vq"], "score", tmp_path / "b.csv", data=str(file))
    assert [{k: v for k, v in row.items() if k != "data"} for row in both[:90]] == alone
    odd = np.array([row["data"] == str(tmp_path / "odd.npz") for row in both])
    assert odd.sum() == 60 and not odd[:90].any()
    with open(tmp_path / "a_roc.csv", newline="") as table:
        points = list(csv.DictReader(table))
    groups = {"odd": odd} | {f"odd label {i}": odd & [row["label"] == str(i) for row in both] for i in (0, 1)}
    assert {(row["score"], row["signal"]) for row in points} == {
        (score, group) for score in ("rec_tokens", "rec_globals", "rec_types") for group in groups
    }
    printed = capsys.readouterr().out
    for (score, group), row in {(row["score"], row["signal"]): row for row in points}.items():
        chosen = groups[group] | ~odd
        values = np.array([float(row[score]) for row in both])[chosen]
        area = metrics.roc_auc_score(groups[group][chosen], values)
        assert float(row["auc"]) == pytest.approx(area, abs=1e-6) and f"{float(row['auc']):.4f}" in printed
        assert (int(row["events"]), int(row["background_events"])) == (groups[group].sum(), 90)
    assert (tmp_path / "a_roc.png").stat().st_size > 1000
    assert float(points[0]["auc"]) > 0.9
    within = use(runs["vq"], "score", tmp_path / "c.csv", data=str(file), against=str(file))
    assert within == alone
    with open(tmp_path / "c_roc.csv", newline="") as table:
        assert {row["signal"] for row in csv.DictReader(table)} == {f"events label {i}" for i in range(6)}


def test_names_of_outputs_carry_the_data_s(runs, file, tmp_path):
    np.savez(tmp_path / "other.npz", **dict(zip("Xy", decay_chain(20, 3), strict=True)))
    common = dict(model=str(runs["vq"]), device="cpu", limit=20)
    generate_events(EventsConfig(**common, mode="score", data=str(file), against=str(tmp_path / "other.npz")))
    for mode in ("score", "encode", "reconstruct"):
        generate_events(EventsConfig(**common, mode=mode, data=str(file)))
    generate_events(EventsConfig(**common, mode="encode"))
    names = {path.name for path in runs["vq"].iterdir()}
    assert names >= set(
        """score_events_against_other.csv score_events_against_other_roc.csv score_events_against_other_roc.png
        score_events.csv encode_events.npz encode_events_pca.png reconstruct_events.npz encode.npz
        encode_pca.png""".split()
    )
    generate_events(EventsConfig(**common, mode="encode", data=str(file)))  # its own outputs may be replaced
    (runs["vq"] / "encode_events_pca.png").write_bytes(b"mine")
    wrong(runs["vq"], ["encode_events_pca.png exists", "--fresh"], UsageError, mode="encode", data=str(file))
    wrong(runs["vq"], ["--against", "--mode score"], UsageError, mode="encode", against=str(file))
    np.savez(tmp_path / "one.npz", X=decay_chain(20, 3)[0], y=np.zeros(20, int))
    one = str(tmp_path / "one.npz")
    wrong(runs["vq"], ["one label alone", "OTHER.npz"], mode="score", data=one, against=one)


@pytest.mark.parametrize("level", ["token", "event"])
def test_errors_of_events_are_those_of_events_alone(level):
    torch.manual_seed(0)
    ids = torch.tensor([[1, 2, 0, 0], [3, 1, 1, 5], [7, 0, 0, 0]])
    batch = dict(x=torch.randn(3, 4, 5), ids=ids, globals=torch.randn(3, 3))
    outputs = torch.randn(3, 4, 5), torch.randn(3, 3), torch.randn(3, 4, 8)
    errors = event_errors(*outputs, batch, level)
    for i in range(3):
        part = slice(i, i + 1)
        output = dict(
            x_hat=outputs[0][part], rec_globals=outputs[1][part], type_logits=outputs[2][part], aux=dict(commit=0.0)
        )
        output["aux"]["commit"] = torch.zeros(())
        sums = loss_sums(output, batch["x"][part], ids[part], batch["globals"][part], level)
        for name in ("rec_tokens", "rec_types", "rec_globals"):
            assert abs(errors[name][i] - sums[name][0] / sums[name][1]) < 1e-5


# ---- new events ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNS)
def test_samples_are_valid_events(runs, tmp_path, name):
    path = tmp_path / "a.npz"
    samples = use(runs[name], "sample", path, events=200, seed=5)
    rows, labels, split = read_events(path, seed=0)
    good, *_, dropped = drop_damaged(rows.copy(), labels, split, "sample")
    assert len(good) == 200 and not dropped and set(labels) == {-1}
    n, pt = (rows[:, :18] > 0).sum(1), objects(rows)[..., 1]
    assert ((rows[:, :18] > 0) == (np.arange(18) < n[:, None])).all() and (np.diff(pt, axis=1) <= 0).all()
    seen = load_checkpoint(runs[name] / "model.pt", f"ae:{samples['meta']['loop']}")["latents"]["multiplicity"]
    assert (seen[torch.from_numpy(n)] > 0).all() and abs(n.mean() - (seen * torch.arange(19)).sum() / seen.sum()) < 0.6
    notes = samples["meta"]["sampled"]
    assert ("codes" in notes["latents"]) == (name in ("vq", "event_vq", "noised"))
    assert ("head" in notes["types"]) == (name != "side_info")
    assert ("noise" in notes["decoding"]) == (name in ("diffusion", "noised"))
    again, other = (use(runs[name], "sample", tmp_path / "b.npz", events=200, seed=seed)["X"] for seed in (5, 6))
    assert np.array_equal(samples["X"], again) and not np.array_equal(again, other)


def test_statistics_by_hand(runs):
    state = load_checkpoint(runs["vq"] / "best_val.pt", "ae:ae")
    model = AutoEncoder(**state["model_args"])  # in training mode, which must leave no trace
    model.load_state_dict(state["model_state"])
    chosen = {k: v for k, v in state["config"].items() if k in "events limit labels features phi energy_unit seed"}
    train = load_events("decay_chain", **chosen)[0]["train"]
    statistics, ids = latent_statistics(model, train)["latents"], train["ids"]
    assert model.training and all(torch.equal(model.state_dict()[k], v) for k, v in state["model_state"].items())
    assert set(statistics) == set(state["latents"]) and torch.equal(statistics["codes"], state["latents"]["codes"])
    _, index, _ = model.eval().quantize(model.encode(train["x"], ids, ids > 0, train["globals"]), ids > 0)
    codes, types, events = torch.zeros(19, 16), torch.zeros(18, 8), torch.zeros(19)
    for row, codes_of_row in zip(ids.tolist(), index.tolist(), strict=True):
        n = sum(i > 0 for i in row)
        events[n] += 1
        for slot, (kind, code) in enumerate(zip(row, codes_of_row, strict=True)):
            if kind:
                codes[n, code] += 1
                types[slot, kind] += 1
    assert (statistics["codes"] == codes).all() and (statistics["types"] == types).all()
    assert (statistics["multiplicity"] == events).all() and latent_statistics(torch.nn.Linear(2, 2), train) == {}
    assert torch.equal(statistics["low"], train["x"][ids > 0].min(0).values)


@pytest.mark.parametrize("name", ["side_info", "event"])
def test_gaussians_by_hand(runs, name):
    cls, more = RUNS[name]
    state = load_checkpoint(runs[name] / "best_val.pt", f"ae:{cls.loop}")
    model = AutoEncoder(**state["model_args"]).eval()
    model.load_state_dict(state["model_state"])
    chosen = {k: v for k, v in state["config"].items() if k in "events limit labels features phi energy_unit seed"}
    train = load_events("decay_chain", **chosen)[0]["train"]
    mask = train["ids"] > 0
    with torch.no_grad():
        z, _, _ = model.quantize(model.encode(train["x"], train["ids"], mask, train["globals"]), mask)
    n = mask.sum(1)
    rows = (
        torch.cat([z, n[:, None]], 1) if name == "event" else torch.cat([z[mask], n.repeat_interleave(n)[:, None]], 1)
    )
    statistics = state["latents"]
    assert torch.allclose(statistics["mean"].float(), rows.mean(0), atol=1e-4)
    assert torch.allclose(statistics["covariance"].float(), rows.T.cov(correction=0), atol=1e-3)
    sizes = torch.from_numpy(np.random.default_rng(0).choice(rows[:, -1].numpy(), 40_000)).long()
    drawn = draw_latents(statistics, model, sizes, torch.Generator().manual_seed(0))
    drawn = drawn if name == "event" else drawn[:, 0]
    both = torch.cat([drawn, sizes[:, None]], 1)
    assert (both.mean(0) - rows.mean(0)).abs().max() < 0.05
    assert (both.T.cov() - rows.T.cov()).abs().max() < 0.06 * rows.T.cov().abs().max()


def test_codes_are_drawn_by_frequency(runs):
    state = load_checkpoint(runs["vq"] / "best_val.pt", "ae:ae")
    model = AutoEncoder(**state["model_args"]).eval()
    codes = torch.zeros(19, 16)
    codes[5, 3], codes[5, 4], codes[6, 0] = 1, 3, 9
    drawn = draw_latents(dict(types=torch.ones(18, 8), codes=codes), model, torch.tensor([5] * 400 + [6]), None)
    index = (drawn[..., None, :] == model.latent.codes).all(-1).int().argmax(-1)
    assert set(index[:400].flatten().tolist()) == {3, 4} and (index[400] == 0).all()
    assert abs((index[:400] == 4).float().mean() - 0.75) < 0.03


def test_objects_sort_by_falling_pt():
    row = np.zeros((1, 92), np.float32)
    row[0, :4] = 1, 2, 0, 7
    objects(row)[0, :4] = [[9, 3, 0, 1], [9, 8, 0, 2], [0, 0, 0, 0], [9, 5, 0, 3]]
    sorted_row = sort_by_pt(row)
    assert sorted_row[0, :4].tolist() == [2, 7, 1, 0] and objects(sorted_row)[0, :4, 3].tolist() == [2, 3, 1, 0]
    assert row[0, 0] == 1  # the input stays


# ---- what is typed, and what is wrong --------------------------------------------------------------------------------


def test_as_typed(runs, tmp_path):
    out, _ = finish(start("generate.py", "events", runs["vq"], "--mode", "sample", "--events", 12, cwd=tmp_path))
    assert out.startswith("12 events") and (runs["vq"] / "sample.npz").exists()
    _, err = finish(start("generate.py", "events", "--mode", "dream", cwd=tmp_path), 2)
    assert "reconstruct" in err
    best = runs["vq"] / "best_val.pt"  # a checkpoint
    assert len(use(best, "sample", tmp_path / "a.npz", events=7)["X"]) == 7
    assert parse(["events", "run", "--limit=3"]) == EventsConfig(model="run", limit=3)
    assert parse(["events", "--model=run"]) == EventsConfig(model="run")
    assert parse(["--prompt", "events"]).prompt == "events"


def test_indices_alone_are_enough(runs, tmp_path):
    indices = np.full((3, 18), -1)
    indices[0, :4], indices[1, :2], indices[2, :1] = [3, 1, 2, 15], [0, 0], [5]
    np.savez(tmp_path / "a.npz", indices=indices)
    decoded = use(runs["vq"], "decode", tmp_path / "b.npz", data=str(tmp_path / "a.npz"))
    assert np.array_equal(decoded["X"][:, :18] > 0, indices >= 0) and "head" in decoded["meta"]["types"]


def wrong(run, words, error=DataError, **more):
    with pytest.raises(error) as caught:
        generate_events(EventsConfig(**dict(model=str(run), device="cpu") | more))
    text = str(caught.value)
    assert all(word in text for word in words) and len(text.splitlines()) <= 3, text


def test_errors(runs, file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    vq = runs["vq"]
    wrong("", ["no run named", "python train_ae.py"], UsageError)
    wrong("nowhere", ["nowhere: no such run", "python train_ae.py"], UsageError)
    wrong(tmp_path, ["no model.pt"], UsageError)
    save_checkpoint("a.pt", dict(kind="expert", model_state={}))
    wrong("a.pt", ["kind expert", "ae:ae"], UsageError)
    save_checkpoint("a.pt", dict(kind="ae:test_mlp", model_state={}))
    wrong("a.pt", ["test_mlp, which has no events", "gan_ae"], UsageError)
    wrong(vq, ["--out x.csv", ".npz"], UsageError, mode="sample", out="x.csv")
    wrong(vq, ["--mode encode"], UsageError, mode="decode")
    wrong(vq, ["--events 0"], UsageError, mode="sample", events=0)
    wrong(vq, ["none.npz: no such file"], data="none.npz")
    rows, labels = decay_chain(20, 1)
    np.savez("wide.npz", X=add_slots(rows, 20), y=labels)
    wrong(vq, ["wide.npz: 102 columns: expected 92", "--source wide.npz --max_particles 18"], data="wide.npz")
    np.savez("named.npz", X=rows, features=np.array(["pT", "E", "eta", "phi"]))
    wrong(vq, ["named.npz: particles of pT E eta phi: expected E pT eta phi"], data="named.npz")
    narrow = rows[(rows[:, 10:18] == 0).all(1)]
    np.savez("narrow.npz", X=np.concatenate([narrow[:, :10], narrow[:, 18:60]], 1))
    np.savez("same.npz", X=narrow)
    one, two = (use(vq, "score", tmp_path / f"{name}.csv", data=f"{name}.npz") for name in ("narrow", "same"))
    assert one == two and len(narrow) > 3  # slots that a file lacks are empty
    rows[:, 18], objects(rows)[..., :2] = rows[:, 18] * 1000, objects(rows)[..., :2] * 1000
    np.savez("mev.npz", X=rows, y=labels)
    wrong(vq, ["looks like MeV", "--energy_unit MeV"], data="mev.npz")
    back = use(vq, "encode", tmp_path / "m.npz", data="mev.npz", energy_unit="MeV")
    assert np.allclose(back["globals"], decay_chain(20, 1)[0][:, 18:20], rtol=1e-5)
    state = load_checkpoint(vq / "model.pt", "ae:ae")
    state.pop("latents")
    save_checkpoint("young.pt", state)
    wrong("young.pt", ["no statistics", "train_ae.py resume="], UsageError, mode="sample")
    Path("torn.pt").write_bytes((vq / "model.pt").read_bytes()[:5000])
    wrong("torn.pt", ["can be read"])


def test_files_that_can_not_be_decoded(runs, file, tmp_path):
    path, code = str(tmp_path / "bad.npz"), use(runs["vq"], "encode", tmp_path / "a.npz", data=str(file))
    arrays = {key: code[key] for key in ("indices", "ids")}

    def damaged(words, run="vq", **changed):
        content = {k: v for k, v in (arrays | changed).items() if v is not None}
        np.savez(path, **content)
        wrong(runs[run], words, mode="decode", data=path)

    damaged(["no indices", "keys there: ids"], indices=None)
    damaged(["no latents", "keys there: indices, ids"], run="event")
    damaged(["indices is int64 (90, 5)", "(events, 18)"], indices=arrays["indices"][:, :5])
    damaged(["indices -1 to 16: expected 0 to 15"], indices=np.where(arrays["indices"] == 3, 16, arrays["indices"]))
    damaged(["ids is", "expected (90, 18)"], ids=arrays["ids"][:, :4])
    damaged(["ids is"], ids=arrays["ids"] * 9)
    damaged(["a code for each object"], ids=np.ones_like(arrays["ids"]))
    damaged(["no ids", "side_info"], run="side_info", ids=None, indices=None, latents=np.zeros((2, 18, 4), np.float32))
    damaged(["no ids", "which slots are empty"], run="event", ids=None, latents=np.zeros((2, 4), np.float32))
    wrong(runs["vq"], ["can't be read", "--mode encode"], mode="decode", data=str(tmp_path / "none.npz"))
    Path(path).write_text("no archive")
    wrong(runs["vq"], ["can't be read"], mode="decode", data=path)


def test_codes_of_another_run_are_refused(runs, file, tmp_path):
    out = tmp_path / "codes.npz"
    use(runs["vq"], "encode", out, data=str(file))
    with np.load(out) as content:
        arrays = dict(content)
    arrays["meta"] = json.dumps(json.loads(str(arrays["meta"])) | dict(run_id="another"))
    np.savez(out, **arrays)
    with pytest.raises(DataError, match="encoded by run another, not by .*\nfix: a file of --mode encode of this run"):
        use(runs["vq"], "decode", tmp_path / "rows.npz", data=str(out))
