"""Small problems for tasks.py: how one is drawn, and what answers it.

draw(rng) -> (key, question, answer); training and test share no key. is_right(question, answer)
knows every right answer; where it is None, only the one that was drawn is right. A question or an
answer shorter than its place is filled up with dots.
"""
import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Callable
from fractions import Fraction

PAD = "."

@dataclasses.dataclass(frozen=True)
class Task:
    draw: Callable
    is_right: Callable | None
    prompt_len: int  # bytes
    answer_len: int
    block_len: int  # of train_block; divides both
    n_train: int = 50_000  # problems, all different
    n_test: int = 500

    @property
    def seq_len(self):
        return self.prompt_len + self.answer_len

@functools.cache
def peers(size):
    """For every cell of a grid, those of its row, column and box, 2 x 2, 2 x 3 or 3 x 3 cells."""
    places, height = [(i // size, i % size) for i in range(size * size)], math.isqrt(size)
    keys = [((0, r), (1, c), (2, r // height, c // (size // height))) for r, c in places]
    return [[j for j, b in enumerate(keys) if i != j and {*a} & {*b}] for i, a in enumerate(keys)]

def complete(grid, size, rng):
    """Fill the zeros of a grid in place, at random -> whether that is possible."""
    if 0 not in grid:
        return True
    at = grid.index(0)
    seen = {grid[cell] for cell in peers(size)[at]}
    for digit in (1 + rng.permutation(size)).tolist():
        if digit not in seen:
            grid[at] = digit
            if complete(grid, size, rng):
                return True
    grid[at] = 0
    return False

def draw_sudoku(rng, size):
    n = size * size
    grid = [0] * n
    complete(grid, size, rng)
    answer = "".join(map(str, grid))
    few, many = (n // 20, n // 4) if size > 6 else (n // 4, 3 * n // 4)
    blanks = rng.permutation(n)[:rng.integers(few, many + 1)]
    return answer, "".join(PAD if i in blanks else c for i, c in enumerate(answer)), answer

def solves_sudoku(question, answer):
    size = math.isqrt(len(question))
    keeps = all(a in (PAD, b) for a, b in zip(question, answer, strict=True))
    is_full = set(answer) == {str(1 + i) for i in range(size)}
    return keeps and is_full and all(answer[cell] not in [answer[i] for i in others]
                                     for cell, others in enumerate(peers(size)))

def draw_countdown(rng):
    """Join two of four digits, or of what they have become, until one value is left."""
    digits = rng.integers(1, 10, 4).tolist()
    parts = [(digit, str(digit)) for digit in digits]
    while len(parts) > 1:
        (a, x), (b, y) = (parts.pop(rng.integers(len(parts))) for _ in range(2))
        ways = [(a + b, "+"), (a * b, "*")]
        ways += [(a - b, "-")] if a > b else []
        ways += [(a // b, "/")] if a % b == 0 else []
        value, sign = ways[rng.integers(len(ways))]
        parts.append((value, f"({x}{sign}{y})"))
    value, text = parts[0]
    if value > 99:
        return draw_countdown(rng)
    question = "".join(map(str, digits)) + f"={value}"
    return str(sorted(digits)), question.rjust(8, PAD), text[1:-1] + PAD

def solves_countdown(question, answer):
    digits, target = question.strip(PAD).split("=")
    answer = answer.rstrip(PAD)
    if not re.fullmatch(r"\(*[1-9]\)*([-+*/]\(*[1-9]\)*)*", answer):
        return False
    exact = re.sub(r"\d", r"Fraction(\g<0>)", answer)  # so that 1/3*3 is 1
    try:
        value = eval(exact, {"Fraction": Fraction})  # digits, operators and brackets alone
    except (SyntaxError, ZeroDivisionError):
        return False
    return value == int(target) and Counter(re.findall(r"\d", answer)) <= Counter(digits)

def draw_addition(rng):
    a, b = rng.integers(0, 10**5, 2).tolist()
    return str(sorted((a, b))), f"{a:05}+{b:05}=", f"{a + b:06}"

def draw_brackets(rng):
    text, closers = "", []
    for left in range(20, 0, -1):
        if not closers or len(closers) < left and rng.random() < 0.5:
            kind = rng.integers(2)
            text += "(["[kind]
            closers.append(")]"[kind])
        else:
            text += closers.pop()
    at = rng.integers(3, 10)
    question = text[:at] + 8 * PAD + text[at + 8:]
    return question, question, text[at:at + 8]

def closes_brackets(question, answer):
    text, before = question.replace(8 * PAD, answer), None
    while text != before:
        before, text = text, text.replace("()", "").replace("[]", "")
    return not text

def draw_sort(rng):
    letters = [chr(97 + i) for i in rng.permutation(26)[:12]]
    answer = "".join(sorted(letters))
    return answer, "".join(letters), answer

def draw_fact(rng):
    """A name, in capitals, and what it is."""
    name, what = ("".join(map(chr, first + rng.integers(26, size=4))) for first in (65, 97))
    return name, name, what

TASKS = {
    "sudoku4": Task(lambda rng: draw_sudoku(rng, 4), solves_sudoku, 16, 16, 4),
    "sudoku6": Task(lambda rng: draw_sudoku(rng, 6), solves_sudoku, 36, 36, 6, 20_000),
    "sudoku9": Task(lambda rng: draw_sudoku(rng, 9), solves_sudoku, 81, 81, 9, 20_000),
    "countdown": Task(draw_countdown, solves_countdown, 8, 12, 4),
    "addition": Task(draw_addition, None, 12, 6, 3),
    "reversal": Task(draw_fact, None, 8, 4, 4, 200, 50),
    "brackets": Task(draw_brackets, closes_brackets, 20, 8, 4),
    "sort": Task(draw_sort, None, 12, 12, 4),
}
