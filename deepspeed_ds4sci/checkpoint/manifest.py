# SPDX-License-Identifier: Apache-2.0
"""The list of a checkpoint's files, with size and CRC-32 of each, which damage is found by.

Each rank reads back the files that it wrote, from its page cache, and so no file is read by two ranks. At a load each
file is checked by one rank, the one of its writer's number where there is one.
"""

import json
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

MANIFEST = "ds4sci_checkpoint.json"
_SUMS = "ds4sci_sums"  # a file per rank while a checkpoint is written
_CHUNK_BYTES = 2**18  # stays in a core's cache between the read and the sum
_THREADS = 8  # of a command; zlib.crc32 and the reads run beside each other


def replaced_by(folder: Path) -> Path:
    """Where the older checkpoint of that name is while a newer one takes its place."""
    return folder.with_name(f"{folder.name}.replaced")


def folder_to_read(folder: Path) -> Path:
    """`folder`, or where a crash while it was being replaced has left it.

    Raises:
        ValueError: it is neither here nor there.
    """
    for found in (folder, replaced_by(folder)):
        if found.is_dir():
            return found
    raise ValueError(f"there is no checkpoint {folder}")


def crc32_of(path: Path) -> str:
    """The CRC-32 of a file's content, 8 hexadecimal digits."""
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    found = 0
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            found = zlib.crc32(buffer[:count], found)
    return f"{found:08x}"


def write_sums(folder: Path, number: int, paths: list[Path]) -> None:
    """Leaves the entries of the files that writer `number` wrote for `write_manifest`."""
    sums = {str(path.relative_to(folder)): {**_entry(path), "writer": number} for path in paths}
    (folder / f"{_SUMS}_{number:05d}.json").write_text(json.dumps(sums))


def write_manifest(folder: Path, **about) -> None:
    """Writes the list of all files in the folder; those that no writer has left sums of are read here.

    Args:
        about: other entries of the manifest, such as layout.
    """
    sums, parts = {}, sorted(folder.glob(f"{_SUMS}_*.json"))
    for part in parts:
        sums |= json.loads(part.read_text())
    files = [path for path in files_of(folder) if path not in (*parts, folder / MANIFEST)]
    rest = [path for path in files if str(path.relative_to(folder)) not in sums]
    sums |= {str(path.relative_to(folder)): entry for path, entry in zip(rest, _in_threads(_entry, rest), strict=True)}
    for part in parts:
        part.unlink()
    replace_text(folder / MANIFEST, json.dumps({**about, "files": sums}, indent=1) + "\n")


def read_manifest(folder: Path) -> dict | None:
    """The manifest of a checkpoint; None: it has none, as one that plain DeepSpeed wrote.

    Raises:
        ValueError: it is damaged.
    """
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text())
        if not all({"bytes", "crc32"} <= entry.keys() for entry in manifest["files"].values()):
            raise ValueError("a file has no size or checksum")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        message = f"{path} is damaged and cannot be read: {error!r}; without this file nothing is checked"
        raise ValueError(message) from error
    return manifest


def check_sizes(folder: Path, manifest: dict) -> None:
    """Raises ValueError for a file that is missing or of another size."""
    for name, entry in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"the checkpoint {folder} lacks the file {name}{_others(folder)}")
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise ValueError(
                f"{path} is damaged: it has {size} bytes, and had {entry['bytes']} when it was saved{_others(folder)}"
            )


def check_sums(folder: Path, manifest: dict, number: int, count: int, threads: int = 1) -> None:
    """Reads what is reader `number`'s of `count` to check, and raises ValueError for a file of other content."""
    entries = enumerate(manifest["files"].items())
    mine = [each for index, each in entries if each[1].get("writer", index) % count == number]
    found = _in_threads(lambda each: crc32_of(folder / each[0]), mine, threads)
    for (name, entry), crc32 in zip(mine, found, strict=True):
        if crc32 != entry["crc32"]:
            raise ValueError(
                f"{folder / name} is damaged: its CRC-32 is {crc32}, and was {entry['crc32']} when it was saved"
                f"{_others(folder)}"
            )


def check_files(folder: Path) -> dict | None:
    """Checks a whole checkpoint in one process, if it has a manifest, which is returned.

    Raises:
        ValueError: a file is missing or damaged.
    """
    manifest = read_manifest(folder)
    if manifest is not None:
        check_sizes(folder, manifest)
        check_sums(folder, manifest, 0, 1, _THREADS)
    return manifest


def files_of(folder: Path) -> list[Path]:
    """All files in a folder and those in it, sorted; none if there is no such folder."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def replace_text(path: Path, text: str) -> None:
    """Writes a file, whole or not at all."""
    scratch = path.with_name(path.name + ".partial")
    with scratch.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)


def _entry(path):
    return {"bytes": path.stat().st_size, "crc32": crc32_of(path)}


def _in_threads(function, items, threads=_THREADS):
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, items))


def _others(folder):
    """Where to go on from instead."""
    manifests = sorted(folder.parent.glob(f"*/{MANIFEST}"), key=lambda path: path.stat().st_mtime, reverse=True)
    tags = [path.parent.name for path in manifests if path.parent.name != folder.name]
    tags = [tag for tag in tags if not tag.endswith((".partial", ".replaced"))]
    if not tags:
        return f"; {folder.parent} has no other checkpoint"
    return f"; another one in {folder.parent} can be loaded by its tag: {', '.join(tags)} (newest first)"
