"""Engines that run a file made of the network: each a module here that registers its implementation.

An artefact takes one image tensor and gives one map of logits; batch, height and width are free where the engine can.
Making it is paid once, at export; a restart pays loading and the first call.
"""

from bench.runtimes import aotinductor, onnx, openvino

__all__ = ["aotinductor", "onnx", "openvino"]
