"""Errors whose message is meant for the person who runs the factory.

Each message says what was found, where, and what is accepted or what to do. Anything else that is raised is a bug.
"""


class FactoryError(Exception):
    """Base class: something the user can correct. The entrypoint prints the message without a traceback."""


class ConfigError(FactoryError):
    """A configuration file, field or override is wrong."""


class DataError(FactoryError):
    """A task's source is missing, malformed or too small."""


class BaseModelError(FactoryError):
    """The base model cannot be found, fails its checksum, or is not what an artifact was made for."""


class TensorFileError(FactoryError):
    """A safetensors file, or a checkpoint of several, is missing, damaged, or not what it claims to be."""


class AdapterError(FactoryError):
    """An adapter file is corrupted, hostile, or made for another base."""


class StoreError(FactoryError):
    """The object store is unreachable, refuses the credentials, or holds corrupted bytes."""


class RegistryError(FactoryError):
    """The MLflow server is unreachable, refuses the credentials, or holds a conflicting entry."""


class MergeError(FactoryError):
    """Experts cannot be merged as asked: other bases, shapes, methods or parameters."""


class ExpertError(FactoryError):
    """An expert's training failed; the message names the expert and the cause."""
