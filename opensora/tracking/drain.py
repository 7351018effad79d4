"""Sends spools to the store: a process of its own beside each run, `replay` for what was left.

A process, not a thread: importing and using MLflow would hold the interpreter that trains for milliseconds at a time.

    python -m opensora.tracking.drain ROOT PLACE      # until its standard input ends
"""

import os
import select
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from opensora.config import UserError
from opensora.step import lock_file
from opensora.tracking.sender import Record, Sender
from opensora.tracking.spool import (
    LOCK,
    REJECTED,
    SPOOL,
    SpoolReader,
    SpoolWriter,
    count_records,
    find_spools,
    read_marks,
    read_rejected,
)
from opensora.tracking.store import StoreAway, StoreRefused, store_name

EVERY_S = 2.0
LONGEST_WAIT_S = 10.0  # between tries while the store is away
LAST_TRY_S = "3"
TRIES = 5  # of a record at which something unforeseen happens


class Drain:
    """Sends one spool, as far as the store takes it.

    Args:
        say: told once of each trouble, and when it is over.
    """

    def __init__(self, root: Path, place: Path, say: Callable[[str], None]) -> None:
        self.sender, self.reader, self.say = Sender(root, place), SpoolReader(place, store_name(root)), say
        self.rejected = 0
        self._failures: dict[int, int] = {}  # by offset

    def run(self) -> None:
        """Send what the spool holds.

        Raises:
            StoreAway: the store takes no more now; what it took is marked.
        """
        first = next(self.reader.lines(), None)
        if first is None:
            return
        self.reader.sync()
        self.sender.open(first[0]["time"] if first[0] else 0, begin=lambda: self.reader.mark(0))
        pending: list[Record] = []
        values, end = 0, self.reader.sent
        for record, end_of_line in self.reader.lines():
            if record is not None and record["kind"] == "metrics":
                if pending and values + len(record["values"]) > self.sender.batch:
                    self._flush(pending, end)
                    pending, values = [], 0
                pending.append(record)
                values += len(record["values"])
            else:
                self._flush(pending, end)
                pending, values = [], 0
                self._send(record, end_of_line)
            end = end_of_line
        self._flush(pending, end)

    def _flush(self, records: list[Record], end: int) -> None:
        if records:
            self._try(lambda: self.sender.send_metrics(records, self._reject), records, end)

    def _send(self, record: Record | None, end: int) -> None:
        if record is None:
            self._reject({}, "half a line: the process that wrote it was killed")
            self.reader.mark(end)
            return
        self._try(lambda: self.sender.send(record), [record], end)

    def _try(self, send: Callable[[], None], records: list[Record], end: int) -> None:
        try:
            send()
        except StoreRefused as error:
            self._reject(records[0], str(error))
        except StoreAway:
            raise
        except Exception as error:
            self._failures[end] = self._failures.get(end, 0) + 1
            reason = f"{type(error).__name__}: {error}"
            if self._failures[end] < TRIES:
                raise StoreAway(reason) from error
            for record in records:
                self._reject(record, reason)
        self.reader.mark(end)

    def _reject(self, record: Record, reason: str) -> None:
        self.reader.reject(record, reason)
        if not self.rejected:
            self.say(
                f"the store refuses a record ({reason[:300]}); such are set aside in {self.reader.place / REJECTED}"
            )
        self.rejected += 1


def serve(root: Path, place: Path) -> str:
    """Send the spool as it grows, until standard input ends or the process that trains does.

    Then once more, and what earlier runs left.

    Returns:
        Why not all of it was sent; empty if it was.
    """
    parent, said, wait = os.getppid(), "", 0.0
    held: IO[str] | None = None
    while True:
        stopping = bool(select.select([sys.stdin], [], [], wait)[0]) or os.getppid() != parent
        wait, trouble = EVERY_S, ""
        if stopping and said:  # it is known to be away: the last try is short
            os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = LAST_TRY_S
        try:
            if held is None and (held := lock_file(place / LOCK)):
                drain = Drain(root, place, say)
            if held:
                drain.run()
            else:
                trouble = "another process sends it"  # of a run that was killed, and soon done
        except (UserError, OSError) as error:
            trouble, wait = str(error), LONGEST_WAIT_S if said else EVERY_S
        if trouble and not said and held and not stopping:
            say(f"{trouble}. Training goes on; what it records waits in {place}")
        elif said and not trouble:
            say(f"{store_name(root)} takes records again")
        said = trouble
        if stopping:
            if held:
                held.close()
            if not trouble:
                with suppress(UserError, OSError):
                    replay(root, nowhere=True)
            return trouble


def send(root: Path, place: Path) -> str:
    """Send, in this process, a spool that nobody writes to any more, and what earlier runs left.

    Returns:
        Why not all of it was sent; empty if it was.
    """
    try:
        held = lock_file(place / LOCK)
        if held is None:
            return "another process sends it"
        with held:
            Drain(root, place, say).run()
    except (UserError, OSError) as error:
        return str(error)
    with suppress(UserError, OSError):
        replay(root, nowhere=True)
    return ""


def say(text: str) -> None:
    """A line among those of the training."""
    print(f"tracking: {text}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class SpoolState:
    """What a spool holds, and what of it the present store has not got."""

    place: Path
    records: int
    unsent: int
    rejected: int
    in_use: bool = False  # a process sends it now

    @property
    def run(self) -> str:
        """PROFILE/CHAIN/STEP."""
        profile, _, chain, step = self.place.parts[-4:]
        return f"{profile}/{chain}/{step}"


def look(root: Path, place: Path) -> SpoolState:
    """The state of one spool."""
    sent = read_marks(place).get(store_name(root), 0)
    held = lock_file(place / LOCK)
    if held:
        held.close()
    return SpoolState(place, count_records(place), count_records(place, sent), len(read_rejected(place)), held is None)


def replay(
    root: Path, tell: Callable[[SpoolState, int], None] = lambda state, sent: None, nowhere: bool = False
) -> int:
    """Send what spools that no process uses any more still hold; returns how many there were.

    Every run does so at its end, for the runs before it that had no server to send to.

    Args:
        tell: called after each with its state and the number of records that were sent.
        nowhere: leave alone what another store has: only who asks for it wants all older runs on a new server.

    Raises:
        StoreAway: the store takes no more now.
    """
    count = 0
    for place in find_spools(root):
        if not _has_more(root, place) or (nowhere and _is_somewhere(place)):
            continue
        before = count_records(place, read_marks(place).get(store_name(root), 0))
        held = lock_file(place / LOCK)
        if held:
            with held:
                Drain(root, place, say).run()
            count += 1
        state = look(root, place)
        tell(state, before - state.unsent)
    return count


def retry_rejected(root: Path) -> int:
    """Put records that were set aside at the ends of their spools again; returns how many."""
    count = 0
    for place in find_spools(root):
        records = [item["record"] for item in read_rejected(place) if item.get("record")]
        writer = SpoolWriter(place)
        for record in records:
            writer.append(record)
        writer.close()
        if records:
            (place / REJECTED).unlink()
        count += len(records)
    return count


def _is_somewhere(place: Path) -> bool:
    return max(read_marks(place).values(), default=0) >= (place / SPOOL).stat().st_size


def _has_more(root: Path, place: Path) -> bool:
    return next(SpoolReader(place, store_name(root)).lines(), None) is not None


if __name__ == "__main__":
    answer = os.dup(1)  # libraries that print have no part in it
    os.dup2(2, 1)
    reason = serve(Path(sys.argv[1]), Path(sys.argv[2]))
    with suppress(BrokenPipeError):  # nobody waits for it any more
        os.write(answer, reason.encode())
    os._exit(1 if reason else 0)
