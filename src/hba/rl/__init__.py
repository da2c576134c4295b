"""Reinforcement learning: rewards, advantages, losses, and the engine that runs them on one machine."""
