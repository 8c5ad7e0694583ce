# SPDX-License-Identifier: Apache-2.0
"""What tests and benchmarks share: named shapes, inputs in every layout, the numerical bar."""
