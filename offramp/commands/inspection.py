"""What is in a bundle, for people and machines: `offramp inspect`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from offramp.bundle import Manifest, load_manifest, read_certificate, read_file, read_policy
from offramp.certificate import Certificate
from offramp.export.row_outputs import WORDS
from offramp.plan import check_plan_header, plan_header
from offramp.policy import Policy


def describe_bundle(bundle: Path) -> dict[str, Any]:
    """The manifest as plain values, every file checked, every plan with the header that was read back from it.

    Raises BundleError or PlanError for the first file that is not as recorded.
    """
    manifest = load_manifest(bundle)
    policy = Policy.from_json(read_policy(bundle, manifest))
    if manifest.text:
        read_file(bundle, manifest.text.tokenizer)
    description = dataclasses.asdict(manifest)
    description["fingerprint"] = manifest.fingerprint
    for part, shown in zip(manifest.parts, [*description["segments"], *description["heads"]], strict=True):
        for record in part.graphs.values():
            read_file(bundle, record)
        for plan, plan_shown in zip(part.plans, shown["plans"], strict=True):
            content = read_file(bundle, plan.file)
            check_plan_header(content, plan)
            plan_shown["header"] = dataclasses.asdict(plan_header(content))
    description["certificate"] = _certificate(read_certificate(bundle), manifest, policy)
    return description


def _certificate(content: bytes, manifest: Manifest, policy: Policy) -> dict[str, Any] | None:
    """The certificate, its words, and why it is not for this bundle as it is ("": it is); None without one."""
    if not content:
        return None
    certificate = Certificate.from_json(content)
    graphs = [
        segment.graphs[certificate.precision]
        for segment in manifest.segments
        if certificate.precision in segment.graphs
    ]
    plans = [
        plan.file for segment in manifest.segments for plan in segment.plans if plan.backend == certificate.backend
    ]
    known = {record.sha256 for record in (*graphs, *plans)}
    files = tuple(sha256 if sha256 in known else "" for sha256 in certificate.files)
    obstacle = certificate.obstacle(files, certificate.backend, certificate.precision, policy.sha256)
    return {**dataclasses.asdict(certificate), "words": certificate.words(), "obstacle": obstacle}


def lines_from_description(description: dict[str, Any]) -> Iterator[str]:
    """The description as lines of text."""
    yield f"{description['name']}: {len(description['segments'])} segments, schema {description['schema']}"
    for spec in description["inputs"]:
        values = "" if spec["maximum"] is None else f" in {spec['minimum']} … {spec['maximum']}"
        yield f"  input {spec['name']} {spec['dtype']} {_shape(spec['shape'])}{values}"
    for name, limits in description["dimensions"].items():
        yield f"  {name}: {limits['min']} … {limits['max']}"
    for precision, dimension in description["trims"].items():
        yield f"  cuts off padding along {dimension} in {precision}"
    for segment, exit_spec in zip(description["segments"], description["exits"], strict=True):
        others = "".join(f", {words.called} {exit_spec[kind]}" for kind, words in WORDS.items() if exit_spec[kind])
        others += f", head {exit_spec['head']}" if exit_spec["head"] else ""
        yield f"segment {segment['index']} → exit {exit_spec['name']}, {exit_spec['num_classes']} classes{others}"
        for tensor in segment["carry_out"]:
            yield f"  carries {tensor['name']} {tensor['dtype']} {_shape(tensor['shape'])}"
        if states := segment["states"]:
            first = states[0]["tensor"]
            yield f"  keeps {len(states)} states, {first['name']} {first['dtype']} {_shape(first['shape'])} and so on"
        yield from _file_lines(segment)
    for head in description["heads"]:
        yield f"{head['name']}: of hidden states (rows, {head['width']})"
        yield from _file_lines(head)
    yield from _certificate_lines(description["certificate"])


def _file_lines(part: dict[str, Any]) -> Iterator[str]:
    """Graphs and plans of a segment or head."""
    for precision, record in part["graphs"].items():
        yield f"  graph {precision}: {record['path']}, {record['bytes'] / 1e6:.1f} MB"
    for plan in part["plans"]:
        header = plan["header"]
        yield (
            f"  plan {plan['precision']}: {plan['file']['path']}, {plan['file']['bytes'] / 1e6:.1f} MB, "
            f"header says {header['backend']} {header['version']}, for SM {', '.join(plan['targets'])}"
        )


def _certificate_lines(found: dict[str, Any] | None) -> Iterator[str]:
    if found is None:
        yield "no certificate"
        return
    yield "certificate" + (f" (not of this bundle as it is: {found['obstacle']})" if found["obstacle"] else "")
    for line in found["words"]:
        yield f"  {line}"


def _shape(shape: Any) -> str:
    return "(" + ", ".join(str(length) for length in shape) + ")"
