# SPDX-License-Identifier: Apache-2.0
"""Speed and memory of the op beside its peers: `python -m tests.benchmarks --help`."""
