"""Tasks of lm-evaluation-harness (pip install lm_eval) for any checkpoint.

    python study/harness.py --ckpt=out/train_mdlm --tasks=lambada_openai,piqa --limit=200
    python study/harness.py --ckpt=out/gpt --tasks=mine --include=FOLDER    # tasks of your own

A likelihood is exact of gpt.py, by the chain rule. Of masked diffusion it is the bound on the text
alone, given what comes before it, which is never masked: a mean over --draws of pairs of masks,
whose standard error is printed. Bounds of several texts are not exactly comparable, so an accuracy
that rests on them has its noise. "Greedy" is what generation at temperature 0 in --order and
--steps writes (--greedy=0 says no instead, for multiple choice, which does not ask). A context that
is too long loses its beginning; rolling likelihoods cut a text into windows.
"""
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import sample  # noqa: E402
from study.golf import require, run_cli  # noqa: E402

try:
    import lm_eval
    from lm_eval.api.model import LM
except ImportError:
    print("harness.py: needs a package: pip install lm_eval", file=sys.stderr)
    sys.exit(2)

NEW_TOKENS = 256  # where a task does not say how many

class Adapter(LM):
    def __init__(self, lm, draws=8, greedy=True, **how):
        super().__init__()
        self.lm, self.draws, self.greedy, self.how = lm, draws, greedy, how
        self.errors = []  # of every likelihood, in nats

    def fit(self, context, n_new):
        """The end of a context that leaves room for so many tokens."""
        room = max(0, self.lm.cfg.seq_len - n_new)
        while (excess := len(self.lm.tokenizer.encode(context)) - room) > 0:
            context = context[excess:]
        return context

    def write(self, context, n_new, **how):
        """What the model writes after a context."""
        length = len(self.lm.tokenizer.encode(context)) + n_new
        text, = self.lm.generate(context, length=length, **self.how, **how)
        return text[len(context):]

    def score(self, text, given=""):
        bound = self.lm.score(text, given=given, draws=self.draws)
        self.errors.append(bound.nats_stderr)
        return -bound.nats

    def loglikelihood(self, requests):
        results = []
        for context, text in (request.args for request in requests):
            n_new = len(self.lm.tokenizer.encode(text))
            context = self.fit(context, n_new)
            is_greedy = self.greedy and self.write(context, n_new, temperature=0.0) == text
            results.append((self.score(text, context), is_greedy))
        return results

    def loglikelihood_rolling(self, requests):
        return [self.score(request.args[0]) for request in requests]

    def generate_until(self, requests):
        texts = []
        for context, settings in (request.args for request in requests):
            n_new = min(settings.get("max_gen_toks", NEW_TOKENS), self.lm.cfg.seq_len - 1)
            stops = settings.get("until") or []
            heat = float(settings.get("temperature", 0)) if settings.get("do_sample") else 0.0
            text = self.write(self.fit(context, n_new), n_new, temperature=heat,
                              stop=[stops] if isinstance(stops, str) else stops)
            texts.append(text.partition(sample.END.decode())[0])
        return texts

def run(flags):
    require(flags.tasks, "--tasks=NAME[,NAME..] is needed")
    lm = sample.load(flags.ckpt, flags.script or None, device=flags.device)
    how = {} if lm.kind == "gpt" else dict(order=flags.order, steps=flags.steps)
    print(f"{lm.summary}, {lm.where}", file=sys.stderr)
    adapter = Adapter(lm, flags.draws, bool(flags.greedy), **how)
    results = lm_eval.simple_evaluate(
        adapter, tasks=flags.tasks.split(","), limit=flags.limit or None,
        task_manager=lm_eval.tasks.TaskManager(include_path=flags.include or None))
    print(lm_eval.utils.make_table(results))
    if n := len(adapter.errors):
        print(f"{n} likelihoods, standard error of each bound {sum(adapter.errors) / n:.3f} nats")

def main(argv):
    run_cli("harness.py", run, argv, __doc__, ckpt="", script="", tasks="", include="", limit=0,
            draws=8, greedy=1, order="", steps=0, device="auto")

if __name__ == "__main__":
    main(sys.argv[1:])
