"""From a tuned adapter to a dense checkpoint: write it, prove that it is the tuned model, say where it comes from."""
