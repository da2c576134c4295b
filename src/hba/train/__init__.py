"""One file a stage, and the one loop that they share."""
