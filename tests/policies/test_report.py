"""The report says what the files say: no number of its own, nothing from the network, no text taken for markup."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium import Env, spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from brachium.errors import NotFoundError
from brachium.policies.evaluate import evaluate
from brachium.policies.intervals import rate, wilson
from brachium.policies.report import write_report
from brachium.policies.report_data import Run, read_lines, series, things, wording
from brachium.policies.report_words import difference, percent, summary_paragraphs
from brachium.policies.vla_policy import VLAPolicy
from brachium.spec import EmbodimentSpec, FeatureSpec

HOSTILE = '</q><script>alert("x")</script> <img src=https://evil.example/x.png> & "quotes" {{ 7 * 7 }} $x_1$'
SPLITS = ("train", "paraphrase", "pair")


def group(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    counts: dict[str, Any] = rate(sum(r["success"] for r in rows), len(rows))
    return counts | {"mean_steps": round(float(np.mean([r["steps"] for r in rows])), 2) if rows else 0.0}


def summarised(rows: Sequence[Mapping[str, Any]], **more: Any) -> dict[str, Any]:
    """What the evaluation would write about `rows`."""

    def split(chosen: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        names = dict.fromkeys(r["split"] for r in chosen)
        return {s: group([r for r in chosen if r["split"] == s]) for s in names}

    tasks = {}
    for name in dict.fromkeys(r["task"] for r in rows):
        mine = [r for r in rows if r["task"] == name]
        tasks[name] = group(mine) | {"splits": split(mine)}
    known = {"checkpoint": "runs/mine/checkpoint", "head": "FlowHead", "parameters": 2_300_000, "train_seed": 3}
    known |= {"executor": "RecedingHorizon", "control": "none", "seconds": 20.0}
    known |= {"env_steps": sum(r["steps"] for r in rows), "total": group(rows), "tasks": tasks, "splits": split(rows)}
    return known | more


def episodes(task: str, wins: int, losses: Sequence[int], first: int = 0) -> list[dict[str, Any]]:
    """`wins` successes, and a failure of each of the given lengths; kinds of instruction take turns."""
    rows = []
    for i in range(wins + len(losses)):
        success = i < wins
        rows.append(
            {
                "task": task,
                "split": SPLITS[i % 3],
                "seed": first + i,
                "instruction": f"{task} the {('red', 'blue')[i % 2]} cube to the green zone",
                "success": success,
                "steps": 10 + i if success else losses[i - wins],
                "actions": [[0.0] * 7],
            }
        )
    return rows


def write(folder: Path, rows: Sequence[Mapping[str, Any]], videos: int = 0, **more: Any) -> Path:
    """An evaluation folder with `rows`; the files of the first `videos` episodes."""
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text(json.dumps(summarised(rows, **more)))
    (folder / "episodes.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    listing = []
    for i, row in enumerate(rows[:videos]):
        (folder / "videos" / f"{i}.mp4").write_bytes(b"not really a video %d" % i)
        listing.append({k: v for k, v in row.items() if k != "actions"} | {"file": f"videos/{i}.mp4"})
    (folder / "videos.json").write_text(json.dumps(listing))
    return folder


def write_training(folder: Path) -> Path:
    """A checkpoint and its logs, the last line of one torn."""
    checkpoint = folder / "mine" / "checkpoint"
    checkpoint.mkdir(parents=True)
    meta = {"versions": {"torch": "2.11.0"}, "seconds": {"ground": 100.0, "total": 400.0}}
    meta |= {"store": {"path": "data/store", "fingerprint": "abc123", "episodes": 77}}
    (checkpoint / "meta.json").write_text(json.dumps(meta))
    ground = [{"step": s, "loss": 5 / s, "lr": 1e-3} for s in (50, 100)]
    ground.append({"step": 100, "eval/front_px": 1.5, "eval/front_px_p90": 4.0, "eval/position_mm": 9.0})
    act: list[dict[str, float]] = []
    for step in (200, 400):
        act.append({"step": step, "loss": float("nan") if step == 200 else 0.2, "lr": 1e-3})
        act.append({"step": step, "eval/loss": 0.3, "eval/action_error": 0.2, "eval/mean_error": 0.4})
    (folder / "mine" / "log-ground.jsonl").write_text("".join(json.dumps(e) + "\n" for e in ground))
    (folder / "mine" / "log-act.jsonl").write_text("".join(json.dumps(e) + "\n" for e in act) + '{"step": 60')
    return checkpoint


class Page(HTMLParser):
    """What a browser sees: elements with attributes, text of tables and paragraphs, no comments."""

    VOID = frozenset({"meta", "br", "img", "path", "use", "rect"})

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text = path.read_text(encoding="utf-8")
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.results: list[list[str]] = []
        self.said: list[str] = []
        self.quotes: list[str] = []
        self.stack: list[tuple[str, dict[str, str]]] = []
        self.feed(self.text)
        self.close()
        assert not self.stack, f"not closed: {self.stack}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {k: v or "" for k, v in attrs}
        self.elements.append((tag, values))
        if tag in self.VOID:
            return
        self.stack.append((tag, values))
        if tag == "tr" and self.inside("table", "results"):
            self.results.append([])
        elif tag in ("td", "th") and self.inside("table", "results"):
            self.results[-1].append("")
        elif tag == "p" and values.get("class") == "said":
            self.said.append("")
        elif tag == "q":
            self.quotes.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {k: v or "" for k, v in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        if self.inside("td") or self.inside("th"):
            if self.inside("table", "results"):
                self.results[-1][-1] += data
        elif self.inside("p", "said"):
            self.said[-1] += data
        elif self.inside("q"):
            self.quotes[-1] += data

    def inside(self, tag: str, name: str | None = None) -> bool:
        return any(t == tag and (name is None or a.get("class") == name) for t, a in self.stack)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [a for t, a in self.elements if t == tag]


def check_self_contained(page: Page) -> None:
    """No element asks for anything outside the file."""
    for tag, attributes in page.elements:
        for key, value in attributes.items():
            if key in ("src", "href", "xlink:href", "poster", "srcset", "data", "action"):
                assert value.startswith(("data:", "#")), (tag, key, value[:80])
            if key == "style":
                assert not re.search(r"url\(\s*['\"]?(?!#)", value), (tag, value[:80])
    assert not [t for t, _ in page.elements if t in ("link", "iframe", "object", "embed", "base", "img")]
    outside = re.sub(r'"data:[^"]*"', "", page.text)
    assert not re.search(r"https?://|src=[\"']?/|@import|url\(\s*['\"]?(?!#)", outside)


def text_of(page: Page) -> str:
    return " ".join(page.said).replace("\u00a0", " ")


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Page]:
    """A report with all there can be."""
    folder = tmp_path_factory.mktemp("report")
    rows = [*episodes("push", 7, [70, 70, 31, 70]), *episodes("open_drawer", 2, [70] * 5, first=100)]
    rows[3]["instruction"] = HOSTILE
    checkpoint = write_training(folder)
    write(folder / "eval", rows, videos=9, command=["eval", "checkpoint=runs/my run/checkpoint", "seed=4"])
    extra = {"seconds": {"record": 60.0, "train": 400.0, "total": 480.0}, "demos": 88, "tasks": {"x": 1}}
    return folder, Page(write_report(folder / "eval", checkpoint, extra=extra))


def test_the_table_holds_the_numbers_of_the_summary(full: tuple[Path, Page]) -> None:
    folder, page = full
    summary = json.loads((folder / "eval" / "summary.json").read_text())
    expected = []
    for name, task in summary["tasks"].items():
        expected.append((name.replace("_", " "), "all", task))
        expected += [(name.replace("_", " "), s, g) for s, g in task["splits"].items()]
    expected.append(("all tasks", "all", summary["total"]))
    got = page.results[1:]
    assert len(got) == len(expected)
    for cells, (task_name, _, counts) in zip(got, expected):
        low, high = wilson(counts["success"], counts["episodes"])
        assert cells[0] == task_name
        assert cells[2] == f"{counts['success']}/{counts['episodes']}"
        assert cells[3].replace("\u00a0", " ") == f"{100 * counts['success'] / counts['episodes']:.0f} %"
        assert cells[4].replace("\u00a0", " ") == f"{100 * low:.0f}–{100 * high:.0f} %"
        assert cells[5] == f"{counts['mean_steps']:.1f}"


def test_every_video_is_inside_failures_first(full: tuple[Path, Page]) -> None:
    folder, page = full
    videos = page.all("video")
    prefix = "data:video/mp4;base64,"
    got = [base64.b64decode(v["src"].removeprefix(prefix)) for v in videos]
    assert sorted(got) == sorted(p.read_bytes() for p in (folder / "eval" / "videos").glob("*.mp4"))
    assert all(v.keys() >= {"muted", "loop", "playsinline"} and v["preload"] == "none" for v in videos)
    badges = [a["class"].split()[1] for a in page.all("span") if a.get("class", "").startswith("badge")]
    assert badges == ["failure"] * 2 + ["success"] * 7
    assert HOSTILE in page.quotes


def test_nothing_comes_from_outside_and_no_text_is_markup(full: tuple[Path, Page]) -> None:
    _, page = full
    hostile_escaped = page.text.replace("https://evil.example/x.png&gt;", "")
    assert "<img" not in page.text
    assert page.text.count("<script") == 1
    assert "alert(&#34;x&#34;)" in page.text
    assert "{{ 7 * 7 }}" in page.text  # a template's marks in the data are data
    page.text, original = hostile_escaped, page.text
    check_self_contained(page)
    page.text = original
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")


def test_facts_plots_and_command_are_there(full: tuple[Path, Page]) -> None:
    _, page = full
    for text in ("abc123", "RecedingHorizon", "2.11.0", ">88<", ">77<", "Time: recording", "8 min 00 s"):
        assert text in page.text, text
    assert "brachium eval &#39;checkpoint=runs/my run/checkpoint&#39; seed=4" in page.text
    for title in ("Grounding: loss", "Grounding: pixel error", "Acting: loss", "learning rate", "held-out episodes"):
        assert title in page.text, title
    assert "50\u00a0% below the mean action" in page.text
    assert len(page.all("svg")) == 1 + 5 + 2
    assert "prefers-color-scheme: dark" in page.text


def test_the_summary_in_words(full: tuple[Path, Page]) -> None:
    _, page = full
    text = text_of(page)
    assert "did what it was told in 9 of 18 episodes (50 %): its true success rate most likely lies between" in text
    assert "By task: push 7 of 11 and open drawer 2 of 7." in text
    assert "It fails most often in open drawer (5 of 9 failures)." in text
    assert "Of 9 failed episodes, 8 ran out of time and 1 ended early" in text
    assert "With 7 episodes a task" in text


@pytest.mark.parametrize(
    ("rows", "expected", "absent"),
    [
        (
            episodes("reach", 0, [40] * 6),
            ["did not do what it was told in any of 6 episodes of reach", "below 39 %"],
            [],
        ),
        (episodes("reach", 0, [40] * 6), ["All 6 failed episodes ran out of time."], ["median", "By task"]),
        (episodes("reach", 9, []), ["in all 9 episodes of reach", "above 70 %", "No episode failed."], ["ran out"]),
        (episodes("reach", 1, []), ["did what it was told in the only episode of reach"], ["(95 % interval)"]),
        (episodes("reach", 0, [40]), ["in the only episode", "does not say how failed episodes ended"], ["ran out"]),
        (episodes("reach", 25, [40] * 3), ["All 3 failed episodes ran out of time."], ["does not say"]),
        ([], ["No episode has been evaluated"], ["%"]),
    ],
)
def test_the_summary_at_the_edges(
    tmp_path: Path, rows: list[dict[str, Any]], expected: list[str], absent: list[str]
) -> None:
    page = Page(write_report(write(tmp_path, rows), None))
    text = text_of(page)
    for part in expected:
        assert part in text
    for part in absent:
        assert part not in text
    assert not page.all("video")
    assert "nan" not in re.sub(r'"data:[^"]*"', "", page.text).lower().split()
    check_self_contained(page)


@pytest.mark.parametrize(("control", "word"), [("shuffle", "listens"), ("blind", "looks"), ("other", "(other)")])
def test_a_control_is_not_called_a_result(tmp_path: Path, control: str, word: str) -> None:
    page = Page(write_report(write(tmp_path, episodes("reach", 4, [40] * 4), control=control), None))
    text = text_of(page)
    assert text.startswith("This is a control")
    assert word in text
    assert "what it was told" not in text
    assert f"control={control}" in page.text


def test_only_videos_of_these_episodes_are_shown(tmp_path: Path) -> None:
    rows = episodes("reach", 2, [40] * 2)
    write(tmp_path, rows, videos=4)
    listing = json.loads((tmp_path / "videos.json").read_text())
    listing[0]["seed"] = 99  # of an earlier run
    listing[1]["file"] = "../../secret.mp4"
    (tmp_path / "videos" / "2.mp4").unlink()
    (tmp_path / "videos.json").write_text(json.dumps([*listing, "torn", {"task": "reach"}]))
    assert len(Page(write_report(tmp_path, None)).all("video")) == 1


def test_videos_that_do_not_fit_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("brachium.policies.report.VIDEO_BYTES", 50)
    page = Page(write_report(write(tmp_path, episodes("reach", 2, [40] * 2), videos=4), None))
    assert len(page.all("video")) == 2
    assert "2 more did not fit" in page.text


def test_where_not_all_videos_fit_every_task_has_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("brachium.policies.report.VIDEO_BYTES", 50)
    rows = [*episodes("reach", 2, [40] * 2), *episodes("push", 2, [40] * 2)]
    page = Page(write_report(write(tmp_path, rows, videos=len(rows)), None))
    prefix = "data:video/mp4;base64,"
    got = [base64.b64decode(v["src"].removeprefix(prefix)) for v in page.all("video")]
    half = len(rows) // 2
    assert sorted(int(each.split()[-1]) // half for each in got) == [0, 1]
    assert str(tmp_path / "videos") in page.text


def test_damaged_logs_and_notes_do_not_stop_it(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run" / "checkpoint"
    checkpoint.mkdir(parents=True)
    (checkpoint / "meta.json").write_text('{"versions": ["odd"], "store": 3, "seconds": "long"')
    (tmp_path / "run" / "log-act.jsonl").write_bytes(b'\xff\xfe\n[1, 2]\n{"loss": 1}\n{"step": "a", "loss": 2}\n')
    page = Page(write_report(write(tmp_path / "eval", episodes("reach", 1, [40])), checkpoint))
    assert "Acting" not in page.text
    (checkpoint / "meta.json").write_text('{"versions": ["odd"], "store": 3, "seconds": "long"}')
    write_report(tmp_path / "eval", checkpoint)
    with pytest.raises(NotFoundError, match=re.escape("summary.json")):
        write_report(tmp_path / "nothing", checkpoint)


def test_a_noted_step_limit_tells_how_a_single_episode_ended() -> None:
    rows = episodes("reach", 5, [40])
    summary = summarised(rows)
    for limit, said in ((40, "The only failed episode ran out of time."), (50, "The only failed episode ended early")):
        summary["tasks"]["reach"]["max_steps"] = limit
        assert said in " ".join(summary_paragraphs(Run(summary=summary, rows=rows)))


def test_what_the_environment_says_about_a_failure_comes_before_a_guess(tmp_path: Path) -> None:
    rows = episodes("reach", 5, [40, 12, 12, 9])
    for row, reason in zip([r for r in rows if not r["success"]], ("out of time", "wrong object", "", "it <melted>")):
        row["failure"] = reason
    page = Page(write_report(write(tmp_path, rows), None))
    text = text_of(page)
    assert "1 ran out of time" in text
    assert "1 went for a wrong object" in text
    assert "1 ended with “it <melted>”" in text
    assert "4 failed (not drawn): 1 out of time, 1 wrong object, 1 " in page.text


def test_no_comparison_where_tasks_differ_between_kinds() -> None:
    """Seen words of an easy task against other words of a hard one say nothing about words."""
    rows = [{**r, "split": "train"} for r in episodes("easy", 50, [])]
    rows += [{**r, "split": "paraphrase"} for r in episodes("hard", 0, [40] * 50)]
    text = " ".join(summary_paragraphs(Run(summary=summarised(rows), rows=rows)))
    assert "chance" not in text
    same = [{**r, "split": ("train", "paraphrase")[i % 2]} for i, r in enumerate(episodes("easy", 100, []))]
    for row in same[1::2]:
        row["success"] = row["seed"] % 4 == 1
    text = " ".join(summary_paragraphs(Run(summary=summarised(same), rows=same)))
    assert "worse by more than chance explains" in text


SPEC = EmbodimentSpec(
    name="dot",
    robot="dot",
    control_hz=10.0,
    cameras=(),
    state=FeatureSpec(name="state", shape=(1,), names=("x",), units=("m",)),
    action=FeatureSpec(name="action", shape=(1,), names=("x",), units=("m",), low=(-1.0,), high=(1.0,)),
)


class Dot(Env[dict[str, Any], np.ndarray]):
    """Succeeds after three steps where the seed is even; is cut off after five."""

    observation_space = spaces.Dict(
        {
            "state": spaces.Box(-1, 1, (1,), np.float32),
            "instruction": spaces.Text(40, charset=" abcdefghijklmnopqrstuvwxyz"),
        }
    )
    action_space = spaces.Box(-1, 1, (1,), np.float32)
    spec_embodiment = SPEC
    max_steps, name = 5, "dot"
    task = property(lambda self: self)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict[str, Any], Any]:
        self.at, self.even = 0, (seed or 0) % 2 == 0
        return self.seen(), {}

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        self.at += 1
        done = self.even and self.at == 3
        return self.seen(), float(done), done, self.at == self.max_steps, {}

    def seen(self) -> dict[str, Any]:
        return {"state": np.zeros(1, np.float32), "instruction": "stay"}


class Still:
    embodiment = SPEC

    def reset(self, lane: int, seed: int) -> None: ...

    def act(self, observations: Sequence[Any], lanes: Sequence[int]) -> np.ndarray:
        return np.zeros((len(lanes), 1), np.float32)


def test_an_evaluation_writes_what_the_report_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = tmp_path / "run" / "checkpoint"
    checkpoint.mkdir(parents=True)
    (checkpoint / "meta.json").write_text('{"head": "NoHead", "parameters": 5, "seed": 0}')
    (checkpoint / "model.safetensors").write_bytes(b"")
    monkeypatch.setattr(VLAPolicy, "from_checkpoint", lambda path, **options: Still())
    monkeypatch.setattr("sys.argv", ["bin/brachium", "eval", "env=dot", "episodes=6"])
    for count in (4, 6):
        evaluate(
            checkpoint=str(checkpoint),
            executor=lambda policy: policy,
            vector=lambda makes: SyncVectorEnv(makes, autoreset_mode=AutoresetMode.DISABLED),
            suite={"dot": Dot},
            out=str(tmp_path / "eval"),
            episodes=count,
            splits={"train": 1.0},
            seed=10,
            num_envs=1,
            videos=0,
        )
    page = Page(tmp_path / "eval" / "report.html")
    assert "in 3 of 6 episodes of dot" in text_of(page)
    assert "All 3 failed episodes ran out of time." in text_of(page)
    assert "(for the last 2 episodes; resumed)" in page.text
    assert "<pre>brachium eval env=dot episodes=6</pre>" in page.text


def test_small_helpers(tmp_path: Path) -> None:
    assert [percent(v).replace("\u00a0", " ") for v in (0.0, 0.001, 0.5, 0.999, 1.0)] == [
        "0 %", "< 1 %", "50 %", "> 99 %", "100 %",
    ]  # fmt: skip
    assert things("Push the RED cube to the blue zone") == [("red", "cube"), ("blue", "zone")]
    assert things("open the drawer") == []
    assert wording("push the red cube to the blue zone") == "push the … to the …"
    # Newcombe (1998), table II, example a: 56/70 against 48/80, method 10
    low, high = difference({"success": 56, "episodes": 70}, {"success": 48, "episodes": 80})
    assert (round(low, 4), round(high, 4)) == (0.0524, 0.3339)
    (tmp_path / "log").write_text('{"step": 1, "x": 2}\n{"step": 1, "x": 3}\n{"st')
    assert series(read_lines(tmp_path / "log"), "x") == ([1.0], [3.0])
    assert read_lines(tmp_path / "none") == []
