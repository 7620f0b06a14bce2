"""AVModule: what every recipe's LightningModule shares: optimizer, schedule, clipping and the non-finite guard.

It has no maths of its own: a recipe's flat `step` turns a batch into per-sample losses, and this file differentiates
them. Logging, EMA, samples and checkpoints are callbacks.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim.lr_scheduler import LambdaLR

from avlit.batch import AVBatch
from avlit.checkpoints import Checkpoint
from avlit.config import OptimizerConfig, SampleConfig
from avlit.eight_bit import build_adamw_8bit
from avlit.inherit import check_base, check_same_parameters, load_base, restore_optimizer, restore_weights
from avlit.objectives import Losses
from avlit.randomness import Draws, seed_dropout
from avlit.ranks import is_distributed, is_sharded, local, norm_over_parts
from avlit.sampling import Latents


def lr_factor(step: int, *, kind: str, steps: int, warmup: float, final: float) -> float:
    """The learning rate at `step` (from 0) as a fraction of its peak.

    kind: constant, linear or cosine. warmup: fraction of `steps` that rises linearly. final: fraction at the end.
    """
    warmup_steps = round(warmup * steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
    if kind == "constant":
        return 1.0
    if kind == "linear":
        return 1.0 + (final - 1.0) * progress
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * progress))


def build_optimizer(parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW, fused: one kernel, and it can leave out an update without asking the device (`found_inf`)."""
    if config.states == "8bit":
        return build_adamw_8bit(parameters, config)
    return torch.optim.AdamW(
        parameters,
        lr=config.lr,
        betas=(config.betas[0], config.betas[1]),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


class AVModule(pl.LightningModule):
    """A model with its recipe's `step`, trained by one optimizer.

    model: the network; parameters that are not to be trained have `requires_grad` False.
    start_step: optimizer steps done before this process (a resumed run); every count of steps includes it.
    """

    skipped: Tensor
    skipped_in_a_row: Tensor

    def __init__(self, model: nn.Module, *, optimizer: OptimizerConfig, steps: int, seed: int, start_step: int = 0):
        super().__init__()
        self.model = model
        self.optimizer_config = optimizer
        self.total_steps = steps
        self.seed = seed
        self.start_step = start_step
        self.base_model = ""  # fingerprint of released weights, or of a base, under the model, once they are loaded
        self.released: frozenset[str] = frozenset()  # names of the tensors that came with them
        self.adapter: dict[str, object] = {}  # what is trained instead of the model (`avlit.adapters`), for checkpoints
        self.grad_norm: Tensor | None = None
        self.skip = torch.zeros(())  # 1 on the device where the last update was left out
        self.sharding: Callable[[nn.Module, DeviceMesh], None] | None = None  # what spreads the model over the ranks
        self._resumed: Checkpoint | None = None
        # Counted on the device and read at log points only, so that no step waits for it.
        self.register_buffer("skipped_in_a_row", torch.zeros(()), persistent=False)
        self.register_buffer("skipped", torch.zeros(()), persistent=False)

    @abstractmethod
    def step(self, batch: AVBatch, draws: Draws) -> Losses:
        """One training step as the paper tells it: from encoded clips and random numbers to per-sample losses."""

    @abstractmethod
    def sample(
        self,
        batch: AVBatch,
        *,
        seeds: Sequence[int],
        settings: SampleConfig,
        keyframes: Tensor | None = None,
        on_step: Callable[[], None] | None = None,
    ) -> Latents:
        """Latents generated for the batch's conditions, clip i from `seeds[i]` alone, of the shapes of the batch's own.

        keyframes bool [B, T]: latent frames of `batch.video_latents` that are given; all others are generated.
        on_step: called after every step of the sampler; what it raises ends the sampling.
        """

    @abstractmethod
    def freeze(self) -> None:
        """Leave trainable what the recipe's config names, before the optimizer is built."""

    @abstractmethod
    def load_released(self, folder: str) -> str:
        """Fill the backbone, set `base_model` and `released`; returns what was loaded, new and unused, in words."""

    @property
    def base_names(self) -> frozenset[str]:
        """Tensors that the run never trains, and that another run's checkpoint holds where no folder is released.

        Its own checkpoints then know them by their fingerprint, as they know released weights.
        """
        return frozenset()

    @property
    def frozen_dtype(self) -> torch.dtype:
        """Precision in which released weights that stay frozen are kept; what trains is float32."""
        return torch.float32

    def load_base(self, checkpoint: Checkpoint) -> str:
        """Fill the tensors of `base_names` from a checkpoint, as released weights would; returns in words what was."""
        self.base_model = load_base(self.model, checkpoint, self.base_names)
        self.released = self.base_names
        return f"Stands on {len(self.base_names)} tensors of {checkpoint.path}, which it does not save again"

    def copy_weights(self, inherited: frozenset[str], trained: frozenset[str]) -> str:
        """Fill what starts as a copy of other weights, once those are there and before anything is trained.

        inherited: names of the parameters that came from `init=`; trained: those that its run trained. Returns what
        was copied, in words, empty for nothing.
        """
        return ""

    @property
    @abstractmethod
    def scheduler_settings(self) -> dict[str, Any]:
        """What a sampler of diffusers must know: the backbone's noise schedule and what it predicts."""

    def check_encoders(self, encoders: Any) -> None:
        """Raise ConfigError where the model's sizes do not fit what the run's codecs make (`data.encode.Encoders`)."""
        return None

    def joint_conditions(self, batch: AVBatch) -> dict[str, Any] | None:
        """What the model is given of a batch besides latents and times; None where it has no joint attention to show.

        The model then takes them with both noisy latents, `video_timestep`, `audio_timestep` and `observe`.
        """
        return None

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of what a clip may be trained to do, by which losses are logged; none for a recipe of one task."""
        return ()

    @property
    @abstractmethod
    def tokens_per_sample(self) -> int:
        """Tokens that one clip is to the backbone's attention, text included; for throughput."""

    @property
    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Name -> parameter of what the optimizer updates, names as in `model`'s state dict."""
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def saved_weights(self) -> dict[str, Tensor]:
        """What a checkpoint holds: parameters and buffers but the untrained ones that released weights restore."""
        left_out = self.released - self.trained_parameters.keys()
        return {name: tensor for name, tensor in self.model.state_dict().items() if name not in left_out}

    def configure_model(self) -> None:
        """Shard the model; Lightning calls it when the ranks know each other, before the optimizer is built."""
        if self.sharding is not None and not is_sharded(self.model):
            mesh = self.device_mesh
            assert mesh is not None  # `avlit.strategies` plans a sharding with the strategy that makes one
            self.sharding(self.model, mesh["data_parallel"])

    def resume(self, checkpoint: Checkpoint) -> None:
        """Take a checkpoint's weights and counters now, and its optimizer once that is built; after `freeze`."""
        check_base(checkpoint, self.base_model)
        check_same_parameters(checkpoint.state.optimizer, [list(self.trained_parameters)])
        self.released -= checkpoint.weights().keys()  # they had been trained before, in the run that this one came from
        restore_weights(self.model, checkpoint, self.saved_weights())
        self.skipped.fill_(checkpoint.state.counters["skipped"])
        self.skipped_in_a_row.fill_(checkpoint.state.counters["skipped_in_a_row"])
        self._resumed = checkpoint

    def restore_moments(self, optimizer: torch.optim.Optimizer, checkpoint: Checkpoint) -> None:
        """Give the optimizer the moments that it had when the checkpoint was saved."""
        restore_optimizer(optimizer, self.trained_parameters, checkpoint.optimizer(), checkpoint.state.optimizer)

    def steps_done(self, trainer: pl.Trainer) -> int:
        """Optimizer steps of the run so far, those before a resume included."""
        return self.start_step + trainer.global_step

    def has_stepped(self, trainer: pl.Trainer, batch_index: int) -> bool:
        """Whether this micro-batch completed an optimizer step (the last of the accumulated ones does)."""
        return (batch_index + 1) % trainer.accumulate_grad_batches == 0

    def training_step(self, batch: AVBatch, batch_index: int) -> dict[str, object]:
        """Differentiate the recipe's losses; Lightning calls this."""
        seed_dropout(self.seed, batch.step, batch.slots, self.device)
        losses = self.step(batch, Draws(self.seed, batch.step, batch.slots))
        loss = losses.total
        self.loss_is_finite = torch.isfinite(loss.detach())
        return {"loss": loss, "losses": losses}

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        """Clip to the configured norm; where the norm is not finite on any rank, all ranks skip the update.

        The fused optimizer reads `found_inf` on the device and then changes neither weights nor moments.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        gradients = [local(p.grad) for p in parameters if p.grad is not None]  # of this rank's parts
        norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
        norm = norm_over_parts(norm, parameters)
        skip = (~(torch.isfinite(norm) & self.loss_is_finite)).float()
        if is_distributed():
            dist.all_reduce(skip, dist.ReduceOp.MAX)
        # as torch's clip_grads_with_norm_, which would go through the parts one by one
        factor = (self.optimizer_config.clip / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, factor)  # pyright: ignore[reportPrivateImportUsage]
        optimizer = getattr(optimizer, "optimizer", optimizer)
        optimizer.found_inf = skip  # pyright: ignore[reportAttributeAccessIssue] what torch's own GradScaler sets
        self.grad_norm, self.skip = norm, skip
        self.skipped += skip
        self.skipped_in_a_row.add_(1).mul_(skip)

    def configure_optimizers(self):
        """The optimizer over what is trained, and its schedule, which counts from the run's first step."""
        config = self.optimizer_config
        optimizer = build_optimizer(self.trained_parameters.values(), config)
        if self._resumed is not None:
            self.restore_moments(optimizer, self._resumed)
            self._resumed = None
        schedule = LambdaLR(
            optimizer,
            lambda step: lr_factor(
                step + self.start_step,
                kind=config.schedule,
                steps=self.total_steps,
                warmup=config.warmup,
                final=config.final,
            ),
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
