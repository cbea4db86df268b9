"""Pre-trained weight files: where they are, how they are fetched, and what may be opened."""

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
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError
from open_clip.convert import convert_state_dict
from open_clip.model import convert_to_custom_text_state_dict
from open_clip.pretrained import _PRETRAINED, download_pretrained
from safetensors.torch import load_file
from torch import Tensor

from tailtune.configs.errors import UserError
from tailtune.models.backbones.safe_torch_load import (
    READ_ERRORS,
    State,
    explain_read_error,
    refuse_bad_tensors,
    safe_torch_load,
)

WRAPPERS = ("state_dict", "model")
"""Where timm, open_clip and others put the state dict in what they save."""
LONGEST_HEADER = 4 * 2**20
"""Bytes of a safetensors header; those of the largest networks have a fifth of a megabyte."""


def is_path(pretrained: str) -> bool:
    """Whether the option names a file rather than a tag."""
    return "/" in pretrained or pretrained.endswith((".pt", ".pth", ".tar", ".ckpt", ".bin", ".safetensors"))


def local_file(path: str) -> Path:
    found = Path(path).expanduser()
    if not found.is_file():
        raise UserError(f"pretrained: the weights file '{path}' does not exist")
    return found


@cache
def _reachable(url: str) -> bool:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=10):
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False


@contextmanager
def hub() -> Iterator[None]:
    """For calls to Hugging Face's client: without network it is told so, and answers from its cache or not at all.

    Left alone it would retry for a minute, and say so line by line.
    """
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not _reachable(constants.ENDPOINT)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def fetch(arch: str, tag: str, source: dict[str, Any]) -> Path:
    """The file of an open_clip tag, from its cache or the network (Hugging Face first, then the original URL)."""
    for from_hub in (True, False):
        try:
            with hub() if from_hub else nullcontext():
                found = download_pretrained(source, prefer_hf_hub=from_hub)
        except (OSError, HfHubHTTPError, RuntimeError):
            continue  # offline, or this mirror has not got it: the next one, then the error below
        if found:
            return Path(found)
    url = source.get("url") or f"https://huggingface.co/{source['hf_hub'].rstrip('/')}"
    place = f" and put it at ~/.cache/clip/{url.rsplit('/', 1)[-1]}" if source.get("url") else ""
    raise UserError(
        f"the weights '{tag}' of {arch} are not here and cannot be downloaded: get {url}{place}, "
        "or name a local file with `pretrained /path/to/file`; `pretrained none` runs with random weights"
    )


def read_state(path: Path) -> State:
    """Name → tensor (fp32 where floating) from safetensors, a `weights_only` pickle, or OpenAI's TorchScript.

    A TorchScript archive can run code, so it is opened only if its SHA-256 is one that OpenAI published.

    Raises:
        UserError: it is damaged, holds anything else than a state dict, or numbers that are not finite.
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
    if path.suffix == ".safetensors":
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
        if length > min(LONGEST_HEADER, path.stat().st_size):
            raise ValueError(f"its header claims {length} bytes")
        return load_file(path)
    return _read_openai(path) if _is_torchscript(path) else safe_torch_load(path)


def to_open_clip_layout(clip: Any, state: State) -> State:
    """Published files of older or other layouts under open_clip's present names, as its own loader reads them."""
    state = dict(convert_state_dict(clip, state))
    if not hasattr(clip, "positional_embedding"):  # the text tower is a module of its own
        state = convert_to_custom_text_state_dict(state)
    own = clip.state_dict()
    for name in {"logit_scale", "logit_bias"} & state.keys() & own.keys():  # some are saved as [1]
        if state[name].numel() == own[name].numel():
            state[name] = state[name].reshape(own[name].shape)
    return {name: each for name, each in state.items() if name in own or not name.endswith("position_ids")}


def explain_mismatch(what: str, path: Path, missing: list[str], unexpected: list[str], shapes: list[str]) -> UserError:
    """One line that says how a file differs from the architecture."""
    parts = [
        f"{len(each)} {kind} ({', '.join(each[:3])}{', …' if len(each) > 3 else ''})"
        for kind, each in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if each
    ]
    return UserError(f"the weights file '{path}' is not of {what}: {'; '.join(parts)}")


def load_strict(module: torch.nn.Module, state: State, what: str, path: Path) -> None:
    """`load_state_dict`, or a `UserError` that names what does not fit."""
    own = module.state_dict()
    missing = [name for name in own if name not in state]
    unexpected = [name for name in state if name not in own]
    shapes = [name for name in own if name in state and own[name].shape != state[name].shape]
    if missing or unexpected or shapes:
        raise explain_mismatch(what, path, missing, unexpected, shapes)
    module.load_state_dict(state)


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("constants.pkl") for name in archive.namelist())


def _read_openai(path: Path) -> State:
    published = {
        each["openai"]["url"].split("/")[-2]
        for each in _PRETRAINED.values()
        if "openaipublic" in each.get("openai", {}).get("url", "")
    }
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest not in published:
        raise UserError(
            f"the weights file '{path}' is a TorchScript archive but none that OpenAI published (SHA-256 "
            f"{digest[:12]}…); such a file can run code, so it is not opened: convert it to safetensors"
        )
    state = torch.jit.load(path, map_location="cpu").state_dict()
    return {k: v for k, v in state.items() if k not in ("input_resolution", "context_length", "vocab_size")}
