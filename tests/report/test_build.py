"""The report page: complete, escaped, self-contained, and tolerant of missing parts."""

import base64
import hashlib
import json
import math
import os
import re
import socket
from pathlib import Path
from typing import Any

import filelock
import pytest
from html_page import HtmlPage
from runs_on_disk import HOSTILE, MakeRun, heartbeat, record

from msf_faiss.errors import UserError
from msf_faiss.evaluate.results import Result, Score, save_result
from msf_faiss.report.build import render_report, write_report
from msf_faiss.report.run_record import read_runs, short_names


class Page(HtmlPage):
    @property
    def data(self) -> Any:
        return json.loads(self.texts["script"][0])


def render(*runs: Path, title: str | None = None, out: Path | None = None) -> Page:
    out = out or runs[0] / "report.html"
    return Page(render_report(read_runs(runs, neighbors=False), out=out, title=title))


def result(encoder: str, accuracy: float, *, kind: str = "demo", step: int | None = 300) -> Result:
    data = {
        "config": {"kind": kind},
        "training_images": 4000,
        "held_out_images": 1000,
        "classes": 10,
        "commonest_class": 0.1,
        "left_out": {},
    }
    return Result(
        evaluation="knn",
        encoder=encoder,
        checkpoint=None if step is None else f"checkpoints/step-{step:08d}",
        weights=None if step is None else "ab" * 32,
        step=step,
        epoch=None if step is None else step / 100,
        scores=(Score(metric="20-NN", accuracy=accuracy, correct=1, images=1000, settings={"k": 20}),),
        protocol={"data": data, "view": "centre 32 px", "clamped_k": {"200": 48}},
        created="2026-11-25T12:00:00+00:00",
        device="a processor",
        seconds=1.5,
        versions={"torch": "2.14"},
    )


def test_single_run_shows_curves_config_and_state(make_run: MakeRun) -> None:
    run = make_run("first")
    page = render(run)
    charts = [figure["data-name"] for figure in page.all("figure")]
    assert charts[:2] == ["loss", "purity"]
    assert {"learning_rate", "ema_momentum", "images_per_second", "data_time_ratio", "effective_rank"} <= set(charts)
    assert not {"recall_at_k", "unreadable_images", "eta_seconds"} & set(charts)
    assert len(page.data["charts"]) == len(charts)
    assert page.data["last"] == 300
    words = page.words
    assert "Step 300 of 300 (epoch 3)" in words
    assert "Finished 2026-09-21 14:14 UTC, 0:01:01 after its last start." in words
    assert "learning_rate" in words
    assert "first has not been evaluated yet" in words
    assert "Omitted by --no-neighbors." in words
    assert "a host" in words
    assert "Differences" not in words
    assert not page.all("input", id="show-0")


def test_curves_have_text_descriptions(make_run: MakeRun) -> None:
    labels = [svg["aria-label"] or "" for svg in render(make_run()).all("svg", role="img")]
    assert (
        labels[0]
        == "Loss. from 0.9091 at step 10, to 0.25 at step 300, lowest 0.25 at step 300, highest 0.9091 at step 10. "
    )
    assert labels[1].startswith("Loss, logarithmic. ")
    assert all("at step" in label for label in labels)


def test_several_runs_start_with_their_differences(make_run: MakeRun) -> None:
    short = [record(step) for step in (10, 20)]
    runs = [
        make_run("a"),
        make_run("b", settings=("optimizer.learning_rate=0.125", "bank.kind=ivf")),
        make_run("c", short),
    ]
    page = render(*runs)
    assert page.texts["h1"] == ["3 runs"]
    assert page.texts["h2"][:2] == ["Differences", "Curves"]
    words = page.words
    table = page.page[page.page.index('id="differences"') : page.page.index('id="curves"')]
    rows = dict(re.findall(r'<tr><th scope="row">(.*?)</th>(.*?)</tr>', table))
    assert re.findall("<td.*?>(.*?)</td>", rows["bank.kind"]) == ["flat", "ivf", "flat"]
    assert re.findall("<td.*?>(.*?)</td>", rows["optimizer.learning_rate"])[1] == "0.125"
    assert re.findall("<td.*?>(.*?)</td>", rows["bank.engine"]) == ["auto", "–", "auto"]
    assert not any(key.startswith(("train.", "data.")) for key in rows)
    assert [len(series["steps"]) for series in page.data["charts"][0]["series"]] == [30, 30, 2]
    assert [found["id"] for found in page.all("input") if (found.get("id") or "").startswith("show")] == [
        "show-0",
        "show-1",
        "show-2",
    ]
    assert "step 300 of 300 (epoch 3)" in words
    looks = {found["class"] for found in page.all("svg") if "swatch" in (found.get("class") or "")}
    assert len(looks) == 3


def test_identical_configs_are_reported(make_run: MakeRun) -> None:
    assert "The configs are identical." in render(make_run("a"), make_run("b")).words


def test_security_policy_allows_only_the_pages_own_style_and_script(make_run: MakeRun) -> None:
    page = render(make_run("a"), make_run("b"))
    (policy,) = [meta["content"] or "" for meta in page.all("meta") if meta.get("http-equiv")]
    for tag, text in (("style", page.texts["style"][0]), ("script", page.texts["script"][1])):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert "unsafe" not in policy
    assert not re.search(r"https?:|//\w|@import|url\(", page.page)
    for tag, attributes in page.tags:
        assert tag not in {"link", "iframe", "object", "embed", "base", "form"}
        assert "style" not in attributes
        assert not any(name.startswith("on") for name in attributes)
        assert (attributes.get("href") or "#").startswith("#")


def test_hostile_names_are_escaped(make_run: MakeRun) -> None:
    name = " ".join(HOSTILE.replace("/", "∕").split())
    collapse = {"since": 10, "embedding_std": 0.05, "effective_rank": 1.5}

    def runs(folder: str, text: str) -> list[Path]:
        lines = [
            record(10) | {f"bank_{text}": 1.0},
            record(20) | {"bank_adjusted": text},
            record(30) | {"collapse": collapse},
        ]
        made = [
            make_run(f"{folder}/{text.replace('/', '∕')}", lines, status=heartbeat("failed", message=text, host=text)),
            make_run(f"{folder}/other"),
        ]
        save_result(result("online", 0.5, kind=text), made[0] / "results")
        (made[0] / "results" / "extra").mkdir()
        (made[0] / "config.yaml").write_text(f"seed: 0\n# {text}\nno_such_key: 1\n")
        (made[0] / "neighbors").mkdir()
        (made[0] / "neighbors" / f"{text.replace('/', '∕')}.html").touch()
        return made

    plain, hostile = (render(*runs(folder, text), title=text) for folder, text in (("p", "plain"), ("h", HOSTILE)))
    assert [tag for tag, _ in hostile.tags] == [tag for tag, _ in plain.tags]
    assert hostile.texts["h1"] == [HOSTILE]
    assert name in hostile.words
    assert hostile.texts["script"][1] == plain.texts["script"][1]
    assert len(hostile.texts["script"]) == 2
    for svg in hostile.all("svg", role="img"):
        label = " ".join((svg["aria-label"] or "").split())
        assert name in label or "other" in label


def test_names_may_be_invalid_utf8(make_run: MakeRun) -> None:
    run = make_run(os.fsdecode(b"caf\xe9"))
    (run / "neighbors").mkdir()
    (run / "neighbors" / os.fsdecode(b"\xff #1?.html")).touch()
    path = write_report([run], neighbors=False)
    page = Page(path.read_text(encoding="utf-8"))
    assert page.texts["h1"] == ["caf\\udce9"]
    assert page.all("a", href="neighbors/%FF%20%231%3F.html")


def test_links_to_pages_of_runs_are_relative(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run("runs/a"), make_run("runs/b")]
    for run in runs:
        (run / "neighbors").mkdir()
        for name in ("step-00000300.html", "sheet.png", "records.json"):
            (run / "neighbors" / name).touch()
    page = render(*runs, out=tmp_path / "pages" / "report.html")
    links = [link["href"] for link in page.all("a") if ".." in (link["href"] or "")]
    assert links == [f"../runs/{run}/neighbors/{name}" for run in "ab" for name in ("sheet.png", "step-00000300.html")]
    assert render(runs[0]).all("a", href="neighbors/sheet.png")


def test_results_on_the_same_images_share_a_table(make_run: MakeRun) -> None:
    runs = [make_run("a"), make_run("b")]
    for run, accuracy in zip(runs, (0.8, 0.6), strict=True):
        save_result(result("online", accuracy), run / "results")
        save_result(result("pixels", 0.3, step=None), run / "results")
    save_result(result("untrained", 0.5, step=0), runs[0] / "results")
    save_result(result("online", 0.25, kind="stl10"), runs[1] / "results")
    page = render(*runs)
    tables = re.findall(r'<table class="scores">.*?</table>', page.page, re.S)
    assert len(tables) == 2
    assert re.findall(r'<th scope="col".*?>(.*?)</th>', tables[0]) == [
        *("Metric", "trained", "untrained", "raw pixels", "gain"),
        *("trained", "raw pixels"),
    ]
    assert re.findall(r'colspan="(\d)"', tables[0]) == ["4", "2"]
    cells = re.findall(r"<td.*?>(.*?)</td>", tables[0][tables[0].index("<tbody>") :])
    assert cells == ["<b>80.0</b>", "50.0", "30.0", "+30.0", "60.0", "30.0"]
    assert "stl10: 1,000 held-out images" in page.words
    protocols = " ".join(page.texts["pre"])
    assert "commonest_class: 0.1" in protocols
    assert "knn, online, step 300 · 2026-11-25T12:00:00+00:00, a processor, 1.5 s" in page.words


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (heartbeat("interrupted"), "Interrupted 2026-09-21 14:14 UTC; run the same command again to resume."),
        (heartbeat("failed", message="the disk is full"), "Failed 2026-09-21 14:14 UTC: the disk is full"),
        (heartbeat("training"), "Dead: the process is gone; last heartbeat 2026-09-21 14:14 UTC."),
    ],
)
def test_state_is_described(make_run: MakeRun, status: dict[str, Any], words: str) -> None:
    assert words in render(make_run(status=status)).words


def test_training_run_shows_remaining_time(make_run: MakeRun) -> None:
    run = make_run(status=heartbeat("training", eta_seconds=3725.2, host=socket.gethostname()))
    with filelock.FileLock(run / ".lock"):
        words = render(run).words
    assert re.search(r"Training on .*; last heartbeat 2026-09-21 14:14 UTC, about 1:02:05 left\.", words)


def test_events_are_marked_in_charts_and_listed(make_run: MakeRun) -> None:
    collapse = {"since": 120, "embedding_std": 0.05, "effective_rank": 1.5}
    lines = [record(10 * place) for place in range(1, 21)]
    lines += [record(200) | {"collapse": collapse}, {"step": 100, "epoch": 1.0, "loss": 0.5, "bank_adjusted": "more"}]
    page = render(make_run(lines=lines))
    marks = page.all("path", d="M1000 0V400")
    assert len(marks) == len(page.data["charts"]) + 1  # the loss has two scales
    assert all("collapse" in (mark["class"] or "") for mark in marks)
    assert len(page.all("path", d="M500 0V400")) == len(marks)
    assert "Step 200: the embeddings have been collapsing since step 120" in page.words
    assert "bank: more" in page.words


def test_new_run_has_no_metrics(make_run: MakeRun) -> None:
    run = make_run(lines=[])
    words = render(run).words
    assert "No metrics have been recorded yet." in words
    (run / "metrics.jsonl").unlink()
    (run / "status.json").unlink()
    words = render(run).words
    assert "State unknown: " in words
    assert "learning_rate" in words
    words = render(make_run("other"), run).words
    assert "run has not recorded any metrics yet." in words


@pytest.mark.parametrize(
    "lines",
    [
        [record(1)],
        [record(step, purity=None) for step in (1, 2)],
        [record(step, loss=math.nan, purity=math.inf) for step in (1, 2)],
        [{"step": 0, "loss": 1.0}],
        [{"step": 5}],
    ],
    ids=["one step", "no labels", "no numbers", "step 0", "only steps"],
)
def test_unusual_metrics_make_a_page(make_run: MakeRun, lines: list[dict[str, Any]]) -> None:
    page = render(make_run(lines=lines, tail='{"step": 9, "lo'))
    assert "NaN" not in page.texts["script"][0]
    assert not re.search(r' d="[^"]*(nan|inf)', page.page)
    assert ("1 unreadable line of run was skipped." in page.words) == bool(page.data["charts"])


def test_damaged_parts_are_reported_in_place(make_run: MakeRun) -> None:
    run = make_run()
    (run / "status.json").write_text("{")
    (run / "config.yaml").write_text("seed: none\nfuture_setting: 3\n")
    (run / "results").mkdir()
    (run / "results" / "mine.json").write_text("{}")
    words = render(run).words
    assert "status.json: cannot be read" in words
    assert "future_setting: no such key" in words
    assert "seed: none future_setting: 3" in words
    assert "mine.json: not a result" in words
    assert len(render(run).data["charts"]) > 5
    words = render(run, make_run("other")).words
    assert "run is not compared: its config cannot be read" in words
    assert "The configs are identical." not in words


def test_versions_come_from_newest_readable_checkpoint(make_run: MakeRun) -> None:
    run = make_run()
    for step, content in ((100, '{"step": 100, "versions": {"torch": "1.0"}}'), (99_999_999, "{"), (300, None)):
        folder = run / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        created = {"step": 300, "created": "a day", "versions": {"torch": "2.14", "python": "3.11"}, "origin": "old"}
        (folder / "manifest.json").write_text(content or json.dumps(created))
    words = render(run).words
    assert "torch 2.14, python 3.11" in words
    assert "step 300, a day" in words
    assert "started from" in words


def test_long_runs_make_small_pages(make_run: MakeRun) -> None:
    """300,000 lines take no more than 2,000, since each curve has at most 1,500 points."""
    lines = [{"step": step, "loss": 1 + 0.1 * (step * 7919 % 997), "purity": 1 / step} for step in range(1, 2_001)]
    run = make_run(lines=lines)
    records = read_runs([run], neighbors=False) * 8
    text = render_report(records, out=run / "report.html")
    page = Page(text)
    assert all(len(series["steps"]) <= 1_500 for chart in page.data["charts"] for series in chart["series"])
    assert page.data["charts"][0]["series"][7]["values"]
    assert len(text) < 8 * 3 * 100_000  # three plots of eight curves; thirty charts would take 24 MB
    looks = {found["class"] for found in page.all("svg") if "swatch" in (found.get("class") or "")}
    assert len(looks) == 8


def test_short_names_are_unique() -> None:
    assert short_names([Path("runs/a"), Path("runs/b")]) == ["a", "b"]
    assert short_names([Path("x/a/run"), Path("x/b/run")]) == ["a/run", "b/run"]
    assert short_names([Path("x/a/run"), Path("a/run"), Path("c")])[:2] == ["x/a/run", f"{Path.cwd().name}/a/run"]
    assert short_names([Path()]) == [Path.cwd().name]


def test_repeated_run_is_shown_once(make_run: MakeRun) -> None:
    run = make_run()
    path = write_report([run, run / ".." / "run"], neighbors=False)
    assert path == run / "report.html"
    assert Page(path.read_text()).texts["h1"] == ["run"]


def test_only_reports_are_overwritten(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run()
    gallery = tmp_path / "gallery.html"
    gallery.write_text('<!doctype html><meta name="generator" content="msf-faiss 0.1.0">')
    with pytest.raises(UserError, match="exists and is not a report of msf-faiss; choose another file"):
        write_report([run], gallery, neighbors=False)
    assert gallery.read_text().endswith('content="msf-faiss 0.1.0">')
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe: is not a regular file; name another file"):
        write_report([run], tmp_path / "pipe", neighbors=False)
    with pytest.raises(UserError, match=r"is a folder; name a file in it, such as .*report\.html"):
        write_report([run], tmp_path, neighbors=False)
    page = write_report([run], tmp_path / "new" / "page.html", neighbors=False)
    before = page.read_text()
    assert write_report([run], page, neighbors=False, title="Another title") == page
    assert page.read_text() != before


def test_paths_that_are_not_runs_are_refused(make_run: MakeRun, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such run directory"):
        write_report([make_run(), tmp_path / "nowhere"], tmp_path / "page.html")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="not a run"):
        write_report([tmp_path / "empty"])
    assert not (tmp_path / "empty" / "report.html").exists()
    assert not (tmp_path / "page.html").exists()


def test_unreadable_metrics_are_user_error(make_run: MakeRun) -> None:
    run = make_run()
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be read: Is a directory"):
        render(run)
