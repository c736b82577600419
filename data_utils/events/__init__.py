"""Particle events: simulate, read and train on them, and use a trained model.

decay_chain.py  simulate events of heavy particles that decay
pythia.py       simulate events with the package pythia8mc
dataset.py      events in files and as normalised tensors
prepare.py      convert events of other programs
layouts.py      which column of their files is what
sources.py      open their files
kinematics.py   momenta, sums and masses
reconstruct.py  reconstruct events with a trained autoencoder, and draw new latents
run_folder.py   the folder of a run, written while it trains
facts.py        events.jsonl and scalars.csv in that folder
sweep.py        the jobs of --multirun, one process each
generate.py     reconstruct, encode, decode, score and sample events
roc.py          ROC curves of scores
figures.py      figures of runs, of sweeps, of scores and latents

`from data_utils.events import load` works in a notebook.
"""


def __getattr__(name):  # torch is imported only where a model is used
    if name == "load":
        from data_utils.events.generate import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
