"""Registering a merge by hand in MLflow, with what it was made of."""

from __future__ import annotations

import hashlib
from dataclasses import replace

from infra.artifacts.manifests import canonical_json
from infra.errors import ConfigError
from infra.registry import runs
from infra.registry.aliases import promote
from infra.registry.lineage import Ancestor, Lineage
from infra.registry.models import RegisteredAdapter, register, registered_as, reuse, split_place
from infra.registry.versions import champion
from infra.store.s3 import Store
from merge.by_hand.checks import REGISTERED_KIND, Checked, record_of
from merge.by_hand.inputs import Expert, source_sha256
from merge.by_hand.outputs import recipe_key
from workers.base.prepare import upload_base
from workers.text.prompt import DEFAULT_TARGET_TOKENS


def register_merge(checked: Checked) -> str:
    """Register the merged adapter of a finished merge, once, and make it champion: no gate compares merges by hand.

    Returns a line that says which version it is. The base goes into the adapter's store, where loading the model looks
    for it. Raises RegistryError or StoreError.
    """
    name, out = checked.request.register_as, checked.out
    if not name or out is None or out.store is None:
        raise ConfigError("--register needs a name, and the adapter in S3 (--out s3://…)")
    bucket, prefix, _ = split_place(out.uri)
    store = Store(bucket, out.store.endpoint, prefix)
    upload_base(store, checked.base)
    model = _model(checked, name, out.uri, source_sha256(out.source()))
    known = reuse(model)
    if known is not None:
        if champion(name) is None:
            promote(store, name, known, "registered by hand")
        return _line(checked, known, made=False)
    candidate = checked.candidate
    run_id = runs.start_run(name, f"{name}-{candidate.method}", {"kind": "merge by hand"}, candidate.params)
    status = "FAILED"
    try:
        version, made = register(replace(model, run_id=run_id))
        promote(store, name, version, "registered by hand")
        status = "FINISHED"
    finally:
        runs.finish_run(run_id, status)
    return _line(checked, version, made)


def _line(checked: Checked, version: int, made: bool) -> str:
    which = f"models:/{checked.request.register_as}/{version}" + ("" if made else " (it was already)")
    return f"registered as {which}; prompts stand in {checked.wrapper!r}"


def _model(checked: Checked, name: str, uri: str, sha256: str) -> RegisteredAdapter:
    candidate, base, key = checked.candidate, checked.base, recipe_key(record_of(checked))
    weights = {} if candidate.weights is None else {"weights": dict(candidate.weights)}
    return RegisteredAdapter(
        name=name,
        task=name,
        key=key,
        digest=_digest(sha256),
        adapter_uri=uri,
        adapter_sha256=sha256,
        base_sha256=base.sha256,
        base_name=base.name,
        prompt_wrapper=checked.wrapper,
        prompt_template="{input}",
        max_new_tokens=DEFAULT_TARGET_TOKENS,
        dtype="float32",
        run_id="",
        description=f"Merge by hand of {len(checked.experts)} experts on {base.name}.",
        tags={"kind": REGISTERED_KIND},
        lineage=Lineage(
            method=candidate.method,
            parameters={**candidate.params, **weights},
            key=key,
            experts=tuple(_ancestor(expert) for expert in checked.experts),
        ),
    )


def _ancestor(expert: Expert) -> Ancestor:
    """An expert as an artifact: a stored one under its own key and digest, any other under those of its bytes."""
    manifest, version = expert.place.manifest, expert.place.lineage
    if manifest is None:
        return Ancestor(expert.name, expert.given_recipe.key, _digest(expert.sha256), version)
    version = version or registered_as(manifest.key, manifest.digest)
    return Ancestor(expert.name, manifest.key, manifest.digest, version)


def _digest(sha256: str) -> str:
    """As a manifest gives it for one file."""
    return hashlib.sha256(canonical_json({"adapter": sha256})).hexdigest()
