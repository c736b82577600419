"""Drawing tokens from logits: B rows, V tokens.

Nucleus sampling, top_p: Holtzman et al. (arXiv 1904.09751), section 3.1.
"""

import torch

GREEDY = 1e-6  # temperatures below this one take the likeliest token: logits over them would be infinite


def keep_likeliest(logits, top_k, top_p):
    """Return logits (B, V) with -inf for all but the `top_k` likeliest tokens (0 = all), and for all but the likeliest
    tokens that together have the share `top_p` of the probability. The likeliest token always stays.
    """
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        p, order = logits.softmax(-1).sort(descending=True)
        beyond = p.cumsum(-1) - p >= top_p
        beyond[:, 0] = False
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), -torch.inf)
    return logits


def choose(logits, temperature, top_k, top_p, generator):
    """Draw one token for each row of logits (B, V) -> (B, 1). Temperature 0 takes the likeliest."""
    if temperature < GREEDY:
        return logits.argmax(-1, keepdim=True)
    logits = keep_likeliest(logits.float() / temperature, top_k, top_p)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)
