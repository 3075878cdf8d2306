"""What a job says at its end, on a page: the same as its summary.json, for people."""

from __future__ import annotations

from typing import Any

from manifpt.storage import join

__all__ = [
    "SAMPLE_PLAN",
    "plain",
    "say_analysis",
    "say_artifacts",
    "say_attributor",
    "say_evidence",
    "say_plan",
    "say_reference",
    "say_scan",
]


SAMPLE_PLAN = """The shipped sample: 1,497 real digits become a reference, in rgb and frequency; 2,300 images
(300 held-out reals and 500 of each of four generators) are projected onto it, in 3 shards, into runs/sample
(or --output): about 25 MB."""


def say_reference(summary: dict[str, Any], output: str) -> str:
    """After `build_reference`."""
    lines = [
        f"Reference of {summary['images_in_reference']:,} real images in {_duration(summary['seconds'])}: {output}",
        *_rejected(summary, output),
        f"  digest {summary['reference_digest'][:16]}",
    ]
    return "\n".join(lines)


def say_artifacts(summary: dict[str, Any], output: str) -> str:
    """After `compute_artifacts`."""
    rate = f", {summary['images_per_s']:,.0f} images/s" if summary["images_per_s"] else ""
    projected = summary["images"] - summary["rejected"]["images"]
    done = summary["shards"] - summary["shards_computed"]
    before = f", {done} shards were done before" if done else ""
    lines = [
        f"Projected {projected:,} images in {_duration(summary['seconds'])}{rate}{before}.",
        *_rejected(summary, output),
        "",
        f"  {'space':<16}{'source':<26}{'images':>8}{'mean |a|':>12}   in reference: left out / copies / near copies",
    ]
    for space, sources in summary["spaces"].items():
        for source, found in sources.items():
            lines.append(
                f"  {space:<16}{plain(source, 25):<26}{found['images']:>8}{found['distance_mean']:>12.3f}   "
                + " / ".join(str(found.get(name, "-")) for name in ("left_out", "copies", "near_copies"))
            )
    lines += ["", f"  shards   {join(output, 'artifacts')}", f"  summary  {join(output, 'summary.json')}"]
    lines += [f"  picture  {join(output, 'preview.png')}"]
    return "\n".join(lines)


def say_analysis(document: dict[str, Any], output: str) -> str:
    """After `analyze_fingerprints`."""
    how = f"Analysed in {_duration(document['seconds'])}" if document["analysed"] else "Was analysed before"
    lines = [f"{how}: {join(output, 'report.html')}", ""]
    for space, found in document["spaces"].items():
        apart = found["separability"]
        if apart is not None:
            lines.append(
                f"  {space:<16}nearest other artifact is of the same source: "
                f"{100 * apart['leave_one_out_accuracy']:.1f} % (chance {100 * apart['chance']:.1f} %)"
            )
        for label, row in (found["overlap"] or {}).items():
            if "precision" in row:
                lines.append(
                    f"    {plain(label, 33):<34}precision {row['precision']:.2f}  recall {row['recall']:.2f}  mean |a| "
                    f"{_norm(row['mean_artifact_norm'])}  reverse {row['mean_reverse_norm']:.2f}"
                )
    return "\n".join([*lines, "", f"  numbers  {join(output, 'report.json')}"])


def say_scan(state: dict[str, Any], output: str) -> str:
    """After `scan`."""
    if state["status"] == "skipped":
        return str(state["why"])
    windows = ", ".join(f"{number:05d}" for number in state["windows_ended"]) or "none: nothing is new"
    attributed = state["images"] - state["unknown"] - state["inconclusive"] - state["rejected"]
    lines = [
        f"Scanned in {_duration(state['seconds'])}. Windows: {windows}.",
        f"  {state['images']:,} images: {attributed:,} attributed, {state['unknown']:,} unknown, "
        f"{state['inconclusive']:,} inconclusive, {state['rejected']:,} rejected",
        *(f"  {alert['severity']}: {plain(alert['sentence'], 200)}" for alert in state["alerts"]),
        "",
        f"  rows     {join(output, 'attributions')}",
        f"  report   {join(output, 'report.html')}",
    ]
    return "\n".join(lines)


def _norm(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def say_attributor(metrics: dict[str, Any], output: str) -> str:
    """After `train_attributor`."""
    spent = _duration(metrics["training_s"])
    how = f"Trained for {metrics['epochs']} epochs in {spent}, {metrics['images_per_s']:,.0f} images/s"
    lines = [
        f"{how if metrics['trained'] else 'Was trained before'}: {output}",
        f"  accuracy {100 * metrics['accuracy']:.1f} % on {sum(metrics['test_images']):,} test images "
        f"(mean over sources {100 * metrics['balanced_accuracy']:.1f} %)"
        + ("" if metrics["fd_ratio"] is None else f", FD ratio {metrics['fd_ratio']:.2f}"),
        "",
        f"  {'source':<34}{'test images':>12}{'precision':>11}{'recall':>9}",
    ]
    for label, images, precision, recall in zip(
        metrics["labels"], metrics["test_images"], metrics["precision"], metrics["recall"], strict=True
    ):
        shown = "-" if precision is None else f"{100 * precision:.1f} %"
        lines.append(f"  {plain(label, 33):<34}{images:>12}{shown:>11}{100 * recall:>7.1f} %")
    return "\n".join([*lines, "", f"  model card  {join(output, 'README.md')}"])


def say_evidence(evidence: dict[str, Any], output: str) -> str:
    """After `explain_image`."""
    found, first = evidence["verdict"], evidence["probabilities"][0]
    nearest = evidence["nearest_reals"][0]
    lines = [
        f"Conclusive by all rules: {plain(found['source'])}" if found["conclusive"] else "Inconclusive.",
        *(f"  - {plain(reason, 300)}" for reason in found["reasons"]),
        f"  most probable label {plain(first['label'])}, {100 * first['probability']:.1f}% "
        f"({100 * evidence['attributor']['threshold']:.1f}% needed)",
        f"  |a| {evidence['artifact']['norm']:.3f}; nearest real at {nearest['distance']:.3f}: "
        f"{plain(nearest['image_id'], 60)}",
        f"  {evidence['meaning']['verdict']}",
        f"  panel     {join(output, evidence['panel']['file'])}",
        f"  evidence  {join(output, 'evidence.json')}",
    ]
    return "\n".join(lines)


def plain(text: str, most: int = 40) -> str:
    """Somebody else's text, such as a file's name: one printable line of so many characters at most."""
    line = "".join(c if c.isprintable() else "?" for c in text)
    return line if len(line) <= most else line[: most - 1] + "…"


def cell(text: str, most: int = 60) -> str:
    """The same in a table of Markdown, where it may be a heading, a picture or another row."""
    return "".join(f"\\{c}" if c in "\\`*[<|~&" else c for c in plain(text, most))


def say_plan(plan: dict[str, Any]) -> str:
    """For `--dry-run`."""
    unknown = plan["images_of_unknown_size"]
    more = f" and {unknown:,} images inside Parquet, whose size only reading tells" if unknown else ""
    lines = [
        f"{plan['images']:,} images in {plan['shards']:,} shards of {plan['images_a_shard']:,}; "
        f"{plan['shards_done']:,} shards are done.",
        f"To read: {_bytes(plan['bytes_to_read'])}{more}. Reference: {plan['reference_images']:,} images.",
        f"To write: at most {_bytes(plan['bytes_to_write_at_most'])}, before compression, to {plan['output']}",
    ]
    for name, space in plan["spaces"].items():
        lines.append(f"  {name:<16}{space['store']:<8}{_bytes(space['bytes_at_most'])}")
    return "\n".join(lines)


def _rejected(summary: dict[str, Any], output: str) -> list[str]:
    rejected = summary["rejected"]
    if not rejected["images"]:
        return []
    reasons = ", ".join(f"{count} {reason}" for reason, count in rejected["reasons"].items())
    return [f"  {rejected['images']} rejected ({reasons}): {join(output, 'rejected.parquet')}"]


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"
