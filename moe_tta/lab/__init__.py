# SPDX-License-Identifier: Apache-2.0
"""Lab models: real Mixture-of-Experts checkpoints built from small committed files."""

from moe_tta.lab.errors import LabError
from moe_tta.lab.models import MODELS, LabModel, build, lab_path

__all__ = ["MODELS", "LabError", "LabModel", "build", "lab_path"]
