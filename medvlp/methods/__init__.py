"""Pre-training methods: one file each, registered by name."""
