"""Log-probabilities of many rows are those of each row alone, and need no table of all of them."""

import pytest
import torch

from tokenry.runner.sampling.scores import ROWS_AT_ONCE, score


@pytest.mark.parametrize("rows", [1, ROWS_AT_ONCE, ROWS_AT_ONCE + 1, 3 * ROWS_AT_ONCE - 5])
def test_rows_scored_together_have_the_bits_of_each_alone(rows):
    torch.manual_seed(rows)
    logits, tokens = torch.randn(rows, 517), torch.randint(0, 517, (rows,), dtype=torch.int32)
    together = score(logits, tokens, 7)
    for i in range(rows):
        alone = score(logits[i : i + 1], tokens[i : i + 1], 7)
        for a, b in zip(together.tensors, alone.tensors, strict=True):
            assert torch.equal(a[i : i + 1], b), i
    table = torch.log_softmax(logits, -1)
    assert torch.equal(together.chosen, table[torch.arange(rows), tokens.long()])
    assert torch.equal(together.rank, (table > together.chosen[:, None]).sum(-1) + 1)
    assert together.top_tokens.shape == (rows, 7)


def test_the_peak_is_of_some_rows_and_not_of_all(monkeypatch):
    most, whole = [], torch.log_softmax

    def watched(x, dim, **out):
        most.append(x.numel())
        return whole(x, dim=dim, **out)

    monkeypatch.setattr(torch, "log_softmax", watched)
    score(torch.randn(256, 100), torch.zeros(256, dtype=torch.int32), 3)
    assert max(most) == ROWS_AT_ONCE * 100
    assert sum(most) == 256 * 100
