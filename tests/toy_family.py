"""A family small enough to compile in a second, with every kind of parameter the trainer tells apart."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from umm_jax import config, sharding
from umm_jax.models import layers

VOCAB, TOKENS, IMAGES, SIDE = 32, 8, 2, 4


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    width: int = 16
    depth: int = 2
    noise: bool = True


class Block(nnx.Module):
    def __init__(self, width, rngs):
        self.norm = layers.RMSNorm(width, rngs=rngs)
        self.up = layers.Linear(width, 2 * width, rngs=rngs)
        self.down = layers.Linear(2 * width, width, axes=("mlp", "embed"), rngs=rngs)

    def __call__(self, x):
        return x + self.down(jax.nn.silu(self.up(self.norm(x))))


class Autoencoder(nnx.Module):
    def __init__(self, width, rngs):
        self.encode = layers.Conv(3, width, rngs=rngs)
        self.decode = layers.Conv(width, 3, rngs=rngs)

    def __call__(self, x):
        return self.decode(jnp.tanh(self.encode(x)))


class Model(nnx.Module):
    """Predicts each token from the one before it, and each image from its noisy self."""

    def __init__(self, cfg, rngs):
        self.cfg = cfg
        self.embedding = layers.Embedding(VOCAB, cfg.width, rngs=rngs)
        self.position = layers.param(rngs, (TOKENS, cfg.width), (None, "embed"), layers.normal(0.02))
        self.blocks = layers.stack(lambda r: Block(cfg.width, r), cfg.depth, rngs)
        self.head = layers.Linear(cfg.width, VOCAB, axes=("embed", "vocab"), rngs=rngs)
        self.denoise = layers.Conv(3, 3, rngs=rngs)
        self.autoencoder = Autoencoder(8, rngs)

    def loss_weights(self, batch):
        return {
            "text": jnp.sum(batch["tokens"]["loss"]),
            "image": jnp.sum(batch["images"]["segment_ids"] > 0) * float(SIDE * SIDE * 3),
        }

    def scores(self, batch):
        dtype = self.embedding.table[...].dtype
        ids = batch["tokens"]["ids"]
        x = self.embedding(ids, dtype) + self.position[...].astype(dtype)
        x = sharding.constrain(x, "batch", None, "embed")
        x, _ = layers.scan(self.blocks, lambda layer, x, _: (layer(x), None), x)
        return jax.nn.log_softmax(self.head(x).astype(jnp.float32))

    def text_likelihood(self, batch):
        scores, wanted, counted = self.scores(batch), batch["tokens"]["targets"], batch["tokens"]["loss"] > 0
        nll = -jnp.take_along_axis(scores, wanted[..., None], -1)[..., 0]
        greedy = (jnp.argmax(scores, -1) == wanted) | ~counted
        return jnp.sum(nll * counted, axis=1), jnp.all(greedy, axis=1)

    def loss_sums(self, batch, key):
        scores, dtype = self.scores(batch), self.embedding.table[...].dtype
        wanted = batch["tokens"]["targets"]
        nll = -jnp.take_along_axis(scores, wanted[..., None], -1)[..., 0]
        weight = batch["tokens"]["loss"]
        pixels = batch["images"]["pixels"]
        noisy = pixels
        if self.cfg.noise:
            noisy = pixels + 0.1 * jax.random.normal(key, pixels.shape)
        error = (self.denoise(noisy.astype(dtype)).astype(jnp.float32) - pixels) ** 2
        real = (batch["images"]["segment_ids"] > 0)[..., None, None, None]
        hits = (jnp.argmax(scores, -1) == wanted) * weight
        return (
            {"text": jnp.sum(nll * weight), "image": jnp.sum(error * real)},
            {"accuracy": (jnp.sum(hits), jnp.sum(weight))},
        )

    def autoencoder_weights(self, batch):
        return {"autoencoder": jnp.sum(batch["images"]["segment_ids"] > 0)}

    def autoencoder_sums(self, batch, key):
        pixels, real = batch["images"]["pixels"], batch["images"]["segment_ids"] > 0
        error = jnp.mean((self.autoencoder(pixels) - pixels) ** 2, axis=(2, 3, 4))
        total = jnp.sum(jnp.where(real, error, 0))
        return {"autoencoder": total}, {"mse": (total, jnp.sum(real))}


def build(cfg, rngs):
    return Model(cfg, rngs)


FAMILY = types.SimpleNamespace(
    config=types.SimpleNamespace(ModelConfig=ModelConfig), model=types.SimpleNamespace(build=build)
)


def quick_compiles():
    """For tests (as a fixture): compile plainly. Programs this small take longer to optimise than to run."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


class Loader:
    """Endless batches that depend on their number only; the state is the number of the next one."""

    def __init__(self, rows, seed=0):
        self.rows, self.seed, self.next = rows, seed, 0

    def __iter__(self):
        return self

    def __next__(self):
        batch = make_batch(self.rows, self.seed * 1_000_003 + self.next)
        self.next += 1
        return batch

    def get_state(self):
        return {"next": self.next}

    def set_state(self, state):
        self.next = state["next"]


def make_batch(rows, seed):
    """Rows of unequal length, so that averaging microbatch means would not give the mean of the batch."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(1, VOCAB, (rows, TOKENS + 1)).astype(np.int32)
    ids[:, 1::2] = (ids[:, 0::2][:, : ids[:, 1::2].shape[1]] * 3) % VOCAB  # every other token is predictable
    real = np.arange(TOKENS)[None] < rng.integers(1, TOKENS + 1, (rows, 1))
    images = np.arange(IMAGES)[None] < rng.integers(0, IMAGES + 1, (rows, 1))
    return {
        "tokens": {
            "ids": ids[:, :-1] * real,
            "targets": ids[:, 1:],
            "loss": real.astype(np.float32),
            "segment_ids": real.astype(np.int32),
            "positions": np.broadcast_to(np.arange(TOKENS, dtype=np.int32), (rows, TOKENS)).copy(),
        },
        "images": {
            "pixels": rng.normal(size=(rows, IMAGES, SIDE, SIDE, 3)).astype(np.float32),
            "segment_ids": images.astype(np.int32),
            "positions": np.broadcast_to(np.arange(IMAGES, dtype=np.int32), (rows, IMAGES)).copy(),
        },
    }


def run_config(**sections):
    """A RunConfig for the toy; ``run_config(train={"steps": 3})`` overrides fields of sections."""
    values = {
        "family": "toy",
        "model": {},
        "data": {"batch_size": 8, "tokens": TOKENS, "images": IMAGES},
        "mesh": {"data": 1, "fsdp": 1, "tensor": 1},
        "optim": {"lr": 1e-2, "schedule": "constant", "warmup": 0},
        "train": {"steps": 4, "log_every": 2, "save_every": 100},
    }
    for name, fields in sections.items():
        values[name] = {**values[name], **fields} if isinstance(fields, dict) else fields
    return config.from_dict(config.RunConfig, values)
