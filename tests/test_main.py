"""The command line, and the order of the stages."""

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
import types

import aptp_model
import pytest
from absl import flags

from sdprune_jax import config, main
from sdprune_jax.config import command_line
from sdprune_jax.files import lock
from sdprune_jax.stages import cost_card

SOURCE = """
from sdprune_jax import config


def get_config(size: str | None = None) -> config.Run:
    prune = config.Prune(unet=config.PruneComponent(sparsity=0.3))
    run = config.Run(workdir={workdir!r}, prune=prune, report=config.Report())
    return config.resize(run, size)
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "small.py"
    path.write_text(SOURCE.format(workdir=str(tmp_path / "work")))
    return path


def _parse(*words) -> command_line.Command:
    return command_line.parse(["main", *map(str, words)], flags.FlagValues())


def _refusal(*words) -> str:
    with pytest.raises(ValueError, match=r"\w") as error:
        _parse(*words)
    return str(error.value)


def _written_beside(file) -> set[str]:
    """Python may keep what it compiled of a config."""
    return {path.name for path in file.parent.iterdir()} - {file.name, "__pycache__"}


def _program(*words) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "sdprune_jax.main", *map(str, words)]
    root = pathlib.Path(__file__).parents[1]
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, capture_output=True, text=True, cwd=root, env=env, check=False)


def test_overrides_reach_the_run(file):
    run, dry_run = _parse(
        f"--config={file}",
        "--config.prune.unet.sparsity",
        "0.25",
        "--config.seed=7",
        "--config.generate=build",
        "--config.generate.height=64",
    )
    assert (run.prune.unet.sparsity, run.seed, run.generate.height) == (0.25, 7, 64)
    assert run.generate == config.Generate(height=64)
    assert not dry_run


def test_size_reaches_the_config(file):
    run, dry_run = _parse("--config", f"{file}:tiny", "--dry_run", "--force")
    assert run.workdir.endswith("work_tiny")
    assert dry_run
    assert run.force


def test_none_leaves_out_a_section_or_a_value(file):
    run, _ = _parse(
        f"--config={file}",
        "--config.prune.unet=none",
        "--config.prune.text_encoder=build",
        "--config.report=none",
        "--config.generate=build",
        "--config.generate.sampler=none",
        "--config.generate.width=none",
    )
    assert run.prune == config.Prune(text_encoder=config.PruneComponent())
    assert run.report is None
    assert run.generate == config.Generate(sampler=None, width=None)


def test_tuples_are_read(file):
    words = ("--config.pretrain=build", "--config.pretrain.vae.widths=(8, 16)")
    assert _parse(f"--config={file}", *words).run.pretrain.vae.widths == (8, 16)


def test_wrong_values_are_told_together(file):
    text = _refusal(f"--config={file}", "--config.prune.unet.sparsity=35", "--config.seed=x")
    assert "config.prune.unet.sparsity is 35.0, expected float from 0.0 to 0.999999" in text
    assert "so 35 % is 0.35" in text
    assert "config.seed is 'x', expected int from 0" in text


def test_unknown_words_are_refused(file):
    assert "did you mean `seed`" in _refusal(f"--config={file}", "--config.sed=1")
    assert "Did you mean: dry_run" in _refusal(f"--config={file}", "--dryrun")
    assert f"`{file}` is not a flag\n  say --config=" in _refusal(file)
    assert "no config is given\n  say --config=" in _refusal()
    assert "Missing value" in _refusal(f"--config={file}", "--config.seed")


def test_config_that_cannot_be_loaded_is_told_with_its_place(file):
    assert "did you mean `" + str(file) in _refusal(f"--config={file.with_name('smal.py')}")
    assert "unknown size 'huge'" in _refusal(f"--config={file}:huge")
    file.write_text("def get_config():\n    return undefined\n")
    assert f"{file}, line 2: NameError: name 'undefined'" in _refusal(f"--config={file}")
    file.write_text("def get_config(:\n")
    assert "SyntaxError" in _refusal(f"--config={file}")
    file.write_text("def get_config():\n    return {}\n")
    assert "needs a function get_config" in _refusal(f"--config={file}")
    file.write_text("")
    assert "needs a function get_config" in _refusal(f"--config={file}")


def test_only_the_stages_that_are_set_run_in_order(file, monkeypatch):
    calls = []

    def stub(name):
        def stage(*given):
            assert tuple(type(x).__name__ for x in given) == ("Run", "Mesh")
            calls.append(name)
            return pathlib.Path(name)

        module = types.ModuleType(name)
        module.check, module.run = lambda *_: None, stage
        monkeypatch.setitem(sys.modules, f"sdprune_jax.stages.{name}", module)

    for name in ("pretrain", "prune", "generate", "report"):
        stub(name)
    run = _parse(f"--config={file}").run
    assert main.run_stages(run) == [pathlib.Path("prune"), pathlib.Path("report")]
    everything = dataclasses.replace(run, pretrain=config.Pretrain(), generate=config.Generate())
    calls.clear()
    main.run_stages(everything)
    assert calls == ["pretrain", "prune", "generate", "report"]
    assert json.loads((pathlib.Path(run.workdir) / "config.json").read_text()) == json.loads(
        json.dumps(dataclasses.asdict(everything))
    )


def test_run_without_a_stage_is_refused_and_writes_nothing(tmp_path):
    with pytest.raises(ValueError, match="no stage"):
        main.run_stages(config.Run(workdir=str(tmp_path / "work")))
    assert not (tmp_path / "work").exists()


def test_what_evaluate_lacks_is_told_before_any_stage_runs(tmp_path):
    asked = config.Run(workdir=str(tmp_path / "run"), prune=config.Prune())
    asked.evaluate = config.Evaluate(protocol="sd2prune-paper")
    with pytest.raises(ValueError, match="the network inception"):
        main.run_stages(asked)
    assert not (tmp_path / "run").exists()


def test_workdir_that_cannot_be_written_is_refused(file):
    for path in (file / "below", file.with_name(256 * "x")):  # of too many letters
        with pytest.raises(ValueError, match=re.escape("--config.workdir=DIRECTORY")):
            lock.save_config(str(path), {})
        with pytest.raises(ValueError, match="cannot be written"), lock.alone(str(path)):
            pytest.fail("let in")


def test_second_run_in_a_directory_is_refused_while_the_first_lives(tmp_path):
    with lock.alone(str(tmp_path / "work")):
        again = pytest.raises(ValueError, match=rf"another run .*: process {os.getpid()} on .*lock")
        with again, lock.alone(str(tmp_path / "work")):
            pytest.fail("let in")
    taken = tmp_path / "work" / "lock"
    source = (
        "import fcntl, sys; f = open(sys.argv[1]); fcntl.flock(f, 2); print(flush=True); input()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", source, str(taken)], **pipes) as other:
        other.stdout.readline()
        with pytest.raises(ValueError, match="another run"), lock.alone(str(tmp_path / "work")):
            pytest.fail("let in")
        other.kill()
    with lock.alone(str(tmp_path / "work")):
        assert taken.read_text().startswith(f"process {os.getpid()} on ")
    with pytest.raises(ValueError, match=r"work/lock'.*cannot be written"), lock.alone(str(taken)):
        pytest.fail("let in")


def test_run_from_a_directory_that_was_deleted_is_refused(file, monkeypatch):
    command = _parse(f"--config={file}")
    (file.parent / "gone").mkdir()
    monkeypatch.chdir(file.parent / "gone")
    (file.parent / "gone").rmdir()
    with pytest.raises(ValueError, match="current directory was deleted"):
        main.main(command)


def test_run_needs_no_home_no_locale_and_no_clock(tmp_path, monkeypatch):
    home = tmp_path / "es läuft 走"  # a space, letters, and nothing that ASCII has
    model = aptp_model.make(home / "model", aptp_model.ONE_LEVEL)
    words = [f"--config={home}/one.py", f"--config.workdir={home}/work"]
    words.append(f"--config.model={model.directory}")
    (home / "one.py").write_text(
        "from sdprune_jax import config\n"
        "def get_config():\n"
        "    prune = config.Prune(text_encoder=config.PruneComponent())\n"
        "    return config.Run(prune=prune, report=config.Report())\n"
    )
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    for name, value in {
        "HOME": "/dev/null",
        "TZ": "Mars/Olympus_Mons",
        "LC_ALL": "C",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONUTF8": "0",
    }.items():
        monkeypatch.setenv(name, value)
    done = _program(*words)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((home / "work" / "prune.json").read_text())["of_pipeline"] > 0
    assert (home / "work" / "report.html").is_file()


def test_only_a_mistake_of_the_user_ends_without_a_traceback(capsys):
    with pytest.raises(SystemExit) as end, command_line.one_message():
        config.resize(config.Run(), "huge")
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: unknown size 'huge'")
    with pytest.raises(ValueError, match="invalid literal"), command_line.one_message():
        int("no advice of ours")


def test_program_says_one_message_and_writes_nothing(file):
    done = _program(f"--config={file}", "--config.prune.unit.sparsity=0.3")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert "did you mean `unet`" in done.stderr
    assert "Traceback" not in done.stderr
    assert not _written_beside(file)


def test_dry_run_prints_a_card_and_writes_nothing(file, monkeypatch, capsys):
    monkeypatch.setattr(
        cost_card, "card", lambda run, num_devices: f"{run.workdir} on {num_devices}"
    )
    main.main(_parse(f"--config={file}", "--dry_run"))
    assert capsys.readouterr().out == f"{file.with_name('work')} on 8\n"
    assert not _written_beside(file)


def test_a_cpu_becomes_as_many_devices_as_the_config_says(file):
    done = _program(f"--config={file}:tiny", "--config.mesh.cpu_devices=2", "--dry_run")
    assert "devices data 2 x fsdp 1" in done.stdout, done.stderr
