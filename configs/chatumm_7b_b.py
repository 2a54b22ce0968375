"""Stage B of ``chatumm_7b.py``, which says what it is."""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config(chips: str | None = None) -> ConfigDict:
    return runpy.run_path(str(Path(__file__).with_name("chatumm_7b.py")))["stage"]("B", chips)
