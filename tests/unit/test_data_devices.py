from collections import Counter

import msgspec
import pytest

from scalefl.data import PROFILES, Devices, MemoryClass, parse_bytes
from scalefl.errors import ConfigError


def member(name="a", share=1.0, memory=0.5, speed=1e9, bandwidth=1e6):
    return MemoryClass(
        name=name,
        share=share,
        memory=memory,
        flops_per_second=speed,
        bandwidth_bytes_per_second=bandwidth,
    )


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("300MiB", 300 * 2**20),
        (" 1.5 GiB ", 3 * 2**29),
        ("500MB", 500_000_000),
        ("2kB", 2000),
        ("1 KiB", 1024),
        ("7B", 7),
        ("1GB", 10**9),
    ],
)
def test_bytes_are_read_with_their_unit(text, num_bytes):
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize(
    "text", ["0", "0MiB", "-3MiB", "nan", "NaN MiB", "12 parsecs", "300", "", "MiB", "1e3B", "0.2B", "३MiB"]
)
def test_what_is_no_number_of_bytes_is_refused_with_an_example(text):
    with pytest.raises(ConfigError, match="300MiB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("memory", "num_bytes"),
    [(0.4, 400), ("40%", 400), ("12.5 %", 125), ("2kB", 2000), (1.2, 1200), (1e-9, 1)],
)
def test_memory_is_bytes_or_a_part_of_full_training(memory, num_bytes):
    assert member(memory=memory).memory_bytes(1000) == num_bytes


@pytest.mark.parametrize("memory", [0.0, -0.4, float("nan"), float("inf"), 3e8, "0%", "some", "1000%%", "-5%"])
def test_memory_that_is_neither_is_refused(memory):
    with pytest.raises(ConfigError, match="300MiB"):
        member(memory=memory)


@pytest.mark.parametrize(
    "setting",
    [{"share": 0.0}, {"share": 1.5}, {"speed": 0.0}, {"bandwidth": float("inf")}, {"share": float("nan")}],
)
def test_values_out_of_range_are_refused(setting):
    with pytest.raises(ConfigError, match="'a'"):
        member(**setting)


def test_shares_must_sum_to_one():
    with pytest.raises(ConfigError, match=r"sum to 0\.9, not 1: a 0\.5, b 0\.4"):
        Devices(classes=(member("a", 0.5), member("b", 0.4)))
    with pytest.raises(ConfigError, match="no classes"):
        Devices(classes=())
    with pytest.raises(ConfigError, match="same name"):
        Devices(classes=(member("a", 0.5), member("a", 0.5)))


def test_an_unknown_profile_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match=r"did you mean 'phones'\?; known: phones, jetson, mixed"):
        Devices(classes="phone")


def test_strength_follows_memory_and_equal_budgets_share_a_rank():
    devices = Devices(
        classes=(
            member("a", 0.3, "900B"),
            member("b", 0.3, 0.2),
            member("c", 0.2, "200B"),
            member("d", 0.2, 1.0),
        )
    )
    resolved = devices.resolve(1000)
    assert [c.memory_bytes for c in resolved] == [900, 200, 200, 1000]
    assert [c.strength for c in resolved] == [1, 0, 0, 2]
    assert [c.name for c in resolved] == ["a", "b", "c", "d"]


@pytest.mark.parametrize("profile", PROFILES)
def test_profiles_run_from_weak_to_strong(profile):
    resolved = Devices(classes=profile).resolve(500 * 2**20)
    assert [c.strength for c in resolved] == list(range(len(resolved)))
    assert all(1e9 < c.flops_per_second < 1e12 for c in resolved)


@pytest.mark.parametrize("num_clients", [10, 100, 1000, 12345])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_shares_are_met_within_a_few_clients(num_clients, seed):
    devices = Devices(classes=(member("a", 0.2), member("b", 0.35), member("c", 0.45)))
    counts = Counter(devices.class_of(client, seed) for client in range(num_clients))
    assert all(abs(counts[i] - m.share * num_clients) < 4 for i, m in enumerate(devices.members))


def test_classes_of_a_huge_population_cost_nothing():
    devices = Devices(classes="mixed")
    last = 100_000_000
    counts = Counter(devices.class_of(client, 0) for client in range(last - 1000, last))
    assert all(abs(count - 250) < 4 for count in counts.values())
    assert devices.class_of(last, 0) == devices.class_of(last, 0)
    assert [devices.class_of(c, 0) for c in range(50)] != [devices.class_of(c, 1) for c in range(50)]


def test_devices_are_read_from_and_written_to_a_configuration():
    by_name = msgspec.convert({"classes": "jetson"}, Devices)
    assert by_name.members == PROFILES["jetson"]
    classes = [msgspec.to_builtins(member("a", 0.5, "40%")), msgspec.to_builtins(member("b", 0.5, 1))]
    own = msgspec.convert({"classes": classes}, Devices)
    assert msgspec.convert(msgspec.to_builtins(own), Devices) == own
    with pytest.raises(msgspec.ValidationError, match="ram"):
        msgspec.convert({"classes": [{**classes[0], "ram": 1}]}, Devices)
