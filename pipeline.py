"""Every stage in order: videos -> reconstructor -> labels -> NTP -> GRPO -> evaluation -> report.

    python pipeline.py config/toy.py                                   # what `make toy` runs
    python pipeline.py config/toy.py --videos=my/videos --out=out/mine # the same on windows cut from your own videos

Runs the commands below as you would type them, prints each, and stops at the first that fails. A stage that is done,
by the same command and settings as now, and all before it too, is skipped, so an interrupted run goes on. Processes get
one core each.
"""
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from gazing import parse_alpha
from lib import configurator
from lib.checkpoint import write_whole


@dataclass
class Config:
    out: str = "out/toy"               # results; the data go to <out>/data
    videos: str = ""                   # folders of long videos to cut into windows; empty: generate the toy set
    configs: str = "config/toy"        # <configs>_videomae.py, <configs>_label.py, … hold the settings of each stage
    n_train: int = 4000                # generated training clips
    n_val: int = 200                   # generated clips that are held out
    cut: str = "--stride=2"            # how to cut windows from `videos`
    videomae_args: str = ""            # more settings of this stage, as on its command line: "--steps=200 --lr=1e-3"
    ntp_args: str = ""
    grpo_args: str = ""                # of both GRPO runs
    label_clips: int = 3000            # training clips that get labels
    ratio: float = 0.251               # gazing ratio at which the methods are compared
    other_ratios: str = "0.15,0.4"     # further points of the curve; empty: none
    alpha: str = "12,3"                # split of the budget over the frames
    n_frames: int = 4                  # clip length; longer ones need videomae_args=--max_num_frames=… too
    n_processes: int = 2               # cores to use
    device: str = "cpu"                # the toy models are too small for a GPU; cuda takes one per process
    seed: int = 666                    # of every stage

    def check(self):
        configurator.check_at_least(self, n_frames=1, n_train=1, n_val=1, label_clips=1, n_processes=1, seed=0)
        configurator.check_share(self, "ratio", *(["other_ratios"] if self.other_ratios else []))
        parse_alpha(self.alpha, self.n_frames)


def main():
    cfg = configurator.parse(Config, sys.argv[1:])
    out, python, seconds, history = Path(cfg.out), sys.executable, {}, []
    out.mkdir(parents=True, exist_ok=True)
    data = out / "data"
    env = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE",
                        "PYTHONWARNINGS": "ignore::UserWarning:torch"}

    def stage(name, *commands):
        """Run commands side by side, unless the stage is marked as done by these very commands after the same ones.
        Returns whether they ran."""
        lines = [" ".join(c) for c in commands]
        history.extend(lines + [Path(word).read_text() for c in commands for word in c if word.startswith(cfg.configs)])
        marker = out / f"{name}.done"
        if marker.is_file() and json.loads(marker.read_text())["history"] == history:
            seconds[name] = json.loads(marker.read_text())["seconds"]
            print(f"\n== {name}: done before")
            return False
        print(f"\n== {name}\n" + "\n".join(f"$ {line}" for line in lines), flush=True)
        t0 = time.time()
        running = []
        try:
            for i, c in enumerate(commands):
                log = None if i == 0 else open(out / f"{name}.{i}.log", "w")  # the first one talks, others to a file
                running.append(subprocess.Popen(c, env=env, stdout=log, stderr=log and subprocess.STDOUT))
            codes = [p.wait() for p in running]
        finally:
            for p in running:
                if p.poll() is None:
                    p.terminate()
        if any(codes):
            raise SystemExit(f"{name} failed (exit codes {codes}); output of background commands: {out}/{name}.*.log")
        seconds[name] = round(time.time() - t0, 1)
        marker.write_text(json.dumps({"history": history, "seconds": seconds[name]}) + "\n")
        return True

    def script(name, *args, n=1):
        torchrun = [python, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"]
        run = [python, "-u"] if n == 1 else torchrun
        return [*run, name, *args]

    n, root = cfg.n_processes, f"--root={data}"
    shared = [root, *(f"--{key}={getattr(cfg, key)}" for key in ("n_frames", "alpha", "seed", "device"))]
    mae, labels = f"--videomae={out}/videomae", f"{out}/gazing_labels.json"
    if cfg.videos:
        stage("data", script("make_data.py", "cut", f"--src={cfg.videos}", f"--out={data}", f"--seed={cfg.seed}",
                             f"--n_frames={cfg.n_frames}", *cfg.cut.split()))
    else:
        stage("data", script("make_data.py", "toy", f"--out={data}", f"--n_train={cfg.n_train}", f"--n_val={cfg.n_val}",
                             f"--n_frames={cfg.n_frames}", f"--seed={cfg.seed}", f"--n_workers={n}"))
    if stage("videomae", script("train_videomae.py", f"{cfg.configs}_videomae.py", *shared,
                                f"--out_dir={out}/videomae", *cfg.videomae_args.split(), n=n)):
        for old in out.glob("gazing_labels.json*"):  # of the reconstructor before
            old.unlink()
    stage("labels", script("label.py", f"{cfg.configs}_label.py", *shared, mae, f"--out={labels}",
                           f"--max_clips={cfg.label_clips}", n=n))
    ntp = script("train_ntp.py", f"{cfg.configs}_ntp.py", *shared, mae, f"--labels={labels}",
                 f"--val_ratio={cfg.ratio}", f"--out_dir={out}/ntp", *cfg.ntp_args.split(), n=max(1, n - 1))
    grpo = [f"{cfg.configs}_grpo.py", *shared, mae, f"--ratio={cfg.ratio}", f"--val_ratio={cfg.ratio}",
            *cfg.grpo_args.split()]
    # GRPO from scratch, to see what NTP is worth, runs beside NTP: two processes of one core do more than one of two
    stage("ntp", ntp, script("train_grpo.py", *grpo, "--init_from=scratch", f"--out_dir={out}/rl_only"))
    stage("grpo", script("train_grpo.py", *grpo, f"--init_from={out}/ntp", f"--out_dir={out}/grpo", n=n))
    ratios = ",".join(filter(None, [str(cfg.ratio), cfg.other_ratios]))
    models = ",".join(f"{m}={out}/{m}" for m in ("rl_only", "ntp", "grpo"))
    stage("eval", script("eval.py", *shared, mae, f"--models={models}", f"--out_dir={out}/eval",
                         f"--ratios={ratios}", "--greedy_clips=32"))

    result = json.loads((out / "eval" / "eval.json").read_text())
    ratio, table = next(iter(result["results"].items()))
    budgets = result["budgets"][ratio]
    print(f"\nheld-out clips: {result['clips']}, gazes per frame: {budgets}, seed {cfg.seed}\n\n"
          f"{'method':<12}{'loss':>8}{'gap closed':>12}{'predicted':>11}")
    for name, row in table.items():
        predicted = f"{row['predicted']:>11.4f}" if "predicted" in row else ""
        print(f"{name:<12}{row['loss']:>8.4f}{row['gap_closed']:>10.0f} %{predicted}")
    report = {"loss": {k: v["loss"] for k, v in table.items()}, "ratio": sum(budgets) / len(budgets) / sum_ids(out),
              "gap_closed": {k: v["gap_closed"] for k, v in table.items()},
              "seconds": seconds, "seed": cfg.seed, "clips": result["clips"],
              "commit": result["commit"]}
    write_whole(out / "report.json", json.dumps(report, indent=1) + "\n")
    print("\nseconds: " + ", ".join(f"{k} {v:.0f}" for k, v in seconds.items())
          + f"; {sum(seconds.values()):.0f} in all")
    print("\npictures:")
    for path in sorted([*out.glob("*/*.png")]):
        print(f"  {path}")
    print(f"report: {out}/report.json")


def sum_ids(out):
    mae = json.loads((out / "videomae" / "config.json").read_text())
    return sum((int(s) // mae["patch_size"]) ** 2 for s in mae["scales"].split("+"))


if __name__ == "__main__":
    main()
