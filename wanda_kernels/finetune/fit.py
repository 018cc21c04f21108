"""A plain training loop on windows of tokens, for either way of keeping the mask."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    windows: Tensor,
    *,
    steps: int,
    batch_size: int = 1,
    clip: float | None = 1.0,
    seed: int = 0,
    on_step: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train on next-token prediction.

    Args:
        model: a causal language model, or a ``peft.PeftModel`` around one.
        optimizer: over the parameters to train.
        windows: [samples, length], int64. Taken in a random order by ``seed``, again and again.
        steps: of the optimiser.
        batch_size: windows a step.
        clip: largest norm of all gradients; None: as they are.
        on_step: told the number of steps done and the loss.

    Returns:
        The mean loss of each step. The model is left in the mode it was in.

    Raises:
        ValueError: arguments out of range; a loss that is not finite (the step is not made).
    """
    if windows.dim() != 2 or windows.shape[0] == 0 or windows.shape[1] < 2:
        raise ValueError(f"windows must be [samples, length] with at least 2 tokens, got {list(windows.shape)}")
    if steps < 1 or batch_size < 1:
        raise ValueError(f"steps and batch_size must be at least 1, got {steps} and {batch_size}")
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    training, losses = model.training, []
    order: list[int] = []
    model.train()
    try:
        for step in range(steps):
            while len(order) < batch_size:
                order += torch.randperm(len(windows), generator=generator).tolist()
            chosen, order = order[:batch_size], order[batch_size:]
            batch = windows[chosen].to(device)
            logits = model(input_ids=batch, use_cache=False).logits
            loss = cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten())
            if not bool(torch.isfinite(loss)):
                raise ValueError(f"the loss of step {step + 1} is {float(loss.detach())}: lower the learning rate")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(parameters, clip)
            optimizer.step()
            losses.append(float(loss.detach()))
            if on_step is not None:
                on_step(step + 1, losses[-1])
    finally:
        model.train(training)
    return losses
