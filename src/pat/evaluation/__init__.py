"""Evaluation: how well a model predicts responses and plain text, and answers the questions of the paper's tasks."""
