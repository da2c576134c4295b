"""Predictions, answers, metrics, statistics, and the backends and judges that they come from."""
