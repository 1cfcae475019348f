"""Prompts over time: a pure function of what was added."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamgen.errors import UserError
from streamgen.timeline import TRANSITIONS, PromptTimeline


def test_versions_hold_from_their_block_on_and_transitions_start_once() -> None:
    timeline = PromptTimeline("a")
    assert timeline.add("b", 4, "recache") == 1
    assert timeline.add("c", 6, "scene") == 2
    cues = [timeline.at(block) for block in range(8)]
    assert [cue.prompt for cue in cues] == list("aaaabbcc")
    assert [cue.version for cue in cues] == [0, 0, 0, 0, 1, 1, 2, 2]
    assert [cue.transition for cue in cues] == [None] * 4 + ["recache", None, "scene", None]
    assert all(cue.mix == ((cue.version, 1.0),) for cue in cues)


def test_of_two_prompts_for_one_block_the_later_holds() -> None:
    timeline = PromptTimeline("a")
    timeline.add("b", 2, "scene")
    timeline.add("c", 2, "cut")
    cue = timeline.at(2)
    assert (cue.prompt, cue.version, cue.transition) == ("c", 2, "cut")


def test_blend_reaches_the_new_text_in_its_last_block() -> None:
    timeline = PromptTimeline("a")
    timeline.add("b", 3, "blend", blend_blocks=4)
    assert timeline.at(2).mix == ((0, 1.0),)
    assert [timeline.at(block).mix for block in (3, 4, 5)] == [
        ((1, 0.25), (0, 0.75)),
        ((1, 0.5), (0, 0.5)),
        ((1, 0.75), (0, 0.25)),
    ]
    assert timeline.at(6).mix == timeline.at(60).mix == ((1, 1.0),)
    assert timeline.at(3).transition == "blend" and timeline.at(4).transition is None


def test_a_blend_starts_from_the_mixture_before_it() -> None:
    timeline = PromptTimeline("a")
    timeline.add("b", 2, "blend", blend_blocks=2)
    timeline.add("c", 3, "blend", blend_blocks=4)
    assert timeline.at(3).mix == ((2, 0.25), (1, 0.375), (0, 0.375))
    timeline.add("d", 4, "cut")
    assert timeline.at(4).mix == ((3, 1.0),)


def test_a_blend_at_the_first_block_has_nothing_to_blend_from() -> None:
    timeline = PromptTimeline("a")
    timeline.add("b", 0, "blend")
    assert timeline.at(0).mix == ((1, 1.0),)


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from(TRANSITIONS), st.integers(1, 9)), max_size=30))
def test_shares_add_up_and_stay_few(entries: list[tuple[int, str, int]]) -> None:
    """Also when every block starts another blend; and a saved timeline is the same function."""
    timeline, block = PromptTimeline("a"), 0
    for gap, transition, blend_blocks in entries:
        block += gap
        timeline.add("b", block, transition, blend_blocks=blend_blocks)
    restored = PromptTimeline.from_state(json.loads(json.dumps(timeline.state_dict())))
    for at in range(block + 10):
        cue = timeline.at(at)
        assert sum(share for _, share in cue.mix) == pytest.approx(1)
        assert cue.mix[0][0] == cue.version and len(cue.mix) <= 60
        assert restored.at(at) == cue


def test_many_overlapping_blends_keep_few_texts() -> None:
    timeline = PromptTimeline("a")
    for block in range(1, 400):
        timeline.add("b", block, "blend", blend_blocks=4)
    assert len(timeline.at(399).mix) < 30


@pytest.mark.parametrize(
    ("block", "transition", "options", "message"),
    [
        (4, "cut", {"earliest": 5}, "block 4 comes too late: the earliest block is 5"),
        (2, "cut", {}, "out of order: block 2 comes before block 3"),
        (-1, "cut", {}, "too late"),
        (4, "fade", {}, "unknown transition 'fade'; there are: cut, recache, blend, scene"),
        (4, "blend", {"blend_blocks": 0}, "at least 1 block"),
    ],
)
def test_mistakes_are_refused(block: int, transition: str, options: dict, message: str) -> None:
    timeline = PromptTimeline("a")
    timeline.add("b", 3)
    with pytest.raises(UserError, match=message):
        timeline.add("c", block, transition, **options)
    assert len(timeline.prompts) == 2
