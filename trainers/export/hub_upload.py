"""Uploads the folder of `export hub` to the Hugging Face Hub (`push_to_hub`)."""

import json
from pathlib import Path

from tailtune.configs.errors import UserError, printable
from tailtune.configs.lazy_module import lazy_module
from tailtune.trainers.storage.atomic_io import FACTS

hub = lazy_module("huggingface_hub")


def check_push(repository: str) -> None:
    """Check everything that can be checked without the network.

    Args:
        repository: USER/NAME.

    Raises:
        UserError: it is no name of a repository, or nobody is logged in.
    """
    try:
        hub.utils.validate_repo_id(repository)
        complete = repository.count("/") == 1
    except ValueError:
        complete = False
    if not complete:
        raise UserError(f"push_to_hub {printable(repository)}: give the name of a repository, USER/NAME")
    if hub.get_token() is None:
        raise UserError("push_to_hub: you are not logged in; run `hf auth login`, or set HF_TOKEN to an access token")


def upload_errors() -> tuple[type[BaseException], ...]:
    """The exceptions of the Hub's client, and of the HTTP library that it uses, such as those without a network.

    Not all of the library's are an `OSError`, and the library differs between the versions of the client. The client's
    own exception is derived from the common base of the library's.
    """
    return OSError, ValueError, *hub.errors.HfHubHTTPError.__bases__


def push(folder: Path, repository: str) -> str:
    """Upload an exported folder. A new repository is private; an existing one keeps its visibility.

    Args:
        folder: folder of the export. Only the files that facts.json lists are uploaded.
        repository: USER/NAME.

    Returns:
        A report in words.

    Raises:
        UserError: the Hub refuses, or cannot be reached. The exported folder stays.
    """
    api, facts = hub.HfApi(), json.loads((folder / FACTS).read_text(encoding="utf-8"))
    try:
        url = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=[*facts["files"], FACTS],  # other files in the folder are the user's
            commit_message="Model exported by TailTune",
        )
    except upload_errors() as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"push_to_hub {repository}: {reason}; {folder} is complete, so repeat the command") from error
    return f"uploaded to {url}"
