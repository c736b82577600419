"""Check that train_multimodal.py can run here: one line per part, `ok` or `FAIL`; status 1 after a FAIL.

    python scripts/check.py

Takes seconds and leaves no files. The tests of the repository: bash scripts/test.sh
"""

import inspect
import sys
import tempfile
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[1]))
PACKAGES = "torch numpy pyyaml tqdm matplotlib".split()
MINIMUM = 3, 11  # of Python


def versions(state):
    """Return the versions of Python and of the packages."""
    if sys.version_info < MINIMUM:
        raise RuntimeError(f"Python {sys.version.split()[0]}, expected {'.'.join(map(str, MINIMUM))} or later")
    return ", ".join([f"Python {sys.version.split()[0]}", *(f"{name} {version(name)}" for name in PACKAGES)])


def device(state):
    """Open the device, and choose the precision as training does."""
    from data_utils.hardware import bf16_autocast, open_device

    state.device = open_device("auto")
    state.autocast = bf16_autocast(state.device)
    return f"{state.device}, {'bf16' if state.autocast._enabled else 'fp32'}"


def render(state):
    """Render a text as a page and as a picture, and read it back."""
    import torch

    from data_utils.pages.render import layout, to_text
    from models.glyphs import to_images, to_patches

    text = "def add(a, b):\n    return a + b"
    page = layout(text, 2, 24)
    pages = torch.from_numpy(page[None]).to(state.device)
    image, patches = to_images(pages), to_patches(pages, 2)
    if to_text(page) != text or image.sum() != patches.long().sum():
        raise RuntimeError(f"a page of {text!r} came back as {to_text(page)!r}")
    return f"{len(text)} characters, {image.shape[1]} x {image.shape[2]} pixels, {patches.shape[1]} patches"


def samples(state):
    """Make two samples of each task of the smallest configuration."""
    from data_utils.pages.shard_builder import opener
    from train_multimodal import parse

    state.cfg = parse(["--arch=smoke", "--text_source=stories"])
    state.sources = opener(state.cfg)()
    state.samples = {name: [source.make(i, "train", 0) for i in (0, 1)] for name, source in state.sources.items()}
    return f"{sum(map(len, state.samples.values()))} of {', '.join(state.samples)}"


def steps(state):
    """Train one step on a text task and one on a grid, with every feature on."""
    import numpy as np
    import torch

    from data_utils.pages.rolling_batch import batch_of, to_device
    from models.multimodal import Multimodal
    from models.optim.adam_atan2 import AdamAtan2

    torch.manual_seed(0)
    tasks = {name: asdict(source.task) for name, source in state.sources.items()}
    values = asdict(state.cfg) | dict(tasks=tasks, paths=state.cfg.latent_num_paths)
    state.args = {name: values[name] for name in inspect.signature(Multimodal).parameters}
    state.model, losses = Multimodal(**state.args).to(state.device), []
    parameters = list(state.model.named_parameters())
    optimizer = AdamAtan2([dict(params=parameters, weight_decay=0.1)], lr=1e-3, betas=(0.9, 0.95))
    for name in ("continue", "sudoku4"):
        samples = state.samples[name]
        arrays = {key: np.stack([getattr(sample, key) for sample in samples]) for key in ("page", "target")}
        tensors = {key: torch.from_numpy(array) for key, array in arrays.items()}
        tensors["id"] = torch.tensor([sample.id for sample in samples])
        task, index = state.sources[name].task, np.arange(len(samples))
        batch = to_device(batch_of(tensors, name, task, state.cfg.augment, 0, index), state.device)
        with state.autocast:
            _, outputs = state.model(state.model.initial_carry(batch), batch)
        loss = outputs["aux"]["ce"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    if not all(np.isfinite(losses)):
        raise RuntimeError(f"losses of {losses}")
    return ", ".join(f"loss {loss:.2f}" for loss in losses)


def save(state):
    """Save a checkpoint, atomic and verified."""
    from data_utils.checkpoint import save_checkpoint

    path = Path(state.folder, "best_model.pt")
    weights = state.model.state_dict()
    checkpoint = dict(kind="multimodal", model_args=state.args, config=asdict(state.cfg), step=2)
    save_checkpoint(path, checkpoint | dict(model_state_dict=weights))
    return f"{path.stat().st_size / 1e6:.2f} MB"


def load(state):
    """Load the weights into a new model, as generate.py does, and compare them."""
    import torch

    from data_utils.pages.generate import load_model

    model, _ = load_model(state.folder)
    for name, value in model.state_dict().items():
        if not torch.equal(value, state.model.state_dict()[name].cpu()):
            raise RuntimeError(f"{name} is not what was saved")
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, bit for bit"


def main():
    """Run the parts in order up to the first failure; return the exit status."""
    with tempfile.TemporaryDirectory() as folder:
        state = SimpleNamespace(folder=folder)
        for part in (versions, device, render, samples, steps, save, load):
            start = time.monotonic()
            try:
                result = part(state)
            except Exception as e:
                print(f"FAIL {part.__name__}: {type(e).__name__}: {(str(e).splitlines() or [''])[0]}", flush=True)
                print("try: pip install -r requirements.txt -c constraints.txt", file=sys.stderr)
                return 1
            print(f"ok   {part.__name__}: {result} ({time.monotonic() - start:.1f} s)", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
