"""``python -m umm_jax.cli``."""

import sys

from umm_jax.cli import main

sys.exit(main())
