"""Training: the recipe of `pat tune`, from options and data to the tuned model and its folder."""
