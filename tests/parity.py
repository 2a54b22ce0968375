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


def make(build: Callable[[], nnx.Module]) -> nnx.Module:
    """What `build` makes, compiled as a whole: much faster than one initialiser after the other."""
    return nnx.jit(build)()


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


def stacked(trees: list[dict]) -> dict:
    """Equal trees as one, with a leading axis of layers."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)
