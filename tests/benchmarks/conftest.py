"""Makes `peer_fakes` and the tiny checkpoint importable, here and in the engines' processes."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE), str(HERE.parent / "lm")]
