"""Raw studies in, verified WebDataset tar shards out, and reading them back. Needs no torch."""
