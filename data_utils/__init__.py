"""What several programs must agree on: files, formats, the command line.

config.py      dataclass -> command line; exit statuses: every script
hardware.py    device, precision, processes: train_*.py, generate.py
progress.py    bar or lines, peak memory: train_*.py
stop.py        signals noted, looked at between steps: train_*.py
checkpoint.py  atomic, verified files; resuming: train_*.py, generate.py
metrics.py     metrics.jsonl, bits per byte: train_*.py, plot.py
experts.py     trained language models rebuilt: train_expert.py, train_mla.py, generate.py
tokenizer.py   gpt2, bytes, bpe: train_expert.py, prepare_data.py, generate.py
documents.py   JSONL files of domain folders: text.py, prepare_data.py
text.py        packed windows of tokens: train_expert.py, train_mla.py
corpus.py      real text out of installed packages: prepare_data.py
prepare.py     language, merge, convert, arithmetic, sudoku: prepare_data.py
qa.py          questions and answers of any shape: prepare_data.py
sources.py     parquet, arrow, jsonl, json, txt as tasks: prepare.py, qa.py, pairs.py
encode.py      rows of text or of ids -> what a task adds to a folder: prepare.py, pairs.py
workers.py     tasks in other processes, in order: prepare.py, qa.py, pairs.py, puzzles.py
prepared.py    prepared folders, written so that a kill costs seconds: prepare.py, pairs.py
pairs.py       padded batches of prompt and answer: train_hrm.py
arithmetic.py  "What is 12 + 7?": train_hrm.py, prepare_data.py
distributions.py  distributions as text: skeletons.py, sr_data.py
skeletons.py   random formulas with blank constants, pools, hold-outs: train_sr.py, generate.py, prepare_data.py
sr_data.py     points and formulas, a stream of batches: train_sr.py
puzzles.py     Sudoku: train_hrm.py, train_multimodal.py, prepare_data.py
"""
