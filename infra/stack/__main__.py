"""`python -m infra.stack`: the local stack."""

from infra.deferred import deferred
from infra.ending import start

if __name__ == "__main__":
    start(deferred("infra.stack.services:main"), "python -m infra.stack")
