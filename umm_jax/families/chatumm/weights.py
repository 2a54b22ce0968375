"""BAGEL's checkpoints, tensor by tensor, and the stock parts one is begun from (docs/chatumm.md section 8).

The release keeps the autoencoder in a file of its own; here its tensors carry the prefix ``ae.``, which is
taken off and put on by :data:`FOLDER`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from flax import nnx

from umm_jax.errors import ConfigError
from umm_jax.families.chatumm.config import ModelConfig
from umm_jax.families.chatumm.model import build
from umm_jax.families.chatumm.reference import is_reference, reference_config
from umm_jax.families.chatumm.reference import release_config as release_config
from umm_jax.models.layers import Keys
from umm_jax.models.mot import begun_from
from umm_jax.models.positions import sincos_1d
from umm_jax.models.resize import resize_matrix
from umm_jax.weights import hub, stock
from umm_jax.weights.table import Constant, Rule, Table, require

ARCHITECTURE = "BagelForConditionalGeneration"
PARTS = ("llm", "vit", "vae")  # what a pre-training begins from
AUTOENCODER = "ae."
VISION = "vit_model.vision_model."


def table(config: ModelConfig) -> Table:
    """Rows between BAGEL's state dicts and our parameters.

    Raises:
        ConfigError: a model that is not laid out like the release: there is no released name for its parts.
    """
    _require_release_layout(config)
    return Table(rules=tuple(_rules(config)), constants=tuple(_constants(config)))


def config_of(found: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> ModelConfig | None:
    """The config of a checkpoint whose config files hold `found` and whose tensors have `shapes`."""
    return reference_config(found, shapes) if is_reference(found) else None


def config_files(config: ModelConfig) -> dict[str, dict[str, Any]]:
    """What the config files of FOLDER hold for a model, by key: enough for the release's own classes."""
    m, v = config.mixture, config.vision
    return {
        "llm": {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "vocab_size": m.vocab,
            "hidden_size": m.width,
            "intermediate_size": m.mlp,
            "num_hidden_layers": m.layers,
            "num_attention_heads": m.heads,
            "num_key_value_heads": m.kv_heads or m.heads,
            "hidden_act": m.activation,
            "rms_norm_eps": m.norm_eps,
            "rope_theta": m.rope_base,
            "max_position_embeddings": 32768,
            "qk_norm": True,
            "tie_word_embeddings": False,
        },
        "vit": {
            "model_type": "siglip_vision_model",
            "hidden_size": v.width,
            "intermediate_size": v.mlp,
            # The release counts one layer that it does not run.
            "num_hidden_layers": v.layers + 1,
            "num_attention_heads": v.heads,
            "patch_size": v.patch,
            "image_size": v.grid * v.patch,
            "layer_norm_eps": v.eps,
            "hidden_act": "gelu_pytorch_tanh",
        },
    }


FOLDER = hub.Folder(
    files={"ema.safetensors": "", "ae.safetensors": AUTOENCODER},
    configs={"llm": "llm_config.json", "vit": "vit_config.json"},
    describe=config_files,
)


def stock_part(
    name: str, config: ModelConfig, found: Mapping[str, tuple[int, ...]] | None = None
) -> hub.StockPart:
    """One of PARTS of a model; `found` are the names and shapes of the stock folder that is read, if one is.

    Raises:
        ConfigError: that part of this model is not laid out like the stock one.
    """
    c = config
    if name == "llm":
        paths = nnx.to_flat_state(nnx.split(nnx.eval_shape(lambda: build(c, Keys(0))))[1])
        copies = begun_from(["/".join(map(str, path)) for path, _ in paths])
        return hub.qwen2(c.mixture, "mixture/", copies, found is None or "lm_head.weight" in found)
    if name == "vit":
        return hub.siglip(c.vision, "vision/", partial(resize_matrix, method="bicubic"))
    if name == "vae":
        part = hub.autoencoder(c.autoencoder, "autoencoder/", c.layout.canvas)
        if found is not None and "encoder.mid.block_1.norm1.weight" in found:
            # As the autoencoder's own code names its tensors: a file ae.safetensors.
            part = replace(part, table=Table(rules=tuple(_autoencoder(c, ""))))
        return part
    raise ConfigError(f"{name!r} is no part of a chatumm model: {', '.join(PARTS)}")


def _require_release_layout(c: ModelConfig) -> None:
    m = c.mixture
    odd = {
        "mixture.qk_norm": (m.qk_norm, True),
        "mixture.qkv_bias": (m.qkv_bias, True),
        "mixture.gated_mlp": (m.gated_mlp, True),
        "mixture.activation": (m.activation, "silu"),
        "mixture.attention_scale": (m.attention_scale, 1.0),
        "connector": (c.connector, None),
        "positions": (c.positions, 1.0),
        "autoencoder.kind": (c.autoencoder.kind, "kl"),
        "autoencoder.quant": (c.autoencoder.quant, False),
        "schedule.prediction": (c.schedule.prediction, "velocity"),
    }
    require("the release", odd)


def _rules(c: ModelConfig) -> Iterator[Rule]:
    yield Rule("language_model.model.embed_tokens.weight", "embed/table")
    yield Rule("language_model.lm_head.weight", "head/base/kernel", "linear")
    yield from _mixture(c)
    yield from stock.weight("time_embedder.mlp.0", "time/linear_1")
    yield from stock.weight("time_embedder.mlp.2", "time/linear_2")
    yield from stock.weight("vae2llm", "latent_in")
    yield from stock.weight("llm2vae", "latent_out")
    yield from stock.weight("connector.fc1", "connector/up")
    yield from stock.weight("connector.fc2", "connector/down")
    yield from stock.weight(f"{VISION}embeddings.patch_embedding", "vision/patch")
    yield Rule(f"{VISION}embeddings.position_embedding.weight", "vision/position")
    yield from stock.vision_layers(f"{VISION}encoder.", "vision/", c.vision.layers)
    yield from stock.norm(f"{VISION}post_layernorm", "vision/norm")
    yield from _autoencoder(c)


def _mixture(c: ModelConfig) -> Iterator[Rule]:
    """Both groups' layers. The generation group's names have ``_moe_gen`` before the last field."""
    top = "language_model.model."
    for group, mark in (("understanding", ""), ("generation", "_moe_gen")):
        yield from stock.qwen2_layers(top, f"mixture/layers/{group}", c.mixture.layers, mark)
        yield from stock.norm(f"{top}norm{mark}", f"mixture/{group}_norm", bias=False)


def _autoencoder(c: ModelConfig, prefix: str = AUTOENCODER) -> Iterator[Rule]:
    """The FLUX autoencoder: Stable Diffusion's under the names of the code it came from."""
    config, last = c.autoencoder, len(c.autoencoder.widths) - 1

    def resnet(block: str, to: str, shortcut: bool) -> Iterator[Rule]:
        for i in (1, 2):
            yield from stock.norm(f"{block}.norm{i}", f"{to}/norm_{i}")
            yield from stock.weight(f"{block}.conv{i}", f"{to}/conv_{i}", "conv")
        if shortcut:
            yield from stock.weight(f"{block}.nin_shortcut", f"{to}/shortcut", "conv")

    for side, count in (("encoder", config.layers_per_block), ("decoder", config.layers_per_block + 1)):
        theirs, ours = f"{prefix}{side}", f"autoencoder/{side}"
        yield from stock.weight(f"{theirs}.conv_in", f"{ours}/conv_in", "conv")
        widths = config.widths if side == "encoder" else config.widths[::-1]
        width = widths[0]
        for n, w in enumerate(widths):
            # The decoder's levels are named by their resolution and run from the coarsest.
            level = f"{theirs}.down.{n}" if side == "encoder" else f"{theirs}.up.{last - n}"
            to = f"{ours}/{'down' if side == 'encoder' else 'up'}/{n}"
            for j in range(count):
                yield from resnet(f"{level}.block.{j}", f"{to}/resnets/{j}", j == 0 and width != w)
            if n < last:
                change = "downsample" if side == "encoder" else "upsample"
                yield from stock.weight(f"{level}.{change}.conv", f"{to}/resample/conv", "conv")
            width = w
        mid, to = f"{theirs}.mid", f"{ours}/mid"
        yield from resnet(f"{mid}.block_1", f"{to}/resnet_1", False)
        yield from stock.norm(f"{mid}.attn_1.norm", f"{to}/norm")
        for name, own in {"q": "q", "k": "k", "v": "v", "proj_out": "out"}.items():
            yield from stock.weight(f"{mid}.attn_1.{name}", f"{to}/attention/{own}", "linear_1x1")
        yield from resnet(f"{mid}.block_2", f"{to}/resnet_2", False)
        yield from stock.norm(f"{theirs}.norm_out", f"{ours}/norm_out")
        yield from stock.weight(f"{theirs}.conv_out", f"{ours}/conv_out", "conv")


def _constants(c: ModelConfig) -> Iterator[Constant]:
    for name, grid in (("latent", c.layout.latent_grid), ("vit", c.layout.vision_grid)):
        value = partial(position_table, grid, c.mixture.width)
        yield Constant(f"{name}_pos_embed.pos_embed", value)


def position_table(grid: int, width: int) -> np.ndarray:
    """The fixed table as the release stores it: [grid * grid, width], the column in the first half."""
    axis = sincos_1d(grid, width // 2)
    columns = np.broadcast_to(axis[None], (grid, grid, width // 2))
    rows = np.broadcast_to(axis[:, None], (grid, grid, width // 2))
    return np.concatenate([columns, rows], axis=-1).reshape(grid * grid, width)
