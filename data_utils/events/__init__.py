"""Particle events: made, read, trained on, and what a trained model makes of them.

decay_chain.py  events of heavy particles that decay, made in memory
pythia.py       events of the package pythia8mc
dataset.py      events in files and as normalised tensors
kinematics.py   momenta, sums and masses
reconstruct.py  what a trained autoencoder makes of events, and new latents
run_folder.py   the folder of a run, written while it trains
facts.py        events.jsonl and scalars.csv in that folder
sweep.py        the jobs of --multirun, one process each
generate.py     reconstruct, encode, decode, score and sample events
figures.py      runs, several runs in one figure, sweeps
"""
