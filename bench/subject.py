"""From a case to what is measured: network, inputs and the step. Every axis takes effect here."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from torch import Tensor, nn

from bench import fitted, layers, strategies
from bench.frame import through
from bench.implementations import IMPLEMENTATIONS, UnsupportedError
from bench.loss import segmentation_loss
from bench.picture import CHANNELS, CLASSES, picture
from bench.precision import allow_tf32, autocast, dtype_of
from bench.weights import state_of
from unet import UNet, containers, modify

if TYPE_CHECKING:
    from collections.abc import Callable

    from bench.case import Case
    from bench.distributed import Group
    from bench.weights import Weights

LAYOUT = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


def recipe(case: Case) -> fitted.Recipe:
    """Which fitted weights the case wants."""
    return fitted.Recipe(upsampling=case.upsampling, width=case.width, depth=case.depth)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Subject:
    """What a case measures.

    Args:
        case: the case.
        group: the processes it runs in; this is one of them.
        device: where this one runs.
        call: the implementation: the inputs to logits, or to a tuple that begins with them.
        inputs: images (batch, 3, height, width) in the case's layout, float32 or what the precision makes of them, and
            what else the network takes; every rank has its own. Of the task `layer`: the features that come in.
        masks: (batch, height, width) int64.
        weights: the checkpoint that the network is of; None for fitted weights.
        fitted_dice: Dice of the fitted weights on a picture they were not fitted to; None for a checkpoint's.
        shared: of a training case on several devices: what exchanges its gradients.
        network: of a training case: whose parameters `call` uses and a step changes. An inference case holds `call`
            alone, so that weights which an implementation has replaced do not count as its memory.
        optimizer: of a training case.
        scaler: of a training case; it does something under amp_fp16 alone.
    """

    case: Case
    group: Group
    device: torch.device
    call: Callable[..., Any]
    inputs: tuple[Tensor, ...]
    masks: Tensor
    weights: Weights | None
    fitted_dice: float | None
    shared: nn.Module | None
    network: nn.Module | None
    optimizer: torch.optim.Optimizer | None
    scaler: torch.amp.GradScaler

    def step(self, *, exchange: bool = True) -> Any:  # noqa: ANN401 (whatever the network gives)
        """What is timed: a forward pass, or a training step. It does not wait for the device.

        Args:
            exchange: whether the ranks average their gradients; without, each goes its own way until `restart`.

        Returns:
            The network's outputs, or the loss.
        """
        if self.optimizer is None:
            return self.forward(self.call)
        self.optimizer.zero_grad(set_to_none=True)
        passes = self.case.accumulation
        for more in reversed(range(passes)):
            with strategies.unexchanged(self.shared, wanted=more > 0 or not exchange):
                loss = self._backward(self.call, self.case.precision, passes=passes)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss

    def forward(
        self, call: Callable[..., Any], precision: str | None = None, frame: str | None = None
    ) -> tuple[Tensor, ...]:
        """All outputs of `call` for the case's inputs, logits first, in the case's precision and frame or others."""
        precision = precision or self.case.precision
        with torch.inference_mode(), autocast(self.device, precision):
            return _all(through(call, frame or self.case.frame, self.case.depth, *self._inputs(precision)))

    def _inputs(self, precision: str) -> tuple[Tensor, ...]:
        """The inputs in the dtype that `precision` takes; for the case's own there is nothing to do in a timed step."""
        if precision == self.case.precision:
            return self.inputs
        return tuple(tensor.to(dtype_of(precision)) for tensor in self.inputs)

    def gradients(
        self, call: Callable[..., Any], network: nn.Module, precision: str | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Loss and fp32 gradient of every parameter of `network` of one step of `call`; no parameter changes.

        Under amp_fp16 the loss is scaled by the largest power of two up to 65,536 at which every gradient is finite, so
        that the answer does not depend on how far a GradScaler had come.
        """
        scale = 2.0**16 if self.scaler.is_enabled() else 1.0
        statistics = [buffer.clone() for buffer in network.buffers()]
        while True:
            network.zero_grad(set_to_none=True)
            loss = self._backward(call, precision or self.case.precision, scale)
            found = [p.grad.detach().float() / scale for p in network.parameters() if p.grad is not None]
            finite = all(bool(gradient.isfinite().all()) for gradient in found)
            if self.group.agree(finite or scale <= 1):
                return loss, found
            scale /= 2
            for buffer, before in zip(network.buffers(), statistics, strict=True):
                buffer.copy_(before)

    def _backward(
        self, call: Callable[..., Any], precision: str, scale: float | None = None, passes: int = 1
    ) -> Tensor:
        loss = self.loss(call, precision)
        # DistributedDataParallel averages over ranks; where their shares are uneven, it is images that count alike.
        weight = len(self.masks) * self.group.size / (self.case.joined_batch * passes)
        scaled: Tensor = self.scaler.scale(loss) if scale is None else loss * scale
        (scaled if weight == 1 else scaled * weight).backward()
        return loss.detach()

    def loss(self, call: Callable[..., Any], precision: str | None = None) -> Tensor:
        """The loss of one forward pass of `call` for the case's inputs, ready for a backward pass."""
        precision = precision or self.case.precision
        with autocast(self.device, precision):
            outputs = _all(call(*self._inputs(precision)))
            loss = segmentation_loss(outputs[0], self.masks)
            if self.case.modification == "supervision":
                # Every level learns the same mask, at its own size.
                for logits in outputs[1:]:
                    small = nn.functional.interpolate(self.masks[:, None].float(), logits.shape[2:])[:, 0].long()
                    loss = loss + segmentation_loss(logits, small)
        return loss

    def eager(self, precision: str | None = None) -> nn.Module:
        """Another network with the case's weights, run by PyTorch: what results are compared with."""
        case = msgspec.structs.replace(self.case, precision=precision or self.case.precision)
        return strategies.synchronized(network(case, self.device, self.weights)[0], case)

    def narrower(self) -> Subject:
        """The same callable and network for images that lack their last column."""

        def cut(tensor: Tensor) -> Tensor:
            return tensor[..., :-1].contiguous(memory_format=LAYOUT[self.case.layout]) if tensor.ndim == 4 else tensor  # noqa: PLR2004 (N, C, H, W)

        return dataclasses.replace(self, inputs=tuple(map(cut, self.inputs)), masks=self.masks[..., :-1].contiguous())

    def mirror(self) -> None:
        """Replace the inputs by other ones in place, their mirror images: an answer kept from before is then wrong."""
        for tensor in (self.inputs[0], self.masks):
            tensor.copy_(tensor.flip(-1))

    def untouched(self) -> bool:
        """Whether the inputs are still those the case began with: nobody may write into what it was given."""
        images, masks = _given(self.case, self.group, self.device, self.weights)
        return torch.equal(self.inputs[0], images) and torch.equal(self.masks, masks)

    def restore(self) -> None:
        """Give the network of a training case its fitted weights and statistics again, in place."""
        if self.network is not None:
            self.network.load_state_dict(self.eager().state_dict())

    def restart(self) -> None:
        """Begin training again from the fitted weights: alike on every rank, whatever they did before."""
        self.restore()
        if self.optimizer is not None:
            self.optimizer.state.clear()
            self.scaler.load_state_dict(_scaler(self.case, self.device).state_dict())

    def synchronize(self) -> None:
        """Wait until the device has done all that was asked of it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _all(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def prepare_process(case: Case, cores: int) -> None:
    """Set what is global to a process, from the case and the cores it may use alone: threads, seed, arithmetic."""
    torch.set_num_threads(case.threads or max(1, cores))
    torch.manual_seed(0)
    allow_tf32(allow=case.precision == "tf32")
    torch.backends.cudnn.benchmark = True


def _pictures(case: Case, group: Group, device: torch.device, weights: Weights | None) -> tuple[Tensor, Tensor]:
    """Images in the case's layout and masks of this rank; a network of other channels sees the picture's in turn."""
    images, masks = picture(case.joined_batch, case.height, case.breadth)
    if weights is not None and weights.channels != images.shape[1]:
        images = images[:, [channel % images.shape[1] for channel in range(weights.channels)]]
    mine = case.share(group.rank)
    return images[mine].to(device, memory_format=LAYOUT[case.layout]), masks[mine].to(device)


def _given(case: Case, group: Group, device: torch.device, weights: Weights | None) -> tuple[Tensor, Tensor]:
    """What the case's network or layer is given, and the masks."""
    images, masks = _pictures(case, group, device, weights)
    if case.task == "layer":
        images = layers.features(plain_fitted(case, weights)[0], case.layer, images)
    return images.to(dtype_of(case.precision), memory_format=LAYOUT[case.layout]), masks


def plain_network(case: Case, weights: Weights | None = None) -> nn.Module:
    """The network of a case as drawn, without the case's modification."""
    channels, classes = (weights.channels, weights.classes) if weights is not None else (CHANNELS, CLASSES)
    bilinear = case.upsampling == "bilinear"
    return containers.build(case.container, channels, classes, bilinear=bilinear, width=case.width, depth=case.depth)


def plain_fitted(case: Case, weights: Weights | None = None) -> tuple[nn.Module, float | None]:
    """The network of a case in evaluation mode with its weights, on the CPU, unchanged; the Dice of fitted ones."""
    state, dice = fitted.load(recipe(case)) if weights is None else (state_of(weights), None)
    plain = plain_network(case, weights)
    names = containers.key_map("unet", case.container, bilinear=case.upsampling == "bilinear", depth=case.depth)
    plain.load_state_dict(containers.convert(state, names))
    return plain.eval(), dice


def network(case: Case, device: torch.device, weights: Weights | None = None) -> tuple[nn.Module, float | None]:
    """The eager network, or layer, of a case with its weights, and the Dice of fitted ones.

    What a change adds is always drawn alike.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        changed, dice = plain_fitted(case, weights)
        if isinstance(changed, UNet):
            changed = modify.change(changed, case.modification)
    if isinstance(changed, UNet):
        changed.checkpoint_blocks = case.activations == "recomputed"
    if case.task == "layer":
        changed = layers.chain(changed, case.layer)
    changed.to(device, dtype_of(case.precision), memory_format=LAYOUT[case.layout])  # type: ignore[call-overload]  # the stubs lack memory_format
    return changed.train(case.task == "train"), dice


def build(case: Case, group: Group, weights: Weights | None = None) -> Subject:
    """The subject of `case` in this process, with fitted weights or a checkpoint's.

    Raises:
        MemoryError, torch.OutOfMemoryError: it does not fit.
        UnsupportedError: the implementation cannot run this case, which only building it could tell.
    """
    device = torch.device("cuda", torch.cuda.current_device()) if case.on_gpu else torch.device("cpu")
    # The inputs first: a batch that can never fit shows at once.
    images, masks = _given(case, group, device, weights)

    training = case.task == "train"
    if training and weights is not None and weights.classes < CLASSES:
        raise UnsupportedError("the loss here is of two classes or more, and the checkpoint's network has one")
    model, dice = network(case, device, weights)
    model = strategies.synchronized(model, case)
    implementation = IMPLEMENTATIONS[case.implementation]
    if implementation.rewrites:
        call = shared = strategies.share(implementation.build(model, case), case, device)
    else:
        shared = strategies.share(model, case, device)
        call = implementation.build(shared, case)
    return Subject(
        case=case,
        group=group,
        device=device,
        call=call,
        inputs=modify.inputs_for(model, images),
        masks=masks,
        weights=weights,
        fitted_dice=dice,
        shared=shared if training and group.size > 1 else None,
        network=model if training else None,
        # Fused on a GPU: otherwise GradScaler would wait for the device at every step, to see whether to skip it.
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-4, fused=case.on_gpu) if training else None,
        scaler=_scaler(case, device),
    )


def _scaler(case: Case, device: torch.device) -> torch.amp.GradScaler:
    return torch.amp.GradScaler(device.type, enabled=case.task == "train" and case.precision == "amp_fp16")
