"""One stage as several processes: accelerate's launcher, but with exit codes of ours, and quiet.

    python -m rlhf_recipes.launch.processes --config_file FILE -m rlhf_recipes.ppo --recipe imdb_tiny

Takes what `accelerate launch` takes. SIGTERM is passed on to the processes, which are waited for; at a SIGINT they are
killed. What they have to say about their end is not followed by the launcher's log and traceback.
"""

import logging
import os
import shlex
import signal
import sys
from contextlib import suppress

import psutil

from rlhf_recipes.launch.start import COMMAND, STOPPED, USER_ERROR, as_shell, end_with_parent

SECONDS_TO_STOP = 45
"""How long torch's launcher waits, when one process has ended, for the others, before it kills them: they may wait for
the one that is gone. Processes that a user's SIGTERM stops end together, with their checkpoint saved."""


def main() -> None:
    end_with_parent()
    logging.disable(logging.ERROR)
    from accelerate.commands import launch
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    given = launch.launch_command_parser().parse_args()
    given.signals_to_handle = "SIGHUP,SIGQUIT"  # not those two, which would hide how the processes have ended
    given.shutdown_timeout = SECONDS_TO_STOP
    launch.simple_launcher = _become
    os.environ[COMMAND] = shlex.join(sys.argv[1:])
    signal.signal(signal.SIGTERM, lambda number, frame: _pass_on(number))
    signal.signal(signal.SIGINT, lambda number, frame: _pass_on(signal.SIGKILL))
    try:
        launch.launch_command(given)
    except ChildFailedError as failed:
        codes = [as_shell(failure.exitcode) for failure in failed.failures.values()]
        # A rank with a message stops the others: by the launcher's SIGTERM, or because they miss it.
        sys.exit(min(codes, key=lambda code: (code != USER_ERROR, code == STOPPED)))
    except SignalException as ended:
        sys.exit(128 + ended.sigval)


def _become(given) -> None:
    """In place of a process that waits for a single other one: become that one, which then hears every signal itself."""
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
