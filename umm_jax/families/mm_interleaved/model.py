"""MM-Interleaved: a language model that reads images and conditions an image decoder. docs/mm_interleaved.md

    pixels --tower--> maps, tokens --visual resampler--> visual tokens in the stream's image slots
    stream --backbone (with synchronizer into the maps)--> hidden states --head--> next token
    hidden states up to a soi, newest first --context, resampler--> condition of the image decoder
    noisy latents --UNet (with synchronizer into the maps of the image before)--> prediction

Letters: B rows, T tokens, I images per row, n slots per image, D backbone width, S context length.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from umm_jax.errors import ConfigError
from umm_jax.families.mm_interleaved.config import ContextConfig, ModelConfig
from umm_jax.models import layers as L
from umm_jax.models import masks
from umm_jax.models.attention import Mask
from umm_jax.models.autoencoder import make_autoencoder
from umm_jax.models.backbone import Backbone, Head
from umm_jax.models.diffusion import Noised
from umm_jax.models.image_loss import block_weights, pool_weights, weighted_mse
from umm_jax.models.losses import cross_entropy, in_turns, next_token_targets, row_likelihood
from umm_jax.models.positions import sincos_1d
from umm_jax.models.resampler import build as make_resampler
from umm_jax.models.sampling import guided, make_schedule
from umm_jax.models.tower import make_tower
from umm_jax.models.unet import UNet
from umm_jax.models.unet_sync import UNetSync
from umm_jax.sharding import by_images, constrain

Batch = dict[str, dict[str, jax.Array]]


class Draws(NamedTuple):
    """All that is random in the image loss, for b images learned from once.

    Attributes:
        posterior, noise: standard normal [b, h, w, c], of the autoencoder's sample and of the diffusion.
        t: times [b]; drop: bool [b], True where the condition is left out.
    """

    posterior: jax.Array
    noise: jax.Array
    t: jax.Array
    drop: jax.Array


class Denoised(NamedTuple):
    """What the image decoder was asked for b images, and what it said: see :meth:`MMInterleaved.denoise`.

    Attributes:
        noised: its input and target; prediction [b, h, w, c].
        condition: [b, S, Dc] after dropping.
        weights: of the latents' errors [b, h, w, 1].
    """

    noised: Noised
    prediction: jax.Array
    condition: jax.Array
    weights: jax.Array


class Context(nnx.Module):
    """The last S hidden states up to a soi, newest first, projected and with their distance from the soi."""

    def __init__(self, config: ContextConfig, width: int, rngs: nnx.Rngs):
        self.config = config
        self.proj = L.Linear(width, width, axes=("embed", None), rngs=rngs) if config.project else None
        learned = config.positions == "learned"
        init = L.normal(config.std)
        self.positions = L.param(rngs, (config.length, width), (None, "embed"), init) if learned else None

    def __call__(
        self, hidden: jax.Array, soi: jax.Array, first: jax.Array, *, fixed: bool = True
    ) -> tuple[jax.Array, jax.Array]:
        """hidden [B, T, D]; soi, first [B, I] columns of the soi and of the conversation's first token.

        Returns:
            [B*I, S, D], zero beyond the conversation, and the mask [B*I, S]; S is the config's `length`, or T
            where that is less and the number need not be `fixed`.
        """
        _, t, d = hidden.shape
        length = self.config.length if fixed else min(self.config.length, t)
        columns = soi[..., None] - jnp.arange(length)
        mask = columns >= first[..., None]
        # Projected before they are copied out for each image, which multiplies them.
        states = hidden if self.proj is None else self.proj(hidden)
        states = _take(states, jnp.maximum(columns, 0))
        if self.positions is not None:
            table = self.positions[...][:length]
        else:
            table = jnp.asarray(sincos_1d(length, d))
        states = jnp.where(mask[..., None], states + table.astype(states.dtype), 0)
        return _rows(states), _rows(mask)


class MMInterleaved(nnx.Module):
    """The assembled family; one code for the toy and the release, see :class:`ModelConfig`."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = c = config
        width = c.backbone.width
        self.embed = L.Embedding(c.backbone.vocab, width, std=c.backbone.embed_std, rngs=rngs)
        self.soi_token = L.param(rngs, (width,), ("embed",), L.zeros)
        self.tower = make_tower(c.tower, rngs=rngs)
        self.visual_resampler = make_resampler(c.visual_resampler, rngs=rngs)
        self.visual_proj = L.Linear(
            c.visual_resampler.d_out, width, axes=(None, "embed"), init=L.normal(c.visual_std), rngs=rngs
        )
        self.backbone = Backbone(c.backbone, rngs)
        self.head = Head(c.backbone, new=c.added_tokens, std=c.head_std, rngs=rngs)
        self.context = Context(c.context, width, rngs)
        self.context_resampler = make_resampler(c.context_resampler, rngs=rngs)
        self.null_condition = L.param(
            rngs, (c.context_tokens, c.unet.context_width), (None, "embed"), L.normal(0.02)
        )
        self.unet = UNet(c.unet, rngs=rngs)
        sync = None
        if c.unet_sync is not None:
            sync = UNetSync(c.unet_sync, c.unet.skip_shapes(), c.unet.mid_shape(), rngs=rngs)
        self.unet_sync = sync
        self.autoencoder = make_autoencoder(c.autoencoder, rngs=rngs)
        self.schedule = make_schedule(c.schedule)

    # --- reading ----------------------------------------------------------------------------------

    def look(self, pixels: jax.Array, key: jax.Array | None = None):
        """Images [B, I, h, w, 3], uint8 or in [0, 1] -> tokens [B, I, n, D] and maps [B, I, h_l, w_l, C]."""
        b, i = pixels.shape[:2]
        tower_key, resampler_key = (None, None) if key is None else jax.random.split(key)
        x = by_images(pixels.reshape(b * i, *pixels.shape[2:]))
        seen = self.tower(_unit(x, self.dtype), key=tower_key)
        tokens, _ = self.visual_resampler(seen.tokens, None, key=resampler_key)
        tokens = L.part("connector")(self.visual_proj)(tokens)
        unfold = lambda a: a.reshape(b, i, *a.shape[1:])  # noqa: E731
        return unfold(tokens), tuple(unfold(m) for m in seen.maps)

    def embed_tokens(self, ids, image=None, slot=None, visual=None) -> jax.Array:
        """Ids [B, T] -> [B, T, D]; where `image` is not negative, that image's visual token number `slot`."""
        x = self.embed(ids, self.dtype)
        x = x + jnp.where((ids == self.config.soi_id)[..., None], self.soi_token[...], 0).astype(x.dtype)
        return x if visual is None else L.in_slots(x, image, slot, visual)

    @property
    def dtype(self):
        """Compute dtype: that of the embedding table, which the training policy casts."""
        return self.embed.table[...].dtype

    def hidden(self, batch: Batch, visual: jax.Array, maps: tuple[jax.Array, ...]) -> jax.Array:
        """Final hidden states [B, T, D] of packed rows: conversations do not see each other."""
        x = constrain(self.embed_tokens(*self.token_inputs(batch), visual), "batch", "sequence", None)
        positions, mask, visible = self.sight(batch)
        return self.backbone(x, positions, mask, features=self.backbone_maps(maps), visible=visible)[0]

    @staticmethod
    def token_inputs(batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Ids, image and slot of each token, [B, T] each."""
        return tuple(batch["tokens"][name] for name in ("ids", "image", "slot"))

    def sight(self, batch: Batch) -> tuple[jax.Array, Mask, jax.Array]:
        """Positions [B, T], and what each token reads: the mask of tokens, and images [B, T, I].

        A token sees the images of its own conversation whose first slot is not after it.
        """
        tokens, images = batch["tokens"], batch["images"]
        segments, columns = tokens["segment_ids"], jnp.arange(tokens["ids"].shape[1])
        same = segments[:, :, None] == images["segment_ids"][:, None]
        begun = images["soi"][:, None] + 1 <= columns[:, None]
        visible = same & (images["segment_ids"] > 0)[:, None] & begun
        if self.config.compat == "release":
            positions = jnp.broadcast_to(columns, segments.shape)
            read = masks.stream((segments > 0).astype(jnp.int32))
            return positions, (read, read), visible
        read = masks.stream(segments)
        return tokens["positions"], (read, read), visible

    def backbone_maps(self, maps: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """The levels the backbone's synchronizer reads (the release leaves out the finest)."""
        sync = self.config.backbone.synchronizer
        return () if sync is None else tuple(m for m in maps if m.shape[-3] in sync.sides)

    # --- drawing ----------------------------------------------------------------------------------

    def condition(self, hidden, soi, first, key: jax.Array | None = None):
        """Condition of the images whose soi stand at `soi` [B, I]: [B*I, S, Dc] and its mask [B*I, S].

        With a `key`, the resampler's dropout acts.
        """
        # A resampler reads any number of states: no more than there are, where the row is shorter.
        fixed = self.config.context_resampler.kind == "none"
        context = self.context(hidden, soi, first, fixed=fixed)
        condition, mask = self.context_resampler(*context, key=key)
        return condition, jnp.ones(condition.shape[:2], bool) if mask is None else mask

    def predict(self, x, t, condition, mask, values, visible) -> jax.Array:
        """The UNet with the synchronizer: x [b, h, w, c], t [b]; `values` of :meth:`_sync_values`."""
        sync = None
        if values is not None:
            sync = lambda skips, mid: self.unet_sync(skips, mid, values, visible)  # noqa: E731
        return self.unet(x, t, condition, mask, sync)

    def _sync_values(self, maps) -> list[jax.Array] | None:
        """What the decoder's synchronizer samples of the maps [b, N, h, w, C] of the images it may see."""
        return None if self.unet_sync is None else self.unet_sync.project(maps)

    def sample(self, condition, mask, maps, visible, keys, guidance, *, steps: int):
        """Draws an image per condition: uint8 [b, side, side, 3], and whether all of it is numbers, bool [b].

        See :meth:`paint`.
        """
        pixels = self.paint(condition, mask, maps, visible, keys, guidance, steps=steps)
        finite = jnp.all(jnp.isfinite(pixels), axis=(1, 2, 3))
        return jnp.round(pixels * 255).astype(jnp.uint8), finite

    def paint(self, condition, mask, maps, visible, keys, guidance, *, steps: int, **given) -> jax.Array:
        """Draws an image per condition: float32 [b, side, side, 3] in [0, 1].

        Args:
            condition, mask: of :meth:`condition`.
            maps: [b, N, h, w, C] a level, of images that may be looked at where `visible` [b, N].
            guidance: scale; None is one branch. given: noise to use in place of drawing it, see the schedule.
        """
        shape = (condition.shape[0], *self.config.latent_shape)
        values = self._sync_values(maps)
        if guidance is not None:
            null = jnp.broadcast_to(self.null_condition[...].astype(condition.dtype), condition.shape)

        def predict(x, t):
            x = x.astype(self.dtype)
            out = self.predict(x, t, condition, mask, values, visible)
            if guidance is not None:
                # The synchronizer sees the same features in both branches (section 9).
                free = self.predict(x, t, null, jnp.ones_like(mask), values, visible)
                out = guided(out, free, guidance)
            return out.astype(jnp.float32)

        latents = self.schedule.sample(predict, shape, keys, steps, **given)
        pixels = self.autoencoder.decode(latents.astype(self.dtype)).astype(jnp.float32)
        return jnp.clip(pixels / 2 + 0.5, 0, 1)

    # --- learning ---------------------------------------------------------------------------------

    def loss_weights(self, batch: Batch) -> dict[str, jax.Array]:
        """Denominators of the losses: they depend on the data alone."""
        _, weight = next_token_targets(batch["tokens"])
        return {"text": jnp.sum(weight), "image": self._image_count(batch)}

    def loss_sums(self, batch: Batch, key: jax.Array):
        """Numerators of the losses, and metrics as (sum, weight) pairs."""
        look_key, image_key, dropout_key = jax.random.split(key, 3)
        visual, maps = self.look(batch["images"]["pixels"], look_key)
        hidden = self.hidden(batch, visual, maps)
        targets, weight = next_token_targets(batch["tokens"])
        nll, hits = cross_entropy(hidden, self.head, targets, weight, chunk=self.config.loss_chunk)
        drawn = self.drawn(batch)
        draws = self.draw(drawn["draw"].size, image_key)
        image = self.image_error(drawn, hidden, maps, draws, dropout_key) / self.config.noise_draws
        metrics = {
            "text_accuracy": (hits, jnp.sum(weight)),
            "images_per_row": (jnp.sum(drawn["draw"]), jnp.float32(len(weight))),
        }
        return {"text": nll, "image": image}, metrics

    def text_likelihood(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """-log p of each row's learned texts, and whether they are the greedy ones: [B], bool [B]."""
        hidden = self.hidden(batch, *self.look(batch["images"]["pixels"]))
        return row_likelihood(hidden, self.head, *next_token_targets(batch["tokens"]))

    def autoencoder_weights(self, batch: Batch) -> dict[str, jax.Array]:
        """As :meth:`loss_weights`, where the autoencoder alone is trained: the batch's real images."""
        return {"autoencoder": jnp.sum(batch["images"]["segment_ids"] > 0)}

    def autoencoder_sums(self, batch: Batch, key: jax.Array):
        """As :meth:`loss_sums`, where the autoencoder alone is trained."""
        images = batch["images"]
        real = _rows(images["segment_ids"] > 0).astype(jnp.float32)
        pixels = _signed(_rows(images.get("target", images["pixels"]))).astype(self.dtype)
        losses, parts = self.autoencoder.losses(pixels, key)
        metrics = {name: (jnp.sum(values * real), jnp.sum(real)) for name, values in parts.items()}
        return {"autoencoder": jnp.sum(losses * real)}, metrics

    def drawn(self, batch: Batch) -> dict[str, jax.Array]:
        """The images the decoder is run on, K of each row.

        With ``max_drawn``, the last K drawn ones: no work for images that are only shown.

        Returns:
            [B, K] each: `index` among the row's images; `soi` and `first`, columns of the soi and of the
            conversation's first token; `draw`, its weight. `target` [B, K, h, w, 3]. Of the N earlier images
            it may look at, oldest first, [B, K, N] each: `earlier`, their indices, and `seen`, bool;
            `target_before`, as `target`, of the last of them.
        """
        images, positions = batch["images"], batch["tokens"]["positions"]
        segments, pixels = images["segment_ids"], images.get("target", images["pixels"])
        count = segments.shape[1]
        keep = min(self.config.max_drawn or count, count)
        columns = jnp.arange(count)
        # An image whose context is bos and soi alone is nobody's answer to anything: it is not learned.
        position = jnp.take_along_axis(positions, images["soi"], axis=1)
        draw = images["draw"] * (position > 1)
        _, index = jax.lax.top_k((draw > 0) * (1 + columns), keep)
        index = jnp.sort(index, axis=1)
        soi, draw, position = (_take(x, index) for x in (images["soi"], draw, position))
        earlier = index[..., None] - jnp.arange(self.looks_back(count), 0, -1)
        own = _take(segments, index)[..., None]
        seen = (earlier >= 0) & (own > 0) & (_take(segments, earlier % count) == own)
        return {
            "index": index,
            "soi": soi,
            "first": soi - position,
            "draw": draw,
            "earlier": earlier % count,
            "seen": seen,
            "target": _take(pixels, index),
            "target_before": _take(pixels, earlier[..., -1] % count),
        }

    def looks_back(self, count: int) -> int:
        """At how many earlier images the decoder looks, in a row of `count`."""
        if self.config.decoder_images == "previous" or self.config.unet_sync is None:
            return 1
        return max(1, min(count, self.config.unet_sync.max_images) - 1)

    def draw(self, count: int, key: jax.Array) -> Draws:
        """Draws for `count` images, each learned from ``noise_draws`` times."""
        posterior, times, noise, drop = jax.random.split(key, 4)
        draws, shape = count * self.config.noise_draws, self.config.latent_shape
        return Draws(
            jax.random.normal(posterior, (count, *shape)),
            jax.random.normal(noise, (draws, *shape)),
            self.schedule.draw_times(times, draws),
            jax.random.bernoulli(drop, self.config.uncond_prob, (draws,)),
        )

    def image_error(self, drawn, hidden, maps, draws: Draws, key=None) -> jax.Array:
        """Sum of weighted squared errors of all images of :meth:`drawn`, arguments as of :meth:`denoise`.

        With ``draw_chunk``, so many images of each row at a time.
        """

        def error(drawn, draws, key):
            told = self.denoise(drawn, hidden, maps, draws, key)
            return jnp.sum(weighted_mse(told.prediction, told.noised.target, told.weights)[0])

        (rows, count), chunk = drawn["draw"].shape, self.config.draw_chunk
        if chunk is None or chunk >= count:
            return error(drawn, draws, key)
        if count % chunk:
            raise ConfigError(
                f"config.model.draw_chunk is {chunk}, which does not divide the {count} images of a row that "
                "the decoder learns from (data.images, or model.max_drawn)"
            )
        turns = count // chunk

        def cut(x, shape):
            x = jnp.moveaxis(x.reshape(rows, turns, -1, *x.shape[len(shape) :]), 1, 0)
            return constrain(x, None, "batch", *(None,) * (x.ndim - 2))

        def turn(given):
            drawn, draws, index = given
            own = None if key is None else jax.random.fold_in(key, index)
            return error(drawn, Draws(*map(_rows, draws)), own)

        chunks = jax.tree.map(lambda x: cut(x, (rows, count)), drawn)
        draws = jax.tree.map(lambda x: cut(x, (rows * count,)), draws)
        return in_turns(turn, (chunks, draws, jnp.arange(turns)))

    def denoise(self, drawn: dict[str, jax.Array], hidden, maps, draws: Draws, key=None) -> Denoised:
        """Runs the image decoder once on every image of :meth:`drawn`, noised as `draws` say.

        Args:
            hidden: final states [B, T, D]; maps: of the rows' images, [B, I, h, w, C] a level.
            key: for the dropout of the context resampler; None for none.
        """
        pixels = _signed(_rows(drawn["target"])).astype(self.dtype)
        latents = jax.lax.stop_gradient(self.autoencoder.encode(pixels, draws.posterior))
        given = (latents, self._image_weights(drawn), *self.decoder_inputs(drawn, hidden, maps, key))
        again = lambda x: by_images(jnp.repeat(x, self.config.noise_draws, axis=0))  # noqa: E731
        latents, weights, condition, mask, values, seen = jax.tree.map(again, given)
        if self.config.uncond_prob:
            null = self.null_condition[...].astype(condition.dtype)
            condition = jnp.where(draws.drop[:, None, None], null, condition)
            mask = mask | draws.drop[:, None]
        noised = self.schedule.at(latents.astype(jnp.float32), draws.noise, draws.t)
        out = self.predict(by_images(noised.x_t.astype(self.dtype)), noised.t, condition, mask, values, seen)
        return Denoised(noised, out, condition, weights)

    def decoder_inputs(self, drawn: dict[str, jax.Array], hidden, maps, key=None):
        """Condition, its mask, the synchronizer's values and what may be seen, for the B*K images."""
        condition, mask = self.condition(hidden, drawn["soi"], drawn["first"], key)
        return condition, mask, self._earlier_values(drawn["earlier"], maps), _rows(drawn["seen"])

    def _earlier_values(self, earlier: jax.Array, maps) -> list[jax.Array] | None:
        """What the decoder's synchronizer samples of the images `earlier` [B, K, N], for each of B*K."""
        if earlier.shape[-1] == 1:
            return self._sync_values(tuple(_rows(_take(m, earlier)) for m in maps))
        # Many drawn images share what they see: projected once per image of the row, then handed out.
        values = self._sync_values(maps)
        return None if values is None else [_rows(_take(v, earlier)) for v in values]

    def _image_weights(self, drawn: dict[str, jax.Array]) -> jax.Array:
        """Weights of the latents' errors [B*K, h, w, 1]; zero for images that are not drawn."""
        c, target = self.config, _signed(_rows(drawn["target"]))
        if c.image_loss is None:
            weights = jnp.ones((*target.shape[:3], 1), jnp.float32)
        else:
            weights = block_weights(
                target,
                _signed(_rows(drawn["target_before"])),
                _rows(drawn["seen"][..., -1]),
                block=c.image_loss.block,
                detail=c.image_loss.detail,
                change=c.image_loss.change,
            )
        weights = pool_weights(weights, c.latent_shape[:2])
        return weights * _rows(drawn["draw"])[:, None, None, None]

    def _image_count(self, batch: Batch) -> jax.Array:
        """The sum of weights the image loss is divided by."""
        if self.config.compat == "release":
            side, other, _ = self.config.latent_shape
            return side * other * jnp.sum(batch["images"]["segment_ids"] > 0).astype(jnp.float32)
        return jnp.sum(self._image_weights(self.drawn(batch)))


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
    """x [B, I, ...] at index [B, ...] -> [B, ..., ...]."""
    # Row by row, as the compiler is to split it: of one gather over all rows it would gather all rows first.
    return jax.vmap(lambda row, at: row[at])(x, index)


def _rows(x: jax.Array) -> jax.Array:
    """[B, K, ...] -> [B*K, ...]."""
    return by_images(x.reshape(-1, *x.shape[2:]))


def _unit(pixels: jax.Array, dtype=jnp.float32) -> jax.Array:
    """uint8, or already in [0, 1], -> [0, 1]."""
    whole = jnp.issubdtype(pixels.dtype, jnp.integer)
    return pixels.astype(dtype) / 255 if whole else pixels.astype(dtype)


def _signed(pixels: jax.Array) -> jax.Array:
    """uint8, or already in [0, 1], -> float32 in [-1, 1]."""
    whole = jnp.issubdtype(pixels.dtype, jnp.integer)
    return pixels.astype(jnp.float32) / 127.5 - 1 if whole else 2 * pixels.astype(jnp.float32) - 1


def build(config: ModelConfig, rngs: nnx.Rngs) -> MMInterleaved:
    """The family's module with fresh parameters."""
    return MMInterleaved(config, rngs)
