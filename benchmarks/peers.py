"""Quantizers of other packages, for benchmarks/ae_quality.py, in the place of models.codebook.Codebook.

N vectors, D width. What is built for (size, dim, beta) turns (N, D) into codes (N, D), index (N) and a loss.
"""

from functools import partial
from types import SimpleNamespace

import torch
import torch.nn as nn

STEPS = 1704


def vector_quantize(size, dim, beta, **options):
    """(N, D) -> codes, index, loss. Raises ImportError without the package."""
    from vector_quantize_pytorch import VectorQuantize

    return VectorQuantize(dim=dim, codebook_size=size, decay=0.99, commitment_weight=beta, **options)


def pythae(size, dim, beta):
    """The same; given (N, 1, 1, D), or it would spend D indices on a vector."""
    from pythae.models.vq_vae.vq_vae_utils import QuantizerEMA

    class Inner(QuantizerEMA):
        def forward(self, x):
            out = super().forward(x[:, None, None])
            return out.quantized_vector.flatten(1), out.quantized_indices.flatten(), out.loss

    return Inner(SimpleNamespace(num_embeddings=size, embedding_dim=dim, commitment_loss_factor=beta, decay=0.99))


class Quantizer(nn.Module):
    """What takes the place of models.codebook.Codebook: `build` makes a package's quantizer."""

    def __init__(self, build, *, size, dim, beta, decay, revive, eps):
        super().__init__()
        self.inner, self.revived = build(size, dim, beta), torch.zeros(())

    def start(self, vectors, kmeans, generator):
        """Packages start by themselves."""

    def forward(self, z, mask):
        q, index, loss = self.inner(z[mask])
        q = torch.zeros_like(z).masked_scatter(mask[..., None], q)
        return q, torch.full_like(mask, -1, dtype=torch.long).masked_scatter(mask, index), loss.sum()


TUNED = partial(vector_quantize, kmeans_init=True, threshold_ema_dead_code=0.05, rotation_trick=False)
VQ, PYTHAE = "pip install vector-quantize-pytorch==1.32.0", "pip install pythae==0.1.2"
PACKAGES = [  # what it is called, how it is made, how to get it, steps of training, most that our error may be of its
    ("vector-quantize-pytorch, k-means start, expiry 0.05", TUNED, VQ, STEPS, 1.02),
    ("vector-quantize-pytorch, its defaults but decay", vector_quantize, VQ, STEPS, 0.5),
    ("pythae with moving averages", pythae, PYTHAE, 200, 0.25),
]
