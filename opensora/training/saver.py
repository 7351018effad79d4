"""Writing checkpoints beside the training: the loop stands still for a copy, a thread does the rest."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from torch import Tensor

from opensora.training.checkpoint import remove_old, save_checkpoint


@dataclass(frozen=True)
class Snapshot:
    """All that a checkpoint holds, as CPU tensors that training does not touch any more; see `save_checkpoint`."""

    step: int
    model: dict[str, Tensor]
    ema: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    rng: dict[str, Tensor]
    info: dict[str, object]


@dataclass
class Saver:
    """Writes one snapshot at a time into `folder`; for rank 0.

    Older checkpoints are removed when a new one is whole, never before. An error of the thread comes out of the next
    call, so that a full disk ends the run, and does so while what was saved before is still there.

    Args:
        keep: newest checkpoints kept.
        every: checkpoints at its multiples are kept for good; 0: none.
        saved: called by the thread with each checkpoint's folder.
    """

    folder: Path
    keep: int
    every: int = 0
    saved: Callable[[Path], None] = lambda path: None
    _thread: threading.Thread | None = None
    _error: Exception | None = field(default=None, repr=False)

    def save(self, snapshot: Snapshot) -> None:
        """Begin to write; waits for the snapshot before it, which holds as much memory.

        Raises:
            CheckpointError: that one could not be written.
        """
        self.wait()
        self._thread = threading.Thread(target=self._write, args=(snapshot,), name="saver")
        self._thread.start()

    @property
    def failed(self) -> bool:
        """Whether a snapshot could not be written; `wait` says why."""
        return self._error is not None

    def wait(self) -> None:
        """Return when nothing is left to be written.

        Raises:
            CheckpointError: it could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            self.wait()
        except Exception:
            if kind is None:
                raise

    def _write(self, snapshot: Snapshot) -> None:
        try:
            path = save_checkpoint(self.folder, **vars(snapshot))
            remove_old(self.folder, self.keep, self.every)
            self.saved(path)
        except Exception as error:  # comes out of the next call
            self._error = error
