"""The first signal is remembered, the second one ends the process; afterwards signals mean what they meant before."""

from __future__ import annotations

import os
import signal

import pytest

from pretrain.signals import StopSignal


def test_the_first_signal_is_remembered_and_the_second_exits_at_once(capsys):
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == "SIGTERM"
        with pytest.raises(SystemExit) as exit_:
            os.kill(os.getpid(), signal.SIGINT)
            signal.sigtimedwait([], 1)  # gives the handler its turn
    assert exit_.value.code == 128 + signal.SIGINT
    assert "saving at the next step" in capsys.readouterr().err


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
