"""LoRA-MoE and the losses of masks: at the start nothing, golden values, counts at the published size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from umm_jax.errors import ConfigError
from umm_jax.models import layers as L
from umm_jax.models.backbone import Backbone, BackboneConfig
from umm_jax.models.lora_moe import LoRAMoE, LoRAMoEConfig, balance_loss
from umm_jax.models.mask_loss import mask_losses

X = jax.random.normal(jax.random.key(0), (2, 5, 12))


def layer(**changes) -> tuple[L.Linear, LoRAMoE]:
    rngs = nnx.Rngs(1)
    return L.Linear(12, 20, rngs=rngs), LoRAMoE(12, 20, LoRAMoEConfig(**changes), rngs=rngs)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_at_the_start_it_is_the_layer_to_the_bit(dtype):
    base, experts = layer()
    x = X.astype(dtype)
    y, shares = experts(x, base(x), jax.random.key(3))
    assert y.dtype == dtype
    np.testing.assert_array_equal(y, base(x))
    np.testing.assert_allclose(shares.sum(-1), 1, rtol=1e-6)
    assert shares.shape == (2, 5, 8) and shares.dtype == jnp.float32


def test_the_formula():
    base, experts = layer(experts=3, rank=2, alpha=5.0)
    experts.b[...] = jax.random.normal(jax.random.key(2), experts.b[...].shape)
    y, shares = experts(X, base(X))
    gate = np.exp(np.asarray(X @ experts.route[...]))
    gate /= gate.sum(-1, keepdims=True)
    wanted = np.asarray(base(X))
    for n in range(3):
        low = np.asarray(X) @ np.asarray(experts.a[...])[:, n]
        wanted = wanted + 5.0 / 2 * gate[..., n : n + 1] * (low @ np.asarray(experts.b[...])[n])
    np.testing.assert_allclose(shares, gate, rtol=1e-5)
    np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-5)


def test_dropout_changes_what_experts_read_and_not_the_gate():
    base, experts = layer(dropout=0.5)
    experts.b[...] = jnp.ones_like(experts.b[...])
    still, shares = experts(X, base(X))
    dropped, same = experts(X, base(X), jax.random.key(0))
    np.testing.assert_array_equal(shares, same)
    assert not np.allclose(still, dropped)
    keys = jax.random.split(jax.random.key(1), 400)
    many = np.asarray(jax.vmap(lambda key: experts(X, base(X), key)[0])(keys))
    error = many.std(0) / len(many) ** 0.5
    assert (np.abs(many.mean(0) - still) < 5 * error).all(), "on the average nothing changes"


def test_gradients_reach_b_first():
    base, experts = layer()

    def loss(experts):
        return jnp.square(experts(X, base(X))[0]).sum()

    grads = nnx.to_pure_dict(nnx.grad(loss)(experts))
    assert np.abs(grads["b"]).max() > 0
    assert not np.abs(grads["a"]).max() and not np.abs(grads["route"]).max()


def test_parameters_of_the_published_size():
    """Three layers of the feed-forward part of each of 32 blocks of a 7B Llama."""

    def count(d_in: int, d_out: int) -> int:
        shapes = nnx.eval_shape(lambda: LoRAMoE(d_in, d_out, LoRAMoEConfig(), rngs=nnx.Rngs(0)))
        return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(shapes, nnx.Param)))

    assert 32 * (2 * count(4096, 11008) + count(11008, 4096)) == 51_314_688


@pytest.mark.parametrize("gated, remat", [(True, "none"), (False, "full")])
def test_a_backbone_with_experts_is_at_the_start_the_one_without(gated, remat):
    sizes = dict(vocab=9, width=16, layers=3, heads=2, mlp=20, gated_mlp=gated, remat=remat)
    plain = Backbone(BackboneConfig(**sizes), nnx.Rngs(0))
    routed = Backbone(BackboneConfig(**sizes, experts=LoRAMoEConfig(experts=4, rank=2)), nnx.Rngs(5))
    # The same weights: what a second stage hands to the third.
    paths, grown = (dict(nnx.to_flat_state(nnx.state(m, nnx.Param))) for m in (plain, routed))
    assert {p for p in grown if p not in paths} and all("experts" in p for p in grown if p not in paths)
    for path, value in paths.items():
        grown[path][...] = value[...]
    x = jax.random.normal(jax.random.key(1), (2, 6, 16))
    positions = jnp.broadcast_to(jnp.arange(6), (2, 6))
    mask = jnp.tril(jnp.ones((2, 6, 6), bool))
    run = routed.run(x, positions, mask, key=jax.random.key(2))
    np.testing.assert_array_equal(run.hidden, plain(x, positions, mask)[0])
    assert plain.run(x, positions, mask).shares is None
    assert run.shares.shape == (3, 3 if gated else 2, 2, 6, 4)
    np.testing.assert_allclose(run.shares.sum(-1), 1, rtol=1e-6)
    assert np.abs(run.shares[0] - run.shares[1]).max() > 1e-3, "each layer has a gate of its own"

    # With something in B every layer's experts matter, and a cached step computes what the whole does.
    for path, value in grown.items():
        if path[-1] == "b":
            value[...] = jax.random.normal(jax.random.key(3), value[...].shape) * 0.1
    whole = routed.run(x, positions, mask)
    assert np.abs(whole.hidden - run.hidden).max() > 1e-2
    assert not np.allclose(routed.run(x, positions, mask, key=jax.random.key(4)).hidden, whole.hidden)
    cache, seen = routed.empty_cache(2, 6), []
    for t in range(6):
        at = slice(t, t + 1)
        step = routed.run(x[:, at], positions[:, at], mask[:, at], cache=cache, write=positions[:, at])
        cache, seen = step.cache, [*seen, step.hidden]
    np.testing.assert_allclose(jnp.concatenate(seen, axis=1), whole.hidden, atol=1e-5)


def test_golden_balance():
    shares = jnp.array([[3.0, 2, 1, 2], [1, 1, 4, 2]])
    assert float(balance_loss(shares, jnp.array([1, 0]), 0.1)) == pytest.approx(0.3701138461, abs=1e-7)
    assert float(balance_loss(jnp.ones((3, 8)), jnp.array([1, 0, 1]))) == 0


@pytest.mark.parametrize("wrong", [dict(experts=0), dict(rank=0), dict(dropout=1.0)])
def test_settings(wrong):
    with pytest.raises(ConfigError):
        LoRAMoEConfig(**wrong)


def test_golden_mask_losses():
    logits, target = jnp.array([[[2.0, -1], [0, 3]]]), jnp.array([[[1, 0], [0, 1]]])
    entropy, dice = mask_losses(logits, target)
    assert float(entropy[0]) == pytest.approx(0.2954810577, abs=1e-6)
    assert float(dice[0]) == pytest.approx(0.2032384703, abs=1e-6)
    assert float(2 * entropy[0] + 0.5 * dice[0]) == pytest.approx(0.6925813505, abs=1e-6)


def test_masks_are_judged_one_by_one():
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(size=(3, 4, 5)), rng.integers(0, 2, (3, 4, 5))
    together = mask_losses(jnp.asarray(logits), jnp.asarray(targets))
    for k in range(3):
        alone = mask_losses(jnp.asarray(logits[k : k + 1]), jnp.asarray(targets[k : k + 1]))
        np.testing.assert_allclose([t[k] for t in together], [a[0] for a in alone], rtol=1e-6)
    right = mask_losses(jnp.where(targets, 20.0, -20.0), jnp.asarray(targets))
    assert float(right[0].max()) < 1e-6 and float(right[1].max()) < 1e-3
    nothing = mask_losses(jnp.full((1, 4, 5), -30.0), jnp.zeros((1, 4, 5)))
    assert float(nothing[1][0]) == pytest.approx(0, abs=1e-6)
