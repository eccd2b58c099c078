"""`pat evaluate`: a dense checkpoint, and a PAT adapter through its base, on text, on instruction data and on tasks."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import VOCAB_SIZE, build, fill_hub_cache, tiny_tokenizer
from tiny_training import attach, tuner_of
from tokenizers.normalizers import Strip
from transformers import AutoModelForCausalLM

from pat.data.examples import prepare_examples
from pat.data.vocabulary import Vocabulary
from pat.errors import PatError
from pat.evaluation.command import EvaluationRecord, print_evaluation, run_evaluate
from pat.evaluation.options import EvaluateOptions
from pat.nll import response_nll, text_perplexity

TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. " * 3
ROWS = [{"prompt": f"Say {word}: ", "completion": word} for word in ("yes", "no", "perhaps", "not at all")]

EXACT = 1e-6
"""Two ways to the same figure differ by the order in which float32 logits of a batch are computed."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base model, a hardened adapter, its merged model, a text and data."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("evaluate")
    build("llama", tied=True).save_pretrained(folder / "base")
    tokenizer = tiny_tokenizer(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    masked = attach(base, rotation="none")
    with torch.no_grad():
        for name, parameter in masked.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    tuner_of(masked).set_step(1, 1)
    masked.save_pretrained(folder / "adapter")
    masked.merge_and_unload().save_pretrained(folder / "dense")
    tokenizer.save_pretrained(folder / "dense")
    (folder / "text.txt").write_text(TEXT)
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder


def run(folder: Path, model: str, **options: Any) -> EvaluationRecord:
    sources = {"text_file": folder / "text.txt", "dataset_name": str(folder / "data.jsonl")}
    return run_evaluate(EvaluateOptions(str(folder / model), **sources | {"max_length": 64} | options))


def test_a_checkpoints_figures_are_those_of_the_library(folder: Path) -> None:
    record = run(folder, "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    tokenizer = tiny_tokenizer()
    text = text_perplexity(model, tokenizer, TEXT, context=64)
    vocabulary = Vocabulary(tokenizer, VOCAB_SIZE)
    examples, data = prepare_examples(str(folder / "data.jsonl"), vocabulary, template="auto", max_length=64)
    responses = response_nll(model, examples, batch_size=4, pad_token_id=0)
    assert record.text is not None and record.responses is not None
    for figures, expected in ((record.text, text), (record.responses, responses)):
        assert figures.num_tokens == expected.num_tokens
        assert figures.nll == pytest.approx(expected.nll, rel=EXACT)
        assert figures.standard_error == pytest.approx(expected.standard_error, rel=1e-4)
        assert figures.perplexity == pytest.approx(math.exp(expected.nll))
    assert record.data == data
    assert (record.base_model, record.mask) == (None, None)
    assert record.num_parameters == sum(p.numel() for p in model.parameters())


def test_rows_beyond_the_models_positions_are_told_of(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "long.jsonl"
    file.write_text(json.dumps({"prompt": "a", "completion": " b" * 80}) + "\n")
    said = "1 of 1 examples are longer than the 128 positions"
    for max_length, told in ((512, True), (128, False)):
        record = run(folder, "base", text_file=None, dataset_name=str(file), max_length=max_length)
        assert any(said in line for line in record.warnings) == told


def test_an_adapter_gives_the_figures_of_its_merged_model_and_not_of_its_base(folder: Path) -> None:
    base, masked, dense = (run(folder, name) for name in ("base", "adapter", "dense"))
    assert masked.base_model == "base" and masked.mask == "hard"
    for figure in ("text", "responses"):
        values = [getattr(record, figure).nll for record in (base, masked, dense)]
        assert values[1] == pytest.approx(values[2], abs=1e-4)  # the parity that the merge promises
        assert abs(values[0] - values[1]) > 1e-2


def test_an_adapter_is_measured_on_the_revision_that_it_was_trained_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(folder / "adapter", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "a/b", "revision": "first"}))
    fill_hub_cache(tmp_path / "hub", "a/b", main=folder / "dense", first=folder / "base")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    options: dict[str, Any] = {"text_file": folder / "text.txt", "dataset_name": None}
    found = run(tmp_path, "adapter", **options)
    assert found.text == run(folder, "adapter", **options).text and found.base_model == "a/b"


def test_an_adapter_before_its_milestone_says_so(folder: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    model = attach(base, rotation="none")
    tuner_of(model).set_step(3, 10)
    model.save_pretrained(tmp_path / "soft")
    assert run(tmp_path, "soft", text_file=folder / "text.txt", dataset_name=None).mask == "soft at step 3"


def test_the_tokenizer_beside_an_adapter_is_the_one_that_is_used(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "adapter", tmp_path / "adapter")
    options: dict[str, Any] = {"text_file": folder / "text.txt", "dataset_name": None}
    plain = run(tmp_path, "adapter", **options)
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = Strip()
    tokenizer.save_pretrained(tmp_path / "adapter")
    own = run(tmp_path, "adapter", **options)
    assert plain.text is not None and own.text is not None and own.text.num_tokens == plain.text.num_tokens - 1


def test_a_limit_counts_rows_and_thousands_of_tokens(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text(TEXT * 10)
    record = run(folder, "base", limit=1, text_file=tmp_path / "long.txt")
    assert record.responses is not None and record.responses.num_tokens == len("yes") + 1
    assert record.text is not None and 990 < record.text.num_tokens <= 1000


def test_the_base_of_an_adapter_can_have_moved(folder: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(folder / "base", tmp_path / "moved")
    shutil.copytree(folder / "adapter", tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": str(tmp_path / "gone")}))
    with pytest.raises(PatError, match="which is not there; pass --base_model"):
        run(folder, str(tmp_path / "adapter"))
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "base-there"}))
    with pytest.raises(PatError, match=r"'base-there', but there is no such folder.* --base_model says where it lies"):
        run(folder, str(tmp_path / "adapter"))
    record = run(folder, str(tmp_path / "adapter"), base_model=str(moved))
    assert record.base_model == "moved" and record.text == run(folder, "adapter").text
    other = EvaluateOptions(str(tmp_path / "adapter"), text_file=folder / "text.txt")
    assert record.model_digest != other.model_digest, "answers on one base are not those on another"
    with pytest.raises(PatError, match=r"base_model=.*, which is no adapter; leave it out"):
        run(folder, "base", base_model=str(moved))


def test_what_is_cut_is_counted_and_said(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [*ROWS, {"prompt": "Say " * 40, "completion": "yes"}]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    record = run(folder, "base", text_file=None, dataset_name=str(tmp_path / "data.jsonl"))
    assert record.data is not None and (record.data.num_truncated, record.data.num_cut_away) == (1, 1)
    assert record.text is None
    assert record.warnings == caplog.messages and any("no response left" in text for text in record.warnings)


def test_the_figures_are_printed_and_written(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new" / "figures.json"
    record = run(folder, "adapter", output=file)
    capsys.readouterr()
    print_evaluation(record)
    printed = capsys.readouterr().out
    written = json.loads(file.read_text())
    assert str(folder) not in file.read_text()
    assert record.text is not None
    assert written["command"] == "evaluate" and written["versions"]["torch"] == torch.__version__
    assert written["text"]["nll"] == record.text.nll
    assert written["text"]["perplexity"] == pytest.approx(math.exp(record.text.nll))
    assert f"{record.text.nll:.4f}" in printed
    assert "mask hard" in printed and f"{record.num_parameters:,}" in printed


def test_tasks_are_answered_by_a_checkpoint_and_an_adapter_beside_other_figures(
    folder: Path, tests_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {"tasks": ["copa,boolq"], "data_dir": tests_data / "tasks", "dataset_name": None}
    likelihoods = []
    for name in ("base", "adapter", "dense"):
        record = run(folder, name, output_dir=tmp_path / name, log_samples=True, limit=4, **options)
        (file,) = (tmp_path / name / "samples").glob("samples_pat_copa_likelihood_*.jsonl")
        samples = [json.loads(line) for line in file.read_text().splitlines()]
        likelihoods.append([float(value) for sample in samples for value, _ in sample["filtered_resps"]])
    assert likelihoods[1] == pytest.approx(likelihoods[2], abs=1e-3)  # the merge's 1e-4 a logit, over some tokens
    assert likelihoods[0] != pytest.approx(likelihoods[1], abs=1e-2)
    assert record.tasks is not None and record.text is not None
    written = json.loads((tmp_path / "dense" / "results.json").read_text())
    assert written["tasks"]["mean"] == record.tasks.mean
    capsys.readouterr()
    print_evaluation(record)
    printed = capsys.readouterr().out
    (score,) = (s for s in record.tasks.scores if (s.task, s.protocol) == ("copa", "likelihood"))
    assert score.acc_norm is not None and score.acc_norm_stderr is not None
    assert f"{100 * score.acc_norm:.2f} ± {100 * score.acc_norm_stderr:.2f}" in printed
    assert all(word in printed for word in ("perplexity", "copa", "mean", "no letter", "per character"))
    # One token a character.
    assert "Questions lost their beginning, which the model has no room for: 4 of copa, 4 of boolq." in record.warnings


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"text_file": Path("nowhere.txt")}, ["nowhere.txt", "no such file"]),
        ({"text_file": Path("empty.txt")}, ["empty"]),
        ({"text_file": Path("binary.txt")}, ["UTF-8"]),
        ({"template": "vicuna"}, ["vicuna", "alpaca"]),
        ({"tasks": ["copa"], "data_dir": Path("nowhere")}, ["nowhere", "no such folder"]),
        ({"tasks": ["copa"], "data_dir": Path(".")}, ["copa.jsonl", "no such file"]),
    ],
)
def test_what_cannot_be_read_is_said_before_the_weights_are_loaded(
    folder: Path, options: dict[str, Any], words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\x81")
    monkeypatch.setattr("pat.evaluation.command.load_base", lambda *_: pytest.fail("the weights were loaded"))
    with pytest.raises(PatError) as error:
        run(folder, "base", **options)
    assert all(word in str(error.value) for word in words)


def test_a_text_with_a_token_beyond_the_embedding_is_refused_and_one_without_it_is_not(
    folder: Path, tests_data: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder / "base", tmp_path / "base")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<unused {number}>" for number in range(VOCAB_SIZE - len(tokenizer))] + ["Penguin"])
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "penguin.txt").write_text(TEXT + "Penguin")
    data: dict[str, Any] = {"dataset_name": None, "data_dir": tests_data / "tasks"}
    assert run(tmp_path, "base", text_file=folder / "text.txt", tasks=["copa"], **data).tasks is not None
    for options in ({"text_file": tmp_path / "penguin.txt"}, {"text_file": None, "tasks": ["boolq"], **data}):
        with pytest.raises(PatError, match=r"the token 'Penguin' \(id \d+\), but the model has embeddings for"):
            run(tmp_path, "base", **{"dataset_name": None} | options)


def test_an_adapter_of_another_method_is_refused(folder: Path, tmp_path: Path) -> None:
    get_peft_model(build("llama", tied=True), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    with pytest.raises(PatError, match="LORA"):
        run(tmp_path, "lora", text_file=folder / "text.txt", dataset_name=None)
