# SPDX-License-Identifier: Apache-2.0
"""Sequence parallelism: who holds which tokens, exact attention over ranks, the sharded position table, masks."""
