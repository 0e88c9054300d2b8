"""Which share of a decoder's FFNs runs: thresholds of its routers, from the table in the manifest."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from offramp.bundle import DecoderSpec
from offramp.errors import OptionError

EVERYBODY = np.float32(-1e4)  # a threshold that every score reaches


def router_thresholds(spec: DecoderSpec, capacity: float) -> NDArray[np.float32]:
    """What routers must reach so that about this share of FFNs runs, (layers,); 1 is all, () without routers.

    Between two shares of the table thresholds are interpolated. Raises OptionError.
    """
    table = sorted((float(share), thresholds) for share, thresholds in spec.capacities.items())
    if not table:
        if capacity != 1:
            raise OptionError(f"capacity {capacity:g}: this bundle's model has no routers, expected 1")
        return np.empty(0, np.float32)
    if capacity == 1:
        return np.full(len(table[0][1]), EVERYBODY)
    shares = [share for share, _ in table]
    if not shares[0] <= capacity <= shares[-1]:
        raise OptionError(f"capacity: got {capacity:g}, expected 1, or {shares[0]:g} to {shares[-1]:g}")
    columns = np.array([thresholds for _, thresholds in table], np.float32).T
    return np.array([np.interp(capacity, shares, column) for column in columns], np.float32)
