"""What keeps a run from another job and from waiting for ever: the lock of its folder, and the watchdog."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest

from umm_jax.errors import BusyError
from umm_jax.train import lock as locks
from umm_jax.train import watchdog as watchdogs
from umm_jax.train.lock import NAME, held
from umm_jax.train.metrics import MetricsFile
from umm_jax.train.watchdog import HUNG, Watchdog

FAST = dict(beat=0.05, patience=4)


# --- the lock --------------------------------------------------------------------------------------------


def test_one_job_at_a_time(tmp_path):
    run = tmp_path / "run"
    with held(run, **FAST):
        with pytest.raises(BusyError, match="another job .*choose another folder"), held(run, **FAST):
            pass
        assert (run / NAME).exists()
    assert not run.exists()  # nothing was written to it
    with held(run, **FAST):
        (run / "config.json").write_text("{}")
    assert [p.name for p in run.iterdir()] == ["config.json"]


def test_what_a_killed_job_left_is_taken_over_at_once(tmp_path):
    program = f"""
import os, signal
from pathlib import Path
from umm_jax.train.lock import held
with held(Path({str(tmp_path)!r})):
    print("mine", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "mine\n" and (tmp_path / NAME).exists()
    began = time.monotonic()
    with held(tmp_path, beat=30.0, patience=4):
        assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()
    assert time.monotonic() - began < 5


def test_a_pid_that_was_given_again_is_not_the_job(tmp_path):
    said = {"job": "old", "host": locks.socket.gethostname(), "pid": os.getpid(), "born": "1", "beats": 3}
    (tmp_path / NAME).write_text(json.dumps(said))
    if not locks.born(os.getpid()):
        pytest.skip("this system does not say when a process began")
    with held(tmp_path, **FAST):
        pass


@pytest.mark.parametrize(
    "text", ['{"job": "x", "host": "far", "pid": 1, "born": "", "beats": 7}', '{"job": "x', ""]
)
def test_another_machines_is_taken_over_when_it_does_not_beat(tmp_path, text, capsys):
    (tmp_path / NAME).write_text(text)
    began = time.monotonic()
    with held(tmp_path, **FAST) as lock:
        assert time.monotonic() - began >= 0.2
        lock.check()
    assert "waiting whether it beats" in capsys.readouterr().err


def test_another_machines_that_beats_is_left_alone(tmp_path):
    stop = threading.Event()

    def far():
        for beats in range(1000):
            said = json.dumps({"job": "x", "host": "far", "pid": 1, "born": "", "beats": beats})
            fresh = tmp_path / "fresh"
            fresh.write_text(said)
            os.replace(fresh, tmp_path / NAME)
            if stop.wait(0.03):
                return

    thread = threading.Thread(target=far)
    thread.start()
    try:
        while not (tmp_path / NAME).exists():
            time.sleep(0.01)
        with pytest.raises(BusyError, match="pid 1 on far"), held(tmp_path, **FAST):
            pass
    finally:
        stop.set()
        thread.join()


def test_whoever_was_taken_over_finds_out_and_leaves_the_others_lock(tmp_path):
    with held(tmp_path, **FAST) as lock:
        other = json.dumps({"job": "other", "host": "far", "pid": 1, "born": "", "beats": 0})
        (tmp_path / NAME).write_text(other)
        assert lock.lost.wait(5)
        with pytest.raises(BusyError, match="taken this run over"):
            lock.check()
    assert (tmp_path / NAME).read_text() == other


def test_a_lock_that_cannot_be_read_for_a_moment_is_not_lost(tmp_path):
    with held(tmp_path, **FAST) as lock:
        beats = lock._beats
        (tmp_path / NAME).write_text('{"job": "ano')
        while lock._beats < beats + 2:
            time.sleep(0.01)
        lock.check()
        assert json.loads((tmp_path / NAME).read_text())["job"] == lock.job


def test_of_many_at_once_one_gets_it(tmp_path):
    dead = {"job": "old", "host": locks.socket.gethostname(), "pid": 2**22 + 1, "born": "", "beats": 0}
    (tmp_path / NAME).write_text(json.dumps(dead))
    got, refused, start, all_tried = [], [], threading.Barrier(6), threading.Event()

    def work():
        start.wait()
        try:
            with held(tmp_path, **FAST):
                got.append(1)
                all_tried.wait(10)
        except BusyError:
            refused.append(1)
        if len(refused) >= 5:
            all_tried.set()

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1 and len(refused) == 5


# --- the watchdog ------------------------------------------------------------------------------------------


def test_a_hang_is_noticed_and_told_with_every_thread(tmp_path, capsys):
    bitten = threading.Event()
    dog = Watchdog(0.2, tmp_path, bite=bitten.set)
    dog.alive("step 7")

    def waits_for_ever():
        bitten.wait(10)

    thread = threading.Thread(target=waits_for_ever)
    thread.start()
    assert bitten.wait(10)
    thread.join()
    dog.close()
    text = (tmp_path / "stacks-0.txt").read_text()
    assert "waiting for step 7" in text and "waits_for_ever" in text
    assert f"status {HUNG}" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["a folder that is gone", "a disk that never answers"])
def test_a_hang_of_the_disk_itself_ends_the_run_all_the_same(tmp_path, capsys, monkeypatch, kind):
    monkeypatch.setattr(watchdogs, "PATIENCE", 0.3)
    bitten, folder = threading.Event(), tmp_path / "gone"
    if kind == "a disk that never answers":
        folder.mkdir()
        os.mkfifo(folder / "stacks-0.txt")  # opening it waits for a reader
    dog = Watchdog(0.2, folder, bite=bitten.set)
    assert bitten.wait(10) and f"status {HUNG}" in capsys.readouterr().err
    if kind == "a disk that never answers":
        (folder / "stacks-0.txt").read_text()
    dog.close()


def test_a_line_of_metrics_that_the_disk_refuses_costs_the_line(tmp_path, capsys):
    log = MetricsFile(tmp_path / "metrics.jsonl", 0)
    log._file = open("/dev/full", "w", buffering=1)
    log.write(3, "train", {"loss": 1.5})
    log.close()
    said = capsys.readouterr().err
    assert said.startswith("ALARM") and "No space left" in said and '"loss": 1.5' in said


def test_what_is_alive_or_paused_is_let_be(tmp_path):
    bitten = threading.Event()
    dog = Watchdog(0.3, tmp_path, bite=bitten.set)
    for step in range(8):
        time.sleep(0.1)
        dog.alive(f"step {step}")
    with dog.paused():
        time.sleep(0.7)
    time.sleep(0.1)
    dog.close()
    assert not bitten.is_set() and not list(tmp_path.iterdir())


def test_a_process_that_hangs_ends_with_its_own_status(tmp_path):
    program = f"""
import time
from pathlib import Path
from umm_jax.train.watchdog import Watchdog
Watchdog(0.2, Path({str(tmp_path)!r}))
time.sleep(60)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert done.returncode == HUNG and "watchdog" in done.stderr
