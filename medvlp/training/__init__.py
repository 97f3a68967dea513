"""The training loop with its engine, checkpoints, monitoring and signals. Light to import: no torch here."""
