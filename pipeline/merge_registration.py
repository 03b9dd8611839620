"""Registering a merge by hand in MLflow, with what it was made of. Not here: making it."""

from __future__ import annotations

import hashlib

from infra import registry
from infra.artifacts import canonical_json
from infra.errors import ConfigError
from infra.lineage import Ancestor, Lineage
from infra.model_registry import RegisteredAdapter, register
from infra.store import Store
from pipeline.config import PromptConfig
from pipeline.merge_by_hand import Checked, record_of
from pipeline.merge_inputs import source_sha256
from pipeline.merge_outputs import recipe_key
from workers.base import upload_base


def register_merge(checked: Checked) -> str:
    """Register the merged adapter of a finished merge, once; returns a line that says which version it is.

    The base goes into the adapter's bucket, where loading the model looks for it. Raises RegistryError or StoreError.
    """
    name, out, base = checked.request.register_as, checked.out, checked.base
    if not name or out is None or out.store is None:
        raise ConfigError("--register needs a name, and the adapter in S3 (--out s3://…)")
    upload_base(Store(out.store.bucket, out.store.endpoint), base)
    key, sha256 = recipe_key(record_of(checked)), source_sha256(out.source())
    candidate = checked.candidate
    weights = {} if candidate.weights is None else {"weights": dict(candidate.weights)}
    lineage = Lineage(
        method=candidate.method,
        parameters={**candidate.params, **weights},
        key=key,
        experts=tuple(Ancestor(e.name, e.identity, e.sha256, e.place.lineage) for e in checked.experts),
    )
    run_id = registry.start_run(name, f"{name}-{candidate.method}", {"kind": "merge by hand"}, candidate.params)
    status = "FAILED"
    try:
        prompt = PromptConfig()
        version, made = register(
            RegisteredAdapter(
                name=name,
                task=name,
                key=key,
                digest=hashlib.sha256(canonical_json({"adapter": sha256})).hexdigest(),
                adapter_uri=out.uri,
                adapter_sha256=sha256,
                base_sha256=base.sha256,
                base_name=base.name,
                prompt_wrapper=prompt.wrapper,
                prompt_template="{input}",
                max_new_tokens=prompt.max_target_tokens,
                dtype="float32",
                run_id=run_id,
                description=f"Merge by hand of {len(checked.experts)} experts on {base.name}.",
                tags={"kind": "merged"},
                lineage=lineage,
            )
        )
        status = "FINISHED"
    finally:
        registry.finish_run(run_id, status)
    return f"registered as models:/{name}/{version}" + ("" if made else " (it was already)")
