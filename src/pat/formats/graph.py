"""A model as an ONNX graph, and OpenVINO's form of that: token ids in, logits out, for any batch and length."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pat.checkpoint.verify import MAX_FLOORS, permutation_floor
from pat.errors import PatError, RunFailed, reason_of
from pat.formats.reference import Check, Reference, require

INPUTS, OUTPUT = ("input_ids", "attention_mask"), "logits"

EXAMPLE_SHAPE = (2, 8)
"""Batch and length of the tokens that the graph is recorded with; any other works as well."""

CHECKED_LENGTHS = ((1, 5), (3, 17), (2, 40))
"""Batches and lengths that the graph is run at, none of them the one it was recorded with."""

MAX_ERRORS = {"onnxruntime": 1e-4, "openvino": 1e-3}
"""Largest difference of a logit: float32 in another order of summation; OpenVINO fuses more. In a model that blows
rounding up itself it may be `MAX_FLOORS` times that of a mere permutation of its channels (docs/adr/0011): SmolLM2 has
values of 25,000 in its residual stream, where transformers' own two forms of attention differ by 3e-4 in a logit."""

EXPORTABLE_EXPERTS = "batched_mm"
"""transformers' form of a mixture of experts that a graph can be recorded of."""

FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32"}
"""OpenVINO's hint without which it computes in bfloat16 on processors that can."""


class _Logits(nn.Module):
    """The model as a function of token ids and of which of them are no padding."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        return logits


def write_onnx(model: PreTrainedModel, path: Path) -> None:
    """Write the graph; a large model's weights lie beside it in `NAME.onnx.data`.

    Raises:
        RunFailed: the exporter cannot.
    """
    tokens = torch.ones(EXAMPLE_SHAPE, dtype=torch.int64)
    mask = tokens.clone()  # the exporter takes one tensor given twice for one input
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    with (
        _told(f"A {model.config.model_type} model cannot be written as ONNX"),
        _exportable_experts(model),
        warnings.catch_warnings(),
        torch.no_grad(),
    ):
        warnings.simplefilter("ignore")  # of the exporter, about its own code
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        torch.onnx.export(
            _Logits(model),
            (tokens, mask),
            str(path),
            dynamo=True,
            input_names=list(INPUTS),
            output_names=[OUTPUT],
            dynamic_shapes={name: sizes for name in INPUTS},
            external_data=True,
            verbose=False,
        )


@contextmanager
def _exportable_experts(model: PreTrainedModel) -> Iterator[None]:
    """Switch experts to a form that a graph can be recorded of, and back afterwards."""
    before = getattr(model.config, "_experts_implementation", None)
    if before in (None, "eager"):  # no experts, or left as asked for
        yield
        return
    model.set_experts_implementation(EXPORTABLE_EXPERTS)
    try:
        yield
    finally:
        model.set_experts_implementation(before)


def write_openvino(graph: Path, path: Path) -> None:
    """Write OpenVINO's form of an ONNX graph: `NAME.xml`, and the weights beside it in `NAME.bin`.

    Raises:
        RunFailed: OpenVINO cannot.
    """
    import openvino  # an extra

    with _told("The graph cannot be written as OpenVINO"):
        openvino.save_model(openvino.convert_model(graph), path, compress_to_fp16=False)


def check_graph(path: Path, engine: str, reference: Reference) -> Check:
    """Run a file at several lengths beside transformers.

    Raises:
        RunFailed: a logit differs by more than rounding, or the engine cannot run the file.
    """
    with _told(f"{engine} cannot load the file"):
        run = _onnx(path) if engine == "onnxruntime" else _openvino(path)
    errors, batches = [], []
    stream = cycle(reference.tokens)  # a text may be shorter than what is asked for
    for batch, length in CHECKED_LENGTHS:
        tokens = torch.tensor([[next(stream) for _ in range(length)] for _ in range(batch)])
        mask = torch.ones_like(tokens)
        mask[1:, :2] = 0  # rows after the first are padded on the left
        with _told(f"{engine} cannot run the file"):
            found = torch.from_numpy(run({INPUTS[0]: tokens.numpy(), INPUTS[1]: mask.numpy()}))
        batches.append({"input_ids": tokens, "attention_mask": mask})
        errors.append(float((found - reference.logits(tokens, mask))[mask == 1].abs().max()))
    bound, error = MAX_ERRORS[engine], max(errors)
    what = "largest difference of a logit, at " + ", ".join(f"{b} x {n}" for b, n in CHECKED_LENGTHS) + " tokens"
    if error > bound:
        floor = permutation_floor(reference.model, batches).max_abs_logit_diff
        bound = max(bound, MAX_FLOORS * floor)
        what += f" (permuting the model's channels moves one by {floor:.2g})"
    require(error <= bound, f"{engine}'s logits differ by up to {error:.2g}, and may by {bound:.2g}")
    return Check(engine=engine, version=version(engine), what=what, value=error, bound=bound)


def _onnx(path: Path) -> Any:
    import onnxruntime  # an extra

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda inputs: session.run([OUTPUT], inputs)[0]


def _openvino(path: Path) -> Any:
    import openvino  # an extra

    compiled = openvino.Core().compile_model(path, "CPU", FLOAT32)
    return lambda inputs: compiled(inputs)[0]


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Turn any error of a library into one line."""
    try:
        yield
    except PatError:
        raise
    except Exception as error:  # the exporters and engines have errors of their own, without a common root
        # Exporters colour what they say for a terminal.
        said = re.sub(r"\x1b\[\d*m", "", reason_of(error))[:300] or type(error).__name__
        raise RunFailed(f"{what} ({said}); nothing was written.") from error
