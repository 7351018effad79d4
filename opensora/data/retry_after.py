"""When a busy server wants to be asked again: the header Retry-After (RFC 9110, 10.2.3)."""

import time
from email.utils import parsedate_to_datetime


def read_retry_after(value: str) -> float | None:
    """Seconds to wait, of a header that holds a number or a date; None where it holds neither."""
    try:
        seconds = float(value)
    except ValueError:
        date = read_date(value)
        return None if date is None else max(0.0, date - time.time())
    return max(0.0, seconds) if seconds < float("inf") else None


def read_date(value: str) -> float | None:
    """Seconds since 1970 of a date as HTTP writes it; None for anything else."""
    try:
        return parsedate_to_datetime(value).timestamp()
    except (TypeError, ValueError):
        return None
