"""The learning loop on problems small enough to know the gradient."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from grouprl import GRPO, TrainingError
from grouprl.envs import update as module
from grouprl.envs.update import Batch, Terms, UpdateSettings, minibatches, update
from grouprl.learning.parameters import TrainedParameters
from grouprl.machine.busy import AtOnce, Busy
from grouprl.objective import Objective

N_INPUTS, N_ACTIONS = 3, 4


class Descent:
    """Plain gradient descent."""

    def __init__(self, parameters, lr):
        self.parameters, self.lr = parameters, lr

    def step(self):
        self.parameters.load(self.parameters.values() - self.lr * self.parameters.gradient)


class Problem:
    """`n` steps of a linear softmax policy, with everything an update is given."""

    def __init__(self, n=64, seed=0, lr=0.1):
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(n, N_INPUTS, generator=generator)
        self.actions = torch.randint(N_ACTIONS, (n,), generator=generator)
        self.advantages = torch.randn(n, generator=generator)
        self.weights = torch.ones(n)
        self.policy = nn.Linear(N_INPUTS, N_ACTIONS)
        with torch.no_grad():
            self.policy.weight.copy_(torch.randn(N_ACTIONS, N_INPUTS, generator=generator))
            self.policy.bias.zero_()
            self.old = self.policy(self.x).clone()
        self.logp_old = self.logp(self.old, self.actions)
        self.parameters = TrainedParameters(self.policy)
        self.optimizer = Descent(self.parameters, lr)
        self.evaluated: list[int] = []

    @staticmethod
    def logp(logits, actions):
        return logits.log_softmax(-1).gather(-1, actions[:, None])[:, 0]

    def evaluate(self, index):
        self.evaluated.append(len(index))
        logits = self.policy(self.x[index])
        p = logits.softmax(-1)
        kl = (self.old[index].softmax(-1) * (self.old[index].log_softmax(-1) - p.log())).sum(-1)
        return Terms(self.logp(logits, self.actions[index]), -(p * p.log()).sum(-1), kl)

    def run(self, pool=None, threads=1, **settings):
        defaults = {"epochs": 1, "minibatch_size": 64, "max_grad_norm": 1e9}
        of_loss = {name: settings.pop(name) for name in ("beta", "entropy_coef") if name in settings}
        return update(
            Batch(self.evaluate, self.logp_old, self.advantages, self.weights), self.parameters, self.optimizer,
            UpdateSettings(**{**defaults, **settings}, objective=Objective(**of_loss)), np.random.default_rng(5), pool,
            threads,
        )  # fmt: skip


def test_weights_end_to_end_are_a_copy_that_can_be_put_back():
    policy = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    before = [p.detach().clone() for p in policy.parameters()]
    parameters = TrainedParameters(policy)
    values = parameters.values()
    assert values.shape == (parameters.size,) == (2 * 3 + 3 + 3 + 1,)
    values.mul_(2)
    assert all(torch.equal(p, b) for p, b in zip(policy.parameters(), before, strict=True))
    parameters.load(values)
    assert all(torch.equal(p, 2 * b) for p, b in zip(policy.parameters(), before, strict=True))


def test_a_parameter_the_loss_does_not_reach_gets_gradient_zero():
    policy = nn.ModuleList([nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)])
    flat = TrainedParameters(policy)
    gradient = flat.gradient_of(3 * policy[0](torch.ones(1, 1)).sum())
    assert gradient.tolist() == [3.0, 0.0]


@pytest.mark.parametrize(
    ("n", "size", "remainder", "lengths"),
    [
        (200, 32, "keep", [32] * 6 + [8]),
        (200, 32, "spread", [34, 34, 33, 33, 33, 33]),  # 200 / 32 = 6.25: six
        (10, 32, "spread", [10]),
        (10, 32, "keep", [10]),
        (64, 32, "spread", [32, 32]),
    ],
)
def test_minibatches_are_a_partition_of_the_stated_sizes(n, size, remainder, lengths):
    parts = minibatches(n, size, remainder, np.random.default_rng(0))
    assert [len(part) for part in parts] == lengths
    assert sorted(torch.cat(parts).tolist()) == list(range(n))
    assert torch.cat(parts).tolist() != list(range(n))


def test_one_step_of_gradient_descent_is_the_one_computed_by_hand():
    problem = Problem()
    start = problem.parameters.values()
    logits = problem.old.clone().requires_grad_()
    loss = -(problem.logp(logits, problem.actions) * problem.advantages).mean()  # ratio 1: the plain policy gradient
    (by_logits,) = torch.autograd.grad(loss, logits)
    gradient = torch.cat([(by_logits.T @ problem.x).reshape(-1), by_logits.sum(0)])
    stats = problem.run()
    assert_close(problem.parameters.values(), start - 0.1 * gradient)
    assert stats.grad_norm == pytest.approx(float(gradient.norm()), rel=1e-5)
    assert stats.policy_loss == pytest.approx(-float(problem.advantages.mean()), rel=1e-5)
    assert (stats.epochs, stats.optimizer_steps, stats.clip_fraction) == (1, 1, 0.0)


FULL = {"beta": 0.3, "entropy_coef": 0.1, "epochs": 3}


@pytest.mark.parametrize("micro_batch", [1, 7, 63])
def test_splitting_a_minibatch_for_memory_changes_nothing(micro_batch):
    whole, split = Problem(), Problem()
    a = whole.run(**FULL)
    b = split.run(**FULL, micro_batch=micro_batch)
    assert max(split.evaluated[:-1]) <= micro_batch  # the last one looks at the divergence
    assert_close(split.parameters.values(), whole.parameters.values(), atol=1e-6, rtol=0)
    assert_close(torch.tensor(list(vars(a).values())), torch.tensor(list(vars(b).values())), atol=1e-5, rtol=0)


@pytest.mark.parametrize("threads", [2, 3])
def test_splitting_a_minibatch_among_threads_changes_nothing(threads, monkeypatch):
    monkeypatch.setattr(module, "MIN_PART", 8)
    whole, split = Problem(), Problem()
    a = whole.run(**FULL)
    with ThreadPoolExecutor(threads) as pool:
        b = split.run(pool, threads, **FULL)
    assert len(split.evaluated) > len(whole.evaluated)
    assert_close(split.parameters.values(), whole.parameters.values(), atol=1e-6, rtol=0)
    assert_close(torch.tensor(list(vars(a).values())), torch.tensor(list(vars(b).values())), atol=1e-5, rtol=0)


def test_threads_give_the_same_bits_every_time(monkeypatch):
    monkeypatch.setattr(module, "MIN_PART", 8)
    results = []
    for _ in range(3):
        problem = Problem()
        with ThreadPoolExecutor(3) as pool:
            problem.run(pool, 4, **FULL)
        results.append(problem.parameters.values())
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_parts_that_one_thread_does_one_after_another_give_the_same_bits(monkeypatch):
    monkeypatch.setattr(module, "MIN_PART", 8)
    results = []
    for pool in (ThreadPoolExecutor(3), AtOnce()):
        problem = Problem()
        with pool:
            problem.run(pool, 4, **FULL)
        results.append(problem.parameters.values())
    assert torch.equal(*results)


def test_an_error_in_a_thread_is_raised(monkeypatch):
    monkeypatch.setattr(module, "MIN_PART", 8)
    problem = Problem()
    good, main = problem.evaluate, module.torch.get_num_threads  # noqa: F841

    def evaluate(index):
        if 0 not in index:
            raise ValueError("part failed")
        return good(index)

    problem.evaluate = evaluate
    with ThreadPoolExecutor(2) as pool, pytest.raises(ValueError, match="part failed"):
        problem.run(pool, 2)


def test_a_step_of_weight_zero_is_as_if_it_were_not_there_and_weights_scale():
    half, masked = Problem(32), Problem(32)
    masked.weights = torch.cat([torch.full((16,), 2.0), torch.zeros(16)])  # mean 1
    for name in ("x", "actions", "advantages", "weights", "logp_old", "old"):
        setattr(half, name, getattr(half, name)[:16])
    half.run(**FULL | {"epochs": 1})
    masked.run(**FULL | {"epochs": 1})
    assert_close(masked.parameters.values(), half.parameters.values(), atol=1e-6, rtol=0)
    none = Problem(32)
    none.weights = torch.zeros(32)
    before = none.parameters.values()
    none.run(**FULL)
    assert torch.equal(none.parameters.values(), before)


def test_the_epochs_end_once_the_policy_has_moved_too_far():
    free, stopped, patient = Problem(lr=1.0), Problem(lr=1.0), Problem(lr=1.0)
    assert free.run(epochs=6).epochs == 6
    stats = stopped.run(epochs=6, kl_stop=1e-4)
    assert (stats.epochs, stats.optimizer_steps) == (1, 1)
    assert stats.approx_kl > 1e-4
    assert patient.run(epochs=6, kl_stop=1e9).epochs == 6
    assert torch.equal(patient.parameters.values(), free.parameters.values())


def test_an_epoch_that_leaves_the_trust_region_far_behind_is_undone(monkeypatch):
    monkeypatch.setattr("grouprl.envs.update.UNDO_EPOCH_ABOVE", 3.0)
    one, two = Problem(lr=0.1), Problem(lr=0.1)
    after_one = one.run(epochs=1, kl_stop=1e9).approx_kl
    reached = two.run(epochs=2, kl_stop=1e9).approx_kl
    assert reached > 3.0 * after_one > 0.0
    for stop, undone in ((reached / 2.9, False), (reached / 3.1, True)):  # after one epoch it is below either
        problem = Problem(lr=0.1)
        stats = problem.run(epochs=6, kl_stop=stop)
        assert (stats.epochs, stats.approx_kl) == (2, reached)  # what was attempted is what is reported
        assert torch.equal(problem.parameters.values(), (one if undone else two).parameters.values())


def test_a_first_epoch_that_is_undone_leaves_the_policy_as_it_was():
    problem, before = Problem(lr=1e4), Problem().parameters.values()
    assert problem.run(epochs=6, kl_stop=0.01).epochs == 1
    assert torch.equal(problem.parameters.values(), before)


def test_the_reported_divergence_is_that_of_old_to_new_on_the_sampled_actions():
    problem = Problem()
    stats = problem.run()
    with torch.no_grad():
        log_ratio = problem.logp(problem.policy(problem.x), problem.actions) - problem.logp_old
        by_hand = float((log_ratio.exp() - 1 - log_ratio).mean())
    assert by_hand > 0
    assert stats.approx_kl == pytest.approx(by_hand, rel=1e-4)


def test_clipping_bounds_the_global_norm_and_keeps_the_direction():
    free, bounded = Problem(lr=1.0), Problem(lr=1.0)
    start = free.parameters.values()
    norm = free.run().grad_norm
    stats = bounded.run(max_grad_norm=norm / 4)
    moved, less = start - free.parameters.values(), start - bounded.parameters.values()
    assert stats.grad_norm == pytest.approx(norm)  # reported as it was before clipping
    assert float(less.norm()) == pytest.approx(norm / 4, rel=1e-4)
    assert_close(less, moved / 4, rtol=1e-3, atol=1e-6)
    # The norm is over all parameters at once, as torch's own clipping takes it.
    reference = nn.Linear(N_INPUTS, N_ACTIONS)
    reference.weight.grad, reference.bias.grad = moved[:12].view(4, 3).clone(), moved[12:].clone()
    torch.nn.utils.clip_grad_norm_(reference.parameters(), norm / 4)
    assert_close(less, torch.cat([reference.weight.grad.reshape(-1), reference.bias.grad]), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_raises_and_leaves_the_parameters(bad):
    problem = Problem()
    problem.advantages[5] = bad
    before = problem.parameters.values()
    with pytest.raises(TrainingError, match=r"(gradient|loss) is"):
        problem.run()
    assert torch.equal(problem.parameters.values(), before)


def test_the_clip_fraction_counts_the_steps_whose_gradient_is_cut():
    problem = Problem(4)
    problem.advantages = torch.tensor([1.0, 1.0, -1.0, -1.0])
    # ratios 1.5, 0.5, 1.5, 0.5 at clip 0.2: the first and the last are cut
    problem.logp_old = problem.logp_old - torch.tensor([1.5, 0.5, 1.5, 0.5]).log()
    stats = problem.run()
    assert stats.clip_fraction == 0.5
    assert stats.policy_loss == pytest.approx(-(1.2 + 0.5 - 1.5 - 0.8) / 4, rel=1e-5)


def test_beta_and_entropy_enter_with_their_signs():
    for settings, better in (({"beta": 5.0}, "kl"), ({"entropy_coef": 5.0}, "entropy")):
        plain, pulled = Problem(lr=0.3), Problem(lr=0.3)
        plain.run(epochs=20)
        pulled.run(epochs=20, **settings)
        index = torch.arange(64)
        with torch.no_grad():
            a, b = plain.evaluate(index), pulled.evaluate(index)
        if better == "kl":
            assert float(b.kl.mean()) < 0.5 * float(a.kl.mean())
        else:
            assert float(b.entropy.mean()) > float(a.entropy.mean()) + 0.1


def test_a_busy_machine_changes_no_number_and_uses_no_second_thread(monkeypatch):
    monkeypatch.setattr(module, "MIN_PART", 64)
    weights = []
    for busy in (True, False):
        monkeypatch.setattr(Busy, "__call__", lambda _, busy=busy: busy)
        agent = GRPO("CartPole-v1", preset=None, n_envs=4, collect="segments", n_steps=128, threads=2)
        used = []
        submit = agent.loop.learner.pool.submit
        monkeypatch.setattr(agent.loop.learner.pool, "submit", lambda *a, u=used, s=submit: (u.append(1), s(*a))[1])
        agent.learn(5000)
        assert bool(used) is not busy
        weights.append(agent.loop.learner.parameters.values())
    assert torch.equal(*weights)
