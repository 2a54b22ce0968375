"""A mixture of transformers, forward and backward, against an equal one in PyTorch.

    python benchmarks/mot_step.py                    # the row of the reference, CPU
    python benchmarks/mot_step.py --rows 2k,4k --blocks 3 --json mot.json
    python benchmarks/mot_step.py --memory           # temporaries of our step by length, compiled, not run

The first row, ``reference``, is one packed sample of 1,030 tokens on a decoder of 8 layers for which the
reference implementation of BAGEL has been timed too: a clean latent of 16 x 16, a vision image of 16 x 16,
a text without loss, a text with loss, a noised latent of 16 x 16. The rows ``2k`` and more pack such samples.
The autoencoder is left out on both sides; a latent token has 48 numbers where the reference's has 64.

The baseline routes tokens to the two sets of weights by index, as the reference does, and attends by
``scaled_dot_product_attention`` under a boolean mask. How the sides take turns: ``side_by_side.py``.
"""

import math
import sys
import time
from dataclasses import dataclass

import numpy as np
import side_by_side

WIDTH, MLP, LAYERS, HEADS, KV, VOCAB = 512, 1408, 8, 8, 2, 8192
VIT, VIT_MLP, VIT_LAYERS, VIT_HEADS, PATCH = 384, 1024, 6, 6, 14
CELLS, WORDS = 16, 126  # of a side; of a text between its start and end


@dataclass(frozen=True)
class Row:
    """So many samples of 1,030 tokens in one pack."""

    samples: int

    @property
    def tokens(self) -> int:
        return self.samples * (3 * (CELLS**2 + 2) + 2 * (WORDS + 2))


ROWS = {"reference": Row(1), "2k": Row(2), "4k": Row(4), "8k": Row(8), "16k": Row(16), "32k": Row(32)}


def section() -> dict:
    """The `model` section of a config."""
    side = dict(longest=64, shortest=64)
    return dict(
        layout=dict(
            latent=dict(**side, stride=4),
            vision=dict(longest=CELLS * PATCH, shortest=CELLS * PATCH, stride=PATCH),
            latent_grid=CELLS,
            vision_grid=CELLS,
        ),
        mixture=dict(
            vocab=VOCAB, width=WIDTH, layers=LAYERS, heads=HEADS, kv_heads=KV, mlp=MLP, rope_base=1e6
        ),
        vision=dict(patch=PATCH, grid=CELLS, width=VIT, layers=VIT_LAYERS, heads=VIT_HEADS, mlp=VIT_MLP),
        autoencoder=dict(kind="identity"),
        latent_patch=4,
        schedule=dict(kind="flow", prediction="velocity", times="logit_normal"),
        loss_chunk=WORDS + 2,
    )


def make_batch(row: Row) -> dict:
    """One packed row, random."""
    from umm_jax.families.chatumm.segments import Grids, Segment, Shown, Special, lay

    rng = np.random.default_rng(0)
    shown = [Shown((CELLS, CELLS), (CELLS, CELLS))] * 2
    axes: dict = {name: [] for name in ("tokens", "latents", "patches")}
    for number in range(row.samples):
        words = [tuple(rng.integers(9, VOCAB, WORDS).tolist()) for _ in range(2)]
        segments = [
            Segment("latent", image=0),
            Segment("vision", image=0),
            Segment("text", words[0]),
            Segment("text", words[1], learned=True),
            Segment("latent", image=1, learned=True),
        ]
        laid = lay(segments, shown, Special(*range(4, 9)), Grids(CELLS, CELLS, CELLS))
        for name, part in (("tokens", laid.tokens), ("latents", laid.latents), ("patches", laid.patches)):
            moved = {"image": 2 * number, "patch": number * CELLS**2, "time": 2 * number}
            part = {k: np.where(v < 0, v, v + moved[k]) if k in moved else v for k, v in part.items()}
            part["segment_ids"] = np.full(len(part["place" if name != "tokens" else "ids"]), number + 1)
            axes[name].append(part)
    batch = {
        name: {k: np.concatenate([p[k] for p in parts])[None] for k in parts[0]}
        for name, parts in axes.items()
    }
    batch["patches"]["pixels"] = rng.integers(0, 256, (1, row.samples * CELLS**2, 3 * PATCH**2), np.uint8)
    batch["images"] = {
        "pixels": rng.integers(0, 256, (1, 2 * row.samples, 64, 64, 3), np.uint8),
        "size": np.full((1, 2 * row.samples, 2), 64),
        "segment_ids": np.repeat(np.arange(row.samples) + 1, 2)[None],
    }
    return batch


class Ours:
    """The compiled gradient on a batch that does not move."""

    def __init__(self, row: Row, device: str, threads: int):
        import jax

        from umm_jax import compiler

        self.jax = jax
        graphdef, abstract = model()
        rng = np.random.default_rng(0)
        leaves, tree = jax.tree.flatten(abstract)
        draw = lambda leaf: rng.standard_normal(leaf.shape, np.float32) / max(leaf.shape[0], 1) ** 0.5  # noqa: E731
        self.state = jax.device_put(jax.tree.unflatten(tree, [draw(leaf) for leaf in leaves]))
        self.parameters = dict.fromkeys(("total", "trained"), sum(leaf.size for leaf in leaves))
        self.batch = jax.device_put(make_batch(row))
        start = time.perf_counter()
        self.run = (
            jax.jit(gradient(graphdef), compiler_options=compiler.often())
            .lower(self.state, self.batch)
            .compile()
        )
        self.compile_seconds = time.perf_counter() - start
        self.device = f"jax {jax.__version__}, {jax.devices()[0].device_kind}"

    def step(self) -> float:
        loss, grads = self.run(self.state, self.batch)
        self.jax.block_until_ready(grads)
        return float(loss)

    def device_peak(self) -> int | None:
        stats = self.jax.devices()[0].memory_stats()
        return None if stats is None else stats.get("peak_bytes_in_use")


def model():
    """(graphdef, abstract state)."""
    from flax import nnx

    from umm_jax import config, families
    from umm_jax.models.layers import Keys

    family = families.get("chatumm")
    made = config.from_dict(family.config.ModelConfig, section(), "config.model")
    return nnx.split(nnx.eval_shape(lambda: family.model.build(made, Keys(0))))


def gradient(graphdef):
    """f(state, batch) -> (loss, gradients): 0.25 text + 1.0 image, as BAGEL weighs them."""
    import jax
    from flax import nnx

    def loss(state, batch):
        module = nnx.merge(graphdef, state)
        sums, _ = module.loss_sums(batch, jax.random.key(0))
        weights = module.loss_weights(batch)
        return 0.25 * sums["text"] / weights["text"] + sums["image"] / weights["image"]

    return jax.value_and_grad(loss)


class Torch:
    """The baseline on the same batch."""

    def __init__(self, row: Row, device: str, threads: int):
        import torch

        torch.set_num_threads(threads)
        torch.backends.cuda.matmul.allow_tf32 = True
        self.torch, self.cuda = torch, device == "gpu"
        torch.manual_seed(0)
        from torch_mot import Model

        where = "cuda" if self.cuda else "cpu"
        self.model = Model(sys.modules[__name__]).to(where)
        count = sum(p.numel() for p in self.model.parameters())
        self.parameters, self.compile_seconds = {"total": count, "trained": count}, None
        self.batch = self.model.prepare(make_batch(row), where)
        self.device = f"torch {torch.__version__}, {torch.cuda.get_device_name() if self.cuda else 'cpu'}"

    def step(self) -> float:
        self.model.zero_grad(set_to_none=True)
        loss = self.model(**self.batch)
        loss.backward()
        if self.cuda:
            self.torch.cuda.synchronize()
        return loss.item()

    def device_peak(self) -> int | None:
        return self.torch.cuda.max_memory_allocated() if self.cuda else None


def memory() -> None:
    """Bytes of temporaries of our step by length of the pack."""
    import jax

    graphdef, abstract = model()
    first = None
    for name, row in ROWS.items():
        batch = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), make_batch(row))
        found = jax.jit(gradient(graphdef)).lower(abstract, batch).compile().memory_analysis()
        size = found.temp_size_in_bytes
        first = first or size / row.tokens
        share = size / row.tokens / first
        print(
            f"{name:10s} {row.tokens:6d} tokens  {size / 2**20:8.0f} MiB  {share:.2f} of the first's a token"
        )


BENCHMARK = side_by_side.Benchmark(
    script=__file__,
    sides={"ours": Ours, "torch": Torch},
    rows=ROWS,
    tell=lambda row: f"one pack of {row.tokens} tokens, {row.samples} samples",
    needs=("torch",),
    quick="reference",
)

if __name__ == "__main__":
    if "--memory" in sys.argv:
        memory()
    else:
        if not any(a.startswith("--rows") for a in sys.argv) and "--serve" not in sys.argv:
            sys.argv.append("--rows=reference,2k,4k")
        side_by_side.main(BENCHMARK, __doc__)
assert math.isclose(ROWS["reference"].tokens, 1030)
