"""Figures in messages that compare: rounded to the side on which what the message says is true.

Something that needs 3.04 GiB does not need "3.0 GiB" where 3 are reserved: a figure that was measured or estimated is
rounded up as a need and down as what there is; a figure that a person gave stands as it was given.
"""

from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal


def needed(value: float) -> str:
    """One decimal, rounded up: never less than `value`."""
    return _decimal(value, ROUND_CEILING)


def there_is(value: float) -> str:
    """One decimal, rounded down: never more than `value`."""
    return _decimal(value, ROUND_FLOOR)


def given(value: float) -> str:
    """As a person would write it."""
    return f"{value:.15g}"


def _decimal(value: float, towards: str) -> str:
    return f"{Decimal(given(value)).quantize(Decimal('0.1'), rounding=towards):f}"
