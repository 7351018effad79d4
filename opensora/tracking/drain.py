"""Sends spools to the store: a process of its own beside each run, `replay` for what was left.

A process, not a thread: importing and using MLflow would hold the interpreter that trains for milliseconds at a time.

    python -m opensora.tracking.drain ROOT PLACE      # until its standard input ends
"""

import os
import select
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

from opensora.config import UserError
from opensora.step import lock_file, sync
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
    spools_of,
)
from opensora.tracking.store import StoreAway, StoreRefused, store_name
from opensora.tracking.system_metrics import SystemMetrics

EVERY_S = 2.0
LONGEST_WAIT_S = 10.0  # between tries while the store is away
LAST_TRY_S = "3"
TRIES = 5  # of a record at which something unforeseen happens


class Drain:
    """Sends the spools of one run, as far as the store takes them: its records, then what its machine did.

    Args:
        say: told once of each trouble, and when it is over.
    """

    def __init__(self, root: Path, place: Path, say: Callable[[str], None]) -> None:
        self.sender, self.say = Sender(root, place), say
        self.readers = tuple(SpoolReader(spool, store_name(root)) for spool in spools_of(place))
        self.rejected = 0
        self._failures: Counter[tuple[Path, int]] = Counter()  # by spool and offset

    def run(self) -> None:
        """Send what the spools hold.

        Raises:
            StoreAway: the store takes no more now; what it took is marked.
        """
        firsts = [first for reader in self.readers if (first := next(reader.lines(), None))]
        if not firsts:
            return
        self.sender.open(min((record["time"] for record, _ in firsts if record), default=0), self._begin)
        for reader in self.readers:
            self._send_all(reader)

    def _begin(self) -> None:
        """The store has nothing of the run."""
        for reader in self.readers:
            reader.mark(0)

    def _send_all(self, reader: SpoolReader) -> None:
        reader.sync()
        pending: list[Record] = []
        values, end = 0, reader.sent
        for record, end_of_line in reader.lines():
            if record is not None and record["kind"] == "metrics":
                if pending and values + len(record["values"]) > self.sender.batch:
                    self._flush(reader, pending, end)
                    pending, values = [], 0
                pending.append(record)
                values += len(record["values"])
            else:
                self._flush(reader, pending, end)
                pending, values = [], 0
                self._send(reader, record, end_of_line)
            end = end_of_line
        self._flush(reader, pending, end)

    def _flush(self, reader: SpoolReader, records: list[Record], end: int) -> None:
        if records:
            refuse = partial(self._reject, reader)
            self._try(reader, lambda: self.sender.send_metrics(records, refuse), records, end)

    def _send(self, reader: SpoolReader, record: Record | None, end: int) -> None:
        if record is None:
            self._reject(reader, {}, "half a line: the process that wrote it was killed")
            reader.mark(end)
            return
        self._try(reader, lambda: self.sender.send(record), [record], end)

    def _try(self, reader: SpoolReader, send: Callable[[], None], records: list[Record], end: int) -> None:
        try:
            send()
        except StoreRefused as error:
            self._reject(reader, records[0], str(error))
        except StoreAway:
            raise
        except Exception as error:
            self._failures[reader.place, end] += 1
            reason = f"{type(error).__name__}: {error}"
            if self._failures[reader.place, end] < TRIES:
                raise StoreAway(reason) from error
            for record in records:
                self._reject(reader, record, reason)
        reader.mark(end)

    def _reject(self, reader: SpoolReader, record: Record, reason: str) -> None:
        reader.reject(record, reason)
        if not self.rejected:
            self.say(f"the store refuses a record ({reason[:300]}); such are set aside in {reader.place / REJECTED}")
        self.rejected += 1


def serve(root: Path, place: Path) -> str:
    """Send the spool as it grows, until standard input ends or the process that trains does; sample the machine.

    Then once more, and what earlier runs left.

    Returns:
        Why not all of it was sent; empty if it was.
    """
    parent, said, wait = os.getppid(), "", 0.0
    held: IO[str] | None = None
    machine = SystemMetrics(root, place, say)
    while True:
        stopping = bool(select.select([sys.stdin], [], [], wait)[0]) or os.getppid() != parent
        wait, trouble = EVERY_S, ""
        if stopping:
            machine.stop()
        if stopping and said:  # it is known to be away: the last try is short
            os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = LAST_TRY_S
        try:
            if held is None and (held := lock_file(place / LOCK)):
                drain = Drain(root, place, say)
                if not stopping:
                    machine.start()  # as long as another process sends, it samples, too
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
    spools = spools_of(place)
    held = lock_file(place / LOCK)
    if held:
        held.close()
    return SpoolState(
        place,
        records=sum(map(count_records, spools)),
        unsent=_count_unsent(root, place),
        rejected=sum(len(read_rejected(spool)) for spool in spools),
        in_use=held is None,
    )


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
        if not _has_more(root, place) or (nowhere and _is_elsewhere(root, place)):
            continue
        before = _count_unsent(root, place)
        held = lock_file(place / LOCK)
        if held:
            with held:
                Drain(root, place, say).run()
            count += 1
        state = look(root, place)
        tell(state, before - state.unsent)
    return count


def retry_rejected(root: Path, tell: Callable[[SpoolState], None] = lambda state: None) -> int:
    """Put records that were set aside at the ends of their spools again; returns how many.

    Args:
        tell: called with the state of each run that was left alone, as a process sends it and may set more aside.

    Raises:
        OSError: the disk does not take those of a spool; they stay where they are.
    """
    count = 0
    for place in find_spools(root):
        if not any(map(read_rejected, spools_of(place))):
            continue
        held = lock_file(place / LOCK)
        if held is None:
            tell(look(root, place))
            continue
        with held:
            count += sum(map(_put_back, spools_of(place)))
    return count


def _put_back(spool: Path) -> int:
    records = [item["record"] for item in read_rejected(spool) if item.get("record")]
    if records:
        writer = SpoolWriter(spool)
        try:
            writer.append_all(records)
        finally:
            writer.close()
        sync(spool / SPOOL)
        (spool / REJECTED).unlink()
    return len(records)


def _count_unsent(root: Path, place: Path) -> int:
    store = store_name(root)
    return sum(count_records(spool, read_marks(spool).get(store, 0)) for spool in spools_of(place))


def _is_elsewhere(root: Path, place: Path) -> bool:
    """Whether a store other than the present one, of which something may be left to send, has the whole run."""
    marks = [sent for store, sent in read_marks(place).items() if store != store_name(root)]
    return max(marks, default=0) >= (place / SPOOL).stat().st_size


def _has_more(root: Path, place: Path) -> bool:
    readers = [SpoolReader(spool, store_name(root)) for spool in spools_of(place)]
    return any(next(reader.lines(), None) for reader in readers)


if __name__ == "__main__":
    answer = os.dup(1)  # libraries that print have no part in it
    os.dup2(2, 1)
    reason = serve(Path(sys.argv[1]), Path(sys.argv[2]))
    with suppress(BrokenPipeError):  # nobody waits for it any more
        os.write(answer, reason.encode())
    os._exit(1 if reason else 0)
