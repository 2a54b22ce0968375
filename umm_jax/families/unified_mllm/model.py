"""UnifiedMLLM: a language model that reads images, names tasks and places, and asks for masks.

    pixels --tower--> tokens --adapter--> the image's slots in the stream;   a map for the mask head
    stream --backbone (experts beside its MLPs in the third stage)--> hidden states --head--> next token
    hidden state at a mark --query--> mask decoder, looking at the map of the image that is meant

Letters: B rows, T tokens, I images and K masks of a row, n slots of an image, D backbone width.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from umm_jax.families.unified_mllm.config import ModelConfig
from umm_jax.models import layers as L
from umm_jax.models.attention import Mask
from umm_jax.models.backbone import Backbone, Head
from umm_jax.models.lora_moe import balance_loss
from umm_jax.models.losses import cross_entropy, next_token_targets, row_likelihood
from umm_jax.models.mask_decoder import MaskDecoder, PromptEncoder
from umm_jax.models.mask_loss import mask_losses
from umm_jax.models.masks import stream
from umm_jax.models.sam_encoder import Neck, SamEncoder
from umm_jax.models.tower import make_tower
from umm_jax.sharding import by_images, constrain

Batch = dict[str, dict[str, jax.Array]]


class Adapter(nnx.Module):
    """Linear layers with GELU between them, [..., C] -> [..., D]."""

    def __init__(self, d_in: int, hidden: tuple[int, ...], d_out: int, std: float, *, rngs: nnx.Rngs):
        sizes = (d_in, *hidden, d_out)
        inits = [L.lecun()] * len(hidden) + [L.normal(std)]
        self.layers = L.Modules(
            [
                L.Linear(a, b, axes=(None, "embed"), init=init, rngs=rngs)
                for a, b, init in zip(sizes, sizes[1:], inits)
            ]
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        first, *others = self.layers
        x = first(x)
        for layer in others:
            x = layer(jax.nn.gelu(x, approximate=False))
        return x


# Of the pixels SAM was trained on, by colour.
SAM_MEAN = np.array([123.675, 116.28, 103.53], np.float32)
SAM_STD = np.array([58.395, 57.12, 57.375], np.float32)


class MaskHead(nnx.Module):
    """From hidden states that ask to masks (LISA, arXiv 2308.00692)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        d, c, own = config.backbone.width, config.masks.decoder, config.masks.encoder
        self.query_in = L.Linear(d, d, axes=("embed", "mlp"), rngs=rngs)
        self.query_out = L.Linear(d, c.width, axes=("mlp", "embed"), rngs=rngs)
        self.encoder = None if own is None else SamEncoder(own, rngs=rngs)
        self.neck = Neck(config.map_width, c.width, rngs=rngs) if own is None else None
        self.prompts = PromptEncoder(c.width, rngs=rngs)
        self.decoder = MaskDecoder(c, rngs=rngs)

    @L.part("masks")
    def features(
        self, maps: jax.Array | None, large: jax.Array | None, extent: jax.Array | None
    ) -> jax.Array:
        """What the decoder looks at, [N, h, w, D'].

        Args:
            maps: of the tower [N, h, w, C]. Where there is an encoder, its pictures `large` [N, S, S, 3] and
                how much of each there is, `extent` [N, 2], in their place.
        """
        if self.encoder is None:
            x = self.neck(maps)
        else:
            steps = jnp.arange(large.shape[1])
            there = (steps < extent[:, :1])[:, :, None] & (steps < extent[:, 1:])[:, None]
            # Beyond the picture zeros of normalised pixels, as SAM was trained.
            x = (large.astype(jnp.float32) - SAM_MEAN) / SAM_STD * there[..., None]
            x = self.encoder(x.astype(self.prompts.no_mask[...].dtype))
        return x + self.prompts.no_mask[...].astype(x.dtype)

    @L.part("masks")
    def __call__(self, hidden: jax.Array, features: jax.Array, size: int) -> jax.Array:
        """Logits of one mask for each of M questions, float32 [M, size, size].

        Args:
            hidden: states that ask [M, D]. features: of the image each asks about [M, h, w, D'].
        """
        query = self.query_out(jax.nn.relu(self.query_in(hidden)))[:, None]
        places = self.prompts.grid(*features.shape[1:3])
        masks, _ = self.decoder(features, places, query)
        # The first of the decoder's masks is the one for a prompt that leaves no doubt.
        return jax.image.resize(masks[:, 0].astype(jnp.float32), (len(masks), size, size), "bilinear")


class UnifiedMLLM(nnx.Module):
    """The assembled family; one code for the toy and the published size, see :class:`ModelConfig`."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = c = config
        width, tower = c.backbone.width, c.tower.chosen
        self.embed = L.Embedding(c.backbone.vocab, width, std=c.backbone.embed_std, rngs=rngs)
        self.tower = make_tower(c.tower, rngs=rngs)
        self.adapter = Adapter(tower.width, c.adapter, width, c.visual_std, rngs=rngs)
        self.backbone = Backbone(c.backbone, rngs)
        self.head = Head(c.backbone, bias=False, rngs=rngs)
        self.masks = None if c.masks is None else MaskHead(c, rngs=rngs)

    @property
    def dtype(self):
        """Compute dtype: that of the embedding table, which the training policy casts."""
        return self.embed.table[...].dtype

    # --- reading ----------------------------------------------------------------------------------

    def look(self, images: dict[str, jax.Array], key: jax.Array | None = None, masks: bool = True):
        """Images -> tokens [B, I, n, D], and with `masks` what the mask head looks at, [B, I, h', w', D'].

        Args:
            images: "pixels" uint8 [B, I, h, w, 3]; "large", "extent" where the mask head has an encoder.
        """
        b, i = images["pixels"].shape[:2]
        flat = {name: a.reshape(b * i, *a.shape[2:]) for name, a in images.items()}
        x = by_images(flat["pixels"])
        seen = self.tower(x.astype(self.dtype) / 255, key=key)
        unfold = lambda a: a.reshape(b, i, *a.shape[1:])  # noqa: E731
        features = None
        if masks and self.masks is not None:
            maps = seen.maps[self.config.masks.level]
            features = unfold(self.masks.features(maps, flat.get("large"), flat.get("extent")))
        return unfold(L.part("connector")(self.adapter)(seen.tokens)), features

    def embed_tokens(self, ids, image=None, slot=None, visual=None) -> jax.Array:
        """Ids [B, T] -> [B, T, D]; where `image` is not negative, that image's token number `slot`."""
        x = self.embed(ids, self.dtype)
        return x if visual is None else L.in_slots(x, image, slot, visual)

    # --- learning ---------------------------------------------------------------------------------

    def loss_weights(self, batch: Batch) -> dict[str, jax.Array]:
        """Denominators of the losses: they depend on the data alone."""
        _, weight = next_token_targets(batch["tokens"])
        found = {"text": jnp.sum(weight)}
        if self.masks is not None:
            real = jnp.sum(self._asked(batch)[0]).astype(jnp.float32)
            found |= {"mask": real, "dice": real}
        if self.config.backbone.experts is not None:
            found["balance"] = jnp.sum(self._conversations(batch)[1]).astype(jnp.float32)
        return found

    def loss_sums(self, batch: Batch, key: jax.Array):
        """Numerators of the losses, and metrics as (sum, weight) pairs."""
        look_key, expert_key = jax.random.split(key)
        tokens = batch["tokens"]
        visual, features = self.look(batch["images"], look_key)
        run = self._read(batch, visual, expert_key)
        targets, weight = next_token_targets(tokens)
        nll, hits = cross_entropy(run.hidden, self.head, targets, weight, chunk=self.config.loss_chunk)
        sums = {"text": nll}
        metrics = {"text_accuracy": (hits, jnp.sum(weight))}
        if self.masks is not None:
            sums["mask"], sums["dice"], metrics["mask_iou"] = self._mask_sums(batch, run.hidden, features)
        if run.shares is not None:
            sums["balance"] = self._balance(batch, run.shares)
        return sums, metrics

    def text_likelihood(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """-log p of each row's learned texts, and whether they are the greedy ones: [B], bool [B]."""
        run = self._read(batch, self.look(batch["images"], masks=False)[0])
        return row_likelihood(run.hidden, self.head, *next_token_targets(batch["tokens"]))

    def _read(self, batch: Batch, visual: jax.Array, key: jax.Array | None = None):
        """Runs the backbone over packed rows."""
        tokens = batch["tokens"]
        x = self.embed_tokens(tokens["ids"], tokens["image"], tokens["slot"], visual)
        x = constrain(x, "batch", "sequence", None)
        return self.backbone.run(x, tokens["positions"], self.sight(batch), key=key)

    @staticmethod
    def sight(batch: Batch) -> Mask:
        """What each token reads: itself and those before it of its own conversation."""
        read = stream(batch["tokens"]["segment_ids"])
        return read, read

    def _asked(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Which masks are real and learned [B, K], and the columns of the states that ask for them."""
        masks, weight = batch["masks"], batch["tokens"]["weight"]
        learned = jnp.take_along_axis(weight, masks["at"], axis=1) > 0
        back = int(self.config.masks.state == "predicting")
        return (masks["segment_ids"] > 0) & learned, jnp.maximum(masks["at"] - back, 0)

    def _mask_sums(self, batch: Batch, hidden: jax.Array, features: jax.Array):
        """Sums of both mask losses, and of the masks' IoU with their number."""
        real, columns = self._asked(batch)
        images, target = batch["masks"]["image"], batch["masks"]["target"]
        flat = lambda a: by_images(a.reshape(-1, *a.shape[2:]))  # noqa: E731
        target, real = flat(target), flat(real).astype(jnp.float32)
        # Row by row, so that the compiler splits them as it splits the rows.
        pick = jax.vmap(lambda x, at: x[at])
        hidden, features = pick(hidden, columns), pick(features, images)
        logits = self.masks(flat(hidden), flat(features), target.shape[-1])
        entropy, dice = mask_losses(logits, target)
        found, wanted = logits > 0, target > 0
        both = jnp.sum(found & wanted, axis=(1, 2))
        iou = both / jnp.maximum(jnp.sum(found | wanted, axis=(1, 2)), 1)
        return jnp.sum(entropy * real), jnp.sum(dice * real), (jnp.sum(iou * real), jnp.sum(real))

    @staticmethod
    def _conversations(batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Which tokens belong to conversation s of a row, [B, S, T], and which of the S there are, [B, S].

        Of more than 32 conversations in a row those beyond are not balanced.
        """
        segments = batch["tokens"]["segment_ids"]
        numbers = jnp.arange(1, 1 + min(_MOST_CONVERSATIONS, segments.shape[1]))
        members = segments[:, None] == numbers[None, :, None]
        return members, jnp.any(members, axis=-1)

    def _balance(self, batch: Batch, shares: jax.Array) -> jax.Array:
        """The balance loss of each conversation by itself, mean over layers, summed.

        By itself, so that it does not depend on how a batch is cut; the published one mixes the samples of
        a device's batch.
        """
        members, real = self._conversations(batch)
        used = jnp.einsum("lmbtn,bst->bslmn", shares, members.astype(jnp.float32))
        kinds = jnp.max(jnp.where(members, batch["tokens"]["tasks"][:, None], 0), axis=-1)
        kinds = jnp.broadcast_to(kinds[..., None, None], used.shape[:-1])
        one = lambda q, kind: balance_loss(q[None], kind[None], self.config.balance_delta)  # noqa: E731
        each = jax.vmap(one)(used.reshape(-1, used.shape[-1]), kinds.reshape(-1))
        each = each.reshape(used.shape[:-1]).mean((-2, -1))
        return jnp.sum(jnp.where(real, each, 0.0))


_MOST_CONVERSATIONS = 32


def build(config: ModelConfig, rngs: nnx.Rngs) -> UnifiedMLLM:
    """The family's module with fresh parameters."""
    return UnifiedMLLM(config, rngs)
