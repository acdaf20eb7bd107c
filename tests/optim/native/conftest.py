"""The float64 reference of the attention tests serves the kernels too."""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "attention"))
