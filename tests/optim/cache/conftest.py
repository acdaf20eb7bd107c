"""`sharing_reference.py` beside this file is imported by its plain name."""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parent))
