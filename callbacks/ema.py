"""An exponential moving average of the trained weights, and the exchange of the two for measuring and sampling."""

from collections.abc import Iterator
from contextlib import contextmanager

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from avlit.checkpoints import Checkpoint
from avlit.commit import CheckpointError
from avlit.module import AVModule
from avlit.ranks import fill, gather_parts_again, is_part, like_sharded, local


class EMA(pl.Callback):
    """Averages what is trained, every `every` steps, in float32.

    decay: per update; the first updates use (1 + n) / (10 + n) where that is smaller, so that the average does not
    remember the initialisation. decay 0 switches it off: `weights` are then the trained ones.
    """

    def __init__(self, *, decay: float, every: int = 1):
        self.decay = decay
        self.every = every
        self.num_updates = 0
        self.average: dict[str, Tensor] = {}

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert isinstance(module, AVModule)
        self.attach(module)

    def attach(self, module: AVModule) -> None:
        """Start the average at the module's weights, unless it was restored, on the module's device."""
        if self.decay and not self.average:
            self.average = {name: p.detach().float().clone() for name, p in module.trained_parameters.items()}
        names = module.trained_parameters if self.average else ()
        if missing := sorted(set(names) - self.average.keys()):
            raise CheckpointError(f"the average that was restored lacks {missing[0]}")
        for name, parameter in module.trained_parameters.items():
            if self.average and not is_part(self.average[name]):
                self.average[name] = like_sharded(self.average[name], parameter)
        self.average = {name: self.average[name] for name in names}
        # Kept: walking through the model at every step costs as much as the average itself.
        self.trained = tuple(module.trained_parameters.values())

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take a checkpoint's average and the number of updates that made it."""
        if not self.decay or not checkpoint.has_ema:  # switched off, or switched on since
            return
        saved, here = checkpoint.ema(), self.average
        if missing := sorted(here.keys() - saved.keys()):
            raise CheckpointError(f"{checkpoint.path}: the average lacks {missing[0]}")
        for name, tensor in here.items():
            fill(tensor, saved[name])
        self.average = here or dict(saved)
        self.num_updates = int(checkpoint.state.counters["ema_updates"])

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        assert isinstance(module, AVModule)
        if not self.decay or not module.has_stepped(trainer, batch_idx) or module.steps_done(trainer) % self.every:
            return
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        average, current = ([local(each.detach()) for each in all_] for all_ in (self.average.values(), self.trained))
        get_ema_multi_avg_fn(decay)(average, current, self.num_updates)
        self.num_updates += 1

    @contextmanager
    @torch.no_grad()
    def applied(self, module: AVModule) -> Iterator[None]:
        """Inside, the module has the averaged weights; afterwards the trained ones again, bit for bit."""
        parameters = module.trained_parameters if self.decay and self.average else {}
        trained = {name: local(p.detach()).clone() for name, p in parameters.items()}
        for name, parameter in parameters.items():
            local(parameter.detach()).copy_(local(self.average[name]))
        try:
            yield
        finally:
            gather_parts_again(module.model)  # whole weights of the last forward pass are the average's
            for name, parameter in parameters.items():
                local(parameter.detach()).copy_(trained[name])
