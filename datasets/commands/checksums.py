"""Checksums of files: git blob ids of lists, and MD5 sums of archives."""

import hashlib
import os
from pathlib import Path
from typing import Literal

from tailtune.datasets.images.regular_files import open_regular
from tailtune.datasets.sources.published_lists import blob_id

Kind = Literal["git blob", "md5"]


def checksum(path: Path, kind: Kind) -> str:
    """The checksum of a file.

    Args:
        path: the file.
        kind: `md5`; or `git blob`, for which the file is read into memory.

    Returns:
        Hexadecimal digits.

    Raises:
        NotARegularFile: nothing is there, or it is no regular file.
    """
    descriptor, _ = open_regular(path)
    with os.fdopen(descriptor, "rb") as content:
        if kind == "git blob":
            return blob_id(content.read())
        return hashlib.file_digest(content, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
