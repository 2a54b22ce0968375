"""ChatUMM: a dialogue of text and images is one stream, through one mixture of transformers. docs/chatumm.md

    words, brackets --embedding-------------------------------> understanding tokens
    patches --vision encoder, connector, + positions----------> understanding tokens
    pixels --autoencoder--> latents, noised or not, + time, + positions --> generation tokens
    both --mixture of transformers--> hidden states
    understanding --head--> next word, and what comes next;  generation --linear--> velocity of the latents

Letters: B rows, U understanding and G generation tokens, I images, P patches, D width, d numbers of a latent
token.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from umm_jax.families.chatumm.config import ModelConfig
from umm_jax.models import layers as L
from umm_jax.models.autoencoder import make_autoencoder
from umm_jax.models.backbone import Head
from umm_jax.models.flow import Flow
from umm_jax.models.image_loss import block_weights, pool_weights
from umm_jax.models.losses import row_likelihood, token_losses
from umm_jax.models.masks import MaskSpec, joined
from umm_jax.models.mot import MixtureOfTransformers
from umm_jax.models.navit import NaViT
from umm_jax.models.positions import sincos_1d
from umm_jax.models.sampling import make_schedule
from umm_jax.models.unet_blocks import TimeEmbedding
from umm_jax.sharding import by_images, constrain

Batch = dict[str, dict[str, jax.Array]]


class Draws(NamedTuple):
    """All that is random in a row's losses.

    Attributes:
        posterior: standard normal [B, I, h', w', c], of the autoencoder's samples.
        noise: standard normal [B, G, d], of the flow. t: times of the images [B, I].
    """

    posterior: jax.Array
    noise: jax.Array
    t: jax.Array


class Read(NamedTuple):
    """What the mixture made of a batch.

    Attributes:
        embedded: what went in, hidden: what came out, [B, U, D] and [B, G, D] each.
        noised, target: latents that went in, and what was to be said of them, [B, G, d].
        prediction: what was said, [B, G, d].
    """

    embedded: tuple[jax.Array, jax.Array]
    hidden: tuple[jax.Array, jax.Array]
    noised: jax.Array
    target: jax.Array
    prediction: jax.Array


class Places:
    """A fixed table of positions of a square grid: entry row * side + column is [column half, row half].

    Each half is a sin-cos table of one axis (spec 2.3). Looked up by axis: the whole table is never made.
    """

    def __init__(self, side: int, width: int):
        self.side, self.axis = side, sincos_1d(side, width // 2)

    def __call__(self, place: jax.Array, dtype=jnp.float32) -> jax.Array:
        """int [...] -> [..., width]."""
        axis = jnp.asarray(self.axis, dtype)
        return jnp.concatenate([axis[place % self.side], axis[place // self.side]], axis=-1)


class Connector(nnx.Module):
    """Vision tokens to the decoder's width: linear, GELU (tanh), linear."""

    def __init__(self, d_in: int, hidden: int, d_out: int, rngs: nnx.Rngs):
        self.up = L.Linear(d_in, hidden, axes=("embed", "mlp"), rngs=rngs)
        self.down = L.Linear(hidden, d_out, axes=("mlp", "embed"), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(L.activation("gelu_tanh")(self.up(x)))


class ChatUMM(nnx.Module):
    """The assembled family; one code for the toy and the release, see :class:`ModelConfig`."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = c = config
        width = c.mixture.width
        self.embed = L.Embedding(c.vocab, width, std=c.mixture.embed_std, rngs=rngs)
        self.vision = NaViT(c.vision, rngs=rngs)
        self.connector = Connector(c.vision.width, c.connector or width, width, rngs)
        self.latent_in = L.Linear(c.latent_numbers, width, axes=(None, "embed"), rngs=rngs)
        self.time = TimeEmbedding(c.time_width, width, rngs=rngs)
        self.mixture = MixtureOfTransformers(c.mixture, rngs)
        self.head = Head(c.mixture, std=c.head_std, bias=False, rngs=rngs)
        # Nothing is said of the latents at the start, as in the reference.
        self.latent_out = L.Linear(width, c.latent_numbers, axes=("embed", None), init=L.zeros, rngs=rngs)
        self.autoencoder = make_autoencoder(c.autoencoder, rngs=rngs)
        self.flow: Flow = make_schedule(c.schedule)
        self.latent_places = Places(c.layout.latent_grid, width)
        self.vision_places = Places(c.layout.vision_grid, width)

    @property
    def dtype(self):
        """Compute dtype: that of the embedding table, which the training policy casts."""
        return self.embed.table[...].dtype

    # --- what goes in -----------------------------------------------------------------------------

    def look(self, pixels: jax.Array, place: jax.Array, image: jax.Array) -> jax.Array:
        """Patches as understanding tokens [B, P, D].

        Args:
            pixels: [B, P, numbers], uint8 or in [-1, 1]; place, image: [B, P], see :class:`NaViT`.
        """
        tokens = L.part("connector")(self.connector)(self.vision(_signed(pixels, self.dtype), place, image))
        return tokens + self.config.positions * self.vision_places(place, tokens.dtype)

    def understanding(self, ids: jax.Array, patch: jax.Array, looked: jax.Array | None) -> jax.Array:
        """Ids [B, U] -> [B, U, D]; where `patch` is not negative, that token of `looked` [B, P, D]."""
        x = self.embed(ids, self.dtype)
        if looked is None:
            return x
        seen = jnp.take_along_axis(looked, jnp.maximum(patch, 0)[..., None], axis=1)
        return jnp.where((patch >= 0)[..., None], seen.astype(x.dtype), x)

    def latents(self, pixels: jax.Array, size: jax.Array, noise: jax.Array | None) -> jax.Array:
        """Canvases [B, I, h, w, 3], uint8 or in [-1, 1], to latents [B, I, h', w', c].

        Args:
            size: pixels of each picture on its canvas [B, I, 2]. noise: see ``Posterior.sample``.
        """
        b, i = pixels.shape[:2]
        flat = lambda a: None if a is None else a.reshape(b * i, *a.shape[2:])  # noqa: E731
        x = by_images(_signed(flat(pixels), self.dtype))
        size = None if self.config.compat == "release" else flat(size)
        found = self.autoencoder.encode(x, flat(noise), size)
        return jax.lax.stop_gradient(found).reshape(b, i, *found.shape[1:])

    def cells(self, latents: jax.Array, image: jax.Array, cell: jax.Array) -> jax.Array:
        """The latent tokens [B, G, d] at `cell` of the canvas of `image`, [B, G] each."""
        tokens = L.space_to_depth(latents, self.config.latent_patch)
        b, i, h, w, d = tokens.shape
        at = jnp.maximum(image, 0) * (h * w) + cell
        return jnp.take_along_axis(tokens.reshape(b, i * h * w, d), at[..., None], axis=1)

    @L.part("connector")
    def generation(self, latents: jax.Array, place: jax.Array, time: jax.Array) -> jax.Array:
        """Latent tokens [B, G, d] as generation tokens [B, G, D]; `time` [B, G, D] of :meth:`times`."""
        x = self.latent_in(latents.astype(self.dtype)) + time.astype(self.dtype)
        return x + self.config.positions * self.latent_places(place, x.dtype)

    @L.part("connector")
    def times(self, t: jax.Array) -> jax.Array:
        """Times [...] -> [..., D]."""
        return self.time(t.reshape(-1)).reshape(*t.shape, -1)

    @L.part("connector")
    def velocity(self, hidden: jax.Array) -> jax.Array:
        """Hidden states of generation tokens -> what the flow asks, [..., d] in float32."""
        return self.latent_out(hidden).astype(jnp.float32)

    # --- the whole stream ---------------------------------------------------------------------------

    def read(self, batch: Batch, draws: Draws) -> Read:
        """Runs a batch of packed rows."""
        tokens, latents, images = batch["tokens"], batch["latents"], batch["images"]
        clean = self.cells(
            self.latents(images["pixels"], images["size"], draws.posterior), latents["image"], latents["cell"]
        ).astype(jnp.float32)
        slot = latents["time"]
        noisy = (slot >= 0) & (latents["segment_ids"] > 0)
        t = jnp.where(noisy, jnp.take_along_axis(draws.t, jnp.maximum(slot, 0), axis=1), 0.0)
        made = self.flow.at(*(a.reshape(-1, *a.shape[2:]) for a in (clean, draws.noise)), t.reshape(-1))
        noised, target = (a.reshape(clean.shape) for a in (made.x_t, made.target))
        looked = None
        if batch["patches"]["place"].shape[1]:
            patches = batch["patches"]
            looked = self.look(patches["pixels"], patches["place"], patches["image"] + 1)
        # One embedding of time for each image, and one for all that is clean.
        b = len(slot)
        embedded = self.times(jnp.concatenate([jnp.zeros((b, 1)), draws.t], axis=1))
        time = jnp.take_along_axis(embedded, (jnp.where(noisy, slot, -1) + 1)[..., None], axis=1)
        xs = (
            self.understanding(tokens["ids"], tokens["patch"], looked),
            self.generation(noised, latents["place"], time),
        )
        xs = tuple(constrain(x, "batch", "sequence", None) for x in xs)
        mask = joined(mask_of(tokens), mask_of(latents))
        hidden, _ = self.mixture(xs, (tokens["rope"], latents["rope"]), (mask, mask))
        return Read(xs, hidden, noised, target, self.velocity(hidden[1]))

    def draw(self, batch: Batch, key: jax.Array) -> Draws:
        """Everything random of a training step."""
        c, slot = self.config, batch["latents"]["time"]
        b, i = batch["images"]["segment_ids"].shape
        posterior, noise, times = jax.random.split(key, 3)
        return Draws(
            jax.random.normal(posterior, (b, i, *c.latent_shape)),
            jax.random.normal(noise, (*slot.shape, c.latent_numbers)),
            self.flow.draw_times(times, b * i).reshape(b, i),
        )

    def still(self, batch: Batch) -> Draws:
        """Draws without chance: pictures are the means of their posteriors, and no target is made noisy."""
        shapes = jax.eval_shape(lambda: self.draw(batch, jax.random.key(0)))
        return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    # --- learning ---------------------------------------------------------------------------------

    def loss_weights(self, batch: Batch) -> dict[str, jax.Array]:
        """Denominators of the losses: they depend on the data alone."""
        return {"text": jnp.sum(batch["tokens"]["weight"]), "image": jnp.sum(self._latent_weights(batch))}

    def loss_sums(self, batch: Batch, key: jax.Array):
        """Numerators of the losses, and metrics as (sum, weight) pairs.

        What comes next is learned as words are, and reported apart, as there are few of it.
        """
        tokens, read = batch["tokens"], self.read(batch, self.draw(batch, key))
        label, weight = jnp.maximum(tokens["label"], 0), tokens["weight"]
        chunk = self.config.loss_chunk
        nll, hits = token_losses(read.hidden[0], self.head, label, chunk=chunk, needed=weight > 0)
        error = jnp.mean((read.prediction - read.target) ** 2, axis=-1)
        control = tokens["control"].astype(jnp.float32)
        words, next_ = weight * (1 - control), weight * control
        metrics = {
            "text_accuracy": (jnp.sum(hits * words), jnp.sum(words)),
            "control_loss": (jnp.sum(nll * next_), jnp.sum(next_)),
            "control_accuracy": (jnp.sum(hits * next_), jnp.sum(next_)),
        }
        sums = {"text": jnp.sum(nll * weight), "image": jnp.sum(error * self._latent_weights(batch))}
        return sums, metrics

    def text_likelihood(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """-log p of each row's learned texts and of what comes next, and whether they are the greedy ones.

        [B], bool [B].
        """
        tokens, read = batch["tokens"], self.read(batch, self.still(batch))
        return row_likelihood(read.hidden[0], self.head, jnp.maximum(tokens["label"], 0), tokens["weight"])

    def autoencoder_weights(self, batch: Batch) -> dict[str, jax.Array]:
        """As :meth:`loss_weights`, where the autoencoder alone is trained: the batch's real images."""
        return {"autoencoder": jnp.sum(batch["images"]["segment_ids"] > 0)}

    def autoencoder_sums(self, batch: Batch, key: jax.Array):
        """As :meth:`loss_sums`, where the autoencoder alone is trained."""
        images = batch["images"]
        real = (images["segment_ids"] > 0).reshape(-1).astype(jnp.float32)
        pixels = images["pixels"].reshape(-1, *images["pixels"].shape[2:])
        size = None if self.config.compat == "release" else images["size"].reshape(-1, 2)
        losses, parts = self.autoencoder.losses(_signed(pixels, self.dtype), key, size)
        metrics = {name: (jnp.sum(values * real), jnp.sum(real)) for name, values in parts.items()}
        return {"autoencoder": jnp.sum(losses * real)}, metrics

    def _latent_weights(self, batch: Batch) -> jax.Array:
        """Weight of each latent token's error [B, G]: 0 where nothing is learned."""
        latents, extra = batch["latents"], self.config.image_loss
        if extra is None:
            return latents["weight"]
        images = batch["images"]
        b, i = images["segment_ids"].shape
        flat = lambda a: a.reshape(b * i, *a.shape[2:])  # noqa: E731
        pixels = _signed(images["pixels"], jnp.float32)
        before = jnp.roll(pixels, 1, axis=1)
        earlier = (images["positions"] > 0) & (images["segment_ids"] > 0)
        maps = block_weights(
            flat(pixels),
            flat(before),
            flat(earlier),
            block=extra.block,
            detail=extra.detail,
            change=extra.change,
        )
        side = self.config.layout.latent.most_cells
        maps = pool_weights(maps, (side, side)).reshape(b, i, side, side, 1)
        at = jnp.maximum(latents["image"], 0) * side**2 + latents["cell"]
        return latents["weight"] * jnp.take_along_axis(maps.reshape(b, -1), at, axis=1)


def mask_of(axis: dict[str, jax.Array]) -> MaskSpec:
    """What the mask needs of the tokens of one axis of a batch."""
    return MaskSpec(*(axis[name] for name in ("segment_ids", "split", "mode", "order")))


def _signed(pixels: jax.Array, dtype) -> jax.Array:
    """uint8, or already in [-1, 1], -> [-1, 1]."""
    if jnp.issubdtype(pixels.dtype, jnp.integer):
        return (pixels.astype(jnp.float32) / 127.5 - 1).astype(dtype)
    return pixels.astype(dtype)


def build(config: ModelConfig, rngs: nnx.Rngs) -> ChatUMM:
    """The family's module with fresh parameters."""
    return ChatUMM(config, rngs)
