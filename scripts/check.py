"""Is all there that train_multimodal.py needs? A line a part, `ok` or `FAIL`, in seconds; status 1 after a FAIL.

    python scripts/check.py

Nothing is left behind. Every test of the repository: bash scripts/test.sh
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


def versions(it):
    """Python and packages."""
    if sys.version_info < MINIMUM:
        raise RuntimeError(f"Python {sys.version.split()[0]}, expected {'.'.join(map(str, MINIMUM))} or later")
    return ", ".join([f"Python {sys.version.split()[0]}", *(f"{name} {version(name)}" for name in PACKAGES)])


def device(it):
    """The device and the precision that training would take."""
    from data_utils.hardware import bf16_autocast, open_device

    it.device = open_device("auto")
    it.autocast = bf16_autocast(it.device)
    return f"{it.device}, {'bf16' if it.autocast._enabled else 'fp32'}"


def render(it):
    """Text as a page, its picture, and the text again."""
    import torch

    from data_utils.pages.render import layout, to_text
    from models.glyphs import to_images, to_patches

    text = "def add(a, b):\n    return a + b"
    page = layout(text, 2, 24)
    pages = torch.from_numpy(page[None]).to(it.device)
    image, patches = to_images(pages), to_patches(pages, 2)
    if to_text(page) != text or image.sum() != patches.long().sum():
        raise RuntimeError(f"a page of {text!r} came back as {to_text(page)!r}")
    return f"{len(text)} characters, {image.shape[1]} x {image.shape[2]} pixels, {patches.shape[1]} patches"


def samples(it):
    """Two samples of each task of the smallest configuration."""
    from data_utils.pages.shard_builder import opener
    from train_multimodal import parse

    flags = ["--arch=smoke", "--text_source=stories"]
    it.cfg = parse(flags)
    it.sources = opener(it.cfg)()
    it.samples = {name: [source.make(i, "train", 0) for i in (0, 1)] for name, source in it.sources.items()}
    return f"{sum(map(len, it.samples.values()))} of {', '.join(it.samples)}"


def steps(it):
    """A step on written text, one on a grid, every feature on."""
    import numpy as np
    import torch

    from data_utils.pages.rolling_batch import batch_of
    from models.multimodal import Multimodal
    from models.optim.adam_atan2 import AdamAtan2

    torch.manual_seed(0)
    tasks = {name: asdict(source.task) for name, source in it.sources.items()}
    known = asdict(it.cfg) | dict(tasks=tasks, paths=it.cfg.latent_num_paths)
    it.args = {name: known[name] for name in inspect.signature(Multimodal).parameters}
    it.model, losses = Multimodal(**it.args).to(it.device), []
    parameters = [(name, p) for name, p in it.model.named_parameters()]
    optimizer = AdamAtan2([dict(params=parameters, weight_decay=0.1)], lr=1e-3, betas=(0.9, 0.95))
    for name in ("continue", "sudoku4"):
        made = it.samples[name]
        held = {key: torch.from_numpy(np.stack([getattr(one, key) for one in made])) for key in ("page", "target")}
        held["id"] = torch.tensor([one.id for one in made])
        batch = batch_of(held, name, it.sources[name].task, it.cfg.augment, 0, np.arange(len(made)))
        batch = {key: part if key == "task" else part.to(it.device) for key, part in batch.items()}
        with it.autocast:
            _, outputs = it.model(it.model.initial_carry(batch), batch)
        loss = outputs["aux"]["ce"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    if not all(np.isfinite(losses)):
        raise RuntimeError(f"losses of {losses}")
    return ", ".join(f"loss {loss:.2f}" for loss in losses)


def save(it):
    """A checkpoint, atomic and verified."""
    from data_utils.checkpoint import save_checkpoint

    path = Path(it.folder, "best_model.pt")
    state = dict(model_args=it.args, config=asdict(it.cfg), step=2, model_state_dict=it.model.state_dict())
    save_checkpoint(path, dict(kind="multimodal") | state)
    return f"{path.stat().st_size / 1e6:.2f} MB"


def load(it):
    """The same weights in a new model, as generate.py makes it."""
    import torch

    from data_utils.pages.generate import load_model

    model, _ = load_model(it.folder)
    for name, value in model.state_dict().items():
        if not torch.equal(value, it.model.state_dict()[name].cpu()):
            raise RuntimeError(f"{name} is not what was saved")
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, bit for bit"


def main():
    """Run the parts in order, up to the first that fails -> exit status."""
    with tempfile.TemporaryDirectory() as folder:
        it = SimpleNamespace(folder=folder)
        for part in (versions, device, render, samples, steps, save, load):
            start = time.monotonic()
            try:
                said = part(it)
            except Exception as e:
                print(f"FAIL {part.__name__}: {type(e).__name__}: {(str(e).splitlines() or [''])[0]}", flush=True)
                print("try: pip install -r requirements.txt -c constraints.txt", file=sys.stderr)
                return 1
            print(f"ok   {part.__name__}: {said} ({time.monotonic() - start:.1f} s)", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
