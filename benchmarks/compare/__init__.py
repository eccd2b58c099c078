"""Methods x ratios x seeds under one budget, and the table and figures of it."""
