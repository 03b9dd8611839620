"""The table of measurements."""

from workers.measuring.fisher import FISHER
from workers.measuring.gram import GRAM, GRAM_ANSWERS, GRAM_TOKENS
from workers.measuring.measurement import Measurement

MEASUREMENTS: dict[str, Measurement] = {each.name: each for each in (FISHER, GRAM, GRAM_TOKENS, GRAM_ANSWERS)}
"""All measurements of an expert by name."""
