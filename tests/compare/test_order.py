"""Which checkpoints the arguments name, and in which order."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from emscan.compare.baseline import baseline_text
from emscan.compare.expand import Candidate, expanded
from emscan.compare.order import ordered
from emscan.errors import UsageError
from tests.report.builder import gate, report


def order(*names: str, folder: Path | None = None) -> tuple[list[str], str, list[str]]:
    """The names in order, what told it, and what was said; files that are not there have no time."""
    notes: list[str] = []
    paths = [str(folder / name) if folder else name for name in names]
    placed, how = ordered([Candidate(path, path) for path in paths], notes.append)
    return [os.path.relpath(one.candidate.path, folder) for one in placed], how, notes


@pytest.mark.parametrize(
    ("names", "how"),
    [
        (["epoch=0-step=90.ckpt", "epoch=9-step=1000.ckpt", "epoch=10-step=1100.ckpt"], "step in the names"),
        (["out/checkpoint-500", "out/checkpoint-1000", "out/checkpoint-10000"], "step in the names"),
        (["a/step_5/model.pt", "a/step_12/model.pt", "a/step_100/model.pt"], "step in the names"),
        (["global_step8", "global_step10"], "step in the names"),
        (["iter_5.pth", "iter_40.pth"], "step in the names"),
        (["epoch_2.pt", "epoch_10.pt"], "epoch in the names"),
        (["checkpoint-epoch-2.pt", "checkpoint-epoch-10.pt"], "epoch in the names"),
        (["model_000100.pt", "model_000200.pt", "model_001000.pt"], "number in the names"),
        (["resnet50_9.pt", "resnet50_10.pt"], "number in the names"),
        (["e1_b100.pt", "e1_b900.pt", "e2_b100.pt"], "epoch in the names"),
        (["run1_b100.pt", "run1_b900.pt", "run2_b100.pt"], "number in the names"),
        (["lr=1e-4_step=7.pt", "lr=1e-3_step=20.pt"], "step in the names"),
    ],
)
def test_numbers_in_names_tell_the_order(names: list[str], how: str) -> None:
    found, told, _ = order(*reversed(names))
    if names[0] == "e1_b100.pt":  # two of epoch 1: their times, which are equal, then their names
        assert set(found[:2]) == set(names[:2])
    else:
        assert found == names
    assert told == how


def save(path: Path, time: int, **entries: object) -> None:
    torch.save({"state_dict": {"w": torch.zeros(2)}, **entries}, path)
    os.utime(path, (time, time))


def test_the_step_in_the_file_counts_where_the_name_has_none(tmp_path: Path) -> None:
    for name, time, step in (("epoch=0-step=40.ckpt", 30, 40), ("epoch=1-step=80.ckpt", 10, 80), ("last.ckpt", 20, 60)):
        save(tmp_path / name, time, global_step=step, epoch=0)
    found, how, notes = order("last.ckpt", "epoch=1-step=80.ckpt", "epoch=0-step=40.ckpt", folder=tmp_path)
    assert found == ["epoch=0-step=40.ckpt", "last.ckpt", "epoch=1-step=80.ckpt"]
    assert how == "step in the names"
    assert notes == ["last: step 60, from the file"]


def test_plain_numbers_are_steps_or_epochs_as_the_files_say(tmp_path: Path) -> None:
    for name, time, epoch in (("model_1.pt", 1, 1), ("model_3.pt", 2, 3), ("final.pt", 0, 2)):
        save(tmp_path / name, time, epoch=epoch, global_step=1000 * epoch)
    found, _, notes = order("final.pt", "model_3.pt", "model_1.pt", folder=tmp_path)
    assert found == ["model_1.pt", "final.pt", "model_3.pt"]
    assert notes == ["final: epoch 2, from the file"]


def test_steps_in_all_files_and_none_in_names(tmp_path: Path) -> None:
    for name, time, step in (("best.ckpt", 1, 70), ("last.ckpt", 2, 50)):
        save(tmp_path / name, time, global_step=step)
    found, how, _ = order("best.ckpt", "last.ckpt", folder=tmp_path)
    assert found == ["last.ckpt", "best.ckpt"]
    assert how == "step stored in the files"


def test_a_trainer_folder_stores_its_step(tmp_path: Path) -> None:
    for name, step in (("one", 900), ("two", 100)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    assert order("one", "two", folder=tmp_path)[:2] == (["two", "one"], "step stored in the files")


def test_the_clock_tells_where_nothing_else_does(tmp_path: Path) -> None:
    for name, time in (("b.pt", 10), ("a.pt", 20), ("c.pt", 15)):
        save(tmp_path / name, time)
    assert order("a.pt", "b.pt", "c.pt", folder=tmp_path) == (["b.pt", "c.pt", "a.pt"], "modification time", [])


def test_one_without_a_step_is_placed_by_the_clock(tmp_path: Path) -> None:
    for name, time in (("step=1.pt", 10), ("step=2.pt", 20), ("middle.pt", 15), ("before.pt", 5)):
        save(tmp_path / name, time)
    found, _, notes = order("middle.pt", "step=2.pt", "before.pt", "step=1.pt", folder=tmp_path)
    assert found == ["before.pt", "step=1.pt", "middle.pt", "step=2.pt"]
    assert len(notes) == 2
    assert "middle: no step in its name or its file, so it is placed by modification time" in notes


def test_ties_are_said(tmp_path: Path) -> None:
    for name, time in (("step=1-v1.pt", 10), ("step=1.pt", 20), ("step=3.pt", 5)):
        save(tmp_path / name, time)
    found, _, notes = order("step=1.pt", "step=3.pt", "step=1-v1.pt", folder=tmp_path)
    assert found == ["step=1-v1.pt", "step=1.pt", "step=3.pt"]
    assert notes == ["step 1 is there 2 times (step=1-v1, step=1): ordered by modification time"]


def names(*arguments: Path | str) -> tuple[list[str], list[str]]:
    notes: list[str] = []
    return [Path(one.path).name for one in expanded([str(a) for a in arguments], notes.append)], notes


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def test_a_lightning_folder(tmp_path: Path) -> None:
    for version in ("version_2", "version_10"):
        folder = tmp_path / "lightning_logs" / version / "checkpoints"
        touch(folder / f"{version}-step=1.ckpt", folder / "last.ckpt", folder.parent / "hparams.yaml")
    for start in (tmp_path, tmp_path / "lightning_logs"):
        found, notes = names(start)
        assert found == ["last.ckpt", "version_10-step=1.ckpt"]
        assert notes == [f"{tmp_path / 'lightning_logs'}: of 2 runs the last is taken, version_10"]
    assert names(tmp_path / "lightning_logs" / "version_2")[0] == ["last.ckpt", "version_2-step=1.ckpt"]


def test_a_link_to_another_checkpoint_is_taken_once(tmp_path: Path) -> None:
    touch(tmp_path / "a-step=1.ckpt", tmp_path / "b-step=2.ckpt")
    (tmp_path / "last.ckpt").symlink_to("b-step=2.ckpt")
    found, notes = names(tmp_path)
    assert found == ["a-step=1.ckpt", "b-step=2.ckpt"]
    assert len(notes) == 1
    assert "is the same file as" in notes[0]


def test_a_trainer_folder(tmp_path: Path) -> None:
    for step in (500, 1000):
        touch(tmp_path / f"checkpoint-{step}" / "model.safetensors", tmp_path / f"checkpoint-{step}" / "optimizer.pt")
        touch(tmp_path / f"checkpoint-{step}" / "config.json")
    assert names(tmp_path) == (["checkpoint-1000", "checkpoint-500"], [])
    touch(tmp_path / "config.json", tmp_path / "model.safetensors")
    assert names(tmp_path)[1] == [f"{tmp_path}: its checkpoints are taken, the model beside them is not"]


def test_a_folder_of_plain_files_leaves_training_state_out(tmp_path: Path) -> None:
    touch(*(tmp_path / name for name in ("m_1.pt", "m_2.pt", "optimizer.pt", "rng_state_0.pth", "notes.txt", "x.json")))
    assert names(tmp_path)[0] == ["m_1.pt", "m_2.pt"]


def test_folders_that_are_checkpoints(tmp_path: Path) -> None:
    touch(tmp_path / "step_1" / ".metadata", tmp_path / "step_2" / ".metadata", tmp_path / "logs" / "x")
    assert names(tmp_path)[0] == ["step_1", "step_2"]
    assert names(tmp_path / "step_1", tmp_path / "step_2")[0] == ["step_1", "step_2"]


def test_patterns_and_files(tmp_path: Path) -> None:
    touch(*(tmp_path / name for name in ("m_1.pt", "m_2.pt", "z.pt")))
    assert names(tmp_path / "m_*.pt")[0] == ["m_1.pt", "m_2.pt"]
    assert names(tmp_path / "m_*.pt", tmp_path / "z.pt", tmp_path / "m_1.pt")[0] == ["m_1.pt", "m_2.pt", "z.pt"]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("gone.pt", "gone.pt: no such file or folder"),
        ("*.pt", "*.pt: the pattern matches nothing"),
        ("empty", "empty: no checkpoints in it"),
        ("one.ckpt", "a trend needs two checkpoints or more, this is one checkpoint (one.ckpt)"),
    ],
)
def test_arguments_that_name_nothing(tmp_path: Path, monkeypatch, argument: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    touch(tmp_path / "one.ckpt")
    with pytest.raises(UsageError) as error:
        names(argument)
    assert str(error.value) == f"{message}; give files, a pattern in quotes, or the folder of a run"


def test_reports_are_found_by_content_and_those_of_one_file_are_several(tmp_path: Path) -> None:
    made = [report(gate(0, "a")) for _ in range(3)]
    for step, one in zip((20, 3, 100), made, strict=True):
        one.model.path = f"runs/step={step}.pt"
    (tmp_path / "all.json").write_text(baseline_text(made, Path()))
    found = expanded([str(tmp_path / "all.json")], print)
    placed, how = ordered(found, print)
    assert how == "step in the names"
    assert [one.step for one in placed] == [3, 20, 100]
    for step in (9, 10):
        (tmp_path / f"r{step}").write_text(baseline_text(made[:1], Path()))
    found = expanded([str(tmp_path / "r10"), str(tmp_path / "r9")], print)
    assert all(one.report for one in found)
    assert [one.step for one in ordered(found, print)[0]] == [9, 10]
