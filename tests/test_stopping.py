"""A stop that is asked for before the first step lets none begin; who is asked twice to interrupt ends at once."""

import os
import signal
import time
from pathlib import Path

import pytest
from torch.multiprocessing.spawn import spawn

from callbacks.stopping import Stopping, StopRequestedError
from tests.test_module import Poisoned, fit


def stopping(saved: list[int] | None = None) -> Stopping:
    return Stopping(lambda trainer, module, step: (saved if saved is not None else []).append(step))


def test_a_stop_asked_for_before_the_first_step_lets_none_begin(tmp_path: Path):
    callback, saved = Stopping(lambda trainer, module, step: saved.append(step)), list[int]()
    callback.asked = signal.SIGTERM
    module = Poisoned(steps=6)
    fit(module, tmp_path, callback)
    assert module.seen == [] and saved == [] and callback.stopped_by == signal.SIGTERM


def test_a_stop_asked_for_in_a_step_saves_it_and_lets_no_other_begin(tmp_path: Path):
    saved: list[int] = []
    callback = stopping(saved)

    class Asked(Poisoned):
        def step(self, batch, draws):
            if batch.step == 2:
                os.kill(os.getpid(), signal.SIGUSR1)
            return super().step(batch, draws)

    with callback.handling_signals():
        module = Asked(steps=6)
        fit(module, tmp_path, callback)
    assert len(module.seen) == 3 and saved == [3] and callback.stopped_by == signal.SIGUSR1


def test_signals_mean_what_they_meant_before_once_a_session_is_over():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    with stopping().handling_signals():
        assert signal.getsignal(signal.SIGTERM) != before[signal.SIGTERM]
    assert {number: signal.getsignal(number) for number in before} == before


def test_only_a_second_interrupt_ends_at_once():
    callback = stopping()
    with callback.handling_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)  # the first of its kind
        with pytest.raises(StopRequestedError):
            callback.check()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def one_waits_and_is_asked(rank: int, folder: str) -> None:
    """Of two processes the first works, the other waits for it and gets the signal."""
    import torch.distributed as dist

    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    callback = stopping()
    callback.setup(type("Trainer", (), {"_signal_connector": type("Connector", (), {})()})(), None, "fit")  # type: ignore
    with callback.handling_signals():
        if rank:
            os.kill(os.getpid(), signal.SIGTERM)
            callback.meet()
        else:
            limit = time.monotonic() + 60
            with pytest.raises(StopRequestedError):
                while time.monotonic() < limit:
                    callback.check()
                    time.sleep(0.01)
            callback.meet()
        assert callback._any_rank_asked() and callback.stopped_by == signal.SIGTERM
    dist.destroy_process_group()


def test_a_signal_to_a_rank_that_waits_reaches_the_one_that_works(tmp_path: Path):
    spawn(one_waits_and_is_asked, (str(tmp_path),), nprocs=2)  # raises what a rank asserts
