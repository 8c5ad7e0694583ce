# SPDX-License-Identifier: Apache-2.0
"""The builder of the Evoformer attention kernels."""

from deepspeed_ds4sci import plugin

from .builder import DS4SciOpBuilder
from .library import EVOFORMER_ATTN


class EvoformerAttnBuilder(DS4SciOpBuilder):
    """Takes the place of DeepSpeed's builder of the same name, and its row in `ds_report`."""

    NAME = "evoformer_attn"
    BUILD_VAR = EVOFORMER_ATTN.build_variable
    LIBRARY = EVOFORMER_ATTN

    def bind(self, path):
        from deepspeed_ds4sci.ops._extension import Extension

        return Extension(path)

    def load(self, verbose=False):
        plugin.announce()
        return super().load(verbose)
