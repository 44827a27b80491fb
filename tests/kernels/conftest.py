# SPDX-License-Identifier: Apache-2.0
import pytest


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """Every test here has tiny operations."""
