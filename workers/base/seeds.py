"""Seeds of single tensors: a tensor's random numbers are a function of its name, not of the order of tensors."""

import hashlib


def tensor_seed(seed: int, tensor_name: str) -> int:
    """63-bit seed of one tensor: the head of SHA-256 of ``"<seed>:<tensor name>"``."""
    digest = hashlib.sha256(f"{seed}:{tensor_name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
