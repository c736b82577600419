"""The quantities that a physicist looks at in rows of events: momenta, sums and masses.

Rows (N, 2 + 5 T) as in dataset.py, in GeV and radians. Ids: 0 nothing, 1 jet, 2 b-jet.
"""

import numpy as np

from data_utils.events.dataset import COLUMNS, objects, slots

MOST_ETA = 20  # of a particle along the beam, whose eta is infinite


def complete(values):
    """Return {name: array} of particles with all of E pT eta phi px py pz mass that follow from `values`.

    Without E and mass a particle is massless. A rapidity y stands in for eta where there is a mass or an E.
    """
    values = dict(values)

    def add(name, needs, function):
        if name not in values and set(needs.split()) <= values.keys():
            with np.errstate(all="ignore"):  # empty slots divide 0 by 0
                values[name] = function(*(values[need] for need in needs.split()))

    add("pT", "px py", np.hypot)
    add("phi", "px py", lambda px, py: np.arctan2(py, px))
    add("eta", "pT pz", lambda pt, pz: np.clip(np.arcsinh(pz / np.maximum(pt, 1e-30)), -MOST_ETA, MOST_ETA))
    add("pz", "pT y mass", lambda pt, y, mass: np.hypot(pt, mass) * np.sinh(y))
    add("pz", "E y", lambda energy, y: energy * np.tanh(y))
    add("eta", "pT pz", lambda pt, pz: np.clip(np.arcsinh(pz / np.maximum(pt, 1e-30)), -MOST_ETA, MOST_ETA))
    add("eta", "y", lambda y: y)
    add("px", "pT phi", lambda pt, phi: pt * np.cos(phi))
    add("py", "pT phi", lambda pt, phi: pt * np.sin(phi))
    add("pz", "pT eta", lambda pt, eta: pt * np.sinh(np.clip(eta, -MOST_ETA, MOST_ETA)))
    add("E", "pT pz mass", lambda pt, pz, mass: np.sqrt(pt**2 + pz**2 + mass**2))
    add("E", "pT pz", np.hypot)
    add("mass", "E pT pz", lambda energy, pt, pz: np.sqrt(np.maximum(energy**2 - pt**2 - pz**2, 0)))
    return values


def standard_rows(rows, columns):
    """Return rows of E, pT, eta and phi from rows of other columns; None if those don't give them."""
    if tuple(columns) == COLUMNS:
        return rows
    T = slots(rows, columns)
    values = complete(zip(columns, np.moveaxis(objects(rows, columns), 2, 0), strict=True))
    if not set(COLUMNS) <= values.keys():
        return None
    particles = np.stack([values[name] for name in COLUMNS], 2)
    particles = np.where(rows[:, :T, None] > 0, particles, 0).reshape(len(rows), -1)
    return np.concatenate([rows[:, : T + 2], particles], 1)


def pair_masses(rows):
    """Return invariant masses of all pairs of objects, GeV, (N, T (T - 1) / 2); nan unless both are light jets."""
    ids = rows[:, : slots(rows)]
    E, pt, eta, phi = np.moveaxis(objects(rows).astype(np.float64), 2, 0)
    p = np.stack([E, pt * np.cos(phi), pt * np.sin(phi), pt * np.sinh(np.clip(eta, -10, 10))])
    i, j = np.triu_indices(ids.shape[1], 1)
    both = p[:, :, i] + p[:, :, j]
    squared = both[0] ** 2 - (both[1:] ** 2).sum(0)
    return np.where((ids[:, i] == 1) & (ids[:, j] == 1), np.sqrt(np.maximum(squared, 0)), np.nan)


def kinematics(rows):
    """Return {name: values}: pT, eta and phi of all objects, HT and MET of all events, m_jj of all light pairs."""
    present, masses = rows[:, : slots(rows)] > 0, pair_masses(rows)
    columns = {name: objects(rows)[..., k][present] for k, name in ((1, "pT"), (2, "eta"), (3, "phi"))}
    ht = np.where(present, objects(rows)[..., 1], 0).sum(1)
    return columns | dict(HT=ht, MET=rows[:, slots(rows)], m_jj=masses[np.isfinite(masses)])
