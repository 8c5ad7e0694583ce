# SPDX-License-Identifier: Apache-2.0
"""The list of a checkpoint's files: what is in it, and what it finds. Loads of several ranks: tests/distributed."""

import os
import zlib

import pytest

from deepspeed_ds4sci.checkpoint.manifest import (
    MANIFEST,
    check_files,
    check_sizes,
    check_sums,
    crc32_of,
    read_manifest,
    write_manifest,
    write_sums,
)

FILES = {"a.pt": os.urandom(1000), "b.pt": os.urandom(2**18 + 1), "sub/c.pt": b"", "script.py": b"print()"}


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of two writers, and a script that none of them has recorded."""
    folder = tmp_path / "global_step2"
    (folder / "sub").mkdir(parents=True)
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    write_sums(folder, 0, [folder / "a.pt"])
    write_sums(folder, 1, [folder / "b.pt", folder / "sub/c.pt"])
    write_manifest(folder, layout={"ranks": 2})
    return folder


def test_lists_every_file_with_size_and_sum(folder):
    manifest = read_manifest(folder)
    assert manifest["layout"] == {"ranks": 2}
    for name, content in FILES.items():
        assert manifest["files"][name]["bytes"] == len(content)
        assert manifest["files"][name]["crc32"] == f"{zlib.crc32(content):08x}" == crc32_of(folder / name)
    assert {name: entry.get("writer") for name, entry in manifest["files"].items()} == {
        "a.pt": 0, "b.pt": 1, "sub/c.pt": 1, "script.py": None
    }  # fmt: skip
    assert sorted(path.name for path in folder.iterdir()) == ["a.pt", "b.pt", MANIFEST, "script.py", "sub"]
    assert check_files(folder) == manifest


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("name", [name for name in FILES if FILES[name]])
def test_one_reader_of_any_number_finds_a_flipped_bit(folder, count, name):
    content = bytearray(FILES[name])
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    manifest, found = read_manifest(folder), []
    for number in range(count):
        try:
            check_sums(folder, manifest, number, count)
        except ValueError as error:
            found.append(str(error))
    assert len(found) == 1
    assert (
        f"{name} is damaged: its CRC-32 is {zlib.crc32(content):08x}, and was {zlib.crc32(FILES[name]):08x}"
        in found[0]
    )
    with pytest.raises(ValueError, match=f"{name} is damaged: its CRC-32"):
        check_files(folder)


def test_a_file_that_is_missing_or_of_another_size(folder):
    (folder / "a.pt").write_bytes(FILES["a.pt"][:-1])
    with pytest.raises(ValueError, match="a.pt is damaged: it has 999 bytes, and had 1000 when it was saved"):
        check_files(folder)
    (folder / "a.pt").unlink()
    with pytest.raises(ValueError, match="global_step2 lacks the file a.pt; .* has no other checkpoint"):
        check_sizes(folder, read_manifest(folder))


def test_names_the_other_checkpoints_newest_first(folder):
    for age, tag in enumerate(("global_step1", "global_step0", "global_step3.partial")):
        (folder.parent / tag).mkdir()
        write_manifest(folder.parent / tag)
        os.utime(folder.parent / tag / MANIFEST, (1000 - age, 1000 - age))
    (folder / "a.pt").unlink()
    with pytest.raises(ValueError, match=r"can be loaded by its tag: global_step1, global_step0 \(newest first\)"):
        check_files(folder)


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"files": {"a.pt": 1000}}', '{"files": {"a.pt": {"bytes": 1}}}']
)
def test_a_damaged_list_is_named(folder, content):
    (folder / MANIFEST).write_text(content)
    with pytest.raises(ValueError, match=f"{MANIFEST} is damaged and cannot be read: .*without this file nothing is"):
        check_files(folder)


def test_a_checkpoint_of_plain_deepspeed_has_none(folder):
    (folder / MANIFEST).unlink()
    assert read_manifest(folder) is None and check_files(folder) is None


def test_a_list_written_anew_is_not_in_itself(folder):
    write_manifest(folder)
    assert read_manifest(folder)["files"].keys() == FILES.keys() and check_files(folder)
