"""Recorded samples as a page, or as a picture that moves.

    python sample.py --race --save=race.json
    python study/page.py race.json [MORE.json ..] -o page/      one file, page/index.html
    python study/page.py race.json --svg=race.svg               animated, without a script
    python sample.py --race --save=race.svg                     the same at once

The page opens from a file and loads nothing: the recordings are in it. It plays in recorded time
or by passes. The picture shows the first runs of a file, slowed down by a power of two that it
names.

A recording (sample.py --save=FILE.json): {"format": 1, "tokens": {id: bytes as Latin-1}, "mask":
-1, "runs": [{"name", "script", "parameters", "sampler", "seed", "device", "sample", "length",
"known": [[position, id] ..], "nfe", "seconds", "frames": [[pass, milliseconds, [[position, id] ..]]
..]}]}. Known tokens alone are there first; a frame says what a pass changed, id -1: masked again;
after the last one stands the sample.

Samples (sample.py --save=FILE.jsonl): a line about each run, from name to device as above,
checkpoint (sha256), tokenizer; and one a sample: i, text, tokens, nfe, ended.
"""
import codecs
import hashlib
import html
import json
import math
import sys
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from study.golf import UserError, require, run_cli  # noqa: E402

FORMAT, MASK, MAX_BYTES = 1, -1, 300_000
LABELS = {"train_mdlm": "masked diffusion", "train_block": "block diffusion",
          "train_sedd": "score entropy diffusion", "gpt": "autoregressive"}

# ----------------------------------------------------------------------------- recordings
def save(path, runs):
    """Write what the runs of sample.py have done: FILE.json, FILE.svg, or samples as JSON lines."""
    lines, entries, tokenizer = [], [], runs[0].lm.tokenizer
    for run in runs:
        lm = run.lm
        name = lm.path.stem if lm.path.stem != "ckpt" else lm.path.absolute().parent.name
        about = dict(name=name, script=lm.name, parameters=lm.n_parameters,
                     sampler=lm.describe(run.opts), seed=run.opts.seed, device=lm.where)
        sha256 = hashlib.sha256(lm.path.read_bytes()).hexdigest()
        lines.append({**about, "checkpoint": sha256, "tokenizer": tokenizer.name})
        for i, done in enumerate(run.done):
            lines.append(dict(i=i, text=tokenizer.decode(done.tokens), tokens=done.tokens,
                              nfe=done.nfe, ended=done.ended))
            known, frames = changes_of(done, tokenizer)
            entries.append(about | dict(sample=i, length=len(done.tokens), known=known,
                                        nfe=done.nfe, seconds=done.seconds, frames=frames))
    changes = [x["known"] for x in entries] + [f[2] for x in entries for f in x["frames"]]
    used = sorted({token for change in changes for _, token in change} - {MASK})
    tokens = {str(i): tokenizer.shown[i].decode("latin-1") for i in used}
    recording = dict(format=FORMAT, mask=MASK, tokens=tokens, runs=entries)
    if path.endswith(".svg"):  # the first sample of each model
        text = svg(recording | {"runs": [entry for entry in entries if entry["sample"] == 0]})
    elif path.endswith(".json"):
        text = json.dumps(recording) + "\n"
    else:
        text = "".join(json.dumps(line) + "\n" for line in lines)
    Path(path).write_text(text, encoding="utf-8")

def load(path):
    """A recording; UserError if it is none."""
    with open(path, encoding="utf-8") as f:
        try:
            race = json.load(f)
            require((race["format"], race["mask"]) == (FORMAT, MASK), "another format")
            require(race["runs"], "no run in it")
            for run in race["runs"]:  # a picture takes all that there is
                svg(race | {"runs": [run]})
            return race
        except Exception as e:  # a file may hold anything
            line = f"{path}: not a recording of sample.py ({type(e).__name__}: {e})"
            raise UserError(line) from None

def changes_of(done, tokenizer):
    """What is known at the beginning of a sample, and its frames."""
    mask_id, n = len(tokenizer.shown) - 1, len(done.tokens)
    rows = [rows[done.row][:n] for _, _, rows in done.passes]
    known, frames = [[at, token] for at, token in enumerate(rows[0]) if token != mask_id], []
    for (nfe, seconds, _), (before, row) in zip(done.passes[1:], pairwise(rows), strict=True):
        changes = [[at, MASK if token == mask_id else token]
                   for at, (old, token) in enumerate(zip(before, row, strict=True)) if token != old]
        frames += [[nfe, round(1000 * seconds, 3), changes]] if changes else []
    return known, frames

def replay(run):
    """The tokens of the last picture, MASK where none was fixed."""
    row = [MASK] * run["length"]
    for changes in (run["known"], *(frame[2] for frame in run["frames"])):
        for position, token in changes:
            row[position] = token
    return row

def letters(row, tokens):
    """The text of each token of a row: a character belongs to the token that completes it."""
    decoder, texts = codecs.getincrementaldecoder("utf-8")("replace"), []
    for token in row:
        word = b"" if token == MASK else tokens[str(token)].encode("latin-1")
        texts.append(decoder.decode(word, final=not word))
    return texts

def page(races, titles):
    """-> HTML. "<" is escaped, so that no text ends the element that it stands in."""
    data = [race | {"title": title} for race, title in zip(races, titles, strict=True)]
    data = {"labels": LABELS, "files": data}
    data = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    return template.replace("null</script>", data + "</script>")

# ----------------------------------------------------------------------------- picture
WIDTH, MARGIN, CELL, LINE = 860, 24, 7.8, 19  # pixels
COLUMNS = 2  # runs side by side
SHORTEST, HOLD, FADE = 5.0, 3.0, 0.5  # seconds: of the slowest run, of the end, of a new token
TICKS = 80  # moments that the slowest run is cut into

def wrap(texts, width):
    """[(column, line)] of each token's text, words kept whole, and the number of lines."""
    chars = [(char, i) for i, text in enumerate(texts) for char in text or " "]
    where, column, line = {}, 0, 0
    for at, (char, i) in enumerate(chars):
        if char not in " \n" and (at == 0 or chars[at - 1][0] in " \n"):  # a word begins
            end = at
            while end < len(chars) and chars[end][0] not in " \n":
                end += 1
            if column and column + min(end - at, width) > width:
                column, line = 0, line + 1
        if column >= width and char not in " \n":  # which may stand out
            column, line = 0, line + 1
        where.setdefault(i, (column, line))
        column, line = (0, line + 1) if char == "\n" else (column + 1, line)
    return [where[i] for i in range(len(texts))], line + 1

def intervals(run):
    """[(position, token, first, last)]: what stood where, in milliseconds; last None: to stay."""
    row = [(MASK, 0)] * run["length"]
    row = dict(enumerate(row)) | {position: (token, None) for position, token in run["known"]}
    for _, now, changes in run["frames"]:
        for position, token in changes:
            before, since = row[position]
            if token != before:
                if since is not None:
                    yield position, before, since, now
                row[position] = token, now
    for position, (token, since) in row.items():
        yield position, token, since, None

def draw_run(run, tokens, x0, y0, columns, timing):
    """-> (SVG of a run, its height); timing(first, last) gives the class that shows it."""
    final = letters(replay(run), tokens)
    where, n_lines = wrap(final, columns)
    groups = defaultdict(list)  # (class, line) -> characters and where they stand
    for position, token, first, last in intervals(run):
        text = final[position] if last is None else letters([token], tokens)[0]
        text = "░" if token == MASK else "".join(
            c if c.isprintable() else "" if c == "\n" else "\ufffd" for c in text)
        text = text if last is None else text[:max(1, len(final[position]))]
        column, line = where[position]
        name = "k" if first is None else timing(first, last) + " m" * (token == MASK)
        groups[name, line] += [(column + i, char) for i, char in enumerate(text) if char != " "]
    body = []
    for (name, line), chars in groups.items():
        if chars:
            xs = " ".join(f"{x0 + column * CELL:.4g}" for column, _ in chars)
            text = html.escape("".join(char for _, char in chars), quote=False)
            body.append(f'<text class="{name}" x="{xs}" y="{y0 + line * LINE}">{text}</text>')
    return "\n".join(body), n_lines * LINE

def facts(run):
    n = run["length"] - len(run["known"])
    return (f"{run['nfe']} passes · {run['seconds']:.2f} s · {n / run['seconds']:.0f} tokens/s · "
            f"{run['parameters'] / 1e6:.2f}M parameters")

def end_of(run):
    """In milliseconds; a sample may be empty."""
    return run["frames"][-1][1] if run["frames"] else 0.0

def svg(race):
    """The first COLUMNS runs of a recording, animated by style sheets alone: what stands in an
    <img> may run no script. The end stays where motion is to be reduced."""
    runs = race["runs"][:COLUMNS]
    longest = max(1.0, *map(end_of, runs)) / 1000
    slow = 2 ** max(0, math.ceil(math.log2(SHORTEST / longest)))
    total = slow * longest + HOLD
    classes = {}

    def share(milliseconds):  # of the whole animation, in percent, on a tick
        tick = math.ceil(milliseconds / 1000 / longest * TICKS)
        return 100 * slow * longest * tick / TICKS / total

    def timing(first, last):
        span = share(first), None if last is None else share(last)
        return classes.setdefault(span, f"a{len(classes)}")

    width = (WIDTH - (len(runs) + 1) * MARGIN) / len(runs)
    parts, height = [], 0
    for i, run in enumerate(runs):
        x = MARGIN + i * (width + MARGIN)
        text, tall = draw_run(run, race["tokens"], x, 96, int(width / CELL), timing)
        height, end = max(height, tall), share(end_of(run))
        label = f"{LABELS.get(run['script'], run['script'])}, {run['sampler'].replace('_', '-')}"
        parts.append(
            f'<text class="h" x="{x:.4g}" y="34">{html.escape(label)}</text>'
            f'<text class="s" x="{x:.4g}" y="53">{facts(run)}</text>'
            f'<rect class="l" x="{x:.4g}" y="64" width="{width:.4g}" height="3" rx="1.5"/>'
            f'<rect class="b" x="{x:.4g}" y="64" width="{width:.4g}" height="3" rx="1.5" style="'
            f'transform-origin:{x:.4g}px;animation:p{i} {total:.2f}s linear infinite"/>'
            f"<style>@keyframes p{i}{{0%{{transform:scaleX(0)}}{end:.2f}%{{transform:scaleX(1)}}}}"
            f"</style>\n{text}")
    frames = []
    for (first, last), name in classes.items():
        shown = f"{first:.2f}%{{opacity:1;fill:var(--new)}}" if first else "0%{opacity:1}"
        if first:
            shown = f"0%,{first - 0.01:.2f}%{{opacity:0}}{shown}"
        if last is None:
            shown += f"{min(99.9, first + 100 * FADE / total):.2f}%{{fill:var(--ink)}}"
        else:
            shown += f"{last - 0.01:.2f}%{{opacity:1}}{last:.2f}%,100%{{opacity:0}}"
            frames.append(f".{name}{{opacity:0}}")
        frames.append(f"@keyframes {name}{{{shown}}}.{name}{{animation:{name} {total:.2f}s linear "
                      "infinite}")
    speed = "in real time" if slow == 1 else f"at 1/{slow} of real speed"
    speed += html.escape(f", {runs[0]['device']}" if runs[0].get("device") else "")
    bottom = 96 + height + 18
    style = Path(__file__).with_name("race.css").read_text(encoding="utf-8")
    return "\n".join((
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + 14}" role="img">',
        f"<title>Text appearing, {speed}</title>",
        "<style>", *frames, style, "</style>",
        f'<rect class="c" x=".5" y=".5" width="{WIDTH - 1}" height="{bottom + 13}" rx="10"/>',
        *parts, f'<text class="s" x="{MARGIN}" y="{bottom}">{speed}</text></svg>', ""))

def write(flags):
    require(flags.files and (flags.out or flags.svg), "RECORDING.json .. -o FOLDER, or --svg=FILE")
    races, written = [load(path) for path in flags.files], {}
    if flags.svg:
        written[Path(flags.svg)] = svg(races[0])
    if flags.out:
        titles = [Path(path).stem for path in flags.files]
        written[Path(flags.out, "index.html")] = page(races, titles)
    for path, text in written.items():
        size = len(text.encode())
        require(size < MAX_BYTES, f"{path}: {size:,} bytes, {MAX_BYTES:,} at most: record fewer "
                "runs, tokens or passes")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(f"{path}: {size:,} bytes")

def main(argv):
    run_cli("page.py", write, argv, __doc__, out="", svg="")

if __name__ == "__main__":
    main(sys.argv[1:])
