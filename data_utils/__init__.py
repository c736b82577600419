"""What several programs must agree on: files, formats, the command line.

Flat files serve every script. Rooms serve one system each:

text/        language models on domain folders: train_expert.py, train_mla.py
reasoning/   prepared rows, sums, Sudoku: train_hrm.py
formulas/    expressions, fits, search: train_sr.py
events/      particle events: train_ae.py
pages/       pictures of text, puzzles and grids: train_multimodal.py

A room imports the flat files and models/, never another room; only pages/ imports the puzzles of reasoning/. In each
room prepare.py is what prepare_data.py runs, dataset.py what the script reads, generate.py what generate.py runs.

errors.py       errors with a message that a person can act on
launch.py       start and end of a program: threads, exit status, what main must release
files.py        atomic writes, locks, backups; no file of the user's is replaced unasked
config.py       a dataclass becomes the command line
overrides.py    KEY=VALUE, named bundles, the jobs of a sweep
checkpoint.py   verified checkpoints, and how a run resumes from them
hardware.py     the device of programs that use a trained model
distributed.py  numbers and weights over several processes
metrics.py      metrics.jsonl, bits per byte, Weights & Biases
figures.py      style of figures, their files, the losses of runs; needs matplotlib
progress.py     a progress bar or lines, log files, peak memory
stop.py         signals, noted and looked at between two steps
workers.py      tasks in other processes, results in order
documents.py    JSONL files of domain folders, cut into pieces
tokenizer.py    the tokenizers gpt2, bytes, bpe and that of characters
"""
