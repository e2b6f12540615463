"""Signals as a request to stop."""

from __future__ import annotations

import os
import signal

import pytest

from oreal_megatron.stopping import SIGNALS, StopRequest


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_asks_to_stop_and_is_handled_again_as_before_afterwards(number, capfd):
    stop, before = StopRequest(), signal.getsignal(number)
    with stop.on_signals():
        os.kill(os.getpid(), number)
        assert stop.signal == signal.Signals(number).name
    assert signal.getsignal(number) is before
    assert f"{stop.signal}: stopping as soon as nothing is lost" in capfd.readouterr().err


def test_second_ctrl_c_interrupts_at_once_and_a_third_ends_the_process():
    stop = StopRequest()
    with stop.on_signals():
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.is_made
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
