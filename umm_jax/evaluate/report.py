"""report.json and report.html of a run, from the files in its folder. Needs neither the model nor JAX.

config.json      what was asked for
metrics.jsonl    the learning curves, one JSON object a line with its "step"
cost.json        wall seconds and peak memory by stage
eval/            results.json (figures and oracles) and samples.msgpack (what was said and drawn)
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgpack

from umm_jax.conversation import Conversation, Image, spell
from umm_jax.data.files import storage_errors, write_atomic
from umm_jax.errors import CheckpointError, DataError
from umm_jax.evaluate import cost, html
from umm_jax.versions import versions

SCHEMA = 1
MOST_POINTS = 400  # of a curve in the report; metrics.jsonl keeps them all

# The figures a reader looks for first: name -> how the page calls it.
HEADLINE = {
    "draw_scene_exact": "Draws a scene, every cell right",
    "edit_exact": "Edits a picture, every cell right",
    "vqa_accuracy": "Answers what is at a position",
    "locate_accuracy": "Locates an object by a box",
    "describe_exact": "Describes the whole picture",
    "exists_accuracy": "Says whether something is there",
    "count_accuracy": "Counts",
    "segment_iou": "Segments an object: mean IoU",
    "chain_right": "Several requests in one turn, all done",
    "chain_routed": "Several requests in one turn, all understood",
    "dialogue_turn_accuracy": "Turns of a dialogue, own pictures fed back",
    "dialogue_all_turns": "Whole dialogues, own pictures fed back",
}


def write(run_dir: str | Path) -> dict[str, Path]:
    """Writes both reports; returns their paths by kind.

    Raises:
        CheckpointError: the folder is no run, or was not judged yet.
        DataError: one of its files is damaged. StorageError: cannot be written.
    """
    folder = Path(run_dir)
    report, samples = collect(folder), read_samples(folder)
    paths = {"json": folder / "report.json", "html": folder / "report.html"}
    write_atomic(paths["json"], json.dumps(report, indent=1, allow_nan=False) + "\n")
    write_atomic(paths["html"], page(report, samples, folder.name))
    return paths


# --- gathering ----------------------------------------------------------------------------------------


def collect(folder: Path) -> dict[str, Any]:
    """The content of report.json; see :func:`write` for what is raised."""
    config = _read_json(folder / "config.json", "is no run folder: train first (umm train --workdir=...)")
    results = _read_json(
        folder / "eval" / "results.json", "was not judged yet: umm eval --run=" + str(folder)
    )
    stages = cost.read(folder)
    splits = results["splits"]
    first = "iid" if "iid" in splits else next(iter(splits), None)
    if first is None:
        raise CheckpointError(
            f"{folder}: its evaluation holds no split yet; run umm eval --run={folder} to its end"
        )
    seconds = {name: stage["seconds"] for name, stage in stages.items()}
    return {
        "schema": SCHEMA,
        "run": folder.name,
        "family": config["family"],
        "step": results["step"],
        "weights": results["weights"],
        "parameters": results["parameters"],
        "skills": splits[first],
        "skills_split": first,
        "splits": splits,
        "wall_seconds": {**seconds, "total": round(sum(seconds.values()), 2)},
        "peak_memory_bytes": max((s["peak_memory_bytes"] for s in stages.values()), default=0),
        "curves": read_curves(folder / "metrics.jsonl"),
        "config": config,
        "device": results["device"],
        "versions": versions(),
    }


def _read_json(path: Path, missing: str) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent if path.name == 'config.json' else path}: {missing}") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: damaged ({error})") from None


def read_curves(path: Path) -> dict[str, list[list[float]]]:
    """{metric: [[step, value], ...]} of a metrics file; the torn last line of a killed run is left out.

    Lines that describe the start of a run, and what an evaluation cost, are no curves. A step that was
    logged again after a resume counts once, as it was last.
    """
    if not path.exists():
        return {}
    curves: dict[str, dict[int, float]] = {}
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines) - 1:
                break
            raise DataError(f"{path}, line {number + 1}: damaged ({error})") from None
        for name, value in row.items():
            if _is_curve(name, row) and isinstance(value, (int, float)) and math.isfinite(value):
                curves.setdefault(name, {})[row["step"]] = value
    return {name: _thin([[s, points[s]] for s in sorted(points)]) for name, points in curves.items()}


def _is_curve(name: str, row: Mapping[str, Any]) -> bool:
    return row["kind"] == "train" and name not in ("step", "kind") or name.startswith("eval/")


def _thin(points: list[list[float]]) -> list[list[float]]:
    """Every n-th point, and always the last."""
    stride = -(-len(points) // MOST_POINTS)
    return [p for i, p in enumerate(points) if i % stride == 0 or i == len(points) - 1]


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """What the evaluation kept to be shown, conversations decoded; empty where there is none."""
    path = folder / "eval" / "samples.msgpack"
    if not path.exists():
        return []
    with storage_errors(path):
        data = path.read_bytes()
    try:
        samples = msgpack.unpackb(data)
    except Exception as error:  # msgpack raises many kinds for damaged bytes
        raise DataError(f"{path}: damaged ({error or type(error).__name__}); run umm eval --again") from None
    return [{**s, "conversation": Conversation.from_msgpack(s["conversation"])} for s in samples]


# --- the page -----------------------------------------------------------------------------------------


def page(report: Mapping[str, Any], samples: list[Mapping[str, Any]], name: str) -> str:
    """The whole of report.html."""
    split = report["skills_split"]
    shown = [s for s in samples if s["split"] == split]
    seconds = report["wall_seconds"]
    head = f"<h1>{html.escape(name)}</h1>" + html.facts(
        [
            ("family", report["family"]),
            ("parameters", f"{report['parameters'] / 1e6:.2f} M"),
            ("steps", f"{report['step']:,}"),
            ("wall time", html.clock(seconds["total"])),
            ("peak memory", f"{report['peak_memory_bytes'] / 2**30:.2f} GiB"),
            ("device", report["device"]),
        ]
    )
    return html.page(
        f"{name}: report",
        head
        + html.section(
            "What it learned",
            f"On {split} items it was not trained on. The thin bars are shortcuts, scored by the same judge "
            "on the same items: a skill counts for what it has beyond them. Those called recency "
            "and wrong picture err only in which picture or object is meant: the rest needs that memory.",
            html.grid(_skill(t, report["skills"][k]) for k, t in HEADLINE.items() if k in report["skills"]),
        )
        + html.section("How it learned", "Over optimizer steps.", html.grid(_curves(report["curves"])))
        + html.section(
            "Drawings",
            "The first ones of the evaluation, not the best. Left what was asked for, right what was drawn.",
            html.grid((_drawing(s) for s in _of(shown, "draw")[:12]), "tiles"),
        )
        + html.section(
            "Edits",
            "The picture as it was given, as it should become, and what came.",
            html.grid((_drawing(s) for s in _of(shown, "edit")[:9]), "wide"),
        )
        + html.section(
            "Conversations",
            "Every picture on the left was drawn by the model and then shown back to it.",
            html.grid(_dialogue(s) for s in _mixed(_of(shown, "dialogue"), 4)),
        )
        + html.section(
            "Failures",
            "What it got wrong, a few of each skill.",
            html.grid((_failure(s) for s in _failures(shown)), "tiles"),
        )
        + html.section(
            "Every skill", "Value, standard error, and the shortcuts.", _all_skills(report["skills"])
        )
        + html.section(
            "Every split", "The same skills where other things were held out.", _splits(report["splits"])
        )
        + html.section("What it cost", "Wall time of each stage, summed over resumed runs.", _cost(seconds))
        + html.section(
            "What it was made from",
            f"Weights: {report['weights']} of step {report['step']:,}.",
            html.details("Config", json.dumps(report["config"], indent=1))
            + html.details("Versions", json.dumps(report["versions"], indent=1)),
        ),
    )


def _skill(title: str, figure: Mapping[str, Any]) -> str:
    oracles = {name.replace("_", " "): value for name, value in figure["oracles"].items()}
    return html.skill(title, figure["value"], figure["stderr"], figure["n"], oracles)


def _curves(curves: Mapping[str, Any]) -> Iterable[str]:
    """Losses and skills together, then what else a reader of a run wants to see, one card each."""
    losses = {k: v for k, v in curves.items() if k == "loss" or k.startswith("loss/")}
    asked = {k.partition("/")[2]: v for k, v in curves.items() if k.startswith("eval/")}
    # Skills lie between 0 and 1; benchmarks are on their authors' scales.
    skills = {k: v for k, v in asked.items() if k in HEADLINE or k == "draw_scene_f1"}
    others = {k: v for k, v in asked.items() if k not in skills and not k.endswith("/parse_rate")}
    cards = [html.curves("Loss", losses, log=True), html.curves("Skills during training", skills, y=(0, 1))]
    # Each on its own authors' scale.
    cards += [html.curves(f"{name} during training", {name: points}) for name, points in others.items()]
    if "lr" in curves:
        cards.append(html.curves("Learning rate", {"lr": curves["lr"]}, smooth=False))
    if "grad_norm" in curves:
        cards.append(html.curves("Norm of the gradient", {"grad_norm": curves["grad_norm"]}, log=True))
    return [card for card in cards if card]


def _of(samples: list[Mapping[str, Any]], skill: str) -> list[Mapping[str, Any]]:
    return [s for s in samples if s["skill"].split("_")[0] == skill]


def _mixed(samples: list[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    """Mostly conversations that went well, and one that did not, where there are both."""
    good, bad = [s for s in samples if s["ok"]], [s for s in samples if not s["ok"]]
    kept_bad = bad[: max(1, count - len(good))]
    return good[: count - len(kept_bad)] + kept_bad


def _failures(samples: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """At most four of each kind; dialogues have their own place on the page."""
    kept, seen = [], {}
    for s in samples:
        if not s["ok"] and not s["skill"].startswith("dialogue"):
            seen[s["kind"]] = seen.get(s["kind"], 0) + 1
            if seen[s["kind"]] <= 4:
                kept.append(s)
    return kept[:24]


def pictures(conversation: Conversation, index: int) -> list[bytes]:
    turn = conversation.turns[index]
    return [conversation.images[p.ref].data for p in turn.parts if isinstance(p, Image)]


def _drawing(sample: Mapping[str, Any]) -> str:
    conversation = sample["conversation"]
    drawn = pictures(conversation, -1)
    shown = [("before", sample["before"]), ("asked for", sample["target"])]
    shown.append(("drawn", drawn[-1] if drawn else None))
    verdict = html.tag(sample["ok"], "exact" if sample["ok"] else "wrong")
    reply = conversation.turns[-1].spelt()
    return html.tile(conversation.turns[-2].spelt(), shown, verdict, f"model: {reply}" if reply else "")


def _failure(sample: Mapping[str, Any]) -> str:
    if sample["target"] is not None:
        return _drawing(sample)
    conversation = sample["conversation"]
    seen = [png for i in range(len(conversation.turns) - 1) for png in pictures(conversation, i)]
    answer = conversation.turns[-1].spelt() or ("a picture" if pictures(conversation, -1) else "nothing")
    return html.tile(
        conversation.turns[-2].spelt(),
        [("", png) for png in seen[-1:]],
        html.tag(False, " : ".join(dict.fromkeys((sample["skill"], sample["kind"])))),
        f"said: {answer}. Right: {sample['expected']}",
    )


def _dialogue(sample: Mapping[str, Any]) -> str:
    conversation, bubbles = sample["conversation"], []
    for index, turn in enumerate(conversation.turns):
        body = []
        for part in turn.parts:
            if isinstance(part, Image):
                body.append(html.picture(conversation.images[part.ref].data, alt=f"picture of turn {index}"))
            else:
                body.append(html.escape(spell(part)))
        verdict = sample["verdicts"].get(str(index))
        note = "" if verdict is None else "right" if verdict["ok"] else f"wrong; right: {verdict['expected']}"
        bubbles.append(html.bubble(turn.role, " ".join(body), note, verdict is None or verdict["ok"]))
    tag = html.tag(sample["ok"], "all turns right" if sample["ok"] else "not all right")
    return f'<article class="card"><p>{tag}</p><div class="chat">{"".join(bubbles)}</div></article>'


def _all_skills(skills: Mapping[str, Any]) -> str:
    rows = []
    for name, figure in skills.items():
        oracles = ", ".join(f"{k} {html.number(v)}" for k, v in sorted(figure["oracles"].items()))
        rows.append(
            [name, html.number(figure["value"]), html.number(figure["stderr"]), str(figure["n"]), oracles]
        )
    return html.table(["skill", "value", "± 1 s.e.", "n", "oracles"], rows, words=(0, 4)) if rows else ""


def _splits(splits: Mapping[str, Any]) -> str:
    if len(splits) < 2:
        return ""
    names = list(dict.fromkeys(name for split in splits.values() for name in split))
    rows = [[n, *(html.number(s[n]["value"]) if n in s else "–" for s in splits.values())] for n in names]
    return html.table(["skill", *splits], rows)


def _cost(seconds: Mapping[str, float]) -> str:
    return html.table(["stage", "wall time"], [[k, html.clock(v)] for k, v in seconds.items()])
