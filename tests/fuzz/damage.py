"""What may happen to a file: DAMAGES, name → a function that does it and says it in words."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save


class Unfit(Exception):
    """This damage cannot be done to this file."""


def flip(path: Path, rng: Random) -> str:
    content = bytearray(path.read_bytes())
    if not content:
        raise Unfit
    place, bit = rng.randrange(len(content)), rng.randrange(8)
    content[place] ^= 1 << bit
    path.write_bytes(content)
    return f"bit {bit} of byte {place} of {len(content)} flipped"


def truncate(path: Path, rng: Random) -> str:
    size = path.stat().st_size
    if not size:
        raise Unfit
    left = rng.choice([0, size - 1, rng.randrange(size)])
    os.truncate(path, left)
    return f"cut from {size} to {left} bytes"


def blank(path: Path, rng: Random) -> str:
    """What a power loss leaves on some file systems."""
    path.write_bytes(bytes(path.stat().st_size or 1))
    return "all bytes zero"


def extend(path: Path, rng: Random) -> str:
    more = rng.choice([b"\n", b"\0" * 512, rng.randbytes(100), path.read_bytes()])
    path.write_bytes(path.read_bytes() + more)
    return f"extended by {more[:20]!r}…"


def delete(path: Path, rng: Random) -> str:
    path.unlink()
    return "deleted"


def directory(path: Path, rng: Random) -> str:
    path.unlink()
    path.mkdir()
    return "replaced by a folder"


def link(path: Path, rng: Random) -> str:
    path.unlink()
    path.symlink_to("nowhere")
    return "replaced by a link to nowhere"


def pipe(path: Path, rng: Random) -> str:
    path.unlink()
    os.mkfifo(path)
    return "replaced by a FIFO"


def swap(path: Path, rng: Random) -> str:
    """With another of its kind, as when a backup is put back wrongly."""
    run = next(each for each in path.parents if each.parent.name == "output")
    others = sorted(each for each in run.rglob(f"*{path.suffix}") if each != path and each.is_file())
    if not others:
        raise Unfit
    other = rng.choice(others)
    mine, its = path.read_bytes(), other.read_bytes()
    path.write_bytes(its)
    other.write_bytes(mine)
    return f"swapped with {other.relative_to(run)}"


def number(path: Path, rng: Random) -> str:
    """One number of a JSON file."""
    content = _json(path)
    holder, key = rng.choice(_leaves(content) or [_unfit()])
    old = holder[key]
    new = rng.choice([old + 1, old - 1, -old, old * 2, 0, 10**9, 10**30, 1e300, str(old), None, True, [old]])
    if new == old:
        raise Unfit
    holder[key] = new
    path.write_text(json.dumps(content, indent=1))
    return f"{key}: {old!r} changed to {new!r}"


def key(path: Path, rng: Random) -> str:
    """One key of a JSON file."""
    content = _json(path)
    name = rng.choice(list(content) or [_unfit()])
    value = content.pop(name)
    if rng.random() < 0.5:
        content[name[:-1] + "_"] = value
    path.write_text(json.dumps(content, indent=1))
    return f"key {name} {'renamed' if len(content) else 'removed'}"


def line(path: Path, rng: Random) -> str:
    """One line of a text file is gone, doubled, or holds another digit."""
    lines = path.read_text(errors="surrogateescape").splitlines(keepends=True)
    where = rng.randrange(len(lines) or _unfit())
    old = lines[where]
    digits = old.translate(str.maketrans("0123456789", "1234567890"))
    lines[where] = rng.choice(["", old * 2, digits, old.replace(":", "", 1)])
    path.write_text("".join(lines), errors="surrogateescape")
    return f"line {where + 1} {old.strip()[:60]!r} changed to {lines[where].strip()[:60]!r}"


def rows(path: Path, rng: Random) -> str:
    """Two rows of a tensor change places."""
    tensors = _tensors(path)
    name = rng.choice([name for name, each in tensors.items() if each.ndim and len(each) > 1] or [_unfit()])
    one, other = rng.sample(range(len(tensors[name])), 2)
    order = list(range(len(tensors[name])))
    order[one], order[other] = other, one
    path.write_bytes(save({**tensors, name: tensors[name][order].contiguous()}))
    return f"rows {one} and {other} of {name} swapped"


def nan(path: Path, rng: Random) -> str:
    tensors = _tensors(path)
    name = rng.choice(
        [name for name, each in tensors.items() if each.is_floating_point() and each.numel()] or [_unfit()]
    )
    tensors[name].view(-1)[rng.randrange(tensors[name].numel())] = float(rng.choice(["nan", "inf", "1e4"]))
    path.write_bytes(save(tensors))
    return f"a number of {name} is another"


def header(path: Path, rng: Random) -> str:
    """A safetensors file claims sizes that it has not."""
    content = path.read_bytes()
    size = rng.choice([2**62, 2**40, 2**26, 0, len(content)])
    path.write_bytes(size.to_bytes(8, "little") + content[8:])
    return f"its header claims {size} bytes"


DAMAGES: Mapping[str, Callable[[Path, Random], str]] = {
    each.__name__: each
    for each in (
        flip,
        truncate,
        blank,
        extend,
        delete,
        directory,
        link,
        pipe,
        swap,
        number,
        key,
        line,
        rows,
        nan,
        header,
    )
}
_TENSORS, _TEXTS = (".safetensors",), (".json", ".yaml", ".txt")
KINDS = {"number": (".json",), "key": (".json",), "line": _TEXTS, "rows": _TENSORS, "nan": _TENSORS, "header": _TENSORS}
"""Damage that needs a certain kind of file: its suffixes."""


def fits(kind: str, path: Path) -> bool:
    """Whether such damage can be done to such a file."""
    return path.suffix in KINDS.get(kind, (path.suffix,))


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def _tensors(path: Path) -> dict[str, Any]:
    try:
        return dict(load(path.read_bytes()))
    except SafetensorError:
        raise Unfit from None


def _leaves(node: Any) -> list[tuple[Any, Any]]:
    """(holder, key) of every number below a node."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    found = []
    for name, value in items:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            found.append((node, name))
        found += _leaves(value)
    return found


def _unfit() -> Any:
    raise Unfit
