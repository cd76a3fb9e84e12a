"""Configurations that ask for more than any model has, or for code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.hostile.helpers import refused

pytest.importorskip("transformers")
BERT = {"model_type": "bert", "architectures": ["BertModel"], "hidden_size": 8, "num_attention_heads": 2,
        "num_hidden_layers": 1, "intermediate_size": 8, "vocab_size": 20, "max_position_embeddings": 16}  # fmt: skip
RESNET = {"model_type": "resnet", "hidden_sizes": [4, 8], "depths": [1, 1], "embedding_size": 4, "layer_type": "basic"}
AGAIN = "give the config.json of a model"


@pytest.fixture
def described(tmp_path):
    def write(text: str | bytes | dict) -> str:
        path = tmp_path / "config.json"
        data = json.dumps(text) if isinstance(text, dict) else text
        path.write_bytes(data.encode() if isinstance(data, str) else data)
        return str(path)

    return write


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "its configuration is nested too deep; " + AGAIN),
        ('{"a":' * 100_000, "its configuration is nested too deep; " + AGAIN),
        ('{"a": ' + "9" * 5000 + "}", "its configuration is not JSON ("),
        (b"\xff\xfe{}", "its configuration is not JSON ("),
        ("[]", "its configuration is no JSON object; " + AGAIN),
        ("3", "its configuration is no JSON object; " + AGAIN),
        ('{"model_type": 3}', "its model_type is no text; " + AGAIN),
        ('{"model_type": "bert", "architectures": [3]}', "its architectures are no names of classes; "),
        ('{"model_type": "bert", "architectures": ["os.system"]}', "its architectures are no names of classes; "),
        ('{"model_type": "\\u001b[31mred"}', "its model_type '\\\\x1b[31mred' is unknown to transformers "),
        ("{}", "its configuration has neither model_type nor architectures; " + AGAIN),
        (" " * (2**24 + 1), "its configuration has 16,777,217 bytes; " + AGAIN),
    ],
)  # fmt: skip
def test_documents_that_are_no_configuration(described, text, message):
    path = described(text)
    assert refused(path).startswith(f"cannot load {path}: {message}")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({**BERT, "num_hidden_layers": 10**6}, "its configuration asks for num_hidden_layers = 1000000"),
        ({**BERT, "num_hidden_layers": 10**400}, "its configuration asks for num_hidden_layers = 1000000000"),
        ({**BERT, "num_labels": 10**9}, "its configuration asks for num_labels = 1000000000"),
        ({**RESNET, "depths": [10**30, 1]}, "its configuration asks for depths = 1000000000"),
    ],
)
def test_counts_beyond_any_model(described, fields, message):
    path = described(fields)
    text = refused(path)
    assert text.startswith(f"cannot load {path}: {message}")
    assert text.endswith("; correct the configuration")


def test_more_layers_than_any_model_has(described, monkeypatch):
    monkeypatch.setattr("emscan.shapeless.build._MOST_PARTS", 2_000)
    path = described({**RESNET, "depths": [60_000, 1]})
    assert refused(path) == (
        f"cannot load {path}: transformers cannot build its ResNetModel (TooManyPartsError: it asks for more than 2,000 "
        "modules and parameters); check the configuration"
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_size": 10**9}, {"vocab_size": 10**12}, {"max_position_embeddings": 10**9}, {"intermediate_size": 2**62},
        {"hidden_size": -8}, {"hidden_size": 0}, {"num_attention_heads": 0}, {"hidden_size": 1e30}, {"vocab_size": 2**200},
    ],
)  # fmt: skip
def test_absurd_sizes_cost_nothing(described, fields):
    """Structure alone is on the meta device: sizes are numbers there, until something else refuses them."""
    from tests.hostile.helpers import command

    status, out, err = command("audit", described({**BERT, **fields}))
    assert status in (0, 2, 3)
    assert (status == 2) != bool(out)
    assert not any("internal error" in line for line in err)


def test_absurd_sizes_allocate_nothing(described, grows):
    assert grows("audit", described({**BERT, "hidden_size": 10**9, "vocab_size": 10**9}), warm=BERT) < 300


def test_a_repeated_key_counts_as_json_says(described):
    text = json.dumps(BERT)[:-1] + ', "num_hidden_layers": 1000000}'
    assert "asks for num_hidden_layers = 1000000" in refused(described(text))


def test_code_of_a_repository_runs_only_with_trust(tmp_path, canary):
    folder = tmp_path / "model"
    folder.mkdir()
    fields = {"model_type": "own", "auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Model"}}
    (folder / "config.json").write_text(json.dumps(fields))
    (folder / "code.py").write_text(f"open({str(canary)!r}, 'w')")
    assert refused(str(folder)) == (
        f"cannot load {folder}: its architecture is Python code of its own (auto_map), and not part of transformers; "
        "if you trust where it comes from, pass --trust"
    )


def test_code_beside_a_known_architecture_is_never_run(tmp_path, canary):
    from tests.hostile.helpers import command

    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**BERT, "auto_map": {"AutoModel": "code.Model"}}))
    (folder / "code.py").write_text(f"open({str(canary)!r}, 'w')")
    status, _, err = command("audit", str(folder), "--trust")
    assert status in (0, 3)
    assert any("the code that auto_map names is not used" in line for line in err)
    assert Path(folder / "code.py").exists()
