"""`pat export`: what is asked for, what is refused before the work, and a file that takes its place whole."""

import json
import shlex
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import build
from transformers import AutoConfig, AutoModelForCausalLM

from pat import cli
from pat.checkpoint.staging import staged_file
from pat.errors import PatError, RunFailed
from pat.formats.command import ExportRecord, _kind, run_export
from pat.formats.graph import CHECKED_LENGTHS, INPUTS, _exportable_experts, check_graph, write_onnx
from pat.formats.llama_cpp import Server, _address, _ended_after, command_to_ask
from pat.formats.options import ExportOptions
from pat.formats.reference import Reference
from pat.training.outcome.measure import measure
from pat.training.outcome.results import Size

pytest.importorskip("gguf")

STORIES = Path(__file__).resolve().parents[2] / "data" / "stories260K"


def export(output: Path, **options: Any) -> ExportRecord:
    return run_export(ExportOptions(model=str(STORIES), format="gguf", output=output, **options))


def test_a_model_becomes_a_file_of_the_predicted_size(tmp_path: Path) -> None:
    record = export(tmp_path / "stories.gguf", quantize="Q8_0")
    assert [path.name for path in tmp_path.iterdir()] == ["stories.gguf"]
    assert record.files == {"stories.gguf": record.predicted_bytes}
    stories = AutoModelForCausalLM.from_pretrained(STORIES)
    unmeasured: Any = SimpleNamespace(held_out=[], held_out_of_base=None, general=None)
    figures = measure(stories, unmeasured, "base", Size.of(stories.config, torch.float32))
    assert figures.gguf_bytes is not None and set(figures.gguf_bytes) == {"Q8_0", "Q4_K_M"}
    # Each file carries the name of its model.
    assert figures.gguf_bytes["Q8_0"] == pytest.approx(record.predicted_bytes, abs=64)
    assert str(tmp_path / "stories.gguf") in (record.command_to_ask or "")
    assert record.checks or any("xllamacpp is not installed" in sentence for sentence in record.not_checked)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--format", "pickle"], "expected one of gguf, onnx, openvino"),
        (["--format", "gguf", "--quantize", "Q3"], "expected one of F32"),
        (["--format", "onnx", "--quantize", "Q8_0"], "it is for gguf alone"),
        (["--format", "onnx", "--dataset_name", "me/rows"], "it is for gguf alone"),
        (["--format", "gguf", "--limit", "3"], "without dataset_name"),
        (["--format", "gguf", "--dataset_name", "no.jsonl"], "no.jsonl"),
        (["--format", "onnx"], "expected a name that ends in .onnx"),
        (["--format", "gguf", "--quantize", "Q4_K_M"], "there is no llama-quantize on the PATH"),
    ],
)
def test_a_wrong_request_is_one_line_and_writes_nothing(
    flags: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.main(["export", "--model", str(STORIES), "--output", str(tmp_path / "x.gguf"), *flags]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not any(tmp_path.iterdir())


def test_the_loss_is_measured_with_the_weights_of_the_file(tmp_path: Path) -> None:
    rows = [{"prompt": "Once upon a time", "completion": f" there was a girl with {n} cats."} for n in range(4)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    losses = {}
    for kind in ("F32", "Q8_0"):
        record = export(tmp_path / f"{kind}.gguf", quantize=kind, dataset_name=str(data), limit=3, check=False)
        losses[kind] = record.loss
        assert record.loss is not None and record.loss.dataset_name == "rows.jsonl"
    assert losses["F32"].after == losses["F32"].before == losses["Q8_0"].before
    assert 0 < abs(losses["Q8_0"].after.nll - losses["Q8_0"].before.nll) < 0.05


def test_spaces_that_llama_cpp_adds_are_told(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(STORIES, model)
    settings = json.loads((model / "tokenizer_config.json").read_text()) | {"tokenizer_class": "LlamaTokenizer"}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    record = run_export(ExportOptions(model=str(model), format="gguf", output=tmp_path / "x.gguf", check=False))
    (warning,) = record.warnings
    assert "behind every special token, so that prompts of a chat template may" in warning


def test_a_file_may_be_called_as_one_on_the_way(tmp_path: Path) -> None:
    export(tmp_path / "float32.gguf", quantize="F16")
    assert [path.name for path in tmp_path.iterdir()] == ["float32.gguf"]


@pytest.mark.parametrize(("name", "suffix"), [("gguf", "gguf"), ("onnx", "onnx"), ("openvino", "xml")])
def test_a_quantised_model_is_refused_in_every_format(
    name: str, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pat.formats.options.find_spec", lambda name: True)  # no package is used
    options = ExportOptions(model=str(STORIES), format=name, output=tmp_path / f"x.{suffix}")
    config = AutoConfig.from_pretrained(STORIES)
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    with pytest.raises(PatError, match="Got a quantised model"):
        _kind(options, config)


def test_a_missing_tokenizer_is_told_before_weights_are_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "model"
    model.mkdir()
    shutil.copy(STORIES / "config.json", model)
    shutil.copy(next(STORIES.glob("*.safetensors")), model)
    monkeypatch.setattr("pat.formats.options.find_spec", lambda name: True)
    monkeypatch.setattr("pat.formats.command.load_base", lambda *_, **__: pytest.fail("weights were loaded"))
    with pytest.raises(PatError, match="Could not load a tokenizer"):
        run_export(ExportOptions(model=str(model), format="onnx", output=tmp_path / "x.onnx"))


def test_a_graph_is_asked_rows_of_equal_length_of_a_text_that_is_too_short(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama", tied=True)
    reference = Reference(model, "", (1, 2, 3))

    def run(inputs: dict[str, Any]) -> Any:
        return reference.logits(*(torch.from_numpy(inputs[name]) for name in INPUTS)).numpy()

    monkeypatch.setattr("pat.formats.graph._onnx", lambda path: run)
    monkeypatch.setattr("pat.formats.graph.version", lambda name: "0")
    assert check_graph(Path("x.onnx"), "onnxruntime", reference).value == 0


@pytest.mark.parametrize(("floor", "passes"), [(2e-4, True), (5e-5, False)])
def test_a_graph_may_miss_the_bound_by_what_rounding_does_to_its_model_alone(
    floor: float, passes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("llama", tied=True)
    reference = Reference(model, "", (5, 6, 7))

    def run(inputs: dict[str, Any]) -> Any:
        return reference.logits(*(torch.from_numpy(inputs[name]) for name in INPUTS)).numpy() + 5e-4

    def permutation_floor(model: Any, batches: Any) -> Any:
        assert [tuple(batch["input_ids"].shape) for batch in batches] == list(CHECKED_LENGTHS)
        return SimpleNamespace(max_abs_logit_diff=floor)

    monkeypatch.setattr("pat.formats.graph._onnx", lambda path: run)
    monkeypatch.setattr("pat.formats.graph.version", lambda name: "0")
    monkeypatch.setattr("pat.formats.graph.permutation_floor", permutation_floor)
    if passes:
        assert check_graph(Path("x.onnx"), "onnxruntime", reference).bound == pytest.approx(5 * floor)
    else:
        with pytest.raises(RunFailed, match=r"differ by up to 0\.0005, and may by 0\.00025"):
            check_graph(Path("x.onnx"), "onnxruntime", reference)


def test_a_graph_that_cannot_be_recorded_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama", tied=True)
    monkeypatch.setattr(model, "forward", None)
    with pytest.raises(RunFailed, match="A llama model cannot be written as ONNX"):
        write_onnx(model, tmp_path / "x.onnx")


def test_a_model_of_few_positions_is_asked_less_and_its_tokenizer_the_whole_text() -> None:
    model = build("llama", tied=True, max_position_embeddings=48)
    reference = Reference.of(model, lambda text: {"input_ids": [5] * len(text)})
    assert len(reference.tokens) == len(reference.text) == 400 and len(reference.prompt) == 48 - 30 - 1


def test_every_token_is_held_against_the_model_and_a_tie_excuses_no_other() -> None:
    model = build("llama", tied=False)
    reference = Reference(model, "", (1, 2, 3))
    found: list[int] = []
    for _ in range(6):
        found.append(int(reference.logits(torch.tensor([[1, 2, 3, *found]]))[0, -1].argmax()))
    assert reference.compare(found) == (6, 0)
    wrong = [(found[0] + 1) % 128, *found[1:]]
    assert sum(reference.compare(wrong)) < 6
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every token ties with every other
    assert reference.compare([5, 0, 7]) == (1, 2)


@pytest.mark.parametrize("has_chat", [True, False])
def test_the_command_that_asks_a_file_is_one_that_runs(
    has_chat: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Stub:
        """Does as the package's server; the real one was asked by hand."""

        model, cpuparams, cpuparams_batch = SimpleNamespace(), SimpleNamespace(), SimpleNamespace()

        def handle_chat_completions(self, request: dict[str, Any]) -> dict[str, Any]:
            return {"choices": [{"message": {"content": f"{self.model.path} {request['messages'][0]['content']}"}}]}

        def handle_completions(self, request: dict[str, Any]) -> dict[str, Any]:
            return {"choices": [{"text": f"{self.model.path} {request['prompt']}"}]}

    stub = Stub()
    package = SimpleNamespace(CommonParams=lambda: stub, Server=lambda params: params)
    monkeypatch.setitem(sys.modules, "xllamacpp", package)
    command = command_to_ask(Path('it\'s "small".gguf'), has_chat=has_chat, num_threads=1)
    words = shlex.split(command)
    assert words[:2] == ["python", "-c"]
    exec(words[2], {})
    assert capsys.readouterr().out == 'it\'s "small".gguf Hello\n'
    assert stub.cpuparams.n_threads == stub.cpuparams_batch.n_threads == 1


@pytest.mark.parametrize("answer", [b"no JSON", b"{}", b'{"tokens": 3}'])
def test_an_answer_without_tokens_is_one_line_and_no_proxy_is_asked(
    answer: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            pass

    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        with pytest.raises(RunFailed, match="answered without tokens"):
            Server(f"http://127.0.0.1:{server.server_port}").read("a")


def test_a_server_that_says_nothing_is_ended() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=-1, stdout=-1, text=True)
    with pytest.raises(RunFailed, match="did not load"), _ended_after(process, 0.2):
        _address(process.stdout)
    process.communicate()


def test_an_existing_file_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_text("mine")
    with pytest.raises(PatError, match="exists already"):
        export(tmp_path / "x.gguf")
    assert (tmp_path / "x.gguf").read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "output", "other"), [("onnx", "x.onnx", "x.onnx.data"), ("openvino", "x.xml", "x.bin")]
)
def test_a_file_that_would_lie_beside_is_looked_for_before_the_work(
    name: str, output: str, other: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pat.formats.options.find_spec", lambda name: True)
    (tmp_path / other).write_text("mine")
    with pytest.raises(PatError, match=f"{other}: exists already"):
        ExportOptions(model=str(STORIES), format=name, output=tmp_path / output)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(STORIES)
    model.model.layers[0].mlp.down_proj.weight.data[0, 0] = float("nan")
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    for file in STORIES.glob("tokenizer*"):
        shutil.copy(file, folder)
    with pytest.raises(PatError, match=r"model.layers.0.mlp.down_proj.weight holds numbers that are not finite"):
        run_export(ExportOptions(model=str(folder), format="gguf", output=tmp_path / "x.gguf"))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_disk_that_is_full_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError("11008 requested and 2912 written")  # as numpy says it

    monkeypatch.setattr("pat.formats.command.write_gguf", full)
    with pytest.raises(RunFailed, match=r"x.gguf: could not be written \(11008 requested"):
        export(tmp_path / "x.gguf", check=False)
    assert not any(tmp_path.iterdir())


def test_experts_are_written_in_a_form_that_a_graph_can_be_recorded_of() -> None:
    for family, before in (("qwen3_moe", "grouped_mm"), ("llama", "eager")):
        model = build(family, tied=False)
        with _exportable_experts(model):
            assert model.config._experts_implementation == ("eager" if family == "llama" else "batched_mm")
        assert model.config._experts_implementation == before


def test_files_appear_together_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), staged_file(tmp_path / "a.xml") as path:
        path.write_text("half")
        raise RuntimeError
    assert not any(tmp_path.iterdir())
    with staged_file(tmp_path / "a.xml") as path:
        path.write_text("graph")
        path.with_suffix(".bin").write_text("weights")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.bin", "a.xml"]
