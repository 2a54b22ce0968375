"""How answers say what is to be done and where: tasks, their spelling, and what is read of it.

    text or token ids  ->  lexemes  ->  Answer (words, places, calls)  ->  Plan
        dialects.py             grammar.py                              plan.py

The spelling of an answer is a table (``dialects``). The grammar is this project's own design for what the
paper UnifiedMLLM (arXiv 2408.02503) describes: its authors released no strings. Families write and read
answers with it, and the router runs what they ask for. The standard library and numpy only.
"""
