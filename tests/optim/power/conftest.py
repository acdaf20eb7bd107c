import sys
from pathlib import Path

import pytest


sys.path.insert(0, str(Path(__file__).parent))

from power_trees import FakeTime


@pytest.fixture
def time():
    return FakeTime()
