"""List files that other projects publish and this repository does not contain: their addresses and checksums."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

DECOUPLING = "https://github.com/facebookresearch/classifier-balancing, folder data/"
SADE = "https://github.com/Vanint/SADE-AgnosticLT, folder data_txt/"

PUBLISHED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "ImageNet_LT_train.txt": ("a063f095fcd475db4cf8b0658c4b73955535bbf9",),
        "ImageNet_LT_val.txt": ("3ed3188b2f44829ce2dec1cc27040d8d40984088",),
        "ImageNet_LT_test.txt": ("76a2fb9749d6cd29e765cc4f8c270f2504131e2f",),
        # The second one lists the same images by their paths in the small-image release of Places365.
        "Places_LT_train.txt": (
            "6392252f8ae867bc8a5e841cc1b29e5b8ef4b636",
            "1d608b558c25c271da75c06f1e5e3625a4ebcb79",
        ),
        "Places_LT_val.txt": ("b93a2ca58ccb7f3b671c176f395a70bf52c95533", "89c29c0973328f77d7a77a8b580634ce20acdc11"),
        "Places_LT_test.txt": ("e732e58b8aa718a2c1c11933375f5710652c2b93", "d43400ac9bc2275baa058456da40b20abb50b108"),
        "iNaturalist18_train.txt": ("4accdb7584d2f0a5106c40a33ed6afa392189bcc",),
        "iNaturalist18_val.txt": ("4c23900857fd0f5adcd4cc0dffef345039eeb05f",),
        "ImageNet_LT_forward2.txt": ("13783ba7ca5df117aa70dd264d3da6a622f09653",),
        "ImageNet_LT_forward5.txt": ("0d395a972b6a3631d20ccf6ad924818695fc38d5",),
        "ImageNet_LT_forward10.txt": ("ac2c2985ab6aef34207e5accdd51bd9ca5fbdc6b",),
        "ImageNet_LT_forward25.txt": ("54f55e5525ae8a925af556e6d619e7c180e1b0d2",),
        "ImageNet_LT_forward50.txt": ("fd6b9017529a6d6663984c72f384efca22c7910e",),
        "ImageNet_LT_backward2.txt": ("86a3cdefc3a8f724022405458d2d92c753b6d150",),
        "ImageNet_LT_backward5.txt": ("c1d0f1c2e1d68c857b98de71ff724d767263a5c3",),
        "ImageNet_LT_backward10.txt": ("63c375e196c7ce91e5a674eb4feb2d4d4561c3ef",),
        "ImageNet_LT_backward25.txt": ("1f00b7d93fdb8349c9449ae4cbe5324eeb4450f9",),
        "ImageNet_LT_backward50.txt": ("3bb919f1383a5b442791a737bd55bcb7d3542556",),
        "ImageNet_LT_uniform.txt": ("0640fec501c5b9b6f9bebe9e0ca7ed8cdd62a249",),
        "Places_LT_uniform.txt": ("7621ce13834f7b0c6cc0b5b13e64d121d2ad60da",),
        "Places_LT_forward2.txt": ("e0a92a6305c3399bcd939c570c215b6d8080c906",),
        "Places_LT_forward5.txt": ("afb9d3155aa0a112fa0e3b8562bbfb993ecac510",),
        "Places_LT_forward10.txt": ("792197a817dc2de4e26e3d86b7f192688fb51eb6",),
        "Places_LT_forward25.txt": ("a405071643619f52312da7b10f8bee0d0d3143af",),
        "Places_LT_forward50.txt": ("c4bb41c41922de6517a81be5418b0f609a5dcbe9",),
        "Places_LT_backward2.txt": ("1d1a1a02739a6e3132835c07763df9c577a1ed2b",),
        "Places_LT_backward5.txt": ("ed8f892800491aa98eaa71e8fbc02d10c241e0f1",),
        "Places_LT_backward10.txt": ("fe4b37c631c6ec1e6a69aa466c76488d3ec21833",),
        "Places_LT_backward25.txt": ("55c2041f22b2af5f269faece007ac5d93f132d81",),
        "Places_LT_backward50.txt": ("412501c8d0c23ac7a934a24628c37b3b9f909a05",),
        "iNaturalist18_uniform.txt": ("55f2cc07d5aa05568207a18fd054ee66d4b62657",),
        "iNaturalist18_forward2.txt": ("f560c7d4952703c749183e20cb9c6730ee06befa",),
        "iNaturalist18_forward3.txt": ("d02d9c6f718257d7190b54dc5754df0668851fe4",),
        "iNaturalist18_backward2.txt": ("a9ad5c9aa87b6e9953521b867e02228c9322f3a8",),
        "iNaturalist18_backward3.txt": ("90153d693619162cbbb94061eed7261c61ff2a60",),
    }
)
"""Name of a list file → the git blob ids (`git hash-object FILE`) of its published versions."""


def published_at(name: str) -> str:
    """Where a published list file can be downloaded, with its checksum, for messages.

    Args:
        name: of the file, without folders.

    Returns:
        An empty text if no published list has this name.
    """
    if name not in PUBLISHED:
        return ""
    repository = SADE if any(kind in name for kind in ("forward", "backward", "uniform")) else DECOUPLING
    return f"published at {repository} (git blob {PUBLISHED[name][0]})"


def blob_id(data: bytes) -> str:
    """The git blob id of a file's content, as `git hash-object` computes it.

    Line ends are converted to \\n first, because DirMixE's copies of the lists have \\r\\n.

    Args:
        data: the content.
    """
    data = data.replace(b"\r\n", b"\n")
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def is_published(file: Path) -> bool:
    """Whether a list file has the content of the published list of the same name.

    Args:
        file: an existing file.
    """
    return blob_id(file.read_bytes()) in PUBLISHED.get(file.name, ())
