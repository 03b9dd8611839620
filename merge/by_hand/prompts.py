"""What prompts of a registered merge by hand stand in: what its experts' did, where the sources say so, else the base's
own chat template. Files and folders do not say; artifacts of the pipeline and registered versions do."""

from __future__ import annotations

from collections.abc import Mapping

from infra.errors import BaseModelError, ConfigError
from infra.registry.models import registered_as
from infra.registry.versions import find_version, told
from merge.by_hand.sources import Place
from workers.base.load import load_tokenizer, stop_ids
from workers.base.prepare import PreparedBase
from workers.text.wrapper import own_wrapper


def find_wrapper(places: Mapping[str, Place], base: PreparedBase) -> str:
    """The wrapper of a merge of these experts, by name.

    Raises ConfigError where experts differ, or where none says and the base's template cannot be asked; BaseModelError
    for a base without a tokenizer that texts can be answered with; RegistryError.
    """
    owners: dict[str, str] = {}
    for name, place in places.items():
        if wrapper := _said(place):
            owners.setdefault(wrapper, name)
    if len(owners) > 1:
        (one, first), (other, second) = [(name, wrapper) for wrapper, name in owners.items()][:2]
        raise ConfigError(
            f"--register: a merge is asked in one way, but prompts of expert {one!r} stand in {first!r}, of {other!r} "
            f"in {second!r}; leave out --register, or merge experts that share their prompt.wrapper"
        )
    return next(iter(owners), None) or _own(base)


def _own(base: PreparedBase) -> str:
    try:
        tokenizer = load_tokenizer(base.path)
        return own_wrapper(tokenizer, stop_ids(base.path, tokenizer))
    except (BaseModelError, ConfigError) as error:
        reason = str(error).replace(str(base.path), base.name)
        raise type(error)(f"--register: no expert says what its prompts stand in, and {reason}") from error


def _said(place: Place) -> str:
    """What the prompts of one expert stand in, "" where its source does not say."""
    manifest = place.manifest
    prompt = manifest.config.get("prompt") if manifest else None
    if isinstance(prompt, dict) and prompt.get("wrapper"):
        return str(prompt["wrapper"])
    version = place.lineage or (registered_as(manifest.key, manifest.digest) if manifest else None)
    if version is None:
        return ""
    name, _, number = version.removeprefix("models:/").rpartition("/")
    found = find_version(name, int(number))
    return str(told(found.source).get("prompt_wrapper", "")) if found else ""
