"""The options of `pat export` and `pat convert`: flags, YAML keys and Python keywords alike."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

from pat.checkpoint.options import MergeOptions
from pat.errors import PatError
from pat.file_sizes.gguf_types import QUANTIZATIONS
from pat.paths import check_writable, expand_options
from pat.ranges import check_ranges

PACKAGES = {
    "gguf": ("gguf",),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("onnx", "onnxscript", "openvino"),
}
"""Packages that a format needs. Those of GGUF are in the extra `gguf`, all of them in `export`."""

SUFFIXES = {"gguf": ".gguf", "onnx": ".onnx", "openvino": ".xml"}

BESIDE = {"onnx": ".onnx.data", "openvino": ".bin"}
"""Suffixes of the files that hold a graph's weights, beside it."""


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """The model to export, and the file to write.

    Raises:
        PatError: no such format or type, a package that is missing, or an output that exists.
    """

    MAIN_FLAGS: ClassVar = ("model", "format", "output")

    model: str = field(metadata={"help": "Folder of the model (or a hub id), such as OUT/model.", "names": "model"})
    format: str = field(
        metadata={
            "help": "gguf (llama.cpp, Ollama, LM Studio), onnx (ONNX Runtime) or openvino.",
            "choices": tuple(PACKAGES),
        }
    )
    output: Path = field(
        metadata={"help": "A new file, such as small.gguf, small.onnx or small.xml; what belongs to it lies beside it."}
    )
    quantize: str | None = field(
        default=None,
        metadata={
            "help": "With gguf, the type of most weights: " + ", ".join(QUANTIZATIONS) + ". By default the one that "
            "they are stored in. The K types and Q4_0 are written by llama.cpp's own llama-quantize.",
            "choices": tuple(QUANTIZATIONS),
        },
    )
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "With gguf, instruction data that was not trained on; the mean NLL of its responses is measured "
            "with the weights as they are, and with those of the file.",
            "names": "dataset",
        },
    )
    limit: int | None = field(
        default=None,
        metadata={"help": "Largest number of rows of the data, taken evenly spaced.", "range": "[1, inf)"},
    )
    max_length: int | None = field(
        default=None, metadata={"help": "Longest row of the data in tokens. Default: 512.", "range": "[1, inf)"}
    )
    check: bool = field(
        default=True,
        metadata={"help": "Run the file in its engine, where that is at hand, beside transformers."},
    )
    json: bool = field(default=False, metadata={"help": "Print JSON instead of a sentence."})

    def __post_init__(self) -> None:
        expand_options(self)
        choices: dict[str, tuple[str | None, ...]] = {"format": (*PACKAGES,), "quantize": (None, *QUANTIZATIONS)}
        for name, allowed in choices.items():
            if (given := getattr(self, name)) not in allowed:
                known = ", ".join(str(item) for item in allowed if item is not None)
                raise PatError(f"Got {name}={given!r}; expected one of {known}.")
        if self.quantize is not None and self.format != "gguf":
            raise PatError(f"Got quantize={self.quantize!r} with format={self.format!r}; it is for gguf alone.")
        if self.dataset_name is not None and self.format != "gguf":
            raise PatError(f"Got dataset_name={self.dataset_name!r} with format={self.format!r}; it is for gguf alone.")
        for name in ("limit", "max_length"):
            if self.dataset_name is None and (given := getattr(self, name)) is not None:
                raise PatError(f"Got {name}={given} without dataset_name, of which it is an option.")
        check_ranges(self)
        object.__setattr__(self, "output", Path(self.output))
        if self.output.suffix != SUFFIXES[self.format]:
            raise PatError(
                f"Got output={str(self.output)[:300]!r}; expected a name that ends in {SUFFIXES[self.format]}."
            )
        for path in (self.output, self.output.with_suffix(BESIDE.get(self.format, self.output.suffix))):
            if path.exists() or path.is_symlink():
                raise PatError(f"{path}: exists already; give another name, or remove it first.")
        check_writable(self.output)
        missing = [name for name in PACKAGES[self.format] if find_spec(name) is None]
        if missing:
            extra = "gguf" if self.format == "gguf" else "export"
            raise PatError(
                f"--format {self.format} needs {', '.join(missing)}; install the extra: pip install 'pat-llm[{extra}]'."
            )


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(MergeOptions):
    """The published code's adapter, and the form in which the model is written."""

    adapter: str | Path = field(
        metadata={
            "help": "Folder of an adapter that the paper's published code has saved.",
            "names": "published adapter",
        }
    )
    pruned_hidden_size: int | None = field(
        default=None,
        metadata={
            "help": "Number of channels that a frozen mask keeps (its dimdown_dim); a trained mask says so itself.",
            "range": "[1, 1048576]",
        },
    )
