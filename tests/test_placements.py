"""Where every parameter lies, held by files: a change of a rule or of a name shows what it moves.

Written anew, after the difference has been read, with UMM_WRITE_PLACEMENTS=1 in the environment.
"""

import collections
import os
import re
from pathlib import Path

import pytest

from umm_jax import config
from umm_jax.plan import steps

CONFIGS = Path(__file__).parent.parent / "configs"
KEPT = Path(__file__).parent / "placements"

PAIRS = {
    "text_13b-fsdp64": ("text_13b", ["mesh.data=1", "mesh.fsdp=64", "mesh.tensor=1"], 64),
    "mm_interleaved_13b-fsdp64": ("mm_interleaved_13b", ["mesh.data=1", "mesh.fsdp=64", "mesh.tensor=1"], 64),
    "mm_interleaved_13b-fsdp32_tensor8": (
        "mm_interleaved_13b",
        ["mesh.data=1", "mesh.fsdp=32", "mesh.tensor=8"],
        256,
    ),
    "chatumm_7b-data2_fsdp64": ("chatumm_7b", ["mesh.data=2", "mesh.fsdp=64", "mesh.tensor=1"], 128),
    "chatumm_7b-fsdp16_tensor4": ("chatumm_7b", ["mesh.data=1", "mesh.fsdp=16", "mesh.tensor=4"], 64),
    "world_tiny-fsdp4_tensor2": ("world_tiny", ["mesh.data=1", "mesh.fsdp=4", "mesh.tensor=2"], 8),
    "world_unified_1-data2_fsdp2_tensor2": (
        "world_unified_1",
        ["mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"],
        8,
    ),
}


def _lines(report) -> str:
    """One line for all parameters that differ in a number of their path only."""
    found = collections.Counter(
        (re.sub(r"(?<=/)\d+(?=/)|(?<=_)\d+(?=/)", "#", p.path), str(list(p.shape)), str(p.spec))
        for p in report.placements
    )
    lines = [f"{path}  {shape}  {spec}  x{count}" for (path, shape, spec), count in sorted(found.items())]
    return "\n".join([*lines, report.summary()]) + "\n"


@pytest.mark.parametrize("name", PAIRS)
def test_every_parameter_lies_where_it_did(name):
    file, overrides, devices = PAIRS[name]
    report = steps.placements(config.load(str(CONFIGS / f"{file}.py"), overrides), devices)
    kept = KEPT / f"{name}.txt"
    if os.environ.get("UMM_WRITE_PLACEMENTS"):
        kept.write_text(_lines(report))
    assert _lines(report) == kept.read_text()
    # What is whole on every device is small: a thousandth of the model, at real sizes.
    if devices > 8:
        whole = sum(p.bytes for p in report.placements if p.replicated)
        assert whole < 1e-3 * sum(p.bytes for p in report.placements)
