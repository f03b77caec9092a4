"""Run a matrix of experiments: begin and resume what is missing, or say how far each run is.

    python study/run.py --matrix=objectives --scale=tiny --data=books --jobs=local:2
    python study/run.py --matrix=schedules --token_entropy=books.npy --jobs=slurm --queue=8
    python study/run.py --matrix=schedules --status=1

Each row of a matrix, a script with flags, is run with --seeds=3 seeds in OUT/MATRIX-SCALE/ROW_SEED
(OUT is out/study). From that folder alone is read how far a run is: absent; running, if its lock is
held; done; failed, if there is an error in output.txt (delete that file to try again); else
stalled. The same command again begins what is absent and resumes what has stalled, nothing else.
--jobs=local:N keeps N runs going here; Ctrl-C saves and ends them. --jobs=slurm submits slurm.sh,
which queues itself again until a run is done, until --queue jobs of yours are in the queue.
"""
import itertools
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from study.golf import require, run_cli  # noqa: E402

TINY = ("--seq_len=256 --n_layer=4 --n_head=4 --n_embd=128 --batch_tokens=4096 --micro_batch=16 "
        "--val_tokens=262144 --eval_every=0 --shuffle=1 --lr=0.03")
SCALES = {  # 0.4M, 0.8M, 25M and 3.3B training tokens
    "mini": f"{TINY} --steps=100 --compile=0",  # compiling takes longer than this
    "tiny": f"{TINY} --steps=200",
    "10m": "--seq_len=256 --n_layer=6 --n_head=6 --n_embd=384 --batch_tokens=16384 "
           "--micro_batch=64 --steps=1500 --val_tokens=1048576 --eval_every=250 --shuffle=1",
    "124m": "--seq_len=1024 --n_layer=12 --n_head=6 --n_embd=768 --batch_tokens=131072 "
            "--micro_batch=16 --steps=25000 --eval_every=1000 --shuffle=1",
}
ALIKE = "--value_residual=0 --muon_beta2=0"  # train_block's network as that of the others
COINS = "--estimator=bernoulli"
SCHEDULES = ("linear", "cosine", "loglinear", "sqrt", "clipped_cosine", "sigmoid")
MATRICES = {  # row -> script, flags; the first row is what the table compares with
    "objectives": {
        "gpt": ("gpt.py", ""),
        "block": ("train_block.py", ALIKE),
        "mdlm": ("train_mdlm.py", ""),
        "absorb": ("train_sedd.py", "--val_draws=4"),
        "uniform": ("train_sedd.py", "--graph=uniform --val_draws=4"),
    },
    "weights": {
        "uniform": ("train_mdlm.py", "--loss_weight=uniform"),
        "elbo": ("train_mdlm.py", "--loss_weight=elbo"),
        "uniform_coins": ("train_mdlm.py", f"--loss_weight=uniform {COINS}"),
        "elbo_coins": ("train_mdlm.py", f"--loss_weight=elbo {COINS}"),
        "clipped_coins": ("train_mdlm.py", f"--loss_weight=clipped {COINS}"),
        "row_mean_coins": ("train_mdlm.py", f"--loss_weight=row_mean {COINS}"),
    },
    "schedules": {
        **{name: ("train_mdlm.py", f"{COINS} --schedule={name}") for name in SCHEDULES},
        **{f"{name}_entropy": ("train_mdlm.py", f"{COINS} --schedule={name} --token_entropy=FILE")
           for name in SCHEDULES},
        "gpt": ("gpt.py", ""),
    },
}
ERROR = re.compile(r"^(\w+\.py: |(\[rank\d+\]: *)?Traceback )", re.M)  # in a run's output

# ----------------------------------------------------------------------------- states
def is_locked(folder):
    """Is a run at work there? A shared lock, so that this question holds up nobody."""
    try:
        import fcntl
        with open(folder / "lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (ImportError, OSError) as e:  # Windows, or not begun
        return isinstance(e, BlockingIOError)
    return False

def state(folder):
    """-> (state, what there is to say of it)"""
    locked = is_locked(folder)  # asked first: a run may end while its log is read
    log, output = (path.read_text(errors="replace") if path.exists() else ""
                   for path in (folder / "log.txt", folder / "output.txt"))
    steps = re.findall(r"^step:(\d+/\d+) ", log, re.M)
    at = f"step {steps[-1]}" if steps else ""
    if locked:
        return "running", at
    if re.search("^done: ", log, re.M):
        return "done", re.findall(r"^step:\d+/\d+ (val_\S+ bpb:\S+)", log, re.M)[-1]
    if ERROR.search(output):
        return "failed", output.strip().splitlines()[-1]
    return ("stalled", at) if log else ("absent", "")

def runs_of(matrix, scale, seeds, out, data="", token_entropy=""):
    """[(folder, command)], the first seed of all rows before the second."""
    runs = []
    for seed in range(seeds):
        for row, (script, flags) in MATRICES[matrix].items():
            folder = Path(out, f"{matrix}-{scale}", f"{row}_{seed}")
            flags = flags.replace("=FILE", f"={token_entropy}").split()
            runs.append((folder, [str(ROOT / script), f"--data={data}", *SCALES[scale].split(),
                                  *flags, f"--seed={seed}", f"--out={folder}"]))
    return runs

# ----------------------------------------------------------------------------- starting
def unfinished(runs):
    """Those that are absent or stalled when their turn comes"""
    for folder, command in runs:
        how_far, _ = state(folder)
        if how_far in ("absent", "stalled"):
            print(f"{folder}: {how_far}, started", flush=True)
            folder.mkdir(parents=True, exist_ok=True)
            yield folder, command

def run_here(runs, n_jobs):
    env, running = {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // n_jobs)), **os.environ}, []
    try:
        for folder, command in unfinished(runs):
            with open(folder / "output.txt", "w") as output:
                running.append(subprocess.Popen([sys.executable, *command, "--resume=1"],
                                                stdout=output, stderr=output, env=env))
            while len(running) == n_jobs:
                time.sleep(0.2)
                running = [process for process in running if process.poll() is None]
    except KeyboardInterrupt:
        print("interrupted; the runs save and end", flush=True)
    finally:
        for process in running:
            process.wait()

def ask(*command):
    done = subprocess.run(command, capture_output=True, text=True)
    require(done.returncode == 0, f"{command[0]}: {done.stderr}")
    return done.stdout

def submit(runs, limit):
    queue = ask("squeue", "--me", "--noheader", "--format=%j").split()
    runs = [job for job in runs if "/".join(job[0].parts[-2:]) not in queue]
    for folder, command in itertools.islice(unfinished(runs), max(0, limit - len(queue))):
        name = "/".join(folder.parts[-2:])
        (folder / "output.txt").unlink(missing_ok=True)
        ask("sbatch", f"--job-name={name}", f"--output={folder}/output.txt",
            str(ROOT / "slurm.sh"), *command)

def run(flags):
    require(flags.matrix in MATRICES, f"--matrix={flags.matrix}: there are {', '.join(MATRICES)}")
    require(flags.scale in SCALES, f"--scale={flags.scale}: there are {', '.join(SCALES)}")
    require(re.fullmatch(r"slurm|local:[1-9]\d*", flags.jobs),
            f"--jobs={flags.jobs}: local:N or slurm")
    runs = runs_of(flags.matrix, flags.scale, flags.seeds, flags.out, flags.data,
                   flags.token_entropy)
    if not flags.status:
        lacks_file = not flags.token_entropy and "=FILE" in str(MATRICES[flags.matrix])
        require(not lacks_file, "--token_entropy=FILE.npy: make it with study/entropy.py")
        if flags.jobs == "slurm":
            submit(runs, flags.queue)
        else:
            run_here(runs, int(flags.jobs.removeprefix("local:")))
    found = [state(folder) for folder, _ in runs]
    for (folder, _), (name, detail) in zip(runs, found, strict=True):
        print(f"{folder.name:24} {name:8} {detail}".rstrip())
    names = [name for name, _ in found]
    print(", ".join(f"{names.count(name)} {name}" for name in dict.fromkeys(names)))

def main(argv):
    run_cli("run.py", run, argv, __doc__, matrix="", scale="tiny", data="books", seeds=3,
            jobs="local:1", queue=8, status=0, token_entropy="", out="out/study")

if __name__ == "__main__":
    main(sys.argv[1:])
