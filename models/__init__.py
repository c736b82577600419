"""One idea per file; torch only.

cross_entropy.py  loss from hidden states, in chunks of positions: all language models
transformer.py    causal transformer, and its parts: train_expert.py, generate.py
state_space.py    selective scan and Mamba blocks: train_expert.py, generate.py
diffuser.py       diffusion over token embeddings: train_expert.py, generate.py
trm.py            recursive core: hrm.py
hrm.py            encoder, recursive core, decoder or cell head
adamw8bit.py      AdamW with 8-bit moments
"""
