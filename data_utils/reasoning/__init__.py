"""Prepared rows of questions and answers, arithmetic, Sudokus and mazes.

sources.py          parquet, arrow, csv, jsonl, json and txt files as tasks for processes
layouts.py          rows in the layouts of published data sets become prompts and answers
rows.py             the work of these processes: text or ids in, rows of ids out
normalize_qa.py     questions and answers of any shape become prompt and response
folder.py           prepared folders, whose writer continues after a kill
prepare.py          commands language, merge, convert, arithmetic, sudoku
dataset.py          the data sets of train_hrm.py behind one interface
halting.py          scores of a validation set, and when to stop reasoning
weights.py          command weights: published HRM and TRM
generate.py         answers of trained reasoners
nested_config.py    configuration files of older HRM trainers
arithmetic.py       "What is 12 + 7?"
sudoku.py           puzzles with one solution, and their symmetries
maze.py             mazes, their shortest paths and turned versions
puzzle_layouts.py   published Sudokus and mazes in tables and texts
puzzle_rows.py      any source of them as checked rows of cells
arc_tasks.py        published ARC tasks
trm_layout.py       the training layout of HRM and TRM, both ways
puzzles.py          command puzzles

`from data_utils.reasoning import load` works in a notebook.
"""


def __getattr__(name):  # torch is imported only where a model is used
    if name == "load":
        from data_utils.reasoning.generate import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
