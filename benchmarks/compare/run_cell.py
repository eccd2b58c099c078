"""One cell of a comparison: tune and prune in the method's order, then measure."""

from __future__ import annotations

import math
import shutil
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from trl import SFTTrainer

from compare.arguments import cell_arguments
from compare.baselines import CALIBRATED, prune
from compare.budget import (
    Target,
    lora_parameters_per_rank,
    lora_rank,
    lora_targets,
    most_of_the_vocabulary,
    pat_rank,
    sizes_within,
    target_of,
)
from compare.cells import Cell, short_name
from compare.config import CompareConfig
from compare.curve import CurveRecorder, forward_parameters
from compare.data import DataFiles, data_files, draw_calibration
from compare.methods import METHODS, TUNED
from compare.results import row_identity
from compare.scoring import Scorer
from pat.data.load import load_training_data
from pat.errors import Diverged, ParityMissed, PatError
from pat.evaluation.harness import evaluate_tasks, load_tasks
from pat.loading import load_base, load_config, load_tokenizer, stored_dtype
from pat.report.records import environment
from pat.training.arguments import TuneArguments
from pat.training.callbacks.guard import FiniteGuard
from pat.training.distillation.distill import DistillingTrainer, Teacher
from pat.training.tune import run_tune


def run_cell(config: CompareConfig, cell: Cell, tuned: Path | None) -> dict[str, Any]:
    """Run a cell and return its row for `results.jsonl`.

    Args:
        config: of the comparison; its data are prepared.
        cell: what to run.
        tuned: where LoRA's tuned model lies (to be pruned, or to teach) or goes (LoRA itself; None if nobody needs it).
    """
    run = _Run(config, cell, tuned)
    started = time.perf_counter()
    try:
        model = run.make_model()
    except Diverged as error:
        run.facts |= {"validation_nll" if cell.search else "held_out_nll": None, "diverged": str(error)}
    except ParityMissed as error:
        if not cell.search:
            raise
        # Weights so large that rounding shows are what too high a rate leaves, which a search is to find out.
        run.facts |= {"validation_nll": None, "diverged": str(error)}
    else:
        run.measure(model)
    run.facts["seconds"] = time.perf_counter() - started
    return {"cell": cell.to_dict(), "identity": row_identity(config, cell), **environment(), **run.facts}


class _Run:
    def __init__(self, config: CompareConfig, cell: Cell, tuned: Path | None) -> None:
        self.config, self.cell, self.tuned = config, cell, tuned
        self.method = METHODS[cell.method]
        self.source = next(model for model in config.models if short_name(model) == cell.model)
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(self.source)
        self.own_tokenizer = self.tokenizer
        """Tokenizer of the cell's model, which need not be the base's."""
        self.files: DataFiles = data_files(config.output_dir / "data" / cell.model)
        self.folder = config.output_dir / "work" / cell.name
        self.facts: dict[str, Any] = {}

    def make_model(self) -> nn.Module:
        """Return the cell's dense model."""
        shutil.rmtree(self.folder, ignore_errors=True)
        arguments = self._arguments()
        order = self.method.order
        if order == "PAT":
            return self._pat(arguments)
        base = self._load(self.source, arguments)
        targets = lora_targets(base)
        budget = self.config.rank * lora_parameters_per_rank(base, targets)
        if order in ("", "FT"):
            model = base if order == "" else self._tune(base, arguments, targets, budget)
            if self.cell.method == TUNED and self.tuned is not None:
                self._keep(model, self.tuned, self.tokenizer)
            return model
        if order == "FT→P":
            del base
            return self._prune(self._load_tuned(arguments), arguments)
        teacher = self._load_tuned(arguments) if self.method.has_teacher else None
        return self._tune(self._prune(base, arguments), arguments, targets, budget, teacher)

    def measure(self, model: nn.Module) -> None:
        """Note the sizes, losses and accuracies of a dense model."""
        model.eval()
        dtype = stored_dtype(load_config(self.source)[0])
        round_weights(model, dtype)
        self.facts["num_parameters"] = _count(model)
        part = "validation" if self.cell.search else "held_out"
        nll = self._scorer(part)(model, self.own_tokenizer)
        # The last step may have ruined the weights without a gradient that tells.
        self.facts[f"{part}_nll"] = nll.nll if math.isfinite(nll.nll) else None
        self.facts[f"num_{part}_tokens"] = nll.num_tokens
        if self.config.tasks is not None and not self.cell.search:
            evaluation = evaluate_tasks(
                model,
                self.own_tokenizer,
                tasks=load_tasks(self.config.tasks, self.config.protocols, self.config.data_dir),
                limit=self.config.limit,
                batch_size=self.config.eval_batch_size,
            )
            self.facts["tasks"] = asdict(evaluation)
        if self.config.keep_models and not self.cell.search:
            self._keep(model.to(dtype), self.config.output_dir / "models" / self.cell.name, self.own_tokenizer)

    def alpha(self, rank: int) -> Any:
        """Return lora_alpha for a rank, so that the scale of LoRA's product is the same for every method."""
        share = rank / self.config.rank
        return self.config.lora_alpha * (math.sqrt(share) if self.config.use_rslora else share)

    # -- parts -------------------------------------------------------------------------------------------------

    def _keep(self, model: nn.Module, target: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """Save a model, whole or not at all: what has the name is taken for finished."""
        partial = target.with_name(f"{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(target, ignore_errors=True)
        cast(Any, model).save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        partial.rename(target)

    def _arguments(self) -> TuneArguments:
        return cell_arguments(self.config, self.cell, source=self.source, train=self.files.train, folder=self.folder)

    def _recorder(self, num_teacher: int = 0) -> CurveRecorder:
        every = None if self.cell.search else self.config.eval_steps
        score = self._scorer("validation") if every else None
        return CurveRecorder(score, every=every, num_teacher=num_teacher)

    def _scorer(self, part: str) -> Scorer:
        return Scorer(getattr(self.files, part), self.tokenizer, self.config.max_length)

    def _load(self, name: str, arguments: TuneArguments) -> nn.Module:
        base: Any = load_base(name, dtype=arguments.model.dtype)
        return cast(nn.Module, base.to(arguments.sft.device))

    def _load_tuned(self, arguments: TuneArguments) -> nn.Module:
        assert self.tuned is not None
        if not self.tuned.is_dir():  # the runner sees to it that only a model that diverged is not there
            raise Diverged("LoRA's model, which was to be pruned or to teach, diverged.")
        return self._load(str(self.tuned), arguments)

    def _pat(self, arguments: TuneArguments) -> nn.Module:
        base = self._load(self.source, arguments)
        budget = self.config.rank * lora_parameters_per_rank(base, lora_targets(base))
        device = arguments.sft.device
        del base
        target = target_of(self.source, self.cell.ratio)
        num_tokens = most_of_the_vocabulary(self.source) if self.method.trims_vocabulary else None
        arguments.run.vocabulary_size = num_tokens
        sizes = sizes_within(self.source, target, arguments.pat_config(), vocabulary_size=num_tokens)
        for name, size in sizes.items():
            setattr(arguments.pat, name, size)
        rank, num_trainable = pat_rank(arguments, budget)
        arguments.model.lora_r, arguments.model.lora_alpha = rank, self.alpha(rank)
        recorder = self._recorder()
        result = run_tune(arguments, [recorder], chooses_threads=False)  # as many as the worker was given
        self.facts |= {
            "rank": rank,
            "num_trainable": num_trainable,
            "trainable_budget": budget,
            "tune_seconds": result.record.timings["train_seconds"],
            "hidden_size": result.record.cut.hidden_size,
            "pruned_hidden_size": result.record.cut.pruned_hidden_size,
            "intermediate_size": result.record.cut.intermediate_size,
            "pruned_intermediate_size": result.record.cut.pruned_intermediate_size,
            "pruning": result.record.cut.describe(),
            "parity": asdict(result.parity),
            **recorder.facts(),
        }
        dense: Any = AutoModelForCausalLM.from_pretrained(result.model_dir, dtype=arguments.model.dtype)
        self.own_tokenizer = load_tokenizer(str(result.model_dir))
        shutil.rmtree(self.folder)
        return cast(nn.Module, dense.to(device))

    def _tune(
        self,
        model: nn.Module,
        arguments: TuneArguments,
        targets: list[str],
        budget: int,
        teacher: nn.Module | None = None,
    ) -> nn.Module:
        rank = lora_rank(model, targets, budget, dora=bool(arguments.model.use_dora))
        set_seed(self.cell.seed)
        adapter = LoraConfig(
            task_type="CAUSAL_LM",
            r=rank,
            lora_alpha=self.alpha(rank),
            lora_dropout=self.config.lora_dropout,
            use_rslora=self.config.use_rslora,
            use_dora=arguments.model.use_dora,
            target_modules=targets,
        )
        peft_model = get_peft_model(cast(Any, model), adapter)
        self.facts |= {
            "rank": rank,
            "num_trainable": sum(p.numel() for p in peft_model.parameters() if p.requires_grad),
            "trainable_budget": budget,
        }
        data = load_training_data(self.files.train, tokenizer=self.tokenizer, held_out=0)
        recorder = self._recorder(0 if teacher is None else forward_parameters(teacher))
        make: Any = SFTTrainer
        if teacher is not None:
            weight = self.config.distill_weight
            make = partial(
                DistillingTrainer,
                teacher=Teacher(cast(Any, teacher)),
                **({} if weight is None else {"distill_weight": weight}),
            )
        trainer = make(
            model=cast(Any, peft_model),
            args=arguments.sft,
            train_dataset=data.train,
            processing_class=self.tokenizer,
            callbacks=[FiniteGuard(), recorder],
        )
        started = time.perf_counter()
        trainer.train()
        self.facts |= {"tune_seconds": time.perf_counter() - started, **recorder.facts()}
        merged: nn.Module = peft_model.merge_and_unload()
        shutil.rmtree(self.folder, ignore_errors=True)
        return merged

    def _prune(self, model: nn.Module, arguments: TuneArguments) -> nn.Module:
        target: Target = target_of(self.source, self.cell.ratio)
        method = cast(str, self.method.baseline)
        calibration = (
            draw_calibration(self.config, self.tokenizer, self.files, self.cell.seed) if method in CALIBRATED else []
        )
        started = time.perf_counter()
        pruned = prune(
            method,
            cast(PreTrainedModel, model),
            target_parameters=target.num_parameters,
            pruned_hidden_size=target.pruned_hidden_size,
            calibration=calibration,
            seed=self.cell.seed,
        )
        self.facts |= {
            "hidden_size": target.hidden_size,
            "pruned_hidden_size": target.pruned_hidden_size,
            "prune_seconds": time.perf_counter() - started,
            "target_parameters": target.num_parameters,
            "pruning": pruned.description,
        }
        return cast(nn.Module, pruned.model)


def round_weights(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Round to the dtype that a checkpoint would be written in, so that no method is measured more finely than PAT."""
    if dtype is not None:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype).to(parameter.dtype)


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def failed_row(config: CompareConfig, cell: Cell, error: BaseException) -> Mapping[str, Any]:
    """Return the row of a cell that could not be run."""
    reason = " ".join(str(error).split())
    if not isinstance(error, PatError):
        reason = f"{type(error).__name__}: {reason}"
    folder = config.output_dir / "failed"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{cell.name}.txt").write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    return {"cell": cell.to_dict(), "identity": row_identity(config, cell), "failed": reason[:500]}
