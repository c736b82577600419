"""Particle events: decay chains against kinematics and known figures, files and their damage, rows there and back."""

import hashlib
import sys

import numpy as np
import pytest

import prepare_data
from data_utils.errors import DataError, UsageError
from data_utils.events import dataset as events
from data_utils.events import decay_chain as toy
from data_utils.events.kinematics import standard_rows
from tests.helpers import SHARED

SAMPLE = SHARED / "data/events/pythia_events.npz"
ALL = dict(events=600, limit=0, labels=range(6), features=events.COLUMNS, phi="sincos", energy_unit="GeV", seed=42)


def load(data="decay_chain", **more):
    return events.load_events(data, **ALL | more)


def mass(momenta):
    """(4, ...) -> (...): invariant mass."""
    return np.sqrt(np.maximum(momenta[0] ** 2 - (momenta[1:] ** 2).sum(0), 0))


def figures(rows):
    """Read rows one by one: mean objects, HT, median pT, median MET, mean b-jets, share of events near the W."""
    per_event, every_pt = [], []
    for row in rows.astype(float):
        seen = [(row[i], *row[20 + 4 * i : 24 + 4 * i]) for i in range(18) if row[i]]
        every_pt += [pt for _, _, pt, _, _ in seen]
        light = [
            np.array([energy, pt * np.cos(phi), pt * np.sin(phi), pt * np.sinh(eta)])
            for kind, energy, pt, eta, phi in seen
            if kind == 1
        ]
        near = any(abs(mass(a + b) - 80.4) < 10 for i, a in enumerate(light) for b in light[:i])
        per_event.append((len(seen), sum(one[2] for one in seen), sum(one[0] == 2 for one in seen), near))
    objects, ht, b_jets, near = np.mean(per_event, 0)
    return np.array([objects, ht, np.median(every_pt), np.median(rows[:, 18]), b_jets, near])


# ---- decay chains ----------------------------------------------------------------------------------------------------


def test_two_body_decays_conserve_momentum_and_have_their_masses():
    rng = np.random.default_rng(0)
    parent_mass = rng.uniform(150, 200, (3, 500))
    parent = toy.produce(parent_mass, 150, rng.normal(0, 0.5, 500), rng)
    assert np.allclose(mass(parent), parent_mass)
    first_mass = rng.uniform(60, 90, (3, 500))
    first, second = toy.two_body(parent, parent_mass, first_mass, toy.B_MASS, rng)
    assert np.allclose(first + second, parent) and np.allclose(mass(first), first_mass)
    assert np.allclose(mass(second), toy.B_MASS, atol=1e-3)
    assert np.allclose(parent[1:3].sum(1), 0, atol=1e-9)  # three or more are balanced


def test_a_decay_is_isotropic_in_the_rest_frame():
    rng, masses = np.random.default_rng(0), np.full((1, 20_000), 91.0)
    at_rest = np.stack([masses, *np.zeros((3, 1, 20_000))])
    daughter, _ = toy.two_body(at_rest, masses, 0.0, 0.0, rng)
    direction = daughter[1:, 0] / daughter[0, 0]
    assert abs(direction.mean(1)).max() < 0.02 and abs((direction**2).mean(1) - 1 / 3).max() < 0.01


@pytest.mark.parametrize("heavy", ["t" * 2 + extra for extra in toy.LABELS.values()])
def test_the_particles_of_a_collision(heavy):
    ids, pt, eta, phi, unseen = toy.collide(heavy, 4000, np.random.default_rng(1))
    tops, bosons = heavy.count("t"), len(heavy) - heavy.count("t")
    assert ids.shape == pt.shape == (3 * tops + 2 * bosons + toy.MOST_RADIATED, 4000) and unseen.shape == (2, 4000)
    assert abs(eta[ids > 0]).max() < 15 and abs(phi).max() <= np.pi
    charged = [(ids == kind).sum() for kind in (3, 4, 5, 6)]
    assert np.std(charged) < 0.1 * np.mean(charged)
    leptons, minus = ((ids == kinds[0]) | (ids == kinds[1]) for kinds in ((3, 6), (4, 5)))
    if heavy == "tt":  # one W each way, a quarter of them to e or mu
        assert max(leptons.sum(0).max(), minus.sum(0).max()) == 1 and abs(leptons.mean(1).sum() - 0.252) < 0.03
        assert ((ids == 2).sum(0) == 2).all()
    if heavy == "ttH":
        assert abs(((ids == 2).sum(0) == 4).mean() - 0.58) < 0.03
    if heavy == "ttZ":  # t tbar and Z balance in charge, so that a Z brings a lepton of either sign
        assert abs(((ids == 2).sum(0) == 4).mean() - 0.15) < 0.03


def test_the_figures_of_top_pairs():
    rows, labels = toy.decay_chain(12_000, 0)
    ours = figures(rows[labels == 0])
    wanted, tolerance = (5.2, 377, 59, 28, 1.34, 0.63), (0.1, 12, 2, 2, 0.06, 0.03)
    assert (abs(ours - wanted) < tolerance).all(), ours


def test_the_figures_of_the_physical_sample():
    if not SAMPLE.exists():
        pytest.skip("no physical sample")
    rows, labels, _ = events.read_events(SAMPLE, seed=0)
    rows, chains = rows[labels == 0][:2000], toy.decay_chain(12_000, 0)[0][::6]
    physical, ours = figures(rows), figures(chains)
    assert (abs(physical - (5.3, 388, 59, 30, 1.22, 0.58)) < (0.1, 12, 2, 2, 0.05, 0.03)).all(), physical
    assert (abs(ours / physical - 1) < 0.15).all(), ours / physical


def test_rows_keep_the_format():
    rows, labels = toy.decay_chain(3000, 5)
    assert rows.dtype == np.float32 and rows.shape == (3000, 92) and (np.bincount(labels) == 500).all()
    clean_rows, _, _, dropped = events.drop_damaged(rows.copy(), labels, labels, "rows")
    assert (clean_rows == rows).all() and dropped == {}
    ids, (energy, pt, eta, phi) = rows[:, :18], np.moveaxis(events.objects(rows), 2, 0)
    count = (ids > 0).sum(1)
    assert ((ids > 0) == (np.arange(18) < count[:, None])).all() and (events.objects(rows)[ids == 0] == 0).all()
    assert (np.diff(pt) <= 0).all() and (count >= 3).all() and (pt.sum(1) > 199.9).all()
    jet, lepton = (ids == 1) | (ids == 2), (ids > 2) & (ids < 7)
    assert (jet | lepton | (ids == 0)).all() and pt[jet].min() > 25 and pt[lepton].min() > 15
    assert abs(eta[jet]).max() < 2.8 and abs(eta[lepton]).max() < 2.5
    assert (energy[ids > 0] > 0.9999 * (pt * np.cosh(eta))[ids > 0]).all()
    turn = abs(phi[:, :, None] - phi[:, None])
    distance = np.hypot(eta[:, :, None] - eta[:, None], np.minimum(turn, 2 * np.pi - turn))
    pairs = (ids > 0)[:, :, None] & (ids > 0)[:, None] & ~np.eye(18, dtype=bool)
    assert distance[pairs].min() > 0.3999


def test_events_follow_the_seed_alone():
    rows, labels = toy.decay_chain(700, 3)
    again, _ = toy.decay_chain(50, 3)
    assert (again == rows[:50]).all() and (labels[:7] == [0, 1, 2, 3, 4, 5, 0]).all()
    assert not (toy.decay_chain(50, 4)[0] == again).all(1).any()


# ---- tensors ---------------------------------------------------------------------------------------------------------


def naive(rows, features, phi, stats):
    """Normalise slot by slot."""
    x = np.zeros((len(rows), 18, len(stats["mean"])))
    for n, row in enumerate(rows):
        for slot in range(18):
            if row[slot] == 0:
                continue
            energy, pt, eta, angle = row[20 + 4 * slot : 24 + 4 * slot].astype(float)
            values = dict(E=[np.log(energy)], pT=[np.log(pt)], eta=[eta], phi=[np.sin(angle), np.cos(angle)])
            values |= dict(phi=[angle]) if phi == "raw" else {}
            x[n, slot] = (np.concatenate([values[f] for f in features]) - stats["mean"]) / stats["std"]
    return x


@pytest.mark.parametrize("phi", ["sincos", "raw"])
@pytest.mark.parametrize("features", [events.COLUMNS, ("eta", "phi", "pT"), ("phi",), ("pT", "E")])
def test_normalised_and_back(features, phi):
    splits, meta = load(features=features, phi=phi)
    assert meta["cont_dim"] == len(features) + (phi == "sincos" and "phi" in features)
    rows, _ = toy.decay_chain(600, 42)
    chosen = events.split_rows(600, 42)
    for i, name in enumerate(events.SPLITS):
        part, expected = splits[name], rows[chosen == i]
        x, ids = part["x"].numpy(), part["ids"].numpy()
        assert (x[ids == 0] == 0).all() and np.allclose(x, naive(expected, features, phi, meta["stats"]), atol=1e-5)
        assert np.allclose(x[ids > 0].mean(0), 0, atol=1e-5 if name == "train" else 0.3)
        back = events.to_rows(part["x"], part["ids"], part["globals"], meta)
        modelled = [events.COLUMNS.index(f) for f in features]
        before, after = (events.objects(some)[..., modelled] for some in (expected, back))
        assert np.allclose(after, before, rtol=1e-4, atol=1e-4)
        assert np.allclose(back[:, :20], expected[:, :20], rtol=1e-4, atol=1e-4)
        rest = [i for i in range(4) if i not in modelled]
        assert (events.objects(back)[..., rest] == 0).all()


def test_energy_is_at_least_that_of_a_massless_object():
    splits, meta = load()
    part = splits["test"]
    part["x"][..., 0] -= 3
    rows = events.to_rows(part["x"], part["ids"], part["globals"], meta)
    energy, pt, eta, _ = np.moveaxis(events.objects(rows), 2, 0)
    assert np.allclose(energy, pt * np.cosh(eta), rtol=1e-5) and abs(energy).max() > 0


def test_shapes_types_and_meta():
    splits, meta = load(limit=20, labels=(1, 3))
    for name, part in splits.items():
        assert {k: (tuple(t.shape), str(t.dtype)) for k, t in part.items()} == dict(
            x=((20, 18, 5), "torch.float32"), ids=((20, 18), "torch.int64"), globals=((20, 3), "torch.float32"),
            y=((20,), "torch.int64")), name  # fmt: skip
        assert set(part["y"].tolist()) == {1, 3}
    assert list(splits) == ["train", "val", "test"]
    stats, digest, rows_hash = (meta.pop(name) for name in ("stats", "data_hash", "rows_hash"))
    assert meta == dict(features=["E", "pT", "eta", "phi"], columns=["E", "pT", "eta", "phi"], labels=[1, 3],
                        notes=["400 of 600 left out: labels 0 2 4 5"], phi="sincos", n_tokens=18, cont_dim=5,
                        n_globals=3, num_types=8, dropped={}, source="decay_chain")  # fmt: skip
    assert {k: len(v) for k, v in stats.items()} == dict(mean=5, std=5, globals_mean=3, globals_std=3)
    assert all(type(v) is float for values in stats.values() for v in values)
    assert len(digest) == len(rows_hash) == 64 and digest != rows_hash
    for changes in (dict(labels=(1, 2)), dict(limit=19), dict(seed=43), dict(events=610)):
        others = load(**dict(limit=20, labels=(1, 3)) | changes)[1]
        assert digest != others["data_hash"] and rows_hash != others["rows_hash"], changes
    for changes in (dict(phi="raw"), dict(features=("E", "pT"))):
        same = load(**dict(limit=20, labels=(1, 3)) | changes)[1]
        assert (digest, rows_hash) == (same["data_hash"], same["rows_hash"]), changes
    assert load()[1]["data_hash"] == load(limit=10**6)[1]["data_hash"]


def test_the_hash_of_new_events_is_the_same_on_every_processor(monkeypatch, tmp_path):
    """Other last bits are the same data; another version of the simulation is not, nor is an edited file."""
    before = load()[1]
    rows, labels = toy.decay_chain(600, 42)
    nudged = np.where(rows % 1 == 0, rows, np.nextafter(rows, np.float32(0)))
    with monkeypatch.context() as patch:
        patch.setattr(events, "decay_chain", lambda n, seed: (nudged, labels))
        other = load()[1]
        assert other["data_hash"] == before["data_hash"] and other["rows_hash"] != before["rows_hash"]
        patch.setattr(events, "VERSION", toy.VERSION + 1)
        assert load()[1]["data_hash"] != before["data_hash"]
    hashes = []
    for content in (rows, nudged):
        events.write_events(str(tmp_path / "e.npz"), content, labels, seed=42)
        meta = load(data=str(tmp_path / "e.npz"))[1]
        assert meta["data_hash"] == meta["rows_hash"]
        hashes.append(meta["data_hash"])
    assert hashes[0] == before["rows_hash"] != hashes[1]


def test_the_events_of_this_version():
    """When this fails, the simulation has changed: raise its VERSION, and write the new numbers here."""
    rows, _ = toy.decay_chain(60, 0)
    ids, objects = rows[:, :18], events.objects(rows)
    assert toy.VERSION == 1 and ((ids > 0).sum(), ids.sum()) == (431, 603)
    assert np.allclose([rows[:, 18].mean(), objects.mean()], [45.576088, 19.11666], rtol=1e-5)


def test_given_statistics_are_used():
    stats = dict(mean=[0.0] * 5, std=[1.0] * 5, globals_mean=[0.0] * 3, globals_std=[2.0] * 3)
    splits, meta = load(stats=stats)
    rows, _ = toy.decay_chain(600, 42)
    train = rows[events.split_rows(600, 42) == 0]
    assert meta["stats"] == stats and np.allclose(splits["train"]["globals"][:, 0], np.log1p(train[:, 18]) / 2)
    assert np.allclose(splits["train"]["x"][:, 0, 1], np.log(train[:, 25 - 4]), atol=1e-5)


def test_statistics_see_neither_other_splits_nor_padding(tmp_path):
    rows, labels = toy.decay_chain(600, 1)
    splits = ("train", "val", "test")
    parts = {f"X_{s}": x for s, x in zip(splits, np.split(rows, 3), strict=True)}
    names = {f"y_{s}": y for s, y in zip(splits, np.split(labels, 3), strict=True)}
    np.savez(tmp_path / "a.npz", **parts, **names)
    expected, meta = load(tmp_path / "a.npz")
    padded = {k: x.copy() for k, x in parts.items()}
    for x in padded.values():
        events.objects(x)[x[:, :18] == 0] = np.random.default_rng(0).choice([np.nan, np.inf, 1e9, -3])
    padded["X_val"][:, 18] *= 3
    events.objects(padded["X_test"])[..., :2] *= 2
    padded = {k: np.asfortranarray(x) for k, x in padded.items()}
    np.savez(tmp_path / "b.npz", **padded, **names)
    loaded, other = load(tmp_path / "b.npz")
    assert other["stats"] == meta["stats"] and other["dropped"] == {}
    assert all((loaded["train"][k] == expected["train"][k]).all() for k in ("x", "ids", "globals", "y"))


def test_a_constant_feature_does_not_divide_by_nothing(tmp_path):
    rows, labels = toy.decay_chain(100, 1)
    events.objects(rows)[..., 2] = 0.5
    np.savez(tmp_path / "a.npz", X=rows, y=labels)
    splits, meta = load(tmp_path / "a.npz")
    assert meta["stats"]["std"][2] == 1e-6 and splits["train"]["x"].isfinite().all()


def test_an_epoch_goes_through_all_events_once_in_an_order_of_its_own():
    orders = [events.epoch_order(seed, epoch, 50) for seed in (1, 2) for epoch in (0, 1)]
    assert all((np.sort(order) == np.arange(50)).all() for order in orders)
    assert len({tuple(order) for order in orders}) == 4 and (events.epoch_order(1, 0, 50) == orders[0]).all()


def products(rows):
    """Products of four-momenta (N, T, T), transverse ones with the missing momentum (N, T), length of the sum (N)."""
    energy, pt, eta, angle = np.moveaxis(events.objects(rows).astype(float), 2, 0)
    met, towards = rows[:, 18:20].astype(float).T
    momenta = np.stack([energy, pt * np.cos(angle), pt * np.sin(angle), pt * np.sinh(eta)])
    pairs = np.einsum("k,kni,knj->nij", [1, -1, -1, -1], momenta, momenta)
    return pairs, pt * met[:, None] * np.cos(angle - towards[:, None]), np.hypot(*momenta[1:3].sum(2))


@pytest.mark.parametrize("phi", ["sincos", "raw"])
@pytest.mark.parametrize("features", [events.COLUMNS, ("phi", "pT", "eta", "E")])
def test_rotated_and_mirrored_events_are_the_same_to_a_physicist(features, phi):
    splits, meta = load(features=features, phi=phi)
    train = splits["train"]
    after = events.rotate_and_mirror(train, meta, 1, 0)
    rows, other = (events.to_rows(part["x"], part["ids"], part["globals"], meta) for part in (train, after))
    scale = events.objects(rows)[..., 0].sum(1) ** 2
    for expected, actual in zip(products(rows), products(other), strict=True):
        assert (abs(actual - expected).reshape(len(rows), -1).max(1) < 1e-4 * scale).all()
    (one, two), there = (events.objects(part) for part in (rows, other)), rows[:, :18] > 0
    assert (rows[:, :18] == other[:, :18]).all() and np.allclose(one[..., :2], two[..., :2], rtol=1e-4)
    assert np.allclose(rows[:, 18], other[:, 18], rtol=1e-4) and (after["x"][train["ids"] == 0] == 0).all()
    sign = (two[..., 2] / np.where(there, one[..., 2], 1)).sum(1) / there.sum(1)
    assert np.allclose(abs(two[..., 2]), abs(one[..., 2]), atol=1e-4) and np.allclose(abs(sign), 1, atol=0.05)
    ahead, back = (events.wrap(two[:, 0, 3] - way * one[:, 0, 3]) for way in (1, -1))
    ahead_too, back_too = (events.wrap(two[:, 1, 3] - way * one[:, 1, 3]) for way in (1, -1))
    same_way, mirrored = abs(events.wrap(ahead - ahead_too)) < 1e-3, abs(events.wrap(back - back_too)) < 1e-3
    assert (same_way | mirrored).all() and 0.4 < same_way.mean() < 0.6 and 0.4 < (sign > 0).mean() < 0.6
    angle = np.where(same_way, ahead, back)
    assert abs(np.exp(1j * angle).mean()) < 0.1 and abs(np.corrcoef([same_way, sign])[0, 1]) < 0.15
    again, next_epoch = (events.rotate_and_mirror(train, meta, 1, epoch) for epoch in (0, 1))
    assert (again["x"] == after["x"]).all() and (again["globals"] == after["globals"]).all()
    assert (next_epoch["globals"][:, 1] != after["globals"][:, 1]).all()


def test_a_table_is_not_rotated():
    splits, meta = events.test_table(0, "binary")
    assert events.rotate_and_mirror(splits["train"], meta, 0, 0) is splits["train"]


@pytest.mark.parametrize("task", ["regression", "binary"])
def test_the_table_of_the_mlp(task):
    table, meta = events.test_table(7, task)
    assert meta["cont_dim"] == 16 and not meta["dropped"]
    assert {k: tuple(t["x"].shape) for k, t in table.items()} == dict(train=(4000, 16), val=(500, 16), test=(500, 16))
    assert abs(table["train"]["x"].mean(0)).max() < 1e-6 and abs(table["val"]["x"].mean(0)).max() > 1e-3
    x, y = (table["train"][key].numpy() for key in "xy")
    x = np.concatenate([x, np.ones((4000, 1))], 1)
    residual = y - x @ np.linalg.lstsq(x, y, rcond=None)[0]
    assert set(y.tolist()) == {0, 1} if task == "binary" else abs(residual.std() - 0.1) < 0.01
    assert all((table["test"][k] == events.test_table(7, task)[0]["test"][k]).all() for k in "xy")


# ---- files -----------------------------------------------------------------------------------------------------------


def simulated(n=300, seed=2):
    return toy.decay_chain(n, seed)


def six(rows, labels, y="Y"):
    a, b = len(rows) * 8 // 10, len(rows) * 9 // 10
    cuts = dict(train=slice(0, a), val=slice(a, b), test=slice(b, None))
    return {f"{key}_{name}": x[cut] for name, cut in cuts.items() for key, x in (("X", rows), (y, labels))}


@pytest.mark.parametrize("y", ["Y", "y"])
def test_six_keys_of_npz_and_h5(y, tmp_path):
    rows, labels = simulated()
    arrays = six(rows, labels, y)
    np.savez(tmp_path / "a.npz", **arrays, about=np.array(["more"]))
    content = events.read_events(tmp_path / "a.npz", seed=9)
    assert (content[0] == rows).all() and (content[1] == labels).all()
    assert np.bincount(content[2]).tolist() == [240, 30, 30]
    h5py = pytest.importorskip("h5py")
    for name in ("a.h5", "a.hdf5"):
        with h5py.File(tmp_path / name, "w") as file:
            for key, array in arrays.items():
                file[key] = array
            file.create_group("about")
        assert all(map(np.array_equal, content, events.read_events(tmp_path / name, seed=9)))


def test_x_and_y_are_split_by_the_seed(tmp_path):
    rows, labels = simulated()
    np.savez(tmp_path / "a.npz", X=rows.astype(np.float64), y=labels[:, None])
    content, y, split = events.read_events(tmp_path / "a.npz", seed=4)
    order = np.random.default_rng((4, 0)).permutation(300)
    assert (content == rows).all() and (y == labels).all() and content.dtype == np.float32
    assert [set(np.flatnonzero(split == i)) for i in range(3)] == [
        set(order[:240]),
        set(order[240:270]),
        set(order[270:]),
    ]


def test_other_numbers_of_slots(tmp_path):
    rows, labels = simulated()
    short = np.concatenate([rows[:, :7], rows[:, 18:20], rows[:, 20 : 20 + 28]], 1)
    np.savez(tmp_path / "a.npz", X=short, y=labels)
    splits, meta = load(tmp_path / "a.npz")
    part = splits["val"]
    assert meta["n_tokens"] == 7 and part["x"].shape == (30, 7, 5)
    back = events.to_rows(part["x"], part["ids"], part["globals"], meta)
    assert np.allclose(back, short[events.split_rows(300, 42) == 1], rtol=1e-4, atol=1e-4)


def test_mev(tmp_path):
    rows, labels = simulated()
    large = rows.copy()
    large[:, 18] *= 1000
    events.objects(large)[..., :2] *= 1000
    np.savez(tmp_path / "mev.npz", X=large, y=labels)
    np.savez(tmp_path / "gev.npz", X=rows, y=labels)
    (mev, _), (gev, _) = load(tmp_path / "mev.npz", energy_unit="MeV"), load(tmp_path / "gev.npz")
    assert all(np.allclose(mev[s][k], gev[s][k], atol=1e-5) for s in mev for k in mev[s])
    with pytest.raises(DataError) as caught:
        load(tmp_path / "mev.npz")
    assert "looks like MeV\ntry: --energy_unit MeV" in str(caught.value)


def spoil(row, reason):
    """Damage a row that has at least three objects."""
    first = events.objects(row[None])[0, 0]
    if reason == "NaN or infinite":
        first[2] = np.nan
    elif reason == "id not one of 0 to 7":
        row[1] = 2.5
    elif reason == "E or pT not above 0":
        first[1] = 0
    elif reason == "MET below 0":
        row[18] = -1
    elif reason == "eta beyond 10":
        first[2] = -11
    elif reason == "phi beyond 2 pi":
        first[3] = 6.3
    elif reason == "E below pT":
        first[0] = 0.9 * first[1]
    elif reason == "no object":
        row[:18] = 0


REASONS = [
    "NaN or infinite",
    "id not one of 0 to 7",
    "E or pT not above 0",
    "MET below 0",
    "eta beyond 10",
    "phi beyond 2 pi",
    "E below pT",
    "no object",
]


def test_damaged_rows_are_counted_by_reason_and_dropped(tmp_path):
    rows, labels = simulated(1200)
    for i, reason in enumerate(REASONS):
        spoil(rows[i], reason)
    rows[8, 0], rows[9, 0], rows[10, 19], rows[11, 20] = 8, np.nan, np.inf, -np.inf
    np.savez(tmp_path / "a.npz", X=rows, y=labels)
    splits, meta = load(tmp_path / "a.npz")
    expected = dict.fromkeys(REASONS, 1) | {"NaN or infinite": 4, "id not one of 0 to 7": 2}
    assert meta["dropped"] == expected and sum(len(part["y"]) for part in splits.values()) == 1188
    assert all(t.isfinite().all() for part in splits.values() for t in part.values())


def test_phi_is_wrapped_and_all_else_left_alone(tmp_path):
    rows, labels = simulated()
    shifted = rows.copy()
    for phi in (events.objects(shifted)[..., 3], shifted[:, 19]):
        phi -= 2 * np.pi * (phi > 0)
    filled = shifted[:, :18] > 0
    events.objects(shifted)[..., 3][filled] %= 2 * np.pi
    split = np.zeros(300)
    wrapped, *_ = events.drop_damaged(shifted, labels, split, "rows")
    assert np.allclose(wrapped, rows, atol=1e-5) and abs(wrapped[:, 19]).max() <= np.float32(np.pi)
    assert (events.drop_damaged(rows.copy(), labels, split, "rows")[0] == rows).all()


def test_labels_of_all_kinds(tmp_path):
    rows, labels = simulated()
    kinds = {
        "whole": (labels, labels),
        "floats": (labels.astype(np.float32)[:, None], labels),
        "bools": (labels > 2, labels > 2),
        "one-hot": (np.eye(6)[labels], labels),
        "one-hot bools": (np.eye(6, dtype=bool)[labels], labels),
        "signs": (np.where(labels > 2, -1, 1), np.where(labels > 2, -1, 1)),
        "none": (None, np.full(300, -1)),
    }
    for name, (y, expected) in kinds.items():
        np.savez(tmp_path / "a.npz", **{"X": rows} | ({} if y is None else {"y": y}))
        assert (events.read_events(tmp_path / "a.npz", seed=0)[1] == expected).all(), name
        splits, meta = load(tmp_path / "a.npz", labels=())
        assert sum(len(part["y"]) for part in splits.values()) == 300 and meta["notes"] == [], name
        assert meta["labels"] == sorted(set(expected.astype(int).tolist())), name


def test_labels_that_are_left_out_are_counted(tmp_path):
    rows, _ = simulated(600)
    np.savez(tmp_path / "a.npz", X=rows, y=np.arange(600) % 10)
    assert load(tmp_path / "a.npz")[1]["notes"] == ["240 of 600 left out: labels 6 7 8 9"]
    assert load(tmp_path / "a.npz", labels=())[1]["labels"] == list(range(10))


def test_other_spellings_of_the_keys(tmp_path):
    rows, labels = simulated()
    arrays = {k.replace("val", "valid").replace("X", "x"): v for k, v in six(rows, labels).items()}
    np.savez(tmp_path / "a.npz", **arrays)
    content = events.read_events(tmp_path / "a.npz", seed=0)
    assert (content[0] == rows).all() and np.bincount(content[2]).tolist() == [240, 30, 30]


def other_columns(rows, names):
    """Rows of other columns of a particle, made one by one."""
    new = np.zeros((len(rows), 20 + 18 * len(names)), np.float32)
    new[:, :20] = rows[:, :20]
    for row, other in zip(rows.astype(float), new, strict=True):
        for slot in range(18):
            energy, pt, eta, phi = row[20 + 4 * slot : 24 + 4 * slot]
            values = dict(E=energy, pT=pt, eta=eta, phi=phi, px=pt * np.cos(phi), py=pt * np.sin(phi))
            values |= dict(pz=pt * np.sinh(eta), charge=1.0 if row[slot] else 0)
            other[20 + len(names) * slot :][: len(names)] = [values[name] for name in names]
    return new


@pytest.mark.parametrize("features", [(), ("pz", "E"), ("px", "py")])
def test_a_file_that_names_its_columns(features, tmp_path):
    rows, labels = simulated()
    names = ("px", "py", "pz", "E", "charge")
    wide = other_columns(rows, names)
    events.write_events(tmp_path / "a.npz", wide, labels, seed=1, features=names)
    splits, meta = load(tmp_path / "a.npz", features=features, seed=1)
    assert meta["columns"] == list(names) and meta["features"] == list(features or names) and meta["n_tokens"] == 18
    part = splits["test"]
    back = events.to_rows(part["x"], part["ids"], part["globals"], meta)
    chosen = [names.index(name) for name in meta["features"]]
    before, after = (events.objects(some, names)[..., chosen] for some in (wide[events.split_rows(300, 1) == 2], back))
    assert part["x"].shape == (30, 18, len(chosen)) and np.allclose(after, before, rtol=1e-3, atol=1e-2)
    with pytest.raises(UsageError, match="--features eta: expected some of px py pz E charge, each once"):
        load(tmp_path / "a.npz", features=("eta",))
    standard = standard_rows(wide, names)
    assert np.allclose(standard, rows, rtol=1e-3, atol=1e-3)
    if features != ("pz", "E"):
        turned = events.rotate_and_mirror(splits["train"], meta, 1, 0)
        one, two = (events.to_rows(p["x"], p["ids"], p["globals"], meta) for p in (splits["train"], turned))
        lengths = [np.hypot(*np.moveaxis(events.objects(some, names)[..., :2], 2, 0)) for some in (one, two)]
        assert np.allclose(*lengths, rtol=1e-3, atol=1e-2) and not np.allclose(one, two, atol=1)


def test_slots_are_added(tmp_path):
    rows, _ = simulated()
    wide = events.add_slots(rows, 21)
    assert wide.shape == (300, 107) and events.add_slots(rows, 18) is rows
    assert (wide[:, :18] == rows[:, :18]).all() and (wide[:, 21:23] == rows[:, 18:20]).all()
    assert (events.objects(wide.copy())[:, :18] == events.objects(rows)).all()
    assert (wide[:, 18:21] == 0).all() and (wide[:, 95:] == 0).all()


def save(rows=None, **changes):
    """Return what writes a file of 300 events whose arrays `changes` replaces; None drops one."""

    def write(path):
        arrays = {k: v for k, v in (dict(zip("Xy", simulated(), strict=True)) | changes).items() if v is not None}
        np.savez(path, **arrays)

    return write


def parts(**changes):
    def write(path):
        arrays = {k: v for k, v in (six(*simulated()) | changes).items() if v is not None}
        np.savez(path, **arrays)

    return write


def damaged(path):
    rows, labels = simulated()
    for row, reason in zip(rows, REASONS[:2] * 2, strict=False):
        spoil(row, reason)
    np.savez(path, X=rows, y=labels)


def large(path):
    rows, labels = simulated()
    events.objects(rows)[..., :2] = 90000, 60000
    np.savez(path, X=rows, y=labels)


def degrees(path):
    rows, labels = simulated()
    events.objects(rows)[..., 3] = np.degrees(events.objects(rows)[..., 3])
    np.savez(path, X=rows, y=labels)


def swapped(path):
    rows, labels = simulated()
    events.objects(rows)[..., :2] = events.objects(rows)[..., [1, 0]]
    np.savez(path, X=rows, y=labels)


def pdg(path):
    rows, labels = simulated()
    rows[:, :18] = np.array([0, 21, 5, -11, 11, 13, -13, 22])[rows[:, :18].astype(int)]
    np.savez(path, X=rows, y=labels)


NUMBERED = "\nfix: number the classes 0, 1, ..."
READER = "\ntry: python prepare_data.py events --source {path} --out {stem}_events.npz"
SIX = "expected X and y, or X_train, Y_train and so for val and test"
ERRORS = [  # file name, the function that writes it, more arguments, error, message
    ("a.npz", None, {}, DataError,
     "{path}: no such file\nfix: python prepare_data.py events --source YOUR_FILE --out {path}"),
    ("a.csv", None, {}, UsageError,
     "{path}: expected a file .npz, .h5 or .hdf5\ntry: --data decay_chain"),
    ("a.npz", save(X=None), {}, DataError, f"{{path}}: no X: {SIX}\nkeys there: y{READER}"),
    ("a.npz", save(X=None, y=None), {}, DataError,
     f"{{path}}: no X_train, X_val, X_test: {SIX}\nkeys there: none{READER}"),
    ("a.npz", parts(X_val=None, Y_test=None), {}, DataError,
     f"{{path}}: no X_val, y_test: {SIX}\nkeys there: X_test, X_train, y_train, y_val{READER}"),
    ("a.npz", save(X=np.ones((300, 93))), {}, DataError,
     "{path}: X is float64 (300, 93): expected numbers (events, 2 + 5 T), all of one T" + READER),
    ("a.npz", save(X=np.ones((300, 18, 5))), {}, DataError,
     "{path}: X is float64 (300, 18, 5): expected numbers (events, 2 + 5 T), all of one T" + READER),
    ("a.npz", save(X=np.full((300, 92), "1")), {}, DataError,
     "{path}: X is <U1 (300, 92): expected numbers (events, 2 + 5 T), all of one T" + READER),
    ("a.npz", parts(X_val=np.ones((30, 87), np.float32)), {}, DataError,
     "{path}: X_val is float32 (30, 87): expected numbers (events, 2 + 5 T), all of one T" + READER),
    ("a.npz", save(y=np.zeros(299, int)), {}, DataError,
     "{path}: y is int64 (299,): expected whole numbers (300,), as long as X, or one-hot rows" + NUMBERED),
    ("a.npz", save(y=np.full(300, 0.5)), {}, DataError,
     "{path}: y is float64 (300,): expected whole numbers (300,), as long as X, or one-hot rows" + NUMBERED),
    ("a.npz", save(y=np.full(300, np.nan)), {}, DataError,
     "{path}: y is float64 (300,): expected whole numbers (300,), as long as X, or one-hot rows" + NUMBERED),
    ("a.npz", parts(X_val=np.ones((0, 92)), Y_val=np.ones(0)), {}, DataError, "{path}: X_val is empty: (0, 92)"),
    ("a.npz", save(X=simulated(2)[0], y=simulated(2)[1]), {}, DataError,
     "{path}: a split is empty: train 1, val 0, test 1\nfix: more events, other --labels"),
    ("a.npz", save(), dict(labels=(7, 8)), DataError,
     "{path}: no event of labels 7 8\nlabels there: 0 1 2 3 4 5"),
    ("a.npz", damaged, {}, DataError,
     "{path}: 4 of 300 rows are damaged: 2 NaN or infinite, 2 id not one of 0 to 7\n"
     "only 1% would be dropped; leave them out?" + READER),
    ("a.npz", large, {}, DataError,
     "{path}: half of the pT are above 60000: looks like MeV\ntry: --energy_unit MeV"),
    ("a.npz", lambda path: path.write_bytes(b"junk"), {}, DataError, "{path} can't be read: ValueError: "),
    ("a.npz", lambda path: path.write_bytes(b"PK\x03\x04junk"), {}, DataError, "{path} can't be read: BadZipFile: "),
    ("a.npz", save(X=np.array([{}] * 300, object)), {}, DataError, "{path} can't be read: ValueError: "),
    ("decay_chain", None, dict(events=9), UsageError, "--events 9: expected 10 or more, for three splits"),
    ("decay_chain", None, dict(features=("E", "mass")), UsageError,
     "--features E mass: expected some of E pT eta phi, each once"),
    ("decay_chain", None, dict(features=("E", "E")), UsageError,
     "--features E E: expected some of E pT eta phi, each once"),
    ("a.npz", degrees, {}, DataError,
     "{path}: 300 of 300 rows are damaged: 300 phi beyond 2 pi\nphi in degrees?"
     + READER.replace(" --out", " --phi degrees --out")),
    ("a.npz", swapped, {}, DataError,
     "{path}: 300 of 300 rows are damaged: 300 E below pT\npT before E?"
     + READER.replace(" --out", " --order pT E eta phi --out")),
    ("a.npz", pdg, {}, DataError, "{path}: 300 of 300 rows are damaged: 300 id not one of 0 to 7\n"
     "ids of the Particle Data Group?" + READER.replace(" --out", " --ids pdg --out")),
    ("a.npz", save(features=np.array(["E", "pT", "E"])), {}, DataError,
     "{path}: features E pT E: expected the columns of a particle, each once"),
]  # fmt: skip


@pytest.mark.parametrize("name, write, more, error, message", ERRORS)
def test_errors_name_the_file_and_the_problem(name, write, more, error, message, tmp_path):
    path = tmp_path / name if "." in name else name
    if write:
        write(path)
    with pytest.raises((DataError, UsageError)) as caught:
        load(path, **more)
    text, expected = str(caught.value), message.format(path=path, stem=tmp_path / "a")
    assert type(caught.value) is error and len(text.splitlines()) <= 3
    assert text.startswith(expected) if expected.endswith(": ") else text == expected


def test_h5_without_the_package(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(DataError) as caught:
        load(tmp_path / "a.h5")
    assert str(caught.value) == f"{tmp_path}/a.h5: needs the package h5py, an .npz file does not\ntry: pip install h5py"


# ---- prepare_data.py events ------------------------------------------------------------------------------------------


def prepare(capsys, *argv):
    """Return status, stdout, stderr of the command line."""
    with pytest.raises(SystemExit) as stop:
        prepare_data.run(["events", *map(str, argv)])
    return stop.value.code, *capsys.readouterr()


@pytest.mark.parametrize("form", ["npz", "h5"])
def test_prepared_events_are_the_generators(form, tmp_path, capsys):
    if form == "h5":
        pytest.importorskip("h5py")
    out, digests = tmp_path / "new" / f"a.{form}", []
    for _ in range(2):
        status, text, _ = prepare(capsys, "--events", 60, "--out", out, "--seed", 3, "--format", form)
        digests.append(hashlib.sha256(out.read_bytes()).hexdigest())
    assert status == 0 and digests[0] == digests[1] and list(out.parent.iterdir()) == [out]
    assert text == (f"{out}: 60 events: 10 tt, 10 tttt, 10 ttH, 10 ttW, 10 ttWW, 10 ttZ; "
                    f"next: python train_ae.py --data {out}\n")  # fmt: skip
    rows, labels, split = events.read_events(out, seed=0)
    expected, processes = toy.decay_chain(60, 3)
    order = np.argsort(events.split_rows(60, 3), kind="stable")
    assert (rows == expected[order]).all() and (labels == processes[order]).all()
    assert np.bincount(split).tolist() == [48, 6, 6]


@pytest.mark.parametrize(
    "flags, status, message",
    [
        (["--out", "a.csv"], 2, "a.csv: expected a file .npz, .h5 or .hdf5\ntry: --out data/events.npz"),
        (["--out", "x/a.npz", "--format", "h5"], 2, "--out x/a.npz --format h5: name the file a.h5"),
        (["--events", "9"], 2, "--events 9: expected 10 or more"),
        (["--seed", "-1"], 2, "--seed -1: expected 0 or more"),
        (["--out", "a.h5"], 1, "a.h5: needs the package h5py, an .npz file does not\ntry: pip install h5py"),
        (["--generator", "pythia"], 1, "--generator pythia needs the package fastjet\n"
         "try: pip install pythia8mc==8.317.2 fastjet\ntry: --generator decay_chain"),
    ],
)  # fmt: skip
def test_prepare_refuses(flags, status, message, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    for package in ("h5py", "fastjet", "pythia8mc"):
        monkeypatch.setitem(sys.modules, package, None)
    assert prepare(capsys, *flags) == (status, "", f"error: {message}\n") and not list(tmp_path.iterdir())


def test_pythia(tmp_path, capsys):
    pytest.importorskip("pythia8mc")
    pytest.importorskip("fastjet")
    status, _, _ = prepare(capsys, "--generator", "pythia", "--events", 20, "--out", tmp_path / "a.npz")
    rows, labels, _ = events.read_events(tmp_path / "a.npz", seed=0)
    assert status == 0 and np.bincount(labels).tolist() == [4, 4, 4, 4, 0, 4]
    good, _, _, dropped = events.drop_damaged(rows.copy(), labels, labels, "rows")
    assert not dropped and np.allclose(good, rows, atol=1e-5)
