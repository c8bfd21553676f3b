"""Level L1: the vendor's own shape functions take what the layout mxfp8 holds. Nothing is computed."""

from __future__ import annotations

import pytest
import torch
import torch_npu

from ottava.checkpoint.layouts import tensors_of

E4M3 = torch.float8_e4m3fn
SHAPES = [(64, 256), (128, 7168), (2048, 512), (1, 64)]


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_activations_are_quantised_with_scales_in_pairs(rows: int, columns: int) -> None:
    codes, scales = torch_npu.npu_dynamic_mx_quant(
        torch.empty(rows, columns, dtype=torch.bfloat16, device="meta"), dst_type=E4M3
    )
    assert (codes.dtype, tuple(codes.shape)) == (E4M3, (rows, columns))
    assert (scales.dtype, tuple(scales.shape)) == (torch.uint8, (rows, columns // 64, 2))


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_our_scales_are_those_pairs_written_in_a_row(rows: int, columns: int) -> None:
    """A U8 [rows, columns / 32] tensor seen as [rows, columns / 64, 2]: no byte moves."""
    dtype, shape = tensors_of("mxfp8", "x.weight", (rows, columns))["x.weight_scale"]
    _, scales = torch_npu.npu_dynamic_mx_quant(
        torch.empty(rows, columns, dtype=torch.bfloat16, device="meta"), dst_type=E4M3
    )
    ours = torch.arange(shape[0] * shape[1], dtype=torch.int64).to(torch.uint8).reshape(shape)
    assert dtype == "U8"
    assert ours.view(scales.shape).flatten().equal(ours.flatten())


def test_an_odd_number_of_groups_is_padded() -> None:
    _, scales = torch_npu.npu_dynamic_mx_quant(torch.empty(4, 96, dtype=torch.bfloat16, device="meta"), dst_type=E4M3)
    assert tuple(scales.shape) == (4, 2, 2)


def test_without_a_type_the_codes_are_fp4() -> None:
    """The default is not E4M3: half the columns, two codes in a byte. So the type is always named."""
    codes, _ = torch_npu.npu_dynamic_mx_quant(torch.empty(64, 256, dtype=torch.bfloat16, device="meta"))
    assert (codes.dtype, tuple(codes.shape)) == (torch.uint8, (64, 128))


@pytest.mark.parametrize(("tokens", "columns", "rows"), [(16, 256, 64), (3, 7168, 128)])
def test_a_product_of_mxfp8_takes_both_scales(tokens: int, columns: int, rows: int) -> None:
    """As vllm-ascend calls it: weights [columns, rows], their scales [columns / 64, rows, 2]."""
    meta = {"device": "meta"}
    out = torch_npu.npu_quant_matmul(
        torch.empty(tokens, columns, dtype=E4M3, **meta),
        torch.empty(columns, rows, dtype=E4M3, **meta),
        torch.empty(columns // 64, rows, 2, dtype=torch.uint8, **meta),
        scale_dtype=torch_npu.float8_e8m0fnu,
        pertoken_scale=torch.empty(tokens, columns // 64, 2, dtype=torch.uint8, **meta),
        pertoken_scale_dtype=torch_npu.float8_e8m0fnu,
        output_dtype=torch.bfloat16,
        group_sizes=[1, 1, 32],
    )
    assert (out.dtype, tuple(out.shape)) == (torch.bfloat16, (tokens, rows))
