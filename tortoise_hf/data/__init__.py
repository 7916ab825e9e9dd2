"""From a folder of recordings to batches: read, check, split, cache, sample, collate."""
