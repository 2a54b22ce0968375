"""From an answer that asks for things to results: run its plan, put it together.

Answer, Plan (``umm_jax.markup``)  ->  results of experts  ->  manifest, media on disk
                                          execute.py           manifest.py, saving.py
"""
