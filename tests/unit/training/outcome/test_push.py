"""`--push_to_hub` pushes the finished model, and the hub's refusals are ours."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import LocalTokenNotFoundError

from pat.errors import PatError, RunFailed
from pat.training.arguments import TuneArguments, build_arguments
from pat.training.outcome.push import open_repository, push


def arguments(**flags: Any) -> TuneArguments:
    return build_arguments(model_name_or_path="base", dataset_name="d.jsonl", output_dir="runs/small", **flags)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None, dict[str, Any]]]:
    """Have the hub's interface note what it is asked for."""
    noted: list[tuple[str, str | None, dict[str, Any]]] = []
    for name in ("create_repo", "create_branch", "upload_folder"):

        def note(self: HfApi, name: str = name, **options: Any) -> Any:
            noted.append((name, self.token, options))
            return SimpleNamespace(repo_id=f"me/{options['repo_id']}")

        monkeypatch.setattr(HfApi, name, note)
    return noted


def test_nothing_is_asked_of_the_hub_without_the_flag(calls: list[Any]) -> None:
    assert open_repository(arguments(hub_model_id="me/other")) is None
    assert calls == []


def test_the_trainers_push_nothing() -> None:
    assert arguments(push_to_hub=True).sft.push_to_hub is False


def test_the_model_goes_to_a_repository_named_like_the_folder(calls: list[Any]) -> None:
    given = arguments(push_to_hub=True)
    repository = open_repository(given)
    assert repository == "me/small"
    push(given, repository, Path("runs/small/model"))
    assert [call[0] for call in calls] == ["create_repo", "upload_folder"]
    assert calls[1][2]["repo_id"] == "me/small" and calls[1][2]["folder_path"] == Path("runs/small/model")


def test_name_token_privacy_and_revision_are_heeded(calls: list[Any]) -> None:
    flags = {"hub_model_id": "tiny", "hub_token": "t", "hub_private_repo": True, "hub_revision": "v2"}
    given = arguments(push_to_hub=True, **flags)
    push(given, open_repository(given) or "", Path("model"))
    assert [token for _, token, _ in calls] == ["t"] * 3
    assert calls[0][2] == {"repo_id": "tiny", "private": True, "exist_ok": True}
    assert calls[1][2] == {"repo_id": "me/tiny", "branch": "v2", "exist_ok": True}
    assert calls[2][2]["revision"] == "v2"


def test_what_the_hub_refuses_is_bad_input_before_the_run_and_a_failure_after_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(self: HfApi, **options: Any) -> None:
        raise LocalTokenNotFoundError("no token")

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    monkeypatch.setattr(HfApi, "upload_folder", refuse)
    with pytest.raises(PatError, match=r"'small' cannot be made on the hub \(no token\)") as refusal:
        open_repository(arguments(push_to_hub=True))
    assert refusal.value.exit_status == 2
    with pytest.raises(RunFailed, match=r"hf upload me/small model"):
        push(arguments(push_to_hub=True), "me/small", Path("model"))
