"""Integration tests keep rows and blobs where `--storage` says."""

import pytest


@pytest.fixture(autouse=True)
def _storage(chosen_storage: None) -> None:
    """For every test, before its gateways start."""
