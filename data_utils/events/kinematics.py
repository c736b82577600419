"""What a physicist looks at in rows of events: momenta, sums and masses.

Rows (N, 2 + 5T): T type ids, MET and its phi, then T x (E, pT, eta, phi), GeV and radians.
Ids: 0 nothing, 1 jet, 2 b-jet.
"""

import numpy as np

W_MASS, WINDOW = 80.4, 10.0  # GeV: a pair of light jets within the window counts as a W


def parts(rows):
    """Rows (N, 2 + 5T) -> ids (N, T), met (N, 2) as size and phi, objects (N, T, 4) as E, pT, eta, phi."""
    T = (rows.shape[1] - 2) // 5
    return rows[:, :T].astype(np.int64), rows[:, T : T + 2], rows[:, T + 2 :].reshape(len(rows), T, 4)


def pair_masses(ids, objects):
    """Invariant masses of all pairs of light jets, GeV, (N, T (T - 1) / 2); nan for what is no such pair."""
    E, pt, eta, phi = np.moveaxis(objects.astype(np.float64), 2, 0)
    p = np.stack([E, pt * np.cos(phi), pt * np.sin(phi), pt * np.sinh(np.clip(eta, -10, 10))])
    i, j = np.triu_indices(ids.shape[1], 1)
    both = p[:, :, i] + p[:, :, j]
    squared = both[0] ** 2 - (both[1:] ** 2).sum(0)
    return np.where((ids[:, i] == 1) & (ids[:, j] == 1), np.sqrt(np.maximum(squared, 0)), np.nan)


def kinematics(rows):
    """Rows -> {name: values}: pT, eta and phi of all objects, HT and MET of all events, m_jj of all light pairs."""
    ids, met, objects = parts(rows)
    there, masses = ids > 0, pair_masses(ids, objects)
    columns = {name: objects[..., k][there] for k, name in ((1, "pT"), (2, "eta"), (3, "phi"))}
    ht = np.where(there, objects[..., 1], 0).sum(1)
    return columns | dict(HT=ht, MET=met[:, 0], m_jj=masses[np.isfinite(masses)])


def w_share(rows):
    """Share of the events that have a pair of light jets with the mass of a W, of those with any pair."""
    ids, _, objects = parts(rows)
    masses = pair_masses(ids, objects)
    some = np.isfinite(masses).any(1)
    hit = np.abs(np.nan_to_num(masses, nan=1e9) - W_MASS) < WINDOW
    return hit[some].any(1).mean() if some.any() else 0.0
