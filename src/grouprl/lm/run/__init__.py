"""What train-lm, evaluate, chat and resume do: recipes and run folders."""
