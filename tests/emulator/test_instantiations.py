# SPDX-License-Identifier: Apache-2.0
"""csrc/evoformer_attn/instantiations is what its generator writes."""

import importlib.util

from tests.emulator.build import SOURCES


def test_folder_equals_generator_output():
    spec = importlib.util.spec_from_file_location("generator", SOURCES / "generate_instantiations.py")
    generator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generator)
    written = {path.name: path.read_text() for path in (SOURCES / "instantiations").glob("*.cu")}
    assert written == generator.instantiations()
