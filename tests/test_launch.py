"""The launch files are read as what they are, and name only configs and flags that exist."""

import pathlib
import re
import subprocess

import pytest
import yaml
from absl import flags

from sdprune_jax.config import command_line

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted((ROOT / "tools" / "launch").iterdir())


def test_there_is_one_for_each_kind_of_cluster():
    assert [path.name for path in FILES] == ["gke_jobset.yaml", "slurm_gpus.sh", "tpu_pod.sh"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_flags_exist_and_all_processes_find_each_other(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = path.read_text()
    assert "sdprune_jax.main" in text
    chosen = re.findall(r"--config=(configs/\w+\.py)", text) or ["configs/aptp_emoji.py"]
    overrides = re.findall(r"--config\.[a-z_.]+=[\w./-]+", text)
    run = command_line.parse(["main", f"--config={chosen[0]}", *overrides], flags.FlagValues()).run
    assert run.mesh.coordinator == "auto"


@pytest.mark.parametrize("path", [p for p in FILES if p.suffix == ".sh"], ids=lambda p: p.name)
def test_script_is_bash_and_says_what_it_wants(path):
    assert path.stat().st_mode & 0o111, f"{path} cannot be executed"
    subprocess.run(["bash", "-n", path], check=True)
    done = subprocess.run([path], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert f"tools/launch/{path.name}" in done.stderr


def test_slurm_starts_again_what_was_saved_and_nothing_else(tmp_path, monkeypatch):
    for name in ("srun", "scontrol"):
        tool = tmp_path / name
        tool.write_text(f'#!/bin/bash\necho {name} "$@" >> {tmp_path}/calls\nexit ${{STATUS:-0}}\n')
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    script = ROOT / "tools" / "launch" / "slurm_gpus.sh"
    for status, requeued in ((0, False), (1, False), (143, True)):
        (tmp_path / "calls").unlink(missing_ok=True)
        monkeypatch.setenv("STATUS", str(status))
        done = subprocess.run([script, "configs/x y.py", "--config.seed=3"], check=False)
        calls = (tmp_path / "calls").read_text()
        assert done.returncode == status
        assert "--config=configs/x y.py --config.mesh.coordinator=auto --config.seed=3" in calls
        assert ("scontrol requeue 7" in calls) == requeued


def test_jobset_has_a_worker_for_each_host_and_gives_time_to_save():
    jobset = yaml.safe_load((ROOT / "tools" / "launch" / "gke_jobset.yaml").read_text())
    (job,) = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    rows, columns = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    hosts = int(rows) * int(columns) // container["resources"]["limits"]["google.com/tpu"]
    assert spec["parallelism"] == spec["completions"] == hosts
    assert spec["backoffLimit"] == 0  # all hosts start again, not one
    assert pod["terminationGracePeriodSeconds"] >= 60
    assert container["args"][0].startswith("exec python -m sdprune_jax.main ")
    assert container["command"] == ["bash", "-c"]
