"""Prepared rows of questions and answers, arithmetic and Sudoku.

sources.py        parquet, arrow, jsonl, json and txt files as tasks for processes
rows.py           what these processes do: text or ids in, rows of ids out
normalize_qa.py   questions and answers of any shape become prompt and response
folder.py         prepared folders, written so that a kill costs seconds
prepare.py        commands language, merge, convert, arithmetic, sudoku
dataset.py        padded batches of prompt and answer
questions.py      the data sets of train_hrm.py behind one interface
answers.py        trained reasoners: rebuilt, scored, and when they stop
nested_config.py  configuration files of older HRM trainers
arithmetic.py     "What is 12 + 7?"
sudoku.py         puzzles with one solution, and their symmetries
"""
