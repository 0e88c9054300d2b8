"""What the driver is asked, on a driver that is not there."""

import ctypes

import pytest

from offramp.gpu import compute_capability


class FakeDriver:
    """Answers like libcuda: 0 is success, results go through pointers."""

    def __init__(self, count: int, status: int = 0) -> None:
        self.count, self.status = count, status

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return self.status

    def cuDeviceGetCount(self, pointer) -> int:  # noqa: N802
        pointer._obj.value = self.count
        return 0

    def cuDeviceGetAttribute(self, pointer, attribute: int, device: int) -> int:  # noqa: N802
        pointer._obj.value = {75: 8 + device, 76: 6}[attribute]
        return 0


@pytest.mark.parametrize(
    ("driver", "device", "expected"),
    [
        (FakeDriver(1), 0, "8.6"),
        (FakeDriver(2), 1, "9.6"),
        (FakeDriver(1), 1, ""),
        (FakeDriver(0), 0, ""),
        (FakeDriver(1, status=100), 0, ""),  # CUDA_ERROR_NO_DEVICE
    ],
)
def test_compute_capability(monkeypatch, driver: FakeDriver, device: int, expected: str):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    assert compute_capability(device) == expected


def test_no_driver_is_no_gpu(monkeypatch):
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert compute_capability() == ""
