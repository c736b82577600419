"""Losses and scores, each figure beside controls.

diffuser.py     text of the diffuser, judged by two models
router.py       what the router over frozen experts is worth
sudoku.py       recursion and halting: sums, Sudoku, GSM8K
formulas.py     symbolic regression on test sets, its parts against sympy and scipy
autoencoder.py  codes, latents and loops of particle events
pictures.py     puzzles, mazes, reading, planning and ARC from pictures
puzzles.py      hard Sudokus, the official HRM and TRM beside
"""
