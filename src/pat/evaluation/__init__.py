"""Evaluation: how well a model predicts responses and plain text."""
