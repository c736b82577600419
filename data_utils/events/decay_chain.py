"""Simulate decay chains of top quarks and W, Z, H bosons, down to jets, leptons and missing momentum.

A toy: masses and branching fractions are those of nature; production, radiation and detector are a few random numbers.
GeV and radians. S particles in N events: arrays (S, N), momenta (4, S, N) of E, px, py, pz. Events are the last axis,
so that every operation runs along them. Ids as in a row of dataset.py: 0 nothing or unseen, 1 jet, 2 b-jet, 3 e+,
4 e-, 5 mu-, 6 mu+, 7 photon (never simulated here).
"""

import numpy as np

VERSION = 1  # of the simulation: raise it with any change of the events, so that no run goes on with other ones
SLOTS = 18
LABELS = dict(tt="", tttt="tt", ttH="H", ttW="W", ttWW="WW", ttZ="Z")  # label 0, 1 ..: the particles beside two tops
MASS = dict(t=(172.5, 1.4), W=(80.4, 2.1), Z=(91.19, 2.5), H=(125.0, 0.0))  # mean, width
B_MASS = 4.8
PT_SCALE = dict(t=125, W=80, Z=90, H=100)  # mean pT
FOUR_TOPS_SCALE = 150
CHANNELS = dict(  # share of the decays, ids of the two daughters; W is W+; the third of W is tau -> jet, neutrinos
    W=((0.126, 3, 0), (0.126, 6, 0), (0.073, 1, 0), (0.675, 1, 1)),
    Z=((0.05, 3, 4), (0.05, 6, 5), (0.20, 0, 0), (0.15, 2, 2), (0.55, 1, 1)),
    H=((0.58, 2, 2), (0.42, 1, 1)),
)
ANTI = np.array([0, 1, 2, 4, 3, 6, 5, 7], np.int8)  # id of the antiparticle
RADIATED = 1.0  # jets per event; with 1.3, pairs of tops have 5.45 objects, against 5.3 in events of Pythia
MOST_RADIATED = 6  # 12 quarks of four tops and 6 jets fill the slots
JET_PT, JET_ETA, LEPTON_PT, LEPTON_ETA, JET_RADIUS = 25, 2.8, 15, 2.5, 0.4
LEAST_HT, LEAST_OBJECTS = 200, 3  # of an event that passes
# chance of a jet to be tagged as b, and of a lepton to be seen
EFFICIENCY = np.array([0, 0.02, 0.70, 0.9, 0.9, 0.9, 0.9, 0], np.float32)
BLOCK = 1024  # events simulated at once: their arrays stay in the cache


def decay_chain(n, seed):
    """Return rows (n, 92) float32 as dataset.py describes them and labels (n,) int64, 0 1 2 3 4 5 0 1 ..

    A function of the seed: a longer call begins with the events of a shorter one.
    """
    rows = np.empty((n, 2 + 5 * SLOTS), np.float32)
    labels = np.arange(n) % len(LABELS)
    for label, extra in enumerate(LABELS.values()):
        rng = np.random.default_rng((seed, 2, label))
        part, filled = rows[label :: len(LABELS)], 0
        while filled < len(part):
            block = detect(*collide("tt" + extra, BLOCK, rng), rng)[: len(part) - filled]
            part[filled : filled + len(block)] = block
            filled += len(block)
    return rows, labels


def collide(heavy, n, rng):
    """Produce and decay the particles named in `heavy`, such as ttH.

    Returns ids, pT, eta, phi (S, N) of the daughters and of the radiation, and px, py (2, N) of the unseen ones.
    """
    shift = rng.normal(0, 0.5, n)
    tops, others = heavy.count("t"), heavy.lstrip("t")
    mass = breit_wigner("t", tops, n, rng)
    top = produce(mass, FOUR_TOPS_SCALE if tops == 4 else PT_SCALE["t"], shift, rng)
    masses = [breit_wigner("W", tops, n, rng)]
    w, bottom = two_body(top, mass, masses[0], B_MASS, rng)
    bosons = [w]
    for name in others:
        masses.append(breit_wigner(name, 1, n, rng))
        bosons.append(produce(masses[-1], PT_SCALE[name], shift, rng))
    names = "W" * tops + others
    ids = np.stack([channels(name, n, rng) for name in names], 1)  # (2, S, N)
    minus = np.arange(len(names))[:, None] % 2 ^ rng.integers(0, 2, n)  # charges alternate, so that + and - balance
    ids = np.where(minus, ANTI[ids], ids)
    daughter_masses = np.where(ids == 2, B_MASS, 0.0)
    daughters = two_body(np.concatenate(bosons, 1), np.concatenate(masses), *daughter_masses, rng)
    momenta = np.concatenate([*daughters, bottom], 1)
    ids = np.concatenate([*ids, np.full((tops, n), 2, np.int8)])
    unseen = (momenta[1:3] * (ids == 0)).sum(1)
    pt = np.hypot(momenta[1], momenta[2])
    seen = ids, pt, np.arcsinh(momenta[3] / pt), np.arctan2(momenta[2], momenta[1])
    return *(np.concatenate(pair) for pair in zip(seen, radiation(n, rng), strict=True)), unseen


def breit_wigner(name, count, n, rng):
    """Draw masses (count, n) of a Breit-Wigner distribution, whose tails are cut 5 widths away."""
    mean, width = MASS[name]
    return mean + width / 2 * np.tan(0.94 * np.pi * (rng.random((count, n)) - 0.5))


def produce(mass, scale, shift, rng):
    """Draw momenta (4, S, N) of particles of mass (S, N) and mean pT `scale`: two back to back, more in balance."""
    pt = rng.gamma(2.0, scale / 2, mass.shape)
    phi = rng.uniform(-np.pi, np.pi, mass.shape)
    if len(mass) == 2:
        phi[1] = phi[0] + rng.normal(np.pi, 0.35, len(shift))
        pt[1] = pt[0] * rng.lognormal(0, 0.2, len(shift))
    px, py = pt * np.cos(phi), pt * np.sin(phi)
    if len(mass) > 2:
        px, py = px - px.mean(0), py - py.mean(0)
    rapidity = shift + rng.normal(0, 0.8, mass.shape)
    transverse_mass = np.sqrt(mass**2 + px**2 + py**2)
    return np.stack([transverse_mass * np.cosh(rapidity), px, py, transverse_mass * np.sinh(rapidity)])


def two_body(parent, mass, first, second, rng):
    """Decay particles isotropically in their rest frames; return momenta (4, S, N) of both daughters.

    parent: (4, S, N); mass, first, second: masses of parent and daughters, which broadcast to (S, N). The result is
    exact: the daughters have their masses, and add up to the parent.
    """
    energy = (mass**2 + first**2 - second**2) / (2 * mass)  # of the first daughter in the rest frame
    cosine = rng.uniform(-1, 1, mass.shape)
    angle = rng.uniform(-np.pi, np.pi, mass.shape)
    momentum = np.sqrt(energy**2 - first**2)
    across = momentum * np.sqrt(1 - cosine**2)
    rest = np.stack([across * np.cos(angle), across * np.sin(angle), momentum * cosine])
    along = (parent[1:] * rest).sum(0)
    daughter = np.empty_like(parent)
    daughter[0] = (parent[0] * energy + along) / mass
    daughter[1:] = rest + parent[1:] * ((along / (parent[0] + mass) + energy) / mass)
    return daughter, parent - daughter


def channels(name, n, rng):
    """Draw decays of one kind of boson; return ids (2, n) int8 of the daughters."""
    share, *ids = zip(*CHANNELS[name], strict=True)
    drawn = np.searchsorted(np.cumsum(share)[:-1], rng.random(n), side="right")
    return np.array(ids, np.int8)[:, drawn]


def radiation(n, rng):
    """Draw jets that come from no decay: ids, pT, eta, phi (MOST_RADIATED, n); id 0 where there is none."""
    radiated = np.arange(MOST_RADIATED)[:, None] < rng.poisson(RADIATED, n)
    count, values = radiated.sum(), np.zeros((3, *radiated.shape))
    values[:, radiated] = (
        np.minimum(JET_PT * (1 + rng.pareto(2.2, count)), 600),
        rng.normal(0, 1.6, count),
        rng.uniform(-np.pi, np.pi, count),
    )
    return radiated.astype(np.int8), *values


def detect(ids, pt, eta, phi, unseen, rng):
    """Smear, tag and cut particles, remove overlaps, sort by pT; return rows (M, 92) of the events that pass.

    ids, pt, eta, phi: (S, N); unseen: px, py (2, N) of the particles that leave no trace.
    """
    pt, eta, phi = (x.astype(np.float32) for x in (pt, eta, phi))
    lepton, lucky = ids > 2, rng.random(ids.shape, np.float32) < EFFICIENCY[ids]
    resolution = np.where(lepton, np.float32(0.02), np.sqrt(0.64 / np.maximum(pt, 5) + 0.0025))
    pt *= np.maximum(0.3, 1 + resolution * rng.standard_normal(ids.shape, np.float32))
    as_lepton = lucky & (pt > LEPTON_PT) & (abs(eta) < LEPTON_ETA)
    visible = np.where(lepton, as_lepton, (ids > 0) & (pt > JET_PT) & (abs(eta) < JET_ETA))
    ids = np.where(lepton, ids, 1 + lucky)
    order = np.argsort(np.where(visible, -pt, 0), 0)[: visible.sum(0).max()]
    ids, pt, eta, phi, visible = (np.take_along_axis(x, order, 0) for x in (ids, pt, eta, phi, visible))
    for i in range(1, len(visible)):  # the softer object of an overlapping pair goes
        turn = abs(phi[:i] - phi[i])
        near = (eta[:i] - eta[i]) ** 2 + np.minimum(turn, 2 * np.float32(np.pi) - turn) ** 2 < JET_RADIUS**2
        visible[i] &= ~(near & visible[:i]).any(0)
    ht = (pt * visible).sum(0)
    missing = unseen + 0.5 * np.sqrt(1.4 * ht + 350) * rng.standard_normal(unseen.shape)
    rows = np.zeros((len(ht), 2 + 5 * SLOTS), np.float32)
    objects = rows[:, SLOTS + 2 :].reshape(len(ht), SLOTS, 4)
    slot = (visible.cumsum(0) - 1)[visible]
    event = np.nonzero(visible)[1]
    ids, pt, eta, phi = (x[visible] for x in (ids, pt, eta, phi))
    jet_mass = 0.12 * np.exp(0.35 * rng.standard_normal(len(pt), np.float32))
    mass = pt * np.where(ids > 2, 0, np.minimum(jet_mass, 0.4))
    rows[event, slot] = ids
    objects[event, slot] = np.stack([np.hypot(pt * np.cosh(eta), mass), pt, eta, phi], 1)
    rows[:, SLOTS] = np.hypot(*missing)
    rows[:, SLOTS + 1] = np.arctan2(missing[1], missing[0])
    return rows[(ht > LEAST_HT) & (visible.sum(0) >= LEAST_OBJECTS)]
