"""`--push_to_hub`: the finished model, under the name that the trainers' flags give it."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

from pat.errors import PatError, RunFailed, one_line
from pat.training.arguments import TuneArguments

_FAILURES = (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled, OSError)


def open_repository(arguments: TuneArguments) -> str | None:
    """Create the repository that the model will be pushed to, unless it exists; None without `--push_to_hub`.

    Raises:
        PatError: the hub does not let it be created.
    """
    sft = arguments.sft
    if not arguments.run.push_to_hub:
        return None
    name = sft.hub_model_id or arguments.output_dir.resolve().name
    api = HfApi(token=arguments.run.hub_token)
    try:
        repository: str = api.create_repo(repo_id=name, private=sft.hub_private_repo, exist_ok=True).repo_id
        if sft.hub_revision not in (None, "main"):
            api.create_branch(repo_id=repository, branch=sft.hub_revision, exist_ok=True)
    except _FAILURES as error:
        reason = one_line(error)
        raise PatError(
            f"Got push_to_hub, but the repository {name!r} cannot be made on the hub ({reason}); log in with "
            "`hf auth login`, give --hub_token and --hub_model_id, or leave the flag out."
        ) from error
    return repository


def push(arguments: TuneArguments, repository: str, folder: Path) -> None:
    """Push a finished model.

    Raises:
        RunFailed: the hub does not take it; it stays where it is.
    """
    api = HfApi(token=arguments.run.hub_token)
    try:
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            revision=arguments.sft.hub_revision,
            commit_message="The tuned and pruned model",
        )
    except _FAILURES as error:
        reason = one_line(error)
        raise RunFailed(
            f"The run is finished, but pushing failed ({reason}); push it with `hf upload {repository} {folder}`."
        ) from error
