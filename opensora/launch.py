"""torchrun with the worker's own exit code: `python -m opensora.launch --nproc-per-node 8 train_video --profile h800`.

torchrun ends with 1 whatever a worker ended with. An orchestrator that is to tell "stopped after a checkpoint" (143)
from "do not try again" needs the worker's code.
"""

import logging
import signal
import sys
import uuid
from collections.abc import Callable, Sequence
from tempfile import TemporaryDirectory

from opensora.training.stop import SIGNALS, listen

LOGS = "opensora-torchrun-"  # torchrun would leave a folder behind for each start


def main(arguments: Sequence[str]) -> int:
    """Start the command line in every process that torchrun's options ask for; returns the exit code.

    Args:
        arguments: options of torchrun, then a step and its options; PET_* variables count as they do for torchrun.
    """
    listen()
    from torch.distributed.run import parse_args, run

    options = parse_args([*arguments])
    options.training_script_args = [options.training_script, *options.training_script_args]
    options.module, options.training_script = True, "opensora.cli"
    with TemporaryDirectory(prefix=LOGS, ignore_cleanup_errors=True) as logs:
        options.log_dir = options.log_dir or logs
        return exit_code(lambda: run(options))


def launch_here(processes: int, module: str, *arguments: str) -> int:
    """Run a module in processes of this machine and wait; returns the exit code, as `exit_code` does."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    with TemporaryDirectory(prefix=LOGS, ignore_cleanup_errors=True) as logs:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=logs),
        )
        launch = elastic_launch(config, sys.executable)
        return exit_code(lambda: launch("-m", module, *arguments))


def exit_code(start: Callable[[], object]) -> int:
    """Call `start`, which launches processes by torch's elastic launcher, and return how they ended.

    Returns:
        0; the code of the process that failed first, 128 + N where signal N ended it; 128 + N where signal N told the
        launcher to stop, which passes it on and waits for the processes (PET_SHUTDOWN_TIMEOUT seconds).
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # a process says itself why it fails
    before = {number: signal.getsignal(number) for number in SIGNALS}  # the launcher leaves handlers of its own
    try:
        start()
    except ChildFailedError as error:
        failures = sorted(error.failures.values(), key=lambda failure: failure.timestamp)
        codes = [code if (code := failure.exitcode) > 0 else 128 - code for failure in failures]
        return next((code for code in codes if code != 128 + signal.SIGTERM), codes[0])  # the rest were told to end
    except SignalException as error:
        return 128 + error.sigval
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
