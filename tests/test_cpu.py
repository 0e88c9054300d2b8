"""Which CPUs need the INT8 kernels that do not saturate."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from offramp.cpu import saturates_bytes


@pytest.mark.parametrize(
    ("machine", "flags", "expected"),
    [
        ("x86_64", "fpu avx2 avx512f avx512_vnni", False),
        ("AMD64", "fpu avx2 avx_vnni", False),
        ("x86_64", "fpu avx2 fma", True),
        ("x86_64", None, True),
        ("aarch64", None, False),
    ],
)
def test_x86_without_vnni_saturates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: str, flags: str | None, expected: bool
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    cpuinfo = tmp_path / "cpuinfo"
    if flags is not None:
        cpuinfo.write_text(f"model name\t: some CPU\nflags\t\t: {flags}\n")
    assert saturates_bytes(cpuinfo) is expected
