"""Padding, packing and shuffling."""

import pytest
import torch

from raytrl.roles.learner.sequences import Sequences, minibatch_rows, pack

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


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("budget", [1, 7, 16, 1000])
def test_packing_keeps_every_row_once_within_the_budget(budget: int, padded: bool) -> None:
    prompts, responses = [1, 4, 3, 1, 0, 6, 1, 1], [2, 5, 1, 3, 1, 1, 8, 1]
    rows = [0, 1, 2, 4, 5, 6, 7]
    packed = pack(rows, prompts, responses, budget, padded=padded)
    assert sorted(row for part in packed for row in part) == rows

    def tokens(part: list[int]) -> int:
        if not padded:
            return sum(prompts[row] + responses[row] for row in part)
        return len(part) * (max(prompts[row] for row in part) + max(responses[row] for row in part))

    def in_attention(part: list[int]) -> int:
        return len(part) * max(prompts[row] + responses[row] for row in part)

    assert all(len(part) == 1 or tokens(part) <= budget for part in packed)
    assert padded or all(len(part) == 1 or in_attention(part) <= 2 * budget for part in packed)
    assert len(pack(rows, prompts, responses, 1000, padded=padded)) == 1


def test_without_padding_a_pass_holds_more_rows_but_not_one_long_one_among_many_short() -> None:
    lengths = [2, 5, 2, 4, 2, 5, 2, 4]
    assert len(pack(range(8), lengths, lengths[::-1], 32, padded=False)) < len(
        pack(range(8), lengths, lengths[::-1], 32, padded=True)
    )
    skewed = [50] + [1] * 20
    assert len(pack(range(21), skewed, [1] * 21, 100, padded=False)) > 1


def test_minibatches_are_a_fresh_permutation_each_epoch() -> None:
    rows = [torch.cat(minibatch_rows(0, step, epoch, 12, 3)) for step in range(2) for epoch in range(2)]
    assert all(sorted(r.tolist()) == list(range(12)) for r in rows)
    assert len({tuple(r.tolist()) for r in rows}) == 4
    assert torch.equal(rows[0], torch.cat(minibatch_rows(0, 0, 0, 12, 3)))


def test_every_contiguous_share_has_its_part_of_every_minibatch() -> None:
    for rows in minibatch_rows(0, 0, 0, 24, 4):
        assert [sum(start <= row < start + 8 for row in rows.tolist()) for start in (0, 8, 16)] == [2, 2, 2]
