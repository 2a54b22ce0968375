"""Shards by an Apache Beam pipeline: the same bytes, also after a kill. `make test-beam` installs Beam."""

import functools
import importlib.util
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from umm_jax import cli
from umm_jax.data import beam_runner
from umm_jax.data.making import Made, make_records
from umm_jax.data.quarantine import Tally
from umm_jax.data.synthesis.synthesizer import Synthesizer
from umm_jax.errors import DataError
from umm_jax.world.dialogue import sample_dialogue
from umm_jax.world.scene import WorldConfig

HERE = Path(__file__).parent
beam = pytest.mark.skipif(
    importlib.util.find_spec("apache_beam") is None, reason="Apache Beam is not installed: make test-beam"
)
WORLD = functools.partial(sample_dialogue, WorldConfig.preset("tiny"), 0)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def one_by_one(make, jobs) -> None:
    """What a pipeline does with each element, twice: a runner may do work again that it has done."""
    for job in jobs:
        beam_runner._write(job, make)
        beam_runner._write(job, make)


def broken(index: int):
    if index == 3:
        raise DataError("record 3: mend it")
    return WORLD(index)


def refused(index: int):
    tally = Tally()
    if index % 2:
        return Made(WORLD(index), tally)
    tally.count("left out", "even")
    return Made(None, tally)


@pytest.mark.parametrize("make", [WORLD, refused])
def test_shards_written_apart_are_the_same(tmp_path, make):
    plain = make_records(make, 20, tmp_path / "plain", how={}, shards=3)
    apart = make_records(make, 20, tmp_path / "apart", how={}, shards=3, runner=one_by_one)
    assert files(tmp_path / "plain") == files(tmp_path / "apart")
    assert len(plain) == len(apart) > 0


def test_a_runner_goes_on_where_another_stopped(tmp_path):
    def stops(make, jobs) -> None:
        one_by_one(make, jobs[:1])
        (tmp_path / "cut" / "data-00002-of-00003.array_record.x.part").mkdir()  # as a kill leaves it
        raise KeyboardInterrupt

    with pytest.raises(Exception, match="stopped with 1 of 3 shards"):
        make_records(WORLD, 20, tmp_path / "cut", how={}, shards=3, runner=stops)
    asked = []
    make_records(
        WORLD, 20, tmp_path / "cut", how={}, shards=3, runner=lambda m, j: (asked.extend(j), one_by_one(m, j))
    )
    make_records(WORLD, 20, tmp_path / "plain", how={}, shards=3)
    assert len(asked) == 2 and files(tmp_path / "cut") == files(tmp_path / "plain")


@pytest.mark.skipif(importlib.util.find_spec("apache_beam") is not None, reason="Apache Beam is installed")
def test_without_beam_one_is_told_how_to_get_it(tmp_path, capsys):
    status = cli.main(["data", "synthesize", "--count=2", f"--out={tmp_path / 'x'}", "--beam"])
    assert status == 2 and "python -m venv .beam" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@beam
@pytest.mark.parametrize(
    "options", [[], ["--direct_running_mode=multi_processing", "--direct_num_workers=2"]]
)
def test_a_pipeline_writes_the_same_bytes(tmp_path, options):
    make_records(WORLD, 60, tmp_path / "world", how={}, shards=4)
    make = Synthesizer([tmp_path / "world"])
    made = [
        make_records(make, 60, tmp_path / name, how=make.recipe(), shards=5, runner=runner, workers=2)
        for name, runner in (("plain", None), ("beam", beam_runner.BeamRunner(options)))
    ]
    assert files(tmp_path / "plain") == files(tmp_path / "beam") and len(made[1]) > 40


@beam
def test_an_error_of_a_record_is_told_as_such(tmp_path):
    runner = beam_runner.BeamRunner()
    with pytest.raises(DataError, match="record 3: mend it"):
        make_records(broken, 8, tmp_path / "x", how={}, shards=4, runner=runner)
    assert not [path for path in (tmp_path / "x").iterdir() if path.suffix in (".part", ".failed")]
    make_records(WORLD, 8, tmp_path / "x", how={}, shards=4, runner=runner)
    make_records(WORLD, 8, tmp_path / "plain", how={}, shards=4)
    assert files(tmp_path / "x") == files(tmp_path / "plain")


@beam
def test_killed_and_run_again(tmp_path):
    command = [sys.executable, "-m", "umm_jax.cli", "data", "synthesize", "--preset=tiny", "--count=1200"]
    command += ["--shards=24", f"--out={tmp_path / 'x'}", "--beam"]
    process = subprocess.Popen(command, cwd=HERE.parent)
    while process.poll() is None and len(list((tmp_path / "x").glob("*.array_record"))) < 5:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "x" / "manifest.json").exists(), "it was over before it could be killed"
    subprocess.run(command, cwd=HERE.parent, check=True)
    subprocess.run(
        [word.replace(str(tmp_path / "x"), str(tmp_path / "plain")) for word in command if word != "--beam"],
        cwd=HERE.parent,
        check=True,
    )
    assert files(tmp_path / "x") == files(tmp_path / "plain")
