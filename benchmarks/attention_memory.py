"""Temporaries of attention under a mask object, forward and backward, by number of tokens: compiled, not run.

    python benchmarks/attention_memory.py                # this machine's CPU
    python benchmarks/attention_memory.py --tpu v5e:2x2  # for a TPU, ahead of time: `pip install libtpu`
    python benchmarks/attention_memory.py --tpu v5e:2x2 --implementation kernels

28 heads of width 128 and 4 key/value heads in bfloat16, as BAGEL-7B has them; one row. What the compiler
plans is reported; that it also runs is not.
"""

import argparse
import json
import os
from pathlib import Path

HEADS, KV, WIDTH = 28, 4, 128
TOKENS = (2048, 4096, 8192, 16384, 32768)


def temporaries(tokens: int, device, implementation: str) -> int:
    """Bytes beside arguments and results."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import SingleDeviceSharding

    from umm_jax.models.attention import attend
    from umm_jax.models.masks import MaskSpec

    home = SingleDeviceSharding(device)
    array = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=home)  # noqa: E731
    q, k = (array((1, tokens, heads, WIDTH), jnp.bfloat16) for heads in (HEADS, KV))
    mask = MaskSpec(*[array((1, tokens), jnp.int32)] * 4)

    def total(q, k, v, mask):
        return jnp.sum(attend(q, k, v, (mask, mask), implementation=implementation).astype(jnp.float32))

    compiled = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(q, k, k, mask).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tpu", metavar="TOPOLOGY", help="for example v5e:2x2")
    parser.add_argument("--implementation", default="auto", help="auto, blocks or kernels")
    parser.add_argument("--json", type=Path, help="write the results there too")
    args = parser.parse_args()
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    import jax

    if args.tpu:
        from jax.experimental import topologies

        device = topologies.get_topology_desc(platform="tpu", topology_name=args.tpu).devices[0]
    else:
        device = jax.devices()[0]
    found = {}
    for tokens in TOKENS:
        found[tokens] = temporaries(tokens, device, args.implementation)
        share = found[tokens] / tokens / 1024
        print(f"{tokens:6d} tokens  {found[tokens] / 2**20:8.1f} MiB  {share:6.2f} KiB a token", flush=True)
    if args.json:
        report = {
            "device": args.tpu or str(device),
            "implementation": args.implementation,
            "temporary_bytes": found,
        }
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
