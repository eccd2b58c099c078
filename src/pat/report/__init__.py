"""The results of commands: records for programs, tables for people."""
