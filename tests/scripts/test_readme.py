"""Every command of the README is parsed as its script would."""

import importlib
import re
import shlex

import pytest

from data_utils.config import from_cli
from tests.helpers import ROOT

README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.split("  #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.S)
    for line in block.splitlines()
]


def test_there_are_commands():
    assert len(COMMANDS) > 20


@pytest.mark.parametrize("command", [c for c in COMMANDS if re.match(r"(python|torchrun) \S*", c)])
def test_python_commands_parse(command):
    words = shlex.split(re.sub(r"torchrun (--\S+ \S+ )+", "python ", command))
    if words[1].startswith("scripts/"):  # which take no flags
        assert (ROOT / words[1]).exists() and len(words) == 2
        return
    if words[1] == "-m":  # a package
        from_cli(importlib.import_module(f"{words[2]}.__main__").Config, argv=words[3:])
        return
    module = importlib.import_module(words[1].removesuffix(".py").replace("/", "."))
    flags = words[2:]
    if words[1] == "prepare_data.py":
        from_cli(module.COMMANDS[flags[0]][0], argv=flags[1:])
    else:
        cfg = module.parse(flags)
        assert words[1] != "train_expert.py" or type(cfg) is module.CONFIGS[cfg.expert]


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("bash ")])
def test_shell_scripts_are_there(command):
    assert (ROOT / command.split()[1]).exists()


@pytest.mark.parametrize("path", re.findall(r"\]\(([^)#]+)\)", README))
def test_links_lead_somewhere(path):
    assert path.startswith("http") or (ROOT / path).exists()
