"""Ctrl-C raises KeyboardInterrupt, whatever code it interrupts."""

import os
import signal
import subprocess
import threading
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from eigenzoo.zoo.utils.interrupt import interruptible


def test_ctrl_c_while_reading_files_always_raises_a_keyboard_interrupt(tmp_path):
    def read():
        end = time.monotonic() + 60
        with interruptible():
            shell.stdin.write("press\n")
            while time.monotonic() < end:
                load_file(tmp_path / "x.safetensors")

    save_file({str(i): torch.zeros(64, 64) for i in range(20)}, tmp_path / "x.safetensors")
    press = f"while read line; do sleep 0.01; kill -INT {os.getpid()}; done"
    with subprocess.Popen(
        ["sh", "-c", press], stdin=subprocess.PIPE, text=True, bufsize=1
    ) as shell:
        for _ in range(30):  # torch turns two of five interrupts into a ValueError
            with pytest.raises(KeyboardInterrupt):
                read()


def press(number: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(number)
    raise ValueError("what code in C makes of an interrupt")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_other_signals_that_end_a_process_act_as_ctrl_c(number):
    handler = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), interruptible():
        signal.raise_signal(number)
    with pytest.raises(KeyboardInterrupt), interruptible(), interruptible():
        press(number)
    assert signal.getsignal(number) is handler


def test_a_process_under_nohup_goes_on_without_its_terminal():
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interruptible():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, handler)


def test_errors_without_ctrl_c_stay_what_they_are():
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(ValueError, match="rank"), interruptible():
        raise ValueError("rank")
    assert signal.getsignal(signal.SIGINT) is handler


def test_nothing_changes_if_ctrl_c_is_ignored_or_another_thread_works():
    def work():
        with interruptible():
            handlers.append(signal.getsignal(signal.SIGINT))

    handlers, handler = [], signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        work()
    finally:
        signal.signal(signal.SIGINT, handler)
    assert handlers == [handler, signal.SIG_IGN]
