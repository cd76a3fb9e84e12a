"""What the rows of the hard cases say besides verdict, mechanism and count: calls, kinds, notes, leaks."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

import emscan
from tests.classify import hard_cases
from tests.classify.conftest import seeded


@cache
def rows(name: str) -> list[dict[str, Any]]:
    builder, _, objective = hard_cases.CASES[name]
    layers = emscan.audit(*seeded(builder), objective=objective).to_dict()["layers"]
    return [layer for layer in layers if layer["verdict"] != "none"]


def only(name: str, mechanism: str) -> dict[str, Any]:
    found = [row for row in rows(name) if row["mechanism"] == mechanism]
    assert len(found) == 1, [row["composition"] for row in found]
    return found[0]


@pytest.mark.parametrize(
    ("name", "mechanism", "calls"),
    [
        ("one_block_applied_three_times", "softmax", 3),
        ("one_block_applied_three_times", "logistic", 3),
        ("slot_attention", "softmax", 3),
        ("slot_attention", "logistic", 3),
        ("slot_attention", "threshold", 3),
        ("hopfield_iterations", "softmax", 3),
        ("em_attention_over_bases", "softmax", 3),
        ("blocks_of_queries_concatenated", "softmax", 3),
        ("slices_written_into_a_buffer", "softmax", 4),
        ("greedy_decoding", "logistic", 4),
        ("greedy_decoding", "selection", 4),
        ("elman_network_unrolled", "logistic", 6),
        ("twins_with_one_encoder", "threshold", 2),
        ("channel_and_spatial_attention", "threshold", 2),
        ("latent_attention", "softmax", 1),
    ],
)
def test_a_layer_called_again_counts_its_calls(name: str, mechanism: str, calls: int) -> None:
    assert only(name, mechanism)["calls"] == calls


ROUTERS = [
    name
    for name, (_, expected, _) in hard_cases.CASES.items()
    if {("hard", "truncation", 8), ("hard", "truncation", 4)} & set(expected)
    and name not in hard_cases.OPEN
    and name != "two_sparse_blocks"
]


@pytest.mark.parametrize("name", ROUTERS)
def test_the_alternatives_of_a_router_are_its_experts(name: str) -> None:
    alternatives = only(name, "truncation")["alternatives"]
    assert (alternatives["kind"], alternatives["persistent"]) == ("experts", True)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("layers_mixed_by_learned_scalars", 4),
        ("operations_mixed_by_architecture_weights", 3),
        ("convolution_with_normalized_taps", 3),
        ("learned_attention_matrix", 6),
        ("permutation_of_parameters", 6),
    ],
)
def test_a_softmax_of_parameters_is_a_prior(name: str, count: int) -> None:
    alternatives = only(name, "softmax")["alternatives"]
    assert (alternatives["kind"], alternatives["count"]) == ("prior", count)


@pytest.mark.parametrize(
    "name", ["codes_on_a_feature_map", "residual_codes", "codes_by_cosine_with_ema_tables", "grouped_gumbel_codes"]
)
def test_what_a_quantizer_chooses_from_are_codes(name: str) -> None:
    assert {row["alternatives"]["kind"] for row in rows(name) if row["mechanism"] == "selection"} == {"codes"}


@pytest.mark.parametrize(
    ("name", "mechanism"),
    [
        ("depth_of_tokens", "truncation"),
        ("tokens_pruned_by_class_attention", "truncation"),
        ("proposals_by_their_best_score", "truncation"),
        ("graph_pooling_by_projected_score", "truncation"),
        ("maximum_of_unmasked_tokens", "selection"),
        ("maximum_over_the_neighbours_of_a_graph", "selection"),
        ("additive_attention_pooling", "softmax"),
        ("blocks_of_keys_chosen_by_their_mean", "softmax"),
        ("latent_attention_absorbed", "softmax"),
        ("nystroem_attention", "softmax"),
        ("flash_attention_by_hand", "softmax"),
        ("wkv_loop", "softmax"),
    ],
)
def test_positions_and_keys_have_no_identity_across_samples(name: str, mechanism: str) -> None:
    found = [row["alternatives"] for row in rows(name) if row["mechanism"] == mechanism]
    assert found
    for alternatives in found:
        assert alternatives["kind"] in ("positions", "keys", "window")
        assert alternatives["persistent"] is False


@pytest.mark.parametrize(
    "name", ["sinks_joined_and_dropped", "sinks_in_front_by_einsum", "sink_in_the_denominator_stabilized"]
)
def test_a_learned_sink_is_noted_and_not_called_fixed(name: str) -> None:
    note = only(name, "softmax")["note"] or ""
    assert "sink" in note
    assert "fixed" not in note


def test_the_batch_is_named_where_it_competes() -> None:
    row = only("normalized_over_samples_by_hand", "softmax")
    assert row["alternatives"]["kind"] == "batch"


@pytest.mark.parametrize("name", ["straight_through_one_hot", "straight_through_sample"])
def test_straight_through_is_said(name: str) -> None:
    assert "straight-through" in (only(name, "selection")["note"] or "")


@pytest.mark.parametrize(
    ("name", "leaky"),
    [
        ("act_leaky_by_two_relus", True),
        ("edge_convolution_of_nearest_neighbours", True),
        ("graph_attention_on_a_dense_adjacency", True),
        ("act_star_relu", False),
        ("relu_attention", False),
        ("act_hard_sigmoid_by_clip", False),
    ],
)
def test_leaks(name: str, leaky: bool) -> None:
    assert bool(only(name, "threshold")["leaky"]) is leaky


def test_a_router_says_how_many_it_keeps() -> None:
    for name in ("route_mixtral", "route_two_maxima", "route_deepseek_three_with_infinity", "noisy_top_k_gating"):
        assert "Top-2" in only(name, "truncation")["composition"]
    for name in ("route_deepseek_three", "route_qwen_without_renormalization"):
        assert "Top-3" in only(name, "truncation")["composition"]
    for name in ("switch_with_capacity", "route_top_one_sigmoid", "route_llama_four"):
        assert "Top-1" in only(name, "truncation")["composition"]
