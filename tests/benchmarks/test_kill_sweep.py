"""The sweep of kills and the measurement of stalls count what they say. Their runs are tested elsewhere."""

from __future__ import annotations

from benchmarks import kill_sweep, save_stall

GOOD = {
    "moment": "growth",
    "was_running": True,
    "left_half_built": False,
    "loadable": True,
    "nothing_lost": True,
    "same_end": True,
    "nothing_left_over": True,
}


def test_a_kill_is_good_only_if_nothing_went_wrong():
    assert kill_sweep.is_good(GOOD)
    for key in ("loadable", "nothing_lost", "same_end", "nothing_left_over"):
        assert not kill_sweep.is_good({**GOOD, key: False})


def test_the_summary_counts_what_went_wrong():
    summary = kill_sweep.summarise([GOOD, {**GOOD, "same_end": False}, {**GOOD, "nothing_lost": False}])
    assert summary["kills"] == 3 and summary["by_moment"]["growth"] == 3
    assert (summary["not_loadable"], summary["other_losses_or_weights"]) == (0, 1)
    assert summary["lost_what_was_acknowledged"] == 1


def test_a_stall_is_compared_by_medians():
    secs = {"sync": (1.0, 2.0, 9.0), "async": (0.1, 0.3, 0.5)}
    samples = [{"way": way, "stall_secs": stall, "until_saved_secs": 2 * stall} for way in secs for stall in secs[way]]
    summary = save_stall.summarise({"bytes": 1, "samples": samples})
    assert summary["async_over_sync"] == 0.15 and all(summary["kept"].values())
    assert summary["async_until_saved_secs"] == 0.6
