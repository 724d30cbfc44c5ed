"""Episodes of several turns, in text: tools and environments that a language model acts in."""
