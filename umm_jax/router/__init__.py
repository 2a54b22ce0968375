"""From an answer that asks for things to results: plan, run, put together.

Answer (``umm_jax.markup``)  ->  Plan  ->  results of experts  ->  manifest, media on disk
                               plan.py       execute.py         manifest.py, saving.py
"""
