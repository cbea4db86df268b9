"""`data prepare`: gets the files of a published data set that may be downloaded, and says what to do by hand."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path

from tailtune.configs.errors import UserError, lookup
from tailtune.datasets.commands.archives import unpack
from tailtune.datasets.commands.checksums import checksum
from tailtune.datasets.commands.download import copy_file, download, has_checksum
from tailtune.datasets.commands.layouts import what_remains
from tailtune.datasets.commands.published_files import PUBLISHED_SETS, PublishedFile
from tailtune.datasets.commands.result_files import cannot_write

MAX_FILES = 1_000_000
"""Most files of `--from` that are looked at."""


@dataclass(frozen=True)
class PrepareRequest:
    """What `data prepare` shall get."""

    name: str
    """A key of `PUBLISHED_SETS`."""
    root: Path
    local: Path | None = None
    """A folder with copies, which are used instead of a download."""
    mirror: str | None = None
    """Address of a folder that has the files by their names, instead of the published addresses."""
    only: Sequence[str] = ()
    """Patterns of file names; empty for all files."""


def prepare(request: PrepareRequest) -> Iterator[str]:
    """Get the files of a published data set. Files that are there already are checked and kept.

    Args:
        request: the data set, and where its files come from.

    Yields:
        Lines for the terminal.

    Raises:
        UserError: an unknown data set, a file that cannot be had, a file of the same name with other content, or a
            folder that cannot be written to.
    """
    files = lookup(PUBLISHED_SETS, request.name, "published data set")
    if request.only:
        files = tuple(file for file in files if any(fnmatchcase(file.name, pattern) for pattern in request.only))
    if not files:
        names = ", ".join(file.name for file in PUBLISHED_SETS[request.name])
        raise UserError(f"--only {request.only[0]} fits no file of {request.name}; its files are {names}")
    if request.mirror and not request.mirror.startswith(("http://", "https://")):
        raise UserError(f"--mirror {request.mirror}: give an address that begins with http:// or https://")
    root = Path(os.path.abspath(request.root))
    copies = _copies(request.local, files) if request.local else {}
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(root, error) from error
    without = []
    for file in files:
        done = _get(request, file, root, copies)
        if done:
            yield f"  {file.name}: {done}"
        else:
            without.append(file.name)
    if without:
        more = f" and {len(without) - 1} more" if len(without) > 1 else ""
        raise UserError(
            f"--from {request.local} holds no copy of {without[0]}{more} with the published checksum: add it, choose "
            "files with --only, or leave out --from to download it"
        )
    yield f"{request.name}: {len(files)} files are in {root}, and their checksums are right"
    if text := what_remains(request.name, root):
        yield text


def _get(request: PrepareRequest, file: PublishedFile, root: Path, copies: dict[str, list[Path]]) -> str:
    """Get a file and unpack it. Returns what was done; an empty text if `--from` has no copy."""
    target = root / file.name
    for path in (target, *(root / member for member in file.members or ())):
        _check_inside(path, root)
    unpacked = _are_unpacked(file, root)
    done = "was there already"
    if unpacked and all((file.members or {}).values()):
        return f"{done}, unpacked"
    if not has_checksum(target, file):
        if os.path.lexists(target):
            raise UserError(f"{target} has other content than the published file: move it away, and try again")
        if request.local:
            source = next((copy for copy in copies.get(file.name, ()) if has_checksum(copy, file)), None)
            if source is None:
                return ""
            copy_file(source, target)
            done = f"copied from {source}"
        else:
            url = f"{request.mirror.rstrip('/')}/{file.name}" if request.mirror else file.url
            download(file, url, target)
            done = "downloaded"
    if file.members and not unpacked:
        unpack(target, file, root)
        done += ", unpacked"
    return done


def _are_unpacked(file: PublishedFile, root: Path) -> bool:
    """Whether all members of an archive are there. Other files with their names are refused, and not replaced."""
    for member, md5 in (file.members or {}).items():
        if md5 and (root / member).is_file() and checksum(root / member, "md5") != md5:
            raise UserError(f"{root / member} has other content than the published file: move it away, and try again")
    return bool(file.members) and all((root / member).is_file() for member in file.members or ())


def _check_inside(path: Path, root: Path) -> None:
    """Refuse a path that a link leads out of the root."""
    parent = os.path.realpath(path.parent)
    if not Path(parent).is_relative_to(os.path.realpath(root)):
        raise UserError(f"{path.parent} leads to {parent}, outside of --root {root}: remove this link")


def _copies(folder: Path, files: Sequence[PublishedFile]) -> dict[str, list[Path]]:
    """Name of a published file → the files in a folder and below it that have one of its names."""
    if not folder.is_dir():
        raise UserError(f"--from {folder} is not a folder; name the folder that holds the copies")
    wanted = {name: file.name for file in files for name in (file.name, *file.other_names)}
    found: dict[str, list[Path]] = {}
    entries = ((Path(top), name) for top, _, names in os.walk(folder) for name in sorted(names))
    for top, name in islice(entries, MAX_FILES):
        if name in wanted:
            found.setdefault(wanted[name], []).append(top / name)
    return found
