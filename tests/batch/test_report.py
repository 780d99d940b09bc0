"""What the report of a batch job counts, and that nothing in it is read as markup."""

from array import array
from collections import Counter

from nanovllm.batch.report import Outcome, Rows, Speed, make_page


def test_rows_that_failed_are_counted_apart_and_are_no_markup() -> None:
    rows, speed = Rows(), Speed()
    for number in range(200):
        error = f"<b>row {number}</b>" if number % 2 else None
        counts = (0, 0, []) if error else (number, 3, ["stop"])
        outcome = Outcome(*counts, error)
        rows.add(number, outcome)
        speed.add(outcome)
    page = make_page("in.jsonl → <out>", rows, speed, 2.0, {"share_of_floor": 0.5, "floor_seconds": 1.0})
    assert "<td>200, 200 of them in this run" in page and "<th>failed<td>100" in page
    assert "9,900 of prompts, 300 of output" in page and "stop 100" in page and "150 output" in page and "50 %" in page
    assert "&lt;b&gt;row 1&lt;/b&gt;" in page and "<b>" not in page and "&lt;out&gt;" in page
    assert "the first 50:" in page and page.count("<svg") == 3 and "http" not in page


def test_a_job_without_an_answer_or_without_anything_new_has_a_report() -> None:
    failed = Rows()
    failed.add(0, Outcome(0, 0, [], "no"))
    assert "<svg" not in make_page("a", failed, Speed(), 1.0, None)
    old = Rows(array("I", [10**6]), array("I", [0]), Counter({"stop": 1}))
    page = make_page("a", old, Speed(), 1.0, None)
    assert "0 of them in this run" in page and "this run<td>" not in page


def test_results_of_both_kinds_of_rows_are_read() -> None:
    table = {"finish_reason": "stop", "num_prompt_tokens": 4, "num_generated_tokens": 2, "error": None}
    assert Outcome.of(table) == (4, 2, ["stop"], None)
    nothing = dict.fromkeys(table)
    assert Outcome.of({**nothing, "error": "why"}) == (0, 0, [], "why")
    body = {"usage": {"prompt_tokens": 4, "completion_tokens": 2}, "choices": [{"finish_reason": "length"}]}
    assert Outcome.of({"response": {"status_code": 200, "body": body}, "error": None}) == (4, 2, ["length"], None)
    refused = {"status_code": 400, "body": {"error": {"message": "bad"}}}
    assert Outcome.of({"response": refused, "error": None}) == (0, 0, [], "bad")
    assert Outcome.of({"response": None, "error": {"message": "no line"}}) == (0, 0, [], "no line")
