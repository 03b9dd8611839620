"""The entrypoint: N tasks + one base model in, N sparse experts + one merged model out.

    ray job submit --address http://127.0.0.1:8265 --working-dir . -- python pipeline/main.py --config …
    python -m pipeline.main --config … [section.field=value …]

Exit status: 0 done; 1 something failed, finished work is kept; 2 bad input; 130 stopped.
"""

import sys
from pathlib import Path

if str(Path(__file__).resolve().parent.parent) not in sys.path:  # `python pipeline/main.py` puts only pipeline/ there
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from infra.ending import start
from pipeline.commands.run import run

if __name__ == "__main__":
    start(run, "python pipeline/main.py")
