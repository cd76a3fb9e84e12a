"""What each operator is. An operator that is in no table here is unknown, and the report says so."""

from __future__ import annotations

import functools
from typing import Any

import torch


def _aten(names: str) -> frozenset[str]:
    return frozenset(f"aten.{name}" for name in names.split())


# Entry by entry, though torch does not tag them (or tags only some overloads).
_POINTWISE = _aten(
    "prelu log_sigmoid hardswish special_expit special_ndtr special_log_ndtr where threshold relu6 divide multiply "
    "subtract true_divide to _to_copy contiguous clone detach type_as dropout alpha_dropout feature_dropout selu celu "
    "masked_fill alias lift_fresh positive negative absolute square float_power clip copy nan_to_num fix arctan "
    "greater greater_equal less less_equal not_equal special_erf special_exp2 special_expm1 special_log1p arcsinh "
    "silu mish hardsigmoid hardtanh rrelu special_logit special_softmax_1 bernoulli special_erfc __and__ __or__ __xor__"
    " special_entr _conj _neg_view conj real imag view_as_real view_as_complex polar complex angle resolve_conj "
    "resolve_neg feature_alpha_dropout native_dropout fake_quantize_per_tensor_affine to_dense _to_dense to_mkldnn "
    "floor_divide arccos arcsin arctan2 arccosh arctanh fabs isclose isreal degrees radians special_digamma special_psi "
    "special_erfinv special_gammaln special_i0 special_polygamma special_sinc special_xlogy special_round cpu cuda "
    "pin_memory"
)
# Point-wise ones that only pass their first argument on, in another dtype, layout or graph.
PASS = _aten(
    "to _to_copy contiguous clone detach type_as dropout alpha_dropout feature_dropout alias lift_fresh positive "
    "float_power_1 resolve_conj resolve_neg feature_alpha_dropout native_dropout to_dense _to_dense to_mkldnn cpu cuda "
    "pin_memory"
)
VIEW = _aten(
    "view reshape _unsafe_view flatten unflatten squeeze unsqueeze transpose permute t T mT mH numpy_T movedim "
    "moveaxis swapaxes swapdims select slice narrow chunk split split_with_sizes unsafe_chunk unsafe_split "
    "tensor_split unbind "
    "diagonal expand expand_as broadcast_to view_as reshape_as hsplit vsplit unfold ravel adjoint "
    "unsafe_split_with_sizes as_strided flip roll repeat tile repeat_interleave rot90 pixel_shuffle pixel_unshuffle "
    "constant_pad_nd pad reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d "
    "replication_pad3d channel_shuffle tril triu im2col col2im _reshape_alias squeeze_ atleast_1d atleast_2d "
    "atleast_3d diag diag_embed fliplr flipud diagflat dsplit row_stack native_channel_shuffle"
)
CONTRACTION = _aten(
    "linear matmul mm bmm mv dot addmm baddbmm addbmm addmv einsum conv1d conv2d conv3d conv_transpose1d "
    "conv_transpose2d conv_transpose3d convolution _convolution bilinear tensordot inner outer ger cdist "
    "_euclidean_dist _grouped_mm vdot kron chain_matmul linalg_multi_dot addr pairwise_distance cosine_similarity "
    "_trilinear pdist cross linalg_cross linalg_vecdot conv_tbc _scaled_mm _int_mm _weight_int4pack_mm _weight_int8pack_mm "
    "_weight_int4pack_mm_for_cpu"
)
NORMALIZATION = _aten(
    "layer_norm batch_norm group_norm instance_norm rms_norm native_layer_norm native_batch_norm native_group_norm "
    "local_response_norm _fused_rms_norm cudnn_batch_norm _native_batch_norm_legit_no_training _weight_norm "
    "norm_except_dim _weight_norm_interface weight_norm"
)
POOLING = _aten(
    "avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d _adaptive_avg_pool2d "
    "_adaptive_avg_pool3d lp_pool1d lp_pool2d"
)
LIKE = _aten("expand_as view_as reshape_as type_as")  # the second operand lends its shape or dtype alone
LOOKUP = _aten("embedding embedding_bag _embedding_bag")
INDEXING = _aten(
    "index index_select gather take_along_dim take index_put _index_put_impl masked_select scatter scatter_add "
    "scatter_reduce index_add index_copy index_fill masked_scatter select_scatter slice_scatter as_strided_scatter "
    "diagonal_scatter put _unsafe_index _unsafe_index_put index_reduce _unsafe_masked_index"
)
JOIN = _aten("cat concat concatenate stack hstack vstack dstack column_stack block_diag meshgrid cartesian_prod")
REDUCTION = _aten(
    "sum mean var std var_mean std_mean norm linalg_vector_norm linalg_norm linalg_matrix_norm prod nansum nanmean "
    "cumsum cumprod count_nonzero any all trace dist frobenius_norm nuclear_norm numel"
)
LOG_PARTITION = _aten("logsumexp special_logsumexp logcumsumexp")
SOFTMAX = _aten("softmax _softmax special_softmax _safe_softmax log_softmax _log_softmax special_log_softmax")
SDPA = _aten("scaled_dot_product_attention")
RECURRENT = {
    "aten.lstm": "lstm",
    "aten.gru": "gru",
    "aten.lstm_cell": "lstm",
    "aten.gru_cell": "gru",
    "aten.rnn_tanh": "tanh",
    "aten.rnn_relu": "relu",
    "aten.rnn_tanh_cell": "tanh",
    "aten.rnn_relu_cell": "relu",
}
MAX_POOL = _aten(
    "max_pool1d max_pool2d max_pool3d max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices "
    "adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d fractional_max_pool2d fractional_max_pool3d"
)
EXTREMUM = _aten("max min amax amin argmax argmin aminmax cummax cummin median nanmedian mode kthvalue")
RANKING = _aten("topk sort argsort msort")
BINARY_EXTREMUM = _aten("maximum minimum fmax fmin")
LOSS = _aten(
    "cross_entropy_loss nll_loss nll_loss_nd nll_loss2d nll_loss_forward binary_cross_entropy mse_loss l1_loss "
    "binary_cross_entropy_with_logits kl_div smooth_l1_loss huber_loss ctc_loss cosine_embedding_loss poisson_nll_loss "
    "hinge_embedding_loss margin_ranking_loss triplet_margin_loss soft_margin_loss"
)
# Integers, masks, sizes, constants, randomness and other things in which nothing can compete.
NEUTRAL = _aten(
    "zeros ones full empty arange eye linspace logspace rand randn randint randperm scalar_tensor tril_indices "
    "triu_indices zeros_like ones_like full_like empty_like rand_like randn_like randint_like new_zeros new_ones "
    "new_full new_empty new_tensor empty_strided new_empty_strided empty_permuted zero fill normal uniform exponential "
    "random log_normal cauchy geometric one_hot nonzero nonzero_numpy argwhere bincount histc bucketize searchsorted "
    "max_unpool1d max_unpool2d max_unpool3d unique unique2 _unique2 unique_consecutive unique_dim item "
    "_local_scalar_dense equal is_nonzero isin allclose "
    "_has_compatible_shallow_copy_type cross _upsample_bilinear2d_aa _upsample_bicubic2d_aa _upsample_nearest_exact1d "
    "_upsample_nearest_exact2d _upsample_nearest_exact3d upsample_nearest1d upsample_nearest2d upsample_nearest3d "
    "upsample_bilinear2d upsample_linear1d "
    "upsample_bicubic2d upsample_trilinear3d grid_sampler grid_sampler_2d grid_sampler_3d affine_grid_generator "
    "fft_fft fft_ifft fft_rfft fft_irfft fft_fft2 fft_ifft2 fft_rfft2 fft_irfft2 fft_fftn fft_ifftn stft istft "
    "hann_window hamming_window multinomial poisson binomial set_ _assert_async _assert_scalar sym_size size "
    "sym_numel stride is_contiguous dim diff rnn_dummy _shape_as_tensor is_floating_point numpy data "
    "linalg_inv linalg_solve linalg_cholesky linalg_qr linalg_svd linalg_eigh linalg_det linalg_slogdet inverse det "
    "_assert_tensor_metadata sym_constrain_range_for_size copysign nll_dummy trapezoid gradient _pack_padded_sequence "
    "_pad_packed_sequence cholesky_solve linalg_solve_triangular matrix_exp linalg_matrix_exp sinc tensor_data "
    "linalg_pinv detach_ requires_grad_ lift_fresh_copy view_dtype cumulative_trapezoid pad_sequence "
    "_nested_tensor_from_mask rename refine_names broadcast_tensors triplet_dummy logdet slogdet cov corrcoef "
    "cholesky cholesky_inverse lu_solve lu_unpack matrix_power orgqr ormqr pinverse qr svd triangular_solve trapz geqrf "
    "histogram bartlett_window blackman_window kaiser_window nonzero_static result_type multi_margin_loss sum_to_size"
)
# Linear algebra, transforms and questions about a tensor: nothing competes in any of them.
_FAMILIES = ("prim.", "prims.device_put", "aten.linalg_", "aten._linalg_", "aten.fft_", "aten._fft_", "aten.is_")
# Outputs hold no numbers of their inputs.
CREATES = frozenset(
    f"aten.{name}"
    for name in (
        "zeros ones full empty arange eye linspace rand randn randint randperm scalar_tensor tril_indices triu_indices "
        "zeros_like ones_like full_like empty_like rand_like randn_like randint_like new_zeros new_ones new_full "
        "new_empty new_tensor empty_strided new_empty_strided empty_permuted zero fill normal uniform bernoulli_p "
        "exponential random log_normal cauchy geometric lift_fresh hann_window hamming_window"
    ).split()
)


@functools.lru_cache(maxsize=4096)
def pointwise(op: str) -> bool:
    """Whether the operator works entry by entry."""
    if op in _POINTWISE:
        return True
    namespace, _, name = op.partition(".")
    packet = getattr(getattr(torch.ops, namespace), name, None)
    if packet is None or not hasattr(packet, "overloads"):
        return False
    tagged = [torch.Tag.pointwise in getattr(packet, overload).tags for overload in packet.overloads()]
    return bool(tagged) and any(tagged) and name not in {"max", "min"}


@functools.lru_cache(maxsize=4096)
def known(op: str) -> bool:
    """Whether emscan knows what the operator does to alternatives."""
    tables: tuple[Any, ...] = (
        VIEW, CONTRACTION, NORMALIZATION, POOLING, LOOKUP, INDEXING, JOIN, REDUCTION, LOG_PARTITION, SOFTMAX, SDPA,
        RECURRENT, MAX_POOL, EXTREMUM, RANKING, BINARY_EXTREMUM, LOSS, NEUTRAL, {"emscan.mutated", "aten.glu"},
    )  # fmt: skip
    return any(op in table for table in tables) or pointwise(op) or op.startswith(_FAMILIES)
