"""What a pruned model will be and cost, before any training and from the base model's configuration alone."""
