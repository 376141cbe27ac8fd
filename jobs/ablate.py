r"""Run a study, of the paper but for margins: train its settings with several seeds and say which claims hold.

    python jobs/ablate.py layer-norm --data.root Stanford_Online_Products --recipe sop_resnet50_512

STUDY is class-sampling (figure 4), layer-norm (figure 3), dimension (figure 2), images-per-class (a table), temperature
or margin. --seeds sets the seeds of each setting (default: 0 1). --at-once sets the number of parallel trials
(default: as many as the cluster has room for, or 2 on a single machine). All other flags are those of jobs/train_sop.py
and apply to all settings. The same command with the study's --run-name resumes an interrupted study.
"""

import argparse

from nsl_dist.commandline import parse_train_config, run_job


def main() -> None:
    """Parse, train every setting, compare."""
    from nsl_dist.ablation.studies import STUDIES

    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False, usage="jobs/ablate.py STUDY [OPTIONS]")
    own.add_argument("study", choices=list(STUDIES), nargs="?")
    own.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    own.add_argument("--at-once", type=int)
    arguments, rest = own.parse_known_args()
    config = parse_train_config(rest, description=__doc__ or "")
    if arguments.study is None:
        raise ValueError(f"say which study: {', '.join(STUDIES)}")
    if len(set(arguments.seeds)) < len(arguments.seeds) or min(arguments.seeds) < 0:
        raise ValueError(f"--seeds {' '.join(map(str, arguments.seeds))} must be distinct and not negative")
    if arguments.at_once is not None and arguments.at_once < 1:
        raise ValueError(f"--at-once {arguments.at_once} must be at least 1")

    from nsl_dist.ablation.sweep import run_study  # after parsing: --help needs neither torch nor Ray

    run_study(arguments.study, config, seeds=tuple(arguments.seeds), at_once=arguments.at_once)


if __name__ == "__main__":
    run_job(main, shows_results=True)
