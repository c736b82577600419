"""Language models on domain folders of text.

corpus.py   real text from installed packages, and a toy corpus
windows.py  the data set: domain folders as packed windows of tokens
experts.py  trained language models, rebuilt from their checkpoints
"""
