"""The training scripts share every byte outside their docstring and their two objective regions,
and no file grows beyond what a person reads in one sitting.

    python tests/test_shared.py                          lines and tokens of every file
    python tests/test_shared.py --write train_mdlm.py    copy its shared text to the other scripts
"""
import ast
import difflib
import itertools
import re
import sys
import token
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("train_mdlm.py", "gpt.py", "train_block.py", "train_sedd.py")
OPEN, CLOSE = "# >>> objective", "# <<< objective"
DOCSTRING = re.compile(r'(""".*?"""\n)', re.S)

# Lines, and Python tokens without comments and line ends, at the most.
LIMITS = {
    "train_mdlm.py": (880, 8300),
    "gpt.py": (790, 7400),
    "train_sedd.py": (920, 9000),
    "train_block.py": (920, 9000),
    "sample.py": (1150, 11_500),
    "prepare_data.py": (620, 6000),
}
TESTS_LINES = 7000
FUNCTION_LINES, MAIN_LINES, LOOP_LINES = 90, 190, 75
NO_TOKEN = (token.NEWLINE, tokenize.NL, tokenize.COMMENT, tokenize.ENCODING, token.INDENT,
            token.DEDENT, token.ENDMARKER)

def size(path):
    """(lines, tokens) of a Python file."""
    with open(path, encoding="utf-8") as f:
        tokens = [t for t in tokenize.generate_tokens(f.readline) if t.type not in NO_TOKEN]
    return len(path.read_text(encoding="utf-8").splitlines()), len(tokens)

@pytest.mark.parametrize("name", LIMITS)
def test_no_file_outgrows_its_reader(name):
    lines, tokens = size(ROOT / name)
    assert (lines, tokens) <= LIMITS[name] and tokens <= LIMITS[name][1], (lines, tokens)

@pytest.mark.parametrize("name", LIMITS)
def test_no_function_outgrows_a_screen(name):
    for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            n_lines = node.end_lineno - node.lineno + 1
            assert n_lines <= (MAIN_LINES if node.name == "main" else FUNCTION_LINES), node.name
        elif isinstance(node, ast.While):  # over steps
            assert node.end_lineno - node.lineno < LOOP_LINES, name

def test_tests_and_records_stay_small():
    for folder, limit in (("tests", TESTS_LINES), ("records", 650)):
        lines = sum(size(path)[0] for path in (ROOT / folder).glob("*.py"))
        assert lines <= limit, folder

class Broken(ValueError):
    """A script whose shared text cannot be told from its own."""

def split(path):
    """A script -> [docstring, shared, region of Config, shared, region of the body, shared]."""
    text = path.read_bytes().decode("utf-8")  # as it is: line ends are part of the text
    doc = DOCSTRING.match(text)
    if doc is None:
        raise Broken(f"{path.name}: does not begin with a docstring")
    parts, marks = [""], []
    for line in text[doc.end():].splitlines(keepends=True):
        mark = line.strip()
        marks += [mark] * (mark in (OPEN, CLOSE))
        if mark == CLOSE:
            parts.append("")  # the marks are shared, what lies between them is not
        parts[-1] += line
        if mark == OPEN:
            parts.append("")
    if marks != 2 * [OPEN, CLOSE]:
        raise Broken(f"{path.name}: {', '.join(marks) or 'no mark'}: expected two regions, "
                     f"each from '{OPEN}' to '{CLOSE}'")
    return [doc[0], *parts]

def training_scripts(folder):
    return [folder / name for name in SCRIPTS if (folder / name).exists()]

def shared_diff(a, b):
    """What differs outside the regions, as a unified diff; '' when nothing does."""
    texts = []
    for path in (a, b):
        parts = split(path)
        parts[::2] = '"""Docstring."""\n', *2 * ["[objective]\n"]
        texts.append("".join(parts).splitlines(keepends=True))
    return "".join(difflib.unified_diff(*texts, a.name, b.name))

def write(source, folder):
    """Give all other scripts the shared text of one -> names of those that changed."""
    shared, changed = split(source)[1::2], []
    others = [p for p in training_scripts(folder) if p.name != source.name]
    for path, parts in [(path, split(path)) for path in others]:  # all are read before one changes
        before = "".join(parts)
        parts[1::2] = shared
        if "".join(parts) != before:
            path.write_bytes("".join(parts).encode("utf-8"))
            changed.append(path.name)
    return changed

def main(argv, folder=ROOT):
    if not argv:
        for name, limit in LIMITS.items():
            print("{:16} {:5} lines of {:5}, {:6} tokens of {:6}".format(
                name, *itertools.chain(*zip(size(ROOT / name), limit, strict=True))))
        return
    if len(argv) != 2 or argv[0] != "--write" or Path(argv[1]).name not in SCRIPTS:
        print(f"test_shared.py: usage: --write SCRIPT, one of {', '.join(SCRIPTS)}",
              file=sys.stderr)
        raise SystemExit(2)
    try:
        changed = write(folder / Path(argv[1]).name, folder)
    except (Broken, OSError) as error:
        print(f"test_shared.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print("changed: " + (", ".join(changed) or "nothing"))

def test_scripts_share_their_text():
    first, *others = training_scripts(ROOT)
    split(first)
    for path in others:
        diff = shared_diff(first, path)
        print(diff)  # line ends that differ show here as they are
        assert not diff, f"{first.name} and {path.name} differ:\n{diff}"

# The tool itself, on scripts in small.
SMALL = '''"""About {own}."""
import os

class Config:
    # >>> objective
    {own}: int = 1
    # <<< objective

# >>> objective
def loss():
    return "{own}"
# <<< objective

def main():
    loss()
'''

@pytest.fixture
def folder(tmp_path):
    for name in SCRIPTS[:3]:
        (tmp_path / name).write_text(SMALL.format(own=name[:-3]))
    return tmp_path

def edit(path, old, new):
    text = path.read_bytes().decode()
    assert text.count(old) == 1
    path.write_bytes(text.replace(old, new).encode())

@pytest.mark.parametrize(("old", "new"), [
    ("import os", "import sys"), ("    loss()\n", "    loss()\n\n"),
    ("import os\n", "import os\r\n"),
    ("\n    # <<< objective", "\n     # <<< objective")])
def test_a_shared_line_that_differs_is_found_and_repaired(folder, old, new, capsys):
    before = {p: p.read_bytes() for p in folder.iterdir()}
    edit(folder / "gpt.py", old, new)
    diff = shared_diff(folder / "train_mdlm.py", folder / "gpt.py")
    assert diff.startswith("--- train_mdlm.py\n+++ gpt.py\n@@") and "return" not in diff
    main(["--write", "train_mdlm.py"], folder)
    assert capsys.readouterr().out == "changed: gpt.py\n"
    assert {p: p.read_bytes() for p in folder.iterdir()} == before

if __name__ == "__main__":
    main(sys.argv[1:])
