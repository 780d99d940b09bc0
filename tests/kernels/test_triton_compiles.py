"""The attention kernels compile for a GPU, without one: the interpreter also runs what the compiler refuses."""

import os
from typing import Any

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from nanovllm.kernels import paged_attention_triton as paged
from nanovllm.kernels import tokenwise_attention_triton as tokenwise

MODEL = {"NUM_KV_HEADS": 2, "GROUP": 2, "HEAD_DIM": 64, "BLOCK_DIM": 64, "BLOCK_SIZE": 64}
KERNELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "decode": (
        paged._decode_kernel,
        {"BLOCK_GROUP": 16, "TILE": 64, "COMBINE_COLS": 128, "COMBINE_ROWS": 8, "PDL": True},
    ),
    "prefill": (paged._prefill_kernel, {"ROWS": 64, "TILE": 64, "PDL": True}),
    "tokenwise": (tokenwise._tokenwise_kernel, {"BLOCK_GROUP": 16, "TILE": 32}),
}
BFLOAT16, FLOAT32 = ("q_ptr", "cache_ptr", "out_ptr"), ("partial_out_ptr", "partial_stats_ptr")


@pytest.mark.parametrize("softcap", [None, 50.0])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("name", KERNELS)
def test_attention_compiles_for_hopper(name: str, window: int | None, softcap: float | None) -> None:
    kernel, shape = KERNELS[name]
    _, cap = paged._exponents(0.125, softcap)
    constants = {**MODEL, **shape, "WINDOW": window or 0, "SOFTCAP": cap}
    types = {
        **dict.fromkeys(BFLOAT16, "*bf16"),
        **dict.fromkeys(FLOAT32, "*fp32"),
        **dict.fromkeys(constants, "constexpr"),
        "scale": "fp32",
    }
    arguments = kernel.arg_names
    signature = {
        argument: types.get(argument, "*i32" if argument.endswith("_ptr") else "i32") for argument in arguments
    }
    values = {(arguments.index(argument),): value for argument, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values)
    assert compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["cubin"]
