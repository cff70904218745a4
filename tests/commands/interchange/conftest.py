import pytest


@pytest.fixture
def manifest(tiny2):
    """A manifest whose target and versions are this machine's."""
    return tiny2.manifest
