"""Layers as each rank of several, without a process group: what the ranks hold and compute adds up to the whole."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.layers.embedding import Embedding, LMHead, vocab_rows
from nanovllm.layers.linear import GatedLinear, MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from nanovllm.layers.ops import PLAIN


class Alone(TensorParallel):
    """A rank whose collectives give back its own part."""

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def all_gather(self, x: Tensor, width: int) -> Tensor:
        return x


def ranks(size: int) -> list[TensorParallel]:
    return [Alone(rank, size) for rank in range(size)]


def fill(specs: Any) -> None:
    """The same numbers for a tensor of a name and shape, whoever asks."""
    for name, spec in specs:
        generator = torch.Generator().manual_seed(sum(name.encode()))
        spec.fill(torch.randn(spec.shape, generator=generator))


def outputs(make: Callable[[TensorParallel], Any], names: list[str], x: Callable[[TensorParallel], Tensor], size: int):
    results = []
    for tp in ranks(size):
        layer = make(tp)
        fill(layer.weights(*names))
        results.append(layer(x(tp)))
    return results


X = torch.randn(3, 24, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("size", [2, 4])
def test_column_parallel_parts_are_columns_of_the_whole(size: int) -> None:
    def make(tp: TensorParallel) -> Any:
        return MergedColumnParallelLinear(24, (8, 16), True, torch.float32, tp, PLAIN)

    (whole,) = outputs(make, ["a", "b"], lambda tp: X, 1)
    parts = outputs(make, ["a", "b"], lambda tp: X, size)
    first = torch.cat([part[:, : 8 // size] for part in parts], dim=1)
    second = torch.cat([part[:, 8 // size :] for part in parts], dim=1)
    torch.testing.assert_close(torch.cat((first, second), dim=1), whole)


@pytest.mark.parametrize("size", [2, 4])
def test_gate_and_up_stay_paired(size: int) -> None:
    def make(tp: TensorParallel) -> Any:
        return GatedLinear(24, (16, 16), False, torch.float32, tp, PLAIN)

    (whole,) = outputs(make, ["gate", "up"], lambda tp: X, 1)
    torch.testing.assert_close(torch.cat(outputs(make, ["gate", "up"], lambda tp: X, size), dim=1), whole)


@pytest.mark.parametrize("size", [2, 4])
def test_row_parallel_parts_add_up_with_the_bias_once(size: int) -> None:
    def make(tp: TensorParallel) -> Any:
        return RowParallelLinear(24, 10, True, torch.float32, tp, PLAIN)

    def part(tp: TensorParallel) -> Tensor:
        columns = tp.part(24, "x")
        return X[:, columns.start : columns.stop]

    (whole,) = outputs(make, ["o"], part, 1)
    torch.testing.assert_close(torch.stack(outputs(make, ["o"], part, size)).sum(0), whole)


@pytest.mark.parametrize(("size", "kv_heads"), [(2, 2), (2, 4), (4, 2), (4, 1)])
def test_query_heads_meet_their_key_value_heads(size: int, kv_heads: int) -> None:
    """Fewer key/value heads than ranks are shared, each by the ranks whose query heads belong to it."""
    heads, dim = 4, 6

    def make(tp: TensorParallel) -> Any:
        return QKVParallelLinear(24, dim, heads, kv_heads, True, torch.float32, tp, PLAIN)

    (whole,) = outputs(make, ["q", "k", "v"], lambda tp: X, 1)
    q, k, v = (part.unflatten(1, (-1, dim)) for part in whole.split((heads * dim, kv_heads * dim, kv_heads * dim), 1))
    for rank, part in enumerate(outputs(make, ["q", "k", "v"], lambda tp: X, size)):
        held = max(1, kv_heads // size)
        own_q, own_k, own_v = part.unflatten(1, (-1, dim)).split((heads // size, held, held), 1)
        for i in range(heads // size):
            head = rank * heads // size + i
            shared = head * kv_heads // heads  # of the whole model
            torch.testing.assert_close(own_q[:, i], q[:, head])
            torch.testing.assert_close(own_k[:, i * held // (heads // size)], k[:, shared])
            torch.testing.assert_close(own_v[:, i * held // (heads // size)], v[:, shared])


@pytest.mark.parametrize("vocab_size", [5, 64, 100, 128])
@pytest.mark.parametrize("size", [2, 4])
def test_a_vocabulary_that_ranks_do_not_divide(size: int, vocab_size: int) -> None:
    """Every id is looked up by one rank, and the ranks' logits side by side are the whole's and then padding."""
    ids = torch.arange(vocab_size)
    (whole,) = outputs(lambda tp: Embedding(vocab_size, 24, torch.float32, tp, PLAIN), ["e"], lambda tp: ids, 1)
    parts = outputs(lambda tp: Embedding(vocab_size, 24, torch.float32, tp, PLAIN), ["e"], lambda tp: ids, size)
    torch.testing.assert_close(torch.stack(parts).sum(0), whole, rtol=0, atol=0)

    def make_head(tp: TensorParallel) -> Any:
        return LMHead(vocab_size, 24, torch.float32, None, tp, PLAIN)

    (logits,) = outputs(make_head, ["h"], lambda tp: X, 1)
    side_by_side = torch.cat(outputs(make_head, ["h"], lambda tp: X, size), dim=1)
    assert side_by_side.shape[1] == size * vocab_rows(vocab_size, TensorParallel(0, size))
    torch.testing.assert_close(side_by_side[:, :vocab_size], logits)
    assert not side_by_side[:, vocab_size:].any()


def test_a_tied_head_is_compared_part_by_part() -> None:
    tensor = torch.randn(100, 24)
    for tp in ranks(4):
        embedding = Embedding(100, 24, torch.float32, tp, PLAIN)
        next(iter(embedding.weights("e")))[1].fill(tensor)
        assert embedding.equals(tensor)
        assert not embedding.equals(tensor[:99])
        other = tensor.clone()
        other[min(tp.rank * 32, 99)] += 1
        assert not embedding.equals(other)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "message"),
    [(6, 2, "num_attention_heads = 6"), (8, 3, "num_key_value_heads = 3"), (12, 6, "num_key_value_heads = 6")],
)
def test_heads_that_cannot_be_divided_are_named(heads: int, kv_heads: int, message: str) -> None:
    with pytest.raises(ValueError, match=f"{message}.*4.*tensor_parallel_size"):
        QKVParallelLinear(24, 4, heads, kv_heads, False, torch.float32, TensorParallel(0, 4), PLAIN)
