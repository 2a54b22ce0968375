"""From an answer that holds task and grounding tokens to results: read, check, plan, run, put together.

    text or token ids  ->  lexemes  ->  Answer (words, places, calls)  ->  Plan  ->  results
        dialects.py         lexing.py     grammar.py                       plan.py

The spelling of an answer is a table (``dialects``). The grammar is this project's own design for what the
paper UnifiedMLLM (arXiv 2408.02503) describes: its authors released no strings.
"""
