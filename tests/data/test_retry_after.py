"""The header Retry-After: a number, a date, or nothing that can be understood."""

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from opensora.data.retry_after import read_retry_after


@pytest.mark.parametrize(
    ("value", "seconds"), [("120", 120.0), ("2.5", 2.5), ("-3", 0.0), ("", None), ("soon", None), ("inf", None)]
)
def test_numbers_and_nonsense(value: str, seconds: float | None) -> None:
    assert read_retry_after(value) == seconds


def test_dates() -> None:
    now = datetime.now(UTC)
    later, before = (format_datetime(now + timedelta(seconds=shift), usegmt=True) for shift in (3000, -3000))
    assert 1000 < (read_retry_after(later) or 0) <= 3000
    assert read_retry_after(before) == 0.0
