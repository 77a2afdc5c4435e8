"""How processes end: by a signal, or with nobody left to read what they say."""

import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from rlhf_recipes.launch import processes, start
from rlhf_recipes.system.terminal import complain, print_table, say


class Stage:
    """Stands in for the process of a stage: while the launcher waits, it gets signals; then it ends with a code."""

    pid = 4711

    def __init__(self, code: int, *signals: int):
        self.code, self.signals, self.got = code, signals, []

    def __call__(self, command, **options):
        return self

    def wait(self) -> int:
        for number in self.signals:
            signal.raise_signal(number)
        return self.code

    def send_signal(self, number: int) -> None:
        self.got.append(number)


@pytest.mark.parametrize(
    ("signals", "got", "code", "as_shell"),
    [
        ([signal.SIGTERM], [signal.SIGTERM], 143, 143),
        ([signal.SIGHUP], [signal.SIGHUP], 129, 129),
        ([signal.SIGINT], [signal.SIGTERM], 143, 130),  # the terminal sends a SIGINT of its own
        ([signal.SIGINT, signal.SIGINT], [signal.SIGTERM, signal.SIGINT], 130, 130),
        ([], [], 2, 2),
    ],
)
def test_a_launcher_passes_signals_on(signals, got, code, as_shell, monkeypatch, capsys):
    stage = Stage(code, *signals)
    monkeypatch.setattr(subprocess, "Popen", stage)
    before = [signal.getsignal(number) for number in start.STOP_SIGNALS]
    assert start.launch_stage("ppo", "imdb_tiny", [], False) == as_shell and stage.got == got
    assert [signal.getsignal(number) for number in start.STOP_SIGNALS] == before
    assert capsys.readouterr().err == ""


def test_a_stage_that_the_system_killed_is_named(monkeypatch, capsys):
    monkeypatch.setattr(subprocess, "Popen", Stage(-9))
    assert start.launch_stage("ppo", "imdb_tiny", [], False) == 137
    assert "stage ppo: process 4711 was ended by SIGKILL (the system does that when memory runs out)" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("codes", "code", "said"), [((-9, 2), 2, "rank 0: process 70 was ended by SIGKILL"), ((2,), 2, "")]
)
def test_a_rank_that_the_system_killed_is_named(codes, code, said, monkeypatch, capsys):
    from accelerate.commands import launch
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    failures = {
        rank: SimpleNamespace(exitcode=each, pid=70 + rank, local_rank=rank, timestamp=0)
        for rank, each in enumerate(codes)
    }

    def fail(given):
        error = ChildFailedError.__new__(ChildFailedError)
        error.failures = failures
        raise error

    monkeypatch.setattr(processes, "end_with_parent", lambda: None)
    monkeypatch.setattr(launch, "launch_command", fail)
    monkeypatch.setattr(processes.logging, "disable", lambda level: None)
    monkeypatch.setattr(sys, "argv", ["processes", "-m", "rlhf_recipes.ppo"])
    before = start.on_stop(signal.SIG_DFL)
    try:
        with pytest.raises(SystemExit) as ended:
            processes.main()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert ended.value.code == code
    err = capsys.readouterr().err
    assert said in err and (said or err == "")


def test_a_reader_that_has_ended_does_not_end_the_work(monkeypatch):
    """As in `rlhf-recipes run imdb_tiny | head -1`."""
    for stream, speak in (
        ("stdout", lambda: (say("a line"), print_table(["a"], [["b"]]))),
        ("stderr", lambda: complain("x")),
    ):
        reads, writes = os.pipe()
        os.close(reads)
        with open(writes, "w", closefd=False) as closed:
            monkeypatch.setattr(sys, stream, closed)
            speak()
            speak()
            monkeypatch.undo()
        os.close(writes)
