"""VQAv2 in small, and models that are plain rules, for tests of benchmarks."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from umm_jax.config import ReplySettings
from umm_jax.conversation import Image, ImageData, Text, Turn
from umm_jax.evaluate import benchmark

ROOT = Path(__file__).resolve().parent.parent
MODEL = {"folder": "runs/x", "step": 3, "weights": "raw", "family": "rules", "fingerprint": "f0"}
PICTURE = ImageData.from_array(np.zeros((4, 4, 3), np.uint8))


class Rules:
    """Answers with the question's last word and its seed; draws when asked to; notes what it was asked."""

    def __init__(self, answer=lambda conversation, seed: f"word {seed % 7}"):
        self.answer, self.asked, self.batches = answer, [], []

    def reply(self, conversations, settings, seeds):
        self.batches.append([c.id for c in conversations])
        found = []
        for c, seed in zip(conversations, seeds):
            self.asked.append(c.id)
            said = self.answer(c, seed)
            if isinstance(said, ImageData):
                turn, images = Turn("assistant", (Image("out"),)), {"out": said}
            else:
                turn, images = Turn("assistant", (Text(said),)), {}
            found.append(SimpleNamespace(turn=turn, images=images))
        return found


def vqa_data(tmp_path):
    """VQAv2's two files with ten questions, and the pictures of all but the last."""
    root = tmp_path / "data"
    (root / "val2014").mkdir(parents=True)
    questions, annotations = [], []
    for i in range(10):
        questions.append({"question_id": i, "image_id": i, "question": "Which word" + " now" * (i % 3) + "?"})
        answers = [{"answer": f"word {(i + j // 5) % 7}", "answer_id": j + 1} for j in range(10)]
        annotations.append({"question_id": i, "image_id": i, "answers": answers, "answer_type": "other"})
        if i < 9:
            (root / "val2014" / f"COCO_val2014_{i:012d}.jpg").write_bytes(PICTURE.data)
    (root / "v2_OpenEnded_mscoco_val2014_questions.json").write_text(json.dumps({"questions": questions}))
    (root / "v2_mscoco_val2014_annotations.json").write_text(json.dumps({"annotations": annotations}))
    return root


def planned(data, model=MODEL, **changes):
    job = benchmark.Job(**{"task": "vqav2", "settings": {}, "data_root": str(data), "reply": {}} | changes)
    return benchmark.plan(job, model, None, ReplySettings())


def run(folder, data, replier, batch_size=4, index=0, count=1, **changes):
    made = planned(data, **changes)
    benchmark.write_plan(folder, made, changes.get("model", MODEL), batch_size)
    return benchmark.run(folder, made, lambda: replier, index=index, count=count)


def responses(path, texts):
    path.write_text("".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in texts.items()))
    return path
