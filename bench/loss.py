"""The loss of every training step here: cross-entropy + (1 − soft Dice)."""

import torch
from torch.nn import functional


def segmentation_loss(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of -log p[mask] + 1 − mean over classes of (2 Σ p·t + 1) / (Σ p + Σ t + 1), with p = softmax(logits).

    t is 1 where the mask names the class; the sums run over all pixels of the batch. Everything is computed in fp32
    whatever comes in, under autocast too (it lowers no operation used here): Σ p of a 512×512 image is past the largest
    fp16 number. The softmax is computed once for both terms.

    Args:
        logits: (N, C, H, W), fp32, bf16 or fp16.
        mask: (N, H, W), int64, 0 … C-1.

    Returns:
        A scalar, fp32.

    Raises:
        ValueError, RuntimeError: The shapes do not match.
    """
    log_p = functional.log_softmax(logits.float(), dim=1)
    cross_entropy = functional.nll_loss(log_p, mask)
    p = log_p.exp()
    classes = torch.arange(logits.shape[1], device=logits.device).view(1, -1, 1, 1)
    target = (mask.unsqueeze(1) == classes).float()  # one_hot would make int64, channels last: eight times as much
    pixels = (0, 2, 3)
    dice = (2 * (p * target).sum(pixels) + 1) / (p.sum(pixels) + target.sum(pixels) + 1)
    return cross_entropy + 1 - dice.mean()
