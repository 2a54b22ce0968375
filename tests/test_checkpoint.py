"""What is saved comes back, on this mesh or another; what cannot be saved harms nothing."""

import collections
import resource
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import toy_family as toy
from test_sharding import on_eight_devices

from umm_jax import sharding
from umm_jax.errors import CheckpointError, StorageError
from umm_jax.train import checkpoint, state
from umm_jax.train.checkpoint import Checkpoints, plain_config
from umm_jax.train.optimizer import flatten

RUN = toy.run_config(train={"ema": 0.9})
MODEL = toy.ModelConfig()
IDENTITY = plain_config(RUN, MODEL)


def make_plan(run=RUN, model=MODEL):
    mesh = sharding.make_mesh(run.mesh, jax.devices()[:1])
    return state.plan(lambda rngs: toy.build(model, rngs), run, mesh)


quick_compiles = pytest.fixture(scope="module", autouse=True)(toy.quick_compiles)


@pytest.fixture(scope="module")
def plan():
    return make_plan()


@pytest.fixture(scope="module")
def saved(plan):
    """A state in which no two arrays are alike."""
    fresh = state.init(plan, RUN)
    leaves, tree = jax.tree.flatten(fresh)
    return jax.tree.unflatten(tree, [a + np.asarray(i, a.dtype) for i, a in enumerate(leaves)])


def same(a, b):
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: bool(np.array_equal(x, y)), a, b)))


def test_the_abstract_state_is_the_state(plan):
    real = state.init(plan, RUN)
    assert jax.tree.structure(real) == jax.tree.structure(plan.abstract)
    for a, b in zip(jax.tree.leaves(real), jax.tree.leaves(plan.abstract)):
        assert (a.shape, a.dtype, a.sharding) == (b.shape, b.dtype, b.sharding)


def test_save_and_restore_give_the_same_bits(tmp_path, plan, saved):
    position = {"next": 7, "rows": [[1, 2], [3]], "note": "ü"}
    with_writer = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        with_writer.save(step, saved, position, IDENTITY)
    with_writer.close()
    reader = Checkpoints(tmp_path, read_only=True)
    assert reader.steps() == [2, 3] and reader.latest() == 3
    restored, found = reader.restore(plan.abstract, IDENTITY)
    assert found == position
    assert jax.tree.structure(restored) == jax.tree.structure(saved) and same(restored, saved)


def test_half_written_checkpoints_are_invisible_and_tidied_by_the_next_writer(tmp_path, plan, saved):
    writer = Checkpoints(tmp_path)
    writer.save(1, saved, {}, IDENTITY)
    writer.close()
    (tmp_path / "2.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    assert Checkpoints(tmp_path, read_only=True).steps() == [1]
    assert (tmp_path / "2.orbax-checkpoint-tmp").exists()
    again = Checkpoints(tmp_path)
    assert again.steps() == [1] and not (tmp_path / "2.orbax-checkpoint-tmp").exists()
    again.save(2, saved, {}, IDENTITY)
    again.close()
    assert Checkpoints(tmp_path, read_only=True).steps() == [1, 2]


def test_parameters_alone_raw_or_averaged_or_matching(tmp_path, plan, saved):
    writer = Checkpoints(tmp_path)
    writer.save(1, saved, {}, IDENTITY)
    writer.close()
    reader = Checkpoints(tmp_path, read_only=True)
    params = plan.abstract["params"]
    assert same(reader.restore_params(params, IDENTITY), saved["params"])
    averaged = reader.restore_params(params, IDENTITY, weights="ema")
    assert same(averaged, saved["ema"]) and same(averaged, state.eval_params(saved, "ema"))
    assert not same(averaged, saved["params"])

    part = {"head": params["head"], "unknown": params["denoise"]}
    found = reader.restore_matching(part)
    assert set(found) == {"head/kernel", "head/bias"}
    assert same(found["head/kernel"], saved["params"]["head"]["kernel"])
    wider = make_plan(model=toy.ModelConfig(width=24)).abstract["params"]
    with pytest.raises(CheckpointError, match=r"blocks/down/bias is \[2, 16\] there and \[2, 24\] here"):
        reader.restore_matching(wider)


def test_averaged_weights_lie_over_frozen_ones(tmp_path):
    groups = [{"match": ["autoencoder"], "optimizer": "frozen"}, {"match": []}]
    run = toy.run_config(train={"ema": 0.9}, optim={"groups": groups})
    plan = make_plan(run)
    saved = state.init(plan, run)
    assert "autoencoder" not in saved["ema"]
    saved["ema"] = jax.tree.map(lambda a: a + 1, saved["ema"])
    writer = Checkpoints(tmp_path)
    writer.save(1, saved, {}, IDENTITY)
    writer.close()
    reader = Checkpoints(tmp_path, read_only=True)
    params = reader.restore_params(plan.abstract["params"], weights="ema")
    assert same(params["autoencoder"], saved["params"]["autoencoder"])
    assert same(params["head"], saved["ema"]["head"])


def test_missing_or_foreign_checkpoints_are_refused(tmp_path, plan, saved):
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        Checkpoints(tmp_path / "nothing", read_only=True).restore(plan.abstract)
    assert not (tmp_path / "nothing").exists()
    writer = Checkpoints(tmp_path)
    writer.save(5, saved, {}, IDENTITY)
    writer.close()
    reader = Checkpoints(tmp_path, read_only=True)
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 4; there are \[5\]"):
        reader.restore(plan.abstract, step=4)
    other = plain_config(RUN, toy.ModelConfig(width=24))
    with pytest.raises(CheckpointError, match="model.width: 16 != 24"):
        reader.restore(plan.abstract, other)
    muon = toy.run_config(train={"ema": 0.9}, optim={"groups": [{"match": [], "optimizer": "muon"}]})
    with pytest.raises(CheckpointError, match="does not fit this model and optimizer"):
        reader.restore(make_plan(muon).abstract, IDENTITY)
    plain = toy.run_config()
    writer = Checkpoints(tmp_path / "plain")
    writer.save(1, state.init(make_plan(plain), plain), {}, IDENTITY)
    writer.close()
    with pytest.raises(CheckpointError, match="no averaged weights"):
        Checkpoints(tmp_path / "plain", read_only=True).restore_params(plan.abstract["params"], weights="ema")


def test_an_option_added_since_a_checkpoint_was_saved_is_read_as_its_default(
    tmp_path, plan, saved, monkeypatch
):
    monkeypatch.setattr(checkpoint.families, "get", lambda name: SimpleNamespace(config=toy))
    older = {**IDENTITY, "model": {k: v for k, v in IDENTITY["model"].items() if k != "width"}}
    writer = Checkpoints(tmp_path)
    writer.save(1, saved, {}, older)
    writer.close()
    reader = Checkpoints(tmp_path, read_only=True)
    assert same(reader.restore(plan.abstract, IDENTITY)[0], saved)
    with pytest.raises(CheckpointError, match="model.width: 16 != 24"):
        reader.restore(plan.abstract, plain_config(RUN, toy.ModelConfig(width=24)))


def test_a_disk_known_to_be_full_is_refused_before_anything_is_written(tmp_path, plan, saved, monkeypatch):
    writer = Checkpoints(tmp_path, keep=1)
    writer.save(1, saved, {}, IDENTITY)
    writer.wait()
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage(10, 9, 1))
    with pytest.raises(StorageError, match="the checkpoint of step 1 is intact"):
        writer.save(2, saved, {}, IDENTITY)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1"]
    assert same(writer.restore(plan.abstract)[0], saved)


def test_a_write_the_system_refuses_leaves_the_earlier_checkpoint(tmp_path, plan, saved, capfd):
    """The kernel refuses every write beyond 1 kB a file (RLIMIT_FSIZE): not a full disk, but the same path, a
    write that fails in the background."""
    writer = Checkpoints(tmp_path, keep=1)
    writer.save(1, saved, {}, IDENTITY)
    writer.wait()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    capfd.readouterr()
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, before[1]))
    try:
        with pytest.raises(StorageError, match="the checkpoint of step 1 is intact") as caught:
            writer.save(2, saved, {}, IDENTITY)
            writer.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(caught.value)
    again = Checkpoints(tmp_path, keep=1)
    assert again.steps() == [1]
    assert same(again.restore(plan.abstract, IDENTITY)[0], saved)
    again.save(2, saved, {}, IDENTITY)
    again.close()
    assert Checkpoints(tmp_path, read_only=True).steps() == [2]


def test_a_checkpoint_of_eight_devices_restores_on_one_and_back(tmp_path, plan, saved):
    eight = """
        import sys, jax, numpy as np, toy_family as toy
        from umm_jax import sharding
        from umm_jax.train import state
        from umm_jax.train.checkpoint import Checkpoints, plain_config
        run = toy.run_config(train={"ema": 0.9}, mesh={"data": 2, "fsdp": 2, "tensor": 2})
        plan = state.plan(lambda r: toy.build(toy.ModelConfig(), r), run, sharding.make_mesh(run.mesh))
        assert len(plan.abstract["params"]["head"]["kernel"].sharding.device_set) == 8
        identity = plain_config(run, toy.ModelConfig())
        folder, out = sys.argv[1:]
        restored, position = Checkpoints(folder, read_only=True).restore(plan.abstract, identity)
        kernel = restored["opt"]["group0_adamw"].mu["blocks"]["up"]["kernel"]
        print(kernel.sharding.spec, kernel.addressable_shards[0].data.shape, position)
        writer = Checkpoints(out)
        writer.save(9, jax.tree.map(lambda a: a + np.asarray(1, a.dtype), restored), position, identity)
        writer.close()
    """
    writer = Checkpoints(tmp_path / "one")
    writer.save(3, saved, {"next": 4}, IDENTITY)
    writer.close()
    out = on_eight_devices(eight, str(tmp_path / "one"), str(tmp_path / "eight"))
    assert "(2, 8, 16) {'next': 4}" in out  # [2, 16, 32] cut by fsdp and tensor
    back, position = Checkpoints(tmp_path / "eight", read_only=True).restore(plan.abstract, IDENTITY)
    assert position == {"next": 4}
    assert same(back, jax.tree.map(lambda a: a + np.asarray(1, a.dtype), saved))
    homes = {leaf.sharding for leaf in flatten(back["params"]).values()}
    assert homes == {leaf.sharding for leaf in flatten(plan.abstract["params"]).values()}
