"""The README.md of an export: what it is, how it is loaded, what was checked, what its user must know."""

from collections.abc import Mapping, Sequence
from typing import Any

from umm_jax.weights.hub import StockPart

_HEAD = """---
library_name: {library}
license: other  # TO DO before you publish: name the licence of these weights
tags: [{tags}]
---
"""

_LICENCE = """## Licence and origin

This file was generated; whoever publishes the weights completes it.

- Licence of the weights: **to be named**. Weights that began from others (a language model, CLIP, Stable
  Diffusion) stay under the terms of those as well.
- Training data: **to be described**.
- Converted by {by} from step {step} of a run, {weights} weights, dtype: {dtype}.
"""


def whole(config: Mapping[str, Any], report: Mapping[str, Any], tokenizer: Sequence[str]) -> str:
    """The card of a whole model; `config` and `report` are its config.json and parity.json."""
    family = config["family"]
    words = ", ".join(f"`{name}`" for name in tokenizer) or "none came with the run"
    return (
        _HEAD.format(library="pytorch", tags=f"{family}, multimodal")
        + f"""
# {config["architectures"][0]}: weights for PyTorch

The whole model as one state dict, with the tensor names of the released {family} checkpoints, in safetensors.
`config.json` has every size of it under `model`.

## Loading

```python
import json, pathlib
from safetensors.torch import load_file

folder = pathlib.Path(".")
index = folder / "model.safetensors.index.json"
files = ["model.safetensors"]
if index.exists():
    files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
state = {{}}
for file in files:
    state.update(load_file(folder / file))
model.load_state_dict(state)  # an instance of the reference implementation, of the same sizes
```

For JAX: `umm convert from-torch THIS_FOLDER --out RUN`.

Tokenizer files: {words}.

"""
        + _checks(report)
        + _licence(report)
    )


def part(stock: StockPart, report: Mapping[str, Any]) -> str:
    """The card of one part that a stock class loads; `report` is its parity.json."""
    title, library, class_name = stock.title, stock.library, stock.class_name
    listed = "".join(f"- {note}\n" for note in stock.notes)
    return (
        _HEAD.format(library=library, tags="multimodal")
        + f"""
# {title}

One part of a larger model, in the layout of `{library}`:

```python
from {library} import {class_name}

model = {class_name}.from_pretrained("THIS_FOLDER")
```

What to know about it:

{listed}
"""
        + _checks(report)
        + _licence(report)
    )


def _checks(report: Mapping[str, Any]) -> str:
    lines = []
    for check in report["checks"]:
        counts = ", ".join(f"{key} {value}" for key, value in check.items() if key not in ("check", "passed"))
        lines.append(f"- {'passed' if check['passed'] else 'not equal'}: {check['check']} ({counts}).\n")
    verified = "Outputs were compared with the reference: see `verified` in `parity.json`."
    if not report["verified"]:
        verified = "Outputs were not compared with another implementation on these weights."
    return (
        "## What was checked\n\n" + "".join(lines) + f"- {verified}\n"
        "- `sha256sum -c sha256sums` checks the files; `parity.json` has the sha256 of every tensor.\n\n"
    )


def _licence(report: Mapping[str, Any]) -> str:
    return _LICENCE.format(by=report["written_by"], **report["weights"])
