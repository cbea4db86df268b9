"""What `data verify` does with shards instead of files: sizes and checksums come from the index."""

import hashlib

import numpy as np

from tailtune.datasets.commands.copies import Digests
from tailtune.datasets.commands.findings import Findings
from tailtune.datasets.commands.split_files import SplitFiles
from tailtune.datasets.images.inspect_files import Inspection
from tailtune.datasets.sources.shards import ShardSource


def inspect_shards(files: SplitFiles, findings: Findings) -> Inspection:
    """Compare the sizes of the shards with their indexes. No image is read.

    Args:
        files: all N images.
        findings: gets the shards that are missing or of another size.

    Returns:
        The size of each image, and the images whose shard has a problem.
    """
    sizes, problems, start = [np.zeros(0, dtype=np.int64)], dict[int, str](), 0
    for split in files.by_name.values():
        source = split.source
        assert isinstance(source, ShardSource)
        found = source.inspect(split.indices, read_headers=False)
        sizes.append(found.sizes)
        for index, reason in found.problems.items():
            problems[start + index] = reason
            findings.files[source.shard_location(int(split.indices[index]))] = reason
        start += len(split.indices)
    return Inspection(np.concatenate(sizes), problems)


def _indexed(files: SplitFiles, index: int) -> bytes:
    source, position = files.source_of(index)
    assert isinstance(source, ShardSource)
    return int(source.index.crc32[position]).to_bytes(16, "little")


def _content(files: SplitFiles, index: int) -> bytes:
    source, position = files.source_of(index)
    return hashlib.blake2b(source.encoded(position), digest_size=16).digest()


SHARD_DIGESTS: Digests = ((_indexed, "comparing checksums"), (_content, "comparing images"))
"""What shows that images in shards are the same: their checksums in the index, and then their bytes."""
