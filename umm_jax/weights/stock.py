"""Rows of the stock parts: Llama, CLIP vision, Q-Former, Stable Diffusion's UNet and autoencoder.

Each function takes the prefix of the part's tensors, the path of our module and its config, and yields the
rows in the order of the forward pass. Prefixes end in "." or "/" or are empty, so that one function serves a
part on its own (the files of ``transformers`` and ``diffusers``) and inside a larger model.

Names are those of the released checkpoints of these libraries; :data:`AUTOENCODER_ALIASES` holds what they
called the autoencoder's attention before 2023.
"""

from collections.abc import Iterator
from typing import Any

from umm_jax.weights.table import Rule

Rules = Iterator[Rule]

AUTOENCODER_ALIASES = tuple(
    (rf"(attentions\.0\.){old}\.(weight|bias)$", rf"\g<1>{new}.\2")
    for old, new in {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}.items()
)


# --- pieces -----------------------------------------------------------------------------------------


def weight(theirs: str, ours: str, how: str = "linear", *, index: str = "", bias: bool = True) -> Rules:
    """A linear or convolution layer: weight and, unless there is none, bias."""
    yield Rule(f"{theirs}.weight", f"{ours}/kernel{index}", how)
    if bias:
        yield Rule(f"{theirs}.bias", f"{ours}/bias{index}")


def norm(theirs: str, ours: str, *, index: str = "", bias: bool = True) -> Rules:
    """A norm with a gain and, unless there is none, a shift."""
    yield Rule(f"{theirs}.weight", f"{ours}/scale{index}")
    if bias:
        yield Rule(f"{theirs}.bias", f"{ours}/bias{index}")


# --- Llama ------------------------------------------------------------------------------------------


def llama(theirs: str, ours: str, config: Any) -> Rules:
    """Layers and final norm of a Llama (not its embedding or head); `config` a BackboneConfig."""
    for i in range(config.layers):
        layer, to, at = f"{theirs}layers.{i}", f"{ours}layers", f"[{i}]"
        yield from norm(f"{layer}.input_layernorm", f"{to}/attention_norm", index=at, bias=False)
        for name in "qkvo":
            yield from weight(
                f"{layer}.self_attn.{name}_proj", f"{to}/attention/{name}", index=at, bias=False
            )
        yield from norm(f"{layer}.post_attention_layernorm", f"{to}/mlp_norm", index=at, bias=False)
        for name in ("gate", "up", "down"):
            yield from weight(f"{layer}.mlp.{name}_proj", f"{to}/mlp/{name}", index=at, bias=False)
    yield from norm(f"{theirs}norm", f"{ours}norm", bias=False)


# --- Qwen2 ------------------------------------------------------------------------------------------


def qwen2_layers(theirs: str, ours: str, count: int, mark: str = "", *, qk_norm: bool = True) -> Rules:
    """Layers of a Qwen2, with norms of heads or without.

    `mark` stands before the last field of each name, and behind "mlp": BAGEL's second set of weights.
    """
    for i in range(count):
        layer, at = f"{theirs}layers.{i}", f"[{i}]"
        yield from norm(f"{layer}.input_layernorm{mark}", f"{ours}/attention_norm", index=at, bias=False)
        for name in "qkvo":
            to = f"{ours}/attention/{name}"
            yield from weight(f"{layer}.self_attn.{name}_proj{mark}", to, index=at, bias=name != "o")
        for name in "qk" if qk_norm else "":
            to = f"{ours}/attention/{name}_norm"
            yield from norm(f"{layer}.self_attn.{name}_norm{mark}", to, index=at, bias=False)
        yield from norm(f"{layer}.post_attention_layernorm{mark}", f"{ours}/mlp_norm", index=at, bias=False)
        for name in ("gate", "up", "down"):
            yield from weight(f"{layer}.mlp{mark}.{name}_proj", f"{ours}/mlp/{name}", index=at, bias=False)


# --- CLIP -------------------------------------------------------------------------------------------


def clip_vision(theirs: str, ours: str, config: Any) -> Rules:
    """A CLIP vision transformer without its last norm; `config` a ClipConfig."""
    yield Rule(f"{theirs}embeddings.class_embedding", f"{ours}class_token")
    yield from weight(f"{theirs}embeddings.patch_embedding", f"{ours}patch", "conv", bias=False)
    yield Rule(f"{theirs}embeddings.position_embedding.weight", f"{ours}position")
    yield from norm(f"{theirs}pre_layrnorm", f"{ours}norm")
    yield from vision_layers(f"{theirs}encoder.", ours, config.layers)


def vision_layers(theirs: str, ours: str, count: int) -> Rules:
    """The layers of a CLIP or SigLIP vision transformer; ours are ``models.vision.VisionLayer``."""
    for i in range(count):
        layer, to, at = f"{theirs}layers.{i}", f"{ours}layers", f"[{i}]"
        yield from norm(f"{layer}.layer_norm1", f"{to}/attention_norm", index=at)
        for name, own in {"q_proj": "query", "k_proj": "key", "v_proj": "value", "out_proj": "out"}.items():
            yield from weight(f"{layer}.self_attn.{name}", f"{to}/{own}", index=at)
        yield from norm(f"{layer}.layer_norm2", f"{to}/mlp_norm", index=at)
        yield from weight(f"{layer}.mlp.fc1", f"{to}/up", index=at)
        yield from weight(f"{layer}.mlp.fc2", f"{to}/down", index=at)


# --- SAM --------------------------------------------------------------------------------------------


def sam_encoder(theirs: str, ours: str, config: Any) -> Rules:
    """SAM's image encoder, named as in its own code; `config` a SamEncoderConfig."""
    yield from weight(f"{theirs}patch_embed.proj", f"{ours}patch", "conv")
    yield Rule(f"{theirs}pos_embed", f"{ours}position", "first")
    run = config.layers // config.groups
    for i in range(config.layers):
        group, k = divmod(i, run)
        whole = k == run - 1
        to, at = (
            (f"{ours}whole", f"[{group}]") if whole else (f"{ours}windowed", f"[{group * (run - 1) + k}]")
        )
        layer = f"{theirs}blocks.{i}"
        yield from norm(f"{layer}.norm1", f"{to}/attention_norm", index=at)
        yield from weight(f"{layer}.attn.qkv", f"{to}/qkv", index=at)
        yield from weight(f"{layer}.attn.proj", f"{to}/out", index=at)
        yield Rule(f"{layer}.attn.rel_pos_h", f"{to}/rows{at}")
        yield Rule(f"{layer}.attn.rel_pos_w", f"{to}/columns{at}")
        yield from norm(f"{layer}.norm2", f"{to}/mlp_norm", index=at)
        yield from weight(f"{layer}.mlp.lin1", f"{to}/up", index=at)
        yield from weight(f"{layer}.mlp.lin2", f"{to}/down", index=at)
    yield from sam_neck(f"{theirs}neck.", f"{ours}neck/")


def sam_neck(theirs: str, ours: str) -> Rules:
    """The two convolutions after SAM's encoder."""
    yield from weight(f"{theirs}0", f"{ours}neck_in", "conv", bias=False)
    yield from norm(f"{theirs}1", f"{ours}neck_in_norm")
    yield from weight(f"{theirs}2", f"{ours}neck_out", "conv", bias=False)
    yield from norm(f"{theirs}3", f"{ours}neck_out_norm")


def sam_prompts(theirs: str, ours: str) -> Rules:
    """SAM's prompt encoder, named as in its own code; ours is ``models.mask_decoder.PromptEncoder``."""
    yield Rule(f"{theirs}pe_layer.positional_encoding_gaussian_matrix", f"{ours}frequencies")
    for k in range(4):
        yield Rule(f"{theirs}point_embeddings.{k}.weight", f"{ours}kinds[{k}]", "first")
    yield Rule(f"{theirs}not_a_point_embed.weight", f"{ours}nowhere", "first")
    yield Rule(f"{theirs}no_mask_embed.weight", f"{ours}no_mask", "first")
    for k, name in ((0, "mask_in"), (3, "mask_mid"), (6, "mask_out")):
        yield from weight(f"{theirs}mask_downscaling.{k}", f"{ours}{name}", "conv")
    for k, name in ((1, "mask_in_norm"), (4, "mask_mid_norm")):
        yield from norm(f"{theirs}mask_downscaling.{k}", f"{ours}{name}")


def sam_decoder(theirs: str, ours: str, config: Any) -> Rules:
    """SAM's mask decoder, named as in its own code; `config` a MaskDecoderConfig."""
    yield Rule(f"{theirs}iou_token.weight", f"{ours}iou_token")
    yield Rule(f"{theirs}mask_tokens.weight", f"{ours}mask_tokens")
    inner = {
        "self_attn": "own",
        "cross_attn_token_to_image": "to_map",
        "cross_attn_image_to_token": "from_map",
    }
    for i in range(config.depth):
        layer, to = f"{theirs}transformer.layers.{i}", f"{ours}blocks/{i}"
        for name, own in inner.items():
            yield from _sam_attention(f"{layer}.{name}", f"{to}/{own}")
        for k in range(4):
            yield from norm(f"{layer}.norm{k + 1}", f"{to}/norms/{k}")
        yield from weight(f"{layer}.mlp.lin1", f"{to}/up")
        yield from weight(f"{layer}.mlp.lin2", f"{to}/down")
    yield from _sam_attention(f"{theirs}transformer.final_attn_token_to_image", f"{ours}last")
    yield from norm(f"{theirs}transformer.norm_final_attn", f"{ours}last_norm")
    for k, name in ((0, "larger"), (3, "largest")):
        yield Rule(f"{theirs}output_upscaling.{k}.weight", f"{ours}{name}", "transposed")
        yield Rule(f"{theirs}output_upscaling.{k}.bias", f"{ours}{name}_bias")
    yield from norm(f"{theirs}output_upscaling.1", f"{ours}larger_norm")
    heads = [(f"output_hypernetworks_mlps.{k}", f"vectors/{k}") for k in range(config.masks)]
    for name, own in (*heads, ("iou_prediction_head", "iou")):
        for k in range(3):
            yield from weight(f"{theirs}{name}.layers.{k}", f"{ours}{own}/layers/{k}")


def _sam_attention(theirs: str, ours: str) -> Rules:
    for name in ("q", "k", "v", "out"):
        yield from weight(f"{theirs}.{name}_proj", f"{ours}/{name}")


# --- Q-Former ---------------------------------------------------------------------------------------


def qformer(theirs: str, ours: str, config: Any) -> Rules:
    """Norm and layers of a BLIP-2 Q-Former's query branch (not its queries); `config` a ResamplerConfig."""
    yield from norm(f"{theirs}layernorm", f"{ours}norm")
    for i in range(config.layers):
        layer = f"{theirs}encoder.layer.{i}"
        period, within = divmod(i, config.cross_every)
        to, at = f"{ours}periods/layers/{within}", f"[{period}]"
        reads = {"attention": "attention"} | ({"crossattention": "cross"} if within == 0 else {})
        for name, own in reads.items():
            for part in ("query", "key", "value"):
                yield from weight(f"{layer}.{name}.attention.{part}", f"{to}/{own}/{part}", index=at)
            if config.qk_norm:
                yield from norm(f"{layer}.{name}.attention.q_norm", f"{to}/{own}/query_norm", index=at)
                yield from norm(f"{layer}.{name}.attention.k_norm", f"{to}/{own}/key_norm", index=at)
            yield from weight(f"{layer}.{name}.output.dense", f"{to}/{own}/out", index=at)
            yield from norm(f"{layer}.{name}.output.LayerNorm", f"{to}/{own}/norm", index=at)
        yield from weight(f"{layer}.intermediate_query.dense", f"{to}/up", index=at)
        yield from weight(f"{layer}.output_query.dense", f"{to}/down", index=at)
        yield from norm(f"{layer}.output_query.LayerNorm", f"{to}/norm", index=at)


# --- Stable Diffusion -------------------------------------------------------------------------------


def resnet(theirs: str, ours: str, *, shortcut: bool, time: bool = False) -> Rules:
    """A residual block of two convolutions."""
    for i in (1, 2):
        yield from norm(f"{theirs}.norm{i}", f"{ours}/norm_{i}")
        yield from weight(f"{theirs}.conv{i}", f"{ours}/conv_{i}", "conv")
        if time and i == 1:
            yield from weight(f"{theirs}.time_emb_proj", f"{ours}/time")
    if shortcut:
        yield from weight(f"{theirs}.conv_shortcut", f"{ours}/shortcut", "conv")


def spatial_transformer(theirs: str, ours: str, layers: int) -> Rules:
    """A transformer over the pixels of a map, with linear projections around it."""
    yield from norm(f"{theirs}.norm", f"{ours}/norm")
    yield from weight(f"{theirs}.proj_in", f"{ours}/proj_in")
    for i in range(layers):
        block, to = f"{theirs}.transformer_blocks.{i}", f"{ours}/blocks/{i}"
        for n, own in ((1, "self_attention"), (2, "cross_attention")):
            yield from norm(f"{block}.norm{n}", f"{to}/norm_{n}")
            for name in "qkv":
                yield from weight(f"{block}.attn{n}.to_{name}", f"{to}/{own}/{name}", bias=False)
            yield from weight(f"{block}.attn{n}.to_out.0", f"{to}/{own}/out")
        yield from norm(f"{block}.norm3", f"{to}/norm_3")
        yield from weight(f"{block}.ff.net.0.proj", f"{to}/mlp/proj")
        yield from weight(f"{block}.ff.net.2", f"{to}/mlp/out")
    yield from weight(f"{theirs}.proj_out", f"{ours}/proj_out")


def unet(theirs: str, ours: str, config: Any) -> Rules:
    """A UNet2DConditionModel with linear projections; `config` a UNetConfig in the reference's layout."""
    c, levels = config, len(config.widths)
    yield from weight(f"{theirs}time_embedding.linear_1", f"{ours}time/linear_1")
    yield from weight(f"{theirs}time_embedding.linear_2", f"{ours}time/linear_2")
    yield from weight(f"{theirs}conv_in", f"{ours}conv_in", "conv")

    def blocks(block: str, to: str, i: int, widths_in: list[int]) -> Rules:
        for j, d_in in enumerate(widths_in):
            changes = d_in != c.widths[i]
            yield from resnet(f"{block}.resnets.{j}", f"{to}/resnets/{j}", shortcut=changes, time=True)
            if c.attention[i]:
                yield from spatial_transformer(
                    f"{block}.attentions.{j}", f"{to}/attentions/{j}", c.transformer_layers
                )

    width = c.widths[0]
    for i, w in enumerate(c.widths):
        block, to = f"{theirs}down_blocks.{i}", f"{ours}down/{i}"
        yield from blocks(block, to, i, [width] + [w] * (c.layers_per_block - 1))
        if i + 1 < levels:
            yield from weight(f"{block}.downsamplers.0.conv", f"{to}/resample", "conv")
        width = w

    for j in range(2):
        yield from resnet(
            f"{theirs}mid_block.resnets.{j}", f"{ours}mid/resnets/{j}", shortcut=False, time=True
        )
    yield from spatial_transformer(f"{theirs}mid_block.attentions.0", f"{ours}mid/attentions/0", c.mid_layers)

    skips = [w for _, w in c.skip_shapes()]
    for n, i in enumerate(reversed(range(levels))):
        block, to = f"{theirs}up_blocks.{n}", f"{ours}up/{n}"
        widths_in = []
        for _ in range(c.layers_per_block + 1):
            widths_in.append(width + skips.pop())
            width = c.widths[i]
        yield from blocks(block, to, i, widths_in)
        if i:
            yield from weight(f"{block}.upsamplers.0.conv", f"{to}/resample/conv", "conv")
    yield from norm(f"{theirs}conv_norm_out", f"{ours}norm_out")
    yield from weight(f"{theirs}conv_out", f"{ours}conv_out", "conv")


def autoencoder(theirs: str, ours: str, config: Any) -> Rules:
    """An AutoencoderKL; `config` an AutoencoderConfig of kind "kl"."""
    c, last = config, len(config.widths) - 1

    def mid(block: str, to: str) -> Rules:
        yield from resnet(f"{block}.resnets.0", f"{to}/resnet_1", shortcut=False)
        yield from norm(f"{block}.attentions.0.group_norm", f"{to}/norm")
        for name in "qkv":
            yield from weight(f"{block}.attentions.0.to_{name}", f"{to}/attention/{name}")
        yield from weight(f"{block}.attentions.0.to_out.0", f"{to}/attention/out")
        yield from resnet(f"{block}.resnets.1", f"{to}/resnet_2", shortcut=False)

    def level(block: str, to: str, width: int, w: int, count: int) -> Rules:
        for j in range(count):
            changes = j == 0 and width != w
            yield from resnet(f"{block}.resnets.{j}", f"{to}/resnets/{j}", shortcut=changes)

    def ends(side: str) -> Rules:
        yield from norm(f"{theirs}{side}.conv_norm_out", f"{ours}{side}/norm_out")
        yield from weight(f"{theirs}{side}.conv_out", f"{ours}{side}/conv_out", "conv")

    yield from weight(f"{theirs}encoder.conv_in", f"{ours}encoder/conv_in", "conv")
    width = c.widths[0]
    for i, w in enumerate(c.widths):
        block, to = f"{theirs}encoder.down_blocks.{i}", f"{ours}encoder/down/{i}"
        yield from level(block, to, width, w, c.layers_per_block)
        if i < last:
            yield from weight(f"{block}.downsamplers.0.conv", f"{to}/resample/conv", "conv")
        width = w
    yield from mid(f"{theirs}encoder.mid_block", f"{ours}encoder/mid")
    yield from ends("encoder")
    if c.quant:
        yield from weight(f"{theirs}quant_conv", f"{ours}quant", "conv")
        yield from weight(f"{theirs}post_quant_conv", f"{ours}post_quant", "conv")
    yield from weight(f"{theirs}decoder.conv_in", f"{ours}decoder/conv_in", "conv")
    yield from mid(f"{theirs}decoder.mid_block", f"{ours}decoder/mid")
    for n, w in enumerate(reversed(c.widths)):
        block, to = f"{theirs}decoder.up_blocks.{n}", f"{ours}decoder/up/{n}"
        yield from level(block, to, width, w, c.layers_per_block + 1)
        if n < last:
            yield from weight(f"{block}.upsamplers.0.conv", f"{to}/resample/conv", "conv")
        width = w
    yield from ends("decoder")
