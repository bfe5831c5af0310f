"""`python -m bench static`: what the compiler makes of every kernel, by the launches and readers of tests/static."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script elsewhere may import this module

from tests.static.launches import *  # noqa: F403
from tests.static.report import main  # noqa: F401
