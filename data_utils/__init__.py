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
"""
