import itertools

import pytest

from lowbit_jax.data.split import is_validation, sample_train, split_pieces
from lowbit_jax.data.text import Piece


def numbered(count):
    return [Piece(f"{i:06d}".encode(), ends_document=True) for i in range(count)]


@pytest.mark.parametrize("fraction", [0.5, 0.1, 0.01])
def test_each_run_of_pieces_gives_exactly_one_to_validation(fraction):
    run = round(1 / fraction)
    chosen = [i for i in range(20 * run) if is_validation(i, fraction)]
    assert [i // run for i in chosen] == list(range(20))  # exact, by the rule
    places = {i % run for i in chosen}
    assert len(places) > 1  # a hash draws the place: no fixed period in the stream


def test_the_second_piece_is_validation_and_fraction_zero_has_none():
    assert [is_validation(i, 0.01) for i in range(3)] == [False, True, False]
    assert not any(is_validation(i, 0.0) for i in range(1000))


def test_the_split_never_changes():
    # Golden numbers: results are compared across versions, and a new split would spoil them.
    assert [i for i in range(60) if is_validation(i, 0.1)] == [1, 11, 25, 30, 45, 57]


def test_splits_are_disjoint_complete_and_in_order():
    pieces = numbered(500)
    assigned = list(split_pieces(pieces, 0.05))
    assert [piece.text for _, piece in assigned] == [piece.text for piece in pieces]
    assert sum(split == "validation" for split, _ in assigned) == 25


def test_a_document_ends_where_it_goes_on_in_the_other_split():
    pieces = [Piece(bytes([i]), ends_document=i == 9) for i in range(1, 10)]
    assigned = list(split_pieces(pieces, 0.5))
    for (split, piece), (next_split, _) in itertools.pairwise(assigned):
        assert piece.ends_document == (split != next_split)
    assert assigned[-1][1].ends_document


@pytest.mark.parametrize("fraction", [-0.1, 0.51, 1.0])
def test_a_fraction_out_of_range_is_refused(fraction):
    with pytest.raises(ValueError, match=r"must lie in \[0, 0\.5\]"):
        is_validation(0, fraction)


def test_a_sample_is_even_bounded_and_blind_to_validation():
    pieces = numbered(10_000)
    sample = sample_train(pieces, 600, 0.1)
    assert 300 <= sum(map(len, sample)) <= 600
    numbers = [int(text) for text in sample]
    assert not any(is_validation(i, 0.1) for i in numbers)
    # Every 128th of 9000 train pieces (64 would make 846 bytes). Among g pieces at most g / 10 + 2
    # are validation, so that a step g is at most 128 + g / 10 + 2.
    gaps = [b - a for a, b in itertools.pairwise(numbers)]
    assert min(gaps) >= 128
    assert max(gaps) <= 130 * 10 / 9
    assert sample_train(pieces[:3], 600, 0.0) == [piece.text for piece in pieces[:3]]
    # By default, blind to what `write_dataset` holds out by default.
    assert sample_train(pieces[:3], 600) == [pieces[0].text, pieces[2].text]
