"""Policies of small models, for tests."""

from types import SimpleNamespace

import torch
from architectures import EOS, PAD

from grouprl.lm.policy.policy import Policy
from grouprl.lm.settings.config import GRPOConfig

TOKENIZER = SimpleNamespace(eos_token_id=EOS, pad_token_id=PAD)


def policy(model, ref_model=None, **settings) -> Policy:
    config = GRPOConfig(**{"use_cpu": True, "bf16": False, "max_completion_length": 8, **settings})
    return Policy(model, TOKENIZER, config, ref_model)


def adapted(model, **settings):
    from peft import LoraConfig, get_peft_model

    given = {"r": 2, "target_modules": ["q_proj", "v_proj", "up_proj"], "task_type": "CAUSAL_LM", **settings}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return get_peft_model(model, LoraConfig(**given)).eval()
