"""One scenario played several times at once, a process for each, and counted together.

Every process plays the whole scenario under a seed of its own, so N of them are N independent machines of the
scenario's devices with the scenario's viewers each: N times as many stream-minutes in the time of one.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing.connection import wait
from typing import Any

import numpy as np

from streamgen_infer.cost_model import CostModel
from streamgen_infer.errors import Failure
from streamgen_infer.interrupts import INTERRUPTED
from streamgen_infer.simulate.report import Tally, merged
from streamgen_infer.simulate.scenario import Scenario
from streamgen_infer.simulator import Broken, simulate


def seed_of(seed: int, part: int) -> int:
    """The seed of the run number `part`, whatever the number of runs: the scenario's own, then ones derived from it."""
    if part == 0:
        return seed
    return int(np.random.SeedSequence([seed, part]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def simulate_parts(scenario: Scenario, costs: CostModel, processes: int) -> Tally:
    """`processes` runs of a scenario, counted together: the same seed and number give the same result exactly.

    Broken as `simulate`; Failure if a process was killed.
    """
    if processes == 1:
        return simulate(scenario, costs)
    scenarios = [replace(scenario, seed=seed_of(scenario.seed, part)) for part in range(processes)]
    values = costs.values()
    # Started afresh: a copy of this process would take over threads and locks that it may hold.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_end_with_parent) as pool:
        futures = [pool.submit(_play, one, values) for one in scenarios]
        try:
            tallies = []
            for done, future in enumerate(futures, 1):
                tallies.append(future.result())
                print(f"{done} of {processes} runs are done", file=sys.stderr)
        except BrokenProcessPool as error:
            raise Failure("a process of the simulation was killed; use fewer of them if memory was short") from error
    return merged(tallies)


def _end_with_parent() -> None:
    """A signal ends the parent at once, without a word to its processes; Ctrl-C is its business alone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(INTERRUPTED)

    threading.Thread(target=watch, daemon=True).start()


def _play(scenario: Scenario, values: Mapping[str, Any]) -> Tally:
    try:
        return simulate(scenario, CostModel.from_values(values))
    except Broken as error:
        raise Broken(f"seed {scenario.seed}: {error}") from error
