"""Networks, losses and quantizers: one idea per file, torch only. optim/ holds what steps their weights.

cross_entropy.py    loss from hidden states, in chunks of positions
transformer.py      causal transformer, and its parts
state_space.py      selective scan and Mamba blocks
diffuser.py         diffusion over token embeddings
mla.py              multi-head latent attention
router.py           mixture of frozen experts
vector_store.py     memory of training contexts
trm.py              recursive core
hrm.py              encoder, recursive core, decoder or cell head
set_transformer.py  features of points, attention over sets
formula_model.py    points in, formulas out
messages.py         messages between the elements of a set
codebook.py         vector quantization that keeps all codes in use
diffusion.py        noise on particles, its removal, DDIM
gan.py              discriminator, critic of latents, adaptive weight
autoencoder.py      encoders, latent spaces and decoders of events
glyphs.py           pages of symbols, drawn as pixels and patches
decoder.py          causal decoder of symbols, with one symbol of look-ahead
planning.py         several trains of thought about one sample
memory.py           what solved samples were like, read by later ones
halting.py          when to stop, learnt by Q-learning
multimodal.py       pictures, capsules, recursive reasoning, an answer
"""
