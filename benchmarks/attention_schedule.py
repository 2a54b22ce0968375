"""How long the attention kernels are in the TPU compiler's final schedule, as a share of a chip's peak.

    python benchmarks/attention_schedule.py --topology v5p:2x2x1,v5e:2x2,v6e:2x2 --tokens 40960

Nothing runs on a TPU. The kernels are compiled for one chip, with the compiler's last listing of instruction
bundles kept (one bundle a cycle), and these are counted: of a pair of blocks that the mask leaves whole, of
one it cuts, and what a turn of the grid takes beside. A pair takes no fewer cycles than its matrix units need
to take in its rows. Turns of either kind are counted in the tables of a causal stream; their cycles, beside
the products the kernels declare, give the share. Waiting for memory is not in it, nor what stalls a chip.
``umm_jax.plan.estimate.SCHEDULED`` holds the last columns. Needs the ``plan`` extra (``make setup-plan``).
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from umm_jax.models import attention_tpu
from umm_jax.models.masks import EMPTY, MIXED, WHOLE, MaskSpec, stream
from umm_jax.plan import chips, compiling

HEADS, GROUP, WIDTH = 4, 7, 128
PRODUCTS = {"attend_forward": 2, "attend_backward": 5}
SIDE = {"v6e": 256}  # of a matrix unit; 128 of the others
PACKED = 16  # rows of bfloat16 that one instruction gives a matrix unit
COLUMNS = ("chip", "kernel", "whole", "cut", "beside", "turns", "cut", "share", "a score", "a row")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", default="v5p:2x2x1,v5e:2x2,v6e:2x2")
    parser.add_argument("--tokens", type=int, default=40960)
    parser.add_argument("--compile", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.compile:
        return _compile(args.compile, args.tokens)
    compiling.require_libtpu()
    print(f"causal stream of {args.tokens} tokens, {HEADS * GROUP} heads of width {WIDTH}, bfloat16; cycles")
    print("{:5} {:16} {:>6} {:>6} {:>7} {:>7} {:>5} {:>7} {:>9} {:>6}".format(*COLUMNS))
    for name in args.topology.split(","):
        _report(chips.topology(name, 1).chip, name, args.tokens)


def _report(chip: chips.Chip, topology: str, tokens: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        keep = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        keep += " --xla_jf_dump_llo_pass_label_regex=final_bundles"
        command = [sys.executable, __file__, "--compile", topology, "--tokens", str(tokens)]
        env = compiling.environment(tpu=True) | {"LIBTPU_INIT_ARGS": keep}
        done = subprocess.run(command, env=env, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        for kernel, products in PRODUCTS.items():
            cycles = flops = 0
            turns = _turns(kernel, tokens)
            listings = sorted(Path(folder).glob(f"*-{kernel}*-01-*"))
            for path, (whole, cut, scores, _) in zip(listings, turns, strict=True):
                found = Lengths(path.read_text(), chip)
                cycles += whole * found.whole + cut * found.cut + (whole + cut) * found.beside
                flops += 2 * products * scores * WIDTH
            share = flops / (cycles / chip.cores / chip.clock) / chip.peak
            (whole, cut), block = (sum(turn[i] for turn in turns) for i in (0, 1)), turns[-1][3]
            a_score = (found.whole + found.beside) / block[0] / block[1]
            a_row = (found.cut - found.whole) / block[0]
            print(
                f"{chip.name:5} {kernel:16} {found.whole:6.0f} {found.cut:6.0f} {found.beside:7.0f} "
                f"{whole:7} {cut:5} {share:7.1%} {a_score:9.2e} {a_row:6.1f}",
                flush=True,
            )


class Lengths:
    """Cycles of one kernel's turn: `whole` and `cut` pairs, and what comes `beside` either."""

    def __init__(self, listing: str, chip: chips.Chip):
        rows = self._rows(listing)
        ends = {n: at for at, text in rows for n in re.findall(r"[Ee]mpty region (\d+)", text)}
        jumps = [
            (at, ends[found[1]])
            for at, text in rows
            if (found := re.search(r"sbr\.rel .*target = \$region(\d+)", text))
            and ends.get(found[1], -1) > at
        ]
        # The longest jump is over all turns; those that multiply and hold no other are over a pair.
        jumps.sort(key=lambda jump: jump[0] - jump[1])
        first, last = jumps[0]
        pairs = [jump for jump in jumps if "vmatmul" in self._text(rows, *jump)]
        cut, whole = (a for a in pairs if not any(a[0] < b[0] and b[1] < a[1] for b in pairs))
        self.beside = last - first - sum(b - a for a, b in (cut, whole))
        self.cut, self.whole = (self._pair(rows, *span, chip) for span in (cut, whole))

    @staticmethod
    def _rows(listing: str) -> list[tuple[int, str]]:
        rows = []
        for line in listing.splitlines():
            if found := re.match(r"\s*(0x[0-9a-f]+|0)\s+(?:L[HBE]|P[BF]|CT)?\s*:(.*)", line):
                rows.append((int(found[1], 16), found[2]))
            elif rows:
                rows[-1] = (rows[-1][0], f"{rows[-1][1]} {line}")
        return rows

    @staticmethod
    def _text(rows, first: int, end: int) -> str:
        return " ".join(text for at, text in rows if first < at < end)

    def _pair(self, rows, first: int, end: int, chip: chips.Chip) -> float:
        text = self._text(rows, first, end)
        units = set(re.findall(r"mxu\d", text))
        most = max(len(re.findall(rf"vmatmul\S*{unit}", text)) for unit in units)
        rate = chip.peak / chip.cores / chip.clock / (len(units) * 2 * SIDE.get(chip.name, 128) ** 2)
        return max(end - first, most * PACKED / rate)


def _turns(kernel: str, tokens: int) -> list[tuple[int, int, int, tuple[int, int]]]:
    """For each span of queries, of one head: turns of whole pairs, of cut ones, scores, and a block."""
    q, k = jnp.zeros((1, 1, 1, tokens, WIDTH)), jnp.zeros((1, 1, tokens, WIDTH))
    mask, found = stream(jnp.ones((1, tokens), jnp.int32)), []
    forward = kernel == "attend_forward"
    keys = attention_tpu.block_of_keys(tokens) if forward else attention_tpu.KEYS
    for span in attention_tpu._spans(q, k):
        of_span = MaskSpec(*(span.of(a, axis=1) for a in mask))
        call = attention_tpu._Call(span.of(q), k, k, of_span, mask, 1.0, span.start, keys)
        table = np.asarray(call.table if forward else call.table.swapaxes(1, 2))
        # What reads nothing has a turn, too, and is cut.
        cut = (table == MIXED).sum() + (table == EMPTY).all(axis=-1).sum()
        scores = call.cost(1, 0, []).transcendentals
        block = (call.t, call.s) if forward else (call.s, call.t)
        found.append((int((table == WHOLE).sum()), int(cut), scores, block))
    return found


def _compile(topology: str, tokens: int) -> None:
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    on = SingleDeviceSharding(devices[0])
    q = jax.ShapeDtypeStruct((1, HEADS, GROUP, tokens, WIDTH), jnp.bfloat16, sharding=on)
    k = jax.ShapeDtypeStruct((1, HEADS, tokens, WIDTH), jnp.bfloat16, sharding=on)
    mask = MaskSpec(*[jax.ShapeDtypeStruct((1, tokens), jnp.int32, sharding=on)] * 4)

    def both(q, k, v, mask):
        out, total = attention_tpu.forward(q, k, v, (mask, mask), WIDTH**-0.5)
        return attention_tpu.backward(q, k, v, (mask, mask), out, total, out, WIDTH**-0.5)

    jax.jit(both).lower(q, k, k, mask).compile()


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main()
