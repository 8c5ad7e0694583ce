# SPDX-License-Identifier: Apache-2.0
"""Opening text files, plain or gzip; what is wrong with one is a ValueError that starts with "path:line: "."""

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

_GZIP_MAGIC = b"\x1f\x8b"


def open_bytes(path: Path) -> IO[bytes]:
    """The content of a file, decompressed if it is gzip, which is recognised by its first bytes.

    Raises:
        OSError: the file cannot be opened.
    """
    with open(path, "rb") as raw:
        compressed = raw.read(2) == _GZIP_MAGIC
    return gzip.open(path, "rb") if compressed else open(path, "rb")


@contextmanager
def damage_named(path: Path, line):
    """Turns damaged gzip data into a ValueError. `line()` is the number of the line that could not be read."""
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}:{line()}: damaged gzip data ({error})") from error


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number, line without its end), counted from 1.

    Raises:
        ValueError: damaged gzip data, or text that is not UTF-8.
        OSError: the file cannot be opened.
    """
    number = 0
    try:
        with damage_named(path, lambda: number + 1), open_bytes(path) as file:
            for number, line in enumerate(file, start=1):
                yield number, line.decode("utf-8").rstrip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}:{number}: not text in UTF-8 ({error.reason})") from error
