"""KEY=VALUE is a flag under other names; bundles have an order; --multirun is a list of command lines."""

import importlib
import shlex
from dataclasses import asdict, fields, replace

import pytest
import yaml

import train_ae
from data_utils.config import choices_of, complete, flag_names, from_cli, type_of
from data_utils.overrides import Jobs, values
from tests.helpers import ROOT
from train_ae import AeConfig, DiffusionAeConfig, GanAeConfig

VARIANTS = {name: cls for name, (cls, _) in train_ae.LOOPS.items()}
TABLE = train_ae.GUIDE


def read(line, table=TABLE):
    words = shlex.split(line) if isinstance(line, str) else line
    return from_cli(VARIANTS, "doc", words, "train_ae.py", by="loop", overrides=table)


def refused(line, capsys, table=TABLE):
    with pytest.raises(SystemExit) as stop:
        read(line, table)
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and lines[0].startswith("error: ") and len(lines) <= 3
    return "\n".join(lines)


@pytest.mark.parametrize(
    "line, flags",
    [
        ("", ""),
        ("phase1.trainer.epochs=20 phase1/latent_space=vq", "--epochs 20 --latent-space vq"),
        ("loop=gan_ae", "--loop gan_ae"),
        ("loop=diffusion_ae ddim_steps=5", "--loop=diffusion_ae --ddim-steps 5"),
        ("phase1.loop=test_mlp task=binary", "--loop test_mlp --task binary"),
        ("phase1.trainer.lr=0.001 phase1.trainer.seed=43 data.batch_size=256", "--seed 43 --batch-size 256"),
        ("phase1/encoder=gnn phase1/decoder=diffusion", "--encoder gnn --decoder diffusion"),
        ("logging.save_artifacts=false logging.make_plots=no", "--no-save-artifacts --no-make-plots"),
        ("logging.save_artifacts=1 compile=True", "--compile"),
        ("logging.families.losses.enabled=0 logging.families.recon.enabled=yes", "--no-plot-losses --plot-recon"),
        ("phase1.encoder.hidden=[64,32]", "--hidden 64 32"),
        ("phase1.decoder.hidden=64", "--hidden 64"),
        ("labels=[] features=[E,'pT']", "--labels --features E pT"),
        ("revive=-1 labels=[-1,2]", "--revive -1 --labels -1 2"),
        ("phase1.latent_space.codebook_size=64 data.path=a=b.npz", "--codebook_size 64 --data a=b.npz"),
        ("hydra=experiment hydra.job.name=latent_comparison", "--name latent_comparison"),
        ("batch-size=3 name=", "--batch_size 3 --name="),
        ("epochs=3 --lr 2 epochs=4 --epochs=5 hidden=[1,2] hidden=[3]", "--epochs 5 --lr 2 --hidden 3"),
        ("--hidden 1 2 epochs=4 hidden=[3]", "--epochs 4 --hidden 3"),
        ("--name epochs=4 --resume epochs=7", "--name epochs=4 --epochs 7 --resume latest"),
        ("--no-save-artifacts seed=1", "--no-save-artifacts --seed 1"),
    ],
)
def test_an_override_is_a_flag_under_another_name(line, flags):
    cls = next((VARIANTS[w.partition("loop=")[2]] for w in line.split() if "loop=" in w), AeConfig)
    assert read(line) == from_cli(cls, argv=shlex.split(flags)) and type(read(line)) is cls


def test_the_loop_picks_class_and_defaults():
    assert read("loop=diffusion_ae") == DiffusionAeConfig()
    assert read("--loop gan_ae adv_weight=1") == GanAeConfig(adv_weight=1.0)
    assert read("encoder=gnn loop=diffusion_ae latent_dim=3").level == "event"


@pytest.mark.parametrize(
    "line, words",
    [
        ("phase2.trainer.epochs=3", ["unknown key phase2.trainer.epochs", "phase1.trainer.epochs?"]),
        ("hid=3", ["keys like it: phi, hidden;"]),
        ("latent=3", ["keys like it: latent_dim, latent_space, latent_adv_weight; alone or after phase1.trainer. "]),
        ("phase1.trainer.epoch=3", ["phase1.trainer.epochs?"]),
        ("epoch=3", ["unknown key epoch (did you mean epochs?)"]),
        ("logging.families.loss.enabled=true", ["logging.families.losses.enabled?"]),
        ("phase1.trainer.epochs 20", ["phase1.trainer.epochs needs =value", "phase1.trainer.epochs=20"]),
        ("--compile epochs 20", ["epochs needs =value"]),
        ("stray", ["stray: expected KEY=VALUE or --flag"]),
        ("latent_space=none,vq", ["latent_space=none,vq", "--multirun"]),
        ("hidden=64,64", ["hidden=[64,64]", "--multirun"]),
        ("loop=gan", ["unknown loop gan (did you mean gan_ae?)", "ae, gan_ae, diffusion_ae, test_mlp"]),
        ("phase1/encoder=gnnn", ["--encoder", "'mlp', 'gnn', 'gan', 'diffusion'", "did you mean gnn?"]),
        ("latent_space=qv", ["qv", "none", "linear", "vq"]),
        ("epochs=x", ["--epochs", "x", "int"]),
        ("hidden=[64,x]", ["--hidden", "x"]),
        ("compile=maybe", ["compile=maybe", "true or false"]),
        ("adv_weight=1", ["adv_weight=1", "loop=gan_ae", "not ae"]),
        ("--task binary", ["loop=test_mlp"]),
        ("--epoch 3", ["--epoch", "did you mean --epochs?"]),
        ("env=clusterr", ["env=clusterr", "did you mean cluster?", "local"]),
        ("logging=plots", ["plots_minimal", "plots_standard", "plots_full"]),
        ("--config-name=phase1/experiment/compare", ["experiment/compare_vq_vs_none"]),
        ("--config nowhere.yaml", ["nowhere.yaml"]),
    ],
)
def test_a_slip_names_the_key_and_the_nearest(line, words, capsys):
    message = refused(line, capsys)
    assert all(word.replace("'", "") in message.replace("'", "") for word in words), message
    assert message.count("\n") <= 3 and max(map(len, message.splitlines())) < 200


# ---- scripts without bundles of a name -------------------------------------------------------------------------------

FIRST = dict(train_expert=["--expert=transformer"], train_hrm=["--dataset=synthetic"])  # words of each command line
OWN_RULES = "arch config env logging resume multirun sweep_job".split()  # bundles and sweeps, which other tests cover


def example(field):
    """Two lists of words that give a field the same value: as a flag, and as KEY=VALUE without its key."""
    kind, several = type_of(field)
    if kind is bool:
        return ["--no-{}"], "false"
    text = {int: "3", float: "0.5", str: "x"}[kind]
    if several:
        return ["--{}", text, text], f"[{text},{text}]"
    choices = choices_of(field)
    text = str(choices[-1]) if choices else text
    return ["--{}", text], text


@pytest.mark.parametrize("name", ["train_expert", "train_mla", "train_hrm", "train_sr", "train_ae", "train_multimodal"])
def test_each_flag_of_each_script_is_a_key_too(name):
    module = importlib.import_module(name)
    first = FIRST.get(name, [])
    for f in fields(module.Config):
        if f.name in OWN_RULES:
            continue
        words, value = example(f)
        for key in flag_names(f):
            spelling = key.replace("_", "-")
            typed = [word.format(spelling) for word in words]
            assert module.parse([*first, *typed]) == module.parse([*first, f"{spelling}={value}"]), spelling


@pytest.mark.parametrize(
    "name, line, flags",
    [
        ("train_expert", "expert=diffuser lr=1e-3 use_amp=false", "--expert diffuser --lr 1e-3 --no-use_amp"),
        ("train_expert", "expert=transformer domains=[a,b] lr=1", "--expert transformer --domains a b --lr 1"),
        ("train_expert", "--expert transformer --domains a b lr=1", "--expert transformer --domains a b --lr 1"),
        ("train_expert", "--expert transformer --resume lr=1", "--expert transformer --resume --lr 1"),
        ("train_expert", f"config={ROOT}/configs/expert/smoke.yaml", f"--config {ROOT}/configs/expert/smoke.yaml"),
        ("train_mla", "use-vector-store=yes out=a=b", "--use_vector_store --checkpoint_dir a=b"),
        ("train_mla", "lr=1 --lr 2 lr=3", "--lr 3"),
        ("train_hrm", "dataset=sudoku --dry_run lr=0.1", "--dataset sudoku --dry_run 1 --learning_rate 0.1"),
        ("train_sr", "-v lr_schedule=0:0,9:1e-4 -vi 3", "--verbose --lr_schedule 0:0,9:1e-4 --validate_interval 3"),
        ("train_sr", "-o run resume=auto operators=[+,*]", "--output_dir run --resume --operators + *"),
    ],
)
def test_keys_and_flags_mix(name, line, flags):
    module = importlib.import_module(name)
    assert module.parse(line.split()) == module.parse(flags.split())


@pytest.mark.parametrize(
    "name, line, words",
    [
        ("train_expert", "expert=transformer max_step=3", ["unknown key max_step (did you mean max_steps?)"]),
        ("train_expert", "expert=transformer domain=a", ["unknown key domain (did you mean domains?)"]),
        ("train_expert", "expert=transformer domains=a,b", ["domains=a,b: expected one value", "domains=[a,b]"]),
        ("train_expert", "expert=gpt", ["--expert", "gpt"]),
        ("train_expert", "expert=transformer d_state=4", ["unrecognized arguments: --d_state"]),
        ("train_mla", "use_vector_store=maybe", ["use_vector_store=maybe: expected true or false"]),
        ("train_mla", "lr 3", ["lr needs =value, as in lr=3"]),
        ("train_hrm", "lr=fast", ["--lr", "fast"]),
        ("train_hrm", "stray", ["stray: expected KEY=VALUE or --flag"]),
        ("train_sr", "stepz=3", ["unknown key stepz (did you mean steps?)"]),
    ],
)
def test_a_slip_in_a_key_is_named_as_one_in_a_flag(name, line, words, capsys):
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(name).parse(line.split())
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.startswith("error: ") and "\ntry: " in message
    assert all(word in message for word in words) and message.count("\n") <= 3, message


# ---- bundles ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def table(tmp_path):
    """A table whose bundles lie in tmp_path."""
    (tmp_path / "env").mkdir()
    for name in ("env/local", "env/far", "some", "figures"):
        (tmp_path / f"{name}.yaml").write_text("")
    return replace(TABLE, folder=str(tmp_path))


def test_precedence(table, tmp_path):
    (tmp_path / "env" / "far.yaml").write_text("epochs: 1\nseed: 1\nlr: 1\nclip: 1\nhidden: [1, 1]")
    (tmp_path / "some.yaml").write_text("env: far\nseed: 2\nlr: 2\nclip: 2\nhidden: [2]\nloop: gan_ae")
    (tmp_path / "figures.yaml").write_text("lr: 3\nclip: 3\nmake_plots: false")
    cfg = read("clip=5 logging=figures --config-name=phase1/some clip=4 --make-plots", table)
    assert (cfg.epochs, cfg.seed, cfg.lr, cfg.clip, cfg.hidden) == (1, 2, 3.0, 4.0, (2,))
    assert cfg.make_plots and cfg.loop == "gan_ae" and cfg.env == "far" and cfg.logging == "figures"
    cfg = read(f"config={tmp_path}/some.yaml env=local loop=ae hidden=[3]", table)
    assert (cfg.epochs, cfg.seed, cfg.hidden, cfg.env, type(cfg)) == (10, 2, (3,), "local", AeConfig)


def test_a_part_may_have_a_bundle_of_its_name(table, tmp_path, capsys):
    for folder in ("encoder", "loop"):
        (tmp_path / folder).mkdir()
    (tmp_path / "encoder" / "gnn.yaml").write_text("gnn_dim: 5\nlr: 5\nclip: 5\nseed: 5")
    (tmp_path / "loop" / "gan_ae.yaml").write_text("adv_start: 0.5")
    (tmp_path / "env" / "local.yaml").write_text("seed: 1\ngnn_dim: 1")
    (tmp_path / "some.yaml").write_text("encoder: gnn\nclip: 2")
    cfg = read("--config-name some lr=3 loop=gan_ae", table)
    assert (cfg.gnn_dim, cfg.seed, cfg.clip, cfg.lr, cfg.adv_start) == (5, 5, 2.0, 3.0, 0.5)
    assert read("encoder=mlp", table).gnn_dim == 1 and read("phase1/encoder=gnn", table).gnn_dim == 5
    assert [cfg.gnn_dim for cfg in read("-m encoder=mlp,gnn", table).configs] == [1, 5]
    cfg = complete(AeConfig(encoder="gnn", lr=7.0), VARIANTS, by="loop", overrides=table)
    assert (cfg.gnn_dim, cfg.lr) == (5, 7.0)
    assert "gnn_dims" in refused("encoder=gnn gnn_dims=3", capsys, table)
    (tmp_path / "encoder" / "gnn.yaml").write_text("nothing: 3")
    assert "encoder/gnn.yaml" in refused("encoder=gnn", capsys, table)


def test_a_mistake_in_a_bundle_names_the_file(table, tmp_path, capsys):
    (tmp_path / "some.yaml").write_text("epoch: 3")
    message = refused("--config-name some", capsys, table)
    assert "some.yaml" in message and "did you mean --epochs?" in message
    (tmp_path / "some.yaml").write_text("latent_space: none,vq")
    assert "some.yaml" in refused("--config-name some", capsys, table)
    assert read("--config-name some latent_space=vq", table).latent_space == "vq"


def test_a_run_that_is_resumed_brings_its_flags(table, tmp_path):
    (tmp_path / "env" / "local.yaml").write_text("seed: 9")
    (tmp_path / "run" / ".hydra").mkdir(parents=True)
    (tmp_path / "run" / ".hydra" / "config.yaml").write_text("loop: diffusion_ae\nseed: 5\nlr: 2")
    cfg = read(f"resume={tmp_path}/run lr=3", table)
    assert type(cfg) is DiffusionAeConfig and (cfg.seed, cfg.lr) == (5, 3.0)
    assert read("resume=auto", table).seed == 9


def test_what_a_run_keeps_of_its_flags_is_a_bundle(table, tmp_path):
    cfg = read("loop=gan_ae labels=[] hidden=[3,4] lr=1e-7 revive=-1 --no-make-plots")
    settings = {n: list(v) if isinstance(v, tuple) else v for n, v in asdict(cfg).items() if n not in ("env", "config")}
    (tmp_path / "kept.yaml").write_text(yaml.safe_dump(settings | dict(sweep_job=7)))
    assert replace(read(["--config", f"{tmp_path}/kept.yaml"], table), config="", sweep_job=-1) == cfg
    assert len(read(["--config", f"{tmp_path}/kept.yaml", "-m", "epochs=1,2"], table).words) == 2


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "ae").glob("**/*.yaml")), ids=lambda p: p.stem)
def test_the_bundles_that_come_along_repeat_no_default(path, monkeypatch):
    monkeypatch.setenv("PETRI_DATA", "events.npz")
    monkeypatch.setenv("PETRI_OUTPUTS", "there")
    parsed = read(["--config", str(path)])
    cfg = parsed.configs[0] if isinstance(parsed, Jobs) else parsed
    text = [line.partition(":")[0] for line in path.read_text().splitlines() if line and line[0] != "#"]
    default = asdict(type(cfg)()) | dict(multirun=False)
    given = asdict(cfg) | dict(multirun=parsed.multirun)
    assert [name for name in text if given[name] == default[name] and name != "latent_space"] == []


# ---- sweeps ----------------------------------------------------------------------------------------------------------


def test_values():
    assert values("a,b") == ["a", "b"] and values("[1,2],[3],4") == ["[1,2]", "[3]", "4"] and values("a") == ["a"]


def test_the_last_key_changes_fastest():
    jobs = read("-m hydra=experiment phase1/latent_space=none,vq --seed 3 hidden=[8,8],[4] name=two")
    assert jobs.words == [
        [f"phase1/latent_space={space}", "--seed", "3", f"hidden={hidden}", "name=two"]
        for space in ("none", "vq")
        for hidden in ("[8,8]", "[4]")
    ]
    assert [(cfg.latent_space, cfg.hidden) for cfg in jobs.configs] == [
        ("none", (8, 8)), ("none", (4,)), ("vq", (8, 8)), ("vq", (4,))
    ]  # fmt: skip
    assert all(cfg.seed == 3 and not cfg.multirun for cfg in jobs.configs) and jobs.multirun
    assert len(read("--multirun").words) == 1


def test_a_bundle_may_hold_a_sweep():
    jobs = read("--config-name=phase1/experiment/compare_vq_vs_none phase1.trainer.epochs=50")
    assert [cfg.latent_space for cfg in jobs.configs] == ["none", "linear", "vq"]
    assert {cfg.epochs for cfg in jobs.configs} == {50}
    jobs = read("--config-name experiment/compare_vq_vs_none latent_space=linear epochs=1,2")
    assert [(cfg.latent_space, cfg.epochs) for cfg in jobs.configs] == [("linear", 1), ("linear", 2)]
    loops = read("multirun=true loop=ae,gan_ae,diffusion_ae").configs
    assert [type(cfg) for cfg in loops] == [AeConfig, GanAeConfig, DiffusionAeConfig]


def test_one_job_of_a_sweep(tmp_path):
    cfg = read("--multirun latent_space=none,vq epochs=1,2 sweep_job=2 out=there")
    assert cfg == AeConfig(latent_space="vq", epochs=1, sweep_job=2, out="there")
    rows = [dict(overrides=[f"epochs={i}"], run_dir=f"runs/{i}", status="done") for i in range(1, 4)]
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(dict(jobs=rows)))
    cfg = read(f"resume={tmp_path} sweep_job=2 seed=1")
    assert cfg == AeConfig(epochs=3, sweep_job=2, seed=1, out="runs/3")


@pytest.mark.parametrize(
    "line, words",
    [
        ("latent_space=none,qv", ["qv", "did you mean vq?"]),
        ("latent_space=none,vq epochs=1 phase1/latent_space=vq", ["latent_space", "2 times"]),
        ("epochs=1,2 out=there", ["out", "outputs=FOLDER"]),
        ("epochs=1,2 sweep_job=2", ["sweep_job=2", "2 jobs, 0 to 1"]),
        ("epochs=1,2 sweep_job=two", ["sweep_job=two"]),
        (f"epochs={','.join('1' * 11)} seed={','.join('1' * 100)}", ["1100", "1000"]),
        ("epochs 1,2", ["epochs needs =value"]),
    ],
)
def test_what_a_sweep_can_not_have(line, words, capsys):
    message = refused(f"--multirun {line}", capsys)
    assert all(word in message for word in words), message


def test_no_sweep_under_torchrun(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "torchrun" in refused("--multirun epochs=1,2", capsys)


def test_a_bundle_takes_variables_of_the_environment(tmp_path, monkeypatch, capsys):
    path = tmp_path / "a.yaml"
    path.write_text("data: ${PLACE:-decay_chain}\noutputs: /x/${PLACE}/y\n")
    monkeypatch.setenv("PLACE", "here")
    cfg = read(["--config", str(path)])
    assert (cfg.data, cfg.outputs) == ("here", "/x/here/y")
    monkeypatch.delenv("PLACE")
    with pytest.raises(SystemExit):
        read(["--config", str(path)])
    assert f"--config {path}: outputs: the environment has no PLACE\nfix: export PLACE=VALUE" in capsys.readouterr().err
