# SPDX-License-Identifier: Apache-2.0
"""What the op does for a whole Evoformer block: the same block with its attention computed by every peer."""
