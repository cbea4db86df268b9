"""Pre-trained weights: where files are found or downloaded, which files may be opened, and how they are loaded.

timm downloads its own weights, see `TimmBackbone.create`.
"""

import hashlib
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tailtune.configs.errors import UserError
from tailtune.configs.lazy_module import lazy_module
from tailtune.models.backbones.safe_torch_load import (
    READ_ERRORS,
    State,
    explain_read_error,
    refuse_bad_tensors,
    safe_torch_load,
)

hub = lazy_module("huggingface_hub")
open_clip = lazy_module("open_clip")

WRAPPERS = ("state_dict", "model")
"""Keys under which timm, open_clip and others save the state dict."""
LONGEST_HEADER = 4 * 2**20
"""Bytes of the longest safetensors header that is read. Those of the largest networks have a fifth of a megabyte."""


def is_path(pretrained: str) -> bool:
    """Whether the option `pretrained` names a file rather than a tag."""
    return "/" in pretrained or pretrained.endswith((".pt", ".pth", ".tar", ".ckpt", ".bin", ".safetensors"))


def local_file(path: str) -> Path:
    """The file that the option `pretrained` names.

    Raises:
        UserError: there is no such file.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"pretrained: the weights file '{path}' does not exist")
    return file


@cache
def _is_reachable(url: str) -> bool:
    """Whether a server answers at all, be it with an error."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=10):
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False


@contextmanager
def hub_or_cache() -> Iterator[None]:
    """Within this block Hugging Face's client uses only its cache if the hub cannot be reached.

    Otherwise the client would retry for a minute and print a line each time.
    """
    before = hub.constants.HF_HUB_OFFLINE
    hub.constants.HF_HUB_OFFLINE = before or not _is_reachable(hub.constants.ENDPOINT)
    try:
        yield
    finally:
        hub.constants.HF_HUB_OFFLINE = before


def download_open_clip_weights(arch: str, tag: str, source: dict[str, Any]) -> Path:
    """The weights file of an open_clip tag, from the cache or downloaded: first from the hub, then the original URL.

    Args:
        arch: open_clip's model name.
        tag: open_clip's tag of the weights.
        source: open_clip's entry for the two.

    Raises:
        UserError: the file is not here and cannot be downloaded.
    """
    for from_hub in (True, False):
        try:
            with hub_or_cache() if from_hub else nullcontext():
                file = open_clip.pretrained.download_pretrained(source, prefer_hf_hub=from_hub)
        except (OSError, hub.errors.HfHubHTTPError, RuntimeError):
            continue  # offline, or not on this server: try the next one
        if file:
            return Path(file)
    url = source.get("url") or f"https://huggingface.co/{source['hf_hub'].rstrip('/')}"
    cache = f" and put it at ~/.cache/clip/{url.rsplit('/', 1)[-1]}" if source.get("url") else ""
    raise UserError(
        f"the weights '{tag}' of {arch} are not here and cannot be downloaded: get {url}{cache}, "
        "or name a local file with `pretrained /path/to/file`; `pretrained none` runs with random weights"
    )


def read_state(path: Path) -> State:
    """Read a weights file: safetensors, a pickle of tensors alone, or one of OpenAI's TorchScript archives.

    A TorchScript archive can run code, so it is opened only if its SHA-256 is one that OpenAI published.

    Args:
        path: the file.

    Returns:
        Name → tensor, fp32 where floating, without DataParallel's prefix `module.`.

    Raises:
        UserError: the file is damaged, holds something else than a state dict, or numbers that are not finite.
    """
    what = f"the weights file '{path}'"
    try:
        state = _read(path)
    except READ_ERRORS as error:
        raise UserError(f"{what} {explain_read_error(path, error)}") from error
    for wrapper in WRAPPERS:
        state = state.get(wrapper, state) if isinstance(state, dict) else state
    if not isinstance(state, dict):
        raise UserError(f"{what} holds no state dict (name → tensor) but a {type(state).__name__}")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            kind = type(value).__name__
            raise UserError(f"{what} holds no state dict (name → tensor): its entry {name!r} is a {kind}")
    refuse_bad_tensors(state, what)
    return {
        name.removeprefix("module."): value.float() if value.is_floating_point() else value
        for name, value in state.items()
    }


def _read(path: Path) -> Any:
    """The content of a file of one of the three kinds."""
    if path.suffix == ".safetensors":
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
        if length > min(LONGEST_HEADER, path.stat().st_size):
            raise ValueError(f"its header claims {length} bytes")
        return load_file(path)
    return _read_openai_archive(path) if _is_torchscript(path) else safe_torch_load(path)


def to_open_clip_layout(clip: Any, state: State) -> State:
    """Rename the tensors of an older or foreign file as open_clip names them now, the way its own loader does.

    Args:
        clip: open_clip's model, which the file is for.
        state: the file's state dict.
    """
    state = dict(open_clip.convert.convert_state_dict(clip, state))
    if not hasattr(clip, "positional_embedding"):  # the text encoder is a submodule of its own
        state = open_clip.model.convert_to_custom_text_state_dict(state)
    current = clip.state_dict()
    for name in {"logit_scale", "logit_bias"} & state.keys() & current.keys():  # some files save these as [1]
        if state[name].numel() == current[name].numel():
            state[name] = state[name].reshape(current[name].shape)
    return {name: tensor for name, tensor in state.items() if name in current or not name.endswith("position_ids")}


def mismatch_error(what: str, path: Path, missing: list[str], unexpected: list[str], shapes: list[str]) -> UserError:
    """The error that says in one line how a file differs from an architecture.

    Args:
        what: the architecture.
        path: the file.
        missing: names of tensors that the file does not have.
        unexpected: names of tensors that the architecture does not have.
        shapes: names of tensors of another shape.
    """
    differences = [
        f"{len(names)} {kind} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if names
    ]
    return UserError(f"the weights file '{path}' is not of {what}: {'; '.join(differences)}")


def load_strict(module: torch.nn.Module, state: State, what: str, path: Path) -> None:
    """Load a state dict into a module if every tensor fits.

    Args:
        module: the module to fill.
        state: name → tensor.
        what: the architecture, in messages.
        path: the file, in messages.

    Raises:
        UserError: tensors that are missing, unexpected or of another shape.
    """
    current = module.state_dict()
    missing = [name for name in current if name not in state]
    unexpected = [name for name in state if name not in current]
    shapes = [name for name in current if name in state and current[name].shape != state[name].shape]
    if missing or unexpected or shapes:
        raise mismatch_error(what, path, missing, unexpected, shapes)
    module.load_state_dict(state)


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("constants.pkl") for name in archive.namelist())


def _read_openai_archive(path: Path) -> State:
    """The state dict of a TorchScript archive, if OpenAI published it."""
    published = {
        tags["openai"]["url"].split("/")[-2]  # open_clip's URLs contain the SHA-256
        for tags in open_clip.pretrained._PRETRAINED.values()
        if "openaipublic" in tags.get("openai", {}).get("url", "")
    }
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest not in published:
        raise UserError(
            f"the weights file '{path}' is a TorchScript archive but none that OpenAI published (SHA-256 "
            f"{digest[:12]}…); such a file can run code, so it is not opened: convert it to safetensors"
        )
    state = torch.jit.load(path, map_location="cpu").state_dict()
    settings = ("input_resolution", "context_length", "vocab_size")  # stored as tensors too
    return {name: tensor for name, tensor in state.items() if name not in settings}
