"""AdamW with both moments in 8 bits: 26 % of their memory, on any device, in plain torch.

Decoupled Weight Decay (arXiv 1711.05101), 8-bit Optimizers via Block-wise Quantization (2110.02861). A tensor is split
into N blocks of BLOCK elements, each scaled by its largest magnitude. Moment m is stored as sign and square root, v as
fourth root.
"""

import torch
import torch.nn.functional as F

BLOCK = 256
SMALLEST = 4096  # tensors with fewer elements, such as norms and biases, stay in fp32: they cost little
CODES = dict(m=torch.int8, v=torch.uint8)


def power(t, kind):
    """Return the value of code t, in the scale of codes: t^2 for m, t^4 for v."""
    return t * t if kind == "m" else (t * t).square()


def quantize(x, kind, noise):
    """Quantize x (N, BLOCK) of kind m (int8) or v (uint8) -> (codes (N, BLOCK), scales (N, 1)).

    noise: (N, BLOCK) uniform in [0, 1). Codes are rounded up or down at random so that their mean is x; rounding to the
    nearest would freeze a slowly decaying v. Positive values of v stay positive, since steps are divided by its root.
    """
    top = torch.iinfo(CODES[kind]).max
    scales = x.abs().amax(1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    t = (x.abs() / scales).sqrt()
    t = (t if kind == "m" else t.sqrt()) * top
    low = t.floor().clamp_max(top - 1)
    up = (power(t, kind) - power(low, kind)) / (power(low + 1, kind) - power(low, kind))
    codes = low + (noise < up)
    codes = codes * x.sign() if kind == "m" else torch.maximum(codes, x.sign())
    return codes.to(CODES[kind]), scales


def dequantize(codes, scales, kind):
    """Invert `quantize`: codes (N, BLOCK), scales (N, 1) -> (N, BLOCK) in fp32."""
    t = codes.float() / torch.iinfo(CODES[kind]).max
    return power(t, kind) * scales * t.sign()


class AdamW8bit(torch.optim.Optimizer):
    """Like torch.optim.AdamW. The random rounding depends only on `seed` and the step, so that runs can be resumed."""

    def __init__(self, params, *, lr, betas, seed, eps=1e-8, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        self.seed = seed

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)  # converts all state to the type of the parameters
        for state in self.state.values():
            for kind, dtype in CODES.items():
                if f"{kind}_codes" in state:
                    state[f"{kind}_codes"] = state[f"{kind}_codes"].to(dtype)

    @torch.no_grad()
    def step(self):
        generators = {}  # one per device
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                g = p.grad
                small = p.numel() < SMALLEST
                t = state.get("step", 0) + 1
                if p.device not in generators:
                    generators[p.device] = torch.Generator(p.device).manual_seed(self.seed + 1_000_003 * t)
                if small or not state:
                    m, v = (state[kind] if state else torch.zeros_like(g) for kind in CODES)
                else:
                    m, v = (
                        dequantize(state[f"{kind}_codes"], state[f"{kind}_scales"], kind)
                        .flatten()[: p.numel()]
                        .view_as(p)
                        for kind in CODES
                    )
                m.lerp_(g, 1 - beta1)
                v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
                root = (v / (1 - beta2**t)).sqrt_().add_(group["eps"])
                p.mul_(1 - group["lr"] * group["weight_decay"]).addcdiv_(m, root, value=-group["lr"] / (1 - beta1**t))
                state["step"] = t
                for kind, moment in dict(m=m, v=v).items():
                    if small:
                        state[kind] = moment
                        continue
                    blocks = F.pad(moment.flatten(), (0, -p.numel() % BLOCK)).view(-1, BLOCK)
                    noise = torch.rand(blocks.shape, generator=generators[p.device], device=p.device)
                    state[f"{kind}_codes"], state[f"{kind}_scales"] = quantize(blocks, kind, noise)
