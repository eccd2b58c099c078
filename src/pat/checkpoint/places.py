"""Names of what lies in the folder of a run, and in that of its compact model."""

MODEL, ADAPTER, COMPACT = "model", "adapter", "compact"
"""Folders: of a dense model, of an adapter, and of the compact model, which has folders of the first two names."""

CHECKPOINTS, STAGE_TWO = "checkpoints", "compact"
"""Folder of the trainer's checkpoints, and the one below it of those of stage two."""

RECORD, RESULTS, REPORT, RUN_FILE = "compaction.json", "results.json", "report.html", "run.json"
"""Files: what a compact model was made by, what a command came to, a page that shows it, and what a run is."""

HELD_OUT = ("held_out.jsonl", "held_out_2.jsonl", "held_out_3.jsonl")
"""Files of the rows that were held out of the data, one for each form that they have."""

NAMES = (MODEL, ADAPTER, COMPACT, CHECKPOINTS, *HELD_OUT, RESULTS, REPORT, RUN_FILE)
"""Everything that a run leaves. `run.json` is removed last, since by it the rest is known to be ours."""
