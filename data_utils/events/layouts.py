"""Layouts of events of other programs: which column of a file is which quantity of a particle or an event.

| layout | of | form |
| --- | --- | --- |
| petri | this project | X and y, or X_train ..; rows as dataset.py describes them, or (N, T, C) with --order |
| jetnet | JetNet (arXiv 2106.11535) | particle_features: eta, phi, pT relative to the jet, mask; jet_features |
| lhco | LHC Olympics 2020 (arXiv 2101.08320) | a DataFrame of 700 times pT, eta, phi; then the label, if there is one |
| toptagging | top tagging reference (arXiv 1902.09914) | a DataFrame of E_0 PX_0 PY_0 PZ_0 E_1 .. and is_signal_new |
| jetclass | JetClass (arXiv 2202.03772) | part_px part_py part_pz part_energy as lists, ten label_X |
"""

import re
from dataclasses import dataclass, field, replace

from data_utils.errors import DataError, UsageError
from data_utils.events.sources import LABELS

PARTICLE = "E px py pz pT eta phi y mass pT_rel eta_rel phi_rel mask id charge".split()
EVENT = "MET MET_phi jet_pT jet_eta jet_phi".split()
JETCLASS_LABELS = tuple(f"label_{name}" for name in "QCD Hbb Hcc Hgg H4q Hqql Zqq Wqq Tbqq Tbl".split())
LHCO_WIDTHS = (2100, 2101)
PDG = {5: 2, -5: 2, -11: 3, 11: 4, 13: 5, -13: 6, 22: 7, 0: 0}  # all others are jets: 1
PDG |= {sign * number: 0 for number in (12, 14, 16) for sign in (1, -1)}  # a detector sees no neutrinos
SPELLINGS = {
    "energy": "E",
    "rapidity": "y",
    "m": "mass",
    "ptrel": "pT_rel",
    "etarel": "eta_rel",
    "phirel": "phi_rel",
    "deta": "eta_rel",
    "dphi": "phi_rel",
    "pdgid": "id",
    "pdg": "id",
    "pid": "id",
    "particle_id": "id",
}
METS = {"met": "MET", "met_met": "MET", "missing_et": "MET", "metphi": "MET_phi", "met_phi": "MET_phi"}


@dataclass
class Layout:
    """particles, event: {quantity: column, as Source.read takes it}; id may be {number of petri: column of flags}.

    label: a column or several one-hot ones; () for none. padding: value of empty slots besides 0 and NaN. ids: petri,
    pdg, or {number in the file: number of petri}.
    """

    name: str
    particles: dict
    event: dict = field(default_factory=dict)
    label: tuple = ()
    padding: float = float("nan")
    ids: str | dict = "petri"
    energy_unit: str = "GeV"
    phi: str = "radians"
    tree: str = ""
    event_id: str = ""


# ---- named layouts: each function returns a Layout, or None for a file of another form -------------------------------


def petri(source, order):
    """Return the layout of rows (N, 2 + (1 + C) T), or of an array X (N, T, C)."""
    x = source.columns.get("X")
    if x is None or len(x.shape) not in (2, 3):
        return None
    label = ("y",) if "y" in source.columns else ()
    if len(x.shape) == 3:
        if x.shape[2] != len(order):
            raise UsageError(
                f"{source.path}: X is {tuple(x.shape)}: expected {len(order)} columns per particle: {' '.join(order)}\n"
                f"fix: --order with {x.shape[2]} names, some of {' '.join(PARTICLE)}"
            )
        return Layout("petri", {name: f"X[{i}]" for i, name in enumerate(order)}, label=label)
    C = len(order)
    if (x.shape[1] - 2) % (1 + C) or x.shape[1] < 3 + C:
        return None
    T = (x.shape[1] - 2) // (1 + C)
    particles = {name: f"X[{T + 2 + i}::{C}]" for i, name in enumerate(order)}
    return Layout("petri", particles | dict(id=f"X[:{T}]"), dict(MET=f"X[{T}]", MET_phi=f"X[{T + 1}]"), label)


def jetnet(source, order):
    """Return the layout of a file of JetNet; the jet's phi is not in it."""
    particles, jets = (source.columns.get(name) for name in ("particle_features", "jet_features"))
    if particles is None or len(particles.shape) != 3 or particles.shape[2] < 3:
        return None
    names = ("eta_rel", "phi_rel", "pT_rel", "mask")[: particles.shape[2]]
    event = {} if jets is None else dict(jet_pT="jet_features[0]", jet_eta="jet_features[1]")
    return Layout("jetnet", {name: f"particle_features[{i}]" for i, name in enumerate(names)}, event)


def lhco(source, order):
    """Return the layout of a DataFrame of the LHC Olympics."""
    blocks = {name: c.shape[1] for name, c in source.columns.items() if len(c.shape) == 2 and c.shape[1] != "any"}
    name = next((name for name, width in blocks.items() if width in LHCO_WIDTHS), "")
    if not name:
        return None
    particles = {quantity: f"{name}[{i}:2100:3]" for i, quantity in enumerate(("pT", "eta", "phi"))}
    return Layout("lhco", particles, label=(f"{name}[2100]",) if blocks[name] == 2101 else ())


def toptagging(source, order):
    """Return the layout of the reference data of top tagging."""
    if not {"E_0", "PX_0", "PY_0", "PZ_0"} <= source.columns.keys():
        return None
    label = ("is_signal_new",) if "is_signal_new" in source.columns else ()
    return Layout("toptagging", dict(E="E_*", px="PX_*", py="PY_*", pz="PZ_*"), label=label)


def jetclass(source, order):
    """Return the layout of JetClass, with d0 and dz of the tracks where they are."""
    if not {"part_px", "part_py", "part_pz", "part_energy"} <= source.columns.keys():
        return None
    particles = dict(E="part_energy", px="part_px", py="part_py", pz="part_pz")
    more = dict(charge="part_charge", d0="part_d0val", dz="part_dzval")
    particles |= {quantity: name for quantity, name in more.items() if name in source.columns}
    flags = {4: "part_isElectron", 5: "part_isMuon", 7: "part_isPhoton"}
    if set(flags.values()) <= source.columns.keys():
        particles["id"] = flags
    event = {name: name.replace("T", "t") for name in EVENT[2:] if name.replace("T", "t") in source.columns}
    return Layout("jetclass", particles, event, tuple(name for name in JETCLASS_LABELS if name in source.columns))


NAMED = dict(petri=petri, jetnet=jetnet, toptagging=toptagging, jetclass=jetclass, lhco=lhco)


def by_name(source):
    """Return a Layout of columns with the usual names of quantities, such as pt, eta and phi; None without them."""
    layout = Layout("names of columns", {})
    jets = {}  # the particles of a file that has no others
    for name, column in source.columns.items():
        group, _, last = name.lower().rpartition("/")
        jet = group.startswith("jet") or last.startswith("jet")
        word = re.sub(r"^(jet|part|particle|constituent|track)s?_", "", last)
        quantity = {name.lower(): name for name in PARTICLE}.get(word, SPELLINGS.get(word, ""))
        if last in METS:
            layout.event.setdefault(METS[last], name)
        elif last in LABELS and (len(column.shape) == 1 or last != "y"):
            layout.label = layout.label or (name,)
        elif len(column.shape) == 2 and quantity:
            (jets if jet else layout.particles).setdefault(quantity, name)
        elif jet and f"jet_{quantity}" in EVENT:
            layout.event.setdefault(f"jet_{quantity}", name)
    layout.particles = layout.particles if is_enough(layout.particles) else jets
    return layout if is_enough(layout.particles) else None


def is_enough(quantities):
    """Return whether directions and momenta of particles follow from `quantities`."""
    names = set(quantities)
    polar = {"pT", "pT_rel"} & names and {"phi", "phi_rel"} & names
    return bool(({"px", "py"} <= names or polar) and {"pz", "eta", "y", "eta_rel"} & names)


def recognize(source, name, order):
    """Return the Layout `name` of a source, or with "auto" the first that its content fits.

    Raises DataError if none does.
    """
    if name != "auto":
        layout = NAMED[name](source, order)
        if not layout:
            raise DataError(
                f"{source.path} is not of layout {name}\ncolumns there: {source.describe()}\ntry: --layout auto"
            )
        return layout
    for function in NAMED.values():
        if layout := function(source, order):
            return layout
    if layout := by_name(source):
        return layout
    raise DataError(
        f"{source.path}: no known layout\ncolumns there: {source.describe()}\n"
        "fix: a file for --columns, which says what each column is, see docs/data.md"
    )


# ---- --columns FILE.yaml ---------------------------------------------------------------------------------------------


def read_columns(path):
    """Return the Layout that a YAML file describes. Raises UsageError, which names the file and the key."""
    import yaml

    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.safe_load(file)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as e:
        raise UsageError(f"--columns {path}: {' '.join(str(e).split())}") from e

    def refuse(problem):
        raise UsageError(f"--columns {path}: {problem}\nfix: as in the example in docs/data.md")

    if not isinstance(content, dict) or not isinstance(content.get("particles"), dict):
        refuse("expected `particles:` with lines of QUANTITY: COLUMN")
    known = {"particles", "event", "label", "padding", "ids", "energy_unit", "phi", "tree", "event_id"}
    if unknown := content.keys() - known:
        refuse(f"{', '.join(map(str, unknown))}: expected some of {' '.join(sorted(known))}")
    content = {key: value for key, value in content.items() if value is not None}
    particles, event = content["particles"], content.get("event", {})
    label = content.get("label", [])
    label = [label] if isinstance(label, str) else label
    flags = particles.get("id")
    flags = flags if isinstance(flags, dict) else {}
    texts = [value for name, value in particles.items() if name != "id" or not flags]
    texts += [*flags.values(), *(event.values() if isinstance(event, dict) else [event])]
    texts += label if isinstance(label, list) else [None]
    if not all(isinstance(text, str) for text in texts):
        refuse("expected the name of a column after each quantity, such as pT: jet_pt")
    if not is_enough(particles):
        names = " ".join(map(str, particles))
        refuse(f"particles {names}: expected px py pz, or pT eta phi, or pT_rel eta_rel phi_rel")
    if set(event) - set(EVENT):
        refuse(f"event {' '.join(map(str, event))}: expected some of {' '.join(EVENT)}")
    ids = content.get("ids", "petri")
    numbers = list(flags) + ([*ids, *ids.values()] if isinstance(ids, dict) else [])
    if not isinstance(ids, dict) and ids not in ("petri", "pdg") or not all(type(n) is int for n in numbers):
        refuse("ids: expected petri, pdg, or lines of NUMBER: NUMBER")
    choices = dict(energy_unit=("GeV", "MeV"), phi=("radians", "degrees"))
    for key, values in choices.items():
        if content.get(key, values[0]) not in values:
            refuse(f"{key}: {content[key]}: expected {' or '.join(values)}")
    padding = content.get("padding", float("nan"))
    if isinstance(padding, bool) or not isinstance(padding, (int, float)):
        refuse(f"padding: {padding}: expected a number")
    layout = Layout(str(path), particles, event, tuple(label), float(padding), ids)
    rest = {key: content[key] for key in ("energy_unit", "phi", "tree", "event_id") if key in content}
    return replace(layout, **rest)
