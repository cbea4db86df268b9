"""Damaged and hostile files of weights: what a broken disk, a cut-off download or an adversary makes of good ones."""

import io
import json
import random
import re
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

State = dict[str, Tensor]
Damage = Callable[[random.Random, bytes], bytes]

LIMITS = (2**31 - 1, 2**32, 2**40, 2**62, 2**63 - 1, 2**64 - 1)
"""Sizes that no small file has."""
NUMBERS = 111
BOMB = 16 * 2**20
"""Bytes that a compressed part unpacks to; what opens it takes them, whatever the file's own size."""


def damaged_files(seed: int, count: int) -> Iterator[tuple[str, bytes]]:
    """`count` files (name, content), the same for the same seed: the hostile ones first, then good ones with damage.

    Some are still files of weights, of other values; none may do anything worse than be refused in one line.
    """
    rng = random.Random(seed)
    good, hostile = list(_good()), list(_hostile())
    for index, (name, content) in enumerate(hostile[:count]):
        yield f"hostile-{index}-{name}", content
    for index in range(len(hostile), count):
        name, content = rng.choice(good)
        kinds = [*DAMAGES, *([_inside] if content.startswith(b"PK") else [])]
        damage = rng.choice(kinds)
        yield f"{index}-{damage.__name__.strip('_')}-{name}", damage(rng, content)


def _states() -> dict[str, object]:
    torch.manual_seed(0)
    plain = {"conv1.weight": torch.randn(4, 3, 3, 3), "bn1.running_var": torch.rand(4), "fc.weight": torch.randn(5, 4)}
    plain |= {"bn1.num_batches_tracked": torch.tensor(3), "half.weight": torch.randn(6, 2).half()}
    return {
        "plain": plain,
        "ride": {"state_dict": {f"module.backbone.{name}": each for name, each in plain.items()}, "epoch": 200},
        "lift": {"tuner": {"lora_list.0.q.lora_A": torch.randn(8, 2)}, "head": {"weight": torch.randn(5, 8)}},
    }


def _good() -> Iterator[tuple[str, bytes]]:
    for name, content in _states().items():
        yield f"{name}-zip.pth", _saved(content)
        # Old files have tensors in the order of their addresses, which is not the same twice; so all are in one.
        flat = _in_one(content, torch.randn(NUMBERS, generator=torch.Generator().manual_seed(1)))
        yield f"{name}-legacy.pth", _without_addresses(_saved(flat, _use_new_zipfile_serialization=False))
        if name == "plain":
            yield "plain.safetensors", save(content)  # type: ignore[arg-type]


def _saved(content: object, **named: bool) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **named)
    return file.getvalue()


def _in_one(content: Any, numbers: Tensor) -> Any:
    """The same names and shapes, as views of some numbers."""
    if isinstance(content, dict):
        return {name: _in_one(each, numbers) for name, each in content.items()}
    return numbers[: content.numel()].view(content.shape) if isinstance(content, Tensor) else content


def _without_addresses(content: bytes) -> bytes:
    return re.sub(rb"X.\0\0\0\d{9,}", b"X\1\0\0\x000", content)


# --- damage ----------------------------------------------------------------------------------------------------------


def _cut(rng: random.Random, content: bytes) -> bytes:
    return content[: rng.randrange(len(content))]


def _flipped(rng: random.Random, content: bytes) -> bytes:
    found = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        found[rng.randrange(len(found))] ^= 1 << rng.randrange(8)
    return bytes(found)


def _flipped_at_the_start(rng: random.Random, content: bytes) -> bytes:
    """Where the headers of safetensors and of old pickles stand."""
    return _flipped(rng, content[:400]) + content[400:]


def _blank(rng: random.Random, content: bytes) -> bytes:
    """A block that was never written."""
    start, length = rng.randrange(len(content)), rng.choice((1, 16, 512))
    return (content[:start] + bytes([rng.choice((0, 255))]) * length + content[start + length :])[: len(content)]


def _without(rng: random.Random, content: bytes) -> bytes:
    start = rng.randrange(len(content))
    return content[:start] + content[start + rng.choice((1, 8, 100)) :]


def _twice(rng: random.Random, content: bytes) -> bytes:
    start, end = sorted(rng.randrange(len(content)) for _ in range(2))
    return content[:end] + content[start:]


def _longer(rng: random.Random, content: bytes) -> bytes:
    return content + rng.randbytes(rng.choice((1, 30, 5000)))


def _huge(rng: random.Random, content: bytes) -> bytes:
    """Eight bytes somewhere say a size that nothing has."""
    start = rng.choice((0, rng.randrange(len(content))))
    return content[:start] + rng.choice(LIMITS).to_bytes(8, "little") + content[start + 8 :]


def _inside(rng: random.Random, content: bytes) -> bytes:
    """Damage in one part of a zip, with sizes and checksums that are right for it."""
    parts = _parts(content)
    name = rng.choice([name for name in parts if name.endswith("data.pkl")] * 3 + list(parts))
    parts[name] = rng.choice(DAMAGES)(rng, parts[name])
    return _zipped(parts)


DAMAGES: list[Damage] = [_cut, _flipped, _flipped_at_the_start, _blank, _without, _twice, _longer, _huge]


def _parts(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _zipped(parts: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in parts.items():
            about = zipfile.ZipInfo(name)  # without the time
            about.compress_type = compression
            archive.writestr(about, content)
    return file.getvalue()


# --- hostile ---------------------------------------------------------------------------------------------------------


def _hostile() -> Iterator[tuple[str, bytes]]:
    yield from _bombs()
    yield from (("empty", b""), ("zeros.pth", bytes(5000)), ("text.pth", b"<html>404 Not Found</html>\n"))
    for size in LIMITS:
        yield "length.safetensors", size.to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[1]'
    many = ",".join(f'"t{k}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for k in range(90_000))
    claims = [{"a": {"dtype": "F32", "shape": [2**k], "data_offsets": [0, 2 ** (k + 2)]}} for k in (20, 40, 61, 62)]
    for header in (*claims, {"a": {"dtype": "F32", "shape": [2**32, 2**32], "data_offsets": [0, 4]}}):
        yield "header.safetensors", _headed(json.dumps(header))
    yield "many.safetensors", _headed(f"{{{many}}}")


def _headed(header: str) -> bytes:
    """A file of safetensors with a header and 64 bytes of numbers."""
    return len(header).to_bytes(8, "little") + header.encode() + bytes(64)


def _bombs() -> Iterator[tuple[str, bytes]]:
    """Files of torch.save whose parts are compressed, larger than they are, or fewer."""
    files = dict(_good())
    parts = _parts(files["plain-zip.pth"])
    data = next(name for name in parts if name.endswith("data/0"))
    yield "compressed.pth", _zipped({**parts, data: bytes(BOMB)}, zipfile.ZIP_DEFLATED)
    yield "missing.pth", _zipped({name: each for name, each in parts.items() if name != data})
    yield "short.pth", _zipped({**parts, data: parts[data][:8]})
    for number in LIMITS[:4]:  # of a tensor, and of what holds it: 108 numbers, or all of an old file
        for name in ("plain-zip.pth", "plain-legacy.pth"):
            content = files[name]
            long = b"\x8a\x09" + number.to_bytes(9, "little")
            if name.endswith("zip.pth"):
                pickled = next(each for each in parts if each.endswith("data.pkl"))
                yield name, _zipped({**parts, pickled: parts[pickled].replace(b"Kl", long)})
                yield name, _zipped({**parts, pickled: parts[pickled].replace(b"(K\x04K\x03", b"(" + long + b"K\x03")})
            else:
                yield name, content.replace(b"K%c" % NUMBERS, long)
                yield name, content.replace(b"(K\x04K\x03", b"(" + long + b"K\x03")
