"""Muon: momentum with an orthogonalized update for each matrix; AdamW for everything else.

Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; AdamW: arXiv 1711.05101.
"""

import torch

QUINTIC = 3.4445, -4.7750, 2.0315  # a x + b x^3 + c x^5 maps singular values in (0, 1] to about 1 in ROUNDS rounds
ROUNDS = 5


def orthogonalize(x):
    """Return the nearest matrices with singular values of about 1 (0.7 to 1.2): x (N, A, B) -> (N, A, B) in bfloat16.

    The Newton-Schulz iteration uses only matrix products, for which the precision of bfloat16 suffices.
    """
    a, b, c = QUINTIC
    tall = x.shape[1] > x.shape[2]
    x = (x.mT if tall else x).bfloat16()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(ROUNDS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Updates groups of matrices with `times` > 0 by Muon at the rate `times` x `lr`, and other groups by AdamW."""

    def __init__(self, params, *, lr, betas, beta=0.95, eps=1e-8, weight_decay=0.0, times=0.0):
        defaults = dict(lr=lr, betas=betas, beta=beta, eps=eps, weight_decay=weight_decay, times=times)
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            (self._muon if group["times"] else self._adam)(group, params)

    def _muon(self, group, params):
        """Update m <- beta m + (1 - beta) g and step along Nesterov's (1 - beta) g + beta m, orthogonalized."""
        by_shape = {}  # matrices of the same shape are orthogonalized together
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
            m = self.state[p]["momentum"].lerp_(p.grad, 1 - group["beta"])
            by_shape.setdefault(p.shape, []).append((p, p.grad.lerp(m, group["beta"])))
        for (rows, columns), pairs in by_shape.items():
            rate = group["lr"] * group["times"] * max(1, rows / columns) ** 0.5
            updates = orthogonalize(torch.stack([update for _, update in pairs]))
            for (p, _), update in zip(pairs, updates, strict=True):
                p.sub_(update, alpha=rate)

    def _adam(self, group, params):
        beta1, beta2 = group["betas"]
        for p in params:
            state = self.state[p]
            if not state:
                state.update(step=0, m=torch.zeros_like(p), v=torch.zeros_like(p))
            state["step"] += 1
            state["m"].lerp_(p.grad, 1 - beta1)
            state["v"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
            root = (state["v"] / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
            p.addcdiv_(state["m"], root, value=-group["lr"] / (1 - beta1 ** state["step"]))
