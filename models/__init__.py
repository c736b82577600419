"""One idea per file; torch only.

cross_entropy.py  loss from hidden states, in chunks of positions: all language models
transformer.py    causal transformer, and its parts: train_expert.py, train_mla.py, generate.py
state_space.py    selective scan and Mamba blocks: train_expert.py, train_mla.py, generate.py
diffuser.py       diffusion over token embeddings: train_expert.py, train_mla.py, generate.py
mla.py            multi-head latent attention: train_mla.py, generate.py
router.py         mixture of frozen experts: train_mla.py, generate.py
vector_store.py   memory of training contexts: train_mla.py, generate.py
trm.py            recursive core: hrm.py
hrm.py            encoder, recursive core, decoder or cell head: train_hrm.py, generate.py
set_transformer.py  features of points, set attention: formula_model.py
formula_model.py  points in, formulas out, decoding: train_sr.py, generate.py
adamw8bit.py      AdamW with 8-bit moments: train_hrm.py
average.py        moving average of weights: train_hrm.py
muon.py           orthogonalized momentum: train_hrm.py
messages.py       messages between the elements of a set: diffusion.py, gan.py, autoencoder.py
codebook.py       vector quantization that keeps all codes in use: autoencoder.py
diffusion.py      noise on particles, the network that removes it, DDIM: autoencoder.py, train_ae.py, generate.py
gan.py            discriminator, critic of latents, adaptive weight: train_ae.py
adam_atan2.py     Adam whose step is an angle, on flat buffers; sign descent on rows: train_multimodal.py
gradients.py      norms, update ratios, parameters that never had a gradient: train_multimodal.py
memory.py         what solved samples were like, read by later ones: multimodal.py
halting.py        when to stop, learnt by Q-learning: train_multimodal.py
autoencoder.py    encoders, latent spaces, decoders of events: train_ae.py, generate.py
"""
