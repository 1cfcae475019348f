"""`bench --suite viewers` and `--suite pipeline`: what is offered, who is refused, and what is predicted beside it."""

from dataclasses import replace

import pytest

from streamgen.pipeline import StreamPipeline
from streamgen_infer.bench import pipeline as bench_pipeline
from streamgen_infer.bench.pipeline import CellTimes, predicted_fps
from streamgen_infer.bench.viewers import RecordedCosts, agreement, simulated_figures, viewers
from streamgen_infer.cli import main
from streamgen_infer.interrupts import Stop
from streamgen_infer.simulate.scenario import lines
from tests.command_line import one_line
from tests.tiny_model import save_tiny_model


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> StreamPipeline:
    folder = save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")
    return StreamPipeline.from_pretrained(str(folder), dtype="fp32", threads=1)


def test_twice_the_admitted_load_comes_and_admission_turns_the_rest_away(
    pipe: StreamPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streamgen_infer.bench.viewers.MOST_VIEWERS", 3)
    found = viewers(pipe, 1.0, Stop(), overload=2.0)
    assert found["offered"] == 2 * found["admitted"] and found["overload"] == 2.0
    assert 1 <= found["viewers"] <= 3 and found["refused"] >= found["offered"] - found["viewers"]
    assert found["blocks"] >= 2 * found["viewers"]  # what may be made at once
    assert found["miss_rate"] == found["late_blocks"] / found["blocks"]
    assert found["simulated"]["viewers"] == found["viewers"]
    expected = found["simulated"]["miss_rate"] * found["blocks"]
    assert found["predicted_misses"] == agreement(found["late_blocks"], found["blocks"], expected / found["blocks"])


def test_without_overload_fewer_than_are_admitted_come_and_none_is_refused(
    pipe: StreamPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streamgen_infer.bench.viewers.MOST_VIEWERS", 2)
    found = viewers(pipe, 0.3, Stop())
    assert found["overload"] is None and found["viewers"] == found["offered"] == max(1, int(0.9 * found["admitted"]))
    assert found["refused"] == 0


def test_costs_keep_by_how_much_they_were_wrong() -> None:
    costs = RecordedCosts()
    costs.observe("forward", "a", 1, 0.5)  # nothing was predicted
    costs.observe("forward", "a", 1, 1.0)
    assert costs.factors == [2.0]
    assert costs.predict("forward", "a", 1) > 0.5


def test_the_simulator_misses_as_often_as_the_launches_stall(pipe: StreamPipeline) -> None:
    costs = lines("3 latent frames", forward=(0.02, 0.001), decode=(0.01, 0.001), rows=4)
    calm = simulated_figures(pipe, costs, (1.0,), 2, 60.0)
    stalls = simulated_figures(pipe, costs, (1.0,) * 99 + (150.0,), 2, 60.0)  # 3 s, twice what is made ahead
    assert calm["viewers"] == 2 and calm["miss_rate"] == 0.0
    assert stalls["miss_rate"] > 0.01


def test_predicted_and_real_misses_agree_within_a_factor() -> None:
    assert agreement(0, 1000, 0.0) == {"late": 0, "expected": 0.0, "ratio": 1.0, "within_factor_2": True}
    assert agreement(9, 1000, 0.004)["ratio"] == 0.5 and agreement(9, 1000, 0.004)["within_factor_2"]
    assert not agreement(9, 1000, 0.003)["within_factor_2"]
    assert not agreement(4, 1000, 0.010)["within_factor_2"]
    assert agreement(0, 0, None)["ratio"] == 1.0


def test_overload_is_of_viewers_and_in_range(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--suite", "engine", "--overload", "2"]) == 2
    assert "--overload" in one_line(capsys)
    assert main(["bench", "--suite", "viewers", "--overload", "0.5"]) == 2
    assert "1 to 100" in one_line(capsys)
    assert main(["bench", "--suite", "sprites", "--overload", "2"]) == 2
    assert "--suite viewers" in one_line(capsys)


def test_the_prediction_of_two_ranks(pipe: StreamPipeline) -> None:
    """Two steps of 10 ms, decode 4; two layers. Blocks of 12 frames."""
    cells = CellTimes(pass_ms=10.0, decode_ms=4.0)
    for split in bench_pipeline.SPLITS:
        assert predicted_fps(pipe, split, 1, cells, 1.5) == pytest.approx(12000 / 24)
        # the rank that decodes has a step, or a layer of two steps, and 4 ms: 14 ms at full speed
        assert predicted_fps(pipe, split, 2, cells, 1.0) == pytest.approx(12000 / 14)
        assert predicted_fps(pipe, split, 2, cells, 2.0) == pytest.approx(12000 / 28)


def test_a_ring_is_predicted_as_its_balancer_leaves_it(pipe: StreamPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipe.transformer, "config", replace(pipe.transformer.config, num_layers=8))
    # a layer's two steps take 5 ms: evenly 16 + 4 x 5 and 4 x 5; with two layers moved 16 + 2 x 5 and 6 x 5
    found = predicted_fps(pipe, "layer_ring", 2, CellTimes(pass_ms=20.0, decode_ms=16.0), 1.0)
    assert found == pytest.approx(12000 / 30)
    # with one layer moved the other rank would be the slower one
    found = predicted_fps(pipe, "layer_ring", 2, CellTimes(pass_ms=20.0, decode_ms=4.0), 1.0)
    assert found == pytest.approx(12000 / 24)


def test_cells_are_timed(pipe: StreamPipeline) -> None:
    cells = bench_pipeline.cell_times(pipe)
    assert cells.pass_ms > 0 and cells.decode_ms > 0
