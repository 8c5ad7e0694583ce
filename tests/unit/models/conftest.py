# SPDX-License-Identifier: Apache-2.0
"""Settings shared with the tests of the sequence package."""

from tests.unit.sequence.conftest import one_thread

__all__ = ["one_thread"]
