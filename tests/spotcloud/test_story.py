"""``hf-spot provision --watch`` on the local spot cloud, from the job file to the bill; the long story is a command."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.servers import SeaweedFS
from tests.spotcloud.cloud import BY_ITSELF
from tests.spotcloud.machine import why_not
from tests.spotcloud.market import RECLAIMED
from tests.spotcloud.story import PLAIN, SHORT, Story, long_story

WITHOUT_MACHINES = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


@pytest.mark.slow
@WITHOUT_MACHINES
def test_a_training_that_is_moved_to_another_region_type_and_market_ends_with_the_same_model(
    tmp_path: Path, seaweedfs: SeaweedFS, plain_in_peace: Path
) -> None:
    with Story(tmp_path, seaweedfs, PLAIN, SHORT, speed=100, say=print, twin=plain_in_peace) as story:
        outcome = story.play()
    assert outcome.identical, outcome
    assert outcome.pools == [act.pool for act in SHORT]  # and none twice, though --watch was killed as one was launched
    assert outcome.reasons == [RECLAIMED, RECLAIMED, BY_ITSELF]
    assert outcome.lost[0] == 0  # it was told
    assert 0 <= outcome.lost[1] <= 10  # what came after the last save, or the one before
    assert (outcome.left_running, outcome.untagged, outcome.unwritten, outcome.templates) == ([], [], [], 0)
    for costs in (outcome.spent_usd, outcome.charged_usd):
        assert [cost > 0 for cost in costs] == [False, False, True]  # EC2 gives away what it takes back within an hour


def test_the_long_story_has_everything_whatever_the_seed() -> None:
    for seed in range(50):
        acts = long_story(seed)
        assert len([act for act in acts if act.until is not None]) >= 5
        assert {act.pool.region for act in acts} == {"us-east-1", "us-west-2"}
        assert len({act.pool.instance_type for act in acts}) == 2
        assert [act.pool.market for act in acts] == ["spot"] * (len(acts) - 1) + ["on-demand"]
        steps = [act.until for act in acts[:-1]]
        assert steps == sorted(steps)  # type: ignore[type-var]
    assert long_story(1) == long_story(1) != long_story(2)
