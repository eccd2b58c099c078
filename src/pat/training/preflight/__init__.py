"""Checks and estimates before training: arguments, a rehearsal, arithmetic, threads, time, too few rows."""
