"""From what was found in a window to alerts, by rules of the config.

alerts:
  rules:
    - {name: new-generator, when: newcomer, severity: critical}
    - {name: other-sources, when: shares, at_least: 0.25, severity: info}
    - {name: mostly-unknown, when: unknown_share > 0.2, severity: warning}
  webhook: {url_env: ALERT_URL}
"""

from __future__ import annotations

import json
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from manifpt.errors import ConfigError
from manifpt.monitoring.drift import TESTS, Counts, Finding
from manifpt.monitoring.newcomers import Newcomer

__all__ = ["DEFAULT_RULES", "SEVERITIES", "Alert", "Rule", "alerts_of", "rules_of"]

SEVERITIES = ("info", "warning", "critical")

_SHARES: dict[str, Callable[[Counts], tuple[int, int]]] = {
    "unknown_share": lambda counts: (counts.unknown, counts.judged),
    "inconclusive_share": lambda counts: (counts.inconclusive, counts.judged),
    "rejected_share": lambda counts: (counts.rejected, counts.images),
}
_COMPARE: dict[str, Callable[[float, float], bool]] = {">": operator.gt, ">=": operator.ge}
_THRESHOLD = re.compile(rf"({'|'.join(_SHARES)})\s*(>=?)\s*([0-9.]+)")
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")  # a label of Prometheus, and a word in a log
_WHAT = {
    "norms": "Artifact norms differ from the baseline's (Kolmogorov-Smirnov {statistic:.3f})",
    "features": "The attributor's features differ from the baseline's (energy distance {statistic:.3g})",
    "spectrum": "The artifacts' spectra differ from the baseline's (energy distance {statistic:.3g})",
    "shares": "The shares of sources changed (population stability index {statistic:.3f})",
    "unknown": "The share of unknown images rose by {statistic:.1%}",
    "inconclusive": "The share of inconclusive images rose by {statistic:.1%}",
    "rejected": "The share of rejected images rose by {statistic:.1%}",
}


@dataclass(frozen=True, slots=True)
class Rule:
    """When to alert.

    Attributes:
        name: small letters, digits, - and _.
        when: a test of `manifpt.monitoring.drift` that fired, `newcomer`, or a share and its limit, such as
            `unknown_share > 0.2`.
        severity: one of `SEVERITIES`.
        at_least: of a test: its statistic too must be at least this. Of many images, a test finds changes that are too
            small to matter.
        is_of_first: it holds only of a window before which there was none.
    """

    name: str
    when: str
    severity: str
    at_least: float | None = None
    is_of_first: bool = False


# Shares change with what people upload, so by default only a large change says anything.
DEFAULT_RULES = (
    Rule("new-generator", "newcomer", "critical"),
    Rule("unknown-rose", "unknown", "warning"),
    Rule("norms-drift", "norms", "warning"),
    Rule("features-drift", "features", "warning"),
    Rule("spectrum-drift", "spectrum", "warning"),
    Rule("inconclusive-rose", "inconclusive", "warning"),
    Rule("rejected-rose", "rejected", "warning"),
    Rule("many-rejected", "rejected_share > 0.2", "warning", is_of_first=True),  # which has none to rise from
    Rule("sources-shifted", "shares", "info", at_least=0.1),
)


@dataclass(frozen=True, slots=True)
class Alert:
    """One rule that held for one window.

    Attributes:
        time: as given, such as 2026-01-31T12:00:00Z.
        window: its name.
        rule, severity: of the rule.
        measured: the numbers behind it.
        sentence: for a person.
    """

    time: str
    window: str
    rule: str
    severity: str
    measured: Mapping[str, Any]
    sentence: str

    def line(self) -> str:
        """A line of JSON."""
        return json.dumps(asdict(self)) + "\n"


def rules_of(section: Any) -> tuple[Rule, ...]:
    """Rules from the config's list; None: `DEFAULT_RULES`.

    Raises:
        ConfigError: what is no rule, and why.
    """
    if section is None:
        return DEFAULT_RULES
    if not isinstance(section, Sequence) or isinstance(section, str):
        raise ConfigError("alerts: rules must be a list of {name, when, severity}.")
    rules = tuple(_rule(fields) for fields in section)
    names = [rule.name for rule in rules]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"alerts: two rules are named {name!r}; rename one.")
    return rules


def alerts_of(
    rules: Sequence[Rule], findings: Sequence[Finding], counts: Counts, newcomers: Sequence[Newcomer], *, time: str,
    window: str, is_first: bool = False,
) -> list[Alert]:  # fmt: skip
    """What holds for a window, in the order of the rules, at most one alert a rule.

    `newcomer` needs a cluster, and that unknown, features or spectrum fired: so with rules on tests alone, a window
    without change alerts at most as often as the level of `drift` says. A limit, as of rejected images, asks no test.

    Args:
        rules: of `rules_of`.
        findings: of `drift`.
        counts: the window's images by verdict.
        newcomers: the window's.
        time: of the alert.
        window: its name.
        is_first: whether none before had images and gave no alert, so that nothing is known to be usual.
    """
    fired = {finding.name: finding for finding in findings if finding.fired}
    found = []
    for rule in rules:
        held = None if rule.is_of_first and not is_first else _held(rule, fired, counts, newcomers)
        if held:
            found.append(Alert(time, window, rule.name, rule.severity, *held))
    return found


def _rule(fields: Any) -> Rule:
    if not isinstance(fields, Mapping) or not {"name", "when", "severity"} <= set(fields):
        raise ConfigError(f"alerts: a rule has name, when and severity; {fields!r} has not.")
    name, when, severity, at_least = (fields.get(key) for key in ("name", "when", "severity", "at_least"))
    unknown = set(fields) - {"name", "when", "severity", "at_least"}
    if unknown:
        raise ConfigError(f"alerts: rule {name!r} has an unknown name {sorted(map(str, unknown))[0]!r}.")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(f"alerts: {name!r} can't name a rule; use small letters, digits, - and _, at most 63.")
    if severity not in SEVERITIES:
        raise ConfigError(f"alerts: rule {name}: severity is one of {', '.join(SEVERITIES)}, not {severity!r}.")
    is_test = when in (*TESTS, "newcomer")
    threshold = _THRESHOLD.fullmatch(when.strip()) if isinstance(when, str) and not is_test else None
    if not is_test and not threshold:
        raise ConfigError(
            f"alerts: rule {name}: {when!r} is no condition; use {', '.join(TESTS)}, newcomer, or a limit such as "
            f"unknown_share > 0.2 (also {', '.join(list(_SHARES)[1:])})."
        )
    if threshold and not _is_share(threshold[3]):
        raise ConfigError(f"alerts: rule {name}: a share lies between 0 and 1, so {when!r} says nothing.")
    if at_least is not None and (when not in TESTS or type(at_least) not in (int, float) or not at_least > 0):
        raise ConfigError(f"alerts: rule {name}: at_least is a number above 0, for a test; leave it out.")
    assert isinstance(when, str)
    return Rule(name, " ".join(when.split()), severity, None if at_least is None else float(at_least))


def _is_share(text: str) -> bool:
    try:
        return 0 <= float(text) < 1
    except ValueError:
        return False


def _held(
    rule: Rule, fired: Mapping[str, Finding], counts: Counts, newcomers: Sequence[Newcomer]
) -> tuple[dict[str, Any], str] | None:
    """What was measured and a sentence, where the rule holds."""
    if rule.when in TESTS:
        finding = fired.get(rule.when)
        if finding is None or finding.statistic < (rule.at_least or -math.inf):
            return None
        measured = {"statistic": finding.statistic, "p_value": finding.p_value, "adjusted": finding.adjusted}
        what = _WHAT[finding.name].format(statistic=finding.statistic)
        return measured | {"detail": finding.detail}, f"{what}: p = {finding.adjusted:.2g} over all tests."
    if rule.when == "newcomer":
        if not newcomers or not {"unknown", "features", "spectrum"} & fired.keys():
            return None
        first = newcomers[0]
        return {"newcomers": [asdict(newcomer) for newcomer in newcomers]}, (
            f"{first.images} of {first.of_unknown} unknown images look like one new generator, "
            f"nearest to {first.nearest_source}; look at the examples."
        )
    threshold = _THRESHOLD.fullmatch(rule.when)
    assert threshold
    part, whole = _SHARES[threshold[1]](counts)
    if not whole or not _COMPARE[threshold[2]](part / whole, float(threshold[3])):
        return None
    name = threshold[1].removesuffix("_share")
    sentence = (
        f"{part:,} of {whole:,} images are {name}: {part / whole:.1%}, where {float(threshold[3]):.1%} is the limit."
    )
    return {"share": part / whole, "images": part, "of": whole}, sentence
