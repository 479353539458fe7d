"""Hold a Ray on this machine that several runs share; each would else start one of its own, in 5 to 15 seconds.

    python -m infir2.ray_share ADDRESS_FILE

Writes its address, for RAY_ADDRESS, once it is there; ends with the process that started it, or at SIGTERM. Its token
is RAY_AUTH_TOKEN, which the runs need too. Runs on CPUs alone: on a GPU each run asks for the whole device.
"""

import os
import sys
import time
from pathlib import Path

import ray

from infir2 import ray_launch
from infir2.files import write_text
from infir2.processes import exit_on_signals

CPUS = 16  # a worker takes one by Ray's count, whatever the machine has
STORE_BYTES = 256 * 2**20  # for the responses of small models


def main() -> None:
    parent = os.getppid()
    os.environ["RAY_ADDRESS"] = "local"
    exit_on_signals()
    with ray_launch.session(CPUS, cpu=True, store_bytes=STORE_BYTES):
        exit_on_signals()  # Ray has set its own
        write_text(Path(sys.argv[1]), ray.get_runtime_context().gcs_address)
        while os.getppid() == parent:
            time.sleep(1)


if __name__ == "__main__":
    main()
