"""Time and memory, each figure against a baseline that runs in turn in the same process.

experts.py      language models: training, generation, the scan, tokenizing
hrm.py          the recursive model against the official code
autoencoder.py  quantizer and message layer against public packages
pictures.py     rendering, optimizer, TRM, planning, streaming
preparation.py  prepare_data.py against the plain way
busy.py         training beside busy processes
"""
