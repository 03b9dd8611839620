"""Mean hidden states and the nearest of centroids."""

import pytest
import torch

from tests.workers.tiny import tiny_model, tiny_tokenizer
from workers.scoring.routing import mean_states, nearest


def test_a_state_is_the_mean_of_its_own_tokens_whatever_stands_beside_it() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    prompts = [[1, 5, 6], [1, 7, 8, 9, 10, 11, 12, 13], [1, 20], [1, 5, 6, 7]]
    found = mean_states(model, tokenizer, prompts, 4)
    assert found.dtype == torch.float32
    for prompt, state in zip(prompts, found, strict=True):
        with torch.no_grad():
            alone = model.model(input_ids=torch.tensor([prompt])).last_hidden_state[0].mean(0)
        assert state.tolist() == pytest.approx(alone.tolist(), abs=1e-5)


def test_the_nearest_centroid_is_taken_and_of_equals_the_first() -> None:
    centroids = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0]])
    assert nearest(torch.tensor([[0.9, 0.0], [1.1, 0.0], [1.0, 0.0], [0.4, 1.9]]), centroids) == [0, 1, 0, 2]
