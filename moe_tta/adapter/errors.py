# SPDX-License-Identifier: Apache-2.0
"""The one error of the adapter: what it cannot be built on, or built from."""


class AdapterError(ValueError):
    """A model, checkpoint or engine the adapter refuses; the message says why."""
