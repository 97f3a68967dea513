"""From shards to batches: global order, reading, text, transforms, collation."""
