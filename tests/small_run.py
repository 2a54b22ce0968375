"""A run of a step or two, made through the command line: a model that replies, if not well."""

import json
from pathlib import Path

from umm_jax import cli

ROOT = Path(__file__).resolve().parent.parent


def make(folder: Path, config: str = "world_chatumm", steps: int = 1) -> Path:
    """Trains configs/CONFIG.py for a moment in `folder`, and gives the folder back."""
    path = ROOT / "configs" / f"{config}.py"
    base = [f"--config={path}"]
    cli.dispatch(["data", "synthesize", *base, "--count=16", f"--out={folder / 'data'}", "--shards=1"])
    cli.dispatch(["data", "tokenizer", *base, f"--out={folder / 'tokenizer.model'}"])
    sources = json.dumps([{"path": str(folder / "data")}])
    changes = {"train.steps": steps, "train.eval_every": 0, "train.init_from": "", "data.batch_size": 4}
    changes |= {"data.sources": sources, "data.tokenizer": folder / "tokenizer.model"}
    overrides = [f"--config.{key}={value}" for key, value in changes.items()]
    cli.dispatch(["train", *base, f"--workdir={folder}", *overrides])
    return folder
