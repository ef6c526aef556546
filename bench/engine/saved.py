"""What autograd keeps between the forward and the backward pass: exact, and the same on every machine."""

from typing import ClassVar

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from bench.engine.metric import Found, Metric
from bench.gpus import MIB
from bench.results import Settings
from bench.subject import Subject


class Saved(Metric):
    """Activations saved for the backward pass: the memory that batch, size and recomputation decide.

    Each storage counts once, however many saved tensors look into it. What is there anyway does not count: parameters,
    buffers, inputs, masks. No statistics: for one version of torch it is a constant of the case.
    """

    order = 25
    columns: ClassVar = {
        "saved_mib": "memory of the tensors saved for the backward pass, each storage once, parameters, buffers and "
        "inputs not counted, MiB (train)",
    }

    def measure(self, subject: Subject, settings: Settings) -> Found:  # noqa: ARG002 (nothing to set)
        """See every tensor as it is saved, in one forward pass; then let go of them by the backward pass."""
        if subject.network is None:
            return Found()
        network = subject.network
        there = (*network.parameters(), *network.buffers(), *subject.inputs, subject.masks)
        owned = {tensor.untyped_storage().data_ptr() for tensor in there}
        kept: dict[int, int] = {}

        def see(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in owned:
                # All of them are alive together, so that an address is one storage.
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with saved_tensors_hooks(see, lambda tensor: tensor):
            loss = subject.loss(subject.call)
        loss.backward()
        network.zero_grad(set_to_none=True)
        return Found(saved_mib=sum(kept.values()) / MIB)
