"""From a scan's settings to the plan that all its windows share. Nothing is written here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from manifpt.alterations import MILD
from manifpt.config import ScanConfig
from manifpt.decode import DECODER
from manifpt.errors import ConfigError
from manifpt.estimates import Estimate
from manifpt.monitoring.alerts import Rule, rules_of
from manifpt.monitoring.drift import check_level
from manifpt.monitoring.webhook import Webhook, webhook_of
from manifpt.plan import Plan, auto_shard_rows
from manifpt.reference import open_bundle
from manifpt.spaces.weights import resolve_weights
from manifpt.storage import normalize

__all__ = ["Settings", "read_settings"]


@dataclass(frozen=True, slots=True)
class Settings:
    """What a scan does.

    Attributes:
        inputs: folders and prefixes.
        output: its folder.
        template: the plan of every window, without images.
        rules, webhook: of its alerts.
        level: of its tests, a window.
    """

    inputs: tuple[str, ...]
    output: str
    template: Plan
    rules: tuple[Rule, ...]
    webhook: Webhook | None
    level: float

    def facts(self) -> dict[str, Any]:
        """What must be the same whenever this folder is scanned into."""
        template = self.template
        return {
            "inputs": list(self.inputs),
            "attributor_digest": template.attributor_digest,
            "reference_digest": template.reference_digest,
            "spaces": [spec.identity() for spec in template.spaces],
            "estimate": template.estimate.identity(),
            "decoder": template.decoder,
            "variants": list(template.variants),
        }


def read_settings(config: ScanConfig) -> Settings:
    """Settings that fit together.

    Raises:
        ConfigError: what is missing, or doesn't.
    """
    from manifpt.attributor.bundle import Attributor  # torch costs seconds

    inputs, output = tuple(sorted({normalize(uri) for uri in config.input})), normalize(config.output)
    if not inputs:
        raise ConfigError("Name what to scan with --input.")
    for uri in inputs:
        inside, outside = output.rstrip("/") + "/", uri.rstrip("/") + "/"
        if inside.startswith(outside) or outside.startswith(inside):
            raise ConfigError(
                f"--output {output} and --input {uri} lie in each other: a scan would find its own files."
            )
    check_level(config.drift_level)
    section = dict(config.alerts)
    for name in section:
        if name not in ("rules", "webhook"):
            raise ConfigError(f"alerts: unknown name {name!r}; known: rules, webhook.")
    attributor = Attributor.load(config.attributor)
    template = _template(config, attributor.config, normalize(config.attributor), attributor.digest)
    return Settings(
        inputs=inputs,
        output=output,
        template=template,
        rules=rules_of(section.get("rules")),
        webhook=webhook_of(section.get("webhook")),
        level=config.drift_level,
    )


def _template(config: ScanConfig, trained: Mapping[str, Any], uri: str, digest: str) -> Plan:
    bundle = open_bundle(normalize(config.reference))
    if bundle.digest != trained["reference_digest"]:
        raise ConfigError(
            f"The attributor {uri} was trained on artifacts of another reference than {bundle.uri}: name the one with "
            f"digest {trained['reference_digest'][:16]}."
        )
    spec = next((spec for spec in bundle.spaces.values() if spec.identity() == trained["space"]), None)
    if spec is None:
        raise ConfigError(
            f"The reference {bundle.uri} has no space like the attributor's, {trained['space']['name']!r}."
        )
    spec = resolve_weights(spec)
    view = spec.view
    view_bytes = 3 * (view.height_px or 0) * (view.width_px or 0)
    return Plan(
        task="attributions",
        manifest_uri="",
        manifest_digest="",
        rows=0,
        shard_rows=auto_shard_rows(view_bytes * (1 + len(MILD))),
        spaces=(spec,),
        reference_uri=bundle.uri,
        reference_digest=bundle.digest,
        dtype="float32",  # nothing of it is stored
        inline=(spec.name,),
        decoder=DECODER,
        estimate=_estimate(config, Estimate.from_json(trained["estimate"]), bundle.digest),
        attributor_uri=uri,
        attributor_digest=digest,
        variants=MILD,
    )


def _estimate(config: ScanConfig, estimate: Estimate, reference_digest: str) -> Estimate:
    """The attributor's, with where its denoiser lies, which no bundle says."""
    if (estimate.name == "denoiser") != (config.denoiser is not None):
        has = "needs --denoiser" if config.denoiser is None else "knows no --denoiser"
        raise ConfigError(f"The attributor's estimate of the projection is {estimate.name}, which {has}.")
    if config.denoiser is None:
        return estimate
    from manifpt.estimates.denoiser import check_reference, denoiser_digest

    weights = normalize(config.denoiser)
    check_reference(weights, reference_digest)
    if denoiser_digest(weights) != estimate.weights_sha256:
        raise ConfigError(f"{weights} is not the denoiser whose artifacts the attributor was trained on.")
    return replace(estimate, weights=weights)
