"""Uploading an export to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.constants import HF_HUB_OFFLINE
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from sparsellm_lightning.errors import UserError


def check_hub(repo: str) -> None:
    """Refuse, before any long work, a repository that an export could not be uploaded to at the end.

    Raises:
        UserError: the name is not valid, the hub is switched off, or nobody is logged in.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(
            f"push_to_hub must be the id of a repository, such as name/model-70, got {repo!r}: {error}"
        ) from error
    if HF_HUB_OFFLINE:
        raise UserError("push_to_hub needs the hub, but HF_HUB_OFFLINE is set. Unset it, or leave push_to_hub out.")
    if get_token() is None:
        raise UserError(
            "push_to_hub needs a token of the hub, but there is none. Run `hf auth login`, or set HF_TOKEN."
        )


def upload(folder: Path, repo: str) -> str:
    """Upload an export. A new repository is private. Returns the address of the commit.

    Raises:
        UserError: the hub refused it. The folder stays.
    """
    api = HfApi()
    try:
        full = api.create_repo(repo, private=True, exist_ok=True).repo_id  # with the user's name, if that was left out
        commit = api.upload_folder(repo_id=full, folder_path=folder, commit_message="Pruned by sparsellm_lightning")
    except Exception as error:  # network, rights, quota
        raise UserError(
            f"push_to_hub {repo} failed ({error}). The model is in {folder}: `hf upload {repo} {folder}` tries again."
        ) from error
    return str(commit.commit_url)
