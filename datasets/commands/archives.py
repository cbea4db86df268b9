"""Unpacks the expected members of a tar archive. An archive with a member that would leave its folder is refused."""

import gzip
import hashlib
import tarfile
import zlib
from pathlib import Path, PurePosixPath

from tailtune.configs.atomic_file import atomic_file
from tailtune.configs.errors import UserError
from tailtune.datasets.commands.published_files import PublishedFile
from tailtune.datasets.commands.result_files import cannot_write

BLOCK = 1 << 20
MAX_MEMBER = 1 << 30
"""Largest member that is unpacked."""
DAMAGE = (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile)
"""What Python raises for a damaged archive."""


def unpack(archive: Path, file: PublishedFile, root: Path) -> None:
    """Unpack the members that the table names. All members are checked before anything is written.

    Args:
        archive: the archive.
        file: its entry in the table.
        root: the folder to unpack to.

    Raises:
        UserError: the archive is damaged, a member would be written outside `root` or is a link or a device, an
            expected member is missing or has another checksum, or the file system refuses to write.
    """
    assert file.members is not None
    try:
        with tarfile.open(archive, "r:*") as content:
            members = {member.name: member for member in content if _checked(archive, member)}
            for name, md5 in file.members.items():
                if name not in members or not members[name].isfile() or members[name].size > MAX_MEMBER:
                    raise UserError(f"{archive}: the file {name} is not in this archive; remove it and try again")
                _unpack_member(content, members[name], md5, root / name, archive)
    except DAMAGE as error:
        raise UserError(f"{archive} is damaged ({error}); remove it and try again") from error
    except OSError as error:
        raise cannot_write(root, error) from error


def _checked(archive: Path, member: tarfile.TarInfo) -> bool:
    """True for a harmless member."""
    path = PurePosixPath(member.name)
    reason = ""
    if path.is_absolute() or ".." in path.parts or "\\" in member.name:
        reason = "would be written outside of the folder"
    elif not (member.isfile() or member.isdir()):
        reason = "is a link or a device"
    if reason:
        raise UserError(f"{archive}: its member {member.name!r} {reason}; nothing was unpacked; remove this archive")
    return True


def _unpack_member(content: tarfile.TarFile, member: tarfile.TarInfo, md5: str, target: Path, archive: Path) -> None:
    source = content.extractfile(member)
    assert source is not None
    digest = hashlib.md5(usedforsecurity=False)
    with source, atomic_file(target) as unpacked:
        for block in iter(lambda: source.read(BLOCK), b""):
            digest.update(block)
            unpacked.write(block)
        if md5 and digest.hexdigest() != md5:
            raise UserError(f"{archive}: its member {member.name} has MD5 {digest.hexdigest()} instead of {md5}")
