"""Policies: where they are found, what is read from them, and what is refused with its line."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from emscan.errors import UsageError
from emscan.policy import read_policy
from emscan.policy.find import find
from emscan.policy.keys import KEYS
from emscan.report.document import Limit, Thresholds


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is a repository's root, and the working directory."""
    (tmp_path / ".git").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(text: str, name: str = "emscan.toml") -> str:
    Path(name).write_text(text)
    with pytest.raises(UsageError) as found:
        read_policy()
    assert "\n" not in str(found.value)
    return str(found.value)


def test_without_a_file_there_are_defaults(here: Path) -> None:
    applied = read_policy().at("model.pt")
    assert applied.source is None
    assert applied.fail_on == ("warning",)
    assert applied.thresholds == Thresholds()
    assert not applied.limits


def test_the_nearest_file_upward_is_read_and_the_search_ends_at_the_repository(here: Path) -> None:
    (here / "emscan.toml").write_text("seed = 1\n")
    inner = here / "a" / "b"
    inner.mkdir(parents=True)
    assert find(inner) == here / "emscan.toml"
    (here / "a" / "pyproject.toml").write_text("[project]\nname = 'x'\n")  # has no policy
    assert find(inner) == here / "emscan.toml"
    (here / "a" / "pyproject.toml").write_text("[tool.emscan]\nseed = 2\n")
    assert find(inner) == here / "a" / "pyproject.toml"
    (here / "a" / ".git").mkdir()
    (here / "a" / "pyproject.toml").unlink()
    assert find(inner) is None


def test_home_ends_the_search(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "emscan.toml").write_text("seed = 1\n")
    home = here / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    assert find(home) is None


def test_of_two_files_in_a_folder_one_is_named_as_not_read(here: Path) -> None:
    (here / "emscan.toml").write_text("seed = 1\n")
    (here / "pyproject.toml").write_text("[tool.emscan]\nseed = 2\n")
    policy = read_policy()
    assert policy.setting("seed") == 1
    assert policy.notes == ("emscan.toml is read; [tool.emscan] in pyproject.toml beside it is not",)


def test_options_outrank_the_environment_and_that_the_file(here: Path) -> None:
    (here / "emscan.toml").write_text('max-dead = "5%"\nseed = 1\nfail-on = ["note"]\n[thresholds]\nrare = 0.2\n')
    environment = {"EMSCAN_SEED": "2", "EMSCAN_RARE": "0.3", "EMSCAN_FAIL_ON": "error, EM101"}
    applied = read_policy(environment=environment, options={"seed": "3"}).at("m.pt")
    assert applied.settings["seed"] == 3
    assert applied.thresholds.rare == 0.3
    assert applied.fail_on == ("error", "EM101")
    assert applied.limits == (Limit("max-dead", 0.05, True),)
    assert read_policy(environment=environment).at("m.pt").settings["seed"] == 2


def test_an_option_for_a_limit_outranks_tables_of_layers(here: Path) -> None:
    (here / "emscan.toml").write_text('[[layer]]\npattern = "a"\nmax-dead = "50%"\n')
    applied = read_policy(options={"max-dead": "0"}).at("m.pt")
    assert [limit.value for limit in applied.limits] == [0.5, 0.0]  # the last one for a row holds


def test_underscores_and_names_are_as_good(here: Path) -> None:
    (here / "emscan.toml").write_text('max_dead = 3\nignore = ["rare-unit", "em9"]\nbatch_size = 8\n')
    applied = read_policy().at("m.pt")
    assert applied.limits == (Limit("max-dead", 3.0, False),)
    assert [(ignore.rule, ignore.where) for ignore in applied.ignores] == [
        ("EM107", "emscan.toml:2"),
        ("EM9", "emscan.toml:2"),
    ]
    assert applied.settings == {"batch-size": 8}


def test_pyproject_holds_the_same(here: Path) -> None:
    (here / "pyproject.toml").write_text(
        '[tool.emscan]\nmax-dead = "5%"\n\n[tool.emscan.thresholds]\nsink = "40%"\n\n'
        '[[tool.emscan.layer]]\npattern = ["encoder.*", "head"]\nignore = ["EM204"]\nmax-dead = "off"\n'
    )
    applied = read_policy().at("m.pt")
    assert applied.thresholds.sink == 0.4
    assert applied.limits[1] == Limit("max-dead", None, False, ["encoder.*", "head"])
    assert applied.overrides[0].where == "pyproject.toml:7"


def test_a_table_for_some_models_is_for_them_alone(here: Path) -> None:
    (here / "emscan.toml").write_text(
        'ignore = ["EM101"]\nprobe = "random"\n[[checkpoint]]\npath = "gen/*.pt"\nprobe = "x.npy"\nignore = ["EM102"]\n'
    )
    policy = read_policy(environment={"EMSCAN_SEED": "4"})
    assert policy.at("gen/a.pt").settings == {"probe": "x.npy", "seed": 4}
    assert policy.at(str(here / "gen" / "a.pt")).settings["probe"] == "x.npy"
    assert [ignore.rule for ignore in policy.at("gen/a.pt").ignores] == ["EM101", "EM102"]
    assert policy.at("a.pt").settings["probe"] == "random"
    assert [part.where for part in policy.unused_tables(["a.pt"])] == ["emscan.toml:3"]


def test_paths_in_a_file_are_relative_to_it(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "emscan.toml").write_text('probe = "p.npy"\nmodel = "nets.py:Net"\nbaseline = ["old.json"]\n')
    (here / "p.npy").touch()
    (here / "nets.py").touch()
    (here / "sub").mkdir()
    monkeypatch.chdir(here / "sub")
    policy = read_policy()
    assert policy.at("m.pt").settings == {"probe": "../p.npy", "model": "../nets.py:Net"}
    assert policy.setting("baseline") == ("../old.json",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed = 1\nmax-ded = 1\n", "emscan.toml:2: unknown key max-ded; did you mean max-dead?"),
        ("max_ded = 1\n", "emscan.toml:1: unknown key max-ded; did you mean max-dead?"),
        ("max-dead = 0.5\n", "emscan.toml:1: max-dead = 0.5; write a share such as"),
        ('max-dead = "101%"\n', "emscan.toml:1: max-dead = '101%'; write a share"),
        ("max-dead = true\n", "max-dead = True; write a share"),
        ("max-dead = -1\n", "max-dead = -1; write a share"),
        ("max-violation = nan\n", "max-violation = nan; write a number"),
        ('max-violation = "5%"\n', "max-violation = '5%'; write a number"),
        ("rare = 1\n", "unknown key rare; it belongs in the table thresholds"),
        ('[thresholds]\nrare = "200%"\n', "emscan.toml:2: rare = '200%'; write a share from 0 to 1"),
        ("[thresholds]\nrar = 1\n", "emscan.toml:2: unknown key rar in thresholds; did you mean rare?"),
        ("thresholds = 1\n", "thresholds is no table"),
        ('ignore = ["EM1777"]\n', "ignore = ['EM1777']; no rule 'EM1777'"),
        ('select = ["dead-unt"]\n', "no rule 'dead-unt'; did you mean dead-unit?"),
        ('fail-on = ["warnings"]\n', "no level or rule 'warnings'; did you mean warning?"),
        ("ignore = 3\n", 'ignore = 3; write a list, e.g. ["..."]'),
        ("batch-size = 0\n", "batch-size = 0; write a whole number of 1 or more"),
        ('objective = "mse"\n', "objective = 'mse'; use one of auto, cross-entropy"),
        ("partial = 1\n", "partial = 1; write true or false"),
        ("probe = 1\n", 'probe = 1; write text, e.g. "..."'),
        ("trust = true\n", "unknown key trust; a file cannot vouch for other files: pass --trust"),
        ("max-dead = 1\nmax_dead = 2\n", "max-dead is set twice"),
        ("layer = 3\n", "emscan.toml:1: layer is not a list of tables; write [[layer]]"),
        ('[[layer]]\nmax-dead = 1\n', "emscan.toml:1: a [[layer]] table without pattern"),
        ('[[layer]]\npattern = "a"\n[[layer]]\npattern = "b"\nmax-ded = 1\n', "emscan.toml:5: unknown key max-ded in layer"),
        ('[[layer]]\npattern = "a"\nmax-dead-model = 1\n', "emscan.toml:3: max-dead-model is of the whole model"),
        ('[[layer]]\npattern = 3\n', "emscan.toml:2: pattern is no glob"),
        ('[[layer]]\npattern = "a"\nprobe = "x"\n', "emscan.toml:3: unknown key probe in layer; it belongs at the top"),
        ('[[checkpoint]]\npath = "a"\nselect = ["EM1"]\n', "emscan.toml:3: unknown key select in checkpoint"),
        ("a = [\n", "cannot use emscan.toml: it is no TOML"),
        ("a = " + "[" * 5000, "cannot use emscan.toml: it is"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused_in_one_line(here: Path, text: str, message: str) -> None:
    assert message in refused(text)


def test_what_is_wrong_in_pyproject_has_its_line(here: Path) -> None:
    text = "[project]\nmax-ded = 1\n[tool.emscan]\nseed = 1\nmax-ded = 1\n"
    assert refused(text, "pyproject.toml").startswith("pyproject.toml:5: unknown key max-ded")
    assert refused("[tool]\nemscan = 3\n", "pyproject.toml").endswith("write [tool.emscan]")
    Path("emscan.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="not UTF-8"):
        read_policy()


def test_a_named_file_has_to_be_there_and_to_have_a_policy(here: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read none\.toml: No such file"):
        read_policy(here / "none.toml")
    (here / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    with pytest.raises(UsageError, match=r"pyproject.toml has no \[tool.emscan\]"):
        read_policy(here / "pyproject.toml")


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("EMSCAN_MAX_DED", "1", "EMSCAN_MAX_DED is no setting; did you mean EMSCAN_MAX_DEAD?"),
        ("EMSCAN_MAX_DEAD", "much", "EMSCAN_MAX_DEAD = 'much'; write a share"),
        ("EMSCAN_SKIP_UNSUPPORTED", "maybe", "write true or false"),
    ],
)
def test_the_environment_is_checked_as_well(here: Path, variable: str, value: str, message: str) -> None:
    with pytest.raises(UsageError) as found:
        read_policy(environment={variable: value, "PATH": "/bin", "EMSCAN_DEBUG": "1"})
    assert message in str(found.value)


def test_every_key_has_help_and_a_variable_of_its_own() -> None:
    assert len({key.variable for key in KEYS.values()}) == len(KEYS)
    assert all(key.what.endswith(".") or key.what.endswith("4G.") for key in KEYS.values())
    assert tomllib.loads("\n".join(f"{name} = 1" for name in KEYS))  # bare keys of TOML
