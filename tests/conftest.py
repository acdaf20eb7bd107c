"""Fixtures for all rooms. `helpers.py` beside this file is imported by its plain name."""

import sys
from pathlib import Path

import pytest
import torch


TESTS = Path(__file__).resolve().parent
sys.path.insert(0, str(TESTS))
# The models are tiny: more threads only wait for each other.
torch.set_num_threads(1)

from helpers import KINDS, make_pair  # noqa: E402


@pytest.fixture(autouse=True)
def _same_start():
    torch.manual_seed(0)


@pytest.fixture(params=KINDS)
def kind(request):
    """Dense and mixture-of-experts."""
    return request.param


@pytest.fixture
def pair(kind):
    """Fresh stock and our models of one kind with the same random weights: `.stock`, `.ours`, `.config_dict`."""
    return make_pair(kind)


@pytest.fixture(scope="session")
def config_fixtures():
    """Paths of the six published configs, by size."""
    return {path.stem: path for path in sorted((TESTS / "fixtures" / "configs").glob("*.json"))}
