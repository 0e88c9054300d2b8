"""Writes safety_vectors.json: p-values and bounds by other hands than ours. `python tests/golden/make_vectors.py`.

The binomial figures come from scipy. Those called hoeffding_bentkus and wsr are kept as they are: they were made once
by a separate implementation of Angelopoulos et al. (LTT, arXiv 2110.01052, proposition 4) and of Waudby-Smith and
Ramdas (arXiv 2010.09686, as used by Bates et al., arXiv 2101.02703, theorem 4), the former checked against MAPIE 1.6.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from scipy.stats import beta, binom

PATH = Path(__file__).parent / "safety_vectors.json"


def main() -> None:
    document: dict[str, Any] = json.loads(PATH.read_text())
    for case in document["binomial"]:
        k, n = case["k"], case["n"]
        case["p"] = float(binom.cdf(k, n, case["risk"]))
        case["upper_bound_90"] = float(beta.ppf(0.9, k + 1, n - k)) if k < n else 1.0
    for case in document["rows_needed"]:
        case["rows"] = next(n for n in range(1, 10_000) if (1 - case["risk"]) ** n <= case["delta"])
    for case in document["allowed_losses"]:
        n, risk, delta = case["n"], case["risk"], case["delta"]
        case["losses"] = max(k for k in range(n) if binom.cdf(k, n, risk) <= delta)
    PATH.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
