"""Fuzzing of everything that reads what others have written: images, manifests, runs, bundles.

A target says what a reader may answer to bytes, and how to damage good ones so that the damage gets past checksums:

    decode      pixels, or a `BadImage`
    manifest    manifests, and Parquet and tar files that are indexed: rows, or a `ConfigError`
    commit      `plan.json`, commits and parts of a run folder: the same
    bundle      references, attributors, encoders and denoisers: the same

Whatever else comes, and more time or memory than `tests.fuzz.limits` allows, is a finding. `python -m tests.fuzz` looks
for findings under coverage; `tests/unit/test_fuzz.py` looks a few seconds long at what `make test` can afford.
"""
