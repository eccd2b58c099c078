"""Inputs of a training: rows of the data as examples with token ids, also streamed, and text to calibrate on."""
