"""A few docs of a benchmark that are asked again and again while a run trains."""

from umm_jax import config as configs
from umm_jax.config import BenchmarkConfig, ReplySettings
from umm_jax.errors import ConfigError
from umm_jax.evaluate import asking, scoring, table, tasks
from umm_jax.evaluate.asking import Model
from umm_jax.evaluate.benchmark import read_docs
from umm_jax.world.scene import WorldConfig


class Watched:
    """A few docs of a benchmark, read once and asked whenever a run in training wants to know.

    Its `name` is the task's, and what differs from the task's own settings.

    Args:
        chosen: what is asked. world, reply: those of the run.

    Raises:
        ConfigError: unknown task or setting, or a task that needs a judge.
        DataError: annotations.
    """

    def __init__(self, chosen: BenchmarkConfig, world: WorldConfig, reply: ReplySettings):
        self.task = tasks.get(chosen.task)
        if self.task.cost != "A":
            other = "a judge" if self.task.cost == "C" else "a network"
            raise ConfigError(
                f"train.benchmarks: {self.task.name} needs {other} besides the model; ask it afterwards"
            )
        self.settings = scoring.settings_of(self.task, chosen.settings)
        self.name = table.row_of(self.task, self.settings)
        self.docs, _ = read_docs(self.task, self.settings, chosen.data_root, world, chosen.limit)
        self.reply = configs.from_dict(
            ReplySettings, {**configs.to_dict(reply), **self.task.reply, **chosen.reply}, "reply"
        )

    def figures(self, model: Model, *, seed: int, batch_size: int) -> dict[str, float]:
        """{name: headline, name/parse_rate} of what the model replies now; absent where there is none."""
        batches = asking.batches(self.docs, batch_size)
        asked = asking.ask(model, batches, self.reply, seed=seed, batch_size=batch_size)
        found = {a.doc.id: a.response for batch in asked for a in batch}
        records, _ = scoring.mark(self.task, self.docs, found, self.settings)
        if not records:
            return {}
        head = self.task.total(records, self.settings)[self.task.headline].value
        told = {} if head is None else {self.name: head}
        return told | {f"{self.name}/parse_rate": scoring.parse_rate(records)}
