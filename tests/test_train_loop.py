"""The step and the loop: equal on any mesh and any cut of the batch; the same run however often it dies."""

import functools
import json
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import jobs
import numpy as np
import pytest
import toy_family as toy
from flax import nnx
from test_sharding import on_eight_devices

from umm_jax import config, sharding
from umm_jax.errors import BusyError, ConfigError, DataError, Preempted, UserError
from umm_jax.models.layers import Keys
from umm_jax.train import loop, metrics, state, step
from umm_jax.train.checkpoint import Checkpoints
from umm_jax.train.lock import held
from umm_jax.train.optimizer import flatten

ROOT = Path(__file__).resolve().parent.parent
quick_compiles = pytest.fixture(scope="module", autouse=True)(toy.quick_compiles)
QUIET = toy.ModelConfig(depth=1, noise=False)


@functools.cache
def baseline():
    """Three steps of the plain configuration, which several tests compare with."""
    return run_steps(toy.run_config(), 3)


def run_steps(run, count, model=QUIET):
    """Final state and the metrics of each step."""
    mesh = sharding.make_mesh(run.mesh)
    plan = state.plan(lambda rngs: toy.build(model, rngs), run, mesh)
    function, current, seen = step.make_step(plan, run), state.init(plan, run), []
    loader = toy.Loader(run.data.batch_size)
    for _ in range(count):
        current, found = function(current, sharding.put_batch(next(loader), mesh))
        seen.append(jax.device_get(found))
    return current, seen


def train(run, workdir, **arguments):
    arguments = {"family": toy.FAMILY, "loader": toy.Loader(run.data.batch_size), **arguments}
    return loop.train(run, workdir, **arguments)


def final_state(workdir, step=None):
    run = config.load(Path(workdir) / "config.json")
    plan = state.plan(
        lambda rngs: toy.build(toy.ModelConfig(**run.model), rngs), run, sharding.make_mesh(run.mesh)
    )
    return flatten(
        Checkpoints(Path(workdir) / "checkpoints", read_only=True).restore(plan.abstract, step=step)[0]
    )


def assert_same_bits(a, b):
    assert set(a) == set(b)
    for path in a:
        assert all(map(np.array_equal, jax.tree.leaves(a[path]), jax.tree.leaves(b[path]))), path


MUON = {"groups": [{"match": ["autoencoder"], "optimizer": "frozen"}, {"match": [], "optimizer": "muon"}]}


# --- the step ---------------------------------------------------------------------------------------


def test_one_device_and_eight_give_equal_losses():
    """float32; reductions are summed in another order on 8 devices, so 1e-4 over 20 steps, not bits."""
    sections = {"model": {"noise": True}, "optim": MUON, "train": {"accumulate": 2, "ema": 0.9}}
    out = on_eight_devices(
        """
        import json, sys, jax, toy_family as toy
        from test_train_loop import run_steps
        sections = json.loads(sys.argv[1])
        final, seen = run_steps(toy.run_config(**sections), 20, toy.ModelConfig(depth=2, noise=True))
        assert len(final["params"]["blocks"]["up"]["kernel"].sharding.device_set) == 8
        assert final["params"]["blocks"]["up"]["kernel"].addressable_shards[0].data.shape == (2, 8, 16)
        print(json.dumps([float(s["scalars"]["loss"]) for s in seen]))
        """,
        json.dumps({**sections, "mesh": {"data": 2, "fsdp": 2, "tensor": 2}}),
    )
    eight = json.loads(out.splitlines()[-1])
    _, seen = run_steps(toy.run_config(**sections), 20, toy.ModelConfig(depth=2, noise=True))
    one = [float(s["scalars"]["loss"]) for s in seen]
    np.testing.assert_allclose(eight, one, atol=1e-4)
    assert one[-1] < one[0] - 0.5


@pytest.mark.parametrize("objective", ["model", "autoencoder"])
def test_accumulated_microbatches_are_the_big_batch(objective):
    # Adam divides by the gradient's size: eps keeps rounding of tiny gradients from being magnified.
    optim = {"eps": 1e-2}
    train = {"objective": objective}
    whole, seen = run_steps(toy.run_config(optim=optim, train={"accumulate": 1, **train}), 3)
    parts, seen_parts = run_steps(toy.run_config(optim=optim, train={"accumulate": 4, **train}), 3)
    for one, many in zip(seen, seen_parts):
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many)):
            np.testing.assert_allclose(a, b, rtol=2e-5)
    for path, value in flatten(whole["params"]).items():
        np.testing.assert_allclose(value, flatten(parts["params"])[path], atol=2e-6, err_msg=path)


def test_the_loss_is_the_weighted_sum_of_its_parts():
    run = toy.run_config(train={"loss": {"text": 0.5, "image": 3.0}})
    _, seen = run_steps(run, 1)
    text, image = (
        total / weight for total, weight in (seen[0]["sums"][f"loss/{p}"] for p in ("text", "image"))
    )
    assert seen[0]["scalars"]["loss"] == pytest.approx(0.5 * text + 3.0 * image, rel=1e-6)
    batch = toy.make_batch(8, 0)
    assert seen[0]["counts"] == {
        axis: int((batch[axis]["segment_ids"] > 0).sum()) for axis in ("tokens", "images")
    }


def test_bfloat16_computes_in_half_and_keeps_parameters_whole():
    _, seen = baseline()
    half, seen_half = run_steps(toy.run_config(train={"dtype": "bfloat16"}), 3)
    assert all(leaf.dtype == jnp.float32 for leaf in flatten(half["params"]).values())
    losses = [[float(s["scalars"]["loss"]) for s in run] for run in (seen, seen_half)]
    np.testing.assert_allclose(*losses, rtol=0.02)
    assert losses[0] != losses[1]


def test_frozen_parameters_stay_and_averages_follow():
    groups = [{"match": ["autoencoder"], "optimizer": "frozen"}, {"match": []}]
    run = toy.run_config(optim={"groups": groups}, train={"ema": 0.75})
    mesh = sharding.make_mesh(run.mesh)
    start = state.init(state.plan(lambda rngs: toy.build(QUIET, rngs), run, mesh), run)
    first, _ = run_steps(run, 1)
    before, after = flatten(start["params"]), flatten(first["params"])
    for path in before:
        assert np.array_equal(before[path], after[path]) == path.startswith("autoencoder"), path
    for path, average in flatten(first["ema"]).items():
        np.testing.assert_allclose(average, 0.75 * before[path] + 0.25 * after[path], atol=1e-6)
    assert not any("autoencoder" in path for path in flatten(first["ema"]))


def test_misfits_are_named():
    with pytest.raises(ConfigError, match="batch_size=6 does not divide into train.accumulate=4.*; 4 would"):
        run_steps(toy.run_config(data={"batch_size": 6}, train={"accumulate": 4}), 1)
    with pytest.raises(
        ConfigError, match=r"the model has the parts \['image', 'text'\]; did you mean 'text'"
    ):
        run_steps(toy.run_config(train={"loss": {"test": 1.0, "image": 1.0}}), 1)


def test_keys_are_those_of_nnx():
    keys, rngs = Keys(3), nnx.Rngs(3)
    for _ in range(3):
        assert jnp.array_equal(jax.random.key_data(keys.params()), jax.random.key_data(rngs.params()))


# --- the loop ---------------------------------------------------------------------------------------


def test_a_run_writes_what_it_says(tmp_path):
    asked = []

    def on_eval(at, params):
        asked.append((at, float(params["head"]["bias"].sum())))
        return {"score": at / 10}

    run = toy.run_config(train={"steps": 5, "log_every": 2, "save_every": 2, "eval_every": 4})
    result = train(run, tmp_path, on_eval=on_eval)
    assert result["step"] == 5
    assert config.load(tmp_path / "config.json") == run
    assert [at for at, _ in asked] == [4, 5]
    lines = metrics.read_metrics(tmp_path / "metrics.jsonl")
    assert [(x["kind"], x["step"]) for x in lines] == [
        ("run", 0), ("train", 2), ("train", 4), ("eval", 4), ("train", 5), ("eval", 5)
    ]  # fmt: skip
    line = lines[1]
    assert {"loss", "loss/text", "loss/image", "accuracy", "lr", "grad_norm", "seconds_per_step"} <= set(line)
    assert 0 <= line["input_wait"] <= 1 and line["tokens_per_second"] > 0
    batches = [toy.make_batch(8, i) for i in range(2)]
    assert line["tokens"] == sum(int((b["tokens"]["segment_ids"] > 0).sum()) for b in batches)
    assert lines[3]["eval/score"] == 0.4
    assert Checkpoints(tmp_path / "checkpoints", read_only=True).steps() == [4, 5]
    assert train(run, tmp_path)["seconds"] == 0.0  # nothing left to do

    # A run keeps its config; only its length and rhythm may change.
    with pytest.raises(ConfigError, match="optim.lr: 0.01 != 0.5"):
        train(toy.run_config(optim={"lr": 0.5}, train={"steps": 5}), tmp_path)
    longer = toy.run_config(train={"steps": 7, "log_every": 1, "save_every": 50})
    assert train(longer, tmp_path)["step"] == 7
    assert config.load(tmp_path / "config.json") == longer


KILLED = """
import os, signal, sys, toy_family as toy
from test_train_loop import KILL_RUN, train

class Loader(toy.Loader):
    def __next__(self):
        if self.next == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__next__()

train(KILL_RUN, sys.argv[1], loader=Loader(KILL_RUN.data.batch_size))
"""
KILL_RUN = toy.run_config(
    model={"depth": 1}, train={"steps": 12, "save_every": 3, "log_every": 1, "ema": 0.9}
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    train(KILL_RUN, folder)
    return folder


def test_killed_three_times_a_run_ends_with_the_same_bits(tmp_path, whole):
    kills = sorted(random.SystemRandom().sample(range(1, 12), 3))
    environment = {
        **jobs.environment(),
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    for at in (*kills, -1):
        command = [sys.executable, "-c", KILLED, str(tmp_path / "killed"), str(at)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == (0 if at == -1 else -signal.SIGKILL), (kills, done.stderr[-2000:])
    assert_same_bits(final_state(tmp_path / "killed"), final_state(whole))
    lines, wanted = (metrics.read_metrics(p / "metrics.jsonl") for p in (tmp_path / "killed", whole))
    losses, wanted = (
        [(x["step"], x["loss"]) for x in log if x["kind"] == "train"] for log in (lines, wanted)
    )
    assert losses == wanted, kills


def test_sigterm_saves_and_says_how_to_go_on(tmp_path, whole):
    class Terminated(toy.Loader):
        def __next__(self):
            if self.next == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__next__()

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted, match="stopped at step .*run the same command again") as caught:
        train(KILL_RUN, tmp_path / "stopped", loader=Terminated(8))
    assert caught.value.exit_status == 143
    assert signal.getsignal(signal.SIGTERM) == before
    latest = Checkpoints(tmp_path / "stopped" / "checkpoints", read_only=True).latest()
    assert latest == 3  # the step that was running was finished
    train(KILL_RUN, tmp_path / "stopped")
    assert_same_bits(final_state(tmp_path / "stopped"), final_state(whole))


def test_nan_stops_the_run_names_the_step_and_saves_nothing_after_it(tmp_path):
    class Broken(toy.Loader):
        def __next__(self):
            batch = super().__next__()
            if self.next == 5:
                batch["images"]["pixels"][:] = np.nan
            return batch

    run = toy.run_config(model={"depth": 1}, train={"steps": 9, "log_every": 4, "save_every": 3})
    with pytest.raises(UserError, match="loss is nan at step 5"):
        train(run, tmp_path, loader=Broken(8))
    assert Checkpoints(tmp_path / "checkpoints", read_only=True).latest() == 3


def test_an_error_of_the_loader_passes_and_saves_are_completed(tmp_path):
    class Ends(toy.Loader):
        def __next__(self):
            if self.next == 3:
                raise DataError("shard 2 is broken")
            return super().__next__()

    threads = threading.active_count()
    run = toy.run_config(model={"depth": 1}, train={"save_every": 3, "steps": 9})
    with pytest.raises(DataError, match="shard 2"):
        train(run, tmp_path, loader=Ends(8))
    assert Checkpoints(tmp_path / "checkpoints", read_only=True).latest() == 3
    assert threading.active_count() <= threads + 4


def test_a_first_attempt_that_failed_leaves_the_folder_free(tmp_path):
    base = {"model": {"depth": 1}}
    wrong = toy.run_config(**base, optim={"groups": [{"match": ["embed"]}]}, train={"steps": 1})
    with pytest.raises(ConfigError, match="no group of optim.groups matches"):
        train(wrong, tmp_path)
    assert train(toy.run_config(**base, train={"steps": 1}), tmp_path)["step"] == 1
    with pytest.raises(ConfigError, match="mount the bucket"):
        train(wrong, "gs://bucket/run")


def test_the_autoencoder_is_trained_alone_and_then_taken_over(tmp_path):
    base = {"model": {"depth": 1}}
    first = toy.run_config(**base, train={"objective": "autoencoder", "steps": 3, "log_every": 1})
    train(first, tmp_path / "autoencoder")
    mesh = sharding.make_mesh(first.mesh)
    model = toy.ModelConfig(depth=1)
    start = state.init(state.plan(lambda rngs: toy.build(model, rngs), first, mesh), first)
    trained, before = final_state(tmp_path / "autoencoder"), flatten(start["params"])
    for path, value in before.items():
        assert np.array_equal(value, trained[f"params/{path}"]) != path.startswith("autoencoder"), path
    losses = [x["loss"] for x in metrics.read_metrics(tmp_path / "autoencoder" / "metrics.jsonl")[1:]]
    assert losses[-1] < losses[0]

    groups = {"groups": [{"match": ["autoencoder"], "optimizer": "frozen"}, {"match": []}]}
    train_fields = {"steps": 1, "seed": 5, "init_from": str(tmp_path / "autoencoder")}
    second = toy.run_config(**base, optim={**groups, "lr": 0.0}, train=train_fields)
    train(second, tmp_path / "model")
    fresh = state.init(state.plan(lambda rngs: toy.build(model, rngs), second, mesh), second)
    found = final_state(tmp_path / "model")
    for path, value in flatten(fresh["params"]).items():
        wanted = trained[f"params/{path}"] if path.startswith("autoencoder") else value
        assert np.array_equal(found[f"params/{path}"], wanted), path


def test_metrics_of_steps_done_again_appear_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2, "kind": "train"}\n{"step": 4, "kind": "train"}\n{"step": 6, "ki')
    log = metrics.MetricsFile(path, step=3)
    log.write(4, "train", {"loss": 1.0})
    log.close()
    assert [(x["step"], x.get("loss")) for x in metrics.read_metrics(path)] == [(2, None), (4, 1.0)]


def test_the_progress_line_is_live_on_a_terminal_only(capsys):
    class Terminal:
        def __init__(self, live):
            self.live, self.text = live, ""

        def isatty(self):
            return self.live

        def write(self, text):
            self.text += text

        def flush(self):
            pass

    for live in (True, False):
        stream = Terminal(live)
        progress = metrics.Progress(0, 10, stream)
        progress.step(5)
        assert ("\r" in stream.text and "5/10" in stream.text and "ETA" in stream.text) == live
        progress.log(5, {"loss": 1.5, "seconds_per_step": 0.1})
        assert ("step 5/10  loss 1.5000" in stream.text) != live


TWO_PROCESSES = """
import os, signal, sys, jax
port, process, folder, stop = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4] == "stop"
jax.distributed.initialize(f"localhost:{port}", 2, process)
import toy_family as toy
from test_train_loop import TWO_RUN, train
from umm_jax.errors import Interrupted

class Share(toy.Loader):
    def __next__(self):
        if stop and process == 1 and self.next == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return jax.tree.map(lambda rows: rows[4 * process : 4 * process + 4], super().__next__())

try:
    train(TWO_RUN, folder, loader=Share(8))
    print("finished")
except Interrupted:
    print("interrupted")
"""
TWO_RUN = toy.run_config(
    model={"noise": False},
    mesh={"data": 2, "fsdp": 2, "tensor": 2},
    train={"steps": 20, "save_every": 8, "log_every": 2, "accumulate": 2},
)


@pytest.mark.slow
def test_two_processes_of_four_devices_stop_together_go_on_and_equal_one_device(tmp_path):
    for mode, word in (("stop", "interrupted"), ("go", "finished")):
        assert all(word in out for out in jobs.two_processes(TWO_PROCESSES, str(tmp_path), mode))
    log = [x for x in metrics.read_metrics(tmp_path / "metrics.jsonl") if x["kind"] == "train"]
    assert [x["step"] for x in log] == list(range(2, 21, 2))
    one = toy.run_config(train={"accumulate": 2})
    _, seen = run_steps(one, 20, toy.ModelConfig(noise=False))
    losses = np.reshape([float(s["scalars"]["loss"]) for s in seen], (10, 2)).mean(1)
    np.testing.assert_allclose([x["loss"] for x in log], losses, atol=1e-4)


def test_a_folder_in_which_another_job_trains_is_refused(tmp_path):
    run = toy.run_config(train={"steps": 2})
    with held(tmp_path), pytest.raises(BusyError, match="another job"):
        train(run, tmp_path)
    train(run, tmp_path)
    assert not (tmp_path / "run.lock").exists() and Checkpoints(tmp_path / "checkpoints").latest() == 2
