"""The depth lens: its numbers are the trace's, hostile text is harmless, and a real browser shows it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from helpers.families import VOCAB
from helpers.models import tah, token_ids
from helpers.traces import fails, word_tokenizer
from tah.names import POLICIES
from tah.policy import Rule
from tah.tracing.charts import page_charts, save_charts
from tah.tracing.lens import write_lens
from tah.tracing.overthinking import compare, statistics
from tah.tracing.tables import as_markdown
from tah.tracing.trace import TraceRequest, trace
from tah.tracing.trace_file import Trace, load_trace
from tah_cli.app import run

HOSTILE = [
    "</script><script>window.pwned=1</script>",
    "<img src=x onerror=window.pwned=1>",
    "<!--",
    "\u202eabc",
    "&lt;",
]
HOSTILE += ["\n", "'\"`${1}", "\u2028", "{{ 7 * 7 }}", "\x00\x1b[31m", "a\nb", " "]
ROOT = Path(__file__).parents[2]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def words(prefix: str = "w") -> PreTrainedTokenizerFast:
    """A tokenizer of the tiny models' vocabulary, some of whose tokens are what nobody wants in a page."""
    names = [f"{prefix}{token}" for token in range(VOCAB)]
    names[8 : 8 + len(HOSTILE)] = HOSTILE
    return word_tokenizer(names)


def rows(model, count: int = 6) -> list[dict]:
    """Texts that begin unsupervised, hold every hostile token, and whose every third token is the model's choice."""
    import torch

    found = []
    for number in range(count):
        ids = token_ids(1, 24, seed=number)[0].tolist()
        ids[5:17] = range(8, 20)
        for at in range(4, len(ids), 3):
            ids[at] = int(model(torch.tensor([ids[:at]]), policy="never", use_cache=False).logits[0, -1].argmax())
        found.append({"input_ids": ids, "supervised": [at >= 3 for at in range(len(ids))]})
    return found


def made(path: Path, attention: str, seed: int = 0, **options) -> Trace:
    import torch

    model = tah(attention=attention, max_depth=3, policy="decider", threshold=0.5).eval()
    with torch.no_grad():
        texts = rows(model)
        if seed:
            for parameter in model.decider.parameters():
                parameter.mul_(-1)
    return trace(model, words(), texts, path, TraceRequest(model="<b>bold</b> & co", data="data", **options))


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """Traces on disk: of one model with own attention, of another, of a duo model, and a large one of 20,000 tokens."""
    directory = tmp_path_factory.mktemp("traces")
    found = {name: directory / f"{name}.jsonl" for name in ("own", "other", "duo", "large")}
    made(found["own"], "own")
    made(found["other"], "own", seed=1)
    made(found["duo"], "duo", top_k=8)
    header, *lines = found["own"].read_text("utf-8").rstrip("\n").split("\n")
    texts = [json.loads(line) for line in lines]
    more = [json.dumps(texts[number % 6] | {"row": number}) for number in range(20_000 // 24 + 1)]
    facts = json.loads(header) | {"texts": len(more), "tokens": 24 * len(more)}
    found["large"].write_text("\n".join([json.dumps(facts), *more]) + "\n", "utf-8")
    return found


class Page(HTMLParser):
    """Every element of a page with its attributes, and the text of scripts and styles."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text("utf-8")
        self.tags: list[tuple[str, dict]] = []
        self.inside: dict[str, list[str]] = {"script": [], "style": []}
        self.feed(self.source)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, text):
        if self.tags and self.tags[-1][0] in self.inside:
            self.inside[self.tags[-1][0]].append(text)

    @property
    def data(self) -> dict:
        return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', self.source, re.S)[1])


def unpacked(packed: list[str]) -> np.ndarray:
    kind = {"Uint8Array": "<u1", "Uint16Array": "<u2", "Uint32Array": "<u4", "Float32Array": "<f4"}[packed[0]]
    return np.frombuffer(base64.b64decode(packed[1]), kind)


# -- the page --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["own", "duo"])
def test_page_holds_the_numbers_of_the_trace(files, tmp_path, name):
    traced = load_trace(files[name])
    write_lens([traced], tmp_path / "page.html")
    data = Page(tmp_path / "page.html").data
    strings, of = data["strings"], data["traces"][0]
    columns = {key: unpacked(packed) for key, packed in of["columns"].items()}
    every, texts = traced.tokens(every=True), traced.texts
    M, k, N = traced.max_depth, of["top_k"], len(every.text)
    assert [strings[at] for at in unpacked(data["pieces"])] == [piece for text in texts for piece in text.pieces]
    assert unpacked(data["ids"]).tolist() == np.concatenate([text.ids for text in texts]).tolist()
    assert unpacked(data["supervised"]).tolist() == np.concatenate([text.supervised for text in texts]).tolist()
    for key in ("rank", "prob", "entropy", "max_prob"):
        assert np.array_equal(columns[key].reshape(M, N), getattr(every, key)), key
    assert np.array_equal(columns["decider"].reshape(M - 1, N), every.decider)
    assert np.array_equal(columns["depth"], every.depth)
    top = np.concatenate([text.top_ids for text in texts], 1)
    assert [strings[at] for at in columns["top"]] == [traced.string(token) for token in top.ravel()]
    probs = np.concatenate([text.top_probs for text in texts], 1)
    assert np.allclose(columns["top_probs"].reshape(M, N, k) / 1e4, probs, atol=1e-6)
    assert ("final_prob" in columns) == (name == "duo")
    if name == "duo":
        assert np.array_equal(columns["final_prob"], every.final_prob)
        assert np.array_equal(columns["final_rank"], every.final_rank)


def test_page_asks_for_nothing_and_runs_only_its_own_script(files, tmp_path):
    traces = [load_trace(files[name]) for name in ("own", "other")]
    write_lens(traces, tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    assert [attributes.get("type") for tag, attributes in page.tags if tag == "script"] == [
        "application/json",
        "module",
    ]
    assert not {tag for tag, _ in page.tags} & {"img", "link", "iframe", "object", "embed", "base"}
    loading = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "srcset")]
    links = [attributes["href"] for _, attributes in page.tags if "href" in attributes]
    assert not loading and links == ["#text"]
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on") or name == "style"]
    (policy,) = [its["content"] for _, its in page.tags if its.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    for text in (page.inside["style"][0], page.source.split('<script type="module">')[1].split("</script>")[0]):
        assert base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() in policy
    assert "<b>bold</b>" not in page.source and "&lt;b&gt;bold&lt;/b&gt; &amp; co" in page.source
    assert not any(text in page.source for text in HOSTILE[:2])
    assert set(HOSTILE) <= set(page.data["strings"])


def test_charts_show_the_statistics(files, tmp_path):
    (stats,) = write_lens([load_trace(files["own"])], tmp_path / "page.html")
    source = (tmp_path / "page.html").read_text("utf-8")
    charts = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", source, re.S)]
    assert [chart.get("aria-label") for chart in charts] == [
        *("Accuracy after each depth", "Loss after each depth", "Tokens corrected and broken"),
        *("Accuracy against compute", "Calibration of the decider", "Tokens most often iterated"),
    ]
    texts = [[text.text for text in chart.iter("text")] for chart in charts]
    for row in stats["depths"]:
        assert f"{row['accuracy']['value']:.2%}" in texts[0] and f"{row['loss']['value']:.4f}" in texts[1]
    for row in stats["passes"]:
        assert {f"{row[name]['value']:.2%}" for name in ("corrected", "broken")} <= set(texts[2])
    for row in stats["iterated_tokens"][:12]:
        assert f"{row['iterated']:.1%} of {row['count']:,}" in texts[5]
    scale = charts[3].find(".//circle[@class='now']").get("data-scale")
    x0, x1, y0, y1, left, bottom, right, top = map(float, scale.split())
    for name, curve in stats["curves"].items():
        path = charts[3].find(f".//g[@class='curve {name}']/path").get("d")
        x, y = np.array(re.findall(r"[ML] (\S+) (\S+)", path), float).T
        assert x0 + (x - left) / (right - left) * (x1 - x0) == pytest.approx(curve["mean_depth"], abs=1e-4)
        assert y0 + (y - bottom) / (top - bottom) * (y1 - y0) == pytest.approx(curve["accuracy"], abs=1e-4)
    for name, row in stats["policies"].items():
        if row["accuracy"]["value"] is not None:
            assert re.search(rf">{re.escape(name)}( |<)", source), name


def test_charts_are_the_same_bytes_and_fit_a_page_of_any_colour(files):
    stats = statistics(load_trace(files["own"]))
    one, again = (page_charts([("A", stats), ("B", stats)]) for _ in range(2))
    assert [chart["svg"] for chart in one] == [chart["svg"] for chart in again]
    assert [chart["name"] for chart in one] == [
        *("accuracy", "loss", "passes"),
        *("compute", "calibration", "iterated") * 2,
    ]
    for chart in one:
        for element in ElementTree.fromstring(chart["svg"]).iter():
            assert not {"id", "style", "href", "clip-path"} & element.attrib.keys()
            assert all(element.get(name, "none").startswith(("none", "var(--")) for name in ("fill", "stroke"))


def test_two_traces_share_their_texts_and_show_the_difference(files, tmp_path):
    one, other = load_trace(files["own"]), load_trace(files["other"])
    fewer = Trace(other.header, other.texts[1:4], other.strings)
    write_lens([one, fewer], tmp_path / "page.html")
    data, source = Page(tmp_path / "page.html").data, (tmp_path / "page.html").read_text("utf-8")
    assert data["rows"] == [2, 3, 4] and len(data["traces"]) == 2
    assert [len(unpacked(its["columns"]["depth"])) for its in data["traces"]] == [3 * 23] * 2
    gap = compare(one, fewer)["difference"]["own policy"]["loss"]["value"]
    assert f"{gap:.4f}" in source


def test_shown_limits_the_text_and_not_the_tables(files, tmp_path):
    traced = load_trace(files["own"])
    (stats,) = write_lens([traced], tmp_path / "page.html", shown=50)
    page = Page(tmp_path / "page.html")
    assert page.data["rows"] == [1, 2] and stats["texts"] == 6
    assert "The text shows the first 48 tokens (2 texts)" in page.source
    write_lens([traced], tmp_path / "page.html", shown=1)
    assert Page(tmp_path / "page.html").data["rows"] == [1]
    (stats,) = write_lens([traced], tmp_path / "page.html", every=True)
    assert stats["tokens"] == 6 * 23 and unpacked(Page(tmp_path / "page.html").data["supervised"]).all()


def test_a_model_of_one_pass(tmp_path):
    model = tah(max_depth=1, policy="never").eval()
    traced = trace(model, words(), rows(model, 2), tmp_path / "one.jsonl")
    write_lens([traced], tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text("utf-8").count("<svg") == 2
    assert [path.name for path in save_charts([statistics(traced)], tmp_path)] == ["accuracy.png", "loss.png"]


@pytest.mark.parametrize("measure", ["probability", "entropy"])
def test_tokens_are_shaded_by_what_the_policy_went_by(tmp_path, measure):
    model = tah(policy="confidence", confidence_measure=measure, attention="own").eval()
    texts = rows(model, 3)
    tokens = trace(model, words(), texts).tokens(every=True)
    said = 1 - tokens.max_prob[0] if measure == "probability" else 1 - np.exp(-tokens.entropy[0])
    traced = trace(model, words(), texts, request=TraceRequest(Rule(threshold=float(np.median(said)))))
    assert 0.4 < (traced.tokens(every=True).depth > 1).mean() < 0.6
    write_lens([traced], tmp_path / "page.html")
    score = Page(tmp_path / "page.html").data["traces"][0]["score"]
    assert score == ("confidence" if measure == "probability" else "entropy")
    assert f"policy\n      confidence ({measure}) at" in (tmp_path / "page.html").read_text("utf-8")


@pytest.mark.skipif(shutil.which("node") is None, reason="node is missing (apt-get install nodejs)")
@pytest.mark.parametrize("policy", ["decider", "confidence", "always", "random", "even", "a policy of the caller"])
def test_weights_of_a_mixture_are_those_of_the_forward(tmp_path, policy):
    """What the details of a token show for each pass, computed in the page, is `mixture_weights`."""
    import torch

    mix = {"next_input": "mlp", "output": "even" if policy == "even" else "mixture", "decider": {"kind": "tah2"}}
    rule = {"policy": policy if policy in POLICIES else "decider", "threshold": 0.97 if policy == "confidence" else 0.5}
    model = tah(attention="own", max_depth=3, random_rate=0.5, **mix, **rule).eval()
    its = trace(model, words(), rows(model, 2))
    write_lens([its], tmp_path / "lens.html")
    (found,) = Page(tmp_path / "lens.html").data["traces"]
    found["policy"] = policy if policy == "a policy of the caller" else found["policy"]
    depth = unpacked(found["columns"]["depth"]).tolist()
    found |= {name: unpacked(packed).tolist() for name, packed in found.pop("columns").items()}
    sources = "".join((ROOT / "src" / "tah" / "assets" / name).read_text("utf-8") for name in ("rules.js", "token.js"))
    parts = re.findall(r"^function (?:scoreOf|weight)\(.*?^}$|^const CERTAIN = .*?;", sources, re.MULTILINE | re.DOTALL)
    assert len(parts) == 3
    program = "\n".join(parts) + f"\nconst N = {len(depth)}, trace = {json.dumps(found)}, depth = {json.dumps(depth)};"
    program += "console.log(JSON.stringify(depth.map((d, p) => [0, 1, 2].map((at) => weight(trace, p, at, d)))))"
    done = subprocess.run(["node", "-e", program], capture_output=True, text=True, check=True)
    shown = json.loads(done.stdout)
    if policy == "a policy of the caller":
        assert shown == [["" for _ in range(d)] + [""] * (3 - d) for d in depth]
        return
    with torch.no_grad():
        outs = [model(torch.from_numpy(text.ids[None, :-1]).long()) for text in its.texts]
    want = torch.cat([out.mixture_weights[0] for out in outs])
    assert torch.cat([out.depth_count[0] for out in outs]).tolist() == depth and len(set(depth)) > (policy != "always")
    for texts, weights, d in zip(shown, want.tolist(), depth, strict=True):
        assert texts[d:] == [""] * (3 - d)
        assert [float(text) for text in texts[:d]] == pytest.approx(weights[:d], abs=1e-4)


@pytest.mark.parametrize(("policy", "rules"), [("decider", ["own", "decider"]), ("always", ["own", "oracle"])])
def test_the_page_of_a_mixture_offers_only_what_the_trace_measures(tmp_path, policy, rules):
    mix = {"next_input": "mlp", "output": "mixture", "decider": {"kind": "tah2"}}
    model = tah(attention="own", max_depth=3, policy=policy, **mix).eval()
    its = trace(model, words(), rows(model, 2))
    write_lens([its], tmp_path / "lens.html")
    page = Page(tmp_path / "lens.html")
    assert page.data["traces"][0]["rules"] == rules and "The output is a mixture." in page.source
    assert [chart["name"] for chart in page_charts([("A", statistics(its))])].count("compute") == (policy == "decider")
    sampled = trace(tah(attention="own", policy="decider", decision="sample", **mix).eval(), words(), rows(model, 2))
    write_lens([its, sampled], tmp_path / "both.html")
    source = Page(tmp_path / "both.html").source
    assert ("The passes of the first trace are" in source) == (policy == "always")
    assert "decider, decisions drawn ·" in source


def test_large_report_is_fast_and_small(files, tmp_path):
    start = time.process_time()
    write_lens([load_trace(files["large"])], tmp_path / "page.html")
    assert time.process_time() - start < 5
    assert (tmp_path / "page.html").stat().st_size < 5e6
    assert sum(Page(tmp_path / "page.html").data["lengths"]) > 20_000


# -- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_report_writes_page_markdown_and_charts(capsys, files, here):
    assert run(["report", str(files["own"]), str(files["other"]), "--markdown", "r.md", "--png", "png"]) == 0
    assert "report.html: " in capsys.readouterr().out
    names = [
        f"{name}{end}.png" for name in ("accuracy", "loss", "passes", "compute", "calibration") for end in ("", "-B")
    ]
    assert sorted(path.name for path in (here / "png").iterdir()) == sorted(names)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (here / "png").iterdir())
    assert as_markdown(statistics(load_trace(files["own"]))) in (here / "r.md").read_text("utf-8")
    assert sorted(path.name for path in here.iterdir()) == ["png", "r.md", "report.html"]


def test_report_of_a_run(capsys, files, here):
    shutil.copy(files["own"], here / "trace.jsonl")
    assert run(["report", "."]) == 0 and Page(here / "report.html").data["rows"]
    (here / "run" / "decider").mkdir(parents=True)
    (here / "run" / "decider" / "config.json").write_text("{}")
    (here / "run" / "data").mkdir()
    (here / "run" / "data" / "test.jsonl").touch()
    capsys.readouterr()
    error = fails(capsys, "report", "run")
    assert "make one: tah trace run/decider run/data/test.jsonl -o run/trace.jsonl" in error


def test_unfinished_and_damaged_traces(capsys, files, here):
    whole = files["own"].read_bytes()
    Path("cut.jsonl").write_bytes(whole[:-500])
    assert run(["report", "cut.jsonl"]) == 0
    assert "cut.jsonl is unfinished: 1 of 6 texts are missing" in capsys.readouterr().err
    assert "unfinished: 1 texts are missing" in (here / "report.html").read_text("utf-8")
    lines = whole.split(b"\n")
    Path("hole.jsonl").write_bytes(b"\n".join([*lines[:2], lines[2][:100], *lines[3:]]))
    assert "hole.jsonl: line 3 is damaged" in fails(capsys, "report", "hole.jsonl")
    Path("header.jsonl").write_bytes(lines[0] + b"\n")
    assert "has no tokens yet" in fails(capsys, "report", "header.jsonl")


def test_mistakes_are_named(capsys, files, here):
    Path("text.txt").write_text("hello")
    assert "text.txt is not a trace" in fails(capsys, "report", "text.txt")
    assert "trace none.jsonl does not exist; make one: tah trace" in fails(capsys, "report", "none.jsonl")
    assert "at most two" in fails(capsys, "report", *[files["own"]] * 3)
    assert "directory no/such of no/such/page.html does not exist" in fails(
        capsys, "report", files["own"], "-o", "no/such/page.html"
    )
    assert "give a file name" in fails(capsys, "report", files["own"], "-o", ".")
    assert "--png text.txt is a file" in fails(capsys, "report", files["own"], "--png", "text.txt")
    assert "--png /proc/none cannot be made: " in fails(capsys, "report", files["own"], "--png", "/proc/none")
    before = Path(files["own"]).read_bytes()
    for options in (["-o", files["own"]], ["--markdown", files["own"]], ["-o", "a.html", "--markdown", "./a.html"]):
        assert "would be overwritten" in fails(capsys, "report", files["own"], *options)
    assert Path(files["own"]).read_bytes() == before
    model = tah(max_depth=2).eval()
    trace(model, words("v"), rows(model, 2), "words.jsonl")
    assert "different tokenizers" in fails(capsys, "report", files["own"], "words.jsonl")


@pytest.mark.parametrize("package, options", [("jinja2", []), ("matplotlib", ["--png", "png"])])
def test_missing_packages(capsys, files, here, monkeypatch, package, options):
    missing = {"jinja2": ("jinja2", "markupsafe"), "matplotlib": ("matplotlib",)}[package]
    for name in [name for name in sys.modules if name.split(".")[0] in missing]:
        monkeypatch.delitem(sys.modules, name)
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("tah.tracing.lens", "tah.tracing.charts", "tah.stats.charts"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert "pip install 'tah[report]'" in fails(capsys, "report", files["own"], *options)


def test_failed_write_leaves_the_old_page(files, tmp_path, monkeypatch):
    page = tmp_path / "page.html"
    page.write_text("old")

    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=f"^{page} cannot be written: No space left on device$"):
        write_lens([load_trace(files["own"])], page)
    assert page.read_text() == "old" and list(tmp_path.iterdir()) == [page]


# -- in a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    if BROWSER is None:
        pytest.skip("no chromium is installed")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def show(browser, files, tmp_path):
    """Opens the page of some traces, and checks at the end that it asked for nothing and complained of nothing."""
    complaints, asked, pages = [], [], []

    def opened(*names: str, width: int = 1280, **options):
        path = tmp_path / "page.html"
        write_lens([load_trace(files[name]) for name in names], path)
        page = browser.new_page(viewport={"width": width, "height": 800}, **options)
        pages.append(page)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        page.wait_for_function("performance.getEntriesByName('interactive').length")
        return page

    yield opened
    assert not complaints
    assert {url.split("#")[0] for url in asked} == {(tmp_path / "page.html").as_uri()}
    assert not any(page.evaluate("window.pwned") for page in pages)
    for page in pages:
        page.close()


def counted(page, pane: int = 0) -> list[str]:
    """The numbers above the text: share, passes, accuracy, loss, corrected and broken."""
    return page.locator(".pane").nth(pane).locator("dd").all_inner_texts()


def test_browser_shows_hostile_text_as_text(show):
    page = show("own")
    texts = page.locator(".k .t").all_text_contents()
    assert "</script><script>window.pwned=1</script>" in [text.strip() for text in texts]
    assert not any("\u202e" in text or "\x1b" in text for text in texts)
    assert page.locator("#text img, #text script").count() == 0


@pytest.mark.parametrize("name", ["own", "duo"])
def test_browser_counts_as_the_statistics_do(show, files, name):
    page, stats = show(name), statistics(load_trace(files[name]))

    def expected(row):
        accuracy, gain = row["accuracy"]["value"], row["gain"]["value"]
        signed = f"{'−' if gain < 0 else '+'}{abs(gain) * 100:.2f}"
        depth, loss = f"{row['mean_depth']['value']:.3f}", f"{row['loss']['value']:.4f}"
        return [f"{row['iterated']['value'] * 100:.2f} %", depth, f"{accuracy * 100:.2f} % {signed} over depth 1", loss]

    assert counted(page)[:4] == expected(stats["policies"]["own policy"])
    page.get_by_label("Threshold as a number").fill("0.5")
    assert page.get_by_label("Policy").input_value() == "decider"
    assert counted(page)[:4] == expected(stats["policies"]["decider"])
    page.get_by_label("Policy").select_option("oracle")
    assert counted(page)[:4] == expected(stats["policies"]["oracle"])
    before = page.locator("svg .now").get_attribute("cx")
    page.get_by_label("Policy").select_option("confidence")
    page.get_by_label("Threshold as a number").fill("0.7")
    assert counted(page)[:4] == expected(stats["policies"]["confidence"])
    assert page.locator("svg .now").get_attribute("cx") != before


def test_browser_hover_shows_every_depth(show, files):
    page, text = show("own"), load_trace(files["own"]).texts[0]
    page.locator(".row").first.locator(".t").nth(8).hover()
    box = page.locator("#details")
    assert "text 1, token 9" in box.inner_text()
    found = [name.strip() for name in box.locator(".passes .tops li span:last-child").all_inner_texts()]
    assert found[:5] == [f"{value:.4f}" for value in text.top_probs[0, 7]]
    line = [f"{value:.4f}" for value in text.prob[:, 7]]
    assert [cell.strip() for cell in box.locator(".facts2 tr").nth(1).locator("td").all_inner_texts()] == line
    verdict = ("kept right", "kept wrong", "corrected", "broken")
    right, ends = text.rank[0, 7] == 0, text.final_rank[7] == 0
    wanted = verdict[0 if right and ends else 3 if right else 2 if ends else 1]
    assert box.locator(".outcome").inner_text() == wanted


def test_browser_filters(show, files):
    page, stats = show("own"), load_trace(files["own"]).tokens()
    hard = int((stats.rank[0] > 0).sum())
    button = page.locator("[data-filter=hard]")
    assert button.inner_text().split()[-1] == str(hard)
    page.locator("[data-filter=iterated]").click()
    iterated = int((stats.depth > 1).sum())
    assert page.locator(".k .t:not(.x):not(.h):not(.o)").count() == iterated
    broken = int(((stats.rank[0] == 0) & (stats.final_rank > 0)).sum())
    page.keyboard.press("4")
    assert page.locator("[data-filter=broken]").get_attribute("aria-pressed") == "true"
    assert page.locator(".row:not([hidden]) .t.b:not(.h)").count() == broken
    page.keyboard.press("1")
    assert page.locator(".k .t.h").count() == 0


def test_browser_keyboard(show):
    page = show("own")
    current = page.locator("[aria-current]")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert "text 1, token 2 " in page.locator("#details").inner_text()
    page.keyboard.press("ArrowLeft")
    assert "text 1, token 1 " in page.locator("#details").inner_text()
    page.keyboard.press("ArrowDown")
    assert current.count() == 1 and current.evaluate("node => node === document.activeElement")
    page.keyboard.press("Escape")
    assert current.count() == 0
    if page.locator(".t.b").count():
        page.keyboard.press("n")
        assert "b" in current.get_attribute("class").split()
        page.keyboard.press("n")
        page.keyboard.press("p")
        assert current.evaluate("node => node === document.querySelector('.k .t.b')")
    page.keyboard.press("?")
    assert page.locator("dialog").is_visible()
    page.keyboard.press("Escape")
    assert not page.locator("dialog").is_visible()


def test_browser_side_by_side(show, files):
    page = show("own")
    page.keyboard.press("c")
    assert page.locator(".pane").count() == 2 and page.locator(".row").first.locator(".cell").count() == 2
    page.get_by_label("Threshold as a number").nth(1).fill("1")
    assert counted(page, 1)[0] == "0.00 %" and counted(page, 0)[0] != "0.00 %"
    iterated = int((load_trace(files["own"]).tokens().depth > 1).sum())
    assert page.locator("[data-filter=differ]").inner_text().split()[-1] == str(iterated)
    page.locator("#compare").click()
    assert page.locator(".cell.B").count() == 0 and not page.locator("[data-filter=differ]").is_visible()
    page = show("own", "other")
    assert page.locator(".pane").count() == 2
    page.locator(".cell.B .t").nth(8).hover()
    assert page.locator("#details section").count() == 2 and page.locator("[aria-current]").count() == 2


def test_browser_offers_only_the_policies_that_the_trace_of_a_mixture_measures(show, files, tmp_path):
    mix = {"next_input": "mlp", "output": "mixture", "decider": {"kind": "tah2"}}
    for policy, rules in (("decider", ["own", "decider"]), ("random", ["own", "oracle"])):
        files[policy] = tmp_path / f"{policy}.jsonl"
        model = tah(attention="own", max_depth=3, policy=policy, random_rate=0.4, **mix).eval()
        trace(model, words(), rows(model, 2), files[policy])
        page = show(policy)
        options = page.locator(".pane option").evaluate_all("options => options.map((option) => option.value)")
        assert options == rules and page.get_by_label("Threshold", exact=True).is_disabled() == (policy == "random")
        page.keyboard.press("c")
        assert page.locator(".pane select").nth(1).input_value() == rules[1]


def test_browser_dark_and_light(show):
    colour = "getComputedStyle(document.body).backgroundColor"
    light, dark = (show("own", color_scheme=scheme) for scheme in ("light", "dark"))
    assert light.evaluate(colour) != dark.evaluate(colour)
    seen = dark.evaluate(colour)
    light.keyboard.press("t")
    assert light.evaluate(colour) == seen


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_browser_contrast(show, scheme):
    """Text on every shade has at least the contrast of WCAG AA."""
    page = show("own", color_scheme=scheme)
    found = page.evaluate("""() => {
        const box = document.querySelector(".k"), results = {};
        for (const name of ["", "u", "l1", "l2", "l3", "d2", "d2 l1", "d2 l2", "d3", "d3 l1", "d3 l2", "d4", "d4 l2",
                            "g1", "g2", "g3", "g4", "g5", "g6", "u l3", "u d2 l2"]) {
            const span = document.createElement("span");
            span.className = "t " + name;
            box.append(span);
            const style = getComputedStyle(span), page = getComputedStyle(document.body).backgroundColor;
            results[name] = [style.color, style.backgroundColor.includes(", 0)") ? page : style.backgroundColor];
            span.remove();
        }
        return results;
    }""")

    def light(colour):
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue + 0.05

    ratios = {name: max(light(a), light(b)) / min(light(a), light(b)) for name, (a, b) in found.items()}
    assert min(ratios.values()) >= 4.5, {name: ratio for name, ratio in ratios.items() if ratio < 4.5}


@pytest.mark.parametrize("names", [("own",), ("own", "other")])
def test_browser_on_a_phone(show, names):
    page = show(*names, width=380, has_touch=True, is_mobile=True)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert not page.locator("#details").is_visible()
    page.locator(".row").first.locator(".t").nth(4).tap()
    assert page.locator("#details").is_visible()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.locator("#details .close").tap()
    assert not page.locator("#details").is_visible()


def test_browser_twenty_thousand_tokens(show):
    page = show("large")
    assert page.evaluate("performance.getEntriesByName('interactive')[0].startTime") < 10_000
    spent = page.evaluate("""() => {
        const start = performance.now();
        document.querySelector("[data-filter=broken]").click();
        document.body.offsetHeight;
        return performance.now() - start;
    }""")
    assert spent < 2000  # milliseconds; a tenth of it on a machine with nothing else to do
    page.locator(".row:not([hidden]) .t:not(.h)").last.scroll_into_view_if_needed()


def test_written_as_given(files, tmp_path):
    """Half a surrogate pair, which JSON can name and UTF-8 cannot hold, does not keep the page from being written."""
    traced = load_trace(files["own"])
    text = replace(traced.texts[0], pieces=["\ud800", *traced.texts[0].pieces[1:]])
    write_lens(
        [Trace(traced.header | {"model": "\ud800"}, [text, *traced.texts[1:]], traced.strings)], tmp_path / "p.html"
    )
    assert Page(tmp_path / "p.html").data["strings"][0] == "\ud800"
