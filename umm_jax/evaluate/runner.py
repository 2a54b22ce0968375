"""Asks a model every item of every skill, has the replies judged, and keeps figures and samples.

    eval/results.json      {"step", "weights", ..., "splits": {split: {figure: row}}}, where a row is
                           {"value", "n", "stderr", "oracles": {oracle: value}}
    eval/samples.msgpack   some items of each skill as they went, failures among them, for the report

Both are rewritten after each skill, so an interrupted evaluation goes on where it was. A reply depends on
its item, the seed and the weights alone: not on the order of items, the batch, or where a run was resumed.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgpack
from tqdm import tqdm

from umm_jax import config as configs
from umm_jax.config import ReplySettings, RunConfig
from umm_jax.conversation import ImageData
from umm_jax.data.files import storage_errors, write_atomic
from umm_jax.errors import ConfigError, DataError
from umm_jax.evaluate import asking
from umm_jax.evaluate.asking import Asked
from umm_jax.evaluate.report import HEADLINE
from umm_jax.evaluate.tasks.world import doc_of
from umm_jax.evaluate.watched import Watched
from umm_jax.evaluate.world_expert import attended
from umm_jax.families.contract import Replier
from umm_jax.generate import Loaded, load_run
from umm_jax.world import oracles, skills
from umm_jax.world.judge import Judge
from umm_jax.world.scene import WorldConfig
from umm_jax.world.skills import Item
from umm_jax.world.splits import get_split
from umm_jax.world.talk import world as world_parts

# Samples kept of each skill and split: the first ones as they come, and further failures.
KEEP, KEEP_FAILED = 12, 8
Report = Mapping[str, tuple[float, int, float]]


@dataclass
class Outcome:
    """An item as it was answered, and what that is worth."""

    item: Item
    asked: Asked
    scores: dict[str, float] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether all of it is right: what the first figure of its skill says, or that of all turns."""
        return self.scores.get("dialogue_all_turns", next(iter(self.scores.values()))) == 1


# --- asking and judging -------------------------------------------------------------------------------


def ask(
    replier: Replier,
    items: Sequence[Item],
    settings: ReplySettings,
    *,
    seed: int,
    batch_size: int,
    progress: Callable[[int], Any] = lambda replies: None,
) -> list[Outcome]:
    """Has every item answered, dialogues turn by turn with the model's own pictures; in the order of `items`.

    Raises:
        DataError: one that the model cannot be asked: the world's own items all can be.
    """
    batches = asking.batches([doc_of(item) for item in items], batch_size)
    answered = asking.ask(replier, batches, settings, seed=seed, batch_size=batch_size, progress=progress)
    found = {asked.doc.id: asked for batch in answered for asked in batch}
    for asked in found.values():
        if asked.error:
            raise DataError(f"{asked.doc.id}: {asked.error}")
    return [Outcome(item, found[item.id]) for item in items]


def judge_all(judge: Judge, outcomes: Sequence[Outcome]) -> Report:
    """Scores every outcome in place; the figures of the skill."""
    for o in outcomes:
        o.scores = skills.score(judge, o.item, o.asked.turns, o.asked.images)
    return skills.report(outcomes[0].item.skill, [o.scores for o in outcomes])


# --- the whole evaluation of a run --------------------------------------------------------------------


def evaluate(
    run_dir: str | Path,
    *,
    step: int | None = None,
    splits: Sequence[str] | None = None,
    items: int | None = None,
    weights: str | None = None,
    again: bool = False,
) -> dict[str, Any]:
    """Judges a run on every skill and split, beside the oracles; goes on with an interrupted evaluation.

    Args:
        step: the newest checkpoint unless given.
        splits, items, weights: instead of those of the run's config; there are never more dialogues than
            the config has.
        again: judge anew what was judged already.

    Returns:
        the content of eval/results.json.

    Raises:
        CheckpointError, ConfigError: no such run, checkpoint, weights or split.
    """
    import jax

    loaded = load_run(run_dir, step, weights)
    run, section = loaded.run, loaded.run.eval
    world = WorldConfig.of(run)
    splits = section.splits if splits is None else splits

    def count(split: str, name: str) -> int:
        full = section.dialogues if name == "dialogue" else section.items
        if split != section.splits[0]:
            full = section.other_items
        if items is None:
            return full
        return min(items, section.dialogues) if name == "dialogue" else items

    plan = [(split, name, count(split, name)) for split in splits for name in _skills_of(world, split)]
    store = Store(
        Path(run_dir) / "eval",
        {
            "step": loaded.step,
            "weights": loaded.weights,
            "fingerprint": loaded.fingerprint,
            "parameters": loaded.parameters,
            "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            "settings": configs.to_dict({"world": world, "reply": run.reply, "seed": section.seed}),
        },
        again,
    )
    judge = Judge(world)
    attended(loaded)
    for split, name, number in plan:
        if store.has(split, name, number):
            print(f"{split}/{name}: judged already")
            continue
        todo = skills.items(world, name, split, number, section.seed)
        replies = sum(1 + len(item.user_turns) for item in todo)
        with tqdm(total=replies, desc=f"{split}/{name}", unit=" replies", disable=None) as bar:
            outcomes = ask(
                loaded.replier,
                todo,
                run.reply,
                seed=section.seed,
                batch_size=section.batch_size,
                progress=bar.update,
            )
        figures = judge_all(judge, outcomes)
        rows = _rows(figures, oracles.run(judge, name, todo, section.seed))
        store.add(split, name, number, rows, _samples(judge, split, outcomes))
    return store.results


def _skills_of(world: WorldConfig, split: str) -> list[str]:
    """The skills a split says something about. Raises ConfigError when there is no such split."""
    get_split(split)
    return skills.skills_of(world, split)


def _rows(figures: Report, by_oracle: Mapping[str, Report]) -> dict[str, dict[str, Any]]:
    """Figures as they are written: {figure: {"value", "n", "stderr", "oracles": {oracle: value}}}."""
    return {
        name: {
            "value": value,
            "n": n,
            "stderr": None if math.isnan(stderr) else stderr,
            "oracles": {oracle: found[name][0] for oracle, found in by_oracle.items() if name in found},
        }
        for name, (value, n, stderr) in figures.items()
    }


class Store:
    """The files of an evaluation.

    What was found of another step, weights, world, seed or way of replying is begun anew; what was found on
    another number of items is replaced; figures of splits that are not asked for now stay.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], again: bool):
        self.folder = folder
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        # Through JSON, as what is compared with it went.
        self.results = json.loads(json.dumps({**identity, "splits": {}, "done": {}}))
        self.samples: list[dict[str, Any]] = []
        path = folder / "results.json"
        if not again and path.exists():
            try:
                stored = json.loads(path.read_text())
                samples = msgpack.unpackb((folder / "samples.msgpack").read_bytes())
            except FileNotFoundError:
                return  # killed before the first samples were written
            except Exception as error:  # msgpack raises many kinds
                raise DataError(
                    f"{folder}: cannot be read ({error}); --again judges everything anew"
                ) from None
            known = ("step", "weights", "fingerprint", "settings")
            if all(stored.get(key) == self.results[key] for key in known):
                self.results |= {"splits": stored["splits"], "done": stored["done"]}
                # Samples are written first: those of a skill that is not done are of a run that died between.
                self.samples = [s for s in samples if f"{s['split']}/{s['skill']}" in stored["done"]]

    def has(self, split: str, skill: str, count: int) -> bool:
        """Whether this skill was judged on this many items."""
        return self.results["done"].get(f"{split}/{skill}") == count

    def add(
        self, split: str, skill: str, count: int, rows: Mapping[str, Any], samples: Iterable[dict]
    ) -> None:
        """Writes both files; the results last, since they say what is done."""
        self.results["splits"].setdefault(split, {}).update(rows)
        self.results["done"][f"{split}/{skill}"] = count
        self.samples = [s for s in self.samples if (s["split"], s["skill"]) != (split, skill)]
        self.samples += samples
        write_atomic(self.folder / "samples.msgpack", msgpack.packb(self.samples))
        write_atomic(self.folder / "results.json", json.dumps(self.results, indent=1) + "\n")


def _samples(judge: Judge, split: str, outcomes: Sequence[Outcome]) -> Iterator[dict[str, Any]]:
    """The first outcomes, and the first failures beyond them, as plain values."""
    failed = [o for o in outcomes[KEEP:] if not o.ok][:KEEP_FAILED]
    parts = world_parts(judge.config)

    def shown(scene) -> bytes | None:
        return scene and ImageData.from_array(parts.renderer.render(scene)).data

    def expected(one: skills.Expected) -> str:
        return one.answer.spelt() if one.target is None else parts.grammar.scene(one.target)

    for o in (*outcomes[:KEEP], *failed):
        item, first = o.item, len(o.item.conversation.turns)
        verdicts = {}
        if item.user_turns:
            for i, (one, turn) in enumerate(zip(item.expected, o.asked.turns)):
                right = skills.turn_right(judge, one, turn, o.asked.images)
                verdicts[str(first + 2 * i)] = {"ok": right, "expected": expected(one)}
        yield {
            "split": split,
            "skill": item.skill,
            "kind": item.kind,
            "id": item.id,
            "ok": o.ok,
            "scores": o.scores,
            "conversation": o.asked.conversation.to_msgpack(),
            "verdicts": verdicts,
            "expected": expected(item.expected[0]),
            "target": None if item.user_turns else shown(item.target),
            "before": shown(item.before) if item.skill == "edit" else None,
        }


def summary(results: Mapping[str, Any]) -> str:
    """The headline figures as lines for the terminal, each beside its strongest oracle."""
    lines = []
    for split, figures in results["splits"].items():
        lines.append(f"{split}, step {results['step']}")
        for name in (name for name in HEADLINE if name in figures):
            row = figures[name]
            shortcuts = {k: v for k, v in row["oracles"].items() if k not in oracles.IDEALS}
            best = max(shortcuts.items(), key=lambda kv: kv[1], default=None)
            beside = f"  strongest shortcut {best[1]:.3f} ({best[0]})" if best else ""
            lines.append(f"  {name:24} {row['value']:.3f}  n={row['n']:<4}{beside}")
    return "\n".join(lines)


# --- during training ----------------------------------------------------------------------------------


def quick(replier: Replier, run: RunConfig, items: int) -> dict[str, float]:
    """Headline figures on a few unseen items of every skill but whole dialogues, and the F1 of drawings."""
    world = WorldConfig.of(run)
    judge, found = Judge(world), {}
    for name in skills.skills_of(world, "iid"):
        if name == "dialogue":
            continue
        todo = skills.items(world, name, "iid", items, run.eval.seed)
        batch_size = min(items, run.eval.batch_size)
        outcomes = ask(replier, todo, run.reply, seed=run.eval.seed, batch_size=batch_size)
        found |= {
            k: v for k, (v, _, _) in judge_all(judge, outcomes).items() if k in (*HEADLINE, "draw_scene_f1")
        }
    return found


def in_training(run: RunConfig, workdir: str | Path) -> Callable[[int, Any], dict[str, float]]:
    """What train.loop calls as on_eval(step, params). The model is built, and compiled, once.

    Raises:
        ConfigError, DataError: a benchmark of the config cannot be asked, which is said before training.
    """
    watched = [Watched(chosen, WorldConfig.of(run), run.reply) for chosen in run.train.benchmarks]
    names = [one.name for one in watched]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"train.benchmarks: {twice} is there twice")
    model = None

    def on_eval(step: int, params: Any) -> dict[str, float]:
        nonlocal model
        if model is None:
            from umm_jax import families
            from umm_jax.data.tokenizer import Tokenizer

            family = families.get(run.family)
            model_config = configs.from_dict(family.config.ModelConfig, run.model, "config.model")
            tokenizer = Tokenizer.load(Path(workdir) / "tokenizer.model")
            replier = family.generate.Replier(model_config, params, tokenizer)
            model = attended(Loaded(run, step, "raw", replier, 0))
        model.replier.params = params
        try:
            found = quick(model.replier, run, run.train.eval_items) if run.train.eval_items else {}
            for one in watched:
                found |= one.figures(model, seed=run.eval.seed, batch_size=run.eval.batch_size)
            return found
        finally:
            # The next step gives these arrays up; they must not be kept alive here.
            model.replier.params = None

    return on_eval
