"""The programs, one verb a file, each read from top to bottom."""
