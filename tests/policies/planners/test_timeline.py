"""Lines of time: what was carried out where, what was refused, and a page that escapes what it shows."""

import json

import pytest

from brachium.__main__ import main
from brachium.policies.planners.timeline import WIDTH, timeline, write_planner_report

EVENTS = [
    {"step": 0, "event": "instruction", "text": "work"},
    {
        "step": 0,
        "event": "proposal",
        "candidates": [
            {"text": "fly", "violations": ["unknown_skill: no"]},
            {"text": "open the drawer", "violations": []},
        ],
    },
    {"step": 0, "event": "begin", "text": "open the drawer"},
    {"step": 25, "event": "end", "text": "open the drawer", "outcome": "success"},
    {"step": 25, "event": "begin", "text": "close the drawer"},
    {"step": 50, "event": "end", "text": "close the drawer", "outcome": "timeout"},
    {"step": 75, "event": "verdict", "accepted": False, "looks": 3},
    {"step": 80, "event": "begin", "text": "close the drawer"},
    {"step": 100, "event": "ended", "text": "done"},
]


def test_bars_are_as_long_as_their_subgoals():
    bars, marks = timeline(EVENTS, 100)
    assert [(b.x, b.text, b.outcome) for b in bars] == [
        (0.0, "open the drawer", "success"),
        (0.25 * WIDTH, "close the drawer", "timeout"),
        (0.8 * WIDTH, "close the drawer", "unfinished"),
    ]
    assert bars[0].width == pytest.approx(0.25 * WIDTH, abs=3)
    assert bars[2].width == pytest.approx(0.2 * WIDTH, abs=3)
    assert [(m.x, m.kind) for m in marks] == [(0.0, "refused"), (0.75 * WIDTH, "refused"), (WIDTH, "ended")]
    assert timeline([], 0) == ([], [])


def test_an_evaluation_writes_its_report(tmp_path):
    assert main(["eval", "planner=default", "episodes=6", f"out={tmp_path}"]) == 0
    page = (tmp_path / "report.html").read_text()
    rows = [json.loads(line) for line in (tmp_path / "episodes.jsonl").read_text().splitlines()]
    assert page.count("<article") == 6
    for row in rows:
        assert f"seed {row['seed']}" in page
    begun = sum(event["event"] == "begin" for row in rows for event in row["events"])
    assert page.count('height="26"') == begun


def test_names_are_escaped(tmp_path):
    part = {"episodes": 1, "success_rate": 0.0, "ci95": [0.0, 0.8], "success": 0}
    told = {"episodes": 1, "success": part, "ever": part, "premature": part, "goal_share": 0.0}
    told |= {"skills_to_optimum": None, "refused_per_episode": 1.0}
    row = {"success": False, "seed": 1, "family": "x", "ended": "done", "why": "", "steps": 100, "skills": 2}
    row |= {"optimum": None, "instruction": "<script>alert(1)</script>", "events": EVENTS}
    summary = {"planner": "<b>", "termination": "two_key", "total": told, "splits": {}, "families": {}}
    page = write_planner_report(tmp_path, summary, [row]).read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
