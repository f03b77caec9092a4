"""Recordings: the picture, the page in a real browser; the folder for the hub."""
import html
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree

import pytest
from test_golf import call, make_checkpoint

import prepare_data
import sample
from study import page, publish

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
TEXT = "é <script>alert(1)</script> & 'tis\n</script> wörld \x07"

def recording(path):
    """A text written from right to left, one byte of it masked again on the way; and from left to
    right, up to the end of a document."""
    data = list(TEXT.encode())
    back = [[n + 1, 10.5 * n, [[i, data[i]]]] for n, i in enumerate(reversed(range(3, len(data))))]
    back[20][2].append([len(data) - 1, -1])
    back.append([len(data), 900.0, [[len(data) - 1, data[-1]]]])
    forth = [[i + 1, 20.0 * i, [[i, token]]] for i, token in enumerate([*data, 0])]
    both = {"script": "train_mdlm", "parameters": 3_220_000, "sampler": "by hand", "seed": 0,
            "sample": 0, "nfe": len(data), "seconds": 1.0}
    race = {"format": 1, "mask": -1, "tokens": {str(i): chr(i) if i else "" for i in {0, *data}},
            "runs": [both | {"name": "<b>back</b>", "known": [[i, data[i]] for i in range(3)],
                             "length": len(data), "frames": back},
                     both | {"name": "forth", "known": [], "length": len(data) + 1,
                             "frames": forth}]}
    path.write_text(json.dumps(race))
    return race

def test_the_files_hold_the_recording(tmp_path):
    race, picture = recording(tmp_path / "race.json"), tmp_path / "race.svg"
    done = call(tmp_path / "race.json", "-o", tmp_path, f"--svg={picture}", main=page.main)
    assert done.status == 0, done.err
    text = (tmp_path / "index.html").read_text()
    data, = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text)
    assert json.loads(data)["files"] == [race | {"title": "race"}]
    assert not re.search(r"(src|href)=.(?!data:)|https?:|@import|innerHTML", text)
    shown = [e for e in ElementTree.parse(picture).iter() if e.tag.endswith("text")]
    cells = {(float(e.get("y")), float(x)): c for e in shown[2:-1] for x, c in zip(
        e.get("x").split(), e.text, strict=False) if " m" not in e.get("class")}
    left = "".join(c for (_, x), c in sorted(cells.items()) if x < 430)
    assert left == re.sub(r"\s", "", TEXT).replace("\x07", "\ufffd")
    empty = race["runs"][0] | {"length": 0, "known": [], "frames": []}  # ended at once
    assert page.svg(race | {"runs": [empty]}).endswith("</svg>\n")
    for bad in ("{", "[]", "{}", json.dumps(race | {"tokens": {}}), "[" * 10**5):
        (tmp_path / "bad.json").write_text(bad)
        done = call(tmp_path / "bad.json", "-o", tmp_path, main=page.main)
        assert done.status == 2 and done.err.count("\n") == 1 and "bad.json: " in done.err

BEFORE = """<script>  // a clock that the probe winds
let now = 0, frames = [];
performance.now = () => now;
window.requestAnimationFrame = f => frames.push(f);
const run = () => { while (frames.length) { now += 16; frames.shift()(); } };
</script>"""
PROBE = """<script>
const texts = () => [...document.querySelectorAll("#race .text:not(.ghost)"), $("sample")]
  .map(e => e.textContent), press = key => dispatchEvent(new KeyboardEvent("keydown", {key}));
run();  // it plays by itself
const seen = [texts()];
["ArrowLeft", "Home", " "].forEach(press);
seen.push(texts());
run();
seen.push(texts(), $("play").textContent);
setMode(true);
seek(5);
seen.push(texts());
document.documentElement.style.width = "360px";
seen.push(document.body.scrollWidth);
document.title = JSON.stringify(seen);
</script>"""

@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
def test_the_page_in_a_browser(tmp_path):
    recording(tmp_path / "race.json")
    call(tmp_path / "race.json", "-o", tmp_path, main=page.main)
    text = (tmp_path / "index.html").read_text().replace("<script>", BEFORE + "<script>", 1)
    (tmp_path / "probe.html").write_text(text + PROBE)
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
         f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom",
         (tmp_path / "probe.html").as_uri()], capture_output=True, text=True, timeout=60)
    assert "CONSOLE" not in done.stderr  # no error, no warning
    played, home, again, button, by_pass, width = json.loads(
        html.unescape(re.search("<title>(.*)</title>", done.stdout)[1]))
    assert played == 3 * [TEXT] and again == [TEXT, TEXT, TEXT[:-1] + "░"] and button == "Play"
    assert "░" in home[0] and by_pass[1].startswith("é <s░") and width <= 360

def test_the_folder_for_the_hub(tmp_path):
    """Weights alone, a card with the log's figures, a tokenizer that cuts text as ours does."""
    tokenizers = pytest.importorskip("tokenizers")
    ckpt = make_checkpoint(tmp_path / "ckpt.pt", "train_mdlm", n_layer=1, init_from="a.pt")
    out = tmp_path / "hub"
    words = [b"", *(bytes([i]) for i in range(1, 256)), b" t", b"he", b" the", b"in", b"ing"]
    meta = ckpt["meta"] | {"tokenizer": "bpe:261", "pattern": prepare_data.GPT2_PATTERN,
                           "token_bytes": [word.decode("latin-1") for word in words]}
    theirs = tokenizers.Tokenizer.from_str(json.dumps(publish.tokenizer_json(meta)))
    for text in ("the thing, in the tin: hé hething", " then\n\nthinging  the"):
        tokens = sample.Tokenizer(meta, len(words)).encode(text)
        assert theirs.encode(text).ids == tokens and theirs.decode(tokens) == text
    lines = [f"step:{i}/7 val_nelbo:{i}.0000+-0.0100 bpb:2.9000 ppl:9.0000 tokens:512 bytes:512 "
             "train_time:1ms" for i in (1, 2)]
    (tmp_path / "log.txt").write_text("\n".join(["source", *lines, "step:3/7 loss:1.0"]))
    done = call(f"--ckpt={tmp_path}", "--repo=me/small", f"--out={out}", "--dry_run=1",
                main=publish.main)
    assert done.status == 0, done.err
    files = {p.name for p in out.iterdir()}
    assert files == {"ckpt.pt", "config.json", "tokenizer.json", "README.md"}
    assert sample.load(out).generate(length=16) == sample.load(tmp_path).generate(length=16)
    theirs = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
    assert theirs.encode("né\n").ids == list("né\n".encode())
    card = (out / "README.md").read_text()
    for part in ("at most 2.0000 ± 0.0100", "hf:me/small", "--n_layer=1", "--init_from=a.pt"):
        assert part in card
    assert call("--repo=small", main=publish.main).status == 2
