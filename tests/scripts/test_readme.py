"""Every command of README.md and docs/ is parsed as its script would, and every link leads somewhere."""

import importlib
import importlib.util
import re
import shlex
from dataclasses import fields

import pytest

from data_utils.config import flag_names, from_cli
from tests.helpers import ROOT

PAGES = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))}


def commands(page):
    """Yield the commands of a page: lines of its bash blocks, and code within text that begins like one."""
    for block in re.findall(r"```bash\n(.*?)```", page, re.S):
        for line in block.splitlines():
            yield from (part.strip() for part in re.split(r" && ", line.split("  #")[0]))
    text = re.sub(r"```.*?```", "", page, flags=re.S)
    yield from (code for code in re.findall(r"`((?:python|torchrun|bash) [^`]+)`", text) if "..." not in code)


COMMANDS = sorted({command for page in PAGES.values() for command in commands(page)})


def test_there_are_commands():
    assert len(COMMANDS) > 80
    for name, page in PAGES.items():
        assert re.search(r"```(bash|python)\n", page), name  # each page begins with one that works as pasted


@pytest.mark.parametrize("command", [c for c in COMMANDS if re.match(r"(python|torchrun) \S*", c)])
def test_python_commands_parse(command):
    words = shlex.split(re.sub(r"torchrun (--\S+ \S+ )+", "python ", command))
    if words[1].startswith("scripts/"):  # these take no flags
        assert (ROOT / words[1]).exists() and len(words) == 2
        return
    if words[1] == "-m" and words[2].startswith("benchmarks."):
        assert importlib.util.find_spec(words[2])
        return
    if words[1] == "-m":  # a package
        from_cli(importlib.import_module(f"{words[2]}.__main__").Config, argv=words[3:])
        return
    module = importlib.import_module(words[1].removesuffix(".py").replace("/", "."))
    flags = words[2:]
    if "--help" in flags:
        return
    if words[1] == "prepare_data.py":
        from_cli(module.COMMANDS[flags[0]][0], argv=flags[1:])
    elif words[1].startswith("benchmarks/"):
        from_cli(module.Config, argv=flags)
    else:
        cfg = module.parse(flags)
        assert words[1] != "train_expert.py" or type(cfg) is module.CONFIGS[cfg.expert]


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("bash ")])
def test_shell_scripts_are_there(command):
    assert (ROOT / command.split()[1]).exists()


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    folder = ROOT if name == "README.md" else ROOT / "docs"
    for path in re.findall(r"\]\(([^)#]+)[^)]*\)", PAGES[name]):
        assert path.startswith("http") or (folder / path).exists(), path


def test_the_front_page_is_one_page():
    assert len(PAGES["README.md"].splitlines()) <= 230


def test_the_table_of_shared_flags_is_true():
    rows = re.search(r"## Flags that the scripts share\n\n((?:\|.*\n)+)", PAGES["README.md"])[1].splitlines()[2:]
    scripts = {name: importlib.import_module(f"train_{name}") for name in "expert mla hrm sr ae multimodal".split()}
    for flags, _, absent in (row.strip("|").split("|") for row in rows):
        lacking = re.findall(r"\w+", absent.partition(":")[0])
        for name, module in scripts.items():
            configs = [*getattr(module, "CONFIGS", {"": module.Config}).values()]
            known = {spelling for cls in configs for f in fields(cls) for spelling in flag_names(f)}
            has = [flag in known for flag in re.findall(r"`--(\w+)`", flags)]
            expected = any(has) if "or" in flags.split() else all(has)
            assert expected == (name not in lacking), (name, flags)
