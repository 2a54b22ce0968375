"""The stock parts as folders of ``transformers`` and ``diffusers``: tensors, config.json, and what to know.

Each function describes one part for a config of ours; :class:`StockPart` serves both ways. Tensor names are
those of the libraries' own files, and ``config.json`` holds what their classes need to give our outputs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from umm_jax.errors import ConfigError
from umm_jax.weights import stock
from umm_jax.weights.table import Constant, Fresh, Rule, Table, Unused, require


@dataclass(frozen=True)
class Folder:
    """A release whose folder is laid out in a way of its own.

    Attributes:
        files: {file of weights: what its tensors' names begin with in the table}; each is one file.
        configs: {key: JSON file}: what together says the sizes of the model.
        describe: a model's config to what these files hold, by key.
    """

    files: Mapping[str, str]
    configs: Mapping[str, str]
    describe: Callable[[Any], Mapping[str, Mapping[str, Any]]]

    def prefix(self, name: str) -> str:
        """What the name of a tensor in the table begins with, of the prefixes of the files."""
        return max((p for p in self.files.values() if name.startswith(p)), key=len)


@dataclass(frozen=True)
class StockPart:
    """One part.

    Attributes:
        title, library, class_name, stem: what it is, who loads it, and how its files are called.
        table: rows to our parameters; constants are written for the class and never read.
        config: its config.json; `alike` are the keys that must agree when a stock folder is read, because
            no shape would tell.
        notes: what a user of the export must know.
        prepare: {tensor: what is done to it when a stock folder is read}, before its rule applies.
        copies: {path of ours: path of ours that begins with the same numbers}, when a stock folder is read.
        whole: why the part is read but never written, or "".
    """

    title: str
    library: str
    class_name: str
    table: Table
    config: dict[str, Any]
    alike: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    prepare: Mapping[str, Callable[[np.ndarray], np.ndarray]] = field(default_factory=dict)
    copies: Mapping[str, str] = field(default_factory=dict)
    whole: str = ""

    @property
    def stem(self) -> str:
        return "model" if self.library == "transformers" else "diffusion_pytorch_model"

    @property
    def reading(self) -> Table:
        """The table without constants, for reading a stock folder."""
        return replace(self.table, constants=())

    def subset(self, ours: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Those of our parameters that the part is about."""
        rows = (*self.table.rules, *self.table.fresh)
        paths = {row.ours.partition("[")[0] for row in rows}
        return {path: shape for path, shape in ours.items() if path in paths}


# --- Llama ------------------------------------------------------------------------------------------


def llama(c: Any, *, rows: int | None = None, added: int = 0, head: bool = False) -> StockPart:
    """The language model without synchronizers; `c` a BackboneConfig at ``backbone/``, ``embed/table``.

    Args:
        rows: height of the stock embedding when one is read; ours has `added` more, for tokens that were
            added (spec mm_interleaved, section 4).
        head: whether the folder that is read has an ``lm_head``.

    Raises:
        ConfigError: a backbone that is no Llama, or a vocabulary of another size.
    """
    require(
        "the stock Llama",
        {
            "backbone.qk_norm": (c.qk_norm, False),
            "backbone.gated_mlp": (c.gated_mlp, True),
            "backbone.activation": (c.activation, "silu"),
            "backbone.attention_scale": (c.attention_scale, 1.0),
            "backbone.qkv_bias": (c.qkv_bias, False),
            "backbone.experts": (c.experts, None),
        },
    )
    rules = [Rule("embed_tokens.weight", "embed/table")]
    fresh: list[Fresh] = []
    if rows is not None and rows != c.vocab:
        if rows + added != c.vocab:
            raise ConfigError(
                f"config.model.backbone.vocab is {c.vocab} with added_tokens={added}: the language model has "
                f"{rows} pieces, so the vocabulary must be {rows} + added_tokens"
            )
        rules = [Rule("embed_tokens.weight", f"embed/table[0:{rows}]")]
        fresh.append(Fresh(f"embed/table[{rows}:{c.vocab}]", _embedding, "rows of the added tokens"))
    rules += stock.llama("", "backbone/", c)
    if head:
        rules.append(Rule("lm_head.weight", f"head/base/kernel[:,0:{rows}]", "linear"))
        fresh.append(Fresh(f"head/base/bias[0:{rows}]", np.zeros, "the stock head has no bias"))
        if rows != c.vocab:
            silent = "the added tokens are silent here; head/added speaks for them"
            fresh.append(Fresh(f"head/base/kernel[:,{rows}:{c.vocab}]", np.zeros, silent))
            fresh.append(Fresh(f"head/base/bias[{rows}:{c.vocab}]", lambda s: np.full(s, -100.0), silent))
    return StockPart(
        title="Language model",
        library="transformers",
        class_name="LlamaModel",
        table=Table(
            rules=tuple(rules),
            fresh=tuple(fresh),
            unused=(Unused(r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq", "computed from the config"),),
            aliases=((r"^model\.", ""),),
        ),
        config={
            "architectures": ["LlamaModel"],
            "model_type": "llama",
            "vocab_size": c.vocab,
            "hidden_size": c.width,
            "intermediate_size": c.mlp,
            "num_hidden_layers": c.layers,
            "num_attention_heads": c.heads,
            "num_key_value_heads": c.kv_heads or c.heads,
            "hidden_act": "silu",
            "rms_norm_eps": c.norm_eps,
            "rope_theta": c.rope_base,
            "max_position_embeddings": 2048,
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        alike=("num_attention_heads", "num_key_value_heads", "hidden_act", "rms_norm_eps", "rope_theta"),
        notes=(
            "It gives hidden states. The whole model's output head has a bias and a second head for the "
            "added tokens: stock Llama has no place for them, so no `lm_head` is written.",
            "The whole model's layers also read images through synchronizers. Stock Llama has none: its "
            "outputs are those of the plain transformer with these weights.",
            "The whole model adds a trained vector to the embedding of its start-of-image token; the row "
            "here is without it.",
        ),
    )


def _embedding(shape: tuple[int, ...]) -> np.ndarray:
    # As the reference made them: normal of deviation 0.02, here from a seed that is always the same.
    return np.random.default_rng(32000).normal(0, 0.02, shape).astype(np.float32)


# --- Qwen2 and SigLIP2 ------------------------------------------------------------------------------


def qwen2(c: Any, ours: str, copies: Mapping[str, str], head: bool) -> StockPart:
    """A Qwen2 as the beginning of both groups of a mixture at `ours`; `c` a MixtureConfig.

    Args:
        copies: {path of the generation group: of the understanding group it begins as}.
        head: whether the folder that is read has an ``lm_head``.

    Raises:
        ConfigError: a mixture that is no Qwen2, or a folder whose head is its embedding.
    """
    if not head:
        raise ConfigError("the language model has no lm_head: its head is its embedding, and ours is its own")
    require(
        "the stock Qwen2",
        {
            "mixture.qkv_bias": (c.qkv_bias, True),
            "mixture.gated_mlp": (c.gated_mlp, True),
            "mixture.activation": (c.activation, "silu"),
            "mixture.attention_scale": (c.attention_scale, 1.0),
        },
    )
    group = f"{ours}layers/understanding"
    rules = [Rule("embed_tokens.weight", "embed/table")]
    rules += stock.qwen2_layers("", group, c.layers, qk_norm=False)
    rules.append(Rule("norm.weight", f"{ours}understanding_norm/scale"))
    rules.append(Rule("lm_head.weight", "head/base/kernel", "linear"))
    new = "norms of heads are new, and begin as ones"
    fresh = [Fresh(f"{group}/attention/{n}_norm/scale", np.ones, new) for n in "qk" if c.qk_norm]
    return StockPart(
        title="Language model",
        library="transformers",
        class_name="Qwen2ForCausalLM",
        table=Table(
            rules=tuple(rules),
            fresh=tuple(fresh),
            unused=(Unused(r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq", "computed from the config"),),
            aliases=((r"^model\.", ""),),
        ),
        config={
            "num_attention_heads": c.heads,
            "num_key_value_heads": c.kv_heads or c.heads,
            "rms_norm_eps": c.norm_eps,
            "rope_theta": c.rope_base,
            "hidden_act": "silu",
        },
        alike=("num_attention_heads", "num_key_value_heads", "rms_norm_eps", "rope_theta", "hidden_act"),
        copies=copies,
        whole="it has norms of heads and two sets of weights, which no class of transformers has",
    )


def siglip(c: Any, ours: str, resize: Callable[[int, int], np.ndarray]) -> StockPart:
    """A SigLIP or SigLIP2 vision model as the encoder at `ours`; `c` a NaViTConfig.

    Its convolution becomes a product with patches by row, column, channel. Its table of positions is resized,
    each axis by ``resize(source, target)`` [target, source]: how BAGEL's authors did it is not known. Layers
    beyond ours are left out.
    """
    vision = "vision_model."

    def flat(kernel: np.ndarray) -> np.ndarray:
        return kernel.transpose(0, 2, 3, 1).reshape(len(kernel), -1) if kernel.ndim == 4 else kernel

    def resized(table: np.ndarray) -> np.ndarray:
        side = round(len(table) ** 0.5)
        if side * side != len(table) or side == c.grid:
            return table
        matrix = resize(side, c.grid)
        grid = table.astype(np.float32).reshape(side, side, -1)
        found = np.einsum("ih,jw,hwc->ijc", matrix, matrix, grid, optimize=True)
        return found.reshape(c.grid**2, -1).astype(np.float32)

    rules = [
        *stock.weight(f"{vision}embeddings.patch_embedding", f"{ours}patch"),
        Rule(f"{vision}embeddings.position_embedding.weight", f"{ours}position"),
        *stock.vision_layers(f"{vision}encoder.", ours, c.layers),
        *stock.norm(f"{vision}post_layernorm", f"{ours}norm"),
    ]
    later = "|".join(str(i) for i in range(c.layers, c.layers + 8))
    return StockPart(
        title="Vision encoder",
        library="transformers",
        class_name="SiglipVisionModel",
        table=Table(
            rules=tuple(rules),
            unused=(
                Unused(rf"{vision}encoder\.layers\.({later})\..*", "the encoder stops before these layers"),
                Unused(rf"{vision}head\..*", "nothing is pooled"),
                Unused(r"text_model\..*|logit_(scale|bias)", "SigLIP's text encoder and its loss"),
            ),
            # Newer versions save the vision model alone without a prefix.
            aliases=((r"^(?=embeddings\.|encoder\.|head\.|post_layernorm\.)", vision),),
        ),
        config={
            "num_attention_heads": c.heads,
            "layer_norm_eps": c.eps,
            "hidden_act": "gelu_pytorch_tanh",
        },
        alike=("num_attention_heads", "layer_norm_eps", "hidden_act"),
        prepare={
            f"{vision}embeddings.patch_embedding.weight": flat,
            f"{vision}embeddings.position_embedding.weight": resized,
        },
        whole="its patches and positions are not those of the stock class",
    )


# --- CLIP -------------------------------------------------------------------------------------------


def clip(c: Any, ours: str) -> StockPart:
    """The vision transformer at `ours`; `c` a ClipConfig."""
    vision = "vision_model."
    last = {"weight": np.ones, "bias": np.zeros}
    return StockPart(
        title="Vision transformer",
        library="transformers",
        class_name="CLIPVisionModel",
        table=Table(
            rules=tuple(stock.clip_vision(vision, ours, c)),
            constants=tuple(
                Constant(f"{vision}post_layernorm.{name}", lambda make=make: make(c.width, np.float32))
                for name, make in last.items()
            ),
            unused=(
                Unused(rf"{vision}post_layernorm\.(weight|bias)", "our tower stops before this norm"),
                Unused(rf"{vision}embeddings\.position_ids", "0, 1, 2, ..."),
                Unused(r"text_model\..*|text_projection\.weight", "CLIP's text encoder"),
                Unused(r"visual_projection\.weight|logit_scale", "CLIP's contrastive head"),
            ),
            # Newer versions save the vision model alone without a prefix.
            aliases=((r"^(?=embeddings\.|encoder\.|pre_layrnorm\.|post_layernorm\.)", vision),),
        ),
        config={
            "architectures": ["CLIPVisionModel"],
            "model_type": "clip_vision_model",
            "hidden_size": c.width,
            "intermediate_size": c.mlp,
            "num_hidden_layers": c.layers,
            "num_attention_heads": c.heads,
            "num_channels": 3,
            "image_size": c.image_size,
            "patch_size": c.patch,
            "hidden_act": "quick_gelu",
            "layer_norm_eps": c.eps,
            "attention_dropout": 0.0,
            "projection_dim": 768,
        },
        alike=("num_attention_heads", "hidden_act", "layer_norm_eps"),
        notes=(
            "Use `last_hidden_state`. The model has no norm after its last layer (`post_layernorm` of the "
            "stock class): gain 1 and shift 0 are written there, so `pooler_output` means little.",
            "Pixels are normalised by CLIP's mean and deviation before they come in.",
            "The whole model's tower also has a convolutional adapter between the layers; without it the "
            "outputs are those of the plain transformer with these weights.",
        ),
    )


# --- Stable Diffusion -------------------------------------------------------------------------------


def unet(c: Any, ours: str) -> StockPart:
    """The denoiser at `ours`; `c` a UNetConfig in the reference's layout."""
    require(
        "the stock UNet2DConditionModel",
        {
            "unet.norm": (c.norm, "group"),
            "unet.skips": (c.skips, "all"),
            "unet.patch": (c.patch, 1),
            "unet.qk_norm": (c.qk_norm, False),
            "unet.time_scale": (c.time_scale, 1.0),
            "unet.time_conditioning": (c.time_conditioning, "add"),
            "unet.upsample": (c.upsample, "nearest"),
            "unet.input_gate": (c.input_gate, None),
            "unet.grid_vectors": (c.grid_vectors, False),
            "unet.mlp_multiple": (c.mlp_multiple, 4),
            "unet.mid_layers": (c.mid_layers, c.transformer_layers),
            "unet.activation": (c.activation, "silu"),
        },
    )
    kinds = [("CrossAttn" if reads else "", i) for i, reads in enumerate(c.attention)]
    return StockPart(
        title="Denoising UNet",
        library="diffusers",
        class_name="UNet2DConditionModel",
        table=Table(rules=tuple(stock.unet("", ours, c))),
        config={
            "_class_name": "UNet2DConditionModel",
            "sample_size": c.side,
            "in_channels": c.in_channels,
            "out_channels": c.out_channels,
            "block_out_channels": list(c.widths),
            "down_block_types": [f"{kind}DownBlock2D" for kind, _ in kinds],
            "up_block_types": [f"{kind}UpBlock2D" for kind, _ in reversed(kinds)],
            "layers_per_block": c.layers_per_block,
            "transformer_layers_per_block": c.transformer_layers,
            "attention_head_dim": list(c.heads),  # the library's name for the number of heads
            "cross_attention_dim": c.context_width,
            "norm_num_groups": c.norm_groups,
            "norm_eps": 1e-5,
            "act_fn": "silu",
            "use_linear_projection": True,
            "center_input_sample": False,
            "flip_sin_to_cos": True,
            "freq_shift": 0,
            "downsample_padding": 1,
            "mid_block_scale_factor": 1,
        },
        alike=(
            *("attention_head_dim", "norm_num_groups", "norm_eps", "act_fn", "use_linear_projection"),
            *("center_input_sample", "flip_sin_to_cos", "freq_shift", "down_block_types", "up_block_types"),
        ),
        notes=(
            "The whole model changes the skips between the mid block and the way up by what it sees in the "
            "image before; `down_block_additional_residuals` is where a pipeline would add that.",
            "The condition comes from the whole model's own resampler, not from a text encoder.",
        ),
    )


def autoencoder(c: Any, ours: str, side: int) -> StockPart:
    """The image autoencoder at `ours`; `c` an AutoencoderConfig; `side` of the images in pixels."""
    require("the stock AutoencoderKL", {"autoencoder.kind": (c.kind, "kl")})
    levels = len(c.widths)
    return StockPart(
        title="Image autoencoder",
        library="diffusers",
        class_name="AutoencoderKL",
        table=Table(rules=tuple(stock.autoencoder("", ours, c)), aliases=stock.AUTOENCODER_ALIASES),
        config={
            "_class_name": "AutoencoderKL",
            "in_channels": 3,
            "out_channels": 3,
            "sample_size": side,
            "block_out_channels": list(c.widths),
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
            "layers_per_block": c.layers_per_block,
            "latent_channels": c.latent_channels,
            "norm_num_groups": c.norm_groups,
            "act_fn": "silu",
            "scaling_factor": c.latent_scale,
            "use_quant_conv": c.quant,
            "use_post_quant_conv": c.quant,
        }
        | ({"shift_factor": c.shift} if c.shift else {}),
        alike=(
            *("norm_num_groups", "act_fn", "scaling_factor", "down_block_types"),
            *(("shift_factor",) if c.shift else ()),
        ),
        notes=(f"Latents are multiplied by {c.latent_scale} (`scaling_factor`) before they are noised.",),
    )
