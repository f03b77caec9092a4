"""Recordings: the picture, the page in a real browser; the folder for the hub."""
import json
import os
import re
import shutil
import subprocess
import time
import types
import xml.etree.ElementTree as ElementTree

import pytest
import runs
from test_golf import make_checkpoint

import sample
from study import page, publish

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome",
                                                "chrome"))), None)
TEXT = "é <script>alert(1)</script> & 'tis\n</script> wörld \x07"


def recording(path):
    """A text written from right to left, one byte of it masked again and changed; and one token by
    token, whose last one is the end of a document."""
    data = list(TEXT.encode())
    back = [[n + 1, 10.5 * n, [[i, data[i]]]] for n, i in enumerate(reversed(range(3, len(data))))]
    back[20][2].append([len(data) - 1, -1])
    back.append([len(data), 900.0, [[len(data) - 1, data[-1]]]])
    forth = [[i + 1, 20.0 * i, [[i, token]]] for i, token in enumerate([*data, 0])]
    both = {"script": "train_mdlm", "parameters": 3_220_000, "sampler": "by hand", "seed": 0,
            "sample": 0, "nfe": len(data), "seconds": 1.0}
    race = {"format": 1, "mask": -1,
            "tokens": {str(i): chr(i) if i else "" for i in {0, *data}},
            "runs": [both | {"name": "<b>back</b>", "known": [[i, data[i]] for i in range(3)],
                             "length": len(data), "frames": back},
                     both | {"name": "forth", "known": [], "length": len(data) + 1,
                             "frames": forth}]}
    path.write_text(json.dumps(race))
    return race


def call(main, *flags):
    return runs.train(*flags, script=types.SimpleNamespace(main=main))


def test_the_files_hold_the_recording(tmp_path):
    race = recording(tmp_path / "race.json")
    for run in race["runs"]:
        assert "".join(page.letters(page.replay(run), race["tokens"])) == TEXT
    done = call(page.main, tmp_path / "race.json", "-o", tmp_path, f"--svg={tmp_path / 'race.svg'}")
    assert done.status == 0, done.err
    text = (tmp_path / "index.html").read_text()
    data, = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text)
    assert json.loads(data) == [race | {"title": "race"}]
    assert not re.search(r"(src|href)=.(?!data:)|https?:|@import|innerHTML", text)
    picture = (tmp_path / "race.svg").read_text()
    shown = [e for e in ElementTree.fromstring(picture).iter() if e.tag.endswith("text")]
    cells = {(float(x), float(e.get("y"))): c for e in shown[2:-1] for x, c in zip(
        e.get("x").split(), e.text, strict=False) if " m" not in e.get("class")}
    left = [c for (x, y), c in sorted(cells.items(), key=lambda k: k[0][::-1]) if x < 430]
    assert "".join(left) == re.sub(r"\s", "", TEXT).replace("\x07", "\ufffd")
    assert "<script" not in picture and "prefers-reduced-motion" in picture
    for bad in ("{", "[]", "{}", json.dumps(race | {"tokens": {}}), "[" * 10**5):
        (tmp_path / "bad.json").write_text(bad)
        done = call(page.main, tmp_path / "bad.json", "-o", tmp_path)
        assert done.status == 2 and done.err.count("\n") == 1 and "bad.json: " in done.err


class Browser:
    """Chromium's own protocol: JSON, each message ended by a NUL byte, on the files 3 and 4."""
    def __init__(self, folder):
        pipes = [*os.pipe(), *os.pipe()]
        command = 'exec "$0" --headless --no-sandbox --disable-gpu --remote-debugging-pipe ' \
                  f'--user-data-dir="{folder}" 3<&{pipes[0]} 4>&{pipes[3]} 2>&-'
        self.process = subprocess.Popen(["bash", "-c", command, CHROMIUM],
                                        pass_fds=(pipes[0], pipes[3]))
        os.close(pipes[0])
        os.close(pipes[3])
        self.reader, self.writer = os.fdopen(pipes[2], "rb", 0), os.fdopen(pipes[1], "wb", 0)
        self.events, self.n, self.session = [], 0, {}
        target = self.call("Target.createTarget", url="about:blank")
        self.session = {"sessionId": self.call("Target.attachToTarget", flatten=True,
                                               **target)["sessionId"]}
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        self.n += 1
        message = {"id": self.n, "method": method, "params": params, **self.session}
        self.writer.write(json.dumps(message).encode() + b"\0")
        while True:
            text = b""
            while not text.endswith(b"\0"):
                text += self.reader.read(1)
            reply = json.loads(text[:-1])
            if reply.get("id") == self.n:
                return reply["result"]
            self.events.append(reply["method"])

    def value(self, code):
        return self.call("Runtime.evaluate", expression=code, returnByValue=True)["result"]["value"]

    def wait_for(self, code):
        end = time.monotonic() + 30
        while not self.value(code):
            assert time.monotonic() < end, code


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
def test_the_page_in_a_browser(tmp_path):
    recording(tmp_path / "race.json")
    call(page.main, tmp_path / "race.json", "-o", tmp_path)
    browser = Browser(tmp_path / "profile")
    try:
        browser.call("Page.navigate", url=f"file://{tmp_path / 'index.html'}")
        browser.wait_for("document.readyState === 'complete' && clock >= end")  # it plays by itself
        texts = "[...document.querySelectorAll('#race .text:not(.ghost)'), $('sample')]"
        shown = f"JSON.stringify({texts}.map(e => e.textContent))"
        assert json.loads(browser.value(shown)) == 3 * [TEXT]
        for key, code in (("ArrowLeft", 37), ("Home", 36), (" ", 32)):
            browser.call("Input.dispatchKeyEvent", type="keyDown", key=key,
                         windowsVirtualKeyCode=code)
        browser.wait_for("clock >= end && $('play').textContent === 'Play'")
        assert browser.value("$('sample').textContent") == TEXT[:-1] + "░"
        browser.value("setMode(true); seek(5); 0")
        assert json.loads(browser.value(shown))[1].startswith("é <s░")
        for width in (1200, 360):
            browser.call("Emulation.setDeviceMetricsOverride", width=width, height=800, mobile=True,
                         deviceScaleFactor=1)
            assert browser.value("document.documentElement.scrollWidth") <= width
        problems = {"Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"}
        assert not problems & set(browser.events)
    finally:
        browser.process.kill()


def test_the_folder_for_the_hub(tmp_path):
    """Weights alone, a card with the log's figures, a tokenizer that cuts text as ours does."""
    tokenizers = pytest.importorskip("tokenizers")
    ckpt = make_checkpoint(tmp_path / "ckpt.pt", "train_mdlm", n_layer=1)
    words = [b"", *(bytes([i]) for i in range(1, 256)), b" t", b"he", b" the", b"in", b"ing"]
    meta = {"tokenizer": "bpe:261", "pattern": sample.PATTERNS[-1], "vocab_size": len(words),
            "token_bytes": [word.decode("latin-1") for word in words]}
    saved = publish.tokenizer_json(ckpt["meta"] | meta)
    theirs = tokenizers.Tokenizer.from_str(json.dumps(saved))
    ours = sample.Tokenizer(ckpt["meta"] | meta, len(words))
    for text in ("the thing, in the tin: hé hething", " then\n\nthinging  the"):
        assert theirs.encode(text).ids == ours.encode(text) and theirs.decode(
            ours.encode(text)) == text
    record = {"val_nelbo": 2.0, "se": 0.01, "bpb": 2.9, "tokens": 512, "draws": 1}
    (tmp_path / "log.jsonl").write_text('{"loss": 3.0}\n' + json.dumps(record) + "\n")
    out = tmp_path / "hub"
    done = call(publish.main, f"--ckpt={tmp_path}", "--repo=me/small", f"--out={out}",
                "--dry_run=1")
    assert done.status == 0, done.err
    assert {p.name for p in out.iterdir()} == {"ckpt.pt", "config.json", "tokenizer.json",
                                               "README.md"}
    lm = sample.load(out)
    assert lm.generate(length=16) == sample.load(tmp_path / "ckpt.pt").generate(length=16)
    theirs = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
    assert theirs.encode("né\n").ids == list("né\n".encode())
    card = (out / "README.md").read_text()
    for part in ("at most 2.0000 ± 0.0100", "2.9000", "hf:me/small", "--n_layer=1", "--n_embd=32"):
        assert part in card
    assert call(publish.main, "--repo=small").status == 2
