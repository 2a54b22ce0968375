"""What is given to schedulers: manifests hold to JobSet's own schema, scripts run, mistakes are named."""

import os
import re
import shlex
import stat
import subprocess
from pathlib import Path

import pytest
import yaml

from umm_jax import cli
from umm_jax.errors import ConfigError
from umm_jax.launch.job import FINAL, Job
from umm_jax.launch.lines import slurm, xpk
from umm_jax.plan.chips import topology
from umm_jax.train.watchdog import HUNG

ROOT = Path(__file__).resolve().parent.parent
CONFIG = str(ROOT / "configs" / "world_tiny.py")
SCHEMAS = Path(os.environ.get("UMM_PARITY_DIR", ROOT.parent / "shared" / "parity")).parent / "schemas"
JOB = Job("tiny-1", "configs/world_tiny.py", "/mnt/runs/tiny", ("--config.train.steps=9",), {"A": "b c"})


def launch(capsys, *argv) -> str:
    cli.dispatch(["launch", *argv])
    return capsys.readouterr().out


# --- JobSet ----------------------------------------------------------------------------------------------


def holds(value, schema, path="$"):
    """What of `value` a structural schema of Kubernetes refuses, as lines."""
    if schema.get("x-kubernetes-int-or-string"):
        return [] if isinstance(value, (int, str)) else [f"{path}: neither number nor text"]
    kinds = {"object": dict, "array": list, "string": str, "boolean": bool, "integer": int}
    kind = schema.get("type")
    if kind and (not isinstance(value, kinds[kind]) or (kind == "integer" and isinstance(value, bool))):
        return [f"{path}: {value!r} is no {kind}"]
    found = []
    if "enum" in schema and value not in schema["enum"]:
        found.append(f"{path}: {value!r} is none of {schema['enum']}")
    if "pattern" in schema and not re.search(schema["pattern"], value):
        found.append(f"{path}: {value!r} does not match {schema['pattern']}")
    if isinstance(value, dict) and "properties" in schema:
        known, more = schema["properties"], schema.get("additionalProperties")
        found += [f"{path}: no {name}" for name in schema.get("required", ()) if name not in value]
        for name, one in value.items():
            if name in known:
                found += holds(one, known[name], f"{path}.{name}")
            elif not more and not schema.get("x-kubernetes-preserve-unknown-fields") and known:
                found.append(f"{path}: {name} is not known")
    elif isinstance(value, dict) and isinstance(schema.get("additionalProperties"), dict):
        for name, one in value.items():
            found += holds(one, schema["additionalProperties"], f"{path}.{name}")
    if isinstance(value, list):
        for index, one in enumerate(value):
            found += holds(one, schema["items"], f"{path}[{index}]")
    return found


@pytest.fixture(scope="module")
def schema():
    path = SCHEMAS / "jobset_crd.yaml"
    if not path.exists():
        pytest.skip(f"{path} is not there: JobSet's resource definition comes with the references")
    found = next(
        d for d in yaml.safe_load_all(path.read_text()) if d and d["spec"]["names"]["kind"] == "JobSet"
    )
    version = next(v for v in found["spec"]["versions"] if v["name"] == "v1alpha2")
    return version["schema"]["openAPIV3Schema"]


GKE = ["jobset", f"--config={CONFIG}", "--workdir=/mnt/runs/tiny", "--name=tiny", "--image=eu.gcr.io/x/umm:1"]


@pytest.mark.parametrize(
    "shape, slices", [("v5p:4x4x4", 1), ("v5e:16x16", 2), ("v6e:2x2", 1), ("v4:2x2x4", 3)]
)
def test_a_jobset_holds_to_its_schema(capsys, schema, shape, slices):
    text = launch(capsys, *GKE, f"--topology={shape}", f"--slices={slices}", "--spot", "--env=A=1")
    made = yaml.safe_load(text)
    assert not holds(made, schema)
    # The walker refuses what it should.
    broken = yaml.safe_load(text)
    job = broken["spec"]["replicatedJobs"][0]["template"]["spec"]
    job["parallelism"], job["completionMod"] = "four", "Indexed"
    broken["spec"]["failurePolicy"]["rules"][0]["action"] = "GiveUp"
    assert len(holds(broken, schema)) >= 3


def test_a_jobset_asks_for_every_chip_of_every_slice(capsys):
    made = yaml.safe_load(launch(capsys, *GKE, "--topology=v5e:16x16", "--slices=2"))["spec"]
    (slices,) = made["replicatedJobs"]
    job = slices["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert slices["replicas"] * job["completions"] * container["resources"]["limits"]["google.com/tpu"] == 512
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "16x16",
    }
    # Preemption and hangs start the set again, mistakes do not.
    codes = job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"]
    assert {1, 2, 3, 4, 5, 6, 7, 130} == set(codes) and not {143, HUNG, 137} & set(codes)
    assert container["command"][:2] == ["umm", "train"] and "--coordinator=auto" in container["command"]


# --- lines ------------------------------------------------------------------------------------------------


def test_an_xpk_line_survives_a_shell(capsys):
    line = xpk(JOB, topology("v5p:4x4x4", 2), "img:1", cluster="c", zone="z", project="p")
    words = shlex.split(line)
    assert words[:3] == ["xpk", "workload", "create"] and "--tpu-type=v5p-128" in words
    assert "--num-slices=2" in words and "--env=A=b c" in words
    command = next(word for word in words if word.startswith("--command="))
    assert shlex.split(command.partition("=")[2]) == JOB.command


@pytest.mark.parametrize(
    "name, kind", [("v4:2x2x4", "v4-32"), ("v5e:4x4", "v5litepod-16"), ("v6e:16x16", "v6e-256")]
)
def test_kinds_of_slices_have_cloud_tpus_names(name, kind):
    assert topology(name).accelerator == kind


FAKE_SRUN = """#!/bin/sh
printf '%s\\n' "$@" > "$LOG/srun.said"
echo "$A" > "$LOG/env"
exit $STATUS
"""
FAKE_SCONTROL = """#!/bin/sh
echo "$@" >> "$LOG/scontrol.said"
"""


@pytest.mark.parametrize(
    "status, restarts, again", [(0, 0, False), (143, 0, True), (HUNG, 3, True), (2, 0, False)]
)
def test_a_slurm_script_starts_again_what_is_worth_it_against_fake_commands(
    tmp_path, status, restarts, again
):
    for name, text in (("srun", FAKE_SRUN), ("scontrol", FAKE_SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755 | stat.S_IEXEC)
    script = slurm(JOB, nodes=2, gpus=8, hours=1.5)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "LOG": str(tmp_path),
        "STATUS": str(status),
        "SLURM_JOB_ID": "77",
        "SLURM_RESTART_COUNT": str(restarts),
    }
    done = subprocess.run(["sh", "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert (tmp_path / "srun.said").read_text().splitlines() == ["--kill-on-bad-exit=1", *JOB.command]
    assert (tmp_path / "env").read_text() == "b c\n"
    assert (tmp_path / "scontrol.said").exists() == again
    if again:
        assert (tmp_path / "scontrol.said").read_text() == "requeue 77\n"
    assert "#SBATCH --time=1:30:00\n" in script and "#SBATCH --signal=TERM@300\n" in script


def test_after_the_last_restart_a_slurm_script_ends(tmp_path):
    script = slurm(Job("a", "c", "w", restarts=2), nodes=1, gpus=1, hours=1)
    (tmp_path / "srun").write_text("#!/bin/sh\nexit 143\n")
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\ntouch {tmp_path}/asked\n")
    for name in ("srun", "scontrol"):
        (tmp_path / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "1",
        "SLURM_RESTART_COUNT": "2",
    }
    assert subprocess.run(["sh", "-c", script], env=environment).returncode == 143
    assert not (tmp_path / "asked").exists()


# --- mistakes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--name=Tiny"], "lower case"),
        (["--name=" + "a" * 41], "at most 40"),
        (["--topology=v5q:4x4"], "chip 'v5q' is unknown"),
        (["--env=A"], "expected KEY=VALUE"),
        (["--env=1=2"], "no name of a variable"),
        (["--config.train.stepz=3"], "stepz"),
        (["--config.model.backbone.layrs=3"], "layrs"),
        (["--config.world.overrides.gird=3"], "gird"),
        (["--workdir=gs://bucket/run"], "mount the bucket"),
    ],
)
def test_mistakes_are_named_before_anything_is_given_away(argv, words):
    base = [*GKE, "--topology=v5e:4x4"]
    with pytest.raises(ConfigError, match=words):
        cli.dispatch(["launch", *base, *argv])


def test_a_start_must_be_longer_than_its_end():
    with pytest.raises(ConfigError, match="shorter than the 300 s"):
        slurm(JOB, nodes=1, gpus=8, hours=0.05)


def test_every_status_of_a_mistake_is_final():
    assert set(FINAL) == {1, 2, 3, 4, 5, 6, 7, 130}


# --- sweeps -----------------------------------------------------------------------------------------------


@pytest.fixture
def plan(tmp_path):
    path = tmp_path / "plan.py"
    path.write_text(
        "from umm_jax.evaluate.sweep import over, product\n\n\ndef get_sweep():\n"
        "    return product(over('run', ['a', 'b']), over('task', ['world-edit', 'world-vqa']))\n"
    )
    return path


def test_each_cell_of_a_sweep_is_a_jobset_of_its_own(plan, capsys, schema):
    words = ["launch", "jobset", f"--sweep={plan}", "--workdir=/mnt/s", "--name=sw", "--image=i"]
    assert cli.main([*words, "--topology=v5e:2x2"]) == 0
    made = list(yaml.safe_load_all(capsys.readouterr().out))
    assert [m["metadata"]["name"] for m in made] == ["sw-0", "sw-1", "sw-2", "sw-3"]
    for k, one in enumerate(made):
        assert holds(one, schema) == []
        pod = one["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
        command = pod["containers"][0]["command"]
        assert command == ["umm", "sweep", str(plan), "--out=/mnt/s", f"--cell={k}"]
    assert cli.main([*words, "--topology=v5e:4x4"]) == 2
    assert "runs on one machine" in capsys.readouterr().err
    assert cli.main([*words, "--topology=v5e:2x2", "--config.seed=3"]) == 2
    assert cli.main(["launch", "jobset", *words[3:], "--topology=v5e:2x2"]) == 2
    assert "--config=FILE" in capsys.readouterr().err


def test_a_sweep_on_slurm_is_an_array_against_fake_commands(plan, capsys, tmp_path):
    words = ["launch", "slurm", f"--sweep={plan}", "--workdir=/mnt/s", "--name=sw"]
    assert cli.main([*words, "--nodes=1", "--gpus=1"]) == 0
    script = capsys.readouterr().out
    assert "#SBATCH --array=0-3\n" in script and "#SBATCH --ntasks-per-node=1\n" in script
    (tmp_path / "srun").write_text(FAKE_SRUN)
    (tmp_path / "srun").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    environment = {"PATH": path, "LOG": str(tmp_path), "STATUS": "0", "SLURM_ARRAY_TASK_ID": "2"}
    assert subprocess.run(["sh", "-c", script], env=environment).returncode == 0
    said = (tmp_path / "srun.said").read_text().splitlines()
    assert said[1:] == ["umm", "sweep", str(plan), "--out=/mnt/s", "--cell=2"]
    assert cli.main([*words, "--nodes=2"]) == 2


def test_a_sweep_on_cloud_tpu_asks_for_a_slice_a_cell(plan, capsys):
    where = ["--project=p", "--zone=z", "--image=i", "--dry-run", "--topology=v6e:2x2"]
    words = ["launch", "queued", f"--sweep={plan}", "--workdir=/mnt/s", "--name=sw", *where]
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    assert said.count("CreateQueuedResource") == 4 and all(f"--cell={k}" in said for k in range(4))
