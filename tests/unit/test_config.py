from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from manifpt.config import (
    ArtifactsConfig,
    IndexConfig,
    ReferenceConfig,
    ScanConfig,
    parse,
    rejection_budget,
    run_command,
)
from manifpt.errors import ConfigError, PlanMismatch, StorageError, TooManyRejected

File = Callable[[str], str]


@pytest.fixture
def file(tmp_path: Path) -> File:
    def written(text: str) -> str:
        (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
        return str(tmp_path / "config.yaml")

    return written


class TestFlags:
    def test_index(self) -> None:
        config = parse(
            IndexConfig,
            ["--input", "a", "s3://b/c", "--output", "m.parquet", "--source-column", "gm", "--keep-columns", "x", "y"],
            "x",
        )
        assert config.input == ("a", "s3://b/c")
        assert config.keep_columns == ("x", "y")
        assert (config.output, config.source_column, config.source) == ("m.parquet", "gm", None)

    def test_defaults(self) -> None:
        assert parse(ArtifactsConfig, [], "x") == ArtifactsConfig()
        assert parse(ReferenceConfig, ["--manifest", "m", "--output", "o"], "x").spaces == ("rgb", "frequency")

    def test_dry_run_needs_no_value(self) -> None:
        assert parse(ArtifactsConfig, ["--dry-run"], "x").dry_run is True
        assert parse(ArtifactsConfig, ["--dry-run", "--manifest", "m"], "x").manifest == "m"
        assert parse(ArtifactsConfig, ["--no-dry-run"], "x").dry_run is False
        assert parse(ArtifactsConfig, [], "x").dry_run is False

    @pytest.mark.parametrize(
        "arguments",
        [
            [],
            ["--input", "a"],
            ["--output", "m"],
            ["--input", "--output", "m", "--nonsense"],
            ["--input", "a", "--output", "m", "--nonsense", "1"],
            ["--input", "a", "--output", "m", "extra"],
            ["--config"],
        ],
    )
    def test_what_does_not_fit_is_exit_code_2(self, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as caught:
            parse(IndexConfig, arguments, "x")
        assert caught.value.code == 2
        printed = capsys.readouterr()
        assert printed.out + printed.err

    @pytest.mark.parametrize("arguments", [["--store", "bogus"], ["--shard-rows", "many"], ["--own-spaces", "x"]])
    def test_values_of_the_wrong_kind(self, arguments: list[str]) -> None:
        with pytest.raises(SystemExit) as caught:
            parse(ArtifactsConfig, arguments, "x")
        assert caught.value.code == 2

    def test_help(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as caught:
            parse(ArtifactsConfig, ["--help"], "compute_artifacts.py")
        assert caught.value.code == 0
        text = capsys.readouterr().out
        for word in ("--manifest", "--dry-run", "--max-rejected", "--config", "compute_artifacts.py"):
            assert word in text
        assert "own-spaces" not in text


class TestFile:
    def test_sets_the_same_names(self, file: File) -> None:
        path = file("input: [a, b]\noutput: m.parquet\nkeep_columns: [x]\nsource: null\n")
        assert parse(IndexConfig, ["--config", path], "x") == IndexConfig(
            input=("a", "b"), output="m.parquet", keep_columns=("x",)
        )

    def test_flags_win(self, file: File) -> None:
        path = file("input: [a, b]\noutput: m.parquet\nsource: real\n")
        config = parse(IndexConfig, ["--input", "c", f"--config={path}", "--source", "dcgan"], "x")
        assert (config.input, config.output, config.source) == (("c",), "m.parquet", "dcgan")

    def test_flags_win_over_a_switch_that_is_on(self, file: File) -> None:
        path = file("dry_run: true\n")
        assert parse(ArtifactsConfig, ["--config", path], "x").dry_run is True
        assert parse(ArtifactsConfig, ["--config", path, "--dry-run"], "x").dry_run is True
        assert parse(ArtifactsConfig, ["--config", path, "--no-dry-run"], "x").dry_run is False

    def test_flags_complete_it(self, file: File) -> None:
        path = file("input: [a]\n")
        assert parse(IndexConfig, ["--config", path, "--output", "m"], "x").output == "m"
        with pytest.raises(SystemExit) as caught:
            parse(IndexConfig, ["--config", path], "x")
        assert caught.value.code == 2

    def test_a_number_needs_no_point(self, file: File) -> None:
        found = parse(ArtifactsConfig, ["--config", file("sigma: 1\nridge: 2\n")], "x")
        assert (found.sigma, found.ridge) == (1.0, 2.0)
        assert type(found.sigma) is type(found.ridge) is float, "1 and 1.0 must be one plan"
        assert parse(ArtifactsConfig, ["--config", file("sigma: null\n"), "--sigma", "1"], "x").sigma == 1.0

    def test_own_spaces(self, file: File) -> None:
        path = file("own_spaces:\n  lite:\n    kind: network\n    size_px: 224\n")
        config = parse(ArtifactsConfig, ["--config", path, "--spaces", "lite"], "x")
        assert config.own_spaces == {"lite": {"kind": "network", "size_px": 224}}
        assert config.spaces == ("lite",)

    def test_empty(self, file: File) -> None:
        assert parse(ArtifactsConfig, ["--config", file("# nothing\n")], "x") == ArtifactsConfig()

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("manifst: x", "manifst"),
            ("dry-run: true", "dry-run"),
            ("manifest: 3", "quotes"),
            ("manifest: [a]", "manifest"),
            ("max_rejected: 5", "quotes"),
            ("spaces: rgb", "spaces"),
            ("spaces: [1]", "spaces"),
            ("shard_rows: '8'", "shard_rows"),
            ("shard_rows: 1.5", "shard_rows"),
            ("shard_rows: true", "shard_rows"),
            ("sigma: true", "sigma"),
            ("sigma: '1'", "sigma"),
            ("estimate: closest", "estimate"),
            ("dry_run: 1", "dry_run"),
            ("dry_run: null", "dry_run"),
            ("store: bogus", "store"),
            ("store: null", "store"),
            ("own_spaces: [a]", "own_spaces"),
            ("own_spaces: {a: 1}", "own_spaces"),
            ("- a\n- b", "names and values"),
            ("a: [", "YAML"),
            ("!!python/object/apply:os.getcwd []", "YAML"),
        ],
    )
    def test_says_what_is_wrong(self, file: File, text: str, says: str) -> None:
        with pytest.raises(ConfigError) as caught:
            parse(ArtifactsConfig, ["--config", file(text)], "x")
        assert says in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_a_misplaced_webhook_is_not_told(self, file: File) -> None:
        """Its URL is a secret, and what is told goes to the job's log."""
        with pytest.raises(ConfigError, match="alerts can't be what it is") as caught:
            parse(ScanConfig, ["--config", file("alerts: https://hooks.example.com/services/SECRET")], "x")
        assert "hooks" not in str(caught.value)

    def test_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="No such file"):
            parse(ArtifactsConfig, ["--config", str(tmp_path / "none.yaml")], "x")
        with pytest.raises(ConfigError, match="directory"):
            parse(ArtifactsConfig, ["--config", str(tmp_path)], "x")


class TestRejectionBudget:
    @pytest.mark.parametrize(
        ("text", "images", "budget"),
        [
            ("", 0, 10),
            ("", 999, 10),
            ("", 1_100, 11),
            ("", 1_000_000, 10_000),
            ("0", 50, 0),
            ("7", 50, 7),
            ("0%", 50, 0),
            ("5%", 50, 2),
            ("0.5%", 1_000, 5),
            ("100%", 50, 50),
            ("29%", 100, 29),
        ],
    )
    def test_numbers_and_percentages(self, text: str, images: int, budget: int) -> None:
        assert rejection_budget(text, images) == budget

    @pytest.mark.parametrize("text", ["many", "%", "1.5", "5 %%", "nan%", "inf%", "-1", "-5%", "1e400%"])
    def test_nonsense(self, text: str) -> None:
        with pytest.raises(ConfigError, match="--max-rejected"):
            rejection_budget(text, 100)


class TestExitCodes:
    @pytest.mark.parametrize(
        ("error", "code"),
        [
            (None, 0),
            (StorageError("slow"), 1),
            (OSError(28, "No space left on device"), 1),
            (PermissionError("s3://bucket/plan.json: access denied"), 2),
            (PermissionError(13, "Permission denied"), 2),
            (ConfigError("what to do"), 2),
            (PlanMismatch("another plan"), 2),
            (TooManyRejected("12 of 20"), 3),
        ],
    )
    def test_of_every_outcome(self, error: Exception | None, code: int, capsys: pytest.CaptureFixture[str]) -> None:
        def command() -> None:
            if error:
                raise error

        assert run_command(command) == code
        text = capsys.readouterr().err
        assert ("error: " in text) is (error is not None)
        assert "Traceback" not in text

    @pytest.mark.parametrize("error", [ZeroDivisionError(), OSError("Arrow says: damaged")])
    def test_bugs_keep_their_traceback(self, error: Exception) -> None:
        def command() -> None:
            raise error

        with pytest.raises(type(error)):
            run_command(command)
