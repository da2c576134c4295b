"""RL beyond one machine: the run of `hba train rl` on released verl (>= 0.9.1), through its plug-in points alone.

`config` translates a run for verl, `launch` starts it; both work without verl. What verl loads in its own
processes: `plugin` (everything that is registered by name), `dataset`, `reward`, `trainer`, `model`.
"""
