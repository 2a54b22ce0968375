"""MM-Interleaved: a language model that reads images and conditions an image decoder (spec sections 0 to 6).

    pixels --tower--> maps, tokens --visual resampler--> visual tokens in the stream's image slots
    stream --backbone (with synchronizer into the maps)--> hidden states --head--> next token
    hidden states up to a soi, newest first --context, resampler--> condition of the image decoder
    noisy latents --UNet (with synchronizer into the maps of the image before)--> prediction

Letters: B rows, T tokens, I images per row, n slots per image, D backbone width, S context length.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from umm_jax.families.mm_interleaved.config import ContextConfig, ModelConfig
from umm_jax.models import layers as L
from umm_jax.models.autoencoder import make_autoencoder
from umm_jax.models.backbone import Backbone, Head
from umm_jax.models.image_loss import block_weights, pool_weights, weighted_mse
from umm_jax.models.losses import cross_entropy, next_token_targets
from umm_jax.models.positions import sincos_1d
from umm_jax.models.resampler import build as make_resampler
from umm_jax.models.sampling import guided, make_schedule
from umm_jax.models.tower import make_tower
from umm_jax.models.unet import UNet
from umm_jax.models.unet_sync import UNetSync
from umm_jax.sharding import constrain

Batch = dict[str, dict[str, jax.Array]]


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
        b, t, d = hidden.shape
        length = self.config.length if fixed else min(self.config.length, t)
        columns = soi[..., None] - jnp.arange(length)
        mask = columns >= first[..., None]
        rows = jnp.arange(b)[:, None, None]
        # Projected before they are copied out for each image, which multiplies them.
        states = hidden if self.proj is None else self.proj(hidden)
        states = states[rows, jnp.maximum(columns, 0)]
        if self.positions is not None:
            table = self.positions[...][:length]
        else:
            table = jnp.asarray(sincos_1d(length, d))
        states = jnp.where(mask[..., None], states + table.astype(states.dtype), 0)
        return states.reshape(-1, *states.shape[2:]), mask.reshape(-1, mask.shape[-1])


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
        """Images [B, I, h, w, 3] uint8 -> visual tokens [B, I, n, D] and maps [B, I, h_l, w_l, C] a level."""
        b, i = pixels.shape[:2]
        tower_key, resampler_key = (None, None) if key is None else jax.random.split(key)
        x = constrain(pixels.reshape(b * i, *pixels.shape[2:]), "batch", None, None, None)
        seen = self.tower(x.astype(self.dtype) / 255, key=tower_key)
        tokens, _ = self.visual_resampler(seen.tokens, None, key=resampler_key)
        tokens = self.visual_proj(tokens)
        unfold = lambda a: a.reshape(b, i, *a.shape[1:])  # noqa: E731
        return unfold(tokens), tuple(unfold(m) for m in seen.maps)

    def embed_tokens(self, ids, image=None, slot=None, visual=None) -> jax.Array:
        """Ids [B, T] -> [B, T, D]; where `image` is not negative, that image's visual token number `slot`."""
        x = self.embed(ids, self.dtype)
        x = x + jnp.where((ids == self.config.soi_id)[..., None], self.soi_token[...], 0).astype(x.dtype)
        if visual is None:
            return x
        b, i, n, d = visual.shape
        flat = visual.reshape(b, i * n, d)
        index = jnp.clip(image * n + slot, 0, i * n - 1)
        slots = jnp.take_along_axis(flat, index[..., None], axis=1)
        return jnp.where((image >= 0)[..., None], slots.astype(x.dtype), x)

    @property
    def dtype(self):
        """Compute dtype: that of the embedding table, which the training policy casts."""
        return self.embed.table[...].dtype

    def hidden(self, batch: Batch, visual: jax.Array, maps: tuple[jax.Array, ...]) -> jax.Array:
        """Final hidden states [B, T, D] of packed rows: conversations do not see each other."""
        tokens, images = batch["tokens"], batch["images"]
        segments, columns = tokens["segment_ids"], jnp.arange(tokens["ids"].shape[1])
        mask = (segments[:, :, None] == segments[:, None]) & (columns[None] <= columns[:, None])
        same = segments[:, :, None] == images["segment_ids"][:, None]
        visible = (
            same & (images["segment_ids"] > 0)[:, None] & (images["soi"][:, None] + 1 <= columns[:, None])
        )
        x = self.embed_tokens(tokens["ids"], tokens["image"], tokens["slot"], visual)
        x = constrain(x, "batch", None, None)
        hidden, _ = self.backbone(
            x, tokens["positions"], mask, features=self.backbone_maps(maps), visible=visible
        )
        return hidden

    def backbone_maps(self, maps: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """The levels the backbone's synchronizer reads (the release leaves out the finest)."""
        sync = self.config.backbone.synchronizer
        return () if sync is None else tuple(m for m in maps if m.shape[-3] in sync.sides)

    # --- drawing ----------------------------------------------------------------------------------

    def condition(self, hidden, soi, first):
        """Condition of the images whose soi stand at `soi` [B, I]: [B*I, S, Dc] and its mask [B*I, S]."""
        # A resampler reads any number of states: no more than there are, where the row is shorter.
        fixed = self.config.context_resampler.kind == "none"
        condition, mask = self.context_resampler(*self.context(hidden, soi, first, fixed=fixed))
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

    def sample(self, condition, mask, maps, visible, keys, guidance, *, steps: int) -> jax.Array:
        """Draws an image per condition: uint8 [b, side, side, 3]. Without `guidance` there is one branch."""
        shape = (condition.shape[0], *self.config.latent_shape)
        values = self._sync_values(maps)
        if guidance is not None:
            null = jnp.broadcast_to(self.null_condition[...].astype(condition.dtype), condition.shape)

        def predict(x, t):
            x = x.astype(self.dtype)
            out = self.predict(x, t, condition, mask, values, visible)
            if guidance is not None:
                # The synchronizer sees the same features in both branches (spec section 14, trap 18).
                free = self.predict(x, t, null, jnp.ones_like(mask), values, visible)
                out = guided(out, free, guidance)
            return out.astype(jnp.float32)

        latents = self.schedule.sample(predict, shape, keys, steps)
        pixels = self.autoencoder.decode(latents.astype(self.dtype)).astype(jnp.float32)
        return jnp.round(jnp.clip(pixels / 2 + 0.5, 0, 1) * 255).astype(jnp.uint8)

    # --- learning ---------------------------------------------------------------------------------

    def loss_weights(self, batch: Batch) -> dict[str, jax.Array]:
        """Denominators of the losses: they depend on the data alone."""
        _, weight = next_token_targets(batch["tokens"])
        return {"text": jnp.sum(weight), "image": jnp.sum(self._image_weights(self._drawn(batch["images"])))}

    def loss_sums(self, batch: Batch, key: jax.Array):
        """Numerators of the losses, and metrics as (sum, weight) pairs."""
        look_key, image_key, drop_key = jax.random.split(key, 3)
        visual, maps = self.look(batch["images"]["pixels"], look_key)
        hidden = self.hidden(batch, visual, maps)
        targets, weight = next_token_targets(batch["tokens"])
        nll, hits = cross_entropy(hidden, self.head, targets, weight, chunk=self.config.loss_chunk)
        drawn = self._drawn(batch["images"])
        image = self._image_loss(batch, drawn, hidden, maps, image_key, drop_key)
        metrics = {
            "text_accuracy": (hits, jnp.sum(weight)),
            "images_per_row": (jnp.sum(drawn["draw"]), jnp.float32(len(weight))),
        }
        return {"text": nll, "image": image}, metrics

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

    def _drawn(self, images: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """The images the decoder is run on, K of each row: `index`, `soi`, `draw` and `before` [B, K], where
        `before` says that the image before it belongs to the same conversation; `target` [B, K, h, w, 3] and
        `target_before`, uint8.

        With ``max_drawn``, the last K drawn ones: no work for images that are only shown.
        """
        segments, pixels = images["segment_ids"], images.get("target", images["pixels"])
        count = segments.shape[1]
        keep = min(self.config.max_drawn or count, count)
        columns = jnp.arange(count)
        _, index = jax.lax.top_k((images["draw"] > 0) * (1 + columns), keep)
        index = jnp.sort(index, axis=1)
        before = (segments > 0) & (segments == jnp.pad(segments[:, :-1], ((0, 0), (1, 0))))
        return {
            "index": index,
            "soi": _take(images["soi"], index),
            "draw": _take(images["draw"], index),
            "before": _take(before, index),
            "target": _take(pixels, index),
            "target_before": _take(pixels, (index - 1) % count),
        }

    def _image_weights(self, drawn: dict[str, jax.Array]) -> jax.Array:
        """Weights of the latents' errors [B*K, h, w, 1]; zero for images that are not drawn."""
        c, target = self.config, _signed(_rows(drawn["target"]))
        if c.image_loss is None:
            weights = jnp.ones((*target.shape[:3], 1), jnp.float32)
        else:
            weights = block_weights(
                target,
                _signed(_rows(drawn["target_before"])),
                _rows(drawn["before"]),
                block=c.image_loss.block,
                detail=c.image_loss.detail,
                change=c.image_loss.change,
            )
        weights = pool_weights(weights, c.latent_shape[:2])
        return weights * _rows(drawn["draw"])[:, None, None, None]

    def _decoder_inputs(self, batch: Batch, drawn, hidden, maps):
        """Condition, its mask, the synchronizer's values and what it may see, for each of the B*K images."""
        soi = drawn["soi"]
        first = soi - jnp.take_along_axis(batch["tokens"]["positions"], soi, axis=1)
        condition, mask = self.condition(hidden, soi, first)
        index = (drawn["index"] - 1) % maps[0].shape[1]
        values = self._sync_values(tuple(_rows(_take(m, index))[:, None] for m in maps))
        return condition, mask, values, _rows(drawn["before"])[:, None]

    def _image_loss(self, batch: Batch, drawn, hidden, maps, key, drop_key) -> jax.Array:
        encode_key, noise_key = jax.random.split(key)
        pixels = _signed(_rows(drawn["target"])).astype(self.dtype)
        latents = jax.lax.stop_gradient(self.autoencoder.encode(pixels, encode_key))
        inputs = self._decoder_inputs(batch, drawn, hidden, maps)
        draws = self.config.noise_draws
        again = lambda x: jnp.repeat(x, draws, axis=0)  # noqa: E731
        given = (latents, self._image_weights(drawn), *inputs)
        latents, weights, condition, mask, values, visible = jax.tree.map(again, given)
        if self.config.uncond_prob:
            drop = jax.random.bernoulli(drop_key, self.config.uncond_prob, (condition.shape[0],))
            null = self.null_condition[...].astype(condition.dtype)
            condition = jnp.where(drop[:, None, None], null, condition)
            mask = mask | drop[:, None]
        noised = self.schedule.noised(latents.astype(jnp.float32), noise_key)
        out = self.predict(noised.x_t.astype(self.dtype), noised.t, condition, mask, values, visible)
        error, _ = weighted_mse(out, noised.target, weights)
        return jnp.sum(error) / draws


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
    """x [B, I, ...] at index [B, K] -> [B, K, ...]."""
    return x[jnp.arange(len(x))[:, None], index]


def _rows(x: jax.Array) -> jax.Array:
    """[B, K, ...] -> [B*K, ...]."""
    return x.reshape(-1, *x.shape[2:])


def _signed(pixels: jax.Array) -> jax.Array:
    """uint8 -> float32 in [-1, 1]."""
    return pixels.astype(jnp.float32) / 127.5 - 1


def build(config: ModelConfig, rngs: nnx.Rngs) -> MMInterleaved:
    """The family's module with fresh parameters."""
    return MMInterleaved(config, rngs)
