"""What each stage of synthesis is worth: the same exchanges as single turns, as chains, across distractors.

Exchanges of the visual-dialogue world are cut apart into single turns. A model learns these (the base); then,
as many steps more for each arm, what the stages of synthesis compose of the very same exchanges:

    single       single turns alone
    + stage 1    and chains of exchanges about pictures that come one from another
    + distract   and dialogues with distractors, in which the user shows the picture again (no rewriting)
    + stage 2    and the same dialogues, in which the user says by the history which picture is meant
    + stage 3    and answers of several parts
    last only    as + stage 2, but of every dialogue only the last turn is learned

Every arm is asked the same unseen dialogues of stage 2, and is judged by meaning: pictures by what they
show, texts by their words. Beside them, on the same dialogues, what takes the last picture, any picture, or
no history gets.
    python benchmarks/context_tracking.py --out=runs/context --seeds=2 --jobs=2

Each model is a run of its own in --out, so an interrupted benchmark goes on. CPU minutes are those of a whole
process, compiling, training and judging, as the system counts them.
"""

import argparse
import collections
import json
import os
import random
import runpy
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from umm_jax import config as configs
from umm_jax.config import ReplySettings
from umm_jax.conversation import Conversation, Image, ImageData, Text
from umm_jax.data.files import write_atomic
from umm_jax.data.making import make_records
from umm_jax.data.records import open_source
from umm_jax.data.synthesis import checks
from umm_jax.data.synthesis.exchanges import chain_of, compose
from umm_jax.data.synthesis.stages import Stages
from umm_jax.data.synthesis.synthesizer import Synthesizer
from umm_jax.world.dialogue import sample_dialogue
from umm_jax.world.judge import Judge, scene_exact
from umm_jax.world.scene import Scene, WorldConfig
from umm_jax.world.state import Question, answer
from umm_jax.world.talk import world

HERE = Path(__file__).parent
ARMS = {
    "single": ("single",),
    "+ stage 1": ("single", "stage1"),
    "+ distract": ("single", "stage1", "shown"),
    "+ stage 2": ("single", "stage1", "stage2"),
    "+ stage 3": ("single", "stage1", "stage2", "stage3"),
    "last only": ("single", "stage1-last", "stage2-last"),
}
# Two by two cells of eight pixels: what the model must learn before context matters is learned in minutes.
SMALL = dict(
    px=16,
    grid=2,
    max_objects=2,
    min_objects=1,
    held_out_pairs=[],
    held_out_cells={},
    shuffled=False,
    first_upload=0.4,
    talk=[1, 2],
    it=0.0,
    picture_ops=dict(edit=0.7, draw=0.2, upload=0.1),
    questions=dict(exists=0.0, count=0.0, where=0.0, locate=0.0, describe=1.0),
)
CHAINS = 7000
DIALOGUES = 5000
ASKED = 240
STAGES = dict(turns=2, join=1.0, distractors={"1": 0.5, "2": 0.35, "3": 0.15})


def small_world() -> WorldConfig:
    return WorldConfig.preset("tiny", **SMALL)


# --- data ---------------------------------------------------------------------------------------------------


def singles(split: str, count: int) -> list[Conversation]:
    """Every exchange of `count` dialogues by itself, with the picture it is about."""
    found = []
    for index in range(count):
        record = sample_dialogue(small_world(), 0, index, split)
        for k, exchange in enumerate(chain_of(record)):
            if not exchange.stands_alone:
                continue
            if exchange.about is not None:
                exchange = replace(exchange, brings=(exchange.about,))
            facts = dict(source="world", license=record.license, split=split)
            found.append(compose(f"{record.id}-{k}", [exchange], [exchange.said], facts))
    return found


def shown_again(record: Conversation) -> Conversation:
    """A dialogue whose dependent question is not rewritten: its own words, and the picture once more."""
    turns = list(record.turns)
    for t, turn in enumerate(turns):
        if turn.meta.get("role") == "dependent":
            turns[t] = replace(turn, parts=(Image(turn.meta["about"]), Text(turn.meta["query"])))
    return replace(record, turns=tuple(turns))


def last_alone(record: Conversation) -> Conversation:
    """A dialogue of which only the last turn is learned."""
    turns = tuple(replace(turn, loss=False) for turn in record.turns[:-1])
    return replace(record, turns=(*turns, record.turns[-1]))


def make_data(out: Path) -> None:
    """All folders of records; finished ones stay."""

    def keep(name: str, records: Sequence[Conversation]) -> None:
        make_records(records.__getitem__, len(records), out / name, how={"benchmark": name}, shards=2)

    def composed(name: str, folder: str, count: int, **stages) -> list[Conversation]:
        split = "iid" if folder.startswith("iid") else "train"
        make = Synthesizer([out / folder], Stages(**{**STAGES, **stages}), split=split)
        found = (make(index).conversation for index in range(count))
        return [record for record in found if record is not None]

    if (out / "asked" / "manifest.json").exists():
        return
    started = time.process_time()
    keep("single", singles("train", CHAINS))
    stage1 = composed("stage1", "single", DIALOGUES, stages=(1,), turns=4)
    stage2 = composed("stage2", "single", DIALOGUES, stages=(1, 2))
    plans = {"steps": 0.4, "clarify": 0.3, "refuse": 0.3}
    stage3 = composed("stage3", "single", DIALOGUES, stages=(1, 2, 3), interleaved=plans)
    keep("stage1", stage1)
    keep("stage2", stage2)
    keep("stage3", stage3)
    keep("shown", [shown_again(record) for record in stage2])
    keep("stage1-last", [last_alone(record) for record in stage1])
    keep("stage2-last", [last_alone(record) for record in stage2])
    keep("iid", singles("iid", 600))
    keep("asked", composed("asked", "iid", 6 * ASKED, stages=(1, 2)))
    print(f"data: {time.process_time() - started:.0f} CPU s", flush=True)


# --- training -----------------------------------------------------------------------------------------------


def get_config():
    """``configs/world_chatumm.py`` at the size of the small world, rows packed."""
    config = runpy.run_path(str(HERE.parent / "configs" / "world_chatumm.py"))["get_config"]()
    side, images = 16, 7
    for name in ("latent", "vision"):
        config.model.layout[name].update(longest=side, shortest=side)
    config.model.layout.update(latent_grid=4, vision_grid=2)
    config.model.vision.grid = 2
    config.model.mixture.vocab = 1024
    config.world.overrides = SMALL
    config.data.update(tokens=192, images=images, packing="first_fit", batch_size=8, oversize="drop")
    config.data.axes.update(latents=2 * images * 16, patches=images * 4)
    config.train.update(eval_every=0, log_every=50, save_every=10_000)
    return config


def train(
    out: Path, name: str, folders: Sequence[str], steps: int, seed: int, start: str = "", lr=4e-3
) -> None:
    from umm_jax.train import loop

    config = get_config()
    config.data.sources = [dict(path=str(out / folder)) for folder in folders]
    config.data.tokenizer = str(out / "tokenizer.model")
    config.data.shuffle_seed = seed
    config.optim.lr, config.optim.warmup = lr, 30
    config.train.update(steps=steps, seed=seed, init_from=start)
    (out / name).mkdir(parents=True, exist_ok=True)
    loop.train(configs.from_dict(configs.RunConfig, config.to_dict(), "config"), out / name)


# --- asking -------------------------------------------------------------------------------------------------


class Asked:
    """A dialogue of stage 2 up to its dependent question, and the right answer as scenes and words."""

    def __init__(self, record: Conversation, judge: Judge):
        self.record = record
        self.at = next(t for t, turn in enumerate(record.turns) if turn.meta.get("role") == "dependent")
        self.turn, self.gold = record.turns[self.at], record.turns[self.at + 1]
        self.about = self.turn.meta["about"]
        (self.distance,) = checks.distance(record)
        self.scenes = {ref: judge.read(image).scene for ref, image in record.images.items()}
        self.shown = [p.ref for t in record.turns[: self.at] for p in t.parts if isinstance(p, Image)]
        self.target = next((self.scenes[p.ref] for p in self.gold.parts if isinstance(p, Image)), None)

    @property
    def full(self) -> Conversation:
        return self._with(self.record.turns[: self.at + 1])

    @property
    def last_turn(self) -> Conversation:
        return self._with((self.turn,))

    @property
    def undisturbed(self) -> Conversation | None:
        """Without what lies between, in plain words; None where the last picture is another one then."""
        kept = []
        for k in range(0, self.at, 2):
            if self.record.turns[k].meta.get("role") == "source":
                kept += self.record.turns[k : k + 2]
        shown = [p.ref for turn in kept for p in turn.parts if isinstance(p, Image)]
        if not shown or shown[-1] != self.about:
            return None
        return self._with((*kept, replace(self.turn, parts=(Text(self.turn.meta["query"]),))))

    def _with(self, turns) -> Conversation:
        refs = {p.ref for turn in turns for p in turn.parts if isinstance(p, Image)}
        images = {ref: self.record.images[ref] for ref in refs}
        turns = tuple(replace(turn, depends_on=(), meta={}) for turn in turns)
        return Conversation(self.record.id, turns, images)

    def right(self, judge: Judge, reply, images) -> bool:
        if self.target is None:
            return reply.text.split() == self.gold.text.split()
        drawn = [p.ref for p in reply.parts if isinstance(p, Image)]
        return len(drawn) == 1 and scene_exact(judge.read(images[drawn[0]]), self.target)

    def takes(self, ref: str, config: WorldConfig) -> bool:
        """Whether who takes this picture for the one that is meant is right."""
        scene = self.scenes[ref]
        if self.target is not None:  # what it shows, or what an edit makes of it
            return scene == self.scenes[self.about]
        grammar = world(config).grammar
        if self.turn.op == "describe":  # in the words it was asked for by
            return grammar.draw(scene).split() == self.gold.text.split()
        kinds = [(kind, cell) for kind in ("colour", "shape", "what") for cell in range(config.cells)]
        for question in (Question("describe"), *(Question(*kind) for kind in kinds)):
            if grammar.question(question) == self.turn.meta["query"]:
                said = grammar.answer(question, answer(question, scene))
                return said.split() == self.gold.text.split()
        raise ValueError(f"a question of no known kind: {self.turn.meta['query']!r}")


def asked(out: Path, judge: Judge) -> list[Asked]:
    found = []
    for record in open_source(out / "asked"):
        if any(turn.meta.get("role") == "dependent" for turn in record.turns):
            found.append(Asked(record, judge))
    return found[:ASKED]


def oracles(out: Path, todo: Sequence[Asked]) -> dict[str, dict[str, bool]]:
    """What knows one thing only is right about, by question."""
    config, rng = small_world(), random.Random(0)
    said = collections.defaultdict(collections.Counter)
    for record in open_source(out / "single"):
        said[_form(record.turns[0])][record.turns[1].text] += 1
    usual = {form: answers.most_common(1)[0][0] for form, answers in said.items()}
    return {
        "last picture": {q.record.id: q.takes(q.shown[-1], config) for q in todo},
        "any picture": {q.record.id: q.takes(rng.choice(sorted(set(q.shown))), config) for q in todo},
        "last turn, usual answer": {
            q.record.id: q.target is None and usual.get(_form(q.turn), "") == q.gold.text for q in todo
        },
    }


def _form(turn) -> str:
    return f"{turn.op}: {turn.meta['query']}" if turn.op == "ask" else turn.op


def judge_run(out: Path, name: str) -> dict:
    """{condition: {dialogue: right}} of one model."""
    from umm_jax.generate import load_run

    replier, judge = load_run(out / name).replier, Judge(small_world())
    settings = ReplySettings(max_tokens=40, max_images=1)
    todo = asked(out, judge)

    def ask(conversations: Sequence[Conversation]) -> list:
        order = sorted(range(len(conversations)), key=lambda i: (len(conversations[i].images), i))
        found: dict[int, object] = {}
        for start in range(0, len(order), 16):
            batch = order[start : start + 16]
            rows = [conversations[i] for i in (batch + [batch[-1]] * 16)[:16]]
            for i, reply in zip(batch, replier.reply(rows, settings, [7 + i for i in range(16)])):
                found[i] = reply
        return [found[i] for i in range(len(order))]

    def verdicts(questions: Sequence[Asked], conversations: Sequence[Conversation]) -> dict[str, bool]:
        replies = ask(conversations)
        return {q.record.id: q.right(judge, r.turn, r.images) for q, r in zip(questions, replies)}

    result = {"full history": verdicts(todo, [q.full for q in todo])}
    result["last turn alone"] = verdicts(todo, [q.last_turn for q in todo])
    plain = [q for q in todo if q.undisturbed is not None]
    result["no distractors"] = verdicts(plain, [q.undisturbed for q in plain])
    own = [q.full for q in todo]
    for t in range(1, max(q.at for q in todo), 2):  # its own pictures in the place of the right ones
        having = [k for k, q in enumerate(todo) if t < q.at and _draws(q.record.turns[t])]
        if not having:
            continue
        before = [replace_turns(own[k], own[k].turns[:t]) for k in having]
        for k, reply in zip(having, ask(before)):
            own[k] = with_own(own[k], t, reply)
    result["own pictures"] = verdicts(todo, own)
    alone = [Single(record) for record in list(open_source(out / "iid"))[:ASKED]]
    replies = ask([one.conversation for one in alone])
    result["single turns"] = {
        one.record.id: one.right(judge, r.turn, r.images) for one, r in zip(alone, replies)
    }
    return result


def _draws(turn) -> bool:
    return any(isinstance(part, Image) for part in turn.parts)


def replace_turns(conversation: Conversation, turns) -> Conversation:
    refs = {p.ref for turn in turns for p in turn.parts if isinstance(p, Image)}
    images = {ref: image for ref, image in conversation.images.items() if ref in refs}
    return replace(conversation, turns=tuple(turns), images=images)


def with_own(conversation: Conversation, t: int, reply) -> Conversation:
    """The picture of turn `t` is the model's own, wherever it is shown; as it was where none was drawn."""
    drawn = [reply.images[p.ref] for p in reply.turn.parts if isinstance(p, Image)]
    (ref, *_) = [p.ref for p in conversation.turns[t].parts if isinstance(p, Image)]
    if not drawn:
        blank = next(iter(conversation.images.values())).array() * 0
        drawn = [ImageData.from_array(blank)]
    return replace(conversation, images={**conversation.images, ref: drawn[0]})


class Single:
    """A single turn, asked and judged as the questions of dialogues are."""

    right = Asked.right

    def __init__(self, record: Conversation):
        self.record, self.gold = record, record.turns[1]
        judge = Judge(small_world())
        shown = [p.ref for p in self.gold.parts if isinstance(p, Image)]
        self.target: Scene | None = judge.read(record.images[shown[0]]).scene if shown else None
        self.conversation = replace_turns(record, (replace(record.turns[0], meta={}),))


# --- the whole ----------------------------------------------------------------------------------------------


def name_of(arm: str, seed: int) -> str:
    return f"{arm.replace('+ ', 'and-').replace(' ', '-')}-{seed}"


def one(out: Path, arm: str, seed: int, base_steps: int, steps: int) -> None:
    """Trains a model where it is not yet, and judges it."""
    name = name_of(arm, seed)
    if arm == "base":
        train(out, name, ["single"], base_steps, seed)
    else:
        start = str(out / name_of("base", seed))
        train(out, name, ARMS[arm], steps, seed, start, lr=2e-3)
    trained = os.times()
    result = judge_run(out, name)
    spent = os.times()
    cost = {
        "training": trained.user + trained.system,
        "judging": spent.user + spent.system - trained.user - trained.system,
    }
    write_atomic(out / f"{name}.json", json.dumps({"verdicts": result, "cpu_seconds": cost}))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/context"))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--base-steps", type=int, default=600)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--jobs", type=int, default=1, help="models trained side by side")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        arm, seed = args.only.rsplit(":", 1)
        return one(args.out, arm, int(seed), args.base_steps, args.steps)
    make_data(args.out)
    make_tokenizer(args.out)
    seeds = range(args.seeds)
    side_by_side([("base", seed) for seed in seeds], args)
    side_by_side([(arm, seed) for arm in ARMS for seed in seeds], args)
    print(table(args.out, args.seeds))


def make_tokenizer(out: Path) -> None:
    """One for all arms, of all their words."""
    from umm_jax.data.tokenizer import Tokenizer
    from umm_jax.families.chatumm.config import ModelConfig
    from umm_jax.families.chatumm.stream import control_pieces

    if (out / "tokenizer.model").exists():
        return
    names = sorted({folder for folders in ARMS.values() for folder in folders})
    texts = (
        part.text
        for name in names
        for record in open_source(out / name)
        for turn in record.turns
        for part in turn.parts
        if isinstance(part, Text)
    )
    model = configs.from_dict(ModelConfig, get_config().model.to_dict(), "config.model")
    Tokenizer.train(texts, out / "tokenizer.model", control_pieces(model), model.vocab)


def side_by_side(todo: Sequence[tuple[str, int]], args: argparse.Namespace) -> None:
    """Each model in a process of its own, `--jobs` at a time on their own cores."""
    left = [(arm, seed) for arm, seed in todo if not (args.out / f"{name_of(arm, seed)}.json").exists()]
    cores = sorted(os.sched_getaffinity(0))
    share = max(1, len(cores) // args.jobs)
    slots: list[tuple[subprocess.Popen, str] | None] = [None] * args.jobs
    while left or any(slots):
        for k, slot in enumerate(slots):
            if slot is not None and slot[0].poll() is None:
                continue
            if slot is not None and slot[0].returncode:
                raise SystemExit(f"{slot[1]} failed; see {args.out}/{slot[1]}.log")
            slots[k] = None
            if left:
                arm, seed = left.pop(0)
                name = name_of(arm, seed)
                own = set(cores[k * share : (k + 1) * share])
                command = [sys.executable, __file__, f"--out={args.out}", f"--only={arm}:{seed}"]
                command += [f"--base-steps={args.base_steps}", f"--steps={args.steps}"]
                with open(args.out / f"{name}.log", "w") as log:
                    process = subprocess.Popen(
                        command,
                        stdout=log,
                        stderr=log,
                        env={**os.environ, "JAX_PLATFORMS": "cpu"},
                        preexec_fn=lambda own=own: os.sched_setaffinity(0, own),
                    )
                print(f"{time.strftime('%H:%M:%S')} {name}", flush=True)
                slots[k] = (process, name)
        time.sleep(1)


def table(out: Path, seeds: int) -> str:
    """Rows of the arms, then of the oracles; each cell holds one figure a seed."""
    judge = Judge(small_world())
    todo = asked(out, judge)
    far = max(q.distance for q in todo)
    groups: dict[str, Callable[[Asked], bool]] = {
        f"distance {d}": lambda q, d=d: q.distance == d for d in range(2, far + 1)
    }
    groups["pictures"] = lambda q: q.target is not None
    groups["answers"] = lambda q: q.target is None
    undisturbed = {q.record.id for q in todo if q.undisturbed is not None}

    def mean(verdicts, of: Callable[[Asked], bool] = lambda q: True) -> float:
        values = [verdicts[q.record.id] for q in todo if of(q) and q.record.id in verdicts]
        return sum(values) / len(values) if values else float("nan")

    def figures(found: dict) -> list[float]:
        full = found["full history"]
        row = [mean(full), *(mean(full, of) for of in groups.values())]
        if "last turn alone" in found:
            disturbed = mean(full, lambda q: q.record.id in undisturbed)
            row.append(row[0] - mean(found["last turn alone"]))
            row.append(mean(found["no distractors"]) - disturbed)
            row.append(row[0] - mean(found["own pictures"]))
            alone = found["single turns"].values()
            row.append(sum(alone) / len(alone))
        return row

    counts = [sum(of(q) for q in todo) for of in groups.values()]
    heads = ["turns", *(f"{g} (n={n})" for g, n in zip(groups, counts))]
    heads += ["history gain", f"distractor drop (n={len(undisturbed)})", "drift", "single turns"]
    lines = [
        f"{len(todo)} questions",
        f"| | {' | '.join(heads)} | CPU min |",
        "|---" * (len(heads) + 2) + "|",
    ]
    for arm in ("base", *ARMS):
        rows, minutes = [], []
        for seed in range(seeds):
            path = out / f"{name_of(arm, seed)}.json"
            if path.exists():
                stored = json.loads(path.read_text())
                rows.append(figures(stored["verdicts"]))
                minutes.append(f"{sum(stored['cpu_seconds'].values()) / 60:.0f}")
        cells = [" ".join(f"{value:.2f}" for value in column) for column in zip(*rows)]
        lines.append(f"| {arm} | {' | '.join(cells)} | {' '.join(minutes)} |")
    for oracle, verdicts in oracles(out, todo).items():
        cells = [f"{value:.2f}" for value in figures({"full history": verdicts})]
        lines.append(f"| *{oracle}* | {' | '.join(cells)} |" + " |" * (len(heads) - len(cells) + 1))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
