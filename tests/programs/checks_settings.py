"""A training script that knows --check_settings: it tells what it was asked, and names each unknown flag.

python checks_settings.py --check_settings --deepspeed zero.json --learning_rate 1
"""

import os
import sys

KNOWN = ("--check_settings", "--deepspeed", "--learning_rate", "--num_samples", "--hub_repo")

if __name__ == "__main__":
    print("checked for", os.environ["WORLD_SIZE"], "ranks,", os.environ["LOCAL_WORLD_SIZE"], "here:", *sys.argv[1:])
    if "--crash" in sys.argv:
        raise RuntimeError("the check is broken")
    flags = [word for word in sys.argv[1:] if word.startswith("--")]
    problems = [f"{flag}: unknown; did you mean --learning_rate?" for flag in flags if flag not in KNOWN]
    if "--num_samples" in flags and int(sys.argv[sys.argv.index("--num_samples") + 1]) < 1:
        problems.append("--num_samples: not a positive number, says the script")
    print(*problems, sep="\n", end="", file=sys.stderr)
    sys.exit(2 if problems else 0)
