"""One stage as several processes: accelerate's launcher, quiet, and with the exit codes of `launch/start.py`.

    python -m rlhf_recipes.launch.processes --config_file FILE -m rlhf_recipes.ppo --recipe imdb_tiny

Takes the arguments of `accelerate launch`. Passes SIGHUP and SIGTERM on to the processes and waits for them; SIGINT kills them. Hides
the launcher's own log and traceback, because the processes report their errors.
"""

import logging
import os
import shlex
import signal
import sys
from contextlib import suppress

import psutil

from rlhf_recipes.launch.start import COMMAND, STOP_CODES, USER_ERROR, as_shell, end_with_parent, ended_by, on_stop
from rlhf_recipes.system.terminal import complain

SECONDS_TO_STOP = 45
"""Seconds from the end of one process until torch's launcher kills the others, which may wait for it forever. After a
user's SIGTERM, all processes save their checkpoint and end together."""


def main() -> None:
    end_with_parent()
    logging.disable(logging.ERROR)
    from accelerate.commands import launch
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    given = launch.launch_command_parser().parse_args()
    given.signals_to_handle = "SIGQUIT"  # the others would hide the processes' exit codes
    given.shutdown_timeout = SECONDS_TO_STOP
    launch.simple_launcher = _become
    os.environ[COMMAND] = shlex.join(sys.argv[1:])
    on_stop(lambda number, frame: _pass_on(signal.SIGKILL if number == signal.SIGINT else number))
    try:
        launch.launch_command(given)
    except ChildFailedError as failed:
        for rank, failure in failed.failures.items():
            if failure.exitcode < 0 and as_shell(failure.exitcode) not in STOP_CODES:
                complain(f"rank {rank}: {ended_by(failure.pid, failure.exitcode)}")
        codes = [as_shell(failure.exitcode) for failure in failed.failures.values()]
        # A rank that fails with a message makes the others stop or fail, so its exit code comes first.
        sys.exit(min(codes, key=lambda code: (code != USER_ERROR, code in STOP_CODES)))
    except SignalException as ended:
        sys.exit(128 + ended.sigval)
    except ValueError as error:  # accelerate refuses the configuration
        complain(f"--accelerate-config {given.config_file}: {error}")
        sys.exit(USER_ERROR)


def _become(given) -> None:
    """Replaces this process by its single worker, so that signals reach it."""
    from accelerate.utils.launch import prepare_simple_launcher_cmd_env

    command, environment = prepare_simple_launcher_cmd_env(given)
    os.execve(command[0], command, environment)


def _pass_on(number: int) -> None:
    processes = psutil.Process().children()
    if not processes:
        sys.exit(128 + number)
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)


if __name__ == "__main__":
    main()
