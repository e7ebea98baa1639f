"""Padding, packing and shuffling."""

import pytest
import torch

from raytrl.roles.sequences import Sequences, minibatch_rows, pack

CPU = torch.device("cpu")


def test_layout() -> None:
    sequences = Sequences.of([(5,), (1, 2, 3)], [(7, 0), (4,)], CPU)
    assert sequences.input_ids_BT.tolist() == [[0, 0, 5, 7, 0], [1, 2, 3, 4, 0]]
    assert sequences.attention_mask_BT.tolist() == [[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert sequences.position_ids_BT.tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 3]]
    # A sampled token 0 is real; only lengths say what is padding.
    assert sequences.response_mask_BR.tolist() == [[True, True], [True, False]]


def test_take_trims_shared_padding() -> None:
    sequences = Sequences.of([(5,), (1, 2, 3)], [(7,), (4, 4, 4)], CPU).take(torch.tensor([0]))
    assert sequences.input_ids_BT.tolist() == [[5, 7]]
    assert (sequences.prompt_width, sequences.response_width) == (1, 1)


def test_no_rows() -> None:
    sequences = Sequences.of([], [], CPU)
    assert len(sequences) == 0 and sequences.response_mask_BR.shape == (0, 1)


@pytest.mark.parametrize("budget", [1, 7, 16, 1000])
def test_packing_keeps_every_row_once_within_the_budget(budget: int) -> None:
    lengths = [3, 9, 4, 4, 1, 7, 9, 2]
    rows = [0, 1, 2, 4, 5, 6, 7]
    packed = pack(rows, lengths, budget)
    assert sorted(row for part in packed for row in part) == rows
    assert all(len(part) == 1 or len(part) * max(lengths[row] for row in part) <= budget for part in packed)
    assert len(pack(rows, lengths, 1000)) == 1


def test_minibatches_are_a_fresh_permutation_each_epoch() -> None:
    rows = [torch.cat(minibatch_rows(0, step, epoch, 12, 3)) for step in range(2) for epoch in range(2)]
    assert all(sorted(r.tolist()) == list(range(12)) for r in rows)
    assert len({tuple(r.tolist()) for r in rows}) == 4
    assert torch.equal(rows[0], torch.cat(minibatch_rows(0, 0, 0, 12, 3)))
