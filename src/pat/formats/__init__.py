"""Models in the forms of other programs: adapters that are read, and files that are written."""
