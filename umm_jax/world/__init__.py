"""The visual-dialogue world: scenes on a board, a grammar to speak of them, and an exact judge. numpy only.

    scene ── splits ── render          what there is, which of it is held out, how it looks
       └──── state ─── grammar         what can be done and asked, and in which words
                └───── dialogue        conversations over an explicit state
    judge ── skills ── oracles         reading images back, scoring replies, and what a shortcut would score
    corpus                             every word, for training a tokenizer

Start at :func:`umm_jax.world.dialogue.sample_dialogue`.
"""
