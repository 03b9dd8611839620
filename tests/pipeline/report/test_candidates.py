"""Merge candidates in words."""

from merge.methods.specs import Candidate
from pipeline.report.candidates import parameters_text
from tests.pipeline.report.given import changed


def test_of_a_step_on_matrices_people_see_what_differs() -> None:
    plain = Candidate("spectral_power", {"p": -1, "lambda": 1.2})
    assert parameters_text(changed(chosen=plain.to_dict()).chosen) == "p -1, lambda 1.2"
    assert str(Candidate("iso_c", {"density": 0.5})) == "iso_c(lambda=0.45, density=0.5)"
