"""The ChatUMM model: packing, losses, the mixture's two groups, and the release's names."""

import re

import chatumm_toy as toy
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from umm_jax.data.packing import batch, pack_row
from umm_jax.errors import ConfigError
from umm_jax.families.chatumm import reference, weights
from umm_jax.families.chatumm.model import build
from umm_jax.models.autoencoder import AutoencoderConfig, make_autoencoder
from umm_jax.models.layers import Keys
from umm_jax.models.losses import token_losses
from umm_jax.models.mot import MixtureConfig, MixtureOfTransformers, begun_from

BUDGET = {"tokens": 140, "images": 4, "latents": 160, "patches": 16}


def rows(serializer, *groups, budget=BUDGET, align=None):
    packed = [pack_row(list(g), serializer.spec, budget, align or {}) for g in groups]
    return jax.tree.map(jnp.asarray, batch(packed))


@pytest.mark.parametrize("align", [{}, {"tokens": 20, "latents": 32, "images": 2}])
def test_a_packed_row_computes_what_its_conversations_would_alone(align):
    config = toy.model_config()
    model, serializer = toy.model(config), toy.serializer(config)
    a, b = (serializer(toy.conversation(seed, exchanges=1 + seed)) for seed in range(2))
    packed, alone = rows(serializer, [a, b], align=align), rows(serializer, [a], [b])
    draws = model.draw(alone, jax.random.key(0))

    def gathered(x, axis, second_start):
        """What two rows hold, as one: the first row's part, then the second's."""
        return jnp.concatenate([x[:1, :second_start], x[1:, : x.shape[1] - second_start]], axis=1)

    start = {axis: int(np.argmax(packed[axis]["segment_ids"] == 2)) for axis in packed}
    assert all(start[axis] % multiple == 0 for axis, multiple in align.items())
    together = draws._replace(
        posterior=gathered(draws.posterior, "images", start["images"]),
        noise=gathered(draws.noise, "latents", start["latents"]),
        t=gathered(draws.t, "images", start["images"]),
    )
    one, two = (jax.jit(model.read)(rows_, d) for rows_, d in ((packed, together), (alone, draws)))
    for group, axis in enumerate(("tokens", "latents")):
        first = packed[axis]["segment_ids"][0] == 1
        second = packed[axis]["segment_ids"][0] == 2
        np.testing.assert_allclose(
            one.hidden[group][0][first], two.hidden[group][0, : first.sum()], rtol=2e-4, atol=2e-5
        )
        np.testing.assert_allclose(
            one.hidden[group][0][second], two.hidden[group][1, : second.sum()], rtol=2e-4, atol=2e-5
        )
    assert second.sum() > 0


def test_changing_one_packed_sample_leaves_the_others_bit_identical():
    config = toy.model_config()
    model, serializer = toy.model(config), toy.serializer(config)
    kept = serializer(toy.conversation(0))
    others = [serializer(toy.conversation(seed)) for seed in (1, 2)]
    read = jax.jit(model.read)
    found = []
    for other in others:
        packed = rows(serializer, [kept, other])
        found.append(read(packed, model.draw(packed, jax.random.key(0))))
    for group, axis in enumerate(("tokens", "latents")):
        mine = packed[axis]["segment_ids"][0] == 1
        a, b = (np.asarray(one.hidden[group][0][mine]) for one in found)
        np.testing.assert_array_equal(a, b)
        assert not np.array_equal(found[0].hidden[group][0][~mine], found[1].hidden[group][0][~mine])


def test_losses_are_means_over_what_is_labelled_and_control_is_reported_apart():
    config = toy.model_config()
    model, serializer = toy.model(config), toy.serializer(config)
    packed = rows(serializer, [serializer(toy.conversation(0))], [serializer(toy.conversation(1, 1))])
    key = jax.random.key(1)
    sums, metrics = jax.jit(model.loss_sums)(packed, key)
    weights_ = model.loss_weights(packed)
    read = jax.jit(model.read)(packed, model.draw(packed, key))
    tokens, latents = packed["tokens"], packed["latents"]
    scores = jax.nn.log_softmax(model.head(read.hidden[0]))
    asked = np.asarray(tokens["weight"]) > 0
    nll = -np.take_along_axis(
        np.asarray(scores), np.asarray(tokens["label"])[..., None] * asked[..., None], -1
    )[..., 0]
    assert float(weights_["text"]) == asked.sum()
    np.testing.assert_allclose(sums["text"], nll[asked].sum(), rtol=1e-5)
    noisy = np.asarray(latents["time"]) >= 0
    error = np.square(np.asarray(read.prediction - read.target)).mean(-1)
    assert float(weights_["image"]) == noisy.sum() == 3 * 16
    np.testing.assert_allclose(sums["image"], error[noisy].sum(), rtol=1e-5)
    chunked = toy.model(toy.model_config(loss_chunk=16))
    again, _ = jax.jit(chunked.loss_sums)(packed, key)
    np.testing.assert_allclose(again["text"], sums["text"], rtol=1e-5)
    needed, labels = tokens["weight"] > 0, jnp.maximum(tokens["label"], 0)

    def text(hidden, chunk):
        return jnp.sum(token_losses(hidden, model.head, labels, chunk=chunk, needed=needed)[0] * needed)

    grads = [jax.jit(jax.grad(text), static_argnums=1)(read.hidden[0], chunk) for chunk in (None, 16)]
    np.testing.assert_allclose(*grads, rtol=1e-4, atol=1e-6)
    next_ = np.asarray(tokens["control"]) == 1
    np.testing.assert_allclose(metrics["control_loss"][0], nll[next_].sum(), rtol=1e-5)
    assert float(metrics["control_loss"][1]) == next_.sum() == 9


def test_clean_pictures_are_not_noised_and_every_drawn_one_has_its_own_time():
    config = toy.model_config()
    model, serializer = toy.model(config), toy.serializer(config)
    packed = rows(serializer, [serializer(toy.conversation(0))])
    draws = model.draw(packed, jax.random.key(0))
    read = model.read(packed, draws)
    latents, images = packed["latents"], packed["images"]
    clean = model.cells(
        model.latents(images["pixels"], images["size"], None), latents["image"], latents["cell"]
    )
    real, noisy = np.asarray(latents["segment_ids"]) > 0, np.asarray(latents["time"]) >= 0
    np.testing.assert_array_equal(read.noised[real & ~noisy], clean[real & ~noisy])
    t = np.asarray(draws.t)[0][np.asarray(latents["time"])[noisy]][:, None]
    np.testing.assert_allclose(
        read.noised[noisy], (1 - t) * clean[noisy] + t * draws.noise[noisy], rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(read.target[noisy], draws.noise[noisy] - clean[noisy], atol=1e-6)
    assert len({float(v) for v in draws.t[0]}) == 4


def test_no_token_is_multiplied_with_the_other_groups_weights():
    config = MixtureConfig(vocab=8, width=32, layers=2, heads=2, kv_heads=1, mlp=64)

    def flops(u, g):
        module = nnx.eval_shape(lambda: MixtureOfTransformers(config, Keys(0)))
        graphdef, state = nnx.split(module)
        shapes = (jax.ShapeDtypeStruct((1, n, 32), jnp.float32) for n in (u, g))
        places = tuple(jax.ShapeDtypeStruct((1, n), jnp.int32) for n in (u, g))
        mask = jax.ShapeDtypeStruct((1, u + g, u + g), bool)

        def run(state, xs, ropes, mask):
            return nnx.merge(graphdef, state)(xs, ropes, mask)[0]

        compiled = jax.jit(run).lower(state, tuple(shapes), places, mask).compile()
        return compiled.cost_analysis()["flops"]

    both, one = flops(64, 64), flops(128, 0)
    assert 0.9 < both / one < 1.1


def test_frozen_understanding_learns_nothing_through_what_is_read():
    section = toy.model_section()
    config = toy.model_config(mixture={**section["mixture"], "freeze_understanding": True})
    serializer = toy.serializer(config)
    packed = rows(serializer, [serializer(toy.conversation(0, upload=True))])
    graphdef, state = nnx.split(toy.model(config))

    def loss(state):
        sums, _ = nnx.merge(graphdef, state).loss_sums(packed, jax.random.key(0))
        return sums["text"] + sums["image"]

    grads = {"/".join(map(str, p)): g[...] for p, g in nnx.to_flat_state(jax.jit(jax.grad(loss))(state))}
    for path, grad in grads.items():
        held = any(part in path for part in ("embed/", "vision/", "connector/", "understanding"))
        assert bool(jnp.any(grad != 0)) != held, path


def test_the_generation_group_begins_as_a_copy():
    state = nnx.split(
        nnx.eval_shape(
            lambda: MixtureOfTransformers(
                MixtureConfig(width=32, heads=2, kv_heads=1, mlp=8, layers=2, vocab=8), Keys(0)
            )
        )
    )[1]
    paths = ["/".join(map(str, p)) for p, _ in nnx.to_flat_state(state)]
    pairs = begun_from(paths)
    assert len(pairs) * 2 == len(paths) and all("understanding" in origin for origin in pairs.values())


def test_a_picture_on_a_canvas_is_encoded_and_decoded_as_if_alone():
    config = AutoencoderConfig(
        widths=(8, 8, 16), layers_per_block=1, latent_channels=3, norm_groups=4, quant=False
    )
    model = make_autoencoder(config, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    alone = jnp.asarray(rng.normal(size=(1, 8, 12, 3)), jnp.float32)
    canvas = jnp.asarray(rng.normal(size=(1, 16, 16, 3)), jnp.float32).at[:, :8, :12].set(alone)
    size = jnp.array([[8, 12]])
    np.testing.assert_allclose(model.encode(canvas, size=size)[:, :2, :3], model.encode(alone), atol=2e-5)
    assert np.abs(model.encode(canvas)[:, :2, :3] - model.encode(alone)).max() > 1e-2
    small = jnp.asarray(rng.normal(size=(1, 2, 3, 3)), jnp.float32)
    large = jnp.asarray(rng.normal(size=(1, 4, 4, 3)), jnp.float32).at[:, :2, :3].set(small)
    np.testing.assert_allclose(model.decode(large, size)[:, :8, :12], model.decode(small), atol=2e-5)


# --- the release ----------------------------------------------------------------------------------------

D, KV, F, V, E, M = 3584, 512, 18944, 152064, 1152, 4304
LAYER = {  # of the decoder (spec chatumm_bagel 2.14); each stands there a second time for generation tokens
    **{f"self_attn.{n}_proj.weight": (D if n in "qo" else KV, D) for n in "qkvo"},
    **{f"self_attn.{n}_proj.bias": (D if n == "q" else KV,) for n in "qkv"},
    **{f"self_attn.{n}_norm.weight": (128,) for n in "qk"},
    **{f"mlp.{n}_proj.weight": (F, D) for n in ("gate", "up")},
    "mlp.down_proj.weight": (D, F),
    "input_layernorm.weight": (D,),
    "post_attention_layernorm.weight": (D,),
}
VISION_LAYER = {
    **{f"self_attn.{n}_proj.weight": (E, E) for n in ("q", "k", "v", "out")},
    **{f"self_attn.{n}_proj.bias": (E,) for n in ("q", "k", "v", "out")},
    **{f"layer_norm{n}.{part}": (E,) for n in (1, 2) for part in ("weight", "bias")},
    "mlp.fc1.weight": (M, E), "mlp.fc1.bias": (M,), "mlp.fc2.weight": (E, M), "mlp.fc2.bias": (E,),
}  # fmt: skip


def released() -> dict[str, tuple[int, ...]]:
    """Names and shapes of BAGEL-7B-MoT's ema.safetensors, from the specification's table."""
    top = "language_model.model."
    found = {
        f"{top}embed_tokens.weight": (V, D), "language_model.lm_head.weight": (V, D),
        f"{top}norm.weight": (D,), f"{top}norm_moe_gen.weight": (D,),
        "time_embedder.mlp.0.weight": (D, 256), "time_embedder.mlp.0.bias": (D,),
        "time_embedder.mlp.2.weight": (D, D), "time_embedder.mlp.2.bias": (D,),
        "vae2llm.weight": (D, 64), "vae2llm.bias": (D,), "llm2vae.weight": (64, D), "llm2vae.bias": (64,),
        "latent_pos_embed.pos_embed": (4096, D), "vit_pos_embed.pos_embed": (4900, D),
        "connector.fc1.weight": (D, E), "connector.fc1.bias": (D,),
        "connector.fc2.weight": (D, D), "connector.fc2.bias": (D,),
    }  # fmt: skip
    vision = "vit_model.vision_model."
    found |= {
        f"{vision}embeddings.patch_embedding.weight": (E, 588),
        f"{vision}embeddings.patch_embedding.bias": (E,),
        f"{vision}embeddings.position_embedding.weight": (4900, E),
        f"{vision}post_layernorm.weight": (E,), f"{vision}post_layernorm.bias": (E,),
    }  # fmt: skip
    for i in range(28):
        for name, shape in LAYER.items():
            found[f"{top}layers.{i}.{name}"] = shape
            twin = name.replace("mlp.", "mlp_moe_gen.") if name.startswith("mlp") else None
            twin = twin or re.sub(r"\.(weight|bias)$", r"_moe_gen.\1", name)
            found[f"{top}layers.{i}.{twin}"] = shape
    for i in range(26):
        found |= {f"{vision}encoder.layers.{i}.{name}": shape for name, shape in VISION_LAYER.items()}
    return found


def shapes_of(config):
    state = nnx.split(nnx.eval_shape(lambda: build(config, Keys(0))))[1]
    return {"/".join(map(str, path)): leaf.shape for path, leaf in nnx.to_flat_state(state)}


def test_the_release_is_covered_tensor_by_tensor():
    config = reference.release_config()
    ours = shapes_of(config)
    table = weights.table(config)
    table.check(ours)
    theirs = table.theirs(ours)
    model = {n: tuple(s) for n, s in theirs.items() if not n.startswith(weights.AUTOENCODER)}
    assert model == released()
    assert len(model) == 1223
    assert sum(int(np.prod(shape)) for shape in model.values()) == 14_607_260_128
    autoencoder = {n: s for n, s in theirs.items() if n.startswith(weights.AUTOENCODER)}
    assert len(autoencoder) == 244
    assert round(sum(int(np.prod(shape)) for shape in autoencoder.values()) / 1e6, 2) == 83.82


def test_a_model_of_another_layout_has_no_released_names():
    with pytest.raises(ConfigError, match="mixture.qk_norm"):
        weights.table(toy.model_config(mixture={**toy.model_section()["mixture"], "qk_norm": False}))
    with pytest.raises(ConfigError, match="autoencoder.kind is 'identity'"):
        weights.table(toy.model_config())
