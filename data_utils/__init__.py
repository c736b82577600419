"""Code that several programs share: files, formats, the command line.

Flat files serve every script. Each room serves one system:

text/        language models on domain folders: train_expert.py, train_mla.py
reasoning/   prepared rows, sums, Sudoku: train_hrm.py
formulas/    expressions, fits, search: train_sr.py
events/      particle events: train_ae.py
pages/       pictures of text, puzzles and grids: train_multimodal.py

A room imports the flat files and models/, never another room; only pages/ imports the puzzles of reasoning/. Where a
room has them, prepare.py is run by prepare_data.py, dataset.py is read by the training script, and generate.py is run
by generate.py.

errors.py       errors with a message for the user
launch.py       start and end of a program: threads, exit status, released resources
files.py        atomic writes, locks, backups; no file of the user's is replaced unasked
config.py       a dataclass becomes the command line
overrides.py    KEY=VALUE, named bundles, the jobs of a sweep
checkpoint.py   verified checkpoints, and how a run resumes from them
hardware.py     the device of programs that use a trained model
distributed.py  collectives over the ranks of a run, sharded weights
metrics.py      metrics.jsonl, bits per byte, Weights & Biases
figures.py      style and files of figures, the losses of runs; needs matplotlib
progress.py     a progress bar or lines, log files, peak memory
stop.py         a signal asks for a stop between two steps
workers.py      tasks in other processes, results in order
documents.py    text files of every kind, and the domain folders that hold them
tokenizer.py    the tokenizers gpt2, bytes, bpe and characters
"""
