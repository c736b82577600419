"""The device of programs that use a trained model; the training scripts choose theirs inline."""

import torch

from data_utils.errors import UsageError


def open_device(name):
    """Return the torch.device for `name` (auto, cpu, cuda, cuda:1, mps). Raises UsageError if it can't be used."""
    if name == "auto":
        name = "mps" if torch.backends.mps.is_available() else "cpu"
        name = "cuda" if torch.cuda.is_available() else name
    try:
        device = torch.device("cuda:0" if name == "cuda" else name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        reason = str(e).splitlines()[0]
        raise UsageError(f"--device {name} can't be used: {reason}\ntry: --device cpu") from e
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32
    return device


def bf16_autocast(device):
    """Return torch.autocast to bfloat16, enabled only where the device computes in it natively."""
    fast = False
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)  # older GPUs emulate it
    elif device.type == "cpu":
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)
