"""The vocabulary every module is written in: parameters with logical axes, and the layers made of them.

Conventions
    * A parameter is a float32 ``nnx.Param`` created by :func:`param` with one *logical axis name* per
      dimension. ``umm_jax.sharding`` turns names into mesh axes; no module knows about devices.
    * The dtype of the activations is the compute dtype. A layer casts its weights to ``x.dtype`` and
      accumulates what must not be rounded (norms, softmax) in float32.
    * Repeated layers are stacked with :func:`stack` and run with :func:`scan`, so that compile time does
      not grow with depth and state keys stay strings.
    * Randomness in a forward pass is an explicit ``key`` argument; ``None`` means deterministic.

Axis names in use: ``embed`` (model width), ``mlp``, ``heads``, ``vocab``, ``layers``, ``conv_in``,
``conv_out`` and ``None`` for dimensions that are never split.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from umm_jax.errors import ConfigError

Axes = tuple[str | None, ...]
Initializer = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]

zeros = jax.nn.initializers.zeros
ones = jax.nn.initializers.ones


def normal(std: float) -> Initializer:
    """Gaussian of standard deviation `std`, not truncated."""
    return jax.nn.initializers.normal(std)


def uniform(bound: float) -> Initializer:
    """Uniform on [-bound, bound]."""

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def lecun() -> Initializer:
    """Variance 1 / fan-in over every dimension but the last: the default of dense and conv kernels."""

    def init(key, shape, dtype=jnp.float32):
        fan_in = 1
        for side in shape[:-1]:
            fan_in *= side
        return jax.random.normal(key, shape, dtype) / max(fan_in, 1) ** 0.5

    return init


def constant(value: float) -> Initializer:
    return jax.nn.initializers.constant(value)


# What a model is made of, as reports name it.
PARTS = ("backbone", "tower", "connector", "synchronizer", "decoder", "autoencoder", "masks", "head")


def part(name: str):
    """Decorates a function: what it computes, and its gradients, are reported as of this one of PARTS.

    Of parts within parts the innermost counts: a synchronizer in a backbone is synchronizer.
    """
    if name not in PARTS:
        raise ValueError(f"{name!r} is none of the parts {', '.join(PARTS)}")
    return jax.named_scope(name)


# The name of what attention gives, for policies that keep it.
ATTENDED = "attended"

_PLAIN = contextvars.ContextVar("umm_jax_plain", default=False)


@contextlib.contextmanager
def plainly() -> Iterator[None]:
    """Inside, models are traced as their formulas stand.

    Nothing is made again for the backward pass, and attention and sampling are what defines them, whatever
    the platform. For counting operations: such a program would need far too much memory to be run.
    """
    token = _PLAIN.set(True)
    try:
        yield
    finally:
        _PLAIN.reset(token)


def is_plain() -> bool:
    """Whether this is within :func:`plainly`."""
    return _PLAIN.get()


def remade(f: Callable, **how) -> Callable:
    """``jax.checkpoint``, which is not done within :func:`plainly`."""
    checkpointed = jax.checkpoint(f, **how)

    @functools.wraps(f)
    def call(*args, **named):
        return f(*args, **named) if is_plain() else checkpointed(*args, **named)

    return call


def lean(f: Callable) -> Callable:
    """`f`, keeping nothing but its arguments for the backward pass, which computes the rest again.

    For what lies between two products: a norm or an activation written in JAX keeps three to six arrays of
    its argument's size, which is most of the memory of a training step, while making them again is cheap. A
    product at the end of `f` is not computed again, as its gradient does not need its result. Arrays that
    `f` closes over count as arguments.
    """
    return remade(f)


class Keys:
    """The stream of keys parameters are made from; takes the place of ``nnx.Rngs``.

    Under a trace, the counter of ``nnx.Rngs`` is a traced variable whose every update searches the whole
    program so far (half a minute for the thousand arrays of a release); this one is a plain number.
    """

    def __init__(self, seed: int | jax.Array):
        self._key = jax.random.key(seed) if isinstance(seed, int) else seed
        self._count = 0

    def params(self) -> jax.Array:
        """The next key."""
        self._count += 1
        return jax.random.fold_in(self._key, self._count - 1)


def param(rngs: nnx.Rngs, shape: Sequence[int], axes: Axes, init: Initializer) -> nnx.Param:
    """A float32 parameter that carries its logical `axes`, one per dimension of `shape`."""
    if len(shape) != len(axes):
        raise ValueError(f"parameter of shape {tuple(shape)} needs {len(shape)} axis names, got {axes}")
    return nnx.Param(init(rngs.params(), tuple(shape), jnp.float32), axes=tuple(axes))


class Fixed(nnx.Variable):
    """Numbers of a model that are saved with it and never learned, made by :func:`fixed`."""


def fixed(value: jax.Array, axes: Axes) -> Fixed:
    """A :class:`Fixed` with one logical axis name per dimension."""
    return Fixed(value, axes=axes, fixed=True)


class Linear(nnx.Module):
    """y = x W + b over the last axis: [..., in] -> [..., out]."""

    def __init__(
        self,
        d_in: int,
        d_out: int,
        *,
        axes: Axes = ("embed", "mlp"),
        bias: bool = True,
        init: Initializer | None = None,
        bias_init: Initializer = zeros,
        rngs: nnx.Rngs,
    ):
        self.kernel = param(rngs, (d_in, d_out), axes, init or lecun())
        self.bias = param(rngs, (d_out,), (axes[1],), bias_init) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x @ self.kernel[...].astype(x.dtype)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class Embedding(nnx.Module):
    """Table look-up: integer ids [...] -> [..., width], in `dtype`."""

    def __init__(
        self, rows: int, width: int, *, axes: Axes = ("vocab", "embed"), std: float = 0.02, rngs: nnx.Rngs
    ):
        self.table = param(rngs, (rows, width), axes, normal(std))

    def __call__(self, ids: jax.Array, dtype=jnp.float32) -> jax.Array:
        return jnp.take(self.table[...], ids, axis=0, mode="clip").astype(dtype)


class Conv(nnx.Module):
    """2-D convolution, NHWC and HWIO: [..., h, w, in] -> [..., h', w', out].

    `padding` is the explicit zero border on each side, as in the reference implementations; ``groups=in``
    makes it depth-wise.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        kernel: int = 3,
        *,
        stride: int = 1,
        padding: int | tuple[tuple[int, int], tuple[int, int]] | None = None,
        groups: int = 1,
        bias: bool = True,
        init: Initializer | None = None,
        bias_init: Initializer = zeros,
        axes: tuple[str | None, str | None] = ("conv_in", "conv_out"),
        rngs: nnx.Rngs,
    ):
        # A depth-wise kernel has input width 1: nothing to split there.
        in_axis = axes[0] if groups == 1 else None
        self.kernel = param(
            rngs, (kernel, kernel, d_in // groups, d_out), (None, None, in_axis, axes[1]), init or lecun()
        )
        self.bias = param(rngs, (d_out,), (axes[1],), bias_init) if bias else None
        pad = kernel // 2 if padding is None else padding
        self.padding = ((pad, pad), (pad, pad)) if isinstance(pad, int) else pad
        self.stride, self.groups = stride, groups

    def __call__(self, x: jax.Array) -> jax.Array:
        lead, kernel = x.shape[:-3], self.kernel[...].astype(x.dtype)
        x = x.reshape((-1, *x.shape[-3:]))
        if self.stride == 1 and self.groups > 1 and kernel.shape[2:] == (1, x.shape[-1]):
            y = depthwise(x, kernel[:, :, 0], self.padding)
        elif self.stride == 1 and kernel.shape[:2] == (1, 1) and self.padding == ((0, 0), (0, 0)):
            # One pixel at a time: a product, whose gradients a CPU takes twice as fast.
            y = x @ kernel[0, 0]
        else:
            y = jax.lax.conv_general_dilated(
                x,
                kernel,
                (self.stride, self.stride),
                self.padding,
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                feature_group_count=self.groups,
            )
        if self.bias is not None:
            y = y + self.bias[...].astype(x.dtype)
        return y.reshape(*lead, *y.shape[1:])


def depthwise(x: jax.Array, kernel: jax.Array, padding) -> jax.Array:
    """Each channel with a filter of its own: x [B, h, w, C], kernel [kh, kw, C] -> [B, h', w', C], stride 1.

    A sum of shifted products. As a grouped convolution it costs a CPU ten times as much forwards, and more
    backwards, where the gradient of a dense kernel is made to take its diagonal.
    """
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    rows, columns = kernel.shape[:2]
    h, w = x.shape[1] - rows + 1, x.shape[2] - columns + 1
    taps = ((i, j) for i in range(rows) for j in range(columns))
    return sum(x[:, i : i + h, j : j + w] * kernel[i, j] for i, j in taps)


def unit_rms(x: jax.Array, eps: float = 1e-6) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) over the last axis, in float32; a large `eps` leaves small vectors small."""
    y = x.astype(jnp.float32)
    return (y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)).astype(x.dtype)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale over the last axis, in float32."""

    def __init__(self, width: int, *, eps: float = 1e-6, axis: str | None = "embed", rngs: nnx.Rngs):
        self.scale = param(rngs, (width,), (axis,), ones)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        @lean
        def norm(x, scale):
            return (unit_rms(x.astype(jnp.float32), self.eps) * scale).astype(x.dtype)

        return norm(x, self.scale[...])


class LayerNorm(nnx.Module):
    """(x - mean) / sqrt(var + eps) * scale + bias over the last axis, biased variance, in float32."""

    def __init__(self, width: int, *, eps: float = 1e-5, axis: str | None = "embed", rngs: nnx.Rngs):
        self.scale = param(rngs, (width,), (axis,), ones)
        self.bias = param(rngs, (width,), (axis,), zeros)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        @lean
        def norm(x, scale, bias):
            y = x.astype(jnp.float32)
            y = y - jnp.mean(y, axis=-1, keepdims=True)
            y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
            return (y * scale + bias).astype(x.dtype)

        return norm(x, self.scale[...], self.bias[...])


class GroupNorm(nnx.Module):
    """Normalises [..., h, w, C] over space and the C/groups channels of each group, in float32."""

    def __init__(self, width: int, groups: int = 32, *, eps: float = 1e-5, rngs: nnx.Rngs):
        if width % groups:
            raise ValueError(f"{width} channels do not divide into {groups} groups")
        self.scale = param(rngs, (width,), ("conv_out",), ones)
        self.bias = param(rngs, (width,), ("conv_out",), zeros)
        self.groups, self.eps = groups, eps

    def __call__(self, x: jax.Array, real: jax.Array | None = None) -> jax.Array:
        """With `real` [..., h, w, 1], 1 on the pixels of a picture and 0 around it: statistics of the picture
        alone, and zeros around it."""

        # Means over space for each channel first, and only they are put in groups: the map keeps its channels
        # as the inner axis, not the two or four of a group, which is several times faster on a CPU.
        @lean
        def norm(x, scale, bias, real):
            y = x.astype(jnp.float32)
            y = y - self._of_group(_mean(y, real))
            gain = jax.lax.rsqrt(self._of_group(_mean(y * y, real)) + self.eps)
            y = y * (gain * scale) + bias
            return (y if real is None else y * real).astype(x.dtype)

        return norm(x, self.scale[...], self.bias[...], real)

    def _of_group(self, means: jax.Array) -> jax.Array:
        """Means of channels [..., C] -> for each channel that of its group, [..., 1, 1, C]."""
        groups = means.reshape(*means.shape[:-1], self.groups, -1)
        groups = jnp.broadcast_to(jnp.mean(groups, axis=-1, keepdims=True), groups.shape)
        return groups.reshape(*means.shape[:-1], 1, 1, -1)


def _mean(y: jax.Array, real: jax.Array | None) -> jax.Array:
    """Of maps [..., h, w, C] over space, where `real` [..., h, w, 1] is 1 if it is given: [..., C]."""
    if real is None:
        return jnp.mean(y, axis=(-3, -2))
    return jnp.sum(y * real, axis=(-3, -2)) / jnp.maximum(jnp.sum(real, axis=(-3, -2)), 1)


class Modules(nnx.Module):
    """Unlike layers in order. Attribute names are '0', '1', ..., so that state keys are strings."""

    def __init__(self, modules: Sequence[nnx.Module]):
        self.length = len(modules)
        for i, module in enumerate(modules):
            setattr(self, str(i), module)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> nnx.Module:
        return getattr(self, str(range(self.length)[i]))

    def __iter__(self) -> Iterator[nnx.Module]:
        return (getattr(self, str(i)) for i in range(self.length))


def stack(make: Callable[[nnx.Rngs], nnx.Module], count: int, rngs: nnx.Rngs) -> nnx.Module:
    """`count` equal modules as one, parameters with a leading ``layers`` axis. Run it with :func:`scan`."""

    def init(key):
        return nnx.split(make(Keys(key)))[1]

    state = jax.vmap(init)(jax.random.split(rngs.params(), count))
    graphdef = nnx.split(nnx.eval_shape(lambda: make(Keys(0))))[0]
    for _, variable in nnx.to_flat_state(state):
        variable.set_metadata(axes=("layers", *variable.get_metadata("axes")))
    return nnx.merge(graphdef, state)


def scan(
    module: nnx.Module,
    step: Callable[[nnx.Module, Any, Any], tuple[Any, Any]],
    carry: Any,
    xs: Any = None,
    *,
    remat: str = "none",
    group: int = 1,
    unroll: bool = False,
) -> tuple[Any, Any]:
    """Runs a stacked `module`: ``carry, y = step(layer, carry, x)`` for each layer, first to last.

    Args:
        module: what :func:`stack` returned.
        step: sees one layer at a time (a list of `group` layers when ``group > 1``).
        carry, xs: as in ``jax.lax.scan``; every leaf of `xs` has a leading axis of steps.
        remat: name of a rematerialisation policy, see :func:`checkpoint_policy`.
        group: layers per step; must divide the number of layers.
        unroll: write all steps out, one after another: longer to compile, faster where layers are small.

    Returns:
        the last carry and the stacked outputs.
    """
    graphdef, state = nnx.split(module)
    if group > 1:
        state = jax.tree.map(lambda a: a.reshape(a.shape[0] // group, group, *a.shape[1:]), state)

    def body(carry, inputs):
        layer_state, x = inputs
        if group == 1:
            layers = nnx.merge(graphdef, layer_state)
        else:
            layers = [
                nnx.merge(graphdef, jax.tree.map(lambda a, i=i: a[i], layer_state)) for i in range(group)
            ]
        return step(layers, carry, x)

    if remat != "none":
        body = remade(body, policy=checkpoint_policy(remat), prevent_cse=False)
    return jax.lax.scan(body, carry, (state, xs), unroll=unroll)


def checkpoint_policy(name: str):
    """What a rematerialised layer keeps.

    ``full`` nothing, ``dots`` the outputs of matmuls, ``dots_no_batch`` those of matmuls with weights,
    ``attention`` what large attention gives, so that it is not run again, ``dots_attention`` the last two.
    """
    rules = jax.checkpoint_policies
    policies = {
        "full": rules.nothing_saveable,
        "dots": rules.dots_saveable,
        "dots_no_batch": rules.dots_with_no_batch_dims_saveable,
        "attention": rules.save_only_these_names(ATTENDED),
        "dots_attention": rules.save_from_both_policies(
            rules.dots_with_no_batch_dims_saveable, rules.save_only_these_names(ATTENDED)
        ),
    }
    if name not in policies:
        raise ConfigError(f"remat policy {name!r} is unknown; choose one of none, {', '.join(policies)}")
    return policies[name]


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes each entry with probability `rate` and rescales the rest; does nothing when `key` is None."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)


def in_slots(x: jax.Array, image: jax.Array, slot: jax.Array, visual: jax.Array) -> jax.Array:
    """`x` [B, T, D]; where `image` [B, T] is not negative, token number `slot` of that image of `visual`.

    `visual` is [B, I, N, D].
    """
    b, i, n, d = visual.shape
    index = jnp.clip(image * n + slot, 0, i * n - 1)
    found = jnp.take_along_axis(visual.reshape(b, i * n, d), index[..., None], axis=1)
    return jnp.where((image >= 0)[..., None], found.astype(x.dtype), x)


def depth_to_space(x: jax.Array, factor: int) -> jax.Array:
    """[..., h, w, f*f*C] -> [..., f*h, f*w, C]; the inverse of :func:`space_to_depth`."""
    *lead, h, w, c = x.shape
    x = x.reshape(*lead, h, w, factor, factor, c // factor**2)
    x = jnp.moveaxis(x, -3, -4)  # h f w f c
    return x.reshape(*lead, h * factor, w * factor, c // factor**2)


def space_to_depth(x: jax.Array, factor: int) -> jax.Array:
    """[..., f*h, f*w, C] -> [..., h, w, f*f*C]; channels ordered (row, column, C)."""
    *lead, h, w, c = x.shape
    x = x.reshape(*lead, h // factor, factor, w // factor, factor, c)
    x = jnp.moveaxis(x, -3, -4)
    return x.reshape(*lead, h // factor, w // factor, factor**2 * c)


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """Activation by its usual name.

    ``gelu`` is the exact one, ``quick_gelu`` x sigmoid(1.702 x), and ``relu2`` relu(x)^2, which costs a CPU
    next to nothing where the others need an exponential (So et al. 2021, arXiv 2109.08668).
    """
    functions = {
        "silu": lean(jax.nn.silu),
        "relu": jax.nn.relu,
        "relu2": lambda x: jnp.square(jax.nn.relu(x)),
        "gelu": lean(lambda x: jax.nn.gelu(x, approximate=False)),
        "gelu_tanh": lean(lambda x: jax.nn.gelu(x, approximate=True)),
        "quick_gelu": lean(lambda x: x * jax.nn.sigmoid(1.702 * x)),
    }
    if name not in functions:
        raise ConfigError(f"activation {name!r} is unknown; choose one of {', '.join(functions)}")
    return functions[name]
