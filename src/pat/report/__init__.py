"""What a command leaves behind: records of its figures, and how they are shown."""
