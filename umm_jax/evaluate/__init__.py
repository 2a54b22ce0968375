"""Judging a trained model: skills beside shortcut oracles, what they cost, and the report."""
