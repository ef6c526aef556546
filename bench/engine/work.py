"""Arithmetic and traffic of a step, counted."""

from typing import ClassVar

import torch

from bench.engine.counting import gbyte, gflop
from bench.engine.metric import Found, Metric
from bench.results import Settings
from bench.subject import Subject, network


class Work(Metric):
    """What the network asks for, whoever runs it: floating-point operations, and the bytes of a forward pass."""

    order = 30
    columns: ClassVar = {
        "gflop": "10⁹ floating-point operations a step on one device: convolutions, forward, and backward if training",
        "gbyte": "10⁹ bytes a forward pass must move at least on one device: each convolution with its BatchNorm and "
        "ReLU, pooling, upsampling and concatenation read and write once (infer, layer)",
    }

    def measure(self, subject: Subject, settings: Settings) -> Found:  # noqa: ARG002 (nothing to set)
        """Count on the meta device."""
        # Not `Subject.eager`: ranks that take BatchNorm's statistics together need not meet here.
        model = network(subject.case, subject.device, subject.weights)[0].to("meta")
        inputs = [torch.empty_like(tensor, device="meta") for tensor in subject.inputs]

        def infer() -> None:
            with torch.inference_mode():
                model(*inputs)

        def train() -> None:
            outputs = model(*inputs)
            # The loss itself has no operation that is counted.
            sum(output.sum() for output in (outputs if isinstance(outputs, tuple) else (outputs,))).backward()

        if subject.case.task == "train":
            return Found(gflop=gflop(train))
        return Found(gflop=gflop(infer), gbyte=gbyte(model, inputs, subject.case.precision))
