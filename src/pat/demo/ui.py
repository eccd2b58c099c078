"""The demo in a browser: choose a ratio, see the plan, run it, and talk to base and small model side by side.

The page is served to this machine alone. It asks nobody for anything: no share link, no statistics, and a policy that
keeps the browser from loading what is not served here.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from pat.demo.options import ADDRESS, RATIO
from pat.errors import PatError, one_line
from pat.plan.command import run_plan
from pat.plan.options import PlanOptions
from pat.report import numbers
from pat.report.progress import current
from pat.report.table import Table
from pat.training.arguments import build_arguments
from pat.training.outcome.results import TuneResult
from pat.training.tune import run_tune

POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'"
)
"""The browser loads from this server alone, whatever the page names."""

MAX_NEW_TOKENS = 60
MAX_LETTERS = 10_000
"""Longest question that is put to the models; a longer one would keep them busy for minutes."""
SECONDS_BETWEEN_LOOKS = 0.5


@dataclass
class Session:
    """The base model of the page, and what its runs have left."""

    base: Path
    output_dir: Path
    flags: dict[str, Any]
    """Flags of `pat tune` for every run."""
    result: TuneResult | None = None
    _models: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    _running: threading.Lock = field(default_factory=threading.Lock)
    """Held by the thread of a run, whether or not a page still looks at it."""

    def plan(self, ratio: float) -> str:
        """Return the table of a ratio, or the reason why there is none."""
        try:
            plan = run_plan(PlanOptions(model_name_or_path=str(self.base), pruning_ratio=[ratio]))
        except PatError as error:
            return str(error)
        (small,) = plan.candidates
        sizes = plan.base.total, small.cost.total
        rows = [
            ("parameters", *(numbers.count(size.num_parameters) for size in sizes)),
            (f"file in {plan.dtype}", *(numbers.size(size.num_bytes) for size in sizes)),
            ("reads", "1.00x", f"{small.prefill_speedup:.2f}x"),
            ("writes", "1.00x", f"{small.decode_speedup:.2f}x"),
        ]
        return f"{small.shape.describe()}\n\n" + Table("", ("", "base", "small"), rows).to_markdown()

    def run(self, ratio: float, num_steps: float | None) -> Iterator[str]:
        """Tune and prune; yield what is done now, and in the end what came of it."""
        if not num_steps or num_steps < 1:
            yield f"Got {num_steps or 'no'} steps; expected at least 1."
            return
        if not self._running.acquire(blocking=False):
            yield "A run is going on already; wait for its end."
            return
        folder = self.output_dir / f"{RATIO}{ratio:g}-steps-{num_steps:g}"
        outcome: list[TuneResult | Exception] = []

        def work() -> None:
            try:
                given = self.flags | {"pruning_ratio": ratio, "max_steps": int(num_steps), "output_dir": folder}
                given |= {"model_name_or_path": str(self.base)}
                outcome.append(run_tune(build_arguments(**given)))
            except Exception as error:  # shown on the page, which goes on
                outcome.append(error)
            finally:
                self._running.release()

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        while thread.is_alive():
            yield current() or "Working"
            thread.join(SECONDS_BETWEEN_LOOKS)
        (found,) = outcome
        if isinstance(found, Exception):
            yield f"The run has failed: {one_line(found)}"
            return
        self.result = found
        self._models.pop("small", None)
        yield _summary(found)

    def answers(self, question: str | None) -> tuple[str, str]:
        """Return the greedy answers of base and small model, or the reasons why there are none."""
        if question is None or not question.strip():
            return "", ""
        if len(question) > MAX_LETTERS:
            return (f"Got a question of {len(question):,} letters; expected at most {MAX_LETTERS:,}.",) * 2
        small = "Run first: there is no small model yet."
        if self.result is not None:
            small = self._answer("small", self.result.model_dir, question)
        return self._answer("base", self.base, question), small

    def _answer(self, name: str, folder: Path, question: str) -> str:
        try:
            return self._generate(name, folder, question)
        except Exception as error:  # such as a folder that is gone; the page goes on
            return f"No answer: {one_line(error)}"

    def _generate(self, name: str, folder: Path, question: str) -> str:
        if name not in self._models:
            loaded = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
            self._models[name] = loaded
        model, tokenizer = self._models[name]
        inputs = tokenizer(question, return_tensors="pt")
        if tokenizer.chat_template is not None:
            chat = [{"role": "user", "content": question}]
            inputs = tokenizer.apply_chat_template(
                chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        num_tokens, limit = inputs["input_ids"].shape[1], getattr(model.config, "max_position_embeddings", None)
        if limit is not None and num_tokens + MAX_NEW_TOKENS > limit:
            return f"Got a question of {num_tokens:,} tokens; expected at most {max(0, limit - MAX_NEW_TOKENS):,}."
        output = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        answer = tokenizer.decode(output[0, num_tokens:], skip_special_tokens=True)
        return str(answer).strip()


def serve(session: Session, *, ratio: float, num_steps: int, port: int | None = None, block: bool = True) -> Any:
    """Serve the page until it is interrupted, or return at once; return gradio's blocks."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "0"  # read when gradio is imported
    import gradio  # an extra
    from starlette.middleware import Middleware

    with gradio.Blocks(title="PAT", analytics_enabled=False) as blocks:
        gradio.Markdown(f"# Fine-tune {session.base.name} and get it back smaller")
        with gradio.Row():
            with gradio.Column():
                chosen = gradio.Slider(0.05, 0.4, value=ratio, step=0.025, label="Share of all parameters to cut")
                steps = gradio.Number(num_steps, precision=0, minimum=1, label="Optimizer steps")
                start = gradio.Button("Run", variant="primary")
                state = gradio.Markdown("Nothing has run yet.", elem_id="state")
            plan = gradio.Markdown(session.plan(ratio), elem_id="plan")
        question = gradio.Textbox(label="Ask both models", submit_btn="Ask")
        with gradio.Row():
            base = gradio.Textbox(label="Base", interactive=False, lines=6)
            small = gradio.Textbox(label="Small", interactive=False, lines=6)
        chosen.change(session.plan, chosen, plan)
        start.click(session.run, [chosen, steps], state, concurrency_limit=1)
        question.submit(session.answers, question, [base, small], concurrency_limit=1)
    fonts = ["system-ui", "sans-serif"]
    blocks.launch(
        server_name=ADDRESS,
        server_port=port,
        share=False,
        prevent_thread_lock=not block,
        theme=gradio.themes.Default(font=fonts, font_mono=["ui-monospace", "monospace"]),
        app_kwargs={"middleware": [Middleware(_Guard)]},
    )
    return blocks


class _Guard:
    """Adds the policy to every answer of the server, and says what gradio fails at in one line (ASGI)."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        started = False

        async def guarded(message: Any) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        try:
            await self.app(scope, receive, guarded if scope["type"] == "http" else send)
        except Exception as error:  # of requests that the page does not make: a traceback tells nobody anything
            if scope["type"] != "http":
                raise
            line = f"The request to {scope['path']!r} has failed: {one_line(error)}"  # a path may hold line breaks
            print(line, file=sys.stderr, flush=True)
            body = b"" if started else f"{line}\n".encode()
            if not started:
                headers = [(b"content-type", b"text/plain; charset=utf-8")]
                await guarded({"type": "http.response.start", "status": 500, "headers": headers})
            await send({"type": "http.response.body", "body": body})


def _summary(result: TuneResult) -> str:
    base, small = result.figures["base"], result.figures["dense"]
    rows = [
        ("parameters", numbers.count(base.num_parameters), numbers.count(small.num_parameters)),
        ("held-out loss", numbers.loss(base.held_out_nll), numbers.loss(small.held_out_nll)),
        ("loss on general text", numbers.loss(base.general_nll), numbers.loss(small.general_nll)),
    ]
    return Table("", ("", "base", "small"), rows).to_markdown() + f"\n\nThe model is in `{result.model_dir}`."
