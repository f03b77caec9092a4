"""Recordings: the picture, the page in a real browser; the folder for the hub."""
import json
import os
import re
import shutil
import subprocess
import time
import xml.etree.ElementTree as ElementTree

import pytest
from test_golf import call, make_checkpoint

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
    for bad in ("{", "[]", "{}", json.dumps(race | {"tokens": {}}), "[" * 10**5):
        (tmp_path / "bad.json").write_text(bad)
        done = call(tmp_path / "bad.json", "-o", tmp_path, main=page.main)
        assert done.status == 2 and done.err.count("\n") == 1 and "bad.json: " in done.err


class Browser:
    """Chromium's own protocol: JSON, each message ended by a NUL byte, on the files 3 and 4."""
    def __init__(self, folder):
        (self.theirs_in, self.ours_out), (self.ours_in, self.theirs_out) = os.pipe(), os.pipe()
        command = (f'exec {CHROMIUM} --headless --no-sandbox --disable-gpu --remote-debugging-pipe '
                   f'--user-data-dir={folder} 3<&{self.theirs_in} 4>&{self.theirs_out} 2>&-')
        self.process = subprocess.Popen(command, shell=True, executable="bash",
                                        pass_fds=(self.theirs_in, self.theirs_out))
        self.events, self.session = [], {}
        target = self.call("Target.createTarget", url="about:blank")
        self.session = self.call("Target.attachToTarget", flatten=True, **target)
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        message = {"id": 1, "method": method, "params": params, **self.session}
        os.write(self.ours_out, json.dumps(message).encode() + b"\0")
        while True:
            text = b"".join(iter(lambda: os.read(self.ours_in, 1), b"\0"))
            reply = json.loads(text)
            if "id" in reply:
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
    call(tmp_path / "race.json", "-o", tmp_path, main=page.main)
    browser = Browser(tmp_path / "profile")
    try:
        browser.call("Page.navigate", url=f"file://{tmp_path / 'index.html'}")
        browser.wait_for("document.readyState === 'complete'")
        browser.wait_for("$('speed').value = 2, clock >= end")  # it plays by itself
        texts = "[...document.querySelectorAll('#race .text:not(.ghost)'), $('sample')]"
        assert browser.value(f"{texts}.map(e => e.textContent)") == 3 * [TEXT]
        for key, code in (("ArrowLeft", 37), ("Home", 36), (" ", 32)):
            browser.call("Input.dispatchKeyEvent", type="keyDown", key=key,
                         windowsVirtualKeyCode=code)
        browser.wait_for("clock >= end && $('play').textContent === 'Play'")
        assert browser.value("$('sample').textContent") == TEXT[:-1] + "░"
        browser.value("setMode(true); seek(5); 0")
        assert browser.value(f"{texts}[1].textContent").startswith("é <s░")
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
    ckpt, out = make_checkpoint(tmp_path / "ckpt.pt", "train_mdlm", n_layer=1), tmp_path / "hub"
    words = [b"", *(bytes([i]) for i in range(1, 256)), b" t", b"he", b" the", b"in", b"ing"]
    meta = ckpt["meta"] | {"tokenizer": "bpe:261", "pattern": sample.PATTERNS[-1],
                           "token_bytes": [word.decode("latin-1") for word in words]}
    theirs = tokenizers.Tokenizer.from_str(json.dumps(publish.tokenizer_json(meta)))
    for text in ("the thing, in the tin: hé hething", " then\n\nthinging  the"):
        tokens = sample.Tokenizer(meta, len(words)).encode(text)
        assert theirs.encode(text).ids == tokens and theirs.decode(tokens) == text
    record = {"val_nelbo": 2.0, "se": 0.01, "bpb": 2.9, "tokens": 512, "draws": 1}
    (tmp_path / "log.jsonl").write_text('{"loss": 3.0}\n' + json.dumps(record) + "\n")
    done = call(f"--ckpt={tmp_path}", "--repo=me/small", f"--out={out}", "--dry_run=1",
                main=publish.main)
    assert done.status == 0, done.err
    files = {p.name for p in out.iterdir()}
    assert files == {"ckpt.pt", "config.json", "tokenizer.json", "README.md"}
    assert sample.load(out).generate(length=16) == sample.load(tmp_path).generate(length=16)
    theirs = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
    assert theirs.encode("né\n").ids == list("né\n".encode())
    card = (out / "README.md").read_text()
    for part in ("at most 2.0000 ± 0.0100", "2.9000", "hf:me/small", "--n_layer=1", "--n_embd=32"):
        assert part in card
    assert call("--repo=small", main=publish.main).status == 2
