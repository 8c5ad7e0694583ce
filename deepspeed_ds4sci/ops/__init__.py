# SPDX-License-Identifier: Apache-2.0
"""Operators. Import them from `deepspeed_ds4sci`; nothing is imported here, so one op does not load another."""
