"""Figures of this repo beside baselines, and the page that shows them all.

speed/        experts, hrm, autoencoder, pictures, preparation, busy: how fast and how large
quality/      diffuser, router, sudoku, formulas, autoencoder, pictures, puzzles: what each system learns
results/      one JSON per benchmark; README.md and results.png show all of them
run.py        run benchmarks, write the page
misses.py     why figures miss their targets
report.py     figures, command line, JSON
training.py   the loop of the benchmarks that train models of their own
peers.py      code of other packages, as baselines; their clones lie in peers/
gpu_check.py  every script on a GPU: bash scripts/gpu_check.sh

Each benchmark is a program: python -m benchmarks.speed.experts --rows speed
"""
