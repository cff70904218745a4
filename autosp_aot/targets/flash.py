"""The contracts of flash attention: what each target's kernel takes without a check, and what it makes.

CUDA's is FlashAttention-2 (Dao, arXiv:2307.08691), ROCm's AOTriton, CPU's ATen's own.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Flash:
    """The contract of a target's flash attention; `sources` has the line of its source that says so of each field.

    dtypes              of q, k and v
    width_limit         the largest head dim
    width_multiple      what head dims are multiples of
    dense               operands whose head dim has stride 1, and whose rows do not overlap
    alignment_bytes     what the first element and each row of those begin at multiples of
    copied              operands of backward that are copied where they are not dense [B, S, N, D]
    dense_lse           whether backward takes lse for dense [B, N, S], whatever its strides
    lse_by_row          whether lse lies [B, S, N] in memory, else [B, N, S]
    gradients_by_row    whether gradients lie [B, S, N, D] in memory, else as q, k and v do
    grad_v_like_k       whether grad_v lies as k does
    splits              whether forward splits the keys of few rows, each part with an output of its own in fp32
    accumulates         whether backward adds up grad_q in fp32, rows rounded to 128 and widths to 32, beyond 128 to 64,
                        and keeps one more fp32 number a row
    """

    dtypes: tuple[str, ...]
    width_limit: int
    width_multiple: int
    dense: tuple[str, ...]
    alignment_bytes: int
    copied: tuple[str, ...]
    dense_lse: bool
    lse_by_row: bool
    gradients_by_row: bool
    grad_v_like_k: bool
    splits: bool
    accumulates: bool
    sources: Mapping[str, str] = field(hash=False)


# Sources are lines of torch 2.11 to 2.13, under aten/src/ATen/native.
_CPU, _CUDA, _ROCM = (
    "cpu/FlashAttentionKernel.cpp: ",
    "transformers/cuda/flash_attn/flash_api.cpp: ",
    "transformers/hip/flash_attn/aot/mha_all_aot.hip: ",
)
CPU_FLASH = Flash(
    dtypes=("f64", "f32", "bf16", "f16"),
    width_limit=2**31,
    width_multiple=1,
    dense=("q", "k", "v", "out"),
    alignment_bytes=1,
    copied=("grad_out",),
    dense_lse=False,
    lse_by_row=True,
    gradients_by_row=True,
    grad_v_like_k=False,
    splits=False,
    accumulates=False,
    sources={
        "dtypes": _CPU + "AT_DISPATCH_FLOATING_TYPES_AND2(kBFloat16, kHalf, ...)",
        "dense": _CPU + "cpublas::gemm(..., q_data + i * qStrideB + j * qStrideH + m * qStrideM, qStrideM, ...)",
        "copied": _CPU + "auto grad_out_contig = grad_out.contiguous();",
        "dense_lse": _CPU + "lse_data[i * lStrideB + j * lStrideH + (m + row) * lStrideM]",
        "lse_by_row": "transformers/attention.cpp: at::empty({batchSize, qSize, num_head}, ...)",
        "gradients_by_row": "transformers/attention.cpp: at::zeros((query.transpose(1, 2)).sizes(), ...)",
    },
)
CUDA_FLASH = Flash(
    dtypes=("bf16", "f16"),
    width_limit=256,
    width_multiple=8,
    dense=("q", "k", "v"),
    alignment_bytes=16,
    copied=("out", "grad_out"),
    dense_lse=True,
    lse_by_row=False,
    gradients_by_row=False,
    grad_v_like_k=False,
    splits=True,
    accumulates=True,
    sources={
        "dtypes": _CUDA + "TORCH_CHECK(q_dtype == at::kHalf || q_dtype == at::kBFloat16, ...)",
        "width_limit": _CUDA + "TORCH_CHECK(head_size_og <= 256, ...)",
        "width_multiple": _CUDA + "TORCH_CHECK(head_size_og % 8 == 0, ...)",
        "dense": _CUDA + "TORCH_CHECK(q.stride(-1) == 1, ...)",
        "alignment_bytes": "transformers/cuda/flash_attn/kernel_traits.h: SM80_CP_ASYNC_CACHEGLOBAL<cute::uint128_t>",
        "copied": "transformers/cuda/attention_backward.cu: auto contiguous_grad_out = grad_out.contiguous();",
        "dense_lse": _CUDA + "set_params_dgrad(..., softmax_lse.data_ptr(), ...), without strides",
        "lse_by_row": _CUDA + "auto softmax_lse = at::empty({batch_size, num_heads, seqlen_q }, ...);",
        "gradients_by_row": _CUDA + "dq = at::empty_like(q);",
        "grad_v_like_k": _CUDA + "dv = at::empty_like(v);",
        "splits": _CUDA + "set_params_splitkv(..., /*num_splits*/0, dprops, opts);",
        "accumulates": _CUDA + "dq_accum = at::empty({batch_size, seqlen_q_rounded, num_heads, ...}, ...);",
    },
)
ROCM_FLASH = replace(
    CUDA_FLASH,
    grad_v_like_k=True,
    splits=False,
    sources={
        **CUDA_FLASH.sources,
        "dtypes": _ROCM + "TORCH_CHECK(q_dtype == at::kHalf || q_dtype == at::kBFloat16, ...)",
        "width_limit": _ROCM + "TORCH_CHECK(head_size_og <= 512, ...); 256 in older ones",
        "width_multiple": _ROCM + "TORCH_CHECK(head_size_og % 8 == 0, ...)",
        "dense": _ROCM + "TORCH_CHECK(q.stride(-1) == 1, ...)",
        "dense_lse": _ROCM + "softmax_lse.view({batch_size * num_heads, seqlen_q}).contiguous();",
        "lse_by_row": _ROCM + "M.view({batch_size, num_heads, seqlen_q})",
        "gradients_by_row": _ROCM + "dq = at::empty_like(q);",
        "grad_v_like_k": _ROCM + "dv = at::empty_like(k);",
        "splits": _ROCM + "attn_fwd(...), into one output",
        "accumulates": _ROCM + "at::Tensor delta = at::empty_like(softmax_lse_cont); CUDA's is more, and counted",
    },
)
