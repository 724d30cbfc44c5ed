"""Gymnasium environments: collection, policies, the GRPO agent, evaluation."""
