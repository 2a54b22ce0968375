"""The denoising UNet: shapes and hooks of every option, and parity with the reference noise prediction."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from parity import decoder_sync_params, fixture, load
from remade import kept_and_gradients

from umm_jax.errors import ConfigError
from umm_jax.models.unet import UNet, UNetConfig
from umm_jax.models.unet_blocks import ResnetBlock, timestep_embedding
from umm_jax.models.unet_sync import UNetSync, UNetSyncConfig

TINY = dict(
    side=8,
    in_channels=3,
    out_channels=3,
    widths=(8, 16),
    heads=(2, 4),
    attention=(False, False),
    context_width=12,
    layers_per_block=1,
    mid_layers=2,
    norm_groups=4,
    skips="levels",
    patch=2,
    time_scale=1000.0,
    time_conditioning="scale_shift",
    upsample="depth_to_space",
    input_gate=0.5,
    grid_vectors=True,
)


# --- released names -----------------------------------------------------------------------------------


def source_name(path: str) -> str:
    """Released name, below ``image_decoder.decoder.unet.``, of our parameter at a dotted path."""
    rules = [
        (r"^time\.", "time_embedding."),
        (r"^(down|up)\.", r"\1_blocks."),
        (r"^mid\.", "mid_block."),
        (r"^(down_blocks\.\d+)\.resample\.", r"\1.downsamplers.0.conv."),
        (r"^(up_blocks\.\d+)\.resample\.", r"\1.upsamplers.0."),
        (r"\.blocks\.", ".transformer_blocks."),
        (r"\.self_attention\.", ".attn1."),
        (r"\.cross_attention\.", ".attn2."),
        (r"\.(q|k|v)\.", r".to_\1."),
        (r"(attn\d)\.out\.", r"\1.to_out.0."),
        (r"\.mlp\.proj\.", ".ff.net.0.proj."),
        (r"\.mlp\.out\.", ".ff.net.2."),
        (r"\.time\.", ".time_emb_proj."),
        (r"\.shortcut\.", ".conv_shortcut."),
        (r"\.(norm|conv)_(\d)\.", r".\1\2."),
        (r"^norm_out\.", "conv_norm_out."),
        (r"\.(kernel|scale)$", ".weight"),
    ]
    for pattern, replacement in rules:
        path = re.sub(pattern, replacement, path)
    return path


def from_torch(value: np.ndarray) -> np.ndarray:
    """Released layout -> ours: convolutions OIHW -> HWIO, linear maps [out, in] -> [in, out]."""
    return value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T


def random_weights(make) -> nnx.Module:
    """A module with parameters drawn by numpy: much faster than its initialisers, one by one."""
    graphdef, state = nnx.split(nnx.eval_shape(make))
    rng = np.random.default_rng(0)

    def draw(variable):
        fan_in = max(int(np.prod(variable.shape[:-1])), 1)
        value = rng.standard_normal(variable.shape, np.float32) / np.sqrt(fan_in)
        return value + (variable.ndim == 1)

    return nnx.merge(graphdef, jax.tree.map(draw, state))


def load_released(build, tensors: dict[str, np.ndarray], prefix: str, name=source_name) -> nnx.Module:
    """What `build` makes, with its parameters from `tensors`: all those under `prefix`, each used once."""
    graphdef, state = nnx.split(nnx.eval_shape(build))
    flat, used = {}, set()
    for path, old in nnx.to_flat_state(state):
        key = prefix + name(".".join(path))
        value = from_torch(tensors[key])
        assert value.shape == old.shape, f"{key}: {value.shape}, ours {path} {old.shape}"
        flat[path] = nnx.Param(jnp.asarray(value))
        used.add(key)
    assert len(used) == len(flat)
    assert used == {key for key in tensors if key.startswith(prefix)}
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def nhwc(x: np.ndarray) -> np.ndarray:
    return np.moveaxis(x, -3, -1)


def worst(ours, reference) -> float:
    """Largest absolute difference over the largest reference magnitude."""
    reference = np.asarray(reference)
    return float(np.max(np.abs(np.asarray(ours) - reference)) / np.max(np.abs(reference)))


def test_noise_prediction_matches_the_reference_with_and_without_synchronizer():
    data, state = fixture("f_unet_vae"), fixture("model")
    config = UNetConfig(side=16, widths=(16, 32, 32, 32), heads=(2, 4, 4, 4), context_width=48, norm_groups=8)
    unet = load_released(lambda: UNet(config, rngs=nnx.Rngs(0)), state, "image_decoder.decoder.unet.")

    # The tiny reference keeps the level sides of the release in its offsets.
    sync_config = UNetSyncConfig(
        d_maps=32,
        d_values=32,
        heads=4,
        points=4,
        sides=(16, 8, 4, 2),
        units=(64, 32, 16, 8),
        position_grid=16,
    )
    prefix = "image_decoder.decoder.mmfs_module"
    places = range(len(config.skip_shapes()))
    synchronizer = load(
        lambda: UNetSync(sync_config, config.skip_shapes(), config.mid_shape(), rngs=nnx.Rngs(0)),
        {
            "down": {str(i): decoder_sync_params(state, f"{prefix}.mmfs_down_blocks.{i}") for i in places},
            "mid": decoder_sync_params(state, f"{prefix}.mmfs_mid_block"),
        },
    )
    x, t = nhwc(data["sample"]), data["timesteps"].astype(np.int32)
    context, visible = data["encoder_hidden_states"], data["mmfs_mask"].astype(bool)
    maps = [nhwc(data[f"mmfs_feat_{i}"]) for i in range(4)]

    @jax.jit
    def predict(use_sync):
        def sync(skips, mid):
            synced = synchronizer(skips, mid, synchronizer.project(maps), visible)
            return jax.tree.map(lambda new, old: jnp.where(use_sync, new, old), synced, (skips, mid))

        return unet(x, t, context, sync=sync)

    plain, synced = predict(False), predict(True)
    assert worst(plain, nhwc(data["noise_pred_no_mmfs"])) < 1e-5
    assert worst(synced, nhwc(data["noise_pred"])) < 1e-5
    assert worst(plain, nhwc(data["noise_pred"])) > 1e-2


# --- shapes and hooks ---------------------------------------------------------------------------------


def inputs(side=8, channels=3, batch=2):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (batch, side, side, channels))
    return x, jnp.array([0.3, 0.8]), jax.random.normal(keys[1], (batch, 5, 12))


def test_time_table_has_cosines_first():
    table = timestep_embedding(jnp.array([0, 3]), 4)
    np.testing.assert_allclose(table[0], [1, 1, 0, 0], atol=1e-7)
    np.testing.assert_allclose(table[1], [np.cos(3), np.cos(0.03), np.sin(3), np.sin(0.03)], rtol=1e-5)


def test_release_skip_shapes_are_those_of_the_specification():
    config = UNetConfig()
    sides = [64] * 3 + [32] * 3 + [16] * 3 + [8] * 3
    widths = [320] * 4 + [640] * 3 + [1280] * 5
    assert config.skip_shapes(64) == list(zip(sides, widths))
    assert config.mid_shape(64) == (8, 1280)


def tiny_unet(**changes) -> UNet:
    return random_weights(lambda: UNet(UNetConfig(**TINY | changes), rngs=nnx.Rngs(0)))


def test_release_size_is_that_of_stable_diffusion():
    _, state = nnx.split(nnx.eval_shape(lambda: UNet(UNetConfig(), rngs=nnx.Rngs(0))))
    assert sum(v.size for v in jax.tree.leaves(state)) == 865_910_724


@pytest.mark.parametrize(
    "options",
    [
        {
            "skips": "all",
            "attention": (False, True),
            "norm": "rms",
            "upsample": "nearest",
            "time_conditioning": "add",
        },
        {"skips": "levels", "layers_per_block": 2},
    ],
)
def test_sync_sees_the_announced_shapes_and_its_result_is_used(options):
    unet = tiny_unet(**options)
    seen = []

    @jax.jit
    def predict(x, t, context, offset):
        def sync(skips, mid):
            seen[:] = [(s.shape[1], s.shape[3]) for s in (*skips, mid)]
            return [s + offset for s in skips], mid

        return unet(x, t, context, sync=sync)

    args = inputs()
    kept, changed = predict(*args, 0.0), predict(*args, 1.0)
    assert kept.shape == args[0].shape
    assert seen == [*unet.config.skip_shapes(8), unet.config.mid_shape(8)]
    assert float(jnp.max(jnp.abs(kept - changed))) > 1e-3
    np.testing.assert_allclose(jax.jit(unet)(*args), kept, rtol=1e-4, atol=1e-5)


def test_masked_context_has_no_effect():
    predict = jax.jit(tiny_unet())
    x, t, context = inputs()
    mask, everything = jnp.array([[1, 1, 1, 0, 0]] * 2), jnp.ones((2, 5), jnp.int32)
    other = context.at[:, 3:].set(9.0)
    np.testing.assert_allclose(predict(x, t, context, mask), predict(x, t, other, mask), atol=1e-6)
    moved = predict(x, t, context, everything) - predict(x, t, other, everything)
    assert float(jnp.max(jnp.abs(moved))) > 1e-4


def test_input_gate_hides_pure_noise_and_shows_clean_images():
    x, _, context = inputs()
    small = dict(widths=(8,), heads=(2,), attention=(False,), mid_layers=0)
    gated, plain = jax.jit(tiny_unet(**small)), jax.jit(tiny_unet(**small, input_gate=None))
    zero, one, half = jnp.zeros(2), jnp.ones(2), jnp.full(2, 0.5)
    np.testing.assert_allclose(gated(x, zero, context), plain(x, zero, context), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(gated(x, one, context), gated(3 * x, one, context))
    # (1 - t) s / ((1 - t)^2 s + t^2) = .25 / .375
    np.testing.assert_allclose(gated(x, half, context), plain(x * 2 / 3, half, context), rtol=1e-4, atol=1e-5)


def test_blocks_are_rematerialised_on_request():
    x, t, context = inputs()

    def kept(remat):
        """Numbers that wait for the backward pass."""
        graphdef, state = nnx.split(tiny_unet(remat=remat))
        forward = lambda s: jnp.mean(nnx.merge(graphdef, s)(x, t, context) ** 2)  # noqa: E731
        pull = jax.eval_shape(lambda s: jax.vjp(forward, s)[1], state)
        return sum(leaf.size for leaf in jax.tree.leaves(pull)) - sum(a.size for a in jax.tree.leaves(state))

    assert kept("full") < kept("none") / 2


def test_a_synchronizer_made_again_keeps_less_and_has_the_same_gradients():
    shapes, (side, width) = [(8, 16), (4, 16)], (4, 16)
    maps = [jax.random.normal(jax.random.key(i), (2, 3, s, s, 12)) for i, s in enumerate((8, 4))]
    skips = [jax.random.normal(jax.random.key(9 + s), (2, s, s, w)) for s, w in shapes]
    mid, visible = jax.random.normal(jax.random.key(5), (2, side, side, width)), jnp.arange(3) < 2

    def gradients(remat):
        config = UNetSyncConfig(12, 16, 4, 2, (8, 4), position_grid=8, out_init=0.5, remat=remat)
        graphdef, state = nnx.split(UNetSync(config, shapes, (side, width), rngs=nnx.Rngs(0)))

        def loss(s):
            module = nnx.merge(graphdef, s)
            down, middle = module(skips, mid, module.project(maps), jnp.tile(visible, (2, 1)))
            return sum(jnp.mean(x**2) for x in (*down, middle))

        return kept_and_gradients(loss, state)

    (some, one), (few, other) = gradients("none"), gradients("full")
    assert few < 0.6 * some
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_every_parameter_has_an_axis_name_per_dimension_and_state_keys_are_strings():
    _, state = nnx.split(nnx.eval_shape(lambda: UNet(UNetConfig(**TINY), rngs=nnx.Rngs(0))))
    for path, variable in nnx.to_flat_state(state):
        assert all(isinstance(part, str) for part in path)
        assert len(variable.get_metadata("axes")) == len(variable.shape)


def test_compute_dtype_is_that_of_the_input():
    x, t, context = inputs()
    assert jax.eval_shape(tiny_unet(), x.astype(jnp.bfloat16), t, context).dtype == jnp.bfloat16


def test_fresh_residual_block_starts_at_unit_scale_and_unconditioned():
    block = ResnetBlock(16, 16, d_time=8, conditioning="scale_shift", groups=4, rngs=nnx.Rngs(0))
    x, time = (
        jax.random.normal(jax.random.key(0), (2, 8, 8, 16)),
        jax.random.normal(jax.random.key(1), (2, 8)),
    )
    y = jax.jit(block)(x, time)
    assert 0.3 < float(jnp.std(y - x)) < 1.5
    np.testing.assert_array_equal(y, jax.jit(block)(x, 5 * time))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"heads": (2,)}, "one entry per level"),
        ({"heads": (3, 4)}, "heads"),
        ({"norm_groups": 5}, "norm_groups"),
        ({"side": 6}, "multiple"),
        ({"input_gate": -1.0}, "positive"),
    ],
)
def test_impossible_sizes_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        UNetConfig(**TINY | change)


def test_input_of_a_wrong_side_is_refused():
    unet = tiny_unet()
    _, t, context = inputs()
    with pytest.raises(ValueError, match="multiples of 4"):
        unet(jnp.zeros((2, 6, 8, 3)), t, context)
