"""A file of text: one sample per line, with the tokenizer in the model's folder."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from emscan.errors import ProbeError, UsageError
from emscan.probe import open_probe

transformers = pytest.importorskip("transformers")
LINES = ["the cat sat on the mat", "a dog barks", "energy and responsibility sum to one", "the dead units", "one"]


def tokenizer(place: Path, kind: str, **fields: object) -> Path:
    """Train a tokenizer on the lines and save it as transformers does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

    if kind == "words":
        made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        made.pre_tokenizer = pre_tokenizers.Whitespace()
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
        made.train_from_iterator(LINES, trainers.WordPieceTrainer(vocab_size=90, special_tokens=special))
        ends = [("[CLS]", 2), ("[SEP]", 3)]
        made.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
        names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    else:
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        made.train_from_iterator(
            LINES, trainers.BpeTrainer(vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=alphabet)
        )
        names = {"eos_token": "<|end|>", "bos_token": "<|end|>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, **names, **fields).save_pretrained(place)
    return place


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "lines.txt"
    path.write_text("\n\n".join(LINES) + "\n   \n", encoding="utf-8")
    return path


def bert(**fields: object) -> nn.Module:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(vocab_size=90, max_position_embeddings=32, **sizes, **fields)
    return transformers.BertForSequenceClassification(config).eval()


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2, n_positions=24, eos_token_id=0)
    return transformers.GPT2LMHeadModel(config).eval()


def t5() -> nn.Module:
    config = transformers.T5Config(vocab_size=90, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, pad_token_id=0,
                                   decoder_start_token_id=0)  # fmt: skip
    return transformers.T5ForConditionalGeneration(config).eval()


def expected(place: Path, **options: object) -> dict[str, Tensor]:
    reference = transformers.AutoTokenizer.from_pretrained(place)
    if reference.pad_token is None:
        reference.pad_token = reference.eos_token
    return reference(LINES, padding=True, return_tensors="pt", **options)


@pytest.mark.parametrize(("kind", "model"), [("words", bert), ("bytes", gpt2)])
def test_ids_are_those_of_transformers(tmp_path, text, kind, model):
    place = tokenizer(tmp_path, kind)
    (batch,) = open_probe(str(text), model(), folder=place)
    theirs = expected(place)
    names = {"input_ids": 0, "attention_mask": 1} if kind == "words" else {"input_ids": 0}
    found = {name: batch.kwargs[name] if name in batch.kwargs else batch.args[at] for name, at in names.items()}
    for name, tensor in found.items():
        assert torch.equal(tensor, theirs[name]), name
    assert "attention_mask" in batch.kwargs or len(batch.args) == 2
    assert batch.samples == 5


def test_batches_digest_and_passes(tmp_path, text):
    place = tokenizer(tmp_path, "words")
    model = bert()
    probe = open_probe(str(text), model, folder=place, batch_size=2)
    assert probe.total_batches is None
    widths = [[tuple(tensor.shape) for tensor in batch.tensors()] for batch in probe]
    assert [shapes[0][0] for shapes in widths] == [2, 2, 1]
    assert widths[2][0][1] < widths[0][0][1]  # padded to the longest of its batch
    assert (probe.info.samples, probe.info.batches) == (5, 3)
    assert probe.info.sha256 == hashlib.sha256(text.read_bytes()).hexdigest()
    assert [[tuple(tensor.shape) for tensor in batch.tensors()] for batch in probe] == widths
    assert probe.info.source == f"{text}: lines of text, tokenizer {place}/tokenizer.json, at most 32 tokens"


@pytest.mark.parametrize(
    ("fields", "arguments", "longest"), [({}, {}, 32), ({"model_max_length": 7}, {}, 7), ({}, {"max_length": "4"}, 4)]
)
def test_lines_are_cut_to_what_the_model_takes(tmp_path, fields, arguments, longest):
    place = tokenizer(tmp_path, "words", **fields)
    (tmp_path / "t.txt").write_text("the cat " * 100)
    (batch,) = open_probe(str(tmp_path / "t.txt"), bert(), folder=place, arguments=arguments)
    ids = batch.args[0]
    assert ids.shape == (1, longest)
    assert ids[0, -1] == 3  # the closing token stays


def test_positions_that_a_padding_row_takes_are_left_out(tmp_path):
    place = tokenizer(tmp_path, "words")
    (tmp_path / "t.txt").write_text("the cat " * 100)
    config = transformers.RobertaConfig(
        vocab_size=90, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=20, pad_token_id=1,
    )  # fmt: skip
    model = transformers.RobertaModel(config).eval()
    (batch,) = open_probe(str(tmp_path / "t.txt"), model, folder=place)
    assert batch.args[0].shape == (1, 18)
    model(*batch.args, **batch.kwargs)


def test_a_decoder_gets_the_text_after_its_start_token(tmp_path, text):
    place = tokenizer(tmp_path, "words")
    model = t5()
    (batch,) = open_probe(str(text), model, folder=place)
    call = (
        dict(
            zip(
                ["input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask"], batch.args, strict=False
            )
        )
        | batch.kwargs
    )
    assert torch.equal(call["decoder_input_ids"], model._shift_right(call["input_ids"]))
    assert call["decoder_attention_mask"].shape == call["attention_mask"].shape
    model(*batch.args, **batch.kwargs)


class Ids(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(90, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids).mean(1)


def test_a_model_that_takes_ids_alone_gets_them_alone(tmp_path, text):
    place = tokenizer(tmp_path, "words")
    for arguments, folder in (
        ({}, place),
        ({"tokenizer": str(place)}, None),
        ({"tokenizer": f"{place}/tokenizer.json"}, None),
    ):
        probe = open_probe(str(text), Ids(), folder=folder, arguments=arguments)
        (batch,) = probe
        assert len(batch.args) == 1
        assert not batch.kwargs
        assert torch.equal(batch.args[0], expected(place)["input_ids"])
        assert probe.info.source.endswith(", padded with 0 and no mask, which forward does not take")


def test_objects_with_a_text_and_a_class(tmp_path):
    place = tokenizer(tmp_path, "words")
    rows = [{"text": line, "label": number % 2, "id": "x"} for number, line in enumerate(LINES)]
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    (batch,) = open_probe(str(path), bert(), folder=place)
    assert torch.equal(batch.args[0], expected(place)["input_ids"])
    assert batch.targets.tolist() == [0, 1, 0, 1, 0]
    path.write_text("\n".join(json.dumps({"review": line}) for line in LINES))
    (batch,) = open_probe(str(path), bert(), folder=place, arguments={"field": "review"})
    assert batch.targets is None
    with pytest.raises(
        ProbeError, match=r"line 1 has no text in a field 'text' \(it has review\); name it: --probe-arg field"
    ):
        list(open_probe(str(path), bert(), folder=place))


def test_a_large_file_is_read_batch_by_batch(tmp_path):
    place = tokenizer(tmp_path, "words")
    path = tmp_path / "t.txt"
    with path.open("w") as file:
        for number in range(20_000):
            file.write(f"{LINES[number % 5]}\n")
    with path.open("a") as file:
        file.write("the " * (1 << 20))  # one long line
    probe = open_probe(str(path), bert(), folder=place)
    batches = iter(probe)
    first = next(batches)
    assert first.samples * first.args[0].shape[1] <= 4096
    assert probe.info.samples == first.samples
    assert sum(batch.samples for batch in batches) + first.samples == 20_001


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "holds no sample"),
        (b"\n \n\t\n", "holds no sample"),
        (b"fine\n\xff\xfebad", "line 2 is not UTF-8 (byte 0); save it as UTF-8 text"),
        ("fine".encode("utf-16"), "line 1 is not UTF-8"),
    ],
)
def test_files_that_are_no_text(tmp_path, data, message):
    place = tokenizer(tmp_path, "words")
    (tmp_path / "t.txt").write_bytes(data)
    with pytest.raises(ProbeError) as error:
        list(open_probe(str(tmp_path / "t.txt"), bert(), folder=place))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ("[" * 100_000, "line 2 is not JSON"),
        ("3", "line 2 has no text in a field 'text'"),
        ('{"text": 3}', "line 2 has no text in a field 'text' (it has text)"),
    ],
)
def test_lines_that_are_no_objects(tmp_path, line, message):
    place = tokenizer(tmp_path, "words")
    (tmp_path / "t.jsonl").write_text('{"text": "the cat"}\n' + line)
    with pytest.raises(ProbeError) as error:
        list(open_probe(str(tmp_path / "t.jsonl"), bert(), folder=place))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_without_a_tokenizer(tmp_path, text):
    with pytest.raises(ProbeError) as error:
        open_probe(str(text), bert())
    assert str(error.value) == (
        "a text file needs the model's tokenizer, and the model is no folder with one; "
        "give tokens as tensors, or --probe-arg tokenizer=FOLDER"
    )
    (tmp_path / "empty").mkdir()
    with pytest.raises(ProbeError, match=r"empty has no tokenizer \(no tokenizer.json\)"):
        open_probe(str(text), bert(), folder=tmp_path / "empty")
    with pytest.raises(ProbeError, match="does not exist"):
        open_probe("nowhere.txt", bert(), folder=tmp_path)


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"not json", b'{"model": {"type": "BPE", "vocab": {}, "merges": ["a b"]}}']
)
def test_tokenizers_that_do_not_work(tmp_path, text, data):
    (tmp_path / "tokenizer.json").write_bytes(data)
    with pytest.raises(ProbeError) as error:
        list(open_probe(str(text), bert(), folder=tmp_path))
    assert f"the tokenizer {tmp_path}/tokenizer.json does not work (" in str(error.value)
    assert "\n" not in str(error.value)


def test_tokenizers_that_blow_text_up(tmp_path, text):
    place = tokenizer(tmp_path, "words")
    fields = json.loads((place / "tokenizer.json").read_text())
    double = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    fields["normalizer"] = {"type": "Sequence", "normalizers": [double] * 40}
    (place / "tokenizer.json").write_text(json.dumps(fields))
    with pytest.raises(ProbeError, match="makes text over 64 times longer"):
        open_probe(str(text), bert(), folder=place)


def test_the_code_of_a_tokenizer_runs_only_where_it_is_trusted(tmp_path, text):
    place = tmp_path / "model"
    place.mkdir()
    (place / "vocab.txt").write_text("[UNK]\n[PAD]\n")
    (place / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    fields = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}}
    (place / "tokenizer_config.json").write_text(json.dumps(fields))
    (place / "config.json").write_text('{"model_type": "mine"}')
    with pytest.raises(ProbeError, match="does not work"):
        open_probe(str(text), bert(), folder=place)
    assert not (tmp_path / "ran").exists()


def test_wrong_options(tmp_path, text):
    place = tokenizer(tmp_path, "words")
    with pytest.raises(UsageError) as error:
        open_probe(str(text), bert(), folder=place, arguments={"maxlength": "4"})
    assert str(error.value) == (
        "--probe-arg maxlength: a text file takes max_length, tokenizer, field; did you mean max_length?"
    )
    with pytest.raises(UsageError, match="give a whole number from 1 to"):
        open_probe(str(text), bert(), folder=place, arguments={"max_length": "none"})
