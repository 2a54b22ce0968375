"""Reference tensors of the published systems, and how they become parameters of our modules.

The full fixtures lie outside the repository, in $UMM_PARITY_DIR (default ``../shared/parity`` beside the
repository); tests that need them are skipped, with the reason, where the folder is absent. A few tensors
are kept in ``tests/data`` so that something always runs. The ``*_params`` functions take a PyTorch state
dict (names of the release) and a prefix, and give the nested dict of one of our modules.
"""

import os
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parents[1]
FOLDER = Path(os.environ.get("UMM_PARITY_DIR", ROOT / ".." / "shared" / "parity")) / "mm_interleaved"
SMALL = ROOT / "tests" / "data" / "mm_interleaved_small.safetensors"


def fixture(name: str) -> dict[str, np.ndarray]:
    """Tensors of one fixture file, or a skip."""
    path = FOLDER / f"{name}.safetensors"
    if not path.exists():
        pytest.skip(f"reference tensors not found at {path}; set UMM_PARITY_DIR to run this comparison")
    return load_file(path)


def small(prefix: str) -> dict[str, np.ndarray]:
    """Tensors of the repository's own excerpt whose names start with `prefix`, which is cut off."""
    return {k[len(prefix) :]: v for k, v in load_file(SMALL).items() if k.startswith(prefix)}


def filled(build: Callable[[], nnx.Module], scale: float = 0.3) -> nnx.Module:
    """What `build` makes, every parameter random: no gate is closed, and no initialiser is compiled."""
    graphdef, state = nnx.split(nnx.eval_shape(build))
    rng = np.random.default_rng(0)
    for _, variable in nnx.to_flat_state(state):
        variable.set_value(jnp.asarray(rng.normal(size=variable.shape, scale=scale), jnp.float32))
    return nnx.merge(graphdef, state)


def load(build: Callable[[], nnx.Module], params: dict) -> nnx.Module:
    """What `build` makes, with exactly the arrays of `params`: same paths, same shapes."""
    graphdef, state = nnx.split(nnx.eval_shape(build))
    wanted = {path: v.shape for path, v in nnx.to_flat_state(state)}
    flat = dict(_flatten(params))
    assert {path: a.shape for path, a in flat.items()} == wanted
    for path, variable in nnx.to_flat_state(state):
        variable.set_value(jnp.asarray(flat[path]))
    return nnx.merge(graphdef, state)


def _flatten(tree: dict, path: tuple = ()):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, (*path, key))
        else:
            yield (*path, key), value


# --- state dict to parameters -----------------------------------------------------------------------


def stacked(trees: list[dict]) -> dict:
    """Equal trees as one, with a leading axis of layers."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def linear(s: dict, prefix: str) -> dict:
    """torch Linear [out, in], or a 1x1 convolution [out, in, 1, 1] that we hold as a Linear."""
    kernel = s[f"{prefix}.weight"]
    return {"kernel": kernel.reshape(kernel.shape[:2]).T, "bias": s[f"{prefix}.bias"]}


def conv(s: dict, prefix: str) -> dict:
    """torch Conv2d [out, in, h, w]."""
    out = {"kernel": s[f"{prefix}.weight"].transpose(2, 3, 1, 0)}
    return out | ({"bias": s[f"{prefix}.bias"]} if f"{prefix}.bias" in s else {})


def norm(s: dict, prefix: str) -> dict:
    """Layer or RMS norm."""
    out = {"scale": s[f"{prefix}.weight"]}
    return out | ({"bias": s[f"{prefix}.bias"]} if f"{prefix}.bias" in s else {})


def synchronizer_params(s: dict, prefix: str) -> dict:
    """The MMFS core."""
    return {
        "query": linear(s, f"{prefix}.dynamic_offset_mask"),
        "relative": s[f"{prefix}.query_relpos.weight"],
        "offsets": linear(s, f"{prefix}.sampling_offsets"),
        "logits": linear(s, f"{prefix}.attention_weights"),
        "values": linear(s, f"{prefix}.value_proj"),
        "out": linear(s, f"{prefix}.output_proj"),
        "ignore": s[f"{prefix}.ignore_token"].reshape(-1),
    }


def backbone_sync_params(s: dict, prefix: str) -> dict:
    """One ``llama_cross_attn``."""
    return {
        "query_norm": norm(s, f"{prefix}.norm1"),
        "map_norm": norm(s, f"{prefix}.norm2"),
        "core": synchronizer_params(s, f"{prefix}.attn"),
        "gate": s[f"{prefix}.gate"],
    }


def decoder_sync_params(s: dict, prefix: str) -> dict:
    """One ``mmfs_down_blocks.*`` or ``mmfs_mid_block``."""
    return {
        "query_norm": norm(s, f"{prefix}.query_norm"),
        "map_norm": norm(s, f"{prefix}.feat_norm"),
        "core": synchronizer_params(s, f"{prefix}.mmfs"),
        "conv": linear(s, f"{prefix}.conv"),
    }


def _attention_params(s: dict, prefix: str, qk_norm: bool) -> dict:
    own = f"{prefix}.attention"
    out = {
        "query": linear(s, f"{own}.query"),
        "key": linear(s, f"{own}.key"),
        "value": linear(s, f"{own}.value"),
        "out": linear(s, f"{prefix}.output.dense"),
        "norm": norm(s, f"{prefix}.output.LayerNorm"),
    }
    if qk_norm:
        out |= {"query_norm": norm(s, f"{own}.q_norm"), "key_norm": norm(s, f"{own}.k_norm")}
    return out


def qformer_params(s: dict, prefix: str, *, layers: int, cross_every: int, qk_norm: bool) -> dict:
    """A ``perceiver_resampler``."""
    blocks = f"{prefix}.blip2qformer.encoder.layer"

    def layer(i: int) -> dict:
        out = {
            "attention": _attention_params(s, f"{blocks}.{i}.attention", qk_norm),
            "up": linear(s, f"{blocks}.{i}.intermediate_query.dense"),
            "down": linear(s, f"{blocks}.{i}.output_query.dense"),
            "norm": norm(s, f"{blocks}.{i}.output_query.LayerNorm"),
        }
        if i % cross_every == 0:
            out["cross"] = _attention_params(s, f"{blocks}.{i}.crossattention", qk_norm)
        return out

    periods = [
        {"layers": {str(j): layer(i + j) for j in range(cross_every)}} for i in range(0, layers, cross_every)
    ]
    return {
        "queries": s[f"{prefix}.queries"][0],
        "norm": norm(s, f"{prefix}.blip2qformer.layernorm"),
        "periods": stacked(periods),
    }


def _deformable_params(s: dict, prefix: str) -> dict:
    return {
        "offsets": linear(s, f"{prefix}.sampling_offsets"),
        "weights": linear(s, f"{prefix}.attention_weights"),
        "values": linear(s, f"{prefix}.value_proj"),
        "out": linear(s, f"{prefix}.output_proj"),
    }


def _extractor_params(s: dict, prefix: str) -> dict:
    return {
        "query_norm": norm(s, f"{prefix}.query_norm"),
        "source_norm": norm(s, f"{prefix}.feat_norm"),
        "attention": _deformable_params(s, f"{prefix}.attn"),
        "mlp_norm": norm(s, f"{prefix}.ffn_norm"),
        "up": linear(s, f"{prefix}.ffn.fc1"),
        "conv": conv(s, f"{prefix}.ffn.dwconv.dwconv"),
        "down": linear(s, f"{prefix}.ffn.fc2"),
    }


def clip_params(s: dict, prefix: str, *, layers: int) -> dict:
    """The transformer of a ``vision_model``."""

    def layer(i: int) -> dict:
        own = f"{prefix}.encoder.layers.{i}"
        return {
            "attention_norm": norm(s, f"{own}.layer_norm1"),
            "query": linear(s, f"{own}.self_attn.q_proj"),
            "key": linear(s, f"{own}.self_attn.k_proj"),
            "value": linear(s, f"{own}.self_attn.v_proj"),
            "out": linear(s, f"{own}.self_attn.out_proj"),
            "mlp_norm": norm(s, f"{own}.layer_norm2"),
            "up": linear(s, f"{own}.mlp.fc1"),
            "down": linear(s, f"{own}.mlp.fc2"),
        }

    return {
        "patch": conv(s, f"{prefix}.embeddings.patch_embedding"),
        "class_token": s[f"{prefix}.embeddings.class_embedding"],
        "position": s[f"{prefix}.embeddings.position_embedding.weight"],
        "norm": norm(s, f"{prefix}.pre_layrnorm"),
        "layers": stacked([layer(i) for i in range(layers)]),
    }


def clip_adapter_params(s: dict, prefix: str, *, layers: int, blocks: int, extra: int) -> dict:
    """``visual_tokenizer`` up to its resampler."""
    vision = f"{prefix}.encoder.vision_model"
    spm = f"{vision}.adapter_spm"
    own = f"{vision}.adapter_interactions"

    def interaction(i: int) -> dict:
        injector = f"{own}.{i}.injector"
        return {
            "injector": {
                "query_norm": norm(s, f"{injector}.query_norm"),
                "source_norm": norm(s, f"{injector}.feat_norm"),
                "attention": _deformable_params(s, f"{injector}.attn"),
                "gamma": s[f"{injector}.gamma"],
            },
            "extractor": _extractor_params(s, f"{own}.{i}.extractor"),
        }

    stem = [(f"{spm}.stem.{i}", f"{spm}.stem.{i + 1}") for i in (0, 3, 6)]
    stem += [(f"{spm}.conv{i}.0", f"{spm}.conv{i}.1") for i in (2, 3, 4)]
    up = s[f"{vision}.adapter_up.weight"]  # [in, out, 2, 2]
    extractors = [_extractor_params(s, f"{own}.{blocks - 1}.extra_extractors.{i}") for i in range(extra)]
    return {
        "clip": clip_params(s, vision, layers=layers),
        "stem": {
            "convs": {str(i): conv(s, c) for i, (c, _) in enumerate(stem)},
            "norms": {str(i): norm(s, n) for i, (_, n) in enumerate(stem)},
            "to_maps": {str(i): linear(s, f"{spm}.fc{i + 1}") for i in range(4)},
        },
        "level": s[f"{vision}.adapter_level_embed"],
        "interactions": stacked([interaction(i) for i in range(blocks)]),
        "extra": {str(i): e for i, e in enumerate(extractors)},
        "up": {"kernel": up.transpose(0, 2, 3, 1).reshape(up.shape[0], -1)},
        "up_bias": s[f"{vision}.adapter_up.bias"],
        "token_proj": linear(s, f"{prefix}.pos_proj"),
        "token_norm": norm(s, f"{prefix}.pos_ln"),
        "out_norm": norm(s, f"{prefix}.post_ln"),
    }
