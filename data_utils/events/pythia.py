"""Simulate particle events with Pythia 8 and anti-kt jets, by the packages pythia8mc and fastjet.

13 TeV. tttt, ttW and ttZ are two hard processes in one event, not true matrix elements; there is no ttWW. Detector and
cuts are those of decay_chain.py, except that jets are clustered here and that photons are seen.
"""

import math

import numpy as np

from data_utils.errors import DataError
from data_utils.events import decay_chain as toy

BEAMS = "Print:quiet=on", "Beams:eCM=13000", "PhaseSpace:mHatMin=300", "Random:setSeed=on"
TOPS = "Top:gg2ttbar=on", "Top:qqbar2ttbar=on"
SECOND = *TOPS, "SecondHard:generate=on", "PhaseSpace:sameForSecond=off"
PROCESSES = {
    0: TOPS,
    1: (*SECOND, "SecondHard:TopPair=on", "PhaseSpace:mHatMinSecond=300"),
    2: ("HiggsSM:gg2Httbar=on", "HiggsSM:qqbar2Httbar=on"),
    3: (*SECOND, "SecondHard:SingleW=on", "PhaseSpace:mHatMinSecond=60"),
    5: (*SECOND, "SecondHard:SingleGmZ=on", "PhaseSpace:mHatMinSecond=70"),
}
NEUTRINOS = 12, 14, 16
LEPTONS = {-11: 3, 11: 4, 13: 5, -13: 6}  # number of the particle -> id in a row
PHOTON, PHOTON_PT = 22, 20
LEAST_PT, MOST_ETA = 0.3, 4.9  # of a particle that the detector sees


def pythia_events(n, seed):
    """Yield n pairs of a row (92,) float32, as dataset.py describes it, and its label, in turn 0 1 2 3 5.

    About 80 per second. Raises DataError when a package is missing.
    """
    try:
        import fastjet
        import pythia8mc
    except ImportError as e:
        raise DataError(
            f"--generator pythia needs the package {e.name}\n"
            "try: pip install pythia8mc==8.317.2 fastjet\ntry: --generator decay_chain"
        ) from None
    anti_kt, generators = fastjet.JetDefinition(fastjet.antikt_algorithm, toy.JET_RADIUS), {}
    rng = np.random.default_rng((seed, 4))
    for label, process in PROCESSES.items():
        generators[label] = pythia8mc.Pythia("", False)
        settings = *BEAMS, *process, f"Random:seed={seed % 900_000_000 + 1}"  # seed 0 would take the clock
        if not all([*map(generators[label].readString, settings), generators[label].init()]):
            raise DataError(f"pythia8mc refuses its settings for label {label}\ntry: pip install pythia8mc==8.317.2")
    for i in range(n):
        label, row = list(generators)[i % len(generators)], None
        while row is None:
            if generators[label].next():
                objects, others, hadrons, met = _detect(generators[label].event, rng)
                jets = fastjet.ClusterSequence([fastjet.PseudoJet(*p) for p in others], anti_kt).inclusive_jets(20)
                momenta = [(jet.e(), jet.pt(), jet.eta(), jet.phi_std()) for jet in jets]
                row = _row(objects + _jets(momenta, objects, hadrons, rng), met)
        yield row, label


def _detect(event, rng):
    """Return leptons and photons (id, E, pT, eta, phi), (px, py, pz, E) of the rest, b hadrons (eta, phi), MET."""
    objects, others, hadrons = [], [], []
    px = py = total = 0.0
    for particle in event:
        kind = particle.id()
        if not particle.isFinal():
            if _has_bottom(abs(kind)) and particle.pT() > 5:
                hadrons.append((particle.eta(), particle.phi()))
            continue
        if abs(kind) in NEUTRINOS:
            px += particle.px()
            py += particle.py()
            continue
        pt, eta = particle.pT(), particle.eta()
        if pt < LEAST_PT or abs(eta) > MOST_ETA:
            continue
        total += pt
        least = PHOTON_PT if kind == PHOTON else toy.LEPTON_PT if kind in LEPTONS else math.inf
        if pt > least and abs(eta) < toy.LEPTON_ETA and _prompt(event, particle) and rng.random() < toy.EFFICIENCY[3]:
            scale = 1 + 0.02 * rng.normal()
            objects.append((LEPTONS.get(kind, 7), particle.e() * scale, pt * scale, eta, particle.phi()))
        else:
            others.append((particle.px(), particle.py(), particle.pz(), particle.e()))
    width = 0.5 * math.sqrt(total)
    return objects, others, hadrons, (px + width * rng.normal(), py + width * rng.normal())


def _has_bottom(number):
    """Say whether a particle, by its PDG number, is a hadron with a b quark."""
    return number > 500 and 5 in (number // 100 % 10, number // 1000 % 10)


def _prompt(event, particle):
    """Say whether no hadron is among the ancestors, by the first mother of each."""
    while (mother := particle.mother1()) > 2:
        particle = event[mother]
        if 100 < abs(particle.id()) < 1_000_000:
            return False
    return True


def _jets(momenta, objects, hadrons, rng):
    """Return smeared and tagged jets (id, E, pT, eta, phi) that pass the cuts and are no lepton or photon."""
    jets = []
    for energy, pt, eta, phi in momenta:
        scale = max(0.3, 1 + math.sqrt(0.64 / pt + 0.0025) * rng.normal())
        overlaps = any(_distance(eta, phi, *other[3:]) < toy.JET_RADIUS / 2 for other in objects)
        if abs(eta) > toy.JET_ETA or pt * scale < toy.JET_PT or overlaps:
            continue
        near = any(_distance(eta, phi, *hadron) < toy.JET_RADIUS for hadron in hadrons)
        tagged = rng.random() < toy.EFFICIENCY[2 if near and abs(eta) < toy.LEPTON_ETA else 1]
        jets.append((1 + tagged, energy * scale, pt * scale, eta, phi))
    return jets


def _distance(eta, phi, other_eta, other_phi):
    return math.hypot(eta - other_eta, math.remainder(phi - other_phi, 2 * math.pi))


def _row(objects, met):
    """Return the row of an event, or None if it does not pass the cuts."""
    objects = sorted(objects, key=lambda one: -one[2])[: toy.SLOTS]  # by falling pT
    if len(objects) < toy.LEAST_OBJECTS or sum(one[2] for one in objects) < toy.LEAST_HT:
        return None
    row = np.zeros(2 + 5 * toy.SLOTS, np.float32)
    table = np.array(objects)
    row[: len(table)] = table[:, 0]
    row[toy.SLOTS : toy.SLOTS + 2] = math.hypot(*met), math.atan2(met[1], met[0])
    row[toy.SLOTS + 2 :][: 4 * len(table)] = table[:, 1:].reshape(-1)
    return row
