# SPDX-License-Identifier: Apache-2.0
"""How long a sequence fits, and how fast each length trains: rungs of options, each in processes of its own."""
