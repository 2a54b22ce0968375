"""What trained models are worth.

A run in its own world (``umm eval --run``): runner.py, cost.py, report.py, html.py; the judge is world/'s.

Any model on benchmarks: contract.py, tasks/ and measures/ say what is asked and how it counts; source.py
reads annotations, responses.py and store.py replies, verdicts.py and judges.py what others say of pictures;
asking.py asks; benchmark.py is one model on one benchmark, sweep.py many of them; scoring.py, table.py and
samples.py are what comes out. plugs/ are our models in other suites.
"""
