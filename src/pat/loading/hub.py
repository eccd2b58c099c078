"""Ask the hub once whether it has a model: the libraries would try again for a minute where it cannot be reached."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from typing import Any

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, is_offline_mode, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers.utils import CONFIG_NAME

from pat.errors import PatError, one_line
from pat.paths import near

logger = logging.getLogger(__name__)

_ALL = ("", None)
_FROM_CACHE: set[tuple[str, str | None]] = set()
"""Models and revisions that this process takes from the cache without asking again; `_ALL` once nobody answered."""


def hub_options(
    name_or_path: str, revision: str | None = None, *, files: Sequence[str] = (CONFIG_NAME,)
) -> dict[str, Any]:
    """Return what to tell `from_pretrained` of the hub: to do without it, where it cannot be reached.

    Nothing is asked for a folder, or in offline mode (HF_HUB_OFFLINE=1). Otherwise it is one request, which waits for
    HF_HUB_ETAG_TIMEOUT seconds (10) at most. Where nobody answers, or the hub does not have or show a model any more,
    a model in the cache is taken from there, a line is logged, and the process does not ask again. What is not in the
    cache is always asked for, so that it can be had once the network is back.

    Args:
        name_or_path: folder or hub id.
        revision: of the model on the hub.
        files: files of which one in the cache means that the model is there.

    Raises:
        PatError: it is not in the cache of this machine, and the hub has no such model, does not show it, or cannot be
            reached.
    """
    if os.path.isdir(name_or_path):
        return {}
    try:
        found = [try_to_load_from_cache(name_or_path, file, revision=revision) for file in files]
    except HFValidationError:  # no id of the hub, which the libraries say in one line, and at once
        return {}
    is_cached = any(isinstance(path, str) for path in found)
    meant = near(name_or_path, folder=True)
    start = f"Got the model {name_or_path!r}, but there is no such folder{meant}"
    at = "" if revision in (None, "main") else f" at revision {revision!r}"
    short = f"{start}, and no such model in the hub's cache or on the hub that could be reached."
    missing = f"{start}, it is not in the hub's cache on this machine{at}, and the hub"
    if is_offline_mode():
        if is_cached:
            return {}
        why = "is not asked in offline mode (HF_HUB_OFFLINE=1); pass a model folder, or unset HF_HUB_OFFLINE."
        raise PatError(short if meant else f"{missing} {why}")
    model = (name_or_path, revision)
    if is_cached and _FROM_CACHE & {_ALL, model}:
        return {"local_files_only": True}
    try:
        _ask(name_or_path, revision)
    except HfHubHTTPError as error:
        if not isinstance(error, RepositoryNotFoundError | RevisionNotFoundError):
            return {}  # a busy hub is worth the libraries' trying again
        if is_cached:
            _FROM_CACHE.add(model)
            logger.warning(
                "The hub has no model %r%s any more, or does not show it to you; its copy in the cache is used.",
                name_or_path,
                at,
            )
            return {"local_files_only": True}
        if isinstance(error, GatedRepoError):
            reason = "the hub shows it only to those who have been given access; ask for that on its page there, and"
        else:
            reason = f"the hub has no such model{at}, or does not show it to you; check the name, or"
        raise PatError(f"{start}, and {reason} log in (hf auth login).") from error
    except Exception as error:  # whatever its HTTP client raises: no network, no such host, a proxy, a certificate
        detail = f"at {constants.ENDPOINT} ({one_line(error) or type(error).__name__})"
        if is_cached:
            _FROM_CACHE.add(_ALL)
            logger.warning("The hub cannot be reached %s; models in the cache are taken from there.", detail)
            return {"local_files_only": True}
        why = f"cannot be reached {detail}; pass a model folder, or go online. Models in the cache need no network "
        why += "(HF_HUB_OFFLINE=1 asks for none)."
        raise PatError(short if meant else f"{missing} {why}") from error
    return {}


def weights_options(name_or_path: str, revision: str | None = None) -> dict[str, Any]:
    """Return what to tell `from_pretrained` of an auto class of models, which looks for an adapter by other options.

    Raises:
        PatError: see `hub_options`.
    """
    hub = hub_options(name_or_path, revision)
    return {**hub, "adapter_kwargs": dict(hub)} if hub else {}


@cache
def _ask(name: str, revision: str | None) -> None:
    """Ask for the head of a model's configuration, once a process if there is one; errors are not remembered."""
    with suppress(RemoteEntryNotFoundError):  # a tokenizer, or an adapter, by itself
        get_hf_file_metadata(hf_hub_url(name, CONFIG_NAME, revision=revision))
    _FROM_CACHE.discard(_ALL)  # the network is back
