"""Published checkpoints of other programs, and single backbones, as run folders."""
