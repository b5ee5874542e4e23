"""Packing, and the order of the data."""

from __future__ import annotations

import pytest
import torch

from hasten.core.errors import SettingError
from hasten.train.data.packed import PackedTokens, Stage, batch, place

STREAM = PackedTokens(torch.arange(1001))
STAGES = (Stage(steps=7, rows=3, length=50), Stage(steps=4, rows=2, length=200))


def test_documents_are_joined_and_closed() -> None:
    packed = PackedTokens.pack(
        ["ab", "", "c"], lambda texts: [[ord(letter) for letter in text] for text in texts], 0
    )
    assert packed.stream_S.tolist() == [97, 98, 0, 0, 99, 0]
    assert packed.count(5) == 1
    assert packed.head(9, 5).tolist() == [[97, 98, 0, 0, 99, 0]]


def test_a_stage_sees_every_window_once_per_epoch() -> None:
    long = (Stage(steps=40, rows=1, length=50),)
    starts = [int(batch(STREAM, long, 0, step)[0, 0]) for step in range(40)]
    assert sorted(starts[:20]) == list(range(0, 1000, 50))
    assert sorted(starts[20:]) == list(range(0, 1000, 50))
    assert starts[:20] != starts[20:]
    assert starts[:20] != sorted(starts[:20])


def test_batches_cross_the_end_of_an_epoch() -> None:
    stages = (Stage(steps=20, rows=3, length=50),)
    starts = [int(row[0]) for step in range(20) for row in batch(STREAM, stages, 0, step)]
    assert [sorted(starts[at : at + 20]) for at in (0, 20, 40)] == [list(range(0, 1000, 50))] * 3


def test_a_batch_is_a_function_of_seed_and_step() -> None:
    assert torch.equal(batch(STREAM, STAGES, 5, 3), batch(STREAM, STAGES, 5, 3))
    assert not torch.equal(batch(STREAM, STAGES, 5, 3), batch(STREAM, STAGES, 6, 3))
    assert not torch.equal(batch(STREAM, STAGES, 5, 3), batch(STREAM, STAGES, 5, 4))


def test_stages_follow_each_other() -> None:
    assert [place(STAGES, step) for step in (0, 6, 7, 10)] == [(0, 0), (0, 6), (1, 0), (1, 3)]
    assert batch(STREAM, STAGES, 0, 6).shape == (3, 51)
    rows = batch(STREAM, STAGES, 0, 7)
    assert rows.shape == (2, 201)
    assert torch.equal(rows[0], torch.arange(int(rows[0, 0]), int(rows[0, 0]) + 201))
    with pytest.raises(IndexError, match="step 11 of 11"):
        place(STAGES, 11)


def test_the_digest_is_of_the_tokens() -> None:
    assert STREAM.digest == PackedTokens(torch.arange(1001, dtype=torch.int64)).digest
    assert STREAM.digest != PackedTokens(torch.arange(1, 1002)).digest


def test_refuses_empty_and_short_text() -> None:
    with pytest.raises(SettingError, match="text is empty"):
        PackedTokens.pack([], lambda texts: [], 0)
    with pytest.raises(SettingError, match="1001 tokens, too few for one sequence of 1001"):
        STREAM.count(1001)
    with pytest.raises(SettingError, match="at least 1"):
        Stage(steps=1, rows=0, length=4)
