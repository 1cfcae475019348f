"""`streamgen plan`: charts as the papers draw them, viewers as arithmetic and admission count them, honest refusals."""

import json
from pathlib import Path

import pytest
import torch

from streamgen.errors import UserError
from streamgen.geometry import VideoGeometry
from streamgen.grid import Cell, Grid
from streamgen.launches import Launch, violation
from streamgen.pipeline import StreamPipeline
from streamgen.schedules import Costs, Machine, timeline
from streamgen_infer.admission import Limits, Load, device_load
from streamgen_infer.cli import main
from streamgen_infer.cost_model import CostModel
from streamgen_infer.models.fit import demand as bytes_of
from streamgen_infer.models.fit_sizes import read_sizes
from streamgen_infer.plan import chart
from streamgen_infer.plan import measure as measuring
from streamgen_infer.plan.capacity import Demand, Offer, check_held, grid_of, latent_bytes, offers
from streamgen_infer.plan.card import choose_visibility
from streamgen_infer.plan.measure import in_ms, load_costs, measure
from streamgen_infer.scheduler import Rules
from tests.command_line import one_line
from tests.tiny_model import save_tiny_model

SHAPE = "3 latent frames"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def some_costs() -> CostModel:
    """Four streams in a launch cost 4 ms each, one costs 10; decoding 4."""
    costs = CostModel()
    for rows, ms in ((1, 10), (2, 12), (4, 16)):
        costs.give("forward", SHAPE, rows, ms / 1000)
    costs.give("decode", SHAPE, 1, 0.004)
    return costs


@pytest.fixture(scope="module")
def costs(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("costs") / "costs.json"
    some_costs().save(path)
    return str(path)


# The card.


def test_the_visibility_of_a_schedule() -> None:
    assert choose_visibility("serial", ["clean"], model="m") == "clean"
    assert choose_visibility("step_chain", ["clean", "lagged"], model="m") == "lagged"  # the schedule's order
    assert choose_visibility("step_chain", ["clean", "lagged"], model="m", wanted="clean") == "clean"
    assert choose_visibility("stream_batch", ["clean"], model="m", force=True) == "same_level"
    assert choose_visibility("stream_batch", ["clean"], model="m", wanted="latest", force=True) == "latest"


@pytest.mark.parametrize(
    ("name", "listed", "wanted", "force", "message"),
    [
        (
            "stream_batch",
            ["clean"],
            None,
            False,
            r"needs one of the visibilities same_level, latest, lagged, and the card of m lists clean.*"
            r"it was for: serial, step_chain, layer_ring, interleaved\. --force takes same_level",
        ),
        (
            "serial",
            ["clean", "joint"],
            "latest",
            False,
            "needs visibility latest, and the card of m lists clean, joint",
        ),
        ("rolling", ["clean"], "clean", True, "rolling cannot run visibility clean; it runs: joint"),
        ("tpp", ["clean"], None, True, "'tpp' does not exist; there are: serial"),
    ],
)
def test_what_a_model_was_not_trained_for(
    name: str, listed: list[str], wanted: str | None, force: bool, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        choose_visibility(name, listed, model="m", wanted=wanted, force=force)


# Charts.


def rows_of(name: str, devices: int, **more: object) -> list[str]:
    geometry = VideoGeometry(height=16, width=16, latent_channels=1, block_frames=1)
    values = {"steps": ((4,) * 5,), "visibility": "same_level", "decodes": False, "layers": 2, **more}
    grid = Grid(geometry=geometry, **values)  # type: ignore[arg-type]
    timed = timeline(name, grid, Machine(devices=devices), Costs(passes=(1.0, 1.0)))
    return [row.plain.replace("-", " ").rstrip() for _, row in chart.lines(timed, grid, devices, 400)]


def test_charts_are_the_tick_diagrams() -> None:
    assert rows_of("stream_batch", 1) == [
        "A0  A1  A2  A3  B3  C3  D3  E3",
        "    B0  B1  B2  C2  D2  E2",
        "        C0  C1  D1  E1",
        "            D0  E0",
    ]
    assert rows_of("step_chain", 4) == [
        "A0  B0  C0  D0  E0",
        "    A1  B1  C1  D1  E1",
        "        A2  B2  C2  D2  E2",
        "            A3  B3  C3  D3  E3",
    ]
    serial = rows_of("serial", 1, visibility="clean")
    assert serial[0].startswith("A0  A1  A2  A3  Ac  B0  B1")
    assert rows_of("layer_ring", 2, steps=((1,) * 3,)) == ["A0  B0  C0", "    A0  B0  C0"]
    assert rows_of("rolling", 1, visibility="joint", steps=((2,) * 3,)) == [
        "A0  A1  Ac  B1  Bc  C1  Cc",
        "    B0      C0",
    ]


def test_labels_and_cutting() -> None:
    cells = (Cell(0, 0), Cell(1, 25, 3), Cell(0, 26, 1), Cell(0, 27, kind="recache"), Cell(2, 1, kind="decode"))
    assert [chart.label(cell, 1) for cell in cells] == ["A0", "Z3", "AA1", "ABr", "Bd"]
    assert chart.label(Cell(2, 1), 3) == "2B0"
    geometry = VideoGeometry(height=16, width=16, latent_channels=1, block_frames=1)
    grid = Grid(geometry=geometry, steps=((4,) * 5,), decodes=False)
    timed = timeline("serial", grid, Machine(), Costs())
    assert [len(row) for _, row in chart.lines(timed, grid, 1, 42)] == [39]


def test_show(in_tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "plan",
        "--show",
        "step_chain",
        "--devices",
        "5",
        "--blocks",
        "4",
        "--json",
        "a.json",
        "--png",
        "a.png",
    ]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "step_chain, same_level visibility (Live Avatar)" in out and "device 4                   Ad" in out
    values = json.loads(Path("a.json").read_text())
    assert (values["period"], values["fill"], values["control"]) == (1, 4, [4, 5])
    assert values["resource"] == [1, 1, 1, 1, 0.5] and values["recurrence"] == 1
    assert values["limit"] == "resource: the work of 4 devices, equally busy"
    launches = [
        Launch(one["device"], tuple(one["layers"]), tuple(Cell(*cell) for cell in one["cells"]))
        for one in values["launches"]
    ]
    grid = Grid(
        geometry=VideoGeometry(height=480, width=832, latent_channels=16, first_latent_frames=1),
        steps=((4,) * 4,),
        visibility="same_level",
        window_frames=12,
        sink_frames=3,
        layers=30,
    )
    assert violation(grid, launches, devices=5) is None
    assert Path("a.png").read_bytes().startswith(b"\x89PNG") and not list(Path().glob(".*"))
    assert main(arguments) == 2 and "--png a.png exists" in one_line(capsys)
    assert main([*arguments, "--overwrite"]) == 0


def test_show_of_a_model(in_tmp_path: Path, model: Path, costs: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", str(model), "--costs", costs, "--json", "a.json"]
    assert main(["plan", "--show", "serial", *arguments]) == 0
    values = json.loads(Path("a.json").read_text())
    assert values["unit"] == "ms" and values["steps"] == 2
    assert values["period"] == pytest.approx(3 * 10 + 4) and values["fill"] == pytest.approx(20)
    assert values["peak_frame_layers"] == {"0": 2 * 9}
    capsys.readouterr()
    assert main(["plan", "--show", "stream_batch", *arguments]) == 2
    assert "lists clean" in one_line(capsys)
    assert main(["plan", "--show", "stream_batch", "--force", *arguments]) == 0
    assert json.loads(Path("a.json").read_text())["period"] == pytest.approx(12 + 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--show", "diagonal"], "schedule 'diagonal' does not exist"),
        (["--show", "step_chain", "--devices", "6"], "cannot use 6 devices: a block has 4 passes"),
        (["--show", "layer_ring", "--devices", "31"], "the model has 30 layers"),
        (["--show", "serial", "--devices", "2"], "there are 1 streams"),
        (["--show", "rolling", "--visibility", "clean"], "rolling cannot run visibility clean"),
        (["--show", "serial", "--visibility", "dim"], "--visibility 'dim' does not exist"),
        (["--show", "serial", "--pass-cost", "1,x"], "--pass-cost '1,x': must be numbers above 0"),
        (["--show", "serial", "--pass-cost", "2,1"], "never get cheaper"),
        (["--show", "layer_ring", "--devices", "2", "--speeds", "1"], "--speeds has 1 numbers for 2 devices"),
        (["--show", "rolling", "--model", "TINY", "--force", "--steps", "3"], "window_frames=9: must be at least 10"),
        (["--devices", "0"], "--devices is 0; it must be 1 to 1024"),
        (["--png", "x.png"], "--png draws a schedule"),
        (["--model", "absent"], "does not exist"),
        (["--costs", "absent.json"], "absent.json: cannot be read"),
        (["--dtype", "fp8"], "--dtype 'fp8' does not exist"),
        (["--model", "TINY", "--costs", "COSTS", "--save-costs", "b.json"], "give one of them"),
        (["--model", "TINY", "--costs", "COSTS", "--visibility", "joint"], "lists clean"),
        (
            ["--model", "TINY", "--costs", "COSTS", "--fps", "240", "--memory", "1", "--steps", "4"],
            "a block of 12 frames may take 42.5 ms (85% of the 50 ms that it is on the screen), and takes 54 ms of",
        ),
        (
            ["--model", "TINY", "--costs", "COSTS", "--memory", "1", "--fps", "99", "--streams", "7"],
            "7 viewers cannot be held; 6 can, by interleaved on 1 device: one more would need 112 ms",
        ),
        (
            ["--model", "TINY", "--costs", "COSTS", "--memory", "0.00085", "--streams", "9", "--dtype", "fp32"],
            "9 viewers cannot be held; 8 can, by serial on 1 device: 8 fit into 0.00085 GB per device, 0.02637 MB each",
        ),
    ],
)
def test_mistakes(
    in_tmp_path: Path,
    model: Path,
    costs: str,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = {"TINY": str(model), "COSTS": costs}
    assert main(["plan", *(words.get(word, word) for word in arguments)]) == 2
    assert message in one_line(capsys)


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--help"]) == 0
    out = capsys.readouterr().out
    assert "viewers" in out and "--show" in out


# Capacity.


def demand(model: Path, **more: object) -> Demand:
    sizes = read_sizes(str(model))
    values = {
        "fps": 99.0,
        "steps": 2,
        "devices": 1,
        "most_rows": Rules().max_rows,
        "memory_bytes": 1e9,
        "load": Limits().most_load,
        "costs": in_ms(some_costs(), sizes.geometry, 0.0),
        "block_frames": 12,
        **more,
    }
    return Demand(**values)  # type: ignore[arg-type]


def found_offers(model: Path, asked: Demand, *names: str) -> dict[tuple[str, int], Offer]:
    sizes = read_sizes(str(model))
    visibilities = {n: choose_visibility(n, ["clean", "same_level", "joint"], model="m") for n in names}
    return {(o.schedule, o.devices): o for o in offers(sizes, visibilities, asked, bytes_of(sizes, "fp32"))}


def test_viewers_by_compute(model: Path) -> None:
    """103 of 121 ms may be planned: alone a viewer takes 3 x 10 + 4 ms, among four 3 x 4 + 4."""
    one = found_offers(model, demand(model), "serial", "interleaved", "stream_batch")
    assert one["serial", 1].viewers == one["serial", 1].by_compute == 3
    assert one["interleaved", 1].viewers == 6
    assert one["interleaved", 1].next_one.period == pytest.approx(7 * 16)
    assert one["stream_batch", 1].by_compute == 6  # 12 for both rows of a diagonal, and 4
    assert one["serial", 1].limit == "resource: the work of device 0"
    four = found_offers(model, demand(model, devices=4), "serial", "interleaved", "step_chain", "layer_ring")
    assert four["serial", 1].viewers == 12 and four["interleaved", 1].viewers == 24
    assert ("step_chain", 4) not in four and ("layer_ring", 4) not in four  # two steps and the codec; two layers
    assert four["step_chain", 2].pipelines == four["layer_ring", 2].pipelines == 2
    slow = found_offers(model, demand(model, fps=240.0, steps=4, devices=2), "interleaved")
    assert slow["interleaved", 2].limit_kind == "recurrence" and slow["interleaved", 2].viewers == 0


def test_the_planner_and_admission_agree(model: Path) -> None:
    viewers = found_offers(model, demand(model), "interleaved")["interleaved", 1].viewers
    load = Load(shape=SHAPE, period_s=12 / 99, steps=2, bytes=0)
    assert device_load([load] * viewers, some_costs(), Rules()) <= Limits().most_load
    assert device_load([load] * (viewers + 1), some_costs(), Rules()) > Limits().most_load


def test_viewers_by_memory(model: Path) -> None:
    sizes = read_sizes(str(model))
    needs = bytes_of(sizes, "fp32")
    other = needs.prompt + needs.codec_state + latent_bytes(sizes.geometry, 9)
    weights = needs.transformer + needs.codec + needs.text
    for name, caches in (("serial", 1), ("stream_batch", 2)):  # a window of its own for each of two steps
        enough = weights + max(needs.model_pass * caches, needs.decode) + 3 * (caches * needs.kv + other)
        for memory, viewers in ((enough, 3), (enough - 1, 2)):
            offer = found_offers(model, demand(model, memory_bytes=memory, fps=50.0), name)[name, 1]
            assert (offer.by_memory, offer.viewers, offer.limit) == (viewers, viewers, "memory")
    split = found_offers(model, demand(model, devices=2), "layer_ring")["layer_ring", 2]
    assert split.viewer_bytes == pytest.approx(needs.kv * 2 / 2 + other)
    rows = max(needs.model_pass * 2, needs.decode)
    assert split.fixed_bytes == pytest.approx(weights - needs.transformer / 2 + rows)


def test_bytes_are_those_of_the_objects(model: Path) -> None:
    pipe = StreamPipeline.from_pretrained(model, dtype="fp32")
    sizes = read_sizes(str(model))
    stream = pipe.stream("a red star", seed=0, max_blocks=4)
    for _ in stream:
        pass
    offer = found_offers(model, demand(model), "serial")["serial", 1]
    text = sum(k.nbytes + v.nbytes for k, v in pipe.transformer.encode_text(torch.zeros(1, 1, 8, 8)).kv)
    state = stream.state
    assert state.codec is not None
    held = [*state.codec.values(), *state.recent.values()]
    assert offer.viewer_bytes == state.cache.nbytes() + text + sum(tensor.nbytes for tensor in held)
    grid = grid_of(sizes, "clean", ((2, 2),))
    assert (grid.window_frames, grid.sink_frames, grid.layers) == (9, 1, 2)


@pytest.mark.slow
def test_a_published_model(in_tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Wan 1.3B, never downloaded: 12 latent frames of 1560 tokens, 184 320 B each, in 3-frame blocks of 12 frames."""
    some_costs().save(Path("costs.json"))
    arguments = ["plan", "--model", "wan_1_3b", "--costs", "costs.json", "--dtype", "bf16", "--memory", "80"]
    assert main([*arguments, "--json", "a.json"]) == 0
    values = json.loads(Path("a.json").read_text())
    window = read_sizes("wan_1_3b").scheduler.window_frames
    one = next(offer for offer in values["offers"] if offer["schedule"] == "serial")
    assert one["viewer_bytes"] > window * 1560 * 184_320
    assert one["fixed_bytes"] > 2 * 1.3e9 and values["block_ms"] == 750


def test_what_a_new_viewer_gets_by_load(in_tmp_path: Path, model: Path, costs: str) -> None:
    arguments = ["plan", "--model", str(model), "--costs", costs, "--memory", "1", "--json", "a.json", "--overwrite"]
    assert main(arguments) == 0
    low, full = json.loads(Path("a.json").read_text())["choices"]
    assert low["viewers"] == 1 and low["schedule"] == "serial" and low["visibility"] == "clean" and low["holds"]
    assert full["viewers"] > 1 and full["schedule"] == "interleaved" and full["control_s"] == low["control_s"]


def test_refusals_name_the_limit(model: Path) -> None:
    asked = demand(model, fps=240.0, steps=4, devices=2)
    found = list(found_offers(model, asked, "serial", "interleaved").values())
    with pytest.raises(UserError, match=r"takes 45 ms of interleaved.*recurrence: a block begins when the one before"):
        check_held(found, asked, None)
    small = demand(model, memory_bytes=1000.0)
    with pytest.raises(UserError, match="1e-06 GB per device are too little"):
        check_held(list(found_offers(model, small, "serial").values()), small, None)
    check_held(list(found_offers(model, demand(model), "serial").values()), demand(model), 3)


# Costs.


def test_costs_of_a_file(costs: str, tmp_path: Path) -> None:
    geometry = VideoGeometry(height=32, width=32, latent_channels=4)
    curve = in_ms(load_costs(Path(costs), geometry), geometry, 2.5)
    assert curve.passes == pytest.approx((10, 12, 14, 16, 20)) and (curve.decode, curve.send) == (pytest.approx(4), 2.5)
    assert curve.rows(8) == pytest.approx(32)  # its full share beyond what is known
    other = VideoGeometry(height=32, width=32, latent_channels=4, block_frames=2)
    with pytest.raises(UserError, match="no cost of forward for 2 latent frames; it has: decode of 3 latent frames"):
        load_costs(Path(costs), other)


def test_measuring(
    in_tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(measuring.ROWS, "cpu", (1, 2))
    pipe = StreamPipeline.from_pretrained(model, dtype="fp32")
    found = measure(pipe, rows=(1, 3), launches=2).values()["curves"]
    points = {(c["kind"], c["shape"]): [(p["rows"], p["launches"]) for p in c["points"]] for c in found}
    assert points == {("forward", SHAPE): [(1, 2), (3, 2)], ("decode", SHAPE): [(1, 4)]}
    assert all(point["p50_s"] > 0 for curve in found for point in curve["points"])

    base = ["plan", "--model", str(model), "--dtype", "fp32", "--fps", "1", "--memory", "0.00085"]
    assert main([*base, "--save-costs", "costs.json", "--json", "a.json"]) == 0
    assert "viewers at 1 frames per second and 2 steps" in capsys.readouterr().out
    assert main([*base, "--costs", "costs.json", "--json", "b.json"]) == 0
    a, b = (json.loads(Path(name).read_text()) for name in ("a.json", "b.json"))
    assert a["viewers"] == b["viewers"] > 0 and a["limit"] == "memory"
    assert [o["viewers"] for o in a["offers"]] == [o["viewers"] for o in b["offers"]]
    assert {o["visibility"] for o in a["offers"]} == {"clean"}
    assert main([*base, "--save-costs", "costs.json"]) == 2
