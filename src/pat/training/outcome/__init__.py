"""What is measured, written and shown of a finished run: figures, samples, results.json, the report."""
