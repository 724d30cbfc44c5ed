"""Statistics of runs, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from grouprl.bench.statistics import common_grid, difference, improvement, interval, iqm, mean_difference, on_grid


def test_the_interquartile_mean_leaves_out_a_quarter_at_each_end() -> None:
    assert iqm(np.array([0.0, 1.0, 2.0, 99.0])) == pytest.approx(1.5)
    assert iqm(np.array([5.0, 7.0])) == pytest.approx(6.0)  # a quarter of two, rounded down, is none


def test_strata_weigh_the_same_whatever_their_numbers_of_runs() -> None:
    # one run of 0 counts as often as the four runs of 1: 0 0 0 0 1 1 1 1, of which two fall away at each end
    assert iqm(np.array([0.0]), np.ones(4)) == pytest.approx(0.5)


def test_the_probability_of_improvement_counts_ties_half_and_subjects_alike() -> None:
    ours, others = [np.array([1.0, 3.0]), np.array([5.0])], [np.array([1.0, 2.0]), np.array([9.0])]
    # first subject: 1 ties 1 and loses to 2, 3 beats both: (0.5 + 0 + 1 + 1) / 4; second: 0
    assert improvement(ours, others) == pytest.approx((2.5 / 4 + 0) / 2)


def test_the_bootstrap_draws_within_each_stratum() -> None:
    # all runs of a stratum are equal, so every resample is the same: the interval is the value
    strata = [np.full(3, 1.0), np.full(5, 9.0)]
    low, high = interval(iqm, strata) or (0, 0)
    assert low == high == iqm(*strata)


def test_an_interval_holds_the_statistic_and_follows_the_spread_of_the_runs() -> None:
    runs = np.arange(10.0)
    low, high = interval(iqm, [runs]) or (0, 0)
    assert runs.min() < low < iqm(runs) < high < runs.max()
    wide = interval(iqm, [10 * runs]) or (0, 0)
    assert wide == pytest.approx((10 * low, 10 * high))


def test_an_interval_of_a_difference_resamples_both_sides() -> None:
    ours, others = [np.array([10.0, 11.0, 12.0])], [np.array([0.0, 1.0, 2.0])]
    low, high = interval(difference, ours, others) or (0, 0)
    assert (low, high) == pytest.approx((8.333, 11.667), abs=0.4)


def test_each_subject_counts_in_the_mean_of_differences() -> None:
    # one subject of four is lost: together its runs are the quarter that an IQM leaves out
    others = [np.ones(4)] * 4
    ours = [np.zeros(4), *others[1:]]
    assert difference(ours, others) == pytest.approx(0)
    assert mean_difference(ours, others) == pytest.approx(-0.25)
    assert interval(mean_difference, ours, others) == pytest.approx((-0.25, -0.25))


def test_one_run_has_no_interval() -> None:
    assert interval(iqm, [np.array([3.0]), np.arange(4.0)]) is None


def test_curves_are_averaged_where_all_of_them_are() -> None:
    curves = [[(0.0, 0.0), (10.0, 10.0)], [(2.0, 1.0), (8.0, 1.0)]]
    assert common_grid(curves, 3).tolist() == [2.0, 5.0, 8.0]
    assert on_grid(curves[0], common_grid(curves, 3)).tolist() == [2.0, 5.0, 8.0]
    assert len(common_grid([[(0.0, 1.0)], [(5.0, 1.0)]])) == 0
