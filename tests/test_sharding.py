"""Placements on 8 virtual devices. Each test that needs them runs its body in a process of its own."""

import math
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jobs
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from umm_jax import families, sharding
from umm_jax.config import MeshConfig
from umm_jax.errors import DeviceError
from umm_jax.models.layers import Keys

ROOT = Path(__file__).resolve().parent.parent


def on_eight_devices(body: str, *arguments: str) -> str:
    """Runs `body` where JAX sees 8 CPU devices; returns what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(body), *arguments],
        env=jobs.environment(8),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


class FakeMesh:
    """All that :func:`sharding.spec` asks of a mesh, at sizes no laptop has."""

    def __init__(self, data, fsdp, tensor, sequence=1):
        self.shape = {"data": data, "fsdp": fsdp, "tensor": tensor, "sequence": sequence}


@pytest.mark.parametrize(
    "axes, shape, wanted",
    [
        (("embed", "mlp"), (64, 128), P("fsdp", "tensor")),
        (("layers", "embed", "heads"), (4, 64, 64), P(None, "fsdp", "tensor")),
        (
            ("batch", None, "embed"),
            (16, 5, 64),
            P(("fsdp", "data"), None, None),
        ),  # fsdp is taken by the batch
        (("batch", None), (2, 5), P("data", None)),  # 2 rows do not divide over 8: only over data
        (("mlp", "heads"), (64, 64), P("tensor", None)),  # never the same mesh axis twice
        (("vocab", "embed"), (33, 64), P(None, "fsdp")),  # 33 does not divide
        ((None, None, "conv_in", "conv_out"), (3, 3, 64, 128), P(None, None, "fsdp", "tensor")),
        ((), (), P()),
    ],
)
def test_spec_gives_each_mesh_axis_once_and_only_where_it_divides(axes, shape, wanted):
    assert sharding.spec(axes, shape, FakeMesh(2, 4, 2)) == wanted


def test_tokens_of_a_row_and_parameters_are_split_by_the_sequence_axis_and_rows_are_not():
    mesh = FakeMesh(1, 4, 2, 2)
    assert sharding.spec(("batch", "sequence", None), (8, 64, 16), mesh) == P("fsdp", "sequence", None)
    assert sharding.spec(("batch",), (16,), mesh) == P("fsdp")
    assert sharding.spec(("pictures", None), (16, 3), mesh) == P(("fsdp", "sequence"), None)
    assert sharding.param_spec(("embed", "mlp"), (64, 128), 4, mesh) == P(("fsdp", "sequence"), "tensor")
    assert sharding.spec(("batch", None, "vocab"), (4, 8, 64), mesh) == P(
        "fsdp", None, ("tensor", "sequence")
    )


def test_spec_refuses_unknown_names_and_wrong_ranks():
    with pytest.raises(ValueError, match="did you mean 'embed'"):
        sharding.spec(("embd",), (8,), FakeMesh(1, 1, 1))
    with pytest.raises(ValueError, match="2 axis names"):
        sharding.spec(("embed", "mlp"), (8,), FakeMesh(1, 1, 1))


def test_large_parameters_without_a_name_to_split_are_split_over_fsdp():
    mesh = FakeMesh(1, 4, 2)
    big = 1 << 20
    assert sharding.param_spec((None, None), (6, big), 4, mesh) == P(None, "fsdp")
    assert sharding.param_spec(("mlp", None), (8, big), 4, mesh) == P("tensor", "fsdp")
    # Along layers a scan would gather the whole stack: then it stays, and the report says so.
    assert sharding.param_spec(("layers", None), (8, big + 1), 4, mesh) == P(None, None)
    # Small ones are cheaper whole.
    assert sharding.param_spec((None, None), (6, 64), 4, mesh) == P(None, None)


def test_a_mesh_larger_than_the_machine_says_what_would_work():
    with pytest.raises(DeviceError, match=r"asks for 64 devices \(fsdp 64\).*mesh.data=-1 mesh.fsdp=1"):
        sharding.make_mesh(MeshConfig(data=-1, fsdp=64), jax.devices()[:1])
    assert sharding.make_mesh(MeshConfig()).shape["data"] == jax.device_count()


def test_an_indivisible_number_of_devices_says_what_would_work():
    out = on_eight_devices("""
        from umm_jax import sharding
        from umm_jax.config import MeshConfig
        from umm_jax.errors import DeviceError
        try:
            sharding.make_mesh(MeshConfig(data=-1, fsdp=3))
        except DeviceError as error:
            print(error)
        print(dict(sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=-1)).shape))
        print(sharding.make_mesh(MeshConfig(data=1, fsdp=3, tensor=1)).size)
    """)
    assert "8 devices do not divide into fsdp 3" in out and "mesh.data=2 to use 6" in out
    assert "{'data': 2, 'fsdp': 2, 'tensor': 2, 'sequence': 1}" in out
    assert out.rstrip().endswith("3")


def test_constrain_and_put_batch_place_arrays_inside_and_outside_jit():
    out = on_eight_devices("""
        import jax, jax.numpy as jnp, numpy as np
        from umm_jax import sharding
        from umm_jax.config import MeshConfig
        mesh = sharding.make_mesh(MeshConfig(2, 2, 2))

        def f(x, within):
            if within:
                with sharding.use(mesh):
                    return sharding.constrain(x + 1, "batch", "mlp")
            return sharding.constrain(x + 1, "batch", "mlp")

        x = jnp.zeros((8, 6))
        print("inside", jax.jit(f, static_argnums=1)(x, True).sharding.spec)
        print("outside", len(jax.jit(f, static_argnums=1)(x, False).sharding.device_set))
        # The constraint is in the program itself, not only on its result.
        print("hlo", "sharding" in jax.jit(lambda x: f(x, True).sum()).lower(x).as_text())
        print("bare", "sharding" in jax.jit(lambda x: f(x, False).sum()).lower(x).as_text())
        batch = sharding.put_batch({"a": np.arange(8), "b": np.ones((8, 3))}, mesh)
        print("batch", batch["a"].sharding.spec, batch["b"].addressable_shards[0].data.shape)
        try:
            sharding.put_batch({"a": np.arange(6)}, mesh)
        except Exception as error:
            print(type(error).__name__, error)
    """)
    assert "inside P(('fsdp', 'data'), 'tensor')" in out.replace("PartitionSpec", "P")
    assert "outside 1" in out and "hlo True" in out and "bare False" in out
    assert "(2, 3)" in out
    assert "ConfigError a batch of 6 rows does not divide over data x fsdp = 4" in out


def test_gradients_through_split_kernels_are_those_of_one_device():
    """XLA's partitioner gets all of these wrong where the batch is split over data first: see RULES."""
    out = on_eight_devices("""
        import jax, jax.numpy as jnp, numpy as np
        from flax import nnx
        from umm_jax import sharding
        from umm_jax.config import MeshConfig
        from umm_jax.models.layers import Conv, Linear

        def gradients(make, x, mesh):
            model = [make(nnx.Rngs(0)), make(nnx.Rngs(1))]
            graph, state = nnx.split(model)
            params = nnx.to_pure_dict(state)

            def loss(params, x):
                with sharding.use(mesh):
                    one, two = nnx.merge(graph, nnx.State(params))
                    return jnp.mean(two(jax.nn.silu(one(x))) ** 2 * jnp.cos(jnp.arange(x.shape[-1])))

            places = sharding.shardings(state, mesh), sharding.batch_sharding(mesh)
            found = jax.jit(jax.grad(loss, argnums=(0, 1)), in_shardings=places)(params, x)
            return [np.asarray(a) for a in jax.tree.leaves(found)]

        def linear(rngs):
            return Linear(128, 128, rngs=rngs)

        cases = [
            (linear, (24, 9, 128)),
            (linear, (256, 128)),
            (lambda rngs: Conv(64, 64, rngs=rngs), (24, 6, 6, 64)),
        ]
        for make, shape in cases:
            x = jax.random.normal(jax.random.key(2), shape)
            one = gradients(make, x, sharding.make_mesh(MeshConfig(1, 1, 1)))
            eight = gradients(make, x, sharding.make_mesh(MeshConfig(2, 2, 2)))
            print(max(np.linalg.norm(a - b) / np.linalg.norm(a) for a, b in zip(one, eight, strict=True)))
    """)
    worst = [float(line) for line in out.split()]
    assert len(worst) == 3 and max(worst) < 1e-5, worst


def test_attention_and_sampling_take_their_rows_apart_whatever_stands_before_them():
    """On real sizes the compiler gave up the split of pictures between products with split weights."""
    out = on_eight_devices("""
        import jax, jax.numpy as jnp
        from umm_jax import sharding
        from umm_jax.config import MeshConfig
        from umm_jax.models.attention import attend
        from umm_jax.models.deformable import sample
        from umm_jax.plan import hlo

        def flops(f, mesh, *shapes):
            def run(*arrays):
                with sharding.use(mesh):
                    return jax.grad(lambda *a: jnp.sum(f(*a) ** 2), argnums=(0, 1, 2))(*arrays)
            home = sharding.replicated(mesh)
            arrays = [jax.ShapeDtypeStruct(s, jnp.float32, sharding=home) for s in shapes]
            return hlo.parse(jax.jit(run).lower(*arrays).compile().as_text()).flops

        hat = lambda v, l, w: sample(v, l, w, (8, 4), implementation="hat")
        cases = [(attend, [(16, 256, 4, 16)] * 3),
                 (hat, [(16, 1, 80, 4, 16), (16, 40, 1, 4, 2, 4, 2), (16, 40, 1, 4, 2, 4)])]
        one = sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
        for f, shapes in cases:
            eight = sharding.make_mesh(MeshConfig(1, 8, 1))
            print(flops(f, eight, *shapes) / flops(f, one, *shapes))
    """)
    shares = [float(line) for line in out.split()]
    assert len(shares) == 2 and max(shares) < 1.01 / 8, shares


def test_shardings_and_report_follow_the_axes_of_a_model():
    import toy_family as toy

    model = nnx.eval_shape(lambda: toy.build(toy.ModelConfig(), nnx.Rngs(0)))
    abstract = nnx.split(model)[1]
    mesh = sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    placed = sharding.shardings(abstract, mesh)
    report = sharding.report(nnx.to_pure_dict(abstract), placed, mesh)
    sizes = {p.path: p.bytes for p in report.placements}
    assert sizes["blocks/up/kernel"] == 2 * 16 * 32 * 4
    assert report.bytes_per_device == sum(sizes.values())
    assert not report.large_replicated and "blocks/up/kernel" in str(report)
    assert sharding.logical_axes(abstract)["blocks/up/kernel"] == ("layers", "embed", "mlp")


def test_a_parameter_without_axes_is_refused():
    class Bare(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(np.zeros((2, 2)))

    with pytest.raises(ValueError, match="w: no logical axes"):
        sharding.logical_axes(nnx.split(Bare())[1])


@pytest.mark.parametrize("name, least", [("mm_interleaved", 13e9), ("unified_mllm", 6.9e9)])
def test_no_large_parameter_of_the_release_is_left_whole(name, least):
    """Abstract shapes only: 14.9 B and 7.1 B parameters on fsdp 8 x tensor 2."""
    family = families.get(name)
    model = nnx.eval_shape(lambda: family.model.build(family.config.ModelConfig(), Keys(0)))
    abstract = nnx.split(model)[1]
    axes, mesh, total, share = sharding.logical_axes(abstract), FakeMesh(1, 8, 2), 0, 0.0
    for path, leaf in nnx.to_flat_state(abstract):
        name = "/".join(map(str, path))
        found = sharding.param_spec(axes[name], leaf.shape, 4, mesh)
        used = [a for entry in found if entry for a in ((entry,) if isinstance(entry, str) else entry)]
        ways, size = math.prod(mesh.shape[a] for a in used), 4 * math.prod(leaf.shape)
        assert ways > 1 or size <= sharding.LARGE, (name, leaf.shape, axes[name])
        total, share = total + size, share + size / ways
    assert total > least * 4
    assert share < 1.05 * total / 16


def test_kernels_of_attention_run_on_each_device_for_its_own_rows_and_heads():
    body = """
    import functools, jax, numpy as np
    from test_attention_kernels import arrays, both
    from umm_jax import sharding
    from umm_jax.config import MeshConfig
    from umm_jax.models import attention_gpu, attention_tpu

    for name in ("FORWARD", "BACKWARD"):
        setattr(attention_gpu, name, {4: attention_gpu.Blocks(32, 32)})
    attention_tpu.QUERIES = attention_tpu.KEYS = 128
    *given, mask, grad = arrays(150, 16, rows=4, kv_heads=2, group=1)
    given = (*given, (mask, mask), grad)
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    for kernels in (attention_gpu, attention_tpu):
        run = functools.partial(both, kernels)

        def on_mesh(*x):
            with sharding.use(mesh):
                return run(*x)

        compiled = jax.jit(on_mesh).lower(*given).compile()
        for ours, alone in zip(compiled(*given), jax.jit(run)(*given)):
            np.testing.assert_allclose(ours, alone, rtol=1e-5, atol=2e-6)
            assert len({str(shard.index) for shard in ours.addressable_shards}) == 8, ours.sharding
        assert "all-gather" not in compiled.as_text()
    print("done")
    """
    assert "done" in on_eight_devices(body)
