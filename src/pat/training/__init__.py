"""Training: what a user points at becomes data TRL accepts, the tuned model and the checkpoint."""
