"""Short versions of the soaks that maintainers run for an hour (soak_kill.py)."""
from soak_kill import soak


def test_runs_that_are_killed_at_random_moments_are_as_if_nothing_had_happened():
    rounds, sent = soak(20, seed=0)
    assert rounds >= 1 and sent >= 1, (rounds, sent)
