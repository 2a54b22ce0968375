"""The demos of the three families on the skills of their worlds, 96 items each.

    umm demo --config=configs/world_tiny.py      --workdir=runs/demo
    umm demo --config=configs/world_chatumm.py   --workdir=runs/chatumm
    umm demo --config=configs/world_unified_3.py --workdir=runs/unified
    umm sweep configs/sweeps/world.py

UnifiedMLLM's world is one in which pictures are asked for by calls, so that its cells stand apart: the table
says that they are not compared.
"""

from umm_jax.evaluate.sweep import over, product, zipped

SKILLS = ("draw-scene", "edit", "vqa", "exists", "count", "describe", "locate", "dialogue")


def get_sweep():
    models = zipped(
        over("run", ["runs/demo", "runs/chatumm", "runs/unified"]),
        over("name", ["MM-Interleaved", "ChatUMM", "UnifiedMLLM"]),
    )
    skills = over("task", [f"world-{skill}" for skill in SKILLS])
    return product(models, skills, over("settings", [{"items": 96}]))
