"""The loaders against bad files of every kind, the same ones every time; `make fuzz` tries others for minutes.

What comes out is a named error or a whole model: see `tests.fuzz.loaders`.
"""

import json
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings

from tests.fuzz.__main__ import FIGURES, SECURITY, table
from tests.fuzz.loaders import STRATEGIES, Case, run

INPUTS = {"config.json, upstream": 60, "config.json, our own": 30, "safetensors header": 60, "pickle": 60}


@pytest.mark.parametrize("loader", STRATEGIES)
def test_a_named_error_or_a_whole_model(loader):
    outcomes: Counter[str] = Counter()

    @settings(
        max_examples=INPUTS.get(loader, 25),
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(STRATEGIES[loader])
    def try_one(case: Case) -> None:
        outcomes[run(case)] += 1

    try_one()
    assert sum(count for name, count in outcomes.items() if name != "loaded") > 2, outcomes


def test_the_figures_that_are_told():
    """SECURITY.md has the figures of the last long run, which found nothing."""
    if not FIGURES.exists():
        pytest.skip("no long run yet: make fuzz")
    loaders = json.loads(FIGURES.read_text())["loaders"]
    assert list(loaders) == list(STRATEGIES) and table(loaders) in SECURITY.read_text(encoding="utf-8")
    for found in loaders.values():
        assert found["crashes"] == [] and found["inputs"] == sum(found["outcomes"].values()) > 0
