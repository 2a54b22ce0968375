"""The sizes of a model of BAGEL's layout, from the config files and tensor shapes that come with its weights.

BAGEL's folder has ``llm_config.json`` (of Qwen2) and ``vit_config.json`` (of SigLIP); the autoencoder is that
of FLUX. A folder of tensors computed by the reference says the same, and more, in ``fixture.json``. Here both
are given as one mapping {"llm": ..., "vit": ..., "vae": ..., ...}.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from umm_jax.errors import CheckpointError
from umm_jax.families.chatumm.config import FLOW, FLUX, ModelConfig
from umm_jax.families.chatumm.pictures import FitConfig
from umm_jax.families.chatumm.stream import LayoutConfig
from umm_jax.models.autoencoder import AutoencoderConfig
from umm_jax.models.mot import MixtureConfig
from umm_jax.models.navit import NaViTConfig

Shapes = Mapping[str, tuple[int, ...]]


def is_reference(found: Mapping[str, Any]) -> bool:
    """Whether a config is of this kind."""
    return isinstance(found.get("llm"), Mapping) and isinstance(found.get("vit"), Mapping)


def release_config() -> ModelConfig:
    """BAGEL-7B-MoT itself: its sizes are our defaults. It was not taught to say what comes next."""
    return ModelConfig(layout=LayoutConfig(control=False))


def reference_config(found: Mapping[str, Any], shapes: Shapes) -> ModelConfig:
    """The config of a model whose config files hold `found` and whose state dict has `shapes`.

    Raises:
        CheckpointError: a value or tensor that is needed is not there; the message names it.
    """
    try:
        return _build(found, shapes)
    except KeyError as error:
        raise CheckpointError(
            f"the model's config files or state dict have no {error.args[0]!r}, which tells its sizes"
        ) from None


def _build(found: Mapping[str, Any], shapes: Shapes) -> ModelConfig:
    llm, vit = found["llm"], found["vit"]
    mixture = MixtureConfig(
        vocab=shapes["language_model.model.embed_tokens.weight"][0],
        width=llm["hidden_size"],
        layers=llm["num_hidden_layers"],
        heads=llm["num_attention_heads"],
        kv_heads=llm["num_key_value_heads"],
        mlp=llm["intermediate_size"],
        norm_eps=llm["rms_norm_eps"],
        rope_base=float(llm["rope_theta"]),
    )
    patch = vit["patch_size"]
    grid = _root(shapes["vit_pos_embed.pos_embed"][0])
    vision = NaViTConfig(
        patch=patch,
        grid=grid,
        width=vit["hidden_size"],
        layers=_layers(shapes, vit),
        heads=vit["num_attention_heads"],
        mlp=vit["intermediate_size"],
        eps=vit.get("layer_norm_eps", 1e-6),
    )
    autoencoder = _autoencoder(found["vae"]) if "vae" in found else FLUX
    cells = found.get("latent_patch_size", 2)
    stride = autoencoder.factor * cells
    latent_grid = _root(shapes["latent_pos_embed.pos_embed"][0])
    return ModelConfig(
        layout=LayoutConfig(
            control=False,
            latent=FitConfig(latent_grid * stride, min(512, latent_grid * stride), stride),
            vision=FitConfig(grid * patch, min(224, grid * patch), patch),
            latent_grid=latent_grid,
            vision_grid=grid,
        ),
        mixture=mixture,
        vision=vision,
        autoencoder=autoencoder,
        latent_patch=cells,
        schedule=replace(FLOW, shift=found.get("timestep_shift_training", FLOW.shift)),
        time_width=shapes["time_embedder.mlp.0.weight"][1],
    )


def _layers(shapes: Shapes, vit: Mapping[str, Any]) -> int:
    """Layers of the vision encoder that run: all but the last of a file that has them all (spec 2.3)."""
    there = {
        int(name.split("layers.")[1].split(".")[0]) for name in shapes if "vision_model.encoder." in name
    }
    return min(len(there), vit["num_hidden_layers"])


def _autoencoder(vae: Mapping[str, Any]) -> AutoencoderConfig:
    return replace(
        FLUX,
        widths=tuple(vae["ch"] * n for n in vae["ch_mult"]),
        layers_per_block=vae["num_res_blocks"],
        latent_channels=vae["z_channels"],
        scale=vae["scale_factor"],
        shift=vae["shift_factor"],
    )


def _root(entries: int) -> int:
    side = round(entries**0.5)
    if side * side != entries:
        raise CheckpointError(f"a table of {entries} positions is not square")
    return side
