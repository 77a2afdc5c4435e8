"""Reward functions cannot damage the run: their random numbers, settings of the process, and processes of their own."""

import logging
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from statistics import fmean
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from typer.testing import CliRunner

from rlhf_recipes.cli import app
from rlhf_recipes.commands import stages
from rlhf_recipes.rewards.apart import RewardStreams
from rlhf_recipes.rewards.calls import call_all
from rlhf_recipes.rewards.checked import RewardError, checked
from rlhf_recipes.rewards.from_trl import as_reward_funcs
from rlhf_recipes.rewards.timed import TimedReward
from support.places import ROOT

CALL = {"prompts": ["the film"] * 2, "completions": [" was good .", " was bad"], "completion_ids": [[5], [6]]}

OWN = """
import os, random, re, time
import numpy

def draws(completions):
    return [random.random() + numpy.random.random() for _ in completions]

async def draws_later(completions):
    return draws(completions)

def backtracks(completions):
    return [bool(re.match("(a+)+$", "a" * 60 + "b"))]  # holds the interpreter for years

def sleeps(completions):
    time.sleep(0.2)
    return [0.0, 0.0]

def leaves(completions):
    os._exit(0)

def fails(completions):
    class Stop(BaseException):
        pass
    raise Stop("oops")

def logs(completions, log_metric, log_extra, trainer_state):
    log_metric("steps", trainer_state.global_step)
    log_extra("pid", value=os.getpid())
    return [1.0] * len(completions)

def factory_that_leaves():
    os._exit(3)
"""


def draws(completions):
    return [random.random() + np.random.random() + torch.rand(()).item() for _ in completions]


def present():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


@pytest.fixture
def timed(tmp_path, monkeypatch):
    """Makes a function of OWN, with a process and a timeout."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN)
    return lambda name, timeout=60.0: TimedReward(("recipe", (f"own.py:{name}", {})), name, False, timeout)


def test_a_function_that_seeds_moves_no_other_stream_and_one_that_draws_draws_anew():
    def seeds(completions):
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        return [0.0] * len(completions)

    before, streams = present(), RewardStreams(7)
    first, second = (call_all([checked(draws, "f", False)], streams, **CALL)[0] for _ in range(2))
    assert len({*first, *second}) == 4
    call_all([checked(seeds, "f", False)], streams, **CALL)
    assert present() == before
    again, of_another_rank = (call_all([checked(draws, "f", False)], RewardStreams(7, r), **CALL)[0] for r in (0, 1))
    assert again == first and of_another_rank != first
    torch.rand(3)  # and the training's numbers do not move theirs
    assert call_all([checked(draws, "f", False)], RewardStreams(7), **CALL)[0] == first


@pytest.mark.parametrize("is_timed", [False, True])
def test_streams_continue_from_a_checkpoint(is_timed, timed, tmp_path):
    function, streams = timed("draws") if is_timed else checked(draws, "draws", False), RewardStreams(7)
    call_all([function], streams, **CALL)
    torch.save(streams.to_dict(), tmp_path / "state.pt")
    expected = call_all([function], streams, **CALL)
    resumed = RewardStreams(7)
    resumed.load(torch.load(tmp_path / "state.pt", weights_only=True))
    assert call_all([timed("draws") if is_timed else function], resumed, **CALL) == expected


@pytest.mark.parametrize(
    ("change", "read"),
    [
        (lambda: torch.set_grad_enabled(False), torch.is_grad_enabled),
        (lambda: torch.set_default_dtype(torch.float64), torch.get_default_dtype),
        (lambda: torch.set_default_device("meta"), torch.get_default_device),
        (lambda: os.chdir("/"), os.getcwd),
        (lambda: warnings.simplefilter("error"), lambda: list(warnings.filters)),
        (lambda: logging.disable(logging.CRITICAL), lambda: logging.root.manager.disable),
        (lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN), lambda: signal.getsignal(signal.SIGTERM)),
    ],
)
def test_settings_of_the_process_are_put_back(change, read):
    def changes(completions):
        change()
        raise ValueError

    before = read()
    with pytest.raises(RewardError):
        call_all([checked(changes, "f", False)], **CALL)
    assert read() == before


def test_a_timeout_holds_whatever_the_function_does(timed):
    """Before, a function that holds the interpreter also held the timeout, Ctrl-C and SIGTERM."""
    function = timed("backtracks", 0.2)
    for _ in range(2):  # the second call has a new process
        with pytest.raises(RewardError, match="'backtracks' did not answer within 0.2 s .on 2 completions"):
            call_all([function], **CALL)


def test_signals_reach_this_process_while_a_function_hangs(timed):
    def stop(*_):
        raise SystemExit(143)

    function, previous = timed("backtracks"), signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(SystemExit):
            call_all([function], **CALL)
    finally:
        signal.signal(signal.SIGALRM, previous)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("leaves", "'leaves' ended its process .exit code 0. .on 2 completions, the first: ' was good .'"),
        ("fails", "'fails' raised Stop: oops .on 2 completions"),
    ],
)
def test_the_end_of_a_functions_process_is_an_error_of_the_function(name, message, timed):
    with pytest.raises(RewardError, match=message):
        call_all([timed(name)], **CALL)


def test_a_function_in_its_own_process_is_set_up_once_and_its_logs_come_back(timed):
    with pytest.raises(RewardError, match="ended its process .exit code 3. while it was set up"):
        timed("factory_that_leaves")
    found, function = [], timed("logs")
    more = {
        "log_metric": lambda *logged: found.append(logged),
        "log_extra": lambda name, value: found.append(value),
        "trainer_state": SimpleNamespace(global_step=3),
    }
    for _ in range(2):
        assert call_all([function, timed("draws_later")], **CALL, **more)[0] == [1.0, 1.0]
    assert found[0] == found[2] == ("steps", 3) and found[1] == found[3] != os.getpid()


def test_a_functions_process_ends_with_the_process_that_asks_it(timed, tmp_path):
    program = (
        "import os; from rlhf_recipes.rewards.timed import TimedReward\n"
        "f = TimedReward(('recipe', ('own.py:backtracks', {})), 'f', False, 60)\n"
        "print(f._process.pid, flush=True); f(prompts=['a'], completions=['b'])"
    )
    asking = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    child = psutil.Process(int(asking.stdout.readline()))
    asking.kill()
    asking.wait()
    asking.stdout.close()
    child.wait(20)
    assert not child.is_running()


def test_functions_of_modules_get_a_process_and_others_a_thread():
    """As `reward_timeout` of a trainer in a program of the user's."""
    kinds = [type(f).__name__ for f in as_reward_funcs([fmean, lambda completions: [1.0]], None, timeout=60)[0]]
    assert kinds == ["TimedReward", "SyncReward"]
    assert [type(f).__name__ for f in as_reward_funcs([fmean], None, timeout=None)[0]] == ["SyncReward"]


def test_a_late_answer_is_late_although_nobody_waited_for_it(timed):
    def busy(completions):
        time.sleep(0.3)
        return [0.0, 0.0]

    function = timed("sleeps", 0.1)
    with pytest.raises(RewardError, match="'sleeps' did not answer within 0.1 s"):
        call_all([checked(busy, "busy", False), function], **CALL)


@pytest.mark.parametrize("command", ["run", "rloo", "eval"])
def test_a_stage_that_a_function_ends_has_not_succeeded(command, tmp_path, monkeypatch):
    """As `os._exit(0)` in a reward function without a timeout ends it."""
    monkeypatch.setattr(stages, "launch_stage", lambda *_: 0)
    done = CliRunner().invoke(app, [command, "imdb_tiny", f"runs_dir={tmp_path}"])
    assert done.exit_code == 2 and "ended with exit code 0 but did not finish" in done.stderr
