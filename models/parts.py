"""The parts of an autoencoder: a word of a flag of train_ae.py -> the class that it builds, as "module.name".

These words are the choices of the flags, so this file imports no torch. A new part is a class and a line here: see
docs/extending.md.
"""

import importlib
import inspect

ENCODERS = dict(
    mlp="models.autoencoder.MlpEncoder",
    gnn="models.autoencoder.SetEncoder",
    gan="models.autoencoder.GanEncoder",
    diffusion="models.autoencoder.DiffusionEncoder",
)
DECODERS = dict(
    mlp="models.autoencoder.MlpDecoder",
    gnn="models.autoencoder.GraphDecoder",
    gan="models.autoencoder.GanDecoder",
    diffusion="models.autoencoder.DiffusionDecoder",
)
LATENT_SPACES = dict(
    none="models.autoencoder.Identity",
    linear="models.autoencoder.LinearMap",
    vq="models.autoencoder.codebook",
)


def part(table, word):
    """Return the class that a word of ENCODERS, DECODERS or LATENT_SPACES stands for. Raises ValueError."""
    if word not in table:
        raise ValueError(f"no part {word!r}: expected one of {', '.join(table)}")
    module, _, name = table[word].rpartition(".")
    return getattr(importlib.import_module(module), name)


def named(build, settings):
    """Return those of the settings that are arguments of `build`, a class or a function."""
    return {name: settings[name] for name in inspect.signature(build).parameters if name in settings}


def build_part(table, word, **settings):
    """Build the part of a word with those of the settings that its class has as arguments. Raises ValueError."""
    build = part(table, word)
    arguments = named(build, settings)
    needed = inspect.signature(build).parameters.values()
    missing = [p.name for p in needed if p.default is p.empty and p.kind is p.KEYWORD_ONLY and p.name not in arguments]
    if missing:
        raise ValueError(f"{word} needs {', '.join(missing)}: expected a setting of that name")
    return build(**arguments)
