"""Every kernel of the registry: right against fp64, writes all it returns, a proper operator, costs that add up."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import pytest
import torch
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from triton.runtime.interpreter import interpreter_builder

from kernels import KERNELS, packing
from kernels.launch import place
from kernels.limits import relative_l2, relative_l2_limit

if TYPE_CHECKING:
    from kernels.problem import Problem
    from kernels.spec import Kernel

EDGES = [(kernel, problem) for kernel in KERNELS for problem in kernel.edges]
edges = pytest.mark.parametrize(
    ("kernel", "problem"), EDGES, ids=[f"{kernel.name} {problem}" for kernel, problem in EDGES]
)
# Ops whose first call under autocast casts: the others read what these made, or run in a backward pass.
AUTOCAST = {
    f"unet_kernels::{name}"
    for name in ("conv_bn_relu", "conv_bn_relu_pool", "conv_bn_relu_up", "conv_transpose", "conv_moments")
}
each = pytest.mark.parametrize("kernel", KERNELS, ids=[kernel.name for kernel in KERNELS])


def leaves(kernel: Kernel, arguments: tuple[object, ...], dtype: torch.dtype | None = None) -> list[object]:
    """The arguments, those tensors that a gradient goes to as leaves of their own, in `dtype` if given."""
    names = [argument.name for argument in kernel.op._opoverload._schema.arguments]
    return [
        argument.detach().to(dtype or argument.dtype).requires_grad_(name not in kernel.constants)
        if isinstance(argument, torch.Tensor)
        else argument
        for name, argument in zip(names, arguments, strict=False)
    ]


def inputs(kernel: Kernel, problem: Problem, device: torch.device) -> tuple[tuple[object, ...], list[torch.Tensor]]:
    """The op's arguments and the exact results, in fp64 on the CPU."""
    arguments = kernel.inputs(problem, device, torch.Generator().manual_seed(0))
    exact = (argument.double().cpu() if isinstance(argument, torch.Tensor) else argument for argument in arguments)
    return arguments, tree_leaves(kernel.reference(*exact))


def on_meta(kernel: Kernel, problem: Problem) -> list[object]:
    arguments = kernel.inputs(problem, torch.device("cpu"), torch.Generator())
    return [argument.to("meta") if isinstance(argument, torch.Tensor) else argument for argument in arguments]


@edges
def test_op_is_right(kernel: Kernel, problem: Problem, device: torch.device) -> None:
    torch.backends.cudnn.allow_tf32 = problem.precision == "tf32"
    arguments, exact = inputs(kernel, problem, device)
    assert kernel.problem(arguments) == problem
    for result, truth in zip(tree_leaves(kernel.op(*arguments)), exact, strict=True):
        assert result.shape == truth.shape
        assert result.dtype in {arguments[0].dtype, torch.float32}  # features as they came, sums of them in fp32
        assert relative_l2(result.cpu(), truth) <= relative_l2_limit(problem.precision, kernel.depth(problem))


@edges
def test_shipped_settings_write_every_element(kernel: Kernel, problem: Problem, device: torch.device) -> None:
    if problem.batch == 0:
        pytest.skip("nothing to write")
    arguments, exact = inputs(kernel, problem, device)
    launch = kernel.launcher(arguments, problem, kernel.settings(problem, place(device)[0]))
    for result in tree_leaves(launch()):
        result.fill_(math.nan)
    for result, truth in zip(tree_leaves(launch()), exact, strict=True):
        assert relative_l2(result.cpu(), truth) <= relative_l2_limit(problem.precision, kernel.depth(problem))


@each
def test_a_wrong_result_is_seen(kernel: Kernel) -> None:
    problem = next(problem for problem in kernel.edges if problem.precision == "bf16")
    _, (exact, *_) = inputs(kernel, problem, torch.device("cpu"))
    limit = relative_l2_limit("bf16", kernel.depth(problem))
    assert relative_l2(exact.bfloat16(), exact) <= limit
    wrong = exact.flatten().clone()
    wrong[wrong.abs().argmax()] = 0  # one element alone
    assert relative_l2(wrong, exact.flatten()) > limit
    wrong[...] = math.nan
    assert not relative_l2(wrong, exact.flatten()) <= limit


# One problem of each kind that a kernel knows: its op has other arguments for each.
KINDS = {(kernel.name, *problem.fused): (kernel, problem) for kernel, problem in EDGES if problem.batch > 0}


@pytest.mark.parametrize(("kernel", "problem"), KINDS.values(), ids=[str(kind) for kind in KINDS])
@pytest.mark.parametrize("precision", ["fp32", pytest.param("fp16", marks=pytest.mark.slow)])
def test_op_keeps_its_contract(kernel: Kernel, problem: Problem, precision: str, device: torch.device) -> None:
    problem = dataclasses.replace(problem, precision=precision)
    arguments = kernel.inputs(problem, device, torch.Generator().manual_seed(0))
    # Once where gradients are wanted, once where none are.
    torch.library.opcheck(kernel.op, tuple(leaves(kernel, arguments)) if precision == "fp32" else arguments)


@pytest.mark.parametrize(("kernel", "problem"), KINDS.values(), ids=[str(kind) for kind in KINDS])
def test_gradients_are_the_reference_s(kernel: Kernel, problem: Problem, device: torch.device) -> None:
    given = kernel.inputs(dataclasses.replace(problem, precision="fp32"), device, torch.Generator().manual_seed(0))
    if all(not isinstance(leaf, torch.Tensor) or not leaf.requires_grad for leaf in leaves(kernel, given)):
        pytest.skip("part of a gradient itself")
    gradients = []
    for function, dtype in ((kernel.op, None), (kernel.reference, torch.float64)):
        inputs = leaves(kernel, given, dtype)
        generator = torch.Generator().manual_seed(3)
        results = [result for result in tree_leaves(function(*inputs)) if result.numel() and result.requires_grad]
        upstream = [torch.randn(result.shape, generator=generator).to(device, result.dtype) for result in results]
        torch.autograd.backward(results, upstream)
        gradients.append([leaf.grad if isinstance(leaf, torch.Tensor) else None for leaf in inputs])
    for mine, truth in zip(*gradients, strict=True):
        assert (mine is None) == (truth is None)
        assert mine is None or relative_l2(mine, truth) <= 1e-4


@pytest.mark.parametrize(("kernel", "problem"), KINDS.values(), ids=[str(kind) for kind in KINDS])
def test_autocast_casts_activations_alone(kernel: Kernel, problem: Problem, device: torch.device) -> None:
    if kernel.op._opoverload.name() not in AUTOCAST:
        pytest.skip("takes what an op under autocast made")
    arguments = kernel.inputs(dataclasses.replace(problem, precision="fp32"), device, torch.Generator())
    exact = tree_leaves(kernel.reference(*(a.double() if isinstance(a, torch.Tensor) else a for a in arguments)))
    packing.forget()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        results = [tree_leaves(kernel.op(*arguments)) for _ in range(2)]
    assert len(packing._entries) <= 1
    assert results[0][0].dtype is torch.bfloat16
    for first, second, truth in zip(*results, exact, strict=True):
        assert torch.equal(first, second)
        assert relative_l2(first, truth.to(device)) <= 0.02


@pytest.mark.parametrize(("kernel", "problem"), KINDS.values(), ids=[str(kind) for kind in KINDS])
def test_results_are_the_same_in_whatever_order_programs_run(
    kernel: Kernel, problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On a GPU it is another one each time. What programs add up in one place, or write where others write, shows here.
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    problem = dataclasses.replace(problem, precision="fp32", batch=2, height=7, width=11)  # several programs
    arguments = kernel.inputs(problem, torch.device("cpu"), torch.Generator().manual_seed(0))
    in_order = tree_leaves(kernel.op(*arguments))
    forward = interpreter_builder.set_grid_idx
    ran = []

    def backward(*place: int) -> None:
        ran.append(place)
        forward(*(number - 1 - one for number, one in zip(interpreter_builder.grid_dim, place, strict=True)))

    monkeypatch.setattr(interpreter_builder, "set_grid_idx", backward)
    assert all(torch.equal(*pair) for pair in zip(tree_leaves(kernel.op(*arguments)), in_order, strict=True))
    assert len(ran) > 1


@each
def test_cost_is_what_pytorch_counts(kernel: Kernel) -> None:
    for fused in {problem.fused for problem in kernel.layers}:
        layer = next(problem for problem in kernel.layers if problem.fused == fused)
        problem = dataclasses.replace(layer, batch=2, height=8, width=8)
        meta = on_meta(kernel, problem)
        counted = []
        for function in (kernel.op, kernel.reference):
            with FlopCounterMode(display=False) as counter:
                function(*meta)
            counted.append(counter.get_total_flops())
        mine, plain = counted
        # Layers folded into one another take fewer than they take apart.
        assert mine == kernel.flops(problem) <= plain
        assert mine == plain or kernel.name == "conv_bn_relu_up"


@pytest.mark.parametrize(("kernel", "problem"), KINDS.values(), ids=[str(kind) for kind in KINDS])
def test_bytes_are_every_tensor_once(kernel: Kernel, problem: Problem, device: torch.device) -> None:
    arguments = kernel.inputs(problem, device, torch.Generator().manual_seed(0))
    packing.forget()
    results = kernel.op(*arguments)
    activations: tuple[object, ...] = arguments
    if packing._entries:  # the parameters, as the kernel reads them
        (entry,) = packing._entries.values()
        activations = (arguments[0], *arguments[9:10], *entry.packed)
    touched = [tensor for tensor in tree_leaves((activations, results)) if isinstance(tensor, torch.Tensor)]
    assert kernel.bytes(problem) == sum(tensor.nbytes for tensor in touched)
