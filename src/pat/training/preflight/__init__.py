"""What is found out and said before training: rehearsal, arithmetic, threads, expected time, too few rows."""
