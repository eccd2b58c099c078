"""Ask the hub once whether it has a model: the libraries would try again for a minute where it cannot be reached."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, is_offline_mode, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers.utils import CONFIG_NAME

from pat.errors import PatError, one_line
from pat.paths import near


def hub_options(name_or_path: str, revision: str | None = None) -> dict[str, Any]:
    """Return what to tell `from_pretrained` of the hub: to do without it, where it cannot be reached.

    Nothing is asked for a folder, or in offline mode (HF_HUB_OFFLINE=1). Otherwise it is one request, which waits for
    HF_HUB_ETAG_TIMEOUT seconds (10) at most; where nobody answers, a model in the cache is taken from there.

    Args:
        name_or_path: folder or hub id.
        revision: of the model on the hub.

    Raises:
        PatError: it is not in the cache of this machine, and the hub has no such model, does not show it, or cannot be
            reached.
    """
    if os.path.isdir(name_or_path):
        return {}
    try:
        is_cached = isinstance(try_to_load_from_cache(name_or_path, CONFIG_NAME, revision=revision), str)
    except HFValidationError:  # no id of the hub, which the libraries say in one line, and at once
        return {}
    start = f"Got the model {name_or_path!r}, but there is no such folder{near(name_or_path, folder=True)}"
    at = "" if revision in (None, "main") else f" at revision {revision!r}"
    missing = f"{start}, it is not in the hub's cache on this machine{at}, and the hub"
    if is_offline_mode():
        if is_cached:
            return {}
        raise PatError(f"{missing} is not asked in offline mode (HF_HUB_OFFLINE=1); pass a model folder, or leave it.")
    try:
        _ask(name_or_path, revision)
    except HfHubHTTPError as error:
        if is_cached or not isinstance(error, RepositoryNotFoundError | RevisionNotFoundError):
            return {}  # the libraries say which file is missing, and a busy hub is worth their trying again
        if isinstance(error, GatedRepoError):
            reason = "the hub shows it only to those who have been given access; ask for that on its page there"
        else:
            reason = f"the hub has no such model{at}, or does not show it to you; check the name"
        raise PatError(f"{start}, and {reason}, and log in (hf auth login).") from error
    except Exception as error:  # whatever its HTTP client raises: no network, no such host, a proxy, a certificate
        if is_cached:
            return {"local_files_only": True}
        raise PatError(
            f"{missing} cannot be reached at {constants.ENDPOINT} ({one_line(error) or type(error).__name__}); pass a "
            "model folder, or go online. Models in the cache need no network (HF_HUB_OFFLINE=1 asks for none)."
        ) from error
    return {}


@cache
def _ask(name: str, revision: str | None) -> None:
    """Ask for the head of a model's configuration, once a process if there is one; errors are not remembered."""
    get_hf_file_metadata(hf_hub_url(name, CONFIG_NAME, revision=revision))
