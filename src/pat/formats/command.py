"""`pat export`: a model as a file of another engine, checked by running it there."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from pat.checkpoint.card import shown_name
from pat.checkpoint.staging import staged_file
from pat.errors import PatError, RunFailed, one_line
from pat.file_sizes.gguf_layout import GgufLayout, layout_of
from pat.file_sizes.gguf_types import QUANTIZATIONS, Entry, Quantization
from pat.file_sizes.gguf_vocabulary import (
    name_in_file,
    stored_end_tokens,
    unlike_added,
    unlike_spaces,
    unnamed_ends,
    vocabulary_of,
)
from pat.formats import llama_cpp
from pat.formats.gguf_file import write_gguf
from pat.formats.loss import MAX_LENGTH, LossCheck, QuantizedLoss
from pat.formats.options import ExportOptions
from pat.formats.reference import NEW_TOKENS, Check, Reference, require
from pat.loading import load_base, load_config, stored_dtype
from pat.loading.tokenizer import load_plain_tokenizer
from pat.report.progress import phase
from pat.report.records import Record, collected_warnings
from pat.surgery.costs import Skeleton, build_skeleton
from pat.surgery.describe import map_of
from pat.surgery.residual import model_tensors
from pat.training.preflight.threads import Threads, chosen_by_user, threads_for, using

logger = logging.getLogger(__name__)

STORED = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
"""Type of a GGUF file by the dtype of the weights."""

DIRECT = ("F32", "F16", "BF16", "Q8_0")
"""Types that the `gguf` package writes; `llama-quantize` writes the others."""


@dataclass(frozen=True, kw_only=True)
class ExportRecord(Record):
    """The result of an export. Only the last component of a path is kept."""

    command: Literal["export"] = "export"
    model_name_or_path: str
    format: str
    quantization: str | None
    """Type of most weights of a GGUF file."""
    files: dict[str, int]
    """Sizes in bytes of the files written, by name."""
    predicted_bytes: int | None
    """Size of a GGUF file as `pat plan` predicts it."""
    loss: QuantizedLoss | None
    """Loss on data with the weights as they are, and with those of a GGUF file; None where no data was given."""
    checks: tuple[Check, ...]
    """Comparisons with transformers that were made."""
    not_checked: tuple[str, ...] = field(default=())
    """Sentences on what was not compared, and why."""
    command_to_ask: str | None = None
    """Shell command that asks a GGUF file; None of another format."""


def print_export(record: ExportRecord) -> None:
    """Print what was written, and how far it was checked."""
    sizes = ", ".join(f"{name} ({size:,} bytes)" for name, size in record.files.items())
    print(f"Wrote {sizes}.")
    if (loss := record.loss) is not None:
        tokens = f"{loss.before.num_tokens:,} response tokens of {loss.dataset_name}"
        after = f"{loss.after.nll:.4f} with the weights of {record.quantization}"
        print(f"- NLL on {tokens}: {loss.before.nll:.4f} before, {after} ({loss.after.nll - loss.before.nll:+.4f})")
    for check in record.checks:
        bound = "" if check.bound is None else f" (bound {check.bound:g})"
        print(f"- {check.engine} {check.version}, {check.what}: {check.value:.4g}{bound}")
    for sentence in record.not_checked:
        print(f"- Not checked: {sentence}")
    if record.command_to_ask is not None:
        first = "" if llama_cpp.engine_version() else " (first: pip install 'pat-llm[gguf]')"
        print(f"To ask it: {record.command_to_ask}{first}")


def run_export(options: ExportOptions) -> ExportRecord:
    """Write a model in another format, and run the file beside transformers.

    Raises:
        PatError: the model, or its tokenizer, cannot be written so; nothing has been written.
        RunFailed: the file is not the model, or the engine cannot run it; nothing is left behind.
    """
    with collected_warnings() as warnings:
        config, family = load_config(options.model)
        kind = _kind(options, config)
        tokenizer = load_plain_tokenizer(options.model) if options.check else None
        layout: GgufLayout | None = None
        vocabulary: list[Entry] = []
        if kind is not None:
            if kind.name not in DIRECT:
                llama_cpp.require_quantizer(kind.name)
            tokenizer = tokenizer or load_plain_tokenizer(options.model)
            ends = stored_end_tokens(options.model)
            vocabulary = vocabulary_of(tokenizer, config.vocab_size, ends)
            if unnamed := unnamed_ends(tokenizer, ends):
                logger.warning("The file does not name the end tokens %s, for which GGUF has no place.", unnamed)
            if unlike := unlike_added(tokenizer):
                logger.warning(
                    "In llama.cpp the tokens %s neither strip the white space beside them nor match whole words only.",
                    unlike[:5],
                )
            if spaces := unlike_spaces(tokenizer):
                logger.warning(
                    "%s llama.cpp puts one before every text and behind every special token, so that prompts of a chat "
                    "template may be read with other tokens than in training.",
                    spaces,
                )
            skeleton = build_skeleton(config, torch.float32)
            name = name_in_file(shown_name(options.model), tokenizer)
            layout = layout_of(skeleton, vocabulary, name=name, kind=kind)
        measured = None
        if options.dataset_name is not None:  # read before the weights: a wrong column should not take minutes
            measured = LossCheck(
                options.model,
                config,
                options.dataset_name,
                max_length=options.max_length or MAX_LENGTH,
                limit=options.limit,
            )
        with phase(f"Loading {shown_name(options.model)}"):
            model = load_base(options.model, dtype=torch.float32)
        _check_finite(options.model, model)
        # llama.cpp waits for busy cores as torch does.
        threads = threads_for(config, family) if options.check or kind is not None else None
        loss: QuantizedLoss | None = None
        checks: list[Check] = []
        skipped: list[str] = []
        with (
            _told_of_disk(options.output),
            staged_file(options.output) as path,
            using(threads),
            phase(f"Writing {options.output.name}, and checking it"),
        ):
            reference = None if tokenizer is None or not options.check else Reference.of(model, tokenizer)
            if reference is None:
                skipped.append("the file against transformers, since --check is false.")
            if kind is not None:
                assert layout is not None
                _write_gguf(model, layout, vocabulary, path, kind, reference, checks, skipped)
                if measured is not None:
                    loss = measured.measure(model, layout, path)
            else:
                _write_graph(model, path, options.format, reference, checks)
            files = {file.name: file.stat().st_size for file in sorted(path.parent.iterdir())}
        return ExportRecord(
            model_name_or_path=shown_name(options.model),
            format=options.format,
            quantization=None if kind is None else kind.name,
            files=files,
            predicted_bytes=None if layout is None or kind is None else layout.num_bytes(kind),
            loss=loss,
            checks=tuple(checks),
            not_checked=tuple(skipped),
            command_to_ask=None if kind is None else _command_to_ask(options.output, tokenizer, threads),
            warnings=warnings,
        )


def _command_to_ask(output: Path, tokenizer: Any, threads: Threads | None) -> str:
    number = torch.get_num_threads() if threads is None else threads.number
    is_fewer = chosen_by_user() if threads is None else number < threads.default
    fewer = number if is_fewer else None
    has_chat = bool(getattr(tokenizer, "chat_template", None))
    return llama_cpp.command_to_ask(output, has_chat=has_chat, num_threads=fewer)


def _check_finite(name: str, model: PreTrainedModel) -> None:
    """Refuse a model that has diverged, since the comparison of its logits would say nothing.

    Raises:
        PatError: a weight holds a number that is not finite.
    """
    for tensor, weight in model_tensors(model).items():
        if not weight.isfinite().all():
            raise PatError(f"{name}: its tensor {tensor} holds numbers that are not finite; the training has diverged.")


@contextmanager
def _told_of_disk(output: Path) -> Iterator[None]:
    """Turn an error of the file system into one line that names the file, such as on a disk that is full."""
    try:
        yield
    except OSError as error:
        raise RunFailed(f"{output}: could not be written ({one_line(error)}); nothing is left there.") from error


def _kind(options: ExportOptions, config: Any) -> Quantization | None:
    """Return the type of a GGUF file, None of another format.

    Raises:
        PatError: the model is quantised.
    """
    if getattr(config, "quantization_config", None) is not None:
        raise PatError("Got a quantised model; expected one with plain weights, such as `pat merge` writes.")
    if options.format != "gguf":
        return None
    return QUANTIZATIONS[options.quantize or STORED.get(stored_dtype(config) or torch.float32, "F32")]


def _write_gguf(
    model: PreTrainedModel,
    layout: GgufLayout,
    vocabulary: Sequence[Entry],
    path: Path,
    kind: Quantization,
    reference: Reference | None,
    checks: list[Check],
    skipped: list[str],
) -> None:
    """Write a GGUF file; the conversion is checked in float32, where tokens have to be the same."""
    weights, plain = model_tensors(model), QUANTIZATIONS["F32"]
    engine = llama_cpp.engine_version()
    if reference is not None and engine is None:
        skipped.append(f"the file in llama.cpp, since the package {llama_cpp.SERVER} is not installed.")
        reference = None
    whole = path if kind is plain else path.with_name(f"{path.stem}.float32{path.suffix}")
    needs_whole = kind.name not in DIRECT
    if reference is not None or whole is path or needs_whole:
        float32 = layout_of(
            Skeleton(model, map_of(model), torch.float32), vocabulary, name=layout.metadata[1].value, kind=plain
        )
        write_gguf(float32, weights, whole, plain)
    if reference is not None:
        checks += _check_float32(whole, reference, engine)
    if kind is plain:
        return
    if needs_whole:
        llama_cpp.quantize(whole, path, kind.name)
    else:
        write_gguf(layout, weights, path, kind)
    whole.unlink(missing_ok=True)
    if reference is not None:
        found, _ = _go_on(path, reference)
        agreeing, _ = reference.compare(found)
        what = f"{kind.name}, greedy tokens of {NEW_TOKENS} that transformers in float32 takes there too"
        checks.append(Check(engine=llama_cpp.SERVER, version=engine, what=what, value=agreeing, bound=None))
    if path.stat().st_size != layout.num_bytes(kind):
        logger.warning("%s has %s bytes, %s were predicted.", path.name, path.stat().st_size, layout.num_bytes(kind))


def _check_float32(path: Path, reference: Reference, engine: str | None) -> list[Check]:
    found, read = _go_on(path, reference)
    require(read == list(reference.tokens), "llama.cpp reads a text as other tokens than the tokenizer does")
    agreeing, ties = reference.compare(found)
    what = f"greedy tokens of {len(found)} in float32 that are transformers'"
    require(
        agreeing + ties == len(found),
        f"{agreeing} of {len(found)} greedy tokens are transformers', and {ties} are as likely there",
    )
    return [
        Check(engine=llama_cpp.SERVER, version=engine, what=what, value=agreeing, bound=len(found) - ties),
        Check(engine=llama_cpp.SERVER, version=engine, what="tokens of a text read alike", value=len(read), bound=None),
    ]


def _go_on(path: Path, reference: Reference) -> tuple[list[int], list[int]]:
    """Return the tokens that llama.cpp adds to the prompt, and those it reads the text as."""
    with llama_cpp.serve(path, len(reference.prompt) + NEW_TOKENS + 1) as server:
        return server.go_on(reference.prompt, NEW_TOKENS), server.read(reference.text)


def _write_graph(
    model: PreTrainedModel, path: Path, name: str, reference: Reference | None, checks: list[Check]
) -> None:
    from pat.formats.graph import check_graph, write_onnx, write_openvino  # they load the exporter, which takes seconds

    if name == "onnx":
        write_onnx(model, path)
    else:
        graph = path.with_suffix(".onnx")
        write_onnx(model, graph)
        write_openvino(graph, path)
        for part in list(path.parent.iterdir()):
            if part.name.startswith(graph.name):
                part.unlink()
    if reference is not None:
        checks.append(check_graph(path, "onnxruntime" if name == "onnx" else "openvino", reference))
