"""Losses and gradients that are not finite."""

from data_utils.checkpoint import canonical_keys, read
from faults.lab import SCRIPTS, candidates, check, digests, error_lines, flat, has, newest, results


def full_state(script, folder):
    """Return the newest checkpoint with its optimizer, which train_sr.py keeps in a file of its own."""
    state = canonical_keys(newest(script, folder))
    if script.letter == "S":
        state |= dict(optimizer_state=read(candidates(script, folder)[0].with_name("optimizer.pt")))
    return state


def weights_of(script, path):
    if script.letter == "S":
        return read(path.with_name("state_dict.pt"))
    return canonical_keys(read(path))["model_state"]


def non_finite(lab, name):
    """One bad step is skipped and counted, and the optimizer does not move; many in a row end the run."""
    script, limit = SCRIPTS[name], 20 if name == "ae" else 10
    calls = 2 if name in ("expert", "mla") else 1  # of backward, per step
    step = 3  # neither it nor the one before ends in an evaluation, where a signal would stop the run at once
    folder = lab.folder()
    lab.run(name, folder, faults=f"signal=SIGTERM:{step - 1}:0", status=143)
    good = full_state(script, folder)
    for value in ("nan", "inf"):
        folder = lab.folder()
        faults = f"bad={value}:{step * calls + 1}:1 signal=SIGTERM:{step}:0"
        lab.run(name, folder, faults=faults, status=143)
        state = full_state(script, folder)
        check((state["step"], state["skipped"]) == (step + 1, 1), f"step {state['step']}, {state['skipped']} skipped")
        moments, good_moments = (dict(flat(s["optimizer_state"]["state"])) for s in (state, good))
        check(moments == good_moments and moments, f"the optimizer made a step of {value}")
        lab.run(name, folder)
        check(newest(script, folder)["skipped"] == 1, "the skipped step was not counted")
    folder = lab.folder()
    _, err = lab.run(name, folder, faults=f"bad=nan:{step * calls + 1}:1000", status=1)
    has(error_lines(err), f"{limit} steps in a row", "not finite", "lr")
    for path in candidates(script, folder):
        check(all(w.isfinite().all() for w in weights_of(script, path).values()), f"{path.name} is not finite")


def overflow(lab, name):
    """A gradient overflows under loss scaling: the scale is halved, and stays halved after a resume."""
    script, fault = SCRIPTS[name], "scaler=1 bad=inf:7:1"
    complete = lab.folder()
    lab.run(name, complete, faults=fault)
    folder = lab.folder()
    lab.run(name, folder, faults=f"{fault} signal=SIGTERM:12:0", status=143)
    state = canonical_keys(newest(script, folder))
    skipped, scale = state["skipped"], state["amp_scaler"]["scale"]
    check((skipped, scale) == (1, 32768.0), f"{skipped} skipped, scale {scale}")
    lab.run(name, folder, faults="scaler=1")
    expected, resumed = (digests(results(script, f)) for f in (complete, folder))
    differ = sum(expected.get(key) != resumed.get(key) for key in expected)
    check(expected == resumed, f"{differ} values differ after a resume")
