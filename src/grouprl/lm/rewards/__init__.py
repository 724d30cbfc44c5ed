"""Rewards of completions: `call` runs the reward functions a user gives to the trainer."""
