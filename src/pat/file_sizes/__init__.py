"""File sizes of a model by format and type, and how a GGUF file is laid out, from the configuration alone."""
