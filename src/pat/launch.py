"""`pat launch`: start a command in several processes, by a call of accelerate's launcher."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
from collections.abc import Sequence

from pat.errors import PatError

LAUNCHED = ("tune",)
"""Commands that several processes can share."""

USAGE = """\
usage: pat launch [--accelerate_flag value ...] tune [--flag value ...]

Runs `pat tune` in several processes: what stands before `tune` are flags of `accelerate launch`, what follows are those
of `pat tune`. One process for each GPU:

  pat launch --config_file configs/accelerate/ddp.yaml --num_processes 4 tune --model_name_or_path M ...
  pat launch --config_file configs/accelerate/fsdp2.yaml tune --config run.yaml

The exit status is that of the process that failed first. docs/several-gpus.md says which configuration is for what.\
"""


def launch(argv: Sequence[str]) -> int:
    """Start the processes, wait for their end, and return the exit status of the run.

    Raises:
        PatError: no command that can be launched is named.
    """
    place = next((number for number, word in enumerate(argv) if word in LAUNCHED), None)
    if {"-h", "--help"} & set(argv[:place]):
        print(USAGE)
        return 0
    if place is None:
        raise PatError(
            f"Got `pat launch {' '.join(argv)[:100]}`; expected flags of accelerate, then {' or '.join(LAUNCHED)} with "
            "its own (see `pat launch --help`)."
        )
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # The processes say themselves what has gone wrong, in one line; the launcher would add thirty.
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    arguments = launch_command_parser().parse_args([*argv[:place], "--module", "pat", *argv[place:]])
    try:
        launch_command(arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return int(failure.exitcode)
        name = signal.Signals(-failure.exitcode).name
        print(f"pat: process {rank} was ended by {name}; give the same command again to go on.", file=sys.stderr)
        return 128 - int(failure.exitcode)
    except subprocess.CalledProcessError as error:  # of a single process, which has said itself what went wrong
        return error.returncode if error.returncode >= 0 else 128 - error.returncode
    except SignalException as error:
        return 128 + int(error.sigval)
    except ValueError as error:  # of flags that do not go together
        raise PatError(f"accelerate cannot launch that: {error}") from error
    return 0
