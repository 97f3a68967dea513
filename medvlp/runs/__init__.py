"""What a run leaves on disk, written and read back. Light to import: no torch here."""
