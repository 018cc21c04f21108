"""Twenty runs of the soak test (`make soak` has 200)."""

from __future__ import annotations

import pytest
import soak
from test_streaming import one_thread  # noqa: F401  (a fixture)


@pytest.mark.slow
def test_soak():
    counts = soak.soak(list(range(20)), seed=1)
    assert sum(counts.values()) == 20
    assert len({end.split(":")[0] for end in counts}) == len(soak.FAULTS)
