"""prepare_data.py events --source: files in the layouts of other programs against particles converted one by one."""

import math
import re
import sys

import numpy as np
import pytest

import prepare_data
from data_utils.errors import DataError, UsageError
from data_utils.events import dataset as events
from data_utils.events.layouts import NAMED, read_columns
from data_utils.events.sources import Ragged, open_source
from tests.helpers import ROOT

N, T = 40, 12


def particles(seed=0, slots=T):
    """A list of events, each a list of dicts of a particle's quantities, the hardest first."""
    rng, drawn = np.random.default_rng(seed), []
    for _ in range(N):
        event = []
        for _ in range(rng.integers(1, slots + 1)):
            pt, eta, phi, mass = rng.exponential(30) + 1, rng.normal(), rng.uniform(-3.1, 3.1), rng.random()
            one = dict(pT=pt, eta=eta, phi=phi, mass=mass, px=pt * math.cos(phi), py=pt * math.sin(phi))
            one["pz"] = pt * math.sinh(eta)
            one["E"] = math.sqrt(pt**2 + one["pz"] ** 2 + mass**2)
            one["massless"] = math.hypot(pt, one["pz"])
            one["y"] = math.atanh(one["pz"] / one["E"])
            one["charge"] = float(rng.integers(-1, 2))
            event.append(one)
        drawn.append(sorted(event, key=lambda one: -one["pT"]))
    return drawn


EVENTS = particles()
LABELS = np.arange(N) % 3


def table(name, of=EVENTS, slots=T, empty=0.0, factor=1.0):
    """(N, slots) of a quantity, with `empty` where there is no particle."""
    values = np.full((len(of), slots), empty)
    for row, event in zip(values, of, strict=True):
        row[: len(event)] = [one[name] * factor for one in event]
    return values


def lists(name, factor=1.0):
    return [[one[name] * factor for one in event] for event in EVENTS]


def expected(of=EVENTS, most=T, energy="E", columns=("E", "pT", "eta", "phi"), met=True):
    """Rows made one by one; MET is minus the sum of all particles."""
    slots = min(most, max(map(len, of)))
    rows = np.zeros((len(of), 2 + (1 + len(columns)) * slots))
    for row, event in zip(rows, of, strict=True):
        kept = event[:most]
        row[: len(kept)] = 1
        px, py = (-sum(one[name] for one in event) for name in ("px", "py"))
        row[slots : slots + 2] = (math.hypot(px, py), math.atan2(py, px)) if met else (0, 0)
        for i, one in enumerate(kept):
            values = [one[energy] if name == "E" else one[name] for name in columns]
            row[slots + 2 + len(columns) * i :][: len(columns)] = values
    return rows


def convert(out, *paths, path=None, **flags):
    """Convert files and return what read_events reads: rows, labels, splits."""
    settings = dict(source=tuple(map(str, paths or [path])), out=str(out)) | flags
    prepare_data.main(prepare_data.EventsConfig(**settings))
    return events.read_events(out, seed=0)


def check(content, reference, labels=LABELS, rtol=1e-4):
    rows, read, split = content
    order = np.argsort(events.split_rows(len(reference), 0), kind="stable")
    assert rows.shape == reference.shape and np.allclose(rows, reference[order], rtol=rtol, atol=1e-4)
    assert (read == (np.full(len(rows), -1) if labels is None else labels[order])).all()
    assert np.bincount(split).tolist() == [32, 4, 4]


# ---- layouts ---------------------------------------------------------------------------------------------------------


def test_jetnet(tmp_path, capsys):
    h5py = pytest.importorskip("h5py")
    jets = np.array([[1000 + i, 0.1 * (i % 5), 80, len(event)] for i, event in enumerate(EVENTS)])
    block = np.zeros((N, T, 4))
    block[..., 0] = np.where(table("pT") > 0, table("eta") - jets[:, 1:2], 0)
    block[..., 1] = table("phi")
    block[..., 2] = table("pT") / jets[:, :1]
    block[..., 3] = table("pT") > 0
    block[block[..., 3] == 0] = 7  # masked slots hold anything
    block[..., 3] = table("pT") > 0
    for name in ("g", "q"):
        with h5py.File(tmp_path / f"{name}.hdf5", "w") as file:
            file["particle_features"], file["jet_features"] = block, jets
    sources = [tmp_path / "g.hdf5", tmp_path / "q.hdf5"]
    check(convert(tmp_path / "a.npz", sources[0]), expected(energy="massless"), None)
    assert "layout jetnet" in capsys.readouterr().out
    rows, labels, _ = convert(tmp_path / "b.npz", *sources)
    assert len(rows) == 2 * N and np.bincount(labels).tolist() == [N, N]
    assert f"labels: 0 {N} (g.hdf5), 1 {N} (q.hdf5)" in capsys.readouterr().out
    names = ("pT_rel", "eta_rel", "phi_rel")
    convert(tmp_path / "c.npz", sources[0], features=names)
    assert events.columns_in(tmp_path / "c.npz") == names
    rows = np.load(tmp_path / "c.npz")["X_train"]
    order = np.flatnonzero(events.split_rows(N, 0) == 0)
    there = table("pT")[order] > 0
    relative = [np.where(there, block[order, :, i], 0) for i in (2, 0, 1)]
    assert np.allclose(events.objects(rows, names), np.stack(relative, 2), atol=1e-5)


def lhco_block(label):
    block = np.zeros((N, 2101))
    for i, name in enumerate(("pT", "eta", "phi")):
        block[:, i : 3 * T : 3] = table(name)
    block[:, 2100] = LABELS
    return block if label else block[:, :2100]


@pytest.mark.parametrize("label", [True, False])
def test_lhco(label, tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        group = file.create_group("df")
        group["axis0"] = group["block0_items"] = np.arange(2100 + label)
        group["axis1"], group["block0_values"] = np.arange(N), lhco_block(label)
    check(convert(tmp_path / "a.npz", tmp_path / "a.h5"), expected(energy="massless"), LABELS if label else None)


def top_frame():
    pandas = pytest.importorskip("pandas")
    columns = {f"{name}_{i}": table(quantity)[:, i].astype(np.float32) for i in range(T)
               for name, quantity in (("E", "E"), ("PX", "px"), ("PY", "py"), ("PZ", "pz"))}  # fmt: skip
    return pandas.DataFrame(columns | dict(truthE=np.float32(0), ttv=0, is_signal_new=LABELS))


def test_toptagging_as_pandas_writes_it(tmp_path):
    """The layout of pandas' to_hdf(format="table"), whose names of columns stand in a pickle of protocol 0."""
    h5py = pytest.importorskip("h5py")
    frame = top_frame()
    floats, integers = frame.columns[:-2], frame.columns[-2:]
    kinds = [("index", "<i8"), ("values_block_0", "<f4", (len(floats),)), ("values_block_1", "<i8", (2,))]
    records = np.zeros(N, kinds)
    records["values_block_0"], records["values_block_1"] = frame[floats], frame[integers]
    with h5py.File(tmp_path / "a.h5", "w") as file:
        data = file.create_group("table").create_dataset("table", data=records)
        for i, names in enumerate((floats, integers)):
            text = "(lp0\n" + "".join(f"V{name}\np{k}\na" for k, name in enumerate(names, 1)) + "."
            data.attrs[f"values_block_{i}_kind"] = np.bytes_(text)
    check(convert(tmp_path / "a.npz", tmp_path / "a.h5"), expected())


@pytest.mark.parametrize("form", ["table", "fixed"])
def test_toptagging_by_pandas_itself(form, tmp_path):
    pytest.importorskip("tables")
    pytest.importorskip("h5py")
    top_frame().to_hdf(tmp_path / "a.h5", key="table", format=form)
    check(convert(tmp_path / "a.npz", tmp_path / "a.h5"), expected())


def test_toptagging_in_other_files(tmp_path):
    frame = top_frame()
    frame.to_csv(tmp_path / "a.csv", index=False)
    check(convert(tmp_path / "a.npz", tmp_path / "a.csv"), expected())
    pytest.importorskip("pyarrow")
    frame.to_parquet(tmp_path / "a.parquet")
    check(convert(tmp_path / "b.npz", tmp_path / "a.parquet"), expected())


def jetclass_columns():
    names = dict(E="part_energy", px="part_px", py="part_py", pz="part_pz", charge="part_charge")
    columns = {name: lists(quantity) for quantity, name in names.items()}
    kinds = [[(i + k) % 4 for k in range(len(event))] for i, event in enumerate(EVENTS)]
    for number, name in enumerate(("isElectron", "isMuon", "isPhoton")):
        columns[f"part_{name}"] = [[float(kind == number) for kind in event] for event in kinds]
    for number, name in enumerate(("QCD", "Hbb", "Tbl")):
        columns[f"label_{name}"] = LABELS == number
    return columns, kinds


def check_jetclass(content, kinds):
    rows, labels, _ = content
    reference = expected()
    for row, event, types in zip(reference, EVENTS, kinds, strict=True):
        for slot, (one, kind) in enumerate(zip(event, types, strict=True)):
            plus = one["charge"] > 0
            row[slot] = {0: 3 if plus else 4, 1: 6 if plus else 5, 2: 7, 3: 1}[kind]
    order = np.argsort(events.split_rows(N, 0), kind="stable")
    assert np.allclose(rows, reference[order], rtol=1e-4, atol=1e-4) and (labels == LABELS[order]).all()


def test_jetclass_in_parquet(tmp_path):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    columns, kinds = jetclass_columns()
    pandas.DataFrame(columns).to_parquet(tmp_path / "a.parquet")
    check_jetclass(convert(tmp_path / "a.npz", tmp_path / "a.parquet"), kinds)


def test_jetclass_in_root(tmp_path):
    uproot = pytest.importorskip("uproot")
    awkward = pytest.importorskip("awkward")
    columns, kinds = jetclass_columns()
    arrays = {name: awkward.Array(values) if type(values) is list else values for name, values in columns.items()}
    with uproot.recreate(tmp_path / "a.root") as file:
        file.mktree("tree", {name: getattr(array, "type", None) or array.dtype for name, array in arrays.items()})
        file["tree"].extend(arrays)
    check_jetclass(convert(tmp_path / "a.npz", tmp_path / "a.root"), kinds)


@pytest.mark.parametrize("form", ["csv", "parquet", "npz"])
def test_columns_with_the_usual_names(form, tmp_path, capsys):
    pandas = pytest.importorskip("pandas")
    names = dict(pt="pT", eta="eta", phi="phi", m="mass")
    path = tmp_path / f"a.{form}"
    if form == "csv":
        rows = [dict(event=900 - i, label=LABELS[i]) | {name: one[quantity] for name, quantity in names.items()}
                for i, event in enumerate(EVENTS) for one in event]  # fmt: skip
        pandas.DataFrame(rows).to_csv(path, index=False)
    elif form == "parquet":
        pytest.importorskip("pyarrow")
        frame = pandas.DataFrame({f"part_{name}": lists(quantity) for name, quantity in names.items()})
        frame.assign(label=LABELS).to_parquet(path)
    else:
        np.savez(path, label=LABELS, **{name: table(quantity, empty=np.nan) for name, quantity in names.items()})
    check(convert(tmp_path / "out.npz", path), expected())
    assert "layout names of columns" in capsys.readouterr().out


def test_jets_are_particles_where_there_are_no_others(tmp_path):
    jets = {f"jet_{name}": table(name) for name in ("pT", "eta", "phi", "mass")}
    np.savez(tmp_path / "a.npz", **jets, weight=np.ones(N))
    check(convert(tmp_path / "b.npz", tmp_path / "a.npz"), expected(), None)


def test_structured_arrays(tmp_path):
    h5py = pytest.importorskip("h5py")
    jets = np.zeros(N, [("pt", "f4"), ("eta", "f4"), ("phi", "f4"), ("truth", "i4")])
    jets["eta"], jets["phi"], jets["truth"] = 0.5, 3, LABELS
    tracks = np.zeros((N, T), [("pt", "f4"), ("deta", "f4"), ("dphi", "f4")])
    there = table("pT") > 0
    tracks["pt"] = table("pT")
    tracks["deta"] = np.where(there, table("eta") - 0.5, 0)
    tracks["dphi"] = np.where(there, events.wrap(table("phi") - 3), 0)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["jets"], file["tracks"] = jets, tracks
    check(convert(tmp_path / "a.npz", tmp_path / "a.h5"), expected(energy="massless"))


# ---- --columns -------------------------------------------------------------------------------------------------------


def test_a_yaml_of_columns(tmp_path):
    block = np.stack([table(name, empty=-999.0) for name in ("pT", "eta", "phi", "mass")], 2)
    block[..., 0] = np.where(block[..., 0] == -999, -999, 1000 * block[..., 0])
    block[..., 3] = np.where(block[..., 3] == -999, -999, 1000 * block[..., 3])
    block[..., 2] = np.where(block[..., 2] == -999, -999, np.degrees(block[..., 2]))
    codes = np.where(table("pT") > 0, np.arange(T) % 3 + 10, -999)
    met = np.stack([np.arange(N) * 1000.0, np.full(N, 90.0)], 1)
    np.savez(tmp_path / "a.npz", block=block, codes=codes, met=met, truth=np.eye(3)[LABELS], more=np.zeros(5))
    (tmp_path / "a.yaml").write_text(
        "particles: {pT: 'block[0]', eta: 'block[1]', phi: 'block[-2]', mass: 'block[3]', id: codes}\n"
        "ids: {10: 1, 11: 2, 12: 7}\nevent: {MET: 'met[0]', MET_phi: 'met[1]'}\nlabel: truth\n"
        "energy_unit: MeV\nphi: degrees\npadding: -999\n"
    )
    reference = expected()
    reference[:, :T] = np.where(table("pT") > 0, np.array([1, 2, 7])[np.arange(T) % 3], 0)
    reference[:, T], reference[:, T + 1] = np.arange(N), np.pi / 2
    check(convert(tmp_path / "b.npz", tmp_path / "a.npz", columns=str(tmp_path / "a.yaml")), reference)


def test_slots_that_are_events_values(tmp_path):
    """The layout of a trigger's data: the first slot is MET, and the last column says what a slot is."""
    h5py = pytest.importorskip("h5py")
    block = np.zeros((N, T + 1, 4))
    block[:, 0, 0], block[:, 0, 2], block[:, 0, 3] = 30, 1.5, 1
    for i, name in enumerate(("pT", "eta", "phi")):
        block[:, 1:, i] = table(name)
    block[:, 1:, 3] = np.where(table("pT") > 0, 4, 0)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["Particles"] = block
    text = "particles: {pT: 'Particles[0]', eta: 'Particles[1]', phi: 'Particles[2]', id: 'Particles[3]'}\n"
    text += "ids: {1: 0, 2: 4, 3: 5, 4: 1}\nevent: {MET: 'Particles[0]', MET_phi: 'Particles[2]'}\n"
    (tmp_path / "a.yaml").write_text(text)
    reference = expected(energy="massless")
    reference[:, T : T + 2] = 30, 1.5
    check(convert(tmp_path / "b.npz", tmp_path / "a.h5", columns=str(tmp_path / "a.yaml")), reference, None)


def test_neutrinos_are_left_out_and_labels_may_be_texts(tmp_path, capsys):
    rows = ["event,pt,eta,phi,id,label,note"]
    for event in range(20):
        rows += [f"{event},{30 + i},0,{i},{number},{'sb'[event % 2]},x" for i, number in enumerate((12, 211, -14, 22))]
    (tmp_path / "a.csv").write_text("\n".join(rows) + "\n")
    content, labels, _ = convert(tmp_path / "a.npz", tmp_path / "a.csv", ids="pdg")
    assert (content[:, :2] == [7, 1]).all() and content.shape[1] == 2 + 5 * 2 and sorted(set(labels)) == [0, 1]
    out = capsys.readouterr().out
    assert "label: 0 b, 1 s" in out and "jets: particles of the numbers 211 (20)" in out
    assert "not read, since they hold text: note" in out
    text = "\n".join(rows)
    (tmp_path / "b.csv").write_text(text.replace(",0,", ",0.5,").replace(",", ";").replace(".", ","))
    assert (convert(tmp_path / "c.npz", tmp_path / "b.csv", ids="pdg")[0][:, 6] == 0.5).all()
    (tmp_path / "a.csv").write_text(text.replace("19,30,0,0,12,b", "19,30,0,0,12,"))
    with pytest.raises(DataError, match="line 78: no label"):
        convert(tmp_path / "b.npz", tmp_path / "a.csv")


@pytest.mark.parametrize("form", ["csv", "rows.csv", "parquet", "h5"])
def test_texts_of_labels_are_numbered_over_all_files(form, tmp_path, capsys):
    pandas = pytest.importorskip("pandas")
    momenta = [dict(pt=[30.0 + i, 20.0], eta=[0.5, 0.25], phi=[1.0, 2.0]) for i in range(20)]

    def write(name, kind, label="label"):
        path = tmp_path / f"{name}.{form}"
        if form == "csv":  # a row is a particle
            rows = [{"event": i, label: kind, "note": "x"} | {key: values[k] for key, values in one.items()}
                    for i, one in enumerate(momenta) for k in range(2)]  # fmt: skip
            pandas.DataFrame(rows).to_csv(path, index=False)
        elif form == "rows.csv":  # a row is an event
            rows = [{label: kind} | {f"{key}_{k}": values[k] for key, values in one.items() for k in range(2)}
                    for one in momenta]  # fmt: skip
            pandas.DataFrame(rows).to_csv(path, index=False)
        elif form == "parquet":
            pytest.importorskip("pyarrow")
            pandas.DataFrame([one | {label: kind} for one in momenta]).to_parquet(path)
        else:
            with pytest.importorskip("h5py").File(path, "w") as file:
                file.update({key: np.array([one[key] for one in momenta]) for key in momenta[0]})
                file[label] = np.array([kind.encode()] * 20) if type(kind) is str else np.full(20, kind)
        return str(path)

    def columns(label):
        star = "_*" if form == "rows.csv" else ""
        text = f"particles: {{pT: pt{star}, eta: eta{star}, phi: phi{star}}}\nlabel: {label}\n"
        (tmp_path / "a.yaml").write_text(text)
        return str(tmp_path / "a.yaml")

    for label in ("label", "process"):  # the second is no usual name
        files = [write("a", "sig", label), write("b", "bkg", label)]
        _, labels, _ = convert(tmp_path / "out.npz", *files, columns=columns(label))
        assert sorted(labels.tolist()) == [0] * 20 + [1] * 20
        out = capsys.readouterr().out
        assert f"{label}: 0 bkg, 1 sig\n" in out and "labels: 0 20, 1 20" in out
    with pytest.raises(DataError, match=r"a\..*label holds text.*b\..*numbers"):
        convert(tmp_path / "out.npz", write("a", "sig"), write("b", 1), columns=columns("label"))
    if form == "h5":
        return  # its texts are never missing
    path = tmp_path / f"c.{form}"
    if form == "parquet":
        pandas.DataFrame([one | {"label": None if i == 2 else "s"} for i, one in enumerate(momenta)]).to_parquet(path)
    else:
        write("c", "s")
        lines = path.read_text().splitlines()
        path.write_text("\n".join([*lines[:3], lines[3].replace("s,", ",", 1), *lines[4:]]))
    with pytest.raises(DataError, match="event 3: no label" if form == "parquet" else "line 4: no label"):
        convert(tmp_path / "out.npz", path, columns=columns("label"))


def test_each_run_has_its_own_events(tmp_path, capsys):
    rows = [
        (run, event, 20 + run, label) for run in (7, 8) for event, label in enumerate([0, 1] * 10) for _ in range(2)
    ]
    lines = ["run,event,pt,eta,phi,label", *(f"{run},{event},{pt},1,2,{label}" for run, event, pt, label in rows)]
    (tmp_path / "a.csv").write_text("\n".join(lines) + "\n")
    content, labels, _ = convert(tmp_path / "out.npz", tmp_path / "a.csv")
    assert len(content) == 40 and sorted(labels.tolist()) == [0] * 20 + [1] * 20
    capsys.readouterr()
    lines = [line.partition(",")[2].replace("0,28,1,2,0", "0,28,1,2,1") for line in lines]  # without the run
    (tmp_path / "a.csv").write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match="line 2: the particles of one event have several label\nfix: a column `run`"):
        convert(tmp_path / "out.npz", tmp_path / "a.csv")
    (tmp_path / "a.csv").write_text("\n".join(line.rpartition(",")[0] for line in lines) + "\n")
    assert len(convert(tmp_path / "out.npz", tmp_path / "a.csv")[0]) == 20
    assert "20 times an event goes on after another began; its particles are joined" in capsys.readouterr().out


def test_columns_in_another_order_and_radians_as_degrees_are_refused(tmp_path):
    rng = np.random.default_rng(0)
    x = np.stack([rng.uniform(20, 90, (60, 3)), rng.normal(0, 1, (60, 3)), rng.uniform(-3, 3, (60, 3))], 2)
    np.savez(tmp_path / "a.npz", X=np.concatenate([x, 2 * x[..., :1]], 2))
    with pytest.raises(DataError, match="of 60 events: E or pT not above 0\nfix: --order"):
        convert(tmp_path / "out.npz", tmp_path / "a.npz")
    order = ("pT", "eta", "phi", "E")
    assert len(convert(tmp_path / "out.npz", tmp_path / "a.npz", order=order)[0]) == 60
    with pytest.raises(DataError, match="phi in degrees fills 2 pi: are these radians?"):
        convert(tmp_path / "b.npz", tmp_path / "a.npz", order=order, phi="degrees")


@pytest.mark.parametrize("padding", [0, -999])
def test_degrees_are_read_beside_angles_that_hardly_move(tmp_path, padding):
    columns = "particles: {pT: pt, eta: eta, phi: phi}\nevent: {MET: met, MET_phi: met_phi}\nphi: degrees\n"
    (tmp_path / "columns.yaml").write_text(f"{columns}padding: {padding}\n")
    rng, shape = np.random.default_rng(0), (120, 3)

    def read(name, phi):
        values = dict(pt=rng.uniform(20, 90, shape), eta=rng.normal(0, 1, shape), phi=phi)
        for value in values.values():
            value[:, 2] = padding  # an empty slot, which is no angle
        np.savez(tmp_path / f"{name}.npz", **values, met=np.full(120, 30.0), met_phi=np.zeros(120))
        path = tmp_path / f"{name}.npz"
        return convert(tmp_path / f"{name}_out.npz", path, columns=str(tmp_path / "columns.yaml"), features=("phi",))

    full = read("full", rng.uniform(-180, 180, shape))[0]
    assert np.abs(full[:, 4:6]).max() == pytest.approx(np.pi, abs=0.1) and full.shape == (120, 6)
    near = read("near", rng.uniform(-2, 2, shape))[0]  # all lie near phi 0
    assert np.abs(near[:, 4:6]).max() == pytest.approx(np.radians(2), abs=0.01)
    with pytest.raises(DataError, match="phi in degrees fills 2 pi"):
        read("radians", rng.uniform(-np.pi, np.pi, shape))


def test_decimal_commas_may_come_late(tmp_path):
    rows = [f"{i};{20 + i}{',5' if i > 3 else ''};1;{k}" for i in range(20) for k in range(2)]
    (tmp_path / "a.csv").write_text("\n".join(["event;pt;eta;phi", *rows]) + "\n")
    assert set((convert(tmp_path / "out.npz", tmp_path / "a.csv")[0][:, 5] % 1).tolist()) == {0, 0.5}


def test_rapidity_and_pdg_numbers(tmp_path):
    block = np.stack([table("pT"), table("y"), table("phi"), np.where(table("pT") > 0, 211, 0)], 2)
    block[:, 0, 3] = -11
    np.savez(tmp_path / "a.npz", X=block, y=LABELS, mass=table("mass"))
    (tmp_path / "a.yaml").write_text(
        "particles: {pT: 'X[0]', y: 'X[1]', phi: 'X[2]', id: 'X[3]', mass: mass}\nids: pdg\nlabel: y\n"
    )
    reference = expected()
    reference[:, 0] = 3
    check(convert(tmp_path / "b.npz", tmp_path / "a.npz", columns=str(tmp_path / "a.yaml")), reference, rtol=1e-3)


@pytest.mark.parametrize(
    "text, problem",
    [
        ("- a\n", "expected `particles:` with lines of QUANTITY: COLUMN"),
        ("particles: {pT: a}\n", "particles pT: expected px py pz, or pT eta phi, or pT_rel eta_rel phi_rel"),
        ("particles: {pT: 3, eta: b, phi: c}\n", "expected the name of a column after each quantity"),
        ("particles: {pT: a, eta: b, phi: c}\nlabels: y\n", "labels: expected some of energy_unit event event_id ids"),
        ("particles: {pT: a, eta: b, phi: c}\nphi: grad\n", "phi: grad: expected radians or degrees"),
        ("particles: {pT: a, eta: b, phi: c}\nids: {a: 3}\n", "ids: expected petri, pdg, or lines of NUMBER: NUMBER"),
        ("particles: {pT: a, eta: b, phi: c}\nevent: {HT: a}\n", "event HT: expected some of MET MET_phi"),
        ("particles: {pT: a, eta: b, phi: c}\npadding: x\n", "padding: x: expected a number"),
        ("particles: {pT: a\n", "while parsing a flow mapping"),
    ],
)
def test_a_yaml_that_says_nothing(text, problem, tmp_path):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UsageError) as caught:
        read_columns(tmp_path / "a.yaml")
    assert str(caught.value).startswith(f"--columns {tmp_path}/a.yaml: {problem}")


def test_the_example_of_the_docs_is_read(tmp_path):
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    (tmp_path / "a.yaml").write_text(re.search(r"```yaml\n(.*?)```", page, re.S)[1])
    layout = read_columns(tmp_path / "a.yaml")
    assert layout.particles["pT"] == "Particles[0]" and layout.ids == {1: 0, 2: 4, 3: 5, 4: 1}
    assert (layout.padding, layout.tree, layout.event_id, layout.label) == (-999, "events", "event", ("truth",))


# ---- petri's own, splits, cuts, units --------------------------------------------------------------------------------


def petri_rows():
    rows = np.zeros((N, 2 + 5 * T), np.float32)
    reference = expected()
    rows[:, : reference.shape[1]] = reference
    return rows


def test_rows_of_this_project_stay_as_they_are(tmp_path):
    rows = petri_rows()
    np.savez(tmp_path / "a.npz", X=rows, y=LABELS)
    order = np.argsort(events.split_rows(N, 0), kind="stable")
    content = convert(tmp_path / "b.npz", tmp_path / "a.npz")
    assert (content[0] == rows[order]).all() and (content[1] == LABELS[order]).all()
    np.save(tmp_path / "a.npy", rows)
    assert (convert(tmp_path / "c.npz", tmp_path / "a.npy")[0] == rows[order]).all()
    cube = events.objects(rows)[..., [1, 0, 2, 3]]
    np.savez(tmp_path / "d.npz", X=cube)
    content = convert(tmp_path / "e.npz", tmp_path / "d.npz", order=("pT", "E", "eta", "phi"))
    assert np.allclose(content[0], rows[order], rtol=1e-4, atol=1e-4) and (content[1] == -1).all()


def test_splits_of_a_file_are_kept(tmp_path, capsys):
    rows = petri_rows()
    cuts = dict(train=slice(0, 20), valid=slice(20, 35), test=slice(35, 40))
    np.savez(tmp_path / "a.npz", **{f"x_{name}": rows[cut] for name, cut in cuts.items()})
    content = convert(tmp_path / "b.npz", tmp_path / "a.npz")
    assert (content[0] == rows).all() and np.bincount(content[2]).tolist() == [20, 15, 5]
    for name, cut in cuts.items():
        np.savez(tmp_path / f"jets_{name}.npz", X=rows[cut], y=LABELS[cut])
    sources = [tmp_path / f"jets_{name}.npz" for name in ("test", "train", "valid")]
    content = convert(tmp_path / "c.npz", *sources)
    assert (content[0] == rows).all() and (content[1] == LABELS).all()
    np.savez(tmp_path / "train.npz", X_train=rows, Y_train=LABELS)
    check(convert(tmp_path / "d.npz", tmp_path / "train.npz"), rows)
    assert "X_train alone is read, and split anew" in capsys.readouterr().out


def test_the_hardest_are_kept(tmp_path, capsys):
    mixed = [event[::-1] for event in EVENTS]
    np.savez(tmp_path / "a.npz", **{name: table(name, mixed) for name in ("E", "px", "py", "pz")})
    check(convert(tmp_path / "b.npz", tmp_path / "a.npz", max_particles=5), expected(most=5), None)
    sizes = np.array([len(event) for event in EVENTS])
    text = f"{(sizes > 5).sum()} events have more than 5 particles: the hardest are kept, "
    assert f"{text}{(sizes - 5)[sizes > 5].sum()} are cut" in capsys.readouterr().out


def test_other_columns_are_written(tmp_path):
    np.savez(tmp_path / "a.npz", **{name: table(name) for name in ("px", "py", "pz", "E", "charge")})
    names = ("charge", "mass", "E", "pz")
    convert(tmp_path / "b.npz", tmp_path / "a.npz", features=names)
    assert events.columns_in(tmp_path / "b.npz") == names
    check(events.read_events(tmp_path / "b.npz", seed=0), expected(columns=names), None, rtol=1e-3)
    h5py = pytest.importorskip("h5py")
    convert(tmp_path / "b.h5", tmp_path / "a.npz", features=names)
    assert events.columns_in(tmp_path / "b.h5") == names and h5py.File(tmp_path / "b.h5")["X_val"].shape[0] == 4
    content = convert(tmp_path / "c.npz", tmp_path / "b.npz", features=names)
    assert (content[0] == events.read_events(tmp_path / "b.npz", seed=0)[0]).all()


def test_left_out_events_are_counted(tmp_path, capsys):
    rows = petri_rows()
    rows[0, :T] = 0
    rows[1:3, T + 2] = np.nan
    rows[3, T + 4] = 12
    np.savez(tmp_path / "a.npz", X=rows, y=LABELS)
    assert len(convert(tmp_path / "b.npz", tmp_path / "a.npz")[0]) == N - 4
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    for line in ("events read 40", "kept 36", "left out: NaN or infinite 2", "left out: no object 1",
                 "left out: eta beyond 10 1", "labels: 0 12, 1 12, 2 12"):  # fmt: skip
        assert line.split() in lines, line
    ranges = {line[0]: line[1:] for line in lines if len(line) == 4}
    kept = events.objects(rows[4:])[rows[4:, :T] > 0]
    for i, name in enumerate(("E", "pT", "eta", "phi")):
        values = float(kept[:, i].min()), float(np.median(kept[:, i])), float(kept[:, i].max())
        assert np.allclose([float(text) for text in ranges[name]], values, rtol=1e-3), name


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_slices_make_no_difference(size, tmp_path, monkeypatch):
    monkeypatch.setattr("data_utils.events.prepare.AT_ONCE", size)
    np.savez(tmp_path / "a.npz", label=LABELS, **{name: table(name) for name in ("pT", "eta", "phi", "mass")})
    check(convert(tmp_path / "b.npz", tmp_path / "a.npz"), expected())
    assert len(convert(tmp_path / "c.npz", tmp_path / "a.npz", limit=11)[0]) == 11


# ---- refusals --------------------------------------------------------------------------------------------------------


def spoiled(tmp_path, name, **flags):
    rows = petri_rows()
    particles = events.objects(rows)
    if name == "degrees":
        particles[..., 3] = np.degrees(particles[..., 3])
    elif name == "swapped":
        particles[..., :2] = particles[..., [1, 0]]
    elif name == "pdg":
        rows[:, :T] = np.where(rows[:, :T] > 0, -13, 0)
    elif name == "MeV":
        particles[..., :2] *= 1000
    elif name == "no ids":
        rows[:, :T] = 5.5
    elif name == "all bad":
        particles[..., 0] = np.where(rows[:, :T] > 0, -1, 0)
    np.savez(tmp_path / "a.npz", X=rows)
    return convert(tmp_path / "b.npz", tmp_path / "a.npz", **flags)


@pytest.mark.parametrize(
    "name, message, flags",
    [
        ("degrees", "40 of 40 events: phi beyond 2 pi\nphi in degrees?\ntry: --phi degrees", dict(phi="degrees")),
        ("swapped", "40 of 40 events: E below pT\npT before E?\ntry: --order pT E eta phi",
         dict(order=("pT", "E", "eta", "phi"))),
        ("pdg", "40 of 40 events: id not one of 0 to 7\nids of the Particle Data Group?\ntry: --ids pdg",
         dict(ids="pdg")),
        ("MeV", "looks like MeV\ntry: --energy_unit MeV", dict(energy_unit="MeV")),
        ("no ids", "no whole numbers: are these ids?\nfix: an array (events, particles, columns) with --order", {}),
        ("all bad", "40 of 40 events: E or pT not above 0\nfix: --order or a file for --columns", {}),
    ],
)  # fmt: skip
def test_what_is_refused_and_the_remedy(name, message, flags, tmp_path):
    with pytest.raises(DataError) as caught:
        spoiled(tmp_path, name)
    assert message in str(caught.value) and not (tmp_path / "b.npz").exists()
    if flags:
        rows = spoiled(tmp_path, name, **flags)[0]
        order = np.argsort(events.split_rows(N, 0), kind="stable")
        reference = petri_rows()[order]
        reference[:, T] /= 1000 if name == "MeV" else 1
        reference[:, T + 1] = np.radians(reference[:, T + 1]) if name == "degrees" else reference[:, T + 1]
        reference[:, :T] *= 6 if name == "pdg" else 1
        assert np.allclose(rows, reference, rtol=1e-4, atol=1e-4)


def write(path):
    if path.name == "empty.npz":
        np.savez(path, X=np.zeros((0, 92)))
    elif path.suffix == ".npz":
        np.savez(path, a=np.zeros((N, 3)), b=np.zeros(N))
    else:
        path.write_bytes(b"junk")
    return path


@pytest.mark.parametrize(
    "name, flags, error, message",
    [
        ("a.txt", {}, UsageError, "expected a file .npz .npy .h5 .hdf5 .parquet .root .csv .tsv"),
        ("a.npz", {}, DataError, "no known layout\ncolumns there: a (40, 3), b (40)\nfix: a file for --columns"),
        ("empty.npz", {}, DataError, "empty.npz: no events in it"),
        ("a.npz", dict(layout="jetnet"), DataError, "a.npz is not of layout jetnet\ncolumns there: a (40, 3), b (40)"),
        (
            "a.npz",
            dict(layout="lhco", columns="a.yaml"),
            UsageError,
            "--columns a.yaml --layout lhco: give one of them",
        ),
        ("a.npz", dict(features=("E", "E")), UsageError, "--features E E: expected names of columns, each once"),
        ("a.npz", dict(features=("id",)), UsageError, "--features id: mask and id are in each file"),
        ("a.npz", dict(events=9), UsageError, "--events 9: expected 10 or more"),
        ("a.npz", dict(format="h5"), UsageError, "--format h5: name the file b.h5"),
        ("a.npz", dict(max_particles=0), UsageError, "--max_particles 0: expected 1 or more"),
        ("a.h5", {}, DataError, "a.h5 can't be read: OSError"),
        ("a.parquet", {}, DataError, "a.parquet can't be read: Arrow"),
        ("a.npz", dict(out="a.csv"), UsageError, "expected a file .npz, .h5 or .hdf5"),
    ],
)
def test_files_that_are_refused(name, flags, error, message, tmp_path):
    for package in {".h5": ["h5py"], ".parquet": ["pyarrow"]}.get(name[1:], []):
        pytest.importorskip(package)
    with pytest.raises(error) as caught:
        convert(**dict(out=tmp_path / "b.npz") | flags) if False else convert(
            flags.pop("out", tmp_path / "b.npz"), write(tmp_path / name), **flags
        )
    assert message in str(caught.value)


def test_a_column_that_is_not_there(tmp_path):
    np.savez(tmp_path / "a.npz", **{name: table(name) for name in ("pT", "eta", "phi")})
    for text, message in (
        ("{pT: pt, eta: eta, phi: phi}", "no column pt (did you mean pT?)\ncolumns there: pT (40, 12), eta"),
        ("{pT: 'pT[3]', eta: eta, phi: phi}", "pT (40,), eta (40, 12), phi (40, 12): expected (events, particles)"),
        ("{pT: 'pT[30]', eta: eta, phi: phi}", "pT[30]: pT has the shape (40, 12)"),
        ("{pT: 'PT_*', eta: eta, phi: phi}", "no column PT_*"),
    ):
        (tmp_path / "a.yaml").write_text(f"particles: {text}\n")
        with pytest.raises(DataError) as caught:
            convert(tmp_path / "b.npz", tmp_path / "a.npz", columns=str(tmp_path / "a.yaml"))
        assert message in str(caught.value), text
    with pytest.raises(UsageError, match="--features charge: not in .*a.npz\ncolumns of its particles: pT eta phi px"):
        convert(tmp_path / "b.npz", tmp_path / "a.npz", features=("charge",))


def test_sources_are_never_replaced(tmp_path):
    rows = petri_rows()
    np.savez(tmp_path / "a.npz", X=rows)
    before = (tmp_path / "a.npz").read_bytes()
    for fresh in (False, True):
        with pytest.raises(UsageError, match="is a file that this command reads"):
            convert(tmp_path / "a.npz", tmp_path / "a.npz", fresh=fresh)
    assert (tmp_path / "a.npz").read_bytes() == before


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    for package, ending in (("uproot", "root"), ("h5py", "h5")):
        monkeypatch.setitem(sys.modules, package, None)
        (tmp_path / f"a.{ending}").write_bytes(b"x")
        with pytest.raises(DataError) as caught:
            open_source(tmp_path / f"a.{ending}")
        assert str(caught.value) == f"{tmp_path}/a.{ending}: needs the package {package}\ntry: pip install {package}"


def test_flags_without_a_source(tmp_path):
    with pytest.raises(UsageError) as caught:
        prepare_data.main(prepare_data.EventsConfig(out=str(tmp_path / "a.npz"), phi="degrees"))
    assert str(caught.value) == "--phi: for files to convert, and none is named\nfix: name them with --source"


def test_ragged_columns_are_padded():
    column = Ragged([1, 2, 3, 4, 5, 6], [2, 0, 3, 1])
    assert np.array_equal(column[slice(0, 2)], [[1, 2], [np.nan, np.nan]], equal_nan=True)
    assert np.array_equal(column[slice(1, 4)], [[np.nan] * 3, [3, 4, 5], [6, np.nan, np.nan]], equal_nan=True)


def test_the_flag_lists_the_layouts():
    field = prepare_data.EventsConfig.__dataclass_fields__["layout"]
    assert set(field.type.__args__) == {"auto", *NAMED}
