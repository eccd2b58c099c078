"""What commands leave behind: records for programs, tables for people."""
