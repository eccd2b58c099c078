"""`pat evaluate`: a dense checkpoint, and a PAT adapter through its base, on text and on instruction data."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import build, tiny_tokenizer
from tiny_training import attach, tuner_of
from transformers import AutoModelForCausalLM

from pat.errors import PatError
from pat.evaluation.command import Evaluation, evaluate, print_evaluation
from pat.nll import response_nll, text_perplexity
from pat.questions.hub import make_row
from pat.training.data import load_training_data
from pat.training.tokens import tokenize_examples

TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. " * 3
ROWS = [{"prompt": f"Say {word}: ", "completion": word} for word in ("yes", "no", "perhaps", "not at all")]

EXACT = 1e-6
"""Two ways to the same figure differ by the order in which float32 logits of a batch are computed."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base model, a hardened adapter, its merged model, a text and data."""
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


def run(folder: Path, model: str, **options: object) -> Evaluation:
    sources = {"text_file": str(folder / "text.txt"), "dataset_name": str(folder / "data.jsonl")}
    return evaluate(str(folder / model), **(sources | {"max_length": 64} | options))  # type: ignore[arg-type]


def test_a_checkpoints_figures_are_those_of_the_library(folder: Path) -> None:
    evaluation = run(folder, "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    tokenizer = tiny_tokenizer()
    text = text_perplexity(model, tokenizer, TEXT, context=64)
    rows = load_training_data(folder / "data.jsonl", tokenizer=tokenizer, held_out=0).train
    responses = response_nll(model, tokenize_examples(tokenizer, rows, 64), batch_size=4, pad_token_id=0)
    assert evaluation.text is not None and evaluation.responses is not None
    assert evaluation.text.num_tokens == text.num_tokens
    assert evaluation.text.nll == pytest.approx(text.nll, rel=EXACT)
    assert evaluation.responses.num_tokens == responses.num_tokens
    assert evaluation.responses.nll == pytest.approx(responses.nll, rel=EXACT)
    assert evaluation.num_rows == len(ROWS)
    assert (evaluation.base_model, evaluation.mask) == (None, None)
    assert evaluation.num_parameters == sum(p.numel() for p in model.parameters())


def test_an_adapter_gives_the_figures_of_its_merged_model_and_not_of_its_base(folder: Path) -> None:
    base, masked, dense = (run(folder, name) for name in ("base", "adapter", "dense"))
    assert masked.base_model == str(folder / "base") and masked.mask == "hard"
    for figure in ("text", "responses"):
        values = [getattr(evaluation, figure).nll for evaluation in (base, masked, dense)]
        assert values[1] == pytest.approx(values[2], abs=1e-4)  # the parity that the merge promises
        assert abs(values[0] - values[1]) > 1e-2


def test_an_adapter_before_its_milestone_says_so(folder: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    model = attach(base, rotation="none")
    tuner_of(model).set_step(3, 10)
    model.save_pretrained(tmp_path / "soft")
    assert run(tmp_path, "soft", text_file=str(folder / "text.txt"), dataset_name=None).mask == "soft at step 3"


def test_a_limit_counts_rows_and_thousands_of_tokens(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text(TEXT * 10)
    evaluation = run(folder, "base", limit=1, text_file=str(tmp_path / "long.txt"))
    assert evaluation.num_rows == 1
    assert evaluation.text is not None and 990 < evaluation.text.num_tokens <= 1000


def test_rows_whose_response_is_cut_off_are_counted(folder: Path, tmp_path: Path) -> None:
    rows = [*ROWS, {"prompt": "Say " * 40, "completion": "yes"}]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluation = run(folder, "base", text_file=None, dataset_name=str(tmp_path / "data.jsonl"))
    assert (evaluation.num_rows, evaluation.num_truncated) == (len(ROWS), 1)
    assert evaluation.text is None


def test_the_figures_are_printed_and_written(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new" / "figures.json"
    evaluation = run(folder, "adapter", output=file)
    capsys.readouterr()
    print_evaluation(evaluation)
    printed = capsys.readouterr().out
    written = json.loads(file.read_text())
    assert evaluation.text is not None
    assert written["command"] == "evaluate" and written["versions"]["torch"] == torch.__version__
    assert written["text"]["nll"] == evaluation.text.nll
    assert written["text"]["perplexity"] == pytest.approx(math.exp(evaluation.text.nll))
    assert f"{evaluation.text.nll:.4f}" in printed
    assert "mask hard" in printed and f"{evaluation.num_parameters:,}" in printed


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"text_file": None, "dataset_name": None}, ["--text_file", "--dataset_name", "--tasks"]),
        ({"text_file": "nowhere.txt"}, ["nowhere.txt", "no such file"]),
        ({"template": "vicuna"}, ["vicuna", "alpaca"]),
        ({"max_length": 0}, ["max_length=0"]),
        ({"limit": -1}, ["limit=-1"]),
        ({"output": Path(".")}, ["folder", "JSON"]),
        ({"tasks": "copa,arc"}, ["'arc'", "arc_easy"]),
        ({"tasks": "copa", "data_dir": Path("nowhere")}, ["nowhere", "no such folder"]),
        ({"tasks": "copa", "protocols": "words"}, ["'words'", "letter"]),
        ({"tasks": "copa", "log_samples": True}, ["--output_dir"]),
        ({"tasks": "copa", "output_dir": Path(__file__)}, ["which is a file"]),
        ({"output_dir": Path("out")}, ["--tasks"]),
        ({"batch_size": 0}, ["batch_size=0"]),
    ],
)
def test_what_cannot_be_evaluated_is_said_before_anything_is_loaded(
    folder: Path, options: dict[str, object], words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pat.evaluation.command.load_base", lambda *_: pytest.fail("the weights were loaded"))
    with pytest.raises(PatError) as error:
        run(folder, "base", **options)
    assert all(word in str(error.value) for word in words)


def test_the_results_of_another_command_are_left_alone(folder: Path, tmp_path: Path) -> None:
    for content in ('{"command": "tune"}', "[]", "not JSON"):
        (tmp_path / "results.json").write_text(content)
        with pytest.raises(PatError, match="holds files, but no evaluation"):
            run(folder, "base", tasks="copa", output_dir=tmp_path)
        assert (tmp_path / "results.json").read_text() == content
    with pytest.raises(PatError, match="holds files, but no evaluation"):
        run(folder, "base", tasks="copa", output_dir=folder / "base")


def test_tasks_are_answered_by_a_checkpoint_and_an_adapter_beside_other_figures(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [make_row(f"Is {word} good?", ["Yes", "No"], len(word) % 2) for word in ("it", "all", "that", "glittering")]
    (tmp_path / "copa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options: dict[str, Any] = {"tasks": "copa", "data_dir": tmp_path, "dataset_name": None, "log_samples": True}
    likelihoods = []
    for name in ("base", "adapter", "dense"):
        evaluation = run(folder, name, output_dir=tmp_path / name, **options)
        assert evaluation.tasks is not None and evaluation.text is not None
        assert [score.num_questions for score in evaluation.tasks.scores] == [4, 4]
        lines = (tmp_path / name / "samples" / "copa.likelihood.jsonl").read_text().splitlines()
        likelihoods.append([value for line in lines for value in json.loads(line)["log_likelihoods"]])
    assert likelihoods[1] == pytest.approx(likelihoods[2], abs=1e-3)  # the merge's 1e-4 a logit, over some tokens
    assert likelihoods[0] != pytest.approx(likelihoods[1], abs=1e-2)
    written = json.loads((tmp_path / "dense" / "results.json").read_text())
    assert written["tasks"]["mean"]["likelihood"]["acc"] == evaluation.tasks.mean("likelihood")
    capsys.readouterr()
    print_evaluation(evaluation)
    printed = capsys.readouterr().out
    assert "COPA" in printed and "perplexity" in printed


def test_an_adapter_of_another_method_is_refused(folder: Path, tmp_path: Path) -> None:
    get_peft_model(build("llama", tied=True), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    with pytest.raises(PatError, match="LORA"):
        evaluate(str(tmp_path / "lora"), text_file=str(folder / "text.txt"))


def test_a_text_that_is_empty_or_binary_is_refused_before_the_weights_are_loaded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pat.evaluation.command.load_base", lambda *_: pytest.fail("the weights were loaded"))
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\x81")
    for name, word in (("empty.txt", "empty"), ("binary.txt", "UTF-8")):
        with pytest.raises(PatError, match=word):
            run(folder, "base", text_file=str(tmp_path / name))
