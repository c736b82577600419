"""Networks, losses and quantizers: one idea per file, torch only. optim/ holds what updates their weights.

Models take required keyword arguments, raise ValueError with argument names, and know nothing of flags or files.

cross_entropy.py    loss from hidden states, in chunks of positions
transformer.py      causal transformer and its parts
state_space.py      selective scan and Mamba blocks
diffuser.py         diffusion over token embeddings
mla.py              multi-head latent attention
router.py           mixture of frozen experts
vector_store.py     store of training contexts, searched for neighbours
trm.py              recursive core
token_grid.py       published HRM and TRM, from their weights
hrm.py              encoder, recursive core, decoder or head per cell
set_transformer.py  features of points, attention over sets
formula_model.py    formulas from points
messages.py         messages between the elements of a set
codebook.py         vector quantization that keeps all codes in use
diffusion.py        noise on particles, its prediction, DDIM
gan.py              discriminator of events, critic of latents, adaptive weight
autoencoder.py      encoders, latent spaces and decoders of events
parts.py            these by the words of flags; a new one is a line there
glyphs.py           pages of symbols, drawn as pixels and patches
decoder.py          causal decoder of symbols that can predict one symbol further
planning.py         several reasoning paths for one sample
sampling.py         tokens drawn from logits
memory.py           memory of solved samples that similar samples read
halting.py          Q-learning of when to stop
multimodal.py       pictures, capsules, recursive reasoning, answers
"""
