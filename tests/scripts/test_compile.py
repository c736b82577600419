"""--compile of every script: graphs, but run by PyTorch, which takes seconds and not minutes.

Slow: graphs backward, and what another case traces much of.
"""

import importlib

import pytest
import torch

from tests.helpers import slow, train_flags
from tests.scripts.test_train_hrm import SIZES
from tests.scripts.test_train_sr import TINY

AE = "events=200 limit=64 hidden=[8,8] latent_dim=4 codebook_size=8 batch_size=16 epochs=1 device=cpu out={home} "
AE += "make_plots=false"
PAGES = "--train_samples=40 --max_steps=4 --wandb=disabled --data_paths={data} --checkpoint_path={home} --H_cycles=1 "
PAGES += "--L_cycles=1 --L_layers=1 --decoder_layers=1"  # a second cycle or layer takes seconds more to trace
FLAGS = dict(
    train_hrm=[*SIZES, *"--dataset=synthetic --run_name=run --eval_rows=100 --steps=4 --val_every=2".split()],
    train_sr=[*TINY, *"--encoder_n_isab=1 --steps=2 -vi 2 --val_problems=0 -o {home}".split()],
    train_ae=AE.split(),
    train_multimodal=f"--arch=smoke --tasks sudoku4 --no-enable_mtp {PAGES}".split(),
)


def traced(backend):
    """torch.compile as far as graphs."""

    def compile(model=None, *, mode=None, by=torch.compile, **options):
        return by(model, backend=backend, **options)

    return compile


QUICK = ["transformer", "train_hrm", "train_ae loop=diffusion_ae"]
OTHERS = ["state_space", "diffuser", "mla_store", "train_sr", "train_ae loop=gan_ae", "train_ae loop=test_mlp",
          "train_multimodal"]  # fmt: skip
SLOW = [(case, "eager") for case in OTHERS] + [(case, "aot_eager") for case in QUICK + OTHERS]


@pytest.mark.parametrize(
    "case, backend",
    [(case, "eager") for case in QUICK] + [slow(*pair) for pair in SLOW],
)
def test_a_compiled_run_is_the_same_run(case, backend, toy, experts, tmp_path, monkeypatch):
    name, *more = case.split()
    if name not in FLAGS:
        script, *flags = train_flags(name, toy, experts)
        name, flags = script.removesuffix(".py"), [*flags, "--checkpoint_dir={home}", "--max_steps=4", "--n_layers=1"]
    else:
        flags = [*FLAGS[name], *more]
    module = importlib.import_module(name)
    monkeypatch.setattr(torch, "compile", traced(backend))
    results = []
    for i, more in enumerate(([], ["--compile"])):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        home = tmp_path / str(i)
        home.mkdir()
        monkeypatch.chdir(home)
        words = [word.format(home=home / "run", data=tmp_path / "data") for word in flags] + more
        results.append(module.main(module.parse(words)))
    assert sum(torch._dynamo.utils.counters["stats"].values()), "nothing was compiled"
    plain, compiled = (result.get("best_score", result.get("best_val_loss")) for result in results)
    assert compiled == pytest.approx(plain, rel=1e-4) and results[1]["step"] == results[0]["step"] > 0
