"""The outcome of a run: figures, samples, results.json, the report."""
