# SPDX-License-Identifier: Apache-2.0
"""The error every function of the lab raises when a model cannot be built."""


class LabError(RuntimeError):
    """A lab model could not be found, fetched, built or verified."""
