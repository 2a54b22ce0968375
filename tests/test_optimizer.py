"""Groups, schedules, Muon's matrices, decay and frozen parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy_family as toy

from umm_jax.config import GroupConfig, OptimConfig
from umm_jax.errors import ConfigError
from umm_jax.train.optimizer import (
    Optimizer,
    flatten,
    is_matrix,
    matrix_shape,
    orthogonalize,
    schedule,
    unflatten,
)

quick_compiles = pytest.fixture(scope="module", autouse=True)(toy.quick_compiles)

AXES = {
    "text/embedding/table": ("vocab", "embed"),
    "text/grid_position": (None, "embed"),
    "text/blocks/up/kernel": ("layers", "embed", "mlp"),
    "text/blocks/up/bias": ("layers", "mlp"),
    "text/blocks/conv/kernel": ("layers", None, None, "conv_in", "conv_out"),
    "unet/conv/kernel": (None, None, "conv_in", "conv_out"),
    "unet/conv/bias": ("conv_out",),
    "autoencoder/kernel": ("embed", "mlp"),
}
SHAPES = {
    "text/embedding/table": (11, 8),
    "text/grid_position": (5, 8),
    "text/blocks/up/kernel": (3, 8, 16),
    "text/blocks/up/bias": (3, 16),
    "text/blocks/conv/kernel": (3, 3, 3, 4, 6),
    "unet/conv/kernel": (3, 3, 4, 6),
    "unet/conv/bias": (6,),
    "autoencoder/kernel": (8, 8),
}


def tree(seed):
    keys = jax.random.split(jax.random.key(seed), len(SHAPES))
    return unflatten({p: jax.random.normal(k, s) for k, (p, s) in zip(keys, SHAPES.items())})


def optimizer(*groups, only=lambda path: True, **fields):
    fields = {"lr": 0.1, "schedule": "constant", "warmup": 0, "clip": None, **fields}
    return Optimizer(OptimConfig(groups=groups, **fields), 100, AXES, only)


def one_step(opt, params, grads, step=0):
    trainable, frozen = opt.split(params)
    apply = jax.jit(lambda g, p: opt.apply(g, opt.init(p), p, jnp.int32(step)))
    new, state, info = apply(opt.split(grads)[0], trainable)
    return flatten(opt.merge(new, frozen)), state, info


def test_flatten_and_unflatten_are_inverse():
    params = tree(0)
    assert jax.tree.structure(unflatten(flatten(params))) == jax.tree.structure(params)
    assert set(flatten(params)) == set(SHAPES)


def test_first_matching_group_owns_a_parameter():
    opt = optimizer(
        GroupConfig(("autoencoder",), "frozen"), GroupConfig(("conv",), "adamw"), GroupConfig((), "muon")
    )
    owned = {rule.name: set(rule.paths) for rule in opt.rules}
    assert opt.frozen == {"autoencoder/kernel"}
    assert owned["group1_adamw"] == {"text/blocks/conv/kernel", "unet/conv/kernel", "unet/conv/bias"}
    assert owned["group2_muon"] == {"text/blocks/up/kernel"}
    assert owned["group2_adam"] == {"text/embedding/table", "text/grid_position", "text/blocks/up/bias"}
    with pytest.raises(ConfigError, match="no group of optim.groups matches parameter unet/conv/kernel"):
        optimizer(GroupConfig(("text", "autoencoder"), "adamw"))
    with pytest.raises(ConfigError, match="nothing to train"):
        optimizer(GroupConfig((), "frozen"))


def test_frozen_parameters_keep_their_bits_and_have_no_state():
    opt = optimizer(
        GroupConfig(("autoencoder", "unet"), "frozen"), GroupConfig((), "adamw", weight_decay=0.1)
    )
    params = tree(0)
    new, state, _ = one_step(opt, params, tree(1))
    for path, before in flatten(params).items():
        assert bool(jnp.all(new[path] == before)) == (path in opt.frozen), path
    names = {str(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)}
    assert names and not any("autoencoder" in name or "unet" in name for name in names)


def test_only_restricts_training_to_one_part():
    opt = optimizer(GroupConfig((), "adamw"), only=lambda path: path.startswith("autoencoder"))
    assert opt.frozen == set(AXES) - {"autoencoder/kernel"}


def test_muon_reads_kernels_as_matrices():
    for shape, axes, wanted in [
        ((8, 16), ("embed", "mlp"), (1, 8, 16)),
        ((3, 3, 4, 6), (None, None, "conv_in", "conv_out"), (1, 36, 6)),
        ((5, 8, 16), ("layers", "embed", "mlp"), (5, 8, 16)),
        ((5, 3, 3, 4, 6), ("layers", None, None, "conv_in", "conv_out"), (5, 36, 6)),
    ]:
        assert is_matrix("a/kernel", axes) and matrix_shape(shape, axes) == wanted
    for path, axes in [
        ("a/bias", ("embed",)),
        ("a/scale", ("layers", "embed")),
        ("a/table", ("vocab", "embed")),
        ("head/kernel", ("embed", "vocab")),
        ("a/grid_rows", (None, "embed")),
        ("a/queries", ("layers", None, "embed")),
    ]:
        assert not is_matrix(path, axes), (path, axes)


def test_muon_moves_each_layer_by_an_orthogonal_matrix_of_adams_size():
    opt = optimizer(GroupConfig((), "muon"), muon_ns_steps=4)
    params, grads = tree(0), tree(1)
    new, _, _ = one_step(opt, params, grads)
    before = flatten(params)
    for path, fan_in, fan_out in [
        ("text/blocks/up/kernel", 8, 16),
        ("text/blocks/conv/kernel", 36, 6),
        ("unet/conv/kernel", 36, 6),
    ]:
        update = (before[path] - new[path]) / 0.1
        for matrix in np.asarray(update).reshape(-1, fan_in, fan_out):
            singular = np.linalg.svd(matrix, compute_uv=False) / (0.2 * max(fan_in, fan_out) ** 0.5)
            assert singular.min() > 0.4 and singular.max() < 1.4, (path, singular)


def test_newton_schulz_equals_the_reference_iteration():
    """optax's Muon with the same constants, which runs one matrix at a time."""
    x = jax.random.normal(jax.random.key(0), (2, 12, 5))
    for rounds in (1, 4):
        dims = {"w": optax.contrib.MuonDimensionNumbers(0, 1)}
        theirs = optax.contrib.scale_by_muon(
            ns_steps=rounds, beta=0.0, nesterov=False, weight_dimension_numbers=dims
        )
        for mine, one in zip(orthogonalize(x, rounds), x):
            reference, _ = theirs.update({"w": one}, theirs.init({"w": one}))
            np.testing.assert_allclose(mine, reference["w"], atol=1e-5)


def test_momentum_looks_ahead_as_nesterov_does():
    opt = optimizer(GroupConfig((), "muon"), muon_momentum=0.9)
    rule = next(r for r in opt.rules if r.name.endswith("muon"))
    first, second = ({p: flatten(tree(seed))[p] for p in rule.paths} for seed in (1, 2))
    state = rule.transform.init(unflatten(first))
    _, state = rule.transform.update(unflatten(first), state)
    updates, state = rule.transform.update(unflatten(second), state)
    path = "unet/conv/kernel"
    mean = 0.9 * 0.1 * first[path] + 0.1 * second[path]
    np.testing.assert_allclose(flatten(state["momentum"])[path], mean, atol=1e-6)
    ahead = (0.9 * mean + 0.1 * second[path]).reshape(1, 36, 6)
    wanted = 0.2 * 36**0.5 * orthogonalize(ahead, opt.config.muon_ns_steps)
    np.testing.assert_allclose(flatten(updates)[path].reshape(1, 36, 6), wanted, atol=1e-4)


def test_muon_treats_stacked_layers_as_it_treats_single_ones():
    opt = optimizer(GroupConfig((), "muon"))
    params, grads = tree(0), tree(1)
    new, _, _ = one_step(opt, params, grads)
    single = Optimizer(opt.config, 100, {"kernel": ("embed", "mlp")})
    for layer in range(3):
        kernel, grad = (flatten(t)["text/blocks/up/kernel"][layer] for t in (params, grads))
        alone, _, _ = one_step(single, {"kernel": kernel}, {"kernel": grad})
        np.testing.assert_allclose(new["text/blocks/up/kernel"][layer], alone["kernel"], atol=1e-5)


def test_adamw_equals_optax_and_decays_matrices_only():
    group = GroupConfig((), "adamw", lr_scale=0.5, weight_decay=0.3)
    opt = optimizer(group, b1=0.8, b2=0.9)
    params, grads = tree(0), tree(1)
    new, _, info = one_step(opt, params, grads)
    vectors = {"text/blocks/up/bias", "unet/conv/bias"}
    mask = unflatten({path: path not in vectors for path in SHAPES})
    reference = optax.adamw(0.05, 0.8, 0.9, weight_decay=0.3, mask=mask)
    wanted = optax.apply_updates(params, reference.update(grads, reference.init(params), params)[0])
    for path, value in flatten(wanted).items():
        np.testing.assert_allclose(new[path], value, atol=1e-6, err_msg=path)
    assert float(info["lr"]) == pytest.approx(0.1)


def test_decay_in_a_muon_group_is_for_its_matrices_unless_vectors_are_asked_for():
    grads = jax.tree.map(jnp.zeros_like, tree(0))
    for vectors in (False, True):
        opt = optimizer(GroupConfig((), "muon", weight_decay=0.5, decay_vectors=vectors))
        new, _, _ = one_step(opt, tree(0), grads)
        for path, before in flatten(tree(0)).items():
            decayed = vectors or is_matrix(path, AXES[path])
            factor = 1 - 0.1 * 0.5 if decayed else 1.0
            np.testing.assert_allclose(new[path], factor * before, rtol=1e-5, err_msg=path)


def test_clip_bounds_the_norm_of_all_gradients_together():
    def moved(**fields):
        opt = optimizer(GroupConfig((), "adamw"), eps=1.0, b1=0.0, b2=0.0, **fields)
        return one_step(opt, tree(0), tree(1))

    free, _, info = moved()
    clipped, _, info_clipped = moved(clip=1e-3)
    norm = float(optax.global_norm(tree(1)))
    assert float(info["grad_norm"]) == pytest.approx(norm, rel=1e-5)
    assert float(info_clipped["grad_norm"]) == pytest.approx(norm, rel=1e-5)
    # With b2=0 and eps=1 the step is g / (|g| + 1): nearly g itself once clipped to 1e-3.
    steps = jax.tree.map(lambda new, old: (old - new) / 0.1, unflatten(clipped), tree(0))
    assert float(optax.global_norm(steps)) == pytest.approx(1e-3, rel=0.01)
    loose, _, _ = moved(clip=1e6)
    assert all(bool(jnp.all(loose[path] == free[path])) for path in free)


@pytest.mark.parametrize(
    "name, wanted",
    [
        ("constant", {0: 0.1, 4: 0.5, 9: 1.0, 50: 1.0, 99: 1.0}),
        ("cosine", {0: 0.1, 10: 1.0, 55: 0.5, 100: 0.0}),
        ("trapezoid", {0: 0.1, 10: 1.0, 65: 1.0, 82: 18 / 35, 99: 1 / 35, 100: 0.0}),
    ],
)
def test_schedules(name, wanted):
    lr = schedule(OptimConfig(lr=1.0, schedule=name, warmup=10, decay=0.35), 100)
    for step, value in wanted.items():
        assert float(lr(jnp.int32(step))) == pytest.approx(value, abs=1e-6), step
