"""`safe_torch_load`: opens a file of torch.save without running code in it or trusting the sizes that it claims."""

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
"""What safetensors, zipfile and `safe_torch_load` raise for files that hold no weights, or only part of them."""
UNPICKLING_ERRORS = (LookupError, TypeError, AttributeError, AssertionError, struct.error)
"""What torch's restricted unpickler raises besides, for damaged instructions."""
ZIP_MAGIC = b"PK\x03\x04"
"""First bytes of a file of torch.save; before torch 1.6 it wrote several pickles in a row instead."""

TENSOR_MEMBER = re.compile(r"^[^/]+/data/[^/]+$")
"""Name of a zip member that holds the numbers of a tensor: `<file>/data/<key>`."""

STATE_DICT_OF_SAVED = "s.get('state_dict', s.get('model', s))"
"""Python expression for the state dict within a saved object `s`."""


def safe_torch_load(path: Path) -> Any:
    """Read a file of torch.save: tensors, and containers, numbers and strings around them.

    Args:
        path: the file.

    Returns:
        The saved object, with its tensors on the CPU.

    Raises:
        READ_ERRORS: the file is damaged, holds other objects, or claims more bytes than it has.
    """
    with path.open("rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about other kinds of pickle, which a damaged file may look like
        size = path.stat().st_size
        if file.read(len(ZIP_MAGIC)) == ZIP_MAGIC:
            budget = _ByteBudget(_tensor_bytes(file, size))
            # mmap makes torch check the size of each member; else it reads past the end of one that is too short.
            content = _unpickle(str(path), map_location=budget, mmap=True)
            if budget.claimed != budget.available:
                raise ValueError(f"its tensors claim {budget.claimed} bytes, and its parts have {budget.available}")
            return content
        file.seek(0)
        content = _unpickle(file, map_location=_ByteBudget(size))
        if file.read(1):
            raise ValueError("it has more bytes than its tensors need")
        return content


def _unpickle(file: Any, **options: Any) -> Any:
    try:
        return torch.load(file, weights_only=True, **options)
    except UNPICKLING_ERRORS as error:
        raise pickle.UnpicklingError("its parts do not fit together") from error


def explain_read_error(path: Path, error: Exception, keep: str = STATE_DICT_OF_SAVED) -> str:
    """Explain why a file could not be read, and what to do.

    Args:
        path: the file.
        error: one of READ_ERRORS.
        keep: Python expression for what to save again of a file that holds more than tensors; `s` is its content.

    Returns:
        The end of a sentence that begins with the name of the file.
    """
    # Torch names the class that it refuses as GLOBAL, after its advice to unpickle the file in spite of it.
    if refused := re.search(r"GLOBAL (\S+)", str(error)):
        save, load = "torch.save", "torch.load"  # the user runs these; nothing here does
        content = f"s = {load}('{path.name}', map_location='cpu', weights_only={False})"
        state = "s = s if isinstance(s, dict) else s.state_dict()"  # if it is a whole network
        cause = f"holds {_printable(refused[1])}, and nothing but tensors is unpickled, because it can run code"
        script = f"import torch; {content}; {state}; {save}({keep}, 'weights.pth')"
        return f'{cause}: where it was made, run python -c "{script}"'
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read: {error.strerror}"
    text = str(error).rpartition("WeightsUnpickler error:")[2].partition("In PyTorch 2.6")[0]  # drops torch's advice
    reason = _printable(text.strip().split("\n", 1)[0][:120]) or "it ends too early"
    if isinstance(error, MemoryError) or "can't allocate memory" in text:
        reason = "it claims more memory than there is"
    return f"cannot be read ({reason}): it is damaged, not complete, or no file of weights; copy it again"


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in text)


def refuse_bad_tensors(state: Mapping[str, Tensor], what: str) -> None:
    """Refuse tensors that are not dense, not in memory or not finite.

    Args:
        state: name → tensor.
        what: the file, as the message begins.

    Raises:
        UserError: names the first such tensor.
    """
    for name, tensor in state.items():
        if not name.isprintable():
            raise UserError(f"{what} is damaged: it names a tensor {name!r}; copy it again from where it was made")
        if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized or tensor.is_nested:
            raise UserError(f"{what} holds '{name}', which is no plain tensor; save its weights dense, in fp32 or fp16")
        if tensor.is_floating_point() and not (finite := tensor.float().isfinite()).all():
            count = int((~finite).sum())
            raise UserError(
                f"{what} is damaged: {count} of {tensor.numel()} values of '{name}' are not finite; copy it again from "
                "where it was made"
            )


class _ByteBudget:
    """A `map_location` that keeps tensors on the CPU and adds up the bytes that they claim.

    Torch calls it before it reads the numbers of a tensor into memory.

    Args:
        available: bytes that the file has.
    """

    def __init__(self, available: int) -> None:
        self.available, self.claimed = available, 0

    def __call__(self, storage: Any, _: str) -> Any:
        self.claimed += storage.nbytes()
        if self.claimed > self.available:
            raise ValueError(f"its tensors claim {self.claimed} bytes and more, and it has {self.available}")
        return storage


def _tensor_bytes(file: IO[bytes], size: int) -> int:
    """How many bytes the tensors in a zip file have.

    Args:
        file: the zip file.
        size: its size in bytes.

    Raises:
        ValueError: its members are compressed, claim to be larger than the file, or do not have their checksum.
    """
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise ValueError("its parts are compressed, which torch.save never does")
        if sum(member.file_size for member in members) > size:
            raise ValueError("its parts claim to be larger than the file")
        # Torch can be told to write 0 for every checksum.
        if any(member.CRC for member in members) and (bad := archive.testzip()):
            raise ValueError(f"the checksum of its part '{bad}' is wrong")
        return sum(member.file_size for member in members if TENSOR_MEMBER.search(member.filename))
