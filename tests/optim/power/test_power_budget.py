"""Pauses by a clock that stands still: how long, how often, and when there is no use in them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from power_trees import FakeTime

from qwen3_vl.optim.power.power_budget import PowerBudget
from qwen3_vl.optim.power.power_meters import CpuTimeMeter


def budget(time, limit):
    return PowerBudget(CpuTimeMeter(time.cpu_time), limit, time.clock)


def test_a_pause_pays_for_what_was_taken(time):
    held = budget(time, 0.25)
    time.work(1.0)
    held.settle(time.sleep)
    assert time.sleeps == [pytest.approx(3.0)]
    held.settle(time.sleep)
    assert len(time.sleeps) == 1


def test_room_is_kept_and_small_debts_wait(time):
    held = budget(time, 0.5)
    time.now += 10.0  # nothing was taken for a while
    time.work(5.0)
    held.settle(time.sleep)
    assert time.sleeps == []
    time.work(10.0004)
    time.now += 5.0
    held.settle(time.sleep)
    assert time.sleeps == [] and held.debt() == pytest.approx(0.0004)
    time.work(0.001)
    held.settle(time.sleep)
    assert time.sleeps == [pytest.approx(0.0014)]


def test_what_is_taken_at_rest_is_paid_for_too(time):
    time.busy_asleep = 0.2
    held = budget(time, 0.5)
    time.work(2.0)
    held.settle(time.sleep)
    # 2 s of debt; each pause leaves 0.2 / 0.5 of it.
    assert time.sleeps[:3] == [pytest.approx(2.0), pytest.approx(0.8), pytest.approx(0.32)]
    assert sum(time.sleeps) == pytest.approx(2.0 / (1 - 0.4), abs=0.01)
    assert held.debt() < 0.001


@pytest.mark.parametrize("at_rest", [0.5, 0.9, 3.0])
def test_a_limit_below_what_rest_takes(time, caplog, at_rest):
    time.busy_asleep = at_rest
    held = budget(time, 0.5 + at_rest / 1000)
    with caplog.at_level("WARNING"):
        for _ in range(50):
            time.work(2.0)
            held.settle(time.sleep)
    assert len(time.sleeps) == 1, "pauses without use, each longer than the last"
    assert sum("cannot be held" in record.message for record in caplog.records) == 1


def test_threads_that_spin_for_a_while_after_their_work(time):
    held, awake = budget(time, 0.5), 0.2

    def sleep(seconds):
        time.sleep(seconds)
        time.cpu += min(seconds, awake)

    for _ in range(40):
        time.work(0.05)
        held.settle(sleep)
    assert held.debt() < 0.6  # short pauses do not help, the debt waits for one that is long enough
    assert sum(time.sleeps) < 40


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    limit=st.floats(0.05, 4.0),
    steps=st.lists(st.tuples(st.floats(0.0, 2.0), st.floats(0.0, 4.0)), min_size=1, max_size=12),
    at_rest=st.floats(0.0, 0.8),
)
def test_the_average_is_held(limit, steps, at_rest):
    time = FakeTime(busy_asleep=at_rest * limit)
    held, cpu, start = budget(time, limit), time.cpu, time.now
    for seconds, busy in steps:
        time.busy = busy
        time.work(seconds)
        held.settle(time.sleep)
        assert time.cpu - cpu <= limit * (time.now - start + 0.00101)
    assert all(seconds >= 0.001 for seconds in time.sleeps)
