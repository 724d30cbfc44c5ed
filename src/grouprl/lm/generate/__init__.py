"""From prompts to samples with rewards and advantages."""
