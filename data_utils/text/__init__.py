"""Language models on domain folders of text.

corpus.py    real text from installed packages, and a toy corpus
windows.py   the data set: domain folders as packed windows of tokens
experts.py   trained language models, rebuilt from their checkpoints
generate.py  the text of a trained language model

`from data_utils.text import load` works in a notebook.
"""


def __getattr__(name):  # torch is imported only where a model is used
    if name == "load":
        from data_utils.text.generate import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
