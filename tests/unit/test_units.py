"""Numbers for people, and the terms that predictor and reports share."""

from __future__ import annotations

import pytest

from scalefl import memory, units
from scalefl.units import MIB, digits, duration, mib


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0.00"), (1.234, "1.23"), (12.34, "12.3"), (99.96, "100.0"), (123.4, "123"), (1234567.8, "1,234,568")],
)
def test_digits(value, text):
    assert digits(value) == text
    assert mib(value * MIB) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4242, "0.42 s"), (119.4, "119 s"), (120, "2.00 min"), (7199, "120 min"), (9000, "2.50 h")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_predictor_and_reports_speak_of_the_same_terms():
    assert memory.TERMS == units.TERMS
