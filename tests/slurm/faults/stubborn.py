"""In the place of the `medvlp` command: a training that hears no warning; the rest is the real command."""

import signal
import sys
import time

if sys.argv[1] == "pretrain":
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    print("training, deaf", flush=True)
    time.sleep(300)
else:
    from launcher.main import run

    run()
