"""The page on the real server with the shipped model: what a visitor meets, also when the server dies under them."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import av
import numpy as np
import pytest

from tests.browser.pictures import Sight

pytestmark = pytest.mark.slow

GREEN = "two large green circles bouncing over a grass background"
YELLOW = "a large yellow circle moving left over a sunset background"
RED = "a large red circle moving right over a snow background"
Visit = Callable[..., Sight]


class Server:
    """`streamgen serve` in a process of its own."""

    def __init__(self, folder: Path) -> None:
        with closing(socket.socket()) as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.folder, self.log = folder, folder / "serve.log"
        self.url = f"http://127.0.0.1:{self.port}/"
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "streamgen", "serve", "--port", str(self.port), "--no-admission"]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [*command, "--save-dir", str(self.folder / "saved"), "--save-every", "1"], stdout=log, stderr=log
            )

    def ready(self, timeout_s: float = 90) -> None:
        until_s = time.monotonic() + timeout_s
        while time.monotonic() < until_s:
            assert self.process.poll() is None, self.log.read_text()
            with suppress(OSError), urllib.request.urlopen(f"{self.url}readyz", timeout=5):
                return
            time.sleep(0.2)
        raise AssertionError(f"not ready: {self.log.read_text()}")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, browser: object) -> Iterator[Server]:
    running = Server(tmp_path_factory.mktemp("serve"))
    running.ready()
    yield running
    running.kill()


def test_first_frame_and_a_switch_under_the_servers_own_policy(visit: Visit, server: Server) -> None:
    page = visit(server.url)
    page["#apply"].click()
    page.wait("playing")
    page.caption(GREEN)
    page["#clock"].filter(has_text="0:02.").wait_for()
    page.play(YELLOW)
    page.caption(YELLOW)
    page["[data-figure=seen]"].filter(has_text="s").wait_for()
    page["[data-figure=slack]"].filter(has_text="s").wait_for()
    page.play(f"{YELLOW} zigzagging")
    page["#trouble"].filter(has_text="unknown word 'zigzagging'").wait_for()


def test_pixels_follow_the_prompt(visit: Visit, server: Server) -> None:
    page = visit(server.url, bypass_csp=True)
    page.play(GREEN)
    page.caption(GREEN)
    page.later_than(1)
    before = page.reading()
    assert (before.background, before.color) == ("grass", "green")
    page.play(RED)
    page.caption(RED)
    page.later_than(page.seconds() + 1.5)
    after = page.reading()
    assert (after.background, after.color) == ("snow", "red")


def test_h264_is_decoded_to_the_same_story(visit: Visit, server: Server) -> None:
    """As JPEG: pixels follow the prompt, a step back shows what was there, a branch and a remade past play on."""
    page = visit(server.url, bypass_csp=True)
    if page.page.evaluate("import('./h264.js').then((it) => it.decodesH264())") is not True:
        pytest.skip("this browser does not decode H.264")
    page["#video"].select_option("m4s")
    page.play(GREEN)
    page.caption(GREEN)
    page.later_than(2)
    assert page.reading().background == "grass"
    page["#branch"].click()
    page.page.wait_for_selector(".tile[data-name=B][data-state=playing]")
    page.play(RED)
    page.caption(RED)
    page.later_than(page.seconds() + 1.5)
    assert page.reading(".tile[data-name=B]").background == "snow"
    page["#play"].click()
    page.wait("paused")
    page.look_at(1)
    past = page.picture(".tile[data-name=B]")
    assert past[48:, :, 1].mean() > past[48:, :, 2].mean()  # grass
    page["#remake"].click()
    page.later_than(2.5)
    assert page["#trouble"].inner_text() == ""


def test_a_decoder_that_gives_up_is_followed_by_jpeg(visit: Visit, server: Server) -> None:
    page = visit(server.url, bypass_csp=True)
    if page.page.evaluate("import('./h264.js').then((it) => it.decodesH264())") is not True:
        pytest.skip("this browser does not decode H.264")
    spoil = """() => {
      const decode = VideoDecoder.prototype.decode;
      VideoDecoder.prototype.decode = function (chunk) {
        if (chunk.timestamp < 20) return decode.call(this, chunk);
        return decode.call(this, new EncodedVideoChunk({ type: "key", timestamp: 0, data: new Uint8Array(9) }));
      };
    }"""
    page.page.evaluate(spoil)
    page["#video"].select_option("m4s")
    page.play(GREEN)
    page["#trouble"].filter(has_text="goes on with JPEG").wait_for()
    page.later_than(3)
    assert page.reading().background == "grass"


def test_pause_back_and_another_story(visit: Visit, server: Server) -> None:
    page = visit(server.url, bypass_csp=True)
    page.play(GREEN)
    page.later_than(3)
    page["#play"].click()
    page.wait("paused")
    still = page.picture()
    page.page.wait_for_timeout(400)
    assert np.array_equal(page.picture(), still)
    page.look_at(2)
    page.play(RED)
    page.caption(RED)
    assert page.seconds() < 3
    page.later_than(4.5)
    assert page.reading().background == "snow"
    assert page["#trouble"].inner_text() == ""


def test_remade_frames_are_the_same_frames(visit: Visit, server: Server) -> None:
    """Nothing changed, so the past comes again to the bit (one encoder, one quality: equal bytes, equal pixels)."""
    page = visit(server.url, bypass_csp=True)
    page.play(GREEN)
    page.later_than(2.5)
    page["#play"].click()
    page.wait("paused")
    page.look_at(2)
    first = page.picture()
    page.look_at(1)
    page["#remake"].click()
    page.later_than(2.2)
    page["#play"].click()
    page.wait("paused")
    page.look_at(2)
    assert np.array_equal(page.picture(), first)


def test_branch(visit: Visit, server: Server) -> None:
    page = visit(server.url, bypass_csp=True)
    page.play(GREEN)
    page.later_than(3)
    page["#branch"].click()
    page.page.wait_for_selector(".tile[data-name=B][data-state=playing]")
    page.play(RED)
    page.caption(RED)
    page.later_than(page.seconds() + 1.5)
    assert page.reading(".tile[data-name=B]").background == "snow"
    assert page.reading(".tile[data-name=A]").background == "grass"


def test_two_tabs(visit: Visit, server: Server) -> None:
    one = visit(server.url, bypass_csp=True)
    two = visit(server.url, context=one.page.context)
    two.play(RED)
    one.page.bring_to_front()
    one.play(GREEN)
    one.caption(GREEN)
    assert one.reading().background == "grass"
    two.page.bring_to_front()
    two.caption(RED)
    assert two.reading().background == "snow"


def test_a_recording_is_a_video(visit: Visit, server: Server, tmp_path: Path) -> None:
    page = visit(server.url, bypass_csp=True)
    page.play(GREEN)
    page.later_than(0.5)
    page["#record"].click()
    page["#record[aria-pressed=true]"].wait_for()
    page.later_than(page.seconds() + 2)
    with page.page.expect_download() as download:
        page["#record"].click()
    download.value.save_as(tmp_path / "clip.mp4")
    with av.open(str(tmp_path / "clip.mp4")) as video:
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    assert len(frames) >= 24 and frames[0].shape == (64, 64, 3)
    assert frames[-1][48:, :, 1].mean() > frames[-1][48:, :, 2].mean()  # grass


def test_a_killed_server_comes_back_and_the_stream_goes_on(visit: Visit, browser: object, tmp_path: Path) -> None:
    server = Server(tmp_path)
    try:
        server.ready()
        page = visit(server.url, bypass_csp=True)
        page.allowed = ["WebSocket connection to", "ERR_CONNECTION"]
        page.play(RED)
        page.later_than(4)
        server.kill()
        page.wait("retrying")
        at_s = page.seconds()
        server.start()
        page.page.wait_for_function("document.querySelector('.tile').dataset.state === 'playing'", timeout=90_000)
        page.later_than(at_s + 2)
        assert page["#trouble"].inner_text() == ""  # it did not begin again
        assert page.reading().background == "snow"
    finally:
        server.kill()
