"""Finds images that occur in several splits: files with the same content, and images that look nearly the same."""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from tailtune.datasets.commands.split_files import SplitFiles
from tailtune.datasets.images.inspect_files import THREADS
from tailtune.datasets.images.regular_files import NotARegularFile, open_regular
from tailtune.datasets.sources.named_source import BadImage

Digest = Callable[[SplitFiles, int], bytes]
"""Takes images and a position; returns 16 bytes that are the same for the same image."""
Digests = Sequence[tuple[Digest, str]]
"""Digests, and what a progress bar calls each of them."""
PROBE_BYTES = 4096
"""Bytes from the middle of a file that are compared before whole files are."""
LARGEST_COMPARED = 1 << 30
"""Larger files are not compared. They are no images, but perhaps sparse files, which cost no space and much time."""
FILES_PER_TASK = 256
NEAR_BITS = 4
"""Two images look nearly the same if at most so many of the 64 bits of their perceptual hashes differ."""
MAX_PAIRS = 10_000
"""Most pairs of similar images that are kept; more are only counted. Images of one colour make very many pairs."""
PAIRS_AT_ONCE = 1 << 20
_BITS_SET = np.array([number.bit_count() for number in range(1 << 16)], dtype=np.uint8)


@dataclass(frozen=True)
class NearCopies:
    """Pairs of images of different splits that look nearly the same."""

    pairs: list[tuple[int, int, int]]
    """Positions of the two files, and number of bits that differ; at most `MAX_PAIRS`."""
    total: int
    """Number of pairs that were found."""


@dataclass(frozen=True)
class ExactCopies:
    """Files of the same content."""

    groups: list[list[int]]
    """Positions. All files of a group have the same content, and they are in two parts at least."""
    unreadable: dict[int, str]
    """Position of a file that could not be read → the reason."""


def exact_copies(
    files: SplitFiles, sizes: np.ndarray, part_of: np.ndarray, digests_of: Digests | None = None
) -> ExactCopies:
    """Find files of the same content in different parts, such as splits. Copies inside one part are not looked for.

    Only files whose size occurs in several parts are opened. First 4 KiB from the middle of each are compared, and
    whole files only where these are equal.

    Args:
        files: N files.
        sizes: their sizes in bytes, int64 [N]; files of size 0 or below, or above `LARGEST_COMPARED`, are left out.
        part_of: number of the part of each file, int64 [N].
        digests_of: what is compared, one after the other; None: as said above.

    Returns:
        The groups, and the files that could not be compared.
    """
    unreadable: dict[int, str] = {}
    candidates = np.flatnonzero((sizes > 0) & (sizes <= LARGEST_COMPARED))
    candidates = candidates[_in_several_parts(sizes[candidates], part_of[candidates])]
    for digest, description in digests_of or FILE_DIGESTS:
        digests, problems = _digests(files.take(candidates), digest, description)
        unreadable |= {int(candidates[index]): reason for index, reason in problems.items()}
        keys = np.stack([sizes[candidates].astype(np.uint64), *digests.T], axis=1)
        _, key_numbers = np.unique(keys, axis=0, return_inverse=True)
        key_numbers = key_numbers.reshape(-1)
        kept = _in_several_parts(key_numbers, part_of[candidates])
        kept[list(problems)] = False
        candidates, key_numbers = candidates[kept], key_numbers[kept]
    groups: dict[int, list[int]] = {}
    for position, number in zip(candidates.tolist(), key_numbers.tolist(), strict=True):
        groups.setdefault(number, []).append(position)
    return ExactCopies(sorted(groups.values()), unreadable)


def perceptual_hash(image: Image.Image) -> int:
    """The perceptual hash of an image (ImageHash's pHash: signs of the low frequencies of 32×32 grey values).

    Args:
        image: the image.

    Returns:
        64 bits.
    """
    import imagehash  # imports scipy

    return int.from_bytes(np.packbits(imagehash.phash(image).hash).tobytes(), "big")


def near_copies(files: SplitFiles, positions: np.ndarray, hashes: np.ndarray) -> NearCopies:
    """Find pairs of images of different splits whose perceptual hashes differ in at most `NEAR_BITS` bits.

    All pairs are compared, block by block, so that the memory does not depend on their number.

    Args:
        files: N files.
        positions: the files that could be decoded, int64 [n].
        hashes: their perceptual hashes, uint64 [n].

    Returns:
        The pairs.
    """
    of_split = [np.flatnonzero(files.split_of[positions] == number) for number in range(len(files.names))]
    couples = [(a, b) for i, a in enumerate(of_split) for b in of_split[i + 1 :] if len(a) and len(b)]
    pairs: list[tuple[int, int, int]] = []
    total = 0
    work = sum(len(a) * len(b) for a, b in couples)
    with tqdm(total=work, desc="comparing images", delay=2, leave=False, unit="pair", disable=None) as bar:
        for a, b in couples:
            for rows in _blocks(a, max(1, PAIRS_AT_ONCE // len(b))):
                distances = _distances(hashes[rows], hashes[b])
                for row, column in np.argwhere(distances <= NEAR_BITS)[: MAX_PAIRS - len(pairs)].tolist():
                    found = int(positions[rows[row]]), int(positions[b[column]]), int(distances[row, column])
                    pairs.append(found)
                total += int((distances <= NEAR_BITS).sum())
                bar.update(distances.size)
    return NearCopies(sorted(pairs), total)


def _distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Number of different bits of each pair, uint8 [len(a), len(b)]."""
    parts = _BITS_SET[(a[:, None] ^ b[None, :]).view(np.uint16)]  # [a, 4 b]
    return parts[:, 0::4] + parts[:, 1::4] + parts[:, 2::4] + parts[:, 3::4]


def _blocks(values: np.ndarray, size: int) -> Iterator[np.ndarray]:
    return (values[start : start + size] for start in range(0, len(values), size))


def _in_several_parts(keys: np.ndarray, part_of: np.ndarray) -> np.ndarray:
    """Whether the key of each file also occurs in another part, bool [n]."""
    if not len(keys):
        return np.zeros(0, dtype=bool)
    unique, numbers = np.unique(keys, return_inverse=True)
    first = np.full(len(unique), np.iinfo(np.int64).max)
    last = np.full(len(unique), -1)
    np.minimum.at(first, numbers, part_of)
    np.maximum.at(last, numbers, part_of)
    return (first != last)[numbers]


def _digests(files: SplitFiles, digest: Digest, description: str) -> tuple[np.ndarray, dict[int, str]]:
    """Digests of the contents of n files, uint64 [n, 2]; and position → reason of the files that cannot be read."""
    digests = np.zeros((len(files), 2), dtype=np.uint64)
    problems: dict[int, str] = {}

    def compute(start: int) -> int:
        chunk = range(start, min(start + FILES_PER_TASK, len(files)))
        for index in chunk:
            try:
                digests[index] = np.frombuffer(digest(files, index), dtype=np.uint64)
            except (NotARegularFile, BadImage) as reason:
                problems[index] = str(reason)
            except OSError as error:
                problems[index] = str(error.strerror)
        return len(chunk)

    with (
        tqdm(total=len(files), desc=description, delay=2, leave=False, unit="file", disable=None) as bar,
        ThreadPoolExecutor(THREADS) as pool,
    ):
        for count in pool.map(compute, range(0, len(files), FILES_PER_TASK)):
            bar.update(count)
    return digests, problems


def _read(path: Path, digest: Callable[[int, int], bytes]) -> bytes:
    descriptor, status = open_regular(path)
    try:
        return digest(descriptor, status.st_size)
    finally:
        os.close(descriptor)


def _probe(files: SplitFiles, index: int) -> bytes:
    return _read(files[index], _middle)


def _whole(files: SplitFiles, index: int) -> bytes:
    return _read(files[index], _everything)


FILE_DIGESTS: Digests = ((_probe, "comparing parts of files"), (_whole, "comparing files"))


def _middle(descriptor: int, size: int) -> bytes:
    os.lseek(descriptor, max(0, size // 2 - PROBE_BYTES // 2), os.SEEK_SET)
    return hashlib.blake2b(os.read(descriptor, PROBE_BYTES), digest_size=16).digest()


def _everything(descriptor: int, size: int) -> bytes:
    with os.fdopen(descriptor, "rb", closefd=False) as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest()
