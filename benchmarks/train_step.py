"""A whole training step against the same model put together of stock PyTorch parts.

    python benchmarks/train_step.py                       # all rows, CPU: some minutes to compile each
    python benchmarks/train_step.py --rows bench --threads 1 --json step.json
    python benchmarks/train_step.py --quick               # the smallest row, a few steps

A step is forward, backward, clipping and AdamW in float32, with the release's frozen parts; the autoencoder's
encoding of the targets is included. Ours is the compiled step of ``train.step.make_step``; the baseline is
``torch_mm_interleaved.py`` (needs torch, transformers and diffusers; without them ours is timed alone). The
first row, ``bench``, is one for which the reference implementation has been timed too.

Both sides live in a process of their own, on the same `--threads` cores, and take turns: a block of steps of
one, then of the other, so that a change of the machine's speed meets both. Reported are medians and quartiles
of wall and CPU seconds per step; the ratio is that of neighbouring blocks, above 1 where ours is faster.
Where other programs use the machine, only CPU seconds with ``--threads 1`` mean much. Peak memory of the
steps is measured after the first one, so that it leaves out compilation; that of the process's whole life
stands beside it.
"""

import time

import side_by_side
from train_step_rows import ROWS, make_batch


class Ours:
    """The compiled step on a batch that does not move."""

    def __init__(self, row, device: str, threads: int):
        import jax

        from umm_jax import config, families, sharding
        from umm_jax.families.mm_interleaved.recipe import optimizer_groups
        from umm_jax.train import state, step
        from umm_jax.train.optimizer import flatten

        family = families.get("mm_interleaved")
        sections = dict(
            family="mm_interleaved",
            model=row.model,
            data=dict(tokens=row.tokens, images=max(row.images), batch_size=len(row.images)),
            optim=dict(lr=1e-4, b1=0.9, b2=0.995, eps=1e-6, clip=1.0, groups=optimizer_groups()),
            train=dict(loss=dict(text=1.0, image=10.0)),
        )
        run = config.from_dict(config.RunConfig, sections)
        model = config.from_dict(family.config.ModelConfig, row.model, "config.model")
        mesh = sharding.make_mesh(run.mesh, jax.devices()[:1])
        plan = state.plan(lambda keys: family.model.build(model, keys), run, mesh)
        sizes = {path: leaf.size for path, leaf in flatten(plan.abstract["params"]).items()}
        frozen = plan.optimizer.frozen
        self.parameters = {
            "total": sum(sizes.values()),
            "trained": sum(n for path, n in sizes.items() if path not in frozen),
        }
        self.state, self.jax = state.with_params(plan, run, parameters(plan.abstract["params"])), jax
        self.batch = sharding.put_batch(make_batch(row), mesh)
        start = time.perf_counter()
        self.run = step.make_step(plan, run).lower(self.state, self.batch).compile()
        self.compile_seconds = time.perf_counter() - start
        self.device = f"jax {jax.__version__}, {jax.devices()[0].device_kind}"

    def step(self) -> float:
        self.state, metrics = self.run(self.state, self.batch)
        self.jax.block_until_ready(self.state)
        return float(metrics["scalars"]["loss"])

    def device_peak(self) -> int | None:
        stats = self.jax.devices()[0].memory_stats()
        return None if stats is None else stats.get("peak_bytes_in_use")


def parameters(abstract: dict) -> dict:
    """Random ones, drawn by numpy: the program that initialises a model takes minutes to compile."""
    import numpy as np

    rng = np.random.default_rng(0)

    def draw(tree: dict) -> dict:
        return {
            name: draw(leaf) if isinstance(leaf, dict) else one(name, leaf) for name, leaf in tree.items()
        }

    def one(name: str, leaf) -> np.ndarray:
        if name == "scale":
            return np.ones(leaf.shape, np.float32)
        fan_in = int(np.prod(leaf.shape[:-1])) if len(leaf.shape) > 1 else leaf.shape[0]
        return rng.standard_normal(leaf.shape, np.float32) / max(fan_in, 1) ** 0.5

    return draw(abstract)


class Torch:
    """The baseline on the same batch."""

    def __init__(self, row, device: str, threads: int):
        import torch
        from torch_mm_interleaved import Trainer

        torch.set_num_threads(threads)
        # As JAX does by default on such cards; no effect on a CPU.
        torch.backends.cuda.matmul.allow_tf32 = True
        self.torch, self.cuda = torch, device == "gpu"
        self.trainer = Trainer(row, make_batch(row), "cuda" if self.cuda else "cpu")
        self.parameters, self.compile_seconds = self.trainer.parameters, None
        name = torch.cuda.get_device_name() if self.cuda else "cpu"
        self.device = f"torch {torch.__version__}, {name}"

    def step(self) -> float:
        loss = self.trainer.step()
        if self.cuda:
            self.torch.cuda.synchronize()
        return loss.item()

    def device_peak(self) -> int | None:
        return self.torch.cuda.max_memory_allocated() if self.cuda else None


BENCHMARK = side_by_side.Benchmark(
    script=__file__,
    sides={"ours": Ours, "torch": Torch},
    rows=ROWS,
    tell=lambda row: f"{len(row.images)} rows x {row.tokens} tokens, images {row.images}",
    needs=("torch", "transformers", "diffusers"),
    quick="small",
)

if __name__ == "__main__":
    side_by_side.main(BENCHMARK, __doc__)
