"""From samples to batches: the prompt of a row, its encoding, the order of an epoch, the loader."""
