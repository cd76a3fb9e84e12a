"""The objective from a saved configuration: what transformers itself says about the loss of a head."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import emscan
from emscan.classify.declared import Declared, aligned, declared

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
IDS = torch.randint(5, 40, (6, 9), generator=torch.Generator().manual_seed(0))
CE, BCE = "Softmax + Cross-Entropy", "Sigmoid + BCE"


def bert(head: str, **options: object) -> nn.Module:
    config = transformers.BertConfig(vocab_size=40, max_position_embeddings=32, **SMALL, **options)
    return getattr(transformers, f"Bert{head}")(config).eval()


def gpt2(head: str = "LMHeadModel", **options: object) -> nn.Module:
    sizes = {"n_positions": 32, "n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    return getattr(transformers, f"GPT2{head}")(transformers.GPT2Config(vocab_size=40, **sizes, **options)).eval()


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=40, **SMALL)).eval()


def segformer() -> nn.Module:
    config = transformers.SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16], patch_sizes=[7, 3], strides=[4, 2],
        num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=16, num_labels=5,
    )  # fmt: skip
    return transformers.SegformerForSemanticSegmentation(config).eval()


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config).eval()


def vit() -> nn.Module:
    config = transformers.ViTConfig(image_size=16, patch_size=8, num_labels=5, **SMALL)
    return transformers.ViTForImageClassification(config).eval()


SINGLE, MULTI = "single_label_classification", "multi_label_classification"
HEADS = {
    # name: (model, inputs, end of the objective's words, [(composition's end, kind, K, calls)])
    "one_label": (lambda: bert("ForSequenceClassification", num_labels=3, problem_type=SINGLE), IDS,
                  f"cross-entropy (saved configuration: problem_type {SINGLE})", [(CE, "classes", 3, 1)]),
    "labels_alone": (lambda: bert("ForSequenceClassification", num_labels=3), IDS,
                     "cross-entropy (saved configuration: ForSequenceClassification head, 3 labels and no problem_type)",
                     [(CE, "classes", 3, 1)]),
    "many_labels": (lambda: bert("ForSequenceClassification", num_labels=3, problem_type=MULTI), IDS,
                    f"bce (saved configuration: problem_type {MULTI})", [(BCE, "on-off", 2, 1)]),
    "regression": (lambda: bert("ForSequenceClassification", num_labels=3, problem_type="regression"), IDS,
                   "none (saved configuration: problem_type regression)", []),
    "one_number": (lambda: bert("ForSequenceClassification", num_labels=1), IDS,
                   "none (saved configuration: num_labels 1, a regression)", []),
    "tokens": (lambda: bert("ForTokenClassification", num_labels=4), IDS,
               "cross-entropy (saved configuration: ForTokenClassification head)", [(CE, "classes", 4, 1)]),
    "masked": (lambda: bert("ForMaskedLM"), IDS,
               "cross-entropy (saved configuration: ForMaskedLM head)", [(CE, "classes", 40, 1)]),
    "spans": (lambda: bert("ForQuestionAnswering"), IDS,
              "cross-entropy (saved configuration: ForQuestionAnswering head)", [(CE, "positions", 9, 2)]),
    "next_token": (llama, IDS, "cross-entropy (saved configuration: ForCausalLM head)", [(CE, "classes", 40, 1)]),
    "next_token_by_task": (gpt2, IDS, "cross-entropy (saved configuration: ForCausalLM head)", [(CE, "classes", 40, 1)]),
    "image": (vit, torch.randn(4, 3, 16, 16),
              "cross-entropy (saved configuration: ForImageClassification head, 5 labels and no problem_type)",
              [(CE, "classes", 5, 1)]),
    "segmentation": (segformer, torch.randn(2, 3, 32, 32),
                     "cross-entropy (saved configuration: ForSemanticSegmentation head)", [(CE, "classes", 5, 1)]),
    "no_head": (lambda: bert("Model"), IDS, "none (no integer targets in the probe)", []),
    "no_head_of_a_decoder": (lambda: gpt2("Model"), IDS, "none (no integer targets in the probe)", []),
    "no_known_loss": (lambda: bert("ForNextSentencePrediction"), IDS, "none (no integer targets in the probe)", []),
}  # fmt: skip


def added(report: emscan.Report) -> list[tuple[str, str, int, int]]:
    return [
        (end, row.alternatives.kind, row.alternatives.count, row.calls)
        for row in report.layers
        for end in (CE, BCE)
        if row.composition.endswith(end) and row.verdict == "em"
    ]


@pytest.mark.parametrize("name", HEADS)
def test_heads(name: str) -> None:
    build, inputs, goal, rows = HEADS[name]
    report = emscan.audit(build(), inputs)
    assert report.probe.objective == goal
    assert added(report) == rows
    assert not [f for f in report.findings if f.level == "error"]
    for row in report.layers:
        if row.composition.endswith((CE, BCE)):
            assert row.evidence.gradient_error <= row.evidence.tolerance


def test_a_decoder_behind_an_encoder() -> None:
    report = emscan.audit(t5(), {"input_ids": IDS, "decoder_input_ids": IDS})
    assert report.probe.objective == "cross-entropy (saved configuration: ForConditionalGeneration head)"
    assert added(report) == [(CE, "classes", 40, 1)]


def test_an_own_loss_is_not_guessed() -> None:
    model = llama()
    model.loss_function = lambda logits, labels, **_: (logits - labels).square().mean()
    report = emscan.audit(model, IDS)
    assert report.probe.objective.startswith("none (")
    assert added(report) == []


def test_a_loss_of_the_table_that_was_put_in_place_is_known() -> None:
    model = llama()
    model.loss_function = transformers.loss.loss_utils.ForMaskedLMLoss
    assert declared(model).reason == "saved configuration: ForMaskedLM head"
    assert not declared(model).next_token


class Plain(nn.Module):
    """Has what a transformers model has, and is none."""

    loss_type = "ForSequenceClassification"

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.config = transformers.BertConfig(num_labels=3, problem_type=SINGLE)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


def test_a_configuration_on_a_plain_module_says_nothing() -> None:
    assert declared(Plain()) is None
    assert emscan.audit(Plain(), torch.randn(5, 4)).probe.objective == "none (no integer targets in the probe)"


class Normalized(transformers.BertForSequenceClassification):
    """A head that ends in softmax."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return super().forward(input_ids).logits.softmax(-1)


def test_a_softmax_in_the_output_is_no_error_because_of_a_configuration() -> None:
    model = Normalized(bert("ForSequenceClassification", num_labels=3, problem_type=SINGLE).config).eval()
    report = emscan.audit(model, IDS)
    assert report.probe.objective.endswith("but the output is normalized already)")
    assert not [f for f in report.findings if f.level == "error"]
    for told in (
        emscan.audit(model, IDS, objective="cross-entropy"),
        emscan.audit(model, IDS, targets=torch.arange(6) % 3),
    ):
        assert [f.rule for f in told.findings if f.level == "error"] == ["EM002"]


def test_an_output_that_is_not_what_the_configuration_describes() -> None:
    class Odd(transformers.BertForSequenceClassification):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return super().forward(input_ids, output_hidden_states=True).hidden_states[-1]

    report = emscan.audit(Odd(bert("ForSequenceClassification", num_labels=3).config).eval(), IDS)
    assert "is not its scores" in report.probe.objective
    assert added(report) == []


# ---- targets of the next token ------------------------------------------------------------------
def calibration(report: emscan.Report):
    return next((r.responsibility.calibration for r in report.layers if r.composition.endswith(CE)), None)


@pytest.mark.parametrize("build", [llama, gpt2])
def test_labels_are_moved_by_one_as_the_loss_moves_them(build) -> None:
    torch.manual_seed(0)
    model = build()
    ids = IDS.clone()
    labels = torch.where(torch.arange(9) < 2, -100, ids)  # a prompt that is not learned
    with torch.no_grad():
        r = model(ids).logits.double().softmax(-1)[:, 1:-1]
    right = (r.argmax(-1) == ids[:, 2:]).double().mean().item()
    moved = torch.cat([labels[:, 1:], labels.new_full((6, 1), -100)], 1)
    inside = emscan.audit(model, {"input_ids": ids, "labels": labels})
    assert inside.probe.objective == "cross-entropy (computed by the model)"
    assert added(inside) == [(CE, "classes", 40, 1)]
    for report in (inside, emscan.audit(model, ids, targets=labels), emscan.audit(model, ids, targets=moved)):
        found = calibration(report)
        assert found.targets == 6 * 7
        assert found.accuracy == pytest.approx(right)
        assert found.confidence == pytest.approx(r.amax(-1).mean().item(), rel=1e-5)


def test_targets_of_the_next_token_that_fit_no_input_are_not_guessed() -> None:
    report = emscan.audit(llama(), IDS, targets=IDS.flip(0))
    assert added(report) == [(CE, "classes", 40, 1)]
    assert calibration(report) is None


def test_targets_of_other_heads_stay_where_they_are() -> None:
    model = bert("ForMaskedLM")
    labels = torch.where(torch.arange(9) % 2 == 0, IDS, -100)
    with torch.no_grad():
        r = model(IDS).logits.double().softmax(-1)[:, ::2]
    found = calibration(emscan.audit(model, IDS, targets=labels))
    assert found.targets == 6 * 5
    assert found.accuracy == pytest.approx((r.argmax(-1) == IDS[:, ::2]).double().mean().item())


def test_aligned() -> None:
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert aligned(ids, [ids], True).tolist() == [[2, 3, -100], [5, 6, -100]]
    assert aligned(ids, [], False) is ids
    assert aligned(ids, [ids.float(), ids[:, :2]], True) is None
    ahead = torch.tensor([[2, 3, 9], [5, 6, 7]])
    assert aligned(ahead, [ids], True) is ahead


# ---- multi-label targets ------------------------------------------------------------------------
def test_many_labels_with_targets() -> None:
    model = bert("ForSequenceClassification", num_labels=3, problem_type=MULTI)
    y = torch.tensor([[0, 1, 1], [1, 0, 0]] * 3)
    with torch.no_grad():
        r = model(IDS).logits.double().sigmoid()
    report = emscan.audit(model, IDS, targets=y)
    found = next(row.responsibility.calibration for row in report.layers if row.composition.endswith(BCE))
    assert found.targets == 18
    assert found.accuracy == pytest.approx(((r > 0.5) == (y > 0.5)).double().mean().item())


def test_labels_that_are_shares_mean_many_labels_where_no_problem_type_is_given() -> None:
    y = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]] * 3)
    report = emscan.audit(bert("ForSequenceClassification", num_labels=3), IDS, targets=y)
    assert report.probe.objective.startswith("bce (saved configuration: ForSequenceClassification head")
    assert added(report) == [(BCE, "on-off", 2, 1)]


@pytest.mark.parametrize(("problem", "rows"), [("regression", []), (MULTI, [(BCE, "on-off", 2, 1)])])
def test_integer_targets_do_not_overrule_a_problem_type(problem: str, rows: list) -> None:
    model = bert("ForSequenceClassification", num_labels=3, problem_type=problem)
    report = emscan.audit(model, IDS, targets=torch.arange(6) % 3)
    assert added(report) == rows
    assert not [f for f in report.findings if f.level == "error"]


# ---- files ----------------------------------------------------------------------------------------
def test_a_saved_folder_and_its_configuration_alone(tmp_path: Path) -> None:
    bert("ForSequenceClassification", num_labels=3, problem_type=SINGLE).save_pretrained(tmp_path)
    for where in (tmp_path, tmp_path / "config.json"):
        ran = subprocess.run(
            [sys.executable, "-m", "emscan", "audit", str(where), "--format", "json"], capture_output=True, text=True,
            timeout=120, check=True,
        )  # fmt: skip
        report = json.loads(ran.stdout)
        assert report["probe"]["objective"] == f"cross-entropy (saved configuration: problem_type {SINGLE})"
        assert "Linear + Softmax + Cross-Entropy" in [row["composition"] for row in report["layers"]]


def test_transformers_is_not_imported_for_other_models() -> None:
    code = (
        "import sys, torch, emscan; emscan.audit(torch.nn.Linear(3, 2), torch.randn(4, 3)); "
        "print('transformers' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"


def test_what_fits() -> None:
    says = Declared("cross-entropy", "", (3,), classes=40)
    assert says.fits((2, 9, 40))
    assert not says.fits((2, 40))
    assert not says.fits((2, 9, 41))
