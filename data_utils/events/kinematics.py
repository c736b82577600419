"""The quantities that a physicist looks at in rows of events: momenta, sums and masses.

Rows (N, 2 + 5 T) as in dataset.py, in GeV and radians. Ids: 0 nothing, 1 jet, 2 b-jet.
"""

import numpy as np

from data_utils.events.dataset import objects, slots


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
