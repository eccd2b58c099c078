"""Sizes and costs of a pruned model, before any training and from the base model's configuration alone."""
