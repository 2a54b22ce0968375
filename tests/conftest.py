"""Set before JAX is loaded: the programs of the tests run once, so compiling them plainly is what is fast."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
