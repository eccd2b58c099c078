"""The teacher: where it comes from, what it says of the training rows, and the loss that learns from it."""
