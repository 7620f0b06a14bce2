"""Disturbances of a training run on several ranks, planned by environment variables that tests give the processes."""

import os
import signal

from avlit.batch import AVBatch
from avlit.module import AVModule

POISON = "AVLIT_TEST_POISON"
"""STEP:SLOT whose loss is not finite, on whichever rank it falls."""
TERMINATE = "AVLIT_TEST_TERMINATE"
"""STEP:RANK that is sent SIGTERM while it computes that step."""


def disturb() -> None:
    """In this process, do to every recipe's steps what the variables say."""
    poisoned = [int(part) for part in os.environ.get(POISON, "-1:-1").split(":")]
    terminated = [int(part) for part in os.environ.get(TERMINATE, "-1:-1").split(":")]
    train = AVModule.training_step

    def training_step(self: AVModule, batch: AVBatch, batch_index: int) -> dict[str, object]:
        if [batch.step, self.global_rank] == terminated and batch_index % self.trainer.accumulate_grad_batches == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        found = train(self, batch, batch_index)
        if batch.step == poisoned[0] and poisoned[1] in batch.slots:
            loss = found["loss"] * float("nan")  # type: ignore[operator]
            self.loss_is_finite = loss.detach().isfinite()
            return found | {"loss": loss}
        return found

    AVModule.training_step = training_step  # type: ignore[method-assign]
