"""The paper's 14 tasks: where their questions come from, two ways to ask them, and a model's accuracy on them."""

from pat.evaluation.tasks.harness import evaluate_tasks, load_questions
from pat.evaluation.tasks.scores import TaskEvaluation, TaskScore

__all__ = ["TaskEvaluation", "TaskScore", "evaluate_tasks", "load_questions"]
