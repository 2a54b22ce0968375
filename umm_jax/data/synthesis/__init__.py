"""Single-turn data made into dialogues in three stages: state first, words last.

    records -> exchanges -> stages 1, 2, 3 -> words -> checks -> records

`synthesizer.Synthesizer` is the whole of it for one index; ``making.make_records`` runs it.
"""
