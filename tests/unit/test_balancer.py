"""The load balancer: moves a role when another device is expected to be clearly faster, and not back and forth."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from inferos.devices.balancer import LoadBalancer, temperature


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def steps(balancer: LoadBalancer, device: str, seconds: float, count: int = 60, role: str = "decode") -> None:
    for _ in range(count):
        balancer.began(role, device)
        balancer.ended(role, device, 1, seconds)


def test_a_role_moves_when_its_steps_have_become_slow_and_stays_there_a_while() -> None:
    clock = Clock()
    balancer = LoadBalancer(clock)
    balancer.expect("decode", "cpu", 0.010)
    balancer.expect("decode", "gpu", 0.012)
    assert balancer.advise("decode", "cpu", ["cpu", "gpu"]) is None
    steps(balancer, "cpu", 0.030)
    assert balancer.advise("decode", "cpu", ["cpu", "gpu"]) == "gpu"
    steps(balancer, "gpu", 0.060)
    clock.now += 4.9
    assert balancer.advise("decode", "gpu", ["cpu", "gpu"]) is None
    clock.now += 0.2
    assert balancer.advise("decode", "gpu", ["cpu", "gpu"]) == "cpu"


def test_a_small_gain_moves_nothing() -> None:
    balancer = LoadBalancer(Clock())
    balancer.expect("decode", "gpu", 0.010)
    steps(balancer, "cpu", 0.0124)
    assert balancer.advise("decode", "cpu", ["cpu", "gpu"]) is None


def test_a_busy_device_draws_no_more_work() -> None:
    balancer = LoadBalancer(Clock(), alpha=0.5)
    balancer.expect("decode", "gpu", 0.010)
    steps(balancer, "cpu", 0.030)
    for _ in range(3):
        balancer.began("prefill", "gpu")
    assert balancer.advise("decode", "cpu", ["cpu", "gpu"]) is None
    for _ in range(3):
        balancer.ended("prefill", "gpu", 512, 1.0)
    advised = [balancer.advise("decode", "cpu", ["cpu", "gpu"]) for _ in range(4)]
    assert "gpu" in advised


def test_one_slow_step_or_a_failed_one_moves_nothing() -> None:
    balancer = LoadBalancer(Clock())
    balancer.expect("decode", "gpu", 0.010)
    steps(balancer, "cpu", 0.009)
    steps(balancer, "cpu", 0.040, count=1)
    balancer.began("decode", "cpu")
    balancer.ended("decode", "cpu", 1, None)
    assert balancer.advise("decode", "cpu", ["cpu", "gpu"]) is None
    assert balancer.load("decode", "cpu").running == 0


def test_a_hot_device_counts_as_slower() -> None:
    hot: set[str] = set()
    balancer = LoadBalancer(Clock(), too_hot=lambda device: device in hot)
    balancer.expect("decode", "gpu", 0.012)
    steps(balancer, "cpu", 0.010)
    assert balancer.advise("decode", "cpu", ["cpu", "gpu"]) is None
    hot.add("cpu")
    assert balancer.advise("decode", "cpu", ["cpu", "gpu"]) == "gpu"


def test_an_unknown_device_is_not_moved_to() -> None:
    balancer = LoadBalancer(Clock())
    assert balancer.advise("decode", "cpu", ["cpu", "gpu"]) is None
    steps(balancer, "cpu", 1.0)
    assert balancer.advise("decode", "cpu", ["cpu", "gpu"]) is None


@pytest.mark.parametrize(
    ("sensors", "wanted"),
    [
        ({}, None),
        ({"k10temp": [SimpleNamespace(current=61.5), SimpleNamespace(current=None)]}, 61.5),
        ({"a": [SimpleNamespace(current=40.0)], "b": [SimpleNamespace(current=55.0)]}, 55.0),
    ],
)
def test_the_temperature_is_the_hottest_sensor_s_or_unknown(sensors: object, wanted: float | None) -> None:
    assert temperature(lambda: sensors) == wanted


def test_sensors_that_cannot_be_read_are_unknown() -> None:
    def broken() -> object:
        raise OSError

    assert temperature(broken) is None
