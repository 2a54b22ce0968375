"""What a run does when a step goes wrong, when a disk refuses, and which checkpoints stay."""

import json
import math
import os
import signal

import jax
import numpy as np
import pytest
import toy_family as toy
from test_train_loop import assert_same_bits, final_state, train

from umm_jax import families
from umm_jax.errors import CheckpointError, ConfigError, StorageError, UserError
from umm_jax.train import anomalies, checkpoint, metrics
from umm_jax.train.anomalies import FEWEST, PATIENCE, Watch
from umm_jax.train.checkpoint import Checkpoints

quick_compiles = pytest.fixture(scope="module", autouse=True)(toy.quick_compiles)


class Broken(toy.Loader):
    """Its batches of some steps have pixels that are no numbers."""

    def __init__(self, *bad, value=np.nan):
        super().__init__(8)
        self.bad, self.value = bad, value

    def __next__(self):
        batch = super().__next__()
        if self.next in self.bad:
            batch["images"]["pixels"][3] = self.value
        return batch


class Without(toy.Loader):
    """The toy's batches without some of them."""

    def __init__(self, *left_out):
        super().__init__(8)
        self.left_out = left_out

    def __next__(self):
        batch = super().__next__()
        while self.next in self.left_out:
            batch = super().__next__()
        return batch


def run(**options):
    # No noise, and one rate: a step is told by its batch and the state alone.
    return toy.run_config(
        model={"depth": 1, "noise": False},
        optim={"schedule": "constant", "warmup": 0},
        train={"steps": 8, "log_every": 4, "save_every": 3, **options},
    )


def lines(folder, kind):
    return [line for line in metrics.read_metrics(folder / "metrics.jsonl") if line["kind"] == kind]


# --- the policies ---------------------------------------------------------------------------------------


def test_stop_keeps_the_batch_and_replay_finds_the_row(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="loss is nan at step 5.*step-5-0.npz, see umm replay"):
        train(run(), tmp_path, loader=Broken(5))
    assert Checkpoints(tmp_path / "checkpoints", read_only=True).latest() == 3
    about, batch = anomalies.read(tmp_path / "anomalies" / "step-5-0.npz")
    assert about["step"] == 5 and "nan" in about["why"]
    loader = Broken(5)
    wanted = [next(loader) for _ in range(5)][-1]
    jax.tree.map(np.testing.assert_array_equal, batch, wanted)
    assert [line["policy"] for line in lines(tmp_path, "anomaly")] == ["stop"]
    monkeypatch.setattr(families, "get", lambda name: toy.FAMILY)
    before, rows = anomalies.replay(tmp_path, 5)
    assert before == 3
    # A row without images has no such part.
    assert [row["row"] for row in rows if row["image"] is not None and math.isnan(row["image"])] == [3]
    assert all(math.isfinite(row["text"]) for row in rows)
    with pytest.raises(CheckpointError, match=r"no batch was kept of step 4; there are \[5\]"):
        anomalies.replay(tmp_path, 4)


def test_a_skipped_step_changes_nothing_but_the_count(tmp_path, capsys):
    train(run(anomaly="skip"), tmp_path / "skips", loader=Broken(5, 6))
    assert "skipped   loss is nan at step 5" in capsys.readouterr().err
    train(run(steps=6), tmp_path / "without", loader=Without(5, 6))
    skips, without = final_state(tmp_path / "skips"), final_state(tmp_path / "without")
    assert int(skips.pop("step")) == 8 and int(without.pop("step")) == 6
    assert_same_bits(skips, without)
    found = lines(tmp_path / "skips", "train")
    assert [line["skipped"] for line in found] == [0, 2] and all(math.isfinite(x["loss"]) for x in found)
    assert sorted(p.name for p in (tmp_path / "skips" / "anomalies").iterdir()) == [
        "step-5-0.npz",
        "step-6-0.npz",
    ]


def test_rolled_back_a_run_goes_on_with_the_data_after_it(tmp_path, capsys):
    ends = train(run(anomaly="rollback"), tmp_path / "back", loader=Broken(5))
    assert ends["step"] == 8
    # Step 5 is judged when step 7 has begun, or, here, when the run saves at step 6: what follows is the
    # batch after the last that was drawn.
    back = lines(tmp_path / "back", "anomaly")
    assert [(line["step"], line["back"]) for line in back] == [(3, 3)]
    assert "back      to step 3" in capsys.readouterr().err
    train(run(), tmp_path / "without", loader=Without(4, 5, 6))
    assert_same_bits(final_state(tmp_path / "back"), final_state(tmp_path / "without"))
    assert [line["step"] for line in lines(tmp_path / "back", "train")] == [4, 8]
    assert lines(tmp_path / "back", "train")[-1]["goodput"] < 1


def test_back_to_nothing_stops(tmp_path):
    with pytest.raises(UserError, match="loss is nan at step 2, and there is no checkpoint to go back to"):
        train(run(anomaly="rollback"), tmp_path, loader=Broken(2))


def test_nothing_but_wrong_steps_stop_a_run_that_skips(tmp_path):
    with pytest.raises(UserError, match=f"and {PATIENCE - 1} steps before it were wrong"):
        train(run(anomaly="skip", steps=60), tmp_path, loader=Broken(*range(1, 60)))
    assert len(list((tmp_path / "anomalies").iterdir())) == anomalies.DUMPS


def test_a_spike_is_skipped_and_known_again_after_a_resume(tmp_path):
    at = FEWEST + 8
    options = dict(anomaly="skip", spike=20.0, log_every=5, steps=at + 4, save_every=at - 3)
    train(run(**options), tmp_path / "whole", loader=Broken(at, value=1e3))
    found = lines(tmp_path / "whole", "anomaly")
    assert len(found) == 1 and f"at step {at} is above" in found[0]["why"]
    # The run that stops between, and logs otherwise, decides the same: the losses go with the checkpoint.
    train(run(**options | {"steps": at - 3}), tmp_path / "parts", loader=Broken(at, value=1e3))
    train(run(**options | {"log_every": 1}), tmp_path / "parts", loader=Broken(at, value=1e3))
    assert_same_bits(final_state(tmp_path / "whole"), final_state(tmp_path / "parts"))


def test_a_limit_needs_steps_and_is_not_moved_by_a_spike():
    watch = Watch("stop", 6.0, 2)
    rng = np.random.default_rng(0)
    for step in range(1, 101):
        assert (watch.limit(step) == math.inf) == (step - 1 - 2 < FEWEST)
        assert watch.judge(step, 1 + 0.1 * rng.standard_normal(), 1.0) is None
    limit = watch.limit(101)
    assert 1.4 < limit < 1.8
    assert "above" in watch.judge(101, 2.0, 1.0) and watch.limit(104) == pytest.approx(limit, abs=0.05)
    assert "grad_norm is inf" in watch.judge(102, 1.0, math.inf)
    assert Watch("stop", 6.0, 2, json.loads(json.dumps(watch.history()))).limit(103) == watch.limit(103)


# --- disks, retention, signals, profiles -----------------------------------------------------------------


def test_a_disk_that_refuses_costs_a_checkpoint_and_not_the_run(tmp_path, monkeypatch, capsys):
    asked = []
    whole = checkpoint.Checkpoints._check_room

    def full(self, state):
        asked.append(int(state["step"]))
        if len(asked) == 2:
            raise StorageError("no room for step 6")
        whole(self, state)

    monkeypatch.setattr(checkpoint.Checkpoints, "_check_room", full)
    train(run(steps=10, keep=9), tmp_path, loader=toy.Loader(8))
    assert asked == [3, 6, 9, 10]
    assert Checkpoints(tmp_path / "checkpoints", read_only=True).steps() == [3, 9, 10]
    assert [line["step"] for line in lines(tmp_path, "alarm")] == [6]
    assert "ALARM     no room for step 6" in capsys.readouterr().err


def test_a_save_that_fails_in_the_background_does_not_cost_the_next(tmp_path, monkeypatch):
    whole, count = checkpoint.Checkpoints.wait, 0

    def wait(self):
        nonlocal count
        whole(self)
        count += 1
        if count == 5:  # the loop's and the save's own, for steps 3 and 6; then the loop's for step 9
            raise StorageError("step 6 was not saved")

    monkeypatch.setattr(checkpoint.Checkpoints, "wait", wait)
    train(run(steps=10, keep=9), tmp_path, loader=toy.Loader(8))
    assert Checkpoints(tmp_path / "checkpoints", read_only=True).steps() == [3, 6, 9, 10]
    assert [line["step"] for line in lines(tmp_path, "alarm")] == [9]


def test_recent_periodic_and_best_checkpoints_stay(tmp_path):
    # Least at step 3; the second best at 6.
    score = {1: 5.0, 2: 4.0, 3: 0.5, 4: 4.0, 5: 2.5, 6: 2.0, 7: 3.0, 8: 4.0, 9: 5.0}
    options = dict(steps=9, save_every=1, eval_every=1, keep=2, keep_every=4, keep_best="-error 2")
    train(run(**options), tmp_path, loader=toy.Loader(8), on_eval=lambda step, _: {"error": score[step]})
    assert Checkpoints(tmp_path / "checkpoints", read_only=True).steps() == [3, 4, 6, 8, 9]


@pytest.mark.parametrize(
    "options, words",
    [
        ({"keep_best": "turns"}, "a name and a number"),
        ({"spike": -1.0}, "spike must be positive"),
        ({"profile": "7"}, "expected steps such as"),
        ({"anomaly": "ignore"}, "anomaly"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        run(**options)


def test_utilisation_is_told_of_real_tokens(tmp_path):
    asked = []

    def ideal(run, devices):
        asked.append(devices)
        return 1e-3

    options = run()
    train(options, tmp_path, loader=toy.Loader(8), ideal=ideal)
    assert asked == [1]
    slots = 4 * options.data.batch_size * options.data.tokens
    for line in lines(tmp_path, "train"):
        assert line["mfu"] == pytest.approx(1e-3 / line["seconds_per_step"] * line["tokens"] / slots)


def test_profiles_are_written_of_the_steps_asked_for_and_at_a_signal(tmp_path, capsys):
    class Asks(toy.Loader):
        def __next__(self):
            if self.next == 5:
                os.kill(os.getpid(), signal.SIGUSR1)
            return super().__next__()

    before = signal.getsignal(signal.SIGUSR1)
    train(run(profile="2:4", steps=14), tmp_path, loader=Asks(8))
    said = capsys.readouterr().err
    assert "profile   of steps 2 to 3 in" in said and "profile   of steps 6 to 10 in" in said
    found = sorted((tmp_path / "profile").rglob("*.xplane.pb"))
    assert [path.relative_to(tmp_path).parts[1] for path in found] == ["steps-2-3", "steps-6-10"]
    assert signal.getsignal(signal.SIGUSR1) == before
