"""The U-Net in plain PyTorch: how to define it, change it, save it and load it. Imports torch and nothing else."""

from unet.blocks import DoubleConv, Down, OutConv, Up
from unet.model import UNet

__all__ = ["DoubleConv", "Down", "OutConv", "UNet", "Up"]
