"""The toy world is that of the learner's own tests."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "unit/ppo"))
