"""Rows of the paper's table, ours over seeds and the published ones, as CSV and for people."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

COLUMNS = (
    *("model", "tau", "latency_ms", "accuracy", "speedup_vs_dense", "delta_acc_pp", "avg_depth", "avg_retention"),
    *("throughput", "flops"),
)
MORE_COLUMNS = ("p50_ms", "speedup_p50", "retention_at_exit", "agreement")
_PUBLISHED_COLUMNS = (
    *("task", "model", "tau", "latency_ms", "accuracy", "speedup_vs_bert", "delta_acc_pp", "avg_depth"),
    "avg_retention",
)
# arXiv 2510.12856, tables 1 to 3: an RTX 2080 Ti in FP16, GLUE's development sets; the best of repeated lines.
_PUBLISHED = """
SST-2,bert,,10.11,0.9246,1.00,0.00,,
SST-2,distilbert,,5.57,0.9039,1.82,-2.07,,
SST-2,eat,0.80,16.27,0.9027,0.62,-2.19,11.19,0.524
SST-2,eat,0.85,16.02,0.9051,0.63,-1.95,11.21,0.524
SST-2,eat,0.90,16.22,0.9051,0.62,-1.95,11.23,0.524
SST-2,eat,0.95,16.38,0.9051,0.62,-1.95,11.28,0.524
QQP,bert,,10.28,0.9170,1.00,0.00,,
QQP,distilbert,,5.48,0.8910,1.88,-2.60,,
QQP,eat,0.80,16.97,0.8830,0.61,-3.40,11.65,0.515
QQP,eat,0.85,16.71,0.8830,0.62,-3.40,11.66,0.515
QQP,eat,0.90,16.81,0.8830,0.61,-3.40,11.66,0.515
QQP,eat,0.95,16.88,0.8830,0.61,-3.40,11.68,0.515
MNLI,bert,,9.76,0.8340,1.00,0.00,,
MNLI,distilbert,,5.13,0.8030,1.90,-3.10,,
MNLI,eat,0.80,19.86,0.3860,0.49,-44.80,11.92,0.512
MNLI,eat,0.85,20.32,0.3840,0.48,-45.00,11.98,0.512
MNLI,eat,0.90,20.35,0.3840,0.48,-45.00,12.00,0.512
MNLI,eat,0.95,19.50,0.3840,0.50,-45.00,12.00,0.512
"""


def published() -> list[dict[str, str]]:
    """Return the paper's own rows: another machine, other data, another model."""
    return [dict(zip(_PUBLISHED_COLUMNS, line.split(","), strict=True)) for line in _PUBLISHED.split()]


def against_dense(rows: Mapping[str, dict[str, Any]], dense: str) -> None:
    """Give all rows of one seed their speedups over the dense encoder, and the difference in accuracy in points."""
    base = rows[dense]
    for row in rows.values():
        row["speedup_vs_dense"] = base["latency_ms"] / row["latency_ms"]
        row["speedup_p50"] = base["p50_ms"] / row["p50_ms"]
        row["delta_acc_pp"] = 100 * (row["accuracy"] - base["accuracy"])


def over_seeds(seeds: Sequence[Mapping[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return a row per point that all seeds have: means, and standard deviations (n - 1) as `..._sd`."""
    keys = [key for key in seeds[0] if all(key in rows for rows in seeds)]
    merged = []
    for key in keys:
        first = seeds[0][key]
        row: dict[str, Any] = {"model": first["model"], "tau": first["tau"], "seeds": len(seeds)}
        for name in (*COLUMNS[2:], *MORE_COLUMNS):
            values = [rows[key][name] for rows in seeds if name in rows[key]]
            if values:
                row[name] = mean(values)
                row[f"{name}_sd"] = stdev(values) if len(values) > 1 else 0.0
        row["shares"] = [mean(column) for column in zip(*(rows[key]["shares"] for rows in seeds), strict=True)]
        merged.append(row)
    return merged


def csv_of(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Return rows as CSV, numbers with four decimals."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        values = (row.get(name, "") for name in columns)
        writer.writerow([f"{value:.4f}" if isinstance(value, float) else value for value in values])
    return stream.getvalue()


def markdown_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the table for a README: means, and ± the deviation over seeds of accuracy and of the difference."""
    titles = "model | tau | accuracy | against dense, pp | p50 ms | speedup p50 | mean ms | speedup mean"
    titles += " | rows/s at 32 | depth | retention | FLOPs"
    lines = [f"| {titles} |", "|" + " --- |" * (titles.count("|") + 1)]
    for row in rows:
        cells = [
            row["model"],
            row["tau"],
            f"{row['accuracy']:.3f} ± {row['accuracy_sd']:.3f}",
            f"{row['delta_acc_pp']:+.2f} ± {row['delta_acc_pp_sd']:.2f}",
            f"{row['p50_ms']:.2f}",
            f"{row['speedup_p50']:.2f}x",
            f"{row['latency_ms']:.2f}",
            f"{row['speedup_vs_dense']:.2f}x",
            f"{row['throughput']:.0f}" if "throughput" in row else "",
            f"{row['avg_depth']:.2f}",
            f"{row['avg_retention']:.0%}",
            f"{row['flops']:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines
