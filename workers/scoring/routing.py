"""Which task a prompt belongs to, told from the prompt alone: the nearest of the tasks' centroids among the base's mean
hidden states."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from workers.scoring.decoding import batches, by_length, device_of, padding_id

ROUTING_VERSION = 1
"""Part of every router's key: raise it when states or the choice among centroids change."""


@torch.inference_mode()
def mean_states(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], batch_size: int) -> Tensor:
    """[prompts, width], fp32 on the CPU: the mean over a prompt's tokens of what the model's last layer gives, after
    its norm. Each prompt has a token at least."""
    device, pad = device_of(model), padding_id(tokenizer)
    states: list[Tensor] = [torch.empty(0)] * len(prompts)
    for rows in batches(prompts, by_length(prompts), batch_size):
        lengths = [len(prompts[row]) for row in rows]
        width = max(lengths)
        ids = torch.tensor([[*prompts[row], *[pad] * (width - len(prompts[row]))] for row in rows], device=device)
        mask = torch.tensor([[1] * length + [0] * (width - length) for length in lengths], device=device)
        found = model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        means = (found * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        for row, mean in zip(rows, means.cpu(), strict=True):
            states[row] = mean
    return torch.stack(states)


def nearest(states: Tensor, centroids: Tensor) -> list[int]:
    """Of each state [n, width] the number of the centroid [tasks, width] at the least Euclidean distance, the first of
    equals."""
    found: list[int] = torch.cdist(states.double(), centroids.double()).argmin(1).tolist()
    return found
