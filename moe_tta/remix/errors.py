# SPDX-License-Identifier: Apache-2.0
"""What can be wrong with a reference store."""


class StoreError(ValueError):
    """A store that cannot be built, read, or used with this model; says why."""
