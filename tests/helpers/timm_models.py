# SPDX-License-Identifier: Apache-2.0
"""timm without torchvision, each build of which wants one build of torch: only timm's image transforms need it."""

import importlib.util
import sys
from unittest import mock

INSTALLED = importlib.util.find_spec("timm") is not None
REASON = "timm is not installed; `make install` does"

_ABSENT = (
    "torchvision",
    "torchvision.datasets",
    "torchvision.models",
    "torchvision.models.feature_extraction",
    "torchvision.ops",
    "torchvision.ops.misc",
    "torchvision.transforms",
    "torchvision.transforms.functional",
)


def load():
    """The module timm."""
    if "timm" not in sys.modules and importlib.util.find_spec("torchvision") is None:
        sys.modules.update({name: mock.MagicMock() for name in _ABSENT})
        try:
            import timm  # noqa: F401
        finally:
            for name in _ABSENT:  # transformers must not find it
                del sys.modules[name]
    return importlib.import_module("timm")
