"""Flags of the libraries that `pat tune` refuses, and why."""

from __future__ import annotations

from typing import Any

_ONE_RUN = "the processes of a run are one run, whose first process alone writes and speaks"
_NO_METRICS = "it is for a function that computes metrics, which a command line cannot give"

REFUSED: dict[str, tuple[Any, str]] = {
    "use_peft": (True, "`pat tune` trains an adapter in any case"),
    "lora_task_type": ("CAUSAL_LM", "`pat tune` is for causal language models"),
    "model_init_kwargs": (None, "the base is loaded by --dtype, --attn_implementation and --model_revision"),
    "trust_remote_code": (False, "the families are those of transformers, whose own code is used"),
    "dataset_kwargs": (None, "rows are prepared before the trainer sees them"),
    "do_train": (True, "it is for scripts of one's own; `pat tune` trains"),
    "do_eval": (False, "it is for scripts of one's own; --eval_strategy evaluates"),
    "do_predict": (False, "it is for scripts of one's own; `pat evaluate` measures a model"),
    "bf16_full_eval": (False, "the trainer evaluates while it trains, where it has no effect"),
    "fp16_full_eval": (False, "the trainer evaluates while it trains, where it has no effect"),
    "include_for_metrics": ([], _NO_METRICS),
    "batch_eval_metrics": (False, _NO_METRICS),
    "enable_jit_checkpoint": (False, "SIGTERM and SIGINT save a checkpoint in any case"),
    "parallelism_config": (
        None,
        "data are parallel, or sharded over processes (docs/several-gpus.md); models are not cut",
    ),
    "local_rank": (-1, "the launcher says it"),
    "log_on_each_node": (True, _ONE_RUN),
    "log_level_replica": ("warning", _ONE_RUN),
    "save_on_each_node": (False, _ONE_RUN),
    "hub_strategy": ("end", "the finished model is pushed, once"),
    "hub_always_push": (False, "the finished model is pushed, once"),
}
"""Flags of the libraries that would have no effect here: the value that says what is so anyway, and the reason.

All others are passed on to the trainer or used by us; `tests/unit/training/test_arguments.py` lists them.
"""
