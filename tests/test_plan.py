"""umm plan: what is counted, what is said of topologies, and the command on the devices of this machine."""

import dataclasses
import json
from importlib.util import find_spec
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lowering import executed

from umm_jax import cli, config, sharding
from umm_jax.config import MeshConfig
from umm_jax.errors import ConfigError, DeviceError, UserError
from umm_jax.models.attention import attend
from umm_jax.models.layers import part
from umm_jax.models.masks import stream
from umm_jax.plan import child, chips, compiling, counting, estimate, hlo, steps, sweep, utilisation

TEXT = "configs/text_13b.py"
SMALL = (
    "model.backbone.vocab=320",
    "model.backbone.width=64",
    "model.backbone.layers=3",
    "model.backbone.heads=4",
    "model.backbone.mlp=96",
    "data.tokens=128",
    "data.batch_size=8",
)


# --- work ------------------------------------------------------------------------------------------------


def counted(run) -> dict[str, counting.Work]:
    alone = dataclasses.replace(run, mesh=MeshConfig(1, 1, 1))
    return counting.model_flops(steps.train_step(alone, jax.devices()[:1]))


@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_language_model_costs_what_its_formula_says(remat):
    """6 FLOPs a weight and token and half of attention's square, whatever is made again."""
    run = config.load(TEXT, [*SMALL, f"model.backbone.remat={remat}"])
    work = counted(run)
    tokens, length, width, layers, vocab = 8 * 128, 128, 64, 3, 320
    weights = layers * (4 * width * width + 3 * width * 96)
    attention = 6 * tokens * length * width * layers
    backbone = work["backbone"]
    assert backbone.total == 6 * weights * tokens + attention
    assert backbone.forward * 3 == backbone.total
    assert work["head"].total == 6 * tokens * width * vocab
    assert set(work) <= {"backbone", "head", "connector", "tower"}


def test_a_runs_ideal_is_its_model_flops_at_the_peak_of_its_devices(monkeypatch):
    run = config.load(TEXT, [*SMALL, "mesh.fsdp=4"])
    assert utilisation.ideal_seconds(run, 4) is None  # a CPU's peak is not known
    monkeypatch.setitem(utilisation.PEAKS, jax.devices()[0].device_kind, 1e9)
    whole = sum(part.total for part in counted(run).values())
    assert utilisation.ideal_seconds(run, 4) == whole / 4e9


@pytest.mark.parametrize("name, share", [("backbone", 0.5), ("tower", 1.0), ("decoder", 1.0)])
def test_half_of_attention_is_counted_in_a_backbone_only(name, share):
    """A tower's mask may be given in the same way, and lets all of an image be read."""
    read = stream(jnp.ones((2, 16), jnp.int32))
    function = jax.jit(lambda q: part(name)(attend)(q, q, q, (read, read)))
    step = steps.Step(None, function, (jax.ShapeDtypeStruct((2, 16, 4, 8), jnp.float32),))
    assert counting.model_flops(step)[name].forward == share * 4 * 2 * 16 * 16 * 4 * 8


def test_frozen_weights_have_no_gradients():
    groups = [dict(match=["backbone/"], optimizer="frozen"), dict(match=[], optimizer="adamw")]
    run = config.load(TEXT, SMALL)
    frozen = dataclasses.replace(
        run, optim=config.from_dict(type(run.optim), {**config.to_dict(run.optim), "groups": groups}, "optim")
    )
    both, values = counted(run)["backbone"], counted(frozen)["backbone"]
    weights = 3 * (4 * 64 * 64 + 3 * 64 * 96)
    assert values.forward == both.forward
    # Gradients still pass through to what lies before it; those of its own weights are not made.
    assert both.backward - values.backward == 2 * weights * 8 * 128


@pytest.mark.parametrize(
    "name, parts",
    [
        ("world_tiny", {"tower", "backbone", "synchronizer", "decoder", "head"}),
        ("world_chatumm", {"tower", "backbone", "connector", "head"}),
        ("world_unified_2", {"tower", "backbone", "connector", "masks", "head"}),
    ],
)
def test_every_family_names_its_parts(name, parts):
    work = counted(config.load(f"configs/{name}.py"))
    assert parts <= set(work)
    total = sum(one.total for one in work.values())
    assert work.get(counting.OTHER, counting.Work()).total < 0.1 * total


@pytest.mark.parametrize("name", ["world_latent", "world_chatumm", "world_unified_2"])
def test_devices_share_the_work(name):
    """Of a batch split over eight devices each does an eighth: no part has lost the split on its way."""
    found = executed(name, "data.batch_size=16")
    assert 8 * found["8"] < 1.01 * found["1"]


# --- topologies --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, slices, chips_, wrap",
    [
        ("v5p:4x4x4", 1, 64, (True, True, True)),
        ("v5p:2x2x1", 1, 4, (False, False, False)),
        ("v5e:16x16", 2, 512, (True, True, False)),
        ("v6e:8x16", 1, 128, (False, True, False)),
    ],
)
def test_topologies(name, slices, chips_, wrap):
    found = chips.topology(name, slices)
    assert (found.chips, found.wrap, found.name) == (chips_, wrap, name)


@pytest.mark.parametrize(
    "name, says",
    [
        ("v5p", "write CHIP:SHAPE"),
        ("v5q:4x4x4", "did you mean"),
        ("v5p:4x4", "slices of v5p have the shape XxYxZ"),
        ("v5e:32x32", "1 to 256 chips"),
        ("v5e:0x4", "1 to 256 chips"),
    ],
)
def test_what_is_no_topology(name, says):
    with pytest.raises(ConfigError, match=says):
        chips.topology(name)


# --- what moves -----------------------------------------------------------------------------------------


def test_collectives_are_told_by_axis():
    mesh = {"data": 2, "fsdp": 4, "tensor": 2}
    ids = np.arange(16).reshape(2, 4, 2)
    along = {
        "fsdp": np.moveaxis(ids, 1, -1).reshape(-1, 4),
        "tensor": ids.reshape(-1, 2),
        "data x fsdp": np.moveaxis(ids, 2, 0).reshape(2, 8),
        "none": ids.reshape(-1, 1),
    }
    for name, groups in along.items():
        one = hlo.Collective("x", "all-gather", 8, 8, groups, 1)
        assert estimate.axes_of(one, mesh) == name


NAMED = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. \
Used 17.25G of 15.75G hbm. Exceeded hbm capacity by 1.50G.

  Largest program allocations in hbm:

  1. Size: 8.00G
     Operator: op_name="jit(step)/jvp(backbone)/dot_general"
     Shape: bf16[40,4,2048,13824]{3,2,1,0}
     Unpadded size: 8.00G
"""
PLAIN = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (425.59G) \
exceeds available HBM (95.74G)."
)


@pytest.mark.parametrize("message, needs, has", [(NAMED, 17.25, 15.75), (PLAIN, 425.59, 95.74)])
def test_what_a_compiler_says_that_ran_out_of_memory(message, needs, has):
    found = child.exceeded(message)
    assert (found["needs"] / 2**30, found["has"] / 2**30) == pytest.approx((needs, has))
    if message is NAMED:
        assert [(b["size"], b["shape"].split("{")[0]) for b in found["largest"]] == [
            ("8.00G", "bf16[40,4,2048,13824]")
        ]
    facts = {"program": "train", "mesh": {"fsdp": 4}, "device": "TPU", "parameters": 1, "trained": 1}
    facts |= {"state_bytes": 2**30, "error": message, "compile_seconds": 1.0, **found}
    told = estimate.lines(estimate.Report("v5e:2x2", 4, facts, 1, None, {}))
    assert "DOES NOT FIT" in told[2] and f"{needs - has:.2f} GiB too much" in told[2]


def test_another_error_is_not_taken_for_too_little_memory():
    assert child.exceeded("INTERNAL: Mosaic failed to compile TPU kernel") == {}


# --- sweeps --------------------------------------------------------------------------------------------


def fake(run, limit: int):
    """A report of a step that takes as long as it has rows, and fits up to `limit` of them a device."""
    devices = run.mesh.data * run.mesh.fsdp * run.mesh.tensor
    rows = run.data.batch_size // (run.mesh.data * run.mesh.fsdp)
    facts = {
        "program": "train",
        "quick": False,
        "mesh": {"fsdp": devices},
        "device": "chip",
        "placements": [],
    }
    facts |= {"memory": {"peak_memory": rows * 2**30}}
    if rows > limit:
        facts |= {"error": "too much", "needs": 2**40, "has": 2**30, "largest": []}
        return estimate.Report("x", devices, facts, 1, None, {})
    found = estimate.Estimate(1.0 + 0.5 * rows, 0.0, 0.0, 0.0)
    tokens = run.data.batch_size * run.data.tokens
    return estimate.Report("x", devices, facts, tokens, None, {}, estimate=found, utilisation=0.5)


def test_a_sweep_finds_the_best_that_fits_and_does_not_try_what_cannot():
    run, asked = config.load(TEXT, SMALL), []

    def plan(one):
        asked.append(one.data.batch_size)
        return fake(one, limit=2)

    choices = [sweep.Choice(mesh, rows, None) for mesh in sweep.meshes(8, [1], [1]) for rows in (1, 2, 4, 8)]
    tried = list(sweep.sweep(run, choices, plan, lambda text: None))
    assert asked == [8, 16, 32] and [t.why for t in tried] == ["", "", "does not fit", "4 rows do not fit"]
    lines = sweep.table(tried)
    assert len(lines) == 6 and lines[-1].startswith("best: fsdp 8, 2 rows a device")


def test_a_sweep_sets_every_policy():
    model = {"a": {"remat": "none", "b": [1]}, "remat": "full", "c": 3}
    assert sweep.with_policy(model, "dots") == {"a": {"remat": "dots", "b": [1]}, "remat": "dots", "c": 3}
    with pytest.raises(ConfigError, match="divides 8 devices"):
        sweep.meshes(8, [3], [1])


# --- the command ---------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UMM_PLAN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def overrides(*more: str) -> list[str]:
    return [f"--config.{one}" for one in (*SMALL, *more)]


def test_a_plan_for_the_devices_here(cache, tmp_path, capsys):
    args = ["plan", f"--config={TEXT}", "--topology=local", f"--json={tmp_path / 'a.json'}"]
    args += [f"--html={tmp_path / 'a.html'}", *overrides()]
    assert cli.main(args) == 0
    told = capsys.readouterr().out
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["fits"] and found["estimate"] is None and "ESTIMATE" not in told
    work = found["work"]["backbone"]
    assert work["backward"] == 2 * work["forward"] > 0
    assert found["facts"]["state_bytes"] >= 12 * found["facts"]["trained"]
    page = (tmp_path / "a.html").read_text()
    assert "Memory along the step" in page and "<script" not in page
    # What says where a run goes does not have it compiled again; what is computed does.
    before = sorted(cache.iterdir())
    assert cli.main([*args, "--config.train.log_every=7"]) == 0
    assert "kept from before" in capsys.readouterr().out and sorted(cache.iterdir()) == before
    assert cli.main([*args, "--config.data.tokens=64"]) == 0
    assert len(list(cache.iterdir())) == 2


@pytest.mark.skipif(not find_spec("libtpu"), reason="libtpu is not installed: make setup-plan")
def test_a_quick_plan_says_so_and_is_kept_apart(cache, tmp_path, capsys):
    args = ["plan", f"--config={TEXT}", "--topology=v5p:2x2x1", *overrides("mesh.fsdp=4")]
    assert cli.main(args) == 0
    assert "searched less" not in capsys.readouterr().out
    assert cli.main([*args, "--quick"]) == 0
    told = capsys.readouterr().out
    assert "searched less" in told and "more than it takes" in told and len(list(cache.iterdir())) == 2


@pytest.mark.skipif(not find_spec("libtpu"), reason="libtpu is not installed: make setup-plan")
@pytest.mark.parametrize(
    "topology, slices", [("v5e:2x2", 1), ("v5e:2x2", 2), ("v6e:2x2", 1), ("v5p:2x2x1", 1)]
)
def test_a_plan_for_chips_that_are_not_there(cache, tmp_path, topology, slices):
    args = ["plan", f"--config={TEXT}", f"--topology={topology}", f"--slices={slices}"]
    args += [f"--json={tmp_path / 'a.json'}", *overrides(f"mesh.data={slices}", "mesh.fsdp=4")]
    assert cli.main(args) == 0
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["devices"] == 4 * slices and found["estimate"]["seconds"] > 0
    assert found["facts"]["memory"]["peak_memory"] > found["facts"]["state_bytes"]
    assert any(one["axes"] == "fsdp" for one in found["collectives"])
    between = [one for one in found["collectives"] if one["axes"] == "slices"]
    assert len(between) == (slices > 1) and all(one["seconds"] > 0 for one in between)


BETWEEN = """
HloModule step, is_scheduled=true

%body (p: (s32[], f32[1000])) -> (s32[], f32[1000]) {
  %p = (s32[], f32[1000]{0}) parameter(0)
  %k = s32[] get-tuple-element(%p), index=0
  %x = f32[1000]{0} get-tuple-element(%p), index=1
  %t = token[] after-all()
  %s = (f32[1000]{0}, u32[], token[]) send(%x, %t), channel_id=1, is_host_transfer=true
  %d = token[] send-done(%s), channel_id=1, is_host_transfer=true
  ROOT %out = (s32[], f32[1000]{0}) tuple(%k, %x)
}

%condition (p: (s32[], f32[1000])) -> pred[] {
  %p = (s32[], f32[1000]{0}) parameter(0)
  ROOT %c = pred[] constant(false)
}

ENTRY %main (a: f32[1000]) -> f32[1000] {
  %a = f32[1000]{0} parameter(0)
  %zero = s32[] constant(0)
  %init = (s32[], f32[1000]{0}) tuple(%zero, %a)
  %loop = (s32[], f32[1000]{0}) while(%init), condition=%condition, body=%body, backend_config=TURNS
  ROOT %got = f32[1000]{0} get-tuple-element(%loop), index=1
}
""".replace("TURNS", '{"known_trip_count":{"n":"5"}}')


def test_a_kernel_takes_as_long_as_its_products_or_its_vector_work():
    chip = chips.CHIPS["v5p"]
    call = (
        '  %{0} = f32[8]{{0}} custom-call(%a), custom_call_target="tpu_custom_call", backend_config={{'
        '"custom_call_config":{{"cost_estimate":{{"flops":"{1}","transcendentals":"{2}"}}}}}}\n'
    )
    silent = '  %s = f32[8]{0} custom-call(%a), custom_call_target="tpu_custom_call"\n'
    body = call.format("p", 10**12, 10**9) + call.format("v", 10**9, 10**12) + silent
    text = f"HloModule m\n\nENTRY %main (a: f32[8]) -> f32[8] {{\n  %a = f32[8]{{0}} parameter(0)\n{body}}}\n"
    seconds, notes = estimate._kernels(hlo.parse(text), chip)
    wanted = 1e12 / (0.5 * 459e12) + 1e12 / (0.3 * 2 * 4096 * 1.75e9)
    assert seconds == pytest.approx(wanted) and notes[1].startswith("1 Pallas kernels do not say")


def test_an_attention_kernel_takes_as_long_as_its_schedule():
    call = (
        "  %attend_forward.7 = (bf16[2,3,512,64]{3,2,1,0}, f32[2,3,1,512]{3,2,1,0}) custom-call(%a), "
        'custom_call_target="tpu_custom_call", backend_config={"custom_call_config":'
        '{"cost_estimate":{"flops":"1000","transcendentals":"4000000"}}}\n'
    )
    text = f"HloModule m\n\nENTRY %main (a: f32[8]) -> f32[8] {{\n  %a = f32[8]{{0}} parameter(0)\n{call}}}\n"
    a_score, a_row = estimate.SCHEDULED["attend_forward", "v5e"]
    seconds, (note,) = estimate._kernels(hlo.parse(text), chips.CHIPS["v5e"])
    assert seconds == pytest.approx((4e6 * a_score + 2 * 3 * 512 * a_row) / 1.5e9)
    assert "as the compiler schedules them" in note
    # No schedule of v4 is known: what is assumed, and said to be.
    seconds, (note,) = estimate._kernels(hlo.parse(text), chips.CHIPS["v4"])
    assert seconds == pytest.approx(4e6 / (0.3 * 2 * 4096 * 1.05e9)) and "assumed" in note


def test_what_goes_between_slices_takes_the_time_of_their_network():
    program = hlo.parse(BETWEEN)
    (moved,), notes = estimate._between_slices(program, chips.CHIPS["v5p"])
    assert (moved.count, moved.bytes, notes) == (5, 5 * 4000, [])
    assert moved.seconds == 5 * 4000 / (50e9 / 8)  # 50 Gbit/s a chip
    found, (note,) = estimate._between_slices(program, chips.CHIPS["v4"])
    assert found == [] and "5 transfers between slices" in note and "not published" in note


def test_slices_are_spanned_by_the_data_axis():
    devices = [SimpleNamespace(slice_index=k // 4, platform="tpu") for k in range(8)]
    with pytest.raises(DeviceError, match="multiple of 2; mesh.data is 1, 2 would do"):
        sharding.make_mesh(MeshConfig(1, -1, 1), devices)


def test_what_a_config_is_refused_for_is_said_in_one_line(cache, capsys):
    args = ["plan", f"--config={TEXT}", "--topology=local", *overrides("data.batch_size=7", "mesh.fsdp=1")]
    assert cli.main([*args, "--config.train.accumulate=2"]) == 2
    told = capsys.readouterr().err
    assert "does not divide" in told and "Traceback" not in told and told.count("\n") == 1
    assert not cache.exists() or not list(cache.iterdir())


def test_without_the_compiler_it_says_what_to_install(cache, monkeypatch, capsys):
    monkeypatch.setattr(compiling.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["plan", f"--config={TEXT}", "--topology=v5p:4x4x4"]) == 5
    assert "make setup-plan" in capsys.readouterr().err


def test_a_child_that_dies_is_told_of(monkeypatch):
    done = compiling.subprocess.CompletedProcess(
        [], 1, "", "Traceback\n  ...\numm_jax.errors.ConfigError: no such thing\n"
    )
    error = compiling._failure(done)
    assert isinstance(error, ConfigError) and str(error) == "no such thing"
    killed = compiling._failure(compiling.subprocess.CompletedProcess([], -9, "", ""))
    assert isinstance(killed, UserError) and "signal 9" in str(killed)
