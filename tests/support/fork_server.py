"""A process with torch and TRL loaded: it forks what tests start as `python -m rlhf_recipes...`, which saves each its imports.

    python fork_server.py    # file descriptor 0 is the socket on which requests come

`subprocess.Popen` stays what tests and the package call. A forked process is a child of its caller, as any other is: it
has the caller as parent, its own directory, environment, files, process group and exit code. Processes that such a
process starts in turn are forked from it; a launcher, which has threads by then, has a server of its own for that. What a library may read at import differs from a test's environment to the
server's: such a process starts cold, as every process does that is no module of this package or accelerate's launcher.
"""

import atexit
import ctypes
import gc
import importlib
import json
import logging
import os
import pkgutil
import runpy
import signal
import socket
import subprocess
import sys
import threading
import traceback
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

MODULES = ("rlhf_recipes.", "accelerate.commands.launch", "support.")
"""The server forks `python -m` of these modules."""

AT_IMPORT = (
    "HF_",
    "TRANSFORMERS_",
    "PYTHON",
    "OMP_",
    "TORCH",
    "CUDA",
    "XDG_",
    "LD_",
    "TRACKIO",
    "OPENAI_LOG",
)
"""Prefixes of variables that libraries read at import: if one differs from the server's, the process starts cold."""

LIBRARIES = (
    "torch.distributed", "transformers", "datasets", "peft", "accelerate.commands.launch", "wandb", "tensorboard",
    "trl.trainer.sft_trainer", "trl.trainer.reward_trainer", "trl.trainer.rloo_trainer", "matplotlib.pyplot", "plotly",
    "transformers.models.gpt2.modeling_gpt2", "transformers.models.distilbert.modeling_distilbert",
    "torch.utils.tensorboard", "scipy.stats", "accelerate.utils.launch",
)  # fmt: skip

NOT_AT_IMPORT = ("TORCHELASTIC_", "TORCH_NCCL_", "CUDA_VISIBLE_DEVICES", "TORCHINDUCTOR_CACHE_DIR")
"""Exceptions: what launchers set for each process, what is read at the first use of a device, and what torch sets itself."""

LAUNCHERS = ("accelerate.commands.launch", "rlhf_recipes.launch.processes")

DOORS = {f"rlhf_recipes.{name}" for name in ("cli", "sft", "reward", "ppo", "rloo", "evaluate", "compare")}
"""The server does not load these, because they run as `__main__`."""

CHILD_SUBREAPER = 36
_start_cold = subprocess.Popen._execute_child
_loaded_with: dict[str, str] = {}


class Server:
    """The server of this test process; the first fork starts it."""

    def __init__(self):
        self.process = self.socket = None

    def ask(self, request: dict, files: list[int]) -> int:
        """Fork a process that becomes a child of this one; returns its id."""
        if self.process is None:
            self.socket, theirs = socket.socketpair()
            with theirs:
                command = [sys.executable, __file__]
                self.process = subprocess.Popen(command, stdin=theirs, env=_loaded_with, stdout=subprocess.DEVNULL).pid
        libc = ctypes.CDLL(None)
        libc.prctl(CHILD_SUBREAPER, 1)
        try:
            message = json.dumps(request).encode()
            socket.send_fds(self.socket, [len(message).to_bytes(8, "big")], files)
            self.socket.sendall(message)
            return int.from_bytes(self.socket.recv(8, socket.MSG_WAITALL), "big")
        finally:
            libc.prctl(CHILD_SUBREAPER, 0)

    def stop(self) -> None:
        if self.process is not None:
            self.socket.close()
            with suppress(ChildProcessError):
                os.waitpid(self.process, 0)

    def fork(self) -> None:
        """Fork this process, which must have no threads yet, as the server."""
        self.socket, theirs = socket.socketpair()
        self.process = os.fork()
        if self.process == 0:
            self.socket.close()
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            serve(theirs)
            os._exit(0)
        theirs.close()


def install(fork: Callable[[dict, list[int]], int]) -> None:
    """Make `subprocess.Popen` of this process call `fork(request, files)` if a process can be forked."""
    if not _loaded_with:
        _loaded_with.update(os.environ)

    def start(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *more):
        _, _, shell, p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, *rest = more
        new_session, process_group = rest[-2:]
        env = dict(os.environ if env is None else env)
        cold = preexec_fn or shell or pass_fds or (fork is fork_here and threading.active_count() > 1)
        if cold or not isinstance(args, (list, tuple)) or not _can_be_forked(args, env):
            _start_cold(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *more)
            return
        request = {
            "arguments": _arguments(args), "cwd": str(cwd or os.getcwd()), "env": env,
            "session": new_session, "group": process_group, "parent": os.getpid(),
        }  # fmt: skip
        files = [own if given == -1 else given for own, given in enumerate((p2cread, c2pwrite, errwrite))]
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = fork(request, files)
        self._child_created = self._closed_child_pipe_fds = True
        for theirs, ours in ((p2cread, p2cwrite), (c2pwrite, c2pread), (errwrite, errread)):
            if theirs != -1 and ours != -1:
                os.close(theirs)
        devnull = getattr(self, "_devnull", None)
        if devnull is not None:
            os.close(devnull)

    subprocess.Popen._execute_child = start


def uninstall() -> None:
    subprocess.Popen._execute_child = _start_cold


def _arguments(command) -> list[str]:
    """The module and its arguments of `python [-u] -m MODULE ...`; nothing of any other command."""
    command = [str(argument) for argument in command]
    if command[:1] != [sys.executable]:
        return []
    rest = command[2:] if command[1:2] == ["-u"] else command[1:]
    return rest[1:] if rest[:1] == ["-m"] else []


def _can_be_forked(command, env: dict[str, str]) -> bool:
    module, *_ = [*_arguments(command), ""]
    if not module.startswith(MODULES):
        return False
    paths = _loaded_with.get("PYTHONPATH", "")
    if env.get("PYTHONPATH") == paths + os.pathsep + os.getcwd():  # which accelerate makes of it for DeepSpeed
        env = env | {"PYTHONPATH": paths}
    names = {name for name in env.keys() | _loaded_with.keys() if name.startswith(AT_IMPORT)}
    return all(env.get(name) == _loaded_with.get(name) for name in names if not name.startswith(NOT_AT_IMPORT))


def fork_here(request: dict, files: list[int]) -> int:
    """Fork this process, so that the new process's children belong to it."""
    pid = os.fork()
    if pid == 0:
        _become(request, files)
    return pid


def _become(request: dict, files: list[int]) -> None:
    """Run as the requested process until its end."""
    code = 1
    try:
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        copies = [os.dup(file) for file in files]
        for own, copy in enumerate(copies):
            os.dup2(copy, own)
        os.closerange(3, 256)
        if request["session"]:
            os.setsid()
        if request["group"] is not None and request["group"] >= 0:
            os.setpgid(0, request["group"])
        _forget_what_happens_at_exit()
        os.chdir(request["cwd"])
        os.environ.clear()
        os.environ.update(request["env"])
        if request["arguments"][0] in LAUNCHERS:
            own = Server()
            own.fork()
            install(own.ask)
            os.execve = lambda *command: (own.stop(), _execve(*command))
        else:
            install(fork_here)
            os.execve = _execve
        code = _run(request["arguments"])
    except BaseException:  # noqa: BLE001 - said as the interpreter says it
        traceback.print_exc()
    finally:
        with suppress(BaseException):
            sys.stdout.flush()
        with suppress(BaseException):
            sys.stderr.flush()
        os._exit(code)


def _forget_what_happens_at_exit() -> None:
    """Temporary folders that libraries made at import belong to the server: this process does not delete them."""
    atexit._clear()
    atexit.register(logging.shutdown)
    weakref.finalize._registry.clear()
    weakref.finalize._registered_with_atexit = False


def _run(arguments: list[str]) -> int:
    """Run a module as `python -m` does; returns the exit code."""
    module, *rest = arguments
    sys.argv = [module, *rest]
    sys.path[0] = os.getcwd()  # where `python -m` looks first
    sys.modules.pop(module, None)
    code = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as leaving:
        code = leaving.code
        if not isinstance(code, int):
            if code is not None:
                print(code, file=sys.stderr)
            code = 0 if code is None else 1
    except KeyboardInterrupt:
        traceback.print_exc()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        sys.stdout.flush()
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:  # noqa: BLE001 - said as the interpreter says it
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    return code & 0xFF


_real_execve = os.execve


def _execve(path, arguments, env) -> None:
    """A process that becomes another module stays warm."""
    arguments = [str(argument) for argument in arguments]
    if not _can_be_forked(arguments, dict(env)):
        _real_execve(path, arguments, env)
    request = {
        "arguments": _arguments(arguments),
        "cwd": os.getcwd(),
        "env": dict(env),
        "session": False,
        "group": None,
    }
    _become(request, [0, 1, 2])


def load() -> None:
    """Load what takes long."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _loaded_with.update(os.environ)
    sys.path[:1] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]
    for name in LIBRARIES:
        importlib.import_module(name)
    import rlhf_recipes

    for module in pkgutil.walk_packages(rlhf_recipes.__path__, "rlhf_recipes."):
        if module.name not in DOORS and "templates" not in module.name and not module.name.endswith("processes"):
            importlib.import_module(module.name)
    gc.collect()
    gc.freeze()  # else the collector of each forked process goes through all that the libraries have made


def serve(asked: socket.socket) -> None:
    """Fork on every request until the socket is closed."""
    assert threading.active_count() == 1, "a process with threads cannot be forked"
    while True:
        head, files, _, _ = socket.recv_fds(asked, 8, 3)
        if not head:
            return
        message = asked.recv(int.from_bytes(head, "big"), socket.MSG_WAITALL)
        request = json.loads(message)
        ours, theirs = os.pipe()
        middle = os.fork()
        if middle == 0:
            pid = os.fork()
            if pid:
                os.write(theirs, pid.to_bytes(8, "big"))
                os._exit(0)
            while os.getppid() != request["parent"]:  # until the process in between has ended
                pass
            _become(request, files)
        os.waitpid(middle, 0)
        asked.sendall(os.read(ours, 8))
        for file in (ours, theirs, *files):
            os.close(file)


if __name__ == "__main__":
    sys.modules["support.fork_server"] = sys.modules["__main__"]
    asking = socket.socket(fileno=os.dup(0))
    load()
    serve(asking)
