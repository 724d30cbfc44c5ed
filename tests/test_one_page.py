"""The one-page example: as short as it says, its update is the library's, and it learns."""

import ast
import copy
import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

PAGE = Path(__file__).parents[1] / "examples" / "grpo_in_one_page.py"
page = SimpleNamespace(**runpy.run_path(str(PAGE)))


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def batch_of_the_page(inputs_of, n_actions: int):
    """Four groups of three samples, of 2 to 6 steps; every step has a reward of its own."""
    lengths = torch.tensor([3, 5, 2, 6, 4, 4, 2, 3, 6, 5, 4, 2])
    steps = int(lengths.sum())
    return page.Batch(
        inputs_of(steps), torch.randint(n_actions, (steps,)), torch.randn(steps), lengths, torch.arange(12) // 3
    )


def test_it_is_one_page_and_takes_the_mathematics_alone_from_the_library():
    text = PAGE.read_text()
    assert len(text.splitlines()) <= 150
    imported = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Import | ast.ImportFrom)]
    names = [n.module if isinstance(n, ast.ImportFrom) else alias.name for n in imported for alias in n.names]
    assert {name for name in names if name.startswith("grouprl")} == {"grouprl.objective"}


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_its_update_of_an_environment_is_the_library_s(beta):
    from grouprl.envs.adam import Adam
    from grouprl.envs.update import Batch, Terms, UpdateSettings, update
    from grouprl.learning.parameters import TrainedParameters
    from grouprl.objective import Objective, outcome, sample_mean

    model, reference = (nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2)).double() for _ in range(2))
    start, ours = weights(model), copy.deepcopy(model)
    states = torch.randn(46, 4, dtype=torch.float64)
    batch = batch_of_the_page(lambda steps: lambda m: m(states), 2)
    page.update(model, reference, torch.optim.Adam(model.parameters(), 1e-2), batch, 3, beta)

    with torch.no_grad():
        old, ref = batch.log_probs(ours), batch.log_probs(reference)

    def evaluate(rows):
        logp = torch.log_softmax(ours(states[rows]), 1).gather(1, batch.actions[rows, None])[:, 0]
        return Terms(logp, logp_ref=ref[rows])

    parameters = TrainedParameters(ours)
    stats = update(
        Batch(
            evaluate, old, outcome(batch.rewards, batch.lengths, batch.group), 46 * sample_mean(batch.lengths)
        ),
        parameters, Adam(parameters, 1e-2),
        UpdateSettings(epochs=3, minibatch_size=46, objective=Objective(beta=beta), max_grad_norm=1.0),
        np.random.default_rng(0),
    )  # fmt: skip
    assert stats.optimizer_steps == 3
    assert float((weights(model) - start).abs().max()) > 0.02  # three steps of 0.01
    assert_close(weights(ours), weights(model), atol=1e-7, rtol=0)


def test_its_update_of_a_language_model_is_the_library_s():
    from transformers import LlamaConfig, LlamaForCausalLM

    from grouprl.learning.parameters import TrainedParameters
    from grouprl.lm.generate.samples import Samples
    from grouprl.lm.learn.optimizer import make_optimizer
    from grouprl.lm.learn.step import Step, optimizer_step
    from grouprl.lm.policy.policy import Policy
    from grouprl.lm.prompts import Prompt
    from grouprl.lm.settings.config import GRPOConfig
    from grouprl.objective import Objective, outcome

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model, reference = (LlamaForCausalLM(LlamaConfig(vocab_size=len(page.WORDS), **sizes)) for _ in range(2))
    start, ours = weights(model), copy.deepcopy(model)
    prompts = ["a1", "b4", "c2"]
    with torch.no_grad():
        batch = page.completions(model, [p for p in prompts for _ in range(4)], torch.arange(12) // 4)
    assert len(batch.lengths.unique()) > 2
    page.update(model, reference, torch.optim.Adam(model.parameters(), 1e-2), batch, 3, 0.3)

    config = GRPOConfig(
        use_cpu=True, bf16=False, loss_type="grpo", beta=0.3, kl_estimator="k3", learning_rate=1e-2, weight_decay=0.0,
        max_grad_norm=1.0, max_completion_length=6,
    )  # fmt: skip
    parameters = TrainedParameters(ours)
    policy = Policy(ours, SimpleNamespace(eos_token_id=page.END, pad_token_id=page.END), config, reference)
    n, steps = len(batch.lengths), len(batch.actions)
    samples = Samples(
        prompts=[Prompt(i, p, {}, tuple(page.WORDS.index(w) for w in p)) for i, p in enumerate(prompts)],
        group=batch.group, completions=[c.tolist() for c in batch.actions.split(batch.lengths.tolist())],
        finished=torch.ones(n).bool(), logp_sampled=torch.zeros(steps), texts=[""] * n, rewards=torch.zeros(n, 1),
        returns=torch.zeros(n), advantages=outcome(batch.rewards, batch.lengths, batch.group),
        logp_old=torch.zeros(steps), logp_ref=torch.zeros(steps), known_old=torch.zeros(steps).bool(),
        known_ref=torch.zeros(steps).bool(),
    )  # fmt: skip
    optimizer, step = (
        make_optimizer(parameters, config),
        Step(policy, samples, torch.arange(n), config, Objective.of(config)),
    )
    with parameters.written_in_place():
        for _ in range(3):
            optimizer_step(step, parameters, optimizer, remember=True, on_gradient=lambda: None)
    moved = float((weights(model) - start).abs().max())
    assert moved > 0.02
    difference = (weights(ours) - weights(model)).norm() / (weights(model) - start).norm()
    assert difference < 1e-3  # Adam divides by the size of the gradient, which lets float32 rounding grow


def test_the_score_by_hand():
    assert page.score("b3", "bbb.") == 1.0
    assert page.score("b3", "bb.") == 0.5  # two of four places
    assert page.score("b3", "bbbbbb") == 0.5  # three of six
    assert page.score("a1", ".") == 0.0


@pytest.mark.parametrize("seed", [1, 2])
def test_the_pole_stays_up_for_longer(seed):
    torch.manual_seed(seed)
    means = page.learn_cartpole(updates=14, seed=seed)
    assert means[0] < 40
    assert max(means[-3:]) > 80


def test_the_language_model_does_as_its_prompt_says():
    means = page.learn_language(updates=35, size=8)
    assert means[0] < 0.2
    assert max(means[-3:]) > 0.5
