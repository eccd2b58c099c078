"""What a comparison is told: models, data, methods, budget. Ready-made ones lie in `configs/`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from compare.methods import METHODS, TUNED
from pat.errors import PatError
from pat.evaluation.options import PROTOCOLS

CONFIGS = ("tiny", "smollm2", "gpu", "paper")
"""Names of the ready-made comparisons."""


@dataclass(frozen=True)
class CompareConfig:
    """One comparison. Every method sees the same rows in the same order, for the same number of steps."""

    models: tuple[str, ...]
    data: str
    methods: tuple[str, ...]
    output_dir: Path
    ratios: tuple[float, ...] = (0.2, 0.25, 0.3)
    """Shares of the hidden size that PAT cuts; other methods are given the parameters that it then has."""
    ablations: tuple[str, ...] = ()
    """Methods that are run at one ratio alone."""
    ablation_ratio: float = 0.25
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of adapters, row order, and what is random in pruning."""
    learning_rates: tuple[float, ...] = (2e-4, 5e-4, 1e-3)
    """Searched for each method, with the first seed at the ablations' ratio, by the NLL of the validation rows."""
    search_steps: int | None = None
    """Of the runs of that search; by default as long as all others."""
    rank: int = 64
    """Of LoRA on the whole model; the others get the rank whose trainable parameters come closest."""
    lora_alpha: int = 40
    use_rslora: bool = True
    lora_dropout: float = 0.0
    mask_lr_multiplier: float = 40.0
    """Of the paper's recipe: the mask's learning rate over the adapters'. The paper's is 1, which takes thousands of
    steps to make up a mask; for short runs its starting point is 2e-2 beside 5e-4."""
    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 4
    gradient_accumulation_steps: int = 1
    max_length: int = 256
    template: str = "alpaca"
    rows: int | None = None
    """Of the data, at most so many to train on."""
    held_out: int = 400
    validation: int = 100
    tasks: str | None = "paper"
    data_dir: Path | None = None
    protocols: tuple[str, ...] = PROTOCOLS
    limit: int | None = None
    eval_batch_size: int = 16
    calibration_rows: int = 64
    """Sequences of `max_length` tokens that the baselines prune by, drawn by the seed."""
    workers: int = 1
    threads: int | None = None
    """Of each worker; by default what OMP_NUM_THREADS says, else the cores are divided among them."""
    baselines: Path | None = None
    """Folder of the baselines; by default `benchmarks/baselines` of the source tree."""

    def methods_at(self, ratio: float) -> tuple[str, ...]:
        """Return the methods that are run at a ratio; 0.0 stands for those that do not prune."""
        if ratio == 0.0:
            return tuple(name for name in self.methods if not METHODS[name].prunes)
        names = self.methods if ratio in self.ratios else ()
        ablations = self.ablations if ratio == self.ablation_ratio else ()
        return tuple(name for name in dict.fromkeys((*names, *ablations)) if METHODS[name].prunes)

    @property
    def all_methods(self) -> tuple[str, ...]:
        """Every method, in the order of the tables."""
        return tuple(dict.fromkeys((*self.methods, *self.ablations)))

    def identity(self) -> dict[str, Any]:
        """Return what decides a cell's figures: rows of another identity do not belong to this comparison."""
        how = ("output_dir", "workers", "threads", "eval_batch_size", "baselines")
        loose = (*how, "methods", "ablations", "ratios", "seeds", "learning_rates", "models")
        facts = {name: value for name, value in asdict(self).items() if name not in loose}
        facts["data"] = Path(self.data).name
        facts["data_dir"] = None if self.data_dir is None else self.data_dir.name
        return {name: list(value) if isinstance(value, tuple) else value for name, value in facts.items()}


def make_config(options: Mapping[str, Any]) -> CompareConfig:
    """Build and check a comparison from flags; lists may be lists, or strings with commas.

    Raises:
        PatError: something is missing, unknown, or does not fit.
    """
    given = {name: value for name, value in options.items() if value is not None}
    known = {field.name for field in fields(CompareConfig)}
    unknown = sorted(set(given) - known)
    if unknown:
        raise PatError(f"Got the unknown setting(s) {', '.join(unknown)}; expected some of {', '.join(sorted(known))}.")
    for name in ("models", "data", "methods", "output_dir"):
        if name not in given:
            raise PatError(f"--{name} is missing; give it, or a --config that has it (ready-made: {_names(CONFIGS)}).")
    values: dict[str, Any] = {}
    if given.get("tasks") in ("none", ["none"]):
        del given["tasks"]
        values["tasks"] = None
    for name, value in given.items():
        try:
            values[name] = _CONVERT.get(name, str)(value)
        except (ValueError, TypeError) as error:
            raise PatError(f"Got {name}={value!r}, which does not read as {_KINDS.get(name, 'a value')}.") from error
    config = CompareConfig(**values)
    _check(config)
    return config


def config_path(name: str) -> Path | None:
    """Return where a ready-made comparison lies, None if there is none of that name."""
    return Path(__file__).parent / "configs" / f"{name}.yaml" if name in CONFIGS else None


def _check(config: CompareConfig) -> None:
    for name in config.all_methods:
        if name not in METHODS:
            raise PatError(f"Got the method {name!r}; expected some of {_names(METHODS)}.")
    unpruned = [name for name in config.ablations if not METHODS[name].prunes]
    if unpruned:
        raise PatError(f"Got the ablation {unpruned[0]!r}, which does not prune; list it under methods.")
    if any(METHODS[name].order == "FT→P" for name in config.all_methods) and TUNED not in config.methods:
        raise PatError(f"Got a method that prunes after tuning, but not {TUNED!r}, whose models it prunes; add it.")
    for ratio in (*config.ratios, config.ablation_ratio):
        if not 0 < ratio < 1:
            raise PatError(f"Got the ratio {ratio}; expected shares of the hidden size between 0 and 1.")
    if config.ablation_ratio not in config.ratios:
        raise PatError(f"Got ablation_ratio={config.ablation_ratio}; expected one of the ratios, {config.ratios}.")
    if (config.steps is None) == (config.epochs is None):
        raise PatError("Expected either --steps or --epochs, so that every method trains as long.")
    for name in (*_WHOLE, "epochs", "mask_lr_multiplier"):
        value = getattr(config, name)
        if value is not None and value <= 0:
            raise PatError(f"Got {name}={value}; expected a number above 0.")
    if any(rate <= 0 for rate in config.learning_rates):
        raise PatError(f"Got the learning rates {config.learning_rates}; expected numbers above 0.")
    for name in ("models", "methods", "ratios", "seeds", "learning_rates", "protocols"):
        values = getattr(config, name)
        if not values:
            raise PatError(f"Got no {name}; expected at least one.")
        if len(set(values)) < len(values):
            raise PatError(f"Got {name} {', '.join(map(str, values))}; expected each once.")
    if min(config.seeds) < 0:
        raise PatError(f"Got the seed {min(config.seeds)}; expected numbers from 0 on.")
    for protocol in config.protocols:
        if protocol not in PROTOCOLS:
            raise PatError(f"Got the protocol {protocol!r}; expected some of {_names(PROTOCOLS)}.")


def _names(names: Any) -> str:
    return ", ".join(names)


def _items(convert: Callable[[Any], Any]) -> Callable[[Any], tuple[Any, ...]]:
    def split(value: Any) -> tuple[Any, ...]:
        text = value if isinstance(value, str) else ",".join(map(str, value))
        return tuple(convert(part.strip(" []'\"")) for part in text.split(",") if part.strip(" []"))

    return split


def _truth(value: Any) -> bool:
    if str(value).lower() not in ("true", "false"):
        raise ValueError(value)
    return str(value).lower() == "true"


def _path(value: Any) -> Path:
    return Path(str(value)).expanduser()


_WHOLE = (
    *("rank", "lora_alpha", "steps", "search_steps", "batch_size", "gradient_accumulation_steps", "max_length", "rows"),
    *("held_out", "validation", "limit", "eval_batch_size", "calibration_rows", "workers", "threads"),
)
_NUMBERS = ("ablation_ratio", "lora_dropout", "mask_lr_multiplier", "epochs")
_CONVERT: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("models", "methods", "ablations", "protocols"), _items(str)),
    "tasks": lambda value: ",".join(_items(str)(value)),
    **dict.fromkeys(("ratios", "learning_rates"), _items(float)),
    "seeds": _items(int),
    **dict.fromkeys(_WHOLE, int),
    **dict.fromkeys(_NUMBERS, float),
    "use_rslora": _truth,
    **dict.fromkeys(("output_dir", "data_dir", "baselines"), _path),
}
_KINDS: dict[str, str] = {
    **dict.fromkeys(_WHOLE, "a whole number"),
    **dict.fromkeys(_NUMBERS, "a number"),
    **dict.fromkeys(("ratios", "learning_rates"), "numbers"),
    "seeds": "whole numbers",
    "use_rslora": "true or false",
}
