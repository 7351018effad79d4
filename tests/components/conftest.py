"""Components set the environment of their own process, which in tests is everybody's."""

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="module")
def own_environment() -> Iterator[None]:
    """What a module's components left in the environment ends with the module."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
