"""What is wrong with a benchmark if it cannot be done."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pat.benchmark.options import BenchmarkOptions
from pat.errors import PatError
from pat.loading import load_config


def resolved_device(options: BenchmarkOptions) -> torch.device:
    """Return the device that the models run on."""
    if options.device != "auto":
        return torch.device(options.device)
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")


def parse_counts(text: str | int | Sequence[int], flag: str) -> tuple[int, ...]:
    """Read a list of positive whole numbers, such as `1,8,16` or `[1, 8, 16]`.

    Returns:
        The numbers, ascending, each once.

    Raises:
        PatError: it is empty, or something else than a positive whole number is in it.
    """
    items = text.strip("[]() ").replace(",", " ").split() if isinstance(text, str) else text
    try:
        numbers = sorted({int(item) for item in ([items] if isinstance(items, int) else items)})
    except ValueError:
        numbers = []
    if not numbers or numbers[0] < 1:
        raise PatError(f"Got {flag}={text!r}; expected whole numbers above 0 with commas between, such as 1,8,16.")
    return tuple(numbers)


def check_options(options: BenchmarkOptions) -> None:
    """Refuse what cannot be measured before anything is loaded or written.

    Raises:
        PatError: a number, device or dtype that makes no sense, a model that cannot be used, or an output folder that
            is not empty.
    """
    for flag, numbers in (("contexts", options.contexts), ("batch_sizes", options.batch_sizes)):
        parse_counts(numbers, flag)
    for flag, value, least in (
        ("repetitions", options.repetitions, 1),
        ("warmup", options.warmup, 0),
        ("new_tokens", options.new_tokens, 0),
        ("threads", 1 if options.threads is None else options.threads, 1),
    ):
        if value < least:
            raise PatError(f"Got {flag}={value}; expected a whole number from {least}.")
    if options.max_seconds is not None and not options.max_seconds > 0:
        raise PatError(f"Got max_seconds={options.max_seconds}; expected a number above 0.")
    _check_device(options.device)
    if options.dtype is not None:
        resolve_dtype(options.dtype)
    if options.output_dir is not None and options.output_dir.exists():
        if not options.output_dir.is_dir():
            raise PatError(f"Got output_dir={options.output_dir}, which is a file; expected a folder, empty or new.")
        if any(options.output_dir.iterdir()):
            raise PatError(f"{options.output_dir}: the output folder is not empty; choose another one, or empty it.")
    for name in (options.model, options.baseline):
        config, _ = load_config(name)
        if getattr(config, "quantization_config", None) is not None:
            raise PatError(
                f"Got the model {name!r}, which is quantised; expected dense weights, which the predictions are for."
            )


def resolve_dtype(name: str) -> torch.dtype:
    """Return a floating-point dtype by name.

    Raises:
        PatError: there is none of that name.
    """
    dtype = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
        raise PatError(f"Got dtype={name!r}; expected float32, bfloat16 or float16.")
    return dtype


def _check_device(name: str) -> None:
    if name == "auto":
        return
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise PatError(f"Got device={name!r}; expected auto, cpu, or an accelerator such as cuda or cuda:0.") from error
    if device.type == "cpu":
        return
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if (
        accelerator is None
        or accelerator.type != device.type
        or (device.index or 0) >= torch.accelerator.device_count()
    ):
        found = "none" if accelerator is None else f"{torch.accelerator.device_count()} of type {accelerator.type}"
        raise PatError(f"Got device={name!r}, but this machine has no such device (accelerators found: {found}).")
