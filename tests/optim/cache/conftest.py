"""`sharing_reference.py` beside this file and the float64 reference of attention are imported by their plain names."""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "attention"))
