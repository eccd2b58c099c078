"""What a pruned model will be and cost, before any training and from the base model's configuration alone."""

from pat.plan.command import Plan, make_plan
from pat.plan.tables import print_plan

__all__ = ["Plan", "make_plan", "print_plan"]
