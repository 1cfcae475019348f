"""The page in a real browser, against a server that draws the world exactly: what is clicked is what is seen."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streamgen.worlds import grammar
from streamgen.worlds.checker import Reading
from tests.browser.mock_server import Mock, Running
from tests.browser.pictures import Sight

pytestmark = pytest.mark.slow

GREEN = "two large green circles bouncing over a grass background"
YELLOW = "a large yellow ring moving left over a sunset background"
RED = "a large red star spinning over a snow background"
NAVY = "a large white square moving right over a navy background"
Visit = Callable[..., Sight]


def shown(reading: Reading) -> tuple[str | None, ...]:
    return reading.color, reading.shape, reading.background


def said(mock: Running, kind: str) -> list[dict[str, Any]]:
    return [message for message in mock.mock.heard if message["type"] == kind]


def test_first_frame_and_a_switch(visit: Visit, mock: Running) -> None:
    page = visit(mock.url)  # under the server's content security policy
    page["#apply"].click()
    page.wait("playing")
    page.caption(GREEN)
    page.later_than(0.5)
    assert page["#link .text"].inner_text() == "Playing"
    page.play(YELLOW)
    page.caption(YELLOW)
    page["[data-figure=seen]"].filter(has_text="s").wait_for()
    (change,) = said(mock, "session.interaction")
    assert change["interaction"]["apply_at"] == "playhead" and change["interaction"]["transition"] == "recache"


def test_a_full_machine_shows_the_place_in_the_line(visit: Visit, mock: Running) -> None:
    mock.mock.places = [2, 1]
    page = visit(mock.url)
    page["#apply"].click()
    for text in ("In the queue: place 2", "In the queue: next", "Playing"):
        page["#link .text"].filter(has_text=text).wait_for()
    assert said(mock, "session.start")[0]["wait_seconds"] == 120
    assert page["#trouble"].inner_text() == ""


def test_pixels_follow_the_prompt(visit: Visit, mock: Running) -> None:
    page = visit(mock.url, bypass_csp=True)
    page.play(GREEN)
    page.caption(GREEN)
    assert shown(page.reading()) == ("green", "circle", "grass")
    page.play(RED)
    page.caption(RED)
    assert shown(page.reading()) == ("red", "star", "snow")


def test_pause_step_and_play(visit: Visit, mock: Running) -> None:
    page = visit(mock.url, bypass_csp=True)
    page.play(NAVY)
    page.later_than(1.5)
    page["#play"].click()
    page.wait("paused")
    still, at_s = page.picture(), page.seconds()
    page.page.wait_for_timeout(300)
    assert np.array_equal(page.picture(), still) and page.seconds() == at_s
    for _ in range(8):
        page["#back"].click()
    page.page.wait_for_function("s => document.querySelector('#clock').value.endsWith(s)", arg=f"{at_s - 0.5:.1f}"[-2:])
    assert not np.array_equal(page.picture(), still)
    for _ in range(8):
        page["#forth"].click()
    page.page.wait_for_function("s => document.querySelector('#clock').value.endsWith(s)", arg=f"{at_s:.1f}"[-2:])
    assert np.array_equal(page.picture(), still)
    assert len(said(mock, "session.pause")) == 1 and not said(mock, "session.seek")
    page["#play"].click()
    page.later_than(at_s + 2.5)
    assert len(said(mock, "session.play")) == 1


def test_remake_from_the_past(visit: Visit, mock: Running) -> None:
    page = visit(mock.url, bypass_csp=True)
    page.play(GREEN)
    page.later_than(4)
    page["#play"].click()
    page.look_at(2)
    page.play(RED)
    page.caption(RED)
    (seek,) = said(mock, "session.seek")
    assert seek["position_seconds"] == 2.0
    assert 2.0 <= page.seconds() < 4.0
    assert shown(page.reading()) == ("red", "star", "snow")
    marks = page["#timeline .mark:visible"].all_inner_texts()
    assert marks == [GREEN, RED]


def test_branch_shows_two_stories(visit: Visit, mock: Running) -> None:
    page = visit(mock.url, bypass_csp=True)
    page.play(GREEN)
    page.later_than(1)
    page["#branch"].click()
    page.page.wait_for_selector(".tile[data-name=B][data-state=playing]")
    page.play(RED)
    page.caption(RED)
    assert page[".tile"].count() == 2
    page.caption(GREEN, ".tile[data-name=A]")
    assert shown(page.reading(".tile[data-name=A]")) == ("green", "circle", "grass")
    assert shown(page.reading(".tile[data-name=B]")) == ("red", "star", "snow")
    page["[aria-label='Close stream A']"].click()
    assert page[".tile"].count() == 1
    page.later_than(page.seconds() + 0.5)


def test_a_lost_connection_is_taken_up_again(visit: Visit, mock: Running) -> None:
    page = visit(mock.url, bypass_csp=True)
    page.allowed = ["WebSocket connection to", "ERR_CONNECTION_REFUSED"]
    page.play(NAVY)
    page.later_than(1)
    mock.stop()
    page.wait("retrying")
    again = Running(mock.mock, mock.port)
    try:
        page.wait("playing")
        page.later_than(page.seconds() + 2)
        (resume, *_rest) = said(again, "session.resume")
        assert resume["last_frame"] >= 15 and resume["resume_token"] == "token-1"
        assert len(said(again, "session.start")) == 1
        assert shown(page.reading()) == ("white", "square", "navy")
    finally:
        again.stop()


def test_a_server_without_memory_starts_the_stream_again(visit: Visit, mock: Running) -> None:
    page = visit(mock.url, bypass_csp=True)
    page.allowed = ["WebSocket connection to", "ERR_CONNECTION_REFUSED"]
    page.play(NAVY)
    page.later_than(1)
    mock.stop()
    page.wait("retrying")
    again = Running(Mock(), mock.port)
    try:
        page.wait("playing")
        page["#trouble"].filter(has_text="starts again").wait_for()
        (start,) = said(again, "session.start")
        assert start["prompt"] == NAVY
        assert shown(page.reading()) == ("white", "square", "navy")
    finally:
        again.stop()


def test_two_tabs_never_share_a_frame(visit: Visit, mock: Running) -> None:
    one = visit(mock.url, bypass_csp=True)
    two = visit(mock.url, context=one.page.context)
    one.play(GREEN)
    two.play(RED)
    one.page.bring_to_front()
    one.caption(GREEN)
    assert shown(one.reading()) == ("green", "circle", "grass")
    two.page.bring_to_front()
    two.caption(RED)
    assert shown(two.reading()) == ("red", "star", "snow")
    assert len(mock.mock.sessions) == 2


def test_keyboard_alone(visit: Visit, mock: Running) -> None:
    page = visit(mock.url, bypass_csp=True)
    keys = page.page.keyboard
    keys.press("/")
    keys.press("Control+a")
    keys.type(NAVY)
    keys.press("Enter")
    page.later_than(1)
    keys.press("Escape")
    keys.press("Space")
    page.wait("paused")
    at_s = page.seconds()
    keys.press("ArrowLeft")
    keys.press("ArrowLeft")
    page.page.wait_for_function("at => Number(document.querySelector('#clock').value.split(':')[1]) < at", arg=at_s)
    keys.press("l")
    page.wait("playing")
    keys.press("b")
    page.page.wait_for_selector(".tile[data-name=B][data-state=playing]")
    keys.press("1")
    assert page[".tile[data-chosen]"].get_attribute("data-name") == "A"
    keys.press("?")
    page["#keys"].wait_for()
    keys.press("Escape")
    page["#keys"].wait_for(state="hidden")
    reached = set()
    for _ in range(80):
        keys.press("Tab")
        reached.add(page.page.evaluate("document.activeElement.id || document.activeElement.className"))
    assert {"prompt", "apply", "play", "branch", "record", "track", "steps", "fps", "seed", "share"} <= reached


def test_prompts_on_the_timeline(visit: Visit, mock: Running) -> None:
    page = visit(mock.url, bypass_csp=True)
    page.play(GREEN)
    page.later_than(0.5)
    page["#play"].click()  # time stands: nothing is sent meanwhile
    page.wait("paused")
    page["#prompt"].fill(RED)
    page["#prompt"].press("Shift+Enter")
    mark = page["#timeline .mark[data-stage=planned]"]
    first = float(re.search(r"from ([\d.]+) s", mark.get_attribute("aria-label"))[1])  # type: ignore[index]
    box = mark.bounding_box()
    page.page.mouse.move(box["x"] + 20, box["y"] + 10)
    page.page.mouse.down()
    page.page.mouse.move(box["x"] + 120, box["y"] + 10, steps=5)
    page.page.mouse.up()
    dragged = float(re.search(r"from ([\d.]+) s", mark.get_attribute("aria-label"))[1])  # type: ignore[index]
    assert dragged > first + 2
    mark.press("Shift+ArrowLeft")
    page["#news"].filter(has_text="Planned for").wait_for(state="attached")
    page["#play"].click()
    page.caption(RED)
    (change,) = said(mock, "session.interaction")
    assert change["interaction"]["at_seconds"] == pytest.approx(dragged - 1, abs=0.01)
    assert page.seconds() >= dragged - 1 - 0.75


def test_a_planned_prompt_can_be_removed(visit: Visit, mock: Running) -> None:
    page = visit(mock.url, bypass_csp=True)
    page.play(GREEN)
    page.later_than(0.2)
    page["#play"].click()
    page.wait("paused")
    page["#prompt"].fill(RED)
    page["#later"].click()
    page["#timeline .mark[data-stage=planned]"].press("Delete")
    page["#timeline .mark[data-stage=planned]"].wait_for(state="detached")
    page["#play"].click()
    page.later_than(7)
    assert not said(mock, "session.interaction")


def test_unknown_words_are_answered_with_the_servers_text(visit: Visit, mock: Running) -> None:
    page = visit(mock.url, bypass_csp=True)
    page.play("a llama in space")
    page["#trouble"].filter(has_text="no word that this model knows").wait_for()
    page.wait("failed")
    page.play(GREEN)
    page.caption(GREEN)
    page.play("a llama in space")
    page["#trouble"].filter(has_text="no word that this model knows").wait_for()
    page.later_than(page.seconds() + 0.5)
    assert page["#trouble"].get_attribute("role") == "alert"


def test_a_shared_link_makes_the_same_stream(visit: Visit, mock: Running) -> None:
    page = visit(mock.url, bypass_csp=True)
    page["#seed"].fill("41")
    page["#transition label"].filter(has_text="Blend").click()
    page["#blend"].fill("6")
    page.play(GREEN)
    page.later_than(0.3)
    page["#prompt"].fill(RED)
    page["#later"].click()
    page["#share"].click()
    page.page.wait_for_function("location.hash.length > 10")
    link = page.page.url
    assert "token" not in link.lower()
    other = visit(link, bypass_csp=True)
    other.caption(GREEN)
    assert other["#seed"].input_value() == "41"
    other.caption(RED)
    starts = said(mock, "session.start")
    assert [(s["prompt"], s["seed"]) for s in starts] == [(GREEN, 41), (GREEN, 41)]
    change = next(m["interaction"] for m in said(mock, "session.interaction") if m["interaction"].get("at_seconds"))
    assert (change["transition"], change["transition_chunks"]) == ("blend", 6)


@pytest.mark.parametrize("fragment", ["#p=", "#p=zero~cut~x&seed=-4", "#seed=1e99", "#p=0~magic~x", "#%E0%A4%A"])
def test_a_broken_link_is_no_more_than_the_page(visit: Visit, mock: Running, fragment: str) -> None:
    page = visit(mock.url + fragment, bypass_csp=True)
    assert page[".tile"].get_attribute("data-state") == "idle"
    page.play()
    page.caption(GREEN)


@pytest.mark.parametrize("where", ["mp4", "here"])
def test_record_and_download(visit: Visit, mock: Running, tmp_path: Path, where: str) -> None:
    page = visit(mock.url, bypass_csp=True)
    page.play(GREEN)
    page.later_than(0.3)
    page["#format"].select_option(where)
    page["#record"].click()
    page["#record[aria-pressed=true]"].wait_for()
    page.later_than(page.seconds() + 1.5)
    with page.page.expect_download() as download:
        page["#record"].click()
    file = tmp_path / "clip"
    download.value.save_as(file)
    assert download.value.suggested_filename == f"streamgen-7.{'webm' if where == 'here' else 'mp4'}"
    if where == "mp4":
        assert file.read_bytes() == b"recording"
        return
    import av

    with av.open(str(file)) as video:
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    assert len(frames) > 5 and frames[0].shape == (512, 512, 3)
    assert frames[-1][..., 1].mean() > frames[-1][..., 0].mean()  # grass


def test_controls_reach_the_server(visit: Visit, mock: Running) -> None:
    page = visit(mock.url, bypass_csp=True)
    page["#fps"].fill("24")
    page["#seed"].fill("5")
    page.play(GREEN)
    page.later_than(0.2)
    (start,) = said(mock, "session.start")
    assert (start["fps"], start["seed"], start["format"]) == (24, 5, "jpeg")
    page["#steps"].fill("2")
    page["[data-figure=steps]"].filter(has_text="2").wait_for()
    page["#steps"].fill("0")
    page["[data-figure=steps]"].filter(has_text="4").wait_for()
    assert [m["steps"] for m in said(mock, "session.steps")] == [2, None]
    page[".chip[data-word=blue]"].click()
    page.caption(GREEN.replace("green", "blue"))
    assert page[".chip[data-word=blue]"].get_attribute("aria-pressed") == "true"
    assert page[".chip[data-word=green]"].get_attribute("aria-pressed") == "false"


def test_words_are_the_worlds(visit: Visit, mock: Running) -> None:
    page = visit(mock.url, bypass_csp=True)
    words = page.page.evaluate("import('./words.js').then(m => m.WORDS)")
    assert {name: tuple(values) for name, values in words.items()} == dict(
        zip(grammar.ATTRIBUTES, grammar.AXES, strict=True)
    )
    sentences = [caption.text for caption in grammar.all_captions()[::37]]
    again = page.page.evaluate(
        "texts => import('./words.js').then(m => texts.map(t => m.sentence(m.wordsIn(t))))", sentences
    )
    assert again == sentences


@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_fits_the_screen_and_everything_has_a_name(visit: Visit, mock: Running, scheme: str) -> None:
    page = visit(mock.url, bypass_csp=True, color_scheme=scheme)
    page.play(GREEN)
    page.caption(GREEN)
    for width in (1440, 768, 390, 340):
        page.page.set_viewport_size({"width": width, "height": 844})
        assert page.page.evaluate("document.documentElement.scrollWidth <= innerWidth"), width
    dark = page.page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", dark)[:3])) < 200) is (scheme == "dark")
    tree = page["body"].aria_snapshot()
    kinds = "button|textbox|slider|spinbutton|combobox|checkbox|radio|img"
    assert not re.findall(rf"- ({kinds})(?: \[[^\]]*\])*:?$", tree, re.MULTILINE), tree
    assert f'img "Video: {GREEN}"' in tree
