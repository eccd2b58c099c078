"""The folder of a run: what it holds, whether that is whole, and where the same command goes on."""
