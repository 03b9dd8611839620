"""Merge candidates in words."""

from merge.methods.specs import Candidate
from pipeline.report.candidates import candidates_csv, candidates_section, parameters_text
from pipeline.report.mlflow_page import tags
from pipeline.report.plots import draw
from pipeline.report.summary import summary_lines
from tests.pipeline.report.given import changed, results, told


def test_of_a_step_on_matrices_people_see_what_differs() -> None:
    plain = Candidate("spectral_power", {"p": -1, "lambda": 1.2})
    assert parameters_text(changed(chosen=plain.to_dict()).chosen) == "p -1, lambda 1.2"
    assert str(Candidate("iso_c", {"density": 0.5})) == "iso_c(lambda=0.45, density=0.5)"


def test_a_refined_merge_is_named_with_its_steps_and_rows_everywhere() -> None:
    plain = results()
    row = told(plain)["candidates"][1]
    refined = {"steps": 10, "rows": 200, "share": 0.0625}
    rows = [told(plain)["candidates"][0], row | {"chosen": False}, row | {"refined": refined, "rung": 3}]
    found = changed(candidates=rows, chosen={"refined": refined})
    section = "\n".join(candidates_section(found))
    assert "| ties + 10 steps | lambda 0.5, density 1, density_of support |  | 2 | 0.500 | yes |" in section
    assert "mixed evenly: + 10 steps, 200 training rows, 6% of the experts'." in section
    table = candidates_csv(found).splitlines()
    assert table[0] == "method,params,weights,rung,tasks,validation,chosen,steps,training_rows"
    assert [line.rsplit(",", 2)[1:] for line in table[1:]] == [["0", "0"], ["0", "0"], ["10", "200"]]
    assert "+ 10 steps (200 training rows, 6% of the experts')" in summary_lines(found)[0]
    assert tags(found)["chosen"].endswith(" + 10 steps")
    assert "candidates.png" in draw(found, {})
    # and nowhere else
    assert candidates_csv(plain).splitlines()[0] == "method,params,weights,rung,tasks,validation,chosen"
    assert "steps" not in "\n".join([*candidates_section(plain), *summary_lines(plain)])
    assert "refined" not in plain.to_json()
