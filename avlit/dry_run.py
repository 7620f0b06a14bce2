"""A training step without numbers: a recipe's own `step` and backward pass on the meta device, operations counted.

Nothing of the model's size is allocated, and no recipe is named: what is counted follows from the module and the config
as they are, whatever is frozen, adapted or computed again.
"""

import weakref
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward  # pyright: ignore[reportPrivateUsage]
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

from avlit.batch import AVBatch, Tracks
from avlit.config import Config
from avlit.models.backbones import LayerRun
from avlit.models.sizes import MSTControlNetConfig
from avlit.module import AVModule
from avlit.randomness import Draws
from avlit.timing import audio_latents_of

_ATEN = torch.ops.aten

VIDEO_CHANNELS = {"embedded": 48, "cogvideox": 16, "wan2.1": 16, "wan2.2": 48, "ltx2": 128}
"""Video codec -> channels of its latents, as released."""

AUDIO_CHANNELS = {"embedded": 64, "mmaudio": 40, "ltx2": 128}
"""Audio codec -> channels of its latents, as released."""

TRACK_FEATURES = {"embedded": (4, 32), "wav2vec2": (12, 768)}
"""Track encoder -> layers and width."""

TEXT_FEATURES = {"embedded": (48, 64), "t5": (226, 4096), "umt5": (512, 4096), "gemma": (1024, 3840)}
"""Text encoder -> most tokens and width; a plan takes a prompt to be that long."""

PRODUCTS = frozenset(
    {
        F.linear, F.conv1d, F.conv2d, F.conv3d, torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm,
        torch.einsum, Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm,
    }
)  # fmt: skip
"""What autocast computes in bfloat16, on GPUs and CPUs alike."""

KEPT_FLOAT = frozenset(
    {
        F.layer_norm, torch.layer_norm, F.group_norm, torch.group_norm, F.softmax, torch.softmax, Tensor.softmax,
        F.softplus, torch.pow, Tensor.pow, Tensor.__pow__, torch.exp, Tensor.exp, torch.log, Tensor.log, torch.rsqrt,
        Tensor.rsqrt, torch.cumsum, Tensor.cumsum, torch.prod, Tensor.prod, F.mse_loss,
    }
)  # fmt: skip
"""What autocast computes in float32 on GPUs, of what transformers use."""

IN_PLACE = frozenset(
    {_ATEN.add_, _ATEN.sub_, _ATEN.mul_, _ATEN.div_, _ATEN.addcmul_, _ATEN.copy_, _ATEN.fill_, _ATEN.zero_, _ATEN.neg_}
)
"""Operations that leave a tensor's shape as it is, and have nothing to do to one without numbers."""

CPU_ATTENTION_FLOPS = {
    _ATEN._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
}
"""What torch's own table of operations lacks."""


ATTENTION_BACKWARD = frozenset(
    {
        _ATEN._scaled_dot_product_flash_attention_backward,
        _ATEN._scaled_dot_product_efficient_attention_backward,
        _ATEN._scaled_dot_product_flash_attention_for_cpu_backward,
    }
)
"""Of their five matrix products the first makes the scores again, which model FLOPs leave out."""


@dataclass(frozen=True)
class StepCost:
    """The forward and the backward pass of one micro-batch on one device.

    flops: floating-point operations of matrix products, convolutions and attentions; recomputed_flops: of those that
    activation checkpointing and attention's backward pass do again, on top. forward_bytes, backward_bytes: most bytes
    at once in either pass, besides weights and their gradients. growing_bytes: the second with the gradients as they
    come, for a backward pass that finds none.
    """

    flops: int
    recomputed_flops: int
    forward_bytes: int
    backward_bytes: int
    growing_bytes: int

    def activation_bytes(self, *, gradient_bytes: int, accumulates: bool) -> int:
        """Most bytes at once besides weights and gradients, given how much the gradients are.

        accumulates: there are several micro-batches to a step. Otherwise gradients of the step before are there in the
        forward pass, are then given up, and come again.
        """
        if accumulates:
            return max(self.forward_bytes, self.backward_bytes)
        return max(self.forward_bytes, self.growing_bytes - gradient_bytes)


def blank_batch(config: Config, clips: int, *, device: torch.device | str = "meta") -> AVBatch:
    """A micro-batch of the configured clip with all that the recipe reads, every number 0."""
    reads, timing, codecs = config.reads, config.timing, config.codecs
    tokens, width = TEXT_FEATURES[codecs.text]
    text = torch.zeros(clips, tokens, width, device=device)
    every = (True,) * clips
    found: dict[str, Any] = {}
    if codecs.video != "none":
        size = (clips, VIDEO_CHANNELS[codecs.video], timing.latent_frames, *timing.latent_size)
        found["video_latents"] = torch.zeros(size, device=device)
        if reads.mouths:
            mask = torch.zeros((clips, *size[2:]), device=device, dtype=torch.bool)
            found |= {"mouth_mask": mask, "has_mouth": every}
        for name in reads.controls:
            frames = 1 if name == "reference_image" else size[2]
            found |= {name: torch.zeros((*size[:2], frames, *size[3:]), device=device), f"has_{name}": every}
    if codecs.audio != "none":
        channels = AUDIO_CHANNELS[codecs.audio]
        length = audio_latents_of(codecs.audio, timing.duration_s)
        found["audio_latents"] = torch.zeros(clips, length, channels, device=device)
        if reads.reference_tokens:
            reference = torch.zeros(clips, reads.reference_tokens, channels, device=device)
            found |= {"reference": reference, "has_reference": every}
    if reads.audio_captions:
        found |= {"audio_text": torch.zeros_like(text), "audio_text_lengths": (tokens,) * clips}
    if codecs.tracks != "none":
        shape = (clips, timing.num_frames, *TRACK_FEATURES[codecs.tracks])
        speech, effects, music, second = (torch.zeros(shape, device=device) for _ in range(4))
        has_second = isinstance(config.model, MSTControlNetConfig) and config.model.second_speaker
        found["tracks"] = Tracks(speech, effects, music, second, has_second=(has_second,) * clips)
    return AVBatch(
        keys=tuple(map(str, range(clips))),
        subsets=("",) * clips,
        captions=("",) * clips,
        duration_s=timing.duration_s,
        step=0,
        slots=tuple(range(clips)),
        text=text,
        text_lengths=(tokens,) * clips,
        **found,
    )


def dry_run(
    module: AVModule,
    batch: AVBatch,
    *,
    is_bf16: bool,
    run: LayerRun,
    dtypes: Mapping[nn.Parameter, torch.dtype] | None = None,
    is_gpu: bool = True,
) -> StepCost:
    """What a micro-batch costs a module on the meta device, which is left as it was but for its parameters' precision.

    is_bf16: under autocast to bfloat16. run: how its layers are run; nothing is compiled. dtypes: precision that the
    device has parameters in, where it is not their own. is_gpu: with a GPU's kernels of attention and its rules of
    autocast, else with a CPU's.
    """
    for parameter, dtype in (dtypes or {}).items():
        parameter.data = parameter.data.to(dtype)
    model: Any = module.model
    before = getattr(model, "layer_run", None)
    if before is not None:
        model.layer_run = LayerRun(run.recompute)
    ledger, arithmetic = _Ledger(), _Arithmetic(is_bf16=is_bf16, is_gpu=is_gpu)
    hooks = [
        each.register_post_accumulate_grad_hook(ledger.take_gradient)
        for each in module.parameters()
        if each.requires_grad
    ]
    try:
        with ExitStack() as modes:
            modes.enter_context(arithmetic)
            modes.enter_context(ledger)
            loss = module.step(batch, Draws(module.seed, batch.step, batch.slots)).total
            arithmetic.forget()
            forward_bytes = ledger.begin_backward()
            # The public calls leave the modes for as long as they run, and with them what is computed again.
            _engine_run_backward(
                (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
            )
    finally:
        for hook in hooks:
            hook.remove()
        if before is not None:
            model.layer_run = before
    there = _bytes_of(batch)
    return StepCost(
        flops=ledger.flops,
        recomputed_flops=ledger.recomputed_flops,
        forward_bytes=there + forward_bytes,
        backward_bytes=there + ledger.peak,
        growing_bytes=there + ledger.growing_peak,
    )


def _bytes_of(group: AVBatch | Tracks) -> int:
    values = [getattr(group, each.name) for each in fields(group)]
    tensors = sum(each.nbytes for each in values if isinstance(each, Tensor))
    return tensors + sum(_bytes_of(each) for each in values if isinstance(each, Tracks))


class _Ledger(TorchDispatchMode):
    """Keeps account of every storage made on the meta device while it lives, and of what is computed.

    Layers repeat each other, and torch finds most shapes in Python: what an operation makes of arguments that it had
    before is remembered, which takes a fifth of the time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.growing_peak = self.gradients = 0
        self.flops = self.recomputed_flops = 0
        self.is_backward = False
        self.known: dict[int, weakref.ref[Any]] = {}
        self.made: dict[Any, tuple[Any, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        key = _signature(func, args, kwargs) if is_pure(func) else None
        if func.overloadpacket in IN_PLACE and args[0].is_meta:
            out, flops = args[0], 0
        elif key is not None and key in self.made:
            made, flops = self.made[key]
            out = tuple(map(_fresh, made)) if isinstance(made, tuple) else _fresh(made)
        else:
            kwargs = kwargs or {}
            out = func(*args, **kwargs)
            count = flop_registry.get(func.overloadpacket) or CPU_ATTENTION_FLOPS.get(func.overloadpacket)
            flops = 0 if count is None else count(*args, **kwargs, out_val=out)
            made = tuple(map(_described, out)) if isinstance(out, tuple) else _described(out)
            if key is not None and made is not None and not (isinstance(made, tuple) and None in made):
                self.made[key] = made, flops
        # Autograd is off in a backward pass, but for what is computed again.
        is_again = self.is_backward and torch.is_grad_enabled()
        again = flops if is_again else flops // 5 if func.overloadpacket in ATTENTION_BACKWARD else 0
        self.recomputed_flops += again
        self.flops += flops - again
        if is_pure(func):  # else the storage is of an argument, which may be a weight
            for each in out if isinstance(out, tuple | list) else (out,):
                if isinstance(each, Tensor) and each.is_meta:
                    self._enter(each)
        return out

    def _enter(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address, size = storage._cdata, storage.nbytes()
        if address in self.known:
            return

        def leave(_: Any) -> None:
            del self.known[address]
            self.live -= size

        self.known[address] = weakref.ref(storage, leave)
        self.live += size
        self.peak = max(self.peak, self.live)
        self.growing_peak = max(self.growing_peak, self.live + self.gradients)

    def begin_backward(self) -> int:
        """From now on the backward pass is counted; returns the most bytes of the forward pass."""
        forward, self.is_backward = self.peak, True
        self.peak = self.growing_peak = self.live
        return forward

    def take_gradient(self, parameter: Tensor) -> None:
        """Count a weight's gradient, and give it up: how much of it a device has is not known here."""
        assert parameter.grad is not None
        self.gradients += parameter.numel() * torch.float32.itemsize
        parameter.grad = None


@cache
def is_pure(func: Any) -> bool:
    """Whether an operation of torch changes none of its arguments and returns no view of one."""
    return all(each.alias_info is None for each in func._schema.arguments)


@dataclass(frozen=True)
class _Shape:
    """What is to be known of a tensor on the meta device."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


def _described(value: Any) -> Any:
    """A tensor on the meta device as its shape, and what is no tensor as it is; None for what cannot be made again."""
    if isinstance(value, Tensor):
        return _Shape(tuple(value.shape), value.stride(), value.dtype) if value.is_meta else None
    return value if isinstance(value, int | float) else None


def _fresh(made: Any) -> Any:
    if isinstance(made, _Shape):
        return torch.empty_strided(made.size, made.stride, dtype=made.dtype, device="meta")
    return made


def _signature(func: Any, args: Any, kwargs: Any) -> Any:
    """All that a result's shape can depend on; None where it depends on more."""
    try:
        found = (func, tuple(map(_part, args)), *((name, _part(value)) for name, value in (kwargs or {}).items()))
        hash(found)
    except TypeError:
        return None
    return found


def _part(value: Any) -> Any:
    if isinstance(value, Tensor):
        if not value.is_meta:
            raise TypeError("a tensor with numbers")
        return value.shape, value.stride(), value.dtype
    if isinstance(value, list | tuple):
        return tuple(map(_part, value))
    return type(value), value  # 1, 1.0 and True are alike as keys


class _Arithmetic(TorchFunctionMode):
    """Attention by the kernels that keep no scores, and autocast, neither of which torch has on the meta device."""

    def __init__(self, *, is_bf16: bool, is_gpu: bool) -> None:
        super().__init__()
        self.is_bf16, self.is_gpu = is_bf16, is_gpu
        self.weights: dict[int, tuple[Tensor, Tensor]] | None = {}

    def forget(self) -> None:
        """Autocast's copies of weights last until the forward pass ends; what is computed again makes its own."""
        self.weights = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if self.is_bf16:
            if func in PRODUCTS:
                args, kwargs = self._cast(args, kwargs, torch.bfloat16)
            elif self.is_gpu and func in KEPT_FLOAT:
                args, kwargs = self._cast(args, kwargs, torch.float32)
        return func(*args, **kwargs)

    def _cast(self, args: Any, kwargs: Any, dtype: torch.dtype) -> tuple[Any, Any]:
        def change(value: Any) -> Any:
            if isinstance(value, tuple | list):
                return type(value)(map(change, value))
            if not isinstance(value, Tensor) or value.dtype not in (torch.float32, torch.bfloat16):
                return value
            return value if value.dtype == dtype or not value.is_meta else self._in(value, dtype)

        return tuple(map(change, args)), {name: change(value) for name, value in kwargs.items()}

    def _in(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        is_weight = tensor.is_leaf and tensor.requires_grad and dtype == torch.bfloat16
        if not is_weight or self.weights is None:
            return tensor.to(dtype)
        if id(tensor) not in self.weights:
            self.weights[id(tensor)] = tensor, tensor.to(dtype)
        return self.weights[id(tensor)][1]

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if not query.is_meta or enable_gqa:
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        if self.is_bf16:
            (query, key, value), _ = self._cast((query, key, value), {}, torch.bfloat16)
        bias = attn_mask
        if bias is not None:
            bias = torch.zeros_like(bias, dtype=query.dtype) if bias.dtype == torch.bool else bias.to(query.dtype)
        call: Callable[..., Any]
        if not self.is_gpu:
            call = _ATEN._scaled_dot_product_flash_attention_for_cpu
            return call(query, key, value, dropout_p, is_causal, attn_mask=bias, scale=scale)[0]
        if bias is None and query.dtype == torch.bfloat16:
            call = _ATEN._scaled_dot_product_flash_attention
            return call(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
        if bias is not None:
            bias = bias.expand(*query.shape[:3], key.shape[2])
        call = _ATEN._scaled_dot_product_efficient_attention
        return call(query, key, value, bias, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale)[0]
