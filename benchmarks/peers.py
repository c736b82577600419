"""Code of other packages, as baselines. None is required: each function raises ImportError without its package.

N vectors, D width, B batch, T time.
"""

import contextlib
import importlib
import io
import sys
import textwrap
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

CLONES = Path(__file__).resolve().parent / "peers"
GET = {  # how to get it
    "nanoGPT": "git clone https://github.com/karpathy/nanoGPT benchmarks/peers/nanoGPT",
    "mambapy": "pip install mambapy==1.2.0",
    "HRM": "git clone https://github.com/sapientinc/HRM benchmarks/peers/HRM",
    "TRM": "git clone https://github.com/SamsungSAILMontreal/TinyRecursiveModels benchmarks/peers/TinyRecursiveModels",
    "vector-quantize-pytorch": "pip install vector-quantize-pytorch==1.32.0",
    "pythae": "pip install pythae==0.1.2",
    "PyTorch Geometric": "pip install torch_geometric==2.8.1",
    "adam-atan2-pytorch": "pip install adam-atan2-pytorch==0.4.1",
    "Pillow": "pip install pillow",
    "sympy": "pip install sympy",
    "scipy": "pip install scipy",
    "gplearn": "pip install gplearn",
    "pyoperon": "pip install pyoperon",
}


def optional(build, *arguments, **options):
    """Return build(...), None where its package is missing."""
    try:
        return build(*arguments, **options)
    except ImportError:
        return None


# --- language models --------------------------------------------------------------------------
def nanogpt(vocab, width, layers, length):
    """Build nanoGPT without dropout and bias; heads of 64 numbers."""
    if str(CLONES) not in sys.path:
        sys.path.append(str(CLONES))
    from nanoGPT.model import GPT, GPTConfig

    with contextlib.redirect_stdout(io.StringIO()):
        return GPT(GPTConfig(length, vocab, layers, width // 64, width, dropout=0.0, bias=False))


def mambapy(blocks, width):
    """Build mambapy's stack with the weights of our Mamba blocks: (B, T, C) -> (B, T, C)."""
    from mambapy.mamba import Mamba, MambaConfig

    stack = Mamba(MambaConfig(d_model=width, n_layers=len(blocks), d_state=16, rms_norm_eps=1e-6))
    weights = blocks.state_dict().items()
    names = {name: name.replace("mamba.", "mixer.").replace("conv.", "conv1d.") for name, _ in weights}
    stack.load_state_dict({f"layers.{names[name]}": weight for name, weight in weights})
    return stack


# --- recursive models -------------------------------------------------------------------------
class Settings:
    """Stands in for pydantic.BaseModel, of which the official code uses only this."""

    def __init__(self, **values):
        self.__dict__ |= values


def import_from(folder, shims, *names):
    """Import modules of the repository in `folder`, whose `models` is not ours, with `shims` {package: stand-in}."""
    ours = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "models"}
    before = {name: sys.modules.get(name) for name in shims}
    sys.modules |= shims
    paths = sys.path[:]
    sys.path[:] = [str(folder), *(p for p in paths if not Path(p, "models", "__init__.py").exists())]
    try:
        return [importlib.import_module(name) for name in names]
    finally:
        sys.path[:] = paths
        for name in [name for name in sys.modules if name.split(".")[0] == "models"]:
            del sys.modules[name]
        sys.modules |= ours
        for name, module in before.items():
            sys.modules[name] = module
            if module is None:
                del sys.modules[name]


def official_hrm(folder=CLONES / "HRM"):
    """Import the official HRM, its two CUDA packages replaced -> modules (model, losses)."""

    def attention(q, k, v, causal):
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal).transpose(1, 2)

    shims = dict(flash_attn=SimpleNamespace(flash_attn_func=attention), pydantic=SimpleNamespace(BaseModel=Settings))
    return import_from(folder, shims, "models.hrm.hrm_act_v1", "models.losses")


def official_trm(folder):
    """Import the official TRM -> modules (model, losses)."""
    einops = SimpleNamespace(rearrange=lambda x, pattern: x.transpose(1, 2))  # it uses no other pattern
    shims = dict(einops=einops, pydantic=SimpleNamespace(BaseModel=Settings))
    return import_from(folder, shims, "models.recursive_reasoning.trm", "models.losses")


# --- quantizers -------------------------------------------------------------------------------
def vector_quantize(size, dim, beta, **options):
    """Build a quantizer of vector-quantize-pytorch: (N, D) -> codes (N, D), index (N), loss."""
    from vector_quantize_pytorch import VectorQuantize

    return VectorQuantize(dim=dim, codebook_size=size, decay=0.99, commitment_weight=beta, **options)


def pythae(size, dim, beta):
    """The same of pythae; given (N, 1, 1, D), since it would spend D indices on a vector."""
    from pythae.models.vq_vae.vq_vae_utils import QuantizerEMA

    class Inner(QuantizerEMA):
        def forward(self, x):
            out = super().forward(x[:, None, None])
            return out.quantized_vector.flatten(1), out.quantized_indices.flatten(), out.loss

    return Inner(SimpleNamespace(num_embeddings=size, embedding_dim=dim, commitment_loss_factor=beta, decay=0.99))


class Quantizer(nn.Module):
    """Stands in for models.codebook.Codebook; `build` makes the quantizer of a package."""

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
STEPS = 1704  # of the reference protocol of quality/autoencoder.py
QUANTIZERS = [  # id, name, builder, how to get it, steps of training, target of the ratio of errors
    ("vq_tuned", "vector-quantize-pytorch, k-means start, expiry 0.05", TUNED, "vector-quantize-pytorch", STEPS, 1.02),
    ("vq_default", "vector-quantize-pytorch, its defaults but decay", vector_quantize, "vector-quantize-pytorch",
     STEPS, 0.5),
    ("pythae", "pythae with moving averages", pythae, "pythae", 200, 0.25),
]  # fmt: skip


def geometric(layer, width, mask):
    """Build the messages of models.messages.MessageLayer in PyTorch Geometric, same weights: (B, T, C) -> (B, T, C)."""
    from torch_geometric.nn import MessagePassing

    class Edges(MessagePassing):
        def __init__(self):
            super().__init__(aggr="mean")
            self.first = nn.Linear(2 * width, width)
            self.last = layer.message

        def forward(self, x, edges):
            return self.propagate(edges, x=x)

        def message(self, x_i, x_j):
            return self.last(F.relu(self.first(torch.cat([x_i, x_j], -1))))

    net, slots = Edges(), mask.shape[1]
    with torch.no_grad():
        net.first.weight.copy_(torch.cat([layer.receiver.weight, layer.sender.weight], 1))
        net.first.bias.copy_(layer.receiver.bias)
    event, target, source = (mask[:, :, None] & mask[:, None]).nonzero(as_tuple=True)
    edges = torch.stack([event * slots + source, event * slots + target])
    return lambda x: net(x.flatten(0, 1), edges).view_as(x)


# --- pages ------------------------------------------------------------------------------------
def drawn_by_pillow(texts, rows, cols):
    """Draw texts the usual way: wrapped words, a scalable font of 12, white margins of 10, RGB.

    A line takes 16 pixels of the 14 `rows`; what does not fit is not drawn. -> function, characters that it draws.
    """
    from matplotlib import get_data_path
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.truetype(f"{get_data_path()}/fonts/ttf/DejaVuSansMono.ttf", 12)
    height, width = 14 * rows, 8 * cols
    per_line, lines = int((width - 20) / font.getlength("0")), (height - 20) // 16

    def wrapped(text):
        parts = (textwrap.wrap(line, per_line) or [""] for line in text.split("\n"))
        return [line for part in parts for line in part][:lines]

    def draw():
        pages = []
        for text in texts:
            image = Image.new("RGB", (width, height), "white")
            pen = ImageDraw.Draw(image)
            for i, line in enumerate(wrapped(text)):
                pen.text((10, 10 + 16 * i), line, fill="black", font=font)
            pages.append(np.array(image))
        return np.stack(pages)

    return draw, sum(len(line) for text in texts for line in wrapped(text))


# --- formulas ---------------------------------------------------------------------------------
def gplearn(X, y, seed, seconds):
    """Search a formula of y in X for so many seconds -> function of X."""
    return gplearn_regressor(X, y, seed, seconds).predict


def gplearn_program(X, y, seed, seconds):
    """The same -> [(formula as text, function of X)]."""
    regressor = gplearn_regressor(X, y, seed, seconds)
    return [(str(regressor._program), regressor.predict)]


def gplearn_regressor(X, y, seed, seconds):
    import gplearn.functions
    from gplearn.genetic import SymbolicRegressor

    exp = gplearn.functions.make_function(function=lambda a: np.exp(np.clip(a, -50, 20)), name="exp", arity=1)
    names = ("add", "sub", "mul", "div", "sqrt", "log", "sin", "cos", exp)
    regressor = SymbolicRegressor(
        population_size=1000, generations=1, warm_start=True, metric="rmse", tournament_size=20, function_set=names,
        const_range=(-5, 5), parsimony_coefficient=0.0005, p_crossover=0.7, p_subtree_mutation=0.1,
        p_hoist_mutation=0.05, p_point_mutation=0.1, stopping_criteria=1e-8, random_state=seed,
    )  # fmt: skip
    start, generations = time.monotonic(), 0
    while time.monotonic() - start < seconds and (not generations or regressor._program.raw_fitness_ > 1e-8):
        generations += 1
        regressor.set_params(generations=generations)
        regressor.fit(X, y)
    return regressor


def pyoperon(X, y, seed, seconds):
    """Search by pyoperon for the best fit alone -> function of X."""
    return pyoperon_regressor(X, y, seed, seconds).predict


def pyoperon_front(X, y, seed, seconds):
    """Search by pyoperon for fit and length -> [(formula as text, function of X)], its own choice first."""
    regressor = pyoperon_regressor(X, y, seed, seconds, objectives=["r2", "length"])
    trees = [regressor.model_, *(entry["tree"] for entry in regressor.pareto_front_)]
    return [
        (regressor.get_model_string(tree, 6).replace("^", "**"), partial(regressor.evaluate_model, tree))
        for tree in trees
    ]


def pyoperon_regressor(X, y, seed, seconds, **settings):
    from pyoperon.sklearn import SymbolicRegressor

    regressor = SymbolicRegressor(
        allowed_symbols="add,sub,mul,div,sin,cos,exp,log,sqrt,square,constant,variable", max_length=30,
        optimizer_iterations=5, population_size=1000, generations=100_000, max_evaluations=10**9, max_time=seconds,
        n_threads=1, random_state=seed, epsilon=1e-10, tournament_size=3,
        **settings,
    )  # fmt: skip
    regressor.fit(X, y)
    return regressor
