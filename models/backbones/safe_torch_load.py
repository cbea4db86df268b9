"""Files of torch.save, opened without running what they may contain and without believing the sizes that they claim."""

import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from tailtune.configs.errors import UserError

State = dict[str, Tensor]

READ_ERRORS = (
    *(SafetensorError, zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError),
    *(OverflowError, MemoryError),
)
"""What safetensors, zipfile and `safe_torch_load` raise on bytes that are no weights, or not all of them."""
NONSENSE = (LookupError, TypeError, AttributeError, AssertionError, struct.error)
"""What the restricted unpickler raises besides, on damaged instructions."""
ZIP = b"PK\x03\x04"
"""How a file of torch.save begins; those before torch 1.6 are pickles one behind the other."""

PART = re.compile(r"^[^/]+/data/[^/]+$")
"""Name of a part that holds numbers: `<file>/data/<key>`."""

STATE = "s.get('state_dict', s.get('model', s))"
"""Where the weights stand in what people save, `s`, in Python."""


def safe_torch_load(path: Path) -> Any:
    """What is in a file: tensors, and the containers, numbers and strings around them.

    Raises:
        READ_ERRORS: it is damaged, holds something else, or claims more than it has.
    """
    with path.open("rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about pickles of other kinds, which damaged ones seem to be
        size = path.stat().st_size
        if file.read(len(ZIP)) == ZIP:
            claimed = _Claimed(_data_in(file, size))
            # A view of the file: without it torch reads past the end of a part that is shorter than its tensor says.
            found = _unpickled(str(path), map_location=claimed, mmap=True)
            if claimed.total != claimed.most:
                raise ValueError(f"its tensors claim {claimed.total} bytes, and its parts have {claimed.most}")
            return found
        file.seek(0)
        found = _unpickled(file, map_location=_Claimed(size))
        if file.read(1):
            raise ValueError("it has more bytes than its tensors need")
        return found


def _unpickled(file: Any, **named: Any) -> Any:
    try:
        return torch.load(file, weights_only=True, **named)
    except NONSENSE as error:
        raise pickle.UnpicklingError("its parts do not fit together") from error


def explain_read_error(path: Path, error: Exception, keep: str = STATE) -> str:
    """What `READ_ERRORS` say of a file, as the end of a sentence that begins with it.

    Args:
        keep: what to save again of a file that holds more than tensors, in Python about its content `s`.
    """
    # Torch names what it refuses to unpickle as GLOBAL, somewhere below its advice to unpickle it all the same.
    if found := re.search(r"GLOBAL (\S+)", str(error)):
        save, load = "torch.save", "torch.load"  # for people to run; nothing here does
        content = f"s = {load}('{path.name}', map_location='cpu', weights_only={False})"
        plain = "s = s if isinstance(s, dict) else s.state_dict()"  # a whole network
        held = f"holds {_printable(found[1])}, and nothing but tensors is unpickled, because it can run code"
        script = f"import torch; {content}; {plain}; {save}({keep}, 'weights.pth')"
        return f'{held}: where it was made, run python -c "{script}"'
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read: {error.strerror}"
    text = str(error).rpartition("WeightsUnpickler error:")[2].partition("In PyTorch 2.6")[0]  # torch's own advice
    reason = _printable(text.strip().split("\n", 1)[0][:120]) or "it ends too early"
    if isinstance(error, MemoryError) or "can't allocate memory" in text:
        reason = "it claims more memory than there is"
    return f"cannot be read ({reason}): it is damaged, not complete, or no file of weights; copy it again"


def _printable(text: str) -> str:
    return "".join(each if each.isprintable() else "?" for each in text)


def refuse_bad_tensors(state: Mapping[str, Tensor], what: str) -> None:
    """Raise a `UserError` that names a tensor which is no array of finite numbers in memory.

    Args:
        what: the file, as the message begins.
    """
    for name, each in state.items():
        if not name.isprintable():
            raise UserError(f"{what} is damaged: it names a tensor {name!r}; copy it again from where it was made")
        if each.layout is not torch.strided or each.is_meta or each.is_quantized or each.is_nested:
            raise UserError(f"{what} holds '{name}', which is no plain tensor; save its weights dense, in fp32 or fp16")
        if each.is_floating_point() and not (finite := each.float().isfinite()).all():
            count = int((~finite).sum())
            raise UserError(
                f"{what} is damaged: {count} of {each.numel()} values of '{name}' are not finite; copy it again from "
                "where it was made"
            )


class _Claimed:
    """A `map_location` that leaves tensors where they are, on the CPU, and adds up the bytes that they claim.

    It is asked before anything is read into the memory of a tensor.

    Args:
        most: bytes that there are.
    """

    def __init__(self, most: int) -> None:
        self.most, self.total = most, 0

    def __call__(self, storage: Any, _: str) -> Any:
        self.total += storage.nbytes()
        if self.total > self.most:
            raise ValueError(f"its tensors claim {self.total} bytes and more, and it has {self.most}")
        return storage


def _data_in(file: IO[bytes], size: int) -> int:
    """Bytes of the tensors in a zip whose parts are stored as they are and have the checksum that stands beside them.

    Raises:
        ValueError: they are compressed, claim to be larger than the file, or are damaged.
    """
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if any(each.compress_type != zipfile.ZIP_STORED for each in members):
            raise ValueError("its parts are compressed, which torch.save never does")
        if sum(each.file_size for each in members) > size:
            raise ValueError("its parts claim to be larger than the file")
        # Torch can be told to leave all checksums at 0.
        if any(each.CRC for each in members) and (bad := archive.testzip()):
            raise ValueError(f"the checksum of its part '{bad}' is wrong")
        return sum(each.file_size for each in members if PART.search(each.filename))
