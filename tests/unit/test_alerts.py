"""Rules, and what they make of findings."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from manifpt.errors import ConfigError
from manifpt.monitoring.alerts import DEFAULT_RULES, SEVERITIES, Alert, Rule, alerts_of, rules_of
from manifpt.monitoring.drift import TESTS, Counts, Finding
from manifpt.monitoring.newcomers import Newcomer

NEWCOMER = Newcomer(31, 40, ("b/1.png", "b/2.png"), 0.9, "dcgan", 4.0)
NOW = {"time": "2026-01-31T12:00:00Z", "window": "00017"}


def finding(name: str, fired: bool = True, statistic: float = 0.3) -> Finding:
    return Finding(name, statistic, 0.001, 0.006, fired, "10 of 20 images against 1 of 100 before")


def names(found: list[Alert]) -> list[str]:
    return [alert.rule for alert in found]


def test_by_default_every_test_that_fires_gives_one_alert() -> None:
    found = alerts_of(DEFAULT_RULES, [finding(name) for name in TESTS], Counts({"a": 1}), [NEWCOMER], **NOW)
    assert names(found) == [rule.name for rule in DEFAULT_RULES if rule.when != "rejected_share > 0.2"]
    assert found[0].severity == "critical"
    assert "31 of 40 unknown images" in found[0].sentence
    assert found[0].measured["newcomers"][0]["examples"] == ("b/1.png", "b/2.png")


def test_by_default_a_window_in_which_nothing_fired_gives_no_alert_but_a_first_one_that_is_rejected() -> None:
    """A first window has nothing to rise from, and what it holds is what later ones are compared with."""
    quiet = [finding(name, fired=False) for name in TESTS]
    assert (
        alerts_of(DEFAULT_RULES, quiet, Counts({}, unknown=800, rejected=200), [NEWCOMER], **NOW, is_first=True) == []
    )
    for findings in (quiet, []):
        counts = Counts({}, unknown=100, rejected=900)
        assert names(alerts_of(DEFAULT_RULES, findings, counts, [NEWCOMER], **NOW, is_first=True)) == ["many-rejected"]
        assert alerts_of(DEFAULT_RULES, findings, counts, [NEWCOMER], **NOW) == []


@pytest.mark.parametrize("test", TESTS)
def test_a_cluster_is_a_newcomer_only_where_unknown_images_or_features_say_so_too(test: str) -> None:
    rules = (Rule("new", "newcomer", "critical"),)
    assert bool(alerts_of(rules, [finding(test)], Counts(), [NEWCOMER], **NOW)) == (
        test in {"unknown", "features", "spectrum"}
    )
    assert not alerts_of(rules, [finding(test)], Counts(), [], **NOW)


def test_a_test_that_fired_by_a_change_too_small_to_matter_gives_no_alert() -> None:
    (rule,) = rules_of([{"name": "mix", "when": "shares", "severity": "info", "at_least": 0.25}])
    assert names(alerts_of([rule], [finding("shares", statistic=0.25)], Counts(), [], **NOW)) == ["mix"]
    assert not alerts_of([rule], [finding("shares", statistic=0.24)], Counts(), [], **NOW)


def test_limits_compare_shares_of_the_images_that_they_are_of() -> None:
    counts = Counts({"a": 60}, unknown=20, inconclusive=20, rejected=100)
    limits = {"unknown_share > 0.2": False, "unknown_share >= 0.2": True, "inconclusive_share>0.19": True,
              "rejected_share >= 0.5": True, "rejected_share > .5": False}  # fmt: skip
    for when, holds in limits.items():
        (rule,) = rules_of([{"name": "limit", "when": when, "severity": "warning"}])
        found = alerts_of([rule], [], counts, [], **NOW)
        assert bool(found) == holds, when
        if found and "unknown" in when:
            assert found[0].sentence == "20 of 100 images are unknown: 20.0%, where 20.0% is the limit."
            assert found[0].measured == {"share": 0.2, "images": 20, "of": 100}
        assert not alerts_of([rule], [], Counts(), [], **NOW), "no images have no share"


def test_an_alert_is_one_line_of_json() -> None:
    (alert,) = alerts_of((Rule("n", "norms", "info"),), [finding("norms")], Counts(), [], **NOW)
    line = alert.line()
    assert line.endswith("\n") and line.count("\n") == 1
    told = json.loads(line)
    assert (told["time"], told["window"], told["rule"], told["severity"]) == (*NOW.values(), "n", "info")
    assert told["measured"]["adjusted"] == 0.006
    assert told["sentence"] == (
        "Artifact norms differ from the baseline's (Kolmogorov-Smirnov 0.300): p = 0.006 over all tests."
    )
    assert Alert(**told) == alert


def test_rules_are_read_as_they_are_written() -> None:
    assert rules_of(None) == DEFAULT_RULES
    assert rules_of([]) == ()
    written = [{"name": "a-1", "when": "unknown_share  >  0.2", "severity": "critical"}]
    assert rules_of(written) == (Rule("a-1", "unknown_share > 0.2", "critical"),)


GOOD: dict[str, Any] = {"name": "a", "when": "norms", "severity": "info"}


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ("norms", "must be a list"),
        ({"name": "a"}, "must be a list"),
        (["norms"], "has name, when and severity"),
        ([{"name": "a", "when": "norms"}], "has name, when and severity"),
        ([{**GOOD, "name": "No Good"}], "can't name a rule"),
        ([{**GOOD, "name": 7}], "can't name a rule"),
        ([{**GOOD, "severity": "loud"}], "info, warning, critical"),
        ([{**GOOD, "severity": ["info"]}], "info, warning, critical"),
        ([{**GOOD, "when": "norm"}], "is no condition"),
        ([{**GOOD, "when": ["norms"]}], "is no condition"),
        ([{**GOOD, "when": {"norms": 1}}], "is no condition"),
        ([{**GOOD, "when": "unknown_share < 0.2"}], "is no condition"),
        ([{**GOOD, "when": "unknown_share > 1"}], "between 0 and 1"),
        ([{**GOOD, "when": "unknown_share > 0.2.1"}], "between 0 and 1"),
        ([{**GOOD, "at_least": 0}], "above 0"),
        ([{**GOOD, "at_least": float("nan")}], "above 0"),
        ([{**GOOD, "at_least": True}], "above 0"),
        ([{**GOOD, "at_least": "big"}], "above 0"),
        ([{**GOOD, "when": "newcomer", "at_least": 1}], "for a test"),
        ([{**GOOD, "limit": 1}], "unknown name 'limit'"),
        ([GOOD, GOOD], "two rules are named 'a'"),
    ],
)
def test_nonsense_is_refused_and_says_why(section: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        rules_of(section)


_JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=8) | st.sampled_from([*GOOD, *TESTS, *SEVERITIES]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*GOOD, "at_least", "x"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(_JSON)
def test_any_yaml_is_rules_or_a_configuration_error(section: Any) -> None:
    try:
        rules = rules_of(section)
    except ConfigError:
        return
    assert all(rule.severity in SEVERITIES for rule in rules)
    assert np.all([isinstance(rule, Rule) for rule in rules])
